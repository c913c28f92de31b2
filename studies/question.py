"""docs/question.png: ten boxes on one object. Which of them does each method keep, or make better?

    for method in iou_aware_retinanet double_head cpm_rcnn d2det; do python $method.py --train; done
    python -m studies.question --image 1886 --object 2      # of the validation images

All of it comes from these small networks (runs/METHOD/last.pt; the last three may be missing). The
ten boxes are candidates of IoU-aware RetinaNet: those with the best class scores among boxes with
the object's label, none within IoU 0.85 of a better one. Plain NMS, the fused score and CL-NMS
choose among the ten. A two-stage network gets the ten as its only proposals, and does with them
what it does in testing. The case was picked from 2,000 images because every choice helps in it.
Such cases are rare; what the methods gain on average is in docs/results.md. The picture in docs/
was made without the second and the third network.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from torch import Tensor

import kernels
from baselines.faster_rcnn import Rois
from common import BadInput, aligned_iou
from dc_loss_clnms import cl_nms_of_one_class
from iou_aware_retinanet import detection_confidence
from studies.checkpoint import Options, Study, network_images, open_study, reported
from studies.seen import TRUTH, outline

TWO_STAGES = {
    "double_head": ("Double-Head", "one head scores it,\nanother moves it"),
    "cpm_rcnn": ("CPM R-CNN", "draws it anew from\npoints, then scores it"),
    "d2det": ("D2Det", "moves it to the mean\nof 49 cells' boxes"),
}
COLOURS = ("#b5179e", "#f77f00", "#ffd166", "#06a77d")  # of IoUs from 0.5 to 1


class Kept(NamedTuple):
    """What a method keeps."""

    method: str
    how: str
    number: int  # of the candidate, from 0
    box: Tensor  # [4], the candidate's or where it was moved to


def ten_candidates(study: Study, image: Tensor, label: int, gt: Tensor) -> dict[str, Tensor]:
    """boxes [10, 4] with their cls_probs and iou_probs [10], the best class score first."""
    by_class = dataclasses.replace(study.settings.test, alpha=1.0)
    found = study.model.candidates(study.model.outputs([image]), by_class)
    on_it = (found["labels"] == label) & (aligned_iou(found["boxes"], gt) > 0.3)
    found = {name: values[on_it] for name, values in found.items()}
    keep = kernels.nms(found["boxes"], found["scores"], 0.85)[:10]
    return {name: values[keep] for name, values in found.items()}


def after_two_stages(study: Study, image: Tensor, label: int, boxes: Tensor) -> tuple[int, Tensor]:
    """The best detection with this label from these proposals: the proposal's number, its box."""
    model, rois = study.model, Rois(torch.zeros(len(boxes), dtype=torch.long), boxes)
    outputs = {**model.outputs([image]), "rois": rois}
    features = outputs["features"]
    if hasattr(model, "predictions"):  # Double-Head
        outputs |= model.predictions(features, rois)
    else:
        pool = getattr(model, "class_features", partial(model.pool, size=7))  # DRP, or RoIAlign
        outputs["probs"] = model.classify(pool(features, rois)).float().softmax(1)[:, :-1]
    found = model.candidates(outputs, study.settings.test)
    (best,) = model.detections({**found, "index": found["roi"]}, 1, study.settings.test)
    own = best["labels"] == label
    if not own.any():
        raise BadInput(f"{study.weights} finds no object of this class there")
    return int(best["index"][own][0]), best["boxes"][own][0]


@torch.no_grad()
def look(studies: dict[str, Study], image_number: int, object_number: int):
    """The image, the object's box, the ten candidates, and what each method keeps."""
    study = studies["iou_aware_retinanet"]
    ((image, target),) = network_images(study)[image_number]
    if object_number >= len(target["boxes"]):
        raise BadInput(f"--object {object_number}: there are {len(target['boxes'])}")
    gt, label = target["boxes"][object_number], int(target["labels"][object_number])
    found = ten_candidates(study, image, label, gt)
    boxes, p = found["boxes"], found["cls_probs"]
    fused = detection_confidence(p, found["iou_probs"], study.settings.test.alpha)
    chosen = {
        ("plain NMS", "keeps the best\nclass score"): 0,
        ("IoU-aware", "the best class score\nand predicted IoU"): int(fused.argmax()),
        ("CL-NMS", "class score and near-\nness to the centre"): int(
            cl_nms_of_one_class(boxes, p)[0]
        ),
    }
    kept = [Kept(*names, number, boxes[number]) for names, number in chosen.items()]
    for method, names in TWO_STAGES.items():
        if method in studies:
            moved = after_two_stages(studies[method], image, label, boxes)
            kept.append(Kept(*names, *moved))
    return image, gt, found, kept


