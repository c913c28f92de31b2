"""The same final box under two scores: CPM R-CNN's Figures 5 and 6, on boxes that it finds itself.

    python -m studies.scores cpm_rcnn --weights CKPT
    python -m studies.scores cpm_rcnn --weights CKPT --data DIR --examples 8

`ism` (Figure 5) compares the class score with the one times ISM's IoU. `rsm` (Figure 6) compares
that product with the fused score (Eq. 4), at boxes that the border of the image cuts: there, the
paper says, ISM expects the whole object and RSM makes good for it.

Shown are the boxes whose score rises most, and those whose score falls most, against the other
boxes of their image: a factor that all have in common changes no order. Yellow is the box, white
the object of its class with the highest IoU. The true IoU stands above, but chooses no box.
OUT/scores.png draws these boxes, and OUT/scores.json lists them. The latter also says of all boxes
how the scores follow the IoU (Pearson's correlation), and how far from it they are (mean distance).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import torchvision
import tyro
from torch import Tensor, nn
from torch.utils.data import Dataset

from common import BadInput, xywh_to_xyxy
from cpm_rcnn import fused_score
from engine.checkpoints import write_json
from engine.metrics import detect
from engine.pictures import frame, new_figure
from engine.processes import gather, rank_and_world, say
from engine.settings import Config
from studies.alignment import Unsuppressed, correlation
from studies.checkpoint import Options as CheckpointOptions
from studies.checkpoint import open_study, read_options, reported


@dataclass
class Options(CheckpointOptions):
    method: Annotated[Literal["cpm_rcnn"], tyro.conf.Positional] = "cpm_rcnn"
    examples: int = 6  # boxes of each figure


# ------------------------------------------------------------------------------ measured


def cut_by_border(boxes: Tensor, height: int, width: int) -> Tensor:
    """Mask [N] of boxes [N, 4] that come to within 1 % of the image's sides of its border.

    >>> cut_by_border(torch.tensor([[0.5, 20, 60, 70], [5, 5, 90, 90]]), 100, 100)
    tensor([ True, False])
    """  # choice: a point is the centre of a cell, so a box of a cut object may end inside
    x1, y1, x2, y2 = boxes.unbind(1)
    near_x = (x1 < 0.01 * width) | (x2 > 0.99 * width)
    return near_x | (y1 < 0.01 * height) | (y2 > 0.99 * height)


def pairs_of_scores(model: nn.Module, found: dict[str, Tensor], config: Config, size) -> dict:
    """By figure: the mask [N] of its boxes, and their scores [N] without and with what it shows."""
    cls = found["cls"] if config.ism_use == "multiply" else torch.ones_like(found["cls"])
    product = cls * found["ism"]
    pairs = {}
    if model.config.ism:
        pairs["ism"] = torch.ones_like(cls).bool(), found["cls"], product
    if model.config.rsm:
        fused = fused_score(cls, found["ism"], found["rsm"], config.gamma)
        pairs["rsm"] = cut_by_border(found["boxes"], *size), product, fused
    return pairs


def boxes_under_two_scores(model: nn.Module, data: Dataset, config: Config, device) -> dict:
    """By figure, of this process's images: IoU and both scores of all boxes [N, 3], and examples.

    Examples are dicts: of each image the box whose score rises most and the one that falls most.
    """
    label = {c["id"]: i for i, c in enumerate(data.categories)}
    names = [c["name"] for c in data.categories]
    objects: dict = {}
    for a in data.coco()["annotations"]:
        if not (a.get("iscrowd", 0) or a.get("difficult", 0)):
            objects.setdefault(a["image_id"], []).append((a["bbox"], label[a["category_id"]]))
    values: dict[str, list] = {}
    examples: dict[str, list] = {}
    everything = replace(config, ism=model.config.ism, rsm=model.config.rsm)
    for target, found in detect(Unsuppressed(model, everything), data, config, device):
        keep, _ = model.suppress(found["boxes"], found["scores"], found["labels"], everything)
        found = {k: v[keep] for k, v in found.items()}
        mine = objects.get(target["image_id"], [])
        gt_boxes = xywh_to_xyxy([box for box, _ in mine])
        same = found["labels"][:, None] == torch.tensor([k for _, k in mine]).long()
        ious = torchvision.ops.box_iou(found["boxes"], gt_boxes) * same  # [N, G]
        iou = F.pad(ious, (0, 1)).amax(1)  # [N]: an image may have no object
        for figure, pair in pairs_of_scores(model, found, everything, target["size"]).items():
            mask, without, score = pair
            values.setdefault(figure, []).append(torch.stack([iou, without, score], 1)[mask])
            common_factor = score.sum() / without.sum().clamp(min=1e-12)  # it changes no order
            change = torch.where(mask, score / common_factor.clamp(min=1e-12) - without, 0)
            most = (change.argmax().item(), change.argmin().item()) if mask.any() else ()
            for i in (i for i in most if change[i]):
                about = dict(image_id=target["image_id"], category=names[found["labels"][i]])
                numbers = dict(iou=iou[i], without=without[i], score=score[i], change=change[i])
                numbers |= {k: found[k][i] for k in ("cls", "ism", "rsm")}
                about |= dict(box=found["boxes"][i].tolist())
                about |= dict(object=gt_boxes[ious[i].argmax()].tolist() if iou[i] else None)
                about |= {k: v.item() for k, v in numbers.items()}
                examples.setdefault(figure, []).append(about)
    return {k: (torch.cat(v), examples.get(k, [])) for k, v in values.items()}


def largest_changes(examples: list[dict], count: int) -> list[dict]:
    """Up to count / 2 boxes whose score rises most, then those whose score falls most."""
    order = sorted(examples, key=lambda e: -e["change"])
    rises = [e for e in order if e["change"] > 0][: count // 2]
    falls = [e for e in reversed(order) if e["change"] < 0]
    return rises + falls[: count - len(rises)]


def summarise(values: Tensor) -> dict:
    """Over all boxes: how the two scores follow the IoU, and how far from it they are.

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
    """A row for each figure, a column for each box: the image around it, both scores, the IoU."""
    wanted = {row["image_id"] for rows in shown.values() for row in rows}
    ids = [image["id"] for image in data.coco()["images"]]
    images = {ids[i]: data[i][0] for i in range(len(data)) if ids[i] in wanted}
    columns = max(map(len, shown.values()))
    figure, axes = new_figure(3.4 * columns, 3.9 * len(shown), len(shown), columns)
    for axis in axes.flat:
        axis.axis("off")
    for line, (name, rows) in zip(axes, shown.items()):
        for axis, row in zip(line, rows):
            image = images[row["image_id"]]
            axis.imshow(image.permute(1, 2, 0).numpy())
            for box, colour in ((row["object"], "white"), (row["box"], "yellow")):
                if box:
                    frame(axis, box, colour)
            scores = TITLES[name].format(**row)
            axis.set_title(f"{row['category']}: IoU {row['iou']:.2f}\n{scores}", fontsize=9)
    figure.savefig(path, dpi=90)


