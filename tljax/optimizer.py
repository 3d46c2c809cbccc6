"""An optimizer on the leaves that train, and its state from one phase to the next.

`masked` makes of any optax transformation one that frozen leaves never meet. A *cohort* is the leaves freed at one
phase boundary: with `freed`, each cohort keeps counters of its own, so that a leaf freed late starts as on step 0, bias
correction included, while `tx` sees the gradients of all that trains. Each cohort runs `tx` on the whole and keeps
the results of its own leaves; XLA drops the rest. `carry` makes the state of one phase fit for the next.

Where an array of a mask trains few elements of a leaf, `tx` is given these alone, *gathered*, and so keeps moments of
them alone; `gathered` says when.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tljax import elementwise, masks, paths, plugins
from tljax.masks import Elements
from tljax.slots import Gathered, Layout, assign, gather, layout, spread
from tljax.types import Context, InputError, Mask, MaskSchedule, OptState, Params, Phase, Seen

Freed = Any
"""The tree of the parameters with, for each leaf, the phase since which it trains, as `masks.since` gives it: an int,
or an int array with the phase of each element."""


class Cohorts(NamedTuple):
    """The state of a transformation whose leaves were freed at different phases."""

    state: OptState
    """The state of `tx`: the moments of every trained leaf, and the counters of the oldest cohort."""
    younger: tuple[tuple[Any, ...], ...]
    """The counters of each other cohort, oldest first. Schedules and injected hyper-parameters are common to all."""


def masked(
    tx: optax.GradientTransformation,
    mask: Mask | Callable[..., Mask],
    freed: Freed | Callable[[Params], Freed] | None = None,
    cohorts: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The transformation `tx` on the leaves that train: frozen leaves own no state and keep their bits.

    >>> tx = masked(optax.sgd(1.0), {"a": True, "b": False})
    >>> state = tx.init({"a": 1.0, "b": 1.0})
    >>> tx.update({"a": 2.0, "b": None}, state)[0]
    {'a': -2.0, 'b': None}

    `mask` is a tree, matched by path (see `masks.canonical`), or a function of the parameters that gives one, such as a
    strategy that needs no context: it is called with shapes and dtypes in `init` and each `update`, so that
    `flax.nnx.Optimizer` works.

    - Clipping, decay and norms inside `tx` see the trained leaves alone.
    - A frozen leaf's update is -0.0, which adds nothing to any bits. (`optax.selective_transform` and `optax.freeze`
      give 0.0, which turns -0.0 into 0.0, and know neither numbers nor elements.)
    - A number in `mask` scales the leaf's update, and so the learning rate under SGD, Adam, AdamW and Lion.
    - An array of bools zeroes the gradients it does not select before `tx` and their updates after it; an array of
      floats does so where it is 0, and scales the updates elsewhere. Where it selects few elements `tx` sees these
      alone, and its state holds no others (see `gathered`): the results are the same but for rounding.
    - Gradients of the trained part alone, as `masks.split` gives them, are welcome: a hole stays a hole.
    - Extra arguments of `update` that are trees like the parameters are split, and functions of the parameters
      (`value_fn` of L-BFGS) are given whole trees.

    `masked` is the outermost wrapper. What stands outside it (`optax.chain(masked(..), add_decayed_weights(..))`,
    `schedule_free(masked(..))`, `MultiSteps(masked(..))`) sees frozen leaves and may move them: put it inside, and give
    the updates to `apply`. Inside, `tx` sees trees whose leaves come and go. Labels of `optax.multi_transform`, masks
    of `optax.masked` and of decay are functions of the tree; trees of all parameters give the same numbers, but labels
    of a state are refused where there are several phases. A tree that a transformation maps along with the updates, as
    `jax.tree.map(f, updates, rates)` does, has leaves where they have None, and is always refused. `optax.flatten` and
    GaLore, whose state is of other shapes than the leaves, do not last beyond a phase.

    Without `freed` all leaves are of one cohort, and the state is `tx`'s own; else it is `Cohorts`. With `cohorts`, a
    count, `freed` has the rank of each leaf's cohort below that count in place of its phase, and its arrays may be
    traced; beside an `Elements` it has the ranks of its places. (A label a cohort for `optax.partition` would not do:
    there each part sees the norm of its own gradients.)

    Raises InputError for a leaf of `mask` that is no bool, number or array of them, for a traced bool, for a tree of
    all parameters inside `tx` as above, and when `update` is traced with the state of another mask; an array that is
    traced in `update` and was not in `init`, or the reverse, is another mask.
    """
    return _masked(tx, mask, freed, cohorts)


