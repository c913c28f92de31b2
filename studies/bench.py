"""Time a training step and a prediction beside torchvision's detector of the same size.

    python -m studies.bench d2det                  # Faster R-CNN beside it, ResNet-50, 800x1333 px
    python -m studies.bench dc_loss_clnms --amp bf16                      # RetinaNet beside it
    python -m studies.bench cpm_rcnn --compile                # ours through torch.compile

Both run in one process, on one image, in turns, with random weights. Prints medians, multiply-adds
and peak memory, on a GPU also how often a call waits for it; writes OUT/bench.json. `ours / this`
above 1: ours takes longer.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

import engine
from baselines.retinanet import RetinaNet
from common import BadInput, ResNetFPN, clip_boxes, make_norm
from data import SyntheticDetection
from engine.checkpoints import write_json
from engine.detector import build_detector, make_deformable
from engine.loader import to_device
from engine.processes import (
    autocast,
    peak_memory,
    print_once,
    progress,
    rank_and_world,
    reset_peak_memory,
    start_processes,
)
from engine.settings import Settings
from studies.checkpoint import (
    METHODS,
    read_options,
    reported,
    results_folder,
    script_of,
    settings_of,
)
from studies.cost import flop_counter


def torchvision_detector(
    kind: str, model: engine.Model, num_classes: int | None, **options
) -> nn.Module:
    """torchvision's Faster R-CNN (kind "two_stage") or RetinaNet ("one_stage") of the same size.

    It has our ResNet, deformable or not, with the norm, frozen stages and pyramid width that
    `model` asks for; the rest is torchvision's own. `options` go to its FasterRCNN or RetinaNet.
    """
    scratch = model.backbone_weights == "none"
    weights = "none" if scratch else "random"
    ours = ResNetFPN(
        model.backbone, weights=weights, norm=model.norm, frozen_stages=model.frozen_stages
    )
    if model.dcn != "none":
        make_deformable(ours, model.dcn)
    stages = {f"layer{i}": stage for i, stage in enumerate(ours.stages, 1)}
    two_stage = kind == "two_stage"
    first = 0 if two_stage or model.p2 else 1  # pyramids begin at C2 or at C3
    channels = [conv[0].in_channels for conv in ours.fpn.inner_blocks][first:]
    width = model.fpn_channels
    norm = make_norm("gn" if model.norm in ("auto", "eval_bn") else model.norm) if scratch else None
    backbone = BackboneWithFPN(
        nn.Sequential(OrderedDict(stem=ours.stem, **stages)),
        {f"layer{i + 1}": str(i) for i in range(first, 4)},
        channels,
        width,
        LastLevelP6P7(width, width) if first else LastLevelMaxPool(),
        norm,
    )
    if two_stage:
        labels = None if num_classes is None else num_classes + 1  # it counts the background
        return FasterRCNN(backbone, labels, **options)
    return TorchvisionRetinaNet(backbone, num_classes, **options)


def one_image(settings: Settings, device):
    """A synthetic image of the test size, h x w, and its objects: ([image], [target])."""
    image, target = SyntheticDetection(1, settings.data.max_size, 0)[0]
    image = image[:, : settings.data.scales[0]]
    boxes = clip_boxes(target["boxes"].as_subclass(Tensor), torch.tensor(image.shape[1:]).float())
    keep = (boxes[:, 2:] - boxes[:, :2] > 1).all(1)
    target = {k: target[k][keep] for k in ("labels", "ignore")} | {"boxes": boxes[keep]}
    return to_device([(image, {**target, "image_id": 0, "size": tuple(image.shape[1:])})], device)


def bench(model, settings: Settings, num_classes: int, device, repeat: int = 5) -> list[dict]:
    """Median seconds, multiply-adds and peak memory of both jobs, for both detectors.

    Random weights propose and detect at random: the work is that of early training.
    """
    torch.manual_seed(0)
    kind = "one_stage" if isinstance(model, RetinaNet) else "two_stage"
    images, targets = one_image(settings, device)
    sizes = dict(min_size=settings.data.scales[0], max_size=settings.data.max_size)
    other = torchvision_detector(kind, settings.model, num_classes, **sizes).to(device)
    shift = 1 if kind == "two_stage" else 0  # its label 0 is the background
    shifted = [{"boxes": t["boxes"], "labels": t["labels"] + shift} for t in targets]
    floats = [i.float() / 255 for i in images]
    work = {
        ("training step", "ours"): lambda: model.loss(images, targets),
        ("training step", "torchvision"): lambda: other(floats, shifted),
        ("prediction", "ours"): lambda: model.predict(images, settings.test),
        ("prediction", "torchvision"): lambda: other(floats),
    }
    nets, rows = {"ours": model, "torchvision": other}, []
    # calls that are not timed: the first counts, uncompiled; then two that compile
    warm = 3 if settings.run.compile else 1
    for job in ("training step", "prediction"):
        measured: dict = {name: [] for name in nets}
        peaks = {}
        for i in progress(range(repeat + warm), job, repeat + warm):
            for name, net in nets.items():
                net.train(job == "training step")
                if i == warm - 1:  # not in a timed call: the reset gives kept memory back
                    reset_peak_memory(device)
                call = measure(net, work[job, name], settings.run.amp, device, count=i == 0)
                measured[name].append(call)
                if i == warm - 1:
                    peaks[name] = peak_memory(device)
        medians = {k: float(np.median([s for s, _ in m[warm:]])) for k, m in measured.items()}
        for name, net in nets.items():
            net.train(job == "training step")
            rows.append({
                "job": job,
                "model": name,
                "seconds": medians[name],
                "giga_multiply_adds": measured[name][0][1] / 1e9,
                "peak_mib": peaks[name] >> 20,
                "waits": host_waits(net, work[job, name], settings.run.amp, device),
                "ratio": medians["ours"] / medians[name],
            })  # fmt: skip
    return rows


def run_once(net: nn.Module, work, amp: str, device) -> None:
    """A loss and its gradient, or a prediction."""
    with autocast(amp, device), torch.set_grad_enabled(net.training):
        result = work()
        if net.training:
            sum(result.values()).backward()
            net.zero_grad(set_to_none=True)


def measure(net: nn.Module, work, amp: str, device, count: bool) -> tuple[float, float]:
    """Seconds and multiply-adds (0: not counted) of `run_once`."""
    counter = flop_counter() if count else contextlib.nullcontext()
    start = time.perf_counter()
    with counter:
        run_once(net, work, amp, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    return seconds, counter.get_total_flops() / 2 if count else 0.0


def host_waits(net: nn.Module, work, amp: str, device) -> int | None:
    """How often the host waits for the GPU in a call, by torch's own count; None on a CPU."""
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run_once(net, work, amp, device)
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(w.message) for w in caught)


