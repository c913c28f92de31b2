"""Masks from annotation files to crops, through the transforms, and back to RLE and AP."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as rle

import d2det
from common import BadInput
from data import CocoDetection, Data, SyntheticDetection, load
from data.checks import check_coco
from data.contract import make_target
from data.masks import (
    crop_mask,
    decode_mask,
    encode_mask,
    paste_mask,
    run_lengths,
    usable_mask,
)
from data.transforms import TestImages, TrainingImages, as_transformed
from engine.detector import split_images
from engine.metrics import coco_metrics, evaluate
from engine.pictures import draw

BOX = torch.tensor([[10.0, 5, 30, 35]])  # of the L below
L_SHAPE = [10, 5, 20, 5, 20, 25, 30, 25, 30, 35, 10, 35]


def settings(**changes):
    small = dict(scales=(96,), test_scales=(96,), max_size=160, workers=0, eval_batch=2)
    return d2det.Settings().replace(**{**small, "masks": True, **changes})


def coco(segmentation, **changes):
    """An image of 40x60 (h x w) with one object."""
    image = {"id": 1, "file_name": "1.png", "height": 40, "width": 60}
    bbox = [10, 5, 20, 30]
    a = {"id": 3, "image_id": 1, "category_id": 1, "bbox": bbox, "segmentation": segmentation}
    objects = [{"iscrowd": 0, **a, **changes}]
    return {"images": [image], "annotations": objects, "categories": [{"id": 1, "name": "x"}]}


def l_shape():
    bitmap = torch.zeros(40, 60, dtype=torch.bool)
    bitmap[5:35, 10:20] = bitmap[25:35, 10:30] = True
    return bitmap


# ------------------------------------------------------------------------------ formats


@pytest.mark.parametrize("kind", ["polygon", "two polygons", "runs", "compressed", "bitmap"])
def test_every_format_gives_the_same_crop(kind):
    """20x30 px on 112x112 cells: the L is its left half and its lowest third."""
    uncompressed = {"size": [40, 60], "counts": run_lengths(encode_mask(l_shape())["counts"])}
    segmentation = {
        "polygon": [L_SHAPE],
        "two polygons": [[10, 5, 20, 5, 20, 35, 10, 35], [15, 25, 30, 25, 30, 35, 15, 35], [1, 2]],
        "runs": uncompressed,
        "compressed": encode_mask(l_shape()),
    }
    if kind == "bitmap":
        target = dict(boxes=BOX, masks=l_shape()[None])
        crop = as_transformed(target, (40, 60))["masks"][0]
    else:
        check_coco(coco(segmentation[kind]), masks=True)
        crop = crop_mask(usable_mask({"segmentation": segmentation[kind]}, BOX[0].tolist()), BOX[0])
    want = torch.zeros(112, 112, dtype=torch.bool)
    want[:, :56] = want[75:] = True  # 112 * 2 / 3 = 74.7
    assert crop.dtype == torch.bool and crop.shape == (112, 112)
    assert (crop != want).sum() <= 56  # where a side falls between two cells
    assert torch.equal(paste_mask(crop, BOX[0], (40, 60)), l_shape())
    assert rle.area(encode_mask(l_shape())) == 10 * 30 + 10 * 10


@pytest.mark.parametrize("counts", [[0, 5, 700, 3, 1692], [2400], [1, 2399], [40, 100000, 3]])
def test_compressed_runs_are_read_as_pycocotools_writes_them(counts):
    side = sum(counts)
    written = rle.frPyObjects({"size": [side, 1], "counts": counts}, side, 1)["counts"].decode()
    assert run_lengths(written) == counts


@pytest.mark.parametrize(
    "segmentation, message",
    [
        ([[1, 2, 3]], "annotation 3: a polygon is .1, 2, 3., not x, y, x, y"),
        ([[1, 2, 3, 4, 5, "6"]], "a polygon is"),
        ([7, 8], "a polygon is 7"),
        ("mask.png", "neither polygons nor RLE"),
        ({"size": [60, 40], "counts": [2400]}, r"RLE of size \[60, 40\], its image is 40x60 px"),
        ({"size": [40, 60], "counts": [1200]}, "counts do not fill its image"),
        ({"size": [40, 60], "counts": [-1, 2401]}, "RLE with counts"),
        ({"size": [40, 60], "counts": ""}, "counts do not fill"),
        ({"size": [40, 60], "counts": "~~"}, "counts do not fill"),
        ({"size": [40, 60], "counts": "P[2P"}, "RLE with counts P"),  # ends in the middle of a run
        (None, "no masks .segmentation., which --masks needs"),
        ([], "no masks"),
    ],
)
def test_what_is_no_mask_is_refused_by_name(segmentation, message):
    with pytest.raises(ValueError, match=message):
        check_coco(coco(segmentation), masks=True)
    check_coco(coco(segmentation))  # nobody asked for masks


@pytest.fixture
def folder(tmp_path):
    """The L, the same as a crowd, and five objects whose masks are none."""
    data = coco([L_SHAPE])
    good = data["annotations"][0]
    for wrong in ([[10, 5, 30, 35]], [[40, 5, 50, 5, 50, 30]], [[10, 5, math.nan, 5, 20, 1e9]], []):
        data["annotations"].append({**good, "id": 10, "segmentation": wrong})
    nothing = encode_mask(torch.zeros(40, 60, dtype=torch.bool))
    data["annotations"].append({**good, "id": 10, "segmentation": nothing})
    crowd = {"iscrowd": 1, "segmentation": encode_mask(l_shape()), "id": 11}
    data["annotations"].append({**good, **crowd})
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").mkdir()
        Image.new("RGB", (60, 40)).save(tmp_path / f"{split}2017" / "1.png")
        file = tmp_path / "annotations" / f"instances_{split}2017.json"
        file.write_text(json.dumps(data))
    return tmp_path


def test_objects_without_a_usable_mask_are_dropped_and_counted(folder):
    data, _ = load(Data(data=str(folder)), masks=True)
    assert "dropped 5 of 7 boxes" in data.note and "no mask in it" in data.note
    target = data[0][1]
    assert target["masks"].shape == (2, 112, 112) and target["ignore"].tolist() == [False, True]
    assert torch.equal(target["masks"][0], target["masks"][1])
    plain, _ = load(Data(data=str(folder)))
    assert len(plain[0][1]["boxes"]) == 7 and "masks" not in plain[0][1]
    assert plain.fingerprint() != data.fingerprint()
    assert len(data.coco()["annotations"]) == 2


@pytest.mark.parametrize("kind", ["iscrowd", "difficult"])
def test_ignored_objects_need_no_mask(tmp_path, kind):
    """In place of one that is missing, or cannot be used, stands the whole box."""
    data = coco([L_SHAPE])
    far = {**data["annotations"][0], "bbox": [40, 0, 10, 10], kind: 1}
    del far["segmentation"]
    data["annotations"] += [far, {**far, "id": 4, "segmentation": [[40, 5, 50, 5]]}]
    Image.new("RGB", (60, 40)).save(tmp_path / "1.png")
    (tmp_path / "a.json").write_text(json.dumps(data))
    found = CocoDetection(tmp_path / "a.json", tmp_path, masks=True)
    target = found[0][1]
    assert target["ignore"].tolist() == [False, True, True] and target["masks"][1:].all()
    # a detection in the box is no false positive, though it scores higher than the one that hits
    near = torch.zeros(40, 60, dtype=torch.bool)
    near[:10, 40:50] = True
    results = [
        {"image_id": 1, "category_id": 1, "segmentation": encode_mask(m), "mask_score": score}
        for m, score in ((near, 0.9), (l_shape(), 0.4))
    ]
    assert coco_metrics(found.coco(), results, masks=True)["AP"] == pytest.approx(1)
    results[0]["segmentation"] = encode_mask(l_shape().flip(0, 1))  # where nothing is
    assert coco_metrics(found.coco(), results, masks=True)["AP"] < 0.6


def test_a_mask_that_loses_a_polygon_is_counted(tmp_path):
    data = coco([L_SHAPE, [1, 2, 3, 4]])
    data["annotations"].append({**data["annotations"][0], "id": 4, "segmentation": [L_SHAPE]})
    (tmp_path / "a.json").write_text(json.dumps(data))
    found = CocoDetection(tmp_path / "a.json", tmp_path, masks=True)
    assert not found.dropped and "a.json: broken polygons left out of 1 masks" in found.note


def test_a_mask_that_covers_nothing_of_its_box_is_ignored(tmp_path):
    """A line; and a frame around the box, whose corners are those of the box."""
    frame = [0, 0, 40, 0, 40, 40, 38, 40, 38, 2, 2, 2, 2, 40, 0, 40]
    data = coco([[10, 5, 20, 20, 30, 35]])
    data["annotations"].append({**data["annotations"][0], "id": 4, "segmentation": [frame]})
    data["annotations"].append({**data["annotations"][0], "id": 5, "segmentation": [L_SHAPE]})
    Image.new("RGB", (60, 40)).save(tmp_path / "1.png")
    (tmp_path / "a.json").write_text(json.dumps(data))
    found = CocoDetection(tmp_path / "a.json", tmp_path, masks=True)[0][1]
    assert found["ignore"].tolist() == [True, True, False]
    assert found["masks"].flatten(1).any(1).tolist() == [False, False, True]


def test_masks_of_data_with_difficult_objects_are_scored():
    """VOC's metric, which these marks ask for, is of boxes."""
    truth = coco(encode_mask(l_shape()), difficult=0)
    result = {"image_id": 1, "category_id": 1, "bbox": [10, 5, 20, 30], "score": 0.5}
    result |= {"segmentation": encode_mask(l_shape()), "mask_score": 0.4}
    scored = coco_metrics(truth, [result], masks=True)
    assert scored["AP"] == pytest.approx(1) and "voc07_AP50" not in scored
    assert coco_metrics(truth, [result])["voc07_AP50"] == 1


