"""studies.explain: what is drawn are the detector's own tensors, of the detection named."""

import dataclasses
import doctest
import json

import pytest
import torch
from matplotlib.figure import Figure
from methods import batch, make, small, sure

import cpm_rcnn
import d2det
import dc_loss_clnms
import double_head
import iou_aware_retinanet
from baselines.faster_rcnn import Rois
from common import BadInput
from data import SyntheticDetection
from engine.checkpoints import as_saved, save_checkpoint
from studies import explain, inside_two_stage
from studies.seen import Seen, look


def seen_by(model, image, target) -> list[Seen]:
    return look(model, model.full_settings.test, image, target)


def numbers(seen: Seen, name: str) -> dict:
    """What is drawn of a detection: every column is drawn, too."""
    axes = [*Figure().subplots(1, 8)]
    seen.axes = iter(axes)
    explain.DRAW[name](seen)
    drawn = axes[: len(axes) - len([*seen.axes])]
    assert len(drawn) > 2 and all(axis.get_title() and axis.has_data() for axis in drawn)
    return seen.numbers


def two_stage(method, **changes):
    """A model that sees something: its class scores differ, its boxes and offsets are not zero."""
    model = small(method, score_threshold=0.02, **changes)
    torch.manual_seed(2)
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and ("fc" in name or "box" in name or "classify" in name):
            torch.nn.init.normal_(weight, std=0.2)
    return model


@pytest.mark.parametrize("pick", [3, 5])
def test_d2det_cells_average_to_the_box(pick):
    small = dict(conv_channels=16, num_convs=2, groups=4, masks=True, mask_channels=16)
    model = two_stage(d2det, **small, drp_per_level=pick == 3)
    torch.nn.init.normal_(model.regress.overlap.weight, std=1)
    (image,), (target,) = batch(1, 64)
    seen = seen_by(model, image, target)[pick]
    drawn, box = numbers(seen, "d2det"), seen.box
    cells, overlap = torch.tensor(drawn["cells"]), torch.tensor(drawn["overlap"])
    mean = cells[overlap > 0.5].mean(0)
    assert 0 < drawn["used"] == (overlap > 0.5).sum() < 49
    torch.testing.assert_close(mean.clamp(0, 64), box, atol=1e-2, rtol=0)
    # DRP's bins: moved by gamma of the proposal, and pooled where they are drawn
    bins = torch.tensor(drawn["bins"]).view(2, 49)
    proposal = torch.tensor(drawn["proposal"])
    (still,) = d2det.cell_centres(proposal[None]).flatten(2)
    moved = (bins - still) / (proposal[2:] - proposal[:2])[:, None] / model.settings.gamma
    rois = seen.outputs["rois"]
    results: list = []
    for pool in model.drp:
        assert not pool.fc._forward_hooks  # the study leaves none
        pool.fc.register_forward_hook(lambda *call: results.append(call[-1]))
    model.class_features(seen.outputs["features"], rois)  # of all proposals
    at = int(seen.candidates["roi"][seen.row])
    assert rois.boxes[at].tolist() == drawn["proposal"]
    offsets = torch.cat(results).view(-1, 2, 49)
    assert ((offsets - moved).abs().amax((1, 2)) < 1e-3).any() and moved.abs().max() > 0.01


def test_relative_weight_is_what_a_sample_adds():
    """A window of three samples a side: weights w are worth 9 w / sum(w) of the plain share."""
    assert doctest.testmod(inside_two_stage).attempted == 1
    assert doctest.testmod(inside_two_stage).failed == 0
    norm = torch.full((1, 4, 4), -30.0)  # weights 1 ...
    norm[0, 2, 2] = 0  # ... and e^6, in the one window of rows and columns 1 to 3
    weight = inside_two_stage.relative_weight(norm)
    heavy = torch.tensor(6.0).exp()
    assert weight[2, 2] == pytest.approx(float(9 * heavy / (heavy + 8)), rel=1e-4)
    assert weight[2, 3] == pytest.approx(float(9 / (heavy + 8)), rel=1e-4)
    assert weight[0, 0] == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("pick", [0, 2])
