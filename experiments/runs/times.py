"""How long a run took to its first step, and what it compiled."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax.monitoring

from experiments.runs import console, directory, process
from tljax import train


@dataclass
class Times:
    """What is noted of a run while it is under way."""

    program: str
    begun: float = field(default_factory=time.perf_counter)
    """In seconds of `time.perf_counter`."""
    first_step: float | None = None
    """Seconds from `begun` to the first step of the first fit; None before it."""
    durations: list[float] = field(default_factory=list)
    """The seconds of everything that JAX traced, lowered and compiled or loaded from its cache, in any thread."""
    programs: int = 0
    """How many programs it compiled or loaded."""

    def watched(self, execution: train.Execution) -> train.Execution:
        """The execution, whose first step is noted."""

        def on_compiled(fits: tuple[int, ...], cost: train.Cost) -> None:
            if self.first_step is None:
                self.first_step = time.perf_counter() - self.begun
            execution.on_compiled(fits, cost)

        return replace(execution, on_compiled=on_compiled)

    def leave(self, folder: Path) -> None:
        """Say what was noted, and add a line of it to the run directory; nothing of a run that trained nothing."""
        if self.first_step is None or not process.first():
            return
        compiling = sum(self.durations)
        console.say(
            f"first step after {self.first_step:.1f} s; {self.programs:,} programs compiled or loaded in "
            f"{compiling:.1f} s, added up over threads"
        )
        record = {
            "program": self.program,
            "first_step": round(self.first_step, 3),
            "compiling": round(compiling, 3),
            "programs": self.programs,
            "seconds": round(time.perf_counter() - self.begun, 3),
        }
        directory.add_times(folder, record)


@contextmanager
def noted(program: str) -> Iterator[Times]:
    """What is noted of a run of a program, from now until the end of the `with`."""
    times = Times(program)

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            times.durations.append(duration_secs)
            times.programs += event.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield times
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
