"""`load`: from settings to a training and a validation set, whatever the format.

Each format's own file finds it in a folder and reads it. Nothing is printed here: a set's
`note` says what its user should know. No image is decoded: `data.checks.check_images`
does that.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common import BadInput
from data.coco import CocoDetection, Split
from data.coco_folders import find_coco, find_coco2017
from data.contract import DetectionDataset
from data.files import counted, listed, refuse
from data.settings import Data
from data.synthetic import SyntheticDetection
from data.uavdt import find_uavdt
from data.voc import find_voc, find_voc_lists
from data.yolo import find_yolo


def load(
    settings: Data,
    seed: int = 0,
    masks: bool = False,
    train: bool = True,
    val: bool = True,
    categories: list[dict] | None = None,
) -> tuple[DetectionDataset | None, DetectionDataset | None]:
    """(training set, validation set) of `settings`; None for one that is not asked for.

    `seed` is the synthetic training images' seed. It also decides which images are held
    out if there is no validation set. The validation set's classes are matched by name
    with the training set's, or with those given (a checkpoint's). Raises BadInput for
    data that cannot be used, for a set without images and a training set without boxes.
    """
    explicit = settings.train_json or settings.val_json
    if not explicit and (settings.train_images or settings.val_images):
        raise BadInput("--train-images and --val-images go with --train-json and --val-json")
    if settings.data == "synthetic" and not explicit:
        size = settings.image_size
        made = SyntheticDetection(settings.num_train, size, seed, masks) if train else None
        # choice: a seed of its own, so that no run ever trains on validation images
        kept = SyntheticDetection(settings.num_val, size, 2**31, masks, keep=True) if val else None
        return made, kept
    splits = _given_files(settings, train, val) if explicit else find_splits(settings)
    held_out = "val" not in splits
    if held_out:  # also where only the training set is asked for: it must be the same set then
        whole = splits["train"]
        for name in ("train", "val"):
            read = partial(read_part, whole.read, name == "val", settings.val_share, seed)
            splits[name] = whole._replace(read=read)
    train_set = val_set = None
    if train:
        if "train" not in splits:
            source = splits["val"].source
            raise BadInput(f"{source}: there is no set to train on, only this one")
        train_set = _open(splits["train"], settings, categories, masks)
        _check_training(train_set)
        categories = train_set.categories
    if val:
        val_set = _open(splits["val"], settings, categories, masks, train_set)
        if held_out:
            images = counted(len(val_set), "image")
            val_set.notes.append(
                f"{val_set.source}: one set and no split: {images} held out to evaluate on "
                f"(--val-share {settings.val_share:g}, --seed {seed})"
            )
    return train_set, val_set


# ------------------------------------------------------------------------------ splits


# (folder, --train-split, --val-split) -> splits, or None; the first that finds some is
# taken.
FINDERS = (find_coco2017, find_voc_lists, find_uavdt, find_coco, find_voc, find_yolo)


def find_splits(settings: Data) -> dict[str, Split]:
    """The splits "train" and "val" in the folder `settings.data`, whatever its layout.

    One of them may be missing. Raises BadInput for a folder of no known layout.
    """
    root, asked = Path(settings.data), (settings.train_split, settings.val_split)
    if root.is_file() and root.suffix in (".yaml", ".yml"):
        return find_yolo(root, *asked)
    while root.is_dir():
        for find in FINDERS:
            splits = find(root, *asked)
            if splits is not None:
                return splits
        inside = [path for path in root.iterdir() if not path.name.startswith(".")]
        if len(inside) != 1:
            break
        root = inside[0]  # an archive that was unpacked into a folder of its own
    raise refuse(Path(settings.data))


def _given_files(settings: Data, train: bool, val: bool) -> dict[str, Split]:
    """The splits whose files are given one by one, in place of a folder."""
    given = {
        "train": (settings.train_json, settings.train_images),
        "val": (settings.val_json, settings.val_images),
    }
    needed = {"train": train or not any(given["val"]), "val": val and any(given["val"])}
    splits = {}
    for name, (source, images) in given.items():
        if needed[name] and not (source and images):
            both = f"--{name}-json and --{name}-images are needed together"
            raise BadInput(f"{both} (with explicit paths, --data is not used)")
        if needed[name] and not Path(images).is_dir():
            raise BadInput(f"--{name}-images {images}: no such folder")
        if source or images:
            splits[name] = Split(source, images)
    return splits


def read_part(
    read: Callable[..., dict],
    held_out: bool,
    share: float,
    seed: int,
    source: Path,
    categories: list[dict] | None = None,
) -> dict:
    """The part of what `read` reads that is held out to evaluate on, or the rest.

    Only the seed and an image's id decide, not the images' order or the folder's place.
    """
    coco = read(source, categories)
    if not isinstance(coco, dict) or not isinstance(coco.get("images"), list):
        return coco  # refused later, with the reason
    ids = [image["id"] for image in coco["images"] if isinstance(image, dict) and "id" in image]
    if len(ids) < 2:
        few = counted(len(ids), "image")
        raise BadInput(f"{source}: one set of {few}: too few to hold some of them out")
    count = min(max(1, round(len(ids) * share)), len(ids) - 1)
    ids.sort(key=lambda i: hashlib.sha256(f"{seed} {i}".encode()).digest())
    others = set(map(str, ids[count:] if held_out else ids[:count]))
    for name, key in (("images", "id"), ("annotations", "image_id")):
        if isinstance(coco.get(name), list):
            coco[name] = [
                entry
                for entry in coco[name]
                if not isinstance(entry, dict) or str(entry.get(key)) not in others
            ]
    return coco


# ------------------------------------------------------------------------------ sets


def _open(
    split: Split,
    settings: Data,
    categories: list[dict] | None,
    masks: bool,
    train_set: CocoDetection | None = None,
) -> CocoDetection:
    """The set of a split. A validation set notes what it shares with its training set."""
    upright = settings.upright
    if upright == "auto" and train_set is not None and train_set.upright:
        upright = "yes"
    data = CocoDetection(
        split.source,
        split.image_dir,
        split.read,
        categories,
        masks,
        upright,
        split.upright,
        settings.max_pixels,
    )
    if not len(data):
        raise BadInput(f"{split.source}: no images")
    if train_set is not None:
        data.notes = [note for note in data.notes if note not in train_set.notes]
        places = ({os.path.abspath(file) for file in one.files} for one in (train_set, data))
        if both := len(set.intersection(*places)):
            images = f"{counted(both, 'image')} of {len(data)}"
            data.notes.append(
                f"{data.source}: {images} also in the training set: the metrics do not tell how "
                "good the detector is on other images"
            )
    return data


def _check_training(data: CocoDetection) -> None:
    """BadInput if there is nothing to train on; a note if there is nothing of some classes."""
    if not data.num_boxes:
        reason = f"{data.source}: no annotated boxes to train on"
        if data.dropped:
            reason += f": all {len(data.dropped)} boxes are broken"
        raise BadInput("\n  ".join([reason, *data.notes]))
    if not len(data.labels):
        raise BadInput(
            f"{data.source}: nothing to train on: all {data.num_boxes} objects are crowds or "
            "difficult (iscrowd, difficult), which are ignored"
        )
    used = set(data.labels.tolist())
    unused = [c["name"] for label, c in enumerate(data.categories) if label not in used]
    if unused:
        data.notes.append(f"{data.source}: no box to train on of: {listed(unused)}")
