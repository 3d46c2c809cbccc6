"""Features: the outputs of the frozen prefix, computed once and trained upon.

The frozen prefix is the leading stages that are frozen whole (`step.frozen_prefix`). A linear probe on 784-512-10 then
costs a fortieth of what it costs through its frozen stage.
"""

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from tljax import batch_stats, models
from tljax.train.step import Fit, Spec, frozen_prefix_of
from tljax.train.vectorize import Data, batch_spec, divide, examples_of, host, mesh_under, over, place, sharing
from tljax.types import Model, Params

_BATCH = 1000
"""Examples that go through the frozen stages at once."""


@dataclass
class FeatureCache:
    """Features computed so far, for all fits that freeze the same leaves of the same source.

    The least recently used go when `budget` bytes are full.
    """

    budget: int
    """Bytes."""
    dtype: str = "float32"
    """Or bfloat16, half as large; fits compute in float32 all the same."""
    arrays: dict[Any, Any] = field(default_factory=dict)
    """{everything that features follow from: features [views, n, ...]}, least recently used first."""


def skip_frozen_prefix(
    spec: Spec,
    fit: Fit,
    params: Params,
    width: int,
    data: Data,
    passes: int,
    cache: FeatureCache | None,
    on_message: Callable[[str], None],
) -> tuple[Spec, Data]:
    """The spec without its frozen prefix, and the features in place of the inputs; or both as they are.

    `fit` is any of the group, `params` its variables with a leading axis of fits, on their devices; each `width`
    neighbours freeze equal leaves. `passes` examples are to pass through the stages: features are computed if that is
    at least as many as there are, and if the cache has room for them.
    """
    mesh = mesh_under(params)
    if spec.augment and (kept := frozen_prefix_of(spec)):
        verb = "is" if len(kept) == 1 else "are"
        on_message(f"{', '.join(kept)} {verb} frozen, and computed in every step, since what comes in is augmented")
    wanted = features_bytes(spec, fit, data, passes, cache)
    if cache is None or not wanted:
        return spec, replace(data, inputs=place(mesh, data.inputs, by_fit=False))
    prefix, examples = frozen_prefix_of(spec), examples_of(data.inputs)
    verb = "is" if len(prefix) == 1 else "are"
    text = f"{', '.join(prefix)} {verb} frozen: features of {examples:,} examples"
    if wanted > cache.budget:
        on_message(f"{text} are {_mb(wanted)} and the budget {_mb(cache.budget)}, so computed in every step")
        return spec, replace(data, inputs=place(mesh, data.inputs, by_fit=False))
    first_of_each = jax.tree.map(lambda leaf: leaf[::width], params)
    features = compute(cache, spec.model[: len(prefix)], spec.merge, first_of_each, data)
    on_message(f"{text} are computed once, {_mb(_nbytes(features))}")
    return replace(spec, model=spec.model[len(prefix) :]), replace(data, inputs=features)


def shapes(spec: Spec, fit: Fit, data: Data, passes: int, cache: FeatureCache | None) -> tuple[Spec, Data]:
    """What `skip_frozen_prefix` gives for one fit, with shapes and dtypes in place of features; nothing is computed."""
    wanted = features_bytes(spec, fit, data, passes, cache)
    if cache is None or not 0 < wanted <= cache.budget:
        return spec, data
    count, batch = len(frozen_prefix_of(spec)), _batch(examples_of(data.inputs))
    rows = -(-examples_of(data.inputs) // batch) * batch
    whole = jax.eval_shape(spec.merge or (lambda params: params), fit.params)
    variables = batch_stats.join(whole, fit.model_state)
    outputs = jax.eval_shape(functools.partial(models.apply, spec.model[:count]), variables, batch_spec(data, rows))
    inputs = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), _kept_as(leaf.dtype, cache.dtype)), outputs
    )
    return replace(spec, model=spec.model[count:]), replace(data, inputs=inputs)


def features_bytes(spec: Spec, fit: Fit, data: Data, passes: int, cache: FeatureCache | None) -> int:
    """Bytes of one view of features, or 0 if there is none that is worth it: fewer examples pass through than there
    are. It depends on one fit alone, and so then do its bits."""
    count = len(frozen_prefix_of(spec))
    if cache is None or not count or spec.augment or passes < examples_of(data.inputs):
        return 0
    whole = jax.eval_shape(spec.merge or (lambda params: params), fit.params)
    return _view_bytes(cache, spec.model[:count], batch_stats.join(whole, fit.model_state), data)


