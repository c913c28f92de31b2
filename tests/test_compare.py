"""The studies of the code: comparisons over seeds, time and cost."""

import doctest
import json
import math
import subprocess
from pathlib import Path

import pytest
import torch

from baselines import retinanet
from engine import rows
from studies import bench, checkpoint, compare, cost, tables

pytestmark = pytest.mark.usefixtures("unpainted")
SMALL = """--image-size 64 --scales 64 --test-scales 64 --max-size 64 --num-train 12 --num-val 4
 --batch 2 --workers 0 --fpn-channels 8 --norm gn --device cpu --fc-channels 16 --proposals-test 20
 --proposals-train 40 --score-threshold 0.05 --conv-channels 8 --num-convs 2 --groups 2""".split()


def read(*path):
    return json.loads(Path(*path).read_text())


def test_intervals_and_cells_by_hand():
    assert doctest.testmod(tables).attempted >= 4 and doctest.testmod(tables).failed == 0
    mean, half = tables.interval([1.0, 2.0, 3.0])  # deviation 1, t 4.303
    assert (mean, half) == pytest.approx((2, 4.303 / 3**0.5))
    _, half = tables.interval([0.0, 1.0] * 15)  # degrees of freedom beyond the list: its last t
    assert half == pytest.approx(2.093 * 0.5085 / 30**0.5, abs=1e-4)
    tenths = [1.0, 3.0] * 5  # deviation 1.054, t 2.262: 0.75
    assert tables.difference([1.0, 2.0, 3.0], tenths) == "+2.0 ± 2.5, 0.8"
    assert tables.difference([-2.0, -2.1, -2.2], tenths) == "**-2.1 ± 0.2, 0.8**"
    assert tables.difference([-0.7, -0.7, -0.7], tenths) == "-0.7 ± 0.0, 0.8"  # other images
    assert tables.difference([-1.0], tenths) == "-1.0 ± ?, 0.8"
    assert tables.cell([2.0, 2.1, 2.2]) == "2.1 ± 0.2" and tables.cell([]) == "-"


@pytest.mark.parametrize("name", checkpoint.PAPERS)
def test_a_pair_differs_in_what_the_paper_adds(name):
    """Same loss weights, length, images and seed."""
    jobs = compare.make_jobs("synthetic", [name], [3], "", [])
    own, base = (job.settings for job in jobs)
    assert own["run"] == base["run"] and own["run"]["seed"] == 3 and own["data"] == base["data"]
    differ = {k for k, v in own["model"].items() if base["model"][k] != v}
    assert differ and not [k for k in differ if k.endswith("weight") or k.startswith("omega")]
    assert " ".join(checkpoint.BASELINES[name]) in " ".join(jobs[1].flags)


def test_settings_that_matter_are_not_those_of_the_machine(tmp_path):
    shared = [[], ["--workers", "1", "--device", "cpu"], ["--lr", "0.5"], ["--nms-iou", "0.25"]]
    jobs = [compare.make_jobs("bccd", ["d2det"], [0], f"{tmp_path}", flags)[0] for flags in shared]
    folders = [job.folder for job in jobs]
    assert folders[0] == folders[1] and len(set(folders)) == 3
    assert jobs[0].name == "bccd-d2det-0" and jobs[0].settings["data"]["data"] == "bccd"
    assert str(tmp_path) in " ".join(jobs[0].flags) and str(tmp_path) not in f"{jobs[0].settings}"


def metrics(ap: float) -> dict:
    return dict.fromkeys(compare.KEYS, ap)


