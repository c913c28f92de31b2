"""What was written anew so that a GPU works on without waiting has the same values."""

import pytest
import torch
import torchvision
from methods import batch, small

import common
import cpm_rcnn
import d2det
import kernels
from baselines.faster_rcnn import Rois, sample_rois
from baselines.gfl import giou_loss


def test_the_frozen_norm_is_torchvisions_and_keeps_bf16():
    torch.manual_seed(0)
    norm, other = common.make_norm("frozen_bn")(6), torchvision.ops.FrozenBatchNorm2d(6)
    for buffer in other.buffers():
        buffer.uniform_(0.5, 2)
    norm.load_state_dict(other.state_dict())
    x = torch.randn(2, 6, 5, 4, requires_grad=True)
    torch.testing.assert_close(norm(x), other(x))
    (grad,) = torch.autograd.grad(norm(x).square().sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(other(x).square().sum(), x)[0])
    assert norm(x.bfloat16()).dtype == torch.bfloat16 != other(x.bfloat16()).dtype


@pytest.mark.parametrize("count", [0, 1, 40])
def test_pooling_of_all_levels_at_once_equals_level_by_level(count):
    model = small(d2det, conv_channels=16, num_convs=1, groups=4, drp_per_level=True)
    for pool in model.drp:
        torch.nn.init.normal_(pool.fc[-1].weight, std=0.5)
        torch.nn.init.normal_(pool.pool.conv.weight, std=0.1)
    features = [torch.randn(2, 16, 256 // s, 256 // s) for s in (4, 8, 16, 32)]
    side = torch.linspace(2, 6.5, count).exp()[:, None].expand(-1, 2)
    corner = torch.rand(count, 2) * 50
    rois = Rois(torch.randint(0, 2, (count,)), torch.cat([corner, corner + side], 1))
    found = model.class_features(features, rois)
    assert found.shape == (count, 16, 7, 7)
    level = kernels.roi_level(rois.flat(), model.strides)
    assert count < 40 or level.unique().tolist() == [0, 1, 2, 3]
    for i, (pool, stride) in enumerate(zip(model.drp, model.strides)):
        own = rois[level == i]
        want = model.normalise(pool(features[i : i + 1], own.flat(), [stride]))
        torch.testing.assert_close(found[level == i], want, atol=1e-5, rtol=1e-5)


def test_the_weighted_pool_keeps_dtype_and_layout():
    torch.manual_seed(0)
    pool = d2det.AdaptiveWeightedPool(8)
    torch.nn.init.normal_(pool.conv.weight, std=0.1)
    x = torch.randn(3, 8, 14, 14)
    want = pool(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = pool(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found - want).norm() < 0.02 * want.norm()


def test_the_giou_loss_is_torchvisions():
    torch.manual_seed(0)
    boxes = (torch.rand(50, 4) * 20).requires_grad_()
    corner = torch.rand(50, 2) * 20
    gts = torch.cat([corner, corner + 15 * torch.rand(50, 2) + 1], 1)
    xyxy = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:] + 1], 1)
    found, want = giou_loss(xyxy, gts), torchvision.ops.generalized_box_iou_loss(xyxy, gts)
    torch.testing.assert_close(found, want)
    assert (want > 1.5).any() and (want < 0.8).any()  # far away, and overlapping
    (grad,) = torch.autograd.grad(found.sum(), boxes, retain_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(want.sum(), boxes)[0])


def test_the_host_knows_which_rois_are_positive():
    torch.manual_seed(0)
    _, targets = batch(3, 96)
    targets[1] = {**targets[1], "boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}
    targets[1]["ignore"] = torch.zeros(0).bool()
    proposals = torch.stack([common.pad_targets(targets)[0].flatten(0, 1)] * 3)
    valid = torch.ones(proposals.shape[:2], dtype=torch.bool)
    rois = sample_rois(proposals, valid, targets, num=24, fraction=0.5, num_classes=10)
    positives, negatives = rois.split()
    assert torch.equal(positives, (rois.labels < 10).nonzero()[:, 0]) and len(positives)
    assert torch.equal(negatives, (rois.labels == 10).nonzero()[:, 0]) and len(negatives)
    few, _ = rois.split(most=1)
    assert rois.image[few].tolist() == sorted(set(rois.image[positives].tolist())) == [0, 2]
    assert not hasattr(rois[few], "counts")


def test_padding_and_crowds_enter_no_stage():
    """`perfect_rois` has a row for each; without area, they are not selected at any IoU."""
    box = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9]])
    one = dict(boxes=box[:1], labels=torch.tensor([3]), ignore=torch.tensor([False]))
    two = dict(boxes=box, labels=torch.tensor([4, 5]), ignore=torch.tensor([False, True]))
    objects = common.pad_targets([one, two])
    perfect = cpm_rcnn.perfect_rois(objects)
    assert len(perfect) == objects[0].shape[0] * objects[0].shape[1] > 3
    for iou in (0.0, 0.7):
        kept = cpm_rcnn.select_boxes(perfect, objects, iou)
        assert kept.image.tolist() == [0, 1] and kept.labels.tolist() == [3, 4]


def test_the_host_knows_how_many_proposals_lie_on_each_level():
    images, _ = batch(2, 96)
    model = small(d2det, conv_channels=16, num_convs=1, groups=4, proposals_test=60)
    _, _, rois = model.test_rois([images[0], images[1][:, :70, :50]])  # of unequal numbers
    order, counts = model.by_level(rois)
    plain = Rois(rois.image, rois.boxes)
    assert (order.tolist(), counts) == (model.by_level(plain)[0].tolist(), model.by_level(plain)[1])
    assert sum(counts) == len(rois) and type(rois[:3]) is type(rois.moved(rois.boxes)) is Rois
