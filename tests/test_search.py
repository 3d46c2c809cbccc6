"""Searches: fair, resumable, shared by processes, and blind to the test set."""

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_programs import command

from experiments import pretrain, search
from experiments.runs import command_line, directory, fit, plan, search_flags, sources, trials
from experiments.runs.settings import FLAGS, Settings
from tljax import train
from tljax.study import search as studies
from tljax.study import space
from tljax.types import InputError

pytestmark = pytest.mark.usefixtures("no_pictures")

ROOT = Path(__file__).parent.parent
SPACE = ["--space=learning_rate:log:1e-3:1", "--space=penalty.l2.weight:log:1e-6:1e-2"]


def line(tasks, folder, *more, **flags):
    values = {"strategies": ("head_only",), "penalty": "l2:weight=1e-4", "seeds": (0,), "source": None} | flags
    if values["source"] is None and values["strategies"] == ("head_only",):
        values["source"] = str(tasks / "digits.npz")
    return ["search", *command(tasks, folder, **values), *SPACE, *more]


def study_of(folder, name="search/head_only/all"):
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return optuna.load_study(study_name=name, storage=JournalStorage(JournalFileBackend(str(folder / "study.journal"))))


def test_a_search_finds_trains_anew_and_goes_on_where_it_was(tasks, tmp_path, capsys):
    search.main(line(tasks, tmp_path, "--trials=2", "--group=2"))
    first = capsys.readouterr().out
    assert "tuned against tuned" in first and "validation accuracy" in first
    study = study_of(tmp_path / "w")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 2
    before = {trial.number: trial.params for trial in study.trials}
    search.main(line(tasks, tmp_path, "--trials=2", "--group=2"))
    assert {trial.number: trial.params for trial in study_of(tmp_path / "w").trials} == before
    assert capsys.readouterr().out.splitlines()[-3:] == first.splitlines()[-3:]


def test_trials_share_a_device_in_the_way_of_the_fits_of_a_table(monkeypatch):
    task = SimpleNamespace(train=SimpleNamespace(targets=[]))
    on_device = fit.DeviceData(task, None, None, None, None, 0, train.Execution(many="auto"), {})
    experiment = SimpleNamespace(settings=SimpleNamespace(recipe=None))
    group = [trials.Member(0, 0, SimpleNamespace(trial=SimpleNamespace(rates=[0.1])))]
    ways = []
    monkeypatch.setattr(fit, "with_recipe", lambda on_device, recipe: on_device)
    monkeypatch.setattr(
        fit, "drive", lambda on_device, fits, should_stop: ways.append(on_device.execution.many) or iter(())
    )
    for way in ("auto", "map", "vmap"):
        monkeypatch.setattr(plan, "many_of", lambda experiment, way=way: way)
        trials._train(SimpleNamespace(on_device=on_device), group, experiment, {}, set(), None)
    assert ways == ["auto", "map", "vmap"]


def test_the_test_set_cannot_be_searched_on(tasks, tmp_path, monkeypatch):
    """Trials are judged on a task that has no test example; with other test labels they are judged alike."""
    seen = []
    judge = trials.judge

    def watched(task, *arguments):
        seen.append(task.on_device.task)
        assert len(task.on_device.task.test.targets) == len(task.on_device.task.test.arrays) == 0
        train = np.asarray(task.on_device.task.train.arrays)
        np.testing.assert_array_equal(np.asarray(task.on_device.test.inputs[0])[: len(task.rows)], train[task.rows])
        return judge(task, *arguments)

    monkeypatch.setattr(trials, "judge", watched)
    search.main(line(tasks, tmp_path, "--trials=2", "--group=2"))
    assert seen


@pytest.mark.slow
def test_trials_together_are_judged_as_trials_alone(tasks, tmp_path, monkeypatch):
    judge, alone = trials.judge, []

    def both(task, experiments, trained, report):
        for i in range(len(experiments)):
            each = experiments[i : i + 1], trained[i : i + 1]
            alone.extend(judge(task._replace(shared={}), *each, lambda *arguments: False))
        return judge(task, experiments, trained, report)

    monkeypatch.setattr(trials, "judge", both)
    search.main(line(tasks, tmp_path, "--trials=3", "--group=3", "--search_seeds=2"))
    together = [trial.value for trial in study_of(tmp_path / "w").trials]
    np.testing.assert_allclose(together, [each.score for each in alone], atol=0.05)