def test_data_without_masks_is_refused(folder, detection_data, tmp_path):
    with pytest.raises(BadInput, match=r"bccd/.*\.txt: its objects have no masks .*--masks"):
        load(Data(data=str(detection_data / "bccd")), masks=True)


# ------------------------------------------------------------------------------ resizing


class Oracle(torch.nn.Module):
    """Answers with the ground truth as it comes out of the resizing, its masks through `change`."""

    def __init__(self, data, settings, change):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))  # says which device it is on
        d = settings.data
        views = TestImages(data, settings.test.test_scales, d.max_size, d.scales)
        seen = [view for i in range(len(data)) for view in views[i]]
        self.truth = {image.numpy().tobytes(): target for image, target in seen}
        self.change = change

    def outputs(self, images):
        return dict(targets=[self.truth[image.numpy().tobytes()] for image in images])

    def candidates(self, outputs, test):
        targets = outputs["targets"]
        image = torch.cat([torch.full_like(t["labels"], i) for i, t in enumerate(targets)])
        boxes, labels = (torch.cat([t[k] for t in targets]) for k in ("boxes", "labels"))
        masks = torch.cat([self.change(t) for t in targets])
        scores = torch.linspace(0.9, 0.8, len(labels))
        return dict(boxes=boxes, labels=labels, image=image, scores=scores, masks=masks)

    def detections(self, candidates, num_images, test):
        flat = {**candidates, "mask_scores": candidates["scores"]}
        image = flat.pop("image")
        return split_images(flat, image, image.bincount(minlength=num_images).tolist())


