"""IoU-aware RetinaNet: its equations by hand, and what a whole step must satisfy."""

import copy
import doctest
import math

import pytest
import torch
import torchvision
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
    check_resume,
    check_row,
    check_variants,
    make,
    own_flags,
    settings_of,
    sure,
)

import common
import engine
import iou_aware_retinanet as method
import kernels
from baselines import faster_rcnn, gfl, retinanet
from baselines.faster_rcnn import Rois
from baselines.retinanet import box_loss, count_positives, match_anchors
from engine.checkpoints import start_from
from engine.command import read_rows
from engine.train import learning_rate
from iou_aware_retinanet import Settings

ROWS, _ = read_rows("iou_aware_retinanet")


def test_examples_in_docstrings():
    assert doctest.testmod(method).attempted >= 4 and doctest.testmod(method).failed == 0


def test_aligned_iou_against_torchvision():
    corner = torch.rand(2, 300, 2) * 20
    boxes, gts = torch.cat([corner, corner + torch.rand(2, 300, 2) * 20], -1)
    want = torchvision.ops.box_iou(boxes, gts)
    torch.testing.assert_close(common.aligned_iou(boxes, gts), want.diagonal())
    torch.testing.assert_close(common.aligned_iou(boxes[:, None], gts), want)
    box = torch.tensor([0.0, 0, 10, 10], requires_grad=True)
    common.aligned_iou(box, torch.tensor([0.0, 0, 20, 10])).backward()
    assert box.grad[2] == pytest.approx(0.05)  # IoU = x2 / 20
    assert common.aligned_iou(torch.zeros(4), torch.zeros(4)) == 0


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


def test_losses_of_a_positive_by_hand():
    """Anchor 20x10, unmoved; its gt is its middle half: IoU 1/2, dw log 1/2, the rest 0."""
    anchor, gt = torch.tensor([[0.0, 0, 20, 10]]), torch.tensor([[5.0, 0, 15, 10]])
    deltas, logit = torch.zeros(1, 4, requires_grad=True), torch.zeros(1)
    box = box_loss(deltas, anchor, gt, num_positives=2)
    assert box.item() == pytest.approx((math.log(2) - 0.055) / 2)
    boxes = common.decode_boxes(anchor, deltas)
    loss = method.iou_branch_loss(logit, boxes, gt, num_positives=2)
    assert loss.item() == pytest.approx(math.log(2) / 2)
    loss = method.iou_branch_loss(logit + 1, boxes, gt, num_positives=2)
    (grad,) = torch.autograd.grad(loss, deltas)
    # IoU = 10 / w there: its slope in dw is -1/2, the loss's in the IoU is -logit / num = -1/2
    assert grad[0, 2].item() == pytest.approx(1 / 4)
    still = method.iou_branch_loss(logit + 1, boxes, gt, move_boxes=False)
    assert not still.requires_grad
    assert method.iou_branch_loss(logit[:0], boxes[:0], gt[:0]) == 0 == box_loss(*[gt[:0]] * 3)


def test_the_iou_branch_on_its_own_is_the_heads():
    head, maps = method.IoUAwareHead(8, 9, 3), [torch.rand(2, 8, 4, 6), torch.rand(2, 8, 2, 3)]
    branch = method.IoUBranch(8, 9)
    assert branch.weight.std().item() == pytest.approx(0.01, rel=0.2) and (branch.bias == 0).all()
    branch.load_state_dict(head.iou_logits.state_dict())
    assert torch.equal(branch([head.box_tower(m) for m in maps]), head(maps)[2])
    with torch.no_grad():
        branch.weight.zero_()
        branch.bias.copy_(torch.arange(9))
    assert branch(maps)[1].tolist() == [*range(9)] * 30  # in each cell anchor by anchor


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.5, 1.0), (0.25, 0.0)])
def test_focal_loss_over_several_chunks(alpha, gamma):
    logits = torch.randn(60_000, 5, requires_grad=True)
    labels = torch.randint(-1, 6, (60_000,))
    onehot = torch.nn.functional.one_hot(labels.clamp(0), 6)[:, :5].float()
    want = torchvision.ops.sigmoid_focal_loss(logits, onehot, alpha, gamma).sum(1) * (labels >= 0)
    scale = torch.rand(60_000)
    ours = kernels.focal_loss(logits, labels, alpha, gamma)
    torch.testing.assert_close(ours, want)
    grads = [torch.autograd.grad((v * scale).sum(), logits)[0] for v in (ours, want)]
    torch.testing.assert_close(*grads)
    assert torch.equal(kernels.focal_loss(logits.detach(), labels, alpha, gamma), ours.detach())
    assert kernels.focal_loss(logits[:0], labels[:0]).shape == (0,)


