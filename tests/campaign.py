"""Kills, broken input and odd flags by the hundred; prints how many ended badly. No part of pytest.

    python tests/campaign.py              # all parts, about an hour on two cores
    python tests/campaign.py kills --kills 12

Each part prints one line: how many cases there were, and how many hung, ended in a traceback,
or, for kills, did not give the weights and the log of a run that nobody killed. A case that ends
badly is printed too. What is refused must be refused by name, with `error:` and code 2; what is
accepted must train a step and be tested.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from data.checks import broken_images  # noqa: E402
from data.images import read_image  # noqa: E402
from engine.checkpoints import load_checkpoint  # noqa: E402

SCRIPTS = "d2det double_head cpm_rcnn iou_aware_retinanet dc_loss_clnms".split()
SMALL = """--image-size 64 --scales 64 --test-scales 64 --max-size 64 --num-train 12 --num-val 4
 --batch 2 --fpn-channels 8 --norm gn --preset tiny --device cpu --log-every 2 --save-every 2
 --eval-every 4 --backbone resnet18 --backbone-weights none""".split()
SLOW = 240  # seconds until a command counts as hanging
ODD = [
    None, "", "x", "1", -1, 0, 1, 2.5, 1e308, -1e308, float("nan"), float("inf"), 2**70, True, [],
    {}, [1], [[1, 2]], {"a": 1}, "\u0000", "../" * 9,
]  # fmt: skip


@dataclass
class Count:
    """What became of the cases of one part."""

    part: str
    cases: int = 0
    refused: int = 0
    bad: dict[str, list] = field(default_factory=dict)

    def add(self, case, verdict: str) -> None:
        """`verdict`: fine, refused, or what went wrong."""
        self.cases += 1
        self.refused += verdict == "refused"
        if verdict not in ("fine", "refused"):
            self.bad.setdefault(verdict.split(":")[0], []).append(case)
            print(f"  {self.part}: {case}: {verdict.splitlines()[0]}", flush=True)

    def show(self) -> None:
        kinds = "hang, traceback, silent, differs".split(", ")
        bad = ", ".join(f"{len(self.bad.get(kind, []))} {kind}" for kind in kinds)
        print(f"{self.part}: {self.cases} cases, {self.refused} refused by name; {bad}", flush=True)


# ------------------------------------------------------------------------------ kills


def result(folder: Path):
    """A run's weights, and its log without what depends on the machine's speed."""
    weights = load_checkpoint(folder / "last.pt")["model"]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    speed = ("images_per_s", "memory_mib")
    return weights, [{k: v for k, v in line.items() if k not in speed} for line in lines]


def kills(count: Count, work: Path, number: int, chance: random.Random) -> None:
    """Each script once whole; then killed at random moments, and resumed until it is done."""
    for script in SCRIPTS:
        command = [sys.executable, str(ROOT / f"{script}.py"), *SMALL, "--train", "--steps", "10"]
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        begun = time.perf_counter()
        subprocess.run([*command, "--out", str(work / script)], check=True, **options)
        seconds, whole = time.perf_counter() - begun, result(work / script)
        for i in range(number):
            out, verdict, moments = work / f"{script}_{i}", "fine", []
            for _ in range(20):
                resumed = [*command, "--out", str(out), "--resume"]
                process = subprocess.Popen(resumed, start_new_session=True, **options)
                moments.append(round(chance.uniform(0.2, 1.1) * seconds, 2))
                if len(moments) > 3:
                    moments[-1] = SLOW  # at last it may end
                try:
                    text = process.communicate(timeout=moments[-1])[0]
                except subprocess.TimeoutExpired:
                    if moments[-1] == SLOW:
                        verdict = "hang"
                    how = chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
                    os.killpg(process.pid, how)
                    try:
                        text = process.communicate(timeout=SLOW)[0]
                    except subprocess.TimeoutExpired:
                        verdict = f"hang: after signal {how}"
                        os.killpg(process.pid, signal.SIGKILL)
                        text = process.communicate()[0]
                if "Traceback" in text and process.returncode not in (-2, 1, 130):
                    verdict = f"traceback: {text[-300:]}"
                if process.returncode == 0 or verdict != "fine":
                    break
            if verdict == "fine":
                weights, log = result(out)
                same = all(torch.equal(weights[k], v) for k, v in whole[0].items())
                verdict = "fine" if same and log == whole[1] else f"differs: weights equal: {same}"
            count.add(f"{script}, killed after {moments} s", verdict)


# ------------------------------------------------------------------------------ input


def folder_of_images(folder: Path) -> dict:
    """Six random images and their annotations, which train and test."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for i in range(1, 7):
        pixels = rng.integers(0, 255, (48, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.jpg")
        images.append({"id": i, "file_name": f"{i}.jpg", "height": 48, "width": 64})
        box = {"bbox": [5, 4, 30, 30], "area": 900, "iscrowd": 0}
        annotations.append({"id": i, "image_id": i, "category_id": 1 + i % 2, **box})
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def attempt(argv: list[str], script: str = "d2det") -> str:
    """Run a script in this process: refused, fine, or a traceback's last line."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            importlib.import_module(script).main(argv)
        return "fine"
    except SystemExit as e:
        if e.code in (130, 143):  # it is the campaign that is to end
            raise
        said = errors.getvalue()
        words = ("error", "invalid", "missing", "─")
        named = e.code == 2 and any(word in said.lower() for word in words)
        return "refused" if named else f"silent: code {e.code}"
    except BaseException as e:  # whatever it is, a user would have seen a traceback
        return f"traceback: {type(e).__name__}: {e}"


HEADS = """--conv-channels 8 --num-convs 1 --groups 2 --fc-channels 8 --proposals-train 40
 --proposals-test 20 --workers 0""".split()


def annotations(count: Count, work: Path) -> None:
    """Every entry of a COCO file replaced by every odd value, left out, and given twice."""
    good = folder_of_images(work)
    places = [("images", key) for key in good["images"][0]]
    places += [("annotations", key) for key in (*good["annotations"][0], "bbox.0", "bbox.3")]
    places += [("categories", key) for key in good["categories"][0]]
    path, images = work / "train.json", str(work / "images")
    (work / "good.json").write_text(json.dumps(good))

    def case(name: str, broken: dict, split: str) -> None:
        path.write_text(json.dumps(broken))
        files = {"train": work / "good.json", "val": work / "good.json", split: path}
        flags = [f"--train-json={files['train']}", f"--val-json={files['val']}"]
        flags += [f"--train-images={images}", f"--val-images={images}"]
        flags += ["--train", "--steps", "1", "--out", str(work / "run"), "--eval-every", "0"]
        count.add(f"{split}: {name}", attempt([*SMALL, *HEADS, *flags]))

    for split in ("train", "val"):
        for kind, key in places:
            for value in ODD:
                broken = copy.deepcopy(good)
                entry, name = broken[kind][1], key
                if "." in key:
                    entry, name = entry["bbox"], int(key[-1])
                entry[name] = value
                case(f"{kind}[1].{key} = {value!r}", broken, split)
            if "." not in key:
                broken = copy.deepcopy(good)
                del broken[kind][1][key]
                case(f"{kind}[1] without {key}", broken, split)
        for kind in good:
            for value in (None, {}, [], "x", good[kind] * 2):
                case(f"{kind} = {str(value)[:20]}", {**good, kind: value}, split)


def images(count: Count, work: Path, chance: random.Random) -> None:
    """Bytes of images changed, cut, inserted: what the check lets pass must be readable."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8))
    for kind, i in ((kind, i) for kind in ("jpg", "png", "bmp", "gif", "tif") for i in range(60)):
        file = work / f"{i}.{kind}"
        picture.save(file)
        data = bytearray(file.read_bytes())
        for _ in range(chance.choice([1, 4, 40])):
            at = chance.randrange(len(data))
            data[at] = chance.randrange(256)
        if i % 3 == 0:
            data = data[: chance.randrange(len(data))]
        file.write_bytes(data)
        try:
            problem = broken_images([file])
            verdict = "refused" if problem else "fine"
            if not problem:
                read_image(file)
        except BaseException as e:
            verdict = f"traceback: {type(e).__name__}: {e}"
        count.add(file.name, verdict)


def flags(count: Count, work: Path) -> None:
    """Every flag with odd values: refused by name, or a step is trained and tested with it."""
    settings = importlib.import_module("d2det").Settings().flat()
    skip = "data out weights row train_json val_json train_images val_images predict device".split()
    for name in (name for name in settings if name not in skip):
        if isinstance(settings[name], bool):
            continue
        for value in ("nan", "inf", "-1", "0", "1e9", "x", "", "99999999999999999999"):
            argv = [*SMALL, *HEADS, "--train", "--steps", "1", "--out", str(work / "run")]
            counts = name in ("epochs", "num_train", "num_val", "image_size")
            if counts and value[:3] in "1e9 999":
                continue  # allowed, and very long
            if name in ("steps", "scales", "test_scales", "workers") and value[:1] in "19":
                continue
            count.add(f"--{name} {value}", attempt([*argv, f"--{name.replace('_', '-')}", value]))


# ------------------------------------------------------------------------------ own data sets


def own_data(count: Count, work: Path) -> None:
    """Data sets of one's own, each with one fault: refused by the name of the item or field."""
    from matplotlib.figure import Figure
    from methods import build, settings_of
    from own_data import (
        EMPTY,
        ITEM_FAULTS,
        MEMBER_FAULTS,
        RIGHT,
        RIGHT_TRUTH,
        TRUTH_FAULTS,
        OwnData,
    )

    import engine
    from baselines import retinanet
    from common import BadInput

    Figure.savefig = lambda figure, path, **_: Path(path).touch()  # drawing takes longest
    settings = settings_of(
        retinanet, scales=(64,), test_scales=(64,), max_size=128, batch=2, steps=4, workers=0,
        fpn_channels=8, tower_convs=1, tower_groups=0, norm="gn", device="cpu",
    )  # fmt: skip

    def case(name: str, train: dict, val: dict, wrong: bool = True, early: bool = True) -> None:
        out = work / str(count.cases)
        torch.manual_seed(0)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                model = build(retinanet, settings, 2)
                engine.train(model, settings, OwnData(**train), OwnData(**val), out)
            verdict = "silent" if wrong else "fine"
        except BadInput as e:
            verdict = "refused" if wrong else f"differs: refused: {e}"
            if early and out.exists():
                verdict = f"silent: until training was done: {e}"
        except Exception as e:
            verdict = f"traceback: {type(e).__name__}: {e}"
        count.add(name, verdict)

    for name, fault in ITEM_FAULTS.items():
        for first in (0, 5):
            faults = {key: (first, change) for key, change in fault.items()}
            case(f"train: {name} from item {first}", faults, {}, early=not first)
            case(f"val: {name} from item {first}", {}, faults, early=not first)
    for name, faults in MEMBER_FAULTS.items():
        case(f"train: {name}", faults, {})
        case(f"val: {name}", {}, faults)
    for name, faults in EMPTY.items():
        case(f"train: {name}", faults, {})
    for name, faults in TRUTH_FAULTS.items():
        case(f"val: {name}", {}, faults, early="later" not in name)
    for name, right in RIGHT.items():
        case(f"train: {name}", right, {}, wrong=False)
        case(f"val: {name}", {}, right, wrong=False)
    for name, right in RIGHT_TRUTH.items():
        case(f"val: {name}", {}, right, wrong=False)


# ------------------------------------------------------------------------------ studies

# Of each study: whose checkpoint it takes ("": none), and its own options.
STUDIES = {
    "alignment": ("iou_aware_retinanet", "also"),
    "assignment": ("dc_loss_clnms", ""),
    "explain": ("d2det", "detection"),
    "sections": ("double_head", "objects"),
    "sweep": ("dc_loss_clnms", ""),
    "bench": ("", ""),
    "compare": ("", ""),
    "cost": ("", "image"),
}


def studies(count: Count, work: Path) -> None:
    """Every study with odd options, folders that cannot be written, and others' checkpoints."""
    from matplotlib.figure import Figure

    Figure.savefig = lambda figure, path, **_: Path(path).touch()  # drawing takes longest
    run = [*SMALL, *"--train --steps 1 --workers 0".split()]
    for script in SCRIPTS:
        done = attempt([*run, "--out", str(work / script)], script)
        assert done == "fine", f"{script}: {done}"
    (work / "file").touch()
    for study in STUDIES:
        one_study(count, work, study)


def one_study(count: Count, work: Path, study: str) -> None:
    method, options = STUDIES[study]
    weights = str(work / method / "last.pt")
    few = "--num-val 2 --workers 0 --device cpu".split()
    base = {
        "bench": ["d2det"],
        "compare": ["d2det", "--seeds", "0"],
        "cost": ["d2det"],
        "explain": [method, "0", "--weights", weights, *few],
        "models": ["--models", weights, *few],
    }.get(study, [method, "--weights", weights, *few])

    def case(*flags: str, out: str = str(work / study), refused: bool = False) -> None:
        verdict = attempt([*base, *flags, "--out", out], f"studies.{study}")
        if refused and verdict == "fine":
            verdict = "silent: accepted"
        count.add(f"{study} {' '.join(flags)} --out {out}", verdict)

    for out in ("/proc/nothing", str(work / "file"), str(work / "file" / "below")):
        case(out=out, refused=True)
    for option in options.split():
        for value in ("", "-1", "nan", "x", "9" * 20, "1e9", "a a"):
            case(f"--{option}", *value.split())
        case(f"--{option}", "")
    if method:
        case()
    for other in SCRIPTS:
        if method and other != method and study != "models":  # which takes any
            case("--weights", str(work / other / "last.pt"), refused=True)


# ------------------------------------------------------------------------------ command line

# those of the last line are in campaign_runs.py
PARTS = ("annotations", "images", "flags", "own_data", "studies", "kills",
         "signals", "pairs", "disks", "bits", "entries")  # fmt: skip


@dataclass
class Options:
    part: Annotated[
        Literal["all", *PARTS],  # type: ignore[valid-type]
        tyro.conf.Positional,
    ] = "all"
    kills: int = 9  # of each script
    seed: int = 0


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    chance, torch_threads = random.Random(options.seed), torch.get_num_threads()
    print(f"torch {torch.__version__}, {torch_threads} threads, seed {options.seed}")
    runs = vars(importlib.import_module("campaign_runs"))
    for part in PARTS:
        if options.part not in ("all", part):
            continue
        count, begun = Count(part), time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            drawn = dict.fromkeys(("images", "bits", "entries"), (chance,))
            drawn["kills"] = (options.kills, chance)
            (globals().get(part) or runs[part])(count, Path(folder), *drawn.get(part, ()))
        count.show()
        print(f"  {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
