"""Draws of labels apart from seeds: --draws=0-4 trains every seed of source, head and order on each of five draws.

A seed draws labels too, so what seeds and what labels contribute to an error cannot be told apart, and every fit has
labels that no other has. Crossed, `tljax.study.statistics` knows both, and a source is trained once a seed, however
many the draws. Draw 3 has the labels that seed 3 draws by itself.

An experiment is one draw's: `crossed` makes as many of it as there are draws.
"""

from collections.abc import Sequence
from dataclasses import replace

from experiments.runs import budgets
from experiments.runs.plan import Experiment
from experiments.runs.search_flags import FIRST_SEED
from experiments.runs.settings import Settings
from tljax.types import InputError

Draws = Sequence[int] | None
"""The draws that --draws names; None where the seeds draw the labels."""


def require_flags(draws: Draws, settings: Settings, until: str | None) -> None:
    """Raise InputError for draws that are not two or more different ones, or go with no other flag as it is given."""
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


def require_drawn(draws: Draws, experiment: Experiment) -> None:
    """Raise InputError for a label budget that is every training example, of which there is no other draw."""
    recipe, target = experiment.settings.recipe, experiment.target
    for budget in experiment.settings.train_examples if draws is not None and not recipe.validation else ():
        if budgets.total(budget, target) == len(target.train.targets):
            raise InputError(
                f"--draws: --train_examples={budget.partition(':')[0]} is every training example of {target.name}, of "
                "which no draw differs from another: leave that budget out"
            )


def crossed(experiment: Experiment, draws: Draws) -> list[Experiment]:
    """The experiment under each draw; as it is where the seeds draw the labels."""
    if draws is None:
        return [experiment]
    require_drawn(draws, experiment)
    return [experiment._replace(settings=replace(experiment.settings, draw_seed=draw), draw=draw) for draw in draws]


def note(draws: Draws, seeds: Sequence[int]) -> list[str]:
    """What every table must say of draws that are crossed with seeds."""
    if draws is None:
        return []
    return [
        f"the labels are {len(draws)} draws apart from the seeds, each with each of {len(seeds)} seeds: verdicts hold "
        "over other seeds and other draws"
    ]
