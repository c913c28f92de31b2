"""Double-Head's Section 3: windows, sums and boxes by hand, and whole studies."""

import functools
import json

import pytest
import torch
import torchvision
from matplotlib.figure import Figure
from methods import small
from test_studies import study_of

import common
import double_head as method
from baselines.faster_rcnn import Rois
from data import SyntheticDetection
from engine.metrics import evaluate
from studies import sections
from studies.calibration import annotations_by_image, correlation

RUN = """--image-size 64 --scales 64 --test-scales 64 --max-size 64 --num-train 12 --num-val 4
 --batch 2 --steps 2 --norm gn --device cpu --fpn-channels 8 --fc-channels 16 --conv-channels 16
 --workers 0 --score-threshold 0.05""".split()


def make(**changes):
    return small(method, **{"conv_channels": 32, "proposals_train": 60, **changes})


def sure(model):
    """The same model with class scores and boxes apart, as after training."""
    torch.manual_seed(1)
    for layer in [*model.cls.values(), *model.box.values()]:
        torch.nn.init.normal_(layer.weight, std=1)
    return model


@pytest.fixture
def few_windows(monkeypatch, unpainted):
    """625 windows of an object, not 14,641; no figure is drawn."""
    few = functools.partial(sections.sliding_windows, steps=5)
    monkeypatch.setattr(sections, "sliding_windows", few)


def test_sliding_windows():
    gt = torch.tensor([[100.0, 100, 140, 180], [0, 0, 10, 10]])
    found = sections.sliding_windows(gt)
    assert found.shape == (2, 14641, 4)
    iou = torchvision.ops.box_iou(found[0], gt[:1])[:, 0]
    assert iou.min() == 0 and iou.max() == 1 and (torch.histc(iou, 20, 0, 1) > 0).all()
    three = sections.sliding_windows(gt[:1], 3)[0]  # shifts -1, 0, 1; sides 1/2, 1, 2
    assert three[0].tolist() == pytest.approx([70, 40, 90, 80])  # centre (120-40, 140-80), 20x40
    assert three[40].tolist() == gt[0].tolist() and len(three.unique(dim=0)) == 81
    got = common.aligned_iou(found[0], gt[:1].expand(14641, 4))
    torch.testing.assert_close(got, iou)


def test_statistics_by_hand():
    torch.manual_seed(0)
    labels, sizes, iou = torch.randint(4, (500,)), torch.randint(3, (500,)), torch.rand(500)
    score, moved = (0.7 * iou + 0.3 * torch.rand(500)), torch.rand(500)
    iou[0] = 1.0
    table = torch.stack([labels, sizes, iou, score, moved], 1)
    found = sections.by_group(table, [[2], [0, 1], []])
    assert set(found) == set(sections.GROUPS)
    medium, easy = sizes == 1, labels == 2
    for group, mine in (("medium objects", medium), ("easy classes", easy)):
        assert sum(found[group]["count"]) == mine.sum()
        assert found[group]["pearson"] == correlation(score[mine], iou[mine])
    everything, inside = found["all objects"], iou >= 0.95
    assert everything["count"][19] == inside.sum()
    assert everything["score_mean"][19] == pytest.approx(score[inside].mean().item(), abs=1e-5)
    assert everything["iou_std"][19] == pytest.approx(
        moved[inside].std(correction=0).item(), abs=1e-5
    )
    nothing = found["hard classes"]
    assert nothing["pearson"] is None and nothing["score_mean"] == [None] * 20


def test_groups_and_objects():
    thirds = sections.groups_of_classes(dict(a=0.1, b=0.5, c=None, d=0.9, e=0.3, f=0.2, g=0.4))
    assert [*thirds.values()] == [["d", "b"], ["g", "e"], ["f", "a"]]
    assert sections.size_group(torch.tensor([1024, 1025, 9216, 9217.0])).tolist() == [0, 1, 1, 2]
    data = SyntheticDetection(5, 64)
    annotations = annotations_by_image(data)
    count = sum(len(data[i][1]["labels"]) for i in range(5))
    for most, want in ((0, count), (3, 3), (999, count)):
        chosen = sections.choose_objects(annotations, most)
        assert sum(map(len, chosen.values())) == want
    assert chosen[1] == list(range(len(data[1][1]["labels"])))
    assert [len(annotations[i]) for i in chosen] == [len(mine) for mine in chosen.values()]
    annotations[1][0]["iscrowd"] = 1
    assert 0 not in sections.choose_objects(annotations, 0)[1]


def test_weight_correlation():
    """Cells whose weights are equal, scaled, or the negative of each other."""
    head = method.FCHead(1, 4, size=2)
    rows = torch.tensor([[1.0, 2, 3, 5], [2, 4, 6, 10], [-1, -2, -3, -5], [1, 2, 3, 5]])
    with torch.no_grad():
        head.first.weight.copy_(rows.T)
    signs = torch.tensor([1.0, 1, -1, 1])
    assert torch.tensor(sections.weight_correlation(head)).allclose(signs[:, None] * signs)


