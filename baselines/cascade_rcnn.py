"""Cascade R-CNN (Cai and Vasconcelos, CVPR 2018): classify and move a box again, more strictly.
Paper: https://arxiv.org/abs/1712.00726   Followed here: CPM R-CNN's release, whose Table 3 adds its
scores to two such stages: https://github.com/zhubinQAQ/CPM-R-CNN

Faster R-CNN (faster_rcnn.py) learns from proposals with IoU 0.5 or more. Asked to place boxes more
exactly, one could raise that to 0.7, but so few proposals are that good that the head overfits, and
in testing it meets the others all the same. A cascade raises the IoU where it can be had: a stage's
own boxes are better than its RoIs were, so they are the RoIs of a second head, which learns what
IoU 0.6 and more is, and its boxes could be those of a third, at 0.7.

    image -> ResNet-FPN -> P2..P6 -> RPN -> proposals = RoIs of stage 1
      2 x: RoIAlign 7x7 -> 2 fc -> class logits [R, K + 1], deltas [R, 4] -> boxes = next RoIs
    training: 512 RoIs an image, a quarter of them positive, are drawn anew for each stage, at its
              own IoU. Boxes made of gts' copies do not go on; instead the gts join each stage.
    test:     all proposals go through both stages. Boxes are the last stage's; logits are averaged
              over the stages, then softmax -> classes over 0.05 -> NMS 0.5 per class -> best 100

Two things are needed that Faster R-CNN does without. A box goes on before anybody knows its class,
so there is one box for all classes. And later stages have less to correct, so the deltas of stage s
are predicted in units s times as small: else later stages' box losses would be almost nothing.

In comments "(release)" is a value seen in CPM R-CNN's release, "choice:" our own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import engine
from baselines import faster_rcnn
from common import Amount, Natural, Share, Whole
from engine.detector import over_threshold

# B images, R RoIs, K classes, C channels, D width of the hidden layers
# rois [R, 5]: image index, x1, y1, x2, y2 in input pixels; labels 0..K-1, background K
# stages count from 1, as in --test-stage; a list of them starts at 0


@dataclass
class Config(faster_rcnn.Config):
    """Cascade R-CNN with two stages and ResNet-50 on COCO."""

    num_stages: Natural = 2  # heads one after another (release); 3 in Cascade R-CNN's own paper
    stage_ious: tuple[Share, ...] = (0.5, 0.6, 0.7)  # RoIs are positive for a stage from this on
    stage_decay: Amount = 0.5  # a stage's losses over those of the one before it (release)
    test_stage: Whole = 0  # the stages up to this one make the result; 0: all
    epochs: Amount = 12.17  # passes over the data: 90k steps of 16 of 118,287 images (release)
    drops: tuple[Share, ...] = (60 / 90, 80 / 90)  # lr / 10 at these fractions (release)
    warmup_factor: Share = 1 / 10  # warm-up starts at this share of the rate (release)


# ------------------------------------------------------------------------------ boxes


def stage_stds(stage: int) -> tuple[float, ...]:
    """Units of a stage's deltas (dx, dy, dw, dh); stage counts from 1.

    The release writes their inverses: (10, 10, 5, 5), then (20, 20, 10, 10) and (30, 30, 15, 15).

    >>> stage_stds(2)
    (0.05, 0.05, 0.1, 0.1)
    """
    return tuple(std / stage for std in faster_rcnn.RCNN_STDS)


def move_rois(rois: Tensor, deltas: Tensor, stage: int, sizes: Tensor) -> Tensor:
    """RoIs [R, 5] moved by a stage's deltas [R, 4], cut to images of sizes [B, 2]; no gradient."""
    boxes = common.decode_boxes(rois[:, 1:], deltas.detach(), stage_stds(stage))
    boxes = common.clip_boxes(boxes, sizes[rois[:, 0].long()])
    return torch.cat([rois[:, :1], boxes], 1)


