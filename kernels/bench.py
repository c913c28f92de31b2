"""Checks every op against its reference, then times it: `python -m kernels.bench [--json FILE]`.

The boxes are those of detections. NMS on random boxes, which all overlap or none does, says little.

- Scenes: the ground-truth boxes of real images, resized to fit 800 x 1333, where the environment
  variable DETECTION_DATA names a folder with `coco_tiny/annotations/*.json`; otherwise made up:
  5 to 30 boxes, log-uniform from 16 to 500 px, half of them beside one another.
- RPN: every anchor of 8 x stride, ratios 1/2, 1, 2, strides 4 to 64, scored with its IoU with the
  nearest ground truth plus noise of 0.05, moved 70 % of the way to that box where their IoU is
  above 0.3, and jittered by 5 % of its size; the best 2,000 of each level.
- RoIs: the best 1,000 an image of these after NMS at 0.7, of two images.
- Classes: RetinaNet's anchors, moved likewise; score of the ground truth's class as above, a third
  of it for another class at random, a floor of noise for a third; the best so many (anchor, class)
  pairs of each of eight images, 80 classes.

Times are milliseconds, by events on a GPU with its L2 cache emptied before each call, by the clock
on a CPU. `copy` is the share of the bandwidth of a plain copy, measured in the same run; `ratio` is
the median time of what it is compared `against` over ours, so that a number below 1 is a loss.
`wall` is the time by the clock from a call to its return, GPU work not awaited: what Python costs.
"""

import argparse
import importlib
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torchvision
from torch import Tensor
from torchvision.ops import box_iou

from .dense_decode import decode_dense_offsets, decode_dense_reference
from .focal_loss import focal_loss, focal_loss_reference
from .nms import batched_nms, cl_nms, nms, nms_padded, soft_nms
from .roi_align import deform_roi_pool, roi_align, roi_level

roi_module = importlib.import_module(".roi_align", __package__)  # the package's own is the function
HEIGHT, WIDTH = 800, 1333


def scenes(count: int, folder: str | None = None) -> list[Tensor]:
    """Ground-truth boxes of `count` images, float32 [G, 4] xyxy each, in an 800 x 1333 frame."""
    folder = folder or os.environ.get("DETECTION_DATA")
    found = []
    if folder:
        for path in sorted((Path(folder) / "coco_tiny" / "annotations").glob("*.json")):
            content = json.loads(path.read_text())
            sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
            boxes = {key: [] for key in sizes}
            for note in content["annotations"]:
                boxes[note["image_id"]].append(note["bbox"])
            for key, (height, width) in sizes.items():
                if boxes[key]:
                    scale = min(HEIGHT / min(height, width), WIDTH / max(height, width))
                    xywh = torch.tensor(boxes[key], dtype=torch.float32) * scale
                    xyxy = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
                    limit = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
                    found.append(torch.minimum(xyxy, limit))
    if found:
        return [found[i % len(found)] for i in range(count)]
    return [_made_up_scene(seed) for seed in range(count)]


def _made_up_scene(seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    num = int(torch.randint(5, 31, (), generator=g))
    size = 16 * torch.exp(torch.rand((num, 2), generator=g) * math.log(500 / 16))
    centre = torch.rand((num, 2), generator=g) * torch.tensor([WIDTH, HEIGHT])
    half = num // 2  # these stand beside one of the others, at its size
    size[:half] = size[num - half :]
    centre[:half] = centre[num - half :] + 0.7 * size[:half] * torch.tensor([1.0, 0.0])
    return _clip(torch.cat([centre - size / 2, centre + size / 2], 1))


def _clip(boxes: Tensor) -> Tensor:
    return torch.minimum(boxes.clamp(min=0), torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT]))


def _anchors(stride: int, sizes: list[float]) -> Tensor:
    y = (torch.arange(math.ceil(HEIGHT / stride)) + 0.5) * stride
    x = (torch.arange(math.ceil(WIDTH / stride)) + 0.5) * stride
    centre = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flip(-1).reshape(-1, 1, 2)
    shapes = [[s * r**-0.5, s * r**0.5] for s in sizes for r in (0.5, 1.0, 2.0)]  # (w, h)
    half = torch.tensor(shapes) / 2
    return torch.cat([centre - half, centre + half], -1).reshape(-1, 4)


