"""D2Det: its equations by hand, its heads, and what a whole step must satisfy."""

import dataclasses
import doctest
import functools
import math
import os

import pytest
import torch
from methods import (
    SMALL_D2DET,
    batch,
    build,
    check_all_crowd,
    metrics_of,
    overfit,
    settings_of,
    small,
    without_objects,
)

import common
import d2det
import kernels
from baselines import faster_rcnn
from baselines.faster_rcnn import Rois, class_box_loss
from d2det import D2Det, Settings, Test
from data import SyntheticDetection
from engine.command import read_rows

ROWS, _ = read_rows("d2det")


def make(**changes):
    torch.manual_seed(0)
    return build(d2det, settings_of(d2det, **{**SMALL_D2DET, **changes}))


def rois_of(*boxes):
    """RoIs in the first image."""
    return Rois(torch.zeros(len(boxes), dtype=torch.long), torch.tensor(boxes).float())


def some_boxes(n, seed=0):
    torch.manual_seed(seed)
    corner = torch.rand(n, 2) * 50
    return torch.cat([corner, corner + 5 + torch.rand(n, 2) * 60], 1)


def test_examples_in_docstrings():
    assert doctest.testmod(d2det).attempted >= 5 and doctest.testmod(d2det).failed == 0
    assert doctest.testmod(common).failed == 0


def test_targets_by_hand():
    """A 70x140 proposal at (10, 20): bins of 10x20 px, first centre (15, 30)."""
    proposal, gt = torch.tensor([[10.0, 20, 80, 160]]), torch.tensor([[24.0, 20, 80, 132]])
    offsets, inside = d2det.dense_offset_targets(proposal, gt, margin=0.0)
    assert offsets.shape == (1, 4, 7, 7) and inside.shape == (1, 1, 7, 7)
    # l = (15 - 24) / 70, t = (30 - 20) / 140, r = (80 - 15) / 70, b = (132 - 30) / 140
    want = torch.tensor([-9 / 70, 10 / 140, 65 / 70, 102 / 140])
    torch.testing.assert_close(offsets[0, :, 0, 0], want)
    # row 2, column 5: centre (65, 70); x runs along the last dimension
    want = torch.tensor([41 / 70, 50 / 140, 15 / 70, 62 / 140])
    torch.testing.assert_close(offsets[0, :, 2, 5], want)
    # centres inside the gt: columns 1..6 (x > 24), rows 0..5 (y < 132)
    assert inside[0, 0].sum() == 36 and inside[0, 0, :6, 1:].all()
    # a sixth of the proposal from every side: x in [35.7, 68.3], y in [43.3, 108.7]
    _, inside = d2det.dense_offset_targets(proposal, gt)
    assert inside[0, 0].nonzero().tolist() == [[r, c] for r in (1, 2, 3) for c in (3, 4, 5)]


def test_targets_and_decode_are_inverse():
    proposals, gts = some_boxes(200), some_boxes(200, seed=1)
    offsets, inside = d2det.dense_offset_targets(proposals, gts)
    cells = d2det.cell_boxes(proposals, offsets)
    torch.testing.assert_close(cells, gts[..., None, None].expand_as(cells), atol=1e-3, rtol=0)
    for logits in (inside - 0.5, torch.full_like(inside, -1)):  # also with no cell at all
        for decode in (d2det.decode, kernels.decode_dense_offsets):
            torch.testing.assert_close(decode(proposals, offsets, logits), gts, atol=1e-3, rtol=0)


def test_the_kernel_is_the_equation():
    """decode in plain torch, and the kernel, of cells that disagree; some proposals without any."""
    proposals = some_boxes(300)
    offsets, logits = torch.rand(300, 4, 7, 7), torch.randn(300, 1, 7, 7)
    logits[::3] -= 9
    plain = d2det.decode(proposals, offsets, logits)
    torch.testing.assert_close(
        kernels.decode_dense_offsets(proposals, offsets, logits), plain, atol=1e-3, rtol=0
    )
    others = d2det.decode(proposals, offsets, -logits)
    assert ((others - plain).abs().amax(1) > 1).float().mean() > 0.5


