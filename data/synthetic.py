"""`SyntheticDetection`: textured shapes on textured ground, a laboratory without a download.

Each image is a function of (seed, index). Their boxes and masks are exact, which no
annotated photo offers: what is hidden, thin or hollow can be measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.contract import make_target
from data.masks import encode_mask

KEEP_BYTES = 256 * 2**20  # choice: remembered images may take so much memory


def _disc(u, v):
    return np.hypot(u, v) < 1


def _ring(u, v, inner=0.62):
    r = np.hypot(u, v)
    return (r < 1) & (r > inner)


def _star(u, v):
    ray = np.abs(np.arctan2(v, u) * 5 / (2 * np.pi) % 1 * 2 - 1)  # 1 at the five tips
    return np.hypot(u, v) < 0.42 + 0.58 * ray**1.3


def _frame(u, v):
    side = np.maximum(np.abs(u), np.abs(v))
    return (side < 0.75) & (side > 0.42)


# Each class is a function of coordinates u, v, in [-1, 1] after rotation: is the point inside?
SHAPES = {
    "disc": _disc,
    "ellipse": lambda u, v: u**2 + (v / 0.45) ** 2 < 1,
    "ring": _ring,
    "arc": lambda u, v: _ring(u, v, 0.55) & (np.abs(np.arctan2(v, u)) > 0.9),
    "bar": lambda u, v: (np.abs(u) < 1) & (np.abs(v) < 0.17),
    "cross": lambda u, v: (np.minimum(np.abs(u), np.abs(v)) < 0.24) & _disc(u, v),
    "triangle": lambda u, v: (v < 0.5) & (v > 1.73 * np.abs(u) - 1),
    "star": _star,
    "crescent": lambda u, v: _disc(u, v) & ((u - 0.5) ** 2 + v**2 > 0.66),
    "frame": _frame,
}


@dataclass
class Pose:
    """Class, place (px), size and colour of a shape that is about to be painted."""

    label: int
    radius: float  # half of the sides of the square that the shape fills before rotation, px
    angle: float
    x: float
    y: float
    shift: np.ndarray  # [3, 1, 1]: distance of its colour from what it covers, modulo 1


class Scene(NamedTuple):
    """An image that is finished, and what is in it."""

    image: np.ndarray  # uint8 [3, size, size]
    owner: np.ndarray  # int8 [size, size]: the object that shows at each pixel; -1: none
    labels: list[int]
    areas: list[int]  # pixels of each object, its hidden ones included


class Painter:
    """One image while it is painted. Everything random comes from `rng`, in a fixed order."""

    def __init__(self, rng: np.random.Generator, image: np.ndarray):
        self.rng, self.image = rng, image  # image: float32 [3, size, size], about 0..1
        self.size = image.shape[-1]
        self.owner = np.full((self.size, self.size), -1, np.int8)
        self.labels: list[int] = []
        self.areas: list[int] = []
        self.visible: list[int] = []  # pixels of each object that no later one covers

    def draw_pose(self) -> Pose:
        """A pose of random class, place and colour; sizes are log-uniform."""
        rng = self.rng
        low, high = 32 / 3, min(288, 0.9 * self.size)
        return Pose(  # arguments are evaluated in this order
            label=int(rng.integers(len(SHAPES))),
            radius=math.exp(rng.uniform(math.log(low), math.log(max(low, high)))) / 2,
            angle=rng.uniform(0, 2 * np.pi),
            x=rng.uniform(0.05, 0.95) * self.size,
            y=rng.uniform(0.05, 0.95) * self.size,
            shift=rng.uniform(0.25, 0.75, (3, 1, 1)).astype(np.float32),
        )

    def paint_objects(self) -> None:
        """One to six objects (seldom none), a third of them with a twin, among fragments."""
        rng = self.rng
        has_objects = rng.random() > 0.03
        for _ in range(rng.integers(1, 7) if has_objects else 0):
            pose = self.draw_pose()
            if self.paint(pose) and rng.random() < 1 / 3:
                turn = rng.uniform(0, 2 * np.pi)
                step = pose.radius * rng.uniform(1.7, 2.2)
                x, y = pose.x + step * np.cos(turn), pose.y + step * np.sin(turn)
                self.paint(replace(pose, x=x, y=y))  # its twin, right beside it
            if rng.random() < 0.3:
                self.paint_fragment()

    def paint_fragment(self) -> None:
        """A slice of a shape: a distractor without a label."""
        self.paint(self.draw_pose(), fragment=True)

    def paint(self, pose: Pose, fragment: bool = False) -> bool:
        """Paint a shape, unless an earlier object would lose over half; was it painted?"""
        rng, size = self.rng, self.size
        x0, y0 = int(pose.x - pose.radius), int(pose.y - pose.radius)
        shape = self._rasterise(pose, x0, y0, fragment)
        x1, y1 = x0 + shape.shape[1], y0 + shape.shape[0]
        if min(x1, y1) <= 0 or max(x0, y0) >= size:
            return False  # a twin outside the image
        inside = shape[max(0, -y0) : size - y0, max(0, -x0) : size - x0]
        x0, y0 = max(0, x0), max(0, y0)
        owner = self.owner[y0:y1, x0:x1]
        covered = np.bincount(owner[inside] + 1, minlength=len(self.areas) + 1)[1:]
        visible = np.array(self.visible) - covered
        if (visible < 0.5 * np.array(self.areas)).any():
            return False  # an earlier object would lose too much
        if not fragment and inside.sum() < max(12, 0.5 * shape.sum()):
            return False  # hardly a pixel, or mostly outside the image
        window = self.image[:, y0:y1, x0:x1]
        # In each channel at least a quarter of the range away from what is there.
        colour = (window.mean((1, 2), keepdims=True) + pose.shift) % 1
        texture = stripes(rng, y0, x0, *owner.shape) * rng.uniform(0, 0.15)
        np.copyto(window, colour + texture, where=inside)
        owner[inside] = -1 if fragment else len(self.areas)
        self.visible[:] = visible.tolist()
        if not fragment:
            self.labels.append(pose.label)
            self.areas.append(int(shape.sum()))
            self.visible.append(int(inside.sum()))
        return True

    def _rasterise(self, pose: Pose, x0: int, y0: int, fragment: bool) -> np.ndarray:
        """The shape's pixels, bool [n, n], in a window whose corner is at (x0, y0)."""
        side = np.arange(2 * pose.radius + 2, dtype=np.float32) + 0.5
        x = ((side + x0 - pose.x) / pose.radius)[None]
        y = ((side + y0 - pose.y) / pose.radius)[:, None]
        cos, sin = np.cos(pose.angle), np.sin(pose.angle)
        u, v = cos * x + sin * y, cos * y - sin * x
        shape = list(SHAPES.values())[pose.label](u, v)
        if fragment:  # narrower than half of the shape
            start = self.rng.uniform(-0.6, 0.3)
            shape &= (u > start) & (u < start + self.rng.uniform(0.2, 0.5))
        return shape


