"""The page of a study: one HTML file, pictures inside, no network and no script."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
from jinja2 import Environment, StrictUndefined

from tljax.study import pictures
from tljax.study.summary import Row, Spread, groups, sources, summary

Group = dict[str, Any]
"""A row of `summary`, with its name on the page and its members, the fits themselves."""

NO_TEST = "no test of significance was made"
NOTHING = "\N{EN DASH}"


def page(
    rows: Sequence[Row],
    curves: pictures.Curves,
    *,
    title: str,
    source_note: str,
    notes: Sequence[str],
    environment: Mapping[str, str | Sequence[str]],
    flags_text: str,
    command: str,
    classes: Sequence[str] = (),
) -> str:
    """HTML of a study: `rows` are fits, `curves` [segments] arrays by a fit's name; every table says the `notes`."""
    with matplotlib.style.context(["default", pictures.STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the reader's fonts draw the text, not matplotlib's
        panels = _panels(rows, curves, classes)
        shares = pictures.shares(_parameters(panels))
    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    html = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return html.from_string(template).render(
        title=title,
        lead=_lead([group for panel in panels for group in panel["groups"]]),
        source_note=source_note,
        notes=notes,
        panels=panels,
        sources=[_cells(group | {"name": _source(group)}) for group in sources(rows)],
        shares=shares,
        environment={key: _text(value) for key, value in environment.items()},
        flags_text=flags_text,
        command=command,
    )


def _panels(rows: Sequence[Row], curves: pictures.Curves, classes: Sequence[str]) -> list[dict[str, Any]]:
    """A panel for each target and budget, which are never averaged or compared."""
    fits = [row for row in rows if row["strategy"] != "pretrain"]
    origins = {row.get("source") for row in fits} - {None}
    found: dict[tuple[Any, Any], list[Group]] = {}
    for group, members in zip(summary(fits), groups(fits), strict=True):
        name = group["strategy"]
        if len(origins) > 1 and group["source"] is not None:
            name += f" from {group['source']}"
        group |= {"name": name, "members": members}
        found.setdefault((group["target"], group["train_examples"]), []).append(group)
    strokes = pictures.strokes([group["name"] for panel in found.values() for group in panel])
    several = len(found) > 1
    return [
        _panel(panel, _where(key, found) if several else "", curves, classes, strokes) for key, panel in found.items()
    ]


def _panel(
    panel: list[Group], heading: str, curves: pictures.Curves, classes: Sequence[str], strokes: Mapping[str, Any]
) -> dict[str, Any]:
    """What the template shows of one target and budget; a picture of what was not recorded is left out."""
    members = {group["name"]: group["members"] for group in panel}
    where = f", {heading}" if heading else ""
    learning = [pictures.learning(members, curves, field, where, strokes) for field in ("accuracy", "train_loss")]
    confusion = [pictures.confusion(name, fits, classes, where) for name, fits in members.items()]
    by_class = pictures.by_class(members, classes, where)
    return {
        "heading": heading,
        "groups": panel,
        "table": [_cells(group) for group in panel],
        "lines": [_line(group) for group in panel],
        "learning": [picture for picture in learning if picture],
        "by_class": [by_class] if by_class else [],
        "confusion": [picture for picture in confusion if picture],
    }


def _where(key: tuple[Any, Any], keys: Any) -> str:
    """The target is named only where there are several."""
    target, budget = key
    examples = f"{_count(budget)} training examples"
    return examples if len({name for name, _ in keys}) == 1 else f"{target}, {examples}"


def _lead(panel: Sequence[Group]) -> str:
    """The first sentence: what was compared, over how many seeds, and what was not done."""
    if not panel:
        return "No fit of a target has been made yet."
    scratch = [group for group in panel if _is_scratch(group)]
    names = {group["name"] for group in panel if not _is_scratch(group)}
    origins = _listed([group["source"] for group in panel if group["source"] is not None])
    targets = _listed([group["target"] for group in panel])
    ways = "1 strategy" if len(names) == 1 else f"{len(names)} strategies"
    task = f"of transfer from {origins} to {targets}" if origins else f"on {targets}"
    if not names:
        compared = f"Training from scratch on {targets} was measured"
    elif scratch:
        compared = f"Training from scratch was compared with {ways} {task}"
    else:
        compared = f"Without training from scratch, there {'was' if len(names) == 1 else 'were'} measured {ways} {task}"
    budgets = _listed([_count(group["train_examples"]) for group in panel])
    difference = " and mean difference from scratch, paired by seed" if scratch and names else ""
    return f"{compared}, at {budgets} training examples; mean test accuracy{difference} ({_seeds(panel)}; {NO_TEST}):"


def _is_scratch(group: Group) -> bool:
    return bool(group["members"][0]["strategy"] == "scratch")


def _seeds(panel: Sequence[Group]) -> str:
    """How many seeds the ranges are over, as words."""
    counted = [group["counted"] for group in panel if group["counted"]]
    if not counted:
        return "no fit reached the end"
    low, high = min(counted), max(counted)
    if high == 1:
        return "1 seed, so no range"
    return f"range over {high} seeds" if low == high else f"range over {low} to {high} seeds"


def _line(group: Group) -> str:
    """What the lead says of a strategy, after its name."""
    if group["accuracy"] is None:
        return _state(group)
    mean, low, high = _points(group["accuracy"])
    text = f"{mean} %" + (f" ({low} to {high})" if group["counted"] > 1 else "")
    if group["gain"]:
        mean, low, high = map(_signed, group["gain"])
        text += f", {mean} points from scratch" + (f" ({low} to {high})" if group["gain_seeds"] > 1 else "")
    return text + (f"; {_state(group)}" if _state(group) else "")


def _state(group: Group) -> str:
    """What is missing from the means: diverged and unmeasured fits, and seeds without a fit from scratch; or ''."""
    said = []
    if group["counted"] < group["seeds"]:
        said.append(f"{group['counted']} of {group['seeds']} seeds")
    if group["diverged"]:
        said.append(f"{group['diverged']} diverged")
    if group["counted"] + group["diverged"] < group["seeds"]:
        said.append(f"{group['seeds'] - group['diverged'] - group['counted']} not measured")
    if 0 < group["gain_seeds"] < group["counted"]:
        said.append(f"difference over {group['gain_seeds']} of {group['counted']} seeds")
    return ", ".join(said)


def _cells(group: Group) -> dict[str, Any]:
    """A row of a table, as text; a spread is a pair of the mean and, over two seeds or more, the range."""
    trained, total = group["trained_parameters"], group["total_parameters"]
    share = f"{100 * trained / total:.1f} %" if trained is not None and total else ""
    diverged = group["diverged"] and group["diverged"] == group["seeds"]
    gain = [_signed(value) for value in group["gain"]] if group["gain"] else None
    accuracy = _points(group["accuracy"]) if group["accuracy"] else None
    return {
        "name": group["name"],
        "state": _state(group),
        "accuracy": ("diverged", "") if diverged else _pair(accuracy, group["counted"]),
        "gain": _pair(gain, group["gain_seeds"]),
        "loss": _pair(_fixed(group["test_loss"]), group["counted"]),
        "calibration": _pair(_fixed(group["calibration_error"]), group["counted"]),
        "trained": (_count(trained), share),
        "total": _count(total),
        "steps": _count(group["steps"]),
        "seconds": NOTHING if group["seconds"] is None else f"{group['seconds']:,.1f}",
    }


def _source(group: Group) -> str:
    return f"{group['target']}, {_count(group['train_examples'])} training examples"


def _parameters(panels: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[str, int, int]]]:
    """{strategy: (leaf, numbers, trained numbers) of each leaf}; of all leaves as one where they are not known."""
    found: dict[str, list[tuple[str, int, int]]] = {}
    for group in (group for panel in panels for group in panel["groups"]):
        trained, total = group["trained_parameters"], group["total_parameters"]
        if group["leaves"]:
            found.setdefault(group["name"], [(name, size, part) for name, size, part in group["leaves"]])
        elif trained is not None and total is not None:
            found.setdefault(group["name"], [("", total, trained)])
    return found


def _pair(texts: Sequence[str] | None, seeds: int) -> tuple[str, str]:
    if texts is None:
        return NOTHING, ""
    return texts[0], f"{texts[1]} to {texts[2]}" if seeds > 1 else ""


def _points(spread: Spread) -> list[str]:
    return [f"{100 * value:.1f}" for value in spread]


def _fixed(spread: Spread | None) -> list[str] | None:
    return [f"{value:.3f}" for value in spread] if spread else None


def _signed(value: float) -> str:
    """A typographer's minus; no sign on zero."""
    text = f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")
    return "0.0" if text[1:] == "0.0" else text


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _count(value: float | None) -> str:
    return NOTHING if value is None or not math.isfinite(value) else f"{value:,.0f}"


def _listed(names: Sequence[str]) -> str:
    """The different names, as 'a, b and c'."""
    unique = list(dict.fromkeys(map(str, names)))
    return " and ".join(part for part in (", ".join(unique[:-1]), *unique[-1:]) if part)
