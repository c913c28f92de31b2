"""Folders that are not read: which tool made them, and how to convert them to one that is."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from common import BadInput
from data.files import describe, images_in, read_json

BY_HAND = (
    "or name COCO files yourself: --train-json FILE --train-images DIR (and --val-json, "
    "--val-images)"
)
SAMPLE = 20  # choice: JSON files that are looked into


def refuse(root: Path) -> BadInput:
    """The exception for a folder without data: what was looked for, found, and how to go on."""
    if not root.exists():
        return BadInput(f"{root}: no data found: there is no such folder")
    if root.is_file():
        return BadInput(f"{root}: no data found: this is a file; {_for_a_file(root)}")
    return BadInput(
        f"{root}: no data found: neither COCO (a .json with images and categories, in the folder, "
        "annotations/ or train/), Pascal VOC (.xml files and their images), YOLO (data.yaml, or "
        f"images/ and labels/) nor UAVDT (M_attr/). In it are: {describe(root)}. {_how_on(root)}"
    )


def _for_a_file(path: Path) -> str:
    if path.suffix.lower() == ".json":
        return f"use --train-json {path} --train-images DIR"
    return "give the folder that it is in, unpacked"


def _how_on(root: Path) -> str:
    """What to do with a folder that is of no known format."""
    for path in [*sorted(root.glob("*.json")), *sorted(root.glob("*/*.json"))][:SAMPLE]:
        with contextlib.suppress(BadInput):
            other = what_it_is(read_json(path))
            if other:
                return f"{path.name} is {other}; {BY_HAND}"
    table = _metadata_of(root)
    if table:
        return (
            f"{table} is the table of a Hugging Face imagefolder. Write its rows as one COCO file "
            f"(images, categories, annotations with bbox x, y, w, h); {BY_HAND}"
        )
    if _has_images(root):
        return f"There are images, but no boxes for them: export the boxes as COCO; {BY_HAND}"
    return f"Export the data as COCO, VOC or YOLO; {BY_HAND}"


def _metadata_of(root: Path) -> str:
    """The table of a Hugging Face imagefolder; "" if there is none."""
    for pattern in ("metadata.*", "*/metadata.*", "*.parquet", "*/*.parquet"):
        for path in sorted(root.glob(pattern)):
            if path.suffix in (".jsonl", ".csv", ".parquet"):
                return str(path.relative_to(root))
    return ""


def _has_images(root: Path) -> bool:
    return any(images_in(folder) for folder in [root, *filter(Path.is_dir, root.iterdir())])


def what_it_is(value: Any) -> str:
    """What a JSON file of another tool is and how to go on; "" if it is not known."""
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
