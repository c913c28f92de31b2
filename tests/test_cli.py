"""The command line and the promises about runs: resume, checkpoints, signals, flags."""

import dataclasses
import importlib
import inspect
import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from methods import every_settings
from PIL import Image

import common
import d2det
import engine
from data import SyntheticDetection
from data.images import read_image
from data.settings import Checked
from engine.checkpoints import load_checkpoint, load_weights, save_checkpoint, write_json
from engine.command import Command, read_rows
from engine.settings import OBJECTS, Settings
from studies.checkpoint import PAPERS

pytestmark = pytest.mark.usefixtures("unpainted")
ROOT = Path(__file__).resolve().parent.parent
TINY_RUN = """--image-size 64 --scales 64 --test-scales 64 --max-size 64 --num-train 12 --num-val 4
 --batch 2 --steps 8 --workers 0 --fpn-channels 8 --conv-channels 8 --num-convs 2 --groups 2
 --fc-channels 16 --norm gn --log-every 1 --save-every 2 --proposals-train 40 --proposals-test 20
 --reg-test 20 --device cpu --score-threshold 0.01 --draw-score 0.01""".split()


def run(*argv):
    return d2det.main([*TINY_RUN, *map(str, argv)])


def weights(folder):
    return load_checkpoint(Path(folder) / "last.pt")["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was never interrupted."""
    out = tmp_path_factory.mktemp("run") / "whole"
    metrics = run("--train", "--out", out)
    return out, metrics


def test_train_writes_what_it_promises(finished):
    out, metrics = finished
    names = "config.json log.jsonl metrics.json predictions.json last.pt best.pt curves.png"
    assert {p.name for p in out.iterdir()} == {*names.split(), "detections.png"}
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log if "loss" in r] == list(range(1, 9))
    assert json.loads((out / "metrics.json").read_text())["AP75"] == metrics["AP75"]
    assert {"AP", "AP50", "AP60", "AP70", "AP75", "AP80", "AP90", "AR100", "per_class"} <= set(
        metrics
    )
    assert json.loads((out / "config.json").read_text())["run"]["steps"] == 8


def test_eval_and_predict_from_a_checkpoint(finished, tmp_path):
    out, metrics = finished
    # Only the checkpoint is named: its settings come with it.
    again = d2det.main(["--eval", "--weights", f"{out}/last.pt", "--out", f"{tmp_path}/e"])
    assert again == metrics
    image, _ = SyntheticDetection(1, 100)[0]
    (tmp_path / "in").mkdir()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "in" / "a.png")
    Image.fromarray(image.permute(1, 2, 0).numpy()[:50]).save(tmp_path / "in" / "b.jpg")
    arguments = ["--weights", f"{out}/last.pt", "--out", f"{tmp_path}/p", "--draw-score", "0"]
    d2det.main(["--predict", f"{tmp_path}/in/a.png", f"{tmp_path}/in", *arguments])
    results = json.loads((tmp_path / "p" / "predict" / "predictions.json").read_text())
    assert {Path(r["file_name"]).name for r in results} == {"a.png", "b.jpg"}
    assert {r["image_id"] for r in results} == {0, 1, 2}
    for r in results:
        x, y, w, h = r["bbox"]
        assert x >= 0 and x + w <= 100.01 and 1 <= r["category_id"] <= 10
        assert y + h <= (50.01 if r["image_id"] == 2 else 100.01)
    pictures = sorted((tmp_path / "p" / "predict" / "pictures").iterdir())
    assert [p.name for p in pictures] == ["00000_a.jpg", "00001_a.jpg", "00002_b.jpg"]
    assert read_image(pictures[2]).shape == (3, 50, 100)


@pytest.mark.parametrize("name", ["bccd", "coco_tiny"])
def test_real_data_trains_evaluates_and_predicts(detection_data, few_real_images, tmp_path, name):
    data = few_real_images(detection_data / name)
    flags = ["--data", data, "--steps", "2", "--out", tmp_path, "--score-threshold", "0.05"]
    small = "--preset tiny --train --scales 96 --test-scales 96 --max-size 160".split()
    metrics = run(*small, *flags)
    assert 0 <= metrics["AP"] <= 1 and len(metrics["per_class"]) == (3 if name == "bccd" else 80)
    assert ("voc07_AP50" in metrics) == (name == "bccd")
    files = sorted(detection_data.joinpath(name).rglob("*.jpg"))[:2]
    results = d2det.main(["--predict", *map(str, files), "--out", str(tmp_path)])
    assert results is None and len(list((tmp_path / "predict" / "pictures").iterdir())) == 2
    again = d2det.main(["--eval", "--out", str(tmp_path)])  # the data's place is remembered too
    assert again == metrics


