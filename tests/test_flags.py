"""Every flag does something: changing it alone changes what a small run does or writes."""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from matplotlib.figure import Figure
from methods import batch, small

import common
import d2det
from engine import loader
from engine.command import Command, load_data, parse
from engine.loader import make_loader
from engine.processes import find_device, uses_bf16
from engine.train import learning_rate, train

BASE = dict(
    d2det.TINY, image_size=48, scales=(48,), test_scales=(48,), max_size=48, num_train=4, num_val=2,
    steps=3, batch=2, workers=0, fpn_channels=8, conv_channels=8, num_convs=2, groups=2,
    fc_channels=8, norm="gn", optimizer="sgd", lr=0.1, clip_norm=0.0, proposals_train=30,
    proposals_test=20, reg_test=15, score_threshold=0.05, draw_score=0.01, log_every=1,
    save_every=10, eval_every=0, device="cpu", roi_samples=16, roi_positive=0.5, weight_decay=1e-4,
    flip=0.5, eval_times=1,
)  # fmt: skip

# What else decides what to do is tested where it is done: flag -> the test's name.
ELSEWHERE = {
    "train": "test_train_writes_what_it_promises",
    "eval": "test_eval_and_predict_from_a_checkpoint",
    "predict": "test_eval_and_predict_from_a_checkpoint",
    "weights": "test_eval_and_predict_from_a_checkpoint",
    "out": "test_train_writes_what_it_promises",
    "resume": "test_interrupted_run_resumes_bit_for_bit",
    "rows": "test_rows_lists_every_row",
    "row": "test_row_and_preset_set_what_flags_override",
    "preset": "test_row_and_preset_set_what_flags_override",
    "device": "test_device_is_obeyed",
    "compile": "test_compiled_are_backbone_and_heads",
    "export": "test_an_exported_file_finds_the_same_in_a_process_without_this_project",
    "dcn": "test_d2det_trains_deformed",
    "readable": "test_readable_runs_the_plain_decode",
    "data": "test_voc_layout",
    "train_json": "test_coco_explicit_paths",
    "train_images": "test_coco_explicit_paths",
    "val_json": "test_coco_explicit_paths",
    "val_images": "test_coco_explicit_paths",
    "train_split": "test_voc_layout",
    "val_split": "test_voc_layout",
    "val_share": "test_one_coco_file_is_split_by_the_seed",
    "upright": "test_photos_are_turned_if_their_annotated_sizes_are",
    "max_pixels": "test_the_largest_image_is_a_setting",
    "check": "test_a_run_says_what_it_did_not_check",
}

CHANGED = dict(
    eval_times=3, max_steps=2, min_steps=4, min_score=0.2,
    num_train=5, num_val=3, image_size=40, scales=(32,), test_scales=(32,), max_size=32, flip=1.0,
    test_flip=True, workers=1, backbone="resnet18", backbone_weights="none", norm="bn",
    frozen_stages=0, fpn_channels=16, batch=4, optimizer="adamw", lr=0.05, lr_batch=8, momentum=0.5,
    weight_decay=0.1, epochs=3.0, steps=2, drops=(0.4,), cosine=False, warmup=2, warmup_factor=0.5,
    clip_norm=0.01, amp="bf16", seed=1, log_every=2, save_every=1, eval_every=1, eval_batch=1,
    draw_score=0.2, dlr=False, drp=False, overlap=False, weighting=False, conv_channels=16,
    num_convs=1, groups=4, fc_channels=16, offset_bias=0.3, drp_per_level=True, gamma=0.5,
    overlap_margin=0.0, reg_cells="all", cls_weight=3.0, reg_weight=1.0, overlap_weight=2.0,
    jitter=0.0, reg_rois=1, roi_samples=8, roi_positive=0.1, anchor_scale=2.0, rpn_samples=4,
    proposals_train=10, proposals_test=5, score_threshold=0.13, nms_iou=0.2, reg_test=3,
    drp_samples=2, pool_norm=False, class_std=0.01, shared=True, soft_nms=False,
    soft_nms_iou=0.1, soft_nms_score=0.09, max_detections=2, masks=True, mask_channels=16,
    metric_detections=(1, 5), metric_sides=(1, 8, 16), rpn_floor=1.0, legacy=("rounded_corners",),
)  # fmt: skip

