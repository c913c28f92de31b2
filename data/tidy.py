"""COCO annotations as labelling tools write them -> as `checks.check_coco` wants them.

Only what has one meaning is changed: null and `Unspecified` are absent, 640.0 is 640, a
mask that is one flat polygon is a list of one. Whatever else is odd stays, and is refused
by name.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlparse

from data.files import read_json

UNSPECIFIED = (None, "Unspecified", "unspecified")


def read_coco(path: str | Path, categories: list[dict] | None = None):
    """COCO annotations in a file, tidied, or whatever else the file holds.

    `categories` are not used: every function that reads annotations takes them.
    """
    coco = read_json(path)
    if not isinstance(coco, dict):
        return coco
    if coco.get("annotations", []) is None:
        del coco["annotations"]
    for image in _entries(coco, "images"):
        _tidy_numbers(image, ("id", "height", "width"))
        for side in ("height", "width"):
            if image.get(side) == 0:
                del image[side]
        url = image.get("coco_url")
        if image.get("file_name") is None and isinstance(url, str):  # LVIS names no file
            image["file_name"] = urlparse(url).path.lstrip("/")
    for category in _entries(coco, "categories"):
        _tidy_numbers(category, ("id",))
        if isinstance(category.get("name"), str):
            category["name"] = category["name"].strip()
    for annotation in _entries(coco, "annotations"):
        _tidy_numbers(annotation, ("id", "image_id", "category_id", "iscrowd", "difficult"))
        for key in ("area", "segmentation"):
            if key in annotation and annotation[key] is None:
                del annotation[key]
        if annotation.get("segmentation"):
            annotation["segmentation"] = tidy_segmentation(annotation["segmentation"])
    return coco


def _entries(coco: dict, name: str) -> list[dict]:
    entries = coco.get(name)
    if not isinstance(entries, list):
        return []
    return [entry for entry in entries if isinstance(entry, dict)]


def _tidy_numbers(entry: dict, keys: tuple[str, ...]) -> None:
    for key in keys:
        if key in entry:
            entry[key] = _whole(entry[key])
            if entry[key] in UNSPECIFIED:
                del entry[key]


def tidy_segmentation(segmentation):
    """Whole numbers in an RLE; polygons as flat lists.

    >>> tidy_segmentation([1, 2, 3, 4, 5, 6]), tidy_segmentation([[[1, 2], [3, 4], [5, 6]]])
    ([[1, 2, 3, 4, 5, 6]], [[1, 2, 3, 4, 5, 6]])
    """
    if isinstance(segmentation, dict):
        rle = dict(segmentation)
        for key in ("size", "counts"):
            if isinstance(rle.get(key), list):
                rle[key] = [_whole(value) for value in rle[key]]
        return rle
    if not isinstance(segmentation, list):
        return segmentation
    if all(type(value) in (int, float) for value in segmentation):
        return [segmentation]
    polygons = []
    for polygon in segmentation:
        points = polygon if isinstance(polygon, list) else [polygon]
        if all(isinstance(point, list) and len(point) == 2 for point in points):
            polygon = [value for point in points for value in point]
        polygons.append(polygon)
    return polygons


def _whole(value):
    return int(value) if type(value) is float and value.is_integer() else value
