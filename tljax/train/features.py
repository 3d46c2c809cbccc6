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

from tljax import augment, batch_stats, models
from tljax.augment import Augmentation
from tljax.train.step import Fit, Spec, frozen_prefix_of
from tljax.train.vectorize import Data, batch_spec, divide, examples_of, host, mesh_under, over, place, sharing
from tljax.types import Batch, Model, Params

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
    views: int = 0
    """Of inputs that are augmented, so many views of each example pass the prefix, and each step draws one; 0 augments
    anew in every step, and so computes the prefix in it."""
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
    keys: jax.Array | None = None,
) -> tuple[Spec, Data]:
    """The spec without its frozen prefix, and the features in place of the inputs; or both as they are.

    `fit` is any of the group, `params` its variables with a leading axis of fits, on their devices; each `width`
    neighbours freeze equal leaves. `passes` examples are to pass through the stages: features are computed if that is
    at least as many as there are, and if the cache has room for them. Of inputs that are augmented there are features
    of as many views as the cache has, drawn from the fits' `keys`; without views the prefix is computed in every step.
    """
    mesh = mesh_under(params)
    wanted = features_bytes(spec, fit, data, passes, cache)
    prefix, examples = frozen_prefix_of(spec), examples_of(data.inputs)
    verb = "is" if len(prefix) == 1 else "are"
    if cache is None or not wanted:
        if spec.augment and prefix:
            why = "inputs are augmented" if cache is None or not cache.views else "fewer examples pass than views do"
            on_message(f"{', '.join(prefix)} {verb} frozen, and computed in every step, since {why}")
        return spec, replace(data, inputs=place(mesh, data.inputs, by_fit=False))
    views = cache.views if spec.augment else 0
    of_views = f"{views} augmented views of " if views else ""
    text = f"{', '.join(prefix)} {verb} frozen: features of {of_views}{examples:,} examples"
    if wanted > cache.budget:
        on_message(f"{text} are {_mb(wanted)} and the budget {_mb(cache.budget)}, so computed in every step")
        return spec, replace(data, inputs=place(mesh, data.inputs, by_fit=False))
    first_of_each = jax.tree.map(lambda leaf: leaf[::width], params)
    model = spec.model[: len(prefix)]
    features = compute(
        cache, model, spec.merge, first_of_each, data, spec.augment, None if keys is None else keys[::width]
    )
    on_message(f"{text} are computed once, {_mb(_nbytes(features))}")
    return replace(spec, model=spec.model[len(prefix) :], augment=(), views=views), replace(data, inputs=features)


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
    views = cache.views if spec.augment else 0

    def kept(leaf: Any) -> jax.ShapeDtypeStruct:
        shape = (1, len(leaf), *([views] if views else []), *leaf.shape[1:])
        return jax.ShapeDtypeStruct(shape, _kept_as(leaf.dtype, cache.dtype))

    short = replace(spec, model=spec.model[count:], augment=(), views=views)
    return short, replace(data, inputs=jax.tree.map(kept, outputs))


def features_bytes(spec: Spec, fit: Fit, data: Data, passes: int, cache: FeatureCache | None) -> int:
    """Bytes of one fit's features, or 0 if there are none that are worth it: fewer examples pass through than there
    are, or than augmented views of them. It depends on one fit alone, and so then do its bits."""
    count = len(frozen_prefix_of(spec))
    if cache is None or not count:
        return 0
    views = cache.views if spec.augment else 1
    if not views or passes < views * examples_of(data.inputs):
        return 0
    whole = jax.eval_shape(spec.merge or (lambda params: params), fit.params)
    return views * _view_bytes(cache, spec.model[:count], batch_stats.join(whole, fit.model_state), data)


