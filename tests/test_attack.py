"""No reader lets a file or a name escape as a traceback, and none hangs; attack.py has the attacks and a larger run."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import attack
import flips
import numpy as np
import pytest
from test_programs import arguments, results

from experiments import report, transfer
from experiments.runs import directory, fields, looks, predictions, process, sources
from experiments.runs.settings import Settings, parse_flags
from tljax import data, switches
from tljax.study.results import from_json
from tljax.types import InputError

ROOT = Path(__file__).parent.parent
PLAIN = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}

pytestmark = pytest.mark.usefixtures("no_pictures")


def sums(grounds, count: int, patience: float = 10) -> Counter:
    """What came of attacks, all together."""
    outcomes: Counter = Counter()
    process._quieten_orbax()
    for place, attacks in grounds:
        restore = flips.restorer(place)
        with flips.once_loaded():
            for each in attacks:
                outcomes += attack.attacked(each, count, restore, patience).outcomes
    return outcomes


@pytest.mark.slow
@pytest.mark.parametrize("attacks_of", [attack.of_data, attack.of_weights, attack.of_plugins])
def test_data_weights_and_code_are_read_or_refused_in_one_line(attacks_of, tasks, tmp_path, monkeypatch):
    """A sample; the rest, and run directories of each kind, is slow."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    outcomes = sums(attacks_of(tasks, tmp_path), 6)
    assert not outcomes["escaped"] and min(outcomes["read"], outcomes["refused"]) > 0


@pytest.mark.slow
def test_every_reader_reads_or_refuses_in_one_line(tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    outcomes = sums(attack.of_programs(tasks, tmp_path), 6, 0.3)
    assert not outcomes["escaped"] and sum(outcomes.values()) > 250


def judged(folder: Path, labels, **change) -> None:
    """Leave a study of three fits, with its looks."""
    rows = [
        {
            **{"name": f"{name}{seed}", "key": f"{name}{seed}", "source": None, "target": "t", "strategy": name},
            **{"options": {}, "seed": seed, "train_examples": 10, "steps": 5, "seconds": 1.5, "diverged": False},
            **{"test_accuracy": 0.5, "checkpoint": "checkpoints/a", "predictions": f"predictions/{name}{seed}.npz"},
            **{"predictions_sha256": ""},
        }
        for name, seed in (("scratch", 0), ("scratch", 1), ("full", 0))
    ]
    (folder / "report.html").write_text("")
    fits = [from_json(row) for row in rows]
    part = predictions.Predictions(fits, {fit.name: labels for fit in fits}, {"t": labels})
    predictions.count_look(folder, predictions.right([part]))
    predictions.write_study(folder, [part], ["a note"], {"against": "scratch"}, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda record: record.update(parts=5), r"parts is 5, not a list"),
        (lambda record: record.pop("notes"), r"notes is not there"),
        (
            lambda record: record["parts"][0]["rows"][2].update(seed="x"),
            r'parts\[0\].rows\[2\].seed is "x", not a whole',
        ),
        (
            lambda record: record["parts"][0]["rows"][0].update(diverged=0),
            r"rows\[0\].diverged is 0, not true or false",
        ),
        (lambda record: record["parts"][0].update(longer=None), r"longer is null, not true or false"),
        (lambda record: record.update(judging=[1]), r"judging is a list, not"),
        (
            lambda record: record["parts"][0]["rows"][1].update(confusion=[[1, 2], [3]]),
            r"rows\[1\].confusion has not as",
        ),
        (lambda record: record["parts"][0]["rows"][1].update(leaves=[["a", 1]]), r"rows\[1\].leaves are not a path"),
        (lambda record: record.update(looks=1e30), r"looks is 1e\+30, not a whole number"),
    ],
)
def test_a_study_of_other_types_under_a_right_sum_is_refused_with_its_field(change, words, tmp_path):
    judged(tmp_path, np.arange(6) % 3)
    record = directory.read_record(tmp_path / "study.json")
    change(record)
    directory.write_record(tmp_path / "study.json", record)
    with pytest.raises(InputError, match=rf"study.json': .*{words}.*: restore it"):
        predictions.read_study(tmp_path)


