"""Many fits at once, over devices: the compiled function that maps `step` over both, and what goes where.

State and numbers carry a leading axis of fits, which is divided over the devices; on each device `lax.map` runs fits
one after another, so that a fit has the same bits in any group. Neighbours that share an order may run side by side.
What is frozen, and the same for all fits of a group, has no such axis: each device holds it once (`Shared`).
Where several devices share each batch, the compiler divides it under `jit`; under `jax.pmap`, the second mode, sums
over devices are written out (`axis` in `step`).
"""

import functools
import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tljax import batch_stats, masks, models
from tljax.data import draw, philox
from tljax.train import flops
from tljax.train.data import UNSEEN, Data, Reader, Stream, batch_spec, chunk_steps, growing, views_of
from tljax.train.step import (
    Average,
    Fit,
    Hyper,
    Log,
    Spec,
    augmented,
    batch_size,
    cohort_ranks,
    frozen_prefix_of,
    schedule_of,
    step,
    traced_leaves,
    transformation,
)
from tljax.types import Batch, Mask, ModelState, OptState, Params

Mode = Literal["map", "vmap_shared", "vmap", "pmap"]
"""How the fits of one device are trained: one after another; those that share an order side by side under `vmap`, which
rounds in another way; all side by side; or one after another under `jax.pmap`, all devices sharing each batch."""


class Shared(NamedTuple):
    """What all fits of a group have the same bytes of, without an axis of fits: trees with None for other leaves."""

    params: Params | None
    """Leaves that have never trained."""
    start: Params | None = None
    """Of `Hyper.start`, where a penalty refers to it."""
    fisher: Params | None = None
    """Of `Hyper.fisher`, likewise."""


Fetch = Callable[[Mesh | None, Any, Any, Any, jax.Array, jax.Array], Batch]
"""(mesh, inputs, targets, view, row, chosen) -> the batch of a step: `gather` or `slice_chunk`."""


def gather(mesh: Mesh | None, inputs: Any, targets: Any, view: Any, row: jax.Array, chosen: jax.Array) -> Batch:
    """The batch of resident data: of inputs [views, n, ...] and targets [n, ...] the rows `chosen` int32 [batch].

    `view` is None where there is one view. Padding, -1, stands for row 0.
    """

    def rows(leaf: jax.Array, *view: jax.Array) -> jax.Array:
        return leaf.at[*view, chosen].get(mode="clip", wrap_negative_indices=False)

    x = jax.tree.map(lambda leaf: rows(leaf[0]) if view is None else rows(leaf, view), inputs)
    return Batch(x, jax.tree.map(rows, targets), (chosen >= 0).astype(jnp.float32))


def slice_chunk(mesh: Mesh | None, inputs: Any, targets: Any, view: Any, row: jax.Array, chosen: jax.Array) -> Batch:
    """The batch of a stream: `row` of a chunk, whose inputs and targets are [orders, rows, batch, ...]."""
    order = 0 if view is None else view
    x, row_targets = jax.tree.map(lambda leaf: divide(mesh, leaf[order, row]), (inputs, targets))
    return Batch(x, row_targets, (chosen >= 0).astype(jnp.float32))


# Why the loop has this form (2026-11-23, jax 0.10.2, two cores; medians of eight rounds in turn, over the form chosen:
# examples gathered by an order, one-hot labels, not unrolled):
#                          784-512-10   784-2048-2048-10
#   integer labels            1.00           1.02
#   permuted beforehand       0.95           1.03
#   unrolled twice            1.01           0.93
#   unrolled four times       1.04           0.94
# All within the noise: one-hot labels take smoothing and every loss of optax, an order as an argument serves every
# label budget, and a loop whose bounds are traced serves every length (of what that costs a GPU, see `_loop`).
@functools.partial(
    jax.jit,
    static_argnames=("spec", "mesh", "width", "mode", "fetch", "platform"),
    donate_argnames=("trained", "opt_state", "average", "model_state"),
)
def segment(
    spec: Spec,
    mesh: Mesh | None,
    width: int,
    mode: Mode,
    trained: Params,
    opt_state: OptState,
    frozen: Params,
    hyper: Hyper,
    inputs: Any,
    targets: Any,
    order: jax.Array,
    rates: jax.Array,
    steps: tuple[int, int, int],
    average: Average | None = None,
    model_state: ModelState | None = None,
    fetch: Fetch = gather,
    shared: Shared | None = None,
    platform: str = "cpu",
) -> tuple[Params, OptState, Average | None, ModelState | None, Log]:
    """The one compiled training function: (trained leaves, optimizer state, average, model state, log [fits, rows])
    after some steps.

    `steps` is (first, begin, end): rows `begin` to `end` of `order` int32 [fits / width, rows, batch] are the steps
    from `first + begin` on; so many neighbours as `width` share an order. `rates` is [fits, rows]; the leaves of
    `inputs` are [views, n, ...] with one view for all or one for each order, of `targets` [n, ...]; where `fetch` is
    `slice_chunk`, of both [views, rows, batch, ...]. A leaf of `shared` is None in `frozen`, or in the part of `hyper`.
    `platform` is that of the devices: the steps are the same, and how the loop over them is written is not.
    """
    one_view = views_of(inputs) == 1
    run = functools.partial(_on_device, spec, mesh, width, mode, fetch, one_view, platform)
    by_fit = (trained, opt_state, average, model_state, frozen, hyper, rates)
    if one_view:
        return over(mesh, run, (by_fit, order), (inputs, targets, (steps, shared)))
    if fetch is slice_chunk:
        return over(mesh, run, (by_fit, order, inputs, targets), ((steps, shared),))
    return over(mesh, run, (by_fit, order, inputs), (targets, (steps, shared)))


def run(spec: Spec, mesh: Mesh | None, width: int, mode: Mode, *arguments: Any, **further: Any) -> Any:
    """The compiled segment in either mode: `segment`, or what takes and gives the same under `jax.pmap`; `further` is
    its `fetch` and `shared`."""
    compiled: Any = _segment_by_pmap if mode == "pmap" else segment
    return compiled(spec, mesh, width, mode, *arguments, **further, **_on_platform(mesh))


def executable(spec: Spec, mesh: Mesh | None, width: int, mode: Mode, *arguments: Any, **further: Any) -> Any:
    """The compiled segment that `run` calls with such arguments, which may be shapes and dtypes: compiled once for both
    of them. None under `jax.pmap`, which does not share what is compiled ahead."""
    if mode == "pmap":
        return None
    return segment.lower(spec, mesh, width, mode, *arguments, **further, **_on_platform(mesh)).compile()


