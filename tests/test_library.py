"""Used as a library: `engine.load(...).detect(...)`, a data set of one's own, clear refusals."""

import dataclasses
import re
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from methods import build, settings_of
from PIL import Image, ImageOps

import common
import d2det
import data
import engine
import iou_aware_retinanet as method
from common import BadInput
from data import SyntheticDetection
from data.images import read_image
from data.own import check_dataset
from data.transforms import TrainingImages
from engine.checkpoints import find_script, load_checkpoint, save_checkpoint
from engine.metrics import coco_metrics
from engine.predict import Detections, to_image

pytestmark = pytest.mark.usefixtures("unpainted")
ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
SMALL = dict(
    image_size=64, scales=(64,), test_scales=(64,), max_size=128, batch=2, steps=2, workers=0,
    fpn_channels=8, tower_convs=1, tower_groups=0, norm="gn", device="cpu", score_threshold=0.001,
)  # fmt: skip


def small(num_classes: int, **changes):
    """A detector and its settings."""
    settings = settings_of(method, **{**SMALL, **changes})
    torch.manual_seed(0)
    return build(method, settings, num_classes), settings


def pixels(h: int, w: int) -> np.ndarray:
    return np.random.default_rng(h).integers(0, 255, (h, w, 3), dtype=np.uint8)