def test_focal_loss_of_sure_positives_is_exact():
    """DC loss divides by it: nothing may cancel where p is near 1."""
    logits = torch.full((11, 80), -20.0)
    logits[:, 3] = torch.arange(11)
    labels = torch.full((11,), 3)
    found = kernels.focal_loss(logits, labels)
    torch.testing.assert_close(
        found.double(), kernels.focal_loss(logits.double(), labels), rtol=1e-4, atol=0
    )


def test_assignment_by_hand():
    """One image padded to 64x64, one gt on a third of an anchor, one crowd; a gt keeps its best."""
    anchors = torch.tensor([[0.0, 0, 20, 20], [0, 0, 20, 12], [40, 40, 60, 60], [20, 0, 40, 20]])
    target = dict(
        boxes=torch.tensor([[0.0, 0, 20, 8], [20, 0, 40, 20]]), labels=torch.tensor([3, 5]),
        ignore=torch.tensor([False, True]),
    )  # fmt: skip
    found = match_anchors(anchors, torch.tensor([[48.0, 48]]), [target])
    # IoU 0.4: ignored; 2/3: positive; outside the image; in a crowd
    assert found.labels.tolist() == [[-1, 1, -1, -1]] and found.gt_labels[0, 1] == 3
    assert found.gt[0, 1] == 0 and found.gt_boxes[0, 1].tolist() == [0, 0, 20, 8]
    assert found.classes(10).tolist() == [[-1, 3, -1, -1]]
    target["boxes"][0] = torch.tensor([0.0, 0, 20, 2])  # IoU 1/10 and 1/6
    found = match_anchors(anchors, torch.tensor([[64.0, 64]]), [target])
    assert found.labels.tolist() == [[0, 1, 0, -1]]
    assert found.classes(10).tolist() == [[10, 3, 10, -1]]
    assert count_positives(torch.tensor([[1, 1, 0], [0, 0, -1]])) == 3


def test_padding_and_crowds_do_not_train():
    """A gt's best anchor is one in the image; who meets only a crowd is given no gt."""
    anchors = torch.tensor([[40.0, 0, 60, 20], [30, 0, 50, 20]])  # the first's centre is outside
    target = dict(
        boxes=torch.tensor([[42.0, 0, 48, 4]]),
        labels=torch.tensor([3]),
        ignore=torch.tensor([False]),
    )
    assert common.aligned_iou(anchors, target["boxes"]).tolist() == pytest.approx([0.06, 0.06])
    assert match_anchors(anchors, torch.tensor([[48.0, 48]]), [target]).labels.tolist() == [[-1, 1]]
    target["ignore"][0] = True
    found = match_anchors(anchors, torch.tensor([[48.0, 48]]), [target])
    assert found.labels.tolist() == [[-1, 0]] and found.gt_boxes.abs().sum() == 0


def test_candidates_equal_fusing_everything():
    model, (images, _) = make(method, alpha=0.3, top_scores=50, score_threshold=0.2).eval(), batch()
    out = model.outputs([images[0], images[1][:, :60, :70]])
    out["cls_logits"] = torch.randn_like(out["cls_logits"])
    out["iou_logits"] = torch.randn_like(out["iou_logits"])
    found = model.candidates(out, model.full_settings.test)
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


@pytest.mark.parametrize("row", [*ROWS])
def test_every_row_builds_and_trains(row):
    check_row(method, row)


