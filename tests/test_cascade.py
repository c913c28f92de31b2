"""Cascade R-CNN by hand, against Faster R-CNN, and under CPM R-CNN's scores (its Table 3)."""

import dataclasses
import doctest
import math

import pytest
import torch
from methods import (
    batch,
    behaviour,
    build,
    check_all_crowd,
    check_command_line,
    check_overfits,
    check_resume,
    own_flags,
    settings_of,
    without_objects,
)

import common
import cpm_rcnn
from baselines import cascade_rcnn, faster_rcnn
from baselines.cascade_rcnn import BoxStages
from baselines.faster_rcnn import TrainingRois
from engine.command import parse

SMALL = dict(
    fpn_channels=16, fc_channels=32, norm="gn", workers=0, proposals_train=60, proposals_test=40
)
CPM = dict(base="cascade")


def make(method=cascade_rcnn, **changes):
    torch.manual_seed(0)
    return build(method, settings_of(method, **{**SMALL, **changes}))


def sure(model):
    """The same model with scores and boxes far apart, as after training."""
    torch.manual_seed(1)
    for head in model.stages.heads:
        torch.nn.init.normal_(head.classify[-1].weight, std=1)
        torch.nn.init.normal_(head.regress.weight, std=0.5)
    if hasattr(model, "rsm"):
        torch.nn.init.normal_(model.rsm[-1].weight, std=1)
    if hasattr(model, "ism"):
        torch.nn.init.normal_(model.ism.fc[-1].weight, std=0.3)
        torch.nn.init.constant_(model.ism.fc[-1].bias, 0.5)
    return model


def test_examples_in_docstrings():
    assert doctest.testmod(cascade_rcnn).attempted >= 8
    assert doctest.testmod(cascade_rcnn).failed == 0


# ------------------------------------------------------------------------------ by hand


def constant_stages(num, shift=1.0, **options):
    """Stages of equal logits whose every box moves by `shift` units in x, and the RoIs they see."""
    stages, seen = BoxStages(4, 8, 10, (0.5, 0.6, 0.7)[:num], **options), []
    for head in stages.heads:
        for layer in (head.classify[-1], head.regress):
            torch.nn.init.zeros_(layer.weight)
        head.regress.bias.data = torch.tensor([shift, 0, 0, 0])
    return stages, seen, lambda rois: seen.append(rois) or torch.zeros(len(rois), 1, 2, 2)


SIZES = torch.tensor([[100.0, 100]])
GT = torch.tensor([[10.0, 10, 30, 30]])
TARGETS = [dict(boxes=GT, labels=torch.tensor([3]), ignore=torch.tensor([False]))]
ROIS = TrainingRois(
    image=torch.zeros(5, dtype=torch.long),
    boxes=torch.tensor([
        [10.0, 10, 30, 30],  # the gt's copy
        [12, 10, 32, 30],  # IoU 18 / 22; moved by 2 px: 16 / 24, then by 1 px: 15 / 25
        [14, 10, 34, 30],  # IoU 16 / 24; moved by 2 px: 14 / 26, no longer positive
        [50, 50, 70, 60],
        [85, 50, 99, 70],  # moved by 1.4 px: cut at the image's border
    ]),
    labels=torch.tensor([3, 3, 3, 10, 10]),
    gt=torch.zeros(5, dtype=torch.long),
    gt_boxes=GT.expand(5, 4),
    is_gt=torch.tensor([True, False, False, False, False]),
)  # fmt: skip


def in_rows(rois):
    return sorted([round(x, 3) for x in row] for row in rois.boxes.tolist())


