"""Parts of the campaign about runs: signals, two runs at once, small disks, damaged checkpoints."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from campaign import HEADS, ODD, ROOT, SCRIPTS, SLOW, SMALL, attempt, folder_of_images, result

import engine
from common import BadInput
from engine.checkpoints import load_checkpoint, save_checkpoint

RUN = [*SMALL, *HEADS, "--train", "--steps", "8", "--backbone", "small"]


@contextlib.contextmanager
def alarm(seconds: int = SLOW) -> Iterator[None]:
    """TimeoutError if the block takes longer."""

    def ring(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tried(action: Callable[[], object]) -> str:
    """The verdict on what may end, or raise BadInput."""
    try:
        with alarm():
            action()
        return "fine"
    except BadInput:
        return "refused"
    except TimeoutError:
        return "hang"
    except KeyboardInterrupt:
        raise
    except BaseException as e:
        return f"traceback: {type(e).__name__}: {e}"


def same(a: Path, b: Path) -> bool:
    """Whether two runs have the same weights and the same log."""
    (weights, log), (others, other_log) = result(a), result(b)
    return log == other_log and all(torch.equal(weights[k], v) for k, v in others.items())


# ------------------------------------------------------------------------------ signals

PLACES = """command.parse command.load_data command.execute command.check_folder
 detector.ResNetFPN train.check_data train.make_optimizer train.resume_or_start train.write_json
 train.describe train.make_loader train.take_step train.report train.save_run train.evaluate
 metrics.detect_under metrics.candidates_by_size metrics.to_coco metrics.coco_metrics
 metrics.draw_grid metrics.write_json checkpoints.draw_curves train.show_metrics
 command.show_per_class command.predict_files predict.broken_images predict.draw""".split()


def signals(count, work: Path) -> None:
    """Each signal where each of PLACES first begins, once and thrice; resumed, the run is whole."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and runs go on
    folder_of_images(work / "photos")
    photo = work / "photos" / "images" / "1.jpg"
    d2det = importlib.import_module("d2det")
    whole = [*RUN, "--predict", str(photo)]
    with contextlib.redirect_stdout(io.StringIO()):
        d2det.main([*whole, "--out", str(work / "whole")])
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for place, number, times in ((p, n, t) for p in PLACES for n in numbers for t in (1, 3)):
        out, name = work / "run", f"{place}, signal {int(number)} x {times}"
        shutil.rmtree(out, ignore_errors=True)
        verdict, said = signalled(place, number, times, [*whole, "--out", str(out)])
        if verdict == "fine" and said.count(f"stopped by signal {int(number)}: ") != 1:
            verdict = f"silent: {said[-200:]}"
        left = [p.name for p in out.rglob(".*") if p.is_file()]
        if verdict == "fine" and left:
            verdict = f"silent: {left} left"
        if verdict == "fine":
            verdict = attempt([*whole, "--out", str(out), "--resume"])
        if verdict == "fine" and not same(out, work / "whole"):
            verdict = "differs"
        count.add(name, verdict)


