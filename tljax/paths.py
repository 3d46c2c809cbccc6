"""Names of leaves: the path of each, and rules that match paths.

Masks, grafts, penalties and checkpoints all name leaves, by these rules and no others.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

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
    """The predicate of a pattern: `*` and `?` within one name, `**` for any number of names, {a,b} for either.

    A path is read once, whatever the pattern: no row of stars makes it slow. Raises InputError for a brace that is
    not closed, and for more than 1,000 alternatives.

    >>> [glob("**/bias")(path) for path in ("bias", "a/b/bias", "a/kernel")]
    [True, True, False]
    >>> [glob("{head,body/*}/bias")(path) for path in ("head/bias", "body/0/bias", "body/bias")]
    [True, True, False]
    """
    alternatives = [_automaton(text) for text in _expanded(pattern)]
    return lambda path: any(_accepts(tokens, path) for tokens in alternatives)


MOST_ALTERNATIVES = 1000
"""Patterns that the braces of one may stand for: beyond is a slip, not a rule."""


def _expanded(pattern: str) -> list[str]:
    """The patterns that the braces of a pattern stand for, inner ones first.

    >>> _expanded("{q,{k,v}x}/w")
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
            # Nothing at all, or any names and the '/' after them: only what went in by the second state may stay.
            tokens += [_Token("", "", 2), _Token("all", "/", 0)]
        elif piece.startswith("**"):
            tokens.append(_Token("all", "", 1))
        elif piece == "*":
            tokens.append(_Token("name", "", 1))
        else:
            tokens += [_Token("", character if piece != "?" else "?", 0) for character in piece]
    return tokens


def _accepts(tokens: Sequence[_Token], path: str) -> bool:
    """Whether a path is read to its end: the set of states that can be reached is carried along it."""

    def reached(states: Iterable[int]) -> set[int]:
        known: set[int] = set()
        for state in states:
            while state not in known:
                known.add(state)
                if state < len(tokens) and (skip := tokens[state].skip):
                    if skip == 2:  # '**/' may be skipped, or entered
                        known.add(state + 1)
                    state += skip
        return known

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
