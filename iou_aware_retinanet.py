"""IoU-aware RetinaNet (Wu et al., 2019): let the detector say how well each box fits.
Paper: https://arxiv.org/abs/1912.05992
Release: https://github.com/ShengkaiWu/IoU-aware-single-stage-object-detector

RetinaNet ranks boxes by class score, which says nothing of how well they fit. So a sure box that
fits badly removes a better one in NMS, and comes first in the ranking that AP is computed from.
Here one more 3x3 convolution predicts the IoU of each regressed anchor with its object, and boxes
are ranked by p^alpha * IoU^(1 - alpha). It reads the box tower: a tower of its own would make the
head a third larger.
The IoU is a target that the network itself makes, and the release lets the gradient through it: so
the IoU loss also trains the box. In our experiments (docs/results.md) most of the gain at high IoU
comes from this, at a cost in AP50, and little from the ranking.

    image -> ResNet-FPN -> P3..P7
      class tower, 4 convs -> cls_logits [B, N, K]
      box tower, 4 convs   -> deltas     [B, N, 4]
                           -> iou_logits [B, N]       target: IoU(decoded box, its gt)
    training: RetinaNet's focal loss and box loss, and BCE of the predicted IoU on the positives
    test:     score = sigmoid(cls)^alpha * sigmoid(iou)^(1 - alpha)
              -> best 1000 (anchor, class) pairs of each level over 0.05 -> NMS -> best 100

Where paper and release differ, the release made the paper's numbers and decides:
    The target IoU is not detached. BCE draws a box to its gt where the predicted IoU is above 0.5,
    and away from it below. `--no-iou-grad` detaches it; the paper does not say.
    Scores are fused before the best 1000 and the threshold of 0.05, not only for "subsequent NMS
    and AP computation".
All other deviations stand beside ROWS. RetinaNet itself is in baselines/retinanet.py.

In comments "(3.1)" is a section of the paper, "(release)" a value seen in the release, "choice:"
our own where neither decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import engine
from baselines import retinanet
from common import Amount, Share

# B images, L levels, K classes, A = 9 anchors per cell, N anchors per image
# P positive anchors of the whole batch, each with its gt
# index: (image, anchor), two tensors that pick anchors of the batch, as in iou_logits[index]
# cls_probs = sigmoid(cls_logits): p in the paper; iou_probs = sigmoid(iou_logits): IoU in the paper


@dataclass
class Config(retinanet.Config):
    """IoU-aware RetinaNet with ResNet-50 on COCO: Table 1."""

    iou_head: bool = True  # predict IoU (3.1); off: RetinaNet, the baseline
    iou_loss: Literal["bce", "l2", "l1", "smooth_l1"] = "bce"  # loss of the IoU (Eq. 3, Table 2)
    iou_grad: bool = True  # the IoU loss also moves the box, through its target (release)
    iou_weight: Amount = 1.0  # weight of the loss of the predicted IoU (Eq. 4)
    alpha: Share = 0.5  # score = p^alpha IoU^(1-alpha) (Eq. 5; release; Table 3's best: 0.4, 0.5)
    product: bool = False  # score = p * IoU instead ("none" in Tables 3, 4; all of Table 2)


# ------------------------------------------------------------------------------ equations


def detection_confidence(cls_probs: Tensor, iou_probs: Tensor, alpha: float | None) -> Tensor:
    """Eq. 5: cls_probs^alpha * iou_probs^(1 - alpha), or with alpha None their plain product.

    alpha = 1 gives cls_probs and alpha = 0 gives iou_probs, exactly. Shapes broadcast.

    >>> detection_confidence(torch.tensor([0.25, 0.25]), torch.tensor([1.0, 0.04]), 0.5)
    tensor([0.5000, 0.1000])
    """
    if alpha is None:
        return cls_probs * iou_probs
    return cls_probs**alpha * iou_probs ** (1 - alpha)


# ------------------------------------------------------------------------------ heads


class IoUBranch(nn.Conv2d):
    """The paper's addition: a 3x3 convolution that predicts the IoU of each regressed anchor (3.1).

    It sits on the last maps of anyone's box tower: L maps [B, C, H, W] -> logits [B, N] with
    N = sum(H*W*A), level by level, cells row by row, in each cell anchor by anchor. It starts at
    N(0, 0.01) with bias 0 (release): IoU 0.5 everywhere.

    >>> branch = IoUBranch(in_channels=8, num_anchors=9)
    >>> branch([torch.rand(2, 8, 4, 4), torch.rand(2, 8, 2, 2)]).shape
    torch.Size([2, 180])
    """

    def __init__(self, in_channels: int = 256, num_anchors: int = 9):
        super().__init__(in_channels, num_anchors, 3, padding=1)
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)

    def forward(self, features: list[Tensor]) -> Tensor:
        convolve = super().forward
        maps = [convolve(f) for f in features]  # [B, A, H, W] each
        return torch.cat([m.permute(0, 2, 3, 1).flatten(1) for m in maps], 1).float()


class IoUAwareHead(retinanet.RetinaTowers):
    """Figure 1: RetinaNet's towers, and an IoUBranch on the box tower.

    L maps -> cls_logits [B, N, K], deltas [B, N, 4], iou_logits [B, N]; N = sum(H*W*A).

    >>> head = IoUAwareHead(8, num_anchors=9, num_classes=3)
    >>> [t.shape for t in head([torch.rand(2, 8, 4, 4), torch.rand(2, 8, 2, 2)])]
    [torch.Size([2, 180, 3]), torch.Size([2, 180, 4]), torch.Size([2, 180])]
    """

    names = ("cls_logits", "deltas", "iou_logits")  # of what forward returns

    def __init__(self, in_channels=256, num_anchors=9, num_classes=80, num_convs=4, groups=0):
        super().__init__(in_channels, num_anchors, num_classes, num_convs, groups)
        self.iou_logits = IoUBranch(in_channels, num_anchors)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        cls_logits, deltas, box_features = super().forward(features)
        return cls_logits, deltas, self.iou_logits(box_features)


# ------------------------------------------------------------------------------ losses


def iou_prediction_loss(
    logits: Tensor, ious: Tensor, kind: str = "bce", beta: float = 0.11
) -> Tensor:
    """Eq. 3 and the losses compared in Table 2, one value per box: logits [P], ious [P] -> [P].

    The target may carry a gradient. BCE is least, but not 0, where sigmoid(logit) is the IoU.

    >>> iou_prediction_loss(torch.zeros(1), torch.tensor([0.75]), "l2")
    tensor([0.0625])
    """
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(logits, ious, reduction="none")
    if kind == "smooth_l1":  # choice: the boxes' beta; with 1 it would be half of L2
        return F.smooth_l1_loss(logits.sigmoid(), ious, beta=beta, reduction="none")
    return {"l1": F.l1_loss, "l2": F.mse_loss}[kind](logits.sigmoid(), ious, reduction="none")


def iou_branch_loss(
    iou_logits: Tensor,
    boxes: Tensor,
    gt_boxes: Tensor,
    kind: str = "bce",
    beta: float = 0.11,
    move_boxes: bool = True,
    num_positives: Tensor | int | None = None,
) -> Tensor:
    """Eq. 3 over P positives: the summed loss over num_positives (default: P), a scalar.

    iou_logits [P]; boxes [P, 4], as the network regresses them, and gt_boxes [P, 4]. With
    `move_boxes` the gradient also reaches `boxes`, by the IoU that is the target. The slope of BCE
    in its target is -logit: an IoU predicted above 0.5 draws the box to its gt, one below pushes it
    away.

    >>> box, gt = torch.tensor([[0., 0., 20., 10.]]), torch.tensor([[5., 0., 15., 10.]])  # IoU 1/2
    >>> iou_branch_loss(torch.zeros(1), box, gt) / torch.tensor(2.0).log()
    tensor(1.)
    """
    ious = common.aligned_iou(boxes if move_boxes else boxes.detach(), gt_boxes)
    total = iou_prediction_loss(iou_logits, ious, kind, beta).sum()
    return total / (max(1, len(boxes)) if num_positives is None else num_positives)


# ------------------------------------------------------------------------------ detector


class Detector(retinanet.RetinaNet):
    """Figure 1: RetinaNet with one more loss and another score.

    `loss` is RetinaNet's, and adds `further_losses` to its own; `score` is what `select` ranks by.
    For both see baselines/retinanet.py, for `finish`, `predict` and the two configs
    engine/detector.py.
    """

    def __init__(self, config: Config, num_classes: int):
        head = IoUAwareHead if config.iou_head else retinanet.RetinaTowers
        super().__init__(config, num_classes, head)

    def further_losses(self, out: dict, positives: retinanet.Positives, num_positives) -> dict:
        """The last term of Eq. 4, weighted."""
        config = self.config
        if not config.iou_head:
            return {}
        loss = iou_branch_loss(
            out["iou_logits"][positives.index],
            positives.boxes(),
            positives.gt_boxes,
            kind=config.iou_loss,
            beta=config.box_beta,
            move_boxes=config.iou_grad,
            num_positives=num_positives,
        )
        return {"iou": config.iou_weight * loss}

    def score(self, probs: Tensor, outputs: dict, index: tuple, config: Config) -> Tensor:
        """Eq. 5: the fused score, which also chooses the boxes that enter NMS."""
        if not self.config.iou_head:
            return probs
        iou_probs = outputs["iou_logits"][index].sigmoid()
        alpha = None if config.product else config.alpha
        return detection_confidence(probs, iou_probs[..., None], alpha)

    def select(self, outputs: dict, config: Config) -> dict[str, Tensor]:
        """The boxes that enter NMS, and beside their fused score both of its factors."""
        boxes = super().select(outputs, config)
        image, anchor = boxes["image"], boxes["anchor"]
        boxes["cls_probs"] = outputs["cls_logits"][image, anchor, boxes["labels"]].sigmoid()
        boxes["iou_probs"] = torch.ones_like(boxes["scores"])
        if self.config.iou_head:
            boxes["iou_probs"] = outputs["iou_logits"][image, anchor].sigmoid()
        return boxes


# ------------------------------------------------------------------------------ rows

# Deviations (paper | release | here). Those that change what is learned or found:
#   Target IoU in Eq. 3: - | not detached, the IoU loss also moves the box | release;
#       `--no-iou-grad` detaches it.
#   L2, L1 and smooth L1 losses of the IoU: no formula | - | of sigmoid(logit) - IoU; the square
#       without 1/2.
#   Where scores are fused: "subsequent NMS and AP" | before top 1000 and threshold | release.
#   Table 1's X-101: ResNeXt-101-32x8d | 32x4d, the baseline too | 32x8d, of which torchvision has
#       weights; `--backbone resnext101_32x4d --backbone-weights FILE` is the release.
#   Boxes that enter NMS: - | all classes of a level's best 1000 anchors | its best 1000 (anchor,
#       class) pairs; `--all-classes` is the release. At alpha = 0 an anchor's classes all tie, and
#       it matters.
#   Anchors in the batch's padding: - | plain background | do not train. In crowd regions: - | plain
#       background | are no negatives.
# Those that do not, or hardly:
#   Number of positives: N_pos | each image counts at least one | release.
#   P7: - | no ReLU between P6 and P7 | release.
#   Anchors: - | "+1" box sizes, rounded | neither.

# "none" in Tables 3 and 4, and both losses of Table 2, are p * IoU, the square of the score of
# alpha = 0.5: the same ranking. They differ only through the score threshold, which cuts the square
# more often (35.4 and 35.5 in the paper).

ALPHAS = tuple(round(1 - i / 10, 1) for i in range(11))  # Table 3
_SMALL = dict(scales=(600,), test_scales=(600,), max_size=1000)  # the ablations' image scale
_VOC = _SMALL  # 12 epochs, drops after 8 and 11, rate 0.0075 for 12 images (release): as on COCO
# choice: x101 is what the paper prints and what a row can start from without a file of one's own
_BACKBONES = {"r50": "resnet50", "r101": "resnet101", "x101": "resnext101_32x8d"}

# One training, several rows:
#   table2.bce, table3.none, table3.alpha_*, table4.none, table4.alpha_*: `python -m studies.sweep`
#   table2.baseline, table3.baseline, table4.baseline
# Table 1 is test-dev, which COCO's server scores; table1.retinanet_* are MMDetection's published
# models, which the authors only evaluated. Tables 2 to 4 are val 2017, Table 5 VOC 2007 test.
# Table 1's other lines are other detectors. Ours: not run, needs COCO and GPU days.
ROWS: dict[str, dict] = {
    **{f"table1.retinanet_{k}": dict(iou_head=False, backbone=v) for k, v in _BACKBONES.items()},
    **{f"table1.{k}": dict(backbone=v) for k, v in _BACKBONES.items()},
    "table2.baseline": dict(iou_head=False, **_SMALL),
    "table2.l2": dict(iou_loss="l2", product=True, **_SMALL),
    "table2.bce": dict(product=True, **_SMALL),
    "extra.l1": dict(iou_loss="l1", product=True, **_SMALL),
    "extra.smooth_l1": dict(iou_loss="smooth_l1", product=True, **_SMALL),
    "extra.detached": dict(iou_grad=False, product=True, **_SMALL),  # beside table2.bce
    **{f"table{t}.baseline": dict(iou_head=False, **_SMALL) for t in (3, 4)},
    **{f"table{t}.none": dict(product=True, **_SMALL) for t in (3, 4)},
    **{f"table{t}.alpha_{a:.1f}": dict(alpha=a, **_SMALL) for t in (3, 4) for a in ALPHAS},
    "table5.retinanet_r50": dict(iou_head=False, **_VOC),
    "table5.retinanet_r101": dict(iou_head=False, backbone="resnet101", **_VOC),
    "table5.r50": dict(**_VOC),
    "table5.r101": dict(backbone="resnet101", **_VOC),
}

_AP = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_AP_IOU = ("AP", "AP50", "AP60", "AP70", "AP80", "AP90")
_TABLE34 = {  # Table 3's AP, AP50, AP75, by size; then what Table 4 adds: AP60, 70, 80, 90
    "baseline": (34.3, 54.5, 36.4, 17.2, 38.2, 47.1, 49.2, 41.3, 29.8, 10.9),
    "none": (35.4, 54.1, 38.2, 18.9, 39.3, 48.3, 50.0, 43.3, 31.9, 12.2),
    "alpha_1.0": (34.5, 54.1, 36.7, 17.4, 38.4, 46.8, 49.5, 42.0, 30.1, 11.0),
    "alpha_0.9": (34.8, 54.3, 37.1, 17.8, 38.6, 47.0, 49.7, 42.4, 30.4, 11.2),
    "alpha_0.8": (35.0, 54.4, 37.4, 18.3, 38.8, 47.6, 49.9, 42.6, 30.7, 11.4),
    "alpha_0.7": (35.2, 54.4, 37.7, 18.5, 39.0, 47.9, 50.1, 43.0, 31.2, 11.7),
    "alpha_0.6": (35.4, 54.3, 38.0, 18.8, 39.2, 48.2, 50.2, 43.2, 31.5, 12.0),
    "alpha_0.5": (35.5, 54.1, 38.2, 18.9, 39.4, 48.3, 50.0, 43.3, 31.9, 12.2),
    "alpha_0.4": (35.5, 53.7, 38.4, 18.9, 39.5, 48.4, 49.8, 43.3, 32.5, 12.5),
    "alpha_0.3": (35.4, 53.0, 38.5, 18.8, 39.5, 48.4, 49.3, 43.2, 32.8, 12.8),
    "alpha_0.2": (34.8, 51.3, 38.4, 18.5, 39.1, 48.1, 48.0, 42.5, 32.9, 13.1),
    "alpha_0.1": (32.5, 46.4, 36.2, 16.7, 37.0, 45.9, 43.7, 39.4, 31.7, 13.3),
    "alpha_0.0": (0.4, 0.5, 0.4, 0.2, 0.7, 0.8, 0.4, 0.4, 0.4, 0.3),
}
PAPER: dict[str, dict] = {
    "table1.retinanet_r50": dict(zip(_AP, (35.9, 55.8, 38.4, 19.9, 38.8, 45.0))),
    "table1.retinanet_r101": dict(zip(_AP, (38.1, 58.5, 40.8, 21.2, 41.5, 48.2))),
    "table1.retinanet_x101": dict(zip(_AP, (39.0, 59.7, 41.9, 22.3, 42.5, 48.9))),
    "table1.r50": dict(zip(_AP, (36.9, 56.1, 40.1, 20.9, 40.0, 46.0))),
    "table1.r101": dict(zip(_AP, (39.2, 58.2, 42.9, 22.1, 42.7, 50.0))),
    "table1.x101": dict(zip(_AP, (40.6, 60.1, 44.2, 23.4, 43.9, 51.8))),
    "table2.baseline": dict(zip(_AP, (34.3, 54.5, 36.4, 17.2, 38.2, 47.1))),
    "table2.l2": dict(zip(_AP, (35.1, 53.8, 37.9, 18.6, 39.2, 47.6))),
    "table2.bce": dict(zip(_AP, (35.4, 54.1, 38.2, 18.9, 39.3, 48.3))),
    "extra.l1": {},
    "extra.smooth_l1": {},
    "extra.detached": {},
    **{f"table3.{k}": dict(zip(_AP, v)) for k, v in _TABLE34.items()},
    **{f"table4.{k}": dict(zip(_AP_IOU, v[:2] + v[6:])) for k, v in _TABLE34.items()},
    "table5.retinanet_r50": dict(zip(_AP_IOU, (51.4, 78.8, 74.3, 63.6, 44.9, 15.2))),
    "table5.retinanet_r101": dict(zip(_AP_IOU, (55.1, 81.1, 77.2, 67.5, 50.4, 20.1))),
    "table5.r50": dict(zip(_AP_IOU, (53.6, 79.0, 75.1, 66.1, 48.7, 19.4))),
    "table5.r101": dict(zip(_AP_IOU, (56.2, 80.5, 76.8, 68.5, 52.4, 22.8))),
}

TINY = dict(retinanet.TINY)


def main(argv=None):
    return engine.run("iou_aware_retinanet", Config, Detector, ROWS, PAPER, TINY, argv)


if __name__ == "__main__":
    main()
