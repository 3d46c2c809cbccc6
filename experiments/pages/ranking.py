"""The numbers, the tables and the page of a ranking."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.pages import figures, report, tables
from experiments.pages.report import Block, Provenance, Section
from experiments.runs import console, directory
from experiments.runs.scores import Score, Scored
from experiments.runs.sources import Card
from experiments.runs.transfer_results import TransferResults
from tljax.study import ranking, units
from tljax.study.ranking import Board
from tljax.study.summary import listed
from tljax.types import Task

OWN_ACCURACY, PARAMETERS, OTHER_TARGETS = "(own accuracy)", "(parameters)", "(other targets)"
"""The plain rivals, each one ranking for all targets but the last, which ranks by the mean truth on the other targets.

A list by size alone, whatever the target, did better than published scores on their own benchmarks (Singh, Hess and
Vanschoren 2025, "How NOT to benchmark your SITE metric", arXiv:2510.06448): a score has to beat these."""

Table = Mapping[tuple[str, str], Scored]
"""{(source, target): its scores}."""


class Verdict(NamedTuple):
    """The outcome of a ranking."""

    boards: tuple[Board, ...]
    numbers: dict[str, Any]
    """The outcome as ranking.json has it."""
    notes: tuple[str, ...]


def judged(
    cards: Sequence[Card],
    targets: Mapping[str, Task],
    table: Table,
    truths: Sequence[TransferResults],
    names: Sequence[str],
    resamples: int,
) -> Verdict:
    """Judge the scores by the truth, strategy by strategy and budget by budget, with trivial sources and without."""
    notes: dict[str, None] = {}
    boards = []
    for truth in truths:
        columns = _columns(cards, list(targets), table, truth, names, notes)
        every = np.ones(len(cards), bool)
        not_trivial = ~np.array([card.trivial for card in cards])
        accuracies = np.stack([truth.accuracies[name] for name in targets])  # [targets, seeds, sources]
        for chosen, which in ((every, "all"), (not_trivial, "without trivial")):
            if chosen.sum() < 3 or (which != "all" and chosen.all()):
                continue
            scores = {name: values[:, chosen] for name, values in columns.items()}
            mean_accuracies = np.stack([ranking.mean(values) for values in accuracies])[:, chosen]
            scratch = [truth.scratch[name] for name in targets]
            worth = ranking.judged(scores, mean_accuracies, scratch, count=resamples)
            half_tau = float(np.mean([ranking.split_half(values[:, chosen]) for values in accuracies]))
            trivial = np.array([card.trivial for card in cards])[chosen]
            title = (truth.strategy, truth.budget, which)
            board = Board(*title, worth, half_tau, scores, mean_accuracies, tuple(targets), trivial)
            boards.append(board._replace(metric=truth.metric))
    for count in dict.fromkeys(board.truths.shape[1] for board in boards):
        error = ranking.error_of_none(count)
        few = "" if count >= ranking.LEAST else "; they are too few for intervals, and for telling scores apart"
        note = f"Of {count} sources a score at random has a tau of 0 on one target, standard error {error:.2f}{few}"
        notes[note] = None
    return Verdict(tuple(boards), _numbers(cards, table, boards), tuple(notes))


def _columns(
    cards: Sequence[Card],
    targets: Sequence[str],
    table: Table,
    truth: TransferResults,
    names: Sequence[str],
    notes: dict[str, None],
) -> dict[str, np.ndarray]:
    """{score or rival: float [targets, sources]}, except those that lack a value for a source or target."""
    columns = {}
    for name in names:
        values = []
        for target in targets:
            each = [table[card.name, target].scores[truth.budget][name] for card in cards]
            reasons = [score.reason for score in each if score.value is None]
            if reasons:
                notes[f"{name} at {truth.budget} is not judged: {reasons[0]}"] = None
            values.append([np.nan if score.value is None else score.value for score in each])
        if not np.isnan(values).any():
            columns[name] = np.array(values, float)
    accuracies = [card.accuracy for card in cards]
    if len({card.metric for card in cards}) > 1:
        notes[f"{OWN_ACCURACY} is not judged: the sources are measured by different metrics"] = None
    elif None not in accuracies:
        turned = units.sign(cards[0].metric) * np.array(accuracies, float)
        columns[OWN_ACCURACY] = np.tile(turned, (len(targets), 1))
    else:
        notes[f"{OWN_ACCURACY} is not judged: not every source says its own"] = None
    columns[PARAMETERS] = np.tile(np.array([card.parameters for card in cards], float), (len(targets), 1))
    if len(targets) > 1:
        mean_accuracies = np.stack([ranking.mean(truth.accuracies[name]) for name in targets])
        columns[OTHER_TARGETS] = np.stack(
            [ranking.mean(np.delete(mean_accuracies, i, axis=0)) for i in range(len(targets))]
        )
    return columns


def _numbers(cards: Sequence[Card], table: Table, boards: Sequence[Board]) -> dict[str, Any]:
    """The content of ranking.json, before `plain` replaces the values that JSON cannot hold."""
    return {
        "sources": [_card(card) for card in cards],
        "scores": [
            {
                "source": source,
                "target": target,
                "budget": budget,
                "features_seconds": scored.seconds,
                **{name: score._asdict() for name, score in scores.items()},
            }
            for (source, target), scored in table.items()
            for budget, scores in scored.scores.items()
        ],
        "judged": [
            {
                "strategy": board.strategy,
                "budget": board.budget,
                "sources": board.which,
                "split_half_tau": board.half,
                "truths": {name: truths.tolist() for name, truths in zip(board.targets, board.truths, strict=True)},
                "scores": {
                    name: {key: estimate._asdict() for key, estimate in worth._asdict().items()}
                    for name, worth in board.judged.items()
                },
            }
            for board in boards
        ],
    }


def _card(card: Card) -> dict[str, Any]:
    """A card as ranking.json has it: with its metric where that is not accuracy."""
    record = {name: value for name, value in card._asdict().items() if name != "metric"}
    if card.metric == units.ACCURACY:
        return record
    score = record.pop("accuracy")
    return {**record, "score": score, "metric": units.to_record(card.metric)}


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: None in place of NaN, a word in place of an infinity.

    >>> plain({"tau": [float("nan"), float("inf"), 0.5]})
    {'tau': [None, 'inf', 0.5]}
    """
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None if np.isnan(value) else str(value)
    return value


