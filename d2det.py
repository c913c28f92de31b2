"""D2Det (Cao et al., CVPR 2020): regress a box from every cell, classify from telling places.
Paper: https://openaccess.thecvf.com/content_CVPR_2020/html/Cao_D2Det_Towards_High_Quality_Object_Detection_and_Instance_Segmentation_CVPR_2020_paper.html
Releases: https://github.com/JialeCao001/D2Det, https://github.com/JialeCao001/D2Det-mmdet2.1

Faster R-CNN (baselines/faster_rcnn.py) flattens a proposal's features into one vector and
reads class and box from it. D2Det gives each task its own branch:

Dense local regression (DLR, 3.1). A fully connected layer mixes all cells of a proposal into
    one offset. DLR is convolutional and keeps positions: each of 7x7 cells predicts its own
    distances to the object's four sides, and the box is the mean of the cells' boxes. The
    distances are real numbers. Grid R-CNN's key points are quantised, in a fixed region.
Overlap prediction (3.1). Cells on background predict less precise boxes. So each cell also
    predicts whether it lies on the object, and only the cells that do enter the mean.
Discriminative RoI pooling (DRP, 3.2). Classification needs an object's telling parts.
    Deformable RoI pooling finds them by moving its bins. DRP predicts the moves with about a
    quarter of the weights, and gives telling samples a higher weight in each bin's average.

    image -> ResNet-FPN -> P2..P6 -> RPN -> proposals
      DLR:  RoIAlign 14x14 -> 8 convs, the first strided -> trunk [R, 576, 7, 7]
            -> l, t, r, b of each cell [R, 4, 7, 7], overlap logit of each cell [R, 1, 7, 7]
            -> box = mean of the boxes of the cells with overlap > 0.5
      DRP:  RoIAlign 3x3 -> 3 fc -> moves of 7x7 bins [R, 2, 7, 7] -> deformable pooling 14x14
            -> weighted average 7x7 -> 2 fc -> class logits [R, K + 1]
    training: all sampled RoIs train the classifier; the positives, slightly moved, train DLR
    test:     score the proposals -> NMS -> best 125 -> DLR moves them -> soft-NMS

    Eq. 1   x = (x_G - x_P) / w_P, w = log(w_G / w_P) ..    common.encode_boxes (Faster R-CNN)
    Eq. 2   l_i = (x_i - x_l) / w_P ..                      dense_offset_targets, cell_boxes
    Eq. 3   m_i = 1 if cell i lies in G, else 0             dense_offset_targets
    3.1     box = mean of the boxes of cells, m_i > 0.5     decode
    Eq. 4   F~ = W(F) * F, then average pooling             AdaptiveWeightedPool

Where paper and releases differ, we follow the releases, which made the paper's numbers:
    A cell counts as "in G" only if it lies a sixth of the proposal's width and height inside
    G's sides: 25 of the 49 cells of a perfect proposal do. `--overlap-margin 0` is Eq. 3.
    The box loss is bounded where the IoU is below 0.1 (`iou_loss`).
docs/deviations.md lists all others. "(3.1)" is a section of the paper, "(release)" a value
seen in the releases, "choice:" our own where neither decides. Masks (3.3) are at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import common
import engine
import kernels
from baselines import faster_rcnn
from baselines.faster_rcnn import Rois, TrainingRois
from baselines.mask_branch import MaskBranch, mask_losses, mask_targets
from engine import Amount, Natural, Share

# B images, R RoIs, P positive RoIs, K classes, C channels; S = 7 side of the grid of cells
# rois: a `Rois`, or [R, 5] (image index, x1, y1, x2, y2) for functions of plain tensors
# offsets [R, 4, S, S]: l, t, r, b over the proposal's w, h, w, h; overlap_logits [R, 1, S, S]
# labels 0..K-1, background K; masks [R, M, M], each over the box of its object


@dataclass
class Model(faster_rcnn.Model):
    """D2Det with ResNet-50."""

    norm: engine.Norm = "eval_bn"  # the backbone's BatchNorm (release)
    rpn_floor: Share = 0.3  # an object's best anchor is positive from this IoU on (release)
    dlr: bool = True  # dense local regression (3.1); off: two fc layers and one box per class
    drp: bool = True  # discriminative RoI pooling (3.2); off: RoIAlign 7x7
    overlap: bool = True  # predict which cells lie on the object (Eq. 3); off: use all cells
    weighting: bool = True  # adaptive weights in DRP (Eq. 4); off: plain average
    shared: bool = False  # without DLR: class and box from the same layers (4.2: 37.7 AP)
    conv_channels: Natural = 576  # width of DLR's convolutions (release)
    num_convs: Natural = 8  # number of DLR's convolutions (4.1)
    groups: Natural = 36  # groups of the GroupNorm after each of them (release)
    drp_per_level: bool = True  # one set of DRP weights per pyramid level (release)
    gamma: Share = 0.1  # unit of the bins' moves, as a share of the RoI's sides (release)
    drp_samples: Natural = 2  # samples a side of DRP's 14x14 bins (release: R-50 2, R-101 1)
    offset_bias: float = 0.0  # where offsets start (release); 0.5: at the proposal's size
    overlap_margin: Share = 1 / 6  # least l, t, r, b of a cell inside (release); 0: Eq. 3
    reg_cells: Literal["inside", "all"] = "inside"  # cells that train the box (second release)
    cls_weight: Amount = 2.0  # weight of the classification loss (release)
    reg_weight: Amount = 1.0  # weight of the box loss (second release)
    overlap_weight: Amount = 1.0  # weight of the overlap loss (release)
    jitter: Share = 0.15  # RoIs that train DLR move and grow by up to this share (release)
    reg_rois: Natural = 192  # at most this many RoIs train DLR, per process and step (release)
    masks: bool = False  # instance segmentation (3.3); released with NMS 0.3, no soft-NMS
    mask_channels: Natural = 256  # width of the mask branch's convolutions (release)


@dataclass
class Test(faster_rcnn.Test):
    """As released: soft-NMS at the end, which the paper uses for test-dev."""

    score_threshold: Share = 0.03  # lowest class score that is looked at (release)
    nms_iou: Share = 0.5  # NMS per class, on the proposals, before DLR (release)
    reg_test: Natural = 125  # proposals per image that DLR regresses (4.1: 100 to 125)
    soft_nms: bool = True  # linear soft-NMS on DLR's boxes (4.1: for test-dev); off: no NMS
    soft_nms_iou: Share = 0.5  # overlap above which soft-NMS lowers scores (release)
    soft_nms_score: Share = 1e-3  # soft-NMS drops boxes whose score falls below this (release)
    readable: bool = False  # run `decode`, the readable form, instead of its kernel


# DLR is as wide as computing time allows, near its baseline's box branch (docs/log.md).
TINY = faster_rcnn.TINY | dict(conv_channels=64, num_convs=6, groups=8, mask_channels=32)
TINY |= dict(drp_samples=1, drp_per_level=False)  # R-101 release; paper. Both save time
TINY |= dict(offset_bias=0.5)  # a narrow head that starts at empty boxes may close its ReLU
TINY |= dict(cls_weight=1.0)  # choice: as in the baseline; 2 makes boxes worse (docs/log.md)
TINY |= dict(reg_test=50, reg_weight=4.0)  # choice: boxes have few steps to learn in
TINY |= dict(reg_rois=48)  # choice: mostly reached; a CPU plans convolutions for each number


@dataclass
class Settings(engine.Settings):
    """D2Det with ResNet-50 on COCO, as released: Table 2's last row with soft-NMS."""

    tiny = TINY

    model: Model = field(default_factory=Model)
    test: Test = field(default_factory=Test)
    run: engine.Run = field(  # 2x schedule (4.1); drops and warm-up (release)
        default_factory=lambda: engine.Run(
            epochs=24.0, drops=(20 / 24, 23 / 24), warmup=1000, warmup_factor=1 / 80
        )
    )


