"""What all detectors share below training: boxes, data, and the backbone.

Conventions, here and in every file:
    Boxes are float32 xyxy in pixels of the network's input image, continuous (width = x2 - x1).
    Sizes are (h, w). Dense offsets (l, t, r, b) are fractions of the proposal's width and height.
    Labels: foreground 0..K-1, background K, ignore -1. Data sets' category ids are mapped to labels
    once, at loading, and back when results are written.
    B images, R RoIs, G ground-truth boxes, K classes, A anchors per cell, L levels, C channels,
    S side of an RoI grid, N boxes entering an NMS.
    The network runs channels_last, in bf16 autocast on a GPU that has it; boxes stay float32.

`images` is a list of uint8 [3, h, w] tensors, resized but neither normalised nor padded.
A target is a dict: boxes [G, 4], labels [G], ignore [G] (bool: crowd or difficult), image_id, and
size (h, w) of the image as it is on disk; optionally masks (bool), of the image's size [G, h, w].
Detectors are given these as `MaskCrops`: [G, 112, 112], each over its object's box.

A data set of your own is any torch Dataset whose items are (image, target), plain tensors or
`make_target`'s, and that also has
    sizes [n, 2]: (h, w) of each image, known without opening it (array, or list of pairs),
    categories: dicts of id and name, in the order of the labels, which start at 0,
    coco(): if it is scored, its ground truth as a COCO dictionary.
Nothing else is asked of it. `engine.train` checks all of this before the first step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import DeformConv2d, FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool
from torchvision.transforms import v2

from formats import (
    MASK_SIDE,
    BadInput,
    check_coco,
    crop_bitmaps,
    crop_mask,
    encode_mask,
    find_uavdt,
    ignored,
    read_json,
    read_uavdt,
    read_voc,
    usable_mask,
)


class Range(NamedTuple):
    """What a setting may be, ends included; of a tuple, how many values it may have."""

    low: float
    high: float = math.inf


Natural = Annotated[int, Range(1, 2**31 - 1)]
Whole = Annotated[int, Range(0, 2**31 - 1)]
Amount = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Side = Annotated[int, Range(32, 2**31 - 1)]  # of an image, px
Sides = Annotated[tuple[Natural, ...], Range(1)]  # at least one, in px


@dataclass
class Config:
    """Settings of data and backbone. Defaults, here and below: what made the papers' numbers.

    A detector built from the defaults downloads ImageNet's weights; "none" and "random" do not.
    Lists, as JSON and checkpoints have them, become tuples: `Config(**state["config"])` is whole.
    """

    # Data
    data: str = "synthetic"  # folder in COCO, Pascal VOC or UAVDT layout, or "synthetic"
    train_json: str = ""  # COCO annotations to train on, given explicitly ...
    train_images: str = ""  # ... and their image folder
    val_json: str = ""  # COCO annotations to evaluate on ...
    val_images: str = ""  # ... and their image folder
    # VOC: ImageSets/Main/<split>.txt (default: trainval if test is tested); UAVDT: M_attr/<split>/
    train_split: str = ""
    val_split: str = ""  # VOC, UAVDT: split to evaluate on (default: test, VOC without one: val)
    num_train: Natural = 7000  # synthetic images per epoch
    num_val: Natural = 200  # synthetic images to evaluate on
    image_size: Side = 512  # synthetic images' side in px
    scales: Sides = (800,)  # training: shorter side in px, drawn from these
    test_scales: Sides = (800,)  # testing: detections of all of these are merged
    max_size: Side = 1333  # longer side in px, at most, at the largest scale; else in proportion
    flip: Share = 0.5  # probability of a horizontal flip in training
    seed: Whole = 0  # of weights, order, augmentation, sampling and synthetic images
    # Backbone
    backbone: str = "resnet50"  # resnet18/34/50/101, resnext101_32x4d/_32x8d/_64x4d, small
    backbone_weights: str = "imagenet"  # imagenet, none, random (to time), or torchvision's .pth
    dcn: Literal["none", "v1", "v2"] = "none"  # deformable 3x3 convolutions in C3 to C5; v2: masked
    norm: Literal["auto", "frozen_bn", "bn", "gn"] = "auto"  # auto: frozen_bn, or gn from scratch
    # stem and first stages kept fixed when starting from weights
    frozen_stages: Annotated[int, Range(0, 5)] = 2
    fpn_channels: Natural = 256  # width of the pyramid

    def __post_init__(self):
        """BadInput for a value that the field's type does not allow."""
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            if isinstance(value, list):
                value = tuple(value)
                setattr(self, name, value)
            wrong = misfit(value, hint)
            if wrong:
                shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
                raise BadInput(f"--{name.replace('_', '-')} {shown}: {wrong}")


def misfit(value, hint) -> str:
    """What a value lacks to be of a type; "" if it is.

    >>> misfit(2.0, Share), misfit((800, -1), Sides), misfit(float("nan"), float)
    ('at most 1', 'at least 1', 'not finite')
    """
    kind, (low, high) = hint, (-math.inf, math.inf)
    if get_origin(hint) is Annotated:
        kind, (low, high) = get_args(hint)[0], hint.__metadata__[0]
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return "" if value in choices else f"one of {', '.join(map(str, choices))}"
    size, unit = value, ""
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return "not a list"
        for each in value:
            if wrong := misfit(each, get_args(kind)[0]):
                return wrong
        size, unit = len(value), " values"
    elif type(value) is not kind and not (kind is float and type(value) is int):
        return f"not {kind.__name__}"
    elif kind not in (int, float):
        return ""
    elif not math.isfinite(value):
        return "not finite"
    if size < low:
        return f"at least {low:g}{unit}"
    return f"at most {high:g}{unit}" if size > high else ""


# ------------------------------------------------------------------------------ boxes


