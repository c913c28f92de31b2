"""The same final box under two scores: CPM R-CNN's Figures 5 and 6, on boxes that it finds itself.

    python -m studies.scores cpm_rcnn --weights CKPT
    python -m studies.scores cpm_rcnn --weights CKPT --data DIR --examples 8

`ism` (Figure 5) compares the class score with its product with ISM's IoU. `rsm` (Figure 6) compares
that product with the fused score (Eq. 4), for boxes that the image's border cuts: there, the paper
says, ISM expects the whole object and RSM corrects it.

Shown are the boxes whose score rises most and those whose score falls most, relative to the other
boxes of their image: a factor that all boxes share changes no order. Yellow is the box, white the
object of its class with the highest IoU. The true IoU is printed above, but chooses no box.
OUT/scores.png draws these boxes, and OUT/scores.json lists them. It also says how the scores of all
boxes follow the IoU (Pearson's correlation), and how far from it they are (mean distance).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor
from torch.utils.data import Dataset

from common import BadInput
from cpm_rcnn import fused_score
from engine.checkpoints import write_json
from engine.metrics import detect
from engine.pictures import frame, new_figure
from engine.processes import print_once, rank_and_world
from studies.boxes import BeforeNMS, Objects, objects_by_image, suppressed, with_iou
from studies.calibration import correlation
from studies.checkpoint import Options as CheckpointOptions
from studies.checkpoint import Study, open_study, read_options, reported


@dataclass
class Options(CheckpointOptions):
    method: Annotated[Literal["cpm_rcnn"], tyro.conf.Positional] = "cpm_rcnn"
    examples: int = 6  # boxes of each figure


# ------------------------------------------------------------------------------ measured


def cut_by_border(boxes: Tensor, height: int, width: int) -> Tensor:
    """Mask [N] of boxes [N, 4] that come within 1 % of the image's sides to its border.

    >>> cut_by_border(torch.tensor([[0.5, 20, 60, 70], [5, 5, 90, 90]]), 100, 100)
    tensor([ True, False])
    """  # choice: a point is the centre of a cell, so a box of a cut object may end inside
    x1, y1, x2, y2 = boxes.unbind(1)
    near_x = (x1 < 0.01 * width) | (x2 > 0.99 * width)
    return near_x | (y1 < 0.01 * height) | (y2 > 0.99 * height)


@dataclass
class Pair:
    """One figure's boxes in an image, and their scores without and with what the figure shows."""

    shown: Tensor  # [N] bool
    without: Tensor  # [N]
    score: Tensor  # [N]


def pairs_of_scores(settings, found: dict[str, Tensor], test, size) -> dict[str, Pair]:
    """The pair of each figure that a model with these settings has; size (h, w) of the image."""
    cls = found["cls"] if test.ism_use == "multiply" else torch.ones_like(found["cls"])
    product = cls * found["ism"]
    pairs = {}
    if settings.ism:
        pairs["ism"] = Pair(torch.ones_like(cls).bool(), found["cls"], product)
    if settings.rsm:
        fused = fused_score(cls, found["ism"], found["rsm"], test.gamma)
        pairs["rsm"] = Pair(cut_by_border(found["boxes"], *size), product, fused)
    return pairs


def boxes_under_two_scores(study: Study) -> tuple[dict[str, Tensor], dict[str, list[dict]]]:
    """By figure: IoU and both scores of all boxes [N, 3]; and examples.

    Examples are, of each image, the box whose score rises most and the one whose falls most.
    """
    model, settings, data = study.model, study.settings, study.data
    names, objects = [c["name"] for c in data.categories], objects_by_image(data)
    values: dict[str, list[Tensor]] = {}
    examples: dict[str, list[dict]] = {}
    for target, found in detect(BeforeNMS(model), data, settings, shared=False):
        keep = suppressed(model, found, settings.test)["index"]
        own = objects[target["image_id"]]
        found = with_iou({k: v[keep] for k, v in found.items()}, own)
        pairs = pairs_of_scores(model.settings, found, settings.test, target["size"])
        for figure, pair in pairs.items():
            numbers = torch.stack([found["iou"], pair.without, pair.score], 1)
            values.setdefault(figure, []).append(numbers[pair.shown])
            for example in extremes(found, pair, own):
                category = names[example.pop("label")]
                about = dict(image_id=target["image_id"], category=category)
                examples.setdefault(figure, []).append(about | example)
    return {figure: torch.cat(v) for figure, v in values.items()}, examples