# ------------------------------------------------------------------------------ equations


def cell_centres(proposals: Tensor, size: int = 7) -> Tensor:
    """Centres (x_i, y_i) of the proposals' size x size cells: [R, 4] -> [R, 2, S, S]."""
    step = (torch.arange(size, device=proposals.device) + 0.5) / size
    w, h = (proposals[:, 2:] - proposals[:, :2]).unbind(1)
    x = proposals[:, 0, None] + w[:, None] * step  # [R, S]
    y = proposals[:, 1, None] + h[:, None] * step
    return torch.stack([x[:, None].expand(-1, size, -1), y[..., None].expand(-1, -1, size)], 1)


def dense_offset_targets(
    proposals: Tensor, gt_boxes: Tensor, size: int = 7, margin: float = 1 / 6
) -> tuple[Tensor, Tensor]:
    """Eq. 2 and 3: what each cell should predict.

        l_i = (x_i - x_l) / w_P     t_i = (y_i - y_t) / h_P
        r_i = (x_r - x_i) / w_P     b_i = (y_b - y_i) / h_P
        m_i = 1 if l_i, t_i, r_i and b_i are all at least `margin`, else 0

    proposals, gt_boxes [R, 4] -> offsets [R, 4, S, S], inside (m) [R, 1, S, S]. (x_i, y_i) is
    a cell's centre; x_l, y_t, x_r, y_b are the gt's sides. Offsets of cells outside the gt may
    be negative. Margin 0 is Eq. 3, 1/6 the release. `decode` recovers the gt.

    >>> box = torch.tensor([[0., 0., 14., 14.]])
    >>> offsets, inside = dense_offset_targets(box, box)
    >>> offsets[0, :, 0, 3] * 14  # first row, middle column: centre (7, 1)
    tensor([ 7.,  1.,  7., 13.])
    """
    x, y = cell_centres(proposals, size).unbind(1)  # [R, S, S]
    x1, y1, x2, y2 = gt_boxes[:, :, None, None].unbind(1)  # [R, 1, 1]
    wh = (proposals[:, 2:] - proposals[:, :2]).clamp(min=1e-6).repeat(1, 2)  # [R, 4]
    offsets = torch.stack([x - x1, y - y1, x2 - x, y2 - y], 1) / wh[..., None, None]
    return offsets, (offsets >= margin).all(1, keepdim=True).float()


