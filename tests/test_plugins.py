"""The grammar name:option=value, and what names stand for."""

import pytest

from tljax import plugins
from tljax.types import InputError

MINE = """
from tljax import masks

def strategy(params, context, *, part="bias", rate: float = 1.0):
    return masks.by_path(params, lambda path: path.endswith(part))

def other(params, context):
    return masks.by_path(params, lambda path: True)

def reinit(context):
    return context.stages[:1]

DATA_DRIVEN = True
"""


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    return file


def test_a_file_outside_the_project_is_a_strategy(mine):
    method, options = plugins.method(f"{mine}:strategy:part=kernel:rate=2")
    assert options == {"part": "kernel", "rate": 2.0}
    assert method.strategy({"bias": 1.0, "kernel": 2.0}, None, part="kernel") == {"bias": False, "kernel": True}
    assert method.data_driven and method.reinit is not None and method.adapt is None


def test_the_attribute_may_be_left_out_or_be_another(mine):
    assert plugins.method(str(mine))[0].strategy.__name__ == "strategy"
    assert plugins.method(f"{mine}:other")[0].strategy.__name__ == "other"


def test_a_dotted_path_is_a_strategy():
    assert plugins.method("tljax.strategies.last_k:strategy:k=2")[1] == {"k": 2}


def test_an_edit_of_a_strategy_changes_its_digest(mine):
    before = plugins.source_digest(plugins.method(str(mine))[0].strategy)
    mine.write_text(MINE + "\n")
    assert plugins.source_digest(plugins.method(str(mine))[0].strategy) != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("heed_only", "unknown strategy 'heed_only'; nearest: 'head_only'"),
        ("last_k:kk=1", "strategy 'last_k' has no option 'kk'; nearest: 'k'"),
        ("last_k:k=one", "option 'k' of strategy 'last_k' is int, not 'one'"),
        ("last_k:k=true", "is int, not 'true'"),
        ("full:k=1", "has no option 'k'; it takes none"),
        ("last_k:k=", "not of the form name:option=value"),
        ("last_k:k=1:k=2", "gives option 'k' twice"),
        (":k=1", "no name before its options"),
        ("last_k:strateg", "no function 'strateg'; nearest: 'strategy'"),
        ("nowhere.py:strategy", "file 'nowhere.py' does not exist"),
        ("no.such.module:strategy", "cannot be imported"),
        ("last_k:a:b", "followed by"),
    ],
)
def test_names_and_options_that_cannot_be_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        plugins.method(text)


def test_a_file_that_fails_when_read_says_why(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("import nothing_of_the_sort\n")
    with pytest.raises(InputError, match="fails when read: ModuleNotFoundError"):
        plugins.method(str(file))


def test_separators_inside_brackets_do_not_separate():
    spec = plugins.parse("cifar10:train=train[:80%]:invert")
    assert spec == plugins.Spec("cifar10", ("invert",), {"train": "train[:80%]"})


def test_a_folder_offers_the_files_that_define_the_function():
    assert "mlp" in plugins.names("tljax.models", "model")
    assert "linen" not in plugins.names("tljax.models", "model")
