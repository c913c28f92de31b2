"""What the five detectors share: data, boxes, backbone, RPN and RetinaNet towers, and the engine.

A method file builds a `Detector` from these pieces and hands it to `run`, which makes the command
line and then trains, evaluates, predicts or times it. A Detector has four methods:

    loss(images, targets) -> {name: scalar}       already weighted; their sum is minimised
    candidates(images) -> {boxes [N, 4], scores [N], labels [N], image [N]}     before the last NMS
    finish(candidates, B) -> B dicts of boxes [D, 4], scores [D], labels [D]    best score first
    predict(images) = finish(candidates(images), B)

`predict` and the evaluation ask for candidates of images of one padded size at a time
(`candidates_by_size`), so that an image's detections do not depend on what is detected beside it.
`images` is a list of uint8 [3, h, w] tensors, resized but neither normalised nor padded.
A target is a dict: boxes [G, 4], labels [G], ignore [G] (bool: crowd or difficult), image_id, and
size (h, w) of the image as it is on disk; optionally masks [G, h, w] (bool).

Conventions, here and in every file:
    Boxes are float32 xyxy in pixels of the network's input image, continuous (width = x2 - x1).
    Sizes are (h, w). Dense offsets (l, t, r, b) are fractions of the proposal's width and height.
    Labels: foreground 0..K-1, background K, ignore -1. Data sets' category ids are mapped to labels
    once, at loading, and back when results are written.
    B images, R RoIs, G ground-truth boxes, K classes, A anchors per cell, L levels, C channels,
    S side of an RoI grid, N boxes entering an NMS.
    The network runs channels_last, in bf16 autocast on a GPU that has it; boxes stay float32.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import math
import os
import signal
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import tyro
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import tv_tensors
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool
from torchvision.transforms import v2
from tqdm import tqdm

import kernels


@dataclass
class Config:
    """Shared settings. The defaults are the `paper` preset; a method adds its own fields."""

    # What to do
    train: bool = False  # train, then evaluate
    eval: bool = False  # evaluate --weights on the validation set
    predict: tuple[str, ...] = ()  # detect in these image files and folders with --weights
    rows: bool = False  # print the paper's tables and the flags of each row
    bench: bool = False  # time a step and a prediction against torchvision's detector
    row: str = ""  # take the settings of this row of the paper's tables (see --rows)
    preset: Literal["auto", "paper", "tiny"] = "auto"  # auto: tiny for synthetic data without a GPU
    weights: str = ""  # checkpoint to evaluate, to predict with, or to start training from
    resume: bool = False  # go on from OUT/last.pt, if there is one
    out: str = ""  # results folder (default: runs/<script>)
    device: str = "auto"  # auto: cuda if there is one, else cpu
    # Data
    data: str = "synthetic"  # folder in COCO or Pascal VOC layout, or "synthetic"
    train_json: str = ""  # COCO annotations to train on, given explicitly ...
    train_images: str = ""  # ... and their image folder
    val_json: str = ""  # COCO annotations to evaluate on ...
    val_images: str = ""  # ... and their image folder
    train_split: str = ""  # VOC: ImageSets/Main/<split>.txt (default: trainval if test is tested)
    val_split: str = ""  # VOC: split to evaluate on (default: test, else val)
    num_train: int = 7000  # synthetic images per epoch
    num_val: int = 200  # synthetic images to evaluate on
    image_size: int = 512  # synthetic images' side in px
    scales: tuple[int, ...] = (800,)  # training: shorter side in px, drawn from these
    test_scales: tuple[int, ...] = (800,)  # testing: detections of all of these are merged
    max_size: int = 1333  # longer side in px, at most, at the largest of scales; else in proportion
    flip: float = 0.5  # probability of a horizontal flip in training
    test_flip: bool = False  # also test on the mirrored image
    workers: int = -1  # loader processes per training process; -1: 2 on a CPU, 4 on a GPU
    # Backbone
    backbone: str = "resnet50"  # resnet18/34/50/101, resnext101_32x8d, resnext101_64x4d
    backbone_weights: str = "imagenet"  # imagenet, none, random (to time), or torchvision's .pth
    norm: Literal["auto", "frozen_bn", "bn", "gn"] = "auto"  # auto: frozen_bn, or gn from scratch
    frozen_stages: int = 2  # stem and first stages kept fixed when starting from weights
    fpn_channels: int = 256  # width of the pyramid
    # Optimisation
    batch: int = 0  # images per step over all processes; 0: 2 per process
    optimizer: Literal["sgd", "adamw"] = "sgd"  # the papers use SGD
    lr: float = 0.02  # learning rate at lr_batch images a step; scaled linearly to the batch
    lr_batch: int = 16  # images a step that lr is meant for
    momentum: float = 0.9  # momentum of SGD
    weight_decay: float = 1e-4  # weight decay, of all weights
    epochs: float = 12.0  # length of training, passes over the data
    steps: int = 0  # length of training in steps instead
    drops: tuple[float, ...] = (8 / 12, 11 / 12)  # lr / 10 at these fractions of training
    warmup: int = 500  # steps of linear warm-up (at most a tenth of training) ...
    warmup_factor: float = 1 / 3  # ... from this share of the rate; choice: papers do not say
    clip_norm: float = 0.0  # largest gradient norm; 0: no clipping
    amp: Literal["auto", "off", "bf16"] = "auto"  # auto: bf16 autocast on a GPU that has it
    seed: int = 0  # of weights, order, augmentation, sampling and synthetic images
    # Book-keeping
    log_every: int = 20  # steps between lines of the log
    save_every: int = 1000  # steps between checkpoints
    eval_every: int = 0  # steps between evaluations; 0: only at the end
    eval_batch: int = 0  # images per process when testing; 0: as in training
    draw_score: float = 0.5  # detections below this score are not drawn


# What `--preset tiny` changes: a small network learns from scratch, in minutes on a CPU.
TINY = dict(
    backbone="resnet18",
    backbone_weights="none",
    fpn_channels=48,
    norm="bn",
    image_size=128,
    scales=(128,),
    test_scales=(128,),
    max_size=128,
    batch=8,
    optimizer="adamw",
    lr=2e-3,
    weight_decay=0.05,
    clip_norm=10.0,
    epochs=1.0,
    drops=(0.8, 0.95),
    save_every=200,
    eval_every=250,
)


class BadInput(ValueError):
    """Something the user gave cannot be used; the message names the file and the reason."""


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
    half lies in an ignored gt (crowd, difficult) is -1 instead of 0. With `low_quality`, a gt's best
    boxes are positive for it whatever `high` says, if their IoU is above 0 and at least
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


def global_mean(count: Tensor) -> Tensor:
    """A loss normaliser: the mean over the processes of a count that is at least 1 over all.

    Dividing each process's sum by it makes DDP's mean gradient that of one process with all images.
    """
    count = count.detach().float().clone()
    if dist.is_initialized():
        dist.all_reduce(count)
    return count.clamp(min=1) / rank_and_world()[1]


def global_rows(x: Tensor) -> Tensor:
    """`global_mean` of the number of x's rows."""
    return global_mean(torch.full((), float(len(x)), device=x.device))


# ------------------------------------------------------------------------------ synthetic data


SHAPES = {  # u, v in [-1, 1] after rotation; r, a their polar form -> inside?
    "disc": lambda u, v, r, a: r < 1,
    "ellipse": lambda u, v, r, a: u**2 + (v / 0.45) ** 2 < 1,
    "ring": lambda u, v, r, a: (r < 1) & (r > 0.62),
    "arc": lambda u, v, r, a: (r < 1) & (r > 0.55) & (np.abs(a) > 0.9),
    "bar": lambda u, v, r, a: (np.abs(u) < 1) & (np.abs(v) < 0.17),
    "cross": lambda u, v, r, a: (np.minimum(np.abs(u), np.abs(v)) < 0.24) & (r < 1),
    "triangle": lambda u, v, r, a: (v < 0.5) & (v > 1.73 * np.abs(u) - 1),
    "star": lambda u, v, r, a: r < 0.42 + 0.58 * np.abs(a * 5 / (2 * np.pi) % 1 * 2 - 1) ** 1.3,
    "crescent": lambda u, v, r, a: (r < 1) & ((u - 0.5) ** 2 + v**2 > 0.66),
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
    An item is (image uint8 [3, size, size], target), as described at the top of this file.
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
        size = self.size
        smooth = rng.random((3, 7, 7), dtype=np.float32)  # coarse random colours, blended linearly
        image = self._blend @ smooth @ self._blend.T  # [3, size, size]
        image += self._stripes(rng, 0, 0, size, size) * rng.uniform(0, 0.15)
        owner = np.full((size, size), -1, np.int64)  # which object shows at a pixel
        area, labels = [], []
        for _ in range(rng.integers(3)):  # fragments of shapes under and between the objects
            self._paint(rng, image, owner, None, area, fragment=True)
        for _ in range(rng.integers(1, 7) if rng.random() > 0.03 else 0):
            pose = self._pose(rng)
            if self._paint(rng, image, owner, pose, area):
                labels.append(pose["label"])
                if rng.random() < 1 / 3:  # a twin: same shape, size, angle, right beside it
                    turn = rng.uniform(0, 2 * np.pi)
                    step = pose["radius"] * rng.uniform(1.7, 2.2)
                    pose["x"] += step * np.cos(turn)
                    pose["y"] += step * np.sin(turn)
                    if self._paint(rng, image, owner, pose, area):
                        labels.append(pose["label"])
            if rng.random() < 0.3:
                self._paint(rng, image, owner, None, area, fragment=True)
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

    def _paint(self, rng, image, owner, pose, area, fragment=False) -> bool:
        """Draw a shape if no earlier object loses more than half of itself; say whether it was."""
        pose = pose or self._pose(rng)
        x0, y0 = int(pose["x"] - pose["radius"]), int(pose["y"] - pose["radius"])
        side = np.arange(2 * pose["radius"] + 2, dtype=np.float32) + 0.5
        x = ((side + x0 - pose["x"]) / pose["radius"])[None]
        y = ((side + y0 - pose["y"]) / pose["radius"])[:, None]
        cos, sin = np.cos(pose["angle"]), np.sin(pose["angle"])
        u, v = cos * x + sin * y, cos * y - sin * x
        shape = list(SHAPES.values())[pose["label"]](u, v, np.hypot(u, v), np.arctan2(v, u))
        if fragment:  # a slice of the shape, narrower than half of it
            cut = rng.uniform(-0.6, 0.3)
            shape &= (u > cut) & (u < cut + rng.uniform(0.2, 0.5))
        x1, y1 = x0 + len(side), y0 + len(side)
        if min(x1, y1) <= 0 or max(x0, y0) >= self.size:
            return False  # a twin outside the image
        inside = shape[max(0, -y0) : self.size - y0, max(0, -x0) : self.size - x0]
        x0, y0 = max(0, x0), max(0, y0)
        under = owner[y0:y1, x0:x1]
        counts = np.bincount(owner.ravel() + 1, minlength=len(area) + 1)
        counts -= np.bincount(under[inside] + 1, minlength=len(area) + 1)
        if (counts[1:] < 0.5 * np.array(area)).any():
            return False  # an earlier object would lose too much
        if not fragment and inside.sum() < max(12, 0.5 * shape.sum()):
            return False  # hardly a pixel, or mostly outside the image
        window = image[:, y0:y1, x0:x1]
        # In each channel at least a quarter of the range away from what is there.
        colour = (window.mean((1, 2), keepdims=True) + pose["shift"]) % 1
        texture = self._stripes(rng, y0, x0, *under.shape) * rng.uniform(0, 0.15)
        np.copyto(window, colour + texture, where=inside)
        under[inside] = -1 if fragment else len(area)
        if not fragment:
            area.append(int(shape.sum()))
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
            target["masks"] = tv_tensors.Mask(torch.from_numpy(masks))
        return target

    def coco(self) -> dict:
        """The ground truth as a COCO dictionary (boxes only)."""
        images, annotations = [], []
        for index in range(len(self)):
            target = self[index][1]
            images.append({"id": index, "height": self.size, "width": self.size})
            for (x1, y1, x2, y2), label in zip(target["boxes"].tolist(), target["labels"].tolist()):
                box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
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
    """Image files with COCO annotations (VOC's are turned into these), checked when loaded.

    A file without "annotations", as of COCO's test sets, is a set in which nothing can be scored.
    Boxes that are broken (not finite, of zero or negative size, outside the image) are dropped and
    counted; everything else that is wrong raises BadInput with the file and the reason. The boxes
    are kept as flat arrays: loader processes share them instead of copying a million objects.
    """

    def __init__(self, source: Path, image_dir: Path, read=None, categories=None):
        self.source, self.image_dir, self._read = Path(source), Path(image_dir), read or read_json
        coco = self._read(self.source, categories)
        try:
            found = [{"id": c["id"], "name": c["name"]} for c in coco["categories"]]
            self.categories = sorted(found, key=lambda c: c["id"])
            self.image_ids = [image["id"] for image in coco["images"]]
            self.sizes = np.array([(i["height"], i["width"]) for i in coco["images"]]).reshape(
                -1, 2
            )
            self.files = np.array([str(self.image_dir / i["file_name"]) for i in coco["images"]])
            self._flatten(coco.get("annotations", []))  # a test set has none
        except BadInput:
            raise
        except (KeyError, TypeError, ValueError) as e:
            raise BadInput(f"{source}: not COCO annotations: {type(e).__name__} {e}") from e
        if categories is not None and categories != self.categories:
            odd = [
                c
                for c in self.categories + categories
                if (c in self.categories) != (c in categories)
            ]
            raise BadInput(
                f"{source}: unknown or missing category, compared with the model's: {odd[:5]}"
            )
        check_images(self.files, self.sizes, self.source)

    def _flatten(self, annotations: list[dict]) -> None:
        if len(set(self.image_ids)) < len(self.image_ids):
            double = Counter(self.image_ids).most_common(1)[0][0]
            raise BadInput(f"{self.source}: image id {double} occurs more than once")
        row = {image_id: i for i, image_id in enumerate(self.image_ids)}
        label = {c["id"]: i for i, c in enumerate(self.categories)}
        name = lambda a: f"annotation {a.get('id', 'without id')}"  # noqa: E731
        for a in annotations:
            if a["image_id"] not in row:
                raise BadInput(f"{self.source}: {name(a)} has no image {a['image_id']}")
            if a["category_id"] not in label:
                raise BadInput(
                    f"{self.source}: {name(a)} is of unknown category {a['category_id']}"
                )
            if len(a["bbox"]) != 4:
                raise BadInput(f"{self.source}: {name(a)}: bbox {a['bbox']}")
        rows = np.array([row[a["image_id"]] for a in annotations], np.int64)
        boxes = np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        limit = self.sizes[rows][:, [1, 0, 1, 0]]
        whole = np.isfinite(boxes).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        boxes = np.clip(np.nan_to_num(boxes), 0, limit)  # annotators reach a little over the border
        whole &= (boxes[:, 2:] > boxes[:, :2]).all(1)
        self.dropped = np.flatnonzero(~whole).tolist()  # positions: ids may be missing or double
        if self.dropped:
            some = ", ".join(str(annotations[i].get("id", f"no. {i}")) for i in self.dropped[:10])
            say(
                f"{self.source}: dropped {len(self.dropped)} of {len(whole)} boxes (not finite, no area "
                f"or outside the image): annotations {some}"
            )
        ignore = [bool(a.get("iscrowd", 0) or a.get("difficult", 0)) for a in annotations]
        order = np.argsort(rows, kind="stable")
        order = order[whole[order]]
        self._boxes = torch.from_numpy(boxes[order]).float()
        self._labels = torch.tensor([label[a["category_id"]] for a in annotations]).long()[order]
        self._ignore = torch.tensor(ignore, dtype=torch.bool)[order]
        self._first = np.searchsorted(rows[order], np.arange(len(self.image_ids) + 1))

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int):
        part = slice(self._first[index], self._first[index + 1])
        target = make_target(
            self._boxes[part],
            self._labels[part],
            self._ignore[part],
            self.image_ids[index],
            self.sizes[index].tolist(),
        )
        return read_image(self.files[index]), target

    def coco(self) -> dict:
        """The ground truth as a COCO dictionary, read again, without the boxes dropped here.

        Annotations are numbered anew from 1 (pycocotools takes id 0 for "no match") and have what
        pycocotools wants of them: `area`, here the box's where the file has none, and `iscrowd`.
        """
        coco, dropped = self._read(self.source, self.categories), set(self.dropped)
        coco["annotations"] = [
            {"area": a["bbox"][2] * a["bbox"][3], "iscrowd": 0, **a, "id": i + 1}
            for i, a in enumerate(coco.get("annotations", []))
            if i not in dropped
        ]
        return coco


