"""Which values of a traced training step are the gradient of which leaf of its parameters.

JAX writes into the name stack of an equation which transformations made it: `jvp(...)` are the forward pass of a
gradient, `transpose(jvp(...))` its backward pass. A value of a backward pass that is read outside of it is a
*cotangent*: the gradient of what the forward pass was given. It is assigned by facts of how JAX transposes a program:

1. It has the shape and dtype of what it is the gradient of (under `vmap` it may have the mapped axis as well).
2. The equation that finishes it is the transpose of the equation that read the leaf first, and has its Python stack,
   down to the column; a custom derivative has the beginning of that stack. A sum hands its cotangent on, so that all
   its terms share one.
3. Both equations have the same scope, which in Flax is the module's path.
4. The transpose of a product reads the other factor.
5. A backward pass goes through the equations in reverse, and through the operands of one loop or choice in order:
   leaves that are read by one line in turn (layers of a Python loop) get their cotangents in the reversed order.

Where these leave several, the cotangent is not assigned, and its candidates are named. A gradient that the program
computes by hand, or by forward differentiation, is none of these: the program does not tell it from other numbers.
What a custom derivative mixes within the backward pass is a part of the gradient.
"""

import bisect
import functools
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jaxlib
import numpy as np
from jax.extend import core

from tljax.train.memory import inner_programs

Read = tuple[int, ...]
"""A place where a program reads a value: pairs (number of an equation, number of the program within it, as
`inner_programs` counts them) from the outside in, then (number of the equation, number of its operand), or
(-1, number of the result) where the innermost program gives the value back."""


class Cotangent(NamedTuple):
    """What a value is the gradient of."""

    leaves: tuple[str, ...]
    """The paths of the leaves: of each of them if assigned, else of one of them or of something made of them."""
    assigned: bool


def cotangents(program: Any, leaves: Mapping[int, str]) -> dict[Read, Cotangent]:
    """For each place outside a backward pass that reads a gradient of parameters, whose gradient it is.

    `program` is a closed jaxpr, as `jax.make_jaxpr` gives it; `leaves` has the path of the parameter of each input that
    is one. Gradients of what is no parameter (of a batch) are left out.

    >>> loss = lambda params, x: (x @ params["w"] + params["b"][None]).sum()
    >>> shapes = {"b": jax.ShapeDtypeStruct((2,), "float32"), "w": jax.ShapeDtypeStruct((3, 2), "float32")}
    >>> program = jax.make_jaxpr(jax.grad(loss))(shapes, jax.ShapeDtypeStruct((5, 3), "float32"))
    >>> cotangents(program, {0: "b", 1: "w"})
    {(-1, 0): Cotangent(leaves=('b',), assigned=True), (-1, 1): Cotangent(leaves=('w',), assigned=True)}
    """
    paths = tuple(leaves.values())
    bits = {number: 1 << index for index, number in enumerate(leaves)}
    gradients: dict[int, _Role] = {}
    for _ in range(_GRADIENTS_IN_TURN):  # where a second gradient is taken follows from the first one (SAM)
        walk = _Walk(gradients)
        inputs = [walk.input(_Role(*[bits.get(number, 0)] * 2)) for number in range(len(program.jaxpr.invars))]
        results = walk.walk(program.jaxpr, inputs, (), _Context())
        walk.read(results, program.jaxpr.outvars, (), -1)
        before, gradients = gradients, _assigned(walk)
        if gradients == before or not walk.gradients_in_turn():
            break
    labels = {}
    for place, value, _ in walk.crossings:
        role = gradients[value.number]
        if mask := role.stands or role.derived:
            names = tuple(path for index, path in enumerate(paths) if mask >> index & 1)
            labels[place] = Cotangent(names, bool(role.stands))
    return labels


_GRADIENTS_IN_TURN = 4
"""Gradients each of which is taken at a place that the one before has moved, and what is not assigned beyond."""


# The program as one list of equations, with calls written out.


class _Role(NamedTuple):
    """What a value has to do with the parameters; a bit for each leaf."""

    stands: int = 0
    """The leaves for which it stands, element for element: a copy, a cast, a part, a perturbed leaf. 0 for none."""
    derived: int = 0
    """All the leaves from which it is computed."""


