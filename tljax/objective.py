"""The objective: mean L + lambda R(w). L comes from optax, R is over the leaves that train."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tljax import paths, plugins
from tljax.types import InputError, Params

Loss = Callable[..., jax.Array]
"""(logits float [batch, classes], labels int [batch], smoothing=0) -> loss of each example [batch]."""

INTEGER = (
    "softmax_cross_entropy_with_integer_labels",
    "multiclass_hinge_loss",
    "multiclass_perceptron_loss",
    "multiclass_sparsemax_loss",
)
"""Losses of optax that take integer labels."""

ONE_HOT = ("softmax_cross_entropy", "poly_loss_cross_entropy", "safe_softmax_cross_entropy")
"""Losses of optax that take one-hot labels and give a number an example."""

ELEMENTWISE = ("sigmoid_binary_cross_entropy", "sigmoid_focal_loss", "squared_error", "l2_loss", "huber_loss")
"""Losses of optax that take one-hot labels and give a number a class: summed over the classes."""


def loss(name: str) -> Loss:
    """The loss that `--loss` names: one of optax, or 'package.module:attribute' with the signature of `Loss`.

    Two calls with one name give the same function, so that equal fits share an executable. Raises InputError for
    an unknown name.

    >>> loss("softmax_cross_entropy")(jnp.zeros((1, 2)), jnp.array([0])).round(4).tolist()
    [0.6930999755859375]
    """
    spec = plugins.parse(name)
    if "." in spec.name and not spec.options:
        return plugins.attribute(spec, plugins.module(spec, "optax", "loss"), "loss")
    known = INTEGER + ONE_HOT + ELEMENTWISE
    if spec.name not in known or spec.words or spec.options:
        raise InputError(f"unknown loss '{name}'{plugins.nearest(spec.name, known)}")
    return getattr(optax.losses, spec.name) if spec.name in INTEGER else _one_hot(spec.name)


@lru_cache
def _one_hot(name: str) -> Loss:
    function, elementwise = getattr(optax.losses, name), name in ELEMENTWISE

    def one_hot(logits: jax.Array, labels: jax.Array, smoothing: Any = None) -> jax.Array:
        wanted = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
        if smoothing is not None:
            wanted = optax.smooth_labels(wanted, smoothing)
        values = function(logits, wanted)
        return values.sum(-1) if elementwise else values

    return one_hot


def check_smoothing(name: str, smoothing: float) -> None:
    """Raise InputError for a label smoothing outside [0, 1), or of a loss that takes integer labels."""
    if not 0 <= smoothing < 1:
        raise InputError(f"--label_smoothing={smoothing}: it must be at least 0 and below 1")
    takes = name not in INTEGER and len(inspect.signature(loss(name)).parameters) > 2
    if smoothing and not takes:
        raise InputError(f"--label_smoothing={smoothing}: loss '{name}' takes whole labels; use one of {list(ONE_HOT)}")


class Leaf(NamedTuple):
    """A trained leaf as a penalty sees it."""

    value: jax.Array
    start: Any
    """Its value when the fit began: the source's, unless it is fresh. Or None."""
    fisher: Any
    """The source's Fisher information of it, or None."""
    fresh: bool
    """Whether the graft drew it anew."""


class Penalty(NamedTuple):
    """A term of R, less its weights, which are passed when it is computed and may be traced."""

    name: str
    on: str = "**"
    """The glob of the leaves it covers."""

    @property
    def needs_start(self) -> bool:
        """Whether it refers to where the fit began."""
        return self.name in ("l2_sp", "ewc", "behaviour")


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


def l2_sp(leaves: Sequence[Leaf], *, weight: Any, beta: Any = 0.01) -> jax.Array:
    """weight/2 sum (w - source)^2 over copied leaves, plus beta/2 sum w^2 over fresh ones.

    Source: Li et al. 2018, "Explicit inductive bias for transfer learning", arXiv:1802.01483, eq. 2.
    """
    copied = _sum(_squares(leaf.value - leaf.start) for leaf in leaves if not leaf.fresh)
    return weight / 2 * copied + beta / 2 * _sum(_squares(leaf.value) for leaf in leaves if leaf.fresh)


