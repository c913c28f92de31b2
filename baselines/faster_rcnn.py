"""Faster R-CNN with a feature pyramid: propose boxes, then classify and move each of them.
Paper: https://arxiv.org/abs/1506.01497   Feature pyramid: https://arxiv.org/abs/1612.03144

D2Det, Double-Head and CPM R-CNN start from this detector. Its first stage, the region proposal
network (RPN, rpn.py), reduces a quarter of a million anchors to a thousand proposals: boxes
that probably hold an object of some class. Its second stage looks at each proposal alone.
RoIAlign cuts features of one size out of the pyramid, whatever the proposal's size. Two hidden
layers predict the proposal's class, and a box for each class.

    image -> ResNet-FPN -> P2..P6, strides 4..64, [B, C, H, W] each -> RPN -> proposals
      head, on every proposal: RoIAlign from one of P2..P5, by the proposal's size
        -> [R, C, 7, 7] -> 2 fc -> class logits [R, K + 1], deltas [R, 4K]
    training: 512 proposals and gts of an image, at most a quarter of them positive
    test:     softmax -> classes over 0.05, each with its own box -> NMS 0.5 in each class
              -> best 100

"choice:" marks what neither paper decides. Methods extend `TwoStageModel` and `TwoStage`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import engine
import kernels
from baselines.rpn import RPN
from engine import Amount, Natural, Share
from engine.detector import BaseDetector, first_per_image, over_threshold
from engine.legacy import roi_align

# B images, R RoIs, K classes, C channels, L levels, P proposals per image (padded)
# labels 0..K-1, background K
# rois: a `Rois`, or [R, 5] (image index, x1, y1, x2, y2) for functions of plain tensors


@dataclass
class TwoStageModel(engine.Model):
    """Backbone and RPN of all two-stage detectors, and the RoIs that train their heads."""

    fc_channels: Natural = 1024  # width of the hidden layers of fully connected heads
    roi_samples: Natural = 512  # RoIs per image that train the head
    roi_positive: Share = 0.25  # share of positives among them, at most
    anchor_scale: Amount = 8.0  # side of the RPN's anchors in strides of their level
    rpn_samples: Natural = 256  # anchors per image that train the RPN
    rpn_floor: Share = 0.0  # an object's best anchor is positive if its IoU is at least this
    proposals_train: Natural = 2000  # in training: boxes per level before NMS, per image after
    proposals_test: Natural = 1000  # the same in testing; can change without retraining
    pool_norm: bool = False  # choice: normalise each channel of an RoI (tiny preset)
    class_std: Amount = 0.01  # class outputs start at N(0, this) (releases)


@dataclass
class Model(TwoStageModel):
    """Faster R-CNN with a feature pyramid and ResNet-50."""

    cls_weight: Amount = 1.0  # weight of the classification loss
    shared: bool = True  # class and box from the same hidden layers; off: the box has its own


Test = engine.Test  # classes over 0.05, NMS at 0.5, best 100

TINY = dict(
    engine.TINY,
    fc_channels=256,
    rpn_samples=64,
    rpn_floor=0.3,  # choice: as in the runs of docs/results
    roi_samples=16,
    roi_positive=0.5,
    proposals_train=200,
    proposals_test=100,
    anchor_scale=4.0,  # small objects: images are 128 px wide
    pool_norm=True,  # without these two all classes look alike for 250 steps
    class_std=0.1,
)


@dataclass
class Settings(engine.Settings):
    """Faster R-CNN with a feature pyramid and ResNet-50 on COCO."""

    tiny = TINY

    model: Model = field(default_factory=Model)
    test: Test = field(default_factory=Test)


# ------------------------------------------------------------------------------ rois


@dataclass
class Rois:
    """R boxes in a batch of images, indexed as a whole: `rois[mask]`, `rois[index]`."""

    image: Tensor  # [R] long: which image of the batch
    boxes: Tensor  # [R, 4]

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index):
        return type(self)(*(getattr(self, f.name)[index] for f in dataclasses.fields(self)))

    def moved(self, boxes: Tensor):
        """The same RoIs with other boxes [R, 4]."""
        return dataclasses.replace(self, boxes=boxes)

    def flat(self) -> Tensor:
        """[R, 5], image index and box, as kernels and plain functions take them."""
        return torch.cat([self.image[:, None].float(), self.boxes], 1)


@dataclass
class Proposals(Rois):
    """All RoIs of testing. The host knows how many lie on each level."""

    per_level: Tensor  # [L] long, on the CPU

    def __getitem__(self, index) -> Rois:
        return Rois(self.image[index], self.boxes[index])

    def moved(self, boxes: Tensor) -> Rois:
        return Rois(self.image, boxes)


@dataclass
class TrainingRois(Rois):
    """RoIs, each with the object that it was matched to."""

    labels: Tensor  # [R] the object's class, background K
    gt: Tensor  # [R] index of the object among its image's targets, for background too
    gt_boxes: Tensor  # [R, 4] the object's box
    is_gt: Tensor  # [R] bool: the RoI is a copy of an object's box


@dataclass
class SampledRois(TrainingRois):
    """RoIs as they were drawn, image after image, the positives of an image first."""

    counts: list[tuple[int, int]]  # of each image: its RoIs, and the positives among them

    def __getitem__(self, index) -> TrainingRois:
        names = [f.name for f in dataclasses.fields(TrainingRois)]
        return TrainingRois(*(getattr(self, name)[index] for name in names))

    def split(self, most: int | None = None) -> tuple[Tensor, Tensor]:
        """Indices of the positives (the first `most` of each image) and of the negatives.

        The host already has their `counts`, so it need not wait for the GPU.
        """
        parts = torch.arange(len(self)).split([num for num, _ in self.counts])
        positives = torch.cat([p[:num][:most] for p, (_, num) in zip(parts, self.counts)])
        negatives = torch.cat([p[num:] for p, (_, num) in zip(parts, self.counts)])
        device = self.boxes.device
        return positives.to(device, non_blocking=True), negatives.to(device, non_blocking=True)


@torch.no_grad()
def sample_rois(
    proposals: Tensor,
    valid: Tensor,
    targets: list[dict],
    num: int,
    fraction: float,
    num_classes: int,
    iou: float = 0.5,
) -> SampledRois:
    """Draw `num` RoIs of each image to train a head, at most `fraction` of them positive.

    proposals [B, P, 4], valid [B, P]. Ground truth joins the proposals, so that the head meets
    every object even if no proposal fits it. An RoI is positive from IoU `iou` with a gt on.
    """
    gt_boxes, gt_labels, gt_valid, gt_ignore = common.pad_targets(targets)
    num_gt = gt_boxes.shape[1]
    boxes = torch.cat([gt_boxes, proposals], 1)
    valid = torch.cat([gt_valid, valid], 1)
    labels, matched, _ = common.match(boxes, gt_boxes, iou, iou, gt_valid, gt_ignore)
    labels[~valid] = -1
    index, drawn = common.sample(labels, num, fraction)
    counts = torch.stack([drawn.sum(1), (drawn & (labels.gather(1, index) == 1)).sum(1)], 1)
    counts = counts.to("cpu", non_blocking=True)  # arrives while the host waits below
    image, slot = drawn.nonzero(as_tuple=True)  # the host waits here, for R
    index = index[image, slot]
    is_gt = index < num_gt
    # A copy belongs to its own object, even where two objects have the same box.
    gt = torch.where(is_gt, index, matched[image, index])
    positive = labels[image, index] == 1
    return SampledRois(
        image=image,
        boxes=boxes[image, index],
        labels=torch.where(positive, gt_labels[image, gt], num_classes),
        gt=gt,
        gt_boxes=gt_boxes[image, gt],
        is_gt=is_gt,
        counts=counts.tolist(),
    )


# ------------------------------------------------------------------------------ head


RCNN_STDS = (0.1, 0.1, 0.2, 0.2)  # an RoI's deltas are predicted in these units


def output_layer(in_features: int, out_features: int, std: float) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


def two_fc(in_features: int, hidden: int, num_outputs: int, std=0.01) -> nn.Sequential:
    """[R, C, S, S] -> [R, num_outputs], by two hidden layers. The output starts at N(0, std).

    >>> two_fc(4 * 7 * 7, 16, 11)(torch.rand(3, 4, 7, 7)).shape
    torch.Size([3, 11])
    """  # choice: the hidden layers start as PyTorch starts them
    last = output_layer(hidden, num_outputs, std)
    first, second = nn.Linear(in_features, hidden), nn.Linear(hidden, hidden)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), last)


def class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over the RoIs of all processes: logits [R, K + 1], labels [R]."""
    total = F.cross_entropy(logits.float(), labels, reduction="sum")
    return total / common.shared_rows(labels)


