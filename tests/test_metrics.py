"""Metrics: held against scikit-learn on random cases with ties, and against formulas written anew."""

import re
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax
from sklearn import metrics as peer

from tljax import metrics, objective
from tljax.types import ArrayExamples, InputError, Metric, Task

RNG = np.random.default_rng(5)
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


def coarse(*shape: int) -> np.ndarray:
    """Outputs with many ties."""
    return np.round(RNG.normal(size=shape) * 2) / 2


def task(kind: str, targets: np.ndarray, outputs: int) -> Task:
    split = ArrayExamples(np.zeros((len(targets), 2), np.float32), targets)
    return Task("t", split, split, (), "0" * 64, kind=kind, outputs=outputs)


@pytest.mark.parametrize("labels", [1, 2, 7])
def test_label_ranking_average_precision_is_that_of_scikit_learn(labels, monkeypatch):
    monkeypatch.setattr(metrics, "_AT_ONCE", 500)
    outputs, has = coarse(120, labels), RNG.random((120, labels)) < 0.4
    has[:3], has[3:6] = False, True
    scores = metrics.label_ranking_average_precision(outputs, has)
    assert scores[:6].tolist() == [1.0] * 6
    if labels > 1:  # scikit-learn takes one column for classes
        singly = [peer.label_ranking_average_precision_score(has[[i]], outputs[[i]]) for i in range(120)]
        np.testing.assert_allclose(scores, singly, **TOLERANCE)
        whole = peer.label_ranking_average_precision_score(has, outputs)
        assert metrics.value(metrics.PRIMARY["labels"], outputs, has) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("values", [1, 3])
def test_the_mean_of_the_scores_is_r_squared(values):
    targets = RNG.normal(size=(80, values)) * [1.0, 10.0, 0.1][:values]
    outputs = targets + coarse(80, values)
    got = metrics.value(metrics.PRIMARY["values"], outputs, targets)
    assert got == pytest.approx(peer.r2_score(targets, outputs), rel=1e-6)
    per_item = metrics.r_squared(outputs[:5], targets[:5], targets)
    np.testing.assert_allclose(per_item, (1 - (targets - outputs)[:5] ** 2 / targets.var(0)).mean(1), **TOLERANCE)
    constant = metrics.constant("values", targets, values)
    assert metrics.value(metrics.PRIMARY["values"], constant, targets) == pytest.approx(0, abs=1e-12)


def test_r_squared_of_a_value_that_never_varies_is_that_of_scikit_learn():
    same = np.full((4, 1), 2.0)
    for outputs in (same, same + np.eye(4)[:, 3:]):
        assert metrics.r_squared(outputs, same, same).mean() == peer.r2_score(same, outputs)


def test_mean_absolute_error_is_that_of_scikit_learn():
    outputs, targets = coarse(50, 2), RNG.normal(size=(50, 2))
    got = metrics.value(metrics.named("values")["mae"], outputs, targets)
    assert got == pytest.approx(peer.mean_absolute_error(targets, outputs), rel=1e-6)


@pytest.mark.parametrize("classes", [2, 4])
def test_metrics_of_classes_are_those_of_scikit_learn(classes):
    outputs, targets = coarse(200, classes), RNG.integers(0, classes, 200)
    p, predicted, columns = softmax(outputs, axis=1), outputs.argmax(1), np.eye(classes)[targets]
    expected = {
        "accuracy": peer.accuracy_score(targets, predicted),
        "macro_f1": peer.f1_score(targets, predicted, average="macro"),
        "balanced_accuracy": peer.balanced_accuracy_score(targets, predicted),
        "mean_average_precision": peer.average_precision_score(columns, p, average="macro"),
        "auc": peer.roc_auc_score(targets, p[:, 1] if classes == 2 else p, multi_class="ovr"),
    }
    known = metrics.named("classes")
    assert set(known) == set(expected)
    for name, value in expected.items():
        assert metrics.value(known[name], outputs, targets) == pytest.approx(value, rel=1e-6), name


