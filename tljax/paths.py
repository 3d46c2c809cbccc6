"""Names of leaves: the path of each, and rules that match paths.

Masks, grafts, penalties and checkpoints all name leaves, by these rules and no others.
"""

import re
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tljax.plugins import nearest
from tljax.types import InputError


def names(tree: Any) -> list[str]:
    """The path of each leaf, such as 'head/kernel', in the order of `jax.tree.leaves`.

    Raises InputError where two leaves have one path (a key that contains '/').

    >>> names({"head": {"kernel": 1.0, "bias": 0.0}})
    ['head/bias', 'head/kernel']
    """
    leaf_paths = [_name(path) for path, _ in _walked(jax.tree_util.tree_leaves_with_path, tree)]
    seen: set[str] = set()
    for path in leaf_paths:
        if path in seen:
            raise InputError(f"two leaves are named '{path}': rename the key that contains '/'")
        seen.add(path)
    return leaf_paths


def _walked(walk: Callable[[Any], Any], tree: Any) -> Any:
    """The result of walk(tree). Raises InputError if the tree holds itself or is nested too deep."""
    try:
        return walk(tree)
    except (RecursionError, SystemError) as error:  # JAX's compiled code turns the first into the second
        raise InputError("a tree holds itself, or is nested too deep: make one with an end") from error


def items(tree: Any, *rest: Any) -> Iterator[tuple[Any, ...]]:
    """(path, leaf, ...) of each leaf, over trees of one structure.

    Raises InputError where two leaves have one path.

    >>> list(items({"head": {"bias": 0.0}}, {"head": {"bias": True}}))
    [('head/bias', 0.0, True)]
    """
    return zip(names(tree), *map(jax.tree.leaves, (tree, *rest)), strict=True)


def _name(path: tuple[Any, ...]) -> str:
    """JAX's path of a leaf as text: names separated by '/'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def each(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """The tree of function(path, leaf, ...) over trees of one structure."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(_name(path), *leaves), tree, *rest)


def glob(pattern: str) -> Callable[[str], bool]:
    """The predicate of a pattern: `*` and `?` within one name, `**` for any number of names, {a,b} for either.

    A path is read once, whatever the pattern: no row of stars makes it slow. Raises InputError for a brace that is
    not closed, and for more than 1,000 alternatives.

    >>> [glob("**/bias")(path) for path in ("bias", "a/b/bias", "a/kernel")]
    [True, True, False]
    >>> [glob("{head,body/*}/bias")(path) for path in ("head/bias", "body/0/bias", "body/bias")]
    [True, True, False]
    """
    alternatives = [_automaton(text) for text in expanded(pattern)]
    return lambda path: any(_accepts(tokens, path) for tokens in alternatives)


MOST_ALTERNATIVES = 1000
"""The most patterns that the braces of one pattern may stand for: more are a slip of the pen, not a rule."""


def expanded(pattern: str) -> list[str]:
    """The patterns that the braces of a pattern stand for; inner braces are expanded first.

    >>> expanded("{q,{k,v}x}/w")
    ['q/w', 'kx/w', 'vx/w']
    """
    patterns = [pattern]
    while any("{" in text or "}" in text for text in patterns):
        expanded: list[str] = []
        for text in patterns:
            inner = re.search(r"\{([^{}]*)\}", text)
            if inner:
                expanded += [text[: inner.start()] + part + text[inner.end() :] for part in inner[1].split(",")]
            elif "{" in text or "}" in text:
                raise InputError(f"pattern '{pattern}': a brace is not closed; write {{a,b}} for either of two")
            else:
                expanded.append(text)
        patterns = list(dict.fromkeys(expanded))
        if len(patterns) > MOST_ALTERNATIVES:
            raise InputError(f"pattern '{pattern}' stands for more than {MOST_ALTERNATIVES:,} patterns: write fewer")
    return patterns


class _Token(NamedTuple):
    """A state of the automaton of a pattern: it may stay on a character, leave on one, or be skipped."""

    stay: str
    """'name' on any character but '/', 'all' on any, '' on none."""
    leave: str
    """The character on which it goes on to the next; '?' for any but '/', '' for none."""
    skip: int
    """How many states further it goes on without a character; 0 for not at all."""