def test_search_and_evaluation_share_no_seed(tasks, tmp_path, monkeypatch):
    seen = {}
    complete = fit.complete
    monkeypatch.setattr(
        fit, "complete", lambda experiment, **more: seen.update(final=experiment) or complete(experiment, **more)
    )
    search.main(line(tasks, tmp_path, "--trials=1", "--group=1"))
    assert seen["final"].settings.seeds == (0,) and seen["final"].settings.recipe.validation == 0
    assert search_flags.FIRST_SEED not in seen["final"].settings.seeds


BAD = [
    (["--space=lerning_rate:log:1e-3:1"], "no flag that can be searched"),
    (["--space=seeds:int:1:3"], "no flag that can be searched"),
    (["--space=batch_size:in:32,many"], "batch_size"),
    (["--space=momentum:between:1:0"], "1 is not below 0"),
    (["--space=momentum:log:0:1"], "a logarithm needs bounds above 0"),
    (["--space=activation:in:"], "give two values or more"),
    (["--space=activation:in:relu,rleu"], "rleu"),
    (["--space=momentum:between:0"], "write momentum:between:LOW:HIGH"),
    (["--space=strategy.last_k.k:int:1:3"], "'last_k' is not in `strategies=`"),
    (["--space=learning_rate:log:1e-2:1"], "names 'learning_rate' twice"),
    (["--trials=0"], "--trials=0: give 1 or more"),
    (["--sampler=TEP"], "nearest: 'TPE'"),
    (["--pruner=Medain"], "nearest: 'Median'"),
    (["--storage=postgresql://nobody@127.0.0.1:1/none"], "cannot be reached"),
    (["--head_seed=3"], "--head_seed is pinned"),
    (["--seeds=1000000"], "are the search's own"),
    (["--strategies=scratch,full"], "give --per_strategy"),
    (["--distributed"], "give all of them one --storage and each its --workdir"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("more", "message"), BAD, ids=[" ".join(more) for more, _ in BAD])
def test_bad_input_is_one_line_and_writes_no_study(more, message, tasks, tmp_path):
    with pytest.raises(InputError) as refused:
        search.main(line(tasks, tmp_path, *more))
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not list(tmp_path.glob("w/final*"))


@pytest.fixture(scope="module")
def pretrained(tasks, tmp_path_factory):
    """A run directory with sources of the seeds 0, 1 and 2."""
    folder = tmp_path_factory.mktemp("sources") / "pretrained"
    flags = {"source": str(tasks / "digits.npz"), "hidden": (8,), "seeds": (0, 1, 2), "steps": 4, "points": 1}
    pretrain.run(**flags, workdir=str(folder))
    return folder


def of_checkpoint(tasks, folder, place, *more, seeds="0"):
    """A search from own weights, in four steps a fit."""
    words = [f"--source_checkpoint={place}", "--hidden=8", "--steps=4", "--points=1", f"--seeds={seeds}"]
    task = [f"--target={tasks / 'clothes.npz'}", "--strategies=head_only", f"--workdir={folder / 'w'}"]
    return ["search", *words, *task, SPACE[0], "--trials=1", "--group=1", *more]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "note"),
    [
        ("0", "trials start from the sources of the seeds 1, 2 of the checkpoint; no final fit starts from them"),
        ("0,1,2", "the sources of the seeds 0, 1 of the checkpoint; the final fits start from them too"),
    ],
)
def test_trials_start_from_the_sources_that_a_run_has(seeds, note, pretrained, tasks, tmp_path, capsys):
    """No source was trained under the seeds of a search: those that there are stand in, said in one line."""
    search.main(of_checkpoint(tasks, tmp_path, pretrained, "--search_seeds=2", seeds=seeds))
    assert [line for line in capsys.readouterr().out.splitlines() if note in line]