def read_json(path: Path, categories=None) -> dict:
    """COCO annotations as they are; `categories` are compared by the caller."""
    try:
        return json.loads(Path(path).read_text())
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror}") from None
    except ValueError as e:
        raise BadInput(f"{path}: broken JSON: {e}") from e


UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what PIL raises


def read_image(path: str | Path) -> Tensor:
    """uint8 RGB [3, h, w]; raises BadInput naming a missing, truncated, foreign or 16-bit file."""
    try:
        with Image.open(path) as image:  # EXIF rotation is not applied: COCO annotates raw pixels
            if image.mode[0] in "IF":  # PIL would clip these to black and white
                raise ValueError(f"its pixels ({image.mode}) are not of 8 bits, convert it first")
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except UNREADABLE as e:
        raise BadInput(f"{path}: cannot read the image: {e}") from e


def check_images(files, sizes=None, source="") -> None:
    """Open every image file of this process's share; BadInput lists what is wrong with which.

    Reads the header and the last bytes; only a file whose end looks torn is decoded, which decides.
    `sizes` [n, 2] (h, w), where given, are compared with the files' own.
    """

    def check(i: int) -> str | None:
        try:
            with Image.open(files[i]) as image:
                (w, h), deep = image.size, image.mode[0] in "IF"
            with open(files[i], "rb") as f:
                f.seek(-min(64, os.path.getsize(files[i])), os.SEEK_END)
                tail = f.read()
            if deep or (b"\xff\xd9" not in tail and b"IEND" not in tail):
                read_image(files[i])
        except BadInput as e:
            return str(e)
        except UNREADABLE as e:
            return f"{files[i]}: cannot read the image: {e}"
        if sizes is not None and (h, w) != tuple(sizes[i]):
            return f"{files[i]}: is {h}x{w} px (h x w), {source} says {sizes[i][0]}x{sizes[i][1]}"

    rank, world = rank_and_world()
    mine = range(rank, len(files), world)
    with ThreadPoolExecutor(16) as pool:
        found = progress(pool.map(check, mine), "checking images", len(mine))
        wrong = [problem for problem in found if problem]
    if wrong:
        more = f"\n... and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise BadInput("\n".join(wrong[:10]) + more)


def read_voc(split_file: Path, categories: list[dict] | None = None) -> dict:
    """COCO dictionary of the images that ImageSets/Main/<split>.txt lists, `difficult` kept.

    VOC boxes are 1-based and inclusive: pixels xmin..xmax cover [xmin - 1, xmax]. Image ids are the
    files' stems. Categories are the names found, in alphabetical order, unless they are given.
    Several split files may be joined with os.pathsep (VOC 2007 + 2012).
    """
    images, objects = [], []
    names = {c["name"] for c in categories or ()}
    for split in str(split_file).split(os.pathsep):
        root = Path(split).parents[2]
        try:
            lines = Path(split).read_text().split("\n")
        except OSError as e:
            raise BadInput(f"{split}: {e.strerror}") from None
        for stem in (line.split()[0] for line in lines if line.strip()):
            path = root / "Annotations" / f"{stem}.xml"
            try:
                tree = ET.parse(path).getroot()
                size = [int(tree.findtext(f"size/{side}")) for side in ("height", "width")]
                for item in tree.iter("object"):
                    corners = ("xmin", "ymin", "xmax", "ymax")
                    x1, y1, x2, y2 = (float(item.findtext(f"bndbox/{c}")) for c in corners)
                    name, difficult = item.findtext("name").strip(), item.findtext("difficult", "0")
                    if categories is None:
                        names.add(name)
                    elif name not in names:
                        known = ", ".join(sorted(names)[:20])
                        raise BadInput(f"{path}: unknown category {name}, training has {known}")
                    objects.append((stem, name, (x1 - 1, y1 - 1, x2, y2), int(difficult)))
            except FileNotFoundError:
                raise BadInput(f"{path}: no such file, but {split} lists {stem}") from None
            except BadInput:
                raise
            except (ET.ParseError, TypeError, ValueError, AttributeError) as e:
                raise BadInput(f"{path}: broken VOC annotation: {e}") from e
            file = f"{root / 'JPEGImages' / stem}.jpg"
            size = dict(zip(("height", "width"), size))
            images.append({"id": stem, "file_name": file, **size})
    categories = categories or [{"id": i, "name": n} for i, n in enumerate(sorted(names), 1)]
    ids = {c["name"]: c["id"] for c in categories}
    annotations = []
    for image_id, name, (x1, y1, x2, y2), difficult in objects:
        box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
        known = {"id": len(annotations) + 1, "image_id": image_id, "category_id": ids[name]}
        annotations.append({**known, **box, "iscrowd": 0, "difficult": difficult})
    return {"images": images, "annotations": annotations, "categories": categories}


def load_data(config: Config, train: bool = True, val: bool = True, categories=None):
    """(training set, validation set) of config.data; None for one that is not asked for.

    Synthetic, COCO (annotations/instances_*2017.json or explicit paths) or VOC (JPEGImages/, also
    VOC2007/ and VOC2012/ below: both train, the first one tests). The training set's categories,
    or those given (a checkpoint's), are the ones that the validation set must have. Raises BadInput,
    also for a set without images and a training set without boxes.
    """
    explicit = config.train_json or config.val_json
    if not explicit and (config.train_images or config.val_images):
        raise BadInput("--train-images and --val-images go with --train-json and --val-json")
    if config.data == "synthetic" and not explicit:
        make = SyntheticDetection
        return (
            make(config.num_train, config.image_size, config.seed) if train else None,
            # choice: a seed of its own, so that no --seed ever trains on validation images
            make(config.num_val, config.image_size, 2**31) if val else None,
        )
    root = Path(config.data)
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
    else:
        roots = [
            r for r in (root, root / "VOC2007", root / "VOC2012") if (r / "JPEGImages").is_dir()
        ]
        if not roots:
            looked = "annotations/instances_*2017.json (COCO) nor JPEGImages/ (VOC)"
            raise BadInput(f"{root}: no data found: neither {looked} in that folder")
        lists = lambda r, split: r / "ImageSets" / "Main" / f"{split}.txt"  # noqa: E731
        tests = config.val_split or ("test" if lists(roots[0], "test").exists() else "val")
        whole = tests == "test" and lists(roots[0], "trainval").exists()  # else val would train
        trains = config.train_split or ("trainval" if whole else "train")
        train_lists = os.pathsep.join(str(lists(r, trains)) for r in roots)
        paths = {"train": train_lists, "val": str(lists(roots[0], tests))}
        folders, read = {"train": "", "val": ""}, read_voc

    def load(split: str, known):
        data = FolderDetection(paths[split], folders[split], read, known)
        if not len(data):
            raise BadInput(f"{paths[split]}: no images")
        if split == "train" and not len(data._boxes):
            raise BadInput(f"{paths[split]}: no annotated boxes to train on")
        return data

    train_data = load("train", categories) if train else None
    known = train_data.categories if train else categories
    return train_data, load("val", known) if val else None


# ------------------------------------------------------------------------------ batches


class ShortestSize(v2.RandomShortestSize):
    """Leaves every side at least one pixel, however thin the image."""

    def make_params(self, flat_inputs):
        params = super().make_params(flat_inputs)
        return {**params, "size": [max(1, side) for side in params["size"]]}


