"""Conventions of older frameworks, for weights that were trained with them: `--legacy`.

All are off by default. `studies.published` makes a checkpoint of an author's file, and
turns on those that its weights need. Each acts in one place:

    caffe_stride     a bottleneck's stride lies in its first 1x1 convolution    `caffe_backbone`
    caffe_pixels     the network sees BGR, 0 to 255, less Caffe's mean          `caffe_backbone`
    rounded_corners  corners of anchors are whole pixels (MMDetection 1)        `make_anchors`
    rounded_sides    sides of anchors are rounded, then scaled (Detectron)      `make_anchors`
    unaligned        RoIAlign's grid lies half a cell further right and down    `roi_align`
    adaptive         RoIAlign takes a sample for each cell of the map           `roi_align`
    pixel_centres    GFL's distances end in the centre of the last pixel        GFL.decode
    last_pixel       resizing scaled the last pixel's index, not the box's end  engine/metrics.py

Those frameworks give a box the indices of its first and last pixel, so that its width is
x2 - x1 + 1. Here the same box has x2 + 1 in place of x2. Widths, IoU, NMS, deltas and
clipping then agree, and the list above holds the differences that remain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

import common
import kernels

Switch = Literal[
    "caffe_stride",
    "caffe_pixels",
    "rounded_corners",
    "rounded_sides",
    "unaligned",
    "adaptive",
    "pixel_centres",
    "last_pixel",
]
CAFFE_MEAN = (122.7717, 115.9465, 102.9801)  # RGB


class CaffeStem(nn.Conv2d):
    """A ResNet's first convolution, whose weights expect Caffe's pixels.

    Takes images as `common.pad_images` makes them. Padding stays zero, as it was in
    training. Only padding is 0 in a normalised image: no pixel has ImageNet's mean, which
    is no whole number.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__(3, conv.out_channels, 7, stride=2, padding=3, bias=False)
        self.weight = conv.weight

    def forward(self, x: Tensor) -> Tensor:
        std = x.new_tensor(common.STD)[:, None, None]
        mean = x.new_tensor(common.MEAN)[:, None, None]
        pixels = 255 * (x * std + mean) - x.new_tensor(CAFFE_MEAN)[:, None, None]
        return super().forward(pixels.where(x != 0, 0).flip(1))


def caffe_backbone(backbone: common.ResNetFPN, legacy: Sequence[str]) -> None:
    """Change a backbone's strides and input pixels in place, if `legacy` asks for it."""
    if "caffe_stride" in legacy:
        for stage in backbone.stages[1:]:
            first = next(stage.children())
            if not isinstance(first, Bottleneck):
                raise common.BadInput("--legacy caffe_stride: needs bottlenecks, as resnet50 has")
            first.conv1.stride, first.conv2.stride = first.conv2.stride, first.conv1.stride
    if "caffe_pixels" in legacy:
        conv: Any = backbone.stem[0]
        backbone.stem[0] = CaffeStem(conv)


def make_anchors(shapes, strides, scales, ratios, device=None, legacy: Sequence[str] = ()):
    """`common.make_anchors`, with sides or corners rounded if `legacy` says so.

    >>> make_anchors([(1, 1)], [4], [8], [0.5], legacy=["rounded_sides"])  # 45.25 x 22.63, exact
    tensor([[-22., -10.,  26.,  14.]])
    >>> make_anchors([(1, 1)], [4], [8], [0.5], legacy=["rounded_corners"])
    tensor([[-21.,  -9.,  25.,  13.]])
    """
    if "rounded_sides" in legacy:
        levels = []
        for shape, stride in zip(shapes, strides):
            ratio = common.constant(ratios, device)
            w = (stride / ratio.sqrt()).round()  # [ratios]: a box as large as a cell
            sides = torch.stack([w, (w * ratio).round()], 1)[:, None]  # [ratios, 1, 2]
            half = (sides * common.constant(scales, device)[:, None] / 2).flatten(0, 1)
            points = common.make_anchors([shape], [stride], [0.0], [1.0], device)  # [H*W, 4]
            levels.append((points[:, None] + torch.cat([-half, half], 1)).flatten(0, 1))
        return torch.cat(levels)
    anchors = common.make_anchors(shapes, strides, scales, ratios, device)
    if "rounded_corners" in legacy:  # a box ends behind its last pixel, whose index is rounded
        return torch.cat([anchors[:, :2].round(), (anchors[:, 2:] - 1).round() + 1], 1)
    return anchors


def roi_align(features, rois: Tensor, size: int, strides, legacy: Sequence[str] = ()) -> Tensor:
    """`kernels.roi_align` of rois [R, 5], with the grid or the samples that `legacy` names."""
    if "adaptive" not in legacy:
        aligned = "unaligned" not in legacy
        return kernels.roi_align(features, rois, size, strides, aligned=aligned)
    level = kernels.roi_level(rois, strides)
    pooled = features[0].new_zeros(len(rois), features[0].shape[1], size, size)
    for i, stride in enumerate(strides):
        own = (level == i).nonzero()[:, 0]
        pooled[own] = torchvision.ops.roi_align(
            features[i].contiguous(), rois[own].to(pooled), size, 1 / stride, aligned=True
        )
    return pooled
