"""D2Det (Cao et al., CVPR 2020): regress a box from every cell, classify from places that matter.
Paper: https://openaccess.thecvf.com/content_CVPR_2020/html/Cao_D2Det_Towards_High_Quality_Object_Detection_and_Instance_Segmentation_CVPR_2020_paper.html
Releases: https://github.com/JialeCao001/D2Det and https://github.com/JialeCao001/D2Det-mmdet2.1

Faster R-CNN (baselines/faster_rcnn.py) flattens a proposal's features into one vector and makes
class and box of it. D2Det gives each of the two what it needs:

Dense local regression (DLR). One vector gives one box, and whatever goes wrong moves all of it. DLR
    keeps the grid of 7x7 cells, and each cell predicts its own distances to the object's four
    sides. The box is the mean of the cells' boxes, where single errors average out.
Overlap prediction. A cell on the background predicts a less precise box (3.1). So each cell also
    says whether it lies on the object, and the mean is over the cells that do.
Discriminative RoI pooling (DRP). A class shows in parts of an object, which do not lie in equal
    bins. DRP moves each bin to where the evidence is, and weights samples before it averages them.
Masks (`--masks`, off by default). Where masks are known, a cell is on the object if the object's
    pixels are there, not just its box. The overlap prediction then is a coarse mask, and two
    transposed convolutions refine what it is made from, 7x7 -> 28x28. A class score says nothing
    of a mask, so two fc layers predict the mask's IoU: masks are ranked by score + 0.3 IoU.

    image -> ResNet-FPN -> P2..P6 -> RPN -> proposals
      DLR:  RoIAlign 14x14 -> 8 convs (first strided) -> offsets (l, t, r, b) [R, 4, 7, 7]
                                                      -> overlap logit        [R, 1, 7, 7]
            box = mean over cells with overlap > 0.5 of (x - l w, y - t h, x + r w, y + b h)
      DRP:  RoIAlign 3x3 (half of 7: a coarse look tells where to look, and takes a quarter of the
            weights) -> 3 fc -> bin offsets [R, 2, 7, 7] -> deformable pooling 14x14
            -> weighted average 7x7 -> 2 fc -> class logits [R, K + 1]
      masks: DLR's convolutions -> 14x14 -> 28x28, one mask a class; with the mask 2 fc -> its IoU
    training: all sampled RoIs train DRP; the positives among them, slightly moved, train DLR
    test:     classify the proposals -> NMS on the proposals -> best 125 -> DLR -> soft-NMS. The
              score stays the proposal's: DLR moves boxes, it does not judge them. For masks the
              features are pooled anew, from DLR's boxes.

Where paper and releases differ, the releases made the numbers and decide:
    A cell is "inside" only if it is at least a sixth of the proposal away from each of the gt's
    sides: 25 of 49 cells of a perfect proposal are (`--overlap-margin 0`: Eq. 3).
    Below an IoU of 0.1 the box loss is bounded (`iou_loss`): boxes start almost empty, and the
    plain -log IoU makes wide heads diverge in their first steps.
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
import engine
import kernels
from baselines import faster_rcnn
from common import Amount, BadInput, Natural, Share, Whole
from engine.detector import first_per_image, gt_masks, over_threshold

# B images, R RoIs, K classes, C channels; P proposals per image (padded)
# S = 7 side of the cell grid; pooled maps are [R, C, 2S, 2S]
# rois [R, 5]: image index, x1, y1, x2, y2 in pixels of the network's input; RoIs are proposals
# offsets [R, 4, S, S]: l, t, r, b over the proposal's w, h, w, h; overlap_logits [R, 1, S, S]
# labels 0..K-1, background K; masks [R, M, M] each over the box of its object


@dataclass
class Config(faster_rcnn.Config):
    """D2Det with ResNet-50 on COCO, as released: Table 2's last row with soft-NMS."""

    dlr: bool = True  # dense local regression (3.1); off: two fc layers and one box per class
    drp: bool = True  # discriminative RoI pooling (3.2); off: RoIAlign 7x7
    overlap: bool = True  # predict which cells are on the object (Eq. 3); off: average all cells
    weighting: bool = True  # adaptive weights in DRP (Eq. 4); off: plain average
    shared: bool = False  # without DLR: class and box from the same two fc layers (4.2: 37.7 AP)
    conv_channels: Natural = 576  # width of DLR's convolutions (release)
    num_convs: Natural = 8  # number of DLR's convolutions (4.1)
    groups: Natural = 36  # of the GroupNorm behind them (release)
    drp_per_level: bool = True  # one set of DRP weights per pyramid level (release)
    gamma: Share = 0.1  # bin offsets are this share of the RoI (release; deformable pooling)
    drp_samples: Natural = 2  # samples a side of DRP's 14x14 bins (release: R-50 2, R-101 1)
    offset_bias: float = 0.0  # where offsets start (release); 0.5: at boxes of the proposal's size
    # a cell is inside this far from the gt's sides, in the proposal's w and h (release); 0: Eq. 3
    overlap_margin: Share = 1 / 6
    reg_cells: Literal["inside", "all"] = "inside"  # cells that train the box (second release)
    cls_weight: Amount = 2.0  # weight of the classification loss (release)
    reg_weight: Amount = 1.0  # weight of the box loss (second release)
    overlap_weight: Amount = 1.0  # weight of the overlap loss (release)
    jitter: Share = 0.15  # RoIs that train DLR move and grow by up to this share (release)
    reg_rois: Natural = 192  # at most this many RoIs train DLR, per process and step (release)
    score_threshold: Share = 0.03  # lowest class score that is looked at (release)
    nms_iou: Share = 0.5  # NMS per class, on the proposals, before DLR (release)
    reg_test: Natural = 125  # proposals per image that DLR regresses in testing (4.1: 100 to 125)
    soft_nms: bool = True  # linear soft-NMS on the boxes of DLR (4.1: for test-dev); off: no NMS
    soft_nms_iou: Share = 0.5  # overlap above which soft-NMS lowers scores (release)
    soft_nms_score: Share = 1e-3  # soft-NMS drops boxes whose score falls below (release)
    masks: bool = False  # instance segmentation (3.3); release: tested with NMS 0.3, no soft-NMS
    mask_channels: Natural = 256  # width of the transposed convolutions (release)
    epochs: Amount = 24.0  # length of training, passes over the data: 2x schedule (4.1)
    drops: tuple[Share, ...] = (20 / 24, 23 / 24)  # lr / 10 at these fractions (release)
    warmup: Whole = 1000  # steps of linear warm-up, at most a tenth of training (release) ...
    warmup_factor: Share = 1 / 80  # ... from this share of the rate (release)


