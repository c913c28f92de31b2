"""Cascade R-CNN (Cai and Vasconcelos, CVPR 2018): move a box again, judge more strictly.
Paper: https://arxiv.org/abs/1712.00726
Release: https://github.com/zhubinQAQ/CPM-R-CNN, whose Table 3 adds two scores to this detector

Faster R-CNN (faster_rcnn.py) learns from proposals whose IoU with an object is at least 0.5.
With 0.7, its head would learn to place boxes more exactly, but that fails twice: so few
proposals reach 0.7 that the head overfits, and in testing it also meets all other proposals.

A cascade raises the IoU step by step. The boxes of a stage are better than the RoIs it was
given. So they become the RoIs of a second stage, whose own head learns from an IoU of 0.6 on.
The boxes of this stage could be the RoIs of a third stage, at 0.7.

    image -> ResNet-FPN -> P2..P6 -> RPN -> proposals = RoIs of stage 1
      2 x: RoIAlign 7x7 -> 2 fc -> class logits [R, K + 1], deltas [R, 4] -> boxes = next RoIs
    training: Every stage draws 512 RoIs an image at its own IoU, a quarter of them positive.
              The ground truth joins each draw, so boxes made from copies of it are dropped.
    test:     Every proposal passes all stages and gets the box of the last one. Class logits:
              mean over the stages -> softmax -> over 0.05 -> NMS 0.5 -> best 100

Two things differ from Faster R-CNN's head. A box moves on before its class is known, so a
stage predicts one box for all classes. Later stages have less to correct, so stage s predicts
deltas in units that are s times smaller: otherwise its box loss would nearly vanish.

"(release)" marks a value seen in CPM R-CNN's release, "choice:" our own. docs/deviations.md
lists where this file differs from the release.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import engine
from baselines import faster_rcnn
from baselines.faster_rcnn import Rois, TrainingRois
from common import BadInput
from engine import Amount, Natural, Share, Whole
from engine.detector import over_threshold

# B images, R RoIs, K classes, C channels, D width of the hidden layers
# labels 0..K-1, background K; stages count from 1
# pool: a function from R RoIs to their features [R, C, 7, 7]


@dataclass
class Model(faster_rcnn.TwoStageModel):
    """Cascade R-CNN with two stages and ResNet-50."""

    num_stages: Natural = 2  # heads one after another (release); the paper has 3
    stage_ious: tuple[Share, ...] = (0.5, 0.6, 0.7)  # a stage's RoIs are positive from here on
    stage_decay: Amount = 0.5  # weight of a stage's losses / of those before (release)


@dataclass
class Test(faster_rcnn.Test):
    """Classes over 0.05, NMS at 0.5, best 100."""

    test_stage: Whole = 0  # this stage's boxes are the result; 0: the last one's


TINY = faster_rcnn.TINY


@dataclass
class Settings(engine.Settings):
    """Cascade R-CNN with two stages and ResNet-50 on COCO."""

    tiny = TINY

    model: Model = field(default_factory=Model)
    test: Test = field(default_factory=Test)
    run: engine.Run = field(
        default_factory=lambda: engine.Run(
            epochs=12.17,  # 90k steps of 16 of 118,287 images (release)
            drops=(60 / 90, 80 / 90),  # (release)
            warmup_factor=1 / 10,  # (release)
        )
    )

    def replace(self, **changes) -> engine.Settings:
        """As in engine.Settings. Also raises BadInput if the tested stage does not exist."""
        settings = super().replace(**changes)
        tested_stage(settings.model, settings.test)
        return settings


# ------------------------------------------------------------------------------ checks


def check_stages(model, *names: str) -> None:
    """Raise BadInput if a model has more stages than values in one of these lists."""
    if model.num_stages > min(len(getattr(model, name)) for name in names):
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in names)
        raise BadInput(f"--num-stages {model.num_stages}: needs as many values of {flags}")


def tested_stage(model, test) -> int:
    """The stage whose boxes are the result. Raises BadInput if the model has no such stage."""
    if test.test_stage > model.num_stages:
        raise BadInput(f"--test-stage {test.test_stage}: there are {model.num_stages} stages")
    return test.test_stage or model.num_stages


# ------------------------------------------------------------------------------ boxes


def stage_stds(stage: int) -> tuple[float, ...]:
    """Units of a stage's deltas (dx, dy, dw, dh): Faster R-CNN's divided by the stage.

    The release writes their inverses: (10, 10, 5, 5) in stage 1, (20, 20, 10, 10) in stage 2.

    >>> stage_stds(2)
    (0.05, 0.05, 0.1, 0.1)
    """
    return tuple(std / stage for std in faster_rcnn.RCNN_STDS)


def move_rois(rois, deltas: Tensor, stage: int, sizes: Tensor):
    """RoIs moved by a stage's deltas [R, 4] and cut to images of sizes [B, 2]; no gradient."""
    boxes = common.decode_boxes(rois.boxes, deltas.detach(), stage_stds(stage))
    return rois.moved(common.clip_boxes(boxes, sizes[rois.image]))


