"""Double-Head R-CNN's Section 3 on a checkpoint: which head's score and box follow the IoU?

    python -m studies.sections double_head --weights CKPT
    python -m studies.sections double_head --weights B/last.pt --compare A/studies/sections.json

Windows are slid around each object (3.1) and judged by every head, and so are the detector's own
proposals and final boxes. Cells of the heads' maps and weights are correlated (3.4, Appendix A).
The paper looks at two models with one head each; an Ext model has both in one, and --compare draws
other runs beside this one. Writes OUT/sections.json and, as sections_*.png, Figures 2 and 7 (bins),
3 (pearson), 4 (weights) and 8 (features).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torchvision.ops import box_area, box_iou

from baselines.faster_rcnn import RCNN_STDS, Rois
from common import BadInput, aligned_iou, clip_boxes, decode_boxes
from data.files import read_json
from double_head import Detector, FCHead
from engine.checkpoints import write_json
from engine.loader import to_device
from engine.metrics import coco_metrics, to_coco
from engine.pictures import new_figure
from engine.processes import autocast, print_once, progress, rank_and_world
from studies.boxes import annotations_by_image
from studies.checkpoint import (
    Options,
    Study,
    network_images,
    open_study,
    read_options,
    reported,
)
from studies.windows import (
    BINS,
    CLASSES,
    SIZES,
    cell_correlation,
    choose_objects,
    groups_of_classes,
    size_group,
    sliding_windows,
    statistics,
    tally,
)

CHUNK = 1024  # windows that go through the heads at once: bounds memory


@dataclass
class Judged:
    """N boxes, each with the object that it is judged by."""

    boxes: Tensor  # [N, 4]
    gt_boxes: Tensor  # [N, 4]
    labels: Tensor  # [N] of the objects
    sizes: Tensor  # [N] groups of size of the objects

    def __getitem__(self, index) -> Judged:
        return Judged(*(getattr(self, f.name)[index] for f in dataclasses.fields(self)))


class Analysis:
    """The sums that Section 3 needs, over images that are added one by one."""

    def __init__(self, model: Detector, test, categories: list[dict]):
        self.model, self.categories = model, categories
        self.tests = {name: dataclasses.replace(test, alone=name) for name in model.cls}
        if len(model.cls) + len(model.box) > 2:  # the whole model is more than one head alone
            self.tests["model"] = test
        shape = (model.num_classes, 3, BINS, 8)
        self.windows, self.proposals, self.final = (
            {name: torch.zeros(shape, dtype=torch.double) for name in names}
            for names in (model.heads, model.heads, self.tests)
        )
        self.cells: dict[str, Tensor] = {}
        self.results: list[dict] = []
        self.objects = self.num_windows = 0

    def add_image(self, outputs: dict, target: dict, sizes: Tensor, chosen: list[int]) -> None:
        """One image: its proposals, final boxes, and windows around the chosen objects.

        sizes [G]: the objects' groups of size.
        """
        rois, limit = outputs["rois"], outputs["sizes"]
        best, gt = F.pad(box_iou(rois.boxes, target["boxes"]), (0, 1)).max(1)
        # choice: a proposal is judged by the object that it overlaps most. One that overlaps none
        # has no class whose score could be looked at.
        real = (best > 0) & ~F.pad(target["ignore"], (0, 1))[gt]
        gt = gt[real]
        judged = Judged(rois.boxes[real], target["boxes"][gt], target["labels"][gt], sizes[gt])
        found = {k: {n: v[real] for n, v in outputs[k].items()} for k in ("probs", "deltas")}
        self.add_boxes(self.proposals, found, judged, limit)
        self.add_final(outputs, target, sizes)
        if chosen:
            boxes, labels = target["boxes"][chosen], target["labels"][chosen]
            self.add_windows(outputs["features"], boxes, labels, sizes[chosen], limit)

    def add_boxes(self, sums: dict, found: dict, judged: Judged, limit: Tensor) -> None:
        """Boxes and what `Detector.predictions` found in them, into each head's sums."""
        iou = aligned_iou(judged.boxes, judged.gt_boxes)
        rows = torch.arange(len(iou), device=iou.device)
        for name, moments in sums.items():
            score = regressed = torch.zeros_like(iou)
            if name in found["probs"]:
                score = found["probs"][name][rows, judged.labels]
            if name in found["deltas"]:
                deltas = found["deltas"][name][rows, judged.labels]
                moved = clip_boxes(decode_boxes(judged.boxes, deltas, RCNN_STDS), limit)
                regressed = aligned_iou(moved, judged.gt_boxes)
            tally(moments, judged.labels, judged.sizes, iou, score, regressed)

    def add_windows(self, features, gt_boxes, labels, sizes, limit) -> None:
        """Windows around objects, gt_boxes [G, 4], and the heads' maps of the objects."""
        windows = clip_boxes(sliding_windows(gt_boxes), limit)  # [G, W, 4]
        owner = torch.arange(len(gt_boxes), device=windows.device)
        owner = owner.repeat_interleave(windows.shape[1])
        windows = windows.flatten(0, 1)
        judged = Judged(windows, gt_boxes[owner], labels[owner], sizes[owner])
        judged = judged[(windows[:, 2:] > windows[:, :2]).all(1)]
        for start in range(0, len(judged.boxes), CHUNK):
            part = judged[start : start + CHUNK]
            found = self.model.predictions(features, in_first_image(part.boxes))
            self.add_boxes(self.windows, found, part, limit)
        self.objects += len(labels)
        self.num_windows += len(owner)
        pooled = self.model.pool_for_heads(features, in_first_image(gt_boxes))
        maps = {f"{name} input": m for name, m in pooled.items()}
        maps |= {name: self.model.heads[name].maps(m.float()) for name, m in pooled.items()}
        for name, m in maps.items():
            total = cell_correlation(m.flatten(2).transpose(1, 2)).sum(0).cpu()
            self.cells[name] = self.cells.get(name, 0) + total

    def add_final(self, outputs: dict, target: dict, sizes: Tensor) -> None:
        """Final boxes, judged by the best object of their own class; without one, by their size."""
        scale = torch.tensor(target["size"], device=sizes.device) / outputs["sizes"][0]  # (h, w)
        for name, test in self.tests.items():
            (found,) = self.model.detections(self.model.candidates(outputs, test), 1, test)
            iou = F.pad(box_iou(found["boxes"], target["boxes"]), (0, 1))  # [D, G + 1]
            own = found["labels"][:, None] == F.pad(target["labels"], (0, 1), value=-1)
            best, gt = (iou * own).max(1)
            area = box_area(found["boxes"]) * scale.prod()
            size = torch.where(best > 0, F.pad(sizes, (0, 1))[gt], size_group(area))
            real = ~(F.pad(target["ignore"], (0, 1))[gt] & (best > 0))
            values = (found["labels"], size, best, found["scores"], best)
            tally(self.final[name], *(v[real] for v in values))
        found["boxes"] = found["boxes"] * scale.flip(0).repeat(2)  # the last: of the whole model
        self.results += to_coco(target["image_id"], found, self.categories)


