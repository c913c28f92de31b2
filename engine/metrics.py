"""`detect`: a detector over a data set; `evaluate`: the metrics of COCO, VOC and UAVDT."""

from __future__ import annotations

import contextlib
import copy
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common import BadInput, constant
from data import DetectionDataset
from data.masks import encode_mask, paste_mask
from data.own import CheckedItems, checked_truth
from data.transforms import TestImages
from data.uavdt import UAVDT, uavdt_ap
from data.voc import voc07_ap
from engine.checkpoints import write_json
from engine.detector import candidates_by_size
from engine.loader import batches_of, make_loader, per_process_batch, to_device
from engine.pictures import draw_grid, drawing
from engine.processes import autocast, gather, print_once, progress, rank_and_world
from engine.settings import Settings, Test

# ------------------------------------------------------------------------------ detections


def detect(
    model, data, settings: Settings, shared: bool = True
) -> Iterator[tuple[dict, dict[str, Tensor]]]:
    """Yield (target, detections in the original image's pixels) for this process's images.

    These are its share of the data set, or all images if not `shared`. See
    `detect_under`.
    """
    for target, (found,) in detect_under(model, data, settings, [settings.test], shared):
        yield target, found


@torch.no_grad()
def detect_under(
    model, data, settings: Settings, tests: list[Test], shared: bool = True
) -> Iterator[tuple[dict, list[dict[str, Tensor]]]]:
    """Yield (target, the detections under each of `tests`), from one forward pass an image.

    settings.test says which views there are: the candidates of several scales and of the
    mirrored image are merged before the last NMS. Exactly one process sees each image.
    The images are sorted by aspect, so that a batch has few padded sizes. The target's
    boxes are in pixels of the last scale.
    """
    model.eval()
    device, run = next(model.parameters()).device, settings.run
    rank, world = rank_and_world() if shared else (0, 1)
    sizes = np.asarray(data.sizes)
    aspect = sizes[:, 1] / sizes[:, 0]
    mine = sorted(range(rank, len(data), world), key=aspect.__getitem__)
    limits = settings.data.max_size, settings.data.scales
    views = TestImages(data, settings.test.test_scales, *limits)
    flips = (False, True) if settings.test.test_flip else (False,)
    last_pixel = "last_pixel" in settings.model.legacy
    batch = run.eval_batch or per_process_batch(run)
    loader = make_loader(views, run.workers, device, sampler=mine, batch_size=batch)
    with batches_of(loader) as iterator:
        for items in progress(iterator, "detecting", len(loader)):
            merged: list[list[dict]] = [[] for _ in tests]
            for one_scale in zip(*items):  # a list of (image, target) at this scale
                images, targets = to_device(one_scale, device)
                for flip in flips:
                    with autocast(run.amp, device):
                        seen = [i.flip(-1) for i in images] if flip else images
                        found = candidates_by_size(model, seen, tests)
                    for parts, part in zip(merged, found):
                        parts.append(in_original_pixels(part, images, targets, flip, last_pixel))
            detections = []
            for parts, test in zip(merged, tests):
                candidates = {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
                detections.append(model.detections(candidates, len(images), test))
            for target, *under in zip(targets, *detections):
                yield target, [{k: v.cpu() for k, v in found.items()} for found in under]


def in_original_pixels(
    candidates: dict[str, Tensor],
    images: list[Tensor],
    targets: list[dict],
    flip: bool,
    last_pixel: bool = False,
) -> dict[str, Tensor]:
    """Candidates of resized, perhaps mirrored images, in pixels of the images on disk.

    `last_pixel`: in training, resizing scaled the index of a box's last pixel
    (engine/legacy.py).
    """
    boxes, index = candidates["boxes"], candidates["image"]
    inner = constant([i.shape[1:] for i in images], boxes.device)
    outer = constant([t["size"] for t in targets], boxes.device)
    if flip:
        if "masks" in candidates:
            candidates["masks"] = candidates["masks"].flip(-1)
        width = inner[index, 1]
        mirrored = [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]]
        boxes = torch.stack(mirrored, 1)
    grow = (outer / inner).flip(-1).repeat(1, 2)  # (w, h, w, h): sides are rounded apart
    boxes = boxes * grow[index]
    if last_pixel:
        boxes[:, 2:] += 1 - grow[index][:, 2:]
    return {**candidates, "boxes": boxes}


