"""How tests/layouts was made, by hand, with torch 2.14, torchvision 0.29, timm 1.0, transformers 5.24 and safetensors:

    python tests/make_layouts.py

For small instances of each library's ViT and ResNet: the names, dtypes and shapes of the arrays that the library
writes, and its logits at two image sizes, with numbers (running statistics too) from tests/layout_values.py. Positions
are resized as the library does it. Beside them, grids of positions as each library resizes them. Continuous integration
has none of these libraries and reads what is here.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import layout_values
import numpy as np

FOLDER = Path(__file__).parent / "layouts"
CLASSES = 5
SIGNED = ([0.5] * 3, [0.5] * 3)
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
UNIT = ([0.0] * 3, [1.0] * 3)


class Case(NamedTuple):
    """A network of a library."""

    name: str
    model: str
    """As tljax builds it."""
    rules: str
    sizes: tuple[int, int]
    layout: dict[str, tuple[str, list[int]]]
    """Of the file that the library writes."""
    logits: Callable[[dict[str, np.ndarray], np.ndarray], np.ndarray]
    """Of arrays of this layout and of images [batch, 3, height, width]."""
    pixels: tuple[list[float], list[float]] = UNIT


def main() -> None:
    """Write every case, and the grids."""
    FOLDER.mkdir(exist_ok=True)
    for case in cases():
        arrays = layout_values.arrays(case.layout)
        logits = {}
        for size in case.sizes:
            mean, deviation = (np.array(part, np.float32) for part in case.pixels)
            x = (layout_values.images(size) / np.float32(255) - mean) / deviation
            logits[f"logits_{size}"] = case.logits(arrays, x.transpose(0, 3, 1, 2))
            print(case.name, size, logits[f"logits_{size}"].std())
        np.savez(FOLDER / f"{case.name}.npz", **logits)
        about = {"model": case.model, "rules": case.rules, "sizes": case.sizes, "layout": case.layout}
        (FOLDER / f"{case.name}.json").write_text(json.dumps(about))
    np.savez(FOLDER / "grids.npz", **dict(grids()))


def cases() -> Iterator[Case]:
    """Every network."""
    yield from _timm()
    yield from _torchvision()
    yield from _transformers()


def _layout(state: dict[str, Any]) -> dict[str, tuple[str, list[int]]]:
    return {name: (str(array.dtype).removeprefix("torch."), list(array.shape)) for name, array in state.items()}


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    return {name: torch.tensor(array) for name, array in arrays.items()}


def _run(net: Any, arrays: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    import torch

    net.load_state_dict(_tensors(arrays), strict=True)
    with torch.no_grad():
        return net.eval()(torch.tensor(x)).numpy()


def _timm() -> Iterator[Case]:
    from timm.models.resnet import BasicBlock, ResNet
    from timm.models.vision_transformer import VisionTransformer

    for name, rules, pool, options in (
        ("timm_vit", "vit_timm", "class_token", {}),
        ("timm_vit_avg", "vit_timm_avg", "mean_first", {"global_pool": "avg", "class_token": False}),
    ):
        net = VisionTransformer(
            img_size=32,
            patch_size=8,
            embed_dim=32,
            depth=2,
            num_heads=2,
            mlp_ratio=2,
            num_classes=CLASSES,
            dynamic_img_size=True,
            **options,
        )
        model = f"vit:width=32:depth=2:heads=2:mlp=64:patch=8:pixels=signed:pool={pool}"
        yield Case(
            name,
            model,
            rules,
            (32, 24),
            _layout(net.state_dict()),
            lambda arrays, x, net=net: _run(net, arrays, x),
            SIGNED,
        )
    # Bottlenecks are torchvision's case: the names are the same.
    net = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=CLASSES)
    yield Case(
        "timm_resnet_basic",
        "resnet:depth=10:pixels=imagenet",
        "resnet_timm",
        (48, 64),
        _layout(net.state_dict()),
        lambda arrays, x: _run(net, arrays, x),
        IMAGENET,
    )


def _torchvision() -> Iterator[Case]:
    import torchvision
    from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

    def vit(size: int) -> Any:
        return VisionTransformer(
            image_size=size, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=CLASSES
        )

    def logits(arrays: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        import torch

        net = vit(x.shape[-1])
        net.load_state_dict(interpolate_embeddings(x.shape[-1], 8, _tensors(arrays)), strict=True)
        with torch.no_grad():
            return net.eval()(torch.tensor(x)).numpy()

    yield Case(
        "torchvision_vit",
        "vit:width=32:depth=2:heads=2:mlp=64:patch=8:pixels=imagenet",
        "vit_torchvision",
        (32, 48),
        _layout(vit(32).state_dict()),
        logits,
        IMAGENET,
    )
    for depth in (18, 50):
        net = getattr(torchvision.models, f"resnet{depth}")(weights=None, num_classes=CLASSES)
        yield Case(
            f"torchvision_resnet{depth}",
            f"resnet:depth={depth}:pixels=imagenet",
            "resnet_torchvision",
            (48, 64),
            _layout(net.state_dict()),
            lambda arrays, x, net=net: _run(net, arrays, x),
            IMAGENET,
        )


def _transformers() -> Iterator[Case]:
    from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

    vit = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=CLASSES,
    )
    model = "vit:width=32:depth=2:heads=2:mlp=64:patch=8:eps=1e-12"
    resize = {"interpolate_pos_encoding": True}
    yield _of_files("hf_vit", model, "vit_hf", (32, 48), ViTForImageClassification, vit, **resize)
    net = ViTForImageClassification(vit)

    def logits(arrays: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        import torch

        net.load_state_dict(_tensors(arrays), strict=True)
        with torch.no_grad():
            return net.eval()(torch.tensor(x), **resize).logits.numpy()

    yield Case("hf_vit_in_memory", model, "vit_hf", (32, 24), _layout(net.state_dict()), logits)
    for name, depth, kind, widths in (
        ("hf_resnet_basic", 10, "basic", [8, 16, 32, 64]),
        ("hf_resnet", 14, "bottleneck", [32, 64, 128, 256]),
    ):
        resnet = ResNetConfig(
            embedding_size=8, hidden_sizes=widths, depths=[1, 1, 1, 1], layer_type=kind, num_labels=CLASSES
        )
        model = f"resnet:depth={depth}:width=8"
        yield _of_files(name, model, "resnet_hf", (48, 64), ResNetForImageClassification, resnet)


def _of_files(
    name: str, model: str, rules: str, sizes: tuple[int, int], kind: Any, config: Any, **options: Any
) -> Case:
    """A network of transformers, written and read as its own files."""
    from safetensors.numpy import load_file, save_file

    with tempfile.TemporaryDirectory() as folder:
        kind(config).save_pretrained(folder)
        layout = {n: (str(a.dtype), list(a.shape)) for n, a in load_file(Path(folder) / "model.safetensors").items()}

    def logits(arrays: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        import torch

        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            kind(config).save_pretrained(folder)
            save_file(arrays, Path(folder) / "model.safetensors", metadata={"format": "pt"})
            net, report = kind.from_pretrained(folder, output_loading_info=True)
            assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
            return net.eval()(torch.tensor(x), **options).logits.numpy()

    return Case(name, model, rules, sizes, layout, logits)


def grids() -> Iterator[tuple[str, np.ndarray]]:
    """Grids of 7 x 7 as each convention resizes them: {convention_HEIGHTxWIDTH: [height * width, 2]}, and `grid`."""
    import torch

    grid = layout_values.values("grid", (7, 7, 2))
    yield "grid", grid.reshape(49, 2)
    tensor = torch.tensor(grid).permute(2, 0, 1)[None].double()
    for size in ((4, 4), (12, 12), (3, 10)):
        for name, options in (
            ("antialias", {"mode": "bicubic", "antialias": True}),
            ("plain", {"mode": "bicubic", "antialias": False}),
            ("corners", {"mode": "bicubic", "align_corners": True}),
            ("linear", {"mode": "bilinear", "align_corners": True}),
        ):
            resized = torch.nn.functional.interpolate(tensor, size=size, **options)[0].permute(1, 2, 0)
            yield f"{name}_{size[0]}x{size[1]}", resized.reshape(-1, 2).numpy()


if __name__ == "__main__":
    main()
