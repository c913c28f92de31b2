"""Deformable convolution (DCN) in a ResNet: `--dcn v1` and `--dcn v2`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck
from torchvision.ops import DeformConv2d

from common import BadInput, ResNetFPN


class DeformableConv(DeformConv2d):
    """A convolution whose taps look where its input tells them to (DCN).

    [B, C, H, W] -> [B, C', H', W']. It replaces `conv` and keeps its weight and groups. A second
    convolution, `conv_offset`, gives each tap at each output place an offset in px of the input: y,
    x of the first tap, y, x of the next, row by row. Outside the map are zeros. With `modulated`
    (DCNv2) each tap also has a weight in (0, 1), behind the offsets. `conv_offset` starts at zero:
    v1 then equals `conv`, and v2, whose weights are 0.5, half of it (release).
    Stays float32 under autocast: offsets are positions, and deform_conv2d has no bf16 on a CPU.

    >>> conv, x = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), torch.ones(1, 4, 8, 8)
    >>> torch.allclose(DeformableConv(conv)(x), conv(x) / 2, atol=1e-6)
    True
    """

    def __init__(self, conv: nn.Conv2d, modulated: bool = True):
        place: dict = dict(
            kernel_size=conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
        )
        super().__init__(conv.in_channels, conv.out_channels, **place, groups=conv.groups)
        self.weight, self.bias = conv.weight, conv.bias
        self.taps = math.prod(conv.kernel_size)
        per_tap = 3 if modulated else 2
        self.conv_offset = nn.Conv2d(conv.in_channels, per_tap * self.taps, **place)
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.weight.dtype)
            offsets, mask = self.conv_offset(x).tensor_split([2 * self.taps], dim=1)
            return super().forward(x, offsets, mask.sigmoid() if mask.shape[1] else None)


def make_deformable(backbone: ResNetFPN, dcn: str) -> None:
    """Make the 3x3 convolutions of all bottlenecks in C3 to C5 deformable, in place (release).

    dcn: "v1" or "v2". In a frozen stage the new offsets are frozen as well. Raises BadInput for
    basic blocks, as the releases' framework does.
    """
    for stage in backbone.stages[1:]:
        for block in stage.children():
            if not isinstance(block, Bottleneck):
                raise BadInput(f"--dcn {dcn}: needs bottlenecks, as resnet50 and larger have")
            trains = block.conv2.weight.requires_grad
            block.conv2 = DeformableConv(block.conv2, dcn == "v2").requires_grad_(trains)
    backbone.to(memory_format=torch.channels_last)
