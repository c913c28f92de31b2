"""D-ECE and LRP error by hand, what NMS leaves, and several checkpoints side by side."""

import json
import shutil

import pytest
import torch
from matplotlib.figure import Figure
from methods import RUN, make, sure
from test_studies import study_of

import iou_aware_retinanet as iou_aware
from baselines import retinanet
from data import SyntheticDetection
from studies import alignment
from studies.calibration import calibration_error, lrp_errors, match_detections, optimal_lrp

pytestmark = pytest.mark.usefixtures("unpainted")  # but for several checkpoints side by side


class Two:
    """Images 7 and 8. Of class 5 an object in each and a crowd, of 9 one in image 8, of 11 none."""

    categories = [dict(id=5, name="five"), dict(id=9, name="nine"), dict(id=11, name="none")]
    objects = (
        (7, 5, [0, 0, 10, 10], {}),
        (7, 5, [50, 50, 20, 20], dict(iscrowd=1)),
        (8, 5, [30, 0, 10, 10], {}),
        (8, 9, [0, 40, 10, 10], {}),
        (8, 9, [60, 60, 10, 10], dict(difficult=1)),
    )

    def coco(self):
        annotations = [
            dict(image_id=i, category_id=c, bbox=box, **more) for i, c, box, more in self.objects
        ]
        images = [dict(id=i, height=96, width=96) for i in (7, 8)]
        return dict(categories=self.categories, annotations=annotations, images=images)


def result(image, category, box, score):
    return dict(image_id=image, category_id=category, bbox=box, score=score)


RESULTS = [
    result(7, 5, [0, 0, 10, 8], 0.95),  # on its object: IoU 0.8
    result(7, 5, [0, 0, 10, 10], 0.85),  # IoU 1, but the object is taken
    result(7, 5, [52, 52, 9, 9], 0.9),  # inside the crowd: does not count
    result(8, 5, [0, 0, 10, 10], 0.75),  # where image 7 has its object
    result(8, 5, [30, 0, 10, 6], 0.65),  # IoU 0.6
    result(8, 5, [30, 0, 10, 4], 0.2),  # IoU 0.4
    result(8, 9, [0, 40, 10, 5], 0.35),  # IoU 0.5, just enough
    result(8, 9, [60, 60, 10, 10], 0.99),  # on the difficult one: does not count
    result(8, 11, [0, 0, 5, 5], 0.5),  # a class without objects
]


def test_matching_is_cocos():
    found = match_detections(Two().coco(), RESULTS)
    assert found.objects.tolist() == [2, 1, 0] and found.names == ["five", "nine", "none"]
    rows = zip(found.classes.tolist(), found.scores.tolist(), found.iou.tolist())
    want = [(0, 0.95, 0.8), (0, 0.85, 0), (0, 0.75, 0), (0, 0.65, 0.6), (0, 0.2, 0)]
    want += [(1, 0.35, 0.5), (2, 0.5, 0)]
    assert sorted(rows) == [pytest.approx(row) for row in sorted(want)]
    few = match_detections(Two().coco(), RESULTS, most=1)  # best of each image and class
    assert sorted(few.scores.tolist()) == pytest.approx([0.5, 0.75, 0.95])