def test_cpm_stages_lead_to_the_box(pick):
    model = two_stage(cpm_rcnn, point_channels=2, num_convs=1)
    for head in model.grids:
        torch.nn.init.normal_(head.heat[-1].weight, std=1)
    (image,), (target,) = batch(1, 64)
    seen = seen_by(model, image, target)[pick]
    drawn = numbers(seen, "cpm_rcnn")
    first, second, third = drawn["stages"]
    assert first["box"] == second["enters"] and second["box"] == third["enters"]
    assert third["box"] == pytest.approx(seen.box.tolist(), abs=1e-3)
    points, probs = torch.tensor(first["points"]), torch.tensor(first["probs"])
    left = (points[:3, 0] * probs[:3]).sum() / probs[:3].sum()  # Eq. of decode_grid
    assert left.clamp(0, 64).item() == pytest.approx(first["box"][0], abs=1e-2)
    fused = cpm_rcnn.fused_score(*(torch.tensor(drawn[k]) for k in ("cls", "ism", "rsm")), 0.8)
    assert fused.item() == pytest.approx(drawn["scores"], abs=1e-5)
    assert drawn["scores"] == pytest.approx(seen.score)


def test_whole_grid_has_each_map_in_its_window():
    maps = torch.zeros(9, 4, 4)
    maps[5, 3, 0] = 0.5  # the lower middle point: its window begins at x = 2, y = 4
    canvas = inside_two_stage.whole_grid(maps)
    assert canvas[7, 2] == 0.5 and canvas.sum() == 0.5


