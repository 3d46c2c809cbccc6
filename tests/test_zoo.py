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
    given = {
        **{"zoo": ",".join(f"{task}{name}" for name in names), "hidden": 8, "steps": 20, "batch_size": 20},
        **{"learning_rate": 0.5, "seeds": 0, "workdir": folder},
    } | change
    return ["zoo", *(f"--{name}={value}" for name, value in given.items() if value is not None)]


NAMES = ("", ":labels=0-1:hidden=6+5", ":shuffle_labels=1:steps=10", ":untrained", ":seed=1:learning_rate=0.1")


@pytest.fixture(scope="module")
def made(tasks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo") / "w"
    zoo.main(line(tasks, folder, *NAMES))
    return folder


@pytest.mark.slow
def test_each_source_is_trained_as_its_name_says_and_has_a_card(made, tasks):
    found, lines = sources.read_cards(str(made)), {each.checkpoint: each for each in results(made)}
    assert [card.name.removeprefix(str(tasks / "digits.npz")) for card in found] == list(NAMES)
    assert [card.trivial for card in found] == [False, False, True, True, False]
    told = [json.loads(file.read_text()) for file in (made / "cards").iterdir()]
    for one in told:
        own = lines[one["checkpoint"]]
        assert (one["accuracy"], one["steps"], one["seed"]) == (own.test_accuracy, own.steps, own.seed)
        assert one["recipe"]["learning_rate"] == (0 if "untrained" in one["name"] else 0.1 if own.seed else 0.5)
    by_name = {one["name"].removeprefix(str(tasks / "digits.npz")): one for one in told}
    assert [by_name[name]["steps"] for name in NAMES] == [20, 20, 10, 1, 20]
    assert by_name[NAMES[1]]["model"]["hidden"] == [6, 5] and len(by_name[NAMES[1]]["classes"]) == 2
    assert [card.parameters for card in found] == [332, 36 * 6 + 6 + 35 + 12, 332, 332, 332]


def test_the_untrained_is_the_draw_of_its_seed(made):
    [card] = [card for card in sources.read_cards(str(made)) if "untrained" in card.name]
    one = sources.load(sources.settings_of({}, card.place))
    own = plan.source_streams(Settings.from_flags(), 0)
    drawn = sources.models.init(one.model, sources.jax.random.key(own.head), (6, 6, 1))
    np.testing.assert_array_equal(one.params["hidden_0"]["kernel"], drawn["hidden_0"]["kernel"])


def test_any_of_them_is_a_source_with_its_own_model_and_all_at_once_are_none(made):
    for card in sources.read_cards(str(made)):
        one = sources.load(sources.settings_of({}, card.place))
        [own] = [each for each in results(made) if str(made / each.checkpoint) == card.place]
        np.testing.assert_array_equal(one.params["head"]["kernel"], parameters(made, own)["head/kernel"])
    with pytest.raises(InputError, match="holds several sources: name one of 'checkpoints/"):
        sources.settings_of({}, str(made))


def test_run_again_it_trains_nothing(made, tasks, monkeypatch):
    before = snapshot(made)
    monkeypatch.setattr("experiments.runs.fit.train_groups", lambda *given: pytest.fail("it trained again"))
    zoo.main(line(tasks, made, *NAMES))
    assert snapshot(made) == before


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


def test_bad_cards_are_refused(made, tmp_path):
    (tmp_path / "cards").mkdir()
    with pytest.raises(InputError, match="holds no card"):
        sources.read_cards(str(tmp_path))
    good = json.loads(next((made / "cards").iterdir()).read_text())
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