def test_lrp_by_hand():
    """Class five, by threshold: 0.95 leaves a TP, 0.85 and 0.75 add FPs, 0.65 a TP, 0.2 an FP."""
    found = match_detections(Two().coco(), RESULTS)
    mine = found.classes == 0
    one = optimal_lrp(found.scores[mine], found.iou[mine], 2)
    # (0.2 / 0.5 + 1 FN) / 2 = 0.7; next best: ((0.2 + 0.4) / 0.5 + 2 FP) / 4 = 0.8 at 0.65
    assert one == pytest.approx(dict(LRP=0.7, Loc=0.2, FP=0, FN=0.5, score=0.95), abs=1e-4)
    # at tau 0.2 the second object pays: (0.6 / 0.8 + 2) / 4 = 0.6875, (0.2 / 0.8 + 1) / 2 = 0.625
    assert optimal_lrp(found.scores[mine], found.iou[mine], 2, 0.2)["LRP"] == 0.625
    # without the first FP: ((0.2 + 0.4) / 0.5 + 1) / 3 = 0.7333 loses, with IoU 0.9 it wins
    scores, iou = torch.tensor([0.95, 0.75, 0.65]), torch.tensor([0.8, 0, 0.9])
    two = optimal_lrp(scores, iou, 2)
    want = dict(LRP=(0.3 / 0.5 + 1) / 3, Loc=0.15, FP=1 / 3, FN=0, score=0.65)
    assert two == pytest.approx(want, abs=1e-4)
    assert optimal_lrp(scores.flip(0), iou.flip(0), 2) == two  # in any order
    tied = optimal_lrp(torch.tensor([0.65, 0.65]), torch.tensor([1.0, 0]), 1)
    assert tied["LRP"] == 0.5 and tied["FP"] == 0.5  # no threshold takes one without the other
    late = optimal_lrp(torch.tensor([0.9, 0.8]), torch.tensor([0, 0.5]), 1)
    assert late == dict(LRP=1, Loc=0.5, FP=0.5, FN=0, score=0.8)
    rare = optimal_lrp(torch.tensor([0.9]), torch.tensor([0.75]), 3)  # (0.25 / 0.5 + 2) / 3
    assert rare == pytest.approx(dict(LRP=5 / 6, Loc=0.25, FP=0, FN=2 / 3, score=0.9), abs=1e-4)
    missed = dict(LRP=1, Loc=None, FP=None, FN=1, score=None)
    assert optimal_lrp(torch.tensor([0.9]), torch.zeros(1), 3) == missed
    assert optimal_lrp(torch.zeros(0), torch.zeros(0), 3) == missed
    assert optimal_lrp(torch.tensor([0.9]), torch.zeros(1), 0) is None


def test_lrp_of_all_classes():
    found = lrp_errors(match_detections(Two().coco(), RESULTS))
    rows = found.pop("per_class")
    # nine: one TP of IoU 0.5, (0.5 / 0.5) / 1; the third class has no object and no say
    assert rows["nine"] == dict(LRP=1, Loc=0.5, FP=0, FN=0, score=0.35) and rows["none"] is None
    assert found == pytest.approx(dict(oLRP=0.85, Loc=0.35, FP=0, FN=0.25), abs=1e-4)
    # without nine's detection the class counts in oLRP and FN, and has no Loc or FP
    found = lrp_errors(match_detections(Two().coco(), RESULTS[:6]))
    assert found["oLRP"] == pytest.approx(0.85) and found["FN"] == pytest.approx(0.75)
    assert found["Loc"] == pytest.approx(0.2, abs=1e-4) and found["FP"] == 0


def test_half_a_pixel_shows_in_lrp():
    x, y, w, h = RESULTS[0]["bbox"]
    beside = [{**RESULTS[0], "bbox": [x + 0.5, y, w, h]}, *RESULTS[1:]]
    loc = lrp_errors(match_detections(Two().coco(), beside))["per_class"]["five"]["Loc"]
    assert loc == pytest.approx(1 - 76 / 104, abs=1e-4)  # 9.5 x 8 of 80 + 100 - 76


def test_d_ece_by_hand():
    found = match_detections(Two().coco(), RESULTS)
    # from 0.3 on, each in a bin of its own; right are 0.95, 0.65 and 0.35
    gaps = (0.05, 0.85, 0.75, 0.35, 0.65, 0.5)
    numbers = calibration_error(found)
    assert numbers["D-ECE"] == pytest.approx(sum(gaps) / 6, abs=1e-4)
    table = numbers["reliability"]
    assert sum(table["count"]) == 7 and table["count"][4] == 1  # score 0.2 is drawn too
    assert table["precision"][4] == 0 and table["precision"][13] == 1 and table["score"][0] is None
    low = calibration_error(found, lowest=0)["D-ECE"]
    assert low == pytest.approx((sum(gaps) + 0.2) / 7, abs=1e-4)
    # two bins: of the upper one 0.95, 0.85, 0.75, 0.65, 0.5 the mean is 0.74, two of five are right
    wide = calibration_error(found, bins=2)["D-ECE"]
    assert wide == pytest.approx((5 * (0.74 - 0.4) + 0.65) / 6, abs=1e-4)
    assert calibration_error(found, lowest=0.99)["D-ECE"] is None


