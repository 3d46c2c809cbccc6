"""Weights as they lie on people's disks: mapped, sharded, of half precision, in the cache of huggingface_hub."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_programs import arguments

from experiments import transfer
from experiments.runs import sources
from tljax import weights
from tljax.types import InputError

pytestmark = pytest.mark.usefixtures("no_pictures")

RNG = np.random.default_rng(0)
ARRAYS = {
    **{"a.kernel": RNG.normal(size=(4, 3)).astype(np.float32), "b": RNG.normal(size=5).astype(ml_dtypes.bfloat16)},
    **{"c": RNG.normal(size=(2, 2)).astype(np.float16), "steps": np.array(7), "none": np.zeros((0, 3), np.float32)},
    **{"flag": np.array([True, False, True]), "float8": RNG.normal(size=3).astype(ml_dtypes.float8_e5m2)},
}


def same(arrays, known):
    return arrays.keys() == known.keys() and all(
        arrays[name].dtype == array.dtype
        and arrays[name].shape == array.shape
        and arrays[name].tobytes() == array.tobytes()
        for name, array in known.items()
    )


def is_mapped(array) -> bool:
    """Whether an array is a view of a mapped file."""
    while array is not None and not isinstance(array, np.memmap):
        array = array.base
    return array is not None


def test_safetensors_are_mapped_with_every_type(tmp_path):
    save_file(ARRAYS, tmp_path / "w.safetensors")
    arrays = weights.read(tmp_path / "w.safetensors")
    assert same(arrays, ARRAYS) and all(is_mapped(arrays[name]) for name in ARRAYS.keys() - {"none"})
    assert not arrays["b"].flags.writeable and arrays["b"] is not arrays["b"]
    weights.write(tmp_path / "again.safetensors", {**arrays, "t": arrays["a.kernel"].T})
    assert same(weights.read(tmp_path / "again.safetensors"), {**ARRAYS, "t": ARRAYS["a.kernel"].T})


def test_an_npz_is_mapped_where_it_is_stored_as_it_is(tmp_path):
    known = {name: array for name, array in ARRAYS.items() if array.dtype.kind != "V" and name != "float8"}
    known = {name: array for name, array in known.items() if name != "b"} | {"f": np.asfortranarray(ARRAYS["a.kernel"])}
    np.savez(tmp_path / "stored.npz", **known)
    np.savez_compressed(tmp_path / "packed.npz", **known)
    stored, packed = weights.read(tmp_path / "stored.npz"), weights.read(tmp_path / "packed.npz")
    assert same(stored, known) and same(packed, known)
    assert is_mapped(stored["f"]) and not is_mapped(packed["f"])
    raw = bytearray((tmp_path / "stored.npz").read_bytes())
    raw[raw.index(ARRAYS["c"].tobytes())] ^= 1
    (tmp_path / "stored.npz").write_bytes(raw)
    with pytest.raises(InputError, match=r"stored.npz' cannot be read as .npz \(Bad CRC-32 of 'c'\)"):
        weights.read(tmp_path / "stored.npz")["c"]


def test_parameters_do_not_change_with_the_file(tmp_path):
    """What becomes a leaf is in memory, whatever happens to the file in a long run."""
    file = tmp_path / "w.safetensors"
    save_file({"kernel": np.ones((3, 2), np.float32)}, file)
    params = weights.grafted(weights.read(file), [], {"kernel": np.zeros((3, 2), np.float32)})
    with file.open("r+b") as stream:
        stream.seek(-24, os.SEEK_END)
        stream.write(bytes(24))
    assert (params["kernel"] == 1).all() and not weights.read(file)["kernel"].any()


def test_float16_with_infinities_is_refused_with_its_name(tmp_path):
    array = np.ones((2, 3), np.float16)
    save_file({"head.kernel": array * np.float16(np.inf), "ok": array}, tmp_path / "w.safetensors")
    like = {"head": {"kernel": np.zeros((2, 3), np.float32)}, "ok": np.zeros((2, 3), np.float32)}
    rules = [weights.rule("head.kernel:to=head/kernel"), weights.rule("**:cast")]
    with pytest.raises(InputError, match=r"'head.kernel' holds a number that is not finite: float16 ends at 65,504"):
        weights.grafted(weights.read(tmp_path / "w.safetensors"), rules, like)


# ---- Shards


def shards(folder: Path) -> Path:
    """The arrays in two shards with their index."""
    folder.mkdir()
    names = list(ARRAYS)
    weight_map = {name: f"model-0000{1 + (i > 3)}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({name: ARRAYS[name] for name in names if weight_map[name] == shard}, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def test_shards_are_one_file_by_their_index_or_their_folder(tmp_path):
    index = shards(tmp_path / "net")
    assert same(weights.read(index), ARRAYS) and same(weights.read(tmp_path / "net"), ARRAYS)
    assert list(weights.read(index)) == list(ARRAYS)


def test_shards_without_their_usual_index_say_so(tmp_path):
    index = shards(tmp_path / "net")
    index.rename(index.with_name(f"other{weights.INDEX}"))
    with pytest.raises(InputError, match=r"another name: give its path, '.*other.safetensors.index.json'"):
        sources.settings_of({}, str(tmp_path / "net"))
    index.with_name(f"other{weights.INDEX}").unlink()
    with pytest.raises(InputError, match=rf"has shards, such as '{FIRST}', but not their index model.safetensors.ind"):
        sources.settings_of({}, str(tmp_path / "net"))


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-1], lambda _: b"", lambda _: b"no weights", lambda raw: raw + b"x"]
)
def test_a_damaged_file_is_to_be_copied_again(damage, tmp_path):
    file = tmp_path / "w.safetensors"
    save_file({"a": np.ones(3, np.float32)}, file)
    raw = file.read_bytes()
    file.write_bytes(damage(raw))
    with pytest.raises(InputError, match=r"cannot be read as safetensors .*: it is damaged, so download or copy it"):
        weights.read(file)
    file.write_bytes(raw.replace(b'"F32"', b'"Q32"'))
    with pytest.raises(InputError, match=r"Q32.*: save it again, as float32"):
        weights.read(file)


def test_what_was_written_is_read_back_before_it_takes_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("safetensors.numpy.save_file", lambda arrays, file, _: save_file({"b": arrays["a"]}, file))
    with pytest.raises(OSError, match=r"w.safetensors' does not hold the arrays that were written into it"):
        weights.write(tmp_path / "w.safetensors", {"a": np.ones(3)})
    assert not list(tmp_path.iterdir())


def changed(index: Path, **change) -> None:
    document = json.loads(index.read_text())
    entries = {**document["weight_map"], **change}
    document["weight_map"] = {name: shard for name, shard in entries.items() if shard is not None}
    index.write_text(json.dumps(document))


FIRST, SECOND = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
SHARDS = {
    "a missing shard": (lambda index: (index.parent / SECOND).unlink(), f"shard '{SECOND}' of .* is missing"),
    "a name in no shard": (lambda index: changed(index, more=FIRST), f"'more' is not in the shard '{FIRST}'"),
    "a name in the other shard": (lambda index: changed(index, b=SECOND), f"'b' is not in the shard '{SECOND}'"),
    "a name that is not in the index": (lambda index: changed(index, b=None), f"'b' of the shard '{FIRST}' is not in"),
    "a name in two shards": (
        lambda index: save_file({name: ARRAYS[name] for name in list(ARRAYS)[3:]}, index.parent / SECOND),
        f"'steps' is in two shards of .*, '{FIRST}' and '{SECOND}'",
    ),
    "a damaged shard": (
        lambda index: (index.parent / FIRST).write_bytes((index.parent / FIRST).read_bytes()[:-1]),
        f"{FIRST}' cannot be read as safetensors",
    ),
    "a shard elsewhere": (lambda index: changed(index, b="../x.safetensors"), "which is no .safetensors file beside"),
    "no JSON": (lambda index: index.write_text("{"), "is no index of shards"),
    "a list": (lambda index: index.write_text("[]"), "is no index of shards"),
    "no map": (lambda index: index.write_text('{"weight_map": {}}'), "its weight_map is none"),
    "numbers": (lambda index: index.write_text('{"weight_map": {"a": 3}}'), "its weight_map is none"),
    "deep": (lambda index: index.write_text("[" * 100_000), "is no index of shards"),
}


@pytest.mark.parametrize("case", SHARDS)
def test_shards_that_do_not_fit_are_refused_in_a_line(case, tmp_path):
    spoil, words = SHARDS[case]
    index = shards(tmp_path / "net")
    spoil(index)
    with pytest.raises(InputError, match=words) as refused:
        weights.read(tmp_path / "net")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


# ---- The cache of huggingface_hub


def cached(folder: Path, repository: str, commit: str, contents: Path, ref: str = "main") -> Path:
    """A model in a cache as huggingface_hub lays it out: blobs, and a folder of links a commit."""
    place = folder / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / ref).write_text(commit)
    snapshot = place / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (place / "blobs").mkdir(exist_ok=True)
    for number, file in enumerate(sorted(contents.iterdir())):
        blob = place / "blobs" / f"{commit[:8]}{number:032x}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache; who opens a connection fails."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("it opens a connection"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_, **__: pytest.fail("it opens a connection"))
    return tmp_path / "hub"


def test_a_model_of_the_hub_is_read_from_its_cache(hub, tmp_path):
    from huggingface_hub import scan_cache_dir

    shards(tmp_path / "net")
    other = tmp_path / "other"
    other.mkdir()
    save_file({"x": np.ones(2, np.float32)}, other / "model.safetensors")
    np.savez(other / "x.npz", x=np.zeros(2))
    cached(hub, "owner/net", "a" * 40, tmp_path / "net")
    cached(hub, "owner/net", "b" * 40, other, "v1")
    [repository] = scan_cache_dir(hub).repos  # the library takes it for its own
    assert repository.repo_id == "owner/net" and len(repository.revisions) == 2
    assert same(weights.read("hf:owner/net"), ARRAYS) and weights.is_place("hf:owner/net")
    assert weights.read("hf:owner/net@v1")["x"].tolist() == [1, 1]
    assert weights.read(f"hf:owner/net@{'b' * 40}:x.npz")["x"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("hf:owner/absent", "has no 'model.safetensors.index.json' or .* of it, and .* run `hf download owner/absent`"),
        (
            "hf:owner/net@v9",
            "of the revision 'v9', and nothing .* run `hf download owner/net` with `revision=v9` first",
        ),
        ("hf:owner/net:y.npz", "has no 'y.npz' of it, .*: run `hf download owner/net` first"),
        ("hf:net", "write hf:OWNER/NAME, hf:OWNER/NAME@REVISION or hf:OWNER/NAME:FILE"),
        ("hf:owner/net:", "write hf:OWNER/NAME"),
        ("hf:/net", "write hf:OWNER/NAME"),
        ("hf:owner/a..b", "is no name of a model"),
    ],
)
def test_what_the_cache_has_not_is_one_line(place, words, hub, tmp_path):
    shards(tmp_path / "net")
    cached(hub, "owner/net", "a" * 40, tmp_path / "net")
    with pytest.raises(InputError, match=words) as refused:
        weights.read(place)
    assert "\n" not in str(refused.value)


def test_without_its_library_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"python -m pip install 'tljax\[hub\]'"):
        weights.read("hf:owner/net")


def mlp(folder: Path, **config) -> Path:
    """A folder of a net for the tasks of the tests, in half precision, with its config.json."""
    folder.mkdir()
    shapes = {"hidden_0/kernel": (36, 8), "hidden_0/bias": (8,), "head/kernel": (8, 4), "head/bias": (4,)}
    arrays = {name: RNG.normal(size=shape).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}
    save_file(arrays, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


CONFIG = {"id2label": {"1": "crane", "0": "cat", "3": "dog", "2": "crane"}, "image_size": 6, "num_channels": 1}


def test_a_model_of_the_hub_is_a_source_like_any_other(hub, tasks, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cached(hub, "owner/net", "c" * 40, mlp(tmp_path / "net", **CONFIG))
    flags = arguments(tasks, tmp_path / "w", source=None, source_checkpoint="hf:owner/net", seeds=(0,))
    transfer.run(**flags | {"source_rename": ("**:cast",), "dry_run": True})
    output = capsys.readouterr().out
    assert output.count("config.json of 'hf:owner/net' says its classes, 4, and its shape, (6, 6, 1)") == 1
    assert output.count("several classes are called 'crane'") == 1
    sources.load(sources.settings_of({"hidden": (8,), "source_rename": ("**:cast",), "seeds": (0,)}, "hf:owner/net"))
    output = capsys.readouterr().out
    assert output.count("config.json of 'hf:owner/net' says") == 1 == output.count("several classes are called 'crane'")
    assert sources.weights_card(Path("hf:owner/net"))["classes"] == ["cat", "crane", "crane (2)", "dog"]
    card = {"task": "mine", "classes": list("wxyz"), "shape": [6, 6, 1]}
    Path("owner--net.json").write_text(json.dumps(card))
    assert sources.weights_card(Path("hf:owner/net@main")) == card
    assert sources.weights_card(Path("net")) == {**sources.weights_card(Path("net")), "task": "net"}


def test_a_folder_without_what_a_card_says_asks_for_it(tmp_path):
    folder = mlp(tmp_path / "net", image_size=6)
    with pytest.raises(InputError, match=r"does not say classes of .*: write '.*net.json', such as \{"):
        sources.weights_card(folder)
    timm = mlp(tmp_path / "timm", num_classes=4, pretrained_cfg={"input_size": [1, 6, 6]})
    assert sources.weights_card(timm)["shape"] == [6, 6, 1]
    assert sources.weights_card(timm)["classes"] == ["0", "1", "2", "3"]


def test_an_index_has_the_card_of_its_folder(tmp_path):
    index = shards(tmp_path / "net")
    (tmp_path / "net" / "config.json").write_text(json.dumps(CONFIG))
    assert sources.weights_card(index) == {**sources.weights_card(tmp_path / "net"), "task": str(index)}
    cards = [{"task": name, "classes": ["a", "b"], "shape": [6, 6, 1]} for name in ("folder", "index")]
    for place, card in zip((tmp_path / "net.json", index.with_name(f"{index.name}.json")), cards, strict=True):
        place.write_text(json.dumps(card))
        assert sources.weights_card(index) == card
    assert sources.weights_card(tmp_path / "net") == cards[0]


def test_a_config_that_is_no_json_or_not_there_is_said(tmp_path):
    folder = mlp(tmp_path / "net", image_size=6)
    (folder / "config.json").write_text("{,")
    with pytest.raises(InputError, match=r"config.json' is no JSON \(.*\): download it again, or write"):
        sources.weights_card(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config.json' does not say classes, shape of"):
        sources.weights_card(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config.json' is not there: write '.*net.json'"):
        sources.weights_card(folder)


def test_a_card_with_a_shape_beyond_all_memory_is_refused(tmp_path):
    file = tmp_path / "w.safetensors"
    save_file({"a": np.ones(3, np.float32)}, file)
    for shape in ([28_000_000_000, 28_000_000_000, 1], {"dtype": "int32", "shape": [2**31]}):
        card = {"task": "t", "classes": ["a", "b"], "shape": shape}
        file.with_name(f"{file.name}.json").write_text(json.dumps(card))
        with pytest.raises(InputError, match=r"more than 2,147,483,647 numbers an example"):
            sources.weights_card(file)


# ---- Memory

PEAK = """
import json, resource, sys
from experiments.runs import sources
hidden = tuple(json.loads(sys.argv[2]))
flags = {"seeds": (0,), "hidden": hidden, "source_rename": ("**:cast",)}
loaded = sources.load(sources.settings_of(flags, sys.argv[1]))
assert all(leaf.dtype == "float32" and leaf.any() for stage in loaded.params.values() for leaf in stage.values())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def peak(folder: Path, hidden: list[int], dtype) -> tuple[int, int]:
    """(bytes of a file of weights, the most memory of a process that makes parameters of it)."""
    folder.mkdir()
    sizes = [784, *hidden, 10]
    names = [*(f"hidden_{i}" for i in range(len(hidden))), "head"]
    arrays = {}
    for name, rows, columns in zip(names, sizes, sizes[1:], strict=False):
        arrays |= {f"{name}/kernel": np.ones((rows, columns), dtype), f"{name}/bias": np.ones(columns, dtype)}
    weights.write(folder / "w.safetensors", arrays)
    card = {"task": "t", "classes": list("0123456789"), "shape": [28, 28, 1]}
    (folder / "w.safetensors.json").write_text(json.dumps(card))
    command = [sys.executable, "-c", PEAK, str(folder / "w.safetensors"), json.dumps(hidden)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    return (folder / "w.safetensors").stat().st_size, int(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_file_takes_little_more_memory_than_its_parameters(tmp_path):
    """1.3 times the float32 parameters, beyond what a process takes for a small file, whatever the file's type."""
    _, small = peak(tmp_path / "small", [8], np.float32)
    size, single = peak(tmp_path / "single", [2048] * 12, np.float32)
    half_size, half = peak(tmp_path / "half", [2048] * 12, ml_dtypes.bfloat16)
    assert size > 190e6 and half_size < 0.51 * size
    assert single - small < 1.3 * size and half - small < 1.3 * size
