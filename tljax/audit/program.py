"""What a traced program does to each element: an abstract interpreter of jaxprs.

A variable's abstract value is a product of three facts about each of its elements: *which* element of which input it
is, or which constant; *how surely* it is that (a grade); and on *what it depends*, a set of labels. Elements of one
variable may differ in these facts, as they do under a constant mask: a value is a few pieces, and a selector that says
which piece each element belongs to. Nothing is computed with numbers but what is constant and exact.

Facts are weakened, never guessed: an operation that this file does not know gives values that depend on all of its
inputs and are nothing known. A value that is 0 depends on nothing, so `0 * x` cuts a dependence, if `x` is finite.
Loops are read until nothing changes (Kildall 1973, "A unified approach to global program optimization").
"""

import itertools
import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import source_info_util
from jax.extend import core

from tljax.train.memory import carried_operands, inner_programs

IDENTICAL, EQUAL, EQUAL_IF_FINITE = 0, 1, 2
"""Grades of a fact, as `report.GRADES` has them."""

UNKNOWN, CONSTANT = -2, -1
"""A piece's content that is no symbol."""

MOST_PIECES = 100
"""The pieces that a value may have: with more, what differs between them is given up."""
MOST_ELEMENTS = 1 << 26
"""The elements of a value, at most, for which a selector or an array of places is kept."""


class Label(NamedTuple):
    """Labels that a value gets where it is read, as bits."""

    depends: int
    where: np.ndarray | None = None
    """The elements that get other labels, if the value has this shape; of another shape, it gets both."""
    there: int = 0


Labels = Mapping[tuple[int, ...], Label]
"""The labels to add where values are read. A place is as `cotangents.Read` has it: pairs (number of an equation, number
of the program within it) from the outside in, then (number of the equation, number of its operand), or (-1, number of
the result)."""


class Guard(NamedTuple):
    """What is known of elements by numbers that the program computes, such as a norm, which have a number each here."""

    number: int = 0
    """That each of the elements is; 0 if none is known."""
    answer: tuple[int, bool] | None = None
    """Of bools: (number, what the elements are where that is 0)."""
    zero_unless: frozenset[int] = frozenset()
    """Elements are 0, if what is multiplied by 0 is finite, unless one of these numbers is 0; empty if none is known.
    `where(norm < 1, g, g / norm)` is 0 if `g` is."""


class Piece(NamedTuple):
    """What is known of some elements of a value."""

    content: int
    """The number of the symbol whose elements these are (an input, or an array of constants), CONSTANT or UNKNOWN."""
    places: np.ndarray | None = None
    """For each element of the value, its place in the symbol, flat; None for all of them in order."""
    constant: Any = None
    """The number that each element is, a NumPy scalar."""
    grade: int = IDENTICAL
    depends: int = 0
    """The labels that the elements depend on, a bit each."""
    condition: frozenset[str] = frozenset()
    """What the content assumes, as "'mask/a' is False". Dependence assumes nothing."""
    equation: Any = None
    """Where content is unknown: the equation that computed the elements."""
    bounds: tuple[float, float] | None = None
    """The least and the greatest number that the elements may be, none of them NaN; None if nothing is known."""
    least: float | None = None
    """The least number that the elements may be if they are not NaN, where no bounds are known."""
    guard: Guard | None = None
    scaled: int | None = None
    """The symbol whose elements, in their places, these are but for a constant factor."""


class Value(NamedTuple):
    """What is known of a variable."""

    pieces: tuple[Piece, ...]
    selector: np.ndarray | None = None
    """For each element, the number of its piece; None if there is one piece."""

    @property
    def depends(self) -> int:
        """The labels that any element depends on."""
        bits = 0
        for piece in self.pieces:
            bits |= piece.depends
        return bits


class Symbol(NamedTuple):
    """What elements can be elements of: an input, an array of constants, or what a loop or a shard gives its body."""

    shape: tuple[int, ...]
    dtype: Any
    data: Any = None
    """The numbers, of an array of constants."""
    name: str = ""


class Stop(Exception):
    """The program has a construct that cannot be read: what it says is a line."""


class Reading(NamedTuple):
    """What was read of a program."""

    outputs: tuple[Value, ...]
    notes: tuple[str, ...]
    meetings: tuple[tuple[int, Any], ...]
    """(labels, equation) where values with different watched labels first met in one."""


def read(
    closed: Any,
    inputs: Sequence[Value],
    *,
    names: Sequence[str] = (),
    labels: Labels | None = None,
    watched: int = 0,
    cut: Collection[str] = (),
) -> Reading:
    """Interpret a closed jaxpr on abstract values: input number i is symbol number i (see `whole`).

    `watched` are the labels, such as those of gradients, of which unknown elements of one value are told apart; they do
    not pass primitives in `cut`. Raises Stop if the program holds a mutable reference, which is no value.

    >>> closed = jax.make_jaxpr(lambda a, b: (a + 0.0, a + b, b.T.T))(1.0, np.ones((2, 3), np.float32))
    >>> outputs = read(closed, [whole(0, 1), whole(1, 2)]).outputs
    >>> [(value.pieces[0].content, value.pieces[0].grade, value.depends) for value in outputs]
    [(0, 1, 1), (-2, 0, 3), (1, 0, 2)]
    """
    symbols = [
        Symbol(tuple(var.aval.shape), var.aval.dtype, None, names[number] if names else "")
        for number, var in enumerate(closed.jaxpr.invars)
    ]
    reader = _Reader(symbols, labels or {}, watched, cut)
    outputs = reader.program(closed.jaxpr, closed.consts, list(inputs), ())
    return Reading(tuple(map(reader.settled, outputs)), tuple(dict.fromkeys(reader.notes)), tuple(reader.meetings))


def whole(symbol: int, depends: int) -> Value:
    """The value of an input that is symbol number `symbol`."""
    return Value((Piece(symbol, depends=depends),))


def zeros(value: Value, where: np.ndarray | bool, dtype: Any, grade: int = EQUAL) -> Value:
    """A value that is 0, of either sign, at the elements that `where` chooses."""
    zero = Piece(CONSTANT, constant=np.zeros((), dtype)[()], grade=grade)
    if isinstance(where, bool):
        return Value((zero,)) if where else value
    count = len(value.pieces)
    selector = np.zeros(where.shape, np.uint8) if value.selector is None else value.selector
    return tidy((*value.pieces, zero), np.where(where, np.uint8(count), selector), 0)


def parts(symbol: int, where: np.ndarray, depends: tuple[int, int]) -> Value:
    """The value of an input with labels of two kinds: those elsewhere, and those where `where` is True."""
    return Value(tuple(Piece(symbol, depends=bits) for bits in depends), where.astype(np.uint8))


def in_order(piece: Piece, where: np.ndarray | None = None) -> bool:
    """Whether a piece's elements are those of its symbol in the same places (at the elements that `where` chooses)."""
    if piece.places is None:
        return True
    straight = np.arange(piece.places.size).reshape(piece.places.shape)
    return bool(np.array_equal(piece.places, straight) if where is None else (piece.places == straight)[where].all())


def is_zero(piece: Piece) -> bool:
    """Whether the elements are 0."""
    return piece.content == CONSTANT and not isinstance(piece.constant, jax.Array) and bool(piece.constant == 0)


def line_of(equation: Any) -> str | None:
    """The line of the user's source that an equation comes from, as `loop.py:12 (update)`; None if there is none.

    The frames of jax, optax, flax, equinox and tljax are passed by.
    """
    traceback = getattr(getattr(equation, "source_info", None), "traceback", None)
    if traceback is None:
        return None
    for frame in source_info_util.user_frames(traceback):
        file = frame.file_name.replace("\\", "/")
        if is_library(file):
            continue
        name = frame.function_name.rpartition(".<locals>.")[2]
        return f"{file.rpartition('/')[2]}:{frame.start_line} ({name})"
    return None


def is_library(file: str) -> bool:
    """Whether a file of Python source, with slashes, is of a library that users call, and not their own."""
    return file.startswith("<frozen") or any(f"/{package}/" in file for package in _LIBRARIES)


_LIBRARIES = (
    *(f"site-packages/{name}" for name in ("jax", "jaxlib", "optax", "flax", "equinox", "chex", "haiku", "orbax")),
    *(f"tljax/{name}" for name in ("audit", "train", "masks", "models")),
)


def tidy(pieces: Sequence[Piece], selector: np.ndarray | None, watched: int) -> Value:
    """The value with equal pieces made one; unknown ones are equal if they depend on the same watched labels."""
    if selector is None or len(pieces) == 1:
        return Value((pieces[0],))
    if not any(piece.content != UNKNOWN or piece.depends & watched for piece in pieces):
        return Value((_unlike(pieces),))
    merged: list[Piece] = []
    numbers: list[int] = []
    for piece in pieces:
        number = next((i for i, other in enumerate(merged) if _alike(piece, other, watched)), len(merged))
        if number == len(merged):
            merged.append(piece)
        elif merged[number] is not piece:
            known = merged[number]
            bounds = known.bounds if known.bounds == piece.bounds else None
            least = _lowest((known, piece)) if bounds is None else None
            guard = known.guard if known.guard == piece.guard else None
            merged[number] = known._replace(
                depends=known.depends | piece.depends,
                bounds=bounds,
                least=least,
                guard=guard,
                scaled=known.scaled if known.scaled == piece.scaled else None,
            )
        numbers.append(number)
    if len(merged) == 1:
        return Value((merged[0],))
    if len(merged) > MOST_PIECES:
        return Value((_unlike(merged),))
    if len(merged) < len(pieces):
        selector = np.asarray(numbers, np.uint8)[selector]
    return Value(tuple(merged), selector)


def _unwatched(value: Value, watched: int) -> Value:
    """The value without the labels that are watched."""
    return Value(tuple(piece._replace(depends=piece.depends & ~watched) for piece in value.pieces), value.selector)


def _alike(a: Piece, b: Piece, watched: int) -> bool:
    if a is b:
        return True
    if a.content != b.content or a.grade != b.grade or a.condition != b.condition:
        return False
    if a.content == UNKNOWN:
        return (a.depends ^ b.depends) & watched == 0
    if a.content == CONSTANT:
        return _same_number(a.constant, b.constant)
    return a.depends == b.depends and _same_places(a.places, b.places)


def bounded(value: Value, least: float, greatest: float) -> Value:
    """A value whose elements are taken to be between two numbers."""
    return Value(tuple(piece._replace(bounds=(least, greatest)) for piece in value.pieces), value.selector)


def extent(value: Value) -> tuple[float, float] | None:
    """The least and the greatest number that elements of a value may be; None if nothing is known."""
    return _hull(value.pieces)


def _unlike(pieces: Iterable[Piece], extra: int = 0) -> Piece:
    """An unknown piece that depends on all that the pieces depend on."""
    equation = None
    for piece in pieces:
        extra |= piece.depends
        equation = equation or piece.equation
    return Piece(UNKNOWN, depends=extra, equation=equation)


def _same_number(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, np.generic) and a.tobytes() == b.tobytes())


