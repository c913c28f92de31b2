"""NMS against pure Python, against torchvision, and all its implementations against one another."""

import importlib
import itertools
import math
import struct

import numpy as np
import pytest
import torch

from kernels import batched_nms, cl_nms, cl_nms_padded, nms, soft_nms

torchvision = pytest.importorskip("torchvision")
module = importlib.import_module("kernels.nms")  # `kernels.nms` itself is the function
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # its 0 / 0, in numpy
METHODS = ("greedy", "soft", "cl", "cl_literal")


@pytest.fixture(autouse=True)
def fused_multiply_add(monkeypatch):
    """Triton's interpreter rounds tl.fma once, as GPUs do and greedy NMS relies on.

    Up to Triton 3.8 it also rounds the product. In float64 the product of two float32 is exact.
    """
    if module.INTERPRETED:
        from triton.runtime import interpreter

        def create_fma(self, x, y, z):
            result = x.data.astype(np.float64) * y.data + z.data
            return interpreter.TensorHandle(result.astype(z.data.dtype), z.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)


# --- ten-line references --------------------------------------------------------------------------


def py_iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union if union else 0.0


def py_greedy(boxes, scores, threshold, rank=lambda score, i: (-score, i)):
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: rank(scores[i], i)):
        if not any(py_iou(boxes[i], boxes[k]) > threshold for k in kept):
            kept.append(i)
    return {i: scores[i] for i in kept}


def py_soft(boxes, scores, threshold, floor=1e-3):
    live, out = {i: s for i, s in enumerate(scores) if s >= floor}, {}
    while live:
        best = min(live, key=lambda i: (-live[i], i))
        out[best] = live.pop(best)
        for i in list(live):
            iou = py_iou(boxes[i], boxes[best])
            if iou > threshold:
                live[i] *= 1 - iou
            if live[i] < floor:
                del live[i]
    return out


def py_cl(boxes, scores, threshold, literal, weighted=True):
    live, out = dict(enumerate(scores)), {}
    while live:
        best = min(live, key=lambda i: (-live[i], i))
        cluster = [i for i in live if i == best or py_iou(boxes[i], boxes[best]) > threshold]
        use = weighted and scores[best] > 0
        weight = {i: scores[i] if use else 1.0 for i in cluster}
        centre = {
            i: ((boxes[i][0] + boxes[i][2]) / 2, (boxes[i][1] + boxes[i][3]) / 2) for i in live
        }
        mean = [
            sum(weight[i] * centre[i][a] for i in cluster) / sum(weight.values()) for a in (0, 1)
        ]
        low = [min(boxes[i][a] for i in cluster) for a in (0, 1)]
        high = [max(boxes[i][a] for i in cluster) for a in (2, 3)]
        far = {i: math.dist(centre[i], mean) / (math.dist(low, high) or math.inf) for i in cluster}
        select = {i: f32(scores[i] + (far[i] if literal else 1 - far[i])) for i in cluster}
        keep = min(cluster, key=lambda i: (-select[i], i))
        out[keep] = select[keep]
        live = {i: s for i, s in live.items() if i not in cluster}
    return out


def f32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def expected(method, boxes, scores, groups, threshold):
    """Kept indices and reported scores, by the references above, in the promised order."""
    rows, p, out = boxes.tolist(), scores.tolist(), {}
    for group in groups.unique().tolist():
        index = (groups == group).nonzero()[:, 0].tolist()
        part = [rows[i] for i in index], [p[i] for i in index], threshold
        if method == "greedy":
            found = py_greedy(*part)
        elif method == "soft":
            found = py_soft(*part)
        else:
            found = py_cl(*part, method == "cl_literal")
        out |= {index[i]: score for i, score in found.items()}
    key = out if method == "soft" else p
    keep = sorted(out, key=lambda i: (-key[i], i))
    return keep, [out[i] for i in keep]


def actual(method, boxes, scores, groups, threshold, impl):
    args = [t.to(DEVICE) for t in (boxes, scores, groups)]
    if method == "greedy":
        keep = batched_nms(*args, threshold, impl=impl)
        return keep.tolist(), scores.to(DEVICE)[keep].tolist()
    if method == "soft":
        keep, new = soft_nms(*args, threshold, impl=impl)
    else:
        options = {"literal": method == "cl_literal", "impl": impl}
        padded, new, count = cl_nms_padded(*args, threshold, **options)
        keep, new = padded[:count], new[:count]
        if impl == "torch":  # the public function's part: how it reads what is padded
            found, p = cl_nms(*args, threshold, **options)
            assert torch.equal(found, keep) and torch.equal(p, args[1][keep])
    return keep.tolist(), new.tolist()


def check(out, wanted):
    assert out[0] == wanted[0]
    assert out[1] == pytest.approx(wanted[1], rel=1e-5, abs=1e-6)


