"""Two checkpoints and a claimed mask: which leaves moved, how many elements, by how much, and in which dtype.

A leaf is held against the leaf of the same path, bits against bits, one leaf at a time: files are mapped, and of a
folder of Orbax each leaf is restored by itself. What lacks its like is sought by its bytes under another name. Nothing
is converted before it is compared; a leaf of another dtype is held against the other by casts in both directions.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tljax import checkpoint, masks, paths, plugins, weights
from tljax.audit import layers
from tljax.audit.report import Claim, Finding, Grade, Report, Verdict
from tljax.masks.leaf import canonical_leaf
from tljax.types import InputError, Mask, Params

Leaves = Mapping[str, np.ndarray]
"""{path: array}; an array may be read when it is asked for."""


# ---- Where the leaves are


def opened(place: str | Path, fit: str | None = None) -> Leaves:
    """{path: array} of a checkpoint: .safetensors, .npz, their shards, a folder of Orbax, or a checkpoint of tljax.

    Of a checkpoint of tljax that holds several fits, `fit` is the name of one. Of a folder of Orbax it is the step's
    folder, or an item's in it. Raises InputError for what is none, and where it is not clear which is meant.
    """
    if weights.is_place(place):
        if fit:
            raise InputError(f"'{place}' holds one set of arrays, and no fit '{fit}': leave the name out")
        return weights.read(place)
    folder = Path(place)
    if not folder.exists():
        raise InputError(f"checkpoint '{place}' does not exist: give the path of a file or folder of parameters")
    if not folder.is_dir():
        raise InputError(
            f"'{place}' is no {', '.join(weights.SUFFIXES)} file and no folder of Orbax: convert it with "
            "experiments.convert"
        )
    if (folder / "meta" / "metadata").is_file():
        return _tljax_leaves(folder, fit)
    if fit:
        raise InputError(f"'{place}' is no checkpoint of tljax, and holds no fit '{fit}': leave the name out")
    return _Restored(_item(folder))


def _tljax_leaves(folder: Path, fit: str | None) -> Leaves:
    """The leaves of a fit in a checkpoint of tljax, each against its digest."""
    fits, _ = checkpoint.load(folder)
    if fit is None and len(fits) > 1:
        raise InputError(f"checkpoint '{folder}' holds {len(fits)} fits, {paths.some(sorted(fits))}: name one")
    name = fit or next(iter(fits))
    if name not in fits:
        raise InputError(f"checkpoint '{folder}' holds no fit '{name}'{plugins.nearest(name, fits)}")
    return fits[name]


_TREE = "_METADATA"
"""The file that a folder of Orbax has where its arrays are."""


def _item(folder: Path) -> Path:
    """The folder of Orbax with the arrays: the given one, or the only one within. Raises InputError otherwise."""
    if (folder / _TREE).is_file():
        return folder
    items = [item for item in sorted(folder.iterdir()) if (item / _TREE).is_file()]
    if len(items) == 1:
        return items[0]
    if items:
        raise InputError(f"'{folder}' holds {paths.some([item.name for item in items])}: name one, as '{items[0]}'")
    steps = [
        step
        for step in folder.iterdir()
        if step.is_dir() and any((item / _TREE).is_file() for item in (step, *step.iterdir()))
    ]
    if steps:
        names = sorted((step.name for step in steps), key=lambda name: (len(name), name))
        raise InputError(f"'{folder}' holds the steps {paths.some(names)}: name one, as '{folder / names[-1]}'")
    raise InputError(f"'{folder}' holds no checkpoint: give a file of weights, a step's folder of Orbax, or tljax's")


class _Restored(Mapping[str, np.ndarray]):
    """{path: array} of a folder of Orbax, each restored anew when it is asked for.

    Raises InputError where the folder's description of itself cannot be read, and for an array that is damaged.
    """

    def __init__(self, folder: Path) -> None:
        import orbax.checkpoint as ocp

        self._folder, self._orbax = folder.absolute(), ocp
        try:
            tree = ocp.PyTreeCheckpointHandler().metadata(self._folder).tree
            leaves, structure = jax.tree.flatten(tree, is_leaf=_is_described)
            keys, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_described)
            names = [jax.tree_util.keystr(key, simple=True, separator="/") for key, _ in keys]
        except Exception as error:  # the errors of Orbax and its dependencies have no type in common
            raise InputError(f"checkpoint '{folder}' is damaged ({plugins.describe(error)}): copy it again") from error
        self._leaves = leaves
        self._structure: Any = structure
        self._places = {name: place for place, name in enumerate(names) if _is_described(leaves[place])}

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def described(self, name: str) -> Any:
        """The shape and dtype of a leaf, as the folder says them."""
        return self._leaves[self._places[name]]

    def __getitem__(self, name: str) -> np.ndarray:
        ocp, at = self._orbax, self._places[name]
        item = [leaf if place == at else ocp.PLACEHOLDER for place, leaf in enumerate(self._leaves)]
        kinds = [ocp.RestoreArgs(restore_type=np.ndarray if place == at else None) for place in range(len(item))]
        arguments = ocp.args.PyTreeRestore(
            item=jax.tree.unflatten(self._structure, item), restore_args=jax.tree.unflatten(self._structure, kinds)
        )
        try:
            restored = ocp.PyTreeCheckpointHandler().restore(self._folder, args=arguments)
            return np.asarray(self._structure.flatten_up_to(restored)[at])
        except Exception as error:
            reason = plugins.words(error)[:200]
            raise InputError(
                f"checkpoint '{self._folder}': leaf '{name}' cannot be restored ({reason}): copy it again"
            ) from error


def _is_described(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape")


def leaves_of(tree: Params | str | Path) -> Leaves:
    """The leaves of a place, of a mapping that reads them when they are asked for, or of a tree of arrays.

    Raises InputError for what is none of the three.

    >>> leaves_of({"head": {"bias": [0.0]}})
    {'head/bias/0': array(0.)}
    """
    if isinstance(tree, str | Path):
        return opened(tree)
    if isinstance(tree, Mapping) and jax.tree_util.all_leaves([tree]):
        return tree
    try:
        return checkpoint.flatten(tree)
    except TypeError as error:  # of a leaf that is text, or an object
        raise InputError(f"a checkpoint has a leaf that is no number ({plugins.words(error)}): leave it out") from error


# ---- What became of a leaf


class Change(NamedTuple):
    """How two arrays of one shape differ, number by number; norms and differences are of float64."""

    size: int
    moved: int
    """Numbers of another value; the sign of a zero and a NaN's payload are no value."""
    signs: int
    """Zeros of another sign."""
    payloads: int
    """NaN that are NaN in other bits."""
    new_nan: int
    """Numbers that have become NaN."""
    largest: float
    """The largest difference of numbers that are finite in both."""
    norm: float
    """The length of what was, over those numbers; NaN where nothing differs, as it is of no use there."""
    distance: float
    """The length of the difference, over those numbers."""
    factor: float
    """Of the multiple of what was that is nearest to what is; NaN where all was 0."""
    aside: float
    """The distance from that multiple: 0 if all was scaled by one factor."""

    @property
    def identical(self) -> bool:
        """Whether all bits are the same."""
        return not self.moved + self.signs + self.payloads


