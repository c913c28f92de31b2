"""studies.question: what is kept follows from the scores of the ten boxes."""

from pathlib import Path

import pytest
import torch
from methods import make, small, sure
from torchvision.ops import box_iou

import cpm_rcnn
import d2det
import double_head
import iou_aware_retinanet
from common import BadInput
from data import SyntheticDetection
from studies import question
from studies.checkpoint import Study

SIZES = dict(image_size=64, scales=(64,), test_scales=(64,), max_size=64)


@pytest.fixture(scope="module")
def studies():
    """Four networks that have learned nothing, but are sure of something."""
    models = [
        sure(make(iou_aware_retinanet, score_threshold=0.0, **SIZES)).eval(),
        small(double_head, conv_channels=16, score_threshold=0.01, **SIZES),
        small(cpm_rcnn, point_channels=2, num_convs=1, grid_test=100, **SIZES),
        small(d2det, conv_channels=16, num_convs=2, groups=4, reg_test=100, **SIZES),
    ]
    torch.nn.init.normal_(models[0].head.iou_logits.weight, std=0.5)
    data = SyntheticDetection(4, 64)
    names = ("iou_aware_retinanet", *question.TWO_STAGES)
    return {
        name: Study(model, model.full_settings, data.categories, "last.pt", Path("."), data)
        for name, model in zip(names, models)
    }


def test_what_is_kept(studies, tmp_path):
    image, gt, found, kept = question.look(studies, 1, 0)
    boxes, p, q = found["boxes"], found["cls_probs"], found["iou_probs"]
    assert 2 <= len(boxes) <= 10 and p.tolist() == sorted(p.tolist(), reverse=True)
    assert len(found["labels"].unique()) == 1
    assert (box_iou(boxes, boxes) - torch.eye(len(boxes))).max() <= 0.85
    assert box_iou(boxes, gt[None]).min() > 0.3
    plain, aware, central, *moved = kept
    assert plain.number == 0 and aware.number == (p * q).argmax() > 0
    assert all(torch.equal(one.box, boxes[one.number]) for one in (plain, aware, central))
    assert [one.method for one in moved] == ["Double-Head", "CPM R-CNN", "D2Det"]
    assert not any(torch.equal(one.box, boxes[one.number]) for one in moved)
    question.draw(tmp_path / "question.png", image, gt, found, kept)
    assert (tmp_path / "question.png").stat().st_size > 50_000


def test_an_object_that_is_not_there(studies):
    with pytest.raises(BadInput, match="--object 99: there are"):
        question.look(studies, 1, 99)


def test_what_is_missing_ends_with_a_reason(tmp_path, capsys):
    with pytest.raises(SystemExit):
        question.main(runs=f"{tmp_path}")
    assert "iou_aware_retinanet/last.pt" in capsys.readouterr().err
