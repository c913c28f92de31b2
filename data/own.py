"""Does a data set that others wrote keep the contract of data/contract.py?

`check_dataset` checks its members and first items, and `checked_truth` its ground truth,
before the first training step. Reading all items at that point would take too long, so
`CheckedItems` checks each item as it is drawn. BadInput names the item or the member, and
the reason.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from common import BadInput, check_image
from data.checks import check_coco, check_listed
from data.coco import xywh_to_xyxy
from data.masks import FAR
from data.transforms import MaskCrops

FIRST = 4  # items that are looked at before training
CLOSE = 2.0  # px; choice: how far an item's box and the one in coco() may differ by rounding


# ------------------------------------------------------------------------------ data sets


def check_dataset(data, what: str, scored: bool = False, masks: bool = False) -> None:
    """Raise BadInput, with everything missing or wrong, if a data set breaks the contract.

    This checks its members and, closely, its first items. `what` ("training") names the
    data set in the message. `scored`: it needs coco(), but no objects; `masks`: its
    targets need masks.
    """
    try:
        problems = _member_problems(data, scored)
        problems = problems or _first_problems(CheckedItems(data, masks))
        if not (problems or scored):
            problems = _without_objects(CheckedItems(data, masks))
    except BadInput:
        raise
    except Exception as e:  # from its author's code
        raise BadInput(f"the {what} data set, {_name(data)}: {type(e).__name__}: {e}") from e
    if problems:
        raise BadInput("\n  ".join([f"the {what} data set ({_name(data)})", *problems]))


def _name(data) -> str:
    return f"{type(data).__name__}; see data/contract.py"


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
        sizes = np.asarray(data.sizes, float)
    except (TypeError, ValueError):
        sizes = np.zeros(0)
    if list(sizes.shape) != [count, 2] or not count:
        problems.append(f"sizes are not (h, w) of each of its {count} images")
    elif not (sizes >= 1).all() or np.isinf(sizes).any():
        problems.append("sizes are not all whole numbers of pixels, at least 1")
    try:
        check_listed({"images": [], "categories": data.categories})
        if not data.categories:
            raise ValueError("there is none")
    except ValueError as e:
        problems.append(f"categories are not a list of dicts of id and name, one a class: {e}")
    return problems


def _first_problems(items: CheckedItems) -> list[str]:
    problems, boxes = [], []
    for i in range(min(FIRST, len(items))):
        item, found = items.look_at(i)
        problems += [f"item {i}: {problem}" for problem in found]
        if not found:
            boxes.append(item[1]["boxes"].as_subclass(Tensor))
    if not problems and len(all_boxes := torch.cat(boxes)) and all_boxes.max() <= 1:
        problems = ["boxes lie between 0 and 1: pixels are needed, not shares of the sides"]
    return problems


def _without_objects(items: CheckedItems) -> list[str]:
    """A problem if there is nothing to learn; reads up to the first item with an object."""
    if any(not items[i][1]["ignore"].all() for i in range(len(items))):
        return []
    return [f"none of its {len(items)} items has an object that is not ignored"]


# ------------------------------------------------------------------------------ items


class CheckedItems(Dataset):
    """A data set that checks each item as it is drawn. `masks`: its targets need masks."""

    def __init__(self, data, masks: bool = False):
        self.data, self.masks = data, masks
        self.sizes, self.categories = data.sizes, data.categories

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        item, problems = self.look_at(index)
        if problems:
            raise BadInput(f"item {index} of {_name(self.data)}: {'; '.join(problems)}")
        return item

    def coco(self) -> dict:
        return self.data.coco()

    def look_at(self, index: int) -> tuple[tuple[Tensor, dict], list[str]]:
        """An item, and what is wrong with it. Any error of the data set becomes BadInput."""
        try:
            item = self.data[index]
        except BadInput:
            raise
        except Exception as e:  # from its author's code
            why = f"{type(e).__name__}: {e}"
            raise BadInput(f"item {index} of {_name(self.data)} cannot be read: {why}") from e
        size, num_classes = self.sizes[index], len(self.categories)
        return item, item_problems(item, size, num_classes, self.masks)


def item_problems(item, size, num_classes: int, masks: bool = False) -> list[str]:
    """What is wrong with an item, whose data set promises this size (h, w)."""
    if not isinstance(item, (tuple, list)) or len(item) != 2 or not isinstance(item[1], dict):
        shown = type(item).__name__
        if isinstance(item, (tuple, list)):
            shown = f"({', '.join(type(part).__name__ for part in item)})"
        return [f"is not (image, target), target a dict, but {shown}"]
    image, target = item
    try:
        check_image(image)
    except BadInput as e:
        return [str(e)]
    tensors = ["boxes", "labels", "ignore", *(["masks"] if masks else [])]
    missing = {*tensors, "image_id", "size"} - set(target)
    if missing:
        return [f"its target has no {', '.join(sorted(missing))}"]
    wrong_types = [k for k in tensors if not isinstance(target[k], Tensor)]
    if wrong_types:
        return [f"{', '.join(wrong_types)}: not a tensor"]
    h, w = map(int, size)
    labels, ignore = target["labels"], target["ignore"]
    G = len(labels) if labels.ndim else -1
    problems = _box_problems(target["boxes"], labels, h, w)
    if labels.dtype != torch.long or labels.ndim != 1:
        problems.append("labels are not [G] of torch.long")
    if ignore.dtype != torch.bool or ignore.shape != (G,):
        problems.append("ignore is not [G] of torch.bool")
    if image.shape[1:] != (h, w):
        actual = f"{image.shape[1]}x{image.shape[2]}"
        problems.append(f"is {actual} px, sizes says {h}x{w} (h x w)")
    if not isinstance(target["size"], (tuple, list)) or tuple(target["size"]) != (h, w):
        problems.append(f"size is {target['size']}, sizes says {h}x{w} (h x w)")
    if not isinstance(target["image_id"], (int, str)):
        problems.append("image_id is neither a number nor a string")
    if masks and not isinstance(target["masks"], MaskCrops):
        shape, dtype = list(target["masks"].shape), target["masks"].dtype
        if shape != [G, h, w] or dtype != torch.bool:
            wanted = f"[G, h, w] = {[G, h, w]} of torch.bool"
            problems.append(f"masks are {shape} of {dtype}, not {wanted}")
    wrong = labels[(labels < 0) | (labels >= num_classes)].unique().tolist()
    if wrong:
        problem = f"labels of {num_classes} categories are 0..{num_classes - 1}, here is {wrong}"
        if wrong == [num_classes]:  # the background's number, which would train unnoticed
            problem += "; torchvision's start at 1, with 0 for the background"
        problems.append(problem)
    return problems


def _box_problems(boxes: Tensor, labels: Tensor, h: int, w: int) -> list[str]:
    """What is wrong with the boxes of objects with these labels, in an image of this size."""
    if boxes.shape != (*labels.shape, 4):
        return [f"boxes are {list(boxes.shape)}, not [G, 4], for labels {list(labels.shape)}"]
    kind = getattr(boxes, "format", tv_tensors.BoundingBoxFormat.XYXY)
    if kind != tv_tensors.BoundingBoxFormat.XYXY:
        return [f"boxes are in the format {kind.name}, not XYXY"]
    if boxes.is_complex() or not boxes.isfinite().all():
        return ["boxes are not finite numbers"]
    x1, y1, x2, y2 = boxes.as_subclass(Tensor).unbind(1)
    if not ((x2 >= x1) & (y2 >= y1)).all():
        return ["boxes are not (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2"]
    outside = (x1 > w) | (y1 > h) | (x2 < 0) | (y2 < 0) | (boxes.abs() > FAR).any(1)
    if outside.any():
        first = [round(v, 2) for v in boxes[outside][0].tolist()]
        return [f"boxes lie outside the image of {h}x{w} px (h x w): {first}"]
    return []


# ------------------------------------------------------------------------------ ground truth


def checked_truth(data) -> dict:
    """data.coco(), the ground truth for scoring detections.

    Raises BadInput if it is no COCO dictionary, or if its images and categories are not
    those of the data set. The objects of the first items must be in it, with their
    categories.
    """
    try:
        truth = data.coco()
        problem = _truth_problem(truth, data) or _strange_objects(truth, data)
    except BadInput:
        raise
    except Exception as e:  # from its author's code, or from unusable values
        raise BadInput(f"coco() of {_name(data)}: {type(e).__name__}: {e}") from e
    if problem:
        raise BadInput(f"coco() of {_name(data)}: {problem}")
    return truth


def _truth_problem(truth: dict, data) -> str:
    """The first thing in a ground truth that pycocotools would trip on, or score wrongly."""
    try:
        check_listed(truth, files=False)
        if len(truth["images"]) != len(data):
            return f"it has {len(truth['images'])} images, the data set has {len(data)}"
        own = {c["id"]: c["name"] for c in data.categories}
        named = {c["id"]: c["name"] for c in truth["categories"]}
        if named != own:
            return f"its categories are {named}, the data set's {own}"
        check_coco(truth, files=False)
    except ValueError as e:
        return str(e)
    for i, annotation in enumerate(truth.get("annotations", [])):
        bbox = annotation["bbox"]
        if not all(map(math.isfinite, bbox)) or min(bbox[2:]) < 0:
            return f"annotations[{i}]: bbox is {bbox!r}, not finite (x, y, width, height)"
    return ""


def _strange_objects(truth: dict, data) -> str:
    """An object of the first items that is not in the ground truth; "" if all are."""
    images = {image["id"] for image in truth["images"]}
    annotations = truth.get("annotations", [])
    for i in range(min(FIRST, len(data)) if annotations else 0):
        _, target = CheckedItems(data)[i]
        image_id, (h, w) = target["image_id"], target["size"]
        if image_id not in images:
            return f"it has no image {image_id!r}, which is item {i}"
        ends = torch.tensor([w, h, w, h])  # boxes may be clipped in only one of the two places
        own = [a for a in annotations if a["image_id"] == image_id]
        boxes = target["boxes"].as_subclass(Tensor).float()
        for box, label, ignored in zip(boxes, target["labels"], target["ignore"]):
            category = data.categories[int(label)]
            known = [[*a["bbox"]] for a in own if a["category_id"] == category["id"]]
            others = xywh_to_xyxy(known).clamp(min=0).minimum(ends)
            apart = others - box.clamp(min=0).minimum(ends)
            if not (ignored or (apart.abs().amax(1) <= CLOSE).any()):
                shown = [round(v, 2) for v in box.tolist()]
                return f"item {i} has a {category['name']!r} at {shown} (xyxy), coco() has none"
    return ""
