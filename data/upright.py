"""Which way up photos are: turned as their EXIF data say, or as their pixels lie in the file.

Labelling tools mostly show photos upright, so their boxes fit the turned photo. COCO and older
tools annotate the pixels as they lie. Where a turn swaps width and height, the sizes in the
annotations tell which it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from data.files import counted
from data.images import MAX_PIXELS, SWAPPED, UPRIGHT, orientation, raw_size


def orientations(files: Sequence[str], max_pixels: int = MAX_PIXELS) -> list[int]:
    """EXIF's orientation of each file: only the start of most of them is read."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda file: orientation(file, max_pixels), files))


def decide(
    files: Sequence[str],
    sizes: Sequence[tuple[int, int] | None],
    upright: str = "auto",
    unless_known: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> tuple[bool, str]:
    """(are this set's photos turned upright?, what a user should know of it).

    `sizes` are (h, w) as annotated, or None. `upright` is "yes", "no" or "auto": the sizes
    decide. Where they cannot, because no turned photo has a size that tells, `unless_known`
    is the answer: the custom of the format.
    """
    if upright != "auto":
        return upright == "yes", ""
    values = orientations(files, max_pixels)
    turned = [i for i, value in enumerate(values) if value != UPRIGHT]
    if not turned:
        return False, ""
    as_stored = as_turned = 0
    for i in turned:
        if sizes[i] is None or values[i] < SWAPPED:
            continue  # turned or not, the photo is as wide and as high
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
