"""Boxes, matching, anchors, batches and the backbone, which every detector here builds on.

Conventions, in all files:
    Boxes are float32 xyxy in pixels of the network's input, continuous: width = x2 - x1.
    Sizes are (h, w). Dense offsets (l, t, r, b) are fractions of a proposal's sides.
    Labels: foreground 0..K-1, background K, ignore -1. Category ids become labels when a data
    set is loaded, and become ids again when results are written.
    B images, R RoIs, G ground-truth objects (gts), K classes, A anchors per cell, L levels,
    C channels, S side of an RoI grid, N boxes entering an NMS.
    Networks run channels_last, with bf16 autocast on a GPU that has it; boxes stay float32.

`images` is a list of uint8 RGB tensors [3, h, w], resized but neither normalised nor padded.
A target is a dict: boxes [G, 4], labels [G], ignore [G] (bool: crowd or difficult), image_id
and size, the (h, w) of the image on disk. For detectors with masks it also has masks.

"The host waits here" marks a line at which the CPU needs a number that the GPU has yet to
compute. Training code avoids such lines, so that the GPU never runs out of work.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool


class BadInput(ValueError):
    """The user gave something that cannot be used; the message names it and the reason."""


# ------------------------------------------------------------------------------ boxes

DELTA_CLAMP = math.log(1000 / 16)  # largest |dw|, |dh| before exp


def constant(values, device) -> Tensor:
    """A small float tensor on a device, copied without making the host wait for the GPU."""
    return torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)


def encode_boxes(boxes: Tensor, gt_boxes: Tensor, stds=(1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Deltas (dx, dy, dw, dh) that move `boxes` onto `gt_boxes`; all [..., 4].

        dx = (x* - x) / w     dy = (y* - y) / h     dw = log(w* / w)     dh = log(h* / h)

    x, y, w, h are the box's centre and size; a * marks those of the gt. Each delta is divided
    by its std. Sizes are clamped to 1e-6, so deltas are finite. `decode_boxes` is the inverse.

    >>> box, gt = torch.tensor([0., 0., 10., 20.]), torch.tensor([5., 0., 15., 40.])
    >>> encode_boxes(box, gt)
    tensor([0.5000, 0.5000, 0.0000, 0.6931])
    """
    size = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-6)
    gt_size = (gt_boxes[..., 2:] - gt_boxes[..., :2]).clamp(min=1e-6)
    shift = (gt_boxes[..., :2] + gt_boxes[..., 2:] - boxes[..., :2] - boxes[..., 2:]) / 2
    deltas = torch.cat([shift / size, (gt_size / size).log()], dim=-1)
    return deltas / constant(stds, deltas.device)


