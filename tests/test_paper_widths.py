"""Every method at the paper's widths, initial values and rate: its first steps go downhill.

Small presets hide what only wide heads do: a box branch that dies in the first update. What costs
time and does not matter for that is small: the backbone is ResNet-18, RoIs are few, and two images
of 96 px have an object each (in smaller ones P7 has no anchor to train). Every step has the first
one's RoIs, so that totals can be compared, and do not depend on a CPU's last bits.
"""

import pytest
import torch
from methods import keep_rois

import cpm_rcnn
import d2det
import dc_loss_clnms
import double_head
import iou_aware_retinanet
from data import SyntheticDetection
from engine.loader import to_device
from engine.train import learning_rate, make_optimizer

METHODS = [d2det, double_head, cpm_rcnn, iou_aware_retinanet, dc_loss_clnms]
SMALL = dict(backbone="resnet18", backbone_weights="none", workers=0)
FEW = dict(roi_samples=4, roi_positive=0.25, proposals_train=100)
IMAGES = (8, 16)  # an arc and a star, 31 to 60 px a side
WARMUP = 10  # steps: the first rate is the paper's, the next ones are larger: few steps show it


def first_steps(method, steps, patch):
    """Sum of losses, gradient norm and silent weights of each step on the same two images."""
    torch.manual_seed(0)
    settings = method.Settings()
    few = {k: v for k, v in FEW.items() if hasattr(settings.model, k)}
    settings = settings.replace(**SMALL, **few, warmup=WARMUP)
    model, run = method.Detector(settings.model, 10).train(), settings.run
    keep_rois(model, patch)
    data = SyntheticDetection(max(IMAGES) + 1, 96)
    images, targets = to_device([data[i] for i in IMAGES], "cpu")
    optimizer, history = make_optimizer(model, run), []
    for step in range(steps):
        torch.manual_seed(0)
        losses = model.loss(images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        names, weights = zip(*model.named_parameters())
        norms = torch.stack(torch._foreach_norm([p.grad for p in weights]))
        # one set of DRP's weights a pyramid level, and a level may have no RoI
        silent = [n for n, x in zip(names, norms) if not n.startswith("drp.") and not x > 0]
        if run.clip_norm:
            torch.nn.utils.clip_grad_norm_(weights, run.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run, step, 90_000, len(IMAGES))
        optimizer.step()
        history.append((sum(losses.values()).item(), norms.norm().item(), silent))
    return zip(*history)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_first_steps_go_downhill(method, monkeypatch):
    totals, norms, silent = first_steps(method, 7, monkeypatch)
    assert max(norms) < 1000
    assert not any(silent[1:])  # in the first step all that stands behind a zero is silent
    assert sum(totals[-2:]) < sum(totals[:2])
