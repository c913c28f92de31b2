"""Data sets of one's own with one fault each, for tests/test_own_data.py and tests/campaign.py."""

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision import tv_tensors


class OwnData(torch.utils.data.Dataset):
    """Eight images of one object each, as somebody else would write them.

    `faults` replace what the members, the items and coco() give: {"sizes": value}, or
    {"boxes": (first item, function of the right value)}, or {"coco": function}.
    """

    def __init__(self, **faults):
        self.faults = faults
        self.sizes = faults.get("sizes", [(48, 64)] * 8)
        self.categories = faults.get("categories", [{"id": 5, "name": "a"}, {"id": 9, "name": "b"}])

    def __len__(self):
        return self.faults.get("length", 8)

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        target = dict(
            image=torch.from_numpy(rng.integers(0, 255, (3, 48, 64), np.uint8)),
            boxes=torch.tensor([[4.0 + index, 6, 40 + index, 38]]),
            labels=torch.tensor([index % 2]),
            ignore=torch.tensor([False]),
            image_id=index,
            size=(48, 64),
        )
        for name, fault in self.faults.items():
            if name in target and index >= fault[0]:
                target[name] = fault[1](target[name])
        item = target.pop("image"), target
        first, change = self.faults.get("item", (8, None))
        return change(item) if index >= first else item

    def coco(self):
        truth = {
            "images": [{"id": i, "height": 48, "width": 64} for i in range(8)],
            "categories": [{"id": 5, "name": "a"}, {"id": 9, "name": "b"}],
            "annotations": [
                {"image_id": i, "category_id": (5, 9)[i % 2], "bbox": [4 + i, 6, 36, 32]}
                for i in range(8)
            ],
        }
        change = self.faults.get("coco")
        return change(truth) if change else truth


def without(key: str):
    """A function that leaves out a key of a dict."""
    return lambda values: {k: v for k, v in values.items() if k != key}


def with_entry(kind: str, **values):
    """A function that changes the third entry of a list of a COCO dictionary."""

    def change(truth):
        entries = [dict(entry) for entry in truth[kind]]
        entries[2].update(values)
        return {**truth, kind: entries}

    return change


def without_entry(kind: str, key: str):
    """A function that leaves out a key of the third entry."""

    def change(truth):
        entries = [dict(entry) for entry in truth[kind]]
        del entries[2][key]
        return {**truth, kind: entries}

    return change


def as_format(boxes, name: str):
    """Boxes as torchvision's tv_tensors, in the format of that name."""
    boxes = torchvision.ops.box_convert(boxes, "xyxy", name.lower())
    return tv_tensors.BoundingBoxes(boxes, format=name, canvas_size=(48, 64))


def nothing() -> dict:
    """The part of a target that has no objects."""
    labels = torch.zeros(0, dtype=torch.long)
    return dict(boxes=torch.zeros(0, 4), labels=labels, ignore=labels.bool())


