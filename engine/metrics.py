"""`detect`: a detector over a data set; `evaluate`: COCO's, VOC's and UAVDT's metrics of it."""

from __future__ import annotations

import contextlib
import copy
import io
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn
from torch.utils.data import Dataset

from common import Resized, xywh_to_xyxy
from engine.checkpoints import write_json
from engine.data import make_loader, per_process_batch, to_device
from engine.detector import candidates_by_size, paste_mask
from engine.pictures import draw_grid
from engine.processes import autocast, gather, progress, rank_and_world, say
from engine.settings import Config
from formats import UAVDT, encode_mask


@torch.no_grad()
def detect(
    model: nn.Module, data: Dataset, config: Config, device: torch.device | str, shared: bool = True
):
    """Yield (target, detections in the original image's pixels) for this process's images: its
    share of them or, not `shared`, all.

    With several test scales, or the mirrored image too, the candidates of all are merged before
    the last NMS. Every image is seen exactly once over all processes, in order of aspect: a batch
    then has few padded sizes. The target's boxes are in pixels of the last scale.
    """
    model.eval()
    device = torch.device(device)
    rank, world = rank_and_world() if shared else (0, 1)
    sizes = np.asarray(data.sizes)
    aspect = sizes[:, 1] / sizes[:, 0]
    mine = sorted(range(rank, len(data), world), key=aspect.__getitem__)
    batch = config.eval_batch or per_process_batch(config)
    loaders = [
        make_loader(Resized(data, config, False, s), config, device, sampler=mine, batch_size=batch)
        for s in config.test_scales
    ]
    for batches in progress(zip(*loaders), "detecting", len(loaders[0])):
        merged = []
        for items in batches:
            images, targets = to_device(items, device)
            for flip in (False, True)[: 1 + config.test_flip]:
                with autocast(config.amp, device):
                    seen = [i.flip(-1) for i in images] if flip else images
                    found = candidates_by_size(model, seen)
                inner = torch.tensor([i.shape[1:] for i in images], device=device)
                outer = torch.tensor([t["size"] for t in targets], device=device)
                boxes, index = found["boxes"], found["image"]
                if flip:
                    if "masks" in found:
                        found["masks"] = found["masks"].flip(-1)
                    width = inner[index, 1]
                    mirrored = [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]]
                    boxes = torch.stack(mirrored, 1)
                # (w, h, w, h): sides are rounded apart
                grow = (outer / inner).flip(-1).repeat(1, 2)
                merged.append({**found, "boxes": boxes * grow[index]})
        candidates = {k: torch.cat([m[k] for m in merged]) for k in merged[0]}
        for target, found in zip(targets, model.finish(candidates, len(images))):
            yield target, {k: v.cpu() for k, v in found.items()}


def to_coco(image_id, found: dict, categories: list[dict], size=None) -> list[dict]:
    """Detections of an image -> COCO results: xywh boxes, the data set's own category ids.

    Where masks are found and the image's size (h, w) is given, also `segmentation` (RLE) and
    `mask_score`, by which masks are ranked.
    """
    results = []
    for (x1, y1, x2, y2), score, label in zip(
        found["boxes"].tolist(), found["scores"].tolist(), found["labels"].tolist()
    ):
        bbox = [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)]
        category = categories[label]["id"]
        results.append(
            {"image_id": image_id, "category_id": category, "bbox": bbox, "score": score}
        )
    if "masks" in found and size is not None:
        scores = found["mask_scores"].tolist()
        for result, mask, box, score in zip(results, found["masks"], found["boxes"], scores):
            result["segmentation"] = encode_mask(paste_mask(mask, box, size))
            result["mask_score"] = score
    return results


