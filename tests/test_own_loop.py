"""The page for a visitor: a loop of one's own learns, transfers, and keeps what is frozen."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import own_loop

ROOT = Path(__file__).parent.parent


def test_it_is_one_page_without_settings_and_trainer_and_the_first_link_of_the_readme():
    text = (ROOT / "experiments" / "own_loop.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert "experiments.runs" not in text and "tljax.train" not in text and "import train" not in text
    links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links[0] == "experiments/own_loop.py"


def test_it_learns_digits_and_each_mask_that_trains_more_learns_more_of_the_clothes(capsys, monkeypatch):
    """With the steps of the page cut to a quarter; ten classes, so guessing is right once in ten."""
    monkeypatch.setattr(own_loop, "STEPS", 50)
    own_loop.run()
    accuracies = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines()]
    assert len(accuracies) == 4 and accuracies[0] > 0.6
    assert 0.2 < accuracies[1] < accuracies[3]


def test_a_leaf_that_moved_is_found():
    start = {"body": np.float32([1, 2]), "head": np.float32([1])}
    mask = {"body": False, "head": True}
    assert own_loop.frozen_bytes(start, {"body": jnp.float32([1, 2]), "head": jnp.float32([3])}, mask) == {"body": True}
    assert own_loop.frozen_bytes(start, {**start, "body": np.float32([1, 2.5])}, mask) == {"body": False}
    assert own_loop.frozen_bytes({**start, "body": np.float32([0.0])}, {**start, "body": np.float32([-0.0])}, mask) == {
        "body": False
    }


def test_its_step_trains_only_what_the_mask_says_and_is_compiled_once():
    from tljax import models, optimizer

    model = models.build("mlp", 3, hidden=(4,), activation="relu")
    params = models.init(model, jax.random.key(0), (2, 2, 1))
    trains = own_loop.Trains(("head",))
    tx = optimizer.masked(optax.sgd(0.1), trains.mask(params))
    state = own_loop.State(params, tx.init(params))
    images, labels = jnp.ones((5, 2, 2, 1), jnp.uint8) * 255, jnp.zeros(5, jnp.int32)
    before = own_loop.step._cache_size()
    for _ in range(2):
        state = own_loop.step(model, tx, trains, state, images, labels)
    assert own_loop.step._cache_size() == before + 1
    np.testing.assert_array_equal(state.params["hidden_0"]["kernel"], params["hidden_0"]["kernel"])
    logits = models.apply(model, params, images)
    gradient = np.asarray(jax.nn.softmax(logits) - jax.nn.one_hot(labels, 3)).mean(0)  # of the bias, by hand
    once = own_loop.step(model, tx, trains, own_loop.State(params, tx.init(params)), images, labels).params
    assert once["head"]["bias"] == pytest.approx(np.asarray(params["head"]["bias"]) - 0.1 * gradient, abs=1e-6)
