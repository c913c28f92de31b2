"""RoIAlign and deformable RoI pooling: every implementation against float64 and torchvision.

Without a GPU the Triton kernels run in Triton's interpreter (conftest.py sets it), which is slow:
maps are small. test_gpu_code.py compiles them for GPUs.
"""

import importlib
from itertools import product

import pytest
import torch
import torchvision

from kernels import batched_nms, deform_roi_pool, roi_align

bench = pytest.importorskip("kernels.bench")  # needs torchvision
module = importlib.import_module("kernels.roi_align")  # `kernels.roi_align` itself is the function
triton = pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # its inf * 0, in numpy
STRIDES = (8, 16, 32)
EPS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_maps(C=4, dtype=torch.float32, layout="nchw", strides=STRIDES, image=(40, 56), batch=2):
    maps = [torch.randn(batch, C, -(-image[0] // s), -(-image[1] // s)) for s in strides]
    return [f.to(DEVICE, dtype, memory_format=LAYOUTS[layout]).requires_grad_() for f in maps]


def make_rois(R, image=(40, 56), batch=2):
    """Boxes from 4 to 490 px, for every level, some over the image's edge, some outside it."""
    height, width = image
    centre = torch.rand(R, 2) * torch.tensor([width, height]) * 1.3 - 10
    aspect = torch.exp(torch.rand(R) - 0.5)
    half = torch.exp(torch.linspace(1.5, 6.2, R))[:, None] / 2
    half = half * torch.stack([aspect, 1 / aspect], 1)
    index = torch.randint(batch, (R, 1)).float()
    return torch.cat([index, centre - half, centre + half], 1).to(DEVICE)


def run(impl, maps, rois, offsets=None, size=3, strides=STRIDES, samples=2, deform=False):
    """Result and gradients (of the maps, then of the offsets) of one implementation."""
    options = (size, strides, samples)
    if impl == "torchvision":
        out = bench.roi_align_torchvision(maps, rois, *options)
    elif deform:
        out = deform_roi_pool(maps, rois, offsets, *options, impl=impl)
    else:
        out = roi_align(maps, rois, *options, impl=impl)
    inputs = maps if offsets is None else [*maps, offsets]
    weight = torch.linspace(-1, 2, out.numel(), device=DEVICE).view_as(out).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, inputs, weight)


def exact(maps, rois, offsets=None, **options):
    """The reference in float64, at the very values that the maps have."""
    maps = [f.detach().double().requires_grad_() for f in maps]
    offsets = None if offsets is None else offsets.detach().double().requires_grad_()
    return run("torch", maps, rois.double(), offsets, **options)


def check(results, expected, rivals=None, dtype=torch.float32):
    """Largest error at most twice that of torch at the same dtype, plus eps, both relative to the
    largest value."""
    for i, (result, truth) in enumerate(zip(results, expected, strict=True)):
        assert result.shape == truth.shape
        scale = truth.abs().max().clamp(min=1e-3)
        error = (result.double() - truth).abs().max() / scale
        allowed = (rivals[i].double() - truth).abs().max() / scale if rivals else 0
        assert error <= 2 * allowed + EPS[dtype], (i, error, allowed)


@pytest.mark.parametrize(
    "deform, dtype, layout",  # two of the three in all combinations
    [
        (False, torch.float32, "nchw"),
        (False, torch.float16, "channels_last"),
        (False, torch.bfloat16, "nchw"),
        (True, torch.float32, "channels_last"),
        (True, torch.float16, "nchw"),
        (True, torch.bfloat16, "channels_last"),
    ],
)
def test_triton_equals_float64(layout, dtype, deform):
    maps = make_maps(C=16, dtype=dtype, layout=layout)
    rois = make_rois(3)
    offsets = torch.randn(3, 2, 3, 3, device=DEVICE).requires_grad_() if deform else None
    options = {"deform": deform}
    result = run("triton", maps, rois, offsets, **options)
    rival = run("torch", maps, rois, offsets, **options)
    check(result, exact(maps, rois, offsets, **options), rival, dtype)
    assert all(tensor.dtype == dtype for tensor in result[: 1 + len(maps)])
    assert result[0].is_contiguous(memory_format=LAYOUTS[layout])


def test_several_tiles_of_bins_and_channels(monkeypatch):
    """9 bins in blocks of 8, 5 channels in chunks of 4: neither divides the other."""
    tile = dict(C=5, BINS=8, CH=4, num_warps=4)
    monkeypatch.setattr(module, "_tile", lambda R, C, size: ((R * 2 * 2,), tile))
    maps, rois = make_maps(C=5, strides=(16, 32)), make_rois(2)
    offsets = torch.randn(2, 2, 3, 3, device=DEVICE).requires_grad_()
    options = {"deform": True, "strides": (16, 32), "samples": 1}
    check(run("triton", maps, rois, offsets, **options), exact(maps, rois, offsets, **options))


@pytest.mark.parametrize("trial", range(6))
def test_random_shapes(trial):
    torch.manual_seed(trial)
    C, R, size, samples, levels, batch = (int(torch.randint(1, n, ())) for n in (6, 5, 5, 4, 6, 4))
    strides = tuple(2 ** (i + 2) for i in range(levels))
    image = tuple(torch.randint(1, 40, (2,)).tolist())
    # Channels sliced from a larger map: memory that is dense in no layout.
    maps = [f[:, :C] for f in make_maps(C + trial % 2, strides=strides, image=image, batch=batch)]
    rois, deform = make_rois(R, image, batch), trial % 3 > 0
    offsets = torch.randn(R, 2, size, size).to(DEVICE).requires_grad_() if trial % 3 == 2 else None
    options = dict(size=size, strides=strides, samples=samples, deform=deform)
    check(run("triton", maps, rois, offsets, **options), exact(maps, rois, offsets, **options))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_torchvision_agrees(layout):
    pytest.importorskip("torchvision")
    maps, rois = make_maps(C=5, layout=layout), make_rois(60)
    for size, samples in ((7, 2), (2, 3), (1, 1)):
        options = {"size": size, "samples": samples}
        second = run("torchvision", maps, rois, **options)
        check(run("torch", maps, rois, **options), [t.double() for t in second])


def test_negative_controls():
    """The check refuses zeros, a shift by half a cell, and exchanged axes."""
    maps, rois = make_maps(), make_rois(8)
    truth = exact(maps, rois)
    check(run("torch", maps, rois), truth)
    half = torch.tensor([0, 4, 4, 4, 4.0], device=DEVICE)
    wrong = {
        "zeros": [torch.zeros_like(t) for t in truth],
        "shift": run("torch", maps, rois + half),
        "axes": [truth[0].transpose(2, 3), *truth[1:]],
        "gradient": [truth[0], *(0 * t for t in truth[1:])],
    }
    for name, result in wrong.items():
        with pytest.raises(AssertionError):
            check(result, truth)
            pytest.fail(f"{name} passed")


def test_by_hand():
    """A plane x + 10 y pools to its value at the bins' centres; levels change at 112 and 224 px."""
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    plane = (x + 10 * y)[None, None].to(DEVICE)
    roi = torch.tensor([[0, 8.0, 16.0, 40.0, 32.0]], device=DEVICE)  # cells 1..5 by 2..4
    truth = torch.tensor([[[[21.5, 23.5], [31.5, 33.5]]]], device=DEVICE)
    for impl in ("torch", "triton"):
        for pool in (roi_align, lambda f, r, *a, **k: deform_roi_pool(f, r, None, *a, **k)):
            assert torch.allclose(pool([plane], roi, 2, (8,), impl=impl), truth)
        # A tenth of dx = 1/4, dy = -1/2 of a box of 4 x 2 cells: 0.1 right, 0.1 up.
        offsets = torch.tensor([0.25, -0.5], device=DEVICE).view(1, 2, 1, 1).expand(1, 2, 2, 2)
        moved = deform_roi_pool([plane], roi, offsets, 2, (8,), impl=impl)
        assert torch.allclose(moved, truth + 0.1 - 1.0)
    sides = torch.tensor([1, 111.9, 112, 223.9, 224, 448, 5000.0, 0.0, -3.0])
    rois = torch.stack([0 * sides, 0 * sides, 0 * sides, sides, sides], 1)
    assert module.roi_level(rois, (4, 8, 16, 32)).tolist() == [0, 0, 1, 1, 2, 3, 3, 0, 0]
    assert module.roi_level(rois, (16, 32)).tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0]


def bilinear(cells, y, x):
    """The value of a map, a list of rows, at a point inside it."""
    i, j = min(int(y), len(cells) - 2), min(int(x), len(cells[0]) - 2)
    upper, lower = (row[j] + (x - j) * (row[j + 1] - row[j]) for row in cells[i : i + 2])
    return upper + (y - i) * (lower - upper)


def slow_bin(cells, box, row, column, size, samples, margin):
    """The mean of one bin's samples, one at a time; `box` in cells, `margin` as in the contract."""
    (x1, y1, x2, y2), values, steps = box, [], size * samples
    for i, j in product(range(samples), range(samples)):
        y = y1 - 0.5 + (y2 - y1) * (row * samples + i + 0.5) / steps
        x = x1 - 0.5 + (x2 - x1) * (column * samples + j + 0.5) / steps
        last = len(cells) - 1, len(cells[0]) - 1
        if all(-margin <= v <= end + margin for v, end in zip((y, x), last)):
            values.append(bilinear(cells, *(min(max(v, 0), end) for v, end in zip((y, x), last))))
    return sum(values) / (max(1, len(values)) if margin == 0.5 else samples**2)


@pytest.mark.parametrize("samples", [1, 2, 3, 5])
def test_float64_is_exact(samples):
    (cells,), rois, size = make_maps(1, torch.float64, strides=(8,)), make_rois(6).double(), 2
    pools = {1.0: roi_align, 0.5: lambda f, r, *a, **k: deform_roi_pool(f, r, None, *a, **k)}
    for margin, pool in pools.items():
        out = pool([cells], rois, size, (8,), samples, impl="torch")
        for r, row, column in product(range(len(rois)), range(size), range(size)):
            image, *box = rois[r].tolist()
            place = [v / 8 for v in box], row, column, size, samples, margin
            truth = slow_bin(cells[int(image), 0].tolist(), *place)
            assert abs(out[r, 0, row, column].item() - truth) < 1e-12


def test_degenerate_input():
    nan, inf = float("nan"), float("inf")
    boxes = [[0, 5, 5, 5, 5], [1, 30, 20, 10, 10], [0, -500, -500, -400, -400]]
    boxes += [[0, 900, 0, 990, 50], [-1, 0, 0, 50, 50], [2, 0, 0, 50, 50], [0, nan, 0, 9, 9]]
    boxes += [[nan, 0, 0, 9, 9], [0, 0, 0, inf, 9], [0, -3, -3, 3, 3]]
    rois = torch.tensor(boxes, device=DEVICE)
    shift = torch.randn(len(rois), 2, 2, 2, device=DEVICE).requires_grad_()
    cases = ((40, 56), shift, 2), ((40, 56), None, 1), ((1, 1), shift, 1)  # maps of size 1
    for image, offsets, samples in cases:
        maps, options = make_maps(C=1, image=image), {"size": 2, "samples": samples}
        options["deform"] = offsets is not None
        truth = exact(maps, rois, offsets, **options)
        check(run("triton", maps, rois, offsets, **options), truth)
        check(run("torch", maps, rois, offsets, **options), truth)
        assert not truth[0][2:9].any() and all(t.isfinite().all() for t in truth)
    # A deformable bin without a sample inside is zero; with some, their mean: the last box reaches
    # over the corner, so that its first row and column lie outside and half of its middle ones.
    ones = [torch.ones_like(f) for f in make_maps()]
    truth = torch.ones(1, 4, 3, 3, device=DEVICE)
    truth[..., 0] = truth[..., 0, :] = 0
    for impl in ("torch", "triton"):
        out = deform_roi_pool(ones, rois[-1:], None, 3, STRIDES, impl=impl)
        assert torch.equal(out, truth)
    for impl in ("torch", "triton"):
        maps, offsets = make_maps(), torch.zeros(0, 2, 3, 3, device=DEVICE).requires_grad_()
        out, *grads = run(impl, maps, rois[:0], offsets, deform=True)
        assert out.shape == (0, 4, 3, 3) and not any(g.any() for g in grads)


def test_gradcheck_reference():
    maps = [f.detach().double().requires_grad_() for f in make_maps(C=2, strides=(16, 32))]
    rois, offsets = make_rois(3).double(), torch.randn(3, 2, 2, 2, device=DEVICE).double()

    def align(*maps):
        return module.pool_reference(maps, rois, None, 2, (16, 32), skip=False)

    def deform(offsets, *maps):
        return module.pool_reference(maps, rois, offsets, 2, (16, 32))

    assert torch.autograd.gradcheck(align, maps)
    assert torch.autograd.gradcheck(deform, (offsets.requires_grad_(), *maps))


def test_backward_repeats_bit_for_bit():
    maps, rois = make_maps(3, layout="channels_last", strides=(16, 32)), make_rois(4)
    offsets = torch.randn(4, 2, 2, 2, device=DEVICE).requires_grad_()
    options = {"strides": (16, 32), "size": 2, "deform": True}
    first, second = (run("triton", maps, rois, offsets, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    check(first, exact(maps, rois, offsets, **options))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_not_aligned_is_torchvisions_default(impl):
    """MultiScaleRoIAlign, whose grid lies half a cell away and whose boxes are a cell at least."""
    maps, rois = make_maps(C=2, image=(64, 64)), make_rois(12, (64, 64))[3:]
    rois = torch.cat([rois, torch.tensor([[1, 30, 20, 31, 22.0]], device=DEVICE)])
    per_image = [rois[rois[:, 0] == i, 1:] for i in (0, 1)]
    order = torch.cat([(rois[:, 0] == i).nonzero()[:, 0] for i in (0, 1)])
    # Maps of a square image, so that it infers the strides of both axes.
    pool = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2"], 3, 2)
    named = {str(i): f.detach() for i, f in enumerate(maps)}
    truth = torch.empty(len(rois), 2, 3, 3, device=DEVICE)
    truth[order] = pool(named, per_image, [(64, 64)] * 2)
    out = roi_align(maps, rois, 3, STRIDES, impl=impl, aligned=False)
    check([out.detach()], [truth.double()])
    out = roi_align(maps, per_image, 3, STRIDES, impl=impl, aligned=False)
    check([out.detach()], [truth[order].double()])
    with pytest.raises(AssertionError):
        check([roi_align(maps, rois, 3, STRIDES, impl=impl)], [truth.double()])


def test_sizes_and_rois_in_other_forms():
    maps, rois = make_maps(C=1), make_rois(6)
    rois = rois[rois[:, 0].argsort(stable=True)]
    wanted = roi_align(maps, rois, 2, STRIDES)
    assert torch.equal(roi_align(maps, rois, (2, 2), STRIDES), wanted)
    assert torch.equal(roi_align(maps, rois, [2, 2], [8.0, 16.0, 32.0], 2.0), wanted)
    per_image = [rois[rois[:, 0] == i, 1:] for i in (0, 1)]
    for pool in (roi_align, lambda f, r, *a: deform_roi_pool(f, r, None, *a)):
        assert torch.equal(pool(maps, per_image, 2, STRIDES), pool(maps, rois, 2, STRIDES))
    assert roi_align(maps, [rois[:0, 1:]] * 2, 2, STRIDES).shape == (0, 1, 2, 2)
    for name, bad in {
        "strides": lambda: roi_align(maps, rois, 2, (1 / 8, 1 / 16, 1 / 32)),
        "strides must increase": lambda: roi_align(maps, rois, 2, (8, 32, 16)),
        "strides need": lambda: roi_align(maps, rois, 2, (8, 16)),
        "features": lambda: roi_align(dict(enumerate(maps)), rois, 2, STRIDES),
        "output_size": lambda: roi_align(maps, rois, (2, 3), STRIDES),
        "must be whole": lambda: roi_align(maps, rois, "2", STRIDES),
        "sampling_ratio": lambda: roi_align(maps, rois, 2, STRIDES, 0.5),
        "one an image": lambda: roi_align(maps, per_image[:1], 2, STRIDES),
        "tensors .Ri, 4.": lambda: roi_align(maps, [rois, rois], 2, STRIDES),
        "rois must be floating": lambda: roi_align(maps, rois.long(), 2, STRIDES),
        "offsets": lambda: deform_roi_pool(maps, rois, rois, 2, STRIDES),
        "impl": lambda: roi_align(maps, rois, 2, STRIDES, impl="torchvision"),
        "one device": lambda: roi_align(maps, rois.to("meta"), 2, STRIDES),
    }.items():
        with pytest.raises(ValueError, match=name):
            bad()


class Pooled(torch.nn.Module):
    def forward(self, maps, rois):
        return roi_align(maps, rois, 2, STRIDES, impl="triton")


class Chain(torch.nn.Module):
    """A number of RoIs that depends on the data: NMS, then pooling."""

    def forward(self, maps, boxes, scores, groups):
        boxes = boxes[batched_nms(boxes, scores, groups, 0.5)]
        return Pooled()(maps, torch.cat([torch.zeros_like(boxes[:, :1]), boxes], 1))


def test_the_number_of_rois_is_not_specialised():
    maps, rois = [f.detach() for f in make_maps(C=1)], make_rois(6)
    size = torch.export.Dim("R", min=2, max=1000)
    shapes = {"maps": [{}] * 3, "rois": {0: size}}
    exported = torch.export.export(Pooled(), (maps, rois), dynamic_shapes=shapes).module()
    assert torch.equal(exported(maps, rois[:3]), Pooled()(maps, rois[:3]))
    groups = torch.zeros(6, dtype=torch.int32, device=DEVICE)
    inputs = maps, rois[:, 1:], torch.rand(6, device=DEVICE), groups
    compiled = torch.compile(Chain(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), Chain()(*inputs))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_double_backward_raises(impl):
    maps, rois = make_maps(C=1), make_rois(2)
    offsets = torch.zeros(2, 2, 1, 1, device=DEVICE).requires_grad_()
    for out, inputs in (
        (roi_align(maps, rois, 1, STRIDES, impl=impl), maps),
        (deform_roi_pool(maps, rois, offsets, 1, STRIDES, impl=impl), [*maps, offsets]),
    ):
        grads = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        with pytest.raises(RuntimeError, match="backward|derivative|differentiate"):
            torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)


@pytest.mark.parametrize("deform, impl", [(False, "triton"), (True, "triton"), (True, "auto")])
def test_compiles_without_graph_break(impl, deform):
    maps, rois = make_maps(C=2, layout="channels_last"), make_rois(4)
    offsets = torch.randn(4, 2, 3, 3, device=DEVICE).requires_grad_() if deform else None

    def pool(*maps):
        if offsets is None:
            return roi_align(maps, rois, 3, STRIDES, impl=impl)
        return deform_roi_pool(maps, rois, offsets, 3, STRIDES, impl=impl)

    out = torch.compile(pool, fullgraph=True, backend="aot_eager")(*maps)
    inputs = maps if offsets is None else [*maps, offsets]
    weight = torch.linspace(-1, 2, out.numel(), device=DEVICE).view_as(out)
    grads = torch.autograd.grad(out, inputs, weight)
    check([out, *grads], exact(maps, rois, offsets, deform=deform))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_autocast(impl):
    """Under autocast the boxes stay float32 and the result has the maps' dtype."""
    maps, rois = make_maps(C=1, dtype=torch.bfloat16), make_rois(3) + 0.123
    plain = run(impl, maps, rois, size=2)
    with torch.autocast(DEVICE, torch.bfloat16):
        for a, b in zip(run(impl, maps, rois, size=2), plain, strict=True):
            assert a.dtype == torch.bfloat16
            assert torch.equal(a, b)