def test_only_cells_on_the_object_are_averaged():
    proposals, gts = some_boxes(50), some_boxes(50, seed=1)
    gts[:, :2] = torch.maximum(gts[:, :2], proposals[:, :2])
    offsets, inside = d2det.dense_offset_targets(proposals, proposals, margin=0.2)
    spoiled = torch.where(inside > 0, offsets, torch.rand_like(offsets) * 9)
    decoded = kernels.decode_dense_offsets(proposals, spoiled, inside - 0.5)
    torch.testing.assert_close(decoded, proposals, atol=1e-3, rtol=0)
    off = kernels.decode_dense_offsets(proposals, spoiled, torch.ones_like(inside))
    assert (off - proposals).abs().max() > 1


def test_losses_by_hand():
    """Proposal 14x14, gt its right part 8..14: 3 of 7 cell columns (centres 9, 11, 13) inside."""
    proposal, gt = torch.tensor([[0.0, 0, 14, 14]]), torch.tensor([[8.0, 0, 14, 14]])
    offsets = torch.full((1, 4, 7, 7), 0.5)  # each cell says: a 14x14 box centred on me
    logits = torch.zeros(1, 1, 7, 7)
    iou = []
    for column in (9, 11, 13):
        for row in range(1, 14, 2):
            w = 14 - max(8, column - 7)
            w = min(w, column + 7 - max(8, column - 7))
            h = min(14, row + 7) - max(0, row - 7)
            iou.append(w * h / (196 + 84 - w * h))
    losses = d2det.dense_losses(offsets, logits, proposal, gt, margin=0.0)
    want = sum(-math.log(v if v > 0.1 else v + 0.1) for v in iou) / 49  # of all cells (release)
    assert losses["reg"].item() == pytest.approx(want, rel=1e-5)
    assert losses["overlap"].item() == pytest.approx(math.log(2), rel=1e-5)
    logits[..., 4:] = 2.0  # and the overlap loss knows which columns are inside
    sure, other = math.log1p(math.exp(-2)), math.log(2)
    losses = d2det.dense_losses(offsets, logits, proposal, gt, margin=0.0)
    assert losses["overlap"].item() == pytest.approx((3 * sure + 4 * other) / 7, rel=1e-5)
    everywhere = d2det.dense_losses(offsets, logits, proposal, gt, margin=0.0, cells="all")
    assert everywhere["reg"].item() > want
    halved = d2det.dense_losses(offsets, logits, proposal, gt, margin=0.0, num_rois=2)
    assert halved["reg"].item() == pytest.approx(want / 2, rel=1e-5)


def test_iou_loss_gradient_and_disjoint_boxes():
    box = torch.tensor([[0.0, 0, 10, 10]], requires_grad=True)
    loss = d2det.iou_loss(box, torch.tensor([[0.0, 0, 20, 10]]))
    assert loss.item() == pytest.approx(math.log(2))
    loss.backward()
    assert box.grad[0, 2] == pytest.approx(-0.1)  # d(-log(x2 / 20)) / dx2
    far = d2det.iou_loss(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[5.0, 5, 6, 6]]))
    assert far.item() == pytest.approx(-math.log(0.1 + 1e-6), rel=1e-4)


def test_iou_loss_is_bounded_below_a_tenth():
    """Just above IoU 0.1 it is the logarithm, up to there that of IoU + 0.1 (release)."""
    gt = torch.tensor([[0.0, 0, 100, 10]])
    widths = torch.tensor([10.5, 10.0, 1.0, 0.01])
    boxes = torch.stack([widths * 0, widths * 0, widths, widths * 0 + 10], 1).requires_grad_()
    loss = d2det.iou_loss(boxes, gt.expand(4, 4))
    want = [-math.log(0.105), -math.log(0.2), -math.log(0.11), -math.log(0.1001)]
    assert loss.tolist() == pytest.approx(want, rel=1e-4)
    loss.sum().backward()
    slopes = boxes.grad[:, 2] * 100  # d loss / d IoU = 1 / IoU, then 1 / (IoU + 0.1)
    assert slopes.tolist() == pytest.approx([-1 / 0.105, -5, -1 / 0.11, -1 / 0.1001], rel=1e-3)


