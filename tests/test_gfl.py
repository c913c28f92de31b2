"""GFL: the formulas by hand, ATSS against a slow reference, what a whole step must satisfy."""

import dataclasses
import doctest
import math
import multiprocessing

import pytest
import torch
import torch.nn.functional as F
import torchvision
from methods import (
    REAL,
    RUN,
    batch,
    behaviour,
    check_all_crowd,
    check_command_line,
    check_overfits,
    check_real_data,
    every_size,
    make,
    own_flags,
    sure,
    without_objects,
)

import common
import engine
import kernels
from baselines import gfl as method
from engine.processes import peak_memory, reset_peak_memory


def test_examples_in_docstrings():
    assert doctest.testmod(method).attempted >= 7 and doctest.testmod(method).failed == 0


# ------------------------------------------------------------------------------ losses


def test_quality_focal_loss_by_hand():
    logits = torch.tensor([[1.0, -2.0], [0.5, 3.0], [4.0, 4.0]], dtype=torch.float64)
    quality = torch.tensor([0.7, 0.9, 0.9], dtype=torch.float64)
    found = method.quality_focal_loss(logits, torch.tensor([1, 2, -1]), quality, beta=1.5)
    s = logits.sigmoid()
    nothing = -(s**1.5) * torch.log(1 - s)  # a target of 0
    own = (0.7 - s[0, 1]).abs() ** 1.5 * -(0.7 * s[0, 1].log() + 0.3 * (1 - s[0, 1]).log())
    want = torch.stack([nothing[0, 0] + own, nothing[1].sum(), nothing[2, 0] * 0])
    torch.testing.assert_close(found, want)
    exact = method.quality_focal_loss(logits[:1, :1], torch.tensor([0]), s[0, :1])
    assert exact.item() == 0  # the score is as it should be, and the cross entropy counts no more


def test_quality_focal_loss_of_hard_labels_is_focal_loss_without_alpha():
    torch.manual_seed(0)
    logits, labels = torch.randn(200, 5).double() * 4, torch.randint(-1, 6, (200,))
    ones = torch.ones(200).double()
    found = method.quality_focal_loss(logits, labels, ones)
    torch.testing.assert_close(found, 2 * kernels.focal_loss(logits, labels, 0.5, 2.0))
    loose, other = (logits.clone().requires_grad_() for _ in range(2))
    method.quality_focal_loss(loose, labels, ones).sum().backward()
    (2 * kernels.focal_loss(other, labels, 0.5, 2.0)).sum().backward()
    torch.testing.assert_close(loose.grad, other.grad)  # |target - s| passes gradient, too
    zeros = method.quality_focal_loss(logits, labels, ones * 0)  # an IoU of 0: background
    background = torch.where(labels < 0, -1, 5)
    torch.testing.assert_close(zeros, 2 * kernels.focal_loss(logits, background, 0.5, 2.0))


def test_distribution_focal_loss_by_hand_and_where_it_is_least():
    logits = torch.tensor([[[0.0, 1.0, 2.0, -1.0]]], dtype=torch.float64)
    p = logits.softmax(-1)[0, 0]
    found = method.distribution_focal_loss(logits, torch.tensor([[1.3]]))
    assert found.item() == pytest.approx(-(0.7 * p[1].log() + 0.3 * p[2].log()).item())
    torch.manual_seed(0)
    distances = torch.cat([torch.rand(300).double() * 15.9, torch.arange(16).double()])
    low, bins = distances.floor()[:, None], torch.arange(17)
    best = (1 - (distances[:, None] - bins).abs()).clamp(min=0) * (bins >= low) * (bins <= low + 1)
    torch.testing.assert_close(best.sum(1), torch.ones(316).double())
    least = method.distribution_focal_loss((best + 1e-300).log(), distances)
    other = (best + 0.01 * torch.rand_like(best)).log()
    assert (method.distribution_focal_loss(other, distances) > least - 1e-12).all()
    points = torch.tensor([0.0, 0.0, 8.0])
    mean = method.decode_distances(points, (best + 1e-12).log().float()[:, None].expand(-1, 4, -1))
    torch.testing.assert_close(mean[:, 2], (8 * distances).float(), atol=8e-5, rtol=0)


