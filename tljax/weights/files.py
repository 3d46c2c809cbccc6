"""Files of named arrays: .safetensors, alone or as shards with an index, and .npz. What is pickled is never read.

A place is a file, a folder with the shards of a model and their index, or `hf:OWNER/NAME`, a model in this user's own
cache of huggingface_hub; nothing is downloaded. Each array is mapped when it is asked for and given up with what is
made of it, so that a file as large as the memory can be cast leaf by leaf.
"""

import json
import math
import os
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tljax import files, npz
from tljax.types import InputError

SUFFIXES = (".safetensors", ".npz")
INDEX = ".safetensors.index.json"
"""How the index of shards ends."""
HUB = "hf:"
"""With which a place in the cache of huggingface_hub begins."""
_USUAL = ("model.safetensors.index.json", "model.safetensors")
"""What a folder of Hugging Face calls a model's arrays."""
_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")
"""How the names of shards end."""

DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16},
        **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "BOOL": np.bool_},
        **{"U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "C64": np.complex64},
        **{"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2},
    }.items()
}
"""{type as safetensors call it: dtype}."""


# ---- Where the arrays are


def is_place(place: str | Path) -> bool:
    """Whether a text or path names weights from elsewhere: by its form, or as a folder that holds a model's arrays.

    >>> is_place("net.safetensors"), is_place("hf:google/vit-base-patch16-224"), is_place("runs/mnist_10k")
    (True, True, False)
    """
    name = str(place)
    if name.startswith(HUB) or name.endswith((*SUFFIXES, INDEX)):
        return True
    if "\0" in name or not Path(place).is_dir():
        return False
    return _in_folder(Path(place)) is not None or bool(_stray_shards(Path(place)))


def _stray_shards(folder: Path) -> list[str]:
    """The names of the shards in a folder, whether or not their index is there."""
    return sorted(file.name for file in folder.glob("*.safetensors") if _SHARD.search(file.name))


def _in_folder(folder: Path) -> Path | None:
    """The index or file of a folder that holds a model's arrays; None where it is none."""
    return next((folder / name for name in _USUAL if (folder / name).is_file()), None)


def located(place: str | Path) -> Path:
    """The file or index that a place is. Raises InputError where there is none, or huggingface_hub has not got it."""
    name = str(place)
    if name.startswith(HUB):
        return _in_hub(name)
    file = Path(place)
    if "\0" not in name and file.is_dir():
        within = _in_folder(file)
        if within is None:
            if indices := sorted(file.glob(f"*{INDEX}")):
                raise InputError(f"'{file}' has an index of shards by another name: give its path, '{indices[0]}'")
            if shards := _stray_shards(file):
                raise InputError(
                    f"'{file}' has shards, such as '{shards[0]}', but not their index {_USUAL[0]}: download it too"
                )
            raise InputError(f"'{file}' is a folder without {' or '.join(_USUAL)}: give the path of a file of weights")
        return within
    return file


def _in_hub(place: str) -> Path:
    """The file of `hf:OWNER/NAME`, `hf:OWNER/NAME@REVISION` or `hf:OWNER/NAME:FILE` in the cache of huggingface_hub."""
    rest, _, file = place.removeprefix(HUB).partition(":")
    repository, _, revision = rest.partition("@")
    if repository.count("/") != 1 or not all(repository.split("/")) or (":" in place[3:] and not file):
        raise InputError(f"'{place}': write hf:OWNER/NAME, hf:OWNER/NAME@REVISION or hf:OWNER/NAME:FILE")
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise InputError(
            f"'{place}' is read by huggingface_hub, which is not installed: python -m pip install 'tljax[hub]'"
        ) from error
    try:
        for name in [file] if file else _USUAL:
            path = try_to_load_from_cache(repository, name, revision=revision or None)
            if isinstance(path, str) and Path(path).is_file():
                return Path(path)
    except (HFValidationError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"'{place}' is no name of a model ({reason}): write hf:OWNER/NAME") from error
    wanted = f"'{file}'" if file else " or ".join(f"'{name}'" for name in _USUAL)
    in_revision = f" of the revision '{revision}'" if revision else ""
    other = "" if file else "name its file, as hf:OWNER/NAME:FILE, or "
    at_revision = f" with `revision={revision}`" if revision else ""
    raise InputError(
        f"'{place}': the cache of huggingface_hub has no {wanted} of it{in_revision}, and nothing is downloaded here: "
        f"{other}run `hf download {repository}`{at_revision} first"
    )


