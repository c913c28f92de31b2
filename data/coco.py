"""`CocoDetection`: image files with COCO annotations.

Every other folder format has a function that reads its annotations as a COCO dictionary:
images (id, file_name, height, width), categories (id, name) and, unless nothing is known of
them, annotations (image_id, category_id, bbox as x, y, w, h, iscrowd, segmentation ...).
Heights and widths may be missing: then the files tell. With "shares": True boxes are in shares
of their image's width and height; with "unclipped": True they are scored as they are annotated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.utils.data import Dataset

from common import BadInput
from data.checks import check_coco, check_listed
from data.contract import make_target
from data.files import find_file, listed, read_json
from data.images import MAX_PIXELS, SWAPPED, orientation, raw_size, read_image
from data.masks import MASK_SIDE, crop_mask, is_ignored, usable_mask
from data.plausible import odd_boxes, odd_categories, odd_emptiness, why_unusable
from data.tidy import read_coco
from data.transforms import MaskCrops
from data.upright import decide

__all__ = ["CocoDetection", "Split", "read_json", "xywh_to_xyxy"]


def xywh_to_xyxy(boxes) -> Tensor:
    """A list of boxes (x, y, w, h), as COCO writes them -> [N, 4] (x1, y1, x2, y2)."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return torchvision.ops.box_convert(boxes, "xywh", "xyxy")


class Split(NamedTuple):
    """One split of a data set in a folder: where it is, and the function that reads it."""

    source: str | Path  # the annotations, as messages name them
    image_dir: str | Path  # the folder that the images' file names start from
    # (source, categories) -> COCO dictionary; categories: those it must have, None: any
    read: Callable[..., dict] = read_coco
    upright: bool = False  # does the format annotate turned photos? For those that cannot tell


