"""YOLO: finding data.yaml or images/ and labels/, and reading boxes and polygons.

A label file has the name of its image. A line holds a class and a box (x and y of the
centre, width, height), or a class and a polygon (x, y, x, y ...), all as shares of the
image's sides. An image without a label file has no objects. The tools of this format turn
photos upright as their EXIF data say.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common import BadInput
from data.coco import Split, Splits
from data.files import (
    choose_splits,
    find_file,
    folders_of,
    images_in,
    is_image,
    other_names,
    read_text,
)

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "data")
NAME_FILES = tuple("classes.txt */classes.txt *.names */*.names *.labels */*.labels".split())

# ------------------------------------------------------------------------------ finding


def find_yolo(root: Path, train_split: str = "", val_split: str = "") -> Splits | None:
    """The splits of a YOLO folder, or of a data.yaml; only "train" if there is but one set."""
    files = [root] if root.is_file() else [*sorted(root.glob("*.y*ml"))]
    names: dict[int, str] | None = None
    for file in files:
        settings = read_yaml(file)
        names = _names(file, settings)
        places = {name: settings[name] for name in ("train", "val", "test") if settings.get(name)}
        if places:
            chosen = choose_splits(places, train_split, val_split).items()
            return {name: _split_of(file, settings, name, value, names) for name, value in chosen}
    if root.is_file():
        raise BadInput(f"{root}: names no folder of images (train: images/train)")
    found = {split: _labelled_folder(root, split) for split in ("train", "val", "test")}
    if not any(found.values()):
        found = {"": _labelled_folder(root, "")}
    names = names or _names_beside(root)
    splits = {
        split: Split(folder, "", partial(read_yolo, [folder], names, False), upright=True)
        for split, folder in found.items()
        if folder is not None
    }
    return choose_splits(splits, train_split, val_split) if splits else None


def _split_of(file: Path, settings: dict, use: str, value, names) -> Split:
    """The split of a data.yaml that trains or evaluates (`use`) on the places in `value`."""
    base = file.parent / find_file(file.parent, str(settings.get("path") or "."))
    places = []
    for text in value if isinstance(value, list) else [value]:
        place = _find_place([base, file.parent], str(text))
        if place is None:
            raise BadInput(
                f"{file}: {use}: {text}: no such folder or list. With COCO annotations, "
                "name the files yourself: --train-json and --train-images"
            )
        places.append(place)
    read = partial(read_yolo, places, names, "kpt_shape" in settings)
    return Split(places[0] if len(places) == 1 else file, "", read, upright=True)


def _find_place(bases: Sequence[Path], text: str) -> Path | None:
    """A folder or list that data.yaml names: exports carry paths of the machine they left."""
    names = [text, *(n for n in other_names(text) if n.lower() not in IMAGE_FOLDERS)]
    places = (base / name for name in names for base in bases)
    return next(filter(Path.exists, places), None)


def _labelled_folder(root: Path, split: str) -> Path | None:
    """The folder with a split's images that has labels for some of them."""
    for folder in folders_of(root, split, IMAGE_FOLDERS):
        for image in images_in(folder, below=folder != root):
            label = label_file(image)
            with contextlib.suppress(BadInput):
                if label is not None and _read_labels(label, None, False):
                    return folder
    return None


# ------------------------------------------------------------------------------ names


def read_yaml(path: Path) -> dict[str, Any]:
    """The part of YAML that data.yaml uses: names with a value, a list or a table of texts."""
    values: dict[str, Any] = {}
    key = ""
    for line in _whole_lines(read_text(path)):
        item = re.match(r"\s*-\s+(.*)", line)
        pair = re.match(r"\s*([^:]+?)\s*:(?:\s+(.*))?$", line)
        if item and key:
            values[key] = [*(values[key] or []), _plain(item[1])]
        elif pair and line[0] not in " \t":
            key = _plain(pair[1])
            values[key] = _value(pair[2] or "")
        elif pair and key and not isinstance(values[key], (list, str)):
            values[key] = {**(values[key] or {}), _plain(pair[1]): _plain(pair[2] or "")}
    return values


def _whole_lines(text: str) -> list[str]:
    """Lines without comments; a list in brackets that spans several is made one."""
    lines: list[str] = []
    for line in text.splitlines():
        line = re.sub(r"(^|\s)#.*", "", line).rstrip()
        last = lines[-1] if lines else ""
        if last.count("[") > last.count("]") or last.count("{") > last.count("}"):
            lines[-1] += " " + line.strip()
        elif line.strip() and not line.startswith("---"):
            lines.append(line)
    return lines


def _value(text: str) -> Any:
    """A text, or a list or table in brackets; None for an empty text."""
    text = text.strip()
    parts = [p.strip() for p in re.findall(r"""\s*(?:"[^"]*"|'[^']*'|[^,"'])+""", text[1:-1])]
    parts = [part for part in parts if part]
    if text.startswith("["):
        return [_plain(part) for part in parts]
    if text.startswith("{"):
        return {_plain(k): _plain(v) for k, _, v in (part.partition(":") for part in parts)}
    return _plain(text) if text else None


