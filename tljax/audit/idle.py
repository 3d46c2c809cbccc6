"""What a step computes for nobody: gradients that reach no state, state that it forgets, the same draws in each step.

Dead code costs nothing, and is not meant. XLA was seen (CPU, jax 0.10.2, FLOPs of compiled programs) to drop what
nothing reads at the top level and in jit, remat and shard_map, unread outputs of cond, unread stacked outputs and
unread carries of scan, while and fori_loop, nested or not, unread pure callbacks, and what a constant `where` does not
choose. It was seen to keep what is multiplied by 0, since 0 x infinity is no 0, what only a metric or a debug callback
reads, and all rows of a stacked gradient of which a mask keeps some. So gradients cost FLOPs for nobody where the
state does not depend on them, and yet they are multiplied by 0, or read by a result beside the state.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from tljax import paths
from tljax.audit.cotangents import CALLS, Read, operands_of_programs
from tljax.audit.program import line_of
from tljax.audit.report import Finding
from tljax.train.flops import equation_flops
from tljax.train.memory import carried_operands, inner_programs


class Live(NamedTuple):
    """What of a program has to be computed."""

    flops: float
    """As `train.flops` counts them."""
    inputs: tuple[bool, ...]
    """Which inputs are read."""
    equations: frozenset[int]
    """The identities of the equations."""


def live(program: Any, wanted: Sequence[bool], unread: Collection[Read] = (), *, callbacks: bool = True) -> Live:
    """What the wanted outputs of a closed jaxpr are computed from, if nothing is read at the places `unread`.

    Debug and IO callbacks are wanted too, unless `callbacks` is False.

    >>> def step(x, w):
    ...     body = lambda carry, _: ((2 * carry[0], carry[1] + carry[0] @ w), None)
    ...     return jax.lax.scan(body, (x, x), None, length=10)[0]
    >>> program = jax.make_jaxpr(step)(np.ones((4, 4), np.float32), np.ones((4, 4), np.float32))
    >>> live(program, [True, False]).flops, live(program, [True, True]).flops
    (160.0, 1600.0)
    """
    reader = _Reader(frozenset(unread), callbacks)
    constants = [np.asarray(const) if np.size(const) < 1 << 20 else None for const in _plain(program.consts)]
    flops, inputs, _ = reader.live(program.jaxpr, list(wanted), (), [None] * len(program.jaxpr.invars), constants)
    return Live(flops, tuple(inputs), frozenset(reader.equations))


def _plain(constants: Iterable[Any]) -> list[Any]:
    """Constants without typed keys, which have no numbers."""
    return [
        np.zeros(1 << 20) if jax.dtypes.issubdtype(getattr(c, "dtype", bool), jax.dtypes.extended) else c
        for c in constants
    ]


class _Reader:
    """Reads a program backwards, from what is wanted to what it is computed from."""

    def __init__(self, unread: frozenset[Read], callbacks: bool) -> None:
        self.unread = unread
        self.callbacks = callbacks
        self.equations: set[int] = set()

    def live(
        self, jaxpr: Any, wanted: Sequence[bool], path: Read, inputs: Sequence[Any], constants: Sequence[Any] = ()
    ) -> tuple[float, list[bool], bool]:
        """FLOPs, the inputs that are read, and whether there are callbacks.

        `inputs` and `constants` have the number that all elements of each are, None where they differ.
        """
        uniform = dict(zip(jaxpr.invars, inputs, strict=True))
        if constants:
            uniform |= zip(jaxpr.constvars, map(_uniform, constants), strict=True)
        for equation in jaxpr.eqns:
            number = _constant(equation, uniform)
            if number is not None:
                uniform[equation.outvars[0]] = number
        needed = {
            atom
            for number, (atom, is_wanted) in enumerate(zip(jaxpr.outvars, wanted, strict=True))
            if is_wanted and not isinstance(atom, core.Literal) and (*path, -1, number) not in self.unread
        }
        flops, called = 0.0, False
        for number, equation in reversed(list(enumerate(jaxpr.eqns))):
            results = [variable in needed for variable in equation.outvars]
            if not any(results) and not self.calls(equation):
                continue
            cost, reads, calls = self.equation(equation, results, (*path, number), uniform)
            if not any(results) and not calls:
                continue
            self.equations.add(id(equation))
            flops, called = flops + cost, called or calls
            needed |= {
                atom
                for index, (atom, is_read) in enumerate(zip(equation.invars, reads, strict=True))
                if is_read and not isinstance(atom, core.Literal) and (*path, number, index) not in self.unread
            }
        return flops, [variable in needed for variable in jaxpr.invars], called

    def equation(
        self, equation: Any, results: list[bool], path: Read, uniform: dict[Any, Any]
    ) -> tuple[float, list[bool], bool]:
        """The same of an equation whose `results` are wanted."""
        name, inner = equation.primitive.name, inner_programs(equation)
        everything = [True] * len(equation.invars)
        if name in CALLS and inner and len(inner[0].invars) == len(everything):
            return self.live(inner[0], results, (*path, 0), [_number(atom, uniform) for atom in equation.invars])
        if name == "cond":
            return self.choice(equation, results, path, inner)
        if name in ("scan", "while"):
            return self.loop(equation, results, path, inner)
        if name == "select_n" and (which := _number(equation.invars[0], uniform)) is not None:
            return equation_flops(equation), [index == 1 + int(which) for index in range(len(everything))], False
        return equation_flops(equation), everything, self.calls(equation)

    def calls(self, equation: Any) -> bool:
        """Whether an equation, or one within it, calls back for more than a result."""
        names = [type(effect).__name__ for effect in equation.effects]
        return self.callbacks and any("Callback" in name or "Debug" in name for name in names)

    def choice(
        self, equation: Any, results: list[bool], path: Read, branches: Sequence[Any]
    ) -> tuple[float, list[bool], bool]:
        parts = [
            self.live(branch, results, (*path, number), [None] * len(branch.invars))
            for number, branch in enumerate(branches)
        ]
        reads = [True, *(any(reads) for reads in zip(*(part[1] for part in parts), strict=True))]
        return max(part[0] for part in parts), reads, any(part[2] for part in parts)

    def loop(
        self, equation: Any, results: list[bool], path: Read, inner: Sequence[Any]
    ) -> tuple[float, list[bool], bool]:
        """A carry is wanted if the result is, or if a carry that is wanted is computed from it."""
        is_scan, operands = equation.primitive.name == "scan", operands_of_programs(equation)
        first, carries = carried_operands(equation)
        wanted = list(results)
        while True:
            reads = [False] * len(equation.invars)
            flops, called = 0.0, False
            for number, (program, program_operands) in enumerate(zip(inner, operands, strict=True)):
                read_outputs = wanted if number == len(inner) - 1 else [True]
                cost, inputs, calls = self.live(program, read_outputs, (*path, number), [None] * len(program.invars))
                flops, called = flops + cost, called or calls
                for operand, is_read in zip(program_operands, inputs, strict=True):
                    reads[operand] = reads[operand] or is_read
            after = [is_wanted or (index < carries and reads[first + index]) for index, is_wanted in enumerate(wanted)]
            if after == wanted:
                break
            wanted = after
        for index in range(carries):
            reads[first + index] = reads[first + index] or wanted[index]
        return flops * (equation.params["length"] if is_scan else 1), reads, called


def _uniform(array: Any) -> Any:
    """The number that all elements of an array are, if they are one."""
    if array is None or not array.size:
        return None
    first = array.reshape(-1)[0]
    return first if bool((array == first).all()) else None


def _number(atom: Any, uniform: dict[Any, Any]) -> Any:
    """The number that all elements of an operand are, if it is known."""
    if isinstance(atom, core.Literal):
        return atom.val if np.ndim(atom.val) == 0 else None
    return uniform.get(atom)


def _constant(equation: Any, uniform: dict[Any, Any]) -> Any:
    """The number that all elements of an equation's result are, if that is known of the operand and follows."""
    name = equation.primitive.name
    if name not in ("broadcast_in_dim", "reshape", "squeeze", "convert_element_type", "not", "copy"):
        return None
    number = _number(equation.invars[0], uniform)
    if number is None:
        return None
    if name == "not":
        return not number if equation.outvars[0].aval.dtype == np.bool_ else None
    return np.asarray(number).astype(equation.outvars[0].aval.dtype)[()] if name == "convert_element_type" else number


