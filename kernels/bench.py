"""Check every op against its reference, then time it: `python -m kernels.bench`.

bench_boxes.py makes the boxes. Times are milliseconds: by events on a GPU, whose L2 cache is
emptied before each call, by the clock on a CPU. `copy` is the share of a plain copy's
bandwidth in the same run. `ratio` is the median time of the op named under `against` divided
by ours, so a number below 1 is a loss. `wall` is the clock time from a call to its return,
without waiting for the GPU: what Python costs.
"""

import argparse
import importlib
import io
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from .bench_boxes import class_candidates, proposals, rpn_candidates, scenes
from .dense_decode import decode_dense_offsets, decode_dense_reference
from .focal_loss import focal_loss, focal_loss_reference
from .nms import batched_nms, nms, nms_padded
from .roi_align import deform_roi_pool, roi_align, roi_level
from .soft_cl_nms import cl_nms, soft_nms

# In the package, the name roi_align is the function.
roi_module = importlib.import_module(".roi_align", __package__)


def mismatch(out, expected) -> str:
    """What differs between two results, each a tensor or a tuple of them; '' if nothing.

    Whole numbers must be equal, unless scores come with them: then two boxes whose scores
    differ in the last bit may change places, and only the scores are compared.
    """
    if isinstance(out, Tensor):
        out, expected = (out,), (expected,)
    for a, b in zip(out, expected, strict=True):
        if a.shape != b.shape:
            return f"shape {[*a.shape]}, expected {[*b.shape]}"
        if not a.is_floating_point():
            if not any(t.is_floating_point() for t in out) and not torch.equal(a, b):
                return f"{int((a != b).sum())} of {a.numel()} indices differ"
            continue
        half = torch.float16 in (a.dtype, b.dtype) or torch.bfloat16 in (a.dtype, b.dtype)
        a, b = a.double(), b.double()
        error = ((a - b).norm() / b.norm().clamp(min=1e-30)).item() if a.numel() else 0.0
        if not error < (1e-2 if half else 1e-4):  # NaN fails
            return f"relative error {error:.1e}"
    return ""


def times_ms(run, device: torch.device, seconds: float) -> list[float]:
    """p20, p50 and p80 over as many calls as fit in `seconds`, five at least."""
    run()
    samples: list[float] = []
    stop = time.perf_counter() + seconds
    if device.type == "cuda":
        flush = torch.empty(256 << 20, dtype=torch.int8, device=device)
        run()
    while len(samples) < 5 or (time.perf_counter() < stop and len(samples) < 1000):
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(2_000_000)  # about 1 ms, in which Python launches what follows
            first.record()
            run()
            last.record()
            last.synchronize()
            samples.append(first.elapsed_time(last))
        else:
            begin = time.perf_counter()
            run()
            samples.append(1e3 * (time.perf_counter() - begin))
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return [cuts[1], cuts[4], cuts[7]]


def wall_ms(run, device: torch.device, calls: int = 5) -> float:
    """Median time from a call to its return, which on a GPU is what the host spends."""
    samples = []
    for _ in range(calls):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        run()
        samples.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(samples)


def copy_bandwidth(device: torch.device, seconds: float) -> float:
    """GB/s of copying one large tensor to another, bytes read plus bytes written."""
    size = (1 << 30) if device.type == "cuda" else (64 << 20)
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / 1e6 / times_ms(lambda: target.copy_(source), device, seconds)[1]


@dataclass
class Case:
    name: str
    run: Callable
    reference: Callable | None = None  # its result, a tensor or a tuple, must equal run's
    baseline: Callable | None = None  # its time is compared with run's
    against: str = "torchvision"  # the baseline's name
    bytes: int = 0  # the least that must move, 0 if not counted


