"""An optimizer on the leaves that train, and its state from one phase to the next.

`masked` makes of any optax transformation one that frozen leaves never meet. A *cohort* is the leaves freed at one
phase: with `ages`, each cohort keeps counters of its own, so that a leaf freed late starts as on step 0, bias
correction included, while `tx` sees the gradients of all that trains. Each cohort runs `tx` on the whole and keeps
its own leaves; XLA drops the rest. `carry` makes the state of one phase fit for the next.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tljax import masks, paths, plugins
from tljax.types import Context, InputError, Mask, OptState, Params, Phase

Ages = Any
"""The tree of the parameters with, for each leaf, the phase since which it trains (see `masks.since`): an int, or an
int array of its elements."""


class Cohorts(NamedTuple):
    """The state of a transformation whose leaves were freed at different phases."""

    state: OptState
    """Of `tx`: the moments of every trained leaf, and the counters of the oldest cohort."""
    younger: tuple[tuple[Any, ...], ...]
    """The counters of each other cohort, oldest first. Schedules and injected hyper-parameters are common to all."""


def masked(
    tx: optax.GradientTransformation,
    mask: Mask | Callable[..., Mask],
    ages: Ages | Callable[[Params], Ages] | None = None,
    cohorts: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`tx` on the leaves that train; frozen ones own no state and keep their bits. The outermost wrapper.

    What stands outside `masked` (`optax.chain(masked(..), add_decayed_weights(..))`, `schedule_free(masked(..))`,
    `MultiSteps(masked(..))`) sees frozen leaves and may move them: put it inside, and give the updates to `apply`.
    Clipping, decay and norms inside `tx` see the trained leaves alone. A number in `mask` scales the leaf's update:
    the learning rate for SGD, Adam, AdamW and Lion, the update elsewhere. An array of bools zeroes the gradients it
    does not select before `tx` and their updates after it; an array of floats does so where it is 0, and scales the
    updates elsewhere. A frozen leaf's update is -0.0, which adds nothing to any bits (0.0 would turn -0.0 into 0.0).
    Gradients of the trained part alone, as `masks.split` gives them, are welcome: a hole stays a hole.

    `mask` is a tree, matched by path (see `masks.canonical`), or a function of the parameters that gives one, such as a
    strategy that needs no context: it is called with shapes and dtypes in `init` and each `update`, so that
    `flax.nnx.Optimizer` works. Without `ages` all leaves are of one cohort, and the state is `tx`'s own; else it is
    `Cohorts`. With `cohorts` the ages are ranks below that count, and their arrays may be traced.

    `tx` sees trees whose leaves come and go: labels of `optax.multi_transform` and masks of `optax.masked` inside it
    are functions of the tree, not trees; `optax.flatten` and GaLore, whose state is of other shapes than the leaves, do
    not last beyond a phase. Extra arguments of `update` that are trees like the parameters are split, and functions of
    the parameters (`value_fn` of L-BFGS) are given whole trees.

    Raises InputError for a leaf of `mask` that cannot be meant, a traced bool, a tree of the parameters inside `tx`,
    and when `update` is traced with the state of another mask.

    >>> tx = masked(optax.sgd(1.0), {"a": True, "b": False})
    >>> state = tx.init({"a": 1.0, "b": 1.0})
    >>> tx.update({"a": 2.0, "b": None}, state)[0]
    {'a': -2.0, 'b': None}
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: Params) -> OptState:
        if _is_placeholder(params):
            return _placeholder_state(inner, mask, ages, params)
        trained, _ = _split(params, _canonical(mask, params))
        if not jax.tree.leaves(trained):
            return optax.EmptyState()
        state = _init(inner, trained, params)
        born, _ = _ranks(trained, _given(ages, params), cohorts)
        return state if len(born) < 2 else _opened(state, _parts(trained, state).own(), len(born))

    def update(updates: Params, state: OptState, params: Params | None = None, **extra: Any) -> tuple[Params, OptState]:
        whole = updates if params is None else params
        leaves = _canonical(mask, whole, updates)
        trained, frozen = _split(updates, leaves)
        still = jax.tree.map(_nothing, frozen)
        if not jax.tree.leaves(trained):
            return masks.join(trained, still), state
        gradients = _over(leaves, trained, _selected)
        held, rest = (None, None) if params is None else _split(params, _canonical(mask, params))
        born, ranks = _ranks(trained, _given(ages, whole), cohorts)
        _check_state(inner, trained, len(born), state)
        more = {name: _of_trained(value, leaves, held, rest) for name, value in extra.items()}
        try:
            changes, state = _update(inner, gradients, state, held, (len(born), ranks), more)
        except Exception as error:  # of any transformation
            _diagnose_update(error, inner, (trained, held), (updates, whole), more, extra)
            raise
        return masks.join(_over(leaves, changes, _finish), still), state

    return optax.GradientTransformationExtraArgs(init, update)


def apply(params: Params, updates: Params, mask: Mask | Callable[..., Mask]) -> Params:
    """The parameters after an update of `masked(tx, mask)`: exact on every device.

    A frozen leaf is the very array of `params`; elements that an array freezes are selected with `where`; what trains
    is as `optax.apply_updates` has it. That one also adds -0.0 to frozen leaves, which on a GPU changes a NaN's
    payload. Both trees may have None in places. Raises InputError as `masked` does, and for a leaf that trains and has
    no update.

    >>> params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    >>> after = apply(params, {"a": jnp.ones(2), "b": None}, {"a": np.array([True, False]), "b": False})
    >>> after["a"].tolist(), after["b"] is params["b"]
    ([2.0, 1.0], True)
    """
    leaves = _canonical(mask, params)
    structure: Any = jax.tree.structure(leaves)
    trained, _ = _split(params, leaves)
    there: Any = jax.tree.structure(updates, is_leaf=_is_none)
    alike = there == jax.tree.structure(trained, is_leaf=_is_none)
    placed = updates if alike else paths.placed(updates, params)
    if placed is None:
        paths.same_structure(params, updates, "the parameters", "the updates")
    rows = zip(
        paths.names(leaves),
        jax.tree.leaves(leaves),
        *(structure.flatten_up_to(tree) for tree in (params, trained, placed)),
        strict=True,
    )
    return jax.tree.unflatten(structure, [_moved(*row) for row in rows])


def _moved(path: str, m: Any, leaf: Any, trained: Any, update: Any) -> Any:
    if trained is None:
        return leaf
    if update is None:
        raise InputError(f"'{path}' trains and has no update: give masked and apply the same mask")
    after = jnp.asarray(leaf + update).astype(jnp.asarray(leaf).dtype)
    return after if isinstance(m, bool | float) else jnp.where(_nonzero(m), after, leaf)


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _given(rule: Any, params: Params) -> Any:
    """A mask or ages; a function of the parameters is called, with shapes and dtypes: values change with each step."""
    if not masks.is_strategy(rule):
        return rule
    shapes = jax.tree.map(_shape, params)
    context = (Context(),) if _needs_context(rule) else ()
    name = getattr(rule, "__name__", "the function")
    try:
        with jax.ensure_compile_time_eval():
            result = rule(shapes, *context)
    except InputError:
        raise
    except Exception as error:  # what a function does with shapes in place of arrays has no common type
        reason = " ".join(str(error).split())[:150]
        raise InputError(
            f"masked: {name} fails on the shapes of the parameters ({type(error).__name__}: {reason}): a mask that "
            "follows from values is given as a tree, masked(tx, mask)"
        ) from error
    if masks.is_strategy(result) or (isinstance(result, list | tuple) and any(isinstance(p, Phase) for p in result)):
        raise InputError(f"masked: {name} gives phases: give masked the mask of one of them, and go on with carry")
    return result


def _shape(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct) or not (
        hasattr(leaf, "dtype") or isinstance(leaf, int | float | complex)
    ):
        return leaf
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def _needs_context(rule: Callable[..., Any]) -> bool:
    """Whether a function has a second parameter that must be given, as strategies have."""
    try:
        parameters = inspect.signature(rule).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters) == 2


def _canonical(mask: Any, params: Params, like: Params | None = None) -> Mask:
    """The canonical mask of `params`, in the structure of `like` (updates that are wrapped otherwise, say)."""
    return masks.canonical(params if like is None else like, _given(mask, params))


def _split(params: Params, mask: Mask) -> tuple[Params, Params]:
    """`masks.split` by a canonical mask, in which a traced array trains too."""
    return masks.parted(params, mask, [m is not False for m in jax.tree.leaves(mask)])


def _is_placeholder(params: Params) -> bool:
    """What optax.tree.map_params gives to `init`, to see where in a state the parameters stand: a node of its own."""
    return not jax.tree.leaves(params) and type(params).__name__ == "_ParamsPlaceholder"


def _placeholder_state(tx: Any, mask: Any, ages: Any, placeholder: Any) -> OptState:
    if not masks.is_strategy(mask) and not any(m is not False for m in jax.tree.leaves(masks.canonical(mask, mask))):
        return optax.EmptyState()
    state = tx.init(placeholder)
    if ages is None or masks.is_strategy(ages) or masks.is_strategy(mask):
        return state
    leaves = zip(jax.tree.leaves(mask), jax.tree.leaves(ages), strict=True)
    born = {int(age) for m, of in leaves if masks.trains(m) for age in np.unique(np.asarray(of)) if age >= 0}
    return state if len(born) < 2 else _opened(state, _parts(placeholder, state).own(), len(born))


def _init(tx: optax.GradientTransformation, trained: Params, params: Params) -> OptState:
    try:
        state = tx.init(trained)
    except Exception as error:  # of any transformation
        if not _works(tx.init, trained) and _works(tx.init, params):
            raise _wants_all(error) from error
        raise
    shared = {id(leaf) for leaf in jax.tree.leaves(params)}
    return jax.tree.map(lambda leaf: _once(leaf, shared), state)


def _once(leaf: Any, seen: set[int]) -> Any:
    """A leaf of a state, copied if it has been seen: a buffer that two places share cannot be donated."""
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
        return leaf
    if id(leaf) in seen:
        return jnp.array(leaf)
    seen.add(id(leaf))
    return leaf


def _diagnose_update(
    error: Exception,
    tx: optax.GradientTransformationExtraArgs,
    trained: tuple[Params, Params | None],
    whole: tuple[Params, Params],
    extra: dict[str, Any],
    extra_whole: dict[str, Any],
) -> None:
    """Raise InputError where the cause of an update's failure is sure; each pair is (gradients, parameters).

    A cause is sure where the update fails from a fresh state too, by shapes alone, and works without that cause. What
    fails for its values, for want of memory or for the state at hand keeps its own exception.
    """

    def works(gradients: Params, params: Params | None, arguments: dict[str, Any]) -> bool:
        like = gradients if params is None else params
        return _works(lambda g, p: tx.update(g, tx.init(like), p, **arguments), gradients, params)

    gradients, params = trained
    if works(gradients, params, extra):
        return
    if params is None and works(gradients, gradients, extra):
        raise InputError(
            f"update is called without params, and the optimizer inside `masked` needs them ({plugins.words(error)}): "
            "give them, as in tx.update(gradients, state, params)"
        ) from error
    if not works(whole[0], None if params is None else whole[1], extra_whole):
        return
    trees = [name for name, value in extra.items() if value is extra_whole[name] and not _is_leaf_or_function(value)]
    if trees:
        raise InputError(
            f"update's extra argument '{trees[0]}' is not a tree like the parameters, so that its part for the leaves "
            f"that train is not known ({plugins.said(error)}): give it the parameters' structure"
        ) from error
    raise _wants_all(error) from error


def _works(function: Callable[..., Any], *trees: Any) -> bool:
    """Whether a function of trees goes through by their shapes and dtypes alone."""
    try:
        jax.eval_shape(function, *trees)
    except Exception:  # of any transformation
        return False
    return True


def _is_leaf_or_function(value: Any) -> bool:
    return value is None or jax.tree_util.all_leaves([value])


def _wants_all(error: Exception) -> InputError:
    return InputError(
        "the optimizer inside `masked` works on a tree of all parameters and not on that of the leaves that train, "
        f"where a frozen one is None ({plugins.said(error)}): where it holds a tree (labels, a decay mask), give a "
        "function of the tree in its place, such as lambda tree: jax.tree.map(.., tree)"
    )


def _of_trained(extra: Any, mask: Mask, held: Params | None, rest: Params | None) -> Any:
    """An extra argument for the trained part: of a tree like the parameters that part, of a function of them one of
    the part."""
    if callable(extra) and jax.tree_util.all_leaves([extra]):

        @functools.wraps(extra)
        def of_trained(first: Any, *others: Any, **named: Any) -> Any:
            there: Any = jax.tree.structure(first)
            if held is None or there != jax.tree.structure(held):
                return extra(first, *others, **named)
            return _of_trained(extra(masks.join(first, rest), *others, **named), mask, None, None)

        return of_trained
    if jax.tree_util.all_leaves([extra]) or extra is None or paths.placed(mask, extra) is None:
        return extra
    return _split(extra, masks.canonical(extra, mask))[0]


def _update(
    tx: optax.GradientTransformationExtraArgs,
    gradients: Params,
    state: OptState,
    params: Params | None,
    cohorts: tuple[int, list[Any]],
    extra: dict[str, Any],
) -> tuple[Params, OptState]:
    """Each cohort runs `tx` on the whole, under its own counters, and keeps what is of its own leaves and elements."""
    count, ranks = cohorts
    if count < 2:
        return tx.update(gradients, state, params, **extra)
    parts = _parts(gradients, state.state)
    runs = [tx.update(gradients, parts.under(own), params, **extra) for own in (parts.own(), *state.younger)]
    outcomes = [_parts(gradients, after) for _, after in runs]
    treedef = jax.tree.structure(gradients)
    kept = outcomes[0].choose(ranks, outcomes, treedef)
    changes = _pick(ranks, [changes for changes, _ in runs], treedef)
    return changes, Cohorts(kept, tuple(outcome.own() for outcome in outcomes[1:]))


def carry(
    tx: optax.GradientTransformation,
    before: tuple[Mask, Ages | None],
    after: tuple[Mask, Ages | None],
    state: OptState,
    params: Params,
    schedule: Literal["continue", "restart"] = "continue",
) -> OptState:
    """The state of `masked(tx, *before)` made fit for `masked(tx, *after)`.

    Leaves that trained before with the same age keep their moments, and their cohort its counters; newly freed ones
    start as on step 0; newly frozen ones give theirs up. Injected hyper-parameters keep their live values. The
    schedules of `optax.scale_by_schedule` and `optax.inject_hyperparams` go on, or begin again with "restart"; every
    other counter (that of `optax.contrib.momo`, say) is its cohort's and starts with it. `params` are those at the
    boundary.

    >>> tx, params = optax.adam(0.1), {"a": jnp.ones(2), "b": jnp.ones(2)}
    >>> first, second = {"a": True, "b": False}, {"a": True, "b": True}
    >>> state = masked(tx, first).init(params)
    >>> state = carry(tx, (first, None), (second, masks.since(first, second)), state, params)
    >>> [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim]
    [(2,), (2,), (2,), (2,)]
    """
    if schedule not in ("continue", "restart"):
        raise InputError(f"schedule '{schedule}' at a phase boundary: write 'continue' or 'restart'")
    old_mask, new_mask = (_canonical(mask, params) for mask, _ in (before, after))
    old, new = _split(params, old_mask)[0], _split(params, new_mask)[0]
    old_ages, new_ages = (_given(ages, params) for _, ages in (before, after))
    fresh = masked(tx, new_mask, new_ages).init(params)
    if not jax.tree.leaves(old) or not jax.tree.leaves(new):
        return fresh
    old_born, new_born = _ranks(old, old_ages)[0], _ranks(new, new_ages)[0]
    (was, younger), (begun, _) = _cohorts(state), _cohorts(fresh)
    there, here = _parts(old, was), _parts(new, begun)
    counters = dict(zip(old_born, (there.own(), *younger), strict=True))
    since, until = _ages_where_trained(old_mask, old_ages, old), _ages_where_trained(new_mask, new_ages, new)
    kept = {name: since[name] == age for name, age in until.items() if name in since}
    kept = {name: same & (until[name] >= 0) for name, same in kept.items()}
    nodes = [
        _carried(*pair, old, new, kept, schedule) for pair in zip(there.nodes, here.nodes, here.kinds, strict=True)
    ]
    carried = _Parts(nodes, here.kinds, here.treedef)
    # Copies, since a buffer that two places share cannot be donated.
    own = [counters[age] if age in counters else _copied(here.own()) for age in new_born]
    first = carried.under(own[0])
    return Cohorts(first, tuple(own[1:])) if len(new_born) > 1 else first


def _ages_where_trained(mask: Mask, ages: Ages | None, trained: Params) -> dict[str, np.ndarray]:
    """{path: age of each element, -1 where it is frozen} of the trained leaves."""
    known = None if ages is None else dict(zip(paths.unboxed_names(ages), jax.tree.leaves(ages), strict=True))
    chosen = dict(zip(paths.unboxed_names(mask), map(masks.chosen, jax.tree.leaves(mask)), strict=True))
    return {
        name: np.where(chosen[name], 0 if known is None else np.asarray(known[name]), -1)
        for name in paths.unboxed_names(trained)
    }


def _carried(was: Any, fresh: Any, kind: str, old: Params, new: Params, kept: dict[str, Any], schedule: str) -> Any:
    if kind == "moments":
        there: Any = jax.tree.structure(old)
        here: Any = jax.tree.structure(new)
        values = dict(zip(paths.unboxed_names(old), there.flatten_up_to(was), strict=True))
        rows = zip(paths.unboxed_names(new), jax.tree.leaves(new), here.flatten_up_to(fresh), strict=True)
        slots = [_slot(kept.get(name), values.get(name), slot, jnp.shape(leaf)) for name, leaf, slot in rows]
        return jax.tree.unflatten(here, slots)
    if kind == "live" or (kind == "schedule" and schedule == "continue"):
        return was
    return fresh


def _slot(kept: Any, was: Any, fresh: Any, shape: tuple[int, ...]) -> Any:
    """What a leaf goes on with: for each element its own. What the elements share lasts while any of them goes on."""
    if kept is None or not kept.any():
        return fresh
    if kept.all():
        return was
    return jax.tree.map(lambda a, b: jnp.where(kept, a, b) if jnp.shape(a) == shape else a, was, fresh)


def _opened(state: OptState, own: tuple[Any, ...], count: int) -> Cohorts:
    """The state of `count` cohorts that begin together, each with counters of its own, which share no buffer."""
    return Cohorts(state, tuple(_copied(own) for _ in range(count - 1)))


def _copied(own: tuple[Any, ...]) -> tuple[Any, ...]:
    return jax.tree.map(lambda leaf: jnp.array(leaf) if isinstance(leaf, np.ndarray | jax.Array) else leaf, own)


def _cohorts(state: OptState) -> Cohorts:
    """A state as that of cohorts, be it of one."""
    return state if isinstance(state, Cohorts) else Cohorts(state, ())


def _ranks(trained: Params, ages: Ages | None, cohorts: int | None = None) -> tuple[list[int], list[Any]]:
    """(the phases at which something was freed, ascending; for each trained leaf which of them, an int or an array)."""
    if ages is None:
        return [0], [0] * len(jax.tree.leaves(trained))
    known = dict(zip(paths.unboxed_names(ages), jax.tree.leaves(ages), strict=True))
    if missing := [name for name in paths.unboxed_names(trained) if name not in known]:
        raise InputError(
            f"the ages and the parameters are different trees: {paths.some(missing)} only in the parameters"
        )
    mine = [known[name] for name in paths.unboxed_names(trained)]
    if cohorts is not None:
        return list(range(cohorts)), mine
    if any(isinstance(age, jax.core.Tracer) for age in mine):
        raise InputError("the ages are traced, so their values are unknown: build ages outside jax.jit, as masks are")
    whole = [np.asarray(age) for age in mine]
    born = sorted({int(age) for leaf in whole for age in np.unique(leaf) if leaf.ndim == 0 or age >= 0})
    return born, [
        born.index(int(age)) if age.ndim == 0 else np.maximum(np.searchsorted(born, age), 0) * (age >= 0)
        for age in whole
    ]


class _Parts(NamedTuple):
    """A state of `tx` in pieces: trees like the parameters, and single counters."""

    nodes: list[Any]
    kinds: list[str]
    """'moments', 'live' (an injected number), 'schedule' (a count of one), or 'own' (a cohort's counter)."""
    treedef: Any

    def own(self) -> tuple[Any, ...]:
        """The counters that each cohort has for itself."""
        return tuple(node for node, kind in zip(self.nodes, self.kinds, strict=True) if kind == "own")

    def under(self, own: Sequence[Any]) -> OptState:
        """The state with these counters."""
        given = iter(own)
        nodes = [next(given) if k == "own" else n for n, k in zip(self.nodes, self.kinds, strict=True)]
        return jax.tree.unflatten(self.treedef, nodes)

    def choose(self, which: list[Any], others: Sequence["_Parts"], treedef: Any) -> OptState:
        """This state with each leaf's moments from the cohort that it is of."""
        columns = zip(self.nodes, self.kinds, zip(*(other.nodes for other in others), strict=True), strict=True)
        nodes = [_pick(which, rest, treedef) if kind == "moments" else node for node, kind, rest in columns]
        return jax.tree.unflatten(self.treedef, nodes)


def _pick(which: list[Any], trees: Sequence[Any], treedef: Any) -> Any:
    """The tree with leaf i from trees[which[i]]; where that is an array, each element from its own tree."""
    columns = [treedef.flatten_up_to(tree) for tree in trees]
    picked = [
        columns[run][i] if isinstance(run, int) else _by_element(run, [column[i] for column in columns])
        for i, run in enumerate(which)
    ]
    return jax.tree.unflatten(treedef, picked)


def _by_element(run: Any, slots: Sequence[Any]) -> Any:
    """Slots of one leaf, one a cohort, as one; what the elements share is the first cohort's."""

    def picked(*leaves: Any) -> Any:
        first, *others = leaves
        try:
            fits = np.broadcast_shapes(np.shape(run), np.shape(first)) == np.shape(first)
        except ValueError:
            fits = False
        if fits:
            for number, leaf in enumerate(others, start=1):
                first = jnp.where(run == number, leaf, first)
        return first

    return jax.tree.map(picked, *slots)


def _parts(trained: Params, state: OptState) -> _Parts:
    treedef = jax.tree.structure(trained)
    nodes, outer = jax.tree.flatten(state, is_leaf=lambda node: _is_like(treedef, node))
    marks = jax.tree.leaves(_marked(state), is_leaf=lambda node: _is_like(treedef, node))
    kinds = [
        "moments" if _is_like(treedef, node) else mark if isinstance(mark, str) else "own"
        for node, mark in zip(nodes, marks, strict=True)
    ]
    return _Parts(nodes, kinds, outer)


def _is_like(treedef: Any, node: Any) -> bool:
    """A tree of the trained leaves, with an array at each, or a plain container of them (SM3)."""
    try:
        slots = treedef.flatten_up_to(node)
    except (ValueError, TypeError):
        return False
    plain = jax.tree.leaves(slots, is_leaf=lambda n: isinstance(n, tuple) and hasattr(n, "_fields"))
    return all(isinstance(slot, optax.MaskedNode) or not hasattr(slot, "_fields") for slot in plain)


_SCHEDULED = (optax.ScaleByScheduleState, optax.InjectStatefulHyperparamsState)


def _marked(state: OptState) -> Any:
    """The state with a word at each number that is common to the cohorts."""

    def mark(node: Any) -> Any:
        if isinstance(node, optax.ScaleByScheduleState):
            return node._replace(count="schedule")
        if isinstance(node, optax.InjectStatefulHyperparamsState):
            return node._replace(
                count="schedule",
                hyperparams=jax.tree.map(lambda _: "live", node.hyperparams),
                hyperparams_states=jax.tree.map(lambda _: "schedule", node.hyperparams_states),
                inner_state=_marked(node.inner_state),
            )
        return node

    return jax.tree.map(mark, state, is_leaf=lambda node: isinstance(node, _SCHEDULED))


def _check_state(tx: optax.GradientTransformationExtraArgs, trained: Params, cohorts: int, state: OptState) -> None:
    """Raise InputError for the state of another mask, whose own failure would be cryptic or silent."""
    whole, younger = _cohorts(state)
    wanted: Any = jax.tree.structure(jax.eval_shape(tx.init, trained))
    if wanted != jax.tree.structure(whole) or 1 + len(younger) != cohorts:
        raise InputError(
            "the optimizer's state is of another mask or other ages: at a phase boundary, make it fit with "
            "optimizer.carry; otherwise call init with this mask"
        )


def _over(mask: Mask, tree: Params, function: Any) -> Params:
    return jax.tree.map(lambda m, leaf: None if leaf is None else function(leaf, m), mask, tree)


def _selected(gradient: Any, m: Any) -> Any:
    return jnp.where(_nonzero(m), gradient, jnp.zeros_like(gradient)) if masks.selects(m) else gradient


def _nonzero(m: Any) -> Any:
    return m if m.dtype == jnp.bool_ else m != 0


def _finish(update: Any, m: Any) -> Any:
    if isinstance(m, bool):
        return update
    is_bools = masks.selects(m) and m.dtype == jnp.bool_
    scaled = update if is_bools else update * jnp.asarray(m, jnp.result_type(update))
    return scaled if isinstance(m, float) else jnp.where(_nonzero(m), scaled, -jnp.zeros_like(update))


def _nothing(leaf: Any) -> Any:
    if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
        return jnp.full_like(leaf, -0.0)
    return jnp.zeros_like(leaf)
