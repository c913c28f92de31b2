"""IoU-aware RetinaNet: its equations by hand, and what a whole step must satisfy."""

import doctest
import json
import math

import pytest
import torch
import torchvision
from one_stage import (
    RUN,
    batch,
    behaviour,
    check_batch_equals_singles,
    check_gradients,
    check_real_data,
    check_resume,
    check_row,
    make,
    overfitted,
    own_flags,
    sure,
)

import common
import iou_aware_retinanet as method
from iou_aware_retinanet import Config


def test_examples_in_docstrings():
    assert doctest.testmod(method).attempted >= 5 and doctest.testmod(method).failed == 0


def test_aligned_iou_against_torchvision():
    corner = torch.rand(2, 300, 2) * 20
    boxes, gts = torch.cat([corner, corner + torch.rand(2, 300, 2) * 20], -1)
    want = torchvision.ops.box_iou(boxes, gts)
    torch.testing.assert_close(method.aligned_iou(boxes, gts), want.diagonal())
    torch.testing.assert_close(method.aligned_iou(boxes[:, None], gts), want)
    box = torch.tensor([0.0, 0, 10, 10], requires_grad=True)
    method.aligned_iou(box, torch.tensor([0.0, 0, 20, 10])).backward()
    assert box.grad[2] == pytest.approx(0.05)  # IoU = x2 / 20
    assert method.aligned_iou(torch.zeros(4), torch.zeros(4)) == 0


@pytest.mark.parametrize(
    "kind, want, slope",  # of logit log 3 (predicted IoU 3/4) and true IoU 1/2; slope in the latter
    [
        ("bce", -0.5 * math.log(3 / 4) - 0.5 * math.log(1 / 4), -math.log(3)),
        ("l2", 1 / 16, -1 / 2),
        ("l1", 1 / 4, -1),
        ("smooth_l1", 1 / 4 - 0.11 / 2, -1),
    ],
)
def test_iou_losses_by_hand(kind, want, slope):
    iou = torch.tensor([0.5], requires_grad=True)
    loss = method.iou_prediction_loss(torch.tensor([math.log(3)]), iou, kind)
    assert loss.item() == pytest.approx(want)
    loss.sum().backward()
    assert iou.grad.item() == pytest.approx(slope)
    near = method.iou_prediction_loss(torch.tensor([0.0]), torch.tensor([0.45]), "smooth_l1")
    assert near.item() == pytest.approx(0.05**2 / 0.22)


def test_detection_confidence():
    p, iou = torch.rand(1000), torch.rand(1000)
    p[0] = iou[1] = 0
    assert torch.equal(method.detection_confidence(p, iou, 1.0), p)  # exactly the class score
    assert torch.equal(method.detection_confidence(p, iou, 0.0), iou)
    assert torch.equal(method.detection_confidence(p, iou, None), p * iou)
    root = method.detection_confidence(p, iou, 0.5)  # "none" ranks as alpha = 0.5 does
    torch.testing.assert_close(root**2, p * iou)
    by_hand = method.detection_confidence(torch.tensor(0.81), torch.tensor(0.16), 0.25)
    assert by_hand.item() == pytest.approx(0.81**0.25 * 0.16**0.75)


def test_correlation():
    x = torch.tensor([0.0, 1, 2, 3])
    assert common.correlation(x, -2 * x) == dict(pearson=-1, spearman=-1)
    assert common.correlation(x, x**3)["pearson"] == pytest.approx(27 / math.sqrt(5 * 165.98), 0.1)
    assert common.correlation(x[:1], x[:1]) == dict(pearson=None, spearman=None)
    assert common.correlation(x, x * 0)["pearson"] is None


