"""Double-Head R-CNN's Section 3 on a checkpoint: which head's score and box follow the IoU?

    python -m studies.sections double_head --weights CKPT
    python -m studies.sections double_head --weights B/last.pt --compare A/studies/sections.json

Windows are slid around each object (3.1) and judged by every head, and so are the detector's own
proposals and final boxes; cells of the heads' maps and weights are correlated (3.4, Appendix A).
The paper looks at two models with one head each, an Ext model has both in one: --compare draws
other runs beside this one. Writes OUT/sections.json and, as sections_*.png, Figures 2 and 7 (bins),
3 (pearson), 4 (weights) and 8 (features).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torchvision.ops import box_iou

from baselines.faster_rcnn import RCNN_STDS
from common import BadInput, Resized, aligned_iou, clip_boxes, decode_boxes
from double_head import Config, Detector, FCHead
from engine.checkpoints import write_json
from engine.data import make_loader, to_device
from engine.metrics import coco_metrics, to_coco
from engine.pictures import new_figure
from engine.processes import autocast, gather, progress, rank_and_world, say
from studies.checkpoint import Options, open_study, read_options, reported
from studies.windows import (
    BINS,
    CLASSES,
    SIZES,
    cell_correlation,
    groups_of_classes,
    read_objects,
    size_group,
    sliding_windows,
    statistics,
    tally,
)

CHUNK = 1024  # windows that go through the heads at once: bounds memory


def decode(boxes: Tensor, deltas: Tensor, sizes: Tensor) -> Tensor:
    """Boxes [N, 4] moved by deltas [N, 4] as RCNN_STDS scales them, cut to the image."""
    return clip_boxes(decode_boxes(boxes, deltas, RCNN_STDS), sizes)


class Analysis:
    """The sums that Section 3 needs, over the images of this process; `gathered` adds processes."""

    def __init__(self, model: Detector, config: Config, categories: list[dict]):
        self.model, self.categories = model, categories
        self.finals = {name: replace(config, alone=name) for name in model.cls}
        # the model as a whole, where it is more than one head alone
        self.finals |= {"model": config} if len(model.cls) + len(model.box) > 2 else {}
        shape = (model.num_classes, 3, BINS, 8)
        zeros = lambda names: {k: torch.zeros(shape, dtype=torch.double) for k in names}  # noqa: E731
        self.windows, self.proposals = zeros(model.heads), zeros(model.heads)
        self.final, self.cells = zeros(self.finals), {}
        self.results, self.objects, self.num_windows = [], 0, 0

    def add_boxes(self, where: dict, found: dict, boxes, gt_boxes, labels, sizes, limit) -> None:
        """Boxes [N, 4] that the heads have judged, each with its own gt [N, 4], label and size."""
        iou = aligned_iou(boxes, gt_boxes)
        rows = torch.arange(len(boxes), device=boxes.device)
        for name, moments in where.items():
            score = regressed = torch.zeros_like(iou)
            if name in found["probs"]:
                score = found["probs"][name][rows, labels]
            if name in found["deltas"]:
                moved = decode(boxes, found["deltas"][name][rows, labels], limit)
                regressed = aligned_iou(moved, gt_boxes)
            tally(moments, *(v.cpu() for v in (labels, sizes, iou, score, regressed)))

    def add_image(self, outputs: dict, target: dict, sizes: Tensor, chosen: list[int]) -> None:
        """One image: windows around chosen objects, proposals, final boxes, feature maps."""
        gt, labels, limit = target["boxes"], target["labels"], outputs["sizes"]
        best, index = F.pad(box_iou(outputs["rois"][:, 1:], gt), (0, 1)).max(1)
        real = (best > 0) & ~F.pad(target["ignore"], (0, 1))[index]
        # choice: a proposal is judged by the object it overlaps most; one that overlaps none has
        # no class whose score to look at
        found = {k: {n: v[real] for n, v in outputs[k].items()} for k in ("probs", "deltas")}
        own = (gt[index[real]], labels[index[real]], sizes[index[real]])
        self.add_boxes(self.proposals, found, outputs["rois"][real, 1:], *own, limit)
        self.add_final(outputs, target, sizes)
        if chosen:
            self.add_windows(outputs["features"], gt[chosen], labels[chosen], sizes[chosen], limit)

    def add_windows(self, features, gt_boxes, labels, sizes, limit) -> None:
        windows = clip_boxes(sliding_windows(gt_boxes), limit).flatten(0, 1)
        owner = torch.arange(len(gt_boxes), device=windows.device)
        owner = owner.repeat_interleave(len(windows) // len(gt_boxes))
        keep = (windows[:, 2:] > windows[:, :2]).all(1)
        for boxes, i in zip(windows[keep].split(CHUNK), owner[keep].split(CHUNK)):
            found = self.model.predictions(features, F.pad(boxes, (1, 0)))
            self.add_boxes(self.windows, found, boxes, gt_boxes[i], labels[i], sizes[i], limit)
        self.objects, self.num_windows = self.objects + len(labels), self.num_windows + len(owner)
        pooled = self.model.pool_for_heads(features, F.pad(gt_boxes, (1, 0)))
        maps = {f"{name} input": m for name, m in pooled.items()}
        maps |= {name: self.model.heads[name].maps(m.float()) for name, m in pooled.items()}
        for name, m in maps.items():
            total = cell_correlation(m.flatten(2).transpose(1, 2)).sum(0).cpu()
            self.cells[name] = self.cells.get(name, 0) + total

    def add_final(self, outputs: dict, target: dict, sizes: Tensor) -> None:
        """Final boxes against the best object of their own class; with none, their own size."""
        scale = torch.tensor(target["size"], device=sizes.device) / outputs["sizes"][0]  # (h, w)
        for name, config in self.finals.items():
            (found,) = self.model.finish(self.model.select(outputs, config), 1)
            iou = F.pad(box_iou(found["boxes"], target["boxes"]), (0, 1))  # [D, G + 1]
            same = found["labels"][:, None] == F.pad(target["labels"], (0, 1), value=-1)
            best, index = (iou * same).max(1)
            area = (found["boxes"][:, 2:] - found["boxes"][:, :2]).prod(1) * scale.prod()
            size = torch.where(best > 0, F.pad(sizes, (0, 1))[index], size_group(area))
            real = ~(F.pad(target["ignore"], (0, 1))[index] & (best > 0))
            values = (found["labels"], size, best, found["scores"], best)
            tally(self.final[name], *(v[real].cpu() for v in values))
        found["boxes"] = found["boxes"] * scale.flip(0).repeat(2)  # the last: of the whole model
        self.results += to_coco(target["image_id"], found, self.categories)

    def gathered(self) -> Analysis:
        """This object with the sums of all processes."""
        for key in ("windows", "proposals", "final", "cells"):
            shares = gather(getattr(self, key))
            names = dict.fromkeys(k for s in shares for k in s)
            setattr(self, key, {k: sum(s[k] for s in shares if k in s) for k in names})
        counts = gather((self.objects, self.num_windows))
        self.objects, self.num_windows = (sum(c) for c in zip(*counts))
        self.results = [r for share in gather(self.results) for r in share]
        return self


@torch.no_grad()
def sections(
    model: Detector, data, config: Config, device, out: Path, compare=(), objects: int = 0
) -> dict:
    """Section 3 on one model; `compare`: other runs' sections.json, `objects`: 0 for all.

    For each head that has the task: class score and regressed IoU over a proposal's IoU.
    """
    names = [c["name"] for c in data.categories]
    others = {str(Path(file).parent): read_analysis(file, names) for file in compare}
    areas, chosen = read_objects(data, objects)
    analysis = Analysis(model.eval(), config, data.categories)
    rank, world = rank_and_world()
    mine = range(rank, len(data), world)
    shown = Resized(data, config, False)
    loader = make_loader(shown, config, device, sampler=mine, batch_size=1)
    for items in progress(loader, "analysing", len(loader)):
        images, (target,) = to_device(items, device)
        sizes = size_group(torch.tensor(areas.get(target["image_id"], []), device=device))
        with autocast(config.amp, device):
            outputs = model.outputs(images)
            analysis.add_image(outputs, target, sizes, chosen.get(target["image_id"], []))
    metrics = coco_metrics(data.coco(), analysis.gathered().results)
    per_class = next(iter(others.values()))["per_class"] if others else metrics["per_class"]
    summary = summarise(analysis, names, per_class) | {"metrics": metrics}
    for file, other in others.items():
        odd = [k for k in ("classes", "objects", "windows_made") if other[k] != summary[k]]
        if odd:
            reason = "the same first --compare and --objects"
            raise BadInput(f"--compare {file}: made with other {', '.join(odd)}; use {reason}")
    if rank == 0:
        write_json(out / "sections.json", summary)
        draw_sections({"": summary, **others}, out)
    for where in ("windows", "proposals", "final"):
        for name, found in summary[where].items():
            if name in model.cls or name == "model":
                say(f"{where:9} {name:6} Pearson {found['all objects']['pearson']}")
    say(f"results: {out}/sections.json, sections_*.png")
    return summary


def read_analysis(file: str, names: list[str]) -> dict:
    """Another run's sections.json; BadInput if it is none, or of other classes."""
    try:
        found = json.loads(Path(file).read_text())
        needed = {"windows", "proposals", "final", "classes", "objects", "windows_made"}
        same = set(found["per_class"]) == set(names) and needed <= set(found)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise BadInput(f"--compare {file}: {type(e).__name__}: {e}") from e
    if not same:
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

    def without_absent(name: str, found: dict) -> dict:
        """Numbers of a task that this head does not have are not numbers."""
        absent = ["score", "pearson"] * (name not in model.cls) + ["iou"] * (name not in model.box)
        return {
            group: {k: v for k, v in values.items() if k.split("_")[0] not in absent}
            for group, values in found.items()
        }

    summary: dict = {"objects": analysis.objects, "windows_made": analysis.num_windows}
    summary |= {"per_class": per_class, "classes": groups}
    summary["absent"] = [f"{n} cls" for n in model.heads if n not in model.cls]
    summary["absent"] += [f"{n} reg" for n in model.heads if n not in model.box]
    for where in ("windows", "proposals"):
        moments = getattr(analysis, where)
        summary[where] = {k: without_absent(k, by_group(m)) for k, m in moments.items()}
    pearsons = {k: by_group(m) for k, m in analysis.final.items()}
    summary["final"] = {
        k: {g: {"count": sum(v["count"]), "pearson": v["pearson"]} for g, v in found.items()}
        for k, found in pearsons.items()
    }
    total = max(1, analysis.objects)
    listed = lambda m: [[round(v, 4) for v in row] for row in m.tolist()]  # noqa: E731
    summary["feature_correlation"] = {k: listed(m / total) for k, m in analysis.cells.items()}
    summary["weight_correlation"] = {}
    for name, head in model.heads.items():
        if isinstance(head, FCHead):
            cells = head.cell_weights().flatten(0, 1).flatten(1).cpu()  # [S*S, C * channels]
            cells = cells - cells.mean(1, keepdim=True)  # centred: the cosine is Pearson's
            summary["weight_correlation"][name] = listed(cell_correlation(cells))
    return summary


