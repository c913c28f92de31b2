"""The studies: their sums by hand, each as a program on a checkpoint, and bad input."""

import dataclasses
import doctest
import functools
import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from methods import REAL, RUN, batch, make, small, sure

import common
import cpm_rcnn
import dc_loss_clnms as dc_loss
import double_head
import iou_aware_retinanet as iou_aware
from baselines import retinanet
from data import SyntheticDetection
from studies import (
    alignment,
    assignment,
    calibration,
    checkpoint,
    sections,
    sweep,
)

NAMES = ("sweep", "alignment", "assignment", "sections", "bench", "compare", "cost", "explain")
IMAGES = """--image-size 64 --scales 64 --test-scales 64 --max-size 64 --num-train 12 --num-val 4
 --batch 2 --steps 2 --workers 0 --fpn-channels 8 --norm gn --device cpu""".split()
TWO_STAGE = (
    "--fc-channels 16 --score-threshold 0.05 --proposals-train 40 --proposals-test 20".split()
)
OWN = {
    "d2det": [*TWO_STAGE, *"--conv-channels 8 --num-convs 2 --groups 2 --reg-test 20".split()],
    "double_head": [*TWO_STAGE, "--conv-channels", "16"],
    "cpm_rcnn": [*TWO_STAGE, "--point-channels", "1", "--num-convs", "1"],
    "faster_rcnn": TWO_STAGE,
    "cascade_rcnn": TWO_STAGE,
}
# but for one sweep of each kind; the other studies draw in their own tests
pytestmark = pytest.mark.usefixtures("unpainted")


def read(*path):
    return json.loads(Path(*path).read_text())


def study_of(model, data, out="nowhere") -> checkpoint.Study:
    """What `open_study` returns, of a model that `methods.build` made."""
    return checkpoint.Study(model, model.full_settings, data.categories, "", Path(out), data)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """name -> folder of a run of two steps and its metrics, made when first asked for."""
    found = {}

    def train(name):
        if name not in found:
            out = tmp_path_factory.mktemp(name)
            flags = [*IMAGES, *OWN[name]] if name in OWN else [*RUN, "--steps", "2"]
            metrics = checkpoint.script_of(name).main([*flags, "--train", "--out", str(out)])
            found[name] = out, metrics
        return found[name]

    return train


# ------------------------------------------------------------------------------ sweep


@pytest.mark.parametrize("name, rows, own", [
    ("iou_aware_retinanet", 12, "0.5"), ("cpm_rcnn", 12, "0.8"),
    ("double_head", 6, "complementary"), ("dc_loss_clnms", 4, "cl"),
])  # fmt: skip
def test_sweep_gives_what_eval_gives(trained, tmp_path, name, rows, own, unpainted, monkeypatch):
    """One pass under many settings: the model's own row is its --eval to the last digit."""
    folder, metrics = trained(name)
    if name == "cpm_rcnn":
        monkeypatch.setattr(Figure, "savefig", unpainted)
    where = ["--weights", f"{folder}/last.pt"]
    found = sweep.main([name, *where, "--num-val", "4"])
    assert read(folder, "studies", "sweep.json") == found and len(found) == rows
    assert (folder / "studies" / "sweep.png").exists() == (rows == 12)  # numbers are drawn
    assert found[own] == metrics
    if name == "dc_loss_clnms":
        assert list(found) == ["plain", "soft", "cl", "cl, literal"]
        eval_ = [*RUN, "--eval", "--nms", "plain", "--out", str(tmp_path), *where]
        assert checkpoint.script_of(name).main(eval_) == found["plain"]


def test_each_row_of_a_sweep_is_its_own_settings(monkeypatch):
    """Two detections, of the second setting right, of the first one beside the object."""
    data = SyntheticDetection(1, 64)
    truth = data[0][1]
    right = torch.as_tensor(truth["boxes"]).float()
    found = dict(scores=torch.ones(len(right)), labels=truth["labels"])

    def detect_under(model, data, settings, tests):
        assert [test.nms_iou for test in tests] == [0.25, 0.75]
        yield truth, [{**found, "boxes": right + 64}, {**found, "boxes": right}]

    monkeypatch.setattr(sweep, "detect_under", detect_under)
    study = study_of(make(retinanet), data)
    test = study.settings.test
    tests = {name: dataclasses.replace(test, nms_iou=v) for name, v in (("a", 0.25), ("b", 0.75))}
    rows = sweep.metrics_under(study, tests)
    assert rows["a"]["AP"] == 0 and rows["b"]["AP"] == pytest.approx(1)


