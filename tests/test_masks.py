"""D2Det's masks (3.3): their targets and losses by hand, the branch, whole steps and runs."""

import json
import math

import numpy as np
import pytest
import torch
from methods import (
    SMALL_D2DET,
    build,
    check_command_line,
    check_resume,
    overfit,
    settings_of,
    without_objects,
)

import d2det
import engine
from baselines.mask_branch import MaskBranch, mask_losses, mask_targets
from common import BadInput
from d2det import Settings, Test
from data import SyntheticDetection
from data.contract import make_target
from data.masks import decode_mask
from data.transforms import as_transformed
from engine.checkpoints import check_settings, load_checkpoint
from engine.command import read_rows
from engine.metrics import coco_metrics, detect, to_coco

ROWS, _ = read_rows("d2det")

SMALL = dict(SMALL_D2DET, masks=True, mask_channels=16)
RUN = """--image-size 64 --scales 64 --test-scales 64 --max-size 64 --num-train 12 --num-val 4
 --batch 2 --steps 6 --workers 0 --fpn-channels 8 --conv-channels 8 --num-convs 2 --groups 2
 --fc-channels 16 --mask-channels 16 --norm gn --log-every 1 --save-every 2 --proposals-train 40
 --proposals-test 20 --reg-test 20 --device cpu --score-threshold 0.01 --draw-score 0""".split()


def make(**changes):
    torch.manual_seed(0)
    return build(d2det, settings_of(d2det, **{**SMALL, **changes}))


# ------------------------------------------------------------------------------ targets and losses


def slow_targets(proposal, gt, mask, size):
    """Bilinear by hand at each cell's centre: 1.0 from half on; zero around the mask."""
    M, target = len(mask), np.zeros((size, size))
    value = lambda r, c: float(mask[r, c]) if 0 <= r < M and 0 <= c < M else 0.0  # noqa: E731
    for i in range(size):
        for j in range(size):
            x = proposal[0] + (j + 0.5) / size * (proposal[2] - proposal[0])
            y = proposal[1] + (i + 0.5) / size * (proposal[3] - proposal[1])
            c, r = (x - gt[0]) / (gt[2] - gt[0]) * M - 0.5, (y - gt[1]) / (gt[3] - gt[1]) * M - 0.5
            c0, r0 = math.floor(c), math.floor(r)
            u, v = c - c0, r - r0
            top = (1 - u) * value(r0, c0) + u * value(r0, c0 + 1)
            low = (1 - u) * value(r0 + 1, c0) + u * value(r0 + 1, c0 + 1)
            target[i, j] = (1 - v) * top + v * low >= 0.5
    return torch.tensor(target).float()


def test_mask_targets_are_the_slow_ones():
    torch.manual_seed(3)
    gts = torch.tensor([[10.0, 20, 50, 90], [0, 0, 30, 30], [5, 5, 60, 25]])
    proposals = gts + torch.randn(3, 4) * 6
    masks = torch.nn.functional.interpolate(torch.rand(3, 1, 4, 4), (12, 12))[:, 0] > 0.4
    targets, areas = mask_targets(proposals, gts, masks, size=14)
    for i in range(3):
        want = slow_targets(proposals[i].tolist(), gts[i].tolist(), masks[i], 14)
        assert torch.equal(targets[i], want)
        off = slow_targets((proposals[i] + 2).tolist(), gts[i].tolist(), masks[i], 14)
        assert (off != want).sum() > 5
    _, areas = mask_targets(gts, gts, masks, size=14)
    torch.testing.assert_close(areas, masks.float().mean((1, 2)) * 14**2)
    _, areas = mask_targets(gts - torch.tensor([0, 0, 15, 15]), gts, masks, size=14)
    assert areas[1] == pytest.approx(masks[1].float().mean().item() * 14**2 * 4)  # half each side
    empty = mask_targets(gts[:0], gts[:0], masks[:0])
    assert empty[0].shape == (0, 28, 28) and empty[1].shape == (0,)


