"""Optimizers by name, with their numbers passed when they are built; which leaves weight decay touches."""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from tljax import paths, plugins
from tljax.slots import Gathered
from tljax.types import InputError, Mask, Params


class OptimizerSpec(NamedTuple):
    """The part of an optimizer that decides the compiled code; its numbers are passed when it is built."""

    name: str
    """A name of optax, with options ('sgd', 'adam:b1=0.95'), or 'package.module:attribute'."""
    numbers: tuple[str, ...] = ()
    """Which of 'momentum', 'weight_decay', 'clip' are in use."""
    decay: str = "all"
    """Which leaves weight decay touches: 'all', 'kernels' or globs, as `decays` reads them; 'all' where none decays."""


def spec(
    name: str, *, momentum: float = 0.0, weight_decay: float = 0.0, clip: float = 0.0, decay: str = "all"
) -> tuple[OptimizerSpec, dict]:
    """The spec of an optimizer and its numbers by name; a number of 0 is left out.

    `decay` says which leaves weight decay touches: a rule of `decays`, or 'auto', which is 'kernels' for optimizers
    with a decay of their own that can leave out leaves (AdamW, Lion, LAMB), and 'all' for the others.

    Raises InputError for an unknown optimizer or option, a number that is negative or not finite in float32, a
    momentum or decay of moments that is not below 1, a momentum that the optimizer does not take, or a rule of decay
    that is no glob or that the optimizer's own decay cannot keep.

    >>> spec("sgd", momentum=0.9)
    (OptimizerSpec(name='sgd', numbers=('momentum',), decay='all'), {'momentum': 0.9})
    >>> spec("adamw", weight_decay=0.1, decay="auto")[0].decay, spec("adamw", decay="auto")[0].decay
    ('kernels', 'all')
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
    return OptimizerSpec(name, tuple(numbers), _rule_of_decay(function, options, numbers, decay, name)), numbers


def _rule_of_decay(
    function: Callable[..., Any], options: Mapping[str, Any], numbers: Mapping[str, float], decay: str, name: str
) -> str:
    """The rule under which the leaves of a fit decay; 'all' where nothing decays."""
    for pattern in _globs(decay):
        paths.glob(pattern)
    if not ("weight_decay" in numbers or _decays_by_options(options)):
        return "all"
    parameters = inspect.signature(function).parameters
    decay_options = [option for option in _DECAYS if option in parameters]
    maskable = any(option in parameters for option in _DECAY_MASKS)
    rule = ("kernels" if decay_options and maskable else "all") if decay == "auto" else decay
    if rule != "all" and decay_options and not maskable:
        reason = f"the decay of optimizer '{name}' touches every leaf: leave it at all"
        raise InputError(reason, field="decay", value=decay)
    return rule


def _decays_by_options(options: Mapping[str, Any]) -> bool:
    """Whether an optimizer's own decay is set by an option, as in 'adamw:weight_decay=0.1'."""
    return any(options.get(option) for option in _DECAYS)


def has_decay(spec: OptimizerSpec) -> bool:
    """Whether weight decay touches anything."""
    return "weight_decay" in spec.numbers or _decays_by_options(_resolve(spec.name)[1])


_DECAYS = ("weight_decay", "weight_decay_rate")
"""What optimizers of optax call a decay of their own; Adafactor the latter."""
_DECAY_MASKS = ("mask", "weight_decay_mask")
"""What they call the mask of the leaves that it touches."""


def decays(rule: str, params: Params) -> Mask:
    """The tree of bools that says which leaves weight decay touches under a rule; None stays None.

    - 'all': every leaf.
    - 'kernels': leaves of two or more axes, but for biases, the scales of norms and what SSF adds (which have more
      than one axis where layers are stacked, or heads have a bias each), position embeddings, class tokens and their
      like, by name.
    - anything else: the leaves that a glob of `paths.glob` matches, of several with commas between them.

    >>> params = {"dense": {"kernel": np.ones((2, 2)), "bias": np.ones(2)}, "pos_embedding": np.ones((1, 4, 2))}
    >>> decays("kernels", params)
    {'dense': {'bias': False, 'kernel': True}, 'pos_embedding': False}
    >>> decays("dense/*", params)
    {'dense': {'bias': True, 'kernel': True}, 'pos_embedding': False}
    """
    if isinstance(params, Gathered):  # by their own paths
        return Gathered(decays(rule, params.own), tuple(decays(rule, slot) for slot in params.slots))
    if rule == "all":
        return paths.each(lambda path, leaf: True, params)
    if rule == "kernels":
        return paths.each(lambda path, leaf: jnp.ndim(leaf) > 1 and _is_kernel(path), params)
    tests = [paths.glob(form) for pattern in _globs(rule) for form in paths.forms(pattern)]
    return paths.each(lambda path, leaf: any(test(_unboxed(path)) or test(path) for test in tests), params)


