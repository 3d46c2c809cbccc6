"""Whether leaves move by the rates that a mask gives them, read from a step's program.

The new value of a leaf is written as a sum of terms, each a number times a product of atoms: the leaf's value, its
gradient, its state, and what is no sum or product of these, such as the root of a moment. A select or a choice is
a + [condition] (b - a). The names of atoms do not say of which leaf they are, so that two leaves which the step treats
alike have the same atoms, and what differs is numbers. A leaf with multiplier m *moves by its rate* if each term of its
move that has to do with its gradient is m times the term of a leaf with multiplier 1: then it is so for all
gradients, values and states that are the same for both. A multiplier before Adam is within a root, makes
other atoms, and has no effect; one in the wrong group or in none shows as another number.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from tljax.audit import idle
from tljax.audit.cotangents import CALLS, Read, operands_of_programs
from tljax.audit.report import Finding
from tljax.train.memory import carried_operands, inner_programs

Atom = int
Form = dict[tuple[Atom, ...], float]
"""A sum: the coefficient of each product of atoms; the product of none is the number 1."""

MOST_TERMS = 64
"""The terms of a sum, beyond which it is one atom."""


class Forms:
    """The forms of the values of one program; atoms are numbered as they come."""

    def __init__(self, gradients: Collection[Read], equations: Collection[int]) -> None:
        """`gradients` are the places where the program reads the gradient of a parameter; see `cotangents`."""
        self.gradients = gradients
        self.equations = equations
        self.atoms: dict[Any, Atom] = {}
        self.follows: set[Atom] = set()
        """The atoms that follow a gradient or a state."""

    def atom(self, key: Any, parts: Sequence[Form] = (), *, follows: bool = False) -> Form:
        """The form that is one atom: the same for the same key."""
        number = self.atoms.setdefault(key, len(self.atoms))
        if follows or any(self.moves(term) for part in parts for term in part):
            self.follows.add(number)
        return {(number,): 1.0}

    def moves(self, term: tuple[Atom, ...]) -> bool:
        """Whether a term follows a gradient or a state."""
        return any(atom in self.follows for atom in term)

    def read(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Form], path: Read) -> list[Form]:
        """The forms of the outputs of a program."""
        known: dict[Any, Form] = dict(zip(jaxpr.invars, inputs, strict=True))
        known |= {var: self.constant(const) for var, const in zip(jaxpr.constvars, consts, strict=True)}

        def forms_of(atoms: Sequence[Any], number: int) -> list[Form]:
            return [
                self.atom("gradient", follows=True)
                if (*path, number, index) in self.gradients
                else self.constant(atom.val)
                if isinstance(atom, core.Literal)
                else known[atom]
                for index, atom in enumerate(atoms)
            ]

        for number, equation in enumerate(jaxpr.eqns):
            if id(equation) not in self.equations:
                known.update({variable: {} for variable in equation.outvars})
                continue
            results = self.equation(equation, forms_of(equation.invars, number), (*path, number))
            known.update(zip(equation.outvars, results, strict=True))
        return forms_of(jaxpr.outvars, -1)

    def constant(self, number: Any) -> Form:
        """The form of a number, or of an array of the program."""
        if jax.dtypes.issubdtype(getattr(number, "dtype", np.float32), jax.dtypes.extended):
            return self.atom(("array", id(number)))
        array = np.asarray(number)
        if array.size and array.dtype.kind in "fiub" and (array.reshape(-1)[0] == array).all():
            return _clean({(): float(array.reshape(-1)[0])})
        return self.atom(("array", array.shape, array.tobytes() if array.size < 1 << 16 else id(number)))

    def equation(self, equation: Any, forms: list[Form], path: Read) -> list[Form]:
        """The forms of an equation's outputs."""
        name, inner = equation.primitive.name, inner_programs(equation)
        if name in CALLS and inner and len(inner[0].invars) == len(forms):
            closed = next((p for p in equation.params.values() if getattr(p, "jaxpr", None) is inner[0]), None)
            return self.read(inner[0], getattr(closed, "consts", ()), forms, (*path, 0))
        if name in ("scan", "while", "cond"):
            return self.control(equation, forms, path, inner)
        rule = _RULES.get(name)
        if name == "convert_element_type" and not all(
            jax.numpy.issubdtype(var.aval.dtype, np.number) for var in (equation.invars[0], equation.outvars[0])
        ):
            rule = None
        if rule is not None:
            result = rule(self, equation, forms)
            if len(result) <= MOST_TERMS:
                return [result]
        key = (name, *(_key(form) for form in forms), _plain(equation.params))
        return [self.atom((key, index), forms) for index in range(len(equation.outvars))]

    def chosen(self, condition: Form, cases: Sequence[Form]) -> Form:
        """The form that is one of several by a condition."""
        first, result = cases[0], dict(cases[0])
        for number, case in enumerate(cases[1:], 1):
            holds = self.atom(("is", number, _key(condition)), [condition])
            result = _add(result, _times(holds, _add(case, first, -1.0)))
        return result

    def control(self, equation: Any, forms: list[Form], path: Read, inner: Sequence[Any]) -> list[Form]:
        """The forms of the results of a choice, and of a loop's: an atom that says what a turn does."""
        name = equation.primitive.name
        operands = operands_of_programs(equation)
        consts = [
            getattr(part, "consts", ())
            for value in equation.params.values()
            for part in (value if isinstance(value, tuple | list) else (value,))
            if hasattr(part, "consts") and hasattr(part, "jaxpr")
        ]
        if name == "cond":
            results = [
                self.read(program, consts[number], [forms[i] for i in operands[number]], (*path, number))
                for number, program in enumerate(inner)
            ]
            return [self.chosen(forms[0], cases) for cases in zip(*results, strict=True)]
        first, carries = carried_operands(equation)
        turns: list[Form] = []
        for index in range(len(equation.outvars)):
            begun = list(forms)
            for slot in range(carries):
                slot_name = "own" if slot == index else slot
                begun[first + slot] = self.atom((name, "carry", slot_name), [forms[first + slot]], follows=True)
            for row in range(first + carries, len(forms)):
                begun[row] = self.atom((name, "row", _key(forms[row])), [forms[row]])
            outputs = [
                self.read(program, consts[number], [begun[i] for i in operands[number]], (*path, number))
                for number, program in enumerate(inner)
            ]
            turn = outputs[-1][index]
            start = forms[first + index] if index < carries else {}
            tested = _key(outputs[0][0]) if name == "while" else equation.params["length"]
            whole = self.atom((name, "result", _key(turn), _key(start), tested), [turn, start])
            turns.append(whole)
        return turns


