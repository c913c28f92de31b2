"""DC loss, IAC score and CL-NMS: three places where RetinaNet's two tasks learn of each other.

Classifier and localiser want different features of one object. So: an anchor whose box is still bad
trains its class less (dynamic coefficient loss); an anchor that overlaps an object and is sure of
its class is a positive whatever its IoU (IoU-classification-aware assignment); and among boxes on
one object, the one near their weighted centre survives (classification-localisation balanced NMS).

    image -> ResNet-FPN -> P3..P7 -> two towers -> cls_logits [B, N, K], box_deltas [B, N, 4]
      assignment:  IoU >= 0.5 or s > 0.5 -> positive      s: IAC score of the anchor and its gt
      class loss:  positives weighted by lambda'          total over positives unchanged
      boxes -> per class: cluster around the best p -> keep the best p + d, drop the rest

Rows (COCO AP as printed in the paper; ours: not run, needs COCO and GPU days):
    table1.retinanet_r101 39.1   .r101 40.6   .retinanet_x101 40.8   .x101 42.2   (test-dev)
    table2.baseline 35.9   table2.iac 36.4   table2.iac_dc 37.1   table2.iac_dc_cl 37.5   (val 2017)
    table2.voc_baseline 78.2   .._iac 78.6   .._iac_dc 79.2   .._iac_dc_cl 79.7   (mAP, VOC 2007)
    table3.r50_nms 36.4   .r50_soft 36.5   .r50_cl 37.0   .r101_nms 38.5   .r101_soft 38.6   .r101_cl 39.0
    not yet: table1.fcos_gfl_x101_dcn 48.9 (FCOS with generalised focal loss, X-101-32x4d, DCN).
    Table 1's other lines are other detectors. A backbone's rows of Table 3 are one model:
    `--compare-nms`. The text says "RetinaNet", but 36.4 is not Table 2's baseline: it is its `iac`
    in AP, though not in AP50.

The displayed equations are lost in the text that we have. Rebuilt (each a function below):
    1. lambda = 1 / (e + eps), e = |c - c*| / sqrt(w* h*) + |w - w*| / w* + |h - h*| / h*   (2.1)
       "the reciprocal of localization error" of centres c, c* and sizes w, h, w*, h*; eps "to ensure
       that the denominator cannot be 0". Open: what divides the distances. Here the gt's size, which
       makes e free of scale; `--dc-error pixels` divides by nothing. eps = 0.1: `--dc-eps`.
    2. lambda'_i = lambda_i * sum_j L_j / sum_j (lambda_j L_j), L the positives' class losses   (2.1)
       "to make sure that the value range of the overall loss remains invariant, normalize lambda by
       employing the classification loss"; `--no-dc-normalise` leaves it out. lambda' is a constant
       for the gradient: were it not, the total would be the plain loss, gradient included.
       Total: (sum_pos lambda' L_cls + sum_neg L_cls + sum_pos L_reg) / N_pos.
    3. s = p^alpha (inner / min_area)^(1 - alpha), alpha = 0.75   (2.2)
       "intersection area", "minimum area between anchor and ground truth", "adjustable weight".
       p is that of the class of the anchor's best gt. Open: product or sum, and which factor has
       alpha. `--iac-form sum` is alpha p + (1 - alpha) inner / min_area; `--iac-alpha 0.25` the
       other reading. An anchor inside an object is then positive from p = 0.40 (product), 1/3
       (sum), 0.06 (product, other), or from step one whatever p (sum, other). p is that of the same
       step's forward pass, without gradient.
    4. y = 1 if IoU > 0.5 or s > 0.5; 0 if IoU < 0.4; else ignored   (2.2, printed)
       Where the first two lines meet, the first counts: "to recall some anchors with low IoUs".
       s only adds positives: a gt also keeps its best anchor, as in the baseline. All positives
       train both tasks and count in N_pos.
    5. centre = sum p_i c_i / sum p_i over the cluster; s_nms = p + d   (2.3)
       "the normalized Euclidean distance" to the centre is "the localization score" and is added.
       Adding the distance would prefer the farthest box, against the aim; so d = 1 - distance /
       diagonal of the cluster's enclosing box. `--cl-literal` adds the distance. The kept box's
       final score is its own p. See kernels/nms.py.

Deviations (paper | MMDetection's RetinaNet, its baseline | here):
    Number of positives: N | each image counts at least one | the latter.
    IoU = 0.5 exactly: not positive | positive | the latter, as in the baseline.
    A gt's best anchor, IoU up to 0.5: by formula 4 | positive | the latter.
    Table 1's X-101 with RetinaNet: ResNeXt-101, no more | - | 32x8d.
    P7: - | no ReLU between P6 and P7 | the latter. Anchors: - | "+1" box sizes, rounded | neither.
    Boxes that enter NMS: - | all classes of a level's best 1000 anchors | its best 1000 (anchor,
        class) pairs, RetinaNet's own rule: the rest rarely reach the best 100 and cost most of NMS;
        `--all-classes` is the latter.
    Anchors in the batch's padding and in crowd regions: - | plain background | do not train.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import common
import kernels

# B images, K classes, A = 9 anchors per cell, N anchors per image, G ground-truth boxes
# P positive anchors of the whole batch; R anchors kept for prediction
# labels of anchors [B, N]: 1 positive, 0 negative, -1 ignored; classes 0..K-1, background K
# each anchor's own gt (the one it overlaps most): gt_boxes [B, N, 4], gt_labels [B, N]


@dataclass
class Config(common.Config):
    """RetinaNet with ResNet-50 and all three proposals on COCO: Table 2, last row."""

    dc_loss: bool = True  # weigh the positives' class loss by the coefficient (2.1)
    dc_error: Literal["relative", "pixels"] = "relative"  # distances over the gt's size, or as are
    dc_eps: float = 0.1  # of the coefficient's denominator; not printed
    dc_normalise: bool = True  # keep the positives' total class loss (2.1)
    iac: bool = True  # also positive: anchors of a high IAC score (2.2)
    iac_alpha: float = 0.75  # share of the class probability in it (3.1)
    iac_threshold: float = 0.5  # anchors of a higher IAC score are positive (3.1)
    iac_form: Literal["product", "sum"] = "product"  # how its two factors meet
    nms: Literal["plain", "soft", "cl"] = "cl"  # which NMS ends the detection (2.3, Table 3)
    nms_iou: float = 0.5  # plain and CL-NMS, per class, suppress above this IoU
    cl_literal: bool = False  # CL-NMS adds the distance itself, as the text says
    soft_nms_iou: float = 0.5  # linear soft-NMS: overlap above which it acts
    soft_nms_score: float = 0.05  # linear soft-NMS drops boxes whose score falls below
    cls_weight: float = 1.0  # weight of the focal loss
    box_weight: float = 1.0  # weight of the box loss
    focal_alpha: float = 0.25  # focal loss: weight of the true class
    focal_gamma: float = 2.0  # focal loss: exponent
    box_beta: float = 0.11  # smooth L1 is quadratic below
    fg_iou: float = 0.5  # anchors are positive from this IoU on (3.1)
    bg_iou: float = 0.4  # anchors are negative below this IoU (3.1)
    tower_convs: int = 4  # convolutions in each tower
    tower_groups: int = 0  # groups of a GroupNorm after each of them; 0: no norm
    anchor_scale: float = 4.0  # anchors' side in strides, times 2^(0, 1/3, 2/3)
    score_threshold: float = 0.05  # only (anchor, class) pairs above it are boxes
    top_scores: int = 1000  # (anchor, class) pairs per level that are decoded
    all_classes: bool = False  # all classes of so many anchors instead of so many pairs
    max_detections: int = 100  # detections kept per image
    compare_nms: bool = False  # score --weights under plain, soft and CL-NMS in one pass
    analyze: bool = False  # correlation of score and IoU of the boxes that enter NMS
    lr: float = 0.01  # learning rate for 16 images a step (3.1)
    epochs: float = 12.17  # passes over the data: 90k steps of 16 of COCO's 118,287 images (3.1)
    drops: tuple[float, ...] = (0.75, 75 / 90)  # lr / 10 at these fractions: 67.5k, 75k (3.1)
    clip_norm: float = 35.0  # largest gradient norm (choice: as in the IoU-aware release)


# ------------------------------------------------------------------------------ equations


def localisation_error(boxes: Tensor, gt_boxes: Tensor, form: str = "relative") -> Tensor:
    """e of formula 1 for P pairs [P, 4]: distance of centres plus differences of width and height.

    "relative" divides them by the gt's sqrt(w h), w and h, "pixels" by nothing. >= 0; 0: equal boxes.

    >>> gt = torch.tensor([[0., 0., 20., 20.]])
    >>> localisation_error(torch.tensor([[3., 4., 23., 34.]]), gt)  # centre moved by 3, 9; h by 10
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
    """Formula 1: lambda [P] = 1 / (e + eps), at most 1 / eps, without gradient.

    >>> box = torch.tensor([[0., 0., 10., 10.]])
    >>> dynamic_coefficient(torch.cat([box, box + 9]), torch.cat([box, box]))
    tensor([10.0000,  0.7284])
    """
    return 1 / (localisation_error(boxes.detach(), gt_boxes, form) + eps)


