"""Strategies whose mask moves, each against a plain loop in NumPy that was written from its paper."""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from planted import schedules
from test_mask_schedule import Loop

from tljax import models, paths
from tljax.audit import problems
from tljax.audit import schedules as audited
from tljax.audit.cases import case as build_case
from tljax.audit.lines import line
from tljax.audit.strategies import _fresh_trains, _lint, _on_all
from tljax.strategies import autofreeze, badam, gmt, hft, lisa, mofo, spiel
from tljax.types import Context, MaskSchedule, Method

STAGES = ("hidden_0", "hidden_1", "hidden_2", "head")
STEPS = 100
RATE, B1, B2, EPS = 0.01, 0.9, 0.999, 1e-8
Leaves = dict[str, np.ndarray]


def network(seed: int = 0) -> tuple[Any, Callable[[Any], jax.Array]]:
    """Parameters in float64, and the loss of a small MLP."""
    model = models.build("mlp", 3, hidden=(5, 4, 4), activation="tanh")
    images, noise = jax.random.normal(jax.random.key(1), (12, 6), jnp.float64), jax.random.key(seed)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), models.init(model, noise, (6,)))
    targets = jax.nn.one_hot(jnp.arange(12) % 3, 3, dtype=jnp.float64)
    return params, lambda params: optax.softmax_cross_entropy(models.apply(model, params, images), targets).mean()


def gradient_of(params: Any, loss: Callable[[Any], jax.Array]) -> Callable[[Leaves], Leaves]:
    gradient, structure = jax.jit(jax.grad(loss)), jax.tree.structure(params)

    def of_leaves(leaves: Leaves) -> Leaves:
        tree = jax.tree.unflatten(structure, list(leaves.values()))
        return {path: np.array(leaf) for path, leaf in paths.items(gradient(tree))}

    return of_leaves


class Adam:
    """Adam of one leaf, or of some of its elements, as Kingma and Ba have it."""

    def __init__(self, leaf: np.ndarray) -> None:
        self.m, self.v, self.t = np.zeros_like(leaf), np.zeros_like(leaf), 0

    def step(self, gradient: np.ndarray) -> np.ndarray:
        self.t += 1
        self.m = B1 * self.m + (1 - B1) * gradient
        self.v = B2 * self.v + (1 - B2) * gradient**2
        return -RATE * (self.m / (1 - B1**self.t)) / (np.sqrt(self.v / (1 - B2**self.t)) + EPS)


def key_of(step: int) -> Any:
    return jax.random.fold_in(jax.random.key(0), step)


def in_stage(path: str, stage: str) -> bool:
    return path.startswith(f"{stage}/")


def plain_lisa(leaves: Leaves, gradient: Any) -> Iterator[Leaves]:
    adam = {path: Adam(leaf) for path, leaf in leaves.items()}
    on: set[str] = set()
    for step in range(STEPS):
        if step % 7 == 0:
            drawn = np.array(jax.random.permutation(key_of(step), 2))[:1]
            on = {"hidden_0", "head", *(STAGES[1 + i] for i in drawn)}
            adam |= {path: Adam(leaf) for path, leaf in leaves.items() if path.split("/")[0] not in on}
        g = gradient(leaves)
        leaves = {p: leaf + adam[p].step(g[p]) if p.split("/")[0] in on else leaf for p, leaf in leaves.items()}
        yield leaves


def plain_badam(leaves: Leaves, gradient: Any) -> Iterator[Leaves]:
    order, block = np.arange(4), ""
    for step in range(STEPS):
        turn = step // 6 % 4
        if step % 6 == 0:
            if turn == 0:
                order = np.array(jax.random.permutation(key_of(step), 4))
            before, block = block, STAGES[order[turn]]
        if step % 6 == 0 and block != before:
            adam = {path: Adam(leaf) for path, leaf in leaves.items() if in_stage(path, block)}
        g = gradient(leaves)
        leaves = {p: leaf + adam[p].step(g[p]) if p in adam else leaf for p, leaf in leaves.items()}
        yield leaves


def top(sizes: np.ndarray, fraction: float) -> np.ndarray:
    count = int(np.ceil(fraction * sizes.size))
    return sizes >= np.sort(sizes.ravel())[-count]


def plain_mofo(leaves: Leaves, gradient: Any) -> Iterator[Leaves]:
    adam = {path: Adam(leaf) for path, leaf in leaves.items()}
    for _ in range(STEPS):
        g = gradient(leaves)
        changes = {path: adam[path].step(g[path]) for path in leaves}
        leaves = {p: np.where(top(abs(adam[p].m), 0.3), leaf + changes[p], leaf) for p, leaf in leaves.items()}
        yield leaves


