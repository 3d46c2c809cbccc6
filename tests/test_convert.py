"""Files of PyTorch are read without PyTorch and without running what is in them; convert makes safetensors of them."""

import io
import json
import re
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import deserialize

from experiments import convert
from experiments.runs import sources
from tljax import weights
from tljax.types import InputError
from tljax.weights import pytorch

FOLDER = Path(__file__).parent / "weights"
KNOWN = {
    name: (part["shape"], bytes(part["data"]))
    for name, part in deserialize((FOLDER / "pytorch_known.safetensors").read_bytes())
}
"""{name: (shape, bytes)} as safetensors' own library has what PyTorch wrote."""


def same(arrays, names):
    """Whether arrays have the shapes and bytes of the known ones of these names."""
    return arrays.keys() == set(names) and all(
        list(arrays[name].shape) == KNOWN[name][0] and arrays[name].tobytes() == KNOWN[name][1] for name in names
    )


def test_both_forms_have_the_bytes_that_safetensors_has():
    archive = pytorch.state(pytorch.load(FOLDER / "pytorch_archive.pth")).arrays
    assert same(archive, KNOWN)
    assert archive["bfloat16"].dtype == ml_dtypes.bfloat16 and archive["float8"].dtype == ml_dtypes.float8_e4m3fn
    assert np.shares_memory(archive["base"], archive["part"]) and not archive["base"].flags.writeable
    sequence = pytorch.state(pytorch.load(FOLDER / "pytorch_sequence.pth")).arrays
    assert same(sequence, KNOWN.keys() - {"uint16", "float8"})