def test_baseline_box_loss_by_hand():
    rois = torch.tensor([[0.0, 0, 0, 10, 10], [0, 0, 0, 10, 10]])
    gt = torch.tensor([[1.0, 0, 11, 10], [0, 0, 0, 0]])  # the second is background
    deltas = torch.zeros(2, 12)
    deltas[0, 4:8] = torch.tensor([3.0, 0, 0, 0])  # class 1; dx should be 0.1 / 0.1 = 1
    loss = class_box_loss(deltas, rois, torch.tensor([1, 3]), gt)
    assert loss.item() == pytest.approx(1.5 / 2)


def test_jitter_keeps_to_its_range():
    boxes = torch.tensor([[40.0, 40, 60, 80]]).repeat(5000, 1)
    moved = d2det.jitter_boxes(boxes, 0.15, torch.full((5000, 2), 1000.0))
    shift = (moved[:, :2] + moved[:, 2:]) / 2 - torch.tensor([50.0, 60.0])
    size = (moved[:, 2:] - moved[:, :2]) / torch.tensor([20.0, 40.0])
    assert shift.abs().max(0)[0].tolist() == pytest.approx([3, 6], rel=0.01)
    assert size.min() > 0.85 and size.max() < 1.15 and size.std() > 0.07
    assert torch.equal(d2det.jitter_boxes(boxes, 0.0, torch.full((5000, 2), 1000.0)), boxes)


def test_paper_sized_head_has_the_releases_parameters():
    head = d2det.DenseLocalHead()
    convs = [m for m in head.trunk if isinstance(m, torch.nn.Conv2d)]
    assert [(c.in_channels, c.stride[0], c.groups) for c in convs] == [(256, 2, 1)] + [
        (576, 1, 1)
    ] * 7
    assert all(c.bias is None for c in convs)
    count = sum(p.numel() for p in head.parameters())
    trunk = 9 * 576 * (256 + 7 * 576) + 8 * 2 * 576
    assert count == trunk + 5 * (9 * 576 + 1)
    drp = d2det.DiscriminativePool(256, 1024)
    fc = 2304 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 98 + 98
    assert sum(p.numel() for p in drp.parameters()) == fc + 9 * 256 * 256 + 2 * 256


def test_weighted_pool_starts_as_average_and_prefers_heavy_samples():
    pool = d2det.AdaptiveWeightedPool(3)
    x = torch.rand(2, 3, 14, 14)
    ones = torch.nn.functional.avg_pool2d(torch.ones_like(x), 3, 2, 1)
    torch.testing.assert_close(pool(x), torch.nn.functional.avg_pool2d(x, 3, 2, 1) / ones)
    torch.nn.init.dirac_(pool.conv.weight)  # weight follows the value itself
    heavy = pool(x)
    average = torch.nn.functional.avg_pool2d(x, 3, 2, 1) / ones
    assert (heavy > average).float().mean() > 0.99
    assert (heavy <= torch.nn.functional.max_pool2d(x, 3, 2, 1) + 1e-5).all()
    assert pool(x[:0]).shape == (0, 3, 7, 7)
    plain = d2det.DiscriminativePool(3, 8, weighting=False)  # the ablation: padding does not count
    torch.testing.assert_close(plain.pool(x), average)


@pytest.mark.parametrize("row", [k for k, v in ROWS.items() if not v.get("masks")])
def test_every_row_builds_and_trains(row):
    keep = ("backbone", "dcn", "scales", "test_scales", "max_size")  # sizes stay small here
    changes = {k: v for k, v in ROWS[row].items() if k not in keep}
    model = make(**changes)
    images, targets = batch()
    losses = model.loss(images, targets)
    sum(losses.values()).backward()
    for name, p in model.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name
    assert {"rpn_cls", "rpn_box", "cls", "reg"} <= set(losses)
    for found in model.eval().predict(images):
        assert set(found) == {"boxes", "scores", "labels"}