class _Context(NamedTuple):
    """Where an equation is: what transformed it, and the scopes that it is in."""

    transforms: tuple[str, ...] = ()
    scopes: tuple[str, ...] = ()
    custom: bool = False
    """Whether it is within a function whose derivative is another one's: its sums may not hand their cotangent on."""
    backward: bool = False
    recomputed: bool = False
    """Whether it is a part of a forward pass that a backward pass computes again."""
    depth: int = 0
    """Of how many gradients it is the forward pass, or a part of it; 0 of the backward pass of the outermost."""

    def within(self, equation: Any) -> "_Context":
        """The context of an equation of a program that has this one."""
        custom = equation.primitive.name.startswith("custom_")
        return _context(self, equation.source_info.name_stack.stack, custom)


@functools.lru_cache(maxsize=10_000)
def _context(outer: _Context, stack: tuple[Any, ...], custom: bool) -> _Context:
    """The context of an equation with a name stack, in a program that has the outer one."""
    transforms = outer.transforms + tuple(part.name for part in stack if type(part).__name__ == "Transform")
    scopes = outer.scopes + tuple(part.name for part in stack if type(part).__name__ == "Scope")
    names = [name for name in transforms if name in ("jvp", "transpose")]
    backward = "transpose" in names
    forward = sum(name == "jvp" and before != "transpose" for before, name in zip([None, *names], names, strict=False))
    return _Context(
        transforms,
        scopes,
        outer.custom or custom,
        backward,
        backward and "rematted_computation" in scopes,
        0 if names[:1] == ["transpose"] else forward,
    )


@dataclass
class _Equation:
    """An equation of the list."""

    order: int
    equation: Any
    context: _Context
    operands: "list[_Value]"


@dataclass
class _Value:
    """What is known of a value."""

    number: int
    role: _Role
    producer: _Equation | None = None
    output: int = 0
    """Which output of the producer it is."""
    sums: "tuple[_Value, ...]" = ()
    """What was given to the forward pass and has this value's cotangent, since it is a term of it."""
    seeds: int = 0
    """Of a value of a backward pass, the equations that began the pass; a bit for each."""

    @property
    def backward(self) -> bool:
        return self.producer is not None and self.producer.context.backward

    @property
    def depth(self) -> int:
        return self.producer.context.depth if self.producer else 0


class _Site(NamedTuple):
    """An operand of an equation of a forward pass: what has its cotangent, if that pass is differentiated in it."""

    equation: _Equation
    operand: int
    sources: tuple[_Value, ...]
    aval: Any


class _Crossing(NamedTuple):
    place: Read
    value: _Value
    aval: Any


