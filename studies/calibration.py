"""What are a detector's scores worth, and what is wrong with its detections? For `alignment`.

D-ECE: is a detection of score 0.8 right in 80 % of cases? Küppers et al., "Multivariate
Confidence Calibration for Object Detection", CVPRW 2020; here of the score alone.
LRP error: at the best score threshold of a class, how far off are its boxes, how many are
false, how many objects are missed? Oksuz et al., "Localization Recall Precision", ECCV 2018.

"(release)" is github.com/EFS-OpenSource/calibration-framework for D-ECE, and
github.com/kemaloksuz/LRP-Error for LRP.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import box_iou

from common import aligned_iou
from data.coco import xywh_to_xyxy
from engine.metrics import coco_evaluation, complete_truth

BINS = 20  # of the reliability diagram (release)
LOWEST = 0.3  # lowest score that counts in D-ECE (release): nobody would show the many others
TAU = 0.5  # a detection is right from this IoU with its object on
LRP_KEYS = ("oLRP", "Loc", "FP", "FN")


# ------------------------------------------------------------------------------ objects


def annotations_by_image(data: Dataset) -> dict:
    """image id -> its objects' annotations in the data set's order, each with an area."""
    truth = complete_truth(data.coco())
    found: dict = {image["id"]: [] for image in truth["images"]}
    for annotation in truth["annotations"]:
        found[annotation["image_id"]].append(annotation)
    return found


def is_counted(annotation: dict) -> bool:
    """Whether an object is to be found: crowds and difficult ones are not."""
    return not (annotation.get("iscrowd", 0) or annotation.get("difficult", 0))


def objects_by_image(data: Dataset) -> dict:
    """image id -> boxes [G, 4] (pixels on disk) and labels [G] of the objects to be found."""
    label = {c["id"]: i for i, c in enumerate(data.categories)}
    found = {}
    for image_id, of_image in annotations_by_image(data).items():
        counted = [a for a in of_image if is_counted(a)]
        labels = torch.tensor([label[a["category_id"]] for a in counted], dtype=torch.long)
        found[image_id] = dict(boxes=xywh_to_xyxy([a["bbox"] for a in counted]), labels=labels)
    return found


def with_iou(found: dict[str, Tensor], objects: dict[str, Tensor]) -> dict[str, Tensor]:
    """The n boxes found in an image and their IoUs, 0 if there is no object.

    `iou` [n] is with the best object of the box's label, number `gt` [n] of the objects;
    `iou_any` [n] is with the best object of any label.
    """
    ious = F.pad(box_iou(found["boxes"], objects["boxes"]), (0, 1))  # [n, G + 1], 0 at the end
    own = found["labels"][:, None] == F.pad(objects["labels"], (0, 1), value=-1)
    iou, gt = (ious * own).max(1)
    return {**found, "iou": iou, "gt": gt, "iou_any": ious.amax(1)}


# ------------------------------------------------------------------------------ scores


def correlation(x: Tensor, y: Tensor) -> float | None:
    """Pearson's coefficient of x and y [n]; None where undefined.

    >>> correlation(torch.tensor([1., 2., 3.]), torch.tensor([2., 4., 6.]))
    1.0
    """
    if len(x) < 2:
        return None
    value = torch.corrcoef(torch.stack([x, y]).double())[0, 1].item()
    return None if math.isnan(value) else round(value, 4)


def in_bins(x: Tensor, *values: Tensor, bins: int = BINS) -> list[Tensor]:
    """How many of x [n], in [0, 1], lie in each of equal bins, and the means of `values` [n].

    The mean of an empty bin is nan.

    >>> in_bins(torch.tensor([.25, .75, 1.]), torch.tensor([True, True, False]), bins=2)
    [tensor([1, 2]), tensor([1.0000, 0.5000], dtype=torch.float64)]
    """
    place = (x * bins).long().clamp(max=bins - 1)
    count = torch.bincount(place, minlength=bins)
    return [count, *(torch.bincount(place, v.double(), bins) / count for v in values)]


def listed(values: Tensor) -> list[float | None]:
    """Numbers for a JSON file, None for nan."""
    return [None if math.isnan(v) else round(v, 6) for v in values.tolist()]


class Matched(NamedTuple):
    """Final detections and their objects, without those on crowds and difficult objects."""

    scores: Tensor  # [D]
    classes: Tensor  # [D]
    iou: Tensor  # [D] with its object; 0: it has none, a false positive
    objects: Tensor  # [K]: how many objects each class has


def match_detections(truth: dict, results: list[dict], most: int = 100) -> Matched:
    """COCO's own matching: in each image and class, best first, each takes a free object.

    Truth and results as for `engine.metrics.coco_metrics`. The `most` best detections of
    an image and class can take an object, at IoU >= TAU.
    """
    found = coco_evaluation(complete_truth(truth), results, (most,), sides=(), ious=(TAU,))
    place = {category: i for i, category in enumerate(found.params.catIds)}
    scores, classes, boxes, own = [], [], [], []
    objects = torch.zeros(len(place), dtype=torch.long)
    for seen in filter(None, found.evalImgs):  # of each class and image with anything in it
        label = place[seen["category_id"]]
        objects[label] += int((seen["gtIgnore"] == 0).sum())
        rows = zip(seen["dtIds"], seen["dtScores"], seen["dtMatches"][0], seen["dtIgnore"][0])
        for number, score, match, ignored in rows:
            if not ignored:
                scores.append(score)
                classes.append(label)
                boxes.append(found.cocoDt.anns[number]["bbox"])
                own.append(found.cocoGt.anns[int(match)]["bbox"] if match else [0, 0, 0, 0])
    iou = aligned_iou(xywh_to_xyxy(boxes), xywh_to_xyxy(own)).double()  # 0 with the empty box
    scores = torch.tensor(scores, dtype=torch.double)
    return Matched(scores, torch.tensor(classes, dtype=torch.long), iou, objects)


def calibration_error(found: Matched) -> dict:
    """D-ECE: the distance between mean score and precision of a bin, averaged over detections.

    Returns D-ECE, in [0, 1] or None if no detection counts, and `reliability`, of all scores.
    """
    # choice: one diagram for all classes, and every bin counts. The release has one for each
    # class and drops bins of fewer than 8 detections: most bins of a few hundred images.
    count, score, precision = in_bins(found.scores, found.scores, found.iou > 0)
    shown = (torch.arange(BINS) >= round(LOWEST * BINS)) & (count > 0)
    total = int(count[shown].sum())
    gaps = (count * (score - precision).abs())[shown].sum().item()
    table = {"count": count.tolist(), "score": listed(score), "precision": listed(precision)}
    return {"D-ECE": round(gaps / total, 4) if total else None, "reliability": table}


def optimal_lrp(scores: Tensor, iou: Tensor, num_objects: int) -> dict[str, float | None]:
    """One class's LRP error at its best score threshold, and its parts, all in [0, 1].

        LRP = (sum over TP of (1 - IoU) / (1 - tau) + FP + FN) / (TP + FP + FN)
        Loc = mean of 1 - IoU over TP,  FP = 1 - precision,  FN = 1 - recall

    scores, iou [D] as in `Matched`. {} without objects. If nothing is found, oLRP and FN are 1
    and the other parts are missing (release).

    >>> optimal_lrp(torch.tensor([.9, .8]), torch.tensor([.75, 0.]), num_objects=1)
    {'oLRP': 0.5, 'Loc': 0.25, 'FP': 0.0, 'FN': 0.0}
    """
    hits = iou > 0
    if not num_objects:
        return {}
    if not hits.any():
        return {"oLRP": 1.0, "FN": 1.0}
    order = scores.argsort(descending=True, stable=True)
    scores, iou, hits = scores[order].double(), iou[order].double(), hits[order]
    # [D] each, over the boxes that a threshold at this box's score leaves
    tp, fp, error = hits.cumsum(0), (~hits).cumsum(0), torch.where(hits, 1 - iou, 0).cumsum(0)
    lrp = (error / (1 - TAU) + fp + num_objects - tp) / (num_objects + fp)
    # choice: a threshold takes all boxes of equal score; the release looks between them too
    last = torch.cat([scores[1:] < scores[:-1], torch.tensor([True])])
    lrp = torch.where(last & (tp > 0), lrp, math.inf)  # without a TP there is no Loc
    best = int(lrp.argmin())
    parts = {
        "oLRP": lrp[best],
        "Loc": error[best] / tp[best],
        "FP": fp[best] / (tp[best] + fp[best]),
        "FN": 1 - tp[best] / num_objects,
    }
    return {name: round(float(value), 4) for name, value in parts.items()}


def lrp_errors(found: Matched) -> dict[str, float | None]:
    """oLRP and its parts, each the mean over the classes that have it; None if none has."""
    rows, means = [], {}
    for label, count in enumerate(found.objects.tolist()):
        mine = found.classes == label
        rows.append(optimal_lrp(found.scores[mine], found.iou[mine], count))
    for name in LRP_KEYS:
        values = [row[name] for row in rows if name in row]
        means[name] = round(sum(values) / len(values), 4) if values else None
    return means
