"""A residual network with batch norm, pretrained and transferred by the programs, and what of it they refuse."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_programs import arguments

from experiments import check, export, features, predict, pretrain, transfer
from experiments.runs import plan, resume
from experiments.runs.settings import Settings
from tljax import batch_stats, checkpoint, masks, models, objective, optimizers, train
from tljax.types import InputError

pytestmark = pytest.mark.usefixtures("no_pictures")

MODEL = f"{Path(__file__).parent / 'residual.py'}:model"
STRATEGIES = ("scratch", "full", "head_only", "norm_only")
STATE = ("block_0/batch_stats/norm_0/mean", "stem/batch_stats/norm/var")


def flags(tasks, workdir, **more):
    values = {"model": MODEL, "strategies": STRATEGIES, "seeds": (0,), "epochs": 2, "optimizer": "adam", **more}
    return {name: value for name, value in arguments(tasks, workdir, **values).items() if name != "hidden"}


@pytest.fixture(scope="module")
def source(tasks, tmp_path_factory):
    """A run directory of experiments.pretrain."""
    workdir = tmp_path_factory.mktemp("residual") / "source"
    of_source = {name: value for name, value in flags(tasks, workdir).items() if name not in ("target", "strategies")}
    pretrain.run(**{name: value for name, value in of_source.items() if name not in ("head", "train_examples")})
    return workdir


def leaves(workdir, results):
    """{strategy: {path: array}} of the checkpoints."""
    return {r.strategy: checkpoint.load(Path(workdir) / r.checkpoint)[0][r.name] for r in results}


def from_source(tasks, workdir, source, **more):
    return flags(tasks, workdir, source=None, source_checkpoint=str(source), **more)


def of_source(source):
    [place] = (source / "checkpoints").iterdir()
    trees, about = checkpoint.load(place)
    [name] = about["fits"]
    return trees[name]


@pytest.mark.slow
def test_it_is_pretrained_and_transferred_and_states_go_with_the_mode(tasks, source, tmp_path, capsys):
    pretrained = of_source(source)
    assert not np.allclose(pretrained[STATE[1]], 1)  # it was tracked
    ends, losses = {}, {}
    for mode in ("auto", "frozen", "tracked", "reestimated"):
        results = transfer.run(**from_source(tasks, tmp_path / mode, source, batch_stats=mode))
        ends[mode], losses[mode] = leaves(tmp_path / mode, results), {r.strategy: r.test_loss for r in results}
    stay = [("auto", "head_only"), ("auto", "norm_only"), *(("frozen", strategy) for strategy in STRATEGIES[1:])]
    moved = [(mode, strategy) for mode in ("tracked", "reestimated") for strategy in STRATEGIES]
    for path in STATE:
        for mode, strategy in stay:
            np.testing.assert_array_equal(ends[mode][strategy][path], pretrained[path])
        for mode, strategy in (("auto", "full"), *moved):
            assert not np.array_equal(ends[mode][strategy][path], pretrained[path])
        np.testing.assert_array_equal(ends["auto"]["full"][path], ends["tracked"]["full"][path])
    for strategy, mode in (("full", "tracked"), ("head_only", "frozen")):
        assert losses["auto"][strategy] == losses[mode][strategy]
    assert len({losses[mode]["norm_only"] for mode in ("frozen", "tracked", "reestimated")}) == 3


@pytest.mark.slow
def test_a_dry_run_says_what_becomes_of_running_averages(tasks, source, capsys):
    transfer.run(**from_source(tasks, None, source, dry_run=True))
    text = capsys.readouterr().out
    assert text.count("running averages: tracked in stem, block_0") == 2
    assert text.count("running averages: frozen in stem, block_0") == 2


@pytest.mark.slow
def test_the_mode_is_in_the_key_of_a_model_with_a_state_and_in_no_other(tasks):
    keys = {}
    for model in ("mlp", MODEL):
        for mode in ("auto", "frozen"):
            values = flags(tasks, None, model=model, batch_stats=mode, strategies=("full",))
            experiment = plan.prepare(Settings.from_flags(**values), train.Execution(), only=True)
            [keys[model, mode]] = plan.planned(experiment)
    assert keys["mlp", "auto"] == keys["mlp", "frozen"] and keys[MODEL, "auto"] != keys[MODEL, "frozen"]
    task = plan.load_task(Settings.from_flags(**flags(tasks, None)), str(tasks / "digits.npz"), None)
    assert plan.states(models.build("mlp", 4, hidden=(8,), activation="relu"), plan.example_shape(task), "auto") == {}


def exported(source, file, change):
    """Weights of the source in a file, their arrays changed by a function."""
    export.main(["export", f"--checkpoint={source}", f"--output={file}"])
    arrays = load_file(file)
    card = json.loads(Path(f"{file}.json").read_text())
    save_file(change(arrays), file)
    kept = {name: card[name] for name in ("task", "classes", "shape", "model", "accuracy")}
    Path(f"{file}.json").write_text(json.dumps(kept))
    return file


@pytest.fixture
def without_state(source, tmp_path):
    """Weights of the source without its running averages."""
    averages = "batch_stats"
    return exported(
        source, tmp_path / "net.safetensors", lambda arrays: {n: a for n, a in arrays.items() if averages not in n}
    )


@pytest.mark.slow
def test_a_source_without_its_running_averages_is_refused_or_has_them_computed_anew(tasks, without_state, tmp_path):
    values = from_source(tasks, tmp_path / "w", without_state, strategies=("full", "head_only"))
    with pytest.raises(
        InputError, match=r"lacks running averages of the model, 'block_0/batch_stats.*--batch_stats=rees"
    ):
        transfer.run(**values)
    assert not (tmp_path / "w").exists()
    ends = leaves(tmp_path / "w", transfer.run(**values, batch_stats="reestimated"))
    assert all(np.all(np.abs(ends["head_only"][path]) > 0) for path in STATE)


def test_a_source_that_lacks_one_running_average_is_told_of_that_one_and_has_them_computed_anew(
    tasks, source, tmp_path
):
    file = exported(source, tmp_path / "net.safetensors", lambda arrays: arrays.pop(STATE[1]) is None or arrays)
    values = from_source(tasks, None, file, strategies=("full",), batch_stats="reestimated")
    experiment = plan.prepare(Settings.from_flags(**values), train.Execution(), only=True)
    assert STATE[1] in experiment.source.trained[0].flat
    with pytest.raises(
        InputError, match=rf"lacks running averages of the model, '{STATE[1]}': give --batch_stats=rees"
    ):
        plan.prepare(Settings.from_flags(**{**values, "batch_stats": "auto"}), train.Execution(), only=True)


def test_programs_that_train_nothing_name_no_flag_that_they_have_not(without_state, tmp_path):
    fit, output = {"checkpoint": str(without_state)}, str(tmp_path / "out")
    calls = (
        lambda: predict.run({}, predict.PredictFlags(**fit, images=str(tmp_path), output=f"{output}.csv")),
        lambda: export.run({}, export.ExportFlags(**fit, output=f"{output}.safetensors")),
        lambda: features.run(
            {"source_checkpoint": str(without_state)}, features.FeaturesFlags(dataset="digits", output=output)
        ),
    )
    for call in calls:
        with pytest.raises(InputError, match=r"lacks running averages of the model, .*: give weights that have them$"):
            call()


def test_a_running_variance_below_0_is_refused(tasks, source, tmp_path):
    file = exported(source, tmp_path / "net.safetensors", lambda arrays: {**arrays, STATE[1]: -arrays[STATE[1]]})
    with pytest.raises(InputError, match=rf"has a variance of -.* in '{STATE[1]}': none is below 0"):
        transfer.run(**from_source(tasks, tmp_path / "w", file))


@pytest.mark.slow
def test_a_state_of_another_shape_is_refused(tasks, source, tmp_path):
    file = tmp_path / "net.safetensors"
    export.main(["export", f"--checkpoint={source}", f"--output={file}"])
    arrays = load_file(file)
    [name] = [name for name in arrays if name.endswith("stem/batch_stats/norm/var")]
    save_file({**arrays, name: np.ones(7, np.float32)}, file)
    card = json.loads(Path(f"{file}.json").read_text())
    kept = {name: card[name] for name in ("task", "classes", "shape", "model", "accuracy")}
    Path(f"{file}.json").write_text(json.dumps(kept))
    with pytest.raises(InputError, match=r"stem/batch_stats/norm/var.*7"):
        transfer.run(**from_source(tasks, tmp_path / "w", file))


STRATEGY = '''"""Everything trains, and the stem's running averages stay."""

