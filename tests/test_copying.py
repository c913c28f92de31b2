"""Heads, losses and kernels copied into torchvision's detectors, as their readers would do it.

Each part sits in a small detector of torchvision and has to train and detect there. Labels are
torchvision's in here: 1..K, with 0 for the background.
"""

import doctest
import inspect
from collections import OrderedDict
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign, batched_nms, sigmoid_focal_loss

import d2det
import kernels
from common import BadInput, aligned_iou, decode_boxes, pad_images
from d2det import DenseLocalHead, dense_losses, dense_offset_targets
from dc_loss_clnms import dynamic_coefficient, normalise_coefficient
from double_head import ConvHead, FCHead, fuse_scores
from iou_aware_retinanet import IoUBranch, detection_confidence, iou_prediction_loss

C, CLASSES = 16, 3  # channels; torchvision's number of classes, with the background
IMAGES = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
TARGETS = [
    dict(boxes=torch.tensor([[8.0, 8, 40, 40], [30, 20, 60, 60]]), labels=torch.tensor([1, 2])),
    dict(boxes=torch.tensor([[4.0, 20, 28, 60]]), labels=torch.tensor([2])),
]


class Backbone(nn.Module):
    """A map of stride 8, as torchvision's detectors want it."""

    def __init__(self):
        super().__init__()
        self.out_channels = C
        self.layers = nn.Sequential(
            nn.Conv2d(3, C, 3, 4, 1), nn.ReLU(), nn.Conv2d(C, C, 3, 2, 1), nn.ReLU()
        )

    def forward(self, images):
        return OrderedDict([("0", self.layers(images))])


