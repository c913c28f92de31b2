"""Resizing and flipping: a data set as training and as testing see it.

`TrainingImages` draws a scale and a flip for each image, `TestImages` gives each image at
every test scale. Boxes and masks move with the image; masks are cropped to their boxes on
the way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from data.contract import DetectionDataset
from data.masks import crop_bitmaps


class ShortestSize(v2.RandomShortestSize):
    """Torchvision's resizing, but the sides of very thin images keep at least one pixel."""

    def make_params(self, flat_inputs):
        params = super().make_params(flat_inputs)
        return {**params, "size": [max(1, side) for side in params["size"]]}


class MaskCrops(tv_tensors.TVTensor):
    """Masks [G, 112, 112] over their objects' boxes: flips mirror them, resizing does not."""


@v2.functional.register_kernel("horizontal_flip", MaskCrops)
def _flip_masks(masks, *_, **__):
    return tv_tensors.wrap(masks.flip(-1), like=masks)


def as_transformed(target: dict, size: tuple[int, int]) -> dict:
    """A copy of a target whose boxes and masks v2 transforms move with the image."""
    target = dict(target)
    boxes = torch.as_tensor(target["boxes"], dtype=torch.float32).reshape(-1, 4)
    target["boxes"] = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)
    masks = target.get("masks")
    if masks is not None and not isinstance(masks, MaskCrops):
        crops = crop_bitmaps(masks.as_subclass(Tensor), boxes.as_subclass(Tensor))
        target["masks"] = crops.as_subclass(MaskCrops)
    return target


def _wrapped_item(data: DetectionDataset, index: int) -> tuple[Tensor, dict]:
    """An item of a data set as v2 transforms take it."""
    image, target = data[index]
    height, width = image.shape[1:]
    return tv_tensors.Image(image), as_transformed(target, (height, width))


def _plain_item(image: Tensor, target: dict) -> tuple[Tensor, dict]:
    """The transformed item as plain tensors."""
    for name in ("boxes", "masks"):
        if name in target:
            target[name] = target[name].as_subclass(Tensor)
    return image.as_subclass(Tensor), target


def _resizes(sides: Sequence[int], max_size: int, largest: int) -> list[ShortestSize]:
    """A transform for each shorter side; `max_size` is the limit at the side `largest`."""
    return [ShortestSize(side, round(max_size * side / largest)) for side in sides]


class TrainingImages(Dataset):
    """A data set's images at random scales, mirrored at random; item (epoch, index).

    The augmentation is a function of (seed, epoch, index) alone, so that neither the
    number of loader processes nor an interruption changes it. An item is a uint8 image
    [3, h, w] and its target, as plain tensors, with masks [G, 112, 112] cropped to the
    objects' boxes.
    """

    def __init__(
        self, data: DetectionDataset, scales: Sequence[int], max_size: int, flip: float, seed: int
    ):
        self.data, self.seed = data, seed
        self.resizes = _resizes(scales, max_size, max(scales))
        self.flip = v2.RandomHorizontalFlip(flip)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict]:
        epoch, index = key
        image, target = _wrapped_item(self.data, index)
        seed = np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)[0]
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed GPUs too, which fork_rng(devices=[]) does not
            # restore
            torch.default_generator.manual_seed(int(seed))
            resize = self.resizes[int(torch.randint(len(self.resizes), ()))]
            image, target = resize(image, target)
            image, target = self.flip(image, target)
        return _plain_item(image, target)


class TestImages(Dataset):
    """A data set's images at every test scale: item i is a list of (image, target).

    Longer sides are limited in the proportion of `max_size` to the largest of the
    training `scales`. The target's boxes are in pixels of the resized image, its `size`
    is the original's.
    """

    __test__ = False  # keeps pytest from collecting the class by its name

    def __init__(
        self,
        data: DetectionDataset,
        test_scales: Sequence[int],
        max_size: int,
        scales: Sequence[int],
    ):
        self.data = data
        self.resizes = _resizes(test_scales, max_size, max(scales))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> list[tuple[Tensor, dict]]:
        image, target = _wrapped_item(self.data, index)
        # Torchvision draws from a list of one scale: leave the global generator as it
        # was.
        with torch.random.fork_rng(devices=[]):
            resized = [resize(image, target) for resize in self.resizes]
        return [_plain_item(view, moved) for view, moved in resized]
