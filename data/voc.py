"""Pascal VOC: finding and reading its XML files, and the 11-point AP of VOC 2007."""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
import torchvision

from common import BadInput
from data.coco import Split, Splits, xywh_to_xyxy
from data.files import choose_splits, folders_of, images_in, read_text
from data.tidy import UNSPECIFIED

XML_FOLDERS = ("annotations", "annotation", "xml", "xmls", "labels")
IMAGE_FOLDERS = ("jpegimages", "images", "image", "imgs", "img", "photos", "data")
SAMPLE = 40  # choice: XML files whose images are looked for

# ------------------------------------------------------------------------------ finding


def find_voc_lists(root: Path, train_split: str = "", val_split: str = "") -> Splits | None:
    """The splits that ImageSets/Main/ lists, in a VOC folder or its VOC2007/ and VOC2012/.

    If both are there, both train and the first one tests. By default testing uses test,
    or val without it. Training uses trainval if that excludes the test images, else
    train. If there is neither test nor val, only "train" is returned.
    """
    places = [root, root / "VOC2007", root / "VOC2012"]
    mains = [p / "ImageSets" / "Main" for p in places if (p / "JPEGImages").is_dir()]
    lists = sorted(path.stem for path in mains[0].glob("*.txt")) if mains else []
    if not lists:
        return None

    def split(folders: list[Path], name: str) -> Split:
        files = (str(main / f"{name}.txt") for main in folders)
        return Split(os.pathsep.join(files), "", read_voc)

    if not val_split and not {"test", "val"} & set(lists):
        only = train_split or next(n for n in ("trainval", "train", *lists) if n in lists)
        return {"train": split(mains, only)}
    val_split = val_split or ("test" if "test" in lists else "val")
    if not train_split:  # trainval must not hold the images that are tested
        train_split = "trainval" if val_split == "test" and "trainval" in lists else "train"
    return {"train": split(mains, train_split), "val": split(mains[:1], val_split)}


def find_voc(root: Path, train_split: str = "", val_split: str = "") -> Splits | None:
    """The splits of XML files without lists (labelImg); only "train" for a single set."""
    found = {}
    for split in ("train", "val", "test", ""):
        pair = _find_pair(root, split)
        if pair is not None:
            xml, images = pair
            found[split] = Split(xml, "", partial(read_voc_folder, images))
    return choose_splits(found, train_split, val_split) if found else None


def _find_pair(root: Path, split: str) -> tuple[Path, Path] | None:
    """(folder of XML files, folder of images) of a split; "": without splits."""
    for xml in folders_of(root, split, XML_FOLDERS):
        stems = {path.stem for path in sorted(xml.glob("*.xml"))[:SAMPLE] if _is_voc(path)}
        if not stems:
            continue
        folders = [xml, *folders_of(root, split, IMAGE_FOLDERS), *folders_of(root, "", ())]
        folders += folders_of(root, "", IMAGE_FOLDERS)
        counts = [len(stems & Stems(folder).names.keys()) for folder in folders]
        if max(counts) > 0:
            return xml, folders[counts.index(max(counts))]
    return None


def _is_voc(path: Path) -> bool:
    return b"<annotation" in path.read_bytes()[:4096].replace(b"\0", b"")  # UTF-16 has zeros


# ------------------------------------------------------------------------------ reading


def read_voc(split_files: str | Path, categories: list[dict] | None = None) -> dict:
    """COCO dictionary of the images that ImageSets/Main/<split>.txt lists, `difficult` kept.

    Image ids are the files' stems. Categories are the names that occur, in alphabetical
    order, unless they are given. Several split files are joined with os.pathsep (VOC 2007
    + 2012).
    """
    files = []
    for split_file in str(split_files).split(os.pathsep):
        root = Path(split_file).parents[2]
        images = Stems(root / "JPEGImages")
        for stem in _listed(split_file, root / "Annotations"):
            path = root / "Annotations" / f"{stem}.xml"
            if not path.exists():
                raise BadInput(f"{path}: no such file, but {split_file} lists {stem}")
            files.append((path, stem, images))
    return _read_files(files, categories)


