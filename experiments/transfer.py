"""Train strategies from a source on a target, beside scratch.

    python -m experiments.transfer --flagfile=experiments/flags/quickstart.flags

Each strategy starts from the source's parameters, and beside them all the same model is trained from scratch. The
run directory holds everything; a finished fit in it is not trained again.
"""

from experiments import run_program

if __name__ == "__main__":  # before the other imports, so that a failure in them is reported in one line
    run_program(__file__)
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.runs import command_line, console, costs, evaluations, fit, plan, process, times
from experiments.runs.command_line import flag
from experiments.runs.plan import Experiment
from experiments.runs.settings import ExperimentFlags, Settings
from tljax import graft, paths
from tljax.study.results import Result, extended


@dataclass(frozen=True)
class TransferFlags(ExperimentFlags):
    """A transfer has all flags that programs share."""

    retention: bool = flag(
        False, "measure what is left of the source: its metric on its own test set, its own head put back", role="free"
    )


def run(*, retention: bool = False, **flags: Any) -> list[Result]:
    """Train the strategies and report; returns the results. Keyword arguments are named like the flags."""
    settings = Settings.from_flags(**flags)
    with times.noted("transfer") as noted:
        experiment = plan.prepare(settings, noted.watched(process.prepare(settings)))
        evals = evaluations.read(settings, ["source"], [experiment]) if retention else []
        if settings.dry_run:
            _show_starts(experiment)
            return []

        def show(results: list[Result], folder: Path) -> None:
            from experiments.pages import transfer as page  # draws: matplotlib takes a second to import

            if evals:
                kept = _retention(experiment, results, evals, folder)
                results = [extended(result, kept.get(result.name, {})) for result in results]
            page.show(settings, experiment.target, experiment.source, results, folder)
            noted.leave(folder)

        return fit.complete(experiment, "transfer", show)


def _retention(
    experiment: Experiment,
    results: Sequence[Result],
    evals: Sequence[evaluations.Evaluation],
    folder: Path,
) -> dict[str, dict[str, Any]]:
    """{fit: what its result says of its retention}; scratch has none."""
    strategies = tuple(each for each in experiment.strategies if each.name != "scratch")
    transferred = [result for result in results if result.strategy != "scratch"]
    if not strategies:
        return {}
    from_source = experiment._replace(strategies=strategies)
    measured = evaluations.measured(from_source, transferred, evals, folder, start=False)
    return {
        name: {key: of_fit[key] for key in of_fit if key.startswith("retention")} for name, of_fit in measured.items()
    }


def _show_starts(experiment: Experiment) -> None:
    """Print the graft plan and the mask table of each strategy; for a plan that was printed before, its strategy."""
    settings, plans = experiment.settings, dict[str, graft.Plan]()
    names = experiment.source.names if experiment.source else None
    for strategy, start in plan.first_starts(experiment):
        same = next((label for label, grafted in plans.items() if grafted == start.plan), None)
        plans.setdefault(strategy.label, start.plan)
        decays = plan.decays(settings.recipe, start.params)
        costs_of_phases = costs.of_start(experiment, start)
        notes = (costs_of_phases, plan.state_lines(start, experiment.model), costs.of_moves(experiment, start))
        console.plan(strategy.label, start.plan, start.params, start.phases, same, names, decays, *notes)
        lists = {
            "left out, and so frozen": plan.left_out(strategy, start, experiment.model),
            "merged with their kernel in each step, as their stages take no factors": plan.merged(start),
        }
        for what, of_paths in lists.items():
            if of_paths:
                folded = (path for path, _ in paths.folded([(path, None) for path in of_paths]))
                console.say(f"  {strategy.label}: {what}: {', '.join(folded)}\n")
    augmented = plan.augment_notes(settings.recipe, experiment.target)
    console.notes([*augmented, *plan.title_and_notes(settings, experiment.source, experiment.target)[1]])


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    command_line.main(
        argv, str(__doc__), lambda flags, options: run(retention=options.retention, **flags), TransferFlags
    )
