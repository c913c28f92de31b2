"""What comes from outside: signals in every phase, a second run, a killed worker, a small disk."""

import json
import os
import pty
import re
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_cli import ROOT, TINY_RUN, run

from common import BadInput
from data import SyntheticDetection
from engine.checkpoints import RunLog, load_checkpoint, save_checkpoint, write_json
from engine.folders import lock, sole_writer, unlock
from engine.loader import batches_of, make_loader, worker_problem
from engine.signals import Stopped, signals_answered

pytestmark = pytest.mark.usefixtures("unpainted")
UNTOUCHED = "nothing was changed; the same command starts again"


def photo(folder: Path) -> Path:
    image = SyntheticDetection(1, 64)[0][0].permute(1, 2, 0).numpy()
    Image.fromarray(image).save(folder / "a.png")
    return folder / "a.png"


# ------------------------------------------------------------------------------ signals


def signal_at(monkeypatch, place: str, number=signal.SIGINT, times=1) -> None:
    """This process sends itself signals where engine.MODULE.FUNCTION first begins."""
    name, _, function = place.rpartition(".")
    module = sys.modules[f"engine.{name}"]
    original, sent = getattr(module, function), []

    def signalled(*args, **options):
        while len(sent) < times:
            sent.append(os.kill(os.getpid(), number))
        return original(*args, **options)

    monkeypatch.setattr(module, function, signalled)


PHASES = {  # where the signal comes -> what is told
    "command.parse": UNTOUCHED,
    "command.load_data": UNTOUCHED,
    "detector.ResNetFPN": UNTOUCHED,
    "train.check_data": UNTOUCHED,
    "train.resume_or_start": "nothing was saved; the same command starts again",
    "train.take_step": "r/last.pt holds step 1 of 8; --resume goes on",
    "train.evaluate": "r/last.pt holds step 4 of 8; --resume goes on",
    "command.predict_files": "training has ended, with ",
}


