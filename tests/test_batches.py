"""What is found in an image does not depend on the images that are detected beside it."""

import importlib
from itertools import product

import numpy as np
import pytest
import torch
from methods import build, settings_of

from data import SyntheticDetection
from data.contract import make_target
from engine import metrics
from engine.metrics import detect

NAMES = "d2det double_head cpm_rcnn iou_aware_retinanet dc_loss_clnms baselines.gfl".split()
SMALL = {
    "d2det": dict(conv_channels=8, num_convs=2, groups=2, fc_channels=16),
    "double_head": dict(conv_channels=16, fc_channels=16),
    "cpm_rcnn": dict(point_channels=1, num_convs=1, fc_channels=16),
    "iou_aware_retinanet": dict(tower_convs=1, tower_groups=4),
    "dc_loss_clnms": dict(tower_convs=1, tower_groups=4),
    "baselines.gfl": dict(tower_convs=1, tower_groups=4, nms_iou=1.0),  # untrained, all much alike
}


def make(name, norm):
    """A narrow detector with random weights, none of them so small that its input hardly counts."""
    method = importlib.import_module(name)
    small = dict(fpn_channels=16, norm=norm, workers=0, score_threshold=0.005, **SMALL[name])
    torch.manual_seed(0)
    model = build(method, settings_of(method, **small))
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
    return model.eval()


def pictures():
    """A small image, a larger one of another aspect, one that pads to the first one's size."""
    wide, tall, near = (SyntheticDetection(3, 160)[i][0] for i in range(3))
    return [wide[:, :60, :90], tall[:, :, :70], near[:, :50, :96]]


def share_of_same(found, alone) -> float:
    """Share of the boxes, of the one or the other, that the other has too, in any order.

    Of random weights the last bits count: they may move a box by 0.004 px.
    """
    near = (found["boxes"][:, None] - alone["boxes"]).abs().amax(-1) < 1e-2
    near &= (found["scores"][:, None] - alone["scores"]).abs() < 1e-3
    near &= found["labels"][:, None] == alone["labels"]
    return min(near.any(side).float().mean().item() for side in (0, 1))


def check_same(found, alone):
    """The same boxes, but for a few: where two are all but equal, the last bit decides."""
    assert len(found["boxes"]) == len(alone["boxes"]) >= 20
    assert share_of_same(found, alone) > 0.95


@pytest.mark.parametrize(
    "name, norm",
    [*((name, "gn") for name in NAMES), *product(["d2det", NAMES[3]], ["bn", "frozen_bn"])],
)
def test_an_image_is_detected_as_if_it_were_alone(name, norm):
    model, images = make(name, norm), pictures()
    alone = [model.predict([image])[0] for image in images]
    for found, want in zip(model.predict(images), alone, strict=True):
        check_same(found, want)
    test = model.full_settings.test
    with torch.no_grad():  # and it would be seen: padded to the largest, small images differ
        padded = model.detections(model.candidates(model.outputs(images), test), 3, test)
    assert all(share_of_same(padded[i], alone[i]) < 0.1 for i in (0, 2))


class Crops(torch.utils.data.Dataset):
    """Synthetic images of many sizes."""

    def __init__(self):
        self.whole = SyntheticDetection(7, 128)
        self.sizes = np.array([(128, 40 + 29 * (i * 3 % 4)) for i in range(7)])

    def __len__(self):
        return 7

    def __getitem__(self, index):
        h, w = self.sizes[index].tolist()
        target = make_target(torch.zeros(0, 4), [], [], index, (h, w))
        return self.whole[index][0][:, :h, :w], target


def test_evaluation_does_not_depend_on_batch_or_processes(monkeypatch):
    model, data = make("iou_aware_retinanet", "gn"), Crops()
    seen, shapes, outputs = [], [], model.outputs
    monkeypatch.setattr(model, "outputs", lambda i: shapes.append(len(i)) or outputs(i))
    for batch, world in ((1, 1), (3, 1), (8, 1), (2, 2)):
        shared = dict(scales=(96,), test_scales=(96, 64), max_size=160, test_flip=True)
        settings = model.full_settings.replace(eval_batch=batch, **shared)
        found = {}
        for rank in range(world):
            monkeypatch.setattr(metrics, "rank_and_world", lambda r=rank, w=world: (r, w))
            for target, mine in detect(model, data, settings):
                assert target["image_id"] not in found
                found[target["image_id"]] = mine
        assert sorted(found) == list(range(7))
        seen.append(found)
    assert max(shapes) > 1  # images of one size meet although they lie apart in the data
    for other in seen[1:]:
        for i in range(7):
            check_same(other[i], seen[0][i])
