"""Weights of other libraries by the rules that tljax ships: the libraries' own logits, and their arrays again.

tests/make_layouts.py made tests/layouts with the libraries themselves.
"""

import json
from pathlib import Path

import jax
import layout_values
import numpy as np
import pytest

from tljax import checkpoint, models, weights
from tljax.weights import resize

FOLDER = Path(__file__).parent / "layouts"
SLOW = {
    "torchvision_resnet50",
    "torchvision_resnet18",
    "timm_resnet_basic",
    "timm_vit_avg",
    "hf_resnet",
    "hf_vit_in_memory",
    "hf_resnet_basic",
}
CASES = [
    pytest.param(file.stem, marks=[pytest.mark.slow] * (file.stem in SLOW)) for file in sorted(FOLDER.glob("*.json"))
]


def read(case, size):
    """(model, arrays in the library's layout, rules, parameters for images of this size)."""
    about = json.loads((FOLDER / f"{case}.json").read_text())
    model = models.build(about["model"], 5, hidden=(), activation="relu")
    arrays = layout_values.arrays(about["layout"])
    rules = weights.read_rules(about["rules"])
    return model, arrays, rules, weights.grafted(arrays, rules, models.abstract(model, (size, size, 3)))


@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_the_librarys_at_two_sizes(case):
    with np.load(FOLDER / f"{case}.npz") as known:
        expected = {int(name.removeprefix("logits_")): known[name] for name in known}
    assert len(expected) == 2
    for size, logits in expected.items():
        model, _, _, params = read(case, size)
        actual = models.apply(model, params, layout_values.images(size))
        np.testing.assert_allclose(actual, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_way_back_gives_the_librarys_arrays_to_the_bit(case):
    about = json.loads((FOLDER / f"{case}.json").read_text())
    _, arrays, rules, params = read(case, min(about["sizes"]) if "resnet" in case else 32)
    kept = {name: array for name, array in arrays.items() if not name.endswith("num_batches_tracked")}
    in_memory = {name: array.dtype for name, array in kept.items()} if case == "hf_vit_in_memory" else None
    back = weights.exported(checkpoint.flatten(params), rules, in_memory)
    assert back.keys() == kept.keys()
    for name, array in kept.items():
        assert back[name].dtype == array.dtype and back[name].shape == array.shape, name
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_every_shipped_rule_is_of_an_array_and_has_a_way_back():
    assert weights.names() == sorted(file.stem for file in weights.rules.FOLDER.glob("*.rules"))
    for name in weights.names():
        for rule in weights.read_rules(name):
            assert weights.without_inverse(rule.steps) == "", rule.shown


@pytest.mark.parametrize("case", sorted(set(np.load(FOLDER / "grids.npz").files) - {"grid"}))
def test_positions_are_resized_as_each_library_does_it(case):
    convention, _, size = case.partition("_")
    height, width = map(int, size.split("x"))
    with np.load(FOLDER / "grids.npz") as known:
        grid, expected = known["grid"].astype(np.float64), known[case]
    actual = resize.positions(grid, height * width, convention, ((7, 7), (height, width)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


def test_a_class_token_is_kept_and_a_grid_that_is_not_square_is_said():
    array = np.arange(10, dtype=np.float32).reshape(5, 2)
    resized = resize.positions(array, 10)
    np.testing.assert_array_equal(resized[0], array[0])
    np.testing.assert_allclose(resized[1:].mean(0), array[1:].mean(0), rtol=1e-6)
    assert resize.positions(np.ones((12, 2), np.float32), 9, "plain", ((3, 4), (3, 3))).shape == (9, 2)
    assert jax.numpy.allclose(resize.positions(np.ones((1 + 12, 2)), 1 + 9, "plain", ((3, 4),)), 1)
