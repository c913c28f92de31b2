"""Double-Head R-CNN (Wu et al., CVPR 2020): one head to say what it is, another to say where.
Paper: https://arxiv.org/abs/1904.06493   Release: https://github.com/wuyuebupt/doubleheadsrcnn

Two-stage detectors classify and regress a proposal from one vector. A fully connected head has
weights of its own for each cell of the proposal, so its score knows a whole object from a part; a
convolution head treats all cells alike, so its box is steadier. Each gets the task it is good at.
Double-Head-Ext also trains both heads on the other's task, and fuses their class scores.

    image -> ResNet-FPN -> P2..P6 -> RPN -> proposals
      fc-head:   RoIAlign of the proposal [R, C, 7, 7], 2 fc layers  -> [R, 1024]
      conv-head: RoIAlign of the proposal enlarged 1.3 times [R, C, 7, 7], residual block,
                 (non-local block, bottleneck) twice, average over cells -> [R, 1024]
    training: fc-head learns class scores (and boxes), conv-head boxes (and class scores)
    test:     score = s_fc + s_conv (1 - s_fc), box from conv-head -> NMS per class

Where paper and release differ, the release made the paper's numbers and decides:
    conv-head sees the proposal enlarged 1.3 times, which the paper does not say: its authors think
    that the surroundings help to place a box. `--conv-scale 1.0` is the paper's text.
    The non-local block has four groups of channels and no softmax (`--non-local-softmax`).
All other deviations stand beside ROWS.

`--analyze` is the paper's Section 3 on a checkpoint. The paper looks at two single-head models, an
Ext model has both heads in one: `--analyze --compare A/analyze.json` draws another run beside it.

In comments "(4.1)" is a section of the paper, "(release)" a value seen in the release, "choice:"
our own where neither decides. The release is built on maskrcnn-benchmark.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou

import common
import kernels

# B images, R RoIs, K classes, C channels, G ground-truth boxes, W windows around a gt
# S = 7 side of the cell grid; pooled maps are [R, C, S, S]
# rois [R, 5]: image index, x1, y1, x2, y2 in pixels of the network's input
# logits [R, K + 1], probs [R, K] (background dropped), deltas [R, K, 4] as RCNN_STDS scales them
# labels 0..K-1, background K


@dataclass
class Config(common.Config):
    """Double-Head-Ext with ResNet-50 on COCO: Table 4."""

    compare_fusion: bool = False  # Table 3 and Figure 6: evaluate each head and each fusion
    analyze: bool = False  # Section 3: how scores and boxes follow a proposal's IoU, head by head
    analyze_objects: int = 200  # objects that windows slide around; 0: all (14,641 windows each)
    compare: tuple[str, ...] = ()  # other runs' analyze.json, drawn beside this one
    # which heads there are, and what they do (Table 1):
    #   fc, conv: one head for both tasks
    #   double_fc, double_conv: two alike, the first classifies, the second regresses
    #   double_head: one of each; the lambdas say what each does (0.0 and 0.0: Double-Head-Reverse)
    heads: Literal["fc", "conv", "double_fc", "double_conv", "double_head"] = "double_head"
    lambda_fc: float = 0.7  # share of the class loss in double_head's fc-head (Eq. 2, 5.2)
    lambda_conv: float = 0.8  # share of the box loss in its conv-head (Eq. 3, 5.2)
    omega_fc: float = 2.0  # loss weight of fc-heads (Eq. 1, 5.2)
    omega_conv: float = 2.5  # loss weight of conv-heads (Eq. 1, 5.2)
    # how two heads' class scores become one (Eq. 4, Table 3); none: fc-head's alone
    fusion: Literal["complementary", "average", "max", "none"] = "complementary"
    alone: Literal["", "fc", "conv"] = ""  # test with one head's scores, and boxes if it regresses
    fc_channels: int = 1024  # width of fc-head (4.1)
    conv_channels: int = 1024  # width of conv-head; half and a quarter of it inside blocks (4.1)
    num_blocks: int = 5  # K: blocks in conv-head, non-local ones included (5.2)
    non_local: bool = True  # every second block of conv-head is a non-local one (4.1)
    non_local_softmax: bool = False  # attention is a softmax; off: the product / N (release)
    conv_scale: float = 1.3  # conv-heads see RoIs this much larger (release); 1.0: the paper's text
    roi_samples: int = 512  # RoIs per image in training (release)
    roi_positive: float = 0.25  # share of positives among them (release)
    anchor_scale: float = 8.0  # RPN anchors' side in strides (FPN)
    proposals_train: int = 2000  # RPN boxes per level before, and per image after NMS
    proposals_test: int = 1000  # the same in testing (both release)
    score_threshold: float = 0.05  # lowest score that is looked at (release)
    nms_iou: float = 0.5  # NMS per class (release)
    max_detections: int = 100  # detections kept per image (release)
    lr: float = 0.01  # learning rate (5.1) ...
    lr_batch: int = 8  # ... for so many images a step (5.1: 4 GPUs, 2 images each)
    epochs: float = 12.17  # passes over the data: 180k steps of 8 of COCO's 118,287 images (5.1)
    drops: tuple[float, ...] = (120 / 180, 160 / 180)  # lr / 10 at these fractions (5.1)


# ------------------------------------------------------------------------------ equations


def task_weights(heads: str, omega_fc=1.0, omega_conv=1.0, lambda_fc=1.0, lambda_conv=1.0) -> dict:
    """Eq. 1 to 3: each head's weights of its class and of its box loss; 0: it has no such output.

    Of two alike, the second one is called fc2 or conv2.

    >>> task_weights("double_head", 2.0, 2.5)  # lambda = 1 and 1: each head has one task
    {'fc': (2.0, 0.0), 'conv': (0.0, 2.5)}
    """
    return {
        "fc": {"fc": (omega_fc, omega_fc)},
        "conv": {"conv": (omega_conv, omega_conv)},
        "double_fc": {"fc": (omega_fc, 0.0), "fc2": (0.0, omega_fc)},
        "double_conv": {"conv": (omega_conv, 0.0), "conv2": (0.0, omega_conv)},
        "double_head": {
            "fc": (omega_fc * lambda_fc, omega_fc * (1 - lambda_fc)),
            "conv": (omega_conv * (1 - lambda_conv), omega_conv * lambda_conv),
        },
    }[heads]


def fuse_scores(fc_probs: Tensor, conv_probs: Tensor, how: str = "complementary") -> Tensor:
    """Eq. 4 and its rivals in Table 3: two heads' probabilities, of any one shape, become one.

    Complementary: 1 - (1 - s_fc) (1 - s_conv), the chance that at least one head is right.

    >>> fuse_scores(torch.tensor([0.5, 1.0]), torch.tensor([0.5, 0.2]))
    tensor([0.7500, 1.0000])
    """
    if how == "none":
        return fc_probs
    if how == "max":
        return torch.maximum(fc_probs, conv_probs)
    if how == "average":
        return (fc_probs + conv_probs) / 2
    return fc_probs + conv_probs * (1 - fc_probs)  # Eq. 4


def enlarge(rois: Tensor, scale: float) -> Tensor:
    """RoIs [R, 5] grown about their centres by `scale`."""
    centre, half = (rois[:, 1:3] + rois[:, 3:]) / 2, (rois[:, 3:] - rois[:, 1:3]) / 2 * scale
    return torch.cat([rois[:, :1], centre - half, centre + half], 1)


# ------------------------------------------------------------------------------ heads


class FCHead(nn.Module):
    """fc-head (4.1): two hidden layers over all cells, [R, C, S, S] -> [R, channels]. R may be 0.

    >>> FCHead(8, 32)(torch.rand(3, 8, 7, 7)).shape
    torch.Size([3, 32])
    """

    def __init__(self, in_channels: int = 256, channels: int = 1024, size: int = 7):
        super().__init__()
        self.size = size
        self.first = nn.Linear(in_channels * size * size, channels)
        self.second = nn.Linear(channels, channels)

    def forward(self, pooled: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(pooled.flatten(1)))))

    def cell_weights(self) -> Tensor:
        """The first layer, cell by cell: [S, S, C, channels]."""
        weight = self.first.weight.view(len(self.first.weight), -1, self.size, self.size)
        return weight.permute(2, 3, 1, 0)

    def maps(self, pooled: Tensor) -> Tensor:
        """Appendix A: what each cell alone adds to the first layer, [R, channels, S, S]."""
        return torch.einsum("rcyx,yxcd->rdyx", pooled, self.cell_weights())


class ResidualBlock(nn.Module):
    """Figure 5 (a) and (b): [R, C, S, S] -> [R, channels, S, S], BN after each convolution.

    A bottleneck where C is already `channels`, else 3x3 and 1x1 beside a 1x1 shortcut.

    >>> ResidualBlock(8, 32)(torch.rand(3, 8, 7, 7)).shape
    torch.Size([3, 32, 7, 7])
    """

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        if in_channels == channels:
            layers = [*_conv(channels, channels // 4, 1), nn.ReLU()]
            layers += [*_conv(channels // 4, channels // 4, 3), nn.ReLU()]
            self.body = nn.Sequential(*layers, *_conv(channels // 4, channels, 1))
            self.shortcut = nn.Identity()
        else:
            layers = [*_conv(in_channels, in_channels, 3), nn.ReLU()]
            self.body = nn.Sequential(*layers, *_conv(in_channels, channels, 1))
            self.shortcut = nn.Sequential(*_conv(in_channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def _conv(in_channels: int, channels: int, size: int) -> tuple[nn.Module, nn.Module]:
    conv = nn.Conv2d(in_channels, channels, size, padding=size // 2, bias=False)
    return conv, nn.BatchNorm2d(channels)  # in training mode, over the RoIs of the batch


class NonLocalBlock(nn.Module):
    """Figure 5 (c) as released: cells add what they attend to, [R, C, S, S] -> the same.

    y_i = sum_j (theta_i . phi_j) / N g_j over the N = S*S cells, in each of `groups` of the C / 2
    inner channels by itself; with `softmax`, softmax over j instead of / N. Out comes
    relu(x + BN(out(y))), which starts as relu(x). R may be 0.

    >>> x = torch.rand(3, 8, 7, 7)
    >>> torch.equal(NonLocalBlock(8)(x), x)
    True
    """

    def __init__(self, channels: int, groups: int = 4, softmax: bool = False):
        super().__init__()
        if groups < 1 or channels < 1 or channels % (2 * groups):
            raise ValueError(
                f"{channels} channels: a non-local block of {groups} groups needs a multiple of "
                f"{2 * groups}"
            )
        self.groups, self.softmax = groups, softmax
        # with bias, started as PyTorch starts them (release)
        self.theta, self.phi, self.g = (nn.Conv2d(channels, channels // 2, 1) for _ in range(3))
        self.out = nn.Sequential(nn.Conv2d(channels // 2, channels, 1), nn.BatchNorm2d(channels))
        # choice: BN starts at zero, in the release the convolution before it. BN blows up what the
        # first step makes of a convolution of zeros: our first gradient was 30 times as long so.
        nn.init.zeros_(self.out[1].weight)

    def forward(self, x: Tensor) -> Tensor:
        theta, phi, g = (
            f(x).flatten(2).unflatten(1, (self.groups, -1)) for f in (self.theta, self.phi, self.g)
        )  # [R, groups, C/2/groups, N]
        product = theta.transpose(2, 3) @ phi  # [R, groups, N (from), N (to)]
        attention = product.softmax(-1) if self.softmax else product / product.shape[-1]
        attended = (g @ attention.transpose(2, 3)).flatten(1, 2)  # [R, C/2, N]
        return F.relu(x + self.out(attended.unflatten(2, x.shape[2:])))


class ConvHead(nn.Module):
    """conv-head (4.1): K blocks and the average over cells, [R, C, S, S] -> [R, channels].

    Without non-local blocks K residual ones; with them (K + 1) / 2, and a non-local block before
    each but the first: K is odd. `softmax`: of the non-local blocks. R may be 0.

    >>> ConvHead(8, num_blocks=5, non_local=True, channels=32)(torch.rand(3, 8, 7, 7)).shape
    torch.Size([3, 32])
    """

    def __init__(
        self,
        in_channels: int = 256,
        num_blocks: int = 5,
        non_local: bool = True,
        channels: int = 1024,
        softmax: bool = False,
    ):
        super().__init__()
        if num_blocks < 1 or (non_local and num_blocks % 2 == 0):
            raise ValueError(f"{num_blocks} blocks: at least 1, and odd with non-local ones")
        if channels < 4 or channels % 4:
            raise ValueError(f"{channels} channels: blocks need a multiple of 4")
        blocks: list[nn.Module] = [ResidualBlock(in_channels, channels)]
        while len(blocks) < num_blocks:
            blocks += [NonLocalBlock(channels, softmax=softmax)] if non_local else []
            blocks += [ResidualBlock(channels, channels)]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.maps(pooled).mean((2, 3))

    def maps(self, pooled: Tensor) -> Tensor:
        """Before the average: [R, channels, S, S]."""
        return self.blocks(pooled)


def output_layer(channels: int, outputs: int, std: float) -> nn.Linear:
    layer = nn.Linear(channels, outputs)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


# ------------------------------------------------------------------------------ detector


class Detector(common.TwoStage):
    """Figure 1. Heads and outputs that the losses do not use are not built."""

    def __init__(self, config: Config, num_classes: int):
        super().__init__(config, num_classes)
        lambdas = config.lambda_fc, config.lambda_conv
        weights = task_weights(config.heads, config.omega_fc, config.omega_conv, *lambdas)
        self.loss_weights = {name: pair for name, pair in weights.items() if any(pair)}
        self.check()
        self.heads, self.cls, self.box = (nn.ModuleDict() for _ in range(3))
        for name, (cls_weight, box_weight) in self.loss_weights.items():
            if name.startswith("fc"):
                width = config.fc_channels
                self.heads[name] = FCHead(config.fpn_channels, width)
            else:
                width = config.conv_channels
                blocks = config.num_blocks, config.non_local, width, config.non_local_softmax
                try:
                    self.heads[name] = ConvHead(config.fpn_channels, *blocks)
                except ValueError as e:
                    raise common.BadInput(f"--num-blocks, --conv-channels: {e}") from e
            if cls_weight:
                self.cls[name] = output_layer(width, num_classes + 1, 0.01)
            if box_weight:
                self.box[name] = output_layer(width, num_classes * 4, 0.001)
        self.to(memory_format=torch.channels_last)

    def check(self) -> None:
        """Raises BadInput for settings that make no detector."""
        config, pairs = self.config, list(self.loss_weights.values())
        if not (0 <= config.lambda_fc <= 1 and 0 <= config.lambda_conv <= 1):
            raise common.BadInput("--lambda-fc and --lambda-conv are between 0 and 1")
        if not 0 < config.conv_scale < math.inf:
            raise common.BadInput(f"--conv-scale {config.conv_scale}: RoIs need a size above 0")
        if not (any(c for c, _ in pairs) and any(b for _, b in pairs)):
            raise common.BadInput("with these lambdas and omegas no head has one of the tasks")
        if config.alone and not self.loss_weights.get(config.alone, (0,))[0]:
            raise common.BadInput(f"--alone {config.alone}: this model has no such classifier")

    def loss(self, images: list[Tensor], targets: list[dict]) -> dict[str, Tensor]:
        features, _, losses, rois, labels, gt_boxes = self.training_rois(images, targets)
        logits, deltas = self.head_outputs(features, rois)
        for name, (cls_weight, box_weight) in self.loss_weights.items():
            if name in logits:
                losses[f"{name}_cls"] = cls_weight * common.class_loss(logits[name], labels)
            if name in deltas:
                box = common.class_box_loss(deltas[name].flatten(1), rois, labels, gt_boxes)
                losses[f"{name}_reg"] = box_weight * box
        return losses

    def head_outputs(self, features: list[Tensor], rois: Tensor) -> tuple[dict, dict]:
        """rois [R, 5] -> logits [R, K + 1] and deltas [R, K, 4], each by name of the head."""
        logits, deltas = {}, {}
        for name, pooled in self.pool_for_heads(features, rois).items():
            vector = self.heads[name](pooled)
            if name in self.cls:
                logits[name] = self.cls[name](vector)
            if name in self.box:
                deltas[name] = self.box[name](vector).unflatten(1, (self.num_classes, 4))
        return logits, deltas

    @property
    def box_head(self) -> str:
        """The head that gives the boxes: conv-head, if it regresses."""
        return list(self.box)[-1]

    def pool_for_heads(self, features: list[Tensor], rois: Tensor) -> dict[str, Tensor]:
        """What each head sees of rois [R, 5]: [R, C, 7, 7], pooled once for heads alike."""
        # choice: every conv-head sees more, also where it is alone or one of two. The release has
        # no script for such models, but enlarges what its convolutions see for both tasks.
        scales = {n: self.config.conv_scale if n.startswith("conv") else 1.0 for n in self.heads}
        pooled = {scale: self.pool_enlarged(features, rois, scale) for scale in {*scales.values()}}
        return {name: pooled[scale] for name, scale in scales.items()}

    def pool_enlarged(self, features: list[Tensor], rois: Tensor, scale: float) -> Tensor:
        """RoIAlign of rois [R, 5] enlarged, each on the level of its own size: [R, C, 7, 7]."""
        if scale == 1:
            return self.pool(features, rois, 7)
        level, enlarged = kernels.roi_level(rois, self.strides), enlarge(rois, scale)
        members = [(level == i).nonzero()[:, 0] for i in range(len(self.strides))]
        pooled = [
            kernels.roi_align(features[i : i + 1], enlarged[m], 7, self.strides[i : i + 1])
            for i, m in enumerate(members)
        ]
        return torch.cat(pooled)[torch.cat(members).argsort()]

    @torch.no_grad()
    def outputs(self, images: list[Tensor]) -> dict:
        """Proposals, and each head's probs [R, K] and deltas [R, K, 4] of them."""
        features, sizes, rois, image = self.test_rois(images)
        found = dict(features=features, sizes=sizes, rois=rois, image=image)
        return found | self.predictions(features, rois)

    def predictions(self, features: list[Tensor], rois: Tensor) -> dict[str, dict[str, Tensor]]:
        logits, deltas = self.head_outputs(features, rois)
        probs = {name: x.float().softmax(1)[:, :-1] for name, x in logits.items()}
        return dict(probs=probs, deltas=deltas)

    def select(self, outputs: dict, config: Config) -> dict[str, Tensor]:
        """The boxes that enter NMS: fused scores over the threshold, their class's box."""
        probs, deltas = outputs["probs"], outputs["deltas"]
        if config.alone or len(probs) == 1:
            fused = probs[config.alone or next(iter(probs))]
        else:
            fused = fuse_scores(probs["fc"], probs["conv"], config.fusion)
        row, labels, scores = common.over_threshold(fused, config.score_threshold)
        deltas = deltas[config.alone if config.alone in deltas else self.box_head]
        boxes, image = outputs["rois"][row, 1:], outputs["image"][row]
        boxes = decode(boxes, deltas[row, labels], outputs["sizes"][image])
        return dict(boxes=boxes, scores=scores, labels=labels, image=image)