def test_positive_losses_by_hand():
    """Anchor 20x10, unmoved; its gt is its middle half: IoU 1/2, dw log 1/2, the rest 0."""
    anchor, gt = torch.tensor([[0.0, 0, 20, 10]]), torch.tensor([[5.0, 0, 15, 10]])
    deltas, logit = torch.zeros(1, 4, requires_grad=True), torch.zeros(1)
    losses = method.positive_losses(deltas, logit, anchor, gt, 2.0, Config())
    assert losses["box"].item() == pytest.approx((math.log(2) - 0.055) / 2)
    assert losses["iou"].item() == pytest.approx(math.log(2) / 2)
    loss = method.positive_losses(deltas, logit + 1, anchor, gt, 2.0, Config())["iou"]
    (grad,) = torch.autograd.grad(loss, deltas)
    # IoU = 10 / w there: its slope in dw is -1/2, the loss's in the IoU is -logit / num = -1/2
    assert grad[0, 2].item() == pytest.approx(1 / 4)
    still = method.positive_losses(deltas, logit + 1, anchor, gt, 2.0, Config(iou_grad=False))
    assert not still["iou"].requires_grad


def test_focal_loss_over_several_chunks():
    logits = torch.randn(60_000, 5, requires_grad=True)
    labels = torch.randint(-1, 6, (60_000,))
    onehot = torch.nn.functional.one_hot(labels.clamp(0), 6)[:, :5].float()
    want = torchvision.ops.sigmoid_focal_loss(logits, onehot, 0.25, 2.0).sum(1) * (labels >= 0)
    scale = torch.rand(60_000)
    ours = common.focal_loss(logits, labels)
    torch.testing.assert_close(ours, want)
    grads = [torch.autograd.grad((v * scale).sum(), logits)[0] for v in (ours, want)]
    torch.testing.assert_close(*grads)
    assert torch.equal(common.focal_loss(logits.detach(), labels), ours.detach())
    assert common.focal_loss(logits[:0], labels[:0]).shape == (0,)


def test_assignment_by_hand():
    """One image padded to 64x64, one gt on a third of an anchor, one crowd; a gt keeps its best."""
    anchors = torch.tensor([[0.0, 0, 20, 20], [0, 0, 20, 12], [40, 40, 60, 60], [20, 0, 40, 20]])
    target = dict(
        boxes=torch.tensor([[0.0, 0, 20, 8], [20, 0, 40, 20]]), labels=torch.tensor([3, 5]),
        ignore=torch.tensor([False, True]),
    )  # fmt: skip
    labels, boxes, classes = common.match_anchors(anchors, torch.tensor([[48.0, 48]]), [target])
    # IoU 0.4: ignored; 2/3: positive; outside the image; in a crowd
    assert labels.tolist() == [[-1, 1, -1, -1]] and classes[0, 1] == 3
    assert boxes[0, 1].tolist() == [0, 0, 20, 8]
    target["boxes"][0] = torch.tensor([0.0, 0, 20, 2])  # IoU 1/10 and 1/6
    labels, _, _ = common.match_anchors(anchors, torch.tensor([[64.0, 64]]), [target])
    assert labels.tolist() == [[0, 1, 0, -1]]
    assert common.count_positives(torch.tensor([[1, 1, 0], [0, 0, -1]])) == 3


def test_select_equals_fusing_everything():
    model, (images, _) = make(method, alpha=0.3, top_scores=50, score_threshold=0.2).eval(), batch()
    out = model.outputs([images[0], images[1][:, :60, :70]])
    out["cls_logits"] = torch.randn_like(out["cls_logits"])
    out["iou_logits"] = torch.randn_like(out["iou_logits"])
    found = model.select(out, model.config)
    p, iou = out["cls_logits"].sigmoid(), out["iou_logits"].sigmoid()[..., None]
    fused = p**0.3 * iou**0.7  # every class of every anchor
    fused[~common.inside_image(out["anchors"], out["sizes"])] = 0
    first, want = 0, []
    for n in out["per_level"]:
        level = fused[:, first : first + n]
        best = level.flatten(1).topk(min(10 * n, 50), dim=1)[0]
        want.append(best[best > 0.2])
        first += n
    want = torch.cat(want).sort()[0]
    torch.testing.assert_close(found["scores"].sort()[0], want)
    again = method.detection_confidence(found["cls_probs"], found["iou_probs"], 0.3)
    torch.testing.assert_close(again, found["scores"])


