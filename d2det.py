"""D2Det (Cao et al., CVPR 2020): regress a box from every cell, classify from the cells that matter.

Faster R-CNN regresses one box from one vector per proposal. D2Det keeps the 7x7 grid: every cell
predicts its own distances to the object's four sides and whether it lies on the object at all; the
box is the mean over the cells that do (dense local regression, DLR). Classification wants other
features: it moves each bin to where the evidence is and weighs samples before it averages them
(discriminative RoI pooling, DRP).

    image -> ResNet-FPN -> P2..P6 -> RPN -> proposals
      DLR:  RoIAlign 14x14 -> 8 convs (first strided) -> offsets (l, t, r, b) [R, 4, 7, 7]
                                                      -> overlap logit        [R, 1, 7, 7]
            box = mean over cells with overlap > 0.5 of (x - l w, y - t h, x + r w, y + b h)
      DRP:  RoIAlign 3x3 -> 3 fc -> bin offsets [R, 2, 7, 7] -> deformable pooling 14x14
            -> weighted average 7x7 -> 2 fc -> class scores [R, K + 1]

Rows (COCO AP as printed in the paper; ours: not run, needs COCO and GPU days):
    table2.baseline  38.0    table2.dlr  41.5    table2.drp  39.3    table2.dlr_drp  42.7 (minival)
    table3.dlr_alone 41.5    table3.d2det 42.7                       table1.d2det_r101 45.4 (test-dev)
    not yet: table1.d2det_r101_dcnv2 47.4, table1.d2det_ms 50.1 (deformable backbone), table4
    (UAVDT), table5 (COCO masks), table6 (iSAID). Table 3's Grid R-CNN rows are another method's.

Deviations (paper | authors' release | here):
    Overlap target (Eq. 3): inside the gt | inside by w/6, h/6 of the proposal | release;
        `--overlap-margin 0` is the paper.
    Which cells train the box: - | all, through a broadcast slip; repaired later | those inside the
        gt; `--reg-cells all` is the first release.
    No cell over 0.5: - | the box (0, 0, 0, 0), never clipped | mean over all cells, clipped.
    Eq. 4: W(F) * F, then average | divided by the average of W(F), kernel 3, stride 2 | release.
    Deformable pooling: RoIAlign sampling | corners rounded, samples at bin starts | half-pixel
        aligned, centred samples, nothing rounded; samples outside the map are skipped (release).
    The 8 convolutions: - | declared with 36 groups, computed dense | dense.
    Positives before regression: as they are | jittered by up to 15 %, at most 192 | release.
    DRP's weights: one set | one set per pyramid level | release; `--no-drp-per-level`.
    Crowd regions: - | plain background | proposals at least half inside one do not train.
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
    """D2Det with ResNet-50 on COCO: Table 2, last row."""

    dlr: bool = True  # dense local regression (3.1); off: two fc layers and one box per class
    drp: bool = True  # discriminative RoI pooling (3.2); off: RoIAlign 7x7
    overlap: bool = True  # predict which cells are on the object (Eq. 3); off: average all cells
    weighting: bool = True  # adaptive weights in DRP (Eq. 4); off: plain average
    conv_channels: int = 576  # width of DLR's convolutions (release)
    num_convs: int = 8  # number of DLR's convolutions (4.1)
    groups: int = 36  # of the GroupNorm behind them (release)
    fc_channels: int = 1024  # hidden width of the classifier and of the bin offsets
    drp_per_level: bool = True  # one set of DRP weights per pyramid level (release)
    gamma: float = 0.1  # bin offsets are this share of the RoI (release; deformable pooling)
    offset_bias: float = 0.0  # where offsets start (release); 0.5: at boxes of the proposal's size
    overlap_margin: float = 1 / 6  # a cell counts as inside this far from the gt's sides, of w, h
    reg_cells: Literal["inside", "all"] = "inside"  # cells that train the box
    cls_weight: float = 2.0  # weight of the classification loss (release)
    reg_weight: float = 2.0  # weight of the box loss (release)
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
    soft_nms: bool = True  # linear soft-NMS on the regressed boxes (4.1)
    soft_nms_iou: float = 0.5  # overlap above which soft-NMS lowers scores (release)
    soft_nms_score: float = 1e-3  # soft-NMS drops boxes whose score falls below (release)
    max_detections: int = 100  # detections kept per image
    epochs: float = 24.0  # length of training, passes over the data: 2x schedule (4.1)
    drops: tuple[float, ...] = (20 / 24, 23 / 24)  # lr / 10 at these fractions (release)
    warmup: int = 1000  # steps of linear warm-up, at most a tenth of training (release)


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
    """-log IoU of boxes [R, 4, ...] with gt_boxes [R, 4, 1...], IoU at least 1e-6 (release)."""
    x1, y1, x2, y2 = boxes.unbind(1)
    gx1, gy1, gx2, gy2 = gt_boxes.unbind(1)
    w = (torch.minimum(x2, gx2) - torch.maximum(x1, gx1)).clamp(min=0)
    h = (torch.minimum(y2, gy2) - torch.maximum(y1, gy1)).clamp(min=0)
    union = (x2 - x1) * (y2 - y1) + (gx2 - gx1) * (gy2 - gy1) - w * h
    return -(w * h / union.clamp(min=1e-6)).clamp(min=1e-6).log()


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
    """Eq. 4 with the release's normalisation: a 2x2 average where each sample has a weight.

    [R, C, 2S, 2S] -> [R, C, S, S]. W(F) = exp(12 sigmoid(norm(conv F))), between 1 and e^12, in
    float32. Starts as a plain average: the convolution starts at zero. A constant map stays.

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
        self.pool = AdaptiveWeightedPool(channels) if weighting else nn.AvgPool2d(3, 2, 1)

    def bin_offsets(self, coarse: Tensor) -> Tensor:
        return self.fc(coarse).view(-1, 2, self.size, self.size)

    def forward(self, samples: Tensor) -> Tensor:
        return self.pool(samples)