def test_convert_writes_them_with_a_card(tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    convert.main(["convert", str(FOLDER / "pytorch_archive.pth"), f"--output={out}"])
    written = {name: (part["shape"], bytes(part["data"])) for name, part in deserialize(out.read_bytes())}
    assert written == KNOWN and out.stat().st_mode & 0o777 == 0o644
    card = json.loads((tmp_path / "out.safetensors.json").read_text())
    assert card["source"]["file"] == "pytorch_archive.pth" and len(card["source"]["sha256"]) == 64
    assert "lacks task, classes, shape" in capsys.readouterr().out
    with pytest.raises(InputError, match="must say task, classes, shape"):
        sources.weights_card(out)


def test_the_dict_of_a_model_is_found_or_chosen(tmp_path, capsys):
    net = pytorch.state(pytorch.load(FOLDER / "pytorch_checkpoint.pt"))
    assert net.key == "state_dict" and len(net.arrays) == 7
    assert net.left == ("optimizer", "generator", "epoch", "args")
    optimizer = pytorch.state(pytorch.load(FOLDER / "pytorch_checkpoint.pt"), "optimizer.state.0")
    assert list(optimizer.arrays) == ["momentum_buffer"]
    averaged = pytorch.load(FOLDER / "pytorch_averaged.bin")
    with pytest.raises(InputError, match=r"'model \(7 arrays\)', 'model_ema \(7 arrays\)': choose with `key=`"):
        pytorch.state(averaged)
    with pytest.raises(InputError, match="`key=mode` is not in"):
        pytorch.state(averaged, "mode")
    model, average = (pytorch.state(averaged, key).arrays for key in ("model", "model_ema"))
    np.testing.assert_array_equal(average["0.weight"], model["0.weight"] / 2)
    whole = pytorch.state(averaged, pytorch.WHOLE)
    assert len(whole.arrays) == 14 and "args.rates.0" in whole.others
    flags = [f"--output={tmp_path / 'e.safetensors'}", "--task=digits", "--shape=3", "--model=mlp", "--key=model_ema"]
    (tmp_path / "classes.txt").write_text("cat\ncrane\n\ncrane\n")
    file = FOLDER / "pytorch_averaged.bin"
    convert.main(["convert", f"--file={file}", *flags, f"--classes={tmp_path / 'classes.txt'}"])
    assert "left out are 'model', 'epoch', 'args'" in capsys.readouterr().out
    card = sources.weights_card(tmp_path / "e.safetensors")
    assert card["classes"] == ["cat", "crane", "crane (2)"] and card["source"]["key"] == "model_ema"
    with pytest.raises(InputError, match=r"choose with --key, or --key=\. for all"):
        convert.main(["convert", str(file), f"--output={tmp_path / 'f.safetensors'}"])


def test_a_package_is_found_by_its_name(tmp_path, monkeypatch):
    info = tmp_path / "site" / "tiny_net-1.2.dist-info"
    info.mkdir(parents=True)
    (tmp_path / "site" / "tiny_net").mkdir()
    for name in ("a.pth", "b.pth"):
        (tmp_path / "site" / "tiny_net" / name).write_bytes((FOLDER / "pytorch_archive.pth").read_bytes())
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-net\nVersion: 1.2\nLicense: UNKNOWN\n")
    (info / "LICENSE").write_text("\nApache License 2.0\nmore\n")
    (info / "RECORD").write_text(
        "".join(f"{name},,\n" for name in ("tiny_net/a.pth", "tiny_net/b.pth", f"{info.name}/LICENSE"))
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(InputError, match=r"'a.pth', 'b.pth': choose one as tiny-net/FILE"):
        convert.main(["convert", "tiny-net", f"--output={tmp_path / 'out.safetensors'}"])
    convert.main(["convert", "tiny-net/b.pth", f"--output={tmp_path / 'out.safetensors'}"])
    source = json.loads((tmp_path / "out.safetensors.json").read_text())["source"]
    assert (source["file"], source["package"], source["version"]) == ("b.pth", "tiny-net", "1.2")
    assert source["licence"] == "Apache License 2.0 (the first line of its licence)"


@pytest.mark.parametrize("name", ["__metadata__", "", "..", "a\nb", "\udcff"])
def test_a_name_that_no_file_gives_back_is_refused_before_anything_is_written(name, tmp_path):
    word = name.encode("utf-8", "surrogatepass")
    (tmp_path / "x.pth").write_bytes(archive(b"\x80\x02}X" + struct.pack("<I", len(word)) + word + tensor() + b"s."))
    with pytest.raises(InputError, match=r"^array '.*' has a name that a .safetensors file cannot give back: rename"):
        convert.main(["convert", str(tmp_path / "x.pth"), f"--output={tmp_path / 'out.safetensors'}"])
    assert [file.name for file in tmp_path.iterdir()] == ["x.pth"]


def folder_of(tmp_path, *names):
    folder = tmp_path / "net"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"{}")
    return folder


SHARD = "model-00001-of-00002.safetensors"
ASKED = {
    "a model": (["--model=nomodel"], "--model=nomodel: unknown model 'nomodel'"),
    "a size of a model": (["--model=vit:size=Q"], "--model=vit:size=Q: "),
    "rules": (["--rules=norules"], "--rules=norules: there are no rules 'norules'"),
    "a shape": (["--shape=99999999999999999999,1,1"], "--shape: 'shape' is .9*, 1, 1., more than 2,147,483,647"),
}


@pytest.mark.parametrize("case", ASKED)
def test_what_the_card_would_say_is_checked(case, tmp_path):
    flags, words = ASKED[case]
    with pytest.raises(InputError, match=words) as refused:
        convert.main(["convert", str(FOLDER / "pytorch_archive.pth"), f"--output={tmp_path / 'o.safetensors'}", *flags])
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("names", "file", "words"),
    [
        (
            (SHARD,),
            "",
            "in shards need no conversion; experiments.transfer takes their folder or index as --source_checkpoint",
        ),
        ((f"x{weights.INDEX}",), f"x{weights.INDEX}", "in shards need no conversion"),
        (("pytorch_model-00001-of-00002.bin",), "", "is a folder, and one file is converted"),
        (("pytorch_model.bin.index.json",), "pytorch_model.bin.index.json", "is an index of shards, and one file is"),
    ],
)
def test_several_files_are_not_converted_and_it_is_said_what_to_do(names, file, words, tmp_path):
    folder = folder_of(tmp_path, *names)
    if file.endswith(weights.INDEX):
        (folder / SHARD).write_bytes(b"")
    with pytest.raises(InputError, match=words):
        convert.main(["convert", str(folder / file), f"--output={tmp_path / 'o.safetensors'}"])
    with pytest.raises(
        InputError, match=r"of the hub need no conversion; experiments.transfer takes this place as --source_checkpoint"
    ):
        convert.main(["convert", "hf:owner/net", f"--output={tmp_path / 'o.safetensors'}"])


# ---- What is refused