class Own(torch.utils.data.Dataset):
    """Two images of one bright square each, as somebody else would write it: plain tensors."""

    def __init__(self, **broken):
        self.sizes, self.broken = [(40, 60), (40, 60)], broken
        self.categories = [{"id": 5, "name": "square"}, {"id": 9, "name": "other"}]

    def __len__(self):
        return 2

    def __getitem__(self, index):
        image = torch.zeros(3, 40, 60, dtype=torch.uint8)
        image[:, 10:30, 20 * index : 20 * index + 20] = 255
        target = dict(
            boxes=torch.tensor([[20.0 * index, 10, 20 * index + 20, 30]]),
            labels=torch.tensor([index]),
            ignore=torch.tensor([False]),
            image_id=index,
            size=(40, 60),
        )
        return self.broken.get("image", image), {**target, **self.broken.get("target", {})}

    def coco(self):
        boxes = ([0, 10, 20, 20], [20, 10, 20, 20])
        return {
            "images": [{"id": i, "height": 40, "width": 60} for i in range(2)],
            "categories": self.categories,
            "annotations": [
                {"image_id": i, "category_id": (5, 9)[i], "bbox": b} for i, b in enumerate(boxes)
            ],
        }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a checkpoint of `Own` and a photo, 50x30 (h x w) and meant to be turned."""
    out = tmp_path_factory.mktemp("library")
    model, settings = small(2)
    metrics = engine.train(model, settings, Own(), Own(), out)
    assert 0 <= metrics["AP"] <= 1 and set(metrics["per_class"]) == {"square", "other"}
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    Image.fromarray(pixels(50, 30)).save(out / "photo.jpg", exif=exif)
    return out


# ------------------------------------------------------------------------------ load and detect


def test_the_lines_of_the_readme_run(trained):
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (lines,) = (s for s in snippets if "engine.load" in s)
    for old, new in (
        ("runs/d2det/best.pt", f"{trained}/last.pt"),
        ("photo.jpg", f"{trained}/photo.jpg"),
        ("min_score=0.5", "min_score=0.001"),  # it has learned nothing
    ):
        assert old in lines
        lines = lines.replace(old, new)
    names: dict = {}
    exec(lines, names)
    boxes, scores, labels = (names[k] for k in ("boxes", "scores", "labels"))
    assert len(boxes) == len(scores) == len(labels) == len(names["names"]) > 0
    assert boxes[:, 2].max() <= 50 and boxes[:, 3].max() <= 30  # turned: it is 30x50 now
    assert boxes[:, 2].max() > 30 and (scores.diff() <= 0).all()
    assert set(names["names"]) <= {"square", "other"}


def test_the_data_set_of_the_readme_keeps_the_contract():
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (lines,) = (s for s in snippets if "engine.train" in s)
    trained_on = []

    def train(model, settings, dataset):
        check_dataset(dataset, "training", masks=settings.model.masks)
        assert model.num_classes == len(dataset.categories)
        trained_on.append(len(dataset))

    names = dict(torch=torch, d2det=d2det, data=data, engine=types.SimpleNamespace(train=train))
    names |= dict(
        image=lambda i: torch.zeros(3, 480, 640, dtype=torch.uint8),
        boxes=lambda i: [[0, 0, 10, 20]],
        labels=lambda i: [1],
        ignore=lambda i: [False],
    )
    exec(lines, names)
    assert trained_on == [100]


def test_load_knows_what_made_the_checkpoint(trained):
    assert load_checkpoint(trained / "last.pt")["method"] == "iou_aware_retinanet"
    detector = engine.load(trained / "last.pt", "cpu", score_threshold=0.4, test_scales=[32])
    assert isinstance(detector.model, method.Detector) and not detector.model.training
    assert detector.categories == Own().categories
    test, scales = detector.settings.test, detector.settings.data.scales
    assert (scales, test.test_scales, test.score_threshold) == ((64,), (32,), 0.4)


def test_load_of_an_older_checkpoint_asks_what_made_it(trained, tmp_path):
    state = load_checkpoint(trained / "last.pt")
    del state["method"]
    save_checkpoint(tmp_path / "old.pt", state)
    with pytest.raises(BadInput, match=r'old\.pt: names no script; .*method="d2det"'):
        engine.load(tmp_path / "old.pt")
    for script in ("iou_aware_retinanet", method):
        assert len(engine.load(tmp_path / "old.pt", method=script).categories) == 2
    with pytest.raises(BadInput, match="Was it made by another script"):
        engine.load(tmp_path / "old.pt", method="baselines.faster_rcnn")
    with pytest.raises(BadInput, match="cannot import its script nothing"):
        engine.load(tmp_path / "old.pt", method="nothing")


def test_a_checkpoint_cannot_choose_what_is_imported(trained, tmp_path, monkeypatch):
    (tmp_path / "foreign.py").write_text("raise SystemExit('this ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    state = load_checkpoint(trained / "last.pt")
    for name in ("foreign", "../foreign", ".foreign", ""):
        save_checkpoint(tmp_path / "x.pt", {**state, "method": name})
        with pytest.raises(BadInput, match="say which made it"):
            engine.load(tmp_path / "x.pt")
    assert "foreign" not in sys.modules
    save_checkpoint(tmp_path / "x.pt", {**state, "method": "common"})
    with pytest.raises(BadInput, match="has no Settings and Detector"):
        engine.load(tmp_path / "x.pt")


def test_every_kind_of_image_is_detected_in_alike(trained, tmp_path):
    detector, array = engine.load(trained / "last.pt"), pixels(40, 60)
    Image.fromarray(array).save(tmp_path / "a.png")
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    want = detector.detect(f"{tmp_path}/a.png")
    for image in (tmp_path / "a.png", Image.fromarray(array), array, tensor):
        found = detector.detect(image)
        assert torch.equal(found.boxes, want.boxes) and found.names == want.names
    large = np.kron(array, np.ones((3, 3, 1), np.uint8))
    both = detector.detect([large, array])  # in the order given, each in its own pixels
    assert 60 < both[0].boxes.max() <= 180 and both[1].boxes.max() <= 60
    assert detector.detect([]) == []


@pytest.mark.parametrize(
    "image, message",
    [
        (torch.rand(3, 20, 20), "images are uint8 tensors.* is torch.float32"),
        (torch.zeros(20, 20, 3, dtype=torch.uint8), r"\[3, h, w\], RGB; this one is \[20, 20, 3\]"),
        (np.zeros((20, 20), np.uint8), r"\[h, w, 3\], RGB; this one is \[20, 20\]"),
        (np.zeros((20, 20, 3)), "torch.float64"),
        (3, "this one is int"),
    ],
)
def test_other_images_are_refused_by_name(image, message):
    with pytest.raises(BadInput, match=message):
        to_image(image)


def test_only_files_to_predict_in_are_turned(trained):
    photo = trained / "photo.jpg"
    turned, raw = to_image(photo), read_image(photo)
    assert turned.shape == (3, 30, 50) and torch.equal(turned, raw.rot90(-1, (1, 2)))
    assert to_image(Image.open(photo)).shape == (3, 50, 30)


def test_predict_turns_photos_and_skips_what_it_cannot_read(trained, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_text("no image")
    files = [tmp_path / "broken.jpg", trained / "photo.jpg"]
    detector = engine.load(trained / "last.pt")
    known = detector.categories, detector.settings
    found = engine.predict_files(detector.model, files, *known, tmp_path / "o")
    assert "skipped: " in capsys.readouterr().out
    assert {r["file_name"] for r in found} == {str(files[1])}
    boxes = torch.tensor([r["bbox"] for r in found])
    want = detector.detect(files[1]).boxes
    torch.testing.assert_close(boxes[:, :2], want[:, :2], atol=1e-3, rtol=0)
    (picture,) = (tmp_path / "o" / "pictures").iterdir()
    assert Image.open(picture).size == (50, 30)


def test_detections_keep_their_masks():
    masks = torch.ones(1, 4, 6, dtype=torch.bool)
    boxes, scores, labels = torch.rand(1, 4), torch.rand(1), torch.tensor([0])
    found = Detections(boxes, scores, labels, ["cat"], masks, torch.tensor([0.5]))
    other = dataclasses.replace(found, names=["dog"])
    assert other.names == ["dog"] and other.masks is masks and other.mask_scores.tolist() == [0.5]
    assert len([*other]) == 4  # unpacks without them


def test_every_test_setting_of_load_is_honoured(trained):
    image = trained / "photo.jpg"
    many = engine.load(trained / "last.pt").detect(image)
    few = engine.load(trained / "last.pt", max_detections=3).detect(image)
    assert len(many.boxes) > 3 and torch.equal(few.boxes, many.boxes[:3])
    least = many.scores[2].item()
    best = engine.load(trained / "last.pt").detect(image, min_score=least)
    assert torch.equal(best.boxes, many.boxes[many.scores >= least])
    with pytest.raises(BadInput, match=r"last\.pt: --nms-iou 2: at most 1"):
        engine.load(trained / "last.pt", nms_iou=2)


# ------------------------------------------------------------------------------ the host program

HOST = """
import atexit, signal, sys, threading
handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
registered, register = [], atexit.register
atexit.register = lambda function, *a, **k: registered.append(function) or register(function)
import engine, d2det
mine = [f for f in registered if (f.__module__ or "").split(".")[0] in MINE]
assert registered and not mine, mine
assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
assert threading.active_count() == 1
"""


def test_import_leaves_the_host_program_alone():
    """No hook at exit, which might kill the host's children; no handler of a signal, no thread."""
    mine = [path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()]
    script = HOST.replace("MINE", repr(mine))
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_training_works_outside_the_main_thread(tmp_path):
    """Where Python allows no signal handlers; the result is that of the main thread."""
    metrics = []

    def work(folder):
        model, settings = small(2)
        metrics.append(engine.train(model, settings, Own(), Own(), folder))

    thread = threading.Thread(target=work, args=(tmp_path / "a",))
    thread.start()
    thread.join()
    work(tmp_path / "b")
    assert len(metrics) == 2 and metrics[0] == metrics[1]
    weights = [load_checkpoint(tmp_path / name / "last.pt")["model"] for name in "ab"]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_a_run_that_cannot_start_leaves_the_earlier_one_where_it_is(trained, tmp_path):
    out = tmp_path / "r"
    model, settings = small(2)
    engine.train(model, settings, Own(), None, out)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    for other, wrong in ((small(3)[0], Own()), (model, Own(target=dict(size=32)))):
        with pytest.raises(BadInput):
            engine.train(other, settings, wrong, None, out)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


