"""Many sources in one go: each a checkpoint with a card, trained as its name says."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from test_programs import parameters, results, snapshot

from experiments import zoo
from experiments.runs import plan, sources
from experiments.runs.settings import Settings
from tljax.types import InputError

FLAGS = Path(zoo.__file__).parent / "flags"


def line(tasks, folder, *names, **change):
    task = tasks / "digits.npz"
    values = {
        **{"zoo": ",".join(f"{task}{name}" for name in names), "hidden": 8, "steps": 20, "batch_size": 20},
        **{"learning_rate": 0.5, "seeds": 0, "workdir": folder},
    } | change
    return ["zoo", *(f"--{name}={value}" for name, value in values.items() if value is not None)]


NAMES = ("", ":labels=0-1:hidden=6+5", ":shuffle_labels=1:steps=10", ":untrained", ":seed=1:learning_rate=0.1")


@pytest.fixture(scope="module")
def zoo_run(tasks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo") / "w"
    zoo.main(line(tasks, folder, *NAMES))
    return folder


@pytest.mark.slow
def test_each_source_is_trained_as_its_name_says_and_has_a_card(zoo_run, tasks):
    cards, lines = sources.read_cards(str(zoo_run)), {each.checkpoint: each for each in results(zoo_run)}
    assert [card.name.removeprefix(str(tasks / "digits.npz")) for card in cards] == list(NAMES)
    assert [card.trivial for card in cards] == [False, False, True, True, False]
    records = [json.loads(file.read_text()) for file in (zoo_run / "cards").iterdir()]
    for record in records:
        fit = lines[record["checkpoint"]]
        assert (record["accuracy"], record["steps"], record["seed"]) == (fit.test_accuracy, fit.steps, fit.seed)
        assert record["recipe"]["learning_rate"] == (0 if "untrained" in record["name"] else 0.1 if fit.seed else 0.5)
    by_name = {record["name"].removeprefix(str(tasks / "digits.npz")): record for record in records}
    assert [by_name[name]["steps"] for name in NAMES] == [20, 20, 10, 1, 20]
    assert by_name[NAMES[1]]["model"]["hidden"] == [6, 5] and len(by_name[NAMES[1]]["classes"]) == 2
    assert [card.parameters for card in cards] == [332, 36 * 6 + 6 + 35 + 12, 332, 332, 332]


def test_the_untrained_is_the_draw_of_its_seed(zoo_run):
    [card] = [card for card in sources.read_cards(str(zoo_run)) if "untrained" in card.name]
    source = sources.load(sources.settings_of({}, card.place))
    streams = plan.source_streams(Settings.from_flags(), 0)
    drawn = sources.models.init(source.model, sources.jax.random.key(streams.head), (6, 6, 1))
    np.testing.assert_array_equal(source.params["hidden_0"]["kernel"], drawn["hidden_0"]["kernel"])


def test_any_of_them_is_a_source_with_its_own_model_and_all_at_once_are_none(zoo_run):
    for card in sources.read_cards(str(zoo_run)):
        source = sources.load(sources.settings_of({}, card.place))
        [fit] = [each for each in results(zoo_run) if str(zoo_run / each.checkpoint) == card.place]
        np.testing.assert_array_equal(source.params["head"]["kernel"], parameters(zoo_run, fit)["head/kernel"])
    with pytest.raises(InputError, match="holds several sources: name one of 'checkpoints/"):
        sources.settings_of({}, str(zoo_run))


def test_run_again_it_trains_nothing(zoo_run, tasks, monkeypatch):
    before = snapshot(zoo_run)
    monkeypatch.setattr("experiments.runs.fit.train_groups", lambda *arguments: pytest.fail("it trained again"))
    zoo.main(line(tasks, zoo_run, *NAMES))
    assert snapshot(zoo_run) == before


def test_a_dry_run_lists_them(tasks, tmp_path, capsys):
    zoo.main([*line(tasks, tmp_path / "w", *NAMES), "--dry_run"])
    assert "5 sources" in capsys.readouterr().out and not (tmp_path / "w").exists()


BAD = {
    "no name": ((), {}, "--zoo names nothing"),
    "one twice": (("", ""), {}, "twice: give each once"),
    "no number": ((":steps=ten",), {}, "--source_steps"),
    "no steps": ((":steps=0",), {}, "--source_steps=0: it must be at least 1"),
    "no change of data": ((":colour=red",), {}, "colour"),
    "several seeds": (("",), {"seeds": "0,1"}, "has 2 seeds: give one"),
    "a source beside": (("",), {"source": "mnist_10k"}, "leave out --source"),
    "an absent class": ((":labels=0-9",), {}, "names no class by '0-9'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, tasks, tmp_path):
    names, change, message = BAD[case]
    with pytest.raises(InputError) as refused:
        zoo.main(line(tasks, tmp_path / "w", *names, **change))
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "w").exists()


def test_bad_cards_are_refused(zoo_run, tmp_path):
    (tmp_path / "cards").mkdir()
    with pytest.raises(InputError, match="holds no card"):
        sources.read_cards(str(tmp_path))
    good = json.loads(next((zoo_run / "cards").iterdir()).read_text())
    for change, message in (
        ({"checkpoint": "../../elsewhere"}, "outside the run directory"),
        ({"accuracy": None}, "diverged"),
        ({"parameters": "many"}, "not the types"),
    ):
        (tmp_path / "cards" / "a.json").write_text(json.dumps(good | change))
        with pytest.raises(InputError, match=message):
            sources.read_cards(str(tmp_path))


def test_the_flagfile_holds_sixteen_sources():
    [names] = re.findall(r"^--zoo=(.*)$", (FLAGS / "zoo.flags").read_text(), re.M)
    assert len({zoo.read_entry(text, {}).settings for text in names.split(",")}) == 16
