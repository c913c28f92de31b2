"""RetinaNet (Lin et al., ICCV 2017): classify and regress every anchor, easy ones weigh little.
Paper: https://arxiv.org/abs/1708.02002   Followed here: MMDetection's RetinaNet, the baseline of
IoU-aware RetinaNet and of DC loss.

A one-stage detector has no proposals: it judges some 200,000 anchors of an 800 x 1333 image, and
nearly all of them are background that it soon knows to be background. Each has a small loss, but
their sum would drown that of the few anchors on objects. Focal loss multiplies an anchor's cross
entropy by (1 - p)^gamma, p the probability of the right answer: what is known hardly counts.

    image -> ResNet-FPN -> P3..P7, nine anchors per cell: three sizes, three shapes
      class tower, 4 convs -> cls_logits [B, N, K]    a sigmoid per class, no background class
      box tower, 4 convs   -> deltas     [B, N, 4]    how the anchor moves and grows
    training: an anchor is positive from IoU 0.5 with an object on, negative below 0.4, ignored
              between; an object's best anchor is always positive
              loss = (sum of all anchors' focal losses + sum of positives' smooth L1) / N_pos
    test:     best 1000 (anchor, class) pairs of each level over 0.05 -> boxes -> NMS per class ->
              best 100

Each tower is shared by the levels. A method changes RetinaNet at five places: which anchors are
positive (`assign`), how much a positive counts in the class loss (`weigh`), what else is learned
(`further_losses`), what score ranks a box (`score`), all below, and who survives NMS (`suppress`).

In comments "(MMDetection)" is a value seen there, "choice:" our own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import engine
import kernels
from common import Amount, Natural, Share, Whole
from engine.detector import BaseDetector

# B images, K classes, L levels, A = 9 anchors per cell, N anchors per image, P positives of a batch
# anchors [N, 4] are the same for all images of a batch; sizes [B, 2]: the images' (h, w)
# labels of anchors [B, N]: 1 positive, 0 negative, -1 ignored; classes 0..K-1, background K
# index: (image, anchor), two tensors that pick anchors of the batch, as in cls_logits[index]


@dataclass
class Config(engine.Config):
    """RetinaNet with ResNet-50 on COCO."""

    cls_weight: Amount = 1.0  # weight of the focal loss
    box_weight: Amount = 1.0  # weight of the box loss
    focal_alpha: Share = 0.25  # focal loss: weight of the true class
    focal_gamma: Amount = 2.0  # focal loss: exponent
    box_beta: Amount = 0.11  # smooth L1 is quadratic below (MMDetection)
    fg_iou: Share = 0.5  # anchors are positive from this IoU on
    bg_iou: Share = 0.4  # anchors are negative below this IoU
    tower_convs: Natural = 4  # convolutions in each tower
    tower_groups: Whole = 0  # groups of a GroupNorm after each of them; 0: no norm
    p2: bool = False  # choice: P2..P6 (P6 is P5 subsampled) in place of P3..P7 (tiny preset)
    anchor_scale: Amount = 4.0  # anchors' side in strides, times 2^(0, 1/3, 2/3)
    score_threshold: Share = 0.05  # lowest score that is looked at
    top_scores: Natural = 1000  # (anchor, class) pairs per level that are decoded, by score
    all_classes: bool = False  # all classes of so many anchors instead of so many pairs
    nms_iou: Share = 0.5  # NMS per class suppresses above this IoU
    max_detections: Natural = 100  # detections kept per image
    lr: Amount = 0.01  # learning rate for 16 images a step
    clip_norm: Amount = 35.0  # largest gradient norm (MMDetection)


# ------------------------------------------------------------------------------ head


def conv_tower(channels: int, num_convs: int, groups: int, bias: bool = True) -> nn.Sequential:
    """3x3 convolutions, each with a GroupNorm (none if `groups` is 0) and a ReLU."""
    layers: list[nn.Module] = []
    for _ in range(num_convs):
        layers.append(nn.Conv2d(channels, channels, 3, padding=1, bias=bias))
        layers += [nn.GroupNorm(groups, channels)] if groups else []
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def init_towers(head: nn.Module) -> None:
    """N(0, 0.01), and classes at probability 0.01: first steps are not all about background."""
    for layer in head.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    nn.init.constant_(head.cls_logits.bias, -math.log((1 - 0.01) / 0.01))


class RetinaTowers(nn.Module):
    """RetinaNet's head: two towers of 3x3 convolutions, shared by the levels, then predictions.

    L maps -> cls_logits [B, N, K], deltas [B, N, 4], and the box tower's last L maps, from which
    another head can predict more; N = sum(H*W*A). `groups`: of a GroupNorm after each tower
    convolution, 0 for none as in the papers. Training from nothing needs it: at N(0, 0.01) a narrow
    tower passes almost no signal on.
    """

    names = ("cls_logits", "deltas", "box_features")  # of what forward returns

    def __init__(self, in_channels=256, num_anchors=9, num_classes=80, num_convs=4, groups=0):
        super().__init__()
        self.num_classes = num_classes
        self.cls_tower = conv_tower(in_channels, num_convs, groups)
        self.box_tower = conv_tower(in_channels, num_convs, groups)
        self.cls_logits = nn.Conv2d(in_channels, num_anchors * num_classes, 3, padding=1)
        self.box_deltas = nn.Conv2d(in_channels, num_anchors * 4, 3, padding=1)
        init_towers(self)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        box_features = [self.box_tower(f) for f in features]
        logits = [self.cls_logits(self.cls_tower(f)) for f in features]
        deltas = [self.box_deltas(f) for f in box_features]
        logits = common.flatten_levels(logits, self.num_classes).float()
        return logits, common.flatten_levels(deltas, 4).float(), box_features


# ------------------------------------------------------------------------------ anchors, matching


def retina_anchors(features: list[Tensor], strides, scale: float = 4.0):
    """RetinaNet's nine anchors a cell (three octave scales, three ratios): [N, 4], N per level."""
    shapes = [f.shape[-2:] for f in features]
    scales = [scale * 2 ** (octave / 3) for octave in range(3)]
    anchors = common.make_anchors(shapes, strides, scales, (0.5, 1.0, 2.0), features[0].device)
    return anchors, [9 * h * w for h, w in shapes]