def cell_boxes(proposals: Tensor, offsets: Tensor) -> Tensor:
    """Inverse of Eq. 2: the box that each cell predicts, [R, 4, S, S].

    (x_i - l_i w_P,  y_i - t_i h_P,  x_i + r_i w_P,  y_i + b_i h_P)
    """
    centre = cell_centres(proposals, offsets.shape[-1])
    wh = (proposals[:, 2:] - proposals[:, :2])[..., None, None]
    return torch.cat([centre - offsets[:, :2] * wh, centre + offsets[:, 2:] * wh], 1)


def decode(proposals: Tensor, offsets: Tensor, overlap_logits: Tensor) -> Tensor:
    """3.1: the box [R, 4] of each proposal, from its cells.

        box = mean of the boxes of the cells with overlap > 0.5, or of all cells if none has

    Testing runs the equal `kernels.decode_dense_offsets`, or with `--readable` this function.

    >>> box = torch.tensor([[0., 0., 14., 14.]])
    >>> offsets, inside = dense_offset_targets(box, torch.tensor([[2., 1., 12., 14.]]))
    >>> decode(box, offsets, inside - 0.5)
    tensor([[ 2.,  1., 12., 14.]])
    """
    used = overlap_logits > 0  # sigmoid > 0.5, [R, 1, S, S]
    used = used | ~used.any((2, 3), keepdim=True)
    boxes = cell_boxes(proposals, offsets).where(used, 0)  # [R, 4, S, S]
    return boxes.sum((2, 3)) / used.sum((2, 3))


