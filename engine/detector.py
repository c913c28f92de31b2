"""The contract that every detector keeps, and what all detectors share.

    Detector(model, num_classes)                  model: the script's `Model` settings
    loss(images, targets) -> {name: scalar}       already weighted; their sum is minimised
    outputs(images) -> dict                       all of the network that does not depend on Test
    candidates(outputs, test) -> dict             boxes [N, 4], scores [N], labels [N], image [N]
    detections(candidates, num_images, test)      a list of dicts, one an image, best box first:
                                                  boxes [D, 4], scores [D], labels [D]
    predict(images, test=None) -> list of dicts   the three in a row; None: the script's Test()

`images` of one call to `loss` or `outputs` are padded together; `candidates` are the
boxes that enter the last NMS. Finding them may run the part of the network that depends
on which boxes survive: D2Det's dense local regression, CPM R-CNN's grids. Every setting
of the given `test` is honoured and none is stored, so one call of `outputs` serves any
number of `Test` objects.

A detector with masks has two more tensors among its candidates, masks [N, M, M] and
mask_iou [N]. Its detections then have masks [D, M, M], probabilities over the box
(`data.masks.paste_mask`), and mask_scores [D]. The caller may number the candidates in a
tensor `index` [N]; each detection then has an `index` too, the number of its candidate.

Building a detector with backbone_weights "imagenet", the default, downloads these
weights. "none" starts from scratch, and "random" is for weights that a checkpoint brings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck
from torchvision.ops import DeformConv2d

import kernels
from common import BadInput, ResNetFPN, padded_size
from engine.legacy import caffe_backbone
from engine.settings import Model, Test, flag


class DeformableConv(DeformConv2d):
    """A convolution whose taps look where its input tells them to (DCN).

    [B, C, H, W] -> [B, C', H', W']. It replaces `conv` and keeps its weight and groups. A
    second convolution, `conv_offset`, gives each tap at each output place an offset (y,
    x) in pixels of the input, tap by tap, row by row. The map is zero outside its border.
    With `modulated` (DCNv2) the offsets are followed by each tap's weight in (0, 1).
    `conv_offset` starts at zero: v1 then equals `conv`, and v2, whose weights are 0.5,
    half of it (release). The layer stays float32 under autocast: offsets are positions,
    and deform_conv2d has no bf16 on a CPU.

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

    dcn: "v1" or "v2". In a frozen stage the new offsets are frozen too. Raises BadInput
    for basic blocks, as the releases' framework does.
    """
    for stage in backbone.stages[1:]:
        for block in stage.children():
            if not isinstance(block, Bottleneck):
                raise BadInput(f"--dcn {dcn}: needs bottlenecks, as resnet50 and larger have")
            trains = block.conv2.weight.requires_grad
            block.conv2 = DeformableConv(block.conv2, dcn == "v2").requires_grad_(trains)
    backbone.to(memory_format=torch.channels_last)


class BaseDetector(nn.Module):
    """The backbone, and how candidates become detections. A method adds the rest."""

    settings: Model
    default_test: type[Test] = Test  # for `predict`; each script sets its own

    def __init__(self, model: Model, num_classes: int, extra: str = "pool"):
        super().__init__()
        self.settings, self.num_classes = model, num_classes
        self.backbone = ResNetFPN(
            model.backbone,
            model.fpn_channels,
            extra,
            weights=model.backbone_weights,
            norm=model.norm,
            frozen_stages=model.frozen_stages,
        )
        if model.dcn != "none":
            make_deformable(self.backbone, model.dcn)
        caffe_backbone(self.backbone, model.legacy)

    @torch.no_grad()
    def predict(self, images: list[Tensor], test: Test | None = None) -> list[dict[str, Tensor]]:
        """Detections in uint8 images [3, h, w], with boxes in pixels of these images.

        Nothing is resized, and the model keeps its mode. Call `eval()` first, or use
        `engine.load(checkpoint).detect(image)`, which resizes and sets the mode.
        """
        test = test or self.default_test()
        (candidates,) = candidates_by_size(self, images, [test])
        return self.detections(candidates, len(images), test)

    def detections(
        self, candidates: dict[str, Tensor], num_images: int, test: Test
    ) -> list[dict[str, Tensor]]:
        """NMS within each image and class, then each image's best of at least `min_score`."""
        image, labels = candidates["image"], candidates["labels"]
        groups = image * self.num_classes + labels
        keep, scores = self.suppress(candidates["boxes"], candidates["scores"], groups, test)
        usable = (keep >= 0) & (scores >= test.min_score)
        best = first_per_image(image[keep], num_images, test.max_detections) & usable
        counts = (F.one_hot(image[keep], num_images) * best[:, None]).sum(0)
        counts = counts.to("cpu", non_blocking=True)  # arrives while the host waits here:
        best = best.nonzero()[:, 0]
        keep, scores = keep[best], scores[best]
        flat = dict(boxes=candidates["boxes"][keep], scores=scores, labels=labels[keep])
        further = ("masks", "mask_iou", "index")
        flat |= {k: candidates[k][keep] for k in further if k in candidates}
        return split_images(flat, image[keep], counts.tolist())

    def suppress(
        self, boxes: Tensor, scores: Tensor, groups: Tensor, test: Test
    ) -> tuple[Tensor, Tensor]:
        """The last NMS: kept indices, best first, maybe padded with -1, and scores."""
        keep, _ = kernels.nms_padded(boxes, scores, groups, test.nms_iou)
        return keep, scores[keep]

    def compile_parts(self, **options) -> None:
        """torch.compile backbone and heads in place, each once for all image sizes.

        Weights keep their names. If parts of a head are also called alone (its trunk, or
        those in `called_alone`), they are compiled instead. `options` are those of
        `nn.Module.compile`.
        """
        for part in self.children():
            several = isinstance(part, (nn.ModuleList, nn.ModuleDict))
            for module in part.children() if several else [part]:
                names = getattr(module, "called_alone", ("trunk",))
                parts = [getattr(module, name) for name in names if hasattr(module, name)]
                for called in parts or [module]:
                    called.compile(**{"dynamic": True, **options})


def build_detector(detector: Callable[..., Any], model: Model, num_classes: int) -> Any:
    """detector(model, num_classes). Raises BadInput for widths that no network can have."""
    try:
        return detector(model, num_classes)
    except BadInput:
        raise
    except ValueError as e:  # from a GroupNorm or a convolution
        widths = {k: v for k, v in vars(model).items() if "groups" in k or "channels" in k}
        flags = " ".join(flag(k, v) for k, v in widths.items())
        raise BadInput(f"no network can be built with {flags}: {e}") from e


@torch.no_grad()
def candidates_by_size(model, images: list[Tensor], tests: list[Test]) -> list[dict[str, Tensor]]:
    """Candidates under each of `tests`, found in groups of images of one padded size.

    Padding an image to the size of a larger one would change its detections: the padding
    counts in GroupNorm's statistics, and after the first convolution it is no longer
    zero.
    """
    odd = {p.dtype for p in model.parameters()} - {torch.float32}
    if odd:
        raise BadInput(
            f"the model's weights are {odd.pop()}, detecting takes torch.float32: "
            "model.float(), or for bf16 arithmetic the setting amp"
        )
    groups: dict[tuple, list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(padded_size(image), []).append(i)
    found: list[list[dict]] = [[] for _ in tests]
    for members in groups.values():
        outputs = model.outputs([images[i] for i in members])
        index = torch.tensor(members)
        for parts, test in zip(found, tests):
            part = model.candidates(outputs, test)
            image = index.to(part["image"].device, non_blocking=True)[part["image"]]
            parts.append({**part, "image": image})
    return [{k: torch.cat([part[k] for part in parts]) for k in parts[0]} for parts in found]


def over_threshold(probs: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of probs [R, K] above a threshold: their row [N], label [N] and score [N]."""
    row, label = (probs > threshold).nonzero(as_tuple=True)
    return row, label, probs[row, label]


def first_per_image(image: Tensor, num_images: int, most: int) -> Tensor:
    """Mask [N] of the first `most` entries of each image, in the order given; image [N].

    >>> first_per_image(torch.tensor([0, 1, 0, 0]), num_images=2, most=2)
    tensor([ True,  True,  True, False])
    """
    seen = F.one_hot(image, num_images).cumsum(0)  # [N, B]
    return seen.gather(1, image[:, None])[:, 0] <= most


def split_images(flat: dict[str, Tensor], image: Tensor, counts: list[int]) -> list[dict]:
    """Flat detections [N, ...], best first, of images [N] -> one dict of these for each image.

    counts: how many detections each image has.
    """
    order = image.argsort(stable=True)
    parts = [values[order].split(counts) for values in flat.values()]
    return [dict(zip(flat, part)) for part in zip(*parts)]
