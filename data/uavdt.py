"""UAVDT: finding the folders of its archives, reading its text files, and its official AP."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from torch import Tensor

from common import BadInput
from data.coco import Split, Splits, xywh_to_xyxy
from data.files import read_text
from data.images import open_image

# `info` of a COCO dictionary; by it the metrics recognise the data set.
UAVDT = {"description": "UAVDT"}

# ------------------------------------------------------------------------------ files


def find_uavdt(root: Path, train_split: str = "", val_split: str = "") -> Splits | None:
    """UAVDT's splits train and val (default: its own train and test); None if there is none.

    The three archives hold Mxxxx/ (UAV-benchmark-M.zip), GT/Mxxxx_gt_whole.txt
    (UAV-benchmark-MOTD_v1.0.zip) and M_attr/<split>/Mxxxx_attr.txt (M_attr.zip). BadInput
    if only some of the three are there.
    """
    frames, truth, lists = "Mxxxx", "GT/Mxxxx_gt_whole.txt", "M_attr/*/Mxxxx*_attr.txt"
    folders = {}
    for name in (frames, truth, lists):
        pattern = name.replace("xxxx", "[0-9][0-9][0-9][0-9]")
        for depth in ("*/*/", "*/", ""):  # an archive may have been unpacked into a folder
            for path in sorted(root.glob(depth + pattern))[:1]:
                folders[name] = path.parents[pattern.count("/")]
    if not folders:
        return None
    missing = [f"no {name}" for name in (frames, truth, lists) if name not in folders]
    if missing:
        raise BadInput(f"{root}: UAVDT is not whole: {', '.join(missing)}")
    read = partial(read_uavdt, folders[frames], folders[truth] / "GT")
    attributes = folders[lists] / "M_attr"
    return {
        "train": Split(attributes / (train_split or "train"), folders[frames], read),
        "val": Split(attributes / (val_split or "test"), folders[frames], read),
    }


def read_uavdt(
    frames: Path, truth: Path, split: Path, categories: list[dict] | None = None
) -> dict:
    """COCO dictionary of the sequences that the folder `split` lists in files Mxxxx_attr.txt.

    Cars, trucks and buses are one class, as for the official detection evaluator. A
    rectangle to ignore is a crowd. A frame without rows is an image without objects. All
    frames of a sequence have the size of the first: the check of all image files finds
    those that have not. The caller compares `categories`.
    """
    images, annotations = [], []
    # strip: the release has an "M0701 _attr.txt"
    names = (path.name for path in split.glob("M*_attr.txt"))
    listed = {name.removesuffix("_attr.txt").strip() for name in names}
    if not listed:
        raise BadInput(f"{split}: no Mxxxx_attr.txt that lists a sequence")
    for sequence in sorted(listed):
        stems = sorted(path.stem for path in (frames / sequence).glob("img*.jpg"))
        ids = {int(stem[3:]): f"{sequence}/{stem}" for stem in stems if stem[3:].isdecimal()}
        if not ids:
            where = f"{frames / sequence}: no frames img000001.jpg ..."
            raise BadInput(f"{where}, but {split} lists {sequence}")
        with open_image(frames / f"{next(iter(ids.values()))}.jpg") as image:
            size = {"width": image.width, "height": image.height}
        images += [{"id": i, "file_name": f"{i}.jpg", **size} for i in ids.values()]
        annotations += _read_rows(truth, sequence, ids, ignored=False)
        annotations += _read_rows(truth, sequence, ids, ignored=True)
    vehicles = [{"id": 1, "name": "vehicle"}]
    coco = {"images": images, "annotations": annotations, "categories": vehicles}
    return {"info": UAVDT, "unclipped": True, **coco}  # its evaluator does not clip either


def _read_rows(truth: Path, sequence: str, ids: dict[int, str], ignored: bool) -> list[dict]:
    """Objects in Mxxxx_gt_whole.txt, or rectangles to ignore in Mxxxx_gt_ignore.txt.

    A row is: frame (from 1), target, left, top, width, height, out of view, occlusion,
    category (1 car, 2 truck, 3 bus). `ids`: frame -> image id. BadInput names a broken
    row by file and line.
    """
    path = truth / f"{sequence}_gt_{'ignore' if ignored else 'whole'}.txt"
    annotations = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            frame, _, x, y, w, h, _, _, category = map(int, line.split(","))
        except ValueError:
            reason = f"not nine whole numbers: {line[:80]}"
            raise BadInput(f"{path}, line {number}: {reason}") from None
        if frame not in ids and ignored:
            continue  # nothing is there to ignore
        if frame not in ids:
            raise BadInput(f"{path}, line {number}: frame {frame} is not in {sequence}/")
        if not ignored and category not in (1, 2, 3):
            raise BadInput(f"{path}, line {number}: category {category}, not 1, 2 or 3")
        row = {"id": f"{path.name} line {number}", "image_id": ids[frame], "category_id": 1}
        annotations.append({**row, "bbox": [x, y, w, h], "iscrowd": int(ignored)})
    return annotations


# ------------------------------------------------------------------------------ metric

# Sequences in which the official evaluator keeps detections in rectangles to ignore
# (release).
UNFILTERED = ("M0209", "M0801")


class Frame(NamedTuple):
    """A frame's boxes (xywh) and its detections' scores, not yet matched."""

    objects: list
    ignored: list
    boxes: list
    scores: list


def uavdt_ap(truth: dict, results: list[dict], iou: float = 0.7) -> float | None:
    """AP as UAVDT's official evaluator computes it, over all frames; None without objects.

    AP is the area under the monotone precision-recall curve, as VOC's since 2010. `truth`
    is a COCO dictionary and `results` are in COCO's results format; image ids begin with
    the sequence, as in "M0203/img000001".
    """
    frames = {image["id"]: Frame([], [], [], []) for image in truth["images"]}
    for a in truth["annotations"]:
        frame = frames[a["image_id"]]
        (frame.ignored if a.get("iscrowd", 0) else frame.objects).append(a["bbox"])
    for r in sorted(results, key=lambda r: -r["score"]):
        frames[r["image_id"]].boxes.append(r["bbox"])
        frames[r["image_id"]].scores.append(r["score"])
    num = sum(len(frame.objects) for frame in frames.values())
    if not num:
        return None
    matched = [_match_frame(i, frames[i], iou) for i in sorted(frames)]
    scores = torch.cat([scores for scores, _ in matched])
    hits = torch.cat([hits for _, hits in matched])
    order = scores.argsort(descending=True, stable=True)  # equal scores: earlier frame first
    hits = hits[order]
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    precision = precision.flip(0).cummax(0)[0].flip(0)  # the best at this recall or above
    return (precision * hits).sum().item() / num


def _match_frame(image_id: str, frame: Frame, iou: float) -> tuple[Tensor, Tensor]:
    """Scores and hits (0 or 1) of a frame's detections, best first.

    Detections strictly inside one rectangle to ignore are removed first; objects inside
    count. Then each detection takes the object that it overlaps most of those not taken
    yet, if their IoU is at least `iou`; otherwise it is false.
    """
    objects = xywh_to_xyxy(frame.objects).flip(0)  # of equal overlaps the last object's counts
    ignored, boxes = xywh_to_xyxy(frame.ignored), xywh_to_xyxy(frame.boxes)
    kept = torch.ones(len(boxes), dtype=torch.bool)
    if image_id.split("/")[0] not in UNFILTERED:
        corners_inside = boxes[:, None, :2] > ignored[:, :2]
        ends_inside = boxes[:, None, 2:] < ignored[:, 2:]
        kept = ~(corners_inside & ends_inside).all(-1).any(-1)
    overlap = torchvision.ops.box_iou(boxes[kept], objects).numpy()  # [D, G]
    hits = np.zeros(len(overlap))
    for d in np.flatnonzero((overlap >= iou).any(1)):
        best = overlap[d].argmax()
        if overlap[d, best] >= iou:
            hits[d] = 1
            overlap[:, best] = 0  # taken
    return torch.tensor(frame.scores)[kept], torch.from_numpy(hits)