# Findings.


def findings(
    program: Any,
    state: int,
    names: Sequence[str],
    kept: Collection[int],
    params: Collection[int],
    unread: Collection[Read],
    frozen: list[str],
) -> list[Finding]:
    """What a step computes for nobody, a line each.

    `program` gives the `state` leaves of the next state, whose paths are `names`, and then its other results; its first
    inputs are the state. `kept` are the places of leaves that the step gives back as they are, `params` those of
    parameters. `unread` are the reads of the gradients of the `frozen` leaves, on which the next state does not depend.
    """
    outputs = len(program.jaxpr.outvars)
    everything = live(program, [True] * outputs)
    result = _gradients(program, state, everything, unread, frozen)
    result += [
        Finding(name, "idle", "proved", "no result of the step depends on what it holds")
        for place, name in enumerate(names)
        if place not in params and not everything.inputs[place]
    ]
    return result + _draws(program, state, names, kept, everything.equations)


def _gradients(
    program: Any, state: int, everything: Live, unread: Collection[Read], frozen: list[str]
) -> list[Finding]:
    outputs = len(program.jaxpr.outvars)
    needed = live(program, [True] * outputs, unread)
    wasted = everything.flops - needed.flops
    if not frozen or wasted < _LEAST_SHARE * everything.flops:
        return []
    is_state = [number < state for number in range(outputs)]
    with_them, without = (live(program, is_state, reads, callbacks=False).flops for reads in ((), unread))
    in_state = with_them - without
    why = "they are multiplied by 0, which no compiler drops" if in_state >= wasted / 2 else _FOR_RESULTS
    share = f"{wasted / 1e6:,.3g} of {everything.flops / 1e6:,.3g} MFLOP of a step ({wasted / everything.flops:.0%})"
    name = frozen[0] + (f" and {len(frozen) - 1} more" if frozen[1:] else "")
    return [Finding(name, "idle", "proved", f"{share} make gradients that train nothing: {why}")]


