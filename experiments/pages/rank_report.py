"""What a ranking ends with: its numbers, its tables, and its report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.pages import page, ranking_page
from experiments.pages.ranking_page import Board
from experiments.runs import console, directory
from experiments.runs.scores import Score, Scored
from experiments.runs.sources import Card
from experiments.runs.transfer_results import Truth
from tljax.study import ranking
from tljax.study.summary import listed
from tljax.types import Task

OWN, SIZE, OTHERS = "(own accuracy)", "(parameters)", "(other targets)"
"""The plain rivals; the last ranks by the mean truth on the other targets."""

Table = Mapping[tuple[str, str], Scored]
"""{(source, target): its scores}."""


class Told(NamedTuple):
    """What came of a ranking."""

    boards: tuple[Board, ...]
    numbers: dict[str, Any]
    """The same for ranking.json."""
    notes: tuple[str, ...]


def told(
    cards: Sequence[Card],
    targets: Mapping[str, Task],
    table: Table,
    truths: Sequence[Truth],
    names: Sequence[str],
    resamples: int,
) -> Told:
    """Judge the scores by the truth, strategy by strategy and budget by budget, with trivial sources and without."""
    notes: dict[str, None] = {}
    boards = []
    for one in truths:
        columns = _columns(cards, list(targets), table, one, names, notes)
        every = np.ones(len(cards), bool)
        plain = ~np.array([card.trivial for card in cards])
        accuracies = np.stack([one.accuracies[name] for name in targets])  # [targets, seeds, sources]
        for kept, which in ((every, "all"), (plain, "without trivial")):
            if kept.sum() < 3 or (which != "all" and kept.all()):
                continue
            scores = {name: values[:, kept] for name, values in columns.items()}
            truth = np.stack([ranking.mean(of) for of in accuracies])[:, kept]
            scratch = [one.scratch[name] for name in targets]
            judged = ranking.judged(scores, truth, scratch, count=resamples)
            half = float(np.mean([ranking.split_half(of[:, kept]) for of in accuracies]))
            trivial = np.array([card.trivial for card in cards])[kept]
            boards.append(Board(one.strategy, one.budget, which, judged, half, scores, truth, tuple(targets), trivial))
    for count in dict.fromkeys(board.truths.shape[1] for board in boards):
        error = ranking.error_of_none(count)
        few = "" if count >= ranking.LEAST else "; they are too few for intervals, and for telling scores apart"
        said = f"Of {count} sources a score at random has a tau of 0 on one target, standard error {error:.2f}{few}"
        notes[said] = None
    return Told(tuple(boards), _numbers(cards, table, boards), tuple(notes))


def _columns(
    cards: Sequence[Card],
    targets: Sequence[str],
    table: Table,
    one: Truth,
    names: Sequence[str],
    notes: dict[str, None],
) -> dict[str, np.ndarray]:
    """{score or rival: float [targets, sources]}, those without that have no value somewhere."""
    found = {}
    for name in names:
        values = []
        for target in targets:
            each = [table[card.name, target].scores[one.budget][name] for card in cards]
            lacking = [score.reason for score in each if score.value is None]
            if lacking:
                notes[f"{name} at {one.budget} is not judged: {lacking[0]}"] = None
            values.append([np.nan if score.value is None else score.value for score in each])
        if not np.isnan(values).any():
            found[name] = np.array(values, float)
    own = [card.accuracy for card in cards]
    if None not in own:
        found[OWN] = np.tile(np.array(own, float), (len(targets), 1))
    else:
        notes[f"{OWN} is not judged: not every source says its own"] = None
    found[SIZE] = np.tile(np.array([card.parameters for card in cards], float), (len(targets), 1))
    if len(targets) > 1:
        means = np.stack([ranking.mean(one.accuracies[name]) for name in targets])
        found[OTHERS] = np.stack([ranking.mean(np.delete(means, i, axis=0)) for i in range(len(targets))])
    return found


def _numbers(cards: Sequence[Card], table: Table, boards: Sequence[Board]) -> dict[str, Any]:
    return {
        "sources": [card._asdict() for card in cards],
        "scores": [
            {
                "source": source,
                "target": target,
                "budget": budget,
                "features_seconds": scored.seconds,
                **{name: one._asdict() for name, one in of.items()},
            }
            for (source, target), scored in table.items()
            for budget, of in scored.scores.items()
        ],
        "judged": [
            {
                "strategy": board.strategy,
                "budget": board.budget,
                "sources": board.which,
                "split_half_tau": board.half,
                "truths": {name: of.tolist() for name, of in zip(board.targets, board.truths, strict=True)},
                "scores": {
                    name: {key: estimate._asdict() for key, estimate in one._asdict().items()}
                    for name, one in board.judged.items()
                },
            }
            for board in boards
        ],
    }


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: None for what is no number, words for what is infinite.

    >>> plain({"tau": [float("nan"), float("inf"), 0.5]})
    {'tau': [None, 'inf', 0.5]}
    """
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None if np.isnan(value) else str(value)
    return value