def test_a_set_without_annotations_is_detected_in_but_not_scored(tmp_path, capsys):
    data = SyntheticDetection(2, 64)
    coco = data.coco()
    for image in coco["images"]:
        image["file_name"] = f"{image['id']}.png"
        pixels = data[image["id"]][0].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / image["file_name"])
    write_json(tmp_path / "known.json", coco)
    del coco["annotations"]  # like COCO's image_info_test-dev2017.json
    write_json(tmp_path / "test.json", coco)

    def splits(**files):
        flags = [(f"--{s}-json", tmp_path / f, f"--{s}-images", tmp_path) for s, f in files.items()]
        return [word for part in flags for word in part]

    periodic = ["--preset", "tiny", "--steps", 2, "--eval-every", 1, "--out", tmp_path / "r"]
    metrics = run("--train", *splits(train="known.json", val="test.json"), *periodic)
    text = capsys.readouterr().out
    assert "step 1: no AP" in text and "step 2: no AP" in text and metrics["AP"] is None
    weights = ["--weights", tmp_path / "r" / "last.pt", "--out", tmp_path / "e"]
    assert run("--eval", *splits(val="known.json"), *weights)["AP"] is not None
    capsys.readouterr()
    run("--eval", *splits(val="test.json"), *weights)  # where the other evaluation has written
    assert "no AP: the set has no annotated objects" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "e" / "eval" / "metrics.json").read_text())
    per_class = metrics.pop("per_class")
    assert len(per_class) == 10 and {*metrics.values(), *per_class.values()} == {None}
    results = json.loads((tmp_path / "e" / "eval" / "predictions.json").read_text())
    assert {r["image_id"] for r in results} == {0, 1}
    with pytest.raises(SystemExit):
        run("--train", *splits(train="test.json", val="known.json"), "--out", tmp_path / "n")
    assert "test.json: no annotated boxes to train on" in capsys.readouterr().err


def test_resume_refuses_other_settings_and_starts_if_there_is_nothing(finished, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("--train", "--resume", "--out", finished[0], "--lr", "0.5")
    assert "cannot resume, the run was made with --lr " in capsys.readouterr().err
    run("--train", "--resume", "--out", tmp_path / "new", "--steps", "1", "--num-val", "1")
    assert (tmp_path / "new" / "last.pt").exists()


def test_resume_refuses_other_classes(finished, tmp_path, capsys):
    state = load_checkpoint(finished[0] / "last.pt")
    state["categories"][0]["name"] = "another"
    save_checkpoint(tmp_path / "last.pt", state)
    with pytest.raises(SystemExit):
        run("--train", "--resume", "--out", tmp_path)
    assert "categories are others" in capsys.readouterr().err


def test_an_earlier_run_is_moved_aside(tmp_path):
    for _ in range(2):
        run("--train", "--out", tmp_path / "r", "--steps", "1", "--num-val", "1")
    assert (tmp_path / "r" / "last.pt").exists() and (tmp_path / "r-1" / "last.pt").exists()


@pytest.mark.parametrize("where", ["save", "replace"])
def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch, where):
    path = tmp_path / "last.pt"
    good = {"model": {"w": torch.ones(3)}, "settings": {}}
    good["categories"] = [{"id": 1, "name": "cat"}]
    save_checkpoint(path, good)

    def crash(*args):
        if where == "save":
            args[1].write(b"half of it")
        raise OSError("power cut")

    monkeypatch.setattr(torch if where == "save" else os, where, crash)
    with pytest.raises(common.BadInput, match="cannot write it: power cut"):
        save_checkpoint(path, {**good, "model": {"w": torch.zeros(3)}})
    monkeypatch.undo()
    assert same(load_checkpoint(path)["model"], good["model"])


def test_checkpoints_that_are_unsafe_or_foreign_are_refused(finished, tmp_path):
    torch.save({"model": Path("x")}, tmp_path / "pickle.pt")
    with pytest.raises(common.BadInput, match=r"pickle\.pt: not a checkpoint that is safe"):
        load_checkpoint(tmp_path / "pickle.pt")
    torch.save({"weights": torch.ones(1)}, tmp_path / "foreign.pt")
    with pytest.raises(common.BadInput, match=r"foreign\.pt: not a checkpoint of this project"):
        load_checkpoint(tmp_path / "foreign.pt")
    (tmp_path / "torn.pt").write_bytes((finished[0] / "last.pt").read_bytes()[:2000])
    with pytest.raises(common.BadInput, match=r"torn\.pt"):
        load_checkpoint(tmp_path / "torn.pt")
    with pytest.raises(common.BadInput, match="no such file"):
        load_checkpoint(tmp_path / "none.pt")