def _masked(
    tx: optax.GradientTransformation,
    mask: Mask | Callable[..., Mask],
    freed: Freed | Callable[[Params], Freed] | None,
    cohorts: int | None,
    gathers: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """As `masked`; where it does not gather, each leaf is of one cohort, of which there may be many."""
    inner = optax.with_extra_args_support(tx)
    is_elementwise = functools.cache(functools.partial(elementwise.holds_of_shapes, inner))

    def placed(leaves: Mask, trained: Params) -> Mask:
        return _with_elements(is_elementwise, leaves, trained) if gathers else leaves

    def init(params: Params) -> OptState:
        if _is_placeholder(params):
            return _placeholder_state(inner, mask, freed, params)
        leaves = _canonical(mask, params)
        trained, _ = _split(params, leaves)
        if not jax.tree.leaves(trained):
            return optax.EmptyState()
        leaves = placed(leaves, trained)
        phases, _ = _ranks(leaves, trained, _resolved(freed, params), cohorts)
        trained = _map_by_mask(leaves, trained, _gather)
        state = _init(inner, trained, params)
        return state if len(phases) < 2 else _as_cohorts(state, _parts(trained, state).counters(), len(phases))

    def update(updates: Params, state: OptState, params: Params | None = None, **extra: Any) -> tuple[Params, OptState]:
        whole = updates if params is None else params
        leaves = _canonical(mask, whole, updates)
        trained, frozen = _split(updates, leaves)
        unmoved = jax.tree.map(_negative_zero, frozen)
        if not jax.tree.leaves(trained):
            return masks.join(trained, unmoved), state
        unplaced, leaves = leaves, placed(leaves, trained)
        phases, ranks = _ranks(leaves, trained, _resolved(freed, whole), cohorts)
        gradients, trained_params, params_split = _map_by_mask(leaves, trained, _select), None, None
        if params is not None:
            trained_whole, rest = _split(params, _canonical(mask, params))
            params_split = placed(_canonical(mask, params), trained_whole), trained_whole, rest
            trained_params = _map_by_mask(params_split[0], trained_whole, _gather)
        has_arrays = any(_is_gathered(m) or masks.selects(m) for m in jax.tree.leaves(leaves))
        _check_state(inner, gradients, len(phases), state, has_arrays)
        extra_of_trained = {
            name: _trained_extra(value, leaves, trained_params, params_split) for name, value in extra.items()
        }
        try:
            ranked_phases = len(phases), ranks
            changes, state = _update(
                inner, gradients, state, trained_params, ranked_phases, extra_of_trained, not gathers
            )
        except Exception as error:  # of any transformation
            _diagnose_update(error, inner, (gradients, trained_params), (updates, whole), extra_of_trained, extra)
            raise
        changes = _map_by_mask(leaves, changes, _scale_and_select)
        changes = jax.tree.map(_spread_update, unplaced, leaves, trained, changes)
        return masks.join(changes, unmoved), state

    return optax.GradientTransformationExtraArgs(init, update)


def apply(params: Params, updates: Params, mask: "Mask | Callable[..., Mask] | Chosen") -> Params:
    """The parameters after an update of `masked(tx, mask)`, or of `scheduled`, whose state has the mask: exact on
    every device.

    A frozen leaf is the very array of `params`; elements that an array freezes are selected with `where`; what trains
    is as `optax.apply_updates` computes it. That function also adds -0.0 to frozen leaves, which on a GPU changes a
    NaN's payload. Under `Elements` an update is of the whole leaf, or of the elements as `masked` gives it. Both trees
    may have None in places. Raises InputError as `masked` does, and for a leaf that trains and has no update.

    >>> params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    >>> after = apply(params, {"a": jnp.ones(2), "b": None}, {"a": np.array([True, False]), "b": False})
    >>> after["a"].tolist(), after["b"] is params["b"]
    ([2.0, 1.0], True)
    """
    if isinstance(mask, Chosen):
        return _apply_chosen(params, updates, mask)
    leaves = _canonical(mask, params)
    structure: Any = jax.tree.structure(leaves)
    trained, _ = _split(params, leaves)
    updates_structure: Any = jax.tree.structure(updates, is_leaf=_is_none)
    same = updates_structure == jax.tree.structure(trained, is_leaf=_is_none)
    placed = updates if same else paths.placed(updates, params)
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
    if _is_gathered(m):
        change = _gather(update, m) if jnp.shape(update) == jnp.shape(leaf) else update
        return _spread(m, jnp.asarray(_gather(leaf, m) + change).astype(jnp.asarray(leaf).dtype), leaf)
    after = jnp.asarray(leaf + update).astype(jnp.asarray(leaf).dtype)
    return after if isinstance(m, bool | float) else jnp.where(_nonzero(m), after, leaf)


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _resolved(rule: Any, params: Params) -> Any:
    """The tree that a mask or `freed` is; a function is called with shapes and dtypes: values change with each step."""
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
    return masks.canonical(params if like is None else like, _resolved(mask, params))


def _split(params: Params, mask: Mask) -> tuple[Params, Params]:
    """`masks.split` by a canonical mask, in which a traced array trains too."""
    return masks.parted(params, mask, [m is not False for m in jax.tree.leaves(mask)])


def _is_placeholder(params: Params) -> bool:
    """What optax.tree.map_params gives to `init`, to see where in a state the parameters stand: a node of its own."""
    return not jax.tree.leaves(params) and type(params).__name__ == "_ParamsPlaceholder"


def _placeholder_state(tx: Any, mask: Any, freed: Any, placeholder: Any) -> OptState:
    if not masks.is_strategy(mask) and not any(m is not False for m in jax.tree.leaves(masks.canonical(mask, mask))):
        return optax.EmptyState()
    state = tx.init(placeholder)
    if freed is None or masks.is_strategy(freed) or masks.is_strategy(mask):
        return state
    leaves = zip(jax.tree.leaves(mask), jax.tree.leaves(freed), strict=True)
    trained = [np.unique(np.asarray(phases)) for m, phases in leaves if masks.trains(m)]
    boundaries = {int(phase) for phases in trained for phase in phases if phase >= 0}
    counters = _parts(placeholder, state).counters()
    return state if len(boundaries) < 2 else _as_cohorts(state, counters, len(boundaries))


def _init(tx: optax.GradientTransformation, trained: Params, params: Params) -> OptState:
    try:
        state = tx.init(trained)
    except Exception as error:  # of any transformation
        if not _works(tx.init, trained) and _works(tx.init, params):
            raise _wants_all(error) from error
        raise
    seen = {id(leaf) for leaf in jax.tree.leaves(params)}
    return jax.tree.map(lambda leaf: _unshared(leaf, seen), state)


def _unshared(leaf: Any, seen: set[int]) -> Any:
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
    """Raises InputError where the cause of an update's failure is sure; each pair is (gradients, parameters).

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
    whole_trees = {name: value for name, value in extra.items() if value is extra_whole[name] and value is not None}
    trees = [name for name, value in whole_trees.items() if not jax.tree_util.all_leaves([value])]
    if trees:
        raise InputError(
            f"update's extra argument '{trees[0]}' is not a tree like the parameters, so that its part for the leaves "
            f"that train is not known ({plugins.describe(error)}): give it the parameters' structure"
        ) from error
    raise _wants_all(error) from error


def _works(function: Callable[..., Any], *trees: Any) -> bool:
    """Whether a function of trees goes through by their shapes and dtypes alone."""
    try:
        jax.eval_shape(function, *trees)
    except Exception:  # of any transformation
        return False
    return True


def _wants_all(error: Exception) -> InputError:
    return InputError(
        "the optimizer inside `masked` works on a tree of all parameters and not on that of the leaves that train, "
        f"where a frozen one is None ({plugins.describe(error)}): where it holds a tree (labels, a decay mask), give a "
        "function of the tree in its place, such as lambda tree: jax.tree.map(.., tree)"
    )


def _trained_extra(
    extra: Any, mask: Mask, trained_params: Params | None, whole: tuple[Mask, Params, Params] | None
) -> Any:
    """An extra argument of `update` for the trained part.

    Of a tree like the parameters it is the trained part, gathered as `trained_params` are; of a function of the
    parameters it is a function of the trained part, which is given the whole: (mask, trained part, rest).
    """
    if callable(extra) and jax.tree_util.all_leaves([extra]):

        @functools.wraps(extra)
        def on_trained(first: Any, *others: Any, **named: Any) -> Any:
            structure: Any = jax.tree.structure(first)
            if trained_params is None or whole is None or structure != jax.tree.structure(trained_params):
                return extra(first, *others, **named)
            params_mask, trained_whole, rest = whole
            spread = jax.tree.map(_spread, params_mask, first, trained_whole)
            return _trained_extra(extra(masks.join(spread, rest), *others, **named), mask, None, None)

        return on_trained
    if jax.tree_util.all_leaves([extra]) or extra is None or paths.placed(mask, extra) is None:
        return extra
    extra_mask = masks.canonical(extra, mask)
    return _map_by_mask(extra_mask, _split(extra, extra_mask)[0], _gather)


def _update(
    tx: optax.GradientTransformationExtraArgs,
    gradients: Params,
    state: OptState,
    params: Params | None,
    cohorts: tuple[int, list[Any]],
    extra: dict[str, Any],
    by_group: bool = False,
) -> tuple[Params, OptState]:
    """Each cohort runs `tx` on the whole, under its own counters, and keeps what is of its own leaves and elements.

    `by_group` traces it once for all of them: the same numbers of a shorter program, where there are many.
    """
    count, ranks = cohorts
    if count < 2:
        return tx.update(gradients, state, params, **extra)
    parts = _parts(gradients, state.state)
    if by_group:
        return _update_by_group(tx, gradients, state, params, ranks, extra)
    runs = [
        tx.update(gradients, parts.with_counters(counters), params, **extra)
        for counters in (parts.counters(), *state.younger)
    ]
    after = [_parts(gradients, state) for _, state in runs]
    treedef = jax.tree.structure(gradients)
    common = after[0].with_moments(ranks, after, treedef)
    changes = _pick(ranks, [changes for changes, _ in runs], treedef)
    return changes, Cohorts(common, tuple(parts.counters() for parts in after[1:]))


def _update_by_group(
    tx: optax.GradientTransformationExtraArgs,
    gradients: Params,
    state: Cohorts,
    params: Params | None,
    ranks: Sequence[int],
    extra: dict[str, Any],
) -> tuple[Params, OptState]:
    """As `_update`, where each leaf is of one group: of one program each group computes what its leaves need.

    What follows from no counter is computed once for all.
    """
    parts = _parts(gradients, state.state)

    def update(counters: tuple[Any, ...]) -> Any:
        return tx.update(gradients, parts.with_counters(counters), params, **extra)

    group_counters = [parts.counters(), *state.younger]
    program, shapes = jax.make_jaxpr(update, return_shape=True)(group_counters[0])
    changes, after = shapes
    structure: Any = jax.tree.structure(gradients)
    change_ranks = [
        rank for rank, slots in zip(ranks, jax.tree.leaves(changes), strict=True) for _ in jax.tree.leaves(slots)
    ]
    after_parts = _parts(gradients, after)
    wanted: list[tuple[int, ...]] = [(rank,) for rank in change_ranks]
    for node, kind in zip(after_parts.nodes, after_parts.kinds, strict=True):
        if kind == "moments":
            slots = structure.flatten_up_to(node)
            wanted += [(rank,) for rank, slot in zip(ranks, slots, strict=True) for _ in jax.tree.leaves(slot)]
        else:
            every = tuple(range(len(group_counters))) if kind == "counter" else (0,)
            wanted += [every] * len(jax.tree.leaves(node))
    values = _by_group(program, [jax.tree.leaves(counters) for counters in group_counters], wanted)
    first = [by_rank[min(by_rank)] for by_rank in values]
    new_changes = jax.tree.unflatten(jax.tree.structure(changes), first[: len(change_ranks)])
    new_state = jax.tree.unflatten(jax.tree.structure(after), first[len(change_ranks) :])
    younger = []
    for group in range(1, len(group_counters)):
        group_values = [by_rank.get(group, value) for by_rank, value in zip(values, first, strict=True)]
        group_state = jax.tree.unflatten(jax.tree.structure(after), group_values[len(change_ranks) :])
        younger.append(_parts(gradients, group_state).counters())
    return new_changes, Cohorts(new_state, tuple(younger))


def _by_group(
    program: Any, arguments: Sequence[Sequence[Any]], wanted: Sequence[tuple[int, ...]]
) -> list[dict[int, Any]]:
    """{group: the value} of each output of a program for the groups that want it; `arguments` are those of each group.

    An equation that follows from no argument is evaluated once, another for the groups that need it.
    """
    jaxpr = program.jaxpr
    varies = {id(v) for v in jaxpr.invars}
    for equation in jaxpr.eqns:
        if any(id(v) in varies for v in equation.invars):
            varies |= {id(v) for v in equation.outvars}
    needed: dict[int, set[int]] = {}
    for v, output_groups in zip(jaxpr.outvars, wanted, strict=True):
        needed.setdefault(id(v), set()).update(output_groups)
    for equation in reversed(jaxpr.eqns):
        equation_groups = set[int]().union(*(needed.get(id(v), ()) for v in equation.outvars))
        for v in equation.invars:
            needed.setdefault(id(v), set()).update(equation_groups)
    known: dict[tuple[int, int | None], Any] = {}

    def value(v: Any, group: int) -> Any:
        if isinstance(v, jax.extend.core.Literal):
            return v.val
        return known[id(v), group if id(v) in varies else None]

    for v, constant in zip(jaxpr.constvars, program.consts, strict=True):
        known[id(v), None] = constant
    for group, group_arguments in enumerate(arguments):
        known |= {(id(v), group): argument for v, argument in zip(jaxpr.invars, group_arguments, strict=True)}
    for equation in jaxpr.eqns:
        groups = sorted(set[int]().union(*(needed.get(id(v), ()) for v in equation.outvars)))
        by_group = any(id(v) in varies for v in equation.invars)
        for group in groups if by_group else groups[:1]:
            results = _evaluated(jaxpr, equation, [value(v, group) for v in equation.invars])
            for v, result in zip(equation.outvars, results, strict=True):
                known[id(v), group if by_group else None] = result
    return [
        {group: value(v, group) for group in output_groups}
        for v, output_groups in zip(jaxpr.outvars, wanted, strict=True)
    ]


def _evaluated(jaxpr: Any, equation: Any, inputs: Sequence[Any]) -> list[Any]:
    """What an equation of a program gives for its inputs."""
    pairs = zip(equation.invars, inputs, strict=True)
    bound = {id(v): (v, x) for v, x in pairs if not isinstance(v, jax.extend.core.Literal)}
    variables = [v for v, _ in bound.values()]
    alone = jaxpr.replace(constvars=[], invars=variables, outvars=equation.outvars, eqns=[equation])
    return jax.core.eval_jaxpr(alone, [], *(x for _, x in bound.values()))


def carry(
    tx: optax.GradientTransformation,
    before: tuple[Mask, Freed | None],
    after: tuple[Mask, Freed | None],
    state: OptState,
    params: Params,
) -> OptState:
    """The state of `masked(tx, *before)` made fit for `masked(tx, *after)`.

    Leaves that train since the same phase in both keep their moments, and their cohort its counters; newly freed ones
    start as on step 0; newly frozen ones give theirs up. Injected hyper-parameters keep their live values, and the
    schedules of `optax.scale_by_schedule` and `optax.inject_hyperparams` go on; every other counter (that of
    `optax.contrib.momo`, say) is its cohort's and starts with it. `params` are those at the boundary.

    >>> tx, params = optax.adam(0.1), {"a": jnp.ones(2), "b": jnp.ones(2)}
    >>> first, second = {"a": True, "b": False}, {"a": True, "b": True}
    >>> state = masked(tx, first).init(params)
    >>> state = carry(tx, (first, None), (second, masks.since(first, second)), state, params)
    >>> [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim]
    [(2,), (2,), (2,), (2,)]
    """
    old_mask, new_mask = (_canonical(mask, params) for mask, _ in (before, after))
    old, new = _split(params, old_mask)[0], _split(params, new_mask)[0]
    is_elementwise = functools.cache(functools.partial(elementwise.holds_of_shapes, tx))
    old_leaves, new_leaves = (
        _with_elements(is_elementwise, mask, part) for mask, part in ((old_mask, old), (new_mask, new))
    )
    old_freed, new_freed = (_resolved(freed, params) for _, freed in (before, after))
    initial = masked(tx, new_leaves, new_freed).init(params)
    if not jax.tree.leaves(old) or not jax.tree.leaves(new):
        return initial
    old_phases, new_phases = _ranks(old_leaves, old, old_freed)[0], _ranks(new_leaves, new, new_freed)[0]
    (old_state, younger), (new_state, _) = _cohorts(state), _cohorts(initial)
    old_parts, new_parts = _parts(old, old_state), _parts(new, new_state)
    counters_by_phase = dict(zip(old_phases, (old_parts.counters(), *younger), strict=True))
    was, now = _phases_of_elements(old_mask, old_freed, old), _phases_of_elements(new_mask, new_freed, new)
    goes_on = {name: (was[name] == phase) & (phase >= 0) for name, phase in now.items() if name in was}
    trees = (old_leaves, old), (new_leaves, new)
    nodes = [
        _carried(kind, old_node, new_node, *trees, goes_on)
        for kind, old_node, new_node in zip(new_parts.kinds, old_parts.nodes, new_parts.nodes, strict=True)
    ]
    # Copies, since a buffer that two places share cannot be donated.
    counters = [
        counters_by_phase[phase] if phase in counters_by_phase else _copied(new_parts.counters())
        for phase in new_phases
    ]
    first = _Parts(nodes, new_parts.kinds, new_parts.treedef).with_counters(counters[0])
    return Cohorts(first, tuple(counters[1:])) if len(new_phases) > 1 else first


def _phases_of_elements(mask: Mask, freed: Freed | None, trained: Params) -> dict[str, np.ndarray]:
    """{path: the phase since which each element trains, -1 where it is frozen} of the trained leaves."""
    phases = None if freed is None else dict(zip(paths.unboxed_names(freed), jax.tree.leaves(freed), strict=True))
    chosen = dict(zip(paths.unboxed_names(mask), map(masks.chosen, jax.tree.leaves(mask)), strict=True))
    return {
        name: np.where(chosen[name], 0 if phases is None else np.asarray(phases[name]), -1)
        for name in paths.unboxed_names(trained)
    }


def _carried(
    kind: str,
    old_node: Any,
    new_node: Any,
    before: tuple[Mask, Params],
    after: tuple[Mask, Params],
    goes_on: dict[str, Any],
) -> Any:
    """The node of a state that the next phase begins with; `goes_on` is {path: which elements keep their moments}.

    `before` and `after` are (mask, trained leaves) each.
    """
    if kind == "moments":
        (old_mask, old), (new_mask, new) = before, after
        old_structure: Any = jax.tree.structure(old)
        new_structure: Any = jax.tree.structure(new)
        old_slots = dict(zip(paths.unboxed_names(old), old_structure.flatten_up_to(old_node), strict=True))
        old_leaf, new_leaf = (
            dict(zip(paths.unboxed_names(mask), jax.tree.leaves(mask), strict=True)) for mask in (old_mask, new_mask)
        )
        rows = zip(paths.unboxed_names(new), jax.tree.leaves(new), new_structure.flatten_up_to(new_node), strict=True)
        slots = [
            _slot(goes_on.get(name), old_slots.get(name), slot, leaf, old_leaf.get(name), new_leaf[name])
            for name, leaf, slot in rows
        ]
        return jax.tree.unflatten(new_structure, slots)
    return old_node if kind == "common" else new_node


def _slot(goes_on: Any, old: Any, new: Any, leaf: Any, old_m: Any, new_m: Any) -> Any:
    """What a leaf goes on with: for each element its own. What the elements share lasts while any of them goes on.

    `old_m` and `new_m` are what the masks say of the leaf: either slot may be gathered.
    """
    if goes_on is None or not goes_on.any():
        return new
    if goes_on.all():
        return old
    at = _gather_ranks(goes_on, new_m, leaf) if _is_gathered(new_m) else goes_on
    element_shape = _gathered_shape(old_m, leaf) if _is_gathered(old_m) else jnp.shape(leaf)

    def moved(a: Any, b: Any) -> Any:
        if jnp.shape(a) != element_shape:
            return a
        return jnp.where(at, _gather(_spread(old_m, a, jnp.zeros(jnp.shape(leaf), a.dtype)), new_m), b)

    return jax.tree.map(moved, old, new)


def _as_cohorts(state: OptState, counters: tuple[Any, ...], count: int) -> Cohorts:
    """The state of `count` cohorts that begin together, each with counters of its own, which share no buffer."""
    return Cohorts(state, tuple(_copied(counters) for _ in range(count - 1)))


def _copied(counters: tuple[Any, ...]) -> tuple[Any, ...]:
    return jax.tree.map(lambda leaf: jnp.array(leaf) if isinstance(leaf, np.ndarray | jax.Array) else leaf, counters)


def _cohorts(state: OptState) -> Cohorts:
    """The state as that of cohorts, be it of one."""
    return state if isinstance(state, Cohorts) else Cohorts(state, ())


def _ranks(mask: Mask, trained: Params, freed: Freed | None, cohorts: int | None = None) -> tuple[list[int], list[Any]]:
    """(The phases at which something was freed, ascending; for each trained leaf which of them, an int or an array).

    An array has a rank for each element, of a gathered leaf for each place. Raises InputError if `freed` lacks a
    trained leaf, or is traced where its values are needed.
    """
    if freed is None:
        return [0], [0] * len(jax.tree.leaves(trained))
    phase_by_name = dict(zip(paths.unboxed_names(freed), jax.tree.leaves(freed), strict=True))
    if missing := [name for name in paths.unboxed_names(trained) if name not in phase_by_name]:
        raise InputError(
            f"the phases of `freed` and the parameters are different trees: {paths.some(missing)} only in the "
            "parameters"
        )
    names, leaves = paths.unboxed_names(trained), jax.tree.leaves(trained)
    trained_phases = [phase_by_name[name] for name in names]
    leaf_of_mask = dict(zip(paths.unboxed_names(mask), jax.tree.leaves(mask), strict=True))
    places = [(leaf_of_mask[name], leaf) for name, leaf in zip(names, leaves, strict=True)]
    if cohorts is not None:
        return list(range(cohorts)), [
            jnp.reshape(ranks, _gathered_shape(m, leaf)) if _is_gathered(m) and np.ndim(ranks) else ranks
            for ranks, (m, leaf) in zip(trained_phases, places, strict=True)
        ]
    if any(isinstance(phase, jax.core.Tracer) for phase in trained_phases):
        raise InputError(
            "the phases of `freed` are traced, so their values are unknown: call masks.since outside jax.jit, where "
            "masks are built"
        )
    phases = [np.asarray(phase) for phase in trained_phases]
    boundaries = sorted({int(value) for leaf in phases for value in np.unique(leaf) if leaf.ndim == 0 or value >= 0})
    ranks = [
        boundaries.index(int(leaf))
        if leaf.ndim == 0
        else np.maximum(np.searchsorted(boundaries, leaf), 0) * (leaf >= 0)
        for leaf in phases
    ]
    return boundaries, [
        _gather_ranks(rank, m, leaf) if _is_gathered(m) and np.ndim(rank) else rank
        for rank, (m, leaf) in zip(ranks, places, strict=True)
    ]


class _Parts(NamedTuple):
    """A state of `tx` in pieces: trees like the parameters, and single numbers."""

    nodes: list[Any]
    kinds: list[str]
    """'moments' (a tree like the parameters), 'common' (an injected number, or the count of a schedule: all cohorts
    have one), or 'counter' (each cohort has its own)."""
    treedef: Any

    def counters(self) -> tuple[Any, ...]:
        """The counters that each cohort has for itself."""
        return tuple(node for node, kind in zip(self.nodes, self.kinds, strict=True) if kind == "counter")

    def with_counters(self, counters: Sequence[Any]) -> OptState:
        """The state with these counters."""
        values = iter(counters)
        nodes = [next(values) if k == "counter" else n for n, k in zip(self.nodes, self.kinds, strict=True)]
        return jax.tree.unflatten(self.treedef, nodes)

    def with_moments(self, ranks: list[Any], others: Sequence["_Parts"], treedef: Any) -> OptState:
        """This state with each leaf's moments from the state of its cohort, which is one of `others`."""
        columns = zip(self.nodes, self.kinds, zip(*(other.nodes for other in others), strict=True), strict=True)
        nodes = [_pick(ranks, trees, treedef) if kind == "moments" else node for node, kind, trees in columns]
        return jax.tree.unflatten(self.treedef, nodes)


def _pick(ranks: list[Any], trees: Sequence[Any], treedef: Any) -> Any:
    """The tree with leaf i from trees[ranks[i]]; where that is an array, each element from its own tree."""
    columns = [treedef.flatten_up_to(tree) for tree in trees]
    picked = [
        columns[rank][i] if isinstance(rank, int) else _by_element(rank, [column[i] for column in columns])
        for i, rank in enumerate(ranks)
    ]
    return jax.tree.unflatten(treedef, picked)


def _by_element(ranks: Any, slots: Sequence[Any]) -> Any:
    """Slots of one leaf, one a cohort, as one; what the elements share is the first cohort's."""

    def pick(*leaves: Any) -> Any:
        first, *others = leaves
        try:
            fits = np.broadcast_shapes(np.shape(ranks), np.shape(first)) == np.shape(first)
        except ValueError:
            fits = False
        if fits:
            for rank, leaf in enumerate(others, start=1):
                first = jnp.where(ranks == rank, leaf, first)
        return first

    return jax.tree.map(pick, *slots)


def _parts(trained: Params, state: OptState) -> _Parts:
    _require_holes(trained, state)
    treedef = jax.tree.structure(trained)
    nodes, outer = jax.tree.flatten(state, is_leaf=lambda node: _is_like(treedef, node))
    marks = jax.tree.leaves(_marked(state), is_leaf=lambda node: _is_like(treedef, node))
    kinds = [
        "moments" if _is_like(treedef, node) else mark if isinstance(mark, str) else "counter"
        for node, mark in zip(nodes, marks, strict=True)
    ]
    return _Parts(nodes, kinds, outer)


def _require_holes(trained: Params, state: OptState) -> None:
    """Raises InputError where labels that are a tree of all parameters put a node in a frozen leaf's place: of a state
    that is not like the trained leaves nothing can be carried by leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(trained, is_leaf=_is_none)
    holes = {path for path, leaf in leaves if leaf is None}
    nodes, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    for path, node in nodes:
        if isinstance(node, optax.MaskedNode) and any(path[i:] in holes for i in range(len(path))):
            raise InputError(
                "the optimizer inside `masked` has labels, or a mask, that are a tree of all parameters, and there are "
                "phases: give a function of the tree in its place, such as lambda tree: jax.tree.map(.., tree)"
            )


def _is_like(treedef: Any, node: Any) -> bool:
    """Whether a node is a tree of the trained leaves, with an array at each, or a plain container of them (SM3)."""
    try:
        slots = treedef.flatten_up_to(node)
    except (ValueError, TypeError):
        return False
    leaves = jax.tree.leaves(slots, is_leaf=lambda n: isinstance(n, tuple) and hasattr(n, "_fields"))
    return all(isinstance(leaf, optax.MaskedNode) or not hasattr(leaf, "_fields") for leaf in leaves)


_SCHEDULED = (optax.ScaleByScheduleState, optax.InjectStatefulHyperparamsState)


def _marked(state: OptState) -> Any:
    """The state with the word 'common' at each number that is common to the cohorts."""

    def mark(node: Any) -> Any:
        if isinstance(node, optax.ScaleByScheduleState):
            return node._replace(count="common")
        if isinstance(node, optax.InjectStatefulHyperparamsState):
            return node._replace(
                count="common",
                hyperparams=jax.tree.map(lambda _: "common", node.hyperparams),
                hyperparams_states=jax.tree.map(lambda _: "common", node.hyperparams_states),
                inner_state=_marked(node.inner_state),
            )
        return node

    return jax.tree.map(mark, state, is_leaf=lambda node: isinstance(node, _SCHEDULED))


def _check_state(
    tx: optax.GradientTransformationExtraArgs, trained: Params, cohorts: int, state: OptState, has_arrays: bool
) -> None:
    """Raises InputError for the state of another mask, whose own failure would be cryptic or silent.

    Under arrays the shapes of a state turn on which leaves are gathered, and so on which arrays were traced in `init`.
    """
    first, younger = _cohorts(state)
    fresh = jax.eval_shape(tx.init, trained)
    expected: Any = jax.tree.structure(fresh)
    same = expected == jax.tree.structure(first) and 1 + len(younger) == cohorts
    shapes = (list(map(jnp.shape, jax.tree.leaves(state))) for state in (fresh, first)) if has_arrays else ((), ())
    if not same or len({*map(tuple, shapes)}) > 1:
        kind = (
            ", and give init and update the same kind of it: where an array is traced in one of them alone, close over "
            "it in both, or give both the mask that optimizer.gathered makes of it"
        )
        raise InputError(
            "the optimizer's state is of another mask or other cohorts: at a phase boundary, make it fit with "
            f"optimizer.carry; otherwise call init with this mask{kind if has_arrays else ''}"
        )


def _map_by_mask(mask: Mask, tree: Params, function: Any) -> Params:
    return jax.tree.map(lambda m, leaf: None if leaf is None else function(leaf, m), mask, tree)


def _select(gradient: Any, m: Any) -> Any:
    """The gradient, zero where an array freezes elements; gathered, where the mask is so."""
    if _is_gathered(m):
        return _gather(gradient, m)
    return jnp.where(_nonzero(m), gradient, jnp.zeros_like(gradient)) if masks.selects(m) else gradient


def _nonzero(m: Any) -> Any:
    return m if m.dtype == jnp.bool_ else m != 0


def _scale_and_select(update: Any, m: Any) -> Any:
    """The update times the mask's number, -0.0 where an array freezes elements."""
    if isinstance(m, bool):
        return update
    if _is_gathered(m):
        rates = 1 if m.rates is None else jnp.asarray(m.rates, jnp.result_type(update)).reshape(jnp.shape(update))
        return update if m.rates is None else update * rates
    is_bools = masks.selects(m) and m.dtype == jnp.bool_
    scaled = update if is_bools else update * jnp.asarray(m, jnp.result_type(update))
    return scaled if isinstance(m, float) else jnp.where(_nonzero(m), scaled, -jnp.zeros_like(update))


def _negative_zero(leaf: Any) -> Any:
    if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
        return jnp.full_like(leaf, -0.0)
    return jnp.zeros_like(leaf)


# A mask that moves.


class Chosen(NamedTuple):
    """What trains in a step of `scheduled`: the one mask whose bools may be traced. `apply` takes it."""

    on: Params
    """A bool, or an array of bools that broadcasts to its leaf; None where a leaf is frozen for good."""
    start: Params | None = None
    """What becomes of what is off, if it returns to its start."""


class Scheduled(NamedTuple):
    """The state of `scheduled`, all of it arrays: kept in checkpoints and mapped over fits as any state is."""

    state: OptState
    """That of `masked(tx, scope)`, with the groups as cohorts."""
    memory: Any
    """The schedule's."""
    on: Params
    """What trained in the last step, as `Chosen.on`."""
    step: Any
    """int32: how many steps there were."""
    trained: Params
    """float32 for each leaf: the number of steps in which it trained; one in which some of its elements did counts for
    their share. None where a leaf is frozen for good."""
    loss: Any = None
    """float32: the loss of the last step, if the schedule sees it before the gradient."""
    start: Params | None = None
    """The parameters at the beginning, if what is off returns to them."""
    slots: Any = None
    """int32: which group is in each slot, -1 for an empty one, if groups share slots."""
    over: Any = None
    """int32: how often a group was to be on, and found no slot; it was off then."""

    @property
    def mask(self) -> Chosen:
        """What trained in the last step, for `apply`."""
        return Chosen(self.on, self.start)


def scheduled(
    tx: optax.GradientTransformation, schedule: MaskSchedule, key: Any = None
) -> optax.GradientTransformationExtraArgs:
    """The transformation `tx` under a mask that a schedule chooses inside the step, which compiles once.

    >>> def alternate(memory, seen):
    ...     return {"a": seen.step % 2 == 0, "b": seen.step % 2 == 1}, memory
    >>> tx = scheduled(optax.sgd(1.0), MaskSchedule(lambda params, key: (), alternate, {"a": True, "b": True}))
    >>> params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> {name: leaf.tolist() for name, leaf in apply(params, updates, state.mask).items()}
    {'a': [0.0, 0.0], 'b': [1.0, 1.0]}

    - `update` needs the parameters, and `loss=` if the schedule sees it. `apply(params, updates, state.mask)` moves the
      parameters, and keeps the bits of what is off; the update of what is off is -0.0.
    - `tx` sees what is in the scope, as under `masked`. Gradients of what is off reach it as 0, unless `off` is 'live':
      clipping and norms inside it are of what trains in the step.
    - With `MaskSchedule.slots`, groups that are alike share the state of as many. `tx` then sees a tree in two parts,
      `slots.Gathered`; a group that finds no slot is off, and counted in `over`.
    - State is gated too, by `where`: moments as `MaskSchedule.off` says, and the counters of each group, which advance
      in steps in which the group is on. Schedules of the rate and injected numbers are common to all, and go on.

    `key` is that of `Seen.key` and of the memory, by default `jax.random.key(0)`; it may be traced. Elements that the
    scope selects are not gathered. Raises InputError, while it is traced, for what `masks.lint_schedule` refuses, for a
    mask or a memory of another form than they must have, for a mask that trains nothing, for moments that `tx` lacks,
    and for a state that is not its own.
    """
    scope, base = schedule.scope, jax.random.key(0) if key is None else key

    def init(params: Params) -> OptState:
        leaves = _canonical(scope, params)
        trained, _ = _split(params, leaves)
        under = _Under(tx, schedule, leaves, trained)
        state = under.optimizer.init(under.gathered(trained, under.empty))
        memory = jax.tree.map(_strong, schedule.init(trained, jax.random.fold_in(base, _OF_MEMORY)))
        step = jnp.zeros((), jnp.int32)
        start = jax.tree.map(jnp.array, trained) if schedule.returns else None

        def first(gradients: Params, loss: Any) -> Params:
            seen = _seen(schedule, state, trained, gradients, loss, step, base, start)
            return _chosen(schedule, memory, seen, leaves)[0]

        shapes = jax.eval_shape(first, jax.tree.map(jnp.asarray, trained), jnp.zeros((), jnp.float32))
        on = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, bool), shapes)
        counts = jax.tree.map(lambda leaf: jnp.zeros((), jnp.float32), trained)
        keeps_loss = schedule.when == "before" and "loss" in schedule.sees
        loss = jnp.full((), jnp.nan, jnp.float32) if keeps_loss else None
        slots, over = (None, None) if under.layout is None else (under.empty, jnp.zeros((), jnp.int32))
        return Scheduled(state, memory, on, step, counts, loss, start, slots, over)

    def update(
        updates: Params, state: OptState, params: Params | None = None, *, loss: Any = None, **extra: Any
    ) -> tuple[Params, OptState]:
        _require_update(schedule, state, params, loss)
        leaves = _canonical(scope, params)
        trained, _ = _split(params, leaves)
        under = _Under(tx, schedule, leaves, trained)
        rest = _split(params, leaves)[1]
        gradients = updates if isinstance(updates, Gathered) else _split(updates, _canonical(scope, params, updates))[0]
        step_loss = None if loss is None else jnp.asarray(loss, jnp.float32)

        def choose(new_state: OptState) -> tuple[Params, Any]:
            return _choose(schedule, leaves, base, trained, state, new_state, gradients, step_loss)

        if schedule.when == "after" and schedule.off == "live":  # what it sees of the optimizer is of this step
            changes, new_state = under.optimizer.update(gradients, state.state, trained, **extra)
            on, memory = choose(new_state)
            slots, over = None, None
        else:
            on, memory = choose(state.state)
            slots, over = under.assigned(state, on)
            on = under.with_slot(on, slots)
            reaching = gradients if isinstance(gradients, Gathered) else under.gathered(gradients, slots)
            is_on, gathered_params = under.is_on(on, slots), under.gathered(trained, slots)
            reaching = reaching if schedule.off == "live" else gated(reaching, is_on)
            before = under.cleared(state, slots, gathered_params)
            changes, new_state = under.optimizer.update(reaching, before, gathered_params, **extra)
            other = under.optimizer.init(gathered_params) if schedule.off == "dropped" else before
            new_state = under.gated_state(is_on, gathered_params, new_state, other)
            changes = under.spread(changes, slots)
        changes = jax.tree.map(lambda o, change: jnp.where(o, change, _negative_zero(change)), on, changes)
        counts = jax.tree.map(lambda count, o: count + jnp.mean(o, dtype=jnp.float32), state.trained, on)
        after = Scheduled(new_state, memory, on, state.step + 1, counts, state.loss, state.start, slots, over)
        after = after if state.loss is None else after._replace(loss=step_loss)
        return masks.join(changes, jax.tree.map(_negative_zero, rest)), after

    return optax.GradientTransformationExtraArgs(init, update)


