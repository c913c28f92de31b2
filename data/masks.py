"""Masks: COCO's segmentations (polygons or run lengths), checked, decoded, cropped and pasted.

A segmentation is a list of polygons [x, y, x, y, ...] or an RLE: {"size": [h, w],
"counts": the lengths of runs of pixels}. Detectors see a mask as a crop of `MASK_SIDE`
cells over its box.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor

# Cells along each side of a cropped mask. choice: four by four for each cell of a 28x28
# target
MASK_SIDE = 112

ANYWHERE = (-math.inf, -math.inf, math.inf, math.inf)
FAR = 1e5  # px; choice: how far a polygon may reach outside its image


# ------------------------------------------------------------------------------ annotations


def mask_problem(segmentation, height: int, width: int) -> str:
    """The first thing in a segmentation that pycocotools would trip on; "" if there is none.

    A missing segmentation is no problem here: `check_coco` decides whether masks are
    needed.
    """
    if not segmentation:
        return ""
    if isinstance(segmentation, list):
        for polygon in segmentation:  # values may still be odd (not finite, far away)
            even = isinstance(polygon, list) and len(polygon) % 2 == 0
            if not even or not all(type(v) in (int, float) for v in polygon):
                return f"a polygon is {str(polygon)[:60]}, not x, y, x, y ..."
        return ""
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        return f"segmentation is neither polygons nor RLE: {str(segmentation)[:60]}"
    size, counts = segmentation["size"], segmentation["counts"]
    if size != [height, width]:
        return f"RLE of size {size}, its image is {height}x{width} px (h x w)"
    runs = run_lengths(counts) if isinstance(counts, str) else counts
    whole = isinstance(runs, list) and all(type(n) is int and 0 <= n < 2**32 for n in runs)
    if not whole:
        return f"RLE with counts {str(counts)[:60]}"
    if sum(runs) != height * width:
        return "RLE whose counts do not fill its image"
    return ""


def run_lengths(counts: str) -> list[int]:
    """The runs of a compressed RLE; the last is -1 if the text ends in the middle of a run.

    pycocotools reads past the end of a text that is too short. A character holds five
    bits of a number, the lowest first; its sixth bit says that more follow. From the
    fourth run on, a number is the difference to the run two before.
    """
    runs: list[int] = []
    value = shift = 0
    for code in counts.encode():
        bits = code - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:  # the sign
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        runs.append(-1)
    return runs


def is_ignored(annotation: dict) -> bool:
    """Is the object a crowd or marked difficult: neither to be found nor background?"""
    return bool(annotation.get("iscrowd", 0) or annotation.get("difficult", 0))


def usable_mask(annotation: dict, box: Sequence[float] = ANYWHERE) -> list | dict | None:
    """The usable part of a checked annotation's mask; None if it misses `box` (xyxy).

    Polygons with fewer than three points are left out, and those with a point that is not
    finite or so far away that pycocotools, which walks along the edges, would not arrive.
    An ignored object without a usable mask gets its whole bbox, so that it is still
    ignored.
    """
    segmentation = annotation.get("segmentation") or []
    if isinstance(segmentation, list):
        near = [p for p in segmentation if all(abs(v) < FAR for v in p)]
        segmentation = [p for p in near if len(p) >= 6]
    x1, y1, x2, y2 = _extent(segmentation)
    if min(x2, box[2]) > max(x1, box[0]) and min(y2, box[3]) > max(y1, box[1]):
        return segmentation
    if not is_ignored(annotation):
        return None
    x, y, w, h = annotation["bbox"]
    corners = [x, y, x + w, y, x + w, y + h, x, y + h]
    return [[min(max(v, -FAR), FAR) for v in corners]]


def _extent(segmentation: list | dict) -> tuple[float, float, float, float]:
    """The smallest box (xyxy) around a mask; zeros for a mask without pixels."""
    if isinstance(segmentation, dict):
        x, y, w, h = rle.toBbox(_compressed(segmentation))
        return x, y, x + w, y + h
    xs = [x for polygon in segmentation for x in polygon[0::2]]
    ys = [y for polygon in segmentation for y in polygon[1::2]]
    if not xs:
        return 0, 0, 0, 0
    return min(xs), min(ys), max(xs), max(ys)


# ------------------------------------------------------------------------------ bitmaps


def _compressed(segmentation: dict) -> dict:
    if isinstance(segmentation["counts"], list):
        return rle.frPyObjects(segmentation, *segmentation["size"])
    return segmentation


def decode_mask(segmentation: dict) -> Tensor:
    """RLE -> bool [h, w]."""
    return torch.from_numpy(rle.decode(_compressed(segmentation))).bool()


def encode_mask(bitmap: Tensor) -> dict:
    """bool [h, w] -> compressed RLE that JSON can hold.

    >>> encode_mask(torch.tensor([[False, True], [False, True]]))
    {'size': [2, 2], 'counts': '22'}
    """
    encoded = rle.encode(np.asfortranarray(bitmap.numpy()).view(np.uint8))
    return {"size": [*bitmap.shape], "counts": encoded["counts"].decode()}


# ------------------------------------------------------------------------------ crops


def crop_mask(segmentation: list | dict, box: Tensor, side: int = MASK_SIDE) -> Tensor:
    """A usable mask over its box [4]: bool [side, side], at the centres of the box's cells.

    Polygons are drawn at that size; no bitmap as large as the image is made.
    """
    if isinstance(segmentation, dict):
        return crop_bitmaps(decode_mask(segmentation)[None], box[None], side)[0]
    corner = box[:2].numpy()
    wh = (box[2:] - box[:2]).clamp(min=1e-6).numpy()
    polygons = []
    for polygon in segmentation:
        points = (np.reshape(polygon, (-1, 2)) - corner) / wh * side
        # Seen from a narrow box the edges lead far away; pycocotools would walk all of
        # them.
        polygons.append(points.clip(-99 * side, 99 * side).ravel().tolist())
    bitmap = rle.decode(rle.merge(rle.frPyObjects(polygons, side, side)))
    return torch.from_numpy(bitmap).bool()


def crop_bitmaps(bitmaps: Tensor, boxes: Tensor, side: int = MASK_SIDE) -> Tensor:
    """Masks [G, h, w] over boxes [G, 4]: [G, side, side], read at the cells' centres."""
    h, w = bitmaps.shape[1:]
    centres = (torch.arange(side) + 0.5) / side  # of the cells, as shares of a box's side
    x1, y1, x2, y2 = boxes[:, :, None].unbind(1)  # [G, 1] each
    x = (x1 + centres * (x2 - x1)).long().clamp(0, w - 1)  # [G, side]
    y = (y1 + centres * (y2 - y1)).long().clamp(0, h - 1)
    return bitmaps[torch.arange(len(boxes))[:, None, None], y[:, :, None], x[:, None]]


