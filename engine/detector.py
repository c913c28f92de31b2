"""The contract that every detector keeps, and what detectors share.

A Detector(config, num_classes) has a `loss`, and says what it sees in three steps, of which the
network runs once:

    loss(images, targets) -> {name: scalar}       already weighted; their sum is minimised
    outputs(images) -> dict                       the network's, for images of one padded size
    select(outputs, config) -> {boxes [N, 4], scores [N], labels [N], image [N]}: what enters NMS
    finish(candidates, B, config) -> B dicts of boxes [D, 4], scores [D], labels [D], best first
    predict(images) = finish(select(outputs(images)), B)

A detector with masks has two more in candidates, masks [N, M, M] and mask_iou [N], and in what it
finds: masks [D, M, M], probabilities over the box (`paste_mask`), and mask_scores [D].

`self.config` is how the model was built. The `config` that `select` and `finish` take says how to
score and suppress: one forward pass serves many settings (`Variants`).

Building one with backbone_weights "imagenet", the default, downloads them; "none" starts from
nothing, and "random" is for weights that come from a checkpoint.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from common import ResNetFPN, constant, padded_size
from engine.settings import Config


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
            dcn=config.dcn,
        )

    def predict(self, images: list[Tensor]) -> list[dict]:
        """Detections in uint8 images [3, h, w] as the network gets them, boxes in their pixels.

        Nothing is resized, and the model stays in the mode that it is in: call `eval()` first, or
        use `engine.load(checkpoint).detect(image)`, which does all of that.
        """
        return self.finish(candidates_by_size(self, images), len(images))

    @torch.no_grad()
    def candidates(self, images: list[Tensor]) -> dict[str, Tensor]:
        return self.select(self.outputs(images), self.config)

    def compile_parts(self, **options) -> None:
        """torch.compile backbone and heads in place, each once for all image sizes and numbers.

        Weights keep their names. Of a head that has a trunk it is the trunk that is compiled, since
        training also calls it alone. `options` are those of `nn.Module.compile`.
        """
        for part in self.children():
            lists = (nn.ModuleList, nn.ModuleDict)
            for module in part.children() if isinstance(part, lists) else [part]:
                getattr(module, "trunk", module).compile(**{"dynamic": True, **options})

    def finish(self, candidates: dict, num_images: int, config: Config | None = None) -> list[dict]:
        """NMS inside each image and class, then each image's best, under this config or another."""
        config, keys = config or self.config, ("boxes", "scores", "labels", "image")
        boxes, scores, labels, image = (candidates[k] for k in keys)
        groups = image * self.num_classes + labels
        keep, scores = self.suppress(boxes, scores, groups, config)
        best = first_per_image(image[keep], num_images, config.max_detections)
        keep, scores = keep[best], scores[best]
        more = {k: candidates[k][keep] for k in ("masks", "mask_iou") if k in candidates}
        return split_images(boxes[keep], scores, labels[keep], image[keep], num_images, **more)

    def suppress(self, boxes: Tensor, scores: Tensor, groups: Tensor, config: Config):
        """Indices kept, best first, and their scores: a method may have its own."""
        keep = kernels.batched_nms(boxes, scores, groups, config.nms_iou)
        return keep, scores[keep]


def over_threshold(probs: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of probs [R, K] above a threshold: their row [N], label [N] and score [N]."""
    row, label = (probs > threshold).nonzero(as_tuple=True)
    return row, label, probs[row, label]


def first_per_image(image: Tensor, num_images: int, most: int) -> Tensor:
    """Mask [N]: the first `most` entries of each image, in the order given (image [N])."""
    seen = F.one_hot(image, num_images).cumsum(0)  # [N, B]
    return seen.gather(1, image[:, None])[:, 0] <= most


def split_images(
    boxes: Tensor, scores: Tensor, labels: Tensor, image: Tensor, num_images: int, **more: Tensor
):
    """Flat detections, best score first -> one dict of boxes, scores, labels, more per image."""
    order = image.argsort(stable=True)
    counts = torch.bincount(image, minlength=num_images).tolist()
    flat = dict(boxes=boxes, scores=scores, labels=labels, **more)
    parts = [x[order].split(counts) for x in flat.values()]
    return [dict(zip(flat, part)) for part in zip(*parts)]


def gt_masks(gt_boxes: Tensor, image: Tensor, targets: list[dict]) -> Tensor:
    """The masks [R, M, M] of the objects with these gt_boxes [R, 4] in images [R].

    Of two objects in the same box it is the first one's.
    """
    flat = {k: torch.cat([t[k] for t in targets]) for k in ("boxes", "ignore", "masks")}
    owner = [i for i, t in enumerate(targets) for _ in range(len(t["boxes"]))]
    same = (flat["boxes"] == gt_boxes[:, None]).all(2) & ~flat["ignore"]  # [R, G]
    same &= constant(owner, image.device) == image[:, None]
    return flat["masks"][F.pad(same, (0, 1)).int().argmax(1)]  # padded: G may be 0


def paste_mask(mask: Tensor, box: Tensor, size: tuple[int, int]) -> Tensor:
    """bool [h, w] of that size: the pixels in a box [4] whose mask [M, M] is over 0.5.

    At the centre of each pixel the mask is interpolated between the centres of its cells, bilinear;
    from its outermost centres to the box's sides it stays what it is there.
    """
    side, (x1, y1, x2, y2) = len(mask), box.tolist()
    cells, windows, weights = torch.arange(side), [], []
    for low, high, most in ((y1, y2, size[0]), (x1, x2, size[1])):
        first, last = max(0, math.ceil(low - 0.5)), min(most, math.ceil(high - 0.5))
        pixels = torch.arange(first, max(first, last)) + 0.5
        at = ((pixels - low) / max(high - low, 1e-6) * side - 0.5).clamp(0, side - 1)
        windows.append(slice(first, max(first, last)))
        weights.append((1 - (at[:, None] - cells).abs()).clamp(min=0))  # [pixels, M]
    bitmap = torch.zeros(size[1], size[0], dtype=torch.bool).T  # column by column, as RLE has it
    bitmap[windows[0], windows[1]] = weights[0] @ mask.float().cpu() @ weights[1].T > 0.5
    return bitmap


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
