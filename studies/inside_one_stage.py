"""What `studies.explain` draws of the one-stage methods: see inside_two_stage.py."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor

import dc_loss_clnms
from baselines.retinanet import match_anchors
from common import BadInput, aligned_iou
from studies.seen import FOUND, OTHER, TRUTH, Seen, heat, numbers_of, outline, recorded, scale, show

# ------------------------------------------------------------------------------ IoU-aware RetinaNet


def iou_aware_panels(seen: Seen, pick: int) -> list:
    if not seen.model.config.iou_head:
        raise BadInput("this checkpoint predicts no IoU: it is the baseline")
    row, truth, out = seen.row(pick), seen.truth(pick), seen.outputs
    anchor, label = int(seen.candidates["anchor"][row]), int(seen.candidates["labels"][row])
    first, level = 0, 0
    while anchor >= first + out["per_level"][level]:
        first, level = first + out["per_level"][level], level + 1
    count, stride = out["per_level"][level], seen.model.backbone.strides[level]
    w = seen.image.shape[2]
    width = -(-(-(-w // 32) * 32) // stride)  # of the padded image, in cells
    shape, kind = (count // 9 // width, width, 9), (anchor - first) % 9

    def level_map(values: Tensor) -> Tensor:  # [N] -> [H, W] of the detection's anchor shape
        return values[first : first + count].view(shape)[..., kind]

    maps = {"class score": level_map(out["cls_logits"][0, :, label].sigmoid())}
    maps["predicted IoU"] = level_map(out["iou_logits"][0].sigmoid())
    boxes = level_map(torch.arange(len(out["anchors"]), device=seen.image.device))
    index = (torch.zeros_like(boxes.flatten()), boxes.flatten())
    if truth is not None:
        iou = torchvision.ops.box_iou(seen.model.decode(out, index), truth[None])
        maps["true IoU"] = iou.view(shape[:2])
    seen.numbers |= dict(level=level, anchor=anchor, **{k: numbers_of(v) for k, v in maps.items()})
    ground = torch.tensor([0.0, 0, shape[1] * stride, shape[0] * stride])
    drawings = []
    for name, values in maps.items():

        def draw(axis, values=values):
            show(axis, seen, grey=True)
            heat(axis, values, ground, alpha=0.7, limits=(0, 1))
            outline(axis, truth, TRUTH)
            outline(axis, seen.detections["boxes"][pick], FOUND)

        drawings.append(
            (f"{name}: P{stride.bit_length() - 1}'s anchors\nof the found box's shape", draw)
        )
    return [
        *drawings,
        ("boxes on the object, ranked\nby class score and fused", ranking(seen, row)),
    ]


def ranking(seen: Seen, row: int, most: int = 12):
    """A drawing of the boxes around one before NMS: their places by class score and by Eq. 5."""
    found = seen.candidates
    near = torchvision.ops.box_iou(found["boxes"][row][None], found["boxes"])[0] > 0.5
    near &= found["labels"] == found["labels"][row]
    objects = seen.target["boxes"]
    ious = torchvision.ops.box_iou(found["boxes"][near], objects)
    iou = ious.amax(1) if len(objects) else found["iou_probs"][near]
    known = "true IoU" if len(objects) else "predicted IoU"
    order = found["cls_probs"][near].argsort(descending=True, stable=True)
    fused = found["scores"][near].argsort(descending=True, stable=True).argsort()[order]
    places = [
        dict(by_class=i + 1, fused=int(f) + 1, iou=round(iou[o].item(), 4))
        for i, (o, f) in enumerate(zip(order.tolist(), fused))
    ]
    seen.numbers["ranking"] = places

    def draw(axis):
        import matplotlib

        colours = matplotlib.colormaps["viridis"]
        norm = matplotlib.colors.Normalize(0.5, 1)
        for line in places:
            ends = line["by_class"], line["fused"]
            if min(ends) <= most:
                axis.plot((0, 1), ends, "o-", color=colours(norm(line["iou"])), lw=2)
        axis.set(ylim=(most + 0.5, 0.5), xlim=(-0.15, 1.15), ylabel="rank")
        axis.set_xticks((0, 1), ("class score", "fused"))
        scale(axis, matplotlib.cm.ScalarMappable(norm, colours), known)

    return draw


# ------------------------------------------------------------------------------ DC loss and CL-NMS


def dc_panels(seen: Seen, pick: int) -> list:
    truth, drawings = seen.truth(pick), []
    if truth is not None:
        drawings = training_panels(seen, truth)
    return drawings + [nms_panel(seen, pick)]


def training_panels(seen: Seen, truth: Tensor) -> list:
    """The coefficients of the object's positives, and those that the IAC score adds."""
    model, drawings = seen.model, []
    if "assign" not in seen.calls:  # a training step of this image, once a page
        with torch.no_grad(), recorded(model, ["assign", "coefficients"]) as calls:
            model.loss([seen.image], [seen.target])
        seen.calls |= calls
    (out, targets), (labels, gt_boxes, _) = seen.calls["assign"][0]
    own = (labels[0] == 1) & (gt_boxes[0] == truth).all(1)  # positives of this object
    if seen.calls["coefficients"]:
        (_, positives), weights = seen.calls["coefficients"][0]
        mine = (positives.gt_boxes == truth).all(1)
        boxes, weights = positives.boxes()[mine], weights[mine]
        seen.numbers |= dict(weights=numbers_of(weights), boxes=[numbers_of(b) for b in boxes])

        def draw_weights(axis):
            import matplotlib

            show(axis, seen, [*boxes, truth])
            norm = matplotlib.colors.Normalize(0, float(weights.max()))
            mapped = matplotlib.cm.ScalarMappable(norm, matplotlib.colormaps["plasma"])
            for i in weights.argsort():
                outline(axis, boxes[i], mapped.to_rgba(float(weights[i])), width=1.0)
            outline(axis, truth, TRUTH)
            scale(axis, mapped)

        drawings.append(
            (f"boxes of its {len(boxes)} positives;\ncolour: weight lambda'", draw_weights)
        )
    if model.config.iac and model.config.base == "retinanet":
        thresholds = (model.config.fg_iou, model.config.bg_iou)
        by_iou, _, _ = match_anchors(out["anchors"], out["sizes"], targets, *thresholds)
        added = own & (by_iou[0] != 1)
        seen.numbers |= dict(positives=int(own.sum()), added_by_iac=int(added.sum()))

        def draw_anchors(axis):
            show(axis, seen, [*out["anchors"][own], truth])
            for mask, colour in ((own & ~added, FOUND), (added, OTHER)):
                for anchor in out["anchors"][mask]:
                    outline(axis, anchor, colour, width=1.0)
            outline(axis, truth, TRUTH)

        by_score, by_overlap = int(added.sum()), int((own & ~added).sum())
        title = f"its anchors: {by_overlap} by IoU (blue)\n{by_score} by IAC (magenta)"
        drawings.append((title, draw_anchors))
    return drawings


