"""How tests/weights/pytorch_* were made, by PyTorch (2.14.1) and safetensors: `python tests/make_pytorch.py`

One dict of tensors in each form that PyTorch writes, and the same tensors as safetensors' own PyTorch reader has them;
a checkpoint of a small net, its optimizer and an averaged copy; and a net that was saved whole, which is code.
"""

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "weights"


def tensors() -> dict[str, Any]:
    """Views that share a storage, transposed, strided and empty ones, and each type that both forms have."""
    import torch

    base = torch.randn(6, 4)
    noted = torch.randn(3)
    noted.note = "has an attribute"  # which PyTorch writes by another function
    return {
        **{"base": base, "transposed": base.t(), "part": base[2:4, 1:3], "every_second": base[::2], "row": base[5]},
        **{"parameter": torch.nn.Parameter(base[0]), "noted": noted, "scalar": torch.tensor(3.5)},
        **{"empty": torch.zeros(0, 3), "bfloat16": base.bfloat16(), "float16": base.half(), "float64": base.double()},
        **{f"int{bits}": torch.arange(-2, 3, dtype=getattr(torch, f"int{bits}")) for bits in (8, 16, 32, 64)},
        **{"uint8": torch.arange(5, dtype=torch.uint8), "bool": torch.tensor([True, False])},
        **{"complex64": torch.randn(3, dtype=torch.complex64), "nan": torch.tensor([float("nan"), -0.0])},
    }


def main() -> None:
    """Write the files."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    named = tensors()
    newer = {"uint16": torch.arange(5).to(torch.uint16), "float8": named["base"].to(torch.float8_e4m3fn)}
    torch.save(named | newer, FOLDER / "pytorch_archive.pth")
    torch.save(named, FOLDER / "pytorch_sequence.pth", _use_new_zipfile_serialization=False)
    plain = {name: tensor.detach().clone().contiguous() for name, tensor in (named | newer).items()}
    save_file(plain, FOLDER / "pytorch_known.safetensors")
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    average = {name: tensor / 2 for name, tensor in net.state_dict().items()}
    about = {"epoch": 3, "args": {"name": "tiny", "rates": [0.1, 0.01], "best": None, "size": torch.Size([3])}}
    states = {"optimizer": optimizer.state_dict(), "generator": torch.get_rng_state()[:8]}
    torch.save({"state_dict": net.state_dict(), **states, **about}, FOLDER / "pytorch_checkpoint.pt", pickle_protocol=4)
    both = {"model": net.state_dict(), "model_ema": average, **about}
    torch.save(both, FOLDER / "pytorch_averaged.bin", _use_new_zipfile_serialization=False)
    torch.save(net, FOLDER / "pytorch_whole.pt")


if __name__ == "__main__":
    main()