def match_anchors(
    anchors: Tensor, sizes: Tensor, targets: list[dict], high: float = 0.5, low: float = 0.4
) -> tuple[Tensor, Tensor, Tensor]:
    """RetinaNet's assignment: labels [B, N] (1, 0, -1), gt boxes [B, N, 4], gt classes [B, N].

    Positive from IoU `high` on, negative below `low`, ignored between. Every gt keeps its best
    anchor, whatever its IoU. Anchors whose centre is in the padding do not train. An anchor's gt is
    the one that it overlaps most, or the one whose best anchor it is; both are zeros where an image
    has no gt but crowds.
    """
    gt_boxes, gt_labels, valid, ignore = common.pad_targets(targets)
    inside = common.inside_image(anchors, sizes)
    visible = anchors * inside[..., None]  # in the padding: no area, so nobody's best anchor
    labels, gt, _ = common.match(visible, gt_boxes, high, low, valid, ignore, low_quality=0.0)
    labels[~inside] = -1
    gt_boxes = gt_boxes * valid[..., None]  # who meets no gt is given the first, maybe a crowd
    image = torch.arange(len(labels), device=labels.device)[:, None]
    return labels, gt_boxes[image, gt], gt_labels[image, gt]


def class_targets(labels: Tensor, gt_labels: Tensor, num_classes: int) -> Tensor:
    """labels (1, 0, -1) and the classes of their gts -> what `focal_loss` takes: 0..K-1, K, -1."""
    return torch.where(labels == 1, gt_labels, torch.where(labels == 0, num_classes, -1))


def count_positives(labels: Tensor) -> Tensor:
    """RetinaNet's normaliser: positives of labels [B, N], at least one an image (MMDetection)."""
    return common.shared_count((labels == 1).sum(1).clamp(min=1).sum())


# ------------------------------------------------------------------------------ losses


