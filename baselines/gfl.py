"""GFL (Li et al., NeurIPS 2020): one score for class and fit, a distribution for each side.
Paper: "Generalized Focal Loss", https://arxiv.org/abs/2006.04388
Release, followed here: https://github.com/implus/GFocal
The last row of DC loss's Table 1 builds on it ("FCOS with Generalized Focal Loss").

Some detectors, IoU-aware RetinaNet among them, also predict how well a box fits. This estimate
is trained on positives alone, and is multiplied with the class score only in testing. Nothing
teaches it about background, so a background box with a high estimate can rank above objects.
Besides, each side of a box is predicted as one number, although a blurred or covered side
could be in several places. GFL has a loss for each of these problems:

Quality focal loss (QFL). Class and fit share one score s per class. Its target is the IoU of
    the predicted box with its object, and 0 for other classes and for background. Focal loss
    needs targets of 0 and 1; QFL takes any between, with |target - s| for focal loss's 1 - p.
Distribution focal loss (DFL). The distance from an anchor's centre to a side of the box is the
    mean of a predicted distribution over 0, 1, .. 16 strides. DFL asks for all probability in
    the two bins beside the true distance.

    image -> ResNet-FPN -> P3..P7, P6 from P5; one square anchor of 8 strides per cell
      class tower, 4 convs -> cls_logits [B, N, K]       s is their sigmoid
      box tower, 4 convs   -> bin_logits [B, N, 4, 17]   left, top, right, bottom
    training: ATSS, https://arxiv.org/abs/1912.02424, chooses the positives: each level's nine
              anchors nearest to an object's centre compete, and those with high IoUs win
    test:     best 1000 (anchor, class) pairs of each level by s, over 0.05 -> boxes -> NMS per
              class -> best 100

    Eq. 2   QFL = -|y - s|^beta ((1 - y) log(1 - s) + y log(s))     quality_focal_loss
    Eq. 5   distance = sum over the bins of i p_i                   decode_distances
    Eq. 6   DFL = -((i + 1 - y) log(p_i) + (y - i) log(p_(i+1)))    distribution_focal_loss
    Eq. 8   L = (sum QFL) / N_pos
                + (sum_pos s (2 GIoU loss + DFL / 4)) / (sum_pos s)   GFL.loss
    ATSS    positive if IoU >= mean + standard deviation            atss

In Eq. 8 a positive's box losses are weighted by its best score s, as in the release. Boxes for
NMS are found as in RetinaNet. docs/deviations.md lists the differences from the release. In
comments, "(release)" marks a value seen there and "choice:" one of our own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import engine
from baselines import retinanet
from baselines.retinanet import Assignment, OneStage, Positives
from engine import Amount, Natural, Share, Whole

# B images, K classes, L levels, N anchors per image, one per cell
# G objects (gts) per image, P positive anchors of a batch
# points [..., 3]: an anchor's centre and its level's stride, (x, y, stride) in px
# labels of anchors [B, N]: 1 positive, 0 negative, -1 ignored; classes 0..K-1, background K
# distances [..., 4]: from a point to a box's left, top, right and bottom side, in strides
# index: (image, anchor), two tensors that pick anchors of the batch, as in bin_logits[index]


@dataclass
class Model(engine.Model):
    """GFL with ResNet-50. All values are the release's unless a comment says otherwise."""

    norm: engine.Norm = "eval_bn"  # the backbone's BatchNorm
    cls_weight: Amount = 1.0  # weight of the quality focal loss
    box_weight: Amount = 2.0  # weight of the GIoU loss
    dfl_weight: Amount = 0.25  # weight of the distribution focal loss
    qfl_beta: Amount = 2.0  # quality focal loss: exponent of |target - s|
    max_distance: Natural = 16  # longest distance in strides; each side has one more bin
    atss_cells: Natural = 9  # an object's candidates on each level
    p2: bool = False  # choice: P2..P6 (P6 is P5 subsampled) in place of P3..P7 (tiny preset)
    anchor_scale: Amount = 8.0  # anchors' side in strides
    tower_convs: Natural = 4  # convolutions in each tower
    tower_groups: Whole = 32  # groups of a GroupNorm after each of them; 0: no norm


