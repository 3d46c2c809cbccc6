"""Help is true of every program: what it lists is what is taken, its defaults and examples too; slips are named."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import compare
from experiments.runs import command_line, process
from experiments.runs.settings import Recipe, Settings, parse_flags
from tljax.types import InputError

ROOT = Path(__file__).parent.parent
PROGRAMS = {name: importlib.import_module(f"experiments.{name}") for name in command_line.programs()}
ALL = {name for taken in command_line.of_programs().values() for name in taken}
"""The flags of all programs."""
program = pytest.mark.parametrize("program", PROGRAMS)


def help_text(program, capsys, flag="--helpfull"):
    PROGRAMS[program].main([program, flag])
    return capsys.readouterr().out


def listed(text):
    """{flag: what help says of it}."""
    return dict(re.findall(r"^  --(\w+) +(.*(?:\n {23}.*)*)", text, re.M))


def form(program):
    """The dataclass of a program's flags."""
    return getattr(PROGRAMS[program], f"{program.title()}Flags")


def read_flags(program, *argv):
    """What a program would run with: (settings, its own flags)."""
    values, filled = command_line.read([program, *argv], form(program))
    program_flags = {name: getattr(filled, name) for name in command_line.own_flags(form(program))}
    return Settings.from_flags(**values), program_flags


def refusal(main, argv, capsys):
    """The one line with which a program ends."""
    with pytest.raises(SystemExit) as end:
        process.run_main(main, argv)
    text = capsys.readouterr().err
    assert end.value.code == 1 and text.startswith("error: ") and text.count("\n") == 1
    return text


def examples(program):
    lines = re.findall(r"^    (python -m (?:.*\\\n)*.*)$", PROGRAMS[program].__doc__, re.M)
    return [shlex.split(line.replace("\\\n", " ")) for line in lines]


@pytest.mark.slow
def test_all_programs_are_listed_in_a_line_each_in_the_order_of_a_project():
    done = subprocess.run([sys.executable, "-m", "experiments"], cwd=ROOT, capture_output=True, text=True, check=True)
    programs = dict(re.findall(r"^  (\w+) +(\S.*)$", done.stdout, re.M))
    files = [file for file in (ROOT / "experiments").glob("*.py") if "run_program(__file__)" in file.read_text()]
    assert programs == {
        file.stem: importlib.import_module(f"experiments.{file.stem}").__doc__.split("\n")[0] for file in files
    }
    order = ["pretrain", "zoo", "features", "rank", "search", "check", "transfer", "compare", "report"]
    assert [name for name in programs if name in order] == order


@program
def test_help_lists_what_is_taken_and_nothing_else(program, capsys, monkeypatch):
    """What is taken without being listed, the program refuses."""
    monkeypatch.chdir(ROOT)
    named = {*listed(help_text(program, capsys))}
    named |= {f"source_{name}" for name in named & {*vars(Recipe())}}
    example = examples(program)[0][3:]
    for name in ALL - {"flagfile"}:
        try:
            read_flags(program, f"--{name}=1")
            taken = True
        except InputError as error:
            taken = "unknown flag" not in str(error)
        assert taken or name not in named, name
        if taken and name not in named:
            with pytest.raises(InputError, match=f"--{name}"):
                PROGRAMS[program].main([program, *example, f"--{name}=1"])


def test_in_a_flagfile_that_programs_share_flags_of_a_transfer_are_passed_over_and_no_others(tmp_path, capsys):
    shared, other = tmp_path / "shared.flags", tmp_path / "other.flags"
    shared.write_text("--learning_rate=0.1\n--source_epochs=3\n--target=x\n--nodry_run\n--hidden=7\n")
    for program in ("predict", "export", "features"):
        settings, _ = read_flags(program, f"--flagfile={shared}")
        assert settings == Settings.from_flags(hidden=(7,))
        text = refusal(PROGRAMS[program].main, [program, "--learning_rate=0.1"], capsys)
        assert text == "error: unknown flag --learning_rate: it is one of experiments.transfer\n"
    settings, _ = read_flags("pretrain", f"--flagfile={shared}")
    assert settings == Settings.from_flags(hidden=(7,), learning_rate=0.1, source_epochs=3)
    other.write_text("--zoo=a\n")
    assert "experiments.zoo" in refusal(PROGRAMS["predict"].main, ["predict", f"--flagfile={other}"], capsys)
    other.write_text("--source_checkpoint=a\n--source=mnist_10k\n")
    assert "leave out" in refusal(PROGRAMS["pretrain"].main, ["pretrain", f"--flagfile={other}"], capsys)


def test_a_flag_has_one_role_whichever_program_has_it():
    """Whether runs of one run directory may differ in it: report's flags judge, and are in none."""
    roles = {}
    for program, taken in command_line.of_programs().items():
        for name, role in taken.items():
            assert roles.setdefault(name, role) == role, name
        assert {
            name: f.metadata["role"] for f in command_line.fields(form(program)) for name in [f.name]
        }.items() <= taken.items()
        assert {*taken} == {*command_line.kinds(form(program))}
    assert {name for name, role in roles.items() if role == "grows"} == {"strategies", "seeds", "train_examples"}
    assert {"data_dir", "mesh", "trials", "verify", "eval"} <= command_line.may_differ()
    assert not {"workdir", "learning_rate", "margin", "tuned", "zoo"} & command_line.may_differ()