def _detect(anchors: Tensor, gt: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes a detector would make of the anchors [A, 4], their scores [A] and gt indices [A]."""
    iou, nearest = torch.cat([box_iou(a, gt) for a in anchors.split(50_000)]).max(1)
    moved = anchors + 0.7 * (iou > 0.3)[:, None] * (gt[nearest] - anchors)
    size = (moved[:, 2:] - moved[:, :2]).repeat(1, 2)
    moved = _clip(moved + 0.05 * size * torch.randn(moved.shape, generator=g))
    score = iou + 0.05 * torch.randn(iou.shape, generator=g)
    return moved, score.clamp(1e-4, 1), nearest


def rpn_candidates(gts: list[Tensor], per_level: int = 2000):
    """boxes [N, 4], scores [N], groups [N] (image x level) and images [N]; how: see the top."""
    parts = []
    for image, gt in enumerate(gts):
        g = torch.Generator().manual_seed(image)
        for level, stride in enumerate((4, 8, 16, 32, 64)):
            boxes, scores, _ = _detect(_anchors(stride, [8.0 * stride]), gt, g)
            scores, best = scores.topk(min(per_level, len(scores)))
            group = torch.full_like(best, image * 5 + level)
            parts.append((boxes[best], scores, group, group // 5))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def class_candidates(gts: list[Tensor], per_image: int, num_classes: int = 80):
    """boxes [N, 4], scores [N], groups [N] (image x class) and images [N]."""
    parts = []
    for image, gt in enumerate(gts):
        g = torch.Generator().manual_seed(image)
        sizes = {s: [4 * s * 2 ** (i / 3) for i in range(3)] for s in (8, 16, 32, 64, 128)}
        anchors = torch.cat([_anchors(stride, size) for stride, size in sizes.items()])
        boxes, scores, nearest = _detect(anchors, gt, g)
        # Classes are as uneven as in photographs: the first few take most objects.
        classes = (num_classes * torch.rand(len(gt), generator=g) ** 3).long()[nearest]
        other = torch.randint(num_classes, (2, len(boxes)), generator=g)
        noise = 0.2 * torch.rand(len(boxes), generator=g)
        scores, best = torch.cat([scores, scores / 3, noise]).topk(per_image)
        group = torch.cat([classes, *other])[best] + image * num_classes
        parts.append((boxes[best % len(boxes)], scores, group, group // num_classes))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def proposals(gts: list[Tensor], per_image: int = 1000) -> Tensor:
    """RoIs [R, 5] (image, xyxy): what RPN and NMS at 0.7 leave."""
    boxes, scores, groups, images = rpn_candidates(gts)
    keep = batched_nms(boxes, scores, groups, 0.7)
    keep = torch.cat([keep[images[keep] == i][:per_image] for i in range(len(gts))])
    rois = torch.cat([images[keep, None].float(), boxes[keep]], 1)  # [R, 5]
    return rois[((rois[:, 3:] - rois[:, 1:3]) > 0).all(1)]


def mismatch(out, expected) -> str:
    """'' where the results agree. A result is a tensor or a tuple of them.

    Whole numbers must be equal, except beside scores: two boxes whose scores differ in the last bit
    may change places there, and the scores decide.
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
    samples, stop = [], time.perf_counter() + seconds
    if device.type == "cuda":
        flush = torch.empty(256 << 20, dtype=torch.int8, device=device)
        run()
    while len(samples) < 5 or (time.perf_counter() < stop and len(samples) < 1000):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(2_000_000)  # about 1 ms, in which Python launches what follows
            begin.record()
            run()
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end))
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


# A case is a dict: name; run; baseline (or None) and baseline_name, what the time is compared with;
# reference (or None), whose result run's must match: a tensor or a tuple of them; bytes (or None),
# the least that must move.


