"""What the releases decide: the backbone's BatchNorm, and which anchors are always positive."""

import pytest
import torch

import cpm_rcnn
import d2det
import dc_loss_clnms
import double_head
import iou_aware_retinanet
from baselines import cascade_rcnn, faster_rcnn, gfl, retinanet
from data import make_target


@pytest.mark.parametrize(
    "script,choices,norm,floor",
    [
        (d2det, {}, "eval_bn", 0.3),
        (retinanet, {}, "eval_bn", None),
        (iou_aware_retinanet, {}, "eval_bn", None),
        (gfl, {}, "eval_bn", None),
        (dc_loss_clnms, {}, "eval_bn", None),
        (dc_loss_clnms, {"base": "gfl"}, "eval_bn", None),
        (double_head, {}, "auto", 0.0),  # auto: frozen whole
        (cpm_rcnn, {}, "auto", 0.0),
        (cpm_rcnn, {"base": "cascade"}, "auto", 0.0),
        (cascade_rcnn, {}, "auto", 0.0),
        (faster_rcnn, {}, "auto", 0.0),
    ],
)
def test_defaults_are_the_releases(script, choices, norm, floor):
    settings = script.Settings(**choices)
    assert settings.model.norm == norm
    assert getattr(settings.model, "rpn_floor", None) == floor


def test_older_files_keep_what_they_were_trained_with():
    """They name a norm, "auto", but no floor, which was 0.3."""
    saved = double_head.Settings().to_dict()
    assert double_head.Settings.from_dict(saved).model.rpn_floor == 0
    del saved["model"]["rpn_floor"]
    assert double_head.Settings.from_dict(saved).model.rpn_floor == 0.3
    flat = {k: v for k, v in d2det.Settings().flat().items() if k != "rpn_floor"}
    older = d2det.Settings.from_dict({**flat, "norm": "auto"}).model
    assert (older.norm, older.rpn_floor) == ("auto", 0.3)


@pytest.mark.parametrize("floor,positives", [(0.0, 1), (0.3, 0)])
def test_an_object_that_no_anchor_fits_trains_the_rpn_without_floor(floor, positives):
    """Of a long thin object the best anchor has an IoU of about 0.1."""
    torch.manual_seed(0)
    rpn = faster_rcnn.RPN(8, floor=floor)
    output = rpn([torch.rand(1, 8, 256 // s, 256 // s) for s in rpn.strides])
    sizes = torch.tensor([[256.0, 256]])
    box = torch.tensor([[8.0, 100, 248, 104]])
    objects = make_target(box, [0], [False], image_id=0, size=(256, 256))
    losses = rpn.loss(output, sizes, [objects])
    assert (losses["rpn_box"] > 0) == positives
