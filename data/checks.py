"""Everything that looks for faults in data: annotation files, image files, and data sets.

What cannot be used is `BadInput` before training starts, with the file and the reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import BadInput, check_image
from data.foreign import what_it_is
from data.images import MAX_PIXELS, SWAPPED, open_image, orientation, rgb_tensor
from data.masks import mask_problem
from data.remembered import evidence, read_memory, remember
from data.transforms import MaskCrops

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


# ------------------------------------------------------------------------------ data sets


def check_dataset(data, what: str, scored: bool = False, masks: bool = False) -> None:
    """Does a data set keep the contract? BadInput names everything that is missing or wrong.

    Looks at its members and, closely, at its first four items. `what` ("training") names the
    data set in the message. `scored`: it needs coco() too; `masks`: its targets need masks.
    """
    problems = _member_problems(data, scored)
    if not problems:
        for i in range(min(4, len(data))):
            problems += [f"item {i}: {problem}" for problem in item_problems(data, i, masks)]
    if problems:
        name = f"the {what} data set ({type(data).__name__}; see data/contract.py)"
        raise BadInput("\n  ".join([name, *problems]))


def _member_problems(data, scored: bool) -> list[str]:
    members = ["__len__", "__getitem__", "sizes", "categories"]
    if scored:
        members.append("coco")
    missing = [f"has no {name}" for name in members if not hasattr(data, name)]
    if missing:
        return missing
    problems = []
    count = len(data)
    try:
        shape = list(np.shape(np.asarray(data.sizes, float)))
    except (TypeError, ValueError):
        problems.append(f"sizes are not (h, w) of each of its {count} images")
    else:
        if shape != [count, 2] or not count:
            problems.append(f"sizes are {shape}, not (h, w) of each of its {count} images")
    if not _are_categories(data.categories):
        problems.append("categories are not a list of dicts of id and name, one a class")
    return problems


def _are_categories(categories) -> bool:
    if not isinstance(categories, (list, tuple)) or not categories:
        return False
    return all(isinstance(c, dict) and {"id", "name"} <= c.keys() for c in categories)


def item_problems(data, index: int, masks: bool = False) -> list[str]:
    """What is wrong with an item of a data set, for `check_dataset`."""
    needed = {"boxes", "labels", "ignore", "image_id", "size"}
    if masks:
        needed.add("masks")
    try:
        image, target = data[index]
        check_image(image)
        missing = needed - set(target)
    except BadInput as e:
        return [str(e)]
    except (TypeError, ValueError) as e:
        return [f"is not (image, target): {e}"]
    if missing:
        return [f"its target has no {', '.join(sorted(missing))}"]
    wrong_types = [k for k in ("boxes", "labels", "ignore") if not isinstance(target[k], Tensor)]
    if wrong_types:
        return [f"{', '.join(wrong_types)}: not a tensor"]
    h, w = map(int, data.sizes[index])
    labels = target["labels"]
    G = len(labels) if labels.ndim else -1
    problems = _object_problems(target, G) + _size_problems(image, target, h, w)
    if masks and not isinstance(target["masks"], MaskCrops):
        problems += _mask_problems(target["masks"], [G, h, w])
    return problems + label_problems(labels, len(data.categories))


def _object_problems(target: dict, G: int) -> list[str]:
    boxes, labels, ignore = target["boxes"], target["labels"], target["ignore"]
    problems = []
    if boxes.shape != (G, 4):
        problems.append(f"boxes are {list(boxes.shape)}, not [G, 4]")
    elif not (boxes[:, 2:] >= boxes[:, :2]).all():
        problems.append("boxes are not (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2")
    if labels.dtype != torch.long or labels.ndim != 1:
        problems.append("labels are not [G] of torch.long")
    if ignore.dtype != torch.bool or ignore.shape != (G,):
        problems.append("ignore is not [G] of torch.bool")
    return problems


def _size_problems(image: Tensor, target: dict, h: int, w: int) -> list[str]:
    size, image_id = target["size"], target["image_id"]
    problems = []
    if image.shape[1:] != (h, w):
        actual = f"{image.shape[1]}x{image.shape[2]}"
        problems.append(f"is {actual} px, sizes says {h}x{w} (h x w)")
    if not isinstance(size, (tuple, list)) or tuple(size) != (h, w):
        problems.append(f"size is {size}, sizes says {h}x{w} (h x w)")
    if not isinstance(image_id, (int, str)):
        problems.append("image_id is neither a number nor a string")
    return problems


def _mask_problems(masks, shape: list[int]) -> list[str]:
    if not isinstance(masks, Tensor):
        return [f"masks are {type(masks).__name__}, not a tensor"]
    if list(masks.shape) == shape and masks.dtype == torch.bool:
        return []
    wanted = f"[G, h, w] = {shape} of torch.bool"
    return [f"masks are {list(masks.shape)} of {masks.dtype}, not {wanted}"]


def label_problems(labels: Tensor, num_classes: int) -> list[str]:
    """Labels outside 0..K-1: K itself is the background, and would train as such unnoticed."""
    wrong = labels[(labels < 0) | (labels >= num_classes)].unique().tolist()
    if not wrong:
        return []
    problem = f"labels are 0..{num_classes - 1} for {num_classes} categories, here is {wrong}"
    if wrong == [num_classes]:
        problem += "; torchvision's start at 1, with 0 for the background"
    return [problem]


def check_labels(targets: list[dict], num_classes: int) -> None:
    """BadInput if a label of a batch, still on the host, is that of no class."""
    for target in targets:
        for problem in label_problems(target["labels"], num_classes):
            raise BadInput(f"image {target['image_id']}: {problem}")
