"""`experiments.check`: green for every strategy of the folder, red for the planted ones, one line for bad input."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from planted import schedules

from experiments import check
from experiments.runs import process
from tljax import paths, plugins
from tljax.audit import ends, fits, problems
from tljax.audit.strategies import _lint
from tljax.types import Method

ROOT = Path(__file__).parent.parent
NAMES = plugins.names("tljax.strategies", "strategy")
LINT = {
    "lint on mlp",
    "lint on cnn:norm=true",
    "lint on list and tuples",
    "lint on NamedTuple",
    "lint on dataclass",
    "lint on None, integers, empty dict",
    "lint on scalars",
}
ENDS = {ends.FORM, ends.KEPT, ends.FOLLOWS, ends.FINITE}
TRAINED = {"frozen leaves keep their bytes", "trained leaves move", "one compilation a phase", "jit equals no jit"}


def ran(capsys, *arguments):
    """(exit code, {check: (word, detail)}, the error) of the program."""
    code = 0
    try:
        process.run_main(check.main, ["check", *arguments])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    rows = {line[8:44].strip(): (line[:7].strip(), line[45:]) for line in out.splitlines()}
    return code, rows, err


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_of_the_folder_is_green(name, capsys):
    code, rows, err = ran(capsys, f"--strategy={name}")
    assert (code, err) == (0, "")
    assert rows.keys() >= LINT | TRAINED
    assert {word for word, _ in rows.values()} <= {"ok", "-"}
    assert all(rows[promise][0] == "ok" for promise in TRAINED)
    assert (rows.keys() & ENDS) == (ENDS if plugins.method(name)[0].finish else set())
    assert "full training" in next(detail for row, (_, detail) in rows.items() if row.startswith("FLOPs"))


@pytest.mark.slow
def test_norm_only_is_proved_on_the_model_that_has_norms(capsys):
    _, rows, _ = ran(capsys, "--strategy=norm_only")
    assert rows["lint on mlp"][0] == "-" and "no normalisation layer" in rows["lint on mlp"][1]
    assert "on cnn:norm=true" in rows["frozen leaves keep their bytes"][1]


@pytest.mark.slow
def test_a_linear_probe_costs_less_than_full_training_and_lora_promises_nothing(capsys):
    def counts(detail):
        numbers = re.search(r"([\d,]+); full training ([\d,]+\d)", detail)
        return [int(number.replace(",", "")) for number in numbers.groups()]

    probe, full = counts(ran(capsys, "--strategy=head_only")[1]["FLOPs at most those of full training"][1])
    assert probe < 0.6 * full
    lora, full = counts(ran(capsys, "--strategy=lora")[1]["FLOPs of a step"][1])
    assert lora > full


ROWS = """
import jax
from jax import numpy as jnp
from tljax import masks

DATA_DRIVEN = True


def strategy(params, context):
    below = masks.by_glob(params, "**/kernel")
    rows = jax.tree.map(lambda trains, leaf: smallest(leaf) if trains else False, below, params)
    return masks.union(rows, context.fresh)


def smallest(kernel):
    sizes = jnp.sqrt((kernel**2).sum(tuple(range(1, kernel.ndim)), keepdims=True))
    return {}