def test_boxes_survive_encoding():
    """Distances of boxes from points in them, as distributions over two bins, give the boxes."""
    torch.manual_seed(0)
    points = torch.cat(
        [torch.rand(200, 2) * 100, torch.tensor([8.0, 32.0]).repeat(100)[:, None]], 1
    )
    sides = torch.rand(200, 4) * 15 * points[:, 2:]
    boxes = torch.cat([points[:, :2] - sides[:, :2], points[:, :2] + sides[:, 2:]], 1)
    distances = method.encode_distances(points, boxes)
    probs = (1 - (distances[..., None] - torch.arange(17)).abs()).clamp(min=1e-12)
    found = method.decode_distances(points, probs.log())
    assert ((found - boxes).abs() / points[:, 2:]).max() < 1e-5  # in strides
    with torch.autocast("cpu", torch.bfloat16):  # boxes stay float32
        assert torch.equal(method.decode_distances(points, probs.log()), found)
    far = torch.tensor([[-1000.0, 50.0, 60.0, 1000.0]])  # a point above the box
    assert method.encode_distances(torch.tensor([[50.0, 40.0, 8.0]]), far).tolist() == [
        [pytest.approx(15.9), 0, 1.25, pytest.approx(15.9)]
    ]


# ------------------------------------------------------------------------------ assignment


def test_the_releases_settings():
    names = """cls_weight box_weight dfl_weight qfl_beta max_distance atss_cells anchor_scale
        tower_convs tower_groups score_threshold top_scores nms_iou max_detections lr lr_batch
        clip_norm epochs""".split()
    values = (1, 2, 0.25, 2, 16, 9, 8, 4, 32, 0.05, 1000, 0.6, 100, 0.01, 16, 0, 12)
    settings = method.Settings().flat()
    assert tuple(settings[name] for name in names) == values
    assert settings["drops"] == (8 / 12, 11 / 12) and (make(method).head.scales == 1).all()


def maps(sizes):
    """Anchors (float64) of a batch of images [B, 2], shapes and strides of its five maps."""
    strides = [8, 16, 32, 64, 128]
    shapes = [[math.ceil(math.ceil(s / 32) * 32 / t) for s in sizes.amax(0)] for t in strides]
    return common.make_anchors(shapes, strides, (8.0,), (1.0,)).double(), shapes, strides


def slow_atss(anchors, shapes, inside, target, most):
    """Of one image the gt of each anchor, -1 for none, and the anchors that rounding may decide."""
    centre, gts = (anchors[:, :2] + anchors[:, 2:]) / 2, target["boxes"]
    iou = torchvision.ops.box_iou(anchors, gts)
    best, chosen, unsure = torch.zeros(len(anchors)).double(), [-1] * len(anchors), set()
    for g in (~target["ignore"]).nonzero()[:, 0].tolist():
        distance = ((centre - (gts[g, :2] + gts[g, 2:]) / 2) ** 2).sum(1)
        candidates, start = [], 0
        for h, w in shapes:
            level = start + inside[start : start + h * w].nonzero()[:, 0]
            candidates += level[distance[level].argsort(stable=True)[:most]].tolist()
            start += h * w
        values = iou[candidates, g]
        threshold = values.mean() + (values.std() if len(values) > 1 else 0)
        for a in candidates:
            x, y = centre[a].tolist()
            if min(x - gts[g, 0], y - gts[g, 1], gts[g, 2] - x, gts[g, 3] - y) > 0.01:
                if abs(iou[a, g] - threshold) < 1e-9:
                    unsure.add(a)
                if iou[a, g] >= threshold and iou[a, g] > best[a] + 1e-12:
                    best[a], chosen[a] = iou[a, g], g
    return chosen, unsure


def random_target(size, generator):
    """Objects of all sizes, some between the centres, some of whose centres are equally far from
    several cells', twins and crowds."""

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    n = int(torch.randint(20, (), generator=generator))
    limit = size.flip(0).double()
    side = 2 ** (rand(n, 2) * 6 + 1)  # 2 to 128 px
    low = (rand(n, 2) * limit - side / 2).clamp(min=0)
    boxes = torch.cat([low, torch.minimum(low + side, limit)], 1)
    boxes = torch.where(rand(n, 1) < 0.3, (boxes / 8).round() * 8, boxes)  # onto the grid: ties
    boxes = torch.cat([boxes, boxes[:1]])
    boxes = boxes[(boxes[:, 2:] - boxes[:, :2] > 0.5).all(1)]
    labels = torch.arange(len(boxes))
    return dict(boxes=boxes, labels=labels, ignore=rand(len(boxes)) < 0.2)


