"""Parameters and multiply-adds of every method and of its baseline, at the paper's size.

    python docs/cost.py            # ResNet-50, one image of 800x1333, 80 classes; no data, no GPU

A prediction is counted with a score threshold of 0 and random weights: as many boxes go through
each head as the method lets through. Convolutions and matrix products count, as PyTorch's counter
sees them; pooling, NMS and elementwise operations do not.
"""

from __future__ import annotations

import importlib
from dataclasses import replace

import torch
from compare import BASELINES
from torch.utils.flop_counter import FlopCounterMode


def cost(method, argv: list[str]) -> tuple[float, float]:
    """Millions of parameters and 10^9 multiply-adds of a prediction, under these flags."""
    import common

    config = common.parse(method.Config, method.ROWS, method.TINY, "cost", ["--bench", *argv])
    config = replace(config, backbone_weights="random", score_threshold=0.0)
    torch.manual_seed(0)
    model = method.Detector(config, 80).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.predict([torch.randint(0, 256, (3, 800, 1333), dtype=torch.uint8)])
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return parameters, counter.get_total_flops() / 2e9


def main():
    print("| | parameters, M | multiply-adds, G | over the baseline |")
    print("|---|---|---|---|")
    for name, flags in BASELINES.items():
        method = importlib.import_module(name)
        base, own = cost(method, flags), cost(method, [])
        more = f"{own[0] - base[0]:+.1f} M, {own[1] - base[1]:+.0f} G"
        for label, numbers, extra in ((f"{name}, baseline", base, ""), (name, own, more)):
            print(f"| {label} | {numbers[0]:.1f} | {numbers[1]:.0f} | {extra} |")


if __name__ == "__main__":
    main()