def draw_sections(runs: dict[str, dict], out: Path) -> None:
    """Figures 2 and 7 (sections_bins), 3 (.._pearson), 4 (.._weights) and 8 (.._features).

    `runs`: summaries by name; the first one is this run, named "".
    """
    groups = ("all objects", *SIZES, *CLASSES)
    heads = [(f"{run} {h}".strip(), s, h) for run, s in runs.items() for h in s["windows"]]
    figure, axes = new_figure(22, 6, 2, 7, sharex=True, sharey="row")
    centres = (np.arange(BINS) + 0.5) / BINS
    for row, what, title in zip(axes, ("score", "iou"), ("class score", "regressed box's IoU")):
        for axis, group in zip(row, groups):
            for label, summary, head in heads:
                found = summary["windows"][head][group]
                if f"{what}_mean" not in found:
                    continue
                mean, std = (
                    np.array(found[f"{what}_{k}"], dtype=float) for k in ("mean", "std")
                )  # None, an empty bin, becomes nan
                (line,) = axis.plot(centres, mean, ".-", label=label)
                axis.fill_between(
                    centres, mean - std, mean + std, color=line.get_color(), alpha=0.1
                )
            axis.set(title=group, xlabel="proposal's IoU")
        row[0].set_ylabel(title)
        row[0].legend()
    figure.savefig(out / "sections_bins.png", dpi=80)

    figure, axes = new_figure(18, 4, 1, 3, sharey=True)
    for axis, where in zip(axes[0], ("windows", "proposals", "final")):
        bars = [(f"{r} {h}".strip(), f) for r, s in runs.items() for h, f in s[where].items()]
        bars = [(k, f) for k, f in bars if "pearson" in f["all objects"]]
        for i, (label, found) in enumerate(bars):
            at = [g + 0.8 * (i + 0.5) / len(bars) - 0.4 for g in range(len(groups))]
            values = [math.nan if (v := found[g]["pearson"]) is None else v for g in groups]
            axis.bar(at, values, 0.8 / len(bars), label=label)
        axis.set_xticks(range(len(groups)), groups, rotation=30, ha="right")
        axis.set(title=f"{where}: Pearson of class score and IoU")
        axis.legend()
    figure.savefig(out / "sections_pearson.png", dpi=80)

    first = next(iter(runs.values()))
    for name in ("weight", "feature"):
        maps = first[f"{name}_correlation"]
        if maps:
            figure, axes = new_figure(5 * len(maps), 4.5, 1, len(maps))
            for axis, (title, m) in zip(axes[0], maps.items()):
                size = round(len(m) ** 0.5)
                tiles = np.array(m).reshape(size, size, size, size).swapaxes(1, 2)
                shown = axis.imshow(tiles.reshape(size**2, size**2), vmin=0, vmax=1, cmap="jet")
                axis.set(title=f"{title}: {name} correlation of cells")
                axis.set_xticks([i * size - 0.5 for i in range(1, size)], [])
                axis.set_yticks([i * size - 0.5 for i in range(1, size)], [])
                axis.grid(color="white")
                figure.colorbar(shown, ax=axis)
            figure.savefig(out / f"sections_{name}s.png", dpi=80)


@dataclass
class SectionsOptions(Options):
    method: Annotated[Literal["double_head"], tyro.conf.Positional] = "double_head"  # the only one
    compare: tuple[str, ...] = ()  # other runs' sections.json, drawn beside this one
    objects: int = 200  # slide windows around so many, evenly spread (a CPU: seconds each); 0: all


def main(argv=None) -> dict:
    with reported():
        options, flags = read_options("sections", SectionsOptions, __doc__, argv)
        if options.objects < 0:
            raise BadInput(f"--objects {options.objects}: 0 (all) is the least")
        study = open_study(options, flags)
        more = options.compare, options.objects
        return sections(study.model, study.data, study.config, study.device, study.out, *more)


if __name__ == "__main__":
    main()
