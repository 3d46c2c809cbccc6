"""--augment, --augment_views and --recipe: what is refused in a line, what enters keys, what is said, what wins."""

import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_programs import arguments, command, refused

from experiments import pretrain, transfer
from experiments.runs import command_line, directory, plan, process
from experiments.runs.settings import Recipe, Settings, named_recipe, parse_flags
from tljax import augment, data, train
from tljax.types import Batch

OWN = """
import jax.numpy as jnp
from tljax.augment import by_example, mixes


@by_example
def augment(key, example, *, shade=0):
    return example._replace(inputs=example.inputs - jnp.uint8(shade))


def to_float(key, batch):
    return batch._replace(inputs=batch.inputs / 255)


def weighs(key, batch):
    return batch._replace(weight=0 * batch.weight)


def off_classes(key, batch):
    return batch._replace(targets=batch.targets + 9)


def breaks(key, batch):
    return batch._replace(inputs=batch.pixels)
"""
ONCE = {"seeds": (0,), "strategies": ("full",), "epochs": 1}


@pytest.fixture
def plugin_file(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return file


@pytest.fixture
def of_features(tmp_path):
    """A data set of features, 12 of each of three classes."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "test"):
        labels = np.repeat(np.arange(3), 12).astype(np.int32)
        arrays[f"{split}_features"] = (rng.normal(size=(36, 5)) + labels[:, None]).astype(np.float32)
        arrays[f"{split}_labels"] = labels
    np.savez(tmp_path / "features.npz", **arrays)
    return str(tmp_path / "features.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"augment": "corp"}, "--augment: unknown augmentation 'corp'; nearest: 'crop'"),
        ({"source_augment": "flip:rate=2"}, "--source_augment: flip:rate=2.0: it must be from 0 to 1"),
        ({"augment": "OWN:to_float", "source_augment": ""}, "to_float' makes of the inputs uint8[2, "),
        (
            {"augment": "OWN:breaks", "source_augment": ""},
            "fails: AttributeError: 'Batch' object has no attribute 'pixels'",
        ),
        (
            {"augment": "mixup", "loss": "multiclass_hinge_loss"},
            "mixup mixes labels, and loss 'multiclass_hinge_loss' takes",
        ),
        (
            {"augment": "cutmix", "class_weights": "balanced"},
            "cutmix mixes labels, and class weights are of whole ones",
        ),
        (
            {"augment": "OWN:weighs", "source_augment": ""},
            "weighs' makes a weight 0: weights say what is padding, so leave them as they are",
        ),
        ({"source_augment": "OWN:off_classes"}, "--source_augment: augmentation 'OWN:off_classes' makes a target 9"),
        ({"augment": "auto,erase"}, "--augment: 'auto' stands alone: leave out it or 'erase'"),
        ({"decay": "kernel"}, "--decay=kernel: pattern 'kernel' matches no leaf; nearest: "),
        ({"decay": "kernel"}, "; or the rule 'kernels'"),
        ({"augment_views": 2}, "--augment_views: there is nothing to augment: give --augment=crop,flip"),
        (
            {"augment_views": 2, "augment": "flip,mixup"},
            "--augment_views: views are of examples, and 'mixup' changes whole",
        ),
        ({"augment_views": -1}, "--augment_views=-1: it must be at least 0"),
        ({"recipe": "fintune"}, "--recipe=fintune; nearest: 'finetune'"),
        ({"source_recipe": "fintune"}, "--source_recipe=fintune; nearest: 'finetune'"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line_before_training(change, message, tasks, tmp_path, plugin_file, capsys):
    change = {
        name: value.replace("OWN", str(plugin_file)) if isinstance(value, str) else value
        for name, value in change.items()
    }
    message = message.replace("OWN", str(plugin_file))
    assert message in refused(command(tasks, tmp_path, **ONCE, **change), capsys)
    assert not (tmp_path / "w").exists()


def test_images_are_not_taken_for_features(tasks, tmp_path, of_features, capsys):
    change = {"source": None, "target": of_features, "strategies": ("scratch",), "augment": "crop"}
    text = refused(command(tasks, tmp_path, **{**ONCE, **change}), capsys)
    assert (
        "--augment: crop is for images [height, width, channels], and the inputs are float32[5]: leave it out" in text
    )


def keys(tasks, **flags):
    """{strategy: key} of the fits that flags ask for, and the source's."""
    settings = Settings.from_flags(**arguments(tasks, None, **{**ONCE, **flags}))
    experiment = plan.prepare(settings, train.Execution())
    by_label = {fit.strategy.label: key for key, fit in plan.planned(experiment).items()}
    return by_label | ({"source": experiment.source.identity[0]} if experiment.source else {})


@pytest.mark.slow
def test_a_key_holds_what_the_augmentation_is_and_nothing_where_there_is_none(tasks, plugin_file, of_features):
    without = keys(tasks)
    assert keys(tasks, augment="", augment_views=0) == keys(tasks, augment="none") == without
    target_alone = keys(tasks, augment="flip", source_augment="")
    assert target_alone["source"] == without["source"] and target_alone["full"] != without["full"]
    assert keys(tasks, augment="flip")["source"] != without["source"]
    assert keys(tasks, augment="flip", source_augment="", augment_views=2)["full"] != target_alone["full"]
    task = data.load(str(tasks / "clothes.npz"))
    assert keys(tasks, augment="auto") == keys(tasks, augment=augment.resolved("auto", task.train.spec)) != without
    files = keys(tasks, augment=f"{plugin_file}:augment:shade=1", source_augment="")["full"]
    plugin_file.write_text(OWN + "\n# edited\n")
    assert keys(tasks, augment=f"{plugin_file}:augment:shade=1", source_augment="")["full"] != files
    features = {"source": None, "target": of_features, "strategies": ("scratch",)}
    assert keys(tasks, **features, augment="auto") == keys(tasks, **features)


@pytest.mark.slow
def test_a_dry_run_and_a_run_say_what_is_augmented(tasks, tmp_path, of_features, capsys):
    flags = {**ONCE, "augment": "flip", "source_augment": "", "strategies": ("scratch", "head_only")}
    transfer.run(**arguments(tasks, tmp_path / "w", **flags, dry_run=True))
    line = r"augmented in training: flip; validation and test examples of '.*clothes.npz' stay as they are"
    assert re.search(line, capsys.readouterr().out)
    transfer.run(**arguments(tasks, tmp_path / "w", **flags))
    text = capsys.readouterr().out
    assert len(re.findall(line, text)) == 1
    assert "hidden_0 is frozen, and computed in every step, since inputs are augmented" in text
    settings = {"source": None, "target": of_features, "strategies": ("scratch",), "recipe": "finetune"}
    transfer.run(**arguments(tasks, tmp_path / "w2", **{**ONCE, **settings}, dry_run=True))
    assert re.search("not augmented: the inputs of '.*features.npz' are no pixels", capsys.readouterr().out)
    pretrain.run(source=str(tasks / "digits.npz"), recipe="finetune", workdir=str(tmp_path / "w3"), dry_run=True)
    assert "augmented in training: crop" in capsys.readouterr().out


@pytest.mark.slow
def test_views_are_kept_for_fits_that_freeze_a_prefix(tasks, tmp_path, capsys):
    flags = {**ONCE, "augment": "flip", "source_augment": "", "strategies": ("head_only",), "epochs": 4}
    results = transfer.run(**arguments(tasks, tmp_path / "w", **flags, augment_views=2))
    text = capsys.readouterr().out
    assert re.search(r"hidden_0 is frozen: features of 2 augmented views of \d+ examples are computed once", text)
    assert len(results) == 2 and all(np.isfinite(result.train_loss) for result in results)


# ---- Recipes of the field


def test_a_recipe_gives_flags_of_a_fit_that_are_not_given_wherever_they_stand(tmp_path):
    named = named_recipe("finetune")
    assert named["optimizer"] == "adamw" and named["augment"] == "auto" and named["decay"] == "kernels"
    assert 0 < named["label_smoothing"] < 1 and named["schedule"] == "cosine" and named["warmup"] > 0
    for order in (["--recipe=finetune", "--weight_decay=0.2"], ["--weight_decay=0.2", "--recipe=finetune"]):
        recipe = Settings.from_flags(**parse_flags(["", *order])).recipe
        assert recipe == Recipe(**{**named, "weight_decay": 0.2})
    (tmp_path / "a.flags").write_text("--recipe=finetune\n--augment=flip\n")
    settings = Settings.from_flags(**parse_flags(["", "--schedule=linear", f"--flagfile={tmp_path / 'a.flags'}"]))
    assert settings.recipe == Recipe(**{**named, "augment": "flip", "schedule": "linear"}) == settings.source_recipe
    assert Settings.from_flags(recipe="").recipe == Recipe()


def test_a_source_follows_the_recipe_or_has_its_own():
    named = named_recipe("finetune")
    settings = Settings.from_flags(recipe="finetune", epochs=3, source_label_smoothing=0.0)
    assert settings.source_recipe == Recipe(**{**named, "epochs": 3, "label_smoothing": 0.0})
    settings = Settings.from_flags(recipe="finetune", source_recipe="", epochs=3)
    assert settings.source_recipe == Recipe(epochs=3) and settings.recipe == Recipe(**{**named, "epochs": 3})
    settings = Settings.from_flags(source_recipe="finetune")
    assert settings.source_recipe == Recipe(**named) and settings.recipe == Recipe()


@pytest.mark.slow
def test_the_run_holds_the_flags_and_no_recipe(tasks, tmp_path):
    flags = arguments(tasks, tmp_path / "w", **ONCE, recipe="finetune")
    settings = Settings.from_flags(**flags)
    results = transfer.run(**flags)
    text = (tmp_path / "w" / "flags.flags").read_text()
    assert "recipe=" not in text and "--optimizer=adamw\n" in text and "--learning_rate=0.1\n" in text
    again = parse_flags(["", f"--flagfile={tmp_path / 'w' / 'flags.flags'}"])
    assert Settings.from_flags(**again, workdir=str(tmp_path / "w")) == settings
    assert [result.key for result in transfer.run(**{**again, "workdir": flags["workdir"]})] == [r.key for r in results]
    assert directory.of_another_experiment(tmp_path / "w", Settings.from_flags(**{**flags, "recipe": ""}))


@pytest.mark.slow
def test_the_augmentation_of_the_page_is_one_and_its_command_runs(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parent.parent / "tljax/README.md").read_text(encoding="utf-8")
    page = text.partition("## An augmentation of your own")[2].partition("\n## ")[0]
    [code], [line] = re.findall(r"```python\n(.*?)```", page, re.S), re.findall(r"```sh\n(.*?)```", page, re.S)
    monkeypatch.chdir(tmp_path)
    Path("noise.py").write_text(code)
    grey = Batch(jnp.full((50, 8, 8, 1), 128, jnp.uint8), jnp.zeros(50, jnp.int32), jnp.ones(50))
    noise = np.asarray(augment.apply(augment.read("noise.py:augment:size=16"), jax.random.key(0), grey).inputs) - 128.0
    assert abs(noise.std() - 16) < 1 and abs(noise.mean() + 0.5) < 1 and noise.dtype == float  # cut to whole numbers
    _, _, program, *argv = shlex.split(line)
    assert program == "experiments.transfer"
    process.run_main(transfer.main, ["transfer", *argv, "--dry_run"])
    captured = capsys.readouterr()
    assert "augmented in training: flip,noise.py:augment:size=16" in captured.out and not captured.err


def test_recipes_hold_flags_of_a_fit_alone():
    for file in (command_line.FLAGFILES / "recipes").glob("*.flags"):
        assert named_recipe(file.stem).keys() <= vars(Recipe()).keys()
    process.prepare(Settings.from_flags(**named_recipe("finetune")))