def test_three_stages_by_hand():
    """Deltas of 1 unit: 10 % of the width in stage 1, 5 % in stage 2; the gt's RoI stays a gt."""
    stages, seen, pool = constant_stages(3)
    losses, rois, hidden = stages.loss(pool, ROIS, SIZES, TARGETS)
    first, second, third = map(in_rows, seen)
    assert first == in_rows(ROIS)
    assert second == [[10, 10, 30, 30], [14, 10, 34, 30], [16, 10, 36, 30], [52, 50, 72, 60],
                      [86.4, 50, 100, 70]]  # fmt: skip
    assert third == [[10, 10, 30, 30], [15, 10, 35, 30], [17, 10, 37, 30], [53, 50, 73, 60],
                     [87.08, 50, 100, 70]]  # fmt: skip
    # smooth L1 of (1 - wanted shift): stage 1 wants 0, -1, -2 units; stage 2 0, -4; stage 3 only 0
    want = dict(reg1=(0.5 + 1.5 + 2.5) / 5, reg2=(0.5 + 4.5) / 5 / 2, reg3=0.5 / 5 / 4)
    want |= {f"cls{s}": math.log(11) / 2 ** (s - 1) for s in (1, 2, 3)}
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(want, rel=1e-4)
    assert in_rows(rois) == third and sorted(rois.labels.tolist()) == [3, 10, 10, 10, 10]
    assert hidden.shape == (5, 8)
    best = rois[rois.labels == 3]
    assert torch.equal(best.boxes, GT) and torch.equal(best.gt_boxes, GT) and best.is_gt.all()


def test_stages_draw_as_many_rois_as_told():
    stages, seen, pool = constant_stages(2, num_samples=6, positive=0.5)
    rois = ROIS[[1] * 6]  # all still positive in stage 2: 3 of them or the gt are drawn
    losses, *_ = stages.loss(pool, rois, SIZES, TARGETS)
    assert len(seen[1]) == 3 and losses["reg2"] > 0


def test_logits_are_averaged_and_each_stage_sees_its_own_boxes():
    stages, seen, pool = constant_stages(2)
    for head, logit in zip(stages.heads, (4.0, -1.0)):
        head.classify[-1].bias.data[7] = logit
    (first, last), probs, hidden = stages(pool, ROIS, SIZES)
    moved = ROIS.boxes[1] + torch.tensor([2.0, 0, 2, 0])
    assert torch.equal(seen[0].boxes, ROIS.boxes) and torch.equal(seen[1].boxes, first.boxes)
    assert len(seen) == 2 and torch.allclose(first.boxes[1], moved)
    assert torch.allclose(last.boxes[1], moved + torch.tensor([1.0, 0, 1, 0]))
    assert torch.allclose(last.boxes[4], torch.tensor([87.08, 50, 100, 70]))
    mean = math.exp(1.5) / (math.exp(1.5) + 10)  # not the mean of the stages' probabilities
    want = [math.exp(4) / (math.exp(4) + 10), mean]
    for found, p in zip(probs, want, strict=True):
        assert found.shape == (5, 10) and found[:, 7].tolist() == pytest.approx([p] * 5)
    assert hidden.shape == (5, 8)


def test_constants():
    """Deltas' weights, IoUs, loss weights and schedule as released; one box for all classes."""
    inverse = [[1 / std for std in cascade_rcnn.stage_stds(s)] for s in (1, 2, 3)]
    want = [[10, 10, 5, 5], [20, 20, 10, 10], [30, 30, 15, 15]]
    assert all(a == pytest.approx(b) for a, b in zip(inverse, want))
    settings = cascade_rcnn.Settings()
    model, test, run = settings.model, settings.test, settings.run
    assert (model.num_stages, model.stage_ious, model.stage_decay) == (2, (0.5, 0.6, 0.7), 0.5)
    assert (model.roi_samples, model.roi_positive) == (512, 0.25)
    assert (test.score_threshold, test.nms_iou, test.max_detections) == (0.05, 0.5, 100)
    assert (run.lr, run.lr_batch, run.warmup, run.warmup_factor) == (0.02, 16, 500, 1 / 10)
    assert run.epochs * 118_287 / 16 == pytest.approx(90_000, rel=1e-3)
    assert run.drops == (60 / 90, 80 / 90) and run.weight_decay == 1e-4
    stages = BoxStages()
    assert (stages.num_samples, stages.positive, stages.ious) == (512, 0.25, (0.5, 0.6))
    head = stages.heads[1]
    shapes = [tuple(p.shape) for p in head.parameters() if p.ndim == 2]
    assert shapes == [(1024, 12544), (1024, 1024), (81, 1024), (4, 1024)]
    for layer, std in ((head.classify[-1], 0.01), (head.regress, 0.001)):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.1) and not layer.bias.any()


