"""Features: the outputs of the frozen prefix, computed once and trained upon.

The frozen prefix is the leading stages that are frozen whole (`step.frozen_prefix`). A linear probe on 784-512-10 then
costs a fortieth of what it costs through its frozen stage. Of a stream they are computed from what is read ahead; those
that are larger than the budget go to files, and are a stream themselves.
"""

import contextlib
import functools
import hashlib
import itertools
import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax import augment, batch_stats, masks, models
from tljax.augment import Augmentation
from tljax.train import memory
from tljax.train.data import Data, Stream, batch_spec, batch_within, batches, examples_of
from tljax.train.step import Fit, Spec, forward, frozen_prefix_of
from tljax.train.vectorize import alike, divide, host, joined, mesh_under, on_first_device, over, place, sharing
from tljax.types import ArrayExamples, Batch, InputError, Mask, Model, Params

_BATCH = memory.EXAMPLES
"""Examples that go through the frozen stages at once, where there is room for what they compute of them."""


@dataclass
class FeatureCache:
    """Features computed so far, for all fits that freeze the same leaves of the same source.

    The least recently used go when `budget` bytes are full.
    """

    budget: int
    """Bytes."""
    dtype: str = "float32"
    """Or bfloat16, half as large; fits compute in float32 all the same."""
    folder: Path | None = None
    """Where the features of a stream are kept that are larger than the budget; None computes them in every step. What
    is in it is deleted with the cache."""
    views: int = 0
    """Of inputs that are augmented, so many views of each example pass the prefix, and each step draws one; 0 augments
    anew in every step, and so computes the prefix in it."""
    batch: int = 0
    """So many examples at most go through the prefix at once; 0 for as many as memory holds."""
    arrays: dict[Any, Any] = field(default_factory=dict)
    """{everything that features follow from: features [views, n, ...]}, least recently used first."""
    files: dict[Any, Any] = field(default_factory=dict)
    """Likewise, features [n, ...] in files."""
    digests: dict[Any, Any] = field(default_factory=dict)
    """{which arrays: (weak references to them, what `_digests` gives)} of the latest."""


def skip_frozen_prefix(
    spec: Spec,
    fit: Fit,
    params: Params,
    width: int,
    data: Data | Stream,
    passes: int,
    cache: FeatureCache | None,
    on_message: Callable[[str], None],
    keys: jax.Array | None = None,
    shared: Params | None = None,
) -> tuple[Spec, Data | Stream]:
    """The spec without its frozen prefix, and the features in place of the inputs; or both as they are.

    `fit` is any of the group, `params` its variables with a leading axis of fits, on their devices, and `shared` those
    that all fits share; each `width` neighbours freeze equal leaves. `passes` examples are to pass through the stages:
    features are computed if that is at least as many as there are, and if the cache has room for them, on disk where
    the data are a stream.

    Of inputs that are augmented there are features of as many views of each example as the cache has, drawn from the
    fits' `keys`; without views, and of a stream, the prefix is computed in every step.
    """
    mesh = mesh_under(params)
    wanted = features_bytes(spec, fit, data, passes, cache)
    prefix, examples = frozen_prefix_of(spec), len(data)
    verb = "is" if len(prefix) == 1 else "are"
    if cache is None or not wanted:
        if spec.augment and prefix:
            few = cache is not None and cache.views and not isinstance(data, Stream)
            why = "fewer examples pass than views do" if few else "inputs are augmented"
            on_message(f"{', '.join(prefix)} {verb} frozen, and computed in every step, since {why}")
        return spec, on_mesh(mesh, data)
    views = cache.views if spec.augment else 0
    views_text = f"{views} augmented views of " if views else ""
    text = f"{', '.join(prefix)} {verb} frozen: features of {views_text}{examples:,} examples"
    model = spec.model[: len(prefix)]
    rest = replace(spec, model=spec.model[len(prefix) :], augment=(), views=views, settled=())
    if wanted > cache.budget and isinstance(data, Stream) and cache.folder is not None:
        in_files = on_disk(cache, model, spec.merge, params, data, shared)
        if in_files is not None:
            on_message(f"{text} are computed once, {_mb(wanted)} in '{cache.folder}'")
            return rest, in_files
    if wanted > cache.budget:
        on_message(f"{text} are {_mb(wanted)} and the budget {_mb(cache.budget)}, so computed in every step")
        return spec, on_mesh(mesh, data)
    first_of_each = jax.tree.map(lambda leaf: leaf[::width], params)
    keys_of_each = None if keys is None else keys[::width]
    features = compute(cache, model, spec.merge, first_of_each, data, spec.augment, keys_of_each, shared)
    used, common = (None if tree is None else _used(model, spec.merge, tree) for tree in (params, shared))
    at_once = _at_once(model, _first_shapes(spec.merge, used, common), data, cache.batch)
    how = "" if at_once == _BATCH else f", {at_once:,} at a time"
    on_message(f"{text} are computed once{how}, {_mb(_nbytes(features))}")
    if isinstance(data, Stream):
        return rest, Data(features, jax.tree.map(jnp.asarray, data.examples.targets), data.name)
    return rest, replace(data, inputs=features)


