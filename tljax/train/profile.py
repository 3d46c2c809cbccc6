"""A trace of some steps of training, for TensorBoard's profiler or Perfetto."""

from pathlib import Path

import jax


class Profile:
    """The trace of steps `first` to `last` (that one left out) of the first group of fits that takes them.

    It changes no bits: a call of the compiled function ends where the trace begins and where it ends. It has a state,
    whether the trace is under way or done, as the profiler of JAX has.
    """

    def __init__(self, folder: Path, first: int, last: int) -> None:
        self.folder, self.first, self.last = folder, first, last
        self.is_done, self._is_open = False, False
        self.is_said = False
        """Whether the user knows that it is done."""

    def before(self, step: int, stop: int) -> int:
        """The step at which a call that begins at `step` is to end, if it was to end at `stop`; begins the trace."""
        if self.is_done or (step > self.first and not self._is_open):
            return stop
        if step == self.first and not self._is_open:
            jax.profiler.start_trace(self.folder)
            self._is_open = True
        return min(stop, self.first if step < self.first else self.last)

    def after(self, step: int) -> None:
        """Ends the trace when the call before `step` was its last."""
        if self._is_open and step >= self.last:
            self.close()

    def close(self) -> None:
        """Ends the trace where training ends, be it before the last of its steps."""
        if self._is_open:
            jax.profiler.stop_trace()
            self.is_done, self._is_open = True, False