"""


@pytest.mark.parametrize(
    "rows", ["sizes <= jnp.median(sizes)", "jnp.broadcast_to(sizes <= jnp.median(sizes), kernel.shape)"]
)
def test_a_mask_by_rows_costs_what_it_may_in_either_shape(rows, tmp_path, capsys):
    (tmp_path / "rows.py").write_text(ROWS.format(rows))
    code, checks, err = ran(capsys, f"--strategy={tmp_path / 'rows.py'}:strategy")
    assert (code, err) == (0, "")
    assert "for selecting" in checks["FLOPs at most those of full training"][1]


@pytest.mark.parametrize(
    ("file", "lines", "reason"),
    [
        ("mistypes_a_path", {"applies to a model"}, "pattern 'heed/**' matches no leaf; nearest: 'head/bias'"),
        ("freezes_the_new_head", {"new leaves train in every phase"}, "freezes 'head/bias', 'head/kernel'"),
        ("global_randomness", {"deterministic in its key"}, "draw from context.key alone"),
        ("returns_strings", LINT, "give True, False, a number or an array"),
        ("changes_structure", LINT, "the mask and the parameters are different trees"),
    ],
)
def test_a_planted_strategy_fails_just_the_check_that_is_for_it(file, lines, reason, capsys):
    code, rows, err = ran(capsys, f"--strategy={ROOT}/tests/planted/{file}.py")
    assert code == 1
    assert {name for name, (word, _) in rows.items() if word == "FAILED"} == lines
    assert all(reason in rows[name][1] for name in lines)
    if lines == LINT:
        assert rows["applies to a model"] == ("-", "not known: the lint fails on mlp, cnn:norm=true")
    assert err.startswith("error: strategy") and err.count("\n") == 1 and f"fails {len(lines)} of" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--strategy is not given"),
        (("--strategy=hed_only",), "unknown strategy 'hed_only'; nearest: 'head_only'"),
        (("--strategy=missing.py:strategy",), "file 'missing.py' does not exist"),
        (("--strategy=last_k:n=2",), "strategy 'last_k' has no option 'n'"),
        (("--strategy=full", "--model=mpl"), "unknown model 'mpl'"),
        (("--strateg=full",), "unknown flag --strateg: did you mean --strategy?"),
        (("full",), "'full' is no flag"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    code, rows, err = ran(capsys, *arguments)
    assert code == 1 and not rows
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "text",
    [
        "def strategy(params, context):\n    raise SystemExit(0)\n",
        "from tljax.types import Phase\n\ndef strategy(params, context):\n    return [Phase(0.0, quits)]\n\n"
        "def quits(params, context):\n    raise SystemExit(0)\n",
    ],
    ids=["at once", "in a phase"],
)
def test_a_strategy_that_ends_the_program_fails(text, tmp_path, capsys):
    (tmp_path / "quits.py").write_text(text)
    code, rows, err = ran(capsys, f"--strategy={tmp_path}/quits.py")
    assert code == 1 and rows["lint on mlp"][0] == "FAILED" and "SystemExit: 0" in rows["lint on mlp"][1]
    assert rows["applies to a model"][0] == "-"
    assert err.count("\n") == 1


def test_a_strategy_applies_to_the_models_whose_lint_it_passes(tmp_path, capsys):
    (tmp_path / "half.py").write_text(
        "from tljax import masks\n\ndef strategy(params, context):\n"
        "    return 'none' if 'hidden_0' in params else masks.by_path(params, lambda path: True)\n"
    )
    code, rows, _ = ran(capsys, f"--strategy={tmp_path}/half.py")
    assert code == 1 and rows["lint on mlp"][0] == "FAILED" and rows["lint on cnn:norm=true"][0] == "ok"
    assert rows["applies to a model"] == ("ok", "cnn:norm=true")


def test_help_lists_a_strategy_that_cannot_be_read(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.py").write_text("\ndef strategy(:\n")
    monkeypatch.setattr("tljax.strategies.__path__", [str(tmp_path)])
    monkeypatch.setattr("tljax.strategies.__spec__.submodule_search_locations", [str(tmp_path)])
    assert ran(capsys, "--help")[0] == 0
    check.main(["check", "--helpfull"])
    assert "broken             cannot be read: " in capsys.readouterr().out


@pytest.mark.slow
def test_the_step_that_a_schedule_drives_is_read_and_what_is_outside_its_scope_is_proved():
    problem = problems.from_model("mlp")
    _, case = _lint(Method(schedules.switches_all_above_the_first_stage), {}, problem)
    [phase] = case.phases
    program, data = fits.program(problem.model, None), problems.data(problem.shape)
    report = fits.read(fits.fit(program, case.params, [phase.mask], data, 1), 0, problem.shape)
    outside = {"hidden_0/bias", "hidden_0/kernel"}
    assert {finding.path for finding in report.select("frozen", "proved")} == outside
    assert {finding.path for finding in report.select("state", "proved")} == outside
    assert {finding.path for finding in report.select("trains", "proved")} == set(paths.names(case.params)) - outside
    assert not [finding for finding in report.findings if finding.verdict == "refuted"]


@pytest.mark.slow
def test_in_a_process_of_its_own_each_phase_compiles_once_and_help_lists_the_folder():
    def program(*arguments):
        command = [sys.executable, "-m", "experiments.check", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert "one compilation a phase              2 for 2 phases; none for a second fit" in program("--strategy=lp_ft")
    text = program("--helpfull")
    assert all(f"  {name} " in text for name in NAMES)
