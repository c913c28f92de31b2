"""Where COCO annotations lie in a folder: as COCO's own, Roboflow's, CVAT's, Label Studio's.

Looked for are JSON files with images and categories, of any name; then, for each of them, the
folder that has the images it lists.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from common import BadInput
from data.coco import Split
from data.files import choose_splits, find_file, folders_of, listed, read_text, split_in

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "jpegimages", "data", "photos")
MAX_FILES = 40  # choice: of JSON files looked at in a folder; labelme writes one a photo
SAMPLE = 40  # choice: of a file's images looked for in each folder


def find_coco2017(root: Path, *_) -> dict[str, Split] | None:
    """The splits under COCO's own names: annotations/ beside images/train2017/ or train2017/."""
    splits = {}
    for name in ("train", "val"):
        file = root / "annotations" / f"instances_{name}2017.json"
        places = [root / "images" / f"{name}2017", root / f"{name}2017"]
        folders = [place for place in places if place.is_dir()]
        if folders or not file.exists():
            splits[name] = Split(file, [*folders, places[1]][0])
        else:
            splits[name] = Split(file, _image_folder(root, file))
    present = [name for name, split in splits.items() if Path(split.source).exists()]
    if not present:
        return None
    return splits if "val" in present else {"train": splits["train"]}


def find_coco(root: Path, train_split: str = "", val_split: str = "") -> dict[str, Split] | None:
    """The splits of a folder with COCO files; only "train" if there is but one set."""
    files: dict[str, list[Path]] = {}
    for file in _annotation_files(root):
        files.setdefault(_split_of(root, file), []).append(file)
    if not files:
        return None
    splits = {}
    for name, group in choose_splits(files, train_split, val_split).items():
        file = _the_only(root, group)
        splits[name] = Split(file, _image_folder(root, file))
    return splits


# ------------------------------------------------------------------------------ annotations


def _annotation_files(root: Path) -> list[Path]:
    """The COCO files in a folder, in its folders, and in theirs."""
    groups: dict[Path, list[Path]] = {}
    for pattern in ("*.json", "*/*.json", "*/*/*.json"):
        for path in sorted(root.glob(pattern)):
            groups.setdefault(path.parent, []).append(path)
    return [p for group in groups.values() for p in group[:MAX_FILES] if _is_coco(p)]


def _is_coco(path: Path) -> bool:
    """Does a JSON file have images and categories? Told from its text: parsing takes longer."""
    try:
        text = read_text(path)
    except BadInput:
        return False
    wanted = '"images"' in text and '"categories"' in text
    return wanted and '"segments_info"' not in text  # those are panoptic: masks without boxes


def _split_of(root: Path, file: Path) -> str:
    """The split that a file's name speaks of, or else that of the folder it is in."""
    names = [file.stem, *reversed(file.relative_to(root).parent.parts)]
    return next(filter(None, map(split_in, names)), "")


def _the_only(root: Path, files: list[Path]) -> Path:
    """The file of a split; of COCO's several, the one with objects' boxes."""
    instances = [file for file in files if file.name.startswith("instances")]
    chosen = instances or files
    if len(chosen) > 1:
        names = listed(file.relative_to(root) for file in chosen)
        raise BadInput(
            f"{root}: several COCO files for one split ({names}): choose with --train-json and "
            "--train-images (and --val-json, --val-images), or merge them"
        )
    return chosen[0]


# ------------------------------------------------------------------------------ images


def _image_folder(root: Path, file: Path) -> Path:
    """The folder that has most of the images which a COCO file lists."""
    names = _listed_images(file)
    folders = list(dict.fromkeys(_candidates(root, file)))
    counts = [sum(Path(find_file(folder, name)).exists() for name in names) for folder in folders]
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
    below = [path for folder in (root, *folders) for path in sorted(folder.iterdir())]
    return folders + [path for path in below if path.is_dir() and not path.name.startswith(".")]


def _listed_images(file: Path) -> list[str]:
    """Names of some images that a COCO file lists, from all over it, without parsing it."""
    text = read_text(file)
    key = "file_name" if '"file_name"' in text else "coco_url"
    quoted = re.findall(rf'"{key}"\s*:\s*("(?:[^"\\]|\\.)*")', text)
    step = max(1, len(quoted) // SAMPLE)
    return [json.loads(name) for name in quoted[::step][:SAMPLE]]
