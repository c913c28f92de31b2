"""Which head's score and box follow the IoU? Double-Head R-CNN's Section 3 on a checkpoint.

    python -m studies.sections double_head --weights CKPT

Every head judges windows that slide around each object (3.1). sections_bins.png shows the
means of its scores and of its boxes' IoUs by the window's IoU (Figures 2 and 7),
sections_weights.png the correlation of the weights of cells (Figure 4). The correlation
(Pearson) of score and IoU is over these windows, the RPN's proposals and each head's own
final boxes (Figure 3). The paper looks at two models with one head each; an Ext model has
both in one. Numbers: OUT/sections.json.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torchvision.ops import box_iou

from baselines.faster_rcnn import RCNN_STDS, Rois
from common import BadInput, aligned_iou, clip_boxes, decode_boxes
from double_head import Detector, FCHead
from engine.metrics import evaluate
from engine.pictures import new_figure
from engine.processes import autocast, print_once, rank_and_world
from studies import checkpoint
from studies.calibration import (
    BINS,
    annotations_by_image,
    correlation,
    in_bins,
    is_counted,
    listed,
    with_iou,
)
from studies.checkpoint import Study, each_image, open_study, read_options, reported

SIZES = ("small objects", "medium objects", "large objects")
CLASSES = ("easy classes", "medium classes", "hard classes")
GROUPS = ("all objects", *SIZES, *CLASSES)
HeadTables = Iterator[tuple[str, Tensor]]  # of each head its name and a row for each box
CHUNK = 1024  # windows that go through the heads at once: bounds memory


# ------------------------------------------------------------------------------ windows


def sliding_windows(gt_boxes: Tensor, steps: int = 11) -> Tensor:
    """Windows around each gt (3.1): [G, 4] -> [G, steps^4, 4]; steps^4 is 14,641 for 11.

    Every combination of shifts in x and y (up to one side of the gt) with widths and heights
    (half to double). The gt is the middle window. choice: the steps widen quadratically from
    it, because even steps would leave the bins next to IoU 1 empty.

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
    eligible = []
    for image_id, objects in annotations.items():
        eligible += [(image_id, i) for i, a in enumerate(objects) if is_counted(a)]
    count = min(most or len(eligible), len(eligible))
    chosen: dict[Any, list[int]] = {image_id: [] for image_id in annotations}
    for k in range(count):
        image_id, i = eligible[k * len(eligible) // count]
        chosen[image_id].append(i)
    return chosen


def size_group(areas: Tensor) -> Tensor:
    """COCO's small, medium, large: 0, 1, 2 of areas [N] in the original image's pixels."""
    return (areas > 32**2).long() + (areas > 96**2)


def groups_of_classes(per_class: dict[str, float | None]) -> dict[str, list[str]]:
    """Thirds of the classes by falling AP (3.1), without the classes that have no AP."""
    known = [name for name, ap in per_class.items() if ap is not None]
    known.sort(key=lambda name: -per_class[name])
    edges = [round(i * len(known) / 3) for i in range(4)]
    return {name: known[a:b] for name, a, b in zip(CLASSES, edges, edges[1:])}


# ------------------------------------------------------------------------------ measured


def windows(model: Detector, outputs: dict, target: dict, chosen: list[int]) -> HeadTables:
    """Each head's tables [N, 5] of N windows around the chosen objects of an image.

    Columns: the object's label and group of size (`target["sizes"]`), the IoU of the window
    with it, the score of its class, the IoU of the regressed box. nan: the head has no such
    output.
    """
    if not chosen:
        return
    limit = outputs["sizes"]
    boxes = clip_boxes(sliding_windows(target["boxes"][chosen]), limit)  # [G, W, 4]
    gt = torch.tensor(chosen, device=boxes.device).repeat_interleave(boxes.shape[1])
    boxes = boxes.flatten(0, 1)
    real = (boxes[:, 2:] > boxes[:, :2]).all(1)
    for part, own in zip(boxes[real].split(CHUNK), gt[real].split(CHUNK)):
        found = model.predictions(outputs["features"], Rois(torch.zeros_like(own), part))
        labels, gt_boxes = target["labels"][own], target["boxes"][own]
        iou, rows = aligned_iou(part, gt_boxes), torch.arange(len(own), device=own.device)
        for name in found["probs"] | found["deltas"]:
            score = regressed = torch.full_like(iou, math.nan)
            if name in found["probs"]:
                score = found["probs"][name][rows, labels]
            if name in found["deltas"]:
                moved = decode_boxes(part, found["deltas"][name][rows, labels], RCNN_STDS)
                regressed = aligned_iou(clip_boxes(moved, limit), gt_boxes)
            yield name, torch.stack([labels, target["sizes"][own], iou, score, regressed], 1)


def proposals(outputs: dict, target: dict) -> HeadTables:
    """Each head's score and IoU [N, 2] of an image's proposals.

    choice: the object is the one that a proposal overlaps most. A proposal that overlaps none
    is left out: it has no class whose score could be looked at.
    """
    iou, gt = F.pad(box_iou(outputs["rois"].boxes, target["boxes"]), (0, 1)).max(1)
    real = (iou > 0) & ~F.pad(target["ignore"], (0, 1))[gt]
    labels = target["labels"][gt[real], None]
    for name, probs in outputs["probs"].items():
        yield name, torch.cat([probs[real].gather(1, labels), iou[real, None]], 1)


def final_boxes(model: Detector, outputs: dict, target: dict, test) -> HeadTables:
    """Score and IoU with the best object of its class [N, 2] of what a head detects alone."""
    for name in model.cls:
        alone = dataclasses.replace(test, alone=name)
        (found,) = model.detections(model.candidates(outputs, alone), 1, alone)
        found = with_iou(found, target)
        ignored = F.pad(target["ignore"], (0, 1))[found["gt"]] & (found["iou"] > 0)
        yield name, torch.stack([found["scores"], found["iou"]], 1)[~ignored]


def statistics(table: Tensor) -> dict:
    """A table of `windows` as numbers: Pearson; counts, means and deviations by the IoU."""
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
    chosen = choose_objects(annotations, objects)
    tables: dict[tuple, list] = defaultdict(list)  # (which boxes, head) -> their tables
    for image, (target,) in each_image(study):
        mine = target["image_id"]
        areas = [a["area"] for a in annotations[mine]]
        target["sizes"] = size_group(torch.tensor(areas, device=device))
        with autocast(settings.run.amp, device):
            outputs = model.outputs(image)
            found = {
                "windows": windows(model, outputs, target, chosen[mine]),
                "proposals": proposals(outputs, target),
                "final": final_boxes(model, outputs, target, settings.test),
            }
            for where, parts in found.items():
                for name, table in parts:
                    tables[where, name].append(table.cpu())
    names = [c["name"] for c in study.data.categories]
    classes = groups_of_classes(metrics["per_class"])
    members = [[names.index(name) for name in group] for group in classes.values()]
    fc_heads = {name: head for name, head in model.heads.items() if isinstance(head, FCHead)}
    summary: dict[str, Any] = {
        "objects": sum(map(len, chosen.values())),
        "classes": classes,
        "metrics": metrics,
        "weight_correlation": {k: weight_correlation(head) for k, head in fc_heads.items()},
        "windows": {},
        "proposals": {},
        "final": {},
    }
    for (where, name), parts in tables.items():
        table = torch.cat(parts)
        if where == "windows":
            summary[where][name] = by_group(table, members)
            pearson = summary[where][name]["all objects"]["pearson"]
        else:
            pearson = correlation(*table.unbind(1))
            summary[where][name] = {"count": len(table), "pearson": pearson}
        print_once(f"{where:9} {name:6} Pearson {pearson}")
    draw_bins(summary["windows"], study.out / "sections_bins.png")
    if fc_heads:
        draw_weights(summary["weight_correlation"], study.out / "sections_weights.png")
    checkpoint.write_results(study.out / "sections.json", summary)
    return summary


def draw_bins(windows: dict[str, dict], path: Path) -> None:
    """Figures 2 and 7: each head's score and regressed IoU over a proposal's IoU."""
    figure, axes = new_figure(22, 6, 2, 7, sharex=True, sharey="row")
    centres = (np.arange(BINS) + 0.5) / BINS
    titles = {"score": "class score", "iou": "regressed box's IoU"}
    for row, (what, title) in zip(axes, titles.items()):
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
class Options(checkpoint.Options):
    method: Annotated[Literal["double_head"], tyro.conf.Positional] = "double_head"
    objects: int = 200  # slide windows around so many (seconds each on a CPU); 0: all


def main(argv=None) -> dict:
    with reported():
        options, flags = read_options("sections", Options, __doc__, argv)
        if options.objects < 0:
            raise BadInput(f"--objects {options.objects}: at least 0 (all)")
        return sections(open_study(options, flags), options.objects)


if __name__ == "__main__":
    main()