def nms_cases(device: torch.device, sets: dict) -> Iterator[dict]:
    """`sets` maps a name to (boxes [N, 4], scores [N], groups [N], images [N]).

    torchvision is called once an image, which is how it is used. On a CPU soft_nms and cl_nms are
    their references.
    """
    for name, tensors in sets.items():
        boxes, scores, groups, images = (t.to(device) for t in tensors)
        parts = [images == i for i in images.unique().tolist()]
        parts = [(boxes[part], scores[part], groups[part]) for part in parts]
        args, one = (boxes, scores, groups), parts[0][:2]
        one_image = partial(torchvision.ops.nms, *one, 0.5)

        def per_image(parts=parts):
            return [torchvision.ops.batched_nms(*part, 0.5) for part in parts]

        yield {
            "name": f"batched_nms {name}",
            "run": partial(batched_nms, *args, 0.5),
            "baseline": per_image,
            "baseline_name": "torchvision",
            "reference": partial(batched_nms, *args, 0.5, impl="torch"),
            "bytes": None,
        }
        yield {
            "name": f"nms_padded {name}",
            "run": partial(nms_padded, *args, 0.5),
            "baseline": per_image,
            "baseline_name": "torchvision",
            "reference": partial(nms_padded, *args, 0.5, impl="torch"),
            "bytes": None,
        }
        for impl in ("auto", "triton") if boxes.is_cuda else ("auto",):
            yield {
                "name": f"nms, one group of {len(one[0])}, {impl}",
                "run": partial(nms, *one, 0.5, impl=impl),
                "baseline": one_image,
                "baseline_name": "torchvision",
                "reference": partial(nms, *one, 0.5, impl="torch"),
                "bytes": None,
            }
        for function in (soft_nms, cl_nms):
            reference = partial(function, *args, 0.5, impl="torch")
            yield {
                "name": f"{function.__name__} {name}",
                "run": partial(function, *args, 0.5),
                "baseline": reference if boxes.is_cuda else None,
                "baseline_name": "torch",
                "reference": reference if boxes.is_cuda else None,
                "bytes": None,
            }


def decode_cases(device: torch.device, rois: Tensor) -> Iterator[dict]:
    """On proposals rois [R, 5]. Offsets and logits are what a trained head gives: cells near the
    truth, jittered, and logits that are positive in the middle of the box.
    """
    generator = torch.Generator().manual_seed(0)
    bins = (torch.arange(7) + 0.5) / 7
    side = bins.expand(7, 7)
    exact = torch.stack([side, side.T, 1 - side, 1 - side.T])  # [4, 7, 7] gives the proposal back
    middle = 0.4 - torch.maximum((side - 0.5).abs(), (side.T - 0.5).abs())  # [7, 7]
    for R in (1000, 200_000) if device.type == "cuda" else (1000,):
        proposals = rois[torch.arange(R) % len(rois), 1:].to(device)
        noise = torch.randn((R, 4, 7, 7), generator=generator)
        offsets = (exact + 0.1 * noise).relu().to(device)
        noise = torch.randn((R, 1, 7, 7), generator=generator)
        logits = (10 * middle + noise).to(device)
        for dtype in (torch.float32, torch.bfloat16):
            args = (proposals, offsets.to(dtype), logits.to(dtype), (800, 1333))

            def run(args=args):
                return decode_dense_offsets(*args)

            def eager(args=args):
                return decode_dense_offsets(*args, impl="torch")

            def reference(args=args):
                return decode_dense_reference(*(a.double() for a in args[:3]), args[3]).float()

            yield {
                "name": f"decode_dense_offsets {R} x 7x7 {str(dtype)[6:]}",
                "run": run,
                "baseline": eager if device.type == "cuda" else None,  # on a CPU it is this op
                "baseline_name": "torch",
                "reference": reference,
                "bytes": sum(a.numel() * a.element_size() for a in args[:3]) + R * 16,
            }


def focal_cases(device: torch.device) -> Iterator[dict]:
    """Loss and gradient of the anchors of 800 x 1333 images, 80 classes; torchvision's one-hot."""
    generator, K = torch.Generator().manual_seed(0), 80
    for M in (20_000, 400_000) if device.type == "cuda" else (20_000,):
        scores = torch.randn((M, K), generator=generator) - 4.6  # a head's prior, p = 0.01
        labels = torch.randint(K, (M,), generator=generator)
        labels = torch.where(torch.rand(M, generator=generator) < 0.99, K, labels).to(device)
        for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,):
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

            yield {
                "name": f"focal_loss and gradient {M} x {K} {str(dtype)[6:]}",
                "run": ours,
                "baseline": one_hot,
                "baseline_name": "torchvision",
                "reference": reference,
                # Logits are read, the slope written and read, the gradient written.
                "bytes": 4 * logits.numel() * logits.element_size(),
            }


