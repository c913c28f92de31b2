"""Published weights: each source's file, converted, computes what the source's program computes.

No such file can be downloaded where this was written. So a file with the source's names, shapes,
orders and conventions is filled with random numbers (released_files.py), and both sides compute
what follows from it, the source's side in its own order (released_heads.py), in float64. Then every
order and convention is broken once, and the comparison must notice.
"""

import copy
import dataclasses
import importlib
from functools import partial

import pytest
import released_files as files
import released_heads as heads
import torch

import common
import engine
from baselines import gfl
from common import BadInput
from engine.checkpoints import start_from
from engine.metrics import in_original_pixels
from studies import published
from studies.published import convert


@pytest.fixture
def float64(monkeypatch):
    """Everything in float64, also what is float32 in use."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(common, "constant", lambda v, device: torch.tensor(v, device=device))
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def detector(checkpoint):
    script = importlib.import_module(checkpoint["method"])
    settings = script.Settings.from_dict(checkpoint["settings"])
    with torch.device("meta"):
        model = script.Detector(settings.model.without_download(), 80)
    model.load_state_dict(checkpoint["model"], assign=True)
    return model.eval()


def change(name, function):
    def break_it(checkpoint):
        checkpoint["model"][name] = function(checkpoint["model"][name])

    return break_it


def roll(layer):
    return change(f"{layer}.bias", lambda rows: rows.roll(1, 0))


def exchange(a, b):
    def break_it(checkpoint):
        state = checkpoint["model"]
        state[a], state[b] = state[b], state[a]

    return break_it


def without(switch):
    return lambda checkpoint: checkpoint["settings"]["model"]["legacy"].remove(switch)


LEVELS = exchange(*(f"backbone.fpn.layer_blocks.{i}.0.weight" for i in (1, 2)))
LTRB = change("regress.offsets.weight", lambda rows: rows[[0, 2, 1, 3]])
BGR = change("backbone.stem.0.weight", lambda weight: weight.flip(1))
EPS = change("backbone.stages.3.0.bn1.running_var", lambda var: var + 1e-5)
RPN_BIAS = change("rpn.deltas.bias", lambda bias: bias + 1 / 16)
BIN_STARTS = change("drp.0.fc.5.bias", lambda bias: bias + 1 / 5.6)
GRIDS = exchange("grids.0.heat.3.weight", "grids.1.heat.3.weight")
MASKS = {10: roll("mask_branch.logits"), 11: roll("mask_branch.iou.5")}
CAFFE = [{0: without("caffe_stride")}, {0: without("caffe_pixels")}, {0: BGR}, {4: EPS}]

# name: the file, what is compared, and what is broken: in each dictionary at once, and the pairs
# that must notice by their places; 0 to 4 are features, 5 and 6 the RPN's, 7 on the heads'
CASES = {
    "d2det": (
        files.d2det,
        partial(heads.d2det, second=False, masks=False),
        [
            {6: without("rounded_corners"), 7: roll("classify.5"), 8: LTRB},
            {7: BIN_STARTS},
            {8: without("unaligned")},
            {1: LEVELS},
            {0: BGR},
        ],
    ),
    "d2det with masks": (
        partial(files.d2det, masks=True),
        partial(heads.d2det, second=False, masks=True),
        [MASKS],
    ),
    "d2det, second release": (
        partial(files.d2det, second=True, masks=True),
        partial(heads.d2det, second=True, masks=True),
        [{6: RPN_BIAS, 7: roll("classify.5"), 8: LTRB, **MASKS}],
    ),
    "cpm": (
        files.cpm,
        heads.cpm,
        [
            *CAFFE,
            {1: LEVELS},
            {7: without("unaligned")},
            {6: without("rounded_sides"), 7: roll("classify.5"), 8: roll("rsm.5")}
            | {9: GRIDS, 12: roll("ism.fc.5")},
        ],
    ),
    "double-head": (
        files.double_head,
        heads.double_head,
        [{7: without("adaptive")}, {6: RPN_BIAS, 7: roll("cls.fc"), 8: roll("box.conv")}],
    ),
    "faster r-cnn": (
        files.faster_rcnn,
        heads.faster_rcnn,
        [
            *CAFFE,
            {7: without("unaligned")},
            {6: without("rounded_sides"), 7: roll("classify.5"), 8: roll("regress")},
        ],
    ),
    "retinanet": (
        files.retinanet,
        partial(heads.retinanet, second=False),
        [{0: roll("head.cls_logits"), 1: without("rounded_corners")}, {1: roll("head.box_deltas")}],
    ),
    "iou-aware, mmdet 2": (
        partial(files.retinanet, iou=True),
        partial(heads.retinanet, second=True),
        [{1: change("head.box_deltas.bias", lambda v: v + 1 / 8), 2: roll("head.iou_logits")}],
    ),
    "gfl": (
        files.gfl,
        heads.gfl,
        [{1: without("pixel_centres")}, {1: change("head.scales", lambda v: v.flip(0))}],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_network_computes_what_the_source_does(name, float64):
    file, compute, breaks = CASES[name]
    source = file()
    whole = convert(dict(source), mmdet=2 if "mmdet 2" in name else 1)

    def errors(broken=()):
        checkpoint = {**whole, "model": dict(whole["model"])}
        checkpoint["settings"] = copy.deepcopy(whole["settings"])
        for break_it in broken:
            break_it(checkpoint)
        with torch.no_grad():
            pairs = compute(source, detector(checkpoint))
        assert all(a.shape == b.shape and b.isfinite().all() for a, b in pairs)
        return [((a - b).abs() / (1 + b.abs())).max().item() for a, b in pairs]

    assert max(errors()) < 1e-9
    for broken in breaks:
        found = errors(broken.values())
        assert min(found[place] for place in broken) > 1e-8, (found, broken)


# millions of numbers: parameters, and the statistics of BatchNorm
@pytest.mark.parametrize(
    "file,millions,unused",
    [
        (files.d2det, 80.1, 53),
        (partial(files.d2det, second=True, masks=True), 111.3, 53),
        (files.cpm, 153.9, 1),
        (partial(files.cpm, blocks=(3, 4, 23, 3)), 173.0, 1),
        (files.double_head, 47.4, 53),
        (files.faster_rcnn, 41.8, 1),
        (files.retinanet, 38.0, 53),
        (files.gfl, 32.5, 54),
    ],
)
def test_every_name_at_the_published_widths(file, millions, unused):
    """Unused: the counters of BatchNorm, the anchors, GFL's constant."""
    source = file(wide=True)
    checkpoint = convert(dict(source))
    count = sum(v.numel() for v in checkpoint["model"].values())
    assert count / 1e6 == pytest.approx(millions, abs=0.06)
    assert len(checkpoint["unused"]) == unused
    assert checkpoint["categories"][27] == {"id": 32, "name": "tie"}
    assert len(checkpoint["categories"]) == 80