def normalise_coefficient(coefficient: Tensor, losses: Tensor) -> Tensor:
    """Formula 2: lambda' [P], with sum(lambda' losses) = sum(losses); without gradient.

    >>> normalise_coefficient(torch.tensor([1., 3.]), torch.tensor([2., 2.]))
    tensor([0.5000, 1.5000])
    """
    losses = losses.detach()
    return coefficient * losses.sum() / (coefficient * losses).sum().clamp(min=1e-12)


def iac_score(
    probs: Tensor, anchors: Tensor, gt_boxes: Tensor, alpha: float = 0.75, form: str = "product"
) -> Tensor:
    """Formula 3: probs^alpha (inner / min_area)^(1 - alpha), or their weighted sum: [...].

    probs [...]: the anchor's probability of its gt's class; anchors, gt_boxes [..., 4] broadcast.
    0 where anchor and gt do not meet. An anchor inside its gt, or around it, has inner / min_area 1.
    Keeps probs' gradient; labels are made without.

    >>> anchor, gt = torch.tensor([0., 0., 10., 10.]), torch.tensor([5., 0., 25., 20.])
    >>> [iac_score(torch.tensor(0.25), anchor, gt, 0.5, form) for form in ("product", "sum")]
    [tensor(0.3536), tensor(0.3750)]
    """
    corner = torch.maximum(anchors[..., :2], gt_boxes[..., :2])
    other = torch.minimum(anchors[..., 2:], gt_boxes[..., 2:])
    inner = (other - corner).clamp(min=0).prod(-1)
    areas = ((b[..., 2:] - b[..., :2]).prod(-1) for b in (anchors, gt_boxes))
    overlap = inner / torch.minimum(*areas).clamp(min=1e-6)
    if form == "product":
        return probs**alpha * overlap ** (1 - alpha) * (overlap > 0)
    # choice: without the last factor a sure anchor would be positive for a gt it never touches
    return (alpha * probs + (1 - alpha) * overlap) * (overlap > 0)


