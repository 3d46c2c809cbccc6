"""What comes from outside: switches of JAX are in the keys or refused, and plugins leave the process as it was."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from test_programs import arguments, command, results

from experiments import pretrain, transfer
from experiments.runs import directory, plan, process
from experiments.runs.settings import Settings
from tljax import models, plugins, switches
from tljax.types import InputError

pytestmark = pytest.mark.usefixtures("no_pictures")

SETS = {
    "jax_threefry_partitionable": False,
    "jax_default_prng_impl": "rbg",
    "jax_random_seed_offset": 7,
    "jax_enable_x64": True,
    "jax_default_matmul_precision": "highest",
    "jax_disable_jit": True,
    "jax_numpy_dtype_promotion": "strict",
}


@pytest.fixture(autouse=True)
def as_jax_comes(monkeypatch):
    """The switches of JAX, of which tests on an accelerator change one (see conftest)."""
    before = jax.config.values["jax_default_matmul_precision"]
    monkeypatch.delenv("JAX_DEFAULT_MATMUL_PRECISION", raising=False)
    jax.config.update("jax_default_matmul_precision", None)
    monkeypatch.setattr(switches, "_is_on_gpu", lambda: False)
    yield
    jax.config.update("jax_default_matmul_precision", before)


@pytest.fixture
def put_back():
    before = {name: jax.config.values[name] for name in switches.NEUTRAL if name in jax.config.values}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


DETERMINISTIC = f"--{switches.DETERMINISTIC}"
IS_ON_GPU = switches._is_on_gpu
ABOUT = {"target": "b", "strategy": "full", "seed": 0}


def test_as_jax_comes_nothing_enters_a_key():
    assert switches.changed() == {}
    known = plan.identify("one", ABOUT, {}, {})
    text = json.dumps({**ABOUT, "format": directory.FORMAT}, sort_keys=True)
    assert known.key == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("name", SETS)
def test_a_switch_is_in_the_key_and_in_what_is_said_of_the_run(name, put_back):
    before = plan.identify("one", ABOUT, {}, {}).key
    jax.config.update(name, SETS[name])
    assert switches.changed() == {name.upper(): SETS[name]}
    assert directory.environment({})["switches"] == {name.upper(): SETS[name]}
    assert plan.identify("one", ABOUT, {}, {}).key != before


def test_of_xla_the_flags_that_say_how_to_compute_are_in_the_key(monkeypatch, tmp_path):
    many = "--xla_force_host_platform_device_count=8 --xla_dump_to=/nowhere"
    monkeypatch.setenv("XLA_FLAGS", many)
    assert switches.changed() == {}
    fast = "--xla_cpu_fast_math_honor_nans=false --xla_cpu_enable_fast_math=true"
    monkeypatch.setenv("XLA_FLAGS", f"{fast} {many}")
    ordered = " ".join(sorted(fast.split()))
    assert switches.changed() == {"XLA_FLAGS": ordered}
    (tmp_path / "flags").write_text(fast)
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "flags"))
    assert switches.changed() == {"XLA_FLAGS": ordered}
    assert directory.environment({})["variables"]["XLA_FLAGS"] == str(tmp_path / "flags")


def test_what_programs_ask_of_a_gpu_is_in_no_key_and_the_opposite_is(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=/nowhere {DETERMINISTIC}")
    assert switches.changed() == {}
    assert DETERMINISTIC in directory.environment({})["variables"]["XLA_FLAGS"]
    other = DETERMINISTIC.replace("true", "false")
    monkeypatch.setenv("XLA_FLAGS", other)
    assert switches.changed() == {"XLA_FLAGS": other}


def test_a_gpu_of_which_nobody_asks_determinism_has_the_key_of_one_asked_for_the_opposite(monkeypatch, tmp_path):
    jax.devices()
    monkeypatch.setattr(switches, "_is_on_gpu", IS_ON_GPU)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    opposite = DETERMINISTIC.replace("true", "false")
    for text in ("", "--xla_dump_to=/nowhere", opposite, str(tmp_path / "flags")):
        monkeypatch.setenv("XLA_FLAGS", text)
        assert switches.changed() == {"XLA_FLAGS": opposite}
    fast = "--xla_gpu_enable_fast_min_max=true"
    (tmp_path / "flags").write_text(fast)
    assert switches.changed() == {"XLA_FLAGS": " ".join(sorted((fast, opposite)))}
    (tmp_path / "flags").write_text(DETERMINISTIC)
    assert switches.changed() == {}
    monkeypatch.setenv("XLA_FLAGS", stronger := "--xla_gpu_deterministic_ops=true")
    assert switches.changed() == {"XLA_FLAGS": stronger}
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr(switches.xla_bridge, "backends_are_initialized", lambda: False)
    monkeypatch.setattr(jax, "default_backend", lambda: pytest.fail("it starts JAX"))
    assert switches.changed() == {}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", DETERMINISTIC),
        ("--xla_dump_to=/nowhere", f"--xla_dump_to=/nowhere {DETERMINISTIC}"),
        (other := "--xla_gpu_exclude_nondeterministic_ops=false", other),
        (stronger := "--xla_gpu_deterministic_ops=true", stronger),
        ("a_file_of_flags", "a_file_of_flags"),
    ],
)
def test_deterministic_operations_are_asked_for_beside_what_the_user_asks(before, after, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", before)
    monkeypatch.setattr(process, "_gpu_possible", lambda _: True)
    process.ask_for_determinism()
    assert os.environ["XLA_FLAGS"] == after
    monkeypatch.setenv("XLA_FLAGS", before)
    for name, value in (("_gpu_possible", False), ("_xla_fault", "an XLA that does not know the flag ends at it")):
        monkeypatch.setattr(process, "_gpu_possible", lambda _: True)
        monkeypatch.setattr(process, name, lambda *_, value=value: value)
        process.ask_for_determinism()
        assert os.environ["XLA_FLAGS"] == before


ASKS = """
import os, sys
from experiments.runs import process
process.run_main(lambda argv: print(os.environ.get("XLA_FLAGS", "none")))
"""


@pytest.mark.parametrize(
    ("plugin", "kinds", "expected"),
    [("xla_cuda12", None, True), ("xla_cuda12", "cuda,cpu", True), ("xla_cuda12", "cpu", False), ("mine", None, False)],
)
def test_a_gpu_is_possible_where_there_is_a_plugin_for_one(plugin, kinds, expected, tmp_path, monkeypatch):
    (tmp_path / "jax_plugins" / plugin).mkdir(parents=True)
    (tmp_path / "jax_plugins" / plugin / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(process.metadata, "entry_points", lambda group: ())
    assert process._gpu_possible(kinds) == expected


def test_a_program_asks_for_it_before_jax_starts(tmp_path, monkeypatch):
    (tmp_path / "jax_plugins" / "xla_cuda12").mkdir(parents=True)
    (tmp_path / "jax_plugins" / "xla_cuda12" / "__init__.py").touch()
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent)]))
    output = subprocess.run([sys.executable, "-c", ASKS], capture_output=True, text=True, cwd=tmp_path)
    assert (output.stdout.strip(), output.returncode) == (DETERMINISTIC, 0), output.stderr


@pytest.mark.slow
def test_a_run_of_other_switches_is_not_added_to(finished, tasks, tmp_path, put_back):
    """Of one random stream and of another, seeds never meet in one table."""
    place, _ = finished
    before = (place / "results.jsonl").read_bytes()
    jax.config.update("jax_threefry_partitionable", False)
    message = (
        r"other switches \(JAX_THREEFRY_PARTITIONABLE=unset there, False here\): set them alike, or choose another"
    )
    with pytest.raises(InputError, match=message):
        transfer.run(**arguments(tasks, place, weight_decay=0.01, clip=1.0, seeds=(0, 1, 2)))
    assert (place / "results.jsonl").read_bytes() == before


STRATEGY = '''"""Everything, after something that is no affair of a strategy's."""

