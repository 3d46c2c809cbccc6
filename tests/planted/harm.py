"""What a planted bug does, by numbers alone: the loop is run, and nothing is read of its program."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np

from tljax import paths


def parameters(loop, state):
    """The parameters in a state, as `audit.step` takes them."""
    if "params" in loop.options:
        return loop.options["params"](state)
    if isinstance(state, dict):
        return state.get("params", state)
    return getattr(state, "params", state[0] if isinstance(state, tuple) else state)


def leaves(tree):
    """Leaves by path, in NumPy."""
    return {path: np.asarray(jax.device_get(leaf)) for path, leaf in paths.items(tree)}


def run(loop, steps, batch=None):
    """The state after some steps; the loop's own state is not donated."""
    state = _copy(loop.state)
    for _ in range(steps):
        state = step(loop, state, batch)[0]
    return state


def _copy(state):
    """Arrays that may be donated; a Python number becomes one, lest the second step be compiled anew."""
    return jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, jax.Array) else jnp.asarray(leaf), state)


def step(loop, state, batch=None):
    """The state after a step, and the metrics, if there are any."""
    out = loop.step(state, loop.batch if batch is None else batch)
    is_pair = isinstance(out, tuple) and len(out) == 2 and jax.tree.structure(out[0]) == jax.tree.structure(state)
    return out if is_pair else (out, None)


def moved(loop, steps=3):
    """The paths of frozen leaves, or leaves with frozen elements, that are not the numbers they were."""
    before, after = leaves(parameters(loop, loop.state)), leaves(parameters(loop, run(loop, steps)))
    frozen = {path: np.broadcast_to(np.asarray(m) == 0, before[path].shape) for path, m in leaves(loop.mask).items()}
    return {path for path in before if (before[path] != after[path])[frozen[path]].any()}


def unmoved(loop, steps=3):
    """The paths of leaves that are to train and are the same after other batches."""
    other = jax.tree.map(
        lambda leaf: (leaf + 1) % (leaf.max() + 1) if leaf.dtype == jnp.int32 else 2 * leaf + 1, loop.batch
    )
    after = [leaves(parameters(loop, run(loop, steps, batch))) for batch in (loop.batch, other)]
    trained = {path: np.broadcast_to(np.asarray(m) != 0, after[0][path].shape) for path, m in leaves(loop.mask).items()}
    return {path for path, m in trained.items() if m.any() and not (after[0][path] != after[1][path])[m].any()}


def leaking(build, clean):
    """The paths of frozen leaves whose gradient, five times as large, changes what a trained leaf becomes."""
    loop = build(clean)
    plain = leaves(parameters(loop, run(loop, 1)))
    frozen = [path for path, m in leaves(loop.mask).items() if not np.any(m)]
    changed = set()
    for path in frozen:
        with _gradients_times(5.0, path):
            disturbed = leaves(parameters(loop, run(build(clean), 1)))
        if any((disturbed[other] != plain[other]).any() for other in plain if other not in frozen):
            changed.add(path)
    return changed


@contextlib.contextmanager
def _gradients_times(factor, of_path):
    """Within, `jax.grad` and `jax.value_and_grad` multiply the gradient of one leaf."""
    grad, value_and_grad = jax.grad, jax.value_and_grad

    def scaled(tree):
        structure = jax.tree.structure(tree)
        return jax.tree.unflatten(
            structure, [factor * leaf if path == of_path else leaf for path, leaf in paths.items(tree)]
        )

    def changed_grad(fun, *args, **kwargs):
        return lambda *a, **k: scaled(grad(fun, *args, **kwargs)(*a, **k))

    def changed_value_and_grad(fun, *args, **kwargs):
        def both(*a, **k):
            value, gradients = value_and_grad(fun, *args, **kwargs)(*a, **k)
            return value, scaled(gradients)

        return both

    jax.grad, jax.value_and_grad = changed_grad, changed_value_and_grad
    try:
        yield
    finally:
        jax.grad, jax.value_and_grad = grad, value_and_grad


def wrong_rate(build, clean):
    """The paths of leaves whose change is not their number in the mask, times the change with a number of 1."""
    loop, whole = build(clean), build(clean, 1.0)
    before = leaves(parameters(loop, loop.state))
    changes = [
        {path: leaf - before[path] for path, leaf in leaves(parameters(each, run(each, 1))).items()}
        for each in (loop, whole)
    ]
    return {
        path
        for path, m in leaves(loop.mask).items()
        if not np.allclose(changes[0][path], float(m) * changes[1][path], rtol=1e-3)
    }


def repeats_itself(loop):
    """Whether the second step computes the same loss as the first, with the weights of the first put back."""
    after, first = step(loop, _copy(loop.state))
    again = after.replace(params=loop.state.params, opt_state=loop.state.opt_state)
    return bool(np.asarray(step(loop, again)[1]) == np.asarray(first))


def moments(loop):
    """The paths of arrays in the state beside the parameters that are shaped and named like a frozen leaf."""
    frozen = [path for path, m in leaves(loop.mask).items() if not np.any(m)]
    shapes = {path: leaf.shape for path, leaf in leaves(parameters(loop, loop.state)).items()}
    parameter_ids = {id(leaf) for leaf in jax.tree.leaves(parameters(loop, loop.state))}
    beside = [(path, jnp.shape(leaf)) for path, leaf in paths.items(loop.state) if id(leaf) not in parameter_ids]
    return {
        path
        for path in frozen
        for other, shape in beside
        if path.removesuffix("/value") in other and shape == shapes[path]
    }
