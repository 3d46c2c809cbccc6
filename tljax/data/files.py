"""The user's own data: a folder of pictures, or an .npz file of arrays."""

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, NamedTuple

import jax
import numpy as np

from tljax import files as text_files
from tljax import npz, paths
from tljax.data import checks, filenames, images, targets
from tljax.data.checks import checked
from tljax.data.images import Shape
from tljax.types import ArrayExamples, InputError, RowExamples, Task

_LAYOUT = "expected is DIR/train/CLASS/*.png (.jpg, .jpeg) and DIR/test/CLASS/*.png"
PICTURES = (".png", ".jpg", ".jpeg")
SPELLINGS = {
    "train images": ("train_images", "train_features", "x_train", "train_inputs", "train_inputs/"),
    "train labels": ("train_labels", "y_train", "train_targets"),
    "test images": ("test_images", "test_features", "x_test", "test_inputs", "test_inputs/"),
    "test labels": ("test_labels", "y_test", "test_targets"),
    "class names": ("class_names",),
    "train groups": ("train_groups",),
    "test groups": ("test_groups",),
}
MEMBERS = ("images", *(name for names in SPELLINGS.values() for name in names))
"""The names of all arrays that are read from an .npz file of data; `images` are images without labels."""
NO_PIXELS = ", as only uint8 pixels are resized: give uint8 images, or features of that shape"
"""The end of the messages that refuse to resize features."""
_OPTIONAL = ("class names", "train labels", "test labels", "train groups", "test groups")


def prepare_folder(
    name: str, folder: Path, shape: Shape | None, resize: str = "crop", by_row: bool = False
) -> tuple[list[Path], Callable[[], Task]]:
    """The pictures under `folder`, sorted by split, class and file name, and how to decode them: all of them, or with
    `by_row` each when it is asked for.

    The classes are the sub-folders' names, sorted. Palette, RGBA and CMYK pictures become RGB. Raises InputError
    for another layout, a class in one split only or without a picture, and a file that is not a picture.
    """
    if not folder.is_dir():
        raise InputError(f"'{folder}' is no folder: {_LAYOUT}")
    splits: dict[str, dict[str, list[Path]]] = {}  # {split: {class: its pictures}}
    for split in ("train", "test"):
        if not (folder / split).is_dir():
            raise InputError(f"'{folder}' has no folder '{split}': {_LAYOUT}")
        splits[split] = {filenames.text(c.name): _pictures(c) for c in _visible(folder / split)}
    for split, other in (("train", "test"), ("test", "train")):
        for lacking in sorted(splits[other].keys() - splits[split].keys()):
            raise InputError(f"'{folder / split}' lacks class '{lacking}' of {other}: both need the same classes")
    if not splits["train"]:
        raise InputError(f"'{folder / 'train'}' holds no class folders: {_LAYOUT}")
    files = [file for by_class in splits.values() for pictures in by_class.values() for file in pictures]
    class_folders = [pictures[0].parent for by_class in splits.values() for pictures in by_class.values()]
    folders = [folder, *(folder / split for split in splits), *class_folders]

    def decode() -> Task:
        labels = [
            np.repeat(np.arange(len(by_class)), [len(pictures) for pictures in by_class.values()])
            for by_class in splits.values()
        ]
        decoded = _decoded_by_row if by_row else _decoded
        train, test, note = decoded(files, len(labels[0]), np.concatenate(labels), None, shape, resize)
        return checked(name, train, test, tuple(splits["train"]), note)

    return folders + files, decode


def _decoded(
    files: Sequence[Path], n: int, targets: np.ndarray, groups: np.ndarray | None, shape: Shape | None, resize: str
) -> tuple[ArrayExamples, ArrayExamples, str]:
    """(training examples, which the first `n` pictures are; test examples; what tables say of a crop)."""
    pictures = ((f"'{file}'", images.read(file)) for file in files)
    pixels, cropped = images.gather(pictures, len(files), shape, resize)
    train, test = (
        ArrayExamples(pixels[part], targets[part], None if groups is None else groups[part])
        for part in (slice(n), slice(n, None))
    )
    return train, test, images.crop_note(cropped, len(files), shape)