def test_atss_is_what_a_loop_over_gts_finds():
    generator, cases, positives, unsettled = torch.Generator().manual_seed(0), 0, 0, 0
    for i, most in enumerate((9, 9, 9, 9, 4, 1) * 6):
        sizes = torch.randint(20, 200, (6, 2), generator=generator).float()
        if i % 3 == 0:  # strips: maps of a row or column, and long
            sizes[:, i % 2] = 20 + sizes[:, i % 2] / 20
            sizes[:, 1 - i % 2] += 200
        anchors, shapes, strides = maps(sizes)
        targets = [random_target(size, generator) for size in sizes]
        found = method.atss(anchors, shapes, strides, sizes, targets, most)
        for b, (target, inside) in enumerate(zip(targets, common.inside_image(anchors, sizes))):
            chosen, unsure = slow_atss(anchors, shapes, inside, target, most)
            settled = torch.tensor([a not in unsure for a in range(len(anchors))])
            chosen, positive = torch.tensor(chosen), torch.tensor(chosen) >= 0
            covered = torch.zeros_like(positive)
            for crowd in target["boxes"][target["ignore"]]:
                corner = torch.minimum(anchors[:, 2:], crowd[2:])
                inner = (corner - torch.maximum(anchors[:, :2], crowd[:2])).clamp(min=0).prod(1)
                covered |= inner >= 0.5 * (anchors[:, 2:] - anchors[:, :2]).prod(1)
            want = torch.where(covered, -1, 0).where(~positive, 1).where(inside, -1)
            assert torch.equal(found.labels[b][settled], want[settled])
            mine = positive & settled
            assert torch.equal(found.gt[b][mine], chosen[mine])
            assert torch.equal(found.gt_boxes[b][mine], target["boxes"][chosen[mine]])
            assert torch.equal(found.gt_labels[b][mine], target["labels"][chosen[mine]])
            cases += int((~target["ignore"]).sum())
            positives, unsettled = positives + int(mine.sum()), unsettled + len(unsure)
    assert cases > 1500 and positives > 3500 and unsettled < 0.02 * positives


def test_atss_gives_an_object_the_anchor_that_it_fills():
    sizes = torch.tensor([[256.0, 256.0]] * 2)
    anchors, *levels = maps(sizes)
    box = anchors[16 * 32 + 16][None]
    target = dict(boxes=box, labels=torch.tensor([3]), ignore=torch.tensor([False]))
    targets = [target, *without_objects([target])]
    found = method.atss(anchors, *levels, sizes, targets)
    labels, positive = found.labels, found.labels[0] == 1
    assert positive[16 * 32 + 16] and (labels[1] == 0).all() and (found.gt_boxes[1] == 0).all()
    assert 1 <= positive.sum() <= 9 and (found.gt_labels[0][positive] == 3).all()


def atss_of_thousands() -> tuple[int, int]:
    """How many of 5,000 objects train, and the bytes that finding their anchors takes."""
    torch.manual_seed(0)
    sizes = torch.tensor([[800.0, 1333.0]])
    anchors, shapes, strides = maps(sizes)
    low = torch.rand(5000, 2) * torch.tensor([1280.0, 750.0])
    boxes = torch.cat([low, low + 2 + torch.rand(5000, 2) * 48], 1)
    target = dict(boxes=boxes, labels=torch.arange(5000), ignore=torch.rand(5000) < 0.01)
    reset_peak_memory(torch.device("cpu"))
    before = peak_memory(torch.device("cpu"))
    found = method.atss(anchors.float(), shapes, strides, sizes, [target])
    extra = peak_memory(torch.device("cpu")) - before
    return len(found.gt[found.labels == 1].unique()), extra


def test_atss_of_thousands_of_objects_stays_small():
    with multiprocessing.get_context("spawn").Pool(1) as fresh:  # with no memory that others kept
        found, extra = fresh.apply(atss_of_thousands)
    assert found > 2000
    assert extra < 2**30


