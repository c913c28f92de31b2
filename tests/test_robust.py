"""What goes wrong outside of a laboratory: broken files, full disks, kills, odd flags. No hang, no
traceback, nothing silent."""

import importlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import ROOT, TINY_RUN, run

import d2det
import engine
from common import BadInput
from data import Data, load
from data.checks import broken_images
from data.contract import make_target
from data.images import read_image
from engine.checkpoints import load_checkpoint, save_checkpoint

NO_DOWNLOAD = ["--backbone", "small", "--backbone-weights", "none"]
pytestmark = pytest.mark.usefixtures("unpainted")
SLOW = 120  # seconds: no command here takes as many, unless it hangs


def coco(folder: Path, images: int = 6) -> Path:
    """Random images of 48 x 64 px, two boxes each, in COCO's layout; training and validation."""
    rng = np.random.default_rng(0)
    for split in ("train2017", "val2017"):
        (folder / split).mkdir(parents=True)
        listed, annotations = [], []
        for i in range(1, images + 1):
            pixels = rng.integers(0, 255, (48, 64, 3), np.uint8)
            Image.fromarray(pixels).save(folder / split / f"{i}.jpg")
            listed.append({"id": i, "file_name": f"{i}.jpg", "height": 48, "width": 64})
            for k in (0, 1):
                box = {"bbox": [5 + 9 * k, 4, 30, 30], "area": 900, "iscrowd": 0}
                annotations.append({"id": 2 * i + k, "image_id": i, "category_id": k + 1, **box})
        categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
        whole = {"images": listed, "annotations": annotations, "categories": categories}
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(whole))
    return folder


def edit(folder: Path, change, split: str = "train") -> None:
    path = folder / "annotations" / f"instances_{split}2017.json"
    whole = json.loads(path.read_text())
    change(whole)
    path.write_text(json.dumps(whole))


def refused(code: int, text: str, *parts) -> None:
    assert code == 2 and "Traceback" not in text and "error: " in text, text
    assert all(str(part) in text for part in parts), text


# ------------------------------------------------------------------------------ images


def jpeg(size=(64, 48)) -> bytes:
    file, rng = io.BytesIO(), np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def png_damaged_in_its_middle() -> bytes:
    file, rng = io.BytesIO(), np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8)).save(file, "PNG")
    data = bytearray(file.getvalue())
    middle = len(data) // 2
    data[middle : middle + 40] = bytes(40)
    return bytes(data)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("data", [jpeg()[:700], png_damaged_in_its_middle(), POSTSCRIPT, b""])