def extremes(found: dict[str, Tensor], pair: Pair, objects: Objects) -> list[dict]:
    """The box of an image whose score rises most, and the one whose score falls most."""
    if not pair.shown.any():
        return []
    common_factor = pair.score.sum() / pair.without.sum().clamp(min=1e-12)  # changes no order
    change = pair.score / common_factor.clamp(min=1e-12) - pair.without
    change = torch.where(pair.shown, change, 0)
    numbers = dict(iou=found["iou"], without=pair.without, score=pair.score, change=change)
    numbers |= {k: found[k] for k in ("cls", "ism", "rsm")}
    chosen = []
    for i in (int(change.argmax()), int(change.argmin())):
        if change[i]:
            example = {k: v[i].item() for k, v in numbers.items()}
            example |= dict(label=int(found["labels"][i]), box=found["boxes"][i].tolist())
            example["object"] = None
            if found["iou"][i]:
                example["object"] = objects.boxes[found["gt"][i]].tolist()
            chosen.append(example)
    return chosen


def largest_changes(examples: list[dict], count: int) -> list[dict]:
    """Up to count / 2 boxes whose score rises most, then those whose score falls most."""
    order = sorted(examples, key=lambda e: -e["change"])
    rises = [e for e in order if e["change"] > 0][: count // 2]
    falls = [e for e in reversed(order) if e["change"] < 0]
    return rises + falls[: count - len(rises)]


def summarise(values: Tensor) -> dict:
    """How the two scores of all boxes follow the IoU, and how far from it they are.

    values [N, 3]: IoU, score without, score with what the figure shows.
    """
    numbers: dict = {"boxes": len(values)}
    for name, scores in (("without", values[:, 1]), ("score", values[:, 2])):
        distance = (scores - values[:, 0]).abs().mean().item() if len(values) else None
        pearson = correlation(scores, values[:, 0])["pearson"]
        numbers[name] = dict(pearson=pearson, distance=distance)
    return numbers


# ------------------------------------------------------------------------------ drawn

TITLES = {
    "ism": "cls {without:.2f}, cls * ISM {score:.2f}",
    "rsm": "cls * ISM {without:.2f}, fused {score:.2f}",
}


def draw_scores(shown: dict[str, list[dict]], data: Dataset, path: Path) -> None:
    """One row a figure, one column a box: the image around it, both scores, the IoU."""
    wanted = {row["image_id"] for rows in shown.values() for row in rows}
    ids = [image["id"] for image in data.coco()["images"]]
    images = {ids[i]: data[i][0] for i in range(len(data)) if ids[i] in wanted}
    columns = max(map(len, shown.values()))
    figure, axes = new_figure(3.4 * columns, 3.9 * len(shown), len(shown), columns)
    for axis in axes.flat:
        axis.axis("off")
    for line, (name, rows) in zip(axes, shown.items()):
        for axis, row in zip(line, rows):
            axis.imshow(images[row["image_id"]].permute(1, 2, 0).numpy())
            if row["object"]:
                frame(axis, row["object"], "white")
            frame(axis, row["box"], "yellow")
            scores = TITLES[name].format(**row)
            axis.set_title(f"{row['category']}: IoU {row['iou']:.2f}\n{scores}", fontsize=9)
    figure.savefig(path, dpi=90)


def main(argv=None) -> dict:
    with reported():
        options, flags = read_options("scores", Options, __doc__, argv)
        if options.examples < 1:
            raise BadInput(f"--examples {options.examples}: at least 1")
        study = open_study(options, flags)
        if not (study.model.settings.ism or study.model.settings.rsm):
            raise BadInput(f"{study.weights}: a model without ISM and RSM has one score alone")
        if rank_and_world()[0]:
            return {}  # the first process does all
        values, examples = boxes_under_two_scores(study)
        shown = {k: largest_changes(examples.get(k, []), options.examples) for k in values}
        numbers = {k: summarise(v) for k, v in values.items()}
        write_json(
            study.out / "scores.json", {k: v | {"examples": shown[k]} for k, v in numbers.items()}
        )
        if not any(shown.values()):
            raise BadInput(f"{study.weights}: no box has a score over the threshold")
        draw_scores(shown, study.data, study.out / "scores.png")
        for name, told in numbers.items():
            print_once(f"{name}: {told}")
        print_once(f"results: {study.out}/scores.json, .png")
        return {k: v | {"examples": shown[k]} for k, v in numbers.items()}


if __name__ == "__main__":
    main()