class Ready(NamedTuple):
    """What a schedule has chosen before the gradient, and what to differentiate with respect to: what is in slots."""

    params: Gathered
    """The leaves of the scope, in slots where they share them: gradients of it are what `update` takes as well."""
    on: Gathered
    """Which of them are on."""
    groups: jax.Array
    """bool: which of the groups that share slots are on, in the order of `Layout.groups`."""
    slots: jax.Array
    """int32: which of these groups is in each slot, -1 for an empty one."""
    layout: Layout


def ready(
    tx: optax.GradientTransformation, schedule: MaskSchedule, key: Any, state: Scheduled, params: Params
) -> Ready | None:
    """What `scheduled(tx, schedule, key)` will train in this step, where groups share slots; None where none do.

    The parameters are those of the scope, with None elsewhere. Gradients of what is off need then not be formed.
    """
    leaves = _canonical(schedule.scope, params)
    trained, _ = _split(params, leaves)
    under = _Under(tx, schedule, leaves, trained)
    if under.layout is None:
        return None
    on, _ = _choose(schedule, leaves, key, trained, state, state.state, None, None)
    slots, _ = under.assigned(state, on)
    held = under.gathered(trained, slots), under.is_on(on, slots)
    return Ready(*held, under.groups_on(on), slots, under.layout)