def in_first_image(boxes: Tensor) -> Rois:
    """Boxes [N, 4] of the only image of a batch."""
    return Rois(torch.zeros(len(boxes), dtype=torch.long, device=boxes.device), boxes)


@torch.no_grad()
def sections(study: Study, compare=(), objects: int = 0) -> dict:
    """Section 3 on one model; `compare`: other runs' sections.json, `objects`: 0 for all.

    For each head that has the task: class score and regressed IoU over a proposal's IoU.
    """
    model, settings, data = study.model, study.settings, study.data
    names = [c["name"] for c in data.categories]
    others = {str(Path(file).parent): read_analysis(file, names) for file in compare}
    annotations = annotations_by_image(data)
    chosen = choose_objects(annotations, objects)
    analysis = Analysis(model, settings.test, data.categories)
    images, device, test = network_images(study), study.device, settings.test
    for i in progress(range(len(images)), "analysing", len(images)):
        image, (target,) = to_device(images[i], device)
        image_id = target["image_id"]
        areas = torch.tensor([a["area"] for a in annotations[image_id]], device=device)
        with autocast(settings.run.amp, device):
            outputs = model.outputs(image)
            analysis.add_image(outputs, target, size_group(areas), chosen.get(image_id, []))
    metrics = coco_metrics(data.coco(), analysis.results, test.metric_detections, test.metric_sides)
    per_class = next(iter(others.values()))["per_class"] if others else metrics["per_class"]
    summary = summarise(analysis, names, per_class) | {"metrics": metrics}
    for file, other in others.items():
        odd = [k for k in ("classes", "objects", "windows_made") if other[k] != summary[k]]
        if odd:
            remedy = "use the same first --compare and --objects"
            raise BadInput(f"--compare {file}: made with other {', '.join(odd)}; {remedy}")
    write_json(study.out / "sections.json", summary)
    runs = {"": summary, **others}
    draw_bins(runs, study.out / "sections_bins.png")
    draw_pearson(runs, study.out / "sections_pearson.png")
    for kind in ("weight", "feature"):
        if summary[f"{kind}_correlation"]:
            draw_cells(kind, summary, study.out / f"sections_{kind}s.png")
    for where in ("windows", "proposals", "final"):
        for name, found in summary[where].items():
            if name in model.cls or name == "model":
                print_once(f"{where:9} {name:6} Pearson {found['all objects']['pearson']}")
    print_once(f"results: {study.out}/sections.json, sections_*.png")
    return summary


