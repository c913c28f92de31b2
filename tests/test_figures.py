"""Studies that draw a paper's figure: several models in one, two scores of a box, sensitivity."""

import dataclasses
import doctest
import json

import matplotlib.axes
import numpy as np
import pytest
import torch
from methods import RUN, batch, make
from test_studies import IMAGES, OWN
from torch import nn

import common
import cpm_rcnn
import double_head
from baselines import gfl, retinanet
from data import SyntheticDetection
from engine.checkpoints import as_saved, load_checkpoint, save_checkpoint
from studies import checkpoint, models, scores, sensitivity
from studies.models import WAYS


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """(method, *flags) -> the checkpoint of a model that has learned nothing yet."""
    found = {}

    def save(name, *more):
        if (name, *more) not in found:
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp(name)
            flags = [*(IMAGES + OWN[name] if name in OWN else RUN), *more, "--out", f"{folder}"]
            settings = checkpoint.settings_of(name, flags)
            method = checkpoint.script_of(name)
            model = method.Detector(settings.model.without_download(), 10)
            if name == "cpm_rcnn":  # sure of its boxes, as after training
                nn.init.normal_(model.classify[-1].weight, std=3)
            state = dict(model=model.state_dict(), settings=as_saved(settings))
            state["method"] = method.__name__
            categories = SyntheticDetection(1, 64).categories
            save_checkpoint(folder / "last.pt", state | dict(categories=categories))
            found[name, *more] = folder / "last.pt"
        return found[name, *more]

    return save


def test_examples_in_docstrings():
    for module in (models, scores, sensitivity):
        assert doctest.testmod(module).attempted >= 1 and doctest.testmod(module).failed == 0


# ------------------------------------------------------------------------------ several models


def numbered(ap: float) -> dict:
    return {k: ap for k in models.DRAWN} | {"per_class": {}}


def test_lines_of_checkpoints_and_of_metrics(untrained, tmp_path, monkeypatch):
    """Each model is evaluated as itself, and its metrics come out under its own name."""
    first, last = (untrained(name) for name in ("double_head", "faster_rcnn"))
    file = tmp_path / "run" / "metrics.json"
    file.parent.mkdir()
    file.write_text(json.dumps(numbered(0.75)))
    drawn: list = []

    def evaluate(model, data, settings):
        known = {double_head.Detector: 0.25}
        assert len(data) == 3 and settings.data.num_val == 3 and not model.training
        return numbered(known.get(type(model), 0.5))

    monkeypatch.setattr(models, "evaluate", evaluate)
    monkeypatch.setattr(models, "draw_by_setting", lambda rows, title, path: drawn.append(rows))
    files = [f"{first}", f"{file}", f"{last}"]
    found = models.main(["--models", *files, "--names", "a", "b", "c", "--num-val", "3"])
    assert {k: v["AP"] for k, v in found.items()} == {"a": 0.25, "b": 0.75, "c": 0.5}
    saved = json.loads((first.parent / "studies" / "models.json").read_text())
    assert list(saved) == ["a", "b", "c"] and saved == found and drawn == [found]
    monkeypatch.undo()
    found = models.main(["--models", *files[1:], "--num-val", "2", "--out", f"{tmp_path}"])
    assert found["run"] == numbered(0.75)
    assert (tmp_path / "models.png").exists()


