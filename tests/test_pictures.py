"""Boxes on images: where labels go, what is drawn, and what is counted instead."""

import doctest

import matplotlib
import pytest
import torch
import torchvision
from PIL import ImageDraw

from engine import pictures
from engine.pictures import MOST_BOXES, draw, place_labels

BLUE = torch.tensor([int(255 * c) for c in matplotlib.colormaps["tab10"].colors[0]])


def crowded(count: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.8
    size = 5 + torch.rand(count, 2, generator=generator) * 0.2 * min(width, height)
    return torch.cat([corner, corner + size], 1)


@pytest.fixture
def written(monkeypatch):
    """Texts that are drawn, in order."""
    texts, original = [], ImageDraw.ImageDraw.text

    def text(self, place, words, *a, **k):
        texts.append(words)
        return original(self, place, words, *a, **k)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return texts


def test_examples_in_docstrings():
    assert doctest.testmod(pictures).attempted >= 1 and doctest.testmod(pictures).failed == 0


@pytest.mark.parametrize("count", [5, 60])
def test_labels_lie_in_the_image_at_their_boxes_and_over_no_other(count):
    boxes, (w, h) = crowded(count, 200, 300), (40, 14)
    corners = place_labels(boxes, [(w, h)] * count, 200, 300)
    named = [i for i, corner in enumerate(corners) if corner]
    assert len(named) == 5 if count == 5 else 20 < len(named) < 60
    left_top = torch.tensor([corners[i] for i in named])
    places = torch.cat([left_top, left_top + torch.tensor([w, h])], 1)
    assert places.min() >= 0 and places[:, 2].max() <= 300 and places[:, 3].max() <= 200
    shared = torchvision.ops.box_iou(places, places)
    assert shared.sum() == pytest.approx(len(named))  # each with itself alone
    near = boxes[named] + torch.tensor([-w, -h, w, h])  # moved into the image, it is still near
    assert (places[:, :2] >= near[:, :2] - 1e-3).all() and (
        places[:, 2:] <= near[:, 2:] + 1e-3
    ).all()


def test_a_label_hides_as_little_as_it_can():
    above = torch.tensor([20.0, 10, 60, 38])  # an object where the label would go first
    box = torch.tensor([20.0, 40, 60, 80])
    label = [(40, 12)]
    assert place_labels(box[None], label, 200, 200) == [(20, 28)]
    assert place_labels(torch.stack([box, above]), label, 200, 200) == [(20, 80)]
    small = torch.tensor([30.0, 80, 36, 86])  # hidden whole, where of the other a part would be
    everywhere = torch.tensor([0.0, 0, 200, 200])  # hidden by any place, so it does not decide
    boxes = torch.stack([box, above, small, everywhere])
    assert place_labels(boxes, label, 200, 200) == [(60, 40)]
    assert place_labels(box[None], [(300, 12)], 200, 200) == [None]  # no room at all


def test_an_outline_is_seen_on_its_own_colour_and_leaves_the_object_alone():
    image = BLUE[:, None, None].expand(3, 200, 200).byte()
    box = torch.tensor([[50.0, 60, 150, 140]])
    seen = draw(image, box, [0], ["x"])
    assert (image == BLUE[:, None, None]).all()  # the picture is another one
    row = seen[:, 100].int()  # it crosses the left and the right line
    same = (row == BLUE[:, None]).all(0)
    dark = (row == 0).all(0)
    assert (same | dark).all() and same[50:150].all()
    (at,) = dark.nonzero(as_tuple=True)
    assert (
        len(at) == 2 and 40 < at[0] < 49 and 150 < at[1] < 160
    )  # the line itself is 2 wide or more


def test_boxes_at_and_beyond_the_border_are_drawn():
    image = torch.full((3, 100, 200), 255, dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0, 200, 100], [-20, -20, 5, 5], [270, 60, 290, 90], [9, 9, 9, 9]])
    seen = draw(image, boxes, [0, 1, 2, 3], list("abcd"), [0.1, 0.2, 0.3, 0.4])
    assert seen.shape == image.shape and seen.dtype == torch.uint8
    assert (seen[:, 50, 0] == BLUE).all() and (seen[:, 99, 100] == BLUE).all()


def test_the_best_are_drawn_and_the_others_counted(written):
    count = MOST_BOXES + 23
    image, boxes = torch.full((3, 900, 1200), 128, dtype=torch.uint8), crowded(count, 900, 1200)
    scores = [(i * 7 % count) / count for i in range(count)]
    masks = torch.zeros(count, 900, 1200, dtype=torch.bool)
    worst, best = scores.index(min(scores)), scores.index(max(scores))
    masks[worst, 890:, 1190:] = masks[best, 890:, 1180:1190] = True
    seen = draw(image, boxes, [0] * count, ["x"], scores, iter(masks))
    note = written.pop()
    assert note.startswith("+ 23 more")
    unnamed = int(note.split(", ")[1].split()[0]) if "without label" in note else 0
    assert len(written) + unnamed == MOST_BOXES
    assert set(written) <= {f"x {s:.2f}" for s in sorted(scores)[23:]}
    assert (seen[:, 895, 1195] == 128).all() and (seen[:, 895, 1185] != 128).any()
    written.clear()
    draw(image, boxes[:2], [0, 1], ["cat", "dog"])
    assert written == ["cat", "dog"]  # without scores; nothing left out, nothing counted


def test_labels_without_room_are_counted(written):
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    boxes = torch.tensor([[5.0, 5, 50, 35]]).repeat(9, 1)
    draw(image, boxes, [0] * 9, ["name"])
    assert written.count("name") == 9 - int(written[-1].split()[0])
    assert 1 <= written.count("name") <= 3 and written[-1].endswith(" without label")
