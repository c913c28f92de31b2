"""Where Pascal VOC's XML files and images lie: VOC's own folders, or labelImg's flat ones."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from data.coco import Split
from data.files import choose_splits, folders_of
from data.voc import Stems, read_voc, read_voc_folder

XML_FOLDERS = ("annotations", "annotation", "xml", "xmls", "labels")
IMAGE_FOLDERS = ("jpegimages", "images", "image", "imgs", "img", "photos", "data")
SAMPLE = 40  # choice: XML files whose images are looked for


# ------------------------------------------------------------------------------ with lists


def find_voc_lists(
    root: Path, train_split: str = "", val_split: str = ""
) -> dict[str, Split] | None:
    """The splits that ImageSets/Main/ lists, in a VOC folder or its VOC2007/ and VOC2012/.

    If both are there, both train and the first one tests. Splits that are not named: test to
    evaluate (without a list of that name: val), and to train trainval if that excludes the
    test images, else train. If there is neither test nor val, only "train" is returned.
    """
    places = [root, root / "VOC2007", root / "VOC2012"]
    folders = [place for place in places if (place / "JPEGImages").is_dir()]
    lists = _lists(folders[0]) if folders else []
    if not lists:
        return None
    if not val_split and not {"test", "val"} & set(lists):
        only = train_split or next(n for n in ("trainval", "train", *lists) if n in lists)
        return {"train": Split(_split_files(folders, only), "", read_voc)}
    if not val_split:
        val_split = "test" if "test" in lists else "val"
    if not train_split:
        # Only a test split is apart from trainval: otherwise val would train too.
        apart = val_split == "test" and "trainval" in lists
        train_split = "trainval" if apart else "train"
    return {
        "train": Split(_split_files(folders, train_split), "", read_voc),
        "val": Split(_split_file(folders[0], val_split), "", read_voc),
    }


def _lists(folder: Path) -> list[str]:
    """The lists in a VOC folder by name: splits, and perhaps those of single classes."""
    return sorted(path.stem for path in (folder / "ImageSets" / "Main").glob("*.txt"))


def _split_files(folders: list[Path], split: str) -> str:
    return os.pathsep.join(str(_split_file(folder, split)) for folder in folders)


def _split_file(folder: Path, split: str) -> Path:
    return folder / "ImageSets" / "Main" / f"{split}.txt"


# ------------------------------------------------------------------------------ without lists


def find_voc(root: Path, train_split: str = "", val_split: str = "") -> dict[str, Split] | None:
    """The splits of XML files without lists; only "train" if there is but one set."""
    found = {}
    for split in ("train", "val", "test", ""):
        pair = _find_pair(root, split)
        if pair is not None:
            xml, images = pair
            found[split] = Split(xml, "", partial(read_voc_folder, images))
    return choose_splits(found, train_split, val_split) if found else None


def _find_pair(root: Path, split: str) -> tuple[Path, Path] | None:
    """(folder of XML files, folder of their images) of a split; of all, with the split ""."""
    for xml in folders_of(root, split, XML_FOLDERS):
        stems = [path.stem for path in sorted(xml.glob("*.xml"))[:SAMPLE] if _is_voc(path)]
        if not stems:
            continue
        folders = [xml, *folders_of(root, split, IMAGE_FOLDERS), *folders_of(root, "", ())]
        folders += folders_of(root, "", IMAGE_FOLDERS)
        counts = [len(set(stems) & Stems(folder).names.keys()) for folder in folders]
        if max(counts) > 0:
            return xml, folders[counts.index(max(counts))]
    return None


def _is_voc(path: Path) -> bool:
    return b"<annotation" in path.read_bytes()[:4096].replace(b"\0", b"")  # UTF-16 has zeros