def _automaton(pattern: str) -> list[_Token]:
    """The states of a pattern, a nondeterministic automaton (Thompson 1968, "Regular expression search algorithm")."""
    tokens: list[_Token] = []
    for piece in re.split(r"(\*\*+/|\*\*+|\*|\?)", pattern):
        if piece.startswith("**") and piece.endswith("/"):
            # '**/' is nothing at all, or any names and the '/' after them: only the second state may stay.
            tokens += [_Token("", "", 2), _Token("all", "/", 0)]
        elif piece.startswith("**"):
            tokens.append(_Token("all", "", 1))
        elif piece == "*":
            tokens.append(_Token("name", "", 1))
        else:
            tokens += [_Token("", character if piece != "?" else "?", 0) for character in piece]
    return tokens


def _accepts(tokens: Sequence[_Token], path: str) -> bool:
    """Whether the automaton reads a path to its end: the set of states that it may be in is carried along the path."""

    def reached(states: Iterable[int]) -> set[int]:
        visited: set[int] = set()
        for state in states:
            while state not in visited:
                visited.add(state)
                if state < len(tokens) and (skip := tokens[state].skip):
                    if skip == 2:  # '**/' may be skipped, or entered
                        visited.add(state + 1)
                    state += skip
        return visited

    states = reached([0])
    for character in path:
        following: list[int] = []
        for state in states:
            if state < len(tokens):
                token = tokens[state]
                if token.stay == "all" or (token.stay == "name" and character != "/"):
                    following.append(state)
                if token.leave == character or (token.leave == "?" and character != "/"):
                    following.append(state + 1)
        states = reached(following)
    return len(tokens) in states


def inside(prefixes: Iterable[str]) -> Callable[[str], bool]:
    """The predicate of path prefixes, which are whole names: 'head' does not hold 'head_2/bias'."""
    prefixes = tuple(prefixes)
    return lambda path: any(path == p or path.startswith(p + "/") for p in prefixes)


def require_globs(tree: Any, patterns: Iterable[str]) -> None:
    """Raise InputError, with the nearest paths, if a pattern matches no leaf."""
    leaf_paths = list(dict.fromkeys([*unboxed_names(tree), *names(tree)]))
    for pattern in patterns:
        if not any(test(path) for test in map(glob, forms(pattern)) for path in leaf_paths):
            raise InputError(f"pattern '{pattern}' matches no leaf{nearest(pattern.replace('*', ''), leaf_paths)}")


def forms(pattern: str) -> tuple[str, ...]:
    """A pattern as it is and, where it ends in the `/value` of a boxed leaf, also without that.

    >>> forms("**/kernel/value"), forms("**/bias")
    (('**/kernel/value', '**/kernel'), ('**/bias',))
    """
    return (pattern, pattern.removesuffix("/value")) if pattern.endswith("/value") else (pattern,)


def require_prefixes(tree: Any, prefixes: Iterable[str]) -> None:
    """Raise InputError, with the nearest prefixes, if a prefix holds no leaf."""
    leaf_paths = names(tree)
    for prefix in prefixes:
        if not any(map(inside((prefix,)), leaf_paths)):
            prefixes_of_leaves = {path[: match.start()] for path in leaf_paths for match in re.finditer("/|$", path)}
            raise InputError(f"prefix '{prefix}' holds no leaf{nearest(prefix, prefixes_of_leaves)}")


_STATISTIC = re.compile(r"batch_stats|(running|moving)_(mean|var|variance|std)|num_batches_tracked|ema_.*|.*_ema")
"""Names of running statistics: Linen's collection, PyTorch's and Keras's buffers, averages of parameters."""


