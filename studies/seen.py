"""What a detector saw in one image, and how boxes and maps are drawn on it: for `explain`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from common import BadInput

TRUTH, ENTERING, FOUND, OTHER = "white", "orange", "deepskyblue", "magenta"  # colours of boxes
Panel = tuple[str, Callable]  # title, draw(axis)


@dataclass
class Seen:
    """A detection in an image, and what the network returned on the way to it."""

    model: nn.Module
    test: object  # the Test that it was found under
    image: Tensor  # uint8 [3, h, w], as the network gets it
    target: dict  # boxes [G, 4] are in this image's pixels; G may be 0
    outputs: dict
    candidates: dict[str, Tensor]
    detection: dict[str, Tensor]  # the detection alone; `index`: which candidate it is
    numbers: dict = field(default_factory=dict)  # what is drawn of it, for the JSON file

    def __post_init__(self) -> None:
        self.box, self.score = self.detection["boxes"], self.detection["scores"].item()
        self.label, self.row = int(self.detection["labels"]), int(self.detection["index"])
        # the object that it overlaps most, preferring its own class: its index and its box
        self.gt: int | None = None
        self.truth: Tensor | None = None
        iou = torchvision.ops.box_iou(self.box[None], self.target["boxes"])[0]
        iou = torch.where(self.target["ignore"] | (iou < 0.1), 0, iou)
        if iou.any():
            same = (self.target["labels"] == self.label) & (iou > 0)
            self.gt = int((iou + same).argmax())
            self.truth = self.target["boxes"][self.gt]

    def show(self, axis, boxes: list[Tensor | None] = (), margin=0.15, grey=False) -> None:
        """The image, or the part of it that these boxes [4] lie in; grey: as ground for a map."""
        h, w = self.image.shape[1:]
        extent = (0, w, h, 0)  # pixel i lies between i and i + 1, as boxes have it
        image = self.image.permute(1, 2, 0).cpu().numpy()
        axis.imshow(image.mean(2) if grey else image, "gray", extent=extent, vmin=0, vmax=255)
        axis.set(xticks=[], yticks=[])
        known = [b for b in boxes if b is not None]
        if not known:
            return
        known = torch.stack(known)
        low, high = known[:, :2].amin(0), known[:, 2:].amax(0)
        x, y = ((low + high) / 2).tolist()
        half = (0.5 + margin) * float((high - low).max())  # of a square
        axis.set(xlim=(x - half, x + half), ylim=(y + half, y - half))
        axis.set_facecolor("0.8")  # what lies outside the image

    def outlines(self, axis, entering: Tensor | None = None) -> None:
        """The object, the box that the detection is made from, and the detection itself."""
        outline(axis, self.truth, TRUTH)
        outline(axis, entering, ENTERING, "--")
        outline(axis, self.box, FOUND)

    def map_panel(
        self, title: str, values: Tensor, box: Tensor, area=(), entering=None, **how
    ) -> Panel:
        """A map over a box of the grey image, with the detection's boxes; how: of `heat`."""

        def draw(axis):
            self.show(axis, area, grey=True)
            heat(axis, values, box, **how)
            self.outlines(axis, entering)

        return title, draw


@torch.no_grad()
def look(model: nn.Module, test, image: Tensor, target: dict) -> list[Seen]:
    """What a detector sees in one image: its detections, best first."""
    outputs = model.eval().outputs([image])
    candidates = model.candidates(outputs, test)
    index = torch.arange(len(candidates["boxes"]), device=image.device)
    (detections,) = model.detections({**candidates, "index": index}, 1, test)
    if not len(detections["boxes"]):
        raise BadInput(f"nothing in it scores above {test.score_threshold}: --score-threshold")
    return [
        Seen(model, test, image, target, outputs, candidates, dict(zip(detections, values)))
        for values in zip(*detections.values())
    ]


def numbers_of(values: Tensor) -> list[float]:
    """All values, for a JSON file."""
    return [round(v, 4) for v in values.flatten().tolist()]


def outline(axis, box: Tensor | None, colour, style="-", width=2.0, alpha=1.0) -> None:
    """A box [4], if there is one, on a darker line, so that it shows on its own colour too."""
    if box is None:
        return
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import Normal, Stroke

    x1, y1, x2, y2 = box.tolist()
    patch = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, ls=style, lw=width)
    patch.set_alpha(alpha)
    if width > 1:
        patch.set_path_effects([Stroke(linewidth=width + 1.5, foreground="black"), Normal()])
    axis.add_patch(patch)


def heat(axis, values: Tensor, box: Tensor, colours="viridis", alpha=0.75, limits=(0, 1), label=""):
    """A map [S, S] over a box [4] of the image, with a labelled colour scale beside it.

    If `alpha` is "value", low values are transparent.
    """
    x1, y1, x2, y2 = box.tolist()
    values = values.detach().float().cpu().numpy()
    low, high = limits
    if alpha == "value":
        alpha = np.clip((values - low) / (high - low), 0, 1) ** 0.5
    xlim, ylim = axis.get_xlim(), axis.get_ylim()
    drawn = axis.imshow(values, colours, extent=(x1, x2, y2, y1), alpha=alpha, vmin=low, vmax=high)
    axis.set(xlim=xlim, ylim=ylim)
    scale(axis, drawn, label)


def scale(axis, drawn, label: str = "") -> None:
    """A colour scale beside a drawing."""
    bar = axis.figure.colorbar(drawn, ax=axis, fraction=0.05, pad=0.02, label=label)
    bar.ax.tick_params(labelsize=8)
    bar.solids.set_alpha(1)