def decode(boxes: Tensor, deltas: Tensor, sizes: Tensor) -> Tensor:
    """Boxes [N, 4] moved by deltas [N, 4] as RCNN_STDS scales them, cut to the image."""
    return common.clip_boxes(common.decode_boxes(boxes, deltas, common.RCNN_STDS), sizes)


# ------------------------------------------------------------------------------ fusions compared


def compare_fusion(model: Detector, val_data, config: Config, device, out: Path) -> dict:
    """Table 3 and Figure 6 (a) to (d) from one forward pass: compare_fusion.json and a table."""
    if config.heads != "double_head":
        raise common.BadInput("--compare-fusion needs a model with both heads")
    both = [name for name in ("conv", "fc") if name in model.cls and name in model.box]
    configs = {f"{name} alone": replace(config, alone=name) for name in both}
    fusions = ("none", "max", "average", "complementary") if len(model.cls) == 2 else ("none",)
    configs |= {f"{how}": replace(config, alone="", fusion=how) for how in fusions}
    return common.study("compare_fusion", model, configs, val_data, config, device, out)


# ------------------------------------------------------------------------------ analysis

BINS = 20  # of a proposal's IoU (3.1)
CHUNK = 1024  # windows that go through the heads at once: bounds memory
SIZES = ("small objects", "medium objects", "large objects")
CLASSES = ("easy classes", "medium classes", "hard classes")