def test_losses_by_hand():
    """Of a 4x4 mask the left half is right, the upper half predicted; 8 more cells are outside."""
    targets, logits = torch.zeros(1, 4, 4), torch.full((1, 4, 4), -2.0)
    targets[:, :, :2], logits[:, :2] = 1.0, 2.0
    iou = torch.tensor([0.7])
    losses = mask_losses(logits, iou, targets, torch.tensor([16.0]))
    assert losses["mask"].item() == pytest.approx(
        math.log1p(math.exp(-2)) + 1
    )  # half are wrong by 2
    assert losses["mask_iou"].item() == pytest.approx((0.7 - 4 / (8 + 16 - 4)) ** 2 / 2)
    within = mask_losses(logits, iou, targets, torch.tensor([7.9]))  # rounding of the crop
    assert within["mask_iou"].item() == pytest.approx((0.7 - 4 / 12) ** 2 / 2)
    assert mask_losses(logits, iou, targets, torch.tensor([60.0]))["mask_iou"] == 0  # 4 / 64
    halved = mask_losses(logits, iou, targets, torch.tensor([16.0]), num_rois=2)
    assert all(halved[k].item() == pytest.approx(losses[k].item() / 2) for k in losses)


def test_a_mask_decides_which_cells_train_the_box(monkeypatch):
    """7x7 from 28x28: three of the middle four. An L trains no cell of its empty quarter."""
    seen, original = [], d2det.dense_losses
    spy = lambda *a, **k: seen.append((a[2], k["inside"])) or original(*a, **k)  # noqa: E731
    monkeypatch.setattr(d2det, "dense_losses", spy)
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    box, mask = torch.tensor([[10.0, 5, 30, 35]]), torch.zeros(1, 112, 112)
    mask[:, :, :56] = mask[:, 75:] = 1.0
    target = make_target(box, [4], [False], 0, (64, 64)) | {"masks": mask}
    make(jitter=0.0, proposals_train=1).loss([image], [target])
    ((proposals, inside),) = seen
    (row,) = (proposals == box).all(1).nonzero()[:1, 0]  # the gt itself
    want = torch.zeros(7, 7)
    want[:, :3] = want[5:] = 1  # the L's side halves column 3: two of four; row 4 is 2/3 * 7 = 4.67
    rows = [0, 1, 2, 3, 5, 6]
    assert torch.equal(inside[row, 0][rows], want[rows])


def what_trains_masks(model, images, targets):
    """One step: the arguments of `mask_targets`, the labels of `MaskBranch`, DLR's boxes."""
    seen, parts = {}, {"mask_targets": mask_targets, "dense_losses": d2det.dense_losses}
    model.mask_branch.register_forward_pre_hook(lambda _, inputs: seen.update(labels=inputs[1]))
    with pytest.MonkeyPatch.context() as patch:
        for name, part in parts.items():
            spy = lambda *a, name=name, part=part, **k: seen.update({name: a}) or part(*a, **k)  # noqa: E731
            patch.setattr(d2det, name, spy)
        model.loss(images, targets)
    return *seen["mask_targets"], seen["labels"], seen["dense_losses"][2]


def test_masks_of_training_are_of_the_classes_and_boxes_that_train():
    """Of jittered boxes, which pooling and the box loss see too."""
    images, targets = mask_batch()
    boxes, gts, masks, labels, of_dlr = what_trains_masks(make(), images, targets)
    assert boxes is of_dlr and not torch.isin(boxes, gts).all()
    objects = [o for t in targets for o in zip(t["boxes"].tolist(), t["labels"], t["masks"])]
    known = {tuple(box): (label, mask) for box, label, mask in objects}
    assert len(known) == len(objects) and len({int(label) for label, _ in known.values()}) > 1
    for gt, label, mask in zip(gts.tolist(), labels, masks, strict=True):
        want = known[tuple(gt)]
        assert label == want[0] and torch.equal(mask, want[1])


