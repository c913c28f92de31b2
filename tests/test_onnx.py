"""--export FILE.onnx: onnxruntime finds what the detector finds, in images of any size."""

import json

import pytest
import torch
from methods import make, small, sure
from torch import Tensor

import d2det
import dc_loss_clnms
import iou_aware_retinanet
from baselines import gfl, retinanet
from data import SyntheticDetection
from engine.export import NAMES, export_file

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

CATEGORIES = SyntheticDetection(1, 64).categories
SIZES = [(160, 192), (224, 161), (320, 256)]  # the second is padded


def session(model, file):
    """The exported file of a model, loaded."""
    export_file(model, CATEGORIES, file, model.full_settings.test)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def images() -> list[Tensor]:
    torch.manual_seed(2)
    return [(torch.rand(3, *size) * 255).byte() for size in SIZES]


def wanted(model, image: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return model.candidates(model.outputs([image]), model.full_settings.test)


def found_by(loaded, image: Tensor) -> dict[str, Tensor]:
    names = [output.name for output in loaded.get_outputs()]
    values = loaded.run(None, dict(image=image.numpy()))
    return dict(zip(names, map(torch.from_numpy, values)))


def largest_error(found: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Between each row and the nearest of the other side: equal scores may change their order.

    Boxes count in units of 10 px, whose float32 is as fine as a score's at these sizes.
    """
    if {k: v.shape for k, v in found.items()} != {k: want[k].shape for k in found}:
        return torch.inf
    rows = []
    for side in (found, want):
        boxes, labels = side["boxes"] / 10, side["labels"][:, None] * 1000.0
        further = [side[k].reshape(len(boxes), -1) for k in found if k not in ("boxes", "labels")]
        rows.append(torch.cat([boxes, labels, *further], 1))
    distance = torch.cdist(*rows, p=torch.inf)
    return max(distance.amin(0).max().item(), distance.amin(1).max().item())


@pytest.mark.parametrize(
    "method, changes",
    [(iou_aware_retinanet, {}), (dc_loss_clnms, {}), (dc_loss_clnms, dict(base="gfl"))],
    ids=["iou_aware", "dc", "dc_on_gfl"],
)
def test_a_one_stage_detector(method, changes, tmp_path):
    """DC loss changes training and NMS: its files are those of RetinaNet and GFL."""
    model = sure(make(method, **changes)).eval()
    if method is dc_loss_clnms:
        base = gfl.GFL if changes else retinanet.RetinaNet
        assert type(model).outputs is base.outputs and type(model).candidates is base.candidates
    loaded = session(model, tmp_path / "model.onnx")
    assert [output.name for output in loaded.get_outputs()] == list(NAMES[:3])
    assert json.loads(loaded.get_modelmeta().custom_metadata_map["categories"]) == CATEGORIES
    found = [found_by(loaded, image) for image in images()]
    want = [wanted(model, image) for image in images()]
    assert all(len(w["boxes"]) > 100 for w in want)
    assert max(map(largest_error, found, want)) < 1e-4
    assert largest_error(found[0], want[1]) > 1e-4  # the check sees a difference
    moved = {**found[0], "boxes": found[0]["boxes"] + 0.01}
    assert largest_error(moved, want[0]) > 1e-4


def test_a_two_stage_detector(tmp_path):
    """RoIAlign, deformable pooling of each level, NMS and masks; also where no box is found."""
    sizes = dict(conv_channels=16, groups=4, num_convs=2, mask_channels=16)
    model = small(d2det, masks=True, drp_per_level=True, **sizes)
    torch.manual_seed(2)
    torch.nn.init.normal_(model.classify[-1].weight, std=2)
    blank = torch.zeros(3, *SIZES[0], dtype=torch.uint8)
    model.full_settings.test.score_threshold = model.outputs([blank])["probs"].max().item()
    loaded = session(model, tmp_path / "model.onnx")
    assert [output.name for output in loaded.get_outputs()] == list(NAMES)
    empty = found_by(loaded, blank)
    assert not len(wanted(model, blank)["boxes"]) and not any(map(len, empty.values()))
    found = [found_by(loaded, image) for image in images()]
    want = [wanted(model, image) for image in images()]
    assert all(len(w["boxes"]) > 3 for w in want)
    assert max(map(largest_error, found, want)) < 1e-4
