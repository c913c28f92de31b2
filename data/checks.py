"""Everything that looks for faults in annotation files and image files.

What cannot be used is `BadInput` before training starts, with the file and the reason.
Data sets that others wrote are checked by `data.own`.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from common import BadInput
from data.files import what_it_is
from data.images import MAX_PIXELS, SWAPPED, open_image, orientation, rgb_tensor
from data.masks import mask_problem

# ------------------------------------------------------------------------------ annotations

Types = tuple[type, ...]
NUMBER: Types = (int, float, np.integer, np.floating)
ID: Types = (int, np.integer, str)
SINGULAR = {"images": "image", "categories": "category", "annotations": "annotation"}


def check_coco(coco: Any, masks: bool = False, files: bool = True) -> None:
    """ValueError naming the first thing in COCO annotations that would break a run later.

    Broken boxes do not count if they are numbers: those are dropped later. With `masks`
    segmentations are checked too; without `files` images need no name and no size.
    """
    check_listed(coco, files)
    sizes = {}
    sides: dict[str, Types] = {"height": (int,), "width": (int,)} if files else {}
    for who, image in _entries(coco, "images", sides):
        height, width = image.get("height"), image.get("width")
        if files and not (0 < height < 2**31 and 0 < width < 2**31):
            raise ValueError(f"{who} is {height} x {width} px")
        sizes[image["id"]] = (height, width)
    categories = {category["id"] for category in coco["categories"]}
    types = {"image_id": ID, "category_id": ID, "bbox": (list, tuple, np.ndarray)}
    for who, annotation in _entries(coco, "annotations", types):
        if annotation["image_id"] not in sizes:
            raise ValueError(f"{who} has no image {annotation['image_id']!r}")
        if annotation["category_id"] not in categories:
            raise ValueError(f"{who} is of unknown category {annotation['category_id']!r}")
        bbox, area = annotation["bbox"], annotation.get("area", 0)
        if len(bbox) != 4 or not all(_is(v, NUMBER) for v in bbox):
            raise ValueError(f"{who}: bbox is {bbox!r}, not four numbers")
        if not _is(area, NUMBER) or not math.isfinite(area):
            raise ValueError(f"{who}: area is {area!r}")
        for key in ("iscrowd", "difficult"):
            mark = annotation.get(key, 0)
            if not isinstance(mark, (*NUMBER, np.bool_)) or mark not in (0, 1):
                raise ValueError(f"{who}: {key} is {mark!r}, not 0 or 1")
        if masks:
            mask, size = annotation.get("segmentation"), sizes[annotation["image_id"]]
            if problem := mask_problem(mask, *size):
                raise ValueError(f"{who}: {problem}")
    annotations = coco.get("annotations", [])
    if masks and annotations and not any(a.get("segmentation") for a in annotations):
        raise ValueError("its objects have no masks (segmentation), which --masks needs")


def check_listed(coco: Any, files: bool = True) -> None:
    """ValueError if images or categories are not those of COCO; sizes may be missing."""
    if not isinstance(coco, dict) or not {"images", "categories"} <= coco.keys():
        other = f". It is {what_it_is(coco)}" if what_it_is(coco) else ""
        raise ValueError(f"not COCO annotations: no images and categories{other}")
    types: dict[str, Types] = {"file_name": (str,)} if files else {}
    for name, of_entry in (("images", types), ("categories", {"name": (str,)})):
        ids = [entry["id"] for _, entry in _entries(coco, name, {"id": ID, **of_entry})]
        if len({isinstance(i, str) for i in ids}) > 1:
            raise ValueError(f"ids of {name} are numbers and strings, mixed")
        for i, count in Counter(ids).most_common(1):
            if count > 1:
                raise ValueError(f"id {i!r} of {name} occurs more than once")
    for who, image in _entries(coco, "images", {}):
        for side in ("height", "width"):
            if files and not _is(image.get(side, 0), (int,)):
                raise ValueError(f"{who}: {side} is {image[side]!r}")
    annotations = coco.get("annotations")
    first = annotations[0] if isinstance(annotations, list) and annotations else None
    if isinstance(first, dict) and "segments_info" in first:
        raise ValueError("panoptic annotations have no boxes: use COCO's instances_*.json")


def _is(value: Any, types: Types) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def _entries(coco: dict, name: str, types: dict[str, Types]) -> Iterator[tuple[str, dict]]:
    """Yield (name for messages, entry) for a list; values of these types must be present."""
    entries = coco.get(name, [])
    if not isinstance(entries, (list, tuple)):
        raise ValueError(f"{name} is no list")
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(f"{name}[{i}] is no object: {entry!r}")
        who = f"{name}[{i}]"
        if _is(entry.get("id"), ID):
            who = f"{SINGULAR[name]} {entry['id']!r}"
        for key, allowed in types.items():
            if key not in entry:
                raise ValueError(f"{who} has no {key}")
            if not _is(entry[key], allowed):
                raise ValueError(f"{who}: {key} is {entry[key]!r}")
        yield who, entry


# ------------------------------------------------------------------------------ boxes

FEW = 0.5  # choice: what holds for more than this share of boxes or images is no slip


def why_unusable(corners: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """Reason -> which boxes [n] (xyxy, not clipped) it makes unusable; one reason a box.

    `sizes` [n, 2] are the (h, w) of their images.
    """
    finite = np.isfinite(corners).all(1)
    x1, y1, x2, y2 = np.nan_to_num(corners).T
    height, width = sizes.T
    empty = finite & ((x2 <= x1) | (y2 <= y1))
    clipped_x = np.clip(x2, 0, width) - np.clip(x1, 0, width)
    clipped_y = np.clip(y2, 0, height) - np.clip(y1, 0, height)
    outside = finite & ~empty & ((clipped_x <= 0) | (clipped_y <= 0))
    return {
        "not finite": ~finite,
        "with a width or height of 0 or less": empty,
        "outside the image": outside,
    }


def odd_boxes(boxes: np.ndarray, sizes: np.ndarray) -> list[str]:
    """What is odd about most boxes [n] (x, y, w, h), of images of `sizes` [n, 2] (h, w).

    A single broken box is dropped and counted. Where most are broken in the same way, the
    file means something else by its numbers, and training would go on with wrong boxes
    unnoticed.
    """
    finite = np.isfinite(boxes).all(1)
    if not finite.any():
        return []
    boxes = boxes[finite]
    (x, y, w, h), (height, width) = boxes.T, sizes[finite].T
    in_shares = boxes.max(1) <= 1
    if in_shares.mean() > FEW:
        return [
            f"{in_shares.sum()} of {len(boxes)} boxes lie in the first pixel of their image: "
            "are they in shares of its size (0..1)? COCO's are in pixels"
        ]
    swapped = (w < 0) | (h < 0)
    if swapped.mean() > FEW:
        begin = f"{swapped.sum()} of {len(boxes)} boxes end before they begin"
        return [f"{begin}: are their corners swapped?"]
    beyond = (x + w > width + 1) | (y + h > height + 1) | (x < -1) | (y < -1)
    if beyond.mean() <= FEW:
        return []
    said = f"{beyond.sum()} of {len(boxes)} boxes reach beyond their image"
    as_corners = (w > x) & (h > y) & (w <= width + 1) & (h <= height + 1)
    if as_corners.mean() > 0.9:
        return [f"{said}: are they x1, y1, x2, y2? COCO's are x, y, width, height"]
    return [f"{said}: were they drawn on images of another size?"]


# ------------------------------------------------------------------------------ image files


def broken_images(
    files: Sequence,
    sizes=None,
    source: object = "",
    indices: Sequence[int] | None = None,
    progress: Callable[[Iterable, str, int], Iterable] | None = None,
    upright: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> dict[int, str]:
    """Decode image files, all or those at `indices`: {index: what is wrong with it}.

    A JPEG is read to its end but decoded at an eighth of its size, which is fast. Changed
    bytes in its middle may only change the picture. `sizes` [n, 2] (h, w), if given, are
    compared with the files' own, turned if `upright`; `source` names their file.
    `progress(iterable, text, total)` may show how far the check is.
    """

    def why_broken(i: int) -> str:
        try:
            with open_image(files[i], max_pixels) as image:
                w, h = image.size
                image.draft(None, (max(1, w // 8), max(1, h // 8)))
                rgb_tensor(image)
        except BadInput as e:
            return str(e)
        if sizes is None:
            return ""
        annotated = tuple(sizes[i])
        swapped = (upright or (h, w) != annotated) and orientation(files[i]) >= SWAPPED
        if swapped and upright:
            h, w = w, h
        if (h, w) == annotated:
            return ""
        says = "x".join(map(str, annotated))
        problem = f"{files[i]}: is {h}x{w} px (h x w), {source} says {says}"
        if swapped and (w, h) == annotated:
            other = "no" if upright else "yes"
            problem += f". Its EXIF data turn the photo: use --upright {other}"
        return problem

    chosen = range(len(files)) if indices is None else indices
    with ThreadPoolExecutor(16) as pool:
        reasons: Iterable[str] = pool.map(why_broken, chosen)
        if progress is not None:
            reasons = progress(reasons, "checking images", len(chosen))
        return {i: reason for i, reason in zip(chosen, reasons) if reason}


def refuse_images(broken: dict[int, str]) -> None:
    """BadInput with the first ten reasons, if there are any."""
    reasons = list(broken.values())
    if len(reasons) > 10:
        reasons = reasons[:10] + [f"... and {len(reasons) - 10} more"]
    if reasons:
        raise BadInput("\n".join(reasons))


# ------------------------------------------------------------------------------ memory

# Decoding all of COCO takes minutes. The user's cache folder ($XDG_CACHE_HOME or
# ~/.cache) holds one file per data source, which may be deleted at any time. After a
# header line it has 16 bytes per good image: a hash of the path, and a hash of everything
# that the verdict depends on. A torn or outdated record matches no image, so that image
# is checked again.
HEADER = b"two-task-detection: checked images 1\n"
HASH = 8  # bytes


def _hash(*values) -> bytes:
    return blake2b(repr(values).encode(), digest_size=HASH).digest()


def memory_of(source: str | Path) -> Path:
    """The cache file for the images of a data source. RuntimeError without a home folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # unset, or to be ignored according to the XDG specification
        cache = Path.home() / ".cache"
    name = _hash(os.path.abspath(source)).hex()
    return cache / "two-task-detection" / f"{name}.checked"


