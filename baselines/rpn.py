"""The region proposal network (RPN): from every anchor of a pyramid to a thousand boxes.
Paper: https://arxiv.org/abs/1506.01497 (Faster R-CNN)

The first stage of all two-stage detectors here (faster_rcnn.py). It predicts for every anchor
whether the anchor lies on an object of any class, and moves it. The best boxes are proposals.
Their classes are the second stage's task.

    maps P2..P6, strides 4..64, [B, C, H, W] each; three anchors per cell, of three shapes
      on every cell: 3x3 conv -> A objectness logits and A deltas
        -> each level's best 2000 anchors -> decode, clip -> NMS 0.7 inside each level
        -> the image's best 2000: proposals [B, P, 4]     (in testing 1000 instead of 2000)
    training: 256 anchors of an image, at most half of them positive
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import kernels
from engine.legacy import make_anchors

# B images, L levels, A anchors per cell, N anchors per image, P proposals per image (padded)


def take(boxes: Tensor, index: Tensor) -> Tensor:
    """Pick rows of each image: boxes [B, N, 4], index [B, M] -> [B, M, 4]."""
    return boxes.gather(1, index[..., None].expand(-1, -1, 4))


class RPN(nn.Module):
    """Region proposal network: which anchors lie on an object, and where the object is.

    All levels share its convolutions. NMS sees the best `pre_nms` boxes of each level, and the
    best `post_nms` of each image are kept; both are pairs (in training, in testing). `floor`:
    see `loss`. `proposals` and `loss` take as `output` what `forward` returns.
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
        floor: float = 0.0,
        legacy: tuple[str, ...] = (),
    ):
        super().__init__()
        self.strides, self.scales, self.ratios = strides, (scale,), ratios
        self.pre_nms, self.post_nms, self.nms_iou = pre_nms, post_nms, nms_iou
        self.num_samples, self.floor, self.legacy = num_samples, floor, legacy
        self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.logits = nn.Conv2d(in_channels, len(ratios), 1)
        self.deltas = nn.Conv2d(in_channels, 4 * len(ratios), 1)
        for layer in (self.conv, self.logits, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, features: list[Tensor]):
        """L maps -> anchors [N, 4], logits [B, N], deltas [B, N, 4], and N of each level."""
        hidden = [F.relu(self.conv(f)) for f in features]
        shapes, device = [f.shape[-2:] for f in features], features[0].device
        scales, ratios = self.scales, self.ratios
        anchors = make_anchors(shapes, self.strides, scales, ratios, device, self.legacy)
        logits = common.flatten_levels([self.logits(h) for h in hidden], 1).squeeze(-1).float()
        deltas = common.flatten_levels([self.deltas(h) for h in hidden], 4).float()
        return anchors, logits, deltas, [h * w * len(ratios) for h, w in shapes]

    @torch.no_grad()
    def proposals(self, output, sizes: Tensor, training=False) -> tuple[Tensor, Tensor]:
        """The best boxes of each image, best first: boxes [B, P, 4], clipped, valid [B, P]."""
        anchors, logits, deltas, per_level = output
        logits = torch.where(common.inside_image(anchors, sizes), logits.detach(), -torch.inf)
        picked, first = [], 0
        for n in per_level:
            most = min(n, self.pre_nms[not training])
            picked.append(logits[:, first : first + n].topk(most, dim=1)[1] + first)
            first += n
        level = torch.cat([torch.full_like(p, i) for i, p in enumerate(picked)], 1)
        index = torch.cat(picked, 1)  # [B, M]
        B, M = index.shape
        scores = logits.gather(1, index)
        boxes = common.decode_boxes(anchors[index], take(deltas, index))  # [B, M, 4]
        boxes = common.clip_boxes(boxes, sizes[:, None])
        scores[(boxes[..., 2:] <= boxes[..., :2]).any(-1)] = -torch.inf
        image = torch.arange(B, device=index.device)[:, None].expand(-1, M)
        groups = image * len(per_level) + level  # [B, M]: only boxes of a group compete
        # keep [B * M]: the survivors' indices, then -1s, whose number the host need not know
        scores, groups = scores.flatten(), groups.flatten()
        keep, _ = kernels.nms_padded(boxes.flatten(0, 1), scores, groups, self.nms_iou)
        scores = F.pad(scores, (0, 1), value=-torch.inf)  # index -1 is this last entry
        survivors = torch.full_like(scores, -torch.inf)
        survivors[keep] = scores[keep]
        best, index = survivors[:-1].view(B, M).topk(min(self.post_nms[not training], M), 1)
        valid = best > -torch.inf
        return take(boxes, index) * valid[..., None], valid

    def loss(self, output, sizes: Tensor, targets: list[dict]) -> dict[str, Tensor]:
        """Objectness (BCE) and box (smooth L1) losses.

        Anchors are positive from IoU 0.7 on, negative below 0.3. An object's best anchor is
        positive as well, unless its IoU is below `floor`.
        """
        anchors, logits, deltas, _ = output
        gt_boxes, _, gt_valid, gt_ignore = common.pad_targets(targets)
        inside = common.inside_image(anchors, sizes)
        visible = anchors * inside[..., None]  # [B, N, 4]; no area in the padding
        labels, matched, _ = common.match(
            visible, gt_boxes, 0.7, 0.3, gt_valid, gt_ignore, low_quality=self.floor
        )
        labels[~inside] = -1
        index, valid = common.sample(labels, self.num_samples, 0.5)
        positive = valid & (labels.gather(1, index) == 1)
        num = common.shared_count(valid.sum())
        logit = logits.gather(1, index)
        bce = F.binary_cross_entropy_with_logits(logit, positive.float(), reduction="none")
        gts = take(gt_boxes, matched.gather(1, index))  # [B, num_samples, 4]
        delta_targets, delta = common.encode_boxes(anchors[index], gts), take(deltas, index)
        box = F.smooth_l1_loss(delta, delta_targets, beta=1 / 9, reduction="none").sum(-1)
        return {
            "rpn_cls": torch.where(valid, bce, 0).sum() / num,
            "rpn_box": torch.where(positive, box, 0).sum() / num,
        }
