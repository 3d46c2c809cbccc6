"""Audit anyone's training step, or two checkpoints: does what is said to be frozen stay as it is?

    python -m experiments.audit loop.py:make
    python -m experiments.audit --before=base.safetensors --after=tuned.safetensors --mask='head/**'

make() returns the arguments of tljax.audit.step, a mapping of them or a tuple in this order: step, state, batch, mask,
and, if they are needed, params and loss. The step is read as a program, and nothing is trained. --before and --after
are .safetensors or .npz files, folders of Orbax, checkpoints of tljax, or runs; --mask are globs of what trained, with
a + between them, or a file of a run's masks/.

What it finds is printed, the refuted first, and written to --output: audit.html and audit.json. Exit code 0 says that
nothing that was to hold is refuted, and that all that is frozen is proved to stay; else it is 1. A leaf that cannot be
decided is accepted by its path, --undecided. tljax/audit/README.md says what is decided, and how.
"""

from experiments import run_program

if __name__ == "__main__":  # before the other imports, so that a failure in them is reported in one line
    run_program(__file__)

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from experiments.runs import command_line, console, sources
from experiments.runs.command_line import flag
from experiments.runs.settings import Settings
from tljax import paths, plugins, switches, weights
from tljax.types import InputError

if TYPE_CHECKING:
    from tljax.audit import Report

ARGUMENTS = ("step", "state", "batch", "mask", "params", "loss")
"""What make() returns, in the order of a tuple; the last two may be left out."""
_NEEDED = ARGUMENTS[:4]


@dataclass(frozen=True)
class AuditFlags:
    """What is audited, and what it must hold."""

    ARGUMENT: ClassVar[str] = "step"
    step: str | None = flag(
        None, "FILE.py:make, or package.module:make, with options; may stand without --step=; or --before", place="path"
    )
    before: str | None = flag(None, "the checkpoint that training began with", place="path")
    after: str | None = flag(None, "the checkpoint that it ended with", place="path")
    before_fit: str | None = flag(None, "which of several fits of --before: its name in results.jsonl")
    after_fit: str | None = flag(None, "which of several fits of --after")
    mask: str | None = flag(None, "what trained between them: globs, head/**+**/bias, or a .json of a run's masks/")
    at_least: str = flag(
        "equal",
        "the lowest grade in which a frozen leaf counts as proved",
        choices=("identical", "equal", "equal if finite"),
    )
    undecided: str | None = flag(None, "globs of frozen leaves, with a + between, of which it may be left undecided")
    leaks: bool = flag(False, "whether trained updates may depend on the gradients of frozen leaves")
    output: str = flag("runs/audit", "a folder for audit.html and audit.json", place="new")


def run(flags: Mapping[str, Any], audit_flags: AuditFlags) -> "Report":
    """Print and write what is found; returns it. Raises InputError if anything is refuted."""
    folder = _folder(audit_flags.output)
    at_least = _grade(audit_flags.at_least)
    checkpoint_flags = [name for name in ("before", "after", "mask") if getattr(audit_flags, name)]
    if audit_flags.step and checkpoint_flags:
        raise InputError(
            f"--step and --{checkpoint_flags[0]}: audit a step, or two checkpoints, and leave the other out"
        )
    report = _audit_step(audit_flags.step) if audit_flags.step else _audit_checkpoints(flags, audit_flags)
    failures = _failures(report, at_least, audit_flags.leaks, audit_flags.undecided)
    from experiments.pages import audit as page  # draws: matplotlib takes a second to import

    page.show(report)
    folder.mkdir(parents=True, exist_ok=True)
    page.write(folder, report, failures, _command(audit_flags))
    console.say(f"  report: {folder / 'audit.html'}")
    if failures:
        first = failures[0]
        rest = f"; and {len(failures) - 1} more" if len(failures) > 1 else ""
        remedy = f"; accept it by --undecided='{first.path}'" if first.verdict == "not decided" else ""
        raise InputError(f"{report.subject}: '{first.path}', {first.claim}, is {page.outcome(first)}{rest}{remedy}")
    return report