def can_train(path: str, leaf: Any) -> bool:
    """Whether a leaf may train, by its own path and dtype: an array of floats that is not a running statistic.

    `trainable` decides by the whole tree, which says more of a leaf.

    >>> can_train("head/kernel", 1.0), can_train("norm/batch_stats/mean", 1.0), can_train("bn1.running_var", 1.0)
    (True, False, False)
    """
    statistic = any(_STATISTIC.fullmatch(name.partition(":")[0].lower()) for name in re.split("[/.]", path))
    array = hasattr(leaf, "dtype") or isinstance(leaf, float | complex)
    return array and not statistic and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def trainable(tree: Any) -> list[bool]:
    """For each leaf, in the order of `jax.tree.leaves`, whether it may train at all. This is the one rule.

    Never trained are integers; running statistics by name (`can_train`); variables of NNX that are no `nnx.Param`;
    and `mean` and `var` of a batch norm, where NNX keeps them beside `scale` and `bias`.

    >>> trainable({"bn": {"bias": np.ones(2), "mean": np.ones(2), "var": np.ones(2)}, "step": 1})
    [True, False, False, False]
    """
    rows = list(items(tree))
    parameter = _variables(tree)
    shapes = {unboxed: np.shape(leaf) for unboxed, (_, leaf) in zip(unboxed_names(tree), rows, strict=True)}
    return [
        can_train(path, leaf) and (is_param is True or (is_param is None and not _is_moment(unboxed, shapes)))
        for (path, leaf), unboxed, is_param in zip(rows, shapes, parameter, strict=True)
    ]


def _variables(tree: Any) -> list[bool | None]:
    """For each leaf, whether it is in an `nnx.Param`; None for a leaf outside variables of NNX."""
    nnx = sys.modules.get("flax.nnx")  # a caller with variables has imported it; importing it takes two seconds
    if nnx is None:
        return [None] * len(jax.tree.leaves(tree))
    flags: list[bool | None] = []
    for node in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, nnx.Variable)):
        is_param = isinstance(node, nnx.Param) if isinstance(node, nnx.Variable) else None
        flags += [is_param] * len(jax.tree.leaves(node))
    return flags


def _is_moment(path: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a leaf is the running mean or variance of a norm.

    It is if its container holds both, of one shape, and either a scale or bias of that shape or the name of a norm.
    """
    container, _, name = path.rpartition("/")
    if name not in ("mean", "var"):
        return False
    siblings = [f"{container}/{sibling}" if container else sibling for sibling in ("mean", "var", "scale", "bias")]
    mean, var, scale, bias = (shapes.get(sibling) == shapes[path] for sibling in siblings)
    return mean and var and (scale or bias or is_norm(container.rpartition("/")[2]))


def is_norm(name: str) -> bool:
    """Whether a container's name is that of a normalisation layer.

    >>> [is_norm(name) for name in ("LayerNorm_0", "bn1", "ln_2", "preBN", "normalised_mlp", "abnormal", "lnk")]
    [True, True, True, True, True, False, False]
    """
    words = re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return re.search(r"norm(?!al($|[^i]))|(?<![a-z])([blgi]n|grn|rms)(?![a-z])", words) is not None


def unboxed_names(tree: Any) -> list[str]:
    """The path of each leaf, without the `value` of its box: a variable of NNX, `nn.Partitioned`.

    >>> unboxed_names({"head": {"kernel": 1.0, "value": 0.0}})
    ['head/kernel', 'head/value']
    """
    leaf_paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    short = [_name(_unboxed(path)) for path in leaf_paths]
    return short if len(set(short)) == len(short) else [_name(path) for path in leaf_paths]


def _unboxed(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """JAX's path of a leaf without the attribute `value` at its end."""
    boxed = path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value"
    return path[:-1] if boxed else path


def placed(tree: Any, like: Any) -> Any:
    """The leaves of `tree` in the structure of `like`, by path, or None where the paths differ.

    Containers (a FrozenDict for a dict) and boxes (`nn.Partitioned`, variables of NNX) need not be the same. `like`
    may have None where `tree` has leaves, as gradients of the trained part have.

    >>> placed({"a": True, "b": {"c": False}}, {"a": 1.0, "b": None}), placed({"a": True}, {"b": 1.0})
    ({'a': True, 'b': None}, None)
    """
    slots, structure = jax.tree_util.tree_flatten_with_path(like, is_leaf=_is_none)
    tree_structure: Any = jax.tree.structure(tree)
    if tree_structure == structure:
        return tree
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_none)
    for short in (_same, _unboxed):
        names = [_name(short(path)) for path, _ in slots]
        by_name = {_name(short(path)): leaf for path, leaf in leaves}
        filled = {name for name, (_, leaf) in zip(names, slots, strict=True) if leaf is not None}
        within_empty = inside(set(names) - filled)
        unique = len(set(names)) == len(names) and len(by_name) == len(leaves)
        if unique and filled <= set(by_name) and all(within_empty(name) for name in set(by_name) - filled):
            return jax.tree.unflatten(structure, [by_name.get(name) for name in names])
    return None


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _same(path: tuple[Any, ...]) -> tuple[Any, ...]:
    return path