from tljax import masks


def strategy(params, context):
    return masks.by_path(params, lambda path: True)


def batch_stats(context):
    return {answer}
'''


@pytest.mark.slow
def test_a_strategy_says_what_becomes_of_the_state_of_a_stage(tasks, source, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(STRATEGY.replace("{answer}", "{context.stages[0]: 'frozen', 'head': 'tracked'}"))
    text = f"{file}:strategy"
    results = transfer.run(**from_source(tasks, tmp_path / "w", source, strategies=(text,)))
    ends, pretrained = leaves(tmp_path / "w", results)[text], of_source(source)
    np.testing.assert_array_equal(ends[STATE[1]], pretrained[STATE[1]])
    assert not np.array_equal(ends[STATE[0]], pretrained[STATE[0]])
    for number, (answer, line) in enumerate(
        {
            "{'stam': 'frozen'}": "batch_stats names 'stam', which is no stage; nearest: 'stem'",
            "{'stem': 'trakced'}": "batch_stats says 'trakced' of 'stem'; nearest: 'tracked'",
            "['stem']": r"batch_stats gives \['stem'\]: return a dict",
        }.items()
    ):
        file = tmp_path / f"odd{number}.py"
        file.write_text(STRATEGY.replace("{answer}", answer))
        with pytest.raises(InputError, match=line):
            transfer.run(**from_source(tasks, tmp_path / "v", source, strategies=(f"{file}:strategy",)))


def test_microbatches_are_refused_where_a_state_follows_the_batch(tasks, source, tmp_path):
    values = from_source(tasks, tmp_path / "w", source, microbatch=5, batch_size=20)
    with pytest.raises(InputError, match=r"microbatch=5: stage 'block_0' normalises by the whole batch"):
        transfer.run(**{**values, "strategies": ("full",)})


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["full", "head_only", "norm_only"])
def test_the_checks_of_strategies_pass_on_it(strategy, capsys):
    check.main(["check", f"--strategy={strategy}", f"--model={MODEL}"])
    text = capsys.readouterr().out
    assert "FAILED" not in text and "numbers train" in text and "jit equals no jit" in text


@pytest.mark.slow
def test_half_trained_fits_keep_their_state_on_disk(tmp_path):
    """Through the files of experiments.runs.resume, to the bit."""
    model = models.build(MODEL, 3, hidden=(), activation="relu")
    params, state = batch_stats.split(models.init(model, jax.random.key(0), (6, 6, 1)))
    spec, numbers = optimizers.spec("sgd", momentum=0.9)
    program = train.Spec(model, objective.loss("softmax_cross_entropy"), spec, averages=True)
    mask = masks.by_path(params, lambda path: True)
    order = lambda start, stop: np.tile(np.arange(5, dtype=np.int32), (stop - start, 1))  # noqa: E731
    fit = train.Fit(params, ((0, mask),), order, np.full(8, 0.1, np.float32), (), numbers, jax.random.key(0))
    fit = fit._replace(model_state=state, numbers={**numbers, "label_smoothing": 0.0, "average_weight": 0.1})
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 1)).astype(np.uint8)
    data = train.load(images, np.arange(5, dtype=np.int32) % 3)
    half, end = (resume.held(now) for now, _ in train.fit(program, [fit], data, [4, 8]))
    progress = resume.nothing(1)
    progress = progress._replace(parts=resume.joined(progress.parts, half))
    with resume.saving(tmp_path / "group", ["a"]) as save:
        save(progress)
    saved = resume.find(tmp_path, ["a"], program, [fit], pytest.fail)
    assert saved is not None
    [(again, _)] = train.fit(program, [fit], data, [4, 8], saved.parts)
    jax.tree.map(np.testing.assert_array_equal, (again.variables, again.average), (end.variables, end.average))
    assert not np.array_equal(end.model_state["stem"]["norm"]["mean"], half.model_state["stem"]["norm"]["mean"])