def by_image(rois: Rois, keep: Tensor, num_images: int, most: int) -> tuple[Tensor, Tensor]:
    """Flat RoIs as a padded batch: boxes [B, most, 4] and valid [B, most].

    RoIs without `keep` [R] are invalid, like the padding. No image has more than `most` RoIs.

    >>> boxes = torch.tensor([[1., 1., 9., 9.], [2., 2., 8., 8.], [3., 3., 7., 7.]])
    >>> rois = Rois(torch.tensor([0, 1, 1]), boxes)
    >>> keep = torch.tensor([True, False, True])
    >>> batched, valid = by_image(rois, keep, num_images=2, most=3)
    >>> valid
    tensor([[ True, False, False],
            [False,  True, False]])
    >>> batched[valid]
    tensor([[1., 1., 9., 9.],
            [3., 3., 7., 7.]])
    """
    seen = F.one_hot(rois.image, num_images).cumsum(0)  # [R, B]: RoIs of each image so far
    slot = seen.gather(1, rois.image[:, None])[:, 0] - 1  # [R]
    boxes = rois.boxes.new_zeros(num_images, most, 4)
    boxes[rois.image, slot] = rois.boxes
    valid = torch.zeros(num_images, most, dtype=torch.bool, device=boxes.device)
    valid[rois.image, slot] = keep
    return boxes, valid


# ------------------------------------------------------------------------------ stages


class BoxHead(nn.Module):
    """One stage's class and box: R pooled RoIs -> logits, deltas and the features behind them.

    [R, C, 7, 7] -> logits [R, K + 1], deltas [R, 4], hidden [R, D]. The deltas are the same
    for all classes, in units of `stage_stds`.

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
    """The stages, whose heads share nothing.

    ious: a stage's RoIs are positive from this IoU on; decay: weight of a stage's losses
    divided by the weight of those before; num_samples: RoIs that a stage draws from an image;
    positive: largest share of positives among them; std: class outputs start at N(0, std).
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
        heads = [BoxHead(in_features, hidden, num_classes, std) for _ in ious]
        self.heads = nn.ModuleList(heads)

    def loss(
        self,
        pool: Callable[[Rois], Tensor],
        rois: TrainingRois,
        sizes: Tensor,
        targets: list[dict],
    ) -> tuple[dict[str, Tensor], TrainingRois, Tensor]:
        """The losses of all stages; and the last stage's RoIs, with their hidden [R, D].

        rois: those drawn for stage 1; sizes [B, 2].
        """
        losses: dict[str, Tensor] = {}
        weight = 1.0
        for stage, head in enumerate(self.heads, 1):
            logits, deltas, hidden = head(pool(rois))
            losses[f"cls{stage}"] = weight * faster_rcnn.class_loss(logits, rois.labels)
            background = (rois.labels == self.num_classes).long()  # one class of boxes: object
            box_loss = faster_rcnn.class_box_loss(
                deltas, rois.flat(), background, rois.gt_boxes, stage_stds(stage)
            )
            losses[f"reg{stage}"] = weight * box_loss
            weight *= self.decay
            if stage < len(self.heads):
                next_iou = self.ious[stage]  # stages count from 1, `ious` from 0
                rois = self.draw(move_rois(rois, deltas, stage, sizes), targets, next_iou)
        return losses, rois, hidden

    def draw(self, rois: TrainingRois, targets: list[dict], iou: float) -> TrainingRois:
        """Draw a stage's RoIs from the boxes of the stage before and the ground truth.

        Ground truth joins, so boxes made from copies of it are left out (release).
        """
        boxes, valid = by_image(rois, ~rois.is_gt, len(targets), self.num_samples)
        return faster_rcnn.sample_rois(
            boxes,
            valid,
            targets,
            num=self.num_samples,
            fraction=self.positive,
            num_classes=self.num_classes,
            iou=iou,
        )

    def forward(
        self, pool: Callable[[Rois], Tensor], rois: Rois, sizes: Tensor
    ) -> tuple[list[Rois], list[Tensor], Tensor]:
        """Each stage's boxes, as RoIs, and probs [R, K]; the last stage's hidden [R, D].

        Each stage classifies its own RoIs. The probs of a stage, without background, come from
        the mean of its logits and those of the stages before it (release).
        """
        moved: list[Rois] = []
        probs: list[Tensor] = []
        total = torch.zeros((), device=sizes.device)  # sum of the logits
        for stage, head in enumerate(self.heads, 1):
            logits, deltas, hidden = head(pool(rois))
            total = total + logits.float()
            rois = move_rois(rois, deltas, stage, sizes)
            moved.append(rois)
            probs.append((total / stage).softmax(1)[:, :-1])
        return moved, probs, hidden