def _key(form: Form) -> frozenset[tuple[tuple[Atom, ...], float]]:
    """A form as a part of a key: numbers to nine digits."""
    return frozenset((term, float(f"{coefficient:.9g}")) for term, coefficient in form.items())


def _clean(form: Form) -> Form:
    return {term: coefficient for term, coefficient in form.items() if coefficient != 0}


def _add(a: Form, b: Form, factor: float = 1.0) -> Form:
    result = dict(a)
    for term, coefficient in b.items():
        total = result.get(term, 0.0) + factor * coefficient
        # what cancels but for rounding is 0
        result[term] = 0.0 if abs(total) <= 1e-9 * abs(coefficient * factor) else total
    return _clean(result)


def _times(a: Form, b: Form) -> Form:
    result: Form = {}
    for left, x in a.items():
        for right, y in b.items():
            result = _add(result, {tuple(sorted(left + right)): x * y})
    return result


def _mul(forms: Forms, equation: Any, operands: list[Form]) -> Form:
    a, b = operands
    if len(a) * len(b) > MOST_TERMS:
        return forms.atom(("mul", _key(a), _key(b)), operands)
    return _times(a, b)


def _div(forms: Forms, equation: Any, operands: list[Form]) -> Form:
    a, b = operands
    if len(b) == 1 and (coefficient := b.get(())) is not None:
        return {term: x / coefficient for term, x in a.items()}
    scale = max(b.values(), key=abs) if b else 0.0
    if len(b) != 1 or not scale:
        return _times(a, forms.atom(("inverse", _key(b)), [b]))
    ((term, coefficient),) = b.items()
    return _times({t: x / coefficient for t, x in a.items()}, forms.atom(("inverse", term), [b]))


