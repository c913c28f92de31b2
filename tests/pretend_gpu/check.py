"""Detectors on the pretended GPU beside the CPU: `run.py check.py CASE...` prints JSON lines.

A case is one of tests/test_contract.py. Compared are a step in float32 (losses, gradients) and its
predictions, and losses under bf16, on the RoIs of the step in float32: a last bit may decide which
are drawn. Counted are waits of the host and mixed operators, by place.
"""

import copy
import json
import sys
import time
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from methods import batch  # noqa: E402
from mode import on_cpu  # noqa: E402
from test_contract import made  # noqa: E402

from baselines import faster_rcnn  # noqa: E402
from engine.loader import to_device  # noqa: E402
from engine.processes import autocast  # noqa: E402


def step(model, items, amp: str, mode):
    """The losses, and the gradients by name; the mode has counted them alone."""
    device = next(model.parameters()).device
    images, targets = to_device(items, device)
    torch.manual_seed(1)
    model.train().zero_grad()
    mode.forget()
    with autocast(amp, device):
        losses = model.loss(images, targets)
    sum(losses.values()).backward()
    mode.counting = False
    grads = {k: on_cpu(p.grad) for k, p in model.named_parameters() if p.grad is not None}
    return {k: v.item() for k, v in losses.items()}, grads


def predictions(model, images, mode):
    model.eval()
    device = next(model.parameters()).device
    images = [image.to(device) for image in images]
    mode.forget()
    with autocast("off", device):
        found = model.predict(images)
    mode.counting = False
    return [{k: on_cpu(v) for k, v in one.items()} for one in found]


def difference(a: dict, b: dict) -> float:
    """The largest relative difference of tensors of the same names; infinite for other names.

    Relative to a thousandth of the largest tensor at least: a bias before a norm has no gradient.
    """
    if a.keys() != b.keys() or any(a[k].shape != b[k].shape for k in a):
        return float("inf")
    least = 1e-3 * max(a[k].double().norm() for k in a)
    return max(
        float((a[k].double() - b[k].double()).norm() / a[k].double().norm().clamp(min=least))
        for k in a
    )


def check(mode, case: str) -> dict:
    start = time.perf_counter()
    model = made(case, norm="frozen_bn", drp_per_level=True, pool_norm=False)  # as in the paper
    gpu = copy.deepcopy(model).cuda()
    images, targets = batch(2, 64)
    items = [*zip(images, targets)]
    wanted, wanted_grads = step(model, items, "off", mode)
    drawn, draw = [], faster_rcnn.sample_rois

    def record(*args, **options):
        drawn.append(draw(*args, **options))
        return drawn[-1]

    with mock.patch.object(faster_rcnn, "sample_rois", record):
        losses, grads = step(gpu, items, "off", mode)
    result = dict(
        case=case,
        losses=max(abs(losses[k] - wanted[k]) / abs(wanted[k] or 1) for k in wanted),
        gradients=difference(wanted_grads, grads),
        step_waits=dict(mode.waits),
    )
    want = predictions(model, images, mode)
    found = predictions(gpu, images, mode)
    result["predict_waits"] = dict(mode.waits)
    result["found"] = sum(len(one["boxes"]) for one in want)
    result["predictions"] = max(difference(*pair) for pair in zip(want, found))
    with mock.patch.object(faster_rcnn, "sample_rois", lambda *_, **__: drawn.pop(0)):
        bf16, _ = step(gpu, items, "bf16", mode)
    result["mixed"] = dict(mode.mixed)
    result["bf16"] = {k: abs(bf16[k] - wanted[k]) / sum(wanted.values()) for k in wanted}
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(json.dumps(check(sys.pretended_gpu, name)), flush=True)