def evidence(file: str | Path, *conditions) -> tuple[bytes, bytes] | None:
    """(hash of the path, hash of all that a verdict depends on); None if unreadable.

    `conditions` are those of the check. Another version of PIL may judge otherwise.
    """
    path = os.path.abspath(str(file))
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return _hash(path), _hash(status.st_size, status.st_mtime_ns, PIL.__version__, *conditions)


def read_memory(source: str | Path) -> dict[bytes, bytes]:
    """The good files of a data source, as `evidence`; {} without a readable cache."""
    content = b""
    with contextlib.suppress(OSError, RuntimeError):
        content = memory_of(source).read_bytes()
    if not content.startswith(HEADER):
        return {}
    starts = range(len(HEADER), len(content) - 2 * HASH + 1, 2 * HASH)
    return {content[i : i + HASH]: content[i + HASH : i + 2 * HASH] for i in starts}


def remember(source: str | Path, verdicts: dict[bytes, bytes]) -> None:
    """Add good files (b"": forget this one). The file is written whole or not at all.

    A cache folder that cannot be written is no error: the files are checked again next
    time.
    """
    records = {**read_memory(source), **verdicts}
    content = HEADER + b"".join(path + state for path, state in records.items() if state)
    with contextlib.suppress(OSError, RuntimeError):
        memory = memory_of(source)
        temporary = memory.with_suffix(f".{os.getpid()}.tmp")
        try:
            memory.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            os.replace(temporary, memory)
        finally:
            temporary.unlink(missing_ok=True)


