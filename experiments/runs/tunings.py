"""The choice of the recipe is part of the method: a search that is repeated, and what that does to the differences.

A search draws its trials and judges them under a few seeds, so under other ones it may find another recipe, for the
strategies and for what they are compared with. `--tuned=A,B,C` names the same search under several --tuning_seed: the
verdicts are of the first one's recipes, and a note says how far the differences move under those of the others.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.runs import directory, until
from experiments.runs.judging import Judging
from experiments.runs.predictions import Predictions
from tljax import plugins
from tljax.study import units
from tljax.study.verdicts import Comparison, named_among
from tljax.types import InputError


def searches(text: str | None) -> list[str]:
    """The run directories in a --tuned, which takes several; raises InputError unless each is a search of its own.

    They must have the same ranges and numbers of trials, and each another --tuning_seed.
    """
    names = [name for name in plugins.split(text or "", ",") if name]
    known = {name: directory.recorded_flags(Path(name)) for name in names} if len(names) > 1 else {}
    seeds = {name: lines.get("tuning_seed", ["0"]) for name, lines in known.items()}
    for name in names[1:]:
        for flag in ("space", "trials", "search_seeds"):
            if known[name].get(flag) != known[names[0]].get(flag):
                raise InputError(
                    f"--tuned={text}: '{name}' has another --{flag} than '{names[0]}': name one search, repeated under "
                    "other --tuning_seed"
                )
    if len({seed[-1] for seed in seeds.values()}) < len(known):
        raise InputError(f"--tuned={text}: two searches have one --tuning_seed: repeat the search under another")
    return names


def notes(
    names: Sequence[str], judged: Sequence[Predictions], others: Sequence[Sequence[Predictions]], judging: Judging
) -> list[str]:
    """What a page says of the search, and of the differences under the recipes of its repetitions, `others`."""
    if not names:
        return []
    lines = directory.recorded_flags(Path(names[0]))
    texts = [f"searched: {'; '.join(lines['space'])}, {lines['trials'][-1]} trials each"] if "space" in lines else []
    if not others:
        return [*texts, "tuned once: how far another search would move the differences is not known"]
    repeated = [{_place(each): each for each in until.family(parts, judging)} for parts in others]
    return [*texts, *spread(until.family(judged, judging), repeated)]


def spread(family: Sequence[Comparison], repeated: Sequence[Mapping[tuple[object, ...], Comparison]]) -> list[str]:
    """The sentence on the differences of a family under the recipes of each search, the judged one first.

    Other searches have the seeds of the first round alone, which is said where the judged one has more.
    """
    each = []
    for comparison in family:
        beside = [known[_place(comparison)] for known in repeated if _place(comparison) in known]
        if beside:
            means = [comparison.mean, *(other.mean for other in beside)]
            seeds = [
                "" if other.fits == comparison.fits else f" ({other.fits} seeds)" for other in (comparison, *beside)
            ]
            shown = ", ".join(
                units.difference(comparison.metric, mean) + of_fewer
                for mean, of_fewer in zip(means, seeds, strict=True)
            )
            words = [other.word or "not judged" for other in (comparison, *beside)]
            agreed = "" if len(set(words)) == 1 else f": {', '.join(words)}"
            width = units.difference(comparison.metric, max(means) - min(means)).lstrip("+")
            each.append(f"{named_among(comparison, family)} {shown} (a range of {width}{agreed})")
    if not each:
        return []
    return [
        f"tuned {1 + len(repeated)} times under other tuning seeds, the verdicts being of the first; differences under "
        f"each: {'; '.join(each)}"
    ]


def _place(comparison: Comparison) -> tuple[object, ...]:
    return comparison.source, comparison.target, comparison.strategy, comparison.budgets
