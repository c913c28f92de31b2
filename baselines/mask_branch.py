"""A mask branch whose masks are scored: Mask R-CNN's layers, Mask Scoring R-CNN's IoU.
Mask R-CNN: https://arxiv.org/abs/1703.06870   Mask Scoring: https://arxiv.org/abs/1903.00241

D2Det (d2det.py, 3.3) puts this branch on the last features of its dense local regression. Two
transposed convolutions refine these features, 7x7 -> 28x28, to one mask a class. A class score
does not say how good a mask is. So two fc layers predict the mask's IoU from the features and
the mask.

    trunk [R, 576, 7, 7] -> 14x14 -> 28x28, one mask a class; with that mask, 2 fc -> its IoU

"(release)" marks a value seen in D2Det's releases.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.faster_rcnn import two_fc

# R RoIs, K classes, C channels; S = 7 side of the trunk's maps; masks are [R, 4S, 4S]


def mask_targets(proposals: Tensor, gt_boxes: Tensor, masks: Tensor, size: int = 28):
    """What a proposal's mask should be (3.3): the part of the gt's mask inside the proposal.

    proposals, gt_boxes [R, 4]; masks [R, M, M] (bool or 0..1), each over its gt_box -> targets
    [R, size, size], 1.0 where the mask, interpolated at a cell's centre, is at least 0.5
    (release); and areas [R] of the whole objects, in cells, also outside the proposal.

    >>> box = torch.tensor([[0., 0., 8., 8.]])
    >>> mask_targets(box, box / 2, torch.ones(1, 4, 4), size=2)
    (tensor([[[1., 0.],
             [0., 0.]]]), tensor([1.]))
    """
    wh = (gt_boxes[:, 2:] - gt_boxes[:, :2]).clamp(min=1e-6)
    step = (torch.arange(size, device=proposals.device) + 0.5) / size
    place = proposals[:, :2, None] + (proposals[:, 2:] - proposals[:, :2])[..., None] * step
    # x, y: -1..1 in the gt
    x, y = (2 * (place - gt_boxes[:, :2, None]) / wh[..., None] - 1).unbind(1)
    grid = torch.stack(
        [x[:, None].expand(-1, size, -1), y[..., None].expand(-1, -1, size)], -1
    )  # [R, size, size, 2]
    masks = masks.float()
    targets = F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0] >= 0.5
    cell = (proposals[:, 2:] - proposals[:, :2]).clamp(min=1e-6).prod(1) / size**2
    return targets.float(), masks.mean((1, 2)) * wh.prod(1) / cell


class MaskBranch(nn.Module):
    """Masks and their quality (3.3), from DLR's last features; layers as in the release.

    trunk [R, C, S, S], labels [R] -> mask logits [R, 4S, 4S] of these classes, and the
    predicted IoU [R] of the mask with the whole object, without a sigmoid. R may be 0.

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
        self.iou = two_fc((in_channels + 1) * size**2, hidden, num_classes)
        for layer in (self.iou[1], self.iou[3]):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)

    def forward(self, trunk: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        row = torch.arange(labels.shape[0], device=labels.device)  # len cannot be exported
        logits = self.logits(self.up(trunk))[row, labels]  # [R, 4S, 4S]
        mask = F.max_pool2d(logits.detach()[:, None], 4).sigmoid()  # [R, 1, S, S], a constant
        return logits, self.iou(torch.cat([trunk, mask.to(trunk.dtype)], 1))[row, labels]


def mask_losses(
    mask_logits: Tensor, iou: Tensor, targets: Tensor, areas: Tensor, num_rois=None
) -> dict[str, Tensor]:
    """`mask`, the BCE of masks, and `mask_iou`, half the squared error of the IoU (release).

    mask_logits [R, S, S] and iou [R] of the gts' classes; targets [R, S, S] and areas [R] of
    `mask_targets`. `mask` is a mean over cells and num_rois, `mask_iou` over num_rois alone,
    which is R unless given. The IoU to predict is that of the whole object and the predicted
    mask, the cells over 0.5. RoIs whose true IoU is at most 0.1 do not train it (release).
    """
    num_rois = max(1, len(targets)) if num_rois is None else num_rois
    bce = F.binary_cross_entropy_with_logits(mask_logits.float(), targets, reduction="sum")
    predicted = (mask_logits > 0).float()
    both = (predicted * targets).sum((1, 2))
    inside = targets.sum((1, 2))
    union = predicted.sum((1, 2)) + torch.maximum(areas, inside) - both
    target_iou = both / union.clamp(min=1e-6)
    error = torch.where(target_iou > 0.1, (iou.float() - target_iou) ** 2 / 2, 0)
    num_cells = targets.shape[-1] ** 2
    return {"mask": bce / num_rois / num_cells, "mask_iou": error.sum() / num_rois}