@dataclass
class _Walk:
    """The list of equations as far as it is read, what forward passes were given, and what backward passes gave."""

    gradients: Mapping[int, _Role]
    """The roles of values that cross, as known from a walk before."""
    values: int = 0
    equations: int = 0
    sites: list[_Site] = field(default_factory=list)
    crossings: list[_Crossing] = field(default_factory=list)
    backward: list[int] = field(default_factory=list)
    """The places of the equations of backward passes in the list."""

    def gradients_in_turn(self) -> bool:
        """Whether a forward pass follows a backward pass, so that it may be given what that one gave."""
        first = self.backward[0] if self.backward else math.inf
        return any(site.equation.order > first and not site.equation.context.recomputed for site in self.sites)

    def input(self, role: _Role) -> _Value:
        """A value that no equation of the list computes."""
        self.values += 1
        return _Value(self.values, role)

    def read(self, values: Sequence[_Value], variables: Sequence[Any], path: Read, number: int) -> None:
        """Note which of the values that are read outside of a backward pass are of one."""
        for index, (value, variable) in enumerate(zip(values, variables, strict=True)):
            if value.backward and _is_float(variable.aval):
                self.crossings.append(_Crossing((*path, number, index), value, variable.aval))

    def role(self, value: _Value) -> _Role:
        """The role of a value that is read outside of a backward pass."""
        return self.gradients.get(value.number, value.role) if value.backward else value.role

    def walk(self, jaxpr: Any, inputs: Sequence[_Value], path: Read, context: _Context) -> list[_Value]:
        """Read a program at a path of equations; what it gives."""
        constants = {variable: self.input(_Role()) for variable in jaxpr.constvars}
        known: dict[Any, _Value] = constants | dict(zip(jaxpr.invars, inputs, strict=True))

        def value_of(atom: Any) -> _Value:
            return self.input(_Role()) if isinstance(atom, core.Literal) else known[atom]

        for number, equation in enumerate(jaxpr.eqns):
            operands = [value_of(atom) for atom in equation.invars]
            known |= zip(equation.outvars, self.equation(equation, operands, path, number, context), strict=True)
        return [value_of(atom) for atom in jaxpr.outvars]

    def equation(
        self, equation: Any, operands: list[_Value], path: Read, number: int, context: _Context
    ) -> list[_Value]:
        """Read an equation; what it gives."""
        context, name, inner = context.within(equation), equation.primitive.name, inner_programs(equation)
        if name in CALLS and inner and len(inner[0].invars) == len(operands):
            return self.walk(inner[0], operands, (*path, number, 0), context)
        if not context.backward:
            self.read(operands, equation.invars, path, number)
        plain = not context.transforms or set(context.transforms) <= {"vmap"}
        if plain and name in ("scan", "while", "cond"):
            return self.entered(equation, operands, inner, (*path, number), context)
        self.equations += 1
        record = _Equation(self.equations, equation, context, operands)
        roles = [value.role for value in operands] if context.backward else [self.role(value) for value in operands]
        outputs = [self.input(_role_of(equation, roles, variable.aval)) for variable in equation.outvars]
        seeds = 0
        if context.backward and not context.recomputed:
            seeds = _union(value.seeds for value in operands) or 1 << len(self.backward)
            self.backward.append(record.order)
        for index, output in enumerate(outputs):
            output.producer, output.output, output.seeds = record, index, seeds
        if context.depth or context.recomputed:
            self.forward(record, outputs)
        return outputs

    def forward(self, record: _Equation, outputs: list[_Value]) -> None:
        """Note what an equation of a forward pass is given from outside of it, directly or as a term of a sum."""
        variables, context = record.equation.invars, record.context
        sources = [(value,) if _is_given(value, context) else value.sums for value in record.operands]
        for index, (source, operand) in enumerate(zip(sources, variables, strict=True)):
            if not _is_float(operand.aval):
                continue
            if source:
                self.sites.append(_Site(record, index, source, operand.aval))
            value, before = record.operands[index], operand
            while inner_programs(record.equation) and value.producer and _is_hoisted(value.producer):
                before, value = value.producer.equation.invars[0], value.producer.operands[0]
                if _is_given(value, context):
                    self.sites.append(_Site(record, index, (value,), before.aval))
        first = [] if context.custom else sources[: _TERMS.get(record.equation.primitive.name, 0)]
        passed = [
            value
            for source, operand in zip(first, variables, strict=False)
            for value in source
            if operand.aval.shape == record.equation.outvars[0].aval.shape
        ]
        if passed:
            outputs[0].sums = tuple({value.number: value for value in passed}.values())

    def entered(
        self, equation: Any, operands: list[_Value], inner: list[Any], path: Read, context: _Context
    ) -> list[_Value]:
        """Read the programs of a loop or a choice that holds whole gradients; what it gives."""
        derived = _union(self.role(value).derived for value in operands)
        results = []
        for index, (program, numbers) in enumerate(zip(inner, operands_of_programs(equation), strict=True)):
            begun = [self.input(self.role(operands[number])) for number in numbers]
            result = self.walk(program, begun, (*path, index), context)
            self.read(result, program.outvars, (*path, index), -1)
            results.append([self.role(value) for value in result])
        if equation.primitive.name == "while":
            results = results[1:]
        outputs = []
        for roles in zip(*results, strict=True):
            stands = roles[0].stands if len({role.stands for role in roles}) == 1 else 0
            outputs.append(self.input(_Role(stands, derived | _union(role.derived for role in roles))))
        return outputs


def operands_of_programs(equation: Any) -> list[list[int]]:
    """The numbers of the operands that are given to each program of a loop or a choice."""
    numbers, parameters = list(range(len(equation.invars))), equation.params
    if equation.primitive.name == "cond":
        return [numbers[1:]] * len(parameters["branches"])
    if equation.primitive.name == "scan":
        return [numbers]
    test_constants, body_constants = parameters["cond_nconsts"], parameters["body_nconsts"]
    carried = numbers[test_constants + body_constants :]
    return [numbers[:test_constants] + carried, numbers[test_constants : test_constants + body_constants] + carried]


