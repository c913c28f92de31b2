"""Time a training step and a prediction beside torchvision's detector of the same size.

    python -m studies.bench d2det                  # Faster R-CNN beside it, ResNet-50, 800x1333 px
    python -m studies.bench dc_loss_clnms --amp bf16                      # RetinaNet beside it
    python -m studies.bench cpm_rcnn --compile                # ours through torch.compile

Both in one process, with one image, taken in turns; random weights. Prints medians, multiply-adds
and peak memory, on a GPU also how often a call waits for it; writes OUT/bench.json. `ours / this`
above 1: ours takes longer.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from baselines.retinanet import RetinaNet
from common import (
    BadInput,
    SyntheticDetection,
    clip_boxes,
    make_deformable,
    make_norm,
    make_resnet,
)
from engine.checkpoints import write_json
from engine.data import to_device
from engine.processes import (
    autocast,
    peak_memory,
    progress,
    rank_and_world,
    reset_peak_memory,
    say,
    start_processes,
)
from engine.settings import Config, untrained
from studies.checkpoint import METHODS, method_of, read_options, reported, settings_of
from studies.cost import flop_counter


def torchvision_detector(kind: str, config: Config, num_classes: int, **options) -> nn.Module:
    """torchvision's Faster R-CNN (kind "two_stage") or RetinaNet ("one_stage") of the same size.

    Same ResNet, deformable or not, norm, frozen stages, pyramid width and image sizes as `config`
    asks of ours; the rest is torchvision's own. `options` go to its FasterRCNN or RetinaNet.
    """
    from torchvision.models.detection import FasterRCNN, RetinaNet
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    scratch, width = config.backbone_weights == "none", config.fpn_channels
    norm = make_norm({"auto": "gn" if scratch else "frozen_bn"}.get(config.norm, config.norm))
    net = make_resnet(config.backbone, None, norm)
    make_deformable(net, config.dcn)
    stem = nn.ModuleList([net.conv1, net.bn1])
    for part in [stem, net.layer1, net.layer2, net.layer3, net.layer4][: config.frozen_stages]:
        part.requires_grad_(scratch)
    two_stage = kind == "two_stage"
    first = 0 if two_stage or config.p2 else 1
    channels = [net.fc.in_features // 8 * 2**i for i in range(first, 4)]
    layers = {f"layer{i + 1}": str(i) for i in range(first, 4)}
    extra = LastLevelP6P7(width, width) if first else LastLevelMaxPool()
    pyramid = norm if scratch else None
    body = BackboneWithFPN(net, layers, channels, width, extra, pyramid)
    settings = dict(min_size=config.scales[0], max_size=config.max_size)
    labels = num_classes and num_classes + two_stage  # Faster R-CNN counts the background
    return (FasterRCNN if two_stage else RetinaNet)(body, labels, **settings, **options)


def one_image(config: Config, device):
    """A synthetic image of `config`'s test size, h x w, and its objects: ([image], [target])."""
    image, target = SyntheticDetection(1, config.max_size, 0)[0]
    image = image[:, : config.scales[0]]
    boxes = clip_boxes(target["boxes"].as_subclass(Tensor), torch.tensor(image.shape[1:]).float())
    keep = (boxes[:, 2:] - boxes[:, :2] > 1).all(1)
    target = {k: target[k][keep] for k in ("labels", "ignore")} | {"boxes": boxes[keep]}
    return to_device([(image, {**target, "image_id": 0, "size": tuple(image.shape[1:])})], device)