def _decoded_by_row(
    files: Sequence[Path], n: int, targets: np.ndarray, groups: np.ndarray | None, shape: Shape | None, resize: str
) -> tuple[RowExamples, RowExamples, str]:
    """As `_decoded`, of pictures that are decoded when they are asked for."""
    read, image_shape, crop = images.pictures_by_row(files, shape, resize)
    spec = jax.ShapeDtypeStruct(image_shape, np.uint8)
    train, test = (
        RowExamples(rows, targets[part], spec, None if groups is None else groups[part])
        for rows, part in ((read, slice(n)), (lambda rows: read(rows + n), slice(n, None)))
    )
    sampled = f"decoded as they are read, so their fingerprint is sampled ({checks.SAMPLED:,} rows of a split)"
    return train, test, "; ".join(filter(None, (sampled, crop)))


def _visible(folder: Path) -> list[Path]:
    """What a folder holds, sorted by name, without hidden entries."""
    return sorted((f for f in folder.iterdir() if not f.name.startswith(".")), key=lambda f: filenames.text(f.name))


def _pictures(folder: Path) -> list[Path]:
    """The pictures of a class folder, sorted. Raises InputError if it has none, or holds anything else."""
    if not folder.is_dir():
        raise InputError(f"'{folder}' is no class folder: {_LAYOUT}")
    files = _visible(folder)
    for file in files:
        if file.suffix.lower() not in PICTURES or not file.is_file():
            raise InputError(f"'{file}' is no {', '.join(PICTURES)} file: convert or remove it")
    if not files:
        raise InputError(f"class folder '{folder}' holds no picture: add some, or remove the class from both splits")
    return files


class _Listed(NamedTuple):
    """One picture, as a line of the file that assigns pictures to splits describes it."""

    number: int
    """Of the line."""
    split: str
    folder: str
    """The name of the folder that it is in: its class, unless there is a column target."""
    file: Path
    order: tuple[str, ...]
    """The parts of the path as the line has it, to sort by."""
    group: str | None
    target: str | None


def prepare_listed(
    name: str, folder: Path, table: Path, shape: Shape | None, resize: str = "crop", by_row: bool = False
) -> tuple[list[Path], Callable[[], Task]]:
    """The pictures under `folder` that `table` puts into a split, sorted as by `prepare_folder`, and their decoder.

    `table` is a CSV file (UTF-8) with the columns file, split and, if wanted, target and group; columns of other names
    are not read, but a name that is nearly one of these is refused. `file` is the path of a picture from `folder`,
    CLASS/x.png or train/CLASS/x.png: its folder's name is the class. `split` is train or test; without that column
    the path begins with it. With a column `target` the path is any, and the targets are what that column says: texts
    are classes; texts with a "|" in one of them, cat|dog, are several labels (cat| is one label, an empty cell none);
    numbers with a decimal point in one of them are values, several of them with "|" between. Whole numbers alone may be
    classes or values, and are refused unless they are the folders' names; classes of which some are folders' names
    must be those of the pictures in them. `group` is any text. Targets and groups must be UTF-8; names of files need
    not be. Pictures that no line names are left out, and the note says how many. Raises InputError, with the line,
    where the table is wrong.
    """
    if not folder.is_dir():
        raise InputError(f"'{folder}' is no folder: {_LAYOUT}, or DIR/CLASS/*.png with splits=FILE.csv")
    if not table.is_file():
        in_folder = folder / table.name
        remedy = f"write splits={in_folder}" if in_folder.is_file() else "give its path from the working directory"
        raise InputError(f"'{table}' does not exist: {remedy}")
    listed = _listed(folder, table)
    kind = _kind_of_cells(f"'{table}'", listed)
    by_class = {line: line.folder if line.target is None else line.target for line in listed}
    listed.sort(key=lambda line: (line.split == "test", by_class[line] if kind == "classes" else "", line.order))
    files = [line.file for line in listed]
    classes = sorted(set(by_class.values())) if kind == "classes" else []
    for split, other in (("train", "test"), ("test", "train")):
        classes_of_split = {by_class[line] for line in listed if line.split == split}
        for lacking in classes:
            if lacking not in classes_of_split:
                raise InputError(
                    f"'{table}' puts no picture of class '{lacking}' into {split}, but into {other}: both need the "
                    "same classes"
                )
        if not classes_of_split:
            raise InputError(f"'{table}' puts no picture into {split}: both splits need some")
    folders = sorted({parent for file in files for parent in file.parents if parent.is_relative_to(folder)})
    present = sum(is_picture(file.relative_to(folder)) and file.is_file() for file in folder.rglob("*"))

    def decode() -> Task:
        cells = [by_class[line] for line in listed]
        names, all_targets = _targets_of_cells(f"'{table}'", kind, cells, [line.number for line in listed])
        groups = np.array([line.group for line in listed]) if listed[0].group is not None else None
        n = sum(line.split == "train" for line in listed)
        decoded = _decoded_by_row if by_row else _decoded
        train, test, crop = decoded(files, n, all_targets, groups, shape, resize)
        left_out = f", {present - len(listed):,} of {present:,} in neither" if present > len(listed) else ""
        note = f"{n:,} training and {len(listed) - n:,} test pictures as {filenames.text(table.name)} says{left_out}"
        if not left_out and all(line.split == line.order[0] for line in listed):
            note = ""
        note = "; ".join(filter(None, (note, crop)))
        return checked(name, train, test, names, note, kind=kind)

    return [table, *folders, *files], decode