def _union(masks: Iterable[int]) -> int:
    union = 0
    for mask in masks:
        union |= mask
    return union


def _is_given(value: _Value, context: _Context) -> bool:
    """Whether a forward pass of this context is given a value from outside of it."""
    if context.recomputed:
        return not value.backward
    return value.backward or value.depth < context.depth


def _is_hoisted(equation: _Equation) -> bool:
    """Whether it may be what a loop does to a constant: forward that is done before the loop, and backward within."""
    context = equation.context
    return equation.equation.primitive.name == "broadcast_in_dim" and (context.recomputed or not context.transforms)


# fmt: off
CALLS = frozenset((
    "jit", "pjit", "closed_call", "core_call", "core_closed_call", "custom_jvp_call", "custom_vjp_call",
    "custom_vjp_call_jaxpr", "remat", "remat2", "checkpoint", "shard_map", "pmap", "xla_pmap",
))
"""What gives the results of its first program on its operands."""
_STRUCTURAL = frozenset((
    "convert_element_type", "copy", "copy_p", "reshape", "transpose", "squeeze", "expand_dims", "slice", "rev",
    "dynamic_slice", "optimization_barrier", "sharding_constraint", "device_put", "reduce_precision", "pvary",
    "psum", "psum_invariant", "psum2", "all_gather", "stop_gradient", "name",
))
"""What gives elements of its first operand, or sums of them over devices."""
_ELEMENTWISE = frozenset((
    "add", "sub", "mul", "div", "neg", "max", "min", "add_any", "select_n", "clamp", "sign", "sqrt", "rsqrt",
    "square", "integer_pow", "pow", "abs", "exp", "log", "tanh", "is_finite", "and", "or", "not", "eq", "ne", "lt",
    "le", "gt", "ge", "nextafter", "logistic", "expm1", "log1p", "round", "floor", "ceil",
))
_TERMS = {"add": 2, "add_any": 2, "sub": 1, "copy": 1, "copy_p": 1}
"""How many of its first operands an equation gives its own cotangent."""
_IN_ORDER = ("concatenate", "stack")
"""What has the cotangents of its operands in their order, as loops and choices have."""
_PRODUCTS = ("dot_general", "mul", "conv_general_dilated")
# fmt: on


def _is_float(aval: Any) -> bool:
    return jax.numpy.issubdtype(getattr(aval, "dtype", bool), jax.numpy.inexact)


def _role_of(equation: Any, roles: Sequence[_Role], aval: Any) -> _Role:
    """The role of an equation's output that has this shape."""
    name, derived = equation.primitive.name, _union(role.derived for role in roles)
    if name in _STRUCTURAL and roles:
        return _Role(roles[0].stands, derived)
    if name in _IN_ORDER:
        whole = list(roles)
    elif name in _ELEMENTWISE:  # without a number for all elements
        whole = [role for role, operand in zip(roles, equation.invars, strict=True) if operand.aval.shape == aval.shape]
    else:
        whole = []
    known = all(role.stands or not role.derived for role in whole)  # noise and moments are of no leaf
    return _Role(_union(role.stands for role in whole) if known else 0, derived)


# Which cotangent is whose.


class _Part(NamedTuple):
    """A cotangent, or a term of it: what the transpose of one equation has added to it."""

    value: _Value
    aval: Any

    @property
    def producer(self) -> _Equation:
        assert self.value.producer is not None
        return self.value.producer


def _assigned(walk: _Walk) -> dict[int, _Role]:
    """The role of each value that crosses: `stands` for the leaves if it is assigned, else `derived` its candidates."""
    crossings = {crossing.value.number: crossing for crossing in walk.crossings}
    frames = _Frames()
    whole = _roles_of_parts(
        walk, {number: [_Part(crossing.value, crossing.aval)] for number, crossing in crossings.items()}, frames
    )
    terms = _roles_of_parts(walk, {number: _terms(crossing) for number, crossing in crossings.items()}, frames)
    return {number: _agreed(whole[number], terms[number]) for number in crossings}


def _agreed(a: _Role, b: _Role) -> _Role:
    """What two ways of assigning a cotangent say together."""
    if a.stands and b.stands:
        return a if a == b else _Role(0, a.stands | b.stands)
    return a if a.stands else b


