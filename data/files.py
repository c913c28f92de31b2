"""Files and folders as people leave them: encodings, names, splits, refusals."""

from __future__ import annotations

import codecs
import contextlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import unquote

from common import BadInput

IMAGE_ENDINGS = tuple(".jpg .jpeg .png .bmp .webp .tif .tiff .ppm .gif .jfif".split())

# ------------------------------------------------------------------------------ text


def read_text(path: str | Path) -> str:
    """A file in UTF-8 or, if it begins with a byte order mark, UTF-16: never the system's."""
    try:
        data = Path(path).read_bytes()
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return data.decode("utf-16")
        return data.decode("utf-8-sig")
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise BadInput(f"{path}: not a text in UTF-8: {e}") from None


def read_json(path: str | Path) -> Any:
    """What a JSON file holds, in UTF-8 or UTF-16."""
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise BadInput(f"{path}: broken JSON: neither UTF-8 nor UTF-16: {e}") from e
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{path}: broken JSON: {e}") from e


# ------------------------------------------------------------------------------ names


def other_names(name: str) -> Iterator[str]:
    r"""What a file may be called instead of `name`, the likeliest first.

    >>> list(other_names(r"a\my%20photo.jpg"))
    ['a/my%20photo.jpg', 'a\\my photo.jpg', 'a/my photo.jpg', 'my%20photo.jpg', 'my photo.jpg']
    """
    names = [name, name.replace("\\", "/")]
    names += [unquote(n) for n in names]
    names += [unicodedata.normalize(form, n) for n in names for form in ("NFC", "NFD")]
    for other in list(names):  # without folders that are not here: C:\photos, upload/
        folders = PureWindowsPath(other).parts
        names += ["/".join(folders[i:]) for i in range(1, len(folders))]
    yield from (n for n in dict.fromkeys(names) if n not in ("", name))


def find_file(folder: str | Path, name: str) -> str:
    """The path of a file that annotations name, or the path as written if there is none."""
    path = Path(folder) / name
    if not _exists(path):
        for other in other_names(name):
            if _exists(Path(folder) / other):
                return str(Path(folder) / other)
    return str(path)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, or with a null byte
        return False


def is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_ENDINGS and not path.name.startswith(".")


def images_in(folder: Path, below: bool = False) -> list[Path]:
    """The image files in a folder, sorted; with `below` also those in its folders."""
    return sorted(filter(is_image, folder.rglob("*") if below else folder.glob("*")))


# ------------------------------------------------------------------------------ splits

# Words that name a split, in files' and folders' names.
SPLIT_WORDS = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test", "testing"),
}


def split_in(name: str) -> str:
    """The split that a name speaks of; "" if it speaks of none.

    >>> split_in("instances_val2017"), split_in("_annotations.coco"), split_in("Training set")
    ('val', '', 'train')
    """
    for word in re.findall("[a-z]+", name.lower()):
        for split, words in SPLIT_WORDS.items():
            if word in words:
                return split
    return ""


def folders_of(root: Path, split: str, kinds: Sequence[str]) -> list[Path]:
    """Folders where a split's files may lie, such as images/train and train/images.

    The split "" stands for a set without splits. `kinds` are names in lower case.
    """
    of_split = [d for d in folders_in(root) if split_in(d.name) == split] if split else [root]
    of_kind = [d for d in folders_in(root) if d.name.lower() in kinds]
    found = [d for f in of_split for d in folders_in(f) if d.name.lower() in kinds]
    if split:
        found += [d for f in of_kind for d in folders_in(f) if split_in(d.name) == split]
    return [*found, *of_split]


def folders_in(folder: Path) -> list[Path]:
    return sorted(d for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))


