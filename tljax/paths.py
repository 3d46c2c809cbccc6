"""Names of leaves: the path of each, and rules that match paths.

Masks, grafts, penalties and checkpoints all name leaves, by these rules and no others.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from tljax.plugins import nearest
from tljax.types import InputError


def names(tree: Any) -> list[str]:
    """The path of each leaf, such as 'head/kernel', in the order of `jax.tree.leaves`.

    Raises InputError where two leaves have one path (a key that contains '/').

    >>> names({"head": {"kernel": 1.0, "bias": 0.0}})
    ['head/bias', 'head/kernel']
    """
    found = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    seen: set[str] = set()
    for path in found:
        if path in seen:
            raise InputError(f"two leaves are named '{path}': rename the key that contains '/'")
        seen.add(path)
    return found


def items(tree: Any, *rest: Any) -> Iterator[tuple[Any, ...]]:
    """(path, leaf, ...) of each leaf, over trees of one structure; raises InputError as `names` does.

    >>> list(items({"head": {"bias": 0.0}}, {"head": {"bias": True}}))
    [('head/bias', 0.0, True)]
    """
    return zip(names(tree), *map(jax.tree.leaves, (tree, *rest)), strict=True)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def each(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """The tree of function(path, leaf, ...) over trees of one structure."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(_name(path), *leaves), tree, *rest)


def glob(pattern: str) -> Callable[[str], bool]:
    """The predicate of a pattern: `*` and `?` within one name, `**` for any number of names.

    >>> [glob("**/bias")(path) for path in ("bias", "a/b/bias", "a/kernel")]
    [True, True, False]
    """
    regex = "".join(
        {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(piece, re.escape(piece))
        for piece in re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    )
    return lambda path: re.fullmatch(regex, path) is not None


def inside(prefixes: Iterable[str]) -> Callable[[str], bool]:
    """The predicate of path prefixes: whole names, so that 'head' does not hold 'head_2/bias'."""
    prefixes = tuple(prefixes)
    return lambda path: any(path == p or path.startswith(p + "/") for p in prefixes)


def require_globs(tree: Any, patterns: Iterable[str]) -> None:
    """Raise InputError for a pattern that matches no leaf, with the nearest paths."""
    known = names(tree)
    for pattern in patterns:
        if not any(map(glob(pattern), known)):
            raise InputError(f"pattern '{pattern}' matches no leaf{nearest(pattern.replace('*', ''), known)}")


def require_prefixes(tree: Any, prefixes: Iterable[str]) -> None:
    """Raise InputError for a prefix that holds no leaf, with the nearest prefixes."""
    known = names(tree)
    for prefix in prefixes:
        if not any(map(inside((prefix,)), known)):
            places = {path[: match.start()] for path in known for match in re.finditer("/|$", path)}
            raise InputError(f"prefix '{prefix}' holds no leaf{nearest(prefix, places)}")


def can_train(path: str, leaf: Any) -> bool:
    """Whether a leaf may train at all: not if it is None or of integers, nor a running statistic.

    >>> can_train("head/kernel", 1.0), can_train("norm/batch_stats/mean", 1.0), can_train("step", 1)
    (True, False, False)
    """
    statistic = "batch_stats" in path.split("/")
    return leaf is not None and not statistic and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def same_structure(expected: Any, found: Any, expected_name: str, found_name: str) -> None:
    """Raise InputError, with the paths, unless both trees are the same but for their leaves."""
    one: Any = jax.tree.structure(expected)
    if one == jax.tree.structure(found):
        return
    there, here = set(names(expected)), set(names(found))
    differences = [f"{some(sorted(there - here))} only in {expected_name}"] if there - here else []
    differences += [f"{some(sorted(here - there))} only in {found_name}"] if here - there else []
    what = "; ".join(differences) or "their containers differ (a list for a tuple, say)"
    raise InputError(f"{found_name} and {expected_name} are different trees: {what}; make one from the other")


def some(names: list[str], most: int = 6) -> str:
    """The first of the names, quoted, for a message."""
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
