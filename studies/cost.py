"""How many parameters and multiply-adds has a method, beside its baseline?

    python -m studies.cost            # ResNet-50, one 800x1333 image, 80 classes; no data
    python -m studies.cost d2det --backbone resnet101

Prints a table and writes OUT/cost.json. A prediction is counted with random weights and a
score threshold of 0, so each head gets as many boxes as the method allows. PyTorch counts
convolutions and matrix products; a deformable convolution counts as a plain one of its size.
Pooling, NMS and elementwise operations do not count.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import tyro
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from common import BadInput
from engine.settings import Settings
from studies.checkpoint import (
    BASELINES,
    PAPERS,
    random_detector,
    read_options,
    reported,
    results_folder,
    write_results,
)


@dataclass
class CostOptions:
    methods: Annotated[tuple[Literal[PAPERS], ...], tyro.conf.Positional] = PAPERS
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


def cost(model: nn.Module, settings: Settings, size: tuple[int, int]) -> dict[str, float]:
    """Parameters and multiply-adds of a prediction in one image of `size` (h, w)."""
    test = dataclasses.replace(settings.test, score_threshold=0.0)
    with torch.no_grad(), flop_counter() as counter:
        model.eval().predict([torch.randint(0, 256, (3, *size), dtype=torch.uint8)], test)
    return {
        "million_parameters": sum(p.numel() for p in model.parameters()) / 1e6,
        "giga_multiply_adds": counter.get_total_flops() / 2e9,
    }


def main(argv=None) -> dict[str, dict]:
    with reported():
        options, flags = read_options("cost", CostOptions, __doc__, argv)
        if min(options.image) < 32:
            raise BadInput(f"--image {options.image}: at least 32")
        out = results_folder(options.out)
        costs = {}
        print("| | parameters, M | multiply-adds, G | over the baseline |\n|---|---|---|---|")
        for name in options.methods:
            base = cost(*random_detector(name, [*BASELINES[name], *flags]), options.image)
            own = cost(*random_detector(name, flags), options.image)
            parameters, multiply_adds = (own[key] - base[key] for key in own)
            more = f"{parameters:+.1f} M, {multiply_adds:+.0f} G"
            for label, found, extra in ((f"{name}, baseline", base, ""), (name, own, more)):
                counts = "{:.1f} | {:.0f}".format(*found.values())
                print(f"| {label} | {counts} | {extra} |", flush=True)
                costs[label] = found
        write_results(out / "cost.json", costs)
        return costs


if __name__ == "__main__":
    main()