# Flags that act only together with another one.
GIVEN = {
    "frozen_stages": dict(backbone="resnet18", backbone_weights="FILE", norm="auto"),
    "backbone_weights": dict(backbone="resnet18", backbone_weights="FILE", norm="auto"),
    "epochs": dict(steps=0),
    "min_steps": dict(steps=0, epochs=1.0),
    "max_steps": dict(steps=0, epochs=3.0),
    "drops": dict(cosine=False),
    "shared": dict(dlr=False),
    "mask_channels": dict(masks=True),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flags")
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), folder / "FILE")
    return folder


def shown(figure) -> list[str]:
    """The images in a figure, which need not be drawn for that."""
    images = [axis.images[0].get_array().tobytes() for axis in figure.axes if axis.images]
    return [hashlib.sha256(image).hexdigest() for image in images]


def behaviour(work, **changes):
    """Everything observable about a run: losses, weights, rates, predictions, files, calls."""
    values = {k: str(work / v) if v == "FILE" else v for k, v in {**BASE, **changes}.items()}
    settings = d2det.Settings().replace(**values)
    torch.manual_seed(settings.run.seed)
    train_data, val_data = load_data(settings, train=True)
    model, seen = d2det.Detector(settings.model, 10), []
    out = work / f"run{len(list(work.iterdir()))}"

    def spy(module, name, note):
        original = getattr(module, name)

        def wrapped(*args, **kwargs):
            seen.append((name, note(*args, **kwargs)))
            return original(*args, **kwargs)

        patch.setattr(module, name, wrapped)

    with pytest.MonkeyPatch.context() as patch:
        spy(sys.modules["engine.train"], "save_run", lambda *args: args[-1].step)
        spy(common, "pad_images", lambda images: [tuple(i.shape) for i in images])
        # drawn from the log, which is compared
        patch.setattr(sys.modules["engine.checkpoints"], "draw_curves", lambda *_: None)
        patch.setattr(Figure, "savefig", lambda figure, *_, **__: seen.append(shown(figure)))
        spy(loader, "DataLoader", lambda *args, **kwargs: kwargs["num_workers"])
        metrics = train(model, settings, train_data, val_data, out)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for line in log:
        line.pop("images_per_s", None), line.pop("memory_mib", None)
    state = hashlib.sha256()
    for name, value in model.state_dict().items():
        state.update(name.encode() + value.float().contiguous().numpy().tobytes())
    rates = [learning_rate(settings.run, s, 100, 2) for s in range(0, 100, 5)]
    predictions = (out / "predictions.json").read_text()
    return [log, state.hexdigest(), rates, predictions, metrics, seen]


def test_every_flag_is_covered():
    flags = {*d2det.Settings().flat(), *(f.name for f in dataclasses.fields(Command))}
    assert flags == set(CHANGED) | set(ELSEWHERE) and not set(CHANGED) & set(ELSEWHERE)
    tests = "".join(p.read_text() for p in Path(__file__).parent.glob("test_*.py"))
    for name in ELSEWHERE.values():
        assert f"def {name}(" in tests, name


@pytest.fixture(scope="module")
def known(work):
    return {}


@pytest.mark.parametrize("flag", list(CHANGED))
def test_flag_changes_the_run(work, known, flag):
    given = GIVEN.get(flag, {})
    key = tuple(given)
    if key not in known:
        known[key] = behaviour(work, **given)
        if key in ((), tuple(GIVEN["frozen_stages"])):  # the same settings do the same
            assert known[key] == behaviour(work, **given)
    assert behaviour(work, **{**given, flag: CHANGED[flag]}) != known[key]


def asked(*argv):
    """The settings that D2Det's command line leads to."""
    return parse("d2det", d2det.Settings, argv)[1]


def test_row_and_preset_set_what_flags_override():
    assert asked("--train").model.backbone == "small"
    paper = asked("--train", "--preset", "paper")
    found = paper.model.backbone, paper.data.scales, paper.run.epochs
    assert found == ("resnet50", (800,), 24)
    real = asked("--train", "--data", "x")
    assert real.model.backbone == "resnet50"  # real data: the paper's settings
    tiny = asked("--train", "--data", "x", "--preset", "tiny", "--row", "table2.dlr").model
    assert tiny.backbone == "small" and not tiny.drp and tiny.dlr
    assert asked("--train", "--row", "table2.dlr", "--drp").model.drp
    assert asked("--train", "--preset", "paper", "--lr", "0.5").run.lr == 0.5