def _listed(folder: Path, table: Path) -> list[_Listed]:
    """The pictures that the table lists, in its order. Raises InputError, with the line, where it is wrong."""
    try:
        text = text_files.text(table, errors="surrogateescape")
        rows = csv.reader(text.splitlines(), strict=True)
        columns = [column.strip() for column in next(rows, [])]
        lines = [(rows.line_num, [cell.strip() for cell in row]) for row in rows if row]
    except (OSError, csv.Error) as error:
        raise InputError(f"'{table}' cannot be read ({error}): save it as CSV, in UTF-8, with commas") from error
    npz.refuse_slips(columns, ("file", "split", "group", "target"), f"'{table}'", "column")
    if "file" not in columns or len(set(columns)) < len(columns):
        raise InputError(
            f"'{table}' has the columns {', '.join(columns) or 'none'}: it needs file, split and, if wanted, group and "
            "target, each once and with commas between"
        )
    listed = [_line(folder, f"'{table}'", number, columns, cells) for number, cells in lines]
    seen: dict[Path, int] = {}
    for (number, _), line in zip(lines, listed, strict=True):
        if line.file in seen:
            raise InputError(f"'{table}', line {number}: '{line.file}' is in line {seen[line.file]} too: keep one")
        seen[line.file] = number
    if not listed:
        raise InputError(f"'{table}' lists no picture: give a line for each, with its split")
    return listed


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)
_WHOLE = re.compile(r"[+-]?\d+")


def _parts(cell: str) -> list[str]:
    """The labels or values in a cell: those between "|", without empty ones."""
    return [part.strip() for part in cell.split("|") if part.strip()]


def _kind_of_cells(where: str, listed: Sequence[_Listed]) -> str:
    """What the column target holds, as `Task.kind`; 'classes' without that column.

    Raises InputError, with the line, for what may be classes or values, or is neither.
    """
    cells = [line.target for line in listed if line.target is not None]
    if not cells or all(line.target == line.folder for line in listed):
        return "classes"
    several = any("|" in cell for cell in cells)
    are_numbers = [bool(parts) and all(_NUMBER.fullmatch(part) for part in parts) for parts in map(_parts, cells)]
    are_whole = all(_WHOLE.fullmatch(part) for cell in cells for part in _parts(cell))
    if several and (are_whole or not sum(are_numbers) > len(cells) / 2):
        return "labels"
    for line, cell, is_number in zip(listed, cells, are_numbers, strict=True):
        if not cell:
            raise InputError(f"{where}, line {line.number}: target is empty: write it, or leave out the line")
        if sum(are_numbers) > len(cells) / 2 and not is_number:
            raise InputError(f"{where}, line {line.number}: target is '{cell}', most are numbers: write a number")
    if not any(are_numbers):
        return _classes_beside_folders(where, listed)
    if are_whole:
        raise InputError(
            f"{where}: targets are whole numbers, which may be classes or values: write a decimal point for values "
            f"({cells[0]}.0), or a name for classes (c{cells[0]})"
        )
    return "values" if all(are_numbers) else _classes_beside_folders(where, listed)


