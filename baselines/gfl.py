"""GFL (Li et al., NeurIPS 2020): one score for class and fit, and a distribution for every side.
Paper: https://arxiv.org/abs/2006.04388   Followed here: the authors' release, the baseline of the
last row of DC loss's Table 1 ("FCOS with Generalized Focal Loss").

A dense detector that also predicts how well its boxes fit (IoU-aware RetinaNet: their IoU) learns
the fit on positives alone, and in testing multiplies it into the class scores. What it says of
background nobody has taught it, so a background box can rise by it. And each side of a box is one
number, although a blurred or covered object could end at several places.

    Quality focal loss (QFL). A class has one score s. Its target is the IoU of the predicted box
      with the object, and 0 for other classes and background. Focal loss knows the labels 0 and 1;
      with |target - s| in the place of 1 - p it takes all between them.
    Distribution focal loss (DFL). A side's distance from the anchor's centre is the mean of a
      distribution over 0, 1, .. 16 strides. The two bins beside the true distance are to hold it.

    image -> ResNet-FPN -> P3..P7, P6 a convolution on P5; one square anchor of 8 strides a cell
      class tower, 4 convs -> cls_logits [B, N, K]       s is their sigmoid
      box tower, 4 convs   -> bin_logits [B, N, 4, 17]   left, top, right, bottom; a factor a level
    training: ATSS: an object's candidates are the nine anchors of each level that are nearest to
              its centre; positive are those in it whose IoU is at least the candidates' mean plus
              their standard deviation
              loss = sum of all anchors' QFL / N_pos
                     + sum of positives' w * (2 GIoU loss + DFL / 4) / sum of w     w: its best s
    test:     best 1000 (anchor, class) pairs of each level by s, over 0.05 -> boxes -> NMS per
              class -> best 100

GFL is a RetinaNet of another head, assignment and loss; how boxes are found is RetinaNet's. In
comments "(release)" is a value seen in the authors' code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import common
import engine
from baselines import retinanet
from common import Amount, Natural, Share, Whole
from engine.detector import BaseDetector

# B images, K classes, L levels, N anchors per image, one a cell; G gts an image, P positives
# points [..., 3]: an anchor's centre and its level's stride, (x, y, stride) in px
# labels of anchors [B, N]: 1 positive, 0 negative, -1 ignored; classes 0..K-1, background K
# distances [..., 4]: of a box's left, top, right and bottom side from a point, in strides


@dataclass
class Config(engine.Config):
    """GFL with ResNet-50 on COCO; values, here and where nothing is said, are the release's."""

    cls_weight: Amount = 1.0  # weight of the quality focal loss
    box_weight: Amount = 2.0  # weight of the GIoU loss
    dfl_weight: Amount = 0.25  # weight of the distribution focal loss
    qfl_beta: Amount = 2.0  # quality focal loss: exponent of |target - s|
    max_distance: Natural = 16  # longest distance in strides; a side has a bin more
    atss_cells: Natural = 9  # an object's candidates on each level
    p2: bool = False  # choice: P2..P6 (P6 is P5 subsampled) in place of P3..P7 (tiny preset)
    anchor_scale: Amount = 8.0  # anchors' side in strides
    tower_convs: Natural = 4  # convolutions in each tower
    tower_groups: Whole = 32  # groups of a GroupNorm after each of them; 0: no norm
    score_threshold: Share = 0.05  # lowest score that is looked at
    top_scores: Natural = 1000  # (anchor, class) pairs per level that are decoded, by score
    all_classes: bool = False  # all classes of so many anchors instead of so many pairs
    nms_iou: Share = 0.6  # NMS per class suppresses above this IoU
    max_detections: Natural = 100  # detections kept per image
    lr: Amount = 0.01  # learning rate for 16 images a step; no clipping


# ------------------------------------------------------------------------------ losses


def quality_focal_loss(logits: Tensor, labels: Tensor, quality: Tensor, beta: float = 2.0):
    """QFL [N] of N anchors: the sum over their K classes. (Paper, Eq. 2)

        -|y - s|^beta * ((1 - y) log(1 - s) + y log(s))     s = sigmoid(logit)

    logits [N, K]; labels [N]: 0..K-1, background K, ignored -1 (no loss); y is quality [N], in
    0..1, for the label's class and 0 for the others. Where y is 0 or 1 it is focal loss, no alpha.

    >>> logits = torch.zeros(3, 2)  # s = 0.5: background, a fit as good as s says, a perfect one
    >>> quality_focal_loss(logits, torch.tensor([2, 0, 0]), torch.tensor([0.0, 0.5, 1.0]))
    tensor([0.3466, 0.1733, 0.3466])
    """
    K = logits.shape[1]
    target = logits.new_zeros(len(logits), K + 1)  # a column for labels K and -1, cut off again
    target = target.scatter_(1, labels[:, None] % (K + 1), quality[:, None])[:, :K]
    factor = (target - logits.sigmoid()).abs() ** beta
    loss = factor * F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return loss.sum(1) * (labels >= 0)


