"""What a data set must offer, and what its items look like: the one contract of all data sets.

An item is (image, target). The image is a uint8 tensor [3, h, w], RGB. The target is a
dict:

    boxes     [G, 4]  float32 xyxy, pixels of the image
    labels    [G]     int64, 0..K-1: positions in the data set's `categories`
    ignore    [G]     bool: a crowd or a difficult object, neither to be found nor background
    image_id          number or string, unique in the data set
    size              (h, w) of the image as it is on disk
    masks     [G, h, w]  bool; only for detectors that are trained or tested with masks

Plain tensors do; `make_target` wraps the boxes so that torchvision's v2 transforms move
them too.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torchvision import tv_tensors


class DetectionDataset(Protocol):
    """Any torch Dataset with these members can be trained on and evaluated.

    Nothing else is required. Members, coco() and the first items are checked before the
    first step, every other item as it is drawn (`data.own`).
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, dict]:
        """(image, target), as described at the top of this file."""
        ...

    @property
    def sizes(self) -> Any:
        """(h, w) of each image, without opening it: an array [n, 2] or a list of pairs."""
        ...

    @property
    def categories(self) -> list[dict]:
        """One dict of id and name for each class, in the order of the labels."""
        ...

    def coco(self) -> dict:
        """The ground truth as a COCO dictionary; needed only where detections are scored."""
        ...


def make_target(boxes, labels, ignore, image_id: int | str, size) -> dict:
    """A target in the form above, whose boxes v2 transforms move with the image.

    >>> target = make_target([[0, 0, 10, 20]], [2], [False], image_id=7, size=(40, 60))
    >>> target["labels"], target["ignore"], target["size"]
    (tensor([2]), tensor([False]), (40, 60))
    """
    return {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(size)),
        "labels": torch.as_tensor(labels, dtype=torch.long),
        "ignore": torch.as_tensor(ignore, dtype=torch.bool),
        "image_id": image_id,
        "size": tuple(size),
    }
