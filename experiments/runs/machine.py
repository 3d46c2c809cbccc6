"""The machine a program runs on: its devices, and where compiled programs are kept."""

import contextlib
import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax

from experiments.runs import console, processes
from experiments.runs.options import MOST, Settings
from tljax import files, surroundings, train
from tljax.types import InputError


def prepare(made: Settings) -> train.Execution:
    """The means of a run; the first call in a process decides how many devices a CPU makes.

    Raises InputError for a mesh that cannot be, more devices than there are, processes that do not find each other,
    and for a folder that cannot hold compiled programs.
    """
    trial, data = _mesh(made)
    processes.check(made)
    count = made.num_processes or 1  # of a cluster it is known later, and there a CPU is one device a core
    _one_device_a_core(made.devices or -(-trial * data // count) or None)
    _keep_compiled(made.compilation_cache)
    processes.start(made)
    devices = _chosen(made, trial * data)
    say = console.once()
    if around := surroundings.switches():
        named = ", ".join(f"{name}={value}" for name, value in around.items())
        say(f"results are those of {named}: it enters the keys of all fits, and environment.json")
    every = made.parallel == "pmap" or made.distributed
    store = train.FeatureCache(made.features_budget, made.features_dtype) if made.features_budget else None
    batch = data or (len(devices) if every else 1)
    return train.Execution(devices, batch, made.parallel, made.many, store, say)


def _mesh(made: Settings) -> tuple[int, int]:
    """The axes (trial, data) of `--mesh`, an axis that is not named being 1; zeros where none is."""
    text = ",".join(made.mesh)
    sizes = {"trial": 1, "data": 1} if text else {"trial": 0, "data": 0}
    for part in made.mesh:
        name, _, size = part.partition(":")
        if name not in sizes or not size.isdecimal() or not int(size) > 0 or text.count(f"{name}:") > 1:
            raise InputError(f"--mesh={text}: write its axes once each with their sizes, such as data:4,trial:2")
        sizes[name] = int(size)
    if sizes["trial"] * sizes["data"] > MOST["devices"]:
        raise InputError(
            f"--mesh={text}: it has {sizes['trial'] * sizes['data']:,} devices, at most {MOST['devices']:,}"
        )
    if made.parallel == "pmap" and sizes["trial"] > 1:
        raise InputError(f"--mesh={text}: --parallel=pmap trains one fit at a time, so leave out the axis trial")
    return sizes["trial"], sizes["data"]


def _chosen(made: Settings, size: int) -> tuple[Any, ...]:
    """As many devices as the mesh has, of all processes alike; without a mesh all, or `--devices` of each process."""
    there, count = jax.local_devices(), jax.process_count()
    if size and (size % count or made.devices not in (None, size // count)):
        devices = f" and --devices={made.devices}" if made.devices else ""
        raise InputError(
            f"--mesh={','.join(made.mesh)} has {size} devices{devices} in {_processes(count)}: they differ"
        )
    wanted = made.devices or size // count or len(there)
    if wanted > len(there):
        flag = f"--devices={wanted}" if made.devices else f"--mesh={','.join(made.mesh)}"
        raise InputError(f"{flag}: there are {len(there)} of the kind {there[0].device_kind}")
    if count == 1:
        return tuple(there[:wanted])
    each: dict[int, list[Any]] = {}
    for device in jax.devices():
        each.setdefault(device.process_index, []).append(device)
    return tuple(device for own in sorted(each) for device in each[own][:wanted])


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


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
    try:
        home = folder or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        place = files.place(home) if folder else files.place(home) / "tljax" / f"compiled-{_kind()}"
    except InputError as error:
        if folder:
            raise InputError(f"--compilation_cache={error}") from error
        return  # there is no home
    if files.not_text(place) is not None:
        if folder:
            raise InputError(f"--compilation_cache={folder}: its path is no UTF-8, and XLA needs one: name another")
        return
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