def _roles_of_parts(walk: _Walk, parts: Mapping[int, list[_Part]], frames: "_Frames") -> dict[int, _Role]:
    """The roles of cotangents that are made of these parts: that of each of them, if it is one."""
    sites: dict[Any, list[_Site]] = {}
    for site in walk.sites:
        sites.setdefault(_shape(site.aval), []).append(site)
    classes: dict[Any, dict[int, _Part]] = {}
    for part in (part for several in parts.values() for part in several):
        # a value may be a part of several cotangents: it is the gradient of the same in all
        classes.setdefault((frames.stack(part.producer), _shape(part.aval)), {})[part.value.number] = part
    part_roles: dict[int, _Role] = {}
    for (stack, shape), members in classes.items():
        part_roles |= _roles_of_class(walk, list(members.values()), stack, shape, sites, frames)
    roles = {}
    for number, several in parts.items():
        several_roles = [part_roles[part.value.number] for part in several]
        same = len({role.stands for role in several_roles}) == 1
        candidates = _union(role.stands or role.derived for role in several_roles)
        roles[number] = _Role(several_roles[0].stands if same else 0, candidates)
    return roles


def _terms(crossing: _Crossing) -> list[_Part]:
    """The terms of a cotangent that is a sum, or itself."""
    parts, waiting = [], [crossing.value]
    while waiting:
        value = waiting.pop()
        if value.producer and value.producer.equation.primitive.name == "add_any":
            waiting += [term for term in value.producer.operands if term.backward]
        else:
            parts.append(_Part(value, crossing.aval))
    return parts


def _shape(aval: Any) -> tuple[Any, Any]:
    return aval.shape, aval.dtype


def _roles_of_class(
    walk: _Walk, parts: list[_Part], stack: Any, shape: Any, sites: Mapping[Any, list[_Site]], frames: "_Frames"
) -> dict[int, _Role]:
    """The roles of terms of cotangents that have one shape and one Python stack."""
    candidates = list(sites.get(shape, []))
    if any("vmap" in part.producer.context.transforms for part in parts):
        candidates += [site for other, more in sites.items() if _is_mapped(other, shape) for site in more]
    site_by_number: dict[int, _Site] = {}
    close: list[_Site] = []
    for among in (
        [site for site in candidates if not site.equation.context.recomputed],
        [site for site in candidates if site.equation.context.recomputed],
    ):
        exact = [site for site in among if frames.stack(site.equation) == stack]
        custom = [site for site in among if frames.stack(site.equation)[: len(stack)] == stack]
        lines = {frames.stack(site.equation) for site in exact or custom}
        close += exact or custom
        site_by_number = _paired(walk, parts, exact or custom, ordered=len(lines) == 1) | site_by_number
    if not close and len({_sources(site) for site in candidates}) == 1:
        site_by_number = {part.value.number: candidates[0] for part in parts}
    everything = [site for more in sites.values() for site in more]
    unknown = _Role(0, _role_of_sites(walk, close or candidates or everything).derived)
    return {
        part.value.number: _role_of_sites(walk, [site_by_number[part.value.number]])
        if part.value.number in site_by_number
        else unknown
        for part in parts
    }


def _is_mapped(smaller: tuple[Any, Any], larger: tuple[Any, Any]) -> bool:
    """Whether one shape is the other with axes of `vmap`, whatever their places."""
    (few, dtype), (many, other) = smaller, larger
    rest = list(many)
    for size in few:
        if size not in rest:
            return False
        rest.remove(size)
    return bool(dtype == other and rest)


def _role_of_sites(walk: _Walk, sites: Sequence[_Site]) -> _Role:
    """What has a cotangent at the one site, or the leaves that may have it at one of several."""
    roles = [walk.role(value) for site in sites for value in site.sources]
    single = len(sites) == 1 and all(role.stands.bit_count() <= 1 for role in roles)
    stands = _union(role.stands for role in roles)
    return _Role(stands if single else 0, _union(role.stands or role.derived for role in roles))


def _sources(site: _Site) -> tuple[int, ...]:
    return tuple(value.number for value in site.sources)


