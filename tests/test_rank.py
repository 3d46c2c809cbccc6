"""Which source: scores are those of the features, truths those of transfer, and both are kept."""

import json
import shutil
import warnings

import numpy as np
import pytest
from test_programs import results, write_task
from test_weights import place as write_weights
from threadpoolctl import threadpool_limits

from experiments import rank, zoo
from experiments.pages import figures, tables
from experiments.pages import ranking as ranking_page
from experiments.pages.report import Provenance
from experiments.runs import directory, plan, scores, sources
from experiments.runs.console import Cell
from experiments.runs.settings import Settings
from tljax import checkpoint, data
from tljax.data import draw
from tljax.study import ranking, transferability
from tljax.types import InputError

pytestmark = pytest.mark.usefixtures("no_pictures")
NAMES = ("", ":shuffle_labels=1", ":steps=2", ":untrained")
SCORES = ("knn", "leep", "h_score", "probe")


def line(many, tasks, folder, *more, **change):
    flags = {
        **{"sources": many, "target": f"{tasks / 'clothes.npz'},{tasks / 'same.npz'}", "strategies": "head_only"},
        **{"train_examples": "6/class:seeds=1,all", "steps": 5, "batch_size": 20, "learning_rate": 0.3, "hidden": 8},
        **{"seeds": "0,1", "scores": ",".join(SCORES), "workdir": folder, "score_examples": 60, "resamples": 20},
    } | change
    return ["rank", *(f"--{name}={value}" for name, value in flags.items() if value is not None), *more]


@pytest.fixture(scope="module")
def many(tasks, tmp_path_factory):
    """A zoo, and weights from elsewhere beside it."""
    folder = tmp_path_factory.mktemp("zoo")
    flags = {"zoo": ",".join(f"{tasks / 'digits.npz'}{name}" for name in NAMES), "hidden": 8, "steps": 30}
    flags |= {"batch_size": 20, "learning_rate": 0.3, "workdir": folder / "w"}
    zoo.main(["zoo", *(f"--{name}={value}" for name, value in flags.items())])
    write_weights(folder, accuracy=0.25)
    return f"{folder / 'w'},{folder / 'w.npz'}"


