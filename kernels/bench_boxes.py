"""Boxes as a detector makes them, for kernels/bench.py and the tests.

NMS on random boxes, which all overlap or do not overlap at all, says little. So:

- Scenes: ground-truth boxes of real images, resized to fit 800 x 1333, if the environment
  variable DETECTION_DATA names a folder with `coco_tiny/annotations/*.json`. Otherwise made
  up: 5 to 30 boxes, log-uniform from 16 to 500 px, half of them next to another one.
- RPN: every anchor of 8 x stride with ratios 1/2, 1, 2 and strides 4 to 64. Its score is its
  IoU with the nearest ground truth plus noise of 0.05. Its box moves 70 % of the way to that
  ground truth if their IoU is above 0.3, and is jittered by 5 % of its size. The best 2,000
  of each level count.
- RoIs: the best 1,000 of these for each image, after NMS at 0.7.
- Classes: RetinaNet's anchors, moved likewise. The ground truth's class gets the score above,
  another random class a third of it, a third one a floor of noise. The best (anchor, class)
  pairs of each image count, among 80 classes.
"""

import json
import math
import os
from pathlib import Path

import torch
from torch import Tensor
from torchvision.ops import box_iou

from .nms import batched_nms

HEIGHT, WIDTH = 800, 1333
FRAME = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])


def scenes(count: int, folder: str | None = None) -> list[Tensor]:
    """Ground-truth boxes of `count` images of 800 x 1333, float32 [G, 4] xyxy each."""
    folder = folder or os.environ.get("DETECTION_DATA")
    real = _real_scenes(Path(folder) / "coco_tiny" / "annotations") if folder else []
    if real:
        return [real[i % len(real)] for i in range(count)]
    return [_made_up_scene(seed) for seed in range(count)]


def _real_scenes(folder: Path) -> list[Tensor]:
    """The boxes of each image that has any, from all COCO files of a folder."""
    found = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        boxes: dict[int, list] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            boxes[annotation["image_id"]].append(annotation["bbox"])
        for image in content["images"]:
            if boxes[image["id"]]:
                sides = (image["height"], image["width"])
                scale = min(HEIGHT / min(sides), WIDTH / max(sides))
                xywh = torch.tensor(boxes[image["id"]], dtype=torch.float32) * scale
                xyxy = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
                found.append(torch.minimum(xyxy, FRAME))
    return found


def _made_up_scene(seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    num = int(torch.randint(5, 31, (), generator=g))
    size = 16 * torch.exp(torch.rand((num, 2), generator=g) * math.log(500 / 16))
    centre = torch.rand((num, 2), generator=g) * torch.tensor([WIDTH, HEIGHT])
    half = num // 2  # these stand next to one of the others, at its size
    size[:half] = size[num - half :]
    centre[:half] = centre[num - half :] + 0.7 * size[:half] * torch.tensor([1.0, 0.0])
    return _clip(torch.cat([centre - size / 2, centre + size / 2], 1))


def _clip(boxes: Tensor) -> Tensor:
    return torch.minimum(boxes.clamp(min=0), FRAME)


def _anchors(stride: int, sizes: list[float]) -> Tensor:
    y = (torch.arange(math.ceil(HEIGHT / stride)) + 0.5) * stride
    x = (torch.arange(math.ceil(WIDTH / stride)) + 0.5) * stride
    centre = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flip(-1).reshape(-1, 1, 2)
    shapes = [[s * r**-0.5, s * r**0.5] for s in sizes for r in (0.5, 1.0, 2.0)]  # (w, h)
    half = torch.tensor(shapes) / 2
    return torch.cat([centre - half, centre + half], -1).reshape(-1, 4)


def _detect(anchors: Tensor, gt: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A detector's boxes from the anchors, both [A, 4]; scores and gt indices, both [A]."""
    iou, nearest = torch.cat([box_iou(a, gt) for a in anchors.split(50_000)]).max(1)
    moved = anchors + 0.7 * (iou > 0.3)[:, None] * (gt[nearest] - anchors)
    size = (moved[:, 2:] - moved[:, :2]).repeat(1, 2)
    moved = _clip(moved + 0.05 * size * torch.randn(moved.shape, generator=g))
    score = iou + 0.05 * torch.randn(iou.shape, generator=g)
    return moved, score.clamp(1e-4, 1), nearest


def rpn_candidates(gts: list[Tensor], per_level: int = 2000):
    """RPN's boxes [N, 4], scores [N], groups [N] (image x level) and images [N]."""
    parts = []
    for image, gt in enumerate(gts):
        g = torch.Generator().manual_seed(image)
        for level, stride in enumerate((4, 8, 16, 32, 64)):
            boxes, scores, _ = _detect(_anchors(stride, [8.0 * stride]), gt, g)
            scores, best = scores.topk(min(per_level, len(scores)))
            group = torch.full_like(best, image * 5 + level)
            parts.append((boxes[best], scores, group, group // 5))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def class_candidates(gts: list[Tensor], per_image: int, num_classes: int = 80):
    """Class boxes [N, 4], scores [N], groups [N] (image x class) and images [N]."""
    parts = []
    for image, gt in enumerate(gts):
        g = torch.Generator().manual_seed(image)
        sizes = {s: [4 * s * 2 ** (i / 3) for i in range(3)] for s in (8, 16, 32, 64, 128)}
        anchors = torch.cat([_anchors(stride, size) for stride, size in sizes.items()])
        boxes, scores, nearest = _detect(anchors, gt, g)
        # Classes are as uneven as in photographs: a few have most objects.
        classes = (num_classes * torch.rand(len(gt), generator=g) ** 3).long()[nearest]
        other = torch.randint(num_classes, (2, len(boxes)), generator=g)
        noise = 0.2 * torch.rand(len(boxes), generator=g)
        scores, best = torch.cat([scores, scores / 3, noise]).topk(per_image)
        group = torch.cat([classes, *other])[best] + image * num_classes
        parts.append((boxes[best % len(boxes)], scores, group, group // num_classes))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def proposals(gts: list[Tensor], per_image: int = 1000) -> Tensor:
    """RoIs [R, 5] (image, xyxy) that remain of RPN's boxes after NMS at 0.7."""
    boxes, scores, groups, images = rpn_candidates(gts)
    keep = batched_nms(boxes, scores, groups, 0.7)
    keep = torch.cat([keep[images[keep] == i][:per_image] for i in range(len(gts))])
    rois = torch.cat([images[keep, None].float(), boxes[keep]], 1)  # [R, 5]
    return rois[((rois[:, 3:] - rois[:, 1:3]) > 0).all(1)]