def test_a_lambda_map_has_each_model_in_its_place(untrained, tmp_path, monkeypatch):
    pairs = ((0.7, 0.8), (1.0, 0.8), (0.7, 1.0), (0.7, 0.8))
    files, asked, drawn = [], [], []
    for fc, conv in pairs[:3]:
        flags = ("--lambda-fc", f"{fc}", "--lambda-conv", f"{conv}")
        files.append(f"{untrained('double_head', *flags)}")
    files.append(files[0])  # a pair may have several models

    ways = list(WAYS)

    def metrics_under(study, changes):
        mine = len(asked) / 100
        tests = {way: dataclasses.replace(study.settings.test, **c) for way, c in changes.items()}
        model = study.settings.model
        assert (model.lambda_fc, model.lambda_conv) == pairs[len(asked)]
        asked.append({way: (test.alone, test.fusion) for way, test in tests.items()})
        return {way: numbered(0.1 * ways.index(way) + mine) for way in changes}

    def imshow(self, image, *a, **k):
        drawn.append(image)
        return original(self, image, *a, **k)

    original = matplotlib.axes.Axes.imshow
    monkeypatch.setattr(matplotlib.axes.Axes, "imshow", imshow)
    monkeypatch.setattr(models, "metrics_under", metrics_under)
    what = ["--what", "lambdas", "--out", f"{tmp_path}", "--names", *"abcd"]
    found = models.main([*what, "--models", *files])
    both = {ways[2]: ("", "none"), ways[3]: ("", "complementary")}
    alone = {ways[0]: ("conv", "complementary")}, {ways[1]: ("fc", "complementary")}
    assert asked[0] == alone[0] | alone[1] | both
    assert asked[1] == alone[0] | both  # at 1 fc-head has no boxes, and conv-head no classes
    assert asked[2] == alone[1] | {ways[2]: ("", "none")}
    nan = np.nan  # columns 0.7 and 1, rows 1 and 0.8; of two models the mean
    wanted = [[[nan, nan], [1.5, 1]], [[12, nan], [11.5, nan]], [[22, nan], [21.5, 21]]]
    wanted.append([[nan, nan], [31.5, 31]])
    np.testing.assert_allclose(drawn, wanted)
    assert found["b"]["lambda_fc"] == 1 and (tmp_path / "lambdas.png").exists()
    assert json.loads((tmp_path / "lambdas.json").read_text()) == found


# ------------------------------------------------------------------------------ two scores


class Scored(nn.Module):
    """CPM R-CNN's end, on boxes of a known IoU with the first object of each image."""

    detections, suppress = cpm_rcnn.GridDetector.detections, cpm_rcnn.GridDetector.suppress

    def __init__(self):
        super().__init__()
        self.settings, self.num_classes = cpm_rcnn.Model(), 10
        self.weight = nn.Parameter(torch.zeros(1))

    def outputs(self, images):
        return dict(images=images)

    def candidates(self, outputs, test):
        images = outputs["images"]
        data, boxes, labels, image = SyntheticDetection(4, 64, 10**6), [], [], []
        for i, seen in enumerate(images):
            (target,) = (t for own, t in map(data.__getitem__, range(4)) if own.equal(seen))
            x1, y1, x2, y2 = target["boxes"][0].tolist()
            boxes += [(x1, y1, x2, y2), (x1, y1, (x1 + x2) / 2, y2), (0, y1, 30, y2)]
            labels += [target["labels"][0]] * 3
            image += [i] * 3
        boxes, count = torch.tensor(boxes), len(images)
        factors = dict(cls=[0.9, 0.8, 0.5], ism=[0.5, 0.75, 0.5], rsm=[0.9, 0.1, 0.8])
        factors = {k: torch.tensor(v * count) for k, v in factors.items()}
        factors["scores"] = cpm_rcnn.fused_score(**factors, gamma=test.gamma)
        return dict(boxes=boxes, labels=torch.tensor(labels), image=torch.tensor(image), **factors)


