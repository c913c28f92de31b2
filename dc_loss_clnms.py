"""DC loss, IAC score and CL-NMS: a detector's two tasks take account of each other.
Our copy of the paper has no title page, so we cannot name it. We know of no release.

Classifier and localiser share their features but look at different places. The localiser is
"more interested in the marginal details of an object", the classifier in its "specific robust
features". The paper calls this task spatial misalignment, names three harms and answers each:

Dynamic coefficient (DC) loss, 2.1. Shared features that serve one task well serve the other
    badly. So the worse a positive's box fits, the less its class loss counts: the features
    first learn the box, and then, once the box is good, the class.
IoU-classification-aware (IAC) score, 2.2. Anchors are labelled by IoU alone. On an object of
    irregular shape this misjudges anchors that overlap the box little but see enough of the
    object to classify it ("anchor label misjudgment"). So an anchor is also positive if it
    overlaps the object and already gives the object's class a high probability.
Classification-localisation balanced (CL) NMS, 2.3. NMS keeps the box with the best class
    score, which need not be the best box. "Based on the idea of bagging", the mean of the
    centres of all boxes on an object, weighted by score, stands for the object's centre. The
    box with the best sum of score and nearness to this centre is kept.

In our experiments (docs/results.md) the gain comes from DC loss. IAC does not raise AP: the
classifier already recognises the anchors that IAC adds. CL-NMS adds 0.1 AP at most.

    image -> ResNet-FPN -> P3..P7 -> two towers -> cls_logits [B, N, K], deltas [B, N, 4]
    training: label anchors by IoU and IAC score s -> weigh positives' class losses by lambda'
    test:     boxes with scores p over 0.05 -> CL-NMS, in each class: the box with the best p
              and all boxes that overlap it are a cluster. The cluster's box with the best
              p + d is kept. The boxes that are left form the next cluster.

    Eq. 1   L = (sum_pos L_cls + sum_neg L_cls + sum_pos L_reg) / N_pos   RetinaNet.loss
    Eq. 2   lambda = 1 / (error of the positive's box + eps)              dynamic_coefficient
    Eq. 3   lambda'_i = lambda_i sum_j L_j / sum_j lambda_j L_j           normalise_coefficient
    Eq. 4   L as in Eq. 1, with sum_pos lambda' L_cls                     ThreeProposals.weigh
    Eq. 5   label 1 if IoU > 0.5, 0 if IoU < 0.4, else ignored            match_anchors
    Eq. 6   s = p^alpha (inner / min_area)^(1 - alpha)                    iac_score
    Eq. 7   label 1 also if s > 0.5                                       iac_labels
    Eq. 8   c0 = sum p c / sum p, of the cluster's centres c              cl_nms_of_one_class
    Eq. 9   p + d, with d = 1 - |c - c0| / diagonal                       cl_nms_of_one_class

Our copy also lacks the displayed equations. We rebuilt and numbered them from the text, which
each function quotes. Three of our readings change the method most:
    The errors in lambda are divided by the object's size, so that large and small objects
    count alike. `--dc-error pixels` does not divide.
    s is a product of powers. `--iac-form sum` makes it a weighted sum.
    CL-NMS adds 1 - distance. The text adds the distance itself, which prefers the box farthest
    from the centre, against the paper's aim. `--cl-literal` follows the text.
docs/deviations.md lists all others. "(2.1)" is a section of the paper, "choice:" our own
decision where the text makes none. `--base gfl` is explained at the end of this file.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import common
import engine
import kernels
from baselines import gfl, retinanet
from baselines.retinanet import Assignment, OneStage, Positives
from engine import Amount, Share

# B images, K classes, A = 9 anchors per cell, N anchors per image
# P positive anchors of the whole batch, each with its object (gt)
# labels of anchors [B, N]: 1 positive, 0 negative, -1 ignored; classes 0..K-1, background K
# index: (image, anchor), two tensors that pick anchors of the batch, as in losses[index]


@dataclass
class Proposals:
    """The settings of DC loss and IAC score, on whichever detector they are used."""

    dc_loss: bool = True  # weigh the positives' class loss by the coefficient (2.1)
    dc_error: Literal["relative", "pixels"] = "relative"  # errors over the gt's size, or plain
    dc_eps: Amount = 0.1  # in the coefficient's denominator; choice: the paper has no number
    dc_normalise: bool = True  # keep the positives' total class loss (2.1)
    iac: bool = True  # anchors with a high IAC score are positive too (2.2)
    iac_alpha: Share = 0.75  # share of the class probability in the score (3.1)
    iac_threshold: Share = 0.5  # anchors with a higher score are positive (3.1)
    iac_form: Literal["product", "sum"] = "product"  # how the score combines its factors


@dataclass
class Model(Proposals, retinanet.Model):
    """RetinaNet with ResNet-50, DC loss and IAC score."""


@dataclass
class Test(retinanet.Test):
    """CL-NMS, and the kinds of NMS that it is compared with."""

    nms: Literal["plain", "soft", "cl"] = "cl"  # which NMS ends the detection (2.3, Table 3)
    cl_literal: bool = False  # CL-NMS adds the distance itself, as the text says
    soft_nms_iou: Share = 0.5  # linear soft-NMS acts above this overlap
    soft_nms_score: Share = 0.05  # linear soft-NMS drops boxes below this score
    readable: bool = False  # run cl_nms_of_one_class, the readable form, instead of its kernel


TINY = retinanet.TINY


@dataclass
class Settings(engine.Settings):
    """RetinaNet with ResNet-50 and all three proposals on COCO: Table 2, last row."""

    base: Literal["retinanet", "gfl"] = "retinanet"  # what is extended; gfl: without IAC (3.2)
    model: Model | ModelOnGFL = None
    test: Test = None
    run: engine.Run = None

    def __post_init__(self) -> None:
        """Fill in what is None: `base` decides these defaults."""
        on_gfl = self.base == "gfl"
        self.tiny = gfl.TINY if on_gfl else TINY
        self.model = self.model or (ModelOnGFL() if on_gfl else Model())
        self.test = self.test or (TestOnGFL() if on_gfl else Test())
        self.run = self.run or engine.Run(
            lr=0.01,
            clip_norm=0.0 if on_gfl else 35.0,  # as the bases do
            epochs=12.17,  # 90k steps of 16 of COCO's 118,287 images (3.1)
            drops=(67.5 / 90, 75 / 90),  # lr / 10 after 67.5k and 75k steps (3.1)
        )


# ------------------------------------------------------------------------------ DC loss (2.1)


def localisation_error(boxes: Tensor, gt_boxes: Tensor, form: str = "relative") -> Tensor:
    """The error e [P] of boxes [P, 4] against their gts [P, 4]; >= 0, and 0 for equal boxes.

        e = |c - c*| / sqrt(w* h*) + |w - w*| / w* + |h - h*| / h*

    c, w, h are the box's centre, width and height; a * marks those of its gt. The text names
    these three errors but no divisors. We divide them by the gt's size, so that e does not
    depend on scale; "pixels" does not divide.

    >>> gt = torch.tensor([[0., 0., 20., 20.]])
    >>> localisation_error(torch.tensor([[3., 4., 23., 34.]]), gt)  # off by 3, 9; h by 10
    tensor([0.9743])
    """
    size, gt_size = boxes[:, 2:] - boxes[:, :2], gt_boxes[:, 2:] - gt_boxes[:, :2]
    move = (boxes[:, :2] + boxes[:, 2:] - gt_boxes[:, :2] - gt_boxes[:, 2:]) / 2
    distance, change = move.norm(dim=1), (size - gt_size).abs()
    if form == "pixels":
        return distance + change.sum(1)
    gt_size = gt_size.clamp(min=1e-6)
    return distance / gt_size.prod(1).sqrt() + (change / gt_size).sum(1)


def dynamic_coefficient(
    boxes: Tensor, gt_boxes: Tensor, eps: float = 0.1, form: str = "relative"
) -> Tensor:
    """Eq. 2: how much the class loss of a positive counts, [P], at most 1 / eps.

        lambda = 1 / (e + eps)

    "A dynamic coefficient, which is the reciprocal of localization error", and eps "to ensure
    that the denominator cannot be 0". No gradient flows to `boxes`. Otherwise the network
    would learn to make worse boxes, because they lower the class loss. A padded row of zeros
    also gets a finite coefficient; the caller leaves it out.

    >>> box = torch.tensor([[0., 0., 10., 10.]])
    >>> dynamic_coefficient(torch.cat([box, box + 9]), torch.cat([box, box]))
    tensor([10.0000,  0.7284])
    """
    return 1 / (localisation_error(boxes.detach(), gt_boxes, form) + eps)


def normalise_coefficient(coefficient: Tensor, losses: Tensor) -> Tensor:
    """Eq. 3: the coefficients [P], scaled to keep the positives' total class loss as it is.

        lambda'_i = lambda_i * sum_j L_j / sum_j (lambda_j L_j)

    "To make sure that the value range of the overall loss function remains invariant, we then
    normalize the coefficient [lambda] by employing the classification loss function." The sum
    of lambda' L then equals the sum of L, so lambda' only changes the gradient. It must be a
    constant: with a gradient through lambda', the gradient would be that of the plain sum.

    >>> normalise_coefficient(torch.tensor([1., 3.]), torch.tensor([2., 2.]))
    tensor([0.5000, 1.5000])
    """
    losses = losses.detach()
    return coefficient * losses.sum() / (coefficient * losses).sum().clamp(min=1e-12)


# ------------------------------------------------------------------------------ IAC (2.2)


def iac_score(
    probs: Tensor, anchors: Tensor, gt_boxes: Tensor, alpha: float = 0.75, form="product"
) -> Tensor:
    """Eq. 6: the IAC score [...] of anchors and their gts; 0 where the two do not overlap.

        s = p^alpha * (inner / min_area)^(1 - alpha)             (form "product")
        s = alpha * p + (1 - alpha) * inner / min_area           (form "sum")

    The text names an "intersection area" (inner), a "minimum area between the i-th anchor and
    its corresponding ground truth" and an "adjustable weight" alpha. It says neither how these
    combine nor which factor alpha weighs; here alpha weighs p. For an anchor inside its gt,
    inner / min_area is 1, so the anchor is positive (s > 0.5) if p exceeds 0.40, or 1/3 with
    the sum. If alpha weighed the areas, 0.06 would be enough, and with the sum any p.

    probs [...]: the anchor's probability of its gt's class; anchors, gt_boxes [..., 4]. They
    broadcast. A caller that makes labels turns gradients off and leaves out the padding.

    >>> anchor, gt = torch.tensor([0., 0., 10., 10.]), torch.tensor([5., 0., 25., 20.])
    >>> [iac_score(torch.tensor(0.25), anchor, gt, 0.5, form) for form in ("product", "sum")]
    [tensor(0.3536), tensor(0.3750)]
    """
    corner = torch.maximum(anchors[..., :2], gt_boxes[..., :2])
    other_corner = torch.minimum(anchors[..., 2:], gt_boxes[..., 2:])
    inner = (other_corner - corner).clamp(min=0).prod(-1)
    area = (anchors[..., 2:] - anchors[..., :2]).prod(-1)
    gt_area = (gt_boxes[..., 2:] - gt_boxes[..., :2]).prod(-1)
    overlap = inner / torch.minimum(area, gt_area).clamp(min=1e-6)
    if form == "product":
        return probs**alpha * overlap ** (1 - alpha) * (overlap > 0)
    # choice: without the last factor an anchor could be positive for a gt it does not touch
    return (alpha * probs + (1 - alpha) * overlap) * (overlap > 0)


def iac_labels(labels: Tensor, scores: Tensor, threshold: float = 0.5) -> Tensor:
    """Eq. 7: the labels by IoU (1, 0, -1), set to 1 where the IAC score exceeds the threshold.

    The text says: 1 "in case IoU > fg_threshold or s > score_threshold", 0 "in case IoU <
    bg_threshold". If both conditions hold, the label is 1, because the score is there "to
    recall some anchors with low IoUs but extensive object information".

    >>> iac_labels(torch.tensor([1, 0, -1, 0]), torch.tensor([0.1, 0.6, 0.6, 0.5]), 0.5)
    tensor([1, 1, 1, 0])
    """
    return torch.where(scores > threshold, 1, labels)


# ------------------------------------------------------------------------------ CL-NMS (2.3)


def cl_nms_of_one_class(
    boxes: Tensor, scores: Tensor, iou_threshold: float = 0.5, literal: bool = False
) -> Tensor:
    """Eq. 8, 9: CL-NMS of boxes [N, 4] with scores p [N]: the indices kept, best score first.

        c0 = sum p_i c_i / sum p_i        d_i = 1 - |c_i - c0| / diagonal

    The box with the best p starts a cluster: itself and all remaining boxes whose IoU with it
    exceeds the threshold. c0 is the mean of their centres c, weighted by p, and approximates
    the object's centre. The diagonal is that of the box around the cluster. The box with the
    best p + d is kept, with its own p as final score; the rest of the cluster is dropped.
    Unless `--readable` is given, detection runs `kernels.cl_nms`, which does the same for all
    images and classes at once. Tests hold the two equal.

    >>> boxes = torch.tensor([[0., 0., 20., 20.], [3., 3., 23., 23.], [4., 4., 24., 24.]])
    >>> cl_nms_of_one_class(boxes, torch.tensor([0.70, 0.69, 0.68]), 0.4)  # NMS would keep 0
    tensor([1])
    """
    kept, left = [], torch.arange(len(boxes), device=boxes.device)
    while len(left):
        best = left[scores[left].argmax()]
        near = (common.aligned_iou(boxes[best], boxes[left]) > iou_threshold) | (left == best)
        cluster, left = left[near], left[~near]
        low, high, p = boxes[cluster, :2], boxes[cluster, 2:], scores[cluster]
        centres = (low + high) / 2
        centre = (p[:, None] * centres).sum(0) / p.sum()
        distance = (centres - centre).norm(dim=1) / (high.amax(0) - low.amin(0)).norm()
        d = distance if literal else 1 - distance
        kept.append(cluster[(p + d).argmax()])
    keep = torch.stack(kept) if kept else left
    return keep[scores[keep].argsort(descending=True, stable=True)]


def readable_cl_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, literal: bool = False
) -> tuple[Tensor, Tensor]:
    """`kernels.cl_nms` in readable form, group by group: the indices kept, their scores."""
    keep = groups.new_zeros(0)
    for group in groups.unique():
        members = (groups == group).nonzero()[:, 0]
        kept = cl_nms_of_one_class(boxes[members], scores[members], iou_threshold, literal)
        keep = torch.cat([keep, members[kept]])
    keep = keep.sort().values  # of equal scores, the lower index comes first, as in the kernel
    keep = keep[scores[keep].argsort(descending=True, stable=True)]
    return keep, scores[keep]


# ------------------------------------------------------------------------------ detector


class ThreeProposals(OneStage):
    """What the paper changes in a one-stage detector.

    `loss`, `outputs` and `candidates` are the base's (baselines/retinanet.py). `loss` calls
    `assign` and `weigh`; `detections` (engine/detector.py) calls `suppress`.
    """

    settings: Model | ModelOnGFL

    @torch.no_grad()
    def assign(self, out: dict, targets: list[dict]) -> Assignment:
        """The base's assignment, and the positives that the IAC score adds (2.2)."""
        assigned = super().assign(out, targets)
        return self.add_positives(out, assigned) if self.settings.iac else assigned

    def add_positives(self, out: dict, assigned: Assignment) -> Assignment:
        """Eq. 6, 7: anchors with a high IAC score become positive for their object."""
        settings, classes = self.settings, assigned.gt_labels[..., None]
        probs = out["cls_logits"].gather(2, classes)[..., 0].sigmoid()  # [B, N]
        alpha, form = settings.iac_alpha, settings.iac_form
        scores = iac_score(probs, out["anchors"], assigned.gt_boxes, alpha, form)
        scores = torch.where(common.inside_image(out["anchors"], out["sizes"]), scores, 0)
        labels = iac_labels(assigned.labels, scores, settings.iac_threshold)
        return dataclasses.replace(assigned, labels=labels)

    def weigh(self, losses: Tensor, positives: Positives) -> Tensor:
        """Eq. 4: the anchors' class losses [B, N]; lambda' multiplies those of positives."""
        if not self.settings.dc_loss:
            return losses
        weights = torch.ones_like(losses)
        weights[positives.index] = self.coefficients(losses[positives.index], positives)
        return losses * weights

    def coefficients(self, losses: Tensor, positives: Positives) -> Tensor:
        """lambda' [P] of positives with class losses [P]."""
        eps, form = self.settings.dc_eps, self.settings.dc_error
        coefficient = dynamic_coefficient(positives.boxes, positives.gt_boxes, eps, form)
        if self.settings.dc_normalise:
            coefficient = normalise_coefficient(coefficient, losses)
        return coefficient

    def suppress(
        self, boxes: Tensor, scores: Tensor, groups: Tensor, test: Any
    ) -> tuple[Tensor, Tensor]:
        """CL-NMS (2.3), soft-NMS or NMS: the indices kept, best first, and their final scores.

        boxes [N, 4], scores and groups [N]; boxes of different groups do not compete.
        """
        if test.nms == "plain":
            return super().suppress(boxes, scores, groups, test)
        if test.nms == "soft":  # choice: linear, with MMDetection's limits; the paper has none
            iou, lowest = test.soft_nms_iou, test.soft_nms_score
            return kernels.soft_nms(boxes, scores, groups, iou, lowest)
        cl_nms = readable_cl_nms if test.readable else kernels.cl_nms
        return cl_nms(boxes, scores, groups, test.nms_iou, literal=test.cl_literal)