def paste_mask(mask: Tensor, box: Tensor, size: tuple[int, int]) -> Tensor:
    """bool [h, w] of that size: the pixels in a box [4] where the mask [M, M] is above 0.5.

    The mask is interpolated bilinearly at the centre of each pixel, between the centres
    of its cells. Beyond the outermost centres, up to the sides of the box, it is
    constant.
    """
    x1, y1, x2, y2 = box.tolist()
    rows, vertical = _paste_weights(y1, y2, size[0], len(mask))
    columns, horizontal = _paste_weights(x1, x2, size[1], len(mask))
    bitmap = torch.zeros(size[1], size[0], dtype=torch.bool).T  # in columns, as an RLE
    bitmap[rows, columns] = vertical @ mask.float().cpu() @ horizontal.T > 0.5
    return bitmap


def _paste_weights(low: float, high: float, length: int, side: int) -> tuple[slice, Tensor]:
    """The n pixels with centres in [low, high), and each cell's weight in them [n, side]."""
    first = max(0, math.ceil(low - 0.5))
    last = max(first, min(length, math.ceil(high - 0.5)))
    pixels = torch.arange(first, last) + 0.5
    at = ((pixels - low) / max(high - low, 1e-6) * side - 0.5).clamp(0, side - 1)
    weights = (1 - (at[:, None] - torch.arange(side)).abs()).clamp(min=0)
    return slice(first, last), weights
