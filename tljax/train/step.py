"""The segment: the one compiled training function. What it depends on, and what is passed to it.

State and numbers carry a leading axis of trials, which is divided over the devices; on each, `lax.map` runs trials
one after another, so that a trial has the same bits in any group. Trials that share an order may run side by side.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tljax import masks, models, objective, optimizer, optimizers, parallel
from tljax.train import features
from tljax.types import Mask, Model, OptState, Params, Views


@dataclass(frozen=True)
class Program:
    """All that decides what is compiled: equal records share one executable. Hashable."""

    model: Model
    loss: objective.Loss
    optimizer: optimizers.Spec
    penalties: tuple[objective.Penalty, ...] = ()
    smooth: bool = False
    """Whether the labels are smoothed, by a number that is passed."""
    merge: Callable[[Params], Params] | None = None
    """Adapted parameters -> ordinary ones, before the model is applied."""
    mask: tuple[Any, ...] = ()
    """The structure of the parameters, then for each leaf True, False, or None for a number or array to come."""
    cohorts: tuple[int | None, ...] | None = None
    """For each leaf the rank of its age, -1 for a frozen one, None for an array to come, of the ranks of its elements;
    None in all where all that trains has one age."""
    count: int = 1
    """How many cohorts there are."""
    fresh: tuple[str, ...] = ()
    """The leaves that were drawn anew, where a penalty asks."""
    drawing: tuple[str, ...] = ()
    """The stages that keep their dropout while they are frozen; the others run as in evaluation then."""


class Log(NamedTuple):
    """What happened in a segment: float32 [trials, steps] each."""

    loss: Any
    """Mean L of the step's batch, in nats for a cross-entropy."""
    penalty: Any
    """lambda R at the step's start."""
    terms: tuple[Any, ...]
    """Each penalty's part of it."""
    gradient_norm: Any
    """Global norm of the objective's gradient over the trained leaves."""


class Numbers(NamedTuple):
    """The traced numbers of a group, leading axis of trials."""

    weights: tuple[Any, ...]
    given: Mapping[str, Any]
    scales: tuple[Any, ...]
    key: Any
    start: Params | None
    fisher: Params | None
    ranks: tuple[Any, ...] = ()
    """Of the cohorts, where the elements of a leaf are of several."""


class Layout(NamedTuple):
    """How the trials of a part of a group stand on the devices: compiled too. Hashable."""

    mesh: Any = None
    """The devices over which trials and their batches are divided; None for one."""
    lanes: int = 1
    """So many trials, each with the next, share an order and the data."""
    wide: bool = False
    """Whether these go side by side under `vmap`, which rounds in another way; else one after another."""
    abreast: bool = False
    """The same for trials of different orders."""
    axis: str | None = None
    """Under `jax.pmap`, the axis of devices that share each batch: what is summed over it is summed by hand."""


# Why the loop has this form (2026-11-23, jax 0.10.2, two cores; medians of eight rounds in turn, over the form chosen:
# examples gathered by an order, one-hot labels, not unrolled):
#                          784-512-10   784-2048-2048-10
#   integer labels            1.00           1.02
#   permuted beforehand       0.95           1.03
#   unrolled twice            1.01           0.93
#   unrolled four times       1.04           0.94
# All within the noise: one-hot labels take smoothing and every loss of optax, an order as an argument serves every
# label budget, and a loop whose bounds are traced serves every length.
@functools.partial(jax.jit, static_argnames=("program", "layout"), donate_argnames=("trained", "opt_state"))
def segment(
    program: Program,
    layout: Layout,
    trained: Params,
    opt_state: OptState,
    frozen: Params,
    numbers: Numbers,
    data: tuple[Views, jax.Array],
    order: jax.Array,
    rates: jax.Array,
    steps: tuple[int, int, int],
) -> tuple[Params, OptState, Log]:
    """Rows `begin` to `end` of `order` [trials / lanes, rows, batch], the first of which is step `first`.

    `rates` are [trials, rows]; the data are views, one for all trials or one for each of the orders, and labels [n].
    """
    views, labels = data
    own = (trained, opt_state, frozen, numbers, rates)
    many = not isinstance(views, tuple)
    split, common = ((own, order, views), (labels, steps)) if many else ((own, order), (views, labels, steps))
    return parallel.over(layout.mesh, functools.partial(trials, program, layout), split, common)


