"""Images of any kind to uint8 arrays of one shape."""

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tljax.types import InputError

Shape = tuple[int, int, int]
"""Height and width in pixels, and channels."""

FORMATS = ("PNG", "JPEG")
"""The formats that are read, by their content, whatever a file is called."""


RESIZES = ("crop", "squash")
"""How an image of another aspect is brought to a shape: by its short side, and cropped at the centre; or each side by
itself."""


OTHER_CHANNELS = ": images of 1 to 4 become grey or colour, 1 or 3, and no others"
"""The middle of the message that refuses to change channels."""


def to_shape(images: np.ndarray, shape: Shape, resize: str = "crop") -> np.ndarray:
    """uint8 [n, height, width, channels] -> uint8 [n, *shape].

    The rule, in this order: if the channels differ, alpha (the last of 2 or 4) is dropped and colour becomes grey by
    the luma of ITU-R 601-2, L = 0.299 R + 0.587 G + 0.114 B, in the fixed point of PIL's mode "L"; a bilinear
    resize, antialiased when it shrinks (PIL's BILINEAR); and grey becomes three channels by repetition. Under "crop"
    the resize keeps the aspect (`resized`), and what is over is cropped, as much on both sides; under "squash" it does
    not. Images that have the shape already are returned as they are. Raises InputError for channels that the rule does
    not cover.

    >>> to_shape(np.full((1, 2, 2, 3), (255, 0, 0), np.uint8), (1, 1, 1)).ravel().tolist()
    [76]
    >>> to_shape(np.uint8([[[[0], [7], [9], [0]]]]), (1, 2, 1)).ravel().tolist()
    [7, 9]
    """
    if images.shape[1:] == shape:
        return images
    if images.shape[-1] != shape[-1] and (shape[-1] not in (1, 3) or images.shape[-1] not in (1, 2, 3, 4)):
        raise InputError(
            f"images of {images.shape[-1]} channels cannot become {shape[-1]}{OTHER_CHANNELS}; give images of "
            f"{shape[-1]} channels"
        )
    if images.shape[-1] != shape[-1]:
        images = images[..., :-1] if images.shape[-1] in (2, 4) else images
        images = _luma(images) if shape[-1] < images.shape[-1] else images
    if images.shape[1:3] != shape[:2]:
        size = resized(images.shape[1:3], shape) if resize == "crop" else shape[:2]
        if images.shape[1:3] != size:
            images = np.stack([_resize(image, size) for image in images])
        # As torchvision's CenterCrop: a half is rounded to the even.
        top, left = (round((size[i] - shape[i]) / 2) for i in (0, 1))
        images = images[:, top : top + shape[0], left : left + shape[1]]
    # Grey is repeated last: one channel to resize in place of three.
    return np.ascontiguousarray(np.broadcast_to(images, (len(images), *shape)))