def class_box_loss(
    deltas: Tensor, rois: Tensor, labels: Tensor, gt_boxes: Tensor, stds=RCNN_STDS
) -> Tensor:
    """Smooth L1 (beta 1) of the true class's deltas: sum over positives / number of all RoIs.

    deltas [R, 4K] in units of stds, rois [R, 5], labels [R], gt_boxes [R, 4] -> a scalar.
    """
    num_classes = deltas.shape[1] // 4
    positive = labels < num_classes
    deltas = deltas.unflatten(1, (num_classes, 4))  # [R, K, 4]; view fails if R = 0
    row = torch.arange(len(deltas), device=deltas.device)
    deltas = deltas[row, torch.where(positive, labels, 0)]  # [R, 4]
    targets = common.encode_boxes(rois[:, 1:], gt_boxes, stds)
    loss = F.smooth_l1_loss(deltas.float(), targets, reduction="none").sum(1)  # [R]
    return torch.where(positive, loss, 0).sum() / common.shared_rows(loss)


def best_boxes(outputs: dict, threshold: float) -> dict[str, Tensor]:
    """Candidates for NMS: each class over a threshold, with that class's box.

    outputs: R rois, sizes [B, 2], probs [R, K] and deltas [R, K, 4] -> boxes [N, 4]; scores,
    labels, image and roi [N], the index of the RoI that a candidate comes from.
    """
    row, labels, scores = over_threshold(outputs["probs"], threshold)
    rois = outputs["rois"][row]
    deltas = outputs["deltas"][row, labels]
    boxes = common.decode_boxes(rois.boxes, deltas, RCNN_STDS)
    boxes = common.clip_boxes(boxes, outputs["sizes"][rois.image])
    return dict(boxes=boxes, scores=scores, labels=labels, image=rois.image, roi=row)


