"""What a detector saw in one image, and how boxes and maps are drawn on it: for `explain`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from common import BadInput
from studies.boxes import suppressed

TRUTH, ENTERING, FOUND, OTHER = "white", "orange", "deepskyblue", "magenta"  # colours of boxes
Panel = tuple[str, Callable]  # title, draw(axis)


@dataclass
class Seen:
    """What a model found in an image, and what its network returned on the way."""

    model: nn.Module
    test: object  # the Test that it was found under
    image: Tensor  # uint8 [3, h, w], as the network gets it
    target: dict  # boxes [G, 4] are in this image's pixels; G may be 0
    names: list[str]  # of the labels
    outputs: dict
    candidates: dict[str, Tensor]
    detections: dict[str, Tensor]  # `index`: which of the candidates each detection is
    numbers: dict = field(default_factory=dict)  # what is drawn of a detection, for the JSON file

    def box(self, pick: int) -> Tensor:
        return self.detections["boxes"][pick]

    def label(self, pick: int) -> int:
        return int(self.detections["labels"][pick])

    def row(self, pick: int) -> int:
        """The detection's place among the candidates."""
        return int(self.detections["index"][pick])

    def gt(self, pick: int) -> int | None:
        """The object that a detection overlaps most, preferring its own class; None without one."""
        iou = torchvision.ops.box_iou(self.box(pick)[None], self.target["boxes"])[0]
        iou = iou * ~self.target["ignore"]
        if not len(iou) or iou.max() < 0.1:
            return None
        same = self.target["labels"] == self.label(pick)
        return int((iou + (same & (iou >= 0.1))).argmax())

    def truth(self, pick: int) -> Tensor | None:
        """That object's box [4]."""
        gt = self.gt(pick)
        return None if gt is None else self.target["boxes"][gt]


def look(model: nn.Module, test, image: Tensor, target: dict, names: list[str]) -> Seen:
    """Run a detector on one image."""
    with torch.no_grad():
        outputs = model.eval().outputs([image])
        candidates = model.candidates(outputs, test)
        detections = suppressed(model, candidates, test)
    if not len(detections["boxes"]):
        raise BadInput(f"nothing in it scores above {test.score_threshold}: --score-threshold")
    return Seen(model, test, image, target, names, outputs, candidates, detections)


@contextlib.contextmanager
def recorded(**modules: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What each of these modules returned last, by name, while the model runs."""
    results: dict[str, Tensor] = {}
    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():

            def keep(_module, _inputs, result, name=name):
                results[name] = result

            hooks.callback(module.register_forward_hook(keep).remove)
        yield results


def numbers_of(values: Tensor) -> list[float]:
    """All values, for a JSON file."""
    return [round(v, 4) for v in values.flatten().tolist()]


# ------------------------------------------------------------------------------ drawing


def show(axis, seen: Seen, boxes: list[Tensor | None] = (), margin=0.15, grey=False) -> None:
    """The image, or the part of it that these boxes [4] lie in; grey: as ground for a map."""
    h, w = seen.image.shape[1:]
    extent = (0, w, h, 0)  # pixel i lies between i and i + 1, as boxes have it
    image = seen.image.permute(1, 2, 0).cpu().numpy()
    axis.imshow(image.mean(2) if grey else image, "gray", extent=extent, vmin=0, vmax=255)
    axis.set(xticks=[], yticks=[])
    known = [b for b in boxes if b is not None]
    if not known:
        return
    known = torch.stack(known)
    low, high = known[:, :2].amin(0), known[:, 2:].amax(0)
    low, high = low - margin * (high - low), high + margin * (high - low)
    x, y = ((low + high) / 2).tolist()
    half = float((high - low).max()) / 2  # a square
    axis.set(xlim=(x - half, x + half), ylim=(y + half, y - half))
    axis.set_facecolor("0.8")  # what lies outside the image


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


def outlines(axis, truth: Tensor | None, found: Tensor, entering: Tensor | None = None) -> None:
    """The object, the box that a detection is made from, and the detection, in their colours."""
    outline(axis, truth, TRUTH)
    outline(axis, entering, ENTERING, "--")
    outline(axis, found, FOUND)


def heat(axis, values: Tensor, box: Tensor, colours="viridis", alpha=0.75, limits=None, label=""):
    """A map [S, S] over a box [4] of the image, with a labelled colour scale beside it.

    If `alpha` is "value", low values are transparent.
    """
    x1, y1, x2, y2 = box.tolist()
    values = values.detach().float().cpu().numpy()
    low, high = limits or (float(values.min()), float(values.max()))
    if isinstance(alpha, str):
        alpha = np.clip((values - low) / max(high - low, 1e-6), 0, 1) ** 0.5
    xlim, ylim = axis.get_xlim(), axis.get_ylim()
    drawn = axis.imshow(values, colours, extent=(x1, x2, y2, y1), alpha=alpha, vmin=low, vmax=high)
    axis.set(xlim=xlim, ylim=ylim)
    scale(axis, drawn, label)


def scale(axis, drawn, label: str = "") -> None:
    """A colour scale beside a drawing."""
    bar = axis.figure.colorbar(drawn, ax=axis, fraction=0.05, pad=0.02, label=label)
    bar.ax.tick_params(labelsize=8)
    bar.solids.set_alpha(1)