def _classes_beside_folders(where: str, listed: Sequence[_Listed]) -> str:
    """'classes'. Raises InputError for a target that is another folder's name than that of its picture."""
    folders = {line.folder for line in listed}
    if folders & {line.target for line in listed}:
        for line in listed:
            if line.target != line.folder:
                words = f"target is '{line.target}', the folder says '{line.folder}'"
                raise InputError(f"{where}, line {line.number}: {words}: correct it, or drop the column")
    return "classes"


def _targets_of_cells(
    where: str, kind: str, cells: Sequence[str], lines: Sequence[int]
) -> tuple[tuple[str, ...], np.ndarray]:
    """(names of classes or labels, targets of all lines) that the cells say. Raises InputError, with the line."""
    if kind == "classes":
        names = sorted(set(cells))
        return tuple(names), np.array([names.index(cell) for cell in cells])
    parts = [_parts(cell) for cell in cells]
    if kind == "labels":
        names = sorted({part for each in parts for part in each})
        for line, each in zip(lines, parts, strict=True):
            if len(set(each)) < len(each):
                raise InputError(f"{where}, line {line}: target names a label twice: name it once")
        return tuple(names), np.array([[label in each for label in names] for each in parts], bool)
    for line, each in zip(lines, parts, strict=True):
        if len(each) != len(parts[0]):
            raise InputError(f"{where}, line {line}: target has {len(each)} values, others {len(parts[0])}: write all")
        for part in each:
            if not abs(float(part)) <= float(np.finfo(np.float32).max):
                raise InputError(f"{where}, line {line}: target is '{part}', no finite float32: leave out the line")
    return (), np.array([[float(part) for part in each] for each in parts])


def _line(folder: Path, table: str, number: int, columns: list[str], cells: list[str]) -> _Listed:
    """The picture of one line. Raises InputError, with the line, where the line is wrong."""
    where = f"{table}, line {number}"
    if len(cells) != len(columns):
        raise InputError(f"{where} has {len(cells)} cells, the first line {len(columns)}: quote commas within a cell")
    row = dict(zip(columns, cells, strict=True))
    path = PurePosixPath(row["file"])
    parts = path.parts[1:] if path.parts[:1] in (("train",), ("test",)) else path.parts
    any_place = "target" in row and len(parts) >= 1
    if not (len(parts) == 2 or any_place) or path.is_absolute() or ".." in parts:
        raise InputError(f"{where}: file '{path}' is no CLASS/x.png or train/CLASS/x.png in '{folder}': write it so")
    split = row.get("split", path.parts[0] if path.parts else "")
    if split not in ("train", "test"):
        remedy = "write train or test, or leave out the line" if "split" in row else "add the column split"
        raise InputError(f"{where}: split is '{split}': {remedy}")
    for column in ("target", "group"):
        if not _is_text(row.get(column, "")):
            shown = row[column].encode("utf-8", "backslashreplace").decode()
            raise InputError(f"{where}: {column} '{shown}' is no UTF-8, perhaps Latin-1: save it as UTF-8")
    if row.get("group") == "":
        raise InputError(f"{where}: group is empty: name one for every picture, or drop the column")
    file = folder / filenames.place(str(path))
    if not is_picture(path) or not file.is_file():
        raise InputError(f"{where}: '{file}' is no {', '.join(PICTURES)} file that is there: correct the path")
    return _Listed(number, split, parts[0], file, path.parts, row.get("group"), row.get("target"))