NAN, INF = float("nan"), float("inf")
# What a data set may have wrong: {name of the case: the fault}. Of items: from one item on.
ITEM_FAULTS = {
    "boxes nan": dict(boxes=lambda b: b * NAN),
    "boxes inf": dict(boxes=lambda b: torch.tensor([[4.0, 6, INF, INF]])),
    "boxes -inf": dict(boxes=lambda b: torch.tensor([[-INF, 6, 40, 38]])),
    "boxes 1e30": dict(boxes=lambda b: torch.tensor([[4.0, 6, 1e30, 1e30]])),
    "boxes outside": dict(boxes=lambda b: b + 500),
    "boxes swapped": dict(boxes=lambda b: b[:, [2, 3, 0, 1]]),
    "boxes flat": dict(boxes=lambda b: b[0]),
    "boxes of 5": dict(boxes=lambda b: torch.zeros(1, 5)),
    "boxes two": dict(boxes=lambda b: b.repeat(2, 1)),
    "boxes none": dict(boxes=lambda b: b[:0]),
    "boxes None": dict(boxes=lambda b: None),
    "boxes list": dict(boxes=lambda b: b.tolist()),
    "boxes array": dict(boxes=lambda b: b.numpy()),
    "boxes complex": dict(boxes=lambda b: b + 0j),
    "boxes xywh": dict(boxes=lambda b: as_format(b, "XYWH")),
    "boxes cxcywh": dict(boxes=lambda b: as_format(b, "CXCYWH")),
    "labels float": dict(labels=lambda v: v.float()),
    "labels int32": dict(labels=lambda v: v.int()),
    "labels two": dict(labels=lambda v: v.repeat(2)),
    "labels none": dict(labels=lambda v: v[:0]),
    "labels scalar": dict(labels=lambda v: v[0]),
    "labels column": dict(labels=lambda v: v[:, None]),
    "labels K": dict(labels=lambda v: v * 0 + 2),
    "labels -1": dict(labels=lambda v: v * 0 - 1),
    "labels list": dict(labels=lambda v: v.tolist()),
    "labels None": dict(labels=lambda v: None),
    "ignore int": dict(ignore=lambda v: v.long()),
    "ignore two": dict(ignore=lambda v: v.repeat(2)),
    "ignore None": dict(ignore=lambda v: None),
    "ignore list": dict(ignore=lambda v: [False]),
    "image float": dict(image=lambda v: v.float()),
    "image grey": dict(image=lambda v: v[:1]),
    "image 4 channels": dict(image=lambda v: v[[0, 1, 2, 0]]),
    "image last": dict(image=lambda v: v.permute(1, 2, 0)),
    "image array": dict(image=lambda v: v.numpy()),
    "image PIL": dict(image=lambda v: Image.fromarray(v.permute(1, 2, 0).numpy())),
    "image None": dict(image=lambda v: None),
    "image empty": dict(image=lambda v: v[:, :0]),
    "image turned": dict(image=lambda v: v.transpose(1, 2)),
    "image_id tensor": dict(image_id=lambda v: torch.tensor(v)),
    "image_id None": dict(image_id=lambda v: None),
    "image_id list": dict(image_id=lambda v: [v]),
    "size turned": dict(size=lambda v: v[::-1]),
    "size None": dict(size=lambda v: None),
    "size tensor": dict(size=lambda v: torch.tensor(v)),
    "item None": dict(item=lambda v: None),
    "item image": dict(item=lambda v: v[0]),
    "item three": dict(item=lambda v: (*v, 0)),
    "item target list": dict(item=lambda v: (v[0], [v[1]])),
    "item KeyError": dict(item=lambda v: {}["x"]),
    "item OSError": dict(item=lambda v: open("/nowhere/at all.jpg")),
    "item RuntimeError": dict(item=lambda v: torch.zeros(2) @ torch.zeros(3)),
    **{
        f"item without {key}": dict(item=lambda v, key=key: (v[0], without(key)(v[1])))
        for key in ("boxes", "labels", "ignore", "image_id", "size")
    },
}
MEMBER_FAULTS = {
    **{f"sizes {i}": dict(sizes=v) for i, v in enumerate((
        None, [], [(48, 64)] * 7, [(48, 64), (48,)] * 4, [(64, 48)] * 8, [(0, 64)] * 8, "x",
        [(NAN, 64)] * 8, [(-48, 64)] * 8, [48] * 8, 48, [(48, 64, 3)] * 8, [("a", "b")] * 8,
    ))},
    **{f"categories {i}": dict(categories=v) for i, v in enumerate((
        None, [], ["a", "b"], [{"id": 5}, {"id": 9}], [{"name": "a"}, {"name": "b"}],
        [{"id": 5, "name": "a"}] * 2, [{"id": 5, "name": "a"}], {"a": 5, "b": 9},
        [{"id": None, "name": "a"}, {"id": [], "name": "b"}],
        [{"id": 5, "name": None}, {"id": 9, "name": "b"}],
        [{"id": 5, "name": "a"}, {"id": 9, "name": "b"}, {"id": 10, "name": "c"}],
    ))},
    "boxes in shares": dict(boxes=(0, lambda b: b / 64)),
    "length 0": dict(length=0),
    "length 9": dict(length=9),
    "length None": dict(length=None),
    "length -1": dict(length=-1),
}  # fmt: skip
TRUTH_FAULTS = {
    "categories in another order": dict(
        categories=[{"id": 9, "name": "b"}, {"id": 5, "name": "a"}],
        labels=(0, lambda v: 1 - v),
    ),
    "categories of other names": dict(
        categories=[{"id": 5, "name": "x"}, {"id": 9, "name": "y"}],
    ),
    "foreign image ids": dict(image_id=(0, lambda v: v + 100)),
    "foreign image ids later": dict(image_id=(5, lambda v: v + 100)),
    "one image id": dict(image_id=(0, lambda v: 3)),
    "image ids as strings": dict(image_id=(0, str)),
    "image ids mixed later": dict(image_id=(5, str)),
    **{f"coco() is {v!r}": dict(coco=lambda _, v=v: v) for v in (None, {}, [], "x", 0)},
    **{f"coco() without {k}": dict(coco=without(k)) for k in ("images", "categories")},
    **{f"coco() with {k} None": dict(coco=lambda t, k=k: {**t, k: None})
       for k in ("images", "categories", "annotations")},
    **{f"coco() with {k} empty": dict(coco=lambda t, k=k: {**t, k: []})
       for k in ("images", "categories")},
    **{f"coco() {kind}[2].{key} = {v!r}": dict(coco=with_entry(kind, **{key: v}))
       for kind, key, values in (
           ("images", "id", (None, [], 0, "2", 77)),
           ("categories", "id", ()),
           ("annotations", "image_id", (None, [], 77, "2")),
           ("annotations", "category_id", (None, [], 77, "5", 1)),
           ("annotations", "bbox", (
               None, [], [1, 2, 3], [1, 2, 3, NAN], [1, 2, INF, 3], [NAN] * 4, ["a"] * 4, "x",
               [[1, 2, 3, 4]], [4, 6, -36, 32], 5,
           )),
           ("annotations", "area", (None, NAN, "x", [])),
           ("annotations", "iscrowd", (None, 2, "x", NAN)),
       ) for v in values},
    **{f"coco() {kind}[2] without {key}": dict(coco=without_entry(kind, key)) for kind, key in (
        ("images", "id"), ("annotations", "image_id"), ("annotations", "category_id"),
        ("annotations", "bbox"),
    )},
    "coco() categories swapped": dict(coco=lambda t: {
        **t, "categories": [{"id": 5, "name": "b"}, {"id": 9, "name": "a"}]
    }),
    "coco() boxes xyxy": dict(coco=lambda t: {**t, "annotations": [
        {**a, "bbox": [a["bbox"][0], 6, a["bbox"][0] + 36, 38]} for a in t["annotations"]
    ]}),
    "coco() of other objects": dict(coco=lambda t: {**t, "annotations": [
        {**a, "image_id": 7 - a["image_id"]} for a in t["annotations"]
    ]}),
    "coco() of fewer images": dict(coco=lambda t: {
        "images": t["images"][:6], "categories": t["categories"],
        "annotations": t["annotations"][:6],
    }),
}  # fmt: skip
# Of training sets alone: without objects nothing is learned, but detections can be scored.
EMPTY = {
    "no boxes": dict(item=(0, lambda v: (v[0], {**v[1], **nothing()}))),
    "all ignored": dict(ignore=(0, lambda v: ~v)),
}
# What is right: these must train and be evaluated.
RIGHT = {
    "as it should be": {},
    "boxes int": dict(boxes=(0, lambda b: b.long())),
    "boxes float64": dict(boxes=(0, lambda b: b.double())),
    "boxes tv_tensors": dict(boxes=(0, lambda b: as_format(b, "XYXY"))),
    "no boxes from item 5 on": dict(item=(5, lambda v: (v[0], {**v[1], **nothing()}))),
    "sizes array": dict(sizes=np.array([(48, 64)] * 8)),
    "sizes tensor": dict(sizes=torch.tensor([(48, 64)] * 8)),
}
RIGHT_TRUTH = {
    "coco() bbox tuples": dict(coco=with_entry("annotations", bbox=(6, 6, 36, 32))),
    "coco() bbox array": dict(coco=with_entry("annotations", bbox=np.array([6, 6, 36, 32.0]))),
    "coco() numpy ids": dict(coco=with_entry("annotations", image_id=np.int64(2))),
    "coco() crowd": dict(coco=with_entry("annotations", iscrowd=True, area=np.float32(99))),
    "coco() without annotations": dict(coco=without("annotations")),
}