@pytest.fixture(scope="module")
def ranked(many, tasks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rank") / "w"
    rank.main(line(many, tasks, folder))
    assert not (folder / "results.jsonl").exists() and not (folder / "report.html").exists()
    return folder


@pytest.fixture(scope="module")
def done(ranked, many, tasks):
    """The truth comes later, into the same run directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.pages.figures.svg", lambda figure: "data:image/svg+xml;base64,")
        rank.main(line(many, tasks, ranked, "--verify"))
    return ranked


def ranking_record(folder):
    return json.loads((folder / "ranking.json").read_text())


def by_hand(many, card, task):
    """(features, probabilities) of a source on the training examples, in NumPy."""
    if card.name == "digits (w.npz)":
        with np.load(card.place) as arrays:
            k0, b0, k1, b1 = arrays["0.weight"].T, arrays["0.bias"], arrays["2.weight"].T, arrays["2.bias"]
    else:
        [flat] = checkpoint.load(card.place)[0].values()
        k0, b0, k1, b1 = (flat[name] for name in ("hidden_0/kernel", "hidden_0/bias", "head/kernel", "head/bias"))
    x = task.train.arrays.reshape(len(task.train.targets), -1) / 255
    features = np.maximum(x @ k0.astype(float) + b0, 0)
    logits = np.exp(features @ k1 + b1)
    return features, logits / logits.sum(1, keepdims=True)


def test_scores_are_those_of_the_features_of_the_labelled_examples(ranked, many, tasks):
    by_case = {(entry["source"], entry["target"], entry["budget"]): entry for entry in ranking_record(ranked)["scores"]}
    everyone = [card for place in many.split(",") for card in sources.read_cards(place, {"hidden": (8,)})]
    assert len(everyone) == 5 and len(by_case) == 5 * 2 * 2
    name = str(tasks / "clothes.npz")
    task = data.load(name)
    labels = np.asarray(task.train.targets)
    streams = plan.streams(Settings.from_flags(), 0)
    for card in everyone:
        features, p = by_hand(many, card, task)
        for budget, total in (("6/class:seeds=1", 18), ("all", 60)):
            rows = draw.label_budget(streams.draw, labels, total)
            entry = by_case[card.name, name, budget]
            assert entry["leep"]["value"] == pytest.approx(transferability.leep(p[rows], labels[rows]), abs=1e-5)
            expected = transferability.h_score(features[rows], labels[rows])
            assert entry["h_score"]["value"] == pytest.approx(expected, rel=1e-3)
            assert entry["knn"]["value"] == pytest.approx(transferability.knn(features[rows], labels[rows]), abs=1 / 17)
            assert 0 <= entry["probe"]["value"] <= 1 and entry["probe"]["seconds"] >= 0


@pytest.mark.slow
def test_truths_are_the_accuracies_of_transfer_and_scratch_is_trained_once_a_target(done, many, tasks):
    lines, judged = results(done), ranking_record(done)["judged"]
    fits = {"head_only": 5 * 2 * 3, "scratch": 2 * 3}
    assert {name: sum(each.strategy == name for each in lines) for name in fits} == fits
    boards = {(each["budget"], each["sources"]): each for each in judged}
    assert boards.keys() == {(b, w) for b in ("6/class:seeds=1", "all") for w in ("all", "without trivial")}
    target = str(tasks / "same.npz")
    fits_of_target = [each for each in lines if each.strategy == "head_only" and each.target == target]
    mean = np.mean([each.test_accuracy for each in fits_of_target if each.train_examples == 120])
    assert np.mean(boards["all", "all"]["truths"][target]) == pytest.approx(mean)
    assert len(boards["all", "without trivial"]["truths"][target]) == 3
    assert boards["6/class:seeds=1", "all"]["split_half_tau"] is None  # one seed has no halves


@pytest.mark.slow
def test_scores_and_rivals_are_judged_by_the_truth(done):
    for board in ranking_record(done)["judged"]:
        assert set(board["scores"]) == {
            *SCORES,
            ranking_page.OWN_ACCURACY,
            ranking_page.PARAMETERS,
            ranking_page.OTHER_TARGETS,
        }
        first, second = board["truths"].values()
        # By the truth of the other of two targets, tau is that of the two truths.
        expected = float(ranking.kendall(first, second))
        tau = board["scores"][ranking_page.OTHER_TARGETS]["tau"]["value"]
        assert (tau is None and np.isnan(expected)) or tau == pytest.approx(expected)
        for score in board["scores"].values():
            assert 0 <= score["regret_3"]["value"] <= score["regret"]["value"] <= 1
    html = (done / "report.html").read_text()
    assert all(name in html for name in (*SCORES, "Regret of 3", "standard error"))


@pytest.mark.slow
def test_two_fits_of_one_source_strategy_budget_and_seed_are_refused_with_both_names(done, many, tasks, tmp_path):
    """The last of the two counted before, in silence."""
    shutil.copytree(done, tmp_path / "w")
    file = tmp_path / "w" / "results.jsonl"
    before = file.read_text()
    first = json.loads(before.splitlines()[0])
    del first["sha256"]
    other = {**first, "name": f"{first['name']}-again", "test_accuracy": 0.0}
    for double in (first, other):
        file.write_text(before + json.dumps({**double, "sha256": directory.digest(double)}) + "\n")
        with pytest.raises(
            InputError, match=rf"two fits of one .*'{first['name']}' \(fit 1\) and '{double['name']}'"
        ) as refused:
            rank.main(line(many, tasks, tmp_path / "w", "--verify"))
        assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_run_again_nothing_is_computed_or_trained_and_the_same_is_said(done, many, tasks, monkeypatch, capsys):
    before = (done / "ranking.json").read_bytes()
    monkeypatch.setattr("experiments.runs.fit.train_groups", lambda *arguments: pytest.fail("it trained again"))
    monkeypatch.setattr(scores, "_timed", lambda *arguments: pytest.fail("it scored again"))
    monkeypatch.setattr(
        "experiments.runs.features._batch", lambda *arguments: pytest.fail("it computed features again")
    )
    rank.main(line(many, tasks, done, "--verify"))
    assert (done / "ranking.json").read_bytes() == before
    output = capsys.readouterr().out
    assert "regret of 3" in output and "not told apart from" in output and "w.npz" in output


def test_a_score_that_is_not_defined_is_none_and_says_why(many, tasks, tmp_path, capsys):
    """A class with one example leaves nothing to hold out."""
    change = {"train_examples": "1/class", "scores": "probe,nce", "target": tasks / "clothes.npz"}
    rank.main(line(many, tasks, tmp_path / "w", **change))
    [*entries] = ranking_record(tmp_path / "w")["scores"]
    assert all(entry["probe"]["value"] is None and "holds none out" in entry["probe"]["reason"] for entry in entries)
    assert all(entry["nce"]["value"] is None and "two examples" in entry["nce"]["reason"] for entry in entries)


def test_a_warning_is_kept_with_its_score(monkeypatch):
    def warns(seen):
        warnings.warn("did not\nconverge", stacklevel=1)
        return 1.0

    monkeypatch.setattr(scores, "SCORES", {**scores.SCORES, "warns": warns})
    [warned, silent] = scores._side_by_side(
        [("warns", None), ("nce", scores.ScoredExamples(None, np.eye(2)[[0, 0, 1]], [0, 0, 1], None))]
    )
    assert warned[::2] == (1.0, "did not converge") and silent[::2] == (0.0, "")


def test_scores_on_disk_that_were_changed_are_refused(many, tasks, tmp_path, capsys):
    change = {"train_examples": "6/class", "scores": "nce", "target": tasks / "clothes.npz"}
    rank.main(line(many, tasks, tmp_path / "w", **change))
    assert "first by nce: " in capsys.readouterr().out
    file = next((tmp_path / "w" / "features").glob("*/scores.json"))
    file.write_text(file.read_text().replace("-0.", "-0.9"))
    with pytest.raises(InputError, match=r"not as it was written\): delete it"):
        rank.main(line(many, tasks, tmp_path / "w", **change))


def test_any_flip_of_a_bit_of_scores_on_disk_is_noticed(many, tasks, tmp_path):
    change = {"train_examples": "6/class", "scores": "nce", "target": tasks / "clothes.npz"}
    rank.main(line(many.split(",")[1], tasks, tmp_path / "w", **change))
    file = next((tmp_path / "w" / "features").glob("*/scores.json"))
    before, known = file.read_bytes(), scores._known(file)
    assert known[0]
    for bit in range(0, 8 * len(before), 3):
        flipped = bytearray(before)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            assert scores._known(file) == known  # the e of 1e-05, which may be an E
        except InputError as error:
            assert "delete it" in str(error)


def test_scores_of_other_code_are_computed_again_and_not_mixed(many, tasks, tmp_path, monkeypatch):
    change = {"train_examples": "6/class", "scores": "h_score,nce", "target": tasks / "clothes.npz"}
    source = many.split(",")[1]
    rank.main(line(source, tasks, tmp_path / "w", **change))
    file = next((tmp_path / "w" / "features").glob("*/scores.json"))
    right = json.loads(file.read_text())
    old = {"seconds": 0.5, "scores": {key: [9.9, 0.1, ""] for key in right["scores"]}}
    for record in (old, {"code": "0" * 64, "seconds": 0.5, "scores": old["scores"]}):
        file.write_text(json.dumps({**record, "sha256": directory.digest(record)}))
        rank.main(line(source, tasks, tmp_path / "w", **change))
        again = json.loads(file.read_text())
        assert again["seconds"] == 0.5 and again["code"] == right["code"]
        assert {key: value[0] for key, value in again["scores"].items()} == {
            key: value[0] for key, value in right["scores"].items()
        }
    monkeypatch.setattr(scores, "_timed", lambda *arguments: pytest.fail("it scored again"))
    rank.main(line(source, tasks, tmp_path / "w", **change))


def test_scores_that_grow_with_the_width_of_noise_are_computed_if_asked_for():
    assert len(scores.DEFAULT) == 10 and not set(scores.DEFAULT) & set(scores.AS_IN_PAPERS)
    assert rank.RankFlags().scores == scores.DEFAULT
    y = np.arange(200) % 5
    rng = np.random.default_rng(0)
    noise = [rng.normal(size=(200, d)) for d in (4, 40, 120)]
    seen = [
        scores.ScoredExamples(x, np.ones((200, 1)), y, np.arange(200))
        for x in [rng.normal(size=(5, 4))[y] + noise[0], *noise]
    ]
    for name, score in scores.SCORES.items():
        if name in ("leep", "nce", "n_leep", "n_leep_left_out"):
            continue
        with threadpool_limits(1):
            says, *widths = map(score, seen)
        assert says > max(widths) if name in scores.DEFAULT else widths[0] < widths[1] and widths[0] < widths[2], name


def test_the_probe_judges_itself_by_each_example_at_few_labels():
    rng = np.random.default_rng(0)
    y = np.arange(20) % 10
    x = 3 * rng.normal(size=(10, 30))[y] + rng.normal(size=(20, 30))
    assert transferability.probe(x, y) > 0.8  # two a class, of which a fifth is none
    assert transferability.probe(rng.normal(size=(200, 5)), np.arange(200) % 2) == pytest.approx(0.5, abs=0.15)
    with pytest.raises(InputError, match="holds none out"):
        transferability.probe(x[:10], y[:10])


def test_copies_of_an_image_are_found_among_the_images_not_the_features():
    images = np.zeros((4, 2, 2, 1), np.uint8)
    images[1, 0, 0] = images[3, 1, 1] = 7
    assert scores._copies(images).tolist() == [0, 1, 0, 2]
    # Features that tell no example apart are no copies; images twice are, whatever rounding makes of their features.
    y = np.array([0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1])
    seen = scores.ScoredExamples(y[:, None].astype(float), np.ones((12, 1)), y, np.arange(12))
    assert scores.SCORES["knn"](seen) == 1
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 8))
    twice = np.vstack([x, x + 1e-6 * rng.normal(size=x.shape)])
    groups, labels = np.tile(np.arange(50), 2), np.tile(np.arange(50) % 5, 2)
    for name in ("knn", "probe", "n_leep_left_out"):
        of_images, untold = (
            scores.SCORES[name](scores.ScoredExamples(twice, np.ones((100, 1)), labels, which))
            for which in (groups, np.arange(100))
        )
        assert of_images < untold


def test_a_dry_run_counts_the_fits(many, tasks, tmp_path, capsys):
    rank.main(line(many, tasks, tmp_path / "w", "--verify", "--dry_run"))
    assert "5 sources, 2 targets, 36 fits to verify" in capsys.readouterr().out and not (tmp_path / "w").exists()


BAD = {
    "an unknown score": ({"scores": "knm"}, "--scores=knm: 'knm' is none; nearest: 'knn'"),
    "no source": ({"sources": ""}, "--sources and --target are needed"),
    "no target": ({"target": None}, "--sources and --target are needed"),
    "a source beside": ({"source": "mnist_10k"}, "leave out --source"),
    "nothing there": ({"sources": "/nowhere"}, "'/nowhere' does not exist"),
    "targets of another shape": ({"image_shape": "5,6,1"}, "has shape (5, 6, 1), the source (6, 6, 1)"),
    "more examples than there are": ({"train_examples": "100/class"}, "label budget of 300"),
    "only scratch": ({"strategies": "scratch"}, "nothing but scratch"),
    "two budgets that are one": ({"train_examples": "6/class,18"}, "'head_only at 6/class' and 'head_only at 18' are"),
    "two strategies that are one": ({"strategies": "lp_ft:start=0.5,lp_ft:start=.5"}, "are the same fits on"),
    "a target twice": ({"target": "TWICE"}, "twice: give each once"),
    "a score twice": ({"scores": "knn,knn"}, "--scores names knn twice"),
    "nothing to score": ({"score_examples": 1}, "--score_examples must be"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, many, tasks, tmp_path):
    change, message = BAD[case]
    change = {
        key: f"{tasks / 'same.npz'},{tasks / 'same.npz'}" if value == "TWICE" else value
        for key, value in change.items()
    }
    with pytest.raises(InputError) as refused:
        rank.main(line(many, tasks, tmp_path / "w", "--verify", **change))
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_sources_given_twice_or_of_another_shape_are_refused(many, tasks, tmp_path):
    zoo_folder, weights = many.split(",")
    with pytest.raises(InputError, match="twice: give each once"):
        rank.main(line(f"{many},{weights}", tasks, tmp_path / "w"))
    copy = tmp_path / "copy"
    shutil.copytree(zoo_folder, copy)
    with pytest.raises(InputError, match=r"one source twice, as '.*digits.npz in .*' and '.* in .*copy.*': keep one"):
        rank.main(line(f"{zoo_folder},{copy}", tasks, tmp_path / "w"))
    with pytest.raises(InputError, match="to judge scores give three or more"):
        rank.main(line(weights, tasks, tmp_path / "w", "--verify"))
    (tmp_path / "other").mkdir()
    write_task(tmp_path / "other" / "task.npz", 3, 4)
    with np.load(tmp_path / "other" / "task.npz") as arrays:
        wide = {name: np.repeat(array, 2, 1) if "images" in name else array for name, array in arrays.items()}
    np.savez(tmp_path / "other" / "task.npz", **wide)
    flags = [
        f"--zoo={tmp_path / 'other' / 'task.npz'}:untrained",
        f"--workdir={tmp_path / 'other' / 'w'}",
        "--hidden=8",
    ]
    zoo.main(["zoo", *flags, "--batch_size=20"])
    with pytest.raises(InputError, match=r"source '.*task.npz:untrained': data set .* has shape \(6, 6, 1\)"):
        rank.main(line(f"{zoo_folder},{tmp_path / 'other' / 'w'}", tasks, tmp_path / "w"))


def board(**change):
    rng = np.random.default_rng(0)
    truths = rng.uniform(size=(2, 5))
    scores = {"<knn>": truths + 0.1 * rng.normal(size=(2, 5)), "flat": np.ones((2, 5))}
    judged = ranking.judged(scores, truths, [0.2, 0.3], count=50)
    trivial = np.arange(5) == 4
    fields = ["full", "10/class", "all", judged, 0.75, scores, truths, ("a", "b"), trivial]
    return ranking.Board(*fields)._replace(**change)


def test_the_table_has_a_row_a_score_with_intervals_below_the_values():
    usual = board()
    table = tables.worth(usual)
    assert [row[0].text for row in table.rows] == ["<knn>", "flat", "the truth's own halves"]
    assert table.rows[0][1].text == f"{usual.judged['<knn>'].tau.value:.2f}" and " to " in table.rows[0][1].below
    assert table.rows[1][1] == Cell("\N{EN DASH}") and table.rows[2][1].text == "0.75"
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_pictures_hold_every_score_source_and_target(monkeypatch):
    figure, text = figures.ranking_scatter(board())
    assert [axes.get_title() for axes in figure.axes] == ["<knn>", "flat"] and "a point a source" in text
    drawn = sorted(len(line.get_xdata()) for line in figure.axes[0].lines)
    assert drawn == [1, 1, 4, 4]  # of two targets, the trivial apart
    left, right = figures.ranking_intervals(board())[0].axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["flat", "<knn>"] and len(right.lines) == 2 + 2 + 1
    html = ranking_page.page([board()], ["a note"], Provenance())
    assert "&lt;knn&gt;" in html and "<knn>" not in html and "a note." in html
    assert "not told apart from &lt;knn&gt;: none" in html


def test_scores_apart_are_those_whose_difference_is_above_zero():
    rng = np.random.default_rng(0)
    truths = rng.uniform(size=(3, 16))
    scores = {"good": truths, "near": truths + 0.01 * rng.normal(size=truths.shape), "bad": -truths}
    judged = ranking.judged(scores, truths, [0.0] * 3, count=100)
    assert board(judged=judged).apart() in (
        "not told apart from good: near",
        "not told apart from good: none",
    )
    assert board(judged={}).apart() == "no score ranks anything"


@pytest.mark.slow
def test_sources_and_scores_may_be_added_to_a_ranking(many, tasks, tmp_path, monkeypatch):
    first, *others = many.split(",")
    change = {"train_examples": "6/class", "target": tasks / "clothes.npz"}
    rank.main(line(first, tasks, tmp_path / "w", scores="nce", **change))
    before = ranking_record(tmp_path / "w")["scores"]
    rank.main(line(many, tasks, tmp_path / "w", scores="nce,knn", **change))
    after = ranking_record(tmp_path / "w")["scores"]
    assert others and len(before) < len(after)
    assert [entry["nce"] for entry in after[: len(before)]] == [entry["nce"] for entry in before]
    assert all(0 <= entry["knn"]["value"] <= 1 for entry in after)
