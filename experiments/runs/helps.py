"""What programs say of themselves, and the main of them all: help, or the flags read and the program run."""

import ast
import dataclasses
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.runs import commandline, options
from tljax import plugins

ORDER = ("pretrain", "zoo", "features", "rank", "search", "check", "transfer", "compare", "report", "export", "predict")
"""Of programs in a project; others come after them."""
NO_TARGET = ("target", "train_examples", "head", "strategies", "frozen_dropout", "head_seed", "source_rename")
"""What is of no use where sources are trained and nothing else."""
NO_FIT = (
    *("source", "target", "train_examples", "head", "strategies", *vars(options.Recipe()), "source_seed", "head_seed"),
    *("order_seed", "draw_seed", "workdir", "save_fisher", "checkpoint_every", "dry_run", "many", "features_budget"),
    "features_dtype",
    "frozen_dropout",
)
"""What is of no use where nothing is trained."""
OF_ITSELF = (*NO_FIT, "source_checkpoint", "image_shape", "data_dir", "manual_dir", "seeds")
"""What a trained fit that is used says of itself."""
_GROUPS = {
    "T": "Tasks",
    "M": "Model",
    "S": "Strategy",
    "": "Fit (each with a twin --source_NAME for the source's fit; its default is what --NAME says)",
    "R": "Run",
    "C": "Speed",
}
_MOST_USED = (
    *("source", "source_checkpoint", "target", "train_examples", "hidden", "strategies", "learning_rate"),
    *("batch_size", "epochs", "steps", "seeds", "workdir", "dry_run"),
)


def main(
    argv: Sequence[str],
    about: str,
    run: Callable[..., Any],
    own: type | None = None,
    *,
    alone: bool = False,
    refused: Collection[str] = (),
    unused: Collection[str] = (),
) -> None:
    """Read a command line and `run`, or print the help that it asks for.

    `run` is given {flag: value} of experiments.transfer and the program's `own` flags, a dataclass; without `own` the
    first as keywords, and with `alone` the second only. `refused` and `unused` are flags of experiments.transfer that
    the program refuses, or takes and makes nothing of. Raises InputError.
    """
    if commandline.asks_help(argv):
        full = alone or commandline.asks_help(argv, ["helpfull"])
        print(text(about, own, {} if alone else _taken({*refused, *unused}, full), full))
        if unused and full:
            names = ", ".join(f"--{name}" for name in unused if name not in refused)
            print("\n".join(textwrap.wrap(f"Taken too, so that flagfiles can be shared, and not used: {names}.", 110)))
    elif own is None:
        run(**options.parse(argv))
    elif alone:
        run(commandline.read(argv, own))
    else:
        run(*options.read(argv, own))


def _taken(without: Collection[str], full: bool) -> dict[str, list[dataclasses.Field]]:
    """{title: flags} of experiments.transfer: all, or the most used."""
    forms = (options.Settings, options.Recipe)
    taken = [f for form in forms for f in dataclasses.fields(form) if f.metadata and f.name not in without]
    if not full:
        return {"Most used of experiments.transfer's": [f for f in taken if f.name in _MOST_USED]}
    return {title: [f for f in taken if f.metadata["group"] == key] for key, title in _GROUPS.items()}


def text(about: str, own: Any, groups: Mapping[str, Sequence[dataclasses.Field]], full: bool) -> str:
    """A program's help: what it is, an example, its own flags, and those of experiments.transfer by theme."""
    lines = [about.strip(), ""]
    themes = {**({"Its own flags": dataclasses.fields(own)} if own else {}), **groups}
    for title, fields in themes.items():
        if not fields:
            continue
        lines += [f"{title}:", *(line for f in fields for line in _told(f))]
        if full and {"strategy", "strategies"} & {f.name for f in fields}:
            lines += [f"      {name:<18} {line}" for name, line in strategies().items()]
        lines += [""]
    if not full:
        lines += ["--helpfull has all flags, by theme."]
    if not own or "flagfile" not in commandline.kinds(own):
        lines += [
            "--flagfile=FILE reads flags from a file, one a line; what comes later counts. Paths in it are sought",
            "from the working directory, and where they are not there from the folder of the file.",
        ]
    return "\n".join(lines)


def _told(f: dataclasses.Field) -> Iterator[str]:
    """The lines of one flag: its name, what it means, its default."""
    default, said = f.default, f.metadata["help"]
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    if isinstance(default, bool):
        default = str(default).lower()
    if "default" not in said and "needed" not in said:
        said += f" (default {'none' if default in (None, '') else default})"
    first, *rest = textwrap.wrap(said, 86)
    yield f"  --{f.name:<18} {first}"
    for line in rest:
        yield " " * 23 + line


def strategies() -> dict[str, str]:
    """{name: first line of its docstring} of the folder, without importing them."""
    import tljax.strategies as folder

    place = Path(folder.__path__[0])
    return {name: _about(place / f"{name}.py") for name in plugins.names("tljax.strategies", "strategy")}


def programs() -> dict[str, str]:
    """{name: first line of its docstring} of all programs, in the order of a project, without importing them."""
    place = Path(__file__).parent.parent
    names = plugins.names("experiments", "main")
    names.sort(key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    return {name: _about(place / f"{name}.py") for name in names}


def _about(file: Path) -> str:
    try:
        text = ast.get_docstring(ast.parse(file.read_bytes()))
    except SyntaxError as error:
        return f"cannot be read: {error.msg} ({file.name}:{error.lineno})"
    return (text or "").split("\n")[0]
