"""Optimizers by name, with their numbers passed when they are built."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import optax

from tljax import plugins
from tljax.types import InputError


class OptimizerSpec(NamedTuple):
    """The part of an optimizer that decides the compiled code; its numbers are passed when it is built."""

    name: str
    """A name of optax, with options ('sgd', 'adam:b1=0.95'), or 'package.module:attribute'."""
    numbers: tuple[str, ...] = ()
    """Which of 'momentum', 'weight_decay', 'clip' are in use."""


def spec(
    name: str, *, momentum: float = 0.0, weight_decay: float = 0.0, clip: float = 0.0
) -> tuple[OptimizerSpec, dict]:
    """The spec of an optimizer and its numbers by name; a number of 0 is left out.

    Raises InputError for an unknown optimizer or option, a number that is negative or not finite in float32, a
    momentum or decay of moments that is not below 1, or a momentum that the optimizer does not take.

    >>> spec("sgd", momentum=0.9)
    (OptimizerSpec(name='sgd', numbers=('momentum',)), {'momentum': 0.9})
    """
    every = {"momentum": momentum, "weight_decay": weight_decay, "clip": clip}
    for key, value in every.items():
        if not 0 <= value <= _LARGEST:
            raise InputError("it must be finite, in float32, and at least 0", field=key, value=value)
    if momentum >= 1:
        raise InputError("it must be at least 0 and below 1", field="momentum", value=momentum)
    numbers = {key: value for key, value in every.items() if value}
    function, options = _resolve(name)
    if momentum and "momentum" not in inspect.signature(function).parameters:
        reason = f"optimizer '{name}' takes none; its options go after its name"
        raise InputError(reason, field="momentum", value=momentum)
    if momentum and "momentum" in options:
        raise InputError(f"optimizer '{name}' sets the momentum too: keep one", field="momentum", value=momentum)
    return OptimizerSpec(name, tuple(numbers)), numbers


def build(spec: OptimizerSpec, learning_rate: Any, numbers: Mapping[str, Any]) -> optax.GradientTransformation:
    """The optax transformation: clip, then decay, then the optimizer. The numbers may be traced.

    Decay is the optimizer's own where it has one (decoupled in AdamW and Lion: Loshchilov and Hutter 2019,
    arXiv:1711.05101), else it is added to the gradient, the L2 penalty's gradient. Clipping is by the global norm.
    """
    function, options = _resolve(spec.name)
    parameters = inspect.signature(function).parameters
    arguments = {key: numbers[key] for key in ("momentum", "weight_decay") if key in spec.numbers and key in parameters}
    if "weight_decay" in parameters and "weight_decay" not in options:
        arguments.setdefault("weight_decay", 0.0)
    chain = [optax.clip_by_global_norm(numbers["clip"])] if "clip" in spec.numbers else []
    if "weight_decay" in spec.numbers and "weight_decay" not in parameters:
        chain.append(optax.add_decayed_weights(numbers["weight_decay"]))
    return optax.chain(*chain, function(learning_rate, **arguments, **options))


def _resolve(name: str) -> tuple[Callable[..., optax.GradientTransformation], dict[str, Any]]:
    parsed = plugins.parse(name)
    if "." in parsed.name:
        function = plugins.attribute(parsed, plugins.module(parsed, "optax", "optimizer"), "optimizer")
    else:
        known = names()
        if parsed.name not in known or parsed.words:
            raise InputError(f"unknown optimizer '{name}'{plugins.nearest(parsed.name, known)}")
        function = getattr(optax, parsed.name)
    what = f"optimizer '{parsed.name}'"
    options = plugins.bind(function, parsed.options, what, excluded=("learning_rate",))
    for key, value in options.items():
        if isinstance(value, int | float) and not abs(value) <= _LARGEST:
            raise InputError(f"{what}: {key}={value}: it must be finite, in float32")
        if key in _below_1(function) and not (value is None or 0 <= value < 1):
            raise InputError(f"{what}: {key}={value}: it must be at least 0 and below 1")
    return function, options


_LARGEST = float(np.finfo(np.float32).max)
_MEANS = ("momentum", "b1", "b2", "b3", "rho", "decay", "beta")


def _below_1(function: Callable[..., Any]) -> list[str]:
    """Options of an optimizer of optax that are the part of a running mean which stays; at 1 nothing new enters it.

    >>> _below_1(optax.adam), _below_1(optax.signum), _below_1(optax.optimistic_gradient_descent)
    (['b1', 'b2'], ['beta'], [])
    """
    if not function.__module__.startswith("optax."):
        return []
    defaults = {key: option.default for key, option in inspect.signature(function).parameters.items() if key in _MEANS}
    return [key for key, value in defaults.items() if value is None or value is inspect.Parameter.empty or value < 1]


def names() -> list[str]:
    """The names of the optimizers of optax that need nothing but gradients and a learning rate.

    >>> {"sgd", "adam", "adamw", "lion"} <= set(names())
    True
    """
    offered = []
    for name, function in vars(optax).items():
        if inspect.isfunction(function) and not name.startswith(("_", "scale_by")):
            parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
            needed = {p.name for p in parameters if p.default is p.empty}
            first = parameters[0].name if parameters else ""
            if first == "learning_rate" and needed <= {first} and name not in _NOT_OFFERED:
                offered.append(name)
    return sorted(offered)


_NOT_OFFERED = ("lbfgs", "polyak_sgd", "optimistic_adam", "noisy_sgd")
"""They need the value of the loss or a key, or are deprecated names."""
