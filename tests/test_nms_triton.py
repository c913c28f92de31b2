"""NMS on Triton against torch, of fixed shape, in a graph; on real images."""

import importlib

import pytest
import torch
import torchvision
import triton.language as tl
from test_nms import (
    DEVICE,
    METHODS,
    actual,
    big,
    check,
    fused_multiply_add,  # noqa: F401  (a fixture of every test here, too)
    random_case,
)
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from kernels import (
    batched_nms,
    cl_nms,
    cl_nms_padded,
    nms,
    nms_padded,
    soft_cl_nms,
    soft_nms,
    soft_nms_padded,
)

module = importlib.import_module("kernels.nms")  # `kernels.nms` itself is the function
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # its 0 / 0, in numpy


@pytest.mark.parametrize("method", METHODS)
def test_triton_against_torch(method):
    """Many small groups in one call: on a grid with ties, continuous, degenerate."""
    for threshold in (0.25, 0.5):
        cases = [random_case(seed, 8, seed % 3) for seed in range(6)]
        boxes, scores = (torch.cat([case[i] for case in cases]) for i in (0, 1))
        groups = torch.cat([case[2] + 7 * i for i, case in enumerate(cases)])
        case = boxes, scores, groups, threshold
        check(actual(method, *case, "triton"), actual(method, *case, "torch"))


@module.jit()
def _pairs(boxes, thresholds, half_ulps, out, ODD: tl.constexpr, N: tl.constexpr):
    lane = tl.arange(0, N)
    box, at = module._load_boxes(boxes, lane, lane < N), lane[:, None] * N + lane[None, :]
    threshold, half_ulp = tl.load(thresholds + at), tl.load(half_ulps + at)
    tl.store(out + at, module._over(box, box, threshold, half_ulp, ODD))


def test_over_is_the_rounded_quotients_answer():
    """With each pair's own IoU as the threshold, and the floats around it."""
    g = torch.Generator().manual_seed(0)
    corner = torch.rand((64, 2), generator=g) * 20
    boxes = torch.cat([corner, corner + torch.rand((64, 2), generator=g) * 40 + 1], 1).to(DEVICE)
    boxes[::8] = boxes[::8].round()  # the quotients of small integers, too
    boxes[0, 2:], boxes[1, 2:] = boxes[0, :2], boxes[1, :2] - 3  # no area, a negative side
    iou = module.pairwise_iou(boxes[:, None], boxes)
    iou = iou.where(iou > 0, 0.5)
    for steps in (-2, -1, 0, 1):
        t = (iou.view(torch.int32) + steps).view(torch.float32)
        half = (torch.nextafter(t, t + 1) - t).double().div(2).float()
        want = module.pairwise_iou(boxes[:, None], boxes) > t
        for odd in (False, True):
            mine = (t.view(torch.int32) & 1) == odd
            found = torch.zeros_like(want)
            _pairs[(1,)](boxes, t, half, found, ODD=odd, N=64, enable_fp_fusion=False)
            assert mine.any() and torch.equal(found[mine], want[mine]), (steps, odd)


@pytest.mark.parametrize("method", METHODS)
def test_triton_groups_larger_than_a_block(method, monkeypatch):
    for file in (module, soft_cl_nms):
        monkeypatch.setitem(file._LAUNCH, "BLOCK", 8)
    g = torch.Generator().manual_seed(1)
    centre = torch.randint(4, (48, 2), generator=g) * 10 + torch.randn((48, 2), generator=g)
    boxes = torch.cat([centre - 5, centre + 5], 1)
    scores = torch.randint(0, 50, (48,), generator=g) / 50
    # Of one group more are kept than a block holds, and the last of them suppress others.
    scores[::4] = -torch.inf  # rows that are not there, among the others
    groups = (torch.arange(48) % 5 == 0).long()
    rows = (groups == 0).nonzero()[:, 0]
    for values in (boxes, scores):  # twins a block apart: the first is kept
        values[rows[24:32]] = values[rows[16:24]]
    case = boxes, scores, groups, 0.4
    check(actual(method, *case, "triton"), actual(method, *case, "torch"))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_of_equal_scores_the_first_names_the_cluster(impl, monkeypatch):
    """Two best, a block apart: the first's cluster keeps its middle, box 1; else box 2 stays."""
    monkeypatch.setitem(soft_cl_nms._LAUNCH, "BLOCK", 8)
    x = torch.full((9,), 100.0)
    x[[0, 1, 2, 8]] = torch.tensor([0.0, 3, 4, 6])
    boxes = torch.stack([x, torch.zeros(9), x + 10, torch.full((9,), 10.0)], 1)
    scores = torch.full((9,), -torch.inf)
    scores[[0, 1, 2, 8]] = torch.tensor([0.9, 0.88, 0.88, 0.9])
    kept, _ = actual("cl", boxes, scores, torch.zeros(9, dtype=torch.int64), 0.4, impl)
    assert sorted(kept) == [1, 8]


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_soft_nms_keeps_a_score_at_the_threshold(impl):
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]], device=DEVICE)  # IoU 1/2
    scores, groups = torch.tensor([1, 0.5], device=DEVICE), None
    for least, count in ((0.25, 2), (0.2501, 1)):
        kept, _ = soft_nms(boxes, scores, groups, 0.4, score_threshold=least, impl=impl)
        assert len(kept) == count


