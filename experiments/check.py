"""Prove a strategy before you train it: `python -m experiments.check --strategy=mine.py:strategy`

A line a check: ok, FAILED with the reason, or - where the check does not apply. Exit code 1 if any fails.
"""

from collections.abc import Sequence

from absl import flags

from experiments import commandline, console, options
from tljax.types import InputError

_HELP = """
  --strategy   a file of tljax/strategies, package.module:attribute, or FILE.py:strategy, with options: last_k:k=2
  --model      tried first, with images 8 x 8: a file of tljax/models, or FILE.py:model (default mlp, whose images are
               2 x 2 x 2); a small CNN with norms and five odd pytrees come after it

Strategies:"""


def run(strategy: str, model: str = "mlp") -> None:
    """Print a line a check; raises InputError if any fails."""
    from tljax import testing  # after the flags are read, so that help is quick

    checks = testing.check_strategy(strategy, model=model)
    words = {True: "ok", False: "FAILED", None: "-"}
    for check in checks:
        console.say(f"{words[check.passed]:<7} {check.name:<36} {check.detail}")
    failed = [check.name for check in checks if check.passed is False]
    if failed:
        raise InputError(f"strategy '{strategy}' fails {len(failed)} of {len(checks)} checks: {'; '.join(failed)}")


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    if commandline.asks_help(argv):
        console.say(f"{str(__doc__).strip()}\n{_HELP}")
        for name, about in options.strategies().items():
            console.say(f"  {name:<18} {about}")
        return
    values = flags.FlagValues()
    flags.DEFINE_string("strategy", None, "", flag_values=values)
    flags.DEFINE_string("model", "mlp", "", flag_values=values)
    commandline.read(values, argv)
    if not values.strategy:
        raise InputError("--strategy is not given: name what to check, such as --strategy=mine.py:strategy")
    run(values.strategy, values.model)


if __name__ == "__main__":
    console.run_main(main)
