"""What stands in somebody's file names, exceptions and settings does nothing to a terminal, a log or the arithmetic."""

import io
import os
import shutil
import subprocess
import sys
import time
import unicodedata
import warnings
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from test_compare import theirs
from test_hangs import last_word
from test_programs import arguments, command

from experiments import report, transfer
from experiments.runs import console, process
from experiments.runs.settings import Settings, parse_flags
from tljax import checkpoint, files, masks, npz, optimizers, penalties, schedules, switches
from tljax.types import InputError

ROOT = Path(__file__).parent.parent
STEERING = "\x1b[31mred\x1b]0;title\x07\x9b2J\x7f\r\u202edesrever\u2066\u2028"
"""Escape sequences of 7 and of 8 bits, a bell, a line that is overwritten, and text that runs the other way."""


def steers(text: str) -> list[str]:
    """Characters of a text that a terminal does not show but obeys, by Unicode's own table."""
    obeyed = ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")
    return [
        c for c in text
        if c not in "\n\t" and (unicodedata.category(c) in ("Cc", "Zl", "Zp") or unicodedata.bidirectional(c) in obeyed)
    ]  # fmt: skip


def test_no_character_that_steers_a_terminal_is_visible_as_itself() -> None:
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    assert steers(everything) and not steers(process.visible(everything))
    plain = "caf\u00e9 \u4e2d\u6587 \u0627\u0644 \U0001f600\u200d\U0001f525\n\ta-b_c\udce9"
    assert process.visible(plain) == plain
    assert len({process.visible(c) for c in everything}) == len(everything)  # two names that differ look different


def test_what_a_program_prints_steers_no_terminal(capsys):
    def fails(argv):
        console.say(f"one {STEERING}")
        console.notes([f"two {STEERING}"])
        console.table(f"three {STEERING}", [f"four {STEERING}"], [[f"five {STEERING}"]])
        with console.progress(f"six {STEERING}", 1):
            pass
        raise InputError(f"seven {STEERING}")

    with pytest.raises(SystemExit):
        process.run_main(fails, ["program"])
    printed = capsys.readouterr()
    assert not steers(printed.out + printed.err) and printed.out.count("\\x1b[31mred") == 5
    assert printed.err.startswith("error: seven \\x1b[31mred")


@pytest.mark.parametrize("where", ["exception", "target", "lock"])
def test_control_characters_of_files_strategies_and_locks_are_shown(where, tasks, tmp_path, capsys):
    name = "a\x1b[31m\x85.npz" if where == "target" else "a.npz"
    (tmp_path / "w").mkdir()
    (tmp_path / "s.py").write_text(f"def strategy(params, context):\n    raise ValueError({STEERING!r})\n")
    change = {
        "exception": {"strategies": (f"{tmp_path}/s.py:strategy",)},
        "target": {"target": str(tmp_path / name)},
        "lock": {},
    }[where]
    if where == "lock":
        (tmp_path / "w" / ".lock").write_text("a\x1b[31m")
    assert "\\x1b[31m" in (line := last_word(transfer.main, capsys, ["transfer", *command(tasks, tmp_path, **change)]))
    assert not steers(line)


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_log_file_has_no_bar_and_no_colour_whatever_the_environment_says(name, monkeypatch, capsys):
    monkeypatch.setenv(name, "1")
    with console.progress("training", 3) as advance:
        advance(3)
    console.table("title", ["strategy", "labels"], [["full", "3"]], ["a note"])
    assert not steers("".join(capsys.readouterr()))


def test_a_folder_in_the_place_of_a_file_is_named_with_the_remedy(tasks, finished, tmp_path, capsys):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        files.replace(tmp_path / "report.html", b"page")
    assert error.value.filename == str(tmp_path / "report.html") and os.listdir(tmp_path) == ["report.html"]

    def fails(argv):
        raise error.value

    assert last_word(fails, capsys) == (
        f"error: Is a directory: '{tmp_path}/report.html'; move it away, and run the same command again\n"
    )


def test_what_other_versions_left_half_written_is_in_nobodys_way(tasks, tmp_path, no_pictures):
    (tmp_path / "w" / "flags.flags.partial").mkdir(parents=True)
    flags = arguments(tasks, tmp_path / "w", strategies=("full",), seeds=(0,), steps=2, epochs=None)
    transfer.run(**flags)
    for name in ("results.jsonl", "environment.json", "report.html"):
        (tmp_path / "w" / f"{name}.partial" / "more").mkdir(parents=True)
    transfer.run(**{**flags, "seeds": (0, 1)})
    assert (tmp_path / "w" / "report.html").is_file()