def on_mesh(mesh: Any, data: Data | Stream) -> Data | Stream:
    """Data whole on each device of a mesh; a stream stays where it is."""
    return data if isinstance(data, Stream) else replace(data, inputs=place(mesh, data.inputs, by_fit=False))


def shapes(
    spec: Spec, fit: Fit, data: Data | Stream, passes: int, cache: FeatureCache | None, different: int = 1
) -> tuple[Spec, Data | Stream]:
    """What `skip_frozen_prefix` gives for one fit, with shapes and dtypes in place of features; nothing is computed.

    `different` is how many fits of a group there are features for, one if they have the same.
    """
    wanted = features_bytes(spec, fit, data, passes, cache)
    if cache is None or not 0 < wanted <= cache.budget:
        return spec, data
    count = len(frozen_prefix_of(spec))
    whole = jax.eval_shape(spec.merge or (lambda params: params), fit.params)
    variables = batch_stats.join(whole, fit.model_state)
    batch = _batch(spec.model[:count], variables, data, cache.batch)
    rows = -(-len(data) // batch) * batch
    outputs = jax.eval_shape(functools.partial(models.apply, spec.model[:count]), variables, batch_spec(data, rows))
    views = cache.views if spec.augment else 0

    def kept(leaf: Any) -> jax.ShapeDtypeStruct:
        shape = (different, len(leaf), *([views] if views else []), *leaf.shape[1:])
        return jax.ShapeDtypeStruct(shape, _kept_as(leaf.dtype, cache.dtype))

    targets = data.examples.targets if isinstance(data, Stream) else data.targets
    short = replace(spec, model=spec.model[count:], augment=(), views=views)
    return short, Data(jax.tree.map(kept, outputs), targets, data.name)


def different_prefixes(spec: Spec, fits: Sequence[Fit], histories: Sequence[Sequence[Mask]]) -> int:
    """How many fits `compute` is to have features for where a phase of these masks begins: all, or one for all.

    A leaf that trained in a phase before counts as different in each fit.
    """
    prefix = spec.model[: len(frozen_prefix_of(spec))]
    used = [_used(prefix, spec.merge, batch_stats.join(fit.params, fit.model_state)) for fit in fits]
    trained = [
        masks.trains(leaf)
        for history in histories
        for mask in history[:-1]
        for leaf in jax.tree.leaves(_used(prefix, spec.merge, mask))
    ]
    keys = [jax.random.key_data(fit.key) for fit in fits] if spec.augment else [()] * len(fits)
    same = not any(trained) and all(alike(list(zip(used, keys, strict=True))))
    return 1 if same else len(fits)


def features_bytes(spec: Spec, fit: Fit, data: Data | Stream, passes: int, cache: FeatureCache | None) -> int:
    """Bytes of one fit's features, or 0 if there are none that are worth it: fewer examples pass through than there
    are, or than augmented views of them. It depends on one fit alone, and so then do its bits."""
    count = len(frozen_prefix_of(spec))
    if cache is None or not count or (spec.augment and isinstance(data, Stream)):
        return 0
    views = cache.views if spec.augment else 1
    if not views or passes < views * len(data):
        return 0
    whole = jax.eval_shape(spec.merge or (lambda params: params), fit.params)
    return views * _view_bytes(cache, spec.model[:count], batch_stats.join(whole, fit.model_state), data)


def _view_bytes(cache: FeatureCache, model: Model, params: Params, data: Data | Stream) -> int:
    """`params` without an axis of fits."""
    examples = len(data)
    outputs = jax.eval_shape(functools.partial(models.apply, model), params, batch_spec(data, 1))
    batch = _batch(model, params, data, cache.batch)
    numbers = sum(math.prod(output.shape[1:]) for output in jax.tree.leaves(outputs))
    return -(-examples // batch) * batch * numbers * jnp.dtype(cache.dtype).itemsize


def compute(
    cache: FeatureCache,
    model: Model,
    merge: Any,
    params: Params,
    data: Data | Stream,
    augmentations: tuple[Augmentation, ...] = (),
    keys: jax.Array | None = None,
    shared: Params | None = None,
) -> Any:
    """The outputs of the stages of `model` for all inputs, leaves [views, rows, ...], at least as many as examples.

    `params` are variables with a leading axis of fits, with None for those that are in `shared`, which have none; there
    is a view for each fit, or one for all if all have the same bytes. `merge` is as in `Spec`. What was computed before
    is not computed again. Under augmentations, with a key of each fit, the leaves are [views, rows, cache.views, ...]:
    the outputs for augmented examples.
    """
    mesh = mesh_under(params)
    used, common = _used(model, merge, params), None if shared is None else _used(model, merge, shared)
    drawn_from = jax.random.key_data(keys) if augmentations and keys is not None else None
    digests = _known_digests(cache, (used, drawn_from), None if shared is None else (common, None))
    if len(set(digests)) == 1:
        (used, drawn_from), digests = jax.tree.map(lambda leaf: leaf[:1], (used, drawn_from)), digests[:1]
    several = len(digests) > 1
    key: tuple[Any, ...] = (model, merge, tuple(digests), data.name, cache.dtype, mesh)
    key += (augmentations, cache.views) if augmentations else ()
    if key in cache.arrays:
        cache.arrays[key] = cache.arrays.pop(key)
        return cache.arrays[key]
    first = _first_shapes(merge, used, common)
    wanted = _view_bytes(cache, model, first, data) * len(digests)
    wanted *= cache.views if augmentations else 1
    while cache.arrays and sum(map(_nbytes, cache.arrays.values())) + wanted > cache.budget:
        del cache.arrays[next(iter(cache.arrays))]
    divided = mesh if several or sharing(mesh) > 1 else None
    if isinstance(data, Stream):
        parts = list(_computed(mesh, model, merge, cache, several, used, common, data))
        features = jax.tree.map(lambda *leaves: np.concatenate(leaves, 1), *parts)
        features = features if mesh else jax.device_put(features)
    else:
        inputs = place(mesh, data.inputs, by_fit=False)
        fixed = (divided, model, merge, cache.dtype, several, _batch(model, first, data, cache.batch))
        if augmentations:
            examples = (inputs, place(mesh, data.targets, by_fit=False))
            features = _compute_views(*fixed, augmentations, cache.views, (used, drawn_from), examples, common)
        else:
            features = _compute(*fixed, used, common, inputs)
    cache.arrays[key] = features if several else place(mesh, features, by_fit=False)
    return cache.arrays[key]


def _first_shapes(merge: Any, variables: Params, shared: Params | None) -> Any:
    """Shapes and dtypes of the ordinary variables of one fit; `variables` have a leading axis of fits."""
    per_fit = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), variables)
    return jax.eval_shape(lambda per_fit, shared: _merged(merge, joined(per_fit, shared)), per_fit, shared)