def show(verdict: Verdict, folder: Path, cards: Sequence[Card], table: Table, notes: Sequence[str]) -> None:
    """Print the tables; with --verify, write the report."""
    for target in dict.fromkeys(target for _, target in table):
        budgets = table[cards[0].name, target].scores
        for budget, names in budgets.items():
            rows = [_row(card, table[card.name, target], budget) for card in cards]
            columns = ["source", *names, "seconds"]
            console.table(f"{target}, {budget}", columns, rows, _why(cards, table, target, budget))
    for board in verdict.boards:
        half = [] if np.isnan(board.half) else [f"tau between halves of the truth's seeds {board.half:.2f}"]
        console.show(tables.worth_in_short(board), [*half, board.apart()])
    every = [*verdict.notes, *dict.fromkeys(note for note in notes if note)]
    for note in every:
        console.say(f"  {note}")
    if verdict.boards:
        directory.replace(folder / "report.html", page(verdict.boards, every, report.provenance_of(folder)))
        console.say(f"  report: {folder / 'report.html'}")


def _why(cards: Sequence[Card], table: Table, target: str, budget: str) -> list[str]:
    """The notes below a table: which sources the first score ranks first, and why scores have no value."""
    scores = {card.name: table[card.name, target].scores[budget] for card in cards}
    each = [(name, score) for of_source in scores.values() for name, score in of_source.items()]
    lacking = {f"{name}: {score.reason}": None for name, score in each if score.value is None}
    name = next(iter(scores[cards[0].name]))
    values = {card.name: score.value for card in cards if (score := scores[card.name][name]).value is not None}
    return [*([f"first by {name}: {_first(values)}"] if values else []), *lacking]


