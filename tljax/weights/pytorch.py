"""PyTorch's files of tensors (.pth, .pt, .bin), read without PyTorch and without running what is in them.

`torch.save` writes a program for a stack machine, and Python's own reader calls whatever that names. The machine here
has the few opcodes that tensors, dicts, lists, texts and numbers need, and knows by name what may stand in them: the
storages and types of PyTorch, its functions that make a tensor of a storage, and ordered dicts. It calls none of them;
whatever else a file names, it refuses. Both forms are read: the archive that PyTorch has written since 1.6, whose
arrays are views of the mapped file, and the older sequence of programs and storages. Programs only convert such files
(`experiments.convert`); nothing trains from one.

The opcodes are those that Python documents in its module pickletools; a number of bytes follows each as it says there.
"""

import mmap
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tljax import paths
from tljax.types import InputError

SUFFIXES = (".pth", ".pt", ".bin")
"""How such files are called; what is in them says what they are."""
WHOLE = "."
"""The key of all that a file holds."""

_MAGIC = 0x1950A86A20F9469CFC6C
"""With which the older form begins."""
_MOST_OPCODES = 2_000_000
"""Of a state dict of 60,000 arrays; each may take a hundred bytes of memory."""
_MOST_DEPTH = 20
"""Dicts and lists within each other."""
_MOST_ENTRIES = 200_000
"""In all of them."""
_LONGEST_NAME = 500
"""Characters, with those of what it is in."""
_MOST_BYTES = 8
"""What all arrays may take on disk, as a multiple of the file: a storage may be in several arrays."""
_REMEDY = "save it again in PyTorch as `torch.save(model.state_dict(), FILE)`"


class _Name(NamedTuple):
    """What a file names, and never calls."""

    module: str
    name: str


@dataclass(frozen=True)
class _Storage:
    """Numbers that a file holds, or a part of them."""

    key: str
    dtype: np.dtype | None
    """None for bytes, of which each tensor says what they are."""
    length: int
    """Numbers, or bytes."""
    shift: int = 0
    """Where the part begins, in numbers."""


@dataclass(frozen=True)
class Tensor:
    """An array of a file, before it is looked at."""

    key: str
    """Of its storage."""
    dtype: np.dtype
    start: int
    """Its first number in the storage."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In numbers."""
    fault: str = ""
    """Why no array is made of it; the sentence's subject is its name."""


class Contents(NamedTuple):
    """What a file holds: dicts, lists and tuples of tensors, numbers and texts, and the bytes of its storages."""

    file: Path
    tree: Any
    storages: Mapping[str, np.ndarray]
    """{key of a storage: its bytes, uint8, views of the mapped file}."""


class State(NamedTuple):
    """The arrays of one dict in a file."""

    key: str
    """Where it is, such as 'model' or 'ema.state_dict'; '' for the whole."""
    arrays: dict[str, np.ndarray]
    """{name: array}; parts of nested names have a '.' between them."""
    others: tuple[str, ...]
    """The names of what is no array."""
    left: tuple[str, ...]
    """The names of what is beside the dict."""


