"""Which of ten boxes on one object does each method keep, or make better? docs/question.png.

    for m in iou_aware_retinanet double_head cpm_rcnn d2det; do python $m.py --train; done
    python -m studies.question --image 1886 --object 2      # of the validation images

The networks are runs/METHOD/last.pt; the last three may be missing. The ten boxes are
candidates of IoU-aware RetinaNet with the object's label: the best class scores, none
within IoU 0.85 of a better one. Plain NMS, the fused score and CL-NMS choose among the
ten. A two-stage network gets them as its only proposals and tests them as usual. The case
was picked from 2,000 images because every choice helps in it, which is rare: for averages
see docs/results.md.
"""

from __future__ import annotations

import dataclasses
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
from studies.seen import TRUTH, outline, show_image

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


def after_two_stages(study: Study, image: Tensor, label: int, boxes: Tensor) -> tuple:
    """The best detection with this label of these proposals: which of them, its new box."""
    model, rois = study.model, Rois(torch.zeros(len(boxes), dtype=torch.long), boxes)
    outputs = {**model.outputs([image]), "rois": rois}
    features = outputs["features"]
    if hasattr(model, "predictions"):  # Double-Head
        outputs |= model.predictions(features, rois)
    else:
        if hasattr(model, "class_features"):  # D2Det's DRP
            pooled = model.class_features(features, rois)
        else:
            pooled = model.pool(features, rois, 7)
        outputs["probs"] = model.classify(pooled).float().softmax(1)[:, :-1]
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
    alpha = study.settings.test.alpha
    fused = int(detection_confidence(p, found["iou_probs"], alpha).argmax())
    central = int(cl_nms_of_one_class(boxes, p)[0])
    kept = [
        Kept("plain NMS", "keeps the best\nclass score", 0, boxes[0]),
        Kept("IoU-aware", "the best class score\nand predicted IoU", fused, boxes[fused]),
        Kept("CL-NMS", "class score and near-\nness to the centre", central, boxes[central]),
    ]
    for method, names in TWO_STAGES.items():
        if method in studies:
            kept.append(Kept(*names, *after_two_stages(studies[method], image, label, boxes)))
    return image, gt, found, kept


def draw(path: Path, image: Tensor, gt: Tensor, found: dict, kept: list[Kept]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure

    colour_of = ScalarMappable(
        Normalize(0.5, 1), LinearSegmentedColormap.from_list("", COLOURS)
    ).to_rgba
    boxes, ious = found["boxes"], aligned_iou(found["boxes"], gt).tolist()
    pale = (0.75 * image.permute(1, 2, 0) / 255 + 0.25).numpy()
    upper = [*range((len(kept) + 1) // 2)]
    lower = [len(upper) + i for i in upper]
    figure = Figure(figsize=(8, 6), layout="constrained")  # at 800 px a point is 1.4 px
    figure.suptitle("Ten boxes on one object: which should stay?", fontsize=17, weight="bold")
    ratios = (2, *(1 for _ in upper))
    axes = figure.subplot_mosaic([["all", *upper], ["list", *lower]], width_ratios=ratios)
    bars = axes.pop("list")
    for axis in axes.values():
        show_image(axis, pale, boxes, margin=0.08, interpolation="bicubic")
        outline(axis, gt, TRUTH, "--", 1.5)
    caption = "white: the object     colour: how well a box fits it"
    axes["all"].set_xlabel(caption, fontsize=8.5)
    for i in reversed(range(len(boxes))):
        colour = colour_of(ious[i])
        outline(axes["all"], boxes[i], colour, width=1.8)
        x1, y1, x2, y2 = boxes[i].tolist()  # each number at another place of its box's outline
        side, share = divmod((1.48 * i + 0.24) % 4, 1)
        u, v = [(share, 0), (1, share), (1 - share, 1), (0, 1 - share)][int(side)]
        badge = dict(boxstyle="circle,pad=0.2", fc=colour, lw=0.6)
        at = x1 + u * (x2 - x1), y1 + v * (y2 - y1)
        axes["all"].text(*at, i + 1, fontsize=7, ha="center", va="center", bbox=badge)
    places, scores = range(len(boxes)), found["cls_probs"].tolist()
    drawn = bars.barh(places, scores, 0.78, color=colour_of(ious), ec="black", lw=0.5)
    bars.bar_label(drawn, fmt="%.2f", padding=3, fontsize=8)
    bars.set(xlim=(0, 1.2), xticks=[])
    bars.set_yticks(places, [str(i + 1) for i in places], weight="bold", fontsize=8)
    fits = [f"{iou:.2f}" for iou in ious]
    bars.secondary_yaxis("right").set_yticks(places, fits, weight="bold", fontsize=8)
    bars.set_title("class score", loc="left", fontsize=8.5)
    bars.set_title("fit (IoU)", loc="right", fontsize=8.5)
    bars.invert_yaxis()
    for i, (method, how, number, box) in enumerate(kept):
        iou = float(aligned_iou(box, gt))
        outline(axes[i], boxes[number], "0.3", ":", 1.0)
        outline(axes[i], box, colour_of(iou), width=2.4)
        title = dict(loc="left", fontsize=22 / len(upper), weight="bold", pad=28)
        axes[i].set_title(f"{method}: box {number + 1}", **title)
        axes[i].text(0, 1.04, how, fontsize=8, color="0.3", transform=axes[i].transAxes)
        badge = dict(fc=colour_of(iou), ec="none", pad=2.5)
        axes[i].set_xlabel(f"IoU {iou:.2f}", fontsize=10.5, weight="bold", bbox=badge)
    figure.savefig(path, dpi=200)


def main(image: int = 1886, object: int = 2, runs: str = "runs", out: str = "docs"):
    with reported():
        flags = ["--device", "cpu", "--num-val", f"{image + 1}"]
        methods = [method for method in TWO_STAGES if Path(runs, method).exists()]
        studies = {
            method: open_study(Options(method, f"{runs}/{method}/last.pt"), flags)
            for method in ("iou_aware_retinanet", *methods)
        }
        *seen, kept = look(studies, image, object)
        draw(Path(out) / "question.png", *seen, kept)
        return kept


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