class CocoDetection(Dataset):
    """Image files with COCO annotations, or with others that are read as COCO's.

    The annotations are checked. Broken boxes (not finite, without area, outside the image)
    are dropped and counted in `notes`; everything else that is wrong raises BadInput with the
    file and the reason. A file without annotations, like those of COCO's test sets, loads, but
    nothing can be scored in it. With `masks` an object without a usable mask is dropped too,
    unless it is ignored; an object whose mask covers nothing of its box is ignored.

    `categories`, a training set's or a checkpoint's: classes are matched with them by name, and
    their ids are used. `upright` is "yes", "no" or "auto", see `data.upright`.

    Boxes are kept as flat arrays and masks as one array of text, so that loader processes
    share them instead of copying a million Python objects.
    """

    def __init__(
        self,
        source: str | Path,
        image_dir: str | Path,
        read: Callable[..., dict] = read_coco,
        categories: list[dict] | None = None,
        masks: bool = False,
        upright: str = "auto",
        upright_by_custom: bool = False,
        max_pixels: int = MAX_PIXELS,
    ):
        self.source, self.image_dir = Path(source), Path(image_dir)
        self.masks, self.max_pixels, self._read = masks, max_pixels, read
        self.notes: list[str] = []  # what was dropped or looks wrong, for the program to print
        coco = read(self.source, categories)
        self._check(check_listed, coco)
        self._find_images(coco["images"], upright, upright_by_custom)
        self._new_ids: dict = {}  # category id in the file -> in `categories`, where they differ
        self._add_sizes(coco)
        self._check(check_coco, coco, masks)
        self.categories = _categories_of(coco)
        self._note(odd_categories(self.categories))
        if categories is not None and categories != self.categories:
            self._match_categories(coco, categories)
        self._rename_categories(coco)
        self._keep_usable(coco.get("annotations", []))  # a test set has none

    def _check(self, check: Callable, *values) -> None:
        try:
            check(*values)
        except ValueError as e:
            raise BadInput(f"{self.source}: {e}") from e

    def _note(self, notes: list[str]) -> None:
        self.notes += [f"{self.source}: {note}" for note in notes]

    @property
    def note(self) -> str:
        """What a user should know of this set before it is used, a line each."""
        return "\n".join(self.notes)

    # -------------------------------------------------------------------------- images

    def _find_images(self, images: list[dict], upright: str, by_custom: bool) -> None:
        """Sets `image_ids`, `files`, `upright` and `sizes`; sizes not annotated are the files'."""
        self.image_ids = [image["id"] for image in images]
        files = [find_file(self.image_dir, image["file_name"]) for image in images]
        self.files = np.array(files)
        known = [_known_size(image) for image in images]
        self.upright, note = decide(files, known, upright, by_custom, self.max_pixels)
        self._note([note] if note else [])
        sizes = [size or self._size_of(file) for size, file in zip(known, files)]
        self.sizes = np.array(sizes).reshape(-1, 2)

    def _size_of(self, file: str) -> tuple[int, int]:
        height, width = raw_size(file, self.max_pixels)
        if self.upright and orientation(file, self.max_pixels) >= SWAPPED:
            return width, height
        return height, width

    def _add_sizes(self, coco: dict) -> None:
        """Give a dictionary the sizes that it lacks, and boxes in pixels."""
        for image, (height, width) in zip(coco["images"], self.sizes.tolist()):
            image.setdefault("height", height)
            image.setdefault("width", width)
        if coco.pop("shares", False):
            _to_pixels(coco)

    # -------------------------------------------------------------------------- categories

    def _match_categories(self, coco: dict, wanted: list[dict]) -> None:
        """Use the `wanted` categories instead of the file's own, matched by name."""
        own, id_of = self.categories, {c["name"].strip(): c["id"] for c in wanted}
        if len(id_of) < len(wanted) or len({c["name"] for c in own}) < len(own):
            raise BadInput(
                f"{self.source}: categories cannot be matched by name with the model's: several "
                "have one name, and the ids differ"
            )
        used = {a["category_id"] for a in coco.get("annotations", [])}
        unknown = [c["name"] for c in own if c["name"] not in id_of and c["id"] in used]
        if unknown:
            raise BadInput(
                f"{self.source}: unknown category {listed(unknown, 5)}: the model has "
                f"{listed(id_of, 20)}"
            )
        # A category that is unknown and has no boxes keeps an id that nothing uses.
        self._new_ids = {c["id"]: id_of.get(c["name"], c["id"]) for c in own}
        self.categories = wanted
        missing = [name for name in id_of if name not in {c["name"] for c in own}]
        without = f"; without {listed(missing)}" if missing else ""
        self._note([f"categories matched by name{without}"])

    def _rename_categories(self, coco: dict) -> None:
        """Give a dictionary the ids of the categories that its own were matched with."""
        if self._new_ids:
            coco["categories"] = self.categories
            for annotation in coco.get("annotations", []):
                annotation["category_id"] = self._new_ids[annotation["category_id"]]

    # -------------------------------------------------------------------------- annotations

    def _keep_usable(self, annotations: list[dict]) -> None:
        """Drop and count what cannot be used, and store the rest, sorted by image."""
        row_of = {image_id: row for row, image_id in enumerate(self.image_ids)}
        rows = np.array([row_of[a["image_id"]] for a in annotations], np.int64)
        boxes = np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4)
        self._note(odd_boxes(boxes, self.sizes[rows]))
        boxes[:, 2:] += boxes[:, :2]
        reasons = why_unusable(boxes, self.sizes[rows])
        usable = ~np.any(list(reasons.values()), axis=0)
        boxes = _clipped(boxes, self.sizes[rows])
        segmentations: list[list | dict | None] = []
        if self.masks:
            segmentations = [usable_mask(a, box) for a, box in zip(annotations, boxes.tolist())]
            without = np.array([s is None for s in segmentations], bool)
            reasons["no mask in it"] = usable & without
            usable &= ~without
            self._note(_polygon_notes(annotations, segmentations))
        # Positions in the file, because ids may be missing or occur twice.
        self.dropped = np.flatnonzero(~usable).tolist()
        self.why_dropped = ", ".join(f"{n.sum()} {why}" for why, n in reasons.items() if n.any())
        if self.dropped:
            self._note([self._dropped_note(annotations)])
        order = np.flatnonzero(usable)[np.argsort(rows[usable], kind="stable")]
        self._store_boxes(annotations, boxes, order)
        self._first = np.searchsorted(rows[order], np.arange(len(self.image_ids) + 1))
        self._store_masks([segmentations[i] for i in order] if self.masks else [])
        if annotations:
            self._note(odd_emptiness(len(self), len(self) - len(np.unique(rows))))

    def _dropped_note(self, annotations: list[dict]) -> str:
        names = listed(annotations[i].get("id", f"no. {i}") for i in self.dropped)
        count = f"{len(self.dropped)} of {len(annotations)} boxes"
        return f"dropped {count} ({self.why_dropped}): annotations {names}"

    def _store_boxes(self, annotations: list[dict], boxes: np.ndarray, order: np.ndarray) -> None:
        label_of = {c["id"]: label for label, c in enumerate(self.categories)}
        labels = [label_of[annotations[i]["category_id"]] for i in order]
        ignore = [is_ignored(annotations[i]) for i in order]
        self._boxes = torch.from_numpy(boxes[order]).float()
        self._labels = torch.tensor(labels, dtype=torch.long)
        self._ignore = torch.tensor(ignore, dtype=torch.bool)

    def _store_masks(self, segmentations: list) -> None:
        texts = [json.dumps(segmentation).encode() for segmentation in segmentations]
        self._texts = np.frombuffer(b"".join(texts), np.uint8)
        self._text_ends = np.cumsum([0, *map(len, texts)])

    def _segmentation(self, i: int):
        """The segmentation of the i-th box that was kept."""
        return json.loads(self._texts[self._text_ends[i] : self._text_ends[i + 1]].tobytes())

    # -------------------------------------------------------------------------- the contract

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def num_boxes(self) -> int:
        """How many boxes can be used, those to ignore included."""
        return len(self._boxes)

    @property
    def labels(self) -> Tensor:
        """[N] the labels of all boxes that are to be found, image by image."""
        return self._labels[~self._ignore]

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        first, end = self._first[index], self._first[index + 1]
        boxes, ignore = self._boxes[first:end], self._ignore[first:end]
        size = self.sizes[index].tolist()
        target = make_target(boxes, self._labels[first:end], ignore, self.image_ids[index], size)
        if self.masks:
            crops = torch.zeros(end - first, MASK_SIDE, MASK_SIDE, dtype=torch.bool)
            for crop, i in zip(crops, range(first, end)):
                crop[:] = crop_mask(self._segmentation(i), self._boxes[i])
            target["masks"] = crops.as_subclass(MaskCrops)
            target["ignore"] = ignore | ~crops.flatten(1).any(1)  # its mask misses its box
        return read_image(self.files[index], self.upright, self.max_pixels), target

    def fingerprint(self) -> str:
        """Equal for equal images and boxes: a run is not resumed on others."""
        parts = (self.image_ids, self.categories, self.sizes.tolist(), self._first.tolist())
        digest = hashlib.sha256(repr(parts).encode() + self._texts.tobytes())
        if self.upright:
            digest.update(b"upright")
        for values in (self._boxes, self._labels, self._ignore):
            digest.update(values.numpy().tobytes())
        return digest.hexdigest()

    def coco(self) -> dict:
        """The ground truth as a COCO dictionary, read again, without the dropped boxes.

        Boxes end at their image's border, as those that are trained on do.
        """
        coco, dropped = self._read(self.source, self.categories), set(self.dropped)
        self._add_sizes(coco)
        self._rename_categories(coco)
        kept = [a for i, a in enumerate(coco.get("annotations", [])) if i not in dropped]
        size_of = dict(zip(self.image_ids, self.sizes.tolist()))
        if not coco.pop("unclipped", False):
            kept = [_clipped_annotation(a, *size_of[a["image_id"]]) for a in kept]
        if self.masks:  # pycocotools takes a polygon of two points for a box
            kept = [{**a, "segmentation": usable_mask(a)} for a in kept]
        return {**coco, "annotations": kept}