def random_case(seed, most=12, kind=None):
    """Small boxes: on a coarse grid with tied scores and duplicates, continuous, or degenerate."""
    g = torch.Generator().manual_seed(seed)
    n = int(torch.randint(0, most + 1, (), generator=g))
    kind = seed % 3 if kind is None else kind
    if kind == 1:
        corner, size = torch.rand((n, 2), generator=g) * 6, torch.rand((n, 2), generator=g) * 6
        scores = torch.rand(n, generator=g)
    else:
        corner = torch.randint(0, 5, (n, 2), generator=g).float()
        size = torch.randint(0 if kind == 2 else 1, 6, (n, 2), generator=g).float()
        scores = torch.randint(0, 6, (n,), generator=g).float() / 8
    groups = torch.randint(-1, 2, (n,), generator=g) * 10**12
    threshold = (0.0, 0.25, 0.5, 0.75, 1.0)[seed % 5]
    return torch.cat([corner, corner + size], 1), scores, groups, threshold


# --- tests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_torch_against_python(method):
    for seed in range(400):
        boxes, scores, groups, threshold = random_case(seed)
        if method == "soft":  # scores that tie in float64 need not in float32
            boxes, scores = boxes.double(), scores.double()
        case = boxes, scores, groups, threshold
        check(actual(method, *case, "torch"), expected(method, *case))


@pytest.mark.parametrize("impl", ["auto", "torchvision"])
def test_torchvision_against_python(impl):
    for seed in range(400):
        case = random_case(seed)
        check(actual("greedy", *case, impl), expected("greedy", *case))


@pytest.mark.parametrize("impl", ["torch", "torchvision", "triton"])
def test_rows_that_are_not_there_and_boxes_that_are_broken(impl):
    nan, inf = math.nan, math.inf
    box = [0.0, 0.0, 4.0, 4.0]
    boxes = torch.tensor([box, box, box, box, [nan, 0, 4, 4], [0, 0, inf, 4], [2, 2, 2, 2], box])
    scores = torch.tensor([nan, inf, -inf, 0.5, 0.9, 0.8, 0.7, 0.5])
    groups = torch.zeros(8, dtype=torch.int64)
    for method in METHODS if impl != "torchvision" else ("greedy",):
        keep, new = actual(method, boxes, scores, groups, 0.5, impl)
        assert set(keep) == {3, 4, 5, 6}, method  # 7 duplicates 3
        assert all(map(math.isfinite, new))
    empty = boxes[:0], scores[:0], groups[:0], 0.5
    none = torch.full_like(scores, -inf)
    for method in METHODS if impl != "torchvision" else ("greedy",):
        assert actual(method, *empty, impl) == ([], [])
        assert actual(method, boxes, none, groups, 0.5, impl) == ([], [])


def test_worked_by_hand():
    # IoU of the first two: 80 / 120 = 2/3. CL: centre x = (0.9*5 + 0.8*7 + 0.7*7) / 2.4 = 6.25.
    boxes = torch.tensor([[0.0, 0, 10, 10], [2, 0, 12, 10], [2, 0, 12, 10], [50, 0, 60, 10]])
    scores, groups = torch.tensor([0.9, 0.8, 0.7, 0.95]), torch.zeros(4, dtype=torch.int64)
    assert nms(boxes, scores, 0.5).tolist() == [3, 0]
    assert nms(boxes, scores, 0.7).tolist() == [3, 0, 1]
    keep, new = soft_nms(boxes, scores, groups, 0.5, score_threshold=0.1)
    assert keep.tolist() == [3, 0, 1]  # then 0.7 * (1/3) * 0 is dropped
    torch.testing.assert_close(new, torch.tensor([0.95, 0.9, 0.8 / 3]))
    diagonal = math.hypot(12, 10)
    keep, p = cl_nms(boxes, scores, groups, 0.5)
    assert keep.tolist() == [3, 0] and p.tolist() == scores[keep].tolist()
    new = cl_nms_padded(boxes, scores, groups, 0.5)[1][:2]
    torch.testing.assert_close(new, torch.tensor([1.95, 0.9 + 1 - 1.25 / diagonal]))
    keep, new = cl_nms(boxes, torch.tensor([0.82, 0.8, 0.79, 0.95]), groups, 0.5)
    assert keep.tolist() == [3, 1]  # near the others' centre beats a slightly higher p
    keep, _ = cl_nms(boxes, torch.tensor([0.82, 0.8, 0.79, 0.95]), groups, 0.5, literal=True)
    assert keep.tolist() == [3, 0]  # the farthest from the centre