@dataclass
class Test(retinanet.Test):
    """Scores over 0.05, NMS at 0.6, best 100."""

    nms_iou: Share = 0.6  # NMS per class suppresses above this IoU


TINY = dict(
    engine.TINY,
    tower_convs=2,
    tower_groups=8,
    epochs=2.6,
    lr=6e-3,
    p2=True,
    anchor_scale=4.0,  # small objects: images are 128 px wide
)


@dataclass
class Settings(engine.Settings):
    """GFL with ResNet-50 on COCO."""

    tiny = TINY

    model: Model = field(default_factory=Model)
    test: Test = field(default_factory=Test)
    run: engine.Run = field(default_factory=lambda: engine.Run(lr=0.01))


# ------------------------------------------------------------------------------ losses


def quality_focal_loss(
    logits: Tensor, labels: Tensor, quality: Tensor, beta: float = 2.0
) -> Tensor:
    """Eq. 2: QFL [N] of N anchors, the sum over their K classes.

        -|y - s|^beta * ((1 - y) log(1 - s) + y log(s))     s = sigmoid(logit)

    logits [N, K]; labels [N]: 0..K-1, background K, ignored -1 (no loss). y is quality [N], in
    0..1, for the label's class, and 0 for the others. At y = 0 and y = 1 QFL is focal loss
    without alpha.

    >>> logits = torch.zeros(3, 2)  # s = 0.5, for background and for IoUs of 0.5 and 1
    >>> quality_focal_loss(logits, torch.tensor([2, 0, 0]), torch.tensor([0.0, 0.5, 1.0]))
    tensor([0.3466, 0.1733, 0.3466])
    """
    K = logits.shape[1]
    target = logits.new_zeros(len(logits), K + 1)  # last column: labels K and -1
    target = target.scatter_(1, labels[:, None] % (K + 1), quality[:, None])[:, :K]
    factor = (target - logits.sigmoid()).abs() ** beta
    loss = factor * F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return loss.sum(1) * (labels >= 0)


def distribution_focal_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """Eq. 6: DFL [...] of distributions [..., bins] and true distances y [...] < bins - 1.

        -((i + 1 - y) log(p_i) + (y - i) log(p_(i+1)))     i = floor(y)

    It is smallest where p_i = i + 1 - y and p_(i+1) = y - i, a distribution whose mean is y.

    >>> distribution_focal_loss(torch.zeros(2, 4), torch.tensor([0.5, 1.0])) / math.log(4)
    tensor([1., 1.])
    """
    low = distances.long()
    share = distances - low
    log_probs = logits.log_softmax(-1)
    lower = log_probs.gather(-1, low[..., None])[..., 0]
    upper = log_probs.gather(-1, low[..., None] + 1)[..., 0]
    return -((1 - share) * lower + share * upper)