def layout_of(schedule: MaskSchedule, scope: Mask, trained: Params) -> Layout | None:
    """Which groups share slots under a schedule, by the shapes of the leaves of its scope; None where none do."""
    ranks, _ = _groups(trained, schedule.groups)
    scope_by_name = dict(paths.items(scope))
    return layout(trained, ranks, [scope_by_name[name] is True for name in paths.names(trained)], schedule.slots)


class _Under:
    """An optimizer under the scope of a schedule, and its trees of trained leaves as it sees them."""

    def __init__(self, tx: optax.GradientTransformation, schedule: MaskSchedule, scope: Mask, trained: Params) -> None:
        self.schedule, self.trained = schedule, trained
        ranks, self.count = _groups(trained, schedule.groups)
        self.layout, mask = layout_of(schedule, scope, trained), scope
        self.leaf_groups = ranks
        if self.layout is not None:
            owners = [rank for rank in range(self.count) if rank not in self.layout.groups]
            per_group = [owners.index(rank) if rank in owners else -1 for rank in ranks]
            structure = jax.tree.structure(trained)
            per_slot = [jax.tree.unflatten(structure, [len(owners) + i] * len(ranks)) for i in range(self.layout.slots)]
            freed = Gathered(jax.tree.unflatten(structure, per_group), tuple(per_slot))
            mask = Gathered(scope, (scope,) * self.layout.slots)
            self.count = len(owners) + self.layout.slots
            number = dict(paths.items(freed))
            shapes = jax.eval_shape(lambda: self.gathered(jax.tree.map(jnp.asarray, trained), self.empty))
            self.leaf_groups = [number[name] for name in paths.names(shapes)]
        else:
            freed = jax.tree.unflatten(jax.tree.structure(trained), ranks)
        several = self.count > 1
        self.optimizer = _masked(tx, mask, freed if several else None, self.count if several else None, gathers=False)

    @property
    def empty(self) -> jax.Array:
        """Slots with nothing in them."""
        return jnp.full(0 if self.layout is None else self.layout.slots, -1, jnp.int32)

    def gathered(self, tree: Params, slots: Any) -> Params:
        return tree if self.layout is None else gather(tree, self.layout, slots)

    def spread(self, changes: Params, slots: Any) -> Params:
        if self.layout is None:
            return changes
        return spread(changes, self.layout, slots, jax.tree.map(_negative_zero, self.trained))

    def groups_on(self, on: Params) -> jax.Array:
        """bool: which of the groups that share slots are on. Raises InputError where they are on in part."""
        assert self.layout is not None
        leaves = jax.tree.leaves(on)
        if odd := [paths.names(on)[p] for places in self.layout.members for p in places if jnp.ndim(leaves[p])]:
            raise InputError(f"the schedule has slots, and chooses elements of '{odd[0]}': switch whole leaves")
        return jnp.stack([jnp.any(jnp.stack([leaves[p] for p in places])) for places in self.layout.members])

    def assigned(self, state: Scheduled, on: Params) -> tuple[Any, Any]:
        """(Which group is in each slot; how often one found none so far)."""
        if self.layout is None:
            return None, None
        slots, over = assign(state.slots, self.groups_on(on))
        return slots, state.over + over

    def with_slot(self, on: Params, slots: Any) -> Params:
        """What is on, less the groups that found no slot."""
        if self.layout is None:
            return on
        leaves, structure = jax.tree.flatten(on)
        for group, places in enumerate(self.layout.members):
            for place in places:
                leaves[place] = leaves[place] & jnp.any(slots == group)
        return jax.tree.unflatten(structure, leaves)

    def is_on(self, on: Params, slots: Any) -> Params:
        if self.layout is None:
            return on
        parts = gather(on, self.layout, slots)
        held = [jax.tree.map(lambda o, i=i: o & (slots[i] >= 0), part) for i, part in enumerate(parts.slots)]
        return Gathered(parts.own, tuple(held))

    def cleared(self, state: Scheduled, slots: Any, params: Params) -> OptState:
        """The optimizer's state, as on step 0 in slots whose group is a new one."""
        if self.layout is None:
            return state.state
        stays = (slots == state.slots) & (slots >= 0)
        ones = jax.tree.map(lambda leaf: jnp.ones((), bool), params.own)
        slot_flags = [jax.tree.map(lambda leaf, i=i: stays[i], part) for i, part in enumerate(params.slots)]
        return self.gated_state(Gathered(ones, tuple(slot_flags)), params, state.state, self.optimizer.init(params))

    def gated_state(self, on: Params, params: Params, new: OptState, other: OptState) -> OptState:
        """`new` where it is on, and elsewhere `other`; of 'gated' moments all of `new`."""
        if self.schedule.off == "live" or not jax.tree.leaves(params):
            return new
        return _gated_state(self.schedule.off == "gated", on, self.leaf_groups, self.count, params, new, other)