def test_threshold_is_strict_and_the_same_everywhere():
    """IoU equal to the threshold suppresses nothing, also where float32 cannot hold it."""
    for overlap, impl in itertools.product((3, 5, 7), ("torch", "torchvision", "triton")):
        boxes = torch.tensor([[0.0, 0, 10, 1], [0, 0, overlap, 1]])  # IoU = overlap / 10
        case = boxes, torch.tensor([0.9, 0.8]), torch.zeros(2, dtype=torch.int64)
        thresholds = (overlap / 10 - 1e-6, overlap / 10, overlap / 10 + 1e-6)
        sizes = [len(actual("greedy", *case, t, impl)[0]) for t in thresholds]
        same = torchvision.ops.nms(*case[:2], overlap / 10)
        assert sizes == [1, len(same), 2]


def big():
    return random_case(11, most=60, kind=1)


def test_half_precision_and_arguments():
    boxes, scores, groups, _ = big()
    wanted = batched_nms(boxes.half().float(), scores.half().float(), groups, 0.5)
    assert torch.equal(batched_nms(boxes.half(), scores.half(), groups, 0.5), wanted)
    soft = soft_nms(boxes, scores, groups)
    assert all(map(torch.equal, soft, soft_nms(boxes, scores, groups, iou_threshold=0.5)))
    for bad in (
        lambda: nms(boxes[:, :3], scores, 0.5),
        lambda: nms(boxes, scores[1:], 0.5),
        lambda: nms(boxes.long(), scores, 0.5),
        lambda: nms(boxes, scores, 1.5),
        lambda: nms(boxes, scores, 0.5, impl="cuda"),
        lambda: batched_nms(boxes, scores, groups.float(), 0.5),
        lambda: nms(boxes, scores.sum(), 0.5),
        lambda: soft_nms(boxes, scores, groups, score_threshold=-math.inf),
        lambda: batched_nms(boxes, scores, groups[1:], 0.5),
        lambda: batched_nms(boxes.double(), scores, groups, 0.5, impl="triton"),
        lambda: soft_nms(boxes, scores, groups, score_threshold=math.nan),
        lambda: cl_nms(boxes, scores, groups, 0.5, impl="torchvision"),
    ):
        with pytest.raises(ValueError):
            bad()


def test_groups_of_any_integers():
    for impl in ("torch", "torchvision", "triton"):
        boxes, scores, groups, _ = random_case(11, most=12, kind=1)
        groups = groups // 10**12
        for method in METHODS if impl != "torchvision" else ("greedy",):
            other = actual(method, boxes, scores, groups.int(), 0.5, impl)
            assert other == actual(method, boxes, scores, groups, 0.5, impl)


def test_no_gradient_and_no_warning(recwarn):
    boxes, scores, groups, _ = big()
    boxes.requires_grad_(), scores.requires_grad_()
    for function in (batched_nms, soft_nms, cl_nms):
        out = function(boxes, scores, groups, 0.5)
        out = out if isinstance(out, tuple) else (out,)
        assert not any(t.requires_grad for t in out)
    assert not recwarn.list


def test_negative_controls():
    """What `check` must not let pass: nothing found, a flipped tie rule, >= for >, x/y swapped."""
    boxes = torch.tensor(
        [[0.0, 0, 4, 2], [0, 0, 4, 2], [3, 0, 5, 4], [0, 0, 8, 2], [9, 9, 9.5, 12]]
    )
    scores, groups = torch.tensor([0.5, 0.5, 0.4, 0.3, 0.1]), torch.zeros(5, dtype=torch.int64)
    rows, p = boxes.tolist(), scores.tolist()
    wanted = expected("greedy", boxes, scores, groups, 0.5)
    check(actual("greedy", boxes, scores, groups, 0.5, "auto"), wanted)
    flipped = py_greedy(rows, p, 0.5, rank=lambda score, i: (-score, -i))
    not_strict = py_greedy(rows, p, 0.5 - 1e-9)
    mixed = py_greedy([[x1, y2, x2, y1] for x1, y1, x2, y2 in rows], p, 0.5)
    for wrong in ({}, flipped, not_strict, mixed, dict.fromkeys(range(5), 0.0)):
        with pytest.raises(AssertionError):
            check((list(wrong), list(wrong.values())), wanted)


def test_negative_controls_of_cl_nms():
    """The distance added as it is, a centre that forgets the scores, the reference always kept."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [2, 0, 12, 10], [2, 1, 12, 11], [50, 0, 60, 10]])
    scores, groups = torch.tensor([0.82, 0.8, 0.7, 0.95]), torch.zeros(4, dtype=torch.int64)
    rows, p = boxes.tolist(), scores.tolist()
    wanted = expected("cl", boxes, scores, groups, 0.5)
    check(actual("cl", boxes, scores, groups, 0.5, "auto"), wanted)
    added, unweighted = py_cl(rows, p, 0.5, True), py_cl(rows, p, 0.5, False, weighted=False)
    reference = dict.fromkeys(py_greedy(rows, p, 0.5), 1.5)
    for wrong in ({}, added, unweighted, reference):
        with pytest.raises(AssertionError):
            check((list(wrong), list(wrong.values())), wanted)