def sliding_windows(gt_boxes: Tensor, steps: int = 11) -> Tensor:
    """Windows around each gt (3.1): [G, 4] -> [G, steps^4, 4], steps^4 = 14,641 for 11.

    Every combination of shifts in x and y (up to one side of the gt) and widths and heights (half
    to double). choice: the steps widen quadratically from the gt, which is the middle window: even
    steps would leave the bins next to IoU 1 empty.

    >>> sliding_windows(torch.tensor([[0., 0., 10., 20.]]))[0, 14641 // 2]
    tensor([ 0.,  0., 10., 20.])
    """
    step = torch.linspace(-1, 1, steps, device=gt_boxes.device)
    shift = step * step.abs()
    dx, dy, w, h = torch.cartesian_prod(shift, shift, 2**shift, 2**shift).unbind(1)
    centre, size = (gt_boxes[:, :2] + gt_boxes[:, 2:]) / 2, gt_boxes[:, 2:] - gt_boxes[:, :2]
    centre = centre[:, None] + size[:, None] * torch.stack([dx, dy], 1)  # [G, W, 2]
    half = size[:, None] * torch.stack([w, h], 1) / 2
    return torch.cat([centre - half, centre + half], 2)


def tally(moments: Tensor, labels, sizes, iou, score, regressed) -> None:
    """Add N boxes to moments [K, 3, BINS, 8]: sums of 1, x, x^2, s, s^2, x s, r, r^2, in float64.

    x = iou (which chooses the bin), s = score, r = regressed, labels and sizes (0..2): all [N].
    """
    x, s, r = (v.double() for v in (iou, score, regressed))
    terms = torch.stack([torch.ones_like(x), x, x * x, s, s * s, x * s, r, r * r], 1)
    cell = (labels * 3 + sizes) * BINS + (x * BINS).long().clamp(max=BINS - 1)
    moments.view(-1, 8).index_add_(0, cell, terms)