def choose_splits(found: dict, train_split: str = "", val_split: str = "") -> dict:
    """{"train": .., "val": ..} of what was found, by the splits' names ("": no split).

    Without a validation set the test set is used. If there is neither, "val" is left out,
    and a share of the training set is held out instead.
    """
    chosen = {}
    names_of = {"train": ["train", ""], "val": ["val", "test"]}
    for (use, names), asked in zip(names_of.items(), (train_split, val_split)):
        if asked:
            names = [split_in(asked)]
            if names[0] not in found:
                there = listed(filter(None, found)) or "no splits"
                raise BadInput(f"--{use}-split {asked}: found {there}")
        present = [name for name in names if name in found]
        if present:
            chosen[use] = found[present[0]]
    return chosen


# ------------------------------------------------------------------------------ messages


def listed(names: Iterable, limit: int = 10) -> str:
    """Names for a message: the first ones, and how many more there are.

    >>> listed("abcd", limit=2)
    'a, b and 2 more'
    """
    names = [str(name) for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def counted(number: int, thing: str) -> str:
    """A number of things.

    >>> counted(1, "photo"), counted(3, "photo")
    ('1 photo', '3 photos')
    """
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


# ------------------------------------------------------------------------------ refusals

SAMPLE = 20  # choice: JSON files that are looked into


def describe(folder: Path) -> str:
    """What lies in a folder, in a few words: "200 .jpg, 3 .json, a/, b/"."""
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    endings = Counter(path.suffix.lower() or path.name for path in inside if path.is_file())
    parts = [f"{count} {ending}" for ending, count in endings.most_common(6)]
    parts += [f"{path.name}/" for path in inside if path.is_dir()][:12]
    return ", ".join(parts) or "nothing"


def what_it_is(value: Any) -> str:
    """Which tool's JSON file this is, and how to convert it; "" if it is not known."""
    if isinstance(value, dict) and {"shapes", "imagePath"} <= value.keys():
        return (
            "labelme's file of one photo. Convert all of them to one COCO file: "
            "pip install labelme2coco; labelme2coco DIR"
        )
    if isinstance(value, list) and value and isinstance(value[0], dict):
        if "data" in value[0]:
            return "Label Studio's list of tasks. Export the project as COCO or YOLO"
        if {"image_id", "bbox"} <= value[0].keys():
            return "a list of detections, without images and categories"
    return ""


def refuse(root: Path) -> BadInput:
    """The exception for a folder without data: what was found, and how to go on."""
    if not root.exists():
        return BadInput(f"{root}: no data found: there is no such folder")
    if root.is_file():
        how = "give the folder that it is in, unpacked"
        if root.suffix.lower() == ".json":
            how = f"use --train-json {root} --train-images DIR"
        return BadInput(f"{root}: no data found: this is a file; {how}")
    how = "Export the data as COCO, VOC or YOLO"
    folders = [root, *filter(Path.is_dir, root.iterdir())]
    if any(map(images_in, folders)):
        how = "There are images, but no boxes for them: export the boxes as COCO"
    for table in [*root.glob("*"), *root.glob("*/*")]:
        named = table.stem == "metadata" and table.suffix in (".jsonl", ".csv")
        if named or table.suffix == ".parquet":
            how = (
                f"{table.relative_to(root)} is the table of a Hugging Face imagefolder. Write its "
                "rows as one COCO file (images, categories, annotations with bbox x, y, w, h)"
            )
    for path in [*sorted(root.glob("*.json")), *sorted(root.glob("*/*.json"))][:SAMPLE]:
        with contextlib.suppress(BadInput):
            if other := what_it_is(read_json(path)):
                how = f"{path.name} is {other}"
    return BadInput(
        f"{root}: no data found: neither COCO (a .json with images and categories, in the folder, "
        "annotations/ or train/), Pascal VOC (.xml files and their images), YOLO (data.yaml, or "
        f"images/ and labels/) nor UAVDT (M_attr/). In it are: {describe(root)}. {how}; or name "
        "COCO files yourself: --train-json FILE --train-images DIR (and --val-json, --val-images)"
    )
