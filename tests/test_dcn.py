"""Deformable backbones: what the layer computes, where it stands, what loads, which rows use it."""

import json

import pytest
import torch
import torch.nn.functional as F
import torchvision
from methods import batch, build, settings_of
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

import common
import cpm_rcnn
import d2det
import engine
from engine.checkpoints import load_checkpoint
from engine.command import read_rows
from engine.detector import DeformableConv, make_deformable
from studies.bench import torchvision_detector
from studies.cost import flop_counter


def convs(stride=1, groups=1, modulated=True):
    """A convolution, a deformable one of the same weight, and an input wider than high."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride, padding=1, groups=groups, bias=False)
    x = torch.randn(2, 4, 7, 10).contiguous(memory_format=torch.channels_last)
    return conv, DeformableConv(conv, modulated), x


@pytest.fixture
def narrow(monkeypatch):
    """Makes every backbone one bottleneck a stage, whose 3x3 convolutions have few channels."""

    def make_resnet(name, weights, norm_layer):
        return ResNet(Bottleneck, [1, 1, 1, 1], norm_layer=norm_layer, groups=2, width_per_group=4)

    monkeypatch.setattr(common, "make_resnet", make_resnet)


def backbone(dcn, name="resnet50", **changes):
    torch.manual_seed(0)
    body = common.ResNetFPN(name, 8, **{"weights": "random", "norm": "gn", **changes})
    if dcn != "none":
        make_deformable(body, dcn)
    return body


def new_keys(deformed, plain) -> set[str]:
    """Names of a deformed backbone's state that a plain one does not have; all others it has."""
    names, known = deformed.state_dict().keys(), plain.state_dict().keys()
    assert known <= names
    return names - known


# ------------------------------------------------------------------------------ the layer


@pytest.mark.parametrize("stride, groups", [(1, 1), (2, 2)])
@pytest.mark.parametrize("modulated, part, channels", [(False, 1, 18), (True, 0.5, 27)])
def test_starts_as_the_convolution_or_as_half_of_it(stride, groups, modulated, part, channels):
    conv, deformable, x = convs(stride, groups, modulated)
    torch.testing.assert_close(deformable(x), part * conv(x), atol=1e-5, rtol=1e-5)
    assert deformable.conv_offset.weight.shape == (channels, 4, 3, 3)
    assert deformable.weight is conv.weight


@pytest.mark.parametrize("amount", [1.0, 0.5])
@pytest.mark.parametrize("axis, beyond", [(0, (1, 1, 1, 2)), (1, (1, 2, 1, 1))])
def test_offsets_are_y_and_x_in_pixels(axis, beyond, amount):
    """All taps look further down (even channels), or to the right (odd ones)."""
    conv, deformable, x = convs(modulated=False)
    with torch.no_grad():
        deformable.conv_offset.bias[axis::2] = amount
    shifted = F.conv2d(F.pad(x, beyond), conv.weight).narrow(2 + axis, 1, x.shape[2 + axis])
    wanted = (1 - amount) * conv(x) + amount * shifted
    torch.testing.assert_close(deformable(x), wanted, atol=1e-5, rtol=1e-5)


def test_taps_run_row_by_row():
    """Tap 5, right of the centre, looks at the centre; of all taps only it and tap 1 count."""
    conv, deformable, x = convs()
    with torch.no_grad():
        deformable.conv_offset.bias[2 * 5 + 1] = -1  # x
        deformable.conv_offset.bias[18:] = -100
        deformable.conv_offset.bias[[18 + 1, 18 + 5]] = 100
        weight = torch.zeros_like(conv.weight)
        weight[..., 0, 1], weight[..., 1, 1] = conv.weight[..., 0, 1], conv.weight[..., 1, 2]
    wanted = F.conv2d(x, weight, padding=1)
    torch.testing.assert_close(deformable(x), wanted, atol=1e-5, rtol=1e-5)


def test_bf16_autocast_leaves_positions_float32():
    _, deformable, x = convs()
    torch.nn.init.normal_(deformable.conv_offset.weight)
    wanted = deformable(x.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        found = deformable(x.bfloat16().requires_grad_())
    torch.testing.assert_close(found, wanted)
    found.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in deformable.parameters())


