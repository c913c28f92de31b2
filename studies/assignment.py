"""Which anchors does the IAC score make positive? Of DC loss's section 2.2, over validation images.

    python -m studies.assignment dc_loss_clnms --weights CKPT
    torchrun --nproc_per_node 2 -m studies.assignment dc_loss_clnms --weights CKPT --data DIR

Anchors that RetinaNet's rule makes positive (IoU over 0.5) stand beside those that the IAC score
adds: how many, how sure the classifier already is of them (p of the gt's class), how well their
predicted boxes fit the gt (IoU), and which share of the added ones RetinaNet would have ignored
(IoU 0.4 to 0.5). A model that was trained without the score is asked what the score would add.

Writes OUT/assignment.json, and OUT/assignment.png: how p and IoU are spread in both groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

import common
from common import Resized
from dc_loss_clnms import Detector
from engine.checkpoints import write_json
from engine.data import to_device
from engine.pictures import new_figure
from engine.processes import gather, progress, rank_and_world, say
from studies.checkpoint import Options as CheckpointOptions
from studies.checkpoint import open_study, read_options, reported

GROUPS = ("by IoU", "added")


@dataclass
class Options(CheckpointOptions):
    method: Annotated[Literal["dc_loss_clnms"], tyro.conf.Positional] = "dc_loss_clnms"


@torch.no_grad()
def positives(model: Detector, images: list, targets: list[dict]) -> dict[str, torch.Tensor]:
    """The P positive anchors of a batch: `added` [P] by the IAC score, `ignored` [P] without it.

    `p` [P] is of the gt's class, `iou` [P] of the predicted box with the gt.
    """
    config, out = model.config, model.outputs(images)
    plain, _, _ = super(Detector, model).assign(out, targets)  # its base's
    model.config = replace(config, iac=True)
    labels, gt_boxes, gt_labels = model.assign(out, targets)
    model.config = config
    at = (labels == 1).nonzero(as_tuple=True)
    boxes = model.decode(out, at)
    p = out["cls_logits"][at].sigmoid().gather(1, gt_labels[at][:, None])[:, 0]
    iou = common.aligned_iou(boxes, gt_boxes[at])
    return dict(added=plain[at] != 1, ignored=plain[at] == -1, p=p, iou=iou)


def summarise(found: dict[str, torch.Tensor]) -> dict:
    """Numbers of `positives`: of those by IoU, of those added, and how many more these are."""
    added, numbers = found["added"], {}
    for name, part in zip(GROUPS, (~added, added)):
        means = {k: found[k][part].mean().item() if part.any() else None for k in ("p", "iou")}
        numbers[name] = dict(anchors=int(part.sum()), **means)
    share = found["ignored"][added].float().mean().item() if added.any() else None
    numbers["added"]["else ignored"] = share
    return numbers | {"more": int(added.sum()) / max(1, int((~added).sum()))}


def draw_positives(found: dict[str, torch.Tensor], path: Path) -> None:
    """How p and IoU of `positives` are spread, of each group as shares of its anchors."""
    figure, (axes,) = new_figure(11, 4, 1, 2)
    labels = {"p": "p of the gt's class", "iou": "IoU of the predicted box with the gt"}
    for axis, (key, label) in zip(axes, labels.items()):
        for group, part in zip(GROUPS, (~found["added"], found["added"])):
            values = found[key][part].float()
            shares = torch.histc(values, 20, 0, 1) / max(1, len(values))
            count = f"{group}: {len(values)} anchors"
            axis.stairs(shares, torch.linspace(0, 1, 21), fill=True, alpha=0.4, label=count)
        axis.set(xlabel=label, ylabel="share of the anchors")
        axis.legend()
    figure.savefig(path, dpi=80)


def main(argv=None) -> dict:
    with reported():
        study = open_study(*read_options("assignment", Options, __doc__, argv))
        model, data = study.model.eval(), Resized(study.data, study.config, False)
        rank, world = rank_and_world()
        mine, parts = range(rank, len(data), world), []
        for i in progress(mine, "looking", len(mine)):
            part = positives(model, *to_device([data[i]], study.device))
            parts.append({k: v.cpu() for k, v in part.items()})
        shares = gather(parts)
        if rank:
            return {}
        parts = [shares[i % world][i // world] for i in range(len(data))]  # in the images' order
        found = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
        numbers = dict(images=len(data)) | summarise(found)
        write_json(study.out / "assignment.json", numbers)
        draw_positives(found, study.out / "assignment.png")
        for name in GROUPS:
            shown = " ".join(f"{k} {v}" for k, v in numbers[name].items())
            say(f"{name:7}: {shown}")
        say(f"{numbers['more']:.1%} more positives; results: {study.out}/assignment.json, .png")
        return numbers


if __name__ == "__main__":
    main()
