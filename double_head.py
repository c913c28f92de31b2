"""Double-Head R-CNN: one head says what an object is, another where.
Wu et al., "Rethinking Classification and Localization for Object Detection", CVPR 2020
Paper: https://arxiv.org/abs/1904.06493   Release: https://github.com/wuyuebupt/doubleheadsrcnn

Faster R-CNN (baselines/faster_rcnn.py) predicts class and box from one vector. The paper
trains two kinds of head on both tasks and finds opposite preferences (Section 3):

fc-head, two fully connected layers, classifies better. Each cell of a proposal has weights of
    its own, so the head can tell a complete object from a part, and its scores follow the IoU
    of proposal and object. This sensitivity makes it less robust in regressing whole objects.
conv-head, a stack of convolutions, localises better; all cells share its weights. In its
    non-local blocks cells attend to each other, "to enhance foreground objects" (4.1).
Double-Head classifies with fc-head and regresses with conv-head. Double-Head-Ext, the default,
    also trains each head on the other's task, its "unfocused task" (4.2): regression is
    auxiliary supervision for fc-head, and the two classifiers, fused, complement each other.

    image -> ResNet-FPN -> P2..P6, [B, C, H, W] each -> RPN -> proposals [R, 5]
      fc-head:   RoIAlign of the proposal [R, C, 7, 7] -> 2 fc -> [R, 1024]
      conv-head: RoIAlign of the proposal enlarged 1.3 times [R, C, 7, 7] -> residual block
        [R, 1024, 7, 7] -> (non-local block, bottleneck) twice -> mean over cells [R, 1024]
      each head: class logits [R, K + 1], deltas [R, 4K]
    training: class and box loss weigh 1.4 and 0.6 in fc-head, 0.5 and 2.0 in conv-head
    test:     score s_fc + s_conv (1 - s_fc), box from conv-head -> NMS per class -> best 100

    1 (4.1)       L = omega_fc L_fc + omega_conv L_conv + L_rpn         task_weights
    2 (4.2)       L_fc = lambda_fc L_cls + (1 - lambda_fc) L_reg        task_weights
    3 (4.2)       L_conv = (1 - lambda_conv) L_cls + lambda_conv L_reg  task_weights
    4 (4.2)       s = s_fc + s_conv (1 - s_fc)                          fuse_scores
    Figure 5 (c)  y_i = 1/S^2 sum_j (theta_i . phi_j) g_j               NonLocalBlock

Two deviations from the paper follow the release, which made the paper's numbers:
    conv-head sees the proposal enlarged 1.3 times: the release's authors think that the
    surroundings help to place a box. `--conv-scale 1.0` is the paper's text.
    The non-local block has four groups of channels and no softmax (`--non-local-softmax`).
All deviations are in docs/deviations.md. In comments, "(4.1)" is a section of the paper,
"(release)" a value seen in the release, and "choice:" our own where neither decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import engine
from baselines import faster_rcnn
from baselines.faster_rcnn import Rois, class_box_loss, class_loss, output_layer
from common import BadInput
from data.settings import Range
from engine import Amount, Natural, Share

# B images, R RoIs, K classes (labels 0..K-1, background K), C channels, S = 7 side of the grid
# rois: a `Rois`, or [R, 5] (image index, x1, y1, x2, y2) for functions of plain tensors
# logits [R, K + 1], probs [R, K] (background dropped), deltas [R, K, 4] in units of RCNN_STDS
# names of heads: "fc" and "conv"; of two heads of one kind, the second is "fc2" or "conv2"


@dataclass
class Model(faster_rcnn.TwoStageModel):
    """Double-Head-Ext with ResNet-50."""

    # which heads there are (Table 1). fc, conv: one head, which does both tasks. double_fc,
    # double_conv: two heads of one kind; the first classifies, the second regresses.
    # double_head: an fc-head and a conv-head, which share the tasks as the lambdas say
    heads: Literal["fc", "conv", "double_fc", "double_conv", "double_head"] = "double_head"
    lambda_fc: Share = 0.7  # share of the class loss in double_head's fc-head (Eq. 2, 5.2)
    lambda_conv: Share = 0.8  # share of the box loss in double_head's conv-head (Eq. 3, 5.2)
    omega_fc: Amount = 2.0  # loss weight of fc-heads (Eq. 1, 5.2)
    omega_conv: Amount = 2.5  # loss weight of conv-heads (Eq. 1, 5.2)
    conv_channels: Natural = 1024  # width of conv-head; half or a quarter in its blocks (4.1)
    num_blocks: Natural = 5  # K in Table 2: blocks in conv-head, non-local ones included (5.2)
    non_local: bool = True  # every second block of conv-head is a non-local one (4.1)
    non_local_softmax: bool = False  # attention by softmax; off: by product / S^2 (release)
    conv_scale: Annotated[float, Range(0.1)] = 1.3  # enlarges conv-heads' RoIs (release)

    def loss_weights(self) -> dict[str, tuple[float, float]]:
        """`task_weights` of heads that have a task; raises BadInput if a task has no head."""
        weights = task_weights(
            self.heads, self.omega_fc, self.omega_conv, self.lambda_fc, self.lambda_conv
        )
        if not all(any(pair[task] for pair in weights.values()) for task in (0, 1)):
            raise BadInput("with these lambdas and omegas no head has one of the tasks")
        return {name: pair for name, pair in weights.items() if any(pair)}


@dataclass
class Test(faster_rcnn.Test):
    """How the heads' class scores are combined."""

    # how double_head's two class scores become one (Eq. 4, Table 3); none: fc-head's alone
    fusion: Literal["complementary", "average", "max", "none"] = "complementary"
    # detect with this head's scores alone, and with its boxes if it has any (Figure 6 a, b)
    alone: Literal["", "fc", "conv"] = ""


