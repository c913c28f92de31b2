"""Two processes do what one does: gradients, stops, evaluations, studies. Started once for all.

torchrun runs this file itself: `program` is what each of its processes does.
"""

import importlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from methods import RUN, build, keep_rois, settings_of, torchrun
from PIL import Image
from test_cli import ROOT, TINY_RUN

import d2det
import dc_loss_clnms
import engine.command
from common import BadInput
from data import SyntheticDetection
from data.transforms import as_transformed
from engine.checkpoints import load_checkpoint
from engine.loader import to_device
from engine.metrics import detect, evaluate
from engine.processes import share_buffers, start_processes
from engine.train import LossOnly
from studies import alignment, assignment, checkpoint, sweep

DDP = {  # small, and with nothing left to chance: every anchor and RoI takes part
    "d2det": dict(conv_channels=8, num_convs=2, groups=2, jitter=0.0, reg_rois=5000, masks=True),
    "double_head": dict(conv_channels=16),
    "cpm_rcnn": dict(point_channels=1, num_convs=1, grid_rois=5000),
    "iou_aware_retinanet": dict(tower_groups=0),
    "dc_loss_clnms": dict(tower_groups=0, dc_normalise=False),  # which is per process
    "baselines.gfl": dict(tower_groups=0),
    "baselines.cascade_rcnn": {},
}


def ddp_model(name):
    method = importlib.import_module(name)
    small = dict(fpn_channels=8, norm="gn", workers=0, batch=2, num_val=5, **DDP[name])
    if hasattr(method.Settings().model, "roi_samples"):
        small |= dict(fc_channels=16, roi_samples=5000, proposals_train=50)
    model = build(method, settings_of(method, **small))
    if hasattr(model, "rpn"):
        model.rpn.num_samples = 10**6
    for layer in model.modules():  # whose statistics are per process in training
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eval()
    return model


def ddp_items():
    data = SyntheticDetection(2, 64, masks=True)
    items = [(image, as_transformed(t, (64, 64))) for image, t in (data[1], data[0])]
    return to_device(items, "cpu")


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


def gradients(rank: int, out: Path) -> None:
    """Of both processes with an image each; what both detect in, and their AP."""
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
        data, settings = SyntheticDetection(5, 64), model.full_settings
        seen = [t["image_id"] for t, _ in detect(model, data, settings)]
        metrics = evaluate(model, data, settings)
        found = {n: p.grad for n, p in model.named_parameters()}
        found = {"gradients": found, "seen": seen, "AP": metrics["AP"]}
        torch.save(found, out / f"{name}{rank}.pt")


def stopped(rank: int, pid: int, *argv) -> None:
    """A training during whose third step process `rank` sends a SIGTERM to `pid`."""
    module, calls = sys.modules["engine.train"], []
    original = module.take_step

    def take_step(*args):
        calls.append(1)
        if len(calls) == 3 and int(os.environ["RANK"]) == rank:
            os.kill(pid, signal.SIGTERM)
        return original(*args)

    module.take_step = take_step
    with pytest.raises(SystemExit) as end:
        d2det.main([*TINY_RUN, "--train", *argv])
    assert end.value.code == 128 + signal.SIGTERM
    module.take_step = original


def data_read_once(rank: int, out: Path) -> None:
    """The first process alone reads annotations. Both have the same set, or the same reason."""
    photo = SyntheticDetection(1, 64)[0][0].permute(1, 2, 0).numpy()
    reads, files, original = [], out / f"photos{rank}", engine.command.data.load
    if rank == 0:  # of the other process it does not exist
        files.mkdir()
        Image.fromarray(photo).save(files / "1.png")
        truth = dict(images=[dict(id=1, file_name="1.png")], categories=[dict(id=3, name="a")])
        truth["annotations"] = [dict(image_id=1, category_id=3, bbox=[1, 2, 30, 40])]
        (files / "a.json").write_text(json.dumps(truth))
    engine.command.data.load = lambda *a, **k: reads.append(1) or original(*a, **k)
    place = dict(val_json=f"{files}/a.json", val_images=f"{files}", check="none")
    _, data = engine.command.load_data(d2det.Settings().replace(**place), train=False)
    assert reads == [1] * (rank == 0)
    assert data[0][1]["boxes"].tolist() == [[1, 2, 31, 42]] and data.categories[0]["id"] == 3
    with pytest.raises(BadInput, match="photos0/nothing: no such folder"):
        place["val_images"] += "/nothing"
        engine.command.load_data(d2det.Settings().replace(**place), train=False)
    engine.command.data.load = original


