"""What does a one-stage method see around its detection? See inside_two_stage.py."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou

import kernels
from baselines import gfl
from baselines.retinanet import Assignment, Positives
from common import BadInput, aligned_iou, padded_size
from dc_loss_clnms import cl_nms_of_one_class
from studies.assignment import without_iac
from studies.seen import FOUND, OTHER, TRUTH, Seen, colour_scale, numbers_of, outline

# ---------------------------------------------------------------------- IoU-aware RetinaNet


def draw_iou_aware(seen: Seen) -> None:
    model, out, per_level = seen.model, seen.outputs, seen.outputs["per_level"]
    if not model.settings.iou_head:
        raise BadInput("this checkpoint predicts no IoU: it is the baseline")
    anchor = int(seen.candidates["anchor"][seen.row])
    level = int((torch.tensor(per_level).cumsum(0) <= anchor).sum())
    shape = (anchor - sum(per_level[:level])) % 9
    stride = model.backbone.strides[level]
    width = -(-padded_size(seen.image)[1] // stride)  # of the level's map

    def level_map(values: Tensor) -> Tensor:
        """Of values [N], those of the anchors of the detection's level and shape: [H, W]."""
        return values.split(per_level)[level].view(-1, width, 9)[..., shape]

    maps = {
        "class score": level_map(out["cls_logits"][0, :, seen.label].sigmoid()),
        "predicted IoU": level_map(out["iou_logits"][0].sigmoid()),
    }
    if seen.truth is not None:
        anchors = level_map(torch.arange(len(out["anchors"]), device=seen.box.device))
        boxes = model.decode(out, (torch.zeros_like(anchors), anchors))  # [H, W, 4]
        maps["true IoU"] = aligned_iou(boxes, seen.truth)
    seen.numbers |= dict(level=level, anchor=anchor)
    for name, values in maps.items():
        seen.numbers[name] = numbers_of(values)
        ground = torch.tensor([0, 0, width * stride, len(values) * stride])
        below = f"P{stride.bit_length() - 1}'s anchors\nof the found box's shape"
        seen.map(f"{name}: {below}", values, ground, alpha=0.7)
    draw_ranking(seen)


def draw_ranking(seen: Seen, most: int = 12) -> None:
    """The candidates around the detection's: their ranks by class score and by Eq. 5."""
    found, objects = seen.candidates, seen.target["boxes"]
    near = box_iou(found["boxes"][seen.row, None], found["boxes"])[0] > 0.5
    near &= found["labels"] == seen.label
    order = found["cls_probs"][near].argsort(descending=True, stable=True)
    fused = found["scores"][near].argsort(descending=True, stable=True).argsort()
    iou, known = found["iou_probs"][near], "predicted IoU"
    if len(objects):
        iou, known = box_iou(found["boxes"][near], objects).amax(1), "true IoU"
    axis = seen.column("boxes on the object, ranked\nby class score and fused")
    colour_of = colour_scale(axis, 0.5, 1, "viridis", known)
    seen.numbers["ranking"] = []
    pairs = zip((fused[order] + 1).tolist(), numbers_of(iou[order]))
    for rank, (fused_rank, fit) in enumerate(pairs, 1):
        seen.numbers["ranking"].append(dict(by_class=rank, fused=fused_rank, iou=fit))
        if min(rank, fused_rank) <= most:
            axis.plot((0, 1), (rank, fused_rank), "o-", color=colour_of(fit), lw=2)
    axis.set(ylim=(most + 0.5, 0.5), xlim=(-0.15, 1.15), ylabel="rank")
    axis.set_xticks((0, 1), ("class score", "fused"))


# ------------------------------------------------------------------------ DC loss and CL-NMS


@torch.no_grad()
def draw_dc(seen: Seen) -> None:
    model = seen.model
    if seen.gt is not None:
        assigned = model.assign(seen.outputs, [seen.target])
        own = ((assigned.labels == 1) & (assigned.gt == seen.gt))[0]  # [N]
        if model.settings.dc_loss:
            draw_weights(seen, assigned, own)
        if model.settings.iac:
            draw_anchors(seen, own)
    draw_cluster(seen)


