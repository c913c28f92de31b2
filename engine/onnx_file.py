"""A program of torch.export as an ONNX file.

What torch.onnx cannot translate is replaced: some operators by others of torch, some by ONNX's own.
Its translations must also hold where there is no RoI, so that a tensor has no element.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from kernels.dense_decode import decode_dense_reference


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

    zero, one, number = op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), op.Shape(scores)
    last = op.ReduceMax(op.Concat(groups, zero, axis=0), keepdims=0)  # there may be no box
    same = op.Equal(op.Unsqueeze(op.Range(0, op.Add(last, 1), 1), one), op.Unsqueeze(groups, zero))
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
    """Write a program that was made on the CPU, with names for its outputs and its metadata."""
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
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # torch's own translations make it warn
    two_stage = any(node.target == ops.kernels_nms.padded.default for node in program.graph.nodes)
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
