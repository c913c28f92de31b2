"""Double-Head R-CNN: equations and counts by hand, invariants, whole runs."""

import doctest

import pytest
import torch
from methods import (
    batch,
    behaviour,
    build,
    check_all_crowd,
    check_command_line,
    check_overfits,
    check_real_data,
    own_flags,
    settings_of,
    without_objects,
)

import common
import double_head as method
import engine
import kernels
from baselines.faster_rcnn import Rois
from double_head import ConvHead, FCHead, Settings, Test
from engine.command import read_rows

ROWS, _ = read_rows("double_head")
SMALL = dict(
    fpn_channels=16, fc_channels=32, conv_channels=32, norm="gn", proposals_train=60,
    proposals_test=40, workers=0,
)  # fmt: skip
NARROW = "--fpn-channels 8 --fc-channels 16 --conv-channels 16 --workers 0 --score-threshold"
RUN = f"""--image-size 64 --scales 64 --test-scales 64 --max-size 64 --num-train 12 --num-val 4
 --batch 2 --steps 6 --norm gn --log-every 1 --save-every 2 --device cpu --draw-score 0.01
 {NARROW} 0.05""".split()
REAL = f"""--preset tiny --steps 2 --scales 96 --test-scales 96 --max-size 160 --batch 2
 {NARROW} 0.3""".split()


def make(**changes):
    torch.manual_seed(0)
    return build(method, settings_of(method, **{**SMALL, **changes}))


def rois_of(*boxes):
    """RoIs in the first image."""
    return Rois(torch.zeros(len(boxes), dtype=torch.long), torch.tensor(boxes).float())


def sure(model):
    """The same model with class scores and boxes apart, as after training."""
    torch.manual_seed(1)
    for layer in [*model.cls.values(), *model.box.values()]:
        torch.nn.init.normal_(layer.weight, std=1)
    return model


def losses_of(model, images, targets):
    torch.manual_seed(2)  # the same RoIs are drawn
    return {k: v for k, v in model.loss(images, targets).items() if not k.startswith("rpn")}


def test_examples_in_docstrings():
    assert doctest.testmod(method).attempted >= 7 and doctest.testmod(method).failed == 0


# ------------------------------------------------------------------------------ equations, heads


def mega(head, kinds=(torch.nn.Conv2d, torch.nn.Linear)):
    return sum(m.weight.numel() for m in head.modules() if isinstance(m, kinds)) / 2**20


def test_parameters_of_table_2():
    """The paper's M is 2^20 and counts weights of layers alone."""
    printed = [1.06, 2.13, 3.19, 4.25, 5.31, 6.38, 7.44]
    for k, want in enumerate(printed, 1):  # 1.0625 each; 2.125 is printed as 2.13
        assert mega(ConvHead(256, k, False)) == 1.0625 * k == pytest.approx(want, abs=0.0051)
    for k, want in ((3, 4.13), (5, 7.19), (7, 10.25)):
        assert mega(ConvHead(256, k, True)) == pytest.approx(want, abs=0.0051)
    assert mega(FCHead(256)) == 13.25 and mega(method.NonLocalBlock(1024)) == 2
    with pytest.raises(ValueError, match="4 blocks"):
        ConvHead(256, 4, True)


def test_fuse_scores():
    fc, conv = torch.rand(2, 10000).double()
    fc[0], conv[1], fc[2] = 0, 0, 1
    fused = method.fuse_scores(fc, conv, "complementary")
    torch.testing.assert_close(fused, 1 - (1 - fc) * (1 - conv))  # as the release has it
    torch.testing.assert_close(fused, method.fuse_scores(conv, fc))  # both sums of Eq. 4
    for dtype in (torch.float32, torch.bfloat16):
        both = method.fuse_scores(fc.to(dtype), conv.to(dtype))
        assert (both >= fc.to(dtype)).all() and (both <= 1).all()
    three, one = torch.tensor(0.75), torch.tensor(0.25)
    values = [method.fuse_scores(three, one, how).item() for how in ("none", "max", "average")]
    assert values == [0.75, 0.75, 0.5] and method.fuse_scores(three, one) == 0.8125
    assert method.fuse_scores(one, three, "none") == 0.25


