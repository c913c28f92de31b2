"""Pictures: boxes on images, and curves."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data import DetectionDataset
from data.coco import xywh_to_xyxy
from data.images import rgb_tensor
from data.masks import decode_mask, paste_mask
from data.transforms import as_transformed
from engine.processes import print_once


@contextlib.contextmanager
def drawing(path: Path) -> Iterator[None]:
    """If a picture cannot be drawn, print a message: no result is lost to it."""
    try:
        yield
    except Exception as e:  # fonts, disks and decoders fail in many ways
        print_once(f"{path}: not drawn: {type(e).__name__}: {e}")


@functools.cache
def font_file(characters: str) -> tuple[str, bool]:
    """A font with these characters, DejaVu Sans if possible, and whether one exists."""
    from matplotlib import font_manager, get_data_path
    from matplotlib.ft2font import FT2Font

    own = f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    for path in [own, *sorted(font_manager.findSystemFonts())]:
        with contextlib.suppress(Exception):  # a font of the system may be broken
            if {ord(c) for c in characters} <= FT2Font(path).get_charmap().keys():
                ImageFont.truetype(path, 20)
                return path, True
    return own, False


def readable_names(names: list[str]) -> tuple[list[str], str]:
    """Names that can be drawn, and a font file; class numbers if no font has the names.

    >>> readable_names(["traffic\\nlight"])[0]
    ['traffic light']
    """
    names = [" ".join(name.split()) for name in names]
    path, found = font_file("".join(sorted({c for name in names for c in name})))
    if not found:
        numbers = [str(i) for i in range(len(names))]
        print_once(f"no font here can draw all class names: numbers 0..{len(names) - 1}")
        return numbers, path
    return names, path


MOST_BOXES = 40  # choice: more in one picture could not be read


def draw(
    image: Tensor,
    boxes: Tensor,
    labels: list[int],
    names: list[str],
    scores: list[float] | None = None,
    masks: Iterable[Tensor] | None = None,
    colours: list[tuple] | None = None,
) -> Tensor:
    """uint8 [3, h, w] with boxes [G, 4], names and scores drawn over masks, G bitmaps [h, w].

    `colours` are the objects' colours; by default each class has its own, or with masks
    each object. At most MOST_BOXES objects are drawn: the best ones, without scores the
    first. A line in a corner counts the others, and the boxes that had no room for a
    label.
    """
    import matplotlib

    if not len(boxes):
        return image
    height, width = image.shape[1:]
    order = sorted(range(len(boxes)), key=lambda i: 0 if scores is None else -scores[i])
    order = order[:MOST_BOXES]
    palette = [matplotlib.colormaps["tab10"](i)[:3] for i in range(10)]
    if colours is None:
        shades = labels if masks is None else range(len(labels))
        colours = [tuple(int(255 * c) for c in palette[shade % 10]) for shade in shades]
    if masks is not None:
        image = image.clone()
        for i, (mask, colour) in enumerate(zip(masks, torch.tensor(colours))):
            if i in order:
                image[:, mask] = (0.45 * image[:, mask] + 0.55 * colour[:, None]).byte()

    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    pen = ImageDraw.Draw(picture)
    side = math.sqrt(height * width)
    crowd = max(1, len(order) / 15)  # choice: smaller letters where many labels share the room
    line, font_size = max(2, round(side / 180)), max(11, round(side / 32 / math.sqrt(crowd)))
    names, font = readable_names(names)
    pen.font = ImageFont.truetype(font, font_size)

    def outline(box: list[float], thick: int, colour) -> None:
        """Draw around the object, not over it, unless the image ends there."""
        x1, y1 = (min(max(0, round(v) - thick), n - 1) for v, n in zip(box[:2], (width, height)))
        x2, y2 = (min(round(v) + thick, n) - 1 for v, n in zip(box[2:], (width, height)))
        pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=thick)

    for i in reversed(order):  # the best ones last, over the others
        outline(boxes[i].tolist(), line + 1, "black")  # for grounds of the line's own colour
        outline(boxes[i].tolist(), line, colours[i])

    texts = [names[labels[i]] for i in order]
    if scores is not None:
        texts = [f"{text} {scores[i]:.2f}" for text, i in zip(texts, order)]
    shown = [colours[i] for i in order]
    write_labels(pen, boxes[order], texts, shown, len(boxes) - len(order), (height, width))
    return rgb_tensor(picture)


def write_labels(
    pen, boxes: Tensor, texts: list[str], colours: list, more: int, image_size
) -> None:
    """Write each box's text on its colour where there is room, and count the rest in a corner.

    `pen` is a PIL ImageDraw with a font; `more` boxes of the image are not drawn at all.
    """
    height, width = image_size

    def size(text: str) -> tuple[int, int]:
        return math.ceil(pen.textlength(text)) + pen.font.size // 2, round(1.3 * pen.font.size)

    def write(text: str, corner: tuple[float, float], colour: tuple) -> None:
        (x, y), (w, h) = corner, size(text)
        pen.rectangle((x, y, x + w - 1, y + h - 1), fill=colour)
        light = 0.3 * colour[0] + 0.6 * colour[1] + 0.1 * colour[2] > 140
        ink = "black" if light else "white"
        pen.text((x + w / 2, y + h / 2), text, fill=ink, anchor="mm")

    note = "+ {} more, {} without label"  # placed last, in a corner of the whole image
    framed = torch.cat([boxes, boxes.new_tensor([[0, 0, width, height]])])
    sizes = [size(text) for text in (*texts, note.format(more, len(texts)))]
    *corners, note_corner = place_labels(framed, sizes, height, width)
    for text, corner, colour in zip(texts, corners, colours):
        if corner:
            write(text, corner, colour)
    counts = more, corners.count(None)
    note = ", ".join(part.format(n) for part, n in zip(note.split(", "), counts) if n)
    if note:
        write(note, note_corner or (0, height - size(note)[1]), (0, 0, 0))


def place_labels(boxes: Tensor, sizes: list[tuple], height: int, width: int) -> list[tuple | None]:
    """Corner (x, y) of each box's label: at the box, inside the image, over no other label.

    boxes [G, 4] and the labels' sizes (w, h) are in pixels of an image of height x width.
    Each label in turn takes the place that hides the least share of objects, or None if
    none is free.

    >>> place_labels(torch.tensor([[10.0, 20, 50, 60]]).repeat(2, 1), [(30, 12)] * 2, 80, 60)
    [(10.0, 8.0), (10.0, 60.0)]
    """
    corners: list[tuple | None] = []
    taken = boxes[:0]
    for (x1, y1, x2, y2), (w, h) in zip(boxes.tolist(), sizes):
        lefts, tops = (x1, x2 - w), (y1, y2 - h)  # level with the box's ends
        choices = [(x, y) for y in (y1 - h, y2) for x in lefts]  # above, below
        choices += [(x, y) for x in (x2, x1 - w) for y in tops]  # right, left
        choices += [(x, y) for y in tops for x in lefts]  # inside
        choices = [(min(max(0, x), width - w), min(max(0, y), height - h)) for x, y in choices]
        places = torch.tensor([(x, y, x + w, y + h) for x, y in choices])
        free = (overlap(places, taken) == 0).all(1) & (places[:, :2] >= 0).all(1)
        hidden = overlap(places, boxes) / torchvision.ops.box_area(boxes).clamp(min=1)
        costs = hidden.sum(1).masked_fill(~free, math.inf).tolist()
        best = costs.index(min(costs))
        corners.append(choices[best] if costs[best] < math.inf else None)
        taken = torch.cat([taken, places[best][None]]) if corners[-1] else taken
    return corners


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Area [A, B] that boxes a [A, 4] and b [B, 4] share."""
    shared = torch.minimum(a[:, None, 2:], b[:, 2:]) - torch.maximum(a[:, None, :2], b[:, :2])
    return shared.clamp(min=0).prod(2)


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A matplotlib figure without a display, in inches, and its axes [rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="tight")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def percent(value: float | None) -> float:
    """A metric for a figure: nan, which leaves a gap, where it is undefined."""
    return math.nan if value is None else 100 * value


