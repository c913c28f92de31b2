"""CPM R-CNN: what a whole step must satisfy, its rows and flags, and runs."""

import dataclasses
import functools

import pytest
import torch
import torchvision
from methods import (
    batch,
    behaviour,
    build,
    check_all_crowd,
    check_command_line,
    check_overfits,
    check_real_data,
    own_flags,
    settings_of,
    without_objects,
)

import common
import cpm_rcnn as method
import engine
from baselines import faster_rcnn
from cpm_rcnn import Settings, Test
from data.transforms import TestImages
from engine.command import read_rows
from engine.settings import choices

ROWS, _ = read_rows("cpm_rcnn")

SMALL = dict(
    fpn_channels=16, point_channels=2, num_convs=1, fc_channels=32, norm="gn", workers=0,
    proposals_train=60, proposals_test=40,
)  # fmt: skip


def make(**changes):
    known = Settings(**choices(Settings, changes)).flat()
    small = {k: v for k, v in SMALL.items() if k in known}
    torch.manual_seed(0)
    return build(method, settings_of(method, **{**small, **changes}))


def sure(model):
    """The same model with class scores, IoUs and heat maps far apart, as after training."""
    torch.manual_seed(1)
    cascade = isinstance(model, method.CascadeDetector)
    layers = [head.classify[-1] for head in (model.stages.heads if cascade else [model])]
    if model.settings.rsm:
        layers.append(model.rsm[-1])
    layers += [] if cascade else [head.heat[-1] for head in model.grids]
    for layer in layers:
        torch.nn.init.normal_(layer.weight, std=1)
    if model.settings.ism:
        torch.nn.init.normal_(model.ism.fc[-1].weight, std=1)
        torch.nn.init.constant_(model.ism.fc[-1].bias, 0.5)
    return model


# ------------------------------------------------------------------------------ detector


@pytest.mark.parametrize("row", [*ROWS])
def test_every_row_builds_and_trains(row):
    keep = ("backbone", "dcn", "scales", "test_scales", "max_size")  # sizes stay small here
    changes = {k: v for k, v in ROWS[row].items() if k not in keep}
    model, (images, targets) = sure(make(**changes)), batch(1, 64)
    losses = model.loss(images, targets)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    settings = model.settings
    grids = ["cls", *[f"grid{i + 1}" for i in range(settings.num_stages)]]
    stages = ["cls1", "reg1", "cls2", "reg2"] if row.startswith("table3") else grids
    scores = ["ism"] * settings.ism + ["rsm"] * settings.rsm
    assert [*losses] == ["rpn_cls", "rpn_box", *stages, *scores]
    assert set(model.eval().predict(images)[0]) == {"boxes", "scores", "labels"}


def test_images_without_objects_train_and_every_weight_learns():
    model, (images, targets) = make(), batch()
    sum(model.loss(images, targets).values()).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    model.zero_grad(set_to_none=True)
    losses = model.loss(images, without_objects(targets))
    assert all((v > 0) == (k in ("rpn_cls", "cls", "rsm")) for k, v in losses.items())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    half = model.loss(images, [targets[0], *without_objects(targets[1:])])
    assert half["grid3"] > 0 and all(v.isfinite() for v in half.values())