def _on_platform(mesh: Mesh | None) -> dict[str, str]:
    """The `platform` of the segment on the devices of a mesh; {} where that is the one without a word."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return {} if platform == "cpu" else {"platform": platform}


def _on_device(
    spec: Spec,
    mesh: Mesh | None,
    width: int,
    mode: Mode,
    fetch: Fetch,
    one_view: bool,
    platform: str,
    by_fit: Any,
    order: jax.Array,
    inputs: Any,
    targets: Any,
    common: Any,
) -> Any:
    """All fits of one device: order by order, fit by fit, step by step. `common` is (the steps, what fits share)."""
    (first, begin, end), shared = common
    axis = "data" if mode == "pmap" else None

    def train_order(item: Any) -> Any:
        """The fits of one order int32 [rows, batch], which read one view."""
        fits_state, rows, view = item

        def one_step(
            trained: Any,
            opt_state: Any,
            average: Any,
            model_state: Any,
            frozen: Any,
            hyper: Any,
            rate: Any,
            row: jax.Array,
            batch: Batch,
        ) -> Any:
            frozen, hyper = _with_shared(frozen, hyper, shared)
            return step(spec, hyper, trained, frozen, opt_state, batch, rate, first + row, axis, average, model_state)

        def train(fit_state: Any, fits: tuple[int, ...] = (), along: int | None = None) -> Any:
            """State and log of one fit after the steps, or of so many along an axis of everything but the log, in
            which they are the last."""
            *state, frozen, hyper, rates = fit_state
            every: Any = one_step
            if along is not None:
                every = jax.vmap(one_step, in_axes=(along,) * 7 + (None, None), out_axes=(along,) * 4 + (-1,))
            key = hyper.key if along is None else hyper.key[0]  # those that share an order share it
            rates = rates if along is None else jnp.moveaxis(rates, along, -1)

            def body(row: jax.Array, carry: Any) -> Any:
                *state, log = carry
                chosen = divide(mesh, rows[row]) if axis is None else rows[row]
                divided = mesh if axis is None else None
                batch = fetch(divided, inputs, targets, None if one_view else view, row, chosen)
                batch = augmented(spec, key, batch, first + row, axis)
                *state, values = every(*state, frozen, hyper, rates[row], row, batch)
                return *state, log.at[row].set(_columns_of_log(values))

            terms = len(spec.penalties)
            log = jnp.zeros((len(rows), 3 + terms if terms else 2, *fits), jnp.float32)
            *state, log = _loop(begin, end, body, (*state, log), platform)
            return *state, _curves(log, terms)

        if width == 1:
            return jax.tree.map(lambda leaf: leaf[None], train(jax.tree.map(lambda leaf: leaf[0], fits_state)))
        if mode in ("vmap_shared", "vmap"):
            return _side_by_side(train, fits_state, platform)
        return jax.lax.map(train, fits_state)

    views = jnp.zeros(len(order), jnp.int32) if one_view else jnp.arange(len(order))
    if mode != "vmap":
        return _in_turn(
            lambda by_fit_part, order_rows: train_order((by_fit_part, *order_rows)),
            width,
            by_fit[:4],
            by_fit[4:],
            (order, views),
        )
    by_order = jax.tree.map(lambda leaf: leaf.reshape(-1, width, *leaf.shape[1:]), by_fit)
    result = jax.vmap(train_order)((by_order, order, views))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), result)


BLOCK = 32
"""Steps of a GPU between two looks at whether a loop goes on."""


def _loop(begin: Any, end: Any, body: Callable[[jax.Array, Any], Any], state: Any, platform: str = "cpu") -> Any:
    """`jax.lax.fori_loop`, on a GPU by blocks of steps.

    Where the number of steps is not known to the compiler, the host of a GPU waits for each of them, copies from the
    device whether the loop goes on, and only then launches the next. Of a block it launches all at once; the steps that
    fill no block are left to a loop of the first kind. The steps are the same ones in the same order.
    """
    if platform != "gpu":
        return jax.lax.fori_loop(begin, end, body, state)
    step = jax.jit(body)  # traced once for both loops
    blocks = (end - begin) // BLOCK

    def run_block(block: jax.Array, state: Any) -> Any:
        return jax.lax.fori_loop(0, BLOCK, lambda i, state: step(begin + block * BLOCK + i, state), state)

    state = jax.lax.fori_loop(0, blocks, run_block, state)
    return jax.lax.fori_loop(begin + blocks * BLOCK, end, step, state)


def _columns_of_log(values: Log) -> jax.Array:
    """The numbers of a step that are kept, [columns, ...]: one array, and so one write a step, for all of them."""
    penalty = (values.penalty, *values.terms) if values.terms else ()
    return jnp.stack([jnp.asarray(value, jnp.float32) for value in (values.loss, values.gradient_norm, *penalty)])


def _curves(log: jax.Array, terms: int) -> Log:
    """The log [rows, ...] of what `_columns_of_log` gave for each row; without terms there is no penalty."""
    loss, norm, *rest = (log[:, i] for i in range(log.shape[1]))
    penalty, *parts = rest if terms else [jnp.zeros_like(loss)]
    return Log(loss, penalty, tuple(parts), norm)


def _in_turn(
    function: Callable[[Any, Any], Any], rows: int, state: Sequence[Any], rest: Sequence[Any], each: Any
) -> Any:
    """(State, log) that `function((*state, *rest), each)` gives of so many rows of both at a time, and one of `each`.

    What `jax.lax.map` gives; but the state is written over the old one, where a map holds all of it once more.
    """
    count = len(jax.tree.leaves(state)[0]) // rows

    def item(tree: Any, i: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, i * rows, rows), tuple(tree))

    def result(state: Any, i: Any) -> Any:
        each_item = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), each)
        return function((*item(state, i), *item(rest, i)), each_item)

    def body(i: jax.Array, carry: Any) -> Any:
        *new, log = result(carry[0], i)

        def written(whole: jax.Array, part: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(whole, part, i * rows, 0)

        return jax.tree.map(written, carry, (tuple(new), log))

    log = jax.eval_shape(lambda: result(tuple(state), 0))[-1]
    logs = jax.tree.map(lambda leaf: jnp.zeros((count * rows, *leaf.shape[1:]), leaf.dtype), log)
    new, logs = jax.lax.fori_loop(0, count, body, (tuple(state), logs))
    return (*new, logs)


def _with_shared(frozen: Params, hyper: Hyper, shared: Shared | None) -> tuple[Params, Hyper]:
    """The frozen leaves and the numbers of a fit with what all fits share."""
    if shared is None:
        return frozen, hyper
    pairs = ((frozen, shared.params), (hyper.start, shared.start), (hyper.fisher, shared.fisher))
    frozen, start, fisher = (joined(per_fit, rest) for per_fit, rest in pairs)
    return frozen, hyper._replace(start=start, fisher=fisher)


def joined(per_fit: Params, shared: Params | None) -> Params:
    """The whole tree of the two that `share` gives."""
    return per_fit if shared is None else masks.join(per_fit, shared)


def _side_by_side(train: Callable[..., Any], fits_state: Any, platform: str) -> Any:
    """Fits along one axis of everything: on a CPU the last, elsewhere the first.

    Along the last, the kernels of many fits are one matrix, and their products with a batch that they share one
    product: on a CPU that is quicker. Libraries of a GPU multiply batches of matrices whose fits are not the innermost
    axis, and would have to copy these in every step. Either way it is a rounding, and not that of one fit.
    """
    along, count = -1 if platform == "cpu" else 0, len(jax.tree.leaves(fits_state)[0])
    *state, log = train(jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, along), fits_state), (count,), along)
    moved = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, along, 0), state)
    return *moved, jax.tree.map(lambda curve: jnp.moveaxis(curve, -1, 0), log)


# The second mode: jax.pmap.


def _segment_by_pmap(
    spec: Spec,
    mesh: Mesh,
    width: int,
    mode: Mode,
    *arguments: Any,
    fetch: Fetch = gather,
    shared: Shared | None = None,
    platform: str = "cpu",
) -> Any:
    """`segment` under `jax.pmap`: the devices of the mesh share each batch of each fit."""
    trained, opt_state, frozen, hyper, inputs, targets, order, rates, steps, *rest = arguments
    average, model_state = (*rest, None, None)[:2]
    devices, chunked = tuple(mesh.devices.flat), fetch is slice_chunk
    parts, *examples = jax.tree.map(
        lambda rows: rows.reshape(*rows.shape[:2], len(devices), -1, *rows.shape[3:]),
        (order, inputs, targets) if chunked else (order,),
    )
    state, common = (trained, opt_state, average, model_state), (frozen, hyper, rates, (steps, shared))
    pmapped = _pmapped(devices, chunked)
    return pmapped(spec, mesh, width, mode, fetch, platform, *state, parts, examples or [inputs, targets], common)


@functools.lru_cache
def _pmapped(devices: tuple[Any, ...], chunked: bool) -> Callable[..., Any]:
    """State and the rest go in whole and come out once: they have the shapes that they have under `jit`."""
    return jax.pmap(
        _on_device_of_pmap,
        axis_name="data",
        in_axes=(*(None,) * 10, 2, 2 if chunked else None, None),
        out_axes=None,
        static_broadcasted_argnums=(0, 1, 2, 3, 4, 5),
        donate_argnums=(6, 7, 8, 9),
        devices=devices,
    )


def _on_device_of_pmap(
    spec: Spec,
    mesh: Mesh,
    width: int,
    mode: Mode,
    fetch: Fetch,
    platform: str,
    trained: Params,
    opt_state: OptState,
    average: Average | None,
    model_state: ModelState | None,
    order: jax.Array,
    examples: Any,
    common: Any,
) -> tuple[Params, OptState, Average | None, ModelState | None, Log]:
    """On one device, with its part of each row of the order; of a chunk with its part of each batch."""
    (inputs, targets), (frozen, hyper, rates, common_values) = examples, common
    by_fit = (trained, opt_state, average, model_state, frozen, hyper, rates)
    one_view = views_of(inputs) == 1
    return _on_device(spec, mesh, width, mode, fetch, one_view, platform, by_fit, order, inputs, targets, common_values)


# The state of a model, computed anew.


def reestimate(
    spec: Spec,
    stages: Sequence[str],
    fits: Sequence[Fit],
    width: int,
    mesh: Mesh | None,
    data: Data | Stream,
    params: Params,
    model_state: ModelState,
    shared: Params | None = None,
) -> ModelState:
    """The model's state, leading axis of fits, with that of `stages` computed anew under the parameters of now.

    Running averages become the equal mean, over the batches of the first pass of a fit's order (`Fit.pass_steps`), of
    the statistics of each batch: in a forward pass without dropout, in which these stages normalise by the batch, and
    the others use their state. Of a Flax batch norm those are the mean and the biased variance of what of the batch is
    no padding; the variance of the batches' means is left out, as running averages leave it out that are tracked. The
    inputs are not augmented. After Wu & Johnson 2021, arXiv:2105.07576, section 3 (Precise BN), with a whole pass; and
    where the parameters are the source's as they came, Li et al. 2016, arXiv:1603.04779 (AdaBN). `data` are on the
    devices of the mesh, or a stream; `shared` are the parameters that fits share.
    """
    counts = [fit.pass_steps or len(fit.rates) for fit in fits]
    means = {stage: jax.tree.map(jnp.zeros_like, model_state[stage]) for stage in stages}
    total = max(counts)

    def add(order: jax.Array, inputs: Any, start: int, stop: int, fetch: Fetch) -> None:
        nonlocal means
        until = place(mesh, jnp.minimum(jnp.asarray(counts, jnp.int32), stop))
        static = {"mesh": mesh, "width": width, "fetch": fetch, **_on_platform(mesh)}
        by_fit = (means, params, model_state, until)
        means = _reestimated(spec, tuple(stages), *by_fit, order, inputs, (start, shared), **static)

    if isinstance(data, Stream):
        with read_chunks(data, fits, width, mesh, 0, total) as chunks:
            for chunk in chunks:
                add(chunk.order, chunk.inputs, chunk.start, chunk.stop, slice_chunk)
        return {**model_state, **means}
    rows = capacity(batch_size(fits[0]))
    for start in range(0, total, rows):
        order, _ = order_and_rates(fits, width, mesh, start, min(start + rows, total))
        add(order, data.inputs, start, total, gather)
    return {**model_state, **means}


@functools.partial(
    jax.jit, static_argnames=("spec", "stages", "mesh", "width", "fetch", "platform"), donate_argnames=("means",)
)
def _reestimated(
    spec: Spec,
    stages: tuple[str, ...],
    means: ModelState,
    params: Params,
    model_state: ModelState,
    counts: jax.Array,
    order: jax.Array,
    inputs: Any,
    common: Any,
    *,
    mesh: Mesh | None,
    width: int,
    fetch: Fetch,
    platform: str = "cpu",
) -> ModelState:
    """The means of the statistics of the batches before a step, and of those in the rows of `order`.

    `common` is (the step, the parameters that fits share).
    """
    one_view = views_of(inputs) == 1

    def on_device(by_fit: Any, order: jax.Array, *rest: Any) -> ModelState:
        inputs, (start, shared) = rest

        def fit_statistics(item: Any) -> ModelState:
            (means, params, model_state, count), number = item
            params = joined(params, shared)

            def body(row: jax.Array, means: ModelState) -> ModelState:
                chosen = divide(mesh, order[number, row])
                x, _, weight = fetch(mesh, inputs, (), None if one_view else number, row, chosen)
                how: Any = {"tracked": stages, "weight": weight, "momentum": 0.0}
                _, state = models.run(spec.model, spec.merge(params) if spec.merge else params, model_state, x, **how)
                batch_state = {stage: state[stage] for stage in stages}
                # This form of a mean leaves what no batch changes as it is, to the bit.
                return jax.tree.map(lambda mean, new: mean + (new - mean) / (start + row + 1), means, batch_state)

            return _loop(0, jnp.clip(count - start, 0, order.shape[1]), body, means, platform)

        numbers = jnp.arange(len(order) * width) // width
        return jax.lax.map(fit_statistics, (by_fit, numbers))

    by_fit = (means, params, model_state, counts)
    if one_view:
        return over(mesh, on_device, (by_fit, order), (inputs, common))
    return over(mesh, on_device, (by_fit, order, inputs), (common,))


# What is passed to the segment.


@functools.partial(jax.jit, static_argnames=("spec",))
def begin(spec: Spec, params: Params, hyper: Hyper, rates: jax.Array) -> OptState:
    """The optimizer's state before the first step, whose rate is `rates` [fits]: Rprop keeps it in its state.

    `params` and `hyper` have a leading axis of fits; what is frozen may be None in `params`.
    """

    def begin_fit(item: tuple[Params, Hyper, jax.Array]) -> OptState:
        params, hyper, rate = item
        return transformation(spec, hyper, rate).init(params)

    return jax.lax.map(begin_fit, (params, hyper, rates))


def stack_hyper(spec: Spec, fits: Sequence[Fit], histories: Sequence[Sequence[Mask]]) -> Hyper:
    """The traced numbers of fits whose masks so far are `histories`, under the spec of their phase."""
    needs_start, needs_fisher = _needed(spec)
    return stack_numbers(spec, fits, histories)._replace(
        start=stack([fit.params for fit in fits]) if needs_start else None,
        fisher=stack([fit.fisher for fit in fits]) if needs_fisher else None,
    )


def _without(tree: Params, shared: Params) -> Params:
    """The tree with None for the leaves that are shared."""
    return jax.tree.map(lambda s, leaf: leaf if s is None else None, shared, tree, is_leaf=lambda s: s is None)


def _needed(spec: Spec) -> tuple[bool, bool]:
    """Whether penalties need (the parameters at the start, the source's Fisher information)."""
    start = any(penalty.needs_start for penalty in spec.penalties)
    return start, any("fisher" in penalty.needs for penalty in spec.penalties)


def stack_numbers(spec: Spec, fits: Sequence[Fit], histories: Sequence[Sequence[Mask]]) -> Hyper:
    """As `stack_hyper`, without the trees that penalties refer to: what an optimizer's state begins with."""
    by_masks: dict[Hashable, tuple[Any, Any]] = {}
    per_fit = []
    for fit, history in zip(fits, histories, strict=True):
        key = likeness(fit, history)
        if key not in by_masks:
            arrays = tuple(rank for rank in cohort_ranks(spec, fit, history)[1] if not isinstance(rank, int))
            by_masks[key] = traced_leaves(spec, fit, history), arrays
        per_fit.append(by_masks[key])
    scales, ranks = zip(*per_fit, strict=True)
    needs_start, _ = _needed(spec)
    return Hyper(
        weights=tuple(columns([fit.weights[i] for fit in fits]) for i in range(len(spec.penalties))),
        numbers=columns([fit.numbers for fit in fits]),
        scales=stack(scales),
        key=stack_keys([fit.key for fit in fits]),
        start=None,
        fisher=None,
        cohorts=stack(ranks),
        start_state=stack([fit.model_state for fit in fits]) if needs_start else None,
        class_weights=stack([fit.class_weights for fit in fits]) if spec.weighs_classes else None,
    )


def likeness(fit: Fit, history: Sequence[Mask]) -> Hashable:
    """What is equal for fits whose spec and whose numbers of masks are: so they are looked at once for all of them.

    Of arrays in masks it is which object they are, so it holds as long as the fits do.
    """

    def leaves(tree: Any) -> Hashable:
        numbers, structure = jax.tree.flatten(tree)
        plain = (bool, int, float)
        return structure, tuple((type(m), m) if isinstance(m, plain) else id(m) for m in numbers)

    def shapes(tree: Any) -> Hashable:
        arrays, structure = jax.tree.flatten(tree)
        return structure, tuple((np.shape(leaf), jnp.result_type(leaf)) for leaf in arrays)

    fit_shapes = shapes(fit.params), shapes(fit.model_state), fit.fisher is None, leaves(fit.fresh)
    return fit_shapes, tuple(map(leaves, history)), schedule_of(fit, history)


def columns(rows: Sequence[Mapping[str, float]]) -> dict[str, jax.Array]:
    """{name: the numbers of each row, float32 [rows]}."""
    return {name: jnp.asarray(np.array([row[name] for row in rows], np.float32)) for name in rows[0]}


def stack_keys(keys: Sequence[jax.Array]) -> jax.Array:
    """Keys as one array; one object is looked at once.

    >>> stack_keys([jax.random.key(3)] * 2).shape
    (2,)
    """
    distinct = {id(key): key for key in keys}
    if len({(key.dtype, key.shape) for key in distinct.values()}) > 1 or not _is_key(keys[0]):
        return jnp.stack(keys)
    numbers = dict(zip(distinct, jax.device_get(list(map(jax.random.key_data, distinct.values()))), strict=True))
    data = np.stack([numbers[id(key)] for key in keys])
    return jax.random.wrap_key_data(jnp.asarray(data), impl=jax.random.key_impl(keys[0]))


def stack(trees: Sequence[Params]) -> Params:
    """The trees as one with a leading axis of fits; always a copy, since the segment takes its arguments over.

    By way of the host, where nothing need be compiled for it; what all trees have the one array of, if it is large, is
    repeated on the device.
    """
    columns = zip(*(jax.tree.leaves(tree) for tree in trees), strict=True)
    stacked = [_repeated(column) if len({*map(id, column)}) == 1 else _stacked(column) for column in columns]
    large = [i for i, leaf in enumerate(stacked) if isinstance(leaf, jax.ShapeDtypeStruct)]
    firsts = jax.tree.leaves(trees[0])
    for i, leaf in zip(large, _repeat([firsts[i] for i in large], len(trees)) if large else (), strict=True):
        stacked[i] = leaf
    return jax.tree.unflatten(jax.tree.structure(trees[0]), stacked)


def _stacked(leaves: Sequence[Any]) -> jax.Array:
    hosts = {id(leaf): _on_host(leaf) for leaf in {id(leaf): leaf for leaf in leaves}.values()}
    return jax.device_put(np.stack([hosts[id(leaf)] for leaf in leaves]))


LARGE = 2**24
"""Bytes of a leaf of all fits from which on it is worth a compilation not to send them from the host."""


def _repeated(leaves: Sequence[Any]) -> Any:
    """The one leaf of all fits with an axis of fits; its shape and dtype if it is to be repeated on the device."""
    first, count = leaves[0], len(leaves)
    if isinstance(first, jax.Array) and not first.committed and count * first.nbytes >= LARGE:
        return jax.ShapeDtypeStruct((count, *first.shape), first.dtype)
    on_host = _on_host(first)
    return jax.device_put(np.array(np.broadcast_to(on_host, (count, *on_host.shape))))


@functools.partial(jax.jit, static_argnames="count")
def _repeat(leaves: list[jax.Array], count: int) -> list[jax.Array]:
    return [jnp.broadcast_to(leaf, (count, *leaf.shape)) for leaf in leaves]


def share(trees: Sequence[Params], may: Mask | None = None) -> tuple[Params, Params | None]:
    """(The leaves of each fit, with a leading axis of fits; the leaves that all fits have the same bytes of, without).

    Each tree has None where the other has the leaf; the second is None if there is nothing in it, as of one fit alone.
    Only leaves that are True in `may`, a tree like the others, are shared. Those of the first are copies, as `stack`
    gives them; of the second, an array of JAX is the caller's own, so it must not be donated.

    >>> same = jnp.ones(2)
    >>> own, shared = share([{"a": same, "b": jnp.zeros(1)}, {"a": same, "b": jnp.ones(1)}])
    >>> shared["a"] is same, own["a"], own["b"].shape
    (True, None, (2, 1))
    """
    same = alike(trees, may)
    if not any(same):
        return stack(trees), None
    structure: Any = jax.tree.structure(trees[0])
    flat = [jax.tree.leaves(tree) for tree in trees]
    per_fit = [[None if shared else leaf for leaf, shared in zip(leaves, same, strict=True)] for leaves in flat]
    shared = [_on_device_once(leaf) if shared else None for leaf, shared in zip(flat[0], same, strict=True)]
    return stack([jax.tree.unflatten(structure, leaves) for leaves in per_fit]), jax.tree.unflatten(structure, shared)


def share_shapes(trees: Sequence[Params], may: Mask | None = None) -> tuple[Params, Params | None]:
    """What `share` gives, in shapes and dtypes."""
    same, structure = alike(trees, may), jax.tree.structure(trees[0])
    each = list(zip(map(shape_of, jax.tree.leaves(trees[0])), same, strict=True))
    per_fit = [None if shared else jax.ShapeDtypeStruct((len(trees), *leaf.shape), leaf.dtype) for leaf, shared in each]
    shared = [leaf if shared else None for leaf, shared in each]
    return jax.tree.unflatten(structure, per_fit), jax.tree.unflatten(structure, shared) if any(same) else None


def alike(trees: Sequence[Params], may: Mask | None = None) -> list[bool]:
    """Of each leaf that is True in `may` whether all trees have the same bytes of it; of one tree alone none is so."""
    flat = [jax.tree.leaves(tree) for tree in trees]
    allowed = [True] * len(flat[0]) if may is None else jax.tree.leaves(may)
    several = len(trees) > 1
    return [several and able and _same_bytes(leaves) for able, *leaves in zip(allowed, *flat, strict=True)]


def share_hyper(
    spec: Spec,
    fits: Sequence[Fit],
    histories: Sequence[Sequence[Mask]],
    shared: Params | None,
    split: Callable[[Sequence[Params]], tuple[Params, Params | None]] = share,
) -> tuple[Hyper, Shared | None]:
    """(What `stack_hyper` gives, less what all fits share; that), for fits whose parameters share `shared`.

    The latter have never trained: they are as they were at the start. `split` is `share`, or `share_shapes`.
    """
    needs_start, needs_fisher = _needed(spec)
    hyper, start, fisher = stack_numbers(spec, fits, histories), None, None
    if needs_start:
        trees = [fit.params if shared is None else _without(fit.params, shared) for fit in fits]
        per_fit, start = split(trees)
        start = shared if start is None else joined(start, shared)
        hyper = hyper._replace(start=per_fit)
    if needs_fisher:
        per_fit, fisher = split([fit.fisher for fit in fits])
        hyper = hyper._replace(fisher=per_fit)
    if shared is None and start is None and fisher is None:
        return hyper, None
    return hyper, Shared(shared, start, fisher)


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape of a leaf, and the dtype that JAX gives it."""
    return jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.canonicalize_dtype(jnp.result_type(leaf)))


def _same_bytes(leaves: Sequence[Any]) -> bool:
    """Whether leaves have the same dtype, shape and bytes; one object is looked at once."""
    distinct = [_on_host(leaf) for leaf in {id(leaf): leaf for leaf in leaves}.values()]
    if len({(leaf.dtype, leaf.shape) for leaf in distinct}) > 1:
        return False
    first, *others = (np.ascontiguousarray(leaf).reshape(-1).view(np.uint8) for leaf in distinct)
    return all(np.array_equal(first, other) for other in others)


def _on_device_once(leaf: Any) -> jax.Array:
    """An array of JAX that lies on no device in particular as it is; of anything else a copy on the first device."""
    if isinstance(leaf, jax.Array) and not leaf.committed:
        return leaf
    return jnp.array(_on_host(leaf))


def on_first_device(tree: Any) -> Any:
    """A tree on the first device; what is on that device alone is as it is."""

    def alone(leaf: Any) -> jax.Array:
        on_one = isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) == 1
        return leaf if on_one else jnp.asarray(host(leaf))

    return jax.tree.map(alone, tree)


def copied(tree: Any) -> Any:
    """A copy of a tree that later segments leave alone: on the devices, which make it while nobody waits; of a CPU's,
    and of many processes', in NumPy, where nothing is compiled for it."""
    if jax.process_count() > 1 or jax.default_backend() == "cpu":
        return jax.tree.map(lambda leaf: jax.random.clone(leaf) if _is_key(leaf) else np.array(host(leaf)), tree)
    return _copied(tree)


@jax.jit
def _copied(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.random.clone(leaf) if _is_key(leaf) else jnp.copy(leaf), tree)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _on_host(leaf: Any) -> np.ndarray:
    """The leaf in NumPy, in the dtype that JAX gives it."""
    return np.asarray(leaf, jax.dtypes.canonicalize_dtype(jnp.result_type(leaf)))


def capacity(batch: int) -> int:
    """The rows of an order that a compiled segment holds: a constant of the batch size, so that no length compiles
    anew."""
    return max(1, min(1024, 2**20 // batch))


def order_and_rates(
    fits: Sequence[Fit], width: int, mesh: Mesh | None, start: int, stop: int
) -> tuple[jax.Array, jax.Array]:
    """The order and the rates of some steps, padded to the capacity, and batches to what the devices divide.

    An order that several fits have is drawn once.
    """
    chosen, which = _distinct(fits[::width])
    orders = np.stack([order(start, stop) for order in chosen])
    rows = capacity(orders.shape[-1])
    arrays = jax.device_put((_padded(orders, rows, mesh)[which], _rates(fits, start, stop, rows)))
    return arrays if jax.process_count() == 1 else place(mesh, arrays)


def _distinct(fits: Sequence[Fit]) -> tuple[list[Callable[[int, int], np.ndarray]], Any]:
    """(The orders of fits, each once; for each fit which of them it has: int [fits], or all where none is twice)."""
    names = [(id(fit.order),) if fit.order_name is None else fit.order_name for fit in fits]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    orders = dict(zip(reversed(names), (fit.order for fit in reversed(fits)), strict=True))
    which = slice(None) if len(numbers) == len(fits) else np.array([numbers[name] for name in names])
    return [orders[name] for name in numbers], which


ON_DEVICE = 4_000_000
"""Examples of an epoch, of all orders of a group, from which on an accelerator draws them. The host takes 0.015 us an
example and draws while the device trains; what a device takes to compile it, 1 to 3 s, is a few hundred such epochs of
one fit. On a CPU the same takes 0.9 us an example (60,000 of them; 2026-11-27, jax 0.10.2), so the host draws."""


def draws_on_device(orders: Sequence[Callable[[int, int], np.ndarray]], platform: str) -> bool:
    """Whether these orders are drawn on the device, whose platform is 'cpu', 'gpu' or another; the integers are the
    same."""
    if platform == "cpu" or jax.process_count() > 1:
        return False
    alike = {(order.n, order.batch, order.epochs) for order in orders if isinstance(order, draw.Order)}
    every = all(isinstance(order, draw.Order) for order in orders)
    return every and len(alike) == 1 and len(orders) * next(iter(alike))[0] >= ON_DEVICE


def resident_chunks(
    data: Data, targets: Any, fits: Sequence[Fit], width: int, mesh: Mesh | None, ends: Sequence[int]
) -> "Iterator[Chunk]":
    """The steps from ends[0] to ends[-1] for data on the devices, a chunk of as many as the capacity at most.

    An order is drawn, and brought to the devices, once for all the calls of a chunk. A chunk ends at one of `ends` if
    it can, so that no call is cut.
    """
    batch = batch_size(fits[0])
    rows, (chosen, which) = capacity(batch), _distinct(fits[::width])
    platform = (mesh.devices.flat[0] if mesh else jax.devices()[0]).platform
    drawn = (
        _Epochs(chosen, which, rows, sharing(mesh), len(fits[0].rates)) if draws_on_device(chosen, platform) else None
    )
    begin = ends[0]
    while begin < ends[-1]:
        limit = begin + rows if drawn is None else min(begin + rows, drawn.limit(begin))
        end = max([end for end in ends if begin < end <= limit], default=limit)
        if drawn is None:
            order, rates = order_and_rates(fits, width, mesh, begin, end)
        else:
            order, rates = drawn.rows_from(begin), jax.device_put(_rates(fits, begin, end, rows))
        yield Chunk(begin, end, data.inputs, targets, order, rates)
        begin = end


class _Epochs:
    """Orders that are drawn on the device: a few epochs at a time, each once if chunks end where epochs do."""

    def __init__(self, orders: Sequence[Any], which: Any, rows: int, devices: int, steps: int) -> None:
        first = orders[0]
        self.n, self.batch, self.by_epochs, self.length = first.n, first.batch, first.epochs, first.length
        self.rows, self.width = rows, -(-first.batch // devices) * devices
        whole = rows * self.batch // self.length
        few = max(1, whole) if self.by_epochs else max(whole, -(-self.batch // self.length)) + 1
        self.epochs = min(few, -(-steps * self.batch // self.length) + (not self.by_epochs))
        self.seeds = jnp.asarray(np.array([philox.halves(order.seed) for order in orders]))
        subsets = {id(order.subset): order.subset for order in orders}
        same = len(subsets) == 1
        arrays = (
            [order.subset for order in orders[:1] if order.subset is not None]
            if same
            else [np.arange(self.n, dtype=np.int32) if order.subset is None else order.subset for order in orders]
        )
        self.subset = jnp.asarray(np.stack(arrays).astype(np.int32)) if arrays else None
        self.which = jnp.asarray(np.arange(len(orders))[which])
        self.drawn: tuple[int, Any] = (-1, None)

    def limit(self, begin: int) -> int:
        """The step after the last that is drawn with step `begin`."""
        first = begin * self.batch // self.length
        return (first + self.epochs) * self.length // self.batch

    def rows_from(self, begin: int) -> jax.Array:
        """The rows of steps from `begin` on, int32 [orders that are wanted, rows, width]."""
        first = begin * self.batch // self.length
        if self.drawn[0] != first:
            counter = jnp.asarray(np.array(philox.halves(first * -(-self.n // 4))))
            self.drawn = first, philox.permutations(self.seeds, counter, n=self.n, epochs=self.epochs)
        start = jnp.asarray(begin * self.batch - first * self.length)
        how = {"rows": self.rows, "batch": self.batch, "by_epochs": self.by_epochs, "width": self.width}
        return philox.rows_of(self.drawn[1], self.subset, self.which, start, **how)


def _padded(orders: np.ndarray, rows: int, mesh: Mesh | None, beyond: int = -1) -> np.ndarray:
    """Orders int32 [orders, steps, batch] with so many rows, the further ones of `beyond`, and batches that the devices
    divide, the further places of -1."""
    count, steps, batch = orders.shape
    devices = sharing(mesh)
    padded = np.full((count, rows, -(-batch // devices) * devices), -1, np.int32)
    padded[:, steps:] = beyond
    padded[:, :steps, :batch] = orders
    return padded


def _rates(fits: Sequence[Fit], start: int, stop: int, rows: int) -> np.ndarray:
    """The rates float32 [fits, rows] of some steps, zeros after them and after the last step."""
    rates = np.zeros((len(fits), rows), np.float32)
    rates[:, : max(0, min(stop, len(fits[0].rates)) - start)] = [fit.rates[start:stop] for fit in fits]
    return rates


class Chunk(NamedTuple):
    """The examples of some steps, on the devices: what `slice_chunk` takes a batch of."""

    start: int
    stop: int
    inputs: Any
    """Leaves [orders, rows, batch, ...]; one order where all fits have the same."""
    targets: Any
    order: jax.Array
    rates: jax.Array
    """Both as `order_and_rates` gives them, of as many rows as the chunk has, and two at least."""


FIRST_CHUNK = 16
"""Steps of the first chunk of a stream, which is waited for; each of the following has twice as many as the one before
it, up to what memory holds."""


def read_chunks(stream: Stream, fits: Sequence[Fit], width: int, mesh: Mesh | None, start: int, stop: int) -> Reader:
    """The chunks of the steps from `start` to `stop`, read ahead; an order that several fits have is read once."""
    with_orders = fits[::width]
    names = [object() if fit.order_name is None else fit.order_name for fit in with_orders]
    distinct = list(dict.fromkeys(names))
    which = [distinct.index(name) for name in names] if len(distinct) > 1 else [0]
    chosen = [with_orders[names.index(name)] for name in distinct]
    batch = batch_size(fits[0])
    batch_rows = -(-batch // sharing(mesh)) * sharing(mesh)
    rows, ahead = chunk_steps(stream, len(which) * batch_rows, capacity(batch))

    def requests() -> Iterator[tuple[tuple[int, int], np.ndarray]]:
        drawn = start
        orders = np.empty((len(chosen), 0, batch), np.int32)
        for begin, end in growing(start, stop, FIRST_CHUNK, rows):
            if end > drawn:  # so many at once, since an epoch is drawn whole whatever is asked of it
                further = min(stop, max(end, drawn + capacity(batch)))
                more = np.stack([fit.order(drawn, further) for fit in chosen])
                orders, drawn = np.concatenate([orders, more], 1), further
            yield (begin, end), _padded(orders[:, : end - begin], rows, mesh, UNSEEN)
            orders = orders[:, end - begin :]

    def finish(steps: tuple[int, int], order: np.ndarray, inputs: Any, targets: Any) -> Chunk:
        begin, end = steps
        if len(which) > len(distinct):
            inputs, targets = jax.tree.map(lambda leaf: leaf[np.asarray(which)], (inputs, targets))
        each = order[np.asarray([distinct.index(name) for name in names])]
        # Of arrays with one row XLA would take what is the same in every step out of the loop, and round otherwise.
        each = np.pad(np.maximum(each, -1), [(0, 0), (0, max(0, 2 - rows)), (0, 0)], constant_values=-1)
        arrays = (inputs, targets), each, _rates(fits, begin, end, max(2, rows))
        (inputs, targets), placed_order, rates = _place_chunk(mesh, *arrays)
        return Chunk(begin, end, inputs, targets, placed_order, rates)

    return Reader(stream, requests(), finish, ahead)


def chunk_shapes(stream: Stream, batch: int) -> tuple[int, tuple[Any, Any]]:
    """(Rows, (inputs, targets)) of a chunk of one order, in shapes and dtypes."""
    rows, _ = chunk_steps(stream, batch, capacity(batch))
    targets = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], jax.dtypes.canonicalize_dtype(leaf.dtype)),
        stream.examples.targets,
    )
    return rows, jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((1, rows, batch, *leaf.shape), leaf.dtype), (stream.examples.spec, targets)
    )


def _place_chunk(mesh: Mesh | None, examples: Any, order: np.ndarray, rates: np.ndarray) -> Any:
    """A chunk on its devices: each has the orders of its fits, or the one of all, and its part of each batch."""
    if mesh is None:
        return jax.device_put((examples, order, rates))
    shared = len(jax.tree.leaves(examples)[0]) == 1
    spec = PartitionSpec(None if shared else "fits", None, "data" if sharing(mesh) > 1 else None)
    sharding = NamedSharding(mesh, spec)
    if jax.process_count() == 1:
        return jax.device_put(examples, sharding), *jax.device_put((order, rates))
    return jax.tree.map(lambda leaf: _place_leaf(leaf, sharding), examples), *place(mesh, (order, rates))


# How many fits go together, and on which devices.


def shared_width(spec: Spec, fits: Sequence[Fit], histories: Sequence[Sequence[Mask]]) -> int:
    """How many fits, each with the next, share an order and a frozen prefix, if it is so for all; else 1."""
    same = [fit.shares is not None and fit.shares == following.shares for fit, following in itertools.pairwise(fits)]
    width = (same.index(False) if False in same else len(same)) + 1
    regular = len(fits) % width == 0 and all(joined == ((i + 1) % width != 0) for i, joined in enumerate(same))
    prefix = frozen_prefix_of(spec)
    ever = [mask[stage] for history in histories for mask in history for stage in prefix]
    return width if regular and not any(map(masks.trains, jax.tree.leaves(ever))) else 1


# Seconds a fit and epoch of 8 fits on one device of two cores, 784-W-10 trained in full (2026-11-23, jax 0.10.2):
#   million FLOPs a step      4.3    16    31    61   123   245
#   one after another        0.19  0.33  0.24  0.38  0.74  1.25
#   side by side             0.11  0.17  0.29  0.58  1.18  2.57
# On an NVIDIA H200 an epoch of 8 fits of 240 million FLOPs a step took 0.31 s one after another and 0.115 s side by
# side (2026-11-26); one fit of 12,000 million did 43 TFLOP/s by itself, so more beside it find no room.
QUICKER_SIDE_BY_SIDE = {"cpu": 2e7}
"""FLOPs of a step of one fit up to which fits side by side are quicker than one after another, by platform."""
QUICKER_ON_ACCELERATORS = 5e9
"""Likewise on every platform that is not named."""


def is_quicker_side_by_side(flops_of_step: float, platform: str) -> bool:
    """Whether fits of so many FLOPs a step are quicker side by side than one after another.

    Side by side rounds otherwise, so what decides is known before a run: no time is measured, no free memory asked for.

    >>> [is_quicker_side_by_side(2.4e8, platform) for platform in ("cpu", "gpu")]
    [False, True]
    """
    return flops_of_step < QUICKER_SIDE_BY_SIDE.get(platform, QUICKER_ON_ACCELERATORS)


def choose_mode(
    spec: Spec, fits: Sequence[Fit], width: int, data: Data | Stream, many: str, platform: str = "cpu"
) -> Mode:
    """How fits share a device of a platform under `jit`, where `many` is as in `train.Execution`.

    'map', 'vmap_shared' and 'vmap' round in three ways; in the first a fit rounds as it does alone, in the second as
    those that share its order make it, in the last as all of its group.
    """
    if many == "vmap":
        return "vmap"
    # One after another a CPU gives a fit the same bits in any company: of several orders nothing else is chosen there.
    if many == "map" or (width == 1 and (platform == "cpu" or len(fits) == 1)):
        return "map"
    if not is_quicker_side_by_side(step_work(spec, fits[0], data), platform):
        return "map"
    return "vmap_shared" if platform == "cpu" else "vmap"


def platform_of(devices: Sequence[Any]) -> str:
    """The platform of the devices, by default of the first that JAX has: 'cpu', 'gpu', 'tpu', ..."""
    return str((devices[0] if devices else jax.local_devices()[0]).platform)


def step_work(spec: Spec, fit: Fit, data: Data | Stream) -> float:
    """FLOPs of a step, about: the forward pass of the stages that train, three times."""
    count = len(frozen_prefix_of(spec))
    whole = batch_stats.join(jax.eval_shape(spec.merge or (lambda params: params), fit.params), fit.model_state)
    x = batch_spec(data, batch_size(fit))
    if count:
        x = jax.eval_shape(functools.partial(models.apply, spec.model[:count]), whole, x)
    above = models.unrolled(spec.model[count:])
    return 3.0 * flops.count(functools.partial(models.apply, above), whole, x)


def fits_at_once(devices: Sequence[Any], devices_per_batch: int) -> int:
    """How many fits are trained at the same time."""
    return max(1, len(devices) // devices_per_batch)


def group_sizes(fits: int, devices: int, most: int) -> list[int]:
    """Into groups of which sizes fits go: what the devices divide, then the rest, never more than `most` in a group.

    >>> group_sizes(7, 3, 100), group_sizes(2, 8, 100), group_sizes(3, 1, 2)
    ([6, 1], [2], [2, 1])
    """
    groups, left = [], fits
    while left:
        together = min(left, most)
        rest = together % devices
        groups += [size for size in (together - rest, rest) if size]
        left -= together
    return groups


def mesh_of_group(orders: int, devices: Sequence[Any], devices_per_batch: int) -> Mesh | None:
    """The devices over which the fits of so many orders, and the batches of each, are divided."""
    rows = fits_at_once(devices, devices_per_batch)
    if jax.process_count() > 1:  # a process takes part in everything: what fits leave idle shares their batches
        rows = math.gcd(orders, rows)
        return make_mesh(devices, len(devices) // rows)
    rows = most_that_divide(orders, rows)
    return make_mesh(devices[: rows * devices_per_batch], devices_per_batch)


def most_that_divide(fits: int, devices: int) -> int:
    """The most of the devices that divide the fits evenly.

    >>> most_that_divide(6, 4), most_that_divide(1, 8)
    (3, 1)
    """
    return next(count for count in range(min(fits, devices), 0, -1) if fits % count == 0)


def describe(fits: int, total: int, width: int, mesh: Mesh | None, mode: Mode) -> str:
    """How some or all of a group's `total` fits stand on the devices, for the user."""
    number = f"{fits} fits" if fits == total else f"{fits} of {total} fits"
    devices_per_batch = sharing(mesh)
    count = mesh.size // devices_per_batch if mesh else 1
    singular, plural = (
        ("device", "devices")
        if devices_per_batch == 1
        else (f"group of {devices_per_batch} devices", f"groups of {devices_per_batch} devices")
    )
    where = f"on one {singular}" if count == 1 else f"on each of {count} {plural}"
    where += ": those of one order of examples share a device" if width > 1 else ""
    if fits == count > 1:
        return f"{number} at once, one on each of {count} {plural}"
    if mode == "vmap":
        return f"{number}, side by side {where}"
    return f"{number}, {f'{width} side by side' if mode == 'vmap_shared' else 'one after another'} {where}"


# Meshes: an axis "fits", and an axis "data" where devices share batches.

_BY_FIT = PartitionSpec("fits")


def make_mesh(devices: Sequence[Any], devices_per_batch: int = 1) -> Mesh | None:
    """A mesh over these devices: an axis of fits, and one of data where several share each fit's batches.

    None for one device, which needs none. `devices_per_batch` divides the number of devices.
    """
    if len(devices) < 2:
        return None
    names, shape = ("fits", "data"), (len(devices) // devices_per_batch, devices_per_batch)
    axes = 1 if devices_per_batch == 1 else 2
    auto = (AxisType.Auto,) * axes
    return jax.make_mesh(shape[:axes], names[:axes], axis_types=auto, devices=tuple(devices))


def mesh_under(tree: Any) -> Any:
    """The mesh over which `place` has divided the fits of a tree, or None."""
    sharding = getattr(jax.tree.leaves(tree)[0], "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) and sharding.spec == _BY_FIT else None


def sharing(mesh: Mesh | None) -> int:
    """How many devices share each fit's batches."""
    return 1 if mesh is None else mesh.shape.get("data", 1)


def over(mesh: Mesh | None, function: Callable[..., Any], by_fit: Sequence[Any], common: Sequence[Any] = ()) -> Any:
    """What `function` gives for trees with a leading axis of fits, divided over the mesh, and `common` trees.

    `function(*by_fit, *common)` sees the fits of one device; what it gives has a leading axis of fits too.
    """
    if mesh is None:
        return function(*by_fit, *common)
    specs = (*(_BY_FIT for _ in by_fit), *(PartitionSpec() for _ in common))
    # Nothing is summed over fits in it, so there is nothing that the check of varying values could find. The axis of
    # data is left to the compiler: what it divides has the meaning that it has on one device (padding, clipping,
    # penalties, the draws of dropout), and no sum over devices is ours to forget or to count twice.
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=_BY_FIT, axis_names={"fits"}, check_vma=False)
    return mapped(*by_fit, *common)


def divide(mesh: Mesh | None, rows: jax.Array) -> jax.Array:
    """Rows [batch, ...] of a fit, divided over the devices that share them; within `over` or outside of it."""
    if mesh is None or sharing(mesh) == 1:
        return rows
    around: Any = jax.sharding.get_abstract_mesh()  # the mesh as `over` has left it, where we are within
    sharding = NamedSharding(around if around.axis_names else mesh, PartitionSpec("data"))
    return jax.lax.with_sharding_constraint(rows, sharding)


def place(mesh: Mesh | None, tree: Any, by_fit: bool = True) -> Any:
    """The tree on the devices of the mesh: divided along its leading axis of fits, or whole on each device.

    Where a leaf is a shape and a dtype, all that is given are such, with their places.
    """
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, _BY_FIT if by_fit else PartitionSpec())
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree)):
        return jax.tree.map(functools.partial(_shape_at, sharding), tree)
    if jax.process_count() == 1:
        by_host = by_fit and mesh.devices.flat[0].platform == "cpu"
        return jax.device_put(jax.tree.map(_on_host_of_cpu, tree) if by_host else tree, sharding)
    return jax.tree.map(lambda leaf: _place_leaf(leaf, sharding), tree)


def _shape_at(sharding: NamedSharding, leaf: Any) -> jax.ShapeDtypeStruct:
    weak = bool(getattr(leaf, "weak_type", False))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, weak_type=weak)


def _on_host_of_cpu(leaf: Any) -> Any:
    """A copy in NumPy of what stands on one device of a CPU: JAX compiles a program to divide an array of its own, one
    for each shape."""
    if not isinstance(leaf, jax.Array) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return leaf
    return leaf if len(leaf.sharding.device_set) > 1 or leaf.aval.weak_type else np.array(leaf)


def _place_leaf(leaf: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
    """What every process has the same of, over the devices of all: each cuts its own part, and nothing is sent."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    parts = sharding.addressable_devices_indices_map(leaf.shape).items()
    pieces = [jax.device_put(leaf[index], device) for device, index in parts]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, pieces)


# Many processes.


def host(tree: Any) -> Any:
    """The tree in NumPy, whole in every process."""

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


def agreed(number: int) -> int:
    """The largest of the processes' numbers, in each of them: all processes are to call the same functions alike."""
    return number if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int64(number)).max())
