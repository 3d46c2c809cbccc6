"""Named arrays become the parameters of a model by rules, and the parameters named arrays again.

Pixels reach the first stage divided by 255 and nothing else: what a network learnt on is an option of its model, such
as `vit:pixels=signed`. What is pickled is never read.
"""

import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from tljax import paths, plugins
from tljax.types import InputError, Params
from tljax.weights import resize
from tljax.weights.rules import STAR, Rule, Shape, Step, nearest

_P = ParamSpec("_P")
_T = TypeVar("_T")
Lengths = tuple[int | None, ...] | None
"""A shape of which lengths, or all, are not known."""


def _in_short(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """The function, whose refusals cut names of more than 200 letters: a file may hold any."""

    @functools.wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return function(*args, **kwargs)
        except InputError as error:
            text = _LONG.sub(lambda match: f"{match[0][:60]}...{match[0][-20:]}", str(error))
            raise (error if text == str(error) else InputError(text)) from error.__cause__

    return wrapped


_LONG = re.compile(r"[^\s']{200,}")


class Move(NamedTuple):
    """Which arrays become which leaves: one and one, or one and several, or several and one."""

    names: tuple[str, ...]
    leaves: tuple[str, ...]
    steps: tuple[Step, ...] = ()
    cast: str | None = None
    rule: Rule | None = None
    """The rule that says so; None for an array that keeps its name."""

    @property
    def shown(self) -> str:
        """The arrays and what is done with them, for a table.

        >>> Move(("qkv",), ("q", "k"), (Step("split", 0), Step("reshape"))).shown
        'qkv: split, reshape'
        """
        steps = [step.kind for step in self.steps] + (["cast"] if self.cast is not None else [])
        return " + ".join(self.names) + (f": {', '.join(steps)}" if steps else "")


@_in_short
def moves(names: Iterable[str], rules: Sequence[Rule]) -> tuple[tuple[Move, ...], tuple[str, ...]]:
    """(what becomes of the arrays of these names, the names of those that are left out), by the rules.

    Raises InputError for a rule that matches nothing, a rule that renames nothing as others come before it, two rules
    for one name, an array to join that is not there, and two arrays for one leaf.

    >>> from tljax.weights.rules import rule
    >>> rules = [rule("tok:to=embed"), rule("steps:drop")]
    >>> found, dropped = moves(["tok.pos", "tok.0.bias", "head.bias", "steps"], rules)
    >>> [(move.names[0], move.leaves[0]) for move in found], dropped
    ([('tok.pos', 'embed/pos'), ('tok.0.bias', 'embed/0/bias'), ('head.bias', 'head.bias')], ('steps',))
    """
    names = list(names)
    sources = [(rule.source, rule.casts_alone, rule.place.rpartition(":")[0]) for rule in rules]
    if twice := [source for source in sources if sources.count(source) > 1]:
        raise InputError(f"two rules are of '{twice[0][0]}': keep one")
    matches = [{name: match for name in names if (match := _match(rule, name))} for rule in rules]
    for rule, matched in zip(rules, matches, strict=True):
        if not matched and not rule.optional:
            hint = plugins.nearest(rule.source.replace("*", "0"), names)
            hint = hint if hint.startswith("; nearest") else f"; arrays: {paths.some(names, _MOST_NAMES)}"
            place = f"{rule.place}: " if rule.place else ""
            raise InputError(f"{place}rule '{rule.source}' matches no array{hint}")
    move_by_names: dict[tuple[str, ...], Move] = {}
    dropped: list[str] = []
    used: set[int] = set()
    for name in names:
        applying = [i for i, matched in enumerate(matches) if name in matched]
        if _dropping([rules[i] for i in applying]):
            dropped.append(name)
            used |= {i for i in applying if rules[i].renames}
            continue
        first = next((i for i in applying if rules[i].renames), applying[0] if applying else None)
        casts = [cast for i in applying if (cast := rules[i].cast) is not None]
        if first is None:
            move_by_names[name,] = Move((name,), (name,))
            continue
        used.add(first)
        steps = [rules[i].steps for i in applying if rules[i].steps and not _is_of_several(rules[i])]
        move = _move(rules[first], matches[first], name, names)
        own_steps = move.steps or (steps[-1] if steps else ())
        move_by_names[move.names] = move._replace(steps=own_steps, cast=casts[0] if casts else None)
    for i, rule in enumerate(rules):
        if rule.renames and not rule.optional and i not in used and not _is_overruled(i, rules, matches):
            raise InputError(f"rule '{rule.source}' renames nothing, as a rule before it does: put it first")
    _require_one_each(list(move_by_names.values()))
    return tuple(move_by_names.values()), tuple(dropped)


def _dropping(applying: Sequence[Rule]) -> Rule | None:
    """The rule that drops an array, of those that apply to it, in their order; None where none does.

    One without a star drops it wherever it stands; one with stars leaves what an earlier rule renames or changes.
    """
    for i, rule in enumerate(applying):
        if rule.drop and ("*" not in rule.source or not any(before.to or before.steps for before in applying[:i])):
            return rule
    return None


_MOST_NAMES = 4
"""The most names that an error lists."""


class _Match(NamedTuple):
    """How a rule's pattern fits a name."""

    pattern: int
    stars: tuple[str, ...]
    rest: str
    """What of the name is below the pattern, with its separator."""


def _is_of_several(rule: Rule) -> bool:
    """Whether a rule splits or joins."""
    return any(step.kind in ("split", "join") for step in rule.steps)


def _match(rule: Rule, name: str) -> _Match | None:
    """How a rule fits a name, or a name above it; None where it does not."""
    for i, pattern in enumerate(rule.sources):
        matched = _expression(pattern, "/" if "/" in name else ".").fullmatch(name)
        if matched and not (_is_of_several(rule) and matched["rest"]):
            return _Match(i, matched.groups()[:-1], matched["rest"] or "")
    return None


@functools.lru_cache(maxsize=4096)
def _expression(pattern: str, separator: str) -> re.Pattern[str]:
    """A pattern of names as a regular expression: a group for each star, and `rest`."""
    part = f"[^{re.escape(separator)}]+"
    stars = {"*": f"({part})", "**": "(.+)"}
    pieces = [stars.get(piece, re.escape(piece)) for piece in re.split(r"(\*\*?)", pattern)]
    return re.compile(f"{''.join(pieces)}(?P<rest>{re.escape(separator)}.*)?")


def _move(rule: Rule, matched: Mapping[str, _Match], name: str, names: Sequence[str]) -> Move:
    """What a rule makes of an array, and of those that are joined to it."""
    match = matched[name]
    kinds = [step.kind for step in rule.steps]
    if "split" in kinds:
        return Move((name,), tuple(_filled(path, match.stars, rule, name) for path in rule.to), rule.steps, rule=rule)
    if "join" in kinds:
        joined = tuple(_filled(pattern, match.stars, rule, name) for pattern in rule.sources)
        if missing := [each for each in joined if each not in names]:
            raise InputError(f"{rule.shown} joins '{name}' and '{missing[0]}', and the file has no '{missing[0]}'")
        return Move(joined, (_filled(rule.to[0], match.stars, rule, name),), rule.steps, rule=rule)
    rest = match.rest if "/" in name else match.rest.replace(".", "/")
    above = name.removesuffix(match.rest)
    path = _filled(rule.to[match.pattern % len(rule.to)], match.stars, rule, name) if rule.to else above
    return Move((name,), (path + rest,), rule.steps, rule=rule)


def _filled(path: str, stars: Sequence[str], rule: Rule, name: str) -> str:
    """A path, or a pattern of names, with its stars filled in order."""
    values = iter(stars)

    def filled(star: re.Match[str]) -> str:
        value = next(values)
        if star[2] is None:
            return value
        if not value.isdecimal():
            raise InputError(f"{rule.shown} moves '{value}' of '{name}' by {star[2]}: let the star be a number there")
        moved = int(value) + int(star[2])
        if moved < 0:
            raise InputError(
                f"{rule.shown} moves '{value}' of '{name}' by {star[2]}, to {moved}: no number is below 0, so move it "
                "by less, or give this array a rule of its own before it"
            )
        return str(moved)

    return STAR.sub(filled, path)


def _is_overruled(i: int, rules: Sequence[Rule], matches: Sequence[Mapping[str, _Match]]) -> bool:
    """Whether rules of another list come before all that a rule would rename: such are there to take its place."""
    origin = rules[i].place.rpartition(":")[0]
    return all(
        any(
            rule.renames and name in matched and rule.place.rpartition(":")[0] != origin
            for rule, matched in zip(rules[:i], matches[:i], strict=True)
        )
        for name in matches[i]
    )


def _require_one_each(every: Sequence[Move]) -> None:
    """Raise InputError for two arrays with one leaf."""
    taken: dict[str, Move] = {}
    for move in every:
        for path in move.leaves:
            if path in taken:
                first, second = taken[path].names[0], move.names[0]
                raise InputError(f"source leaves '{first}' and '{second}' would both become '{path}': mend the rules")
            taken[path] = move


@_in_short
def grafted(
    arrays: Mapping[str, np.ndarray], rules: Sequence[Rule], like: Params, image: tuple[int, ...] = ()
) -> Params:
    """The arrays as parameters in the tree of `like` (abstract or real), by the rules.

    `image` is the shape [height, width, channels] of an example, where it is one: the grid to which positions are
    resized follows from it (`grid_of`). Nothing is cast that no rule casts. Raises InputError, naming paths, shapes and
    the rule, for what `moves` refuses, steps that do not fit the array, a number that is not finite, an array without a
    leaf, a leaf without an array, and a shape or dtype that differs.

    >>> from tljax.weights.rules import rule
    >>> like = {"head": {"kernel": np.zeros((3, 2), np.float32)}}
    >>> rules = [rule("0.weight:to=head/kernel:transpose")]
    >>> grafted({"0.weight": np.ones((2, 3), np.float32)}, rules, like)["head"]["kernel"].shape
    (3, 2)
    """
    every, _ = moves(arrays, rules)
    leaves = dict(paths.items(like))
    shapes = {path: tuple(np.shape(leaf)) for path, leaf in leaves.items()}
    _require_all_placed(arrays, every, shapes, rules)
    values: dict[str, np.ndarray] = {}
    for move in every:
        grid = grid_of(move.leaves[0], shapes, image)
        values |= zip(move.leaves, _carried(move, arrays, [leaves[path] for path in move.leaves], grid), strict=True)
    return jax.tree.unflatten(jax.tree.structure(like), [values[path] for path in leaves])


@_in_short
def changes(
    arrays: Mapping[str, np.ndarray], every: Iterable[Move], like: Params, image: tuple[int, ...] = ()
) -> tuple[tuple[Move, ...], tuple[str, ...]]:
    """(the moves without the `resize`, `channels` and `cast` that change nothing, a line for each position and kernel
    that is brought to another size), of moves that `grafted` takes.

    >>> from tljax.weights.rules import rule
    >>> rules, like = [rule("pos:resize:cast:to=at/position")], {"at": {"position": np.zeros((9, 2), np.float32)}}
    >>> arrays = {"pos": np.zeros((4, 2), np.float32)}
    >>> changed, lines = changes(arrays, moves(arrays, rules)[0], like)
    >>> changed[0].shown, lines
    ('pos: resize', ('pos: positions of a grid of 2x2 become 3x3',))
    """
    leaves = dict(paths.items(like))
    shapes = {path: tuple(np.shape(leaf)) for path, leaf in leaves.items()}
    result: list[Move] = []
    lines: list[str] = []
    for move in every:
        shape, names = shapes[move.leaves[0]], " + ".join(move.names)
        size = sum(np.size(arrays[name]) for name in move.names)
        steps = []
        for step in move.steps:
            if step.kind == "resize":
                old, new = _grids(step, size // shape[-1], shape[0], grid_of(move.leaves[0], shapes, image))
                lines += [f"{names}: positions of a grid of {old} become {new}"] if old != new else []
                steps += [step] if old != new else []
            elif step.kind == "channels":
                new_count = shape[step.value]
                old_count = size * new_count // math.prod(shape)
                lines += [f"{names}: {old_count} input channels become {new_count}"] if old_count != new_count else []
                steps += [step] if old_count != new_count else []
            else:
                steps.append(step)
        dtypes = {arrays[name].dtype for name in move.names}
        casts = dtypes != {leaves[move.leaves[0]].dtype}
        result.append(move._replace(steps=tuple(steps), cast=move.cast if casts else None))
    return tuple(result), tuple(lines)


def _grids(step: Step, before: int, after: int, model_grid: tuple[int, int] | None) -> tuple[str, str]:
    """The grids of so many tokens before and after a resize, as rules write them."""
    _, grids = step.value
    if not grids and before == after:
        return "", ""
    old = resize.grid(before, grids[0] if grids else None)
    return resize.shown(old), resize.shown(resize.grid(after, grids[1] if len(grids) > 1 else model_grid))


def grid_of(position: str, shapes: Mapping[str, tuple[int, ...]], image: tuple[int, ...]) -> tuple[int, int] | None:
    """(height, width) of the grid of patches that a leaf of positions [tokens, D] is of; None where it is not known.

    It is the image cut by the kernel [h, w, in, out] of its stage, where so many tokens, or one more, are in the leaf.

    >>> shapes = {"embedding/patch/kernel": (7, 7, 1, 32), "embedding/position": (17, 32)}
    >>> grid_of("embedding/position", shapes, (14, 56, 1)), grid_of("embedding/position", shapes, (14, 28, 1))
    ((2, 8), None)
    """
    if len(image) != 3 or len(shapes[position]) != 2:
        return None
    stage = position.partition("/")[0] + "/"
    kernels = {shape[:2] for path, shape in shapes.items() if len(shape) == 4 and path.startswith(stage)}
    grids = {(image[0] // h, image[1] // w) for h, w in kernels if image[0] % h == image[1] % w == 0}
    grids = {grid for grid in grids if shapes[position][0] - math.prod(grid) in (0, 1)}
    return grids.pop() if len(grids) == 1 else None


def _require_all_placed(
    arrays: Mapping[str, np.ndarray],
    every: Sequence[Move],
    shapes: Mapping[str, tuple[int, ...]],
    rules: Sequence[Rule],
) -> None:
    """Raise InputError, with a rule as an example, if an array has no leaf or a leaf has no array."""
    placed = {path for move in every for path in move.leaves}
    homeless = [(name, path) for move in every for path in move.leaves if path not in shapes for name in move.names]
    unplaced = list(dict.fromkeys(name for name, _ in homeless))
    unfilled = [path for path in shapes if path not in placed]
    if not unplaced and not unfilled:
        return
    arrays_have = f"{paths.some(unplaced, _MOST_NAMES)} of the file's arrays {_has_or_have(unplaced)}"
    leaves_have = f"{paths.some(unfilled, _MOST_NAMES)} of the model's leaves {_has_or_have(unfilled)}"
    known = nearest((unplaced or unfilled)[0], rules)
    if "" in unplaced:
        raise InputError("an array of the file has no name, so that no rule can name it: save the file again with one")
    if left_out := _left_out(arrays, rules, unfilled):
        raise InputError(f"{leaves_have} no array, as {left_out}")
    if unplaced and unfilled:
        pairs = [(name, path) for name in unplaced for path in unfilled]
        alike = [pair for pair in pairs if arrays[pair[0]].shape == shapes[pair[1]]]
        transposed = [pair for pair in pairs if arrays[pair[0]].shape == shapes[pair[1]][::-1]]
        name, path = (alike or transposed or pairs)[0]
        example = f"{plugins.quoted(name)}:to={plugins.quoted(path)}"
        example += ":transpose" if transposed and not alike else ""
        raise InputError(
            f"{arrays_have} no place in the model, and {leaves_have} no array{known}: say which is which by rules, "
            f"such as `source_rename={example}` ({list(arrays[name].shape)} to {list(shapes[path])})"
        )
    if unplaced:
        name, path = homeless[0]
        led = f", to which the rules lead '{name}'" if path != name else ""
        near = plugins.closest(path, shapes)
        leaf = f"; the nearest leaf is '{near}' {list(shapes[near])}" if near else ""
        raise InputError(
            f"{arrays_have} no place in the model: no leaf is '{path}' {list(arrays[name].shape)}{led}{leaf}{known}: "
            f"build the model that they are of, or leave them out by rules, such as "
            f"`source_rename={plugins.quoted(name)}:drop`"
        )
    near = plugins.closest(unfilled[0], arrays)
    array = f"; the nearest array is '{near}' {list(arrays[near].shape)}" if near else ""
    where = f"{leaves_have} no array in the file (the first is {list(shapes[unfilled[0]])})"
    if fault := _split_short(every, shapes, unfilled):
        raise InputError(f"{where}: {fault}")
    remedy = "it is of another model; build that one"
    if {path.partition("/")[0] for path in unfilled} <= {path.partition("/")[0] for path in placed}:
        lacked = "it" if len(unfilled) == 1 else "them"
        remedy = (
            f"the file lacks {lacked}, and has the other {len(shapes) - len(unfilled)}: save it again with all of its "
            "arrays, or build the model that it is of"
        )
    raise InputError(f"{where}{array}{known}: {remedy}")


def _split_short(every: Sequence[Move], shapes: Mapping[str, tuple[int, ...]], unfilled: Sequence[str]) -> str:
    """Which rule splits an array into fewer leaves than the model has of that shape there; '' where none does."""
    for move in every:
        if len(move.leaves) < 2:
            continue
        parts = [leaf.split("/") for leaf in move.leaves]
        pattern = [names[0] if len(set(names)) == 1 else None for names in zip(*parts, strict=False)]
        beside = [
            path
            for path in unfilled
            if shapes[path] == shapes.get(move.leaves[0])
            and len(path.split("/")) == len(pattern)
            and all(part in (None, name) for part, name in zip(pattern, path.split("/"), strict=True))
        ]
        if beside and move.rule:
            return (
                f"{move.rule.shown} splits '{move.names[0]}' into {len(parts)} leaves, and the model has "
                f"{len(parts) + len(beside)}: name {paths.some(beside)} in it too"
            )
    return ""


def _left_out(arrays: Mapping[str, Any], rules: Sequence[Rule], unfilled: Sequence[str]) -> str:
    """Which rule drops the array that would become one of the leaves, in words; '' where none does."""
    for name in arrays:
        matches = {rule: match for rule in rules if (match := _match(rule, name))}
        dropping = _dropping(list(matches))
        if dropping is None:
            continue
        renaming = next((rule for rule in matches if rule.renames), None)
        leaves: tuple[str, ...] = (name.replace(".", "/"),)
        if renaming:
            leaves = _move(renaming, {name: matches[renaming]}, name, list(arrays)).leaves
        if leaf := next((leaf for leaf in leaves if leaf in unfilled), ""):
            return f"{dropping.shown} leaves out '{name}', which would become '{leaf}': mend or move that rule"
    return ""


def _has_or_have(names: Sequence[str]) -> str:
    return "has" if len(names) == 1 else "have"


class _Misfit(Exception):
    """Why a step cannot be taken, and a remedy."""


def _carried(
    move: Move, arrays: Mapping[str, np.ndarray], leaves: Sequence[Any], grid: tuple[int, int] | None
) -> list[np.ndarray]:
    """The arrays of a move as its leaves. Raises InputError if they do not become of their shape and dtype."""
    sources = [arrays[name] for name in move.names]
    for name, array in zip(move.names, sources, strict=True):
        _require_finite(name, array)
    values = [_cast(array, move, leaves[0]) for array in sources]
    try:
        shapes = _shapes_between(move, [tuple(np.shape(leaf)) for leaf in leaves])
        for step, after in zip(move.steps, shapes[1:], strict=True):
            values = _taken(step, values, after, grid)
        for value, leaf in zip(values, leaves, strict=True):
            if value.shape != tuple(np.shape(leaf)):
                raise _Misfit(_remedy(value.shape, tuple(np.shape(leaf))))
    except _Misfit as misfit:
        names = " and ".join(f"'{name}' is {_kind(array)}" for name, array in zip(move.names, sources, strict=True))
        reached = " and ".join(dict.fromkeys(map(_kind, values)))
        changed = f", and becomes {reached}" if len(sources) == 1 and values[0].shape != sources[0].shape else ""
        where = "; ".join(
            f"target leaf '{path}' is {_kind(leaf)}" for path, leaf in zip(move.leaves, leaves, strict=True)
        )
        by = f" ({move.rule.shown})" if move.rule else ""
        raise InputError(f"source leaf {names}{changed}, {where}: {misfit}{by}") from misfit
    for value, path, leaf in zip(values, move.leaves, leaves, strict=True):
        if value.dtype != leaf.dtype:
            remedy = f"nothing is cast that no rule casts; add the rule **:cast, or save it as {leaf.dtype}"
            if not jnp.issubdtype(value.dtype, jnp.floating):
                remedy = f"only floats are cast; save it as {leaf.dtype}, or leave it out by a rule"
            elif move.cast:
                remedy = f"a rule casts it to {move.cast}; write `cast` alone, which is the leaf's dtype"
            raise InputError(
                f"source leaf '{move.names[0]}' is {_kind(value)}, target leaf '{path}' is {_kind(leaf)}: {remedy}"
            )
    return [_in_memory(value) for value in values]


def _in_memory(array: np.ndarray) -> np.ndarray:
    """The array itself, or a contiguous copy of one that is a view, such as of a file, which may change on the disk."""
    return array if array.flags.owndata and array.flags.c_contiguous else np.array(array, order="C")


def _kind(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _remedy(shape: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """What is said of an array of another shape than its leaf."""
    if shape == wanted[::-1]:
        return "transpose it, or build the same model"
    if math.prod(shape) == math.prod(wanted):
        return "a rule may say `reshape`, or build the same model"
    return "the source is of another model or shape; draw the stage anew or build the same model"


def _require_finite(name: str, array: np.ndarray) -> None:
    """Raise InputError for a number that is not finite."""
    if jnp.issubdtype(array.dtype, jnp.floating) and not np.isfinite(array).all():
        reason = "it is of a fit that diverged"
        if array.dtype == np.float16 and not np.isnan(array).any():
            reason = "float16 ends at 65,504; save the weights again as float32 or bfloat16"
        raise InputError(f"array '{name}' holds a number that is not finite: {reason}")


def _cast(array: np.ndarray, move: Move, leaf: Any) -> np.ndarray:
    """The array in the dtype that its rule says. Raises InputError for a number that this dtype has not."""
    if move.cast is None or not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    dtype = jnp.dtype(move.cast or leaf.dtype)
    if dtype == array.dtype:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if not np.isfinite(cast).all():
        ends = f"which ends at {float(jnp.finfo(dtype).max):.3g}"
        remedy = "mend the file" if dtype.itemsize >= 4 else "cast it to float32"
        raise InputError(f"array '{move.names[0]}' {_kind(array)} holds numbers beyond {dtype}, {ends}: {remedy}")
    return cast


def outline(arrays: Mapping[str, Any], rules: Sequence[Rule]) -> dict[str, tuple[int | None, ...]]:
    """{path: shape} of the leaves that arrays would become in a model of their own size, as far as that follows.

    Lengths that only the model knows, such as how many heads share a width, are None. Raises InputError as `moves`
    does.

    >>> from tljax.weights.rules import rule
    >>> rules = [rule("q.weight:to=query/kernel:transpose:reshape=D+(heads+d)")]
    >>> outline({"q.weight": np.zeros((6, 4))}, rules)
    {'query/kernel': (4, None, None)}
    """
    shapes: dict[str, tuple[int | None, ...]] = {}
    every, _ = moves(arrays, rules)
    for move in every:
        after: list[Lengths] = [tuple(np.shape(arrays[name])) for name in move.names]
        for step in move.steps:
            after = _shapes_after(step, after, len(move.leaves))
        shapes |= {path: shape for path, shape in zip(move.leaves, after, strict=False) if shape is not None}
    return shapes


def _shapes_after(step: Step, before: list[Lengths], leaves: int) -> list[Lengths]:
    """The shapes after a step of those before it, as far as they follow from them."""
    first = before[0]
    if step.kind in ("split", "join") and (first is None or not _has(first, step)):
        return [None] * (leaves if step.kind == "split" else 1)
    if step.kind == "split" and first is not None:
        length = first[step.value]
        return [_with_length(first, step.value, length // leaves if length and not length % leaves else None)] * leaves
    if step.kind == "join" and first is not None:
        lengths = [None if shape is None or len(shape) != len(first) else shape[step.value] for shape in before]
        return [_with_length(first, step.value, None if None in lengths else sum(filter(None, lengths)))]
    return [None if shape is None else _shape_after(step, shape) for shape in before]


def _shape_after(step: Step, before: tuple[int | None, ...]) -> Lengths:
    """The shape after a step of one array."""
    if step.kind == "transpose":
        axes = step.value or tuple(range(len(before)))[::-1]
        return tuple(before[axis] for axis in axes) if sorted(axes) == list(range(len(before))) else None
    if step.kind != "reshape":
        return before
    shape: Shape | None = step.value
    if shape is not None and shape.groups is None and "-1" not in shape.axes:
        return tuple(map(int, shape.axes))
    if shape is None or shape.groups is None or len(shape.groups) != len(before):
        return None
    lengths: list[int | None] = []
    for group, whole in zip(shape.groups, before, strict=True):
        lengths += [whole] if len(group) == 1 else [int(a) if (a := shape.axes[i]).isdecimal() else None for i in group]
    return tuple(lengths)


# ---- Shapes: from the leaf back to the array, as far as they follow from it


def _shapes_between(move: Move, leaves: list[tuple[int, ...]]) -> list[list[Lengths]]:
    """The shapes of the arrays before each step and after the last, as far as those of the leaves say them."""
    shapes: list[list[Lengths]] = [list(leaves)]
    for step in reversed(move.steps):
        shapes.insert(0, _shapes_before(step, shapes[0], len(move.names)))
    return shapes


def _shapes_before(step: Step, after: list[Lengths], names: int) -> list[Lengths]:
    """The shapes before a step of those after it."""
    if step.kind == "split":
        first = after[0]
        lengths = [
            None if shape is None else shape[step.value] for shape in after if shape is None or _has(shape, step)
        ]
        if first is None or len(lengths) < len(after):
            return [None]
        return [_with_length(first, step.value, None if None in lengths else sum(filter(None, lengths)))]
    if step.kind == "join":
        return [
            None if after[0] is None or not _has(after[0], step) else _with_length(after[0], step.value, None)
        ] * names
    return [None if shape is None else _shape_before(step, shape) for shape in after]


def _has(shape: tuple[int | None, ...], step: Step) -> bool:
    """Whether a shape has the axis of a step."""
    return -len(shape) <= step.value < len(shape)


def _with_length(shape: tuple[int | None, ...], axis: int, length: int | None) -> tuple[int | None, ...]:
    """The shape with another length of an axis."""
    axis %= len(shape)
    return (*shape[:axis], length, *shape[axis + 1 :])


def _shape_before(step: Step, after: tuple[int | None, ...]) -> Lengths:
    """The shape before a step of one array."""
    if step.kind == "transpose":
        axes = step.value or tuple(range(len(after)))[::-1]
        return (
            tuple(after[axes.index(i)] for i in range(len(after))) if sorted(axes) == list(range(len(after))) else None
        )
    if step.kind == "reshape":
        shape: Shape | None = step.value
        if shape is None or shape.groups is None or len(shape.axes) != len(after):
            return None
        return tuple(_product([after[i] for i in group]) for group in shape.groups)
    if step.kind == "resize":
        return (None, *after[1:])
    return _with_length(after, step.value, None) if _has(after, step) else None


def _product(lengths: Sequence[int | None]) -> int | None:
    """The product of lengths, if all are known.

    >>> _product([3, 4]), _product([3, None]), _product([])
    (12, None, 1)
    """
    return None if None in lengths else math.prod(length for length in lengths if length is not None)


# ---- Steps


def _taken(
    step: Step, values: list[np.ndarray], after: list[Lengths], grid: tuple[int, int] | None
) -> list[np.ndarray]:
    """The arrays after a step, whose shapes are `after` as far as they are known. Raises _Misfit if it does not fit."""
    if step.kind == "split":
        return _split(values[0], step.value, after)
    if step.kind == "join":
        try:
            return [np.concatenate(values, axis=step.value)]
        except ValueError as error:
            raise _Misfit(f"they cannot be joined along axis {step.value}") from error
    return [_step(step, value, shape, grid) for value, shape in zip(values, after, strict=True)]


def _split(array: np.ndarray, axis: int, after: list[Lengths]) -> list[np.ndarray]:
    """An array cut along an axis: in the lengths of the leaves, or, where they do not say them, in equal ones."""
    if not -array.ndim <= axis < array.ndim:
        raise _Misfit(f"it has no axis {axis} to split")
    lengths = [None if shape is None or len(shape) != array.ndim else shape[axis] for shape in after]
    whole = array.shape[axis]
    if None not in lengths and sum(filter(None, lengths)) != whole:
        raise _Misfit(
            f"axis {axis} of length {whole} is split into {' + '.join(map(str, lengths))}: the model has another width"
        )
    if None in lengths:
        if whole % len(after):
            raise _Misfit(f"axis {axis} of length {whole} cannot be split into {len(after)} equal parts")
        lengths = [whole // len(after)] * len(after)
    ends = np.cumsum([length for length in lengths if length is not None])[:-1]
    return np.split(array, ends, axis=axis)


def _step(step: Step, array: np.ndarray, after: Lengths, grid: tuple[int, int] | None) -> np.ndarray:
    """One array after a step; `grid` is the model's, if it is known."""
    if step.kind == "transpose":
        if step.value and sorted(step.value) != list(range(array.ndim)):
            raise _Misfit(f"it has no axes {'+'.join(map(str, step.value))}: name each of its {array.ndim} once")
        return array.transpose(step.value or None)
    if step.kind == "reshape":
        return _reshaped(array, step.value, after)
    if step.kind == "resize":
        if after is None or after[0] is None or array.ndim != 2:
            raise _Misfit("`resize` is of positions [tokens, D], and comes last")
        convention, grids = step.value
        try:
            return resize.positions(array, after[0], convention, grids, grid)
        except InputError as error:
            raise _Misfit(str(error)) from error
    if after is None or not _has(after, step) or array.ndim != len(after):
        raise _Misfit(f"it has no axis {step.value} of channels")
    return with_channels(array, after[step.value] or array.shape[step.value], step.value)


def with_channels(kernel: np.ndarray, channels: int, axis: int = 2) -> np.ndarray:
    """A kernel for another number of input channels, so that the sum over them stays on average.

    For one channel it is the sum over the channels. For others they are repeated in turn and scaled by old / new, as
    timm does (Wightman 2019, PyTorch Image Models, `adapt_input_conv`). The same number is the kernel as it is.

    >>> with_channels(np.ones((1, 1, 3, 2)), 1)[0, 0].tolist(), with_channels(np.ones((1, 1, 3, 2)), 4).sum(2).tolist()
    ([[3.0, 3.0]], [[[3.0, 3.0]]])
    """
    count = kernel.shape[axis]
    if count == channels:
        return kernel
    if channels == 1:
        return kernel.sum(axis, keepdims=True, dtype=np.float32).astype(kernel.dtype)
    taken = np.take(kernel, np.arange(channels) % count, axis=axis)
    return (taken * np.float32(count / channels)).astype(kernel.dtype)


def _reshaped(array: np.ndarray, shape: Shape | None, after: Lengths) -> np.ndarray:
    """An array in the shape that a rule says, or in that of the leaf."""
    if shape is None:
        if after is None or None in after:
            raise _Misfit("`reshape` comes last, or says its shape")
        wanted = tuple(length for length in after if length is not None)
        if math.prod(wanted) != array.size:
            raise _Misfit(f"{list(array.shape)} cannot become {list(wanted)}: the source is of another model or shape")
        return array.reshape(wanted)
    if shape.groups is None:
        numbers = tuple(map(int, shape.axes))
        try:
            return array.reshape(numbers)
        except ValueError as error:
            raise _Misfit(f"{list(array.shape)} cannot become {list(numbers)}: mend the rule") from error
    rule = shown(shape)
    if len(shape.groups) != array.ndim or (after is not None and len(after) != len(shape.axes)):
        ranks = f"{len(shape.groups)} axes to {len(shape.axes)}"
        raise _Misfit(f"'reshape={rule}' is of {ranks}: each axis of the array is one letter or bracket")
    lengths: list[int] = []
    for group, whole in zip(shape.groups, array.shape, strict=True):
        parts = [int(shape.axes[i]) if shape.axes[i].isdecimal() else after[i] if after else None for i in group]
        unknown = parts.count(None)
        known = math.prod(part for part in parts if part is not None)
        if unknown > 1 or (known and whole % known) or (not unknown and known != whole):
            sizes = "(" + " x ".join("?" if part is None else str(part) for part in parts) + ")"
            raise _Misfit(f"'reshape={rule}' makes {sizes} of an axis of length {whole}: the model has another width")
        lengths += [whole // known if part is None else part for part in parts]
    return array.reshape(lengths)


def shown(shape: Shape) -> str:
    """A shape as rules write it.

    >>> shown(Shape(("n", "h", "d"), ((), (0,), (1, 2))))
    '()+n+(h+d)'
    """
    if shape.groups is None:
        return "+".join(shape.axes)
    texts = ["+".join(shape.axes[i] for i in group) for group in shape.groups]
    return "+".join(text if len(group) == 1 else f"({text})" for text, group in zip(texts, shape.groups, strict=True))


# ---- And home again


def without_inverse(steps: Sequence[Step]) -> str:
    """Why steps have no way back from the leaf to the array; '' where it has one.

    A cast, resized positions and other channels go back as they are now.

    >>> from tljax.weights.rules import rule
    >>> without_inverse(rule("q:to=q/kernel:reshape").steps)
    'its `reshape` does not say which axes were one: write reshape=D+(heads+d)'
    >>> without_inverse(rule("q:to=q/kernel:reshape=D+(heads+d)").steps)
    ''
    """
    for step in steps:
        if step.kind == "reshape" and (step.value is None or step.value.groups is None):
            return "its `reshape` does not say which axes were one: write reshape=D+(heads+d)"
    return ""


@_in_short
def exported(
    params: Mapping[str, np.ndarray], rules: Sequence[Rule], dtypes: Mapping[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """{name: array} of {path: leaf} in the layout that the rules read: the way back of `grafted`.

    Leaves that no rule names keep their path; what a rule drops is not there. `dtypes` has {name: dtype} of a file in
    this layout: its dtypes are taken, and its names where a rule reads several. Without it a leaf keeps its dtype and
    gets the first of the names. Raises InputError for a rule without a way back, a split of which
    a leaf is not there, and rules of which none applies.

    >>> from tljax.weights.rules import rule
    >>> rules = [rule("qkv:split:transpose:to={q,k}/kernel")]
    >>> leaves = {"q/kernel": np.zeros((3, 2)), "k/kernel": np.ones((3, 2))}
    >>> exported(leaves, rules)["qkv"].shape
    (4, 3)
    """
    separator = "/" if any("/" in pattern for rule in rules for pattern in rule.sources) else "."
    known = set(dtypes or ())
    every = [_move_home(path, params, rules, separator, known) for path in params]
    if rules and not any(move.rule for move in every):
        raise InputError(
            f"none of the rules is of the model's leaves, {paths.some(list(params), _MOST_NAMES)}: name those that are"
        )
    arrays: dict[str, np.ndarray] = {}
    for move in dict.fromkeys(every):
        if reason := without_inverse(move.steps):
            raise InputError(f"{move.rule.shown if move.rule else move.shown} has no way back: {reason}")
        values = _home(move, [np.asarray(params[path]) for path in move.leaves])
        for name, value in zip(move.names, values, strict=True):
            dtype = (dtypes or {}).get(name, value.dtype)
            value = value if dtype == value.dtype else _cast(value, Move((name,), (name,), cast=""), np.empty(0, dtype))
            arrays[name] = np.ascontiguousarray(value)
    return arrays


def _move_home(path: str, params: Mapping[str, Any], rules: Sequence[Rule], separator: str, known: set[str]) -> Move:
    """The move that a leaf came by: the first whose arrays are of the known names, or else the first."""
    every = list(_moves_home(path, params, rules, separator, known))
    if not every:
        return Move((path,), (path,), _matching_steps(path, rules))
    return next((move for move in every if known.issuperset(move.names)), every[0])


def _moves_home(
    path: str, params: Mapping[str, Any], rules: Sequence[Rule], separator: str, known: Collection[str]
) -> Iterator[Move]:
    """The moves of all rules that give a leaf of this path."""
    for rule in rules:
        for i, pattern in enumerate(rule.to if rule.renames else ()):
            match = _leaf_expression(pattern).fullmatch(path)
            if not match or (_is_of_several(rule) and match["rest"]):
                continue
            stars = _moved_back(pattern, match.groups()[:-1])
            if stars is None:
                continue
            rest = (match["rest"] or "").replace("/", separator)
            kinds = [step.kind for step in rule.steps]
            names = [_filled(source, stars, rule, path) + rest for source in rule.sources]
            if "join" not in kinds:
                others = names if "split" in kinds else names[i :: len(rule.to)]
                names = [next((name for name in others if name in known), others[0])]
            leaves = tuple(_filled(to, stars, rule, path) for to in rule.to) if "split" in kinds else (path,)
            if missing := [leaf for leaf in leaves if leaf not in params]:
                raise InputError(f"{rule.shown} joins '{path}' and '{missing[0]}', and the model has no '{missing[0]}'")
            yield Move(tuple(names), leaves, rule.steps or _matching_steps(names[0], rules), rule=rule)


def _matching_steps(name: str, rules: Sequence[Rule]) -> tuple[Step, ...]:
    """The steps of the last rule that has some and applies to an array, and is not of several."""
    steps = [rule.steps for rule in rules if rule.steps and not _is_of_several(rule) and _match(rule, name)]
    return steps[-1] if steps else ()


@functools.lru_cache(maxsize=4096)
def _leaf_expression(pattern: str) -> re.Pattern[str]:
    """A pattern of leaves as a regular expression: a group for each star, and `rest`."""
    pieces, end = [], 0
    for star in STAR.finditer(pattern):
        any_text = "([0-9]+)" if star[2] else "(.+)" if star[1] == "**" else "([^/]+)"
        pieces += [re.escape(pattern[end : star.start()]), any_text]
        end = star.end()
    return re.compile(f"{''.join(pieces)}{re.escape(pattern[end:])}(?P<rest>/.*)?")


def _moved_back(pattern: str, stars: Sequence[str]) -> tuple[str, ...] | None:
    """What the stars were in the name of the array; None where one would be below 0."""
    values: list[str] = []
    for star, value in zip(STAR.finditer(pattern), stars, strict=True):
        if star[2] is None:
            values.append(value)
        elif int(value) - int(star[2]) < 0:
            return None
        else:
            values.append(str(int(value) - int(star[2])))
    return tuple(values)


def _home(move: Move, values: list[np.ndarray]) -> list[np.ndarray]:
    """The leaves of a move as its arrays."""
    for step in reversed(move.steps):
        if step.kind == "split":
            values = [np.concatenate(values, axis=step.value)]
        elif step.kind == "join":
            length = values[0].shape[step.value]
            if length % len(move.names):
                raise InputError(
                    f"{move.shown}: leaf '{move.leaves[0]}' {list(values[0].shape)} has no way back into "
                    f"{len(move.names)} arrays of unknown lengths"
                )
            values = list(np.split(values[0], len(move.names), axis=step.value))
        elif step.kind == "transpose":
            values = [value.transpose(np.argsort(step.value) if step.value else None) for value in values]
        elif step.kind == "reshape":
            shape: Shape = step.value
            values = [
                value.reshape([math.prod(value.shape[i] for i in group) for group in shape.groups or ()])
                for value in values
            ]
    return values