@functools.partial(jax.jit, static_argnames=("mesh", "model", "merge", "dtype", "several", "batch"))
def _compute(
    mesh: Any,
    model: Model,
    merge: Any,
    dtype: str,
    several: bool,
    batch: int,
    params: Params,
    shared: Params | None,
    inputs: Any,
) -> Any:
    def gathered(rows: jax.Array, inputs: Any) -> Any:
        divided = divide(mesh, rows)
        return jax.tree.map(lambda leaf: leaf[0][divided], inputs)

    return _outputs(mesh, model, merge, dtype, several, params, shared, _rows(inputs, batch), inputs, gathered)


def _rows(inputs: Any, batch: int) -> jax.Array:
    """All examples, int32 [batches, batch]; rows beyond the last hold it again: nothing refers to them."""
    examples = examples_of(inputs)
    return jnp.minimum(jnp.arange(-(-examples // batch) * batch), examples - 1).reshape(-1, batch)


@functools.partial(jax.jit, static_argnums=range(8))
def _compute_views(
    mesh: Any,
    model: Model,
    merge: Any,
    dtype: str,
    several: bool,
    batch_size: int,
    augmentations: tuple[Augmentation, ...],
    views: int,
    params_and_keys: tuple[Params, Any],
    examples: tuple[Any, Any],
    shared: Params | None,
) -> Any:
    """As `_compute`, of augmented views of the examples (inputs, targets): leaves [fits, rows, views, ...].

    `params_and_keys` has its variables and the data of its key.
    """

    def fits_features(params_and_keys: tuple[Params, Any], examples: tuple[Any, Any], shared: Params | None) -> Any:
        def fit_features(params_and_key: tuple[Params, Any]) -> Any:
            whole, key = _merged(merge, joined(params_and_key[0], shared)), jax.random.wrap_key_data(params_and_key[1])
            keys = jax.vmap(functools.partial(view_key, key))(jnp.arange(views))

            def batch_features(rows: jax.Array) -> Any:
                divided, (inputs, targets) = divide(mesh, rows), examples
                x = jax.tree.map(lambda leaf: leaf[0][divided], inputs)
                batch = Batch(x, jax.tree.map(lambda leaf: leaf[divided], targets), jnp.ones(len(rows)))

                def view_features(key: jax.Array) -> Any:
                    outputs = models.apply(
                        model, whole, augment.apply(augmentations, key, batch, places=divided).inputs
                    )
                    return jax.tree.map(lambda output: output.astype(_kept_as(output.dtype, dtype)), outputs)

                return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), jax.lax.map(view_features, keys))

            outputs = jax.lax.map(batch_features, _rows(examples[0], batch_size))
            return jax.tree.map(lambda output: output.reshape(-1, *output.shape[2:]), outputs)

        return jax.lax.map(fit_features, params_and_keys)

    if several:
        return over(mesh, fits_features, (params_and_keys,), (examples, shared))
    return fits_features(params_and_keys, examples, shared)


def view_key(key: jax.Array, view: Any) -> jax.Array:
    """The key of one augmented view of all examples, of a fit with this key: no step's, and no stage's."""
    return jax.random.fold_in(jax.random.fold_in(key, _VIEWS), view)


_VIEWS = 2**31 - 2
"""What is folded into a fit's key for views: steps fold in their numbers, from 0 on."""


@functools.partial(jax.jit, static_argnames=("mesh", "model", "merge", "dtype", "several"))
def _compute_chunk(
    mesh: Any, model: Model, merge: Any, dtype: str, several: bool, params: Params, shared: Params | None, inputs: Any
) -> Any:
    """As `_compute`, of inputs [batches, batch, ...]."""

    def batch_features(batch: jax.Array, inputs: Any) -> Any:
        return jax.tree.map(lambda leaf: divide(mesh, leaf[batch]), inputs)

    batches = jnp.arange(len(jax.tree.leaves(inputs)[0]))
    return _outputs(mesh, model, merge, dtype, several, params, shared, batches, inputs, batch_features)


def _outputs(
    mesh: Any,
    model: Model,
    merge: Any,
    dtype: str,
    several: bool,
    params: Params,
    shared: Params | None,
    batches: jax.Array,
    inputs: Any,
    fetch: Callable[[jax.Array, Any], Any],
) -> Any:
    """The outputs for `fetch(batch, inputs)` of each of the batches, leaves [fits, rows, ...].

    One fit stands for all where `params` have no leaf of their own.
    """

    def fits_outputs(params: Params, inputs: Any, shared: Params | None) -> Any:
        def fit_outputs(params: Params) -> Any:
            whole = _merged(merge, joined(params, shared))

            def batch_outputs(batch: jax.Array) -> Any:
                outputs = models.apply(model, whole, fetch(batch, inputs))
                return jax.tree.map(lambda output: output.astype(_kept_as(output.dtype, dtype)), outputs)

            outputs = jax.lax.map(batch_outputs, batches)
            return jax.tree.map(lambda output: output.reshape(-1, *output.shape[2:]), outputs)

        if not jax.tree.leaves(params):
            return jax.tree.map(lambda leaf: leaf[None], fit_outputs(params))
        return jax.lax.map(fit_outputs, params)

    return over(mesh, fits_outputs, (params,), (inputs, shared)) if several else fits_outputs(params, inputs, shared)


def _used(model: Model, merge: Any, variables: Params) -> Params:
    """The variables that the stages of `model` read: all of them where parameters are merged first."""
    return {stage.name: variables[stage.name] for stage in model} if merge is None else variables


def _merged(merge: Any, variables: Params) -> Params:
    """The variables whose parameters `merge`, which is as in `Spec`, has made ordinary."""
    params, state = batch_stats.split(variables)
    return batch_stats.join(merge(params), state) if merge else variables


# Of a stream.


def _computed(
    mesh: Any,
    model: Model,
    merge: Any,
    cache: FeatureCache,
    several: bool,
    params: Params,
    shared: Params | None,
    stream: Stream,
) -> Iterator[Any]:
    """The outputs for all inputs of a stream in NumPy, chunk after chunk, leaves [fits, rows, ...]; together as many
    rows as examples."""
    size = batch_within(stream, _batch(model, _first_shapes(merge, params, shared), stream, cache.batch))
    divided = mesh if several or sharing(mesh) > 1 else None
    # What has no mesh of its own is computed on one device, whatever stands on the others.
    place_chunk = functools.partial(place, divided, by_fit=False) if divided else jax.device_put
    with batches(stream, size, lambda inputs: place_chunk(inputs)) as reader:
        for count, inputs in reader:
            outputs = host(_compute_chunk(divided, model, merge, cache.dtype, several, params, shared, inputs))
            yield jax.tree.map(lambda leaf, count=count: leaf[:, :count], outputs)


def on_disk(
    cache: FeatureCache, model: Model, merge: Any, params: Params, stream: Stream, shared: Params | None = None
) -> Stream | None:
    """The features of a stream as a stream of files in the cache's folder; None for fits that do not share them.

    Variables are as in `compute`. Raises InputError if they cannot be written; nothing of them is left then.
    """
    used, common = _used(model, merge, params), None if shared is None else _used(model, merge, shared)
    digests = set(_known_digests(cache, used, common))
    if len(digests) > 1 or cache.folder is None or jax.process_count() > 1:
        return None
    key = (model, merge, *digests, stream.name, cache.dtype)
    if key not in cache.files:
        mesh = mesh_under(params)
        first_fit = jax.tree.map(lambda leaf: leaf[:1], used)
        first_fit = first_fit if mesh is None else jax.device_put(host(first_fit))
        chunks = _computed(None, model, merge, cache, False, first_fit, on_first_device(common), stream)
        arrays = _written(
            cache, cache.folder, (jax.tree.map(lambda leaf: leaf[0], chunk) for chunk in chunks), len(stream)
        )
        cache.files[key] = ArrayExamples(arrays, stream.examples.targets)
    return Stream(cache.files[key], stream.memory, f"the features of {stream.what}", stream.name)


def _written(cache: FeatureCache, within: Path, chunks: Iterator[Any], examples: int) -> Any:
    """Chunks, leaves [rows, ...], one after another in files; the memory-mapped arrays [examples, ...].

    Written as files are: in a memory map a full disk would end the process.
    """
    try:
        within.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="features-", dir=within))
    except OSError as error:
        raise _unwritable(within, error) from error
    delete = weakref.finalize(cache, _delete, folder)
    try:
        first = next(chunks)
        leaves, structure = jax.tree.flatten(first)
        files = [folder / f"{number}.bin" for number in range(len(leaves))]
        with contextlib.ExitStack() as opened:
            outs = [opened.enter_context(open(file, "wb")) for file in files]
            for chunk in itertools.chain([first], chunks):
                for out, leaf in zip(outs, jax.tree.leaves(chunk), strict=True):
                    out.write(np.ascontiguousarray(leaf).view(np.uint8).data)
        arrays = [
            np.memmap(file, leaf.dtype, "r", shape=(examples, *leaf.shape[1:]))
            for file, leaf in zip(files, leaves, strict=True)
        ]
    except BaseException as error:
        delete()
        if isinstance(error, OSError):
            raise _unwritable(within, error) from error
        raise
    return jax.tree.unflatten(structure, arrays)


