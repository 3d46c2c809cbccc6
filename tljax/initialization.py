"""Where a fit of a strategy starts: graft, adapt, what the strategy answers, and lint, in this order.

`start` is all of it; `initialize` ends before the strategy is asked.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tljax import batch_stats, graft, masks, paths, plugins, switches
from tljax.types import (
    END_NAMES,
    SELECTED_END,
    Context,
    InputError,
    Mask,
    MaskSchedule,
    Method,
    ModelState,
    Params,
    Phase,
    PhaseRule,
)


class Initialization(NamedTuple):
    """What every strategy starts from under one seed."""

    stages: tuple[str, ...]
    """Path prefixes in the order of the model; the last is the head."""
    source: Params | None
    """The source's variables: parameters, and the model's state among them."""
    drawn: Params
    """The target's variables, drawn anew."""
    key: jax.Array
    """Of what a strategy draws."""
    head: str = "fresh"
    """'copy', 'fresh' or 'zero'."""
    fisher: Params | None = None
    """The source's Fisher information, if there is any."""
    batch_stats: str = "auto"
    """What becomes of the state of stages of which the strategy does not say it: one of `batch_stats.MODES`."""
    contracted: Callable[[], Mapping[str, int]] | None = None
    """What gives `Context.contracted`, if the model is known."""


class Initialized(NamedTuple):
    """A target after graft and adapt."""

    plan: graft.Plan
    ordinary: Params
    """Before adapt."""
    params: Params
    fresh: Mask
    """Which leaves were drawn anew, or added by adapt."""
    must: Mask
    """Those that have to train: all of them, or the head's if `reinit` drew others, which may be frozen on purpose."""
    merge: Callable[[Params], Params] | None
    model_state: ModelState
    """The model's state; all else here is of parameters alone."""
    factored: Callable[[Params], Params] | None = None
    """What the model is applied with in place of what `merge` gives (`Method.factored`)."""
    contracted: Mapping[str, int] = {}
    """As `Context.contracted`, if the strategy adapts the parameters."""


class Start(NamedTuple):
    """Where a fit begins."""

    params: Params
    phases: tuple[tuple[float, Mask | Callable[[Params], Mask]], ...]
    """(fraction of training, mask); a function is called with the parameters at that point. Empty where the strategy
    looks at data and there were none."""
    fresh: Mask
    """Which leaves were drawn anew."""
    plan: graft.Plan = ()
    merge: Callable[[Params], Params] | None = None
    fisher: Params | None = None
    """The source's Fisher information, for a penalty: a tree like the parameters."""
    model_state: Mapping[str, Any] = {}
    """The model's state, which neither a mask nor a strategy sees."""
    batch_stats: tuple[tuple[str, str], ...] = ()
    """(stage, what becomes of its state) of the stages that have one."""
    rules: tuple[PhaseRule, ...] = ()
    """How each phase ends, and its rate; () if all end where the next begins, at the recipe's rate."""
    finish: Callable[..., dict[str, Params]] | None = None
    """(the parameters after training, those with which each phase after the first began, if it asks for them) -> {name:
    parameters to evaluate and keep beside them}."""
    finish_takes_phases: bool = False
    """Whether `finish` asks for them."""
    factored: Callable[[Params], Params] | None = None
    """What the model is applied with in place of what `merge` gives (`Method.factored`)."""
    contracted: Mapping[str, int] = {}
    """As `Context.contracted`, if the strategy adapts the parameters."""

    @property
    def applied(self) -> Callable[[Params], Params] | None:
        """Parameters -> those that the model is applied with; None where they are the same."""
        return self.factored or self.merge

    @property
    def variables(self) -> Params:
        """Parameters and the model's state in one tree, as files keep them."""
        return batch_stats.join(self.params, self.model_state)


Look = Callable[
    [Callable[[Params], Params] | None, ModelState], tuple[Callable[[Params], Params], Callable[[Params], Params]]
]
"""(merge, model state) -> (gradient, fisher): what a data-driven strategy may look at."""


