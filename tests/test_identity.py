"""The keys of fits: over plain values that decide bits, and nothing else; run directories of an older format."""

import dataclasses
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from test_programs import results, snapshot

from experiments import export, pretrain, report, transfer
from experiments.runs import directory, plan, sources
from experiments.runs.command_line import flag
from experiments.runs.settings import NEUTRAL, Recipe, Settings
from tljax import train
from tljax.types import InputError

pytestmark = pytest.mark.usefixtures("no_pictures")

OLDER = Path(__file__).parent / "older" / "run_of_format_1.zip"
"""Made by tljax before keys had a format, with its data: transfer --source=digits.npz --target=clothes.npz --hidden=2
--steps=2 --points=1 --batch_size=4 --strategies=full --seeds=0,1 --workdir=run."""
FLAGS = {"source": "digits.npz", "target": "clothes.npz", "hidden": (2,), "steps": 2, "points": 1, "batch_size": 4}
FLAGS |= {"strategies": ("full",), "seeds": (0, 1)}
KEY_SIDE_BY_SIDE = "7e874c54613018a5011677278db95c515fc23eda37c4e576c18de4c037552316"
"""Of the source's fit of seed 0 under --many=vmap on one device."""
SOURCE = {name: value for name, value in FLAGS.items() if name not in ("target", "strategies")} | {"seeds": (0,)}


@pytest.fixture
def older(tmp_path, monkeypatch):
    """A run directory of format 1, and the folder of its data as the working directory."""
    with zipfile.ZipFile(OLDER) as file:
        file.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def keys(settings):
    """The keys and the recipes of the fits of a target, and of its sources."""
    experiment = plan.prepare(settings, train.Execution())
    fits = [planned.result for planned in plan.planned(experiment).values()]
    fits += plan.planned_sources(settings, experiment.source.task).values()
    return [(fit.key, fit.recipe) for fit in fits]


def test_a_key_is_the_same_for_good(older):
    """It changes with the format alone; raise `directory.FORMAT` where that is meant."""
    settings = Settings.from_flags(**FLAGS)
    fit = plan.planned_sources(settings, plan.source_task(settings))[0]
    assert directory.FORMAT == 3
    assert fit.key == "19872dace381ad1378fbf98f4e4cf2c0ef496b64d890b57d62e1a4112061c192"


def test_side_by_side_over_several_devices_their_number_is_in_the_key(older, monkeypatch):
    """And nowhere else: one device is not written, and no fit has more than one."""
    settings = Settings.from_flags(**FLAGS)  # of two seeds

    def keys_under(**flags):
        return keys(replace(settings, **flags))

    beside = keys_under(many="vmap", devices=1)
    assert KEY_SIDE_BY_SIDE in [key for key, _ in beside]
    both = keys_under(many="vmap", devices=2)
    assert not {key for key, _ in both} & {key for key, _ in beside}
    assert [recipe for _, recipe in both] == [recipe for _, recipe in beside]
    assert both == keys_under(many="vmap", devices=3) == keys_under(many="vmap", mesh=("data:2", "trial:2"))
    assert beside == keys_under(many="vmap", mesh=("data:4",)) == keys_under(many="vmap", parallel="pmap", devices=2)
    assert keys_under(devices=1) == keys_under(devices=2) == keys(settings)
    monkeypatch.setattr(plan.vectorize, "platform_of", lambda devices: "gpu")
    assert keys_under(devices=2) == both and keys_under(devices=2, parallel="pmap") == keys_under(many="map")


def test_a_batch_of_evaluation_is_in_the_keys_where_it_is_asked_for(older):
    settings = Settings.from_flags(**FLAGS)
    assert keys(replace(settings, evaluation_batch=0)) == keys(settings)
    at_64, other = (keys(replace(settings, evaluation_batch=count)) for count in (64, 1000))
    assert len({key for fits in (keys(settings), at_64, other) for key, _ in fits}) == 3 * len(at_64)


def test_a_renamed_class_and_a_new_flag_at_its_neutral_value_train_nothing_again(older):
    added = [("momentum_of_another_kind", float, flag(0.5, "a number", neutral=0.5))]
    renamed = dataclasses.make_dataclass("Renamed", added, bases=(Recipe,), frozen=True)
    settings = Settings.from_flags(**FLAGS)

    def with_value(value):
        recipes = (renamed(**vars(recipe), momentum_of_another_kind=value) for recipe in (settings.recipe,) * 2)
        return replace(settings, **dict(zip(("recipe", "source_recipe"), recipes, strict=True)))

    assert keys(with_value(0.5)) == keys(settings)
    assert not set(keys(with_value(0.1))) & set(keys(settings))


@pytest.mark.slow
def test_each_setting_of_a_recipe_is_in_the_key(older):
    settings = Settings.from_flags(**FLAGS)
    others = {"learning_rate": 0.02, "steps": 3, "momentum": 0.5, "penalty": "l2:weight=1e-4", "points": 2}
    every = [keys(replace(settings, recipe=replace(settings.recipe, **{n: v}))) for n, v in others.items()]
    of_target = [key for fits in (keys(settings), *every) for key, _ in fits[:4]]
    assert len(set(of_target)) == len(of_target)


