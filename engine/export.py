"""`--export FILE`: the network as a file that runs without this project's code.

FILE.pt2 is a program of torch.export and needs `kernels/` beside torch. FILE.onnx needs
only an ONNX runtime. Both take an image of any size in SIDES and stop where the last NMS
begins.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchvision.ops.misc import FrozenBatchNorm2d

from common import BadInput, FixedBatchNorm2d
from engine.detector import DeformableConv
from engine.processes import print_once
from engine.settings import Test
from kernels.dense_decode import decode_dense_reference

# px. In smaller images a map of the pyramid may be one cell, which torch treats apart.
# choice: 4096
SIDES = 160, 4096
NAMES = ("boxes", "scores", "labels", "masks", "mask_iou")  # of outputs

USE = """{path}: the network up to the boxes that enter the last NMS
in   image, uint8 RGB [3, H, W], sides {low} to {high} px; the shorter one was tested at {scale} px
out  boxes [N, 4] (x1 y1 x2 y2 in pixels of the image), scores [N], labels [N]{masks}
     label k is entry k of "categories", JSON in the file's {where}
NMS within each class is left to the caller (--nms-iou was {iou})
run  {code}"""
MASKS = ",\n     masks [N, M, M] (probabilities over the box), mask_iou [N]"
PT2 = "import torch, kernels; torch.export.load({path!r}).module()(image)  # a dict"
ONNX = "onnxruntime.InferenceSession({path!r}).run(None, dict(image=image))  # a list"


class BoxesBeforeNMS(nn.Module):
    """An image, uint8 RGB [3, H, W] -> the candidates of a detector in it.

    A dict of boxes [N, 4] in its pixels, scores [N] and labels [N], with masks also masks
    [N, M, M] and mask_iou [N]: what enters the last NMS under `test`.
    """

    def __init__(self, model: nn.Module, test: Test):
        super().__init__()
        self.model: Any = model
        self.test = test

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        found = self.model.candidates(self.model.outputs([image]), self.test)
        return {name: found[name] for name in NAMES if name in found}


def simplify(module: nn.Module) -> None:
    """Change layers in place, but not what they compute, so that torch.export takes any size.

    Batch norms become a fixed scale and shift, because torch.export wants to know the
    batch or the width of others. Offsets of deformable convolutions become contiguous,
    because torch.export cannot reason about slices of channels_last maps.
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
            extra = {"categories": json.dumps(categories)}
            torch.export.save(program, path, extra_files=extra)
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


# ------------------------------------------------------------------------------ ONNX

# torch.onnx cannot translate some operators. They are replaced by others of torch, or by
# ONNX's own. A translation must also hold without RoIs, when a tensor has no element.


def sum_of_rows(table, index, offsets, *options) -> tuple[Tensor, ...]:
    """aten.embedding_bag as RoI pooling calls it: R bags of one size, weighted. Tap by tap."""
    R = offsets.shape[0]
    size = index.view(R, -1).shape[1]  # a plain number: ONNX cannot infer it where R is 0
    index, weights = index.view(R, size), options[3].view(R, size)
    total = table[index[:, 0]] * weights[:, :1]
    for tap in range(1, size):
        total = total + table[index[:, tap]] * weights[:, tap : tap + 1]
    return total, offsets, offsets, offsets  # the last three are not used


def group_norm(x, groups, weight=None, bias=None, eps=1e-5, *_):
    """aten.group_norm of R RoIs, R perhaps 0."""
    if isinstance(x.shape[0], int):
        return NotImplemented  # ONNX has it for images
    R, C, *sides = x.shape
    x = x.clone(memory_format=torch.contiguous_format)  # torch.onnx relies on it
    parts = x.view(R, groups, C // groups * math.prod(sides))
    centred = parts - parts.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    x = (centred * scale).view(R, C, *sides)
    return x if weight is None else x * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)


def repeat_rows(values, repeats, dim=None, **_):
    """aten.repeat_interleave, whose translation cannot reshape an empty tensor."""
    if dim is None:
        return NotImplemented
    return values.index_select(dim, torch.arange(values.shape[dim] * repeats) // repeats)


def nms_in_onnx(boxes, scores, groups, iou_threshold, *_):
    """`kernels.nms_padded`: NonMaxSuppression with a class for each group, which is exact."""
    from onnxscript import opset18 as op

    zero, one = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
    number = op.Shape(scores)
    last = op.ReduceMax(op.Concat(groups, zero, axis=0), keepdims=0)  # there may be no box
    numbers = op.Unsqueeze(op.Range(0, op.Add(last, 1), 1), one)
    same = op.Equal(numbers, op.Unsqueeze(groups, zero))
    scores_by_group = op.Unsqueeze(op.Where(same, scores, float("-inf")), zero)  # [1, groups, N]
    lowest = torch.finfo(torch.float32).min  # a score of -inf is absent
    boxes = op.Unsqueeze(boxes, zero)
    found = op.NonMaxSuppression(boxes, scores_by_group, number, iou_threshold, lowest)
    keep = op.Squeeze(op.Slice(found, [2], [3], [1]), one)  # of image, group and box
    keep, _ = op.TopK(keep, op.Shape(keep), largest=0)  # so that ties go to the lower index
    _, order = op.TopK(op.Gather(scores, keep), op.Shape(keep))
    count = op.Shape(keep)
    room = op.Concat(zero, op.Sub(number, count), axis=0)
    return op.Pad(op.Gather(keep, order), room, -1), op.Squeeze(count, zero)


def sort_in_onnx(values, stable, dim=-1, descending=False):
    """aten.sort.stable: of equal values TopK, too, takes the one of the lower index first."""
    from onnxscript import opset18 as op

    number = op.Gather(op.Shape(values), op.Constant(value_ints=[dim]))
    return op.TopK(values, number, axis=dim, largest=int(descending))


def cut_in_onnx(keep, count):
    """The first `count` indices."""
    from onnxscript import opset18 as op

    return op.Slice(keep, [0], op.Reshape(count, [1]), [0])


def save_onnx(program: ExportedProgram, path: Path, names: tuple, categories: str) -> None:
    """Write a program made on the CPU, with names for its outputs and metadata."""
    ops: Any = torch.ops
    in_torch = {
        ops.aten.embedding_bag.padding_idx: sum_of_rows,
        ops.aten.group_norm.default: group_norm,
        ops.aten.repeat_interleave.self_int: repeat_rows,
        ops.kernels_dense_decode.decode.default: lambda *args: decode_dense_reference(*args[:4]),
    }
    in_onnx: Any = {
        ops.kernels_nms.padded.default: nms_in_onnx,
        ops.kernels_nms.cut.default: cut_in_onnx,
        ops.aten.sort.stable: sort_in_onnx,
    }
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # torch's fault
    called = {node.target for node in program.graph.nodes}
    two_stage = ops.kernels_nms.padded.default in called
    onnx = torch.onnx.export(
        program.run_decompositions(in_torch),
        dynamo=True,
        custom_translation_table=in_onnx,
        input_names=["image"],
        output_names=names,
        optimize=not two_stage,  # for which it takes minutes; runtimes do it as they load
        verbose=False,
    )
    onnx.model.metadata_props["categories"] = categories
    onnx.save(path, external_data=False)