def _same_places(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    if a is b:
        return True
    if a is None or b is None:
        array: Any = b if a is None else a
        return in_order(Piece(0, array))
    return a.shape == b.shape and bool(np.array_equal(a, b))


def _count(jaxpr: Any) -> int:
    """The number of equations of a program, with those of programs within."""
    return sum(1 + sum(map(_count, inner_programs(equation))) for equation in jaxpr.eqns)


def _size(shape: Sequence[int]) -> int:
    return math.prod(shape)


class _Reader:
    """Reads one program; what it holds grows as it reads."""

    def __init__(self, symbols: list[Symbol], labels: Labels, watched: int, cut: Collection[str] = ()) -> None:
        self.symbols = symbols
        self.labels = labels
        self.watched = watched
        self.cut = cut
        self.notes: list[str] = []
        self.meetings: list[tuple[int, Any]] = []
        self.constants: dict[int, int] = {}
        self.guards = itertools.count(1)
        self.unrolled = 20_000
        """The equations that may still be read for loops that are read turn by turn."""
        self.most = min(MOST_ELEMENTS, max([1 << 20, *(_size(symbol.shape) for symbol in symbols)]))
        self._straight = np.arange(0, dtype=np.int32)

    # Programs and equations.

    def program(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Value], path: tuple[int, ...]) -> list[Value]:
        """The values of the outputs of a jaxpr."""
        known: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        known |= {
            var: const if isinstance(const, Value) else self.constant(const)
            for var, const in zip(jaxpr.constvars, consts, strict=True)
        }

        def values_of(atoms: Sequence[Any], number: int) -> list[Value]:
            values = [self.constant(atom.val) if isinstance(atom, core.Literal) else known[atom] for atom in atoms]
            if self.labels:
                for index, value in enumerate(values):
                    label = self.labels.get((*path, number, index))
                    if label is not None:
                        values[index] = self.labelled(value, label, atoms[index].aval.shape)
            return values

        for number, equation in enumerate(jaxpr.eqns):
            values = values_of(equation.invars, number)
            if equation.primitive.name in self.cut:
                values = [_unwatched(value, self.watched) for value in values]
            results = self.equation(equation, values, (*path, number))
            for piece in (piece for result in results for piece in result.pieces) if self.watched else ():
                self.meet(equation, [each.depends for value in values for each in value.pieces], piece.depends)
            known.update(zip(equation.outvars, results, strict=True))
        return values_of(jaxpr.outvars, -1)

    def labelled(self, value: Value, label: Label, shape: Sequence[int]) -> Value:
        """The value with more labels; what is known to be 0 depends on nothing."""
        tags = Value((Piece(UNKNOWN, depends=label.depends | label.there),))
        if label.where is not None and label.where.shape == tuple(shape):
            kinds = tuple(Piece(UNKNOWN, depends=bits) for bits in (label.depends, label.there))
            tags = Value(kinds, label.where.astype(np.uint8))
        return self.combined([value, tags], shape, _tagged)

    def equation(self, equation: Any, values: list[Value], path: tuple[int, ...]) -> list[Value]:
        """The values of an equation's outputs."""
        name = equation.primitive.name
        for atom in (*equation.invars, *equation.outvars):
            if not hasattr(atom.aval, "dtype") or type(atom.aval).__name__ == "AbstractRef":
                raise Stop(f"'{name}' works on a mutable reference, which cannot be read")
        if name in THROUGH:
            return values[: len(equation.outvars)]
        rule = _RULES.get(name)
        if rule is not None:
            results = rule(self, equation, values, path)
            return results if name in _SAME_MOMENT else [_unguarded(result) for result in results]
        if name in CALLS:
            called = next((equation.params[key] for key in _BODIES if key in equation.params), None)
            if called is not None:
                body, consts = (called.jaxpr, called.consts) if hasattr(called, "jaxpr") else (called, ())
                if len(body.invars) == len(values):
                    return self.program(body, consts, values, (*path, 0))
        if any(word in name for word in _OUTSIDE):
            where = line_of(equation)
            self.notes.append(f"'{name}' is not entered{f' at {where}' if where else ''}: what it gives is not known")
        return self.unknown(equation, values)

    def unknown(self, equation: Any, values: Sequence[Value], extra: int = 0) -> list[Value]:
        """Outputs of which nothing is known but what they depend on."""
        pieces = [piece for value in values for piece in value.pieces]
        piece = _unlike(pieces, extra)._replace(equation=equation)
        result = Value((self.numbered(piece, equation),))
        self.meet(equation, [piece.depends for piece in pieces], result.depends)
        return [result] * len(equation.outvars)

    def numbered(self, piece: Piece, equation: Any) -> Piece:
        """What an equation computes, with a number of its own where it is a single one."""
        output = equation.outvars[0].aval if len(equation.outvars) == 1 else None
        if output is None or output.shape or not _float(output.dtype):
            return piece
        return piece._replace(guard=Guard(next(self.guards)))

    def meet(self, equation: Any, depends: Sequence[int], result: int) -> None:
        """Note where watched labels first meet."""
        bits = result & self.watched
        if bits & (bits - 1) and not any(labels & self.watched == bits for labels in depends):
            self.meetings.append((bits, equation))

    # Constants.

    def constant(self, number: Any) -> Value:
        """The value of a literal, or of an array that the program holds."""
        if isinstance(number, jax.Array) and jax.dtypes.issubdtype(number.dtype, jax.dtypes.extended):
            return Value((Piece(UNKNOWN),))
        if np.ndim(number) == 0:
            return Value((Piece(CONSTANT, constant=np.asarray(number)[()]),))
        symbol = self.constants.get(id(number))
        if symbol is None:
            symbol = self.constants[id(number)] = len(self.symbols)
            self.symbols.append(Symbol(np.shape(number), number.dtype, number))
        return Value((Piece(symbol),))

    def numbers(self, value: Value, shape: Sequence[int], dtype: Any) -> np.ndarray | None:
        """The array that a value is, if all of its elements are constants for sure."""
        if _size(shape) > self.most:
            return None
        for piece in value.pieces:
            constant = piece.content == CONSTANT or (
                piece.content >= 0 and self.symbols[piece.content].data is not None
            )
            if not constant or piece.grade != IDENTICAL or piece.condition:
                return None
        arrays = [self._numbers(piece, tuple(shape)) for piece in value.pieces]
        if value.selector is None:
            return arrays[0]
        return np.choose(value.selector, arrays) if len(arrays) <= 32 else None

    def _numbers(self, piece: Piece, shape: tuple[int, ...]) -> np.ndarray:
        if piece.content == CONSTANT:
            return np.broadcast_to(np.asarray(piece.constant), shape)
        data = np.asarray(self.symbols[piece.content].data)
        return data.reshape(shape) if piece.places is None else data.reshape(-1)[piece.places]

    def from_numbers(self, array: np.ndarray) -> Value:
        """The value that an array of constants is."""
        if array.ndim == 0:
            return Value((Piece(CONSTANT, constant=array[()]),))
        if array.size and not any(array.strides):
            return Value((Piece(CONSTANT, constant=array.reshape(-1)[0]),))
        self.symbols.append(Symbol(array.shape, array.dtype, array))
        return Value((Piece(len(self.symbols) - 1),))

    def classes(self, value: Value, shape: Sequence[int]) -> Value:
        """The value with arrays of constants as pieces: elements that are 0, that are 1, and others."""
        if not any(piece.content >= 0 and self.symbols[piece.content].data is not None for piece in value.pieces):
            return value
        if _size(shape) > self.most:
            return Value((_unlike(value.pieces),))
        pieces: list[Piece] = []
        selector = np.zeros(tuple(shape), np.uint8)
        for number, piece in enumerate(value.pieces):
            here = True if value.selector is None else value.selector == number
            if piece.content < 0 or self.symbols[piece.content].data is None:
                selector[here] = len(pieces)
                pieces.append(piece)
                continue
            array = self._numbers(piece, tuple(shape))
            for constant in (np.zeros((), array.dtype)[()], np.ones((), array.dtype)[()]):
                selector[here & (array == constant)] = len(pieces)
                # An array may have zeros of both signs.
                grade = max(piece.grade, _float(array.dtype) and constant == 0)
                pieces.append(Piece(CONSTANT, constant=constant, grade=int(grade), condition=piece.condition))
            selector[here & (array != 0) & (array != 1)] = len(pieces)
            pieces.append(Piece(UNKNOWN, bounds=_extent(array)))
            if len(pieces) > 200:
                return Value((_unlike(value.pieces),))
        present = np.bincount(selector.reshape(-1), minlength=len(pieces)) > 0
        kept = np.flatnonzero(present)
        renumbered = np.zeros(len(pieces), np.uint8)
        renumbered[kept] = np.arange(len(kept))
        return tidy([pieces[i] for i in kept], renumbered[selector], self.watched)

    # Elements.

    def elementwise(
        self, equation: Any, values: Sequence[Value], function: Callable[..., Piece], shape: Sequence[int] | None = None
    ) -> Value:
        """The value whose elements follow from those of `values` in the same places; numbers stand for all elements."""
        shape = equation.outvars[0].aval.shape if shape is None else shape
        spread = [
            self.spread(value, atom.aval.shape, shape) for value, atom in zip(values, equation.invars, strict=True)
        ]
        return self.combined(spread, shape, function)

    def spread(self, value: Value, shape: Sequence[int], wanted: Sequence[int]) -> Value:
        """A value as an operand: a number stands for all elements of the array beside it, as an axis of 1 does."""
        value = self.classes(value, shape)
        if tuple(shape) == tuple(wanted):
            return value
        if _size(shape) > self.most:
            return Value((_unlike(value.pieces),))
        pieces = []
        for piece in value.pieces:
            if piece.content >= 0:
                places = self.straight(shape) if piece.places is None else piece.places
                piece = piece._replace(places=np.broadcast_to(places, tuple(wanted)))
            pieces.append(piece)
        selector = None if value.selector is None else np.broadcast_to(value.selector, tuple(wanted))
        return Value(tuple(pieces), selector)

    def combined(self, values: Sequence[Value], shape: Sequence[int], function: Callable[..., Piece]) -> Value:
        """Apply a function of pieces to each combination of pieces that occurs."""
        if all(value.selector is None for value in values):
            return Value((function(*(value.pieces[0] for value in values)),))
        if _size(shape) > self.most:
            return Value((function(*(_unlike(value.pieces) for value in values)),))
        selectors = [value for value in values if value.selector is not None]
        if len(selectors) > 1 and all(value.selector is selectors[0].selector for value in selectors):
            count = len(selectors[0].pieces)
            selector: Any = selectors[0].selector
            rows = [[value.pieces[i if value.selector is not None else 0] for value in values] for i in range(count)]
            return tidy([function(*row) for row in rows], selector, self.watched)
        code: Any = np.zeros((), np.int32)
        for value in values:
            if value.selector is not None:
                code = code * len(value.pieces) + value.selector.astype(np.int32)
        total = math.prod(len(value.pieces) for value in values)
        present = np.flatnonzero(np.bincount(code.reshape(-1), minlength=total))
        if len(present) > 250:
            return Value((function(*(_unlike(value.pieces) for value in values)),))
        pieces = []
        for combination in present:
            row, rest = [], int(combination)
            for value in reversed(values):
                rest, number = divmod(rest, len(value.pieces))
                row.append(value.pieces[number])
            pieces.append(function(*reversed(row)))
        renumbered = np.zeros(total, np.uint8)
        renumbered[present] = np.arange(len(present))
        return tidy(pieces, renumbered[code], self.watched)

    def joined(self, values: Sequence[Value], shape: Sequence[int], extra: int = 0, equation: Any = None) -> Value:
        """The value that is any of several, as a branch decides that depends on the labels `extra`."""
        if all(value is values[0] for value in values):
            return values[0]
        return self.combined(
            [self.classes(value, shape) for value in values],
            shape,
            lambda *pieces: _either(pieces, extra, equation),
        )

    def settled(self, value: Value) -> Value:
        """A value without what stands for constants only inside the reader."""
        pieces = tuple(
            Piece(UNKNOWN) if piece.content >= 0 and self.symbols[piece.content].data is not None else piece
            for piece in value.pieces
        )
        return Value(pieces, value.selector)

    # Movement.

    def moved(
        self,
        value: Value,
        shapes: tuple[Sequence[int], Sequence[int]],
        move: Callable[[np.ndarray], np.ndarray],
        *,
        keeps_order: bool = False,
    ) -> Value:
        """The value after its elements were put elsewhere, repeated or left out, by a function of arrays."""
        if value.selector is None and (value.pieces[0].content < 0 or (keeps_order and value.pieces[0].places is None)):
            return value
        before, after = shapes
        if max(_size(before), _size(after)) > self.most:
            return Value((_unlike(value.pieces),))
        pieces = []
        for piece in value.pieces:
            if piece.content < 0 or (keeps_order and piece.places is None):
                pieces.append(piece)
                continue
            places = self.straight(before) if piece.places is None else piece.places
            places = move(places)
            pieces.append(piece._replace(places=None if self.is_straight(places, piece.content) else places))
        selector = None if value.selector is None else move(value.selector)
        if selector is not None and len(pieces) > 1:
            present = np.bincount(selector.reshape(-1), minlength=len(pieces)) > 0
            if not present.all():
                renumbered = np.cumsum(present) - 1
                selector = renumbered.astype(np.uint8)[selector]
                pieces = [piece for piece, kept in zip(pieces, present, strict=True) if kept] or pieces[:1]
        return tidy(pieces, selector, self.watched)

    def is_whole(self, piece: Piece) -> bool:
        """Whether a piece's elements are all of its symbol's in order."""
        size = _size(self.symbols[piece.content].shape)
        return piece.places is None or (piece.places.size == size and in_order(piece))

    def may_unroll(self, length: int, body: Any, outputs: Sequence[Any]) -> bool:
        """Whether a loop is so short that it is read turn by turn."""
        if not 0 < length <= 16 or any(_size(var.aval.shape) > self.most for var in outputs):
            return False
        equations = length * _count(body)
        if equations > min(self.unrolled, 1000):
            return False
        self.unrolled -= equations
        return True

    def straight(self, shape: Sequence[int]) -> np.ndarray:
        """The places of elements in order, as a view of an array that all share."""
        size = _size(shape)
        if len(self._straight) < size:
            self._straight = np.arange(size, dtype=np.int32)
        return self._straight[:size].reshape(tuple(shape))

    def is_straight(self, places: np.ndarray, symbol: int) -> bool:
        """Whether places are all of a symbol's in order, as is quickly seen of a view."""
        if places.size != _size(self.symbols[symbol].shape):
            return False
        start = self._straight.__array_interface__["data"][0]
        return places.__array_interface__["data"][0] == start and bool(places.flags.c_contiguous)


