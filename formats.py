"""Annotation formats: COCO's JSON, VOC's XML and UAVDT's text, all as a COCO dictionary, checked.

A COCO dictionary has images (id, file_name, height, width), categories (id, name) and, if anything
is known of them, annotations (image_id, category_id, bbox as x, y, w, h, iscrowd ...). A mask is an
annotation's `segmentation`: polygons (x, y, x, y ...), or RLE, the lengths of runs of pixels.
"""

from __future__ import annotations

import json
import math
import os
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle
from torch import Tensor

UAVDT = {"description": "UAVDT"}  # `info` of a COCO dictionary: by it the metrics know the data set


class BadInput(ValueError):
    """Something the user gave cannot be used; the message names the file and the reason."""


def read_json(path: Path, categories=None) -> dict:
    """COCO annotations as they are; `categories` are compared by the caller."""
    try:
        return json.loads(Path(path).read_text())
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{path}: broken JSON: {e}") from e


def read_voc(split_file: Path, categories: list[dict] | None = None) -> dict:
    """COCO dictionary of the images that ImageSets/Main/<split>.txt lists, `difficult` kept.

    VOC boxes are 1-based and inclusive: pixels xmin..xmax cover [xmin - 1, xmax]. Image ids are the
    files' stems. Categories are the names found, in alphabetical order, unless they are given.
    Several split files may be joined with os.pathsep (VOC 2007 + 2012).
    """
    images, objects = [], []
    names = {c["name"] for c in categories or ()}
    for split in str(split_file).split(os.pathsep):
        root = Path(split).parents[2]
        try:
            lines = Path(split).read_text().split("\n")
        except OSError as e:
            raise BadInput(f"{split}: {e.strerror}") from None
        for stem in (line.split()[0] for line in lines if line.strip()):
            path = root / "Annotations" / f"{stem}.xml"
            try:
                tree = ET.parse(path).getroot()
                size = [int(tree.findtext(f"size/{side}")) for side in ("height", "width")]
                for item in tree.iter("object"):
                    corners = ("xmin", "ymin", "xmax", "ymax")
                    x1, y1, x2, y2 = (float(item.findtext(f"bndbox/{c}")) for c in corners)
                    name, difficult = item.findtext("name").strip(), item.findtext("difficult", "0")
                    if categories is None:
                        names.add(name)
                    elif name not in names:
                        known = ", ".join(sorted(names)[:20])
                        raise BadInput(f"{path}: unknown category {name}, training has {known}")
                    objects.append((stem, name, (x1 - 1, y1 - 1, x2, y2), int(difficult)))
            except FileNotFoundError:
                raise BadInput(f"{path}: no such file, but {split} lists {stem}") from None
            except BadInput:
                raise
            except (ET.ParseError, TypeError, ValueError, AttributeError) as e:
                raise BadInput(f"{path}: broken VOC annotation: {e}") from e
            size = dict(zip(("height", "width"), size))
            images.append({"id": stem, "file_name": f"{root / 'JPEGImages' / stem}.jpg", **size})
    categories = categories or [{"id": i, "name": n} for i, n in enumerate(sorted(names), 1)]
    ids = {c["name"]: c["id"] for c in categories}
    annotations = []
    for image_id, name, (x1, y1, x2, y2), difficult in objects:
        box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
        known = {"id": len(annotations) + 1, "image_id": image_id, "category_id": ids[name]}
        annotations.append({**known, **box, "iscrowd": 0, "difficult": difficult})
    return {"images": images, "annotations": annotations, "categories": categories}


def find_uavdt(root: Path) -> list[Path] | None:
    """UAVDT's folders of frames, ground truth and lists in `root`; None if none of them is there.

    Looked for are Mxxxx/ (UAV-benchmark-M.zip), GT/Mxxxx_gt_whole.txt (UAV-benchmark-MOTD_v1.0.zip)
    and M_attr/<split>/Mxxxx_attr.txt (M_attr.zip), each in `root`, in its folders, and in theirs:
    an archive may be unpacked with or without a folder around it. BadInput if only some are there.
    """
    number, found = "M[0-9][0-9][0-9][0-9]", {}
    for mark in (number, f"GT/{number}_gt_whole.txt", f"M_attr/*/{number}*_attr.txt"):
        places = (p for depth in ("", "*/", "*/*/") for p in sorted(root.glob(depth + mark)))
        if place := next(places, None):
            found[mark] = place.parents[mark.count("/")]
        else:
            found[mark] = None
    lacks = [mark.replace(number, "Mxxxx") for mark, folder in found.items() if not folder]
    if len(lacks) == len(found):
        return None
    if lacks:
        raise BadInput(f"{root}: UAVDT is not whole: no {', no '.join(lacks)}")
    frames, truth, lists = found.values()
    return [frames, truth / "GT", lists / "M_attr"]