def to_coco(image_id, found: dict, categories: list[dict], size=None) -> list[dict]:
    """Detections of an image -> COCO results: xywh boxes, the data set's own category ids.

    If there are masks and the image's size (h, w) is given, results also have
    `segmentation` (RLE) and `mask_score`, by which masks are ranked.
    """
    results: list[dict] = []
    values = (found[name].tolist() for name in ("boxes", "scores", "labels"))
    for (x1, y1, x2, y2), score, label in zip(*values):
        result = {"image_id": image_id, "category_id": categories[label]["id"]}
        bbox = [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)]
        results.append({**result, "bbox": bbox, "score": score})
    if "masks" in found and size is not None:
        scores = found["mask_scores"].tolist()
        for result, mask, box, score in zip(results, found["masks"], found["boxes"], scores):
            result["segmentation"] = encode_mask(paste_mask(mask, box, size))
            result["mask_score"] = score
    return results


# ------------------------------------------------------------------------------ metrics


def coco_metrics(
    truth: dict, results: list[dict], detections=(1, 10, 100), sides=(0, 32, 96), masks=False
) -> dict:
    """pycocotools' twelve numbers, AP55 to AP95, AP per class; None where undefined.

    `detections`: how many detections of an image AR1, AR10 and AR100 count; AP counts the
    last. `sides`: where small, medium and large begin, roots of areas. With `masks` the
    results' segmentations are scored, by their mask_score, against the truth's.

    Objects marked `difficult` are ignored like COCO's out-of-range areas; crowds as COCO
    does. Two metrics of boxes are added: for data with `difficult` marks (VOC) VOC 2007's
    11-point AP at IoU 0.5, `voc07_AP50`; for UAVDT the AP of its own evaluator at IoU
    0.7, `uavdt_AP70` (`AP70` is COCO's, with 101 recalls). Without annotations (COCO's
    test sets) all metrics are None. An annotation needs only image_id, category_id and
    bbox (`complete_truth`).
    """
    truth = complete_truth(truth)
    if masks:  # without boxes, from which pycocotools would take the areas
        keys = ("image_id", "category_id", "segmentation")
        results = [{**{k: r[k] for k in keys}, "score": r["mask_score"]} for r in results]
    kind = "segm" if masks else "bbox"
    evaluation = coco_evaluation(truth, results, detections, sides, kind)
    # precision [10 IoUs, 101 recalls, K, 4 areas, 3 maxDets], recall without the recalls;
    # -1 where a class has no object. Not summarize(): it takes AP at 100 detections,
    # whatever is asked.
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    number = lambda v: None if v != v or v < 0 else float(v)  # noqa: E731
    mean = lambda v: number(v[v > -1].mean()) if (v > -1).any() else None  # noqa: E731
    every = precision[..., 0, -1]
    metrics: dict[str, Any] = {"AP": mean(every)}
    metrics |= {"AP50": mean(every[:1]), "AP75": mean(every[5:6])}
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
    aps = zip(evaluation.params.catIds, per_class)
    metrics["per_class"] = {names[i]: number(ap) for i, ap in aps}
    return metrics


def coco_evaluation(
    truth: dict,
    results: list[dict],
    detections=(1, 10, 100),
    sides=(0, 32, 96),
    kind="bbox",
    ious=(),
):
    """pycocotools' COCOeval of a `complete_truth`, evaluated and accumulated.

    `kind`: "bbox" or "segm"; `ious`: thresholds other than .50 to .95; the rest: see
    `coco_metrics`.
    """
    if not truth["annotations"]:
        results = []  # saves matching a million detections with nothing
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
        ends = [*(side**2 for side in sides), 1e10]  # "all" begins at 0, wherever "small" does
        evaluation.params.areaRng = [[0, 1e10], *map(list, zip(ends, ends[1:]))]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def complete_truth(truth: dict) -> dict:
    """A copy with all that pycocotools wants: `area`, `iscrowd`, a list `bbox`.

    Annotations are numbered anew from 1, because pycocotools takes id 0 for "no match"
    and equal ids for one object.
    """
    truth = copy.deepcopy(truth)
    annotations = []
    for number, a in enumerate(truth.get("annotations", []), 1):
        absent = {"area": a["bbox"][2] * a["bbox"][3], "iscrowd": 0}
        annotations.append({**absent, **a, "bbox": [*a["bbox"]], "id": number})
    return {**truth, "annotations": annotations}