def test_what_enters_each_stage(monkeypatch):
    """The gts, and what the stage before made of others, from the stage's IoU on; no gradient."""
    seen, original = [], method.grid_targets

    def spy(boxes, gts, ratio, size):
        seen.append((boxes, torchvision.ops.box_iou(boxes, gts).diagonal(), ratio))
        return original(boxes, gts, ratio, size)

    monkeypatch.setattr(method, "grid_targets", spy)
    model, (images, targets) = make(grid_rois=2), batch(2)
    used = []  # the ratios that maps are decoded with

    def decode(boxes, logits, ratio, sizes):
        assert not logits.requires_grad and len(logits) == len(boxes)
        used.append(ratio)
        return boxes + 0.1

    monkeypatch.setattr(method, "decode_grid", decode)
    pooled, labels, pool, loss = [], [], model.pool, faster_rcnn.class_loss
    model.pool = lambda f, rois, size: pooled.append(rois) or pool(f, rois, size)
    monkeypatch.setattr(faster_rcnn, "class_loss", lambda x, y: labels.append(y) or loss(x, y))
    model.loss(images, targets)
    gts = torch.cat([t["boxes"] for t in targets])
    positives = torch.bincount(pooled[0].image[labels[0] < 10])
    assert positives.tolist() != [2, 2] and positives.min() >= 2  # more than grid_rois lets in
    # RSM: the classifier's negatives, then the last stage's boxes with their objects' labels
    first, last = pooled[0][labels[0] == 10], len(seen[2][0])
    rescored = pooled[-1]
    assert torch.equal(rescored[:-last].flat(), first.flat())
    assert (labels[-1][:-last] == 10).all() and torch.equal(rescored.boxes[-last:], seen[2][0])
    image_of, known = rescored.image[-last:], torch.cat([t["labels"] for t in targets])
    of_gt = torch.cat([torch.full_like(t["labels"], i) for i, t in enumerate(targets)])
    ious = torchvision.ops.box_iou(seen[2][0], gts) * (image_of[:, None] == of_gt)
    assert torch.equal(labels[-1][-last:], known[ious.argmax(1)]) and known.unique().numel() > 2
    assert [r for _, _, r in seen] == [2.0, 1.5, 1.25] and len(seen[0][0]) <= 4
    assert used == [2.0, 1.5]  # no stage learns from the last one's boxes
    for (boxes, ious, _), threshold in zip(seen, (0.5, 0.6, 0.7)):
        assert ious.min() >= threshold and not boxes.requires_grad
    gts_in = []
    for (before, _, _), (boxes, _, _), threshold in zip(seen, seen[1:], (0.6, 0.7)):
        copies = (before[:, None] == gts).all(2).any(1)
        gts_in.append(copies.sum().item())
        moved = before[~copies] + 0.1
        fit = torchvision.ops.box_iou(moved, gts).amax(1) >= threshold
        assert torch.equal(boxes, torch.cat([moved[fit], gts]))
    assert 0 < gts_in[0] <= 4 and gts_in[1] == len(gts)  # of the sampled ones; of those added


def test_thousands_of_objects_do_not_all_enter_a_stage(monkeypatch):
    seen, original = [], method.grid_targets
    monkeypatch.setattr(
        method, "grid_targets", lambda boxes, *rest: seen.append(boxes) or original(boxes, *rest)
    )
    model, (images, targets) = make(), batch(2)
    corner = torch.rand(600, 2) * 60
    many = dict(boxes=torch.cat([corner, corner + 20], 1), labels=torch.arange(600) % 10)
    targets[0] = {**targets[0], **many, "ignore": torch.arange(600) < 50}
    sum(model.loss(images, targets).values()).backward()
    assert len(seen) == 3
    entering = 2 * model.settings.grid_rois  # of the stage before
    assert all(len(boxes) <= entering + 100 + len(targets[1]["boxes"]) for boxes in seen)
    # of the first hundred objects of the full image those that are no crowd, and all of the other
    expected = torch.cat([many["boxes"][50:100], targets[1]["boxes"]])
    assert torch.equal(seen[2][-len(expected) :], expected)


def test_a_batch_of_two_equals_two_singles():
    model, (images, _) = sure(make()).eval(), batch()
    for image, both in zip(images, model.predict(images)):
        (alone,) = model.predict([image])
        assert len(alone["boxes"]) > 20 and (both["scores"].diff() <= 0).all()
        torch.testing.assert_close(alone["boxes"], both["boxes"], atol=1e-2, rtol=0)
        torch.testing.assert_close(alone["scores"], both["scores"], atol=1e-4, rtol=0)
        assert torch.equal(alone["labels"], both["labels"])
    small = model.predict([images[0], images[1][:, :50, :70]])[1]["boxes"]  # padded to 96x96
    assert len(small) and small[:, 2].max() <= 70 and small[:, 3].max() <= 50


def test_gamma_one_ignores_rsm_and_one_bare_stage_is_the_grid_baseline():
    model, (images, targets) = sure(make()).eval(), batch()
    torch.nn.init.normal_(model.ism.fc[-1].weight, std=1)
    torch.nn.init.constant_(model.ism.fc[-1].bias, -1)  # some below 0, which is as low as it goes
    outputs, settings, test = model.outputs(images), model.settings, model.full_settings.test

    def scores(**changes):
        return model.candidates(outputs, dataclasses.replace(test, **changes))["scores"]

    found, cls_ism = model.candidates(outputs, test), scores(gamma=1.0)
    cls, ism, rsm = (found[name] for name in ("cls", "ism", "rsm"))
    assert torch.equal(found["scores"], method.fused_score(cls, ism, rsm, 0.8)) and len(cls) > 20
    assert torch.equal(cls_ism, cls * ism) and not torch.equal(cls_ism, found["scores"])
    assert torch.equal(scores(ism_use="replace", gamma=1.0), ism)
    assert torch.equal(scores(ism_use="ignore", gamma=1.0), cls)
    assert torch.equal(scores(ism_use="ignore", gamma=0.0), rsm)
    assert ism.min() == 0 and ism.max() <= 1 and ism.mean() > 0
    early = dataclasses.replace(test, test_stage=1)
    assert (model.candidates(outputs, early)["ism"] == 1).all()  # it belongs to the last stage
    for changes, want in ((dict(rsm=False), cls_ism), (dict(ism=False, rsm=False), cls)):
        model.settings = dataclasses.replace(settings, **changes)
        assert torch.equal(scores(), want)

    baseline = sure(make(**ROWS["table1.baseline"])).eval()
    left = baseline.load_state_dict(model.state_dict(), strict=False)
    assert not left.missing_keys
    assert {k.split(".")[0] for k in left.unexpected_keys} == {"grids", "ism", "rsm"}
    for ours, theirs in zip(model.predict(images, early), baseline.predict(images)):
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert set(baseline.loss(images, targets)) == {"rpn_cls", "rpn_box", "cls", "grid1"}


