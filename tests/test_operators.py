"""The kernels as operators of torch: opcheck, compiled over many sizes, empty, and copied alone."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from kernels import (
    batched_nms,
    cl_nms,
    decode_dense_offsets,
    deform_roi_pool,
    focal_loss,
    roi_align,
    soft_nms,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = Path(__file__).resolve().parent.parent / "kernels"
STRIDES = [4, 8]
FILES = ("nms", "soft_cl_nms", "roi_align", "focal_loss", "dense_decode")
nms, soft, pooling, focal, dense = (importlib.import_module(f"kernels.{name}") for name in FILES)


def boxes_of(count: int) -> torch.Tensor:
    torch.manual_seed(count)
    corner = torch.rand(count, 2) * 40
    return torch.cat([corner, corner + 4 + torch.rand(count, 2) * 30], 1).to(DEVICE)


def maps(**options) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, 1, 32 // s, 32 // s, device=DEVICE, **options) for s in STRIDES]


def everything(features, boxes, scores, labels, offsets, overlap):
    """All public operators on N boxes, one after another, as a detector chains them."""
    keep = batched_nms(boxes, scores, labels, 0.5)
    rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], 1)
    return (
        roi_align(features, rois[keep], 1, STRIDES, sampling_ratio=1, impl="triton"),
        decode_dense_offsets(boxes, offsets, overlap),
        focal_loss(offsets.flatten(1), labels),
        *soft_nms(boxes, scores, labels),
        *cl_nms(boxes, scores, labels, 0.5),
    )


def inputs(count: int) -> tuple:
    boxes, labels = boxes_of(count), torch.arange(count, device=DEVICE) % 3
    offsets, overlap = (torch.randn(count, k, 2, 2, device=DEVICE) for k in (4, 1))
    return maps(), boxes, torch.rand(count, device=DEVICE), labels, offsets, overlap


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_operators_keep_torchs_rules(impl):
    """Schema, fake results and gradients under a compiler with dynamic sizes, of every operator."""
    features, boxes, scores, labels, offsets, overlap = inputs(3)
    rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], 1)
    last = [f.contiguous(memory_format=torch.channels_last).requires_grad_() for f in features]
    moved = offsets[:, :2, :1, :1].clone().requires_grad_()
    geometry = (rois, moved, 1, STRIDES, 1, 0.1, True)
    calls = [
        (nms._padded, (boxes, scores, labels, 0.5, impl)),
        (nms._cut, nms.nms_padded(boxes, scores, labels, 0.5, impl)),
        (soft._padded, (boxes, scores, None, 0.5, "soft", 1e-3, impl)),
        (soft._cut, soft.cl_nms_padded(boxes, scores, labels, 0.5, impl)),
        (focal._focal, (offsets.flatten(1).requires_grad_(), labels, 0.25, 2.0, True, impl)),
        (dense._decode_op, (boxes, offsets, overlap, None, -1.0, -1.0, impl)),
    ]
    if impl == "triton":  # in torch, pooling is no operator
        grad = torch.randn(3, 1, 1, 1, device=DEVICE)
        free = [f.detach() for f in last]
        backward = ([True, True], grad, free, rois, moved.detach(), *geometry[2:])
        calls += [(pooling._pool, (last, *geometry)), (pooling._pool_backward, backward)]
    for operator, arguments in calls:
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if operator is not focal._focal:  # this would differentiate the slope too, which raises
            tests.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(operator, arguments, test_utils=tests)


def test_twenty_sizes_are_compiled_once():
    """Nothing depends on the box count: after a second size, which makes it a symbol, no more."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend=counter)
    for count in (7, 9):
        compiled(*inputs(count))
    frames = counter.frame_count
    assert 1 <= frames <= 2
    for count in (*range(2, 19), 32):  # multiples of 16, too, which Triton would specialise on
        found = compiled(*inputs(count))
    for out, wanted in zip(found, everything(*inputs(count)), strict=True):
        torch.testing.assert_close(out, wanted, equal_nan=True)
    assert counter.frame_count == frames


def test_no_boxes_under_inductor(tmp_path, monkeypatch):
    # the usual cache does not know of ATEN_CPU_CAPABILITY: what it holds may not compile
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True)
    for count in (0, 6):
        for out, wanted in zip(compiled(*inputs(count)), everything(*inputs(count)), strict=True):
            torch.testing.assert_close(out, wanted, equal_nan=True)


