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
from studies import sections, sweep, windows
from studies.boxes import annotations_by_image
from studies.calibration import correlation

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
    few = functools.partial(windows.sliding_windows, steps=5)
    monkeypatch.setattr(sections, "sliding_windows", few)


def test_sliding_windows():
    gt = torch.tensor([[100.0, 100, 140, 180], [0, 0, 10, 10]])
    found = windows.sliding_windows(gt)
    assert found.shape == (2, 14641, 4)
    iou = torchvision.ops.box_iou(found[0], gt[:1])[:, 0]
    assert iou.min() == 0 and iou.max() == 1 and (torch.histc(iou, 20, 0, 1) > 0).all()
    three = windows.sliding_windows(gt[:1], 3)[0]  # shifts -1, 0, 1; sides 1/2, 1, 2
    assert three[0].tolist() == [70, 40, 90, 80]  # centre (120 - 40, 140 - 80), 20x40
    assert three[40].tolist() == gt[0].tolist() and len(three.unique(dim=0)) == 81
    got = common.aligned_iou(found[0], gt[:1].expand(14641, 4))
    torch.testing.assert_close(got, iou)


def test_statistics_by_hand():
    torch.manual_seed(0)
    labels, sizes, iou = torch.randint(4, (500,)), torch.randint(3, (500,)), torch.rand(500)
    score, moved = (0.7 * iou + 0.3 * torch.rand(500)), torch.rand(500)
    iou[0] = 1.0
    moments = torch.zeros(4, 3, 20, 8, dtype=torch.double)
    for i in (slice(0, 123), slice(123, 500)):  # in pieces, as windows come
        windows.tally(moments, labels[i], sizes[i], iou[i], score[i], moved[i])
    mine = (labels == 2) & (sizes == 1)
    found = windows.statistics(moments[2, 1])
    assert sum(found["count"]) == mine.sum()
    assert found["pearson"] == correlation(score[mine], iou[mine])["pearson"]
    everything = windows.statistics(moments.sum((0, 1)))
    inside = (iou >= 0.95) & (iou <= 1)
    assert everything["count"][19] == inside.sum()
    assert everything["score_mean"][19] == pytest.approx(score[inside].mean().item(), abs=1e-5)
    assert everything["iou_std"][19] == pytest.approx(
        moved[inside].std(correction=0).item(), abs=1e-5
    )
    nothing = windows.statistics(moments[0, 0] * 0)
    assert nothing["pearson"] is None and nothing["score_mean"] == [None] * 20


def test_groups_and_objects():
    thirds = windows.groups_of_classes(dict(a=0.1, b=0.5, c=None, d=0.9, e=0.3, f=0.2, g=0.4))
    assert [*thirds.values()] == [["d", "b"], ["g", "e"], ["f", "a"]]
    assert windows.size_group(torch.tensor([1024, 1025, 9216, 9217.0])).tolist() == [0, 1, 1, 2]
    data = SyntheticDetection(5, 64)
    annotations = annotations_by_image(data)
    count = sum(len(data[i][1]["labels"]) for i in range(5))
    for most, want in ((0, count), (3, 3), (999, count)):
        chosen = windows.choose_objects(annotations, most)
        assert sum(map(len, chosen.values())) == want
    assert chosen[1] == list(range(len(data[1][1]["labels"])))
    assert [len(annotations[i]) for i in chosen] == [len(mine) for mine in chosen.values()]
    annotations[1][0]["iscrowd"] = 1
    assert 0 not in windows.choose_objects(annotations, 0)[1]


def test_cell_correlation():
    maps = torch.tensor([[1.0, 0, 0], [2, 0, 0], [0, 3, 0], [-1, 0, 0]])
    want = torch.tensor([[1.0, 1, 0, -1], [1, 1, 0, -1], [0, 0, 1, 0], [-1, -1, 0, 1]]).double()
    assert torch.equal(windows.cell_correlation(maps), want)


class Oracle(torch.nn.Module):
    """Heads that know: class 3's score is the window's IoU with the gt, and its box stays put."""

    def __init__(self, model, gt):
        super().__init__()
        self.inner, self.gt, self.heads, self.cls, self.box = model, gt, model.heads, model.cls, {}
        self.num_classes, self.pool_for_heads = model.num_classes, model.pool_for_heads

    def predictions(self, features, rois):
        iou = torchvision.ops.box_iou(rois.boxes, self.gt)
        three = torch.nn.functional.one_hot(torch.tensor([3]), 10)
        deltas = (1.0 - three)[..., None].expand(len(rois), -1, 4)
        return dict(probs={"fc": iou * three, "conv": (1 - iou) * three}, deltas={"conv": deltas})


def test_windows_of_heads_that_know():
    """Perfect correlation, bin means that are the bin's IoUs, the box head's box the window."""
    gt, size = torch.tensor([[20.0, 20, 50, 60]]), torch.tensor([[96.0, 96]])
    model = make().eval()
    analysis = sections.Analysis(Oracle(model, gt), model.full_settings.test, [])
    features = model.backbone(torch.rand(1, 3, 96, 96))
    with torch.no_grad():
        analysis.add_windows(features, gt, torch.tensor([3]), torch.tensor([1]), size)
    moments = analysis.windows["fc"]
    assert analysis.num_windows == 14641 >= moments[..., 0].sum() == moments[3, 1, :, 0].sum()
    fc, conv = (windows.statistics(analysis.windows[k][3, 1]) for k in ("fc", "conv"))
    assert fc["pearson"] == 1 and conv["pearson"] == -1 and min(fc["count"]) > 0
    for i, (a, b, c) in enumerate(zip(fc["score_mean"], conv["score_mean"], conv["iou_mean"])):
        assert i / 20 <= a < (i + 1) / 20 + 1e-4 and a + b == pytest.approx(1, abs=2e-5)
        assert c == pytest.approx(a, abs=1e-4)
    assert set(analysis.cells) == {"fc input", "conv input", "fc", "conv"} and analysis.objects == 1
    assert not torch.allclose(analysis.cells["fc input"], analysis.cells["conv input"])  # 1.3
    assert all(
        torch.allclose(c.diagonal(), torch.ones(49).double()) for c in analysis.cells.values()
    )