def test_task_weights_by_hand():
    ext = method.task_weights("double_head", 2.0, 2.5, 0.7, 0.8)
    assert ext["fc"] == pytest.approx((1.4, 0.6)) and ext["conv"] == pytest.approx((0.5, 2.0))
    assert method.task_weights("double_head", lambda_fc=0, lambda_conv=0) == {
        "fc": (0, 1), "conv": (1, 0),
    }  # fmt: skip
    assert method.task_weights("double_conv", 2.0, 2.5) == {"conv": (2.5, 0), "conv2": (0, 2.5)}


def trained(block):
    """The block in evaluation, in float64, with a BN that does something, as after training."""
    torch.manual_seed(3)
    for values in (block.out[1].weight, block.out[1].bias, block.out[1].running_mean):
        torch.nn.init.normal_(values)
    torch.nn.init.uniform_(block.out[1].running_var, 0.5, 2)
    return block.double().eval()


def plain_non_local(block, x):
    """Figure 5 (c), cell by cell: x [C, S, S]."""
    cells, linear = x.flatten(1).T, lambda f, v: v @ f.weight[:, :, 0, 0].T + f.bias
    theta, phi, g = (linear(f, cells) for f in (block.theta, block.phi, block.g))  # [N, C/2]
    seen, N = torch.zeros_like(g), len(cells)
    for group in torch.arange(theta.shape[1]).chunk(4):
        for i in range(N):
            weights = torch.stack([theta[i, group] @ phi[j, group] for j in range(N)])
            weights = weights.softmax(0) if block.softmax else weights / N
            seen[i, group] = sum(w * v for w, v in zip(weights, g[:, group]))
    bn = block.out[1]
    moved = (linear(block.out[0], seen) - bn.running_mean) / (bn.running_var + bn.eps).sqrt()
    return (cells + moved * bn.weight + bn.bias).clamp(min=0).T.reshape(x.shape)


@pytest.mark.parametrize("softmax", [False, True])
def test_non_local_block_against_a_slow_reference(softmax):
    block, x = trained(method.NonLocalBlock(16, softmax=softmax)), torch.randn(2, 16, 3, 4).double()
    want = torch.stack([plain_non_local(block, one) for one in x])
    torch.testing.assert_close(block(x), want)
    assert (want == 0).any() and (want > 0).any()  # ReLU is after the sum
    block.softmax = not softmax
    assert not torch.allclose(block(x), want, atol=1e-2)


def test_non_local_block_starts_as_relu_and_refuses_odd_widths():
    block, x = method.NonLocalBlock(128), torch.randn(3, 128, 7, 7)
    assert block.theta.out_channels == 64 and torch.equal(block(x), x.relu())
    assert block(x[:0]).shape == (0, 128, 7, 7)
    assert sum(p.numel() for p in method.NonLocalBlock(1024).parameters()) == (
        2 * 2**20 + 3 * 512 + 1024 + 2 * 1024  # Table 2's 2 M, biases, BN
    )
    with pytest.raises(ValueError, match="12 channels: a non-local block of 4 groups"):
        method.NonLocalBlock(12)
    with pytest.raises(ValueError, match="0 groups"):
        method.NonLocalBlock(12, groups=0)


def test_groups_attend_by_themselves():
    """What one group's theta and phi say moves its own share of the inner channels, no other."""
    block, seen = trained(method.NonLocalBlock(32)), []
    block.out[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 32, 7, 7).double()
    with torch.no_grad():
        block(x)
        for layer in (block.theta, block.phi):
            layer.weight[4:8] += torch.randn(4, 32, 1, 1)  # the second group of four channels
        block(x)
    changed = (seen[0] != seen[1]).flatten(2).any(2).all(0)  # [C/2]
    assert changed.nonzero()[:, 0].tolist() == [4, 5, 6, 7]


