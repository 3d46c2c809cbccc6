"""What a page says of verdicts that were looked at as seeds came: method, seeds, its cost, and what forbade a word."""

from collections.abc import Sequence

from tljax.study import units
from tljax.study.sequences import ITEMS
from tljax.study.summary import listed
from tljax.study.verdicts import Comparison, named_among

CAPTION = (
    " The intervals hold at every number of pairs at once, for seeds were added until no verdict was open: a "
    "confidence sequence over seeds, t mixed over true differences (arXiv:2310.03722), and an interval over test "
    "examples, which all seeds share. They are wider for it than those of a number of seeds that was planned. Power is "
    "of such a number, and not defined here."
)


def caption(family: Sequence[Comparison]) -> str:
    """What the table of verdicts says of the method; nothing where the number of seeds was planned."""
    return CAPTION if any(comparison.sequence for comparison in family) else ""


def notes(family: Sequence[Comparison]) -> list[str]:
    """How many seeds each verdict took, what the method costs, and what the test items forbid."""
    judged = [comparison for comparison in family if comparison.sequence]
    if not judged:
        return []
    fits: dict[int, list[str]] = {}
    for comparison in judged:
        fits.setdefault(comparison.fits, []).append(named_among(comparison, judged))
    seeds = [f"{count} of {listed(names)}" for count, names in sorted(fits.items())]
    texts = [
        f"seeds were added until no verdict was open: {'; '.join(seeds)}. Intervals hold at any number of seeds "
        f"({100 - 100 * ITEMS:g} % of the errors are the seeds', {100 * ITEMS:g} % the test items') and are wider for "
        "it; a mean at which somebody stops lies on average farther from 0 than the truth"
    ]
    parts = {named_among(each, judged): each for each in judged if each.items_part is not None and forbidden(each)}
    if parts:
        halves = {name: units.difference(each.metric, each.items_part or 0.0) for name, each in parts.items()}
        shown = [f"{name} {half.lstrip('+')}" for name, half in halves.items()]
        texts.append(
            f"the test items alone leave a half-width above the margin ({', '.join(shown)}), with what the test allows "
            "for items, or groups of them, unlike those there are: no number of seeds would show that such a "
            "difference does not matter; more test items would, of more groups where they are in groups"
        )
    return texts


def forbidden(comparison: Comparison) -> bool:
    """Whether it stays undecided because of the test items, however many the seeds."""
    return comparison.word == "undecided" and comparison.settled
