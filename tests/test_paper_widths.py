"""Every method at the paper's widths, initial values, rate and warm-up: its first steps go downhill.

Small presets hide what only wide heads do: a box branch that dies in the first update. The
backbone is ResNet-18 at 160 px and RoIs are few, so that a step takes about a second.
"""

import dataclasses

import pytest
import torch

import common
import cpm_rcnn
import d2det
import dc_loss_clnms
import double_head
import iou_aware_retinanet

METHODS = [d2det, double_head, cpm_rcnn, iou_aware_retinanet, dc_loss_clnms]
SMALL = dict(backbone="resnet18", backbone_weights="none", workers=0)
FEW = dict(roi_samples=4, roi_positive=0.5, proposals_train=100)
STEPS = 30


def first_steps(method, **changes):
    """Sum of losses, gradient norm and silent weights of each of 30 steps on the same four images."""
    torch.manual_seed(0)
    config = method.Config(**SMALL)
    few = {k: v for k, v in FEW.items() if hasattr(config, k)}
    config = dataclasses.replace(config, **few, **changes)
    model = method.Detector(config, 10).train()
    data = common.SyntheticDetection(4, 160)
    images, targets = common.to_device([data[i] for i in range(4)], "cpu")
    optimizer, history = common.make_optimizer(model, config), []
    for step in range(STEPS):
        losses = model.loss(images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        limit = config.clip_norm or torch.inf
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        silent = [
            name
            for name, p in model.named_parameters()
            # one set of DRP's weights a pyramid level, and a level may have no RoI
            if not name.startswith("drp.") and not p.grad.abs().sum() > 0
        ]
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(config, step, 90_000, 4)
        optimizer.step()
        history.append((sum(losses.values()).item(), norm.item(), silent))
    return zip(*history)


@pytest.mark.parametrize("warmup", ["paper", "ten steps"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_first_steps_go_downhill(method, warmup):
    totals, norms, silent = first_steps(method, **({} if warmup == "paper" else {"warmup": 10}))
    assert max(norms) < 1000
    assert not any(silent[1:])  # in the first step all that stands behind a zero is silent
    assert sum(totals[-5:]) < sum(totals[:5])
