"""A delta and its base give the parameters back to the bit, and no other base does."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_programs import arguments

from experiments import apply, export, predict, pretrain, transfer
from experiments.runs import directory, sources
from tljax.types import InputError
from tljax.weights import delta

pytestmark = pytest.mark.usefixtures("no_pictures")

QUIET, OTHER = (np.array([bits], np.uint32).view(np.float32)[0] for bits in (0x7FC00000, 0x7FC00001))


def bits(flat):
    return {path: (str(leaf.dtype), leaf.shape, leaf.tobytes()) for path, leaf in flat.items()}


def test_every_bit_comes_back():
    rng = np.random.default_rng(0)
    base = {
        **{"body/kernel": rng.normal(size=(50, 4)).astype(np.float32), "body/bias": np.zeros(6, np.float32)},
        **{"nan": np.array([QUIET, QUIET, 1, 2, 3, 4], np.float32), "half": np.ones((3, 30), ml_dtypes.bfloat16)},
        **{
            "same": np.array([QUIET, -0.0]),
            "gone": np.ones(2),
            "wide": np.ones(3, np.float32),
            "none": np.ones((0, 2)),
        },
    }
    params = {path: leaf.copy() for path, leaf in base.items() if path != "gone"} | {"new": np.arange(3)}
    params["body/kernel"][7, 2] = 5
    params["body/bias"][:] = -0.0
    params["nan"][1] = OTHER
    params["half"][2, 29] = -0.0
    params["wide"] = params["wide"].astype(np.float64)
    arrays, record = delta.between(base, params)
    assert arrays.keys() == {
        *("places/body/kernel", "values/body/kernel", "whole/body/bias", "places/nan", "values/nan"),
        *("places/half", "values/half", "whole/wide", "whole/new"),
    }
    assert arrays["places/body/kernel"].tolist() == [30] and arrays["places/nan"].tolist() == [1]
    assert record["dropped"] == ["gone"]
    again = delta.applied(base, arrays, record)
    assert bits(again) == bits(params) and again["nan"].tobytes() != base["nan"].tobytes()


def test_the_smaller_form_is_chosen():
    """A place takes four bytes: of half of the float32 and of a third of the bfloat16 the whole is no larger."""
    for dtype, most in ((np.float32, 49), (np.float64, 66), (ml_dtypes.bfloat16, 33)):
        base = {"a": np.zeros(100, dtype)}
        for count in (1, most, most + 1, 100):
            params = {"a": np.where(np.arange(100) < count, 1, 0).astype(dtype)}
            arrays, _ = delta.between(base, params)
            assert ("places/a" in arrays) == (count <= most)


def damaged(**change):
    base = {"a": np.zeros(100, np.float32)}
    params = {"a": np.eye(1, 100, 7, np.float32)[0]}
    arrays, record = delta.between(base, params)
    return base, {**arrays, **{name.replace("__", "/"): array for name, array in change.items()}}, record


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"places__a": np.array([100], np.uint32)}, "places of 'a' are not within its 100 numbers"),
        ({"places__a": np.array([-1])}, "places of 'a' are not within"),
        ({"values__a": np.ones(1)}, "values of 'a' are not of"),
        ({"values__a": np.ones(2, np.float32)}, "values of 'a' are not of"),
        ({"values__a": np.full(1, 2, np.float32)}, "gives parameters of the digest"),
        ({"places__b": np.zeros(1, np.uint32)}, "values of 'b' are not of 'a'"),
        ({"other__a": np.zeros(1)}, "has the array 'other/a', which no delta has"),
        ({"whole__b": np.zeros(1)}, "gives parameters of the digest"),
    ],
)
def test_a_delta_that_is_not_as_it_was_is_refused(change, words):
    with pytest.raises(InputError, match=words):
        delta.applied(*damaged(**change))


def names(results):
    return {result.strategy.partition(":")[0]: result.name for result in results if result.seed == 0}


@pytest.mark.slow
def test_what_a_fit_changed_and_its_source_give_the_fit(tasks, tmp_path, capsys):
    flags = {"strategies": ("head_only", "random_mask:fraction=0.02"), "seeds": (0, 1), "steps": 3, "epochs": None}
    transfer.run(**arguments(tasks, tmp_path / "run", **flags))
    fits = names(directory.results(tmp_path / "run"))
    place, fit = f"--checkpoint={tmp_path / 'run'}", f"--fit={fits['random_mask']}"
    whole, small, again = (tmp_path / f"{name}.safetensors" for name in ("whole", "small", "again"))
    export.main(["export", place, fit, f"--output={whole}"])
    export.main(["export", place, fit, "--delta", f"--output={small}"])
    arrays = load_file(small)
    sparse = sum(name.startswith("places/") for name in arrays)
    assert f"of 4 leaves 2 are written whole and {sparse} as places and values" in capsys.readouterr().out
    assert arrays.keys() >= {"whole/head/kernel", "places/hidden_0/kernel", "values/hidden_0/kernel"}
    assert len(arrays["places/hidden_0/kernel"]) < 0.1 * load_file(whole)["hidden_0/kernel"].size
    base, base_fit = f"--base={tmp_path / 'run'}", f"--base_fit={fits['pretrain']}"
    apply.main(["apply", str(small), base, base_fit, f"--output={again}"])
    assert bits(load_file(again)) == bits(load_file(whole))
    cards = [sources.weights_card(file) for file in (again, whole)]
    assert {**cards[0], "sha256": None} == {**cards[1], "sha256": None}
    digests = r"the delta is of the base [0-9a-f]{64}, and this is [0-9a-f]{64}: give the same base"
    with pytest.raises(InputError, match=digests) as refused:
        other = f"--base_fit={fits['pretrain'].replace('seed0', 'seed1').rpartition('-')[0]}"
        apply.main(["apply", str(small), base, other, f"--output={tmp_path / 'other.safetensors'}"])
    assert "\n" not in str(refused.value) and not (tmp_path / "other.safetensors").exists()
    probe = tmp_path / "probe.safetensors"
    export.main(["export", place, f"--fit={fits['head_only']}", "--delta", f"--output={probe}"])
    assert load_file(probe).keys() == {"whole/head/bias", "whole/head/kernel"}
    with pytest.raises(InputError, match=r"is a delta, .*: put them together with experiments\.apply"):
        predict.main(["predict", f"--checkpoint={probe}", "--images=x", "--output=y.csv"])


@pytest.mark.slow
def test_the_base_is_the_checkpoint_that_the_run_started_from(tasks, tmp_path):
    pretrain.run(source=str(tasks / "digits.npz"), hidden=(8,), steps=2, seeds=(0, 1), workdir=str(tmp_path / "from"))
    run_flags = arguments(tasks, tmp_path / "run", source=None, source_checkpoint=str(tmp_path / "from"))
    results = transfer.run(**run_flags | {"strategies": ("bias_only",), "seeds": (1,), "steps": 2, "epochs": None})
    fit = next(result.name for result in results if result.strategy == "bias_only")
    place, expected = sources.started_from(str(tmp_path / "run"), fit)
    assert place.startswith(str(tmp_path / "from")) and "seed1" in expected
    small = tmp_path / "small.safetensors"
    export.main(["export", f"--checkpoint={tmp_path / 'run'}", f"--fit={fit}", "--delta", f"--output={small}"])
    assert load_file(small).keys() == {"whole/hidden_0/bias", "whole/head/bias", "whole/head/kernel"}
    scratch = next(result.name for result in results if result.strategy == "scratch")
    with pytest.raises(InputError, match="started from is not known: name its base with --base"):
        sources.started_from(str(tmp_path / "run"), scratch)


@pytest.fixture
def files(tmp_path):
    """A file of weights, another, and the delta between them, by the programs."""
    rng = np.random.default_rng(0)
    card = {"task": "digits", "classes": list("abcd"), "shape": [6, 6, 1], "model": {"model": "mlp", "hidden": [8]}}
    shapes = {"hidden_0/kernel": (36, 8), "hidden_0/bias": (8,), "head/kernel": (8, 4), "head/bias": (4,)}
    flat = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    for name in ("base", "other"):
        save_file(flat, tmp_path / f"{name}.safetensors")
        directory.write_record(tmp_path / f"{name}.safetensors.json", card)
        flat = {**flat, "head/bias": flat["head/bias"] + 1}
    argv = [f"--checkpoint={tmp_path / 'other.safetensors'}", f"--base={tmp_path / 'base.safetensors'}"]
    export.main(["export", *argv, "--delta", f"--output={tmp_path / 'small.safetensors'}"])
    return tmp_path


def test_two_files_of_weights_have_a_delta(files):
    out, base = files / "out.safetensors", files / "base.safetensors"
    apply.main(["apply", f"--delta={files / 'small.safetensors'}", f"--base={base}", f"--output={out}"])
    assert bits(load_file(out)) == bits(load_file(files / "other.safetensors"))


def spoilt_card(folder):
    card = json.loads((folder / "small.safetensors.json").read_text())
    card["delta"]["base_sha256"] = "0" * 64
    (folder / "small.safetensors.json").write_text(json.dumps(card))


def signed_card(folder):
    card = directory.read_record(folder / "small.safetensors.json")
    directory.write_record(folder / "small.safetensors.json", card | {"delta": {"base": 3}})


def test_a_base_of_several_fits_is_chosen_by_its_own_flag(files, monkeypatch):
    def refuse(*_):
        raise InputError("'runs/own' holds 2 fits, 'a', 'b': choose one with --fit=NAME")

    monkeypatch.setattr(sources, "load_weights", refuse)
    with pytest.raises(InputError, match=r"choose one with --base_fit=NAME$"):
        apply.main(
            ["apply", str(files / "small.safetensors"), "--base=runs/own", f"--output={files / 'o.safetensors'}"]
        )


BAD = {
    "no delta": (lambda _: None, {"delta": "base.safetensors"}, "says of no delta"),
    "not there": (lambda _: None, {"delta": "none.safetensors"}, "name a .safetensors file that"),
    "no base": (lambda _: None, {"base": None}, "--delta and --base are needed"),
    "a base that is not there": (lambda _: None, {"base": "none.safetensors"}, "--base=.*none.safetensors"),
    "itself": (lambda _: None, {"base": "small.safetensors"}, "is a delta"),
    "another base": (
        lambda _: None,
        {"base": "other.safetensors"},
        "is of the base [0-9a-f]{64}, and this is [0-9a-f]",
    ),
    "a card that was changed": (spoilt_card, {}, "is not as it was written"),
    "a card of another form": (signed_card, {}, "delta"),
    "another file": (
        lambda folder: (folder / "small.safetensors").write_bytes((folder / "base.safetensors").read_bytes()),
        {},
        "is not as it was written, or has another's card",
    ),
    "an output that is there": (lambda _: None, {"output": "base.safetensors"}, "exists already"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_apply_cannot_put_together_is_refused_in_a_line(case, files):
    spoil, change, words = BAD[case]
    spoil(files)
    flags = {"delta": "small.safetensors", "base": "base.safetensors", "output": "out.safetensors"} | change
    with pytest.raises(InputError, match=words) as refused:
        apply.main(["apply", *(f"--{name}={files / file}" for name, file in flags.items() if file)])
    assert "\n" not in str(refused.value) and not (files / "out.safetensors").exists()


def test_flags_of_a_delta_without_a_delta_are_refused(files):
    argv = ["export", f"--checkpoint={files / 'other.safetensors'}", f"--output={files / 'x.safetensors'}"]
    for more, words in (
        ([f"--base={files / 'base.safetensors'}"], "--base is of --delta"),
        (["--delta"], "--base is not given"),
        (["--delta", "--rules=vit_hf"], "a delta has the names of the model"),
    ):
        with pytest.raises(InputError, match=words):
            export.main([*argv, *more])