def _either(pieces: Sequence[Piece], extra: int, equation: Any) -> Piece:
    """What is known of an element that is one of several."""
    first = pieces[0]
    condition = frozenset().union(*(piece.condition for piece in pieces))
    grade = max(piece.grade for piece in pieces)
    depends = 0
    for piece in pieces:
        depends |= piece.depends
    if first.content >= 0 and all(
        piece.content == first.content and _same_places(piece.places, first.places) for piece in pieces[1:]
    ):
        return first._replace(grade=grade, depends=depends, condition=condition)
    if all(piece.content == CONSTANT for piece in pieces):
        depends = depends | extra if condition else 0
        if all(_same_number(piece.constant, first.constant) for piece in pieces):
            return first._replace(grade=grade, condition=condition, depends=depends)
        if all(map(is_zero, pieces)):
            return first._replace(grade=max(grade, EQUAL), condition=condition, depends=depends)
    source = next((piece.equation for piece in pieces if piece.equation is not None), equation)
    bounds = _hull(pieces)
    least = _lowest(pieces) if bounds is None else None
    return Piece(UNKNOWN, depends=depends | extra, equation=source, bounds=bounds, least=least)


def _hull(pieces: Sequence[Piece]) -> tuple[float, float] | None:
    """The bounds of an element that is one of several."""
    bounds = [_bounds(piece, None) for piece in pieces]
    known = [pair for pair in bounds if pair is not None]
    if len(known) < len(bounds):
        return None
    return min(pair[0] for pair in known), max(pair[1] for pair in known)


def _extent(array: np.ndarray) -> tuple[float, float] | None:
    """The least and the greatest number of an array; None if one is not finite."""
    if not array.size or array.dtype.kind == "c":
        return None
    least, greatest = float(array.min()), float(array.max())
    return (least, greatest) if math.isfinite(least) and math.isfinite(greatest) else None


def _tagged(piece: Piece, tag: Piece) -> Piece:
    if piece.content == CONSTANT and not piece.condition:
        return piece
    return piece._replace(depends=piece.depends | tag.depends)


def _float(dtype: Any) -> bool:
    return bool(jax.dtypes.issubdtype(dtype, np.inexact))


def _number(dtype: Any) -> bool:
    return not jax.dtypes.issubdtype(dtype, jax.dtypes.extended)


# Arithmetic: what follows for an element from the pieces of its operands.


def _computed(reader: _Reader, equation: Any, pieces: Sequence[Piece]) -> Piece:
    """An element of which nothing is known but what it depends on."""
    depends = 0
    for piece in pieces:
        depends |= piece.depends
    if reader.watched and depends & reader.watched:
        reader.meet(equation, [piece.depends for piece in pieces], depends)
    bounds = _computed_bounds(equation, pieces)
    if bounds is not None and bounds[0] == bounds[1] and equation.outvars[0].aval.dtype == np.bool_:
        return Piece(CONSTANT, constant=np.bool_(bounds[0]))
    least = _computed_least(equation, pieces) if bounds is None else None
    scaled = _scaled(equation.primitive.name, pieces)
    piece = Piece(UNKNOWN, depends=depends, equation=equation, bounds=bounds, least=least, scaled=scaled)
    answer = _answer(equation, pieces)
    return reader.numbered(piece, equation) if answer is None else piece._replace(guard=answer)


def _scaled(name: str, pieces: Sequence[Piece]) -> int | None:
    """The symbol that an element is a constant multiple of, if the operands show it."""
    symbols = [piece.content if piece.content >= 0 and piece.places is None else piece.scaled for piece in pieces]
    constant = [not piece.depends and piece.content < 0 for piece in pieces]
    if name in ("neg", "convert_element_type"):
        return symbols[0]
    if name in ("add", "add_any", "sub"):
        return symbols[0] if symbols[0] == symbols[1] else None
    if name == "mul" or (name == "div" and constant[1]):
        return symbols[0] if constant[1] else symbols[1] if constant[0] else None
    return None


def _computed_from(reader: _Reader, equation: Any, *pieces: Piece) -> Piece:
    return _computed(reader, equation, pieces)


def _weaker(piece: Piece, *others: Piece, grade: int = IDENTICAL) -> Piece:
    """A piece whose content holds as surely as that of all; if it is conditional, it depends on all."""
    depends, condition = piece.depends, piece.condition
    for other in others:
        grade = max(grade, other.grade)
        condition |= other.condition
    if condition:
        for other in others:
            depends |= other.depends
    return piece._replace(grade=max(grade, piece.grade), depends=depends, condition=condition)


def _folded(name: str, pieces: Sequence[Piece], parameters: Mapping[str, Any], dtype: Any) -> Piece | None:
    """The constant that an operation gives of constants, if it is exact."""
    if not all(piece.content == CONSTANT for piece in pieces):
        return None
    number = _exact(name, [np.asarray(piece.constant) for piece in pieces], parameters, dtype)
    if number is None:
        return None
    grade = max(piece.grade for piece in pieces)
    if grade and any(is_zero(piece) and piece.grade for piece in pieces) and name in ("div", "sign", "atan2"):
        # The sign of a zero decides what these give.
        divisor = pieces[-1]
        if name != "div" or is_zero(divisor):
            return None
    if grade == EQUAL and not _float(
        dtype
    ):  # neither a zero's sign nor a NaN's payload shows in bools and whole numbers
        grade = IDENTICAL
    return _weaker(Piece(CONSTANT, constant=number[()], grade=grade), *pieces)._replace(grade=grade)


_NUMPY: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "add_any": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
    "neg": np.negative,
    "abs": np.abs,
    "sign": np.sign,
    "square": np.square,
    "floor": np.floor,
    "ceil": np.ceil,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "is_finite": np.isfinite,
}
_BITS: dict[str, Callable[..., Any]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.bitwise_not,
}


def _exact(name: str, arrays: Sequence[np.ndarray], parameters: Mapping[str, Any], dtype: Any) -> np.ndarray | None:
    """The array that an elementwise operation gives of arrays, if no rounding can change it under any compiler."""
    if not all(_number(array.dtype) for array in arrays) or not _number(dtype):
        return None
    kinds = {array.dtype.kind for array in arrays}
    with np.errstate(all="ignore"):
        if name == "convert_element_type":
            return _converted(arrays[0], dtype)
        if name == "select_n":
            which, *cases = arrays
            cases = [np.broadcast_to(case, np.broadcast_shapes(which.shape, case.shape)) for case in cases]
            return np.where(which.astype(bool), cases[1], cases[0]) if len(cases) == 2 else None
        if name == "integer_pow":
            y = parameters["y"]
            return _exact("mul", [arrays[0], arrays[0]], {}, dtype) if y == 2 else arrays[0] if y == 1 else None
        if name == "clamp":
            least, array, most = (a.astype(np.float64) for a in arrays)
            return np.minimum(np.maximum(array, least), most).astype(dtype) if not np.isnan(array).any() else None
        if name in _BITS:
            return _BITS[name](*arrays)
        if name not in _NUMPY or "c" in kinds:
            return None
        if kinds <= {"b", "i", "u"}:
            if name == "div" or (kinds == {"b"} and name in ("sub", "neg", "add", "mul", "square", "sign")):
                return None
            return np.asarray(_NUMPY[name](*arrays)).astype(dtype)
        wide = [array.astype(np.float64) for array in arrays]
        result = np.asarray(_NUMPY[name](*wide))
        if result.dtype == np.bool_:
            return result
        narrow = result.astype(dtype)
        if name in ("max", "min", "neg", "abs", "sign", "floor", "ceil"):
            return narrow if not np.isnan(result).any() else None
        small = np.float64(1 << 24)  # products and sums of such whole numbers are exact in float64 too
        if any(array.dtype.itemsize == 8 for array in arrays) and not all(
            (np.abs(array) <= small).all() and (array == np.floor(array)).all() for array in wide
        ):
            return None
        return narrow if np.array_equal(narrow.astype(np.float64), result) else None