def distribution_focal_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """DFL [...] of distributions [..., bins] and true distances [...], below bins - 1. (Eq. 6)

        -((i + 1 - y) log(p_i) + (y - i) log(p_(i+1)))     i = floor(y)

    It is least where p_i = i + 1 - y and p_(i+1) = y - i, whose mean is y.

    >>> distribution_focal_loss(torch.zeros(2, 4), torch.tensor([0.5, 1.0])) / math.log(4)
    tensor([1., 1.])
    """
    low = distances.long()
    share = distances - low
    log_probs = logits.log_softmax(-1)
    lower = log_probs.gather(-1, low[..., None])[..., 0]
    upper = log_probs.gather(-1, low[..., None] + 1)[..., 0]
    return -((1 - share) * lower + share * upper)


def encode_distances(points: Tensor, boxes: Tensor, most: int = 16) -> Tensor:
    """Distances [..., 4] of boxes' sides from points, between 0 and `most` - 0.1 (release).

    >>> encode_distances(torch.tensor([12.0, 4, 8]), torch.tensor([4.0, 0, 28, 200]))
    tensor([ 1.0000,  0.5000,  2.0000, 15.9000])
    """
    centre, stride = points[..., :2], points[..., 2:]
    distances = torch.cat([centre - boxes[..., :2], boxes[..., 2:] - centre], -1)
    return (distances / stride).clamp(0, most - 0.1)


def decode_distances(points: Tensor, bin_logits: Tensor) -> Tensor:
    """Boxes [..., 4] whose sides are at the means of distributions [..., 4, bins]."""
    bins = torch.arange(bin_logits.shape[-1], device=bin_logits.device, dtype=torch.float32)
    centre, stride = points[..., :2], points[..., 2:]
    distances = (bin_logits.softmax(-1) * bins).sum(-1) * stride  # @ would be bf16 under autocast
    return torch.cat([centre - distances[..., :2], centre + distances[..., 2:]], -1)


# ------------------------------------------------------------------------------ head


class GFLHead(nn.Module):
    """Two towers of 3x3 convolutions, shared by the levels, then scores and sides' distributions.

    L maps -> cls_logits [B, N, K], bin_logits [B, N, 4, max_distance + 1]; N = sum(H*W). `groups`:
    of the GroupNorm after each tower convolution, which then has no bias; 0 for none. A level
    multiplies its bin_logits by a factor of its own, at first 1.

    >>> head = GFLHead(32, num_classes=3, num_convs=1, groups=8, num_levels=2)
    >>> [x.shape[1:] for x in head([torch.zeros(1, 32, 4, 4), torch.zeros(1, 32, 2, 2)])]
    [torch.Size([20, 3]), torch.Size([20, 4, 17])]
    """

    names = ("cls_logits", "bin_logits")  # of what forward returns

    def __init__(
        self, in_channels=256, num_classes=80, num_convs=4, groups=32, max_distance=16, num_levels=5
    ):
        super().__init__()
        self.num_classes, self.num_bins = num_classes, max_distance + 1
        self.cls_tower = retinanet.conv_tower(in_channels, num_convs, groups, bias=not groups)
        self.box_tower = retinanet.conv_tower(in_channels, num_convs, groups, bias=not groups)
        self.cls_logits = nn.Conv2d(in_channels, num_classes, 3, padding=1)
        self.bin_logits = nn.Conv2d(in_channels, 4 * self.num_bins, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(num_levels))
        retinanet.init_towers(self)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        logits = [self.cls_logits(self.cls_tower(f)) for f in features]
        bins = [self.bin_logits(self.box_tower(f)).float() for f in features]
        bins = [b * scale for b, scale in zip(bins, self.scales.unbind())]
        logits = common.flatten_levels(logits, self.num_classes).float()
        bins = common.flatten_levels(bins, 4 * self.num_bins)
        return logits, bins.unflatten(-1, (4, self.num_bins))


# ------------------------------------------------------------------------------ assignment (ATSS)


