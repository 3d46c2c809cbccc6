"""An optimizer on the leaves that train, and its state from one phase to the next.

`masked` makes of any optax transformation one that frozen leaves never meet. A *cohort* is the leaves freed at one
phase: with `ages`, each cohort keeps counters of its own, so that a leaf freed late starts as on step 0, bias
correction included, while `tx` sees the gradients of all that trains. Each cohort runs `tx` on the whole and keeps
its own leaves; XLA drops the rest. `carry` makes the state of one phase fit for the next.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tljax import masks, paths
from tljax.types import InputError, Mask, OptState, Params

Ages = Any
"""The tree of the parameters with, for each leaf, the phase since which it trains (see `masks.since`)."""


class Cohorts(NamedTuple):
    """The state of a transformation whose leaves were freed at different phases."""

    state: OptState
    """Of `tx`: the moments of every trained leaf, and the counters of the oldest cohort."""
    younger: tuple[tuple[Any, ...], ...]
    """The counters of each other cohort, oldest first. Schedules and injected hyper-parameters are common to all."""


def masked(
    tx: optax.GradientTransformation, mask: Mask, ages: Ages | None = None
) -> optax.GradientTransformationExtraArgs:
    """`tx` on the leaves that train; frozen ones own no state and keep their bits.

    Clipping, decay and norms inside `tx` see the trained leaves alone. A number in `mask` scales the leaf's update:
    the learning rate for SGD, Adam, AdamW and Lion, the update elsewhere. An array zeroes the gradients it does not
    select before `tx` and their updates after it. A frozen leaf's update is -0.0, which adds nothing to any bits
    (0.0 would turn -0.0 into 0.0). Gradients of the trained part alone, as `masks.split` gives them, are welcome:
    a hole stays a hole. Without `ages` all leaves are of one cohort, and the state is `tx`'s own; else it is
    `Cohorts`. Raises InputError for a leaf of `mask` that cannot be meant, and when it is traced with the state of
    another mask. `tx` sees trees whose leaves come and go: labels of `optax.multi_transform` and masks of
    `optax.masked` inside it are functions of the tree, not trees; `optax.flatten` and GaLore, whose state is of other
    shapes than the leaves, do not last beyond a phase.

    >>> tx = masked(optax.sgd(1.0), {"a": True, "b": False})
    >>> state = tx.init({"a": 1.0, "b": 1.0})
    >>> tx.update({"a": 2.0, "b": None}, state)[0]
    {'a': -2.0, 'b': None}
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: Params) -> OptState:
        trained, _ = masks.split(params, mask)
        paths.each(_require_concrete, mask, params)
        if not jax.tree.leaves(trained):
            return optax.EmptyState()
        state = inner.init(trained)
        born = _born(trained, ages)
        if len(born) < 2:
            return state
        return Cohorts(state, (_parts(trained, state).own(),) * (len(born) - 1))

    def update(updates: Params, state: OptState, params: Params | None = None, **extra: Any) -> tuple[Params, OptState]:
        trained, frozen = masks.split(updates, mask)
        still = jax.tree.map(_nothing, frozen)
        if not jax.tree.leaves(trained):
            return masks.join(trained, still), state
        gradients = _over(mask, trained, lambda g, m: jnp.where(m, g, jnp.zeros_like(g)) if masks.selects(m) else g)
        held = None if params is None else masks.split(params, mask)[0]
        _check_state(inner, trained, ages, state)
        changes, state = _update(inner, gradients, state, held, ages, extra)
        return masks.join(_over(mask, changes, _finish), still), state

    return optax.GradientTransformationExtraArgs(init, update)


def _require_concrete(path: str, m: Any, leaf: Any) -> None:
    """What a traced leaf of a mask holds is not known, and a hole fits anything."""
    if leaf is not None and not isinstance(m, jax.core.Tracer):
        masks.require_leaf(path, leaf, m)