def _converted(array: np.ndarray, dtype: Any) -> np.ndarray | None:
    if np.dtype(dtype) == np.bool_:
        return array != 0
    result = array.astype(dtype)
    same = result.astype(array.dtype) if array.dtype != np.bool_ else result != 0
    return result if np.array_equal(same, array) else None


def _add(reader: _Reader, equation: Any, a: Piece, b: Piece) -> Piece:
    floats = _float(equation.outvars[0].aval.dtype)
    for term, zero in ((a, b), (b, a)):
        if is_zero(zero) and not is_zero(term):
            return _unchanged(reader, equation, term, zero, EQUAL if floats else IDENTICAL)
    if is_zero(a) and is_zero(b):
        return _weaker(a, b, grade=EQUAL)
    return _computed(reader, equation, (a, b))


def _unchanged(reader: _Reader, equation: Any, piece: Piece, neutral: Piece, grade: int) -> Piece:
    """A piece after an operation whose other operand leaves it as it is, as surely as that is neutral."""
    if piece.content != UNKNOWN:
        return _weaker(piece, neutral, grade=grade)
    return _computed(reader, equation, (piece, neutral)) if neutral.condition else piece


def _switch(reader: _Reader, piece: Piece) -> str:
    """The name of the input of bools that elements are, whatever their dtype is by now; '' if they are none."""
    if piece.content < 0 or piece.grade > EQUAL:
        return ""
    symbol = reader.symbols[piece.content]
    return symbol.name if symbol.dtype == np.bool_ else ""


def _sub(reader: _Reader, equation: Any, a: Piece, b: Piece) -> Piece:
    floats = _float(equation.outvars[0].aval.dtype)
    if is_zero(b) and not is_zero(a):
        return _unchanged(reader, equation, a, b, EQUAL if floats else IDENTICAL)
    if is_zero(a) and is_zero(b):
        return _weaker(a, b, grade=EQUAL)
    if a.content >= 0 and a.content == b.content and _same_places(a.places, b.places):
        zero = Piece(CONSTANT, constant=np.zeros((), equation.outvars[0].aval.dtype)[()])
        return _weaker(zero, a, b, grade=EQUAL_IF_FINITE if floats else IDENTICAL)
    return _computed(reader, equation, (a, b))


def _mul(reader: _Reader, equation: Any, a: Piece, b: Piece) -> Piece:
    floats = _float(equation.outvars[0].aval.dtype)
    for zero, factor in ((a, b), (b, a)):
        if is_zero(zero):
            finite = not floats or _bounds(factor, None) is not None
            grade = EQUAL if finite and floats else IDENTICAL if finite else EQUAL_IF_FINITE
            if factor.content == CONSTANT:
                return _weaker(zero, factor, grade=grade)
            return _weaker(zero, _unlike([factor]), grade=grade)
    for unit, factor in ((a, b), (b, a)):
        if unit.content == CONSTANT and unit.constant == 1:
            return _unchanged(reader, equation, factor, unit, EQUAL if floats else IDENTICAL)
    for mask, factor in ((a, b), (b, a)):
        name = _switch(reader, mask)
        if name:
            zero = Piece(CONSTANT, constant=np.zeros((), equation.outvars[0].aval.dtype)[()], grade=EQUAL_IF_FINITE)
            zero = zero._replace(condition=frozenset((f"'{name}' is False",)) | factor.condition | mask.condition)
            return zero._replace(depends=a.depends | b.depends)
    spared = _zero_unless(a) | _zero_unless(b)
    computed = _computed(reader, equation, (a, b))
    return computed._replace(guard=Guard(zero_unless=spared)) if spared else computed


def _div(reader: _Reader, equation: Any, a: Piece, b: Piece) -> Piece:
    floats = _float(equation.outvars[0].aval.dtype)
    if (is_zero(a) or _zero_unless(a)) and floats:
        return _zero_over(reader, equation, a, b)
    if b.content == CONSTANT and b.constant == 1:
        return _unchanged(reader, equation, a, b, EQUAL if floats else IDENTICAL)
    return _computed(reader, equation, (a, b))


def _zero_over(reader: _Reader, equation: Any, a: Piece, b: Piece) -> Piece:
    """A quotient whose dividend is 0: it is 0 only where the divisor is not, since 0 / 0 is NaN."""
    tiny = float(jax.numpy.finfo(equation.invars[1].aval.dtype).tiny)  # what is smaller may be flushed to 0
    bounds, least = _bounds(b, None), _least(b, None)
    if bounds is not None and (bounds[0] >= tiny or bounds[1] <= -tiny):
        grade = EQUAL
    elif least is not None and least >= tiny:
        grade = EQUAL_IF_FINITE
    else:
        computed = _computed(reader, equation, (a, b))
        if b.guard is None or not b.guard.number or a.condition:
            return computed
        return computed._replace(guard=Guard(zero_unless=_zero_unless(a) | {b.guard.number}))
    if not is_zero(a):
        return _computed(reader, equation, (a, b))._replace(guard=a.guard)
    return _weaker(a, b if b.content == CONSTANT else _unlike([b]), grade=grade)


def _zero_unless(piece: Piece) -> frozenset[int]:
    """The numbers one of which is 0 where elements are not; empty if nothing is known."""
    return frozenset() if piece.guard is None else piece.guard.zero_unless


def _answer(equation: Any, pieces: Sequence[Piece]) -> Guard | None:
    """What a comparison says where a number of the program is 0."""
    name = equation.primitive.name
    if name == "not" and equation.outvars[0].aval.dtype == np.bool_:
        known = None if pieces[0].guard is None else pieces[0].guard.answer
        return None if known is None else Guard(answer=(known[0], not known[1]))
    if name not in _COMPARISONS:
        return None
    numbers = _number(equation.invars[0].aval.dtype)
    for number, piece in enumerate(pieces):
        other = pieces[1 - number]
        sure = other.content == CONSTANT and other.grade == IDENTICAL and not other.condition
        if numbers and sure and piece.guard is not None and piece.guard.number:
            sides = [other.constant, other.constant]
            sides[number] = np.zeros((), np.asarray(other.constant).dtype)[()]
            return Guard(answer=(piece.guard.number, bool(_NUMPY[name](*sides))))
    return None


def _pow(reader: _Reader, equation: Any, a: Piece, b: Piece) -> Piece:
    if is_zero(a) and b.content == CONSTANT and b.grade == IDENTICAL and b.constant > 0:
        return _weaker(a, b, grade=EQUAL)
    if b.content == CONSTANT and b.grade == IDENTICAL and b.constant == 1 and a.content >= 0:
        return _weaker(a, b, grade=EQUAL_IF_FINITE)
    return _computed(reader, equation, (a, b))


def _and(reader: _Reader, equation: Any, a: Piece, b: Piece) -> Piece:
    bools = equation.outvars[0].aval.dtype == np.bool_
    for known, other in ((a, b), (b, a)):
        if is_zero(known) and known.grade == IDENTICAL:
            return _weaker(known, _unlike([other]))
        if bools and known.content == CONSTANT and known.grade == IDENTICAL and known.constant:
            return _unchanged(reader, equation, other, known, IDENTICAL)
    return _computed(reader, equation, (a, b))


def _or(reader: _Reader, equation: Any, a: Piece, b: Piece) -> Piece:
    bools = equation.outvars[0].aval.dtype == np.bool_
    for known, other in ((a, b), (b, a)):
        if is_zero(known) and known.grade == IDENTICAL:
            return _unchanged(reader, equation, other, known, IDENTICAL)
        if bools and known.content == CONSTANT and known.grade == IDENTICAL and known.constant:
            return _weaker(known, _unlike([other]))
    return _computed(reader, equation, (a, b))


def _integer_pow(reader: _Reader, equation: Any, a: Piece) -> Piece:
    y = equation.params["y"]
    if y == 1 and a.content != UNKNOWN:
        return _weaker(a, grade=EQUAL if _float(equation.outvars[0].aval.dtype) else IDENTICAL)
    if y > 0 and is_zero(a):
        return _weaker(a, grade=EQUAL)
    return _computed(reader, equation, (a,))


def _keeps_zero(reader: _Reader, equation: Any, *pieces: Piece) -> Piece:
    if all(map(is_zero, pieces)):
        zero = pieces[0]
        dtype = equation.outvars[0].aval.dtype
        return _weaker(zero, *pieces[1:], grade=EQUAL)._replace(constant=np.zeros((), dtype)[()])
    return _computed(reader, equation, pieces)


_ARITHMETIC: dict[str, Callable[..., Piece]] = {
    "add": _add,
    "add_any": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "and": _and,
    "or": _or,
    "integer_pow": _integer_pow,
    "pow": _pow,
    **dict.fromkeys(
        (
            *("neg", "abs", "sign", "square", "sqrt", "cbrt", "max", "min", "real", "imag", "conj", "tanh", "sin"),
            *("tan", "asin", "atan", "sinh", "asinh", "expm1", "log1p", "erf", "floor", "ceil", "round"),
        ),
        _keeps_zero,
    ),
    **dict.fromkeys(
        (
            *("clamp", "rem", "rsqrt", "exp", "exp2", "log", "logistic", "cos", "acos", "cosh", "acosh", "atanh"),
            *("atan2", "erfc", "erf_inv", "nextafter", "is_finite", "not", "xor", "eq", "ne", "lt", "le", "gt", "ge"),
            *("shift_left", "shift_right_logical", "shift_right_arithmetic", "lgamma", "digamma"),
        ),
        _computed_from,
    ),
}


def _arithmetic(reader: _Reader, equation: Any, values: list[Value], path: tuple[int, ...]) -> list[Value]:
    name, output = equation.primitive.name, equation.outvars[0].aval
    rule = _ARITHMETIC[name]
    folded = _fold(reader, equation, values)
    if folded is not None:
        return [folded]

    def function(*pieces: Piece) -> Piece:
        constant = _folded(name, pieces, equation.params, output.dtype)
        return rule(reader, equation, *pieces) if constant is None else constant

    return [reader.elementwise(equation, values, function)]


def _fold(reader: _Reader, equation: Any, values: Sequence[Value]) -> Value | None:
    """The value of an elementwise operation on arrays of constants."""
    if not any(
        piece.content >= 0 and reader.symbols[piece.content].data is not None for v in values for piece in v.pieces
    ):
        return None
    output = equation.outvars[0].aval
    arrays = []
    for value, atom in zip(values, equation.invars, strict=True):
        array = reader.numbers(value, atom.aval.shape, atom.aval.dtype)
        if array is None:
            return None
        arrays.append(array)
    result = _exact(equation.primitive.name, arrays, equation.params, output.dtype)
    return None if result is None else reader.from_numbers(np.broadcast_to(result, output.shape))


