"""`--export FILE`: the network as a file that runs without this project's code.

FILE.pt2 is a program of torch.export and needs `kernels/` beside torch. FILE.onnx needs an ONNX
runtime only. Both take a photo of any size in SIDES and end where the last NMS begins.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchvision.ops.misc import FrozenBatchNorm2d

from common import BadInput
from engine.processes import print_once
from engine.settings import Test
from kernels.dense_decode import decode_dense_reference

# px. In smaller images a map of the pyramid may be one cell, which torch treats apart. choice: 4096
SIDES = 160, 4096


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


def make_program(network: BoxesBeforeNMS) -> ExportedProgram:
    """The network as a graph for images of any size in SIDES, on the device of its weights."""
    image = torch.zeros(3, SIDES[0], SIDES[0] + 32, dtype=torch.uint8)
    image = image.to(next(network.parameters()).device)
    # Plain sizes, padded inside: with `32 * Dim` a saved file could not be converted any more.
    sides = {i + 1: Dim(name, min=SIDES[0], max=SIDES[1]) for i, name in enumerate(("H", "W"))}
    return torch.export.export(network, (image,), dynamic_shapes=(sides,), strict=False)


def export_file(model: nn.Module, categories: list[dict], path: str | Path, test: Test) -> None:
    """Write `BoxesBeforeNMS` of a model as FILE.pt2 or FILE.onnx, and print how to use the file.

    The categories go with it as JSON: "categories" among the extra files of a .pt2, or among the
    metadata of an .onnx. Raises BadInput for another ending, if packages for ONNX are missing, or
    if the model has an operator that ONNX does not know.
    """
    path = Path(path)
    if path.suffix not in (".pt2", ".onnx"):
        raise BadInput(f"--export {path}: the name of such a file ends in .pt2 or .onnx")
    network = BoxesBeforeNMS(copy.deepcopy(model).eval(), test)
    freeze_norms(network)
    if path.suffix == ".onnx":
        network.cpu()  # on a GPU the graph would call Triton's kernels
    path.parent.mkdir(parents=True, exist_ok=True)
    names = json.dumps(categories)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensors that share memory: they are saved whole
        program = make_program(network)
        if path.suffix == ".pt2":
            torch.export.save(program, path, extra_files={"categories": names})
        else:
            save_onnx(program, path, names)
    print_once(describe(path, "mask" in str(program.graph_signature.user_outputs), test))


# ------------------------------------------------------------------------------ ONNX


def gather_and_sum(table, index, offsets, *options) -> tuple[Tensor, ...]:
    """`aten.embedding_bag` of equal bags, as RoI pooling calls it: tap by tap, to save memory.

    ONNX's translation of the operator loops over the bags instead.
    """
    weights = options[3].view(offsets.shape[0], -1)
    index = index.view(offsets.shape[0], -1)
    total = table[index[:, 0]] * weights[:, :1]
    for tap in range(1, index.shape[1]):
        total = total + table[index[:, tap]] * weights[:, tap : tap + 1]
    return total, offsets, offsets, offsets  # only the first is used


def group_norm(x, groups, weight=None, bias=None, eps=1e-5, *_):
    """`aten.group_norm` of R RoIs, where R may be 0, which ONNX's InstanceNormalization refuses."""
    if isinstance(x.shape[0], int):
        return NotImplemented
    R, C, *sides = x.shape
    x = x.clone(memory_format=torch.contiguous_format)  # a later pass takes it for that
    parts = x.view(R, groups, C // groups * math.prod(sides))
    centred = parts - parts.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    x = (centred * scale).reshape(R, C, *sides)
    return x if weight is None else x * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)


def padded_nms(boxes, scores, groups, iou_threshold, method, score_threshold, impl):
    """`kernels.nms_padded` in ONNX's operators: groups are classes to NonMaxSuppression."""
    from onnxscript import opset18 as op

    absent, zero, one = -3.4028235e38, op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
    last = op.ReduceMax(op.Concat(groups, zero, axis=0), keepdims=0)
    classes = op.Range(0, op.Add(last, 1), 1)
    same = op.Equal(op.Unsqueeze(classes, one), op.Unsqueeze(groups, zero))  # [groups, N]
    by_class = op.Unsqueeze(op.Where(same, scores, float("-inf")), zero)
    number = op.Shape(scores)
    found = op.NonMaxSuppression(op.Unsqueeze(boxes, zero), by_class, number, iou_threshold, absent)
    keep = op.Squeeze(op.Slice(found, [2], [3], [1]), one)  # of class, image and index the last
    keep, _ = op.TopK(keep, op.Shape(keep), largest=0)  # of equal scores the lower index is first
    kept_scores, order = op.TopK(op.Gather(scores, keep), op.Shape(keep))
    count = op.Shape(keep)
    room = op.Concat(zero, op.Sub(number, count), axis=0)
    keep = op.Pad(op.Gather(keep, order), room, -1)
    return keep, op.Pad(kept_scores, room, 0.0), op.Squeeze(count, zero)


def cut(keep, reported, count):
    """The first `count` entries of both, in ONNX's operators."""
    from onnxscript import opset18 as op

    end = op.Reshape(count, [1])
    return op.Slice(keep, [0], end, [0]), op.Slice(reported, [0], end, [0])


def save_onnx(program: ExportedProgram, path: Path, categories: str) -> None:
    ops: Any = torch.ops
    plain = {
        ops.aten.embedding_bag.padding_idx: gather_and_sum,
        ops.aten.group_norm.default: group_norm,
        ops.kernels_dense_decode.decode.default: lambda *args: decode_dense_reference(*args[:3]),
    }
    program = program.run_decompositions(plain)
    onnx = torch.onnx.export(
        program,
        dynamo=True,
        custom_translation_table={
            ops.kernels_nms.padded.default: padded_nms,
            ops.kernels_nms.cut.default: cut,
        },
        input_names=["image"],
        verbose=False,
    )
    onnx.model.metadata_props["categories"] = categories
    onnx.save(path, external_data=False)
