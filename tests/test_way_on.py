"""What a user did is answered in one line, nothing of it is lost in silence, and the advice that is given works."""

import ast
import csv
import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_programs import arguments, refused

from experiments import compare, features, pretrain, rank, report, transfer
from experiments.benchmark.__main__ import BenchmarkFlags
from experiments.pages import ranking as ranking_page
from experiments.pages import search as search_page
from experiments.runs import command_line, plan, predictions, sources, tuned
from experiments.runs.scores import Score, Scored
from experiments.runs.settings import Settings, parse_flags
from tljax import data, npz, plugins
from tljax.types import InputError

pytestmark = pytest.mark.usefixtures("no_pictures")
ROOT = Path(__file__).parent.parent


# Names that are nearly known


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    result = {}
    for split, count in (("train", 12), ("test", 6)):
        result[f"{split}_images"] = rng.integers(0, 256, (count, 4, 4), np.uint8)
        result[f"{split}_labels"] = np.arange(count) % 3
    return result


SLIPS = {
    "train_group": "train_groups",
    "Train_Groups": "train_groups",
    "groups_train": "train_groups",
    "tset_groups": "test_groups",
    "test-groups": "test_groups",
    "class_name": "class_names",
    "classnames": "class_names",
    "calss_nmaes": "class_names",
    "train_lable": "train_labels",
    "X_train": "x_train",
}


@pytest.mark.parametrize("slip", SLIPS)
def test_an_array_of_data_that_is_nearly_a_known_one_is_refused(slip, arrays, tmp_path):
    """Groups decide what a verdict holds for: a letter that is missing must not take them away."""
    np.savez(tmp_path / "mine.npz", **arrays, **{slip: np.arange(12)})
    with pytest.raises(InputError, match=rf"the array '{slip}', which nothing reads; did you mean '{SLIPS[slip]}'\?"):
        data.load(str(tmp_path / "mine.npz"), data_dir=tmp_path)


def test_arrays_of_other_names_are_left_alone(arrays, tmp_path):
    others = ("images", "notes", "val_images", "train_names", "test_ids", "meta", "arr_0", "val_groups", "fingerprint")
    np.savez(tmp_path / "mine.npz", **arrays, **{name: np.arange(3) for name in others})
    np.savez(tmp_path / "plain.npz", **arrays)
    read = [data.load(str(tmp_path / name), data_dir=tmp_path).fingerprint for name in ("mine.npz", "plain.npz")]
    assert read[0] == read[1]


@pytest.mark.parametrize("known", ["train_groups", "class_names", "x_train", "probabilities", "predicted", "labels"])
def test_every_slip_of_one_letter_is_known_for_what_it_was_to_be(known):
    """Left out, doubled, exchanged with its neighbour, or another, at every place."""
    slips = {known[:i] + known[i + 1 :] for i in range(len(known))}
    slips |= {known[:i] + known[i] + known[i:] for i in range(len(known))}
    slips |= {known[:i] + known[i + 1] + known[i] + known[i + 2 :] for i in range(len(known) - 1)}
    slips |= {known[:i] + "q" + known[i + 1 :] for i in range(len(known))}
    others = ["test_groups", "train_labels", "y_test"]
    assert {slip for slip in slips - {known} if plugins.meant(slip, [known, *others]) != known} == set()
    assert plugins.meant(known, [known]) is None