def call_plainly(part: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function of a strategy's file; what it raises goes on as it is."""
    return function(*arguments, **options)


def start(
    method: Method,
    options: Mapping[str, Any],
    initialization: Initialization,
    look: Look | None = None,
    name: str = "the strategy",
    call: Callable[..., Any] = call_plainly,
) -> Start:
    """Graft, adapt, ask the strategy, and lint its answer; masks that it leaves to their boundary are linted there.

    A strategy that looks at data is asked only with a `look`. Functions of the strategy's file are called by
    `call(part, function, ...)`, which may say of an exception whose it is. Raises InputError, which begins with `name`,
    for a mask that cannot be trained, and where the model does not find its leaves again after adapt and merge.
    """
    initialized = call("reinit or adapt", initialize, method, options, initialization)
    if method.adapt:
        _require_model(initialized, name, call)
    params, rest = initialized.params, (initialized.fresh, initialized.plan, initialized.merge)
    stages, source, key = with_leaves(initialization), initialization.source, initialization.key
    source = source if source is None else batch_stats.split(source)[0]
    context = Context(stages, source, initialized.fresh, key)
    finish = functools.partial(finished, method, options, params, context, name, call) if method.finish else None
    takes_phases = method.finish is not None and plugins.takes(method.finish, "phases")
    form = {"factored": initialized.factored, "contracted": initialized.contracted, "finish_takes_phases": takes_phases}
    if method.data_driven and look is None:
        state = initialized.model_state, _modes(method, options, initialization, initialized, context, name, call)
        return Start(params, (), *rest, None, *state, finish=finish, **form)
    gradient, fisher = (
        look(initialized.factored or initialized.merge, initialized.model_state) if look else (None, None)
    )
    context = context._replace(gradient=gradient, fisher=fisher)
    arguments = jax.tree.map(jnp.asarray, params), shown(context)
    answered = phases(call("", method.strategy, *arguments, **options))

    def linted(params: Params, mask: Mask) -> Mask:
        try:
            if isinstance(mask, MaskSchedule):
                raise InputError(
                    "a phase's function gives a schedule at its boundary: give the phase the schedule itself"
                )
            masks.lint(params, mask, initialized.must)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        return writable(mask)

    def later(phase: Phase) -> Callable[[Params], Mask]:
        return lambda params: linted(params, call("a phase", phase.mask, writable(params), shown(context)))

    try:
        masks.lint_phases(params, answered, initialized.must)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    rules = tuple(_rule(phase, call) for phase in answered)

    def phase_mask(phase: Phase) -> Any:
        if masks.is_strategy(phase.mask):
            return later(phase)
        return writable(phase.mask.scope if isinstance(phase.mask, MaskSchedule) else phase.mask)

    at = tuple((float(phase.start), phase_mask(phase)) for phase in answered)
    if all(rule == PhaseRule() for rule in rules):
        rules = ()
    require_known_phases(method, answered, name)
    finish = functools.partial(finish, count=len(at)) if finish else None
    state = initialized.model_state, _modes(method, options, initialization, initialized, context, name, call)
    return Start(params, at, *rest, initialization.fisher, *state, rules, finish, **form)


def _modes(
    method: Method,
    options: Mapping[str, Any],
    initialization: Initialization,
    initialized: Initialized,
    context: Context,
    name: str,
    call: Callable[..., Any],
) -> tuple[tuple[str, str], ...]:
    """(stage, what becomes of its state) of the stages that have one: as the strategy says, else as all are.

    Raises InputError for a stage that the model has not, and for a word that is none of `batch_stats.MODES`.
    """
    modes = dict.fromkeys(initialized.model_state, initialization.batch_stats)
    if method.batch_stats is not None:
        taken = plugins.taken(method.batch_stats, options)
        answer = call("batch_stats", method.batch_stats, shown(context), **taken)
        if not isinstance(answer, Mapping):
            raise InputError(f"{name}: batch_stats gives {plugins.shown(answer)}: return a dict {{stage: mode}}")
        for stage, mode in answer.items():
            if stage not in initialization.stages:
                near = plugins.nearest(str(stage), initialization.stages)
                raise InputError(f"{name}: batch_stats names '{stage}', which is no stage{near}")
            if mode not in batch_stats.MODES:
                near = plugins.nearest(str(mode), batch_stats.MODES)
                raise InputError(f"{name}: batch_stats says {plugins.shown(mode)} of '{stage}'{near}")
        modes |= {stage: mode for stage, mode in answer.items() if stage in modes}
    return tuple(sorted(modes.items()))


def _rule(phase: Phase, call: Callable[..., Any]) -> PhaseRule:
    """How a phase ends and its mask moves, with an `until` that is called as the functions of a strategy's file are."""

    def until(scores: Sequence[float]) -> bool:
        return bool(call("until", phase.until, tuple(scores)))

    if phase.until is not None:
        until([0.5])  # it may fail: then before anything is trained
    schedule = phase.mask if isinstance(phase.mask, MaskSchedule) else None
    return PhaseRule(until if phase.until is not None else None, phase.restore == "best", float(phase.rate), schedule)


def require_known_phases(method: Method, answered: Sequence[Phase], name: str) -> None:
    """Raise InputError if `finish` takes the beginnings of phases that end by validation."""
    takes = method.finish is not None and plugins.takes(method.finish, "phases")
    if takes and any(phase.until is not None or phase.restore == "best" for phase in answered):
        raise InputError(
            f"{name}: its finish takes `phases`, which end by validation: let it do without one of the two"
        )


_SUFFIXES = ("fisher", "merged")
"""What stands after the name of a fit in its checkpoint beside the ends."""


def finished(
    method: Method,
    options: Mapping[str, Any],
    start: Params,
    context: Context,
    name: str,
    call: Callable[..., Any],
    params: Params,
    began: Sequence[Params] | None = None,
    count: int = 1,
) -> dict[str, Params]:
    """What a strategy's `finish` makes of the parameters after training, and of those with which its phases after the
    first `began` (without them they are the start's, of `count` phases); raises InputError for what cannot be meant."""
    assert method.finish is not None
    trees = (writable(jax.tree.map(jnp.asarray, tree)) for tree in (params, start))
    taken = plugins.taken(method.finish, options)
    if plugins.takes(method.finish, "phases"):
        began = [start] * (count - 1) if began is None else began
        taken["phases"] = tuple(writable(jax.tree.map(jnp.asarray, tree)) for tree in (start, *began))
    answer = call("finish", method.finish, *trees, shown(context), **taken)
    if not isinstance(answer, dict) or not answer:
        raise InputError(f"{name}: finish gives {plugins.shown(answer)}: return a dict {{name: parameters}}")
    for end, tree in answer.items():
        if not isinstance(end, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", end):
            raise InputError(f"{name}: finish names a result {plugins.shown(end)}: take letters, digits, '_', '-', '.'")
        if end in (*END_NAMES, SELECTED_END, *_SUFFIXES):
            raise InputError(f"{name}: finish names a result '{end}', which has a meaning: choose another name")
        paths.same_structure(params, tree, "the parameters", f"what finish of {name} gives as '{end}'")
        for path, leaf in paths.items(params):
            other = dict(paths.items(tree))[path]
            if jnp.shape(other) != jnp.shape(leaf) or jnp.result_type(other) != jnp.result_type(leaf):
                kinds = (f"{jnp.result_type(each)}{list(jnp.shape(each))}" for each in (other, leaf))
                raise InputError("{}: finish gives '{}' with '{}' of {}, not {}".format(name, end, path, *kinds))
    return {end: jax.tree.map(np.asarray, tree) for end, tree in answer.items()}


def initialize(method: Method, options: Mapping[str, Any], initialization: Initialization) -> Initialized:
    """Graft the source onto what was drawn, then adapt.

    Raises InputError for what `graft.plan` refuses, and where `reinit` or `adapt` gives what it cannot mean.
    """
    _, source, drawn, key, head, *_ = initialization
    contracted: Mapping[str, int] = {}
    stages = with_leaves(initialization)
    again, last = redrawn(method, options, stages), stages[-1:]
    fresh_stages, zero = (*again, *last) if head == "fresh" else again, last if head == "zero" else ()
    plan = graft.plan(source, drawn, fresh=fresh_stages, zero=zero)
    (ordinary, model_state), (fresh, _) = map(batch_stats.split, graft.apply(plan, source, drawn))
    if _replaces(method):
        ordinary = _replaced(method, options, ordinary, key, Context(stages=stages, fresh=writable(fresh)))
    params, merge, factored = ordinary, None, None
    if method.adapt:
        known = dict(paths.items(fresh))
        context: tuple[Context, ...] = ()
        if plugins.takes(method.adapt, "context"):
            contracted = initialization.contracted() if initialization.contracted else {}
            context = (Context(stages=stages, fresh=writable(fresh), contracted=contracted),)
        params = _call(method.adapt, options, writable(ordinary), key, *context)
        if params is None:
            raise InputError("adapt returned None: return the parameters with the new leaves")
        for path, leaf in paths.items(params):
            if not isinstance(leaf, int | float | np.generic | np.ndarray | jax.Array):
                raise InputError(f"adapt gives {plugins.shown(leaf)} at '{path}': a leaf is an array")
        fresh = paths.each(lambda path, leaf: known.get(path, True), params)
        merge = Merge(method.merge, repr(options), options) if method.merge else None
        factored = Merge(method.factored, repr(options), options) if method.factored else None
    must = masks.intersect(fresh, masks.under(params, last)) if again else fresh
    return Initialized(plan, ordinary, params, fresh, must, merge, model_state, factored, contracted)


def _require_model(initialized: Initialized, name: str, call: Callable[..., Any]) -> None:
    """Raise InputError unless the model finds its leaves again, in their shapes."""
    merge: Any = initialized.merge or (lambda same: same)
    after = call("merge", lambda: jax.eval_shape(merge, initialized.params))
    if initialized.merge:
        paths.same_structure(initialized.ordinary, after, "the model", f"what merge of {name} gives")
    shapes = {path: leaf.shape for path, leaf in paths.items(after)}
    for path, leaf in paths.items(initialized.ordinary):
        if shapes.get(path) != leaf.shape:
            change = f"of shape {shapes[path]}" if path in shapes else "missing"
            last = "merge" if initialized.merge else "adapt"
            raise InputError(f"{name}: '{path}' {leaf.shape} is {change} after {last}: keep it")


def with_leaves(initialization: Initialization) -> tuple[str, ...]:
    """The stages that a strategy is told of: those with parameters. Pooling, dropout and the like have none."""
    leaves = paths.names(initialization.drawn)
    return tuple(stage for stage in initialization.stages if any(map(paths.inside((stage,)), leaves)))


def redrawn(method: Method, options: Mapping[str, Any], stages: tuple[str, ...]) -> tuple[str, ...]:
    """The path prefixes that a method draws anew beside the head; raises InputError unless `reinit` gives a list."""
    names: Any = ()
    if method.reinit and not _replaces(method):
        names = _call(method.reinit, options, Context(stages=stages))
    if not isinstance(names, Sequence) or isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise InputError(f"reinit gives {plugins.shown(names)}: return a list of path prefixes, or []")
    return tuple(names)


def _replaces(method: Method) -> bool:
    """Whether a method's `reinit` gives parameters, not names of what to draw anew."""
    return method.reinit is not None and plugins.takes(method.reinit, "params")


def _replaced(method: Method, options: Mapping[str, Any], params: Params, key: jax.Array, context: Context) -> Params:
    """What `reinit` makes of the parameters after the graft; raises InputError for another structure, shape, dtype."""
    assert method.reinit is not None
    leaves = jax.tree.map(jnp.asarray, params)
    answer = _call(method.reinit, options, writable(leaves), key, context)
    paths.same_structure(params, answer, "the parameters", "what reinit gives")
    for path, leaf, other in paths.items(leaves, answer):
        kinds = [(jnp.shape(each), jnp.result_type(each)) for each in (leaf, other)]
        if kinds[0] != kinds[1]:
            raise InputError(
                f"reinit gives {kinds[1][1]}{list(kinds[1][0])} at '{path}', not {kinds[0][1]}{list(kinds[0][0])}"
            )
    return jax.tree.map(jnp.asarray, answer)


@dataclass(frozen=True)
class Merge:
    """A `merge` or `factored` with its options; equal ones share an executable."""

    function: Callable[..., Params]
    text: str
    """The options as text: a list among them has no hash."""
    options: Mapping[str, Any] = field(compare=False)

    def __call__(self, params: Params) -> Params:
        """What the strategy's function makes of its own parameters."""
        return _call(self.function, self.options, writable(params))


def _call(function: Callable[..., Any], options: Mapping[str, Any], *arguments: Any) -> Any:
    """Call a function of a strategy's module with those of the options that it takes."""
    with switches.guarded():
        return function(*arguments, **plugins.taken(function, options))


def phases(answer: Any) -> tuple[Phase, ...]:
    """What a strategy answers, as phases: a mask is one.

    >>> [(phase.start, phase.mask) for phase in phases({"head": True})]
    [(0.0, {'head': True})]
    """
    phased = isinstance(answer, list | tuple) and any(isinstance(phase, Phase) for phase in answer)
    return tuple(answer) if phased else (Phase(0.0, answer),)


def writable(tree: Any) -> Any:
    """A tree that somebody else's function may write into: containers and NumPy arrays of its own."""
    return jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, tree)


def shown(context: Context) -> Context:
    """The context with trees that somebody else's function may write into."""
    return context._replace(source_params=writable(context.source_params), fresh=writable(context.fresh))