class Resized(Dataset):
    """A data set behind the v2 transforms of training or of one test scale.

    Training items are asked for as (epoch, index): the augmentation is a function of (seed, epoch,
    index) alone, so neither the number of workers nor an interruption changes it. An item is a
    uint8 image [3, h, w] and its target.
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
        image = tv_tensors.Image(image)
        with torch.random.fork_rng(devices=[]):
            entropy = np.random.SeedSequence((self.seed, epoch, index))
            torch.manual_seed(int(entropy.generate_state(1)[0]))
            scale = list(self.resize)[int(torch.randint(len(self.resize), ()))]
            image, target = self.resize[scale](image, target)
            if self.train:
                image, target = self.flip(image, target)
        target["boxes"] = target["boxes"].as_subclass(Tensor)
        return image.as_subclass(Tensor), target


class TrainBatches:
    """Lists of (epoch, index) for this process, from step `start` to step `total`.

    Images wider than tall and the rest go into different batches (less padding); a pure function
    of (seed, epoch), so that a resumed run continues in the middle of an epoch.
    """

    def __init__(self, sizes: np.ndarray, batch: int, seed: int, start: int = 0, total: int = 0):
        self.wide, self.batch, self.seed = sizes[:, 1] > sizes[:, 0], batch, seed
        self.start, self.total = start, total
        self.rank, self.world = rank_and_world()
        per_rank = math.ceil(len(sizes) / self.world)
        self.per_epoch = max(1, per_rank // batch)

    def epoch(self, epoch: int) -> list[list[tuple[int, int]]]:
        """This process's batches of one epoch, in order."""
        order = DistributedSampler(range(len(self.wide)), self.world, self.rank, seed=self.seed)
        order.set_epoch(epoch)
        batches, rest = [], []
        for wide in (True, False):
            group = [(epoch, i) for i in order if self.wide[i] == wide]
            whole = len(group) // self.batch * self.batch
            batches += [group[i : i + self.batch] for i in range(0, whole, self.batch)]
            rest += group[whole:]
        batches += [rest[i : i + self.batch] for i in range(0, len(rest), self.batch)]
        # A last, smaller batch is left out (another one each epoch) unless there is no other.
        batches = [b for b in batches if len(b) == self.batch] or batches
        mixed = torch.Generator().manual_seed(self.seed + epoch)
        return [batches[i] for i in torch.randperm(len(batches), generator=mixed)]

    def __len__(self) -> int:
        return self.total - self.start

    def __iter__(self):
        step = self.start
        while step < self.total:
            epoch, skip = divmod(step, self.per_epoch)
            for batch in self.epoch(epoch)[skip : skip + self.total - step]:
                yield batch
                step += 1


def _leave_signals_to_the_parent(_) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole process group; the parent ends the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def make_loader(data: Dataset, config: Config, device: torch.device, **sampling) -> DataLoader:
    """Batches as lists of (image, target), read by `config.workers` processes."""
    workers = config.workers if config.workers >= 0 else {"cuda": 4}.get(device.type, 2)
    return DataLoader(
        data,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        collate_fn=list,
        generator=torch.Generator(),  # a loader must not draw from the training's generator
        worker_init_fn=_leave_signals_to_the_parent,
        **sampling,
    )


def to_device(items, device) -> tuple[list[Tensor], list[dict]]:
    """Images and targets of a batch, moved without waiting."""
    targets = [
        {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in t.items()}
        for _, t in items
    ]
    return [image.to(device, non_blocking=True) for image, _ in items], targets


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision's weights ask


def padded_size(image: Tensor, divisor: int = 32) -> tuple[int, ...]:
    """(H, W) of an image [3, h, w] that is padded alone."""
    return tuple(math.ceil(side / divisor) * divisor for side in image.shape[1:])


def pad_images(images: list[Tensor], divisor: int = 32) -> tuple[Tensor, Tensor]:
    """uint8 [3, h, w] images -> normalised, zero-padded batch [B, 3, H, W] and sizes [B, 2]."""
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
    """RetinaNet's extra levels: P6 a stride-2 convolution on C5, P7 one on P6.

    No ReLU between them: so the released models were trained (torchvision has one).
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        for conv in (self.p6, self.p7):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, results, x, names):
        p6 = self.p6(x[-1])
        return results + [p6, self.p7(p6)], names + ["p6", "p7"]


def make_norm(kind: str):
    """A constructor channels -> normalisation layer: frozen_bn, bn or gn (32 groups at most)."""
    group = lambda channels: nn.GroupNorm(math.gcd(32, channels), channels)  # noqa: E731
    return {"frozen_bn": FrozenBatchNorm2d, "bn": nn.BatchNorm2d, "gn": group}[kind]


class ResNetFPN(nn.Module):
    """torchvision's ResNet or ResNeXt under a feature pyramid: [B, 3, H, W] -> 5 maps [B, C, .., ..].

    extra="pool": P2..P6, strides 4..64, P6 by subsampling P5 (two-stage detectors).
    extra="conv": P3..P7, strides 8..128, P6 and P7 by convolution (RetinaNet).
    With weights the stem and the first stages are frozen, and with norm="auto" all BN is; from
    scratch ("none") nothing is, and norm="auto" means GroupNorm, in the pyramid too. "random" is
    like "imagenet" in all but the values. Raises BadInput if the weights cannot be had.
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
        norm = ("gn" if scratch else "frozen_bn") if norm == "auto" else norm
        try:
            net = torchvision.models.get_model(
                name,
                # V1: the recipe behind the papers' weights. V2 classifies better, detects alike.
                weights="IMAGENET1K_V1" if weights == "imagenet" else None,
                norm_layer=make_norm(norm),
            )
            if weights not in ("imagenet", "none", "random"):
                state = torch.load(weights, map_location="cpu", weights_only=True)
                net.load_state_dict(state)
        except Exception as e:  # a download fails in many ways, a file in as many
            why = f"{name}, weights {weights}: {type(e).__name__}: {e}"
            if weights not in ("none", "random"):
                why += "\n--backbone-weights takes a downloaded .pth file, or none: from scratch"
            raise BadInput(why) from e
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.stages = nn.ModuleList([net.layer1, net.layer2, net.layer3, net.layer4])
        self.frozen = 0 if scratch else frozen_stages
        for part in [self.stem, *self.stages][: self.frozen]:
            part.requires_grad_(False)
        width = net.fc.in_features // 8
        channels = [width, 2 * width, 4 * width, 8 * width]
        self.first = 1 if extra == "conv" else 0
        self.strides = tuple(2 ** (i + 2 + self.first) for i in range(5))
        self.fpn = FeaturePyramidNetwork(
            channels[self.first :],
            out_channels,
            ConvP6P7(channels[-1], out_channels) if extra == "conv" else LastLevelMaxPool(),
            norm_layer=make_norm(norm) if scratch else None,
        )
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


# ------------------------------------------------------------------------------ anchors, RPN


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


class RPN(nn.Module):
    """Region proposal network (Faster R-CNN with FPN): what two-stage detectors start from.

    One 3x3 convolution, shared by the levels, then A objectness logits and 4A deltas per cell.
    `pre_nms` boxes a level and `post_nms` an image are kept (in training, in testing).
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
    ):
        super().__init__()
        self.strides, self.scales, self.ratios = strides, (scale,), ratios
        self.pre_nms, self.post_nms, self.nms_iou = pre_nms, post_nms, nms_iou
        self.num_samples = num_samples
        self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.logits = nn.Conv2d(in_channels, len(ratios), 1)
        self.deltas = nn.Conv2d(in_channels, 4 * len(ratios), 1)
        for layer in (self.conv, self.logits, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, features: list[Tensor]):
        """-> anchors [N, 4], logits [B, N], deltas [B, N, 4] (float32), anchors per level."""
        hidden = [F.relu(self.conv(f)) for f in features]
        shapes = [f.shape[-2:] for f in features]
        anchors = make_anchors(shapes, self.strides, self.scales, self.ratios, features[0].device)
        logits = flatten_levels([self.logits(h) for h in hidden], 1).squeeze(-1).float()
        deltas = flatten_levels([self.deltas(h) for h in hidden], 4).float()
        return anchors, logits, deltas, [h * w * len(self.ratios) for h, w in shapes]

    @torch.no_grad()
    def proposals(self, output, sizes: Tensor, training: bool = False) -> tuple[Tensor, Tensor]:
        """Best proposals of each image: boxes [B, P, 4] (best first, clipped), valid [B, P]."""
        anchors, logits, deltas, per_level = output
        logits = torch.where(inside_image(anchors, sizes), logits.detach(), -torch.inf)
        picked, first = [], 0
        for n in per_level:
            index = logits[:, first : first + n].topk(min(n, self.pre_nms[not training]), dim=1)[1]
            picked.append(index + first)
            first += n
        level = torch.cat([torch.full_like(p, i) for i, p in enumerate(picked)], 1)
        index = torch.cat(picked, 1)  # [B, M]
        B, M = index.shape
        scores = logits.gather(1, index)
        boxes = decode_boxes(anchors[index], deltas.gather(1, index[..., None].expand(-1, -1, 4)))
        boxes = clip_boxes(boxes, sizes[:, None])
        scores[(boxes[..., 2:] <= boxes[..., :2]).any(-1)] = -torch.inf
        image = torch.arange(B, device=index.device)[:, None].expand(-1, M)
        keep, _ = kernels.nms_padded(  # indices, then -1: nobody waits for their number
            boxes.flatten(0, 1),
            scores.flatten(),
            (image * len(per_level) + level).flatten(),
            self.nms_iou,
        )
        most = min(self.post_nms[not training], M)
        padded = F.pad(scores.flatten(), (0, 1), value=-torch.inf)  # its last is whom -1 means
        kept = torch.full_like(padded, -torch.inf)
        kept[keep] = padded[keep]
        best, index = kept[:-1].view(B, M).topk(most, dim=1)
        valid = best > -torch.inf
        return boxes.gather(1, index[..., None].expand(-1, -1, 4)) * valid[..., None], valid

    def loss(self, output, sizes: Tensor, targets: list[dict]) -> dict[str, Tensor]:
        """Objectness (BCE) and box (smooth L1, beta 1/9) losses over sampled anchors."""
        anchors, logits, deltas, _ = output
        gt_boxes, _, gt_valid, gt_ignore = pad_targets(targets)
        # choice: a gt keeps its best anchors from IoU 0.3 on; the papers give 0.7 and 0.3 alone.
        inside = inside_image(anchors, sizes)
        here = anchors * inside[..., None]  # in the padding: no area, so nobody's best anchor
        labels, matched, _ = match(here, gt_boxes, 0.7, 0.3, gt_valid, gt_ignore, low_quality=0.3)
        labels[~inside] = -1
        index, valid = sample(labels, self.num_samples, 0.5)
        positive = valid & (labels.gather(1, index) == 1)
        num = global_mean(valid.sum())
        logit = logits.gather(1, index)
        objectness = F.binary_cross_entropy_with_logits(logit, positive.float(), reduction="none")
        gt = gt_boxes.gather(1, matched.gather(1, index)[..., None].expand(-1, -1, 4))
        wanted = encode_boxes(anchors[index], gt)
        delta = deltas.gather(1, index[..., None].expand(-1, -1, 4))
        box = F.smooth_l1_loss(delta, wanted, beta=1 / 9, reduction="none").sum(-1)
        return {
            "rpn_cls": torch.where(valid, objectness, 0).sum() / num,
            "rpn_box": torch.where(positive, box, 0).sum() / num,
        }


def inside_image(anchors: Tensor, sizes: Tensor) -> Tensor:
    """[B, N]: is the anchor's centre in the image, not in the padding of the batch?"""
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    return (centre < sizes.flip(-1)[:, None]).all(-1)


@torch.no_grad()
def sample_rois(proposals: Tensor, valid: Tensor, targets: list[dict], num: int, fraction: float):
    """Training RoIs of a two-stage head: gts are added, matched at IoU 0.5, and sampled.

    proposals [B, P, 4], valid [B, P] -> rois [R, 5] (image, box), labels [R] (0..K-1, or -1 for
    background: the head knows K) and gt boxes [R, 4] (of positives).
    """
    gt_boxes, gt_labels, gt_valid, gt_ignore = pad_targets(targets)
    boxes = torch.cat([gt_boxes, proposals], 1)
    valid = torch.cat([gt_valid, valid], 1)
    labels, matched, _ = match(boxes, gt_boxes, 0.5, 0.5, gt_valid, gt_ignore)
    labels[~valid] = -1
    index, used = sample(labels, num, fraction)
    image, slot = used.nonzero(as_tuple=True)  # the one place where the host has to wait: R
    index = index[image, slot]
    gt = matched[image, index]
    rois = torch.cat([image[:, None].float(), boxes[image, index]], 1)
    foreground = labels[image, index] == 1
    return rois, torch.where(foreground, gt_labels[image, gt], -1), gt_boxes[image, gt]


RCNN_STDS = (0.1, 0.1, 0.2, 0.2)  # Faster R-CNN scales an RoI's deltas by these


def class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over all processes' RoIs: logits [R, K + 1], labels [R]; 0 with R = 0."""
    total = F.cross_entropy(logits.float(), labels, reduction="sum")
    return total / global_rows(labels)


