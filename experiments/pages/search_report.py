"""What a search shows before it begins, and leaves in its run directory: best.flags, trials.csv, report.html."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.pages import history, page
from experiments.runs import console, directory, fits, search_flags
from experiments.runs.flags import PATHS_FROM
from experiments.runs.search_flags import Search
from experiments.runs.settings import Settings
from experiments.transfer import Experiment
from tljax import plugins
from tljax.study import space
from tljax.study.results import Result


class Arm(NamedTuple):
    """One study: a strategy at a label budget."""

    strategy: str
    budget: str
    ranges: tuple[space.Range, ...]

    @property
    def label(self) -> str:
        """What tables call the strategy."""
        return plugins.called(self.strategy)


class Winner(NamedTuple):
    """What one study found."""

    study: Any
    """Of Optuna."""
    trial: Any
    """Its best."""
    made: Settings
    """The settings of the last fits."""


def file_name(arm: Arm) -> str:
    """Of what is one study's."""
    return fits.file_name(f"{arm.label}-{arm.budget}")


def show(given: Mapping[str, Any], arms: Sequence[Arm], asked: Search) -> None:
    """Print what would be searched, and what of it parts the trials into groups."""
    rows = [(one.name, one.kind, *space.ends(one), "")[:4] for one in asked.ranges]
    console.table("space", ["name", "kind", "from", "to"], rows)
    for arm in arms:
        own = {**given, "strategies": (arm.strategy,)}
        shapes = {one.name: search_flags.shapes(own, one) for one in arm.ranges}
        several = [f"{name} ({count})" for name, count in shapes.items() if count > 1]
        parted = "one shape, trained together"
        if several:
            parted = f"at most {math.prod(shapes.values()):,} shapes, by {', '.join(several)}; each trained together"
        console.say(f"{arm.label} at {arm.budget}: {asked.trials} trials in groups of {asked.group}; {parted}")


def keep_trials(folder: Path, studies: Mapping[Arm, Any]) -> None:
    """Write trials.csv, a row a trial of each study."""
    told = {(arm.label, arm.budget): history.told(study) for arm, study in studies.items()}
    directory.replace(folder / "trials.csv", history.table(told))


def keep_best(folder: Path, winners: Mapping[Arm, Winner]) -> None:
    """Write the flags of each winner: best.flags, of several studies best/STRATEGY-BUDGET.flags."""
    for arm, winner in winners.items():
        file = folder / "best.flags" if len(winners) == 1 else folder / "best" / f"{file_name(arm)}.flags"
        if len(winners) > 1:
            directory.make_folder(file.parent)
        head = f"# python -m experiments.transfer --flagfile={file} --workdir=NEW"
        where = [f"{PATHS_FROM}{place}" for place in directory.working_directory()]
        directory.replace(file, directory.signed("\n".join([head, *where, *winner.made.flagfile_lines(), ""])))


def write(
    folder: Path,
    made: Settings,
    asked: Search,
    winners: Mapping[Arm, Winner],
    lines: Sequence[Result],
    base: Experiment,
) -> list[str]:
    """Write report.html; what is said below the table."""
    from experiments.pages import search_page

    told = [(f"{arm.label}, {arm.budget}", one) for arm, winner in winners.items() for one in _told(arm, winner)]
    several = len({arm.budget for arm in winners}) > 1
    studies = [
        search_page.Study(
            f"{arm.label}, {arm.budget}" if several else arm.label,
            arm.ranges,
            history.told(winner.study),
            winner.trial.number,
        )
        for arm, winner in winners.items()
    ]
    title, notes = page.about(base.made, base.source, base.target)
    flags = [*search_flags.to_flags(asked), *made.flagfile_lines()]
    last = list(winners.values())[-1].made.workdir
    text = search_page.page(
        f"search: {title}",
        _lead(made, asked, base),
        studies,
        lines,
        told,
        notes,
        reproduced(flags, directory.recorded_environment(Path(last or "")) or {}),
    )
    directory.replace(folder / "report.html", text)
    return [*(f"{name}: {one}" for name, one in told), *notes, f"report: {folder / 'report.html'}"]


def reproduced(flags: Sequence[str], environment: Mapping[str, Any]) -> Any:
    """What a page says of how it came about."""
    from experiments.pages.report import Reproduced

    command = "python -m experiments.search --flagfile=FLAGS --workdir=NEW"
    return Reproduced(environment, "\n".join(flags), command)


def _lead(made: Settings, asked: Search, base: Experiment) -> str:
    held = 100 * base.made.recipe.validation
    seeds = f"{len(asked.trial_seeds)} seed{'s' * (len(asked.trial_seeds) > 1)}"
    return (
        f"{asked.trials} trials of each study, by {asked.sampler}, judged on {held:g} % of the training examples under "
        f"{seeds} of the search's own. The winners were then trained on all training examples under the seeds "
        f"{', '.join(map(str, made.seeds))}, and measured on the test set:"
    )


def _told(arm: Arm, winner: Winner) -> list[str]:
    """The values of a winner, which trials tie with it, and which of its values is at an edge."""
    values = ", ".join(f"{name}={value}" for name, value in winner.trial.params.items())
    notes = [f"{values}; validation accuracy {100 * winner.trial.value:.2f} %"]
    shown = f"{100 * winner.trial.value:.2f}"
    tied = [
        trial.number
        for trial in history.told(winner.study)
        if trial.accuracy is not None and f"{100 * trial.accuracy:.2f}" == shown and trial.number != winner.trial.number
    ]
    if tied:
        several = f"{len(tied)} other trials have" if len(tied) > 1 else "another trial has"
        notes.append(f"{several} this accuracy: trials.csv has their values")
    for one in arm.ranges:
        if edge := space.at_edge(one, winner.trial.params[one.name]):
            notes.append(f"{one.name} is the {edge} of its range: widen it")
    return notes