DELTA_CLAMP = math.log(1000 / 16)  # largest |dw|, |dh| before exp


def constant(values, device) -> Tensor:
    """A small float tensor on a device; torch.tensor(values, device=) would wait for a GPU."""
    return torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)


def encode_boxes(boxes: Tensor, gt_boxes: Tensor, stds=(1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Deltas (dx, dy, dw, dh) that move `boxes` onto `gt_boxes`; both [..., 4].

    Inverse of `decode_boxes`. Degenerate boxes give finite numbers (sizes are clamped at 1e-6).

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
    """Boxes [..., 4] moved by deltas (dx, dy, dw, dh) [..., 4]; float32 whatever deltas' dtype."""
    deltas = deltas.float() * constant(stds, deltas.device)
    size = boxes[..., 2:] - boxes[..., :2]
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2 + deltas[..., :2] * size
    half = size * deltas[..., 2:].clamp(-DELTA_CLAMP, DELTA_CLAMP).exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes [..., 4] cut to images of sizes [..., 2] (h, w), which broadcast over the boxes."""
    limit = sizes.flip(-1).repeat_interleave(2, -1)[..., [0, 2, 1, 3]]  # (w, h, w, h)
    return torch.minimum(boxes.clamp(min=0), limit)


def aligned_iou(boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    """IoU [...] of boxes and gt_boxes [..., 4], pair by pair (they broadcast); differentiable.

    >>> aligned_iou(torch.tensor([0., 0., 10., 10.]), torch.tensor([5., 0., 15., 10.])) * 3
    tensor(1.)
    """
    corner = torch.maximum(boxes[..., :2], gt_boxes[..., :2])
    other = torch.minimum(boxes[..., 2:], gt_boxes[..., 2:])
    w, h = (other - corner).clamp(min=0).unbind(-1)  # prod's backward would wait for the GPU
    (bw, bh), (gw, gh) = ((b[..., 2:] - b[..., :2]).unbind(-1) for b in (boxes, gt_boxes))
    return w * h / (bw * bh + gw * gh - w * h).clamp(min=1e-6)


def xywh_to_xyxy(boxes) -> Tensor:
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return torchvision.ops.box_convert(boxes, "xywh", "xyxy")


def _overlaps(boxes: Tensor, gt_boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Intersections [..., G, N] and both areas of boxes [..., N, 4] and gt_boxes [..., G, 4]."""
    x1, y1, x2, y2 = boxes.unsqueeze(-3).unbind(-1)  # [..., 1, N]
    gx1, gy1, gx2, gy2 = gt_boxes.unsqueeze(-2).unbind(-1)  # [..., G, 1]
    inter = torch.minimum(x2, gx2).sub_(torch.maximum(x1, gx1)).clamp_(min=0)
    inter *= torch.minimum(y2, gy2).sub_(torch.maximum(y1, gy1)).clamp_(min=0)
    return inter, (x2 - x1) * (y2 - y1), (gx2 - gx1) * (gy2 - gy1)


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
    """Assign each box to the ground truth it overlaps most.

    boxes [..., N, 4], gt_boxes [..., G, 4] (leading dimensions broadcast), gt_valid and gt_ignore
    [..., G] bool -> labels [..., N] (1: IoU >= high, 0: IoU < low, -1: between), gt index [..., N],
    the box's best IoU with any gt [..., N]. Only valid gts are assigned. A box of which at least
    half lies in an ignored gt (crowd, difficult) is -1 instead of 0. With `low_quality`, a gt's
    best boxes are positive for it whatever `high` says, if their IoU is above 0 and at least
    `low_quality`; of two gts that want one box the later gets it. Runs over gts in chunks: memory
    stays bounded.
    """
    N, G = boxes.shape[-2], gt_boxes.shape[-2]
    lead = torch.broadcast_shapes(boxes.shape[:-2], gt_boxes.shape[:-2])
    gt_valid = torch.ones_like(gt_boxes[..., 0], dtype=torch.bool) if gt_valid is None else gt_valid
    best_iou = boxes.new_zeros(*lead, N)
    best = torch.zeros(*lead, N, dtype=torch.long, device=boxes.device)
    forced, covered = torch.full_like(best, -1), torch.zeros_like(best, dtype=torch.bool)
    chunk = max(1, 2**24 // max(1, N * math.prod(lead)))  # 64 MiB a matrix
    for g in range(0, G, chunk):
        inter, area, gt_area = _overlaps(boxes, gt_boxes[..., g : g + chunk, :])
        if gt_ignore is not None:
            inside = inter >= 0.5 * area.clamp(min=1e-6)  # choice: half of the box, as for crowds
            covered |= (inside & gt_ignore[..., g : g + chunk, None]).any(-2)
        iou = inter / (area + gt_area - inter).clamp_(min=1e-6)  # [..., g, N]
        iou.masked_fill_(~gt_valid[..., g : g + chunk, None], -1)
        value, index = iou.max(-2)
        better = value > best_iou
        best_iou, best = torch.where(better, value, best_iou), torch.where(better, index + g, best)
        if low_quality is not None:
            top = iou.amax(-1, keepdim=True)
            wants = (iou == top) & (top > 0) & (top >= low_quality)
            order = torch.arange(1, iou.shape[-2] + 1, device=iou.device)[:, None]
            last = (wants * order).amax(-2) - 1  # -1: no gt of this chunk wants the box
            forced = torch.where(last >= 0, last + g, forced)
    labels = torch.full_like(best, -1)
    labels[best_iou < low] = 0
    labels[best_iou >= high] = 1
    labels[(labels == 0) & covered] = -1
    labels[forced >= 0] = 1
    return labels, torch.where(forced >= 0, forced, best), best_iou


@torch.no_grad()
def sample(labels: Tensor, num: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
    """Draw up to `num` boxes per image, at most that fraction of them positive, without a sync.

    labels [B, N] (1, 0, -1) -> index [B, M], valid [B, M]; positives come first in a row.
    Negatives fill what positives leave free, so M = num * (1 + positive_fraction) slots.
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
    """What to divide a loss by: this process's share of a count over all, itself at least `least`.

    Dividing each process's sum by it makes DDP's mean gradient that of one process with all images.
    """
    count = count.detach().float().clone()
    if dist.is_initialized():
        dist.all_reduce(count)
    return count.clamp(min=least) / (dist.get_world_size() if dist.is_initialized() else 1)


def shared_rows(x: Tensor) -> Tensor:
    """`shared_count` of the rows of x."""
    return shared_count(torch.full((), float(len(x)), device=x.device))


def make_anchors(shapes, strides, scales, ratios, device=None) -> Tensor:
    """Anchors [sum(H*W*A), 4] over maps of those (H, W), level by level, cells row by row.

    Centred on the cells, not rounded; sides scale * stride; ratio is h / w; A runs over ratios, in
    each over scales.
    """
    ratio = constant(ratios, device).sqrt()[:, None]
    scale = constant(scales, device)
    w, h = (scale / ratio).flatten() / 2, (scale * ratio).flatten() / 2  # [A] in strides
    base = torch.stack([-w, -h, w, h], 1)
    levels = []
    for (H, W), stride in zip(shapes, strides):
        y, x = torch.meshgrid(
            torch.arange(H, device=device) + 0.5,
            torch.arange(W, device=device) + 0.5,
            indexing="ij",
        )
        centre = torch.stack([x, y, x, y], -1)  # [H, W, 4]
        levels.append(((centre[:, :, None] + base) * stride).reshape(-1, 4))
    return torch.cat(levels)


def flatten_levels(maps: list[Tensor], width: int) -> Tensor:
    """L maps [B, A*width, H, W] -> [B, sum(H*W*A), width], in the order of `make_anchors`."""
    flat = [m.permute(0, 2, 3, 1).reshape(m.shape[0], -1, width) for m in maps]
    return torch.cat(flat, 1)


def inside_image(anchors: Tensor, sizes: Tensor) -> Tensor:
    """[B, N]: is the anchor's centre in the image, not in the padding of the batch?"""
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    return (centre < sizes.flip(-1)[:, None]).all(-1)


# ------------------------------------------------------------------------------ synthetic data


SHAPES = {  # u, v in [-1, 1] after rotation; r() and a() their polar form -> inside?
    "disc": lambda u, v, r, a: r() < 1,
    "ellipse": lambda u, v, r, a: u**2 + (v / 0.45) ** 2 < 1,
    "ring": lambda u, v, r, a: (r() < 1) & (r() > 0.62),
    "arc": lambda u, v, r, a: (r() < 1) & (r() > 0.55) & (np.abs(a()) > 0.9),
    "bar": lambda u, v, r, a: (np.abs(u) < 1) & (np.abs(v) < 0.17),
    "cross": lambda u, v, r, a: (np.minimum(np.abs(u), np.abs(v)) < 0.24) & (r() < 1),
    "triangle": lambda u, v, r, a: (v < 0.5) & (v > 1.73 * np.abs(u) - 1),
    "star": lambda u, v, r, a: r() < 0.42 + 0.58 * np.abs(a() * 5 / (2 * np.pi) % 1 * 2 - 1) ** 1.3,
    "crescent": lambda u, v, r, a: (r() < 1) & ((u - 0.5) ** 2 + v**2 > 0.66),
    "frame": lambda u, v, r, a: (
        (np.maximum(np.abs(u), np.abs(v)) < 0.75) & (np.maximum(np.abs(u), np.abs(v)) > 0.42)
    ),
}


class SyntheticDetection(Dataset):
    """Textured shapes on textured ground, made on the fly from (seed, index): a laboratory.

    Ten classes of shape, colour says nothing. Sizes are log-uniform over COCO's small, medium and
    large thirds (32/3 to 288 px, as far as the image is that large). Objects occlude each other
    (at least half stays visible), a third has a twin right beside it, and unlabelled fragments of
    shapes lie around. Boxes and masks are those of the visible part; `visible` [G] is its share.
    """

    def __init__(self, num_images: int = 2000, size: int = 128, seed: int = 0, masks: bool = False):
        self.size, self.seed, self.masks = size, seed, masks
        self.categories = [{"id": i + 1, "name": name} for i, name in enumerate(SHAPES)]
        self.image_ids = list(range(num_images))
        self.sizes = np.full((num_images, 2), size)
        axis = (np.arange(size, dtype=np.float32) + 0.5) / size
        knots = np.arange(7, dtype=np.float32) / 6
        self._blend = np.clip(1 - 6 * np.abs(axis[:, None] - knots), 0, None)  # [size, 7] linear

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int):
        if not 0 <= index < len(self):
            raise IndexError(index)
        rng = np.random.default_rng((self.seed, index))
        smooth = rng.random((3, 7, 7), dtype=np.float32)  # coarse random colours, blended linearly
        image = self._blend @ smooth @ self._blend.T  # [3, size, size]
        image += self._stripes(rng, 0, 0, self.size, self.size) * rng.uniform(0, 0.15)
        owner = np.full((self.size, self.size), -1, np.int64)  # which object shows at a pixel
        objects = labels, area, shown = [], [], []  # area: pixels in all; shown: not occluded
        for _ in range(rng.integers(3)):  # fragments of shapes under and between the objects
            self._paint(rng, image, owner, objects)
        for _ in range(rng.integers(1, 7) if rng.random() > 0.03 else 0):
            pose = self._pose(rng)
            if self._paint(rng, image, owner, objects, pose) and rng.random() < 1 / 3:
                turn = rng.uniform(0, 2 * np.pi)  # a twin: same shape, size, angle, right beside it
                step = pose["radius"] * rng.uniform(1.7, 2.2)
                pose["x"] += step * np.cos(turn)
                pose["y"] += step * np.sin(turn)
                self._paint(rng, image, owner, objects, pose)
            if rng.random() < 0.3:
                self._paint(rng, image, owner, objects)
        image += rng.normal(0, rng.uniform(0.01, 0.06), image.shape).astype(np.float32)
        image = torch.from_numpy((image.clip(0, 1) * 255).astype(np.uint8))
        return image, self._target(index, owner, np.array(area, np.float32), labels)

    def _pose(self, rng) -> dict:
        low, high = 32 / 3, min(288, 0.9 * self.size)
        return {
            "label": int(rng.integers(len(SHAPES))),
            "radius": math.exp(rng.uniform(math.log(low), math.log(max(low, high)))) / 2,
            "angle": rng.uniform(0, 2 * np.pi),
            "x": rng.uniform(0.05, 0.95) * self.size,
            "y": rng.uniform(0.05, 0.95) * self.size,
            "shift": rng.uniform(0.25, 0.75, (3, 1, 1)).astype(np.float32),
        }

    @staticmethod
    def _stripes(rng, y0, x0, h, w) -> np.ndarray:
        """A plane wave or the product of two, of random period, on that window: [h, w]."""
        turn, period = rng.uniform(0, np.pi), rng.uniform(5, 24)
        y = np.arange(y0, y0 + h, dtype=np.float32)[:, None] * (2 * np.pi / period)
        x = np.arange(x0, x0 + w, dtype=np.float32)[None] * (2 * np.pi / period)
        if rng.random() < 0.5:
            return np.sin(np.cos(turn) * x + np.sin(turn) * y)
        return np.sin(x + turn) * np.sin(y)

    def _paint(self, rng, image, owner, objects, pose=None) -> bool:
        """Draw it (a fragment without a pose) if no earlier object loses over half; say if so."""
        labels, area, shown = objects
        fragment, pose = pose is None, pose or self._pose(rng)
        x0, y0 = int(pose["x"] - pose["radius"]), int(pose["y"] - pose["radius"])
        side = np.arange(2 * pose["radius"] + 2, dtype=np.float32) + 0.5
        x = ((side + x0 - pose["x"]) / pose["radius"])[None]
        y = ((side + y0 - pose["y"]) / pose["radius"])[:, None]
        cos, sin = np.cos(pose["angle"]), np.sin(pose["angle"])
        u, v = cos * x + sin * y, cos * y - sin * x
        r, a = (lambda: np.hypot(u, v)), (lambda: np.arctan2(v, u))
        shape = list(SHAPES.values())[pose["label"]](u, v, r, a)
        if fragment:  # a slice of the shape, narrower than half of it
            cut = rng.uniform(-0.6, 0.3)
            shape &= (u > cut) & (u < cut + rng.uniform(0.2, 0.5))
        x1, y1 = x0 + len(side), y0 + len(side)
        if min(x1, y1) <= 0 or max(x0, y0) >= self.size:
            return False  # a twin outside the image
        inside = shape[max(0, -y0) : self.size - y0, max(0, -x0) : self.size - x0]
        x0, y0 = max(0, x0), max(0, y0)
        under = owner[y0:y1, x0:x1]
        left = np.array(shown) - np.bincount(under[inside] + 1, minlength=len(area) + 1)[1:]
        if (left < 0.5 * np.array(area)).any():
            return False  # an earlier object would lose too much
        if not fragment and inside.sum() < max(12, 0.5 * shape.sum()):
            return False  # hardly a pixel, or mostly outside the image
        window = image[:, y0:y1, x0:x1]
        # In each channel at least a quarter of the range away from what is there.
        colour = (window.mean((1, 2), keepdims=True) + pose["shift"]) % 1
        texture = self._stripes(rng, y0, x0, *under.shape) * rng.uniform(0, 0.15)
        np.copyto(window, colour + texture, where=inside)
        under[inside] = -1 if fragment else len(area)
        shown[:] = left
        if not fragment:
            labels.append(pose["label"])
            area.append(int(shape.sum()))
            shown.append(int(inside.sum()))
        return True

    def _target(self, index, owner, area, labels) -> dict:
        masks = owner == np.arange(len(labels))[:, None, None]  # [G, size, size]
        columns, rows = masks.any(1), masks.any(2)
        first = [columns.argmax(1), rows.argmax(1)]
        last = [self.size - m[:, ::-1].argmax(1) for m in (columns, rows)]
        boxes = torch.from_numpy(np.stack(first + last, 1)).float().reshape(-1, 4)
        target = make_target(boxes, labels, [False] * len(labels), index, (self.size, self.size))
        target["visible"] = torch.from_numpy(masks.sum((1, 2)) / np.maximum(area, 1)).float()
        if self.masks:
            target["masks"] = torch.from_numpy(masks)
        return target

    def coco(self) -> dict:
        """The ground truth as a COCO dictionary, with masks if they are made."""
        images, annotations = [], []
        for index in range(len(self)):
            target = self[index][1]
            images.append({"id": index, "height": self.size, "width": self.size})
            objects = zip(target["boxes"].tolist(), target["labels"].tolist())
            for i, ((x1, y1, x2, y2), label) in enumerate(objects):
                box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
                if self.masks:  # as in COCO, the area is the mask's
                    mask = target["masks"][i]
                    box |= {"segmentation": encode_mask(mask), "area": mask.sum().item()}
                ids = {"id": len(annotations) + 1, "image_id": index, "category_id": label + 1}
                annotations.append({**box, **ids, "iscrowd": 0})
        return {"images": images, "annotations": annotations, "categories": self.categories}


def make_target(boxes, labels, ignore, image_id, size) -> dict:
    """A target dict in the form described at the top of this file, ready for v2 transforms."""
    return {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(size)),
        "labels": torch.as_tensor(labels, dtype=torch.long),
        "ignore": torch.as_tensor(ignore, dtype=torch.bool),
        "image_id": image_id,
        "size": tuple(size),
    }


# ------------------------------------------------------------------------------ real data


class FolderDetection(Dataset):
    """Image files with COCO annotations (others become these); the annotations are checked.

    A file without "annotations", as of COCO's test sets, is a set in which nothing can be scored.
    Boxes that are broken (not finite, of zero or negative size, outside the image) are dropped and
    counted; everything else that is wrong raises BadInput with the file and the reason. The boxes
    are kept as flat arrays: loader processes share them instead of copying a million objects.
    With `masks` each object that is not ignored needs one, or is dropped too; they are kept as one
    array of text. One whose mask covers nothing of its box is ignored.
    """

    def __init__(self, source: Path, image_dir: Path, read=None, categories=None, masks=False):
        self.masks = masks
        self.source, self.image_dir, self._read = Path(source), Path(image_dir), read or read_json
        self.note = ""  # what was dropped, for whoever runs to say
        coco = self._read(self.source, categories)
        try:
            check_coco(coco, masks)
        except ValueError as e:
            raise BadInput(f"{source}: {e}") from e
        found = [{"id": c["id"], "name": c["name"]} for c in coco["categories"]]
        self.categories = sorted(found, key=lambda c: c["id"])
        self.image_ids = [image["id"] for image in coco["images"]]
        sizes = [(image["height"], image["width"]) for image in coco["images"]]
        self.sizes = np.array(sizes).reshape(-1, 2)
        self.files = np.array([str(self.image_dir / i["file_name"]) for i in coco["images"]])
        self._flatten(coco.get("annotations", []))  # a test set has none
        if categories is not None and categories != self.categories:
            both = self.categories + categories
            odd = [c for c in both if both.count(c) == 1][:5]
            raise BadInput(f"{source}: unknown or missing category beside the model's: {odd}")

    def _flatten(self, annotations: list[dict]) -> None:
        row = {image_id: i for i, image_id in enumerate(self.image_ids)}
        label = {c["id"]: i for i, c in enumerate(self.categories)}
        rows = np.array([row[a["image_id"]] for a in annotations], np.int64)
        boxes = np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        limit = self.sizes[rows][:, [1, 0, 1, 0]]
        whole = np.isfinite(boxes).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        boxes = np.clip(np.nan_to_num(boxes), 0, limit)  # annotators reach a little over the border
        whole &= (boxes[:, 2:] > boxes[:, :2]).all(1)
        if self.masks:
            segmentations = [usable_mask(a, box) for a, box in zip(annotations, boxes)]
            whole &= [s is not None for s in segmentations]
            pairs = zip((a.get("segmentation") for a in annotations), segmentations)
            cut = sum(isinstance(p, list) and bool(s) and p != s for p, s in pairs)
            self.note = f"{self.source}: {cut} masks lack a polygon that is broken. " * (cut > 0)
        self.dropped = np.flatnonzero(~whole).tolist()  # positions: ids may be missing or double
        if self.dropped:
            some = ", ".join(str(annotations[i].get("id", f"no. {i}")) for i in self.dropped[:10])
            self.note += (
                f"{self.source}: dropped {len(self.dropped)} of {len(whole)} boxes (not finite, no "
                f"area or outside the image{', or no mask in it' * self.masks}): annotations {some}"
            )
        order = np.flatnonzero(whole)[np.argsort(rows[whole], kind="stable")]
        self._boxes = torch.from_numpy(boxes[order]).float()
        self._labels = torch.tensor([label[a["category_id"]] for a in annotations]).long()[order]
        self._ignore = torch.tensor([*map(ignored, annotations)], dtype=torch.bool)[order]
        self._first = np.searchsorted(rows[order], np.arange(len(self.image_ids) + 1))
        texts = [json.dumps(segmentations[i]).encode() for i in order] if self.masks else []
        self._texts = np.frombuffer(b"".join(texts), np.uint8)
        self._text_ends = np.cumsum([0, *map(len, texts)])

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int):
        part = slice(self._first[index], self._first[index + 1])
        parts = (values[part] for values in (self._boxes, self._labels, self._ignore))
        target = make_target(*parts, self.image_ids[index], self.sizes[index].tolist())
        if self.masks:
            crops = [crop_mask(self._mask(i), self._boxes[i]) for i in range(part.start, part.stop)]
            crops = torch.stack(crops) if crops else torch.zeros(0, MASK_SIDE, MASK_SIDE).bool()
            target["masks"] = crops.as_subclass(MaskCrops)
            target["ignore"] = target["ignore"] | ~crops.flatten(1).any(1)  # it misses its box
        return read_image(self.files[index]), target

    def _mask(self, i: int):
        """The segmentation of the i-th box kept."""
        return json.loads(self._texts[self._text_ends[i] : self._text_ends[i + 1]].tobytes())

    def fingerprint(self) -> str:
        """The same for the same images and boxes: a run is not continued on others."""
        parts = self.image_ids, self.categories, self.sizes.tolist(), self._first.tolist()
        digest = hashlib.sha256(repr(parts).encode() + self._texts.tobytes())
        for values in (self._boxes, self._labels, self._ignore):
            digest.update(values.numpy().tobytes())
        return digest.hexdigest()

    def coco(self) -> dict:
        """The ground truth as a COCO dictionary, read again, without the boxes dropped here."""
        coco, dropped = self._read(self.source, self.categories), set(self.dropped)
        kept = [a for i, a in enumerate(coco.get("annotations", [])) if i not in dropped]
        if self.masks:  # pycocotools takes a polygon of two points for a box
            kept = [{**a, "segmentation": usable_mask(a)} for a in kept]
        return {**coco, "annotations": kept}


# What PIL may open: it knows more formats, and some of them start other programs.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")


@contextlib.contextmanager
def opened(path: str | Path):
    """The PIL image in a file, not decoded yet; whatever goes wrong with it is BadInput."""
    try:
        if not Path(path).is_file():  # to open a pipe would wait for ever
            raise OSError("not a file" if Path(path).exists() else "no such file")
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except BadInput:
        raise
    except Exception as e:  # a decoder may raise anything, even RecursionError
        why = str(e) or type(e).__name__
        if isinstance(e, UnidentifiedImageError):
            why = f"it is none of {', '.join(FORMATS)}"
        raise BadInput(f"{path}: cannot read the image: {why}") from e


def read_image(path: str | Path, upright: bool = False) -> Tensor:
    """uint8 RGB [3, h, w]; raises BadInput naming a missing, truncated, foreign or 16-bit file.

    `upright` turns a photo as its EXIF data say. Not for training: COCO annotates raw pixels.
    """
    with opened(path) as image:
        if upright:
            with contextlib.suppress(Exception):  # broken EXIF data turn nothing
                image = ImageOps.exif_transpose(image)
        return rgb_tensor(image)


def rgb_tensor(image: Image.Image) -> Tensor:
    """uint8 RGB [3, h, w] of a PIL image of 8 bits."""
    if image.mode[0] in "IF":  # PIL would clip these to black and white
        raise ValueError(f"its pixels ({image.mode}) are not of 8 bits, convert it first")
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def load_data(config: Config, train: bool = True, val: bool = True, categories=None):
    """(training set, validation set) of config.data; None for one that is not asked for.

    Synthetic, COCO (annotations/instances_*2017.json or explicit paths), VOC (JPEGImages/, also
    VOC2007/ and VOC2012/ below: both train, the first one tests) or UAVDT (`find_uavdt`). The
    training set's categories, or those given (a checkpoint's), are the ones that the validation set
    must have. With masks, if the config has a field of that name and it is set. Raises BadInput,
    also for a set without images and a training set without boxes.
    """
    masks = getattr(config, "masks", False)
    explicit = config.train_json or config.val_json
    if not explicit and (config.train_images or config.val_images):
        raise BadInput("--train-images and --val-images go with --train-json and --val-json")
    if config.data == "synthetic" and not explicit:
        make = SyntheticDetection
        return (
            make(config.num_train, config.image_size, config.seed, masks) if train else None,
            # choice: a seed of its own, so that no --seed ever trains on validation images
            make(config.num_val, config.image_size, 2**31, masks) if val else None,
        )
    root = Path(config.data)
    places = root, root / "VOC2007", root / "VOC2012"
    roots = [place for place in places if (place / "JPEGImages").is_dir()]
    if explicit:
        paths = {"train": config.train_json, "val": config.val_json}
        folders = {"train": config.train_images, "val": config.val_images}
        for split in ("train", "val"):
            if (train, val)[split == "val"] and not (paths[split] and folders[split]):
                both = f"--{split}-json and --{split}-images are needed together"
                raise BadInput(f"{both} (with explicit paths, --data is not used)")
        read = read_json
    elif (root / "annotations").is_dir():
        paths = {s: root / "annotations" / f"instances_{s}2017.json" for s in ("train", "val")}
        folders = {s: root / "images" / f"{s}2017" for s in ("train", "val")}
        folders = {s: f if f.is_dir() else root / f"{s}2017" for s, f in folders.items()}
        read = read_json
    elif roots:
        lists = lambda r, split: r / "ImageSets" / "Main" / f"{split}.txt"  # noqa: E731
        tests = config.val_split or ("test" if lists(roots[0], "test").exists() else "val")
        whole = tests == "test" and lists(roots[0], "trainval").exists()  # else val would train
        trains = config.train_split or ("trainval" if whole else "train")
        train_lists = os.pathsep.join(str(lists(r, trains)) for r in roots)
        paths = {"train": train_lists, "val": str(lists(roots[0], tests))}
        folders, read = {"train": "", "val": ""}, read_voc
    elif uavdt := find_uavdt(root):
        frames, truth, attributes = uavdt
        splits = {"train": config.train_split or "train", "val": config.val_split or "test"}
        paths = {s: attributes / split for s, split in splits.items()}
        folders, read = dict.fromkeys(paths, frames), partial(read_uavdt, frames, truth)
    else:
        looked = "annotations/instances_*2017.json (COCO) nor JPEGImages/ (VOC) nor M_attr/ (UAVDT)"
        raise BadInput(f"{root}: no data found: neither {looked} in that folder")

    def load(split: str, known):
        data = FolderDetection(paths[split], folders[split], read, known, masks)
        if not len(data):
            raise BadInput(f"{paths[split]}: no images")
        if split == "train" and not len(data._boxes):
            raise BadInput(f"{paths[split]}: no annotated boxes to train on")
        return data

    train_data = load("train", categories) if train else None
    known = train_data.categories if train else categories
    return train_data, load("val", known) if val else None


# ------------------------------------------------------------------------------ transforms


class ShortestSize(v2.RandomShortestSize):
    """Leaves every side at least one pixel, however thin the image."""

    def make_params(self, flat_inputs):
        params = super().make_params(flat_inputs)
        return {**params, "size": [max(1, side) for side in params["size"]]}


class MaskCrops(tv_tensors.TVTensor):
    """Masks [G, 112, 112], each over its object's box: a flip turns them, resizing does nothing."""


@v2.functional.register_kernel("horizontal_flip", MaskCrops)
def _flip_masks(masks, *_, **__):
    return tv_tensors.wrap(masks.flip(-1), like=masks)


def as_transformed(target: dict, size: tuple[int, int]) -> dict:
    """A target whose boxes and masks v2 transforms move with the image; plain ones they leave."""
    boxes, known = target["boxes"], {}
    if not isinstance(boxes, tv_tensors.BoundingBoxes):
        boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        known["boxes"] = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)
    masks = target.get("masks")
    if masks is not None and not isinstance(masks, MaskCrops):
        crops = crop_bitmaps(masks.as_subclass(Tensor), boxes.as_subclass(Tensor))
        known["masks"] = crops.as_subclass(MaskCrops)
    return {**target, **known}