def signalled(place: str, number: int, times: int, argv: list[str]) -> tuple[str, str]:
    """D2Det in this process, signalled where a function begins: the verdict, and what it said."""
    module, _, name = place.rpartition(".")
    module, sent = sys.modules[f"engine.{module}"], []
    original = getattr(module, name)

    def first(*args, **options):
        while len(sent) < times:
            sent.append(os.kill(os.getpid(), number))
        return original(*args, **options)

    setattr(module, name, first)
    said = io.StringIO()
    try:
        with alarm(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            importlib.import_module("d2det").main(argv)
        verdict = "silent: it went on"
    except SystemExit as e:
        verdict = "fine" if e.code == 128 + number else f"silent: code {e.code}"
    except TimeoutError:
        verdict = "hang"
    except BaseException as e:
        verdict = f"traceback: {type(e).__name__}: {e}"
    finally:
        setattr(module, name, original)
    return verdict, said.getvalue()


# ------------------------------------------------------------------------------ two runs


def pairs(count, work: Path) -> None:
    """A second command in the folder of a run that goes on: refused, and the run is unharmed."""
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seconds = {
        "another seed": ["--seed", "2", "--steps", "4"],
        "resume": ["--resume"],
        "resume and predict": ["--resume", "--predict", "."],
    }
    for script in SCRIPTS:
        run = [*SMALL, "--train", "--steps", "12", "--save-every", "1"]
        line = [sys.executable, str(ROOT / f"{script}.py"), *run, "--out"]
        subprocess.run([*line, str(work / f"{script}_whole")], check=True, **options)
        for other in (script, SCRIPTS[SCRIPTS.index(script) - 1]):
            for name, more in seconds.items():
                out = work / f"{script}_{other}_{name}".replace(" ", "_")
                first = subprocess.Popen([*line, str(out)], **options)
                while first.poll() is None and not (out / "last.pt").exists():
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        first.wait(0.05)
                first.send_signal(signal.SIGSTOP)  # it goes on when the other has ended
                second = [sys.executable, str(ROOT / f"{other}.py"), *run, "--out", str(out)]
                done = subprocess.run([*second, *more], timeout=SLOW, **options)
                first.send_signal(signal.SIGCONT)
                text = first.communicate(timeout=SLOW)[0]
                verdict = "refused"
                reasons = ("another run (process", f"a checkpoint of {script}, not of {other}")
                if done.returncode != 2 or not any(r in done.stdout for r in reasons):
                    verdict = f"silent: {done.returncode}: {done.stdout[-200:]}"
                if "Traceback" in done.stdout + text:
                    verdict = f"traceback: {(done.stdout + text)[-300:]}"
                elif first.returncode or not same(out, work / f"{script}_whole"):
                    verdict = f"differs: {text[-200:]}"
                count.add(f"{script}, then {other} with {name}", verdict)


# ------------------------------------------------------------------------------ small disks


def mounted(size: str, where: Path, argv: list[str]) -> tuple[str, str]:
    """Run D2Det with a file system of that size at `where`: the verdict, and what it said."""
    mount = 'mount -t tmpfs -o size=$0 none "$1" && shift && "$@"; code=$?; '
    mount += 'find "$0" -name ".*" -type f >&2; exit $code'
    mount = mount.replace('"$0"', f'"{where}"')
    line = ["unshare", "-rm", "sh", "-c", mount, size, str(where), sys.executable]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(
        [*line, str(ROOT / "d2det.py"), *argv], start_new_session=True, **options
    )
    try:
        text = process.communicate(timeout=SLOW)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return "hang", process.communicate()[0]
    if "Traceback" in text:
        return f"traceback: {text[-300:]}", text
    if process.returncode not in (0, 2):
        return f"silent: code {process.returncode}: {text[-200:]}", text
    return "refused" if process.returncode else "fine", text


def disks(count, work: Path) -> None:
    """Small file systems for /dev/shm, as containers have, and for the results."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        print("  disks: unshare -rm is not allowed here: no case was tried")
        return
    large = "--image-size 512 --scales 512 --max-size 512 --batch 4 --num-train 24".split()
    for size in ("256k", "2m", "4m", "6m", "8m", "16m", "64m"):
        for workers in (1, 4):
            argv = [*RUN, *large, "--workers", str(workers), "--out", str(work / "shm")]
            verdict, text = mounted(size, Path("/dev/shm"), argv)
            if verdict == "refused" and not ("--workers 0" in text and "/dev/shm has" in text):
                verdict = f"silent: {text[-200:]}"
            count.add(f"/dev/shm of {size}, {workers} workers", verdict)
    (work / "small").mkdir()
    for size in range(40, 30_000, 1_500):
        argv = [*RUN, "--out", str(work / "small" / "run")]
        verdict, text = mounted(f"{size}k", work / "small", argv)
        if verdict == "refused" and "No space left on device" not in text:
            verdict = f"silent: {text[-200:]}"
        if ".tmp" in text or "/.lock" in text:
            verdict = f"silent: left behind: {text[-200:]}"
        count.add(f"results on {size} KiB", verdict)


# ------------------------------------------------------------------------------ checkpoints


def half_a_run(out: Path) -> dict:
    """A checkpoint in the middle of a run, with losses that are not logged yet."""
    argv = [*RUN, "--log-every", "100", "--save-every", "3", "--eval-every", "7", "--out", str(out)]
    verdict, said = signalled("train.evaluate", signal.SIGINT, 1, argv)
    assert verdict == "fine", said
    return load_checkpoint(out / "last.pt")


def equal(a, b) -> bool:
    """Whether two entries of checkpoints are the same, tensors in dicts and lists included."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def bits(count, work: Path, chance: random.Random) -> None:
    """One bit of a checkpoint flipped: refused, or nothing of what is read differs."""
    good = half_a_run(work / "run")
    whole = (work / "run" / "last.pt").read_bytes()
    for _ in range(400):
        damaged, at = bytearray(whole), chance.randrange(8 * len(whole))
        damaged[at // 8] ^= 1 << at % 8
        (work / "x.pt").write_bytes(damaged)
        read: list = []
        verdict = tried(lambda read=read: read.append(load_checkpoint(work / "x.pt")))
        if verdict == "fine" and not equal(good, read[0]):
            verdict = "silent: other values"
        count.add(f"bit {at} of {8 * len(whole)}", verdict)


def entries(count, work: Path, chance: random.Random) -> None:
    """Entries of a checkpoint replaced by odd values: `load` and --resume refuse it, or work."""
    good = half_a_run(work / "run")
    first = next(iter(good["model"]))
    weight = good["model"][first]
    tensors = [
        weight.half(),
        weight.to_sparse(),
        weight.double(),
        weight[:1],
        weight * float("nan"),
    ]
    tensors += [weight.expand(10, *weight.shape), weight.to(torch.complex64), torch.ones(1)]
    tensors += [torch.empty_like(weight, device="meta"), torch.ones(1).expand(10**12)]
    values = [*ODD, *tensors, {1: weight}, {first: weight.half()}, [[weight]], "delete"]
    places = [[name] for name in good] + [["model", first], ["categories", 0, "name"]]
    places += [["optimizer", "state"], ["optimizer", "param_groups"], ["optimizer", "state", 0]]
    places += [["optimizer", "state", 0, name] for name in good["optimizer"]["state"][0]]
    places += [["rng", 0], ["rng", 0, 0], ["categories", 0], ["categories", 0, "id"]]
    places += [["settings", name] for name in good["settings"]]
    fields = good["settings"]["model"]
    huge = [10**6, 2**31 - 1, -1, 0, None, "x", [], [1], {}, 1e300]
    cases = [(place, value) for place in places for value in values]
    cases += [(["settings", "model", name], value) for name in fields for value in huge]
    argv = [*RUN, "--log-every", "100", "--save-every", "3", "--eval-every", "7"]
    for place, value in chance.sample(cases, 400):
        state = copy.deepcopy(good)
        entry = functools.reduce(lambda inner, key: inner[key], place[:-1], state)
        if isinstance(value, str) and value == "delete":
            del entry[place[-1]]
        else:
            entry[place[-1]] = value
        name = f"{'.'.join(map(str, place))} = {str(value)[:40]!r}"
        with contextlib.suppress(Exception):  # what cannot be saved is no case
            save_checkpoint(work / "run" / "last.pt", state)
            count.add(f"load: {name}", tried(lambda: engine.load(work / "run" / "last.pt")))
            if place[0] != "settings" or len(place) < 3:
                verdict = "hang"
                with contextlib.suppress(TimeoutError), alarm():
                    verdict = attempt([*argv, "--out", str(work / "run"), "--resume"])
                count.add(f"resume: {name}", verdict)
