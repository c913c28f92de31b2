"""The command line and the promises about runs: resume, checkpoints, signals, processes, flags."""

import dataclasses
import importlib
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from methods import torchrun

import common
import cpm_rcnn
import d2det
from baselines.faster_rcnn import TwoStage
from engine.checkpoints import load_checkpoint, load_weights, save_checkpoint
from engine.data import to_device
from engine.metrics import detect, evaluate, write_json
from engine.processes import share_buffers
from engine.train import LossOnly, signals_caught

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
    names = "config.json log.jsonl metrics.json predictions.json last.pt curves.png detections.png"
    assert {p.name for p in out.iterdir()} == set(names.split())
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log if "loss" in r] == list(range(1, 9))
    assert json.loads((out / "metrics.json").read_text())["AP75"] == metrics["AP75"]
    assert {"AP", "AP50", "AP60", "AP70", "AP75", "AP80", "AP90", "AR100", "per_class"} <= set(
        metrics
    )
    assert json.loads((out / "config.json").read_text())["steps"] == 8


def test_eval_and_predict_from_a_checkpoint(finished, tmp_path):
    out, metrics = finished
    # Only the checkpoint is named: its settings come with it.
    again = d2det.main(["--eval", "--weights", f"{out}/last.pt", "--out", f"{tmp_path}/e"])
    assert again == metrics
    image, _ = common.SyntheticDetection(1, 100)[0]
    (tmp_path / "in").mkdir()
    common.Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "in" / "a.png")
    common.Image.fromarray(image.permute(1, 2, 0).numpy()[:50]).save(tmp_path / "in" / "b.jpg")
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
    assert common.read_image(pictures[2]).shape == (3, 50, 100)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_interrupted_run_resumes_bit_for_bit(finished, tmp_path, number):
    flags = ["--train", "--out", str(tmp_path / "r"), "--workers", "1"]
    command = [sys.executable, str(ROOT / "d2det.py"), *TINY_RUN, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("step 5/"):
            os.killpg(process.pid, number)  # the loader's workers too, as a scheduler does
            break
    seen += process.stdout.readlines()
    code, text = process.wait(), "".join(seen)
    saved = load_checkpoint(tmp_path / "r" / "last.pt")["step"]
    if number == signal.SIGTERM:
        assert code == 128 + signal.SIGTERM and "stopped by signal" in text, text
        assert 5 <= saved <= 7, text
    else:
        assert code == -signal.SIGKILL and saved < 8, text
    for _ in range(2):  # the second time there is nothing left but to evaluate
        assert run("--train", "--resume", "--out", tmp_path / "r") == finished[1]
        assert same(weights(tmp_path / "r"), weights(finished[0]))
    with open(tmp_path / "r" / "log.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # a kill may tear a line
    run("--train", "--resume", "--out", tmp_path / "r")
    log = [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log if "loss" in r] == list(range(1, 9))  # none twice, none lost


@pytest.mark.parametrize("name", ["bccd", "coco_tiny"])
def test_real_data_trains_evaluates_and_predicts(detection_data, tmp_path, name):
    data = detection_data / name
    flags = ["--data", data, "--steps", "2", "--out", tmp_path, "--score-threshold", "0.05"]
    small = [
        "--preset",
        "tiny",
        "--train",
        "--scales",
        "96",
        "--test-scales",
        "96",
        "--max-size",
        "160",
    ]
    metrics = run(*small, *flags)
    assert 0 <= metrics["AP"] <= 1 and len(metrics["per_class"]) == (3 if name == "bccd" else 80)
    assert ("voc07_AP50" in metrics) == (name == "bccd")
    files = sorted(data.rglob("*.jpg"))[:2]
    results = d2det.main(["--predict", *map(str, files), "--out", str(tmp_path)])
    assert results is None and len(list((tmp_path / "predict" / "pictures").iterdir())) == 2
    again = d2det.main(["--eval", "--out", str(tmp_path)])  # the data's place is remembered too
    assert again == metrics


def test_a_set_without_annotations_is_detected_in_but_not_scored(tmp_path, capsys):
    data = common.SyntheticDetection(2, 64)
    coco = data.coco()
    for image in coco["images"]:
        image["file_name"] = f"{image['id']}.png"
        pixels = data[image["id"]][0].permute(1, 2, 0).numpy()
        common.Image.fromarray(pixels).save(tmp_path / image["file_name"])
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


def test_resume_refuses_other_classes(tmp_path, capsys):
    run("--train", "--out", tmp_path / "r", "--steps", "1")
    state = load_checkpoint(tmp_path / "r" / "last.pt")
    state["categories"][0]["name"] = "another"
    save_checkpoint(tmp_path / "r" / "last.pt", state)
    with pytest.raises(SystemExit):
        run("--train", "--resume", "--out", tmp_path / "r", "--steps", "1")
    assert "categories are others" in capsys.readouterr().err


def test_who_sends_a_third_signal_is_heard_at_once():
    with pytest.raises(KeyboardInterrupt), signals_caught() as caught:
        for i in range(3):
            assert len(caught) == i
            os.kill(os.getpid(), signal.SIGTERM)


def test_an_earlier_run_is_moved_aside(tmp_path):
    for _ in range(2):
        run("--train", "--out", tmp_path / "r", "--steps", "1", "--num-val", "1")
    assert (tmp_path / "r" / "last.pt").exists() and (tmp_path / "r-1" / "last.pt").exists()


@pytest.mark.parametrize("where", ["save", "replace"])
def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch, where):
    path = tmp_path / "last.pt"
    good = {"model": {"w": torch.ones(3)}, "categories": [], "config": {}}
    save_checkpoint(path, good)

    def crash(*args):
        if where == "save":
            args[1].write(b"half of it")
        raise OSError("power cut")

    monkeypatch.setattr(torch if where == "save" else os, where, crash)
    with pytest.raises(common.BadInput, match="cannot write it: power cut"):
        save_checkpoint(path, {"model": {"w": torch.zeros(3)}, "categories": [], "config": {}})
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
    with pytest.raises(SystemExit):
        d2det.main(["--eval", "--data", f"{detection_data}/coco_tiny", "--weights", f"{finished[0]}/last.pt"])  # fmt: skip
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


def test_rows_lists_every_row(capsys):
    d2det.main(["--rows"])
    text = capsys.readouterr().out
    assert "45.4" in text and d2det.PAPER.keys() == d2det.ROWS.keys()
    assert all(row in text for row in d2det.ROWS)


def test_a_row_that_the_checkpoint_contradicts_is_refused(tmp_path, capsys):
    run("--train", "--out", tmp_path / "r")
    run("--eval", "--weights", tmp_path / "r" / "last.pt", "--row", "release.r50")  # the same
    with pytest.raises(SystemExit):
        run("--eval", "--weights", tmp_path / "r" / "last.pt", "--row", "table2.dlr_no_overlap")
    assert "given as flags: --no-drp --no-overlap" in capsys.readouterr().err
    run("--train", "--out", tmp_path / "b", "--row", "table2.baseline", "--scales", 64)
    with pytest.raises(SystemExit):  # that row says nothing of what the baseline leaves out
        run("--eval", "--weights", tmp_path / "b" / "last.pt", "--row", "table2.dlr")
    assert "given as flags: --dlr" in capsys.readouterr().err


def test_non_finite_loss_stops_and_names_it(tmp_path, monkeypatch, capsys):
    def poisoned(self, images, targets):
        losses = original(self, images, targets)
        calls.append(1)
        return {**losses, "cls": losses["cls"] * (math.nan if len(calls) == 5 else 1)}

    calls, original = [], d2det.Detector.loss
    monkeypatch.setattr(d2det.Detector, "loss", poisoned)
    with pytest.raises(SystemExit):
        run("--train", "--out", tmp_path / "r")
    error = capsys.readouterr().err
    assert "step 5, images [" in error and "cls = nan" in error
    state = load_checkpoint(tmp_path / "r" / "last.pt")
    assert state["step"] == 4 and all(v.isfinite().all() for v in state["model"].values())


# ------------------------------------------------------------------------------ processes


DDP = {  # small, and with nothing left to chance: every anchor and RoI takes part
    "d2det": dict(conv_channels=8, num_convs=2, groups=2, jitter=0.0, reg_rois=5000, masks=True),
    "double_head": dict(conv_channels=16),
    "cpm_rcnn": dict(point_channels=1, num_convs=1, grid_rois=5000),
    "iou_aware_retinanet": dict(tower_groups=0),
    "dc_loss_clnms": dict(tower_groups=0, dc_normalise=False),  # which is per process
}


def ddp_model(name):
    method = importlib.import_module(name)
    small = dict(fpn_channels=8, norm="gn", workers=0, batch=2, num_val=5, **DDP[name])
    if issubclass(method.Detector, TwoStage):
        small |= dict(fc_channels=16, roi_samples=5000, proposals_train=50)
    model = method.Detector(dataclasses.replace(method.Config(), **{**method.TINY, **small}), 10)
    if hasattr(model, "rpn"):
        model.rpn.num_samples = 10**6
    for layer in model.modules():  # whose statistics are per process in training
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eval()
    return model


def ddp_items():
    data = common.SyntheticDetection(2, 64, masks=True)
    items = [(image, common.as_transformed(t, (64, 64))) for image, t in (data[1], data[0])]
    return to_device(items, "cpu")


def keep_rois(model, patch):
    """Every loss from now on sees the RoIs of the first: a last bit may decide which they are."""
    first: dict = {}
    if isinstance(model, TwoStage):
        found = model.training_rois

        def training_rois(*args):
            result = found(*args)
            return *result[:3], *first.setdefault("training", result[3:])

        patch.setattr(model, "training_rois", training_rois, raising=False)
    if isinstance(model, cpm_rcnn.Detector):  # whose stages make RoIs of their own
        decode = cpm_rcnn.decode_grid

        def decode_grid(boxes, maps, ratio, sizes):
            return first.setdefault(ratio, decode(boxes, maps, ratio, sizes))

        patch.setattr(cpm_rcnn, "decode_grid", decode_grid)


@pytest.mark.parametrize("name", list(DDP))
def test_losses_under_bf16_are_float32_and_close(name):
    torch.manual_seed(0)
    model, (images, targets) = ddp_model(name), ddp_items()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        keep_rois(model, patch)
        want = model.loss(images, targets)
        with torch.autocast("cpu", torch.bfloat16):
            found = model.loss(images, targets)
    for k, v in found.items():
        rel = 2e-2 if k == "mask_iou" else 2e-3  # whose target counts pixels
        assert v.dtype == torch.float32 and v.item() == pytest.approx(want[k].item(), rel=rel), k
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model.eval().predict(images)[0]["boxes"].dtype == torch.float32


def ddp_process(rank, port, out):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for name in DDP:
        torch.manual_seed(rank)  # DDP sends the first process's weights
        model = ddp_model(name)
        wrapped = torch.nn.parallel.DistributedDataParallel(LossOnly(model))
        images, targets = ddp_items()
        sum(wrapped(images[rank : rank + 1], targets[rank : rank + 1]).values()).backward()
        for buffer in model.buffers():  # as after steps that each process took on its own images
            buffer += rank
        share_buffers(model)
        assert all(b.eq(0).all() for n, b in model.named_buffers() if n.endswith("running_mean"))
        data, config = common.SyntheticDetection(5, 64), model.config
        seen = [t["image_id"] for t, _ in detect(model, data, config, torch.device("cpu"))]
        metrics = evaluate(model, data, config)
        gradients = {n: p.grad for n, p in model.named_parameters()}
        found = {"gradients": gradients, "seen": seen, "AP": metrics["AP"]}
        torch.save(found, f"{out}/{name}{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one_with_both_images(tmp_path):
    mp.spawn(ddp_process, (29500 + os.getpid() % 2000, str(tmp_path)), nprocs=2)
    for name in DDP:
        one, two = (torch.load(tmp_path / f"{name}{r}.pt") for r in range(2))
        torch.manual_seed(0)
        model = ddp_model(name)
        sum(model.loss(*ddp_items()).values()).backward()
        largest = max(p.grad.abs().max().item() for p in model.parameters())
        mine, theirs = one["gradients"], two["gradients"]
        assert all(torch.equal(mine[n], theirs[n]) for n in mine), name
        for n, p in model.named_parameters():
            difference = (mine[n] - p.grad).abs().max().item()
            limit = 1e-4 * max(p.grad.abs().max().item(), 1e-3 * largest)
            assert difference < limit, (name, n)
        assert sorted(one["seen"] + two["seen"]) == [0, 1, 2, 3, 4], name
        assert one["AP"] == two["AP"] and one["AP"] == one["AP"], name


def test_torchrun_trains_and_evaluates(tmp_path):
    for i in range(3):
        image = common.SyntheticDetection(3, 64)[i][0].permute(1, 2, 0).numpy()
        (tmp_path / "in").mkdir(exist_ok=True)
        common.Image.fromarray(image).save(tmp_path / "in" / f"{i}.png")
    command = [*torchrun(2), str(ROOT / "d2det.py"), *TINY_RUN]
    command += ["--train", "--out", str(tmp_path / "r")]
    command += ["--predict", str(tmp_path / "in")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "8 steps of 2 images (2 x 1)" in done.stdout
    state = load_checkpoint(tmp_path / "r" / "last.pt")
    assert len(state["rng"]) == 2
    assert state["config"]["eval_batch"] == 1  # of one process, whoever tests it later
    results = json.loads((tmp_path / "r" / "predict" / "predictions.json").read_text())
    assert {r["image_id"] for r in results} == {0, 1, 2}  # both processes' share
    assert "AP" in json.loads((tmp_path / "r" / "metrics.json").read_text())


def test_readme_snippet_runs():
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (snippet,) = (s for s in snippets if "DenseLocalHead" in s)
    names: dict = {}
    exec(snippet, names)
    assert names["boxes"].shape == (2, 4) and names["inside"].shape == (2, 1, 7, 7)


def test_readme_names_exist_in_the_files_beside_them():
    """In "[file.py](file.py): `name`", the reader's first stop is in that file."""
    links = re.findall(r"\[(\w+\.py)\]\(\1\): `(\w+)`", (ROOT / "README.md").read_text())
    assert len(links) == 5
    for file, name in links:
        assert re.search(rf"^def {name}\b", (ROOT / file).read_text(), re.MULTILINE), (file, name)


BASES = ["faster_rcnn", "cascade_rcnn", "retinanet", "gfl"]
SHARED = ["common", "engine.settings", *(f"baselines.{name}" for name in BASES)]


@pytest.mark.parametrize("name", [*SHARED, *DDP])
def test_every_flag_has_a_help_text(name):
    """tyro takes the comment behind a field, or above it, and drops it where a line is broken."""
    config = importlib.import_module(name).Config
    lines = inspect.getsource(config).splitlines()
    fields = [i for i, line in enumerate(lines) if re.match(r"    \w+: ", line)]
    assert len(fields) == len(config.__annotations__) > 0  # its own, none unseen
    for i in fields:
        above = lines[i - 1] if lines[i - 1].lstrip().startswith("#") else ""
        assert len((lines[i] + above).partition("# ")[2]) >= 12, lines[i]