def _view_bytes(cache: FeatureCache, model: Model, params: Params, data: Data) -> int:
    """`params` without an axis of fits."""
    examples = examples_of(data.inputs)
    outputs = jax.eval_shape(functools.partial(models.apply, model), params, batch_spec(data, 1))
    batch = _batch(examples)
    numbers = sum(math.prod(output.shape[1:]) for output in jax.tree.leaves(outputs))
    return -(-examples // batch) * batch * numbers * jnp.dtype(cache.dtype).itemsize


def compute(cache: FeatureCache, model: Model, merge: Any, params: Params, data: Data) -> Any:
    """The outputs of the stages of `model` for all inputs, leaves [views, rows, ...], at least as many as examples.

    `params` are variables with a leading axis of fits; there is a view for each of them, or one for all if all have the
    same bytes. `merge` is as in `Spec`. What was computed before is not computed again.
    """
    mesh = mesh_under(params)
    used = {stage.name: params[stage.name] for stage in model} if merge is None else params
    digests = _digests(used)
    if len(set(digests)) == 1:
        used, digests = jax.tree.map(lambda leaf: leaf[:1], used), digests[:1]
    several = len(digests) > 1
    key = (model, merge, tuple(digests), data.name, cache.dtype, mesh)
    if key in cache.arrays:
        cache.arrays[key] = cache.arrays.pop(key)
        return cache.arrays[key]
    first = jax.tree.map(lambda leaf: leaf[0], used)
    wanted = _view_bytes(cache, model, _merged(merge, first), data) * len(digests)
    while cache.arrays and sum(map(_nbytes, cache.arrays.values())) + wanted > cache.budget:
        del cache.arrays[next(iter(cache.arrays))]
    inputs = place(mesh, data.inputs, by_fit=False)
    divided = mesh if several or sharing(mesh) > 1 else None
    features = _compute(divided, model, merge, cache.dtype, several, used, inputs)
    cache.arrays[key] = features if several else place(mesh, features, by_fit=False)
    return cache.arrays[key]


@functools.partial(jax.jit, static_argnames=("mesh", "model", "merge", "dtype", "several"))
def _compute(mesh: Any, model: Model, merge: Any, dtype: str, several: bool, params: Params, inputs: Any) -> Any:
    examples = examples_of(inputs)
    batch = _batch(examples)
    # Rows beyond the last example hold it again: nothing refers to them.
    chosen = jnp.minimum(jnp.arange(-(-examples // batch) * batch), examples - 1).reshape(-1, batch)

    def of_fits(params: Params, inputs: Any) -> Any:
        def of_fit(params: Params) -> Any:
            whole = _merged(merge, params)

            def of_rows(rows: jax.Array) -> Any:
                divided = divide(mesh, rows)
                outputs = models.apply(model, whole, jax.tree.map(lambda leaf: leaf[0][divided], inputs))
                return jax.tree.map(lambda output: output.astype(_kept_as(output.dtype, dtype)), outputs)

            outputs = jax.lax.map(of_rows, chosen)
            return jax.tree.map(lambda output: output.reshape(-1, *output.shape[2:]), outputs)

        return jax.lax.map(of_fit, params)

    return over(mesh, of_fits, (params,), (inputs,)) if several else of_fits(params, inputs)


def _merged(merge: Any, variables: Params) -> Params:
    """The variables whose parameters `merge`, which is as in `Spec`, has made ordinary."""
    params, state = batch_stats.split(variables)
    return batch_stats.join(merge(params), state) if merge else variables


def _nbytes(features: Any) -> int:
    """Bytes of features."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(features))


def _kept_as(computed: Any, dtype: str) -> Any:
    """The dtype in which an output is kept: `dtype` for floats, its own for whole numbers and bools."""
    return dtype if jnp.issubdtype(computed, jnp.floating) else computed


def _batch(examples: int) -> int:
    """Examples a batch: as many batches as are needed, as even as can be."""
    return -(-examples // -(-examples // _BATCH))


def _digests(params: Params) -> list[str]:
    """The digest of each fit's bytes."""
    leaves = host(jax.tree.leaves(params))
    return [hashlib.sha256(b"".join(leaf[i].tobytes() for leaf in leaves)).hexdigest() for i in range(len(leaves[0]))]


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
