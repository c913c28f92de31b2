"""DC loss, IAC score and CL-NMS: the formulas by hand, and what a whole step must satisfy."""

import dataclasses
import doctest

import pytest
import torch
from methods import (
    REAL,
    RUN,
    batch,
    behaviour,
    check_all_classes,
    check_all_crowd,
    check_batch_equals_singles,
    check_command_line,
    check_gradients,
    check_overfits,
    check_real_data,
    check_row,
    check_variants,
    make,
    own_flags,
    sure,
)

import common
import dc_loss_clnms as method
import engine
import kernels
from baselines import gfl
from baselines.retinanet import Positives
from dc_loss_clnms import Settings, Test
from engine.command import read_rows

ROWS, _ = read_rows("dc_loss_clnms")
OFF = dict(dc_loss=False, iac=False, nms="plain")


def test_examples_in_docstrings():
    assert doctest.testmod(method).attempted >= 6 and doctest.testmod(method).failed == 0


def test_error_and_coefficient_by_hand():
    """gt 40x10 at (0, 0); the box is moved by (6, 8), 8 wider, 5 lower."""
    gt = torch.tensor([[0.0, 0, 40, 10]])
    box = torch.tensor([[26.0 - 24, 13 - 2.5, 26 + 24, 13 + 2.5]])
    e = 10 / 20 + 8 / 40 + 5 / 10
    assert method.localisation_error(box, gt).item() == pytest.approx(e)
    assert method.localisation_error(box, gt, "pixels").item() == pytest.approx(10 + 8 + 5)
    assert method.dynamic_coefficient(box, gt).item() == pytest.approx(1 / (e + 0.1))
    assert method.dynamic_coefficient(gt, gt, eps=0.5).item() == pytest.approx(2)
    scaled = method.localisation_error(box * 7, gt * 7)  # free of scale, unlike pixels
    assert scaled.item() == pytest.approx(e, rel=1e-5)
    wrong = [gt + torch.tensor([0.0, 0, d, 0]) for d in (0, 1, 5, 50)]
    values = [method.dynamic_coefficient(b, gt).item() for b in wrong]
    assert values == sorted(values, reverse=True)  # a worse box: a smaller class gradient
    assert method.dynamic_coefficient(gt, torch.zeros(1, 4)).isfinite()


def test_normalised_coefficients_keep_the_total():
    losses, coefficient = torch.rand(500, dtype=torch.float64) * 3, torch.rand(500).double() * 10
    scaled = method.normalise_coefficient(coefficient, losses)
    assert (scaled * losses).sum().item() == pytest.approx(losses.sum().item(), rel=1e-12)
    torch.testing.assert_close(scaled / scaled[0], coefficient / coefficient[0])
    assert method.normalise_coefficient(coefficient[:0], losses[:0]).shape == (0,)


def test_the_models_loss_total_equals_the_plain_one_but_not_its_gradient():
    models = [
        make(method, **{**OFF, **c})
        for c in ({}, dict(dc_loss=True), dict(dc_loss=True, dc_normalise=False))
    ]
    images, targets = batch()
    losses = [m.loss(images, targets) for m in models]
    assert losses[1]["cls"].item() == pytest.approx(losses[0]["cls"].item(), rel=1e-5)
    assert losses[1]["box"] == losses[0]["box"]
    assert abs(losses[2]["cls"] / losses[0]["cls"] - 1) > 0.01
    grads = [
        torch.autograd.grad(v["cls"], m.head.cls_logits.weight)[0] for m, v in zip(models, losses)
    ]
    assert (grads[1] - grads[0]).norm() > 0.01 * grads[0].norm()
    # the coefficient is a constant: the class loss does not move the boxes
    loss, weight = models[1].loss(images, targets)["cls"], models[1].head.box_deltas.weight
    assert torch.autograd.grad(loss, weight, allow_unused=True) == (None,)


