"""The studies of the code: comparisons over seeds, time and cost."""

import doctest
import json
import math
from pathlib import Path

import pytest
import torch

import common
import iou_aware_retinanet as iou_aware
from baselines import retinanet
from studies import bench, checkpoint, compare, cost

pytestmark = pytest.mark.usefixtures("unpainted")
SMALL = """--image-size 64 --scales 64 --test-scales 64 --max-size 64 --num-train 12 --num-val 4
 --batch 2 --workers 0 --fpn-channels 8 --norm gn --device cpu --fc-channels 16 --proposals-test 20
 --proposals-train 40 --score-threshold 0.05 --conv-channels 8 --num-convs 2 --groups 2""".split()


def read(*path):
    return json.loads(Path(*path).read_text())


def test_intervals_and_table_by_hand():
    assert doctest.testmod(compare).attempted >= 1 and doctest.testmod(compare).failed == 0
    low, high = compare.interval([1.0, 2.0, 3.0])  # deviation 1, t 4.303
    assert (low, high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-3)
    assert compare.describe([1.0, 2.0, 3.0]) == "+2.0 ± 2.5, not resolved"
    assert compare.describe([2.0, 2.1, 2.2]) == "+2.1 ± 0.2"
    assert compare.describe([-1.0]) == "-1.0, one seed"
    rows = lambda *aps: [dict.fromkeys(compare.KEYS, ap) for ap in aps]  # noqa: E731
    lines = compare.table({"ours": rows(0.5, 0.7), "its baseline": rows(0.4, 0.6)})
    assert lines[2].startswith("| ours | 60.0 ± 14.1 |")
    assert lines[-1].startswith("| ours minus its baseline, seed by seed | +10.0 ± 0.0 |")


def test_compare_trains_each_contender_once_per_seed(monkeypatch, tmp_path, capsys):
    calls = []

    def train(who):
        def run(argv):
            calls.append((who, argv))
            return dict.fromkeys(compare.KEYS, 0.5 + 0.1 * ("--no-iou-head" not in argv))

        return run

    monkeypatch.setattr(iou_aware, "main", train("method"))
    monkeypatch.setattr(compare, "train_torchvision", train("torchvision"))
    argv = ["iou_aware_retinanet", "--seeds", "3", "4", "--torchvision", "--out", str(tmp_path)]
    compare.main([*argv, "--fpn-channels", "8"])
    assert [who for who, _ in calls] == ["method", "method", "torchvision"] * 2
    assert all("--fpn-channels" in flags for _, flags in calls)
    assert [flags[flags.index("--seed") + 1] for _, flags in calls] == ["3"] * 3 + ["4"] * 3
    assert len({flags[flags.index("--out") + 1] for _, flags in calls}) == 6
    assert (
        "| iou_aware_retinanet minus its baseline, seed by seed | +10.0 " in capsys.readouterr().out
    )
    found = read(tmp_path, "iou_aware_retinanet", "compare.json")
    assert found["seeds"] == [3, 4] and found["metrics"]["its baseline"][1]["AP"] == 0.5


def test_torchvision_keeps_the_contract(tmp_path):
    """It trains, and its detections come out as its own, with the labels that data has."""
    flags = [*SMALL, "--train", "--steps", "1", "--out", str(tmp_path)]
    assert 0 <= compare.train_torchvision(flags)["AP"] <= 1
    config = checkpoint.settings_of("d2det", flags)
    model = compare.TorchvisionFasterRCNN(config, 10).eval()
    torch.nn.init.normal_(model.net.roi_heads.box_predictor.cls_score.weight, std=1)
    images = [common.SyntheticDetection(2, 64)[i][0] for i in range(2)]
    with torch.no_grad():
        want = model.net([i.float() / 255 for i in images])
        found = model.predict(images)
    assert sum(len(w["scores"]) for w in want) > 10
    for ours, theirs in zip(found, want):
        assert torch.equal(ours["scores"], theirs["scores"])
        assert torch.equal(ours["boxes"], theirs["boxes"])
        assert torch.equal(ours["labels"], theirs["labels"] - 1)


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
    config = retinanet.Config(backbone="resnet18", backbone_weights="none", fpn_channels=16, p2=p2)
    ours = retinanet.Detector(config, 3).backbone.eval()
    theirs = bench.torchvision_detector("one_stage", config, 3).eval()
    assert type(theirs).__name__ == "RetinaNet" and theirs.head.classification_head.num_classes == 3
    image = torch.rand(1, 3, 96, 160)
    assert [m.shape for m in ours(image)] == [m.shape for m in theirs.backbone(image).values()]


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