@program
def test_the_defaults_that_help_tells_are_those_that_hold(program, capsys):
    settings, program_flags = read_flags(program)
    for name, about in listed(help_text(program, capsys)).items():
        about = " ".join(about.split())
        default = re.search(r"\(default ([^ )]*)\)$", about)
        assert default or "default" in about or "needed" in about, name
        if default and default[1] == "none":
            assert (
                program_flags[name]
                if name in program_flags
                else getattr(settings.recipe, name, getattr(settings, name, None))
            ) in (
                None,
                "",
                (),
                "none",
            )
        elif default:
            assert read_flags(program, f"--{name}={default[1]}") == (settings, program_flags), name


@program
def test_examples_are_command_lines_that_are_read(program, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert examples(program)
    for python, dash, module, *argv in examples(program):
        assert (python, dash, module) == ("python", "-m", f"experiments.{program}")
        assert read_flags(program, *argv) != read_flags(program)


@program
def test_short_help_has_the_own_flags_and_points_on(program, capsys):
    short, full = help_text(program, capsys, "--help"), help_text(program, capsys)
    _, program_flags = read_flags(program)
    assert program_flags.keys() <= listed(short).keys() <= listed(full).keys()
    if short != full:
        lines = short.count("\n") * (2 if "learning_rate" in full else 1)
        assert "--helpfull has all" in short and lines < full.count("\n")


@program
def test_help_names_every_strategy_where_there_are_some(program, capsys):
    text = help_text(program, capsys)
    strategies = command_line.strategies()
    assert len(strategies) > 15
    for name, about in strategies.items():
        assert (f"  {name} " in text and about in text) == bool({"strategy", "strategies"} & listed(text).keys())


@program
def test_a_flag_that_is_not_suggests_the_nearest(program, capsys, tmp_path):
    main = PROGRAMS[program].main
    for name in sorted(listed(help_text(program, capsys)))[::3]:
        assert (
            refusal(main, [program, f"--{name}z=1"], capsys)
            == f"error: unknown flag --{name}z: did you mean --{name}?\n"
        )
    (tmp_path / "own.flags").write_text(f"# of mine\n--{name}z=1\n")
    (tmp_path / "outer.flags").write_text(f"--flagfile={tmp_path / 'own.flags'}\n")
    text = refusal(main, [program, f"--flagfile={tmp_path / 'outer.flags'}"], capsys)
    assert text == f"error: unknown flag --{name}z in '{tmp_path / 'outer.flags'}': did you mean --{name}?\n"


def test_a_flag_of_another_program_says_whose_it_is(capsys):
    main = PROGRAMS["transfer"].main
    assert refusal(main, ["x", "--zoo=a"], capsys) == "error: unknown flag --zoo: it is one of experiments.zoo\n"
    assert "it is one of experiments.search" in refusal(main, ["x", "--space=a"], capsys)
    assert "it is one of experiments.transfer" in refusal(PROGRAMS["report"].main, ["x", "--seeds=0"], capsys)
    assert "--helpfull lists" in refusal(main, ["x", "--qqqqq"], capsys)


def test_a_flag_without_a_word_and_a_switch_with_one_are_refused_in_a_line(capsys):
    main = PROGRAMS["transfer"].main
    assert "dry_run" in refusal(main, ["x", "--nodry_run=1"], capsys)
    assert "dry_run" in refusal(main, ["x", "--dry_run=perhaps"], capsys)
    assert "seeds" in refusal(main, ["x", "--seeds"], capsys)


def test_own_flags_are_read_among_those_of_transfer_in_any_form():
    settings, program_flags = read_flags("rank", "--seeds", "3", "--sources", "a,b", "--verify", "--scores=nce")
    assert (
        settings.seeds == (3,)
        and program_flags["sources"] == ("a", "b")
        and program_flags["verify"]
        and program_flags["scores"] == ("nce",)
    )


def test_a_text_that_ends_in_a_zero_is_written_as_it_is():
    """'--tuned=runs/search-v1.0' named another folder in the flagfile that reproduces the run."""
    settings = Settings.from_flags(strategies=("lora:scale=4.0",), source="v1.0.npz:noise=1.0", manual_dir="data-2.0")
    again = Settings.from_flags(**parse_flags(["x", *settings.flagfile_lines()]))
    assert (again.strategies, again.source, again.manual_dir) == (
        settings.strategies,
        settings.source,
        settings.manual_dir,
    )
    options = compare.CompareFlags(tuned="runs/search-v1.0", against="lora:scale=4.0", margin=1.0)
    assert command_line.read(["x", *command_line.flagfile_lines(options)], compare.CompareFlags)[1] == options
    assert "--margin=1" in command_line.flagfile_lines(options)


def test_flags_written_are_flags_read():
    options = form("search")(space=("momentum:in:0,0.9", "clip:log:1e-3:1"), timeout=60.0, per_budget=True, lr_low=1e-7)
    assert command_line.read(["x", *command_line.flagfile_lines(options)], form("search"))[1] == options
    assert "--timeout=60" in command_line.flagfile_lines(
        options
    ) and "--per_budget=true" in command_line.flagfile_lines(options)
    assert not any("lr_low" in line for line in command_line.flagfile_lines(options, ["lr_low"]))