# ------------------------------------------------------------------------------ own data


def test_plain_boxes_and_masks_move_with_the_image():
    mask = torch.zeros(1, 40, 60, dtype=torch.bool)
    mask[:, 10:30, :20] = True
    data = Own(target=dict(masks=mask))
    image, target = TrainingImages(data, (80,), 120, flip=1.0, seed=0)[0, 0]
    assert image.shape == (3, 80, 120) and target["boxes"].tolist() == [[80, 20, 120, 60]]
    assert target["masks"].shape == (1, 112, 112) and target["masks"].all()  # over its own box
    assert data[0][1]["boxes"].tolist() == [[0, 10, 20, 30]]  # the data set's own is as it was


def test_all_that_a_data_set_lacks_is_said_at_once(tmp_path):
    class Bare:
        def __len__(self):
            return 2

    with pytest.raises(BadInput) as error:
        check_dataset(Bare(), "validation", scored=True)
    text = str(error.value)
    assert text.startswith("the validation data set (Bare; ") and "data/contract.py" in text
    for name in ("__getitem__", "sizes", "categories", "coco"):
        assert f"has no {name}" in text
    model, settings = small(2)
    target = dict(labels=torch.tensor([2]), ignore=torch.tensor([0]), size=(60, 40))
    with pytest.raises(BadInput) as error:
        engine.train(model, settings, Own(target=target), None, tmp_path / "r")
    for part in ("item 0: labels of 2", "item 1: labels", "ignore is not", "size is (60, 40)"):
        assert part in str(error.value)
    assert not (tmp_path / "r").exists()
    check_dataset(Own(), "training", scored=True)
    check_dataset(SyntheticDetection(2, 64), "training", scored=True)