def draw(path: Path, image: Tensor, gt: Tensor, found: dict, kept: list[Kept]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure

    scale = ScalarMappable(Normalize(0.5, 1), LinearSegmentedColormap.from_list("", COLOURS))
    boxes, p = found["boxes"], found["cls_probs"].tolist()
    ious = aligned_iou(boxes, gt).tolist()
    colours = scale.to_rgba(ious)
    low, high = boxes[:, :2].amin(0), boxes[:, 2:].amax(0)
    (x, y), half = ((low + high) / 2).tolist(), 0.58 * float((high - low).max())
    pale = (0.75 * image.permute(1, 2, 0) / 255 + 0.25).numpy()

    def photo(axis) -> None:
        axis.imshow(pale, extent=(0, pale.shape[1], pale.shape[0], 0), interpolation="bicubic")
        axis.set(xticks=[], yticks=[], xlim=(x - half, x + half), ylim=(y + half, y - half))
        axis.set_facecolor("0.85")  # beyond the image
        outline(axis, gt, TRUTH, "--", 1.5)

    half_of_them = (len(kept) + 1) // 2
    upper, lower = [*range(half_of_them)], [*range(half_of_them, 2 * half_of_them)]
    figure = Figure(figsize=(8, 6), layout="constrained")  # at 800 px a point is 1.4 px
    figure.suptitle("Ten boxes on one object: which should stay?", fontsize=17, weight="bold")
    ratios = (2, *(1 for _ in upper))
    axes = figure.subplot_mosaic([["all", *upper], ["list", *lower]], width_ratios=ratios)
    bars, middle = axes["list"], dict(va="center", fontsize=8)
    bars.set(xlim=(-0.15, 1.35), ylim=(len(boxes) - 0.4, -1.6))
    bars.axis("off")
    bars.text(0, -1.1, "class score", fontsize=8.5, color="0.3")
    bars.text(1.35, -1.1, "fit (IoU)", fontsize=8.5, color="0.3", ha="right")
    photo(axes["all"])
    axes["all"].set_xlabel("white: the object     colour: how well a box fits it", fontsize=8.5)
    for i in reversed(range(len(boxes))):
        outline(axes["all"], boxes[i], colours[i], width=1.8)
        x1, y1, x2, y2 = boxes[i].tolist()  # each number at another place of its box's outline
        side, share = divmod((1.48 * i + 0.24) % 4, 1)
        u, v = [(share, 0), (1, share), (1 - share, 1), (0, 1 - share)][int(side)]
        badge = dict(boxstyle="circle,pad=0.2", fc=colours[i], lw=0.6)
        at = x1 + u * (x2 - x1), y1 + v * (y2 - y1)
        axes["all"].text(*at, i + 1, fontsize=7, ha="center", va="center", bbox=badge)
        bars.barh(i, p[i], 0.78, color=colours[i], ec="black", lw=0.5)
        bars.text(-0.05, i, i + 1, ha="right", weight="bold", **middle)
        bars.text(0.03, i, f"{p[i]:.2f}", **middle)
        bars.text(1.35, i, f"{ious[i]:.2f}", ha="right", weight="bold", **middle)
    for i, (method, how, number, box) in enumerate(kept):
        photo(axes[i])
        iou = float(aligned_iou(box, gt))
        outline(axes[i], boxes[number], "0.3", ":", 1.0)
        outline(axes[i], box, scale.to_rgba(iou), width=2.4)
        axes[i].set_title(
            f"{method}: box {number + 1}", loc="left", fontsize=11, weight="bold", pad=28
        )
        axes[i].text(0, 1.04, how, fontsize=8, color="0.3", transform=axes[i].transAxes)
        badge = dict(fc=scale.to_rgba(iou), ec="none", pad=2.5)
        axes[i].set_xlabel(f"IoU {iou:.2f}", fontsize=10.5, weight="bold", bbox=badge)
    figure.savefig(path, dpi=200)


def main(image: int = 1886, object: int = 2, runs: str = "runs", out: str = "docs") -> list[Kept]:
    with reported():
        flags = ["--device", "cpu", "--num-val", f"{image + 1}"]
        studies = {
            method: open_study(Options(method, f"{runs}/{method}/last.pt"), flags)
            for method in ("iou_aware_retinanet", *TWO_STAGES)
            if method not in TWO_STAGES or Path(runs, method).exists()
        }
        *seen, kept = look(studies, image, object)
        draw(Path(out) / "question.png", *seen, kept)
        return kept


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
