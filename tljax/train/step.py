"""One training step of one fit, read in the order in which it happens: loss, gradients, update, apply, log.

`step` knows nothing of other fits and of many devices: `vectorize` maps it over both. What decides its compilation is
`Spec`, what is passed to it is `Hyper`; both follow from a `Fit` and its masks.
"""

import functools
import itertools
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tljax import augment, batch_stats, elementwise, masks, models, objective, optimizer, optimizers, paths, penalties
from tljax.augment import Augmentation
from tljax.data import draw
from tljax.models.slotted import Slots
from tljax.penalties import Penalty
from tljax.types import Batch, InputError, Mask, MaskSchedule, Model, ModelState, OptState, Params, PhaseRule


@dataclass(frozen=True)
class Spec:
    """Everything that is static: equal specs share one compiled step. Hashable.

    The caller sets the fields up to `keeps_dropout`; `specialize` sets the others from a fit and its masks.
    """

    model: Model
    loss: objective.Loss
    optimizer: optimizers.OptimizerSpec
    penalties: tuple[Penalty, ...] = ()
    smooth_labels: bool = False
    """Whether the labels are smoothed; by how much is passed as the number 'label_smoothing'."""
    merge: Callable[[Params], Params] | None = None
    """Adapted parameters -> the model's own, or those with a `LowRank` in the place of kernels; it is called before the
    model is applied."""
    keeps_dropout: tuple[str, ...] = ()
    """The stages that keep their dropout while they are frozen; other frozen stages run as in evaluation."""
    structure: Any = None
    """The structure of the parameters, a PyTreeDef."""
    mask: tuple[bool | None, ...] = ()
    """For each leaf whether it trains in full (True) or not at all (False); None if a number or an array is passed."""
    cohorts: tuple[int | None, ...] | None = None
    """For each leaf the rank of its cohort, -1 for a frozen leaf, None if an array of ranks, one for each element, is
    passed. None instead of the tuple if all that trains is of one cohort."""
    cohort_count: int = 1
    fresh: tuple[str, ...] = ()
    """The paths of the leaves that were drawn anew, if a penalty refers to where the fit began."""
    augment: tuple[Augmentation, ...] = ()
    """What changes each batch at random before it is trained on. The caller sets it."""
    views: int = 0
    """How many augmented views of each example the inputs have, [batch, views, ...]: a step draws one. 0 of inputs
    without such an axis; features of a frozen prefix may have one (`features.skip_frozen_prefix`)."""
    batch_stats: tuple[tuple[str, str], ...] = ()
    """(stage, what becomes of its state): 'frozen', 'tracked', 'reestimated', or 'auto', which holds for stages that
    are not named (`state_modes`). The caller sets it."""
    tracked: tuple[str, ...] = ()
    """The stages whose state follows the batches of this phase: they normalise by the batch."""
    reestimated: tuple[str, ...] = ()
    """The stages whose state is computed anew (`vectorize.reestimate`): all where a phase begins, and those of them
    that are tracked at the end of each segment too."""
    averages: bool = False
    """Whether there is an average of what trains; the weight of the newest values in it is the number
    'average_weight'."""
    weighs_classes: bool = False
    """Whether L of an example is times the weight of its class, which is passed."""
    microbatch: int = 0
    """So many examples of the batch at a time give a part of its gradient; 0 for all at once."""
    schedule: MaskSchedule | None = None
    """How the mask moves from step to step, without its scope: that is the mask."""
    settled: tuple[str, ...] = ()
    """The leading stages that compute the same from here on, since the schedule has switched them off for good; () if
    the frozen prefix is that of the mask. The trainer sets it."""


class Hyper(NamedTuple):
    """Everything that is traced beside parameters and optimizer: other values compile nothing new.

    `step` takes the numbers of one fit; where there are many, each array has a leading axis of fits.
    """

    weights: tuple[Mapping[str, Any], ...]
    """The weights of each penalty, by name."""
    numbers: Mapping[str, Any]
    """The optimizer's numbers by name, and 'label_smoothing'."""
    scales: tuple[Any, ...]
    """The numbers and arrays of the mask, one for each None in `Spec.mask`; (places, rates or None) of `Elements`."""
    key: Any
    """The key of dropout and augmentations."""
    start: Params | None
    """The parameters at the start, if a penalty refers to them."""
    fisher: Params | None
    """The source's Fisher information, if a penalty needs it."""
    cohorts: tuple[Any, ...] = ()
    """Arrays of ranks, one for each None in `Spec.cohorts`; of `Elements` the ranks of their places."""
    start_state: ModelState | None = None
    """The model's state at the start, if a penalty refers to it."""
    class_weights: Any = None
    """float32 [classes], if classes are weighed."""