_CHUNK = 1 << 22
"""Numbers that are compared at a time."""


def change(before: np.ndarray, after: np.ndarray) -> Change:
    """How two arrays of one shape and dtype differ; of two dtypes, how their values do.

    >>> change(np.array([1.0, 0.0, 2.0]), np.array([1.0, -0.0, 2.5]))[:4]
    (3, 1, 1, 0)
    """
    if before.dtype == after.dtype and all((_bits(was) == _bits(now)).all() for was, now in _chunks(before, after)):
        return Change(before.size, 0, 0, 0, 0, 0.0, math.nan, 0.0, 1.0, 0.0)
    moved = signs = payloads = new_nan = 0
    largest = squared = norm = dot = 0.0
    for was, now in _chunks(before, after):
        bits = _bits(was) != _bits(now) if was.dtype == now.dtype else np.ones(was.shape, bool)
        with np.errstate(all="ignore"):
            x, y = _widened(was), _widened(now)
            equal, nan, later_nan = x == y, np.isnan(x), np.isnan(y)
            if was.dtype == now.dtype:  # in 64 bits two whole numbers may be one float
                equal &= ~bits | (x == 0)
            moved += int((~equal & ~(nan & later_nan)).sum())
            signs += (
                int((equal & bits & (np.signbit(x.real) != np.signbit(y.real))).sum()) if x.dtype.kind == "f" else 0
            )
            payloads += int((nan & later_nan & bits).sum())
            new_nan += int((later_nan & ~nan).sum())
            finite = np.isfinite(x) & np.isfinite(y)
            x, y = x[finite], y[finite]
            difference = y - x
            if x.size:
                largest = max(largest, float(np.abs(difference).max()))
            squared += float(np.vdot(difference, difference).real)
            norm += float(np.vdot(x, x).real)
            dot += float(np.vdot(x, difference).real)
    length, distance = math.sqrt(norm), math.sqrt(squared)
    aside = math.sqrt(max(squared - dot * dot / norm, 0.0)) if norm else distance
    factor = 1 + dot / norm if norm else math.nan
    return Change(before.size, moved, signs, payloads, new_nan, largest, length, distance, factor, aside)


