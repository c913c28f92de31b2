"""What looks wrong in a set as a whole, with the likely reason: said once, before training.

A single broken box is dropped and counted. Where most are broken in the same way, the file
means something else by its numbers, and training would go on with wrong boxes unnoticed.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from data.files import listed

FEW = 0.5  # choice: what holds for more than this share of boxes or images is no slip


def why_unusable(corners: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """Reason -> which boxes [n] (xyxy, not clipped) it makes unusable; one reason a box.

    `sizes` [n, 2] are the (h, w) of their images.
    """
    finite = np.isfinite(corners).all(1)
    x1, y1, x2, y2 = np.nan_to_num(corners).T
    height, width = sizes.T
    empty = finite & ((x2 <= x1) | (y2 <= y1))
    clipped_x = np.clip(x2, 0, width) - np.clip(x1, 0, width)
    clipped_y = np.clip(y2, 0, height) - np.clip(y1, 0, height)
    outside = finite & ~empty & ((clipped_x <= 0) | (clipped_y <= 0))
    return {
        "not finite": ~finite,
        "with a width or height of 0 or less": empty,
        "outside the image": outside,
    }


def odd_boxes(boxes: np.ndarray, sizes: np.ndarray) -> list[str]:
    """What is odd about most boxes [n] (x, y, w, h), of images of `sizes` [n, 2] (h, w)."""
    boxes, sizes = _finite(boxes, sizes)
    if not len(boxes):
        return []
    x, y, w, h = boxes.T
    height, width = sizes.T
    if np.mean(boxes.max(1) <= 1) > FEW:
        count = int(np.sum(boxes.max(1) <= 1))
        return [
            f"{count} of {len(boxes)} boxes lie in the first pixel of their image: are they in "
            "shares of its size (0..1)? COCO's are in pixels"
        ]
    if np.mean((w < 0) | (h < 0)) > FEW:
        count = int(np.sum((w < 0) | (h < 0)))
        return [f"{count} of {len(boxes)} boxes end before they begin: are their corners swapped?"]
    beyond = (x + w > width + 1) | (y + h > height + 1) | (x < -1) | (y < -1)
    if beyond.mean() <= FEW:
        return []
    said = f"{beyond.sum()} of {len(boxes)} boxes reach beyond their image"
    as_corners = (w > x) & (h > y) & (w <= width + 1) & (h <= height + 1)
    if as_corners.mean() > 0.9:
        return [f"{said}: are they x1, y1, x2, y2? COCO's are x, y, width, height"]
    return [f"{said}: were they drawn on images of another size?"]


def _finite(boxes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    finite = np.isfinite(boxes).all(1)
    return boxes[finite], sizes[finite]


def odd_categories(categories: list[dict]) -> list[str]:
    """Names that several categories have."""
    counts = Counter(category["name"] for category in categories)
    twice = [name for name, count in counts.items() if count > 1]
    if not twice:
        return []
    return [f"several categories of one name ({listed(twice)}): each is a class of its own"]


def odd_emptiness(num_images: int, num_empty: int) -> list[str]:
    """More than half of the images of a set with annotations are without an object."""
    if num_empty <= FEW * num_images:
        return []
    return [f"{num_empty} of {num_images} images are without an object: are their labels missing?"]


def unused_categories(categories: list[dict], labels: np.ndarray) -> list[str]:
    """The classes without one box in a training set."""
    used = set(labels.tolist())
    unused = [c["name"] for label, c in enumerate(categories) if label not in used]
    return [f"no box to train on of: {listed(unused)}"] if unused else []
