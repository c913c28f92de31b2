"""Double-Head R-CNN's Section 3 on a checkpoint: which head's score and box follow the IoU?

    python -m studies.sections double_head --weights CKPT

Windows are slid around each object (3.1) and judged by every head, and so are the detector's own
proposals and each head's own final boxes. The paper looks at two models with one head each; an Ext
model has both in one. Writes OUT/sections.json and, as sections_*.png, Figures 2 and 7 (bins) and
Figure 4 (weights).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torchvision.ops import box_area, box_iou

from baselines.faster_rcnn import RCNN_STDS, Rois
from common import BadInput, aligned_iou, clip_boxes, decode_boxes
from double_head import Detector, FCHead
from engine.checkpoints import write_json
from engine.loader import to_device
from engine.metrics import evaluate
from engine.pictures import new_figure
from engine.processes import autocast, print_once, progress, rank_and_world
from studies.calibration import (
    BINS,
    annotations_by_image,
    correlation,
    in_bins,
    is_counted,
    listed,
    with_iou,
)
from studies.checkpoint import (
    Options,
    Study,
    network_images,
    open_study,
    read_options,
    reported,
)

SIZES = ("small objects", "medium objects", "large objects")
CLASSES = ("easy classes", "medium classes", "hard classes")
GROUPS = ("all objects", *SIZES, *CLASSES)
CHUNK = 1024  # windows that go through the heads at once: bounds memory


# ------------------------------------------------------------------------------ windows and objects


def sliding_windows(gt_boxes: Tensor, steps: int = 11) -> Tensor:
    """Windows around each gt (3.1): [G, 4] -> [G, steps^4, 4]; steps^4 is 14,641 for 11.

    Every combination of shifts in x and y (up to one side of the gt) with widths and heights (half
    to double). The gt is the middle window. choice: the steps widen quadratically from it, because
    even steps would leave the bins next to IoU 1 empty.

    >>> sliding_windows(torch.tensor([[0., 0., 10., 20.]]))[0, 14641 // 2]
    tensor([ 0.,  0., 10., 20.])
    """
    step = torch.linspace(-1, 1, steps, device=gt_boxes.device)
    shift = step * step.abs()
    growth = shift * math.log(2)  # of the logarithm of width and height
    return decode_boxes(gt_boxes[:, None], torch.cartesian_prod(shift, shift, growth, growth))


def choose_objects(annotations: dict[Any, list[dict]], most: int) -> dict[Any, list[int]]:
    """image id -> which of its objects get windows: `most` in all, evenly spread (0: all).

    annotations: those of `annotations_by_image`. Crowds are never chosen.
    """
    eligible = [
        (image_id, i)
        for image_id, objects in annotations.items()
        for i, annotation in enumerate(objects)
        if is_counted(annotation)
    ]
    count = min(most or len(eligible), len(eligible))
    chosen: dict[Any, list[int]] = {image_id: [] for image_id in annotations}
    for i in range(count):
        image_id, position = eligible[i * len(eligible) // count]
        chosen[image_id].append(position)
    return chosen


def size_group(areas: Tensor) -> Tensor:
    """COCO's small, medium, large: 0, 1, 2 of areas [N] in the original image's pixels."""
    return (areas > 32**2).long() + (areas > 96**2)


def groups_of_classes(per_class: dict[str, float | None]) -> dict[str, list[str]]:
    """Thirds of the classes by falling AP (3.1), without the classes that have no AP."""
    known = sorted((k for k, v in per_class.items() if v is not None), key=lambda k: -per_class[k])
    edges = [round(i * len(known) / 3) for i in range(4)]
    return {name: known[a:b] for name, a, b in zip(CLASSES, edges, edges[1:])}


# ------------------------------------------------------------------------------ measured

# A table [N, 5] holds N boxes that a head has judged, each by an object: label and group of size of
# the object, IoU of the box with it, score of its class, and IoU of the regressed box. Where a head
# does not have the task there is nan. Targets also have `sizes` [G], the objects' groups of size.


def judged(found: dict, boxes: Tensor, target: dict, gt: Tensor, limit: Tensor) -> dict:
    """The table of each head for boxes [N, 4], judged by the objects gt [N].

    found: what `Detector.predictions` found in the boxes.
    """
    labels, gt_boxes = target["labels"][gt], target["boxes"][gt]
    iou, rows = aligned_iou(boxes, gt_boxes), torch.arange(len(gt), device=gt.device)
    tables = {}
    for name in found["probs"] | found["deltas"]:
        score = regressed = torch.full_like(iou, math.nan)
        if name in found["probs"]:
            score = found["probs"][name][rows, labels]
        if name in found["deltas"]:
            moved = decode_boxes(boxes, found["deltas"][name][rows, labels], RCNN_STDS)
            regressed = aligned_iou(clip_boxes(moved, limit), gt_boxes)
        tables[name] = torch.stack([labels, target["sizes"][gt], iou, score, regressed], 1)
    return tables


def proposals(outputs: dict, target: dict) -> dict[str, Tensor]:
    """Each head's table of an image's proposals."""
    # choice: a proposal is judged by the object that it overlaps most. One that overlaps none has
    # no class whose score could be looked at.
    boxes = outputs["rois"].boxes
    best, gt = F.pad(box_iou(boxes, target["boxes"]), (0, 1)).max(1)
    real = (best > 0) & ~F.pad(target["ignore"], (0, 1))[gt]
    found = {k: {n: v[real] for n, v in outputs[k].items()} for k in ("probs", "deltas")}
    return judged(found, boxes[real], target, gt[real], outputs["sizes"])


def windows(model: Detector, outputs: dict, target: dict, chosen: list[int]) -> Iterator[dict]:
    """Each head's tables of windows around the chosen objects of an image."""
    if not chosen:
        return
    limit = outputs["sizes"]
    boxes = clip_boxes(sliding_windows(target["boxes"][chosen]), limit)  # [G, W, 4]
    gt = torch.tensor(chosen, device=boxes.device).repeat_interleave(boxes.shape[1])
    boxes = boxes.flatten(0, 1)
    real = (boxes[:, 2:] > boxes[:, :2]).all(1)
    for part, own in zip(boxes[real].split(CHUNK), gt[real].split(CHUNK)):
        found = model.predictions(outputs["features"], Rois(torch.zeros_like(own), part))
        yield judged(found, part, target, own, limit)


def final_boxes(model: Detector, outputs: dict, target: dict, test) -> dict[str, Tensor]:
    """Each head's table of what it detects alone, nothing regressed.

    A box is judged by the best object of its own class; without one, by its own size.
    """
    scale = torch.tensor(target["size"], device=outputs["sizes"].device) / outputs["sizes"][0]
    tables = {}
    for name in model.cls:
        alone = dataclasses.replace(test, alone=name)
        (found,) = model.detections(model.candidates(outputs, alone), 1, alone)
        found = with_iou(found, target)
        iou, gt = found["iou"], found["gt"]
        area = box_area(found["boxes"]) * scale.prod()  # in pixels of the image on disk
        size = torch.where(iou > 0, F.pad(target["sizes"], (0, 1))[gt], size_group(area))
        values = [found["labels"], size, iou, found["scores"], torch.full_like(iou, math.nan)]
        ignored = F.pad(target["ignore"], (0, 1))[gt] & (iou > 0)
        tables[name] = torch.stack(values, 1)[~ignored]
    return tables


def statistics(table: Tensor) -> dict:
    """A table as numbers: Pearson of score and IoU, and count, means and deviations by IoU."""
    _, _, iou, score, regressed = table.double().unbind(1)
    count, s, ss, r, rr = in_bins(iou, score, score**2, regressed, regressed**2)
    return {
        "count": count.tolist(),
        "pearson": correlation(score, iou),
        "score_mean": listed(s),
        "score_std": listed((ss - s**2).clamp(min=0).sqrt()),
        "iou_mean": listed(r),
        "iou_std": listed((rr - r**2).clamp(min=0).sqrt()),
    }


def by_group(table: Tensor, classes: list[list[int]]) -> dict[str, dict]:
    """`statistics` of each of GROUPS; classes: the labels of easy, medium and hard classes."""
    label, size = table[:, 0], table[:, 1]
    parts = [torch.ones_like(label).bool(), *(size == i for i in range(3))]
    parts += [torch.isin(label, torch.tensor(members)) for members in classes]
    return {group: statistics(table[part]) for group, part in zip(GROUPS, parts)}


def weight_correlation(head: FCHead) -> list[list[float]]:
    """Pearson's between the weights of all pairs of cells: [S*S, S*S] (3.4)."""
    weights = head.cell_weights().flatten(0, 1).flatten(1)  # [S*S, C * channels]
    return torch.corrcoef(weights.double()).round(decimals=4).tolist()


# ------------------------------------------------------------------------------ study


@torch.no_grad()
def sections(study: Study, objects: int = 0) -> dict:
    """Section 3 on one model; windows are slid around that many `objects` (0: all)."""
    model, settings, device = study.model, study.settings, study.device
    metrics = evaluate(model, study.data, settings)
    if rank_and_world()[0]:
        return {}  # the first process does the rest
    annotations = annotations_by_image(study.data)
    chosen, images = choose_objects(annotations, objects), network_images(study)
    tables: dict[str, dict] = {"windows": {}, "proposals": {}, "final": {}}
    for i in progress(range(len(images)), "analysing", len(images)):
        image, (target,) = to_device(images[i], device)
        areas = [a["area"] for a in annotations[target["image_id"]]]
        target["sizes"] = size_group(torch.tensor(areas, device=device))
        with autocast(settings.run.amp, device):
            outputs = model.outputs(image)
            parts = [("proposals", proposals(outputs, target))]
            parts.append(("final", final_boxes(model, outputs, target, settings.test)))
            around = windows(model, outputs, target, chosen[target["image_id"]])
            parts += [("windows", part) for part in around]
        for where, part in parts:
            for name, table in part.items():
                tables[where].setdefault(name, []).append(table.cpu())
    names = [c["name"] for c in study.data.categories]
    classes = groups_of_classes(metrics["per_class"])
    members = [[names.index(name) for name in group] for group in classes.values()]
    summary = {
        "objects": sum(map(len, chosen.values())),
        "classes": classes,
        "metrics": metrics,
        "weight_correlation": {
            name: weight_correlation(head)
            for name, head in model.heads.items()
            if isinstance(head, FCHead)
        },
    }
    for where, found in tables.items():
        summary[where] = {k: by_group(torch.cat(v), members) for k, v in found.items()}
        for name, groups in summary[where].items():
            print_once(f"{where:9} {name:6} Pearson {groups['all objects']['pearson']}")
    write_json(study.out / "sections.json", summary)
    draw_bins(summary["windows"], study.out / "sections_bins.png")
    if summary["weight_correlation"]:
        draw_weights(summary["weight_correlation"], study.out / "sections_weights.png")
    print_once(f"results: {study.out}/sections.json, sections_*.png")
    return summary


def draw_bins(windows: dict[str, dict], path: Path) -> None:
    """Figures 2 and 7: each head's score and regressed IoU over a proposal's IoU."""
    figure, axes = new_figure(22, 6, 2, 7, sharex=True, sharey="row")
    centres = (np.arange(BINS) + 0.5) / BINS
    for row, what, title in zip(axes, ("score", "iou"), ("class score", "regressed box's IoU")):
        for axis, group in zip(row, GROUPS):
            for head, by_group in windows.items():
                # None, an empty bin, becomes nan
                mean = np.array(by_group[group][f"{what}_mean"], dtype=float)
                std = np.array(by_group[group][f"{what}_std"], dtype=float)
                axis.plot(centres, mean, ".-", label=head)
                axis.fill_between(centres, mean - std, mean + std, alpha=0.1)
            axis.set(title=group, xlabel="proposal's IoU")
        row[0].set_ylabel(title)
        row[0].legend()
    figure.savefig(path, dpi=80)


def draw_weights(maps: dict[str, list], path: Path) -> None:
    """Figure 4: the correlation of each cell's weights with those of all cells."""
    figure, axes = new_figure(5 * len(maps), 4.5, 1, len(maps))
    for axis, (name, matrix) in zip(axes[0], maps.items()):
        size = round(len(matrix) ** 0.5)
        tiles = np.array(matrix).reshape(size, size, size, size).swapaxes(1, 2)
        shown = axis.imshow(tiles.reshape(size**2, size**2), vmin=0, vmax=1, cmap="jet")
        axis.set(title=f"{name}: weight correlation of cells")
        axis.set_xticks([i * size - 0.5 for i in range(1, size)], [])
        axis.set_yticks([i * size - 0.5 for i in range(1, size)], [])
        axis.grid(color="white")
        figure.colorbar(shown, ax=axis)
    figure.savefig(path, dpi=80)


@dataclass
class SectionsOptions(Options):
    method: Annotated[Literal["double_head"], tyro.conf.Positional] = "double_head"  # the only one
    # slide windows around this many objects, evenly spread (seconds each on a CPU); 0: all
    objects: int = 200


def main(argv=None) -> dict:
    with reported():
        options, flags = read_options("sections", SectionsOptions, __doc__, argv)
        if options.objects < 0:
            raise BadInput(f"--objects {options.objects}: at least 0 (all)")
        return sections(open_study(options, flags), options.objects)


if __name__ == "__main__":
    main()
