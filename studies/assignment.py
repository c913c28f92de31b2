"""Which anchors does the IAC score make positive? DC loss's section 2.2.

    python -m studies.assignment dc_loss_clnms --weights CKPT

Prints, over validation images, for the anchors that RetinaNet's rule makes positive (IoU
over 0.5) and for those that the IAC score adds: how many they are, how sure the
classifier already is (p of the object's class), and how well their predicted boxes fit
(iou). "else ignored" is the share of the added ones that RetinaNet would ignore (IoU 0.4
to 0.5). A model trained without the score is asked which ones it would add. Writes
OUT/assignment.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor, nn

from baselines.retinanet import Assignment
from common import aligned_iou
from dc_loss_clnms import ThreeProposals
from engine.processes import print_once, rank_and_world
from studies import checkpoint
from studies.checkpoint import each_image, open_study, read_options, reported, write_results

GROUPS = ("by IoU", "added")


@dataclass
class Options(checkpoint.Options):
    method: Annotated[Literal["dc_loss_clnms"], tyro.conf.Positional] = "dc_loss_clnms"


def without_iac(model: nn.Module, out: dict, targets: list[dict]) -> Assignment:
    """The assignment of the model's base, without the positives that the IAC score adds."""
    return super(ThreeProposals, model).assign(out, targets)


@torch.no_grad()
def positives(model: nn.Module, images: list, targets: list[dict]) -> dict[str, Tensor]:
    """What is known of the P positive anchors of a batch, each tensor [P].

    `added`: by the IAC score; `ignored`: by RetinaNet's rule; `p`: of the object's class;
    `iou`: of the predicted box with the object.
    """
    out = model.outputs(images)
    plain = without_iac(model, out, targets)
    at = (model.add_positives(out, plain).labels == 1).nonzero(as_tuple=True)
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


def main(argv=None) -> dict:
    with reported():
        study = open_study(*read_options("assignment", Options, __doc__, argv))
        if rank_and_world()[0]:
            return {}  # the first process does all
        parts = [positives(study.model, image, target) for image, target in each_image(study)]
        together = {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
        numbers = dict(images=len(parts)) | summarise(together)
        for name in GROUPS:
            print_once(f"{name:7}: " + " ".join(f"{k} {v}" for k, v in numbers[name].items()))
        print_once(f"{numbers['more']:.1%} more positives")
        write_results(study.out / "assignment.json", numbers)
        return numbers


if __name__ == "__main__":
    main()
