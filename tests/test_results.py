"""A fit's result: its record reads back and is written again as it was."""

import json
from dataclasses import fields, replace

from tljax.study.results import Result, extended, from_json, metric, score, to_json, validation_score

WHOLE = {"name": "full-100-seed0-01234567", "key": "01234567", "recipe": "89", "source": "a", "target": "b"} | {
    "strategy": "full",
    "options": {"k": 2},
    "seed": 0,
    "train_examples": 100,
    "test_accuracy": None,
    "train_penalty": 0.25,
    "train_penalty_0_l2": 0.125,
    "train_penalty_1_l2": None,
    "seconds": 1.5,
}


def test_a_record_is_written_as_it_was_read_in_its_order_with_its_nulls():
    backwards = dict(reversed(WHOLE.items()))
    for record in (WHOLE, backwards, {**WHOLE, "of another tljax": [1, None]}):
        assert json.dumps(to_json(from_json(record))) == json.dumps(record)
    assert from_json(WHOLE).penalties == {"0_l2": 0.125, "1_l2": None}
    assert from_json({**WHOLE, "of another tljax": [1]}).more == {"of another tljax": [1]}


def test_what_is_added_comes_last_and_what_is_not_known_is_not_written():
    fit = from_json(WHOLE)
    assert list(to_json(replace(fit, retention=0.5, test_accuracy=0.75))) == [*WHOLE, "retention"]
    assert to_json(extended(fit, {"source_flops": None})) == {**WHOLE, "source_flops": None}
    assert to_json(extended(extended(fit, {"evals": {}}), {"evals": {"c": 0.5}})) == {**WHOLE, "evals": {"c": 0.5}}


def test_a_fit_that_was_just_trained_has_all_fields_but_those_of_reports():
    fit = Result(name="a", target="b", strategy="full", seed=0, penalties={"0_l2": None})
    names = list(to_json(fit))
    assert names[:2] == ["name", "key"] and names[-1] == "masks_sha256"
    assert "spec" not in names and {"source_accuracy", "train_penalty_0_l2", "best_step"} <= set(names)
    assert "source_accuracy" not in to_json(replace(fit, strategy="pretrain"))
    order = [f.name for f in fields(Result) if f.name in names]
    assert [name for name in names if not name.startswith("train_penalty_")] == order


NATS = {"name": "cross_entropy", "unit": "nats", "larger_is_better": False}


def test_a_metric_is_written_where_it_is_not_accuracy():
    fit = Result(name="a", target="b", strategy="full", seed=0, test_score=1.25, validation_score=1.5)
    plain = Result(name="a", target="b", strategy="full", seed=0)
    assert json.dumps(to_json(fit)) == json.dumps(to_json(plain))
    of_metric = replace(fit, metric=NATS, metrics={"auc": 0.5})
    record = to_json(of_metric)
    assert set(record) - set(to_json(plain)) == {"metric", "test_score", "validation_score", "metrics"}
    assert (record["metric"], record["test_score"], record["metrics"]) == (NATS, 1.25, {"auc": 0.5})
    assert to_json(from_json(record)) == record
    assert metric(from_json(record)).name == "cross_entropy" and score(of_metric) == 1.25
    accurate = replace(fit, test_accuracy=0.5, validation_accuracy=0.25)
    assert (score(accurate), validation_score(accurate), validation_score(of_metric)) == (0.5, 0.25, 1.5)
