"""Files as the authors' programs write them, filled with random numbers, and what those programs
compute of them: in their own order of rows, channels and pixels, written anew from formulas.

`Weights` is a state dict that grows by layers. Narrow widths keep tests quick; the backbone is a
whole ResNet-50. Layers' names and shapes are the sources'.
"""

import math

import torch
import torch.nn.functional as F
import torchvision

STD, MEAN = (58.395, 57.12, 57.375), (123.675, 116.28, 103.53)
BGR_MEAN = (102.9801, 115.9465, 122.7717)


class Weights(dict):
    """A state dict; `meta` tensors have shapes alone."""

    def __init__(self, wide=False):
        super().__init__()
        self.meta, self.rng = wide, torch.Generator().manual_seed(0)
        self.C, self.fc = (256, 1024) if wide else (32, 64)
        self.features = []  # of the image, once they are computed

    def make(self, name, *shape, low=None):
        if self.meta:
            self[name] = torch.empty(shape, device="meta")
        elif low is None:
            fan = math.prod(shape[1:]) or 1
            self[name] = torch.randn(shape, generator=self.rng) / math.sqrt(fan)
        else:
            self[name] = torch.rand(shape, generator=self.rng) + low

    def layer(self, name, *shape, bias=True, out=None, size=1.0):
        self.make(f"{name}.weight", *shape)
        self[f"{name}.weight"] *= size
        if bias:
            self.make(f"{name}.bias", out or shape[0], low=-0.5)
            self[f"{name}.bias"] *= size

    def norm(self, name, width, statistics=True, count=False):
        self.make(f"{name}.weight", width, low=0.5)
        self.make(f"{name}.bias", width, low=-0.5)
        if statistics:
            self.make(f"{name}.running_mean", width, low=-0.5)
            self.make(f"{name}.running_var", width, low=0.5)
        if count:
            self[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def resnet(self, there, blocks=(3, 4, 6, 3), statistics=True, count=False, stem="", dcn=0):
        more = dict(statistics=statistics, count=count)
        size = 1 if count else 1 / 60  # Detectron's pixels are not divided by a deviation
        self.layer(f"{there}{stem}conv1", 64, 3, 7, 7, bias=False, size=size)
        self.norm(f"{there}{stem}bn1", 64, **more)
        before = 64
        for n, number in enumerate(blocks, 1):
            inner = 32 * 2**n
            for j in range(number):
                block = f"{there}layer{n}.{j}"
                for i, shape in enumerate(
                    [(inner, before, 1, 1), (inner, inner, 3, 3), (4 * inner, inner, 1, 1)], 1
                ):
                    self.layer(f"{block}.conv{i}", *shape, bias=False)
                    self.norm(f"{block}.bn{i}", shape[0], **more)
                self[f"{block}.bn3.weight"] *= 0.3  # so that sixteen blocks do not explode
                if dcn and n > 1:
                    self.layer(f"{block}.conv2.conv_offset", dcn, inner, 3, 3)
                if j == 0:
                    self.layer(f"{block}.downsample.0", 4 * inner, before, 1, 1, bias=False)
                    self.norm(f"{block}.downsample.1", 4 * inner, **more)
                before = 4 * inner

    def pyramid(self, inner, layer, levels):
        """inner, layer: names by level l; levels: those of C2 to C5, as 0 to 3."""
        for i, level in enumerate(levels):
            self.layer(inner(i), self.C, 256 * 2**level, 1, 1)
            self.layer(layer(i), self.C, self.C, 3, 3)

    def rpn(self, conv, logits, deltas):
        self.layer(conv, self.C, self.C, 3, 3)
        self.layer(logits, 3, self.C, 1, 1)
        self.layer(deltas, 12, self.C, 1, 1, size=0.1)

    def mmdet(self, **more):
        self.resnet("backbone.", count=True, **more)
        inner, layer = "neck.lateral_convs.{}.conv".format, "neck.fpn_convs.{}.conv".format
        self.pyramid(inner, layer, range(4))
        self.rpn("rpn_head.rpn_conv", "rpn_head.rpn_cls", "rpn_head.rpn_reg")

    def towers(self, norm):
        self.resnet("backbone.", count=True)
        inner, layer = "neck.lateral_convs.{}.conv".format, "neck.fpn_convs.{}.conv".format
        self.pyramid(inner, layer, range(1, 4))
        self.layer(layer(3), self.C, self.C if norm else 2048, 3, 3)
        self.layer(layer(4), self.C, self.C, 3, 3)
        for kind in ("cls", "reg"):
            for i in range(4):
                self.layer(f"bbox_head.{kind}_convs.{i}.conv", self.C, self.C, 3, 3, bias=not norm)
                if norm:
                    self.norm(f"bbox_head.{kind}_convs.{i}.gn", self.C, False)

    # ------------------------------------------------------------------ what it computes

    def conv(self, name, x, stride=1, groups=1):
        weight, bias = self[f"{name}.weight"], self.get(f"{name}.bias")
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=groups)

    def linear(self, name, x):
        return F.linear(x, self[f"{name}.weight"], self[f"{name}.bias"])

    def group_norm(self, name, x, groups):
        return F.group_norm(x, groups, self[f"{name}.weight"], self[f"{name}.bias"])

    def batch_norm(self, name, x, eps=1e-5):
        weight, bias = self[f"{name}.weight"], self[f"{name}.bias"]
        mean = self.get(f"{name}.running_mean", torch.zeros_like(weight))
        var = self.get(f"{name}.running_var", torch.ones_like(weight))
        scale = (weight / (var + eps).sqrt())[:, None, None]
        return (x - mean[:, None, None]) * scale + bias[:, None, None]

    def body(self, there, x, caffe=False, eps=1e-5, stem=""):
        """C2 to C5 of normalised images [B, 3, H, W]."""
        x = self.batch_norm(f"{there}{stem}bn1", self.conv(f"{there}{stem}conv1", x, 2), eps)
        x, maps = F.max_pool2d(x.relu(), 3, 2, 1), []
        for n in range(1, 5):
            j = 0
            while f"{there}layer{n}.{j}.conv1.weight" in self:
                block, stride = f"{there}layer{n}.{j}", 2 if j == 0 and n > 1 else 1
                first, second = (stride, 1) if caffe else (1, stride)
                y = self.batch_norm(f"{block}.bn1", self.conv(f"{block}.conv1", x, first), eps)
                y = self.conv(f"{block}.conv2", y.relu(), second)
                y = self.batch_norm(f"{block}.bn2", y, eps).relu()
                y = self.batch_norm(f"{block}.bn3", self.conv(f"{block}.conv3", y), eps)
                if j == 0:
                    x = self.conv(f"{block}.downsample.0", x, stride)
                    x = self.batch_norm(f"{block}.downsample.1", x, eps)
                x, j = (x + y).relu(), j + 1
            maps.append(x)
        return maps

    def merged(self, maps, inner, layer):
        """The pyramid's levels, finest first."""
        x, levels = None, []
        for i in reversed(range(len(maps))):
            lateral = self.conv(inner(i), maps[i])
            x = lateral if x is None else lateral + F.interpolate(x, lateral.shape[-2:])
            levels.insert(0, self.conv(layer(i), x))
        return levels


