"""--export: the file alone finds what the detector finds, in images of other sizes than its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from methods import make, small, sure

import double_head
import iou_aware_retinanet
from common import BadInput
from data import SyntheticDetection
from engine.detector import BaseDetector
from engine.export import export_file

ROOT = Path(__file__).resolve().parent.parent
CATEGORIES = SyntheticDetection(1, 64).categories
ALONE = """
import json, sys
import torch
import kernels

for file in sys.argv[1:]:
    extra = {"categories": ""}
    network = torch.export.load(file, extra_files=extra).module()
    images = torch.load(file + ".images")
    torch.save([network(image) for image in images], file + ".found")
    assert len(json.loads(extra["categories"])) == 10
ours = [m for m in sys.modules if m.split(".")[0] in ("common", "data", "engine", "baselines")]
print(json.dumps(ours))
"""


def models() -> dict[str, BaseDetector]:
    """A one-stage detector, and a two-stage one whose batch norms have seen something."""
    two = small(double_head, conv_channels=16, score_threshold=0.05, norm="bn")
    for layer in two.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(layer.running_var, 0.5, 2)
    return {"one": sure(make(iou_aware_retinanet)).eval(), "two": two}


def test_an_exported_file_finds_the_same_in_a_process_without_this_project(tmp_path, monkeypatch):
    """The one-stage detector's program is run as it is, since reading a file takes many seconds."""
    sizes, programs = [(160, 192), (224, 160), (192, 320)], []
    images = [(torch.rand(3, *size) * 255).byte() for size in sizes]
    made = models()
    for name, model in made.items():
        before = {k: v.clone() for k, v in model.state_dict().items()}
        file = tmp_path / f"{name}.pt2"
        with monkeypatch.context() as patch:
            if name == "one":
                patch.setattr(
                    torch.export, "save", lambda program, *_, **__: programs.append(program)
                )
            export_file(model, CATEGORIES, file, model.full_settings.test)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    (program,), file = programs, tmp_path / "two.pt2"
    torch.save(images, f"{file}.images")
    command = [sys.executable, "-c", ALONE, str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []
    network = program.module()
    every = {"one": [network(image) for image in images], "two": torch.load(f"{file}.found")}
    for name, model in made.items():
        for image, found in zip(images, every[name]):
            want = model.candidates(model.outputs([image]), model.full_settings.test)
            assert len(want["boxes"]) > 20 and found.keys() == {"boxes", "scores", "labels"}
            for key, value in found.items():
                torch.testing.assert_close(value, want[key], atol=1e-3, rtol=1e-4)


def test_a_file_of_another_kind_is_refused(tmp_path):
    model = make(iou_aware_retinanet)
    with pytest.raises(BadInput, match="ends in .pt2 or .onnx"):
        export_file(model, CATEGORIES, tmp_path / "model.pth", model.full_settings.test)