_OF_MEMORY = 2**31 - 1
"""What is folded into a schedule's key for its memory; steps fold in their numbers."""


def gated(gradients: Params, on: Params) -> Params:
    """Gradients with zeros for what is off; both have None for leaves that are frozen for good.

    >>> gated({"a": jnp.ones(2), "b": None}, {"a": jnp.array([True, False]), "b": None})["a"].tolist()
    [1.0, 0.0]
    """
    return jax.tree.map(lambda g, o: jnp.where(o, g, jnp.zeros_like(g)), gradients, on)


def moments(trained: Params, state: OptState) -> dict[str, Params]:
    """{field: its tree} of what in a state of `masked` has the structure and the shapes of the trained leaves.

    Of fields with one name it is the first.

    >>> list(moments({"w": jnp.ones(2)}, optax.adam(0.1).init({"w": jnp.ones(2)})))
    ['mu', 'nu']
    """
    structure: Any = jax.tree.structure(trained)
    shapes = list(map(jnp.shape, jax.tree.leaves(trained)))
    fields: dict[str, Params] = {}

    def walk(node: Any, name: str = "") -> None:
        if name and jax.tree.structure(node) == structure and list(map(jnp.shape, jax.tree.leaves(node))) == shapes:
            fields.setdefault(name, node)
        elif hasattr(node, "_fields"):
            for field, value in zip(node._fields, node, strict=True):
                walk(value, field)
        elif isinstance(node, tuple | list | dict):
            for value in node.values() if isinstance(node, dict) else node:
                walk(value)

    walk(_cohorts(state)[0])
    return fields


