"""The grammar name:option=value, and what names stand for."""

import sys

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
    before = plugins.method(str(mine))[0].code
    mine.write_text(MINE + "\n")
    assert plugins.method(str(mine))[0].code != before


PARTIAL = "import functools\nfrom tljax.strategies import last_k\nstrategy = functools.partial(last_k.strategy, k=1)\n"
HALF = "from tljax.strategies.lora import merge, strategy\n\ndef adapt(params, key):\n    return params\n"
HELPED = "def strategy(params, context):\n    from beside import helper\n    return helper(params)\n"
OBJECT = """
class Strategy:
    def __call__(self, params, context, *, k=1):
        return params

strategy = Strategy()
"""


@pytest.mark.parametrize("text", [PARTIAL, HALF, HELPED, OBJECT], ids=["partial", "imported", "helped", "object"])
@pytest.mark.parametrize("edited", ["mine.py", "beside.py"])
def test_a_digest_is_of_the_named_file_and_of_helpers_beside_it(text, edited, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    (tmp_path / "beside.py").write_text("import deeper\n")

    def digest():
        return plugins.method(f"{tmp_path}/mine.py")[0].code

    before = digest()
    assert digest() == before
    (tmp_path / edited).write_text((tmp_path / edited).read_text() + "# edited\n")
    assert (digest() != before) == (edited == "mine.py" or text == HELPED)


def test_a_function_that_ends_in_options_takes_them_all():
    assert plugins.taken(lambda params, key, **options: params, {"k": 2}) == {"k": 2}
    assert plugins.taken(lambda params, key, rank=1: params, {"k": 2, "rank": 3}) == {"rank": 3}


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
        ("last_k:k={[1]}", "option 'k' of strategy 'last_k' is int, not"),
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


@pytest.mark.parametrize("spec", ["{folder}/broken.py", "{folder}/imports_it.py", "apart.broken"])
def test_a_file_that_does_not_parse_names_its_own_line_and_the_remedy(spec, tmp_path, monkeypatch):
    """No line of tljax's: the user has nothing to mend there."""
    folder = tmp_path / "apart"
    folder.mkdir()
    (folder / "broken.py").write_text("x = 1\n\ndef strategy(params, context)\n    return params\n")
    (folder / "imports_it.py").write_text("import apart.broken\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError) as refused:
        plugins.method(spec.format(folder=folder))
    assert str(refused.value).endswith(f": SyntaxError: expected ':' ({folder}/broken.py:3): correct this line")


def test_what_fails_in_no_file_but_ours_names_no_line(tmp_path):
    file = tmp_path / "deep.py"
    file.write_text("x = " + "-" * 200_000 + "1\n")
    with pytest.raises(InputError, match="fails when read") as refused:
        plugins.method(str(file))
    assert "plugins.py" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("strategy = max\n", "has no signature to read"),
        ("def strategy(params: 'the parameters', context): ...\n", "'params: 'the parameters'' is no annotation"),
        ("import re\n\ndef strategy(params, *, k: 're.Missing' = 1): ...\n", "'k: 're.Missing'' is no annotation"),
        ("reinit = ('hidden_0',)\n\ndef strategy(params, context): ...\n", "its `reinit` is .*, not a function"),
    ],
)
def test_a_strategy_that_cannot_be_called_is_refused(text, message, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(InputError, match=message):
        plugins.method(f"{tmp_path}/mine.py")


def test_an_annotation_of_something_not_imported_is_no_matter(tmp_path):
    (tmp_path / "mine.py").write_text("def strategy(params: 'Params', context, *, k: 'int' = None): ...\n")
    assert plugins.method(f"{tmp_path}/mine.py:strategy:k=2")[1] == {"k": 2}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of plugins of the tests' own."""
    (tmp_path / "plugged").mkdir()
    (tmp_path / "plugged" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "plugged"
    for name in [name for name in sys.modules if name.split(".")[0] == "plugged"]:
        del sys.modules[name]


def test_a_folder_offers_every_file_that_binds_the_name(folder):
    texts = {
        "first_line": "def strategy(): ...\n",
        "assigned": "import os\nstrategy = os.getcwd\n",
        "imported": "from somewhere import strategy\n",
        "guarded": "try:\n    from a import strategy\nexcept ImportError:\n    strategy = None\n",
        "broken": "def strategy(:\n",
        "inner": "def other():\n    strategy = 1\n",
        "other": "print('strategy')\n",
    }
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    assert plugins.names("plugged", "strategy") == ["assigned", "broken", "first_line", "guarded", "imported"]


def test_a_module_of_the_folder_that_ends_the_program_when_imported_is_refused(folder):
    (folder / "quits.py").write_text("import sys\n\nsys.exit(0)\n\ndef strategy(): ...\n")
    with pytest.raises(InputError, match="cannot be imported: SystemExit: 0"):
        plugins.module(plugins.Spec("quits"), "plugged", "strategy")


def test_separators_inside_brackets_do_not_separate():
    spec = plugins.parse("cifar10:train=train[:80%]:invert")
    assert spec == plugins.Spec("cifar10", ("invert",), {"train": "train[:80%]"})


def test_a_folder_offers_the_files_that_define_the_function():
    assert "mlp" in plugins.names("tljax.models", "model")
    assert "linen" not in plugins.names("tljax.models", "model")