def ewc(leaves: Sequence[Leaf], *, weight: Any) -> jax.Array:
    """weight/2 sum F (w - source)^2 over copied leaves, F the diagonal of the source's Fisher information.

    Source: Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting", arXiv:1612.00796, eq. 3.
    """
    copied = [leaf for leaf in leaves if not leaf.fresh]
    return weight / 2 * _sum((leaf.fisher * jnp.square(leaf.value - leaf.start)).sum() for leaf in copied)


def behaviour(
    features: Sequence[tuple[jax.Array, jax.Array]], mask: jax.Array, count: Any = None, *, weight: Any
) -> jax.Array:
    """weight/2 the squared distance of features to the source's, summed over stages, mean over the batch.

    `features` has for each stage that trains, but the head, what it gives [batch, ...] now and gave at the start;
    `mask` float [batch] is 0 for padding; `count` is the number of examples where these are a part of the batch.
    Source: Li et al. 2019, "DELTA", arXiv:1901.09229, eq. 4, without its channel attention.
    """
    total = jnp.zeros_like(mask)
    for now, then in features:
        total += jnp.square(now - then).reshape(len(mask), -1).sum(-1)
    return weight / 2 * jnp.vdot(total, mask) / (mask.sum() if count is None else count)


def _squares(leaf: jax.Array) -> jax.Array:
    return jnp.square(jnp.abs(leaf)).sum()


def _sum(values: Any) -> jax.Array:
    return sum(values, start=jnp.zeros(()))


_TERMS: dict[str, Callable[..., jax.Array]] = {f.__name__: f for f in (l2, l1, l2_sp, ewc, behaviour)}


def penalties(text: str) -> tuple[tuple[Penalty, ...], tuple[dict[str, float], ...]]:
    """The terms that `--penalty` names, and their weights; a weight of 0 builds no term.

    Raises InputError for an unknown penalty or option, and for a weight that is negative, not finite or missing.

    >>> penalties("l2:weight=1e-4:on=head/**")
    ((Penalty(name='l2', on='head/**'),), ({'weight': 0.0001},))
    """
    terms, weights = [], []
    for part in plugins.split(text, ",") if text else []:
        spec = plugins.parse(part)
        if spec.name not in _TERMS or spec.words:
            raise InputError(f"unknown penalty '{part}'{plugins.nearest(spec.name, _TERMS)}")
        what, own = f"penalty '{spec.name}'", dict(spec.options)
        if spec.name == "behaviour" and "on" in own:
            raise InputError(f"{what} has no option 'on': it is on features, from the first trained stage up")
        on = own.pop("on", "**")
        numbers = plugins.bind(_as_floats(_TERMS[spec.name]), own, what)
        for name, value in numbers.items():
            if not 0 <= value <= _LARGEST:
                raise InputError(f"--penalty={part}: {name} must be finite and at least 0, in float32")
        if numbers["weight"]:
            terms.append(Penalty(spec.name, on))
            weights.append(numbers)
    return tuple(terms), tuple(weights)


_LARGEST = float(np.finfo(np.float32).max)


def _as_floats(term: Callable[..., jax.Array]) -> Callable[..., Any]:
    """A function with the options of a term, each a float: what a flag may give."""
    options = [p for p in inspect.signature(term).parameters.values() if p.kind is p.KEYWORD_ONLY]

    def flag() -> None: ...

    flag.__signature__ = inspect.Signature([p.replace(annotation=float) for p in options])  # type: ignore[attr-defined]
    return flag


def of_leaves(
    term: Penalty,
    weights: Mapping[str, Any],
    trained: Params,
    start: Params | None,
    fisher: Params | None,
    fresh: Mapping[str, bool],
) -> jax.Array:
    """The value of a term on the trained leaves that its glob covers.

    `start` and `fisher` are whole trees or None, `fresh` is {path: drawn anew}.
    """
    test = paths.glob(term.on)
    starts, fishers = _by_name(start), _by_name(fisher)
    named = paths.items(trained)
    leaves = [Leaf(w, starts.get(n), fishers.get(n), fresh.get(n, False)) for n, w in named if test(n)]
    return _TERMS[term.name](leaves, **weights)


def _by_name(tree: Params | None) -> dict[str, jax.Array]:
    return {} if tree is None else dict(paths.items(tree))