def require_moments(schedule: MaskSchedule, trained: Params, state: OptState) -> dict[str, Params]:
    """{field: its tree} of the moments that a schedule sees, of a state of `masked` for the leaves of its scope.

    Raises InputError, with what there is, for a field that the state lacks.
    """
    fields, names = moments(trained, state), sorted({*schedule.sees} - {"gradients", "loss"})
    if missing := [name for name in names if name not in fields]:
        has = f"it has {', '.join(fields)}" if fields else "it has no moments"
        raise InputError(f"the schedule sees '{missing[0]}', which the optimizer's state lacks: {has}")
    return {name: fields[name] for name in names}


def _strong(leaf: Any) -> Any:
    """An array of its own, whose dtype does not give way to that of others."""
    array = jnp.array(leaf)
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.extended)
    return array if is_key else jax.lax.convert_element_type(array, array.dtype)


def _require_update(schedule: MaskSchedule, state: Any, params: Params | None, loss: Any) -> None:
    if not isinstance(state, Scheduled):
        raise InputError("the optimizer's state is not one of scheduled: begin with its init")
    if params is None:
        raise InputError("update is called without params, which a schedule needs: tx.update(gradients, state, params)")
    if loss is None and "loss" in schedule.sees:
        raise InputError("the schedule sees the loss: tx.update(gradients, state, params, loss=loss)")


def _groups(trained: Params, groups: Any) -> tuple[list[int], int]:
    """(The rank of each trained leaf's group among those that have one; how many groups these are)."""
    names = paths.unboxed_names(trained)
    if groups is None or not names:
        return [0] * len(names), 1
    number = dict(zip(paths.unboxed_names(groups), map(int, jax.tree.leaves(groups)), strict=True))
    used = sorted({number[name] for name in names})
    return [used.index(number[name]) for name in names], len(used)