def iac_labels(labels: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Formula 4: labels (1, 0, -1) by IoU -> 1 also where the IAC score exceeds the threshold.

    >>> iac_labels(torch.tensor([1, 0, -1, 0]), torch.tensor([0.1, 0.6, 0.6, 0.5]), 0.5)
    tensor([1, 1, 1, 0])
    """
    return torch.where(scores > threshold, 1, labels)


# ------------------------------------------------------------------------------ losses


def dynamic_weights(focal: Tensor, at, boxes: Tensor, gt_boxes: Tensor, config: Config) -> Tensor:
    """Weight [B, N] of each anchor's class loss `focal` [B, N]: lambda' of the positives, else 1.

    at = (image [P], anchor [P]) are the positives; boxes, gt_boxes [P, 4] theirs, decoded.
    """
    weights = torch.ones_like(focal)  # no gradient
    coefficient = dynamic_coefficient(boxes, gt_boxes, config.dc_eps, config.dc_error)
    if config.dc_normalise:  # choice: over the images of one process
        coefficient = normalise_coefficient(coefficient, focal[at])
    weights[at] = coefficient.to(weights.dtype)
    return weights


# ------------------------------------------------------------------------------ detector


class Detector(common.RetinaNet):
    """RetinaNet with the three proposals. For the other methods see common.py."""

    def loss(self, images: list[Tensor], targets: list[dict]) -> dict[str, Tensor]:
        config, out = self.config, self.outputs(images)
        anchors, cls_logits = out["anchors"], out["cls_logits"]
        labels, gt_boxes, gt_labels = self.assign(out, targets)
        num = common.count_positives(labels)
        classes = common.class_targets(labels, gt_labels, self.num_classes)
        focal = common.focal_loss(
            cls_logits.flatten(0, 1), classes.flatten(), config.focal_alpha, config.focal_gamma
        ).view_as(labels)
        at = (labels == 1).nonzero(as_tuple=True)  # image [P], anchor [P]: the host waits here
        deltas, anchors, gt_boxes = out["deltas"][at], anchors[at[1]], gt_boxes[at]  # [P, 4] each
        wanted = common.encode_boxes(anchors, gt_boxes)
        box = F.smooth_l1_loss(deltas, wanted, beta=config.box_beta, reduction="sum")
        if config.dc_loss:
            boxes = common.decode_boxes(anchors, deltas)
            focal = focal * dynamic_weights(focal.detach(), at, boxes, gt_boxes, config)
        return {"cls": config.cls_weight * focal.sum() / num, "box": config.box_weight * box / num}

    @torch.no_grad()
    def assign(self, out: dict, targets: list[dict]) -> tuple[Tensor, Tensor, Tensor]:
        """labels [B, N], and each anchor's gt: boxes [B, N, 4] and class [B, N] (2.2)."""
        config, anchors = self.config, out["anchors"]
        labels, gt_boxes, gt_labels = common.match_anchors(
            anchors, out["sizes"], targets, config.fg_iou, config.bg_iou
        )
        if config.iac:
            probs = out["cls_logits"].gather(2, gt_labels[..., None])[..., 0].sigmoid()
            scores = iac_score(probs, anchors, gt_boxes, config.iac_alpha, config.iac_form)
            scores = torch.where(common.inside_image(anchors, out["sizes"]), scores, 0)
            labels = iac_labels(labels, scores, config.iac_threshold)
        return labels, gt_boxes, gt_labels

    def suppress(self, boxes: Tensor, scores: Tensor, groups: Tensor, config: Config):
        """2.3 and what it is compared with: indices kept, best first, and their final scores."""
        if config.nms == "soft":  # choice: linear, the paper does not say; MMDetection's limits
            limits = dict(iou_threshold=config.soft_nms_iou, score_threshold=config.soft_nms_score)
            return kernels.soft_nms(boxes, scores, groups, **limits)
        if config.nms == "plain":
            return super().suppress(boxes, scores, groups, config)
        literal = config.cl_literal
        keep, _ = kernels.cl_nms(boxes, scores, groups, config.nms_iou, literal=literal)
        return keep, scores[keep]


# ------------------------------------------------------------------------------ comparison


def compare_nms(model: Detector, val_data, config: Config, device, out: Path) -> dict[str, dict]:
    """Table 3: plain, soft and CL-NMS on the same boxes, from one forward pass: compare_nms.json."""
    configs = {nms: replace(config, nms=nms, cl_literal=False) for nms in ("plain", "soft", "cl")}
    configs["cl, literal"] = replace(config, nms="cl", cl_literal=True)
    return common.study("compare_nms", model, configs, val_data, config, device, out)


def analyze(model: Detector, val_data, config: Config, device, out: Path) -> dict:
    """Does the score follow the IoU? Over the boxes that enter NMS: analyze.json.

    IoU is that with the best gt of the box's class, `matched` where at least 0.5.
    """
    found = common.candidates_with_iou(model, val_data, config, device)
    pairs = [torch.zeros(2, 0), *(torch.stack([c["scores"], c["iou"]]) for _, c in found)]
    points = torch.cat(common.gather(torch.cat(pairs, 1)), 1)  # [2, n]
    matched = points[:, points[1] >= 0.5]
    summary = {"candidates": points.shape[1], "matched": matched.shape[1]}
    both = {"matched": matched, "all": points}
    summary["class score"] = {k: common.correlation(*p) for k, p in both.items()}
    common.say(f"class score against IoU: {summary['class score']}")
    if common.rank_and_world()[0] == 0:
        common.write_json(out / "analyze.json", summary)
    return summary


# ------------------------------------------------------------------------------ rows

_PLAIN = dict(iac=False, dc_loss=False, nms="plain")
_STEPS = {  # Table 2 adds one proposal after the other
    "baseline": _PLAIN,
    "iac": dict(dc_loss=False, nms="plain"),
    "iac_dc": dict(nms="plain"),
    "iac_dc_cl": dict(),
}
# 12k steps of 16 of VOC's 16,551 images, a drop after 9k (3.1); choice: MMDetection's image size
# for VOC, the paper has none
_VOC = dict(epochs=11.6, drops=(0.75,), scales=(600,), test_scales=(600,), max_size=1000)
_180K = dict(epochs=24.35)  # drops after 135k and 150k: the same fractions (3.1)
_BACKBONES = {"r50": "resnet50", "r101": "resnet101"}
_X101 = dict(backbone="resnext101_32x8d", **_180K)  # choice: 32x4d is said of the last row alone

# table1.retinanet_*: the numbers are cited from RetinaNet's paper, of its own schedule; here they
# get the same training as the rows that they are compared with.
# One training each: table2.iac_dc, .iac_dc_cl and extra.cl_literal (CL-NMS only tests);
# table2.voc_iac_dc and .voc_iac_dc_cl; table3.r50_* and table2.baseline; table3.r101_*.
ROWS: dict[str, dict] = {
    "table1.retinanet_r101": dict(backbone="resnet101", **_180K, **_PLAIN),
    "table1.r101": dict(backbone="resnet101", **_180K),
    "table1.retinanet_x101": dict(**_X101, **_PLAIN),
    "table1.x101": dict(**_X101),
    **{f"table2.{k}": dict(v) for k, v in _STEPS.items()},
    **{f"table2.voc_{k}": dict(_VOC, **v) for k, v in _STEPS.items()},
    **{
        f"table3.{k}_{name}": dict(backbone=backbone, iac=False, dc_loss=False, nms=nms)
        for k, backbone in _BACKBONES.items()
        for name, nms in (("nms", "plain"), ("soft", "soft"), ("cl", "cl"))
    },
    "extra.dc": dict(iac=False, nms="plain"),
    "extra.dc_unnormalised": dict(iac=False, nms="plain", dc_normalise=False),
    "extra.iac_sum": dict(dc_loss=False, nms="plain", iac_form="sum"),
    "extra.cl_literal": dict(cl_literal=True),
}

_AP = ("AP", "AP50", "AP75", "APs", "APm", "APl")
PAPER: dict[str, dict] = {
    "table1.retinanet_r101": dict(zip(_AP, (39.1, 59.1, 42.3, 21.8, 42.7, 50.2))),
    "table1.r101": dict(zip(_AP, (40.6, 60.2, 43.5, 23.9, 43.9, 51.1))),
    "table1.retinanet_x101": dict(zip(_AP, (40.8, 61.1, 44.1, 24.1, 44.2, 51.2))),
    "table1.x101": dict(zip(_AP, (42.2, 62.5, 45.1, 25.5, 44.9, 52.3))),
    "table1.fcos_gfl_x101_dcn": dict(zip(_AP, (48.9, 67.8, 53.2, 30.0, 52.2, 61.7))),
    "table2.baseline": dict(zip(_AP, (35.9, 56.1, 38.6))),
    "table2.iac": dict(zip(_AP, (36.4, 56.5, 39.1))),
    "table2.iac_dc": dict(zip(_AP, (37.1, 56.3, 39.7))),
    "table2.iac_dc_cl": dict(zip(_AP, (37.5, 56.9, 40.0))),
    "table2.voc_baseline": dict(mAP=78.2),
    "table2.voc_iac": dict(mAP=78.6),
    "table2.voc_iac_dc": dict(mAP=79.2),
    "table2.voc_iac_dc_cl": dict(mAP=79.7),
    "table3.r50_nms": dict(zip(_AP, (36.4, 55.5, 39.0))),
    "table3.r50_soft": dict(zip(_AP, (36.5, 55.7, 39.0))),
    "table3.r50_cl": dict(zip(_AP, (37.0, 56.2, 39.3))),
    "table3.r101_nms": dict(zip(_AP, (38.5, 57.6, 41.0))),
    "table3.r101_soft": dict(zip(_AP, (38.6, 57.5, 41.4))),
    "table3.r101_cl": dict(zip(_AP, (39.0, 58.0, 41.6))),
    "extra.dc": {},
    "extra.dc_unnormalised": {},
    "extra.iac_sum": {},
    "extra.cl_literal": {},
}

NOT_YET: dict[str, str] = {
    # its baseline, without DC loss and CL-NMS, is GFL's own 48.2; IAC is not used
    "table1.fcos_gfl_x101_dcn": "needs FCOS with generalised focal loss and ResNeXt-101-32x4d-DCN",
}

TINY = dict(
    common.TINY,
    tower_convs=2,
    tower_groups=8,
    anchor_scale=3.0,
    epochs=2.0,  # one-stage detectors learn slowly from nothing
)


def main(argv=None):
    return common.run(
        "dc_loss_clnms", Config, Detector, ROWS, PAPER, NOT_YET, TINY, argv, kind="one_stage",
        actions={"compare_nms": compare_nms, "analyze": analyze},
    )  # fmt: skip


if __name__ == "__main__":
    main()