def test_the_source_of_a_trial_is_that_of_the_seed_it_is_said_to_start_from(pretrained):
    flags = {"source_checkpoint": str(pretrained), "hidden": (8,), "seeds": (2,)}
    identities = {
        seed: sources.from_checkpoint(Settings.from_flags(**{**flags, "seeds": (seed,)})).identity[seed]
        for seed in range(3)
    }
    trial_seeds = (1_000_000, 1_000_001, 1_000_002)
    stand_ins = sources.stand_ins(Settings.from_flags(**flags), trial_seeds)
    assert stand_ins == {1_000_000: 0, 1_000_001: 1, 1_000_002: 0}
    of_trials = sources.from_checkpoint(Settings.from_flags(**{**flags, "seeds": trial_seeds}), stand_ins).identity
    assert (
        of_trials == {seed: identities[stand_in] for seed, stand_in in stand_ins.items()}
        and len(set(identities.values())) == 3
    )


def test_one_checkpoint_of_several_seeds_serves_a_search_too(pretrained, tasks, tmp_path, capsys):
    [checkpoint] = (pretrained / "checkpoints").iterdir()
    search.main(of_checkpoint(tasks, tmp_path, checkpoint, "--dry_run"))
    assert sources.stand_ins(Settings.from_flags(source_checkpoint=str(checkpoint)), (1_000_000,)) == {1_000_000: 1}


@pytest.mark.slow
def test_a_source_that_diverged_stands_in_for_none(tasks, tmp_path):
    flags = {"source": str(tasks / "digits.npz"), "hidden": (8,), "seeds": (0, 1), "steps": 4, "points": 1}
    pretrain.run(**flags, workdir=str(tmp_path / "sound"))
    wild = {"source_learning_rate": 1e30, "source_loss": "l2_loss"}
    pretrain.run(**{**flags, **wild}, workdir=str(tmp_path / "wild"))
    both = [directory.results(tmp_path / name) for name in ("sound", "wild")]
    assert [line.diverged for line in both[1]] == [True, True]
    mixed = tmp_path / "mixed"
    for name in ("sound", "wild"):
        shutil.copytree(tmp_path / name / "checkpoints", mixed / "checkpoints", dirs_exist_ok=True)
    directory.add(mixed, [both[0][0], both[1][1]])
    settings = Settings.from_flags(source_checkpoint=str(mixed), seeds=(0,), hidden=(8,))
    assert sources.stand_ins(settings, (1_000_000,)) == {1_000_000: 0}