def test_class_count_mismatch_is_named(finished, detection_data, capsys):
    argv = ["--data", f"{detection_data}/coco_tiny", "--weights", f"{finished[0]}/last.pt"]
    with pytest.raises(SystemExit):
        d2det.main(["--eval", *argv])
    assert "category" in capsys.readouterr().err
    model = torch.nn.Linear(2, 2)
    with pytest.raises(common.BadInput, match="made for 10 classes, the data has 3"):
        state = {"categories": [{}] * 10, "model": {}}
        load_weights(model, state, "x.pt", [{}] * 3)


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "nothing to do"),
        (["--train", "--row", "table9.x"], "table9.x"),
        (["--eval", "--out", "/nowhere"], "this needs --weights"),
        (["--predict", "a.jpg", "--out", "/nowhere"], "this needs --weights"),
        (["--train", "--data", "/nowhere"], "/nowhere: no data found"),
        (["--train", "--save-every", "0"], "--save-every 0: at least 1"),
        (["--train", "--batch", "-2"], "--batch -2: at least 0"),
        (["--train", "--device", "gpu"], "--device gpu: "),
    ],
)
def test_bad_calls_end_with_a_reason(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        d2det.main(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("device", ["mps", "xpu", "meta", "cuda", "nonsense"])
def test_a_device_that_is_not_supported_ends_in_one_line(device, capsys):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has it")
    with pytest.raises(SystemExit) as stop:
        d2det.main(["--train", "--device", device])
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.startswith(f"error: --device {device}: "), text
    assert text.count("\n") == 1 and len(text) < 300


def test_rows_lists_every_row(capsys):
    d2det.main(["--rows"])
    text = capsys.readouterr().out
    rows, printed = read_rows("d2det")
    assert "45.4" in text and rows and printed.keys() == rows.keys()
    assert all(row in text for row in rows)


@pytest.mark.parametrize("name", PAPERS)
def test_rows_are_settings_of_their_script(name):
    """Every row's settings exist and may have these values; lists became tuples."""
    script = importlib.import_module(name)
    default = script.Settings()
    for row, changes in read_rows(name)[0].items():
        chosen = {k: v for k, v in changes.items() if k not in default.flat() or k == "base"}
        changed = script.Settings(**chosen)
        own = {k: v for k, v in changes.items() if k not in chosen}
        flat = changed.replace(**own).flat()
        assert all(flat[k] == v for k, v in changes.items()), row


def test_a_row_that_the_checkpoint_contradicts_is_refused(finished, tmp_path, capsys):
    mine = ["--eval", "--weights", finished[0] / "last.pt", "--out", tmp_path / "e", "--num-val", 1]
    run(*mine, "--row", "release.r50")  # the same
    with pytest.raises(SystemExit):
        run(*mine, "--row", "table2.dlr_no_overlap")
    assert "last.pt was trained without --no-drp --no-overlap" in capsys.readouterr().err
    few = ["--steps", 1, "--num-val", 1, "--scales", 64]
    run("--train", "--out", tmp_path / "b", "--row", "table2.baseline", *few)
    with pytest.raises(SystemExit):  # that row says nothing of what the baseline leaves out
        run("--eval", "--weights", tmp_path / "b" / "last.pt", "--row", "table2.dlr")
    assert re.search(r"last\.pt was trained without .*--dlr\b", capsys.readouterr().err)
    with pytest.raises(SystemExit):  # a row of nothing but defaults
        run("--eval", "--weights", tmp_path / "b" / "last.pt", "--row", "release.r50")
    assert re.search(r"last\.pt was trained without .*--dlr --drp", capsys.readouterr().err)


def test_a_checkpoint_of_the_flat_layout_still_loads(finished, tmp_path, capsys):
    """Before settings had four objects, checkpoints held all of them, and the commands, flat."""
    out, metrics = finished
    state = load_checkpoint(out / "last.pt")
    flat = d2det.Settings.from_dict(state.pop("settings")).flat()
    commands = {f.name: getattr(Command(), f.name) for f in dataclasses.fields(Command)}
    old = {k: list(v) if isinstance(v, tuple) else v for k, v in {**flat, **commands}.items()}
    torch.save({**state, "config": old}, tmp_path / "last.pt")
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert d2det.main(["--eval", "--weights", f"{tmp_path}/last.pt", "--out", f"{tmp_path}/e"]) == (
        metrics
    )
    detector, same_detector = (engine.load(folder / "last.pt") for folder in (tmp_path, out))
    assert detector.settings == same_detector.settings
    image = SyntheticDetection(1, 64)[0][0]
    assert torch.equal(detector.detect(image).boxes, same_detector.detect(image).boxes)
    assert run("--train", "--resume", "--out", tmp_path) == metrics
    assert "resumed at step 8" in capsys.readouterr().out


def test_non_finite_loss_stops_and_names_it(tmp_path, monkeypatch, capsys):
    def poisoned(self, images, targets):
        losses = original(self, images, targets)
        calls.append(1)
        return {**losses, "cls": losses["cls"] * (math.nan if len(calls) == 5 else 1)}

    calls, original = [], d2det.D2Det.loss
    monkeypatch.setattr(d2det.D2Det, "loss", poisoned)
    with pytest.raises(SystemExit):
        run("--train", "--out", tmp_path / "r")
    error = capsys.readouterr().err
    assert "step 5, images [" in error and "cls = nan" in error
    state = load_checkpoint(tmp_path / "r" / "last.pt")
    assert state["step"] == 4 and all(v.isfinite().all() for v in state["model"].values())


# ------------------------------------------------------------------------------ the house


def test_readme_snippet_runs():
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (snippet,) = (s for s in snippets if "DenseLocalHead" in s)
    names: dict = {}
    exec(snippet, names)
    assert names["boxes"].shape == (2, 4) and names["inside"].shape == (2, 1, 7, 7)


def test_readme_links_and_names_exist():
    text = (ROOT / "README.md").read_text()
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text)}
    assert not [link for link in links if "://" not in link and not (ROOT / link).exists()]
    section = text.partition("## Copy from it")[2].partition("```")[0]
    names = re.findall(r"`(\w+)`", section)
    assert len(names) >= 5 and not [name for name in names if not hasattr(d2det, name)]
    for module, name in re.findall(r"`(\w+)\.(\w+)`", section):
        assert hasattr(importlib.import_module(module), name)