def nms_cases(device: torch.device, sets: dict) -> Iterator[Case]:
    """`sets` maps a name to (boxes [N, 4], scores [N], groups [N], images [N]).

    torchvision is called once for each image, as its users do. On a CPU, soft_nms and cl_nms
    are their references, so nothing is compared with them.
    """
    for name, tensors in sets.items():
        boxes, scores, groups, images = (t.to(device) for t in tensors)
        parts = [images == i for i in images.unique().tolist()]
        parts = [(boxes[part], scores[part], groups[part]) for part in parts]

        def per_image(parts=parts):
            return [torchvision.ops.batched_nms(*part, 0.5) for part in parts]

        for function in (batched_nms, nms_padded, soft_nms, cl_nms):
            run = partial(function, boxes, scores, groups, 0.5)
            reference = partial(run, impl="torch")
            case = Case(f"{function.__name__} {name}", run)
            if function in (batched_nms, nms_padded):
                case.reference, case.baseline = reference, per_image
            elif boxes.is_cuda:
                case.reference, case.baseline, case.against = reference, reference, "torch"
            yield case
        one_boxes, one_scores, _ = parts[0]
        one = partial(nms, one_boxes, one_scores, 0.5)
        vision = partial(torchvision.ops.nms, one_boxes, one_scores, 0.5)
        for impl in ("auto", "triton") if boxes.is_cuda else ("auto",):
            title = f"nms, one group of {len(one_boxes)}, {impl}"
            yield Case(title, partial(one, impl=impl), partial(one, impl="torch"), vision)


def decode_cases(device: torch.device, rois: Tensor) -> Iterator[Case]:
    """On proposals rois [R, 5]. As a trained head's, the offsets reach the proposal's sides,
    with noise, and the logits are positive in the middle of the box."""
    generator = torch.Generator().manual_seed(0)
    bins = (torch.arange(7) + 0.5) / 7
    side = bins.expand(7, 7)
    exact = torch.stack([side, side.T, 1 - side, 1 - side.T])  # [4, 7, 7]: the proposal
    middle = 0.4 - torch.maximum((side - 0.5).abs(), (side.T - 0.5).abs())  # [7, 7]
    for R in (1000, 200_000) if device.type == "cuda" else (1000,):
        proposals = rois[torch.arange(R) % len(rois), 1:].to(device)
        noise = torch.randn((R, 4, 7, 7), generator=generator)
        offsets = (exact + 0.1 * noise).relu().to(device)
        noise = torch.randn((R, 1, 7, 7), generator=generator)
        logits = (10 * middle + noise).to(device)
        for dtype in (torch.float32, torch.bfloat16):
            args = (proposals, offsets.to(dtype), logits.to(dtype), (800, 1333))
            run = partial(decode_dense_offsets, *args)
            eager = partial(run, impl="torch")

            def reference(args=args):
                return decode_dense_reference(*(a.double() for a in args[:3]), args[3]).float()

            yield Case(
                f"decode_dense_offsets {R} x 7x7 {str(dtype)[6:]}",
                run,
                reference,
                baseline=eager if device.type == "cuda" else None,  # on a CPU, run is eager
                against="torch",
                bytes=sum(a.numel() * a.element_size() for a in args[:3]) + R * 16,
            )


def focal_cases(device: torch.device) -> Iterator[Case]:
    """Loss and gradient for the anchors of 800 x 1333 images and 80 classes. torchvision's
    loss takes one-hot targets."""
    generator = torch.Generator().manual_seed(0)
    K = 80
    for M in (20_000, 400_000) if device.type == "cuda" else (20_000,):
        scores = torch.randn((M, K), generator=generator) - 4.6  # a head's prior, p = 0.01
        labels = torch.randint(K, (M,), generator=generator)
        labels = torch.where(torch.rand(M, generator=generator) < 0.99, K, labels).to(device)
        dtypes = (torch.float32, torch.bfloat16)
        for dtype in dtypes if device.type == "cuda" else dtypes[:1]:
            logits = scores.to(device, dtype).requires_grad_()

            def ours(function=focal_loss, logits=logits, labels=labels):
                loss = function(logits, labels)
                return loss.detach(), *torch.autograd.grad(loss.sum(), logits)

            def reference(logits=logits, run=ours):
                return run(focal_loss_reference, logits.detach().double().requires_grad_())

            def one_hot(logits=logits, labels=labels):
                target = torch.nn.functional.one_hot(labels, K + 1)[:, :K].to(logits.dtype)
                loss = torchvision.ops.sigmoid_focal_loss(logits, target).sum(1)
                return torch.autograd.grad(loss.sum(), logits)

            yield Case(
                f"focal_loss and gradient {M} x {K} {str(dtype)[6:]}",
                ours,
                reference,
                one_hot,
                # Logits are read, the slope is written and read, the gradient is written.
                bytes=4 * logits.numel() * logits.element_size(),
            )


