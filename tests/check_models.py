"""Whether every strategy of the folder is proved on every model of the folder: a table, and a count.

    python tests/check_models.py [MODEL ...] [--strategies=NAME,NAME]

It is run by hand: ten seconds to some minutes for each pair on a core. A pair is green, or the strategy does not apply
to the model and says why in one line; the exit code is 1 if a check fails. `tljax/models/README.md` has the counts.
The variable XLA_FLAGS, as `conftest.py` has it, compiles in half of the time.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator

from tljax import audit, plugins
from tljax.types import InputError

MODELS = (
    "mlp",
    "cnn",
    "vit:width=16:depth=2:heads=2:patch=4",
    "vit:width=16:depth=3:heads=2:patch=4:pool=mean:position=sine:scan=true",
    "resnet:depth=10:width=8",
    "resnet:depth=14:width=8:norm=group:groups=4:stem=small",
    "efficientnet_lite:width=0.1:depth=0.25",
)
PRESETS = (
    "top:per=leaf:share=0.01:on=**/kernel",
    "top:score=random:per=leaf:share=0.02:on=**/kernel",
    "top:score=magnitude:per=leaf:share=0.02:on=**/kernel",
    "top:score=snip:per=leaf:share=0.02:on=**/kernel",
    "top:per=unit:count=1:loss=supervised_contrastive:also=**/bias",
    "top:score=magnitude:smallest=true:share=0.005",
    "top:score=fisher",
    "wise_ft:curve=5",
    "wise_ft:probe=0.5",
)
"""Tried beside the strategies as they are: masks by elements as their papers have them, and ends with options."""


def pairs(models: list[str], strategies: list[str]) -> Iterator[tuple[str, str]]:
    """(strategy, model) of the models that begin with one of `models`, and of the strategies of these names; of all
    where there are none."""
    for model in MODELS:
        if models and not model.startswith(tuple(models)):
            continue
        for strategy in (*plugins.names("tljax.strategies", "strategy"), *PRESETS):
            if not strategies or strategy in strategies or strategy.partition(":")[0] in strategies:
                yield strategy, model


def outcome(strategy: str, model: str) -> tuple[str, str]:
    """('green', ''), or what else happened and why in one line."""
    try:
        checks = audit.check_strategy(strategy, model=model)
    except InputError as error:
        return "does not apply", str(error)
    if failed := [check for check in checks if check.passed is False]:
        return "FAILED", f"{failed[0].name}: {failed[0].detail}"
    lint = next(check for check in checks if check.name == f"lint on {model}")
    return ("green", "") if lint.passed else ("does not apply", lint.detail)


def main(arguments: list[str]) -> int:
    """Print a line for each pair and the count; 1 if a check failed."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help="a model, or how its name begins; all by default")
    parser.add_argument("--strategies", default="", help="names, parted by commas; all by default")
    options = parser.parse_args(arguments)
    counts: Counter[str] = Counter()
    for strategy, model in pairs(options.models, [name for name in options.strategies.split(",") if name]):
        word, reason = outcome(strategy, model)
        counts[word] += 1
        print(f"{word:<15} {strategy:<18} {model}  {reason}", flush=True)
    print(", ".join(f"{count} {word}" for word, count in counts.items()))
    return int("FAILED" in counts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
