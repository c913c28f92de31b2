"""Annotation formats: COCO's JSON and Pascal VOC's XML, both as a COCO dictionary, checked.

A COCO dictionary has images (id, file_name, height, width), categories (id, name) and, if anything
is known of them, annotations (image_id, category_id, bbox as x, y, w, h, iscrowd ...).
"""

from __future__ import annotations

import json
import math
import os
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path


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


def check_coco(coco) -> None:
    """ValueError naming the first thing in COCO annotations that training or testing would trip on.

    Boxes that are broken but numbers are no such thing: they are dropped.
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