def require_decay(rule: str, params: Params) -> None:
    """Raise InputError, with the nearest paths, for a rule of decay under which no leaf decays.

    >>> require_decay("kernel/**", {"dense": {"kernel": np.ones((2, 2))}})
    Traceback (most recent call last):
    ...
    tljax.types.InputError: decay=kernel/**: pattern 'kernel/**' matches no leaf; nearest: 'dense/kernel'
    """
    try:
        paths.require_globs(params, _globs(rule))
    except InputError as error:
        near = plugins.meant(rule, DECAY_RULES) if rule.isidentifier() else None
        remedy = f"; or the rule '{near}'" if near else ""
        raise InputError(f"{error}{remedy}", field="decay", value=rule) from error
    if rule == "kernels" and not any(decay for _, decay in paths.items(decays(rule, params))):
        names = paths.some(paths.names(params))
        raise InputError(f"no leaf is a kernel, among {names}: give globs, or all", field="decay", value=rule)


def _globs(rule: str) -> list[str]:
    """The globs of a rule of decay; none of the rules that have a name."""
    return [] if rule in DECAY_RULES else plugins.split(rule, ",")


DECAY_RULES = ("auto", "all", "kernels")
"""The rules of decay that have a name; any other is of globs."""


def _unboxed(path: str) -> str:
    """A leaf's path without the `value` of its box."""
    return path.removesuffix("/value")


def _is_kernel(path: str) -> bool:
    """Whether a leaf of two or more axes decays as kernels do, by its path.

    >>> [_is_kernel(path) for path in ("query/kernel", "lora_a", "query/bias", "bn1.weight", "wpe/embedding")]
    [True, True, False, False, False]
    """
    words = re.sub("(?<=[a-z])(?=[A-Z])", "_", _unboxed(path)).lower()
    *containers, name = re.split("[/.]", words)
    is_norm_weight = bool(containers) and paths.is_norm(containers[-1]) and name == "weight"
    return name not in _NOT_KERNELS and not is_norm_weight and not any(map(_EMBEDDED.search, (*containers, name)))


_NOT_KERNELS = ("bias", "scale", "beta", "gamma", "offset", "ssf_scale", "ssf_shift")
_EMBEDDED = re.compile(
    r"(^|_)(abs_|rel_)?(pos|positions?|positional)(_|$|emb|enc)|^wpe$"
    r"|^cls$|(^|_)(cls|class|dist|distillation|reg|registers?|mask)_?tokens?$"
)
"""Names of position embeddings, and of class, distillation, register and mask tokens."""


def build(spec: OptimizerSpec, learning_rate: Any, numbers: Mapping[str, Any]) -> optax.GradientTransformation:
    """The optax transformation: clip, then decay, then the optimizer. The numbers may be traced.

    Decay is the optimizer's own where it has one (decoupled in AdamW and Lion: Loshchilov and Hutter 2019,
    arXiv:1711.05101), else it is added to the gradient, the L2 penalty's gradient; it touches the leaves that the rule
    of the spec says. Clipping is by the global norm.
    """
    function, options = _resolve(spec.name)
    parameters = inspect.signature(function).parameters
    names = ("momentum", "weight_decay")
    arguments: dict[str, Any] = {key: numbers[key] for key in names if key in spec.numbers and key in parameters}
    if "weight_decay" in parameters and "weight_decay" not in options:
        arguments.setdefault("weight_decay", 0.0)
    chain = [optax.clip_by_global_norm(numbers["clip"])] if "clip" in spec.numbers else []
    # A function of the tree, and not a tree: the optimizer sees the leaves that train alone.
    mask = None if spec.decay == "all" else functools.partial(decays, spec.decay)
    if "weight_decay" in spec.numbers and "weight_decay" not in parameters:
        chain.append(optax.add_decayed_weights(numbers["weight_decay"], mask))
    elif mask:
        arguments[next(option for option in _DECAY_MASKS if option in parameters)] = mask
    return optax.chain(*chain, function(learning_rate, **arguments, **options))


def function_of(name: str) -> Callable[..., optax.GradientTransformation]:
    """The function that an optimizer's name stands for; raises InputError as `spec`.

    >>> function_of("adam:b1=0.5").__name__
    'adam'
    """
    return _resolve(name)[0]


def _resolve(name: str) -> tuple[Callable[..., optax.GradientTransformation], dict[str, Any]]:
    parsed = plugins.parse(name)
    if "." in parsed.name:
        function = plugins.attribute(parsed, plugins.module(parsed, "optax", "optimizer"), "optimizer")
    else:
        known = _names()
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
    return list(_names())


@functools.cache
def _names() -> tuple[str, ...]:
    """`names`, looked for once: it asks for the signature of everything in optax."""
    offered = []
    for name, function in vars(optax).items():
        if inspect.isfunction(function) and not name.startswith(("_", "scale_by")):
            parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
            needed = {p.name for p in parameters if p.default is p.empty}
            first = parameters[0].name if parameters else ""
            if first == "learning_rate" and needed <= {first} and name not in _NOT_OFFERED:
                offered.append(name)
    return tuple(sorted(offered))


_NOT_OFFERED = ("lbfgs", "polyak_sgd", "optimistic_adam", "noisy_sgd")
"""They need the value of the loss or a key, or are deprecated names."""