@pytest.mark.parametrize(
    "optimizer",
    [
        "sgd:momentum=1",
        "adam:b1=1",
        "adamw:b2=1.5",
        "adam:b2=-0.1",
        "rmsprop:decay=1",
        "adadelta:rho=1",
        "signum:beta=1",
    ],
)
def test_a_running_mean_that_nothing_enters_is_refused(optimizer):
    option = optimizer.partition(":")[2].partition("=")[0]
    with pytest.raises(InputError, match=f"{option}=.* at least 0 and below 1"):
        optimizers.spec(optimizer)


def test_a_momentum_is_below_1_as_its_help_says():
    with pytest.raises(InputError, match=r"momentum=1\.0: it must be at least 0 and below 1"):
        optimizers.spec("sgd", momentum=1.0)
    assert optimizers.spec("sgd", momentum=0.999)[1] == {"momentum": 0.999}
    for name in optimizers.names():  # what optax has as its defaults is let through
        assert optimizers.spec(name) == (optimizers.OptimizerSpec(name), {})
    assert optimizers.spec("optimistic_gradient_descent:beta=1.0")


@pytest.mark.parametrize("number", [1e300, 3.5e38, float("inf"), float("nan"), -1.0])
def test_numbers_that_float32_has_not_are_refused_before_jax_warns(number):
    refused = [
        lambda: optimizers.spec("sgd", weight_decay=number),
        lambda: optimizers.spec("sgd", clip=number),
        lambda: optimizers.spec("sgd", momentum=number),
        lambda: schedules.rates("constant", number, 0.0, 3),
        lambda: penalties.read(f"l2:weight={number}"),
        lambda: masks.lint({"w": np.ones(2, np.float32)}, {"w": number}),
        lambda: masks.lint({"w": np.ones(2, np.float32)}, {"w": np.array([1.0, number])}),
    ]
    if number > 1:
        refused.append(lambda: optimizers.spec(f"adam:eps={number}"))
    with warnings.catch_warnings(action="error"):
        for refuse in refused:
            with pytest.raises(InputError):
                refuse()


def test_an_npz_that_unpacks_to_more_than_the_memory_is_refused_unread(tmp_path, monkeypatch):
    file = tmp_path / "bomb.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_BZIP2) as archive, archive.open("x.npy", "w") as member:
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (30_000_000,)})
        member.write(head.getvalue())
        for _ in range(30):
            member.write(bytes(1_000_000))
    np.savez(tmp_path / "small.npz", y=np.arange(3))
    assert file.stat().st_size < 3000 and len(npz.read(file)["x"]) == 30_000_000
    monkeypatch.setattr(npz, "_free_memory", lambda: 20_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipExtFile, "read", lambda *_: pytest.fail("it is unpacked"))
        with pytest.raises(InputError, match=r"'.*bomb.npz' unpacks to 0.0 GB, and 0.0 GB of memory are free"):
            npz.read(file)
    assert npz.read(file, wanted=("labels",)) == {}  # what is not asked for is not unpacked
    assert npz.read(tmp_path / "small.npz")["y"].tolist() == [0, 1, 2]


def test_the_memory_that_is_free_is_that_of_the_system():
    free = npz._free_memory()
    assert free is None or 0 < free < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_an_error_of_an_npz_names_its_file_once(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError) as error:
        npz.read(tmp_path / "x.npz")
    assert str(error.value).count("x.npz") == 1


DAMAGED_CACHE = """
import sys, warnings, zlib
from pathlib import Path
import jax, jax.numpy as jnp
from experiments.runs import process
place = Path(sys.argv[1])
process._keep_compiled(str(place))
for _ in range(2): process._replace_damaged()
@jax.jit
def mine(x): return jnp.sin(x) @ x
@jax.jit
def other(x): return jnp.cos(x) @ x
def compiled():
    jax.clear_caches()
    with jax.log_compiles(False):
        print("result", float(mine(jnp.ones((3, 3))).sum()) + float(other(jnp.ones((3, 3))).sum()))
    return {f.name: f.read_bytes() for f in place.iterdir() if f.name.startswith(("jit_mine", "jit_other"))}
whole = compiled()
assert len(whole) == 2, whole.keys()
for damage in (lambda data: data[: len(data) // 2], lambda data: b"", lambda data: zlib.compress(b"nothing")):
    for name, data in whole.items():
        (place / name).write_bytes(damage(data))
    after = compiled()
    assert after.keys() == whole.keys() and all(zlib.decompress(data) for data in after.values())
    assert all(len(after[name]) > len(data) // 2 for name, data in whole.items())
    assert compiled() == after
"""


