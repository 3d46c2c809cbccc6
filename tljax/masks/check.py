"""Refuse masks and phases that cannot be meant, before anything compiles."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from tljax import paths, plugins
from tljax.masks.combine import require_fit, static
from tljax.masks.leaf import canonical_leaf, plain, selects, traced
from tljax.types import InputError, Mask, MaskSchedule, Params, Phase


def lint(params: Params, mask: Mask, fresh: Mask | None = None) -> None:
    """Raise InputError, naming the leaf, for a mask that cannot be meant.

    Such a mask has another tree than `params`; a leaf that is neither bool, number nor array; a number that is negative
    or not finite, in an array too; an array that does not fit its leaf, or is all zero. Or it trains nothing, or
    freezes a leaf that `fresh` says was drawn anew.
    """
    if mask is None and params is not None:
        raise InputError("the mask is None, as of a function that forgets to return: return a mask")
    paths.same_structure(params, mask, "the parameters", "the mask")
    for path, leaf, m in paths.items(params, mask):
        _lint_leaf(path, leaf, m)
    trained = static(params, mask)
    if not any(jax.tree.leaves(trained)):
        raise InputError("the mask freezes every leaf: train at least one")
    if fresh is not None:
        paths.same_structure(params, fresh, "the parameters", "the fresh mask")
        rows = zip(paths.items(fresh, trained), paths.trainable(params), strict=True)
        frozen = [path for (path, drawn, trains), able in rows if drawn and not trains and able]
        if frozen:
            raise InputError(
                f"the mask freezes {paths.some(frozen)}, which was drawn anew: return masks.union(mask, context.fresh)"
            )


def require_leaf(path: str, leaf: Any, m: Any) -> None:
    """Raise InputError unless `m` is a bool, a finite number of at least 0, or an array of them that fits its leaf."""
    m = canonical_leaf(path, m)
    if isinstance(m, jax.core.Tracer):
        raise traced(path)
    require_fit(path, leaf, m)


def _lint_leaf(path: str, leaf: Any, m: Any) -> None:
    """Raises InputError, naming the leaf, for a leaf of a mask that cannot be meant."""
    require_leaf(path, leaf, m)
    if selects(m) and not np.asarray(m).any():
        raise InputError(f"the mask's array at '{path}' is all zero: write False")


def lint_phases(params: Params, phases: Sequence[Phase], fresh: Mask | None = None) -> None:
    """Raise InputError, naming the phase where there are several, for phases that cannot be meant.

    Such phases are anything but a sequence of one Phase or more; have starts that are not finite, do not begin at 0,
    do not strictly increase, or reach 1; have an `until` that is no function, another `restore` than 'best', or a rate
    that is not above 0; or have a mask that `lint` refuses, or a schedule that `lint_schedule` does: no phase may
    freeze a fresh leaf. A mask that is a strategy is known at its boundary only: lint the mask that it returns there.
    """
    if not isinstance(phases, Sequence) or not phases or not all(isinstance(phase, Phase) for phase in phases):
        raise InputError("phases are a list of one Phase(start, mask) or more, from tljax.types")
    before = -1.0
    for i, phase in enumerate(phases):
        start: Any = plain(phase.start)
        if not isinstance(start, int | float | np.number) or not 0 <= start < 1:
            raise InputError(
                f"phase {i} starts at {plugins.shown(start)}: a start is a fraction of training, at least 0 and below 1"
            )
        if i == 0 and start != 0:
            raise InputError(
                f"phase 0 starts at {start}: the first phase starts at 0.0, so put Phase(0.0, mask) before it"
            )
        if start <= before:
            raise InputError(f"phase {i} starts at {start}, and phase {i - 1} at {before}: starts strictly increase")
        before = float(start)
        if phase.until is not None and not callable(phase.until):
            raise InputError(
                f"phase {i}: until is {plugins.shown(phase.until)}: give a function of the scores so far, such as "
                "plateau(patience=3) of tljax.plateau"
            )
        if phase.restore not in (None, "best"):
            raise InputError(f"phase {i}: restore is {plugins.shown(phase.restore)}: give 'best', or leave it out")
        if not isinstance(phase.rate, int | float) or not 0 < phase.rate < np.inf:
            raise InputError(f"phase {i}: rate is {plugins.shown(phase.rate)}: give a number above 0, as rate=0.1")
        if not is_strategy(phase.mask):
            try:
                if isinstance(phase.mask, MaskSchedule):
                    lint_schedule(params, phase.mask, fresh)
                else:
                    lint(params, phase.mask, fresh)
            except InputError as error:
                raise InputError(f"phase {i}: {error}" if len(phases) > 1 else str(error)) from error


_WORDS = {"when": ("before", "after"), "off": ("live", "gated", "kept", "dropped")}


def lint_schedule(params: Params, schedule: MaskSchedule, fresh: Mask | None = None) -> None:
    """Raise InputError for a schedule of masks that cannot be meant; none of its functions is called.

    Such a schedule has functions that are none, a word that is none of its field's, an `every` that is no whole number
    of at least 1, a scope that `lint` refuses, or groups that are no whole numbers of at least 0 for all leaves; or it
    sees gradients before there are any.

    >>> lint_schedule({"w": np.ones(2)}, MaskSchedule(print, print, {"w": True}, every=0))
    Traceback (most recent call last):
    ...
    tljax.types.InputError: the schedule's every is 0: give a whole number of steps, at least 1
    """
    for name in ("init", "choose"):
        if not callable(getattr(schedule, name)):
            raise InputError(f"the schedule's {name} is {plugins.shown(getattr(schedule, name))}: give a function")
    if schedule.off_since is not None and not callable(schedule.off_since):
        raise InputError(f"the schedule's off_since is {plugins.shown(schedule.off_since)}: give a function, or None")
    for name, words in _WORDS.items():
        if (word := getattr(schedule, name)) not in words:
            raise InputError(f"the schedule's {name} is {plugins.shown(word)}: give one of {', '.join(words)}")
    if isinstance(schedule.every, bool) or not isinstance(schedule.every, int) or schedule.every < 1:
        raise InputError(f"the schedule's every is {schedule.every}: give a whole number of steps, at least 1")
    if isinstance(schedule.slots, bool) or not isinstance(schedule.slots, int) or schedule.slots < 0:
        raise InputError(f"the schedule's slots is {plugins.shown(schedule.slots)}: give a whole number, at least 0")
    if schedule.slots and (schedule.when != "before" or schedule.off != "dropped" or schedule.groups is None):
        raise InputError(
            "the schedule has slots: give groups, when='before' and off='dropped', as a slot is taken over"
        )
    if schedule.slots and {*schedule.sees} - {"loss"}:
        raise InputError("the schedule has slots, and sees moments, of which slots hold a part: leave one of them out")
    if isinstance(schedule.sees, str):
        raise InputError(f"the schedule's sees is {schedule.sees!r}: give a set, as frozenset({{{schedule.sees!r}}})")
    if schedule.when == "before" and "gradients" in schedule.sees:
        raise InputError("the schedule sees gradients, and chooses before there are any: give when='after'")
    if isinstance(schedule.scope, MaskSchedule) or is_strategy(schedule.scope):
        raise InputError("the schedule's scope is no mask: give the mask of all that may train")
    try:
        lint(params, schedule.scope, fresh)
    except InputError as error:
        raise InputError(f"the schedule's scope: {error}") from error
    if schedule.groups is not None:
        paths.same_structure(params, schedule.groups, "the parameters", "the schedule's groups")
        for path, group in paths.items(schedule.groups):
            if isinstance(group, bool) or not isinstance(group, int | np.integer) or group < 0:
                raise InputError(f"the schedule's group at '{path}' is {plugins.shown(group)}: give a number from 0 on")


def is_strategy(mask: Any) -> bool:
    """Whether a phase's mask is a strategy, evaluated at its boundary: a function, and not a tree that is callable.

    (The mask of an Equinox module is a module, so it is callable.)

    >>> is_strategy(lambda params, context: params), is_strategy({"a": True})
    (True, False)
    """
    return callable(mask) and jax.tree_util.all_leaves([mask])
