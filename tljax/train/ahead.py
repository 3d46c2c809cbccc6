"""Programs that are compiled in threads before their turn comes: XLA lets other threads run while it compiles."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import jax

from tljax import switches
from tljax.train import loop
from tljax.train.data import Data, Stream
from tljax.train.step import Fit, Spec


class Group(NamedTuple):
    """What `loop.fit` is to be called with."""

    spec: Spec
    fits: Sequence[Fit]
    ends: Sequence[int]


Phase = tuple[tuple[int, ...], int]
"""(Which fits of a group, the number of a phase): what `Execution.before_phase` is called with."""

PARAMETER_BYTES = 2**28
"""Of the parameters of a group's fits, up to which it is compiled ahead: they are read for what the fits share."""


@dataclass
class _Job:
    """Something that a thread does: it finds the programs of a group, or compiles one."""

    do: Callable[[], None]
    program: tuple[int, Phase] | None = None
    """(The number of the group, the phase) of a program."""
    ended: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def compiled_ahead(
    groups: Sequence[Group], data: Data | Stream, execution: loop.Execution, workers: int | None = None
) -> Iterator[Callable[[int, tuple[int, ...], int], None]]:
    """Compiles the programs of groups, of each phase whose masks are known before it begins, while others train.

    It yields a function (number of a group, which of its fits, number of a phase), to be called before these fits begin
    this phase. It returns when their program is there or will not be compiled ahead, and drops what comes before it. Of
    the first group nothing is compiled before its first call: of a run that goes on, phases may be behind it.

    What is needed first is compiled first, by `workers` threads, as many by default as there are cores but one. What
    fails here fails again, and is told, where it is trained. Nothing but the programs is made or kept. Nothing is
    compiled ahead of several processes, of streams, under `jax.pmap`, and of more than PARAMETER_BYTES.
    """
    lock, waiting, running = threading.Lock(), dict[tuple[int, int], _Job](), list[_Job]()
    begun: dict[int, set[Phase]] = {number: set() for number in range(len(groups))}
    places: dict[int, dict[Phase, int]] = {}
    """{group: {phase: its place among the group's programs}} of groups whose programs are known."""
    pool = ThreadPoolExecutor(max(1, min(8, workers or (os.cpu_count() or 2) - 1)), thread_name_prefix="compile")

    def add(number: int, place: int, job: _Job) -> None:
        waiting[number, place] = job
        pool.submit(work)

    def work() -> None:
        """Do what is needed first."""
        with lock:
            if not waiting:
                return
            job = waiting.pop(min(waiting))
            running.append(job)
        # What fails is not kept: with its traceback it would hold the arrays of the group.
        with contextlib.suppress(Exception), switches.trusted():
            job.do()
        with lock:
            running.remove(job)
        job.ended.set()

    def find(number: int) -> None:
        """Have the programs of a group compiled that are still to come."""
        group = groups[number]
        if isinstance(data, Stream) or not _may_go_ahead(group, execution):
            return
        programs = list(loop.programs(group.spec, group.fits, data, group.ends, execution))
        with lock:
            places[number] = {(fits, phase): place for place, (fits, phase, _) in enumerate(programs)}
            behind = max((places[number].get(phase, -1) for phase in begun[number]), default=-1)
            for place, (fits, phase, compile_program) in list(enumerate(programs))[behind + 1 :]:
                add(number, place, _Job(compile_program, (number, (fits, phase))))

    def before(number: int, fits: tuple[int, ...], phase: int) -> None:
        with lock:
            if number == 0 and not begun[0]:
                add(0, -1, _Job(lambda: find(0)))
            begun[number].add((fits, phase))
            behind = number, places.get(number, {}).get((fits, phase), -1)
            for key in [key for key in waiting if key <= behind and key != (number, -1)]:
                del waiting[key]
            compiling = [job for job in running if job.program == (number, (fits, phase))]
        for job in compiling:
            job.ended.wait()

    try:
        with lock:
            for number in range(1, len(groups)):
                add(number, -1, _Job(lambda number=number: find(number)))  # type: ignore[misc]
        yield before
    except BaseException:
        with lock:
            waiting.clear()
        pool.shutdown(wait=False, cancel_futures=True)  # a stop or an error waits for no compilation
        raise
    pool.shutdown(cancel_futures=True)


def _may_go_ahead(group: Group, execution: loop.Execution) -> bool:
    if jax.process_count() > 1 or execution.mode != "jit":
        return False
    size = len(group.fits) * sum(leaf.nbytes for leaf in jax.tree.leaves(group.fits[0].params))
    return size <= PARAMETER_BYTES
