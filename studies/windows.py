"""What Double-Head's Section 3 sums: windows around objects, moments by IoU, groups of objects."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from studies.boxes import is_counted

BINS = 20  # of a proposal's IoU (3.1)
SIZES = ("small objects", "medium objects", "large objects")
CLASSES = ("easy classes", "medium classes", "hard classes")


def sliding_windows(gt_boxes: Tensor, steps: int = 11) -> Tensor:
    """Windows around each gt (3.1): [G, 4] -> [G, steps^4, 4]; steps^4 is 14,641 for 11.

    Every combination of shifts in x and y (up to one side of the gt) with widths and heights (half
    to double). The gt is the middle window. choice: the steps widen quadratically from it, because
    even steps would leave the bins next to IoU 1 empty.

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

    x = iou, which chooses the bin; s = score; r = regressed; labels; sizes 0..2: all [N].
    """
    x, s, r = (v.double() for v in (iou, score, regressed))
    terms = torch.stack([torch.ones_like(x), x, x * x, s, s * s, x * s, r, r * r], 1)
    cell = (labels * 3 + sizes) * BINS + (x * BINS).long().clamp(max=BINS - 1)
    moments.view(-1, 8).index_add_(0, cell.cpu(), terms.cpu())


def statistics(moments: Tensor) -> dict:
    """moments [BINS, 8] -> count, mean and deviation of each bin (None: empty); Pearson of s, x."""
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
    """Correlation of score and IoU from moments [8]; None if one of them does not vary."""
    n, x, xx, s, ss, xs, _, _ = moments.tolist()
    spread = (n * xx - x * x) * (n * ss - s * s)
    return round((n * xs - x * s) / spread**0.5, 4) if spread > 1e-12 * n**4 else None


def cell_correlation(cells: Tensor) -> Tensor:
    """Cosine between all pairs of cells: [..., S*S, D] -> [..., S*S, S*S] (3.4, Appendix A)."""
    unit = F.normalize(cells.double(), dim=-1)
    return unit @ unit.transpose(-1, -2)


def groups_of_classes(per_class: dict[str, float | None]) -> dict[str, list[str]]:
    """Thirds of the classes by falling AP (3.1), without the classes that have no AP."""
    known = sorted((k for k, v in per_class.items() if v is not None), key=lambda k: -per_class[k])
    edges = [round(i * len(known) / 3) for i in range(4)]
    return {name: known[a:b] for name, a, b in zip(CLASSES, edges, edges[1:])}


def choose_objects(annotations: dict[Any, list[dict]], most: int) -> dict[Any, list[int]]:
    """image id -> which of its objects are analysed: `most` in all, evenly spread (0: all).

    annotations: those of `studies.boxes.annotations_by_image`. Crowds are never chosen.
    """
    eligible = [
        (image_id, i)
        for image_id, objects in annotations.items()
        for i, annotation in enumerate(objects)
        if is_counted(annotation)
    ]
    count = min(most or len(eligible), len(eligible))
    chosen: dict[Any, list[int]] = {}
    for i in range(count):
        image_id, position = eligible[i * len(eligible) // count]
        chosen.setdefault(image_id, []).append(position)
    return chosen


def size_group(areas: Tensor) -> Tensor:
    """COCO's small, medium, large: 0, 1, 2 of areas [N] in the original image's pixels."""
    return (areas > 32**2).long() + (areas > 96**2)