def test_weights_by_hand():
    """Two positives: one box perfect (lambda 10), one with e = 0.1 (lambda 5)."""
    focal = torch.tensor([[0.5, 3, 0.25, 9]])
    gt, none = torch.tensor([[0.0, 0, 10, 10]]).repeat(2, 1), torch.zeros(2, dtype=torch.long)
    boxes = gt + torch.tensor([[0.0, 0, 0, 0], [-0.5, 0, 0.5, 0]])
    index = (torch.tensor([0, 0]), torch.tensor([0, 2]))
    positives = Positives(index, torch.zeros(2, 10), boxes, none, gt, none)
    plain = make(method, dc_normalise=False)
    torch.testing.assert_close(plain.coefficients(focal[index], positives), torch.tensor([10.0, 5]))
    found = plain.weigh(focal, positives)  # negatives count as they are
    torch.testing.assert_close(found, torch.tensor([[5.0, 3, 1.25, 9]]))
    found = make(method).weigh(focal, positives)  # the positives' total stays
    scale = 0.75 / (5 + 1.25)
    torch.testing.assert_close(found, torch.tensor([[5 * scale, 3, 1.25 * scale, 9]]))
    assert make(method, dc_loss=False).weigh(focal, positives) is focal


def test_iac_score_by_hand():
    gt = torch.tensor([0.0, 0, 40, 10])
    anchors = torch.tensor(
        [[10.0, 0, 20, 10], [35, 5, 45, 15], [-10, -10, 60, 60], [50, 0, 60, 10]]
    )
    p = torch.tensor([0.5, 0.9, 0.3, 1.0])
    ratio = torch.tensor([1.0, 0.25, 1.0, 0.0])  # inside, a quarter inside, around, apart
    product = p**0.75 * ratio**0.25
    torch.testing.assert_close(method.iac_score(p, anchors, gt), product)
    added = (0.75 * p + 0.25 * ratio) * torch.tensor([1.0, 1, 1, 0])
    torch.testing.assert_close(method.iac_score(p, anchors, gt, form="sum"), added)
    assert (method.iac_score(p, anchors, torch.zeros(4)) == 0).all()  # an image without gts
    # inside its gt an anchor is positive from p = 0.5^(4/3) on, or by the sum from 1/3 on
    p = torch.tensor([0.396, 0.398, 0.33, 0.34])
    found = [method.iac_score(p, gt, gt, form=form) > 0.5 for form in ("product", "sum")]
    assert found[0].tolist() == [False, True, False, False]
    assert found[1].tolist() == [True, True, False, True]


def test_a_threshold_that_no_score_exceeds_is_exactly_the_plain_assignment():
    images, targets = batch(4)
    settings = (OFF, dict(OFF, iac=True, iac_threshold=1.0), dict(OFF, iac=True))
    plain, never, often = (sure(make(method, **s)) for s in settings)
    out = plain.outputs(images)
    want, found, more = (m.assign(out, targets) for m in (plain, never, often))
    assert all(torch.equal(vars(want)[k], vars(found)[k]) for k in vars(want))
    assert plain.loss(images, targets) == never.loss(images, targets)
    changed = want.labels != more.labels
    assert changed.any() and (more.labels[changed] == 1).all()  # it only adds positives
    assert {0, -1} == set(want.labels[changed].tolist())  # from negatives and from ignored ones
    anchors, gt_boxes = out["anchors"][changed.nonzero()[:, 1]], more.gt_boxes[changed]
    overlap = torch.minimum(anchors[:, 2:], gt_boxes[:, 2:])
    overlap -= torch.maximum(anchors[:, :2], gt_boxes[:, :2])
    assert (overlap > 0).all()  # none that its gt does not touch
    small = [images[0][:, :40, :40], images[1]]  # anchors in the padding stay out
    out = often.outputs(small)
    labels = often.assign(out, targets[:2]).labels
    assert (labels[~common.inside_image(out["anchors"], out["sizes"])] == -1).all()