def _seen(
    schedule: MaskSchedule,
    state: OptState,
    trained: Params,
    gradients: Params | None,
    loss: Any,
    step: Any,
    key: Any,
    start: Params | None,
) -> Seen:
    """What a schedule sees. Raises InputError for moments that the state lacks."""
    fields = require_moments(schedule, trained, state)
    groups = schedule.groups
    if groups is not None:
        number = dict(zip(paths.unboxed_names(groups), map(int, jax.tree.leaves(groups)), strict=True))
        group_numbers = [number[name] for name in paths.unboxed_names(trained)]
        groups = jax.tree.unflatten(jax.tree.structure(trained), group_numbers)
    return Seen(
        step,
        jax.random.fold_in(key, step),
        trained,
        gradients if "gradients" in schedule.sees else None,
        loss if "loss" in schedule.sees else None,
        fields,
        groups,
        start,
    )


def _choose(
    schedule: MaskSchedule,
    scope: Mask,
    key: Any,
    trained: Params,
    state: Scheduled,
    optimizer_state: OptState,
    gradients: Params | None,
    loss: Any,
) -> tuple[Params, Any]:
    """(What is on in this step, the memory after it): chosen anew, or as before."""
    seen_loss = state.loss if schedule.when == "before" else loss
    seen = _seen(schedule, optimizer_state, trained, gradients, seen_loss, state.step, key, state.start)

    def anew() -> tuple[Params, Any]:
        return _chosen(schedule, state.memory, seen, scope)

    if schedule.every == 1:
        return anew()
    return jax.lax.cond(state.step % schedule.every == 0, anew, lambda: (state.on, state.memory))


def _chosen(schedule: MaskSchedule, memory: Any, seen: Seen, scope: Mask) -> tuple[Params, Any]:
    """(What is on, a tree like the trained leaves; the memory) after `choose`.

    Raises InputError for a mask that is of another tree, or not of bools, and for a memory of another form.
    """
    answer = schedule.choose(memory, seen)
    if not isinstance(answer, tuple) or hasattr(answer, "_fields") or len(answer) != 2:
        raise InputError(f"the schedule's choose gives {plugins.shown(answer)}: return (mask, memory)")
    mask, after = answer
    mask_by_name, scope_by_name = (
        dict(zip(paths.unboxed_names(t), jax.tree.leaves(t), strict=True)) for t in (mask, scope)
    )
    names = paths.unboxed_names(seen.params)
    only = (
        [name for name in names if name not in mask_by_name],
        [name for name in mask_by_name if name not in scope_by_name],
    )
    if any(only):
        where = "of the parameters' leaves it lacks" if only[0] else "only it has"
        raise InputError(
            f"the schedule's choose gives a mask of another tree: {where} {paths.some(only[0] or only[1])}"
        )
    leaves = jax.tree.leaves(seen.params)
    on = [_on(name, mask_by_name[name], leaf, scope_by_name[name]) for name, leaf in zip(names, leaves, strict=True)]
    if on and not any(isinstance(o, jax.core.Tracer) or np.any(o) for o in on):
        raise InputError("the schedule's choose gives a mask that trains nothing: let something train")
    _require_form(memory, after)
    after = jax.tree.map(lambda leaf, like: jnp.asarray(leaf, like.dtype), after, memory)
    return jax.tree.unflatten(jax.tree.structure(seen.params), list(map(jnp.asarray, on))), after


def _on(name: str, m: Any, leaf: Any, scope_leaf: Any) -> Any:
    """Where a leaf trains, of those of its elements that are in the scope."""
    is_array = isinstance(m, np.ndarray | jax.Array | np.bool_)
    if not isinstance(m, bool) and not (is_array and m.dtype == jnp.bool_):
        kind = f"{m.dtype}{list(m.shape)}" if is_array else plugins.shown(m)
        raise InputError(f"the schedule's choose gives {kind} at '{name}': give bools; rates stand in the scope")
    try:
        fits = np.broadcast_shapes(np.shape(m), jnp.shape(leaf)) == jnp.shape(leaf)
    except ValueError:
        fits = False
    if not fits:
        shapes = f"{list(np.shape(m))} at '{name}', which does not broadcast to {list(jnp.shape(leaf))}"
        raise InputError(f"the schedule's choose gives an array of shape {shapes}: give a bool, or an array that does")
    if masks.selects(scope_leaf):
        m = jnp.broadcast_to(m, jnp.shape(leaf)) & jnp.broadcast_to(_nonzero(scope_leaf), jnp.shape(leaf))
    return jnp.reshape(m, (1,) * (jnp.ndim(leaf) - np.ndim(m)) + np.shape(m)) if np.ndim(m) else m


def _require_form(before: Any, after: Any) -> None:
    """Raises InputError, naming a leaf, for a memory of another structure, shape or dtype than it had."""

    def form(tree: Any) -> dict[str, str]:
        return {path: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}" for path, leaf in paths.items(tree)}

    was, now = form(before), form(after)
    for path in dict.fromkeys([*was, *now]):
        if was.get(path) != now.get(path):
            place = f" at '{path}'" if path else ""
            change = f"{was.get(path, 'nothing')}{place} became {now.get(path, 'nothing')}"
            raise InputError(
                f"the schedule's memory changes its form: {change}: keep shapes and dtypes as init gave them"
            )
    containers: list[Any] = [jax.tree.structure(before), jax.tree.structure(after)]
    if containers[0] != containers[1]:
        raise InputError("the schedule's memory changes its containers: keep them as init gave them")


def _gated_state(
    keeps_moments: bool, on: Params, ranks: Sequence[int], count: int, trained: Params, new: OptState, other: OptState
) -> OptState:
    """The groups' counters, and the moments unless all are kept, of `new` where it is on and of `other` elsewhere."""
    anys = [jnp.any(leaf) for leaf in jax.tree.leaves(on)]
    group_on = [
        functools.reduce(jnp.logical_or, (o for o, rank in zip(anys, ranks, strict=True) if rank == group))
        for group in range(count)
    ]
    (first, younger), (first_other, younger_other) = _cohorts(new), _cohorts(other)
    parts, parts_other = _parts(trained, first), _parts(trained, first_other)
    nodes = []
    for node, kind, off in zip(parts.nodes, parts.kinds, parts_other.nodes, strict=True):
        if kind == "counter":
            nodes.append(_where(group_on[0], node, off))
        elif kind == "moments" and not keeps_moments:
            nodes.append(jax.tree.map(_slots_where, on, trained, node, off))
        else:
            nodes.append(node)
    state = jax.tree.unflatten(parts.treedef, nodes)
    if count < 2:
        return state
    pairs = zip(group_on[1:], younger, younger_other, strict=True)
    return Cohorts(state, tuple(_where(is_on, counters, off) for is_on, counters, off in pairs))


def _where(on: Any, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(on, a, b), new, old)


def _slots_where(on: Any, leaf: Any, new: Any, old: Any) -> Any:
    """What a state has of a leaf: by element where it has one for each, else whole."""

    def pick(a: Any, b: Any) -> Any:
        return jnp.where(on if jnp.shape(a) == jnp.shape(leaf) else jnp.any(on), a, b)

    return jax.tree.map(pick, new, old)


def _apply_chosen(params: Params, updates: Params, chosen: Chosen) -> Params:
    trees = {"the parameters": params, "the updates": updates, "the mask": chosen.on}
    if chosen.start is not None:
        trees["the start"] = chosen.start
    columns = {name: jax.tree.leaves(tree, is_leaf=_is_none) for name, tree in trees.items()}
    for name, column in columns.items():
        if len(column) != len(columns["the parameters"]):
            count = f"{len(column)} leaves, and the parameters {len(columns['the parameters'])}"
            raise InputError(
                f"{name} that apply is given have {count}: give it the state's mask and updates of one step"
            )

    def moved(leaf: Any, update: Any, on: Any, start: Any = None) -> Any:
        if on is None or leaf is None:
            return leaf
        after = jnp.asarray(leaf + update).astype(jnp.asarray(leaf).dtype)
        return jnp.where(on, after, leaf if start is None else start)

    leaves = [moved(*row) for row in zip(*columns.values(), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=_is_none), leaves)


# Leaves of which few elements train.

SHARE = 32
"""Of a leaf at most one element in so many is gathered."""


IsElementwise = Callable[[Any, tuple[Any, ...], tuple[Any, ...]], bool]
"""(structure, shapes of the whole leaves, shapes of those gathered) -> what `elementwise.holds_of_shapes` says of an
optimizer."""