def _categories_of(coco: dict) -> list[dict]:
    """The classes in the order of their labels: id and name, by id."""
    categories = [{"id": c["id"], "name": c["name"]} for c in coco["categories"]]
    return sorted(categories, key=lambda c: c["id"])


def _known_size(image: dict) -> tuple[int, int] | None:
    """An image's size (h, w) as annotated; None if a side is missing."""
    if "height" in image and "width" in image:
        return image["height"], image["width"]
    return None


def _to_pixels(coco: dict) -> None:
    """Boxes and polygons in shares of their images -> in pixels, in place."""
    size_of = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    for a in coco["annotations"]:
        w, h = size_of[a["image_id"]]
        a["bbox"] = [value * side for value, side in zip(a["bbox"], (w, h, w, h))]
        for polygon in a.get("segmentation", []):
            polygon[0::2] = [x * w for x in polygon[0::2]]
            polygon[1::2] = [y * h for y in polygon[1::2]]


def _clipped(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Boxes (xyxy) [n, 4] within their images' sizes [n, 2]: annotators reach over borders."""
    return np.clip(np.nan_to_num(boxes), 0, sizes[:, [1, 0, 1, 0]])  # (w, h, w, h)


def _clipped_annotation(annotation: dict, height: int, width: int) -> dict:
    """An annotation whose box ends at the image's border; itself, if it does already."""
    x, y, w, h = annotation["bbox"]
    if x >= 0 and y >= 0 and x + w <= width and y + h <= height:
        return annotation
    x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    clipped = {**annotation, "bbox": [x1, y1, x2 - x1, y2 - y1]}
    if annotation.get("area") == w * h:  # the box's, not a mask's
        clipped["area"] = (x2 - x1) * (y2 - y1)
    return clipped


def _polygon_notes(annotations: list[dict], segmentations: list) -> list[str]:
    cut = 0
    for annotation, usable in zip(annotations, segmentations):
        segmentation = annotation.get("segmentation")
        if isinstance(segmentation, list) and usable and segmentation != usable:
            cut += 1
    return [f"broken polygons left out of {cut} masks"] if cut else []
