"""A GPU runs a kernel's programs in any order: reversed and shuffled they leave the same bits."""

import importlib
import random
from itertools import product

import pytest
import torch

import kernels

interpreter = pytest.importorskip("triton.runtime.interpreter")
pytestmark = [
    pytest.mark.skipif(
        not importlib.import_module("kernels.nms").INTERPRETED, reason="kernels run natively"
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # its inf * 0, in numpy
]


class Shuffled(interpreter.InterpreterBuilder):
    """Runs the programs of a grid in another order: "forward", "reverse" or "random"."""

    order = "forward"
    seen = 0  # programs that were not where they would have been

    def set_grid_dim(self, *grid):
        super().set_grid_dim(*grid)
        self.cells = list(product(*map(range, grid)))
        if self.order == "reverse":
            self.cells.reverse()
        if self.order == "random":
            random.Random(0).shuffle(self.cells)
        self.places = iter(self.cells)

    def set_grid_idx(self, *place):
        cell = next(self.places)
        self.seen += cell != place
        super().set_grid_idx(*cell)


def boxes_of(number: int):
    boxes = (torch.rand(number, 4) * 30).round()
    boxes[:, 2:] += boxes[:, :2] + 1
    return boxes, (torch.rand(number) * 50).round() / 50, torch.randint(0, 5, (number,))


def pooled(deform: bool, dtype: torch.dtype, layout: torch.memory_format):
    """RoIAlign or deformable pooling with its gradients."""
    maps = [torch.rand(2, 5, 12 // s, 10 // s).to(dtype, memory_format=layout) for s in (1, 2)]
    maps = [m.requires_grad_() for m in maps]
    corner = torch.rand(3, 2) * 40
    rois = torch.cat([torch.tensor([[0.0], [1], [1]]), corner, corner + 30], 1)
    rois[2, 3:] += 300
    inputs, common = list(maps), (maps, rois)
    if deform:
        inputs.append(torch.rand(3, 2, 2, 2).requires_grad_())
        out = kernels.deform_roi_pool(*common, inputs[-1], 2, (4, 8), 1, impl="triton")
    else:
        out = kernels.roi_align(*common, 2, (4, 8), 1, impl="triton")
    weight = torch.linspace(0, 1, out.numel()).view_as(out).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, weight)]


def focal():
    logits = torch.randn(150, 17).requires_grad_()
    loss = kernels.focal_loss(logits, torch.randint(-1, 18, (150,)), impl="triton")
    return [loss.detach(), *torch.autograd.grad(loss.sum(), logits)]


def decoded():
    proposals = torch.rand(37, 4) * 50
    proposals[:, 2:] += proposals[:, :2]
    offsets, logits = torch.rand(37, 4, 3, 3), torch.rand(37, 1, 3, 3) - 0.5
    return [kernels.decode_dense_offsets(proposals, offsets, logits, (60, 60), impl="triton")]


CASES = {
    "align": lambda: pooled(False, torch.float32, torch.channels_last),
    "deform": lambda: pooled(True, torch.bfloat16, torch.contiguous_format),
    "nms": lambda: kernels.nms_padded(*boxes_of(70), 0.4, impl="triton"),
    "soft": lambda: kernels.soft_nms_padded(*boxes_of(40), 0.4, impl="triton"),
    "cl": lambda: kernels.cl_nms_padded(*boxes_of(40), 0.4, impl="triton"),
    "focal": focal,
    "decode": decoded,
}


@pytest.mark.parametrize("case", CASES)
def test_any_order_of_programs_leaves_the_same_bits(case, monkeypatch):
    builder = Shuffled()
    builder.options = interpreter.interpreter_builder.options
    monkeypatch.setattr(interpreter, "interpreter_builder", builder)
    monkeypatch.setattr(interpreter.interpreter_semantic, "builder", builder)
    found = {}
    for builder.order in ("forward", "reverse", "random"):
        torch.manual_seed(0)
        found[builder.order] = CASES[case]()
        assert (builder.seen > 0) == (builder.order != "forward")
    for order in ("reverse", "random"):
        for a, b in zip(found["forward"], found[order], strict=True):
            assert torch.equal(a, b) and a.isfinite().all()
