"""UAVDT: its folders and files, its own metric by hand, and runs on a small set of that format."""

import json
import shutil

import pytest
import torch
from PIL import Image
from test_cli import run
from test_data import Oracle, opened, small_settings

import common
import d2det
from common import BadInput
from data import Data, SyntheticDetection, load
from data.uavdt import UAVDT, uavdt_ap
from engine.loader import TrainBatches
from engine.metrics import coco_metrics, evaluate

# Rows: frame, target, left, top, width, height, out of view, occlusion, category.
WHOLE = {
    "M0101": "1,1,4,6,20,16,1,1,1\n1,2,30,20,24,20,3,4,3\n2,1,5,6,20,16,2,2,1\n",
    "M0102": "1,7,10,10,30,20,1,3,2\n",
    "M0209": "1,1,8,8,20,20,1,1,2\n2,1,9,8,20,20,1,1,2\n",
    "M0701": "1,1,0,0,16,12,1,1,1\n2,3,50,30,16,20,1,1,3\n",  # the last box reaches over the border
}
IGNORED = {
    "M0101": "1,1,40,2,20,15,1,-1,-1\n9,1,0,0,9,9,1,-1,-1\n",
    "M0701": "2,1,2,2,30,20,1,-1,-1",
}
SIZES = {"M0102": (60, 48)}  # (w, h) where it is not (64, 48)
LISTS = {"train": ["M0101", "M0102"], "test": ["M0209", "M0701 "]}  # the blank is the release's
PLACES = dict(frames="UAV-benchmark-M", truth="UAV-benchmark-MOTD_v1.0/GT", lists="M_attr")


@pytest.fixture
def root(tmp_path):
    """Two sequences to train on, two to test on, three frames each; the third has no rows."""
    frames, truth, lists = (tmp_path / place for place in PLACES.values())
    truth.mkdir(parents=True)
    for number, sequence in enumerate(WHOLE):
        (frames / sequence).mkdir(parents=True)
        pictures = SyntheticDetection(3, 64, number)
        for i in range(3):
            picture = Image.fromarray(pictures[i][0].permute(1, 2, 0).numpy())
            picture = picture.resize(SIZES.get(sequence, (64, 48)))
            picture.save(frames / sequence / f"img{i + 1:06d}.jpg")
        (truth / f"{sequence}_gt_whole.txt").write_text(WHOLE[sequence])
        (truth / f"{sequence}_gt_ignore.txt").write_text(IGNORED.get(sequence, ""))
    for split, sequences in LISTS.items():
        (lists / split).mkdir(parents=True)
        for sequence in sequences:
            (lists / split / f"{sequence}_attr.txt").write_text("1,0,0,0,1,0,1,0,0,0")
    return tmp_path


# ------------------------------------------------------------------------------ folders and files


def test_frames_and_rows_become_images_and_boxes(root, monkeypatch):
    files, original = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: files.append(a) or original(*a, **k))
    train, test = load(Data(data=str(root)))
    assert len(files) == len(WHOLE)  # one header a sequence
    assert train.image_ids == [f"M010{s}/img00000{i}" for s in (1, 2) for i in (1, 2, 3)]
    assert train.sizes.tolist() == [[48, 64]] * 3 + [[48, 60]] * 3
    assert train.categories == [{"id": 1, "name": "vehicle"}]
    image, target = train[0]
    assert image.shape == (3, 48, 64) and target["image_id"] == "M0101/img000001"
    assert target["boxes"].tolist() == [[4, 6, 24, 22], [30, 20, 54, 40], [40, 2, 60, 17]]
    assert target["labels"].tolist() == [0, 0, 0]  # a car, a bus, and what is ignored
    assert target["ignore"].tolist() == [False, False, True]
    assert len(train[2][1]["boxes"]) == 0 and train[3][1]["labels"].tolist() == [0]
    assert test.image_ids[3:] == [f"M0701/img00000{i}" for i in (1, 2, 3)]
    assert test[4][1]["boxes"][0].tolist() == [50, 30, 64, 48]  # clipped, but not to be scored:
    assert test.coco()["annotations"][3]["bbox"] == [50, 30, 16, 20]
    again, _ = load(Data(data=str(root), train_split="test"), val=False)
    assert again.image_ids == test.image_ids


