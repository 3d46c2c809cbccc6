"""Penalties: the terms of R in the objective mean L + lambda R(w). They cover what trains, and are plug-ins.

A penalty is a function of the leaves that train and that its option `on`, a glob, covers:

    def penalty(leaves, *, weight):  # Sequence[Leaf] -> a scalar
        return weight * sum(jnp.square(leaf.value).sum() for leaf in leaves)

Saved as mine.py it is 'mine.py:penalty:weight=0.1'. Every option is keyword-only, a number of at least 0, and passed
when the step is computed, so that another value compiles nothing new; `weight` is one of them, and 0 leaves the penalty
out. What a penalty reads beside the values of its leaves it names in `needs`:

- `@needs("start")`: `leaf.start`, the leaf's value when the fit began;
- `@needs("fisher")`: `leaf.fisher`, the source's Fisher information of the leaf; a fit without it is refused;
- `@needs("features")`: the penalty is a function of features, not of leaves, and has no option `on`:

      @needs("features")
      def penalty(features, mask, count, *, weight):  # -> a scalar

  `features` has for each stage that trains, but the head, a pair of arrays [batch, ...]: what the stage gives now, and
  what it gave at the start in evaluation. `mask` float [batch] is 0 for padding, and `count` is the number of examples
  of the whole batch, of which these may be a part: divide a sum over the examples by it.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tljax import paths, plugins
from tljax.types import InputError, Params

Function = Callable[..., jax.Array]
"""(leaves, *, weight, ...) -> scalar; or, of features, (features, mask, count, *, weight, ...) -> scalar."""


class Leaf(NamedTuple):
    """A trained leaf as a penalty sees it."""

    value: jax.Array
    start: Any
    """Its value when the fit began: the source's, unless it is fresh. None if the penalty does not need it."""
    fisher: Any
    """The source's Fisher information of it. None if the penalty does not need it, and for a fresh leaf."""
    fresh: bool
    """Whether the graft drew it anew; known where the penalty needs the start."""


NEEDS = ("start", "fisher", "features")
"""What a penalty may need beside the values of the leaves."""


def needs(*names: str) -> Callable[[Function], Function]:
    """A decorator that says what a penalty needs; raises InputError for a name that is not one of `NEEDS`.

    >>> needs("start", "fisher")(lambda leaves, *, weight: weight).needs
    ('start', 'fisher')
    """
    for name in names:
        if name not in NEEDS:
            raise InputError(f"penalties need no '{name}'{plugins.nearest(name, NEEDS)}")

    def marked(function: Function) -> Function:
        function.needs = names  # type: ignore[attr-defined]
        return function

    return marked


def l2(leaves: Sequence[Leaf], *, weight: Any) -> jax.Array:
    """weight/2 sum w^2, so that its gradient is weight w and, under SGD, it is a weight decay.

    >>> float(l2([Leaf(jnp.array([3.0, 4.0]), None, None, False)], weight=1.0))
    12.5
    """
    return weight / 2 * _sum(_squares(leaf.value) for leaf in leaves)


def l1(leaves: Sequence[Leaf], *, weight: Any) -> jax.Array:
    """weight sum |w|, whose gradient is weight sign(w).

    >>> float(l1([Leaf(jnp.array([3.0, -4.0]), None, None, False)], weight=1.0))
    7.0
    """
    return weight * _sum(jnp.abs(leaf.value).sum() for leaf in leaves)


@needs("start")
def l2_sp(leaves: Sequence[Leaf], *, weight: Any, beta: Any = 0.01) -> jax.Array:
    """weight/2 sum (w - source)^2 over copied leaves, plus beta/2 sum w^2 over fresh ones.

    Source: Li et al. 2018, "Explicit inductive bias for transfer learning", arXiv:1802.01483, eq. 2.
    """
    copied = _sum(_squares(leaf.value - leaf.start) for leaf in leaves if not leaf.fresh)
    return weight / 2 * copied + beta / 2 * _sum(_squares(leaf.value) for leaf in leaves if leaf.fresh)


@needs("start", "fisher")
def ewc(leaves: Sequence[Leaf], *, weight: Any) -> jax.Array:
    """weight/2 sum F (w - source)^2 over copied leaves, F the diagonal of the source's Fisher information.

    Source: Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting", arXiv:1612.00796, eq. 3.
    """
    copied = [leaf for leaf in leaves if not leaf.fresh]
    return weight / 2 * _sum((leaf.fisher * jnp.square(leaf.value - leaf.start)).sum() for leaf in copied)


@needs("features")
def behaviour(
    features: Sequence[tuple[jax.Array, jax.Array]], mask: jax.Array, count: Any, *, weight: Any
) -> jax.Array:
    """weight/2 the squared distance of features to the source's, summed over stages, mean over the batch.

    Source: Li et al. 2019, "DELTA", arXiv:1901.09229, eq. 4, without its channel attention.
    """
    total = jnp.zeros_like(mask)
    for now, then in features:
        total += jnp.square(now - then).reshape(len(mask), -1).sum(-1)
    return weight / 2 * jnp.vdot(total, mask) / count


def _squares(leaf: jax.Array) -> jax.Array:
    return jnp.square(jnp.abs(leaf)).sum()


def _sum(values: Any) -> jax.Array:
    return sum(values, start=jnp.zeros(()))


SHIPPED: dict[str, Function] = {f.__name__: f for f in (l2, l1, l2_sp, ewc, behaviour)}
"""The penalties of tljax by name."""