def _paired(walk: _Walk, parts: Sequence[_Part], sites: Sequence[_Site], ordered: bool) -> dict[int, _Site]:
    """The site of each of some terms, as far as it is certain; keys are the numbers of their values."""
    if len({_sources(site) for site in sites}) == 1:
        return {part.value.number: sites[0] for part in parts}
    site_by_number: dict[int, _Site] = {}
    for part in parts:
        in_scope = [site for site in sites if _module(site.equation) == _module(part.producer)]
        left = _by_factor(part, in_scope or list(sites))
        if len({_sources(site) for site in left}) == 1:
            site_by_number[part.value.number] = left[0]
    if not ordered or len(site_by_number) == len(parts):
        return site_by_number
    leaf_sites = [site for site in sites if any(walk.role(value).derived for value in site.sources)]
    for among in (list(sites), _without_repeats(sites), leaf_sites, _without_repeats(leaf_sites)):
        in_order = _in_order(parts, among, walk.backward)
        if in_order and all(_sources(in_order[number]) == _sources(site) for number, site in site_by_number.items()):
            return in_order
    return site_by_number


def _by_factor(part: _Part, sites: list[_Site]) -> list[_Site]:
    """The sites without the factors of products from which this term was computed, if all sites are products."""
    if any(site.equation.equation.primitive.name not in _PRODUCTS for site in sites):
        return sites
    read, waiting = set(), [part.producer]
    while waiting:
        for value in waiting.pop().operands:
            read.add(value.number)
            if value.producer and _traceback(value.producer) is _traceback(part.producer):
                waiting.append(value.producer)
    return [site for site in sites if site.equation.operands[1 - site.operand].number in read] or sites


def _module(equation: _Equation) -> tuple[str, ...]:
    """The scopes of an equation but for those that rematerialization adds."""
    return tuple(scope for scope in equation.context.scopes if scope not in _REMAT)


_REMAT = ("checkpoint", "rematted_computation", "remat")


def _traceback(equation: _Equation) -> Any:
    return equation.equation.source_info.traceback


def _without_repeats(sites: Sequence[_Site]) -> list[_Site]:
    """The sites without those that follow one of the same source: derivatives of a function are computed beside it."""
    return [
        site
        for before, site in zip((None, *sites), sites, strict=False)
        if not before or _sources(before) != _sources(site)
    ]


def _in_order(parts: Sequence[_Part], sites: Sequence[_Site], backward: Sequence[int]) -> dict[int, _Site]:
    """The site of each term by their order; empty if there is not one for each, or if they are of several passes.

    The last equation's comes first; those of one loop or choice come in order. After a backward pass, at the places
    `backward`, the next forward pass begins anew.
    """
    site_by_number: dict[int, _Site] = {}
    begun: list[_Site] = []
    pending: list[_Part] = []
    events: list[tuple[int, int, _Site | _Part]] = [(site.equation.order, site.operand, site) for site in sites]
    events += [(part.producer.order, part.value.output, part) for part in parts]
    for _, _, event in [*sorted(events, key=lambda event: event[:2]), (0, 0, None)]:
        if isinstance(event, _Part):
            pending.append(event)
            continue
        if pending or event is None:
            seeds = [part.value.seeds for part in pending]
            if len(pending) != len(begun) or not _is_ordered(begun) or not functools.reduce(operator.and_, seeds, -1):
                return {}
            begun.sort(key=lambda site: (-site.equation.order, site.operand))
            site_by_number |= {part.value.number: site for part, site in zip(pending, begun, strict=True)}
            begun, pending = [], []
        if event is not None:
            if begun and _any_between(backward, begun[-1].equation.order, event.equation.order):
                begun = []  # nobody reads what that pass gave
            begun.append(event)
    return site_by_number


def _any_between(numbers: Sequence[int], low: int, high: int) -> bool:
    """Whether a number of an ascending sequence is between two others."""
    return bisect.bisect_right(numbers, low) < bisect.bisect_left(numbers, high)


def _is_ordered(sites: Sequence[_Site]) -> bool:
    """Whether no equation is read twice but loops and choices, which give the cotangents of operands in order."""
    orders = [site.equation.order for site in sites]
    equations = [site.equation.equation for site in sites]
    return len(set(orders)) == len(orders) or all(
        inner_programs(equation) or equation.primitive.name in _IN_ORDER for equation in equations
    )