def test_sweeps_know_what_a_model_lacks():
    def sweep_of(name, model):
        return sweep.SWEEPS[name](model, model.full_settings.test)

    with pytest.raises(common.BadInput, match="needs a model with an IoU head"):
        sweep_of("iou_aware_retinanet", make(iou_aware, iou_head=False))
    plain = small(cpm_rcnn, point_channels=2, num_convs=1, ism=False, rsm=False)
    with pytest.raises(common.BadInput, match="needs a model with RSM"):
        sweep_of("cpm_rcnn", plain)
    vanilla = small(double_head, conv_channels=32, lambda_fc=1.0, lambda_conv=1.0)
    assert set(sweep_of("double_head", vanilla)) == {"none"}
    with pytest.raises(common.BadInput, match="both heads"):
        sweep_of("double_head", small(double_head, conv_channels=32, heads="conv"))


# ------------------------------------------------------------------------------ alignment


def test_correlation():
    assert doctest.testmod(calibration).attempted >= 3 and doctest.testmod(calibration).failed == 0
    x = torch.tensor([0.0, 1, 2, 3])
    assert calibration.correlation(x, -2 * x) == -1
    cube = calibration.correlation(x, x**3)  # means 1.5 and 9
    assert cube == pytest.approx(44 / math.sqrt(5 * 470), abs=1e-4)
    assert calibration.correlation(x[:1], x[:1]) is None is calibration.correlation(x, x * 0)


class Seven:
    """Image 7 has objects of classes 0 and 1, and a crowd."""

    categories = [dict(id=5, name="five"), dict(id=9, name="nine")]
    boxes = [[0, 0, 10, 10], [50, 50, 10, 20], [80, 0, 10, 10]]  # xywh

    def coco(self):
        annotations = [
            dict(id=i + 1, image_id=7, category_id=c, bbox=b, iscrowd=i // 2, area=b[2] * b[3])
            for i, (b, c) in enumerate(zip(self.boxes, (5, 9, 5)))
        ]
        images = [dict(id=7, height=96, width=96)]
        return dict(categories=self.categories, annotations=annotations, images=images)


SEEN = dict(  # on the first object, of each class, on the second, and on the crowd
    boxes=torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 5], [50, 50, 60, 60], [80, 0, 90, 10]]),
    labels=torch.tensor([0, 1, 1, 0]),
)


def test_iou_by_hand():
    ((image_id, objects),) = calibration.objects_by_image(Seven()).items()
    assert image_id == 7 and objects["labels"].tolist() == [0, 1]  # without the crowd
    out = calibration.with_iou(SEEN, objects)
    assert out["iou"].tolist() == [0.5, 0, 0.5, 0] and out["iou_any"].tolist() == [0.5, 0.5, 0.5, 0]
    assert out["gt"][[0, 2]].tolist() == [0, 1]  # the others have no object
    nothing = calibration.with_iou(
        SEEN, dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0).long())
    )
    assert nothing["iou"].tolist() == nothing["iou_any"].tolist() == [0, 0, 0, 0]


def test_scores_and_oracles_by_hand():
    found = dict(
        scores=torch.tensor([0.5, 0.8]),
        iou=torch.tensor([0.0, 0.25]),
        iou_any=torch.tensor([0.5, 0.25]),
    )
    model = make(retinanet)
    plain = alignment.scores_of(model, found, model.full_settings.test)
    found |= dict(cls_probs=torch.tensor([0.25, 0.64]), iou_probs=torch.tensor([1.0, 0.25]))
    assert {k: v.tolist() for k, v in plain.items()} == {
        "score": pytest.approx([0.5, 0.8]), "oracle": pytest.approx([0.25, 0.2])
    }  # fmt: skip
    model = make(iou_aware, alpha=0.5)
    settings = model.full_settings
    aware = alignment.scores_of(model, found, settings.test)
    assert aware["class score"].tolist() == found["cls_probs"].tolist()
    assert aware["fused"].tolist() == pytest.approx([0.5, 0.4])
    assert aware["oracle"].tolist() == pytest.approx([math.sqrt(0.125), 0.4])
    aware = alignment.scores_of(model, found, settings.replace(product=True).test)
    assert aware["fused"].tolist() == pytest.approx([0.25, 0.16])


