"""Faster R-CNN with a feature pyramid: propose boxes, then classify and move each of them.
Papers: https://arxiv.org/abs/1506.01497 (Faster R-CNN)   https://arxiv.org/abs/1612.03144 (FPN)

D2Det, Double-Head and CPM R-CNN start from this detector. Its first stage, the region proposal
network (RPN), predicts for every anchor whether it lies on an object of any class, and moves it:
a thousand proposals are left of a quarter of a million anchors. Its second stage looks at each
proposal alone. RoIAlign cuts features of one size out of the pyramid, whatever the proposal's
size; two hidden layers predict its class, and a box for each class.

    image -> ResNet-FPN -> P2..P6, strides 4..64, [B, C, H, W] each
      RPN, on every cell of every level: 3x3 conv -> A objectness logits and A deltas
        -> the level's best 2000 anchors -> decode, clip -> NMS 0.7 inside each level
        -> the image's best 2000: proposals [B, P, 4]       (in testing 1000 instead of 2000)
      head, on every proposal: RoIAlign from one of P2..P5, by the proposal's size -> [R, C, 7, 7]
        -> 2 fc -> class logits [R, K + 1], deltas [R, 4K]
    training: 256 anchors of an image train the RPN; 512 of its proposals and gts train the head, at
              most a quarter of them positive
    test:     softmax -> classes over 0.05, each with its own box -> NMS 0.5 per class -> best 100

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
from engine import Amount, Natural, Share
from engine.detector import BaseDetector, first_per_image, over_threshold
from engine.legacy import make_anchors, roi_align

# B images, R RoIs, K classes, C channels, A anchors per cell, P proposals per image (padded)
# labels 0..K-1, background K
# `rois` is a `Rois`, or [R, 5] for functions that take plain tensors: image index, x1, y1, x2, y2


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
    pool_norm: bool = False  # choice: heads see each channel of an RoI normalised (tiny preset)
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


# ------------------------------------------------------------------------------ proposals


def take(boxes: Tensor, index: Tensor) -> Tensor:
    """Pick rows of each image: boxes [B, N, 4], index [B, M] -> [B, M, 4]."""
    return boxes.gather(1, index[..., None].expand(-1, -1, 4))


class RPN(nn.Module):
    """Region proposal network: which anchors lie on an object, and where the object is.

    All levels share its convolutions. NMS sees each level's best `pre_nms` boxes and leaves the
    best `post_nms` of each image; both are pairs (in training, in testing). The `output` that
    `proposals` and `loss` take is what `forward` returns.
    """

    def __init__(
        self,
        in_channels: int = 256,
        strides=(4, 8, 16, 32, 64),
        scale: float = 8.0,
        ratios=(0.5, 1.0, 2.0),
        pre_nms=(2000, 1000),
        post_nms=(2000, 1000),
        nms_iou: float = 0.7,
        num_samples: int = 256,
        floor: float = 0.0,
        legacy: tuple[str, ...] = (),
    ):
        super().__init__()
        self.strides, self.scales, self.ratios = strides, (scale,), ratios
        self.pre_nms, self.post_nms, self.nms_iou = pre_nms, post_nms, nms_iou
        self.num_samples, self.floor, self.legacy = num_samples, floor, legacy
        self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.logits = nn.Conv2d(in_channels, len(ratios), 1)
        self.deltas = nn.Conv2d(in_channels, 4 * len(ratios), 1)
        for layer in (self.conv, self.logits, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, features: list[Tensor]):
        """L maps -> anchors [N, 4], logits [B, N], deltas [B, N, 4], and N of each level."""
        hidden = [F.relu(self.conv(f)) for f in features]
        shapes, device = [f.shape[-2:] for f in features], features[0].device
        anchors = make_anchors(shapes, self.strides, self.scales, self.ratios, device, self.legacy)
        logits = common.flatten_levels([self.logits(h) for h in hidden], 1).squeeze(-1).float()
        deltas = common.flatten_levels([self.deltas(h) for h in hidden], 4).float()
        return anchors, logits, deltas, [h * w * len(self.ratios) for h, w in shapes]

    @torch.no_grad()
    def proposals(self, output, sizes: Tensor, training: bool = False) -> tuple[Tensor, Tensor]:
        """Best proposals of each image: boxes [B, P, 4] (best first, clipped), valid [B, P]."""
        anchors, logits, deltas, per_level = output
        logits = torch.where(common.inside_image(anchors, sizes), logits.detach(), -torch.inf)
        picked, first = [], 0
        for n in per_level:
            most = min(n, self.pre_nms[not training])
            picked.append(logits[:, first : first + n].topk(most, dim=1)[1] + first)
            first += n
        level = torch.cat([torch.full_like(p, i) for i, p in enumerate(picked)], 1)
        index = torch.cat(picked, 1)  # [B, M]
        B, M = index.shape
        scores = logits.gather(1, index)
        boxes = common.decode_boxes(anchors[index], take(deltas, index))  # [B, M, 4]
        boxes = common.clip_boxes(boxes, sizes[:, None])
        scores[(boxes[..., 2:] <= boxes[..., :2]).any(-1)] = -torch.inf
        image = torch.arange(B, device=index.device)[:, None].expand(-1, M)
        groups = image * len(per_level) + level  # [B, M]: boxes of one level of one image compete
        # keep [B * M]: the survivors' indices, then -1s, so that the host need not know how many
        scores, groups = scores.flatten(), groups.flatten()
        keep, _ = kernels.nms_padded(boxes.flatten(0, 1), scores, groups, self.nms_iou)
        scores = F.pad(scores, (0, 1), value=-torch.inf)  # index -1 is this last entry
        survivors = torch.full_like(scores, -torch.inf)
        survivors[keep] = scores[keep]
        best, index = survivors[:-1].view(B, M).topk(min(self.post_nms[not training], M), 1)
        valid = best > -torch.inf
        return take(boxes, index) * valid[..., None], valid

    def loss(self, output, sizes: Tensor, targets: list[dict]) -> dict[str, Tensor]:
        """Objectness (BCE) and box (smooth L1) losses.

        Anchors are positive from IoU 0.7 on, negative below 0.3. An object's best anchor is
        positive as well, unless its IoU is below `floor`.
        """
        anchors, logits, deltas, _ = output
        gt_boxes, _, gt_valid, gt_ignore = common.pad_targets(targets)
        inside = common.inside_image(anchors, sizes)
        visible = anchors * inside[..., None]  # [B, N, 4]; those in the padding lose their area
        labels, matched, _ = common.match(
            visible, gt_boxes, 0.7, 0.3, gt_valid, gt_ignore, low_quality=self.floor
        )
        labels[~inside] = -1
        index, valid = common.sample(labels, self.num_samples, 0.5)
        positive = valid & (labels.gather(1, index) == 1)
        num = common.shared_count(valid.sum())
        logit = logits.gather(1, index)
        objectness = F.binary_cross_entropy_with_logits(logit, positive.float(), reduction="none")
        gts = take(gt_boxes, matched.gather(1, index))  # [B, num_samples, 4]
        delta_targets, delta = common.encode_boxes(anchors[index], gts), take(deltas, index)
        box = F.smooth_l1_loss(delta, delta_targets, beta=1 / 9, reduction="none").sum(-1)
        objectness = torch.where(valid, objectness, 0).sum() / num
        return dict(rpn_cls=objectness, rpn_box=torch.where(positive, box, 0).sum() / num)


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
class TrainingRois(Rois):
    """RoIs, each with the object that it was matched to."""

    labels: Tensor  # [R] of the object, background K
    gt: Tensor  # [R] index of the object among its image's targets, for background too
    gt_boxes: Tensor  # [R, 4] the object's box
    is_gt: Tensor  # [R] bool: the RoI is a copy of an object's box


@dataclass
class SampledRois(TrainingRois):
    """RoIs as they were drawn, image after image, the positives of an image first."""

    counts: list[tuple[int, int]]  # of each image: all its RoIs, the positives among them

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
    every object however bad the proposals are. A RoI is positive if its IoU with a gt is >= `iou`.
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


def two_fc(in_features: int, hidden: int, num_outputs: int, std: float = 0.01) -> nn.Sequential:
    """[R, C, S, S] -> [R, num_outputs]: two hidden layers and an output that starts at N(0, std).

    >>> two_fc(4 * 7 * 7, 16, 11)(torch.rand(3, 4, 7, 7)).shape
    torch.Size([3, 11])
    """  # choice: the hidden layers start as PyTorch starts them
    last = output_layer(hidden, num_outputs, std)
    first, second = nn.Linear(in_features, hidden), nn.Linear(hidden, hidden)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), last)


def class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over all processes' RoIs: logits [R, K + 1], labels [R]; 0 with R = 0."""
    total = F.cross_entropy(logits.float(), labels, reduction="sum")
    return total / common.shared_rows(labels)


