"""A report as one HTML file, pictures inside, no network and no script: sections of tables and figures.

The text of a program's page is in the file of its name: transfer, compare, search, ranking.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined

from experiments.pages import figures
from experiments.runs import directory
from experiments.runs.command_line import PATHS_FROM
from experiments.runs.console import Table


class Block(NamedTuple):
    """A table, or pictures in one figure; none of the pictures is None."""

    caption: str
    table: Table | None = None
    pictures: Sequence[figures.Picture] = ()
    kind: str = "grid"
    """Class of the figure: grid, grid small, box wide, box wide photo."""
    heading: str = ""


class Section(NamedTuple):
    """Blocks under a title; `key` names its pictures' files."""

    title: str
    key: str
    blocks: Sequence[Block]


class Provenance(NamedTuple):
    """How a page came about; the page leaves out a field that is empty."""

    environment: Mapping[str, Any] = {}
    """Texts, and lists and mappings of them."""
    flags_text: str = ""
    command: str = ""


@figures.style()
def render(
    sections: Sequence[Section],
    *,
    title: str,
    lead: str,
    provenance: Provenance,
    source_note: str = "",
    lists: Sequence[tuple[str, Sequence[tuple[str, str]]]] = (),
) -> str:
    """The HTML of any sections; `lists` are (heading, [(name, text)]) below the lead."""
    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    html = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return html.from_string(template).render(
        title=title,
        lead=lead,
        lists=lists,
        source_note=source_note,
        sections=sections,
        svg=figures.svg,
        environment={key: _text(value) for key, value in provenance.environment.items()},
        flags_text=provenance.flags_text,
        command=provenance.command,
    )


def sentences(notes: Sequence[str]) -> str:
    """The notes as sentences that follow a caption."""
    return "".join(f" {note}" + ("" if note[-1:] in tuple(".!?") else ".") for note in notes)


MOST_NOTES = 25
"""The most words of notes that every caption repeats; the first table alone has the notes beyond them."""


def brief(sections: Sequence[Section], notes: Sequence[str]) -> list[Section]:
    """The sections with shorter captions: what captions have in common is written once.

    The first caption with the `notes` keeps them all; later ones keep the first notes, up to 25 words. The text of a
    caption before its notes becomes "As above." if another caption of its section has the same text of more than 12
    words.
    """
    whole, words = sentences(notes), [len(note.split()) for note in notes]
    first = [note for i, note in enumerate(notes) if i == 0 or sum(words[: i + 1]) <= MOST_NOTES]
    short = whole if len(first) == len(notes) else sentences([*first, "Further notes are at the first table"])
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


def figure(
    caption: str, pictures: Sequence[figures.Picture | None], kind: str = "grid", heading: str = ""
) -> list[Block]:
    """[a block of the pictures that are not None]; [] if all are None."""
    drawn = [picture for picture in pictures if picture]
    return [Block(caption, None, drawn, kind, heading)] if drawn else []


def provenance_of(folder: Path) -> Provenance:
    """The provenance of the page of a run directory."""
    lines = directory.flags_text(folder / "flags.flags").splitlines(keepends=True)
    text = "".join(line for line in lines if not line.startswith(PATHS_FROM))
    return Provenance(directory.recorded_environment(folder) or {}, text, lines[0].rstrip("\n").removeprefix("# "))


def _text(value: Any) -> str:
    """A text, or a list or mapping of texts, in one line."""
    if isinstance(value, dict):
        value = [f"{key} {each}" for key, each in value.items()]
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
