"""What AP does not say about detections: what their scores are worth, and what is wrong with them.

D-ECE (Küppers et al., "Multivariate Confidence Calibration for Object Detection", CVPRW 2020, with
the score alone): is a detection of score 0.8 right in 80 % of cases? LRP error (Oksuz et al.,
"Localization Recall Precision", ECCV 2018): at the best score threshold of a class, how far off are
its boxes, how many are false, and how many objects are missed?

"(release)" is github.com/EFS-OpenSource/calibration-framework for D-ECE, and
github.com/kemaloksuz/LRP-Error for LRP.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from common import aligned_iou
from data.coco import xywh_to_xyxy
from engine.metrics import coco_evaluation, complete_truth

BINS = 20  # of the reliability diagram (release)
LOWEST = 0.3  # lowest score that counts in D-ECE (release): nobody would show the many others


def correlation(x: Tensor, y: Tensor) -> dict[str, float | None]:
    """Pearson's and Spearman's coefficient of x and y [n]; None where undefined.

    >>> correlation(torch.tensor([1., 2., 3.]), torch.tensor([1., 4., 9.]))["spearman"]
    1.0
    """
    found: dict[str, float | None] = dict(pearson=None, spearman=None)

    def ranks(v: Tensor) -> Tensor:  # equal values share their mean rank
        _, place, count = v.unique(return_inverse=True, return_counts=True)
        return (count.cumsum(0) - (count - 1) / 2)[place]

    for name, pair in zip(found, ((x, y), (ranks(x), ranks(y)))):
        value = torch.corrcoef(torch.stack(pair).double())[0, 1].item() if len(x) > 1 else math.nan
        found[name] = round(value, 4) if value == value else None
    return found


class Matched(NamedTuple):
    """Final detections and their objects; those on crowds and difficult objects are left out."""

    scores: Tensor  # [D]
    classes: Tensor  # [D], positions in `names`
    iou: Tensor  # [D] with its object; 0: it has none, a false positive
    objects: Tensor  # [K]: how many objects each class has
    names: list[str]  # of the K classes


def match_detections(truth: dict, results: list[dict], most: int = 100, tau=0.5) -> Matched:
    """COCO's own matching: in each image and class, best score first, each takes a free object.

    Truth and results are those of `engine.metrics.coco_metrics`. An object is taken at IoU >= tau,
    by one of the `most` best detections of an image and class.
    """
    found = coco_evaluation(complete_truth(truth), results, (most,), sides=(), ious=(tau,))
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
    iou = aligned_iou(xywh_to_xyxy(boxes), xywh_to_xyxy(own))  # 0 with the empty box
    scores = torch.tensor(scores, dtype=torch.double)
    name_of = {c["id"]: c["name"] for c in truth["categories"]}
    names = [name_of[category] for category in place]
    return Matched(scores, torch.tensor(classes, dtype=torch.long), iou.double(), objects, names)


def reliability(scores: Tensor, hits: Tensor, bins: int = BINS) -> dict[str, list]:
    """Detections [D] in equal bins of [0, 1] by score: how many, their mean score and precision.

    `hits` [D]: whether each lies on an object. An empty bin has None as score and precision.

    >>> reliability(torch.tensor([.25, .75, 1.]), torch.tensor([True, True, False]), bins=2)
    {'count': [1, 2], 'score': [0.25, 0.875], 'precision': [1.0, 0.5]}
    """
    place = (scores * bins).long().clamp(max=bins - 1)
    count = torch.bincount(place, minlength=bins)
    table: dict[str, list] = {"count": count.tolist()}
    for name, values in (("score", scores), ("precision", hits)):
        means = (torch.bincount(place, values.double(), bins) / count).tolist()
        table[name] = [None if math.isnan(v) else round(v, 6) for v in means]
    return table


def calibration_error(found: Matched, bins: int = BINS, lowest: float = LOWEST) -> dict:
    """D-ECE: the distance between mean score and precision of a bin, averaged over detections.

    Returns D-ECE, in [0, 1] or None where no detection counts, and `reliability`, of all scores.
    """
    # choice: all classes in one diagram, and every bin counts. The release has one a class and
    # leaves out bins of fewer than 8 detections: on a few hundred images that would be most bins.
    hits, shown = found.iou > 0, found.scores >= lowest
    count, score, precision = reliability(found.scores[shown], hits[shown], bins).values()
    total = sum(count)
    gaps = (n * abs(s - p) for n, s, p in zip(count, score, precision) if n)
    error = round(sum(gaps) / total, 4) if total else None
    return {"D-ECE": error, "reliability": reliability(found.scores, hits, bins)}


def optimal_lrp(scores: Tensor, iou: Tensor, num_objects: int, tau: float = 0.5) -> dict | None:
    """One class's LRP error at the score threshold where it is least, and its parts, all in [0, 1].

        LRP = (sum over TP of (1 - IoU) / (1 - tau) + FP + FN) / (TP + FP + FN)
        Loc = mean of 1 - IoU over TP,  FP = 1 - precision,  FN = 1 - recall

    scores, iou [D] as in `Matched`. None without objects. If no threshold finds an object, LRP and
    FN are 1 and the other parts None (release).

    >>> optimal_lrp(torch.tensor([.9, .8]), torch.tensor([.75, 0.]), num_objects=1)
    {'LRP': 0.5, 'Loc': 0.25, 'FP': 0.0, 'FN': 0.0, 'score': 0.9}
    """
    hits = iou > 0
    if not num_objects:
        return None
    if not hits.any():
        return {"LRP": 1.0, "Loc": None, "FP": None, "FN": 1.0, "score": None}
    order = scores.argsort(descending=True, stable=True)
    scores, iou, hits = scores[order].double(), iou[order].double(), hits[order]
    # [D] each, over the boxes that a threshold at this box's score leaves
    tp, fp, error = hits.cumsum(0), (~hits).cumsum(0), torch.where(hits, 1 - iou, 0).cumsum(0)
    lrp = (error / (1 - tau) + fp + num_objects - tp) / (num_objects + fp)
    # choice: a threshold takes all boxes of equal score; the release looks between them too
    last = torch.cat([scores[1:] < scores[:-1], torch.tensor([True])])
    lrp = torch.where(last & (tp > 0), lrp, math.inf)  # without a TP there is no Loc
    best = int(lrp.argmin())
    parts = {
        "LRP": lrp[best],
        "Loc": error[best] / tp[best],
        "FP": fp[best] / (tp[best] + fp[best]),
        "FN": 1 - tp[best] / num_objects,
        "score": scores[best],
    }
    return {name: round(float(value), 4) for name, value in parts.items()}


def lrp_errors(found: Matched, tau: float = 0.5) -> dict:
    """oLRP and its parts, means over classes, and `per_class`: `optimal_lrp` of each.

    A mean is None where no class has a value.
    """
    rows, means = [], {}
    for label, count in enumerate(found.objects.tolist()):
        mine = found.classes == label
        rows.append(optimal_lrp(found.scores[mine], found.iou[mine], count, tau))
    for name, part in (("oLRP", "LRP"), ("Loc", "Loc"), ("FP", "FP"), ("FN", "FN")):
        values = [row[part] for row in rows if row and row[part] is not None]
        means[name] = round(sum(values) / len(values), 4) if values else None
    return {**means, "per_class": dict(zip(found.names, rows))}
