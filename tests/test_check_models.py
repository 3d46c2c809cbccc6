"""Every strategy of the folder gives masks of the models that come with tljax, or says in one line why it does not."""

from pathlib import Path

import check_models
import jax
import pytest

from tljax import masks, paths, plugins
from tljax.audit import cases, problems
from tljax.types import InputError

MODELS = ("vit:width=8:depth=1:heads=2:patch=4", "resnet:depth=10:width=4", "efficientnet_lite:width=0.1:depth=0.25")
STRATEGIES = sorted(path.stem for path in (Path(masks.__file__).parents[1] / "strategies").glob("[a-z]*.py"))
GRADIENTS = ("auto_rgn", "fisher", "gradient_mask")
"""Those that look at gradients; of the network of most layers these take long to compile."""
SAMPLE = [*check_models.pairs(["mlp", "vit:width=16:depth=2"], [])][17::47]
"""Of the pairs that `check_models.py` tries; all of them take hours."""


@pytest.fixture(scope="module")
def tried():
    """{model: its problem}."""
    return {name: problems.from_model(name) for name in MODELS}


def masked(strategy, problem):
    """The masks of a strategy's phases, each held against its tree by `masks.lint_phases`."""
    method, options = plugins.method(strategy)
    case = cases.case(method, options, problem)
    phases = cases.evaluate(case, cases.ask(case))
    masks.lint_phases(case.params, phases, case.must)
    return case.params, [phase.mask for phase in phases]


@pytest.mark.slow
def test_every_strategy_applies_or_says_why(tried):
    applied, refused = 0, {}
    for model in MODELS:
        for strategy in STRATEGIES:
            if strategy in GRADIENTS and "efficientnet" in model:
                continue
            try:
                masked(strategy, tried[model])
                applied += 1
            except InputError as error:
                refused[strategy, model] = str(error)
    print(f"{applied} masks, {len(refused)} refused")
    assert applied + len(refused) == len(MODELS) * len(STRATEGIES) - len(GRADIENTS)
    assert refused.keys() == {("attention_only", model) for model in MODELS[1:]}
    assert all("the model has no attention" in reason and "\n" not in reason for reason in refused.values())


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "model"), SAMPLE)
def test_a_sample_of_the_table_is_green(strategy, model):
    assert check_models.outcome(strategy, model) == ("green", "")


def test_the_table_has_each_strategy_on_each_model_and_can_be_asked_for_less():
    every = [*check_models.pairs([], [])]
    assert len(set(every)) == len(every) == len(check_models.MODELS) * (len(STRATEGIES) + len(check_models.PRESETS))
    some = [*check_models.pairs(["resnet:depth=10", "mlp"], ["lisa", "wise_ft"])]
    assert {model for _, model in some} == {"mlp", "resnet:depth=10:width=8"} and len(some) == 8
    assert {strategy for strategy, _ in some} == {"lisa", "wise_ft", "wise_ft:curve=5", "wise_ft:probe=0.5"}
    assert {model.partition(":")[0] for _, model in SAMPLE} == {"mlp", "vit"}


def trains(strategy, problem):
    """The paths that train under a strategy, below the head."""
    params, [mask] = masked(strategy, problem)
    return {row.path for row in masks.table(params, mask) if row.trained_size and not row.path.startswith("head/")}


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS[1:])
def test_norms_and_biases_are_those_of_the_papers(model, tried):
    """Norms: each scale and bias (Frankle et al. 2020, arXiv:2003.00152). Convolutions have no bias: those of norms."""
    named = {path for path, _ in paths.items(tried[model].drawn) if "batch_stats" not in path}
    norms = {path for path in named if path.endswith(("/scale", "/bias")) and not path.startswith("head/")}
    assert len(norms) > 20 and all("norm" in path for path in norms)
    assert trains("norm_only", tried[model]) == norms
    assert trains("bias_only", tried[model]) == {path for path in norms if path.endswith("/bias")}


@pytest.mark.parametrize("model", MODELS[1:])
def test_depth_is_that_of_the_stages(model, tried):
    """`last_k`, `layerwise_decay` and `gradual_unfreeze` take stages in the order of the model, the head the last."""
    problem = tried[model]
    params, [mask] = masked("last_k:k=3", problem)
    last = {row.path.split("/")[0] for row in masks.table(params, mask) if row.trained_size}
    assert last == set(problem.stages[-3:])
    _, [scales] = masked("layerwise_decay:decay=0.5", problem)
    of_stage = {stage: set(map(float, jax.tree.leaves(scales[stage]))) for stage in problem.stages}
    for i, stage in enumerate(reversed(problem.stages)):
        assert of_stage[stage] == {0.5**i}
    params, unfrozen = masked("gradual_unfreeze", problem)
    for i, mask in enumerate(unfrozen, 1):
        stages = {row.path.split("/")[0] for row in masks.table(params, mask) if row.trained_size}
        assert stages == set(problem.stages[-i:])