def giou_loss(boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    """1 - GIoU [...] of boxes and gt_boxes [..., 4], pair by pair.

        GIoU = IoU - (hull - union) / hull     hull: area of the box around both

    (torchvision's function makes the host wait.)

    >>> giou_loss(torch.tensor([0.0, 0, 1, 1]), torch.tensor([[0.0, 0, 1, 1], [2, 0, 3, 1]]))
    tensor([0.0000, 1.3333])
    """
    low = torch.minimum(boxes[..., :2], gt_boxes[..., :2])
    high = torch.maximum(boxes[..., 2:], gt_boxes[..., 2:])
    w, h = (high - low).unbind(-1)
    iou, hull = common.aligned_iou(boxes, gt_boxes), (w * h).clamp(min=1e-6)
    w, h = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
    gt_w, gt_h = (gt_boxes[..., 2:] - gt_boxes[..., :2]).unbind(-1)
    union = (w * h + gt_w * gt_h) / (1 + iou)  # since IoU = intersection / union
    return 1 - iou + (hull - union) / hull


def encode_distances(points: Tensor, boxes: Tensor, most: int = 16) -> Tensor:
    """Distances [..., 4] from points to boxes' sides, cut to 0 .. `most` - 0.1 (release).

    >>> encode_distances(torch.tensor([12.0, 4, 8]), torch.tensor([4.0, 0, 28, 200]))
    tensor([ 1.0000,  0.5000,  2.0000, 15.9000])
    """
    centre, stride = points[..., :2], points[..., 2:]
    distances = torch.cat([centre - boxes[..., :2], boxes[..., 2:] - centre], -1)
    return (distances / stride).clamp(0, most - 0.1)


def decode_distances(points: Tensor, bin_logits: Tensor) -> Tensor:
    """Eq. 5: boxes [..., 4] from the means of distributions [..., 4, bins]."""
    bins = torch.arange(bin_logits.shape[-1], device=bin_logits.device, dtype=torch.float32)
    centre, stride = points[..., :2], points[..., 2:]
    # not a matrix product, which would be bf16 under autocast
    distances = (bin_logits.softmax(-1) * bins).sum(-1) * stride
    return torch.cat([centre - distances[..., :2], centre + distances[..., 2:]], -1)


# ------------------------------------------------------------------------------ head


class GFLHead(nn.Module):
    """GFL's head, the same for all levels: two towers of 3x3 convolutions, then predictions.

    L maps [B, C, H, W] -> cls_logits [B, N, K], bin_logits [B, N, 4, max_distance + 1], with
    N = sum(H*W). With `groups`, a GroupNorm of so many groups follows each tower convolution,
    which then has no bias. Each level scales its bin_logits by a learned factor, at first 1.

    >>> head = GFLHead(32, num_classes=3, num_convs=1, groups=8, num_levels=2)
    >>> [x.shape[1:] for x in head([torch.zeros(1, 32, 4, 4), torch.zeros(1, 32, 2, 2)])]
    [torch.Size([20, 3]), torch.Size([20, 4, 17])]
    """

    def __init__(
        self,
        in_channels=256,
        num_classes=80,
        num_convs=4,
        groups=32,
        max_distance=16,
        num_levels=5,
    ):
        super().__init__()
        self.num_classes, self.num_bins = num_classes, max_distance + 1
        self.cls_tower = retinanet.conv_tower(in_channels, num_convs, groups, bias=not groups)
        self.box_tower = retinanet.conv_tower(in_channels, num_convs, groups, bias=not groups)
        self.cls_logits = nn.Conv2d(in_channels, num_classes, 3, padding=1)
        self.bin_logits = nn.Conv2d(in_channels, 4 * self.num_bins, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(num_levels))
        retinanet.init_towers(self, self.cls_logits)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        logits = [self.cls_logits(self.cls_tower(f)) for f in features]
        maps = [self.bin_logits(self.box_tower(f)).float() for f in features]
        maps = [m * scale for m, scale in zip(maps, self.scales.unbind())]
        bin_logits = common.flatten_levels(maps, 4 * self.num_bins)
        cls_logits = common.flatten_levels(logits, self.num_classes).float()
        return cls_logits, bin_logits.unflatten(-1, (4, self.num_bins))


# ------------------------------------------------------------------------------ assignment


def nearest_cells(
    centres: Tensor, sizes: Tensor, width: int, stride: int, most: int = 9
) -> tuple[Tensor, Tensor]:
    """The `most` cells of a map that are nearest to each centre: index, valid [B, G, most].

    centres [B, G, 2] (x, y) of gts, in the image; sizes [B, 2] of the images; width of the
    map. Cells in the padding do not count; if too few others exist, `valid` is False for the
    rest. If two cells are equally near, the first is taken.

    The nearest `most` cells of a row are neighbours. So it is enough to look at that many rows
    and columns around the centre: time and memory do not depend on the map's size.

    >>> nearest_cells(torch.tensor([[[17.0, 4.0]]]), torch.tensor([[8.0, 32.0]]), 4, 8, most=2)
    (tensor([[[2, 1]]]), tensor([[[True, True]]]))
    """
    side = most | 1  # odd: the nearest cell is in the middle
    count = (sizes.flip(-1) / stride - 0.5).ceil().long()[:, None]  # [B, 1, 2] in the image
    first = (centres / stride - 1).ceil().long() - side // 2
    first = first.minimum(count - side).clamp(min=0)
    cell = first[..., None] + torch.arange(side, device=centres.device)  # [B, G, 2, side]
    away = ((cell + 0.5) * stride - centres[..., None]) ** 2
    away = torch.where(cell < count[..., None], away, math.inf)
    distance = away[..., 1, :, None] + away[..., 0, None, :]  # squared; rows first, as in maps
    index = cell[..., 1, :, None] * width + cell[..., 0, None, :]
    distance, order = distance.flatten(-2).sort(dim=-1, stable=True)
    valid = distance[..., :most].isfinite()
    return torch.where(valid, index.flatten(-2).gather(-1, order[..., :most]), 0), valid


def atss_candidates(
    gt_boxes: Tensor, shapes: list, strides, sizes: Tensor, most: int = 9
) -> tuple[Tensor, Tensor]:
    """Each gt's candidates, `most` anchors of each level: index, valid [B, G, L*most]."""
    centres = (gt_boxes[..., :2] + gt_boxes[..., 2:]) / 2
    anchors, valids, start = [], [], 0
    for (H, W), stride in zip(shapes, strides):
        cell, valid = nearest_cells(centres, sizes, W, stride, most)
        anchors.append(cell + start)
        valids.append(valid)
        start += H * W
    return torch.cat(anchors, -1), torch.cat(valids, -1)


@torch.no_grad()
def atss(
    anchors: Tensor, shapes: list, strides, sizes: Tensor, targets: list[dict], most: int = 9
) -> Assignment:
    """ATSS's assignment of anchors [N, 4], one for each cell of maps of those `shapes`.

    An object's candidates are the `most` anchors of each level that are nearest to its centre.
    From their IoUs with the object, ATSS computes a threshold: mean + standard deviation (with
    n - 1). A candidate is positive if its IoU reaches the threshold and its centre lies more
    than 0.01 px inside the object (release). So an object may have no positive. An anchor that
    is positive for several objects learns the one that it overlaps most.

    Other anchors are negative, or ignored if they lie in the padding or at least half inside a
    crowd. They have an object too: the one that they overlap most.
    """
    gt_boxes, gt_labels, gt_valid, ignore = common.pad_targets(targets)
    inside = common.inside_image(anchors, sizes)
    labels, gt, _ = common.match(anchors, gt_boxes, 2, 2, gt_valid, ignore)  # no IoU reaches 2
    near, valid = atss_candidates(gt_boxes, shapes, strides, sizes, most)  # [B, G, L*most]
    candidates, boxes = anchors[near], gt_boxes[:, :, None]
    iou = common.aligned_iou(candidates, boxes) * valid
    count = valid.sum(-1, keepdim=True)
    mean = iou.sum(-1, keepdim=True) / count.clamp(min=1)
    variance = ((iou - mean) ** 2 * valid).sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    centre = (candidates[..., :2] + candidates[..., 2:]) / 2
    room = torch.cat([centre - boxes[..., :2], boxes[..., 2:] - centre], -1).amin(-1)
    positive = valid & gt_valid[..., None] & (iou >= mean + variance.sqrt()) & (room > 0.01)
    # From [B, G, L*most] to [B, N]: an anchor's best IoU as a positive, then the first such gt
    score, near = torch.where(positive, iou, -1).flatten(1), near.flatten(1)
    best = iou.new_full(labels.shape, -1).scatter_reduce(1, near, score, "amax")
    G = gt_boxes.shape[1]
    numbers = torch.arange(G, device=near.device).repeat_interleave(positive.shape[-1])
    wins = (score >= 0) & (score == best.gather(1, near))
    numbers = torch.where(wins, numbers, G)
    first = torch.full_like(gt, G).scatter_reduce(1, near, numbers, "amin")
    labels = torch.where(inside, torch.where(first < G, 1, labels), -1)
    gt = torch.where(first < G, first, gt)
    # An anchor without overlap has object 0. If it is a crowd, its box must not be learned.
    gt_boxes = gt_boxes * gt_valid[..., None]
    image = torch.arange(len(labels), device=labels.device)[:, None]
    return Assignment(labels, gt, gt_boxes[image, gt], gt_labels[image, gt])


# ------------------------------------------------------------------------------ detector


class GFL(OneStage):
    """GFL: a one-stage detector with a head, an assignment and losses of its own."""

    settings: Model
    default_test: type[retinanet.Test] = Test

    def __init__(self, model: Model, num_classes: int):
        super().__init__(model, num_classes, extra="pool" if model.p2 else "conv_p5")
        self.head = GFLHead(
            model.fpn_channels,
            num_classes=num_classes,
            num_convs=model.tower_convs,
            groups=model.tower_groups,
            max_distance=model.max_distance,
        )
        self.to(memory_format=torch.channels_last)

    def loss(self, images: list[Tensor], targets: list[dict]) -> dict[str, Tensor]:
        """Eq. 8, as weighted scalars `cls` (QFL of all anchors), `box` (GIoU loss), `dfl`."""
        settings, out = self.settings, self.outputs(images)
        assigned = self.assign(out, targets)
        index = (assigned.labels == 1).nonzero(as_tuple=True)  # the host waits here, for P
        points, bin_logits = out["points"][index[1]], out["bin_logits"][index]
        boxes = decode_distances(points, bin_logits)  # [P, 4]
        positives = Positives.at(index, assigned, out["cls_logits"], boxes)
        quality = torch.zeros_like(assigned.gt_boxes[..., 0])  # [B, N]
        quality[index] = common.aligned_iou(boxes.detach(), positives.gt_boxes)
        qfl = quality_focal_loss(
            out["cls_logits"].flatten(0, 1),
            assigned.classes(self.num_classes).flatten(),
            quality.flatten(),
            settings.qfl_beta,
        )
        qfl = self.weigh(qfl.view_as(quality), positives)  # [B, N]
        num_positives = retinanet.count_positives(assigned.labels)
        weights = positives.cls_logits.detach().amax(1).sigmoid()  # [P]
        weights = weights / common.shared_count(weights.sum(), least=1e-6)  # the sum may be 0
        giou = giou_loss(boxes, positives.gt_boxes)
        distances = encode_distances(points, positives.gt_boxes, settings.max_distance)
        dfl = distribution_focal_loss(bin_logits, distances).mean(1)
        return {
            "cls": settings.cls_weight * qfl.sum() / num_positives,
            "box": settings.box_weight * (weights * giou).sum(),
            "dfl": settings.dfl_weight * (weights * dfl).sum(),
        }

    @torch.no_grad()
    def assign(self, out: dict, targets: list[dict]) -> Assignment:
        """What each anchor learns, by ATSS."""
        strides, most = self.backbone.strides, self.settings.atss_cells
        return atss(out["anchors"], out["shapes"], strides, out["sizes"], targets, most)

    def outputs(self, images: list[Tensor]) -> dict:
        """cls_logits [B, N, K] and bin_logits [B, N, 4, bins] of N anchors.

        Also the anchors [N, 4]; points [N, 3], their centres and strides; the maps' shapes;
        the number of anchors per_level; and the images' sizes [B, 2].
        """
        batch, sizes = common.pad_images(images)
        features = self.backbone(batch)
        cls_logits, bin_logits = self.head(features)
        shapes, scale = [f.shape[-2:] for f in features], self.settings.anchor_scale
        strides = self.backbone.strides
        anchors = common.make_anchors(shapes, strides, [scale], [1.0], batch.device)
        centre, side = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:3] - anchors[:, :1]
        return dict(
            cls_logits=cls_logits,
            bin_logits=bin_logits,
            anchors=anchors,
            points=torch.cat([centre, side / scale], 1),
            shapes=shapes,
            per_level=[h * w for h, w in shapes],
            sizes=sizes,
        )

    def decode(self, outputs: dict, index: tuple) -> Tensor:
        """The predicted boxes [M, 4] of the anchors `index`, each [M]."""
        boxes = decode_distances(outputs["points"][index[1]], outputs["bin_logits"][index])
        if "pixel_centres" in self.settings.legacy:  # the last pixels belong to the box
            boxes += boxes.new_tensor([-0.5, -0.5, 0.5, 0.5])
        return boxes


Detector = GFL  # the name that every script has


def main(argv=None):
    return engine.run("gfl", Settings, Detector, argv)


if __name__ == "__main__":
    main()