def resized(size: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, int]:
    """Height and width to which an image is resized before it is cropped to a shape: the least that cover it.

    One side is the shape's, the other keeps the aspect, rounded down, as torchvision's Resize of the short side does.

    >>> resized((480, 640), (224, 224, 3)), resized((28, 28), (32, 32, 1))
    ((224, 298), (32, 32))
    """
    (height, width), (to_height, to_width) = size[:2], shape[:2]
    if to_height * width >= to_width * height:
        return to_height, max(to_width, to_height * width // height)
    return max(to_height, to_width * height // width), to_width


def crops(size: tuple[int, ...], shape: Shape | None, resize: str) -> bool:
    """Whether an image of a height and width loses anything to the crop."""
    return resize == "crop" and shape is not None and resized(size, shape) != shape[:2]


def crop_note(cropped: int, count: int, shape: Shape | None) -> str:
    """What tables say of images of which so many were cropped; "" for none.

    >>> crop_note(3, 4, (64, 48, 3))
    '3 of 4 images are resized by their short side and cropped at the centre to 64x48'
    """
    if not cropped or not shape:
        return ""
    which = f"{cropped:,} of {count:,} images are" if cropped < count else f"all {count:,} images are"
    return f"{which} resized by their short side and cropped at the centre to {shape[0]}x{shape[1]}"


def _luma(images: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] -> uint8 [..., 1], with PIL's rounding."""
    rgb = images.astype(np.uint32)
    sums = rgb[..., 0] * 19595 + rgb[..., 1] * 38470 + rgb[..., 2] * 7471 + 0x8000
    return (sums >> 16).astype(np.uint8)[..., None]


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [height, width, channels] -> uint8 [*size, channels]."""
    from PIL import Image

    def bilinear(pixels: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))

    if image.shape[-1] == 3:
        return bilinear(np.ascontiguousarray(image))
    # Channel by channel: PIL would weigh the colours of RGBA by alpha.
    return np.stack([bilinear(np.ascontiguousarray(plane)) for plane in np.moveaxis(image, -1, 0)], axis=-1)


def decode(data: bytes, channels: int | None, what: str) -> np.ndarray:
    """An encoded picture (PNG, JPEG) to uint8 [height, width, channels], upright as a viewer shows it.

    The picture is turned and mirrored as its EXIF orientation says (tag 274, CIPA DC-008). `channels` 1 or 3 makes it
    grey or colour; None leaves grey grey and makes every other kind (palette, RGBA, CMYK) RGB; alpha is dropped.
    Raises InputError, in which `what` names the picture, if it cannot be read, has over 8 bits a channel, is animated,
    or is of another format, whatever its name: PIL reads dozens, and hands some of them to other programs. Of a JPEG
    that holds several pictures, as phones make them, it is the first, which viewers show.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            mode = picture.mode
            # Of 16 bits PIL reads grey as "I;16", and keeps the upper 8 of every other kind without a word.
            if mode.startswith("I") or mode == "F" or _bits(data) > 8:
                raise InputError(f"{what} has more than 8 bits a channel (mode {mode}): save it with 8")
            if picture.format == "PNG" and getattr(picture, "is_animated", False):
                frames = getattr(picture, "n_frames", 0)
                raise InputError(f"{what} is an animation of {frames} frames: save the frame that is meant by itself")
            new_mode = {1: "L", 3: "RGB"}.get(channels or 0, "L" if mode in ("1", "L", "LA", "La") else "RGB")
            # Through RGBA, or PIL warns; nothing is blended: RGBA -> RGB and LA -> L drop the alpha.
            plain = picture.convert("RGBA") if "transparency" in picture.info else picture
            array = np.asarray(plain if plain.mode == new_mode else plain.convert(new_mode))
            array = upright(array, _orientation(picture))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        reason = f"no {' or '.join(FORMATS)}" if "BytesIO" in str(error) else error
        raise InputError(f"{what} is no readable picture ({reason}): replace or remove it") from error
    return array[..., None] if array.ndim == 2 else array


def _bits(data: bytes) -> int:
    """Bits a channel of a PNG, of the header that begins it; 8 of anything else."""
    return data[24] if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 24 else 8


def _orientation(picture: Any) -> int:
    """The orientation in a picture's EXIF, 1 to 8; 1 where none can be read, as viewers do."""
    try:
        orientation = picture.getexif().get(0x0112, 1)
    except Exception:  # PIL raises many types for damaged EXIF, while the picture itself is whole
        return 1
    return orientation if orientation in range(1, 9) else 1


def upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """The image as it is to be seen, from an image [height, width, ...] that is stored in an EXIF orientation, 1 to 8.

    The orientation says where row 0 and column 0 are seen: 1 top left, 2 top right, 3 bottom right, 4 bottom left,
    5 left top, 6 right top, 7 right bottom, 8 left bottom (CIPA DC-008-2019, 4.6.4).

    >>> upright(np.array([[1, 2], [3, 4]]), 6).tolist()
    [[3, 1], [4, 2]]
    """
    if orientation >= 5:  # rows are seen as columns
        image = np.swapaxes(image, 0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return image


def gather(
    pictures: Iterable[tuple[str, np.ndarray]], count: int, shape: Shape | None, resize: str = "crop"
) -> tuple[np.ndarray, int]:
    """`count` pairs (name for errors, picture) to uint8 [count, *shape], and how many of them were cropped.

    Without a shape all pictures have the first one's. Raises InputError where another differs.
    """
    images, cropped = np.empty((0,), np.uint8), 0
    for row, (what, picture) in enumerate(pictures):
        if row == 0:
            images = np.empty((count, *(shape or picture.shape)), np.uint8)
        if shape:
            cropped += crops(picture.shape, shape, resize)
            picture = to_shape(picture[None], shape, resize)[0]
        if picture.shape != images.shape[1:]:
            raise InputError(
                f"the images differ in size: {what} is {_size(picture.shape)}, the first {_size(images.shape[1:])}: "
                "choose one with `image_shape=HEIGHT,WIDTH,CHANNELS`"
            )
        images[row] = picture
    return images, cropped


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def read(file: Path) -> np.ndarray:
    """A picture file to uint8 [height, width, channels], by `decode`. Raises InputError if it cannot be read."""
    try:
        return decode(file.read_bytes(), None, f"'{file}'")
    except OSError as error:
        raise InputError(f"'{file}' cannot be read ({error.strerror}): check the file") from error


def pictures_by_row(
    files: Sequence[Path], shape: Shape | None, resize: str = "crop"
) -> tuple[Callable[[np.ndarray], np.ndarray], Shape, str]:
    """(the function rows int [k] -> uint8 [k, *shape], the shape, what tables say of a crop) of picture files.

    A file is read and decoded when its row is asked for. Without a `shape` all pictures have the first one's; the
    function raises InputError, as `gather` does, where another differs.
    """
    first = read(files[0]).shape
    image_shape: Shape = shape or (first[0], first[1], first[2])

    def decoded(rows: np.ndarray) -> np.ndarray:
        pictures = ((f"'{files[row]}'", read(files[row])) for row in rows.tolist())
        images, _ = gather(pictures, len(rows), shape, resize)
        if images.shape[1:] != image_shape:
            what = f"'{files[int(rows[0])]}' is {_size(images.shape[1:])}, the first {_size(image_shape)}"
            raise InputError(f"the images differ in size: {what}: choose one with `image_shape=HEIGHT,WIDTH,CHANNELS`")
        return images

    crop = f"images are resized by their short side and cropped at the centre to {_size(image_shape[:2])}"
    return decoded, image_shape, crop if crops(first, shape, resize) else ""