def whole(target):
    return target["masks"].float()


def through_28(target):
    return d2det.mask_targets(target["boxes"], target["boxes"], target["masks"])[0]


def softly_through_28(target):  # shares of the cells, as probabilities may be
    return F.adaptive_avg_pool2d(target["masks"].float(), 28)


def half_a_pixel_off(target):
    boxes = target["boxes"]
    return d2det.mask_targets(boxes + 0.5, boxes, target["masks"], 112)[0]


@pytest.mark.parametrize("name", ["synthetic", "coco_tiny"])
def test_ground_truth_as_detections_scores_one(name, request, tmp_path):
    if name == "synthetic":
        config = settings(scales=(256,), test_scales=(256,), max_size=256)
        data = SyntheticDetection(8, 256, masks=True)
    else:
        source = request.getfixturevalue("detection_data") / name
        truth = json.loads((source / "annotations/instances_val2017.json").read_text())
        truth["images"] = truth["images"][:8]
        ids = {image["id"] for image in truth["images"]}
        truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] in ids]
        (tmp_path / "few.json").write_text(json.dumps(truth))
        files = dict(val_json=f"{tmp_path}/few.json", val_images=f"{source}/val2017")
        config = settings(**files, scales=(333,), test_scales=(333,), max_size=500)
        data = load(config.data, masks=True, train=False)[1]

    def score(change, out=None):
        return evaluate(Oracle(data, config, change), data, config, out)

    metrics = score(whole, tmp_path)
    assert metrics["AP"] == 1 and metrics["mask_AP_large"] == pytest.approx(1)
    assert metrics["mask_AP"] > (0.9999 if name == "synthetic" else 0.997)
    written = json.loads((tmp_path / "predictions.json").read_text())
    assert all({"bbox", "score", "segmentation", "mask_score"} <= set(r) for r in written)
    assert json.loads((tmp_path / "metrics.json").read_text())["mask_AP50"] == 1
    if name == "coco_tiny":
        return
    coarse = score(through_28)  # 28 cells a side miss some objects at IoU 0.95, none at 0.75
    assert coarse["mask_AP75"] == pytest.approx(1) and 0.98 > coarse["mask_AP"] > 0.9
    assert score(softly_through_28)["mask_AP"] > 0.97
    assert score(half_a_pixel_off)["mask_AP"] < min(0.92, coarse["mask_AP"])
    assert score(lambda target: whole(target).flip(-1))["mask_AP"] < 0.6


