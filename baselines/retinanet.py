"""RetinaNet (Lin et al., ICCV 2017): judge every anchor in one pass; easy ones hardly count.
Paper: "Focal Loss for Dense Object Detection", https://arxiv.org/abs/1708.02002
Followed here: MMDetection's RetinaNet, the baseline of IoU-aware RetinaNet and of DC loss.

A one-stage detector has no proposals: it judges some 200,000 anchors of an 800 x 1333 image,
and nearly all of them are background. The network soon recognises most of these. Each then has
a small loss, but together they drown the loss of the few anchors on objects. The paper sees
this imbalance as the main reason why one-stage detectors trailed two-stage ones. Focal loss
multiplies an anchor's cross entropy by (1 - p)^gamma, where p is the probability of the right
answer, so an anchor that is already judged right hardly counts.

    image -> ResNet-FPN -> P3..P7, nine anchors per cell: three sizes, three shapes
      class tower, 4 convs -> cls_logits [B, N, K]    a sigmoid per class, none for background
      box tower, 4 convs   -> deltas     [B, N, 4]    how the anchor moves and grows
    training: an anchor is positive if its IoU with an object is at least 0.5, negative below
              0.4, ignored between; an object's best anchor is always positive
    test:     best 1000 (anchor, class) pairs of each level over 0.05 -> boxes -> NMS per class
              -> best 100

    focal loss   FL = -alpha_t (1 - p_t)^gamma log(p_t)                    kernels.focal_loss
    class loss   (sum over all anchors and classes of FL) / N_pos          RetinaNet.loss
    box loss     (sum over the positives of smooth_L1(d - d*)) / N_pos     box_loss
    deltas       d* = (x* - x) / w, .., log(w* / w), ..                    common.encode_boxes
    N_pos        number of positives, at least one per image               count_positives

The class loss and the box loss are Eq. 1 and 2 of IoU-aware RetinaNet. docs/deviations.md
lists the differences from MMDetection. In comments, "(MMDetection)" marks a value seen there
and "choice:" one of our own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import engine
import kernels
from engine import Amount, Natural, Share, Whole
from engine.detector import BaseDetector
from engine.legacy import make_anchors

# B images, K classes, L levels, A = 9 anchors per cell, N anchors per image
# P positive anchors of a batch, each with its object (gt); sizes [B, 2]: the images' (h, w)
# labels of anchors [B, N]: 1 positive, 0 negative, -1 ignored; classes 0..K-1, background K
# index: (image, anchor), two tensors that pick anchors of the batch, as in cls_logits[index]


@dataclass
class Model(engine.Model):
    """RetinaNet with ResNet-50."""

    norm: engine.Norm = "eval_bn"  # the backbone's BatchNorm (MMDetection)
    cls_weight: Amount = 1.0  # weight of the focal loss
    box_weight: Amount = 1.0  # weight of the box loss
    focal_alpha: Share = 0.25  # focal loss: weight of the true class; of the others: 1 - alpha
    focal_gamma: Amount = 2.0  # focal loss: exponent
    box_beta: Amount = 0.11  # smooth L1 is quadratic below this difference (MMDetection)
    fg_iou: Share = 0.5  # anchors are positive from this IoU on
    bg_iou: Share = 0.4  # anchors are negative below this IoU
    tower_convs: Natural = 4  # convolutions in each tower
    tower_groups: Whole = 0  # groups of a GroupNorm after each of them; 0: no norm
    p2: bool = False  # choice: P2..P6 (P6 is P5 subsampled) in place of P3..P7 (tiny preset)
    anchor_scale: Amount = 4.0  # anchors' side in strides, times 2^(0, 1/3, 2/3)


@dataclass
class Test(engine.Test):
    """Scores over 0.05, NMS at 0.5, best 100."""

    top_scores: Natural = 1000  # (anchor, class) pairs per level that are decoded, by score
    all_classes: bool = False  # decode all classes of so many anchors, not so many pairs


TINY = dict(
    engine.TINY,
    tower_convs=2,
    tower_groups=8,
    epochs=2.6,
    lr=6e-3,
    p2=True,
    anchor_scale=3.0,  # small objects: images are 128 px wide
    focal_gamma=1.0,  # in few steps, 1 learns more than 2
)


@dataclass
class Settings(engine.Settings):
    """RetinaNet with ResNet-50 on COCO."""

    tiny = TINY

    model: Model = field(default_factory=Model)
    test: Test = field(default_factory=Test)
    run: engine.Run = field(default_factory=lambda: engine.Run(lr=0.01, clip_norm=35.0))


# ------------------------------------------------------------------------------ head


def conv_tower(channels: int, num_convs: int, groups: int, bias: bool = True) -> nn.Sequential:
    """3x3 convolutions, each with a GroupNorm (none if `groups` is 0) and a ReLU."""
    layers: list[nn.Module] = []
    for _ in range(num_convs):
        layers.append(nn.Conv2d(channels, channels, 3, padding=1, bias=bias))
        if groups:
            layers.append(common.GroupNorm(groups, channels))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def init_towers(head: nn.Module, cls_logits: nn.Conv2d) -> None:
    """Start all convolutions of a head at N(0, 0.01), and class probabilities at 0.01.

    At 0.5 the many background anchors would dominate the first steps.
    """
    prior = -math.log((1 - 0.01) / 0.01)
    for layer in head.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.constant_(layer.bias, prior if layer is cls_logits else 0.0)


class RetinaTowers(nn.Module):
    """RetinaNet's head, the same for all levels: two towers of 3x3 convs, then predictions.

    L maps [B, C, H, W] -> cls_logits [B, N, K], deltas [B, N, 4], and the box tower's last L
    maps, from which another head can predict more; N = sum(H*W*A).

    With `groups`, a GroupNorm follows each tower convolution; the papers have none (0).
    Training from scratch needs this norm, because a narrow tower that starts at N(0, 0.01)
    passes on almost no signal.

    >>> head = RetinaTowers(8, num_anchors=9, num_classes=3)
    >>> cls_logits, deltas, maps = head([torch.rand(2, 8, 4, 4), torch.rand(2, 8, 2, 2)])
    >>> cls_logits.shape, deltas.shape
    (torch.Size([2, 180, 3]), torch.Size([2, 180, 4]))
    """

    names = ("cls_logits", "deltas", "box_features")  # of forward's outputs

    def __init__(self, in_channels=256, num_anchors=9, num_classes=80, num_convs=4, groups=0):
        super().__init__()
        self.num_classes = num_classes
        self.cls_tower = conv_tower(in_channels, num_convs, groups)
        self.box_tower = conv_tower(in_channels, num_convs, groups)
        self.cls_logits = nn.Conv2d(in_channels, num_anchors * num_classes, 3, padding=1)
        self.box_deltas = nn.Conv2d(in_channels, num_anchors * 4, 3, padding=1)
        init_towers(self, self.cls_logits)

    def forward(self, features: list[Tensor]) -> tuple:
        box_features = [self.box_tower(f) for f in features]
        logits = [self.cls_logits(self.cls_tower(f)) for f in features]
        deltas = [self.box_deltas(f) for f in box_features]
        cls_logits = common.flatten_levels(logits, self.num_classes).float()
        return cls_logits, common.flatten_levels(deltas, 4).float(), box_features


# ------------------------------------------------------------------------------ assignment


@dataclass
class Assignment:
    """What each anchor of a batch learns. Anchors that are not positive have an object too."""

    labels: Tensor  # [B, N] 1 positive, 0 negative, -1 ignored
    gt: Tensor  # [B, N] index of the anchor's object among its image's targets
    gt_boxes: Tensor  # [B, N, 4] that object's box
    gt_labels: Tensor  # [B, N] that object's class

    def classes(self, num_classes: int) -> Tensor:
        """[B, N] as class losses take them: 0..K-1, background K, ignored -1."""
        background = torch.where(self.labels == 0, num_classes, -1)
        return torch.where(self.labels == 1, self.gt_labels, background)


def match_anchors(
    anchors: Tensor, sizes: Tensor, targets: list[dict], high: float = 0.5, low: float = 0.4
) -> Assignment:
    """RetinaNet's assignment of anchors [N, 4] in images of sizes [B, 2].

    An anchor's object is the one that it overlaps most, or the one whose best anchor it is. An
    anchor is positive from IoU `high` on, negative below `low`, ignored between. An object's
    best anchor is positive at any IoU above 0. Anchors centred in the padding are ignored. In
    an image without objects, gt_boxes are zeros.
    """
    gt_boxes, gt_labels, valid, ignore = common.pad_targets(targets)
    inside = common.inside_image(anchors, sizes)
    visible = anchors * inside[..., None]  # no area in the padding: never an object's best
    labels, gt, _ = common.match(visible, gt_boxes, high, low, valid, ignore, low_quality=0.0)
    labels[~inside] = -1
    # An anchor without overlap has object 0. If it is a crowd, its box must not be learned.
    gt_boxes = gt_boxes * valid[..., None]
    image = torch.arange(len(labels), device=labels.device)[:, None]
    return Assignment(labels, gt, gt_boxes[image, gt], gt_labels[image, gt])


def count_positives(labels: Tensor) -> Tensor:
    """N_pos: positives among labels [B, N], at least one per image (MMDetection)."""
    return common.shared_count((labels == 1).sum(1).clamp(min=1).sum())


# ------------------------------------------------------------------------------ losses


@dataclass
class Positives:
    """The P positive anchors of a batch, each with its prediction and its object."""

    index: tuple[Tensor, ...]  # image [P], anchor [P]
    cls_logits: Tensor  # [P, K] predicted
    boxes: Tensor  # [P, 4] predicted
    gt: Tensor  # [P] index of the object among its image's targets
    gt_boxes: Tensor  # [P, 4]
    gt_labels: Tensor  # [P]

    @classmethod
    def at(cls, index: tuple, assigned: Assignment, cls_logits: Tensor, boxes: Tensor):
        """The P anchors that `index` picks, given cls_logits [B, N, K] and boxes [P, 4]."""
        gt, gt_boxes = assigned.gt[index], assigned.gt_boxes[index]
        return cls(index, cls_logits[index], boxes, gt, gt_boxes, assigned.gt_labels[index])


def box_loss(
    deltas: Tensor,
    anchors: Tensor,
    gt_boxes: Tensor,
    beta: float = 0.11,
    num_positives: Tensor | int | None = None,
) -> Tensor:
    """Smooth L1 of P positives' deltas, summed and divided by num_positives (default: P).

        smooth_L1(x) = x^2 / (2 beta)  if |x| < beta,  else |x| - beta / 2

    deltas, anchors, gt_boxes [P, 4] -> a scalar. The right deltas move an anchor onto its gt.

    >>> anchor, gt = torch.tensor([[0., 0., 10., 10.]]), torch.tensor([[5., 0., 15., 10.]])
    >>> box_loss(torch.zeros(1, 4), anchor, gt, beta=0.2)  # dx should be 0.5
    tensor(0.4000)
    """
    gt_deltas = common.encode_boxes(anchors, gt_boxes)
    total = F.smooth_l1_loss(deltas, gt_deltas, beta=beta, reduction="sum")
    return total / (max(1, len(deltas)) if num_positives is None else num_positives)


# ------------------------------------------------------------------------------ boxes for NMS


def best_of_levels(values: Tensor, per_level: list[int], most: int) -> list[tuple]:
    """The highest of values [B, N] on each level: L pairs of values and anchors [B, M].

    >>> best_of_levels(torch.tensor([[0.1, 0.3, 0.2, 0.4]]), per_level=[3, 1], most=2)
    [(tensor([[0.3000, 0.2000]]), tensor([[1, 2]])), (tensor([[0.4000]]), tensor([[3]]))]
    """
    best, start = [], 0
    for count in per_level:
        top, anchor = values[:, start : start + count].topk(min(count, most), dim=1)
        best.append((top, anchor + start))
        start += count
    return best


def best_pairs(scores: Tensor, anchor: Tensor, most: int | None) -> tuple[Tensor, ...]:
    """Each image's `most` best (anchor, class) pairs, or all if None: anchor, label, score.

    scores [B, M, K] of anchors [B, M] -> three tensors [B, number of pairs].
    """
    pairs = scores.flatten(1)  # [B, M*K]
    number = pairs.shape[1] if most is None else min(pairs.shape[1], most)
    score, pair = pairs.topk(number, dim=1)
    return anchor.gather(1, pair // scores.shape[-1]), pair % scores.shape[-1], score


# ------------------------------------------------------------------------------ detector


class OneStage(BaseDetector):
    """What one-stage detectors share. A detector adds a head, `loss`, `outputs`, `decode`.

    A method changes one of these:
        assign      which anchors are positive, and for which object
        weigh       how much each anchor counts in the class loss
        score       what ranks the boxes
        suppress    which boxes survive NMS (engine/detector.py)
    """

    default_test = Test

    def assign(self, out: dict, targets: list[dict]) -> Assignment:
        """What each anchor learns, given the network's outputs."""
        raise NotImplementedError

    def weigh(self, losses: Tensor, positives: Positives) -> Tensor:
        """The anchors' class losses [B, N], weighted."""
        return losses

    def score(self, probs: Tensor, outputs: dict, index: tuple, test: Any) -> Tensor:
        """Class probabilities [..., K] of the anchors `index` -> scores [..., K].

        A score must rise with its probability, because `candidates` relies on this.
        """
        return probs

    def decode(self, outputs: dict, index: tuple) -> Tensor:
        """The predicted boxes [M, 4] of the anchors `index`, each [M]."""
        raise NotImplementedError

    def candidates(self, outputs: dict, test: Test) -> dict[str, Tensor]:
        """Each level's best (anchor, class) pairs whose scores exceed the threshold.

        -> boxes [N, 4], clipped; scores, labels, image and anchor [N].
        """
        logits, sizes = outputs["cls_logits"], outputs["sizes"]  # [B, N, K], [B, 2]
        # The best pairs lie on the best anchors, so only these anchors' class scores are made.
        best = logits.amax(-1, keepdim=True).sigmoid()
        best = self.score(best, outputs, (slice(None), slice(None)), test).squeeze(-1)
        best = torch.where(common.inside_image(outputs["anchors"], sizes), best, 0)  # [B, N]
        image = torch.arange(len(best), device=best.device)[:, None]  # [B, 1]
        most_pairs = None if test.all_classes else test.top_scores
        pairs = []
        for top, anchor in best_of_levels(best, outputs["per_level"], test.top_scores):
            index = image, anchor  # [B, 1], [B, M]
            scores = self.score(logits[index].sigmoid(), outputs, index, test)  # [B, M, K]
            scores = torch.where(top[..., None] > test.score_threshold, scores, 0)
            pairs.append(best_pairs(scores, anchor, most_pairs))
        anchor, labels, scores = (torch.cat(levels, 1) for levels in zip(*pairs))
        image, pair = (scores > test.score_threshold).nonzero(as_tuple=True)
        anchor, labels, scores = anchor[image, pair], labels[image, pair], scores[image, pair]
        boxes = common.clip_boxes(self.decode(outputs, (image, anchor)), sizes[image])
        return dict(boxes=boxes, scores=scores, labels=labels, image=image, anchor=anchor)


