"""Where COCO annotations lie in a folder: as COCO's own, Roboflow's, CVAT's, Label Studio's.

JSON files of any name are searched for images and categories. For each of them, the
folder that has its images is searched next.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from common import BadInput
from data.coco import Split, Splits
from data.files import choose_splits, find_file, folders_in, folders_of, listed, read_text, split_in

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "jpegimages", "data", "photos")
MAX_FILES = 40  # choice: of JSON files looked at in a folder; labelme writes one a photo
SAMPLE = 40  # choice: of a file's images looked for in each folder


def find_coco2017(root: Path, *_) -> Splits | None:
    """The splits under COCO's own names, images in images/train2017/ or train2017/."""
    folder = root / "annotations"
    files = {name: folder / f"instances_{name}2017.json" for name in ("train", "val")}
    if not files["val"].exists():
        del files["val"]  # part of the training set is held out instead
    if not any(map(Path.exists, files.values())):
        return None
    splits = {}
    for name, file in files.items():
        places = [root / "images" / f"{name}2017", root / f"{name}2017"]
        there = next(filter(Path.is_dir, places), None)
        if there is None and file.exists():
            there = _image_folder(root, file)
        splits[name] = Split(file, there or places[1])
    return splits


def find_coco(root: Path, train_split: str = "", val_split: str = "") -> Splits | None:
    """The splits of a folder with COCO files; only "train" if there is but one set."""
    files: dict[str, list[Path]] = {}
    for file in _annotation_files(root):
        files.setdefault(_split_of(root, file), []).append(file)
    if not files:
        return None
    splits = {}
    for name, group in choose_splits(files, train_split, val_split).items():
        # of COCO's several files, the one with objects' boxes
        chosen = [file for file in group if file.name.startswith("instances")] or group
        if len(chosen) > 1:
            names = listed(file.relative_to(root) for file in chosen)
            raise BadInput(
                f"{root}: several COCO files for one split ({names}): choose with --train-json and "
                "--train-images (and --val-json, --val-images), or merge them"
            )
        splits[name] = Split(chosen[0], _image_folder(root, chosen[0]))
    return splits


# ------------------------------------------------------------------------------ annotations


def _annotation_files(root: Path) -> list[Path]:
    """The COCO files in a folder, in its folders, and in theirs."""
    files: list[Path] = []
    for depth in ("", "*/", "*/*/"):
        for folder in sorted(root.glob(depth)) if depth else [root]:
            files += filter(_is_coco, sorted(folder.glob("*.json"))[:MAX_FILES])
    return files


def _is_coco(path: Path) -> bool:
    """Does a JSON file have images and categories? Its text tells; parsing takes longer."""
    try:
        text = read_text(path)
    except BadInput:
        return False
    wanted = '"images"' in text and '"categories"' in text
    return wanted and '"segments_info"' not in text  # those are panoptic: masks without boxes


def _split_of(root: Path, file: Path) -> str:
    """The split that a file's name mentions, or else its folder's."""
    names = [file.stem, *reversed(file.relative_to(root).parent.parts)]
    return next(filter(None, map(split_in, names)), "")


# ------------------------------------------------------------------------------ images


def _image_folder(root: Path, file: Path) -> Path:
    """The folder that has most of the images which a COCO file lists."""
    names = _listed_images(file)
    folders = list(dict.fromkeys(_candidates(root, file)))
    counts = []
    for folder in folders:
        counts.append(sum(Path(find_file(folder, name)).exists() for name in names))
    if max(counts) > 0 or not names:
        return folders[counts.index(max(counts))]
    looked = listed(f"{folder.relative_to(root)}/" for folder in folders)
    raise BadInput(
        f"{file}: none of its images ({listed(names, 3)}) was found in {root} (looked in {looked})."
        f" Name their folder: --train-json {file} --train-images DIR"
    )


def _candidates(root: Path, file: Path) -> list[Path]:
    """Folders where a COCO file's images may lie, the likeliest first."""
    split = _split_of(root, file)
    folders = [file.parent, *folders_of(file.parent, "", IMAGE_FOLDERS)]
    if split:
        folders += folders_of(root, split, IMAGE_FOLDERS)
    folders += folders_of(root, "", IMAGE_FOLDERS)
    return folders + [path for folder in (root, *folders) for path in folders_in(folder)]


def _listed_images(file: Path) -> list[str]:
    """Names of some images that a COCO file lists, from all over it, without parsing it."""
    text = read_text(file)
    key = "file_name" if '"file_name"' in text else "coco_url"
    quoted = re.findall(rf'"{key}"\s*:\s*("(?:[^"\\]|\\.)*")', text)
    step = max(1, len(quoted) // SAMPLE)
    return [json.loads(name) for name in quoted[::step][:SAMPLE]]