@pytest.mark.parametrize("literal, count", [(False, 300), (True, 100)])
def test_cl_nms_agrees_with_the_text_on_hundreds_of_cases(literal, count):
    torch.manual_seed(0)
    sizes = torch.randint(1, 9, (count,))
    groups = torch.arange(count).repeat_interleave(sizes)
    corner = torch.rand(len(groups), 2, dtype=torch.float64) * 8
    boxes = torch.cat([corner, corner + 6 + torch.rand(len(groups), 2).double() * 8], 1)
    scores = torch.rand(len(groups), dtype=torch.float64)
    keep, own = kernels.cl_nms(boxes, scores, groups, 0.5, literal=literal)
    assert torch.equal(own, scores[keep]) and (own.diff() <= 0).all()
    want, best_first = [], []
    for case in range(count):
        (members,) = (groups == case).nonzero(as_tuple=True)
        kept = method.cl_nms_of_one_class(boxes[members], scores[members], 0.5, literal)
        want += members[kept].tolist()
        best_first += [keep[groups[keep] == case].tolist()]
    assert sum(best_first, []) == want
    together = method.readable_cl_nms(boxes, scores, groups, 0.5, literal)
    assert torch.equal(together[0], keep) and torch.equal(together[1], own)


@pytest.mark.parametrize("changes", [{}, dict(cl_literal=True), dict(base="gfl")])
def test_readable_detections_are_the_kernels(changes):
    model = sure(make(method, score_threshold=0.6, max_detections=1000, **changes)).eval()
    (images, _), test = batch(), model.full_settings.test
    found = model.predict(images, dataclasses.replace(test, readable=True))
    plain = model.predict(images, dataclasses.replace(test, nms="plain"))
    for want, readable, other in zip(model.predict(images), found, plain, strict=True):
        assert len(want["boxes"]) > 15 and want.keys() == readable.keys()
        assert all(torch.equal(want[k], readable[k]) for k in want)
        assert not torch.equal(want["scores"], other["scores"])


def test_cl_nms_of_isolated_boxes_equals_nms_and_of_clusters_does_not():
    found, model = {}, make(method)
    corner = torch.arange(20.0)[:, None] * 30 + torch.rand(20, 2)
    alone = torch.cat([corner, corner + 20], 1)
    # three boxes on one object: the surest lies farthest from their centre
    crowd = torch.tensor([[0.0, 0, 20, 20], [3, 3, 23, 23], [4, 4, 24, 24]])
    surest = torch.tensor([0.7, 0.69, 0.68])
    for name, boxes, scores in (("alone", alone, torch.rand(20)), ("crowd", crowd, surest)):
        same = torch.zeros(len(boxes), dtype=torch.long)
        candidates = dict(boxes=boxes, scores=scores, labels=same, image=same)
        for nms in ("plain", "cl", "soft"):
            found[name, nms] = model.detections(candidates, 1, Test(nms=nms, nms_iou=0.4))[0]
    for key in ("boxes", "scores"):
        assert torch.equal(found["alone", "plain"][key], found["alone", "cl"][key])
    assert found["crowd", "plain"]["boxes"].tolist() == [[0, 0, 20, 20]]
    assert found["crowd", "cl"]["boxes"].tolist() == [[3, 3, 23, 23]]
    assert found["crowd", "cl"]["scores"].item() == pytest.approx(0.69)  # its own p
    assert len(found["crowd", "soft"]["boxes"]) == 3


@pytest.mark.parametrize("row", [*ROWS])
def test_every_row_builds_and_trains(row):
    check_row(method, row)


def test_images_without_objects_train_and_every_weight_learns():
    check_gradients(method)


def test_an_image_that_is_all_crowd_trains():
    check_all_crowd(make(method))


def test_a_batch_of_two_equals_two_singles():
    check_batch_equals_singles(make(method, dc_normalise=False))  # whose mean is over the batch