def normalised(image, bgr):
    """An image [3, h, w] as the source's network gets it, zero-padded to multiples of 32."""
    if bgr:
        x = image.double().flip(0) - torch.tensor(BGR_MEAN)[:, None, None]
    else:
        x = image.double() - torch.tensor(MEAN)[:, None, None]
        x = x / torch.tensor(STD)[:, None, None]
    h, w = image.shape[1:]
    return F.pad(x, (0, -w % 32, 0, -h % 32))[None]


def anchors_there(kind, shapes, strides, scales):
    """A level's anchors in the source's way, as indices of first and last pixel, or continuous."""
    boxes = []
    for (H, W), s in zip(shapes, strides):
        cell = []
        for ratio in (0.5, 1.0, 2.0):
            for scale in scales:
                if kind == "sides":  # Detectron rounds the sides of a box as large as a cell
                    w = round(math.sqrt(s * s / ratio))
                    h = round(w * ratio)
                    w, h = w * scale, h * scale
                else:
                    w, h = scale * s / math.sqrt(ratio), scale * s * math.sqrt(ratio)
                if kind == "corner":  # MMDetection 2: continuous, around the cell's corner
                    cell.append([-w / 2, -h / 2, w / 2, h / 2])
                    continue
                c = (s - 1) / 2
                box = [c - (w - 1) / 2, c - (h - 1) / 2, c + (w - 1) / 2, c + (h - 1) / 2]
                cell.append([round(v) for v in box] if kind == "corners" else box)
        shift = torch.cartesian_prod(torch.arange(H), torch.arange(W)).double().flip(1) * s
        boxes.append((shift.repeat(1, 2)[:, None] + torch.tensor(cell)).flatten(0, 1))
    return torch.cat(boxes)


def decoded(anchors, deltas, one):
    """Boxes with x2 + one behind their end. one: 1 where a width is x2 - x1 + 1, else 0."""
    x1, y1, x2, y2 = anchors.unbind(-1)
    w, h = x2 - x1 + one, y2 - y1 + one
    dx, dy, dw, dh = deltas.unbind(-1)
    cx, cy = x1 + w / 2 + dx * w, y1 + h / 2 + dy * h
    w, h = w * dw.exp(), h * dh.exp()
    last = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2 - one, cy + h / 2 - one], -1)
    return last + torch.tensor([0, 0, one, one])


def by_anchor(maps, width):
    """Maps [1, A * width, H, W] of all levels -> [sum(H*W*A), width]."""
    return torch.cat([m.permute(0, 2, 3, 1).reshape(-1, width) for m in maps])


def pooled_there(features, boxes, size, aligned, samples=2, enlarge=1.0):
    """RoIAlign of boxes [R, 4], the i-th from level i; enlarged about their centres."""
    pooled = []
    for i, box in enumerate(torch.tensor(boxes).double()):
        centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2 * enlarge
        roi = torch.cat([torch.zeros(1), centre - half, centre + half])[None]
        scale = 1 / 2 ** (i + 2)
        pooled.append(torchvision.ops.roi_align(features[i], roi, size, scale, samples, aligned))
    return torch.cat(pooled)