def trials(
    program: Program, layout: Layout, own: Any, order: jax.Array, views: Views, labels: jax.Array, steps: Any
) -> Any:
    """All trials of one device, those of an order with each other."""
    rowed = jax.tree.map(lambda leaf: leaf.reshape(-1, layout.lanes, *leaf.shape[1:]), own)

    def lanes(item: Any) -> Any:
        own, order, which = item
        one = functools.partial(_train, program, layout, (views, which, labels), order, steps)
        if layout.lanes == 1:
            return jax.tree.map(lambda leaf: leaf[None], one(jax.tree.map(lambda leaf: leaf[0], own)))
        return _side_by_side(one, own) if layout.wide else jax.lax.map(one, own)

    which = jnp.zeros(len(order), jnp.int32) if isinstance(views, tuple) else jnp.arange(len(order))
    items = (rowed, order, which)
    out = jax.vmap(lanes)(items) if layout.abreast else jax.lax.map(lanes, items)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), out)


def _train(
    program: Program, layout: Layout, data: Any, order: jax.Array, steps: Any, own: Any, lanes: tuple[int, ...] = ()
) -> Any:
    """Some steps: state and log of one trial, or of `lanes` along the last axis of everything in `own`."""
    trained, opt_state, frozen, numbers, rates = own
    first, begin, end = steps

    def step(trained: Any, opt_state: Any, frozen: Any, numbers: Any, rate: Any, row: jax.Array) -> Any:
        chosen = parallel.divide(layout.mesh, order[row]) if layout.axis is None else order[row]
        one = training_step(program, frozen, numbers, data, layout.axis)
        return one(trained, opt_state, chosen, rate, first + row)

    every = jax.vmap(step, in_axes=(-1, -1, -1, -1, -1, None), out_axes=-1) if lanes else step
    curve = jnp.zeros((len(order), *lanes), jnp.float32)
    log = Log(curve, curve, (curve,) * len(program.penalties), curve)

    def body(row: jax.Array, carry: Any) -> Any:
        trained, opt_state, log = carry
        trained, opt_state, now = every(trained, opt_state, frozen, numbers, rates[row], row)
        log = jax.tree.map(lambda curve, value: curve.at[row].set(value.astype(curve.dtype)), log, now)
        return trained, opt_state, log

    return jax.lax.fori_loop(begin, end, body, (trained, opt_state, log))


def _side_by_side(train: Callable[..., Any], own: Any) -> Any:
    """Lanes along the last axis: kernels of many lanes are then one matrix, and their products one product."""
    lanes = (len(jax.tree.leaves(own)[0]),)
    out = train(jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, -1), own), lanes)
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, -1, 0), out)


Data = tuple[Views, jax.Array, jax.Array]
"""Views, which of them, and labels [n]."""


def training_step(
    program: Program, frozen: Params, numbers: Numbers, data: Data, axis: str | None = None
) -> Callable[..., Any]:
    """The training step of one trial: differentiates with respect to the trained leaves alone.

    With an `axis` it is given one device's part of the batch, and takes the step of the whole.
    """
    value = _objective(program, frozen, numbers, data, axis)

    def step(trained: Params, opt_state: Any, chosen: jax.Array, rate: jax.Array, number: jax.Array) -> Any:
        (_, (loss, terms)), gradients = jax.value_and_grad(value, has_aux=True)(trained, chosen, number)
        # After differentiating: the gradient through a sum over devices would be so many times too large.
        loss, terms, gradients = parallel.total((loss, terms, gradients), axis)
        updates, opt_state = transformation(program, numbers, rate).update(gradients, opt_state, trained)
        trained = optimizer.apply(trained, updates, _selecting(program, numbers.scales))
        return trained, opt_state, Log(loss, sum(terms, start=jnp.zeros(())), terms, _norm(gradients))

    return step


def _norm(tree: Params) -> jax.Array:
    """Global norm, of the same bits however trials are divided over devices.

    Each leaf's sum is one product of the leaf with itself, behind a barrier. A product with ones adds in an order of
    XLA's that goes with the devices (1e-7 apart); and a sum that XLA joins with what computes the gradient makes a step
    at width 4096 half as long again (21.7 ms, not 14.4; with the barrier 15.6; without a norm 14.3; least of four
    rounds, 2026-11-26, jax 0.10.2, two busy cores).
    """

    def squared(leaf: jax.Array) -> jax.Array:
        flat = jax.lax.optimization_barrier(leaf.reshape(-1))
        return jnp.dot(flat, flat, precision="highest")

    return jnp.sqrt(sum(map(squared, jax.tree.leaves(tree)), start=jnp.zeros(())))


