"""`--export FILE`: the network as a file that torch runs without this project's code."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim
from torchvision.ops.misc import FrozenBatchNorm2d

from common import BadInput

# px. In smaller images a map of the pyramid may be one cell, which torch treats apart. choice: 4096
SIDES = 160, 4096


class BoxesBeforeNMS(nn.Module):
    """An image, uint8 RGB [3, H, W], sides multiples of 32 -> the candidates of a detector in it.

    A dict of boxes [N, 4] in its pixels, scores [N] and labels [N], with masks also masks [N, M, M]
    and mask_iou [N]: what enters the last NMS, under the settings that the model was loaded with.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        found = self.model.select(self.model.outputs([image]), self.model.config)
        names = ("boxes", "scores", "labels", "masks", "mask_iou")
        return {name: found[name] for name in names if name in found}


def freeze_norms(module: nn.Module) -> None:
    """Batch norms become fixed scale and shift: torch.export wants to know the batch of others."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen.to(child.weight.device))
        freeze_norms(child)


def export_file(model: nn.Module, categories: list[dict], path: str | Path) -> None:
    """Write `BoxesBeforeNMS` of a model for `torch.export.load`, for images of any size in SIDES.

    Who loads it imports `kernels` before, whose operators it calls. Its extra file "categories" is
    their list as JSON. Raises BadInput where the file has another ending.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise BadInput(f"--export {path}: the name of such a file ends in .pt2")
    network = BoxesBeforeNMS(copy.deepcopy(model).eval())
    freeze_norms(network)
    image = torch.zeros(3, SIDES[0], SIDES[0] + 32, dtype=torch.uint8)
    image = image.to(next(model.parameters()).device)
    low, high = (side // 32 for side in SIDES)
    size = {1: 32 * Dim("h", min=low, max=high), 2: 32 * Dim("w", min=low, max=high)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensors that share memory: they are saved whole
        program = torch.export.export(network, (image,), dynamic_shapes=(size,), strict=False)
        torch.export.save(program, path, extra_files={"categories": json.dumps(categories)})
