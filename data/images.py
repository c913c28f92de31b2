"""Image files as tensors. Whatever goes wrong with a file is `BadInput` with its name.

Two things about a photo are not in its pixels: which way up it is (EXIF's orientation),
and whether it is small enough to be decoded without filling the memory (`max_pixels`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from common import BadInput
from data.files import counted

# The formats that PIL may open. It knows more, and some of those start other programs.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")

MAX_PIXELS = 178_956_970  # PIL refuses larger images by itself
ORIENTATION = 0x0112  # EXIF's tag
UPRIGHT = 1  # its value for a photo that is not turned
SWAPPED = 5  # from this value on a turn swaps width and height

_limit_is_lifted = threading.Lock()


@contextlib.contextmanager
def open_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """The PIL image in a file, not yet decoded; errors in the block become `BadInput`."""
    try:
        if not Path(path).is_file():  # opening a pipe would wait for ever
            raise OSError("not a file" if Path(path).exists() else "no such file")
        with _open(path) as image:
            pixels = image.width * image.height
            if pixels > max_pixels:
                raise ValueError(f"{pixels} pixels; --max-pixels {pixels} would read it")
            yield image
    except BadInput:
        raise
    except UnidentifiedImageError as e:
        reason = f"it is none of {', '.join(FORMATS)}"
        raise BadInput(f"{path}: cannot read the image: {reason}") from e
    except Exception as e:  # a decoder may raise anything, even RecursionError
        raise BadInput(f"{path}: cannot read the image: {str(e) or type(e).__name__}") from e


def _open(path: str | Path) -> Image.Image:
    """The opened file, whatever its size."""
    try:
        return Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError:
        # PIL's limit is a global of the whole program: it is lifted for a moment only.
        with _limit_is_lifted:
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                return Image.open(path, formats=FORMATS)
            finally:
                Image.MAX_IMAGE_PIXELS = limit


def read_image(path: str | Path, upright=False, max_pixels: int = MAX_PIXELS) -> Tensor:
    """uint8 RGB [3, h, w]; `BadInput` for a missing, truncated, foreign or 16-bit file.

    `upright` turns a photo as its EXIF data say.
    """
    with open_image(path, max_pixels) as image:
        if upright:
            with contextlib.suppress(Exception):  # broken EXIF data: the photo stays as it is
                image = ImageOps.exif_transpose(image)
        return rgb_tensor(image)


def rgb_tensor(image: Image.Image) -> Tensor:
    """uint8 RGB [3, h, w] of an 8-bit PIL image; transparent pixels are white."""
    if image.mode[0] in "IF":  # PIL would clip these to black and white
        raise ValueError(f"its pixels ({image.mode}) are not of 8 bits, convert it first")
    if image.has_transparency_data:  # choice: white, as browsers show it
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def raw_size(path: str | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(h, w) of the pixels in a file, not turned."""
    with open_image(path, max_pixels) as image:
        return image.height, image.width


def orientation(path: str | Path, max_pixels: int = MAX_PIXELS) -> int:
    """EXIF's orientation of a photo, 1 to 8; 1 if the file has none or cannot be read."""
    with contextlib.suppress(Exception):
        with open(path, "rb") as file:
            start = file.read(4096)
        # A few bytes spare opening every file: cameras write EXIF data right at the
        # start.
        mentions_it = b"Exif" in start or b"eXIf" in start or b"xap/" in start
        if start.startswith((b"\xff\xd8", b"\x89PNG")) and not mentions_it:
            return UPRIGHT
        with open_image(path, max_pixels) as image:
            value = image.getexif().get(ORIENTATION, UPRIGHT)
        if value in range(1, 9):
            return int(value)
    return UPRIGHT


# ------------------------------------------------------------------------------ photos


def decide_upright(
    files: Sequence[str],
    sizes: Sequence[tuple[int, int] | None],
    upright: str = "auto",
    unless_known: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> tuple[bool, str]:
    """Whether this set's photos are turned upright, and a note for the user.

    Labelling tools mostly show photos upright, so their boxes fit the turned photo. COCO
    and older tools annotate the pixels as they are stored. `sizes` are (h, w) as
    annotated, or None. If `upright` is "auto", the sizes of photos whose turn swaps width
    and height decide. If there are none, `unless_known`, the custom of the format,
    decides.
    """
    if upright != "auto":
        return upright == "yes", ""
    with ThreadPoolExecutor(8) as pool:
        values = list(pool.map(lambda file: orientation(file, max_pixels), files))
    turned = [i for i, value in enumerate(values) if value != UPRIGHT]
    if not turned:
        return False, ""
    as_stored = as_turned = 0
    for i in turned:
        if sizes[i] is None or values[i] < SWAPPED:
            continue  # the turned photo is as wide and as high as the stored one
        height, width = raw_size(files[i], max_pixels)
        as_stored += sizes[i] == (height, width) and height != width
        as_turned += sizes[i] == (width, height) and height != width
    photos = counted(len(turned), "photo")
    if as_turned and not as_stored:
        return True, f"{photos} turned upright, as EXIF says and the annotated sizes confirm"
    if as_stored or as_turned:
        return False, ""  # photos that do not fit are refused with their names
    if unless_known:
        return True, f"{photos} turned upright, as EXIF says (--upright no: as stored)"
    return False, (
        f"{photos} with an EXIF turn, and no annotated size tells whether the boxes are those of "
        "the turned photos. They are read as stored; --upright yes turns them (no: as stored)"
    )
