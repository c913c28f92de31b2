"""CPM R-CNN: its equations by hand, and its heads."""

import doctest
import math

import pytest
import torch
import torchvision

import common
import cpm_rcnn as method
from baselines import grid_branch
from baselines.faster_rcnn import TrainingRois
from cpm_rcnn import Model

BOX = torch.tensor([[100.0, 200, 128, 256]])  # twice as large: 86..142, 172..284, cells of 1 x 2 px


def test_examples_in_docstrings():
    results = [doctest.testmod(module) for module in (method, grid_branch)]
    assert sum(r.attempted for r in results) >= 6 and not any(r.failed for r in results)


# ------------------------------------------------------------------------------ equations


def test_targets_by_hand():
    """gt x 104, 117, 130 -> columns 18, 31, 44 of 56; y 210, 230, 250 -> rows 19, 29, 39."""
    gt = torch.tensor([[104.0, 210, 130, 250]])
    centres = method.grid_targets(BOX, gt, 2.0, radius=0)
    assert centres.shape == (1, 9, 28, 28)
    # less each window's start 0, 14, 28; (map, row, column), columns of points one after another
    rows, columns = (19, 15, 11), (18, 17, 16)
    want = [[3 * i + j, rows[j], columns[i]] for i in range(3) for j in range(3)]
    assert centres[0].nonzero().tolist() == want
    plus = method.grid_targets(BOX, gt, 2.0)[0]
    assert plus.sum((1, 2)).tolist() == [5] * 9
    assert plus[0].nonzero().tolist() == [[18, 18], [19, 17], [19, 18], [19, 19], [20, 18]]


def test_targets_at_the_borders_by_hand():
    cells = lambda *gt: method.grid_targets(BOX, torch.tensor([gt]))[0]  # noqa: E731
    # left side in the last column of its window: that arm is cut off
    assert cells(113.5, 210, 130, 250)[0].nonzero()[:, 1].tolist() == [27, 26, 27, 27]
    # one column further the point has left its window, but an arm is in
    assert cells(114.5, 210, 130, 250)[0].nonzero().tolist() == [[19, 27]]
    # a tenth of a pixel outside the grid: nothing on the left side; the middle is not touched
    outside = cells(85.9, 210, 130, 250).sum((1, 2))
    assert outside.tolist() == [0, 0, 0] + [5] * 6
    assert cells(86.1, 210, 130, 250)[0].nonzero().tolist() == [[18, 0], [19, 0], [19, 1], [20, 0]]
    assert cells(104, 210, 142, 250).sum((1, 2)).tolist() == [5] * 6 + [0, 0, 0]  # 142: cell 56
    small = torch.tensor([[0.0, 0, 1.5, 9], [0, 0, 1.6, 9]])  # 3 and 3.2 px wide when enlarged
    assert method.grid_targets(small, small).sum((1, 2, 3)).tolist() == [0, 45]
    assert method.grid_targets(BOX[:0], BOX[:0]).shape == (0, 9, 28, 28)


def test_decode_by_hand():
    maps = torch.full((1, 9, 28, 28), -20.0)
    for k in range(9):
        maps[0, k, 10, 10] = 0.0  # probability 1/2
    maps[0, 1, 10, 10], maps[0, 1, 15, 20] = -9.0, math.log(3)  # probability 3/4
    # x1: columns 10, 20, 10 of the window at 0 -> 86 + 10.5, 106.5, 96.5, weights 2, 3, 2
    x1 = (2 * 96.5 + 3 * 106.5 + 2 * 96.5) / 7
    # y1, x2 and y2 do not use point 1: rows of 2 px from 172; windows at 28 of 56
    want = torch.tensor([[x1, 172 + 2 * 10.5, 86 + 38.5, 172 + 2 * 38.5]])
    torch.testing.assert_close(method.decode_grid(BOX, maps), want)
    cut = method.decode_grid(BOX, maps, 2.0, torch.tensor([[240.0, 120.0]]))
    torch.testing.assert_close(cut[0, 2:], torch.tensor([120.0, 240.0]))
    # y1 reads maps 0, 3, 6: row 17 in map 3 alone moves it by a third of 7 rows
    maps[0, 3] = maps[0, 3].roll(7, 0)
    assert method.decode_grid(BOX, maps)[0, 1].item() == pytest.approx(193 + 14 / 3)
    dark = method.decode_grid(BOX, maps - 500)  # no probability left: still a box
    assert dark.isfinite().all() and (dark[0, 2:] > dark[0, :2]).all()