# ------------------------------------------------------------------------------ losses


def dense_losses(offsets, overlap_logits, proposals, gt_boxes, config: Config) -> dict[str, Tensor]:
    """DLR's losses over R positives: box, -log IoU of the cells' boxes; overlap, BCE. Weighted."""
    _, inside = dense_offset_targets(proposals, gt_boxes, offsets.shape[-1], config.overlap_margin)
    loss = iou_loss(cell_boxes(proposals, offsets.float()), gt_boxes[..., None, None])  # [R, S, S]
    mask = inside[:, 0] if config.reg_cells == "inside" else torch.ones_like(loss)
    losses = {"reg": config.reg_weight * (loss * mask).sum() / common.global_mean(mask.sum())}
    if config.overlap:
        bce = F.binary_cross_entropy_with_logits(overlap_logits.float(), inside, reduction="sum")
        num = common.global_rows(inside.flatten())
        losses["overlap"] = config.overlap_weight * bce / num
    return losses


# ------------------------------------------------------------------------------ detector


class Detector(common.TwoStage):
    """Figure 2. For `loss`, `candidates`, `finish` and `predict` see common.py."""

    def __init__(self, config: Config, num_classes: int):
        super().__init__(config, num_classes)
        C, S = config.fpn_channels, 7
        if config.dlr:
            dense = (config.conv_channels, config.num_convs, config.groups, config.offset_bias)
            self.regress = DenseLocalHead(C, *dense)
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
        logits = self.class_logits(features, rois)
        losses["cls"] = config.cls_weight * common.class_loss(logits, labels)
        if not config.dlr:
            deltas = self.regress(self.pool(features, rois, 7))
            losses["reg"] = common.class_box_loss(deltas, rois, labels, gt_boxes)
            return losses
        chosen = (labels < self.num_classes).nonzero()[:, 0]
        chosen = chosen[torch.randperm(len(chosen), device=chosen.device)[: config.reg_rois]]
        image = rois[chosen, 0]
        moved = jitter_boxes(rois[chosen, 1:], config.jitter, sizes[image.long()])
        pooled = self.pool(features, torch.cat([image[:, None], moved], 1), 14)
        return losses | dense_losses(*self.regress(pooled), moved, gt_boxes[chosen], config)

    @torch.no_grad()
    def candidates(self, images: list[Tensor]) -> dict[str, Tensor]:
        """Proposals are classified, thinned by NMS, and only then regressed (4.1)."""
        config, (features, sizes, rois, image) = self.config, self.test_rois(images)
        probs = self.class_logits(features, rois).float().softmax(1)[:, :-1]
        row, labels, scores = common.over_threshold(probs, config.score_threshold)
        if not config.dlr:  # the baseline regresses first, a box per class
            deltas = self.regress(self.pool(features, rois, 7)).view(len(rois), -1, 4)
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
        if not (config.soft_nms and config.dlr):
            return super().suppress(boxes, scores, groups, config)
        limits = dict(iou_threshold=config.soft_nms_iou, score_threshold=config.soft_nms_score)
        return kernels.soft_nms(boxes, scores, groups, **limits)

    def class_logits(self, features: list[Tensor], rois: Tensor) -> Tensor:
        """rois [R, 5] -> logits [R, K + 1], through DRP if it is on."""
        if not self.config.drp:
            return self.classify(self.pool(features, rois, 7))
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
            gamma=self.config.gamma,
        )
        pooled = torch.cat([d(samples[m]) for d, m in zip(self.drp, members)])[order]
        return self.classify(pooled)