# ------------------------------------------------------------------------------ detector


class TwoStage(BaseDetector):
    """Backbone, RPN and pooling. A detector adds heads, `loss` and `candidates`.

    A detector that does more with all proposals than to classify them has its own `outputs`.
    """

    settings: TwoStageModel
    classify: nn.Sequential  # [R, C, 7, 7] -> class logits [R, K + 1]

    def __init__(self, model: TwoStageModel, num_classes: int):
        super().__init__(model, num_classes)
        limits = (model.proposals_train, model.proposals_test)
        self.rpn = RPN(
            model.fpn_channels,
            scale=model.anchor_scale,
            pre_nms=limits,
            post_nms=limits,
            num_samples=model.rpn_samples,
            floor=model.rpn_floor,
            legacy=model.legacy,
        )
        self.strides = self.backbone.strides[:4]  # RoIs are pooled from P2..P5

    def training_rois(
        self, images: list[Tensor], targets: list[dict], iou: float = 0.5
    ) -> tuple[list[Tensor], Tensor, dict[str, Tensor], SampledRois]:
        """Run backbone and RPN: features, sizes [B, 2], the RPN's losses, the RoIs drawn."""
        batch, sizes = common.pad_images(images)
        features = self.backbone(batch)
        output = self.rpn(features)
        losses = self.rpn.loss(output, sizes, targets)
        proposals, valid = self.rpn.proposals(output, sizes, training=True)
        num, fraction = self.settings.roi_samples, self.settings.roi_positive
        rois = sample_rois(proposals, valid, targets, num, fraction, self.num_classes, iou)
        return features, sizes, losses, rois

    def test_rois(self, images: list[Tensor]) -> tuple[list[Tensor], Tensor, Proposals]:
        """Run backbone and RPN: features, sizes [B, 2], and the proposals."""
        batch, sizes = common.pad_images(images)
        features = self.backbone(batch)
        boxes, valid = self.rpn.proposals(self.rpn(features), sizes)  # [B, P, 4], [B, P]
        level = kernels.roi_level(F.pad(boxes, (1, 0)).flatten(0, 1), self.strides)  # [B*P]
        on_level = F.one_hot(level, len(self.strides)) * valid.flatten()[:, None]  # [B*P, L]
        per_level = on_level.sum(0).to("cpu", non_blocking=True)
        image, slot = valid.nonzero(as_tuple=True)  # the host waits here, for R and per_level
        return features, sizes, Proposals(image, boxes[image, slot], per_level)

    @torch.no_grad()
    def outputs(self, images: list[Tensor]) -> dict:
        """Feature maps, sizes [B, 2], R proposals, and their class probabilities [R, K]."""
        features, sizes, rois = self.test_rois(images)
        logits = self.classify(self.class_features(features, rois))
        probs = logits.float().softmax(1)[:, :-1]
        return dict(features=features, sizes=sizes, rois=rois, probs=probs)

    def best_proposals(self, outputs: dict, test: Test, most: int) -> tuple[Rois, dict]:
        """NMS on the proposals, within each class: the `most` best of each image, in order.

        -> N RoIs, and their scores, labels, image and roi [N], the index among the proposals.
        A proposal takes part once for each class in which its score is over the threshold.
        """
        row, labels, scores = over_threshold(outputs["probs"], test.score_threshold)
        rois = outputs["rois"][row]
        groups = rois.image * self.num_classes + labels
        keep, _ = kernels.nms_padded(rois.boxes, scores, groups, test.nms_iou)  # then -1s
        best = first_per_image(rois.image[keep], len(outputs["sizes"]), most) & (keep >= 0)
        keep = keep[best.nonzero()[:, 0]]  # the host waits here
        rois, row = rois[keep], row[keep]
        return rois, dict(scores=scores[keep], labels=labels[keep], image=rois.image, roi=row)

    def class_features(self, features: list[Tensor], rois: Rois) -> Tensor:
        """The features that R RoIs are classified from: [R, C, 7, 7]."""
        return self.pool(features, rois, 7)

    def pool(self, features: list[Tensor], rois: Rois, size: int) -> Tensor:
        """RoIAlign of R RoIs from P2..P5 -> [R, C, size, size]."""
        return self.align(features[:4], rois.flat(), size, self.strides)

    def align(self, maps: list[Tensor], rois: Tensor, size: int, strides) -> Tensor:
        """RoIAlign of rois [R, 5] from maps of these strides -> [R, C, size, size]."""
        return self.normalise(roi_align(maps, rois, size, strides, self.settings.legacy))

    def normalise(self, pooled: Tensor) -> Tensor:
        """With `pool_norm`, give each channel of a RoI mean 0 and variance 1: [R, C, S, S]."""
        if not self.settings.pool_norm:
            return pooled
        return torch.group_norm(pooled, pooled.shape[1])

    def by_level(self, rois: Rois) -> tuple[Tensor, list[int]]:
        """An order [R] that sorts the RoIs by level, and how many lie on each of P2..P5."""
        level = kernels.roi_level(rois.flat(), self.strides)
        if isinstance(rois, Proposals):
            per_level = rois.per_level
        else:  # the host waits for these numbers
            per_level = F.one_hot(level, len(self.strides)).sum(0)
        return level.argsort(stable=True), per_level.tolist()