def test_what_is_ignored_is_no_negative(root):
    train, _ = load(Data(data=str(root)), val=False)
    boxes, _, valid, ignore = common.pad_targets([train[0][1]])
    proposals = torch.tensor([[42.0, 4, 52, 14], [0, 30, 20, 48], [4, 6, 24, 22]])
    labels, _, _ = common.match(proposals, boxes[0], 0.5, 0.5, valid[0], ignore[0])
    assert labels.tolist() == [-1, 0, 1]


@pytest.mark.parametrize(
    "moves",
    [
        {"UAV-benchmark-MOTD_v1.0/GT": "GT"},
        {"UAV-benchmark-M": "a/UAV-benchmark-M", "M_attr": "a/M_attr"},
        {place: f"{place}/{place}" for place in ("UAV-benchmark-M", "M_attr")},
        {"UAV-benchmark-MOTD_v1.0": "x/UAV-benchmark-MOTD_v1.0"},
    ],
)
def test_archives_may_be_unpacked_with_or_without_their_folder(root, moves):
    want, _ = load(Data(data=str(root)), val=False)
    for old, new in moves.items():
        (root / old).rename(root / "moved")
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        (root / "moved").rename(root / new)
    found, _ = load(Data(data=str(root)), val=False)
    assert found.fingerprint() == want.fingerprint()


def damage(root, place, name="", text=None):
    """Write another text into a file, or remove the file or folder."""
    path = root / PLACES[place] / name
    if text is not None:
        path.write_text(text)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


@pytest.mark.parametrize(
    "place, name, text, message",
    [
        ("truth", "M0101_gt_whole.txt", "1,1,4,6,20,16,1,1,1\n\n2,1", "line 3: not nine .*: 2,1"),
        ("truth", "M0102_gt_ignore.txt", "1,x,4,6,20,16,1,-1,-1", "line 1: not nine"),
        ("truth", "M0701_gt_whole.txt", "1,1,4,6,20,16,1,1,1,1", "line 1: not nine"),
        ("truth", "M0102_gt_whole.txt", "1,1,4,6,20,16,1,-1,-1", "line 1: category -1, not 1"),
        ("truth", "M0101_gt_whole.txt", "4,1,4,6,20,16,1,1,1", "line 1: frame 4 is not in .*M0101"),
        ("truth", "M0102_gt_ignore.txt", None, "No such file"),
        ("frames", "M0102", None, "no frames img000001.jpg .*train lists M0102"),
        ("frames", "M0101/img000001.jpg", "no JPEG", "cannot read the image"),
        ("lists", "test", None, "no Mxxxx_attr.txt that lists a sequence"),
    ],
)  # fmt: skip
def test_what_is_broken_is_refused_by_name(root, place, name, text, message):
    damage(root, place, name, text)
    with pytest.raises(BadInput, match=f"{name}.*: {message}|{name}.*, {message}"):
        load(Data(data=str(root)))


def test_a_set_that_is_not_whole_is_refused(root):
    damage(root, "truth", "M0101_gt_whole.txt", "")
    damage(root, "truth", "M0101_gt_ignore.txt", "")
    damage(root, "truth", "M0102_gt_whole.txt", "")
    with pytest.raises(BadInput, match="M_attr/train: no annotated boxes to train on"):
        load(Data(data=str(root)))
    for place, message in (
        ("truth", "is not whole: no GT/Mxxxx_gt_whole.txt$"),
        ("frames", "is not whole: no Mxxxx, no GT"),
        ("lists", "no data found: neither .*UAVDT"),
    ):
        damage(root, place)
        with pytest.raises(BadInput, match=message):
            load(Data(data=str(root)))