@pytest.mark.parametrize("place", PHASES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_answered_with_one_line_in_every_phase(
    place, number, tmp_path, monkeypatch, capfd
):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    if number != signal.SIGINT and "train." not in place:
        pytest.skip("alike")
    flags = ["--train", "--out", tmp_path / "r", "--save-every", 100, "--eval-every", 4]
    if "predict" in place:
        flags += ["--predict", photo(tmp_path)]
    signal_at(monkeypatch, place, number)
    with pytest.raises(SystemExit) as end:
        run(*flags)
    text = capfd.readouterr().out
    lines = [line for line in text.splitlines() if "stopped by signal" in line]
    assert end.value.code == 128 + number and len(lines) == 1, text
    assert lines[0].startswith(f"stopped by signal {int(number)}: ") and PHASES[place] in lines[0]
    step = re.search(r"holds step (\d+)", lines[0])
    if step:
        assert load_checkpoint(tmp_path / "r" / "last.pt")["step"] == int(step[1])
    assert not [p for p in tmp_path.rglob(".*") if p.is_file()]  # neither locks nor halves
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_who_insists_is_heard_amid_a_step(tmp_path, monkeypatch, capfd):
    signal_at(monkeypatch, "train.take_step", times=3)
    with pytest.raises(Stopped) as end:
        run("--train", "--out", tmp_path / "r")
    out, err = capfd.readouterr()
    assert end.value.code == 130 and not (tmp_path / "r" / "last.pt").exists()
    assert err.count("signal 2: stopping when this step is done") == 2
    assert "stopped by signal 2: nothing was saved" in out


def test_an_interrupted_evaluation_is_repeated_on_resuming(tmp_path, monkeypatch):
    flags = ["--train", "--save-every", 100, "--eval-every", 4]
    whole = run(*flags, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        signal_at(patch, "train.show_metrics")  # best.pt is saved and the log written
        run(*flags, "--out", tmp_path / "r")
    assert (tmp_path / "r" / "best.pt").exists()
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        signal_at(patch, "metrics.coco_metrics")
        run(*flags, "--out", tmp_path / "r", "--resume")
    assert run(*flags, "--out", tmp_path / "r", "--resume") == whole
    mine, theirs = (load_checkpoint(tmp_path / f / "last.pt") for f in ("r", "whole"))
    assert all(torch.equal(mine["model"][k], theirs["model"][k]) for k in theirs["model"])
    logs = [(tmp_path / f / "log.jsonl").read_text().splitlines() for f in ("r", "whole")]
    logs = [[(x["step"], x.get("AP"), x.get("loss")) for x in map(json.loads, log)] for log in logs]
    assert logs[0] == logs[1] and [x[0] for x in logs[0]].count(4) == 2


def test_nohup_stays_in_force():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_answered("") as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.seen and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_ends_the_run_saved(tmp_path):
    """SIGHUP comes, and whatever is printed from then on fails."""
    flags = ["--train", "--out", tmp_path / "r", "--steps", 3000, "--save-every", 5000]
    child, terminal = pty.fork()
    if child == 0:
        line = [sys.executable, ROOT / "d2det.py", *TINY_RUN, *flags, "--workers", "1"]
        os.execv(sys.executable, list(map(str, line)))
    seen = b""
    while b"step 3/" not in seen:
        seen += os.read(terminal, 4096)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP, seen.decode()
    assert 3 <= load_checkpoint(tmp_path / "r" / "last.pt")["step"] < 3000


# ------------------------------------------------------------------------------ two runs


def test_a_second_run_in_a_folder_is_refused(tmp_path, monkeypatch, capsys):
    """The first goes on, and all in its folder is its own."""
    out, train, refused = tmp_path / "r", sys.modules["engine.train"], []
    take_step = train.take_step

    def meanwhile(*args):
        if not refused:
            for flags in (["--seed", 2, "--steps", 2], ["--resume"]):
                with pytest.raises(SystemExit) as end:
                    run("--train", "--out", out, *flags)
                refused.append(end.value.code)
        return take_step(*args)

    monkeypatch.setattr(train, "take_step", meanwhile)
    run("--train", "--out", out, "--eval-every", 100)
    text = capsys.readouterr().err
    refusal = f"error: --out {out}: another run (process {os.getpid()}) writes there"
    assert refused == [2, 2] and text.count(refusal) == 2, text
    state = load_checkpoint(out / "last.pt")
    assert state["step"] == 8 and state["settings"]["run"]["seed"] == 0
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == [*range(1, 9), 8]
    assert [p.name for p in tmp_path.iterdir()] == ["r"] and not (out / ".lock").exists()


def test_a_lock_dies_with_its_process_and_is_no_workers(tmp_path):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        lock(tmp_path)
        os.write(write, b"1")
        signal.pause()
    os.read(read, 1)
    with pytest.raises(BadInput, match=f"another run .process {child}. writes there"):
        with sole_writer(tmp_path):
            pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with sole_writer(tmp_path):
        loader = make_loader(SyntheticDetection(2, 64), 1, torch.device("cpu"), batch_size=1)
        with batches_of(loader) as iterator:
            next(iterator)
            (worker,) = iterator._workers
            files = [os.path.realpath(f) for f in Path(f"/proc/{worker.pid}/fd").iterdir()]
            assert files and str(tmp_path / ".lock") not in files


def test_the_lock_goes_with_a_folder_that_is_set_aside(tmp_path):
    out = tmp_path / "r"
    out.mkdir()
    (out / "last.pt").touch()
    with sole_writer(out, set_aside_if="last.pt"):
        assert (tmp_path / "r-1" / "last.pt").exists() and not (tmp_path / "r-1" / ".lock").exists()
        with pytest.raises(BadInput, match="another run"):
            lock(out)
        unlock(lock(tmp_path / "r-1"), tmp_path / "r-1")
    assert not list(out.iterdir())


# ------------------------------------------------------------------------------ workers


class InSmallMemory(SyntheticDetection):
    """Its worker may share no more than 1,000 bytes, as where /dev/shm is full."""

    def __getitem__(self, index):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        return super().__getitem__(index)


def test_a_worker_that_cannot_share_images_is_no_hang():
    loader = make_loader(InSmallMemory(2, 64), 1, torch.device("cpu"), batch_size=1)
    assert loader.timeout > 0
    with batches_of(loader) as iterator, pytest.raises(BadInput) as error:
        next(iterator)
    text = str(error.value).rpartition("BadInput: ")[2]
    assert re.search(r"images cannot be passed on: .*/dev/shm has \d+ MiB.*--workers 0", text)


def test_a_killed_worker_is_named_and_what_was_saved_too(tmp_path, monkeypatch, capsys):
    class Killed(SyntheticDetection):
        def __getitem__(self, index):
            if torch.utils.data.get_worker_info() and Path(tmp_path / "now").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(index)

    train = sys.modules["engine.train"]
    save = train.save_run
    monkeypatch.setattr(train, "save_run", lambda *a: save(*a) or (tmp_path / "now").touch())
    monkeypatch.setattr(
        sys.modules["engine.command"].data,
        "load",
        lambda *a, **k: (Killed(12, 64), SyntheticDetection(2, 64)),
    )
    with pytest.raises(SystemExit) as end:
        run("--train", "--workers", 1, "--out", tmp_path / "r", "--steps", 100)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and err.startswith("error: a process that reads images has died")
    assert "--workers 0" in err and err.count("\n") == 1
    assert re.search(r"r/last.pt holds step \d+ of 100; --resume goes on", out)
    for other in ("shapes differ", "", "Caught RuntimeError in DataLoader worker process 0"):
        assert not worker_problem(RuntimeError(other))


# ------------------------------------------------------------------------------ disks


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device here")
def test_a_full_disk_is_the_reason_and_leaves_nothing(tmp_path):
    full = "cannot write it: No space left on device"
    for name, write in (
        ("last.pt", lambda path: save_checkpoint(path, {"a": torch.zeros(10**6)})),
        ("predictions.json", lambda path: write_json(path, [1] * 10**6)),
    ):
        (tmp_path / f".{name}.tmp").symlink_to("/dev/full")
        with pytest.raises(BadInput, match=f"{name}: {full}"):
            write(tmp_path / name)
    log = RunLog(tmp_path, 0)
    log.path.unlink()
    log.path.symlink_to("/dev/full")
    with pytest.raises(BadInput, match=f"log.jsonl: {full}"):
        log.write({"step": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_resume_with_other_threads_says_so(tmp_path, capsys):
    threads = torch.get_num_threads()
    run("--train", "--out", tmp_path / "r", "--steps", 2)
    try:
        torch.set_num_threads(threads + 1)
        run("--train", "--out", tmp_path / "r", "--steps", 2, "--resume")
    finally:
        torch.set_num_threads(threads)
    text = capsys.readouterr().out
    assert f"{threads} threads before, {threads + 1} now: sums are rounded otherwise" in text