def test_alpha_one_gives_exactly_the_baselines_detections():
    model, baseline = (
        make(method, alpha=1.0, score_threshold=0.005),
        make(method, iou_head=False, score_threshold=0.005),
    )
    left = baseline.load_state_dict(model.state_dict(), strict=False)
    assert not left.missing_keys and {k.split(".")[1] for k in left.unexpected_keys} == {
        "iou_logits"
    }
    images, targets = batch()
    found, want = model.eval().predict(images), baseline.eval().predict(images)
    assert sum(len(w["scores"]) for w in want) > 20
    for ours, theirs in zip(found, want):
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert set(baseline.loss(images, targets)) == {"cls", "box"}


@pytest.mark.parametrize("row", [*method.ROWS])
def test_every_row_builds_and_trains(row):
    check_row(method, row)


def test_images_without_objects_train_and_every_weight_learns():
    check_gradients(method)


def test_a_batch_of_two_equals_two_singles():
    check_batch_equals_singles(make(method))


def test_one_image_can_be_overfitted():
    model, images = overfitted(method)
    assert model.candidates(images)["iou_probs"].max() > 0.8  # it knows how well its boxes lie


# ------------------------------------------------------------------------------ flags, command line

CHANGED = dict(
    iou_head=False, iou_loss="l2", iou_grad=False, iou_weight=2.0, cls_weight=2.0, box_weight=2.0,
    alpha=0.8, product=True, focal_alpha=0.5, focal_gamma=1.0, box_beta=0.5, fg_iou=0.6, bg_iou=0.3,
    tower_convs=2, anchor_scale=3.0, score_threshold=0.9, top_scores=5, nms_iou=0.2, max_detections=3,
)  # fmt: skip


def test_every_flag_is_covered():
    assert own_flags(method) == set(CHANGED) | {"sweep_alpha", "analyze"}  # see the command line


@pytest.fixture(scope="module")
def known():
    assert behaviour(method) == behaviour(method)
    return behaviour(method)


@pytest.mark.parametrize("flag", list(CHANGED))
def test_flag_changes_the_run(known, flag):
    assert behaviour(method, **{flag: CHANGED[flag]}) != known


def test_the_command_line(tmp_path, monkeypatch):
    metrics, where = check_resume(method, tmp_path, monkeypatch)
    actions = ["--eval", "--predict", f"{tmp_path}/a.png", "--sweep-alpha", "--analyze"]
    assert method.main([*RUN, *actions, *where]) == metrics
    names = {p.name for p in (tmp_path / "c").iterdir()}
    assert {"pictures", "sweep_alpha.png", "analyze.png", "predictions.json"} <= names
    sweep = json.loads((tmp_path / "c" / "sweep_alpha.json").read_text())
    assert len(sweep) == 12 and sweep["0.5"] == metrics  # one pass gives what --eval gives
    found = json.loads((tmp_path / "c" / "analyze.json").read_text())
    assert found["metrics"]["class score"] == sweep["1.0"]  # nothing but the order differs
    assert found["metrics"]["oracle"]["AP"] >= found["metrics"]["class score"]["AP"]
    assert 0 < found["matched"] < found["candidates"]


def test_actions_without_an_iou_head(tmp_path):
    model, data = sure(make(method, iou_head=False)), common.SyntheticDetection(3, 64)
    with pytest.raises(common.BadInput, match="needs a model with an IoU head"):
        method.sweep_alpha(model, data, model.config, "cpu", tmp_path)
    found = method.analyze(model, data, model.config, torch.device("cpu"), tmp_path)
    assert set(found["metrics"]) == {"class score", "oracle"} and "fused" not in found
    assert found["class score"]["all"]["pearson"] is not None


@pytest.mark.parametrize("name", ["bccd", "coco_tiny"])
def test_real_data(detection_data, tmp_path, name):
    check_real_data(method, detection_data / name, tmp_path, "--analyze")
    assert (tmp_path / "analyze.json").exists()
