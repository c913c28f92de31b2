"""The contract of engine/detector.py, for all nine detectors: every Test setting is honoured."""

import dataclasses
import functools
import importlib

import pytest
import torch
from matplotlib.figure import Figure
from methods import batch, build, settings_of

from data import SyntheticDetection
from engine.metrics import detect_under, evaluate
from studies.checkpoint import METHODS, PAPERS

# What is tested: a detector's name, and the settings that make it small, but for `SMALL`.
ONE_STAGE = dict(tower_convs=1, tower_groups=4)
CASES = {
    "faster_rcnn": dict(fc_channels=16),
    "cascade_rcnn": dict(fc_channels=16),
    "retinanet": ONE_STAGE,
    "gfl": ONE_STAGE,
    "d2det": dict(conv_channels=8, num_convs=2, groups=2, fc_channels=16),
    "d2det masks": dict(
        conv_channels=8, num_convs=2, groups=2, fc_channels=16, masks=True, mask_channels=16
    ),
    "double_head": dict(conv_channels=16, fc_channels=16),
    "cpm_rcnn": dict(point_channels=1, num_convs=1, fc_channels=16),
    "cpm_rcnn cascade": dict(base="cascade", fc_channels=16),
    "iou_aware_retinanet": ONE_STAGE,
    "dc_loss_clnms": ONE_STAGE,
    "dc_loss_clnms gfl": dict(base="gfl", **ONE_STAGE),
}
SMALL = dict(
    fpn_channels=16, norm="gn", workers=0, scales=(64,), test_scales=(64,), max_size=64,
    score_threshold=0.02, eval_batch=2, proposals_test=40,
)  # fmt: skip

# Another value of every setting; a second list of those that act only together with others.
CHANGED = dict(
    score_threshold=0.3, min_score=0.3, nms_iou=0.1, max_detections=3, top_scores=5,
    all_classes=True,
    reg_test=2, soft_nms=True, soft_nms_iou=0.1, soft_nms_score=0.3, fusion="average", alone="fc",
    test_stage=1, grid_test=2, ism_use="ignore", gamma=0.3, merge_iou=0.1, alpha=0.1, product=True,
    nms="plain", cl_literal=True, test_scales=(48,), test_flip=True,
)  # fmt: skip
GIVEN = {
    "all_classes": dict(top_scores=5),
    "soft_nms_iou": dict(soft_nms=True, nms="soft"),
    "soft_nms_score": dict(soft_nms=True, nms="soft"),
    "merge_iou": dict(soft_nms=True),
    "nms_iou": dict(nms="plain", soft_nms=False),
    "soft_nms": dict(nms_iou=0.25, soft_nms_iou=0.1, merge_iou=0.1),
}
VIEWS = ("test_scales", "test_flip")  # which `detect_under` takes from the settings
REPORTED = dict(draw_score=0.9, metric_detections=(1, 5), metric_sides=(1.0, 8.0, 16.0))
SAME = ("readable",)  # the same detections, by the equation that is there to be read


@functools.cache
def made(case: str, **changes):
    """A narrow detector with random weights, none so small that its input hardly counts."""
    name = case.split()[0]
    method = importlib.import_module(name if name in PAPERS else f"baselines.{name}")
    known = method.Settings(**{k: v for k, v in CASES[case].items() if k == "base"}).flat()
    flat = {k: v for k, v in (SMALL | changes).items() if k in known}
    torch.manual_seed(0)
    model = build(method, settings_of(method, **flat, **CASES[case]))
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
    return model.eval()


def fields_of(case: str) -> list[str]:
    return [f.name for f in dataclasses.fields(made(case).full_settings.test)]


def changed(test, **values):
    """A Test with those of the values that it has."""
    known = vars(test)
    return dataclasses.replace(test, **{k: v for k, v in values.items() if k in known})