def gathered(is_elementwise: IsElementwise, params: Params, mask: Mask | Callable[..., Mask]) -> Mask:
    """The canonical mask in which `Elements` stand for the arrays whose leaves `masked(tx, mask)` gathers.

    They are those whose elements, with some room, are at most one in SHARE of their leaf, if the optimizer does the
    same to the elements by themselves, as its program shows (`elementwise`). The moments of Adam then take the room of
    the elements, and its arithmetic their time: on 4 M elements it took 37 ms a step of all, 0.3 ms of 1 in 1000, 10 ms
    of 1 in 20, 20 ms of 1 in 4; on 0.4 M 1.5, 0.04, 0.2 and 0.4 ms (2026-11-27, jax 0.10.2, two busy cores). So it
    would pay up to 1 in 4. It ends earlier for the sake of bits: sums over elements (a global norm) round otherwise
    without the zeros between them, and compilers join other multiplications and additions; masks that train more, such
    as 1 element in 20, keep theirs.

    The room for elements follows from the leaf's size and the share that all arrays of the mask select together,
    rounded up to a power of the root of 2, with five standard deviations of a random draw to spare, or is so many times
    four: so random masks of one share compile once. One large leaf is gathered from 1 element in 45.3 on, one of 500
    elements never. A mask that selects no element stays as it is, as does one with `Elements` already. So does an array
    of one number for all of its leaf: it switches the leaf as a value, and masks with other such values share what is
    compiled (`masks.switched`).

    >>> adam = functools.partial(elementwise.holds_of_shapes, optax.adam(0.1))
    >>> every_500th = np.arange(10000).reshape(100, 100) % 500 == 0
    >>> mask = gathered(adam, {"w": jnp.ones((100, 100))}, {"w": every_500th})
    >>> mask["w"].places.shape, mask["w"].places[:3].tolist()
    ((62,), [0, 500, 1000])
    """
    leaves = _canonical(mask, params)
    return _with_elements(is_elementwise, leaves, _split(params, leaves)[0])


def _with_elements(is_elementwise: IsElementwise, mask: Mask, trained: Params) -> Mask:
    """The canonical mask with `Elements` for arrays that select few elements, if the optimizer is elementwise.

    A mask with `Elements` is decided already: the arrays beside them have another share by themselves.
    """
    if any(map(_is_gathered, jax.tree.leaves(mask))):
        return mask
    structure: Any = jax.tree.structure(mask)
    rows = list(zip(jax.tree.leaves(mask), structure.flatten_up_to(trained), strict=True))
    arrays = [
        (i, np.broadcast_to(m, jnp.shape(leaf)), leaf)
        for i, (m, leaf) in enumerate(rows)
        if leaf is not None and math.prod(np.shape(leaf)) and _selects_elements(m, leaf)
    ]
    counts = [np.count_nonzero(array) for _, array, _ in arrays]
    if not any(counts):
        return mask
    share = sum(counts) / sum(array.size for _, array, _ in arrays)
    rooms = [_room(array.size, int(count), share) for (_, array, _), count in zip(arrays, counts, strict=True)]

    few = [j for j, (_, array, _) in enumerate(arrays) if rooms[j] * SHARE <= array.size <= _MOST]
    if not few:
        return mask

    def replaced(value: Callable[[int], Any], leaves: Sequence[Any]) -> Any:
        values = {arrays[j][0]: value(j) for j in few}
        return jax.tree.unflatten(structure, [values.get(i, leaf) for i, leaf in enumerate(leaves)])

    shapes = [None if leaf is None else _shape_of(leaf) for _, leaf in rows]
    part = replaced(lambda j: _first_shape(arrays[j][2], rooms[j]), shapes)
    whole, structure_of_trained = jax.tree.flatten(jax.tree.unflatten(structure, shapes))
    if not is_elementwise(structure_of_trained, tuple(whole), tuple(jax.tree.leaves(part))):
        return mask
    return replaced(lambda j: _elements(arrays[j][1], rooms[j]), [m for m, _ in rows])


def _selects_elements(m: Any, leaf: Any) -> bool:
    """Whether a leaf of a mask is an array that is known, and is no one number for the whole of its leaf."""
    return masks.selects(m) and not isinstance(m, jax.core.Tracer) and (m.size > 1 or jnp.size(leaf) == 1)


_MOST = 2**31 - 2**27
"""Elements of a leaf whose places int32 can count, with those beyond it."""


def _room(size: int, count: int, share: float) -> int:
    """Places for the elements of a leaf: what a random mask of this share needs, or four times it, or more.

    Shares are rounded up to the next power of the root of 2, so that those of nearly one share have one room.
    """
    mean = size * 2 ** (math.ceil(2 * math.log2(share)) / 2)
    room = math.ceil(mean + 5 * math.sqrt(mean) + 8)
    while room < count:
        room *= 4
    return room


def _elements(array: np.ndarray, room: int) -> Elements:
    places = np.flatnonzero(array)
    beyond = np.arange(array.size, array.size + room - len(places))
    rates = None
    if array.dtype != bool:
        rates = np.concatenate([array.reshape(-1)[places], np.zeros(len(beyond))])
    return Elements(np.concatenate([places, beyond]).astype(np.int32), rates, array)


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape of a leaf, in single precision: what kind an optimizer is does not turn on that."""
    dtype = jnp.result_type(leaf)
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.float32 if jnp.issubdtype(dtype, jnp.floating) else dtype)


def _first_shape(leaf: Any, room: int) -> jax.ShapeDtypeStruct:
    """The shape of a leaf that is gathered: as many axes, since optimizers choose by them which leaves decay."""
    return jax.ShapeDtypeStruct((1,) * (jnp.ndim(leaf) - 1) + (room,), _shape_of(leaf).dtype)


def _gathered_shape(m: Elements, leaf: Any) -> tuple[int, ...]:
    return _first_shape(leaf, np.shape(m.places)[0]).shape


def _is_gathered(m: Any) -> bool:
    return isinstance(m, Elements)


_PLACES: Any = {"unique_indices": True, "indices_are_sorted": True}


def elements(leaf: Any, places: Any) -> Any:
    """The elements of a leaf at the places of its `Elements`, [1, ..., room] of its axes and dtype; 0 for those beyond.

    >>> elements(jnp.arange(6.0).reshape(2, 3), np.array([1, 4, 6]))
    Array([[1., 4., 0.]], dtype=float32)
    """
    flat = jnp.reshape(jnp.asarray(leaf), -1)
    values = flat.at[places].get(mode="fill", fill_value=0, **_PLACES)
    return values.reshape((1,) * (jnp.ndim(leaf) - 1) + np.shape(places))


def with_elements(leaf: Any, places: Any, values: Any) -> Any:
    """The leaf with values [1, ..., room] at the places of its `Elements`; what is beyond the leaf is dropped.

    >>> with_elements(jnp.zeros((2, 3)), np.array([1, 4, 6]), jnp.ones((1, 3))).tolist()
    [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
    """
    flat = jnp.reshape(jnp.asarray(leaf), -1)
    return flat.at[places].set(jnp.reshape(values, -1), mode="drop", **_PLACES).reshape(jnp.shape(leaf))


def _gather(leaf: Any, m: Any) -> Any:
    """The elements of a leaf at the places of the mask, [1, ..., room], 0 for those beyond it; any other leaf as is."""
    return elements(leaf, m.places) if _is_gathered(m) else leaf


def _spread(m: Any, part: Any, leaf: Any) -> Any:
    """The leaf with the elements `part` at the places of the mask; of one that is not gathered these as they are."""
    return with_elements(leaf, m.places, part) if _is_gathered(m) and part is not None else part


def _spread_update(unplaced: Any, m: Any, leaf: Any, update: Any) -> Any:
    """A whole update where `masked` gathered by itself; where the mask that it was given is gathered, as it is."""
    if not _is_gathered(m) or _is_gathered(unplaced) or update is None:
        return update
    return _spread(m, update, jnp.full(jnp.shape(leaf), -0.0, jnp.result_type(update)))


def _gather_ranks(ranks: Any, m: Elements, leaf: Any) -> np.ndarray:
    return at_places(ranks, m).reshape(_gathered_shape(m, leaf))


def at_places(ranks: np.ndarray, m: Any) -> np.ndarray:
    """Ranks or flags of a leaf's elements [room] at the places of `Elements`, 0 for those beyond the leaf.

    Under any other leaf of a mask they stay as they are.
    """
    if not _is_gathered(m):
        return ranks
    flat = np.broadcast_to(ranks, m.array.shape).reshape(-1)
    inside = m.places < flat.size
    return flat[np.where(inside, m.places, 0)] * inside