@pytest.mark.parametrize("pick", [0, 4])
def test_double_head_cells_are_what_the_logit_is_made_of(pick):
    model = two_stage(double_head, conv_channels=16)
    (image,), (target,) = batch(1, 64)
    seen = seen_by(model, image, target)[pick]
    drawn, label = numbers(seen, "double_head"), seen.label
    fc, conv = (drawn["class_score"][k] for k in ("fc", "conv"))
    assert fc + conv * (1 - fc) == pytest.approx(seen.score, abs=1e-5)
    features, proposal = seen.outputs["features"], torch.tensor([drawn["proposal"]])
    roi = Rois(torch.zeros(1).long(), proposal)
    with torch.no_grad():
        logits, _ = model.head_outputs(features, roi)
    want = logits["conv"][0, label] - model.cls["conv"].bias[label]
    assert sum(drawn["conv_cells"]) == pytest.approx(want.item(), abs=2e-2)
    # fc: a little less of one cell changes the logit by that much of what the cell adds
    cell, less = 24, model.pool_for_heads(features, roi)["fc"].clone()
    less[0, :, cell // 7, cell % 7] *= 0.99
    with torch.no_grad():
        change = logits["fc"][0, label] - model.cls["fc"](model.heads["fc"](less))[0, label]
    assert change.item() == pytest.approx(0.01 * drawn["fc_cells"][cell], rel=0.1, abs=2e-4)
    slide, middle = drawn["slide"], len(drawn["slide"]["shift"]) // 2
    box = seen.box if seen.truth is None else seen.truth
    there = model.predictions(features, roi.moved(box[None]))
    for name in ("fc", "conv"):
        want = there["probs"][name][0, label].item()
        assert slide["score"][name][middle] == pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize("p2", [False, True])
def test_iou_aware_maps_hold_the_detection(p2):
    model = sure(make(iou_aware_retinanet, score_threshold=0.1, p2=p2)).eval()
    torch.nn.init.normal_(model.head.iou_logits.weight, std=0.5)
    (image,), (target,) = batch(1, 96)
    found = seen_by(model, image[:, :70], target)  # padded to 96
    for seen in (found[0], found[5]):
        drawn, row = numbers(seen, "iou_aware_retinanet"), seen.row
        cls, iou = (seen.candidates[k][row].item() for k in ("cls_probs", "iou_probs"))
        pair = list(zip(drawn["class score"], drawn["predicted IoU"]))
        assert any(abs(a - cls) + abs(b - iou) < 2e-4 for a, b in pair)
        side = model.backbone.strides[drawn["level"]]
        assert len(pair) == (96 // side) ** 2
        ranks = [line["fused"] for line in drawn["ranking"]]
        assert sorted(ranks) == list(range(1, len(ranks) + 1))
    baseline = make(iou_aware_retinanet, iou_head=False)
    with pytest.raises(BadInput, match="baseline"):
        explain.DRAW["iou_aware_retinanet"](dataclasses.replace(seen, model=baseline))


def test_dc_loss_weights_anchors_and_clusters():
    model = sure(make(dc_loss_clnms, score_threshold=0.4, iac_threshold=0.3)).eval()
    (image,), (target,) = batch(1, 96)
    found, total = seen_by(model, image, target), 0
    boxes = torch.stack([seen.box for seen in found])
    for seen in [seen for seen in found if seen.truth is not None][:2]:
        drawn, truth = numbers(seen, "dc_loss_clnms"), seen.truth
        assert len(drawn["weights"]) == drawn["positives"] > drawn["added_by_iac"]
        raw = dc_loss_clnms.dynamic_coefficient(
            torch.tensor(drawn["boxes"]), truth.expand(len(drawn["boxes"]), 4)
        )  # lambda' is lambda times one factor for the batch
        factors = torch.tensor(drawn["weights"]) / raw
        assert factors.max() / factors.min() < 1.02
        total += drawn["added_by_iac"]
        # the cluster that CL-NMS made: it kept the box that is drawn
        kept = torch.tensor(drawn["cluster"])[drawn["kept"]["CL"]]
        assert (boxes - kept).abs().sum(1).min() < 1e-2
        assert drawn["cluster_scores"][0] == max(drawn["cluster_scores"])
    assert total > 0


def test_explain_runs_as_a_program(tmp_path, capsys, detection_data, monkeypatch):
    """On a number of the data and on a file; what cannot be is said in a line."""
    model = two_stage(d2det, conv_channels=16, num_convs=2, groups=4)
    sizes = dict(image_size=64, scales=(64,), test_scales=(64,), max_size=64)
    settings = as_saved(model.full_settings.replace(**sizes))
    weights = tmp_path / "last.pt"
    categories = SyntheticDetection(1, 64).categories
    state = dict(model=model.state_dict(), settings=settings, categories=categories)
    save_checkpoint(weights, state | dict(method="d2det"))
    where = ["--weights", str(weights), "--num-val", "4", "--device", "cpu"]
    found = explain.main(["d2det", "1", *where])
    page = tmp_path / "studies" / "explain_d2det_1"
    assert page.with_suffix(".png").stat().st_size > 10_000
    assert json.loads(page.with_suffix(".json").read_text()) == found and len(found) == 3
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)  # one is enough
    (second,) = explain.main(["d2det", "1", *where, "--detection", "2"])
    assert second == found[1]
    photo = sorted((detection_data / "bccd").rglob("*.jpg"))[0]
    assert len(explain.main(["d2det", str(photo), *where])) == 3
    for wrong, message in (
        (["d2det", "4"], "4: the validation data have 4 images"),
        (["d2det", "nothing.jpg"], "nothing.jpg"),
        (["d2det", "1", "--detection", "9999"], "1: --detection 9999: there are"),
        (["d2det", "1", "--score-threshold", "1"], "nothing in it scores above 1"),
        (["faster_rcnn", "1"], "Invalid choice"),
    ):
        with pytest.raises(SystemExit):
            explain.main([*wrong, *where])
        assert message in capsys.readouterr().err