def evaluate(
    model: nn.Module,
    data: DetectionDataset,
    settings: Settings,
    out: str | Path | None = None,
    truth: dict | None = None,
) -> dict:
    """Detect in all images and score with pycocotools; all processes get the metrics.

    Every setting of settings.test is honoured. With `out` the first process writes
    predictions.json, metrics.json and detections.png there. The metrics of a set without
    annotations are all None: predictions.json is for its server. `truth` is data.coco(),
    for callers that evaluate often.
    """
    results: list[dict] = []
    seen = []
    if truth is None and rank_and_world()[0] == 0:
        truth = checked_truth(data)
    for target, found in detect(model, CheckedItems(data), settings):
        results += to_coco(target["image_id"], found, data.categories, target["size"])
        seen.append(target["image_id"])
    shares = gather((results, seen))
    metrics = None
    if rank_and_world()[0] == 0:
        check_ids([image_id for _, ids in shares for image_id in ids], truth)
        results = [r for share, _ in shares for r in share]
        results.sort(key=lambda r: r["image_id"])  # the same file from any number of processes
        test = settings.test
        limits = dict(detections=test.metric_detections, sides=test.metric_sides)
        metrics = coco_metrics(truth, results, **limits)
        known = all(a.get("segmentation") for a in truth.get("annotations", []))
        if settings.model.masks and known:
            scored = coco_metrics(truth, results, **limits, masks=True)
            metrics |= {f"mask_{name}": value for name, value in scored.items()}
        if out:
            out = Path(out)
            write_json(out / "predictions.json", results)
            write_json(out / "metrics.json", metrics)
            with drawing(out / "detections.png"):
                draw_grid(data, results, test.draw_score, out / "detections.png")
    return gather(metrics)[0]


def check_ids(image_ids: list, truth: dict) -> None:
    """Raise BadInput unless these are the images of a ground truth, each of them once."""
    known = {image["id"] for image in truth["images"]}
    for image_id, count in Counter(image_ids).items():
        if image_id not in known or count > 1:
            why = f"{count} items have it" if count > 1 else "coco() has no such image"
            raise BadInput(f"image_id {image_id!r}: {why}")
    assert len(image_ids) == len(known), f"{len(image_ids)} images evaluated of {len(known)}"


def show_metrics(metrics: dict) -> str:
    keys = "AP AP50 AP75 AP90 AP_small AP_medium AP_large voc07_AP50 uavdt_AP70".split()
    keys += "mask_AP mask_AP50 mask_AP75".split()
    shown = "  ".join(f"{k} {metrics[k]:.3f}" for k in keys if metrics.get(k) is not None)
    return shown or "no AP: the set has no annotated objects"


def show_per_class(metrics: dict, most: int = 40) -> str:
    """AP of each class, the worst first."""
    known = {k: v for k, v in metrics.get("per_class", {}).items() if v is not None}
    parts = [f"{name} {ap:.3f}" for name, ap in sorted(known.items(), key=lambda kv: kv[1])]
    more = [f"... and {len(parts) - most} better ones"] if len(parts) > most else []
    return "AP by class: " + "  ".join(parts[:most] + more)


def show_table(rows: dict[str, dict]) -> None:
    """Print metrics of several evaluations, one a line, in percent."""
    width, keys = max(map(len, rows)), "AP AP50 AP60 AP70 AP75 AP80 AP90".split()
    print_once(f"{'':{width}}  " + "  ".join(f"{k:>5}" for k in keys))
    for name, metrics in rows.items():
        values = ("    -" if metrics[k] is None else f"{100 * metrics[k]:5.1f}" for k in keys)
        print_once(f"{name:{width}}  " + "  ".join(values))