def faster_rcnn(**parts):
    torch.manual_seed(0)
    pool = MultiScaleRoIAlign(["0"], 7, 2)
    return FasterRCNN(
        Backbone(),
        None if "box_predictor" in parts else CLASSES,
        min_size=64,
        max_size=64,
        rpn_anchor_generator=AnchorGenerator(((24,),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=pool,
        rpn_post_nms_top_n_train=40,
        rpn_post_nms_top_n_test=20,
        box_score_thresh=0.0,
        **parts,
    )


def retinanet(head_class):
    torch.manual_seed(0)
    anchors = AnchorGenerator(((16, 24, 32),), ((0.5, 1.0, 2.0),))
    head = head_class(
        C, anchors.num_anchors_per_location()[0], CLASSES, lambda n: nn.GroupNorm(4, n)
    )
    sizes = dict(min_size=64, max_size=64, score_thresh=0.0, topk_candidates=50)
    return RetinaNet(Backbone(), CLASSES, anchor_generator=anchors, head=head, **sizes)


def check_trains(model, names: set[str], parts: list[nn.Module]) -> None:
    """Two steps with finite losses of those names, and gradients in all weights of the parts."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        losses = model(IMAGES, TARGETS)
        assert names <= losses.keys() and all(v.isfinite() for v in losses.values())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        for part in parts:
            grads = [p.grad for p in part.parameters()]
            assert all(g is not None and g.isfinite().all() for g in grads)
            assert any(g.abs().sum() > 0 for g in grads)
        optimizer.step()


def check_detects(model) -> list[dict]:
    with torch.no_grad():
        found = model.eval()(IMAGES)
    for f in found:
        assert len(f["boxes"]) > 0 and f["boxes"].isfinite().all()
        assert f["boxes"].min() >= 0 and f["boxes"].max() <= 64
        assert set(f["labels"].tolist()) <= set(range(CLASSES)) and (f["scores"] <= 1).all()
    return found


# ------------------------------------------------------------------------------ D2Det's boxes


class DenseRoIHeads(RoIHeads):
    """torchvision's RoI heads, with dense local regression in the place of their boxes."""

    def forward(self, features, proposals, image_shapes, targets=None):
        if self.training:
            proposals, matched, labels, _ = self.select_training_samples(proposals, targets)
        pooled = self.box_roi_pool(features, proposals, image_shapes)
        logits, _ = self.box_predictor(self.box_head(pooled))
        rois = torch.cat(proposals)
        if self.training:
            labels = torch.cat(labels)
            gts = torch.cat([t["boxes"][m] for t, m in zip(targets, matched)])
            positive = labels > 0
            offsets, overlap = self.dense(
                self.dense_pool(features, proposals, image_shapes)[positive]
            )
            dense = dense_losses(offsets, overlap, rois[positive], gts[positive])
            return [], {"cls": F.cross_entropy(logits, labels), **dense}
        offsets, overlap = self.dense(self.dense_pool(features, proposals, image_shapes))
        counts, results = [len(p) for p in proposals], []
        parts = (x.split(counts) for x in (rois, offsets, overlap, logits.softmax(1)))
        for size, boxes, o, v, probs in zip(image_shapes, *parts):
            boxes = kernels.decode_dense_offsets(boxes, o, v, size)
            scores, labels = probs[:, 1:].max(1)
            keep = batched_nms(boxes, scores, labels, 0.5)
            results.append(
                {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep] + 1}
            )
        return results, {}


def test_dense_local_regression_in_torchvisions_faster_rcnn():
    model = faster_rcnn()
    model.roi_heads.__class__ = DenseRoIHeads
    model.roi_heads.dense = DenseLocalHead(C, 16, num_convs=2, groups=4, offset_bias=0.5)
    model.roi_heads.dense_pool = MultiScaleRoIAlign(["0"], 14, 2)
    check_trains(model, {"cls", "reg", "overlap"}, [model.roi_heads.dense])
    check_detects(model)


def test_copied_targets_decode_to_the_ground_truth():
    """The kernel, and the equation that one copies where no kernel shall be."""
    proposals = torch.tensor([[0.0, 0, 40, 40], [24, 10, 60, 64]])
    gts = torch.tensor([[8.0, 8, 40, 40], [30, 20, 60, 60]])
    offsets, inside = dense_offset_targets(proposals, gts)
    logits = inside * 20 - 10
    torch.testing.assert_close(kernels.decode_dense_offsets(proposals, offsets, logits), gts)
    torch.testing.assert_close(d2det.decode(proposals, offsets, logits), gts)


DLR = """cell_centres dense_offset_targets cell_boxes decode iou_loss DenseLocalHead
dense_losses""".split()


def cut_out_dlr() -> ModuleType:
    """The definitions that are DLR, as text, beside torch and one function of common.py."""
    copy = ModuleType("copied_dlr")
    copy.__dict__.update(torch=torch, F=F, nn=nn, Tensor=torch.Tensor)
    text = [inspect.getsource(each) for each in (aligned_iou, *(getattr(d2det, n) for n in DLR))]
    exec("\n\n".join(text).replace("common.aligned_iou", "aligned_iou"), copy.__dict__)
    return copy


def test_dlr_cut_out_alone_needs_torch_alone():
    """Its examples run, and its losses and their gradients are the script's."""
    copy = cut_out_dlr()
    examples = doctest.testmod(copy)
    assert examples.attempted >= 8 and examples.failed == 0
    pooled, (proposals, gts) = torch.rand(2, 8, 14, 14), torch.rand(2, 2, 4).cumsum(-1) * 40
    seen = []
    for script in (d2det, copy):
        torch.manual_seed(0)
        head = script.DenseLocalHead(8, 16, num_convs=2, groups=4, offset_bias=0.5)
        offsets, overlap = head(pooled)
        losses = script.dense_losses(offsets, overlap, proposals, gts)
        sum(losses.values()).backward()
        gradients = [p.grad for p in head.parameters()]
        seen.append((losses, gradients, script.decode(proposals, offsets, overlap)))
    torch.testing.assert_close(*seen, atol=0, rtol=0)


@pytest.mark.parametrize("source", ["imported", "cut out"])
def test_dense_regression_learns_torchvisions_proposals(source):
    """One object, one proposal: the copied head and losses move the box onto it."""
    script = d2det if source == "imported" else cut_out_dlr()
    torch.manual_seed(0)
    head = script.DenseLocalHead(4, 16, num_convs=2, groups=4, offset_bias=0.5)
    pooled, proposal = torch.rand(1, 4, 14, 14), torch.tensor([[0.0, 0, 40, 40]])
    gt = torch.tensor([[6.0, 4, 44, 38]])
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        sum(script.dense_losses(*head(pooled), proposal, gt).values()).backward()
        optimizer.step()
    for decode in (script.decode, kernels.decode_dense_offsets):
        box = decode(proposal, *head(pooled)).detach()
        assert torchvision.ops.box_iou(box, gt).item() > 0.8


def test_offsets_of_another_grid_are_refused():
    proposals, offsets = torch.rand(2, 4), torch.rand(2, 4, 7, 7)
    with pytest.raises(ValueError, match="overlap_logits"):
        kernels.decode_dense_offsets(proposals, offsets, torch.rand(2, 7, 7))


# ------------------------------------------------------------------------------ the IoU head


class IoUHead(RetinaNetHead):
    """torchvision's RetinaNet head, and one more prediction from its box tower."""

    def __init__(self, in_channels, num_anchors, num_classes, norm_layer):
        super().__init__(in_channels, num_anchors, num_classes, norm_layer)
        self.iou_logits = IoUBranch(in_channels, num_anchors)

    def forward(self, features):
        out = super().forward(features)
        iou_logits = self.iou_logits([self.regression_head.conv(f) for f in features])
        if not self.training:  # torchvision takes the sigmoid of what it ranks by
            scores = out["cls_logits"].sigmoid(), iou_logits.sigmoid()[..., None]
            return {**out, "cls_logits": detection_confidence(*scores, alpha=0.5).logit()}
        return {**out, "iou_logits": iou_logits}

    def compute_loss(self, targets, head_outputs, anchors, matched_idxs):
        losses = super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        iou, num = 0, 0
        for i, (target, matched) in enumerate(zip(targets, matched_idxs)):
            positive = matched >= 0
            boxes = decode_boxes(anchors[i][positive], head_outputs["bbox_regression"][i][positive])
            gts = target["boxes"][matched[positive]]
            ious = torchvision.ops.box_iou(boxes, gts).diagonal()
            iou = iou + iou_prediction_loss(head_outputs["iou_logits"][i][positive], ious).sum()
            num += positive.sum()
        return {**losses, "iou": iou / num.clamp(min=1)}


def test_the_iou_branch_on_torchvisions_towers():
    model = retinanet(IoUHead)
    check_trains(model, {"iou", "classification"}, [model.head.iou_logits])
    before = check_detects(model)
    nn.init.constant_(model.head.iou_logits.bias, -4.0)  # the boxes fit less: so say the scores
    for one, other in zip(before, check_detects(model)):
        assert other["scores"].max() < one["scores"].max() / 2


# ------------------------------------------------------------------------------ the DC loss


class DynamicHead(RetinaNetHead):
    """torchvision's RetinaNet head, whose positives' class loss weighs by their boxes (DC loss)."""

    def compute_loss(self, targets, head_outputs, anchors, matched_idxs):
        losses = super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        total, self.ratios = 0, []
        for i, (target, matched) in enumerate(zip(targets, matched_idxs)):
            logits, positive = head_outputs["cls_logits"][i], matched >= 0
            labels = torch.zeros_like(logits)
            labels[positive, target["labels"][matched[positive]]] = 1
            focal = sigmoid_focal_loss(logits, labels)[matched != -2].sum(1)  # [N], -2: between
            at = positive[matched != -2]
            deltas = head_outputs["bbox_regression"][i][positive]
            boxes = decode_boxes(anchors[i][positive], deltas)
            weight = dynamic_coefficient(boxes, target["boxes"][matched[positive]])
            weighted = normalise_coefficient(weight, focal[at]) * focal[at]
            self.ratios.append((weighted.sum() / focal[at].sum()).item())
            total = total + (focal[~at].sum() + weighted.sum()) / at.sum().clamp(min=1)
        return {**losses, "classification": total / len(targets)}


def test_the_dc_loss_in_torchvisions_retinanet():
    plain, model = retinanet(RetinaNetHead), retinanet(DynamicHead)
    want, found = plain(IMAGES, TARGETS), model(IMAGES, TARGETS)
    # formula 2 keeps the positives' sum, so that the loss is what it was ...
    assert found["classification"].item() == pytest.approx(want["classification"].item(), rel=1e-4)
    assert model.head.ratios == pytest.approx([1, 1])
    for losses in (want, found):
        losses["classification"].backward()
    gradients = [m.head.classification_head.cls_logits.weight.grad for m in (plain, model)]
    assert not torch.allclose(*gradients)  # ... and its gradient is not
    check_trains(model, {"classification"}, [model.head.classification_head])
    check_detects(model)


# ------------------------------------------------------------------------------ Double-Head


class TwoHeads(nn.Module):
    """In the place of torchvision's box head: fc-head and conv-head side by side."""

    def __init__(self):
        super().__init__()
        self.fc, self.conv = FCHead(C, 32), ConvHead(C, num_blocks=3, channels=32)

    def forward(self, pooled):
        return self.fc(pooled), self.conv(pooled)


class TwoPredictors(nn.Module):
    """In the place of its predictor: each head does what it is good at; both know the class."""

    def __init__(self):
        super().__init__()
        self.fc, self.conv = nn.Linear(32, CLASSES), nn.Linear(32, CLASSES)
        self.boxes = nn.Linear(32, 4 * CLASSES)

    def forward(self, hidden):
        fc, conv = hidden
        if self.training:  # torchvision has one cross entropy: of the sum of both heads' logits
            return self.fc(fc) + self.conv(conv), self.boxes(conv)
        probs = fuse_scores(self.fc(fc).softmax(1), self.conv(conv).softmax(1))
        return probs.clamp(min=1e-6).log(), self.boxes(conv)  # its softmax makes them sum to one


def test_double_heads_in_torchvisions_roi_heads():
    heads, predictor = TwoHeads(), TwoPredictors()
    model = faster_rcnn(box_head=heads, box_predictor=predictor)
    parts = [heads.fc, heads.conv, predictor]
    check_trains(model, {"loss_classifier", "loss_box_reg"}, parts)
    check_detects(model)


def test_heads_that_cannot_be_built_say_why():
    with pytest.raises(ValueError, match="30 channels: blocks need a multiple of 4"):
        ConvHead(C, num_blocks=1, non_local=False, channels=30)
    with pytest.raises(ValueError, match="4 blocks: at least 1, and odd with non-local ones"):
        ConvHead(C, num_blocks=4, channels=32)


# ------------------------------------------------------------------------------ the other way round


def test_torchvisions_float_images_are_refused_here():
    with pytest.raises(BadInput, match="images are uint8 tensors, .* one is torch.float32"):
        pad_images(IMAGES)
