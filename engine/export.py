"""`--export FILE`: the network as a file that runs without this project's code.

FILE.pt2 is a program of torch.export and needs `kernels/` beside torch. FILE.onnx needs an ONNX
runtime alone. Both take an image of any size in SIDES and stop where the last NMS begins.
"""

from __future__ import annotations

import copy
import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torchvision.ops.misc import FrozenBatchNorm2d

from common import BadInput, FixedBatchNorm2d
from engine.deformable import DeformableConv
from engine.onnx_file import save_onnx
from engine.processes import print_once
from engine.settings import Test

# px. In smaller images a map of the pyramid may be one cell, which torch treats apart. choice: 4096
SIDES = 160, 4096
NAMES = ("boxes", "scores", "labels", "masks", "mask_iou")  # of outputs; the last two with masks

USE = """{path}: the network up to the boxes that enter the last NMS
in   image, uint8 RGB [3, H, W], sides {low} to {high} px; in testing the shorter one was {scale} px
out  boxes [N, 4] (x1 y1 x2 y2 in pixels of the image), scores [N], labels [N]{masks}
     label k is entry k of "categories", JSON in the file's {where}
NMS within each class is left to the caller (--nms-iou was {iou})
run  {code}"""
MASKS = ",\n     masks [N, M, M] (probabilities over the box), mask_iou [N]"
PT2 = "import torch, kernels; torch.export.load({path!r}).module()(image)  # a dict"
ONNX = "onnxruntime.InferenceSession({path!r}).run(None, dict(image=image))  # a list"


class BoxesBeforeNMS(nn.Module):
    """An image, uint8 RGB [3, H, W] -> the candidates of a detector in it.

    A dict of boxes [N, 4] in its pixels, scores [N] and labels [N], with masks also masks [N, M, M]
    and mask_iou [N]: what enters the last NMS under `test`.
    """

    def __init__(self, model: nn.Module, test: Test):
        super().__init__()
        self.model: Any = model
        self.test = test

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        found = self.model.candidates(self.model.outputs([image]), self.test)
        return {name: found[name] for name in NAMES if name in found}


def simplify(module: nn.Module) -> None:
    """Change layers in place, not what they compute, so that torch.export takes any size.

    Batch norms become a fixed scale and shift, since torch.export wants to know the batch or the
    width of others. Offsets of deformable convolutions become contiguous: it cannot reason about
    slices of channels_last maps.
    """
    for name, child in module.named_children():
        if isinstance(child, DeformableConv):
            child.conv_offset.register_forward_hook(lambda *call: call[-1].contiguous())
        if isinstance(child, nn.BatchNorm2d | FixedBatchNorm2d):
            frozen = FrozenBatchNorm2d(len(child.weight), child.eps)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen.to(child.weight.device))
        simplify(child)


def export_file(model: nn.Module, categories: list[dict], path: str | Path, test: Test) -> None:
    """Write `BoxesBeforeNMS` of a model as FILE.pt2 or FILE.onnx, and print how to use it.

    Raises BadInput for another ending, and if the packages that write ONNX are missing.
    """
    path = Path(path)
    if path.suffix not in (".pt2", ".onnx"):
        raise BadInput(f"--export {path}: the name of such a file ends in .pt2 or .onnx")
    onnx = path.suffix == ".onnx"
    if onnx and not (find_spec("onnx") and find_spec("onnxscript")):
        raise BadInput(f"--export {path}: ONNX needs two packages: pip install onnx onnxscript")
    network = BoxesBeforeNMS(copy.deepcopy(model).eval(), test)
    simplify(network)
    # On the CPU: a program made on a GPU runs on no other device.
    image = torch.zeros(3, SIDES[0], SIDES[0] + 32, dtype=torch.uint8)
    # The network pads: if sizes were 32 * Dim, torch could not convert the saved program.
    low, high = SIDES
    sides = {1: Dim("H", min=low, max=high), 2: Dim("W", min=low, max=high)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensors that share memory: they are saved whole
        program = torch.export.export(
            network.cpu(), (image,), dynamic_shapes=(sides,), strict=False
        )
        names = NAMES[: len(program.graph_signature.user_outputs)]
        if onnx:
            save_onnx(program, path, names, json.dumps(categories))
        else:
            torch.export.save(program, path, extra_files={"categories": json.dumps(categories)})
    text = USE.format(
        path=path,
        low=low,
        high=high,
        scale=test.test_scales[0],
        masks=MASKS if "masks" in names else "",
        where="metadata" if onnx else "extra files",
        iou=test.nms_iou,
        code=(ONNX if onnx else PT2).format(path=str(path)),
    )
    print_once(text)