class Fit(NamedTuple):
    """One fit before its first step."""

    params: Params
    phases: tuple[tuple[int, Mask | Callable[[Params], Mask]], ...]
    """(first step, mask) of each phase; the first phase begins at step 0. A function is called with the parameters at
    the first step of its phase."""
    order: Callable[[int, int], np.ndarray]
    """(start, stop) -> int32 [stop - start, batch]: the examples of these steps, -1 for padding."""
    rates: np.ndarray
    """float32 [steps]: the learning rate of each step."""
    weights: tuple[Mapping[str, float], ...]
    """The weights of each penalty, by name."""
    numbers: Mapping[str, float]
    """The optimizer's numbers by name, 'label_smoothing', and with an average 'average_weight': 1 less its decay."""
    key: jax.Array
    """The key of dropout and augmentations."""
    fresh: Mask | None = None
    """Which leaves were drawn anew, for penalties that treat them otherwise."""
    fisher: Params | None = None
    """The source's Fisher information, for penalties: {path: array} or a tree."""
    shares: Hashable = None
    """Neighbours in a group with equal values, other than None, have one order, one key and equal parameters at the
    start: the batches and the features of the frozen prefix are then passed once for all of them."""
    model_state: Mapping[str, Any] = {}
    """The model's state at the start, apart from its parameters."""
    order_name: Hashable = None
    """Fits with equal names, other than None, have one order: of a stream it is read once for all of them."""
    pass_steps: int = 0
    """How many of the first steps of the order see each training example once: the batches over which a state is
    reestimated. 0 stands for all steps."""
    rules: tuple[PhaseRule, ...] = ()
    """How each phase ends, and its rate; () for phases that end where the next begins, all at the rate of `rates`."""
    class_weights: np.ndarray | None = None
    """float32 [classes], if classes are weighed."""


class Log(NamedTuple):
    """What happened: float32 scalars of one step, or arrays [fits, steps] of a segment."""

    loss: Any
    """Mean L of the batch, in nats for a cross-entropy; with the weights of classes in it."""
    penalty: Any
    """lambda R at the parameters before the update."""
    terms: tuple[Any, ...]
    """The part of each penalty in `penalty`."""
    gradient_norm: Any
    """Global norm of the objective's gradient over the trained leaves; where the mask moves, over what is on, unless
    what is off is 'live'."""