# lr_batch as in other tiny presets; choice: 1.7 epochs reach 52 AP, 1.2 reach 43 (one seed)
TINY = dict(faster_rcnn.TINY, lr_batch=16, conv_channels=128, epochs=1.7)


@dataclass
class Settings(engine.Settings):
    """Double-Head-Ext with ResNet-50 on COCO: Table 4."""

    tiny = TINY

    model: Model = field(default_factory=Model)
    test: Test = field(default_factory=Test)
    # 180k steps of 8 of COCO's 118,287 images; lr / 10 after 120k and 160k (5.1)
    run: engine.Run = field(
        default_factory=lambda: engine.Run(
            lr=0.01, lr_batch=8, epochs=12.17, drops=(120 / 180, 160 / 180)
        )
    )

    def __post_init__(self) -> None:
        alone = self.test.alone
        if alone and not self.model.loss_weights().get(alone, (0.0, 0.0))[0]:
            raise BadInput(f"--alone {alone}: this model has no such classifier")


# ------------------------------------------------------------------------------ equations


def task_weights(heads: str, omega_fc=1.0, omega_conv=1.0, lambda_fc=1.0, lambda_conv=1.0):
    """Eq. 1 to 3: by name of the head, its weights of (class loss, box loss).

        L      = omega_fc L_fc + omega_conv L_conv + L_rpn           (1)
        L_fc   = lambda_fc L_cls + (1 - lambda_fc) L_reg             (2)
        L_conv = (1 - lambda_conv) L_cls + lambda_conv L_reg         (3)

    The lambdas only act in "double_head"; elsewhere each loss has weight omega. Lambdas of 0
    are the paper's Double-Head-Reverse. If a weight is 0, the head has no such output.

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
    """Fuse two heads' probabilities, of equal shape, by Eq. 4 or by its rivals in Table 3.

        s = s_fc + s_conv (1 - s_fc) = 1 - (1 - s_fc) (1 - s_conv)      (4)

    >>> fuse_scores(torch.tensor([0.5, 1.0]), torch.tensor([0.5, 0.2]))
    tensor([0.7500, 1.0000])
    """
    if how == "none":
        return fc_probs
    if how == "max":
        return torch.maximum(fc_probs, conv_probs)
    if how == "average":
        return (fc_probs + conv_probs) / 2
    return fc_probs + conv_probs * (1 - fc_probs)  # P(at least one is right), if independent


def enlarge_rois(rois: Tensor, scale: float) -> Tensor:
    """RoIs [R, 5] with `scale` times their width and height and the same centres (release).

    >>> enlarge_rois(torch.tensor([[0.0, 10, 20, 30, 60]]), 1.5)
    tensor([[ 0.,  5., 10., 35., 70.]])
    """
    centre = (rois[:, 1:3] + rois[:, 3:]) / 2
    half = (rois[:, 3:] - rois[:, 1:3]) / 2 * scale
    return torch.cat([rois[:, :1], centre - half, centre + half], 1)


# ------------------------------------------------------------------------------ heads


class FCHead(nn.Module):
    """fc-head (4.1): two hidden layers over all cells, [R, C, S, S] -> [R, channels].

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
        """The first layer's weights of each cell: [S, S, C, channels] (3.4, Figure 4)."""
        return self.first.weight.unflatten(1, (-1, self.size, self.size)).permute(2, 3, 1, 0)

    def maps(self, pooled: Tensor) -> Tensor:
        """Each cell's contribution to the first layer: [R, channels, S, S] (Appendix A)."""
        return torch.einsum("rcyx,yxcd->rdyx", pooled, self.cell_weights())


