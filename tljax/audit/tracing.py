"""Anyone's training step as a traced program: which inputs and outputs are which leaves of its state."""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import source_info_util
from jax.extend import core

from tljax import paths, plugins
from tljax.audit import program, purity
from tljax.types import InputError


class Traced(NamedTuple):
    """A step as a program from the leaves of its state and of a batch to the leaves of its next state."""

    closed: Any
    """The closed jaxpr, which gives the next state."""
    whole: Any
    """The closed jaxpr that gives the next state, and then the other arrays that the step gives."""
    paths: tuple[str, ...]
    """The path of each leaf of the state."""
    leaves: tuple[Any, ...]
    """The leaves of the state and then of the batch, as they were given: arrays, numbers or shapes."""
    positions: tuple[int, ...]
    """For each leaf of the parameters, its place among the leaves of the state."""
    params: Any
    """The tree of the parameters' shapes."""
    notes: tuple[str, ...] = ()


def trace(step: Callable[..., Any], state: Any, batch: Any, params: Callable[[Any], Any] | None = None) -> Traced:
    """Trace a step from shapes alone; see `steps.step` for what it may be.

    Raises InputError, with the user's line, for a step that does not trace, is not pure, or changes the structure of
    its state; and for `params` that do not pick leaves of the state.
    """
    users = step
    step, state, params, rename = _without_modules(step, state, params)
    leaves, tree = jax.tree.flatten(state)
    batch_leaves, batch_tree = jax.tree.flatten(batch)
    names = [rename(path) for path in paths.names(state)]
    notes: list[str] = []
    numbers = [isinstance(leaf, bool | int | float | complex) for leaf in leaves]
    arrays = [_is_array(leaf) for leaf in leaves]
    dynamic = [array or number for array, number in zip(arrays, numbers, strict=True)]
    batch_is_traced = [_is_array(leaf) or isinstance(leaf, bool | int | float | complex) for leaf in batch_leaves]
    try:
        result = _traced(
            (step, users), (leaves, tree, dynamic, names), (batch_leaves, batch_tree, batch_is_traced), params
        )
    except _Concrete as error:
        if not any(numbers):
            raise _untraceable(error.error) from error.error
        try:  # numbers of Python that the step branches on, as Equinox's modules hold them
            result = _traced(
                (step, users), (leaves, tree, arrays, names), (batch_leaves, batch_tree, batch_is_traced), params
            )
        except _Concrete as again:
            raise _untraceable(again.error) from again.error
        fixed = [name for name, number in zip(names, numbers, strict=True) if number]
        notes.append(f"numbers of Python are taken as they are: {paths.some(fixed)}")
        dynamic = arrays
    whole, picked, shapes = result
    kept = [number for number, is_dynamic in enumerate(dynamic) if is_dynamic]
    places = {old: new for new, old in enumerate(kept)}
    inputs = [leaves[number] for number in kept]
    inputs += [leaf for leaf, is_dynamic in zip(batch_leaves, batch_is_traced, strict=True) if is_dynamic]
    return Traced(
        _first_results(whole, len(kept)),
        whole,
        tuple(names[number] for number in kept),
        tuple(inputs),
        tuple(places[number] for number in picked),
        shapes,
        tuple(notes),
    )


def _first_results(whole: Any, count: int) -> Any:
    """A program that gives the first results of another."""
    names = whole.jaxpr.debug_info.with_unknown_names()
    return whole.replace(jaxpr=whole.jaxpr.replace(outvars=whole.jaxpr.outvars[:count], debug_info=names))


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


