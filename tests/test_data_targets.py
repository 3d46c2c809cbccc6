"""Targets of any kind and inputs of any tree, from an .npz file: what they are, how they are kept, what is refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.runs import budgets, plan, sources
from experiments.runs.settings import Settings
from tljax import models
from tljax.data import draw, load
from tljax.models.linen import stage
from tljax.types import InputError, Stage, Task

RNG = np.random.default_rng(3)
X = RNG.normal(size=(30, 4))
SEVERAL = RNG.random((30, 3)) < 0.4
VALUES = RNG.normal(size=(30, 2))
TOKENS = RNG.integers(0, 7, (30, 5))
TOKENS[0, 0] = 6


def saved(folder: Path, inputs: Any = X, targets: Any = None, **changes: Any) -> str:
    """The path of an .npz file whose first 20 examples train, the others test."""
    folder.mkdir(exist_ok=True)
    arrays = {}
    for split, rows in (("train", slice(20)), ("test", slice(20, None))):
        parts = {f"/{name}": part for name, part in inputs.items()} if isinstance(inputs, dict) else {"": inputs}
        arrays |= {f"{split}_inputs{name}": part[rows] for name, part in parts.items()}
        arrays |= {} if targets is None else {f"{split}_targets": targets[rows]}
    arrays |= changes
    np.savez(folder / "d.npz", **{name: array for name, array in arrays.items() if array is not None})
    return str(folder / "d.npz")


def loaded(folder: Path, *arguments: Any, after: str = "", **changes: Any) -> Task:
    return load(saved(folder, *arguments, **changes) + after, data_dir=folder / "kept")


@pytest.mark.parametrize(
    ("targets", "kind", "outputs", "classes", "inside"),
    [
        (np.arange(30) % 3, "classes", 3, ("0", "1", "2"), (np.arange(30) % 3).astype(np.int32)),
        (SEVERAL, "labels", 3, ("0", "1", "2"), SEVERAL),
        (SEVERAL.astype(np.uint8), "labels", 3, ("0", "1", "2"), SEVERAL),
        (SEVERAL[:, :1], "labels", 1, ("0",), SEVERAL[:, :1]),
        (VALUES, "values", 2, (), VALUES.astype(np.float32)),
        (VALUES[:, 0], "values", 1, (), VALUES[:, :1].astype(np.float32)),
        (VALUES.astype(np.float16), "values", 2, (), VALUES.astype(np.float16).astype(np.float32)),
    ],
)
def test_the_kind_of_targets_follows_from_their_dtype_and_shape(
    targets: np.ndarray, kind: str, outputs: int, classes: tuple[str, ...], inside: np.ndarray, tmp_path: Path
) -> None:
    name = saved(tmp_path, X, targets)
    first, again = (load(name, data_dir=tmp_path / "kept") for _ in range(2))
    for task in (first, again):
        assert (task.kind, task.outputs, task.classes) == (kind, outputs, classes)
        for split, rows in ((task.train, slice(20)), (task.test, slice(20, None))):
            assert split.targets.dtype == inside.dtype
            np.testing.assert_array_equal(split.targets, inside[rows])
            np.testing.assert_array_equal(split.arrays, X[rows].astype(np.float32))
    assert isinstance(again.train.arrays, np.memmap) and first.fingerprint == again.fingerprint


def test_tokens_without_targets_get_those_that_follow(tmp_path: Path) -> None:
    task = loaded(tmp_path, TOKENS)
    assert (task.kind, task.outputs, task.classes) == ("tokens", 7, ())
    assert task.train.arrays.dtype == task.train.targets.dtype == np.int32
    np.testing.assert_array_equal(task.train.targets[:, :-1], TOKENS[:20, 1:])
    assert (task.train.targets[:, -1] == -1).all()
    hidden = np.where(TOKENS % 2, TOKENS, -1)
    hidden[:, 0] = 1
    written = loaded(tmp_path / "own", TOKENS, hidden, class_names=np.array(list("abcdefghi")))
    assert (written.kind, written.outputs, written.classes[-1]) == ("tokens", 9, "i")
    np.testing.assert_array_equal(written.test.targets, hidden[20:])
    # Tokens with a class an item are classes.
    assert loaded(tmp_path / "classes", TOKENS, np.arange(30) % 2).kind == "classes"


def test_several_inputs_are_a_dict_and_are_kept_as_one(tmp_path: Path) -> None:
    inputs = {"text": TOKENS, "picture": RNG.integers(0, 256, (30, 4, 4), np.uint8), "x/y": X, "kind": TOKENS[:, 0]}
    name = saved(tmp_path, inputs, VALUES)
    for task in (load(name, data_dir=tmp_path / "kept") for _ in range(2)):
        dtypes = {name: (leaf.dtype.name, leaf.shape) for name, leaf in task.train.spec.items()}
        assert dtypes == {
            **{
                "kind": ("int32", ()),
                "picture": ("uint8", (4, 4, 1)),
                "text": ("int32", (5,)),
                "x/y": ("float32", (4,)),
            }
        }
        np.testing.assert_array_equal(task.test.inputs(np.array([3, 1]))["text"], TOKENS[[23, 21]])
    bigger = load(name, data_dir=tmp_path / "kept", image_shape=(6, 6, 3))
    assert bigger.train.arrays["picture"].shape == (20, 6, 6, 3) and bigger.fingerprint != task.fingerprint
    note = loaded(tmp_path / "dark", {**inputs, "picture": np.full((30, 4, 4), 9, np.uint8)}, VALUES).note
    assert "input 'picture': all 20 training examples are the same" in note


def test_the_fingerprint_is_the_one_that_is_written_down(tmp_path: Path) -> None:
    a, b = np.array([[1.5]], np.float32), np.array([[0, 1]], np.int32)
    values = np.array([[1.0], [2.0]], np.float32)
    both = {"b": np.repeat(b, 4, axis=0), "a": np.repeat(a, 4, axis=0)}
    task = load(
        saved(tmp_path, both, train_targets=values, test_targets=values, **{
            f"{split}_inputs/{name}": np.repeat(part, 2, axis=0) for split in ("train", "test")
            for name, part in (("a", a), ("b", b))
        }), data_dir=tmp_path / "kept",
    )  # fmt: skip
    split = b'\n"a"\n<f4 [2, 1]\n' + a.tobytes() * 2 + b'\n"b"\n<i4 [2, 2]\n' + b.tobytes() * 2
    split += b"<f4 [2, 1]\n" + values.tobytes()
    assert task.fingerprint == hashlib.sha256(split * 2 + b"[]" + b"\nvalues 1\n").hexdigest()


@pytest.mark.parametrize(
    ("inputs", "targets", "changes", "words"),
    [
        (
            X,
            VALUES,
            {"test_targets": np.arange(10) % 2},
            r"train targets are float64 \[20, 2\] \(values\) and test targ",
        ),
        (X, SEVERAL, {"test_targets": VALUES[20:]}, r"bool \[20, 3\] \(labels\).*\(values\): give both splits"),
        (
            X,
            np.where(np.arange(60).reshape(30, 2) == 7, np.nan, VALUES),
            {},
            r"train: target of row 3 is nan, no finite",
        ),
        (
            X,
            np.where(np.arange(60).reshape(30, 2) == 44, np.inf, VALUES),
            {},
            r"test: target of row 2 is inf, no finite",
        ),
        (X, np.where(np.arange(60).reshape(30, 2) == 44, 1e39, VALUES), {}, r"test: target of row 2 is 1e\+39, no fin"),
        (
            X,
            VALUES,
            {"train_targets": VALUES[:7]},
            r"targets are float64 \[7, 2\], inputs are 20: give one target an i",
        ),
        (X, SEVERAL & [True, False, True], {}, r"no item has label 1: there is nothing to tell apart"),
        (X, SEVERAL | [True, False, False], {"class_names": np.array(["a", "b", "c"])}, r"all items have label 'a'"),
        (X, VALUES * [1, 0] + [0, 2], {}, r"train: value 1 is 2 in all 20 rows: there is no variance to explain"),
        (X, VALUES[:, 0], {"test_targets": np.ones(10)}, r"test: the target is 1 in all 10 rows"),
        (
            X,
            np.eye(3, dtype=int)[np.arange(30) % 3],
            {},
            r"every row.*one 1: of one-hot classes give targets.argmax\(1\)",
        ),
        (X, TOKENS[:, :1], {}, r"int64 \[20, 1\], which may be classes or values: give targets\[:, 0\]"),
        (X, SEVERAL[:, 0], {}, r"bool \[20\], which may be two classes or one label: give targets.astype\(int\)"),
        (X, TOKENS[:, :3], {}, r"row 0 holds other numbers than 0 and 1: give floats for values, bools for labels"),
        (X, np.zeros((30, 2, 2)), {}, r"targets are float64 \[20, 2, 2\]: give whole numbers \[n\] \(classes\), bools"),
        (X, np.array(["a"] * 30), {}, r"targets are <U1 \[20\]: give whole numbers"),
        (X, VALUES, {"class_names": np.array(["a"])}, r"there are 1 names of 2 values: name each, or none"),
        (X, VALUES, {"train_labels": np.arange(20) % 2}, r"has both train_labels and train_targets: keep one"),
        (X, None, {}, r"has no train labels: name an array train_labels or y_train or train_targets"),
        (TOKENS, None, {"test_targets": TOKENS[20:]}, r"has no train labels"),
        (
            X,
            None,
            {"train_labels": VALUES[:20, 0], "test_labels": VALUES[20:, 0]},
            r"or name them train_targets if they",
        ),
        (TOKENS - 1, None, {}, r"train: row \d+ holds -1, no token"),
        (TOKENS, TOKENS - 2, {}, r"train: target \d of row \d is -2, outside 0..6"),
        (TOKENS, np.where(np.arange(30)[:, None] == 4, -1, TOKENS), {}, r"row 4 has no target but -1"),
        (TOKENS, None, {"class_names": np.array(list("abcdef"))}, r"train: token 0 of row 0 is 6, outside 0..5"),
        (TOKENS, TOKENS, {"class_names": np.array(list("abcdef"))}, r"train: token 0 of row 0 is 6, outside 0..5"),
        ({"a": X, "b": TOKENS}, VALUES, {"train_inputs": X[:20]}, r"has both train_inputs and train_inputs/: keep one"),
        ({"a": X}, VALUES, {"test_inputs/a": None, "test_inputs/b": X[20:]}, r"inputs of train are 'a', of test 'b'"),
        ({"a": X}, VALUES, {"test_inputs/a": None, "test_inputs": X[20:]}, r"of train are 'a', of test one array"),
        ({"a": X}, VALUES, {"train_inputs/a": X[:19]}, r"targets are float64 \[20, 2\], inputs are 19"),
        ({"a": X, "b": X}, VALUES, {"train_inputs/b": X[:9]}, r"inputs differ in length: 'a' has 20, 'b' has 9"),
        ({"a": X}, VALUES, {"train_input/a": X[:20]}, r"has the array 'train_input/a', which nothing reads"),
        (
            X,
            VALUES,
            {"train_target": VALUES[:20]},
            r"'train_target', which nothing reads; did you mean 'train_targets'",
        ),
        (
            None,
            VALUES,
            {"train_images": TOKENS[:20], "test_images": TOKENS[20:]},
            r"name them train_inputs if they are",
        ),
    ],
)
def test_what_cannot_be_learnt_is_named_in_a_line(
    inputs: Any, targets: Any, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    if inputs is None:
        inputs, changes = X, {"train_inputs": None, "test_inputs": None, **changes}
    with pytest.raises(InputError, match=words) as error:
        loaded(tmp_path, inputs, targets, **changes)
    assert "\n" not in str(error.value)


def test_what_is_odd_in_a_split_is_said(tmp_path: Path) -> None:
    late = SEVERAL.copy()
    late[:20, 1], late[20:, 1], late[20:, 2] = False, [True, False] * 5, True
    note = loaded(tmp_path, X, late, class_names=np.array(["a", "b", "c"])).note
    assert note == "no training example has label 'b'; every test example has label 'c'"
    twice = np.concatenate([X[:29], X[:1]])
    assert (
        "1 of 10 test examples are in the training set too"
        in loaded(tmp_path / "t", {"a": twice, "b": twice}, VALUES).note
    )
    twice = np.concatenate([X[:1], X[:29]])
    assert "2 of 20 training examples are there with another target too" in loaded(tmp_path / "o", twice, VALUES).note


def test_changes_of_classes_and_of_pixels_are_refused_and_the_others_made(tmp_path: Path) -> None:
    task = loaded(tmp_path, TOKENS, after=":take=12")
    assert (task.kind, task.outputs, len(task.train)) == ("tokens", 7, 12)
    expected = draw.label_budget(0, np.zeros(20, int), 12)
    np.testing.assert_array_equal(task.train.arrays, TOKENS[:20][expected])
    shuffled = loaded(tmp_path / "v", X, VALUES, after=":shuffle_labels=1")
    plain = loaded(tmp_path / "v", X, VALUES)
    assert (shuffled.train.targets != plain.train.targets).any()
    key = lambda rows: sorted(rows.tolist())  # noqa: E731
    assert key(shuffled.train.targets) == key(plain.train.targets)
    several = loaded(tmp_path / "d", {"a": X, "b": TOKENS}, SEVERAL, after=":take=9")
    assert len(several.train.arrays["b"]) == 9 and several.kind == "labels"
    for change, arguments, words in (
        ("labels=0-1", (X, SEVERAL), "'labels' of data set .* is of classes, and these are labels"),
        ("group=0/1", (X, VALUES), "'group' .* is of classes, and these are values"),
        ("permute=1", (TOKENS,), "'permute' .* changes pixels, and these are tokens"),
        ("invert", ({"a": X}, VALUES), "'invert' .* changes pixels, and these are several inputs"),
        ("noise=1", (X, VALUES), "'noise' .* changes pixels, and these are features"),
        ("take=21", (X, VALUES), "'take=21' .* is not 1 to 20"),
    ):
        with pytest.raises(InputError, match=words):
            loaded(tmp_path / "r", *arguments, after=f":{change}")


def test_budgets_and_validation_of_what_has_no_classes_are_plain_draws(tmp_path: Path) -> None:
    task = loaded(tmp_path, X, VALUES)
    recipe = Settings.from_flags(target="x", validation=0.25).recipe
    subset, validation = plan.draw_examples(recipe, "12", task, 5)
    assert len(subset) == 9 and len(validation) == 3 and len({*subset.tolist(), *validation.tolist()}) == 12
    smaller = plan.draw_examples(recipe, "8", task, 5)
    assert set(smaller[0].tolist()) <= set(subset.tolist()) and set(smaller[1].tolist()) <= set(validation.tolist())
    with pytest.raises(InputError, match=r"--train_examples=3/class: the targets of .* are values, no classes"):
        plan.draw_examples(recipe, "3/class", task, 5)
    with pytest.raises(InputError, match=r"give 1 to 20 \(all\)"):
        plan.draw_examples(recipe, "21", task, 5)
    assert budgets.notes(["12"], task, 0.25) == []


@pytest.mark.slow
def test_a_model_is_drawn_for_any_inputs() -> None:
    seen = []

    def init(key: jax.Array, x: Any) -> Any:
        seen.append(jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), x))
        return {"table": jax.random.normal(key, (7, 3))}

    def apply(params: Any, x: Any, *, key: Any = None) -> jax.Array:
        return params["table"][x["text"]].mean(1) + x["x"].sum(-1, keepdims=True) + x["p"].mean((1, 2, 3))[:, None]

    model = (Stage("body", init, apply), stage("head", nn.Dense(2)))
    spec = {
        "text": jax.ShapeDtypeStruct((5,), jnp.int32),
        "x": jax.ShapeDtypeStruct((4,), jnp.float32),
        "p": jax.ShapeDtypeStruct((2, 2, 1), jnp.uint8),
    }
    params = models.init(model, jax.random.key(0), spec)
    assert seen[0] == {"text": ((1, 5), "int32"), "x": ((1, 4), "float32"), "p": ((1, 2, 2, 1), "float32")}
    batch = {"text": jnp.zeros((3, 5), jnp.int32), "x": jnp.ones((3, 4)), "p": jnp.full((3, 2, 2, 1), 51, jnp.uint8)}
    body = models.features(model, params, batch)[0]
    np.testing.assert_allclose(body, np.tile(np.asarray(params["body"]["table"][0]) + 4 + 0.2, (3, 1)), rtol=1e-6)


@pytest.mark.parametrize(
    "shape",
    [
        (28, 28, 1),
        jax.ShapeDtypeStruct((16,), jnp.int32),
        {"a": jax.ShapeDtypeStruct((), jnp.int32), "b": jax.ShapeDtypeStruct((4, 4, 3), jnp.uint8)},
    ],
)
def test_the_inputs_of_an_example_come_back_from_a_checkpoint(shape: Any) -> None:
    assert sources.shape_from_json(json.loads(json.dumps(sources.shape_to_json(shape)))) == shape