def test_operations_are_those_of_both_convolutions():
    counts = []
    for layer in (convs()[0], convs()[1]):
        with flop_counter() as counter:
            layer(torch.randn(2, 4, 7, 10, requires_grad=True)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[1] == counts[0] * (1 + 27 / 6) == 3 * 2 * 2 * 70 * 36 * (6 + 27)


# ------------------------------------------------------------------------------ the backbone


@pytest.mark.parametrize("extra", ["pool", "conv"])
def test_zero_offsets_and_a_full_mask_are_the_plain_backbone(narrow, extra):
    plain, image = backbone("none", extra=extra), torch.rand(1, 3, 64, 96)
    wanted = plain(image)
    for dcn in ("v1", "v2"):
        body = backbone(dcn, extra=extra)
        state = {**body.state_dict(), **plain.state_dict()}
        for name in new_keys(body, plain):
            assert not state[name].any()
            if dcn == "v2" and name.endswith("bias"):
                state[name][18:] = 100
        body.load_state_dict(state)
        for found, want in zip(body(image), wanted):
            torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


def test_every_bottleneck_of_c3_to_c5_is_deformable_strided_ones_too():
    """C2 is not. Offsets have a gradient from the first step on, masks too."""
    body = backbone("v2")
    sum(m.square().mean() for m in body(torch.rand(1, 3, 64, 64))).backward()
    blocks = [4, 6, 3]
    where = [f"stages.{s}.{j}.conv2" for s, n in enumerate(blocks, 1) for j in range(n)]
    ends = ("conv_offset.weight", "conv_offset.bias")
    assert new_keys(body, backbone("none")) == {f"{w}.{end}" for w in where for end in ends}
    for name in where:
        conv = body.get_submodule(name)
        strided = name.endswith(".0.conv2")
        assert conv.stride == conv.conv_offset.stride == ((2, 2) if strided else (1, 1))
        offset, mask = conv.conv_offset.weight.grad.split([18, 9])
        assert offset.any() and mask.any(), name


def test_weights_of_the_plain_network_load(tmp_path):
    """Strictly, with or without the classifier."""
    state = torchvision.models.resnet50().state_dict()

    def loaded(state):
        torch.save(state, tmp_path / "r50.pth")
        return backbone("v2", weights=str(tmp_path / "r50.pth"), norm="auto")

    body = loaded(state)
    found = {f"layer{int(k[0]) + 1}{k[1:]}": v for k, v in body.stages.state_dict().items()}
    kept = {k for k in state if k.startswith("layer") and not k.endswith("num_batches_tracked")}
    assert kept == {k for k in found if "conv_offset" not in k}
    assert all(torch.equal(found[k], state[k]) for k in kept)
    assert not body.stages[0][0].conv2.weight.requires_grad
    assert all(p.requires_grad for p in body.stages[1][0].conv2.parameters())
    del state["fc.weight"], state["fc.bias"]
    loaded(state)
    del state["layer4.2.conv2.weight"]
    with pytest.raises(common.BadInput, match="layer4.2.conv2.weight"):
        loaded(state)


@pytest.mark.parametrize("name", ["small", "resnet18", "resnet34"])
def test_basic_blocks_are_refused(name):
    with pytest.raises(common.BadInput, match="--dcn v1: needs bottlenecks"):
        backbone("v1", name)


def test_resnext_keeps_its_groups():
    with torch.device("meta"):  # nothing is computed
        body = backbone("v1", "resnext101_64x4d")
    conv = body.stages[3][2].conv2
    assert (conv.groups, conv.weight.shape[1], conv.conv_offset.out_channels) == (64, 32, 18)


def test_resnext101_32x4d():
    """44.18 M parameters, 2.05 M of them the classifier's; torchvision has no weights."""
    with torch.device("meta"):
        body = backbone("none", "resnext101_32x4d", norm="bn")
    body.fpn = None
    assert sum(p.numel() for p in body.parameters()) == 44_177_704 - 2_049_000
    assert body.stages[0][0].conv2.weight.shape == (128, 4, 3, 3)
    with pytest.raises(
        common.BadInput, match="torchvision has no weights of it(.|\n)*takes a .pth file"
    ):
        backbone("none", "resnext101_32x4d", weights="imagenet")


def test_torchvisions_detector_gets_the_same_backbone():
    model = d2det.Model(backbone_weights="random", dcn="v2")
    with torch.device("meta"):
        body = torchvision_detector(d2det.Detector(model, 10)).backbone.body
    assert body["layer2"][0].conv2.conv_offset.out_channels == 27


# ------------------------------------------------------------------------------ detectors

SMALL = dict(fpn_channels=16, scales=(64,), test_scales=(64,), max_size=64, fc_channels=16)
HEADS = {
    d2det: dict(SMALL, conv_channels=16, num_convs=1, groups=4),
    cpm_rcnn: dict(SMALL, point_channels=1, num_convs=1),
}
MEANING = {  # type, backbone, least and largest side in training and in testing, mirrored
    (d2det, "table1.d2det_r101_dcnv2"): ("v2", "resnet101", (800, 800), (800, 800), False),
    (d2det, "table1.d2det_ms"): ("v2", "resnet101", (400, 1200), (600, 1200), True),
    (cpm_rcnn, "table7.x101_dcn"): ("v1", "resnext101_64x4d", (800, 800), (800, 800), False),
    (cpm_rcnn, "table7.x101_dcn_ms"): ("v1", "resnext101_64x4d", (600, 864), (800, 800), False),
    (cpm_rcnn, "table7.x101_dcn_ms_test"): (
        "v1", "resnext101_64x4d", (600, 864), (400, 1200), True
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "method, row", list(MEANING), ids=lambda p: p if isinstance(p, str) else ""
)
def test_rows_are_the_papers_experiments_and_train(narrow, method, row):
    rows, printed = read_rows(method.__name__)
    assert row in printed
    settings = method.Settings().replace(**rows[row])
    network, test = settings.model, settings.test
    sides = [(min(s), max(s)) for s in (settings.data.scales, test.test_scales)]
    assert (network.dcn, network.backbone, *sides, test.test_flip) == MEANING[method, row]
    if method is d2det:
        assert test.soft_nms and network.drp_samples == 1
    else:
        assert network.grid_rois == 32
        assert test.soft_nms == test.test_flip and test.score_threshold == 0.03
    small = {**HEADS[method], "backbone": network.backbone, "dcn": network.dcn}
    torch.manual_seed(0)
    model = build(method, settings_of(method, **{**rows[row], **small}))
    images, targets = batch(1, 64)
    losses = model.loss(images, targets)
    sum(losses.values()).backward()
    offset = model.backbone.stages[3][0].conv2.conv_offset
    assert offset.weight.grad.any() and all(v.isfinite() for v in losses.values())
    assert len(model.eval().predict(images)) == 1


def test_parameters_of_d2dets_deformable_resnet101():
    """27 channels of offsets and masks a convolution: 4 of 128, 23 of 256, 3 of 512 channels."""
    counts = []
    for row in ("table1.d2det_r101", "table1.d2det_r101_dcnv2"):
        rows, _ = read_rows("d2det")
        settings = d2det.Settings().replace(**rows[row], backbone_weights="random")
        with torch.device("meta"):
            model = d2det.Detector(settings.model, 80)
        counts.append(sum(p.numel() for p in model.parameters()))
    assert counts[1] - counts[0] == 27 * (9 * (4 * 128 + 23 * 256 + 3 * 512) + 4 + 23 + 3)


RUN = """--image-size 64 --scales 64 --test-scales 64 --max-size 64 --num-train 2 --num-val 1
 --batch 2 --steps 1 --workers 0 --fpn-channels 8 --conv-channels 8 --num-convs 1 --groups 2
 --fc-channels 8 --device cpu --log-every 1""".split()


def test_d2det_trains_deformed(tmp_path, narrow, capsys):
    out = ["--out", str(tmp_path / "r")]
    d2det.main([*RUN, *out, "--train", "--dcn", "v2", "--backbone", "resnet50"])
    state = load_checkpoint(tmp_path / "r" / "last.pt")
    moved = {k for k, v in state["model"].items() if "conv_offset" in k and v.any()}
    assert len(moved) == 6 and state["settings"]["model"]["dcn"] == "v2"
    model = engine.load(tmp_path / "r" / "last.pt")
    assert isinstance(model.model.backbone.stages[1][0].conv2, DeformableConv)
    with pytest.raises(SystemExit):
        d2det.main([*RUN, *out, "--eval", "--row", "release.r50"])
    assert "--dcn none" in capsys.readouterr().err


def test_runs_that_knew_nothing_of_it_resume(tmp_path, capsys):
    """What a run was made without is at its default: so it goes on, and with another value not."""
    out = tmp_path / "r"
    d2det.main([*RUN, "--out", str(out), "--train"])
    state = load_checkpoint(out / "last.pt")
    del state["settings"]["model"]["dcn"], state["settings"]["run"]["momentum"]
    torch.save(state, out / "last.pt")
    (out / "config.json").write_text(json.dumps(state["settings"]))
    d2det.main([*RUN, "--out", str(out), "--train", "--resume"])
    assert "resumed at step 1" in capsys.readouterr().out
    assert isinstance(engine.load(out / "last.pt").model, d2det.D2Det)
    torch.save(state, out / "last.pt")
    with pytest.raises(SystemExit):
        d2det.main([*RUN, "--out", str(out), "--train", "--resume", "--momentum", "0.5"])
    assert "cannot resume, the run was made with --momentum 0.9" in capsys.readouterr().err
