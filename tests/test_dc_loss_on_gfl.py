"""DC loss and CL-NMS on GFL (`--base gfl`): what the coefficient weighs, whose settings count."""

import copy

import pytest
import torch
import torch.nn.functional as F
from methods import (
    RUN,
    behaviour,
    check_all_crowd,
    check_command_line,
    every_size,
    make,
    own_flags,
    sure,
    without_objects,
)

import common
import dc_loss_clnms as method
import engine
from baselines import gfl
from baselines.retinanet import Positives
from engine.command import parse

ON_GFL = dict(base="gfl", iac=False)
PLAIN = dict(ON_GFL, dc_loss=False, nms="plain")


def test_without_the_proposals_it_is_gfl():
    """Losses and detections to the last bit; a copy is of the same class."""
    model = make(method, **PLAIN)
    assert behaviour(sure(make(gfl))) == behaviour(sure(model))
    assert type(copy.deepcopy(model)) is type(model) is method.OnGFL


def test_dc_loss_keeps_the_total_and_changes_the_gradient():
    images, targets = every_size()
    settings = [dict(dc_loss=False), {}, dict(gfl_dc="class"), dict(dc_normalise=False)]
    models = [sure(make(method, **ON_GFL, **c)) for c in settings]
    losses = [m.loss(images, targets) for m in models]
    for other in losses[1:3]:
        assert other["cls"].item() == pytest.approx(losses[0]["cls"].item(), rel=1e-5)
        assert other["box"] == losses[0]["box"] and other["dfl"] == losses[0]["dfl"]
    assert abs(losses[3]["cls"] / losses[0]["cls"] - 1) > 1e-3
    grads = [
        torch.autograd.grad(v["cls"], m.head.cls_logits.weight, retain_graph=True)[0]
        for m, v in zip(models, losses)
    ]
    for i in range(3):
        for j in range(i):
            assert (grads[i] - grads[j]).norm() > 1e-5 * grads[0].norm()  # most is of negatives
    # the coefficient is a constant, and so is the target: the class loss does not move the boxes
    for m, v in zip(models, losses):
        assert torch.autograd.grad(v["cls"], m.head.bin_logits.weight, allow_unused=True) == (None,)


@pytest.mark.parametrize("changes", [{}, dict(gfl_dc="class"), dict(iac=True)])
def test_images_without_objects_train_and_every_weight_learns(changes):
    model, (images, targets) = make(method, **(ON_GFL | changes)), every_size()
    sum(model.loss(images, targets).values()).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    losses = model.loss(images, without_objects(targets))
    assert losses["cls"] > 0 and losses["box"] == losses["dfl"] == 0
    check_all_crowd(model)


@pytest.mark.parametrize("form", ["anchor", "class"])
def test_what_the_coefficient_weighs(form):
    """Two positives of e = 0 and 0.15, so that lambda is 10 and 4; other anchors as they are."""
    gts = torch.tensor([[0.0, 0, 10, 10]]).repeat(2, 1)
    points = torch.tensor([[5.0, 5.0, 5.0]]).repeat(2, 1)
    sides = torch.tensor([[1.0, 1, 1, 1], [1.0, 1, 1.2, 1]])
    bins = (1 - (sides[..., None] - torch.arange(17)).abs()).clamp(min=1e-9).log()
    logits, labels = torch.tensor([[0.3, -1.0], [2.0, 0.1]]), torch.tensor([0, 1])
    index = (torch.tensor([0, 0]), torch.tensor([0, 2]))
    model = make(method, **ON_GFL, dc_normalise=False, gfl_dc=form)
    boxes = gfl.decode_distances(points, bins)
    positives = Positives(index, logits, boxes, labels, gts, labels)
    iou = common.aligned_iou(boxes, gts)
    assert iou.tolist() == pytest.approx([1, 100 / 110], rel=1e-5)
    losses = gfl.quality_focal_loss(logits, labels, iou)
    own, target = logits[[0, 1], labels], iou
    own = (own.sigmoid() - target) ** 2 * F.binary_cross_entropy_with_logits(
        own, target, reduction="none"
    )
    rest = losses - own
    found = model.weigh(torch.stack([losses[0], torch.tensor(3.0), losses[1]])[None], positives)
    share = torch.tensor([10.0, 4.0])
    want = share * losses if form == "anchor" else share * own + rest
    assert (rest > 0.01).all() and found[0, 1] == 3
    torch.testing.assert_close(found[0, [0, 2]], want, rtol=1e-4, atol=1e-5)


def parsed(*flags):
    return parse("dc_loss_clnms", method.Settings, [*flags, "--out", "there"])[1]


@pytest.mark.parametrize("preset", ["paper", "tiny"])
@pytest.mark.parametrize("flags", [("--base", "gfl"), ("--row", "extra.gfl_dc_cl")])
def test_the_base_brings_its_settings(preset, flags):
    """The same in Python as on the command line: those of GFL, the schedule of the paper."""
    ours, its = method.Settings(base="gfl"), gfl.Settings()
    assert (type(ours.model), type(ours.test)) == (method.ModelOnGFL, method.TestOnGFL)
    if preset == "tiny":
        ours, its = ours.replace(**ours.tiny), its.replace(**gfl.TINY)
    found = parsed("--preset", preset, *flags, "--max-detections", "7")
    assert found == ours.replace(max_detections=7, out="there")
    found, its = found.flat(), its.flat()
    shared = own_flags(gfl) | engine.Settings().flat().keys()
    schedule = {"epochs", "drops"} if preset == "paper" else {"drops"}  # tiny follows a cosine
    assert {k for k in shared if found[k] != its[k]} == {"max_detections", "out", *schedule}
    assert (found["iac"], found["dc_loss"], found["nms"]) == (False, True, "cl")
    assert found["epochs"] == (12.17 if preset == "paper" else its["epochs"])


def test_what_is_given_stays_as_it_is():
    model, test = method.ModelOnGFL(dc_eps=1.0), method.TestOnGFL(nms="soft")
    settings = method.Settings(base="gfl", model=model, test=test)
    assert settings.model is model and settings.test is test and settings.run.clip_norm == 0
    assert settings.replace(nms_iou=0.3).flat() == {**settings.flat(), "nms_iou": 0.3}
    assert method.Settings.from_dict(settings.to_dict()) == settings
    with pytest.raises(common.BadInput, match="--base retinanet: its model is not a ModelOnGFL"):
        method.Settings(model=model).replace(nms_iou=0.3)


@pytest.mark.parametrize(
    "row, dc_loss, nms",
    [("table1.gfl_x101_dcn", False, "plain"), ("table1.fcos_gfl_x101_dcn", True, "cl")],
)
def test_the_last_rows_of_table_1(row, dc_loss, nms):
    settings = parsed("--preset", "paper", "--row", row)
    model, test, run = settings.model, settings.test, settings.run
    assert (settings.base, model.dc_loss, model.iac, test.nms) == ("gfl", dc_loss, False, nms)
    assert (model.backbone, model.dcn) == ("resnext101_32x4d", "v2")
    assert settings.data.scales == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert run.epochs * 118_287 / 16 == pytest.approx(180_000, rel=1e-3)
    assert run.drops == (135 / 180, 150 / 180) and test.test_scales == (800,)
    assert (test.nms_iou, model.box_weight, run.lr) == (0.6, 2.0, 0.01)


def test_the_command_line_of_dc_loss_on_gfl(tmp_path):
    check_command_line(method, RUN, tmp_path, "--base", "gfl")
