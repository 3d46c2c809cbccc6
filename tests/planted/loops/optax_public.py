"""Every public transformation of optax and optax.contrib, by name, made with the fewest arguments that it takes."""

import functools
import inspect

import jax
import jax.numpy as jnp
import optax
import optax.contrib

INNER = optax.sgd(0.1, momentum=0.9)

ARGUMENTS = {
    "adv_optimizer": INNER,
    "base_optimizer": INNER,
    "clipping": 0.1,
    "decay": 0.9,
    "eta": 0.1,
    "f": lambda updates, _=None: updates,
    "fast_optimizer": INNER,
    "freeze_mask": False,
    "gamma": 0.5,
    "inner": INNER,
    "inner_factory": optax.adam,
    "l2_norm_clip": 1.0,
    "learning_rate": 0.1,
    "mask": True,
    "max_backtracking_steps": 3,
    "max_consecutive_errors": 2,
    "max_delta": 1.0,
    "max_linesearch_steps": 3,
    "max_norm": 1.0,
    "measure": lambda updates, *_: optax.tree.norm(updates),
    "measure_name": "norm",
    "noise_multiplier": 0.1,
    "optimizer": INNER,
    "param_labels": lambda params: jax.tree.map(lambda _: "all", params),
    "seed": 0,
    "should_transform_fn": lambda step: step > 1,
    "slow_step_size": 0.5,
    "step_size": 0.1,
    "step_size_fn": lambda count: 0.1 / (1 + count),
    "sync_period": 5,
    "threshold": 1.0,
    "transforms": {"all": optax.adam(0.1)},
    "tx": INNER,
}
"""What a required parameter of that name is given."""

POSITIONAL = {
    "optax.chain": (optax.clip_by_global_norm(1.0), optax.adam(0.1)),
    "optax.named_chain": (("clip", optax.clip_by_global_norm(1.0)), ("adam", optax.adam(0.1))),
}

OPTIONS = {
    # A key is to be given, says optax.
    "optax.add_noise": {"key": 0},
    "optax.noisy_sgd": {"key": 0},
    "optax.contrib.differentially_private_aggregate": {"key": 0},
}


def public():
    """{name: function} of what optax says is a GradientTransformation, and of its classes that make one."""
    named = {}
    for module in (optax, optax.contrib):
        for name, function in sorted(vars(module).items()):
            if name.startswith("_") or not inspect.isfunction(function):
                continue
            if "GradientTransformation" in str(inspect.signature(function).return_annotation):
                named[f"{module.__name__}.{name}"] = function
    named["optax.MultiSteps"] = functools.partial(optax.MultiSteps, INNER, 3)
    return named


def make(name, function):
    """A transformation of a public name."""
    if name in POSITIONAL:
        return function(*POSITIONAL[name])
    required = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    arguments = {word: ARGUMENTS[word] for word in required} | OPTIONS.get(name, {})
    tx = function(**arguments)
    if "inner_factory" in arguments:
        tx = tx(learning_rate=0.1)
    return tx.gradient_transformation() if isinstance(tx, optax.MultiSteps) else tx


EXTRA = {
    "optax.contrib.momo": ("value",),
    "optax.contrib.momo_adam": ("value",),
    "optax.contrib.reduce_on_plateau": ("value",),
    "optax.contrib.sophia": ("obj_fn",),
    "optax.lbfgs": ("value", "grad", "value_fn"),
    "optax.polyak_sgd": ("value",),
    "optax.scale_by_backtracking_linesearch": ("value", "grad", "value_fn"),
    "optax.scale_by_polyak": ("value",),
    "optax.scale_by_zoom_linesearch": ("value", "grad", "value_fn"),
}
"""What they ask for beside the gradient."""


def with_loss(tx, names):
    """The transformation, given the loss, its gradient or the loss's function under these names."""

    def loss(params):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    def update(updates, state, params=None):
        extra = {"value": loss(params), "grad": updates, "value_fn": loss, "obj_fn": loss}
        return tx.update(updates, state, params, **{name: extra[name] for name in names})

    return optax.GradientTransformation(tx.init, update)