@pytest.mark.slow
def test_a_rule_of_decay_is_in_the_key_only_where_it_changes_what_decays(older):
    def keys_of(**recipe):
        return keys(Settings.from_flags(**FLAGS, **recipe))

    assert keys_of(decay="kernels") == keys_of(decay="**/bias") == keys_of(decay="auto") == keys_of(decay="all")
    decay = {"optimizer": "adamw", "weight_decay": 0.01}
    assert keys_of(**decay) == keys_of(**decay, decay="kernels")
    assert not set(keys_of(**decay)) & set(keys_of(**decay, decay="all"))
    assert keys_of(**decay, decay="all")[-1][0] == KEY_OF_ADAMW_WITH_DECAY
    assert keys_of(weight_decay=0.01) == keys_of(weight_decay=0.01, decay="all")  # added to the gradient of all


KEY_OF_ADAMW_WITH_DECAY = "3489c42b75d23184ce1c9268393f14b68fc0581dee4c1c6770bcf40a43f8dde6"
"""That of the source of seed 1, with no rule of decay in it."""


@pytest.mark.slow
def test_what_is_automatic_goes_on_in_a_run_from_before_it_where_nothing_changes(older, tmp_path):
    pretrain.run(**{**SOURCE, "workdir": str(tmp_path / "now")})
    file = tmp_path / "now" / "flags.flags"
    text = directory.flags_text(file)
    older_text = re.sub(f"--({'|'.join(NEUTRAL)})=.*\n", "", text)
    assert len(text.splitlines()) > len(older_text.splitlines()) + 10
    file.write_text(directory.signed(older_text))
    (fit,) = pretrain.run(**{**SOURCE, "workdir": str(tmp_path / "now")})
    assert len(results(tmp_path / "now")) == 1 and fit.name == results(tmp_path / "now")[0].name
    text_with_adamw = older_text.replace("optimizer=sgd", "optimizer=adamw").replace("decay=0.0", "decay=0.1")
    file.write_text(directory.signed(text_with_adamw))
    with pytest.raises(InputError, match=r"--decay=all there, auto here"):
        pretrain.run(**SOURCE, optimizer="adamw", weight_decay=0.1, workdir=str(tmp_path / "now"))


@pytest.mark.parametrize(
    "value", [Recipe(), Path("a"), {1: 2}, {"a": [object()]}], ids=["dataclass", "path", "number", "object"]
)
def test_a_key_takes_plain_values_alone(value):
    with pytest.raises(TypeError, match="a fit's key takes plain values"):
        plan.identify("a", {"target": "b", "strategy": "c", "seed": 0}, {"value": value}, {})


@pytest.mark.slow
def test_a_run_of_format_1_is_read(older, tmp_path, capsys):
    before = snapshot(older)
    report.main(["report", f"--runs={older}", f"--output={tmp_path / 'pages'}"])
    assert (tmp_path / "pages" / "report.html").is_file() and "full" in capsys.readouterr().out
    name = next(fit.name for fit in results(older) if fit.strategy == "full")
    export.main(["export", f"--checkpoint={older}", f"--fit={name}", f"--output={tmp_path / 'full.npz'}.safetensors"])
    assert sources.weights_card(tmp_path / "full.npz.safetensors")["task"] == "clothes.npz"
    _, fit = sources.load_fit({}, str(older), name)
    assert fit.source.classes == ("0", "1", "2")
    flags = {name: value for name, value in FLAGS.items() if name != "source"}
    fits = transfer.run(**flags, source_checkpoint=str(older), workdir=str(tmp_path / "next"))
    assert [fit.source for fit in fits] == ["digits.npz"] * 4
    assert snapshot(older) == before


@pytest.mark.parametrize("seeds", [(0, 1), (0, 1, 2)])
def test_going_on_in_a_run_of_format_1_is_refused_by_name(seeds, older):
    before = snapshot(older)
    with pytest.raises(InputError, match=r"run' holds fits of an older tljax \(format 1 of their keys\): report reads"):
        transfer.run(**{**FLAGS, "seeds": seeds}, workdir=str(older))
    assert snapshot(older) == before


def test_a_run_of_now_says_its_format_and_one_of_a_later_tljax_is_refused(older, tmp_path):
    flags = {name: value for name, value in FLAGS.items() if name not in ("target", "strategies")}
    flags |= {"seeds": (0,), "workdir": str(tmp_path / "now")}
    pretrain.run(**flags)
    record = directory.read_record(tmp_path / "now" / "environment.json")
    assert record["format"] == directory.FORMAT
    directory.write_record(tmp_path / "now" / "environment.json", {**record, "format": directory.FORMAT + 1})
    with pytest.raises(InputError, match="fits of a newer tljax"):
        pretrain.run(**flags)