def pairs(threshold, n=1000):
    """Boxes and gts of at least that IoU; at 0.7 some sides lie off the 1.25 times larger grid."""
    torch.manual_seed(0)
    corner = torch.rand(n, 2) * 300
    size = 4 + torch.rand(n, 2) * 200
    boxes = torch.cat([corner, corner + size], 1)
    gts = boxes + (torch.rand(n, 4) - 0.5) * (1 - threshold) * size.repeat(1, 2)
    good = torchvision.ops.box_iou(boxes, gts).diagonal() >= threshold
    return boxes[good], gts[good]


def error_in_cells(boxes, gts, ratio, change=lambda maps: maps, shift=0.0):
    """Largest distance of a decoded side from the gt's, for gts whose points are in the windows."""
    centres = method.grid_targets(boxes, gts, ratio, radius=0)
    held = (centres.sum((2, 3)) == 1).all(1)
    boxes, gts = boxes[held], gts[held]
    assert len(boxes) > 200 and held.float().mean() > 0.5
    plus = method.grid_targets(boxes, gts, ratio)
    kernel = torch.tensor([[0.0, 1, 0], [1, 1, 1], [0, 1, 0]])[None, None]
    maps = torch.nn.functional.conv2d(plus.flatten(0, 1)[:, None], kernel, padding=1)
    maps = change(maps.view_as(plus))  # the middle of a plus is now its highest cell
    cell = (ratio * (boxes[:, 2:] - boxes[:, :2]) / 56).repeat(1, 2)
    decoded = method.decode_grid(boxes, maps, ratio) + shift * cell
    return ((decoded - gts).abs() / cell).max().item()


@pytest.mark.parametrize("ratio, iou", list(zip(Model().ratios, Model().stage_ious)))
def test_targets_decode_to_the_gt_within_half_a_cell(ratio, iou):
    boxes, gts = pairs(iou)
    assert error_in_cells(boxes, gts, ratio) <= 0.5 + 1e-3
    # the same check fails for rows of points instead of columns, swapped axes, half a cell off
    by_rows = [0, 3, 6, 1, 4, 7, 2, 5, 8]
    assert error_in_cells(boxes, gts, ratio, lambda maps: maps[:, by_rows]) > 1
    assert error_in_cells(boxes, gts, ratio, lambda maps: maps.mT) > 1
    assert error_in_cells(boxes, gts, ratio, shift=0.5) > 0.9
    assert error_in_cells(boxes, gts, ratio, torch.zeros_like) > 1


def test_selection_by_hand():
    """Two images; the second's object would fit the first's box. A crowd is nobody's object."""
    objects = common.pad_targets([
        dict(boxes=torch.tensor([[0.0, 0, 10, 5], [50, 0, 60, 10]]), labels=torch.tensor([3, 4]),
             ignore=torch.tensor([False, True])),
        dict(boxes=torch.tensor([[20.0, 0, 30, 10]]), labels=torch.tensor([5]),
             ignore=torch.tensor([False])),
    ])  # fmt: skip
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [50, 0, 60, 10], [20, 0, 30, 8]])
    rois = TrainingRois(
        image=torch.tensor([0, 0, 0, 1]),
        boxes=boxes,
        labels=torch.full((4,), 9),  # an earlier stage's objects, which do not count any more
        gt=torch.ones(4, dtype=torch.long),
        gt_boxes=boxes + 1,
        is_gt=torch.tensor([True, False, False, False]),
    )
    kept = method.select_boxes(rois, objects, 0.5)
    assert torch.equal(kept.flat(), rois.flat()[[0, 3]]) and kept.is_gt.tolist() == [True, False]
    assert kept.labels.tolist() == [3, 5] and kept.gt.tolist() == [0, 0]
    assert kept.gt_boxes.tolist() == [[0, 0, 10, 5], [20, 0, 30, 10]]
    ious = common.aligned_iou(kept.boxes, kept.gt_boxes)
    assert ious.tolist() == pytest.approx([0.5, 0.8])
    assert method.select_boxes(rois, objects, 0.6).labels.tolist() == [5]
    none = method.select_boxes(rois[:0], objects, 0.5)
    assert [len(x) for x in vars(none).values()] == [0] * 6