def test_two_objects_in_one_box_have_a_mask_each():
    """Their boxes are equal, so only the index says whose a RoI is; ignored objects count in it."""
    image, box = torch.zeros(3, 64, 64, dtype=torch.uint8), torch.tensor([[10.0, 5, 30, 35]])
    halves = torch.zeros(3, 112, 112)
    halves[1, :, :56] = halves[2, :, 56:] = 1.0
    crowd = torch.tensor([[40.0, 40, 60, 60]])
    both = make_target(torch.cat([crowd, box, box]), [0, 4, 7], [True, False, False], 0, (64, 64))
    other = make_target(crowd, [2], [False], 1, (64, 64))
    targets = [other | {"masks": torch.ones(1, 112, 112)}, both | {"masks": halves}]
    for order in (targets, targets[::-1]):
        model = make(roi_positive=1.0, proposals_train=1)
        _, _, masks, labels, _ = what_trains_masks(model, [image, image], order)
        wanted = {2: order[0]["masks"].new_ones(112, 112), 4: halves[1], 7: halves[2]}
        assert {*labels.tolist()} == wanted.keys()
        for label, mask in zip(labels.tolist(), masks, strict=True):
            assert torch.equal(mask, wanted[label])


# ------------------------------------------------------------------------------ head and detector


def mask_batch(count=2, size=96):
    data = SyntheticDetection(count, size, masks=True)
    items = [data[i] for i in range(count)]
    return [i for i, _ in items], [as_transformed(t, (size, size)) for _, t in items]


def test_every_mask_layer_learns_and_the_iou_leaves_the_mask_alone():
    model, (images, targets) = make(), mask_batch()
    losses = model.loss(images, targets)
    assert {"mask", "mask_iou", "overlap", "reg"} <= set(losses)
    losses["mask_iou"].backward(retain_graph=True)
    assert (
        model.mask_branch.logits.weight.grad is None and model.mask_branch.up[0].weight.grad is None
    )
    sum(losses.values()).backward()
    silent = [n for n, p in model.mask_branch.named_parameters() if not p.grad.abs().sum() > 0]
    assert not silent
    branch = MaskBranch(8, 16, 3, 32)
    trunk = torch.rand(3, 8, 7, 7)
    logits, iou = branch(trunk, torch.tensor([2, 0, 1]))
    alone, quality = branch(trunk[1:2], torch.tensor([0]))
    torch.testing.assert_close(logits[1:2], alone)
    torch.testing.assert_close(iou[1:2], quality)
    assert (branch(trunk[1:2], torch.tensor([1]))[0] != alone).any()  # a mask of its own per class


def test_the_branch_is_the_releases():
    torch.manual_seed(0)
    branch = MaskBranch()
    shapes = {n: tuple(p.shape) for n, p in branch.named_parameters() if p.dim() > 1}
    assert shapes == {
        "up.0.weight": (576, 256, 2, 2), "up.3.weight": (256, 256, 2, 2),
        "logits.weight": (80, 256, 3, 3), "iou.1.weight": (1024, 577 * 49),
        "iou.3.weight": (1024, 1024), "iou.5.weight": (80, 1024),
    }  # fmt: skip
    nn = torch.nn
    kinds = [nn.ConvTranspose2d, nn.GroupNorm, nn.ReLU, nn.ConvTranspose2d, nn.ReLU]
    assert [type(m) for m in branch.up] == kinds and branch.up[1].num_groups == 16
    fans = {"up.0": 576 * 4, "up.3": 256 * 4, "logits": 80 * 9}  # He's rule, of fan-out
    wanted = {n: math.sqrt(2 / fan) for n, fan in fans.items()} | {"iou.5": 0.01}
    for name, std in wanted.items():
        layer = branch.get_submodule(name)
        assert layer.weight.std().item() == pytest.approx(std, rel=0.02), name
        assert not layer.bias.any()
    branch = MaskBranch(8, 16, 3, 32)
    trunk, labels = torch.rand(3, 8, 7, 7), torch.tensor([2, 0, 1])
    logits, iou = branch(trunk, labels)
    coarse = logits.view(3, 7, 4, 7, 4).amax((2, 4)).sigmoid()  # the best of 4x4 cells
    want = branch.iou(torch.cat([trunk, coarse[:, None]], 1))[torch.arange(3), labels]
    torch.testing.assert_close(iou, want)


