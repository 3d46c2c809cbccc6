"""Prove a strategy, a line for each check.

    python -m experiments.check --strategy=last_k:k=2

Each check prints a line: ok, FAILED with the reason, or - where the check does not apply. Exit code 1 if any fails.
"""

from experiments import run_program

if __name__ == "__main__":  # before the other imports, so that a failure in them is reported in one line
    run_program(__file__)

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.runs import command_line, console
from experiments.runs.command_line import flag
from tljax.types import InputError


@dataclass(frozen=True)
class CheckFlags:
    """Which strategy is checked, on which model."""

    strategy: str | None = flag(None, "a file of tljax/strategies, or FILE.py:strategy, with options; needed")
    model: str = flag(
        "mlp",
        "tried first: a file of tljax/models, or FILE.py:model (with images 8 x 8 pixels, default mlp with 2 x 2); "
        "a small CNN with norms and five odd pytrees come after it",
    )


def run(strategy: str | None, model: str = "mlp") -> None:
    """Print a line for each check; raises InputError if any fails."""
    if not strategy:
        raise InputError("--strategy is not given: name what to check, such as --strategy=mine.py:strategy")
    from tljax import audit  # after the flags are read, so that help is quick

    checks = audit.check_strategy(strategy, model=model)
    words = {True: "ok", False: "FAILED", None: "-"}
    for check in checks:
        console.say(f"{words[check.passed]:<7} {check.name:<36} {check.detail}")
    failed = [check.name for check in checks if check.passed is False]
    if failed:
        raise InputError(f"strategy '{strategy}' fails {len(failed)} of {len(checks)} checks: {'; '.join(failed)}")


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    command_line.main(argv, str(__doc__), lambda _, check_flags: run(**vars(check_flags)), CheckFlags)