def class_box_loss(deltas: Tensor, rois: Tensor, labels: Tensor, gt_boxes: Tensor) -> Tensor:
    """Fast R-CNN's box loss: smooth L1 (beta 1) of the true class's deltas, over all R RoIs.

    deltas [R, 4K] as `RCNN_STDS` scales them, rois [R, 5], labels [R] with background K, gt_boxes
    [R, 4]: background adds nothing to the sum, but counts in the mean.
    """
    positive = labels < deltas.shape[1] // 4
    mine = deltas.unflatten(1, (deltas.shape[1] // 4, 4))  # view cannot, with R = 0
    mine = mine[torch.arange(len(mine), device=mine.device), torch.where(positive, labels, 0)]
    wanted = encode_boxes(rois[:, 1:], gt_boxes, RCNN_STDS)
    loss = F.smooth_l1_loss(mine.float(), wanted, reduction="none").sum(1)  # [R]
    return torch.where(positive, loss, 0).sum() / global_rows(loss)


def candidates_by_size(model: nn.Module, images: list[Tensor]) -> dict[str, Tensor]:
    """model.candidates of each group of images that pad to one size, put together.

    Padding counts in GroupNorm's statistics, and is no longer zero behind the first convolution: an
    image padded to the size of another would not be detected as it is alone.
    """
    groups: dict = {}
    for i, image in enumerate(images):
        groups.setdefault(padded_size(image), []).append(i)
    parts = []
    for members in groups.values():
        found = model.candidates([images[i] for i in members])
        index = torch.tensor(members).to(found["image"].device, non_blocking=True)
        parts.append({**found, "image": index[found["image"]]})
    return {k: torch.cat([part[k] for part in parts]) for k in parts[0]}


def two_fc(in_features: int, hidden: int, out_features: int) -> nn.Sequential:
    """Fast R-CNN's head: flattens, two hidden layers, one last that starts at N(0, 0.01)."""
    # choice: the hidden ones start as PyTorch starts them
    last = nn.Linear(hidden, out_features)
    nn.init.normal_(last.weight, std=0.01)
    nn.init.zeros_(last.bias)
    first, second = nn.Linear(in_features, hidden), nn.Linear(hidden, hidden)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), last)


class BaseDetector(nn.Module):
    """Backbone and end, which all detectors share. A method adds `loss`, `outputs` and `select`.

    `candidates`, the boxes that enter the last NMS, is `select(outputs(images), config)`, and
    `finish` takes a config too, so that one forward pass can serve many.
    """

    def __init__(self, config: Config, num_classes: int, extra: str = "pool"):
        super().__init__()
        self.config, self.num_classes = config, num_classes
        self.backbone = ResNetFPN(
            config.backbone,
            config.fpn_channels,
            extra,
            weights=config.backbone_weights,
            norm=config.norm,
            frozen_stages=config.frozen_stages,
        )

    def predict(self, images: list[Tensor]) -> list[dict]:
        return self.finish(candidates_by_size(self, images), len(images))

    @torch.no_grad()
    def candidates(self, images: list[Tensor]) -> dict[str, Tensor]:
        return self.select(self.outputs(images), self.config)

    def finish(self, candidates: dict, num_images: int, config: Config | None = None) -> list[dict]:
        """NMS inside each image and class, then each image's best, under this config or another."""
        config, keys = config or self.config, ("boxes", "scores", "labels", "image")
        boxes, scores, labels, image = (candidates[k] for k in keys)
        groups = image * self.num_classes + labels
        keep, scores = self.suppress(boxes, scores, groups, config)
        best = best_per_image(image[keep], num_images, config.max_detections)
        keep, scores = keep[best], scores[best]
        return split_images(boxes[keep], scores, labels[keep], image[keep], num_images)

    def suppress(self, boxes: Tensor, scores: Tensor, groups: Tensor, config: Config):
        """Indices kept, best first, and their scores: a method may have its own."""
        keep = kernels.batched_nms(boxes, scores, groups, config.nms_iou)
        return keep, scores[keep]


class TwoStage(BaseDetector):
    """RPN and RoIs of a two-stage detector; a method adds heads.

    Reads of the method's config: anchor_scale, proposals_train, proposals_test, roi_samples,
    roi_positive, max_detections, and what `ResNetFPN` takes.
    """

    def __init__(self, config: Config, num_classes: int):
        super().__init__(config, num_classes)
        boxes = (config.proposals_train, config.proposals_test)
        scale = config.anchor_scale
        self.rpn = RPN(config.fpn_channels, scale=scale, pre_nms=boxes, post_nms=boxes)
        self.strides = self.backbone.strides[:4]  # RoIs are pooled from P2..P5

    def training_rois(self, images: list[Tensor], targets: list[dict]):
        """-> features, sizes [B, 2], RPN's losses; rois [R, 5], labels [R] (background K), gts [R, 4].

        The gts of background RoIs mean nothing.
        """
        config, (batch, sizes) = self.config, pad_images(images)
        features = self.backbone(batch)
        output = self.rpn(features)
        losses = self.rpn.loss(output, sizes, targets)
        proposals, valid = self.rpn.proposals(output, sizes, training=True)
        rois, labels, gt_boxes = sample_rois(
            proposals, valid, targets, config.roi_samples, config.roi_positive
        )
        labels = torch.where(labels >= 0, labels, self.num_classes)
        return features, sizes, losses, rois, labels, gt_boxes

    def test_rois(self, images: list[Tensor]):
        """-> features, sizes [B, 2]; rois [R, 5] and the image [R] of each."""
        batch, sizes = pad_images(images)
        features = self.backbone(batch)
        proposals, valid = self.rpn.proposals(self.rpn(features), sizes)
        image, slot = valid.nonzero(as_tuple=True)
        rois = torch.cat([image[:, None].float(), proposals[image, slot]], 1)
        return features, sizes, rois, image

    def pool(self, features: list[Tensor], rois: Tensor, size: int) -> Tensor:
        """RoIAlign of rois [R, 5] from P2..P5 -> [R, C, size, size]."""
        return kernels.roi_align(features[:4], rois, size, self.strides)


# ------------------------------------------------------------------------------ RetinaNet


class RetinaTowers(nn.Module):
    """RetinaNet's two towers, shared by the levels: four 3x3 convolutions each, then predictions.

    L maps -> cls_logits [B, N, K], box_deltas [B, N, 4], and the box tower's last maps (L, for
    heads that predict more from them); N = sum(H*W*A). `groups`: of a GroupNorm after each tower
    convolution, 0 for none as in the papers. Training from nothing needs it: at N(0, 0.01) a narrow
    tower passes almost no signal on.
    """

    def __init__(
        self,
        in_channels: int,
        num_anchors: int,
        num_classes: int,
        num_convs: int = 4,
        groups: int = 0,
    ):
        super().__init__()

        def tower() -> nn.Sequential:
            layers: list[nn.Module] = []
            for _ in range(num_convs):
                layers.append(nn.Conv2d(in_channels, in_channels, 3, padding=1))
                layers += [nn.GroupNorm(groups, in_channels)] if groups else []
                layers.append(nn.ReLU())
            return nn.Sequential(*layers)

        self.num_classes = num_classes
        self.cls_tower, self.box_tower = tower(), tower()
        self.cls_logits = nn.Conv2d(in_channels, num_anchors * num_classes, 3, padding=1)
        self.box_deltas = nn.Conv2d(in_channels, num_anchors * 4, 3, padding=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)
        nn.init.constant_(self.cls_logits.bias, -math.log((1 - 0.01) / 0.01))  # prior 0.01

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        box_features = [self.box_tower(f) for f in features]
        logits = [self.cls_logits(self.cls_tower(f)) for f in features]
        deltas = [self.box_deltas(f) for f in box_features]
        logits = flatten_levels(logits, self.num_classes).float()
        return logits, flatten_levels(deltas, 4).float(), box_features