def roi_align_torchvision(maps, rois, size, strides, sampling_ratio=2) -> Tensor:
    """roi_align by torchvision's operator, level by level as its MultiScaleRoIAlign does."""
    # The operator refuses bfloat16 and would round the boxes to the maps' dtype.
    dtype = torch.promote_types(maps[0].dtype, torch.float32)
    level = roi_level(rois, strides)
    out = maps[0].new_zeros(len(rois), maps[0].shape[1], size, size)
    for i, (f, stride) in enumerate(zip(maps, strides)):
        here = (level == i).nonzero().squeeze(1)
        boxes = rois[here].to(dtype)
        pooled = torchvision.ops.roi_align(
            f.to(dtype), boxes, size, 1 / stride, sampling_ratio, aligned=True
        )
        out[here] = pooled.to(out.dtype)
    return out


def roi_cases(device: torch.device, rois: Tensor) -> Iterator[dict]:
    """Forward and backward over P2..P5 (256 channels) of two 800 x 1333 images of rois [R, 5],
    at least 1000. The deformable op is compared with roi_align. The bytes that must move are every
    cell that is touched, and the result, once.
    """
    strides, C = (4, 8, 16, 32), 256
    layouts = [("NCHW fp32", torch.float32, torch.contiguous_format)]
    if device.type == "cuda":
        # bfloat16 makes torchvision convert all maps on each call; float16 does not.
        layouts.append(("NCHW bf16", torch.bfloat16, torch.contiguous_format))
        layouts.append(("channels_last bf16", torch.bfloat16, torch.channels_last))
        layouts.append(("channels_last fp16", torch.float16, torch.channels_last))
    for (layout, dtype, memory_format), (R, S) in product(layouts, ((1000, 7), (512, 14))):
        random = torch.Generator(device).manual_seed(0)
        shapes = [(2, C, -(-800 // s), -(-1333 // s)) for s in strides]
        shapes += [(R, 2, S, S), (R, C, S, S)]
        *maps, shift, grad = [torch.randn(s, generator=random, device=device) for s in shapes]
        maps = [f.to(dtype, memory_format=memory_format).requires_grad_() for f in maps]
        grad = grad.to(dtype, memory_format=memory_format)
        inputs, options = [*maps, shift.requires_grad_()], (S, strides, 2)
        boxes = rois[torch.linspace(0, len(rois) - 1, R).long()].to(device)  # of both images
        align = partial(roi_align, maps, boxes, *options)
        vision = partial(roi_align_torchvision, maps, boxes, *options)
        deform = partial(deform_roi_pool, maps, boxes, shift, *options)
        yield from _roi_op("roi_align", align, maps, vision, "torchvision", grad, layout)
        yield from _roi_op("deform_roi_pool", deform, inputs, align, "roi_align", grad, layout)


def _roi_op(op, run, inputs, rival, rival_name, grad, layout) -> Iterator[dict]:
    maps, boxes, *_, S, strides, samples = run.args
    exact = [t.detach().double().requires_grad_() for t in inputs]
    skip = len(inputs) > len(maps)
    shift = exact.pop() if skip else None
    options = (exact, boxes, shift, S, strides, samples, 0.1, skip)
    reference = partial(roi_module.pool_reference, *options)
    rows, size = roi_module._taps(*options)[0].unique().numel(), maps[0].element_size()
    touched, pooled = rows * maps[0].shape[1] * size, grad.numel() * size

    def backward(pool, inputs):
        graph = []  # made at the first call, so that the others time the backward alone

        def gradients() -> tuple[Tensor, ...]:
            if not graph:
                graph.append(pool())
            return torch.autograd.grad(graph[0], inputs, grad.to(graph[0].dtype), retain_graph=True)

        return gradients

    def truth() -> tuple[Tensor, ...]:
        grads = backward(reference, [*exact, shift] if skip else exact)()
        # The gradient of an offset jumps where a sample crosses into another cell, and float32 puts
        # a few on the other side: 16 bits say how closely to compare it.
        return (*grads[:-1], grads[-1].bfloat16()) if skip else grads

    name = f"{op} {len(boxes)}x{grad.shape[1]}x{S}x{S} {layout}"
    yield {
        "name": f"{name} forward",
        "run": torch.no_grad()(run),
        "baseline": torch.no_grad()(rival),
        "baseline_name": rival_name,
        "reference": torch.no_grad()(reference),
        "bytes": touched + pooled,
    }
    yield {
        "name": f"{name} backward",
        "run": backward(run, inputs),
        "baseline": backward(rival, maps),
        "baseline_name": rival_name,
        "reference": truth,
        "bytes": sum(f.numel() for f in maps) * size + pooled + (touched if skip else 0),
    }


def cases(device: torch.device) -> Iterator[dict]:
    """All ops' cases, on boxes of the same scenes."""
    gts = scenes(8)
    big = (1000, 5000, 20_000) if device.type == "cuda" else (1000, 5000)
    sets = {"2 images x 5 RPN levels": rpn_candidates(gts[:2])}
    sets |= {f"8 images x 80 classes, {n} each": class_candidates(gts, n) for n in big}
    rois = proposals(gts[:2])
    yield from nms_cases(device, sets)
    yield from decode_cases(device, rois)
    yield from focal_cases(device)
    yield from roi_cases(device, rois.to(device))


def run_case(case: dict, device: torch.device, seconds: float, copy: float) -> dict:
    """Checks one case and times it; returns the row of the table."""
    row = {"name": case["name"], "check": "no reference"}
    if case.get("reference") is not None:
        row["check"] = mismatch(case["run"](), case["reference"]()) or "ok"
    if device.type == "cuda":
        case["run"]()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case["run"]()
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    row["p20"], row["p50"], row["p80"] = times_ms(case["run"], device, seconds)
    row["wall"] = wall_ms(case["run"], device)
    if case.get("bytes"):
        row["gb_s"] = case["bytes"] / 1e6 / row["p50"]
        row["copy"] = row["gb_s"] / copy
    if case.get("baseline") is not None:
        row["ratio"] = times_ms(case["baseline"], device, seconds)[1] / row["p50"]
        row["against"] = case.get("baseline_name", "torchvision")
    return row


def pick_device(name: str) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "cuda:1" names, made current if it is a GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":  # events and memory counts are the current device's
        torch.cuda.set_device(device.index or 0)
    return device


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns the number of ops that did not match their reference."""
    parser = argparse.ArgumentParser("kernels.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--device", default="auto", help="cuda where there is one, else cpu")
    parser.add_argument("--seconds", type=float, default=0.5, help="spent on each op and baseline")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    config = parser.parse_args(argv)
    device = pick_device(config.device)
    info = {
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    if device.type == "cuda":
        info["device"] = torch.cuda.get_device_name(device)
        info["triton"] = __import__("triton").__version__
    info["copy_gb_s"] = copy_bandwidth(device, config.seconds)
    info["scenes"] = "real" if os.environ.get("DETECTION_DATA") else "made up"
    print(
        ", ".join(f"{k} {v:.0f}" if v is info["copy_gb_s"] else f"{k} {v}" for k, v in info.items())
    )
    columns = ("p20", "p50", "p80", "wall", "gb_s", "copy", "peak_mib", "ratio")
    print(f"{'op':<62}" + "".join(f"{column:>10}" for column in columns) + "  against      check")
    rows = []
    for case in cases(device):
        if config.only not in case["name"]:
            continue
        row = run_case(case, device, config.seconds, info["copy_gb_s"])
        cells = (f"{row[c]:10.3f}" if c in row else f"{'-':>10}" for c in columns)
        print(
            f"{row['name']:<62}" + "".join(cells),
            f" {row.get('against', '-'):<12} {row['check']}",
            flush=True,
        )
        rows.append(row)
    if config.json:
        config.json.write_text(json.dumps({**info, "rows": rows}, indent=1))
    return sum(row["check"] not in ("ok", "no reference") for row in rows)


if __name__ == "__main__":
    raise SystemExit(main())