def read_analysis(file: str, names: list[str]) -> dict:
    """Another run's sections.json; raises BadInput if it is none, or is about other classes."""
    found = read_json(Path(file))
    needed = {"windows", "proposals", "final", "classes", "objects", "windows_made", "per_class"}
    whole = isinstance(found, dict) and needed <= set(found)
    if not whole or set(found["per_class"]) != set(names):
        raise BadInput(f"--compare {file}: not an analysis of these classes")
    return found


def summarise(analysis: Analysis, names: list[str], per_class: dict) -> dict:
    """Sums -> the numbers behind the figures, by head and by group of objects."""
    model, groups = analysis.model, groups_of_classes(per_class)
    members = {k: [names.index(n) for n in v] for k, v in groups.items()}

    def by_group(moments: Tensor) -> dict:
        found = {"all objects": moments.sum((0, 1))}
        found |= {name: moments[:, i].sum(0) for i, name in enumerate(SIZES)}
        found |= {name: moments[rows].sum((0, 1)) for name, rows in members.items()}
        return {name: statistics(m) for name, m in found.items()}

    def with_its_tasks(name: str, found: dict) -> dict:
        """Without the numbers of a task that this head does not have."""
        absent = []
        if name not in model.cls:
            absent += ["score", "pearson"]
        if name not in model.box:
            absent += ["iou"]
        return {
            group: {k: v for k, v in values.items() if k.split("_")[0] not in absent}
            for group, values in found.items()
        }

    absent = [f"{n} cls" for n in model.heads if n not in model.cls]
    absent += [f"{n} reg" for n in model.heads if n not in model.box]
    summary = {
        "objects": analysis.objects,
        "windows_made": analysis.num_windows,
        "per_class": per_class,
        "classes": groups,
        "absent": absent,
    }
    for where in ("windows", "proposals"):
        moments = getattr(analysis, where)
        summary[where] = {k: with_its_tasks(k, by_group(m)) for k, m in moments.items()}
    summary["final"] = {
        k: {g: dict(count=sum(v["count"]), pearson=v["pearson"]) for g, v in by_group(m).items()}
        for k, m in analysis.final.items()
    }
    total = max(1, analysis.objects)
    summary["feature_correlation"] = {k: rounded(m / total) for k, m in analysis.cells.items()}
    summary["weight_correlation"] = {}
    for name, head in model.heads.items():
        if isinstance(head, FCHead):
            cells = head.cell_weights().flatten(0, 1).flatten(1).cpu()  # [S*S, C * channels]
            cells = cells - cells.mean(1, keepdim=True)  # centred: the cosine is Pearson's
            summary["weight_correlation"][name] = rounded(cell_correlation(cells))
    return summary


def rounded(matrix: Tensor) -> list[list[float]]:
    return [[round(v, 4) for v in row] for row in matrix.tolist()]