def test_alignment_of_a_score_that_is_the_iou(monkeypatch, tmp_path):
    """Each number is of the tensor it names: the score follows the IoU, the reverse does not."""
    four = torch.stack([torch.tensor([0.0, 0, 10, y]) for y in (4.0, 6, 8, 10)])
    study = study_of(make(retinanet).eval(), Seven(), tmp_path)
    iou = four[:, 3] / 10
    found = {}
    for name, scores in (("same", iou), ("reverse", 1.1 - iou)):
        seen = dict(boxes=four, labels=torch.zeros(4).long(), scores=scores)
        monkeypatch.setattr(alignment, "detect", lambda *_, s=seen: [({"image_id": 7}, s)])
        written = alignment.alignment({name: study})
        found |= written
    same, reverse = found["same"], found["reverse"]
    entered = {"boxes": 4, "matched boxes": 3, "matched": 1, "all": 1}
    assert same["score"]["before NMS"] == entered
    assert reverse["score"]["before NMS"]["all"] == -1
    first, last = (f["metrics"]["score"]["AP90"] for f in (same, reverse))
    half = pytest.approx(0.5)  # one class of two; NMS keeps the first of them, of IoU 1 or 0.4
    assert first == half and last == 0
    # the oracle ranks 0.28, 0.3, 0.24, 0.1, and keeps the second: IoU 0.6
    assert reverse["metrics"]["oracle"]["AP50"] == half
    assert reverse["metrics"]["oracle"]["AP70"] == 0
    assert read(tmp_path, "alignment.json") == written and (tmp_path / "alignment.png").exists()


@pytest.mark.parametrize("name", checkpoint.METHODS)
def test_alignment_of_every_method(trained, name):
    folder, metrics = trained(name)
    found = alignment.main([name, "--weights", f"{folder}/last.pt"])
    assert read(folder, "studies", "alignment.json") == found
    assert (folder / "studies" / "alignment.png").exists()
    ((called, found),) = found.items()
    assert called == name and found["weights"] == f"{folder}/last.pt"
    orders = {"score", "oracle"}
    if name == "iou_aware_retinanet":
        orders = {"class score", "fused", "oracle"}
        by_class = sweep.main([name, "--weights", f"{folder}/last.pt"])["1.0"]
        assert found["metrics"]["class score"] == by_class  # nothing but the order differs
        assert "predicted IoU" in found
    else:
        assert found["metrics"]["score"] == metrics  # the method's own detections
    assert set(found["metrics"]) == orders
    assert all(found[k]["before NMS"]["boxes"] > 0 for k in orders - {"oracle"})


def test_alignment_without_an_iou_head(tmp_path):
    model, data = sure(make(iou_aware, iou_head=False)), SyntheticDetection(3, 64)
    found = alignment.alignment({"a": study_of(model, data, tmp_path)})["a"]
    assert set(found["metrics"]) == {"class score", "oracle"} and "fused" not in found
    assert "predicted IoU" not in found
    assert found["class score"]["before NMS"]["all"] is not None


# ------------------------------------------------------------------------------ programs


@pytest.mark.parametrize("name", NAMES)
def test_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"studies.{name}").main(["--help"])
    assert end.value.code == 0 and f"python -m studies.{name}" in capsys.readouterr().out


@pytest.mark.parametrize("name, argv, message", [
    ("sweep", "cpm_rcnn --weights nowhere.pt", "nowhere.pt: no such file"),
    ("alignment", "d2det --weights IOU", "a checkpoint of iou_aware_retinanet, not of d2det"),
    ("alignment", "iou_aware_retinanet --weights IOU --num-val 0", "--num-val 0: at least 1"),
    ("alignment", "iou_aware_retinanet --weights IOU --data nowhere", "nowhere"),
    ("alignment", "iou_aware_retinanet --weights IOU --train", "neither trains nor predicts"),
    ("alignment", "iou_aware_retinanet --weights IOU --out IOU", "cannot write there: File exists"),
    ("alignment", "iou_aware_retinanet --weights IOU --out IOU/below", "cannot write there"),
    ("bench", "d2det --out IOU/below", "cannot write there: Not a directory"),
    ("bench", "d2det --groups 5 --device cpu", "no network can be built with --fpn-channels 256"),
    ("cost", "d2det --out IOU/below", "cannot write there: Not a directory"),
    ("compare", "d2det --out IOU/below", "cannot write there: Not a directory"),
    ("explain", "iou_aware_retinanet 0 --weights IOU --out IOU/below", "cannot write there: Not a"),
    ("sections", "double_head --objects -1", "--objects -1: at least 0 (all)"),
    ("bench", "d2det --repeat 0", "--repeat 0: at least 1"),
    ("compare", "d2det --seeds 1 1", "--seeds: one of them is there twice"),
    ("compare", "", "nothing to do"),
    ("compare", "d2det --jobs 0", "--jobs 0: at least 1"),
    ("compare", "d2det --data bccd --root nowhere", "must name the folder of bccd/"),
    ("cost", "d2det --image 0 8", "at least 32"),
])  # fmt: skip
def test_bad_input_ends_with_a_reason(trained, name, argv, message, capsys):
    if "IOU" in argv:
        argv = argv.replace("IOU", f"{trained('iou_aware_retinanet')[0]}/last.pt")
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"studies.{name}").main(argv.split())
    error = capsys.readouterr().err
    assert end.value.code == 2 and "error" in error.lower() and message in error


