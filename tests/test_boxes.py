"""Boxes, matching, sampling, anchors, losses, proposals, backbones and post-processing."""

import math
import multiprocessing

import pytest
import torch
import torchvision

import common
import kernels
from baselines.faster_rcnn import RPN, Rois, sample_rois
from baselines.retinanet import RetinaTowers
from engine.detector import first_per_image, split_images
from engine.processes import peak_memory, reset_peak_memory
from engine.settings import Run
from engine.train import learning_rate


def random_boxes(*shape, size=100.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=g) * size
    return torch.cat([corner, corner + 1 + torch.rand(*shape, 2, generator=g) * size], -1)


def test_box_coder_round_trip_and_hand_value():
    boxes, gt = random_boxes(50), random_boxes(50, seed=1)
    for stds in ((1, 1, 1, 1), (0.1, 0.1, 0.2, 0.2)):
        deltas = common.encode_boxes(boxes, gt, stds)
        torch.testing.assert_close(common.decode_boxes(boxes, deltas, stds), gt, atol=1e-3, rtol=0)
    box, gt = torch.tensor([0.0, 0, 10, 20]), torch.tensor([5.0, 0, 15, 40])
    deltas = common.encode_boxes(box, gt, (0.1, 0.1, 0.2, 0.2))
    torch.testing.assert_close(deltas, torch.tensor([5.0, 5.0, 0.0, 5 * math.log(2)]))


def test_decode_clamps_growth():
    box = common.decode_boxes(torch.tensor([[0.0, 0, 16, 16]]), torch.tensor([[0.0, 0, 99, -99]]))
    assert box[0, 2] - box[0, 0] == pytest.approx(1000)
    assert box[0, 3] - box[0, 1] == pytest.approx(16 * 16 / 1000)


def test_clip_uses_width_for_x():
    boxes = torch.tensor([[[-5.0, -5, 500, 500]], [[10, 10, 20, 20]]])
    clipped = common.clip_boxes(boxes, torch.tensor([[30.0, 50.0], [30.0, 50.0]])[:, None])
    assert clipped.tolist() == [[[0, 0, 50, 30]], [[10, 10, 20, 20]]]


def brute_match(boxes, gts, high, low, low_quality):
    iou = torchvision.ops.box_iou(boxes, gts)
    best, index = iou.max(1)
    labels = torch.where(best >= high, 1, torch.where(best < low, 0, -1))
    if low_quality is not None:
        for g in range(len(gts)):
            top = iou[:, g].max()
            if top > 0 and top >= low_quality:
                labels[iou[:, g] == top] = 1
                index[iou[:, g] == top] = g
    return labels, index, best


@pytest.mark.parametrize("low_quality", [None, 0.0, 0.3])
def test_match_against_a_loop_in_one_chunk_and_many(low_quality, monkeypatch):
    boxes, gts = random_boxes(400), random_boxes(30, seed=1)
    want = brute_match(boxes, gts, 0.6, 0.3, low_quality)
    whole = common.match(boxes, gts, 0.6, 0.3, low_quality=low_quality)
    padded = common.match(
        boxes[None],
        torch.cat([gts, boxes[:5]])[None].expand(2, -1, -1),
        0.6,
        0.3,
        gt_valid=(torch.arange(35) < 30)[None].expand(2, -1),
        low_quality=low_quality,
    )
    for labels, index, best in (whole, [x[1] for x in padded]):
        assert torch.equal(labels, want[0])
        torch.testing.assert_close(best, want[2])
        positive = labels == 1
        assert positive.sum() > 5
        assert torch.equal(index[positive], want[1][positive])


@pytest.mark.parametrize("high, low", [(0.7, 0.3), (0.5, 0.5)])
def test_match_one_image_is_match(high, low):
    boxes, gts = random_boxes(400), random_boxes(30, seed=1)
    boxes[:10] = gts[:10]
    plain = common.match_one_image(boxes, gts, high, low)
    for found, want in zip(common.match(boxes, gts, high, low), plain):
        torch.testing.assert_close(found, want)
    assert set(plain[0].tolist()) == ({-1, 0, 1} if high > low else {0, 1})


