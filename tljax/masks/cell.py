"""Cells: the leaves of one stage and one kind, and masks that switch cells whole, as values.

A mask's bools are compiled, so fits under other masks are other programs. An array of one number that broadcasts to
its leaf is passed as a value: fits whose masks switch the same leaves so share one program.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from tljax import paths
from tljax.masks.build import leaf_name
from tljax.masks.leaf import chosen
from tljax.types import InputError, Mask, Params

_SCALES = ("scale", "weight", "gamma")


class Cell(NamedTuple):
    """The leaves of a stage that are of one kind."""

    stage: str
    kind: str
    paths: tuple[str, ...]
    size: int
    """How many numbers they hold."""

    @property
    def name(self) -> str:
        """What tables call it: 'hidden_0 kernel'."""
        return f"{self.stage} {self.kind}"


def kind(path: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What kind of leaf a path is of, by names and `shapes` ({path: shape} of all leaves).

    'norm' is a scale, and what stands beside it where nothing there has two axes; 'bias' a leaf of that name elsewhere;
    'attention' any other leaf under a name that says attention; else it is the leaf's own name, such as 'kernel'.

    >>> shapes = {"norm/scale": (3,), "norm/bias": (3,), "mlp/kernel": (3, 3), "mlp/bias": (3,)}
    >>> [kind(path, shapes) for path in shapes]
    ['norm', 'norm', 'kernel', 'bias']
    """
    place = path.removesuffix("/value").rpartition("/")[0]
    beside = [other for other in shapes if other.removesuffix("/value").rpartition("/")[0] == place]
    if all(len(shapes[other]) < 2 for other in beside) and any(leaf_name(other) in _SCALES for other in beside):
        return "norm"
    if leaf_name(path) == "bias":
        return "bias"
    return "attention" if any("attention" in part for part in place.split("/")) else leaf_name(path)


def cells(
    params: Params,
    stages: Sequence[str],
    *,
    without: Mask | None = None,
    kinds: Mapping[str, Sequence[str]] | None = None,
) -> tuple[Cell, ...]:
    """The cells of the stages (path prefixes), in their order, of the leaves that can train.

    `without`, a mask of bools, names leaves that are in none; a scalar is in none either, since a mask has no array for
    it. `kinds` has {kind: its globs}, of which the first that
    matches a leaf counts; leaves that none matches are in no cell. Without it kinds are those of `kind`. Raises
    InputError for a stage that holds no leaf, a glob that matches none, and where there is no cell.

    >>> params = {"a": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, "head": {"kernel": jnp.ones((2, 2))}}
    >>> [(cell.name, cell.size) for cell in cells(params, ["a"])]
    [('a bias', 2), ('a kernel', 6)]
    """
    paths.require_prefixes(params, tuple(stages))
    able = dict(zip(paths.names(params), paths.trainable(params), strict=True))
    shapes = {path: jnp.shape(leaf) for path, leaf in paths.items(params)}
    passed = {path for path, m in paths.items(without) if m} if without is not None else set()
    globs: dict[str, list[Any]] = {}
    for name, patterns in (kinds or {}).items():
        paths.require_globs(params, tuple(patterns))
        globs[name] = [paths.glob(form) for pattern in patterns for form in paths.forms(pattern)]
    members: dict[tuple[str, str], list[str]] = {}
    for stage in stages:
        inside = paths.inside((stage,))
        for path in (
            path for path, can in able.items() if can and inside(path) and path not in passed and shapes[path]
        ):
            matching = [name for name, tests in globs.items() if any(test(path) for test in tests)]
            names = matching[:1] if globs else [kind(path, shapes)]
            for name in names:
                members.setdefault((stage, name), []).append(path)
    if not members:
        raise InputError("cells: no leaf of these stages can train and is of a kind: name other stages or kinds")
    return tuple(
        Cell(stage, name, tuple(leaves), sum(int(np.prod(shapes[path])) for path in leaves))
        for (stage, name), leaves in members.items()
    )


def switched(params: Params, cells: Sequence[Cell], on: Sequence[bool], always: Sequence[str] = ()) -> Mask:
    """The mask under which the cells that are `on` train, and the leaves at the paths `always`; all else is frozen.

    A leaf of a cell is a bool array of one number, [1, ..], whatever it is, so all such masks of the cells compile to
    one program. What is off sees gradients of 0, as any frozen element of an array does, and keeps its bytes; it has
    its place in the optimizer's state, and its stage counts as one that trains.

    >>> params = {"a": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, "head": jnp.ones(2)}
    >>> switched(params, cells(params, ["a"]), [False, True], always=["head"])
    {'a': {'bias': array([False]), 'kernel': array([[ True]])}, 'head': True}
    """
    switches = {path: bool(is_on) for cell, is_on in zip(cells, on, strict=True) for path in cell.paths}

    def leaf(path: str, value: Any) -> Any:
        if path not in switches:
            return path in always
        return np.full((1,) * jnp.ndim(value), switches[path])

    return paths.each(leaf, params)


def cells_of(cells: Sequence[Cell], mask: Mask, always: Sequence[str] = ()) -> tuple[bool, ...] | None:
    """Which cells a mask trains; None if it trains a part of one, some elements of a leaf, or a leaf that is in none
    and not at one of the paths `always`. A rate counts as trained.

    >>> params = {"a": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    >>> cells_of(cells(params, ["a"]), {"a": {"kernel": 0.5, "bias": False}})
    (False, True)
    """
    switches: dict[str, bool] = {}
    for path, leaf in paths.items(mask):
        on = np.asarray(chosen(leaf))
        if on.any() != on.all():
            return None
        switches[path] = bool(on.all())
    in_cells = {path for cell in cells for path in cell.paths}
    if not in_cells <= switches.keys() or any(on for path, on in switches.items() if path not in {*in_cells, *always}):
        return None
    cell_switches = [{switches[path] for path in cell.paths} for cell in cells]
    return None if any(len(each) > 1 for each in cell_switches) else tuple(True in each for each in cell_switches)
