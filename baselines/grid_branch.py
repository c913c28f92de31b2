"""The grid branch of Grid R-CNN: a box as nine points on heat maps.
Papers: https://arxiv.org/abs/1811.12030 (Grid R-CNN)   https://arxiv.org/abs/1906.05688 (Plus)

CPM R-CNN (cpm_rcnn.py) has one such branch for each stage. "Eq." is an equation of its paper,
"(release)" marks a value seen in its release.

    [R, C, 14, 14] -> 8 convs, the first strided -> trunk [R, 576, 7, 7]
    -> 2 transposed convs -> heat maps [R, 9, 28, 28] -> 9 points -> box [R, 4]
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common

# R RoIs, C channels
# S = 28 side of a point's heat map, a window of the 2S x 2S grid over the enlarged box
# points: 0 3 6    column by column: 0, 1, 2 lie on the left side, 0, 3, 6 on the top side
#         1 4 7    heat maps [R, 9, S, S] (y, x)
#         2 5 8


def unit_points(device=None) -> Tensor:
    """The nine points [9, 2] (x, y) of the unit square, column by column.

    >>> unit_points()[:4].tolist()
    [[0.0, 0.0], [0.0, 0.5], [0.0, 1.0], [0.5, 0.0]]
    """
    steps = torch.arange(3, device=device) / 2
    return torch.cartesian_prod(steps, steps)


def grid_frame(boxes: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """M_j in Eq. 1: the frame of a stage's grid, which is its box enlarged about the centre.

        size = ratio (w, h)        corner = centre - size / 2

    boxes [R, 4] -> corner (x, y) and size (w, h), [R, 1, 2] both.

    >>> grid_frame(torch.tensor([[0., 0., 28., 28.]]), 2.0)
    (tensor([[[-14., -14.]]]), tensor([[[56., 56.]]]))
    """
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    size = ratio * (boxes[:, 2:] - boxes[:, :2])
    return (centre - size / 2)[:, None], size[:, None]


def grid_targets(
    boxes: Tensor, gt_boxes: Tensor, ratio: float = 2.0, size: int = 28, radius: int = 1
) -> Tensor:
    """map_gt in Eq. 2: where the gt's nine points are, as zeros and ones.

    boxes [R, 4], gt_boxes [R, 4] -> [R, 9, size, size]. A stage's grid has 2 size x 2 size
    cells, which cover the enlarged box. A left point need not be searched on the right, so the
    map of a point is only a window of size x size cells. Along x:

        cell   0         14        28        42        56
               .         [=========|=========]         .    [===] the box itself, at ratio 2
               |-- points 0 1 2 ---|         .         .    window from cell 0
               .         |-- points 3 4 5 ---|         .    window from cell 14
               .         .         |-- points 6 7 8 ---|    window from cell 28

    Along y, the windows of points 0 3 6, 1 4 7 and 2 5 8 begin at cells 0, 14 and 28.

        cell = floor(2 size (gt point - corner) / frame)
        map = 1 where |dx| + |dy| <= radius      dx, dy: columns, rows to the point's cell

    Radius 1 sets a plus of five cells, cut off at the window's edge. A map stays zero if its
    point lies outside the grid, or if a side of the grid is 3 px or less (release). Where all
    points lie in their windows, `decode_grid` gives back the gt to within half a cell.

    >>> box = torch.tensor([[0., 0., 28., 28.]])  # the grid covers -14..42, a pixel a cell
    >>> grid_targets(box, box, radius=0)[0, 2].nonzero()  # row 42 - 28, column 14 - 0
    tensor([[14, 14]])
    """
    points = unit_points(boxes.device)
    corner, frame = grid_frame(boxes, ratio)
    gt_size = gt_boxes[:, None, 2:] - gt_boxes[:, None, :2]
    gt_points = gt_boxes[:, None, :2] + points * gt_size  # [R, 9, 2]
    cell = ((gt_points - corner) * (2 * size) / frame.clamp(min=1e-6)).floor()  # [R, 9, 2]
    on_grid = ((cell >= 0) & (cell < 2 * size) & (frame > 3)).all(-1)  # [R, 9]
    in_window = cell - points * size  # [R, 9, 2], counted from the window's first cell
    steps = torch.arange(size, device=boxes.device)
    dx = (steps - in_window[..., :1]).abs()  # [R, 9, S]
    dy = (steps - in_window[..., 1:]).abs()  # [R, 9, S]
    near = dx[:, :, None, :] + dy[:, :, :, None] <= radius  # [R, 9, S, S]
    return (near & on_grid[..., None, None]).float()


def decode_grid(
    boxes: Tensor, heat_logits: Tensor, ratio: float = 2.0, sizes: Tensor | None = None
) -> Tensor:
    """Boxes [R, 4] from heat maps [R, 9, S, S] that cover the enlarged `boxes` [R, 4].

        point_k = centre of map k's highest cell      p_k = probability of that cell
        side = sum of p_k point_k / sum of p_k        over the side's three points

    If sizes [R, 2] (h, w) are given, boxes end at their image's border.

    >>> box = torch.tensor([[0., 0., 28., 28.]])
    >>> decode_grid(box, grid_targets(box, box, radius=0))
    tensor([[ 0.5000,  0.5000, 28.5000, 28.5000]])
    """
    S, points = heat_logits.shape[-1], unit_points(boxes.device)
    logit, index = heat_logits.float().flatten(2).max(2)  # [R, 9]
    in_window = torch.stack([index % S, index // S], 2)  # [R, 9, 2]
    cell = in_window + points * S + 0.5  # [R, 9, 2], on the 2S grid
    corner, frame = grid_frame(boxes, ratio)
    x, y = (corner + frame * cell / (2 * S)).unbind(2)  # [R, 9]
    p = logit.sigmoid().clamp(min=1e-6)

    def side(coordinate: Tensor, points: slice) -> Tensor:  # [R, 9] -> [R]
        return (coordinate[:, points] * p[:, points]).sum(1) / p[:, points].sum(1)

    left, right = side(x, slice(0, 3)), side(x, slice(6, 9))
    top, bottom = side(y, slice(0, 9, 3)), side(y, slice(2, 9, 3))
    decoded = torch.stack([left, top, right, bottom], 1)
    return decoded if sizes is None else common.clip_boxes(decoded, sizes)


class GridHead(nn.Module):
    """g_j in Eq. 1: pooled features -> the nine points' heat maps, and the trunk for ISM.

    [R, C, S/2, S/2] -> logits [R, 9, S, S], trunk [R, 9 point_channels, S/4, S/4]. R may be 0.
    After the trunk, each point has channels of its own. ISM is CPM R-CNN's IoU prediction.

    >>> head = GridHead(8, point_channels=4, num_convs=2, groups=9)
    >>> [out.shape for out in head(torch.rand(3, 8, 14, 14))]
    [torch.Size([3, 9, 28, 28]), torch.Size([3, 36, 7, 7])]
    """

    def __init__(
        self,
        in_channels: int = 256,
        point_channels: int = 64,
        num_convs: int = 8,
        groups: int = 36,
        grid_init: bool = False,
    ):
        super().__init__()
        width = 9 * point_channels
        layers: list[nn.Module] = []
        for i in range(num_convs):
            conv = nn.Conv2d(width if i else in_channels, width, 3, 1 if i else 2, padding=1)
            layers += [conv, nn.GroupNorm(groups, width), nn.ReLU(inplace=True)]
        self.trunk = nn.Sequential(*layers)
        first = nn.ConvTranspose2d(width, width, 4, 2, padding=1, groups=9)
        last = nn.ConvTranspose2d(width, 9, 4, 2, padding=1, groups=9)
        self.heat = nn.Sequential(first, nn.GroupNorm(9, width), nn.ReLU(inplace=True), last)
        if grid_init:
            nn.init.constant_(last.bias, -math.log(99))

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        trunk = self.trunk(pooled)
        hidden = self.heat[:-1](trunk)
        # In bf16, logits from 2 to 4 have steps of 1/64. Neighbouring cells would tie.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.heat[-1](hidden.float()), trunk


def grid_loss(
    heat_logits: Tensor,
    targets: Tensor,
    num_rois: Tensor | int | None = None,
) -> Tensor:
    """L_BCE in Eq. 2, from two [R, 9, S, S]: mean over cells and num_rois, R unless given."""
    total = F.binary_cross_entropy_with_logits(heat_logits.float(), targets, reduction="sum")
    num_rois = max(1, len(targets)) if num_rois is None else num_rois
    return total / targets.shape[1:].numel() / num_rois