def test_images_without_objects_train_and_every_weight_learns():
    check_gradients(method)


def test_an_image_that_is_all_crowd_trains():
    check_all_crowd(make(method))


@pytest.mark.parametrize("p2", [False, True])
def test_a_batch_of_two_equals_two_singles(p2):
    check_batch_equals_singles(make(method, p2=p2))


def test_one_pass_serves_every_alpha():
    check_variants(method, [dict(alpha=0.2), dict(alpha=1.0), dict(product=True)])


def test_one_image_can_be_overfitted():
    model = make(method, fpn_channels=32)
    images, objects = check_overfits(model, 1, 150, 0.8, to_the_end=True)
    found = model.candidates(model.outputs(images), model.full_settings.test)
    iou = torchvision.ops.box_iou(found["boxes"], objects).amax(1)
    sure = found["cls_probs"] > 0.3
    assert iou[sure].min() > 0.9 and found["iou_probs"][sure].mean() > 0.8  # it started at 0.5


# ------------------------------------------------------------------------------ other classes


OLD = [dict(id=i, name=name) for i, name in enumerate(("cat", "dog", "hen", "ox"))]
NEW = [dict(id=i, name=name) for i, name in enumerate(("bee", "ox", "cat"))]


def started(script, **sizes):
    """A model of the classes OLD; one of NEW that starts from its weights; how that one was."""
    torch.manual_seed(0)
    settings = settings_of(script, fpn_channels=16, **sizes).model
    old, new = (script.Detector(settings, len(names)).eval() for names in (OLD, NEW))
    for p in old.parameters():  # biases differ by class, too
        p.data += 0.05 * torch.randn_like(p)
    untouched = copy.deepcopy(new)
    state = dict(model=old.state_dict(), categories=OLD)
    start_from(new, state, "old.pt", NEW, script.Detector)
    return old, new, untouched


@pytest.mark.parametrize("script", [retinanet, method, gfl])
def test_fine_tuning_keeps_classes_of_the_same_name(script):
    """On one's own maps, as they depend on no class: ox and cat as before, bee as it starts."""
    old, new, untouched = started(script)
    before, after = (model.outputs(batch(1)[0]) for model in (old, new))
    for name in {"deltas", "iou_logits", "bin_logits"} & before.keys():
        assert torch.equal(before[name], after[name])
    torch.testing.assert_close(after["cls_logits"][..., 1:], before["cls_logits"][..., [3, 0]])
    new.head.cls_logits = untouched.head.cls_logits
    anew = new.outputs(batch(1)[0])["cls_logits"][..., 0]
    torch.testing.assert_close(after["cls_logits"][..., 0], anew)