def _objective(program: Program, frozen: Params, numbers: Numbers, data: Data, axis: str | None) -> Callable[..., Any]:
    """(trained, examples, step) -> (L + lambda R, (L, the terms of lambda R)).

    Over an `axis` of devices each has a part of the examples, and gives a part of each value: they add up to it.
    """
    views, which, labels = data
    still, before = _still(program), len(lead(program))
    fresh = dict.fromkeys(program.fresh, True)
    smoothing = (numbers.given["label_smoothing"],) if program.smooth else ()
    merge = program.merge or (lambda params: params)

    def value(trained: Params, chosen: jax.Array, step: jax.Array) -> tuple[jax.Array, Any]:
        weight = (chosen >= 0).astype(jnp.float32)
        rows = jnp.maximum(chosen, 0)
        x = views[0][rows] if isinstance(views, tuple) else views[which, rows]
        x = x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
        key = jax.random.fold_in(numbers.key, step)
        key = key if axis is None else jax.random.fold_in(key, jax.lax.axis_index(axis))
        given = models.features(program.model, merge(masks.join(trained, frozen)), x, key=key, frozen=still)
        summed = jnp.vdot(program.loss(given[-1], labels[rows], *smoothing), weight)
        count = parallel.total(weight.sum(), axis)
        loss = summed / count
        terms = []
        for term, weights in zip(program.penalties, numbers.weights, strict=True):
            if term.name == "behaviour":
                then = models.features(program.model, merge(numbers.start), x)
                pairs = list(zip(given, then, strict=True))[before:-1]
                terms.append(objective.behaviour(pairs, weight, count, **weights))
            else:
                of = objective.of_leaves(term, weights, trained, numbers.start, numbers.fisher, fresh)
                terms.append(of if axis is None else of / jax.lax.axis_size(axis))
        return sum(terms, start=loss), (loss, tuple(terms))

    return value


def static(program: Program) -> Mask:
    """The bool tree of the leaves with anything to train."""
    return jax.tree.unflatten(program.mask[0], [kind is not False for kind in program.mask[1:]])


def lead(program: Program) -> tuple[str, ...]:
    """The leading stages that are frozen whole, and draw nothing."""
    return features.lead(program.model, static(program), program.drawing)


def _still(program: Program) -> tuple[str, ...]:
    """The stages that run as in evaluation, whether or not they are computed once."""
    return tuple(name for name in features.still(program.model, static(program)) if name not in program.drawing)


def _mask(program: Program, scales: tuple[Any, ...]) -> Mask:
    """The mask with its traced numbers and arrays in place."""
    traced = iter(scales)
    return jax.tree.unflatten(program.mask[0], [next(traced) if kind is None else kind for kind in program.mask[1:]])


def _selecting(program: Program, scales: tuple[Any, ...]) -> Mask:
    """The mask in which a rate for a whole leaf, which is never 0 here, is True."""
    return jax.tree.map(lambda m: m if isinstance(m, bool) or masks.selects(m) else True, _mask(program, scales))


@functools.partial(jax.jit, static_argnames=("program",))
def begin(program: Program, params: Params, numbers: Numbers, rates: jax.Array) -> OptState:
    """The optimizer's state before the first step, whose rate is `rates` [trials]: Rprop keeps it in its state."""

    def one(trial: tuple[Params, Numbers, jax.Array]) -> OptState:
        params, numbers, rate = trial
        return transformation(program, numbers, rate).init(params)

    return jax.lax.map(one, (params, numbers, rates))


def transformation(program: Program, numbers: Numbers, rate: Any) -> optax.GradientTransformation:
    """The optimizer of one trial under the program's mask."""
    tx = optimizers.build(program.optimizer, rate, numbers.given)
    if program.cohorts is None:
        return optimizer.masked(tx, _mask(program, numbers.scales))
    traced = iter(numbers.ranks)
    ranks = [next(traced) if rank is None else rank for rank in program.cohorts]
    ages = jax.tree.unflatten(program.mask[0], ranks)
    return optimizer.masked(tx, _mask(program, numbers.scales), ages, program.count)


@functools.lru_cache
def forward(model: Model, merge: Callable[[Params], Params] | None = None) -> Callable[[Params, jax.Array], jax.Array]:
    """(params, images [batch, ...]) -> logits [batch, classes], as in evaluation; one object for equal models."""
    return lambda params, images: models.apply(model, merge(params) if merge else params, images)