def decode_boxes(boxes: Tensor, deltas: Tensor, stds=(1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Boxes [..., 4] moved by deltas (dx, dy, dw, dh) [..., 4], computed in float32."""
    deltas = deltas.float() * constant(stds, deltas.device)
    size = boxes[..., 2:] - boxes[..., :2]
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2 + deltas[..., :2] * size
    half = size * deltas[..., 2:].clamp(-DELTA_CLAMP, DELTA_CLAMP).exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes [..., 4] cut to images of sizes (h, w) [..., 2]; the two broadcast."""
    limit = torch.cat([sizes.flip(-1)] * 2, -1)  # (w, h, w, h)
    return torch.minimum(boxes.clamp(min=0), limit)


def aligned_iou(boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    """IoU [...] of boxes and gt_boxes [..., 4], pair by pair (they broadcast); differentiable.

    >>> aligned_iou(torch.tensor([0., 0., 10., 10.]), torch.tensor([5., 0., 15., 10.])) * 3
    tensor(1.)
    """
    corner = torch.maximum(boxes[..., :2], gt_boxes[..., :2])
    other = torch.minimum(boxes[..., 2:], gt_boxes[..., 2:])
    w, h = (other - corner).clamp(min=0).unbind(-1)  # not prod, whose backward waits
    box_w, box_h = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
    gt_w, gt_h = (gt_boxes[..., 2:] - gt_boxes[..., :2]).unbind(-1)
    return w * h / (box_w * box_h + gt_w * gt_h - w * h).clamp(min=1e-6)


# ------------------------------------------------------------------------------ matching


def match_one_image(boxes: Tensor, gt_boxes: Tensor, high: float, low: float):
    """`match` in readable form: one image, at least one gt, all valid. Tests hold them equal.

    boxes [N, 4], gt_boxes [G, 4] -> labels [N], gt index [N], IoU with that gt [N].

    >>> boxes = torch.tensor([[0., 0., 10., 10.], [0., 0., 10., 18.], [50., 50., 60., 60.]])
    >>> match_one_image(boxes, torch.tensor([[0., 0., 10., 10.]]), high=0.6, low=0.4)
    (tensor([ 1, -1,  0]), tensor([0, 0, 0]), tensor([1.0000, 0.5556, 0.0000]))
    """
    iou = torchvision.ops.box_iou(boxes, gt_boxes)  # [N, G]
    best_iou, best = iou.max(dim=1)
    labels = torch.full_like(best, -1)  # between the two thresholds: ignored
    labels[best_iou < low] = 0
    labels[best_iou >= high] = 1
    return labels, best, best_iou


@torch.no_grad()
def match(
    boxes: Tensor,
    gt_boxes: Tensor,
    high: float,
    low: float,
    gt_valid: Tensor | None = None,
    gt_ignore: Tensor | None = None,
    low_quality: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Assign each box to the gt that it overlaps most, for all images of a batch at once.

    boxes [..., N, 4], gt_boxes [..., G, 4]; gt_valid and gt_ignore [..., G] are bool.
    Returns labels (1: IoU >= high, 0: IoU < low, -1: between), the index of the box's gt, and
    the box's best IoU, each [..., N]. Leading dimensions broadcast.

    `match_one_image` is the plain form. This function adds three rules:
    - A box is only assigned to a valid gt; the other gts are padding, or to be ignored.
    - A box at least half inside an ignored gt (crowd, difficult) is -1 instead of 0.
    - If `low_quality` is given, each gt's best boxes are positive even below `high`, provided
      their IoU is > 0 and >= `low_quality`. If two gts claim the same box, the later one wins.
    """
    N, G = boxes.shape[-2], gt_boxes.shape[-2]
    batch = torch.broadcast_shapes(boxes.shape[:-2], gt_boxes.shape[:-2])
    best_iou = boxes.new_zeros(*batch, N)
    best = torch.zeros(*batch, N, dtype=torch.long, device=boxes.device)
    in_ignored = torch.zeros_like(best, dtype=torch.bool)
    claimed_by = torch.full_like(best, -1)  # the gt whose best box this is, by `low_quality`
    x1, y1, x2, y2 = boxes.unsqueeze(-3).unbind(-1)  # [..., 1, N]
    area = (x2 - x1) * (y2 - y1)
    chunk = max(1, 2**24 // max(1, N * math.prod(batch)))  # of gts: 64 MiB a matrix
    for g in range(0, G, chunk):
        gx1, gy1, gx2, gy2 = gt_boxes[..., g : g + chunk, None, :].unbind(-1)  # [..., g, 1]
        inter = torch.minimum(x2, gx2).sub_(torch.maximum(x1, gx1)).clamp_(min=0)
        inter *= torch.minimum(y2, gy2).sub_(torch.maximum(y1, gy1)).clamp_(min=0)
        gt_area = (gx2 - gx1) * (gy2 - gy1)
        if gt_ignore is not None:
            inside = inter >= 0.5 * area.clamp(min=1e-6)  # choice: half of the box
            in_ignored |= (inside & gt_ignore[..., g : g + chunk, None]).any(-2)
        iou = inter / (area + gt_area - inter).clamp_(min=1e-6)  # [..., g, N]
        if gt_valid is not None:
            iou.masked_fill_(~gt_valid[..., g : g + chunk, None], -1)
        value, index = iou.max(-2)
        better = value > best_iou
        best_iou = torch.where(better, value, best_iou)
        best = torch.where(better, index + g, best)
        if low_quality is not None:
            top = iou.amax(-1, keepdim=True)
            claims = (iou == top) & (top > 0) & (top >= low_quality)
            order = torch.arange(1, iou.shape[-2] + 1, device=iou.device)[:, None]
            last = (claims * order).amax(-2) - 1  # -1: no gt of this chunk claims the box
            claimed_by = torch.where(last >= 0, last + g, claimed_by)
    labels = torch.full_like(best, -1)
    labels[(best_iou < low) & ~in_ignored] = 0
    labels[(best_iou >= high) | (claimed_by >= 0)] = 1
    return labels, torch.where(claimed_by >= 0, claimed_by, best), best_iou


def sample_one_image(labels: Tensor, num: int, positive_fraction: float) -> Tensor:
    """`sample` in readable form: boxes of one image, positives first. Tests hold them equal.

    labels [N] (1, 0, -1) -> index [at most num].

    >>> sample_one_image(torch.tensor([0, 1, -1]), num=2, positive_fraction=0.5)
    tensor([1, 0])
    """
    positives = (labels == 1).nonzero()[:, 0]
    negatives = (labels == 0).nonzero()[:, 0]
    positives = positives[torch.randperm(len(positives))][: int(num * positive_fraction)]
    negatives = negatives[torch.randperm(len(negatives))][: num - len(positives)]
    return torch.cat([positives, negatives])


@torch.no_grad()
def sample(labels: Tensor, num: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
    """Draw up to `num` boxes of each image, at most `positive_fraction` of them positive.

    labels [B, N] (1, 0, -1) -> index [B, M], valid [B, M]; positives come first in a row.
    Shapes are fixed, so the host never waits for the number of positives: M slots hold the
    most positives and the most negatives that may be drawn, M = num * (1 + positive_fraction),
    and `valid` says which slots are used. `sample_one_image` is the plain form.
    """
    N, most = labels.shape[1], int(num * positive_fraction)
    key = torch.rand(labels.shape, device=labels.device)
    pos, pos_index = torch.where(labels == 1, key, -1.0).topk(min(most, N), dim=1)
    neg, neg_index = torch.where(labels == 0, key, -1.0).topk(min(num, N), dim=1)
    pos_valid = pos >= 0
    room = num - pos_valid.sum(1, keepdim=True)
    neg_valid = (neg >= 0) & (torch.arange(neg.shape[1], device=neg.device) < room)
    return torch.cat([pos_index, neg_index], 1), torch.cat([pos_valid, neg_valid], 1)


def shared_count(count: Tensor, least: float = 1.0) -> Tensor:
    """The number by which a process divides its summed losses, from its own count.

    DDP averages the processes' gradients. To give the gradient that one process would have for
    all images, each process divides by total count / number of processes, however unevenly the
    counts are spread. The total is at least `least`.
    """
    count = count.detach().float().clone()
    if not dist.is_initialized():
        return count.clamp(min=least)
    dist.all_reduce(count)
    return count.clamp(min=least) / dist.get_world_size()


def shared_rows(x: Tensor) -> Tensor:
    """`shared_count` of the rows of x."""
    return shared_count(torch.full((), float(len(x)), device=x.device))


# ------------------------------------------------------------------------------ anchors


def make_anchors(shapes, strides, scales, ratios, device=None) -> Tensor:
    """Anchors [sum(H*W*A), 4] over maps of shapes (H, W), level by level, cells row by row.

    Anchors are centred on the cells and not rounded. Their sides are scale * stride, their
    ratios h / w. A cell's A anchors run over the ratios, and for each ratio over the scales.

    >>> make_anchors([(1, 2)], strides=[8], scales=[2], ratios=[1])
    tensor([[-4., -4., 12., 12.],
            [ 4., -4., 20., 12.]])
    """
    ratio = constant(ratios, device).sqrt()[:, None]
    scale = constant(scales, device)
    w, h = (scale / ratio).flatten() / 2, (scale * ratio).flatten() / 2  # [A] in strides
    base = torch.stack([-w, -h, w, h], 1)
    levels = []
    for (H, W), stride in zip(shapes, strides):
        rows = torch.arange(H, device=device) + 0.5
        columns = torch.arange(W, device=device) + 0.5
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        centre = torch.stack([x, y, x, y], -1)  # [H, W, 4]
        levels.append(((centre[:, :, None] + base) * stride).reshape(-1, 4))
    return torch.cat(levels)


def flatten_levels(maps: list[Tensor], width: int) -> Tensor:
    """L maps [B, A*width, H, W] -> [B, sum(H*W*A), width], in the order of `make_anchors`."""
    flat = [m.permute(0, 2, 3, 1).reshape(m.shape[0], -1, width) for m in maps]
    return torch.cat(flat, 1)


def inside_image(anchors: Tensor, sizes: Tensor) -> Tensor:
    """Whether each anchor's centre lies in the image, not in the padding: [B, N]."""
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    return (centre < sizes.flip(-1)[:, None]).all(-1)


# ------------------------------------------------------------------------------ batches

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # those of torchvision's weights


def padded_size(image: Tensor) -> tuple[int, ...]:
    """The size (H, W), multiples of 32, to which an image [3, h, w] is padded on its own."""
    return tuple((side + 31) // 32 * 32 for side in image.shape[1:])


def check_image(image) -> None:
    """Raise BadInput unless it is uint8 [3, h, w]: floats in 0..1 would look black."""
    if not isinstance(image, Tensor) or image.dtype != torch.uint8:
        kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise BadInput(f"images are uint8 tensors, not yet normalised; this one is {kind}")
    if image.ndim != 3 or len(image) != 3 or not image.numel():
        raise BadInput(f"images are [3, h, w], RGB; this one is {list(image.shape)}")


def pad_images(images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """uint8 images [3, h, w] -> a normalised, zero-padded batch [B, 3, H, W], sizes [B, 2]."""
    for image in images:
        check_image(image)
    H, W = map(max, zip(*(padded_size(i) for i in images)))
    mean, std = (constant(v, images[0].device)[:, None, None] for v in (MEAN, STD))
    padded = []
    for image in images:
        below, right = H - image.shape[1], W - image.shape[2]
        padded.append(F.pad((image.float() / 255 - mean) / std, (0, right, 0, below)))
    batch = torch.stack(padded).contiguous(memory_format=torch.channels_last)
    return batch, constant([i.shape[1:] for i in images], batch.device)


def pad_targets(targets: list[dict]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Targets -> boxes [B, G, 4], labels [B, G], valid [B, G], ignore [B, G]; G at least 1.

    `valid` marks objects to detect, `ignore` crowds and difficult objects; padding is neither.
    """
    boxes = pad_sequence([F.pad(t["boxes"], (0, 0, 0, 1)) for t in targets], batch_first=True)
    labels = pad_sequence([F.pad(t["labels"], (0, 1)) for t in targets], batch_first=True)
    valid = pad_sequence([F.pad(~t["ignore"], (0, 1)) for t in targets], batch_first=True)
    ignore = pad_sequence([F.pad(t["ignore"], (0, 1)) for t in targets], batch_first=True)
    return boxes, labels, valid, ignore


# ------------------------------------------------------------------------------ backbone


class ConvP6P7(ExtraFPNBlock):
    """RetinaNet's extra levels: P6 is a stride-2 convolution of C5 (GFL: of P5), P7 one of P6.

    No ReLU lies between them: the released models were trained so (torchvision has one).
    """

    def __init__(self, in_channels: int, out_channels: int, on_p5: bool = False):
        super().__init__()
        self.on_p5 = on_p5
        first = out_channels if on_p5 else in_channels
        self.p6 = nn.Conv2d(first, out_channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        for conv in (self.p6, self.p7):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.constant_(conv.bias, 0)

    def forward(self, results, x, names):
        p6 = self.p6((results if self.on_p5 else x)[-1])
        return results + [p6, self.p7(p6)], names + ["p6", "p7"]


class FixedBatchNorm2d(FrozenBatchNorm2d):
    """BatchNorm with fixed statistics. Weight and bias are fixed too, unless `trained`."""

    def __init__(self, channels: int, trained: bool = False):
        super().__init__(channels)
        for name in ("weight", "bias") if trained else ():
            setattr(self, name, nn.Parameter(self._buffers.pop(name)))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, self.weight, self.bias, training=False, eps=self.eps)


class GroupNorm(nn.GroupNorm):
    """GroupNorm that takes groups of a single value too, which torch's refuses."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def make_norm(kind: str):
    """channels -> a normalisation layer: frozen_bn, eval_bn, bn or gn (32 groups)."""
    if kind == "gn":
        return lambda channels: GroupNorm(math.gcd(32, channels), channels)
    if kind == "bn":
        return nn.BatchNorm2d
    return partial(FixedBatchNorm2d, trained=kind == "eval_bn")


def make_resnet(name: str, weights: str | None, norm_layer) -> ResNet:
    """torchvision's network; "small" is a ResNet-18 of one block a stage, half as wide."""
    if weights and name in ("small", "resnext101_32x4d"):
        raise ValueError("torchvision has no weights of it")
    if name == "resnext101_32x4d":
        layers = [3, 4, 23, 3]
        return ResNet(Bottleneck, layers, norm_layer=norm_layer, groups=32, width_per_group=4)
    if name != "small":
        return torchvision.models.get_model(name, weights=weights, norm_layer=norm_layer)
    net = ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=norm_layer)
    net.inplanes = 32
    net.conv1, net.bn1 = nn.Conv2d(3, 32, 7, 2, 3, bias=False), norm_layer(32)
    for i in range(4):
        setattr(net, f"layer{i + 1}", net._make_layer(BasicBlock, 32 * 2**i, 1, 2 if i else 1))
    net.fc = nn.Linear(256, 1000)
    return net


class ResNetFPN(nn.Module):
    """torchvision's ResNet or ResNeXt with a pyramid: [B, 3, H, W] -> 5 maps [B, C, h, w].

    extra "pool": P2..P6, strides 4..64; P6 is P5 subsampled. extra "conv": P3..P7, strides
    8..128; P6 is a convolution of C5. extra "conv_p5": the same, but P6 is one of P5.
    weights "imagenet", a file, or "random" (a checkpoint will fill them): the stem and the
    first stages are frozen, and norm "auto" is frozen BN. weights "none" (from scratch):
    nothing is frozen, and the norms "auto" and "eval_bn" are GroupNorm, in the pyramid too.
    Raises BadInput if the weights cannot be loaded.
    """

    def __init__(
        self,
        name: str = "resnet50",
        out_channels: int = 256,
        extra: str = "pool",
        weights: str = "imagenet",
        norm: str = "auto",
        frozen_stages: int = 2,
    ):
        super().__init__()
        scratch = weights == "none"
        if norm == "auto" or (norm == "eval_bn" and scratch):  # no statistics to keep
            norm = "gn" if scratch else "frozen_bn"
        known = "IMAGENET1K_V1" if weights == "imagenet" else None  # the papers'
        try:
            net = make_resnet(name, known, make_norm(norm))
            if weights not in ("imagenet", "none", "random"):
                state = torch.load(weights, map_location="cpu", weights_only=True)
                net.load_state_dict({**net.fc.state_dict(prefix="fc."), **state})  # fc: unused
        except Exception as e:  # downloads and files fail in many ways
            why = f"{name}, weights {weights}: {type(e).__name__}: {e}"
            if weights not in ("none", "random"):
                why += "\n--backbone-weights also takes a .pth file, or none: from scratch"
            raise BadInput(why) from e
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.stages = nn.ModuleList([net.layer1, net.layer2, net.layer3, net.layer4])
        self.frozen = 0 if scratch else frozen_stages
        for part in [self.stem, *self.stages][: self.frozen]:
            part.requires_grad_(False)
        channels = [net.fc.in_features // 2**i for i in (3, 2, 1, 0)]
        self.first = 0 if extra == "pool" else 1
        self.strides = tuple(2 ** (i + 2 + self.first) for i in range(5))
        last: ExtraFPNBlock = LastLevelMaxPool()
        if self.first:
            last = ConvP6P7(channels[-1], out_channels, extra == "conv_p5")
        own_norm = make_norm(norm) if scratch else None
        self.fpn = FeaturePyramidNetwork(channels[self.first :], out_channels, last, own_norm)
        if scratch:  # choice: coarse maps enter faintly, so that fine maps learn early
            for block in list(self.fpn.inner_blocks)[1:]:
                nn.init.constant_(block[1].weight, 0.2)
        self.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True):
        """Frozen stages keep their BN statistics too."""
        super().train(mode)
        for part in [self.stem, *self.stages][: self.frozen]:
            part.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        x, maps = self.stem(images), {}
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i >= self.first:
                maps[str(i)] = x
        return list(self.fpn(maps).values())
