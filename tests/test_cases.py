"""Faults and oddities of annotations and photos, one test a kind: read, said aloud, or refused."""

import unicodedata

import numpy as np
import pytest
from PIL import Image
from test_layouts import BOX, HEIGHT, NAMES, WIDTH, coco, photo, voc_xml, write

from common import BadInput
from data import CocoDetection, Data, load
from data.checks import broken_images, check_images
from data.images import orientation, read_image


@pytest.fixture
def folder(tmp_path):
    """Four images a.png to d.png for the annotations that `opened` writes beside them."""
    for stem in "abcd":
        photo(tmp_path / f"{stem}.png")
    return tmp_path


def files() -> dict:
    return coco(["a.png", "b.png", "c.png", "d.png"])


def opened(folder, annotations, **how) -> CocoDetection:
    """Train on annotations, and evaluate on them too: the training set, all images looked at."""
    write(folder / "a.json", annotations)
    return pair(folder, "a.json", "a.json", **how)[0]


def pair(folder, train: str, val: str, masks=False, **settings):
    paths = {"train_json": folder / train, "val_json": folder / val}
    paths |= {"train_images": folder, "val_images": folder}
    data = Data(**{k: str(v) for k, v in paths.items()}, **settings)
    sets = load(data, masks=masks)
    for one in sets:
        check_images(one)
    return sets


# ------------------------------------------------------------------------------ encodings, names


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_json_in_any_unicode(folder, encoding):
    text = '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "größe 日本"}]}'
    write(folder / "a.json", text, encoding)
    assert CocoDetection(folder / "a.json", folder).categories[0]["name"] == "größe 日本"


def test_json_in_a_local_encoding_is_refused(folder):
    write(folder / "a.json", '{"images": "größe"}', "latin-1")
    with pytest.raises(BadInput, match="a.json: broken JSON: neither UTF-8 nor UTF-16"):
        CocoDetection(folder / "a.json", folder)


@pytest.mark.parametrize("encoding", "gb2312 gbk utf-8 utf-8-sig utf-16 iso-8859-1".split())
def test_xml_as_it_declares(tmp_path, encoding):
    name, declared = "größe" if "iso" in encoding else "红色", encoding.removesuffix("-sig")
    text = f'<?xml version="1.0" encoding="{declared}"?>\n{voc_xml(name)}'
    for stem in "ab":
        photo(tmp_path / f"{stem}.jpg")
        write(tmp_path / f"{stem}.xml", text, encoding)
    assert load(Data(data=str(tmp_path)))[0].categories[0]["name"] == name


def test_an_encoding_that_nobody_knows_is_refused(tmp_path):
    photo(tmp_path / "a.jpg")
    write(tmp_path / "a.xml", f'<?xml version="1.0" encoding="klingon"?>{voc_xml()}')
    with pytest.raises(BadInput, match="a.xml: broken VOC annotation: unknown encoding: klingon"):
        load(Data(data=str(tmp_path)), val=False)


@pytest.mark.parametrize(
    "named, on_disk",
    [
        ("my%20photo.png", "my photo.png"),
        ("my%20photo.png", "my%20photo.png"),
        ("sub\\e.png", "sub/e.png"),
        (unicodedata.normalize("NFC", "größe.png"), unicodedata.normalize("NFD", "größe.png")),
        (unicodedata.normalize("NFD", "größe.png"), unicodedata.normalize("NFC", "größe.png")),
        ("/data/upload/e.png", "e.png"),
    ],
)
def test_files_are_found_by_the_names_that_were_meant(folder, named, on_disk):
    photo(folder / on_disk)
    assert len(opened(folder, coco(["a.png", named]))) == 2