# ------------------------------------------------------------------------------ detector


def test_one_stage_is_faster_rcnn_with_one_box_for_all_classes():
    cascade, faster = sure(make(num_stages=1)), make(faster_rcnn)
    state = {k.replace("stages.heads.0.", ""): v for k, v in cascade.state_dict().items()}
    for name in ("regress.weight", "regress.bias"):
        state[name] = torch.cat([state[name]] * 10)
    faster.load_state_dict(state)
    images, targets = batch()
    losses = []
    for model in (cascade, faster):
        torch.manual_seed(2)
        losses.append(list(model.loss(images, targets).values()))
    torch.testing.assert_close(*losses)
    for ours, theirs in zip(cascade.eval().predict(images), faster.eval().predict(images)):
        assert len(ours["boxes"]) > 20 and torch.equal(ours["labels"], theirs["labels"])
        torch.testing.assert_close(ours, theirs)


def test_every_weight_learns_also_from_images_without_objects():
    model, (images, targets) = make(num_stages=3), batch()
    losses = model.loss(images, targets)
    stages = [f"{what}{s}" for s in (1, 2, 3) for what in ("cls", "reg")]
    assert [*losses] == ["rpn_cls", "rpn_box", *stages]
    for head, names in zip(model.stages.heads, (stages[:2], stages[2:4], stages[4:])):
        other = [p for h in model.stages.heads if h is not head for p in h.parameters()]
        own = sum(losses[name] for name in names)
        found = torch.autograd.grad(own, other, retain_graph=True, allow_unused=True)
        assert all(g is None for g in found)  # no gradient goes from box to box
    sum(losses.values()).backward()
    learning = [model.stages, model.rpn, model.backbone.stem]  # no RoI may be on a level
    assert all(p.grad.abs().sum() > 0 for part in learning for p in part.parameters())
    model.zero_grad(set_to_none=True)
    losses = model.loss(images, without_objects(targets))
    assert all((v > 0) == ("cls" in k) for k, v in losses.items())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("method, changes", [(cascade_rcnn, {}), (cpm_rcnn, CPM)])
def test_batches_and_crowds(method, changes):
    check_all_crowd(make(method, **changes))
    model, (images, _) = sure(make(method, **changes)).eval(), batch()
    for image, both in zip(images, model.predict(images)):
        (alone,) = model.predict([image])
        assert len(alone["boxes"]) > 20 and (both["scores"].diff() <= 0).all()
        torch.testing.assert_close(alone, both, atol=1e-2, rtol=0)
    small = model.predict([images[0], images[1][:, :50, :70]])[1]["boxes"]  # padded to 96x96
    assert len(small) and small[:, 2].max() <= 70 and small[:, 3].max() <= 50


def test_one_image_can_be_overfitted():
    check_overfits(make(fpn_channels=32), 0, 120, 0.6)


@pytest.mark.parametrize("method", [cascade_rcnn, cpm_rcnn])
def test_impossible_stages_are_refused(method):
    base = CPM if method is cpm_rcnn else {}
    for changes in (dict(num_stages=4), dict(num_stages=2, test_stage=3), dict(num_stages=0)):
        with pytest.raises(common.BadInput, match="stage"):
            make(method, **{**base, **changes})


CHANGED = dict(num_stages=3, stage_ious=(0.4, 0.7), stage_decay=1.0, test_stage=1, nms_iou=0.1)


@pytest.mark.parametrize("flag", list(CHANGED))
def test_flag_changes_the_run(flag):
    base = behaviour(sure(make()))
    if flag == "num_stages":
        assert own_flags(cascade_rcnn) - own_flags(faster_rcnn) < CHANGED.keys()
        assert behaviour(sure(make())) == base
    assert behaviour(sure(make(**{flag: CHANGED[flag]}))) != base


# ------------------------------------------------------------------------------ CPM's Table 3