def test_metrics_of_labels_are_those_of_scikit_learn_and_a_label_that_nobody_has_is_left_out():
    outputs, has = coarse(150, 4), RNG.random((150, 4)) < 0.3
    expected = {
        "macro_f1": peer.f1_score(has, outputs > 0, average="macro", zero_division=0),
        "mean_average_precision": peer.average_precision_score(has, outputs, average="macro"),
        "auc": peer.roc_auc_score(has, outputs, average="macro"),
    }
    known = metrics.named("labels")
    for name, value in expected.items():
        assert metrics.value(known[name], outputs, has) == pytest.approx(value, rel=1e-6), name
    wider = np.hstack([has, np.zeros((150, 1), bool)]), np.hstack([outputs, outputs[:, :1]])
    for name in ("mean_average_precision", "auc"):
        assert metrics.value(known[name], wider[1], wider[0]) == pytest.approx(expected[name], rel=1e-6)


def test_metrics_of_tokens_are_means_over_the_tokens_of_each_sequence():
    outputs, tokens = coarse(6, 5, 3), RNG.integers(0, 3, (6, 5))
    tokens[0, 2:], tokens[1] = -1, -1
    likelihood, right = metrics.token_cross_entropy(outputs, tokens), metrics.token_accuracy(outputs, tokens)
    assert likelihood[1] == right[1] == 0
    for i in (0, 2, 3, 4, 5):
        here = tokens[i] >= 0
        p = softmax(outputs[i][here], axis=1)
        assert likelihood[i] == pytest.approx(peer.log_loss(tokens[i][here], p, labels=[0, 1, 2]), rel=1e-6)
        assert right[i] == pytest.approx(peer.accuracy_score(tokens[i][here], p.argmax(1)))


def test_the_constant_answer_has_the_score_that_a_fit_that_diverged_counts_with():
    targets = np.array([0, 2, 2, 1])
    value = lambda kind, targets, outputs: metrics.value(  # noqa: E731
        metrics.PRIMARY[kind], metrics.constant(kind, targets, outputs), targets
    )
    assert value("classes", targets, 4) == 0.5
    assert value("values", np.array([[1.0], [5.0]]), 1) == 0
    tokens = np.array([[0, 0, 1, -1], [0, 1, 0, -1]])
    p = np.array([4, 2]) / 6
    assert value("tokens", tokens, 2) == pytest.approx(-(p * np.log(p)).sum(), rel=1e-6)
    assert value("labels", np.array([[True, False], [True, False], [False, True]]), 2) == pytest.approx(5 / 6)


def test_natural_losses_are_those_of_scikit_learn():
    outputs, has = coarse(20, 3), RNG.random((20, 3)) < 0.5
    p = 1 / (1 + np.exp(-outputs))
    expected = sum(peer.log_loss(has[:, j], p[:, j], labels=[0, 1]) for j in range(3))
    assert metrics.sigmoid_cross_entropy(outputs, has).mean() == pytest.approx(expected, rel=1e-6)
    values = RNG.normal(size=(20, 3))
    expected = 3 * peer.mean_squared_error(values, outputs)
    assert metrics.squared_error(outputs, values).mean() == pytest.approx(expected, rel=1e-6)


def test_a_metric_of_other_targets_is_refused():
    values = task("values", np.zeros((4, 1), np.float32), 1)
    with pytest.raises(InputError, match="metric=macro_f1: it is of classes and labels, and the targets are values"):
        objective.for_task(values, metric_names=["macro_f1"])
    with pytest.raises(InputError, match="metric=maee: there is no such metric; nearest: 'mae'"):
        objective.for_task(values, metric_names=["maee"])


def test_the_primary_metric_has_a_score_an_item():
    classes = task("classes", np.array([0, 1, 1, 0], np.int32), 2)
    with pytest.raises(InputError, match=r"primary=macro_f1: .*a score an item"):
        objective.for_task(classes, primary="macro_f1")
    with pytest.raises(InputError, match="primary=mae: it is of values, and the targets are classes"):
        objective.for_task(classes, primary="mae")
    values = task("values", np.zeros((4, 1), np.float32), 1)
    goal = objective.for_task(values, metric_names=["r_squared", "mae"], primary="mae")
    assert [metric.name for metric in goal.metrics] == ["mae", "r_squared"]


