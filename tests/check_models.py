"""Whether every strategy of the folder is proved on every model with a paper: a table, and a count.

    python tests/check_models.py [MODEL ...]

It is run by hand: ten seconds to some minutes for each pair on a core. A pair is green, or the strategy does not apply
to the model and says why in one line; the exit code is 1 if a check fails.
"""

import sys
from collections import Counter

from tljax import audit, plugins
from tljax.types import InputError

MODELS = (
    "vit:width=16:depth=2:heads=2:patch=4",
    "vit:width=16:depth=3:heads=2:patch=4:pool=mean:position=sine:scan=true",
    "resnet:depth=10:width=8",
    "resnet:depth=14:width=8:norm=group:groups=4:stem=small",
    "efficientnet_lite:width=0.25",
)


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


def main(wanted: list[str]) -> int:
    """Print a line for each pair and the count; 1 if a check failed. `wanted` are models, or how they begin."""
    counts: Counter[str] = Counter()
    for model in MODELS:
        if wanted and not model.startswith(tuple(wanted)):
            continue
        for name in plugins.names("tljax.strategies", "strategy"):
            word, reason = outcome(name, model)
            counts[word] += 1
            print(f"{word:<15} {name:<18} {model}  {reason}", flush=True)
    print(", ".join(f"{count} {word}" for word, count in counts.items()))
    return int("FAILED" in counts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
