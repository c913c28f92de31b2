"""D2Det (Cao et al., CVPR 2020): regress a box from every cell, classify from the cells that matter.
Paper: https://openaccess.thecvf.com/content_CVPR_2020/html/Cao_D2Det_Towards_High_Quality_Object_Detection_and_Instance_Segmentation_CVPR_2020_paper.html
Releases: https://github.com/JialeCao001/D2Det and https://github.com/JialeCao001/D2Det-mmdet2.1

Faster R-CNN flattens a proposal into one vector and regresses one box from it, so an error
anywhere moves the whole box. D2Det keeps the 7x7 grid. Each cell predicts its own distances to the
object's four sides, and whether it lies on the object at all; the box is the mean over the cells
that do (dense local regression, DLR): background cells have no say, and single errors average out.
Classification wants other features than regression: those of the parts that tell classes apart. So
it moves each bin to where the evidence is, and weighs samples before it averages them
(discriminative RoI pooling, DRP).

    image -> ResNet-FPN -> P2..P6 -> RPN -> proposals
      DLR:  RoIAlign 14x14 -> 8 convs (first strided) -> offsets (l, t, r, b) [R, 4, 7, 7]
                                                      -> overlap logit        [R, 1, 7, 7]
            box = mean over cells with overlap > 0.5 of (x - l w, y - t h, x + r w, y + b h)
      DRP:  RoIAlign 3x3 (half of 7: a coarse look is enough to say where to look, and has a
            quarter of the weights) -> 3 fc -> bin offsets [R, 2, 7, 7]
            -> deformable pooling 14x14 -> weighted average 7x7 -> 2 fc -> class scores [R, K + 1]
    training: DRP classifies all sampled RoIs; DLR learns from the positives, slightly moved
    test:     classify the proposals -> NMS on the proposals -> best 125 -> DLR -> soft-NMS. The
              score stays the proposal's: DLR moves boxes, it does not judge them.

Where paper and releases differ, the releases made the numbers and decide:
    A cell is "inside" a sixth of the proposal away from the gt's sides (`--overlap-margin 0`: Eq. 3).
    Below an IoU of 0.1 the box loss is bounded (`iou_loss`): boxes start almost empty, and the plain
    -log IoU ends the training of wide heads in its first steps.
    With no cell over 0.5 the releases' box is (0, 0, 0, 0); ours is the mean over all cells.
All other deviations stand beside ROWS.

In comments "(3.1)" is a section of the paper, "(release)" a value seen in the releases, "choice:"
our own where neither decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import kernels

# B images, R RoIs, K classes, C channels; P proposals per image (padded)
# S = 7 side of the cell grid; pooled maps are [R, C, 2S, 2S]
# rois [R, 5]: image index, x1, y1, x2, y2 in pixels of the network's input
# offsets [R, 4, S, S]: l, t, r, b over the proposal's w, h, w, h; overlap_logits [R, 1, S, S]
# labels 0..K-1, background K


@dataclass
class Config(common.Config):
    """D2Det with ResNet-50 on COCO, as released: Table 2's last row with soft-NMS."""

    dlr: bool = True  # dense local regression (3.1); off: two fc layers and one box per class
    drp: bool = True  # discriminative RoI pooling (3.2); off: RoIAlign 7x7
    overlap: bool = True  # predict which cells are on the object (Eq. 3); off: average all cells
    weighting: bool = True  # adaptive weights in DRP (Eq. 4); off: plain average
    shared: bool = False  # without DLR: class and box from the same two fc layers (4.2: 37.7 AP)
    conv_channels: int = 576  # width of DLR's convolutions (release)
    num_convs: int = 8  # number of DLR's convolutions (4.1)
    groups: int = 36  # of the GroupNorm behind them (release)
    fc_channels: int = 1024  # hidden width of the classifier and of the bin offsets
    drp_per_level: bool = True  # one set of DRP weights per pyramid level (release)
    gamma: float = 0.1  # bin offsets are this share of the RoI (release; deformable pooling)
    drp_samples: int = 2  # samples a side in each of DRP's 14x14 bins (release: R-50 2, R-101 1)
    offset_bias: float = 0.0  # where offsets start (release); 0.5: at boxes of the proposal's size
    overlap_margin: float = 1 / 6  # a cell counts as inside this far from the gt's sides, of w, h
    reg_cells: Literal["inside", "all"] = "inside"  # cells that train the box
    cls_weight: float = 2.0  # weight of the classification loss (release)
    reg_weight: float = 1.0  # weight of the box loss (second release)
    overlap_weight: float = 1.0  # weight of the overlap loss (release)
    jitter: float = 0.15  # positives move and grow by up to this share before regression (release)
    reg_rois: int = 192  # at most this many of them per process and step (release)
    roi_samples: int = 512  # RoIs per image in training (4.1)
    roi_positive: float = 0.25  # share of positives among them (4.1)
    anchor_scale: float = 8.0  # RPN anchors' side in strides
    proposals_train: int = 2000  # RPN boxes per level before, and per image after NMS
    proposals_test: int = 1000  # the same in testing
    score_threshold: float = 0.03  # lowest class score that is looked at (release)
    nms_iou: float = 0.5  # NMS per class, on the proposals, before regression (release)
    reg_test: int = 125  # proposals regressed per image (4.1: 100 to 125)
    soft_nms: bool = True  # linear soft-NMS on the regressed boxes (4.1: for test-dev); off: none
    soft_nms_iou: float = 0.5  # overlap above which soft-NMS lowers scores (release)
    soft_nms_score: float = 1e-3  # soft-NMS drops boxes whose score falls below (release)
    max_detections: int = 100  # detections kept per image
    epochs: float = 24.0  # length of training, passes over the data: 2x schedule (4.1)
    drops: tuple[float, ...] = (20 / 24, 23 / 24)  # lr / 10 at these fractions (release)
    warmup: int = 1000  # steps of linear warm-up, at most a tenth of training (release) ...
    warmup_factor: float = 1 / 80  # ... from this share of the rate (release)