def stripes(rng: np.random.Generator, y0: int, x0: int, h: int, w: int) -> np.ndarray:
    """A plane wave, or the product of two, of random period, in that window: [h, w]."""
    turn, period = rng.uniform(0, np.pi), rng.uniform(5, 24)
    y = np.arange(y0, y0 + h, dtype=np.float32)[:, None] * (2 * np.pi / period)
    x = np.arange(x0, x0 + w, dtype=np.float32)[None] * (2 * np.pi / period)
    if rng.random() < 0.5:
        return np.sin(np.cos(turn) * x + np.sin(turn) * y)
    return np.sin(x + turn) * np.sin(y)


class SyntheticDetection(Dataset):
    """Textured shapes on textured ground, made on the fly from (seed, index).

    Ten classes of shape; colour says nothing about the class. Sizes are log-uniform over
    COCO's small, medium and large thirds (32/3 to 288 px, if the image is that large).
    Objects occlude each other (at least half of each stays visible), a third has a twin
    right beside it, and unlabelled fragments of shapes lie around. Boxes and masks are those
    of the visible part; `visible` [G] in the target is its share of the whole shape.

    With `keep`, images are remembered once they are made, if all of them fit into 256 MiB.
    """

    def __init__(
        self,
        num_images: int = 2000,
        size: int = 128,
        seed: int = 0,
        masks: bool = False,
        keep: bool = False,
    ):
        self.size, self.seed, self.masks = size, seed, masks
        self.categories = [{"id": i, "name": name} for i, name in enumerate(SHAPES, 1)]
        self.image_ids = list(range(num_images))
        self.sizes = np.full((num_images, 2), size)
        self.keep = keep and num_images * 4 * size**2 <= KEEP_BYTES  # image and owner
        self._scenes: dict[int, Scene] = {}
        self._coco: dict | None = None
        pixels = (np.arange(size, dtype=np.float32) + 0.5) / size
        knots = np.arange(7, dtype=np.float32) / 6
        # [size, 7]: weights that interpolate linearly between seven knots
        self._blend = np.clip(1 - 6 * np.abs(pixels[:, None] - knots), 0, None)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        scene = self._scenes.get(index)
        if scene is None:
            scene = self._make(index)
        if self.keep:
            self._scenes[index] = scene
        # Copies: a caller may change what it gets.
        return torch.tensor(scene.image), self._target(index, scene)

    def _make(self, index: int) -> Scene:
        rng = np.random.default_rng((self.seed, index))
        colours = rng.random((3, 7, 7), dtype=np.float32)  # the ground: a coarse grid, blended
        image = self._blend @ colours @ self._blend.T  # [3, size, size]
        image += stripes(rng, 0, 0, self.size, self.size) * rng.uniform(0, 0.15)
        painter = Painter(rng, image)
        for _ in range(rng.integers(3)):  # fragments beneath the objects
            painter.paint_fragment()
        painter.paint_objects()
        image += rng.normal(0, rng.uniform(0.01, 0.06), image.shape).astype(np.float32)
        pixels = (image.clip(0, 1) * 255).astype(np.uint8)
        return Scene(pixels, painter.owner, painter.labels, painter.areas)

    def _target(self, index: int, scene: Scene) -> dict:
        G = len(scene.labels)
        masks = scene.owner == np.arange(G)[:, None, None]  # [G, size, size]
        columns, rows = masks.any(1), masks.any(2)  # [G, size] each
        x1, y1 = columns.argmax(1), rows.argmax(1)
        x2 = self.size - columns[:, ::-1].argmax(1)
        y2 = self.size - rows[:, ::-1].argmax(1)
        boxes = torch.from_numpy(np.stack([x1, y1, x2, y2], 1)).float()
        target = make_target(boxes, scene.labels, [False] * G, index, (self.size, self.size))
        shares = masks.sum((1, 2)) / np.maximum(np.array(scene.areas, np.float32), 1)
        target["visible"] = torch.from_numpy(shares).float()
        if self.masks:
            target["masks"] = torch.from_numpy(masks)
        return target

    def coco(self) -> dict:
        """The ground truth as a COCO dictionary, with masks if they are made.

        Computed once. Every call returns the same dictionary: copy it before you change it.
        """
        if self._coco is None:
            images: list[dict] = []
            annotations: list[dict] = []
            for index in range(len(self)):
                images.append({"id": index, "height": self.size, "width": self.size})
                for annotation in self._annotations(index):
                    annotations.append({"id": len(annotations) + 1, **annotation})
            self._coco = {
                "images": images,
                "annotations": annotations,
                "categories": self.categories,
            }
        return self._coco

    def _annotations(self, index: int) -> list[dict]:
        target = self[index][1]
        annotations = []
        for i, (x1, y1, x2, y2) in enumerate(target["boxes"].tolist()):
            annotation = {
                "image_id": index,
                "category_id": target["labels"][i].item() + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
            }
            if self.masks:  # as in COCO, the area is the mask's
                mask = target["masks"][i]
                annotation["area"] = mask.sum().item()
                annotation["segmentation"] = encode_mask(mask)
            annotations.append(annotation)
        return annotations