def by_image(rois: Tensor, keep: Tensor, num_images: int, most: int) -> tuple[Tensor, Tensor]:
    """RoIs [R, 5] -> boxes [B, most, 4], valid [B, most], which those without `keep` [R] are not.

    No image may have more than `most` RoIs.

    >>> rois = torch.tensor([[0.0, 1, 1, 9, 9], [1, 2, 2, 8, 8], [1, 3, 3, 7, 7]])
    >>> boxes, valid = by_image(rois, torch.tensor([True, False, True]), 2, 3)
    >>> boxes[valid]
    tensor([[1., 1., 9., 9.],
            [3., 3., 7., 7.]])
    """
    image = rois[:, 0].long()
    seen = F.one_hot(image, num_images).cumsum(0)  # [R, B]: RoIs of each image so far
    slot = seen.gather(1, image[:, None])[:, 0] - 1
    boxes = rois.new_zeros(num_images, most, 4)
    boxes[image, slot] = rois[:, 1:]
    valid = torch.zeros(num_images, most, dtype=torch.bool, device=rois.device)
    valid[image, slot] = keep
    return boxes, valid


# ------------------------------------------------------------------------------ stages


class BoxHead(nn.Module):
    """One stage: pooled features [R, C, 7, 7] -> logits [R, K + 1], deltas [R, 4], hidden [R, D].

    The deltas are the same for all classes, in units of `stage_stds`.

    >>> logits, deltas, hidden = BoxHead(4 * 7 * 7, 16, 10)(torch.rand(3, 4, 7, 7))
    >>> logits.shape, deltas.shape, hidden.shape
    (torch.Size([3, 11]), torch.Size([3, 4]), torch.Size([3, 16]))
    """

    def __init__(self, in_features: int, hidden: int, num_classes: int, std: float = 0.01):
        super().__init__()
        self.classify = faster_rcnn.two_fc(in_features, hidden, num_classes + 1, std)
        self.regress = faster_rcnn.output_layer(hidden, 4, 0.001)  # (release)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.classify[:-1](pooled)
        return self.classify[-1](hidden), self.regress(hidden), hidden


class BoxStages(nn.Module):
    """The stages' heads, which share nothing. The `pool` they are given: rois -> [R, C, 7, 7].

    ious: a stage's RoIs are positive from this IoU on, one number a stage; decay: weight of a
    stage's losses over that of the stage before; num_samples, positive: RoIs of an image that are
    drawn for every stage but the first, and the share of positives among them, at most; std: class
    outputs start at N(0, std).
    """

    def __init__(
        self,
        in_features: int = 256 * 7 * 7,
        hidden: int = 1024,
        num_classes: int = 80,
        ious: tuple[float, ...] = (0.5, 0.6),
        decay: float = 0.5,
        num_samples: int = 512,
        positive: float = 0.25,
        std: float = 0.01,
    ):
        super().__init__()
        self.num_classes, self.ious, self.decay = num_classes, ious, decay
        self.num_samples, self.positive = num_samples, positive
        self.heads = nn.ModuleList(BoxHead(in_features, hidden, num_classes, std) for _ in ious)

    def loss(self, pool, sizes: Tensor, targets: list[dict], rois, labels, gt_boxes):
        """Losses {name: scalar}; and of the last stage its rois, labels, gts, and hidden [R, D].

        rois [R, 5], labels [R] (background K) and gt_boxes [R, 4] are those drawn for stage 1.
        """
        K, losses, weight = self.num_classes, {}, 1.0
        for stage, head in enumerate(self.heads, 1):
            logits, deltas, hidden = head(pool(rois))
            losses[f"cls{stage}"] = weight * faster_rcnn.class_loss(logits, labels)
            background = (labels == K).long()  # for boxes there is one class, which is object
            box = (deltas, rois, background, gt_boxes, stage_stds(stage))
            losses[f"reg{stage}"] = weight * faster_rcnn.class_box_loss(*box)
            if stage == len(self.heads):
                return losses, (rois, labels, gt_boxes, hidden)
            not_gt = (rois[:, 1:] != gt_boxes).any(1)  # gts' copies do not go on (release)
            moved = move_rois(rois, deltas, stage, sizes)
            proposals = by_image(moved, not_gt, len(targets), self.num_samples)
            draw = (self.num_samples, self.positive, self.ious[stage])  # of the next stage
            rois, labels, gt_boxes = faster_rcnn.sample_rois(*proposals, targets, *draw)
            labels = torch.where(labels >= 0, labels, K)
            weight *= self.decay

    def forward(self, pool, sizes: Tensor, rois: Tensor, last: int = 0):
        """RoIs [R, 5] -> what they became [R, 5], probs [R, K] (no background), hidden [R, D].

        All of them after stage `last`, 0 for the last there is. Each stage classifies its own RoIs;
        the logits are averaged (release).
        """
        heads, total = self.heads[: last or len(self.heads)], 0
        for stage, head in enumerate(heads, 1):
            logits, deltas, hidden = head(pool(rois))
            total = total + logits.float()
            rois = move_rois(rois, deltas, stage, sizes)
        return rois, (total / len(heads)).softmax(1)[:, :-1], hidden