def nearest_cells(
    centres: Tensor, sizes: Tensor, width: int, stride: int, most: int = 9
) -> tuple[Tensor, Tensor]:
    """The `most` cells of a map that are nearest to each centre: index, found [B, G, most].

    centres [B, G, 2] (x, y) of gts, in the image; sizes [B, 2] of the images; width of the map.
    Cells in the padding do not count: where too few are left `found` is False. Of two that are
    equally near the first is taken. The nearest `most` cells of a row are neighbours, so it is
    enough to look at that many rows and columns around the centre, moved into the image: time and
    memory do not depend on the map.

    >>> nearest_cells(torch.tensor([[[17.0, 4.0]]]), torch.tensor([[8.0, 32.0]]), 4, 8, most=2)
    (tensor([[[2, 1]]]), tensor([[[True, True]]]))
    """
    side = most | 1  # odd: the nearest cell is in the middle
    count = (sizes.flip(-1) / stride - 0.5).ceil().long()[:, None]  # [B, 1, 2] cells in the image
    first = (centres / stride - 1).ceil().long() - side // 2
    first = first.minimum(count - side).clamp(min=0)
    cell = first[..., None] + torch.arange(side, device=centres.device)  # [B, G, 2, side]
    away = ((cell + 0.5) * stride - centres[..., None]) ** 2
    away = torch.where(cell < count[..., None], away, math.inf)
    distance = away[..., 1, :, None] + away[..., 0, None, :]  # squared; y before x, as in the map
    index = cell[..., 1, :, None] * width + cell[..., 0, None, :]
    distance, order = distance.flatten(-2).sort(dim=-1, stable=True)
    found = distance[..., :most].isfinite()
    return torch.where(found, index.flatten(-2).gather(-1, order[..., :most]), 0), found


@torch.no_grad()
def atss(
    anchors: Tensor, shapes: list, strides, sizes: Tensor, targets: list[dict], most: int = 9
) -> tuple[Tensor, Tensor, Tensor]:
    """ATSS's assignment: labels [B, N] (1, 0, -1), each anchor's gt [B, N, 4] and its class [B, N].

    anchors [N, 4], one a cell of maps of those `shapes`. Of a gt's candidates those are positive
    whose IoU reaches mean + standard deviation (with n - 1) and whose centre is over 0.01 px inside
    the gt (release); a gt between the centres has none. An anchor that is positive for several gts
    learns the one it overlaps most. All others are negative; ignored are anchors in the padding and
    those of which half lies in a crowd. The gt of all these, too, is the one they overlap most.
    """
    gt_boxes, gt_labels, valid, ignore = common.pad_targets(targets)
    inside = common.inside_image(anchors, sizes)
    labels, gt, _ = common.match(anchors, gt_boxes, 2, 2, valid, ignore)  # nothing has an IoU of 2
    middle = (gt_boxes[..., :2] + gt_boxes[..., 2:]) / 2
    cells, found, start = [], [], 0
    for (H, W), stride in zip(shapes, strides):
        level_cells, level_found = nearest_cells(middle, sizes, W, stride, most)
        cells.append(level_cells + start)
        found.append(level_found)
        start += H * W
    cells, found = torch.cat(cells, -1), torch.cat(found, -1)  # [B, G, L * most]
    candidates, boxes = anchors[cells], gt_boxes[:, :, None]
    iou = common.aligned_iou(candidates, boxes) * found
    count = found.sum(-1, keepdim=True)
    mean = iou.sum(-1, keepdim=True) / count.clamp(min=1)
    variance = ((iou - mean) ** 2 * found).sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    centre = (candidates[..., :2] + candidates[..., 2:]) / 2
    room = torch.cat([centre - boxes[..., :2], boxes[..., 2:] - centre], -1).amin(-1)
    positive = found & valid[..., None] & (iou >= mean + variance.sqrt()) & (room > 0.01)
    # [B, G, L * most] -> [B, N]: the positive's best IoU, then the first gt that has it
    score, cells = torch.where(positive, iou, -1).flatten(1), cells.flatten(1)
    best = iou.new_full(labels.shape, -1).scatter_reduce(1, cells, score, "amax")
    G = gt_boxes.shape[1]
    numbers = torch.arange(G, device=cells.device).repeat_interleave(positive.shape[-1])
    wins = (score >= 0) & (score == best.gather(1, cells))
    first = torch.full_like(gt, G).scatter_reduce(1, cells, torch.where(wins, numbers, G), "amin")
    labels = torch.where(inside, torch.where(first < G, 1, labels), -1)
    gt = torch.where(first < G, first, gt)
    gt_boxes = gt_boxes * valid[..., None]  # who meets no gt is given the first, maybe a crowd
    image = torch.arange(len(labels), device=labels.device)[:, None]
    return labels, gt_boxes[image, gt], gt_labels[image, gt]


# ------------------------------------------------------------------------------ detector


class Positives(NamedTuple):
    """The P positive anchors of a batch, each with its prediction and its ground truth."""

    index: tuple[Tensor, Tensor]  # image [P], anchor [P]
    points: Tensor  # [P, 3]
    cls_logits: Tensor  # [P, K]
    bin_logits: Tensor  # [P, 4, bins]
    gt_labels: Tensor  # [P]
    gt_boxes: Tensor  # [P, 4]

    def boxes(self) -> Tensor:
        """The predicted boxes [P, 4]."""
        return decode_distances(self.points, self.bin_logits)