class Oracle(torch.nn.Module):
    """Heads that know: class 3's score is the window's IoU with the gt, and its box stays put."""

    def __init__(self, gt):
        super().__init__()
        self.gt = gt

    def predictions(self, features, rois):
        iou = torchvision.ops.box_iou(rois.boxes, self.gt)
        three = torch.nn.functional.one_hot(torch.tensor([3]), 10)
        deltas = (1.0 - three)[..., None].expand(len(rois), -1, 4)
        return dict(probs={"fc": iou * three, "conv": (1 - iou) * three}, deltas={"conv": deltas})


def test_windows_of_heads_that_know():
    """Perfect correlation, bin means that are the bin's IoUs, the box head's box the window."""
    gt = torch.tensor([[20.0, 20, 50, 60]])
    target = dict(boxes=gt, labels=torch.tensor([3]), sizes=torch.tensor([1]))
    outputs = dict(features=[], sizes=torch.tensor([[96.0, 96]]))
    parts = list(sections.windows(Oracle(gt), outputs, target, [0]))
    tables = {name: torch.cat([p for k, p in parts if k == name]) for name in ("fc", "conv")}
    assert len(parts) > 20 and 14641 >= len(tables["fc"]) > 14000
    assert tables["fc"][:, :2].unique(dim=0).tolist() == [[3, 1]]
    fc, conv = (sections.statistics(tables[k]) for k in ("fc", "conv"))
    assert fc["pearson"] == 1 and conv["pearson"] == -1 and min(fc["count"]) > 0
    assert fc["iou_mean"] == [None] * 20  # it has no boxes
    for i, (a, b, c) in enumerate(zip(fc["score_mean"], conv["score_mean"], conv["iou_mean"])):
        assert i / 20 <= a < (i + 1) / 20 + 1e-4 and a + b == pytest.approx(1, abs=2e-5)
        assert c == pytest.approx(a, abs=1e-4)
    assert list(sections.windows(Oracle(gt), outputs, target, [])) == []


def test_proposals_and_final_boxes_by_hand():
    """An object of class 3, and an ignored one of class 5."""
    model = make(score_threshold=0.1)
    boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
    target = dict(boxes=boxes, labels=torch.tensor([3, 5]), ignore=torch.tensor([False, True]))
    rois = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 4], [80, 80, 90, 90], [50, 50, 60, 60]])
    fc, deltas = torch.zeros(4, 10), torch.zeros(4, 10, 4)
    fc[:, 3], fc[3, 5] = torch.tensor([0.875, 0.5, 0.25, 0.25]), 0.75
    out = dict(rois=Rois(torch.zeros(4).long(), rois), sizes=torch.tensor([[96.0, 96]]))
    out |= dict(probs={"fc": fc, "conv": fc * 0}, deltas={"fc": deltas, "conv": deltas})
    pairs = dict(sections.proposals(out, target))["fc"]
    torch.testing.assert_close(pairs, torch.tensor([[0.875, 1], [0.5, 0.4]]))  # score, IoU
    found = dict(sections.final_boxes(model, out, target, model.full_settings.test))
    assert len(found["conv"]) == 0
    # the last two touch no object of their class
    want = torch.tensor([[0.875, 1], [0.5, 0.4], [0.25, 0], [0.25, 0]])
    torch.testing.assert_close(found["fc"], want)


def test_the_program(tmp_path, few_windows, unpainted, monkeypatch):
    metrics = method.main([*RUN, "--train", "--out", f"{tmp_path}"])
    monkeypatch.setattr(Figure, "savefig", unpainted)
    found = sections.main(["double_head", "--objects", "1", "--weights", f"{tmp_path}/last.pt"])
    names = {p.name for p in (tmp_path / "studies").iterdir()}
    assert names == {"sections_bins.png", "sections_weights.png", "sections.json"}
    assert json.loads((tmp_path / "studies" / "sections.json").read_text()) == found
    assert found["objects"] == 1 and found["metrics"] == metrics
    for head in ("fc", "conv"):
        counts = found["windows"][head]["all objects"]["count"]
        assert 200 < sum(counts) <= 625
        groups = [found["windows"][head][g]["count"] for g in sections.SIZES]
        assert counts == [sum(n) for n in zip(*groups)] and sum(groups[2]) == 0  # images of 64 px
    matrix = torch.tensor(found["weight_correlation"]["fc"])
    assert matrix.shape == (49, 49) and torch.equal(matrix, matrix.T)
    assert matrix.diagonal().min() == 1


def test_a_vanilla_and_a_single_head(tmp_path, few_windows):
    data = SyntheticDetection(2, 64)
    one = sure(make(lambda_fc=0.8, lambda_conv=1.0, fc_channels=16)).eval()
    found = sections.sections(study_of(one, data, tmp_path), objects=1)
    assert found["metrics"] == evaluate(one, data, one.full_settings)  # without fc-head's boxes
    assert set(found["final"]) == {"fc"}
    vanilla = sure(make(lambda_fc=1.0, lambda_conv=1.0, fc_channels=16)).eval()
    study = study_of(vanilla, data, tmp_path)
    found = sections.sections(study, objects=1)
    fc, conv = (found["windows"][name]["all objects"] for name in ("fc", "conv"))
    assert fc["iou_mean"] == [None] * 20 and fc["pearson"] is not None
    assert conv["score_mean"] == [None] * 20 and conv["pearson"] is None
    assert set(conv["iou_mean"]) != {None}