class _Frames:
    """The Python stacks of equations without the frames of JAX, each looked up once."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[Any, ...]] = {}

    def stack(self, equation: _Equation) -> tuple[Any, ...]:
        """The frames from the outermost on, each as (identity of the code, instruction)."""
        traceback = _traceback(equation)
        if traceback is None:
            return ()
        if id(traceback) not in self.known:
            frames = [
                (id(code), instruction)
                for code, instruction in zip(*traceback.raw_frames(), strict=True)
                if not code.co_filename.startswith(_JAX)
            ]
            self.known[id(traceback)] = tuple(reversed(frames))
        return self.known[id(traceback)]


_JAX = tuple(os.path.dirname(str(module.__file__)) + os.sep for module in (jax, jaxlib))


# By value.


def by_value(
    program: Any, labels: Mapping[Read, Cotangent], inputs: Sequence[Any], gradients: Mapping[str, Any]
) -> dict[Read, Cotangent]:
    """The labels, with what was not assigned given to the one candidate whose gradient it is on numbers.

    `inputs` are numbers for the inputs of the program, and `gradients` those of a loss at these numbers by path. A
    multiple of a gradient, as of a scaled loss, is taken for it. What is read within a loop stays as it is, and so does
    what is 0.
    """
    doubtful = [place for place, label in labels.items() if not label.assigned]
    values: dict[Read, Any] = {}

    def values_read(inputs: Sequence[Any]) -> dict[Read, Any]:
        read: dict[Read, Any] = {}

        def noted(place: Read) -> Callable[[Any], Any]:
            return lambda value: read.setdefault(place, value)

        run(program, inputs, {place: noted(place) for place in doubtful})
        return read

    if doubtful:
        values = jax.jit(values_read)(list(inputs))
    result = dict(labels)
    for place, value in values.items():
        alike = [path for path in labels[place].leaves if _is_multiple(value, gradients[path])]
        if len(alike) == 1:
            result[place] = Cotangent((alike[0],), True)
    return result


def run(program: Any, inputs: Sequence[Any], at: Mapping[Read, Callable[[Any], Any]]) -> list[Any]:
    """What a closed jaxpr gives on numbers, if it reads at each place of `at` what the function makes of the value.

    Places within a loop or a choice are passed by.

    >>> program = jax.make_jaxpr(lambda a: (a * 2, a * 3))(1.0)
    >>> [float(number) for number in run(program, [1.0], {(1, 0): lambda a: a + 1})]
    [2.0, 6.0]
    """
    return _run(program.jaxpr, program.consts, inputs, (), at)


def _run(
    jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any], path: Read, at: Mapping[Read, Callable[[Any], Any]]
) -> list[Any]:
    """What a program at a path of equations gives, as `run` says."""
    known = dict(zip(jaxpr.invars, inputs, strict=True)) | dict(zip(jaxpr.constvars, consts, strict=True))

    def read(atoms: Sequence[Any], number: int) -> list[Any]:
        values = [atom.val if isinstance(atom, core.Literal) else known[atom] for atom in atoms]
        places = [(*path, number, index) for index in range(len(values))]
        return [at[place](value) if place in at else value for place, value in zip(places, values, strict=True)]

    for number, equation in enumerate(jaxpr.eqns):
        operands, inner = read(equation.invars, number), inner_programs(equation)
        name = equation.primitive.name
        if name in CALLS - _ON_DEVICES and inner and len(inner[0].invars) == len(operands):
            closed = next((p for p in equation.params.values() if getattr(p, "jaxpr", None) is inner[0]), None)
            results = _run(inner[0], getattr(closed, "consts", ()), operands, (*path, number, 0), at)
        else:
            bound = equation.primitive.bind(*operands, **equation.params)
            results = bound if equation.primitive.multiple_results else [bound]
        known.update(zip(equation.outvars, results, strict=True))
    return read(jaxpr.outvars, -1)


_ON_DEVICES = frozenset(("shard_map", "pmap", "xla_pmap"))


def _is_multiple(value: Any, gradient: Any) -> bool:
    """Whether an array is another one times a number, and neither is 0 or not finite."""
    a, b = (np.asarray(array, np.float64).reshape(-1) for array in (value, gradient))
    if a.size != b.size or not np.isfinite(a).all() or not np.isfinite(b).all() or not a.any() or not b.any():
        return False
    return a.size > 1 and bool(np.linalg.norm(a - (a @ b) / (b @ b) * b) <= 1e-3 * np.linalg.norm(a))