# ------------------------------------------------------------------------------ equations


def cell_centres(proposals: Tensor, size: int = 7) -> Tensor:
    """Centres of the proposals' size x size bins: [R, 4] -> x, y [R, 2, S, S]."""
    step = (torch.arange(size, device=proposals.device) + 0.5) / size
    w, h = (proposals[:, 2:] - proposals[:, :2]).unbind(1)
    x = proposals[:, 0, None] + w[:, None] * step  # [R, S]
    y = proposals[:, 1, None] + h[:, None] * step
    return torch.stack([x[:, None].expand(-1, size, -1), y[..., None].expand(-1, -1, size)], 1)


def dense_offset_targets(
    proposals: Tensor, gt_boxes: Tensor, size: int = 7, margin: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Eq. 2 and 3: what each cell should predict.

    proposals, gt_boxes [R, 4] -> offsets (l, t, r, b) [R, 4, S, S], distances from the cell's centre
    to the gt's sides over the proposal's w, h, w, h (negative outside the gt); inside [R, 1, S, S],
    1.0 where all four are at least `margin` (0: the paper's p_i in G). Decoding them gives the gt.

    >>> box = torch.tensor([[0., 0., 14., 14.]])
    >>> offsets, inside = dense_offset_targets(box, box)
    >>> offsets[0, :, 0, 3] * 14  # first row, middle column: centre (7, 1)
    tensor([ 7.,  1.,  7., 13.])
    """
    x, y = cell_centres(proposals, size).unbind(1)  # [R, S, S]
    x1, y1, x2, y2 = gt_boxes[:, :, None, None].unbind(1)  # [R, 1, 1]
    wh = (proposals[:, 2:] - proposals[:, :2]).clamp(min=1e-6)
    offsets = torch.stack([x - x1, y - y1, x2 - x, y2 - y], 1) / wh.repeat(1, 2)[..., None, None]
    return offsets, (offsets >= margin).all(1, keepdim=True).float()


def cell_boxes(proposals: Tensor, offsets: Tensor) -> Tensor:
    """Inverse of Eq. 2: the box that each cell predicts, [R, 4, S, S] (x1, y1, x2, y2)."""
    centre = cell_centres(proposals, offsets.shape[-1])
    wh = (proposals[:, 2:] - proposals[:, :2])[..., None, None]
    return torch.cat([centre - offsets[:, :2] * wh, centre + offsets[:, 2:] * wh], 1)


def iou_loss(boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    """-log IoU of boxes [R, 4, ...] with gt_boxes [R, 4, 1...] -> [R, ...], at most -log 0.1.

    Up to an IoU of 0.1 it is -log(IoU + 0.1) (release). Boxes start almost empty, and 1 / IoU, the
    slope of the plain logarithm, would end the training in its first steps.
    """
    x1, y1, x2, y2 = boxes.unbind(1)
    gx1, gy1, gx2, gy2 = gt_boxes.unbind(1)
    w = (torch.minimum(x2, gx2) - torch.maximum(x1, gx1)).clamp(min=0)
    h = (torch.minimum(y2, gy2) - torch.maximum(y1, gy1)).clamp(min=0)
    union = (x2 - x1) * (y2 - y1) + (gx2 - gx1) * (gy2 - gy1) - w * h
    iou = (w * h / union.clamp(min=1e-6)).clamp(min=1e-6)
    return -torch.where(iou > 0.1, iou, iou + 0.1).log()


def jitter_boxes(boxes: Tensor, amount: float, sizes: Tensor) -> Tensor:
    """Centres and sides of boxes [R, 4] moved by U(-amount, amount) of the sides, then clipped."""
    wh = boxes[:, 2:] - boxes[:, :2]
    move, grow = ((torch.rand_like(boxes) * 2 - 1) * amount).chunk(2, 1)  # [R, 2] each
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + move * wh
    half = wh * (1 + grow) / 2
    return common.clip_boxes(torch.cat([centre - half, centre + half], 1), sizes)


# ------------------------------------------------------------------------------ heads


class DenseLocalHead(nn.Module):
    """DLR (3.1): pooled features -> each cell's offsets and overlap logit.

    [R, C, 2S, 2S] -> offsets [R, 4, S, S] (l, t, r, b >= 0), overlap_logits [R, 1, S, S]. R may be 0.

    >>> offsets, overlap = DenseLocalHead(8, 16, 2, 4)(torch.rand(3, 8, 14, 14))
    >>> offsets.shape, overlap.shape
    (torch.Size([3, 4, 7, 7]), torch.Size([3, 1, 7, 7]))
    """

    def __init__(self, in_channels=256, conv_channels=576, num_convs=8, groups=36, offset_bias=0.0):
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(num_convs):
            width = conv_channels if i else in_channels
            layers += [
                nn.Conv2d(width, conv_channels, 3, 1 if i else 2, padding=1, bias=False),
                nn.GroupNorm(groups, conv_channels),
                nn.ReLU(inplace=True),
            ]
        self.trunk = nn.Sequential(*layers)
        self.offsets = nn.Conv2d(conv_channels, 4, 3, padding=1)
        self.overlap = nn.Conv2d(conv_channels, 1, 3, padding=1)
        for layer in (self.offsets, self.overlap):
            nn.init.normal_(layer.weight, std=0.001)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.offsets.bias, offset_bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        trunk = self.trunk(pooled)
        return F.relu(self.offsets(trunk)), self.overlap(trunk)


class AdaptiveWeightedPool(nn.Module):
    """Eq. 4 with the release's normalisation: a 3x3 average at stride 2 of weighted samples.

    [R, C, 2S, 2S] -> [R, C, S, S]. W(F) = exp(12 sigmoid(norm(conv F))), between 1 and e^12, in
    float32; 12 is the release's. Starts as the plain average over the samples that the window has
    inside the map: the convolution starts at zero. A constant map stays.

    >>> AdaptiveWeightedPool(4)(torch.ones(2, 4, 14, 14)).shape
    torch.Size([2, 4, 7, 7])
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(channels, channels)  # instance norm, also of an empty batch
        nn.init.zeros_(self.conv.weight)

    def forward(self, features: Tensor) -> Tensor:
        weight = (12 * self.norm(self.conv(features)).float().sigmoid()).exp()
        pooled = F.avg_pool2d(features.float() * weight, 3, 2, 1)
        return (pooled / F.avg_pool2d(weight, 3, 2, 1)).to(features.dtype)


class DiscriminativePool(nn.Module):
    """DRP's learned parts (3.2), for one pyramid level: bin offsets, then weighted pooling.

    `bin_offsets`: coarse [R, C, S//2, S//2] -> [R, 2, S, S], dx and dy; zero at the start.
    `forward`: samples [R, C, 2S, 2S], pooled at the moved bins -> [R, C, S, S].

    >>> pool = DiscriminativePool(4, 16)
    >>> pool.bin_offsets(torch.rand(2, 4, 3, 3)).abs().max().item()
    0.0
    """

    def __init__(self, channels: int, fc_channels: int, size: int = 7, weighting: bool = True):
        super().__init__()
        self.size = size
        self.fc = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * (size // 2) ** 2, fc_channels),
            nn.ReLU(inplace=True),
            nn.Linear(fc_channels, fc_channels),
            nn.ReLU(inplace=True),
            nn.Linear(fc_channels, 2 * size * size),
        )
        nn.init.zeros_(self.fc[-1].weight)
        nn.init.zeros_(self.fc[-1].bias)
        plain = nn.AvgPool2d(3, 2, 1, count_include_pad=False)
        self.pool = AdaptiveWeightedPool(channels) if weighting else plain

    def bin_offsets(self, coarse: Tensor) -> Tensor:
        return self.fc(coarse).view(-1, 2, self.size, self.size)

    def forward(self, samples: Tensor) -> Tensor:
        return self.pool(samples)


# ------------------------------------------------------------------------------ losses


def dense_losses(
    offsets: Tensor,
    overlap_logits: Tensor,
    proposals: Tensor,
    gt_boxes: Tensor,
    margin: float = 1 / 6,
    cells: str = "inside",
    num_rois: Tensor | int | None = None,
) -> dict[str, Tensor]:
    """DLR's losses over R positives: `reg`, -log IoU of the cells' boxes, and `overlap`, BCE.

    offsets [R, 4, S, S], overlap_logits [R, 1, S, S], proposals and gt_boxes [R, 4]. Both are sums
    over num_rois (default: R) times S * S: cells that are not inside count in the mean of `reg`, but
    add nothing to it, unless `cells` is "all".
    """
    _, inside = dense_offset_targets(proposals, gt_boxes, offsets.shape[-1], margin)
    loss = iou_loss(cell_boxes(proposals, offsets.float()), gt_boxes[..., None, None])  # [R, S, S]
    loss = loss * inside[:, 0] if cells == "inside" else loss
    bce = F.binary_cross_entropy_with_logits(overlap_logits.float(), inside, reduction="sum")
    num_cells = max(1, len(proposals)) if num_rois is None else num_rois
    num_cells = num_cells * offsets.shape[-1] ** 2
    return {"reg": loss.sum() / num_cells, "overlap": bce / num_cells}


# ------------------------------------------------------------------------------ detector


class Detector(common.TwoStage):
    """Figure 2. For `loss`, `candidates`, `finish` and `predict` see common.py."""

    def __init__(self, config: Config, num_classes: int):
        super().__init__(config, num_classes)
        C, S = config.fpn_channels, 7
        if config.dlr:
            dense = (config.conv_channels, config.num_convs, config.groups, config.offset_bias)
            self.regress = DenseLocalHead(C, *dense)
        elif config.shared:
            self.regress = nn.Linear(config.fc_channels, 4 * num_classes)
            nn.init.normal_(self.regress.weight, std=0.001)  # choice: Fast R-CNN's
            nn.init.zeros_(self.regress.bias)
        else:
            self.regress = common.two_fc(C * S * S, config.fc_channels, 4 * num_classes)
        if config.drp:
            self.drp = nn.ModuleList(
                DiscriminativePool(C, config.fc_channels, S, config.weighting)
                for _ in (self.strides if config.drp_per_level else (0,))
            )
        self.classify = common.two_fc(C * S * S, config.fc_channels, num_classes + 1)
        self.to(memory_format=torch.channels_last)

    def loss(self, images: list[Tensor], targets: list[dict]) -> dict[str, Tensor]:
        config = self.config
        features, sizes, losses, rois, labels, gt_boxes = self.training_rois(images, targets)
        pooled = self.class_features(features, rois)
        logits = self.classify(pooled)
        losses["cls"] = config.cls_weight * common.class_loss(logits, labels)
        if not config.dlr:
            deltas = self.box_deltas(features, rois, pooled)
            losses["reg"] = common.class_box_loss(deltas, rois, labels, gt_boxes)
            return losses
        chosen = (labels < self.num_classes).nonzero()[:, 0]
        chosen = chosen[torch.randperm(len(chosen), device=chosen.device)[: config.reg_rois]]
        image = rois[chosen, 0]
        moved = jitter_boxes(rois[chosen, 1:], config.jitter, sizes[image.long()])
        pooled = self.pool(features, torch.cat([image[:, None], moved], 1), 14)
        dense = dense_losses(
            *self.regress(pooled),
            moved,
            gt_boxes[chosen],
            config.overlap_margin,
            config.reg_cells,
            common.global_rows(moved),
        )
        losses["reg"] = config.reg_weight * dense["reg"]
        if config.overlap:
            losses["overlap"] = config.overlap_weight * dense["overlap"]
        return losses

    @torch.no_grad()
    def candidates(self, images: list[Tensor]) -> dict[str, Tensor]:
        """Proposals are classified, thinned by NMS, and only then regressed (4.1)."""
        config, (features, sizes, rois, image) = self.config, self.test_rois(images)
        pooled = self.class_features(features, rois)
        probs = self.classify(pooled).float().softmax(1)[:, :-1]
        row, labels, scores = common.over_threshold(probs, config.score_threshold)
        if not config.dlr:  # the baseline regresses first, a box per class
            deltas = self.box_deltas(features, rois, pooled).view(len(rois), -1, 4)
            boxes = common.decode_boxes(rois[row, 1:], deltas[row, labels], common.RCNN_STDS)
            boxes = common.clip_boxes(boxes, sizes[image[row]])
            return dict(boxes=boxes, scores=scores, labels=labels, image=image[row])
        groups = image[row] * self.num_classes + labels
        keep = kernels.batched_nms(rois[row, 1:], scores, groups, config.nms_iou)
        keep = keep[common.best_per_image(image[row[keep]], len(images), config.reg_test)]
        row, labels, scores = row[keep], labels[keep], scores[keep]
        offsets, overlap = self.regress(self.pool(features, rois[row], 14))
        overlap = overlap if config.overlap else torch.ones_like(overlap)
        boxes = kernels.decode_dense_offsets(rois[row, 1:], offsets, overlap, sizes[image[row]])
        return dict(boxes=boxes, scores=scores, labels=labels, image=image[row])

    def suppress(self, boxes: Tensor, scores: Tensor, groups: Tensor, config: Config):
        if not config.dlr:
            return super().suppress(boxes, scores, groups, config)
        if not config.soft_nms:  # the proposals went through NMS; views of an image are merged
            if len(config.test_scales) > 1 or config.test_flip:
                return super().suppress(boxes, scores, groups, config)
            keep = scores.argsort(descending=True, stable=True)
            return keep, scores[keep]
        limits = dict(iou_threshold=config.soft_nms_iou, score_threshold=config.soft_nms_score)
        return kernels.soft_nms(boxes, scores, groups, **limits)

    def box_deltas(self, features: list[Tensor], rois: Tensor, class_features: Tensor) -> Tensor:
        """The baseline's deltas [R, 4K], from a branch of its own or from the classifier's."""
        if self.config.shared:
            return self.regress(self.classify[:-1](class_features))
        return self.regress(self.pool(features, rois, 7))

    def class_features(self, features: list[Tensor], rois: Tensor) -> Tensor:
        """What the classifier sees of rois [R, 5]: [R, C, 7, 7], through DRP if it is on."""
        if not self.config.drp:
            return self.pool(features, rois, 7)
        coarse = self.pool(features, rois, 3)
        level = kernels.roi_level(rois, self.strides) if len(self.drp) > 1 else rois[:, 0] * 0
        members = [(level == i).nonzero()[:, 0] for i in range(len(self.drp))]
        order = torch.cat(members).argsort()  # from level by level back to the RoIs' order
        offsets = torch.cat([d.bin_offsets(coarse[m]) for d, m in zip(self.drp, members)])[order]
        samples = kernels.deform_roi_pool(
            features[:4],
            rois,
            offsets.float().repeat_interleave(2, 2).repeat_interleave(2, 3),  # [R, 2, 14, 14]
            14,
            self.strides,
            self.config.drp_samples,
            self.config.gamma,
        )
        return torch.cat([d(samples[m]) for d, m in zip(self.drp, members)])[order]


# ------------------------------------------------------------------------------ rows

# choice: Faster R-CNN's own loss weight, threshold and warm-up (MMDetection)
_FASTER = dict(dlr=False, cls_weight=1.0, score_threshold=0.05, warmup=500, warmup_factor=1 / 3)
_MINIVAL = dict(soft_nms=False)  # soft-NMS is for test-dev (4.1)
_R101 = dict(backbone="resnet101", drp_samples=1)

# Deviations (paper | releases: mmdet 1.x, repaired for mmdet 2.1 | here):
#   Overlap target (Eq. 3): inside the gt | inside by w/6, h/6 of the proposal | release.
#   Box loss: no formula but IoU | -log IoU, of IoU + 0.1 up to 0.1 | release.
#   Cells that train the box: - | all, weight 2 mean(inside) by a broadcast slip; repaired: those
#       inside, summed, over the number of all cells, weight 1 | repaired; `--reg-cells all`.
#   No cell over 0.5: - | the box (0, 0, 0, 0), never clipped | mean over all cells, clipped.
#   Warm-up: - | 1000 steps from 1/80 of the rate | release.
#   Eq. 4: W(F) * F, then average | divided by the average of W(F), kernel 3, stride 2 | release.
#   Deformable pooling: RoIAlign sampling | corners rounded, samples at bin starts; R-101 one sample a
#       bin, R-50 two a side | half-pixel aligned, centred, nothing rounded; their number: release.
#       Samples outside the map are skipped (release).
#   The 8 convolutions: - | declared with 36 groups, computed dense | dense.
#   Positives before regression: as they are | jittered by up to 15 %, at most 192 | release.
#   DRP's weights: one set | one set per pyramid level | release; `--no-drp-per-level`.
#   Anchors that cross the image's border: - | do not train | train, if their centre is inside.
#   Soft-NMS: for test-dev | always | always, but in the rows of minival.
#   Crowd regions: - | plain background | proposals at least half inside one do not train.

# One training: table2.dlr and table3.dlr_alone; table2.dlr_drp and table3.d2det. The
# defaults are table2.dlr_drp with soft-NMS, as the released R-50 is tested (43.7 on minival).
ROWS: dict[str, dict] = {
    "table1.d2det_r101": dict(**_R101),
    "table2.shared": dict(drp=False, shared=True, **_FASTER),
    "table2.baseline": dict(drp=False, **_FASTER),
    "table2.dlr": dict(drp=False, **_MINIVAL),
    "table2.drp": dict(**_FASTER),
    "table2.dlr_drp": dict(**_MINIVAL),
    "table2.dlr_no_overlap": dict(drp=False, overlap=False, reg_cells="all", **_MINIVAL),
    "table2.drp_no_weighting": dict(weighting=False, **_FASTER),
    "table3.dlr_alone": dict(drp=False, **_MINIVAL),
    "table3.d2det": dict(**_MINIVAL),
    "release.r50": dict(),
    "extra.r101_multiscale": dict(
        **_R101,
        # choice: the paper does not say which scales; these are common with 800 px
        scales=(400, 500, 600, 700, 800, 900, 1000, 1100, 1200),
        max_size=2000,
        test_scales=(600, 800, 1000, 1200),
        test_flip=True,
    ),
}

_AP = ("AP", "AP50", "AP75", "APs", "APm", "APl")
PAPER: dict[str, dict] = {
    "table1.d2det_r101": dict(zip(_AP, (45.4, 64.0, 49.5, 25.8, 48.7, 58.1))),
    "table1.d2det_r101_dcnv2": dict(zip(_AP, (47.4, 65.9, 51.7, 27.2, 50.4, 61.3))),
    "table1.d2det_ms": dict(zip(_AP, (50.1, 69.4, 54.9, 32.7, 52.7, 62.1))),
    "table2.shared": dict(AP=37.7),  # text of 4.2
    "table2.baseline": dict(zip(_AP, (38.0, 59.2, 41.5))),
    "table2.dlr": dict(zip(_AP, (41.5, 59.6, 44.8))),
    "table2.drp": dict(zip(_AP, (39.3, 61.4, 42.2))),
    "table2.dlr_drp": dict(zip(_AP, (42.7, 61.5, 46.3))),
    "table2.dlr_no_overlap": dict(AP=40.8),  # text of 4.2: the overlap predictor gives 0.7
    "table2.drp_no_weighting": dict(AP=38.9),  # text of 4.2: the weighting gives 0.4
    "table3.dlr_alone": dict(zip(_AP, (41.5, 59.6, 44.8, 23.3, 44.9, 55.2))),
    "table3.d2det": dict(zip(_AP, (42.7, 61.5, 46.3, 24.5, 46.2, 56.9))),
    "table4.uavdt": dict(AP70=56.92),
    "table5.coco_masks": dict(zip(_AP, (40.2, 61.5, 43.7))),
    "table6.isaid_masks": dict(zip(_AP, (37.5, 61.0, 39.8))),
    "release.r50": dict(AP=43.7),  # README of the release, minival
    "extra.r101_multiscale": {},
}

NOT_YET: dict[str, str] = {
    "table1.d2det_r101_dcnv2": "needs a deformable backbone",
    "table1.d2det_ms": "needs a deformable backbone; extra.r101_multiscale does without",
    "table4.uavdt": "needs the UAVDT data set",
    "table5.coco_masks": "needs the mask branch",
    "table6.isaid_masks": "needs the mask branch and iSAID",
}

TINY = dict(
    common.TINY,
    conv_channels=48,
    num_convs=4,
    groups=8,
    offset_bias=0.5,  # a narrow head that starts at empty boxes may close its ReLU for good
    fc_channels=256,
    anchor_scale=4.0,
    roi_samples=24,
    roi_positive=0.5,
    reg_rois=96,
    proposals_train=200,
    proposals_test=100,
    reg_test=50,
)


def main(argv=None):
    return common.run("d2det", Config, Detector, ROWS, PAPER, NOT_YET, TINY, argv)


if __name__ == "__main__":
    main()