def plain_gmt(leaves: Leaves, gradient: Any, per: str = "leaf") -> Iterator[Leaves]:
    adam = {path: Adam(leaf) for path, leaf in leaves.items()}
    for _ in range(STEPS):
        g = gradient(leaves)
        every = np.concatenate([abs(leaf).ravel() for leaf in g.values()])
        least = np.sort(every)[-int(np.ceil(0.3 * every.size))]
        on = {p: top(abs(g[p]), 0.3) if per == "leaf" else abs(g[p]) >= least for p in leaves}
        changes = {p: adam[p].step(np.where(on[p], g[p], 0)) for p in leaves}
        leaves = {p: np.where(on[p], leaf + changes[p], leaf) for p, leaf in leaves.items()}
        yield leaves


def plain_spiel(leaves: Leaves, gradient: Any) -> Iterator[Leaves]:
    start = leaves
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 2**31 - 1), len(leaves))
    on = {p: top(np.array(jax.random.uniform(k, leaves[p].shape)), 0.2) for p, k in zip(leaves, keys, strict=True)}
    moments = {p: (np.zeros_like(leaf), np.zeros_like(leaf)) for p, leaf in leaves.items()}
    sums: Leaves = {}
    for step in range(STEPS):
        g = gradient(leaves)
        if step % 10 == 3:
            share = 1.0 if step == 3 else 0.5 * max(0, 1 - step / 80)
            for p, leaf in leaves.items():
                active = [tuple(i) for i in np.argwhere(on[p])]
                number = int(np.floor(share * np.ceil(0.2 * leaf.size)))
                dropped = set(sorted(active, key=lambda i, p=p, leaf=leaf: abs(leaf[i] - start[p][i]))[:number])
                kept = set(active) - dropped
                others = [i for i in np.ndindex(leaf.shape) if i not in kept]
                grown = set(sorted(others, key=lambda i, p=p: -abs(sums[p][i]))[:number])
                on[p] = np.array([i in kept | grown for i in np.ndindex(leaf.shape)]).reshape(leaf.shape)
        sums = g if step % 10 == 0 else {p: sums[p] + g[p] for p in g} if step % 10 < 3 else sums
        after = {}
        for p, leaf in leaves.items():
            m, v = moments[p]
            m, v = np.where(on[p], B1 * m + (1 - B1) * g[p], 0), np.where(on[p], B2 * v + (1 - B2) * g[p] ** 2, 0)
            moments[p], t = (m, v), step + 1
            moved = leaf - RATE * (m / (1 - B1**t)) / (np.sqrt(v / (1 - B2**t)) + EPS)
            after[p] = np.where(on[p], moved, start[p])
        leaves = after
        yield leaves


def plain_hft(leaves: Leaves, gradient: Any) -> Iterator[Leaves]:
    adam: dict[str, Adam] = {}
    on: set[str] = set()
    for step in range(STEPS):
        if step % 9 == 0:
            half = []
            for i, stage in enumerate(STAGES[1:-1]):  # one module each: it is on or off
                order, odd = jax.random.split(jax.random.fold_in(key_of(step), i))
                count = (1 + int(jax.random.bernoulli(odd))) // 2
                half += [stage] if int(jax.random.permutation(order, 1)[0]) < count else []
            before, on = on, {"hidden_0", "head", *half}
            adam |= {p: Adam(leaf) for p, leaf in leaves.items() if p.split("/")[0] not in before}
        g = gradient(leaves)
        leaves = {p: leaf + adam[p].step(g[p]) if p.split("/")[0] in on else leaf for p, leaf in leaves.items()}
        yield leaves


def plain_autofreeze(leaves: Leaves, gradient: Any) -> Iterator[Leaves]:
    adam = {path: Adam(leaf) for path, leaf in leaves.items()}
    frozen, norms = 0, np.zeros(3)
    sums = {p: np.zeros_like(leaf) for p, leaf in leaves.items()}
    for step in range(STEPS):
        g = gradient(leaves)
        if step and step % 8 == 0:
            now = np.array(
                [np.sqrt(sum((s**2).sum() for p, s in sums.items() if in_stage(p, stage))) for stage in STAGES[:3]]
            )
            if step > 8 and frozen < 3:
                change = abs(norms - now) / norms
                least = np.percentile(change[frozen:], 60)
                while frozen < 3 and change[frozen] < least:
                    frozen += 1
            norms, sums = now, {p: np.zeros_like(leaf) for p, leaf in leaves.items()}
        sums = {p: sums[p] + g[p] for p in g}
        on = STAGES[frozen:]
        leaves = {p: leaf + adam[p].step(g[p]) if p.split("/")[0] in on else leaf for p, leaf in leaves.items()}
        yield leaves