@pytest.mark.parametrize("shared", [True, False])
def test_fine_tuning_of_faster_rcnn_keeps_logits_deltas_and_background(shared):
    old, new, untouched = started(faster_rcnn, fc_channels=32, shared=shared)
    maps = [torch.rand(1, 16, 32 // 2**i, 32 // 2**i) for i in range(5)]
    rois = Rois(torch.zeros(2).long(), torch.tensor([[8.0, 8, 60, 40], [20, 20, 90, 100]]))
    (logits, deltas), (new_logits, new_deltas) = (m.head(maps, rois) for m in (old, new))
    torch.testing.assert_close(new_logits[:, 1:], logits[:, [3, 0, 4]])  # the last is background
    kept = deltas.unflatten(1, (4, 4))[:, [3, 0]]
    torch.testing.assert_close(new_deltas.unflatten(1, (3, 4))[:, 1:], kept)
    assert torch.equal(new.classify[-1].weight[0], untouched.classify[-1].weight[0])


# ------------------------------------------------------------------------------ flags, command line

N = 118_287  # images of COCO's train2017
SMALL_SIZE = ((600,), (600,), 1000)
LARGE_SIZE = ((800,), (800,), 1333)


@pytest.mark.parametrize(
    "row, backbone, images, head, product, alpha, steps, drops",
    [
        ("table1.retinanet_x101", "resnext101_32x8d", LARGE_SIZE, False, False, 0.5, 88715, 2 / 3),
        ("table1.r101", "resnet101", LARGE_SIZE, True, False, 0.5, 88715, 2 / 3),
        ("table2.baseline", "resnet50", SMALL_SIZE, False, False, 0.5, 88715, 2 / 3),
        ("table2.bce", "resnet50", SMALL_SIZE, True, True, 0.5, 88715, 2 / 3),
        ("table3.alpha_0.4", "resnet50", SMALL_SIZE, True, False, 0.4, 88715, 2 / 3),
        ("table4.none", "resnet50", SMALL_SIZE, True, True, 0.5, 88715, 2 / 3),
        ("table5.r101", "resnet101", SMALL_SIZE, True, False, 0.5, 88715, 2 / 3),
    ],
)  # fmt: skip
def test_rows_are_the_papers_experiments(row, backbone, images, head, product, alpha, steps, drops):
    settings = Settings().replace(**ROWS[row])
    model, test, run, data = settings.model, settings.test, settings.run, settings.data
    assert (model.backbone, model.iou_head, test.product) == (backbone, head, product)
    assert (data.scales, test.test_scales, data.max_size) == images
    assert (test.alpha, run.lr, run.lr_batch) == (alpha, 0.01, 16)
    assert round(run.epochs * N / 16) == steps and run.drops[0] == pytest.approx(drops)


@pytest.mark.parametrize("row", ["retinanet_r50", "retinanet_r101", "r50", "r101"])
def test_voc_rows_follow_the_releases_schedule(row):
    """12 epochs, the rate 0.0075 for 12 images falls after 8 and 11 of them."""
    run, steps = Settings().replace(**ROWS[f"table5.{row}"]).run, 12 * 1379
    assert run.epochs == 12 and 1379 == 16_551 // 12
    rates = [learning_rate(run, e * 1379, steps, 12) for e in (1, 7, 8, 10, 11)]
    assert rates == pytest.approx([0.0075, 0.0075, 0.00075, 0.00075, 0.000075])


CHANGED = dict(
    iou_head=False, iou_loss="l2", iou_grad=False, iou_weight=2.0, cls_weight=2.0, box_weight=2.0,
    alpha=0.8, product=True, focal_alpha=0.5, focal_gamma=0.5, box_beta=0.5, fg_iou=0.6, bg_iou=0.3,
    tower_convs=2, tower_groups=4, anchor_scale=3.0, score_threshold=0.9, top_scores=5, nms_iou=0.2,
    max_detections=3, p2=True,
)  # fmt: skip


def test_every_flag_is_covered():
    assert own_flags(method) == {*CHANGED, "all_classes"} - engine.Settings().flat().keys()


def test_all_classes():
    check_all_classes(method)


def test_p2_halves_every_stride():
    images, counts = batch(1, 64)[0], []
    for p2, strides in (False, (8, 16, 32, 64, 128)), (True, (4, 8, 16, 32, 64)):
        model = make(method, p2=p2, anchor_scale=3.0)
        out = model.outputs(images)
        assert model.backbone.strides == strides
        counts += [out["per_level"]]
        assert out["anchors"].shape[0] == out["deltas"].shape[1] == sum(out["per_level"])
        square = (out["anchors"][3, 2:] - out["anchors"][3, :2]).tolist()
        assert square == pytest.approx([3 * strides[0]] * 2)
    assert counts[1][1:4] == counts[0][:3] and counts[1][0] == 9 * 16 * 16


@pytest.fixture(scope="module")
def known():
    assert behaviour(sure(make(method))) == behaviour(sure(make(method)))
    return behaviour(sure(make(method)))


@pytest.mark.parametrize("flag", list(CHANGED))
def test_flag_changes_the_run(known, flag):
    assert behaviour(sure(make(method, **{flag: CHANGED[flag]}))) != known


def test_the_command_line(tmp_path, monkeypatch):
    check_command_line(method, RUN, tmp_path)
    check_resume(method, RUN, tmp_path / "resumed", monkeypatch)


def test_real_data(detection_data, tmp_path):
    check_real_data(method, REAL, detection_data / "bccd", tmp_path)