def test_match_ignores_crowds():
    boxes = torch.tensor([[0.0, 0, 10, 10], [8, 0, 18, 10], [50, 50, 60, 60]])
    gts = torch.tensor([[0.0, 0, 10, 10], [0, 0, 14, 40]])
    labels, _, _ = common.match(
        boxes, gts, 0.5, 0.5, torch.tensor([True, False]), torch.tensor([False, True])
    )
    assert labels.tolist() == [1, -1, 0]  # the second lies 60 % in the crowd


def match_of_five_thousand() -> tuple[int, int]:
    """How many boxes match, and the bytes that it takes."""
    boxes, gts = random_boxes(20_000, size=1000), random_boxes(5000, size=1000, seed=1)
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    before = peak_memory(cpu)
    labels, _, _ = common.match(boxes, gts, 0.7, 0.3, low_quality=0.3)
    return int((labels == 1).sum()), peak_memory(cpu) - before


def test_match_of_five_thousand_objects_stays_small():
    """The whole matrix of 20,000 boxes has 0.4 GB, and is needed more than once."""
    with multiprocessing.get_context("spawn").Pool(1) as fresh:  # with no memory that others kept
        matched, extra = fresh.apply(match_of_five_thousand)
    assert matched >= 4000
    assert extra < 3 * 2**28


def test_sample_counts_and_is_random():
    labels = torch.full((2, 1000), 0)
    labels[0, :300] = 1
    labels[1, :7] = 1
    labels[:, 900:] = -1
    index, valid = common.sample(labels, 256, 0.25)
    picked = labels.gather(1, index)
    assert ((picked == 1) & valid).sum(1).tolist() == [64, 7]
    assert ((picked == 0) & valid).sum(1).tolist() == [192, 249]
    assert not ((picked == -1) & valid).any()
    for row in range(2):
        assert len(set(index[row, valid[row]].tolist())) == 256  # none twice
    assert not torch.equal(index, common.sample(labels, 256, 0.25)[0])


@pytest.mark.parametrize(
    "num_positive, num_negative", [(0, 40), (5, 40), (30, 40), (30, 3), (4, 3)]
)
@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_sample_one_image_draws_as_many_and_only_what_sample_may(
    num_positive, num_negative, fraction
):
    labels = torch.full((50 + num_positive,), -1)
    labels[:num_positive] = 1
    labels[num_positive : num_positive + num_negative] = 0
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    seen = [set(), set()]
    for _ in range(200):
        index, valid = common.sample(labels[None], 16, fraction)
        drawn = [common.sample_one_image(labels, 16, fraction), index[0, valid[0]]]
        counts = [labels[index].bincount(minlength=2).tolist() for index in drawn]
        assert counts[0] == counts[1]  # bincount refuses the -1s, which may not be drawn
        for rows, index in zip(seen, drawn):
            assert len(set(index.tolist())) == len(index)  # none twice
            assert (labels[index].diff() <= 0).all()  # positives first
            rows |= set(index.tolist())
    assert seen[0] == seen[1]  # sooner or later each draws all that may be drawn


def test_anchors_by_hand():
    anchors = common.make_anchors([(1, 2), (1, 1)], (8, 16), (4.0,), (1.0, 4.0))
    want = [[-12, -12, 20, 20], [-4, -28, 12, 36], [-4, -12, 28, 20], [4, -28, 20, 36]]
    assert anchors[:4].tolist() == want  # ratio 4 is tall: h / w
    assert anchors[4].tolist() == [-24, -24, 40, 40]


def test_flatten_levels_keeps_the_anchors_order():
    maps = [torch.arange(2 * 6 * 2 * 3).view(2, 6, 2, 3).float()]  # A = 3 anchors, 2 numbers each
    flat = common.flatten_levels(maps, 2)
    assert flat.shape == (2, 18, 2)
    assert flat[1, (1 * 3 + 2) * 3 + 1].tolist() == maps[0][1, 2:4, 1, 2].tolist()


