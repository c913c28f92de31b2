"""What does a detector see in one image? Its detections, and how `explain` draws them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from common import BadInput

TRUTH, ENTERING, FOUND, OTHER = "white", "orange", "deepskyblue", "magenta"  # colours of boxes


@dataclass
class Seen:
    """A detection in an image, what the network returned on the way to it, and its row."""

    model: nn.Module
    test: object  # the Test that it was found under
    image: Tensor  # uint8 [3, h, w], as the network gets it
    target: dict  # boxes [G, 4] are in this image's pixels; G may be 0
    outputs: dict
    candidates: dict[str, Tensor]
    detection: dict[str, Tensor]  # the detection alone; `index`: which candidate it is
    numbers: dict = field(default_factory=dict)  # what is drawn of it, for the JSON file
    axes: Iterator | None = None  # its row of the page: the columns that are still empty

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

    def column(self, title: str):
        """The axes of the next column."""
        axis = next(self.axes)
        axis.set_title(title, fontsize=10)
        return axis

    def photo(self, title: str, area=(), margin=0.15, grey=False):
        """The next column with the image, or the part that the boxes [4] of `area` lie in."""
        axis = self.column(title)
        image = self.image.permute(1, 2, 0).cpu().numpy()
        show_image(axis, image.mean(2) if grey else image, area, margin, cmap="gray", vmax=255)
        return axis

    def outlines(self, axis, entering: Tensor | None = None) -> None:
        """The object, the box that the detection is made from, and the detection itself."""
        outline(axis, self.truth, TRUTH)
        outline(axis, entering, ENTERING, "--")
        outline(axis, self.box, FOUND)

    def map(self, title: str, values: Tensor, box: Tensor, area=(), entering=None, **how):
        """A column with a map over a box of the grey image; how: of `heat`."""
        axis = self.photo(title, area, grey=True)
        heat(axis, values, box, **how)
        self.outlines(axis, entering)


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


def show_image(axis, image: np.ndarray, area=(), margin=0.15, **how) -> None:
    """An image [h, w, 3] or [h, w], or the part that the boxes [4] of `area` lie in."""
    h, w = image.shape[:2]
    axis.imshow(image, extent=(0, w, h, 0), vmin=0, **how)  # pixel i lies between i and i + 1
    axis.set(xticks=[], yticks=[], facecolor="0.8")  # the colour outside the image
    known = [box for box in area if box is not None]
    if known:
        low, high = torch.stack(known)[:, :2].amin(0), torch.stack(known)[:, 2:].amax(0)
        x, y = ((low + high) / 2).tolist()
        half = (0.5 + margin) * float((high - low).max())  # of a square
        axis.set(xlim=(x - half, x + half), ylim=(y + half, y - half))


def outline(axis, box: Tensor | None, colour, style="-", width=2.0, alpha=1.0) -> None:
    """A box [4], if there is one, on a darker line, so that it shows on its own colour too."""
    if box is None:
        return
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    x1, y1, x2, y2 = box.tolist()
    darker = [withStroke(linewidth=width + 1.5, foreground="black")] if width > 1 else []
    how = dict(fill=False, ec=colour, ls=style, lw=width, alpha=alpha, path_effects=darker)
    axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, **how))


def heat(axis, values: Tensor, box: Tensor, colours="viridis", alpha=0.75, most=1, label=""):
    """A map [S, S] over a box [4] of the image, with a labelled colour scale beside it.

    Colours run up to `most`, from 0 or with "coolwarm" from -most. If `alpha` is "value", low
    values are transparent.
    """
    x1, y1, x2, y2 = box.tolist()
    values = values.detach().float().cpu().numpy()
    if alpha == "value":
        alpha = np.clip(values / most, 0, 1) ** 0.5
    view = dict(xlim=axis.get_xlim(), ylim=axis.get_ylim())
    limits = dict(vmin=-most if colours == "coolwarm" else 0, vmax=most)
    drawn = axis.imshow(values, colours, extent=(x1, x2, y2, y1), alpha=alpha, **limits)
    axis.set(**view)
    scale(axis, drawn, label)


def scale(axis, drawn, label: str = "") -> None:
    """A colour scale beside a drawing."""
    bar = axis.figure.colorbar(drawn, ax=axis, fraction=0.05, pad=0.02, label=label)
    bar.ax.tick_params(labelsize=8)
    bar.solids.set_alpha(1)


def colour_scale(axis, low: float, high: float, colours: str, label: str = ""):
    """A colour scale beside lines or boxes; it returns the colour of a number."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    mapped = ScalarMappable(Normalize(low, high), colours)
    scale(axis, mapped, label)
    return mapped.to_rgba
