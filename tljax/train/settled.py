"""Stages that a schedule has switched off for good, from the input up: their features are computed once.

A schedule that says since when each group is off for good (`MaskSchedule.off_since`) is asked at the ends of segments
alone, and what it says there is read from the state. So which program trains the next segment follows from the flags
and from the fit, never from a timing, from the fit's company or from where a run was resumed.
"""

from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np

from tljax import optimizer, paths
from tljax.models import randomness
from tljax.train import features
from tljax.train.data import Data, Stream, batch_spec
from tljax.train.features import FeatureCache
from tljax.train.step import Fit, Spec, batch_size, frozen_prefix, frozen_prefix_of, trained_leaves
from tljax.types import InputError, OptState, Params


def obstacle(spec: Spec, cache: FeatureCache | None) -> str:
    """Why the features of what a schedule switches off for good are computed in every step all the same; '' if they
    need not be. It follows from flags, and is of a `spec` whose schedule has `off_since`."""
    assert spec.schedule is not None
    reasons = {
        "no features are kept": cache is None or not cache.budget,
        "inputs are augmented": bool(spec.augment),
        "parameters are merged": spec.merge is not None,
        "a penalty compares features": any("features" in penalty.needs for penalty in spec.penalties),
        "gradients of what is off go on": spec.schedule.off == "live",
        "groups share slots": spec.schedule.slots > 0,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def off_since(spec: Spec, state: OptState) -> np.ndarray:
    """int [fits, groups]: the step of its phase since which each group is off for good, by a state of `scheduled`."""
    assert spec.schedule is not None and spec.schedule.off_since is not None
    return np.asarray(jax.vmap(spec.schedule.off_since, axis_size=len(state.step))(state.memory))


def prefix(
    spec: Spec,
    fit: Fit,
    data: Data | Stream,
    past: Sequence[int],
    began: int,
    latest: int,
    since: np.ndarray,
    cache: FeatureCache,
) -> tuple[str, ...]:
    """The leading stages on whose features one fit goes on to train; () if they are those of its mask, or none.

    The phase began at a step and ends at the `latest`; `since` is the fit's row of `off_since`. At each of the ends of
    segments that are `past`, in turn, the prefix grows if more stages are off for good, and if its features are worth
    it for the steps that are left.
    """
    constant: tuple[str, ...] = frozen_prefix_of(spec)
    longest: tuple[str, ...] = ()
    for end in past:
        names = _off(spec, data, since < end - began)
        longer = replace(spec, settled=names)
        if len(names) > max(len(constant), len(longest)):
            wanted = features.features_bytes(longer, fit, data, (latest - end) * batch_size(fit), cache)
            longest = names if 0 < wanted <= cache.budget else longest
    return longest


def _off(spec: Spec, data: Data | Stream, is_off: np.ndarray) -> tuple[str, ...]:
    """The leading stages that compute the same in every step from here on, where these groups are off for good."""
    assert spec.schedule is not None
    trains, groups = trained_leaves(spec), spec.schedule.groups
    groups = jax.tree.map(lambda _: 0, trains) if groups is None else groups
    number = dict(paths.items(groups))
    moves = paths.each(lambda path, leaf: leaf and not is_off[number[path]], trains)
    example = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batch_spec(data, 1))
    # A stage that is off by a schedule draws and follows batches as before: only a mask makes it run as in evaluation.
    others = (*spec.keeps_dropout, *spec.tracked, *spec.reestimated, *randomness.stages(spec.model, example))
    names = frozen_prefix(spec.model, moves, others)
    return names if len(names) < len(spec.model) else ()


def counts(spec: Spec, state: OptState) -> dict[str, np.ndarray]:
    """{path: in how many steps each fit trained the leaf} of the stages that are `spec.settled`."""
    if not spec.settled or not isinstance(state, optimizer.Scheduled):
        return {}
    inside = paths.inside(spec.settled)
    return {path: np.array(leaf) for path, leaf in paths.items(state.trained) if inside(path)}


def require_off(before: Params, after: Params, step: int) -> None:
    """Raise InputError if what was off for good has trained since: `counts` before some steps, and after them."""
    for path, times in before.items():
        if not np.array_equal(times, after[path]):
            raise InputError(
                f"the schedule said that '{path}' is off for good, and had it on before step {step}: let `off_since` "
                "say so of groups alone that are never on again"
            )