def test_a_calibrated_detector_has_no_d_ece():
    torch.manual_seed(0)
    scores = torch.rand(200_000, dtype=torch.double)
    right = (torch.rand(len(scores)) < scores).double()
    fair = match_detections(Two().coco(), [])._replace(scores=scores, iou=right)
    assert calibration_error(fair)["D-ECE"] < 0.01
    assert calibration_error(fair._replace(scores=scores**2))["D-ECE"] > 0.1
    ends = fair._replace(scores=(scores > 0.5).double())
    count = calibration_error(ends)["reliability"]["count"]
    assert count[0] + count[19] == len(scores) and len(count) == 20  # 0 and 1 have bins


SEEN = {  # image -> boxes, scores; the first box of image 7 fits better than the second, its rival
    7: ([[0.0, 0, 10, 10], [0, 0, 10, 8]], [0.8, 0.9]),
    8: ([[30.0, 0, 40, 6], [0, 0, 10, 10]], [0.5, 0.3]),  # the last one is where image 7 has its
}


@pytest.fixture
def two_images(monkeypatch):
    found = []
    for image, (boxes, scores) in SEEN.items():
        labels = torch.zeros(len(scores), dtype=torch.long)
        tensors = dict(boxes=torch.tensor(boxes), scores=torch.tensor(scores), labels=labels)
        found.append(({"image_id": image}, {**tensors, "image": labels}))
    monkeypatch.setattr(alignment, "detect", lambda *_: found)


def test_what_enters_and_what_leaves_nms(two_images):
    study = study_of(make(retinanet).eval(), Two())
    points, results = alignment.measure(study)
    assert set(points) == {("score", "before NMS"), ("score", "after NMS")}
    before, after = (points["score", stage] for stage in alignment.STAGES)
    want = torch.tensor([[0.8, 1], [0.9, 0.8], [0.5, 0.6], [0.3, 0]])
    torch.testing.assert_close(before, want)
    torch.testing.assert_close(after, want[1:])  # NMS takes away the one that fits
    kept = [(r["image_id"], r["bbox"][3], round(r["score"], 4)) for r in results["oracle"]]
    assert kept == [(7, 10, 0.8), (8, 6, 0.3), (8, 10, 0)]  # by the oracle it stays
    numbers = alignment.numbers_of(points, results, Two().coco(), study.settings.test)["score"]
    assert numbers["after NMS"]["boxes"] == 3 and numbers["after NMS"]["matched"]["pearson"] == 1
    assert numbers["before NMS"]["matched"]["pearson"] == pytest.approx(0.7206, abs=1e-4)


def test_cost_by_threshold(two_images, tmp_path):
    study = study_of(make(retinanet).eval(), Two(), tmp_path)
    found = alignment.alignment({"a": study})["a"]
    own, oracle = found["metrics"]["score"], found["metrics"]["oracle"]
    half = 51 / 101 / 2  # one of class five's two objects; of class nine nothing is found
    for iou in range(50, 100, 5):
        assert own[f"AP{iou}"] == pytest.approx(0.5 if iou <= 60 else half if iou <= 80 else 0)
        assert oracle[f"AP{iou}"] == pytest.approx(0.5 if iou <= 60 else half)
        cost = found["score"]["cost"][f"AP{iou}"]
        assert cost == pytest.approx(half if iou > 80 else 0, abs=1e-6)
    assert found["score"]["cost"]["AP"] == pytest.approx(3 * half / 10)
    # LRP of class five at 0.5: ((0.2 + 0.4) / 0.5) / 2; of class nine, where nothing is found, 1
    assert found["score"]["LRP"]["oLRP"] == pytest.approx((0.6 + 1) / 2)
    assert found["score"]["D-ECE"] == pytest.approx((0.1 + 0.5 + 0.3) / 3, abs=1e-4)


