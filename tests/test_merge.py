"""A soup is the mean of its fits, the greedy one is the paper's algorithm, and it is a run like any other."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_programs import arguments, parameters, results

from experiments import export, merge, predict, report, transfer
from experiments.runs import plan, predictions
from experiments.runs.settings import Settings
from tljax import checkpoint
from tljax.types import InputError

pytestmark = pytest.mark.usefixtures("no_pictures")


def merged(runs, workdir, **options):
    return merge.run({}, merge.MergeFlags(runs=tuple(map(str, runs)), workdir=str(workdir), **options))


def test_a_soup_is_the_mean_of_its_fits_and_says_of_which(finished, tmp_path, capsys):
    folder, lines = finished
    soup = merged([folder], tmp_path / "soup", fits=("full-*", "bias_only-*"))
    [line] = results(soup)
    ingredients = [fit for fit in lines if fit.strategy in ("full", "bias_only")]
    each = [parameters(folder, fit) for fit in ingredients]
    merged_params = parameters(soup, line)
    assert merged_params.keys() == each[0].keys() and len(each) == 4
    for path, leaf in merged_params.items():
        np.testing.assert_allclose(leaf, np.mean([tree[path] for tree in each], axis=0), rtol=1e-6, err_msg=path)
        assert leaf.dtype == each[0][path].dtype
    predicted, labels = predictions.read(soup / line.predictions, line.predictions_sha256)
    assert (predicted == labels).mean() == line.test_accuracy
    record = json.loads((soup / "soup.json").read_text())
    assert [entry["fit"] for entry in record["fits"]] == [fit.name for fit in ingredients]
    assert line.options == {"kind": "uniform", "fits": 4} and line.target == ingredients[0].target
    assert "they need not lie in one valley" in capsys.readouterr().out


BAD = {
    "no run": (lambda folder, tmp: merged([tmp], tmp / "w"), "is no run directory: name one of"),
    "nothing": (lambda folder, tmp: merged([], tmp / "w"), "--runs and --workdir are needed"),
    "one fit": (lambda folder, tmp: merged([folder], tmp / "w", fits=("full-*-seed0",)), "1 fit is chosen: a soup is"),
    "a misspelt fit": (
        lambda folder, tmp: merged([folder], tmp / "w", fits=("ful-40-seed0",)),
        "--fits=ful-40-seed0: there is no such fit; nearest",
    ),
    "no validation": (
        lambda folder, tmp: merged([folder], tmp / "w", kind="greedy"),
        "was trained without a validation split: take --kind=uniform",
    ),
    "the run itself": (
        lambda folder, tmp: merged([folder], folder),
        "--workdir=.*is one of the runs: name a new folder",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_soup_is_refused_in_one_line(name, finished, tmp_path):
    attempt, message = BAD[name]
    with pytest.raises(InputError, match=message) as error:
        attempt(finished[0], tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "w" / "results.jsonl").exists()


def member(**changed):
    """What `_require_alike` looks at of a fit."""
    fit = {"name": "a", "target": "t", "seed": 0, "source": "s", **changed}
    about = {"fingerprint": changed.get("fingerprint", "f"), "model": changed.get("model", {"model": "mlp"})}
    flat = {"kernel": np.zeros(changed.get("shape", (2, 2)))}
    return merge.Member(SimpleNamespace(**fit), None, None, about, flat)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target": "u"}, "'a' and 'b' are of other targets"),
        ({"fingerprint": "g"}, "'a' and 'b' are of other targets"),
        ({"model": {"model": "cnn"}}, "are of other models: a mean is of one architecture"),
        ({"shape": (3, 2)}, "differ at 'kernel': a mean is of one architecture"),
    ],
)
def test_fits_are_of_one_target_and_one_architecture(changed, message):
    merge._require_alike([member(), member(name="b")])
    with pytest.raises(InputError, match=message):
        merge._require_alike([member(), member(name="b", **changed)])


@pytest.mark.parametrize("seed", range(5))
def test_the_greedy_soup_is_that_of_algorithm_1(seed):
    """Against the algorithm in a loop of its own, of fits that are numbers, scored by their distance from 0.3."""
    numbers = np.random.default_rng(seed).normal(size=7)
    score = lambda value: -abs(float(value) - 0.3)  # noqa: E731
    order = sorted(range(7), key=lambda i: -score(numbers[i]))
    soup = []
    for i in order:
        if not soup or score(np.mean(numbers[[*soup, i]])) >= score(np.mean(numbers[soup])):
            soup = [*soup, i]
    fits = [SimpleNamespace(result=SimpleNamespace(name=str(i))) for i in range(7)]
    trees = [{"w": np.float64(number)} for number in numbers]
    on_device = SimpleNamespace(objective=SimpleNamespace(metrics=[SimpleNamespace(name="x", larger_is_better=True)]))
    assert merge.greedy(fits, trees, lambda tree: score(tree["w"]), on_device) == soup
    lower = SimpleNamespace(objective=SimpleNamespace(metrics=[SimpleNamespace(name="x", larger_is_better=False)]))
    assert merge.greedy(fits, trees, lambda tree: -score(tree["w"]), lower) == soup


def accuracy(flat, images, labels):
    hidden = np.maximum(images.reshape(len(images), -1) / 255 @ flat["hidden_0/kernel"] + flat["hidden_0/bias"], 0)
    return ((hidden @ flat["head/kernel"] + flat["head/bias"]).argmax(1) == labels).mean()


@pytest.mark.slow
def test_a_greedy_soup_is_chosen_by_validation_alone_and_is_read_like_any_fit(tasks, tmp_path, monkeypatch, capsys):
    """LoRA's fit is merged before; the choice is that of NumPy on the examples that all of them held out."""
    monkeypatch.chdir(tmp_path)
    flags = {"validation": 0.4, "strategies": ("full", "lora:rank=2", "lp_ft"), "seeds": (0, 1)}
    flags |= {"draw_seed": 3, "source_seed": 5, "head_seed": 5}
    transfer.run(**arguments(tasks, tmp_path / "w", **flags))
    soup = merged(["w"], "soup", kind="greedy")
    [line] = results(soup)
    lines = [fit for fit in results(tmp_path / "w") if fit.strategy != "pretrain"]
    trees = {}
    for fit in lines:
        state = checkpoint.load(tmp_path / "w" / fit.checkpoint)[0]
        trees[fit.name] = state.get(f"{fit.name}.merged", state[fit.name])
    settings = Settings.from_flags(**arguments(tasks, tmp_path / "w", **flags))
    task = plan.load_task(settings, str(tasks / "clothes.npz"), None)
    _, rows = plan.draw_examples(settings.recipe, "all", task, plan.streams(settings, 0).draw)
    images, labels = task.train.inputs(rows), np.asarray(task.train.targets)[rows]
    order = sorted(trees, key=lambda name: -accuracy(trees[name], images, labels))
    taken, best, soup_params = [], 0.0, {}
    for name in order:
        mean = {path: np.mean([trees[each][path] for each in [*taken, name]], axis=0) for path in trees[name]}
        score = accuracy(mean, images, labels)
        if not taken or score >= best:
            taken, best, soup_params = [*taken, name], score, mean
    assert {entry["fit"] for entry in json.loads((soup / "soup.json").read_text())["fits"]} == set(taken)
    assert line.validation_accuracy == pytest.approx(best, abs=1.01 / len(rows))  # an image may lie on the border
    for path, leaf in parameters(soup, line).items():
        np.testing.assert_allclose(leaf, soup_params[path], rtol=1e-5, atol=1e-6)
    Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / "line.png")
    predict.main(["predict", "--checkpoint=soup", "--images=line.png", "--output=predicted.csv"])
    assert len(list(csv.DictReader((tmp_path / "predicted.csv").read_text().splitlines()))) == 1
    export.main(["export", "--checkpoint=soup", "--output=soup.safetensors"])
    assert (tmp_path / "soup.safetensors").is_file()
    capsys.readouterr()
    report.main(["report", "--runs=w,soup", "--against=full", "--output=page"])
    assert "soup" in capsys.readouterr().out and "soup" in (tmp_path / "page/report.html").read_text(encoding="utf-8")
    with pytest.raises(InputError, match="holds this soup already"):
        merged(["w"], "soup", kind="greedy")


@pytest.mark.slow
def test_fits_that_hold_out_other_examples_make_no_greedy_soup(tasks, tmp_path):
    transfer.run(**arguments(tasks, tmp_path / "w", validation=0.4, strategies=("full",)))
    with pytest.raises(InputError, match="hold out other examples: choose fits of one seed"):
        merged([tmp_path / "w"], tmp_path / "soup", kind="greedy", fits=("full-*",))
    merged([tmp_path / "w"], tmp_path / "soup", kind="greedy", fits=("*-seed0",))