OWN = """
import numpy as np
from tljax.types import Metric

def metric(outputs, targets, *, power=1.0):
    return (np.abs(outputs - targets) ** power).mean(-1)

def relative(outputs, targets, reference):
    return float(np.abs(outputs - targets).mean() / np.abs(reference).mean())

def broken(outputs, targets):
    return np.zeros(3)

def fails(outputs, targets):
    return outputs.nothing

cheap = Metric("cheap", "euros", larger_is_better=False, item=lambda outputs, targets, reference: outputs[:, 0])
both = Metric("both", item=lambda *a: 0, whole=lambda *a: 0)
"""


def test_a_file_gives_a_metric_or_a_function(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    values = task("values", np.arange(12, dtype=np.float32).reshape(4, 3), 3)
    names = [f"{file}:metric:power=2", str(file), f"{file}:relative", f"{file}:cheap"]
    read_metrics = objective.for_task(values, metric_names=names).metrics
    assert [metric.name for metric in read_metrics] == ["r_squared", "metric:power=2", "mine", "relative", "cheap"]
    outputs, targets = coarse(4, 3), values.train.targets
    got = [metrics.value(metric, outputs, targets) for metric in read_metrics[1:]]
    error = np.abs(outputs - targets)
    expected = [(error**2).mean(), error.mean(), error.mean() / targets.mean(), outputs[:, 0].mean()]
    np.testing.assert_allclose(got, expected, **TOLERANCE)
    assert read_metrics[4] == Metric("cheap", "euros", False, read_metrics[4].item)
    assert objective.for_task(values, primary=f"{file}:cheap").metrics[0].name == "cheap"
    with pytest.raises(InputError, match="a score an item"):
        objective.for_task(values, primary=f"{file}:relative")
    for name, words in (
        ("broken", r"gives float64\[3\] of 4 items"),
        ("fails", "fails: AttributeError"),
        ("both", "an `item` or a `whole`"),
    ):
        with pytest.raises(InputError, match=words):
            objective.for_task(values, metric_names=[f"{file}:{name}"])


def test_class_weights_are_those_of_scikit_learn():
    from sklearn.utils.class_weight import compute_class_weight

    classes = RNG.choice([0, 1, 3], p=[0.7, 0.2, 0.1], size=90)
    expected = compute_class_weight("balanced", classes=np.unique(classes), y=classes)
    got = objective.class_weights(classes, 5)
    np.testing.assert_allclose(got[[0, 1, 3]], expected, rtol=1e-6)
    assert got[2] == got[4] == 0


def test_the_metrics_of_the_page_are_metrics(tmp_path, monkeypatch):
    from sklearn.metrics import mean_pinball_loss

    text = (Path(__file__).parent.parent / "tljax" / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    Path("quantile.py").write_text(re.findall(r"```python\n(.*?)```", text, re.S)[1])
    values = task("values", RNG.normal(size=(9, 2)).astype(np.float32), 2)
    [line] = re.findall(r"`--metric=(\S+) --primary=(\S+)`", text)
    [option] = re.findall(r"`--metric=(\S+quantile=0.5)`", text)
    primary, worst, median = objective.for_task(values, metric_names=[line[0], option], primary=line[1]).metrics
    outputs, targets = coarse(9, 2), values.test.targets
    got = [metrics.value(metric, outputs, targets) for metric in (primary, median)]
    expected = [mean_pinball_loss(targets, outputs, alpha=alpha) for alpha in (0.9, 0.5)]
    np.testing.assert_allclose(got, expected, **TOLERANCE)
    assert (primary.unit, primary.larger_is_better) == ("mm", False)
    assert metrics.value(worst, outputs, targets) == pytest.approx(peer.max_error(targets.ravel(), outputs.ravel()))