def read_voc_folder(images: Path, source: Path, categories: list[dict] | None = None) -> dict:
    """The same for all XML files in the folder `source`, whose images are in `images`."""
    stems = Stems(images)
    files = [(path, path.stem, stems) for path in sorted(source.glob("*.xml"))]
    return _read_files(files, categories)


class Stems:
    """Image files of a folder by their stems, whatever their endings."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.names: dict[str, str] = {}
        for path in images_in(folder):
            if path.suffix == ".jpg" or path.stem not in self.names:
                self.names[path.stem] = path.name

    def find(self, stem: str, filename: str | None = None) -> str:
        """The image of an annotation: of its stem, or else the one that the XML names."""
        if stem not in self.names and filename and (self.folder / filename).is_file():
            return str(self.folder / filename)
        return str(self.folder / self.names.get(stem, f"{stem}.jpg"))


def _read_files(files: Iterable, categories: list[dict] | None) -> dict:
    """COCO dictionary of (XML file, image id, `Stems` of its images)."""
    images, annotations = [], []
    given = None if categories is None else {c["name"] for c in categories}
    for path, stem, stems in files:
        size, objects, filename = _read_xml(path)
        for o in objects:
            if given is not None and o["name"] not in given:
                known = ", ".join(sorted(given)[:20])
                raise BadInput(f"{path}: unknown category {o['name']}, training has {known}")
        images.append({"id": stem, "file_name": stems.find(stem, filename), **size})
        annotations += [{"image_id": stem, **o} for o in objects]
    if categories is None:
        names = sorted({a["name"] for a in annotations})
        categories = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
    ids = {c["name"]: c["id"] for c in categories}
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
        annotation["category_id"] = ids[annotation.pop("name")]
    return {"images": images, "annotations": annotations, "categories": categories}


def _listed(split_file: str, annotations: Path) -> list[str]:
    """The stems in a split file, a line each. A class's list has 1 or -1 behind each stem."""
    stems = []
    for line in filter(None, map(str.strip, read_text(split_file).splitlines())):
        without_mark = re.sub(r"\s+-?[01]$", "", line)
        without_ending = re.sub(r"\.(jpe?g|png|bmp|xml)$", "", without_mark, flags=re.IGNORECASE)
        meant = (line, without_mark, without_ending)  # a name may hold spaces and dots
        there = (stem for stem in meant if (annotations / f"{stem}.xml").exists())
        stems.append(next(there, without_mark))
    return stems


def _parse_xml(path: Path) -> ET.Element:
    """The root of an XML file, in the encoding that it declares."""
    data = path.read_bytes()
    declared = re.match(rb"""\s*<\?xml[^>]*encoding=["']([\w.:-]+)""", data)
    encoding = declared[1].decode().lower() if declared else "utf-8"
    if encoding in ("gb2312", "gbk"):  # expat knows neither; the newest of them includes both
        encoding = "gb18030"
    if encoding.startswith(("utf", "us-ascii", "iso-8859")):
        return ET.fromstring(data)
    return ET.fromstring(data.decode(encoding))


def _read_xml(path: Path) -> tuple[dict, list[dict], str | None]:
    """An image's size (as far as it is known), its objects, and the file's name in the XML.

    VOC's boxes are 1-based and inclusive: pixels xmin..xmax cover [xmin - 1, xmax]. The
    objects' category is still a name.
    """
    try:
        tree = _parse_xml(path)
        if not len(tree):
            raise ValueError(f"<{tree.tag}> is empty")
        size = {side: _whole(tree.findtext(f"size/{side}")) for side in ("height", "width")}
        objects = [_read_object(item) for item in tree.iter("object")]
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror}") from None
    except (ET.ParseError, ValueError, LookupError, OverflowError) as e:
        raise BadInput(f"{path}: broken VOC annotation: {e}") from e
    known = {side: value for side, value in size.items() if value}  # 0: not known either
    return known, objects, tree.findtext("filename")