def _convert(reader: _Reader, equation: Any, values: list[Value], path: tuple[int, ...]) -> list[Value]:
    """Casts: what loses nothing of the element's own dtype keeps it."""
    source, output = equation.invars[0].aval.dtype, equation.outvars[0].aval.dtype
    if source == output:
        return values
    folded = _fold(reader, equation, values)
    if folded is not None:
        return [folded]

    def function(piece: Piece) -> Piece:
        if piece.content >= 0 and _holds(output, reader.symbols[piece.content].dtype):
            floats = _float(output) and _float(source)
            return _weaker(piece, grade=EQUAL if floats else IDENTICAL)
        constant = _folded("convert_element_type", (piece,), {}, output)
        if constant is not None:
            return constant
        if is_zero(piece) and _number(output):
            return _keeps_zero(reader, equation, piece)
        computed = _computed(reader, equation, (piece,))
        if piece.guard is None or not (_float(source) and _float(output)):
            return computed
        small = jax.numpy.finfo(output).tiny <= jax.numpy.finfo(source).tiny  # no number but 0 becomes 0
        return computed._replace(guard=piece.guard) if small or piece.guard.zero_unless else computed

    return [reader.elementwise(equation, values, function)]


def _holds(wide: Any, narrow: Any) -> bool:
    """Whether a dtype has every number of another."""
    if wide == narrow:
        return True
    if not (_number(wide) and _number(narrow)) or wide == np.bool_:
        return False
    if narrow == np.bool_:
        return True
    if jax.dtypes.issubdtype(narrow, np.integer):
        bits = jax.numpy.iinfo(narrow).bits - (1 if jax.dtypes.issubdtype(narrow, np.signedinteger) else 0)
        if jax.dtypes.issubdtype(wide, np.integer):
            signed = jax.dtypes.issubdtype(wide, np.signedinteger)
            return (signed or jax.dtypes.issubdtype(narrow, np.unsignedinteger)) and (
                jax.numpy.iinfo(wide).bits - int(signed) >= bits
            )
        return bool(jax.dtypes.issubdtype(wide, np.floating)) and bool(jax.numpy.finfo(wide).nmant + 1 >= bits)
    if not (jax.dtypes.issubdtype(narrow, np.floating) and jax.dtypes.issubdtype(wide, np.floating)):
        return False
    w, n = jax.numpy.finfo(wide), jax.numpy.finfo(narrow)
    return bool(w.nmant >= n.nmant and w.maxexp >= n.maxexp and w.minexp <= n.minexp - n.nmant) or (
        bool(w.nmant >= n.nmant and w.maxexp >= n.maxexp and w.minexp == n.minexp)
    )


def _select(reader: _Reader, equation: Any, values: list[Value], path: tuple[int, ...]) -> list[Value]:
    """`where`: each element is that of the case which the constant mask names, or one of all cases."""
    folded = _fold(reader, equation, values)
    if folded is not None:
        return [folded]

    def function(which: Piece, *cases: Piece) -> Piece:
        if which.content == CONSTANT and (which.grade == IDENTICAL or cases[int(which.constant)].content != UNKNOWN):
            return _weaker(cases[int(which.constant)], which)
        return _chosen(reader, equation, which, cases)

    return [reader.elementwise(equation, values, function)]


def _chosen(reader: _Reader, equation: Any, which: Piece, cases: Sequence[Piece]) -> Piece:
    """An element that is one of several, as a traced mask says; or the first of two, if an input of bools is False."""
    known = None if which.guard is None else which.guard.answer
    if known is not None and len(cases) == 2:
        cases = [_taken(case, known, bool(number), equation) for number, case in enumerate(cases)]
    either = _either(cases, which.depends, equation)
    if either.content != UNKNOWN:
        return either
    name = _switch(reader, which)
    for number, case in enumerate(cases):
        if name and len(cases) == 2 and case.content != UNKNOWN:
            condition = case.condition | which.condition | {f"'{name}' is {bool(number)}"}
            return case._replace(depends=either.depends, condition=condition)
    reader.meet(equation, [which.depends, *(case.depends for case in cases)], either.depends)
    return either if either.equation is not None else either._replace(equation=equation)


def _taken(case: Piece, known: tuple[int, bool], answer: bool, equation: Any) -> Piece:
    """A case of a choice that is taken for one answer alone, where the answer at a number's 0 is known."""
    number, at_zero = known
    if at_zero == answer or _zero_unless(case) != {number}:
        return case
    zero = np.zeros((), equation.outvars[0].aval.dtype)[()]
    return Piece(CONSTANT, constant=zero, grade=EQUAL_IF_FINITE)


def _reduced(reader: _Reader, equation: Any, values: list[Value], path: tuple[int, ...]) -> list[Value]:
    """Sums and products of what is all 0 are 0."""
    name = equation.primitive.name
    pieces = reader.classes(values[0], equation.invars[0].aval.shape).pieces if len(values) == 1 else ()
    output = equation.outvars[0].aval
    some = equation.invars[0].aval.size > 0 or name not in ("reduce_max", "reduce_min")  # else they give an infinity
    if name in _ZERO_OF_ZERO and pieces and some and all(map(is_zero, pieces)):
        zero = _weaker(pieces[0], *pieces[1:], grade=EQUAL)._replace(constant=np.zeros((), output.dtype)[()])
        return [Value((zero,))]
    if name in _ZERO_OF_ANY and len(values) >= 2:
        for value in values[:2]:
            if all(map(is_zero, value.pieces)):
                zero = Piece(CONSTANT, constant=np.zeros((), output.dtype)[()])
                others = [_unlike(other.pieces) for other in values]
                return [Value((_weaker(zero, *value.pieces, *others, grade=EQUAL_IF_FINITE),))]
    results = reader.unknown(equation, values)
    least = _lowest(pieces) if name in _NO_LOWER and some and pieces else None
    if least is None or (least < 0 and name not in ("reduce_max", "reduce_min", "pmax", "pmin")):
        return results
    least = least if name in ("reduce_max", "reduce_min", "pmax", "pmin") else 0.0
    return [Value((result.pieces[0]._replace(least=least),)) for result in results]


_NO_LOWER = ("reduce_sum", "reduce_max", "reduce_min", "cumsum", "psum", "psum_invariant", "pmax", "pmin")
"""What gives no number below all of its operand's, if none of them is negative."""


_ZERO_OF_ZERO = (
    "reduce_sum",
    "reduce_max",
    "reduce_min",
    "cumsum",
    "cumprod",
    "psum",
    "psum_invariant",
    "pmax",
    "pmin",
)
_ZERO_OF_ANY = ("dot_general", "conv_general_dilated")


# Bounds: between which numbers a computed number is.

_Pair = tuple[float, float]


def _bounds(piece: Piece, dtype: Any) -> _Pair | None:
    """The bounds of a piece's elements; of a dtype of whole numbers, all that it has, if no others are known."""
    if piece.content == CONSTANT:
        if isinstance(piece.constant, jax.Array) or np.iscomplexobj(piece.constant):
            return None
        if piece.grade > EQUAL or piece.condition:
            return None
        number = float(piece.constant)
        return (number, number) if math.isfinite(number) else None
    if piece.bounds is not None:
        return None if piece.condition else piece.bounds
    if dtype is None or not _number(dtype):
        return None
    if dtype == np.bool_:
        return 0.0, 1.0
    if jax.dtypes.issubdtype(dtype, np.integer):
        return float(jax.numpy.iinfo(dtype).min), float(jax.numpy.iinfo(dtype).max)
    return None


def _computed_bounds(equation: Any, pieces: Sequence[Piece]) -> _Pair | None:
    """The bounds of what an elementwise operation gives, with room for rounding; None if none are known."""
    output = equation.outvars[0].aval.dtype
    name, y = equation.primitive.name, equation.params.get("y")
    rule = _whole_power(y) if name == "integer_pow" else _EXTENTS.get(name)
    if rule is None or not _number(output) or jax.dtypes.issubdtype(output, np.complexfloating):
        return None
    pairs = []
    for piece, atom in zip(pieces, equation.invars, strict=True):
        pair = _bounds(piece, atom.aval.dtype)
        if pair is None:
            return None
        pairs.append(pair)
    try:
        result = rule(*pairs)
    except (OverflowError, ValueError, ZeroDivisionError):
        return None
    if result is None or not all(map(math.isfinite, result)):
        return None
    if output == np.bool_:
        return result if equation.primitive.name in _COMPARISONS else None
    least, greatest = result
    if jax.dtypes.issubdtype(output, np.integer):
        info = jax.numpy.iinfo(output)
        exact = equation.primitive.name in _EXACT_EXTENTS and abs(least) < 2**52 and abs(greatest) < 2**52
        return (
            (math.floor(least), math.ceil(greatest)) if exact and info.min <= least and greatest <= info.max else None
        )
    largest = max(abs(least), abs(greatest))
    if largest >= float(jax.numpy.finfo(output).max) / 2:
        return None
    room = 16 * float(jax.numpy.finfo(output).eps) * largest
    exact = equation.primitive.name in _EXACT_EXTENTS  # these round to the nearest number, and so never past one
    lower = least if exact and _representable(least, output) else least - room
    upper = greatest if exact and _representable(greatest, output) else greatest + room
    return (max(lower, 0.0) if least >= 0 else lower), upper


def _least(piece: Piece, dtype: Any) -> float | None:
    """The least number that a piece's elements may be if they are not NaN; None if nothing is known."""
    bounds = _bounds(piece, dtype)
    return bounds[0] if bounds is not None else None if piece.condition else piece.least


def _lowest(pieces: Iterable[Piece]) -> float | None:
    """The least number that elements of pieces may be if they are not NaN."""
    least = [_least(piece, None) for piece in pieces]
    known = [number for number in least if number is not None]
    return min(known) if known and len(known) == len(least) else None


def _computed_least(equation: Any, pieces: Sequence[Piece]) -> float | None:
    """The least number that an elementwise operation gives where it does not give NaN; None if none is known."""
    output, name = equation.outvars[0].aval.dtype, equation.primitive.name
    if not _number(output) or not jax.dtypes.issubdtype(output, np.floating):
        return None
    if name in ("square", "abs", "sqrt", "rsqrt", "exp", "exp2", "logistic", "cosh"):
        return 0.0
    if name == "integer_pow":
        return 0.0 if equation.params["y"] % 2 == 0 else None
    if name == "mul" and equation.invars[0] is equation.invars[1]:
        return 0.0
    least = [_least(piece, atom.aval.dtype) for piece, atom in zip(pieces, equation.invars, strict=True)]
    known = [number for number in least if number is not None]
    if name == "max":
        return max(known, default=None)
    if not known or len(known) < len(least):
        return None
    if name == "min":
        return min(known)
    if min(known) < 0:
        return None
    if name in ("add", "add_any"):
        return max(known)
    if name == "convert_element_type":  # to a narrower dtype it may be rounded, and a small number to 0
        number = float(np.asarray(known[0], output))
        return number if math.isfinite(number) else None
    return 0.0 if name in ("mul", "div", "pow") else None