@pytest.mark.parametrize("impl", ["auto", "torch", "triton"])
def test_padded_has_fixed_shapes(impl):
    boxes, scores, groups, _ = (t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in big())
    keep, count = nms_padded(boxes, scores, groups, 0.5, impl=impl)
    wanted = batched_nms(boxes, scores, groups, 0.5)
    assert keep.shape == scores.shape and count.shape == ()
    assert torch.equal(keep[:count], wanted) and (keep[count:] == -1).all() and count < len(keep)
    keep, count = nms_padded(boxes, scores, None, 0.5, impl=impl)
    assert torch.equal(keep[:count], nms(boxes, scores, 0.5, impl="torch"))
    for padded, plain in ((soft_nms_padded, soft_nms), (cl_nms_padded, cl_nms)):
        keep, new, count = padded(boxes, scores, groups, 0.5, impl=impl)
        assert torch.equal(keep[:count], plain(boxes, scores, groups, 0.5)[0])
        assert (keep[count:] == -1).all() and (new[count:] == 0).all()


def test_compiles_without_a_graph_break():
    def everything(boxes, scores, groups):
        keep = batched_nms(boxes, scores, groups, 0.5)
        padded, count = nms_padded(boxes, scores, groups, 0.5)
        soft, cl = soft_nms(boxes, scores, groups), cl_nms(boxes, scores, groups, 0.5)
        return boxes[keep] * 2, nms(boxes, scores, 0.5), padded, count, *soft, *cl

    tensors = big()[:3]
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for out, wanted in zip(compiled(*tensors), everything(*tensors), strict=True):
        assert torch.equal(out, wanted)


class Everything(torch.nn.Module):
    def forward(self, boxes, scores, groups):
        padded = nms_padded(boxes, scores, groups, 0.5)[0]
        soft = soft_nms(boxes, scores, groups, score_threshold=0.01)
        return padded, boxes[batched_nms(boxes, scores, groups, 0.5)], *soft


def test_the_number_of_boxes_is_not_specialised():
    tensors = big()[:3]
    size = torch.export.Dim("N", min=2, max=1000)
    shapes = dict.fromkeys(("boxes", "scores", "groups"), {0: size})
    exported = torch.export.export(Everything(), tensors, dynamic_shapes=shapes).module()
    for out, wanted in zip(exported(*tensors), Everything()(*tensors), strict=True):
        assert torch.equal(out, wanted)


def test_a_graph_without_boxes_and_with_a_varying_threshold():
    def kept(boxes, scores, floor):
        return boxes[nms(boxes, scores, 0.5)], soft_nms(boxes, scores, None, score_threshold=floor)

    boxes, scores, _, _ = big()
    options = {"fullgraph": True, "backend": "aot_eager"}
    for dynamic, rows in ((False, 0), (True, 9)):
        torch._dynamo.reset()
        compiled = torch.compile(kept, dynamic=dynamic, **options)
        for floor in (0.01, 0.02):
            part = boxes[:rows], scores[:rows], floor
            (found, out), (wanted, expected) = compiled(*part), kept(*part)
            assert torch.equal(found, wanted) and all(map(torch.equal, out, expected))


@pytest.mark.parametrize("method", METHODS)
def test_padded_asks_for_no_value(method, monkeypatch):
    """On tensors without values, any step that needs one, and would wait for a GPU, raises."""

    class NoKernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    monkeypatch.setattr(module, "_nms_kernel", NoKernel())
    monkeypatch.setattr(soft_cl_nms, "_soft_nms_kernel", NoKernel())
    monkeypatch.setattr(soft_cl_nms, "_cl_nms_kernel", NoKernel())
    tensors = big()[:3]
    with FakeTensorMode() as mode:
        boxes, scores, groups = (mode.from_tensor(t) for t in tensors)
        if method == "greedy":
            out = module._padded._init_fn(boxes, scores, groups, 0.5, "triton")
        else:
            padded = soft_cl_nms._padded._init_fn
            out = padded(boxes, scores, groups, 0.5, method, 0.001, "triton")
        *rows, count = out
        assert {r.shape for r in rows} == {scores.shape} and count.shape == ()
        with pytest.raises(DataDependentOutputException):  # the control
            int(count)


def test_candidates_of_real_images(detection_data):
    from kernels.bench_boxes import class_candidates, scenes

    boxes, scores, groups, images = class_candidates(scenes(2, str(detection_data)), 2000)
    for image in (0, 1):
        part = boxes[images == image], scores[images == image], groups[images == image]
        wanted = [
            torchvision.ops.nms(part[0][part[2] == c], part[1][part[2] == c], 0.5)
            for c in part[2].unique()
        ]
        keep = batched_nms(*part, 0.5)
        assert len(keep) == sum(map(len, wanted)) < 2000
        assert torch.equal(keep, batched_nms(*part, 0.5, impl="torch"))


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU to wait for")
def test_padded_does_not_wait_for_the_gpu():
    boxes, scores, groups = (t.cuda() for t in big()[:3])
    nms_padded(boxes, scores, groups, 0.5)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        nms_padded(boxes, scores, groups, 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
