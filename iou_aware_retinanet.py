"""IoU-aware RetinaNet (Wu et al., 2019): predict how well each box fits; rank boxes by that.
Paper: "IoU-aware Single-stage Object Detector for Accurate Localization",
    https://arxiv.org/abs/1912.05992
Release: https://github.com/ShengkaiWu/IoU-aware-single-stage-object-detector

RetinaNet (baselines/retinanet.py) trains its classifier and its box regressor with independent
losses. So the class score, which ranks the boxes, does not know how well they fit. The paper
names two harms. In NMS, a box with a high score and a low IoU suppresses a box that fits
better. In AP, such a box ranks above boxes that fit better, which costs AP at high IoU.

So the paper lets the network also predict the IoU of each predicted box with its object. One
3x3 convolution predicts it from the box regressor's last maps, because separate layers would
slow the detector down. Boxes are ranked by p^alpha * IoU^(1 - alpha), with p the class score.

The target, the true IoU, depends on the predicted box. The release lets the gradient flow
through the target, so the IoU loss also trains the boxes. In our experiments (docs/results.md)
most of the gain, which lies at AP90, comes from this gradient, little from the new ranking.

    image -> ResNet-FPN -> P3..P7
      class tower, 4 convs -> cls_logits [B, N, K]
      box tower, 4 convs   -> deltas     [B, N, 4]
                           -> iou_logits [B, N]     target: IoU of the decoded box and its gt
    training: RetinaNet's losses, and the IoU loss of the positives
    test:     score = sigmoid(cls)^alpha * sigmoid(iou)^(1 - alpha)
              -> best 1000 (anchor, class) pairs of each level over 0.05 -> NMS -> best 100

    Eq. 1   L_cls = (sum over all anchors of focal loss) / N_pos    kernels.focal_loss
    Eq. 2   L_loc = (sum_pos smooth_L1(delta - delta*)) / N_pos     retinanet.box_loss
    Eq. 3   L_IoU = (sum_pos BCE(predicted IoU, IoU)) / N_pos       iou_branch_loss
    Eq. 4   L = L_cls + L_loc + L_IoU                               retinanet.RetinaNet.loss
    Eq. 5   S_det = p^alpha IoU^(1 - alpha)                         detection_confidence

The release decides two points about which the paper says little:
    The gradient flows into the target IoU. `--no-iou-grad` stops it.
    Scores are fused before the best 1000 are taken and before the threshold of 0.05. The paper
    only says that they rank "all the detections in the subsequent NMS and AP computation".
docs/deviations.md lists all others. "(3.1)" is a section of the paper, "(release)" a value
seen in the release, "choice:" our own where neither decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import engine
from baselines import retinanet
from baselines.retinanet import Positives, RetinaTowers
from engine import Amount, Share

# B images, L levels, K classes, A = 9 anchors per cell, N anchors per image
# P positive anchors of the whole batch, each with its object (gt)
# index: (image, anchor), two tensors that pick anchors of the batch, as in iou_logits[index]
# cls_probs = sigmoid(cls_logits), p in the paper
# iou_probs = sigmoid(iou_logits), the predicted IoU, "IoU" in Eq. 5


@dataclass
class Model(retinanet.Model):
    """IoU-aware RetinaNet with ResNet-50."""

    iou_head: bool = True  # predict IoU (3.1); off: RetinaNet, the baseline
    iou_loss: Literal["bce", "l2", "l1", "smooth_l1"] = "bce"  # IoU loss (Eq. 3, Table 2)
    iou_grad: bool = True  # the IoU loss also moves the box, through its target (release)
    iou_weight: Amount = 1.0  # weight of the IoU loss (Eq. 4)


@dataclass
class Test(retinanet.Test):
    """Eq. 5 with alpha = 0.5."""

    alpha: Share = 0.5  # score = p^alpha IoU^(1-alpha) (Eq. 5; release; best in Table 3)
    product: bool = False  # score = p * IoU instead ("none" in Tables 3, 4; all of Table 2)


TINY = retinanet.TINY


@dataclass
class Settings(retinanet.Settings):
    """IoU-aware RetinaNet with ResNet-50 on COCO: Table 1."""

    tiny = TINY

    model: Model = field(default_factory=Model)
    test: Test = field(default_factory=Test)


# ------------------------------------------------------------------------------ equations


def detection_confidence(cls_probs: Tensor, iou_probs: Tensor, alpha: float | None) -> Tensor:
    """Eq. 5: the score that ranks a box. With alpha None it is the plain product p * IoU.

        S_det = p^alpha * IoU^(1 - alpha)

    alpha = 1 gives cls_probs and alpha = 0 gives iou_probs, exactly. Shapes broadcast.

    >>> detection_confidence(torch.tensor([0.25, 0.25]), torch.tensor([1.0, 0.04]), 0.5)
    tensor([0.5000, 0.1000])
    """
    if alpha is None:
        return cls_probs * iou_probs
    return cls_probs**alpha * iou_probs ** (1 - alpha)


def iou_prediction_loss(
    logits: Tensor, ious: Tensor, kind: str = "bce", beta: float = 0.11
) -> Tensor:
    """Eq. 3's loss of each positive, or one of Table 2's others: logits [P], ious [P] -> [P].

        bce   -(IoU log(q) + (1 - IoU) log(1 - q))     q = sigmoid(logit), the predicted IoU
        l2    (q - IoU)^2
        l1    |q - IoU|

    BCE is smallest at q = IoU, but not 0 there. The target may carry a gradient.

    >>> iou_prediction_loss(torch.zeros(1), torch.tensor([0.75]), "l2")
    tensor([0.0625])
    """
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(logits, ious, reduction="none")
    if kind == "smooth_l1":  # choice: the box loss's beta; 1 would give half of L2
        return F.smooth_l1_loss(logits.sigmoid(), ious, beta=beta, reduction="none")
    return {"l1": F.l1_loss, "l2": F.mse_loss}[kind](logits.sigmoid(), ious, reduction="none")


# ------------------------------------------------------------------------------ heads


class IoUBranch(nn.Conv2d):
    """The paper's addition: a 3x3 convolution predicts the IoU of each regressed anchor (3.1).

    It takes the last maps of any box tower: L maps [B, C, H, W] -> logits [B, N] with
    N = sum(H*W*A), level by level, cells row by row, anchor by anchor within a cell. Its
    weights start at N(0, 0.01), its bias at 0 (release): at first every IoU is close to 0.5.

    >>> branch = IoUBranch(in_channels=8, num_anchors=9)
    >>> branch([torch.rand(2, 8, 4, 4), torch.rand(2, 8, 2, 2)]).shape
    torch.Size([2, 180])
    """

    def __init__(self, in_channels: int = 256, num_anchors: int = 9):
        super().__init__(in_channels, num_anchors, 3, padding=1)
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]

    def forward(self, features: list[Tensor]) -> Tensor:  # type: ignore[override]
        convolve = super().forward
        maps = [convolve(f) for f in features]  # [B, A, H, W] each
        return torch.cat([m.permute(0, 2, 3, 1).flatten(1) for m in maps], 1).float()


class IoUAwareHead(RetinaTowers):
    """Figure 1: RetinaNet's towers, and an IoUBranch on the box tower.

    L maps -> cls_logits [B, N, K], deltas [B, N, 4], iou_logits [B, N]; N = sum(H*W*A).

    >>> head = IoUAwareHead(8, num_anchors=9, num_classes=3)
    >>> [t.shape for t in head([torch.rand(2, 8, 4, 4), torch.rand(2, 8, 2, 2)])]
    [torch.Size([2, 180, 3]), torch.Size([2, 180, 4]), torch.Size([2, 180])]
    """

    names = ("cls_logits", "deltas", "iou_logits")  # of forward's outputs

    def __init__(self, in_channels=256, num_anchors=9, num_classes=80, num_convs=4, groups=0):
        super().__init__(in_channels, num_anchors, num_classes, num_convs, groups)
        self.iou_logits = IoUBranch(in_channels, num_anchors)

    def forward(self, features: list[Tensor]) -> tuple:
        cls_logits, deltas, box_features = super().forward(features)
        return cls_logits, deltas, self.iou_logits(box_features)


# ------------------------------------------------------------------------------ losses


def iou_branch_loss(
    iou_logits: Tensor,
    boxes: Tensor,
    gt_boxes: Tensor,
    kind: str = "bce",
    beta: float = 0.11,
    move_boxes: bool = True,
    num_positives: Tensor | int | None = None,
) -> Tensor:
    """Eq. 3: the loss summed over P positives, divided by num_positives (default: P).

        L_IoU = (sum over positives of BCE(predicted IoU, IoU)) / N_pos

    iou_logits [P]; boxes [P, 4], as the network predicts them, and gt_boxes [P, 4]. With
    `move_boxes` the gradient also reaches `boxes`, through the IoU that is the target. BCE's
    derivative with respect to the target is -logit. Where the predicted IoU is above 0.5, the
    logit is positive, so the loss falls as the true IoU rises: the box moves towards its
    object. Where the predicted IoU is below 0.5, the box moves away from its object.

    >>> box = torch.tensor([[0., 0., 20., 10.]])
    >>> gt = torch.tensor([[5., 0., 15., 10.]])  # IoU 1/2
    >>> iou_branch_loss(torch.zeros(1), box, gt) / torch.tensor(2.0).log()
    tensor(1.)
    """
    ious = common.aligned_iou(boxes if move_boxes else boxes.detach(), gt_boxes)
    total = iou_prediction_loss(iou_logits, ious, kind, beta).sum()
    return total / (max(1, len(boxes)) if num_positives is None else num_positives)


# ------------------------------------------------------------------------------ detector


class Detector(retinanet.RetinaNet):
    """Figure 1: RetinaNet with one more loss and another score.

    `loss` and `outputs` are RetinaNet's (baselines/retinanet.py). `loss` adds `further_losses`
    to its own, and `candidates` ranks by `score`. `--no-iou-head` is the baseline.
    """

    settings: Model
    default_test = Test

    def __init__(self, model: Model, num_classes: int):
        super().__init__(model, num_classes, IoUAwareHead if model.iou_head else RetinaTowers)

    def further_losses(
        self, out: dict, positives: Positives, num_positives: Tensor
    ) -> dict[str, Tensor]:
        """`iou`: the last term of Eq. 4, a weighted scalar."""
        settings = self.settings
        if not settings.iou_head:
            return {}
        loss = iou_branch_loss(
            out["iou_logits"][positives.index],
            positives.boxes,
            positives.gt_boxes,
            kind=settings.iou_loss,
            beta=settings.box_beta,
            move_boxes=settings.iou_grad,
            num_positives=num_positives,
        )
        return {"iou": settings.iou_weight * loss}

    def score(self, probs: Tensor, outputs: dict, index: tuple, test: Test) -> Tensor:
        """Eq. 5: class probabilities [..., K] of the anchors `index` -> scores [..., K].

        This score chooses the boxes that enter NMS, and ranks them there and in AP.
        """
        if not self.settings.iou_head:
            return probs
        iou_probs = outputs["iou_logits"][index].sigmoid()
        alpha = None if test.product else test.alpha
        return detection_confidence(probs, iou_probs[..., None], alpha)

    def candidates(self, outputs: dict, test: retinanet.Test) -> dict[str, Tensor]:
        """RetinaNet's candidates by the fused score, with its two factors for inspection.

        -> boxes [N, 4]; scores, labels, image, anchor, cls_probs and iou_probs [N].
        """
        found = super().candidates(outputs, test)
        image, anchor = found["image"], found["anchor"]
        found["cls_probs"] = outputs["cls_logits"][image, anchor, found["labels"]].sigmoid()
        found["iou_probs"] = torch.ones_like(found["scores"])
        if self.settings.iou_head:
            found["iou_probs"] = outputs["iou_logits"][image, anchor].sigmoid()
        return found


def main(argv=None):
    return engine.run("iou_aware_retinanet", Settings, Detector, argv)


if __name__ == "__main__":
    main()