# ------------------------------------------------------------------------------ equations


def cell_centres(proposals: Tensor, size: int = 7) -> Tensor:
    """Centres of the proposals' size x size bins: [R, 4] -> x, y [R, 2, S, S]."""
    step = (torch.arange(size, device=proposals.device) + 0.5) / size
    w, h = (proposals[:, 2:] - proposals[:, :2]).unbind(1)
    x = proposals[:, 0, None] + w[:, None] * step  # [R, S]
    y = proposals[:, 1, None] + h[:, None] * step
    return torch.stack([x[:, None].expand(-1, size, -1), y[..., None].expand(-1, -1, size)], 1)


def dense_offset_targets(
    proposals: Tensor, gt_boxes: Tensor, size: int = 7, margin: float = 1 / 6
) -> tuple[Tensor, Tensor]:
    """Eq. 2 and, with margin 0, Eq. 3: what each cell should predict.

    proposals, gt_boxes [R, 4] -> offsets (l, t, r, b) [R, 4, S, S], distances from a cell's centre
    to the gt's sides over the proposal's w, h, w, h (negative outside the gt); inside [R, 1, S, S],
    1.0 where all four are at least `margin` (release; 0 is Eq. 3). `decode` of both gives the gt.

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


def decode(proposals: Tensor, offsets: Tensor, overlap_logits: Tensor) -> Tensor:
    """The proposals' boxes [R, 4]: the mean of the cells' boxes where the overlap is > 0.5 (3.1).

    With no such cell: the mean over all. `kernels.decode_dense_offsets` is faster; no gradient.

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

    The paper names no box loss. Both releases take -log IoU, but -log(IoU + 0.1) where IoU <= 0.1:
    boxes start almost empty, and the slope of the plain logarithm, 1 / IoU, would end the training
    at its start. The loss is between 0 and -log 0.1, and falls by log 2 where IoU drops below 0.1.
    """
    x1, y1, x2, y2 = boxes.unbind(1)
    gx1, gy1, gx2, gy2 = gt_boxes.unbind(1)
    w = (torch.minimum(x2, gx2) - torch.maximum(x1, gx1)).clamp(min=0)
    h = (torch.minimum(y2, gy2) - torch.maximum(y1, gy1)).clamp(min=0)
    union = (x2 - x1) * (y2 - y1) + (gx2 - gx1) * (gy2 - gy1) - w * h
    iou = (w * h / union.clamp(min=1e-6)).clamp(min=1e-6)
    return -torch.where(iou > 0.1, iou, iou + 0.1).log()


def mask_targets(proposals: Tensor, gt_boxes: Tensor, masks: Tensor, size: int = 28):
    """What a proposal's mask should be (3.3): the part of the gt's that lies in it.

    proposals, gt_boxes [R, 4]; masks [R, M, M] (bool or 0..1), each over its gt_box -> targets
    [R, size, size], 1.0 where the mask, bilinear, is at least 0.5 at the cell's centre (release);
    and the object's area [R] in such cells, whether they lie in the proposal or not.

    >>> box = torch.tensor([[0., 0., 8., 8.]])
    >>> mask_targets(box, box / 2, torch.ones(1, 4, 4), size=2)
    (tensor([[[1., 0.],
             [0., 0.]]]), tensor([1.]))
    """
    wh = (gt_boxes[:, 2:] - gt_boxes[:, :2]).clamp(min=1e-6)
    cells = cell_centres(proposals, size) - gt_boxes[:, :2, None, None]  # [R, 2, size, size]
    grid = 2 * (cells / wh[..., None, None]).permute(0, 2, 3, 1) - 1  # from -1 to 1 in the gt's box
    masks = masks.float()
    targets = F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0] >= 0.5
    cell = (proposals[:, 2:] - proposals[:, :2]).clamp(min=1e-6).prod(1) / size**2
    return targets.float(), masks.mean((1, 2)) * wh.prod(1) / cell


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

    [R, C, 2S, 2S] -> offsets [R, 4, S, S] (l, t, r, b >= 0), overlap_logits [R, 1, S, S]. R >= 0.

    Beware of offset_bias 0, the release's: 29 to 57 % of the cells inside start without a gradient
    of `dense_losses` (five seeds at full width, random features), because the ReLU closes both l
    and r, or t and b, and an empty box has IoU 0. With 0.5, as in `--preset tiny`, none does.

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
        return self.cells(self.trunk(pooled))

    def cells(self, trunk: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` returns, from what the trunk of convolutions makes of the features."""
        return F.relu(self.offsets(trunk)), self.overlap(trunk)