def studied(weights: Path, out: Path) -> None:
    """A sweep, the alignment of two checkpoints, and the anchors that the IAC score adds."""
    argv = ["dc_loss_clnms", "--weights", f"{weights}/last.pt", "--out", f"{out}"]
    sweep.main(argv)
    alignment.main([*argv, "--also", f"dc_loss_clnms={weights}/also/last.pt"])
    assignment.main(argv)


def program(out: Path) -> None:
    Figure.savefig = lambda figure, path, **_: Path(path).touch()
    engine.command.end_processes = checkpoint.end_processes = lambda: None  # they meet once
    start_processes("cpu")
    rank = torch.distributed.get_rank()
    gradients(rank, out)
    data_read_once(rank, out)
    run = ["--steps", "8", "--out", f"{out}/r"]
    stopped(1, os.getpid(), *run)  # of one process: both end, with a checkpoint
    if rank == 0:
        shutil.copy(out / "r" / "last.pt", out / "third.pt")
    run = [*TINY_RUN, *run, "--train", "--resume", "--eval-every", "3"]
    d2det.main([*run, "--predict", f"{out}/in"])  # begins with an evaluation that is owed
    if rank == 0:
        shutil.copy(out / "third.pt", out / "r" / "last.pt")
    torch.distributed.barrier()
    d2det.main(run)  # the evaluation is in the log, which the first process alone has
    studied(out / "weights", out / "two")
    (out / f"end{rank}").touch()
    stopped(0, os.getppid(), "--steps", "60", "--out", f"{out}/killed")  # as a scheduler does


def test_two_processes(tmp_path, unpainted):
    (tmp_path / "in").mkdir()
    for i in range(3):
        image = SyntheticDetection(3, 64)[i][0].permute(1, 2, 0).numpy()
        Image.fromarray(image).save(tmp_path / "in" / f"{i}.png")
    weights = tmp_path / "weights"
    dc_loss_clnms.main([*RUN, "--steps", "2", "--train", "--out", f"{weights}"])
    (weights / "also").mkdir()
    shutil.copy(weights / "last.pt", weights / "also")
    process = subprocess.Popen(
        [*torchrun(2), __file__, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes
        raise AssertionError(f"it hangs:\n{process.communicate()[0]}") from None
    assert all((tmp_path / f"end{rank}").exists() for rank in (0, 1)), text[-4000:]
    check_gradients(tmp_path)
    check_run(tmp_path, text)
    studied(weights, tmp_path / "one")
    for name in ("sweep.json", "alignment.json", "assignment.json"):
        one, two = (json.loads((tmp_path / k / name).read_text()) for k in ("one", "two"))
        assert one == two, name


def check_gradients(out: Path) -> None:
    for name in DDP:
        one, two = (torch.load(out / f"{name}{r}.pt") for r in range(2))
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


def check_run(out: Path, text: str) -> None:
    assert "8 steps of 2 images (2 x 1)" in text
    assert load_checkpoint(out / "third.pt")["step"] == 3
    assert text.count("step 3: AP") == 1 and text.count("step 6: AP") == 2, text
    state = load_checkpoint(out / "r" / "last.pt")
    assert len(state["rng"]) == 2 and state["step"] == 8
    assert state["settings"]["run"]["eval_batch"] == 1  # of one process, whoever tests it later
    results = json.loads((out / "r" / "predict" / "predictions.json").read_text())
    assert {r["image_id"] for r in results} == {0, 1, 2}  # both processes' share
    assert "AP" in json.loads((out / "r" / "metrics.json").read_text())
    assert 3 <= load_checkpoint(out / "killed" / "last.pt")["step"] < 60
    assert text.count("stopped by signal 15") == 2


if __name__ == "__main__":
    program(Path(sys.argv[1]))


FAULTS = """
import resource, sys, torch
from engine.processes import keep_memory, peak_memory, reset_peak_memory, start_processes
device = start_processes("cpu")
if "keep" in sys.argv:
    keep_memory()
faults = [0]
for _ in range(20):
    torch.ones(2**24)  # 64 MiB; small blocks between them may keep the first few apart
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
kept = peak_memory(device)
reset_peak_memory(device)
print(faults[-1] - faults[-6], kept - peak_memory(device) > 2**25)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator alone is told")
def test_memory_is_kept_for_the_next_tensor():
    def faults(*argv, **variables):
        env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | variables
        argv = [sys.executable, "-c", FAULTS, *argv]
        out = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
        number, returned = out.stdout.split()
        return int(number), returned

    kept, returned = faults("keep")
    assert 10 * kept < faults("keep", MALLOC_ARENA_MAX="8")[0]  # who sets one decides alone
    assert 10 * kept < faults()[0]  # a library leaves the host program's memory alone
    assert returned == "True"  # what `reset_peak_memory` measures next is not what was kept