class Positives(NamedTuple):
    """The P positive anchors of a batch, each with its prediction and its ground truth."""

    index: tuple[Tensor, Tensor]  # image [P], anchor [P]
    anchors: Tensor  # [P, 4]
    deltas: Tensor  # [P, 4] predicted
    gt_boxes: Tensor  # [P, 4]

    def boxes(self) -> Tensor:
        """The predicted boxes [P, 4]."""
        return common.decode_boxes(self.anchors, self.deltas)


def box_loss(
    deltas: Tensor,
    anchors: Tensor,
    gt_boxes: Tensor,
    beta: float = 0.11,
    num_positives: Tensor | int | None = None,
) -> Tensor:
    """Smooth L1 of P positives' deltas, summed, over num_positives (default: P): a scalar.

    deltas, anchors, gt_boxes [P, 4]. The deltas learned are those that move an anchor onto its gt.
    """
    gt_deltas = common.encode_boxes(anchors, gt_boxes)
    total = F.smooth_l1_loss(deltas, gt_deltas, beta=beta, reduction="sum")
    return total / (max(1, len(deltas)) if num_positives is None else num_positives)


# ------------------------------------------------------------------------------ boxes for NMS


def best_predictions(
    best: Tensor, score, per_level: list[int], most: int, threshold: float, all_classes: bool
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """The `most` (anchor, class) pairs of each level and image whose scores exceed the threshold.

    best [B, N] is each anchor's highest score; score(index) gives all K of the anchors that index,
    (image [B, 1], anchor [B, M]), picks: [B, M, K]. The best `most` pairs lie on the best `most`
    anchors, so the scores of the others are never computed. With `all_classes` the limit is of
    anchors: all their classes over the threshold count.
    -> index (image, anchor), label, score; each tensor [number of pairs].
    """
    image = torch.arange(len(best), device=best.device)[:, None]  # [B, 1]
    anchors, labels, values = [], [], []
    start = 0  # of the level, among the N anchors
    for count in per_level:
        top, anchor = best[:, start : start + count].topk(min(count, most), dim=1)
        anchor = anchor + start  # [B, M]
        scores = torch.where(top[..., None] > threshold, score((image, anchor)), 0)  # [B, M, K]
        num_pairs = scores[0].numel()
        kept = num_pairs if all_classes else min(num_pairs, most)
        value, pair = scores.flatten(1).topk(kept, dim=1)  # [B, kept]
        anchors.append(anchor.gather(1, pair // scores.shape[-1]))
        labels.append(pair % scores.shape[-1])
        values.append(value)
        start += count
    scores = torch.cat(values, 1)
    image, slot = (scores > threshold).nonzero(as_tuple=True)
    anchor = torch.cat(anchors, 1)[image, slot]
    return (image, anchor), torch.cat(labels, 1)[image, slot], scores[image, slot]


# ------------------------------------------------------------------------------ detector


class RetinaNet(BaseDetector):
    """RetinaNet, and what methods change of it: `assign`, `weigh`, `further_losses`, `score`.

    `head` is RetinaTowers or like it: its `names` say what its forward returns, among which
    cls_logits and deltas. For `finish`, `predict` and the two configs see engine/detector.py.
    """

    def __init__(self, config: Config, num_classes: int, head: type[nn.Module] = RetinaTowers):
        super().__init__(config, num_classes, extra="pool" if config.p2 else "conv")
        towers = (config.tower_convs, config.tower_groups)
        self.head = head(config.fpn_channels, 9, num_classes, *towers)
        self.to(memory_format=torch.channels_last)

    def loss(self, images: list[Tensor], targets: list[dict]) -> dict[str, Tensor]:
        config, out = self.config, self.outputs(images)
        labels, gt_boxes, gt_labels = self.assign(out, targets)
        num_positives = count_positives(labels)
        focal = kernels.focal_loss(
            out["cls_logits"].flatten(0, 1),
            class_targets(labels, gt_labels, self.num_classes).flatten(),
            config.focal_alpha,
            config.focal_gamma,
        )
        index = (labels == 1).nonzero(as_tuple=True)  # the host waits here, for P
        anchors = out["anchors"][index[1]]
        positives = Positives(index, anchors, out["deltas"][index], gt_boxes[index])
        focal = self.weigh(focal.view_as(labels), positives)
        boxes = (positives.deltas, anchors, positives.gt_boxes)
        box = box_loss(*boxes, config.box_beta, num_positives)
        return {
            "cls": config.cls_weight * focal.sum() / num_positives,
            "box": config.box_weight * box,
            **self.further_losses(out, positives, num_positives),
        }

    @torch.no_grad()
    def assign(self, out: dict, targets: list[dict]) -> tuple[Tensor, Tensor, Tensor]:
        """labels [B, N], and each anchor's gt: boxes [B, N, 4] and classes [B, N]."""
        thresholds = (self.config.fg_iou, self.config.bg_iou)
        return match_anchors(out["anchors"], out["sizes"], targets, *thresholds)

    def weigh(self, focal: Tensor, positives: Positives) -> Tensor:
        """The anchors' class losses [B, N], weighted."""
        return focal

    def further_losses(self, out: dict, positives: Positives, num_positives: Tensor) -> dict:
        """Losses beside class and box: name -> weighted scalar."""
        return {}

    def outputs(self, images: list[Tensor]) -> dict:
        """By their `names` what the head returns; anchors [N, 4], N per_level, sizes [B, 2]."""
        batch, sizes = common.pad_images(images)
        features = self.backbone(batch)
        strides = self.backbone.strides
        anchors, per_level = retina_anchors(features, strides, self.config.anchor_scale)
        out = dict(zip(self.head.names, self.head(features)))
        return out | dict(anchors=anchors, per_level=per_level, sizes=sizes)

    def score(self, probs: Tensor, outputs: dict, index: tuple, config: Config) -> Tensor:
        """Class probabilities [..., K] of the anchors `index` -> scores [..., K].

        A score must rise with its probability: `select` relies on it.
        """
        return probs

    def select(self, outputs: dict, config: Config) -> dict[str, Tensor]:
        """The boxes that enter NMS: boxes, scores, labels, and the image and anchor of each."""
        logits, anchors, sizes = outputs["cls_logits"], outputs["anchors"], outputs["sizes"]

        def score(index: tuple) -> Tensor:
            return self.score(logits[index].sigmoid(), outputs, index, config)

        # An anchor's best score is that of its best class: nothing of [B, N, K] is made here.
        best = logits.amax(-1, keepdim=True).sigmoid()
        best = self.score(best, outputs, (slice(None), slice(None)), config).squeeze(-1)
        best = torch.where(common.inside_image(anchors, sizes), best, 0)
        limits = (config.top_scores, config.score_threshold, config.all_classes)
        index, labels, scores = best_predictions(best, score, outputs["per_level"], *limits)
        image, anchor = index
        boxes = common.clip_boxes(self.decode(outputs, index), sizes[image])
        return dict(boxes=boxes, scores=scores, labels=labels, image=image, anchor=anchor)

    def decode(self, outputs: dict, index: tuple) -> Tensor:
        """The predicted boxes [M, 4] of the anchors `index`, each [M]."""
        return common.decode_boxes(outputs["anchors"][index[1]], outputs["deltas"][index])


Detector = RetinaNet  # under the name that it has in every script


# ------------------------------------------------------------------------------ rows

# Deviations (MMDetection | here), which the methods on this baseline share:
#   Anchors in the batch's padding: plain background | do not train. In crowd regions: plain
#       background | are no negatives.
#   Anchors: "+1" box sizes, rounded | neither.
#   Boxes that enter NMS: all classes of a level's best 1000 anchors | its best 1000 (anchor, class)
#       pairs, the rule of RetinaNet's own authors: the rest rarely reach the best 100 and cost most
#       of NMS. `--all-classes` is MMDetection's.
# The papers' rows of this baseline are in the methods' scripts: table2.baseline in both.
ROWS: dict[str, dict] = {}
PAPER: dict[str, dict] = {}

TINY = dict(engine.TINY, tower_convs=2, tower_groups=8, epochs=2.6, lr=6e-3)
TINY |= dict(p2=True, anchor_scale=3.0)  # small objects: images are 128 px wide
TINY |= dict(focal_gamma=1.0)  # with few steps more is learned than with 2


def main(argv=None):
    return engine.run("retinanet", Config, Detector, ROWS, PAPER, TINY, argv)


if __name__ == "__main__":
    main()