def read_uavdt(frames: Path, truth: Path, split: Path, categories=None) -> dict:
    """COCO dictionary of the sequences that the folder `split` lists in files Mxxxx_attr.txt.

    Images are the files frames/Mxxxx/img000001.jpg and so on, their ids "Mxxxx/img000001". The
    frames of a sequence have one size, taken from the first; that the others have it is for the
    check of all images. A row of truth/Mxxxx_gt_whole.txt is an object: frame (from 1), target,
    left, top, width, height, out of view, occlusion, category. Cars (1), trucks (2) and buses (3)
    are one class, as for the official detection evaluator. A row of Mxxxx_gt_ignore.txt is a
    rectangle to ignore, here a crowd. A frame without rows is an image without objects.
    `categories` are compared by the caller. BadInput names a broken row by file and line.
    """
    images, annotations = [], []
    # strip: the release has an "M0701 _attr.txt"
    listed = {path.name.removesuffix("_attr.txt").strip() for path in split.glob("M*_attr.txt")}
    if not listed:
        raise BadInput(f"{split}: no Mxxxx_attr.txt that lists a sequence")
    for sequence in sorted(listed):
        folder = frames / sequence
        stems = sorted(path.stem for path in folder.glob("img*.jpg"))
        ids = {int(stem[3:]): f"{sequence}/{stem}" for stem in stems if stem[3:].isdecimal()}
        if not ids:
            raise BadInput(f"{folder}: no frames img000001.jpg ..., but {split} lists {sequence}")
        first = frames / f"{next(iter(ids.values()))}.jpg"
        try:
            with Image.open(first, formats=["JPEG"]) as image:
                size = dict(zip(("width", "height"), image.size))
        except Exception as e:  # a decoder may raise anything
            raise BadInput(f"{first}: cannot read the image: {e}") from e
        images += [{"id": i, "file_name": f"{i}.jpg", **size} for i in ids.values()]
        for iscrowd, kind in enumerate(("whole", "ignore")):
            name = f"{sequence}_gt_{kind}.txt"
            path = truth / name
            try:
                lines = path.read_text().splitlines()
            except (OSError, UnicodeDecodeError) as e:
                raise BadInput(f"{path}: {getattr(e, 'strerror', e)}") from None
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    frame, _, x, y, w, h, _, _, category = map(int, line.split(","))
                except ValueError:
                    wrong = f"not nine whole numbers: {line[:80]}"
                    raise BadInput(f"{path}, line {number}: {wrong}") from None
                if frame not in ids and iscrowd:
                    continue  # nothing is there to ignore
                if frame not in ids:
                    raise BadInput(f"{path}, line {number}: frame {frame} is not in {folder}")
                if not iscrowd and category not in (1, 2, 3):
                    raise BadInput(f"{path}, line {number}: category {category}, not 1, 2 or 3")
                annotations.append(
                    {
                        "id": f"{name} line {number}",
                        "image_id": ids[frame],
                        "category_id": 1,
                        "bbox": [x, y, w, h],
                        "iscrowd": iscrowd,
                    }
                )
    vehicle = {"id": 1, "name": "vehicle"}
    whole = {"images": images, "annotations": annotations, "categories": [vehicle]}
    return {"info": UAVDT, **whole}


