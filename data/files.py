"""Files and folders as people leave them: encodings, names of images, places of a split."""

from __future__ import annotations

import codecs
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PureWindowsPath
from urllib.parse import unquote

from common import BadInput
from data.images import IMAGE_ENDINGS

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


def read_json(path: str | Path, categories: list[dict] | None = None):
    """What a JSON file holds. UTF-8 and UTF-16 are told apart by the first bytes.

    `categories` are not used: the signature is that of all functions that read annotations.
    """
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
    r"""How a file's name may have been meant, the likeliest first; `name` itself is left out.

    >>> list(other_names(r"a\my%20photo.jpg"))
    ['a/my%20photo.jpg', 'a\\my photo.jpg', 'a/my photo.jpg', 'my%20photo.jpg', 'my photo.jpg']
    """
    names = [name, name.replace("\\", "/")]
    names += [unquote(n) for n in names]
    names += [unicodedata.normalize(form, n) for n in names for form in ("NFC", "NFD")]
    for other in list(names):  # of a folder that is not here: "C:\photos\a.jpg", "upload/a.jpg"
        folders = PureWindowsPath(other).parts
        names += ["/".join(folders[i:]) for i in range(1, len(folders))]
    yield from (n for n in dict.fromkeys(names) if n not in ("", name))


def find_file(folder: str | Path, name: str) -> str:
    """The path of a file that annotations name; the path as it is written if there is none."""
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
    """The image files in a folder, or also in those below it, in order of name."""
    files = folder.rglob("*") if below else folder.glob("*")
    return sorted(path for path in files if is_image(path))


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
    """Folders where a split's files of one kind may lie, such as images/train and train/images.

    With the split "", those of a set without splits. `kinds` are names in lower case.
    """
    of_split = [d for d in _folders_in(root) if split_in(d.name) == split] if split else [root]
    of_kind = [d for d in _folders_in(root) if d.name.lower() in kinds]
    found = [d for f in of_split for d in _folders_in(f) if d.name.lower() in kinds]
    if split:
        found += [d for f in of_kind for d in _folders_in(f) if split_in(d.name) == split]
    return [*found, *of_split]


def _folders_in(folder: Path) -> list[Path]:
    return sorted(d for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))


def choose_splits(found: dict, train_split: str = "", val_split: str = "") -> dict:
    """{"train": .., "val": ..} of what was found, by the splits' names ("": of none).

    Without a validation set the test set is used. If there is neither, "val" is left out: a
    share of the training set is held out then.
    """
    chosen = {}
    for use, asked, names in (
        ("train", train_split, ["train", ""]),
        ("val", val_split, ["val", "test"]),
    ):
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


def describe(folder: Path) -> str:
    """What lies in a folder, in a few words: "3 .json, 200 .jpg, folders a/ and b/"."""
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    endings = Counter(path.suffix.lower() or path.name for path in inside if path.is_file())
    parts = [f"{count} {ending}" for ending, count in endings.most_common(6)]
    parts += [f"{path.name}/" for path in inside if path.is_dir()][:12]
    return ", ".join(parts) or "nothing"