@pytest.mark.slow
def test_what_cannot_be_read_of_what_is_kept_compiled_is_replaced(tmp_path):
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    line = [sys.executable, "-c", DAMAGED_CACHE, str(tmp_path)]
    ended = subprocess.run(line, cwd=ROOT, env=plain, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0 and ended.stderr == "", ended.stderr
    results = [part for part in ended.stdout.splitlines() if part.startswith("result")]
    assert len(results) == 7 and len(set(results)) == 1
    for name in ("jit_mine", "jit_other"):
        assert ended.stdout.count(f"of what is kept compiled in '{tmp_path}', '{name}' cannot be read") == 1


def test_a_flagfile_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "t.npz").write_bytes(b"")
    (tmp_path / "inner.flags").write_text("\ufeff--steps=7\n", encoding="utf-8")
    for first in ("--target=t.npz", "# mine", "// mine", "", "--flagfile=inner.flags"):
        text = f"\ufeff{first}\n--seeds=3\n"
        if "flagfile" in first:
            text = text.replace("inner", f"{tmp_path}/inner")
        (tmp_path / "f.flags").write_text(text, encoding="utf-8")
        read = parse_flags(["x", f"--flagfile={tmp_path}/f.flags"])
        assert read["seeds"] == (3,)
        assert read.get("target") == (f"{tmp_path}/t.npz" if "target" in first else None)
        assert read.get("steps") == (7 if "flagfile" in first else None)


def test_a_report_of_runs_that_are_left_out_says_why_of_each(finished, tmp_path, capsys):
    runs = {name: tmp_path / name for name in ("predictions", "results", "checkpoints", "line", "none")}
    for name, run in runs.items():
        if name != "none":
            shutil.copytree(finished[0], run)
    next(iter((runs["predictions"] / "predictions").glob("*full*"))).write_bytes(b"PK")
    (runs["results"] / "results.jsonl").unlink()
    shutil.rmtree(runs["checkpoints"] / "checkpoints")
    (runs["line"] / "results.jsonl").write_text("[")
    argv = ["report", f"--runs={','.join(map(str, runs.values()))}", f"--output={tmp_path}/out"]
    line = last_word(report.main, capsys, argv)
    assert line.startswith("error: there is no fit to judge: ")
    for name, why in {
        "predictions": "are not as they were written",
        "results": "holds no fit",
        "checkpoints": "checkpoint or predictions are gone",
        "line": "line 1 is no JSON",
        "none": "holds no run that has ended",
    }.items():
        part = line.partition(f"{runs[name]} is left out: ")[2]
        assert why in part.partition(f"{tmp_path}/")[0] + part[:400], name
    assert not (tmp_path / "out").exists()


def test_a_report_says_which_fits_of_a_run_are_gone(finished, tmp_path, capsys, no_pictures):
    shutil.copytree(finished[0], tmp_path / "w")
    gone = next(iter((tmp_path / "w" / "predictions").glob("*full*")))
    gone.unlink()
    report.main(["report", f"--runs={tmp_path}/w", f"--output={tmp_path}/out"])
    note = f"w: '{gone.stem}' left out, as checkpoint or predictions are gone: run its command again"
    page = (tmp_path / "out" / "report.html").read_text()
    assert note in capsys.readouterr().out and gone.stem in page and "predictions are gone: run its command" in page


def test_a_checkpoint_for_which_there_is_no_thread_says_so(tmp_path, monkeypatch):
    def no_thread(*_, **__):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(checkpoint, "_checkpointer", no_thread)
    with pytest.raises(InputError, match=r"can't start new thread.*ulimit -v, ulimit -u"):
        checkpoint.save(tmp_path / "c", {"params": {"w": np.ones(2, np.float32)}}, {})


def test_a_hundred_thousand_seeds_are_read_at_once(monkeypatch):
    began = time.process_time()
    settings = Settings.from_flags(**parse_flags(["x", "--target=t.npz", "--source=s.npz", "--seeds=0-99999"]))
    assert len(settings.seeds) == 100_000 and time.process_time() - began < 10
    values, looks = jax.config.values, []

    class Config:
        @property
        def values(self):
            looks.append(values)
            return values

    with monkeypatch.context() as patch:
        patch.setattr(switches.jax, "config", Config())
        switches.changed()
    assert len(looks) == 1  # JAX makes them anew each time, and every fit asks


def test_a_table_of_fits_may_begin_with_a_byte_order_mark(tmp_path, capsys, no_pictures):
    argv = theirs(tmp_path)
    [file] = [Path(part.removeprefix("--results=")) for part in argv if part.startswith("--results=")]
    file.write_text("\ufeff" + file.read_text(encoding="utf-8"), encoding="utf-8")
    report.main(["report", *argv])
    assert "positive" in capsys.readouterr().out