def same_structure(expected: Any, actual: Any, expected_name: str, actual_name: str) -> None:
    """Raise InputError, with the paths, unless both trees are the same but for their leaves."""
    if _walked(jax.tree.structure, expected) == _walked(jax.tree.structure, actual):
        return
    missing = sorted(set(names(expected)) - set(names(actual)))
    extra = sorted(set(names(actual)) - set(names(expected)))
    differences = [f"{some(missing)} only in {expected_name}"] if missing else []
    differences += [f"{some(extra)} only in {actual_name}"] if extra else []
    what = "; ".join(differences) or "their containers differ (a list for a tuple, say)"
    raise InputError(f"{actual_name} and {expected_name} are different trees: {what}; make one from the other")


def some(names: list[str], most: int = 6) -> str:
    """The first `most` of the names, quoted, and how many more there are, for a message."""
    first = ", ".join(f"'{name}'" for name in names[:most])
    return first + (f" and {len(names) - most} more" if len(names) > most else "")


def folded(rows: Sequence[tuple[str, Hashable]]) -> list[tuple[str, list[int]]]:
    """Fold rows of a table whose paths differ in one number alone, and in nothing else, into one row.

    `rows` are (path, all else that a row says). Returns (path, indices of the rows), in the order of their first row;
    numbers that were folded are in braces, `{0..3}` where none is missing, so that nothing is lost.

    >>> folded([("block_0/kernel", 8), ("block_1/kernel", 8), ("block_2/kernel", 8), ("head/kernel", 2)])
    [('block_{0..2}/kernel', [0, 1, 2]), ('head/kernel', [3])]
    >>> folded([("block_0/bias", "frozen"), ("block_1/bias", "trained"), ("block_3/bias", "frozen")])
    [('block_{0,3}/bias', [0, 2]), ('block_1/bias', [1])]
    """
    entries = [(tuple(re.split(r"([0-9]+)", path)), rest, [i]) for i, (path, rest) in enumerate(rows)]
    for position in range(1, max((len(parts) for parts, _, _ in entries), default=0), 2):
        groups: dict[Hashable, list[Any]] = {}
        for i, entry in enumerate(entries):
            parts, rest, _ = entry
            key = (parts[:position], parts[position + 1 :], rest) if position < len(parts) else i
            groups.setdefault(key, []).append(entry)
        entries = []
        for members in groups.values():
            parts, rest, _ = members[0]
            if len(members) > 1:
                number = _numbers([member[0][position] for member in members])
                parts = (*parts[:position], number, *parts[position + 1 :])
            entries.append((parts, rest, sorted(i for member in members for i in member[2])))
    return [("".join(parts), indices) for parts, _, indices in entries]


def _numbers(texts: Sequence[str]) -> str:
    """Several numbers as one text in braces.

    >>> _numbers(["2", "0", "1"]), _numbers(["1", "3"]), _numbers(["0", "1"])
    ('{0..2}', '{1,3}', '{0,1}')
    """
    ordered = sorted(texts, key=lambda text: (int(text), text))
    least, most = int(ordered[0]), int(ordered[-1])
    whole = len(ordered) > 2 and ordered == [str(number) for number in range(least, most + 1)]
    return f"{{{least}..{most}}}" if whole else f"{{{','.join(ordered)}}}"