import os

import jax
import numpy as np

from tljax import masks

{top}


def strategy(params, context):
    {inside}
    return masks.by_path(params, lambda path: True)
'''


def written(tmp_path: Path, top: str = "", inside: str = "pass") -> str:
    (tmp_path / "mine.py").write_text(STRATEGY.format(top=top, inside=inside))
    return f"{tmp_path / 'mine.py'}:strategy"


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("where", ["top", "inside"])
def test_a_plugin_that_sets_a_switch_is_refused_and_the_switch_put_back(name, where, tmp_path, put_back):
    line = f"jax.config.update({name!r}, {SETS[name]!r})"
    spec = written(tmp_path, **{where: line})
    before = jax.config.values[name]
    with pytest.raises(InputError, match=rf"sets {name} from .* in the environment if you mean it"):
        method, _ = plugins.method(spec)
        with switches.guarded():
            method.strategy({"head": np.ones(2)}, None)
    assert jax.config.values[name] == before and switches.changed() == {}


def test_a_model_that_sets_a_switch_while_it_is_traced_is_refused(put_back):
    class Precise(nn.Module):
        @nn.compact
        def __call__(self, x):
            jax.config.update("jax_default_matmul_precision", "highest")
            return nn.Dense(3)(x)

    from tljax.models.linen import stage

    with pytest.raises(InputError, match="sets jax_default_matmul_precision from None to highest"):
        models.init((stage("head", Precise()),), jax.random.key(0), (4,))


def test_numpy_and_the_environment_are_as_they_were(tmp_path):
    before = np.geterr(), os.environ.get("XLA_FLAGS"), os.getcwd()
    plugins.method(written(tmp_path, "np.seterr(all='raise'); os.environ['XLA_FLAGS'] = '--x'; os.chdir('/')"))
    assert before == (np.geterr(), os.environ.get("XLA_FLAGS"), os.getcwd())


@pytest.mark.parametrize("where", ["top", pytest.param("inside", marks=pytest.mark.slow)])
def test_a_strategy_that_changes_the_directory_changes_no_place(where, tasks, tmp_path, monkeypatch):
    """Data, run directory and a second plugin are named from where the program was started."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path, **{where: "os.chdir('/')"})
    (tmp_path / "digits.npz").write_bytes((tasks / "digits.npz").read_bytes())
    (tmp_path / "second.py").write_text(STRATEGY.format(top="", inside="pass"))
    flags = arguments(tasks, "rel", source="digits.npz", seeds=(0,), epochs=1)
    transfer.run(**flags | {"strategies": ("mine.py:strategy", "second.py:strategy")})
    assert len(results(tmp_path / "rel")) == 4 and os.getcwd() == str(tmp_path)
    assert not Path("/rel").exists()


MODEL = """import os

import flax.linen as nn

from tljax.models.linen import flat, stage


class Body(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train=False):
        os.chdir("/")
        return nn.Dropout({rate})(nn.relu(nn.Dense(self.width)(x)), deterministic={off})


def model(classes, *, hidden=(8,)):
    return (stage("hidden_0", Body(hidden[0]), before=flat), stage("head", nn.Dense(classes)))
"""


def with_dropout(tmp_path: Path, rate: float = 0.5, off: str = "not train") -> dict:
    (tmp_path / "drop.py").write_text(MODEL.format(rate=rate, off=off))
    return {"model": f"{tmp_path / 'drop.py'}:model", "activation": None, "seeds": (0,), "epochs": 1}


@pytest.mark.slow
def test_a_model_that_changes_the_directory_changes_no_place(tasks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = arguments(tasks, "rel", target=None, strategies=None, **with_dropout(tmp_path))
    pretrain.run(**flags)
    assert (tmp_path / "rel" / "results.jsonl").is_file() and not Path("/rel").exists()


def keys(lines) -> dict:
    return {line.strategy: line.key for line in lines}


@pytest.mark.slow
def test_frozen_dropout_is_in_the_key_where_it_is_on_and_changes_what_freezes(tasks, tmp_path, capsys):
    flags = {**with_dropout(tmp_path), "strategies": ("head_only",)}
    off = transfer.run(**arguments(tasks, tmp_path / "off", **flags))
    assert "--model" not in capsys.readouterr().out
    named = transfer.run(**arguments(tasks, tmp_path / "off", **flags, frozen_dropout="off"))
    anew = transfer.run(**arguments(tasks, tmp_path / "anew", **flags, features_budget=0))
    on = transfer.run(**arguments(tasks, tmp_path / "on", **flags, frozen_dropout="on"))
    assert keys(off) == keys(named) and not set(keys(off).values()) & set(keys(on).values())
    losses = {name: [line.test_loss for line in lines] for name, lines in (("off", off), ("anew", anew), ("on", on))}
    assert [line.strategy for line in off] == ["scratch", "head_only"]
    np.testing.assert_allclose(losses["off"], losses["anew"], rtol=1e-5)
    # What trains in its first stage drops in it under both; the probe only where it is on.
    assert [off_loss == other for off_loss, other in zip(losses["off"], losses["on"], strict=True)] == [True, False]


@pytest.mark.slow
def test_a_run_of_before_the_flag_goes_on(tasks, tmp_path):
    values = arguments(tasks, tmp_path / "w", strategies=("full",), seeds=(0,), epochs=1)
    lines = transfer.run(**values)
    flags = tmp_path / "w" / "flags.flags"
    first, *rest = flags.read_text().splitlines(keepends=True)
    kept = [first, *(line for line in rest if "frozen_dropout" not in line and not line.startswith("#"))]
    flags.write_text("".join(kept))
    assert keys(transfer.run(**values)) == keys(lines)
    with pytest.raises(InputError, match="--frozen_dropout=off there, on here"):
        transfer.run(**values, frozen_dropout="on")


@pytest.mark.slow
def test_dropout_that_never_drops_is_told_and_one_that_does_has_a_key_of_its_own(tasks, tmp_path, capsys):
    flags = arguments(tasks, None, dry_run=True, **with_dropout(tmp_path, off="True"))
    transfer.run(**flags)
    assert "drop.py:model: 'hidden_0/Dropout_0' is a dropout of rate 0.5 that never drops" in capsys.readouterr().out
    settings = Settings.from_flags(**arguments(tasks, None, **with_dropout(tmp_path)))
    by_pmap = Settings.from_flags(**arguments(tasks, None, parallel="pmap", **with_dropout(tmp_path)))
    build = lambda settings: models.build(settings.model, 3, hidden=settings.hidden, activation=settings.activation)  # noqa: E731
    assert plan.draws(settings, build(settings), (6, 6, 1)) == {"draws": [2]}
    assert plan.draws(by_pmap, build(by_pmap), (6, 6, 1)) == {"draws": [2, len(jax.local_devices())]}
    quiet = Settings.from_flags(**arguments(tasks, None, **with_dropout(tmp_path, rate=0.0)))
    assert plan.draws(quiet, build(quiet), (6, 6, 1)) == {}


@pytest.mark.slow
def test_switches_of_the_environment_are_told_and_keep_their_runs_apart(tasks, tmp_path):
    """As a person sets them: of a program that is started anew."""

    def started(place, **more):
        argv = command(tasks, tmp_path, workdir=tmp_path / place, seeds=(0,), epochs=1, strategies=("full",))
        run = [sys.executable, "-m", "experiments.transfer", *argv]
        return subprocess.run(run, capture_output=True, text=True, env={**os.environ, **more}, check=False)

    first = started("w")
    assert first.returncode == 0 and "results are those of" not in first.stdout
    other = started("w", JAX_DEFAULT_PRNG_IMPL="rbg")
    assert other.returncode == 1 and "JAX_DEFAULT_PRNG_IMPL=unset there, rbg here" in other.stderr
    apart = started("v", JAX_DEFAULT_PRNG_IMPL="rbg")
    assert apart.returncode == 0 and "results are those of JAX_DEFAULT_PRNG_IMPL=rbg" in apart.stdout
    before, another = ({line.key for line in results(tmp_path / name)} for name in ("w", "v"))
    assert not before & another