class GFL(retinanet.RetinaNet):
    """GFL on RetinaNet's contract: `assign`, `weigh` and `score` are changed as there."""

    def __init__(self, config: Config, num_classes: int):
        BaseDetector.__init__(self, config, num_classes, extra="pool" if config.p2 else "conv_p5")
        towers = (config.tower_convs, config.tower_groups)
        self.head = GFLHead(config.fpn_channels, num_classes, *towers, config.max_distance)
        self.to(memory_format=torch.channels_last)

    def loss(self, images: list[Tensor], targets: list[dict]) -> dict[str, Tensor]:
        config, out = self.config, self.outputs(images)
        labels, gt_boxes, gt_labels = self.assign(out, targets)
        index = (labels == 1).nonzero(as_tuple=True)  # the host waits here, for P
        by_anchor = (out["cls_logits"], out["bin_logits"], gt_labels, gt_boxes)
        positives = Positives(index, out["points"][index[1]], *(x[index] for x in by_anchor))
        boxes, quality = positives.boxes(), torch.zeros_like(gt_boxes[..., 0])  # [P, 4], [B, N]
        quality[index] = common.aligned_iou(boxes.detach(), positives.gt_boxes)
        classes = retinanet.class_targets(labels, gt_labels, self.num_classes)
        qfl = (out["cls_logits"].flatten(0, 1), classes.flatten(), quality.flatten())
        qfl = quality_focal_loss(*qfl, config.qfl_beta).view_as(labels)
        qfl = self.weigh(qfl, positives)
        weights = positives.cls_logits.detach().amax(1).sigmoid()  # [P]
        weights = weights / common.shared_count(weights.sum(), least=1e-6)  # it may be 0
        giou = torchvision.ops.generalized_box_iou_loss(boxes, positives.gt_boxes)
        distances = encode_distances(positives.points, positives.gt_boxes, config.max_distance)
        dfl = distribution_focal_loss(positives.bin_logits, distances).mean(1)
        return {
            "cls": config.cls_weight * qfl.sum() / retinanet.count_positives(labels),
            "box": config.box_weight * (weights * giou).sum(),
            "dfl": config.dfl_weight * (weights * dfl).sum(),
        }

    @torch.no_grad()
    def assign(self, out: dict, targets: list[dict]) -> tuple[Tensor, Tensor, Tensor]:
        """labels [B, N], and each anchor's gt: boxes [B, N, 4] and classes [B, N]."""
        maps = (out["shapes"], self.backbone.strides)
        return atss(out["anchors"], *maps, out["sizes"], targets, self.config.atss_cells)

    def outputs(self, images: list[Tensor]) -> dict:
        """What the head returns, by its `names`; anchors [N, 4], points [N, 3], sizes [B, 2] ..."""
        batch, sizes = common.pad_images(images)
        features, scale = self.backbone(batch), self.config.anchor_scale
        shapes = [f.shape[-2:] for f in features]
        grid = (shapes, self.backbone.strides, (scale,), (1.0,), batch.device)
        anchors = common.make_anchors(*grid)
        centre, side = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:3] - anchors[:, :1]
        out = dict(zip(self.head.names, self.head(features)), shapes=shapes, sizes=sizes)
        out |= dict(anchors=anchors, points=torch.cat([centre, side / scale], 1))
        return out | dict(per_level=[h * w for h, w in shapes])

    def decode(self, outputs: dict, index: tuple) -> Tensor:
        """The predicted boxes [M, 4] of the anchors `index`, each [M]."""
        return decode_distances(outputs["points"][index[1]], outputs["bin_logits"][index])


Detector = GFL  # under the name that it has in every script


# ------------------------------------------------------------------------------ rows

# Deviations (release | here), beside RetinaNet's (baselines/retinanet.py):
#   IoU of anchors, of quality and in GIoU: "+1" sizes, the last two in strides | continuous.
#   Anchors of padding: background; an image's own, up to 32 px, are candidates | do not train.
#   Biases: twice the rate, no weight decay | as all weights.
# The release's README: ResNet-50 40.2 AP on val 2017 after 12 epochs, these settings.
ROWS: dict[str, dict] = {}
PAPER: dict[str, dict] = {}

TINY = dict(engine.TINY, tower_convs=2, tower_groups=8, epochs=2.6, lr=6e-3)
TINY |= dict(p2=True, anchor_scale=4.0)  # small objects: images are 128 px wide


def main(argv=None):
    return engine.run("gfl", Config, Detector, ROWS, PAPER, TINY, argv)


if __name__ == "__main__":
    main()