def test_focal_loss_against_torchvision_and_by_hand():
    logits = torch.randn(50, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(-1, 8, (50,))
    onehot = torch.nn.functional.one_hot(labels.clamp(0, 7), 8)[:, :7].double()
    want = torchvision.ops.sigmoid_focal_loss(logits, onehot, 0.25, 2.0).sum(1) * (labels >= 0)
    ours = kernels.focal_loss(logits, labels)
    torch.testing.assert_close(ours, want)
    (ours_grad,) = torch.autograd.grad(ours.sum(), logits)
    (want_grad,) = torch.autograd.grad(want.sum(), logits)
    torch.testing.assert_close(ours_grad, want_grad)
    # p = 1/2: 0.25 * 1/4 * ln 2 for the true class, 0.75 * 1/4 * ln 2 for another
    by_hand = kernels.focal_loss(torch.zeros(1, 2), torch.tensor([0])).item()
    assert by_hand == pytest.approx(0.25 * math.log(2))


def test_first_per_image_and_split():
    image = torch.tensor([0, 2, 0, 0, 2])
    assert first_per_image(image, 3, 2).tolist() == [True, True, True, False, True]
    flat = dict(boxes=torch.arange(5.0)[:, None].expand(-1, 4), labels=torch.arange(5))
    parts = split_images(flat, image, [3, 0, 2])
    assert [p["labels"].tolist() for p in parts] == [[0, 2, 3], [], [1, 4]]
    assert [p["boxes"][:, 3].tolist() for p in parts] == [[0, 2, 3], [], [1, 4]]


def test_learning_rate_schedule():
    run = Run(lr=0.02, lr_batch=16, drops=(2 / 3, 8 / 9), warmup=500)
    rate = lambda step, batch=16: learning_rate(run, step, 90_000, batch)  # noqa: E731
    assert rate(0) == pytest.approx(0.02 / 3)
    assert rate(250) == pytest.approx(0.02 * 2 / 3)
    assert rate(500) == rate(59_999) == pytest.approx(0.02)
    assert rate(60_000) == rate(79_999) == pytest.approx(0.002)
    assert rate(80_000) == pytest.approx(0.0002)
    assert rate(500, batch=4) == pytest.approx(0.005)
    run.cosine = True
    assert rate(0) == pytest.approx(0.02 / 3) and rate(89_999) < 1e-9
    assert rate(30_000) == pytest.approx(0.015) and rate(45_000) == pytest.approx(0.01)


def make_rpn(**options):
    torch.manual_seed(0)
    rpn = RPN(8, (4, 8), scale=4.0, **options)
    features = [torch.rand(2, 8, 16, 16), torch.rand(2, 8, 8, 8)]
    return rpn, features, torch.tensor([[64.0, 64.0], [64.0, 40.0]])


def test_rpn_proposals_are_inside_sorted_and_apart():
    rpn, features, sizes = make_rpn(post_nms=(50, 20))
    boxes, valid = rpn.proposals(rpn(features), sizes)
    assert boxes.shape == (2, 20, 4) and valid.any(1).all()
    for b in range(2):
        mine = boxes[b, valid[b]]
        assert (mine[:, 2] <= sizes[b, 1]).all() and (mine[:, 3] <= sizes[b, 0]).all()
    assert rpn.proposals(rpn(features), sizes, training=True)[0].shape == (2, 50, 4)


def test_rpn_loss_by_hand():
    rpn, features, sizes = make_rpn(num_samples=10**6)
    anchors, logits, deltas, n = rpn(features)
    box = anchors[100][None].clamp(0, 64)
    target = {"boxes": box, "labels": torch.tensor([0]), "ignore": torch.tensor([False])}
    none = {k: v[:0] for k, v in target.items()}
    zero = (anchors, torch.zeros_like(logits), torch.zeros_like(deltas), n)
    losses = rpn.loss(zero, sizes, [target, none])
    assert losses["rpn_cls"].item() == pytest.approx(math.log(2), rel=1e-5)
    iou = torchvision.ops.box_iou(anchors, box)[:, 0]
    positive = (iou >= 0.7) | (iou == iou.max())
    negative = iou < 0.3
    centres_inside = common.inside_image(anchors, sizes)
    used = ((positive | negative) & centres_inside[0]).sum() + centres_inside[1].sum()
    wanted = common.encode_boxes(anchors[positive], box.expand(int(positive.sum()), 4))
    smooth = torch.where(wanted.abs() < 1 / 9, wanted**2 * 4.5, wanted.abs() - 1 / 18).sum()
    assert losses["rpn_box"].item() == pytest.approx((smooth / used).item(), rel=1e-4)


def test_sample_rois_adds_gts_and_marks_background():
    proposals = torch.tensor([[[0.0, 0, 10, 10], [1, 0, 11, 10], [40, 40, 60, 60], [0, 0, 0, 0]]])
    valid = torch.tensor([[True, True, True, False]])
    target = {
        "boxes": torch.tensor([[0.0, 0, 10, 10], [100, 100, 130, 130]]),
        "labels": torch.tensor([3, 5]),
        "ignore": torch.tensor([False, False]),
    }
    rois = sample_rois(proposals, valid, [target], 512, 0.9, num_classes=10)
    found = sorted(zip(rois.labels.tolist(), rois.boxes[:, 0].tolist(), rois.is_gt.tolist()))
    proposed = [(3, 0.0, False), (3, 0.0, True), (3, 1.0, False)]
    assert found == [*proposed, (5, 100.0, True), (10, 40.0, False)]
    assert rois.gt_boxes[rois.labels == 5].tolist() == [[100, 100, 130, 130]]
    assert rois.gt_boxes[rois.labels == 3].tolist() == [[0, 0, 10, 10]] * 3
    assert torch.equal(rois.gt_boxes, target["boxes"][rois.gt])


def test_of_two_objects_in_one_box_each_has_a_roi():
    """Their boxes are equal, so only the index says which of them a RoI belongs to."""
    box = torch.tensor([[0.0, 0, 10, 10]])
    target = {
        "boxes": box.repeat(2, 1),
        "labels": torch.tensor([3, 5]),
        "ignore": torch.tensor([False, False]),
    }
    rois = sample_rois(box[None], torch.tensor([[True]]), [target], 512, 1.0, num_classes=10)
    assert len(rois) == 3 and (rois.labels == target["labels"][rois.gt]).all()
    assert sorted(rois.gt[rois.is_gt].tolist()) == [0, 1]


def test_rois_are_indexed_and_moved_as_a_whole():
    rois = Rois(torch.tensor([0, 0, 1]), random_boxes(3))
    assert rois.flat().tolist() == [[i, *b] for i, b in zip([0, 0, 1], rois.boxes.tolist())]
    for index in (torch.tensor([True, False, True]), torch.tensor([0, 2]), [0, 2]):
        assert torch.equal(rois[index].flat(), rois.flat()[[0, 2]])
    moved = rois.moved(rois.boxes + 1)
    assert torch.equal(moved.image, rois.image) and torch.equal(moved.boxes, rois.boxes + 1)
    assert len(rois) == 3 and len(rois[:0]) == 0 == len(rois[:0].flat())


def test_frozen_stages_keep_weights_and_statistics():
    body = common.ResNetFPN("resnet18", 8, weights="random", norm="bn", frozen_stages=2).train()
    before = {k: v.clone() for k, v in body.state_dict().items()}
    sum(m.sum() for m in body(torch.rand(2, 3, 64, 64))).backward()
    moved = {k for k, v in body.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and not any(k.startswith(("stem", "stages.0")) for k in moved)
    assert any(k.startswith("stages.1") for k in moved)
    frozen = {k for k, p in body.named_parameters() if p.grad is None}
    assert frozen == {k for k in frozen if k.startswith(("stem", "stages.0"))} != set()


@pytest.mark.parametrize("norm", ["frozen_bn", "eval_bn"])
def test_fixed_statistics_with_and_without_trained_weights(norm):
    """eval_bn: after a step the statistics stay, weight and bias move, from C3 on. Values agree."""
    body = common.ResNetFPN("resnet18", 8, weights="random", norm=norm).train()
    plain = common.ResNetFPN("resnet18", 8, weights="random", norm="bn").eval()
    for name, value in body.state_dict().items():
        torch.manual_seed(len(name))
        value.copy_(torch.rand_like(value) + 0.1 if ".weight" not in name else value)
    assert plain.load_state_dict(body.state_dict(), strict=False).unexpected_keys == []
    image = torch.rand(2, 3, 64, 64)
    for mine, theirs in zip(body(image), plain(image)):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    before = {k: v.clone() for k, v in body.state_dict().items()}
    sum(m.sum() for m in body(image)).backward()
    torch.optim.SGD([p for p in body.parameters() if p.requires_grad], 0.1).step()
    moved = {k for k, v in body.state_dict().items() if not torch.equal(v, before[k])}
    of_norms = {k for k in before if k.split(".")[-2][:2] == "bn" or ".downsample.1." in k}
    trained = {k for k in of_norms if k.endswith(("weight", "bias")) and k[:8] != "stages.0"}
    assert len(of_norms & before.keys()) > 60
    assert of_norms & moved == (trained if norm == "eval_bn" else set())


def test_from_scratch_eval_bn_is_groupnorm():
    body = common.ResNetFPN("small", 8, weights="none", norm="eval_bn")
    assert isinstance(body.stem[1], torch.nn.GroupNorm)


def test_groupnorm_takes_one_value_a_group():
    """A small photo's last level has one cell, and a narrow network one channel a group."""
    norm = common.make_norm("gn")(8)
    torch.nn.init.constant_(norm.bias, 0.5)
    torch.testing.assert_close(norm(torch.rand(1, 8, 1, 1)), torch.full((1, 8, 1, 1), 0.5))
    x = torch.rand(2, 8, 3, 5)
    assert torch.equal(norm(x), torch.nn.GroupNorm.forward(norm, x))


NAMES = ["small", "resnet18", "resnet34", "resnet50", "resnext101_32x8d"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("extra,first", [("pool", 4), ("conv", 8), ("conv_p5", 8)])
def test_backbone_levels(name, extra, first):
    if name == "resnext101_32x8d" and extra != "conv":
        pytest.skip("one size of this large model is enough")
    body = common.ResNetFPN(name, 16, extra, weights="none")
    maps = body(torch.rand(1, 3, 64, 128))
    assert body.strides == tuple(first * 2**i for i in range(5))
    sides = [(max(1, 64 // s), max(1, 128 // s)) for s in body.strides]
    assert [tuple(m.shape[1:]) for m in maps] == [(16, *side) for side in sides]


def test_backbone_loads_and_freezes_weights(tmp_path):
    net = torchvision.models.resnet18()
    torch.save(net.state_dict(), tmp_path / "r18.pth")
    body = common.ResNetFPN("resnet18", 16, weights=str(tmp_path / "r18.pth"))
    assert torch.equal(body.stem[0].weight, net.conv1.weight)
    trained = {n.split(".")[1] for n, p in body.stages.named_parameters() if p.requires_grad}
    assert not any(p.requires_grad for p in body.stem.parameters())
    assert {n[0] for n, p in body.stages.named_parameters() if p.requires_grad} == {"1", "2", "3"}
    assert trained and isinstance(body.stem[1], torchvision.ops.FrozenBatchNorm2d)
    with pytest.raises(common.BadInput, match="small, weights imagenet: .*has no weights"):
        common.ResNetFPN("small", 16)
    with pytest.raises(common.BadInput, match="resnet34"):
        common.ResNetFPN("resnet34", 16, weights=str(tmp_path / "r18.pth"))


def test_small_backbone_is_half_of_resnet18():
    """Of each stage the first block remains, with half the channels; the pyramid is the same."""
    net, whole = (
        common.make_resnet("small", None, torch.nn.BatchNorm2d),
        torchvision.models.resnet18(),
    )
    theirs = {k: v for k, v in whole.state_dict().items() if k[6:9] != ".1."}
    assert net.state_dict().keys() == theirs.keys()
    for name, value in net.state_dict().items():
        half = [s if s in (1, 3, 7, 1000) else s // 2 for s in theirs[name].shape]
        assert list(value.shape) == half, name


def test_coarse_maps_begin_faint_from_scratch():
    norms = lambda weights: [  # noqa: E731
        block[1].weight for block in common.ResNetFPN("small", 8, weights=weights).fpn.inner_blocks
    ]
    assert [w.unique().tolist() for w in norms("none")] == [[1.0], *[[pytest.approx(0.2)]] * 3]


def test_p7_follows_p6_without_relu():
    extra = common.ConvP6P7(4, 3)
    c5 = torch.randn(1, 4, 8, 8)
    (_, p6, p7), _ = extra([None], [c5], ["c5"])
    torch.testing.assert_close(p7, extra.p7(extra.p6(c5)))
    assert (p6 < 0).any()


def test_retina_towers_shapes_and_prior():
    towers = RetinaTowers(8, 9, 5)
    logits, deltas, maps = towers([torch.rand(2, 8, 8, 8), torch.rand(2, 8, 4, 4)])
    assert logits.shape == (2, 9 * 80, 5) and deltas.shape == (2, 9 * 80, 4)
    assert [m.shape[-1] for m in maps] == [8, 4]
    assert logits.sigmoid().mean().item() == pytest.approx(0.01, rel=0.2)
