"""Trials, and the batches of each, over devices: how many go where, and a function run on all of them at once."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

_TRIALS = PartitionSpec("trials")


def mesh(devices: Sequence[Any], batch: int = 1) -> Mesh | None:
    """A mesh over these devices: an axis of trials, and one of data where `batch` devices share each trial's batches.

    None for one device, which needs none. `batch` divides the number of devices.
    """
    if len(devices) < 2:
        return None
    names, shape = ("trials", "data"), (len(devices) // batch, batch)
    axes = 1 if batch == 1 else 2
    auto = (AxisType.Auto,) * axes
    return jax.make_mesh(shape[:axes], names[:axes], axis_types=auto, devices=tuple(devices))


def sharing(mesh: Mesh | None) -> int:
    """How many devices share each trial's batches."""
    return 1 if mesh is None else mesh.shape.get("data", 1)


def parts(trials: int, devices: int) -> list[int]:
    """Sizes of parts that devices divide: all whole rounds together, then the rest on fewer devices.

    >>> parts(7, 3), parts(2, 8), parts(3, 1)
    ([6, 1], [2], [3])
    """
    rest = trials % devices
    return [size for size in (trials - rest, rest) if size]


def share(trials: int, devices: int) -> int:
    """The most of the devices that divide the trials evenly.

    >>> share(6, 4), share(1, 8)
    (3, 1)
    """
    return next(count for count in range(min(trials, devices), 0, -1) if trials % count == 0)


def over(mesh: Mesh | None, function: Callable[..., Any], split: Sequence[Any], common: Sequence[Any] = ()) -> Any:
    """What `function` gives for trees with a leading axis of trials, `split` over the mesh, and `common` trees.

    `function(*split, *common)` sees the trials of one device; what it gives has a leading axis of trials too.
    """
    if mesh is None:
        return function(*split, *common)
    specs = (*(_TRIALS for _ in split), *(PartitionSpec() for _ in common))
    # Nothing is summed over trials in it, so there is nothing that the check of varying values could find. The axis of
    # data is left to the compiler: what it divides has the meaning that it has on one device (padding, clipping,
    # penalties, the draws of dropout), and no sum over devices is ours to forget or to count twice.
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=specs, out_specs=_TRIALS, axis_names={"trials"}, check_vma=False
    )
    return mapped(*split, *common)


def divide(mesh: Mesh | None, rows: jax.Array) -> jax.Array:
    """Rows [batch, ...] of a trial, divided over the devices that share them; within `over` or outside of it."""
    if mesh is None or sharing(mesh) == 1:
        return rows
    around: Any = jax.sharding.get_abstract_mesh()  # the mesh as `over` has left it, where we are within
    place = NamedSharding(around if around.axis_names else mesh, PartitionSpec("data"))
    return jax.lax.with_sharding_constraint(rows, place)


def total(tree: Any, axis: str | None) -> Any:
    """The sum of a tree over an axis of devices; the tree itself where there is none."""
    return tree if axis is None else jax.lax.psum(tree, axis)


def place(mesh: Mesh | None, tree: Any, split: bool = True) -> Any:
    """The tree on the devices of the mesh: split along its leading axis of trials, or whole on each."""
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, _TRIALS if split else PartitionSpec())
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda leaf: _spread(leaf, sharding), tree)


def _spread(leaf: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
    """What every process has the same of, over the devices of all: each cuts its own part, and nothing is sent."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    parts = sharding.addressable_devices_indices_map(leaf.shape).items()
    pieces = [jax.device_put(leaf[index], device) for device, index in parts]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, pieces)


def host(tree: Any) -> Any:
    """The tree in NumPy, whole in every process."""

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


def agreed(number: int) -> int:
    """The largest of what the processes say, in each of them: all are to call the same functions alike."""
    return number if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int64(number)).max())


def load(array: np.ndarray) -> jax.Array:
    """A memory-mapped array [n, ...], whole on this process's first device.

    Of many processes each reads its share of the rows from the file, and they exchange them once. They all need the
    whole: the next batch is any rows, and gathered from other machines it would be waited for in every step.
    """
    count = jax.process_count()
    if count == 1:
        return jax.device_put(np.asarray(array))
    rows = -(-len(array) // count)
    start = rows * jax.process_index()
    own = np.zeros((rows, *array.shape[1:]), array.dtype)
    own[: max(0, min(rows, len(array) - start))] = array[start : start + rows]
    return jax.device_put(multihost_utils.process_allgather(own, tiled=True)[: len(array)])


def of(tree: Any) -> Any:
    """The mesh over which `place` has split a tree, or None."""
    sharding = getattr(jax.tree.leaves(tree)[0], "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) and sharding.spec == _TRIALS else None
