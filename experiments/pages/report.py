"""The page of a run: one HTML file, pictures inside, no network and no script."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined

from experiments.pages import drawing, pictures, tables
from experiments.pages.tables import Table, count, points, ranged, signed
from tljax.study.results import Result
from tljax.study.summary import Curves, Summary, listed, sources, summary

NO_TEST = "no test of significance was made"


class Block(NamedTuple):
    """A table, or pictures in one figure; no picture is None."""

    caption: str
    table: Table | None = None
    pictures: Sequence[drawing.Picture] = ()
    kind: str = "grid"
    """Class of the figure: grid, grid small, box wide, box wide photo."""
    heading: str = ""


class Section(NamedTuple):
    """Blocks under a title; `key` names its pictures' files."""

    title: str
    key: str
    blocks: Sequence[Block]


class Reproduced(NamedTuple):
    """How a page came about; what is empty is not said."""

    environment: Mapping[str, Any] = {}
    """Texts, and lists and mappings of them."""
    flags_text: str = ""
    command: str = ""


@drawing.style()
def page(
    rows: Sequence[Result],
    curves: Curves,
    *,
    title: str,
    source_note: str,
    notes: Sequence[str],
    made: Reproduced,
    classes: Sequence[str] = (),
) -> str:
    """HTML of a run: `rows` are fits, `curves` [segments] arrays by a fit's name; every table says the `notes`."""
    found = panels(rows)
    return render(
        brief(_sections(found, rows, curves, classes, said(notes)), notes),
        title=title,
        lead=_lead([group for panel in found.values() for group in panel]),
        lists=[(heading, [(group.name, _line(group)) for group in panel]) for heading, panel in found.items()],
        source_note=source_note,
        made=made,
    )


@drawing.style()
def render(
    sections: Sequence[Section],
    *,
    title: str,
    lead: str,
    made: Reproduced,
    source_note: str = "",
    lists: Sequence[tuple[str, Sequence[tuple[str, str]]]] = (),
) -> str:
    """HTML of any sections; `lists` are (heading, (name, what it did)) below the lead."""
    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    html = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return html.from_string(template).render(
        title=title,
        lead=lead,
        lists=lists,
        source_note=source_note,
        sections=sections,
        svg=drawing.svg,
        environment={key: _text(value) for key, value in made.environment.items()},
        flags_text=made.flags_text,
        command=made.command,
    )


def said(notes: Sequence[str]) -> str:
    """Notes as sentences after a caption."""
    return "".join(f" {note}" + ("" if note[-1:] in tuple(".!?") else ".") for note in notes)


MOST_NOTES = 25
"""Words of notes that every caption repeats; those beyond are said at the first table alone."""


def brief(sections: Sequence[Section], notes: Sequence[str]) -> list[Section]:
    """Sections whose captions say once what they have in common.

    The first caption with the `notes` keeps them all; later ones keep the first notes, up to 25 words. What a caption
    says before them is "As above." where another of its section said the same. Nothing that fits on a line changes.
    """
    whole, words = said(notes), [len(note.split()) for note in notes]
    kept = [note for i, note in enumerate(notes) if i == 0 or sum(words[: i + 1]) <= MOST_NOTES]
    short = whole if len(kept) == len(notes) else said([*kept, "Further notes are at the first table"])
    with_notes = 0
    shortened = []
    for section in sections:
        bodies: set[str] = set()
        blocks = []
        for block in section.blocks:
            noted = bool(whole) and block.caption.endswith(whole)
            body = block.caption.removesuffix(whole) if noted else block.caption
            repeated = body in bodies and len(body.split()) > 12
            bodies.add(body)
            end = "" if not noted else short if with_notes else whole
            with_notes += noted
            blocks.append(block._replace(caption=("As above." if repeated else body) + end))
        shortened.append(section._replace(blocks=blocks))
    return shortened


RESULTS = (
    "Means over seeds, ranges below them; differences are paired by seed. The calibration error is the expected one, "
    "a fraction. A diverged fit counts as the share of the most frequent test class; it has no loss and no calibration."
)
LEARNING = (
    "Accuracy at the end of each segment, on the test set (on the validation split where one was held out), and "
    "training loss averaged over it. Lines are means over seeds, bands their range; diverged fits are left out."
)
BY_CLASS = "Test accuracy of each class in %, mean over the fits that did not diverge."
CONFUSION = "Predicted class against true class in % of the true class, summed over the fits that did not diverge."
SHARES = (
    "Trained and frozen parameters of each strategy, leaf by leaf in the order of their paths; of phases, the one "
    "that trains most."
)
SOURCES = (
    "The fits that the transferred parameters come from: means over seeds on the source's own test set, ranges below "
    "them; one that diverged enters none."
)