def test_frames_of_another_size_and_empty_boxes_are_found(root, capsys):
    rows = "1,7,10,10,30,20,1,3,2\n2,7,70,10,30,20,1,3,2\n"  # the second is outside of the image
    damage(root, "truth", "M0102_gt_whole.txt", rows)
    opened(root)
    assert "dropped 1 of 6 boxes" in (text := capsys.readouterr().out)
    assert "annotations M0102_gt_whole.txt line 2" in text
    Image.new("RGB", (50, 48)).save(root / PLACES["frames"] / "M0101" / "img000003.jpg")
    with pytest.raises(BadInput, match=r"img000003.jpg: is 48x50 px .*train says 48x64"):
        opened(root)


# ------------------------------------------------------------------------------ metric

A, B = [0, 0, 100, 100], [200, 200, 40, 30]


def truth_of(*frames, sequence="M0203"):
    """Ground truth: (boxes of objects, rectangles to ignore) of each frame."""
    images, annotations = [], []
    for number, boxes in enumerate(frames, 1):
        images.append({"id": f"{sequence}/img{number:06d}", "height": 540, "width": 1024})
        for iscrowd, kind in enumerate(boxes):
            known = {"image_id": images[-1]["id"], "category_id": 1, "iscrowd": iscrowd}
            annotations += [{**known, "bbox": bbox} for bbox in kind]
    vehicle = [{"id": 1, "name": "vehicle"}]
    whole = {"images": images, "annotations": annotations, "categories": vehicle}
    return {"info": UAVDT, **whole}


def found(*boxes, frame=1, sequence="M0203", score=0.9):
    """Detections, each 0.1 less sure than the one before."""
    known = {"image_id": f"{sequence}/img{frame:06d}", "category_id": 1}
    return [{**known, "bbox": b, "score": score - 0.1 * i} for i, b in enumerate(boxes)]


@pytest.mark.parametrize(
    "objects, detections, ap",
    [
        ([A, B], [A, B], 1),
        ([A, B], [A, A, B], (1 + 2 / 3) / 2),  # the second on A is false
        ([A, B], [[500, 0, 9, 9], A, B], 2 / 3),  # precisions 0, 1/2, 2/3: the best to come
        ([A, B], [B], 1 / 2),
        ([A], [], 0),
        ([], [A], None),
        ([[0, 0, 10, 10]], [[0, 0, 10, 7]], 1),  # IoU 0.7 is enough; a pixel more would not be
        ([[0, 0, 10, 10]], [[0, 0, 10, 6.99]], 0),
        ([A, [0, 0, 100, 80]], [A, A], 1),  # the object it overlaps most is taken: the other one
        ([A, [0, 0, 100, 60]], [A, A], 1 / 2),  # too small for that
        # the first overlaps both alike, and takes the last: nothing is left for the second
        ([[0, 0, 10, 10], [2, 0, 10, 10]], [[1, 0, 10, 10], [2.5, 0, 10, 10]], 1 / 2),
    ],
)
def test_average_precision_by_hand(objects, detections, ap):
    value = uavdt_ap(truth_of((objects, [])), found(*detections))
    assert value == (ap if ap is None else pytest.approx(ap, abs=1e-12))


@pytest.mark.parametrize(
    "ignored, detection, removed",
    [
        ([[300, 300, 50, 50]], [301, 301, 48, 48], True),
        ([[300, 300, 50, 50]], [300, 301, 48, 48], False),  # touches a side: not strictly inside
        ([[300, 300, 50, 50]], [301, 301, 49, 48], False),
        ([[300, 300, 50, 50]], [301, 301, 48, 49], False),
        ([[300, 300, 50, 50], [340, 300, 50, 50]], [330, 310, 30, 30], False),  # in both together
        ([[500, 500, 20, 20], [300, 300, 50, 50]], [310, 310, 9, 9], True),
    ],
)
def test_only_what_is_strictly_inside_one_rectangle_is_removed(ignored, detection, removed):
    results = found(detection, A)
    assert uavdt_ap(truth_of(([A], ignored)), results) == (1 if removed else 1 / 2)
    assert uavdt_ap(truth_of(([A], []), ([], ignored)), results) == 1 / 2  # another frame's
    for sequence in ("M0209", "M0801"):  # where the evaluator removes none
        exempt = truth_of(([A], ignored), sequence=sequence)
        assert uavdt_ap(exempt, found(detection, A, sequence=sequence)) == 1 / 2