class MaskBranch(nn.Module):
    """Masks and their quality (3.3), from DLR's last features; layers as in the release.

    trunk [R, C, S, S], labels [R] -> of these classes mask logits [R, 4S, 4S] and the predicted
    IoU [R] of the mask with the whole object, which no sigmoid keeps in 0..1. R may be 0.

    >>> branch = MaskBranch(8, 16, num_classes=3, hidden=32)
    >>> mask_logits, iou = branch(torch.rand(2, 8, 7, 7), torch.tensor([0, 2]))
    >>> mask_logits.shape, iou.shape
    (torch.Size([2, 28, 28]), torch.Size([2]))
    """

    def __init__(self, in_channels=576, channels=256, num_classes=80, hidden=1024, size=7):
        super().__init__()
        up1 = nn.ConvTranspose2d(in_channels, channels, 2, stride=2)
        up2 = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.up = nn.Sequential(up1, nn.GroupNorm(16, channels), nn.ReLU(), up2, nn.ReLU())
        self.logits = nn.Conv2d(channels, num_classes, 3, padding=1)
        for layer in (up1, up2, self.logits):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        self.iou = faster_rcnn.two_fc((in_channels + 1) * size**2, hidden, num_classes)
        for layer in (self.iou[1], self.iou[3]):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)

    def forward(self, trunk: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        row = torch.arange(len(labels), device=labels.device)
        logits = self.logits(self.up(trunk))[row, labels]  # [R, 4S, 4S]
        mask = F.max_pool2d(logits.detach()[:, None], 4).sigmoid()  # [R, 1, S, S], a constant
        return logits, self.iou(torch.cat([trunk, mask.to(trunk.dtype)], 1))[row, labels]


class AdaptiveWeightedPool(nn.Module):
    """Eq. 4, normalised as in the release: avg(W(F) F) / avg(W(F)), 3x3 windows at stride 2.

    [R, C, 2S, 2S] -> [R, C, S, S]. W(F) = exp(12 sigmoid(norm(conv F))) lies between 1 and e^12; 12
    is the release's. The convolution starts at zero, so the pool starts as the plain average over
    those samples of a window that are inside the map. A constant map stays as it is.

    >>> AdaptiveWeightedPool(4)(torch.ones(2, 4, 14, 14)).shape
    torch.Size([2, 4, 7, 7])
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(channels, channels)  # instance norm, also of an empty batch
        nn.init.zeros_(self.conv.weight)

    def forward(self, features: Tensor) -> Tensor:
        logits = self.norm(self.conv(features).contiguous())  # of channels_last it is slow on a CPU
        weight = (12 * logits.float().sigmoid()).exp()
        pooled = F.avg_pool2d(features.float() * weight, 3, 2, 1)
        return (pooled / F.avg_pool2d(weight, 3, 2, 1)).to(features.dtype)


class DiscriminativePool(nn.Module):
    """DRP (3.2): looks coarsely, moves the bins of a 7x7 grid, pools there, weighs the samples.

    features L x [B, C, H, W] of these strides, rois [R, 5] -> [R, C, S, S]. R may be 0. Bins start
    where RoIAlign has them. `gamma` scales their offsets, in the RoI's w and h. Each bin has 2x2
    sub-bins of samples^2 points: the sub-bins are what is weighted. weighting=False: plain average.

    >>> pool, rois = DiscriminativePool(4, 16), torch.tensor([[0., 8., 8., 40., 40.]])
    >>> pool([torch.ones(1, 4, 16, 16)], rois, [4]).shape
    torch.Size([1, 4, 7, 7])
    """

    def __init__(self, channels, fc_channels, size=7, weighting=True, samples=2, gamma=0.1):
        super().__init__()
        self.size, self.samples, self.gamma = size, samples, gamma
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
        plain = nn.AvgPool2d(3, 2, 1, count_include_pad=False)  # of samples, not of padding
        self.pool = AdaptiveWeightedPool(channels) if weighting else plain

    def forward(self, features: list[Tensor], rois: Tensor, strides: list[int]) -> Tensor:
        S = self.size
        coarse = kernels.roi_align(features, rois, S // 2, strides)  # [R, C, S//2, S//2]
        offsets = self.fc(coarse).float().view(-1, 2, S, S)  # dx, dy of each bin
        offsets = offsets.repeat_interleave(2, 2).repeat_interleave(2, 3)  # [R, 2, 2S, 2S]
        options = (2 * S, strides, self.samples, self.gamma)
        return self.pool(kernels.deform_roi_pool(features, rois, offsets, *options))


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
    """DLR's losses over R positives: `reg`, `iou_loss` of the cells' boxes, and `overlap`, BCE.

    offsets [R, 4, S, S], overlap_logits [R, 1, S, S], proposals, gt_boxes [R, 4]. Both losses are
    sums over cells divided by num_rois * S * S; num_rois is R unless given. A cell not inside
    adds nothing to `reg`, unless `cells` is "all", but counts in its divisor (second release).
    `inside` [R, 1, S, S], 1.0 or 0.0: which cells are, if a mask says it instead of the gt's box.
    """
    if inside is None:
        _, inside = dense_offset_targets(proposals, gt_boxes, offsets.shape[-1], margin)
    loss = iou_loss(cell_boxes(proposals, offsets.float()), gt_boxes[..., None, None])  # [R, S, S]
    loss = loss * inside[:, 0] if cells == "inside" else loss
    bce = F.binary_cross_entropy_with_logits(overlap_logits.float(), inside, reduction="sum")
    num_rois = max(1, len(proposals)) if num_rois is None else num_rois
    num_cells = num_rois * offsets.shape[-1] ** 2
    return {"reg": loss.sum() / num_cells, "overlap": bce / num_cells}


def mask_losses(mask_logits: Tensor, iou: Tensor, targets: Tensor, areas: Tensor, num_rois=None):
    """Of R positives `mask`, BCE, and `mask_iou`, half the predicted IoU's squared error (release).

    mask_logits [R, S, S], iou [R] of the gts' classes; targets [R, S, S], areas [R] to reach.
    Means over cells and over num_rois, which is R unless given. The IoU to predict is that of the
    mask, where its probability is over 0.5, with the whole object; up to 0.1 none trains (release).
    """
    num_rois = max(1, len(targets)) if num_rois is None else num_rois
    bce = F.binary_cross_entropy_with_logits(mask_logits.float(), targets, reduction="sum")
    seen = (mask_logits > 0).float()
    both, inside = (seen * targets).sum((1, 2)), targets.sum((1, 2))
    target_iou = both / (seen.sum((1, 2)) + torch.maximum(areas, inside) - both).clamp(min=1e-6)
    error = torch.where(target_iou > 0.1, (iou.float() - target_iou) ** 2 / 2, 0)
    return {"mask": bce / num_rois / targets.shape[-1] ** 2, "mask_iou": error.sum() / num_rois}


# ------------------------------------------------------------------------------ detector


class Detector(faster_rcnn.TwoStage):
    """Figure 2. What each method of a detector does: `engine/detector.py`."""

    def __init__(self, config: Config, num_classes: int):
        super().__init__(config, num_classes)
        C, S, hidden = config.fpn_channels, 7, config.fc_channels
        if config.dlr:
            dense = (config.conv_channels, config.num_convs, config.groups, config.offset_bias)
            self.regress = DenseLocalHead(C, *dense)
        elif config.shared:
            self.regress = faster_rcnn.output_layer(hidden, 4 * num_classes, 0.001)  # Fast R-CNN's
        else:
            self.regress = faster_rcnn.two_fc(C * S * S, hidden, 4 * num_classes)
        if config.masks:
            if not config.dlr or config.mask_channels % 16:
                raise BadInput("--masks needs dense local regression, and --mask-channels of 16 n")
            width = (config.conv_channels, config.mask_channels)
            self.mask_branch = MaskBranch(*width, num_classes, hidden, S)
        if config.drp:
            pool = (C, hidden, S, config.weighting, config.drp_samples, config.gamma)
            num_pools = len(self.strides) if config.drp_per_level else 1
            self.drp = nn.ModuleList(DiscriminativePool(*pool) for _ in range(num_pools))
        self.classify = faster_rcnn.two_fc(C * S * S, hidden, num_classes + 1, config.class_std)
        self.to(memory_format=torch.channels_last)

    def loss(self, images: list[Tensor], targets: list[dict]) -> dict[str, Tensor]:
        config = self.config
        features, sizes, losses, rois, labels, gt_boxes = self.training_rois(images, targets)
        pooled = self.class_features(features, rois)
        logits = self.classify(pooled)
        losses["cls"] = config.cls_weight * faster_rcnn.class_loss(logits, labels)
        if not config.dlr:
            deltas = self.box_deltas(features, rois, pooled)
            losses["reg"] = faster_rcnn.class_box_loss(deltas, rois, labels, gt_boxes)
            return losses
        chosen = (labels < self.num_classes).nonzero()[:, 0]  # positives, at most reg_rois
        chosen = chosen[torch.randperm(len(chosen), device=chosen.device)[: config.reg_rois]]
        image = rois[chosen, 0]
        boxes = jitter_boxes(rois[chosen, 1:], config.jitter, sizes[image.long()])
        pooled = self.pool(features, torch.cat([image[:, None], boxes], 1), 14)
        trunk, gts, inside = self.regress.trunk(pooled), gt_boxes[chosen], None
        num_rois = common.shared_rows(boxes)
        if config.masks:
            masks, areas = mask_targets(boxes, gts, gt_masks(gts, image, targets))
            losses |= mask_losses(*self.mask_branch(trunk, labels[chosen]), masks, areas, num_rois)
            # the coarse mask: at least three of the middle four of 4x4 cells (release)
            coarse = F.interpolate(masks[:, None], scale_factor=0.25, mode="bilinear")
            inside = (coarse > 0.5).float()
        options = (config.overlap_margin, config.reg_cells, num_rois, inside)
        dense = dense_losses(*self.regress.cells(trunk), boxes, gts, *options)
        losses["reg"] = config.reg_weight * dense["reg"]
        if config.overlap:
            losses["overlap"] = config.overlap_weight * dense["overlap"]
        return losses

    @torch.no_grad()
    def outputs(self, images: list[Tensor]) -> dict:
        """Proposals and their class probabilities [R, K]; without DLR also deltas [R, K, 4]."""
        features, sizes, rois, image = self.test_rois(images)
        pooled = self.class_features(features, rois)
        probs = self.classify(pooled).float().softmax(1)[:, :-1]
        outputs = dict(features=features, sizes=sizes, rois=rois, image=image, probs=probs)
        if not self.config.dlr:
            outputs["deltas"] = self.box_deltas(features, rois, pooled).unflatten(1, (-1, 4))
        return outputs

    @torch.no_grad()
    def select(self, outputs: dict, config: Config) -> dict[str, Tensor]:
        """NMS on the proposals, then DLR on the best (4.1): DLR is slow, and neighbours agree."""
        if not self.config.dlr:
            return faster_rcnn.best_boxes(outputs, config.score_threshold)
        features, sizes = outputs["features"], outputs["sizes"]
        rois, image = outputs["rois"], outputs["image"]
        row, labels, scores = over_threshold(outputs["probs"], config.score_threshold)
        groups = image[row] * self.num_classes + labels
        keep = kernels.batched_nms(rois[row, 1:], scores, groups, config.nms_iou)
        keep = keep[first_per_image(image[row[keep]], len(sizes), config.reg_test)]
        row, labels, scores = row[keep], labels[keep], scores[keep]
        offsets, overlap = self.regress(self.pool(features, rois[row], 14))
        overlap = overlap if config.overlap else torch.ones_like(overlap)
        boxes = kernels.decode_dense_offsets(rois[row, 1:], offsets, overlap, sizes[image[row]])
        found = dict(boxes=boxes, scores=scores, labels=labels, image=image[row])
        if self.config.masks:  # seen anew from the boxes, which nothing moves any more (release)
            pooled = self.pool(features, torch.cat([rois[row, :1], boxes], 1), 14)
            mask_logits, iou = self.mask_branch(self.regress.trunk(pooled), labels)
            found |= dict(masks=mask_logits.float().sigmoid(), mask_iou=iou.float())
        return found

    def finish(self, candidates: dict, num_images: int, config: Config | None = None) -> list[dict]:
        """As all detectors do; and masks are ranked by the box's score + 0.3 IoU (release)."""
        detections = super().finish(candidates, num_images, config)
        for found in detections if self.config.masks else ():
            found["mask_scores"] = found["scores"] + 0.3 * found.pop("mask_iou")
        return detections

    def suppress(self, boxes: Tensor, scores: Tensor, groups: Tensor, config: Config):
        """Soft-NMS, or nothing: NMS was on the proposals. Several views of an image are merged."""
        if self.config.dlr and config.soft_nms:
            limits = dict(iou_threshold=config.soft_nms_iou, score_threshold=config.soft_nms_score)
            return kernels.soft_nms(boxes, scores, groups, **limits)
        several_views = len(config.test_scales) > 1 or config.test_flip
        if several_views or not self.config.dlr:
            return super().suppress(boxes, scores, groups, config)
        keep = scores.argsort(descending=True, stable=True)
        return keep, scores[keep]

    def box_deltas(self, features: list[Tensor], rois: Tensor, class_features: Tensor) -> Tensor:
        """The baseline's deltas [R, 4K], from a branch of its own or from the classifier's."""
        if self.config.shared:
            return self.regress(self.classify[:-1](class_features))
        return self.regress(self.pool(features, rois, 7))

    def class_features(self, features: list[Tensor], rois: Tensor) -> Tensor:
        """What the classifier sees of rois [R, 5]: [R, C, 7, 7], through DRP if it is on."""
        if not self.config.drp:
            return self.pool(features, rois, 7)
        if not self.config.drp_per_level:
            return self.normalise(self.drp[0](features[:4], rois, self.strides))
        pooled = self.by_level(features, rois, lambda i, *maps: self.drp[i](*maps))
        return self.normalise(pooled)


# ------------------------------------------------------------------------------ rows

# Deviations (paper | releases: mmdet 1.x, repaired for mmdet 2.1 | here). Of what is learned:
# - Overlap target (Eq. 3): inside the gt | inside by w/6, h/6 of the proposal | release
# - Box loss: not named | -log IoU, of IoU + 0.1 up to 0.1 | release
# - Cells that train the box: - | all, weight 2 mean(inside) by a broadcast slip; repaired: those
#   inside, summed, over the number of all cells, weight 1 | repaired; `--reg-cells all`
# - Warm-up: - | 1000 steps from 1/80 of the rate | release
# - Eq. 4: W(F) * F, then average | divided by the average of W(F), kernel 3, stride 2 | release
# - The 8 convolutions: - | declared with 36 groups, computed dense; start by He's rule | dense;
#   start as PyTorch starts them, under a GroupNorm each
# - RoIs that train DLR: as they are | jittered by up to 15 %, at most 192 | release
# - DRP's weights: one set | one set per pyramid level | release; `--no-drp-per-level`
# - Deformable pooling: RoIAlign sampling | corners rounded, samples at bin starts; R-101 one a bin,
#   R-50 two a side; none outside the map | aligned and centred, nothing rounded; else release
# - Anchors that cross the image's border: - | do not train | train, if their centre is inside
# - Masks: - | cut out and pasted in whole pixels; the 7x7 target from the 28x28 | nothing rounded
# - Mask IoU: two fc | input misses the mask's last row and column (padded pooling); target is of
#   the mask where its logit is > 0.5 | all of the mask, where its probability is > 0.5
# - Crowd regions: - | plain background | proposals at least half inside one are no negatives
# Of the test alone:
# - No cell over 0.5: - | the box (0, 0, 0, 0), never clipped | mean over all cells, clipped
# - Soft-NMS: for test-dev | always | always, but in the rows of minival

# choice: Faster R-CNN's own loss weight, threshold and warm-up (MMDetection)
_FASTER = dict(dlr=False, cls_weight=1.0, score_threshold=0.05, warmup=500, warmup_factor=1 / 3)
_MINIVAL = dict(soft_nms=False)  # soft-NMS is for test-dev (4.1)
_DLR = dict(drp=False, **_MINIVAL)
_R101 = dict(backbone="resnet101", drp_samples=1)
_DCN = dict(**_R101, dcn="v2")  # all else as R-101 (release)
_MASKS = dict(masks=True, proposals_test=700, score_threshold=0.05, nms_iou=0.3, soft_nms=False)
# RoIs, detections, test scales: the authors' word (an issue of the release). Schedule and training
# scales: the data set's paper, as others quote it, 180k steps over 28k patches; choice: 16 a step.
# Longer side: theirs is 1333 px at each scale; here it grows with it and never cuts square patches.
# Metrics: the data set's kit.
_SCALES = (400, 600, 800, 1000, 1200)
_ISAID = dict(roi_samples=1024, roi_positive=0.5, scales=_SCALES, epochs=103.0, lr=0.025)
_ISAID |= dict(max_size=2000, test_scales=_SCALES, reg_test=500, max_detections=500)
_ISAID_METRICS = dict(metric_detections=(1, 10, 1000), metric_sides=(10.0, 144.0, 512.0))

# One training: table2.dlr and table3.dlr_alone; table2.dlr_drp and table3.d2det. The
# defaults are table2.dlr_drp with soft-NMS, as the released R-50 is tested (43.7 on minival).
ROWS: dict[str, dict] = {
    "table1.d2det_r101": _R101,
    "table1.d2det_r101_dcnv2": _DCN,
    "table1.d2det_ms": dict(
        **_DCN,
        # choice: neither paper nor release says which scales; these are common with 800 px
        scales=(400, 500, 600, 700, 800, 900, 1000, 1100, 1200),
        max_size=2000,
        test_scales=(600, 800, 1000, 1200),
        test_flip=True,
    ),
    "table2.shared": dict(drp=False, shared=True, **_FASTER),
    "table2.baseline": dict(drp=False, **_FASTER),
    "table2.dlr": _DLR,
    "table2.drp": _FASTER,
    "table2.dlr_drp": _MINIVAL,
    "table2.dlr_no_overlap": dict(overlap=False, reg_cells="all", **_DLR),
    "table2.drp_no_weighting": dict(weighting=False, **_FASTER),
    "table3.dlr_alone": _DLR,
    "table3.d2det": _MINIVAL,
    "table4.uavdt": _R101,  # choice: all as on COCO; only the backbone is said (4.3). Needs --data
    "table5.coco_masks": dict(**_R101, **_MASKS, reg_test=100),
    "table6.isaid_masks": dict(**_R101, **_MASKS, **_ISAID, **_ISAID_METRICS),
    "release.r50": dict(),
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
    "table4.uavdt": dict(uavdt_AP70=56.92),  # not COCO's AP70: UAVDT's own evaluator (4.3)
    "table5.coco_masks": dict(mask_AP=40.2, mask_AP50=61.5, mask_AP75=43.7),
    "table6.isaid_masks": dict(mask_AP=37.5, mask_AP50=61.0, mask_AP75=39.8),
    "release.r50": dict(AP=43.7),  # README of the release, minival
}

TINY = dict(
    faster_rcnn.TINY,
    conv_channels=48,
    num_convs=4,
    groups=8,
    drp_samples=1,  # as the release's R-101: a step takes an eighth less time
    drp_per_level=False,  # as in the paper: a step takes 6 % less time
    offset_bias=0.5,  # a narrow head that starts at empty boxes may close its ReLU for good
    reg_weight=4.0,  # choice: boxes have few steps to learn in; from one seed (docs/results.md)
    reg_rois=48,  # choice: mostly reached, and a CPU plans convolutions anew for each other number
    reg_test=50,
    mask_channels=32,
)


def main(argv=None):
    return engine.run("d2det", Config, Detector, ROWS, PAPER, TINY, argv)


if __name__ == "__main__":
    main()