def _failures(report: "Report", at_least: Any, leaks: bool, undecided: str | None) -> list[Any]:
    """The findings against what is audited: refuted, proved in too low a grade, or, of a leaf that is to stay and
    matches no glob of `undecided`, not decided; those last. Optimizer state of what is frozen costs memory, and moves
    nothing. Raises InputError for a glob that matches nothing.
    """
    from tljax.audit.report import CLAIMS, broken, unaccepted

    claims = [claim for claim in CLAIMS if claim != "state" and not (leaks and claim == "unseen")]
    against = broken(report, claims, at_least)
    patterns = undecided.split("+") if undecided else []
    left = unaccepted(report, against, patterns, "--undecided={}")
    left_open = [each for each in left if each.verdict == "not decided" and each.claim in ("frozen", "off")]
    return [finding for finding in against if finding.verdict != "not decided"] + left_open


def _folder(output: str) -> Path:
    folder = Path(output)
    if "\0" in output:
        raise InputError(f"--output={output!r} holds a zero byte, which no path may: name another")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output={output} is a file: name a folder")
    return folder


def _grade(text: str) -> Any:
    from tljax.audit.report import GRADES

    if text not in GRADES[:-1]:
        raise InputError(f"--at_least={text}: it is one of {', '.join(map(repr, GRADES[:-1]))}")
    return text


def _command(audit_flags: AuditFlags) -> str:
    """The command that gives this audit again, for a shell."""
    default = command_line.flagfile_lines(AuditFlags())
    lines = [line for line in command_line.flagfile_lines(audit_flags) if line not in default]
    return shlex.join(("python", "-m", "experiments.audit", *lines))


# ---- A step


def _audit_step(text: str) -> "Report":
    """The audit of what a function makes. Raises InputError, with the line of its file, for what fails there."""
    from tljax import audit

    spec = plugins.parse(text)
    if "." not in spec.name:
        raise InputError(f"--step={text}: name a function that makes the step, as loop.py:make")
    loaded = plugins.module(spec, "tljax", "step")
    make = plugins.attribute(spec._replace(words=spec.words or ("make",)), loaded, "step")
    options = plugins.bind(make, spec.options, f"step '{spec.name}'")
    what = f"step '{text}'"
    try:
        with switches.guarded(what):
            returned = make(**options)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{what}: {_called(make)}() fails: {plugins.describe(error, make)}") from error
    arguments = _arguments(what, _called(make), returned)
    try:
        report = audit.step(**arguments)
    except InputError as error:
        text = re.sub(r"`(\w+)=[^`]*`", rf"what {_called(make)}() returns as '\1'", str(error))  # it is no flag here
        raise InputError(f"{what}: {text}") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"{what} cannot be read: {plugins.describe(error, arguments['step'])}") from error

    if calls := [finding for finding in report.select("frozen", "not decided") if "_callback'" in finding.detail]:
        source = f" at {calls[0].source}" if calls[0].source else ""
        raise InputError(
            f"{what}: what is frozen goes through the host{source}, where nothing is known of it: "
            f"{paths.some([finding.path for finding in calls])} cannot be decided; keep callbacks beside the state"
        )
    return report


def _called(make: Callable[..., Any]) -> str:
    return str(getattr(make, "__name__", "make"))


def _arguments(what: str, name: str, returned: Any) -> dict[str, Any]:
    """The arguments of `audit.step` of what a function returned. Raises InputError where they are none."""
    if isinstance(returned, Mapping):
        arguments = dict(returned)
    elif isinstance(returned, tuple) and len(_NEEDED) <= len(returned) <= len(ARGUMENTS):
        arguments = dict(zip(ARGUMENTS, returned, strict=False))
    else:
        kind = (
            f"a tuple of {len(returned)}"
            if isinstance(returned, tuple)
            else f"something of the type {type(returned).__name__}"
        )
        raise InputError(f"{what}: {name}() returns {kind}: return (step, state, batch, mask), or a mapping of these")
    if missing := [key for key in _NEEDED if key not in arguments]:
        raise InputError(f"{what}: {name}() returns no {paths.some(missing)}: it is to return {', '.join(ARGUMENTS)}")
    if odd := [key for key in arguments if key not in ARGUMENTS]:
        near = plugins.nearest(str(odd[0]), ARGUMENTS)
        raise InputError(f"{what}: {name}() returns {plugins.shown(odd[0])}, which audit.step does not take{near}")
    if not callable(arguments["step"]):
        kind = type(arguments["step"]).__name__
        raise InputError(f"{what}: the step that {name}() returns is of the type {kind}, and no function")
    return arguments


# ---- Two checkpoints


