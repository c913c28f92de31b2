"""`SyntheticDetection`: paper shapes on sky, wood and cloth, a laboratory without a download.

Each image is a function of (seed, index), the same on every machine: arrays only see
operations that IEEE 754 rounds exactly (+, -, *, /, remainder, square root). Boxes and
masks are exact, unlike those of annotated photos.
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
# choice: px, sides of shapes; a box on fewer than 20 px cannot be placed exactly
SMALLEST, LARGEST = 20, 288
VISIBLE = 2 / 3  # choice: share of an object that must stay visible


def _disc(u, v, radius=0.9):
    return np.sqrt(u * u + v * v) - radius


def _box(u, v, half_u, half_v):
    return np.maximum(np.abs(u) - half_u, np.abs(v) - half_v)


def _star(u, v):  # inside: on the inner side of at least four of a pentagram's five lines
    turns = (0, 1.2566, 2.5133, 3.7699, 5.0265)
    lines = [math.cos(turn) * u + math.sin(turn) * v for turn in turns]
    return np.sort(lines, axis=0)[-2] - 0.3


def _heart(u, v):  # two discs, and what lies between them and the tip
    u = np.abs(u)
    wedge = np.maximum(0.765 * u - 0.644 * v - 0.619, 0.342 * u + 0.94 * v - 0.282)
    return np.minimum(_disc(u - 0.46, v - 0.3, 0.45), wedge)


def _arrow(u, v):
    head = np.maximum(0.62 * u + 0.785 * np.abs(v) - 0.58, -0.05 - u)
    return np.minimum(head, _box(u + 0.4, v, 0.5, 0.19))


# Each class is a signed distance to the outline, negative inside. The coordinates u and v
# turn with the shape, which lies in the unit circle.
SHAPES = {
    "disc": _disc,
    "ring": lambda u, v: np.abs(_disc(u, v, 0.74)) - 0.19,
    "bar": lambda u, v: _disc(np.maximum(np.abs(u) - 0.8, 0), v, 0.19),
    "cross": lambda u, v: np.minimum(_box(u, v, 0.9, 0.25), _box(u, v, 0.25, 0.9)),
    "triangle": lambda u, v: np.maximum(0.866 * np.abs(u) + 0.5 * v, -v) - 0.5,
    "square": lambda u, v: _box(u, v, 0.68, 0.68),
    "star": _star,
    "crescent": lambda u, v: np.maximum(_disc(u, v, 0.95), -_disc(u - 0.5, v, 0.8)),
    "heart": _heart,
    "arrow": _arrow,
}


def noise(rng: np.random.Generator, size: int, rows: int, columns: int) -> np.ndarray:
    """A smooth random field in 0..1 over that many rows and columns of cells: [size, size]."""
    field = rng.random((rows + 1, columns + 1), dtype=np.float32)
    for _ in range(2):  # interpolate between rows, then between columns
        at = (np.arange(size, dtype=np.float32) + 0.5) * ((len(field) - 1) / size)
        low = at.astype(np.int64)
        share = (at - low)[:, None]
        share = share * share * (3 - 2 * share)
        field = (field[low] + share * (field[low + 1] - field[low])).T
    return field


def _sky(rng, size):
    down = np.arange(size, dtype=np.float32)[:, None] * (rng.uniform(0.4, 0.8) / size)
    clouds = 0.65 * noise(rng, size, 4, 2) + 0.35 * noise(rng, size, 11, 6)
    return down + (1.5 * clouds - 0.7).clip(0, 0.6)


def _wood(rng, size):
    down = np.arange(size, dtype=np.float32)[:, None] * (rng.uniform(3, 6) / size)
    rings = (down + 3 * noise(rng, size, 3, 1)) % 1
    rings = np.minimum(rings, 5 * (1 - rings))  # slowly darker, then suddenly light again
    return 0.6 * rings + 0.45 * noise(rng, size, size // 2, 5)


def _paper(rng, size):
    return 0.7 * noise(rng, size, 3, 3) + 0.3 * noise(rng, size, size // 2, size // 2)


def _cloth(rng, size):
    threads = noise(rng, size, size // 2, 6) + noise(rng, size, 6, size // 2)
    return 0.3 * threads + 0.4 * noise(rng, size, 2, 2)


GROUNDS = [  # each texture, in 0..1, and the pairs of colours that it may blend
    (_sky, ["7fb2d6 f4f1ea", "8c9ac0 f6d5bd", "24344d 5b7596"]),
    (_wood, ["a97c50 d8b384", "5a3e2e 80593f", "c9b79c e6d9c3"]),
    (_paper, ["ece3d2 fbf6ec", "c9d6cf e2eae4", "3b4a4f 4f6066"]),
    (_cloth, ["c4b8a8 e3dacd", "8fa3a8 b9c8ca", "7d8f69 a9b88f"]),
]
PALETTES = [  # light, middle and dark tones each: some stand out on every ground
    "d1495b edae49 3a7d8c 2b4a6b f4ead5 7fa650",
    "e07a5f f2cc8f 81b29a 3d405b f6efe0 b5536b",
    "c8553d f0c27b 588b8b 28536b fbf3e4 93b7be",
    "8e5572 f2b5a7 6a8d73 35455d fff4e6 d99a4e",
    "b23a48 f5d491 4f7cac 2d4739 f7f3e3 8fb996",
    "dd6e42 e8dab2 4f6d7a 33415c c0d6df a44a3f",
]


def colours(codes: str) -> np.ndarray:
    """Colours such as "ff8000 336699" in 0..1: float32 [n, 3, 1, 1]."""
    rgb = [list(bytes.fromhex(code)) for code in codes.split()]
    return np.array(rgb, np.float32)[:, :, None, None] / 255


@dataclass
class Shape:
    """A shape that is painted, or about to be."""

    label: int
    radius: float  # of the circle around it, px
    angle: float
    x: float  # its centre, px
    y: float
    tone: int  # its colour in the scene's palette
    area: int = 0  # its pixels, hidden ones and those outside the image included
    visible: int = 0  # its pixels that show


class Scene(NamedTuple):
    """An image that is finished, and what is in it."""

    image: np.ndarray  # uint8 [3, size, size]
    owner: np.ndarray  # int8 [size, size]: the object that shows at each pixel; -1: none
    objects: list[Shape]


class Painter:
    """One image while it is painted. Everything random comes from `rng`, in a fixed order."""

    def __init__(self, rng: np.random.Generator, size: int):
        self.rng, self.size = rng, size
        field, pairs = GROUNDS[rng.integers(len(GROUNDS))]
        ends = colours(pairs[rng.integers(len(pairs))])
        tones = colours(PALETTES[rng.integers(len(PALETTES))])
        contrast = np.abs(tones[:, None] - ends).max(2).min(1)  # [6, 1, 1]
        self.palette = tones[contrast[:, 0, 0] > 0.26]
        self.image = ends[0] + field(rng, size) * (ends[1] - ends[0])  # float32 [3, size, size]
        self.light = rng.uniform(-1, 1)  # how far shadows fall to the right, relative to down
        self.owner = np.full((size, size), -1, np.int8)
        self.objects: list[Shape] = []

    def draw_shape(self) -> Shape:
        """Draw a random class, place and colour, and a log-uniform size."""
        rng = self.rng
        low, high = math.log(SMALLEST), math.log(max(SMALLEST, min(LARGEST, 0.9 * self.size)))
        return Shape(  # arguments are evaluated in this order
            label=int(rng.integers(len(SHAPES))),
            radius=math.exp(rng.uniform(low, high)) / 2,
            angle=rng.uniform(0, 2 * math.pi),
            x=rng.uniform(0.05, 0.95) * self.size,
            y=rng.uniform(0.05, 0.95) * self.size,
            tone=int(rng.integers(len(self.palette))),
        )

    def paint_objects(self) -> None:
        """Up to six objects and their twins, rarely none, with fragments among them."""
        rng = self.rng
        for _ in range(rng.integers(1, 7) if rng.random() > 0.03 else 0):
            shape = self.draw_shape()
            if self.paint(shape) and rng.random() < 1 / 3:
                turn = rng.uniform(0, 2 * math.pi)
                step = shape.radius * rng.uniform(1.7, 2.2)
                x, y = shape.x + step * math.cos(turn), shape.y + step * math.sin(turn)
                self.paint(replace(shape, x=x, y=y))  # its twin, right beside it
            if rng.random() < 0.1:
                self.paint_fragment()

    def paint_fragment(self) -> None:
        """Paint less than half of a disc: a distractor without a label."""
        shape = replace(self.draw_shape(), label=list(SHAPES).index("disc"))
        self.paint(shape, cut=self.rng.uniform(0.1, 0.4))

    def paint(self, shape: Shape, cut: float | None = None) -> bool:
        """Paint an object, or a fragment (u > cut); return False if there is no room."""
        height = 1 + 0.06 * shape.radius  # above the ground, px
        x0, y0 = (int(at - shape.radius - height) - 1 for at in (shape.x, shape.y))
        side = int(2 * (shape.radius + height)) + 4
        distance, shade = self._rasterise(shape, x0, y0, side, cut)
        here, there = self._overlap(x0, y0, len(distance))
        owner, inside = self.owner[here], distance[there] < 0
        covered = np.bincount(owner[inside] + 1, minlength=len(self.objects) + 1)[1:].tolist()
        if any(o.visible - c < VISIBLE * o.area for o, c in zip(self.objects, covered)):
            return False  # an earlier object would lose too much
        area, visible = int((distance < 0).sum()), int(inside.sum())
        if cut is None and visible < max(12, VISIBLE * area):
            return False  # hardly a pixel, or mostly outside the image
        taken = {o.tone for o, c in zip(self.objects, covered) if c}
        tones = [(shape.tone + i) % len(self.palette) for i in range(len(self.palette))]
        tone = next((t for t in tones if t not in taken), shape.tone)  # so that outlines show
        self._paint_shadow(distance, x0 + round(self.light * height), y0 + round(height), height)
        coverage, paint = (0.5 - distance[there]).clip(0, 1), self.palette[tone] * shade[there]
        self.image[here] += coverage * (paint - self.image[here])
        owner[inside] = len(self.objects) if cut is None else -1
        for earlier, pixels in zip(self.objects, covered):
            earlier.visible -= pixels
        if cut is None:
            self.objects.append(replace(shape, tone=tone, area=area, visible=visible))
        return True

    def _rasterise(self, shape: Shape, x0: int, y0: int, n: int, cut: float | None):
        """Signed distance (px) and brightness in a window at (x0, y0), [n, n] each."""
        side = np.arange(n, dtype=np.float32) + 0.5
        x = ((side + (x0 - shape.x)) / shape.radius)[None]
        y = ((side + (y0 - shape.y)) / shape.radius)[:, None]
        cos, sin = math.cos(shape.angle), math.sin(shape.angle)
        u, v = cos * x + sin * y, cos * y - sin * x
        outline = list(SHAPES.values())[shape.label]
        distance = np.maximum(outline(u, v), _disc(u, v, 1))  # keeps shadows of tips short
        if cut is not None:
            distance = np.maximum(distance, cut - u)
        return distance * shape.radius, 1 - 0.07 * (y + self.light * x)  # lit from above

    def _paint_shadow(self, distance: np.ndarray, x0: int, y0: int, blur: float) -> None:
        here, there = self._overlap(x0, y0, len(distance))
        self.image[here] *= 1 - 0.35 * (0.5 - distance[there] / (2 * blur)).clip(0, 1)

    def _overlap(self, x0: int, y0: int, n: int):
        """Indices of what an [n, n] window at (x0, y0) and the image share, in each."""
        here = tuple(slice(max(0, at), max(0, at + n)) for at in (y0, x0))
        there = tuple(slice(max(0, -at), max(0, self.size - at)) for at in (y0, x0))
        return (..., *here), (..., *there)


class SyntheticDetection(Dataset):
    """Paper shapes on sky, wood and cloth, made on the fly from (seed, index).

    Ten classes of shape; colour says nothing about the class. Sizes are log-uniform over
    COCO's small, medium and large thirds (20 to 288 px, if the image is that large).
    Objects occlude each other (at least two thirds of each stay visible), a third have a
    twin right beside them, and segments of discs are distractors without a label. Boxes
    and masks cover the visible part; the target's `visible` [G] is its share of the shape.

    With `keep`, images are remembered if all of them fit into 256 MiB.
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

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        scene = self._scenes.get(index) or self._make(index)
        if self.keep:
            self._scenes[index] = scene
        # Copies: a caller may change what it gets.
        return torch.tensor(scene.image), self._target(index, scene)

    def _make(self, index: int) -> Scene:
        rng = np.random.default_rng((self.seed, index))
        painter = Painter(rng, self.size)
        if rng.random() < 0.25:
            painter.paint_fragment()  # beneath the objects
        painter.paint_objects()
        grain = rng.random((self.size, self.size), dtype=np.float32) - 0.5
        painter.image += grain * rng.uniform(0.01, 0.05)
        pixels = (painter.image.clip(0, 1) * 255).astype(np.uint8)
        return Scene(pixels, painter.owner, painter.objects)

    def _target(self, index: int, scene: Scene) -> dict:
        labels = [shape.label for shape in scene.objects]
        masks = scene.owner == np.arange(len(labels))[:, None, None]  # [G, size, size]
        columns, rows = masks.any(1), masks.any(2)  # [G, size] each
        x1, y1 = columns.argmax(1), rows.argmax(1)
        x2, y2 = (self.size - hits[:, ::-1].argmax(1) for hits in (columns, rows))
        boxes = torch.from_numpy(np.stack([x1, y1, x2, y2], 1)).float()
        ignore, size = [False] * len(labels), (self.size, self.size)
        target = make_target(boxes, labels, ignore, index, size)
        target["visible"] = torch.tensor([o.visible / o.area for o in scene.objects])
        if self.masks:
            target["masks"] = torch.from_numpy(masks)
        return target

    def coco(self) -> dict:
        """The ground truth as a COCO dictionary, kept: copy it before you change it."""
        if self._coco is not None:
            return self._coco
        size = {"height": self.size, "width": self.size}
        images = [{"id": i, **size} for i in self.image_ids]
        annotations: list[dict] = []
        for image_id in self.image_ids:
            target = self[image_id][1]
            labels = target["labels"].tolist()
            for i, (x1, y1, x2, y2) in enumerate(target["boxes"].tolist()):
                w, h = x2 - x1, y2 - y1
                place = {"bbox": [x1, y1, w, h], "area": w * h, "iscrowd": 0}
                if self.masks:  # as in COCO, the area is the mask's
                    mask = target["masks"][i]
                    place |= {"area": mask.sum().item(), "segmentation": encode_mask(mask)}
                ids = {"id": len(annotations) + 1, "image_id": image_id}
                annotations.append({**ids, "category_id": labels[i] + 1, **place})
        self._coco = dict(images=images, annotations=annotations, categories=self.categories)
        return self._coco