# ------------------------------------------------------------------------------ detector


class Detector(faster_rcnn.TwoStage):
    """Cascade R-CNN. The contract of its methods is in engine/detector.py."""

    settings: Model
    default_test = Test

    def __init__(self, model: Model, num_classes: int):
        super().__init__(model, num_classes)
        check_stages(model, "stage_ious")
        self.stages = BoxStages(
            in_features=model.fpn_channels * 7 * 7,
            hidden=model.fc_channels,
            num_classes=num_classes,
            ious=model.stage_ious[: model.num_stages],
            decay=model.stage_decay,
            num_samples=model.roi_samples,
            positive=model.roi_positive,
            std=model.class_std,
        )
        self.to(memory_format=torch.channels_last)

    def loss(self, images: list[Tensor], targets: list[dict]) -> dict[str, Tensor]:
        """The RPN's losses, and each stage's: `cls1`, `reg1`, `cls2`, `reg2`, ..."""
        first_iou = self.settings.stage_ious[0]
        features, sizes, losses, sampled = self.training_rois(images, targets, first_iou)
        pool = partial(self.pool, features, size=7)
        stage_losses, rois, hidden = self.stages.loss(pool, sampled, sizes, targets)
        return losses | stage_losses | self.scoring_losses(features, sampled, rois, hidden)

    def scoring_losses(
        self, features: list[Tensor], sampled: TrainingRois, rois: TrainingRois, hidden: Tensor
    ) -> dict[str, Tensor]:
        """Losses that a method adds for further scores (CPM R-CNN does); none here.

        sampled: RoIs of stage 1; rois: R RoIs of the last stage, with their hidden [R, D].
        """
        return {}

    @torch.no_grad()
    def outputs(self, images: list[Tensor]) -> dict:
        """Feature maps; boxes (as RoIs) and probs [R, K], lists by stage; hidden [R, D]."""
        features, sizes, proposals = self.test_rois(images)
        pool = partial(self.pool, features, size=7)
        rois, probs, hidden = self.stages(pool, proposals, sizes)
        return dict(features=features, rois=rois, probs=probs, hidden=hidden)

    def candidates(self, outputs: dict, test: Test) -> dict[str, Tensor]:
        """Each class over the threshold, with the tested stage's box, whose index is `roi`."""
        stage = tested_stage(self.settings, test)
        row, labels, scores = over_threshold(outputs["probs"][stage - 1], test.score_threshold)
        rois = outputs["rois"][stage - 1][row]
        return dict(boxes=rois.boxes, scores=scores, labels=labels, image=rois.image, roi=row)


def main(argv=None):
    return engine.run("cascade_rcnn", Settings, Detector, argv)


if __name__ == "__main__":
    main()
