"""`check_optimizer`: the promises of a masked optimizer, proven for any optimizer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tljax import masks, optimizer, paths, penalties
from tljax.audit.lines import Check, changed, line
from tljax.types import Mask, Params

Wrap = Callable[[optax.GradientTransformation, Mask], optax.GradientTransformation]


def check_optimizer(
    tx: optax.GradientTransformation, *, wrap: Wrap = optimizer.masked, penalty: str = "", steps: int = 4
) -> list[Check]:
    """The checks of `wrap(tx, mask)` on a small model, a line each; the loss includes `penalty`.

    `wrap` is `optimizer.masked`, or your own to prove. The model has frozen leaves of -0.0, NaN and infinity, an
    integer and a None. An error that `tx` itself raises passes through.

    >>> [check.passed for check in check_optimizer(optax.adam(0.1))]
    [True, True, True, True, True]
    """
    params, mask = _params(), masks.by_glob(_params(), "body/kernel", "head/bias")
    wrapped = wrap(tx, mask)
    traced: list[str] = []
    step = _step(wrapped, mask, penalty, traced)

    def run(disturbance: float) -> list[Params]:
        """The parameters after each step. Frozen leaves are put back before the next, so that a fault stays one."""
        seen, state = [params], wrapped.init(params)
        for _ in range(steps):
            start = masks.join(masks.split(seen[-1], mask)[0], masks.split(params, mask)[1])
            updates, state = step(start, state, disturbance)
            seen.append(jax.tree.map(_added, start, updates))
        return seen

    plain, loud, spoilt = (run(disturbance) for disturbance in (0.0, 1e30, float("nan")))
    return [
        line("frozen leaves own no state", _stateless, wrap, tx, params, mask),
        line("frozen leaves keep their bytes", _still, plain, mask),
        line("gradients of frozen leaves are unseen", _unseen, plain[-1], (loud[-1], spoilt[-1]), mask),
        line("trained leaves move", _moved, params, plain[-1], mask),
        line("nothing compiles twice", _once, traced, 3 * steps),
    ]


def _added(leaf: Any, update: Any) -> np.ndarray:
    """The sum of a leaf and its update, by NumPy, so that every change of a bit is seen.

    `optimizer.apply` passes frozen leaves by, XLA drops an addition of 0.0, which turns -0.0 into 0.0, and a GPU
    changes a NaN's payload.
    """
    whole = np.asarray(leaf)
    with np.errstate(all="ignore"):
        return (whole + np.asarray(update)).astype(whole.dtype)


def _params() -> Params:
    rng = np.random.default_rng(0)
    return {
        "body": {"kernel": rng.standard_normal((3, 4), np.float32), "bias": np.array([-0.0, 1, 0, -2], np.float32)},
        "head": {"kernel": rng.standard_normal((4, 2), np.float32), "bias": rng.standard_normal(2, np.float32)},
        "odd": np.array([-0.0, np.nan, np.inf], np.float32),
        "nothing": None,
        "count": np.int32(7),
    }


def _step(
    wrapped: optax.GradientTransformation, mask: Mask, penalty: str, traced: list[str]
) -> Callable[..., tuple[Params, Any]]:
    """Make the jitted step: (params, state, disturbance of the frozen gradients) -> (updates, state)."""
    terms, weights = penalties.read(penalty)
    floats = masks.by_path(_params(), lambda path: True)

    def value(learnt: Params) -> jax.Array:
        x = jnp.linspace(-1.0, 1.0, 15).reshape(5, 3)
        hidden = jnp.tanh(x @ learnt["body"]["kernel"] + learnt["body"]["bias"][None])
        total = jnp.square(hidden @ learnt["head"]["kernel"] + learnt["head"]["bias"][None] - 1).mean()
        trained, _ = masks.split(learnt, mask)
        for term, numbers in zip(terms, weights, strict=True):
            total += penalties.on_leaves(term, numbers, trained, None, None, {})
        return total

    @jax.jit
    def step(params: Params, state: Any, disturbance: Any) -> tuple[Params, Any]:
        traced.append("step")  # runs when JAX traces, which it does for each compilation
        learnt, rest = masks.split(params, floats)
        seen, unseen = masks.split(jax.grad(value)(learnt), mask)
        unseen = jax.tree.map(lambda g: g + disturbance, unseen)
        gradients = masks.join(masks.join(seen, unseen), jax.tree.map(jnp.zeros_like, rest))
        return wrapped.update(gradients, state, params)

    return step


def _stateless(wrap: Wrap, tx: optax.GradientTransformation, params: Params, mask: Mask) -> str:
    """Check that the state is that of parameters without the frozen leaves."""
    alone = jax.tree.map(lambda m, leaf: leaf if m else None, mask, params)
    without = wrap(tx, jax.tree.map(lambda m: True if m else None, mask)).init(alone)
    whole = wrap(tx, mask).init(params)
    size, least = (sum(np.size(leaf) for leaf in jax.tree.leaves(state)) for state in (whole, without))
    shapes, wanted = (sorted(np.shape(leaf) for leaf in jax.tree.leaves(state)) for state in (whole, without))
    assert shapes == wanted, f"{size} numbers of state, where the trained leaves alone have {least}"
    return f"{size} numbers of state, as for the trained leaves alone"


def _still(seen: list[Params], mask: Mask) -> str:
    parts = [masks.split(tree, mask)[1] for tree in seen]
    for step, part in enumerate(parts):
        moved = changed(parts[0], part)
        assert not moved, f"frozen, but changed in step {step}: {paths.some(moved)}"
    return paths.some(paths.names(parts[0]))


def _unseen(plain: Params, disturbed: tuple[Params, ...], mask: Mask) -> str:
    trained = masks.split(plain, mask)[0]
    for number, tree in zip(("1e30", "NaN"), disturbed, strict=True):
        moved = changed(trained, masks.split(tree, mask)[0])
        assert not moved, f"{number} in the gradients of frozen leaves changes {paths.some(moved)}"
    return "1e30 and NaN in them change no bit"


def _moved(before: Params, after: Params, mask: Mask) -> str:
    parts = [masks.split(tree, mask)[0] for tree in (before, after)]
    stuck = sorted(set(paths.names(parts[0])) - set(changed(*parts)))
    assert not stuck, f"trained, but unchanged: {paths.some(stuck)}"
    broken = [path for path, leaf in paths.items(parts[1]) if not np.isfinite(leaf).all()]
    assert not broken, f"not finite any more: {paths.some(broken)}"
    return paths.some(paths.names(parts[0]))


def _once(traced: list[str], steps: int) -> str:
    assert len(traced) == 1, f"{len(traced)} compilations in {steps} steps"
    return f"1 compilation in {steps} steps"
