"""decode_dense_offsets against cell-by-cell Python, in torch and Triton; what must not pass."""

import math
import sys

import pytest
import torch

from kernels.dense_decode import decode_dense_offsets, decode_dense_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def by_cells(proposals, offsets, logits, sizes):
    """The contract in plain Python: one proposal, one cell at a time, in float64."""
    S, out = offsets.shape[-1], []
    for r, (x1, y1, x2, y2) in enumerate(proposals.tolist()):
        w, h, cells = x2 - x1, y2 - y1, []
        for i in range(S):
            for j in range(S):
                x, y = x1 + (j + 0.5) / S * w, y1 + (i + 0.5) / S * h
                left, top, right, bottom = offsets[r, :, i, j].tolist()
                box = [x - left * w, y - top * h, x + right * w, y + bottom * h]
                cells.append((logits[r, 0, i, j].item() > 0, box))
        used = [box for inside, box in cells if inside] or [box for _, box in cells]
        box = [math.fsum(side) / len(used) for side in zip(*used, strict=True)]
        if sizes is not None:
            height, width = sizes[r].tolist()
            limit = (width, height, width, height)
            box = [min(max(value, 0.0), top) for value, top in zip(box, limit, strict=True)]
        out.append(box)
    return torch.tensor(out, dtype=torch.float64).reshape(-1, 4)


def case(R, S, seed, dtype=torch.float32):
    """Proposals partly outside a 300 x 400 image; rows 1 and 2 have no cell on the object."""
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand((R, 2), generator=g) * 350 - 30
    size = 10 ** (3 * torch.rand((R, 2), generator=g) - 0.3)
    proposals = torch.cat([corner, corner + size], 1)
    offsets = torch.rand((R, 4, S, S), generator=g)
    logits = torch.randn((R, 1, S, S), generator=g)
    if R > 2:
        logits[1], logits[2] = -1.0, 0.0
    return proposals, offsets.to(dtype), logits.to(dtype)


def check(out, proposals, offsets, logits, sizes, factor=2.0):
    """Error against float64 at most `factor` times that of torch in float32, plus rounding."""
    exact = by_cells(proposals.double(), offsets.double(), logits, sizes)
    torch_error = (decode_dense_reference(proposals, offsets, logits, sizes) - exact).abs()
    assert out.dtype == torch.float32 and out.shape == exact.shape
    scale = exact.abs().amax() if len(exact) else 0.0
    allowed = factor * torch_error.max() + 4e-7 * scale if len(exact) else 0.0
    assert torch.all((out.cpu().double() - exact).abs() <= allowed)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("R, S", [(0, 7), (1, 1), (3, 14), (40, 7), (5, 3)])
def test_against_cells(R, S, dtype, impl):
    tensors = case(R, S, seed=R, dtype=dtype)
    for sizes in (None, torch.tensor([[300.0, 400.0]]).repeat(R, 1) - torch.arange(R)[:, None]):
        on_device = [t.to(DEVICE) for t in tensors]
        limits = sizes if sizes is None else sizes.to(DEVICE)
        check(decode_dense_offsets(*on_device, limits, impl=impl), *tensors, sizes)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_worked_by_hand(impl):
    # A proposal of 8 x 4 px in 2 x 2 cells; the right column of cells lies on the object.
    proposals = torch.tensor([[10.0, 20.0, 18.0, 24.0]], device=DEVICE)
    offsets = torch.full((1, 4, 2, 2), 0.5, device=DEVICE)
    logits = torch.tensor([[[[-1.0, 2.0], [float("nan"), 0.1]]]], device=DEVICE)
    out = decode_dense_offsets(proposals, offsets, logits, impl=impl)
    assert out.tolist() == [[12.0, 20.0, 20.0, 24.0]]  # centres x = 16, y = 21 and 23
    out = decode_dense_offsets(proposals, offsets, logits, (22, 15), impl=impl)
    assert out.tolist() == [[12.0, 20.0, 15.0, 22.0]]
    out = decode_dense_offsets(proposals, offsets, -logits.abs(), impl=impl)
    assert out.tolist() == [[10.0, 20.0, 18.0, 24.0]]  # no cell: the mean over all


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_strides_and_unused_cells(impl):
    """channels_last and sliced inputs need no copy; what an unused cell holds does not matter."""
    tensors = case(9, 7, seed=5)
    wanted = decode_dense_offsets(*(t.to(DEVICE) for t in tensors), impl=impl)
    proposals, offsets, logits = (t.to(DEVICE) for t in tensors)
    wide = torch.cat([offsets, logits], 1).to(memory_format=torch.channels_last)  # [R, 5, 7, 7]
    out = decode_dense_offsets(proposals, wide[:, :4], wide[:, 4:], impl=impl)
    torch.testing.assert_close(out, wanted)
    some = (logits > 0).any(-1, keepdim=True).any(-2, keepdim=True) & ~(logits > 0)
    for poison in (float("nan"), float("inf")):
        broken = torch.where(some, poison, offsets)
        torch.testing.assert_close(
            decode_dense_offsets(proposals, broken, logits, impl=impl), wanted
        )
    broken = torch.full_like(offsets, float("nan"))  # and what a used one holds is not hidden
    assert decode_dense_offsets(proposals, broken, logits, (300, 400), impl=impl).isnan().all()