def _representable(number: float, dtype: Any) -> bool:
    return float(np.asarray(number, dtype).astype(np.float64)) == number


def _corners(function: Callable[[float, float], float]) -> Callable[[_Pair, _Pair], _Pair]:
    def rule(a: _Pair, b: _Pair) -> _Pair:
        values = [function(x, y) for x in a for y in b]
        return min(values), max(values)

    return rule


def _rising(function: Callable[[float], float]) -> Callable[[_Pair], _Pair]:
    return lambda a: (function(a[0]), function(a[1]))


def _within(least: float, greatest: float) -> Callable[[_Pair], _Pair]:
    return lambda a: (least, greatest)


def _quotient(a: _Pair, b: _Pair) -> _Pair | None:
    return _corners(operator.truediv)(a, b) if b[0] > 0 or b[1] < 0 else None


def _power(a: _Pair, b: _Pair) -> _Pair | None:
    if a[0] <= 0 and b[0] == b[1] >= 1 and b[0] == math.floor(b[0]) and (rule := _whole_power(int(b[0]))):
        return rule(a)
    if a[0] <= 0 and not (a[0] == 0 and b[0] > 0):
        return None
    values = [x**y for x in a for y in b]
    # A small number's high power may be flushed to 0.
    return min(0.0, *values) if a[0] < 1 else min(values), max(values)


def _whole_power(y: int) -> Callable[[_Pair], _Pair] | None:
    """The bounds of integer_pow."""
    if y < 1:
        return None
    return (lambda a: (_magnitude(a)[0] ** y, _magnitude(a)[1] ** y)) if y % 2 == 0 else _rising(lambda x: x**y)


def _remainder(a: _Pair, b: _Pair) -> _Pair | None:
    if b[0] <= 0:
        return None
    return (0.0 if a[0] >= 0 else -b[1]), (b[1] if a[1] >= 0 else 0.0)


def _square(a: _Pair) -> _Pair:
    values = [a[0] * a[0], a[1] * a[1]]
    return (0.0 if a[0] <= 0 <= a[1] else min(values)), max(values)


def _magnitude(a: _Pair) -> _Pair:
    return (0.0 if a[0] <= 0 <= a[1] else min(map(abs, a))), max(map(abs, a))


def _compared(sure: Callable[[_Pair, _Pair], bool], never: Callable[[_Pair, _Pair], bool]) -> Callable[..., _Pair]:
    return lambda a, b: (1.0, 1.0) if sure(a, b) else (0.0, 0.0) if never(a, b) else (0.0, 1.0)


_EXTENTS: dict[str, Callable[..., _Pair | None]] = {
    "add": lambda a, b: (a[0] + b[0], a[1] + b[1]),
    "add_any": lambda a, b: (a[0] + b[0], a[1] + b[1]),
    "sub": lambda a, b: (a[0] - b[1], a[1] - b[0]),
    "mul": _corners(operator.mul),
    "div": _quotient,
    "rem": _remainder,
    "neg": lambda a: (-a[1], -a[0]),
    "abs": _magnitude,
    "square": _square,
    "sign": _within(-1.0, 1.0),
    "max": lambda a, b: (max(a[0], b[0]), max(a[1], b[1])),
    "min": lambda a, b: (min(a[0], b[0]), min(a[1], b[1])),
    "clamp": lambda a, x, b: (min(max(x[0], a[0]), b[0]), min(max(x[1], a[1]), b[1])),
    "convert_element_type": lambda a: a,
    "pow": _power,
    "sqrt": _rising(math.sqrt),
    "rsqrt": lambda a: (a[1] ** -0.5, a[0] ** -0.5) if a[0] > 0 else None,
    "exp": _rising(math.exp),
    "floor": _rising(math.floor),
    "ceil": _rising(math.ceil),
    "round": _rising(round),
    "cos": _within(-1.0, 1.0),
    "sin": _within(-1.0, 1.0),
    "tanh": _within(-1.0, 1.0),
    "logistic": _within(0.0, 1.0),
    "lt": _compared(lambda a, b: a[1] < b[0], lambda a, b: a[0] >= b[1]),
    "le": _compared(lambda a, b: a[1] <= b[0], lambda a, b: a[0] > b[1]),
    "gt": _compared(lambda a, b: a[0] > b[1], lambda a, b: a[1] <= b[0]),
    "ge": _compared(lambda a, b: a[0] >= b[1], lambda a, b: a[1] < b[0]),
    "eq": _compared(lambda a, b: a[0] == a[1] == b[0] == b[1], lambda a, b: a[1] < b[0] or b[1] < a[0]),
    "ne": _compared(lambda a, b: a[1] < b[0] or b[1] < a[0], lambda a, b: a[0] == a[1] == b[0] == b[1]),
}
_EXACT_EXTENTS = frozenset(("add", "sub", "mul", "neg", "abs", "max", "min", "clamp", "rem", "convert_element_type"))
"""Operations that give the exact result, rounded to the nearest number."""
_COMPARISONS = frozenset(("lt", "le", "gt", "ge", "eq", "ne"))


# Movement.


def _movement(move: Callable[..., np.ndarray], *, keeps_order: bool = False) -> Callable[..., list[Value]]:
    """The rule of a primitive with one operand, of a function (array, parameters of the equation) -> array."""

    def rule(reader: _Reader, equation: Any, values: list[Value], path: tuple[int, ...]) -> list[Value]:
        shapes = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        keeps = keeps_order and _size(shapes[0]) == _size(shapes[1])
        return [
            reader.moved(values[0], shapes, lambda array: move(array, equation.params), keeps_order=keeps),
        ]

    return rule


def _broadcast(array: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
    shape = [1] * len(parameters["shape"])
    for axis, size in zip(parameters["broadcast_dimensions"], array.shape, strict=True):
        shape[axis] = size
    return np.broadcast_to(array.reshape(shape), parameters["shape"])


def _sliced(array: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
    starts, stops = parameters["start_indices"], parameters["limit_indices"]
    strides = parameters["strides"] or (1,) * len(starts)
    return array[tuple(itertools.starmap(slice, zip(starts, stops, strides, strict=True)))]


def _reshape(reader: _Reader, equation: Any, values: list[Value], path: tuple[int, ...]) -> list[Value]:
    shapes = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if equation.params.get("dimensions") is not None:
        return reader.unknown(equation, values)
    return [reader.moved(values[0], shapes, lambda array: array.reshape(shapes[1]), keeps_order=True)]


def _split(reader: _Reader, equation: Any, values: list[Value], path: tuple[int, ...]) -> list[Value]:
    results, start, axis = [], 0, equation.params["axis"]
    for size, var in zip(equation.params["sizes"], equation.outvars, strict=True):
        cut = (slice(None),) * axis + (slice(start, start + size),)
        shapes = equation.invars[0].aval.shape, var.aval.shape
        results.append(reader.moved(values[0], shapes, operator.itemgetter(cut)))
        start += size
    return results


def _dynamic_slice(reader: _Reader, equation: Any, values: list[Value], path: tuple[int, ...]) -> list[Value]:
    sizes, shape = equation.params["slice_sizes"], equation.invars[0].aval.shape
    starts = _indices(reader, equation, values[1:], 1, shape, sizes)
    if starts is not None:
        cut = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
        return [reader.moved(values[0], (shape, sizes), lambda array: array[cut])]
    return [_anywhere(equation, values[0], values[1:])]


def _anywhere(equation: Any, operand: Value, indices: Sequence[Value]) -> Value:
    """The value of elements of an operand from places that are not known."""
    pieces, extra = operand.pieces, 0
    for index in indices:
        extra |= index.depends
    if all(piece.content == CONSTANT for piece in pieces):
        piece = _either(pieces, extra, equation)
        if piece.content != UNKNOWN:
            return Value((piece,))
    return Value((_unlike(pieces, extra)._replace(equation=equation),))


def _indices(
    reader: _Reader, equation: Any, values: Sequence[Value], first: int, shape: Sequence[int], sizes: Sequence[int]
) -> list[int] | None:
    """The indices at which a slice starts, if they are constant, moved so that it lies inside, as JAX does."""
    starts = []
    for value, atom, extent, size in zip(values, equation.invars[first:], shape, sizes, strict=True):
        array = reader.numbers(value, atom.aval.shape, atom.aval.dtype)
        if array is None:
            return None
        starts.append(min(max(int(array), 0), extent - size))
    return starts


def _dynamic_update_slice(reader: _Reader, equation: Any, values: list[Value], path: tuple[int, ...]) -> list[Value]:
    shape, sizes = (atom.aval.shape for atom in equation.invars[:2])
    starts = _indices(reader, equation, values[2:], 2, shape, sizes)
    if starts is None or _size(shape) > reader.most:
        return reader.unknown(equation, values)
    cut = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))

    def paste(array: np.ndarray, below: np.ndarray) -> np.ndarray:
        whole = below.copy()
        whole[cut] = array
        return whole

    return [_laid(reader, equation, list(zip(values[:2], (shape, sizes), strict=True)), shape, paste)]