@pytest.mark.parametrize("record", [{}, {"looks": None}, {"looks": [3]}, {"looks": {"x": 1}}, {"looks": [[], "x"]}])
def test_looks_of_other_types_under_a_right_sum_are_refused(record, tmp_path):
    judged(tmp_path, np.arange(6) % 3)
    directory.write_record(tmp_path / "looks.json", record)
    with pytest.raises(InputError, match=r"looks.json': looks.* (is|not)"):
        predictions.count_look(tmp_path, {})


def test_a_table_of_fits_that_is_empty_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("")
    with pytest.raises(InputError, match="has no row"):
        report.read_fits(tmp_path / "rows.csv", "")


def test_looks_of_the_user_of_other_types_are_refused(tmp_path):
    seen = looks.JudgedFits("0" * 16, frozenset("a"), frozenset("b"))
    judging = report.Judging()
    assert not looks.write([seen], judging, 1, (tmp_path,))
    [file] = tmp_path.glob("*/*.json")
    record = directory.read_record(file)
    for name, other in (("look", "x"), ("fits", [1]), ("judging", {}), ("judging", None), ("base_predictions", {})):
        directory.write_record(file, {**record, name: other})
        with pytest.raises(InputError, match=f"{name}.* (is|not)"):
            looks.count([seen], judging, (tmp_path,))


def test_a_number_in_a_record_is_one_that_arrays_can_hold():
    form = {"a": [int], "b?": [float]}
    assert not fields.fault({"a": [2**62]}, form) and not fields.fault({"a": [], "b": [1, 2.5]}, form)
    assert fields.fault({"a": [1, 2**63]}, form) and fields.fault({"a": [True]}, form)
    assert not fields.fault({"a": None}, {"a": ([int], None)}) and fields.fault({"a": 1}, {"a": ([int], None)})
    assert fields.fault({"a": [], "b": [False]}, form) and fields.fault({"a": [], "b": None}, form)


def test_kept_data_whose_note_is_of_other_types_is_decoded_again(tasks, tmp_path):
    name = str(tasks / "clothes.npz")
    first = data.load(name, data_dir=tmp_path)
    [note] = tmp_path.glob("tljax/*/task.json")
    good = json.loads(note.read_text())
    for field, other in (("findings", 3), ("classes", [1]), ("arrays", {}), ("sources", []), ("fingerprint", None)):
        note.write_bytes(attack.NOTE.write({**good, field: other}))
        messages = []
        again = data.load(name, data_dir=tmp_path, say=messages.append)
        assert again.fingerprint == first.fingerprint and len(messages) == 1
        assert json.loads(note.read_text()) == good


@pytest.mark.slow
@pytest.mark.parametrize("code", ["os.close(1)", "os.closerange(0, 3)"])
def test_a_strategy_that_closes_a_descriptor_ends_as_others_do(code, tasks, tmp_path):
    opened = f"out = os.open({str(tmp_path / 'out')!r}, os.O_CREAT | os.O_WRONLY)"
    lines = [
        "import os",
        "def strategy(params, context):",
        *(f"    {line}" for line in (opened, code, "os.close(out)")),
    ]
    (tmp_path / "s.py").write_text("\n".join([*lines, "    return context.fresh", ""]))
    there = [os.fstat(number) for number in (0, 1, 2)]
    argv = arguments(tasks, tmp_path / "w", strategies=(f"{tmp_path}/s.py:strategy",), seeds=(0,), epochs=1)
    transfer.run(**argv)
    assert all(map(os.path.samestat, there, (os.fstat(number) for number in (0, 1, 2))))
    assert len(results(tmp_path / "w")) == 3 and not (tmp_path / "w" / ".lock").read_text()


def test_descriptors_are_put_back_where_a_file_has_taken_their_number(tmp_path):
    there = os.fstat(1)
    with switches.guarded():
        os.close(1)
        with open(tmp_path / "next", "w") as file:
            assert file.fileno() == 1
        # It was closed with its file.
    assert os.path.samestat(there, os.fstat(1))