@pytest.mark.parametrize(
    "edit,says",
    [
        (lambda s: s.pop("D2Det_head.convs.3.gn.bias"), r"without regress\.trunk\.10\.bias"),
        (lambda s: s.update({"mask_head.x.weight": torch.ones(1)}), r"has no mask_head\.x\.weight"),
        (lambda s: s.pop("D2Det_head.D2Det_reg.weight"), "without regress.offsets.weight"),
        (
            lambda s: s.pop("bbox_roi_extractor.roi_layers.2.offset_fc.4.bias"),
            r"without drp\.2\.fc\.5\.bias",
        ),
        (lambda s: s.update({"bbox_head.fc_cls.bias": torch.ones(21)}), r"80 classes.*\[21\]"),
        (lambda s: s.pop("backbone.layer3.5.conv1.weight"), "backbone is none of resnet50"),
        (
            lambda s: [s.pop(k) for k in [*s] if "D2Det_reg" in k],
            "layers, such as .* None of D2Det",
        ),
    ],
)
def test_a_file_that_differs_is_refused_by_name(edit, says):
    source = dict(files.d2det(wide=True))
    edit(source)
    with pytest.raises(BadInput, match=f"x.pth: .*{says}"):
        convert(source, "x.pth")


def test_a_baseline_becomes_a_checkpoint_of_the_method():
    state = convert(dict(files.retinanet(wide=True)), method="iou_aware_retinanet")
    assert state["method"] == "iou_aware_retinanet" and not state["settings"]["model"]["iou_head"]
    assert convert(dict(files.retinanet(wide=True)))["method"] == "baselines.retinanet"