def test_proposals_and_final_boxes_by_hand():
    """An object of class 3, an ignored one of class 5; an image shown at half its size."""
    model, data = make(score_threshold=0.1), SyntheticDetection(1, 96)
    boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
    target = dict(boxes=boxes, labels=torch.tensor([3, 5]), ignore=torch.tensor([False, True]))
    target |= dict(size=(192, 192), image_id=7)
    rois = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 4], [80, 80, 90, 90], [50, 50, 60, 60]])
    fc, deltas = torch.zeros(4, 10), torch.zeros(4, 10, 4)
    fc[:, 3], fc[3, 5] = torch.tensor([0.875, 0.5, 0.25, 0.25]), 0.75
    out = dict(rois=Rois(torch.zeros(4).long(), rois))
    out |= dict(sizes=torch.tensor([[96.0, 96]]), probs={"fc": fc, "conv": fc * 0})
    analysis = sections.Analysis(model, model.full_settings.test, data.categories)
    analysis.add_image(
        out | dict(deltas={"fc": deltas, "conv": deltas}), target, torch.tensor([2, 0]), []
    )
    count, score = analysis.proposals["fc"][..., 0], analysis.proposals["fc"][..., 3]
    assert count.sum() == 2 and score[3, 2, 19] == 0.875 and score[3, 2, 8] == 0.5  # IoU 1, 0.4
    count, score = analysis.final["fc"][..., 0], analysis.final["fc"][..., 3]
    assert score[3, 2, 19] == 0.875 and score[3, 2, 8] == 0.5 and count.sum() == 4
    assert score[3, 0, 0] == 0.5  # two that touch no object of their class: small, 20x20 in truth
    assert analysis.final["conv"].sum() == 0 and analysis.final["model"][..., 0].sum() == 4
    kept = [r["bbox"] for r in analysis.results]
    assert len(kept) == 5 and kept[0] == [0, 0, 20, 20] and [160, 160, 20, 20] in kept


def test_the_program(tmp_path, capsys, few_windows, unpainted, monkeypatch):
    """Two runs, the second drawn beside the first; what is refused."""
    fc, both = tmp_path / "fc", tmp_path / "both"
    method.main([*RUN, "--train", "--row", "table1.fc", "--out", str(fc)])
    metrics = method.main([*RUN, "--train", "--out", str(both)])
    one = ["double_head", "--objects", "1"]
    other = sections.main([*one, "--weights", f"{fc}/last.pt"])
    assert other["absent"] == [] and set(other["windows"]) == {"fc"} == set(other["final"])
    where = ["--weights", f"{both}/last.pt"]
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", unpainted)
        found = sections.main([*one, *where, "--compare", f"{fc}/studies/sections.json"])
    names = {p.name for p in (both / "studies").iterdir()}
    figures = {f"sections_{k}.png" for k in ("bins", "pearson", "weights", "features")}
    assert names == figures | {"sections.json"}
    assert json.loads((both / "studies" / "sections.json").read_text()) == found
    assert found["per_class"] == other["per_class"] and found["objects"] == 1
    assert set(found["final"]) == {"fc", "conv", "model"} and found["metrics"] == metrics
    for head in ("fc", "conv"):
        counts = found["windows"][head]["all objects"]["count"]
        assert 200 < sum(counts) <= found["windows_made"] == 625
        groups = [found["windows"][head][g]["count"] for g in windows.SIZES]
        assert counts == [sum(n) for n in zip(*groups)] and sum(groups[2]) == 0  # images of 64 px
    matrix = torch.tensor(found["weight_correlation"]["fc"])
    assert matrix.shape == (49, 49) and torch.equal(matrix, matrix.T)
    assert matrix.diagonal().min() == 1
    (tmp_path / "bad.json").write_text('{"per_class": {"cow": 0.5}, "windows": {}}')
    for file, message in (("bad.json", "not an analysis of these classes"), ("no.json", "no.json")):
        with pytest.raises(SystemExit):
            sections.main([*one, *where, "--compare", f"{tmp_path}/{file}"])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sections.main([*one, *where, "--compare", f"{fc}/studies/sections.json", "--objects", "2"])
    assert "made with other objects" in capsys.readouterr().err


def test_a_vanilla_and_a_single_head(tmp_path, few_windows):
    data = SyntheticDetection(2, 64)
    one = sure(make(lambda_fc=0.8, lambda_conv=1.0, fc_channels=16)).eval()
    found = sections.sections(study_of(one, data, tmp_path), objects=1)
    assert found["metrics"] == evaluate(one, data, one.full_settings)  # without fc-head's boxes
    assert set(found["final"]) == {"fc", "model"}
    vanilla = sure(make(lambda_fc=1.0, lambda_conv=1.0, fc_channels=16)).eval()
    study = study_of(vanilla, data, tmp_path)
    assert set(sweep.sweep("fusion", study)) == {"none"}
    found = sections.sections(study, objects=1)
    assert found["absent"] == ["conv cls", "fc reg"] and set(found["final"]) == {"fc"}
    assert {k for k in found["windows"]["fc"]["all objects"]} == {
        "count", "pearson", "score_mean", "score_std",
    }  # fmt: skip
    assert "pearson" not in found["windows"]["conv"]["all objects"]