class Resized(Dataset):
    """A data set behind the v2 transforms of training or of one test scale.

    Training items are asked for as (epoch, index): the augmentation is a function of (seed, epoch,
    index) alone, so neither the number of workers nor an interruption changes it. An item is a
    uint8 image [3, h, w] and its target, whose masks are cut to their boxes; boxes and masks may
    come as plain tensors.
    """

    def __init__(self, data: Dataset, config: Config, train: bool, scale: int = 0):
        self.data, self.seed, self.train = data, config.seed, train
        scales = config.scales if train else (scale or config.test_scales[0],)
        longest = {s: round(config.max_size * s / max(config.scales)) for s in scales}
        self.resize = {s: ShortestSize(s, longest[s]) for s in scales}
        self.flip = v2.RandomHorizontalFlip(config.flip)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key):
        epoch, index = key if self.train else (0, key)
        image, target = self.data[index]
        image, target = tv_tensors.Image(image), as_transformed(target, tuple(image.shape[1:]))
        with torch.random.fork_rng(devices=[]):
            entropy = np.random.SeedSequence((self.seed, epoch, index))
            torch.default_generator.manual_seed(int(entropy.generate_state(1)[0]))  # no GPU's
            scale = list(self.resize)[int(torch.randint(len(self.resize), ()))]
            image, target = self.resize[scale](image, target)
            if self.train:
                image, target = self.flip(image, target)
        for name in {"boxes", "masks"} & target.keys():
            target[name] = target[name].as_subclass(Tensor)
        return image.as_subclass(Tensor), target


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision's weights ask