# ------------------------------------------------------------------------------ model


def test_p6_is_made_of_p5():
    extra = common.ConvP6P7(4, 3, on_p5=True)
    p5, c5 = torch.randn(1, 3, 8, 8), torch.randn(1, 4, 8, 8)
    (_, p6, p7), _ = extra([p5], [c5], ["p5"])
    torch.testing.assert_close(p6, F.conv2d(p5, extra.p6.weight, extra.p6.bias, 2, 1))
    torch.testing.assert_close(p7, extra.p7(p6))
    body = make(method).backbone
    assert body.strides == (8, 16, 32, 64, 128) and body.fpn.extra_blocks.on_p5


def test_head_has_a_factor_a_level_and_the_sides_bins_lie_together():
    head = method.GFLHead(32, 3, num_convs=2)
    maps = [torch.rand(2, 32, 8, 4), torch.rand(2, 32, 4, 2)]
    with torch.no_grad():
        head.scales[1] = 3.0
    logits, bins = head(maps)
    assert logits.shape == (2, 40, 3) and bins.shape == (2, 40, 4, 17)
    assert logits.sigmoid().mean().item() == pytest.approx(0.01, rel=0.2)
    raw = head.bin_logits(head.box_tower(maps[1]))  # [B, 4 * 17, H, W], as the release has them
    torch.testing.assert_close(bins[:, 32 + 3, 2], 3 * raw[:, 2 * 17 : 3 * 17, 1, 1])
    convs = [m for m in head.modules() if isinstance(m, torch.nn.Conv2d)]
    norms = [m for m in head.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert [c.bias is None for c in convs] == [True] * 4 + [False] * 2
    assert [n.num_groups for n in norms] == [32] * 4
    assert (method.Model().tower_groups, method.Model().tower_convs) == (32, 4)


def test_every_weight_learns_and_images_without_objects_train():
    model, (images, targets) = make(method), every_size()
    losses = model.loss(images, targets)
    for weighted in (losses["box"], losses["dfl"]):  # by scores, which do not learn of it
        logits = model.head.cls_logits.weight
        assert torch.autograd.grad(weighted, logits, None, True, allow_unused=True) == (None,)
    sum(losses.values()).backward()
    assert set(losses) == {"cls", "box", "dfl"}
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    assert (model.head.scales.grad != 0).all()
    model.zero_grad(set_to_none=True)
    losses = model.loss(images, without_objects(targets))
    assert losses["cls"] > 0 and losses["box"] == losses["dfl"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.loss(images * 2, [*targets, *without_objects(targets)])["box"] > 0
    check_all_crowd(model)


@pytest.mark.parametrize("trained", [True, False])
def test_losses_of_a_step_by_hand(trained):
    """Positives of one image, from the tensors that `outputs` and `assign` give."""
    model, (images, targets) = make(method, box_weight=3.0, dfl_weight=0.5), batch(1)
    model = sure(model) if trained else model
    with torch.no_grad():
        out = model.outputs(images)
        assigned = model.assign(out, targets)
        found = model.loss(images, targets)
    labels = assigned.labels[0]
    (at,) = (labels == 1).nonzero(as_tuple=True)
    points, logits, gts = out["points"][at], out["cls_logits"][0, at], assigned.gt_boxes[0, at]
    mean = (out["bin_logits"][0, at].softmax(-1) * torch.arange(17)).sum(-1) * points[:, 2:]
    boxes = torch.cat([points[:, :2] - mean[:, :2], points[:, :2] + mean[:, 2:]], 1)
    torch.testing.assert_close(boxes, model.decode(out, (at * 0, at)))
    iou = torchvision.ops.box_iou(boxes, gts).diag()
    giou = torchvision.ops.generalized_box_iou(boxes, gts).diag()
    target = torch.zeros_like(out["cls_logits"][0])
    target[at, assigned.gt_labels[0, at]] = iou
    s = out["cls_logits"][0].sigmoid()
    entropy = F.binary_cross_entropy_with_logits(out["cls_logits"][0], target, reduction="none")
    qfl = ((s - target) ** 2 * entropy).sum(1)[labels >= 0].sum() / len(at)
    w = logits.sigmoid().amax(1)
    sides = torch.cat([points[:, :2] - gts[:, :2], gts[:, 2:] - points[:, :2]], 1) / points[:, 2:]
    sides, log = sides.clamp(0, 15.9), out["bin_logits"][0, at].log_softmax(-1)
    assert trained == (w.sum() > 1)  # whatever it is, it divides
    low, share = sides.long(), sides % 1
    lower, upper = (log.gather(-1, i[..., None])[..., 0] for i in (low, low + 1))
    dfl = -(lower * (1 - share) + upper * share).mean(1)
    assert len(at) > 5
    assert found["cls"].item() == pytest.approx(qfl.item(), rel=1e-4)
    assert found["box"].item() == pytest.approx(
        (3 * ((1 - giou) * w).sum() / w.sum()).item(), rel=1e-4
    )
    assert found["dfl"].item() == pytest.approx((0.5 * (dfl * w).sum() / w.sum()).item(), rel=1e-4)


@pytest.mark.parametrize("p2", [False, True])
def test_a_batch_of_two_equals_two_singles(monkeypatch, p2):
    """Detections are the same; losses are means, weighted by what each is divided by."""
    model, (images, targets) = sure(make(method, p2=p2)).eval(), batch()
    for image, found in zip(images, model.predict(images)):
        (alone,) = model.predict([image])
        assert len(alone["boxes"]) > 30 and (found["scores"].diff() <= 0).all()
        torch.testing.assert_close(alone["boxes"], found["boxes"], atol=1e-2, rtol=0)
        torch.testing.assert_close(alone["scores"], found["scores"], atol=1e-4, rtol=0)
    small = model.predict([images[0], images[1][:, :60, :70]])[1]["boxes"]  # padded to 96x96
    assert len(small) and small[:, 2].max() <= 70 and small[:, 3].max() <= 60
    counts, count = [], common.shared_count
    seen = lambda *a, **k: counts.append(count(*a, **k)) or counts[-1]  # noqa: E731
    monkeypatch.setattr(common, "shared_count", seen)
    singles = [model.loss(images[i : i + 1], targets[i : i + 1]) for i in (0, 1)]
    positives, weights = counts[::2], counts[1::2]
    for name, value in model.loss(images, targets).items():
        of = positives if name == "cls" else weights
        mean = sum(losses[name] * n for losses, n in zip(singles, of)) / sum(of)
        assert value.item() == pytest.approx(mean.item(), rel=1e-4), name


def test_one_image_can_be_overfitted():
    check_overfits(make(method, fpn_channels=32), 0, 150, 0.8)


# ------------------------------------------------------------------------------ flags, command line

CHANGED = dict(
    cls_weight=2.0, box_weight=3.0, dfl_weight=2.0, qfl_beta=1.0, max_distance=5, atss_cells=2,
    anchor_scale=4.0, tower_convs=2, tower_groups=4, score_threshold=0.95, top_scores=5,
    nms_iou=1.0, max_detections=3, p2=True,
)  # fmt: skip


def test_every_flag_is_covered():
    assert own_flags(method) == {*CHANGED, "all_classes"} - engine.Settings().flat().keys()


@pytest.fixture(scope="module")
def known():
    return behaviour(sure(make(method)))


@pytest.mark.parametrize("flag", list(CHANGED))
def test_flag_changes_the_run(known, flag):
    assert behaviour(sure(make(method, **{flag: CHANGED[flag]}))) != known


def test_all_classes():
    model, (images, _) = sure(make(method, top_scores=3, score_threshold=0.0)).eval(), batch(1)
    out, test = model.outputs(images), model.full_settings.test
    few = model.candidates(out, test)
    every = model.candidates(out, dataclasses.replace(test, all_classes=True))
    assert out["per_level"] == [144, 36, 9, 4, 1]  # one of the four is in the image
    assert (len(few["scores"]), len(every["scores"])) == (3 * 5, (3 + 3 + 3 + 1 + 1) * 10)


def test_the_command_line(tmp_path):
    check_command_line(method, RUN, tmp_path)


def test_real_data(detection_data, tmp_path):
    check_real_data(method, REAL, detection_data / "coco_tiny", tmp_path)