def check_images(
    dataset, rank: int = 0, world: int = 1, progress=None, check: str = "all", gather=lambda v: [v]
) -> int:
    """Decode the image files of a `CocoDetection`; BadInput for those that are broken.

    With `check` = "new", unchanged files that an earlier check found good are skipped;
    with "none" all are. Return how many are skipped. Each of several processes (`world`)
    checks its share; gather(value) lists the value of every process.
    """
    if check == "none":
        return len(dataset)
    files, upright, max_pixels = dataset.files, dataset.upright, dataset.max_pixels
    share = range(rank, len(files), world)
    sizes = np.asarray(dataset.sizes).tolist()
    seen = {i: evidence(files[i], sizes[i], upright, max_pixels) for i in share}
    known = set(read_memory(dataset.source).items()) if check == "new" else set()
    todo = [i for i in share if seen[i] not in known]
    broken = broken_images(
        files, dataset.sizes, dataset.source, todo, progress, upright, max_pixels
    )
    verdicts = {seen[i][0]: b"" if i in broken else seen[i][1] for i in todo if seen[i]}
    shares = gather((len(share) - len(todo), verdicts))
    verdicts = {path: state for _, part in shares for path, state in part.items()}
    if rank == 0 and verdicts:
        remember(dataset.source, verdicts)
    refuse_images(broken)
    return sum(skipped for skipped, _ in shares)