_FLOATS = {"Double": np.float64, "Float": np.float32, "Half": np.float16, "BFloat16": ml_dtypes.bfloat16}
_INTEGERS = {"Long": np.int64, "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8, "Bool": np.bool_}
_COMPLEX = {"ComplexFloat": np.complex64, "ComplexDouble": np.complex128}
_STORAGES: dict[_Name, np.dtype | None] = {
    _Name(module, f"{name}Storage"): np.dtype(kind)
    for name, kind in {**_FLOATS, **_INTEGERS, **_COMPLEX}.items()
    for module in ("torch", "torch.cuda")
} | {_Name("torch.storage", "UntypedStorage"): None, _Name("torch", "UntypedStorage"): None}
_DTYPES: dict[_Name, np.dtype] = {
    _Name("torch", name): np.dtype(kind)
    for name, kind in {
        **{"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16},
        **{"int64": np.int64, "int32": np.int32, "int16": np.int16, "int8": np.int8, "bool": np.bool_},
        **{"uint64": np.uint64, "uint32": np.uint32, "uint16": np.uint16, "uint8": np.uint8},
        **{"complex64": np.complex64, "complex128": np.complex128},
        **{"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2},
    }.items()
}
_DICTS = {_Name("collections", "OrderedDict"), _Name("collections", "Counter")}
_SETS = {_Name(module, name) for module in ("builtins", "__builtin__") for name in ("set", "frozenset")}
_SIZE, _DEVICE, _ENCODE = _Name("torch", "Size"), _Name("torch", "device"), _Name("_codecs", "encode")
_OF_TYPE = _Name("torch._tensor", "_rebuild_from_type_v2")
_TENSOR = {_Name("torch._utils", f"_rebuild_{name}") for name in ("tensor", "tensor_v2", "tensor_v3")}
_PARAMETER = {_Name("torch._utils", f"_rebuild_{name}") for name in ("parameter", "parameter_with_state")}
_TYPES = {_Name("torch", "Tensor"), *(_Name("torch.nn.parameter", name) for name in ("Parameter", "Buffer"))}
_KNOWN = {*_STORAGES, *_DTYPES, *_DICTS, *_SETS, *_TENSOR, *_PARAMETER, *_TYPES, _SIZE, _DEVICE, _ENCODE, _OF_TYPE}


def load(file: Path) -> Contents:
    """What a file of PyTorch holds, in either form; arrays stay where they are until they are used.

    Raises InputError for a file that cannot be read, is damaged, holds code or is of another kind: nothing that it
    names is called.
    """
    file = Path(file)
    try:
        if not file.is_file():
            raise InputError(f"'{file}' does not exist, or is no file: give the path of a file of PyTorch")
        with file.open("rb") as stream:
            if not stream.read(1):
                raise ValueError("it is empty")
            raw = np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
            archive = bytes(raw[:4]) == b"PK\x03\x04"
            tree, storages = _read_archive(file, raw) if archive else _read_sequence(raw)
    except InputError:
        raise
    except _Refused as error:
        raise InputError(f"'{file}' {error}") from error
    except Exception as error:  # zipfile, struct and NumPy have no type in common for what is damaged
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"'{file}' cannot be read as a file of PyTorch ({reason}): {_REMEDY}") from error
    return Contents(file, tree, storages)


class _Refused(Exception):
    """What a file does that is not read; the sentence's subject is the file."""


# ---- The two forms


def _read_archive(file: Path, raw: np.ndarray) -> tuple[Any, dict[str, np.ndarray]]:
    """(tree, storages) of the form of PyTorch 1.6 and later."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    by_name = {member.filename: member for member in members}
    if len(by_name) < len(members):
        raise ValueError("it has two members of one name")
    programs = [name for name in by_name if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(programs) != 1:
        raise ValueError("it is an archive without a data.pkl")
    prefix = programs[0].removesuffix("data.pkl")
    if any(name == f"{prefix}constants.pkl" or name.startswith(f"{prefix}code/") for name in by_name):
        raise _Refused(f"holds code: it is a program of TorchScript, which is not read; {_REMEDY}")
    order = by_name.get(f"{prefix}byteorder")
    if order is not None and (text := bytes(_member(raw, order)[:10])) != b"little":
        raise _Refused(f"says that its byte order is {_shown(text)}, not little: save it on another machine")
    tree, _ = _Machine(_member(raw, by_name[programs[0]]), f" of {_shown(programs[0])}").run(0)
    keys = {tensor.key for tensor in _tensors(tree)}
    absent = [key for key in keys if f"{prefix}data/{key}" not in by_name]
    if absent:
        raise ValueError(f"it lacks the storage {_shown(absent[0])}")
    return tree, {key: _member(raw, by_name[f"{prefix}data/{key}"]) for key in keys}


_CHUNK = 1 << 24
"""Bytes that are summed at a time."""


def _member(raw: np.ndarray, member: zipfile.ZipInfo) -> np.ndarray:
    """The bytes of a member of an archive, a view of the mapped file. Raises ValueError where they cannot be its."""
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise ValueError(f"its member {_shown(member.filename)} is packed or encrypted, which PyTorch never does")
    head = bytes(raw[member.header_offset : member.header_offset + 30])
    if len(head) < 30 or head[:4] != b"PK\x03\x04":
        raise ValueError(f"its member {_shown(member.filename)} is not where its directory says")
    start = member.header_offset + 30 + sum(struct.unpack("<HH", head[26:]))
    data = raw[start : start + member.file_size]
    if len(data) < member.file_size:
        raise ValueError(f"its member {_shown(member.filename)} is cut short")
    total = 0
    for at in range(0, len(data), _CHUNK):
        total = zlib.crc32(data[at : at + _CHUNK].data, total)
    if total != member.CRC:
        raise ValueError(f"its member {_shown(member.filename)} is not as it was written: its checksum differs")
    return data


def _read_sequence(raw: np.ndarray) -> tuple[Any, dict[str, np.ndarray]]:
    """(tree, storages) of the form before PyTorch 1.6: a number, a version, the machine, the tree, then storages."""
    machine = _Machine(raw, "")
    if not len(raw) or raw[0] != _PROTO:
        raise ValueError("it begins as no file of PyTorch does")
    magic, at = machine.run(0)
    if type(magic) is not int or magic != _MAGIC:
        raise ValueError("it begins as no file of PyTorch does")
    version, at = machine.run(at)
    if version != 1001:
        raise ValueError("it is of an unknown version of its form")
    about, at = machine.run(at)
    if not isinstance(about, dict) or about.get("little_endian") is not True:
        raise _Refused("says that its byte order is not little: save it on another machine")
    tree, at = machine.run(at)
    keys, at = machine.run(at)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) < len(keys):
        raise ValueError("it does not list its storages")
    sizes = {storage.key: 1 if storage.dtype is None else storage.dtype.itemsize for storage in machine.storages}
    storages = {}
    for key in keys:
        head = bytes(raw[at : at + 8])
        if len(head) < 8 or key not in sizes:
            raise ValueError(f"its storage {_shown(key)} is cut short, or in no tensor")
        (length,) = struct.unpack("<q", head)
        if not 0 <= length * sizes[key] <= len(raw) - at - 8:
            raise ValueError(f"its storage {_shown(key)} is cut short")
        storages[key] = raw[at + 8 : at + 8 + length * sizes[key]]
        at += 8 + length * sizes[key]
    if absent := [tensor.key for tensor in _tensors(tree) if tensor.key not in storages]:
        raise ValueError(f"it lacks the storage {_shown(absent[0])}")
    return tree, storages


# ---- The machine

_PROTO = 0x80


class _Machine:
    """A stack machine of the opcodes that tensors need, over mapped bytes."""

    def __init__(self, raw: np.ndarray, where: str) -> None:
        self.raw, self.where = raw.data, where
        self.storages: list[_Storage] = []
        self.opcodes = 0

    def run(self, at: int) -> tuple[Any, int]:
        """(what the program that begins at a byte leaves, the byte after it). Raises ValueError where it is none."""
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}
        take = _Taker(self.raw, at)

        def since_mark() -> list[Any]:
            if not marks:
                raise ValueError("its stack has no mark")
            start = marks.pop()
            values = stack[start:]
            del stack[start:]
            return values

        def pop(count: int) -> list[Any]:
            if len(stack) - (marks[-1] if marks else 0) < count:
                raise ValueError("its stack is empty")
            values = stack[len(stack) - count :]
            del stack[len(stack) - count :]
            return values

        while True:
            here = take.at
            self.opcodes += 1
            if self.opcodes > _MOST_OPCODES:
                raise ValueError(f"it has more than {_MOST_OPCODES:,} opcodes")
            opcode = take(1)[0]
            if opcode == _PROTO:
                if not 2 <= (version := take(1)[0]) <= 5:
                    raise ValueError(f"it has protocol {version}, and PyTorch writes 2 to 5")
            elif opcode in _CONSTANTS:
                stack.append(_CONSTANTS[opcode])
            elif opcode in _NUMBERS:
                form = _NUMBERS[opcode]
                stack.append(struct.unpack(form, take(struct.calcsize(form)))[0])
            elif opcode in _TEXTS:
                form = _TEXTS[opcode]
                stack.append(take.text(struct.unpack(form, take(struct.calcsize(form)))[0]))
            elif opcode in _BYTES:
                form = _BYTES[opcode]
                stack.append(take(struct.unpack(form, take(struct.calcsize(form)))[0]))
            elif opcode in (0x8A, 0x8B):  # LONG1, LONG4
                length = take(1)[0] if opcode == 0x8A else struct.unpack("<i", take(4))[0]
                if not 0 <= length <= 64:
                    raise ValueError("it has a number of more than 64 bytes")
                stack.append(int.from_bytes(take(length), "little", signed=True))
            elif opcode == 0x28:  # MARK
                marks.append(len(stack))
            elif opcode in (0x5D, 0x8F):  # EMPTY_LIST, EMPTY_SET
                stack.append([])
            elif opcode == 0x7D:  # EMPTY_DICT
                stack.append({})
            elif opcode == 0x29:  # EMPTY_TUPLE
                stack.append(())
            elif opcode == 0x74:  # TUPLE
                stack.append(tuple(since_mark()))
            elif opcode in (0x85, 0x86, 0x87):  # TUPLE1, TUPLE2, TUPLE3
                stack.append(tuple(pop(opcode - 0x84)))
            elif opcode in (0x6C, 0x91):  # LIST, FROZENSET
                stack.append(since_mark())
            elif opcode == 0x64:  # DICT
                stack.append(_with_items({}, since_mark()))
            elif opcode in (0x61, 0x65, 0x90):  # APPEND, APPENDS, ADDITEMS
                values = pop(1) if opcode == 0x61 else since_mark()
                [target] = pop(1)
                if type(target) is not list:
                    raise ValueError("it appends to what is no list")
                target += values
                stack.append(target)
            elif opcode in (0x73, 0x75):  # SETITEM, SETITEMS
                items = pop(2) if opcode == 0x73 else since_mark()
                [target] = pop(1)
                if type(target) is not dict:
                    raise ValueError("it sets items of what is no dict")
                stack.append(_with_items(target, items))
            elif opcode in (0x71, 0x72):  # BINPUT, LONG_BINPUT
                key = take(1)[0] if opcode == 0x71 else struct.unpack("<I", take(4))[0]
                [memo[key]] = pop(1)
                stack.append(memo[key])
            elif opcode == 0x94:  # MEMOIZE
                [value] = pop(1)
                memo[len(memo)] = value
                stack.append(value)
            elif opcode in (0x68, 0x6A):  # BINGET, LONG_BINGET
                key = take(1)[0] if opcode == 0x68 else struct.unpack("<I", take(4))[0]
                if key not in memo:
                    raise ValueError("it refers to what it has not named")
                stack.append(memo[key])
            elif opcode == 0x95:  # FRAME
                take(8)
            elif opcode == 0x30:  # POP
                pop(1)
            elif opcode == 0x31:  # POP_MARK
                since_mark()
            elif opcode == 0x32:  # DUP
                [value] = pop(1)
                stack += [value, value]
            elif opcode in (0x63, 0x93):  # GLOBAL, STACK_GLOBAL
                module, name = (take.line(), take.line()) if opcode == 0x63 else pop(2)
                if type(module) is not str or type(name) is not str:
                    raise ValueError("it names what is no text")
                stack.append(self._known(_Name(module, name), here))
            elif opcode == 0x51:  # BINPERSID
                stack.append(self._storage(*pop(1)))
            elif opcode == 0x52:  # REDUCE
                stack.append(self._result(pop(2), here))
            elif opcode == 0x62:  # BUILD
                target, _ = pop(2)
                if type(target) is not dict:  # of an ordered dict it is _metadata
                    raise _Refused(f"holds code: at byte {here}{self.where} it changes an object; it is not read")
                stack.append(target)
            elif opcode == 0x2E:  # STOP
                [value] = pop(1)
                return value, take.at
            else:
                named = f", {_CALLS[opcode]}" if opcode in _CALLS else ""
                raise _Refused(
                    f"has the opcode 0x{opcode:02x}{named} at byte {here}{self.where}, which no tensor needs; it is "
                    f"not read: {_REMEDY}"
                )

    def _known(self, name: _Name, here: int) -> _Name:
        """The name, if it is one of those that tensors need."""
        if name not in _KNOWN:
            raise _Refused(
                f"holds code: it calls {_shown(name.module)}.{_shown(name.name)} at byte {here}{self.where}; it is not "
                f"read: {_REMEDY}"
            )
        return name

    def _storage(self, record: Any) -> _Storage:
        """The storage that a persistent id is of: (word, class, key, device, length), and in the older form a part."""
        if not isinstance(record, tuple) or len(record) not in (5, 6) or record[0] != "storage":
            raise ValueError("it refers to what is no storage")
        _, kind, key, _, length = record[:5]
        if not isinstance(kind, _Name) or kind not in _STORAGES or not isinstance(key, str) or not _is_count(length):
            raise ValueError("it has a storage of no known type")
        storage = _Storage(key, _STORAGES[kind], length)
        if len(record) == 6 and record[5] is not None:
            part = record[5]
            if not isinstance(part, tuple) or len(part) != 3 or not _is_count(part[1]) or not _is_count(part[2]):
                raise ValueError("it has a part of a storage that is none")
            storage = _Storage(key, storage.dtype, part[2], part[1])
        self.storages.append(storage)
        return storage

    def _result(self, call: Sequence[Any], here: int) -> Any:
        """What a call, (function, arguments), of a known function would give; no function is called."""
        function, arguments = call
        if not isinstance(function, _Name) or type(arguments) is not tuple:
            raise _Refused(f"holds code: at byte {here}{self.where} it calls what is no function; it is not read")
        self.opcodes += sum(len(part) for part in arguments if isinstance(part, list | tuple))  # each is copied
        if function in _DICTS and len(arguments) <= 1:
            return _as_dict(arguments[0] if arguments else [])
        if function in _SETS and len(arguments) == 1 and type(arguments[0]) is list:
            return arguments[0]
        if function in _TENSOR:
            return _tensor(function, arguments)
        if function in _PARAMETER and arguments and isinstance(arguments[0], Tensor):
            return arguments[0]
        made_by = arguments[0] if len(arguments) == 4 and isinstance(arguments[0], _Name) else None
        if function == _OF_TYPE and made_by in _TENSOR | _PARAMETER:  # (function, type, its arguments, attributes)
            return self._result((made_by, arguments[2]), here)
        if function == _SIZE and len(arguments) == 1 and type(arguments[0]) in (tuple, list):
            return tuple(arguments[0])
        if function == _DEVICE:
            return ()
        if function == _ENCODE and len(arguments) == 2 and isinstance(arguments[0], str) and arguments[1] == "latin1":
            return arguments[0]  # bytes, of which nothing is made
        raise _Refused(
            f"holds code: it calls {function.module}.{function.name} at byte {here}{self.where} as no tensor does; it "
            "is not read"
        )


class _Taker:
    """A place in bytes, which moves on as they are taken."""

    def __init__(self, raw: memoryview, at: int) -> None:
        self.raw, self.at = raw, at

    def __call__(self, length: int) -> bytes:
        """The next bytes. Raises ValueError where there are fewer."""
        if length > len(self.raw) - self.at:
            raise ValueError("it is cut short")
        self.at += length
        return bytes(self.raw[self.at - length : self.at])

    def text(self, length: int) -> str:
        """The next bytes as UTF-8."""
        return self(length).decode("utf-8", "surrogatepass")

    def line(self) -> str:
        """The next line."""
        start = self.at
        while self(1) != b"\n":
            if self.at - start > 1000:
                raise ValueError("it has a name of more than 1,000 bytes")
        return bytes(self.raw[start : self.at - 1]).decode("utf-8")


_CONSTANTS = {0x4E: None, 0x88: True, 0x89: False}  # NONE, NEWTRUE, NEWFALSE
_NUMBERS = {0x4A: "<i", 0x4B: "<B", 0x4D: "<H", 0x47: ">d"}  # BININT, BININT1, BININT2, BINFLOAT
_TEXTS = {0x58: "<I", 0x8C: "<B", 0x8D: "<Q"}  # BINUNICODE, SHORT_BINUNICODE, BINUNICODE8
_BYTES = {0x43: "<B", 0x42: "<I", 0x8E: "<Q", 0x96: "<Q"}  # SHORT_BINBYTES, BINBYTES, BINBYTES8, BYTEARRAY8
_CALLS = {
    **{0x69: "which makes an object", 0x6F: "which makes an object", 0x81: "which makes an object"},
    **{0x92: "which makes an object", 0x82: "which names a function", 0x83: "which names a function"},
    **{0x84: "which names a function", 0x50: "which names an object outside the file"},
}


def _with_items(target: dict[Any, Any], items: Sequence[Any]) -> dict[Any, Any]:
    """The dict itself, with keys and values of a list of them in turn. Raises ValueError for a key of another kind."""
    if len(items) % 2:
        raise ValueError("it has a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float | bytes | None):  # of deep tuples Python would not survive the hash
            raise ValueError("it has a key that is no text and no number")
        target[key] = value
    return target


def _as_dict(pairs: Any) -> dict[Any, Any]:
    """The dict of pairs, or of a dict."""
    if type(pairs) is dict:
        return pairs
    if type(pairs) is not list or not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError("it has a dict of what are no pairs")
    return _with_items({}, [part for pair in pairs for part in pair])


def _tensor(function: _Name, arguments: tuple[Any, ...]) -> Tensor:
    """The tensor that PyTorch would make of (storage, its first number, shape, strides, ...).

    One whose numbers are to be changed or repeated as they are read has a fault. Raises ValueError for one that is not
    within its storage.
    """
    if len(arguments) < 4 or not isinstance(storage := arguments[0], _Storage):
        raise ValueError("it has a tensor of no storage")
    start, shape, strides = arguments[1:4]
    plain = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= 32
    if not _is_count(start) or not plain or not all(map(_is_count, (*shape, *strides))):
        raise ValueError("it has a tensor of no shape")
    dtype, extra = storage.dtype, arguments[6:]
    if function.name == "_rebuild_tensor_v3":
        if not extra or not isinstance(extra[0], _Name) or extra[0] not in _DTYPES:
            raise ValueError("it has a tensor of an unknown type")
        dtype, extra = _DTYPES[extra[0]], extra[1:]
    if dtype is None:
        raise ValueError("it has a tensor of no type")
    fault = "is kept conjugated or negated: save it resolved" if extra and extra[0] else ""
    length = storage.length // (1 if storage.dtype is not None else dtype.itemsize)
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 not in shape and start + last >= length:
        raise ValueError("it has a tensor that is larger than its storage")
    size = 1
    for side in shape:
        size *= side
    if size > max(length, 1):
        fault = "has fewer numbers than its shape (expanded): save it contiguous"
    return Tensor(storage.key, dtype, storage.shift + start, shape, strides, fault)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _shown(text: str | bytes) -> str:
    """A text of a file for a message: printable, and not long."""
    text = text.decode("latin1") if isinstance(text, bytes) else text
    return "".join(letter if letter.isprintable() else "?" for letter in text[:80])


# ---- The dict of arrays


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if type(value) is dict:
        yield from ((str(key) if isinstance(key, str) else _number(key), child) for key, child in value.items())
    elif type(value) in (list, tuple):
        yield from ((str(number), child) for number, child in enumerate(value))


def _number(key: Any) -> str:
    """A key that is no text; a whole number has at most 64 bytes, which Python writes."""
    return _shown(key) if isinstance(key, bytes) else str(key)


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Each tensor of a tree, those of a part that it has twice once."""
    seen: set[int] = set()
    waiting = [tree]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif type(value) in (dict, list, tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if type(value) is dict else value


def dicts(contents: Contents) -> dict[str, int]:
    """{key of each dict that has tensors for values: how many}; '' is the whole.

    Keys within keys have a '.' between them.
    """
    places: dict[str, int] = {}
    seen: set[int] = set()
    waiting: list[tuple[str, Any, int]] = [("", contents.tree, 0)]
    while waiting:
        key, value, depth = waiting.pop(0)
        if type(value) is not dict or id(value) in seen or depth > _MOST_DEPTH:
            continue
        seen.add(id(value))
        if count := sum(isinstance(child, Tensor) for child in value.values()):
            places[key] = count
        waiting += [
            (_within(contents, key, name), child, depth + 1) for name, child in _children(value) if type(child) is dict
        ]
        if len(waiting) > _MOST_ENTRIES:
            raise InputError(f"'{contents.file}' holds more than {_MOST_ENTRIES:,} dicts: {_REMEDY}")
    return places


def _within(contents: Contents, name: str, part: str) -> str:
    """The name of a part of what has a name. Raises InputError for one that is too long."""
    if len(name) + len(part) > _LONGEST_NAME:
        raise InputError(f"'{contents.file}' has names of more than {_LONGEST_NAME} characters: {_REMEDY}")
    return f"{name}.{part}" if name else part


_USUAL = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights")
"""What checkpoints call the dict of a model's arrays."""
_AVERAGE = re.compile(r"(^|[._])ema")
"""In the names of averages."""
_ASIDE = ("optim", "sched", "scaler", "rng", "amp", "loss")
"""With which the names of what else they hold begin."""


def state(contents: Contents, key: str | None = None) -> State:
    """The arrays of the dict under `key`, or of the one that holds a model's arrays; `WHOLE` takes all there is.

    Without a key it is the one that is called as checkpoints call it (`model`, `state_dict`, ...), if there is no
    average of it; else the whole, if that has arrays for values; else the only dict that has, apart from those of an
    optimizer and the like. Raises InputError where there is none, or several, with their keys; for a name that two
    arrays have; and for a tensor that is not within its storage.
    """
    places = dicts(contents)
    if key is None:
        key = _model_key(contents, places)
    key = "" if key == WHOLE else key
    chosen = contents.tree
    for name in key.split(".") if key and key not in dict(_children(chosen)) else filter(None, [key]):
        below = dict(_children(chosen))
        if name not in below:
            raise InputError(
                f"`key={_shown(key)}` is not in '{contents.file}': dicts of arrays are {paths.some(list(places), 6)}"
            )
        chosen = below[name]
    left = _names_beside(contents.tree, key)
    arrays, others = _arrays(contents, chosen)
    if not arrays:
        raise InputError(f"`key={_shown(key)}` of '{contents.file}' holds no array: choose another")
    return State(key, arrays, tuple(others), tuple(left))


def _model_key(contents: Contents, places: Mapping[str, int]) -> str:
    """The key of the dict of a model's arrays. Raises InputError where there is none, or it is not clear which."""
    model = [place for place in places if place and not place.lower().startswith(_ASIDE)]
    usual = list(dict.fromkeys(place.partition(".")[0] for place in model if place.partition(".")[0] in _USUAL))
    if len(usual) == 1 and not any(_AVERAGE.search(place.lower()) for place in model):
        below = [place for place in model if place == usual[0] or place.startswith(f"{usual[0]}.")]
        return below[0] if len(below) == 1 else usual[0]
    if not usual and "" in places:
        return ""
    tops = [place for place in model or places if not any(place.startswith(f"{other}.") for other in model)]
    if not tops:
        raise InputError(f"'{contents.file}' holds no dict of arrays: {_REMEDY}")
    if len(tops) > 1:
        counted = [f"{place} ({places[place]:,} arrays)" for place in tops]
        raise InputError(
            f"'{contents.file}' holds several dicts of arrays, {paths.some(counted, 6)}: choose with `key=`, or "
            f"`key={WHOLE}` for all"
        )
    return tops[0]


def _names_beside(tree: Any, key: str) -> list[str]:
    """The names at the top that do not lead to a key."""
    return [_shown(name) for name, _ in _children(tree) if key and name != key and not key.startswith(f"{name}.")]


def _arrays(contents: Contents, tree: Any) -> tuple[dict[str, np.ndarray], list[str]]:
    """({name: array} of a tree, the names of what is no array)."""
    arrays: dict[str, np.ndarray] = {}
    others: list[str] = []
    size, most = 0, _MOST_BYTES * contents.file.stat().st_size
    waiting: list[tuple[str, Any, int]] = [("", tree, 0)]
    entries = 0
    while waiting:
        name, value, depth = waiting.pop()
        entries += 1
        if depth > _MOST_DEPTH or entries + len(waiting) > _MOST_ENTRIES:
            raise InputError(
                f"'{contents.file}' holds dicts more than {_MOST_DEPTH} deep, or {_MOST_ENTRIES:,} entries: {_REMEDY}"
            )
        if isinstance(value, Tensor):
            if name in arrays:
                raise InputError(f"'{contents.file}' has two arrays of the name '{_shown(name)}': {_REMEDY}")
            arrays[name] = _array(contents, name, value)
            size += arrays[name].nbytes
            if size > most:
                raise InputError(f"'{contents.file}' has arrays of {_MOST_BYTES} times its size: {_REMEDY}")
        elif type(value) in (dict, list, tuple) and value:
            below = [(_within(contents, name, part), child, depth + 1) for part, child in _children(value)]
            waiting += below[::-1]
        else:
            others.append(_shown(name))
    return arrays, others


def _array(contents: Contents, name: str, tensor: Tensor) -> np.ndarray:
    """The array of a tensor, a view of the mapped file. Raises InputError where it has a fault, or too few bytes."""
    if tensor.fault:
        raise InputError(f"'{contents.file}': '{_shown(name)}' {tensor.fault}")
    data = contents.storages[tensor.key]
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    size = tensor.dtype.itemsize
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, tensor.dtype)
    if len(data) % size or (tensor.start + last + 1) * size > len(data):
        raise InputError(f"'{contents.file}': '{_shown(name)}' is larger than its storage: it is damaged")
    numbers = data.view(tensor.dtype)[tensor.start :]
    strides = [stride * size for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(numbers, tensor.shape, strides, writeable=False)


if sys.byteorder != "little":  # the arrays of a file are viewed as they are
    raise ImportError("tljax.weights.pytorch needs a machine whose byte order is little")