# ---- What is in them


class _Entry(NamedTuple):
    """An array of a file, before it is read."""

    file: Path
    dtype: np.dtype | None
    """None for a type that NumPy lacks."""
    shape: tuple[int, ...]
    start: int
    """Its first byte in the file."""
    order: str = "C"
    kind: str = ""
    """The type as the file calls it."""
    member: zipfile.ZipInfo | None = None
    """What an archive says of it: its checksum is that of its head and its numbers."""


class Arrays(Mapping[str, np.ndarray]):
    """{name: array, read only} of files, each mapped anew when it is asked for.

    Raises InputError, for an array when it is asked for, if it is of a type that NumPy lacks or is damaged.
    """

    def __init__(self, entries: Mapping[str, _Entry]) -> None:
        self._entries = entries
        self._summed: set[str] = set()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        if entry.dtype is None:
            raise InputError(
                f"'{entry.file}' holds '{name}' as {entry.kind}, a type that NumPy has not: save it as float32"
            )
        if entry.member is not None and name not in self._summed:
            _require_sum(entry.file, name, entry.member)
            self._summed.add(name)
        if 0 in entry.shape:
            return np.zeros(entry.shape, entry.dtype)
        try:
            order: Any = entry.order
            return np.asarray(np.memmap(entry.file, entry.dtype, "r", entry.start, entry.shape, order))
        except (OSError, ValueError) as error:
            raise InputError(f"'{entry.file}': '{name}' cannot be mapped ({error}): copy it again") from error


def read(place: str | Path) -> Mapping[str, np.ndarray]:
    """{name: array} of a file, an index of shards, a folder of them or `hf:OWNER/NAME`, as they are stored.

    Arrays that are not packed stay on the disk until they are asked for. Raises InputError for a file that is missing,
    of another kind, damaged, or holds pickled objects; for a shard that is missing; and for an array that is in two
    shards, or not where the index says.
    """
    file = located(place)
    if file.suffix not in SUFFIXES and not file.name.endswith(INDEX):
        raise InputError(f"'{file}' is no {' or '.join(SUFFIXES)} file: convert it with experiments.convert")
    if not file.is_file():
        raise InputError(f"'{file}' does not exist: give the path of a {file.suffix} file")
    if file.name.endswith(INDEX):
        return Arrays(_shards_entries(file))
    return Arrays(_safetensors_entries(file)) if file.suffix == ".safetensors" else _npz_arrays(file)


def _safetensors_entries(file: Path) -> dict[str, _Entry]:
    """{name: entry} of a .safetensors file, whose head the library has held against the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):  # refuses a damaged head, and numbers that overlap or are cut short
            pass
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            head = json.loads(stream.read(length))
        return {
            name: _Entry(
                file,
                DTYPES.get(about["dtype"]),
                tuple(about["shape"]),
                8 + length + about["data_offsets"][0],
                kind=about["dtype"],
            )
            for name, about in head.items()
            if name != "__metadata__"
        }
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, struct.error, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        is_of_other_type = "unknown variant" in reason  # a type that the library has not
        remedy = "save it again, as float32" if is_of_other_type else "it is damaged, so download or copy it again"
        raise InputError(f"'{file}' cannot be read as safetensors ({reason}): {remedy}") from error


def _shards_entries(index: Path) -> dict[str, _Entry]:
    """{name: entry} of the shards that an index names."""
    try:
        weight_map = json.loads(files.text(index))["weight_map"]
        is_plain = all(isinstance(name, str) and isinstance(shard, str) for name, shard in weight_map.items())
        if not weight_map or not is_plain:
            raise ValueError("its weight_map is none")
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"'{index}' is no index of shards ({reason}): download it again") from error
    entries: dict[str, _Entry] = {}
    for shard in dict.fromkeys(weight_map.values()):
        if Path(shard).name != shard or not shard.endswith(".safetensors") or "\0" in shard:
            raise InputError(f"'{index}' names the shard {shard[:80]!r}, which is no .safetensors file beside it")
        if not (index.parent / shard).is_file():
            raise InputError(f"the shard '{shard}' of '{index}' is missing: download it again")
        for name, entry in _safetensors_entries(index.parent / shard).items():
            if name not in weight_map:
                raise InputError(f"'{name}' of the shard '{shard}' is not in the index '{index}': download both again")
            if name in entries:
                both = f"'{entries[name].file.name}' and '{shard}'"
                raise InputError(f"'{name}' is in two shards of '{index}', {both}: download them again")
            entries[name] = entry
    for name, shard in weight_map.items():
        if name not in entries or entries[name].file.name != shard:
            raise InputError(f"'{name}' is not in the shard '{shard}', where the index '{index}' has it")
    return {name: entries[name] for name in weight_map}


def _npz_arrays(file: Path) -> Mapping[str, np.ndarray]:
    """{name: array} of an .npz file: mapped where all of it is stored as it is, else read."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 for member in members):
            return npz.read(file)
        with warnings.catch_warnings(action="ignore"):  # the parser warns about a damaged head
            entries = {member.filename.removesuffix(".npy"): _member_entry(file, member) for member in members}
        if len(entries) == len(members):
            return Arrays(entries)
    except Exception:  # those of NumPy and zipfile have no type in common; below it is said what is wrong
        return npz.read(file)
    return npz.read(file)