def archive(program: bytes, storage: bytes = bytes(24), **more: bytes) -> bytes:
    """A file of the newer form around a program."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", more.pop("method", zipfile.ZIP_STORED)) as writer:
        for name, data in {"x/data.pkl": program, "x/byteorder": b"little", "x/data/0": storage, **more}.items():
            writer.writestr(name, data)
    return out.getvalue()


def text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word)) + word.encode()


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(6) + b"tQ"


def tensor(start: int = 0, shape=(2, 3), strides=(3, 1), storage: bytes = STORAGE) -> bytes:
    """The opcodes of a tensor of six float32."""
    rest = number(start) + numbers(*shape) + numbers(*strides) + b"\x89" + b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"


def dict_of(value: bytes, name: str = "w") -> bytes:
    """A program that leaves a dict of one entry."""
    return b"\x80\x02}" + text(name) + value + b"s."


SYSTEM = b"cposix\nsystem\n(" + text("touch ran") + b"tR"
BAD = {
    "a call": (archive(dict_of(SYSTEM)), "holds code: it calls posix.system at byte 9 of x/data.pkl; it is not read"),
    "a call before the tensors": (
        archive(b"\x80\x02" + SYSTEM + b"0" + dict_of(tensor())[2:]),
        "it calls posix.system at",
    ),
    "a call by names on the stack": (
        archive(dict_of(text("os") + text("system") + b"\x93)R")),
        "it calls os.system at",
    ),
    "a call in the older form": (b"\x80\x02" + SYSTEM + b".", "it calls posix.system at byte 2;"),
    "an object": (archive(dict_of(b"c__main__\nNet\n)\x81")), "it calls __main__.Net"),
    "an old object": (archive(dict_of(b"(iposix\nsystem\n")), "opcode 0x69, which makes an object"),
    "an object changed": (archive(dict_of(tensor() + b"}b")), "it changes an object"),
    "a text that is called": (archive(dict_of(text("x") + b")R")), "it calls what is no function"),
    "a known name in another's place": (archive(dict_of(b"ctorch\nFloatStorage\n)R")), "torch.FloatStorage"),
    "an extension": (archive(dict_of(b"\x82\x01")), "opcode 0x82, which names a function"),
    "a persistent text": (archive(dict_of(b"Px\n")), "opcode 0x50, which names an object outside the file"),
    "protocol 0": (archive(b"\x80\x00" + dict_of(tensor())[2:]), "it has protocol 0"),
    "big-endian": (archive(dict_of(tensor()), **{"x/byteorder": b"big"}), "byte order is big, not little"),
    "a program of TorchScript": (
        archive(dict_of(tensor()), **{"x/code/net.py": b""}),
        "it is a program of TorchScript",
    ),
    "packed": (archive(dict_of(tensor()), method=zipfile.ZIP_DEFLATED), "is packed or encrypted"),
    "no storage": (archive(dict_of(tensor())).replace(b"x/data/0", b"x/data/1"), "lacks the storage 0"),
    "a bit of a storage": (
        archive(dict_of(tensor()), b"\1" * 24).replace(b"\1" * 24, b"\1" * 23 + b"\3"),
        "its checksum",
    ),
    "a storage too short": (archive(dict_of(tensor()), bytes(20)), "'w' is larger than its storage"),
    "too large": (archive(dict_of(tensor(shape=(3, 3)))), "larger than its storage"),
    "from too far": (archive(dict_of(tensor(start=1))), "larger than its storage"),
    "a stride of 0": (
        archive(dict_of(tensor(shape=(10**6, 10**6), strides=(0, 0)))),
        "'w' has fewer numbers than its shape (expanded): save it contig",
    ),
    "conjugated": (
        archive(dict_of(tensor().replace(b")RtR", b")R\x88tR"))),
        "'w' is kept conjugated or negated: save it resolved",
    ),
    "a negative stride": (archive(dict_of(tensor(strides=(-3, 1)))), "it has a tensor of no shape"),
    "a shape beyond all": (archive(dict_of(tensor(shape=(2**62, 2)))), "it has a tensor of no shape"),
    "no tensor": (archive(dict_of(number(3))), "holds no dict of arrays"),
    "a tensor alone": (archive(b"\x80\x02" + tensor() + b"."), "holds no dict of arrays"),
    "a name twice": (
        archive(b"\x80\x02}(" + text("a.b") + tensor() + text("a") + dict_of(tensor(), "b")[2:-1] + b"u."),
        "two arrays of the name 'a.b'",
    ),
    "cut in a text": (archive(b"\x80\x02}X" + struct.pack("<I", 2**32 - 1) + b"w"), "it is cut short"),
    "a huge number": (archive(b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1)), "a number of more than 64 bytes"),
    "an empty stack": (archive(b"\x80\x02\x86."), "its stack is empty"),
    "under the mark": (archive(b"\x80\x02N(\x85."), "its stack is empty"),
    "no mark": (archive(b"\x80\x02t."), "its stack has no mark"),
    "nothing remembered": (archive(b"\x80\x02h\x07."), "refers to what it has not named"),
    "a key of tuples": (archive(b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"Ns."), "a key that is no text"),
    "deep": (archive(dict_of(b"]" * 100_000 + b"a" * 99_999)), "holds no dict of arrays"),
    "deep dicts": (archive(b"\x80\x02" + b"}X\1\0\0\0a" * 30 + tensor() + b"s" * 30 + b"."), "holds no dict of arrays"),
    "within itself": (
        archive(b"\x80\x02}q\1(" + text("w") + tensor() + text("me") + b"h\1u."),
        "names of more than|more than 20 deep",
    ),
    "no archive of PyTorch": (archive(b"").replace(b"data.pkl", b"data.txt"), "an archive without a data.pkl"),
    "empty": (b"", "it is empty"),
    "noise": (b"\x1f\x8b" + bytes(50), "it begins as no file of PyTorch does"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_file_of_tensors_is_refused_in_a_line(case, tmp_path, monkeypatch):
    raw, words = BAD[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pth").write_bytes(raw)
    with pytest.raises(InputError, match=words.replace("(", r"\(").replace(")", r"\)")) as refused:
        pytorch.state(pytorch.load(tmp_path / "x.pth"))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500 and not (tmp_path / "ran").exists()


def test_a_net_saved_whole_is_code():
    with pytest.raises(InputError, match=r"calls torch.nn.modules.container.Sequential .*model.state_dict\(\)"):
        pytorch.load(FOLDER / "pytorch_whole.pt")


def laughs(levels: int, width: int) -> bytes:
    """Dicts of which each holds the former several times: small, and of width ** levels entries if it is walked."""
    program = b"}" + text("w") + tensor() + b"sq\0"
    for level in range(1, levels):
        entries = b"".join(text(f"{level}{n}") + b"h" + bytes([level - 1]) for n in range(width))
        program += b"0}(" + entries + b"uq" + bytes([level])
    return archive(b"\x80\x02" + program + b".")


LARGE = STORAGE.replace(number(6), number(10_000))
BOMBS = {
    "dicts of dicts": laughs(12, 60),
    "a list copied again and again": archive(
        b"\x80\x02](" + b"N" * 50_000 + b"eq\0" + b"0ctorch\nSize\nq\1" + b"0h\1h\0\x85R" * 50_000 + b"."
    ),
    "long names": archive(
        b"\x80\x02}" + text("n" * 100_000) + b"}(" + b"".join(text(str(n)) + b"}" for n in range(20_000)) + b"us."
    ),
    "arrays of one storage": archive(
        b"\x80\x02}("
        + b"".join(
            text(str(n)) + tensor(shape=(100, 100), strides=(100, 1), storage=b"h\0" if n else LARGE + b"q\0")
            for n in range(500)
        )
        + b"u.",
        bytes(40_000),
    ),
}


@pytest.mark.parametrize("case", BOMBS)
def test_small_files_that_ask_for_much_are_refused_soon(case, tmp_path):
    (tmp_path / "x.pth").write_bytes(BOMBS[case])
    begin = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as refused:
            pytorch.state(pytorch.load(tmp_path / "x.pth"), pytorch.WHOLE)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "\n" not in str(refused.value) and peak < 1e8 and time.process_time() - begin < 10


def test_a_program_without_an_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pytorch, "_MOST_OPCODES", 10_000)
    (tmp_path / "x.pth").write_bytes(archive(b"\x80\x02" + b"}" * 20_000))
    with pytest.raises(InputError, match="it has more than 10,000 opcodes"):
        pytorch.load(tmp_path / "x.pth")


def test_nothing_that_runs_files_is_imported_or_named():
    """Python's reader runs what a file names; neither it nor its tables are needed."""
    source = Path(pytorch.__file__).read_text()
    imported = {name.split(".")[0] for name in re.findall(r"^(?:from|import) ([\w.]+)", source, re.M)}
    assert imported == {
        *(
            "collections",
            "dataclasses",
            "mmap",
            "ml_dtypes",
            "numpy",
            "pathlib",
            "re",
            "struct",
            "sys",
            "tljax",
            "typing",
        ),
        *("zipfile", "zlib"),
    }
    assert not re.search(r"\b(eval|exec|getattr|__import__)\(", source)