def _first(values: Mapping[str, float], places: int = 3, most: int = 6) -> str:
    """The words on the first places of {source: score}; sources whose scores are printed alike are tied.

    >>> _first({"a": 0.5, "b": 0.9, "c": 0.50001, "d": 0.1}), _first({"a": 0.5, "b": 0.9, "c": 0.7})
    ('b, a and c (tied)', 'b, c, a')
    """
    ranks: dict[str, list[str]] = {}
    for source in sorted(values, key=lambda source: -values[source]):
        ranks.setdefault(_digits(values[source]), []).append(source)
    texts, taken = [], 0
    for tied in ranks.values():
        if taken >= places:
            break
        taken += len(tied)
        named = sorted(tied, key=list(values).index)
        more = f"{len(named) - most} more" if len(named) > most else ""
        text = listed([*named[: most if more else None], *([more] if more else [])])
        texts.append(f"{text} (tied)" if len(tied) > 1 else text)
    return ", ".join(texts)


def _row(card: Card, scored: Scored, budget: str) -> tuple[str, ...]:
    """A source with its scores at a label budget, and the seconds of features and scores."""
    scores = scored.scores[budget].values()
    seconds = scored.seconds + sum(score.seconds for score in scores)
    return (card.name, *map(_value, scores), f"{seconds:.1f}")


def _value(score: Score) -> str:
    return "-" if score.value is None else _digits(score.value)


def _digits(value: float) -> str:
    return f"{value:.4g}"


WORTH = (
    "Means over targets, below them 95 % percentile intervals of a bootstrap over sources. Regret is the {metric} lost "
    "by trusting the score's first choice, or the best of its first three; its intervals lean low. Over scratch is the "
    "{metric} of its first choice less that of training from scratch{unit}. Behind is the highest tau less this "
    "one, on the same draws. Its intervals hold together, for all pairs of scores and rivals, as the best is found by "
    "looking: one that holds 0 cannot tell the two apart. Names in brackets are plain rivals."
)
AGAINST = "A point is a source; crosses are sources that learnt nothing. Test {metric} is a mean over seeds."
INTERVALS = "The same tau and regret with their intervals; the dotted line is tau between halves of the truth's seeds."


@figures.style()
def page(boards: Sequence[Board], notes: Sequence[str], provenance: Provenance) -> str:
    """The HTML of a ranking; `notes` go with every table."""
    targets = boards[0].targets
    lead = (
        f"{boards[0].truths.shape[1]} sources were ranked for {', '.join(targets)} by {len(boards[0].judged)} scores "
        f"and rivals, and each ranking was held against the {units.spoken(boards[0].metric)} that the sources lead to:"
    )
    lines = [(board.title, board.apart()) for board in boards]
    whole = [board for board in boards if board.which == "all"]  # the others are parts of them
    blocks = [
        Block(_filled(WORTH, board) + report.sentences(notes), tables.worth(board), heading=board.title)
        for board in boards
    ]
    sections = [
        Section("What the scores are worth", "worth", blocks),
        Section(
            "Intervals", "intervals", [_drawn(INTERVALS, board, figures.ranking_intervals(board)) for board in boards]
        ),
        Section(
            "Scores against the truth",
            "scatter",
            [_drawn(_filled(AGAINST, board), board, figures.ranking_scatter(board)) for board in whole],
        ),
    ]
    title = f"which source for {', '.join(targets)}"
    return report.render(sections, title=title, lead=lead, lists=[("", lines)], provenance=provenance)


def _filled(caption: str, board: Board) -> str:
    """A caption with the name of the metric of a board, and the unit of its differences."""
    unit = units.of_differences(board.metric)
    return caption.format(metric=units.spoken(board.metric), unit=f" ({unit})" if unit else "")


def _drawn(caption: str, board: Board, picture: figures.Picture) -> Block:
    """A figure under the title of its board."""
    return Block(caption, pictures=[picture], kind="box wide", heading=board.title)