def _audit_checkpoints(flags: Mapping[str, Any], audit_flags: AuditFlags) -> "Report":
    """The audit of two checkpoints and the mask that is said to have trained."""
    if not audit_flags.before or not audit_flags.after or not audit_flags.mask:
        raise InputError(
            "nothing is given to audit: name a step, as loop.py:make, or --before, --after and --mask of checkpoints"
        )
    from tljax import audit

    before = _opened("before", audit_flags.before, audit_flags.before_fit)
    after = _opened("after", audit_flags.after, audit_flags.after_fit)
    (before, after), notes = _of_one_naming(flags, (audit_flags.before, audit_flags.after), (before, after))
    try:
        report = audit.checkpoints(before, after, audit_flags.mask)
    except InputError as error:
        of_notes = "".join(f"; {note}" for note in notes)
        raise InputError(f"--before={audit_flags.before}, --after={audit_flags.after}: {error}{of_notes}") from error
    names = [
        " ".join(filter(None, names))
        for names in ((audit_flags.before, audit_flags.before_fit), (audit_flags.after, audit_flags.after_fit))
    ]
    return replace(report, subject=" to ".join(names), notes=(*notes, *report.notes))


def _of_one_naming(
    flags: Mapping[str, Any], places: Sequence[str], sides: Sequence[Any]
) -> tuple[list[Any], list[str]]:
    """(the leaves before and after, notes): those of a file by the rules of its card where more have one name so.

    What such rules drop, and the other side has not, is no leaf of the network, and left out. Raises InputError as
    `sources.load_weights` does.
    """
    read = [_by_card(place, side) for place, side in zip(places, sides, strict=True)]
    kept = [
        [name for name in side if name in other or name not in dropped]
        for side, other, (_, dropped) in zip(sides, reversed(sides), read, strict=True)
    ]
    choices = list(zip(kept, (leaves or names for names, (leaves, _) in zip(kept, read, strict=True)), strict=True))
    before, after = max(
        ((before, after) for before in choices[0] for after in choices[1]),
        key=lambda names: len(set(names[0]) & set(names[1])),
    )
    result: list[Any] = []
    notes: list[str] = []
    for name, place, side, names, chosen in zip(("before", "after"), places, sides, kept, (before, after), strict=True):
        left_out = [leaf for leaf in side if leaf not in names]
        if chosen is not names:
            result.append(_read_by_card(flags, name, place))
            notes.append(f"'{place}' is read by the rules of its card, so that its leaves have the paths of its model")
        elif left_out:
            result.append({leaf: side[leaf] for leaf in names})
            notes.append(f"the card of '{place}' drops {paths.some(left_out)}: nothing is claimed of that")
        else:
            result.append(side)
    return result, notes


def _by_card(place: str, arrays: Any) -> tuple[list[str], tuple[str, ...]]:
    """(paths of the leaves, names of what is dropped) by the rules of the card of a file of weights; nothing where it
    has no card, and where that has no rules, or none that fit."""
    if not sources.is_weights_file(place):
        return [], ()
    try:
        rules = sources.read_rules(Settings(), sources.weights_card(Path(place)), Path(place))
        moves, dropped = weights.moves(arrays, rules)
    except InputError:
        return [], ()
    return ([path for move in moves for path in move.leaves] if rules else []), dropped


def _read_by_card(flags: Mapping[str, Any], name: str, place: str) -> dict[str, Any]:
    """The leaves of a file of weights by the rules of its card."""
    try:
        flat, source, _, _ = sources.load_weights(flags, place, None)
    except InputError as error:
        raise command_line.flag_renamed(error, "checkpoint", name) from error
    return {path: leaf for path, leaf in flat.items() if path in source.names or not source.headless}


def _opened(name: str, place: str, fit: str | None) -> Any:
    """The leaves of a checkpoint, of a fit of a run, or of a file of weights."""
    from tljax.audit.checkpoints import opened

    try:
        folder = Path(place)
        if "\0" not in place and (folder / "results.jsonl").is_file():
            checkpoint, seed = sources.find_fit(folder, fit)
            fits = sources.first_about(checkpoint)["fits"]
            names = [name for name, about in fits.items() if about["seed"] == seed and name.startswith(fit or "")]
            return opened(checkpoint, names[0])
        return opened(place, fit)
    except InputError as error:
        named = command_line.flag_renamed(error, "fit", f"{name}_fit")
        raise InputError(f"--{name}={place}: {named}") from error


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    command_line.main(argv, str(__doc__), run, AuditFlags)