def test_lvis_names_its_files_by_their_url(folder):
    annotations = files()
    for image in annotations["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/train2017/{image.pop('file_name')}"
    assert opened(folder, annotations).files[0] == str(folder / "a.png")


# ------------------------------------------------------------------------------ odd values


@pytest.mark.parametrize("value", [None, 0.0, "Unspecified"])
@pytest.mark.parametrize("key", ["iscrowd", "difficult", "segmentation", "area"])
def test_what_is_absent_is_absent(folder, key, value):
    annotations = files()
    if not (key in ("segmentation", "area") and value is not None):
        annotations["annotations"][0][key] = value
    assert not opened(folder, annotations)[0][1]["ignore"].any()


def test_a_file_without_annotations_is_one_of_null(folder):
    write(folder / "train.json", files())
    write(folder / "val.json", files() | {"annotations": None})
    assert pair(folder, "train.json", "val.json")[1].num_boxes == 0


@pytest.mark.parametrize("size", [{}, {"height": 0, "width": 0}, {"height": None}, {"width": 60.0}])
def test_sizes_come_from_the_file_where_they_are_missing(folder, size):
    annotations = files()
    for image in annotations["images"]:
        del image["height"], image["width"]
        image.update(size)
    data = opened(folder, annotations)
    assert data.sizes.tolist() == [[HEIGHT, WIDTH]] * 4
    assert data.coco()["images"][0] | {"height": HEIGHT, "width": WIDTH} == data.coco()["images"][0]


@pytest.mark.parametrize("size", [(WIDTH, HEIGHT), ("60.0", "40.0"), (0, 0), ("", "Unspecified")])
@pytest.mark.parametrize("difficult", ["", "0.0", "Unspecified"])
def test_voc_sizes_and_marks_may_be_odd(tmp_path, size, difficult):
    for stem in "ab":
        photo(tmp_path / f"{stem}.jpg")
        mark = f"<difficult>{difficult}</difficult>"
        write(tmp_path / f"{stem}.xml", voc_xml(" cat ", size, mark))
    data, _ = load(Data(data=str(tmp_path)))
    assert data.sizes.tolist() == [[HEIGHT, WIDTH]] and data.categories[0]["name"] == "cat"
    assert not data[0][1]["ignore"].any()


def test_whole_floats_are_whole_numbers(folder):
    annotations = files()
    for i, annotation in enumerate(annotations["annotations"]):
        annotation.update(iscrowd=0.0, image_id=float(i), category_id=1.0)
    annotations["images"][0] |= {"id": 0.0, "height": 40.0}
    assert opened(folder, annotations).image_ids == [0, 1, 2, 3]


@pytest.mark.parametrize("shape", ["pairs", "flat", "floats"])
def test_masks_of_other_shapes_are_read(folder, shape):
    ring = [10.0, 5.0, 30.0, 5.0, 30.0, 35.0, 10.0, 35.0]
    runs = [10 * HEIGHT + 5, *([30, 10] * 20)]
    runs.append(WIDTH * HEIGHT - sum(runs))
    as_pairs = [list(point) for point in zip(ring[0::2], ring[1::2])]
    rle = {"size": [40.0, 60.0], "counts": [float(n) for n in runs]}
    mask = {"pairs": [as_pairs], "flat": ring, "floats": rle}[shape]
    data = opened(folder, coco(["a.png", "b.png"], segmentation=mask), masks=True)
    assert data[0][1]["masks"].all()


def test_names_are_stripped(folder):
    data = opened(folder, coco(["a.png", "b.png"], [" cat\n", "dog"]))
    assert (
        [c["name"] for c in data.categories]
        == NAMES
        == [c["name"] for c in data.coco()["categories"]]
    )


# ------------------------------------------------------------------------------ categories


def test_a_validation_set_is_matched_by_the_names_of_its_classes(folder):
    write(folder / "train.json", files())
    only_dogs = coco(["a.png"], ["dog"], first_id=7)
    only_dogs["categories"].append({"id": 8, "name": "a class without boxes"})
    write(folder / "val.json", only_dogs)
    train, val = pair(folder, "train.json", "val.json")
    assert val.categories == train.categories and val[0][1]["labels"].tolist() == [1]
    assert "categories matched by name; without cat" in val.note
    assert val.coco()["categories"] == train.categories
    assert [a["category_id"] for a in val.coco()["annotations"]] == [2]
    write(folder / "val.json", coco(["a.png"], ["cow"]))
    with pytest.raises(BadInput, match="val.json: unknown category cow: the model has cat, dog"):
        pair(folder, "train.json", "val.json")
    write(folder / "val.json", coco(["a.png"], ["dog", "dog"]))
    with pytest.raises(BadInput, match="cannot be matched by name"):
        pair(folder, "train.json", "val.json")


# ------------------------------------------------------------------------------ said aloud


def said(folder, change, match: str) -> None:
    annotations = files()
    for annotation, image in zip(annotations["annotations"], annotations["images"]):
        change(annotation, image)
    assert match in opened(folder, annotations).note


def test_what_looks_wrong_is_said_once_with_the_likely_reason(folder):
    x, y, w, h = BOX
    said(folder, lambda a, _: a.update(bbox=[31, 21, 59, 39]), "are they x1, y1, x2, y2?")
    said(folder, lambda a, _: a.update(bbox=[30, 20, 10, 90]), "images of another size?")
    said(folder, lambda a, _: a.update(bbox=[0.2, 0.1, 0.3, 0.7]), "shares of its size (0..1)?")
    said(folder, lambda a, _: a.update(image_id=0), "3 of 4 images are without an object")
    twice = coco(["a.png", "b.png"], ["cat", "cat"])
    assert "several categories of one name (cat)" in opened(folder, twice).note
    train, val = pair(folder, "a.json", "a.json")
    assert "several" in train.note and "several" not in val.note
    assert "2 images of 2 also in the training set" in val.note


@pytest.mark.parametrize("mark", ["iscrowd", "difficult"])
def test_nothing_but_ignored_objects_is_refused(folder, mark):
    with pytest.raises(BadInput, match="a.json: nothing to train on: all 2 objects are crowds or"):
        opened(folder, coco(["a.png", "b.png"], **{mark: 1}))


def test_nothing_but_broken_boxes_is_refused(folder):
    annotations = coco(["a.png", "b.png"], bbox=[30, 5, -20, 9])
    annotations["annotations"].append({**annotations["annotations"][0], "bbox": [70, 5, 9, 9]})
    with pytest.raises(BadInput, match="all 3 boxes are broken") as e:
        opened(folder, annotations)
    assert "2 with a width or height of 0 or less, 1 outside the image" in str(e.value)
    assert "are their corners swapped?" in str(e.value)


def test_a_rotated_box_is_refused_by_its_name(tmp_path):
    photo(tmp_path / "a.jpg")
    write(tmp_path / "a.xml", voc_xml().replace("bndbox", "robndbox"))
    with pytest.raises(BadInput, match="a.xml: .*cat has a rotated box"):
        load(Data(data=str(tmp_path)), val=False)


def test_truth_ends_at_the_border_for_scoring_too(folder):
    data = opened(folder, coco(["a.png", "b.png"], bbox=[-12.5, -3, 90, 20], area=1800))
    assert data[0][1]["boxes"].tolist() == [[0, 0, WIDTH, 17]]
    truth = data.coco()["annotations"][0]
    assert truth["bbox"] == [0, 0, WIDTH, 17] and truth["area"] == WIDTH * 17


# ------------------------------------------------------------------------------ photos


def turned(folder, name: str, value: int, size=(WIDTH, HEIGHT)):
    exif = Image.Exif()
    exif[0x0112] = value
    photo(folder / name, size, exif=exif)
    assert orientation(folder / name) == value


def photos(folder, sizes: str, **settings) -> CocoDetection:
    """b.jpg, whose EXIF data turn it, annotated with the sizes "as stored" or "as turned"."""
    annotations = coco(["a.jpg", "b.jpg"], bbox=[0, 0, 10, 10])
    if sizes == "as turned":
        annotations["images"][1].update(height=WIDTH, width=HEIGHT)
    photo(folder / "a.jpg")
    return opened(folder, annotations, **settings)


def test_photos_are_turned_if_their_annotated_sizes_are(tmp_path):
    turned(tmp_path, "b.jpg", 6)
    data = photos(tmp_path, "as turned")
    raw = read_image(tmp_path / "b.jpg")
    assert data.upright and np.array_equal(data[1][0], raw.transpose(1, 2).flip(2))
    assert "1 photo turned upright" in data.note
    stored = photos(tmp_path, "as stored")
    assert not stored.upright and np.array_equal(stored[1][0], raw) and not stored.note
    assert stored.fingerprint() != data.fingerprint()
    with pytest.raises(BadInput, match=r"b\.jpg: is 40x60 .* EXIF .*--upright yes"):
        photos(tmp_path, "as turned", upright="no")
    with pytest.raises(BadInput, match=r"b\.jpg: is 60x40 .* EXIF .*--upright no"):
        photos(tmp_path, "as stored", upright="yes")


@pytest.mark.parametrize("value", [2, 3, 4])
def test_where_sizes_cannot_tell_the_flag_decides(tmp_path, value):
    turned(tmp_path, "b.jpg", value)
    data = photos(tmp_path, "as stored")
    assert not data.upright and "1 photo with an EXIF turn" in data.note
    assert "--upright yes" in data.note
    asked = photos(tmp_path, "as stored", upright="yes")
    assert asked.upright and not np.array_equal(asked[1][0], data[1][0])
    assert not photos(tmp_path, "as stored", upright="no").note


def test_yolo_photos_are_upright(tmp_path):
    for stem in "ab":
        turned(tmp_path / "images", f"{stem}.jpg", 8)
        write(tmp_path / f"labels/{stem}.txt", "0 .5 .5 .5 .5")
    data, _ = load(Data(data=str(tmp_path)))
    assert data.upright and data.sizes.tolist() == [[WIDTH, HEIGHT]]
    assert data[0][1]["boxes"].tolist() == [[10, 15, 30, 45]] and data[0][0].shape[1:] == (60, 40)
    data, _ = load(Data(data=str(tmp_path), upright="no"))
    assert data.sizes.tolist() == [[HEIGHT, WIDTH]]


def test_thin_jpegs_gifs_and_jfifs_are_read(tmp_path):
    photo(tmp_path / "thin.jpg", (5, 300)), photo(tmp_path / "a.gif")
    photo(tmp_path / "b.jpg"), (tmp_path / "b.jpg").rename(tmp_path / "b.jfif")
    assert not broken_images(sorted(tmp_path.iterdir()))
    assert read_image(tmp_path / "thin.jpg").shape == (3, 300, 5)


def test_the_largest_image_is_a_setting(folder, monkeypatch):
    with pytest.raises(BadInput, match="a.png: .* 2400 pixels; --max-pixels 2400 would read it"):
        opened(folder, files(), max_pixels=2399)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # PIL refuses twice as many
    assert len(opened(folder, files(), max_pixels=2400)[0][0]) == 3
    assert Image.MAX_IMAGE_PIXELS == 1000
