"""From data to a verdict for values, several labels and tokens: a planted effect is found, and where none is, none is.

The null is exact: a source that is trained at a rate of 0 is one more draw of what scratch starts from.
"""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax
from sklearn import metrics as peer

from experiments import compare, search, transfer
from experiments.runs import directory, metrics
from tljax.types import InputError

pytestmark = pytest.mark.usefixtures("no_pictures")

CHARACTERS = '''
"""A causal character model of two blocks."""

import flax.linen as nn
import jax.numpy as jnp

from tljax.models.linen import stage


class Embedding(nn.Module):
    vocabulary: int
    width: int

    @nn.compact
    def __call__(self, tokens):
        place = self.param("place", nn.initializers.normal(0.02), (tokens.shape[1], self.width))
        return nn.Embed(self.vocabulary, self.width)(tokens) + place[None]


class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(self.width)(nn.gelu(nn.Dense(2 * self.width)(nn.LayerNorm()(x))))


def model(vocabulary, *, width=16):
    blocks = [stage(f"block_{i}", Block(width)) for i in range(2)]
    return [stage("embedding", Embedding(vocabulary, width)), *blocks, stage("head", nn.Dense(vocabulary))]
'''


def features(seed: int, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [examples, 8], and 12 nonlinear features of them that both tasks of a kind are of."""
    weights = 1.5 * np.random.default_rng(0).normal(size=(8, 12))
    inputs = np.random.default_rng(seed).normal(size=(examples, 8)).astype(np.float32)
    return inputs, np.tanh(inputs @ weights)


def of_features(kind: str, seed: int, outputs: int, train: int, test: int) -> dict[str, np.ndarray]:
    """A task whose targets follow from the features."""
    inputs, hidden = features(seed, train + test)
    values = hidden @ np.random.default_rng(seed + 50).normal(size=(12, outputs)) / 2
    targets = values.astype(np.float32) if kind == "values" else values > 0.3
    parts = {"train": slice(train), "test": slice(train, None)}
    return {f"{split}_{name}": array[rows] for split, rows in parts.items() for name, array in
            (("features", inputs), ("targets", targets))}  # fmt: skip


def of_text(seed: int, share: float, train: int, test: int, length: int = 12) -> dict[str, np.ndarray]:
    """Sequences of a Markov chain over 8 characters: a common one, but for a `share` of it that is this text's own."""
    chain, seed_chain = (np.random.default_rng(s).dirichlet(np.full(8, 0.3), size=8) for s in (0, seed))
    cumulated = ((1 - share) * chain + share * seed_chain).cumsum(1)
    rng = np.random.default_rng(seed + 50)
    tokens = np.zeros((train + test, length), np.int32)
    tokens[:, 0] = rng.integers(0, 8, train + test)
    for at in range(1, length):
        tokens[:, at] = (rng.random((train + test, 1)) > cumulated[tokens[:, at - 1]]).sum(1).clip(0, 7)
    return {"train_inputs": tokens[:train], "test_inputs": tokens[train:], "class_names": np.array(list("abcdefgh"))}


TASKS = {
    "values": (lambda: of_features("values", 1, 6, 1500, 50), lambda: of_features("values", 2, 2, 40, 300)),
    "labels": (lambda: of_features("labels", 1, 8, 1500, 50), lambda: of_features("labels", 2, 5, 40, 300)),
    "tokens": (lambda: of_text(1, 0.05, 600, 50), lambda: of_text(2, 0.05, 40, 200)),
}
METRIC = {
    "values": ("r_squared", "mae"),
    "labels": ("label_ranking_average_precision", "macro_f1"),
    "tokens": ("token_cross_entropy", "token_accuracy"),
}


def study(kind: str, folder: Path, *more: str) -> Path:
    """The run directory of a comparison of full with scratch."""
    for name, make in zip(("source", "target"), TASKS[kind], strict=True):
        np.savez(folder / f"{name}.npz", **make())
    (folder / "characters.py").write_text(CHARACTERS)
    model = f"--model={folder}/characters.py:model" if kind == "tokens" else "--hidden=32"
    rate, source_steps, steps, seeds = ("0.003", 200, 10, "0-3") if kind == "tokens" else ("0.01", 400, 40, "0-5")
    flags = f"--strategies=full --optimizer=adam --learning_rate={rate} --batch_size=30 --points=1 --seeds={seeds}"
    files = [f"--{name}={folder}/{name}.npz" for name in ("source", "target")]
    places = [f"--data_dir={folder}/data", f"--workdir={folder}/w", "--source_seed=7", f"--metric={METRIC[kind][1]}"]
    lengths = [f"--source_steps={source_steps}", f"--steps={steps}"]
    compare.main(
        ["compare", *flags.split(), *files, *places, model, *lengths, "--source_metric=", "--nolonger_scratch", *more]
    )
    return folder / "w"


def verdict(folder: Path) -> tuple[str, float]:
    """(verdict, difference from scratch) of full."""
    with (folder / "comparisons.csv").open() as file:
        [row] = csv.DictReader(file)
    return row["word"], float(row["mean"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(TASKS))
def test_a_planted_effect_is_found_and_none_where_there_is_none(kind, tmp_path):
    for name in ("planted", "null"):
        (tmp_path / name).mkdir()
    folder = study(kind, tmp_path / "planted")
    word, difference = verdict(folder)
    assert word == "positive" and difference > 0
    assert verdict(study(kind, tmp_path / "null", "--source_learning_rate=0"))[0] != "positive"
    for result in directory.results(folder):
        assert (result.metric or {})["name"] == METRIC[kind][0] and result.test_accuracy is None
        if result.strategy != "pretrain":
            with np.load(folder / result.predictions) as arrays:
                expected = of_scikit_learn(kind, arrays["outputs"], arrays["targets"])
                np.testing.assert_allclose(arrays["scores"].mean(), result.test_score, rtol=1e-6)
            got = [result.test_score, result.metrics[METRIC[kind][1]]]
            np.testing.assert_allclose(got, expected, rtol=1e-6)


def of_scikit_learn(kind: str, outputs: np.ndarray, targets: np.ndarray) -> list[float]:
    """The primary metric and the further one."""
    if kind == "values":
        return [peer.r2_score(targets, outputs), peer.mean_absolute_error(targets, outputs)]
    if kind == "labels":
        ranked = peer.label_ranking_average_precision_score(targets, outputs)
        return [ranked, peer.f1_score(targets, outputs > 0, average="macro", zero_division=0)]
    here = targets >= 0  # all sequences are equally long, so the mean over tokens is that over sequences
    likelihood = peer.log_loss(targets[here], softmax(outputs[here].astype(float), axis=-1), labels=np.arange(8))
    return [likelihood, peer.accuracy_score(targets[here], outputs[here].argmax(-1))]


# ---- One fit of each, quickly


def flags(folder: Path, kind: str, **more: Any) -> dict[str, Any]:
    """The flags of a transfer of a few steps from scratch."""
    np.savez(folder / "target.npz", **TASKS[kind][1]())
    (folder / "characters.py").write_text(CHARACTERS)
    shared = {"target": str(folder / "target.npz"), "data_dir": str(folder / "data"), "workdir": str(folder / "w")}
    model = {"model": f"{folder}/characters.py:model"} if kind == "tokens" else {"hidden": (8,)}
    recipe = {"steps": 4, "points": 2, "batch_size": 20, "learning_rate": 0.05, "strategies": ("scratch",)}
    return {**shared, **model, **recipe, **more}


@pytest.mark.slow
def test_the_best_step_is_that_of_the_lowest_where_less_is_better(tmp_path):
    values = {"steps": 20, "points": 10, "learning_rate": 0.3, "validation": 0.3, "metric": ("mae",), "primary": "mae"}
    [result] = transfer.run(**flags(tmp_path, "values", **values))
    curve = metrics.curves(tmp_path / "w", result.name)
    assert "accuracy" not in curve and result.metric == {"name": "mae", "unit": "", "larger_is_better": False}
    assert result.best_validation_score == curve["score"].min() < curve["score"].max()
    assert result.best_step == curve["step"][curve["score"].argmin()]
    assert result.validation_score == curve["score"][-1] and result.best_validation_accuracy is None


@pytest.mark.slow
def test_a_fit_that_diverged_counts_as_the_constant_answer(tmp_path):
    [result] = transfer.run(**flags(tmp_path, "labels", learning_rate=1e38))
    assert result.diverged and result.test_score is None
    targets = TASKS["labels"][1]()["test_targets"]
    shares = np.broadcast_to(targets.mean(0), targets.shape)
    assert result.majority_share == pytest.approx(peer.label_ranking_average_precision_score(targets, shares))
    with np.load(tmp_path / "w" / result.predictions) as arrays:
        assert np.isnan(arrays["scores"]).all()


@pytest.mark.slow
def test_fits_of_classes_have_the_keys_and_lines_that_they_had(tmp_path):
    """The loss by its name and 'auto' are the same fit; no line of a fit of classes says a metric."""
    inputs, hidden = features(3, 90)
    classes = hidden[:, :3].argmax(1)
    parts = {"train_features": inputs[:60], "train_labels": classes[:60]}
    np.savez(tmp_path / "c.npz", **parts, test_features=inputs[60:], test_labels=classes[60:])
    values = flags(tmp_path, "values", target=str(tmp_path / "c.npz"), loss="softmax_cross_entropy")
    [before] = transfer.run(**values)
    [after] = transfer.run(**{**values, "loss": "auto"})  # goes on in the run directory
    assert after.key == before.key
    line = json.loads((tmp_path / "w" / "results.jsonl").read_text())
    assert not {"metric", "metrics", "test_score", "validation_score", "best_validation_score"} & line.keys()
    assert set(np.load(tmp_path / "w" / before.predictions)) == {"probabilities", "labels"}
    [other] = transfer.run(**{**values, "metric": ("macro_f1",), "workdir": str(tmp_path / "other")})
    assert other.key != before.key and other.test_accuracy == before.test_accuracy
    with np.load(tmp_path / "other" / other.predictions) as arrays:
        expected = peer.f1_score(arrays["labels"], arrays["probabilities"].argmax(1), average="macro")
    assert other.metrics == {"macro_f1": pytest.approx(expected)}


REFUSED = {
    "--metric=mae: it is of values, and the targets are labels": ("labels", {"metric": ("mae",)}),
    "a score an item": ("labels", {"primary": "macro_f1"}),
    "loss 'sigmoid_binary_cross_entropy' is none of values": ("values", {"loss": "sigmoid_binary_cross_entropy"}),
    "--label_smoothing=0.1: it is for classes, labels and tokens: give --label_smoothing=0": (
        "values",
        {"label_smoothing": 0.1},
    ),
    "give --label_smoothing=0 beside --recipe=finetune, which gives it": ("values", {"recipe": "finetune"}),
    "--class_weights=balanced: it is of classes, the targets are tokens": ("tokens", {"class_weights": "balanced"}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_does_not_fit_the_targets_is_refused_before_training(words, tmp_path):
    kind, values = REFUSED[words]
    with pytest.raises(InputError, match=words):
        transfer.run(**flags(tmp_path, kind, **values))
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_a_source_of_other_targets_has_flags_of_its_own(tmp_path):
    """From several labels to values: its metric is refused with the remedy, and under the remedy it is trained."""
    np.savez(tmp_path / "source.npz", **TASKS["labels"][0]())
    values = flags(tmp_path, "values", source=str(tmp_path / "source.npz"), strategies=("full",), metric=("mae",))
    with pytest.raises(InputError, match=r"--metric=mae: it is of values.*the source's too.*--source_NAME=VALUE"):
        transfer.run(**values)
    scratch, full = transfer.run(**values, source_metric=(), source_steps=20)
    assert full.metric == scratch.metric and full.metric["name"] == "r_squared" and "mae" in full.metrics
    [source] = [row for row in directory.results(tmp_path / "w") if row.strategy == "pretrain"]
    assert source.metric["name"] == "label_ranking_average_precision" and full.test_score != scratch.test_score


@pytest.mark.slow
def test_strategies_and_penalties_that_look_at_gradients_take_other_targets(tmp_path):
    np.savez(tmp_path / "source.npz", **TASKS["values"][0]())
    several = ("fisher:fraction=0.1", "auto_rgn")
    values = {"source": str(tmp_path / "source.npz"), "strategies": several, "penalty": "ewc:weight=1"}
    more = {"source_penalty": "", "save_fisher": True, "source_steps": 5, "source_points": 1}
    results = transfer.run(**flags(tmp_path, "values", **values, **more))
    assert [row.strategy for row in results] == ["scratch", "fisher", "auto_rgn"]
    assert results[1].trained_parameters < results[1].total_parameters
    assert all(np.isfinite(row.test_score) and row.penalties for row in results)


def test_a_head_of_another_form_than_the_targets_is_refused(tmp_path):
    text = CHARACTERS.replace('stage("head", nn.Dense(vocabulary))', 'stage("head", Last(vocabulary))')
    last = "class Last(nn.Module):\n    vocabulary: int\n\n    @nn.compact\n    def __call__(self, x):\n"
    (tmp_path / "pooled.py").write_text(text + "\n\n" + last + "        return nn.Dense(self.vocabulary)(x.mean(1))\n")
    with pytest.raises(InputError, match=r"gives \[2, 8\] of 2 inputs .*let it give \[batch, length, vocabulary\]"):
        transfer.run(**flags(tmp_path, "tokens", model=f"{tmp_path}/pooled.py:model"))


@pytest.mark.slow
def test_a_search_takes_the_least_where_less_is_better(tmp_path):
    values = flags(tmp_path, "values", steps=3, points=1, primary="mae")
    text = [f"--{name}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for name, v in values.items()]
    search.main(["search", *text, "--space=learning_rate:in:1e-6,0.1", "--trials=5", "--sampler=Random"])
    with (tmp_path / "w" / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    by_rate = {float(row["learning_rate"]): float(row["value"]) for row in rows}
    assert len(by_rate) == 2 and by_rate[0.1] < by_rate[1e-6]
    assert [row["validation_mae"] for row in rows] == [row["value"] for row in rows]
    assert "--learning_rate=0.1" in (tmp_path / "w" / "best.flags").read_text()
    assert "validation mae" in (tmp_path / "w" / "report.html").read_text()