def test_fused_score():
    cls, ism, rsm = torch.rand(3, 1000)
    cls[0] = ism[1] = rsm[2] = 0
    assert torch.equal(method.fused_score(cls, ism, rsm, 1.0), cls * ism)  # exactly
    assert torch.equal(method.fused_score(cls, ism, rsm, 0.0), rsm)
    by_hand = method.fused_score(*torch.tensor([0.9, 0.5, 0.3]), 0.8)
    assert by_hand.item() == pytest.approx(0.45**0.8 * 0.3**0.2)
    assert method.fused_score(cls, ism, rsm, 0.8).isfinite().all()


@pytest.mark.parametrize(
    "kind, want",  # errors 0.1 and 0.2
    [("l2", (0.01 + 0.04) / 4), ("l1", 0.15), ("smooth_l1", (0.045 + 0.2 - 1 / 18) / 2)],
)
def test_losses_by_hand(kind, want):
    ious = torch.tensor([0.8])
    one = method.iou_scoring_loss(torch.tensor([[0.1, 0.6]]), ious, kind)
    assert one.item() == pytest.approx(want, rel=1e-5)
    two = method.iou_scoring_loss(torch.tensor([[0.1, 0.6], [0.2, 0.8]]), ious.repeat(2), kind)
    assert two.item() == pytest.approx(want / 2, rel=1e-5)
    assert method.iou_scoring_loss(torch.rand(0, 2), ious[:0], kind) == 0
    logits, targets = torch.zeros(2, 9, 4, 4), torch.zeros(2, 9, 4, 4)
    logits[0, 0, 0, 0], targets[0, 0, 0, 0] = math.log(3), 1  # -log 3/4 there, log 2 elsewhere
    want = (287 * math.log(2) - math.log(3 / 4)) / 288
    assert method.grid_loss(logits, targets).item() == pytest.approx(want, rel=1e-5)
    assert method.grid_loss(logits[:0], targets[:0]) == 0


# ------------------------------------------------------------------------------ heads


def test_paper_sized_heads_have_the_releases_parameters():
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    head = method.GridHead()
    trunk = 576 * (9 * 256 + 1) + 7 * 576 * (9 * 576 + 1) + 8 * 2 * 576
    assert count(head.trunk) == trunk
    assert count(head.heat) == 576 * 64 * 16 + 576 + 2 * 576 + 576 * 16 + 9
    fc = 28224 * 1024 + 1024 + 1024 * 1024 + 1024 + 2 * 1024 + 2
    assert count(method.IoUScoring()) == fc
    assert method.GridHead(8, 2, 1, 9, True).heat[-1].bias.sigmoid().allclose(torch.tensor(0.01))


def test_heat_maps_are_float32_in_mixed_precision():
    """Rounded to bf16 their highest cells would tie, and decoding takes the first."""
    torch.manual_seed(0)
    head, pooled = method.GridHead(8, 4, 1, 9), torch.randn(20, 8, 14, 14)
    with torch.autocast("cpu", torch.bfloat16):
        logits, trunk = head(pooled)
    assert logits.dtype == torch.float32 and trunk.dtype == torch.bfloat16
    assert (logits != logits.bfloat16()).float().mean() > 0.9
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_iou_scoring_starts_near_zero():
    last = method.IoUScoring(36 * 7 * 7, 1024).fc[-1]
    assert last.weight.std().item() == pytest.approx(0.01, rel=0.1) and not last.bias.any()


def test_each_point_has_its_own_channels_behind_the_trunk():
    head = method.GridHead(8, 4, 1, 9)
    trunk = torch.rand(2, 36, 7, 7)
    before = head.heat(trunk)
    trunk[:, 12:16] += torch.rand(2, 4, 7, 7)  # point 3's
    differs = (head.heat(trunk) != before).flatten(2).any(2)
    assert differs.tolist() == [[k == 3 for k in range(9)]] * 2