def roi_align_torchvision(maps, rois, size, strides, sampling_ratio=2) -> Tensor:
    """roi_align by torchvision's operator, one level at a time like its MultiScaleRoIAlign."""
    # The operator refuses bfloat16 and would round the boxes to the maps' dtype.
    dtype = torch.promote_types(maps[0].dtype, torch.float32)
    level = roi_level(rois, strides)
    out = maps[0].new_zeros(len(rois), maps[0].shape[1], size, size)
    for i, (f, stride) in enumerate(zip(maps, strides)):
        here = (level == i).nonzero().squeeze(1)
        pooled = torchvision.ops.roi_align(
            f.to(dtype), rois[here].to(dtype), size, 1 / stride, sampling_ratio, aligned=True
        )
        out[here] = pooled.to(out.dtype)
    return out


def roi_cases(device: torch.device, rois: Tensor) -> Iterator[Case]:
    """Forward and backward over P2..P5 (256 channels) of two 800 x 1333 images.

    `rois` [R, 5] are at least 1000. The deformable op is compared with roi_align. The bytes
    that must move are each cell that is touched, and the result, once.
    """
    layouts = [("NCHW fp32", torch.float32, torch.contiguous_format)]
    if device.type == "cuda":
        # bfloat16 makes torchvision convert all maps on each call; float16 does not.
        layouts.append(("NCHW bf16", torch.bfloat16, torch.contiguous_format))
        layouts.append(("channels_last bf16", torch.bfloat16, torch.channels_last))
        layouts.append(("channels_last fp16", torch.float16, torch.channels_last))
    strides, C = (4, 8, 16, 32), 256
    for (layout, dtype, memory_format), (R, S) in product(layouts, ((1000, 7), (512, 14))):
        generator = torch.Generator(device).manual_seed(0)
        randn = partial(torch.randn, generator=generator, device=device)
        maps = [randn(2, C, -(-800 // s), -(-1333 // s)) for s in strides]
        maps = [f.to(dtype, memory_format=memory_format).requires_grad_() for f in maps]
        shift = randn(R, 2, S, S).requires_grad_()
        grad = randn(R, C, S, S).to(dtype, memory_format=memory_format)
        boxes = rois[torch.linspace(0, len(rois) - 1, R).long()].to(device)  # of both images
        align = partial(roi_align, maps, boxes, S, strides, 2)
        vision = partial(roi_align_torchvision, maps, boxes, S, strides, 2)
        deform = partial(deform_roi_pool, maps, boxes, shift, S, strides, 2)
        size = f"{R}x{C}x{S}x{S} {layout}"
        name = f"roi_align {size}"
        ours = _forward_and_backward(name, align, maps, boxes, None, strides, grad)
        for case, pool in zip(ours, _runs(vision, maps, grad)):
            case.baseline = pool
            yield case
        name = f"deform_roi_pool {size}"
        ours = _forward_and_backward(name, deform, maps, boxes, shift, strides, grad)
        for case, pool in zip(ours, _runs(align, maps, grad)):
            case.baseline, case.against = pool, "roi_align"
            yield case


def _runs(pool, inputs, grad) -> tuple[Callable, Callable]:
    """The forward without a graph, and the backward alone."""
    graph: list[Tensor] = []  # built at the first call; the others time only the backward

    def backward() -> tuple[Tensor, ...]:
        if not graph:
            graph.append(pool())
        out = graph[0]
        return torch.autograd.grad(out, inputs, grad.to(out.dtype), retain_graph=True)

    return torch.no_grad()(pool), backward


def _forward_and_backward(name, pool, maps, boxes, shift, strides, grad) -> list[Case]:
    """Both cases of one op, without their baselines. `shift` is None for roi_align."""
    S = grad.shape[-1]
    exact = [f.detach().double().requires_grad_() for f in maps]
    exact_shift = None if shift is None else shift.detach().double().requires_grad_()
    geometry = (exact, boxes, exact_shift, S, strides, 2, 0.1, shift is not None)
    reference = partial(roi_module.pool_reference, *geometry)
    rows = roi_module._taps(*geometry)[0].unique().numel()
    element = maps[0].element_size()
    touched, pooled = rows * maps[0].shape[1] * element, grad.numel() * element
    written = sum(f.numel() for f in maps) * element
    if shift is None:
        forward, backward = _runs(pool, maps, grad)
        exact_forward, truth = _runs(reference, exact, grad)
    else:
        forward, backward = _runs(pool, [*maps, shift], grad)
        exact_forward, exact_backward = _runs(reference, [*exact, exact_shift], grad)
        written += touched  # read, for the gradient of the offsets

        def truth() -> tuple[Tensor, ...]:
            # The gradient of an offset jumps where a sample crosses into another cell, and
            # float32 puts a few samples on the other side: so compare it as 16 bits.
            *map_grads, shift_grad = exact_backward()
            return *map_grads, shift_grad.bfloat16()

    return [
        Case(f"{name} forward", forward, exact_forward, bytes=touched + pooled),
        Case(f"{name} backward", backward, truth, bytes=written + pooled),
    ]


def cases(device: torch.device) -> Iterator[Case]:
    """The cases of all ops, on boxes of the same scenes."""
    gts = scenes(8)
    big = (1000, 5000, 20_000) if device.type == "cuda" else (1000, 5000)
    sets = {"2 images x 5 RPN levels": rpn_candidates(gts[:2])}
    sets |= {f"8 images x 80 classes, {n} each": class_candidates(gts, n) for n in big}
    rois = proposals(gts[:2])
    yield from roi_cases(device, rois.to(device))  # first: they take most of a step
    yield from nms_cases(device, sets)
    yield from decode_cases(device, rois)
    yield from focal_cases(device)


def run_case(case: Case, device: torch.device, seconds: float, copy: float) -> dict:
    """Check one case and time it; returns its row of the table."""
    row: dict[str, Any] = {"name": case.name, "check": "no reference"}
    if case.reference is not None:
        row["check"] = mismatch(case.run(), case.reference()) or "ok"
    if device.type == "cuda":
        case.run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case.run()
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    row["p20"], row["p50"], row["p80"] = times_ms(case.run, device, seconds)
    row["wall"] = wall_ms(case.run, device)
    if case.bytes:
        row["gb_s"] = case.bytes / 1e6 / row["p50"]
        row["copy"] = row["gb_s"] / copy
    if case.baseline is not None:
        row["ratio"] = times_ms(case.baseline, device, seconds)[1] / row["p50"]
        row["against"] = case.against
    return row


def pick_device(name: str) -> torch.device:
    """The device named "auto", "cpu", "cuda" or "cuda:1"; a GPU becomes the current one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":  # events and memory counts belong to the current device
        torch.cuda.set_device(device.index or 0)
    return device


def main(argv: list[str] | None = None) -> int:
    """Print the table; return the number of ops that did not match their reference."""
    parser = argparse.ArgumentParser("kernels.bench", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--lines", type=Path, help="also write a line of JSON for each op there")
    add("--device", default="auto", help="auto: cuda if there is one, else cpu")
    add("--seconds", type=float, default=0.5, help="time for each op and baseline")
    add("--only", default="", help="run the cases whose name contains this")
    config = parser.parse_args(argv)
    device = pick_device(config.device)
    info: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    if device.type == "cuda":
        info["device"] = torch.cuda.get_device_name(device)
        info["triton"] = __import__("triton").__version__
    info["copy_gb_s"] = round(copy_bandwidth(device, config.seconds), 1)
    info["scenes"] = "real" if os.environ.get("DETECTION_DATA") else "made up"
    print(", ".join(f"{key} {value}" for key, value in info.items()))
    columns = ("p20", "p50", "p80", "wall", "gb_s", "copy", "peak_mib", "ratio")
    titles = "".join(f"{column:>10}" for column in columns)
    print(f"{'op':<62}{titles}  against      check")
    lines = config.lines.open("w") if config.lines else io.StringIO()
    wrong = 0
    print(json.dumps(info), file=lines, flush=True)
    for case in cases(device):
        if config.only not in case.name:
            continue
        row = run_case(case, device, config.seconds, info["copy_gb_s"])
        cells = (f"{row[c]:10.3f}" if c in row else f"{'-':>10}" for c in columns)
        line = f"{row['name']:<62}" + "".join(cells)
        print(f"{line}  {row.get('against', '-'):<12} {row['check']}", flush=True)
        print(json.dumps(row), file=lines, flush=True)  # at once: a time limit may end this
        wrong += row["check"] not in ("ok", "no reference")
    lines.close()
    return wrong


if __name__ == "__main__":
    raise SystemExit(main())