def coco_metrics(
    truth: dict, results: list[dict], detections=(1, 10, 100), sides=(0, 32, 96), masks=False
) -> dict:
    """pycocotools' twelve numbers, AP55 to AP95 and per-class AP, in [0, 1]; None where undefined.

    `detections`: how many of an image AR1, AR10, AR100 count, AP the last; `sides`: where small,
    medium and large begin, roots of areas. With `masks` the results' segmentations are scored, by
    their mask_score, against the truth's.

    Objects marked `difficult` are ignored like COCO's out-of-range areas; crowds as COCO does. For
    data with such marks (VOC) the 11-point AP of VOC 2007 at IoU 0.5 is added as `voc07_AP50`, for
    UAVDT the AP of its own evaluator at IoU 0.7 as `uavdt_AP70` (`AP70` is COCO's, 101 recalls);
    both are of boxes.
    Without annotations (COCO's test sets) all are None. Of an annotation only image_id, category_id
    and bbox are needed (`complete_truth`).
    """
    truth = complete_truth(truth)
    if masks:  # without boxes, from which pycocotools would take the areas
        keys = ("image_id", "category_id", "segmentation")
        results = [{**{k: r[k] for k in keys}, "score": r["mask_score"]} for r in results]
    kind = "segm" if masks else "bbox"
    evaluation = coco_evaluation(truth, results, detections, sides, kind)
    # precision [10 IoUs, 101 recalls, K, 4 areas, 3 maxDets], recall without the recalls; -1 where
    # a class has no object. Not summarize(): it takes AP at 100 detections, whatever is asked.
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    number = lambda v: None if v != v or v < 0 else float(v)  # noqa: E731
    mean = lambda v: number(v[v > -1].mean()) if (v > -1).any() else None  # noqa: E731
    every = precision[..., 0, -1]
    metrics = {"AP": mean(every), "AP50": mean(every[:1]), "AP75": mean(every[5:6])}
    areas = list(enumerate(("small", "medium", "large"), 1))
    metrics |= {f"AP_{name}": mean(precision[..., i, -1]) for i, name in areas}
    metrics |= {f"AR{n}": mean(recall[..., 0, i]) for i, n in enumerate(sorted(detections))}
    metrics |= {f"AR_{name}": mean(recall[..., i, -1]) for i, name in areas}
    precision = torch.from_numpy(every).float()
    precision[precision < 0] = torch.nan
    for iou in (55, 60, 65, 70, 80, 85, 90, 95):
        metrics[f"AP{iou}"] = number(precision[(iou - 50) // 5].nanmean())
    if not masks and any("difficult" in a for a in truth["annotations"]):
        metrics["voc07_AP50"] = voc07_ap(truth, results)
    if not masks and truth.get("info") == UAVDT:
        metrics["uavdt_AP70"] = uavdt_ap(truth, results)
    names = {c["id"]: c["name"] for c in truth["categories"]}
    per_class = precision.nanmean((0, 1)).tolist()
    metrics["per_class"] = {
        names[i]: number(ap) for i, ap in zip(evaluation.params.catIds, per_class)
    }
    return metrics


def coco_evaluation(
    truth: dict,
    results: list[dict],
    detections=(1, 10, 100),
    sides=(0, 32, 96),
    kind="bbox",
    ious=(),
):
    """pycocotools' COCOeval, evaluated and accumulated, of a `complete_truth`.

    `ious`: thresholds, if not .50 to .95; `kind`: "bbox" or "segm"; the rest is `coco_metrics`'.
    """
    if not truth["annotations"]:
        results = []  # spares matching a million detections with nothing
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    class Evaluation(COCOeval):
        def _prepare(self):
            super()._prepare()  # which sets `ignore` from iscrowd alone
            for objects in self._gts.values():
                for a in objects:
                    a["ignore"] = a["ignore"] or a.get("difficult", 0)

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        found = coco.loadRes(copy.deepcopy(results)) if results else COCO()
        evaluation = Evaluation(coco, found, kind)
        if ious:
            evaluation.params.iouThrs = np.array(ious)
        evaluation.params.imgIds = sorted(image["id"] for image in truth["images"])
        evaluation.params.catIds = sorted(c["id"] for c in truth["categories"])
        evaluation.params.maxDets = list(detections)
        ends = [*(side**2 for side in sides), 1e10]  # of all: from 0 on, whatever small ones are
        evaluation.params.areaRng = [[0, 1e10], *map(list, zip(ends, ends[1:]))]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def complete_truth(truth: dict) -> dict:
    """A copy with what pycocotools wants of annotations: `area`, here the box's, and `iscrowd`.

    They are numbered anew from 1: pycocotools takes id 0 for "no match", and one id for one object.
    """
    truth = copy.deepcopy(truth)
    truth["annotations"] = [
        {"area": a["bbox"][2] * a["bbox"][3], "iscrowd": 0, **a, "id": number}
        for number, a in enumerate(truth.get("annotations", []), 1)
    ]
    return truth


def voc07_ap(truth: dict, results: list[dict], iou: float = 0.5) -> float:
    """Mean over classes of VOC 2007's 11-point AP, with the challenge's own rules of matching.

    A detection belongs to the object it overlaps most; a second one on the same object is false;
    one on a difficult object counts neither way.
    """
    groups: dict = {}
    for a in truth["annotations"]:
        groups.setdefault((a["category_id"], a["image_id"]), []).append(a)
    aps = []
    for category in truth["categories"]:
        mine = sorted(  # of equal scores the same one first, whatever the order of detection
            (r for r in results if r["category_id"] == category["id"]),
            key=lambda r: (-r["score"], r["image_id"]),
        )
        objects = {k[1]: v for k, v in groups.items() if k[0] == category["id"]}
        num = sum(not a.get("difficult", 0) for v in objects.values() for a in v)
        if not num:
            continue
        boxes = {k: xywh_to_xyxy([a["bbox"] for a in v]) for k, v in objects.items()}
        taken, hits = set(), []
        for r in mine:
            image_id, value, best = r["image_id"], 0.0, -1
            if image_id in boxes:
                overlap = torchvision.ops.box_iou(xywh_to_xyxy([r["bbox"]]), boxes[image_id])[0]
                value, best = overlap.max(0)
            if value <= iou:
                hits.append(False)
            elif not objects[image_id][best].get("difficult", 0):
                hits.append((image_id, int(best)) not in taken)
                taken.add((image_id, int(best)))
        hits = torch.tensor(hits, dtype=torch.float64).cumsum(0)
        recall, precision = hits / num, hits / torch.arange(1, len(hits) + 1)
        at = [precision[recall >= t / 10 - 1e-9] for t in range(11)]
        aps.append(sum(p.max().item() if len(p) else 0 for p in at) / 11)
    return sum(aps) / len(aps) if aps else 0.0


def uavdt_ap(truth: dict, results: list[dict], iou: float = 0.7) -> float | None:
    """AP as UAVDT's official detection evaluator has it, over all frames; None without objects.

    In each frame detections take objects, best score first: each takes the one it overlaps most of
    those not taken yet, if their IoU is at least `iou`; else it is false. Before that, detections
    strictly inside one rectangle to ignore (a crowd) are removed, but in two sequences; objects
    inside count. AP is the area under the monotone precision-recall curve, as VOC's since 2010.
    Image ids begin with the sequence, as in "M0203/img000001".
    """
    unfiltered = ("M0209", "M0801")  # (release)
    frames: dict = {image["id"]: ([], [], [], []) for image in truth["images"]}
    for a in truth["annotations"]:
        frames[a["image_id"]][a.get("iscrowd", 0)].append(a["bbox"])
    for r in sorted(results, key=lambda r: -r["score"]):
        frames[r["image_id"]][2].append(r["bbox"])
        frames[r["image_id"]][3].append(r["score"])
    scores, hits, num = [], [], 0
    for image_id in sorted(frames):  # of equal scores the earlier frame's comes first
        objects, ignored, found = (xywh_to_xyxy(boxes) for boxes in frames[image_id][:3])
        points, kept = torch.tensor(frames[image_id][3]), torch.ones(len(found), dtype=torch.bool)
        if image_id.split("/")[0] not in unfiltered:
            inside = (found[:, None, :2] > ignored[:, :2]) & (found[:, None, 2:] < ignored[:, 2:])
            kept = ~inside.all(-1).any(-1)
        objects = objects.flip(0)  # of equal overlaps the last object's counts
        overlap = torchvision.ops.box_iou(found[kept], objects).numpy()  # [D, G]
        hit = np.zeros(len(overlap))
        for d in np.flatnonzero((overlap >= iou).any(1)):
            best = overlap[d].argmax()
            if overlap[d, best] >= iou:
                hit[d] = 1
                overlap[:, best] = 0  # taken
        num += len(objects)
        scores.append(points[kept])
        hits.append(torch.from_numpy(hit))
    if not num:
        return None
    hits = torch.cat(hits)[torch.cat(scores).argsort(descending=True, stable=True)]
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    precision = precision.flip(0).cummax(0)[0].flip(0)  # the best at this recall or a higher one
    return (precision * hits).sum().item() / num


def evaluate(model: nn.Module, data: Dataset, config: Config, device=None, out=None) -> dict:
    """Detect in all images of `data` and score with pycocotools; all processes get the metrics.

    With `out` (first process) writes predictions.json, metrics.json and detections.png there. Of a
    set without annotations the metrics are all None: predictions.json is for its server.
    """
    device = device or next(model.parameters()).device
    results, seen = [], 0
    for target, found in detect(model, data, config, device):
        results += to_coco(target["image_id"], found, data.categories, target["size"])
        seen += 1
    shares = gather((results, seen))
    metrics = None
    if rank_and_world()[0] == 0:
        results, counts = [r for share, _ in shares for r in share], [n for _, n in shares]
        results.sort(key=lambda r: r["image_id"])  # the same file from any number of processes
        assert sum(counts) == len(data), f"{counts} images evaluated, the set has {len(data)}"
        truth, limits = data.coco(), (config.metric_detections, config.metric_sides)
        metrics = coco_metrics(truth, results, *limits)
        known = all(a.get("segmentation") for a in truth.get("annotations", []))
        if getattr(config, "masks", False) and known:
            scored = coco_metrics(truth, results, *limits, masks=True)
            metrics |= {f"mask_{name}": value for name, value in scored.items()}
        if out:
            write_json(Path(out) / "predictions.json", results)
            write_json(Path(out) / "metrics.json", metrics)
            draw_grid(data, results, config.draw_score, Path(out) / "detections.png")
    return gather(metrics)[0]


def show_metrics(metrics: dict) -> str:
    keys = "AP AP50 AP75 AP90 AP_small AP_medium AP_large voc07_AP50 uavdt_AP70".split()
    keys += "mask_AP mask_AP50 mask_AP75".split()
    shown = "  ".join(f"{k} {metrics[k]:.3f}" for k in keys if metrics.get(k) is not None)
    return shown or "no AP: the set has no annotated objects"


def show_table(rows: dict[str, dict]) -> None:
    """Print metrics of several evaluations, one a line, in percent."""
    width, keys = max(map(len, rows)), "AP AP50 AP60 AP70 AP75 AP80 AP90".split()
    say(f"{'':{width}}  " + "  ".join(f"{k:>5}" for k in keys))
    for name, metrics in rows.items():
        values = ("    -" if metrics[k] is None else f"{100 * metrics[k]:5.1f}" for k in keys)
        say(f"{name:{width}}  " + "  ".join(values))