def pair(case: str, name: str):
    """Two Tests that differ in this setting alone."""
    base = changed(made(case).full_settings.test, **GIVEN.get(name, {}))
    value = CHANGED[name]
    if value == getattr(base, name):
        assert isinstance(value, bool), name
        value = not value
    return base, dataclasses.replace(base, **{name: value})


def data(case: str):
    return SyntheticDetection(3, 64, masks=made(case).settings.masks)


def as_lists(found: list[dict]) -> list:
    return [{k: v.tolist() for k, v in one.items()} for one in found]


def count(found: list) -> int:
    return sum(len(one["boxes"]) for one in found)


def test_every_setting_and_every_detector_is_tested():
    known = {*CHANGED, *REPORTED, *SAME}
    assert known == {name for case in CASES for name in fields_of(case)}
    assert {case.split()[0] for case in CASES} == {*METHODS}


@pytest.mark.parametrize("case", CASES)
def test_every_test_setting_changes_what_is_found(case):
    """With and without each change, all by the same forward passes."""
    model = made(case)
    names = [name for name in fields_of(case) if name not in (*VIEWS, *REPORTED, *SAME)]
    tests = [test for name in names for test in pair(case, name)]
    found = [under for _, under in detect_under(model, data(case), model.full_settings, tests)]
    found = [as_lists([under[i] for under in found]) for i in range(len(tests))]
    pairs = {name: (found[2 * i], found[2 * i + 1]) for i, name in enumerate(names)}
    assert [name for name, (without, changed) in pairs.items() if without == changed] == []
    assert all(count(without) > 5 for without, _ in pairs.values())
    without, changed = pairs["score_threshold"]
    assert count(changed) < count(without)
    without, changed = pairs["min_score"]
    for all_of_them, best in zip(without, changed):
        kept = sum(score >= CHANGED["min_score"] for score in all_of_them["scores"])
        assert best == {k: v[:kept] for k, v in all_of_them.items()}
    without, changed = pairs["max_detections"]
    most = CHANGED["max_detections"]
    assert [len(one["boxes"]) for one in changed] == [most] * 3
    for all_of_them, first in zip(without, changed):
        assert first == {k: v[:most] for k, v in all_of_them.items()}


@pytest.mark.parametrize("case", CASES)
def test_nothing_of_a_test_is_stored(case):
    """One `outputs` serves all Tests in any order; `predict` is the three steps in a row."""
    model, (images, _) = made(case), batch(2, 64)
    names = [name for name in fields_of(case) if name not in (*VIEWS, *REPORTED)]
    tests = [test for name in names if name not in SAME for test in pair(case, name)]
    with torch.no_grad():
        outputs = model.outputs(images)

        def under(test):
            return as_lists(model.detections(model.candidates(outputs, test), 2, test))

        forth = [under(test) for test in tests]
        assert forth == [under(test) for test in reversed(tests)][::-1]
    assert [as_lists(model.predict(images, test)) for test in tests] == forth


@pytest.mark.parametrize("case", CASES)
def test_evaluate_uses_the_settings_that_it_is_given(case, tmp_path, monkeypatch):
    """Views change what is found, the others what is reported of it."""
    model, images = made(case), data(case)

    def evaluated(**changes) -> dict:
        seen: dict = {}

        def savefig(figure, *_, **__):
            seen["picture"] = [a.images[0].get_array().tobytes() for a in figure.axes if a.images]

        monkeypatch.setattr(Figure, "savefig", savefig)
        settings = model.full_settings.replace(**{"draw_score": 0.01, **changes})
        seen["metrics"] = evaluate(model, images, settings, tmp_path)
        seen["predictions"] = (tmp_path / "predictions.json").read_text()
        return seen

    base = evaluated()
    for name in (*VIEWS, "max_detections", "score_threshold"):
        assert evaluated(**{name: CHANGED[name]})["predictions"] != base["predictions"], name
    for name, value in REPORTED.items():
        seen = evaluated(**{name: value})
        part = "picture" if name == "draw_score" else "metrics"
        assert {k for k in seen if seen[k] != base[k]} == {part}, name