@pytest.fixture
def trainings(monkeypatch):
    """A list of the commands that would have been run; each leaves what a training leaves."""
    commands, original = [], subprocess.run

    def run(command, *args, env=None, stdout=None, **options):
        if "studies.alignment" in command:
            out = Path(command[command.index("--weights") + 1]).parent / "studies"
            before = dict.fromkeys(("matched", "all"), 0.5)
            numbers = {"cost": 0.1, "before NMS": before}
            aps = {"class score": {"AP": 0.4}, "fused": {"AP": 0.5}, "oracle": {"AP": 0.6}}
            out.mkdir()
            found = {"iou_aware_retinanet": {"fused": numbers, "metrics": aps}}
            (out / "alignment.json").write_text(json.dumps(found))
            return subprocess.CompletedProcess(command, 0)
        if "--train" not in command:  # the machine is asked for its name
            return original(command, *args, env=env, stdout=stdout, **options)
        commands.append(command)
        assert env["OMP_NUM_THREADS"] == "1"
        out = Path(command[command.index("--out") + 1])
        if "--no-iou-head" in command and "7" in command:
            stdout.write("error: no such image")
            return subprocess.CompletedProcess(command, 2)
        seed = int(command[command.index("--seed") + 1])
        ap = 0.5 + 0.01 * seed - 0.1 * ("--no-iou-head" in command)
        (out / "metrics.json").write_text(json.dumps(metrics(ap)))
        (out / "predictions.json").write_text("[]")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_compare_trains_each_pair_once_per_seed(trainings, tmp_path, capsys):
    where = ["--results", f"{tmp_path}/results", "--out", f"{tmp_path}/runs"]
    argv = ["iou_aware_retinanet", "--seeds", "3", "4", *where, "--num-val", "20"]
    compare.main([*argv, "--jobs", "2"])
    assert len(trainings) == 4 and all("20" in command for command in trainings)
    assert [c[c.index("--seed") + 1] for c in sorted(trainings, key=str)].count("3") == 2
    assert len({c[c.index("--out") + 1] for c in trainings}) == 4
    file = tmp_path / "results" / "synthetic-iou_aware_retinanet-baseline-4.json"
    run = read(file)
    assert (
        run["metrics"] == pytest.approx(metrics(0.44))
        and run["settings"]["model"]["iou_head"] is False
    )
    assert [tenth["AP"] for tenth in run["tenths"]] == [0.0] * 10  # nothing was found
    assert run["alignment"] == {"oracle": 0.6, "cost": 0.1, "matched": 0.5, "all": 0.5}
    assert run["versions"]["torch"] == torch.__version__ and "one thread" in run["machine"]

    page = tmp_path / "page.md"
    page.write_text("A\n<!-- table summary -->\nold\n<!-- end -->\nB <!-- table none --> C")
    compare.main([*argv, "--table", "--pages", str(page)])  # all is done
    assert len(trainings) == 4
    shown, page = capsys.readouterr().out, page.read_text()
    assert "iou_aware_retinanet.py` | 2 | 53.5 ± 6.4 | 43.5 ± 6.4 | **+10.0 ± 0.0, 0.0** |" in shown
    assert "| 60.0, 60.0 | 10.0, 10.0 | 0.50, 0.50 | 0.50, 0.50 |" in shown
    gain = "| `iou_aware_retinanet.py` | +1.2 (Table 1) | **+10.0 ± 0.0, 0.0** |"
    assert gain in page and "`d2det.py` | +4.7 (Table 2) | not run |" in page
    assert page.startswith("A\n<!-- table") and page.endswith(
        "<!-- end -->\nB <!-- table none --> C"
    )

    compare.main([*argv, "--seeds", "3", "--lr", "0.5"])  # other settings: measured anew
    assert len(trainings) == 6 and "measured with other settings" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        compare.main(["--table", "--pages", *where])
    assert "other settings than" in capsys.readouterr().err


def test_a_failed_run_does_not_stop_the_others(trainings, tmp_path, capsys):
    where = ["--results", f"{tmp_path}/results", "--out", f"{tmp_path}/runs"]
    with pytest.raises(SystemExit):
        compare.main(["iou_aware_retinanet", "--seeds", "7", "8", "--num-val", "20", *where])
    assert "iou_aware_retinanet-baseline-7: exit 2: error: no such" in capsys.readouterr().err
    assert len(trainings) == 4 and len(list((tmp_path / "results").iterdir())) == 3