class Detector(TwoStage):
    """Faster R-CNN: class logits and deltas of every RoI."""

    settings: Model

    def __init__(self, model: Model, num_classes: int):
        super().__init__(model, num_classes)
        features, hidden = model.fpn_channels * 7 * 7, model.fc_channels
        self.classify = two_fc(features, hidden, num_classes + 1, model.class_std)
        self.regress = self.make_box_branch()
        self.to(memory_format=torch.channels_last)

    def make_box_branch(self) -> nn.Module:
        hidden, num_deltas = self.settings.fc_channels, 4 * self.num_classes
        if self.settings.shared:
            return output_layer(hidden, num_deltas, 0.001)  # std as in Fast R-CNN
        return two_fc(self.settings.fpn_channels * 7 * 7, hidden, num_deltas)

    def head(self, features: list[Tensor], rois: Rois) -> tuple[Tensor, Tensor]:
        """Class logits [R, K + 1] and deltas [R, 4K] of R RoIs."""
        hidden = self.classify[:-1](self.class_features(features, rois))
        logits = self.classify[-1](hidden)
        if self.settings.shared:
            return logits, self.regress(hidden)
        return logits, self.regress(self.pool(features, rois, 7))

    def loss(self, images: list[Tensor], targets: list[dict]) -> dict[str, Tensor]:
        """The RPN's losses, and those of the head on the RoIs drawn: `cls`, `reg`."""
        features, _, losses, rois = self.training_rois(images, targets)
        logits, deltas = self.head(features, rois)
        losses["cls"] = self.settings.cls_weight * class_loss(logits, rois.labels)
        losses["reg"] = class_box_loss(deltas, rois.flat(), rois.labels, rois.gt_boxes)
        return losses

    @torch.no_grad()
    def outputs(self, images: list[Tensor]) -> dict:
        """R proposals, their class probabilities [R, K] and their deltas [R, K, 4]."""
        features, sizes, rois = self.test_rois(images)
        logits, deltas = self.head(features, rois)
        probs = logits.float().softmax(1)[:, :-1]
        return dict(sizes=sizes, rois=rois, probs=probs, deltas=deltas.unflatten(1, (-1, 4)))

    def candidates(self, outputs: dict, test: Test) -> dict[str, Tensor]:
        """Each class over the threshold, with that class's box."""
        return best_boxes(outputs, test.score_threshold)


def main(argv=None):
    return engine.run("faster_rcnn", Settings, Detector, argv)


if __name__ == "__main__":
    main()