def _member_entry(file: Path, member: zipfile.ZipInfo) -> _Entry:
    """The entry of a stored member of an .npz file. Raises ValueError for what is no array of numbers."""
    with file.open("rb") as stream:
        stream.seek(member.header_offset)
        head = stream.read(30)
        begin = member.header_offset + 30 + sum(struct.unpack("<HH", head[26:]))
        stream.seek(begin)
        version = np.lib.format.read_magic(stream)
        if not member.filename.endswith(".npy") or version not in ((1, 0), (2, 0)):
            raise ValueError("no array")
        read_head = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read_head(stream)
        start = stream.tell()
    size = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or not dtype.isnative or min(shape, default=0) < 0 or start + size != begin + member.file_size:
        raise ValueError("no plain array")
    return _Entry(file, dtype, shape, start, "F" if is_fortran else "C", str(dtype), member)


_CHUNK = 1 << 24
"""Bytes that are summed at a time."""


def _require_sum(file: Path, name: str, member: zipfile.ZipInfo) -> None:
    """Raise InputError unless a stored member of an archive has the checksum that its directory says."""
    total = 0
    with file.open("rb") as stream:
        stream.seek(member.header_offset + 26)
        stream.seek(member.header_offset + 30 + sum(struct.unpack("<HH", stream.read(4))))
        left = member.file_size
        while left and (chunk := stream.read(min(left, _CHUNK))):
            total, left = zlib.crc32(chunk, total), left - len(chunk)
    if left or total != member.CRC:
        raise InputError(f"'{file}' cannot be read as .npz (Bad CRC-32 of '{name}'): save it again with numpy.savez")


# ---- Written


def write(file: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays as a .safetensors file, whole or not at all; each goes from where it is to the disk, without a copy
    if it is contiguous.

    Raises InputError for an array of a type that safetensors lack, or of a name that no file can give back, and OSError
    where the file cannot be written, or is not what was to be written when it is read again.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    for name, array in arrays.items():
        if name == "__metadata__" or not name.strip(".") or not name.isprintable():
            raise InputError(f"array {name[:80]!r} has a name that a .safetensors file cannot give back: rename it")
        if array.dtype not in DTYPES.values():
            raise InputError(f"array '{name}' is of {array.dtype}, which safetensors lack: leave it out, or cast it")
    new = files.partial(Path(file))
    try:
        try:
            ordered = {name: np.asarray(array, order="C") for name, array in arrays.items()}
            save_file(ordered, new, dict(metadata) if metadata else None)
        except SafetensorError as error:
            raise OSError(" ".join(str(error).split())[:200]) from error
        heads = {name: (entry.dtype, entry.shape) for name, entry in _safetensors_entries(new).items()}
        if heads != {name: (array.dtype, array.shape) for name, array in ordered.items()}:
            raise OSError(f"'{file}' does not hold the arrays that were written into it")
        with new.open("rb") as written:
            os.fchmod(written.fileno(), 0o644)  # safetensors make it readable by its owner alone
            os.fsync(written.fileno())
        os.replace(new, file)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
