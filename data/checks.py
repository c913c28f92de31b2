"""Everything that looks for faults in annotation files and image files.

What cannot be used is `BadInput` before training starts, with the file and the reason. Data sets
that others wrote are checked by `data.own`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from common import BadInput
from data.foreign import what_it_is
from data.images import MAX_PIXELS, SWAPPED, open_image, orientation, rgb_tensor
from data.masks import mask_problem
from data.remembered import evidence, read_memory, remember

# ------------------------------------------------------------------------------ COCO annotations

Types = tuple[type, ...]
NUMBER: Types = (int, float)  # compared with type(): True is an int for isinstance
ID: Types = (int, str)
SINGULAR = {"images": "image", "categories": "category", "annotations": "annotation"}


def check_coco(coco: Any, masks: bool = False) -> None:
    """ValueError naming the first thing in COCO annotations that would break a run later.

    Broken boxes are not among them, as long as they are numbers: those are dropped later. With
    `masks` segmentations are checked too.
    """
    check_listed(coco)
    sizes = {}
    for who, image in _entries(coco, "images", {"height": (int,), "width": (int,)}):
        height, width = image["height"], image["width"]
        if not (0 < height < 2**31 and 0 < width < 2**31):
            raise ValueError(f"{who} is {height} x {width} px")
        sizes[image["id"]] = (height, width)
    categories = {category["id"] for category in coco["categories"]}
    types = {"image_id": ID, "category_id": ID, "bbox": (list, tuple)}
    for who, annotation in _entries(coco, "annotations", types):
        if annotation["image_id"] not in sizes:
            raise ValueError(f"{who} has no image {annotation['image_id']!r}")
        if annotation["category_id"] not in categories:
            raise ValueError(f"{who} is of unknown category {annotation['category_id']!r}")
        _check_values(who, annotation)
        if masks:
            height, width = sizes[annotation["image_id"]]
            problem = mask_problem(annotation.get("segmentation"), height, width)
            if problem:
                raise ValueError(f"{who}: {problem}")
    annotations = coco.get("annotations", [])
    if masks and annotations and not any(a.get("segmentation") for a in annotations):
        raise ValueError("its objects have no masks (segmentation), which --masks needs")


def check_listed(coco: Any) -> None:
    """ValueError if images or categories are not those of COCO; sizes may be missing."""
    if not isinstance(coco, dict) or not {"images", "categories"} <= coco.keys():
        other = f". It is {what_it_is(coco)}" if what_it_is(coco) else ""
        raise ValueError(f"not COCO annotations: no images and categories{other}")
    _check_ids(coco, "images", {"file_name": (str,)})
    _check_ids(coco, "categories", {"name": (str,)})
    for who, image in _entries(coco, "images", {}):
        for side in ("height", "width"):
            if type(image.get(side, 0)) is not int:
                raise ValueError(f"{who}: {side} is {image[side]!r}")
    annotations = coco.get("annotations")
    first = annotations[0] if isinstance(annotations, list) and annotations else None
    if isinstance(first, dict) and "segments_info" in first:
        raise ValueError("panoptic annotations have no boxes: use COCO's instances_*.json")


def _entries(coco: dict, name: str, types: dict[str, Types]) -> Iterator[tuple[str, dict]]:
    """Yield (name for messages, entry) for a list; values of these types must be present."""
    entries = coco.get(name, [])
    if not isinstance(entries, list):
        raise ValueError(f"{name} is no list")
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(f"{name}[{i}] is no object: {entry!r}")
        who = f"{SINGULAR[name]} {entry['id']!r}" if "id" in entry else f"{name}[{i}]"
        for key, allowed in types.items():
            if key not in entry:
                raise ValueError(f"{who} has no {key}")
            if type(entry[key]) not in allowed:
                raise ValueError(f"{who}: {key} is {entry[key]!r}")
        yield who, entry


def _check_ids(coco: dict, name: str, types: dict[str, Types]) -> None:
    """Each entry of a list needs these values and an id, all of one type, none twice."""
    ids = [entry["id"] for _, entry in _entries(coco, name, {"id": ID, **types})]
    if len({type(i) for i in ids}) > 1:
        raise ValueError(f"ids of {name} are numbers and strings, mixed")
    for i, count in Counter(ids).most_common(1):
        if count > 1:
            raise ValueError(f"id {i!r} of {name} occurs more than once")


def _check_values(who: str, annotation: dict) -> None:
    bbox = annotation["bbox"]
    if len(bbox) != 4 or any(type(v) not in NUMBER for v in bbox):
        raise ValueError(f"{who}: bbox is {bbox!r}, not four numbers")
    area = annotation.get("area", 0)
    if type(area) not in NUMBER or not math.isfinite(area):
        raise ValueError(f"{who}: area is {area!r}")
    for key in ("iscrowd", "difficult"):
        mark = annotation.get(key, 0)
        if type(mark) not in (int, bool) or mark not in (0, 1):
            raise ValueError(f"{who}: {key} is {mark!r}, not 0 or 1")


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

    A JPEG is read to its end but made at an eighth of its size, which is fast. PIL notices a
    torn end or header of a JPEG; bytes that were changed in its middle may only change the
    picture. `sizes` [n, 2] (h, w), where given, are compared with the files' own, turned
    if `upright`; `source` names the file that they come from. `progress(iterable, text, total)`
    may show how far the check is.
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
        return _size_problem(files[i], (h, w), tuple(sizes[i]), source, upright)

    chosen = range(len(files)) if indices is None else indices
    with ThreadPoolExecutor(16) as pool:
        reasons: Iterable[str] = pool.map(why_broken, chosen)
        if progress is not None:
            reasons = progress(reasons, "checking images", len(chosen))
        return {i: reason for i, reason in zip(chosen, reasons) if reason}


def _size_problem(file, size: tuple, annotated: tuple, source: object, upright: bool) -> str:
    """How a file's size (h, w) differs from the annotated one; "" if it does not."""
    swapped = (upright or size != annotated) and orientation(file) >= SWAPPED
    h, w = size[::-1] if swapped and upright else size
    if (h, w) == annotated:
        return ""
    problem = f"{file}: is {h}x{w} px (h x w), {source} says {annotated[0]}x{annotated[1]}"
    if swapped and (w, h) == annotated:
        other = "no" if upright else "yes"
        problem += f". Its EXIF data say that the photo is to be turned: use --upright {other}"
    return problem


def refuse_images(broken: dict[int, str]) -> None:
    """BadInput with the first ten reasons, if there are any."""
    reasons = list(broken.values())
    if len(reasons) > 10:
        reasons = reasons[:10] + [f"... and {len(reasons) - 10} more"]
    if reasons:
        raise BadInput("\n".join(reasons))


def check_images(
    dataset, rank: int = 0, world: int = 1, progress=None, check: str = "all", gather=lambda v: [v]
) -> int:
    """Decode the image files of a `CocoDetection`; BadInput for those that are broken.

    With `check` = "new", files that an earlier check found good are skipped if they have not
    changed since; with "none", all are. Returns how many are skipped. Each of several processes
    (`world`) checks its share; gather(value) lists the value of every process.
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