def test_images_without_objects_train():
    model, (images, targets) = make(), mask_batch()
    targets = [{**t, "masks": t["masks"][:0]} for t in without_objects(targets)]
    losses = model.loss(images, targets)
    assert losses["mask"] == losses["mask_iou"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    (found,) = model.eval().predict(images[:1], Test(score_threshold=1.0))
    assert found["masks"].shape == (0, 28, 28) and found["mask_scores"].shape == (0,)


@pytest.mark.parametrize("row", ["table5.coco_masks", "table6.isaid_masks"])
def test_rows_build_and_see_what_they_name(row):
    keep = ("backbone", "scales", "test_scales", "max_size")
    changes = {k: v for k, v in ROWS[row].items() if k not in keep}
    model, (images, targets) = make(**{**changes, "score_threshold": 0.09}), mask_batch(2, 64)
    test = model.full_settings.test
    sum(model.loss(images, targets).values()).backward()
    found = model.eval().predict(images)
    for each in found:
        assert set(each) == {"boxes", "scores", "labels", "masks", "mask_scores"}
        assert each["masks"].shape[1:] == (28, 28) and 0 <= each["masks"].min()
    outputs, pool, rois, asked = model.outputs(images), model.pool, [], []
    model.pool = lambda features, boxes, size: rois.append(boxes) or pool(features, boxes, size)
    model.mask_branch.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[1]))
    candidates = model.candidates(outputs, test)
    assert torch.equal(rois[-1].boxes, candidates["boxes"])  # seen anew from the final boxes
    assert torch.equal(asked[-1], candidates["labels"])
    assert len(candidates["boxes"]) == sum(len(f["boxes"]) for f in found)  # none without a mask
    torch.manual_seed(0)
    order = torch.randperm(len(candidates["boxes"]))
    shuffled = {k: v[order] for k, v in candidates.items()}
    # sorted by the box's score, again
    for i, ranked in enumerate(model.detections(shuffled, 2, test)):
        mine = {k: v[candidates["image"] == i] for k, v in candidates.items()}
        iou = (ranked["mask_scores"] - ranked["scores"]) / 0.3
        torch.testing.assert_close(iou, mine["mask_iou"], atol=1e-4, rtol=1e-3)
        assert torch.equal(ranked["masks"], mine["masks"])


@pytest.mark.parametrize("row, isaid", [("table5.coco_masks", False), ("table6.isaid_masks", True)])
def test_rows_run_what_they_name(row, isaid):
    settings = Settings().replace(**ROWS[row])
    model, test, run, data = settings.model, settings.test, settings.run, settings.data
    assert model.masks and (model.proposals_test, model.drp_samples) == (700, 1)
    assert (test.score_threshold, test.nms_iou, test.soft_nms) == (0.05, 0.3, False)
    assert test.reg_test == test.max_detections == (500 if isaid else 100)
    if isaid:
        assert run.epochs * 28_000 / 16 == pytest.approx(180_000, rel=2e-3)
        assert (run.lr, model.roi_samples, model.roi_positive) == (0.025, 1024, 0.5)
        assert data.scales == test.test_scales == (400, 600, 800, 1000, 1200)
        assert (test.metric_detections, test.metric_sides) == ((1, 10, 1000), (10, 144, 512))


