"""What a program prints: progress bars and tables."""

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from experiments.runs import process
from tljax import graft, masks, paths

SIGN_OF_LIFE = 60.0
"""Seconds between the lines that say how far a run is, where there is no terminal for a bar."""


@contextmanager
def progress(what: str, total: int, unit: str = "steps") -> Iterator[Callable[[int], None]]:
    """A bar over `total` steps on a terminal, a line a minute elsewhere; gives the function that advances it."""
    if not _is_terminal(sys.stderr):  # rich would take FORCE_COLOR for a terminal
        with _progress_lines(process.visible(what), total, unit) as advance:
            yield advance
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(process.visible(what)), total=total)
        yield lambda steps: bar.advance(task, steps)


def _is_terminal(stream: Any) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # somebody's code has taken it away
        return False


@contextmanager
def _progress_lines(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Lines to standard error from a thread, so that a long segment or compilation is seen to go on too."""
    done, ended, began = 0, threading.Event(), time.monotonic()

    def advance(steps: int) -> None:
        nonlocal done
        done += steps

    def say_so() -> None:
        while not ended.wait(SIGN_OF_LIFE):
            left = f"{done:,} of {total:,} {unit} done, {max(total - done, 0):,} left"
            print(f"{what}: {left}, after {time.monotonic() - began:,.0f} s", file=sys.stderr, flush=True)

    thread = threading.Thread(target=say_so, daemon=True)
    thread.start()
    try:
        yield advance
    finally:
        ended.set()
        thread.join()


def say(line: str) -> None:
    """One line to standard output, at once."""
    print(process.visible(line), flush=True)


class Cell(NamedTuple):
    """What a cell says; words or a range stand below it in small on a page, and beside it in brackets here."""

    text: str
    words: str = ""
    ends: tuple[str, str] | None = None
    """Of a range or an interval: lowest and highest."""

    @property
    def below(self) -> str:
        """What stands below it."""
        return self.words or (" to ".join(self.ends) if self.ends else "")


class Table(NamedTuple):
    """Rows under columns; the first `words` columns are words, the others numbers; a row of one cell heads others."""

    label: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: int = 1


def show(shown: Table, notes: Sequence[str] = (), narrow: bool = False) -> None:
    """Print a table and the notes below it; on a `narrow` terminal ranges stand below their numbers."""
    rows = [[_plain(cell, "\n" if narrow else " ") for cell in row] for row in shown.rows]
    table(shown.label, shown.columns, rows, notes)


def _plain(cell: Cell, between: str) -> str:
    """A cell in ASCII, such as '0.50 [0.25, 0.75]'; '-' for none."""
    text = cell.text
    if cell.ends:
        text += f"{between}[{cell.ends[0]}, {cell.ends[1]}]"
    elif cell.words:
        text += f"{between}({cell.words})"
    return text.replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "-")


def is_narrow() -> bool:
    """Whether there is a terminal that is too narrow for all columns of results."""
    from rich.console import Console

    console = Console()
    return (_is_terminal(sys.stdout) or "COLUMNS" in os.environ) and console.width < 125


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """Print a table of texts; the first column is words, the others numbers. Nothing is cut to the terminal's width."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=Text(process.visible(title)), box=SIMPLE, padding=(0, 1), pad_edge=False, title_justify="left")
    for i, column in enumerate(columns):
        grid.add_column(Text(process.visible(column)), justify="right" if i else "left", no_wrap=True)
    for row in rows:
        grid.add_row(*(Text(process.visible(cell)) for cell in row))
    # As wide as it needs: rich would cut cells to the terminal's width, which is worse than a line that wraps.
    Console(width=400, force_terminal=_is_terminal(sys.stdout)).print(grid)
    for note in notes:
        say(f"  {note}")


def notes(lines: Sequence[str]) -> None:
    """Lines below a table, one each."""
    for line in lines:
        say(f"  {line}")


def plan(
    title: str,
    rows: graft.Plan,
    params: Any,
    phases: Sequence[tuple[float, Any]],
    same_as: str | None = None,
    names: Mapping[str, str] | None = None,
    decays: Any = None,
    costs: Sequence[str] = (),
    states: Sequence[str] = (),
    moves: Sequence[str] = (),
) -> None:
    """The graft plan and the mask tables of one strategy, one a phase; repeated blocks have one row.

    `same_as` is a strategy that was shown before and has the same graft plan; `names` as `graft_plan` takes them,
    `decays` as `mask_table` does. `costs`, `states` (of batch norms) and `moves` (of masks) have
    a line for each phase, as far as that is known.
    """
    if same_as is None:
        graft_plan(f"{title}: graft", rows, names)
    else:
        say(f"{title}: graft as of {same_as}\n")
    if not phases:
        say(f"  {title}: the mask depends on values (DATA_DRIVEN), and is not known before the source is trained\n")
    for number, (start, mask) in enumerate(phases):
        when = f"{title}: mask" if len(phases) == 1 else f"{title}: mask from {100 * start:g} % of training"
        if masks.is_strategy(mask):
            say(f"  {when}: depends on the parameters then\n")
            continue
        notes = [line for lines in (moves, states, costs) for line in lines[number : number + 1]]
        mask_table(when, params, mask, decays, list(filter(None, notes)))


def graft_plan(title: str, rows: graft.Plan, names: Mapping[str, str] | None = None) -> None:
    """Where each leaf comes from: a row each, or a row for leaves that differ in a number of their path alone.

    `names` has {path of the source: name of its array in a file of weights}, where they differ.
    """
    sources = [(names or {}).get(r.source or "-", r.source or "-") for r in rows]
    same = [source == r.target for r, source in zip(rows, sources, strict=True)]
    actions = [
        "renamed" if r.action == "copied" and not equal else r.action for r, equal in zip(rows, same, strict=True)
    ]
    about = [(action, _shape(r.shape), str(r.dtype)) for r, action in zip(rows, actions, strict=True)]
    # Numbers are left out: block_0 from layers_0 and block_1 from layers_1 are to have one row.
    alike = [
        (None if equal else re.sub("[0-9]+", "#", source), *more)
        for equal, source, more in zip(same, sources, about, strict=True)
    ]
    targets = [r.target or r.source or "-" for r in rows]
    lines = []
    for path, members in paths.folded(list(zip(targets, alike, strict=True))):
        first = members[0]
        together = path if same[first] else _folded_alike([targets[i] for i in members], [sources[i] for i in members])
        groups = [(path, together, members)] if together else [(targets[i], sources[i], [i]) for i in members]
        for target, source, group in groups:
            lines.append((target if rows[first].target else "-", source, *about[first], str(len(group))))
    table(title, ["target leaf", "from", "action", "shape", "dtype", "leaves"], lines)


def _folded_alike(targets: Sequence[str], sources: Sequence[str]) -> str:
    """The sources of several targets as one name; "" where their numbers are in another order.

    >>> _folded_alike(["block_0/bias", "block_1/bias"], ["layers.0.bias", "layers.1.bias"])
    'layers.{0,1}.bias'
    >>> _folded_alike(["block_0/bias", "block_1/bias"], ["layers.1.bias", "layers.0.bias"])
    ''
    """
    if len(set(sources)) == 1:
        return sources[0]
    numbers = [[tuple(map(int, re.findall("[0-9]+", name))) for name in names] for names in (targets, sources)]
    places = range(len(targets))
    orders = [sorted(places, key=part.__getitem__) for part in numbers]
    folded = paths.folded([(source, None) for source in sources])
    return folded[0][0] if len(folded) == 1 and orders[0] == orders[1] else ""


def mask_table(title: str, params: Any, mask: Any, decays: Any = None, notes: Sequence[str] = ()) -> None:
    """A mask's leaves: path, shape, trained or frozen, how many numbers; a row for leaves that differ in a number of
    their path alone. With `decays`, a tree of bools, also whether weight decay touches what trains of a leaf. Notes
    stand below."""
    rows = masks.table(params, mask)
    trained, total = sum(r.trained_size for r in rows), sum(r.size for r in rows)
    touched = [True] * len(rows) if decays is None else [decay for _, decay in paths.items(decays)]
    alike = [(r.shape, r.trained, r.trained_size, decay) for r, decay in zip(rows, touched, strict=True)]
    lines = []
    for path, members in paths.folded([(r.path, about) for r, about in zip(rows, alike, strict=True)]):
        first, several = rows[members[0]], f"{len(members)} x " if len(members) > 1 else ""
        decay = ("-" if not first.trained_size else "yes" if touched[members[0]] else "no",) * (decays is not None)
        lines.append((path, _shape(first.shape), first.trained, *decay, f"{several}{first.size:,}"))
    columns = ["leaf", "shape", "trains", *["decays"] * (decays is not None), "count"]
    table(title, columns, lines, [f"{trained:,} of {total:,} numbers train", *notes])


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"