def _sections(
    panels: Mapping[str, list[Summary]], rows: Sequence[Result], curves: Curves, classes: Sequence[str], notes: str
) -> list[Section]:
    strokes = drawing.strokes([group.name for panel in panels.values() for group in panel])
    found: dict[str, list[Block]] = {"results": [], "learning": [], "class": [], "confusion": []}
    for heading, panel in panels.items():
        members = {group.name: group.members for group in panel}
        where = f", {heading}" if heading else ""
        found["results"].append(Block(RESULTS + notes, tables.results(panel, heading), heading=heading))
        lines = [pictures.learning(members, curves, field, where, strokes) for field in ("accuracy", "train_loss")]
        found["learning"] += figure(LEARNING, lines, "grid", heading)
        cells = pictures.by_class(members, classes, where)
        found["class"] += figure(BY_CLASS + notes, [cells], "box wide", heading)
        each = [pictures.confusion(name, fits, classes, where) for name, fits in members.items()]
        found["confusion"] += figure(CONFUSION + notes, each, "grid small", heading)
    return [
        Section("Results", "results", found["results"]),
        Section("Learning curves", "learning", found["learning"]),
        Section("Accuracy by class", "class", found["class"]),
        Section("Confusion", "confusion", found["confusion"]),
        trained([group for panel in panels.values() for group in panel]),
        origins(rows, notes),
    ]


def figure(caption: str, found: Sequence[drawing.Picture | None], kind: str = "grid", heading: str = "") -> list[Block]:
    """The pictures that there are as a block; none for none."""
    drawn = [picture for picture in found if picture]
    return [Block(caption, None, drawn, kind, heading)] if drawn else []


def trained(panel: Sequence[Summary], heading: str = "") -> Section:
    """What each strategy trains."""
    drawn = figure(SHARES, [pictures.shares(_parameters(panel))], "box wide", heading)
    return Section("What was trained", "trained", drawn)


def origins(rows: Sequence[Result], notes: str) -> Section:
    """The sources' own fits."""
    table = tables.sources(sources(rows))
    return Section("Sources", "sources", [Block(SOURCES + notes, table)] if table.rows else [])


def panels(rows: Sequence[Result]) -> dict[str, list[Summary]]:
    """Strategies of each target and budget, which are never averaged or compared, under a heading if several."""
    groups = summary(rows)
    several = len({group.source for group in groups} - {None}) > 1
    found: dict[tuple[Any, Any], list[Summary]] = {}
    for group in groups:
        origin = f" from {group.source}" if several and group.source is not None else ""
        named = replace(group, name=group.strategy + origin)
        found.setdefault((group.target, group.train_examples), []).append(named)
    return {_where(key, found) if len(found) > 1 else "": panel for key, panel in found.items()}


def _where(key: tuple[Any, Any], keys: Any) -> str:
    """The target is named only where there are several."""
    target, budget = key
    examples = f"{count(budget)} training examples"
    return examples if len({name for name, _ in keys}) == 1 else f"{target}, {examples}"


def _lead(panel: Sequence[Summary]) -> str:
    """The first sentence: what was compared, over how many seeds, and what was not done."""
    if not panel:
        return "No fit of a target has been made yet."
    scratch = [group for group in panel if _is_scratch(group)]
    names = {group.name for group in panel if not _is_scratch(group)}
    origins = listed([group.source for group in panel if group.source is not None])
    targets = listed([group.target for group in panel])
    ways = "1 strategy" if len(names) == 1 else f"{len(names)} strategies"
    task = f"of transfer from {origins} to {targets}" if origins else f"on {targets}"
    if not names:
        compared = f"Training from scratch on {targets} was measured"
    elif scratch:
        compared = f"Training from scratch was compared with {ways} {task}"
    else:
        compared = f"Without training from scratch, there {'was' if len(names) == 1 else 'were'} measured {ways} {task}"
    budgets = listed([count(group.train_examples) for group in panel])
    difference = " and mean difference from scratch, paired by seed" if scratch and names else ""
    return f"{compared}, at {budgets} training examples; mean test accuracy{difference} ({_seeds(panel)}; {NO_TEST}):"


def _is_scratch(group: Summary) -> bool:
    return group.members[0].strategy == "scratch"


def _seeds(panel: Sequence[Summary]) -> str:
    """How many seeds the ranges are over, as words."""
    counted = [group.counted for group in panel if group.counted]
    if not counted:
        return "no fit reached the end"
    low, high = min(counted), max(counted)
    if high == 1:
        return "1 seed, so no range"
    return f"range over {high} seeds" if low == high else f"range over {low} to {high} seeds"


def _line(group: Summary) -> str:
    """What the lead says of a strategy, after its name."""
    if group.accuracy is None:
        return tables.state(group)
    mean, between = ranged(group.accuracy, points, group.counted > 1)
    text = f"{mean} %" + (f" ({between})" if between else "")
    if group.gain:
        mean, between = ranged(group.gain, signed, group.gain_seeds > 1)
        text += f", {mean} points from scratch" + (f" ({between})" if between else "")
    return text + (f"; {tables.state(group)}" if tables.state(group) else "")


def _parameters(panel: Sequence[Summary]) -> dict[str, list[tuple[str, int, int]]]:
    """{strategy: (leaf, numbers, trained numbers) of each leaf}; of all leaves as one where they are not known."""
    found: dict[str, list[tuple[str, int, int]]] = {}
    for group in panel:
        trained, total = group.trained_parameters, group.total_parameters
        if group.leaves:
            found.setdefault(group.name, [(name, size, part) for name, size, part in group.leaves])
        elif trained is not None and total is not None:
            found.setdefault(group.name, [("", total, trained)])
    return found


def _text(value: Any) -> str:
    if isinstance(value, dict):
        value = [f"{key} {one}" for key, one in value.items()]
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