def check_stages(config, **lists: tuple) -> None:
    """BadInput where a Config has more stages than one of its lists, or tests one beyond."""
    stages = config.num_stages
    if stages > min(map(len, lists.values())):
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in lists)
        raise common.BadInput(f"--num-stages {stages}: needs as many {flags}")
    if config.test_stage > stages:
        raise common.BadInput(f"--test-stage {config.test_stage}: there are {stages} stages")


def positives(rois: Tensor, labels: Tensor, gt_boxes: Tensor, hidden: Tensor, num_classes: int):
    """Of the last stage's RoIs that are positive: rois [P, 5], labels, IoUs [P], hidden [P, D]."""
    index = (labels < num_classes).nonzero()[:, 0]
    rois = rois[index]
    ious = common.aligned_iou(rois[:, 1:], gt_boxes[index])
    return rois, labels[index], ious, hidden[index]


def make_stages(config, num_classes: int) -> BoxStages:
    """The stages of a Config, this file's or another that has its names."""
    sizes = (config.fpn_channels * 7 * 7, config.fc_channels, num_classes)
    draw = (config.roi_samples, config.roi_positive, config.class_std)
    return BoxStages(*sizes, config.stage_ious[: config.num_stages], config.stage_decay, *draw)


# ------------------------------------------------------------------------------ detector


class Detector(faster_rcnn.TwoStage):
    """Cascade R-CNN. What each method of a detector does: `engine/detector.py`."""

    def __init__(self, config: Config, num_classes: int):
        super().__init__(config, num_classes)
        check_stages(config, stage_ious=config.stage_ious)
        self.stages = make_stages(config, num_classes)
        self.to(memory_format=torch.channels_last)

    def loss(self, images: list[Tensor], targets: list[dict]) -> dict[str, Tensor]:
        first_iou = self.config.stage_ious[0]
        features, sizes, losses, *sampled = self.training_rois(images, targets, first_iou)
        pool = partial(self.pool, features, size=7)
        stage_losses, _ = self.stages.loss(pool, sizes, targets, *sampled)
        return losses | stage_losses

    @torch.no_grad()
    def outputs(self, images: list[Tensor]) -> dict[str, Tensor]:
        """The boxes [R, 4] that proposals became, the image [R] of each, and probs [R, K]."""
        features, sizes, rois, image = self.test_rois(images)
        pool = partial(self.pool, features, size=7)
        rois, probs, _ = self.stages(pool, sizes, rois, self.config.test_stage)
        return dict(boxes=rois[:, 1:], image=image, probs=probs)

    def select(self, outputs: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
        row, labels, scores = over_threshold(outputs["probs"], config.score_threshold)
        boxes, image = outputs["boxes"][row], outputs["image"][row]
        return dict(boxes=boxes, scores=scores, labels=labels, image=image)


# ------------------------------------------------------------------------------ rows

# Deviations (release | here), which CPM R-CNN on this baseline shares:
#   Boxes between stages may leave the image | end at its border, as proposals do
#   RoIAlign: torchvision's older grid, half a cell away | half-pixel aligned
#   Crowd regions: plain background | proposals at least half inside one are no negatives
#   The box layer has 8 outputs, of which 4 are never used | 4
# The paper's row of this baseline is in cpm_rcnn.py: table3.cascade.
ROWS: dict[str, dict] = {}
PAPER: dict[str, dict] = {}

TINY = faster_rcnn.TINY


def main(argv=None):
    return engine.run("cascade_rcnn", Config, Detector, ROWS, PAPER, TINY, argv)


if __name__ == "__main__":
    main()
