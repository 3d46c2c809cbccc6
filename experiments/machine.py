"""The machine a program runs on: its devices, and where compiled programs are kept."""

import contextlib
import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax

from experiments import console
from experiments.options import Settings
from tljax import prefix, train
from tljax.types import InputError


def prepare(made: Settings) -> train.Means:
    """The means of a run; the first call in a process decides how many devices a CPU makes.

    Raises InputError for more devices than there are, and for a folder that cannot hold compiled programs.
    """
    _one_device_a_core(made.devices)
    _keep_compiled(made.compilation_cache)
    there = jax.local_devices()
    wanted = made.devices or len(there)
    if wanted > len(there):
        raise InputError(f"--devices={wanted}: there are {len(there)} of the kind {there[0].device_kind}")
    store = prefix.Store(made.features_budget, made.features_dtype) if made.features_budget else None
    return train.Means(tuple(there[:wanted]), many=made.many, store=store, say=console.once())


def _one_device_a_core(wanted: int | None) -> None:
    """Virtual devices of a CPU, unless JAX runs already or somebody else has said how many."""
    if jax.config.values["jax_num_cpu_devices"] != -1 or "host_platform_device_count" in os.environ.get(
        "XLA_FLAGS", ""
    ):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(RuntimeError):  # JAX has devices already
        jax.config.update("jax_num_cpu_devices", wanted or cores)


def _keep_compiled(folder: str | None) -> None:
    """Compiled programs outlive the process, in a folder of this kind of machine: others cannot run them."""
    if folder == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if folder is None and jax.config.values["jax_compilation_cache_dir"]:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tljax"
    place = Path(folder).expanduser().absolute() if folder else home / f"compiled-{_kind()}"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if folder:
            raise InputError(
                f"--compilation_cache={folder} cannot be made ({error.strerror}): name another folder"
            ) from error
        return
    settings: dict[str, Any] = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(place),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)


def _kind() -> str:
    """Of the processor and its instructions."""
    try:
        flags = [
            line
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith(("flags", "Features", "model name"))
        ]
    except OSError:
        flags = []
    return hashlib.sha256("\n".join([platform.machine(), *sorted(set(flags))]).encode()).hexdigest()[:12]