def test_a_gfl_of_mmdetection_2_is_refused():
    with pytest.raises(BadInput, match="MMDetection 2"):
        convert(dict(files.gfl(wide=True)), mmdet=2)


def test_deformable_and_resnext_backbones_are_recognised():
    model = convert(dict(files.d2det(wide=True, dcn=27)))["settings"]["model"]
    assert (model["dcn"], model["drp_samples"], model["masks"]) == ("v2", 2, False)
    old = {
        k.replace(".conv_offset", "_offset"): v for k, v in files.d2det(wide=True, dcn=18).items()
    }
    assert convert(old)["settings"]["model"]["dcn"] == "v1"


def test_from_the_command_line_to_detections(tmp_path, capsys):
    """A file as MMDetection saves it becomes a checkpoint that detects COCO's names."""
    file, out = tmp_path / "r50.pth", tmp_path / "gfl.pt"
    state = {f"module.{k}": v for k, v in files.gfl().items()}
    torch.save({"meta": {"mmdet_version": "1.0rc0"}, "state_dict": state}, file)
    published.main([str(file), "--out", str(out)])
    said = capsys.readouterr().out
    assert "GFL: resnet50" in said and "not needed: 54 of 368" in said
    assert f"python -m baselines.gfl --predict PHOTO.jpg --weights {out}" in said
    loaded = engine.load(out, score_threshold=0.0, test_scales=(160,))
    image = torch.randint(0, 256, (3, 64, 64)).byte()
    assert {*loaded.detect(image).names} <= {c["name"] for c in published.coco_categories()}
    assert loaded.settings.model.legacy == ("pixel_centres", "last_pixel")


def test_files_that_are_no_weights_are_refused(tmp_path, capsys):
    torch.save({"state_dict": {"a.weight": torch.ones(2)}, "odd": tmp_path}, tmp_path / "odd.pth")
    torch.save({"state_dict": {"a.weight": torch.ones(2)}}, tmp_path / "other.pth")
    for name, says in (("odd", "more than weights"), ("other", "None of"), ("no", "no such file")):
        with pytest.raises(SystemExit):
            published.main([str(tmp_path / f"{name}.pth"), "--out", str(tmp_path / "x.pt")])
        assert says in capsys.readouterr().err


def test_training_from_such_weights_asks_for_their_conventions():
    state = convert(dict(files.gfl()))
    settings = gfl.Settings.from_dict(state["settings"])
    model = gfl.Detector(settings.model.without_download(), 80)
    arguments = state, "x.pt", state["categories"], gfl.Detector
    model.settings = dataclasses.replace(model.settings, legacy=())
    with pytest.raises(BadInput, match="x.pt: its weights need --legacy pixel_centres last_pixel"):
        start_from(model, *arguments)
    model.settings = dataclasses.replace(model.settings, legacy=("last_pixel", "pixel_centres"))
    start_from(model, *arguments)
    torch.testing.assert_close(model.head.scales, state["model"]["head.scales"])


def test_last_pixel_undoes_how_ground_truth_was_resized():
    """There the box 10..29 (first and last pixel), scaled by 2, became 20..58."""
    images, targets = [torch.zeros(3, 100, 100)], [{"size": (50, 50)}]
    found = {"boxes": torch.tensor([[20.0, 20, 59, 59]]), "image": torch.tensor([0])}
    there = in_original_pixels(found, images, targets, False, last_pixel=True)
    assert there["boxes"].tolist() == [[10, 10, 30, 30]]
    found["boxes"] = torch.tensor([[41.0, 20, 80, 59]])  # the same, in the mirrored image
    there = in_original_pixels(found, images, targets, True, last_pixel=True)
    assert there["boxes"].tolist() == [[10, 10, 30, 30]]