FOUND, FALSE, MISSED = (46, 160, 67), (218, 54, 51), (255, 176, 0)  # colours


def judge(boxes: Tensor, labels: list[int], target: dict) -> tuple[list[bool], list[int]]:
    """Whether each detection, best first, is on an object of its class (IoU 0.5).

    The second list has the numbers of the objects that no detection is on.
    """
    free = {i for i, ignored in enumerate(target["ignore"].tolist()) if not ignored}
    iou = torchvision.ops.box_iou(boxes, target["boxes"].as_subclass(Tensor))  # [D, G]
    hits = []
    for row, label in zip(iou, labels):
        own = [i for i in free if target["labels"][i] == label and row[i] >= 0.5]
        if own:
            free.remove(own[int(row[own].argmax())])
        hits.append(bool(own))
    return hits, sorted(free)


def draw_grid(
    data: DetectionDataset, results: list[dict], score: float, path: Path, count: int = 6
) -> None:
    """The first images twice: their ground truth, and detections above `score`."""
    names = [c["name"] for c in data.categories]
    label = {c["id"]: i for i, c in enumerate(data.categories)}
    count = min(count, len(data))
    rows = math.ceil(count / 2)
    figure, axes = new_figure(16, 4 * rows, rows, 4)
    for axis in axes.flat:
        axis.axis("off")
    for i in range(count):
        image, target = data[i]
        mine = [r for r in results if r["image_id"] == target["image_id"]]
        mine = sorted((r for r in mine if r["score"] >= score), key=lambda r: -r["score"])
        boxes = xywh_to_xyxy([r["bbox"] for r in mine])
        labels = [label[r["category_id"]] for r in mine]
        hits, missed = judge(boxes, labels, target)
        # enlarge small images, so that text fits, but not thin ones to thousands of
        # pixels
        zoom = max(1, min(512 // min(image.shape[1:]), 2048 // max(image.shape[1:])))
        image = enlarge_pixels(image, zoom)
        truth = target["boxes"].as_subclass(Tensor) * zoom
        truth_labels = target["labels"].tolist()
        truth_masks = seen_masks = None
        if "masks" in target:
            crops = as_transformed(target, (0, 0))["masks"]
            size = (image.shape[1], image.shape[2])
            truth_masks = [paste_mask(m, b, size) for m, b in zip(crops, truth)]
        if any("segmentation" in r for r in mine):
            seen_masks = [enlarge_pixels(decode_mask(r["segmentation"]), zoom) for r in mine]
        left = draw(image, truth, truth_labels, names, None, truth_masks)
        missed_labels = [truth_labels[i] for i in missed]
        colours = [MISSED] * len(missed)
        right = draw(image, truth[missed], missed_labels, names, None, None, colours)
        scores, colours = [r["score"] for r in mine], [FOUND if hit else FALSE for hit in hits]
        right = draw(right, boxes * zoom, labels, names, scores, seen_masks, colours)
        titles = ("ground truth", f"above {score:g}: found green, false red, missed orange")
        for axis, picture, title in zip(axes.flat[2 * i : 2 * i + 2], (left, right), titles):
            axis.imshow(picture.permute(1, 2, 0).numpy())
            axis.set_title(title)
    figure.savefig(path, dpi=120)


def enlarge_pixels(image: Tensor, zoom: int) -> Tensor:
    """[..., h, w] -> [..., zoom * h, zoom * w], each pixel a square."""
    return image.repeat_interleave(zoom, -2).repeat_interleave(zoom, -1)


def draw_curves(log: list[dict], path: Path) -> None:
    """Losses and learning rate by step, and AP where it was measured."""
    steps, scored = [r for r in log if "losses" in r], [r for r in log if "AP" in r]
    figure, ((left, right),) = new_figure(13, 4.5, 1, 2)
    for name in steps[-1]["losses"] if steps else ():
        left.plot([r["step"] for r in steps], [r["losses"][name] for r in steps], label=name)
    left.plot([r["step"] for r in steps], [r["loss"] for r in steps], "k", lw=2, label="total")
    left.set(xlabel="step", ylabel="loss", title="training losses")
    left.legend()
    rate = left.twinx()
    rate.plot([r["step"] for r in steps], [r["lr"] for r in steps], ":", color="grey")
    rate.set_ylabel("learning rate (dotted)")
    for key in ("AP", "AP50", "AP75", "AP90"):
        values = [math.nan if r[key] is None else r[key] for r in scored]
        right.plot([r["step"] for r in scored], values, "o-", label=key)
    right.set(xlabel="step", ylim=(0, 1), title="validation")
    right.legend()
    figure.savefig(path, dpi=80)
