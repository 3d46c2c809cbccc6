"""tljax/weights/README.md is true: a transformer under names of its own goes from its file to a table, and back."""

import json
import re
import shlex
from pathlib import Path

import layout_values
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_programs import results

from experiments import export, predict, transfer
from experiments.runs import plan, sources
from experiments.runs.settings import Settings
from tljax import data, models, weights
from tljax.types import InputError

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "tljax/weights/README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
FILE, LOOK, PROVE = re.findall(r"```python\n(.*?)```", TEXT, re.S)
(RULES, _), [CARD] = (re.findall(rf"```{kind}\n(.*?)```", TEXT, re.S) for kind in ("text", "json"))
PROGRAMS = {program.__name__: program.main for program in (transfer, export)}

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A folder with the files as the page has them."""
    monkeypatch.chdir(tmp_path)
    exec(FILE, {})
    (tmp_path / "mine.rules").write_text(RULES)
    (tmp_path / "mine.npz.json").write_text(CARD)
    return tmp_path


def ran(line, *more):
    python, dash, program, *arguments = shlex.split(line)
    assert (python, dash) == ("python", "-m")
    PROGRAMS[program]([program, *arguments, *more])


@pytest.mark.slow
def test_the_dry_run_says_what_became_of_every_array(there, capsys):
    exec(LOOK, {})
    text = capsys.readouterr().out
    assert "trunk.1.mixer.qkv.weight (96, 32)" in text and "block_1/attention/query/kernel (32, 2, 16)" in text
    ran(COMMANDS[0])
    text = " ".join(capsys.readouterr().out.split())
    assert "block_{0,1}/attention/query/kernel trunk.{0,1}.mixer.qkv.weight: split, transpose, reshape renamed" in text
    assert "embedding/position pos: reshape renamed 17x32" in text


def by_hand(file, images):
    """The whole network in NumPy, as whoever trained it wrote it: fused qkv, [out, in], a class token."""
    return np.stack([_by_hand(file, image[:, :, 0]) for image in images])


def _by_hand(file, image):
    a = {name: array.astype(np.float64) for name, array in weights.read(file).items()}

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * a[f"{name}.gain"] + a[f"{name}.shift"]

    def linear(x, name):
        return x @ a[f"{name}.weight"].T + a[f"{name}.bias"]

    def gelu(x):
        from scipy.special import erf

        return x * (1 + erf(x / np.sqrt(2))) / 2

    patches = image.reshape(4, 7, 4, 7).transpose(0, 2, 1, 3).reshape(16, 49).astype(np.float64)
    tokens = patches @ a["patchify.weight"].reshape(32, 49).T + a["patchify.bias"]
    x = np.concatenate([a["cls"][0], tokens]) + a["pos"][0]
    for i in range(2):
        q, k, v = np.split(linear(norm(x, f"trunk.{i}.ln_a"), f"trunk.{i}.mixer.qkv"), 3, axis=-1)
        heads = []
        for head in (slice(0, 16), slice(16, 32)):
            scores = q[:, head] @ k[:, head].T / 4
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, head])
        x = x + linear(np.concatenate(heads, -1), f"trunk.{i}.mixer.proj")
        x = x + linear(gelu(linear(norm(x, f"trunk.{i}.ln_b"), f"trunk.{i}.ff.up")), f"trunk.{i}.ff.down")
    return linear(norm(x, "ln_end")[0], "out")


def test_the_page_proves_that_it_is_the_same_network_and_finds_a_square_kernel_that_is_not_transposed(there, capsys):
    images = np.random.default_rng(1).uniform(size=(2, 28, 28, 1)).astype(np.float32)
    np.savez("expected.npz", images=images, logits=by_hand(there / "mine.npz", images))
    exec(PROVE, {})
    difference = float(capsys.readouterr().out.split()[-1])
    assert difference < 1e-5
    square = "mixer.proj.weight:transpose:"
    assert RULES.count(square) == 1
    (there / "mine.rules").write_text(RULES.replace(square, "mixer.proj.weight:"))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        exec(PROVE, {})
    assert float(capsys.readouterr().out.split()[-1]) > 0.01


def test_the_page_says_every_key_of_a_card():
    [section] = re.findall(r"## The card\n(.*?)\n## ", TEXT, re.S)
    assert {key for key in re.findall(r"`(\w+)`", section)} >= sources._CARD.keys()


def refusal(there, rules=RULES, model=None, without=(), change=()):
    """What is said of the file of the page under other rules, another card, or without some of its arrays."""
    (there / "mine.rules").write_text(rules)
    (there / "mine.npz.json").write_text(json.dumps(json.loads(CARD) | dict(change)))
    np.savez("mine.npz", **{n: a for n, a in dict(np.load("mine.npz")).items() if n not in without})
    with pytest.raises(InputError) as refused:
        sources.load(sources.settings_of({"model": model} if model else {}, "mine.npz"))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_hint_is_the_model_that_is_given_with_what_differs_alone(there):
    card = {"model": {"model": "vit:width=32:depth=2:heads=2:mlp=48:patch=7:eps=1e-5:pixels=signed"}}
    assert refusal(there, change=card).endswith(
        "; the file is of --model=vit:width=32:depth=2:heads=2:mlp=64:patch=7:eps=1e-5:pixels=signed"
    )
    card = {"model": {"model": "vit:width=16:depth=3:mlp=64:patch=7:eps=1e-5"}}
    text = refusal(there, change=card)
    assert "--model=vit:width=32:depth=2:mlp=64:patch=7:eps=1e-5:heads=? (how many heads" in text
    token = "cls:to=embedding/class_token:reshape=()+1+D"
    assert "pool=" not in refusal(there, RULES.replace(token, "cls:to=embedding/clas_token:reshape=()+1+D"))
    assert "the file is of images of 28 x 28: `resize`" in refusal(
        there, RULES.replace(":resize", ""), change={"shape": [35, 35, 1]}
    )


def test_what_a_file_lacks_is_said_and_what_a_split_leaves_out(there):
    short = RULES.replace("{query,key,value}/kernel", "{query,key}/kernel")
    assert "into 2 leaves, and the model has 3: name 'block_0/attention/value/kernel' in it too" in refusal(
        there, short
    )
    text = refusal(there, without=["trunk.1.ff.up.bias"])
    assert "'block_1/mlp/expand/bias' of the model's leaves has no array in the file" in text
    assert ": the file lacks it, and has the other 39: save it again with all of its arrays" in text
    assert "it is of another model" not in text
    deeper = {"model": {"model": "vit:width=32:depth=3:heads=2:mlp=64:patch=7"}}
    np.savez("mine.npz", **dict(np.load("mine.npz")) | {"trunk.1.ff.up.bias": np.zeros(64, np.float32)})
    assert "it is of another model; build that one; the file is of --model=vit:width=32:depth=2" in refusal(
        there, change=deeper
    )


@pytest.mark.parametrize("pixels", ["", ":pixels=imagenet"])
def test_a_shape_with_its_channels_first_is_said(there, pixels):
    model = json.loads(CARD)["model"]["model"] + pixels
    text = refusal(there, change={"shape": [1 if not pixels else 3, 28, 28], "model": {"model": model}})
    assert f"is channels first: write [28, 28, {3 if pixels else 1}]" in text


def test_a_misfit_of_a_reshape_names_the_word_of_the_rule_and_no_flag(there):
    text = refusal(there, RULES.replace("reshape=()+1+D", "reshape=(1+D)"))
    assert "'reshape=(1+D)' is of" in text and "--reshape" not in text


def test_positions_and_channels_that_are_brought_to_another_size_are_said_once(there, capsys):
    flags = {"source_checkpoint": "mine.npz", "model": json.loads(CARD)["model"]["model"], "target": "glyphs_digits"}
    source = sources.from_checkpoint(Settings.from_flags(**flags))
    assert source.names["embedding/position"] == "pos: reshape" and "become" not in capsys.readouterr().out
    (there / "mine.npz.json").write_text(json.dumps(json.loads(CARD) | {"shape": [42, 28, 3]}))
    source = sources.from_checkpoint(Settings.from_flags(**flags))
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in lines if "become" in line] == [
        "mine.npz: pos: positions of a grid of 4x4 become 6x4",
        "mine.npz: patchify.weight: 1 input channels become 3",
    ]
    assert source.names["embedding/position"] == "pos: reshape, resize"
    assert source.names["embedding/patch/kernel"] == "patchify.weight: transpose, channels"


def test_images_of_another_shape_have_a_remedy_in_the_names_of_the_file(there):
    flags = {"source_checkpoint": "mine.npz", "model": json.loads(CARD)["model"]["model"], "target": "glyphs_digits"}
    for rules, end in (
        (RULES, "file's card"),
        (RULES.replace(":resize", ""), "file's card, and end the rule of 'pos'"),
    ):
        (there / "mine.rules").write_text(rules)
        source = sources.from_checkpoint(Settings.from_flags(**flags))
        assert sources.positions_remedy("mine.npz", source).startswith(f"write this shape into the {end}")
    own_names = source._replace(names={"embedding/position": "embedding/position"})
    remedy = sources.positions_remedy("mine.npz", own_names)
    assert remedy.endswith("by --source_rename=embedding/position:resize") and "export" not in remedy
    assert sources.positions_remedy("runs/mine", own_names).startswith("export the source, write this shape")


def test_a_file_of_pytorch_as_a_source_is_to_be_converted_first(there):
    for name, words in (("net.pth", "convert it first: python -m experiments.convert net.pth"), ("a.txt", "or .npz")):
        (there / name).write_bytes(b"x")
        with pytest.raises(InputError) as refused:
            sources.from_checkpoint(Settings.from_flags(source_checkpoint=name, target="glyphs_digits"))
        assert f"'{name}' is a file, and no tljax checkpoint: " in str(refused.value) and words in str(refused.value)
        with pytest.raises(InputError, match="is a file, and no tljax checkpoint"):
            sources.load_fit({}, name, None)


@pytest.mark.slow
def test_the_page_ends_in_a_table_and_in_a_file_of_the_same_names(there, capsys):
    ran(COMMANDS[1], "--steps=5", "--seeds=0")
    assert "head_only" in capsys.readouterr().out
    assert len(results(there / "runs/mine")) == 3
    ran(COMMANDS[2])
    mine, again = weights.read(there / "mine.npz"), load_file(there / "mine_digits.safetensors")
    assert again.keys() == mine.keys() - {"epoch"}
    assert {n: a.shape for n, a in again.items() if "out" not in n} == {
        n: a.shape for n, a in mine.items() if n in again and "out" not in n
    }
    assert not [
        rule for rule in json.loads((there / "mine_digits.safetensors.json").read_text())["rename"] if "drop" in rule
    ]
    as_source = [f"--source_checkpoint={there / 'mine_digits.safetensors'}", "--target=sklearn_digits", "--dry_run"]
    as_source += [f"--model={json.loads(CARD)['model']['model']}", "--image_shape=28,28,1"]
    ran(
        shlex.join(
            ["python", "-m", "experiments.transfer", *as_source, "--strategies=head_only", "--workdir=runs/again"]
        )
    )
    assert "embedding/class_token" in capsys.readouterr().out


def test_heads_that_are_not_those_of_the_card_are_refused_with_the_leaf(there):
    """A fused kernel [3 x 32, 32] can be cut into any number of heads."""
    model = json.loads(CARD)["model"]["model"]
    assert "heads=2" in model
    with pytest.raises(InputError) as refused:
        ran(COMMANDS[0], f"--model={model.replace('heads=2', 'heads=4')}")
    message = str(refused.value)
    assert f"is of another model (--model={model} there" in message and message.endswith(f"give --model={model}")
    assert "'block_0/attention/key/bias' is [2, 16] there, [4, 8] here" in message


BAD = {
    "an unknown word": (
        "cls:to=a:transposed",
        "mine.rules:2:10: 'transposed' is no word of rules; nearest: 'transpose'",
    ),
    "stars that differ": ("a.*.b:to=c/b", "mine.rules:2:10: 'a.*.b' and 'c/b' have other stars"),
    "a split to one": ("qkv:split:to=a", "mine.rules:2:14: 'split' needs several paths"),
    "a join of one": ("grid:join:to=a", "mine.rules:2:1: 'join' needs several names"),
    "names and paths": ("{a,b,c}:to={d,e}", "mine.rules:2:12: 3 names and 2 paths"),
    "a brace": ("{a,b:to=c", "mine.rules:2:1: a bracket is not closed"),
    "a shape": ("a:reshape=D+(h+?)", "mine.rules:2:13: '?' is no length"),
    "a grid": ("a:resize=14*14", "mine.rules:2:10: '14*14' is none of antialias, plain, corners, linear, nor a grid"),
    "a dtype": ("a:cast=int8", "mine.rules:2:8: 'int8' is none of float32"),
    "twice": ("a:drop:drop", "mine.rules:2:8: 'drop' is given twice"),
    "two lines of a name": ("a:drop\n a:to=b", "mine.rules:3:2: line 2 is of 'a' too: keep one"),
    "nothing": ("a", "mine.rules:2:2: nothing follows the name"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_error_in_a_file_of_rules_has_its_line_and_column(case):
    text, message = BAD[case]
    with pytest.raises(InputError) as refused:
        weights.rules_of(f"# mine\n{text}\n", "mine.rules")
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


SIZES = {
    "width": ("vit:width=48:depth=2:heads=2:mlp=64:patch=7", "the model has another width"),
    "depth": ("vit:width=32:depth=3:heads=2:mlp=64:patch=7", "of the model's leaves have no array"),
    "patch": ("vit:width=32:depth=2:heads=2:mlp=64:patch=4", "'embedding/patch/kernel' is float32[4, 4, 1, 32]"),
}


@pytest.mark.parametrize("case", SIZES)
def test_a_checkpoint_of_another_size_says_which_size_it_is(case, there):
    model, message = SIZES[case]
    (there / "mine.npz.json").write_text(
        json.dumps({key: value for key, value in json.loads(CARD).items() if key != "model"})
    )
    with pytest.raises(InputError) as refused:
        transfer.run(source_checkpoint="mine.npz", model=model, target="glyphs_digits", workdir="w")
    text = str(refused.value)
    assert message in text and "\n" not in text
    assert text.endswith("; the file is of --model=vit:width=32:depth=2:heads=2:mlp=64:patch=7")


def test_a_hint_is_the_cards_model_and_what_has_no_shape_is_said(there, capsys):
    card = json.loads(CARD)
    mine = card["model"]["model"]
    flags = {"source_checkpoint": "mine.npz", "target": "glyphs_digits"}
    with pytest.raises(InputError, match=f"give --model={mine}$"):
        sources.from_checkpoint(Settings.from_flags(**flags, model="vit:width=48:depth=2:heads=2:mlp=64:patch=7"))
    (there / "mine.rules").write_text(RULES.replace("reshape=D+(heads+d)", "reshape").replace("=(heads+d)", ""))
    rules = (there / "mine.rules").read_text()
    (there / "mine.rules").write_text(rules.replace("reshape+D", "reshape"))
    with pytest.raises(InputError, match="heads=4:mlp=64:patch=7 here; 'block_0"):
        sources.from_checkpoint(Settings.from_flags(**flags, model=mine.replace("heads=2", "heads=4")))
    sources.from_checkpoint(Settings.from_flags(**flags, model=f"{mine}:eps=1e-5"))
    line = next(line for line in capsys.readouterr().out.splitlines() if "is used" in line)
    assert f"--model is {mine}:eps=1e-5 here and was" in line and "computes as --model here says" in line
    (there / "mine.rules").write_text(RULES.replace("epoch:drop\n", ""))
    with pytest.raises(InputError) as refused:  # the model is right, the rules are not: no other is advised
        sources.from_checkpoint(Settings.from_flags(**flags, model=mine))
    assert "'epoch'" in str(refused.value) and "the file is of" not in str(refused.value)


def test_other_options_of_the_same_file_are_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def model(classes, *, heads=2):\n    return ()\n")
    here = Settings.from_flags(model="mine.py:model:heads=4", source_checkpoint="w.npz", target="glyphs_digits")
    card = here.architecture()
    (tmp_path / "elsewhere").mkdir()
    assert sources._difference(here, card | {"model": "elsewhere/mine.py:model:heads=4"}) == ""
    difference = sources._difference(here, card | {"model": "elsewhere/mine.py:model:heads=2"})
    assert (
        difference
        == "--model is mine.py:model:heads=4 here and was elsewhere/mine.py:model:heads=2 when w.npz was trained"
    )


def test_a_model_that_nobody_names_is_advised(there):
    card = json.loads(CARD)
    (there / "mine.npz.json").write_text(json.dumps({name: card[name] for name in card if name != "model"}))
    with pytest.raises(InputError) as refused:
        sources.load(sources.settings_of({}, "mine.npz"))
    assert "give --model=vit:width=32:depth=2:mlp=64:patch=7:heads=?" in str(refused.value)
    assert "source_rename" not in str(refused.value)


@pytest.mark.slow
def test_weights_without_a_head_are_a_source_of_all_below_it(there, capsys):
    arrays = {name: array for name, array in weights.read(there / "mine.npz").items() if not name.startswith("out.")}
    np.savez(there / "body.npz", **arrays)
    lines = [line for line in RULES.splitlines() if not line.startswith("out.")]
    (there / "body.rules").write_text("\n".join(["# it learnt on pixels=signed", *lines]))
    card = json.loads(CARD) | {"classes": [], "head": False, "rules": "body.rules"}
    (there / "body.npz.json").write_text(json.dumps(card))
    flags = {"source_checkpoint": "body.npz", "model": card["model"]["model"], "target": "glyphs_digits"}
    settings = Settings.from_flags(**flags)
    source = sources.from_checkpoint(settings)
    flat = source.trained[0].flat
    assert "as 0 to 1, and the rules body.rules say: it learnt on pixels=signed" in capsys.readouterr().out
    assert (flat["norm/scale"] == arrays["ln_end.gain"]).all() and not flat["head/kernel"].any()
    assert plan.head_of(settings, source, data.load("glyphs_digits")) == "fresh"
    with pytest.raises(InputError, match="has no head, by its card"):
        predict.run({}, predict.PredictFlags(checkpoint="body.npz", images="mine.npz", output="p.csv"))
    export.run({}, export.ExportFlags(checkpoint="body.npz", rules="body.rules", output="again.safetensors"))
    again = load_file(there / "again.safetensors")
    assert again.keys() == arrays.keys() - {"epoch"} and all((again[name] == arrays[name]).all() for name in again)
    about = json.loads((there / "again.safetensors.json").read_text())
    assert about["head"] is False and about["classes"] == [] and "kind" not in about
    for change, message in (
        ({"classes": ["a", "b"]}, "leave one of them out"),
        ({"rules": "mine.rules"}, "matches no"),
    ):
        (there / "body.npz.json").write_text(json.dumps(card | change))
        with pytest.raises(InputError, match=message):
            sources.from_checkpoint(settings)


def changed(there, **change):
    arrays = {name: change.get(name, array) for name, array in weights.read(there / "mine.npz").items()}
    model = models.build(json.loads(CARD)["model"]["model"], 26, hidden=(), activation="relu")
    return arrays, weights.read_rules(str(there / "mine.rules")), models.abstract(model, (28, 28, 1))


def test_positions_of_a_grid_that_is_not_square_are_refused_until_a_rule_says_the_grid(there):
    arrays, rules, like = changed(there, pos=np.ones((1, 1 + 2 * 6, 32), np.float32))
    with pytest.raises(InputError) as refused:
        weights.grafted(arrays, rules, like)
    assert "'pos' is float32[1, 13, 32]" in str(refused.value)
    assert "13 positions are no square grid" in str(refused.value) and "'embedding/position'" in str(refused.value)
    assert "resize=14x28" in str(refused.value) and "mine.rules:3" in str(refused.value)
    grid_rules = [weights.rule("pos:to=embedding/position:reshape=()+n+D:resize=2x6")]
    params = weights.grafted(arrays, [*grid_rules, *(rule for rule in rules if rule.source != "pos")], like)
    np.testing.assert_allclose(params["embedding"]["position"], 1, rtol=1e-6)


def test_half_precision_needs_a_cast_and_its_infinities_are_said(there):
    half = np.full((26, 32), 0.5, np.float16)
    arrays, rules, like = changed(there, **{"out.weight": half})
    with pytest.raises(InputError, match=r"'out.weight' is float16\[32, 26\].* nothing is cast.*\*\*:cast"):
        weights.grafted(arrays, rules, like)
    cast = weights.grafted(arrays, [*rules, weights.rule("**:cast")], like)["head"]["kernel"]
    assert cast.dtype == np.float32 and (cast == 0.5).all()
    half[3, 4] = np.inf
    with pytest.raises(InputError, match=r"'out.weight' holds a number that is not finite: float16 ends at 65,504"):
        weights.grafted(arrays, [*rules, weights.rule("**:cast")], like)


def test_a_folder_of_hugging_face_says_its_rules_its_model_and_its_heads(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    about = json.loads((ROOT / "tests/layouts/hf_vit.json").read_text())
    arrays = layout_values.arrays(about["layout"])
    (tmp_path / "hf").mkdir()
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, "hf/one.safetensors")
    index = {"weight_map": dict.fromkeys(arrays, "one.safetensors")}
    (tmp_path / "hf/model.safetensors.index.json").write_text(json.dumps(index))
    labels = {str(i): f"class {i}" for i in range(5)}
    config = {"image_size": 32, "num_channels": 3, "num_attention_heads": 2, "id2label": labels}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    for model in ({}, {"model": "vit:width=16:depth=1:heads=1:patch=8"}):
        with pytest.raises(InputError) as refused:
            sources.load(sources.settings_of(model, "hf"))
        give = "give --source_rules=vit_hf --model=vit:width=32:depth=2:mlp=64:patch=8:heads=2, images of 32 x 32"
        assert give in str(refused.value) and "eps=1e-12" in str(refused.value)
    capsys.readouterr()
    for heads, is_said in ((2, False), (4, True)):
        model = f"vit:width=32:depth=2:heads={heads}:mlp=64:patch=8:eps=1e-12"
        sources.load(sources.settings_of({"source_rules": "vit_hf", "model": model}, "hf"))
        assert ("config.json of 'hf' says 2 heads" in capsys.readouterr().out) == is_said