@pytest.mark.parametrize(
    "broken, message",
    [
        (dict(target=dict(labels=torch.tensor([2]))), r"is \[2\]; torchvision's start at 1"),
        (dict(target=dict(labels=torch.tensor([-1]))), r"labels of 2 categories are 0\.\.1"),
        (dict(target=dict(labels=torch.tensor([0.0]))), "labels are not .* torch.long"),
        (dict(target=dict(boxes=torch.tensor([[30.0, 10, 20, 20]]))), r"not \(x1, y1, x2, y2\)"),
        (dict(target=dict(boxes=torch.zeros(2, 4))), r"boxes are \[2, 4\], not \[G, 4\]"),
        (dict(target=dict(boxes=torch.zeros(1, 5))), r"boxes are \[1, 5\], not \[G, 4\]"),
        (dict(target=dict(boxes=np.zeros((1, 4)))), "boxes: not a tensor"),
        (dict(target=dict(labels=torch.tensor(0))), "labels are not .* torch.long"),
        (dict(target=dict(labels=[0])), "labels: not a tensor"),
        (dict(target=dict(ignore=np.array([False]))), "ignore: not a tensor"),
        (dict(target=dict(ignore=torch.tensor([False, True]))), "ignore is not .* torch.bool"),
        (dict(target=dict(size=32)), "size is 32, sizes says 40x60"),
        (dict(target=dict(image_id=torch.tensor(0))), "image_id is neither"),
        (dict(image=torch.rand(3, 40, 60)), "item 0: images are uint8 tensors"),
        (dict(image=torch.zeros(3, 60, 40, dtype=torch.uint8)), "is 60x40 px, sizes says 40x60"),
    ],
)
def test_wrong_items_are_refused_before_training(broken, message):
    with pytest.raises(BadInput, match=message):
        check_dataset(Own(**broken), "training")


def test_wrong_members_are_refused_before_training():
    for name, value in (
        ("sizes", [(40, 60), (40,)]),
        ("sizes", None),
        ("categories", None),
        ("categories", ["a"]),
    ):
        data = Own()
        setattr(data, name, value)
        with pytest.raises(BadInput, match=f"{name} (is|are)"):
            check_dataset(data, "training")


def test_a_label_that_is_wrong_later_stops_training_with_its_image(tmp_path):
    class Late(SyntheticDetection):
        def __getitem__(self, index):
            image, target = super().__getitem__(index)
            return image, {**target, "labels": target["labels"] + (10 if index > 3 else 0)}

    model, settings = small(10, steps=20, scales=(64,))
    with pytest.raises(BadInput, match=r"item \d+ of Late.*: labels of 10 categories are 0\.\.9"):
        engine.train(model, settings, Late(12, 64), None, tmp_path / "r")


def test_a_detector_of_another_number_of_classes_is_refused(tmp_path):
    model, settings = small(3)
    with pytest.raises(BadInput, match="made for 3 classes, the training data have 2"):
        engine.train(model, settings, Own(), None, tmp_path / "r")


def test_the_networks_input_is_checked():
    with pytest.raises(BadInput, match="images are uint8 tensors.* is torch.float32"):
        small(2)[0].eval().predict([torch.rand(3, 64, 64)])
    with pytest.raises(BadInput, match=r"RGB; this one is \[1, 64, 64\]"):
        common.pad_images([torch.zeros(1, 64, 64, dtype=torch.uint8)])


def test_an_own_ground_truth_is_numbered_and_completed():
    truth = Own().coco()
    perfect = [{**a, "score": 1.0} for a in truth["annotations"]]
    assert coco_metrics(truth, perfect)["AP"] == pytest.approx(1)
    for first in (0, 7):  # ids from 0, or one id for all
        numbered = [{**a, "id": first * i} for i, a in enumerate(truth["annotations"])]
        assert coco_metrics({**truth, "annotations": numbered}, perfect)["AP"] == pytest.approx(1)
    assert "id" not in truth["annotations"][0]  # the caller's stays as it was


def test_settings_of_a_checkpoint_are_tuples_again(trained):
    saved = load_checkpoint(trained / "last.pt")["settings"]
    assert saved["data"]["scales"] == [64]
    settings = method.Settings.from_dict(saved)
    assert settings.data.scales == (64,) and settings.run.drops == method.Settings().run.drops


def test_broken_exif_data_do_not_stop_a_photo(tmp_path, monkeypatch):
    """PIL's turning raises whatever its EXIF parser meets, a TypeError for instance."""

    def broken(_):
        raise TypeError("bad operand type for abs(): 'str'")

    Image.new("RGB", (40, 20), "red").save(tmp_path / "a.jpg")
    monkeypatch.setattr(ImageOps, "exif_transpose", broken)
    assert read_image(tmp_path / "a.jpg", upright=True).shape == (3, 20, 40)


@pytest.mark.parametrize("script", ["runs.shared.helper", "tests.methods", "engine.run", "..d2det"])
def test_a_checkpoint_may_name_scripts_alone(script, tmp_path):
    with pytest.raises(BadInput):
        find_script({"method": script}, tmp_path / "last.pt")