def test_every_weight_learns():
    """After two steps (some layers start at zero) every trainable tensor has a gradient."""
    model = make(drp_per_level=False)
    images, targets = batch(4)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        sum(model.loss(images, targets).values()).backward()
        optimizer.step()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert not still


def test_rows_run_what_they_name():
    rows = {k: Settings().replace(**v) for k, v in ROWS.items()}
    minival = [r for k, r in rows.items() if k[:6] in ("table2", "table3") and r.model.dlr]
    assert minival and not any(r.test.soft_nms for r in minival)
    r101 = rows["table1.d2det_r101"]
    assert r101.test.soft_nms and r101.model.drp_samples == 1
    assert rows["table2.dlr_no_overlap"].model.reg_cells == "all"
    factors = [rows[k].run.warmup_factor for k in ("table2.baseline", "table2.dlr")]
    assert factors[0] == 1 / 3 != factors[1]
    shared, separate = make(**ROWS["table2.shared"]), make(**ROWS["table2.baseline"])
    assert len([*shared.regress.parameters()]) == 2 and len([*separate.regress.parameters()]) == 6


def test_without_soft_nms_nothing_follows_the_regression():
    """Boxes that DLR moves onto each other all stay (4.1: on minival)."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [1, 0, 11, 10]])
    scores, groups = torch.tensor([0.5, 0.9, 0.7]), torch.zeros(3, dtype=torch.long)
    model, test = make(), Test(soft_nms=False)
    keep, kept = model.suppress(boxes, scores, groups, test)
    assert keep.tolist() == [1, 2, 0] and kept.tolist() == pytest.approx([0.9, 0.7, 0.5])
    views = dataclasses.replace(test, test_flip=True)  # seen twice: merged
    assert model.suppress(boxes, scores, groups, views)[0].tolist() == [1, -1, -1]


@pytest.mark.parametrize("row", ["table2.dlr_drp", "table2.baseline"])
def test_images_without_objects_train(row):
    model, (images, targets) = make(**ROWS[row]), batch()
    losses = model.loss(images, without_objects(targets))
    assert losses["reg"] == 0 and losses["rpn_box"] == 0
    sum(losses.values()).backward()
    assert all(v.isfinite() for v in losses.values())
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert not missing  # DDP waits for every gradient
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_batch_of_two_equals_two_singles():
    model = make(roi_samples=4000, reg_rois=4000, jitter=0.0, proposals_train=30).eval()
    images, targets = batch()
    together = model.predict(images)
    for image, both in zip(images, together):
        (alone,) = model.predict([image])
        torch.testing.assert_close(alone["boxes"], both["boxes"], atol=1e-2, rtol=0)
        torch.testing.assert_close(alone["scores"], both["scores"], atol=1e-4, rtol=0)
        assert torch.equal(alone["labels"], both["labels"])
    features = model.backbone(common.pad_images(images)[0])
    first = model.backbone(common.pad_images(images[:1])[0])
    torch.testing.assert_close(features[0][:1], first[0], atol=1e-4, rtol=1e-4)


def test_predictions_are_inside_sorted_and_few():
    model = make(max_detections=7, score_threshold=0.01).eval()
    images, _ = batch(3)
    for found in model.predict([images[0], images[1][:, :50, :70], images[2]]):
        assert len(found["boxes"]) <= 7
        assert (found["scores"].diff() <= 0).all()
        assert (found["boxes"] >= 0).all() and found["boxes"][:, 2].max() <= 96
    small = model.predict([images[1][:, :50, :70]])[0]["boxes"]
    assert len(small) and small[:, 2].max() <= 70 and small[:, 3].max() <= 50


def test_drp_samples_are_restored_to_the_rois_order():
    """With one set of weights a level, each RoI must get its own level's."""
    model = make(drp_per_level=True, anchor_scale=4.0).eval()
    features = [torch.rand(1, 16, 128 // s, 128 // s) for s in (1, 2, 4, 8)]
    rois = rois_of((0, 0, 500, 500), (10, 10, 40, 40), (0, 0, 200, 200))
    together = model.class_features(features, rois)
    for i in range(3):
        alone = model.class_features(features, rois[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)


@pytest.mark.parametrize(
    "changes", [dict(drp_per_level=b) for b in (False, True)] + [dict(drp=False)]
)
def test_pool_norm_normalises_each_channel_of_each_roi(changes):
    features = [3 + 2 * torch.rand(1, 16, 64 // s, 64 // s) for s in (1, 2, 4, 8)]
    rois = rois_of((0, 0, 200, 200), (10, 10, 40, 40), (30, 5, 90, 60))
    plain, normed = make(**changes, pool_norm=False), make(**changes, pool_norm=True)
    normed.load_state_dict(plain.state_dict())
    for size, pool in (7, D2Det.class_features), (14, lambda m, *a: m.pool(*a, 14)):
        want, found = pool(plain, features, rois), pool(normed, features, rois)
        assert (want.mean((2, 3)) > 3).all()
        want = (want - want.mean((2, 3), keepdim=True)) / want.std((2, 3), False, keepdim=True)
        torch.testing.assert_close(found, want, atol=2e-3, rtol=2e-3)
        assert pool(normed, features, rois[:0]).shape == (0, 16, size, size)


def test_class_outputs_start_at_that_deviation():
    for model in (make(class_std=0.3), small(faster_rcnn, class_std=0.3)):
        assert model.classify[-1].weight.std().item() == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_predictions_are_the_same_with_every_implementation(impl, monkeypatch):
    if impl == "triton" and not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET")):
        pytest.skip("no GPU and no interpreter")
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    model = make(score_threshold=0.05, proposals_test=6, reg_test=6).eval().to(device)
    for pool in model.drp:  # bins that move, samples that weigh
        torch.nn.init.normal_(pool.fc[-1].weight, std=0.5)
        torch.nn.init.normal_(pool.pool.conv.weight, std=0.1)
    image = batch(1)[0][0]
    (want,) = model.predict([image.to(device)])
    assert len(want["boxes"]) > 4
    names = "roi_align deform_roi_pool decode_dense_offsets nms_padded soft_nms_padded"
    for name in names.split():
        monkeypatch.setattr(kernels, name, functools.partial(getattr(kernels, name), impl=impl))
    (found,) = model.predict([image.to(device)])
    for key in ("boxes", "scores"):
        torch.testing.assert_close(found[key], want[key], atol=1e-4, rtol=1e-4)
    assert torch.equal(found["labels"], want["labels"])


@pytest.mark.parametrize("overlap", [True, False])
def test_readable_detections_are_the_kernels(overlap):
    model, (images, _) = make(overlap=overlap).eval(), batch()
    torch.nn.init.normal_(model.regress.overlap.weight, std=0.5)  # cells that disagree
    torch.nn.init.normal_(model.regress.offsets.weight, std=0.1)
    test = Test(score_threshold=0.01)
    want = model.predict(images, test)
    found = model.predict(images, dataclasses.replace(test, readable=True))
    for kernel, plain in zip(want, found, strict=True):
        assert len(kernel["boxes"]) > 20 and torch.equal(kernel["labels"], plain["labels"])
        for key in ("boxes", "scores"):
            torch.testing.assert_close(plain[key], kernel[key], atol=1e-3, rtol=1e-4)


def largest_of_the_smallest(boxes):
    """Side of an image's smallest object, for images with at least three."""
    sides = (boxes[:, 2:] - boxes[:, :2]).min(1)[0]
    return sides.min().item() if len(boxes) >= 3 else 0


def test_an_image_that_is_all_crowd_trains():
    check_all_crowd(make())
    check_all_crowd(make(dlr=False, drp=False))


def test_one_image_can_be_overfitted():
    data = SyntheticDetection(40, 96)
    index = max(range(40), key=lambda i: largest_of_the_smallest(data[i][1]["boxes"]))
    model = make(fpn_channels=32, conv_channels=32, jitter=0.0, proposals_train=60)
    score = lambda found: metrics_of(found, data[index][1], data.categories)["AP"]  # noqa: E731
    _, target, found = overfit(model, data[index], 300, lambda found: score(found) > 0.9)
    assert score(found) > 0.9, (found, target)