_LEAST_SHARE = 0.01
"""The share of a step's FLOPs, below which what gradients cost for nobody is not worth a line."""
_FOR_RESULTS = "only results beside the state, such as a logged norm, or callbacks read them"


def _draws(
    program: Any, state: int, names: Sequence[str], kept: Collection[int], equations: Collection[int]
) -> list[Finding]:
    """Random numbers that are the same in each step: of keys that follow from what no step changes."""
    moving = [place >= state or place not in kept for place in range(len(program.jaxpr.invars))]
    sources = [frozenset[int]() if moves else frozenset((place,)) for place, moves in enumerate(moving)]
    draws: list[tuple[Any, frozenset[int]]] = []
    _follow(program.jaxpr, list(zip(moving, sources, strict=True)), draws)
    finding_by_key: dict[tuple[str, str | None], Finding] = {}
    for equation, key_leaves in draws:
        if id(equation) not in equations:
            continue
        name = paths.some([names[place] for place in sorted(key_leaves)], 2) if key_leaves else "a constant key"
        name = name.strip("'") if len(key_leaves) == 1 else name
        how = "is given back as it was, and" if key_leaves else "is in the program:"
        where = line_of(equation)
        detail = f"the key {how} its random numbers are the same in each step"
        finding_by_key[name, where] = Finding(name, "idle", "proved", detail, source=where)
    return list(finding_by_key.values())


_Fact = tuple[bool, frozenset[int]]
"""Whether a value may be another one in each step, and the leaves of the state that it follows from."""
_RANDOM = ("random_bits", "rng_bit_generator", "rng_uniform", "random_gamma", "threefry2x32")


def _follow(jaxpr: Any, inputs: Sequence[_Fact], draws: list[tuple[Any, frozenset[int]]]) -> list[_Fact]:
    """The facts of a program's outputs; `draws` gets what is drawn from keys that are the same in each step."""
    same: _Fact = (False, frozenset())
    known = dict(zip(jaxpr.invars, inputs, strict=True)) | dict.fromkeys(jaxpr.constvars, same)
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, inner_programs(equation)
        facts = [same if isinstance(atom, core.Literal) else known[atom] for atom in equation.invars]
        if name in _RANDOM and not facts[0][0]:
            draws.append((equation, facts[0][1]))
        if name in CALLS and inner and len(inner[0].invars) == len(facts):
            results = _follow(inner[0], facts, draws)
        else:
            results = [_joined(facts)] * len(equation.outvars)
        if name in ("scan", "while", "cond"):
            results = _follow_loop(equation, inner, facts, draws)
        known |= zip(equation.outvars, results, strict=True)
    return [same if isinstance(atom, core.Literal) else known[atom] for atom in jaxpr.outvars]


def _follow_loop(
    equation: Any, inner: Sequence[Any], facts: list[_Fact], draws: list[tuple[Any, frozenset[int]]]
) -> list[_Fact]:
    """The facts of the results of a loop or a choice: until the carries' facts hold after a turn as before it."""
    name, operands = equation.primitive.name, operands_of_programs(equation)
    first, carries = carried_operands(equation)
    while True:
        seen: list[tuple[Any, frozenset[int]]] = []
        results = [
            _follow(program, [facts[number] for number in numbers], seen)
            for program, numbers in zip(inner, operands, strict=True)
        ]
        if name == "cond":
            results = [[_joined([facts[0], *row]) for row in zip(*results, strict=True)]]
        after = list(facts)
        for index in range(carries):
            tested = results[0][0] if name == "while" else (False, frozenset())
            after[first + index] = _joined([facts[first + index], results[-1][index], tested])
        if after == facts:
            draws += seen
            return results[-1] if name == "cond" else [*facts[first : first + carries], *results[-1][carries:]]
        facts = after


def _joined(facts: Sequence[_Fact]) -> _Fact:
    return any(moves for moves, _ in facts), frozenset().union(*(leaves for _, leaves in facts))
