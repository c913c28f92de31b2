"""Pictures: boxes on images, and curves."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torchvision
from torch import Tensor
from torch.utils.data import Dataset

from common import as_transformed, xywh_to_xyxy
from engine.detector import paste_mask
from formats import decode_mask


def draw(image: Tensor, boxes: Tensor, labels, names: list[str], scores=None, masks=None) -> Tensor:
    """uint8 [3, h, w] with boxes [G, 4], names and scores written on it.

    Over masks, G bitmaps [h, w], if there are any: then a colour is an object's, else a class's.
    """
    import matplotlib

    if not len(boxes):
        return image
    palette = matplotlib.colormaps["tab10"].colors
    shades = labels if masks is None else range(len(labels))
    colours = [tuple(int(255 * c) for c in palette[shade % 10]) for shade in shades]
    if masks is not None:
        image = image.clone()
        for mask, colour in zip(masks, colours):
            image[:, mask] = (0.45 * image[:, mask] + 0.55 * torch.tensor(colour)[:, None]).byte()
    text = [f"{names[k]} {s:.2f}" for k, s in zip(labels, scores)] if scores is not None else None
    text = text or [names[k] for k in labels]
    font = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    side = min(image.shape[1:])
    return torchvision.utils.draw_bounding_boxes(
        image,
        boxes,
        text,
        colours,
        width=max(2, side // 130),
        label_colors="white",
        label_background_colors=colours,
        fill_labels=True,
        font=font,
        font_size=max(12, side // 26),
    )


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A matplotlib figure, inches, and its axes [rows, columns]: no display, nothing to close."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="tight")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def percent(value: float | None) -> float:
    """A metric for a figure: nan, which leaves a gap, where it is undefined."""
    return math.nan if value is None else 100 * value


def draw_grid(data: Dataset, results: list[dict], score: float, path: Path, count: int = 6) -> None:
    """A picture of the first images: ground truth beside detections above `score`."""
    names = [c["name"] for c in data.categories]
    label = {c["id"]: i for i, c in enumerate(data.categories)}
    count = min(count, len(data))
    rows = math.ceil(count / 2)
    figure, axes = new_figure(16, 4 * rows, rows, 4)
    for axis in axes.flat:
        axis.axis("off")
    for i in range(count):
        image, target = data[i]
        # enlarge small images, so that text fits, but not thin ones to thousands of pixels
        zoom = max(1, min(512 // min(image.shape[1:]), 2048 // max(image.shape[1:])))
        image = image.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
        mine = [r for r in results if r["image_id"] == target["image_id"] and r["score"] >= score]
        found = xywh_to_xyxy([r["bbox"] for r in mine])
        labels = [label[r["category_id"]] for r in mine]
        boxes, masks, seen_masks = target["boxes"] * zoom, None, None
        if "masks" in target:
            crops = as_transformed(target, (0, 0))["masks"]
            masks = (paste_mask(m, b, image.shape[1:]) for m, b in zip(crops, boxes))
        if any("segmentation" in r for r in mine):
            bitmaps = (decode_mask(r["segmentation"]) for r in mine)
            seen_masks = (b.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1) for b in bitmaps)
        truth = draw(image, boxes, target["labels"].tolist(), names, None, masks)
        seen = draw(image, found * zoom, labels, names, [r["score"] for r in mine], seen_masks)
        for axis, picture, title in zip(
            axes.flat[2 * i : 2 * i + 2],
            (truth, seen),
            ("ground truth", f"detections above {score:g}"),
        ):
            axis.imshow(picture.permute(1, 2, 0).numpy())
            axis.set_title(title)
    figure.savefig(path, dpi=70)


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
