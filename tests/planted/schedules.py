"""Planted: schedules of masks with a fault each."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from tljax import masks, paths
from tljax.types import MaskSchedule

CALLS = itertools.count()
TEST_IMAGES = np.linspace(0, 1, 100).reshape(10, 10)


def everything(params):
    return masks.by_path(params, lambda path: True)


def no_memory(params, key):
    return ()


def all_on(memory, seen):
    return jax.tree.map(lambda leaf: True, seen.params), memory


def gives_another_tree(params, context):
    def choose(memory, seen):
        return {"body": seen.step == 0}, memory

    return MaskSchedule(no_memory, choose, everything(params))


def gives_rates(params, context):
    def choose(memory, seen):
        return jax.tree.map(lambda leaf: jnp.float32(0.5), seen.params), memory

    return MaskSchedule(no_memory, choose, everything(params))


def forgets_its_dtype(params, context):
    def choose(memory, seen):
        return all_on(memory, seen)[0], memory / 2

    return MaskSchedule(lambda params, key: jnp.zeros((), jnp.int32), choose, everything(params))


def trains_nothing(params, context):
    def choose(memory, seen):
        return jax.tree.map(lambda leaf: False, seen.params), memory

    return MaskSchedule(no_memory, choose, everything(params))


def trains_nothing_every_other_step(params, context):
    def choose(memory, seen):
        return jax.tree.map(lambda leaf: seen.step % 2 == 0, seen.params), memory

    return MaskSchedule(no_memory, choose, everything(params))


def counts_in_python(params, context):
    def choose(memory, seen):
        on = next(CALLS) % 2 == 0
        return jax.tree.map(lambda leaf: leaf.ndim > 0 if on else leaf.ndim == 2, seen.params), memory

    return MaskSchedule(no_memory, choose, everything(params))


def draws_from_numpy(params, context):
    def choose(memory, seen):
        _, *others = jax.tree.leaves(seen.params)
        limit = np.float32(np.random.rand())
        on = [True, *(jax.random.uniform(seen.key) < limit for _ in others)]
        return jax.tree.unflatten(jax.tree.structure(seen.params), on), memory

    return MaskSchedule(no_memory, choose, everything(params))


def needs_moments_that_are_not_there(params, context):
    return MaskSchedule(no_memory, all_on, everything(params), sees=frozenset({"trace"}))


def reads_test_data(params, context):
    def choose(memory, seen):
        bright = jnp.asarray(TEST_IMAGES).mean() + seen.step > 0
        return jax.tree.map(lambda leaf: bright, seen.params), memory

    return MaskSchedule(no_memory, choose, everything(params))


def leaves_the_head_off(params, context):
    head = masks.under(params, context.stages[-1])

    def choose(memory, seen):
        return jax.tree.map(lambda leaf, fixed: (seen.step >= 0) & (not fixed), seen.params, head), memory

    return MaskSchedule(no_memory, choose, everything(params))


def freezes_the_head_for_good(params, context):
    return MaskSchedule(no_memory, all_on, masks.under(params, context.stages[0]))


def every_zero(params, context):
    return MaskSchedule(no_memory, all_on, everything(params), every=0)


def has_more_on_than_slots(params, context):
    number = {stage: i for i, stage in enumerate(context.stages)}
    groups = paths.each(lambda path, leaf: number.get(path.split("/")[0], 0), params)
    return MaskSchedule(no_memory, all_on, everything(params), off="dropped", groups=groups, slots=1)


def words(params, context):
    return MaskSchedule(no_memory, all_on, everything(params), sees="mu")


def switches_all_above_the_first_stage(params, context):
    def choose(memory, seen):
        return jax.tree.map(lambda leaf: seen.step % 2 == 0, seen.params), memory

    return MaskSchedule(no_memory, choose, masks.invert(masks.under(params, context.stages[0])))
