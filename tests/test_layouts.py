"""Folders as labelling tools export them: each is found by looking, or refused with advice."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import BadInput
from data import Data, load
from data.checks import check_images
from data.files import describe, split_in
from data.own import CheckedItems
from data.yolo import read_yaml

WIDTH, HEIGHT = 60, 40
BOX = [10, 5, 20, 30]  # x, y, width, height: one object in each image
NAMES = ["cat", "dog"]


def photo(path: Path, size=(WIDTH, HEIGHT), **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 255, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)


def write(path: Path, content, encoding="utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(text.encode(encoding))


def coco(files, names=NAMES, first_id=1, **of_object) -> dict:
    """COCO annotations of these files, with an object each, of the classes in turn."""
    images, annotations = [], []
    for i, file in enumerate(files):
        images.append({"id": i, "file_name": file, "height": HEIGHT, "width": WIDTH})
        category = first_id + i % len(names)
        objects = {"image_id": i, "category_id": category, "bbox": BOX, "iscrowd": 0}
        annotations.append({"id": i + 1, **objects, **of_object})
    categories = [{"id": i, "name": name} for i, name in enumerate(names, first_id)]
    return {"images": images, "annotations": annotations, "categories": categories}


def voc_xml(name="cat", size=(WIDTH, HEIGHT), more="", box=(11, 6, 30, 35)) -> str:
    sides = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("width", "height"), size))
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
    return (
        f"<annotation><size>{sides}</size><object><name>{name}</name>{more}"
        f"<bndbox>{corners}</bndbox></object></annotation>"
    )


def both(folder, **settings):
    """The sets of a folder, with every image looked at, and every item checked."""
    sets = load(Data(data=str(folder), **settings))
    for data in sets:
        check_images(data)
        items = CheckedItems(data)
        assert len([items[i] for i in range(len(items))]) == len(data)
    return sets


def expect(sets, num_train: int, num_val: int, names=NAMES) -> None:
    assert [len(data) for data in sets] == [num_train, num_val]
    x, y, w, h = BOX
    for data in sets:
        assert [c["name"] for c in data.categories] == names
        boxes = [data[i][1]["boxes"].tolist() for i in range(len(data))]
        np.testing.assert_allclose(boxes, [[[x, y, x + w, y + h]]] * len(data), atol=1e-4)
        assert len(data.coco()["annotations"]) == len(data)


# ------------------------------------------------------------------------------ COCO


def test_roboflow_and_its_category_without_boxes(tmp_path):
    for split, files in {"train": "abc", "valid": "de", "test": "f"}.items():
        annotations = coco([f"{f}.jpg" for f in files])
        annotations["categories"].insert(0, {"id": 0, "name": "animals"})
        write(tmp_path / split / "_annotations.coco.json", annotations)
        for f in files:
            photo(tmp_path / split / f"{f}.jpg")
    sets = both(tmp_path)
    expect(sets, 3, 2, ["animals", *NAMES])
    assert "no box to train on of: animals" in sets[0].note and "animals" not in sets[1].note
    assert len(both(tmp_path, val_split="test")[1]) == 1


@pytest.mark.parametrize(
    "json_file, image, named",
    [
        ("annotations/instances_default.json", "images/default/{}.jpg", "{}.jpg"),  # CVAT
        ("annotations/instances_default.json", "images/{}.jpg", "{}.jpg"),
        ("result.json", "images/{}.jpg", "images/{}.jpg"),  # Label Studio
        ("result.json", "images/{}.jpg", "C:\\work\\upload\\{}.jpg"),
        ("my labels.json", "{}.jpg", "{}.jpg"),
        ("export/labels.json", "export/data/{}.jpg", "{}.jpg"),  # in a folder of its own
    ],
)
def test_one_coco_file_is_split_by_the_seed(tmp_path, json_file, image, named):
    write(tmp_path / json_file, coco([named.format(i) for i in range(10)]))
    for i in range(10):
        photo(tmp_path / image.format(i))
    sets = both(tmp_path)
    expect(sets, 8, 2)
    assert "one set and no split: 2 images held out" in sets[1].note
    assert not set(sets[0].image_ids) & set(sets[1].image_ids)
    ids = lambda **how: load(Data(data=str(tmp_path)), **how)[1].image_ids  # noqa: E731
    assert ids(train=False) == ids() == sets[1].image_ids
    assert load(Data(data=str(tmp_path)), val=False)[0].image_ids == sets[0].image_ids
    assert len({tuple(ids(seed=seed)) for seed in range(5)}) > 1
    assert len(both(tmp_path, val_share=0.5)[1]) == 5


def test_coco_under_other_names(tmp_path):
    for split in ("train", "val"):
        write(tmp_path / f"annotations/{split}.json", coco(["a.png", "b.png"]))
        for stem in "ab":
            photo(tmp_path / f"images/{split}/{stem}.png")
    sets = both(tmp_path)
    expect(sets, 2, 2)
    assert "/images/val/a.png" in sets[1].files[0]  # not train's, which has the same name


def test_coco_with_nothing_to_train_on_still_evaluates(tmp_path):
    write(tmp_path / "val.json", coco(["a.png", "b.png"]))
    photo(tmp_path / "a.png"), photo(tmp_path / "b.png")
    assert len(load(Data(data=str(tmp_path)), train=False)[1]) == 2
    with pytest.raises(BadInput, match="val.json: there is no set to train on"):
        load(Data(data=str(tmp_path)))


def test_several_coco_files_of_one_split_are_the_users_choice(tmp_path):
    write(tmp_path / "a.json", coco(["a.png"])), write(tmp_path / "b.json", coco(["a.png"]))
    with pytest.raises(BadInput, match=r"\(a.json, b.json\): choose with --train-json"):
        load(Data(data=str(tmp_path)))


# ------------------------------------------------------------------------------ YOLO

LABELS = {"box": "0.333333333 0.5 0.333333333 0.75", "polygon": "{0} {1} {2} {1} {2} {3} {0} {3}"}
LABELS["polygon"] = LABELS["polygon"].format(10 / 60, 5 / 40, 30 / 60, 35 / 40)
YAMLS = [
    "path: ../datasets/pets  # where it was\ntrain: images/train\nval: images/val\nnc: 2\n"
    "names: ['cat', \"dog\"]\n",
    "train: ../images/train\nval: [../images/val]\ntest:\n\nnames:\n  0: cat\n  1: 'dog'\n",
    "names:\n- cat\n- dog\nval: /content/pets/images/val\ntrain: /content/pets/images/train\n",
    "names: {0: cat, 1: dog}\ntrain: images/train\nval: val.txt\n",
    "names: [cat,\n  dog]\ntrain: train.txt\nval: images/val",
    None,
]


@pytest.mark.parametrize("yaml", YAMLS)
@pytest.mark.parametrize("kind", ["box", "polygon"])
def test_yolo(tmp_path, yaml, kind):
    for split, stems in {"train": "abc", "val": "de"}.items():
        for i, stem in enumerate(stems):
            photo(tmp_path / f"images/{split}/{stem}.jpg")
            write(tmp_path / f"labels/{split}/{stem}.txt", f"{i % 2} {LABELS[kind]}\n\n")
        listed = "\n".join(f"./images/{split}/{stem}.jpg" for stem in stems)
        write(tmp_path / f"{split}.txt", listed)
    if yaml is None:
        write(tmp_path / "classes.txt", "cat\ndog\n")
    else:
        write(tmp_path / "data.yaml", yaml)
    expect(both(tmp_path), 3, 2)
    if yaml is not None:
        assert len(load(Data(data=str(tmp_path / "data.yaml")))[0]) == 3
    if kind == "polygon":
        assert load(Data(data=str(tmp_path)), masks=True)[0][0][1]["masks"].float().mean() > 0.9


@pytest.mark.parametrize("labels", ["labels", "images"])
def test_yolo_without_a_split_or_names(tmp_path, labels):
    for stem in range(5):
        photo(tmp_path / f"images/{stem}.jpg")
        write(tmp_path / f"{labels}/{stem}.txt", f"{stem % 2} {LABELS['box']}")
    photo(tmp_path / "images/none.jpg")  # without a label file: no objects
    train, val = both(tmp_path)
    assert len(train) + len(val) == 6 and train.num_boxes + val.num_boxes == 5
    assert [c["name"] for c in train.categories] == ["0", "1"]


@pytest.mark.parametrize(
    "line, message",
    [("2 .5 .5 .1 .1", "unknown class 2"), ("0 .5 .5", "2 numbers"), ("a .5 .5 .1 .1", "float")],
)
def test_a_broken_label_is_refused_by_file_and_line(tmp_path, line, message):
    photo(tmp_path / "images/train/a.jpg"), photo(tmp_path / "images/val/b.jpg")
    write(tmp_path / "labels/train/a.txt", f"0 .5 .5 .1 .1\n{line}")
    write(tmp_path / "data.yaml", "train: images/train\nval: images/val\nnames: [cat, dog]")
    with pytest.raises(BadInput, match=rf"a\.txt, line 2: .*{message}"):
        load(Data(data=str(tmp_path)))


def test_yaml_of_other_data_is_read_too(tmp_path):
    write(tmp_path / "x.yaml", "--- \n# a: b\nroboflow:\n  license: CC BY 4.0\nnc: 1 # one\n")
    assert read_yaml(tmp_path / "x.yaml") == {"roboflow": {"license": "CC BY 4.0"}, "nc": "1"}


# ------------------------------------------------------------------------------ VOC


@pytest.mark.parametrize("ending", [".png", ".JPG", ".jpeg", ".bmp"])
@pytest.mark.parametrize("lists", [("train", "val"), ("trainval",), ("default",), ()])
def test_voc_with_any_images_and_lists(tmp_path, ending, lists):
    stems = ["a", "b c.d", "e", "f", "g"]
    for i, stem in enumerate(stems):
        photo(tmp_path / f"JPEGImages/{stem}{ending}")
        write(tmp_path / f"Annotations/{stem}.xml", voc_xml(NAMES[i % 2]))
    for i, name in enumerate(lists):
        write(tmp_path / f"ImageSets/Main/{name}.txt", "\n".join(stems[3 * i : 3 * i + 3]))
    if len(lists) == 1:
        write(tmp_path / f"ImageSets/Main/{lists[0]}.txt", "\n".join(stems))
    expect(both(tmp_path), *((3, 2) if len(lists) == 2 else (4, 1)))


@pytest.mark.parametrize(
    "xml, image, split",
    [
        ("{}", "{}", False),
        ("annotations/{}", "images/{}", False),
        ("train/{}", "train/{}", False),
        ("{s}/{}", "{s}/{}", True),
        ("annotations/{s}/{}", "images/{s}/{}", True),
    ],
)
def test_voc_in_flat_folders(tmp_path, xml, image, split):
    for i in range(5):
        s = "valid" if i > 2 else "train"
        photo(tmp_path / image.format(f"{i}.jpg", s=s))
        write(tmp_path / xml.format(f"{i}.xml", s=s), voc_xml(NAMES[i % 2]))
    expect(both(tmp_path), *((3, 2) if split else (4, 1)))


# ------------------------------------------------------------------------------ refusals


def test_what_is_not_read_is_refused_with_advice(tmp_path):
    def refusal(name: str) -> str:
        with pytest.raises(BadInput) as e:
            load(Data(data=str(tmp_path / name)))
        return str(e.value)

    assert "there is no such folder" in refusal("nowhere")
    photo(tmp_path / "labelme/a.jpg")
    write(tmp_path / "labelme/a.json", {"shapes": [], "imagePath": "a.jpg"})
    assert "labelme2coco" in refusal("labelme") and "1 .jpg, 1 .json" in refusal("labelme")
    photo(tmp_path / "hf/train/a.jpg")
    write(tmp_path / "hf/train/metadata.jsonl", '{"file_name": "a.jpg"}')
    assert "Hugging Face imagefolder" in refusal("hf")
    write(tmp_path / "tasks/a.json", [{"id": 1, "data": {}}])
    assert "Label Studio's list of tasks" in refusal("tasks")
    photo(tmp_path / "photos/a.jpg")
    assert "images, but no boxes" in refusal("photos")
    for name in ("labelme", "hf", "tasks", "photos"):
        assert "--train-json" in refusal(name) and "--train-images" in refusal(name)
    write(tmp_path / "lost/a.json", coco(["a.jpg", "b.jpg"]))
    assert "a.json: none of its images (a.jpg, b.jpg) was found" in refusal("lost")
    write(tmp_path / "yolo/data.yaml", "train: images/train\nnames: [a]")
    assert "train: images/train: no such folder" in refusal("yolo")


def test_names_speak_of_splits():
    assert [split_in(name) for name in ("valid", "train2017", "VAL_set", "trained")] == [
        *("val", "train", "val", ""),
    ]


def test_a_folder_is_described(tmp_path):
    assert describe(tmp_path) == "nothing"
    photo(tmp_path / "a.jpg"), photo(tmp_path / "sub/b.jpg")
    assert describe(tmp_path) == "1 .jpg, sub/"


def test_files_given_one_by_one(tmp_path):
    write(tmp_path / "a.json", coco([f"{i}.png" for i in range(5)]))
    for i in range(5):
        photo(tmp_path / f"{i}.png")
    one = {"train_json": str(tmp_path / "a.json"), "train_images": str(tmp_path)}
    expect(load(Data(**one)), 4, 1)
    two = {**one, "val_json": one["train_json"], "val_images": one["train_images"]}
    train, val = load(Data(**two))
    assert "5 images of 5 also in the training set" in val.note
    assert len(load(Data(**two), val=False)[0]) == 5
    with pytest.raises(BadInput, match="--val-images nowhere: no such folder"):
        load(Data(**{**two, "val_images": "nowhere"}))