def test_both_scores_of_a_box_by_hand():
    data = SyntheticDetection(4, 64, 10**6)
    small = dict(scales=(64,), test_scales=(64,), max_size=64, gamma=0.5, workers=0, eval_batch=2)
    settings = cpm_rcnn.Settings().replace(**small)
    study = checkpoint.Study(Scored(), settings, data.categories, "", None, data)
    all_values, all_examples = scores.boxes_under_two_scores(study)
    values, examples = all_values["ism"], all_examples["ism"]
    assert len(values) == 12 and len(examples) == 8  # of each image a rise and a fall
    factor = (0.45 + 0.6 + 0.25) / (0.9 + 0.8 + 0.5)  # that all boxes of an image have in common
    for i in range(4):
        target = data[i][1]
        name = data.categories[target["labels"][0]]["name"]
        whole, half = sorted((e for e in examples if e["image_id"] == i), key=lambda e: e["change"])
        assert whole["iou"] == 1 and whole["object"] == whole["box"] and whole["category"] == name
        assert (whole["without"], whole["score"]) == pytest.approx((0.9, 0.45))
        assert whole["change"] == pytest.approx(0.45 / factor - 0.9)
        assert half["change"] == pytest.approx(0.6 / factor - 0.8)
        assert 0.5 - 1e-4 < half["iou"] < 1 and half["object"] != half["box"]  # half as wide
        mine = values[(values[:, 1] - 0.8).abs() < 1e-6]
        assert mine.shape == (4, 3) and half["iou"] in mine[:, 0].tolist()
    # the third box, and objects at the border
    cut, examples = all_values["rsm"], all_examples["rsm"]
    assert 4 <= len(cut) < 12
    for e in examples:
        assert min(e["box"][:2]) < 0.7 or max(e["box"][2:]) > 63.3
        assert e["without"] == pytest.approx(e["cls"] * e["ism"])
        assert e["score"] == pytest.approx((e["cls"] * e["ism"] * e["rsm"]) ** 0.5, rel=1e-5)
    best = scores.largest_changes([dict(change=c) for c in (0.1, 0.3, -0.2, -0.4, 0.2, 0)], 4)
    assert [e["change"] for e in best] == [0.3, 0.2, -0.4, -0.2]
    falls = scores.largest_changes([dict(change=c) for c in (-0.1, -0.3, 0)], 4)
    assert [e["change"] for e in falls] == [-0.3, -0.1]
    told = scores.summarise(torch.tensor([[v, 0.5, v / 2] for v in (0.2, 0.4, 0.9)]))
    assert told["score"] == {"pearson": 1.0, "distance": pytest.approx(0.25)}
    assert told["without"]["pearson"] is None and told["boxes"] == 3


def test_scores_of_a_checkpoint(untrained, monkeypatch):
    file = untrained("cpm_rcnn")
    titles = []
    monkeypatch.setattr(matplotlib.axes.Axes, "set_title", lambda s, t, **k: titles.append(t))
    where = ["cpm_rcnn", "--weights", f"{file}", "--examples", "2"]
    found = scores.main([*where, "--score-threshold", "0.01"])
    gamma = load_checkpoint(file)["settings"]["test"]["gamma"]
    for row in found["rsm"]["examples"]:
        factors = (torch.tensor(row[k]) for k in ("cls", "ism", "rsm"))
        assert row["score"] == pytest.approx(cpm_rcnn.fused_score(*factors, gamma).item(), rel=1e-4)
    first = found["ism"]["examples"][0]
    assert f"cls {first['cls']:.2f}, cls * ISM {first['score']:.2f}" in titles[0]
    assert json.loads((file.parent / "studies" / "scores.json").read_text()) == found
    assert (file.parent / "studies" / "scores.png").exists() and len(titles) <= 4


# ------------------------------------------------------------------------------ sensitivity


class TwoPixels(nn.Module):
    """Its class depends on the pixel in row 3 and column 20 alone, its box on row 9, column 5."""

    def __init__(self):
        super().__init__()
        self.backbone, self.settings = nn.Identity(), retinanet.Model()

    def outputs(self, images):
        pixels = self.backbone(common.pad_images(images)[0])
        anchors = torch.tensor([[0.0, 0, 10, 10], [8, 8, 16, 16]])
        logits = pixels[:, :1, 3, 20, None].expand(1, 2, 4) * 2
        moved = torch.zeros(1, 2, 4) + pixels[:, :1, 9, 5, None]
        return dict(cls_logits=logits, deltas=moved, anchors=anchors)

    def assign(self, out, targets):
        return retinanet.Assignment(
            labels=torch.tensor([[1, 0]]),
            gt=torch.tensor([[0, 0]]),
            gt_boxes=targets[0]["boxes"][None, [0, 0]],
            gt_labels=torch.tensor([[1, 1]]),
        )

    def decode(self, out, index):
        return common.decode_boxes(out["anchors"][index[1]], out["deltas"][index])