def step(
    spec: Spec,
    hyper: Hyper,
    trained: Params,
    frozen: Params,
    opt_state: OptState,
    batch: Batch,
    rate: jax.Array,
    number: jax.Array,
    axis: str | None = None,
    average: "Average | None" = None,
    model_state: ModelState | None = None,
) -> "tuple[Params, OptState, Average | None, ModelState | None, Log]":
    """One training step: (trained leaves, optimizer state, average, model state, log) after it.

    `average` is that of the trained leaves, None in a fit without; `model_state` is {} or None of a model without.
    `trained` and `frozen` are the two parts of the parameters as `masks.split` gives them; the objective is
    differentiated with respect to the former alone. The batch is as `augmented` gives it, `rate` is the learning rate,
    `number` that of the step. With an `axis` of devices the batch is one device's part, and the step is that of the
    whole batch.
    """

    def loss_fn(trained: Params) -> tuple[jax.Array, Any]:
        return _objective(spec, hyper, trained, frozen, model_state, batch, number, axis)

    prepared = _ready(spec, hyper, trained, opt_state, model_state)
    if prepared is not None:
        loss, terms, gradients = _slots_gradient(
            spec, hyper, prepared, trained, frozen, model_state, batch, number, axis
        )
    elif spec.microbatch:
        (loss, terms), gradients = _accumulated(spec, hyper, trained, frozen, model_state, batch, number, axis)
    else:
        (_, (loss, terms, model_state)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(trained)
    # After differentiating: the gradient through a sum over devices would be so many times too large.
    loss, terms, gradients = total((loss, terms, gradients), axis)
    if spec.schedule is None:
        updates, opt_state = transformation(spec, hyper, rate).update(gradients, opt_state, trained)
        trained = optimizer.apply(trained, updates, selection := _selection(spec, hyper))
    else:
        updates, opt_state = transformation(spec, hyper, rate).update(gradients, opt_state, trained, loss=loss)
        trained = optimizer.apply(trained, updates, opt_state.mask)
        selection = optimizer.Chosen(opt_state.on)
        is_on = opt_state.on if prepared is None else prepared.on
        gradients = gradients if spec.schedule.off == "live" else optimizer.gated(gradients, is_on)
    if average is not None:
        average = averaged(average, trained, model_state or {}, hyper.numbers["average_weight"], selection)
    log = Log(loss, sum(terms, start=jnp.zeros(())), terms, _norm(gradients))
    return trained, opt_state, average, model_state, log


def _ready(
    spec: Spec, hyper: Hyper, trained: Params, opt_state: OptState, model_state: ModelState | None
) -> optimizer.Ready | None:
    """What a schedule has chosen before the gradient, where groups of leaves share slots and `forms_no_others`."""
    if spec.schedule is None or not spec.schedule.slots or not forms_no_others(spec, trained, model_state or ()):
        return None
    tx = optimizers.build(spec.optimizer, jnp.zeros(()), hyper.numbers)
    return optimizer.ready(tx, *_schedule(spec, hyper), opt_state, trained)


def forms_no_others(spec: Spec, trained: Params, stateful: Collection[str] = ()) -> bool:
    """Whether under a schedule with slots no gradient is formed of what is off: by flags and shapes, never by a timing.

    It is so where the groups that share slots are one stage each, whole and without a state, and where there is neither
    a penalty nor a `merge` nor microbatches. `stateful` are the stages that have a state.
    """
    assert spec.schedule is not None
    layout = optimizer.layout_of(spec.schedule, _as_mask(spec), trained)
    if layout is None or spec.penalties or spec.merge is not None or spec.microbatch:
        return False
    names = paths.names(trained)
    for places in layout.members:
        stages = {name for name in models.names(spec.model) for place in places if paths.inside((name,))(names[place])}
        stage = next(iter(stages), "")
        whole = [name for name in paths.names(_as_mask(spec)) if paths.inside((stage,))(name)]
        if len(stages) != 1 or stage in stateful or sorted(whole) != sorted(names[place] for place in places):
            return False
    return True


def _slots_gradient(
    spec: Spec,
    hyper: Hyper,
    prepared: optimizer.Ready,
    trained: Params,
    frozen: Params,
    model_state: ModelState | None,
    batch: Batch,
    number: jax.Array,
    axis: str | None,
) -> tuple[jax.Array, tuple[jax.Array, ...], Params]:
    """(L, no terms, the gradient with respect to what is in slots): that of what is off is not formed."""
    names, layout = paths.names(trained), prepared.layout
    every = models.names(spec.model)
    stages = [next(s for s in every if paths.inside((s,))(names[places[0]])) for places in layout.members]
    slots = jnp.arange(layout.slots)
    which = [jnp.max(jnp.where(prepared.slots == group, slots, -1)) for group in range(len(layout.members))]

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        held = tuple(slot[stages[0]] for slot in params.slots)
        rest = jax.tree.map(lambda part, leaf: leaf if part is None else None, params.own, trained, is_leaf=_is_none)
        stage_slots = Slots(tuple(stages), jnp.stack(which), held)
        others = masks.join(frozen, rest)
        return _objective(spec, hyper, params.own, others, model_state, batch, number, axis, slots=stage_slots)

    (_, (loss, terms, _)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(prepared.params)
    return loss, terms, gradients


def _is_none(leaf: Any) -> bool:
    return leaf is None


_AUGMENT = 2**31 - 1
"""What is folded into a step's key for augmentations: stages fold in their numbers, from 1 on."""


_SCHEDULE = 2**31 - 2
"""What is folded into a fit's key for the schedule of its mask."""


def augmented(spec: Spec, key: jax.Array, batch: Batch, number: jax.Array, axis: str | None = None) -> Batch:
    """The batch of step `number` after the augmentations of a fit with this key.

    It follows from the key, the step and each example's place in the whole batch: fits of one seed see the same.
    """
    if not spec.augment and not spec.views:
        return batch
    step_key = jax.random.fold_in(jax.random.fold_in(key, number), _AUGMENT)
    if spec.views:
        return augment.view(spec.views, step_key, batch, axis)
    return augment.apply(spec.augment, step_key, batch, axis)


def _objective(
    spec: Spec,
    hyper: Hyper,
    trained: Params,
    frozen: Params,
    model_state: ModelState | None,
    batch: Batch,
    number: jax.Array,
    axis: str | None,
    part: tuple[jax.Array, jax.Array] | None = None,
    slots: Slots | None = None,
) -> tuple[jax.Array, tuple[jax.Array, tuple[jax.Array, ...], ModelState | None]]:
    """L + lambda R of a batch, beside it L, the terms of lambda R, and the model's state after the batch.

    With an `axis` of devices each has a part of the batch and gives a part of each value: the parts add up to it. So
    they do for a microbatch, whose `part` is (its number, the weight of the whole batch); penalties of leaves are 0 in
    it, since they are of no example.
    """
    x, targets, weight = batch
    x = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf, x)
    key = jax.random.fold_in(hyper.key, number)
    key = key if part is None else jax.random.fold_in(key, part[0])
    merge = spec.merge or (lambda params: params)
    whole, start_state = merge(masks.join(trained, frozen)), hyper.start_state or {}
    how: Any = {"key": key, "frozen": _without_dropout(spec), "tracked": spec.tracked, "weight": weight, "axis": axis}
    outputs, new_state = models.run(spec.model, whole, model_state or {}, x, trained=trained, slots=slots, **how)
    smoothing = (hyper.numbers["label_smoothing"],) if spec.smooth_labels else ()
    values = spec.loss(outputs[-1], targets, *smoothing)
    if spec.weighs_classes:
        values = values * hyper.class_weights[targets]
    summed = jnp.vdot(values, weight)
    count = total(weight.sum(), axis) if part is None else part[1]
    loss = summed / count
    terms = []
    for penalty, weights in zip(spec.penalties, hyper.weights, strict=True):
        if "features" in penalty.needs:
            at_start = models.features(spec.model, merge(hyper.start), x, state=start_state)
            pairs = list(zip(outputs, at_start, strict=True))[len(frozen_prefix_of(spec)) : -1]
            terms.append(penalty.function(pairs, weight, count, **weights))
        elif part is None:
            terms.append(_leaves_term(spec, hyper, penalty, weights, trained, axis))
        else:
            terms.append(jnp.zeros_like(loss))
    return sum(terms, start=loss), (loss, tuple(terms), new_state if model_state else model_state)


def _leaves_term(
    spec: Spec, hyper: Hyper, penalty: Penalty, weights: Mapping[str, Any], trained: Params, axis: str | None
) -> jax.Array:
    """The term of a penalty of leaves; with an `axis` of devices each device's share of it."""
    fresh = dict.fromkeys(spec.fresh, True)
    value = penalties.on_leaves(penalty, weights, trained, hyper.start, hyper.fisher, fresh)
    return value if axis is None else value / jax.lax.axis_size(axis)


def _accumulated(
    spec: Spec,
    hyper: Hyper,
    trained: Params,
    frozen: Params,
    model_state: ModelState | None,
    batch: Batch,
    number: jax.Array,
    axis: str | None,
) -> tuple[tuple[jax.Array, tuple[jax.Array, ...]], Params]:
    """((L, the terms of lambda R), the gradient of their sum) of a batch, one microbatch after another.

    Each gives its share of the whole batch's weighted mean, and shares add up in float32 or wider; penalties of leaves
    are added once. It is the gradient of `_objective` but for rounding, and for what the model draws (dropout).
    Raises InputError where the batch is not divided into microbatches.
    """
    devices = 1 if axis is None else jax.lax.axis_size(axis)
    rows, size = len(batch.weight), spec.microbatch // devices
    check_microbatch(spec.microbatch, rows * devices, devices)
    weight = total(batch.weight.sum(), axis)

    def split(leaf: jax.Array) -> jax.Array:
        """Leaves [parts, size, ...]: each part has rows of every device that shares the batch, so that none moves."""
        return leaf.reshape(size, rows // size, *leaf.shape[1:]).swapaxes(0, 1)

    def part_gradient(item: tuple[jax.Array, Batch]) -> Any:
        part, examples = item

        def loss_fn(trained: Params) -> tuple[jax.Array, Any]:
            return _objective(spec, hyper, trained, frozen, model_state, examples, number, axis, (part, weight))

        (_, (loss, terms, _)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(trained)
        return (loss, terms), gradients

    def add(sums: Any, item: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        return jax.tree.map(lambda total, share: total + share.astype(total.dtype), sums, part_gradient(item)), None

    items = jnp.arange(rows // size), jax.tree.map(split, batch)
    shapes = jax.eval_shape(part_gradient, jax.tree.map(lambda leaf: leaf[0], items))
    wide = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), shapes)
    ((loss, terms), gradients), _ = jax.lax.scan(add, wide, items)

    def penalties_sum(trained: Params) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        values = tuple(
            jnp.zeros_like(loss)
            if "features" in penalty.needs
            else _leaves_term(spec, hyper, penalty, weights, trained, axis)
            for penalty, weights in zip(spec.penalties, hyper.weights, strict=True)
        )
        return sum(values, start=jnp.zeros_like(loss)), values

    if any("features" not in penalty.needs for penalty in spec.penalties):
        (_, values), penalty_gradients = jax.value_and_grad(penalties_sum, has_aux=True)(trained)
        terms = tuple(term + value for term, value in zip(terms, values, strict=True))
        gradients = jax.tree.map(lambda gradient, more: gradient + more, gradients, penalty_gradients)
    return (loss, terms), jax.tree.map(lambda gradient, leaf: gradient.astype(leaf.dtype), gradients, trained)


def refuse_microbatch(microbatch: int, tracked: Sequence[str]) -> None:
    """Raise InputError for microbatches where the state of stages follows the batch: they normalise by all of it."""
    if microbatch and tracked:
        reason = f"stage '{tracked[0]}' normalises by the whole batch: leave it at 0, or give `batch_stats=frozen`"
        raise InputError(reason, field="microbatch", value=microbatch)


def check_microbatch(microbatch: int, batch: int, devices: int = 1) -> None:
    """Raise InputError unless microbatches divide a batch, and devices that share it each microbatch.

    >>> check_microbatch(40, 100)
    Traceback (most recent call last):
    ...
    tljax.types.InputError: microbatch=40: it does not divide the batch of 100 examples: give 25 or 50, say
    """
    if microbatch and (batch % microbatch or microbatch > batch):
        near = [size for size in range(1, batch + 1) if batch % size == 0 and size != batch]
        below = [size for size in near if size < microbatch][-1:] + [size for size in near if size > microbatch][:1]
        reason = f"it does not divide the batch of {batch} examples: give {' or '.join(map(str, below)) or 0}, say"
        raise InputError(reason, field="microbatch", value=microbatch)
    if microbatch % devices:
        reason = f"{devices} devices share each batch and do not divide it: give a multiple of {devices}"
        raise InputError(reason, field="microbatch", value=microbatch)


def total(tree: Any, axis: str | None) -> Any:
    """The sum of a tree over an axis of devices; the tree itself if there is no axis."""
    return tree if axis is None else jax.lax.psum(tree, axis)


def transformation(spec: Spec, hyper: Hyper, rate: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer of one fit, under its mask and with its cohorts, or under its schedule."""
    tx = optimizers.build(spec.optimizer, rate, hyper.numbers)
    if spec.schedule is not None:
        return optimizer.scheduled(tx, *_schedule(spec, hyper))
    if spec.cohorts is None:
        return optimizer.masked(tx, _mask(spec, hyper))
    arrays = iter(hyper.cohorts)
    ranks = [next(arrays) if rank is None else rank for rank in spec.cohorts]
    return optimizer.masked(tx, _mask(spec, hyper), jax.tree.unflatten(spec.structure, ranks), spec.cohort_count)


def _schedule(spec: Spec, hyper: Hyper) -> tuple[MaskSchedule, Any]:
    """The schedule of a fit's mask, and its key."""
    assert spec.schedule is not None
    return replace(spec.schedule, scope=_mask(spec, hyper)), jax.random.fold_in(hyper.key, _SCHEDULE)


def _as_mask(spec: Spec) -> Mask:
    """The mask of a spec, with a rate where one is passed."""
    return jax.tree.unflatten(spec.structure, [0.5 if trains is None else trains for trains in spec.mask])


def _mask(spec: Spec, hyper: Hyper) -> Mask:
    """The mask with its traced numbers and arrays in place."""
    traced = (masks.Elements(*leaf) if isinstance(leaf, tuple) else leaf for leaf in hyper.scales)
    return jax.tree.unflatten(spec.structure, [next(traced) if trains is None else trains for trains in spec.mask])


def _selection(spec: Spec, hyper: Hyper) -> Mask:
    """The mask in which a number for a whole leaf, which is never 0 here, is True: which elements move."""
    return jax.tree.map(
        lambda m: m if isinstance(m, bool | masks.Elements) or masks.selects(m) else True, _mask(spec, hyper)
    )


class Average(NamedTuple):
    """The exponential average of a fit, float32 or wider."""

    params: Params
    """A tree like the parameters, with None for a leaf that has never trained. Of a leaf in `places` it has the
    elements there alone, [1, ..., room], 0 for those beyond the leaf."""
    model_state: ModelState
    """The average of the model's state; as long as that stands still, the state itself."""
    places: Params | None = None
    """A tree like the parameters: int32 [room], as of `masks.Elements`, for a leaf of which only these elements have
    trained, None for others; None where there is no such leaf."""


def averaged(average: Average, trained: Params, model_state: ModelState, weight: Any, selection: Mask) -> Average:
    """The average a + weight * (p - a) of what trains, after a step that gave the values p.

    It begins with the values at the start, and so has no bias to correct: after t steps they weigh (1 - weight)^t.
    `selection` says what trains, as in `optimizer.apply`: the other elements keep their bits. It is the average of
    Tarvainen & Valpola 2017, "Mean teachers are better role models" (arXiv:1703.01780), as state is averaged too; of
    iterates, Polyak & Juditsky 1992, "Acceleration of stochastic approximation by averaging".

    >>> averaged(Average({"w": jnp.zeros(2)}, {}), {"w": jnp.ones(2)}, {}, 0.25, {"w": np.array([True, False])}).params
    {'w': Array([0.25, 0.  ], dtype=float32)}
    """
    if average.places is not None:
        trained = _map_with_none(
            lambda at, leaf: leaf if at is None else optimizer.elements(leaf, at), average.places, trained
        )
        selection = _map_with_none(lambda at, m: m if at is None else True, average.places, selection)
    toward = jax.tree.map(lambda mean, leaf: weight * (leaf - mean), average.params, trained)
    params = optimizer.apply(average.params, toward, selection)

    def moved(mean: Any, leaf: Any) -> Any:  # a state that stands still keeps its bits
        return jnp.where(mean == leaf, mean, mean + weight * (leaf - mean)).astype(mean.dtype)

    return average._replace(params=params, model_state=jax.tree.map(moved, average.model_state, model_state))


def entered(
    average: Average | None, params: Params, model_state: ModelState, mask: Mask, places: Params | None = None
) -> Average:
    """The average of fits when a phase begins; all arrays have a leading axis of fits.

    A leaf that trains under `mask` for the first time enters as a copy; what was averaged before stays. `places`, a
    tree like the parameters, says of which leaves that train the average is to have some elements alone, int32 [fits,
    room]: such have all elements that trained so far (`averaged_places`).
    """

    def copy(leaf: Any) -> Any:
        kind = jnp.result_type(leaf)
        is_float = jnp.issubdtype(kind, jnp.floating)
        return jnp.array(leaf, jnp.promote_types(kind, jnp.float32) if is_float else kind)

    def entered_leaf(leaf: Any, mean: Any, before: Any, now: Any) -> Any:
        if leaf is None or (mean is not None and before is None):
            return mean
        if mean is None:
            return copy(leaf if now is None else jax.vmap(optimizer.elements)(leaf, now))
        whole = jax.vmap(optimizer.with_elements)(copy(leaf), before, mean)
        return whole if now is None else jax.vmap(optimizer.elements)(whole, now)

    trained = masks.split(params, mask)[0]
    none = jax.tree.map(lambda leaf: None, trained)
    places = none if places is None else places
    if average is None:
        averages = _map_with_none(entered_leaf, trained, none, none, places)
        return Average(averages, jax.tree.map(copy, model_state), _none_if_empty(places))
    before = none if average.places is None else average.places
    averages = _map_with_none(entered_leaf, trained, average.params, before, places)
    places = _map_with_none(lambda leaf, old, new: old if leaf is None else new, trained, before, places)
    return average._replace(params=averages, places=_none_if_empty(places))


def part_of_average(average: Average, trains: Mask) -> tuple[Average, Average]:
    """(The average of what trains in a phase with the model's state, that of the parameters that do not)."""
    moving, resting = masks.split(average.params, trains)
    if average.places is None:
        return average._replace(params=moving), Average(resting, {})
    placed = [
        _map_with_none(lambda mean, at: None if mean is None else at, part, average.places)
        for part in (moving, resting)
    ]
    moving_places, resting_places = map(_none_if_empty, placed)
    return Average(moving, average.model_state, moving_places), Average(resting, {}, resting_places)


def joined_average(moving: Average, resting: Average) -> Average:
    """The whole average, from the two parts of `part_of_average`."""
    params = masks.join(moving.params, resting.params)
    placed = [part.places for part in (moving, resting) if part.places is not None]
    return Average(params, moving.model_state, masks.join(*placed) if len(placed) == 2 else next(iter(placed), None))


def with_average(params: Params, model_state: ModelState, average: Average) -> tuple[Params, ModelState]:
    """(Parameters, model state) with the average in place of what has one, each leaf in its own dtype.

    The arrays are of one fit, or all have a leading axis of fits.
    """

    def placed(mean: Any, leaf: Any, at: Any = None) -> Any:
        if mean is None:
            return leaf
        mean = jnp.asarray(mean).astype(jnp.result_type(leaf))
        if at is None:
            return mean
        return (optimizer.with_elements if np.ndim(at) == 1 else jax.vmap(optimizer.with_elements))(leaf, at, mean)

    places = () if average.places is None else (average.places,)
    whole = _map_with_none(placed, average.params, params, *places)
    return whole, jax.tree.map(placed, average.model_state, model_state)


def averaged_places(spec: Spec, hyper: Hyper, fit: Fit, history: Sequence[Mask]) -> Params | None:
    """`places` of `entered`, for the phase of the last mask of `history`, from the `hyper` of the fits; None of none.

    They are those of the leaves of `has_average_of_elements`.
    """
    flags = has_average_of_elements(spec, fit, history)
    leaves, structure = jax.tree.flatten(_mask(spec, hyper))
    rows = zip(leaves, flags, strict=True)
    return _none_if_empty(jax.tree.unflatten(structure, [m.places if has_few else None for m, has_few in rows]))


def has_average_of_elements(spec: Spec, fit: Fit, history: Sequence[Mask]) -> tuple[bool, ...]:
    """For each leaf, whether the average has the elements alone that the last mask of `history` trains.

    It is so where the optimizer has them alone, and every earlier mask trained some of them and no others.
    """
    masks_of_phases = [
        jax.tree.leaves(gathered(replace(spec, schedule=schedule_of(fit, part)), fit.params, part[-1]))
        for part in (history[: phase + 1] for phase in range(len(history)))
    ]
    return tuple(map(_only_grows, zip(*masks_of_phases, strict=True)))


def _only_grows(phase_leaves: Sequence[Any]) -> bool:
    """Whether the last mask of a leaf is `Elements`, and those before it are, or freeze the leaf, and select no other.

    >>> few, more = (masks.Elements(None, None, np.array(array)) for array in ([0, 1, 0], [0, 1, 1]))
    >>> _only_grows([False, few, more]), _only_grows([few, few]), _only_grows([more, few]), _only_grows([few, True])
    (True, True, False, False)
    """
    training = [m for m in phase_leaves if m is not False]
    if phase_leaves[-1] is False or not all(isinstance(m, masks.Elements) for m in training):
        return False
    selected = [np.asarray(m.array) != 0 for m in training]
    return not any((before & ~after).any() for before, after in itertools.pairwise(selected))


def _map_with_none(function: Callable[..., Any], *trees: Params) -> Params:
    """`jax.tree.map`, in which None is a leaf of the first tree."""
    return jax.tree.map(function, *trees, is_leaf=lambda leaf: leaf is None)


def _none_if_empty(tree: Params) -> Params | None:
    return tree if jax.tree.leaves(tree) else None


def rule(fit: Fit, phase: int) -> PhaseRule:
    """How a phase of a fit ends, and its rate."""
    return fit.rules[phase] if fit.rules else PhaseRule()


def schedule_of(fit: Fit, history: Sequence[Mask]) -> MaskSchedule | None:
    """How the mask of a fit moves in the phase of the last mask of `history`."""
    return rule(fit, len(history) - 1).schedule


def _norm(tree: Params) -> jax.Array:
    """Global norm; on a CPU of the same bits however fits are divided over devices.

    There each leaf's sum is one product of the leaf with itself, behind a barrier. A product with ones adds in an order
    of XLA's that goes with the devices (1e-7 apart); and a sum that XLA joins with what computes the gradient makes a
    step at width 4096 half as long again (21.7 ms, not 14.4; with the barrier 15.6; without a norm 14.3; least of four
    rounds, 2026-11-26, jax 0.10.2, two busy cores). Elsewhere XLA joins the sum with the update, which reads the same
    gradient: behind a barrier it would be read once more, by a kernel of its own for each leaf.
    """
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return jnp.zeros(())
    return jnp.sqrt(jax.lax.platform_dependent(leaves, cpu=_sum_of_products, default=_sum_of_squares))


def _sum_of_products(leaves: Sequence[jax.Array]) -> jax.Array:
    """The sum of all squares, a product behind a barrier for each leaf."""

    def squared(leaf: jax.Array) -> jax.Array:
        flat = jax.lax.optimization_barrier(leaf.reshape(-1))
        return jnp.dot(flat, flat, precision="highest")

    return sum(map(squared, leaves), start=jnp.zeros(()))


def _sum_of_squares(leaves: Sequence[jax.Array]) -> jax.Array:
    """The sum of all squares, as XLA likes to add them."""
    return sum((jnp.sum(leaf * leaf) for leaf in leaves), start=jnp.zeros(()))


@functools.lru_cache
def forward(model: Model, merge: Callable[[Params], Params] | None = None) -> Callable[[Params, jax.Array], jax.Array]:
    """(variables, inputs [batch, ...]) -> logits [batch, classes], as in evaluation; one object for equal arguments.

    The variables are parameters and, where the model has one, its state among them (`batch_stats.join`).
    """

    def forward(variables: Params, inputs: Any) -> Any:
        params, state = batch_stats.split(variables)
        return models.apply(model, merge(params) if merge else params, inputs, state=state)

    return forward


def trained_leaves(spec: Spec) -> Mask:
    """The bool tree of the leaves with anything to train."""
    return jax.tree.unflatten(spec.structure, [trains is not False for trains in spec.mask])


def frozen_stages(model: Model, mask: Mask) -> tuple[str, ...]:
    """The stages that are frozen whole; in training they run as in evaluation, so without dropout.

    A stage with nothing that could train (pooling, dropout) goes with the next above it that has something, and is not
    frozen if there is none; one that is `fixed` is frozen in any case.

    >>> frozen_stages(models.build("mlp", 10, hidden=(8, 8), activation="relu"),
    ...               {"hidden_0": {"w": True}, "hidden_1": {"w": False}, "head": {"w": True}})
    ('hidden_1',)
    """
    names: list[str] = []
    frozen_above = False
    for stage in reversed(model):
        name = stage.name
        leaves = dict(paths.items(mask[name]))
        with_above = not leaves and not stage.fixed
        frozen = frozen_above if with_above else not any(map(masks.trains, leaves.values()))
        if any("batch_stats" not in path.split("/") for path in leaves):
            frozen_above = frozen
        names += [name] if frozen else []
    return tuple(reversed(names))


def state_modes(
    requested: Sequence[tuple[str, str]], params: Params, model_state: ModelState, mask: Mask
) -> dict[str, str]:
    """{stage: 'frozen', 'tracked' or 'reestimated'} of the stages that have a state, in the phase of a mask.

    Under 'auto', which is for stages that are not `requested`, a stage is tracked where every leaf of it trains that
    can, and else frozen; one that has no such leaf where every leaf of the model does.
    """
    if not model_state:
        return {}
    modes = dict(requested)
    train = zip(paths.names(mask), jax.tree.leaves(mask), paths.trainable(params), strict=True)
    rows = [(path, masks.trains(leaf)) for path, leaf, able in train if able]

    def whole(stage: str) -> bool:
        return all([trains for path, trains in rows if path.startswith(f"{stage}/")] or [trains for _, trains in rows])

    return {
        stage: mode if mode != "auto" else "tracked" if whole(stage) else "frozen"
        for stage, mode in ((stage, modes.get(stage, "auto")) for stage in model_state)
    }


def frozen_prefix(model: Model, mask: Mask, keeps_dropout: Collection[str] = ()) -> tuple[str, ...]:
    """The leading stages that are frozen whole, up to the first that keeps its dropout, or whose state is tracked.

    Their outputs are the same at every step, and can be computed once.

    >>> model = models.build("mlp", 10, hidden=(8,), activation="relu")
    >>> frozen_prefix(model, {"hidden_0": {"w": False}, "head": {"w": True}})
    ('hidden_0',)
    """
    constant = {*frozen_stages(model, mask)} - {*keeps_dropout}
    return tuple(itertools.takewhile(constant.__contains__, models.names(model)))


def frozen_prefix_of(spec: Spec) -> tuple[str, ...]:
    """The frozen prefix of a spec's model: under its mask, or what a schedule has switched off beyond it."""
    return spec.settled or frozen_prefix(spec.model, trained_leaves(spec), (*spec.keeps_dropout, *spec.tracked))


def _without_dropout(spec: Spec) -> tuple[str, ...]:
    """The frozen stages that run as in evaluation, whether or not they are of the prefix."""
    return tuple(name for name in frozen_stages(spec.model, trained_leaves(spec)) if name not in spec.keeps_dropout)


def specialize(spec: Spec, fit: Fit, history: Sequence[Mask]) -> Spec:
    """The spec of a fit in the phase of the last mask of `history`, the masks of all phases that have begun.

    Raises InputError for a rule of decay or a penalty that covers no leaf, for a penalty that lacks the Fisher
    information that it needs, and for microbatches of a model whose state follows the batch.
    """
    optimizers.require_decay(spec.optimizer.decay, fit.params)
    for penalty in spec.penalties:
        paths.require_globs(fit.params, (penalty.on,))
        if "fisher" in penalty.needs and fit.fisher is None:
            remedy = "train the source with `save_fisher=`"
            raise InputError(f"penalty '{penalty.name}' needs the source's Fisher information: {remedy}")
    trains = jax.tree.leaves(masks.static(fit.params, history[-1]))
    schedule = schedule_of(fit, history)
    spec = replace(spec, schedule=None if schedule is None else replace(schedule, scope=None))
    if schedule is not None and schedule.slots:
        _require_alike_decay(spec, schedule, fit.params)
    # A leaf of 1.0 compiles to the same as True, bit for bit: `canonical` makes it True.
    leaves = [(m is True or None) if t else False for m, t in zip(_mask_leaves(fit, history), trains, strict=True)]
    count, ranks = cohort_ranks(spec, fit, history)
    static = jax.tree.unflatten(jax.tree.structure(history[-1]), trains)
    modes = state_modes(spec.batch_stats, fit.params, fit.model_state, static)
    reestimated = tuple(stage for stage, mode in modes.items() if mode == "reestimated")
    frozen = frozen_stages(spec.model, static) if reestimated else ()
    tracked = tuple(
        stage for stage, mode in modes.items() if mode == "tracked" or (mode == "reestimated" and stage not in frozen)
    )
    refuse_microbatch(spec.microbatch, tracked)
    anchored = fit.fresh is not None and any(penalty.needs_start for penalty in spec.penalties)
    return replace(
        spec,
        structure=jax.tree.structure(history[-1]),
        mask=tuple(leaves),
        cohorts=tuple(rank if isinstance(rank, int) else None for rank in ranks) if count > 1 else None,
        cohort_count=count,
        fresh=tuple(path for path, drawn in paths.items(fit.fresh) if drawn) if anchored else (),
        tracked=tracked,
        reestimated=reestimated,
    )


def _require_alike_decay(spec: Spec, schedule: MaskSchedule, params: Params) -> None:
    """Raise InputError for a rule of decay that tells groups apart that share slots: decay goes with the slot."""
    trained = masks.split(params, schedule.scope)[0]
    layout = optimizer.layout_of(schedule, masks.canonical(params, schedule.scope), trained)
    decay = list(paths.items(optimizers.decays(spec.optimizer.decay, trained)))
    for places in zip(*layout.members, strict=True) if layout else ():
        if len({decay[place][1] for place in places}) > 1:
            reason = f"it tells '{decay[places[0]][0]}' from others with which it shares slots: let blocks decay alike"
            raise InputError(reason, field="decay", value=spec.optimizer.decay)


def traced_leaves(spec: Spec, fit: Fit, history: Sequence[Mask]) -> tuple[Any, ...]:
    """The numbers and arrays of the last mask that are passed: one for each None in the mask of `spec`.

    Of an array that trains few elements of its leaf it is (places, rates or None), as of `masks.Elements`.
    """
    leaves = jax.tree.leaves(gathered(spec, fit.params, history[-1]))
    passed = (m for m, trains in zip(leaves, spec.mask, strict=True) if trains is None)
    return tuple((m.places, m.rates) if isinstance(m, masks.Elements) else m for m in passed)


def _mask_leaves(fit: Fit, history: Sequence[Mask]) -> list[Any]:
    """The leaves of the last mask, in canonical form."""
    return jax.tree.leaves(masks.canonical(fit.params, history[-1]))


def gathered(spec: Spec, params: Params, mask: Mask) -> Mask:
    """The mask as the optimizer of a spec works with it: `optimizer.gathered`, unless it moves."""
    if spec.schedule is not None:
        return masks.canonical(params, mask)
    return optimizer.gathered(functools.partial(_is_elementwise, spec.optimizer), params, mask)


@functools.lru_cache(maxsize=256)
def _is_elementwise(spec: optimizers.OptimizerSpec, *shapes: Any) -> bool:
    """Whether an optimizer is elementwise, whatever its numbers."""
    return elementwise.holds_of_shapes(optimizers.build(spec, 0.1, dict.fromkeys(spec.numbers, 0.5)), *shapes)


def cohort_ranks(spec: Spec, fit: Fit, history: Sequence[Mask]) -> tuple[int, list[Any]]:
    """(how many cohorts there are; for each leaf its cohort's rank: an int, or an int32 array of its elements' ranks).

    Of an array that trains few elements of its leaf it is the ranks of their places, as of `masks.Elements`. A cohort
    is the leaves freed at one phase boundary; what is frozen has the rank -1. Under a schedule there is one: its groups
    have counters of their own.
    """
    trains = jax.tree.leaves(masks.static(fit.params, history[-1]))
    if spec.schedule is not None:
        return 1, [0 if t else -1 for t in trains]
    freed = jax.tree.leaves(masks.since(*history))
    phases = [np.asarray(phase) if t else np.asarray(-1) for phase, t in zip(freed, trains, strict=True)]
    boundaries = np.unique(np.concatenate([[], *(phase[phase >= 0] for phase in phases)])).astype(int)
    ranks = [np.where(phase < 0, -1, np.searchsorted(boundaries, phase)).astype(np.int32) for phase in phases]
    if any(rank.ndim for rank in ranks):
        leaves = zip(ranks, jax.tree.leaves(gathered(spec, fit.params, history[-1])), strict=True)
        ranks = [optimizer.at_places(rank, m) if rank.ndim else rank for rank, m in leaves]
    return len(boundaries), [int(rank) if rank.ndim == 0 else rank for rank in ranks]


def group_key(spec: Spec, fit: Fit, history: Sequence[Mask]) -> tuple[Spec, Hashable]:
    """What fits that are trained together have in common: the spec of their phase, and the shapes and kinds of the
    arrays that their masks pass, and of which leaves the average has some elements alone."""
    spec = specialize(spec, fit, history)
    ranks = [rank for rank in cohort_ranks(spec, fit, history)[1] if not isinstance(rank, int)]
    leaves, structure = jax.tree.flatten((traced_leaves(spec, fit, history), ranks))
    few_elements = has_average_of_elements(spec, fit, history) if spec.averages else ()
    return spec, (structure, tuple((leaf.shape, leaf.dtype.kind) for leaf in map(np.asarray, leaves)), few_elements)


def batch_size(fit: Fit) -> int:
    """Examples of a step, padding included."""
    return fit.order.batch if isinstance(fit.order, draw.Order) else fit.order(0, 1).shape[1]