def test_a_full_disk_is_noticed_before_the_work(tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # larger files have no room
    try:
        with pytest.raises(common.BadInput, match="cannot write there: File too large"):
            checkpoint.results_folder(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.results_folder(tmp_path / "new") == tmp_path / "new"
    assert [*tmp_path.rglob("*")] == [tmp_path / "new"]  # nothing is left


def test_assignment_tells_what_the_iac_score_adds(trained):
    """Against labels made one rule at a time; boxes that are their gts have IoU 1."""
    model = sure(make(dc_loss, iac_threshold=0.3)).eval()
    (images, targets), out = batch(4), model.outputs(batch(4)[0])
    plain = retinanet.RetinaNet.assign(model, out, targets).labels
    assigned = model.assign(out, targets)
    labels, gt_boxes = assigned.labels, assigned.gt_boxes
    new = (labels == 1) & (plain != 1)
    found = assignment.positives(model, images, targets)
    numbers = assignment.summarise(found)
    assert numbers["added"]["anchors"] == int(new.sum()) > 0
    assert numbers["by IoU"]["anchors"] == int((plain == 1).sum()) > 0
    assert numbers["more"] == pytest.approx(int(new.sum()) / int((plain == 1).sum()))
    ignored = ((plain == -1) & new).sum() / new.sum()
    assert numbers["added"]["else ignored"] == pytest.approx(ignored.item())
    assert found["p"][found["added"]].min() > 0.3 ** (1 / 0.75)  # its overlap is at most 1
    out["deltas"] = common.encode_boxes(out["anchors"].expand_as(gt_boxes), gt_boxes)
    model.outputs = lambda _: out
    iou = assignment.positives(model, images, targets)["iou"]
    assert (iou > 0.999).float().mean() > 0.9  # not all: decoding bounds how much a box may shrink
    model.settings.iac = False
    assert assignment.summarise(assignment.positives(model, images, targets))["more"] > 0
    folder = trained("dc_loss_clnms")[0]
    written = assignment.main(["--weights", f"{folder}/last.pt"])
    assert written["images"] == 4 and written == read(folder, "studies", "assignment.json")


def test_alignment_on_voc(detection_data, few_real_images, tmp_path):
    data = ["--data", f"{few_real_images(detection_data / 'bccd')}"]
    iou_aware.main([*REAL, "--train", *data, "--out", f"{tmp_path}/a"])
    alignment.main(["iou_aware_retinanet", *data, "--weights", f"{tmp_path}/a/last.pt"])
    assert (tmp_path / "a" / "studies" / "alignment.json").exists()


def test_sections_on_coco(detection_data, few_real_images, tmp_path, monkeypatch):
    few = functools.partial(sections.sliding_windows, steps=5)
    monkeypatch.setattr(sections, "sliding_windows", few)
    flags = "--preset tiny --steps 2 --scales 96 --test-scales 96 --max-size 160 --batch 2"
    flags += " --fpn-channels 8 --fc-channels 16 --conv-channels 16 --workers 0 --train"
    data = ["--data", f"{few_real_images(detection_data / 'coco_tiny')}"]
    double_head.main([*flags.split(), "--score-threshold", "0.3", *data, "--out", f"{tmp_path}/b"])
    found = sections.main(["double_head", "--objects", "1", "--weights", f"{tmp_path}/b/last.pt"])
    assert found["objects"] == 1