def iou_loss(boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    """-log IoU of boxes [R, 4, ...] with gt_boxes [R, 4, 1...] -> [R, ...], bounded (release).

    The paper names no box loss. The releases take -log IoU, but -log(IoU + 0.1) where the IoU
    is at most 0.1. Boxes start almost empty, where the slope 1 / IoU makes wide heads diverge.
    """
    iou = common.aligned_iou(boxes.movedim(1, -1), gt_boxes.movedim(1, -1)).clamp(min=1e-6)
    return -torch.where(iou > 0.1, iou, iou + 0.1).log()


def jitter_boxes(boxes: Tensor, amount: float, sizes: Tensor) -> Tensor:
    """Move and grow boxes [R, 4] at random, by up to `amount` of their sides; then clip."""
    wh = boxes[:, 2:] - boxes[:, :2]
    move, grow = ((torch.rand_like(boxes) * 2 - 1) * amount).chunk(2, 1)  # [R, 2] each
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + move * wh
    half = wh * (1 + grow) / 2
    return common.clip_boxes(torch.cat([centre - half, centre + half], 1), sizes)


# ------------------------------------------------------------------------------ heads


class DenseLocalHead(nn.Module):
    """DLR (3.1): pooled features -> each cell's offsets and overlap logit.

    [R, C, 2S, 2S] -> offsets [R, 4, S, S] (l, t, r, b >= 0), overlap_logits [R, 1, S, S].

    With offset_bias 0 (release), the ReLU may close both l and r of a cell, or t and b. Its
    box is then empty and gets no gradient. 29 to 57 % of the cells inside start so (five seeds
    at full width, random features). With offset_bias 0.5 none does.

    >>> offsets, overlap = DenseLocalHead(8, 16, 2, 4)(torch.rand(3, 8, 14, 14))
    >>> offsets.shape, overlap.shape
    (torch.Size([3, 4, 7, 7]), torch.Size([3, 1, 7, 7]))
    """

    def __init__(
        self, in_channels=256, conv_channels=576, num_convs=8, groups=36, offset_bias=0.0
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(num_convs):
            before, stride = (conv_channels, 1) if i else (in_channels, 2)
            conv = nn.Conv2d(before, conv_channels, 3, stride, padding=1, bias=False)
            layers += [conv, nn.GroupNorm(groups, conv_channels), nn.ReLU(inplace=True)]
        self.trunk = nn.Sequential(*layers)
        self.offsets = nn.Conv2d(conv_channels, 4, 3, padding=1)
        self.overlap = nn.Conv2d(conv_channels, 1, 3, padding=1)
        for layer in (self.offsets, self.overlap):
            nn.init.normal_(layer.weight, std=0.001)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.offsets.bias, offset_bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        return self.cells(self.trunk(pooled))

    def cells(self, trunk: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets and overlap logits from the trunk's features [R, conv_channels, S, S]."""
        return F.relu(self.offsets(trunk)), self.overlap(trunk)


class AdaptiveWeightedPool(nn.Module):
    """Eq. 4 as released: the weighted average of the samples F in 3x3 windows at stride 2.

        avg(W(F) * F) / avg(W(F))     W(F) = exp(12 sigmoid(norm(conv(F))))

    [R, C, 2S, 2S] -> [R, C, S, S]. Weights lie between 1 and e^12. The idea is that of local
    importance pooling (LIP); the paper's equation does not divide by the average weight. The
    convolution starts at zero, so the pool starts as the plain average of samples in the map.

    >>> AdaptiveWeightedPool(4)(torch.ones(2, 4, 14, 14)).shape
    torch.Size([2, 4, 7, 7])
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(channels, channels)  # instance norm that takes an empty batch
        nn.init.zeros_(self.conv.weight)

    def forward(self, features: Tensor) -> Tensor:
        features = features.contiguous(memory_format=torch.channels_last)
        logits = self.norm(self.conv(features).contiguous())  # CPU: slow if channels_last
        logits = logits.float().contiguous(memory_format=torch.channels_last)
        weight = (12 * logits.sigmoid()).exp().to(features.dtype)
        return F.avg_pool2d(features * weight, 3, 2, 1) / F.avg_pool2d(weight, 3, 2, 1)


class DiscriminativePool(nn.Module):
    """DRP (3.2): pool coarsely, predict from it how each bin moves, pool there, average.

    features L x [B, C, H, W] of these strides, rois [R, 5] -> [R, C, S, S]; R may be 0.
    Deformable RoI pooling predicts the moves from S x S cells. S//2 x S//2 cells need about a
    quarter of the weights. A bin moves by offset * gamma of the RoI's w and h. It has 2x2
    sub-bins of samples^2 points, whose average is weighted (Eq. 4) if `weighting`.

    >>> pool, rois = DiscriminativePool(4, 16), torch.tensor([[0., 8., 8., 40., 40.]])
    >>> pool([torch.ones(1, 4, 16, 16)], rois, [4]).shape
    torch.Size([1, 4, 7, 7])
    """

    called_alone = ("fc", "pool")  # `pool_discriminatively` calls these

    def __init__(self, channels, fc_channels, size=7, weighting=True, samples=2, gamma=0.1):
        super().__init__()
        self.size, self.samples, self.gamma = size, samples, gamma
        first = nn.Linear(channels * (size // 2) ** 2, fc_channels)
        second, last = nn.Linear(fc_channels, fc_channels), nn.Linear(fc_channels, 2 * size**2)
        self.fc = nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        if weighting:
            self.pool: nn.Module = AdaptiveWeightedPool(channels)
        else:
            self.pool = nn.AvgPool2d(3, 2, 1, count_include_pad=False)  # without padding

    def forward(self, features: list[Tensor], rois: Tensor, strides: list[int]) -> Tensor:
        return pool_discriminatively([self], [rois.shape[0]], features, rois, strides)


def pool_discriminatively(pools, counts: list[int], features, rois, strides) -> Tensor:
    """DRP with several sets of weights: pools[0] for the first counts[0] RoIs, and so on."""
    S, samples, gamma = pools[0].size, pools[0].samples, pools[0].gamma
    coarse = kernels.roi_align(features, rois, S // 2, strides)  # [R, C, S//2, S//2]
    offsets = torch.cat([pool.fc(part) for pool, part in zip(pools, coarse.split(counts))])
    offsets = offsets.float().view(-1, 2, S, S)  # dx, dy of each bin
    offsets = offsets.repeat_interleave(2, 2).repeat_interleave(2, 3)  # [R, 2, 2S, 2S]
    fine = kernels.deform_roi_pool(features, rois, offsets, 2 * S, strides, samples, gamma)
    return torch.cat([pool.pool(part) for pool, part in zip(pools, fine.split(counts))])


# ------------------------------------------------------------------------------ losses


def dense_losses(
    offsets: Tensor,
    overlap_logits: Tensor,
    proposals: Tensor,
    gt_boxes: Tensor,
    margin: float = 1 / 6,
    cells: str = "inside",
    num_rois: Tensor | int | None = None,
    inside: Tensor | None = None,
) -> dict[str, Tensor]:
    """DLR's losses of R positives: `reg` (`iou_loss` of the cells' boxes) and `overlap` (BCE).

    offsets [R, 4, S, S], overlap_logits [R, 1, S, S], proposals, gt_boxes [R, 4] -> scalars,
    sums over cells divided by num_rois * S * S; num_rois is R unless given. With `cells`
    "inside", outside cells add nothing to `reg`, but its divisor counts them (second release).
    inside [R, 1, S, S], 1.0 or 0.0: given if masks instead of gt boxes say which cells are.
    """
    if inside is None:
        _, inside = dense_offset_targets(proposals, gt_boxes, offsets.shape[-1], margin)
    boxes = cell_boxes(proposals, offsets.float())  # [R, 4, S, S]
    loss = iou_loss(boxes, gt_boxes[..., None, None])  # [R, S, S]
    loss = loss * inside[:, 0] if cells == "inside" else loss
    bce = F.binary_cross_entropy_with_logits(overlap_logits.float(), inside, reduction="sum")
    num_rois = max(1, len(proposals)) if num_rois is None else num_rois
    num_cells = num_rois * offsets.shape[-1] ** 2
    return {"reg": loss.sum() / num_cells, "overlap": bce / num_cells}


# ------------------------------------------------------------------------------ detector


class D2Det(faster_rcnn.TwoStage):
    """Figure 2. engine/detector.py has the contract; `outputs` is in faster_rcnn.TwoStage."""

    settings: Model
    regress: Any  # made by make_box_branch
    default_test = Test

    def __init__(self, model: Model, num_classes: int):
        super().__init__(model, num_classes)
        C, S, hidden = model.fpn_channels, 7, model.fc_channels
        self.regress = self.make_box_branch()
        if model.masks:
            channels, width = model.conv_channels, model.mask_channels
            self.mask_branch = MaskBranch(channels, width, num_classes, hidden)
        if model.drp:
            samples, gamma = model.drp_samples, model.gamma
            self.drp = nn.ModuleList(
                DiscriminativePool(C, hidden, S, model.weighting, samples, gamma)
                for _ in range(len(self.strides) if model.drp_per_level else 1)
            )
        self.classify = faster_rcnn.two_fc(C * S * S, hidden, num_classes + 1, model.class_std)
        self.to(memory_format=torch.channels_last)

    def make_box_branch(self) -> nn.Module:
        m, C = self.settings, self.settings.fpn_channels
        return DenseLocalHead(C, m.conv_channels, m.num_convs, m.groups, m.offset_bias)

    def loss(self, images: list[Tensor], targets: list[dict]) -> dict[str, Tensor]:
        """The RPN's losses, `cls` of all RoIs drawn, `reg` and `overlap` of the positives."""
        model = self.settings
        features, sizes, losses, rois = self.training_rois(images, targets)
        logits = self.classify(self.class_features(features, rois))  # [R, K + 1]
        losses["cls"] = model.cls_weight * faster_rcnn.class_loss(logits, rois.labels)
        positive, _ = rois.split()
        order = torch.randperm(len(positive), device=positive.device)
        drawn = rois[positive[order[: model.reg_rois]]]  # P of the positives
        drawn = drawn.moved(jitter_boxes(drawn.boxes, model.jitter, sizes[drawn.image]))
        trunk = self.regress.trunk(self.pool(features, drawn, 14))  # [P, conv_channels, 7, 7]
        return losses | self.positive_losses(trunk, drawn, targets)

    def positive_losses(
        self, trunk: Tensor, rois: TrainingRois, targets: list[dict], inside=None
    ) -> dict[str, Tensor]:
        """DLR's weighted losses, from the trunk's features of P positives."""
        model = self.settings
        offsets, overlap_logits = self.regress.cells(trunk)
        losses = dense_losses(
            offsets,
            overlap_logits,
            rois.boxes,
            rois.gt_boxes,
            margin=model.overlap_margin,
            cells=model.reg_cells,
            num_rois=common.shared_rows(rois.boxes),
            inside=inside,
        )
        weighted = {"reg": model.reg_weight * losses["reg"]}
        if model.overlap:
            weighted["overlap"] = model.overlap_weight * losses["overlap"]
        return weighted

    @torch.no_grad()
    def candidates(self, outputs: dict, test: Test) -> dict[str, Tensor]:
        """NMS, since overlapping proposals regress to one box; then DLR on the best (4.1)."""
        rois, found = self.best_proposals(outputs, test, test.reg_test)
        offsets, overlap_logits = self.regress(self.pool(outputs["features"], rois, 14))
        if not self.settings.overlap:
            overlap_logits = torch.ones_like(overlap_logits)
        decode_cells = decode if test.readable else kernels.decode_dense_offsets
        boxes = decode_cells(rois.boxes, offsets.float(), overlap_logits.float())
        boxes = common.clip_boxes(boxes, outputs["sizes"][rois.image])
        return {"boxes": boxes, **found}

    def suppress(self, boxes: Tensor, scores: Tensor, groups: Tensor, test: Test):
        """Soft-NMS, or nothing: NMS ran on the proposals. Plain NMS merges several views."""
        if test.soft_nms:
            iou, score = test.soft_nms_iou, test.soft_nms_score
            return kernels.soft_nms_padded(boxes, scores, groups, iou, score)[:2]
        if test.several_views:
            return super().suppress(boxes, scores, groups, test)
        keep = scores.argsort(descending=True, stable=True)
        return keep, scores[keep]

    def class_features(self, features: list[Tensor], rois: Rois) -> Tensor:
        """The classifier's features of R RoIs, through DRP if it is on: [R, C, 7, 7]."""
        if not self.settings.drp:
            return self.pool(features, rois, 7)
        if not self.settings.drp_per_level:
            return self.normalise(self.drp[0](features[:4], rois.flat(), self.strides))
        order, counts = self.by_level(rois)
        flat = rois.flat()[order]
        pooled = pool_discriminatively(self.drp, counts, features[:4], flat, self.strides)
        return self.normalise(pooled)[order.argsort()]


class WithoutDLR(D2Det):
    """Table 2's rows without DLR: Faster R-CNN's boxes, from a branch that may be shared."""

    make_box_branch = faster_rcnn.Detector.make_box_branch
    head = faster_rcnn.Detector.head
    loss = faster_rcnn.Detector.loss
    outputs = faster_rcnn.Detector.outputs
    candidates = faster_rcnn.Detector.candidates
    suppress = faster_rcnn.Detector.suppress


class D2DetWithMasks(D2Det):
    """D2Det with masks (3.3). Targets have masks [G, M, M], each over its object's box.

    A cell lies on the object only if the object's pixels are there. So the overlap prediction
    becomes a coarse mask, which a branch on DLR's trunk (mask_branch.py) refines to 28x28.
    """

    def positive_losses(
        self, trunk: Tensor, rois: TrainingRois, targets: list[dict], inside=None
    ) -> dict[str, Tensor]:
        """`mask`, `mask_iou`, and DLR's losses, where masks decide which cells are inside."""
        gt_masks = pad_sequence([t["masks"] for t in targets], batch_first=True)
        gt_masks = gt_masks[rois.image, rois.gt]  # [B, G, M, M] -> [P, M, M]
        masks, areas = mask_targets(rois.boxes, rois.gt_boxes, gt_masks)
        mask_logits, iou = self.mask_branch(trunk, rois.labels)
        losses = mask_losses(mask_logits, iou, masks, areas, common.shared_rows(rois.boxes))
        # A cell covers 4x4 mask cells; three of the middle four must be inside (release).
        coarse = F.interpolate(masks[:, None], scale_factor=0.25, mode="bilinear")
        return losses | super().positive_losses(trunk, rois, targets, (coarse > 0.5).float())

    @torch.no_grad()
    def candidates(self, outputs: dict, test: Test) -> dict[str, Tensor]:
        """D2Det's boxes, and in them masks [N, 28, 28] with their predicted IoU [N]."""
        found = super().candidates(outputs, test)
        rois = Rois(found["image"], found["boxes"])
        trunk = self.regress.trunk(self.pool(outputs["features"], rois, 14))
        mask_logits, iou = self.mask_branch(trunk, found["labels"])
        return found | dict(masks=mask_logits.float().sigmoid(), mask_iou=iou.float())

    def detections(self, candidates: dict, num_images: int, test: Test) -> list[dict]:
        """As in all detectors, and mask_scores: the box's score + 0.3 mask IoU (release)."""
        images = super().detections(candidates, num_images, test)
        for found in images:
            found["mask_scores"] = found["scores"] + 0.3 * found.pop("mask_iou")
        return images


def Detector(model: Model, num_classes: int) -> D2Det:
    """The detector of these settings: the method itself, with masks, or without DLR."""
    if model.masks and not model.dlr:
        raise common.BadInput("--masks needs dense local regression")
    if model.masks and model.mask_channels % 16:
        raise common.BadInput(f"--mask-channels {model.mask_channels}: needs a multiple of 16")
    if model.masks:
        return D2DetWithMasks(model, num_classes)
    return D2Det(model, num_classes) if model.dlr else WithoutDLR(model, num_classes)


def main(argv=None):
    return engine.run("d2det", Settings, Detector, argv)


if __name__ == "__main__":
    main()