def padded_size(image: Tensor, divisor: int = 32) -> tuple[int, ...]:
    """(H, W) of an image [3, h, w] that is padded alone."""
    return tuple((side + divisor - 1) // divisor * divisor for side in image.shape[1:])


def check_image(image) -> None:
    """BadInput unless it is a uint8 [3, h, w] tensor: floats in 0..1 would be a black image."""
    if not isinstance(image, Tensor) or image.dtype != torch.uint8:
        kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise BadInput(
            f"images are uint8 tensors of 0..255, normalised in here; this one is {kind}"
        )
    if image.ndim != 3 or len(image) != 3 or not image.numel():
        raise BadInput(f"images are [3, h, w], RGB; this one is {list(image.shape)}")


def pad_images(images: list[Tensor], divisor: int = 32) -> tuple[Tensor, Tensor]:
    """uint8 [3, h, w] images -> normalised, zero-padded batch [B, 3, H, W] and sizes [B, 2].

    Raises BadInput for any other image.
    """
    for image in images:
        check_image(image)
    H, W = map(max, zip(*(padded_size(i, divisor) for i in images)))
    batch = torch.zeros(len(images), 3, H, W, device=images[0].device)
    batch = batch.to(memory_format=torch.channels_last)
    mean, std = (constant(v, batch.device)[:, None, None] for v in (MEAN, STD))
    for padded, image in zip(batch, images):  # sizes differ: B copies
        padded[:, : image.shape[1], : image.shape[2]] = (image.float() / 255 - mean) / std
    return batch, constant([i.shape[1:] for i in images], batch.device)


def pad_targets(targets: list[dict]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Targets -> boxes [B, G, 4], labels [B, G], valid [B, G], ignore [B, G]; G at least 1.

    `valid` are the objects to detect; `ignore` the crowds and difficult ones; padding is neither.
    """
    boxes = pad_sequence([F.pad(t["boxes"], (0, 0, 0, 1)) for t in targets], batch_first=True)
    labels = pad_sequence([F.pad(t["labels"], (0, 1)) for t in targets], batch_first=True)
    valid = pad_sequence([F.pad(~t["ignore"], (0, 1)) for t in targets], batch_first=True)
    ignore = pad_sequence([F.pad(t["ignore"], (0, 1)) for t in targets], batch_first=True)
    return boxes, labels, valid, ignore


# ------------------------------------------------------------------------------ backbone


class ConvP6P7(ExtraFPNBlock):
    """RetinaNet's extra levels: P6 a stride-2 convolution on C5 (GFL: on P5), P7 one on P6.

    No ReLU between them: so the released models were trained (torchvision has one).
    """

    def __init__(self, in_channels: int, out_channels: int, on_p5: bool = False):
        super().__init__()
        self.on_p5 = on_p5
        first = out_channels if on_p5 else in_channels
        self.p6 = nn.Conv2d(first, out_channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        for conv in (self.p6, self.p7):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, results, x, names):
        p6 = self.p6((results if self.on_p5 else x)[-1])
        return results + [p6, self.p7(p6)], names + ["p6", "p7"]


def make_norm(kind: str):
    """A constructor channels -> normalisation layer: frozen_bn, bn or gn (32 groups at most)."""
    group = lambda channels: nn.GroupNorm(math.gcd(32, channels), channels)  # noqa: E731
    return {"frozen_bn": FrozenBatchNorm2d, "bn": nn.BatchNorm2d, "gn": group}[kind]


def make_resnet(name: str, weights: str | None, norm_layer) -> ResNet:
    """torchvision's network of that name. "small": ResNet-18, one block a stage, half as wide."""
    if name == "resnext101_32x4d":
        if weights:
            raise ValueError("torchvision has no weights of it, others publish them")
        options = dict(groups=32, width_per_group=4)
        return ResNet(Bottleneck, [3, 4, 23, 3], norm_layer=norm_layer, **options)
    if name != "small":
        return torchvision.models.get_model(name, weights=weights, norm_layer=norm_layer)
    if weights:
        raise ValueError("nobody has trained it on ImageNet")
    net = ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=norm_layer)
    net.inplanes = 32
    net.conv1, net.bn1 = nn.Conv2d(3, 32, 7, 2, 3, bias=False), norm_layer(32)
    for i in range(4):
        stage = net._make_layer(BasicBlock, 32 * 2**i, 1, stride=2 if i else 1)
        setattr(net, f"layer{i + 1}", stage)
    net.fc = nn.Linear(256, 1000)
    return net


class DeformableConv(DeformConv2d):
    """A convolution that sees from its input where each of its taps should look (DCN).

    [B, C, H, W] -> [B, C', H', W']. Takes the place of `conv`, with its weight and groups. A second
    convolution, `conv_offset`, gives each output place an offset for each tap, in px of its input:
    y, x of the first tap, y, x of the next, row by row. Outside the map are zeros. `modulated`
    (DCNv2): behind the offsets, each tap's share in (0, 1). `conv_offset` starts at zero: so v1
    starts as `conv`, and v2, whose shares are then 0.5, as half of it (release).
    Stays float32 under autocast: offsets are positions, and a CPU's deform_conv2d knows no bf16.

    >>> conv, x = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), torch.ones(1, 4, 8, 8)
    >>> torch.allclose(DeformableConv(conv)(x), conv(x) / 2, atol=1e-6)
    True
    """

    def __init__(self, conv: nn.Conv2d, modulated: bool = True):
        place = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        super().__init__(conv.in_channels, conv.out_channels, *place, groups=conv.groups)
        self.weight, self.bias = conv.weight, conv.bias
        self.taps = math.prod(conv.kernel_size)
        self.conv_offset = nn.Conv2d(conv.in_channels, (2 + modulated) * self.taps, *place)
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.weight.dtype)
            offsets, mask = self.conv_offset(x).tensor_split([2 * self.taps], dim=1)
            return super().forward(x, offsets, mask.sigmoid() if mask.shape[1] else None)


