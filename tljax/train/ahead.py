"""Programs that are compiled in threads before their turn comes: XLA lets other threads run while it compiles."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from tljax import masks, switches
from tljax.train import features, loop
from tljax.train.data import Data, Stream
from tljax.train.step import Fit, Spec, batch_size, specialize


class Group(NamedTuple):
    """What `loop.fit` is to be called with."""

    spec: Spec
    fits: Sequence[Fit]
    ends: Sequence[int]


STATE_BYTES = 2**28
"""Of the parameters of a group's fits, and of the data where a mesh gets a copy of its own, up to which it is compiled
ahead: its first state is made for that."""


@contextlib.contextmanager
def compiled_ahead(
    groups: Sequence[Group], data: Data | Stream, execution: loop.Execution, workers: int | None = None
) -> Iterator[Callable[[int], None]]:
    """Compiles what each of the groups but the first begins with, in their order, while others are trained.

    It yields a function to be called with a group's number before that group is trained: it returns when the group's
    program is there, or will not be compiled ahead. What fails here fails again, and is told, where it is trained.
    There are `workers` threads, by default as many as there are cores but one. Nothing is compiled ahead of several
    processes, of streams, and of what is larger than STATE_BYTES or trains on features of frozen stages.
    """
    futures: dict[int, Future[None]] = {}
    pool = ThreadPoolExecutor(max(1, min(8, workers or (os.cpu_count() or 2) - 1)), thread_name_prefix="compile")

    def wait(number: int) -> None:
        future = futures.get(number)
        if future is not None and not future.cancel():
            future.result()

    try:
        for number, group in enumerate(groups):
            if number:
                futures[number] = pool.submit(_compile, group, data, execution)
        yield wait
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)  # a stop or an error waits for no compilation
        raise
    pool.shutdown(cancel_futures=True)


def _may_go_ahead(group: Group, data: Data | Stream, execution: loop.Execution) -> bool:
    if jax.process_count() > 1 or isinstance(data, Stream) or execution.mode != "jit":
        return False
    first = group.fits[0]
    mask = first.phases[0][1]
    size = len(group.fits) * sum(leaf.nbytes for leaf in jax.tree.leaves(first.params))
    if len(execution.devices) > 1:
        size += sum(leaf.nbytes for leaf in jax.tree.leaves((data.inputs, data.targets)))
    if masks.is_strategy(mask) or size > STATE_BYTES:
        return False
    passes = group.ends[-1] * batch_size(first)
    short = specialize(group.spec, first, (mask,))
    return not short.reestimated and not features.features_bytes(short, first, data, passes, execution.cache)


class _Compiled(Exception):
    """Raised as soon as the first program is compiled."""


def _compile(group: Group, data: Data | Stream, execution: loop.Execution) -> None:
    def stop(*_: Any) -> None:
        raise _Compiled

    silent = replace(execution, on_message=lambda line: None, on_compiled=stop, should_stop=lambda: False, profile=None)
    # What else fails is not kept either: with its traceback it would hold the arrays of the group.
    with contextlib.suppress(Exception), switches.trusted():
        if _may_go_ahead(group, data, execution):
            next(loop.fit(group.spec, group.fits, data, group.ends, (), silent, lambda state: None))