def nms_panel(seen: Seen, pick: int):
    """The cluster of a detection, its centre, and the box that each NMS keeps of it (2.3)."""
    found, config = seen.candidates, seen.config
    same = (found["labels"] == seen.detections["labels"][pick]).nonzero()[:, 0]
    boxes, scores = found["boxes"][same], found["scores"][same]
    row = int((same == seen.row(pick)).int().argmax())
    left = scores.argsort(descending=True, stable=True)
    while len(left):  # clusters in order of their best score, until the detection's
        near = torchvision.ops.box_iou(boxes[left[:1]], boxes[left])[0] > config.nms_iou
        near[0] = True
        cluster, left = left[near], left[~near]
        if row in cluster:
            break
    boxes, scores = boxes[cluster], scores[cluster]
    kept = dc_loss_clnms.cl_nms_of_one_class(boxes, scores, config.nms_iou, config.cl_literal)
    chosen = {"plain and soft": 0, "CL": int(kept[0])}  # of the cluster, whose first is its best
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    centre = (scores[:, None] * centres).sum(0) / scores.sum()
    seen.numbers |= dict(cluster=[numbers_of(b) for b in boxes], cluster_scores=numbers_of(scores))
    seen.numbers |= dict(centre=numbers_of(centre), kept=chosen)
    truth = seen.truth(pick)
    kept_by = ["plain NMS", "CL-NMS"]
    if truth is not None:
        plain, cl = aligned_iou(boxes[list(chosen.values())], truth[None]).tolist()
        seen.numbers |= dict(iou_plain=plain, iou_cl=cl)
        kept_by = [f"plain NMS (IoU {plain:.2f})", f"CL-NMS ({cl:.2f})"]
    title = f"of {len(boxes)} boxes magenta is kept by\n{', blue by '.join(kept_by)}"

    def draw(axis):
        show(axis, seen, [*boxes, truth])
        for box in boxes:
            outline(axis, box, "0.3", width=0.6, alpha=0.6)
        outline(axis, truth, TRUTH)
        outline(axis, boxes[chosen["plain and soft"]], OTHER)
        outline(axis, boxes[chosen["CL"]], FOUND, "--")
        axis.plot(*centres.T.cpu(), ".", color="0.2", ms=4)
        axis.plot(*centre.cpu(), "+", color="lime", ms=12, mew=2.5)

    return title, draw