def test_functional_gradient_of_pooling():
    """torch.func.grad is what backward gives, in plain torch; of operators torch has none."""
    features, boxes, _, _, offsets, _ = inputs(4)
    rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], 1)

    def total(first):
        maps = [first, features[1]]
        pooled = deform_roi_pool(maps, rois, offsets[:, :2], 2, STRIDES, impl="torch")
        return pooled.square().sum()

    wanted = features[0].clone().requires_grad_()
    total(wanted).backward()
    assert wanted.grad.abs().max() > 0
    torch.testing.assert_close(torch.func.grad(total)(features[0]), wanted.grad)


ALONE = """
import importlib, sys
alone_with, *impls = sys.argv[1:]
if alone_with == "torch":  # as if nothing else were installed
    sys.modules |= {"triton": None, "torchvision": None}
import torch

def alone(name):
    sys.path.insert(0, name)  # a folder that holds this one file
    module = importlib.import_module(name)
    sys.path.remove(name)
    return sys.modules.pop(name)

files = ("roi_align", "nms", "soft_cl_nms", "focal_loss", "dense_decode")
pooling, nms, soft, focal, dense = map(alone, files)
boxes = torch.tensor([[2.0, 3, 20, 30], [2, 3, 21, 30], [30, 30, 60, 50]])
rois = torch.cat([torch.zeros(3, 1), boxes], 1)
scores, groups = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 0, 1])
for impl in impls:
    features = [torch.rand(1, 2, 4, 4).requires_grad_()]
    offsets = torch.zeros(3, 2, 1, 1).requires_grad_()
    out = pooling.roi_align(features, rois, 1, [16], impl=impl).sum()
    out = out + pooling.deform_roi_pool(features, rois, offsets, 1, [16], impl=impl).sum()
    out.backward()
    assert features[0].grad.abs().sum() > 0 and offsets.grad.abs().sum() > 0
    logits = torch.zeros(3, 2).requires_grad_()
    focal.focal_loss(logits, torch.tensor([0, 2, -1]), impl=impl).sum().backward()
    assert logits.grad[0, 0] < 0 < logits.grad[1, 0] and not logits.grad[2].any()
    assert nms.batched_nms(boxes, scores, groups, 0.5, impl=impl).tolist() == [0, 2]
    assert len(soft.soft_nms(boxes, scores, groups, impl=impl)[0]) == 3
    assert len(soft.cl_nms(boxes, scores, groups, 0.5, impl=impl)[0]) == 2
    cells = torch.full((3, 4, 2, 2), 0.5), torch.ones(3, 1, 2, 2)
    assert torch.allclose(dense.decode_dense_offsets(boxes, *cells, impl=impl), boxes)
    cells[0].requires_grad_()
    dense.decode_dense_reference(boxes, *cells).sum().backward()
    assert cells[0].grad.any()
if alone_with != "torch":  # the whole folder, inside another package
    from mine import ops
    import mine.ops.bench as bench
    assert not bench.mismatch(torch.ones(2), torch.ones(2))
    assert ops.batched_nms(boxes, scores, groups, 0.5).tolist() == [0, 2]
print("whole")
"""


@pytest.mark.parametrize("alone_with", ["torch", "everything"])
def test_each_kernel_file_works_when_copied_alone(alone_with, tmp_path):
    """Forward and backward; neither the package nor another of the files can be imported.

    With torch alone neither triton nor torchvision is installed. With everything, the whole folder
    is also part of another package beside the copies: operators of one name do not clash.
    """
    for name in FILES:
        (tmp_path / name).mkdir()
        shutil.copy(KERNELS / f"{name}.py", tmp_path / name)
    shutil.copytree(KERNELS, tmp_path / "mine" / "ops")
    (tmp_path / "mine" / "__init__.py").touch()
    (tmp_path / "program.py").write_text(ALONE)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    interpreted = ["triton"] if DEVICE == "cpu" and alone_with == "everything" else []
    line = [sys.executable, "program.py", alone_with, "auto", *interpreted]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.stdout.strip() == "whole", done.stderr[-2000:]
