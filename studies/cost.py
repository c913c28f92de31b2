"""Parameters and multiply-adds of every method and of its baseline, at the paper's size.

    python -m studies.cost            # ResNet-50, one 800x1333 image, 80 classes; no data, no GPU
    python -m studies.cost d2det --backbone resnet101

A prediction is counted with random weights and a score threshold of 0, so that as many boxes go
through each head as the method allows. Convolutions and matrix products count, as PyTorch's counter
sees them, and a deformable convolution as a plain one of its size; pooling, NMS and elementwise
operations do not. Prints a table, writes OUT/cost.json.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from common import BadInput
from engine.checkpoints import write_json
from engine.detector import build_detector
from studies.checkpoint import (
    BASELINES,
    PAPERS,
    read_options,
    reported,
    results_folder,
    script_of,
    settings_of,
)


@dataclass
class CostOptions:
    methods: Annotated[tuple[Literal[PAPERS], ...], tyro.conf.Positional] = PAPERS  # which ones
    image: tuple[int, int] = (800, 1333)  # height and width of the image
    out: str = "runs/cost"  # results folder


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter of operations, extended by deformable convolutions."""

    def forward(x, weight, *others, out_shape, **options):  # all of them shapes
        return conv_flop_count(x, weight, out_shape)

    def backward(out, x, weight, *others, **options):
        return 2 * conv_flop_count(x, weight, out)

    ops = torch.ops.torchvision
    known = {ops.deform_conv2d: forward, ops._deform_conv2d_backward: backward}
    return FlopCounterMode(display=False, custom_mapping=known)


def cost(name: str, flags: list[str], size: tuple[int, int]) -> tuple[float, float]:
    """Millions of parameters and 10^9 multiply-adds of a prediction, under these flags."""
    settings = settings_of(name, ["--preset", "paper", *flags])
    torch.manual_seed(0)
    model = build_detector(script_of(name).Detector, settings.model.without_download(), 80).eval()
    test = dataclasses.replace(settings.test, score_threshold=0.0)
    with torch.no_grad(), flop_counter() as counter:
        model.predict([torch.randint(0, 256, (3, *size), dtype=torch.uint8)], test)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return parameters, counter.get_total_flops() / 2e9


def main(argv=None) -> dict[str, dict]:
    with reported():
        options, flags = read_options("cost", CostOptions, __doc__, argv)
        if min(options.image) < 32:
            raise BadInput(f"--image {options.image}: at least 32")
        out = results_folder(options.out)
        costs = {}
        print("| | parameters, M | multiply-adds, G | over the baseline |")
        print("|---|---|---|---|")
        for name in options.methods:
            base = cost(name, [*BASELINES[name], *flags], options.image)
            own = cost(name, flags, options.image)
            more = f"{own[0] - base[0]:+.1f} M, {own[1] - base[1]:+.0f} G"
            for label, numbers, extra in ((f"{name}, baseline", base, ""), (name, own, more)):
                print(f"| {label} | {numbers[0]:.1f} | {numbers[1]:.0f} | {extra} |", flush=True)
                costs[label] = dict(zip(("million_parameters", "giga_multiply_adds"), numbers))
        write_json(out / "cost.json", costs)
        return costs


if __name__ == "__main__":
    main()