def check_coco(coco, masks: bool = False) -> None:
    """ValueError naming the first thing in COCO annotations that training or testing would trip on.

    Boxes that are broken but numbers are no such thing: they are dropped. With `masks` it looks at
    segmentations too.
    """
    number, whole = (int, float), (int,)  # by type(): True is an int too, and is neither

    def entries(name: str, needs: dict[str, tuple]):
        if not isinstance(coco.get(name, []), list):
            raise ValueError(f"{name} is no list")
        for i, entry in enumerate(coco.get(name, [])):
            if not isinstance(entry, dict):
                raise ValueError(f"{name}[{i}] is no object: {entry!r}")
            who = f"{name[:-1]} {entry['id']!r}" if "id" in entry else f"{name}[{i}]"
            for key, kinds in needs.items():
                if key not in entry:
                    raise ValueError(f"{who} has no {key}")
                if type(entry[key]) not in kinds:
                    raise ValueError(f"{who}: {key} is {entry[key]!r}")
            yield who, entry

    def ids(name: str, needs: dict) -> set:
        found = [entry["id"] for _, entry in entries(name, {"id": (int, str), **needs})]
        if len({type(i) for i in found}) > 1:
            raise ValueError(f"ids of {name} are numbers and strings, mixed")
        for i, count in Counter(found).most_common(1):
            if count > 1:
                raise ValueError(f"id {i!r} of {name} occurs more than once")
        return set(found)

    if not isinstance(coco, dict) or not {"images", "categories"} <= coco.keys():
        raise ValueError("not COCO annotations: no images and categories")
    images = ids("images", {"file_name": (str,), "height": whole, "width": whole})
    for who, image in entries("images", {}):
        if not all(0 < image[side] < 2**31 for side in ("height", "width")):
            raise ValueError(f"{who} is {image['height']} x {image['width']} px")
    sizes = {image["id"]: (image["height"], image["width"]) for image in coco["images"]}
    categories = ids("categories", {"name": (str,)})
    keys = {"image_id": (int, str), "category_id": (int, str), "bbox": (list, tuple)}
    for who, a in entries("annotations", keys):
        if a["image_id"] not in images:
            raise ValueError(f"{who} has no image {a['image_id']!r}")
        if a["category_id"] not in categories:
            raise ValueError(f"{who} is of unknown category {a['category_id']!r}")
        if len(a["bbox"]) != 4 or any(type(v) not in number for v in a["bbox"]):
            raise ValueError(f"{who}: bbox is {a['bbox']!r}, not four numbers")
        if type(a.get("area", 0)) not in number or not math.isfinite(a.get("area", 0)):
            raise ValueError(f"{who}: area is {a['area']!r}")
        for key in ("iscrowd", "difficult"):
            if type(a.get(key, 0)) not in (int, bool) or a.get(key, 0) not in (0, 1):
                raise ValueError(f"{who}: {key} is {a[key]!r}, not 0 or 1")
        if masks and (wrong := mask_problem(a.get("segmentation"), *sizes[a["image_id"]])):
            raise ValueError(f"{who}: {wrong}")
    found = coco.get("annotations", [])
    if masks and found and not any(a.get("segmentation") for a in found):
        raise ValueError("its objects have no masks (segmentation), which --masks needs")


# ------------------------------------------------------------------------------ masks


# Side of a mask over its box. choice: four samples a side in each cell of a 28x28 target
MASK_SIDE = 112


def mask_problem(segmentation, height: int, width: int) -> str:
    """What pycocotools would trip on in a segmentation; "" if nothing, or if there is none."""
    if not segmentation:
        return ""
    if isinstance(segmentation, list):
        for p in segmentation:
            if not isinstance(p, list) or len(p) % 2 or any(type(v) not in (int, float) for v in p):
                return f"a polygon is {str(p)[:60]}, not x, y, x, y ..."
        return ""
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        return f"segmentation is neither polygons nor RLE: {str(segmentation)[:60]}"
    size, counts = segmentation["size"], segmentation["counts"]
    if size != [height, width]:
        return f"RLE of size {size}, its image is {height}x{width} px (h x w)"
    runs = run_lengths(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or any(type(n) is not int or not 0 <= n < 2**32 for n in runs):
        return f"RLE with counts {str(counts)[:60]}"
    return "" if sum(runs) == height * width else "RLE whose counts do not fill its image"


def run_lengths(counts: str) -> list[int]:
    """The runs of a compressed RLE. pycocotools would read past the end of one that is too short.

    Five bits a character, lowest first; the next bit says that more follow. A run from the fourth
    on is the difference to the one two before.
    """
    runs, value, shift = [], 0, 0
    for code in counts.encode():
        bits = code - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) and 1 << shift  # the last one's highest bit is the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    return runs + [-1] * (shift > 0)  # of its last run there should be more