def test_views_of_an_image_are_merged():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 11], [50, 50, 60, 60]])
    found = dict(boxes=boxes, scores=torch.tensor([0.5, 0.9, 0.7]), labels=torch.zeros(3).long(),
                 image=torch.zeros(3).long())  # fmt: skip
    model = make()

    def kept(**changes):
        return model.detections(found, 1, Test(**changes))[0]["scores"].tolist()

    assert kept() == pytest.approx([0.9, 0.7, 0.5])  # one view: no NMS
    assert kept(test_flip=True) == kept(test_scales=(64, 96)) == pytest.approx([0.9, 0.7])
    assert kept(soft_nms=True) == pytest.approx([0.9, 0.7, 0.5 * (1 - 10 / 11)], rel=1e-4)
    found["scores"][2] = 0.02  # a fused score below the threshold: dropped where views are merged
    assert kept() == pytest.approx([0.9, 0.5, 0.02])
    assert kept(test_flip=True) == pytest.approx([0.9])
    assert kept(soft_nms=True) == pytest.approx([0.9, 0.5 * (1 - 10 / 11)], rel=1e-4)


CMM, CMM2 = ((2.0, 1.5, 1.25), (0.5, 0.6, 0.7)), ((2.0, 1.5), (0.5, 0.6))
MEANING = {  # (ratios, IoUs) of the stages, ISM, RSM, stage tested, backbone
    "table1.baseline": (((2.0,), (0.5,)), False, False, 0, "resnet50"),
    "table1.rsm": (((2.0, 2.0), (0.5, 0.5)), False, True, 0, "resnet50"),
    "table1.ism_rsm": (((2.0, 2.0), (0.5, 0.5)), True, True, 0, "resnet50"),
    "table1.cmm_rsm": (CMM2, False, True, 0, "resnet50"),
    "table1.cmm_ism": (CMM2, True, False, 0, "resnet50"),
    "table1.cmm_ism_rsm": (CMM2, True, True, 0, "resnet50"),
    "table2.cpm_r101": (CMM, True, True, 0, "resnet101"),
    "table4.stages2_test2": (CMM2, False, False, 2, "resnet50"),
    "table4.stages3_test2": (CMM, False, False, 2, "resnet50"),
    "table5.same_test3": (((2.0, 2.0, 2.0), CMM[1]), False, False, 3, "resnet50"),
    "table6.l2": (((2.0,), (0.5,)), True, False, 0, "resnet50"),
    "table7.x101": (CMM, True, True, 0, "resnext101_64x4d"),
    "table7.x101_dcn_ms": (CMM, True, True, 0, "resnext101_64x4d"),
}


@pytest.mark.parametrize("row", list(MEANING))
def test_rows_are_the_papers_experiments(row):
    settings = Settings().replace(**ROWS[row])
    model, test, run = settings.model, settings.test, settings.run
    stages = model.ratios[: model.num_stages], model.stage_ious[: model.num_stages]
    assert (stages, model.ism, model.rsm, test.test_stage, model.backbone) == MEANING[row]
    assert len(stages[0]) == len(stages[1]) == model.num_stages
    assert (test.ism_use, test.gamma) == ("multiply", 0.8)  # Eq. 4
    assert run.epochs * 118_287 / 16 == pytest.approx(180_000, rel=1e-3)
    assert run.drops == (120 / 180, 160 / 180) and (run.lr, run.lr_batch) == (0.02, 16)
    assert (run.warmup, run.warmup_factor) == (500, 1 / 10)