class RetinaNet(OneStage):
    """RetinaNet. Besides the changes that `OneStage` lists, a method may add `further_losses`.

    `head` is RetinaTowers or a subclass; its `names` are those of forward's outputs.
    """

    settings: Model
    # outputs that repeat all classes for each anchor, for engine.checkpoints.start_from
    rows_by_anchor = ("head.cls_logits.weight", "head.cls_logits.bias")

    def __init__(self, model: Model, num_classes: int, head=RetinaTowers):
        super().__init__(model, num_classes, extra="pool" if model.p2 else "conv")
        self.head = head(
            model.fpn_channels,
            num_classes=num_classes,
            num_convs=model.tower_convs,
            groups=model.tower_groups,
        )
        self.to(memory_format=torch.channels_last)

    def loss(self, images: list[Tensor], targets: list[dict]) -> dict[str, Tensor]:
        """Weighted scalars: focal loss `cls` and smooth L1 `box`, over N_pos, and others."""
        settings, out = self.settings, self.outputs(images)
        assigned = self.assign(out, targets)
        num_positives = count_positives(assigned.labels)
        focal = kernels.focal_loss(
            out["cls_logits"].flatten(0, 1),
            assigned.classes(self.num_classes).flatten(),
            settings.focal_alpha,
            settings.focal_gamma,
        )
        index = (assigned.labels == 1).nonzero(as_tuple=True)  # the host waits here, for P
        anchors, deltas = out["anchors"][index[1]], out["deltas"][index]
        boxes = common.decode_boxes(anchors, deltas)  # [P, 4]
        positives = Positives.at(index, assigned, out["cls_logits"], boxes)
        focal = self.weigh(focal.view_as(assigned.labels), positives)  # [B, N]
        box = box_loss(deltas, anchors, positives.gt_boxes, settings.box_beta, num_positives)
        return {
            "cls": settings.cls_weight * focal.sum() / num_positives,
            "box": settings.box_weight * box,
            **self.further_losses(out, positives, num_positives),
        }

    @torch.no_grad()
    def assign(self, out: dict, targets: list[dict]) -> Assignment:
        """What each anchor learns, by IoU."""
        high, low = self.settings.fg_iou, self.settings.bg_iou
        return match_anchors(out["anchors"], out["sizes"], targets, high, low)

    def further_losses(
        self, out: dict, positives: Positives, num_positives: Tensor
    ) -> dict[str, Tensor]:
        """Losses beside class and box: name -> weighted scalar."""
        return {}

    def outputs(self, images: list[Tensor]) -> dict:
        """cls_logits [B, N, K], deltas [B, N, 4] and whatever else the head returns.

        Also the anchors [N, 4], their number per_level, and the images' sizes [B, 2].
        """
        batch, sizes = common.pad_images(images)
        features = self.backbone(batch)
        shapes = [f.shape[-2:] for f in features]
        scales = [self.settings.anchor_scale * 2 ** (octave / 3) for octave in range(3)]
        ratios, strides = (0.5, 1.0, 2.0), self.backbone.strides
        legacy = self.settings.legacy
        anchors = make_anchors(shapes, strides, scales, ratios, batch.device, legacy)
        out = dict(zip(self.head.names, self.head(features)))
        per_level = [9 * h * w for h, w in shapes]
        return out | dict(anchors=anchors, per_level=per_level, sizes=sizes)

    def decode(self, outputs: dict, index: tuple) -> Tensor:
        """The predicted boxes [M, 4] of the anchors `index`, each [M]."""
        return common.decode_boxes(outputs["anchors"][index[1]], outputs["deltas"][index])


Detector = RetinaNet  # the name that every script has


def main(argv=None):
    return engine.run("retinanet", Settings, Detector, argv)


if __name__ == "__main__":
    main()