CASES = {
    "lisa": (lisa, {"layers": 1, "every": 7}, plain_lisa),
    "badam": (badam, {"every": 6}, plain_badam),
    "mofo": (mofo, {"fraction": 0.3}, plain_mofo),
    "gmt": (gmt, {"fraction": 0.3}, plain_gmt),
    "gmt per tree": (gmt, {"fraction": 0.3, "per": "tree"}, functools.partial(plain_gmt, per="tree")),
    "spiel": (spiel, {"fraction": 0.2, "every": 10, "estimate": 3, "rate": 0.5, "steps": 80}, plain_spiel),
    "hft": (hft, {"every": 9}, plain_hft),
    "autofreeze": (autofreeze, {"every": 8, "percentile": 60}, plain_autofreeze),
}
FAST = ("gmt",)


def schedule_of(name: str, params: Any) -> MaskSchedule:
    file, options, _ = CASES[name]
    return file.strategy(params, Context(stages=STAGES), **options)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in CASES])
def test_each_equals_a_plain_loop_step_by_step(name: str) -> None:
    with jax.enable_x64(True):
        params, loss = network()
        schedule = schedule_of(name, params)
        loop = Loop(optax.adam(RATE), schedule, loss)
        seen = loop.run(params)
        plain = CASES[name][2]({p: np.array(leaf) for p, leaf in paths.items(params)}, gradient_of(params, loss))
        for step, (leaves, (after, _)) in enumerate(zip(plain, seen[1:], strict=True)):
            for path, leaf in paths.items(after):
                assert np.abs(leaf - leaves[path]).max() <= 1e-10, (name, step, path)
        assert loop.traced == 1
        counts = list(map(float, jax.tree.leaves(seen[-1][1].trained)))
        assert min(counts) < STEPS, "nothing was ever off"
        again = loop.run(
            *jax.tree.map(lambda leaf: jnp.array(np.array(leaf)), seen[37])[:1], STEPS - 37, _host(seen[37][1])
        )
        for a, b in zip(jax.tree.leaves(again[-1]), jax.tree.leaves(seen[-1]), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _host(state: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.array(np.array(leaf)), state)


PLANTED = {
    "gives_another_tree": ("mask and memory keep their form", "of another tree"),
    "gives_rates": ("mask and memory keep their form", "rates stand in the scope"),
    "forgets_its_dtype": ("mask and memory keep their form", "changes its form"),
    "trains_nothing": ("mask and memory keep their form", "trains nothing"),
    "trains_nothing_every_other_step": ("something trains in each step", "nothing trains in step 1"),
    "counts_in_python": ("each step traces the same", "two programs"),
    "draws_from_numpy": ("each step traces the same", "two"),
    "needs_moments_that_are_not_there": ("the optimizer has what it sees", "no 'trace', it has mu, nu"),
    "reads_test_data": ("the schedule holds no data", r"shape \[10, 10\]"),
    "leaves_the_head_off": ("new leaves are on in time", "'head/bias', 'head/kernel'"),
    "has_more_on_than_slots": ("no more is on than there are slots", "more groups on than its 1 slots"),
    "freezes_the_head_for_good": ("new leaves train in every phase", "which was drawn anew"),
    "every_zero": ("lint on mlp", "every is 0"),
    "words": ("lint on mlp", "give a set"),
}
SLOW = ("trains_nothing_every_other_step", "leaves_the_head_off", "has_more_on_than_slots")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in PLANTED])
def test_each_planted_schedule_is_red_at_its_line(name: str) -> None:
    strategy = getattr(schedules, name)
    case = build_case(Method(strategy), {}, problems.from_model("mlp"))
    check, passed = _lint(Method(strategy), {}, problems.from_model("mlp"))
    lines = {check.name: check}
    if passed:
        lines |= {
            "new leaves train in every phase": line("new leaves train in every phase", _on_all, _fresh_trains, [passed])
        }
        schedule = passed.phases[0].mask
        lines |= {check.name: check for check in audited.traced(case, schedule)}
        if all(check.passed for check in lines.values()):
            lines |= {check.name: check for check in audited.trained(passed, schedule)}
    expected, words = PLANTED[name]
    assert [check.name for check in lines.values() if check.passed is False] == [expected]
    assert re.search(words, lines[expected].detail), lines[expected].detail
