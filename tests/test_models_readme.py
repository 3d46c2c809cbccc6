"""tljax/models/README.md is true: its files are models, and every command runs in the order of the page."""

import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import check, export, features, pretrain, transfer
from experiments.runs import process
from tljax import data, models

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "tljax/models/README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
NAMES = ("vit.py", "plain.py", "residual.py", "two.py")
FILES = dict(zip(NAMES, re.findall(r"```python\n(.*?)```", TEXT, re.S), strict=True))
PROGRAMS = {program.__name__: program.main for program in (pretrain, check, transfer, features, export)}


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A folder with the files as the page has them."""
    monkeypatch.chdir(tmp_path)
    for name, code in FILES.items():
        (tmp_path / name).write_text(code)
    return tmp_path


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n == "vit.py" else ()) for n in NAMES[:3]])
def test_the_file_is_a_model(name, there):
    model = models.build(f"{there / name}:model:width=8", 3, hidden=(), activation="relu")
    params = models.init(model, jax.random.key(0), (14, 14, 1))
    x = np.random.default_rng(0).uniform(size=(2, 14, 14, 1)).astype(np.float32)
    logits = models.apply(model, params, x)
    assert logits.shape == (2, 3) and models.names(model)[-1] == "head" and params.keys() == set(models.names(model))


@pytest.mark.slow
def test_a_model_of_a_dict_gets_each_input_by_its_name(there, capsys):
    [line] = [line for line in COMMANDS if "two.py" in line]
    transfer.main([*shlex.split(line)[2:], "--dry_run"])
    assert {"body/picture/kernel", "body/table/kernel"} <= set(capsys.readouterr().out.split())
    task = data.load("two.py:visits")
    model = models.build("two.py:model:width=8", 2, hidden=(), activation="relu")
    params = models.init(model, jax.random.key(0), task.train.spec)
    some = {name: np.array(leaf[:2]) for name, leaf in task.train.arrays.items()}
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in some.items()} == {
        "picture": ((2, 6, 6, 1), np.uint8),
        "table": ((2, 3), np.float32),
    }
    outputs = models.apply(model, params, some)
    hidden = np.concatenate(
        [
            some["picture"].reshape(2, -1) / 255 @ params["body"]["picture"]["kernel"],
            some["table"] @ params["body"]["table"]["kernel"],
        ],
        1,
    )
    np.testing.assert_allclose(outputs, np.maximum(hidden, 0) @ params["head"]["kernel"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_dropout_of_the_page_fires_in_training_alone(there):
    model = models.build(f"{there / 'vit.py'}:model:width=8:dropout=0.5", 3, hidden=(), activation="relu")
    params = models.init(model, jax.random.key(0), (14, 14, 1))
    x = np.random.default_rng(0).uniform(size=(2, 14, 14, 1)).astype(np.float32)
    still, again = models.apply(model, params, x), models.apply(model, params, x)
    first, second = (models.apply(model, params, x, key=jax.random.key(seed)) for seed in (1, 2))
    assert (still == again).all() and (first != still).any() and (first != second).any()


@pytest.mark.slow
def test_every_command_of_the_page_runs(there, capsys, no_pictures):
    for command in COMMANDS:
        python, dash, program, *arguments = shlex.split(command)
        assert (python, dash) == ("python", "-m")
        short = ["--steps=3"] if "--steps" in command else []
        process.run_main(PROGRAMS[program], [program, *arguments, *short])
        assert not capsys.readouterr().err
    assert (there / "vit.safetensors").is_file() and (there / "runs/vit_transfer/report.html").is_file()
