"""Trials over devices: how many go where, and a function of trials run on all of them at once."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

_TRIALS = PartitionSpec("trials")


def mesh(devices: Sequence[Any]) -> Mesh | None:
    """A mesh of one axis, of trials, over these devices; None for one device, which needs none."""
    if len(devices) < 2:
        return None
    return jax.make_mesh((len(devices),), ("trials",), axis_types=(AxisType.Auto,), devices=tuple(devices))


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
    # Nothing is summed over devices in it, so there is nothing that the check of varying values could find.
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=_TRIALS, check_vma=False)
    return mapped(*split, *common)


def place(mesh: Mesh | None, tree: Any, split: bool = True) -> Any:
    """The tree on the devices of the mesh: split along its leading axis of trials, or whole on each."""
    if mesh is None:
        return tree
    return jax.device_put(tree, NamedSharding(mesh, _TRIALS if split else PartitionSpec()))


def of(tree: Any) -> Any:
    """The mesh over which `place` has split a tree, or None."""
    sharding = getattr(jax.tree.leaves(tree)[0], "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) and sharding.spec == _TRIALS else None
