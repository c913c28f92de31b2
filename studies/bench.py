"""How long do a training step and a prediction take, beside torchvision's detector?

    python -m studies.bench d2det               # beside Faster R-CNN, ResNet-50, 800x1333 px
    python -m studies.bench dc_loss_clnms --amp bf16    # beside RetinaNet
    python -m studies.bench cpm_rcnn --compile          # ours through torch.compile

Both run in one process, on one image, in turns, with random weights. Prints median seconds,
multiply-adds and peak memory, on a GPU also how often a call waits for it, and writes
OUT/bench.json. `ours / this` above 1 says that ours takes longer.
"""

from __future__ import annotations

import copy
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
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from baselines.retinanet import OneStage
from common import BadInput, clip_boxes, make_norm
from data import SyntheticDetection
from engine.loader import to_device
from engine.processes import (
    autocast,
    peak_memory,
    print_once,
    progress,
    reset_peak_memory,
    start_processes,
)
from engine.settings import Settings
from studies.checkpoint import (
    METHODS,
    random_detector,
    read_options,
    reported,
    results_folder,
    write_results,
)
from studies.cost import flop_counter


def torchvision_detector(ours: nn.Module, **options) -> nn.Module:
    """torchvision's RetinaNet or Faster R-CNN, of the size of our one- or two-stage detector.

    It has a copy of our ResNet, deformable or not, and a pyramid of our width, norm and
    levels; the rest is torchvision's own. `options` go to its FasterRCNN or RetinaNet.
    """
    settings, resnet = ours.settings, copy.deepcopy(ours.backbone)
    stages = {f"layer{i}": stage for i, stage in enumerate(resnet.stages, 1)}
    width, first = settings.fpn_channels, resnet.first  # the first level is of C2 or C3
    norm = None
    if settings.backbone_weights == "none":
        norm = make_norm("gn" if settings.norm in ("auto", "eval_bn") else settings.norm)
    backbone = BackboneWithFPN(
        nn.Sequential(OrderedDict(stem=resnet.stem, **stages)),
        {f"layer{i + 1}": str(i) for i in range(first, 4)},
        [conv[0].in_channels for conv in resnet.fpn.inner_blocks],
        width,
        LastLevelP6P7(width, width) if first else LastLevelMaxPool(),
        norm,
    )
    if isinstance(ours, OneStage):
        return RetinaNet(backbone, ours.num_classes, **options)
    return FasterRCNN(backbone, ours.num_classes + 1, **options)  # it counts the background


def one_image(settings: Settings, device) -> tuple[list[Tensor], list[dict]]:
    """A synthetic image of the test size, h x w, and its objects: [image], [target]."""
    image, target = SyntheticDetection(1, settings.data.max_size, 0)[0]
    image = image[:, : settings.data.scales[0]]
    size = tuple(image.shape[1:])
    boxes = clip_boxes(target["boxes"].as_subclass(Tensor), torch.tensor(size).float())
    seen = (boxes[:, 2:] - boxes[:, :2] > 1).all(1)
    target = {k: target[k][seen] for k in ("labels", "ignore")} | {"boxes": boxes[seen]}
    return to_device([(image, {**target, "image_id": 0, "size": size})], device)


def bench(model: nn.Module, settings: Settings, device, repeat: int) -> list[dict]:
    """Median seconds, multiply-adds and peak memory of both jobs, for both detectors.

    Random weights propose and detect at random: the work is that of early training.
    """
    torch.manual_seed(0)
    amp = settings.run.amp
    images, targets = one_image(settings, device)
    sizes = dict(min_size=settings.data.scales[0], max_size=settings.data.max_size)
    other = torchvision_detector(model, **sizes).to(device)
    if settings.run.compile:
        model.compile_parts()
    first = 0 if isinstance(model, OneStage) else 1  # its Faster R-CNN has background 0
    shifted = [{"boxes": t["boxes"], "labels": t["labels"] + first} for t in targets]
    floats = [i.float() / 255 for i in images]
    jobs = {
        "training step": {
            "ours": (model, lambda: model.loss(images, targets)),
            "torchvision": (other, lambda: other(floats, shifted)),
        },
        "prediction": {
            "ours": (model, lambda: model.predict(images, settings.test)),
            "torchvision": (other, lambda: other(floats)),
        },
    }
    rows = []
    for job, both in jobs.items():
        found: dict[str, dict] = {}
        for name, (net, work) in both.items():
            net.train(job == "training step")
            found[name] = dict(job=job, model=name) | first_calls(net, work, settings, device)
        seconds: dict[str, list] = {name: [] for name in both}
        for _ in progress(range(repeat), job, repeat):
            for name, (net, work) in both.items():
                seconds[name].append(time_once(net, work, amp, device))
        medians = {name: float(np.median(times)) for name, times in seconds.items()}
        for name, (net, work) in both.items():
            waits = host_waits(net, work, amp, device)
            ratio = medians["ours"] / medians[name]
            rows.append(found[name] | dict(seconds=medians[name], waits=waits, ratio=ratio))
    return rows


def first_calls(net: nn.Module, work, settings: Settings, device) -> dict:
    """Multiply-adds of a call and its peak memory. The calls that are timed come later."""
    reset_peak_memory(device)
    with flop_counter() as counter:  # it does not see into compiled parts
        run_once(net, work, settings.run.amp, device)
    for _ in range(2 if settings.run.compile else 0):
        reset_peak_memory(device)
        run_once(net, work, settings.run.amp, device)
    multiply_adds = counter.get_total_flops() / 2e9
    return {"giga_multiply_adds": multiply_adds, "peak_mib": peak_memory(device) >> 20}


def run_once(net: nn.Module, work, amp: str, device) -> None:
    """A loss and its gradient, or a prediction."""
    with autocast(amp, device), torch.set_grad_enabled(net.training):
        result = work()
        if net.training:
            sum(result.values()).backward()
            net.zero_grad(set_to_none=True)


def time_once(net: nn.Module, work, amp: str, device) -> float:
    """Seconds of `run_once`."""
    start = time.perf_counter()
    run_once(net, work, amp, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def host_waits(net: nn.Module, work, amp: str, device) -> int | None:
    """How often the host waits for the GPU in a call, by torch's own count; None on a CPU."""
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run_once(net, work, amp, device)
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(w.message) for w in caught)


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
        model, settings = random_detector(options.method, flags)
        device = start_processes(settings.run.device)
        rows = bench(model.to(device), settings, device, options.repeat)
        name = f"{torch.get_num_threads()} threads"
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        size = settings.data.scales[0], settings.data.max_size
        where = f"{device} ({name}), torch {torch.__version__}"
        where += f", {settings.model.backbone}, {size} px"
        print_once(where)
        for row in rows:
            line = f"{row['job']:14} {row['model']:12} {row['seconds']:8.3f} s  "
            line += f"{row['giga_multiply_adds']:8.1f} G multiply-adds  "
            line += f"{row['peak_mib']:6d} MiB  ours / this: {row['ratio']:.2f}"
            if row["waits"] is not None:
                line += f"  waits: {row['waits']}"
            print_once(line)
        write_results(out / "bench.json", {"where": where, "rows": rows})
        return rows


if __name__ == "__main__":
    main()
