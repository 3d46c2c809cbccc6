"""Images brought to one shape, against references written apart from it."""

import io
import struct
import subprocess
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image, ImageOps

from tljax.data.images import crops, decode, gather, read, resized, to_shape
from tljax.types import InputError

PICTURES = np.random.Philox(key=[1, 0]).random_raw(2 * 24 * 20 * 4 // 8).view(np.uint8).reshape(2, 24, 20, 4)


@pytest.mark.parametrize("size", [(24, 20), (12, 10), (7, 9), (40, 31), (24, 5), (50, 10)])
@pytest.mark.parametrize("channels", [1, 3])
def test_resizing_is_antialiased_bilinear(size: tuple[int, int], channels: int) -> None:
    images = PICTURES[..., :channels]
    got = to_shape(images, (*size, channels), "squash")
    assert got.dtype == np.uint8
    reference = jax.image.resize(images.astype(np.float32), (2, *size, channels), "linear", antialias=True)
    assert np.abs(got - np.asarray(reference)).max() <= 1.5  # PIL rounds after each of two passes


def test_grey_is_the_luma_that_is_written_down() -> None:
    got = to_shape(PICTURES[..., :3], (24, 20, 1))[..., 0]
    r, g, b = (PICTURES[..., c].astype(float) for c in range(3))
    assert np.abs(got - (0.299 * r + 0.587 * g + 0.114 * b)).max() <= 0.51
    pil = np.stack([np.asarray(Image.fromarray(p[..., :3].copy()).convert("L")) for p in PICTURES])
    np.testing.assert_array_equal(got, pil)


def test_alpha_is_dropped_and_grey_repeated() -> None:
    np.testing.assert_array_equal(to_shape(PICTURES, (24, 20, 3)), PICTURES[..., :3])
    np.testing.assert_array_equal(to_shape(PICTURES, (24, 20, 1)), to_shape(PICTURES[..., :3], (24, 20, 1)))
    np.testing.assert_array_equal(to_shape(PICTURES[..., :2], (24, 20, 3)), PICTURES[..., [0, 0, 0]])
    np.testing.assert_array_equal(to_shape(PICTURES[..., :2], (24, 20, 1)), PICTURES[..., :1])


def test_images_of_that_shape_are_untouched() -> None:
    assert to_shape(PICTURES, (24, 20, 4)) is PICTURES


def test_unknown_channels_are_refused() -> None:
    for source, target in ((5, 3), (3, 2), (3, 4)):
        with pytest.raises(InputError, match=f"{source} channels cannot become {target}"):
            to_shape(np.zeros((1, 4, 4, source), np.uint8), (4, 4, target))


def encoded(picture: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=options.pop("format", "PNG"), **options)
    return buffer.getvalue()


COLOUR = Image.fromarray(np.ascontiguousarray(PICTURES[0, ..., :3]))


@pytest.mark.parametrize(("mode", "channels"), [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGB", 3), ("RGBA", 3)])
def test_every_kind_of_png_is_grey_or_colour(mode: str, channels: int) -> None:
    picture = COLOUR.convert(mode)
    got = decode(encoded(picture), None, "x.png")
    assert got.shape == (24, 20, channels) and got.dtype == np.uint8
    np.testing.assert_array_equal(got.squeeze(), np.asarray(picture.convert("RGB" if channels == 3 else "L")))
    assert decode(encoded(picture), 3, "x.png").shape == (24, 20, 3)
    assert decode(encoded(picture), 1, "x.png").shape == (24, 20, 1)


def test_alpha_and_transparent_palettes_leave_the_colours_alone() -> None:
    picture = COLOUR.convert("RGBA")
    picture.putalpha(0)
    np.testing.assert_array_equal(decode(encoded(picture), None, "x.png"), PICTURES[0, ..., :3])
    palette = COLOUR.convert("P")
    transparent = encoded(palette, transparency=bytes(range(256)))
    np.testing.assert_array_equal(decode(transparent, None, "x.png"), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize(
    ("ink", "colour"),
    [((0, 255, 255, 0), (255, 0, 0)), ((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 0, 102), (153, 153, 153))],
)
def test_cmyk_jpeg_becomes_the_colour_that_its_inks_leave(ink: tuple[int, ...], colour: tuple[int, ...]) -> None:
    inks = Image.new("CMYK", (24, 20), ink)
    for channels in (None, 3):
        got = decode(encoded(inks, format="JPEG", quality=100), channels, "x.jpg").astype(int)
        assert got.shape == (20, 24, 3) and np.abs(got - colour).max() <= 3
    assert decode(encoded(inks, format="JPEG"), 1, "x.jpg").shape == (20, 24, 1)


def deep_png(colour_type: int, channels: int) -> bytes:
    """A PNG of 2 x 1 pixels with 16 bits a channel, after the PNG specification (PIL writes none in colour)."""

    def chunk(kind: bytes, contents: bytes) -> bytes:
        return struct.pack(">I", len(contents)) + kind + contents + struct.pack(">I", zlib.crc32(kind + contents))

    header = struct.pack(">IIBBBBB", 2, 1, 16, colour_type, 0, 0, 0)
    row = zlib.compress(b"\0" + struct.pack(f">{2 * channels}H", *range(0, 600 * channels, 300)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_are_refused_in_every_kind_of_png(colour_type: int, channels: int) -> None:
    data = deep_png(colour_type, channels)
    Image.open(io.BytesIO(data)).load()  # it is a good picture
    with pytest.raises(InputError, match=r"x.png has more than 8 bits a channel \(mode .*\): save it with 8"):
        decode(data, None, "x.png")


def test_an_animation_is_refused_in_one_line() -> None:
    frames = [COLOUR.rotate(90 * i, expand=False) for i in range(3)]
    data = encoded(frames[0], save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match=r"x.png is an animation of 3 frames: save the frame that is meant by itself"):
        decode(data, None, "x.png")
    one_frame = encoded(frames[0], save_all=True)
    np.testing.assert_array_equal(decode(one_frame, None, "x.png"), COLOUR)


def test_sixteen_bits_and_damaged_pictures_are_refused() -> None:
    deep = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
    with pytest.raises(InputError, match=r"x.png has more than 8 bits a channel \(mode I;16\): save it with 8"):
        decode(encoded(deep), None, "x.png")
    whole = encoded(COLOUR)
    for data in (b"", b"no picture", whole[: len(whole) // 2], whole[:30]):
        with pytest.raises(InputError, match=r"x.png is no readable picture") as error:
            decode(data, None, "x.png")
        assert "\n" not in str(error.value)


def test_pictures_of_many_sizes_need_a_shape() -> None:
    pictures = [("a", PICTURES[0]), ("b", PICTURES[1, :10])]
    with pytest.raises(InputError, match=r"b is 10x20x4, the first 24x20x4: .*image_shape"):
        gather(pictures, 2, None)
    for resize, expected in (("crop", 1), ("squash", 0)):
        got, cropped = gather(pictures, 2, (24, 20, 3), resize)
        assert cropped == expected
        np.testing.assert_array_equal(got[0], PICTURES[0, ..., :3])
        np.testing.assert_array_equal(got[1], to_shape(PICTURES[1:, :10], (24, 20, 3), resize)[0])


@pytest.mark.parametrize(
    ("size", "shape", "resized_to", "corner"),
    [
        # As torchvision's Resize(224) and CenterCrop(224): the long side rounded down, the corner to the nearest even.
        ((480, 640), (224, 224), (224, 298), (0, 37)),
        ((640, 480), (224, 224), (298, 224), (37, 0)),
        ((500, 333), (224, 224), (336, 224), (56, 0)),
        ((224, 227), (224, 224), (224, 227), (0, 2)),
        ((224, 225), (224, 224), (224, 225), (0, 0)),
        ((10, 10), (20, 12), (20, 20), (0, 4)),
        ((30, 90), (10, 20), (10, 30), (0, 5)),
    ],
)
def test_the_aspect_is_kept_and_the_centre_cropped(
    size: tuple[int, int], shape: tuple[int, int], resized_to: tuple[int, int], corner: tuple[int, int]
) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    assert resized(size, shape) == resized_to and crops(size, (*shape, 3), "crop")
    top, left = corner
    reference = Image.fromarray(picture).resize(resized_to[::-1], Image.Resampling.BILINEAR)
    reference = reference.crop((left, top, left + shape[1], top + shape[0]))
    np.testing.assert_array_equal(to_shape(picture[None], (*shape, 3))[0], np.asarray(reference))
    squashed = Image.fromarray(picture).resize(shape[::-1], Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(to_shape(picture[None], (*shape, 3), "squash")[0], np.asarray(squashed))


@pytest.mark.parametrize(("size", "shape"), [((28, 28), (32, 32)), ((30, 60), (10, 20)), ((48, 36), (4, 3))])
def test_pictures_of_the_aspect_keep_their_bits(size: tuple[int, int], shape: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (2, *size, 1), np.uint8)
    assert not crops(size, (*shape, 1), "crop") and not crops((9, 5), (4, 4, 1), "squash")
    np.testing.assert_array_equal(to_shape(picture, (*shape, 3)), to_shape(picture, (*shape, 3), "squash"))


# Upright, whatever the camera was held like, and nothing but PNG and JPEG.


def with_orientation(picture: Image.Image, orientation: object, format: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture, format=format, exif=exif, **({"quality": 100} if format == "JPEG" else {}))


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_upright_as_its_exif_says(orientation: int, format: str) -> None:
    # CIPA DC-008-2019, 4.6.4: where row 0 and column 0 of what is kept are seen.
    places = "top left, top right, bottom right, bottom left, left top, right top, right bottom, left bottom"
    row, column = places.split(", ")[orientation - 1].split()
    stored = np.full((32, 48, 3), 128, np.uint8)
    stored[:4], stored[:, :4] = 255, 0  # white along row 0, black along column 0
    seen = decode(with_orientation(Image.fromarray(stored), orientation, format), None, "it").astype(int)
    assert seen.shape == ((32, 48, 3) if orientation < 5 else (48, 32, 3))
    edge = {"top": np.s_[0, 8:-8], "bottom": np.s_[-1, 8:-8], "left": np.s_[8:-8, 0], "right": np.s_[8:-8, -1]}
    levels = {name: seen[at].mean() for name, at in edge.items()}
    assert levels[row] > 225 and levels[column] < 30
    assert all(abs(levels[name] - 128) < 30 for name in edge.keys() - {row, column})


def test_viewers_and_pil_see_the_same() -> None:
    for orientation in range(1, 9):
        data = with_orientation(COLOUR, orientation, "PNG")
        np.testing.assert_array_equal(decode(data, 3, "it"), ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
        grey = decode(data, 1, "it")
        assert grey.shape == (*decode(data, 3, "it").shape[:2], 1)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_is_none_turns_nothing(orientation: int) -> None:
    np.testing.assert_array_equal(decode(with_orientation(COLOUR, orientation, "PNG"), 3, "it"), COLOUR)


def test_exif_that_is_damaged_turns_nothing() -> None:
    for junk in (b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0II*\0\xff\xff\xff\xff", b"junk"):
        np.testing.assert_array_equal(decode(encoded(COLOUR, exif=junk), 3, "it"), COLOUR)


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "EPS", "PDF", "JPEG2000"])
def test_another_format_is_refused_whatever_the_file_is_called(format: str, tmp_path: Path) -> None:
    data = encoded(COLOUR, format=format)
    with pytest.raises(InputError, match=r"it is no readable picture \(no PNG or JPEG\): replace or remove it"):
        decode(data, None, "it")
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match=r"a.png' is no readable picture \(no PNG or JPEG\)"):
        read(tmp_path / "a.png")


def test_a_postscript_picture_starts_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*args: object, **kwargs: object) -> None:
        raise AssertionError("a program was started")

    for name in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, started)
    with pytest.raises(InputError, match="no PNG or JPEG"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%id) (r) file\n", None, "it")


def test_every_place_that_opens_a_picture_names_the_formats() -> None:
    root = Path(__file__).parent.parent
    files = [*(root / "tljax").rglob("*.py"), *(root / "experiments").rglob("*.py")]
    opened = [line for file in files for line in file.read_text(encoding="utf-8").splitlines() if "Image.open(" in line]
    assert opened and all("formats=FORMATS" in line for line in opened)


def test_a_jpeg_of_several_pictures_as_phones_make_them_is_read() -> None:
    data = encoded(COLOUR, format="MPO", save_all=True, append_images=[COLOUR.rotate(90)], quality=100)
    np.testing.assert_array_equal(decode(data, 3, "it"), decode(encoded(COLOUR, format="JPEG", quality=100), 3, "it"))