def _plain(text: str) -> str:
    text = text.strip()
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1] if quoted else text


def _names(file: Path, settings: dict) -> dict[int, str] | None:
    """Class number -> name in data.yaml; None if it has neither `names` nor `nc`."""
    names = settings.get("names")
    try:
        if isinstance(names, list):
            return dict(enumerate(names))
        if isinstance(names, dict):
            return {int(number): name for number, name in names.items()}
        return {i: str(i) for i in range(int(settings["nc"]))} if settings.get("nc") else None
    except ValueError as e:
        raise BadInput(f"{file}: names or nc: {e}") from e


def _names_beside(root: Path) -> dict[int, str] | None:
    """The classes' names in classes.txt or a file like it, a line each; None without one."""
    for pattern in NAME_FILES:
        for file in sorted(root.glob(pattern)):
            lines = [line.strip() for line in read_text(file).splitlines()]
            return dict(enumerate(filter(None, lines)))
    return None


# ------------------------------------------------------------------------------ reading


def read_yolo(
    places: Sequence[Path],
    names: dict[int, str] | None,
    keypoints: bool,
    source: Path,
    categories: list[dict] | None = None,
) -> dict:
    """COCO dictionary of the images in folders and lists, with boxes in shares of their sides.

    Class numbers are the categories' ids, and without `names` also their names.
    `keypoints`: each box is followed by a pose's keypoints, which are not read.
    """
    files = [image for place in places for image in _images_of(place)]
    labels = [label_file(image) for image in files]
    if files and not any(labels):
        wanted = _label_places(files[0])
        raise BadInput(f"{source}: no label files: for {files[0].name} there is no {wanted[0]}")
    ids = [image.stem for image in files]
    if len(set(ids)) < len(ids):  # then the paths below the folder that holds all images
        top = os.path.commonpath([image.parent for image in files])
        ids = [image.relative_to(top).as_posix() for image in files]
    images, annotations = [], []
    for image_id, image, label in zip(ids, files, labels):
        images.append({"id": image_id, "file_name": str(image)})
        if label is not None:
            objects = _read_labels(label, names, keypoints)
            annotations += [{"image_id": image_id, **o} for o in objects]
    if names is None:
        last = max((a["category_id"] for a in annotations), default=-1)
        names = {i: str(i) for i in range(last + 1)}
    classes = [{"id": number, "name": name.strip()} for number, name in names.items()]
    coco = {"images": images, "annotations": annotations, "categories": classes}
    return {**coco, "shares": True}


def _images_of(place: Path) -> list[Path]:
    """The images in a folder, or those that a text file lists."""
    if place.is_dir():
        return images_in(place, below=True)
    lines = filter(None, map(str.strip, read_text(place).splitlines()))
    return list(filter(is_image, (Path(find_file(place.parent, line)) for line in lines)))


def _label_places(image: Path) -> list[Path]:
    """Where an image's label file may be: in labels/ in place of images/, or beside it."""
    folders = list(image.parts[:-1])
    places = [image.with_suffix(".txt")]
    for i in reversed(range(len(folders))):
        if folders[i].lower() in IMAGE_FOLDERS:
            folders[i] = "labels"
            places.insert(0, Path(*folders, image.name).with_suffix(".txt"))
            break
    return places


def label_file(image: Path) -> Path | None:
    return next((path for path in _label_places(image) if path.exists()), None)


def _read_labels(path: Path, names: dict[int, str] | None, keypoints: bool) -> list[dict]:
    """The objects in a label file."""
    objects = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        words = line.split()
        if not words:
            continue
        who = f"{path.name} line {number}"
        try:
            label, *values = map(float, words)
            if label != int(label) or label < 0 or (names is not None and label not in names):
                raise ValueError(f"unknown class {words[0]}")
            shape = _shape(values[:4] if keypoints else values)
        except (ValueError, OverflowError) as e:
            raise BadInput(f"{path}, line {number}: {e}") from None
        objects.append({"id": who, "category_id": int(label), "iscrowd": 0, **shape})
    return objects


def _shape(values: list[float]) -> dict:
    """A box (x, y, w, h) or, with more numbers, a polygon and the box around it.

    >>> _shape([0.5, 0.5, 0.5, 0.25])
    {'bbox': [0.25, 0.375, 0.5, 0.25]}
    """
    if len(values) == 4:
        x, y, w, h = values
        return {"bbox": [x - w / 2, y - h / 2, w, h]}
    if len(values) < 6 or len(values) % 2:
        raise ValueError(f"{len(values)} numbers after the class are no box or polygon")
    x1, y1 = min(values[0::2]), min(values[1::2])
    x2, y2 = max(values[0::2]), max(values[1::2])
    return {"bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": [values]}