def show(told: Told, folder: Path, cards: Sequence[Card], table: Table, notes: Sequence[str]) -> None:
    """Print the tables, and write the report where there is a truth."""
    for target in dict.fromkeys(target for _, target in table):
        budgets = table[cards[0].name, target].scores
        for budget, names in budgets.items():
            rows = [_row(card, table[card.name, target], budget) for card in cards]
            console.table(
                f"{target}, {budget}", ["source", *names, "seconds"], rows, _why(cards, table, target, budget)
            )
    for board in told.boards:
        order = ranking_page.ordered(board)
        rows = [(name, *map(_interval, board.judged[name], ranking_page.COLUMNS.values())) for name in order]
        title = f"{board.strategy}, {board.budget}: {board.truths.shape[1]} sources, {board.which}"
        console.table(title, ["score", *ranking_page.COLUMNS], rows, [*_halves(board), ranking_page.apart(board)])
    said = [*told.notes, *dict.fromkeys(note for note in notes if note)]
    for note in said:
        console.say(f"  {note}")
    if told.boards:
        text = ranking_page.page(told.boards, said, page.reproduced(folder))
        directory.replace(folder / "report.html", text)
        console.say(f"  report: {folder / 'report.html'}")


def _halves(board: Board) -> list[str]:
    return [] if np.isnan(board.half) else [f"tau between halves of the truth's seeds {board.half:.2f}"]


def _why(cards: Sequence[Card], table: Table, target: str, budget: str) -> list[str]:
    """What the default, or the first score asked for, ranks first; and why scores have no value."""
    scores = {card.name: table[card.name, target].scores[budget] for card in cards}
    lacking = {
        f"{name}: {score.reason}": None for of in scores.values() for name, score in of.items() if score.value is None
    }
    name = next(iter(scores[cards[0].name]))
    values = {card.name: score.value for card in cards if (score := scores[card.name][name]).value is not None}
    return [*([f"first by {name}: {_first(values)}"] if values else []), *lacking]


def _first(values: Mapping[str, float], places: int = 3, most: int = 6) -> str:
    """The sources on the first places, {source: score}; those whose scores are printed alike are said to be tied.

    >>> _first({"a": 0.5, "b": 0.9, "c": 0.50001, "d": 0.1}), _first({"a": 0.5, "b": 0.9, "c": 0.7})
    ('b, a and c (tied)', 'b, c, a')
    """
    ranks: dict[str, list[str]] = {}
    for source in sorted(values, key=lambda source: -values[source]):
        ranks.setdefault(_digits(values[source]), []).append(source)
    shown, taken = [], 0
    for tied in ranks.values():
        if taken >= places:
            break
        taken += len(tied)
        named = sorted(tied, key=list(values).index)
        more = f"{len(named) - most} more" if len(named) > most else ""
        text = listed([*named[: most if more else None], *([more] if more else [])])
        shown.append(f"{text} (tied)" if len(tied) > 1 else text)
    return ", ".join(shown)


def _row(card: Card, scored: Scored, budget: str) -> tuple[str, ...]:
    of = scored.scores[budget]
    seconds = scored.seconds + sum(one.seconds for one in of.values())
    return (card.name, *map(_value, of.values()), f"{seconds:.1f}")


def _value(score: Score) -> str:
    return "-" if score.value is None else _digits(score.value)


def _digits(value: float) -> str:
    return f"{value:.4g}"


def _interval(of: ranking.Estimate, scale: float) -> str:
    return console.ranged(None if np.isnan(of.value) else of, scale)