XLA = {
    "--xla_cpu_enable_fast_math=maybe": "interpret value maybe for flag xla_cpu_enable_fast_math",
    "/nowhere": 'Could not open file "/nowhere"',
    "--bogus": "Unknown flag in XLA_FLAGS: --bogus",
}
"""{text of XLA_FLAGS: what XLA says of it before it ends the process}."""
ASKED = """import os, sys
from experiments.runs import process
for text in sys.argv[1:]:
    os.environ["XLA_FLAGS"] = text
    try:
        process.refuse_unknown_xla_flags()
    except ValueError as error:
        print(error)
process.run_main(lambda argv: print("ran"))
"""


def test_flags_that_xla_does_not_take_are_said_before_it_ends_the_process():
    run = [sys.executable, "-c", ASKED, *XLA]
    done = subprocess.run(run, env=PLAIN, capture_output=True, text=True, cwd=ROOT, timeout=60)
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and len(lines) == len(XLA) and done.stderr == f"error: {lines[-1]}\n"
    for line, (text, words) in zip(lines, XLA.items(), strict=True):
        assert line.startswith(f"XLA_FLAGS={text} in the environment: ") and words in line


def test_flags_that_xla_takes_are_no_fault(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    process.refuse_unknown_xla_flags()


@pytest.mark.parametrize(("command", "least"), [("ulimit -v", 2**31), ("ulimit -d", 650e6)])
def test_a_limit_under_which_jax_does_not_start_is_one_line(command, least):
    run = ["sh", "-c", f"{command} {int(least) // 1024 - 4}; exec {sys.executable} -m experiments.check --help"]
    done = subprocess.run(run, env=PLAIN, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: this process may have ") and f"raise the limit ({command})" in done.stderr


def test_the_flags_of_a_run_give_its_names_again_that_are_no_utf8(tasks, tmp_path):
    place = tmp_path / attack.NOT_TEXT
    place.mkdir()
    (place / "t.npz").write_bytes((tasks / "clothes.npz").read_bytes())
    argv = arguments(tasks, tmp_path / "w", target=str(place / "t.npz"), strategies=("scratch",), seeds=(0,), epochs=1)
    settings = Settings.from_flags(**argv)
    with directory.opened(settings, "transfer"):
        pass
    again = parse_flags(["transfer", f"--flagfile={tmp_path / 'w' / 'flags.flags'}", f"--workdir={tmp_path / 'w'}"])
    assert again["target"] == argv["target"] and Settings.from_flags(**again) == settings
    copied = place / "again.flags"
    copied.write_bytes((tmp_path / "w" / "flags.flags").read_bytes())
    assert parse_flags(["transfer", f"--flagfile={copied}"])["target"] == argv["target"]


def test_a_line_of_any_length_is_shown_with_its_beginning_and_its_end(capsys):
    def main(argv) -> None:
        raise InputError(f"--seeds={'9' * 100_000} is too many: name fewer")

    with pytest.raises(SystemExit):
        process.run_main(main, ["x"])
    errors = capsys.readouterr().err
    assert errors.startswith("error: --seeds=999") and errors.endswith("name fewer\n") and len(errors) < 3100


@pytest.mark.parametrize("change", [{"hidden": 8}, {"hidden": ["x"]}, {"model": ["mlp"]}, {"activation": None}])
def test_a_card_that_says_other_types_of_its_model_is_refused(change, tasks, tmp_path):
    np.savez(tmp_path / "net.npz", **attack._flat())
    card = {"task": "digits", "classes": list("abcd"), "shape": [6, 6, 1], "model": {"model": "mlp", **change}}
    (tmp_path / "net.npz.json").write_text(json.dumps(card))
    with pytest.raises(InputError, match=rf"net.npz.json': model.{next(iter(change))}.* is .*, not "):
        attack._origin(tmp_path / "net.npz")
    assert fields.fault(card["model"], sources.MODEL)