def _power(forms: Forms, equation: Any, operands: list[Form]) -> Form:
    (a,), exponent = operands, 2 if equation.primitive.name == "square" else equation.params["y"]
    if len(a) == 1 and 0 < exponent <= 4:
        ((term, coefficient),) = a.items()
        return {tuple(sorted(term * exponent)): coefficient**exponent}
    return forms.atom(("power", exponent, _key(a)), operands)


def _first(forms: Forms, equation: Any, operands: list[Form]) -> Form:
    return operands[0]


_RULES: dict[str, Callable[[Forms, Any, list[Form]], Form]] = {
    "add": lambda forms, equation, operands: _add(operands[0], operands[1]),
    "add_any": lambda forms, equation, operands: _add(operands[0], operands[1]),
    "sub": lambda forms, equation, operands: _add(operands[0], operands[1], -1.0),
    "neg": lambda forms, equation, operands: {term: -x for term, x in operands[0].items()},
    "mul": _mul,
    "div": _div,
    "square": _power,
    "integer_pow": _power,
    "select_n": lambda forms, equation, operands: forms.chosen(operands[0], operands[1:]),
    **dict.fromkeys(
        (
            *("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "convert_element_type", "copy", "copy_p"),
            *(
                "optimization_barrier",
                "sharding_constraint",
                "device_put",
                "pvary",
                "stop_gradient",
                "reduce_precision",
            ),
        ),
        _first,
    ),
}
_NUMBERS = (bool, int, float, str, np.dtype)


def _plain(parameters: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The parameters of an equation that are numbers, without shapes."""
    return tuple(sorted((key, str(value)) for key, value in parameters.items() if isinstance(value, _NUMBERS)))


# What follows of two leaves.


class Leaf(NamedTuple):
    """A leaf that trains, and the rate that a mask gives it."""

    path: str
    place: int
    """Among the inputs of the program, and among its outputs."""
    rate: float
    """Its multiplier in the mask; 1.0 for True."""


def findings(
    program: Any,
    gradients: Collection[Read],
    names: Sequence[tuple[Any, bool]],
    leaves: Sequence[Leaf],
    numbers: Callable[[float], list[Any]],
) -> list[Finding]:
    """Whether each leaf moves by its rate.

    `program` gives the next state; `gradients` are the places where it reads those of parameters. `names` has for each
    input what it is, in words that leaves share, or a NumPy number that all of its elements are, and whether it follows
    a gradient (or is one). `numbers(value)` are inputs whose parameters are this value everywhere, for a run.
    """
    outputs = len(program.jaxpr.outvars)
    wanted = [number in {leaf.place for leaf in leaves} for number in range(outputs)]
    equations = idle.live(program, wanted, gradients).equations
    forms = Forms(gradients, equations)
    inputs = [
        forms.constant(name) if isinstance(name, np.generic) else forms.atom(name, follows=follows)
        for name, follows in names
    ]
    after = forms.read(program.jaxpr, program.consts, inputs, ())
    moves = {leaf.place: move(forms, after[leaf.place], inputs[leaf.place]) for leaf in leaves}
    reference = _reference(leaves, moves)
    gradient_inputs = [number for number, (name, _) in enumerate(names) if name == "gradient"]
    run = None
    if any(ratio(moves[leaf.place], moves[reference.place]) is None for leaf in leaves):
        run = _run(program, gradients, gradient_inputs, equations, leaves, numbers)
    return [_finding(leaf, reference, moves, run, equations, program) for leaf in leaves]


def _reference(leaves: Sequence[Leaf], moves: Mapping[int, Form]) -> Leaf:
    """The leaf that the others are held against: of those with the largest rate, one that most move like."""
    largest = [leaf for leaf in leaves if leaf.rate == max(leaf.rate for leaf in leaves)]
    likes = [sum(ratio(moves[leaf.place], moves[other.place]) is not None for other in leaves) for leaf in largest]
    return largest[likes.index(max(likes))]


def _finding(
    leaf: Leaf, reference: Leaf, moves: Mapping[int, Form], run: Any, equations: Collection[int], program: Any
) -> Finding:
    wanted = leaf.rate / reference.rate
    moved = ratio(moves[leaf.place], moves[reference.place])
    beside = "" if leaf is reference else f" as '{reference.path}' under equal gradients, values and states"
    by_mask = f"; the mask gives it {leaf.rate:g}" + (
        "" if reference.rate == 1 else f", and {reference.rate:g} that one"
    )
    if leaf is reference:
        if len(moves) == 1:
            return Finding(leaf.path, "rate", "not decided", "no other leaf trains that it could be held against")
        if not moves[leaf.place]:
            return Finding(leaf.path, "rate", "refuted", "no term of its new value has to do with its gradient")
        return Finding(leaf.path, "rate", "proved", "the rate that others are held against")
    if moved is not None:
        right = abs(moved - wanted) <= TOLERANCE * abs(wanted)
        detail = f"moves {moved:.6g} times as far{beside}" + ("" if right else by_mask)
        return Finding(leaf.path, "rate", "proved" if right else "refuted", detail)
    if run is None:
        return Finding(leaf.path, "rate", "not decided", "the step treats it otherwise, and is not run on numbers")
    shapes = [program.jaxpr.invars[each.place].aval.shape for each in (leaf, reference)]
    ratios = [values[leaf.place] / values[reference.place] for values in run if values[reference.place]]
    if not ratios or not np.isfinite(ratios).all() or (shapes[0] != shapes[1] and _mixes(program.jaxpr, equations)):
        return Finding(leaf.path, "rate", "not decided", "the step treats it otherwise than leaves of other shapes")
    if all(abs(each - wanted) <= 0.01 * abs(wanted) for each in ratios):
        detail = f"the step treats it otherwise; in numbers it moves {ratios[0]:.4g} times as far{beside}"
        return Finding(leaf.path, "rate", "not decided", detail)
    worst = max(ratios, key=lambda each: abs(each - wanted))
    return Finding(leaf.path, "rate", "refuted", f"moves {worst:.4g} times as far{beside}, in numbers{by_mask}")


def _mixes(jaxpr: Any, equations: Collection[int]) -> bool:
    """Whether elements are summed, sorted or multiplied as matrices, so that a shape may decide."""
    return any(
        id(equation) in equations
        and (
            equation.primitive.name.startswith(_MIXING)
            or any(_mixes(part, equations) for part in inner_programs(equation))
        )
        for equation in jaxpr.eqns
    )


_MIXING = (
    *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_window", "argm"),
    *("dot_general", "conv_general", "cum", "sort", "top_k", "cholesky", "eig", "svd", "qr", "lu", "triangular", "fft"),
)


STEPS = 3
"""The steps that are run: moments are of a gradient that stays."""


def _run(
    program: Any,
    gradients: Collection[Read],
    gradient_inputs: Sequence[int],
    equations: Collection[int],
    leaves: Sequence[Leaf],
    numbers: Callable[[float], list[Any]],
) -> list[dict[int, float]] | None:
    """How far each leaf moves in each step, where all gradients are one number, and all parameters one.

    Gradients are inputs, `gradient_inputs`, or read at places. None if the program cannot be run so: a gradient is
    read within a loop, or a leaf's elements move apart.
    """

    @jax.jit
    def step(inputs: list[Any], gradient: Any) -> list[Any]:
        after = _replayed(program.jaxpr, program.consts, inputs, (), gradients, equations, gradient)
        kept = [before if new is None else new for before, new in zip(inputs, after, strict=False)]
        return [*kept, *inputs[len(after) :]]

    moves = []
    for gradient in (0.3, -0.7):
        current = numbers(0.01)
        for number in gradient_inputs:
            current[number] = jax.numpy.full_like(current[number], gradient)
        for _ in range(STEPS):
            try:
                after = step(current, gradient)
            except _Unreadable:
                return None
            moved = {}
            for leaf in leaves:
                old, new = (np.asarray(arrays[leaf.place], np.float64) for arrays in (current, after))
                change = (new - old).reshape(-1)
                if not np.allclose(change, change[0], rtol=1e-3, atol=1e-12):
                    return None
                moved[leaf.place] = float(change[0])
            moves.append(moved)
            current = after
    return moves


class _Unreadable(Exception):
    """A gradient is read where it cannot be replaced."""


def _replayed(
    jaxpr: Any,
    consts: Sequence[Any],
    inputs: Sequence[Any],
    path: Read,
    gradients: Collection[Read],
    equations: Collection[int],
    gradient: Any,
) -> list[Any]:
    """The outputs of a program on numbers, with a number for all gradients; None for what is not computed."""
    known: dict[Any, Any] = dict(zip(jaxpr.invars, inputs, strict=True)) | dict(
        zip(jaxpr.constvars, consts, strict=True)
    )

    def read(atom: Any, place: Read) -> Any:
        if place in gradients:
            return jax.numpy.full(atom.aval.shape, gradient, atom.aval.dtype)
        return atom.val if isinstance(atom, core.Literal) else known.get(atom)

    for number, equation in enumerate(jaxpr.eqns):
        if id(equation) not in equations:
            continue
        operands = [read(atom, (*path, number, index)) for index, atom in enumerate(equation.invars)]
        inner = inner_programs(equation)
        if equation.primitive.name in CALLS and inner and len(inner[0].invars) == len(operands):
            closed = next((p for p in equation.params.values() if getattr(p, "jaxpr", None) is inner[0]), None)
            results = _replayed(
                inner[0], getattr(closed, "consts", ()), operands, (*path, number, 0), gradients, equations, gradient
            )
        else:
            if any(place[: len(path) + 1] == (*path, number) and len(place) > len(path) + 2 for place in gradients):
                raise _Unreadable
            if any(operand is None for operand in operands):
                continue
            bound = equation.primitive.bind(*operands, **equation.params)
            results = bound if equation.primitive.multiple_results else [bound]
        known.update(zip(equation.outvars, results, strict=True))
    return [read(atom, (*path, -1, index)) for index, atom in enumerate(jaxpr.outvars)]


def move(forms: Forms, after: Form, before: Form) -> Form:
    """The terms of a leaf's move that have to do with its gradient or its state."""
    return {term: x for term, x in _add(after, before, -1.0).items() if forms.moves(term)}


def ratio(a: Form, b: Form) -> float | None:
    """The number by which `b` is to be multiplied to give `a`; None if there is none, or nothing moves.

    >>> ratio({(1,): 0.5, (1, 2): 2.0}, {(1,): 1.0, (1, 2): 4.0})
    0.5
    """
    if not a or a.keys() != b.keys():
        return None
    ratios = [coefficient / b[term] for term, coefficient in a.items()]
    close = all(abs(other - ratios[0]) <= TOLERANCE * abs(ratios[0]) for other in ratios)
    return ratios[0] if close else None


TOLERANCE = 1e-5
"""The relative difference of numbers that float32 rounds and that are the same."""
