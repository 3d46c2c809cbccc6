"""Strategies: each file of the folder, on the reference model and a deeper one."""

import ast
import inspect

import jax
import numpy as np
import pytest

from tljax import masks, models, paths, plugins
from tljax.types import Context, InputError

NAMES = plugins.names("tljax.strategies", "strategy")
MODEL = models.build("mlp", 3, hidden=(5, 4), activation="relu")
PARAMS = jax.tree.map(np.asarray, models.init(MODEL, jax.random.key(0), (2, 2, 1)))
FRESH = masks.under(PARAMS, "head")
CONTEXT = Context(stages=models.names(MODEL), fresh=FRESH)

TRAINED = {
    "scratch": {"hidden_0/bias", "hidden_0/kernel", "hidden_1/bias", "hidden_1/kernel", "head/bias", "head/kernel"},
    "full": {"hidden_0/bias", "hidden_0/kernel", "hidden_1/bias", "hidden_1/kernel", "head/bias", "head/kernel"},
    "head_only": {"head/bias", "head/kernel"},
    "last_k": {"head/bias", "head/kernel"},
    "last_k:k=2": {"hidden_1/bias", "hidden_1/kernel", "head/bias", "head/kernel"},
    "bias_only": {"hidden_0/bias", "hidden_1/bias", "head/bias", "head/kernel"},
}


def trained(text, context=CONTEXT):
    method, options = plugins.method(text)
    mask = method.strategy(PARAMS, context, **options)
    masks.lint(PARAMS, mask, context.fresh)
    return {path for path, m in zip(paths.names(mask), jax.tree.leaves(mask), strict=True) if m}


@pytest.mark.parametrize("text", TRAINED)
def test_a_strategy_trains_just_these_leaves(text):
    assert trained(text) == TRAINED[text]


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_runs_by_its_bare_name_has_a_docstring_and_a_case_here(name):
    assert name in TRAINED
    assert len(trained(name)) > 0
    module = inspect.getmodule(plugins.method(name)[0].strategy)
    assert ast.get_docstring(ast.parse(inspect.getsource(module)))


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_gives_the_same_mask_for_abstract_parameters(name):
    method, options = plugins.method(name)
    abstract = jax.eval_shape(lambda: PARAMS)
    assert method.strategy(abstract, CONTEXT, **options) == method.strategy(PARAMS, CONTEXT, **options)


def test_a_bias_only_fit_with_a_copied_head_leaves_its_kernel():
    nothing = masks.invert(masks.by_path(PARAMS, lambda path: True))
    assert trained("bias_only", CONTEXT._replace(fresh=nothing)) == {"hidden_0/bias", "hidden_1/bias", "head/bias"}


@pytest.mark.parametrize("k", [0, 4, -1])
def test_last_k_refuses_more_stages_than_there_are(k):
    with pytest.raises(InputError, match="has 3 stages"):
        trained(f"last_k:k={k}")