def class_box_loss(deltas: Tensor, rois: Tensor, labels: Tensor, gt_boxes: Tensor, stds=RCNN_STDS):
    """Smooth L1 (beta 1) of the true class's deltas, the sum over positives / the number of RoIs.

    deltas [R, 4K] in stds, rois [R, 5], labels [R] with background K, gt_boxes [R, 4] -> a scalar.
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

    outputs: R rois, sizes [B, 2], probs [R, K] and deltas [R, K, 4]. In what is returned, `roi` is
    the index of the RoI that each candidate comes from.
    """
    row, labels, scores = over_threshold(outputs["probs"], threshold)
    rois = outputs["rois"][row]
    deltas = outputs["deltas"][row, labels]
    boxes = common.decode_boxes(rois.boxes, deltas, RCNN_STDS)
    boxes = common.clip_boxes(boxes, outputs["sizes"][rois.image])
    return dict(boxes=boxes, scores=scores, labels=labels, image=rois.image, roi=row)


# ------------------------------------------------------------------------------ detector


class TwoStage(BaseDetector):
    """Backbone, RPN and pooling. A detector adds heads, `loss`, `outputs` and `candidates`."""

    settings: TwoStageModel

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
        """Run backbone and RPN: features, sizes [B, 2], the RPN's losses, and the RoIs drawn."""
        batch, sizes = common.pad_images(images)
        features = self.backbone(batch)
        output = self.rpn(features)
        losses = self.rpn.loss(output, sizes, targets)
        proposals, valid = self.rpn.proposals(output, sizes, training=True)
        num, fraction = self.settings.roi_samples, self.settings.roi_positive
        rois = sample_rois(proposals, valid, targets, num, fraction, self.num_classes, iou)
        return features, sizes, losses, rois

    def test_rois(self, images: list[Tensor]) -> tuple[list[Tensor], Tensor, Rois]:
        """Run backbone and RPN: features, sizes [B, 2], and the proposals."""
        batch, sizes = common.pad_images(images)
        features = self.backbone(batch)
        proposals, valid = self.rpn.proposals(self.rpn(features), sizes)
        image, slot = valid.nonzero(as_tuple=True)
        return features, sizes, Rois(image, proposals[image, slot])

    def best_proposals(
        self, rois: Rois, scores: Tensor, labels: Tensor, num_images: int, iou: float, most: int
    ) -> Tensor:
        """Indices of RoIs that NMS within each class keeps, at most `most` an image, best first.

        rois, scores and labels [N]: each RoI occurs once for each class that it may have.
        """
        groups = rois.image * self.num_classes + labels
        keep, _ = kernels.nms_padded(rois.boxes, scores, groups, iou)  # [N], the rest is -1
        best = first_per_image(rois.image[keep], num_images, most) & (keep >= 0)
        return keep[best.nonzero()[:, 0]]  # the host waits here

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
        """An order [R] that sorts the RoIs by level, and the number of RoIs of each, P2..P5."""
        level = kernels.roi_level(rois.flat(), self.strides)
        counts = F.one_hot(level, len(self.strides)).sum(0).tolist()  # the host waits here
        return level.argsort(stable=True), counts


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

    def class_features(self, features: list[Tensor], rois: Rois) -> Tensor:
        """The features that R RoIs are classified from: [R, C, 7, 7]."""
        return self.pool(features, rois, 7)

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