def test_one_pass_serves_every_nms():
    check_variants(method, [dict(nms=nms) for nms in ("plain", "soft", "cl")])


def test_a_crowd_alone_makes_no_positive():
    model, (images, targets) = make(method), batch(1)
    torch.nn.init.constant_(model.head.cls_logits.bias, 1.0)  # sure of everything
    crowd = [{**t, "ignore": torch.ones_like(t["ignore"])} for t in targets]
    out = model.outputs(images)
    assert (model.assign(out, targets).labels == 1).sum() > 100
    assert (model.assign(out, crowd).labels < 1).all()


N = 118_287  # images of COCO's train2017
PLAIN, STEP = dict(iac=False, dc_loss=False, nms="plain"), dict(dc_loss=False, nms="plain")


@pytest.mark.parametrize(
    "row, backbone, switches, steps, images, side",
    [
        ("table1.r101", "resnet101", {}, 180_000, N, 800),
        ("table1.retinanet_x101", "resnext101_32x8d", PLAIN, 180_000, N, 800),
        ("table2.baseline", "resnet50", PLAIN, 90_000, N, 800),
        ("table2.iac", "resnet50", STEP, 90_000, N, 800),
        ("table2.iac_dc", "resnet50", dict(nms="plain"), 90_000, N, 800),
        ("table2.voc_iac_dc_cl", "resnet50", {}, 12_000, 16_551, 600),
        ("table3.r101_soft", "resnet101", dict(PLAIN, nms="soft"), 90_000, N, 800),
    ],
)
def test_rows_are_the_papers_experiments(row, backbone, switches, steps, images, side):
    found = Settings().replace(**ROWS[row]).flat()
    wanted = dict(iac=True, dc_loss=True, nms="cl") | switches
    wanted |= dict(backbone=backbone, scales=(side,), test_scales=(side,))
    wanted |= dict(drops=(0.75, 75 / 90) if images == N else (0.75,))
    assert {k: found[k] for k in wanted} == wanted
    assert found["epochs"] * images / 16 == pytest.approx(steps, rel=1e-3)


def test_one_image_can_be_overfitted():
    check_overfits(make(method, fpn_channels=32), 2, 150, 0.8)


# ------------------------------------------------------------------------------ flags, command line

CHANGED = dict(
    dc_loss=False, dc_error="pixels", dc_eps=1.0, dc_normalise=False, iac=False, iac_alpha=0.4,
    iac_threshold=0.7, iac_form="sum", nms="plain", nms_iou=0.3, cl_literal=True, soft_nms_iou=0.2,
    soft_nms_score=0.9, cls_weight=2.0, box_weight=2.0, focal_alpha=0.5, focal_gamma=0.5,
    box_beta=0.5, fg_iou=0.6, bg_iou=0.3, tower_convs=2, tower_groups=4, anchor_scale=3.0,
    score_threshold=0.95, top_scores=5, max_detections=3, p2=True,
)  # fmt: skip


def test_every_flag_is_covered():
    elsewhere = {*own_flags(gfl), "base", "gfl_dc", "readable"}  # test_gfl.py, above
    assert own_flags(method) == {*CHANGED, *elsewhere} - engine.Settings().flat().keys()


def test_all_classes():
    check_all_classes(method)


@pytest.fixture(scope="module")
def known():
    assert behaviour(sure(make(method))) == behaviour(sure(make(method)))
    return {nms: behaviour(sure(make(method, nms=nms))) for nms in ("cl", "soft")}


@pytest.mark.parametrize("flag", list(CHANGED))
def test_flag_changes_the_run(known, flag):
    nms = "soft" if "soft" in flag else "cl"
    assert behaviour(sure(make(method, **{"nms": nms, flag: CHANGED[flag]}))) != known[nms]


def test_the_command_line(tmp_path):
    check_command_line(method, RUN, tmp_path)


def test_real_data(detection_data, tmp_path):
    check_real_data(method, REAL, detection_data / "coco_tiny", tmp_path)
