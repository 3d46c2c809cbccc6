"""Build masks by path, glob, prefix, size or score. A rule that matches nothing is an error."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax import paths
from tljax.masks.combine import intersect, invert, require_bools
from tljax.masks.leaf import plain
from tljax.types import InputError, Mask, Params


def by_path(params: Params, predicate: Callable[[str], bool]) -> Mask:
    """Train the leaves for whose path `predicate` is true. Raises InputError if it is true for none.

    >>> by_path({"head": {"kernel": 1.0, "bias": 0.0}}, lambda path: path.endswith("bias"))
    {'head': {'bias': True, 'kernel': False}}
    """
    leaf_paths = paths.names(params)
    flags = [able and bool(predicate(path)) for path, able in zip(leaf_paths, paths.trainable(params), strict=True)]
    mask = jax.tree.unflatten(jax.tree.structure(params), flags)
    if not any(flags):
        name = getattr(predicate, "__name__", "predicate")
        raise InputError(f"by_path: {name} is true for no leaf that can train; leaves: {paths.some(leaf_paths)}")
    return mask


def by_glob(params: Params, *patterns: str) -> Mask:
    """Train the leaves that match any pattern: `*` within one name, `**` across names, `{a,b}` for either.

    The `value` at the end of a boxed leaf's path (a variable of NNX) may be written or left out. Raises InputError for
    a pattern that matches nothing.

    >>> by_glob({"a": {"kernel": 1.0}, "b": {"bias": 0.0}}, "**/bias")
    {'a': {'kernel': False}, 'b': {'bias': True}}
    """
    paths.require_globs(params, patterns)
    tests = [paths.glob(form) for pattern in patterns for form in paths.forms(pattern)]
    short = dict(zip(paths.names(params), paths.unboxed_names(params), strict=True))
    return by_path(params, lambda path: any(test(path) or test(short[path]) for test in tests))


def under(params: Params, prefixes: str | Iterable[str]) -> Mask:
    """Train the leaves under any of the path prefixes. Raises InputError for a prefix that holds none.

    >>> under({"hidden_0": {"bias": 0.0}, "head": {"bias": 0.0}}, ["head"])
    {'head': {'bias': True}, 'hidden_0': {'bias': False}}
    """
    prefixes = (prefixes,) if isinstance(prefixes, str) else tuple(prefixes)
    paths.require_prefixes(params, prefixes)
    if not prefixes:
        raise InputError(f"under: no prefix given, so nothing would train; leaves: {paths.some(paths.names(params))}")
    return by_path(params, paths.inside(prefixes))


def layers(params: Params, prefix: str, which: slice | int | Sequence[int]) -> Mask:
    """Train the layers `which` of a stack: the leaves under `prefix`, whose first axis counts the layers.

    `flax.linen.scan` and `nnx.vmap` stack equal layers so. A leaf under the prefix becomes a bool array [layers, 1,
    ..], or True where `which` is all layers; the other leaves are False. Combine such masks with `union`, and give
    rates with `scale`. Raises InputError for a prefix that holds no leaf that can train, leaves without one first axis,
    and a choice that is empty or out of range.

    >>> params = {"blocks": {"bias": np.ones((3, 2))}, "head": {"bias": np.ones(2)}}
    >>> layers(params, "blocks", slice(-1, None))
    {'blocks': {'bias': array([[False],
           [False],
           [ True]])}, 'head': {'bias': False}}
    """
    inside = under(params, prefix)
    shapes = {path: jnp.shape(leaf) for path, leaf, able in paths.items(params, inside) if able}
    counts = {shape[0] if shape else 0 for shape in shapes.values()}
    if len(counts) > 1 or 0 in counts:
        first = ", ".join(f"'{path}' {shape}" for path, shape in list(shapes.items())[:6])
        raise InputError(f"layers: the leaves under '{prefix}' have no first axis of one length: {first}")
    [count] = counts
    on = np.zeros(count, bool)
    index: Any = plain(which)  # a whole number of NumPy or JAX too
    try:
        on[index if isinstance(index, int | np.integer | np.bool_ | slice) else list(index)] = True
    except (IndexError, TypeError, ValueError) as error:
        raise InputError(f"layers: '{prefix}' has the layers 0 to {count - 1}, not {which!r}") from error
    if not on.any():
        raise InputError(f"layers: {which!r} is none of the {count} layers of '{prefix}': choose at least one")

    def chosen(leaf: Any, able: bool) -> Any:
        return (bool(on.all()) or on.reshape(count, *[1] * (jnp.ndim(leaf) - 1))) if able else False

    return jax.tree.map(chosen, params, inside)


def kept(params: Params, fresh: Mask | None) -> Mask:
    """Train every leaf that can train, but those that `fresh`, a mask of bools, trains; None stands for no leaf.

    >>> kept({"body": 1.0, "head": 1.0, "step": 1}, {"body": False, "head": True, "step": False})
    {'body': True, 'head': False, 'step': False}
    """
    whole = by_path(params, lambda path: True)
    return whole if fresh is None else intersect(whole, invert(fresh))


def leaf_name(path: str) -> str:
    """The last name of a path, without the 'value' that NNX puts behind it.

    >>> leaf_name("head/bias"), leaf_name("head/bias/value"), leaf_name("value")
    ('bias', 'bias', 'value')
    """
    return path.removesuffix("/value").rpartition("/")[2]


def by_size(params: Params, *, at_least: int = 0, at_most: int | None = None) -> Mask:
    """Train the leaves that hold `at_least` to `at_most` numbers, both included. Raises InputError if none does.

    >>> by_size({"kernel": np.ones((2, 3)), "bias": np.ones(3)}, at_most=3)
    {'bias': True, 'kernel': False}
    """
    most = math.inf if at_most is None else at_most
    sizes = {path: math.prod(jnp.shape(leaf)) for path, leaf in paths.items(params)}
    try:
        return by_path(params, lambda path: at_least <= sizes[path] <= most)
    except InputError as error:
        raise InputError(
            f"by_size: no leaf that can train holds {at_least} to {most} numbers; leaves hold {list(sizes.values())}"
        ) from error


def top(
    scores: Any,
    fraction: float = 0.0,
    *,
    among: Mask | None = None,
    per: str = "tree",
    count: int = 0,
    smallest: bool = False,
    stages: Sequence[str] = (),
    inputs: Mapping[str, int] | None = None,
) -> Mask:
    """Select the `fraction` of all elements that score highest: bool arrays, exactly round(fraction * elements).

    `per` says of which elements the fraction is: of all leaves together ('tree'), of the leaves of each stage together
    ('stage'), of each leaf ('leaf'), or of the inputs of each output unit of a kernel ('unit'). At least one of each is
    selected; with `count` it is so many, and all where there are fewer. `smallest` selects those that score lowest.
    Ties go to the first leaf and element, so that the number is exact.

    The elements are those that can train. With `among`, a mask of bools, they are of the leaves that this trains; then
    the result has its tree, and `scores` may have None in places. A leaf of which nothing is selected is False, and a
    scalar a bool. `stages` are path prefixes; without them a stage is the first name of a path. `inputs` has {path of a
    kernel: how many of its first axes are inputs}; else all axes but the last are.

    Raises InputError for a fraction outside (0, 1], a count below 1, both of them or neither, another `per`, a score of
    NaN, scores where `among` has no leaf, a leaf of no stage, a leaf without units, and no elements at all.

    >>> top({"a": np.array([3.0, 1.0]), "b": np.array([2.0, 0.5]), "c": np.array([0.1])}, 0.4)
    {'a': array([ True, False]), 'b': array([ True, False]), 'c': False}
    >>> top({"kernel": np.array([[1.0, 5.0], [2.0, 4.0]])}, per="unit", count=1)
    {'kernel': array([[False,  True],
           [ True, False]])}
    """
    if count < 0 or (count and fraction):
        raise InputError(f"top: count={count}, fraction={fraction}: give a fraction, or a count of at least 1")
    if not count and not 0 < fraction <= 1:
        raise InputError(f"top: fraction={fraction}: it must be above 0 and at most 1")
    tree = scores if among is None else among
    leaf_paths = paths.names(tree)
    eligible = _eligible(scores, among, leaf_paths)
    if not sum(score.size for score in eligible.values()):
        raise InputError(f"top: there are no elements to choose among; leaves: {paths.some(leaf_paths)}")
    if smallest:
        eligible = {path: -score for path, score in eligible.items()}
    if per == "unit":
        picked = {path: _top_units(path, score, inputs or {}, fraction, count) for path, score in eligible.items()}
        return jax.tree.unflatten(jax.tree.structure(tree), [picked.get(path, False) for path in leaf_paths])
    picked = {}
    for names in _together(list(eligible), per, tuple(stages)):
        sizes = [eligible[path].size for path in names]
        flat = np.concatenate([eligible[path].ravel() for path in names])
        pieces = np.split(_largest(flat, fraction, count), np.cumsum(sizes)[:-1])
        picked |= {path: _shaped(piece, eligible[path].shape) for path, piece in zip(names, pieces, strict=True)}
    return jax.tree.unflatten(jax.tree.structure(tree), [picked.get(path, False) for path in leaf_paths])


def _together(leaf_paths: list[str], per: str, stages: tuple[str, ...]) -> list[list[str]]:
    """The paths whose elements are ranked together. Raises InputError for a path of no stage, and another `per`.

    >>> _together(["a/kernel", "a/bias", "b/kernel"], "stage", ())
    [['a/kernel', 'a/bias'], ['b/kernel']]
    """
    if per == "tree":
        return [leaf_paths]
    if per == "leaf":
        return [[path] for path in leaf_paths]
    if per != "stage":
        raise InputError(f"top: per={per}: it is one of {', '.join(PER)}")
    groups: dict[str, list[str]] = {}
    for path in leaf_paths:
        names = [name for name in stages if paths.inside((name,))(path)] if stages else [path.split("/")[0]]
        if not names:
            raise InputError(
                f"top: '{path}' is in none of the stages {paths.some(list(stages))}: leave it out of `among`"
            )
        groups.setdefault(names[0], []).append(path)
    return list(groups.values())


PER = ("tree", "stage", "leaf", "unit")
"""Of which elements a share is, in `top`."""


def _top_units(path: str, score: np.ndarray, inputs: Mapping[str, int], fraction: float, count: int) -> Any:
    """The inputs that each output unit of a kernel ranks first, as the leaf of a mask."""
    axes = inputs.get(path, score.ndim - 1)
    if not 0 < axes < score.ndim:
        raise InputError(
            f"top: '{path}' {score.shape} has no output units: per=unit is for kernels [*inputs, *outputs]: leave it "
            "out of `among`"
        )
    flat = score.reshape(math.prod(score.shape[:axes]), -1)
    if not flat.size:
        return False
    most = min(count, len(flat)) if count else max(1, round(fraction * len(flat)))
    chosen = np.zeros(flat.shape, bool)
    np.put_along_axis(chosen, np.argsort(-flat, axis=0, kind="stable")[:most], True, axis=0)
    return _shaped(chosen, score.shape)


def _eligible(scores: Any, among: Mask | None, leaf_paths: list[str]) -> dict[str, np.ndarray]:
    """{path: float64 scores} of the leaves to choose among, in the order of the mask.

    Raises InputError for a score of NaN, and for scores where `among` has no leaf.
    """
    candidates = dict(paths.items(scores))
    able = dict(zip(candidates, paths.trainable(scores), strict=True))
    if among is not None:
        require_bools("top: among", among)
        if extra := sorted(set(candidates) - set(leaf_paths)):
            raise InputError(f"top: the scores have {paths.some(extra)}, and `among` has not: give both of one tree")
        candidates = {path: candidates[path] for path, may in paths.items(among) if may and path in candidates}
    eligible = {}
    for path, score in candidates.items():
        if able[path]:
            eligible[path] = np.asarray(score).astype(np.float64)
            if np.isnan(eligible[path]).any():
                raise InputError(f"top: the score at '{path}' is NaN: it has no rank")
    return eligible


def _largest(flat: np.ndarray, fraction: float, count: int = 0) -> np.ndarray:
    """bool [n], True where the largest of n values are, a fraction or a count of them; ties go to the first."""
    if not flat.size:
        return np.zeros(0, bool)
    count = min(count, flat.size) if count else max(1, round(fraction * flat.size))
    least = np.partition(flat, -count)[-count]
    chosen = flat > least
    chosen[np.flatnonzero(flat == least)[: count - chosen.sum()]] = True
    return chosen


def _shaped(piece: np.ndarray, shape: tuple[int, ...]) -> Any:
    """The selected elements of a leaf as the leaf of a mask: a bool array, False if none is, a bool for a scalar."""
    # All selected stays an array, so that a mask's kinds, which decide what is compiled, depend less on the scores.
    return piece.reshape(shape) if shape and piece.any() else bool(piece.any())
