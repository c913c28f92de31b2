"""One image as a detector sees it: its own tensors, recorded by name, and how they are drawn."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from common import BadInput
from engine.settings import Config

TRUTH, ENTERING, FOUND, OTHER = "white", "orange", "deepskyblue", "magenta"  # colours of boxes


@contextlib.contextmanager
def recorded(model: nn.Module, names: list[str]):
    """Calls of the model's modules and methods while it runs: {name: [(arguments, result), ...]}.

    A name is that of a module, as "drp.0.fc", or of a method of the model, as "pool".
    """
    calls: dict[str, list[tuple]] = {name: [] for name in names}
    modules = dict(model.named_modules())
    with contextlib.ExitStack() as undo:
        for name in names:
            if name in modules:

                def hook(module, inputs, result, name=name):
                    calls[name].append((inputs, result))

                undo.callback(modules[name].register_forward_hook(hook).remove)
            else:

                def method(*inputs, run=getattr(model, name), name=name):
                    calls[name].append((inputs, run(*inputs)))
                    return calls[name][-1][1]

                setattr(model, name, method)  # hides the class's own, until it is deleted
                undo.callback(delattr, model, name)
        yield calls


@dataclass
class Seen:
    """What a model found in an image, and what it saw on the way."""

    model: nn.Module
    config: Config
    image: Tensor  # uint8 [3, h, w], as the network gets it
    target: dict  # as of the data set: boxes [G, 4] are in this image's pixels; G may be 0
    names: list[str]  # of the labels
    calls: dict[str, list[tuple]]  # of `recorded`
    outputs: dict
    candidates: dict[str, Tensor]
    detections: dict[str, Tensor]
    numbers: dict = field(default_factory=dict)  # what is drawn of a detection, for the JSON file

    def row(self, pick: int) -> int:
        """The place of a detection among the candidates: the same box and label."""
        box, label = self.detections["boxes"][pick], self.detections["labels"][pick]
        same = (self.candidates["boxes"] == box).all(1) & (self.candidates["labels"] == label)
        return int(same.int().argmax())

    def truth(self, pick: int) -> Tensor | None:
        """The object [4] that a detection overlaps most, of its class before others; or None."""
        boxes = self.target["boxes"][~self.target["ignore"]]
        labels = self.target["labels"][~self.target["ignore"]]
        iou = torchvision.ops.box_iou(self.detections["boxes"][pick][None], boxes)[0]
        if not len(iou) or iou.max() < 0.1:
            return None
        same = labels == self.detections["labels"][pick]
        return boxes[(iou + (same & (iou >= 0.1))).argmax()]


def numbers_of(values: Tensor) -> list[float]:
    """All values, for a JSON file."""
    return [round(v, 4) for v in values.flatten().tolist()]


def look(model: nn.Module, config: Config, image: Tensor, target: dict, names, record) -> Seen:
    """Run a detector on one image, and keep what the modules and methods in `record` do."""
    with torch.no_grad(), recorded(model.eval(), record) as calls:
        outputs = model.outputs([image])
        candidates = model.select(outputs, config)
        (detections,) = model.finish(candidates, 1, config)
    if not len(detections["boxes"]):
        raise BadInput(f"nothing in it scores above {config.score_threshold}: --score-threshold")
    return Seen(model, config, image, target, names, calls, outputs, candidates, detections)


# ------------------------------------------------------------------------------ drawing


def show(axis, seen: Seen, boxes: list[Tensor | None] = (), margin=0.15, grey=False) -> None:
    """The image, or the part of it that these boxes [4] lie in; grey: as ground for a map."""
    h, w = seen.image.shape[1:]
    ground = (0, w, h, 0)  # pixel i lies between i and i + 1, as boxes have it
    image = seen.image.permute(1, 2, 0).cpu().numpy()
    axis.imshow(image.mean(2) if grey else image, "gray", extent=ground, vmin=0, vmax=255)
    axis.set(xticks=[], yticks=[])
    known = [b for b in boxes if b is not None]
    if not known:
        return
    known = torch.stack(known)
    low, high = known[:, :2].amin(0), known[:, 2:].amax(0)
    low, high = low - margin * (high - low), high + margin * (high - low)
    centre, half = ((low + high) / 2).tolist(), float((high - low).max()) / 2  # a square
    axis.set(xlim=(centre[0] - half, centre[0] + half), ylim=(centre[1] + half, centre[1] - half))
    axis.set_facecolor("0.8")  # what lies outside of the image


def outline(axis, box: Tensor | None, colour, style="-", width=2.0, alpha=1.0) -> None:
    """A box [4], if there is one, on a darker line, which shows it on its own colour too."""
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


def heat(axis, values: Tensor, box: Tensor, colours="viridis", alpha=0.75, limits=None, label=""):
    """A map [S, S] over a box [4] of the image, with its scale and its label beside it.

    Where `alpha` is "value", what is low is transparent.
    """
    x1, y1, x2, y2 = box.tolist()
    values = values.detach().float().cpu().numpy()
    low, high = limits or (float(values.min()), float(values.max()))
    if isinstance(alpha, str):
        alpha = np.clip((values - low) / max(high - low, 1e-6), 0, 1) ** 0.5
    limits = axis.get_xlim(), axis.get_ylim()
    drawn = axis.imshow(values, colours, extent=(x1, x2, y2, y1), alpha=alpha, vmin=low, vmax=high)
    axis.set(xlim=limits[0], ylim=limits[1])
    scale(axis, drawn, label)


def scale(axis, drawn, label: str = "") -> None:
    """A colour scale beside a drawing."""
    bar = axis.figure.colorbar(drawn, ax=axis, fraction=0.05, pad=0.02, label=label)
    bar.ax.tick_params(labelsize=8)
    bar.solids.set_alpha(1)