def bench(model, config: Config, num_classes: int, device, repeat: int = 5) -> list[dict]:
    """Median seconds, multiply-adds and peak memory of both jobs, for both detectors.

    Random weights propose and detect at random: the work is that of early training.
    """
    torch.manual_seed(0)
    kind = "one_stage" if isinstance(model, RetinaNet) else "two_stage"
    images, targets = one_image(config, device)
    other = torchvision_detector(kind, config, num_classes).to(device)
    shift = 1 if kind == "two_stage" else 0  # its label 0 is the background
    theirs = [{"boxes": t["boxes"], "labels": t["labels"] + shift} for t in targets]
    floats = [i.float() / 255 for i in images]
    contenders = {
        "ours": (model, lambda: model.loss(images, targets), lambda: model.predict(images)),
        "torchvision": (other, lambda: other(floats, theirs), lambda: other(floats)),
    }
    rows = []
    warm = 1 + 2 * config.compile  # calls not timed: uncompiled, it counts; one that compiles; last
    for job in ("training step", "prediction"):
        found: dict = {name: [] for name in contenders}
        peaks = {}
        for i in progress(range(repeat + warm), job, repeat + warm):
            for name, (net, loss, predict) in contenders.items():
                net.train(job == "training step")
                work = loss if job == "training step" else predict
                if i == warm - 1:  # not in a timed call: the reset gives kept memory back
                    reset_peak_memory(device)
                found[name].append(measure(net, work, config, device, count=i == 0))
                if i == warm - 1:
                    peaks[name] = peak_memory(device)
        ours = np.median([seconds for seconds, _ in found["ours"][warm:]])
        for name, measured in found.items():
            median = float(np.median([seconds for seconds, _ in measured[warm:]]))
            row = {"job": job, "model": name, "seconds": median}
            row |= {"giga_multiply_adds": measured[0][1] / 1e9, "peak_mib": peaks[name] >> 20}
            net, loss, predict = contenders[name]
            net.train(job == "training step")
            row["waits"] = host_waits(net, loss if net.training else predict, config, device)
            rows.append(row | {"ratio": float(ours / median)})
    return rows


def measure(net: nn.Module, work, config: Config, device, count: bool) -> tuple[float, float]:
    """Seconds and multiply-adds (0: not counted) of a loss and its gradient, or of `work`."""
    counter = flop_counter() if count else contextlib.nullcontext()
    start = time.perf_counter()
    with counter, autocast(config.amp, device):
        if net.training:
            sum(work().values()).backward()
            net.zero_grad(set_to_none=True)
        else:
            with torch.no_grad():
                work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, counter.get_total_flops() / 2 if count else 0.0


def host_waits(net: nn.Module, work, config: Config, device) -> int | None:
    """How often the host waits for the GPU in a call, by torch's own count; None on a CPU."""
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        with autocast(config.amp, device), torch.set_grad_enabled(net.training):
            result = work()
            if net.training:
                sum(result.values()).backward()
                net.zero_grad(set_to_none=True)
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
            raise BadInput(f"--repeat {options.repeat}: 1 is the least")
        config = untrained(settings_of(options.method, ["--preset", "paper", *flags]))
        device = start_processes(config.device)
        torch.manual_seed(config.seed)
        model = method_of(options.method).Detector(config, 80).to(device)
        if config.compile:
            model.compile_parts()
        rows = bench(model, config, 80, device, options.repeat)
        name = f"{torch.get_num_threads()} threads"
        name = torch.cuda.get_device_name() if device.type == "cuda" else name
        size = tuple(one_image(config, "cpu")[0][0].shape[1:])
        where = f"{device} ({name}), torch {torch.__version__}, {config.backbone}, {size} px"
        say(where)
        for r in rows:
            say(
                f"{r['job']:14} {r['model']:12} {r['seconds']:8.3f} s  "
                f"{r['giga_multiply_adds']:8.1f} G multiply-adds  {r['peak_mib']:6d} MiB  "
                f"ours / this: {r['ratio']:.2f}"
                + f"  waits: {r['waits']}"
                * (r["waits"] is not None)
            )
        out = Path(options.out or f"runs/{options.method}/studies")
        if rank_and_world()[0] == 0:
            write_json(out / "bench.json", {"where": where, "rows": rows})
        return rows


if __name__ == "__main__":
    main()