def _unwritable(folder: Path, error: OSError) -> InputError:
    reason = error.strerror or str(error)
    remedy = "make room, or compute them in every step with `features_budget=0`"
    return InputError(f"features cannot be kept in '{folder}' ({reason}): {remedy}")


def _delete(folder: Path) -> None:
    """Delete a folder of features, and the one around it if it is empty then."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()


def _nbytes(features: Any) -> int:
    """Bytes of features."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(features))


def _kept_as(computed: Any, dtype: str) -> Any:
    """The dtype in which an output is kept: `dtype` for floats, its own for whole numbers and bools."""
    return dtype if jnp.issubdtype(computed, jnp.floating) else computed


def _batch(model: Model, variables: Params, data: Data | Stream, most: int) -> int:
    """Examples a batch, of as many batches as are needed, as even as can be; arguments are as `_at_once` takes them."""
    return -(-len(data) // -(-len(data) // _at_once(model, variables, data, most)))


def _at_once(model: Model, variables: Params, data: Data | Stream, most: int) -> int:
    """Examples that go through `model` at once at most: as many as are `asked` for, or else as memory holds.

    `variables` are those of one fit.
    """
    inputs = batch_spec(data, 1)
    return most or memory.examples_at_once(forward(model), _used(model, None, variables), inputs, _BATCH)


_KNOWN = 8
"""Trees of which the digests are remembered."""


def _known_digests(cache: FeatureCache, per_fit: Any, shared: Any) -> list[str]:
    """What `_digests` gives; of the very arrays that were asked for before nothing is read again."""
    arrays, structure = jax.tree.flatten((per_fit, shared))
    key = structure, tuple(map(id, arrays))
    references, digests = cache.digests.get(key, ((), []))
    if not digests or any(reference() is not leaf for reference, leaf in zip(references, arrays, strict=True)):
        digests = _digests(per_fit, shared)
        if all(isinstance(leaf, jax.Array) for leaf in arrays):
            cache.digests[key] = tuple(map(weakref.ref, arrays)), digests
            while len(cache.digests) > _KNOWN:
                del cache.digests[next(iter(cache.digests))]
    return list(digests)


def _digests(per_fit: Any, shared: Any = None) -> list[str]:
    """The digest of each fit's bytes, in the order of the whole tree; one for all where they share every leaf. What
    they share is looked at once."""
    leaves: list[Any] = jax.tree.leaves(host(per_fit), is_leaf=lambda leaf: leaf is None)
    common_leaves = (
        [None] * len(leaves) if shared is None else jax.tree.leaves(host(shared), is_leaf=lambda leaf: leaf is None)
    )
    count = next((len(leaf) for leaf in leaves if leaf is not None), 1)
    digests = [hashlib.sha256() for _ in range(count)]
    for leaf, common in zip(leaves, common_leaves, strict=True):
        if leaf is None and common is None:
            continue
        leaf_digests = [_digest(common)] * count if leaf is None else map(_digest, leaf)
        for digest, part in zip(digests, leaf_digests, strict=True):
            digest.update(part)
    return [digest.hexdigest() for digest in digests]


def _digest(array: Any) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).digest()


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
