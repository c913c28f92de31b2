"""Which anchors does the IAC score make positive? DC loss's section 2.2, over validation images.

    python -m studies.assignment dc_loss_clnms --weights CKPT
    torchrun --nproc_per_node 2 -m studies.assignment dc_loss_clnms --weights CKPT --data DIR

Compares the anchors that RetinaNet's rule makes positive (IoU over 0.5) with those that the IAC
score adds: how many there are, how sure the classifier already is of them (p of the gt's class),
how well their predicted boxes fit the gt (IoU), and what share of the added ones RetinaNet would
have ignored (IoU 0.4 to 0.5). For a model that was trained without the score, the study says what
the score would add.

Writes OUT/assignment.json, and OUT/assignment.png: the distributions of p and IoU in both groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor, nn

from baselines.gfl import GFL
from baselines.retinanet import RetinaNet
from common import aligned_iou
from engine.checkpoints import write_json
from engine.loader import to_device
from engine.pictures import new_figure
from engine.processes import gather, print_once, progress, rank_and_world
from studies.checkpoint import Options as CheckpointOptions
from studies.checkpoint import network_images, open_study, read_options, reported

GROUPS = ("by IoU", "added")


@dataclass
class Options(CheckpointOptions):
    method: Annotated[Literal["dc_loss_clnms"], tyro.conf.Positional] = "dc_loss_clnms"


@torch.no_grad()
def positives(model: nn.Module, images: list, targets: list[dict]) -> dict[str, Tensor]:
    """The P positive anchors of a batch: `added` [P] by the IAC score, `ignored` [P] without it.

    `p` [P] is that of the gt's class, `iou` [P] that of the predicted box with the gt.
    """
    out = model.outputs(images)
    base = GFL if isinstance(model, GFL) else RetinaNet
    plain = base.assign(model, out, targets)
    labels = model.add_positives(out, plain).labels
    at = (labels == 1).nonzero(as_tuple=True)
    probs = out["cls_logits"][at].sigmoid()  # [P, K]
    return {
        "added": plain.labels[at] != 1,
        "ignored": plain.labels[at] == -1,
        "p": probs.gather(1, plain.gt_labels[at][:, None])[:, 0],
        "iou": aligned_iou(model.decode(out, at), plain.gt_boxes[at]),
    }


def summarise(found: dict[str, Tensor]) -> dict:
    """`positives` as numbers: those by IoU, those added, and how many more these are."""
    added, numbers = found["added"], {}
    for name, part in zip(GROUPS, (~added, added)):
        means = {k: found[k][part].mean().item() if part.any() else None for k in ("p", "iou")}
        numbers[name] = dict(anchors=int(part.sum()), **means)
    share = found["ignored"][added].float().mean().item() if added.any() else None
    numbers["added"]["else ignored"] = share
    return numbers | {"more": int(added.sum()) / max(1, int((~added).sum()))}


def draw_positives(found: dict[str, Tensor], path: Path) -> None:
    """The distributions of p and IoU of `positives`, as shares of each group's anchors."""
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
        images = network_images(study)
        rank, world = rank_and_world()
        mine, parts = range(rank, len(images), world), []
        for i in progress(mine, "looking", len(mine)):
            part = positives(study.model, *to_device(images[i], study.device))
            parts.append({k: v.cpu() for k, v in part.items()})
        shares = gather(parts)
        if rank:
            return {}
        parts = [shares[i % world][i // world] for i in range(len(images))]  # in their order
        found = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
        numbers = dict(images=len(images)) | summarise(found)
        write_json(study.out / "assignment.json", numbers)
        draw_positives(found, study.out / "assignment.png")
        for name in GROUPS:
            shown = " ".join(f"{k} {v}" for k, v in numbers[name].items())
            print_once(f"{name:7}: {shown}")
        print_once(f"{numbers['more']:.1%} more positives")
        print_once(f"results: {study.out}/assignment.json, .png")
        return numbers


if __name__ == "__main__":
    main()