class OnRetinaNet(ThreeProposals, retinanet.RetinaNet):
    """RetinaNet with DC loss, IAC score and CL-NMS."""

    settings: Model
    default_test = Test


# ------------------------------------------------------------------------------ on GFL

# The last row of Table 1 puts DC loss and CL-NMS on GFL (baselines/gfl.py), without IAC (3.2).
# The paper does not say how lambda' enters GFL's class loss. This loss already teaches a low
# score for a box that fits badly, and DC loss makes just these boxes count less.


@dataclass
class ModelOnGFL(Proposals, gfl.Model):
    """GFL with ResNet-50 and DC loss."""

    iac: bool = False  # anchors with a high IAC score are positive too (2.2); not on GFL (3.2)
    # which class losses of a positive lambda' multiplies: those of all classes (anchor, as on
    # RetinaNet; choice), or only the loss of its object's class (class)
    gfl_dc: Literal["anchor", "class"] = "anchor"


@dataclass
class TestOnGFL(Test):
    """CL-NMS at GFL's IoU."""

    nms_iou: Share = 0.6  # NMS per class suppresses above this IoU


class OnGFL(ThreeProposals, gfl.GFL):
    """GFL with DC loss and CL-NMS, where p is GFL's score for class and fit."""

    settings: ModelOnGFL
    default_test = TestOnGFL

    def weigh(self, losses: Tensor, positives: Positives) -> Tensor:
        """The anchors' QFL [B, N]; lambda' multiplies that of positives, or one term of it."""
        if not self.settings.dc_loss or self.settings.gfl_dc == "anchor":
            return super().weigh(losses, positives)
        quality = common.aligned_iou(positives.boxes.detach(), positives.gt_boxes)
        logits = positives.cls_logits.gather(1, positives.gt_labels[:, None])  # [P, 1]
        only_class = torch.zeros_like(positives.gt_labels)
        own = gfl.quality_focal_loss(logits, only_class, quality, self.settings.qfl_beta)
        more = (self.coefficients(own, positives) - 1) * own
        return losses.index_put(positives.index, more, accumulate=True)


def Detector(model: Model | ModelOnGFL, num_classes: int) -> ThreeProposals:
    """The three proposals on RetinaNet or on GFL, depending on the type of `model`."""
    if isinstance(model, ModelOnGFL):
        return OnGFL(model, num_classes)
    return OnRetinaNet(model, num_classes)


def main(argv=None):
    return engine.run("dc_loss_clnms", Settings, Detector, argv)


if __name__ == "__main__":
    main()