# ------------------------------------------------------------------------------ rows

_FASTER = dict(dlr=False, cls_weight=1.0, score_threshold=0.05)  # choice: Faster R-CNN's own

ROWS: dict[str, dict] = {
    "table1.d2det_r101": dict(backbone="resnet101"),
    "table2.baseline": dict(drp=False, **_FASTER),
    "table2.dlr": dict(drp=False),
    "table2.drp": dict(**_FASTER),
    "table2.dlr_drp": dict(),
    "table2.dlr_no_overlap": dict(drp=False, overlap=False),
    "table2.drp_no_weighting": dict(weighting=False, **_FASTER),
    "table3.dlr_alone": dict(drp=False),
    "table3.d2det": dict(),
    "extra.r101_multiscale": dict(
        backbone="resnet101",
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
    "table2.baseline": dict(zip(_AP, (38.0, 59.2, 41.5))),
    "table2.dlr": dict(zip(_AP, (41.5, 59.6, 44.8))),
    "table2.drp": dict(zip(_AP, (39.3, 61.4, 42.2))),
    "table2.dlr_drp": dict(zip(_AP, (42.7, 61.5, 46.3))),
    "table2.dlr_no_overlap": dict(AP=40.8),  # text of 4.2: the overlap predictor gives 0.7
    "table2.drp_no_weighting": dict(AP=38.9),  # text of 4.2: the weighting gives 0.4
    "table3.grid_rcnn": dict(zip(_AP, (39.6, 58.3, 42.4, 22.6, 43.8, 51.5))),
    "table3.grid_rcnn_plus": dict(zip(_AP, (40.2, 58.4, 43.4, 22.7, 44.1, 53.1))),
    "table3.dlr_alone": dict(zip(_AP, (41.5, 59.6, 44.8, 23.3, 44.9, 55.2))),
    "table3.d2det": dict(zip(_AP, (42.7, 61.5, 46.3, 24.5, 46.2, 56.9))),
    "table4.uavdt": dict(AP70=56.92),
    "table5.coco_masks": dict(zip(_AP, (40.2, 61.5, 43.7))),
    "table6.isaid_masks": dict(zip(_AP, (37.5, 61.0, 39.8))),
    "extra.r101_multiscale": {},
}

NOT_YET: dict[str, str] = {
    "table1.d2det_r101_dcnv2": "needs a deformable backbone",
    "table1.d2det_ms": "needs a deformable backbone; extra.r101_multiscale does without",
    "table3.grid_rcnn": "another method's",
    "table3.grid_rcnn_plus": "another method's",
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