def _is_text(text: str) -> bool:
    """Whether a text can be written in UTF-8: bytes of another encoding are read as what cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_picture(path: PurePath) -> bool:
    """Whether a relative path ends in the name of a picture and has no hidden part."""
    return path.suffix.lower() in PICTURES and not any(part.startswith(".") for part in path.parts)


def prepare_npz(
    name: str, file: Path, shape: Shape | None, resize: str = "crop"
) -> tuple[list[Path], Callable[[], Task]]:
    """The .npz file, and how to read it as a task.

    The file's arrays are train_images (or train_features, train_inputs, x_train): uint8 [n, height, width] or [n,
    height, width, channels], or floats [n, ...], which become float32; as train_inputs also whole numbers [n, length],
    which are tokens, from 0; and train_inputs/NAME for several inputs, a dict of arrays by NAME. train_targets are
    classes, several labels, values or tokens by their dtype and shape, as `targets` says; train_labels (y_train) are
    classes, integers [n], or several labels, bools [n, labels]. Tokens without any targets get the tokens that follow.
    The same for test; and, if wanted, class_names: strings, the names of the classes, labels, values or tokens;
    train_groups and test_groups: integers or strings [n], which items are alike. Without names classes and labels are
    "0", "1", ...: classes up to the largest training label, each with an example.
    Other arrays are not read, but a name that is nearly one of these is refused. Raises InputError for anything else;
    pickled objects are never read.
    """
    if not file.is_file():
        raise InputError(f"'{file}' does not exist: give the path of an .npz file from the working directory")

    def decode() -> Task:
        contents = arrays(file, SPELLINGS)
        _require_whole_tokens_as_inputs(file, contents)
        is_text = all(targets.tokens(contents[f"{split} images"].array) for split in ("train", "test"))
        lacking = [split for split in ("train", "test") if f"{split} labels" not in contents]
        if lacking and (len(lacking) == 1 or not is_text):
            what = f"{lacking[0]} labels"
            raise InputError(f"'{file}' has no {what}: name an array {' or '.join(SPELLINGS[what])}")
        train, test = (
            ArrayExamples(
                _shaped(name, inputs, shape, resize),
                targets.next_tokens(inputs) if lacking else contents[f"{split} labels"].array,
                contents[f"{split} groups"].array if f"{split} groups" in contents else None,
            )
            for split in ("train", "test")
            for inputs in [contents[f"{split} images"].array]
        )
        raw = [contents[f"{split} images"].array for split in ("train", "test")]
        note = images.crop_note(sum(_cropped(array, shape, resize) for array in raw), len(train) + len(test), shape)
        names = contents["class names"].array if "class names" in contents else None
        if lacking:
            return checked(name, train, test, _names(name, names), note, kind="tokens")
        kind = _kind(name, train, test, {contents[f"{split} labels"].name for split in ("train", "test")})
        classes = _classes(name, train.targets, names) if kind == "classes" else _names(name, names)
        return checked(name, train, test, classes, note, kind=kind)

    return [file], decode


class Member(NamedTuple):
    """What an .npz file holds under one name."""

    name: str
    array: Any
    """An array, or {NAME: array} of those named train_inputs/NAME."""


def _kind(name: str, train: ArrayExamples, test: ArrayExamples, spellings: set[str]) -> str:
    """What the targets are: any kind as train_targets, but as train_labels or y_train classes or bools alone."""
    are_labels = all(part.targets.dtype == bool and part.targets.ndim == 2 for part in (train, test))
    if spellings <= {"train_targets", "test_targets"} or are_labels:
        return targets.kind(name, train, test)
    for word, part in (("train", train.targets), ("test", test.targets)):
        if part.dtype.kind == "f" and part.ndim == 1 and len(part):
            raise InputError(
                f"{name}: {word}: labels are {part.dtype}, row 0 is {part[0]!s}: give integers 0..classes-1, or name "
                f"them {word}_targets if they are values"
            )
    return "classes"


def _require_whole_tokens_as_inputs(file: Path, contents: Mapping[str, Member]) -> None:
    """Raise InputError for whole numbers that are called images or features: they may be pixels as well as tokens."""
    for split in ("train", "test"):
        member = contents[f"{split} images"]
        if targets.tokens(member.array) and member.name != f"{split}_inputs":
            raise InputError(
                f"'{file}': {split}: images are {member.array.dtype}: give uint8 pixels (0..255) or float features, or "
                f"name them {split}_inputs if they are tokens"
            )


def arrays(file: Path, wanted: Mapping[str, tuple[str, ...]]) -> dict[str, Member]:
    """{what: its name and array} of an .npz file for {what: names that its array may have}.

    A name that ends in "/" stands for all that begin with it, a dict. Labels, class names and groups may be missing.
    Raises InputError for a file that cannot be read, one that lacks an array or has it twice, and Python objects.
    """
    members: dict[str, Any] = npz.read(file, [spelling for names in wanted.values() for spelling in names], MEMBERS)
    for prefix in [spelling for names in wanted.values() for spelling in names if spelling.endswith("/")]:
        parts = {name: members[name] for name in members if name.startswith(prefix)}
        if parts:
            members[prefix] = {name.removeprefix(prefix): array for name, array in parts.items()}
            if "" in members[prefix]:
                raise InputError(f"'{file}' has an array '{prefix}' without a name: call it {prefix}NAME")
    contents = {}
    for what, spellings in wanted.items():
        present = [spelling for spelling in spellings if spelling in members]
        if len(present) > 1:
            raise InputError(f"'{file}' has both {' and '.join(present)}: keep one as the {what}")
        if not present and what not in _OPTIONAL:
            raise InputError(f"'{file}' has no {what}: name an array {' or '.join(spellings)}")
        if present:
            contents[what] = Member(present[0], members[present[0]])
    return contents


def _cropped(array: Any, shape: Shape | None, resize: str) -> int:
    """How many items of an input lose anything to the crop."""
    if isinstance(array, dict):
        return max((_cropped(part, shape, resize) for part in array.values()), default=0)
    is_image = array.dtype == np.uint8 and array.ndim in (3, 4)
    return len(array) if is_image and images.crops(array.shape[1:], shape, resize) else 0


def _shaped(name: str, array: Any, shape: Shape | None, resize: str) -> Any:
    """Images brought to a shape, if one is given. Raises InputError for features of another shape.

    Of several inputs those that are pixels are brought to it.
    """
    if not shape:
        return array
    if isinstance(array, dict):
        if not any(part.dtype == np.uint8 for part in array.values()):
            raise InputError(f"{name}: none of its inputs can become {list(shape)}{NO_PIXELS}")
        return {
            key: _shaped(name, part, shape, resize) if part.dtype == np.uint8 else part for key, part in array.items()
        }
    checks.require_channels_last(name, array)
    if array.dtype != np.uint8:
        if array.shape[1:] == shape:
            return array
        raise InputError(f"{name}: features {list(array.shape[1:])} cannot become {list(shape)}{NO_PIXELS}")
    return images.to_shape(array[..., None] if array.ndim == 3 else array, shape, resize)


def _names(name: str, names: np.ndarray | None) -> tuple[str, ...]:
    """The names of labels, values or tokens, or none. Raises InputError for what are no strings [n]."""
    return () if names is None else _classes(name, np.empty(0, int), names)


def _classes(name: str, labels: np.ndarray, names: np.ndarray | None) -> tuple[str, ...]:
    """The class names: `names`, or the numbers up to the largest label. Raises InputError if labels leave gaps."""
    if names is not None:
        if names.dtype.kind != "U" or names.ndim != 1:
            raise InputError(f"{name}: class_names is {names.dtype} {list(names.shape)}: give strings [classes]")
        return tuple(names.tolist())
    if labels.dtype.kind not in "iu" or not labels.size:
        return ()
    row = int(labels.argmax())
    largest = int(labels.flat[row])
    # A stray large label would make as many classes.
    if largest >= labels.size:
        raise InputError(
            f"{name}: row {row} of the {labels.size} train labels is {largest}: correct it, or give class_names"
        )
    present = np.unique(labels)
    if present[0] > 0 and len(present) == largest - present[0] + 1:
        raise InputError(
            f"{name}: train labels are {present[0]}..{largest}, and the first class is 0: subtract {present[0]} from "
            "all labels, or give class_names"
        )
    lacking = sorted(set(range(largest + 1)) - set(present.tolist()))
    if lacking and present[0] >= 0:
        raise InputError(
            f"{name}: train has no label {paths.some([str(label) for label in lacking])} of 0..{largest}: number the "
            "classes without gaps, or give class_names"
        )
    return tuple(str(c) for c in range(largest + 1))