class _Concrete(Exception):
    """A step that asks for the value of what is traced."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _traced(
    steps: tuple[Callable[..., Any], Callable[..., Any]],
    state_parts: Any,
    batch_parts: Any,
    params: Callable[[Any], Any] | None,
) -> tuple[Any, list[int], Any]:
    """The program, the places of the parameters among all leaves of the state, and their tree of shapes.

    `steps` are the function to trace, and the user's step, which it calls.
    """
    step, users = steps
    leaves, tree, dynamic, names = state_parts
    batch_leaves, batch_tree, batch_dynamic = batch_parts
    count = sum(dynamic)
    picked: list[int] = []
    shapes: list[Any] = []

    def function(*inputs: Any) -> list[Any]:
        remaining = iter(inputs[:count])
        state_leaves = [next(remaining) if moves else leaf for leaf, moves in zip(leaves, dynamic, strict=True)]
        rest = iter(inputs[count:])
        batch = [next(rest) if moves else leaf for leaf, moves in zip(batch_leaves, batch_dynamic, strict=True)]
        state = jax.tree.unflatten(tree, state_leaves)
        places, shape = _picked(state, state_leaves, dynamic, params)
        picked[:], shapes[:] = places, [shape]
        result = step(state, jax.tree.unflatten(batch_tree, batch))
        after = _next_state(result, tree)
        state_ids = {id(leaf) for leaf in jax.tree.leaves(after)}
        others = [leaf for leaf in jax.tree.leaves(result) if isinstance(leaf, jax.Array) and id(leaf) not in state_ids]
        return _matched(state_leaves, after, dynamic, names) + others

    avals = [leaf for leaf, moves in zip(leaves, dynamic, strict=True) if moves]
    avals += [leaf for leaf, moves in zip(batch_leaves, batch_dynamic, strict=True) if moves]
    before = {} if purity.is_jitted(users) else purity.snapshot(users)
    try:
        closed: Any = jax.make_jaxpr(function)(*map(_shape, avals))
    except InputError:
        raise
    except jax.errors.UnexpectedTracerError as error:
        raise _impure("it keeps a tracer of an earlier call", error) from error
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError, TypeError) as error:
        raise _Concrete(error) from error
    except jax.errors.JAXTypeError as error:
        raise _Concrete(error) from error
    except Exception as error:  # whatever a stranger's step raises
        raise _untraceable(error) from error
    if not purity.is_jitted(users):
        _require_pure(users, before, closed, function, list(map(_shape, avals)))
    return closed, list(picked), shapes[0]


def _shape(leaf: Any) -> Any:
    """What a leaf is traced as: numbers of Python keep their weak type."""
    if isinstance(leaf, bool | int | float | complex):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _untraceable(error: Exception) -> InputError:
    where = user_line(error)
    at = f" at {where}" if where else ""
    words, _, _ = plugins.words(error).partition(" The error occurred while tracing")  # the function of this file
    reason = f"{type(error).__name__}: {words[:300].rstrip('. ')}"
    return InputError(f"the step cannot be traced{at} ({reason}): jax.jit has to accept it")


def _impure(what: str, error: Exception | None = None) -> InputError:
    where = user_line(error) if error else None
    at = f" at {where}" if where else ""
    return InputError(f"the step is not pure{at}: {what}; give all that it reads and writes in its state")


def user_line(error: BaseException) -> str | None:
    """The innermost line of the user's source in an error's traceback, as `loop.py:12 (update)`."""
    line, traceback = None, error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        file = code.co_filename.replace("\\", "/")
        library = not source_info_util.is_user_filename(code.co_filename) or program.is_library(file)
        if not library:
            line = f"{file.rpartition('/')[2]}:{traceback.tb_lineno} ({code.co_name})"
        traceback = traceback.tb_next
    return line


def _require_pure(
    step: Callable[..., Any],
    before: purity.Snapshot,
    closed: Any,
    function: Callable[..., Any],
    avals: Sequence[Any],
) -> None:
    """Raise InputError if tracing a step a second time gives another program, or changes what the step reads.

    `before` is of the time before the first trace. What is changed once, as a cache is, is no fault.
    """
    between = purity.snapshot(step)
    if count(closed.jaxpr) > _MOST_TWICE and purity.changed(before, between) is None:
        return
    try:
        again: Any = jax.make_jaxpr(lambda *inputs: function(*inputs))(*avals)  # another function: no cached trace
    except jax.errors.UnexpectedTracerError as error:
        raise _impure("it keeps a tracer of an earlier call", error) from error
    except Exception as error:
        raise _impure(
            f"it can be traced once, and a second time not ({plugins.describe(error)[:200]})", error
        ) from error
    different = _difference(closed.jaxpr, again.jaxpr, closed.consts, again.consts)
    if different is not None:
        where = program.line_of(different) if different else None
        at = f" at {where}" if where else ""
        raise InputError(
            f"the step is not pure{at}: traced a second time it is another program (by a counter, or random numbers "
            "outside of JAX?); give all that it reads and writes in its state"
        )
    variable = purity.changed(between, purity.snapshot(step))
    if variable is not None:
        raise InputError(
            f"the step is not pure: each call changes {variable}, so that the next one may be another program; keep it "
            "in the state"
        )


_MOST_TWICE = 3000
"""The equations of a step, beyond which it is traced once."""


def count(jaxpr: Any) -> int:
    """The number of equations of a program, with those of programs within."""
    return sum(1 + sum(map(count, inner)) for _, inner in _equations(jaxpr))


def _equations(jaxpr: Any) -> list[tuple[Any, list[Any]]]:
    rows = []
    for equation in jaxpr.eqns:
        inner = []
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    inner.append(part)
        rows.append((equation, inner))
    return rows


def _difference(a: Any, b: Any, a_consts: Sequence[Any] = (), b_consts: Sequence[Any] = ()) -> Any:
    """The first equation in which two programs differ; '' if it is none of them, None if they are the same."""
    if len(a_consts) != len(b_consts) or len(a.eqns) != len(b.eqns):
        return next((x for x, y in zip(a.eqns, b.eqns, strict=False) if x.primitive is not y.primitive), "")
    for x, y in zip(a_consts, b_consts, strict=True):
        if x is not y and not _same_number(x, y):
            return ""
    for (x, inner), (y, others) in zip(_equations(a), _equations(b), strict=True):
        if x.primitive is not y.primitive or len(inner) != len(others):
            return x
        for p, q in zip(x.invars, y.invars, strict=False):
            literals = isinstance(p, core.Literal), isinstance(q, core.Literal)
            if literals[0] != literals[1] or (literals[0] and not _same_number(p.val, q.val)):
                return x
        for p, q in zip(inner, others, strict=True):
            if p is not q and (within := _difference(p, q)) is not None:
                return within or x
    return None


def _same_number(a: Any, b: Any) -> bool:
    if jax.dtypes.issubdtype(getattr(a, "dtype", np.float32), jax.dtypes.extended):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and (a.size > 1 << 20 or a.tobytes() == b.tobytes())


def _picked(
    state: Any, leaves: Sequence[Any], dynamic: Sequence[bool], params: Callable[[Any], Any] | None
) -> tuple[list[int], Any]:
    """The places of the parameters among the leaves of a state, and the tree of their shapes."""
    tree = _default_params(state) if params is None else params(state)
    tree = jax.tree.map(lambda leaf: leaf if _is_array(leaf) else None, tree)
    places = {id(leaf): number for number, leaf in enumerate(leaves) if dynamic[number]}
    picked = []
    for path, leaf in paths.items(tree):
        if id(leaf) not in places:
            raise InputError(
                f"`params=` gives '{path}', which is no leaf of the state: pick leaves as they are, such as "
                "lambda state: state.params"
            )
        picked.append(places[id(leaf)])
    if not picked:
        raise InputError("the state has no parameters: name them, as `params=lambda state: state.params`")
    return picked, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _default_params(state: Any) -> Any:
    """The parameters of a state: its `params`, its first element, or the state itself."""
    if hasattr(state, "params"):
        return state.params
    if isinstance(state, Mapping) and "params" in state:
        return state["params"]
    if isinstance(state, tuple | list) and len(state) > 0:
        return state[0]
    return state


def _next_state(result: Any, tree: Any) -> Any:
    """The state among what a step gives: all of it, its first element, or as many elements as the state has."""
    structure = jax.tree.structure
    if structure(result) == tree:
        return result
    if isinstance(result, tuple | list) and len(result) > 0:
        if structure(result[0]) == tree:
            return result[0]
        width = (
            len(jax.tree.unflatten(tree, [0] * tree.num_leaves))
            if tree.node_data()
            and tree.node_data()[0]
            in (
                tuple,
                list,
            )
            else 0
        )
        if width and structure(type(result)(result[:width])) == tree:
            return type(result)(result[:width])
    candidates = [result] + ([result[0]] if isinstance(result, tuple | list) and result else [])
    state = jax.tree.unflatten(tree, [0] * tree.num_leaves)
    for candidate in candidates[::-1]:
        try:
            shared = set(paths.names(candidate)) & set(paths.names(state))
        except InputError:
            continue
        if shared:
            paths.same_structure(state, candidate, "the state", "what the step gives")
    raise InputError(
        "the step gives no state like the one that it is given: return the new state, alone or before all else"
    )


def _matched(before: Sequence[Any], after: Any, dynamic: Sequence[bool], names: Sequence[str]) -> list[Any]:
    """The leaves of the next state that are traced. Raises InputError if one changes its shape or dtype."""
    kept = []
    for old, new, moves, name in zip(before, jax.tree.leaves(after), dynamic, names, strict=True):
        if not moves:
            if new is not old and not (isinstance(old, bool | int | float | complex) and bool(new == old)):
                raise InputError(
                    f"the state's '{name}' changes and is no array: make it one, or keep it out of the state"
                )
            continue
        aval = jax.eval_shape(lambda: new) if not hasattr(new, "dtype") else new  # noqa: B023
        if (jnp.shape(new), aval.dtype) != (
            jnp.shape(old),
            jnp.result_type(old) if not hasattr(old, "dtype") else old.dtype,
        ):
            was, now = (f"{leaf.dtype}{list(jnp.shape(leaf))}" for leaf in (old, aval))
            raise InputError(f"the step changes the state's '{name}' from {was} to {now}: keep its shape and dtype")
        kept.append(new)
    return kept


# Modules of NNX, which a step changes in place.


def _without_modules(
    step: Callable[..., Any], state: Any, params: Callable[[Any], Any] | None
) -> tuple[Callable[..., Any], Any, Callable[[Any], Any] | None, Callable[[str], str]]:
    """A step that changes modules of NNX in place, as a function of their state: (step, state, params, rename).

    That function gives the next state and what the step gives.
    """
    nnx: Any = sys.modules.get("flax.nnx")  # a caller with modules has imported it; importing it takes two seconds
    is_module = nnx is not None and isinstance(state, nnx.Module | nnx.Optimizer)
    is_pair = (
        nnx is not None
        and isinstance(state, tuple | list)
        and len(state) > 0
        and any(isinstance(part, nnx.Module | nnx.Optimizer) for part in state)
    )
    if not (is_module or is_pair):
        return step, state, params, lambda path: path
    modules = tuple(state) if is_pair else (state,)
    graph, split = nnx.split(modules)
    pick = params

    def pure(leaves: Any, batch: Any) -> Any:
        merged = nnx.merge(graph, leaves)
        result = _call(step, merged, batch, is_pair)
        _, after = nnx.split(merged)
        before: Any = jax.tree.structure(leaves)
        if jax.tree.structure(after) != before:
            paths.same_structure(leaves, after, "the modules' state", "what the step leaves of it")
        return after, result

    def picked(leaves: Any) -> Any:
        if pick is not None:
            return pick(nnx.merge(graph, leaves) if is_module is False else nnx.merge(graph, leaves)[0])
        return nnx.state(nnx.merge(graph, leaves)[0], nnx.Param)

    return pure, split, picked, lambda path: path


def _call(step: Callable[..., Any], modules: Sequence[Any], batch: Any, is_pair: bool) -> Any:
    """Call a step with its modules one by one, step(model, optimizer, batch), or with all, step(state, batch)."""
    try:
        wanted = len(inspect.signature(step).parameters)
    except (TypeError, ValueError):
        wanted = len(modules) + 1
    if not is_pair or wanted == 2 != len(modules) + 1:
        return step(modules if is_pair else modules[0], batch)
    if wanted == len(modules):
        return step(*modules)
    return step(*modules, batch)