class FocalLoss(torch.autograd.Function):
    """`focal_loss` and its slope in one pass over the logits; one buffer of their size is kept.

    Every entry is taken as a negative, then the M true ones are exchanged: no one-hot target.
    """

    @staticmethod
    def forward(ctx, logits, labels, alpha, gamma):
        M, K = logits.shape
        loss = logits.new_empty(M)
        slope = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        foreground = ((labels >= 0) & (labels < K))[:, None]  # [M, 1], as all that is of true ones
        true = labels.clamp(0, K - 1)[:, None]
        logit = logits.gather(1, true)
        rest, entropy = (-logit).sigmoid(), F.softplus(-logit)  # 1 - p, -log p
        weight = alpha * rest**gamma
        positive = weight * entropy
        exchanged = -weight * (rest + gamma * logit.sigmoid() * entropy)
        # A CPU is fastest where a chunk stays in its cache, a GPU where there are few.
        rows = max(1, 2 ** (17 if logits.device.type == "cpu" else 24) // K)
        for part in (slice(i, i + rows) for i in range(0, M, rows)):
            probs, entropies = logits[part].sigmoid(), F.softplus(logits[part])
            weights = (probs**gamma).mul_(1 - alpha)
            terms, at, mine = weights * entropies, true[part], foreground[part]
            # Exchanged before the sum: a sure positive's loss is far below its loss as a negative.
            terms.scatter_(1, at, torch.where(mine, positive[part], terms.gather(1, at)))
            loss[part] = terms.sum(1)
            if slope is not None:  # weight' = weight gamma (1 - probs), entropy' = probs
                entropies.mul_(gamma * (1 - probs)).add_(probs)
                torch.mul(entropies, weights, out=slope[part])
        if slope is not None:
            slope.scatter_(1, true, torch.where(foreground, exchanged, slope.gather(1, true)))
            ctx.save_for_backward(slope, labels)
        return torch.where(labels >= 0, loss, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        slope, labels = ctx.saved_tensors
        return slope * torch.where(labels >= 0, gradient, 0)[:, None], None, None, None


def focal_loss(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss [M] of logits [M, K] with integer labels [M]: K background, -1 ignored.

    >>> focal_loss(torch.zeros(2, 1), torch.tensor([0, 1])) / math.log(2)  # true class, background
    tensor([0.0625, 0.1875])
    """
    return FocalLoss.apply(logits, labels, alpha, gamma)


def retina_anchors(features: list[Tensor], strides, scale: float = 4.0):
    """RetinaNet's nine anchors a cell (three octave scales, three ratios): [N, 4], N per level."""
    shapes = [f.shape[-2:] for f in features]
    scales = [scale * 2 ** (octave / 3) for octave in range(3)]
    anchors = make_anchors(shapes, strides, scales, (0.5, 1.0, 2.0), features[0].device)
    return anchors, [9 * h * w for h, w in shapes]


def match_anchors(anchors: Tensor, sizes: Tensor, targets: list[dict], high=0.5, low=0.4):
    """RetinaNet's assignment; every gt keeps its best anchor, anchors in the padding do not train.

    anchors [N, 4] -> labels [B, N] (1, 0, -1), and the gt that each anchor overlaps most, or that
    has no better anchor: boxes [B, N, 4] and classes [B, N] (zeros where an image has none but
    crowds).
    """
    gt_boxes, gt_labels, valid, ignore = pad_targets(targets)
    inside = inside_image(anchors, sizes)
    here = anchors * inside[..., None]  # in the padding: no area, so nobody's best anchor
    labels, matched, _ = match(here, gt_boxes, high, low, valid, ignore, low_quality=0.0)
    labels[~inside] = -1
    gt_boxes = gt_boxes * valid[..., None]  # who meets no gt is given the first, maybe a crowd
    image = torch.arange(len(labels), device=labels.device)[:, None]
    return labels, gt_boxes[image, matched], gt_labels[image, matched]


def class_targets(labels: Tensor, gt_labels: Tensor, num_classes: int) -> Tensor:
    """labels (1, 0, -1) and the classes of their gts -> what `focal_loss` takes: 0..K-1, K, -1."""
    return torch.where(labels == 1, gt_labels, torch.where(labels == 0, num_classes, -1))


def count_positives(labels: Tensor) -> Tensor:
    """RetinaNet's normaliser: positives of labels [B, N], at least one an image (MMDetection)."""
    return global_mean((labels == 1).sum(1).clamp(min=1).sum())


def best_predictions(
    best: Tensor, score, per_level: list[int], most: int, threshold: float, all_classes: bool
):
    """Up to `most` scores a level and image, of (anchor, class) pairs, above the threshold.

    best [B, N] is each anchor's highest score; score((image, anchor) [B, M]) -> [B, M, K] gives all
    of some anchors. The best pairs are on the best anchors, so the rest are never computed. With
    `all_classes` the limit is of anchors: all their classes above the threshold.
    -> image, anchor, label, score, each [number found].
    """
    image = torch.arange(len(best), device=best.device)[:, None]  # [B, 1]
    picked, first = [], 0
    for n in per_level:
        top, anchor = best[:, first : first + n].topk(min(n, most), dim=1)
        anchor = anchor + first  # [B, M]
        scores = torch.where(top[..., None] > threshold, score((image, anchor)), 0)  # [B, M, K]
        pairs = scores[0].numel()
        value, pair = scores.flatten(1).topk(pairs if all_classes else min(pairs, most), dim=1)
        anchor = anchor.gather(1, pair // scores.shape[-1])
        picked.append((value, anchor, pair % scores.shape[-1]))
        first += n
    scores, anchor, label = (torch.cat(parts, 1) for parts in zip(*picked))
    found = (scores > threshold).nonzero(as_tuple=True)
    return found[0], anchor[found], label[found], scores[found]


class RetinaNet(BaseDetector):
    """Backbone, anchors and choice of boxes of a RetinaNet; a method adds `loss`, and may `rank`.

    `head` is RetinaTowers or like it. Reads of the method's config: tower_convs, tower_groups,
    anchor_scale, top_scores, all_classes, score_threshold, nms_iou, max_detections, and what
    `ResNetFPN` takes.
    """

    def __init__(self, config: Config, num_classes: int, head: type[nn.Module] = RetinaTowers):
        super().__init__(config, num_classes, extra="conv")
        towers = config.tower_convs, config.tower_groups
        self.head = head(config.fpn_channels, 9, num_classes, *towers)
        self.to(memory_format=torch.channels_last)

    def outputs(self, images: list[Tensor]) -> dict:
        """What the network says of N anchors an image.

        cls_logits [B, N, K], deltas [B, N, 4], third: the head's third output, anchors [N, 4],
        per_level: N of each level, sizes [B, 2].
        """
        batch, sizes = pad_images(images)
        features = self.backbone(batch)
        anchors, per_level = retina_anchors(
            features, self.backbone.strides, self.config.anchor_scale
        )
        out = dict(zip(("cls_logits", "deltas", "third"), self.head(features)))
        return out | dict(anchors=anchors, per_level=per_level, sizes=sizes)

    def rank(self, probs: Tensor, outputs: dict, at: tuple, config: Config) -> Tensor:
        """Scores [..., K] of the anchors at = (image, anchor) from their class probs; rising."""
        return probs

    def select(self, outputs: dict, config: Config) -> dict[str, Tensor]:
        """The boxes that enter NMS: boxes, scores, labels, and the image and anchor of each."""
        logits, anchors, sizes = (outputs[k] for k in ("cls_logits", "anchors", "sizes"))

        def rank(logits: Tensor, at: tuple) -> Tensor:
            return self.rank(logits.sigmoid(), outputs, at, config)

        # The score rises with p, so an anchor's best is that of its best class: no [B, N, K] here.
        best = rank(logits.amax(-1, keepdim=True), (slice(None), slice(None))).squeeze(-1)
        best = torch.where(inside_image(anchors, sizes), best, 0)
        image, anchor, labels, scores = best_predictions(
            best,
            lambda at: rank(logits[at], at),
            outputs["per_level"],
            config.top_scores,
            config.score_threshold,
            config.all_classes,
        )
        boxes = decode_boxes(anchors[anchor], outputs["deltas"][image, anchor])
        boxes = clip_boxes(boxes, sizes[image])
        return dict(boxes=boxes, scores=scores, labels=labels, image=image, anchor=anchor)


class Variants(nn.Module):
    """A detector under several configs at once: one forward pass, then each its own.

    Needs outputs(images), select(outputs, config) -> candidates, finish(candidates, B, config).
    """

    def __init__(self, model: nn.Module, configs: list):
        super().__init__()
        self.model, self.configs = model, configs

    def candidates(self, images: list[Tensor]) -> dict[str, Tensor]:
        outputs = self.model.outputs(images)
        found = [self.model.select(outputs, c) for c in self.configs]
        for i, f in enumerate(found):
            f["variant"] = torch.full_like(f["labels"], i)
        return {k: torch.cat([f[k] for f in found]) for k in found[0]}

    def finish(self, candidates: dict[str, Tensor], num_images: int) -> list[dict]:
        merged: list[list] = [[] for _ in range(num_images)]
        for i, config in enumerate(self.configs):
            mine = candidates["variant"] == i
            part = {k: v[mine] for k, v in candidates.items()}
            for found, own in zip(self.model.finish(part, num_images, config), merged):
                own.append({**found, "variant": torch.full_like(found["labels"], i)})
        return [{k: torch.cat([f[k] for f in own]) for k in own[0]} for own in merged]


def evaluate_variants(model: nn.Module, configs: dict, data: Dataset, config: Config, device):
    """Metrics of `model` under each of `configs`, from one forward pass over the data."""
    results: dict[str, list] = {name: [] for name in configs}
    for target, found in detect(Variants(model, list(configs.values())), data, config, device):
        variant = found.pop("variant")
        for i, mine in enumerate(results.values()):
            part = {k: v[variant == i] for k, v in found.items()}
            mine += to_coco(target["image_id"], part, data.categories)
    shares = gather(results)
    metrics = None
    if rank_and_world()[0] == 0:
        truth = data.coco()
        merged = {name: [r for share in shares for r in share[name]] for name in configs}
        metrics = {name: coco_metrics(truth, r) for name, r in merged.items()}
    return gather(metrics)[0]


def study(name: str, model, configs: dict, data: Dataset, config: Config, device, out: Path):
    """`evaluate_variants`, as a table and as OUT/name.json."""
    rows = evaluate_variants(model, configs, data, config, device)
    show_table(rows)
    if rank_and_world()[0] == 0:
        write_json(out / f"{name}.json", rows)
    return rows


class Unsuppressed(nn.Module):
    """A one-stage detector's boxes as they enter NMS, image by image, selected under a config."""

    def __init__(self, model: nn.Module, config: Config):
        super().__init__()
        self.model, self.config = model, config

    def candidates(self, images: list[Tensor]) -> dict[str, Tensor]:
        return self.model.select(self.model.outputs(images), self.config)

    def finish(self, candidates: dict[str, Tensor], num_images: int) -> list[dict]:
        image = candidates["image"]
        return [{k: v[image == i] for k, v in candidates.items()} for i in range(num_images)]


def candidates_with_iou(model: nn.Module, data: Dataset, config: Config, device):
    """Yield (image id, boxes as they enter NMS) of this process's images; for each box also

    `iou` [n], with the best object of its own label, and `iou_any` [n], of any; 0 with none. Crowds
    and difficult objects do not count, so that a box on one has IoU 0.
    """
    label = {c["id"]: i for i, c in enumerate(data.categories)}
    objects: dict = {}
    for a in data.coco()["annotations"]:
        if not (a.get("iscrowd", 0) or a.get("difficult", 0)):
            objects.setdefault(a["image_id"], []).append((a["bbox"], label[a["category_id"]]))
    for target, found in detect(Unsuppressed(model, config), data, config, device):
        mine = objects.get(target["image_id"], [])
        ious = torchvision.ops.box_iou(found["boxes"], xywh_to_xyxy([box for box, _ in mine]))
        ious = F.pad(ious, (0, 1))  # [n, G + 1]: an image may have no object
        same = found["labels"][:, None] == torch.tensor([k for _, k in mine] + [-1])
        yield target["image_id"], {**found, "iou": (ious * same).amax(1), "iou_any": ious.amax(1)}


def correlation(x: Tensor, y: Tensor) -> dict[str, float | None]:
    """Pearson's and Spearman's coefficient of x and y [n]; None where undefined.

    >>> correlation(torch.tensor([1., 2., 3.]), torch.tensor([1., 4., 9.]))["spearman"]
    1.0
    """
    found: dict[str, float | None] = dict(pearson=None, spearman=None)

    def ranks(v: Tensor) -> Tensor:  # equal values share their mean rank
        _, place, count = v.unique(return_inverse=True, return_counts=True)
        return (count.cumsum(0) - (count - 1) / 2)[place]

    for name, pair in zip(found, ((x, y), (ranks(x), ranks(y)))):
        value = torch.corrcoef(torch.stack(pair).double())[0, 1].item() if len(x) > 1 else math.nan
        found[name] = round(value, 4) if value == value else None
    return found


# ------------------------------------------------------------------------------ post-processing


def over_threshold(probs: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of probs [R, K] above a threshold: their row [N], label [N] and score [N]."""
    row, label = (probs > threshold).nonzero(as_tuple=True)
    return row, label, probs[row, label]


def best_per_image(image: Tensor, num_images: int, most: int) -> Tensor:
    """Mask [N]: the first `most` entries of each image, in the order given (image [N])."""
    seen = F.one_hot(image, num_images).cumsum(0)  # [N, B]
    return seen.gather(1, image[:, None])[:, 0] <= most


def split_images(boxes: Tensor, scores: Tensor, labels: Tensor, image: Tensor, num_images: int):
    """Flat detections, best score first -> one dict of boxes, scores, labels per image."""
    order = image.argsort(stable=True)
    counts = torch.bincount(image, minlength=num_images).tolist()
    parts = [x[order].split(counts) for x in (boxes, scores, labels)]
    return [dict(zip(("boxes", "scores", "labels"), part)) for part in zip(*parts)]


# ------------------------------------------------------------------------------ evaluation


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value) -> list:
    """`value` of every process, as a list; [value] where there is one.

    Travels through gloo, so that small messages never wait for the GPU.
    """
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    if not _GLOO:
        _GLOO.append(dist.new_group(backend="gloo"))
    values = [None] * world
    dist.all_gather_object(values, value, group=_GLOO[0])
    return values


_GLOO: list = []


def progress(iterable, what: str, total: int):
    """A bar on a terminal; elsewhere a line every half minute. On the first process only."""
    first, terminal = rank_and_world()[0] == 0, sys.stderr.isatty()

    def lines():
        shown = time.perf_counter()
        for i, item in enumerate(iterable):
            if time.perf_counter() - shown > 30:
                say(f"{what}: {i} of {total}")
                shown = time.perf_counter()
            yield item

    if first and not terminal and iterable is not None:
        return lines()
    return tqdm(iterable, desc=what, total=total, disable=not (first and terminal), leave=False)


def autocast(config: Config, device: torch.device):
    """The context of a forward pass: bf16 where `config.amp` and the device say so."""
    supported = device.type == "cuda" and torch.cuda.is_bf16_supported()
    on = config.amp == "bf16" or (config.amp == "auto" and supported)
    return torch.autocast(device.type, torch.bfloat16, enabled=on)


@torch.no_grad()
def detect(model: nn.Module, data: Dataset, config: Config, device: torch.device):
    """Yield (target, detections in the original image's pixels) for this process's images.

    With several test scales, or the mirrored image too, the candidates of all are merged before
    the last NMS. Every image is seen exactly once over all processes, in order of aspect: a batch
    then has few padded sizes. The target's boxes are in pixels of the last scale.
    """
    model.eval()
    rank, world = rank_and_world()
    aspect = data.sizes[:, 1] / data.sizes[:, 0]
    mine = sorted(range(rank, len(data), world), key=aspect.__getitem__)
    batch = config.eval_batch or per_process_batch(config)
    loaders = [
        make_loader(Resized(data, config, False, s), config, device, sampler=mine, batch_size=batch)
        for s in config.test_scales
    ]
    for batches in progress(zip(*loaders), "detecting", len(loaders[0])):
        merged = []
        for items in batches:
            images, targets = to_device(items, device)
            for flip in (False, True)[: 1 + config.test_flip]:
                with autocast(config, device):
                    seen = [i.flip(-1) for i in images] if flip else images
                    found = candidates_by_size(model, seen)
                inner = torch.tensor([i.shape[1:] for i in images], device=device)
                outer = torch.tensor([t["size"] for t in targets], device=device)
                boxes, index = found["boxes"], found["image"]
                if flip:
                    width = inner[index, 1]
                    mirrored = [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]]
                    boxes = torch.stack(mirrored, 1)
                grow = (
                    (outer / inner).flip(-1).repeat(1, 2)
                )  # (w, h, w, h): sides are rounded apart
                merged.append({**found, "boxes": boxes * grow[index]})
        candidates = {k: torch.cat([m[k] for m in merged]) for k in merged[0]}
        for target, found in zip(targets, model.finish(candidates, len(images))):
            yield target, {k: v.cpu() for k, v in found.items()}


def to_coco(image_id, found: dict, categories: list[dict]) -> list[dict]:
    """Detections of an image -> COCO results: xywh boxes, the data set's own category ids."""
    results = []
    for (x1, y1, x2, y2), score, label in zip(
        found["boxes"].tolist(), found["scores"].tolist(), found["labels"].tolist()
    ):
        bbox = [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)]
        category = categories[label]["id"]
        results.append(
            {"image_id": image_id, "category_id": category, "bbox": bbox, "score": score}
        )
    return results


COCO_NAMES = "AP AP50 AP75 AP_small AP_medium AP_large AR1 AR10 AR100 AR_small AR_medium AR_large"


def coco_metrics(truth: dict, results: list[dict]) -> dict:
    """pycocotools' twelve numbers, AP60..AP90 and per-class AP, in [0, 1]; None where undefined.

    Objects marked `difficult` are ignored like COCO's out-of-range areas; crowds as COCO does. For
    data with such marks (VOC) the 11-point AP of VOC 2007 at IoU 0.5 is added as `voc07_AP50`.
    Without annotations (COCO's test sets) all are None.
    """
    if not truth["annotations"]:
        results = []  # spares matching a million detections with nothing
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    class Evaluation(COCOeval):
        def _prepare(self):
            super()._prepare()  # which sets `ignore` from iscrowd alone
            for objects in self._gts.values():
                for a in objects:
                    a["ignore"] = a["ignore"] or a.get("difficult", 0)

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        found = coco.loadRes(copy.deepcopy(results)) if results else COCO()
        evaluation = Evaluation(coco, found, "bbox")
        evaluation.params.imgIds = sorted(image["id"] for image in truth["images"])
        evaluation.params.catIds = sorted(c["id"] for c in truth["categories"])
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # precision [10 IoUs, 101 recalls, K, 4 areas, 3 maxDets], -1 where a class has no object
    precision = torch.from_numpy(evaluation.eval["precision"][:, :, :, 0, -1]).float()
    precision[precision < 0] = torch.nan
    number = lambda v: None if v != v or v < 0 else float(v)  # noqa: E731
    metrics = {k: number(v) for k, v in zip(COCO_NAMES.split(), evaluation.stats)}
    for iou in (60, 70, 80, 90):
        metrics[f"AP{iou}"] = number(precision[(iou - 50) // 5].nanmean())
    if any("difficult" in a for a in truth["annotations"]):
        metrics["voc07_AP50"] = voc07_ap(truth, results)
    names = {c["id"]: c["name"] for c in truth["categories"]}
    per_class = precision.nanmean((0, 1)).tolist()
    metrics["per_class"] = {
        names[i]: number(ap) for i, ap in zip(evaluation.params.catIds, per_class)
    }
    return metrics


def voc07_ap(truth: dict, results: list[dict], iou: float = 0.5) -> float:
    """Mean over classes of VOC 2007's 11-point AP, with the challenge's own rules of matching.

    A detection belongs to the object it overlaps most; a second one on the same object is false;
    one on a difficult object counts neither way.
    """
    groups: dict = {}
    for a in truth["annotations"]:
        groups.setdefault((a["category_id"], a["image_id"]), []).append(a)
    aps = []
    for category in truth["categories"]:
        mine = sorted(  # of equal scores the same one first, whatever the order of detection
            (r for r in results if r["category_id"] == category["id"]),
            key=lambda r: (-r["score"], r["image_id"]),
        )
        objects = {k[1]: v for k, v in groups.items() if k[0] == category["id"]}
        num = sum(not a.get("difficult", 0) for v in objects.values() for a in v)
        if not num:
            continue
        boxes = {k: xywh_to_xyxy([a["bbox"] for a in v]) for k, v in objects.items()}
        taken, hits = set(), []
        for r in mine:
            image_id, value, best = r["image_id"], 0.0, -1
            if image_id in boxes:
                overlap = torchvision.ops.box_iou(xywh_to_xyxy([r["bbox"]]), boxes[image_id])[0]
                value, best = overlap.max(0)
            if value <= iou:
                hits.append(False)
            elif not objects[image_id][best].get("difficult", 0):
                hits.append((image_id, int(best)) not in taken)
                taken.add((image_id, int(best)))
        hits = torch.tensor(hits, dtype=torch.float64).cumsum(0)
        recall, precision = hits / num, hits / torch.arange(1, len(hits) + 1)
        at = [precision[recall >= t / 10 - 1e-9] for t in range(11)]
        aps.append(sum(p.max().item() if len(p) else 0 for p in at) / 11)
    return sum(aps) / len(aps) if aps else 0.0


def xywh_to_xyxy(boxes) -> Tensor:
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return torchvision.ops.box_convert(boxes, "xywh", "xyxy")


def evaluate(model: nn.Module, data: Dataset, config: Config, device=None, out=None) -> dict:
    """Detect in all images of `data` and score with pycocotools; all processes get the metrics.

    With `out` (first process) writes predictions.json, metrics.json and detections.png there. Of a
    set without annotations the metrics are all None: predictions.json is for its server.
    """
    device = device or next(model.parameters()).device
    results, seen = [], 0
    for target, found in detect(model, data, config, device):
        results += to_coco(target["image_id"], found, data.categories)
        seen += 1
    shares = gather((results, seen))
    metrics = None
    if rank_and_world()[0] == 0:
        results, counts = [r for share, _ in shares for r in share], [n for _, n in shares]
        results.sort(key=lambda r: r["image_id"])  # the same file from any number of processes
        assert sum(counts) == len(data), f"{counts} images evaluated, the set has {len(data)}"
        metrics = coco_metrics(data.coco(), results)
        if out:
            write_json(Path(out) / "predictions.json", results)
            write_json(Path(out) / "metrics.json", metrics)
            draw_grid(data, results, config.draw_score, Path(out) / "detections.png")
    return gather(metrics)[0]


def show_metrics(metrics: dict) -> str:
    keys = "AP AP50 AP75 AP90 AP_small AP_medium AP_large voc07_AP50".split()
    shown = "  ".join(f"{k} {metrics[k]:.3f}" for k in keys if metrics.get(k) is not None)
    return shown or "no AP: the set has no annotated objects"


def show_table(rows: dict[str, dict]) -> None:
    """Print metrics of several evaluations, one a line, in percent."""
    width, keys = max(map(len, rows)), "AP AP50 AP60 AP70 AP75 AP80 AP90".split()
    say(f"{'':{width}}  " + "  ".join(f"{k:>5}" for k in keys))
    for name, metrics in rows.items():
        values = ("    -" if metrics[k] is None else f"{100 * metrics[k]:5.1f}" for k in keys)
        say(f"{name:{width}}  " + "  ".join(values))


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=None if isinstance(value, list) else 2) + "\n")


# ------------------------------------------------------------------------------ pictures


def draw(image: Tensor, boxes: Tensor, labels, names: list[str], scores=None) -> Tensor:
    """uint8 [3, h, w] with boxes [G, 4], names and scores written on it."""
    import matplotlib

    if not len(boxes):
        return image
    palette = matplotlib.colormaps["tab10"].colors
    colours = [tuple(int(255 * c) for c in palette[label % 10]) for label in labels]
    text = [f"{names[k]} {s:.2f}" for k, s in zip(labels, scores)] if scores is not None else None
    text = text or [names[k] for k in labels]
    font = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    side = min(image.shape[1:])
    return torchvision.utils.draw_bounding_boxes(
        image,
        boxes,
        text,
        colours,
        width=max(2, side // 130),
        label_colors="white",
        label_background_colors=colours,
        fill_labels=True,
        font=font,
        font_size=max(12, side // 26),
    )


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A matplotlib figure, inches, and its axes [rows, columns]: no display, nothing to close."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="tight")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def percent(value: float | None) -> float:
    """A metric for a figure: nan, which leaves a gap, where it is undefined."""
    return math.nan if value is None else 100 * value


def draw_sweep(rows: dict[str, dict], xlabel: str, title: str, path: Path) -> None:
    """AP over a number that `rows` are named by; the row "none" is drawn as a dotted line."""
    figure, ((axis,),) = new_figure(7, 4.5)
    values = {float(k): v for k, v in rows.items() if k != "none"}
    for i, key in enumerate(("AP", "AP50", "AP75", "AP90")):
        axis.plot([*values], [percent(v[key]) for v in values.values()], f"C{i}o-", label=key)
        axis.axhline(percent(rows["none"][key]), color=f"C{i}", ls=":", lw=1)
    axis.set(xlabel=xlabel, ylabel="AP in %", title=title)
    axis.legend()
    figure.savefig(path, dpi=80)


def draw_grid(data: Dataset, results: list[dict], score: float, path: Path, count: int = 6) -> None:
    """A picture of the first images: ground truth beside detections above `score`."""
    names = [c["name"] for c in data.categories]
    label = {c["id"]: i for i, c in enumerate(data.categories)}
    count = min(count, len(data))
    rows = math.ceil(count / 2)
    figure, axes = new_figure(16, 4 * rows, rows, 4)
    for axis in axes.flat:
        axis.axis("off")
    for i in range(count):
        image, target = data[i]
        zoom = max(1, 512 // min(image.shape[1:]))  # enlarge small images, so that text fits
        image = image.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
        mine = [r for r in results if r["image_id"] == target["image_id"] and r["score"] >= score]
        found = xywh_to_xyxy([r["bbox"] for r in mine])
        labels = [label[r["category_id"]] for r in mine]
        truth = draw(image, target["boxes"] * zoom, target["labels"].tolist(), names)
        seen = draw(image, found * zoom, labels, names, [r["score"] for r in mine])
        for axis, picture, title in zip(
            axes.flat[2 * i : 2 * i + 2],
            (truth, seen),
            ("ground truth", f"detections above {score:g}"),
        ):
            axis.imshow(picture.permute(1, 2, 0).numpy())
            axis.set_title(title)
    figure.savefig(path, dpi=70)


def draw_curves(log: list[dict], path: Path) -> None:
    """Losses and learning rate by step, and AP where it was measured."""
    steps, scored = [r for r in log if "losses" in r], [r for r in log if "AP" in r]
    figure, ((left, right),) = new_figure(13, 4.5, 1, 2)
    for name in steps[-1]["losses"] if steps else ():
        left.plot([r["step"] for r in steps], [r["losses"][name] for r in steps], label=name)
    left.plot([r["step"] for r in steps], [r["loss"] for r in steps], "k", lw=2, label="total")
    left.set(xlabel="step", ylabel="loss", title="training losses")
    left.legend()
    rate = left.twinx()
    rate.plot([r["step"] for r in steps], [r["lr"] for r in steps], ":", color="grey")
    rate.set_ylabel("learning rate (dotted)")
    for key in ("AP", "AP50", "AP75", "AP90"):
        values = [math.nan if r[key] is None else r[key] for r in scored]
        right.plot([r["step"] for r in scored], values, "o-", label=key)
    right.set(xlabel="step", ylim=(0, 1), title="validation")
    right.legend()
    figure.savefig(path, dpi=80)


IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")


class Files(Dataset):
    """Images to predict on, from files and folders (searched through, in order of name)."""

    def __init__(self, paths, categories: list[dict]):
        self.files, self.categories = [], categories
        for path in map(Path, paths):
            if path.is_dir():
                inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_ENDINGS)
                if not inside:
                    raise BadInput(f"{path}: no image in this folder ({' '.join(IMAGE_ENDINGS)})")
                self.files += inside
            else:
                self.files.append(path)
        check_images(self.files)
        self.sizes = np.ones((len(self.files), 2))  # unknown: detected in the order given

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int):
        image = read_image(self.files[index])
        empty = torch.zeros(0, 4), [], []
        return image, make_target(*empty, index, tuple(image.shape[1:]))


def predict_files(model, paths, categories: list[dict], config: Config, device, out: Path) -> list:
    """Detect in files and folders; draws OUT/pictures/* and writes OUT/predictions.json.

    Returns the COCO results; each also names its file and category.
    """
    data = Files(paths, categories)
    names = [c["name"] for c in categories]
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    results = []
    for target, found in detect(model, data, config, device):
        file = data.files[target["image_id"]]
        mine = to_coco(target["image_id"], found, categories)
        called = (names[label] for label in found["labels"].tolist())
        results += [{**r, "category": n, "file_name": str(file)} for r, n in zip(mine, called)]
        sure = found["scores"] >= config.draw_score
        boxes, labels, scores = (found[k][sure] for k in ("boxes", "labels", "scores"))
        picture = draw(read_image(file), boxes, labels.tolist(), names, scores.tolist())
        name = f"{target['image_id']:05d}_{file.stem}.jpg"  # files of one name may meet
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(out / "pictures" / name, quality=92)
    results = [r for share in gather(results) for r in share]
    if rank_and_world()[0] == 0:
        write_json(out / "predictions.json", sorted(results, key=lambda r: r["image_id"]))
    return results


# ------------------------------------------------------------------------------ checkpoints


def save_checkpoint(path: Path, state: dict) -> None:
    """Write so that a crash at any moment leaves the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":  # elsewhere folders cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the rename itself
        os.close(folder)


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint of `train`; BadInput names a file that is none, or holds more than weights."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except Exception as e:  # pickle, zip and torch each have their own
        why = str(e).partition("WeightsUnpickler error:")[2].split("\n")[0].strip()
        why = why or type(e).__name__  # torch's other lines advise to load it unsafely
        raise BadInput(f"{path}: not a checkpoint that is safe to load: {why}") from e
    if not isinstance(state, dict) or not {"model", "categories", "config"} <= state.keys():
        raise BadInput(
            f"{path}: not a checkpoint of this project (no model, categories and config)"
        )
    return state


def load_weights(model: nn.Module, state: dict, path, categories: list[dict] | None = None) -> None:
    """Fill the model; BadInput where classes or shapes differ from the checkpoint's."""
    if categories is not None and len(categories) != len(state["categories"]):
        have, want = len(state["categories"]), len(categories)
        raise BadInput(f"{path}: made for {have} classes, the data has {want}")
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as e:
        first = str(e).splitlines()[1].strip()[:200]
        raise BadInput(
            f"{path}: does not fit this model. Was it made by another script, or with other flags? "
            f"{first}"
        ) from e


# ------------------------------------------------------------------------------ training


def per_process_batch(config: Config) -> int:
    """Images per step of this process; BadInput if the batch cannot be shared out evenly."""
    world = rank_and_world()[1]
    total = config.batch or 2 * world
    if total % world:
        raise BadInput(f"--batch {total} cannot be split over {world} processes")
    return total // world


def learning_rate(config: Config, step: int, total: int, batch: int) -> float:
    """Linear scaling rule, linear warm-up from warmup_factor, division by ten at each drop."""
    base = config.lr * batch / config.lr_batch
    warmup = min(config.warmup, total // 10)
    share = min(1.0, step / warmup) if warmup else 1.0
    warm = config.warmup_factor + (1 - config.warmup_factor) * share
    return base * warm * 0.1 ** sum(step >= round(drop * total) for drop in config.drops)


class LossOnly(nn.Module):
    """DDP synchronises what `forward` computes, so training calls the loss through this."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images, targets):
        return self.model.loss(images, targets)


# Flags that say what to do now; the others come with a checkpoint.
ACTIONS = "train eval predict rows bench row preset weights resume out device workers".split()
# Flags that say where the data is; these come with it unless one of the first three is given.
PLACES = "data train_json val_json train_images val_images train_split val_split".split()
# Flags that say how a model is trained, not what it is.
SCHEDULE = "epochs steps lr lr_batch drops batch".split()
# Flags that may differ when a run is continued: they do not change what is learned.
FREE = (
    "log_every save_every eval_every eval_batch test_scales test_flip draw_score".split() + ACTIONS
)


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    weights = [p for p in model.parameters() if p.requires_grad]
    decay = config.weight_decay
    if config.optimizer == "adamw":
        return torch.optim.AdamW(weights, lr=config.lr, weight_decay=decay)
    return torch.optim.SGD(weights, lr=config.lr, momentum=config.momentum, weight_decay=decay)


def resume(path: Path, settings: dict, model, optimizer, categories: list[dict]) -> int:
    """Put a run back to where it was saved; returns the number of steps done."""
    state = load_checkpoint(path)
    differ = [k for k, v in settings.items() if k not in FREE and v != state["config"].get(k)]
    if differ:
        old = " ".join(flag(k, state["config"].get(k)) for k in differ)
        raise BadInput(f"{path}: cannot resume, the run was made with {old}")
    if state["categories"] != categories:
        raise BadInput(f"{path}: cannot resume, the data's categories are others now")
    load_weights(model, state, path)
    optimizer.load_state_dict(state["optimizer"])
    rank, world = rank_and_world()
    if len(state["rng"]) == world:
        main, *cuda = state["rng"][rank]
        torch.set_rng_state(main)
        if cuda and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(cuda[: torch.cuda.device_count()])
    else:
        say(f"{len(state['rng'])} processes before, {world} now: sampling starts anew")
    return state["step"]


def set_aside(out: Path) -> None:
    """Rename an earlier run's folder, so that a new one never writes over it."""
    if rank_and_world()[0] == 0 and (out / "last.pt").exists():
        numbers = (n for n in range(1, 10**6) if not out.with_name(f"{out.name}-{n}").exists())
        older = out.with_name(f"{out.name}-{next(numbers)}")
        out.rename(older)
        say(f"moved the earlier run to {older}")


@contextlib.contextmanager
def signals_caught():
    """A list that collects SIGTERM and SIGINT, which then do not end the process; the third does."""
    caught: list[int] = []

    def catch(number, _):
        caught.append(number)
        if len(caught) == 3:  # somebody insists: the step hangs, and torchrun has sent its own
            raise KeyboardInterrupt

    before = {s: signal.signal(s, catch) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


class LossWatch:
    """The losses since the last line of the log, read without making the GPU wait.

    Their copy to the host travels while the next step is launched, and is looked at only then.
    """

    def __init__(self):
        self.window, self.pending = [], None

    def add(self, step: int, image_ids: list, losses: dict[str, Tensor]) -> None:
        self.check()
        values = torch.stack([v.detach().float() for v in losses.values()])
        copied = torch.cuda.Event() if values.is_cuda else None
        values = values.to("cpu", non_blocking=True)
        if copied:
            copied.record()
        self.window.append(values)
        self.pending = step, image_ids, list(losses), values, copied

    def check(self) -> None:
        """Raise if a loss of the last step added is not finite."""
        if self.pending:
            step, image_ids, names, values, copied = self.pending
            if copied:
                copied.synchronize()
            if not values.isfinite().all():
                shown = ", ".join(f"{n} = {v:.4g}" for n, v in zip(names, values.tolist()))
                raise FloatingPointError(f"step {step}, images {image_ids}: not finite: {shown}")

    def means(self) -> dict[str, float]:
        self.check()
        means = torch.stack(self.window).mean(0).tolist()
        self.window = []
        return dict(zip(self.pending[2], means))


class RunLog:
    """OUT/log.jsonl, a line a logging step or evaluation, and its picture; first process only."""

    def __init__(self, out: Path, start: int):
        self.path, self.lines = out / "log.jsonl", []
        self.silent = rank_and_world()[0] > 0
        if not self.silent:
            out.mkdir(parents=True, exist_ok=True)
            if start and self.path.exists():  # forget the lines of steps that were lost
                for text in self.path.read_text().splitlines():
                    with contextlib.suppress(json.JSONDecodeError):  # a kill may have torn the last
                        line = json.loads(text)
                        self.lines += [line] if line["step"] <= start else []
            whole = self.path.with_name(".log.tmp")
            whole.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
            os.replace(whole, self.path)

    def write(self, line: dict) -> None:
        if not self.silent:
            self.lines.append(line)
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")

    def draw(self) -> None:
        if self.lines and not self.silent:
            draw_curves(self.lines, self.path.with_name("curves.png"))


def train(model: nn.Module, config: Config, train_data, val_data=None, out="runs/model") -> dict:
    """Train to the end of the schedule, or to SIGTERM; returns the last metrics ({} without data).

    OUT receives log.jsonl, last.pt, curves.png and what `evaluate` writes. With config.resume it
    continues from last.pt exactly where that was written.
    """
    out, device = Path(out), next(model.parameters()).device
    rank, world = rank_and_world()
    batch = per_process_batch(config) * world
    batches = TrainBatches(train_data.sizes, batch // world, config.seed)
    batches.total = config.steps or max(1, round(config.epochs * batches.per_epoch))
    # derived: a later test may run on another number of processes
    derived = dict(batch=batch, eval_batch=config.eval_batch or batch // world)
    settings = json.loads(json.dumps({**dataclasses.asdict(config), **derived}))  # tuples as lists
    wrapped = LossOnly(model)
    if world > 1:
        wrapped = nn.parallel.DistributedDataParallel(wrapped)
    optimizer = make_optimizer(model, config)
    torch.manual_seed(config.seed + rank)  # from here on only sampling draws from it
    if config.resume and (out / "last.pt").exists():
        batches.start = resume(out / "last.pt", settings, model, optimizer, train_data.categories)
        say(f"resumed at step {batches.start}")
    else:
        if config.resume:
            say(f"nothing to resume in {out}: starting anew")
        set_aside(out)
    log, watch, metrics = RunLog(out, batches.start), LossWatch(), {}
    if rank == 0:
        write_json(out / "config.json", settings)
    say(
        f"{batches.total} steps of {batch} images ({world} x {batch // world}), "
        f"{batches.total / batches.per_epoch:.3g} epochs of {len(train_data)}; learning rate "
        f"{config.lr} x {batch}/{config.lr_batch} = {config.lr * batch / config.lr_batch:.4g}; "
        f"{config.backbone} at {' '.join(map(str, config.scales))} px, {describe(model)} on {device}"
    )
    loader = make_loader(Resized(train_data, config, True), config, device, batch_sampler=batches)
    bar = progress(None, "training", batches.total)
    bar.update(batches.start)
    logged, clock = batches.start, time.perf_counter()
    with signals_caught() as caught, contextlib.closing(bar):
        for step, items in enumerate(loader, batches.start + 1):
            model.train()
            rate = learning_rate(config, step - 1, batches.total, batch)
            losses, ids = take_step(wrapped, optimizer, rate, items, config, device)
            watch.add(step, ids, losses)
            bar.update()
            stop = max(gather(caught[0] if caught else 0))
            done = stop or step == batches.total
            if done or step % config.log_every == 0:
                means, spent = watch.means(), time.perf_counter() - clock
                line = {"step": step, "epoch": round(step / batches.per_epoch, 3), "lr": rate}
                line |= {"loss": sum(means.values()), "losses": means}
                speed = (step - logged) * batch / spent
                line |= {"images_per_s": speed, "memory_mib": peak_memory(device) >> 20}
                log.write(line)
                left = (batches.total - step) * batch / speed / 60
                parts = " ".join(f"{k} {v:.3f}" for k, v in means.items())
                say(
                    f"step {step}/{batches.total}  loss {line['loss']:.3f} ({parts})  "
                    f"{speed:.2f} images/s, {left:.1f} min left",
                    bar,
                )
                logged, clock = step, time.perf_counter()
            if done or step % config.save_every == 0:
                watch.check()
                cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
                rng = gather([torch.get_rng_state(), *cuda])
                if rank == 0:
                    state = dict(model=model.state_dict(), optimizer=optimizer.state_dict())
                    state |= dict(step=step, rng=rng, config=settings)
                    save_checkpoint(out / "last.pt", {**state, "categories": train_data.categories})
            if stop:
                log.draw()
                say(f"stopped by signal {stop} after step {step}; --resume goes on", bar)
                sys.exit(128 + stop)
            due = config.eval_every and step % config.eval_every == 0
            if val_data is not None and due and not done:
                paused = time.perf_counter()
                share_buffers(model)
                metrics = evaluate(model, val_data, config, device)
                log.write({"step": step, **metrics})
                log.draw()
                say(f"step {step}: {show_metrics(metrics)}", bar)
                clock += time.perf_counter() - paused
    if val_data is not None:  # also where a run is resumed that had only this left to do
        share_buffers(model)
        metrics = evaluate(model, val_data, config, device, out)
        if not any("AP" in r and r["step"] == batches.total for r in log.lines):
            log.write({"step": batches.total, **metrics})
        say(f"step {batches.total}: {show_metrics(metrics)}")
    log.draw()
    return metrics


def share_buffers(model: nn.Module) -> None:
    """Give every process the first one's BN statistics, as DDP does only when a step begins."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def take_step(wrapped, optimizer, rate: float, items: list, config: Config, device):
    """One update of the weights; returns the losses, still on their device, and the image ids."""
    images, targets = to_device(items, device)
    with autocast(config, device):
        losses = wrapped(images, targets)
    optimizer.zero_grad(set_to_none=True)
    sum(losses.values()).backward()
    for group in optimizer.param_groups:
        group["lr"] = rate
        if config.clip_norm:
            nn.utils.clip_grad_norm_(group["params"], config.clip_norm)
    optimizer.step()
    return losses, [t["image_id"] for t in targets]


def say(text: str, bar=None) -> None:
    """Print on the first process, above a progress bar if one is shown."""
    if rank_and_world()[0] == 0:
        tqdm.write(text) if bar is not None and not bar.disable else print(text, flush=True)


def describe(model: nn.Module) -> str:
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return f"{millions:.1f} M parameters, torch {torch.__version__}"


def reset_peak_memory(device: torch.device) -> None:
    """Start a new maximum for `peak_memory`; on a CPU only Linux can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Most bytes held since the start or the last reset, of the GPU or resident; 0 on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) << 10
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


# ------------------------------------------------------------------------------ benchmark


def torchvision_detector(kind: str, config: Config, num_classes: int, **options) -> nn.Module:
    """torchvision's Faster R-CNN (kind "two_stage") or RetinaNet ("one_stage") of the same size.

    Same ResNet, norm, frozen stages, pyramid width and image sizes as `config` asks of ours; the
    rest is torchvision's own. `options` go to its FasterRCNN or RetinaNet.
    """
    from torchvision.models.detection import FasterRCNN, RetinaNet
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    scratch, width = config.backbone_weights == "none", config.fpn_channels
    norm = make_norm({"auto": "gn" if scratch else "frozen_bn"}.get(config.norm, config.norm))
    net = torchvision.models.get_model(config.backbone, weights=None, norm_layer=norm)
    stem = nn.ModuleList([net.conv1, net.bn1])
    for part in [stem, net.layer1, net.layer2, net.layer3, net.layer4][: config.frozen_stages]:
        part.requires_grad_(scratch)
    first = 1 if kind == "one_stage" else 0
    channels = [net.fc.in_features // 8 * 2**i for i in range(first, 4)]
    layers = {f"layer{i + 1}": str(i) for i in range(first, 4)}
    extra = LastLevelP6P7(width, width) if first else LastLevelMaxPool()
    pyramid = norm if scratch else None
    body = BackboneWithFPN(net, layers, channels, width, extra, pyramid)
    settings = dict(min_size=config.scales[0], max_size=config.max_size)
    labels = num_classes and num_classes + 1 - first  # Faster R-CNN counts the background
    return (RetinaNet if first else FasterRCNN)(body, labels, **settings, **options)


def bench(
    model, config: Config, num_classes: int, kind: str, device, repeat: int = 5
) -> list[dict]:
    """Time a training step and a prediction of one paper-sized image beside torchvision's detector.

    Same process, same image, taken in turns; prints medians, multiply-adds and peak memory. Both
    have random weights, which propose and detect at random: the work is that of early training.
    """
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    data = SyntheticDetection(1, config.max_size, 0)
    image, target = data[0]
    image = image[:, : config.scales[0]]
    boxes = clip_boxes(target["boxes"].as_subclass(Tensor), torch.tensor(image.shape[1:]).float())
    keep = (boxes[:, 2:] - boxes[:, :2] > 1).all(1)
    target = {k: target[k][keep] for k in ("labels", "ignore")} | {"boxes": boxes[keep]}
    items = [(image, {**target, "image_id": 0, "size": tuple(image.shape[1:])})]
    images, targets = to_device(items, device)
    other = torchvision_detector(kind, config, num_classes).to(device)
    shift = 1 if kind == "two_stage" else 0  # its label 0 is the background
    theirs = [{"boxes": t["boxes"], "labels": t["labels"] + shift} for t in targets]
    floats = [i.float() / 255 for i in images]
    contenders = {
        "ours": (model, lambda: model.loss(images, targets), lambda: model.predict(images)),
        "torchvision": (other, lambda: other(floats, theirs), lambda: other(floats)),
    }
    rows = []
    for job in ("training step", "prediction"):
        times: dict = {name: [] for name in contenders}
        adds, memory = {}, {}
        for i in range(repeat + 1):
            for name, (net, loss, predict) in contenders.items():
                net.train(job == "training step")
                reset_peak_memory(device)
                counter = FlopCounterMode(display=False) if i == 0 else contextlib.nullcontext()
                start = time.perf_counter()
                with counter, autocast(config, device):
                    if job == "training step":
                        sum(loss().values()).backward()
                        net.zero_grad(set_to_none=True)
                    else:
                        with torch.no_grad():
                            predict()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if i == 0:  # a warm-up
                    adds[name] = counter.get_total_flops() / 2
                else:
                    times[name].append(time.perf_counter() - start)
                    memory[name] = peak_memory(device)
        for name in contenders:
            row = {"job": job, "model": name, "seconds": float(np.median(times[name]))}
            row |= {"giga_multiply_adds": adds[name] / 1e9, "peak_mib": memory[name] >> 20}
            rows.append(row | {"ratio": float(np.median(times["ours"]) / row["seconds"])})
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{torch.get_num_threads()} threads"
    )
    print(
        f"{device} ({name}), torch {torch.__version__}, {config.backbone}, {tuple(image.shape[1:])} px"
    )
    for r in rows:
        print(
            f"{r['job']:14} {r['model']:12} {r['seconds']:8.3f} s  {r['giga_multiply_adds']:8.1f} G "
            f"multiply-adds  {r['peak_mib']:6d} MiB  ours / this: {r['ratio']:.2f}"
        )
    return rows


# ------------------------------------------------------------------------------ command line


def parse(config_class, rows: dict, tiny: dict, name: str, argv=None, actions=()) -> Config:
    """Flags over the checkpoint's settings over the row over the preset over the defaults."""
    cli = lambda default: tyro.cli(  # noqa: E731
        config_class,
        args=argv,
        default=default,
        prog=f"{name}.py",
        description=f"{config_class.__doc__} Defaults shown are those of --preset paper; what a run "
        "used is in its folder's config.json.",
        config=(tyro.conf.AvoidSubcommands,),
    )
    asked = cli(config_class())
    settings = {}
    synthetic = asked.data == "synthetic" and not (asked.train_json or asked.val_json)
    slow = asked.device == "cpu" or not torch.cuda.is_available()
    small = synthetic and slow and not asked.bench
    if asked.preset == "tiny" or (asked.preset == "auto" and small):
        settings |= tiny
    settings |= rows.get(asked.row, {})
    last = Path(asked.out or f"runs/{name}") / "last.pt"
    weights = asked.weights
    uses = asked.eval or asked.predict or any(getattr(asked, action) for action in actions)
    if uses and not asked.train:
        weights = weights or (str(last) if last.exists() else "")
        source = weights
    else:
        source = last if asked.resume and last.exists() else None
    if source:
        saved = {k: v for k, v in load_checkpoint(source)["config"].items() if k not in ACTIONS}
        if any(getattr(asked, k) != getattr(config_class(), k) for k in PLACES[:3]):
            saved = {k: v for k, v in saved.items() if k not in PLACES}
        known = {f.name for f in dataclasses.fields(config_class)}
        settings |= {
            k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if k in known
        }
    config = cli(dataclasses.replace(config_class(), **settings))
    if source and asked.row in rows:  # what makes it that row, and not another one?
        switches = {k for row in rows.values() for k in row} - Config.__dataclass_fields__.keys()
        wanted = {k: getattr(config_class(), k) for k in switches | {"backbone"}}
        wanted = {k: v for k, v in wanted.items() if isinstance(v, (bool, int, str))}
        wanted |= {k: v for k, v in rows[asked.row].items() if k not in SCHEDULE}
        free = tiny.keys() - rows[asked.row].keys()  # these may be the tiny preset's as well
        differ = [
            flag(k, v)
            for k, v in wanted.items()
            if getattr(config, k) not in ((v, tiny[k]) if k in free else (v,))
        ]
        if differ:
            raise BadInput(
                f"--row {asked.row}: {source} has other settings; where they are not trained in, "
                f"they can be given as flags: {' '.join(sorted(differ))}"
            )
    return dataclasses.replace(config, out=config.out or f"runs/{name}", weights=weights)


def flag(name: str, value) -> str:
    """A setting as one would give it on the command line."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, (tuple, list)) else value}"


def show_rows(rows: dict, paper: dict, not_yet: dict) -> None:
    for row, numbers in paper.items():
        printed = "  ".join(f"{k} {v}" for k, v in numbers.items())
        flags = " ".join(flag(k, v) for k, v in rows.get(row, {}).items()) or "(defaults)"
        print(f"{row:{max(map(len, paper))}}  {printed or 'not in the paper'}")
        print(f"{'':4}{f'not yet: {not_yet[row]}' if row in not_yet else flags}")


# The least value of some flags.
LEAST = dict(num_train=1, num_val=1, image_size=32, log_every=1, save_every=1, max_size=32)
LEAST |= dict.fromkeys(
    "batch eval_batch steps epochs seed eval_every warmup clip_norm lr".split(), 0
)


def run(
    name: str,
    config_class,
    detector_class,
    rows: dict,
    paper: dict,
    not_yet: dict,
    tiny: dict,
    argv=None,
    kind: str = "two_stage",
    actions: dict | None = None,
):
    """A method script's `main`: everything the command line can ask for. Returns the metrics.

    `kind` picks torchvision's detector to compare with; `actions` maps flags of the method's own
    Config to functions (model, validation set, config, device, out folder), called at the end.
    """
    actions = actions or {}
    try:
        config = parse(config_class, rows, tiny, name, argv, actions)
        for key, least in LEAST.items():
            if getattr(config, key) < least:
                raise BadInput(f"{flag(key, getattr(config, key))}: {least} is the least")
        if Path(config.out).exists() and not Path(config.out).is_dir():
            raise BadInput(f"--out {config.out}: a file has that name")
        if config.rows:
            return show_rows(rows, paper, not_yet)
        if config.row and config.row not in rows:
            reason = not_yet.get(config.row, "no such row, see --rows")
            raise BadInput(f"--row {config.row}: {reason}")
        device = start_processes(config)
        torch.manual_seed(config.seed)
        if config.bench:
            model = detector_class(untrained(config), 80).to(device)
            return bench(model, untrained(config), 80, kind, device)
        return _run(detector_class, config, actions, device)
    except (BadInput, FloatingPointError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
            _GLOO.clear()


def untrained(config: Config) -> Config:
    """The same model without a download: its weights come from a checkpoint, or do not matter."""
    scratch = config.backbone_weights == "none"
    return config if scratch else dataclasses.replace(config, backbone_weights="random")


def start_processes(config: Config) -> torch.device:
    """This process's device; joins the others if torchrun started it."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise BadInput(f"--device {name}: {str(e).splitlines()[0]}") from e
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"--device {name}: torch sees no GPU")
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def _run(detector_class, config: Config, actions: dict, device: torch.device):
    asked = [action for action in actions if getattr(config, action)]
    out, needs_data = Path(config.out), config.train or config.eval or asked
    if not (needs_data or config.predict):
        raise BadInput("nothing to do: --train, --eval, --predict, --rows or --bench (see --help)")
    state = load_checkpoint(config.weights) if config.weights else None
    if not (state or config.train):
        raise BadInput(f"this needs --weights (there is no {out / 'last.pt'})")
    train_data = val_data = None
    if needs_data:
        known = None if config.train else state["categories"]
        train_data, val_data = load_data(config, config.train, True, known)
    categories = val_data.categories if val_data is not None else state["categories"]
    loaded = state or (config.resume and (out / "last.pt").exists())
    model = detector_class(untrained(config) if loaded else config, len(categories)).to(device)
    if state:
        load_weights(model, state, config.weights, categories)
    metrics = None
    if config.train:
        plain = dataclasses.replace(config, **{action: False for action in asked})
        metrics = train(model, plain, train_data, val_data, out)
        say(f"results: {out}/")
    elif config.eval:
        metrics = evaluate(model, val_data, config, device, out)
        say(f"{show_metrics(metrics)}\nresults: {out}/")
    if config.predict:
        found = predict_files(model, config.predict, categories, config, device, out)
        drawn = sum(r["score"] >= config.draw_score for r in found)
        say(f"{len(found)} detections: {out}/predictions.json; {drawn} drawn: {out}/pictures/")
    for action in asked:
        actions[action](model, val_data, config, device, out)
    return metrics