def _laid(
    reader: _Reader,
    equation: Any,
    layers: Sequence[tuple[Value, Sequence[int]]],
    shape: Sequence[int],
    paste: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> Value:
    """The value of a first array on which a second one is pasted."""
    (below, _), (above, above_shape) = layers
    outer = np.zeros(tuple(shape), np.uint8)
    pieces = [*below.pieces, *above.pieces]
    base = outer if below.selector is None else below.selector
    top = np.zeros(tuple(above_shape), np.uint8) if above.selector is None else above.selector
    selector = paste(top + np.uint8(len(below.pieces)), np.asarray(base))
    for number, piece in enumerate(pieces):
        if piece.content < 0:
            continue
        if number < len(below.pieces):
            continue  # its places stand where they are
        places: Any = reader.straight(above_shape) if piece.places is None else piece.places
        pieces[number] = piece._replace(places=paste(places, np.zeros(tuple(shape), np.int32)))
    return _present(reader, pieces, selector)


def _present(reader: _Reader, pieces: Sequence[Piece], selector: np.ndarray) -> Value:
    """The value with the pieces that occur."""
    present = np.bincount(selector.reshape(-1), minlength=len(pieces)) > 0
    renumbered = (np.cumsum(present) - 1).astype(np.uint8)
    kept = [piece for piece, occurs in zip(pieces, present, strict=True) if occurs]
    if not kept:
        return Value((pieces[0],))
    return tidy(kept, renumbered[selector], reader.watched)


def _concatenate(reader: _Reader, equation: Any, values: list[Value], path: tuple[int, ...]) -> list[Value]:
    shape, axis = equation.outvars[0].aval.shape, equation.params["dimension"]
    pieces = [piece for value in values for piece in value.pieces]
    interesting = any(piece.content != UNKNOWN or piece.depends & reader.watched for piece in pieces)
    if len(values) == 1:
        return values
    if _size(shape) * sum(piece.content >= 0 for piece in pieces) > MOST_ELEMENTS:
        values = [value if value.pieces[0].content < 0 else _forgotten(value) for value in values]
        pieces = [piece for value in values for piece in value.pieces]
    if not interesting or _size(shape) > reader.most or len(pieces) > 250:
        return reader.unknown(equation, values)
    result: list[Piece] = []
    selectors, start = [], 0
    for value, atom in zip(values, equation.invars, strict=True):
        part = atom.aval.shape
        cut = (slice(None),) * axis + (slice(start, start + part[axis]),)
        selector = np.zeros(part, np.uint8) if value.selector is None else value.selector
        selectors.append(selector + np.uint8(len(result)))
        for piece in value.pieces:
            if piece.content >= 0:
                places = np.zeros(shape, np.int32)
                places[cut] = reader.straight(part) if piece.places is None else piece.places
                piece = piece._replace(places=places)
            result.append(piece)
        start += part[axis]
    return [_together(reader, result, np.concatenate(selectors, axis))]


def _forgotten(value: Value) -> Value:
    """The value without what is known of symbols."""
    pieces = tuple(piece if piece.content < 0 else _unlike([piece]) for piece in value.pieces)
    return Value(pieces, value.selector)


def _together(reader: _Reader, pieces: Sequence[Piece], selector: np.ndarray) -> Value:
    """The value of pieces, those of one symbol made one: parts of an input that are put together again."""
    merged: list[Piece] = []
    numbers = []
    for number, piece in enumerate(pieces):
        like = next(
            (
                i
                for i, other in enumerate(merged)
                if piece.content >= 0
                and other.content == piece.content
                and (other.grade, other.depends, other.condition) == (piece.grade, piece.depends, piece.condition)
                and other.places is not None
                and piece.places is not None
            ),
            None,
        )
        if like is None:
            numbers.append(len(merged))
            merged.append(piece)
            continue
        numbers.append(like)
        places: Any = piece.places
        others: Any = merged[like].places
        merged[like] = merged[like]._replace(places=np.asarray(np.where(selector == number, places, others)))
    return _present(reader, merged, np.asarray(numbers, np.uint8)[selector])


def _pad(reader: _Reader, equation: Any, values: list[Value], path: tuple[int, ...]) -> list[Value]:
    shape, before = equation.outvars[0].aval.shape, equation.invars[0].aval.shape
    operand, filling = values
    pieces = [*operand.pieces, *filling.pieces]
    if _size(shape) > reader.most or not any(p.content != UNKNOWN or p.depends & reader.watched for p in pieces):
        return reader.unknown(equation, values)
    if filling.pieces[0].content >= 0:
        filling = Value((_unlike(filling.pieces),))

    def paste(array: np.ndarray, below: np.ndarray) -> np.ndarray:
        whole = below.copy()
        taken, placed = [], []
        for size, extent, (low, _, interior) in zip(before, shape, equation.params["padding_config"], strict=True):
            rows = np.arange(size)
            targets = low + rows * (interior + 1)
            inside = (targets >= 0) & (targets < extent)
            taken.append(rows[inside])
            placed.append(targets[inside])
        whole[np.ix_(*placed)] = array[np.ix_(*taken)]
        return whole

    return [_laid(reader, equation, [(filling, ()), (operand, before)], shape, paste)]


def _gather(reader: _Reader, equation: Any, values: list[Value], path: tuple[int, ...]) -> list[Value]:
    operand, indices = values
    shapes = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    known = any(piece.content >= 0 for piece in operand.pieces) or operand.selector is not None
    fills = equation.params["mode"] not in (_MODES.CLIP, _MODES.PROMISE_IN_BOUNDS)
    known = known or (fills and operand.pieces[0].content == CONSTANT)
    places = (
        reader.numbers(indices, equation.invars[1].aval.shape, None)
        if known and max(map(_size, shapes)) <= reader.most
        else None
    )
    if places is None:
        if fills:
            operand = Value((*operand.pieces, _filling(equation)))
        return [_anywhere(equation, operand, [indices])]
    numbered = np.arange(1, _size(shapes[0]) + 1, dtype=np.int32).reshape(shapes[0])
    parameters = {**equation.params, "fill_value": 0}
    with jax.ensure_compile_time_eval():
        chosen = np.asarray(equation.primitive.bind(numbered, jax.numpy.asarray(places), **parameters))
    inside = chosen > 0
    if not inside.all() and equation.params["mode"] != _MODES.FILL_OR_DROP:
        return reader.unknown(equation, values)
    result = reader.moved(operand, shapes, lambda array: array.reshape(-1)[np.where(inside, chosen - 1, 0)])
    if inside.all():
        return [result]
    selector = np.zeros(shapes[1], np.uint8) if result.selector is None else result.selector
    outside = np.where(inside, selector, np.uint8(len(result.pieces)))
    return [_present(reader, (*result.pieces, _filling(equation)), outside)]


_MODES = jax.lax.GatherScatterMode


def _filling(equation: Any) -> Piece:
    """The number that a gather in the mode of filling gives where an index is outside of its operand."""
    dtype = equation.invars[0].aval.dtype
    if not _number(dtype):
        return Piece(UNKNOWN, equation=equation)
    with jax.ensure_compile_time_eval():
        nothing = jax.numpy.zeros(1, dtype)
        number = nothing.at[jax.numpy.array([1])].get(mode="fill", fill_value=equation.params["fill_value"])
    return Piece(CONSTANT, constant=np.asarray(number)[0])


def _scatter(reader: _Reader, equation: Any, values: list[Value], path: tuple[int, ...]) -> list[Value]:
    operand, indices, updates = values
    shape, part = equation.invars[0].aval.shape, equation.invars[2].aval.shape
    adds = equation.primitive.name in ("scatter-add", "scatter_add")
    if adds and all(map(is_zero, reader.classes(updates, part).pieces)):
        zero = _weaker(*updates.pieces, updates.pieces[0])
        return [reader.combined([operand], shape, lambda piece: _unchanged(reader, equation, piece, zero, EQUAL))]
    interesting = any(
        piece.content != UNKNOWN or piece.depends & reader.watched
        for value in (operand, updates)
        for piece in value.pieces
    )
    if adds or equation.primitive.name != "scatter" or not interesting or _size(shape) > reader.most:
        return reader.unknown(equation, values)
    places = reader.numbers(indices, equation.invars[1].aval.shape, None)
    if places is None:
        return reader.unknown(equation, values)
    numbered = jax.numpy.arange(1, _size(part) + 1, dtype=np.int32).reshape(part)
    with jax.ensure_compile_time_eval():
        below = jax.numpy.zeros(shape, np.int32)
        chosen = np.asarray(equation.primitive.bind(below, jax.numpy.asarray(places), numbered, **equation.params))
        counts = np.asarray(
            jax.lax.scatter_add(
                below,
                jax.numpy.asarray(places),
                jax.numpy.ones(part, np.int32),
                equation.params["dimension_numbers"],
                mode=equation.params["mode"],
            )
        )
    if (counts > 1).any():  # which of two updates of one element stays is not defined
        return reader.unknown(equation, values)

    def paste(array: np.ndarray, under: np.ndarray) -> np.ndarray:
        whole = under.copy()
        whole[chosen > 0] = array.reshape(-1)[chosen[chosen > 0] - 1]
        return whole

    return [_laid(reader, equation, [(operand, shape), (updates, part)], shape, paste)]


def _reduce_precision(reader: _Reader, equation: Any, values: list[Value], path: tuple[int, ...]) -> list[Value]:
    info, kept = jax.numpy.finfo(equation.invars[0].aval.dtype), equation.params
    if kept["mantissa_bits"] >= info.nmant and kept["exponent_bits"] >= info.nexp:
        return values
    return [reader.elementwise(equation, values, lambda piece: _keeps_zero(reader, equation, piece))]


def _iota(reader: _Reader, equation: Any, values: list[Value], path: tuple[int, ...]) -> list[Value]:
    shape, axis = equation.params["shape"], equation.params["dimension"]
    if values or _size(shape) > reader.most:
        return reader.unknown(equation, values)
    along = [1] * len(shape)
    along[axis] = shape[axis]
    row = np.arange(shape[axis]).astype(equation.params["dtype"]).reshape(along)
    return [reader.from_numbers(np.broadcast_to(row, shape))]


# Control.


def _cond(reader: _Reader, equation: Any, values: list[Value], path: tuple[int, ...]) -> list[Value]:
    which, *operands = values
    branches = equation.params["branches"]
    index = reader.numbers(which, (), None)
    if index is not None:
        number = min(max(int(index), 0), len(branches) - 1)
        return reader.program(branches[number].jaxpr, branches[number].consts, operands, (*path, number))
    results = [
        reader.program(branch.jaxpr, branch.consts, operands, (*path, number)) for number, branch in enumerate(branches)
    ]
    return [
        reader.joined(row, var.aval.shape, which.depends, equation)
        for row, var in zip(zip(*results, strict=True), equation.outvars, strict=True)
    ]


def _while(reader: _Reader, equation: Any, values: list[Value], path: tuple[int, ...]) -> list[Value]:
    condition, body = equation.params["cond_jaxpr"], equation.params["body_jaxpr"]
    split = equation.params["cond_nconsts"], equation.params["cond_nconsts"] + equation.params["body_nconsts"]
    outer, consts, start = values[: split[0]], values[split[0] : split[1]], values[split[1] :]
    shapes = [var.aval.shape for var in equation.outvars]
    programs = [program.jaxpr for program in equation.params.values() if hasattr(program, "jaxpr")]
    numbers = programs.index(condition.jaxpr), programs.index(body.jaxpr)

    def turn(carry: list[Value]) -> list[Value]:
        (again,) = reader.program(condition.jaxpr, condition.consts, [*outer, *carry], (*path, numbers[0]))
        after = reader.program(body.jaxpr, body.consts, [*consts, *carry], (*path, numbers[1]))
        return _carried(reader, equation, carry, after, shapes, again.depends)

    return _fixpoint(turn, start)


def _carried(
    reader: _Reader,
    equation: Any,
    before: Sequence[Value],
    after: Sequence[Value],
    shapes: Sequence[Sequence[int]],
    extra: int = 0,
) -> list[Value]:
    return [
        old if old is new else _unbounded(reader.joined((old, _unguarded(new)), shape, extra, equation))
        for old, new, shape in zip(before, after, shapes, strict=True)
    ]


def _unbounded(value: Value) -> Value:
    """The value without bounds, which a loop may widen in each turn."""
    return Value(tuple(piece._replace(bounds=None, least=None) for piece in value.pieces), value.selector)


def _unguarded(value: Value) -> Value:
    """The value without what is known by numbers of the program, which are others in another turn or shard."""
    if all(piece.guard is None for piece in value.pieces):
        return value
    return Value(tuple(piece._replace(guard=None) for piece in value.pieces), value.selector)


def _fixpoint(turn: Callable[[list[Value]], list[Value]], carry: list[Value]) -> list[Value]:
    """Repeat until the carry's facts hold after a turn as before it."""
    for _ in range(1000):
        after = turn(carry)
        if all(map(_same, carry, after)):
            return carry
        carry = after
    raise Stop("a loop's facts do not settle")


def _same(a: Value, b: Value) -> bool:
    if a is b:
        return True
    if len(a.pieces) != len(b.pieces) or (a.selector is None) != (b.selector is None):
        return False
    same_selector = a.selector is b.selector or (
        a.selector is not None and b.selector is not None and np.array_equal(a.selector, b.selector)
    )
    return same_selector and all(
        (p.content, p.grade, p.depends, p.condition, p.bounds) == (q.content, q.grade, q.depends, q.condition, q.bounds)
        and (p.content != CONSTANT or _same_number(p.constant, q.constant))
        and _same_places(p.places, q.places)
        for p, q in zip(a.pieces, b.pieces, strict=True)
    )


def _scan(reader: _Reader, equation: Any, values: list[Value], path: tuple[int, ...]) -> list[Value]:
    parameters = equation.params
    body, (consts_count, carry_count) = parameters["jaxpr"], carried_operands(equation)
    consts, start = values[:consts_count], values[consts_count : consts_count + carry_count]
    stacks = values[consts_count + carry_count :]
    shapes = [var.aval.shape for var in equation.outvars[:carry_count]]
    if reader.may_unroll(parameters["length"], body.jaxpr, equation.outvars):
        return _unrolled(reader, equation, (consts, start, stacks), path)
    rows, first = [], len(reader.symbols)
    for value, atom in zip(stacks, equation.invars[consts_count + carry_count :], strict=True):
        rows.append(_row(reader, value, atom.aval))
    last = len(reader.symbols)
    after: list[Value] = []

    def turn(carry: list[Value]) -> list[Value]:
        nonlocal after
        after = reader.program(body.jaxpr, body.consts, [*consts, *carry, *rows], (*path, 0))
        # A row is another one in the next turn.
        kept = [_without(value, first, last) for value in after[:carry_count]]
        return _carried(reader, equation, carry, kept, shapes)

    carry = _fixpoint(turn, start)
    stacked = [
        _stacked(reader, value, stacks, range(first, last), var.aval.shape)
        for value, var in zip(after[carry_count:], equation.outvars[carry_count:], strict=True)
    ]
    return [*carry, *stacked]


def _unrolled(
    reader: _Reader, equation: Any, operands: tuple[list[Value], list[Value], list[Value]], path: tuple[int, ...]
) -> list[Value]:
    """A loop of few turns, turn by turn, in which constants and what is frozen may differ from row to row."""
    parameters = equation.params
    body, length = parameters["jaxpr"], parameters["length"]
    consts, carry, stacks = operands
    carry_count = len(carry)
    shapes = [atom.aval.shape for atom in equation.invars[len(consts) + len(carry) :]]
    results: list[list[Value]] = [[] for _ in range(length)]
    for turn in reversed(range(length)) if parameters["reverse"] else range(length):
        take = operator.itemgetter(turn)
        rows = [reader.moved(value, (shape, shape[1:]), take) for value, shape in zip(stacks, shapes, strict=True)]
        after = reader.program(body.jaxpr, body.consts, [*consts, *carry, *rows], (*path, 0))
        carry, results[turn] = after[:carry_count], after[carry_count:]
    piles = [
        _piled(reader, equation, [row[number] for row in results], var.aval.shape)
        for number, var in enumerate(equation.outvars[carry_count:])
    ]
    return [*carry, *piles]


def _piled(reader: _Reader, equation: Any, rows: Sequence[Value], shape: Sequence[int]) -> Value:
    """The stack of values, one a row."""
    if all(row is rows[0] and row.selector is None and row.pieces[0].content < 0 for row in rows):
        return rows[0]
    pieces = [piece for row in rows for piece in row.pieces]
    known = any(piece.content != UNKNOWN or piece.depends & reader.watched for piece in pieces)
    contents = sum(piece.content >= 0 for piece in pieces)
    if not known or len(pieces) > 250 or _size(shape) * max(1, contents) > reader.most:
        return Value((_unlike(pieces),))
    result: list[Piece] = []
    selectors = []
    for number, row in enumerate(rows):
        selector = np.zeros(tuple(shape[1:]), np.uint8) if row.selector is None else row.selector
        selectors.append(selector + np.uint8(len(result)))
        for piece in row.pieces:
            if piece.content >= 0:
                places = np.zeros(tuple(shape), np.int32)
                places[number] = reader.straight(shape[1:]) if piece.places is None else piece.places
                piece = piece._replace(places=places)
            result.append(piece)
    return _together(reader, result, np.stack(selectors))


def _row(reader: _Reader, value: Value, aval: Any) -> Value:
    """The value of any one row of a stack. A symbol stands for it, so that a stack of rows in order is the stack."""
    symbol = len(reader.symbols)
    reader.symbols.append(Symbol(aval.shape[1:], aval.dtype))
    if value.selector is None and value.pieces[0].content in (CONSTANT, UNKNOWN):
        return value
    bits, condition, grade = 0, frozenset[str](), 0
    for piece in value.pieces:
        bits |= piece.depends
    return Value((Piece(symbol, depends=bits, grade=grade, condition=condition),))


def _without(value: Value, first: int, last: int) -> Value:
    """The value without what is known of symbols that stand for something else in each turn."""
    if not any(first <= piece.content < last for piece in value.pieces):
        return value
    pieces = tuple(
        Piece(UNKNOWN, depends=piece.depends, equation=piece.equation) if first <= piece.content < last else piece
        for piece in value.pieces
    )
    return Value(pieces, value.selector)


def _stacked(reader: _Reader, value: Value, stacks: Sequence[Value], symbols: range, shape: Sequence[int]) -> Value:
    """The stack of what the turns of a loop give."""
    if value.selector is None:
        piece = value.pieces[0]
        if piece.content in symbols and reader.is_whole(piece):
            stack = stacks[piece.content - symbols.start]
            return reader.combined([stack], shape, lambda row: row if row.content == UNKNOWN else _weaker(row, piece))
        if piece.content < 0:
            return value
        return Value((_unlike(value.pieces),))
    kept = [piece if piece.content < 0 else _unlike([piece]) for piece in value.pieces]
    if _size(shape) > reader.most:
        return Value((_unlike(kept),))
    return tidy(kept, np.broadcast_to(value.selector, tuple(shape)), reader.watched)


def _shard_map(reader: _Reader, equation: Any, values: list[Value], path: tuple[int, ...]) -> list[Value]:
    """Shards: a symbol stands for a shard of an operand; what is put together as it was cut is the operand."""
    body = equation.params["jaxpr"]
    body, consts = (body.jaxpr, body.consts) if hasattr(body, "jaxpr") else (body, ())
    cuts, joins = equation.params["in_specs"], equation.params["out_specs"]
    first = len(reader.symbols)
    shards = []
    for value, spec, var in zip(values, cuts, body.invars, strict=True):
        reader.symbols.append(Symbol(var.aval.shape, var.aval.dtype))
        if _whole_spec(spec) or (value.selector is None and value.pieces[0].content < 0):
            shards.append(value)
        else:
            bits = value.depends
            shards.append(Value((Piece(len(reader.symbols) - 1, depends=bits),)))
    last = len(reader.symbols)
    results = []
    inside = reader.program(body, consts, shards, (*path, 0))
    for value, spec, var in zip(inside, joins, equation.outvars, strict=True):
        piece = value.pieces[0]
        if value.selector is not None:
            results.append(
                value if _whole_spec(spec) and not _has(value, first, last) else Value((_unlike(value.pieces),))
            )
        elif first <= piece.content < last:
            operand = piece.content - first
            if reader.is_whole(piece) and _axes(cuts[operand]) == _axes(spec):
                stack = values[operand]
                results.append(
                    reader.combined(
                        [stack], var.aval.shape, lambda row, p=piece: row if row.content == UNKNOWN else _weaker(row, p)
                    )
                )
            else:
                results.append(Value((_unlike(value.pieces),)))
        elif piece.content < 0 or _whole_spec(spec):
            results.append(value)
        else:
            results.append(Value((_unlike(value.pieces),)))
    return results


def _has(value: Value, first: int, last: int) -> bool:
    return any(first <= piece.content < last for piece in value.pieces)


def _axes(spec: Any) -> tuple[Any, ...]:
    """A partition spec without the axes at its end that are whole."""
    entries = [tuple(entry) if isinstance(entry, tuple | list) else (entry,) for entry in spec]
    entries = [tuple(name for name in entry if name is not None) for entry in entries]
    while entries and not entries[-1]:
        entries.pop()
    return tuple(entries)


def _whole_spec(spec: Any) -> bool:
    return not _axes(spec)


THROUGH = frozenset(
    (
        *("copy", "copy_p", "optimization_barrier", "sharding_constraint", "layout_constraint", "device_put"),
        *("pvary", "pcast", "name", "mesh_cast", "reshard", "pbroadcast"),
    )
)
"""What gives each operand as it is."""
CALLS = frozenset(
    (
        *("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
        *("remat", "remat2", "checkpoint", "xla_call", "run_scoped"),
    )
)
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_OUTSIDE = ("callback", "pallas", "ffi", "custom_call", "outside_call", "infeed", "outfeed")
"""Parts of the names of primitives whose program is not a jaxpr, or not one of values."""

ELEMENTWISE = frozenset((*_ARITHMETIC, "convert_element_type", "select_n"))
"""What computes each element from those in the same places."""

_SAME_MOMENT = frozenset((*ELEMENTWISE, "reshape", "squeeze", "expand_dims", "broadcast_in_dim", *_ZERO_OF_ZERO))
"""What is computed once of its operands, and not by turns or shards: of other results guards are not kept."""

_RULES: dict[str, Callable[..., list[Value]]] = {
    **dict.fromkeys(_ARITHMETIC, _arithmetic),
    **dict.fromkeys((*_ZERO_OF_ZERO, *_ZERO_OF_ANY), _reduced),
    "convert_element_type": _convert,
    "select_n": _select,
    "reshape": _reshape,
    "squeeze": _movement(lambda array, p: array.squeeze(tuple(p["dimensions"])), keeps_order=True),
    "expand_dims": _movement(lambda array, p: np.expand_dims(array, tuple(p["dimensions"])), keeps_order=True),
    "broadcast_in_dim": _movement(_broadcast, keeps_order=True),
    "transpose": _movement(lambda array, p: array.transpose(p["permutation"])),
    "rev": _movement(lambda array, p: np.flip(array, tuple(p["dimensions"]))),
    "slice": _movement(_sliced),
    "split": _split,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "concatenate": _concatenate,
    "pad": _pad,
    "gather": _gather,
    "scatter": _scatter,
    "scatter-add": _scatter,
    "scatter_add": _scatter,
    "iota": _iota,
    "reduce_precision": _reduce_precision,
    "cond": _cond,
    "while": _while,
    "scan": _scan,
    "shard_map": _shard_map,
}
