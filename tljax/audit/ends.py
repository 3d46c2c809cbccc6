"""The checks of a strategy's ends: what its `finish` makes of parameters that have moved where its masks train."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax import batch_stats, initialization, masks, paths, train
from tljax.audit.cases import Case, global_randomness
from tljax.audit.lines import Check, changed, line, same_bytes
from tljax.types import MaskSchedule, Params

FORM = "ends have the parameters' form"
KEPT = "ends keep what is frozen"
FOLLOWS = "ends follow from what is given"
FINITE = "ends and outputs are finite"


def untrained(cases: Sequence[Case], on_all: Callable[..., str]) -> list[Check]:
    """The lines on the ends that need no training, for parameters that are made: the first alone if it fails.

    `on_all(proof, cases)` gives the detail of a proof that holds in all cases.
    """
    promises = {FORM: _form_kept, KEPT: _frozen_kept, FOLLOWS: _follow}
    checks: list[Check] = []
    for name, promise in promises.items():
        checks.append(line(name, on_all, promise, cases))
        if not checks[0].passed:
            break
    return checks


def trained(case: Case, model: Any, reached: Sequence[Params], inputs: Any) -> Check:
    """The line on the ends of a fit: `reached` are the parameters at its start and after each phase."""
    return line(FINITE, _finite, case, model, reached, inputs)


def _ends(case: Case, params: Params, began: Sequence[Params] | None, state: int = 0) -> dict[str, Params]:
    """What `finish` gives, called as in a fit, with Python's and NumPy's global randomness as a seed of `state` leaves
    it."""
    initialization.require_known_phases(case.method, case.phases, "the strategy")
    context = case.context._replace(gradient=None, fisher=None)
    with global_randomness(state):
        return initialization.finished(
            *(case.method, case.options, case.params, context, "the strategy", initialization.call_plainly),
            *(params, began, len(case.phases)),
        )


def _where(case: Case) -> list[dict[str, Any]]:
    """For each phase, where each leaf trains: a bool or a bool array, by path."""
    rows = []
    for phase in case.evaluated:
        mask = phase.mask.scope if isinstance(phase.mask, MaskSchedule) else phase.mask
        leaves = paths.items(mask, masks.static(case.params, mask))
        rows.append({path: masks.chosen(m) if trains else False for path, m, trains in leaves})
    return rows


def _moved(case: Case) -> tuple[Params, list[Params]]:
    """Parameters as after training, and those with which each phase after the first began: noise on what trains."""
    rng, reached = np.random.default_rng(0), [jax.tree.map(lambda leaf: np.asarray(jnp.asarray(leaf)), case.params)]
    for where in _where(case):

        def step(path: str, leaf: Any, where: dict[str, Any] = where) -> Any:
            if not np.any(where[path]):
                return leaf
            noise = rng.normal(scale=0.1, size=leaf.shape)
            return np.where(where[path], leaf + noise, leaf).astype(leaf.dtype)

        reached.append(paths.each(step, reached[-1]))
    return reached[-1], reached[1:-1]


def _form_kept(case: Case) -> None:
    first, last = (sorted(_ends(case, *trees)) for trees in ((case.params, None), _moved(case)))
    assert first == last, (
        f"its results are {', '.join(first)} before training and {', '.join(last)} after it: names follow from options"
    )


def _frozen_kept(case: Case) -> None:
    params, began = _moved(case)
    where = _where(case)
    for name, tree in _ends(case, params, began).items():
        for path, end, kept in paths.items(tree, params):
            frozen = ~np.broadcast_to(np.logical_or.reduce([rows[path] for rows in where]), np.shape(kept))
            same = same_bytes(np.asarray(end)[frozen], np.asarray(kept)[frozen])
            assert same, f"'{path}' does not train in any phase, but '{name}' has it otherwise"


def _follow(case: Case) -> None:
    first, second = (_ends(case, *_moved(case), state=state) for state in (0, 1))
    for name, tree in first.items():
        differ = changed(tree, second[name])
        assert not differ, f"two calls give '{name}' with other values at {paths.some(differ)}: draw from context.key"


def _finite(case: Case, model: Any, reached: Sequence[Params], inputs: Any) -> str:
    forward = jax.jit(train.forward(model, case.applied))
    ends = _ends(case, reached[-1], reached[1:-1])
    for name, tree in ends.items():
        lost = [path for path, leaf in paths.items(tree) if not np.isfinite(leaf).all()]
        assert not lost, f"'{name}' is not finite at {paths.some(lost)}"
        outputs = np.asarray(forward(batch_stats.join(tree, case.model_state), inputs))
        assert np.isfinite(outputs).all(), f"the outputs of '{name}' are not finite"
    names = list(ends)
    return f"{', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}, on {case.problem.name}"