def _view_bytes(cache: FeatureCache, model: Model, params: Params, data: Data) -> int:
    """`params` without an axis of fits."""
    examples = examples_of(data.inputs)
    outputs = jax.eval_shape(functools.partial(models.apply, model), params, batch_spec(data, 1))
    batch = _batch(examples)
    numbers = sum(math.prod(output.shape[1:]) for output in jax.tree.leaves(outputs))
    return -(-examples // batch) * batch * numbers * jnp.dtype(cache.dtype).itemsize


def compute(
    cache: FeatureCache,
    model: Model,
    merge: Any,
    params: Params,
    data: Data,
    augmentations: tuple[Augmentation, ...] = (),
    keys: jax.Array | None = None,
) -> Any:
    """The outputs of the stages of `model` for all inputs, leaves [views, rows, ...], at least as many as examples.

    `params` are variables with a leading axis of fits; there is a view for each of them, or one for all if all have the
    same bytes. `merge` is as in `Spec`. What was computed before is not computed again. Under augmentations, with a key
    for each fit, the leaves are [views, rows, cache.views, ...]: the outputs for augmented examples.
    """
    mesh = mesh_under(params)
    used = {stage.name: params[stage.name] for stage in model} if merge is None else params
    drawn_from = jax.random.key_data(keys) if augmentations and keys is not None else None
    digests = _digests((used, drawn_from))
    if len(set(digests)) == 1:
        used, drawn_from, digests = jax.tree.map(lambda leaf: leaf[:1], (used, drawn_from, digests))
    several = len(digests) > 1
    key = (model, merge, tuple(digests), data.name, cache.dtype, mesh, augmentations, cache.views)
    if key in cache.arrays:
        cache.arrays[key] = cache.arrays.pop(key)
        return cache.arrays[key]
    first = jax.tree.map(lambda leaf: leaf[0], used)
    views = cache.views if augmentations else 1
    wanted = _view_bytes(cache, model, _merged(merge, first), data) * len(digests) * views
    while cache.arrays and sum(map(_nbytes, cache.arrays.values())) + wanted > cache.budget:
        del cache.arrays[next(iter(cache.arrays))]
    inputs = place(mesh, data.inputs, by_fit=False)
    divided = mesh if several or sharing(mesh) > 1 else None
    targets = place(mesh, data.targets, by_fit=False) if augmentations else None
    fixed = (divided, model, merge, cache.dtype, several, augmentations, views)
    features = _compute(*fixed, (used, drawn_from), (inputs, targets))
    cache.arrays[key] = features if several else place(mesh, features, by_fit=False)
    return cache.arrays[key]


@functools.partial(jax.jit, static_argnums=range(7))
def _compute(
    mesh: Any,
    model: Model,
    merge: Any,
    dtype: str,
    several: bool,
    augmentations: tuple[Augmentation, ...],
    views: int,
    of_each_fit: tuple[Params, Any],
    data: tuple[Any, Any],
) -> Any:
    """The features that `compute` keeps: `of_each_fit` has (variables, data of the key), `data` (inputs, targets)."""
    examples = examples_of(data[0])
    batch = _batch(examples)
    # Rows beyond the last example hold it again: nothing refers to them.
    chosen = jnp.minimum(jnp.arange(-(-examples // batch) * batch), examples - 1).reshape(-1, batch)

    def of_fits(of_each_fit: tuple[Params, Any], data: tuple[Any, Any]) -> Any:
        inputs, targets = data

        def of_fit(of_one: tuple[Params, Any]) -> Any:
            variables, key_data = of_one
            whole = _merged(merge, variables)

            def passed(x: Any) -> Any:
                outputs = models.apply(model, whole, x)
                return jax.tree.map(lambda output: output.astype(_kept_as(output.dtype, dtype)), outputs)

            def of_rows(rows: jax.Array) -> Any:
                divided = divide(mesh, rows)
                x = jax.tree.map(lambda leaf: leaf[0][divided], inputs)
                if not augmentations:
                    return passed(x)
                batch = Batch(x, jax.tree.map(lambda leaf: leaf[divided], targets), jnp.ones(len(rows)))
                key = jax.random.wrap_key_data(key_data)
                keys = jax.vmap(functools.partial(view_key, key))(jnp.arange(views))
                drawn = jax.lax.map(
                    lambda key: passed(augment.apply(augmentations, key, batch, places=divided).inputs), keys
                )
                return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), drawn)

            outputs = jax.lax.map(of_rows, chosen)
            return jax.tree.map(lambda output: output.reshape(-1, *output.shape[2:]), outputs)

        return jax.lax.map(of_fit, of_each_fit)

    return over(mesh, of_fits, (of_each_fit,), (data,)) if several else of_fits(of_each_fit, data)


def view_key(key: jax.Array, view: Any) -> jax.Array:
    """The key of one augmented view of all examples, of a fit with this key: no step's, and no stage's."""
    return jax.random.fold_in(jax.random.fold_in(key, _VIEWS), view)


_VIEWS = 2**31 - 2
"""What is folded into a fit's key for views: steps fold in their numbers, from 0 on."""


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