# ------------------------------------------------------------------------------ drawn

GROUPS = ("all objects", *SIZES, *CLASSES)


def draw_bins(runs: dict[str, dict], path: Path) -> None:
    """Figures 2 and 7: score and regressed IoU over a proposal's IoU. `runs`: summaries by name."""
    figure, axes = new_figure(22, 6, 2, 7, sharex=True, sharey="row")
    centres = (np.arange(BINS) + 0.5) / BINS
    for row, what, title in zip(axes, ("score", "iou"), ("class score", "regressed box's IoU")):
        for axis, group in zip(row, GROUPS):
            for run, summary in runs.items():
                for head, by_group in summary["windows"].items():
                    found = by_group[group]
                    if f"{what}_mean" not in found:
                        continue
                    # None, an empty bin, becomes nan
                    mean = np.array(found[f"{what}_mean"], dtype=float)
                    std = np.array(found[f"{what}_std"], dtype=float)
                    (line,) = axis.plot(centres, mean, ".-", label=f"{run} {head}".strip())
                    colour = line.get_color()
                    axis.fill_between(centres, mean - std, mean + std, color=colour, alpha=0.1)
            axis.set(title=group, xlabel="proposal's IoU")
        row[0].set_ylabel(title)
        row[0].legend()
    figure.savefig(path, dpi=80)


def draw_pearson(runs: dict[str, dict], path: Path) -> None:
    """Figure 3: the correlation of class score and IoU, by group of objects."""
    figure, axes = new_figure(18, 4, 1, 3, sharey=True)
    for axis, where in zip(axes[0], ("windows", "proposals", "final")):
        bars = {
            f"{run} {head}".strip(): found
            for run, summary in runs.items()
            for head, found in summary[where].items()
            if "pearson" in found["all objects"]
        }
        for i, (label, found) in enumerate(bars.items()):
            at = [g + 0.8 * (i + 0.5) / len(bars) - 0.4 for g in range(len(GROUPS))]
            values = [found[group]["pearson"] for group in GROUPS]
            values = [math.nan if v is None else v for v in values]
            axis.bar(at, values, 0.8 / len(bars), label=label)
        axis.set_xticks(range(len(GROUPS)), GROUPS, rotation=30, ha="right")
        axis.set(title=f"{where}: Pearson of class score and IoU")
        axis.legend()
    figure.savefig(path, dpi=80)


def draw_cells(kind: str, summary: dict, path: Path) -> None:
    """Figures 4 (kind "weight") and 8 ("feature"): each cell's correlation with all cells."""
    maps = summary[f"{kind}_correlation"]
    figure, axes = new_figure(5 * len(maps), 4.5, 1, len(maps))
    for axis, (title, matrix) in zip(axes[0], maps.items()):
        size = round(len(matrix) ** 0.5)
        tiles = np.array(matrix).reshape(size, size, size, size).swapaxes(1, 2)
        shown = axis.imshow(tiles.reshape(size**2, size**2), vmin=0, vmax=1, cmap="jet")
        axis.set(title=f"{title}: {kind} correlation of cells")
        axis.set_xticks([i * size - 0.5 for i in range(1, size)], [])
        axis.set_yticks([i * size - 0.5 for i in range(1, size)], [])
        axis.grid(color="white")
        figure.colorbar(shown, ax=axis)
    figure.savefig(path, dpi=80)


@dataclass
class SectionsOptions(Options):
    method: Annotated[Literal["double_head"], tyro.conf.Positional] = "double_head"  # the only one
    compare: tuple[str, ...] = ()  # other runs' sections.json, drawn beside this one
    # slide windows around this many objects, evenly spread (seconds each on a CPU); 0: all
    objects: int = 200


def main(argv=None) -> dict:
    with reported():
        options, flags = read_options("sections", SectionsOptions, __doc__, argv)
        if options.objects < 0:
            raise BadInput(f"--objects {options.objects}: at least 0 (all)")
        study = open_study(options, flags)
        if rank_and_world()[0]:
            return {}  # the first process does all
        return sections(study, options.compare, options.objects)


if __name__ == "__main__":
    main()
