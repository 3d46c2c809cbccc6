"""A plan of what a loader restores, held against what came: each leaf that was to come, bit by bit.

A load that finds nothing to load is no error of most loaders, and its loss is that of a network without a source. Here
each leaf has the numbers of the leaf that it was to come from, or is refuted by its path.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from tljax import graft, paths, plugins
from tljax.audit.checkpoints import Leaves, cast, change, leaves_of, parameters
from tljax.audit.report import Finding, Report
from tljax.types import InputError, Params

Plan = Mapping[str, Any] | Sequence[str] | graft.Plan | None
"""Which leaf comes from where. {path: the path that it comes from, (path, dtype) if it is cast on the way, None if it
is kept}, where what is not named is kept; globs of what comes by the same path; a `graft.plan`; None if all does."""


def restore(
    before: Params | str | Path,
    after: Params,
    plan: Plan = None,
    *,
    dtype: Any = None,
    fresh: Params | None = None,
) -> Report:
    """Whether each leaf that a plan restores has come: a finding "restored" of it, proved or refuted.

    `before` are the weights, a tree or a place as `checkpoints.opened` takes it; `after` is what the loader gave, a
    tree of parameters or a TrainState. All that comes is cast to `dtype` where the plan names no other. `fresh` is the
    tree before the load: what still has its value there is said to have it, and what the plan keeps must have it
    ("frozen").

    Raises InputError for a plan that names a leaf which is in neither tree, and for a glob that matches nothing.

    >>> weights = {"body": np.arange(3.0), "head": np.arange(2.0)}
    >>> print(restore(weights, weights | {"body": np.zeros(3)}, ["body"], fresh={"body": np.zeros(3)}).table())
    restore: 0 proved, 1 refuted, 0 not decided
    refuted  restored  body  has its fresh value, and not that of 'body': nothing was loaded into it
    note: kept, as the plan has it: 'head'
    note: of the weights 'head' was not used
    """
    source, leaves, start = _sides(before, after, fresh)
    sources = _sources(plan, source, leaves, dtype)
    findings = [_came(path, leaves[path], place, source, start) for path, place in sources.items() if place is not None]
    kept = [path for path, place in sources.items() if place is None]
    findings += [_left_out(path, leaves[path], start) for path in kept if path in start]
    used = {place[0] for place in sources.values() if place is not None}
    notes = [f"kept, as the plan has it: {paths.some(kept)}"] if kept else []
    unused = [path for path in source if path not in used]
    notes += [f"of the weights {paths.some(unused)} {'was' if len(unused) == 1 else 'were'} not used"] if unused else []
    return Report("restore", tuple(findings), tuple(notes))


def _sides(before: Any, after: Any, fresh: Any) -> tuple[Leaves, Mapping[str, Any], Mapping[str, Any]]:
    """The leaves of the weights, of what the loader gave, as they are, and of what was there before."""
    loaded = dict(paths.items(after))
    if not loaded:
        raise InputError("what the loader gave has no leaf: give the tree of the parameters, or the state with them")
    start = {} if fresh is None else dict(paths.items(fresh))
    source, leaves, *rest = parameters(leaves_of(before), loaded, *([start] if start else []))
    return source, dict(leaves.items()), dict(rest[0].items()) if rest else {}


def _sources(
    plan: Plan, source: Leaves, leaves: Mapping[str, Any], dtype: Any
) -> dict[str, tuple[str, np.dtype | None] | None]:
    """{path of a leaf: (path that it comes from, dtype after a cast or None), or None if it is kept}."""
    everywhere = None if dtype is None else _dtype(dtype)
    if plan is None:
        return {path: (path, everywhere) for path in leaves}
    if not isinstance(plan, Mapping):
        if all(isinstance(row, graft.Row) for row in plan):
            rows: Any = plan
            by_path: Mapping[str, Any] = {row.target: row.source for row in rows if row.target is not None}
        else:
            by_path = {path: path for path in _matched(plan, leaves)}
    else:
        by_path = plan
    result: dict[str, tuple[str, np.dtype | None] | None] = {path: None for path in leaves}
    for path, place in by_path.items():
        origin, kind = place if isinstance(place, tuple) and len(place) == 2 else (place, everywhere)
        if path not in leaves:
            raise InputError(f"the plan names '{path}', which the loaded tree has not{plugins.nearest(path, leaves)}")
        if origin is None:
            continue
        if not isinstance(origin, str):
            raise InputError(
                f"the plan's '{path}' is {plugins.shown(place)}: give the path it comes from, (path, dtype) or None"
            )
        if origin not in source:
            near = plugins.nearest(origin, source)
            raise InputError(f"the plan restores '{path}' from '{origin}', which the weights have not{near}")
        result[path] = (origin, None if kind is None else _dtype(kind))
    return result


def _matched(globs: Any, leaves: Mapping[str, Any]) -> Iterator[str]:
    patterns = (globs,) if isinstance(globs, str) else tuple(globs)
    if odd := [pattern for pattern in patterns if not isinstance(pattern, str)]:
        raise InputError(f"the plan has {plugins.shown(odd[0])}: give globs, a mapping of paths, or a graft.plan")
    paths.require_globs(dict(leaves), patterns)
    tests = [paths.glob(pattern) for pattern in patterns]
    return (path for path in leaves if any(test(path) for test in tests))


def _dtype(kind: Any) -> np.dtype:
    try:
        return np.dtype(getattr(ml_dtypes, kind, kind) if isinstance(kind, str) else kind)
    except TypeError as error:
        raise InputError(f"the plan casts to {plugins.shown(kind)}, which is no dtype: write 'bfloat16'") from error


def _came(
    path: str, leaf: Any, place: tuple[str, np.dtype | None], source: Leaves, start: Mapping[str, Any]
) -> Finding:
    """Whether a leaf that was to come has the numbers of the leaf that it was to come from."""
    origin, kind = place

    def finding(verdict: Any, detail: str, grade: Any = None) -> Finding:
        return Finding(path, "restored", verdict, detail, grade=grade)

    if not isinstance(leaf, np.ndarray | np.generic | jax.Array | int | float | complex):
        return finding("refuted", f"is a {type(leaf).__name__}, and no array: nothing was loaded into it")
    if origin not in source:
        return finding("refuted", f"the weights have no '{origin}': it was not loaded{_fresh(path, leaf, start)}")
    now, wanted = np.asarray(leaf), source[origin]
    if now.shape != wanted.shape:
        return finding("refuted", f"has shape {now.shape}, and '{origin}' has {wanted.shape}")
    weights_dtype = wanted.dtype
    if kind is not None:
        with np.errstate(all="ignore"):
            wanted = wanted.astype(kind)
    how = f"'{origin}'" + (f" as {kind}" if kind is not None and kind != weights_dtype else "")
    if now.dtype != wanted.dtype:
        relation = {"lossless": ", with the same numbers", "rounded": ", with its numbers rounded"}
        text = f"is {now.dtype}, and {how} is {wanted.dtype}: the plan names no such cast"
        return finding("refuted", text + relation.get(cast(wanted, now), ", and with other numbers"))
    moves = change(wanted, now)
    if not moves.moved:
        return finding("proved", f"has the numbers of {how}", "identical" if moves.identical else "equal")
    if _fresh(path, leaf, start):
        return finding("refuted", f"has its fresh value, and not that of {how}: nothing was loaded into it")
    text = f"{moves.moved:,} of {moves.size:,} numbers are not those of {how}, by at most {moves.largest:.3g}"
    return finding("refuted", text)


def _fresh(path: str, leaf: Any, start: Mapping[str, Any]) -> str:
    """The words for a leaf that has the value that it had before the load; "" if it has another, or none is known."""
    if path not in start:
        return ""
    was, now = np.asarray(start[path]), np.asarray(leaf)
    is_same = was.shape == now.shape and was.dtype == now.dtype and change(was, now).identical
    return ", and has its fresh value" if is_same else ""


def _left_out(path: str, leaf: Any, start: Mapping[str, Any]) -> Finding:
    """Whether a leaf that the plan keeps has the value that it had before the load."""
    if _fresh(path, leaf, start):
        return Finding(path, "frozen", "proved", "has its fresh value, as the plan has it", grade="identical")
    return Finding(path, "frozen", "refuted", "was to be kept, and has another value than before")