def test_mirrored_views_bring_their_masks_along():
    """In an image that is its own mirror image the views find each other's mirror images."""
    half = mask_batch(1, 96)[0][0][:, :, :48]
    image = torch.cat([half, half.flip(-1)], 2)
    target = make_target(torch.zeros(0, 4), [], [], 0, (96, 96))
    data = type("One", (list,), {"sizes": [(96, 96)]})([(image, target)])
    model = make().eval()
    model.suppress = lambda boxes, scores, *_: (torch.arange(len(boxes)), scores)  # keeps all
    sizes = dict(scales=(96,), test_scales=(96,), max_size=96)
    settings = model.full_settings.replace(
        **sizes, test_flip=True, score_threshold=0.05, max_detections=9999
    )
    ((_, found),) = detect(model, data, settings)
    n = len(found["boxes"]) // 2
    assert n > 5
    torch.testing.assert_close(found["masks"][:n], found["masks"][n:].flip(-1), atol=1e-4, rtol=0)


def test_an_image_with_masks_can_be_overfitted():
    """And a mask is of its own box: with those of others little is left."""
    model = make(fpn_channels=32, conv_channels=32)
    data = SyntheticDetection(1, 96, seed=7, masks=True)
    image, target = data[0]
    target = as_transformed(target, (96, 96))

    def score(found):
        results = to_coco(target["image_id"], found, data.categories, (96, 96))
        return coco_metrics(data.coco(), results, masks=True)["AP50"]

    _, _, found = overfit(model, (image, target), 300, lambda found: score(found) > 0.8)
    assert len(target["boxes"]) > 2 and score(found) > 0.8
    assert score({**found, "masks": found["masks"].roll(1, 0)}) < 0.5


def test_what_cannot_be_done_is_refused(tmp_path):
    model = make()
    settings = model.full_settings
    with pytest.raises(BadInput, match="item 0: its target has no masks"):
        engine.train(model, settings, SyntheticDetection(4, 64), None, tmp_path / "r")
    data = SyntheticDetection(4, 64, masks=True)
    item = data[0]
    item[1]["masks"] = item[1]["masks"].byte() * 255
    data.__class__ = type("Bytes", (type(data),), {"__getitem__": lambda *_: item})
    with pytest.raises(BadInput, match="masks are .* of torch.uint8, not .* of torch.bool"):
        engine.train(model, settings, data, None, tmp_path / "r")
    with pytest.raises(BadInput, match="--masks needs dense local regression"):
        make(dlr=False)
    with pytest.raises(BadInput, match="--mask-channels 24: needs a multiple of 16"):
        make(mask_channels=24)


def test_a_run_with_masks_resumes_bit_for_bit(tmp_path, monkeypatch):
    check_resume(d2det, [*RUN, "--masks", "--num-val", "1"], tmp_path, monkeypatch)


def test_runs_train_evaluate_and_predict(tmp_path):
    metrics = check_command_line(d2det, RUN, tmp_path, "--masks")  # which the checkpoint brings
    assert {"AP", "mask_AP", "mask_AP50", "mask_per_class"} <= set(metrics)
    results = json.loads((tmp_path / "c/predict/predictions.json").read_text())
    assert results and all(r["segmentation"]["size"] == [64, 64] for r in results)
    assert len(list((tmp_path / "c/predict/pictures").iterdir())) == 1
    found = engine.load(tmp_path / "a/last.pt").detect(tmp_path / "a.png")
    boxes, _, _, names = found  # masks stand beside what every detector finds
    assert found.masks.shape == (len(boxes), 64, 64) and found.masks.dtype == torch.bool
    want = torch.stack([decode_mask(r["segmentation"]) for r in results])
    assert torch.equal(found.masks, want) and len(found.mask_scores) == len(results)
    saved = Settings.from_dict(load_checkpoint(tmp_path / "a/last.pt")["settings"])
    with pytest.raises(BadInput, match="made with --masks"):
        check_settings(tmp_path, saved.replace(masks=False), saved)