@dataclass
class BenchOptions:
    method: Annotated[Literal[METHODS], tyro.conf.Positional]  # whose detector
    repeat: int = 5  # measurements of each, after those that warm up
    out: str = ""  # results folder (default: runs/METHOD/studies)


def main(argv=None) -> list[dict]:
    with reported():
        options, flags = read_options("bench", BenchOptions, __doc__, argv)
        if options.repeat < 1:
            raise BadInput(f"--repeat {options.repeat}: at least 1")
        out = results_folder(options.out or f"runs/{options.method}/studies")
        settings = settings_of(options.method, ["--preset", "paper", *flags])
        device = start_processes(settings.run.device)
        torch.manual_seed(settings.run.seed)
        script = script_of(options.method)
        model = build_detector(script.Detector, settings.model.without_download(), 80).to(device)
        if settings.run.compile:
            model.compile_parts()
        rows = bench(model, settings, 80, device, options.repeat)
        name = f"{torch.get_num_threads()} threads"
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else name
        size = tuple(one_image(settings, "cpu")[0][0].shape[1:])
        backbone = settings.model.backbone
        where = f"{device} ({name}), torch {torch.__version__}, {backbone}, {size} px"
        print_once(where)
        for r in rows:
            line = f"{r['job']:14} {r['model']:12} {r['seconds']:8.3f} s  "
            line += f"{r['giga_multiply_adds']:8.1f} G multiply-adds  {r['peak_mib']:6d} MiB  "
            line += f"ours / this: {r['ratio']:.2f}"
            if r["waits"] is not None:
                line += f"  waits: {r['waits']}"
            print_once(line)
        if rank_and_world()[0] == 0:
            write_json(out / "bench.json", {"where": where, "rows": rows})
        return rows


if __name__ == "__main__":
    main()