def test_a_final_fit_without_a_source_is_refused_before_any_trial(pretrained, tasks, tmp_path):
    with pytest.raises(InputError, match=r"has sources for the seeds \[0, 1, 2\], not for \[5\]: change --seeds"):
        search.main(of_checkpoint(tasks, tmp_path, pretrained, seeds="0,5"))
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_the_flags_of_a_search_give_it_again(pretrained, tasks, tmp_path, capsys):
    """flags.flags holds the search's own flags too, every --space among them, and the seeds of the final fits."""
    more = ["--space=momentum:between:0:0.9", "--sampler=Random", "--pruner=Median", "--trials=2"]
    search.main(of_checkpoint(tasks, tmp_path, pretrained, *more, seeds="0,2"))
    file = tmp_path / "w" / "flags.flags"
    written = command_line.parse(["", f"--flagfile={file}"], FLAGS | command_line.kinds(search.SearchFlags))
    assert written["space"] == (SPACE[0].removeprefix("--space="), "momentum:between:0:0.9")
    assert (written["trials"], written["sampler"], written["seeds"]) == (2, "Random", (0, 2))
    again = tmp_path / "again"
    search.main(["search", f"--flagfile={file}", f"--workdir={again}"])
    assert (again / "flags.flags").read_bytes() == file.read_bytes()
    params = [[trial.params for trial in study_of(folder).trials] for folder in (tmp_path / "w", again)]
    assert params[0] == params[1] and len(params[0]) == 2
    lines = [
        {line.key: line.test_accuracy for line in directory.results(folder / "final" / "head_only-all")}
        for folder in (tmp_path / "w", again)
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 2


def test_a_search_directory_of_an_older_tljax_goes_on(pretrained, tasks, tmp_path, capsys):
    """It held the settings of the trials and none of the search's own flags."""
    values, options = command_line.read(of_checkpoint(tasks, tmp_path, pretrained), search.SearchFlags)
    trials_of = search._trial_flags(values, Settings.from_flags(**values), options)
    with directory.opened(Settings.from_flags(**trials_of), "search") as folder:
        pass
    assert "--space" not in (folder / "flags.flags").read_text()
    with pytest.raises(InputError, match="holds another experiment"):
        search.main(of_checkpoint(tasks, tmp_path, pretrained, "--batch_size=7"))
    search.main(of_checkpoint(tasks, tmp_path, pretrained))
    text = directory.flags_text(folder / "flags.flags")
    assert f"{SPACE[0]}\n" in text and "--seeds=0\n" in text and "--validation=0.0\n" in text


def test_a_search_grows_by_trials_and_seeds(pretrained, tasks, tmp_path, capsys):
    search.main(of_checkpoint(tasks, tmp_path, pretrained))
    with pytest.raises(InputError, match="holds another experiment"):
        search.main(of_checkpoint(tasks, tmp_path, pretrained, "--steps=5"))
    search.main(of_checkpoint(tasks, tmp_path, pretrained, "--trials=2", seeds="0,1"))
    text = directory.flags_text(tmp_path / "w" / "flags.flags")
    assert "--trials=2\n" in text and "--seeds=0,1\n" in text and len(study_of(tmp_path / "w").trials) == 2


def test_a_search_that_grows_to_another_winner_trains_it_beside_the_former(
    pretrained, tasks, tmp_path, capsys, monkeypatch
):
    """The former winner's fits stay as they are, and the new one's are found again."""
    argv = of_checkpoint(tasks, tmp_path, pretrained, "--sampler=Random")
    search.main(argv)
    file = tmp_path / "w" / "final" / "head_only-all" / "results.jsonl"
    former = file.read_bytes()
    monkeypatch.setattr(studies, "best", lambda study: study.trials[-1])
    capsys.readouterr()
    for _ in range(2):
        search.main([*argv, "--trials=2"])
    first, second = sorted(place.name for place in (tmp_path / "w" / "final").iterdir())
    assert first == "head_only-all" and second.startswith("head_only-all-") and file.read_bytes() == former
    assert f"the fits of the new one are in final/{second}" in capsys.readouterr().out
    rate = study_of(tmp_path / "w").trials[-1].params["learning_rate"]
    for place in (tmp_path / "w" / "best.flags", tmp_path / "w" / "final" / second / "flags.flags"):
        assert f"--learning_rate={rate}\n" in place.read_text()


@pytest.mark.parametrize("range_test_first", [True, False])
def test_a_range_test_and_a_search_share_a_directory(range_test_first, pretrained, tasks, tmp_path, capsys):
    """Its flags give the range test again, and once there is a search, the search."""
    ways = [[], ["--lr_range_test", "--steps=12", "--lr_low=0.001"]]
    for more in ways[::-1] if range_test_first else ways:
        search.main([*of_checkpoint(tasks, tmp_path, pretrained, "--steps=12", *more)])
        if range_test_first and more:
            assert "--lr_range_test=true\n--lr_low=0.001\n" in (tmp_path / "w" / "flags.flags").read_text()
            again = [f"--flagfile={tmp_path / 'w' / 'flags.flags'}", f"--workdir={tmp_path / 'again'}"]
            search.main(["search", *again])
            assert (tmp_path / "again" / "lr_range_test.html").is_file()
    assert "--lr_range_test" not in (tmp_path / "w" / "flags.flags").read_text()


def test_a_study_of_another_space_is_refused_and_unharmed(tasks, tmp_path):
    search.main(line(tasks, tmp_path, "--trials=1", "--group=1"))
    journal = (tmp_path / "w" / "study.journal").read_bytes()
    with pytest.raises(InputError, match="is of another search"):
        search.main(line(tasks, tmp_path, "--trials=1", "--space=momentum:between:0:0.9"))
    assert [trial.state.name for trial in study_of(tmp_path / "w").trials] == ["COMPLETE"]
    assert (tmp_path / "w" / "study.journal").read_bytes().startswith(journal)


@pytest.mark.slow
def test_all_diverged_says_so(tasks, tmp_path):
    argv = [part for part in line(tasks, tmp_path, "--trials=2") if not part.startswith("--space=learning")]
    with pytest.raises(InputError, match=r"all 2 trials of study .* diverged"):
        search.main([*argv, "--space=learning_rate:log:1e28:1e30", "--loss=l2_loss", "--source_learning_rate=0.01"])


def test_a_trial_that_two_processes_try_again_is_tried_once():
    """Each finds the owner dead before the other has said so; the second of the two must not be waited for."""
    ranges = (space.parse("momentum:between:0:1"),)
    opened = studies.opened("twice", None, "Random", "Nop", 0, 60.0, {})
    first, second = studies.ask(opened, ranges, 2, 2)
    studies.give_back(opened.study, first)
    opened.study.enqueue_trial(first.handle.params, user_attrs={"again": first.handle.number})
    studies.tell(opened.study, second, 0.5)
    again = studies.ask(opened, ranges, 4, 2)
    assert [retried.chosen for retried in again] == [first.chosen]
    studies.tell(opened.study, again[0], 0.5)
    assert studies.ask(opened, ranges, 4, 2) == [] and studies.under_way(opened.study) == 0
    assert [trial.state.name for trial in opened.study.trials] == ["FAIL", "COMPLETE", "COMPLETE", "FAIL"]


@pytest.mark.slow
def test_processes_that_make_a_database_at_once_all_come_to_it(tmp_path):
    make = (
        "import sys; from tljax.study import search\n"
        "print(search.opened('one', sys.argv[1], 'Random', 'Nop', 0, 60.0, {}).study.study_name)"
    )
    call = [sys.executable, "-c", make, f"sqlite:///{tmp_path}/study.db"]
    running = [subprocess.Popen(call, stdout=subprocess.PIPE, cwd=ROOT, text=True) for _ in range(6)]
    assert [process.communicate()[0].strip() for process in running] == ["one"] * 6


def test_a_trial_that_another_process_has_told_is_not_told_again():
    opened = studies.opened("told", None, "Random", "Median", 0, 60.0, {})
    [running] = studies.ask(opened, (space.parse("momentum:between:0:1"),), 1, 1)
    opened.study.tell(running.handle.number, 0.7)
    assert studies.report(running, 0.1, 1) is False
    studies.tell(opened.study, running, 0.1)
    studies.give_back(opened.study, running)
    assert [(trial.state.name, trial.value) for trial in opened.study.trials] == [("COMPLETE", 0.7)]


def test_an_optimum_at_an_edge_is_said_to_be_there():
    dimension = space.parse("learning_rate:log:1e-3:1")
    assert [space.at_edge(dimension, value) for value in (1e-3, 0.03, 1.0)] == ["lowest", "", "highest"]


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["{}/study.journal", "sqlite:///{}/study.db"])
def test_four_processes_share_a_study_and_two_are_killed(storage, tasks, tmp_path):
    """No trial is lost, doubled or half told; what the killed had under way is tried again."""
    import optuna

    where = storage.format(tmp_path)

    def started(name):
        flags = line(
            tasks, tmp_path, "--trials=24", "--group=2", f"--storage={where}", "--lease=8", workdir=tmp_path / name
        )
        call = [sys.executable, "-m", "experiments.search", *flags[1:]]
        with open(tmp_path / f"{name}.log", "w") as log:
            return subprocess.Popen(call, stdout=log, stderr=log, cwd=ROOT)

    running = [started(f"w{i}") for i in range(4)]
    for victim in (0, 1):
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            text = (tmp_path / f"w{victim}.log").read_text()
            if "hidden_0 is frozen" in text:
                break
            time.sleep(0.2)
        running[victim].send_signal(signal.SIGKILL)
        running[victim].wait()
    assert [process.wait(timeout=400) for process in running[2:]] == [0, 0], (tmp_path / "w2.log").read_text()
    store = studies._storage(where, print)
    study = optuna.load_study(study_name="search/head_only/all", storage=store)
    states = [trial.state.name for trial in study.trials]
    assert states.count("COMPLETE") == 24 and set(states) <= {"COMPLETE", "FAIL"}
    done = [tuple(trial.params.values()) for trial in study.trials if trial.state.name == "COMPLETE"]
    failed = [tuple(trial.params.values()) for trial in study.trials if trial.state.name == "FAIL" and trial.params]
    assert len(set(done)) == 24 and set(failed) <= set(done)
    tables = [re.findall(r"learning_rate=[^;]*", (tmp_path / f"w{i}.log").read_text()) for i in (2, 3)]
    assert tables[0] and tables[0][0] == tables[1][0]