BASES = [f"baselines.{n}" for n in ("faster_rcnn", "cascade_rcnn", "retinanet", "gfl")]
SHARED = ["data.settings", "engine.settings", "engine.command", *BASES]


@pytest.mark.parametrize("name", [*SHARED, *PAPERS])
def test_every_flag_has_a_help_text(name):
    """tyro takes the comment behind a field, or above it, and drops it where a line is broken."""
    module, seen = importlib.import_module(name), 0
    for _, settings in inspect.getmembers(module, inspect.isclass):
        mine = settings.__module__ == name and dataclasses.is_dataclass(settings)
        if not (mine and issubclass(settings, (Checked, Settings, Command))):
            continue
        lines = inspect.getsource(settings).splitlines()
        own = [n for n in vars(settings).get("__annotations__", ()) if n not in OBJECTS]
        fields = [
            i
            for i, line in enumerate(lines)
            if (match := re.match(r"    (\w+): ", line)) and match[1] not in OBJECTS
        ]
        assert len(fields) == len(own)  # none unseen
        for i in fields:
            above = lines[i - 1] if lines[i - 1].lstrip().startswith("#") else ""
            assert len((lines[i] + above).partition("# ")[2]) >= 12, lines[i]
        seen += len(own)
    assert seen > 0


@pytest.mark.parametrize("name", ["engine", *BASES, *PAPERS])
def test_a_setting_is_in_one_of_the_four_objects(name):
    """Only then can the command line be flat, and a flat checkpoint be read."""
    for settings in every_settings(importlib.import_module(name)):
        names = [f.name for f in dataclasses.fields(settings) if f.name not in OBJECTS]
        for part in OBJECTS:
            names += [f.name for f in dataclasses.fields(getattr(settings, part))]
        commands = [f.name for f in dataclasses.fields(Command)]
        assert len({*names, *commands}) == len(names) + len(commands)
        flat = settings.flat()
        assert flat.keys() == set(names) and set(names) & set(OBJECTS) == {"data"}
        assert settings.tiny.keys() <= flat.keys()


@pytest.mark.parametrize("name", ["engine", *BASES, *PAPERS])
def test_flat_and_grouped_settings_are_read_alike(name):
    for default in every_settings(importlib.import_module(name)):
        settings = default.replace(nms_iou=0.25, lr=0.5, scales=(64, 96), norm="gn")
        for saved in (settings.to_dict(), settings.flat()):
            saved = json.loads(json.dumps(saved))  # tuples are lists then
            assert type(settings).from_dict({**saved, "unknown": 1, "train": True}) == settings
        flat = settings.flat()
        del flat["nms_iou"], flat["lr"]
        older = type(settings).from_dict(flat)  # what it did not know is as in the defaults
        assert older == settings.replace(nms_iou=default.test.nms_iou, lr=default.run.lr)