def statistics(moments: Tensor) -> dict:
    """moments [BINS, 8] -> per bin count, mean and deviation (None: empty), and Pearson of s, x."""
    n, _, _, s, ss, _, r, rr = moments.unbind(1)

    def listed(values):
        return [round(v, 5) if k else None for v, k in zip(values.tolist(), n.tolist())]

    found = {"count": [int(v) for v in n.tolist()], "pearson": pearson(moments.sum(0))}
    for name, total, squares in (("score", s, ss), ("iou", r, rr)):
        mean = total / n.clamp(min=1)
        found[f"{name}_mean"] = listed(mean)
        found[f"{name}_std"] = listed((squares / n.clamp(min=1) - mean**2).clamp(min=0).sqrt())
    return found


def pearson(moments: Tensor) -> float | None:
    """Correlation of score and IoU from moments [8]; None where one of them does not vary."""
    n, x, xx, s, ss, xs, _, _ = moments.tolist()
    spread = (n * xx - x * x) * (n * ss - s * s)
    return round((n * xs - x * s) / spread**0.5, 4) if spread > 1e-12 * n**4 else None


def cell_correlation(cells: Tensor) -> Tensor:
    """Cosine between all pairs of cells: [..., S*S, D] -> [..., S*S, S*S] (3.4, Appendix A)."""
    unit = F.normalize(cells.double(), dim=-1)
    return unit @ unit.transpose(-1, -2)


def groups_of_classes(per_class: dict[str, float | None]) -> dict[str, list[str]]:
    """Thirds of the classes by falling AP (3.1); classes without an AP are in none."""
    known = sorted((k for k, v in per_class.items() if v is not None), key=lambda k: -per_class[k])
    edges = [round(i * len(known) / 3) for i in range(4)]
    return {name: known[a:b] for name, a, b in zip(CLASSES, edges, edges[1:])}


