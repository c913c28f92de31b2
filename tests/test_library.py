"""Used as a library: `engine.load(...).detect(...)`, a data set of one's own, clear refusals."""

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import engine
import iou_aware_retinanet as method
from common import BadInput
from engine.checkpoints import find_script, load_checkpoint, save_checkpoint
from engine.data import check_dataset
from engine.metrics import coco_metrics
from engine.predict import to_image

pytestmark = pytest.mark.usefixtures("unpainted")
README = Path(__file__).parent.parent / "README.md"
SMALL = dict(
    image_size=64, scales=(64,), test_scales=(64,), max_size=128, batch=2, steps=2, workers=0,
    fpn_channels=8, tower_convs=1, tower_groups=0, norm="gn", device="cpu", score_threshold=0.001,
)  # fmt: skip


def small(num_classes: int, **changes):
    config = dataclasses.replace(method.Config(), **{**method.TINY, **SMALL, **changes})
    torch.manual_seed(0)
    return method.Detector(config, num_classes), config


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
    model, config = small(2)
    metrics = engine.train(model, config, Own(), Own(), out)
    assert 0 <= metrics["AP"] <= 1 and set(metrics["per_class"]) == {"square", "other"}
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    Image.fromarray(pixels(50, 30)).save(out / "photo.jpg", exif=exif)
    return out


# ------------------------------------------------------------------------------ load and detect


def test_the_lines_of_the_readme_run(trained, capsys):
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (lines,) = (s for s in snippets if "engine.load" in s)
    lines = lines.replace("runs/d2det/last.pt", f"{trained}/last.pt")
    lines = lines.replace("photo.jpg", f"{trained}/photo.jpg")
    names: dict = {}
    exec(lines, names)
    boxes, scores, labels = (names[k] for k in ("boxes", "scores", "labels"))
    assert len(boxes) == len(scores) == len(labels) == len(names["names"]) > 0
    assert boxes[:, 2].max() <= 50 and boxes[:, 3].max() <= 30  # turned: it is 30x50 now
    assert boxes[:, 2].max() > 30 and (scores.diff() <= 0).all()
    assert set(names["names"]) <= {"square", "other"} and " at [" in capsys.readouterr().out


def test_load_knows_what_made_the_checkpoint(trained):
    assert load_checkpoint(trained / "last.pt")["method"] == "iou_aware_retinanet"
    detector = engine.load(trained / "last.pt", "cpu", score_threshold=0.4, test_scales=[32])
    assert isinstance(detector.model, method.Detector) and not detector.model.training
    assert detector.categories == Own().categories
    config = detector.config
    assert (config.scales, config.test_scales, config.score_threshold) == ((64,), (32,), 0.4)
    assert not config.train and not config.predict


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
    with pytest.raises(BadInput, match="has no Config and Detector"):
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
        (torch.rand(3, 20, 20), "images are uint8 tensors .* is torch.float32"),
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
    turned, raw = to_image(photo), common.read_image(photo)
    assert turned.shape == (3, 30, 50) and torch.equal(turned, raw.rot90(-1, (1, 2)))
    assert to_image(Image.open(photo)).shape == (3, 50, 30)


def test_predict_turns_photos_and_skips_what_it_cannot_read(trained, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_text("no image")
    files = [tmp_path / "broken.jpg", trained / "photo.jpg"]
    detector = engine.load(trained / "last.pt")
    model, config = detector.model, detector.config
    found = engine.predict_files(model, files, detector.categories, config, "cpu", tmp_path / "o")
    assert "skipped: " in capsys.readouterr().out
    assert {r["file_name"] for r in found} == {str(files[1])}
    boxes = torch.tensor([r["bbox"] for r in found])
    want = detector.detect(files[1]).boxes
    torch.testing.assert_close(boxes[:, :2], want[:, :2], atol=1e-3, rtol=0)
    (picture,) = (tmp_path / "o" / "pictures").iterdir()
    assert Image.open(picture).size == (50, 30)


# ------------------------------------------------------------------------------ own data


def test_plain_boxes_and_masks_move_with_the_image():
    config = common.Config(scales=(80,), max_size=120, flip=1.0)
    mask = torch.zeros(1, 40, 60, dtype=torch.bool)
    mask[:, 10:30, :20] = True
    data = Own(target=dict(masks=mask))
    image, target = common.Resized(data, config, True)[0, 0]
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
    assert text.startswith("the validation data set (Bare; ") and "common.py" in text
    for name in ("__getitem__", "sizes", "categories", "coco"):
        assert f"has no {name}" in text
    model, config = small(2)
    target = dict(labels=torch.tensor([2]), ignore=torch.tensor([0]), size=(60, 40))
    with pytest.raises(BadInput) as error:
        engine.train(model, config, Own(target=target), None, tmp_path / "r")
    for part in ("item 0: labels are 0..1", "item 1: labels", "ignore is not", "size is (60, 40)"):
        assert part in str(error.value)
    assert not (tmp_path / "r").exists()
    check_dataset(Own(), "training", scored=True)
    check_dataset(common.SyntheticDetection(2, 64), "training", scored=True)


@pytest.mark.parametrize(
    "broken, message",
    [
        (dict(target=dict(labels=torch.tensor([2]))), r"is \[2\]; torchvision's start at 1"),
        (dict(target=dict(labels=torch.tensor([-1]))), r"labels are 0\.\.1 for 2 categories"),
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
    class Late(common.SyntheticDetection):
        def __getitem__(self, index):
            image, target = super().__getitem__(index)
            return image, {**target, "labels": target["labels"] + (10 if index > 3 else 0)}

    model, config = small(10, steps=20, scales=(64,))
    with pytest.raises(BadInput, match=r"image \d+: labels are 0\.\.9 for 10 categories"):
        engine.train(model, config, Late(12, 64), None, tmp_path / "r")


def test_a_detector_of_another_number_of_classes_is_refused(tmp_path):
    model, config = small(3)
    with pytest.raises(BadInput, match="made for 3 classes, the training data have 2"):
        engine.train(model, config, Own(), None, tmp_path / "r")


def test_the_networks_input_is_checked():
    with pytest.raises(BadInput, match="images are uint8 tensors .* is torch.float32"):
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
    saved = load_checkpoint(trained / "last.pt")["config"]
    assert saved["scales"] == [64]
    config = method.Config(**saved)
    assert config.scales == (64,) and config.drops == method.Config().drops


def test_broken_exif_data_do_not_stop_a_photo(tmp_path, monkeypatch):
    """PIL's turning raises whatever its EXIF parser meets, a TypeError for instance."""

    def broken(_):
        raise TypeError("bad operand type for abs(): 'str'")

    Image.new("RGB", (40, 20), "red").save(tmp_path / "a.jpg")
    monkeypatch.setattr(common.ImageOps, "exif_transpose", broken)
    assert common.read_image(tmp_path / "a.jpg", upright=True).shape == (3, 20, 40)


@pytest.mark.parametrize("script", ["runs.shared.helper", "tests.methods", "engine.run", "..d2det"])
def test_a_checkpoint_may_name_scripts_alone(script, tmp_path):
    with pytest.raises(BadInput):
        find_script({"method": script}, tmp_path / "last.pt")