def conv_chain(widths: tuple[int, ...], sizes: tuple[int, ...]) -> nn.Sequential:
    """Convolutions, each with BN (5.1) over the RoIs of the batch, and ReLU between them."""
    layers: list[nn.Module] = []
    for before, after, size in zip(widths, widths[1:], sizes):
        conv = nn.Conv2d(before, after, size, padding=size // 2, bias=False)
        layers += [conv, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class ResidualBlock(nn.Module):
    """Figure 5 (a) and (b): relu(body(x) + shortcut(x)), [R, C, S, S] -> [R, channels, S, S].

    If C equals `channels`, body is a bottleneck (b), else 3x3 and 1x1, with a 1x1 shortcut.
    """

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        if in_channels == channels:
            inner = channels // 4
            self.body = conv_chain((channels, inner, inner, channels), sizes=(1, 3, 1))
            self.shortcut: nn.Module = nn.Identity()
        else:
            self.body = conv_chain((in_channels, in_channels, channels), sizes=(3, 1))
            self.shortcut = conv_chain((in_channels, channels), sizes=(1,))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


class NonLocalBlock(nn.Module):
    """Figure 5 (c) as released: each cell adds what it gathers from all S*S cells of its RoI.

        y_i = 1/S^2 sum_j (theta_i . phi_j) g_j         z = relu(x + BN(out(y)))

    x [R, C, S, S] -> z of the same shape. theta, phi and g are 1x1 convolutions of x to C / 2
    channels, which are split into `groups` that attend separately. With `softmax`, a softmax
    over j replaces the factor 1/S^2. BN starts at zero, so z starts as relu(x). R may be 0.

    >>> x = torch.rand(3, 8, 7, 7)
    >>> torch.equal(NonLocalBlock(8)(x), x)
    True
    """

    def __init__(self, channels: int, groups: int = 4, softmax: bool = False):
        super().__init__()
        if groups < 1 or channels < 1 or channels % (2 * groups):
            needs = f"a non-local block of {groups} groups needs a multiple of {2 * groups}"
            raise ValueError(f"{channels} channels: {needs}")
        self.groups, self.softmax = groups, softmax
        self.theta = nn.Conv2d(channels, channels // 2, 1)
        self.phi = nn.Conv2d(channels, channels // 2, 1)
        self.g = nn.Conv2d(channels, channels // 2, 1)
        norm = nn.BatchNorm2d(channels)
        self.out = nn.Sequential(nn.Conv2d(channels // 2, channels, 1), norm)
        # choice: BN's weight starts at zero. The release zeroes the convolution, so that BN
        # divides by a standard deviation near 0; our first gradient was then 30 times larger.
        nn.init.zeros_(norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        def split(values: Tensor) -> Tensor:  # [R, C/2, S, S] -> [R, groups, C/2/groups, S*S]
            return values.flatten(2).unflatten(1, (self.groups, -1))

        theta, phi, g = split(self.theta(x)), split(self.phi(x)), split(self.g(x))
        product = theta.transpose(2, 3) @ phi  # [R, groups, S*S (i), S*S (j)]
        attention = product.softmax(-1) if self.softmax else product / product.shape[-1]
        y = (g @ attention.transpose(2, 3)).flatten(1, 2)  # [R, C/2, S*S]
        return F.relu(x + self.out(y.unflatten(2, x.shape[2:])), inplace=True)


class ConvHead(nn.Module):
    """conv-head (4.1): K blocks and the mean over cells, [R, C, S, S] -> [R, channels].

    The first block is residual and widens C to `channels`. With `non_local`, a non-local block
    (of this `softmax`) precedes each bottleneck. Both count in K, so K is odd. R may be 0.

    >>> ConvHead(8, num_blocks=5, non_local=True, channels=32)(torch.rand(3, 8, 7, 7)).shape
    torch.Size([3, 32])
    """

    def __init__(
        self, in_channels=256, num_blocks=5, non_local=True, channels=1024, softmax=False
    ) -> None:
        super().__init__()
        if num_blocks < 1 or (non_local and num_blocks % 2 == 0):
            raise ValueError(f"{num_blocks} blocks: at least 1, and odd with non-local ones")
        if channels < 4 or channels % 4:
            raise ValueError(f"{channels} channels: blocks need a multiple of 4")
        blocks: list[nn.Module] = [ResidualBlock(in_channels, channels)]
        while len(blocks) < num_blocks:
            if non_local:
                blocks.append(NonLocalBlock(channels, softmax=softmax))
            blocks.append(ResidualBlock(channels, channels))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.maps(pooled).mean((2, 3))

    def maps(self, pooled: Tensor) -> Tensor:
        """The cells before they are averaged: [R, channels, S, S]."""
        return self.blocks(pooled)


# ------------------------------------------------------------------------------ detector


class Detector(faster_rcnn.TwoStage):
    """Figure 1 (d), or the variant that `Model.heads` names."""

    settings: Model
    default_test = Test

    def __init__(self, model: Model, num_classes: int):
        super().__init__(model, num_classes)
        self.loss_weights = model.loss_weights()
        # the heads and their output layers, by name of the head
        self.heads, self.cls, self.box = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for name, (class_weight, box_weight) in self.loss_weights.items():
            self.heads[name], width = make_head(name, model)
            if class_weight:
                self.cls[name] = output_layer(width, num_classes + 1, model.class_std)
            if box_weight:
                self.box[name] = output_layer(width, num_classes * 4, 0.001)
        self.box_head = list(self.box)[-1]  # gives the boxes: conv-head, if it regresses
        self.to(memory_format=torch.channels_last)

    def loss(self, images: list[Tensor], targets: list[dict]) -> dict[str, Tensor]:
        """Eq. 1, term by term: the RPN's losses, and each head's: `fc_cls`, `conv_reg`, ..."""
        features, _, losses, rois = self.training_rois(images, targets)
        labels, gt_boxes = rois.labels, rois.gt_boxes  # [R], [R, 4]
        logits, deltas = self.head_outputs(features, rois)
        for name, (class_weight, box_weight) in self.loss_weights.items():
            if name in logits:
                losses[f"{name}_cls"] = class_weight * class_loss(logits[name], labels)
            if name in deltas:
                loss = class_box_loss(deltas[name].flatten(1), rois.flat(), labels, gt_boxes)
                losses[f"{name}_reg"] = box_weight * loss
        return losses

    @torch.no_grad()
    def outputs(self, images: list[Tensor]) -> dict:
        """features (maps [B, C, H, W]), sizes [B, 2], rois (R proposals) and `predictions`."""
        features, sizes, rois = self.test_rois(images)
        found = self.predictions(features, rois)
        return dict(features=features, sizes=sizes, rois=rois, **found)

    def candidates(self, outputs: dict, test: Test) -> dict[str, Tensor]:
        """Eq. 4, then each class over the threshold, with conv-head's box for that class.

        probs [R, K] and deltas [R, K, 4] by head -> boxes [N, 4], scores, labels, image [N].
        """
        probs, deltas = outputs["probs"], outputs["deltas"]
        if test.alone or len(probs) == 1:
            scores = probs[test.alone or next(iter(probs))]  # [R, K]
        else:
            scores = fuse_scores(probs["fc"], probs["conv"], test.fusion)
        own_boxes = deltas[test.alone if test.alone in deltas else self.box_head]  # [R, K, 4]
        chosen = {**outputs, "probs": scores, "deltas": own_boxes}
        return faster_rcnn.best_boxes(chosen, test.score_threshold)

    def predictions(self, features: list[Tensor], rois: Rois) -> dict[str, dict[str, Tensor]]:
        """probs [R, K] and deltas [R, K, 4] of R RoIs, each by name of the head."""
        logits, deltas = self.head_outputs(features, rois)
        probs = {name: x.float().softmax(1)[:, :-1] for name, x in logits.items()}
        return dict(probs=probs, deltas=deltas)

    def head_outputs(self, features: list[Tensor], rois: Rois) -> tuple[dict, dict]:
        """logits [R, K + 1] and deltas [R, K, 4] of R RoIs, each by name of the head."""
        logits, deltas = {}, {}
        for name, pooled in self.pool_for_heads(features, rois).items():
            vector = self.heads[name](pooled)  # [R, 1024]
            if name in self.cls:
                logits[name] = self.cls[name](vector)
            if name in self.box:
                deltas[name] = self.box[name](vector).unflatten(1, (self.num_classes, 4))
        return logits, deltas

    def pool_for_heads(self, features: list[Tensor], rois: Rois) -> dict[str, Tensor]:
        """Each head's pooled features of R RoIs [R, C, 7, 7]; heads of one kind share them."""
        conv_scale = self.settings.conv_scale
        scales = {name: conv_scale if name.startswith("conv") else 1.0 for name in self.heads}
        pooled = {s: self.pool_enlarged(features, rois, s) for s in set(scales.values())}
        return {name: pooled[scale] for name, scale in scales.items()}

    def pool_enlarged(self, features: list[Tensor], rois: Rois, scale: float) -> Tensor:
        """RoIAlign of R enlarged RoIs, from the level of the original size: [R, C, 7, 7]."""
        if scale == 1:
            return self.pool(features, rois, 7)
        order, counts = self.by_level(rois)
        parts = enlarge_rois(rois.flat()[order], scale).split(counts)
        levels = zip(features, parts, self.strides)
        pooled = [self.align([m], part, 7, [stride]) for m, part, stride in levels]
        return torch.cat(pooled)[order.argsort()]


def make_head(name: str, model: Model) -> tuple[nn.Module, int]:
    """The head of this name, and the width of its vectors."""
    if name.startswith("fc"):
        return FCHead(model.fpn_channels, model.fc_channels), model.fc_channels
    C, width, softmax = model.fpn_channels, model.conv_channels, model.non_local_softmax
    try:
        return ConvHead(C, model.num_blocks, model.non_local, width, softmax), width
    except ValueError as e:
        raise BadInput(f"--num-blocks, --conv-channels: {e}") from e


def main(argv=None):
    return engine.run("double_head", Settings, Detector, argv)


if __name__ == "__main__":
    main()