def test_exact_offsets_return_the_box():
    """Encoding a box as dense offsets and decoding it gives it back, whichever cells are used."""
    proposals, _, logits = case(50, 7, seed=1)
    gt = proposals + torch.tensor([-3.0, 5.0, 2.0, -1.0])
    x1, y1, x2, y2 = proposals[:, :, None, None].unbind(1)
    w, h = x2 - x1, y2 - y1
    bins = (torch.arange(7) + 0.5) / 7
    x, y = (x1 + bins * w).expand(-1, 7, -1), (y1 + bins[:, None] * h).expand(-1, -1, 7)
    g = gt[:, :, None, None]
    offsets = [(x - g[:, 0]) / w, (y - g[:, 1]) / h, (g[:, 2] - x) / w, (g[:, 3] - y) / h]
    out = decode_dense_offsets(proposals, torch.stack(offsets, 1), logits)
    torch.testing.assert_close(out, gt, atol=1e-3, rtol=1e-5)


def test_negative_controls():
    proposals, offsets, logits = tensors = case(40, 7, seed=3)
    sizes = torch.tensor([[300.0, 400.0]]).repeat(40, 1)
    out = decode_dense_offsets(*tensors, sizes)
    check(out, *tensors, sizes)
    half_cell = (proposals[:, 2:] - proposals[:, :2]).repeat(1, 2) / 14
    swapped = decode_dense_offsets(
        proposals, offsets.transpose(2, 3), logits.transpose(2, 3), sizes
    )
    for wrong in (
        torch.zeros_like(out),
        proposals,
        out + half_cell,
        out[:, [1, 0, 3, 2]],
        swapped,
        decode_dense_offsets(proposals, offsets, logits.abs(), sizes),  # every cell
        decode_dense_offsets(*tensors),  # not clipped
        torch.full_like(out, float("nan")),
    ):
        with pytest.raises(AssertionError):
            check(wrong, *tensors, sizes)


def test_gradient_is_refused_and_the_reference_has_one():
    proposals, offsets, logits = case(4, 7, seed=2)
    offsets.requires_grad_()
    out = decode_dense_offsets(proposals, offsets, logits)
    with pytest.raises(RuntimeError, match="decode_dense_reference"):
        out.sum().backward()
    decode_dense_reference(proposals, offsets, logits).sum().backward()
    assert offsets.grad.abs().sum() > 0
    with torch.no_grad():
        assert not decode_dense_offsets(proposals, offsets, logits).requires_grad


def test_autocast_computes_in_float32():
    tensors = case(6, 7, seed=4)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = decode_dense_offsets(*(t.to(DEVICE) for t in tensors))
    check(out, *tensors, None)


def test_arguments():
    proposals, offsets, logits = case(4, 7, seed=0)
    for bad in (
        lambda: decode_dense_offsets(proposals[:3], offsets, logits),
        lambda: decode_dense_offsets(proposals, offsets[:, :3], logits),
        lambda: decode_dense_offsets(proposals, offsets[..., :5], logits),
        lambda: decode_dense_offsets(proposals, offsets, logits[:, 0]),
        lambda: decode_dense_offsets(proposals, offsets, logits, torch.ones(3, 2)),
        lambda: decode_dense_offsets(proposals, offsets, logits, (-1, 5)),
        lambda: decode_dense_offsets(proposals, offsets, logits, (1, 5, 5)),
        lambda: decode_dense_offsets(proposals, offsets, logits, [(300, 400)] * 4),
        lambda: decode_dense_offsets(proposals, offsets, logits, [(300, 400)] * 2),
        lambda: decode_dense_offsets(proposals, offsets, logits, impl="torchvision"),
        lambda: decode_dense_offsets(proposals.to("meta"), offsets, logits),
    ):
        with pytest.raises(ValueError):
            bad()


def test_compiles_without_a_graph_break():
    def head(proposals, offsets, logits):
        return decode_dense_offsets(proposals, offsets.relu(), logits * 2, (300, 400)) / 2

    tensors = case(5, 7, seed=6)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), head(*tensors))


def test_bench_finds_wrong_results_and_scenes_without_data(monkeypatch):
    from kernels.bench import mismatch
    from kernels.bench_boxes import proposals, scenes

    monkeypatch.delenv("DETECTION_DATA", raising=False)
    rois = proposals(scenes(2), per_image=100)
    assert rois.shape == (200, 5) and rois[:, 0].tolist() == [0.0] * 100 + [1.0] * 100
    assert torch.equal(rois, proposals(scenes(2), per_image=100))
    order = torch.arange(5)
    assert not mismatch(rois, rois.clone()) and not mismatch((order, order), (order, order))
    for wrong in (torch.zeros_like(rois), rois + 1, rois.flip(0), rois * float("nan"), rois[1:]):
        assert mismatch(wrong, rois)
    assert mismatch(order.flip(0), order) and mismatch((order, order + 1), (order, order))


def test_bench_needs_no_index_of_the_gpu_and_no_tyro(monkeypatch, capsys):
    from kernels import bench

    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert bench.pick_device("cuda").type == "cuda" and bench.pick_device("cuda:1").index == 1
    assert bench.pick_device("cpu").type == "cpu" and chosen == [0, 1]
    monkeypatch.setitem(sys.modules, "tyro", None)
    empty = {"copy_bandwidth": lambda *_: 1.0, "cases": lambda device: iter(())}
    for name, function in empty.items():
        monkeypatch.setattr(bench, name, function)
    assert bench.main(["--device", "cpu", "--seconds", "0.01"]) == 0
    assert "copy_gb_s" in capsys.readouterr().out