def test_a_gradient_is_where_its_loss_looks():
    image = batch(1, 40)[0][0]
    boxes = torch.tensor([[0.0, 0, 12, 9], [20, 20, 30, 30]])
    target = dict(boxes=boxes, labels=torch.tensor([1, 2]), ignore=torch.zeros(2).bool())
    found = sensitivity.gradients(TwoPixels(), image, target, 0)
    assert {k: v.nonzero().tolist() for k, v in found.items()} == {
        "class": [[3, 20]],
        "box": [[9, 5]],
    }
    assert found["class"].shape == (40, 40)  # without the padding to 64
    assert sensitivity.gradients(TwoPixels(), image, target, 1) == {}  # has no anchor


def test_losses_of_the_only_object_are_those_of_training():
    images, (target, _) = batch(2)
    target = {k: target[k][:1] for k in ("boxes", "labels", "ignore")}
    model = make(retinanet).eval()
    out = model.outputs(images[:1])
    found = sensitivity.object_losses(model, out, [target], 0)
    labels = model.assign(out, [target]).labels
    total = model.loss(images[:1], [target])["box"] * retinanet.count_positives(labels)
    assert found["box"].item() == pytest.approx(total.item(), rel=1e-4)
    away = {**out, "cls_logits": torch.full_like(out["cls_logits"], -30.0)}  # of the background
    away["cls_logits"][labels == 1] = out["cls_logits"][labels == 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "outputs", lambda _: away)
        total = model.loss(images[:1], [target])["cls"] * retinanet.count_positives(labels)
    assert found["class"].item() == pytest.approx(total.item(), rel=1e-4)
    model = make(gfl).eval()
    out = model.outputs(images[:1])
    found = sensitivity.object_losses(model, out, [target], 0)
    assert set(found) == {"class", "box"} and all(v > 0 for v in found.values())


def test_sensitivity_of_a_checkpoint(untrained):
    file = untrained("dc_loss_clnms")
    where = ["dc_loss_clnms", "--weights", f"{file}", "--objects", "3", "--shown", "2"]
    found = sensitivity.main(where)
    assert 1 <= found["objects"] == len(found["cases"]) <= 3
    means = [sum(c["box"]["middle"] for c in found["cases"]) / found["objects"]]
    assert means == [pytest.approx(found["box"]["middle"])]
    assert json.loads((file.parent / "studies" / "sensitivity.json").read_text()) == found
    assert (file.parent / "studies" / "sensitivity.png").exists()


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("module, argv, message", [
    (models, "", "this needs --models"),
    (models, "--models nowhere.pt", "nowhere.pt: no such file"),
    (models, "--models CPM CPM", "have the same name"),
    (models, "--models CPM --names a b", "2 names of 1 models"),
    (models, "--models CPM --what lambdas", "models with both heads"),
    (models, "--models JSON --what lambdas", "this figure needs checkpoints"),
    (models, "--models JSON", "not a run's metrics.json"),
    (models, "--models CPM --out CPM", "cannot write there: File exists"),
    (models, "--models CPM OTHER", "are not those of"),
    (scores, "cpm_rcnn --weights CPM --examples 0", "--examples 0: at least 1"),
    (scores, "cpm_rcnn --weights CPM --no-ism", "does not fit this model"),
    (scores, "cpm_rcnn --weights CPM --score-threshold 1", "no box has a score over"),
    (sensitivity, "retinanet --weights CPM", "a checkpoint of cpm_rcnn, not of retinanet"),
    (sensitivity, "dc_loss_clnms --objects 0", "at least 1"),
])  # fmt: skip
def test_bad_input_ends_with_a_reason(untrained, tmp_path, module, argv, message, capsys):
    argv = argv.replace("CPM", f"{untrained('cpm_rcnn')}")
    if "OTHER" in argv:
        argv = argv.replace("OTHER", f"{untrained('faster_rcnn', '--num-val', '3')}")
    (tmp_path / "metrics.json").write_text('{"AP": 0.5}')
    argv = argv.replace("JSON", f"{tmp_path}/metrics.json")
    with pytest.raises(SystemExit) as end:
        module.main(argv.split())
    error = capsys.readouterr().err
    assert end.value.code == 2 and "error" in error and message in error