class Penalty(NamedTuple):
    """A term of R without its weights, which are passed when it is computed and may be traced. Hashable."""

    name: str
    """As tables and curves have it: that of a shipped penalty, or of the file or module of another."""
    function: Function
    on: str = "**"
    """The glob of the leaves that it covers."""

    @property
    def needs(self) -> tuple[str, ...]:
        """What it needs beside the values of the leaves: names of `NEEDS`."""
        return getattr(self.function, "needs", ())

    @property
    def needs_start(self) -> bool:
        """Whether it refers to where the fit began."""
        return not {"start", "features"}.isdisjoint(self.needs)


def read(text: str) -> tuple[tuple[Penalty, ...], tuple[dict[str, float], ...]]:
    """The terms that a text names, with commas between them, and their weights; a weight of 0 builds no term.

    A name is one of `SHIPPED`, 'package.module:attribute' or 'FILE.py:attribute'. Two calls with one text give equal
    terms, unless the file was edited, so that equal fits share an executable. Raises InputError for an unknown penalty
    or option, and for a weight that is negative, not finite or missing.

    >>> terms, weights = read("l2:weight=1e-4:on=head/**")
    >>> terms[0].name, terms[0].on, weights
    ('l2', 'head/**', ({'weight': 0.0001},))
    """
    terms, weights = [], []
    for part in plugins.split(text, ",") if text else []:
        spec = plugins.parse(part)
        if "." not in spec.name and (spec.name not in SHIPPED or spec.words):
            raise InputError(f"unknown penalty '{part}'{plugins.nearest(spec.name, SHIPPED)}")
        function = _function(spec.name, spec.words, plugins.outside_digest(part, "tljax", "penalty"))
        what, options = f"penalty '{spec.name}'", dict(spec.options)
        if "features" in getattr(function, "needs", ()) and "on" in options:
            raise InputError(f"{what} has no option 'on': it is on features, from the first trained stage up")
        on = options.pop("on", "**")
        numbers = plugins.bind(_as_floats(function), options, what)
        for name, value in numbers.items():
            if not 0 <= value <= _LARGEST:
                raise InputError(f"{name} must be finite and at least 0, in float32", field="penalty", value=part)
        if numbers["weight"]:
            terms.append(Penalty(Path(spec.name).stem if spec.name.endswith(".py") else spec.name, function, on))
            weights.append(numbers)
    return tuple(terms), tuple(weights)


_LARGEST = float(np.finfo(np.float32).max)


@lru_cache(maxsize=256)
def _function(name: str, words: tuple[str, ...], digest: str) -> Function:
    """The function that a name and the words after it stand for; `digest` is that of its file."""
    spec = plugins.Spec(name, words)
    if "." not in name:
        return SHIPPED[name]
    function = plugins.attribute(spec, plugins.module(spec, "tljax", "penalty"), "penalty")
    weight = inspect.signature(function).parameters.get("weight")
    if weight is None or weight.kind is not weight.KEYWORD_ONLY:
        raise InputError(f"penalty '{name}' takes no weight: write def penalty(leaves, *, weight)")
    named = getattr(function, "needs", ())
    if "features" in named and len(named) > 1:
        raise InputError(f"penalty '{name}' needs {named}: one of features gets no leaves, so write @needs('features')")
    return function


def _as_floats(function: Function) -> Callable[..., Any]:
    """A function with the options of a penalty, each a float: what a text may give."""
    options = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]

    def floats() -> None: ...

    floats.__signature__ = inspect.Signature([p.replace(annotation=float) for p in options])  # type: ignore[attr-defined]
    return floats


def digests(text: str) -> list[str]:
    """Digests of the files of those penalties of a text that are none of tljax: an edit of one makes another fit."""
    parts = plugins.split(text, ",") if text else []
    return [digest for part in parts if (digest := plugins.outside_digest(part, "tljax", "penalty"))]


def require_scalar(term: Penalty, weights: Mapping[str, float], params: Params, fresh: Mapping[str, bool]) -> None:
    """Raise InputError if a penalty gives no scalar for the leaves of `params`, or for features of a small batch.

    It is traced, so nothing is computed. `fresh` is {path: drawn anew}.
    """
    number = jax.ShapeDtypeStruct((), jnp.float32)
    numbers = dict.fromkeys(weights, number)
    if "features" in term.needs:
        batch, mask = jax.ShapeDtypeStruct((2, 3), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
        value = jax.eval_shape(
            lambda pairs, mask, count, weights: term.function(pairs, mask, count, **weights),
            *([(batch, batch)], mask, number, numbers),
        )
    else:
        able = zip(paths.items(params), paths.trainable(params), strict=True)
        trained = {path: leaf for (path, leaf), trains in able if trains}
        start = trained if term.needs_start else None
        fisher = {path: leaf for path, leaf in trained.items() if not fresh.get(path)}
        value = jax.eval_shape(
            lambda trained, start, fisher, weights: on_leaves(term, weights, trained, start, fisher, fresh),
            *(trained, start, fisher if "fisher" in term.needs else None, numbers),
        )
    if getattr(value, "shape", None) != ():
        raise InputError(f"penalty '{term.name}' gives no scalar: return one number, such as a sum over the leaves")


def on_leaves(
    term: Penalty,
    weights: Mapping[str, Any],
    trained: Params,
    start: Params | None,
    fisher: Params | None,
    fresh: Mapping[str, bool],
) -> jax.Array:
    """The value of a penalty on the trained leaves that its glob covers.

    `start` and `fisher` are whole trees or None, `fresh` is {path: drawn anew}.
    """
    covers = paths.glob(term.on)
    starts, fishers = _by_path(start), _by_path(fisher)
    leaves = [
        Leaf(value, starts.get(path), fishers.get(path), fresh.get(path, False))
        for path, value in paths.items(trained)
        if covers(path)
    ]
    return term.function(leaves, **weights)


def _by_path(tree: Params | None) -> dict[str, jax.Array]:
    return {} if tree is None else dict(paths.items(tree))