def read_objects(val_data, most: int) -> tuple[dict, dict]:
    """COCO's areas of each image's objects, and which of them are analysed: evenly spread."""
    areas, eligible, chosen = {}, [], {}
    for a in val_data.coco()["annotations"]:
        mine = areas.setdefault(a["image_id"], [])
        if not (a.get("iscrowd", 0) or a.get("difficult", 0)):
            eligible.append((a["image_id"], len(mine)))
        mine.append(a["area"])
    count = min(most or len(eligible), len(eligible))
    for i in range(count):
        image_id, position = eligible[i * len(eligible) // count]
        chosen.setdefault(image_id, []).append(position)
    return areas, chosen


def size_group(areas: Tensor) -> Tensor:
    """COCO's small, medium, large: 0, 1, 2 of areas [N] in the original image's pixels."""
    return (areas > 32**2).long() + (areas > 96**2)


class Analysis:
    """The sums that Section 3 needs, over the images of this process; `gathered` adds processes."""

    def __init__(self, model: Detector, config: Config, categories: list[dict]):
        self.model, self.categories = model, categories
        self.finals = {name: replace(config, alone=name) for name in model.cls}
        # the model as a whole, where it is more than one head alone
        self.finals |= {"model": config} if len(model.cls) + len(model.box) > 2 else {}
        shape = (model.num_classes, 3, BINS, 8)
        zeros = lambda names: {k: torch.zeros(shape, dtype=torch.double) for k in names}  # noqa: E731
        self.windows, self.proposals = zeros(model.heads), zeros(model.heads)
        self.final, self.cells = zeros(self.finals), {}
        self.results, self.objects, self.num_windows = [], 0, 0

    def add_boxes(self, where: dict, found: dict, boxes, gt_boxes, labels, sizes, limit) -> None:
        """Boxes [N, 4] that the heads have judged, each with its own gt [N, 4], label and size."""
        iou = common.aligned_iou(boxes, gt_boxes)
        rows = torch.arange(len(boxes), device=boxes.device)
        for name, moments in where.items():
            score = regressed = torch.zeros_like(iou)
            if name in found["probs"]:
                score = found["probs"][name][rows, labels]
            if name in found["deltas"]:
                moved = decode(boxes, found["deltas"][name][rows, labels], limit)
                regressed = common.aligned_iou(moved, gt_boxes)
            tally(moments, *(v.cpu() for v in (labels, sizes, iou, score, regressed)))

    def add_image(self, outputs: dict, target: dict, sizes: Tensor, chosen: list[int]) -> None:
        """One image: windows around chosen objects, proposals, final boxes, feature maps."""
        gt, labels, limit = target["boxes"], target["labels"], outputs["sizes"]
        best, index = F.pad(box_iou(outputs["rois"][:, 1:], gt), (0, 1)).max(1)
        real = (best > 0) & ~F.pad(target["ignore"], (0, 1))[index]
        # choice: a proposal is judged by the object it overlaps most; one that overlaps none has
        # no class whose score to look at
        found = {k: {n: v[real] for n, v in outputs[k].items()} for k in ("probs", "deltas")}
        own = (gt[index[real]], labels[index[real]], sizes[index[real]])
        self.add_boxes(self.proposals, found, outputs["rois"][real, 1:], *own, limit)
        self.add_final(outputs, target, sizes)
        if chosen:
            self.add_windows(outputs["features"], gt[chosen], labels[chosen], sizes[chosen], limit)

    def add_windows(self, features, gt_boxes, labels, sizes, limit) -> None:
        windows = common.clip_boxes(sliding_windows(gt_boxes), limit).flatten(0, 1)
        owner = torch.arange(len(gt_boxes), device=windows.device)
        owner = owner.repeat_interleave(len(windows) // len(gt_boxes))
        keep = (windows[:, 2:] > windows[:, :2]).all(1)
        for boxes, i in zip(windows[keep].split(CHUNK), owner[keep].split(CHUNK)):
            found = self.model.predictions(features, F.pad(boxes, (1, 0)))
            self.add_boxes(self.windows, found, boxes, gt_boxes[i], labels[i], sizes[i], limit)
        self.objects, self.num_windows = self.objects + len(labels), self.num_windows + len(owner)
        pooled = self.model.pool_for_heads(features, F.pad(gt_boxes, (1, 0)))
        maps = {f"{name} input": m for name, m in pooled.items()}
        maps |= {name: self.model.heads[name].maps(m.float()) for name, m in pooled.items()}
        for name, m in maps.items():
            total = cell_correlation(m.flatten(2).transpose(1, 2)).sum(0).cpu()
            self.cells[name] = self.cells.get(name, 0) + total

    def add_final(self, outputs: dict, target: dict, sizes: Tensor) -> None:
        """Final boxes against the best object of their own class; with none, their own size."""
        scale = torch.tensor(target["size"], device=sizes.device) / outputs["sizes"][0]  # (h, w)
        for name, config in self.finals.items():
            (found,) = self.model.finish(self.model.select(outputs, config), 1)
            iou = F.pad(box_iou(found["boxes"], target["boxes"]), (0, 1))  # [D, G + 1]
            same = found["labels"][:, None] == F.pad(target["labels"], (0, 1), value=-1)
            best, index = (iou * same).max(1)
            area = (found["boxes"][:, 2:] - found["boxes"][:, :2]).prod(1) * scale.prod()
            size = torch.where(best > 0, F.pad(sizes, (0, 1))[index], size_group(area))
            real = ~(F.pad(target["ignore"], (0, 1))[index] & (best > 0))
            values = (found["labels"], size, best, found["scores"], best)
            tally(self.final[name], *(v[real].cpu() for v in values))
        found["boxes"] = found["boxes"] * scale.flip(0).repeat(2)  # the last: of the whole model
        self.results += common.to_coco(target["image_id"], found, self.categories)

    def gathered(self) -> Analysis:
        """This object with the sums of all processes."""
        for key in ("windows", "proposals", "final", "cells"):
            shares = common.gather(getattr(self, key))
            names = dict.fromkeys(k for s in shares for k in s)
            setattr(self, key, {k: sum(s[k] for s in shares if k in s) for k in names})
        counts = common.gather((self.objects, self.num_windows))
        self.objects, self.num_windows = (sum(c) for c in zip(*counts))
        self.results = [r for share in common.gather(self.results) for r in share]
        return self


@torch.no_grad()
def analyze(model: Detector, val_data, config: Config, device, out: Path) -> dict:
    """Section 3 on one model: analyze.json and Figures 2 and 7, 3, 4 and 8 as PNG.

    For each head that has the task: class score and regressed IoU over a proposal's IoU.
    """
    names = [c["name"] for c in val_data.categories]
    others = {str(Path(file).parent): read_analysis(file, names) for file in config.compare}
    areas, chosen = read_objects(val_data, config.analyze_objects)
    analysis = Analysis(model.eval(), config, val_data.categories)
    rank, world = common.rank_and_world()
    mine = range(rank, len(val_data), world)
    data = common.Resized(val_data, config, False)
    loader = common.make_loader(data, config, device, sampler=mine, batch_size=1)
    for items in common.progress(loader, "analysing", len(loader)):
        images, (target,) = common.to_device(items, device)
        sizes = size_group(torch.tensor(areas.get(target["image_id"], []), device=device))
        with common.autocast(config, device):
            outputs = model.outputs(images)
            analysis.add_image(outputs, target, sizes, chosen.get(target["image_id"], []))
    metrics = common.coco_metrics(val_data.coco(), analysis.gathered().results)
    per_class = next(iter(others.values()))["per_class"] if others else metrics["per_class"]
    summary = summarise(analysis, names, per_class) | {"metrics": metrics}
    for file, other in others.items():
        odd = [k for k in ("classes", "objects", "windows_made") if other[k] != summary[k]]
        if odd:
            reason = "the same first --compare and --analyze-objects"
            raise common.BadInput(
                f"--compare {file}: made with other {', '.join(odd)}; use {reason}"
            )
    if rank == 0:
        common.write_json(out / "analyze.json", summary)
        draw_analysis({"": summary, **others}, out)
    for where in ("windows", "proposals", "final"):
        for name, found in summary[where].items():
            if name in model.cls or name == "model":
                common.say(f"{where:9} {name:6} Pearson {found['all objects']['pearson']}")
    return summary


def read_analysis(file: str, names: list[str]) -> dict:
    """Another run's analyze.json; BadInput if it is none, or of other classes."""
    try:
        found = json.loads(Path(file).read_text())
        needed = {"windows", "proposals", "final", "classes", "objects", "windows_made"}
        same = set(found["per_class"]) == set(names) and needed <= set(found)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise common.BadInput(f"--compare {file}: {type(e).__name__}: {e}") from e
    if not same:
        raise common.BadInput(f"--compare {file}: not an analysis of these classes")
    return found


def summarise(analysis: Analysis, names: list[str], per_class: dict) -> dict:
    """Sums -> the numbers behind the figures, by head and by group of objects."""
    model, groups = analysis.model, groups_of_classes(per_class)
    members = {k: [names.index(n) for n in v] for k, v in groups.items()}

    def by_group(moments: Tensor) -> dict:
        found = {"all objects": moments.sum((0, 1))}
        found |= {name: moments[:, i].sum(0) for i, name in enumerate(SIZES)}
        found |= {name: moments[rows].sum((0, 1)) for name, rows in members.items()}
        return {name: statistics(m) for name, m in found.items()}

    def without_absent(name: str, found: dict) -> dict:
        """Numbers of a task that this head does not have are not numbers."""
        absent = ["score", "pearson"] * (name not in model.cls) + ["iou"] * (name not in model.box)
        return {
            group: {k: v for k, v in values.items() if k.split("_")[0] not in absent}
            for group, values in found.items()
        }

    summary: dict = {"objects": analysis.objects, "windows_made": analysis.num_windows}
    summary |= {"per_class": per_class, "classes": groups}
    summary["absent"] = [f"{n} cls" for n in model.heads if n not in model.cls]
    summary["absent"] += [f"{n} reg" for n in model.heads if n not in model.box]
    for where in ("windows", "proposals"):
        moments = getattr(analysis, where)
        summary[where] = {k: without_absent(k, by_group(m)) for k, m in moments.items()}
    pearsons = {k: by_group(m) for k, m in analysis.final.items()}
    summary["final"] = {
        k: {g: {"count": sum(v["count"]), "pearson": v["pearson"]} for g, v in found.items()}
        for k, found in pearsons.items()
    }
    total = max(1, analysis.objects)
    listed = lambda m: [[round(v, 4) for v in row] for row in m.tolist()]  # noqa: E731
    summary["feature_correlation"] = {k: listed(m / total) for k, m in analysis.cells.items()}
    summary["weight_correlation"] = {}
    for name, head in model.heads.items():
        if isinstance(head, FCHead):
            cells = head.cell_weights().flatten(0, 1).flatten(1).cpu()  # [S*S, C * channels]
            cells = cells - cells.mean(1, keepdim=True)  # centred: the cosine is Pearson's
            summary["weight_correlation"][name] = listed(cell_correlation(cells))
    return summary


def draw_analysis(runs: dict[str, dict], out: Path) -> None:
    """Figures 2 and 7 (analyze_bins), 3 (.._pearson), 4 (.._weights) and 8 (.._features).

    `runs`: summaries by name; the first one is this run, named "".
    """
    groups = ("all objects", *SIZES, *CLASSES)
    heads = [(f"{run} {h}".strip(), s, h) for run, s in runs.items() for h in s["windows"]]
    figure, axes = common.new_figure(22, 6, 2, 7, sharex=True, sharey="row")
    centres = (np.arange(BINS) + 0.5) / BINS
    for row, what, title in zip(axes, ("score", "iou"), ("class score", "regressed box's IoU")):
        for axis, group in zip(row, groups):
            for label, summary, head in heads:
                found = summary["windows"][head][group]
                if f"{what}_mean" not in found:
                    continue
                mean, std = (
                    np.array(found[f"{what}_{k}"], dtype=float) for k in ("mean", "std")
                )  # None, an empty bin, becomes nan
                (line,) = axis.plot(centres, mean, ".-", label=label)
                axis.fill_between(
                    centres, mean - std, mean + std, color=line.get_color(), alpha=0.1
                )
            axis.set(title=group, xlabel="proposal's IoU")
        row[0].set_ylabel(title)
        row[0].legend()
    figure.savefig(out / "analyze_bins.png", dpi=80)

    figure, axes = common.new_figure(18, 4, 1, 3, sharey=True)
    for axis, where in zip(axes[0], ("windows", "proposals", "final")):
        bars = [(f"{r} {h}".strip(), f) for r, s in runs.items() for h, f in s[where].items()]
        bars = [(k, f) for k, f in bars if "pearson" in f["all objects"]]
        for i, (label, found) in enumerate(bars):
            at = [g + 0.8 * (i + 0.5) / len(bars) - 0.4 for g in range(len(groups))]
            values = [math.nan if (v := found[g]["pearson"]) is None else v for g in groups]
            axis.bar(at, values, 0.8 / len(bars), label=label)
        axis.set_xticks(range(len(groups)), groups, rotation=30, ha="right")
        axis.set(title=f"{where}: Pearson of class score and IoU")
        axis.legend()
    figure.savefig(out / "analyze_pearson.png", dpi=80)

    first = next(iter(runs.values()))
    for name in ("weight", "feature"):
        maps = first[f"{name}_correlation"]
        if maps:
            figure, axes = common.new_figure(5 * len(maps), 4.5, 1, len(maps))
            for axis, (title, m) in zip(axes[0], maps.items()):
                size = round(len(m) ** 0.5)
                tiles = np.array(m).reshape(size, size, size, size).swapaxes(1, 2)
                shown = axis.imshow(tiles.reshape(size**2, size**2), vmin=0, vmax=1, cmap="jet")
                axis.set(title=f"{title}: {name} correlation of cells")
                axis.set_xticks([i * size - 0.5 for i in range(1, size)], [])
                axis.set_yticks([i * size - 0.5 for i in range(1, size)], [])
                axis.grid(color="white")
                figure.colorbar(shown, ax=axis)
            figure.savefig(out / f"analyze_{name}s.png", dpi=80)


# ------------------------------------------------------------------------------ rows

# Deviations (paper | release | here). Those that change what is learned:
# - RoIs of conv-head: the proposal | enlarged 1.3 times, level of the proposal, for both outputs |
#   the release's
# - Non-local block: one of [42] | 4 groups, product / N, bias, ReLU after the sum | the release's
# - BN in the non-local block: after each convolution (5.1) | after the last one | the release's
# - Zeros at the block's end, so that it starts as the identity: - | its last convolution | that BN
# - Start of fc-head's layers: - | Kaiming uniform, a = 1, biases 0 | PyTorch's
# - Backbone: ImageNet's | Caffe's, BGR, stride in the 1x1 convolutions | torchvision's
# - Biases: - | twice the rate, no weight decay | as weights
# - RPN boxes in training: - | best 2000 of a GPU's two images together | best 2000 of each image
# - Anchors across the border: - | do not train the RPN | train it, if the centre is in the image
# - Crowd regions: - | left out | proposals at least half inside one do not train
# - Schedule on VOC 2007: "all models 180k iterations" | no such setting | maskrcnn-benchmark's
# Those that do not, or hardly:
# - Loss weights: omega and lambda (Eq. 1 to 3) | their products 0.5, 2.0, 1.4, 0.6 | the paper's
# - Warm-up: - | 500 steps from a third of the rate | the same
# - Fused score: Eq. 4 | 1 - (1 - s_conv) (1 - s_fc), the same number | Eq. 4
# - Pixels: - | widths are x2 - x1 + 1, RoIAlign without the half pixel | x2 - x1, with it
# - Windows of the analysis: "about 14,000" | - | 11^4 = 14,641, cut to the image (some then
#   coincide), less what lies outside it
# - Difficulty of classes: AP of the FPN baseline | - | AP of the first --compare run, or of the
#   model itself

_ONE = dict(omega_fc=1.0, omega_conv=1.0)  # Table 1's loss weights above its last group
_FC = dict(heads="fc", **_ONE)  # FPN's Faster R-CNN, the baseline
_VANILLA = dict(lambda_fc=1.0, lambda_conv=1.0)
_REVERSE = dict(lambda_fc=0.0, lambda_conv=0.0)
_PLAIN = dict(non_local=False)  # Table 1: the weighted Double-Head is Table 2's K = 5 without
_R101 = dict(backbone="resnet101")
# choice: 180k steps would be 287 passes over VOC 2007; maskrcnn-benchmark takes 70,000 steps of one
# image, 14 passes, and drops the rate after 10
_VOC = dict(epochs=14.0, drops=(10 / 14,))

# One training, several rows:
#   table1.fc, table2.k0, table4.fpn_r50              the baseline
#   table1.double_head_weighted, table2.k5
#   table2.nl5, figure6.fc_1.0_conv_1.0, table4.double_head_r50
#   table3.*, figure6.fc_0.7_conv_0.8, table4.ext_r50  four ways to fuse: --eval --compare-fusion
#   table4.ext_r101, table5.ext_r101                   val; test-dev, where COCO's server scores
# The release's script trains table4.ext_r50 and table4.ext_r101. Double-FC and Double-Conv are two
# whole heads (5.2: "two fully connected heads, which have the identical structure").
ROWS: dict[str, dict] = {
    "table1.fc": dict(**_FC),
    "table1.conv": dict(heads="conv", **_PLAIN, **_ONE),
    "table1.double_fc": dict(heads="double_fc", **_ONE),
    "table1.double_conv": dict(heads="double_conv", **_PLAIN, **_ONE),
    "table1.reverse": dict(**_REVERSE, **_PLAIN, **_ONE),
    "table1.double_head": dict(**_VANILLA, **_PLAIN, **_ONE),
    "table1.double_fc_weighted": dict(heads="double_fc"),
    "table1.double_conv_weighted": dict(heads="double_conv", **_PLAIN),
    "table1.reverse_weighted": dict(**_REVERSE, **_PLAIN),
    "table1.double_head_weighted": dict(**_VANILLA, **_PLAIN),
    "table2.k0": dict(**_FC),
    **{f"table2.k{k}": dict(**_VANILLA, **_PLAIN, num_blocks=k) for k in range(1, 8)},
    **{f"table2.nl{k}": dict(**_VANILLA, num_blocks=k) for k in (3, 5, 7)},
    **{f"table3.{how}": dict(fusion=how) for how in ("none", "max", "average", "complementary")},
    "figure6.fc_1.0_conv_1.0": dict(**_VANILLA),
    "figure6.fc_0.8_conv_1.0": dict(lambda_fc=0.8, lambda_conv=1.0),
    "figure6.fc_0.7_conv_0.8": dict(),
    "table4.fpn_r50": dict(**_FC),
    "table4.double_head_r50": dict(**_VANILLA),
    "table4.ext_r50": dict(),
    "table4.fpn_r101": dict(**_FC, **_R101),
    "table4.double_head_r101": dict(**_VANILLA, **_R101),
    "table4.ext_r101": dict(**_R101),
    "table5.ext_r101": dict(**_R101),
    "table6.fpn": dict(**_FC, **_VOC),
    "table6.ext": dict(**_VOC),
    "extra.no_enlarging": dict(conv_scale=1.0),
}

_AP = ("AP", "AP50", "AP75", "APs", "APm", "APl")
PAPER: dict[str, dict] = {
    "table1.fc": dict(zip(_AP, (36.8, 58.7, 40.4, 21.2, 40.1, 48.8))),
    "table1.conv": dict(zip(_AP, (35.9, 54.0, 39.6, 19.1, 39.4, 50.2))),
    "table1.double_fc": dict(zip(_AP, (37.3, 58.7, 40.4, 21.5, 40.1, 49.3))),
    "table1.double_conv": dict(zip(_AP, (33.8, 50.5, 37.1, 16.4, 37.2, 49.3))),
    "table1.reverse": dict(zip(_AP, (32.6, 50.5, 35.7, 16.2, 36.8, 46.5))),
    "table1.double_head": dict(zip(_AP, (38.8, 58.9, 42.3, 22.1, 42.2, 51.3))),
    "table1.double_fc_weighted": dict(zip(_AP, (38.1, 59.4, 41.3, 21.5, 41.1, 50.0))),
    "table1.double_conv_weighted": dict(zip(_AP, (34.3, 51.0, 38.0, 16.4, 38.0, 49.0))),
    "table1.reverse_weighted": dict(zip(_AP, (32.0, 48.8, 35.2, 14.9, 35.2, 47.6))),
    "table1.double_head_weighted": dict(zip(_AP, (39.5, 59.6, 43.2, 22.7, 42.3, 52.1))),
    "table2.k0": dict(zip(_AP, (36.8, 58.7, 40.4))),
    "table2.k1": dict(zip(_AP, (36.7, 59.3, 39.6))),
    "table2.k2": dict(zip(_AP, (38.7, 59.2, 41.9))),
    "table2.k3": dict(zip(_AP, (39.2, 59.4, 42.5))),
    "table2.k4": dict(zip(_AP, (39.3, 59.2, 42.9))),
    "table2.k5": dict(zip(_AP, (39.5, 59.6, 43.2))),
    "table2.k6": dict(zip(_AP, (39.5, 59.4, 43.3))),
    "table2.k7": dict(zip(_AP, (39.7, 59.8, 43.2))),
    "table2.nl3": dict(zip(_AP, (38.8, 59.2, 42.4))),
    "table2.nl5": dict(zip(_AP, (39.8, 59.6, 43.6))),
    "table2.nl7": dict(zip(_AP, (40.0, 59.9, 43.7))),
    "table3.none": dict(zip(_AP, (39.7, 59.5, 43.4))),
    "table3.max": dict(zip(_AP, (39.9, 59.7, 43.7))),
    "table3.average": dict(zip(_AP, (40.1, 59.8, 44.1))),
    "table3.complementary": dict(zip(_AP, (40.3, 60.3, 44.2))),
    "figure6.fc_1.0_conv_1.0": dict(AP=39.8),  # text of 5.2
    "figure6.fc_0.8_conv_1.0": {},  # text of 5.2: better than 39.8
    "figure6.fc_0.7_conv_0.8": dict(AP=40.3),  # text of 5.2
    "table4.fpn_r50": dict(zip(_AP, (36.8, 58.7, 40.4, 21.2, 40.1, 48.8))),
    "table4.double_head_r50": dict(zip(_AP, (39.8, 59.6, 43.6, 22.7, 42.9, 53.1))),
    "table4.ext_r50": dict(zip(_AP, (40.3, 60.3, 44.2, 22.4, 43.3, 54.3))),
    "table4.fpn_r101": dict(zip(_AP, (39.1, 61.0, 42.4, 22.2, 42.5, 51.0))),
    "table4.double_head_r101": dict(zip(_AP, (41.5, 61.7, 45.6, 23.8, 45.2, 54.9))),
    "table4.ext_r101": dict(zip(_AP, (41.9, 62.4, 45.9, 23.9, 45.2, 55.8))),
    "table5.ext_r101": dict(zip(_AP, (42.3, 62.8, 46.3, 23.9, 44.9, 54.3))),
    "table6.fpn": dict(zip(_AP, (47.4, 75.7, 41.9))),
    "table6.ext": dict(zip(_AP, (49.2, 76.7, 45.6))),
    "extra.no_enlarging": {},
}

NOT_YET: dict[str, str] = {}

TINY = dict(
    common.TINY,
    lr_batch=16,  # as in the other methods' tiny presets
    fc_channels=256,
    conv_channels=128,
    anchor_scale=4.0,
    roi_samples=24,
    roi_positive=0.5,
    proposals_train=200,
    proposals_test=100,
    analyze_objects=30,  # minutes: on a CPU windows take seconds per object
)


def main(argv=None):
    return common.run(
        "double_head", Config, Detector, ROWS, PAPER, NOT_YET, TINY, argv,
        actions={"compare_fusion": compare_fusion, "analyze": analyze},
    )  # fmt: skip


if __name__ == "__main__":
    main()