def test_the_first_command_names_its_baseline(tmp_path, monkeypatch):
    """From the files that `compare` leaves, and only for the run that they measured."""
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    settings = checkpoint.settings_of("d2det", ["--train", "--seed", "5", "--workers", "0"])
    assert rows.beside_baseline("d2det", settings) == ""
    for job in compare.make_jobs("synthetic", ["d2det"], [0, 1], "", []):
        run = {"settings": job.settings, "metrics": metrics(0.2 + 0.2 * job.seed)}
        (tmp_path / f"{job.name}.json").write_text(json.dumps(run))
    line = rows.beside_baseline("d2det", settings)
    assert "its baseline, trained as long: AP 0.300" in line and "2 seeds" in line
    for other in (dict(lr=0.5), dict(epochs=9.0), dict(num_convs=3), dict(data="photos")):
        assert rows.beside_baseline("d2det", settings.replace(**other)) == ""


def test_compare_runs_a_method(tmp_path):
    """As a process of its own, in another folder than the one that asks."""
    where = ["--results", f"{tmp_path}/results", "--out", f"{tmp_path}/runs", "--seeds", "0"]
    compare.main(["d2det", *where, *SMALL, "--num-val", "10", "--steps", "1"])
    for name in ("d2det", "d2det-baseline"):
        assert 0 <= read(tmp_path, "results", f"synthetic-{name}-0.json")["metrics"]["AP"] <= 1


def test_bench_compares_with_torchvision(capsys, tmp_path):
    argv = "d2det --repeat 1 --device cpu --backbone resnet18 --fpn-channels 16 --scales 96"
    sizes = " --max-size 128 --conv-channels 16 --groups 4 --fc-channels 32"
    rows = bench.main([*(argv + sizes).split(), "--out", str(tmp_path)])
    assert [(r["job"], r["model"]) for r in rows] == [
        (job, who) for job in ("training step", "prediction") for who in ("ours", "torchvision")
    ]
    assert all(r["seconds"] > 0 and r["giga_multiply_adds"] > 0 for r in rows)
    assert "ours / this" in capsys.readouterr().out and read(tmp_path, "bench.json")["rows"] == rows


@pytest.mark.parametrize("p2", [False, True])
def test_bench_compares_with_torchvisions_retinanet_on_our_levels(p2):
    model = retinanet.Model(backbone="resnet18", backbone_weights="none", fpn_channels=16, p2=p2)
    ours = retinanet.Detector(model, 3).eval()
    theirs = bench.torchvision_detector(ours).eval()
    assert type(theirs).__name__ == "RetinaNet" and theirs.head.classification_head.num_classes == 3
    image = torch.rand(1, 3, 96, 160)
    levels = theirs.backbone(image).values()
    assert [m.shape for m in ours.backbone(image)] == [m.shape for m in levels]


def test_cost_counts_a_head_that_is_there(tmp_path, capsys):
    argv = "iou_aware_retinanet --image 64 96 --backbone resnet18 --fpn-channels 16 --tower-convs 1"
    found = cost.main([*argv.split(), "--out", str(tmp_path)])
    base, own = found["iou_aware_retinanet, baseline"], found["iou_aware_retinanet"]
    more = (own["million_parameters"] - base["million_parameters"]) * 1e6
    assert round(more) == 9 * (16 * 9 + 1)  # a 3x3 convolution to nine anchors
    cells = sum(math.ceil(64 / s) * math.ceil(96 / s) for s in (8, 16, 32, 64, 128))
    more = (own["giga_multiply_adds"] - base["giga_multiply_adds"]) * 1e9
    assert round(more) == cells * 9 * 16 * 9
    assert read(tmp_path, "cost.json") == found and "over the baseline" in capsys.readouterr().out