def test_cpm_without_its_scores_is_cascade_rcnn():
    cpm = make(cpm_rcnn, **CPM, ism=False, rsm=False, score_threshold=0.05)
    ours, (images, targets) = sure(make()), batch()
    cpm.load_state_dict(ours.state_dict())
    losses, found = [], []
    for model in (ours, cpm):
        torch.manual_seed(2)
        losses.append(model.loss(images, targets))
        found.append(model.eval().predict(images))
    assert losses[0] == losses[1] and len(found[0][0]["boxes"]) > 20
    for a, b in zip(*found):
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_what_trains_ism_and_rsm(monkeypatch):
    """ISM: the last stage's positives, their IoU; RSM: them and the first stage's negatives."""
    model, (images, targets) = make(cpm_rcnn, **CPM, roi_samples=64), batch()
    boxes, _, valid, _ = common.pad_targets(targets)
    beside = boxes + 0.1 * (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
    away = torch.tensor([0.0, 0, 9, 9]).expand_as(boxes)
    proposals = torch.cat([beside, away], 1), valid.repeat(1, 2)
    model.rpn.proposals = lambda *_, **__: proposals
    pooled, labels, seen = [], [], []
    pool, loss, ism = model.pool, faster_rcnn.class_loss, cpm_rcnn.iou_scoring_loss
    model.pool = lambda f, rois, size: pooled.append(rois) or pool(f, rois, size)
    monkeypatch.setattr(faster_rcnn, "class_loss", lambda x, y: labels.append(y) or loss(x, y))
    monkeypatch.setattr(cpm_rcnn, "iou_scoring_loss", lambda *a: seen.append(a) or ism(*a))
    losses = model.loss(images, targets)
    first, second, again = pooled
    negative, positive = labels[0] == 10, labels[1] < 10
    both = torch.cat([first[negative].flat(), second[positive].flat()])
    assert torch.equal(again.flat(), both)
    assert torch.equal(labels[2], torch.cat([labels[0][negative], labels[1][positive]]))
    predicted, ious, kind, num = seen[0]
    gts = torch.cat([t["boxes"] for t in targets])
    image = torch.cat([torch.full_like(t["labels"], i) for i, t in enumerate(targets)])
    rois = second[positive]
    pairs = common.aligned_iou(rois.boxes[:, None], gts) * (rois.image[:, None] == image)
    assert torch.equal(ious, pairs.amax(1)) and ious.min() >= 0.6 and (ious < 1).any()
    assert kind == "l2" and num == len(ious) == len(predicted) == positive.sum()
    losses["ism"].backward()  # it teaches the last stage's hidden layers, and no other stage
    silent = [h.classify[1].weight.grad is None for h in model.stages.heads]
    assert silent == [True, False]


def test_scores_of_table_3():
    """Eq. 4 for each class over the threshold: ISM by RoI, RSM by class on the final box."""
    model, (images, _) = sure(make(cpm_rcnn, **CPM, score_threshold=0.05)).eval(), batch()
    outputs, test = model.outputs(images), model.full_settings.test
    found = model.candidates(outputs, test)
    features, sizes, rois = model.test_rois(images)
    pool = lambda rois: model.pool(features, rois, 7)  # noqa: E731
    moved, all_probs, hidden = model.stages(pool, rois, sizes)
    final, probs = moved[-1], all_probs[-1]
    row, label = (probs > 0.05).nonzero(as_tuple=True)
    assert len(row) > len(row.unique()) > 20
    assert torch.equal(found["boxes"], final.boxes[row]) and torch.equal(found["labels"], label)
    assert torch.equal(found["image"], final.image[row])
    ism = model.ism(hidden)[row, 1].clamp(0, 1)
    rsm = model.rsm(pool(final)).softmax(1)[row, label]
    want = (probs[row, label] * ism) ** 0.8 * rsm**0.2
    assert torch.allclose(found["scores"], want)
    # NMS comes last: at 0.5, of boxes whose fused score is over the threshold
    for i, kept in enumerate(model.predict(images)):
        candidates = (found["image"] == i) & (want > 0.05)
        assert 0 < len(kept["scores"]) < candidates.sum() and kept["scores"].min() > 0.05
        iou = common.aligned_iou(kept["boxes"][:, None], kept["boxes"]).triu(1)
        assert (iou * (kept["labels"][:, None] == kept["labels"])).max() <= 0.5
    early = model.candidates(outputs, dataclasses.replace(test, test_stage=1))
    row, label = (all_probs[0] > 0.05).nonzero(as_tuple=True)
    assert torch.equal(early["boxes"], moved[0].boxes[row])
    assert torch.equal(early["cls"], all_probs[0][row, label])
    assert (early["ism"] == 1).all()  # the first stage has none
    model.settings = dataclasses.replace(model.settings, ism=False, rsm=False)
    scores = model.candidates(outputs, test)["scores"]
    assert torch.equal(scores, found["cls"])


def test_every_setting_of_testing_counts():
    model, (images, _) = sure(make(cpm_rcnn, **CPM)).eval(), batch(seed=1)
    changes = [{}, dict(gamma=0.5), dict(ism_use="replace"), dict(ism_use="ignore")]
    changes += [dict(test_stage=1), dict(nms_iou=0.1)]
    found = []
    for change in changes:
        detections = model.predict(images, cpm_rcnn.CascadeTest(**change))
        found.append([d["boxes"].tolist() + d["scores"].tolist() for d in detections])
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


def parsed(*flags, preset="paper"):
    return parse("cpm_rcnn", cpm_rcnn.Settings, ["--preset", preset, *flags])[1]


def test_the_flag_brings_what_the_rows_have():
    settings = parsed("--base", "cascade")
    assert settings == parsed("--row", "table3.cascade_ism_rsm")
    assert settings == cpm_rcnn.Settings(**CPM).replace(out=settings.run.out)
    with pytest.raises(common.BadInput, match="--base cascade: its model is not a Model"):
        cpm_rcnn.Settings(base="cascade", model=cpm_rcnn.Model()).replace(gamma=0.5)
    tiny = parsed("--base", "cascade", preset="tiny")
    assert (tiny.model.num_stages, tiny.model.rsm_weight) == (2, 0.2)
    assert tiny.run.epochs == cascade_rcnn.TINY["epochs"] and parsed().model.num_stages == 3


def test_settings_are_saved_and_read():
    settings = cpm_rcnn.Settings(**CPM).replace(num_stages=1, gamma=0.5)
    assert cpm_rcnn.Settings.from_dict(settings.to_dict()) == settings
    old = dict(base="cascade", nms_iou=0.3, merge_iou=0.4, num_stages=1, grid_weight=15.0)
    read = cpm_rcnn.Settings.from_dict(old)  # one flat dict, in which merge_iou was the NMS's
    assert read == cpm_rcnn.Settings(**CPM).replace(nms_iou=0.4, num_stages=1, rpn_floor=0.3)


def test_rows_of_table_3():
    weights = {"": (1, 0.2), "_ism": (1.5, 0.2), "_rsm": (1, 0.2), "_ism_rsm": (1, 0.2)}
    for row, (ism, rsm) in weights.items():
        settings = parsed("--row", f"table3.cascade{row}")
        flat = settings.flat()
        base = cascade_rcnn.Settings().replace(out=settings.run.out).flat()
        assert base.items() <= flat.items()  # all else is the baseline's
        own = {name: value for name, value in flat.items() if name not in base}
        assert own == dict(
            base="cascade", ism="ism" in row, rsm="rsm" in row, ism_weight=ism, rsm_weight=rsm,
            ism_loss="l2", ism_use="multiply", gamma=0.8,
        )  # fmt: skip


# ------------------------------------------------------------------------------ command line

RUN = """--image-size 64 --scales 64 --test-scales 64 --max-size 64 --num-train 12 --num-val 4
 --batch 2 --steps 6 --workers 0 --fpn-channels 8 --fc-channels 16 --norm gn --log-every 1
 --save-every 2 --device cpu --draw-score 0.01""".split()


@pytest.mark.parametrize("method, flags", [(cascade_rcnn, []), (cpm_rcnn, ["--base", "cascade"])])
def test_the_command_line(tmp_path, method, flags):
    check_command_line(method, RUN, tmp_path, *flags)


def test_cpm_on_it_resumes_bit_for_bit(tmp_path, monkeypatch):
    check_resume(cpm_rcnn, [*RUN, "--base", "cascade", "--num-val", "1"], tmp_path, monkeypatch)