def test_images_without_annotations(tmp_path):
    data = SyntheticDetection(2, 64)
    truth = {**data.coco(), "annotations": []}
    data.coco = lambda: truth
    study = study_of(sure(make(retinanet)), data, tmp_path)
    found = alignment.alignment({"a": study})["a"]
    assert found["score"]["D-ECE"] is None and found["score"]["cost"]["AP"] is None
    assert found["score"]["LRP"]["oLRP"] is None and (tmp_path / "alignment.png").exists()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Files of two short runs, RetinaNet's and IoU-aware RetinaNet's, and a copy of the first."""
    out = tmp_path_factory.mktemp("runs")
    for name, method in (("a", retinanet), ("b", iou_aware)):
        method.main([*RUN, "--steps", "2", "--train", "--out", f"{out}/{name}"])
    (out / "c").mkdir()
    shutil.copy(out / "a" / "last.pt", out / "c" / "last.pt")
    return {name: f"{out}/{name}/last.pt" for name in "abc"}


def test_side_by_side_is_each_alone(checkpoints, tmp_path, capsys, unpainted, monkeypatch):
    """Under its own settings, on the first one's images: of these the flags say how many."""
    a, b, c = checkpoints.values()
    few = ["--num-val", "3", "--out"]
    alone = alignment.main(["iou_aware_retinanet", "--weights", b, *few, f"{tmp_path}/b"])
    alone |= alignment.main(["retinanet", "--weights", a, *few, f"{tmp_path}/a"])
    capsys.readouterr()
    also = [f"iou_aware_retinanet={b}", f"retinanet={c}"]
    argv = ["retinanet", "--weights", a, "--also", *also, *few, f"{tmp_path}/all"]
    monkeypatch.setattr(Figure, "savefig", unpainted)
    found = alignment.main(argv)
    assert list(found) == ["retinanet a", "iou_aware_retinanet", "retinanet c"]
    assert found["iou_aware_retinanet"] == alone["iou_aware_retinanet"]
    first, copy = found["retinanet a"], found["retinanet c"]
    assert first == alone["retinanet"] and {**copy, "weights": a} == first
    assert json.loads((tmp_path / "all" / "alignment.json").read_text()) == found
    assert (tmp_path / "all" / "alignment.png").stat().st_size > 10_000
    lines = capsys.readouterr().out.splitlines()
    (titles,) = (line.split() for line in lines if "oLRP" in line)
    rows = [line for line in lines if line.startswith(tuple(found)) and "..." not in line]
    assert len(rows) == 4 and "iou_aware_retinanet, fused" in rows[2]  # before and after fusion
    assert all(len(row.split()[-len(titles) :]) == 15 for row in rows)
    shown = dict(zip(titles[-5:], rows[0].split()[-5:]))
    assert shown["oLRP"] == f"{100 * first['score']['LRP']['oLRP']:.1f}"


def test_bad_input_is_named(checkpoints, tmp_path, capsys):
    a, b, c = checkpoints.values()
    state = torch.load(a, weights_only=True)
    state["categories"][0] = dict(id=77, name="cow")
    torch.save(state, tmp_path / "cow.pt")
    for also, message in (
        ("nothing", "--also nothing: METHOD=CKPT, where METHOD is one of d2det,"),
        (f"yolo={a}", f"--also yolo={a}: METHOD=CKPT"),
        ("retinanet=nowhere.pt", "nowhere.pt: no such file"),
        (f"retinanet={b}", "a checkpoint of iou_aware_retinanet, not of retinanet"),
        (f"retinanet={a}", "is there twice"),
        (f"retinanet={tmp_path}/cow.pt", "cow.pt: other categories than the images have"),
    ):
        with pytest.raises(SystemExit) as end:
            alignment.main(["retinanet", "--weights", a, "--also", f"retinanet={c}", also])
        assert end.value.code == 2 and message in capsys.readouterr().err