def _update(
    tx: optax.GradientTransformationExtraArgs,
    gradients: Params,
    state: OptState,
    params: Params | None,
    ages: Ages | None,
    extra: dict[str, Any],
) -> tuple[Params, OptState]:
    """Each cohort runs `tx` on the whole, under its own counters, and keeps what is of its own leaves."""
    born = _born(gradients, ages)
    if len(born) < 2:
        return tx.update(gradients, state, params, **extra)
    parts = _parts(gradients, state.state)
    runs = [tx.update(gradients, parts.under(own), params, **extra) for own in (parts.own(), *state.younger)]
    outcomes = [_parts(gradients, after) for _, after in runs]
    which = [born.index(age) for age in _of_trained(gradients, ages)]
    treedef = jax.tree.structure(gradients)
    kept = outcomes[0].choose(which, outcomes, treedef)
    changes = _pick(which, [changes for changes, _ in runs], treedef)
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
    old, new = masks.split(params, before[0])[0], masks.split(params, after[0])[0]
    fresh = masked(tx, *after).init(params)
    if not jax.tree.leaves(old) or not jax.tree.leaves(new):
        return fresh
    old_born, new_born = _born(old, before[1]), _born(new, after[1])
    there, here = _parts(old, _opened(state).state), _parts(new, _opened(fresh).state)
    counters = dict(zip(old_born, (there.own(), *_opened(state).younger), strict=True))
    was = set(zip(paths.names(old), _of_trained(old, before[1]), strict=True))
    now = set(zip(paths.names(new), _of_trained(new, after[1]), strict=True))
    kept = {name for name, _ in was & now}
    nodes = [
        _carried(*pair, old, new, kept, schedule) for pair in zip(there.nodes, here.nodes, here.kinds, strict=True)
    ]
    carried = _Parts(nodes, here.kinds, here.treedef)
    own = [counters[age] if age in counters else here.own() for age in new_born]
    first = carried.under(own[0])
    return Cohorts(first, tuple(own[1:])) if len(new_born) > 1 else first


def _carried(was: Any, fresh: Any, kind: str, old: Params, new: Params, kept: set[str], schedule: str) -> Any:
    if kind == "moments":
        there: Any = jax.tree.structure(old)
        here: Any = jax.tree.structure(new)
        values = dict(zip(paths.names(old), there.flatten_up_to(was), strict=True))
        slots = zip(paths.names(new), here.flatten_up_to(fresh), strict=True)
        return jax.tree.unflatten(jax.tree.structure(new), [values[n] if n in kept else slot for n, slot in slots])
    if kind == "live" or (kind == "schedule" and schedule == "continue"):
        return was
    return fresh


def _opened(state: optax.OptState) -> Cohorts:
    """A state as that of cohorts, be it of one."""
    return state if isinstance(state, Cohorts) else Cohorts(state, ())


def _born(trained: Params, ages: Ages | None) -> list[int]:
    """The phases at which something was freed, ascending."""
    return sorted(set(_of_trained(trained, ages)))


def _of_trained(trained: Params, ages: Ages | None) -> list[int]:
    """The age of each trained leaf; holes in `trained` are skipped."""
    if ages is None:
        return [0] * len(jax.tree.leaves(trained))
    known = dict(paths.items(ages))
    return [int(known[name]) for name in paths.names(trained)]


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

    def choose(self, which: list[int], others: Sequence["_Parts"], treedef: Any) -> OptState:
        """This state with each leaf's moments from the cohort that it is of."""
        columns = zip(self.nodes, self.kinds, zip(*(other.nodes for other in others), strict=True), strict=True)
        nodes = [_pick(which, rest, treedef) if kind == "moments" else node for node, kind, rest in columns]
        return jax.tree.unflatten(self.treedef, nodes)


def _pick(which: list[int], trees: Sequence[Any], treedef: Any) -> Any:
    """The tree with leaf i from trees[which[i]]."""
    columns = [treedef.flatten_up_to(tree) for tree in trees]
    return jax.tree.unflatten(treedef, [columns[run][i] for i, run in enumerate(which)])


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


def _check_state(
    tx: optax.GradientTransformationExtraArgs, trained: Params, ages: Ages | None, state: OptState
) -> None:
    """Raise InputError for the state of another mask, whose own failure would be cryptic or silent."""
    born = _born(trained, ages)
    whole, younger = _opened(state)
    wanted: Any = jax.tree.structure(jax.eval_shape(tx.init, trained))
    if wanted != jax.tree.structure(whole) or 1 + len(younger) != len(born):
        raise InputError(
            "the optimizer's state is of another mask or other ages: at a phase boundary, make it fit with "
            "optimizer.carry; otherwise call init with this mask"
        )


def _over(mask: Mask, tree: Params, function: Any) -> Params:
    return jax.tree.map(lambda m, leaf: None if leaf is None else function(leaf, m), mask, tree)


def _finish(update: Any, m: Any) -> Any:
    if masks.selects(m):
        return jnp.where(m, update, -jnp.zeros_like(update))
    if isinstance(m, bool | np.bool_):
        return update
    return update * jnp.asarray(m, jnp.result_type(update))


def _nothing(leaf: Any) -> Any:
    if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
        return jnp.full_like(leaf, -0.0)
    return jnp.zeros_like(leaf)
