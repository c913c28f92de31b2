"""--export FILE.pt2: the file alone finds what the detector finds, in images of other sizes.

tests/test_onnx.py is about FILE.onnx.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from methods import make, small, sure

import d2det
import double_head
import iou_aware_retinanet
from common import BadInput, FixedBatchNorm2d
from data import SyntheticDetection
from engine import export
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
    program = torch.export.load(file, extra_files=extra)
    program.run_decompositions({})  # as every conversion of a saved program begins
    network = program.module()
    images = torch.load(file + ".images")
    torch.save([network(image) for image in images], file + ".found")
    assert len(json.loads(extra["categories"])) == 10
ours = [m for m in sys.modules if m.split(".")[0] in ("common", "data", "engine", "baselines")]
print(json.dumps(ours))
"""


def models() -> dict[str, BaseDetector]:
    """A one-stage detector, one with masks, and one whose batch norms have seen something."""
    fixed = dict(backbone="resnet18", backbone_weights="random", norm="eval_bn")
    two = small(double_head, conv_channels=16, score_threshold=0.05, **fixed)
    for layer in two.modules():
        if isinstance(layer, (torch.nn.BatchNorm2d, FixedBatchNorm2d)):
            torch.nn.init.uniform_(layer.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(layer.running_var, 0.5, 2)
    sizes = dict(conv_channels=16, groups=4, num_convs=2, mask_channels=16)
    masks = small(d2det, masks=True, score_threshold=0.05, **sizes)
    return {"one": sure(make(iou_aware_retinanet)).eval(), "masks": masks, "two": two}


def test_an_exported_file_finds_the_same_in_a_process_without_this_project(
    tmp_path, monkeypatch, capsys
):
    """Only one program is read from its file, which takes many seconds; others run as they are."""
    sizes, programs = [(160, 192), (224, 161), (190, 333)], {}
    images = [(torch.rand(3, *size) * 255).byte() for size in sizes]
    made = models()
    for name, model in made.items():
        before = {k: v.clone() for k, v in model.state_dict().items()}
        file = tmp_path / f"{name}.pt2"
        with monkeypatch.context() as patch:
            if name != "two":
                patch.setattr(
                    torch.export,
                    "save",
                    lambda program, path, **_: programs.update({path: program}),
                )
            export_file(model, CATEGORIES, file, model.full_settings.test)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        printed = capsys.readouterr().out
        assert f"torch.export.load({str(file)!r})" in printed
        assert ("mask_iou [N]" in printed) == (name == "masks")
    torch.save(images, f"{file}.images")
    command = [sys.executable, "-c", ALONE, str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []
    every = {"two": torch.load(f"{file}.found")}
    for path, program in programs.items():
        network = program.module()
        every[path.stem] = [network(image) for image in images]
    for name, model in made.items():
        names = export.NAMES if name == "masks" else export.NAMES[:3]
        for image, found in zip(images, every[name]):
            want = model.candidates(model.outputs([image]), model.full_settings.test)
            assert len(want["boxes"]) > 20 and found.keys() == set(names)
            for key, value in found.items():
                torch.testing.assert_close(value, want[key], atol=1e-3, rtol=1e-4)


def test_deformable_convolutions_take_any_size(tmp_path, monkeypatch):
    model = sure(make(iou_aware_retinanet, backbone="resnet50", dcn="v2")).eval()
    programs = []
    monkeypatch.setattr(torch.export, "save", lambda program, *_, **__: programs.append(program))
    export_file(model, CATEGORIES, tmp_path / "dcn.pt2", model.full_settings.test)
    image = (torch.rand(3, 224, 161) * 255).byte()
    want = model.candidates(model.outputs([image]), model.full_settings.test)
    torch.testing.assert_close(programs[0].module()(image)["boxes"], want["boxes"])


def test_onnx_without_its_packages_is_refused(tmp_path, monkeypatch):
    model = make(iou_aware_retinanet)
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="pip install onnx onnxscript"):
        export_file(model, CATEGORIES, tmp_path / "model.onnx", model.full_settings.test)


def test_a_file_of_another_kind_is_refused(tmp_path):
    model = make(iou_aware_retinanet)
    with pytest.raises(BadInput, match="ends in .pt2 or .onnx"):
        export_file(model, CATEGORIES, tmp_path / "model.pth", model.full_settings.test)