def draw_weights(seen: Seen, assigned: Assignment, own: Tensor) -> None:
    """The boxes of an object's positives and their weights lambda'; own [N] marks them."""
    model, out = seen.model, seen.outputs
    index = (assigned.labels == 1).nonzero(as_tuple=True)
    positives = Positives.at(index, assigned, out["cls_logits"], model.decode(out, index))
    logits, labels, settings = positives.cls_logits, positives.gt_labels, model.settings
    if isinstance(model, gfl.GFL):
        quality = aligned_iou(positives.boxes, positives.gt_boxes)
        losses = gfl.quality_focal_loss(logits, labels, quality, settings.qfl_beta)
    else:
        losses = kernels.focal_loss(logits, labels, settings.focal_alpha, settings.focal_gamma)
    mine = own[index[1]]
    boxes, weights = positives.boxes[mine], model.coefficients(losses, positives)[mine]
    seen.numbers |= dict(weights=numbers_of(weights), boxes=[numbers_of(b) for b in boxes])
    title = f"boxes of its {len(boxes)} positives;\ncolour: weight lambda'"
    axis = seen.photo(title, [*boxes, seen.truth])
    colour_of = colour_scale(axis, 0, float(weights.max()), "plasma")
    for i in weights.argsort():
        outline(axis, boxes[i], colour_of(float(weights[i])), width=1.0)
    outline(axis, seen.truth, TRUTH)


def draw_anchors(seen: Seen, own: Tensor) -> None:
    """An object's positive anchors, own [N], and which of them the IAC score adds."""
    out = seen.outputs
    added = own & (without_iac(seen.model, out, [seen.target]).labels[0] != 1)
    seen.numbers |= dict(positives=int(own.sum()), added_by_iac=int(added.sum()))
    by_iou = own & ~added
    title = f"its anchors: {int(by_iou.sum())} by IoU (blue)\n"
    title += f"{int(added.sum())} by IAC (magenta)"
    axis = seen.photo(title, [*out["anchors"][own], seen.truth])
    for mask, colour in ((by_iou, FOUND), (added, OTHER)):
        for anchor in out["anchors"][mask]:
            outline(axis, anchor, colour, width=1.0)
    outline(axis, seen.truth, TRUTH)


def draw_cluster(seen: Seen) -> None:
    """The cluster of a detection, its centre, and the box that each NMS keeps of it (2.3)."""
    found, test = seen.candidates, seen.test
    same = (found["labels"] == seen.label).nonzero()[:, 0]
    boxes, scores = found["boxes"][same], found["scores"][same]
    # The boxes that plain NMS keeps name the clusters. A box is in the first that it overlaps.
    heads = kernels.nms(boxes, scores, test.nms_iou)
    overlaps = box_iou(boxes, boxes[heads]) > test.nms_iou  # [N, clusters]
    overlaps[heads, torch.arange(len(heads), device=heads.device)] = True
    cluster_of = overlaps.int().argmax(1)
    mine = (cluster_of == cluster_of[same == seen.row]).nonzero()[:, 0]
    mine = mine[scores[mine].argsort(descending=True, stable=True)]
    boxes, scores = boxes[mine], scores[mine]
    (kept,) = cl_nms_of_one_class(boxes, scores, test.nms_iou, test.cl_literal)
    plain, cl = boxes[0], boxes[kept]  # the first has the best score
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    centre = (scores[:, None] * centres).sum(0) / scores.sum()
    seen.numbers |= {
        "cluster": [numbers_of(box) for box in boxes],
        "cluster_scores": numbers_of(scores),
        "centre": numbers_of(centre),
        "kept": {"plain and soft": 0, "CL": int(kept)},
    }
    by_plain = by_cl = ""
    if seen.truth is not None:
        plain_iou, cl_iou = (aligned_iou(box, seen.truth).item() for box in (plain, cl))
        seen.numbers |= dict(iou_plain=plain_iou, iou_cl=cl_iou)
        by_plain, by_cl = f" (IoU {plain_iou:.2f})", f" ({cl_iou:.2f})"
    title = f"of {len(boxes)} boxes magenta is kept by\n"
    title += f"plain NMS{by_plain}, blue by CL-NMS{by_cl}"
    axis = seen.photo(title, [*boxes, seen.truth])
    for box in boxes:
        outline(axis, box, "0.3", width=0.6, alpha=0.6)
    outline(axis, seen.truth, TRUTH)
    outline(axis, plain, OTHER)
    outline(axis, cl, FOUND, "--")
    axis.plot(*centres.T.cpu(), ".", color="0.2", ms=4)
    axis.plot(*centre.cpu(), "+", color="lime", ms=12, mew=2.5)