def ignored(annotation: dict) -> bool:
    """Neither to be found nor background: a crowd, or one marked difficult."""
    return bool(annotation.get("iscrowd", 0) or annotation.get("difficult", 0))


ANYWHERE = (-math.inf, -math.inf, math.inf, math.inf)
FAR = 1e5  # px; choice: a mask's edge may reach so far outside its image


def usable_mask(annotation: dict, box=ANYWHERE) -> list | dict | None:
    """What can be used of a checked annotation's mask; None if none of it lies in the box (xyxy).

    A polygon of fewer than three points cannot, nor one with a point that is not finite or so far
    away that pycocotools, which walks along the edges, would not arrive. An object that is ignored
    has its whole bbox in place of None: it still is to be ignored.
    """
    segmentation = annotation.get("segmentation") or []
    if isinstance(segmentation, dict):
        x1, y1, w, h = rle.toBbox(_compressed(segmentation))
        x2, y2 = x1 + w, y1 + h
    else:
        segmentation = [p for p in segmentation if len(p) >= 6 and all(abs(v) < FAR for v in p)]
        x, y = ([v for p in segmentation for v in p[i::2]] for i in (0, 1))
        x1, y1, x2, y2 = (min(x), min(y), max(x), max(y)) if x else (0, 0, 0, 0)
    if min(x2, box[2]) > max(x1, box[0]) and min(y2, box[3]) > max(y1, box[1]):
        return segmentation
    x, y, w, h = annotation["bbox"]
    corners = [x, y, x + w, y, x + w, y + h, x, y + h]
    return [[min(max(v, -FAR), FAR) for v in corners]] if ignored(annotation) else None


def _compressed(segmentation: dict) -> dict:
    if isinstance(segmentation["counts"], list):
        return rle.frPyObjects(segmentation, *segmentation["size"])
    return segmentation


def decode_mask(segmentation: dict) -> Tensor:
    """RLE -> bool [h, w]."""
    return torch.from_numpy(rle.decode(_compressed(segmentation))).bool()


def encode_mask(bitmap: Tensor) -> dict:
    """bool [h, w] -> compressed RLE, as JSON can hold it."""
    found = rle.encode(np.asfortranarray(bitmap.numpy()).view(np.uint8))
    return {"size": [*bitmap.shape], "counts": found["counts"].decode()}


def crop_mask(segmentation: list | dict, box: Tensor, side: int = MASK_SIDE) -> Tensor:
    """A usable mask over its box [4]: bool [side, side], at the centres of that many cells.

    Of polygons no bitmap of the image's size is made.
    """
    if isinstance(segmentation, dict):
        return crop_bitmaps(decode_mask(segmentation)[None], box[None], side)[0]
    corner, wh = box[:2].numpy(), (box[2:] - box[:2]).clamp(min=1e-6).numpy()
    moved = [(np.reshape(p, (-1, 2)) - corner) / wh * side for p in segmentation]
    # the edges again: seen from a narrow box they lead far away
    moved = [p.clip(-99 * side, 99 * side).ravel().tolist() for p in moved]
    return torch.from_numpy(rle.decode(rle.merge(rle.frPyObjects(moved, side, side)))).bool()


def crop_bitmaps(bitmaps: Tensor, boxes: Tensor, side: int = MASK_SIDE) -> Tensor:
    """Masks [G, h, w] over boxes [G, 4]: [G, side, side], the pixels under the cells' centres."""
    h, w = bitmaps.shape[1:]
    at = (torch.arange(side) + 0.5) / side
    x, y = (boxes[:, i, None] + at * (boxes[:, i + 2] - boxes[:, i])[:, None] for i in (0, 1))
    x, y = x.long().clamp(0, w - 1), y.long().clamp(0, h - 1)  # [G, side]
    return bitmaps[torch.arange(len(boxes))[:, None, None], y[:, :, None], x[:, None]]