@pytest.mark.parametrize("layout", ["flat", "grouped"])
@pytest.mark.parametrize("action", ["--eval", "--resume"])
def test_what_an_older_checkpoint_does_not_name_is_as_in_the_defaults(tmp_path, action, layout):
    settings = d2det.Settings().replace(**d2det.TINY)
    saved = settings.flat() if layout == "flat" else settings.to_dict()
    network = saved if layout == "flat" else saved["model"]
    del network["pool_norm"], network["class_std"]
    state = {"config" if layout == "flat" else "settings": saved}
    needed = dict(model={"w": torch.ones(1)}, categories=[{"id": 1, "name": "cat"}])
    torch.save({**needed, **state}, tmp_path / "last.pt")
    argv = [action, "--preset", "tiny", "--out", str(tmp_path)]
    if action == "--resume":
        argv.append("--train")
    model = asked(*argv).model
    assert (model.pool_norm, model.class_std, model.groups) == (False, 0.01, 8)
    assert asked(*argv, "--pool-norm").model.pool_norm


def test_device_is_obeyed(monkeypatch):
    """Without being asked it takes a GPU where torch sees one, here or not."""
    command, chosen = sys.modules["engine.command"], []
    monkeypatch.setattr(command, "execute", lambda *given: given[3])
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for seen in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda seen=seen: seen)
        assert d2det.main(["--train", "--device", "cpu"]) == torch.device("cpu")
        assert d2det.main(["--train"]) == torch.device("cuda" if seen else "cpu")
        assert asked("--train").model.backbone == "small"  # synthetic data: the tiny preset
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert d2det.main(["--train", "--device", "cuda:1"]) == torch.device("cuda:1")
    assert chosen == [0, 1]  # what names no device of its own is of this one
    with pytest.raises(common.BadInput, match="--device cuda:2: torch sees 2"):
        find_device("cuda:2")


def test_bf16_only_where_it_is_fast_and_workers_as_there_are_cores(monkeypatch):
    """A T4 emulates bf16: asked with emulation it says yes. Its machine may have two cores."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    assert not uses_bf16("auto", gpu) and uses_bf16("bf16", gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert uses_bf16("auto", gpu) and not uses_bf16("off", gpu)
    assert not uses_bf16("auto", torch.device("cpu"))
    for cores, workers in (2, 2), (64, 4):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert make_loader([0], -1, gpu).num_workers == workers


def test_out_of_memory_ends_in_a_line_of_flags(monkeypatch, capsys):
    def execute(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(sys.modules["engine.command"], "execute", execute)
    with pytest.raises(SystemExit) as stop:
        d2det.main(["--train", "--device", "cpu"])
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.count("\n") == 1
    assert all(flag in text for flag in ("--batch", "--scales", "--roi-samples"))


def test_readable_runs_the_plain_decode(monkeypatch):
    model, (images, _) = small(d2det, conv_channels=16, num_convs=1, groups=4), batch(1, 64)
    calls, decode = [], d2det.decode
    monkeypatch.setattr(d2det, "decode", lambda *given: calls.append(1) or decode(*given))
    test = dataclasses.replace(model.full_settings.test, score_threshold=0.01)
    outputs = model.outputs(images)
    kernel = model.candidates(outputs, test)
    assert not calls
    plain = model.candidates(outputs, dataclasses.replace(test, readable=True))
    assert calls and len(plain["boxes"])
    torch.testing.assert_close(plain["boxes"], kernel["boxes"], atol=1e-3, rtol=1e-4)


def test_an_object_holds_only_what_it_knows():
    for part in (d2det.Model, d2det.Test):
        with pytest.raises(TypeError, match="lr"):
            part(lr=0.5)
    with pytest.raises(common.BadInput, match="nonsense: no such setting"):
        d2det.Settings().replace(lr=0.5, nonsense=1)


def test_help_shows_every_flag_and_its_comment(capsys):
    with pytest.raises(SystemExit):
        d2det.main(["--help"])
    text = capsys.readouterr().out
    assert "length of training in steps instead" in text
    for name in [*d2det.Settings().flat(), *(f.name for f in dataclasses.fields(Command))]:
        assert f"--{name.replace('_', '-')}" in text, name
