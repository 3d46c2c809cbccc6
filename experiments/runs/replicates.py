"""Which fits repeat another: draws of labels crossed with seeds, and seeds of their own at each label budget.

A seed draws source, head, order and labels, and by itself every strategy has a fit of every seed at every label budget.

--draws=0-4 crosses draws of labels with seeds of the rest: every seed has every draw, so that what seeds and what
labels contribute to an error is known apart, and a source is trained once a seed. Draw 3 has the labels of seed 3.

--seeds_apart deals the seeds out to the label budgets. An area over budgets is a sum of means, which needs no seed that
all of them have; under one seed their errors are alike, as one source and nested labels make them, and add up.

An experiment has one draw, and seeds that all its budgets have: `parted` makes as many of it as that takes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from experiments.runs import budgets
from experiments.runs.plan import Experiment
from experiments.runs.search_flags import FIRST_SEED
from experiments.runs.settings import Settings
from tljax.types import InputError

Draws = Sequence[int] | None
"""The draws that --draws names; None where the seeds draw the labels."""


def require_flags(draws: Draws, apart: bool | None, settings: Settings, until: str | None) -> None:
    """Raise InputError for --draws and --seeds_apart that go with no other flag as it is given."""
    if apart:
        _require_apart(draws, settings, until)
    if draws is None:
        return
    text = f"--draws={','.join(map(str, draws))}"
    if len(set(draws)) < len(draws):
        raise InputError(f"{text} names one twice: give each once")
    if len(draws) < 2:
        raise InputError(f"{text}: name two draws of labels or more, as 0-4; --draw_seed pins the labels to one draw")
    if not 0 <= min(draws) <= max(draws) < FIRST_SEED:
        raise InputError(f"{text}: a draw is at least 0 and below {FIRST_SEED:,}, from where those of searches are")
    if settings.draw_seed is not None:
        raise InputError(f"{text} and --draw_seed={settings.draw_seed} are both given: keep one")
    if until:
        raise InputError(f"{text}: --until=decided adds seeds, each with labels of its own: leave one of them out")
    for budget in settings.train_examples:
        if len(budgets.seeds(budget, settings.seeds)) < 2:
            raise InputError(
                f"{text}: each draw is crossed with the seeds, of which {budget} has one: give two --seeds or more"
            )


def _require_apart(draws: Draws, settings: Settings, until: str | None) -> None:
    if draws is not None:
        raise InputError("--draws and --seeds_apart are both given: draws are crossed with seeds that all budgets have")
    if until:
        raise InputError("--seeds_apart: --until=decided adds seeds that all budgets have: leave one of them out")
    if len(settings.train_examples) < 2:
        raise InputError("--seeds_apart is of an area over budgets: name two --train_examples or more, or leave it out")
    few = [budget for budget, seeds in dealt(settings).items() if len(seeds) < 2]
    if few:
        raise InputError(
            f"--seeds_apart leaves {few[0]} fewer than two of {len(settings.seeds)} --seeds: give more, as in 0-29"
        )


def dealt(settings: Settings) -> dict[str, tuple[int, ...]]:
    """{label budget: its own seeds}, in the order of both flags: as many as :seeds=N says, or an equal share.

    Raises InputError where there are too few.

    >>> settings = Settings(seeds=tuple(range(8)), train_examples=("5/class:seeds=3", "20/class", "all"))
    >>> dealt(settings)
    {'5/class:seeds=3': (0, 1, 2), '20/class': (3, 4, 5), 'all': (6, 7)}
    """
    every, texts = settings.seeds, settings.train_examples
    named = {text: len(budgets.seeds(text, every)) for text in texts if ":seeds" in text}
    left, others = len(every) - sum(named.values()), [text for text in texts if text not in named]
    if left < 0:
        raise InputError(
            f"--seeds_apart: the budgets in --train_examples have {sum(named.values())} seeds in all, and --seeds has "
            f"{len(every)}: give more, as in 0-29"
        )
    shares = {text: left // len(others) + (i < left % len(others)) for i, text in enumerate(others)}
    seeds, first = {}, 0
    for text in texts:
        number = (named | shares)[text]
        seeds[text] = every[first : first + number]
        first += number
    return seeds


def parted(
    experiment: Experiment, draws: Draws, seeds: Mapping[str, tuple[int, ...]] | None = None
) -> list[Experiment]:
    """The experiment under each draw, or at each budget with its own `seeds`; as it is where neither is asked for."""
    settings = experiment.settings
    if draws is not None:
        _require_drawn(experiment)
        return [experiment._replace(settings=replace(settings, draw_seed=draw), draw=draw) for draw in draws]
    if seeds is None:
        return [experiment]
    return [
        experiment._replace(settings=replace(settings, train_examples=(budget,), seeds=seeds[budget]))
        for budget in settings.train_examples
    ]


def _require_drawn(experiment: Experiment) -> None:
    """Raise InputError for a label budget that is every training example, of which there is no other draw."""
    settings, target = experiment.settings, experiment.target
    whole = () if settings.recipe.validation else budgets.whole(settings.train_examples, target)
    if whole:
        raise InputError(
            f"--draws: --train_examples={whole[0].partition(':')[0]} is every training example of {target.name}, of "
            "which no draw differs from another: leave that budget out"
        )


def notes(draws: Draws, apart: bool | None, settings: Settings) -> list[str]:
    """What every table must say of draws that are crossed with seeds, and of seeds that budgets do not share."""
    if apart:
        each = ", ".join(f"{len(seeds)} at {text.partition(':')[0]}" for text, seeds in dealt(settings).items())
        return [
            f"each label budget has seeds of its own ({each}): areas are sums of means that share test examples alone"
        ]
    if draws is None:
        return []
    return [
        f"the labels are {len(draws)} draws apart from the seeds, each with each of {len(settings.seeds)} seeds: "
        "verdicts hold over other seeds and other draws"
    ]