def test_crops_are_flipped_and_resizing_leaves_them():
    target = make_target(BOX, [0], [False], 0, (40, 60)) | {"masks": l_shape()[None]}
    image = (l_shape() * 255).byte().expand(3, -1, -1)
    seen, target = TrainingImages([(image, target)], (80,), 120, flip=1.0, seed=0)[0, 0]
    assert type(target["masks"]) is torch.Tensor and target["boxes"].tolist() == [[60, 10, 100, 70]]
    pasted = paste_mask(target["masks"][0], target["boxes"][0], seen.shape[1:])
    assert (pasted != (seen[0] > 127)).sum() < 20  # of 1600 px; the image is interpolated


def test_pasting_by_hand():
    mask, box = torch.tensor([[1.0, 0], [1, 1]]), torch.tensor([-2.0, 1, 6, 9])
    bitmap = paste_mask(mask, box, (6, 8))
    # cells of 4x4 px, centred at x 0, 4 and y 3, 7; rows over y 3 are row 0: left of x = 2
    # at y = 4.5 the value is 1 - 0.625 u, u of the way from x = 0 to 4: over 0.5 until x = 3.2
    assert bitmap.sum(1).tolist() == [0, 2, 2, 2, 3, 6] and bitmap[5].tolist()[:6] == [True] * 6
    assert paste_mask(mask, torch.tensor([3.1, 3.1, 3.2, 3.2]), (6, 8)).sum() == 0
    assert paste_mask(mask, torch.tensor([7.0, 5, 7, 5]), (6, 8)).shape == (6, 8)


# ------------------------------------------------------------------------------ evaluation


def test_more_detections_and_other_areas_count_as_asked():
    """Two objects and their masks; the first two of three detections are wrong."""
    data = coco([L_SHAPE], area=400)
    far = [40, 0, 50, 0, 50, 10, 40, 10]
    boxes, masks = ([40, 0, 10, 10],) * 2 + ([10, 5, 20, 30],), (far, far, L_SHAPE)
    results = [
        {"image_id": 1, "category_id": 1, "bbox": b, "score": 0.9 - 0.1 * i, "mask_score": 0.1 * i,
         "segmentation": encode_mask(decode_mask(rle.merge(rle.frPyObjects([m], 40, 60))))}
        for i, (b, m) in enumerate(zip(boxes, masks))
    ]  # fmt: skip
    boxes = coco_metrics(data, results)
    assert boxes["AP"] == pytest.approx(1 / 3) and boxes["AR1"] == 0 and boxes["AR100"] == 1
    masked = coco_metrics(data, results, masks=True)  # by the mask's own score
    assert masked["AP"] == pytest.approx(1)
    few = coco_metrics(data, results, detections=(1, 2), sides=(10, 15, 30))
    assert few["AP"] == 0 == few["AR2"] and few["AP_small"] is None and few["AP_medium"] == 0
    assert coco_metrics(data, results, detections=(1, 10, 1000))["AR1000"] == 1


def test_pictures_tell_objects_of_a_class_apart():
    image = torch.zeros(3, 200, 300, dtype=torch.uint8)
    masks = torch.zeros(2, 200, 300, dtype=torch.bool)
    masks[0, 60:150, 20:120], masks[1, 60:150, 160:280] = True, True
    boxes = torch.tensor([[20.0, 60, 120, 150], [160, 60, 280, 150]])
    seen = draw(image, boxes, [0, 0], ["x"], masks=iter(masks))
    assert (seen[:, 120, 70] != seen[:, 120, 220]).any() and seen[:, 120, 70].sum() > 0
    assert seen[:, 180, 70].sum() == 0 and image.sum() == 0