def test_an_image_that_cannot_be_decoded_is_found_at_the_check(tmp_path, data):
    path = tmp_path / "x.jpg"
    path.write_bytes(data)
    problem = broken_images([path])[0]
    assert problem.startswith(f"{path}: cannot read the image: ")
    with pytest.raises(BadInput, match="x.jpg: cannot read the image"):
        read_image(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    assert "not a file" in broken_images([tmp_path / "x.jpg"])[0]


def test_what_a_decoder_raises_is_bad_input(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    for error in (RecursionError, OverflowError, RuntimeError, subprocess.SubprocessError):
        with monkeypatch.context() as m:
            m.setattr(Image.Image, "convert", lambda *_, e=error: (_ for _ in ()).throw(e("odd")))
            with pytest.raises(BadInput, match="x.png: cannot read the image: odd"):
                read_image(tmp_path / "x.png")


def test_an_image_that_breaks_during_training_ends_it(tmp_path):
    """With worker processes, which a mere exit would wait for: they ignore SIGTERM."""
    folder = coco(tmp_path / "data")
    script = tmp_path / "later.py"  # the check passes, and then the files go
    script.write_text(
        f"import sys, pathlib; sys.path.insert(0, {str(ROOT)!r})\n"
        "import d2det\n"
        "module = sys.modules['engine.train']\n"
        "begin = module.describe\n"
        "def break_and_begin(*args):\n"
        f"    for f in pathlib.Path({str(folder)!r}, 'train2017').iterdir():\n"
        "        f.write_bytes(b'gone')\n"
        "    return begin(*args)\n"
        "module.describe = break_and_begin\n"
        "d2det.main()\n"
    )
    flags = ["--train", "--data", folder, "--workers", "2", "--out", tmp_path / "r", *NO_DOWNLOAD]
    line = [sys.executable, str(script), *TINY_RUN, *map(str, flags)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=SLOW)
    refused(done.returncode, done.stderr, ".jpg: cannot read the image")
    assert done.stderr.startswith("error: /")  # the reason, not a worker's traceback


def test_a_thin_image_is_drawn_small(tmp_path):
    image = torch.zeros(3, 1, 3000, dtype=torch.uint8)
    target = make_target(torch.tensor([[5.0, 0, 90, 1]]), [0], [False], 0, (1, 3000))

    class One:
        categories = [{"id": 1, "name": "cat"}]
        __len__ = lambda self: 1  # noqa: E731
        __getitem__ = lambda self, i: (image, target)  # noqa: E731

    seen = []
    grid = sys.modules["engine.pictures"]
    original, grid.draw = grid.draw, lambda picture, *a: seen.append(picture.numel()) or picture
    try:
        grid.draw_grid(One(), [], 0.5, tmp_path / "x.png")
    finally:
        grid.draw = original
    assert max(seen) < 10**7


# ------------------------------------------------------------------------------ annotations

ODD = {
    "bbox is": lambda a: a.update(bbox=["5", 1, 2, 3]),
    "not four numbers": lambda a: a.update(bbox=[[1], 2, 3, 4]),
    "bbox is {": lambda a: a.update(bbox={"x": 1}),
    "has no bbox": lambda a: a.pop("bbox"),
    "area is 'big'": lambda a: a.update(area="big"),
    "area is nan": lambda a: a.update(area=float("nan")),
    "iscrowd is '0'": lambda a: a.update(iscrowd="0"),
    "has no image '1'": lambda a: a.update(image_id="1"),
    "image_id is [1]": lambda a: a.update(image_id=[1]),
    "unknown category '1'": lambda a: a.update(category_id="1"),
}


@pytest.mark.parametrize("message", ODD)
@pytest.mark.parametrize("split", ["train", "val"])
def test_odd_annotations_are_refused_at_load(tmp_path, message, split):
    folder = coco(tmp_path)
    edit(folder, lambda whole: ODD[message](whole["annotations"][3]), split)
    with pytest.raises(BadInput, match=f"instances_{split}2017.json: annotation 5") as e:
        load(Data(data=str(folder)))
    assert message in str(e.value)


WHOLE = {
    "name is 7": lambda w: w["categories"][0].update(name=7),
    "id 1 of categories occurs more than once": lambda w: w["categories"][1].update(id=1),
    "ids of images are numbers and strings": lambda w: w["images"][0].update(id="one"),
    "height is '48'": lambda w: w["images"][0].update(height="48"),
    "-1 x 64 px": lambda w: w["images"][0].update(height=-1),
    "annotations is no list": lambda w: w.update(annotations={}),
    "annotations[0] is no object": lambda w: w["annotations"].insert(0, 3),
    "no images and categories": lambda w: w.pop("images"),
}


@pytest.mark.parametrize("message", WHOLE)
def test_odd_files_are_refused_at_load(tmp_path, message):
    folder = coco(tmp_path)
    edit(folder, WHOLE[message])
    with pytest.raises(BadInput, match="instances_train2017.json: ") as e:
        load(Data(data=str(folder)))
    assert message in str(e.value)


def test_a_set_without_objects_has_no_ap(tmp_path):
    folder = coco(tmp_path / "data")
    edit(folder, lambda whole: whole["annotations"].clear(), "val")
    metrics = run(
        "--train", "--data", folder, "--steps", "1", "--out", tmp_path / "r", *NO_DOWNLOAD
    )
    assert metrics["AP"] is None


# ------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with two evaluations on the way, and a log line every three steps."""
    out = tmp_path_factory.mktemp("robust") / "whole"
    return out, run("--train", "--out", out, *WITH_TESTS)


WITH_TESTS = ["--eval-every", "3", "--log-every", "3", "--save-every", "1", "--steps", "9"]


SPEED = ("images_per_s", "memory_mib")


def log(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k not in SPEED} for x in lines]


TWICE = """
import os, runpy, sys
script, *argv = sys.argv[1:]
stops = [("step 3/", 15), ("step 9/", 9)]

class Watched:
    def write(self, text):
        sys.__stdout__.write(text)
        if stops and text.startswith(stops[0][0]):
            sys.__stdout__.flush()
            os.killpg(0, stops.pop(0)[1])  # the loader's workers too, as a scheduler does

    flush = sys.__stdout__.flush

sys.stdout = Watched()
for more in ([], ["--resume"]):
    sys.argv = [script, *argv, *more]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print("ended with", end.code)
"""


def test_interrupted_run_resumes_bit_for_bit(whole, tmp_path):
    """A SIGTERM ends it behind a step; resumed, a SIGKILL takes its last step."""
    flags = ["--train", "--out", str(tmp_path / "r"), *WITH_TESTS]
    often = ["--workers", "1", "--save-every", "2"]
    done = subprocess.run(
        [sys.executable, "-c", TWICE, str(ROOT / "d2det.py"), *TINY_RUN, *flags, *often],
        capture_output=True, text=True, timeout=SLOW, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    text = done.stdout + done.stderr
    assert done.returncode == -signal.SIGKILL, text
    assert "r/last.pt holds step 3 of 9; --resume" in text and "ended with 143" in text, text
    assert "resumed at step 3" in text
    state = load_checkpoint(tmp_path / "r" / "last.pt")
    assert state["step"] == 8 and state["method"] == "d2det"
    with open(tmp_path / "r" / "log.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # a kill may tear a line
    for _ in range(2):  # the second time there is nothing left but to evaluate
        metrics = run(*flags, "--resume")
        assert metrics == whole[1] and log(tmp_path / "r") == log(whole[0])
        mine, theirs = (load_checkpoint(f / "last.pt") for f in (tmp_path / "r", whole[0]))
        assert all(torch.equal(mine["model"][k], theirs["model"][k]) for k in theirs["model"])


def test_an_evaluation_that_a_kill_cut_off_is_made_up_for(whole, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(sys.modules["engine.train"], "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            run("--train", "--out", tmp_path / "r", *WITH_TESTS)
    assert load_checkpoint(tmp_path / "r" / "last.pt")["step"] == 3
    run("--train", "--out", tmp_path / "r", *WITH_TESTS, "--resume")
    assert log(tmp_path / "r") == log(whole[0])


def test_resume_knows_a_run_without_a_checkpoint(tmp_path, capsys):
    folder = coco(tmp_path / "data")
    flags = ["--data", str(folder), "--steps", "2", "--seed", "5", *NO_DOWNLOAD]
    run("--train", *flags, "--out", tmp_path / "whole")
    run("--train", *flags, "--out", tmp_path / "r")
    (tmp_path / "r" / "last.pt").unlink()  # as if it was killed before the first
    with pytest.raises(SystemExit):
        run("--train", "--resume", *flags, "--out", tmp_path / "r", "--seed", "6")
    assert "config.json: cannot resume, the run was made with --seed 5" in capsys.readouterr().err
    d2det.main(["--train", "--resume", "--out", f"{tmp_path}/r", "--workers", "0"])
    mine, theirs = (load_checkpoint(tmp_path / f / "last.pt") for f in ("r", "whole"))
    assert all(torch.equal(mine["model"][k], theirs["model"][k]) for k in theirs["model"])


@pytest.mark.parametrize("change", ["box", "image"])
def test_resume_refuses_other_data(tmp_path, capsys, change):
    folder = coco(tmp_path / "data")
    flags = ["--train", "--data", folder, "--out", tmp_path / "r", *NO_DOWNLOAD]
    run(*flags, "--steps", "2")

    def box(whole):
        whole["annotations"][0]["bbox"][0] += 1

    def image(whole):
        gone = whole["images"].pop()["id"]
        whole["annotations"] = [a for a in whole["annotations"] if a["image_id"] != gone]

    edit(folder, {"box": box, "image": image}[change])
    with pytest.raises(SystemExit):
        run(*flags, "--resume", "--steps", "2")
    assert "the training images or boxes are others now" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_neither_saved_nor_used(tmp_path, capsys, monkeypatch):
    out = tmp_path / "r"
    with monkeypatch.context() as m:
        m.setattr(sys.modules["engine.train"], "learning_rate", lambda *_: float("inf"))
        with pytest.raises(SystemExit):
            run("--train", "--out", out, "--steps", "1")
    assert "weights are not finite" in capsys.readouterr().err and not (out / "last.pt").exists()
    with monkeypatch.context() as m:
        wrong = lambda *_: torch.tensor(float("nan"))  # noqa: E731
        m.setattr(torch.nn.utils, "get_total_norm", wrong)
        with pytest.raises(SystemExit):
            run("--train", "--out", out, "--steps", "1")
    assert "gradient norm = nan" in capsys.readouterr().err
    run("--train", "--out", out, "--steps", "1")
    state = load_checkpoint(out / "last.pt")
    next(iter(state["model"].values())).fill_(float("nan"))
    save_checkpoint(out / "last.pt", state)
    image = tmp_path / "a.png"
    Image.new("RGB", (64, 64)).save(image)
    with pytest.raises(SystemExit):
        run("--predict", image, "--weights", out / "last.pt", "--out", tmp_path / "p")
    assert "last.pt: 1 of its tensors are not finite" in capsys.readouterr().err


def test_one_image_of_a_cell_cannot_be_batch_normalised(tmp_path, capsys):
    small = ["--image-size", "32", "--scales", "32", "--test-scales", "32", "--max-size", "32"]
    with pytest.raises(SystemExit):
        run("--train", "--out", tmp_path / "r", *small, "--batch", "1", "--norm", "bn")
    assert "--norm gn" in capsys.readouterr().err


# ------------------------------------------------------------------------------ outputs


def test_output_errors_come_first_and_are_said(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for out in ("file", "file/below", "loop/below", "n" * 300):
        with pytest.raises(SystemExit):
            run("--train", "--out", tmp_path / out)
        text = capsys.readouterr().err
        assert text.startswith("error: ") and str(tmp_path / out) in text, text
    monkeypatch.chdir(tmp_path)
    for out in (".", ".."):
        with pytest.raises(SystemExit):
            run("--train", "--out", out)
        assert "is no place for results" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device here")
def test_a_full_disk_leaves_no_temporary_file(tmp_path, monkeypatch):
    (tmp_path / ".last.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(BadInput, match="last.pt: cannot write it"):
        save_checkpoint(tmp_path / "last.pt", {"a": torch.zeros(10**6)})
    assert not list(tmp_path.iterdir())


def test_predictions_do_not_mix_with_earlier_ones(whole, tmp_path, capsys):
    for name in ("a", "b"):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
        flags = ["--weights", whole[0] / "last.pt", "--out", tmp_path / "r"]
        run("--predict", tmp_path / f"{name}.png", *flags)
    folders = sorted((tmp_path / "r").iterdir())
    assert [f.name for f in folders] == ["predict", "predict-1"]
    pictures = [[p.name for p in (f / "pictures").iterdir()] for f in folders]
    assert pictures == [["00000_b.jpg"], ["00000_a.jpg"]]
    with pytest.raises(SystemExit):  # found before the training starts
        run("--train", "--predict", tmp_path / "c.png", "--out", tmp_path / "r")
    assert "c.png: no such file" in capsys.readouterr().err


# ------------------------------------------------------------------------------ flags

FLAGS = """--lr nan|--lr -1|--flip 2|--flip -0.1|--scales 0|--scales|--epochs inf|--lr-batch -4
--frozen-stages 9|--num-train 0|--image-size 8|--max-size 3|--seed -1|--workers -2|--batch -1
--momentum 1.5|--weight-decay nan|--steps -1|--drops 2|--warmup -1|--warmup-factor 2|--clip-norm -1
--log-every 0|--save-every 0|--eval-every -1|--draw-score nan|--score-threshold 2|--nms-iou -0.1
--roi-positive 1.5|--roi-samples 0|--max-detections 0|--conv-channels 0|--reg-weight inf|--jitter 3
--soft-nms-iou 2|--proposals-test 0|--groups 0|--test-scales -5|--fpn-channels 0
--anchor-scale -1"""


@pytest.mark.parametrize("given", FLAGS.replace("\n", "|").split("|"))
def test_flags_out_of_range_are_refused_by_name(given, capsys):
    with pytest.raises(SystemExit) as e:
        d2det.main(["--train", "--out", "/nowhere", *given.split()])
    text = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert e.value.code == 2 and given.split()[0] in text, text
    assert any(word in text for word in ("at least", "at most", "finite")), text


@pytest.mark.parametrize("name, given", [
    ("d2det", "--groups 5"),
    ("d2det", "--conv-channels 100"),
    ("cpm_rcnn", "--groups 5"),
    ("baselines.gfl", "--tower-groups 3"),
    ("d2det", "--metric-sides 96 32 0"),
    ("d2det", "--metric-detections 100 10"),
    ("d2det", "--test-scales 1"),
])  # fmt: skip
def test_networks_and_tests_that_cannot_be_are_refused_by_name(name, given, tmp_path, capsys):
    small = "--num-train 4 --num-val 2 --steps 1 --device cpu --workers 0".split()
    with pytest.raises(SystemExit) as e:
        importlib.import_module(name).main(
            ["--train", "--out", f"{tmp_path}", *small, *given.split()]
        )
    text = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert e.value.code == 2 and given.split()[0] in text and "error" in text.lower(), text


def test_the_checkpoint_of_another_script_is_refused(whole, tmp_path, capsys):
    state = load_checkpoint(whole[0] / "last.pt")
    for made_by, name in (("d2det", "double_head"), ("baselines.faster_rcnn", "d2det")):
        save_checkpoint(tmp_path / "last.pt", {**state, "method": made_by})
        for action in (["--eval"], ["--train", "--resume"]):
            with pytest.raises(SystemExit) as e:
                weights = ["--weights", f"{tmp_path}/last.pt"] if action == ["--eval"] else []
                importlib.import_module(name).main([*action, *weights, "--out", f"{tmp_path}"])
            text, made_by = capsys.readouterr().err, made_by.rpartition(".")[2]
            assert e.value.code == 2
            assert f"last.pt: a checkpoint of {made_by}, not of {name}" in text
    save_checkpoint(tmp_path / "last.pt", {**state, "method": "of_somebody"})
    run("--eval", "--weights", tmp_path / "last.pt", "--out", tmp_path / "r")


def test_a_checkpoint_edited_by_hand_is_refused(whole, tmp_path, capsys):
    state = load_checkpoint(whole[0] / "last.pt")
    for part, key, value in (
        ("test", "nms_iou", "high"),
        ("data", "scales", []),
        ("model", "norm", "odd"),
        ("model", "dlr", 1),
    ):
        settings = {**state["settings"], part: {**state["settings"][part], key: value}}
        save_checkpoint(tmp_path / "x.pt", {**state, "settings": settings})
        with pytest.raises(SystemExit):
            d2det.main(["--eval", "--weights", f"{tmp_path}/x.pt", "--out", f"{tmp_path}/r"])
        assert f"--{key.replace('_', '-')}" in capsys.readouterr().err
        with pytest.raises(BadInput, match=key.replace("_", "-")):
            engine.load(tmp_path / "x.pt")
    with pytest.raises(BadInput, match="nonsense"):
        engine.load(whole[0] / "last.pt", nonsense=1)


def test_help_into_a_closed_pipe(tmp_path):
    line = f"{sys.executable} {ROOT / 'd2det.py'} --help | head -1; sleep 0.1"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=SLOW)
    assert "Traceback" not in done.stderr, done.stderr