def _read_object(item: ET.Element) -> dict:
    name = _text(item, "name").strip()
    if item.find("bndbox") is None and item.find("robndbox") is not None:
        raise ValueError(f"{name} has a rotated box (robndbox), not an upright one (bndbox)")
    x1 = float(_text(item, "bndbox/xmin")) - 1
    y1 = float(_text(item, "bndbox/ymin")) - 1
    x2 = float(_text(item, "bndbox/xmax"))
    y2 = float(_text(item, "bndbox/ymax"))
    return {
        "name": name,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": (x2 - x1) * (y2 - y1),
        "iscrowd": 0,
        "difficult": _whole(item.findtext("difficult")),
    }


def _whole(text: str | None) -> int:
    """A whole number, perhaps written as 640.0; 0 if it is absent."""
    text = (text or "").strip()
    if not text or text in UNSPECIFIED:
        return 0
    value = float(text)
    if value != int(value):
        raise ValueError(f"{text} is no whole number")
    return int(value)


def _text(element: ET.Element, path: str) -> str:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"no {path} in <{element.tag}>")
    return text


# ------------------------------------------------------------------------------ metric


def voc07_ap(truth: dict, results: list[dict], iou: float = 0.5) -> float:
    """Mean over classes of VOC 2007's 11-point AP, with the challenge's own rules of matching.

    `truth` is a COCO dictionary, `results` are in COCO's results format. Classes without
    an object that counts are left out.
    """
    aps = []
    for category in truth["categories"]:
        objects: dict = {}  # image id -> its objects of this class
        for a in truth["annotations"]:
            if a["category_id"] == category["id"]:
                objects.setdefault(a["image_id"], []).append(a)
        num = sum(not a.get("difficult", 0) for group in objects.values() for a in group)
        if num:
            detections = [r for r in results if r["category_id"] == category["id"]]
            aps.append(_eleven_point_ap(_hits(objects, detections, iou), num))
    return sum(aps) / len(aps) if aps else 0.0


def _hits(objects: dict, detections: list[dict], iou: float) -> list[bool]:
    """Whether each detection of a class finds an object, best score first.

    A detection belongs to the object it overlaps most. A second one on the same object is
    false. A detection on a difficult object counts neither way.
    """
    boxes = {image_id: xywh_to_xyxy([a["bbox"] for a in g]) for image_id, g in objects.items()}
    taken, hits = set(), []
    # Equal scores are sorted by image, so that the order of detection does not matter.
    for detection in sorted(detections, key=lambda r: (-r["score"], r["image_id"])):
        image_id = detection["image_id"]
        if image_id not in boxes:
            hits.append(False)
            continue
        box = xywh_to_xyxy([detection["bbox"]])
        overlap = torchvision.ops.box_iou(box, boxes[image_id])[0]
        value, best = overlap.max(0)
        if value <= iou:
            hits.append(False)
        elif not objects[image_id][best].get("difficult", 0):
            hits.append((image_id, int(best)) not in taken)
            taken.add((image_id, int(best)))
    return hits


def _eleven_point_ap(hits: list[bool], num: int) -> float:
    """Mean over recalls 0, 0.1 .. 1 of the best precision at that recall or a higher one.

    >>> round(_eleven_point_ap([True, False, True], num=2), 4)  # precisions 1, 1/2, 2/3
    0.8485
    """
    found = torch.tensor(hits, dtype=torch.float64).cumsum(0)
    recall, precision = found / num, found / torch.arange(1, len(found) + 1)
    total = 0.0
    for tenth in range(11):
        reached = precision[recall >= tenth / 10 - 1e-9]
        if len(reached):
            total += reached.max().item()
    return total / 11