def main(argv=None) -> dict:
    with reported():
        options, flags = read_options("scores", Options, __doc__, argv)
        if options.examples < 1:
            raise BadInput(f"--examples {options.examples}: 1 is the least")
        study = open_study(options, flags)
        model, data, config = study.model, study.data, study.config
        if not (model.config.ism or model.config.rsm):
            raise BadInput(f"{config.weights}: a model without ISM and RSM has one score alone")
        shares = gather(boxes_under_two_scores(model, data, config, study.device))
        figures = [k for k in ("ism", "rsm") if getattr(model.config, k)]
        shares = [share for share in shares if share]  # a process may have had no image
        values = {k: torch.cat([share[k][0] for share in shares]) for k in figures}
        examples = {k: [e for share in shares for e in share[k][1]] for k in figures}
        shown = {k: largest_changes(v, options.examples) for k, v in examples.items()}
        numbers = {k: summarise(v) | {"examples": shown[k]} for k, v in values.items()}
        if rank_and_world()[0] == 0:
            write_json(study.out / "scores.json", numbers)
            if not any(shown.values()):
                raise BadInput(f"{config.weights}: no box has a score over the threshold")
            draw_scores(shown, data, study.out / "scores.png")
        for name in figures:
            told = {k: v for k, v in numbers[name].items() if k != "examples"}
            say(f"{name}: {told}")
        say(f"results: {study.out}/scores.json, .png")
        return numbers


if __name__ == "__main__":
    main()