def test_objects_in_an_ignored_rectangle_count():
    inside = [310, 310, 20, 20]
    assert uavdt_ap(truth_of(([A, inside], [[300, 300, 50, 50]])), found(A, inside)) == 1 / 2


def test_frames_are_pooled_and_ties_go_to_the_earlier_frame():
    truth = truth_of(([], []), ([A], []))
    wrong, right = found(A, frame=1, score=0.5), found(A, frame=2, score=0.5)
    assert uavdt_ap(truth, right + wrong) == uavdt_ap(truth, wrong + right) == 1 / 2
    assert uavdt_ap(truth, found(A, frame=1, score=0.4) + right) == 1


def test_metrics_have_coco_s_numbers_and_uavdt_s():
    """In COCO's, a detection of which half lies in what is ignored is ignored too at IoU 0.5."""
    truth = truth_of(([A], [[300, 300, 50, 50]]))
    results = found([310, 310, 20, 20], A) + found([290, 310, 20, 20], score=0.7)
    metrics = coco_metrics(truth, results)
    assert metrics["uavdt_AP70"] == metrics["AP70"] == pytest.approx(1)
    touching = coco_metrics(truth, found([300, 310, 20, 20], A))
    assert touching["AP70"] == pytest.approx(1) and touching["uavdt_AP70"] == 1 / 2
    assert "uavdt_AP70" not in coco_metrics({**truth, "info": {}}, results)


# ------------------------------------------------------------------------------ runs


def test_perfect_detections_score_one(root):
    data = load(Data(data=str(root)), train=False)[1]
    settings = small_settings(max_size=200)
    oracle = Oracle(data, settings)
    for target in oracle.truth.values():
        kept = ~target["ignore"]
        target["boxes"], target["labels"] = target["boxes"][kept], target["labels"][kept]
    metrics = evaluate(oracle, data, settings)
    # What reaches over the border is found as far as it is in the image: at an IoU of 0.7875.
    assert metrics["uavdt_AP70"] == metrics["AP75"] == pytest.approx(1) and metrics["AP80"] < 0.9


def test_trains_evaluates_predicts_and_resumes(root, tmp_path, capsys):
    out = tmp_path / "r"
    train = ["--preset", "tiny", "--train", "--data", root, "--out", out, "--steps", 2]
    train += ["--scales", 64, "--test-scales", 64, "--max-size", 96]
    metrics = run(*train)
    assert 0 <= metrics["uavdt_AP70"] <= 1 and metrics["per_class"].keys() == {"vehicle"}
    assert "uavdt_AP70" in capsys.readouterr().out
    assert json.loads((out / "metrics.json").read_text()) == metrics
    results = json.loads((out / "predictions.json").read_text())
    ids = [r["image_id"] for r in results]
    assert ids == sorted(ids) and set(ids) <= {
        f"{s}/img00000{i}" for s in ("M0209", "M0701") for i in (1, 2, 3)
    }
    frame = root / PLACES["frames"] / "M0701" / "img000002.jpg"
    assert d2det.main(["--eval", "--predict", str(frame), "--out", str(out)]) == metrics
    assert [p.name for p in (out / "predict/pictures").iterdir()] == ["00000_img000002.jpg"]
    damage(root, "truth", "M0102_gt_whole.txt", "1,7,10,10,30,21,1,3,2\n")
    with pytest.raises(SystemExit):
        run(*train, "--resume")
    assert "the training images or boxes are others now" in capsys.readouterr().err


def test_batches_hold_frames_of_all_sequences(root):
    train, _ = load(Data(data=str(root)), val=False)
    batches = TrainBatches(train.sizes, 2, seed=0, total=3)
    assert sorted(i for batch in batches for _, i in batch) == list(range(6))