def test_longest_sides_of_the_multi_scale_row():
    """An image of 1 : 3 in every view: 2000 px at scale 1200, 1333 at 800, as in the release."""
    settings = Settings().replace(**ROWS["table7.x101_dcn_ms_test"])
    test, scales, max_size = settings.test, settings.data.scales, settings.data.max_size
    assert test.test_flip and test.soft_nms and (test.merge_iou, test.soft_nms_score) == (0.5, 1e-4)
    empty = dict(boxes=torch.zeros(0, 4), size=(8, 24))
    data = [(torch.zeros(3, 8, 24, dtype=torch.uint8), empty)]
    (views,) = TestImages(data, (800, 1200), max_size, scales)
    assert [image.shape[2] for image, _ in views] == [1333, 2000]
    assert sorted(test.test_scales) == [*range(400, 1201, 100)] and test.test_scales[0] == 800


def test_weights_of_the_losses(monkeypatch):
    """Eq. 2 and 6: 15, 7.5 and 3.75 for the stages' maps, 1 for ISM and RSM."""
    monkeypatch.setattr(method, "grid_loss", lambda logits, *_: logits.sum() * 0 + 1)
    monkeypatch.setattr(method, "iou_scoring_loss", lambda p, *_: p.sum() * 0 + 1)
    monkeypatch.setattr(faster_rcnn, "class_loss", lambda p, _: p.sum() * 0 + 1)
    losses = make().loss(*batch())
    found = {k: v.item() for k, v in losses.items() if not k.startswith("rpn")}
    assert found == dict(cls=1, grid1=15, grid2=7.5, grid3=3.75, ism=1, rsm=1)


def test_an_image_that_is_all_crowd_trains():
    check_all_crowd(make())


def test_impossible_stages_are_refused():
    with pytest.raises(common.BadInput, match="no ISM"):
        make(ism_use="replace", test_stage=1)
    for changes in (dict(num_stages=4), dict(num_stages=0), dict(num_stages=2, test_stage=3)):
        with pytest.raises(common.BadInput, match="stage"):
            make(**changes)
    with pytest.raises(common.BadInput, match="--test-stage 4: there are 3 stages"):
        make().eval().predict(batch(1, 64)[0], Test(test_stage=4))


def test_one_image_can_be_overfitted():
    check_overfits(make(fpn_channels=32, point_channels=4), 3, 180, 0.8)


# ------------------------------------------------------------------------------ flags, command line

CHANGED = dict(
    base="cascade", num_stages=2, ratios=(1.8, 1.5, 1.25), stage_ious=(0.6, 0.7, 0.8), test_stage=2,
    ism=False, rsm=False, ism_loss="l1", ism_use="replace", gamma=0.5, point_channels=4,
    num_convs=2, groups=3, grid_init=False, fc_channels=16, grid_weight=5.0, stage_decay=1.0,
    ism_weight=2.0, rsm_weight=2.0, grid_rois=1, roi_samples=8, roi_positive=0.25, anchor_scale=3.0,
    rpn_samples=4, proposals_train=20, proposals_test=10, score_threshold=0.2, nms_iou=0.1,
    grid_test=5, soft_nms=True, merge_iou=0.1, soft_nms_score=0.3, max_detections=3,
    pool_norm=False, rpn_floor=1.0,
)  # fmt: skip
GIVEN = {"merge_iou": dict(soft_nms=True), "soft_nms_score": dict(soft_nms=True)}


@functools.cache
def known(flag):
    """The run that the flag changes."""
    return behaviour(sure(make(**GIVEN.get(flag, {}))))


def test_every_flag_is_covered():
    assert own_flags(method) == {*CHANGED, "class_std"} - engine.Settings().flat().keys()
    assert behaviour(sure(make())) == known("")


def test_class_outputs_start_at_that_deviation():
    grid, cascade = make(class_std=0.3), make(base="cascade", class_std=0.3)
    outputs = [grid.classify[-1], grid.rsm[-1]]
    outputs += [head.classify[-1] for head in cascade.stages.heads]
    for layer in outputs:
        assert layer.weight.std().item() == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize("flag", list(CHANGED))
def test_flag_changes_the_run(flag):
    before = known(flag if flag in GIVEN else "")
    changed = make(**GIVEN.get(flag, {}), **{flag: CHANGED[flag]})
    assert behaviour(sure(changed)) != before


RUN = """--image-size 64 --scales 64 --test-scales 64 --max-size 64 --num-train 12 --num-val 4
 --batch 2 --steps 6 --workers 0 --fpn-channels 8 --point-channels 1 --num-convs 1 --fc-channels 16
 --norm gn --log-every 1 --save-every 2 --device cpu --draw-score 0.01""".split()


def test_the_command_line(tmp_path):
    check_command_line(method, RUN, tmp_path)


def test_real_data(detection_data, tmp_path):
    real = """--preset tiny --steps 2 --scales 96 --test-scales 96 --max-size 160 --batch 2
     --workers 0 --point-channels 1 --fpn-channels 16 --score-threshold 0.2""".split()
    check_real_data(method, real, detection_data / "coco_tiny", tmp_path)