def _chunks(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Pieces of arrays of one shape, flat."""
    flat = [np.ascontiguousarray(array).reshape(-1) for array in arrays]
    for start in range(0, flat[0].size, _CHUNK):
        yield tuple(array[start : start + _CHUNK] for array in flat)


def _bits(flat: np.ndarray) -> np.ndarray:
    """The bits of each number of a flat array, as a whole number, or as two of a complex one."""
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}.get(flat.dtype.itemsize)
    if unsigned is not None:
        return flat.view(unsigned)
    return flat.view(np.dtype((np.void, flat.dtype.itemsize)))


def _widened(flat: np.ndarray) -> np.ndarray:
    return flat.astype(np.complex128 if flat.dtype.kind == "c" else np.float64)


def cast(before: np.ndarray, after: np.ndarray) -> str:
    """How an array of another dtype is related: "lossless" if both hold the same numbers, "rounded" if one is the other
    after the cast, "" if it is neither.

    >>> [cast(np.array([x]), np.array([x], np.float32)) for x in (0.5, 0.1)]
    ['lossless', 'rounded']
    """
    forth = back = True
    with np.errstate(all="ignore"):
        for was, now in _chunks(before, after):
            forth = forth and bool((_bits(was.astype(now.dtype)) == _bits(now)).all())
            back = back and bool((_bits(now.astype(was.dtype)) == _bits(was)).all())
    return "lossless" if forth and back else "rounded" if forth or back else ""


def _digest(array: np.ndarray) -> str:
    """SHA-256 of dtype, shape and bytes; "" of an array of one number, or that repeats one: many leaves are such."""
    total = hashlib.sha256(f"{array.dtype}{array.shape}".encode())
    repeats, first = True, None
    for (piece,) in _chunks(array):
        bits = _bits(piece)
        first = bits[:1].copy() if first is None else first
        repeats = repeats and bool((bits == first).all())
        total.update(piece.view(np.uint8).data)
    return "" if repeats else total.hexdigest()


# ---- What is claimed


def checkpoints(
    before: Params | str | Path, after: Params | str | Path, mask: Mask | str | Path | Sequence[str]
) -> Report:
    """What became of each leaf between two checkpoints, held against the mask that is said to have trained.

    `before` and `after` are places as `opened` takes them, what it gives, or trees of arrays. `mask` is a tree of the
    parameters, a file of one (masks/NAME.json of a run directory), or globs of what trains, "head/**+**/bias" or a
    list. Of a TrainState, with `params`, the optimizer, the counter and keys are left out.

    Claims are "frozen" of what the mask freezes: refuted if a number moved; and "trains" of the rest: refuted if none
    did. Where the mask selects elements of a leaf, both are made of it. Not decided is a leaf that is missing, new or
    of another shape, one that is equal after a cast that rounds, since a smaller move would not show, and a trained one
    that all moved by one factor, since weight decay alone would. Running statistics are claimed to be frozen where
    nothing beside them trains; of whole numbers, and of leaves that a tree does not name, nothing is claimed.

    Raises InputError for what is no checkpoint, a mask that does not fit, and where no leaf is in both.

    >>> before = {"body": np.arange(3.0), "head": np.arange(2.0)}
    >>> print(checkpoints(before, before | {"body": before["body"] * 0.5}, ["head"]).table())
    before to after: 0 proved, 2 refuted, 0 not decided
    refuted  frozen  body  changed: 2 of 3 numbers moved, by at most 1 (50 % of their length), float64; all by the \
factor 0.5, as weight decay does
    refuted  trains  head  2 numbers, float64: the same bytes
    """
    was, now = parameters(leaves_of(before), leaves_of(after))
    claimed, notes = _claimed(mask, was, now)
    audit = _Audit(was, now, claimed)
    if not audit.pairs:
        raise InputError(
            f"the checkpoints have no leaf in common: one has {paths.some(list(was), 3)}, the other "
            f"{paths.some(list(now), 3)}: give two of one model, with the same names"
        )
    findings = [finding for path, m in claimed.items() if m is not None for finding in audit.findings(path, m)]
    return Report(f"{_name(before, 'before')} to {_name(after, 'after')}", tuple(findings), (*notes, *audit.notes()))


def _name(tree: Any, name: str) -> str:
    return str(tree) if isinstance(tree, str | Path) else name


_OF_TRAINING = ("opt_state", "step", "optimizer", "rng", "rngs", "key")
"""Names at the top of a training state, beside its `params`, of what is no parameter and no statistic."""


def parameters(*trees: Leaves) -> tuple[Leaves, ...]:
    """The leaves of trees without the optimizer and the counter of a TrainState.

    Where one has `params` and another, which is then of parameters alone, has not, the leaves are those under it.
    """
    tops = [{path.partition("/")[0] for path in leaves} for leaves in trees]
    alone = any("params" not in names for names in tops)
    result: list[Leaves] = []
    for leaves, names in zip(trees, tops, strict=True):
        if "params" not in names:
            result.append(leaves)
        elif alone:
            result.append(_Some(leaves, {p.removeprefix("params/"): p for p in leaves if p.startswith("params/")}))
        else:
            result.append(_Some(leaves, {p: p for p in leaves if p.partition("/")[0] not in _OF_TRAINING}))
    return tuple(result)


class _Some(Mapping[str, np.ndarray]):
    """Some leaves of a mapping, {name: its path there}, read when they are asked for."""

    def __init__(self, leaves: Leaves, names: Mapping[str, str]) -> None:
        self._leaves, self._names = leaves, names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> np.ndarray:
        return self._leaves[self._names[name]]

    def described(self, name: str) -> Any:
        """The shape and dtype of a leaf, read if nothing else says them."""
        leaves, path = self._leaves, self._names[name]
        return leaves.described(path) if isinstance(leaves, _Restored) else leaves[path]


def _claimed(mask: Any, was: Leaves, now: Leaves) -> tuple[dict[str, Any], list[str]]:
    """({path: a canonical leaf of the mask, or None where nothing is claimed}, notes)."""
    like = {path: _described(leaves, path) for leaves in (was, now) for path in leaves}  # of a leaf in both, the later
    if isinstance(mask, Path) or (isinstance(mask, str) and mask.endswith(".json")):
        file = str(mask).removesuffix(".json")
        claimed = masks.load(file, {path: like[path] for path in now})
    elif isinstance(mask, str) or (isinstance(mask, list | tuple) and mask and all(isinstance(g, str) for g in mask)):
        patterns = mask.split("+") if isinstance(mask, str) else mask
        claimed = masks.by_glob(like, *patterns)
    else:
        claimed = _by_path(mask, like)
    claimed = {path: canonical_leaf(path, m) for path, m in claimed.items()}
    for path, m in claimed.items():
        masks.require_leaf(path, like[path], m)
    unnamed = [path for path in like if path not in claimed]
    able = dict(zip(like, paths.trainable(like), strict=True))
    trains = {path: masks.trains(m) for path, m in claimed.items() if able[path]}
    result = {path: m if able[path] else _statistic_trains(path, like[path], trains) for path, m in claimed.items()}
    return result, [f"the mask does not name {paths.some(unnamed)}: nothing is claimed of it"] if unnamed else []


def _described(leaves: Leaves, path: str) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a leaf. Raises InputError for one that is no number."""
    leaf: Any = leaves.described(path) if isinstance(leaves, _Restored | _Some) else leaves[path]
    if np.dtype(leaf.dtype).kind in "OUSMm":
        raise InputError(f"a leaf is of {leaf.dtype}, which is no number: leave it out of the checkpoint")
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _by_path(mask: Mask, like: Mapping[str, Any]) -> dict[str, Any]:
    """{path of a leaf: leaf of the mask}; a mask of the parameters alone may lack the `params` before their paths."""
    by_path = dict(paths.items(mask))
    under_params = {f"params/{path}": m for path, m in by_path.items()}
    by_path = under_params if under_params.keys() & like.keys() else by_path
    if odd := [path for path in by_path if path not in like]:
        raise InputError(f"the mask names '{odd[0]}', which no checkpoint has{plugins.nearest(odd[0], like)}")
    if not by_path:
        raise InputError("the mask is empty: give a tree of the parameters, or globs of what trains")
    return by_path


def _statistic_trains(path: str, leaf: Any, trains: Mapping[str, bool]) -> bool | None:
    """False, for frozen, of a running statistic beside which nothing trains; else None, of which nothing is claimed."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return None
    beside = [trains[other] for other in layers.beside(path, trains) or trains]
    return False if beside and not any(beside) else None


class _Audit:
    """The leaves of two checkpoints, each compared once."""

    def __init__(self, was: Leaves, now: Leaves, claimed: Mapping[str, Any]) -> None:
        self._was, self._now, self._claimed = was, now, claimed
        self.pairs = {path: path for path in was if path in now}
        self.missing = [path for path in was if path not in now]
        self.new = [path for path in now if path not in was]
        self._digests = {path: _digest(was[path]) for path in was}
        self._tied = _alike(self._digests)
        self.renamed = self._renames()
        self.pairs |= self.renamed
        self._moved: dict[str, bool] = {}
        """Of what was compared: whether a number moved."""

    def _renames(self) -> dict[str, str]:
        """{path before: path after} of leaves whose bytes are under one other name."""
        if not self.missing:
            return {}
        names = _alike({path: _digest(self._now[path]) for path in self.new})
        renames: dict[str, str] = {}
        for path in self.missing:
            others = names.get(self._digests[path], [])
            if len(others) == 1:
                renames[path] = others[0]
        return renames

    def findings(self, path: str, m: Any) -> Iterator[Finding]:
        """What was decided of a leaf: of the elements that the mask freezes, and of those that it trains."""
        named = next((old for old, new in self.renamed.items() if new == path), path)
        if named != path and self._claimed.get(named) is not None:
            return  # found under the name that it had
        other = self.pairs.get(named)
        if other is None:
            yield self._without(path, m)
            return
        before, after = self._was[named], self._now[other]
        name = f"; it was '{named}', and is '{other}'" if other != named else ""
        if before.shape != after.shape:
            text = f"has shape {after.shape}, and had {before.shape}: it is another leaf"
            claim: Claim = "trains" if masks.trains(m) else "frozen"
            yield Finding(path, claim, "not decided", text)
            return
        chosen = masks.chosen(m)
        parts: list[tuple[Any, bool]] = [(None, chosen)] if isinstance(chosen, bool) else []
        if not parts:
            elements = np.broadcast_to(chosen, before.shape)
            parts = [(elements, True), (~elements, False)]
        for where, is_trained in parts:
            x, y = (before, after) if where is None else (before[where], after[where])
            if not x.size and where is not None:
                continue
            verdict, grade, text = _decided(x, y, is_trained)
            self._moved[named] = self._moved.get(named, False) or grade == "changed"
            claim = "trains" if is_trained else "frozen"
            yield Finding(path, claim, verdict, text + name, grade=None if is_trained else grade)

    def _without(self, path: str, m: Any) -> Finding:
        """What is said of a leaf that is in one checkpoint alone."""
        claim: Claim = "trains" if masks.trains(m) else "frozen"
        if path in self._now:
            return Finding(path, claim, "not decided", "is new: there is nothing before to hold it against")
        twins = [twin for twin in self._tied.get(self._digests[path], ()) if twin in self._now]
        tied = f"; '{twins[0]}' had the same bytes before" if twins else ""
        return Finding(path, claim, "not decided", f"is missing after, under this name and any other{tied}")

    def notes(self) -> list[str]:
        """What is missing, new, renamed, and which leaves had the same bytes before and have not now."""
        renamed = [f"{path} is {other}" for path, other in self.renamed.items()]
        missing = [path for path in self.missing if path not in self.renamed]
        new = [path for path in self.new if path not in self.renamed.values()]
        lists = (("renamed", renamed), ("missing after", missing), ("new", new))
        notes = [f"{what}: {paths.some(names)}" for what, names in lists if names]
        for names in self._tied.values():
            moved = [self._moved[path] for path in names if path in self._moved]
            if any(moved) and not all(moved):
                went = [path for path in names if self._moved.get(path)]
                notes.append(
                    f"{paths.some(names)} had the same bytes before, as tied leaves have, and only {paths.some(went)} "
                    "moved"
                )
        return notes


def _alike(digests: Mapping[str, str]) -> dict[str, list[str]]:
    """{digest: the paths that have it}, of leaves that do not repeat one number."""
    groups: dict[str, list[str]] = {}
    for path, digest in digests.items():
        if digest:
            groups.setdefault(digest, []).append(path)
    return groups


_ALL_BY_ONE_FACTOR = 0.01
"""How much of a leaf's move may not be a multiple of its value where weight decay alone moved it: rounding is less, and
what a gradient does to eight numbers is more."""


def _decided(before: np.ndarray, after: np.ndarray, is_trained: bool) -> tuple[Verdict, Grade, str]:
    """(verdict, grade, detail) of numbers of which it is claimed that they train, or that they are frozen."""
    kind = str(before.dtype)
    size = f"{before.size:,} number" + "s" * (before.size != 1)
    if before.dtype != after.dtype:
        kind = f"{before.dtype} to {after.dtype}"
        relation = cast(before, after)
        if relation == "lossless":
            return "refuted" if is_trained else "proved", "equal", f"{size}, only cast, {kind}: the same numbers"
        if relation == "rounded":
            text = f"{size}, only cast, {kind}: equal after the cast, and a move below its rounding would not show"
            return "not decided", "changed", text
    moves = change(before, after)
    nan = f"; {moves.new_nan:,} became NaN" if moves.new_nan else ""
    if not moves.moved:
        if moves.identical and before.dtype == after.dtype:
            return "refuted" if is_trained else "proved", "identical", f"{size}, {kind}: the same bytes"
        parts = [f"{moves.signs:,} zeros of another sign"] * bool(moves.signs)
        parts += [f"{moves.payloads:,} NaN of other bits"] * bool(moves.payloads)
        text = f"{size}, {kind}: only {' and '.join(parts) or 'the dtype'} differ"
        return "refuted" if is_trained else "proved", "equal", text
    share = f" ({_percent(moves.distance / moves.norm)} of their length)" if moves.norm else ", from 0"
    text = f"{moves.moved:,} of {size} moved, by at most {moves.largest:.3g}{share}, {kind}{nan}"
    decayed = moves.norm and moves.aside <= _ALL_BY_ONE_FACTOR * moves.distance and before.size > 1
    if decayed:
        text += f"; all by the factor {moves.factor:.6g}, as weight decay does"
    if not is_trained:
        return "refuted", "changed", text
    if moves.new_nan == moves.moved:
        return "not decided", "changed", text + ": nothing else moved"
    if decayed and np.count_nonzero(before) >= 8:
        return "not decided", "changed", text + " without a gradient"
    return "proved", "changed", text


def _percent(share: float) -> str:
    """A share in %, two digits or more.

    >>> _percent(0.00123), _percent(1.4)
    ('0.12 %', '140 %')
    """
    return f"{100 * share:,.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"