def test_maps_blocks_and_small_batches():
    fc, conv = FCHead(4, 16), ConvHead(4, 5, True, channels=16)
    x = torch.rand(2, 4, 7, 7)
    whole = fc.maps(x).sum((2, 3)) + fc.first.bias  # Appendix A: cells add up to the layer
    torch.testing.assert_close(whole, fc.first(x.flatten(1)))
    order = [type(b).__name__[:3] for b in conv.blocks]
    assert order == ["Res", "Non", "Res", "Non", "Res"]
    for head in (fc, conv):
        for n in (0, 1):  # in training: BN must survive both, and learn nothing of nothing
            before = [b.clone() for b in head.buffers() if b.ndim]
            head(x[:n]).sum().backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
            after = [b for b in head.buffers() if b.ndim]
            assert n or all(torch.equal(a, b) for a, b in zip(before, after))
            assert all(b.isfinite().all() for b in after)


def test_enlarged_rois_keep_their_level():
    rois = torch.tensor([[1.0, 10, 20, 30, 60]])
    assert method.enlarge_rois(rois, 1.5).tolist() == [[1, 5, 10, 35, 70]]
    model = make(pool_norm=False)
    maps = [torch.full((1, 16, 64 // 2**i, 64 // 2**i), float(i)) for i in range(5)]
    rois = rois_of((60, 60, 180, 180), (50, 50, 150, 150), (0, 0, 256, 256))
    level = model.pool(maps, rois, 7)[:, 0, 3, 3]
    assert level.tolist() == [1, 0, 2]  # P3, P2, P4: at twice the size one more each
    assert torch.equal(model.pool_enlarged(maps, rois, 2.0)[:, 0, 3, 3], level)
    assert model.pool_enlarged(maps, rois[:0], 2.0).shape == (0, 16, 7, 7)
    maps = [torch.rand(1, 16, 64 // 2**i, 64 // 2**i) for i in range(5)]
    near, enlarged = rois_of((75, 75, 125, 125)), rois_of((50, 50, 150, 150))  # both on P2
    want = model.pool(maps, enlarged, 7)
    torch.testing.assert_close(model.pool_enlarged(maps, near, 2.0), want)
    want = (want - want.mean((2, 3), keepdim=True)) / want.std((2, 3), False, keepdim=True)
    found = make(pool_norm=True).pool_enlarged(maps, near, 2.0)
    torch.testing.assert_close(found, want, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("heads", ["double_head", "fc", "conv", "double_fc", "double_conv"])
def test_conv_heads_alone_see_enlarged_rois_on_their_first_level(heads, monkeypatch):
    """On maps that say x, an RoI's mean is its centre, its spread its width: 1.3 times as wide."""
    model = sure(make(heads=heads, pool_norm=False)).eval()
    maps = []
    for i, stride in enumerate((4, 8, 16, 32, 64)):  # a level adds 1000 to what its cells say
        x = (torch.arange(512 // stride) + 0.5) * stride + 1000.0 * i
        maps.append(x.expand(1, 16, len(x), len(x)).contiguous())
    rois = rois_of((150, 150, 250, 250), (200, 200, 300, 300))  # 130 px are P3's
    seen, pools, roi_align = {}, [], kernels.roi_align
    for name, head in model.heads.items():
        head.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0]}))

    def count(features, *rest, **options):
        pools.append(len(features))
        return roi_align(features, *rest, **options)

    monkeypatch.setattr(kernels, "roi_align", count)
    logits, deltas = model.head_outputs(maps, rois)
    kinds = {name[:2] for name in model.heads}
    assert pools == [4] * ("fc" in kinds) + [1, 1, 1, 1] * ("co" in kinds)  # once for heads alike
    for name, pooled in seen.items():
        side = 130 if name.startswith("conv") else 100
        centre = torch.tensor([200.0, 250.0])
        want = centre[:, None] + (torch.arange(7) - 3) * side / 7
        torch.testing.assert_close(pooled, want[:, None, None].expand(2, 16, 7, 7))
        vector = model.heads[name](pooled)  # and both outputs come of that
        if name in logits:
            torch.testing.assert_close(logits[name], model.cls[name](vector))
        if name in deltas:
            torch.testing.assert_close(deltas[name].flatten(1), model.box[name](vector))
    assert set(seen) == set(logits) | set(deltas) == set(model.heads)


# ------------------------------------------------------------------------------ detector


def test_lambda_one_is_exactly_the_vanilla_loss():
    images, targets = batch()
    ext, vanilla = make(), make(lambda_fc=1.0, lambda_conv=1.0)
    vanilla.load_state_dict(
        {k: v for k, v in ext.state_dict().items() if k in vanilla.state_dict()}
    )
    assert [*vanilla.cls] == ["fc"] and [*vanilla.box] == ["conv"]  # what is not used is not built
    mixed, plain = losses_of(ext, images, targets), losses_of(vanilla, images, targets)
    assert set(plain) == {"fc_cls", "conv_reg"} and len(mixed) == 4
    assert mixed["fc_cls"].item() == pytest.approx(0.7 * plain["fc_cls"].item(), rel=1e-5)
    assert mixed["conv_reg"].item() == pytest.approx(0.8 * plain["conv_reg"].item(), rel=1e-5)
    torch.manual_seed(2)  # and by hand: Eq. 1 of cross entropy and smooth L1
    features, _, _, rois = vanilla.training_rois(images, targets)
    logits, deltas = vanilla.head_outputs(features, rois)
    want = 2.0 * torch.nn.functional.cross_entropy(logits["fc"], rois.labels)
    torch.testing.assert_close(plain["fc_cls"], want)
    positive = rois.labels < 10
    good = rois[positive]
    wanted = common.encode_boxes(good.boxes, good.gt_boxes, (0.1, 0.1, 0.2, 0.2))
    off = deltas["conv"][positive, good.labels] - wanted
    smooth = torch.where(off.abs() < 1, off**2 / 2, off.abs() - 0.5).sum() / len(rois)
    torch.testing.assert_close(plain["conv_reg"], 2.5 * smooth)


@pytest.mark.parametrize("row", [*ROWS])
def test_every_row_builds_and_trains(row):
    keep = ("backbone", "epochs", "drops")  # sizes stay small here
    changes = {k: v for k, v in ROWS[row].items() if k not in keep}
    model, (images, targets) = sure(make(**changes)), batch(1, 64)
    sum(model.loss(images, targets).values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert set(model.eval().predict(images)[0]) == {"boxes", "scores", "labels"}


RES, NL = method.ResidualBlock, method.NonLocalBlock
MEANING = {  # weights of each head's class and box loss, conv-head's blocks, backbone
    "table1.fc": ({"fc": (1, 1)}, None, "resnet50"),
    "table1.conv": ({"conv": (1, 1)}, [RES] * 5, "resnet50"),
    "table1.double_fc_weighted": ({"fc": (2, 0), "fc2": (0, 2)}, None, "resnet50"),
    "table1.double_conv": ({"conv": (1, 0), "conv2": (0, 1)}, [RES] * 5, "resnet50"),
    "table1.reverse_weighted": ({"fc": (0, 2), "conv": (2.5, 0)}, [RES] * 5, "resnet50"),
    "table1.double_head": ({"fc": (1, 0), "conv": (0, 1)}, [RES] * 5, "resnet50"),
    "table2.k3": ({"fc": (2, 0), "conv": (0, 2.5)}, [RES] * 3, "resnet50"),
    "table2.nl3": ({"fc": (2, 0), "conv": (0, 2.5)}, [RES, NL, RES], "resnet50"),
    "table4.ext_r101": (
        {"fc": (1.4, 0.6), "conv": (0.5, 2.0)}, [RES, NL, RES, NL, RES], "resnet101",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", list(MEANING))
def test_rows_are_the_papers_experiments(row):
    weights, blocks, backbone = MEANING[row]
    settings = Settings().replace(**ROWS[row])
    model, run = settings.model, settings.run
    assert {k: pytest.approx(v) for k, v in weights.items()} == model.loss_weights()
    assert model.backbone == backbone and model.conv_scale == 1.3 and not model.non_local_softmax
    assert run.epochs * 118_287 / 8 == pytest.approx(180_000, rel=1e-3)
    assert run.drops == (120 / 180, 160 / 180) and (run.lr, run.lr_batch) == (0.01, 8)
    if blocks:
        head = ConvHead(8, model.num_blocks, model.non_local, channels=16)
        assert [type(b) for b in head.blocks] == blocks


ONE_TRAINING = """table1.fc table2.k0 table4.fpn_r50
table1.double_head_weighted table2.k5
table2.nl5 figure6.fc_1.0_conv_1.0 table4.double_head_r50
table3.none table3.max table3.average table3.complementary figure6.fc_0.7_conv_0.8 table4.ext_r50
table4.ext_r101 table5.ext_r101"""


def test_rows_that_are_one_training():
    """No other two rows agree in all but how they are tested."""
    groups = {}
    for row, changes in ROWS.items():
        settings = Settings().replace(**changes)
        trained = repr((settings.model, settings.run, settings.data))
        groups.setdefault(trained, set()).add(row)
    found = [rows for rows in groups.values() if len(rows) > 1]
    assert sorted(map(sorted, found)) == sorted(sorted(g.split()) for g in ONE_TRAINING.split("\n"))


def test_an_image_that_is_all_crowd_trains():
    check_all_crowd(make())


def test_every_weight_learns_and_images_without_objects_train():
    model, (images, targets) = sure(make()), batch(4)
    for block in model.heads["conv"].blocks[1::2]:  # as after the first step
        torch.nn.init.ones_(block.out[1].weight)
    sum(model.loss(images, targets).values()).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    model.zero_grad(set_to_none=True)
    losses = model.loss(images, without_objects(targets))
    assert losses["fc_cls"] > 0 and losses["conv_cls"] > 0
    assert losses["fc_reg"] == losses["conv_reg"] == losses["rpn_box"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_batch_of_two_equals_two_singles():
    model, (images, _) = sure(make(score_threshold=0.2)).eval(), batch()
    for image, found in zip(images, model.predict(images)):
        (alone,) = model.predict([image])
        assert len(found["boxes"]) > 5 and (found["scores"].diff() <= 0).all()
        torch.testing.assert_close(alone["boxes"], found["boxes"], atol=1e-2, rtol=0)
        torch.testing.assert_close(alone["scores"], found["scores"], atol=1e-4, rtol=0)
    small = model.predict([images[0], images[1][:, :60, :70]])[1]["boxes"]  # padded to 96x96
    assert len(small) and small.min() >= 0 and small[:, 2].max() <= 70 and small[:, 3].max() <= 60


def test_candidates_take_the_class_and_head_they_should():
    model = make()
    probs = {"fc": torch.zeros(2, 10), "conv": torch.zeros(2, 10)}
    probs["fc"][0, 4], probs["conv"][0, 4], probs["conv"][1, 7] = 0.5, 0.5, 0.25
    deltas = {k: torch.zeros(2, 10, 4) for k in ("fc", "conv")}
    deltas["conv"][0, 4, 0], deltas["fc"][0, 4, 0] = 1.0, 2.0  # a tenth, a fifth of the width
    rois = rois_of((10, 10, 20, 20), (50, 50, 70, 70))
    out = dict(probs=probs, deltas=deltas, rois=rois, sizes=torch.full((1, 2), 99.0))
    for changes, score, left in (
        ({}, 0.75, 11), (dict(fusion="average"), 0.5, 11), (dict(fusion="none"), 0.5, 11),
        (dict(alone="fc"), 0.5, 12), (dict(alone="conv"), 0.5, 11),
    ):  # fmt: skip
        found = model.candidates(out, Test(score_threshold=0.3, **changes))
        assert found["labels"].tolist() == [4] and found["scores"].item() == score
        torch.testing.assert_close(found["boxes"], torch.tensor([[left, 10.0, left + 10, 20]]))
    del deltas["fc"]  # a head that only classifies takes the other one's boxes
    found = model.candidates(out, Test(score_threshold=0.3, alone="fc"))
    assert found["scores"].item() == 0.5 and found["boxes"][0, 0].item() == pytest.approx(11)


def test_one_image_can_be_overfitted():
    # NMS at 0.3: so short a training leaves rough boxes beside the good ones
    check_overfits(make(fpn_channels=32, roi_samples=64, nms_iou=0.3), 3, 120, 0.5)


# ------------------------------------------------------------------------------ flags, command line

CHANGED = dict(
    heads="double_fc", lambda_fc=0.5, lambda_conv=0.5, omega_fc=1.0, omega_conv=1.0, fusion="max",
    alone="fc", fc_channels=16, conv_channels=16, num_blocks=3, non_local=False, conv_scale=1.0,
    non_local_softmax=True, roi_samples=8, roi_positive=0.1, anchor_scale=2.0, rpn_samples=4,
    proposals_train=10, proposals_test=5, pool_norm=False, score_threshold=0.9, nms_iou=0.2,
    max_detections=3, rpn_floor=1.0,
)  # fmt: skip


def test_every_flag_is_covered():
    own = own_flags(method)
    assert own == {*CHANGED, "class_std"} - engine.Settings().flat().keys()


def test_class_outputs_start_at_that_deviation():
    model = make(class_std=0.3)
    for name, layer in model.cls.items():
        assert layer.weight.std().item() == pytest.approx(0.3, rel=0.1), name
    for name, layer in model.box.items():
        assert layer.weight.std().item() == pytest.approx(0.001, rel=0.1), name


@pytest.fixture(scope="module")
def known():
    assert behaviour(sure(make())) == behaviour(sure(make()))
    return behaviour(sure(make()))


@pytest.mark.parametrize("flag", list(CHANGED))
def test_flag_changes_the_run(known, flag):
    assert behaviour(sure(make(**{flag: CHANGED[flag]}))) != known


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(lambda_fc=1.5), "lambda-fc 1.5: at most 1"),
        (dict(num_blocks=4), "odd with non-local"),
        (dict(conv_channels=30), "multiple of 4"),
        (dict(conv_channels=28), "non-local block of 4 groups needs a multiple of 8"),
        (dict(conv_scale=0.0), "--conv-scale 0.0"),
        (dict(conv_scale=float("nan")), "--conv-scale nan"),
        (dict(heads="conv", alone="fc"), "no such classifier"),
        (dict(lambda_fc=1.0, lambda_conv=0.0), "no head has one of the tasks"),
        (dict(omega_fc=0.0, omega_conv=0.0), "no head has one of the tasks"),
    ],
)
def test_settings_that_make_no_detector(changes, message):
    with pytest.raises(common.BadInput, match=message):
        make(**changes)
    make(heads="fc", num_blocks=4)  # no conv-head, no rule


def test_the_command_line(tmp_path):
    check_command_line(method, RUN, tmp_path)


def test_real_data(detection_data, tmp_path):
    check_real_data(method, REAL, detection_data / "bccd", tmp_path)
