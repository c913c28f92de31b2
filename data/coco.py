"""`CocoDetection`: image files with COCO annotations.

Every other folder format has a function that reads its annotations as a COCO dictionary:
images (id, file_name, height, width), categories (id, name) and, unless nothing is known
of them, annotations (image_id, category_id, bbox as x, y, w, h, iscrowd, segmentation
...). Heights and widths may be missing: then the files tell. With "shares": True boxes
are in shares of their image's width and height; with "unclipped": True they are scored as
they are annotated.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.utils.data import Dataset

from common import BadInput
from data.checks import FEW, check_coco, check_listed, odd_boxes, why_unusable
from data.contract import make_target
from data.files import find_file, listed
from data.images import MAX_PIXELS, SWAPPED, decide_upright, orientation, raw_size, read_image
from data.masks import MASK_SIDE, crop_mask, is_ignored, usable_mask
from data.tidy import read_coco
from data.transforms import MaskCrops


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


Splits = dict[str, Split]  # by "train" and "val"


class CocoDetection(Dataset):
    """Image files with COCO annotations, or with others that are read as COCO's.

    The annotations are checked. Broken boxes (not finite, without area, outside the
    image) are dropped and counted in `notes`; everything else that is wrong raises
    BadInput with the file and the reason. A file without annotations, like those of
    COCO's test sets, loads, but nothing can be scored in it. With `masks` an object
    without a usable mask is dropped too, unless it is ignored; an object whose mask
    covers nothing of its box is ignored.

    Classes are matched by name with `categories`, a training set's or a checkpoint's, and
    their ids are used. `upright` is "yes", "no" or "auto" (`data.images.decide_upright`).

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
        try:
            check_listed(coco)
            self._find_images(coco["images"], upright, upright_by_custom)
            self._add_sizes(coco)
            check_coco(coco, masks)
        except BadInput:
            raise
        except ValueError as e:
            raise BadInput(f"{self.source}: {e}") from e
        own = [{"id": c["id"], "name": c["name"]} for c in coco["categories"]]
        self.categories = sorted(own, key=lambda c: c["id"])
        self._new_ids: dict = {}  # ids in the file -> in `categories`
        counts = Counter(c["name"] for c in own)
        if twice := [name for name, count in counts.items() if count > 1]:
            self._note(f"several categories of one name ({listed(twice)}) are several classes")
        if categories is not None and categories != self.categories:
            self._match_categories(coco, categories)
        self._rename_categories(coco)
        self._keep_usable(coco.get("annotations", []))  # a test set has none

    def _note(self, note: str) -> None:
        self.notes.append(f"{self.source}: {note}")

    @property
    def note(self) -> str:
        """What a user should know about this set before it is used, a line each."""
        return "\n".join(self.notes)

    # -------------------------------------------------------------------------- images

    def _find_images(self, images: list[dict], upright: str, by_custom: bool) -> None:
        """Set `image_ids`, `files`, `upright` and `sizes`, some from the files."""
        self.image_ids = [image["id"] for image in images]
        files = [find_file(self.image_dir, image["file_name"]) for image in images]
        self.files = np.array(files)
        sides = [(image.get("height"), image.get("width")) for image in images]
        known = [None if None in pair else pair for pair in sides]
        self.upright, note = decide_upright(files, known, upright, by_custom, self.max_pixels)
        if note:
            self._note(note)
        sizes = [size or self._size_of(file) for size, file in zip(known, files)]
        self.sizes = np.array(sizes).reshape(-1, 2)

    def _size_of(self, file: str) -> tuple[int, int]:
        height, width = raw_size(file, self.max_pixels)
        if self.upright and orientation(file, self.max_pixels) >= SWAPPED:
            return width, height
        return height, width

    def _add_sizes(self, coco: dict) -> None:
        """Add missing sizes; turn boxes and polygons in shares into pixels."""
        size_of = {}
        for image, (height, width) in zip(coco["images"], self.sizes.tolist()):
            image.setdefault("height", height)
            image.setdefault("width", width)
            size_of[image["id"]] = (image["width"], image["height"])
        for a in coco["annotations"] if coco.pop("shares", False) else ():
            w, h = size_of[a["image_id"]]
            a["bbox"] = [value * side for value, side in zip(a["bbox"], (w, h, w, h))]
            for polygon in a.get("segmentation", []):
                polygon[0::2] = [x * w for x in polygon[0::2]]
                polygon[1::2] = [y * h for y in polygon[1::2]]

    # -------------------------------------------------------------------------- categories

    def _match_categories(self, coco: dict, wanted: list[dict]) -> None:
        """Use the `wanted` categories instead of the file's own, matched by name."""
        own, id_of = self.categories, {c["name"].strip(): c["id"] for c in wanted}
        if len(id_of) < len(wanted) or len({c["name"] for c in own}) < len(own):
            why = "several have one name, and the ids differ"
            raise BadInput(f"{self.source}: categories cannot be matched by name: {why}")
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
        self._note(f"categories matched by name{without}")

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
        sizes = self.sizes[rows]
        for note in odd_boxes(boxes, sizes):
            self._note(note)
        boxes[:, 2:] += boxes[:, :2]
        reasons = why_unusable(boxes, sizes)
        usable = ~np.any(list(reasons.values()), axis=0)
        # annotators reach over an image's borders (w, h, w, h)
        boxes = np.clip(np.nan_to_num(boxes), 0, sizes[:, [1, 0, 1, 0]])
        segmentations: list[list | dict | None] = []
        if self.masks:
            segmentations = list(map(usable_mask, annotations, boxes.tolist()))
            without = np.array([s is None for s in segmentations], bool)
            reasons["no mask in it"] = usable & without
            usable &= ~without
            given = [a.get("segmentation") for a in annotations]
            pairs = [(g, s) for g, s in zip(given, segmentations) if isinstance(g, list)]
            if cut := sum(bool(s) and g != s for g, s in pairs):
                self._note(f"broken polygons left out of {cut} masks")
        # Positions in the file, because ids may be missing or occur twice.
        self.dropped = np.flatnonzero(~usable).tolist()
        if self.dropped:
            why = ", ".join(f"{n.sum()} {reason}" for reason, n in reasons.items() if n.any())
            names = listed(annotations[i].get("id", f"no. {i}") for i in self.dropped)
            count = f"{len(self.dropped)} of {len(annotations)} boxes"
            self._note(f"dropped {count} ({why}): annotations {names}")
        order = np.flatnonzero(usable)[np.argsort(rows[usable], kind="stable")]
        label_of = {c["id"]: label for label, c in enumerate(self.categories)}
        labels = [label_of[annotations[i]["category_id"]] for i in order]
        self._boxes = torch.from_numpy(boxes[order]).float()
        self._labels = torch.tensor(labels, dtype=torch.long)
        ignore = [is_ignored(annotations[i]) for i in order]
        self._ignore = torch.tensor(ignore, dtype=torch.bool)
        self._first = np.searchsorted(rows[order], np.arange(len(self) + 1))
        texts = [json.dumps(segmentations[i]).encode() for i in order if self.masks]
        self._texts = np.frombuffer(b"".join(texts), np.uint8)
        self._text_ends = np.cumsum([0, *map(len, texts)])
        empty = len(self) - len(np.unique(rows))
        if annotations and empty > FEW * len(self):
            what = f"{empty} of {len(self)} images are without an object"
            self._note(f"{what}: are their labels missing?")

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
        labels, image_id = self._labels[first:end], self.image_ids[index]
        target = make_target(boxes, labels, ignore, image_id, size)
        if self.masks:
            crops = torch.zeros(end - first, MASK_SIDE, MASK_SIDE, dtype=torch.bool)
            for crop, i in zip(crops, range(first, end)):
                text = self._texts[self._text_ends[i] : self._text_ends[i + 1]].tobytes()
                crop[:] = crop_mask(json.loads(text), self._boxes[i])
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
