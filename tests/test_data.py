"""Data sets, their validation, the transforms and the evaluation."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import BadInput
from data import Data, SyntheticDetection, load
from data.contract import make_target
from data.synthetic import SHAPES
from data.transforms import TestImages, TrainingImages
from data.voc import voc07_ap
from engine import loader
from engine.command import load_data
from engine.detector import split_images
from engine.loader import TrainBatches
from engine.metrics import coco_metrics, detect, evaluate, to_coco
from engine.pictures import draw
from engine.predict import Files
from engine.settings import Settings


def small_settings(**changes):
    base = dict(scales=(96,), test_scales=(96,), max_size=160, workers=0, eval_batch=2)
    return Settings().replace(**{**base, **changes})


def opened(folder, train=True, categories=None, **changes):
    """The sets in a folder, with every image opened, as the command line loads them."""
    return load_data(Settings().replace(data=str(folder), **changes), train, categories)


def training_images(data, scales=(96,), max_size=160, flip=0.5):
    return TrainingImages(data, scales, max_size, flip, seed=0)


@pytest.fixture
def coco_dir(tmp_path):
    """Two images of 40x60 (h x w) in COCO layout, categories 7 and 3, the second image empty."""
    data = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 60} for i in (5, 9)],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 7, "bbox": [10, 5, 20, 30], "iscrowd": 0},
            {"id": 2, "image_id": 5, "category_id": 3, "bbox": [0, 0, 30, 30], "iscrowd": 1},
        ],
    }
    for a in data["annotations"]:
        a["area"] = a["bbox"][2] * a["bbox"][3]
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").mkdir()
        for i in (5, 9):
            pixels = np.random.default_rng(i).integers(0, 255, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{split}2017" / f"{i}.png")
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(data))
    return tmp_path


def edit(folder, change, split="train"):
    path = folder / "annotations" / f"instances_{split}2017.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


# ------------------------------------------------------------------------------ synthetic


def test_synthetic_is_deterministic_and_exact():
    data = SyntheticDetection(40, 128, seed=3, masks=True)
    again = SyntheticDetection(40, 128, seed=3, masks=True)
    labels, hidden = set(), 0
    for i in range(40):
        image, target = data[i]
        assert image.dtype == torch.uint8 and image.shape == (3, 128, 128)
        assert torch.equal(image, again[i][0]) and torch.equal(
            target["boxes"], again[i][1]["boxes"]
        )
        labels |= set(target["labels"].tolist())
        hidden += (target["visible"] < 0.99).sum().item()
        assert (target["visible"] >= 0.49).all() and (target["visible"] <= 1).all()
        for box, mask in zip(target["boxes"].tolist(), target["masks"]):
            y, x = mask.nonzero().unbind(1)
            tight = [x.min(), y.min(), x.max() + 1, y.max() + 1]
            assert box == [float(v) for v in tight]
        assert (target["masks"].sum(0) <= 1).all() if len(target["masks"]) else True
    assert labels == set(range(10)) and hidden > 20
    other = SyntheticDetection(40, 128, seed=4)
    assert not torch.equal(data[0][0], other[0][0])
    assert not torch.equal(data[0][0], data[1][0])


def test_a_synthetic_set_that_is_kept_is_made_once(monkeypatch):
    made, original = [], SyntheticDetection._make
    monkeypatch.setattr(
        SyntheticDetection, "_make", lambda self, i: made.append(i) or original(self, i)
    )
    kept, fresh = (SyntheticDetection(3, 64, masks=True, keep=keep) for keep in (True, False))
    for _ in range(2):
        for i in range(3):
            (image, target), (other, wanted) = kept[i], fresh[i]
            assert torch.equal(image, other) and target.keys() == wanted.keys()
            assert all(torch.equal(target[k], wanted[k]) for k in ("boxes", "masks", "visible"))
            image.zero_(), target["masks"].zero_(), target["boxes"].zero_()  # the caller's alone
    assert len(made) == 3 + 2 * 3
    assert kept.coco() == fresh.coco() and kept.coco() is kept.coco() and len(made) == 3 + 3 * 3


def test_synthetic_box_and_mask_disagree_for_thin_and_hollow_shapes():
    data = SyntheticDetection(150, 128, masks=True)
    share = {name: [] for name in SHAPES}
    for i in range(150):
        target = data[i][1]
        wh = target["boxes"][:, 2:] - target["boxes"][:, :2]
        fill = target["masks"].sum((1, 2)) / wh.prod(1)
        for label, value, seen in zip(target["labels"], fill, target["visible"]):
            if seen > 0.99:
                share[list(SHAPES)[label]].append(value.item())
    mean = {k: sum(v) / len(v) for k, v in share.items()}
    assert mean["disc"] > 0.7 > 0.6 > max(mean["ring"], mean["bar"], mean["crescent"])


def test_synthetic_sizes_are_spread_over_the_thirds():
    data = SyntheticDetection(60, 384)
    boxes = [data[i][1]["boxes"] for i in range(60)]
    sides = torch.cat([(b[:, 2:] - b[:, :2]).prod(1).sqrt() for b in boxes])
    thirds = torch.bucketize(sides, torch.tensor([32.0, 96.0])).bincount(minlength=3) / len(sides)
    assert thirds.min() > 0.1


# ------------------------------------------------------------------------------ transforms


def test_resize_and_flip_move_boxes_with_the_image():
    class Dot:
        sizes = np.array([[40, 60]])

        def __getitem__(self, index):
            image = torch.zeros(3, 40, 60, dtype=torch.uint8)
            image[:, 10:20, 6:18] = 255
            box = torch.tensor([[6.0, 10, 18, 20]])
            return image, make_target(box, [0], [False], 0, (40, 60))

    for flip in (0.0, 1.0):
        image, target = training_images(Dot(), (80,), 120, flip)[0, 0]
        assert image.shape == (3, 80, 120)
        x1, y1, x2, y2 = target["boxes"][0].tolist()
        assert [x1, y1, x2, y2] == ([84, 20, 108, 40] if flip else [12, 20, 36, 40])
        bright = (image[0] > 127).nonzero()
        assert bright.min(0)[0].tolist() == [y1, x1]
        assert (bright.max(0)[0] + 1).tolist() == [y2, x2]


def test_longer_side_is_limited_and_scales_are_drawn():
    data = SyntheticDetection(4, 100)
    resized = training_images(data, (50, 90), 90)
    assert {resized[epoch, 0][0].shape[1] for epoch in range(20)} == {50, 90}

    class Wide:
        def __getitem__(self, index):
            target = make_target(torch.zeros(0, 4), [], [], 0, (20, 80))
            return torch.zeros(3, 20, 80, dtype=torch.uint8), target

    views = TestImages(Wide(), test_scales=(96, 48, 10), max_size=160, scales=(64, 96))[0]
    assert [tuple(image.shape) for image, _ in views] == [(3, 40, 160), (3, 20, 80), (3, 4, 17)]
    assert training_images(Wide())[0, 0][0].shape == (3, 40, 160)


def test_a_very_thin_image_keeps_a_pixel_a_side():
    image = torch.zeros(3, 3, 2000, dtype=torch.uint8)
    target = make_target(torch.tensor([[0.0, 0, 1000, 3]]), [0], [False], 0, (3, 2000))
    ((small, target),) = TestImages([(image, target)], (64,), 128, (64,))[0]
    assert small.shape == (3, 1, 128) and target["boxes"].tolist() == [[0, 0, 64, 1]]


def test_augmentation_depends_on_epoch_and_index_alone():
    data = SyntheticDetection(4, 64)
    wrapped = training_images(data, (48, 64, 80))
    torch.manual_seed(1)
    first = wrapped[3, 1][0]
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(first, wrapped[3, 1][0])
    assert torch.equal(before, torch.get_rng_state())  # and it leaves the global generator alone
    views = [wrapped[e, 1][0] for e in range(12)]
    assert len({(v.shape, v.float().mean().item()) for v in views}) > 2
    TestImages(data, (48, 64), 64, (64,))[1]
    assert torch.equal(before, torch.get_rng_state())


def test_training_order_visits_all_groups_by_shape_and_resumes():
    sizes = np.array([[40, 60]] * 13 + [[60, 40]] * 7)
    batches = TrainBatches(sizes, 4, 0, 0, 15)
    order = list(batches)
    assert len(order) == 15 and batches.per_epoch == 5
    for epoch in range(3):
        keys = [k for b in order[5 * epoch : 5 * epoch + 5] for k in b]
        assert sorted(i for _, i in keys) == list(range(20)) and {e for e, _ in keys} == {epoch}
    mixed = [len({i < 13 for _, i in b}) for b in order]
    assert sum(m == 2 for m in mixed) <= 3  # only leftovers of an epoch mix
    assert order[:5] != [[(0, i) for _, i in b] for b in order[5:10]]
    assert list(TrainBatches(sizes, 4, 0, 8, 15)) == order[8:]
    assert [len(b) for b in TrainBatches(sizes[:3], 4, 0, 0, 2)] == [3, 3]


def test_padding_normalises_and_keeps_sizes():
    images = [torch.full((3, 40, 60), 255, dtype=torch.uint8), torch.zeros(3, 64, 33).byte()]
    batch, sizes = common.pad_images(images)
    assert batch.shape == (2, 3, 64, 64) and batch.is_contiguous(memory_format=torch.channels_last)
    assert sizes.tolist() == [[40, 60], [64, 33]]
    assert batch[0, 0, 39, 59].item() == pytest.approx((1 - 0.485) / 0.229, rel=1e-5)
    assert batch[0, :, 40:].abs().sum() == 0 and batch[1, :, :, 33:].abs().sum() == 0


# ------------------------------------------------------------------------------ COCO and VOC


def test_coco_layout_maps_categories_and_crowds(coco_dir):
    train, val = opened(coco_dir)
    assert [c["id"] for c in train.categories] == [3, 7] and len(train) == len(val) == 2
    image, target = train[0]
    assert image.shape == (3, 40, 60)
    assert target["labels"].tolist() == [1, 0] and target["ignore"].tolist() == [False, True]
    assert target["boxes"][0].tolist() == [10, 5, 30, 35] and target["image_id"] == 5
    assert len(train[1][1]["boxes"]) == 0
    found = {k: target[k] for k in ("boxes", "labels")} | {"scores": torch.ones(2)}
    result = to_coco(5, found, train.categories)
    assert result[0] == {"image_id": 5, "category_id": 7, "bbox": [10, 5, 20, 30], "score": 1.0}


def test_coco_explicit_paths(coco_dir):
    paths = {
        f"{s}_json": str(coco_dir / f"annotations/instances_{s}2017.json") for s in ("train", "val")
    }
    paths |= {f"{s}_images": str(coco_dir / f"{s}2017") for s in ("train", "val")}
    assert len(opened("synthetic", **paths)[0]) == 2
    with pytest.raises(BadInput, match="needed together"):
        opened("synthetic", **{**paths, "val_images": ""})


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda d: (d / "train2017/5.png").unlink(),
            r"5\.png: cannot read the image: no such file",
        ),
        (
            lambda d: (d / "train2017/5.png").write_bytes(
                (d / "train2017/5.png").read_bytes()[:900]
            ),
            r"5\.png: cannot read the image: .*truncated",
        ),
        (lambda d: (d / "train2017/9.png").write_text("hello"), r"9\.png: cannot read"),
        (lambda d: (d / "annotations/instances_train2017.json").write_text("{"), "broken JSON"),
        (lambda d: (d / "annotations/instances_train2017.json").write_text("{}"), "not COCO"),
        (lambda d: (d / "annotations/instances_train2017.json").unlink(), "[Nn]o such file"),
        (lambda d: edit(d, lambda j: j["annotations"][0].update(image_id=77)), "no image 77"),
        (
            lambda d: edit(d, lambda j: j["annotations"][0].update(category_id=1)),
            "unknown category 1",
        ),
        (lambda d: edit(d, lambda j: j["annotations"][0].update(bbox=[1, 2])), "bbox"),
        (
            lambda d: edit(d, lambda j: j["annotations"][0].update(bbox=["a", 1, 2, 3])),
            "annotation 1: bbox",
        ),
        (lambda d: edit(d, lambda j: j.update(images=[], annotations=[])), "train2017.json: no im"),
        (lambda d: edit(d, lambda j: j.update(annotations=[])), "no annotated boxes to train on"),
        (lambda d: edit(d, lambda j: j.pop("annotations")), "no annotated boxes to train on"),
        (
            lambda d: Image.new("I;16", (60, 40)).save(d / "train2017/5.png"),
            r"5\.png: cannot read the image: .*8 bit",
        ),
        (lambda d: edit(d, lambda j: j["images"][0].update(height=41)), "40x60 .*says 41x60"),
        (
            lambda d: edit(d, lambda j: j["images"][1].update(id=5)),
            "id 5 of images occurs more than once",
        ),
        (lambda d: edit(d, lambda j: j["categories"].pop(), "val"), "instances_val.*category"),
        (lambda d: edit(d, lambda j: j["categories"][0].update(name="cow"), "val"), "cow"),
    ],
)
def test_bad_coco_is_refused_by_name(coco_dir, damage, message):
    damage(coco_dir)
    with pytest.raises(BadInput, match=message):
        opened(coco_dir)


def test_broken_boxes_are_dropped_and_counted(coco_dir, capsys):
    boxes = [[5, 5, 0, 9], [5, 5, -3, 9], [61, 5, 9, 9], [float("nan"), 5, 9, 9], [50, 30, 20, 20]]

    def add(j):
        for i, bbox in enumerate(boxes):
            j["annotations"].append({**j["annotations"][0], "id": 10 + i, "bbox": bbox})

    edit(coco_dir, add)
    train, _ = opened(coco_dir)
    assert "dropped 4 of 7 boxes" in capsys.readouterr().out
    assert train[0][1]["boxes"][2].tolist() == [50, 30, 60, 40]  # reaches over the border: clipped
    assert len(train.coco()["annotations"]) == 3


def test_ground_truth_of_home_made_files_is_scored(coco_dir):
    """pycocotools takes id 0 for "no match", and needs ids, areas and crowd marks."""

    def strip(j):
        for i, a in enumerate(j["annotations"]):
            j["annotations"][i] = {k: a[k] for k in ("image_id", "category_id", "bbox")}
        j["annotations"][0]["id"] = 0

    edit(coco_dir, strip)
    data, _ = opened(coco_dir)
    perfect = []
    for _, target in (data[i] for i in range(len(data))):
        scores = torch.ones(len(target["boxes"]))
        perfect += to_coco(target["image_id"], {**target, "scores": scores}, data.categories)
    assert coco_metrics(data.coco(), perfect)["AP"] == pytest.approx(1)


@pytest.fixture
def voc_dir(tmp_path):
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for stem, name in (("a1", "dog"), ("b2", "cat")):
        Image.new("RGB", (60, 40)).save(tmp_path / f"JPEGImages/{stem}.jpg")
        (tmp_path / f"Annotations/{stem}.xml").write_text(
            f"""<annotation><size><width>60</width><height>40</height></size><object>
            <name>{name}</name><difficult>{int(stem == "b2")}</difficult><bndbox><xmin>1</xmin>
            <ymin>11</ymin><xmax>30</xmax><ymax>20</ymax></bndbox></object></annotation>"""
        )
    (tmp_path / "ImageSets/Main/trainval.txt").write_text("a1\nb2\n")
    (tmp_path / "ImageSets/Main/test.txt").write_text("b2  1\n")
    return tmp_path


def test_voc_layout(voc_dir):
    train, val = opened(voc_dir)
    assert [c["name"] for c in val.categories] == ["cat", "dog"]
    assert train.image_ids == ["a1", "b2"] and val.image_ids == ["b2"]
    target = train[0][1]
    assert target["boxes"].tolist() == [[0, 10, 30, 20]]  # 1-based, inclusive
    assert target["labels"].tolist() == [1] and val[0][1]["ignore"].tolist() == [True]
    (voc_dir / "ImageSets/Main/first.txt").write_text("a1\n")
    smaller, none = load(Data(data=str(voc_dir), train_split="first"), val=False)
    assert smaller.image_ids == ["a1"] and none is None


def test_voc_without_a_test_split_does_not_train_on_what_it_tests(voc_dir):
    lists = voc_dir / "ImageSets/Main"
    (lists / "test.txt").rename(lists / "val.txt")
    (lists / "train.txt").write_text("a1\n")
    known = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    train, val = opened(voc_dir, categories=known)
    assert train.image_ids == ["a1"] and val.image_ids == ["b2"]
    (lists / "train.txt").unlink()  # nobody asks for it
    assert len(opened(voc_dir, train=False, categories=known)[1]) == 1


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: (d / "Annotations/a1.xml").unlink(), r"a1\.xml: no such file"),
        (lambda d: (d / "Annotations/a1.xml").write_text("<annotation>"), r"a1\.xml: broken VOC"),
        (lambda d: (d / "Annotations/a1.xml").write_text("<annotation/>"), r"a1\.xml: broken VOC"),
        (lambda d: (d / "JPEGImages/a1.jpg").unlink(), r"a1\.jpg"),
        (lambda d: (d / "ImageSets/Main/trainval.txt").unlink(), "ImageSets/Main"),
        (lambda d: (d / "ImageSets/Main/trainval.txt").write_text("a1"), "unknown category cat"),
        (lambda d: shutil.rmtree(d / "JPEGImages"), "no data found"),
    ],
)
def test_bad_voc_is_refused_by_name(voc_dir, damage, message):
    damage(voc_dir)
    with pytest.raises(BadInput, match=message):
        opened(voc_dir)


# ------------------------------------------------------------------------------ evaluation


class Oracle(torch.nn.Module):
    """Answers with the ground truth, as it comes out of the resizing that `detect` uses."""

    def __init__(self, data, settings, shift=0.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))  # says which device it is on
        scales, d = settings.test.test_scales, settings.data
        views = TestImages(data, scales, d.max_size, d.scales)
        seen = [view for i in range(len(data)) for view in views[i]]
        self.truth = {image.numpy().tobytes(): target for image, target in seen}
        self.shift, self.views = shift, len(scales)

    def outputs(self, images):
        return dict(targets=[self.truth[image.numpy().tobytes()] for image in images])

    def candidates(self, outputs, test):
        targets = outputs["targets"]
        image = torch.cat([torch.full_like(t["labels"], i) for i, t in enumerate(targets)])
        boxes = torch.cat([t["boxes"] for t in targets]) + self.shift
        labels = torch.cat([t["labels"] for t in targets])
        scores = torch.linspace(0.9, 0.8, len(labels))
        return dict(boxes=boxes, scores=scores, labels=labels, image=image)

    def detections(self, candidates, num_images, test):
        flat = {k: v[: len(v) // self.views] for k, v in candidates.items()}  # the first view's
        image = flat.pop("image")
        return split_images(flat, image, image.bincount(minlength=num_images).tolist())


@pytest.mark.parametrize("name", ["coco_tiny", "bccd", "synthetic"])
def test_ground_truth_as_detections_scores_one(name, request, tmp_path):
    if name == "synthetic":
        data = SyntheticDetection(8, 128)
    else:
        folder = request.getfixturevalue("detection_data") / name
        folder = request.getfixturevalue("few_real_images")(folder)
        data = opened(folder, train=False)[1]
    settings = small_settings(scales=(333,), test_scales=(333,), max_size=500)
    metrics = evaluate(Oracle(data, settings), data, settings, tmp_path)
    assert metrics["AP"] == pytest.approx(1.0, abs=1e-9), metrics
    assert (
        metrics["AP90"] == metrics["AP_small" if name != "bccd" else "AP_large"] == pytest.approx(1)
    )
    results = json.loads((tmp_path / "predictions.json").read_text())
    ids = {c["id"] for c in data.categories}
    assert {r["category_id"] for r in results} <= ids
    assert (tmp_path / "detections.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "metrics.json").read_text())["AP50"] == 1.0
    # And it is sharp: boxes off by two pixels must not score one.
    wrong = evaluate(Oracle(data, settings, 2.0), data, settings)
    assert wrong["AP"] < 0.97


def test_scales_are_merged_in_original_pixels():
    data = SyntheticDetection(4, 128)
    settings = small_settings(scales=(128,), test_scales=(64, 192), max_size=128)
    found = detect(Oracle(data, settings), data, settings)
    seen = {t["image_id"]: f for t, f in found}
    for i in range(4):
        want = data[i][1]["boxes"].as_subclass(torch.Tensor)
        torch.testing.assert_close(seen[i]["boxes"], want, atol=1e-3, rtol=0)


def test_several_scales_share_one_loader_that_reads_each_image_once(monkeypatch):
    data, opened_loaders, read = SyntheticDetection(4, 128), [], []
    settings = small_settings(test_scales=(32, 48, 64, 80, 96), test_flip=True)
    oracle, target = Oracle(data, settings), data[0][1]
    oracle.outputs = lambda images: dict(targets=[target] * len(images))  # mirrored or not
    make_loader, item = loader.DataLoader, SyntheticDetection.__getitem__

    def counted_loader(*args, **kwargs):
        opened_loaders.append(args)
        return make_loader(*args, **kwargs)

    def counted_item(self, index):
        read.append(index)
        return item(self, index)

    monkeypatch.setattr(loader, "DataLoader", counted_loader)
    monkeypatch.setattr(SyntheticDetection, "__getitem__", counted_item)
    assert len(list(detect(oracle, data, settings))) == 4
    assert len(opened_loaders) == 1 and sorted(read) == [0, 1, 2, 3]


def truth_of(boxes, difficult=(), crowd=()):
    annotations = [
        {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": b, "area": b[2] * b[3],
         "iscrowd": int(i in crowd), "difficult": int(i in difficult)}
        for i, b in enumerate(boxes)
    ]  # fmt: skip
    image = {"id": 1, "height": 100, "width": 100}
    return {"images": [image], "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}


def found(*boxes):
    return [
        {"image_id": 1, "category_id": 1, "bbox": b, "score": 0.9 - 0.1 * i}
        for i, b in enumerate(boxes)
    ]


def test_voc07_ap_by_hand():
    a, b, c = [0, 0, 20, 20], [50, 50, 20, 20], [0, 60, 20, 20]
    # hit, double, miss of b: precision 1 up to recall 1/2, so recalls 0 .. 0.5 are six of eleven
    assert voc07_ap(truth_of([a, b]), found(a, a)) == pytest.approx(6 / 11)
    # double first on a, then b: precisions 1, 1/2, 2/3
    assert voc07_ap(truth_of([a, b]), found(a, a, b)) == pytest.approx((6 + 5 * 2 / 3) / 11)
    # a difficult object counts neither as found nor as missed
    assert voc07_ap(truth_of([a, c], difficult={1}), found(c, a)) == pytest.approx(1)
    assert voc07_ap(truth_of([a]), []) == 0


def test_voc07_ap_does_not_depend_on_the_order_of_images():
    truth, a, b = truth_of([[0, 0, 20, 20]]), [0, 0, 20, 20], [50, 50, 20, 20]
    truth["images"].append({**truth["images"][0], "id": 2})
    results = [{**found(box)[0], "image_id": i} for i, box in ((1, a), (2, b))]  # equal scores
    assert voc07_ap(truth, results) == voc07_ap(truth, results[::-1])


def test_difficult_and_crowd_objects_are_ignored_by_the_evaluator():
    a, b = [0, 0, 20, 20], [50, 50, 20, 20]
    assert coco_metrics(truth_of([a, b], difficult={1}), found(b, a))["AP"] == pytest.approx(1)
    assert coco_metrics(truth_of([a, b], crowd={1}), found(b, a))["AP"] == pytest.approx(1)
    assert coco_metrics(truth_of([a, b]), found(a))["AP"] == pytest.approx(51 / 101)
    assert coco_metrics(truth_of([a, b]), [])["AP"] == 0
    per_class = coco_metrics(truth_of([a]), found(a))["per_class"]
    assert per_class == {"x": pytest.approx(1)}


def test_predict_files_refuses_and_draws(coco_dir, tmp_path):
    files = Files([coco_dir / "train2017"], [])
    assert [f.name for f in files.files] == ["5.png", "9.png"]
    with pytest.raises(BadInput, match=r"none\.jpg: cannot read the image"):
        Files([tmp_path / "none.jpg"], [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no image in this folder"):
        Files([tmp_path / "empty"], [])
    image = torch.zeros(3, 300, 300, dtype=torch.uint8)
    drawn = draw(image, torch.tensor([[10.0, 20, 200, 250]]), [0], ["x"], [0.9])
    assert drawn[:, 250, 100].sum() > 0 and drawn[:, 200, 100].sum() == 0