def make_deformable(net: ResNet, dcn: str) -> None:
    """The 3x3 convolutions of all bottlenecks in C3 to C5, made deformable in place (release).

    dcn: "v1", "v2" or "none". Raises BadInput for basic blocks, as the releases' framework does.
    """
    for block in [*net.layer2, *net.layer3, *net.layer4] if dcn != "none" else []:
        if not isinstance(block, Bottleneck):
            raise BadInput(f"--dcn {dcn}: needs bottlenecks, as resnet50 and larger networks have")
        block.conv2 = DeformableConv(block.conv2, dcn == "v2")


class ResNetFPN(nn.Module):
    """torchvision's ResNet or ResNeXt under a feature pyramid: [B, 3, H, W] -> 5 maps [B, C, h, w].

    extra="pool": P2..P6, strides 4..64, P6 by subsampling P5 (two-stage, and `p2` of one-stage).
    extra="conv": P3..P7, strides 8..128, P6 and P7 by convolution (RetinaNet); "conv_p5": P6 on P5.
    With weights the stem and the first stages are frozen, and with norm="auto" all BN is; from
    scratch ("none") nothing is, and norm="auto" means GroupNorm, in the pyramid too. "random" is
    like "imagenet" in all but the values. `dcn`: see `make_deformable`. Raises BadInput if the
    weights cannot be had.
    """

    def __init__(
        self,
        name: str = "resnet50",
        out_channels: int = 256,
        extra: str = "pool",
        weights: str = "imagenet",
        norm: str = "auto",
        frozen_stages: int = 2,
        dcn: str = "none",
    ):
        super().__init__()
        scratch = weights == "none"
        norm = ("gn" if scratch else "frozen_bn") if norm == "auto" else norm
        known = "IMAGENET1K_V1" if weights == "imagenet" else None  # the papers'; V2 detects alike
        try:
            net = make_resnet(name, known, make_norm(norm))
            if weights not in ("imagenet", "none", "random"):
                state = torch.load(weights, map_location="cpu", weights_only=True)
                net.load_state_dict({**net.fc.state_dict(prefix="fc."), **state})  # fc: not used
        except Exception as e:  # a download fails in many ways, a file in as many
            why = f"{name}, weights {weights}: {type(e).__name__}: {e}"
            if weights not in ("none", "random"):
                why += "\n--backbone-weights takes a downloaded .pth file, or none: from scratch"
            raise BadInput(why) from e
        make_deformable(net, dcn)  # after loading: classifiers' weights have no offsets
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.stages = nn.ModuleList([net.layer1, net.layer2, net.layer3, net.layer4])
        self.frozen = 0 if scratch else frozen_stages
        for part in [self.stem, *self.stages][: self.frozen]:
            part.requires_grad_(False)
        channels = [net.fc.in_features // 2**i for i in (3, 2, 1, 0)]
        self.first = 0 if extra == "pool" else 1
        self.strides = tuple(2 ** (i + 2 + self.first) for i in range(5))
        self.fpn = FeaturePyramidNetwork(
            channels[self.first :],
            out_channels,
            ConvP6P7(channels[-1], out_channels, extra == "conv_p5")
            if self.first
            else LastLevelMaxPool(),
            norm_layer=make_norm(norm) if scratch else None,
        )
        # choice: what comes from coarser maps begins faint, so that fine maps learn from the start
        if scratch:
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