def test_a_slip_in_predictions_and_their_table_is_refused(tmp_path):
    labels = np.arange(20) % 2
    np.savez(tmp_path / "a.npz", labels=labels, predicted=labels, group=np.arange(20) // 2)
    with pytest.raises(InputError, match="the array 'group', which nothing reads; did you mean 'groups'"):
        predictions.groups_in(tmp_path / "a.npz")
    with pytest.raises(InputError, match="the array 'group', which nothing reads; did you mean 'groups'"):
        predictions.read(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", labels=labels, predicted=labels, logits=np.zeros((20, 2)))
    assert predictions.groups_in(tmp_path / "a.npz") is None and len(predictions.read(tmp_path / "a.npz")[0]) == 20
    (tmp_path / "t.csv").write_text("name,target,strategy,seed,train_examples,divergd\na,b,full,0,10,yes\n")
    with pytest.raises(InputError, match="the column 'divergd', which nothing reads; did you mean 'diverged'"):
        report.read_fits(tmp_path / "t.csv", f"{tmp_path}/*.npz")


def folder_of_pictures(folder):
    rows = [["file", "split", "group"]]
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for number, split in enumerate(("train", "train", "test")):
            picture = np.random.default_rng(number).integers(0, 256, (4, 4), np.uint8)
            Image.fromarray(picture).save(folder / label / f"{number}.png")
            rows.append([f"{label}/{number}.png", split, f"{label}{number}"])
    return rows


def written(file, rows, encoding="utf-8"):
    with open(file, "w", newline="", encoding=encoding) as out:
        csv.writer(out).writerows(rows)
    return f"folder:{file.parent / 'pictures'}:splits={file}"


def test_a_slip_in_a_table_of_splits_is_refused(tmp_path):
    rows = folder_of_pictures(tmp_path / "pictures")
    name = written(tmp_path / "splits.csv", rows)
    assert data.load(name, data_dir=tmp_path).train.groups.tolist() == [0, 1, 3, 4]
    for slip, known in (("groups", "group"), ("Split", "split"), ("fiel", "file")):
        name = written(tmp_path / "splits.csv", [[slip if cell == known else cell for cell in rows[0]], *rows[1:]])
        with pytest.raises(InputError, match=f"the column '{slip}', which nothing reads; did you mean '{known}'"):
            data.load(name, data_dir=tmp_path)
    name = written(tmp_path / "splits.csv", [[*rows[0], "camera"], *([*row, "old"] for row in rows[1:])])
    assert data.load(name, data_dir=tmp_path).train.groups.tolist() == [0, 1, 3, 4]


def test_a_slip_in_a_card_of_weights_is_refused(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.ones(2))
    card = {"task": "a", "classes": ["0", "1"], "shape": [4], "model": {"model": "mlp", "hidden": [8]}}
    (tmp_path / "w.npz.json").write_text(json.dumps(card))
    assert sources.weights_card(tmp_path / "w.npz") == card
    slips = [{"acuracy": 0.5}, {"model": {"hiden": [8]}}, {"model": {"model": "mlp", "activaton": "tanh"}}]
    for slip, nearest in zip(slips, ("accuracy", "hidden", "activation"), strict=True):
        (tmp_path / "w.npz.json").write_text(json.dumps(card | slip))
        with pytest.raises(InputError, match=f"nearest: '{nearest}'"):
            sources.weights_card(tmp_path / "w.npz")


# Texts in another encoding

STRATEGY = '"""Caf\u00e9."""\n\n\ndef strategy(params, context):\n    return params\n'


def readers(folder):
    """{what a text is: (file, text, how it is read)}."""
    rows = folder_of_pictures(folder / "pictures")
    labels = np.arange(20) % 2
    for name in ("scratch", "caf\u00e9"):
        np.savez(folder / f"{name}.npz", labels=labels, predicted=labels)
    np.savez(folder / "w.npz", a=np.ones(2))
    table = "name,target,strategy,seed,train_examples\nscratch,b,scratch,0,10\ncaf\u00e9,b,full,0,10\n"
    card = '{"task": "caf\u00e9", "classes": ["0", "1"], "shape": [4]}'
    (folder / "outer.flags").write_text(f"--flagfile={folder / 'inner.flags'}\n")
    places = [folder / name for name in ("splits.csv", "t.csv", "x.flags", "inner.flags", "w.npz.json", "s.py")]
    splits, results, flags, inner, beside, code = places
    return {
        "splits": (
            splits,
            "\n".join(map(",".join, rows)),
            lambda: data.load(f"folder:{folder / 'pictures'}:splits={splits}", data_dir=folder),
        ),
        "results": (results, table, lambda: report.read_fits(results, f"{folder}/*[!w].npz")),
        "flagfile": (
            flags,
            "--seeds=0\n--target=caf\u00e9\n",
            lambda: parse_flags(["transfer", f"--flagfile={flags}"]),
        ),
        "flagfile within": (
            inner,
            "--target=caf\u00e9\n",
            lambda: parse_flags(["transfer", f"--flagfile={folder / 'outer.flags'}"]),
        ),
        "card": (beside, card, lambda: sources.weights_card(folder / "w.npz")),
        "strategy": (code, STRATEGY, lambda: plan.read_strategy(f"{code}:strategy")),
    }


KINDS = ("splits", "results", "flagfile", "flagfile within", "card", "strategy")


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_in_another_encoding_is_told_the_one_to_save_in(kind, tmp_path):
    """Excel and PowerShell write UTF-16, and UTF-8 with a mark, which is read as without."""
    file, text, read = readers(tmp_path)[kind]
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_bytes(text.encode(encoding))
        contents = read()
        assert kind != "flagfile" or contents == {"seeds": (0,), "target": "caf\u00e9"}
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        file.write_bytes(text.encode(encoding))
        with pytest.raises(InputError) as error:
            read()
        assert str(error.value).endswith(": save it as UTF-8") and str(file) in str(error.value)
        assert "\n" not in str(error.value) and "codec" not in str(error.value)
        assert encoding[:6].upper() in str(error.value) or encoding == "utf-32"
    if kind != "splits":  # names of files need not be UTF-8
        file.write_bytes(text.encode("latin-1"))
        with pytest.raises(InputError, match="save it as UTF-8"):
            read()


# Features and pixels


def write_features(file, width, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(30) % 3
    x = rng.normal(size=(30, *np.atleast_1d(width))) + labels.reshape(-1, *[1] * np.ndim(np.zeros(width)))
    x = x.astype(np.float32)
    np.savez(file, train_features=x, train_labels=labels, test_features=x, test_labels=labels)


def small(source, target, folder, **flags):
    values = {"source": str(source), "target": str(target), "hidden": (4,), "steps": 3, "epochs": None, "seeds": (0,)}
    values |= {"strategies": ("full",), "batch_size": 10, "workdir": str(folder)} | flags
    return {name: value for name, value in values.items() if value is not None}


@pytest.mark.slow
@pytest.mark.parametrize("width", [4, pytest.param((5, 2), marks=pytest.mark.slow)])
def test_features_transfer_to_features(width, tmp_path):
    """Of any shape that is no picture's, in transfer, beside other data to judge on, and as features."""
    for seed, name in enumerate(("a", "b", "c")):
        write_features(tmp_path / f"{name}.npz", width, seed)
    flags = small(tmp_path / "a.npz", tmp_path / "b.npz", tmp_path / "w")
    lines = transfer.run(**flags)
    assert [line.strategy for line in lines] == ["scratch", "full"]
    options = compare.CompareFlags(eval=("source", str(tmp_path / "c.npz")), longer_scratch=False)
    assert len(compare.run(flags | {"workdir": str(tmp_path / "v"), "seeds": (0, 1)}, options)) == 4
    place = {"source_checkpoint": str(tmp_path / "w")}
    options = features.FeaturesFlags(dataset=str(tmp_path / "c.npz"), output=str(tmp_path / "f"))
    assert (features.run(place, options) / "train.npy").is_file()


def test_data_of_another_shape_are_told_what_can_be_done(tasks, tmp_path):
    """No flag is named that was not given, or that could not help."""
    write_features(tmp_path / "f4.npz", 4)
    write_features(tmp_path / "f9.npz", 9)
    f4, f9, pixels = str(tmp_path / "f4.npz"), str(tmp_path / "f9.npz"), str(tasks / "digits.npz")
    labels = np.arange(30) % 3
    x = np.random.default_rng(0).integers(0, 256, (30, 6, 6, 4), np.uint8)
    deep = str(tmp_path / "deep.npz")
    np.savez(deep, train_images=x, train_labels=labels, test_images=x, test_labels=labels)
    cases = [
        ((pixels, f4, {}), r"features \[4\] cannot become \[6, 6, 1\], as only uint8 pixels .* of that shape$"),
        ((f4, pixels, {}), r"has shape \(6, 6, 1\), the source \(4,\): features must agree"),
        ((f4, f9, {}), r"has shape \(9,\), the source \(4,\): features must agree"),
        (
            (deep, pixels, {}),
            r"images of 1 channels cannot become 4: .*; give images of 4 channels$",
        ),
        (
            (None, pixels, {"image_shape": (6, 6, 2)}),
            r"give images of 2 channels, or 1 or 3 channels with --image_shape$",
        ),
        ((None, f4, {"image_shape": (2, 2, 1)}), r"of that shape, or leave out --image_shape$"),
        ((f4, f4, {"image_shape": (2, 2, 1)}), r"of that shape, or leave out --image_shape$"),
        ((pixels, f4, {"image_shape": (6, 6, 1)}), r"or features of that shape$"),
    ]
    for (source, target, more), message in cases:
        flags = small(source, target, tmp_path / "w", **more)
        flags |= {"strategies": ("full" if source else "scratch",)}
        with pytest.raises(InputError, match=message) as error:
            transfer.run(**{name: value for name, value in flags.items() if value != "None"})
        assert "image_shape" not in str(error.value) or more
    options = compare.CompareFlags(eval=(f9,))
    with pytest.raises(InputError, match=rf"--eval={f9} has shape \(9,\), '{f4}' \(4,\): give one of that shape"):
        compare.run(small(f4, f4, tmp_path / "w"), options)
    assert not (tmp_path / "w").exists()


# Ties


def card(name):
    return SimpleNamespace(name=name)


def test_a_tie_on_the_first_places_of_a_ranking_is_said():
    """Where scores are equal, or equal as they are printed."""
    cards = [card(name) for name in ("zoo", "cat", "ant", "dog")]

    def first(*values):
        scores = [Scored({"all": {"knn": Score(value, 0.0)}}, 0.0) for value in values]
        table = {(each.name, "t"): score for each, score in zip(cards, scores, strict=True)}
        return ranking_page._why(cards, table, "t", "all")[0]

    assert first(0.1, 0.2, 0.3, 0.4) == "first by knn: dog, ant, cat"
    assert first(0.5, 0.5, 0.3, 0.1) == "first by knn: zoo and cat (tied), ant"
    assert first(0.1, 0.50001, 0.3, 0.50002) == "first by knn: cat and dog (tied), ant"
    assert first(0.4, 0.3, 0.5, 0.3) == "first by knn: ant, zoo, cat and dog (tied)"
    assert first(0.5, 0.5, 0.5, 0.5) == "first by knn: zoo, cat, ant and dog (tied)"
    assert first(np.inf, 0.5, np.inf, 0.5) == "first by knn: zoo and ant (tied), cat and dog (tied)"
    many = {f"s{number}": 1.0 for number in range(9)}
    assert ranking_page._first(many) == "s0, s1, s2, s3, s4, s5 and 3 more (tied)"


def test_a_tie_of_the_best_trials_of_a_search_is_said():
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    arm = tuned.Arm("full", "all", ())

    def notes(*accuracies):
        study = optuna.create_study(direction="maximize")
        for accuracy in accuracies:
            study.add_trial(optuna.trial.create_trial(value=accuracy))
        return search_page._winner_notes(arm, tuned.Winner(study, study.trials[0], Settings.from_flags()))

    assert len(notes(0.9, 0.8)) == 1
    assert notes(0.9, 0.9, 0.8)[1] == "another trial has this accuracy: trials.csv has their values"
    assert notes(0.9, 0.90001, 0.9)[1].startswith("2 other trials have this accuracy")


# Advice that works


def messages(file):
    """(line, text) of each text of a file that may be shown: a hole of an f-string is '{}'; docstrings are none."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    docs = {
        id(body[0].value)
        for node in ast.walk(tree)
        if isinstance(body := getattr(node, "body", None), list) and body and isinstance(body[0], ast.Expr)
    }
    within = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not {id(node)} & (docs | within):
            yield node.lineno, node.value


OF_GIT = {"always", "dirty", "abbrev", "exclude"}
FILES = [file for folder in ("experiments", "tljax") for file in (ROOT / folder).rglob("*.py")]
OF_ALL = {name for names in command_line.of_programs().values() for name in names} | {*command_line.HELP, "flagfile"}
OF_ALL |= command_line.kinds(BenchmarkFlags).keys()
PROGRAMS = command_line.programs()


def named(text):
    """The flags that a text names whole: --seeds, but not --{} and --source_{}."""
    return set(re.findall(r"--([a-z]\w*)(?![\w{])", text))


@pytest.mark.slow
def test_every_flag_and_program_that_a_message_names_is_there():
    there = 0
    for file in FILES:
        if "shipped" in file.parts:
            continue
        for number, text in messages(file):
            names = {name for name in named(text) if name.strip("_") not in ("source", "source_NAME")}
            there += len(names)
            assert names <= OF_ALL | OF_GIT, f"{file.name}:{number}: {text}"
            for module in re.findall(r"\bexperiments\.(?!benchmark)([a-z]\w*)", text):
                known = module in PROGRAMS or (ROOT / "experiments" / f"{module}.py").is_file()
                assert known, f"{file.name}:{number}: {text}"
    assert there > 200


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_names_flags_that_it_takes(program, monkeypatch):
    """In its own file, but in a sentence that names another program."""
    taken = {}
    monkeypatch.setattr(command_line, "main", lambda argv, about, run, form, *how, **named: taken.update(form=form))
    importlib.import_module(f"experiments.{program}").main([program])
    kinds = {*command_line.kinds(taken["form"]), *command_line.HELP}
    for number, text in messages(ROOT / "experiments" / f"{program}.py"):
        if "experiments." not in text and " " in text.strip():  # no argument for another program
            assert named(text) <= kinds | {"flagfile"}, f"{program}.py:{number}: {text}"


@pytest.mark.slow
def test_a_penalty_that_a_source_cannot_have_is_refused_before_anything_is_written(tasks, tmp_path, capsys):
    """ewc of the target is the source's too, unless --source_penalty is given: the advice is tried."""
    flags = arguments(tasks, tmp_path / "w", strategies=("full",), seeds=(0,), penalty="ewc:weight=1")
    text = refused([f"--{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in flags.items()], capsys)
    assert "give --source_penalty= for the source's own fit, and --save_fisher" in text
    assert not (tmp_path / "w").exists()
    assert len(transfer.run(**flags, source_penalty="", save_fisher=True)) == 2
    alone = arguments(tasks, tmp_path / "p", target=None, strategies=None, penalty="ewc:weight=1", save_fisher=True)
    with pytest.raises(InputError, match="give another --penalty, or none"):
        pretrain.run(**alone)
    assert not (tmp_path / "p").exists()


def test_advice_of_a_source_without_a_hidden_stage_works(tasks, tmp_path):
    pretrain.run(**arguments(tasks, tmp_path / "w", target=None, strategies=None, hidden=(), seeds=(0,)))
    place, dataset = str(tmp_path / "w"), str(tasks / "clothes.npz")
    options = features.FeaturesFlags(dataset=dataset, output=str(tmp_path / "f"))
    with pytest.raises(InputError, match=r"no stage before its head.*experiments\.features --stage=head"):
        features.run({"source_checkpoint": place}, options)
    options = features.FeaturesFlags(dataset=dataset, output=str(tmp_path / "f"), stage="head")
    assert (features.run({"source_checkpoint": place}, options) / "train.npy").is_file()


def test_an_error_names_the_flag_that_was_given(tasks, tmp_path):
    """`rank` has --sources, and takes no --source_checkpoint; the steps of a source are --source_steps."""
    flags = {"target": str(tasks / "clothes.npz"), "workdir": str(tmp_path / "w")}
    with pytest.raises(InputError, match=f"^--sources={tmp_path / 'none.npz'} does not exist"):
        rank.run(flags, rank.RankFlags(sources=(str(tmp_path / "none.npz"),)))
    wide = arguments(tasks, tmp_path / "w", source_batch_size=1000, source_epochs=2)
    with pytest.raises(InputError, match=r"^--source_batch_size=1000: .* or give --source_steps"):
        transfer.run(**wide)
    assert not (tmp_path / "w").exists()


def test_slips_are_of_what_is_read_alone():
    """Curves and weights have any names: nothing is wanted of them by name."""
    npz.refuse_slips(["loss", "losses", "step"], ["accuracy"], "'c.npz'")
