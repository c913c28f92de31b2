"""What `studies.explain` draws of the one-stage methods: see inside_two_stage.py."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou

import dc_loss_clnms
import kernels
from baselines import gfl
from baselines.retinanet import Assignment, Positives
from common import BadInput, aligned_iou, padded_size
from studies.seen import FOUND, OTHER, TRUTH, Panel, Seen, numbers_of, outline, scale

# ------------------------------------------------------------------------------ IoU-aware RetinaNet


def iou_aware_panels(seen: Seen) -> list[Panel]:
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
    seen.numbers |= dict(level=level, anchor=anchor, **{k: numbers_of(v) for k, v in maps.items()})
    height = len(maps["class score"])
    ground = torch.tensor([0, 0, width * stride, height * stride])
    below = f"P{stride.bit_length() - 1}'s anchors\nof the found box's shape"
    panels = [
        seen.map_panel(f"{name}: {below}", values, ground, alpha=0.7)
        for name, values in maps.items()
    ]
    return [*panels, ranking(seen)]


def ranking(seen: Seen, most: int = 12) -> Panel:
    """The candidates around the detection's: their ranks by class score and by Eq. 5."""
    found, objects = seen.candidates, seen.target["boxes"]
    near = box_iou(found["boxes"][seen.row, None], found["boxes"])[0] > 0.5
    near &= found["labels"] == seen.label
    order = found["cls_probs"][near].argsort(descending=True, stable=True)
    fused = found["scores"][near].argsort(descending=True, stable=True).argsort()
    iou, known = found["iou_probs"][near], "predicted IoU"
    if len(objects):
        iou, known = box_iou(found["boxes"][near], objects).amax(1), "true IoU"
    pairs = zip(fused[order].tolist(), numbers_of(iou[order]))
    lines = [dict(by_class=i, fused=f + 1, iou=fit) for i, (f, fit) in enumerate(pairs, 1)]
    seen.numbers["ranking"] = lines

    def draw(axis):
        import matplotlib

        norm = matplotlib.colors.Normalize(0.5, 1)
        colours = matplotlib.cm.ScalarMappable(norm, "viridis")
        for line in lines:
            ends = line["by_class"], line["fused"]
            if min(ends) <= most:
                axis.plot((0, 1), ends, "o-", color=colours.to_rgba(line["iou"]), lw=2)
        axis.set(ylim=(most + 0.5, 0.5), xlim=(-0.15, 1.15), ylabel="rank")
        axis.set_xticks((0, 1), ("class score", "fused"))
        scale(axis, colours, known)

    return "boxes on the object, ranked\nby class score and fused", draw


# ------------------------------------------------------------------------------ DC loss and CL-NMS


@torch.no_grad()
def dc_panels(seen: Seen) -> list[Panel]:
    model, panels = seen.model, []
    if seen.gt is not None:
        assigned = model.assign(seen.outputs, [seen.target])
        own = ((assigned.labels == 1) & (assigned.gt == seen.gt))[0]  # [N]
        if model.settings.dc_loss:
            panels.append(weights_panel(seen, assigned, own))
        if model.settings.iac:
            panels.append(anchors_panel(seen, own))
    return [*panels, nms_panel(seen)]


def weights_panel(seen: Seen, assigned: Assignment, own: Tensor) -> Panel:
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

    def draw(axis):
        import matplotlib

        seen.show(axis, [*boxes, seen.truth])
        norm = matplotlib.colors.Normalize(0, float(weights.max()))
        colours = matplotlib.cm.ScalarMappable(norm, "plasma")
        for i in weights.argsort():
            outline(axis, boxes[i], colours.to_rgba(float(weights[i])), width=1.0)
        outline(axis, seen.truth, TRUTH)
        scale(axis, colours)

    return f"boxes of its {len(boxes)} positives;\ncolour: weight lambda'", draw


def anchors_panel(seen: Seen, own: Tensor) -> Panel:
    """An object's positive anchors, own [N], and which of them the IAC score adds."""
    out = seen.outputs
    base = super(dc_loss_clnms.ThreeProposals, seen.model)
    added = own & (base.assign(out, [seen.target]).labels[0] != 1)
    by_iou = own & ~added
    seen.numbers |= dict(positives=int(own.sum()), added_by_iac=int(added.sum()))

    def draw(axis):
        seen.show(axis, [*out["anchors"][own], seen.truth])
        for mask, colour in ((by_iou, FOUND), (added, OTHER)):
            for anchor in out["anchors"][mask]:
                outline(axis, anchor, colour, width=1.0)
        outline(axis, seen.truth, TRUTH)

    title = f"its anchors: {int(by_iou.sum())} by IoU (blue)\n{int(added.sum())} by IAC (magenta)"
    return title, draw


def nms_panel(seen: Seen) -> Panel:
    """The cluster of a detection, its centre, and the box that each NMS keeps of it (2.3)."""
    found, test = seen.candidates, seen.test
    same = (found["labels"] == seen.label).nonzero()[:, 0]
    boxes, scores = found["boxes"][same], found["scores"][same]
    # The boxes that plain NMS keeps name the clusters. A box is in the first that it overlaps.
    heads = kernels.batched_nms(boxes, scores, torch.zeros_like(same), test.nms_iou)
    overlaps = box_iou(boxes, boxes[heads]) > test.nms_iou  # [N, clusters]
    overlaps[heads, torch.arange(len(heads), device=heads.device)] = True
    cluster_of = overlaps.int().argmax(1)
    mine = (cluster_of == cluster_of[same == seen.row]).nonzero()[:, 0]
    mine = mine[scores[mine].argsort(descending=True, stable=True)]
    boxes, scores = boxes[mine], scores[mine]
    (kept,) = dc_loss_clnms.cl_nms_of_one_class(boxes, scores, test.nms_iou, test.cl_literal)
    plain, cl = boxes[0], boxes[kept]  # the first has the best score
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    centre = (scores[:, None] * centres).sum(0) / scores.sum()
    seen.numbers |= dict(cluster=[numbers_of(b) for b in boxes], cluster_scores=numbers_of(scores))
    seen.numbers |= dict(centre=numbers_of(centre), kept={"plain and soft": 0, "CL": int(kept)})
    title = f"of {len(boxes)} boxes magenta is kept by\nplain NMS, blue by CL-NMS"
    if seen.truth is not None:
        plain_iou, cl_iou = (aligned_iou(box, seen.truth).item() for box in (plain, cl))
        seen.numbers |= dict(iou_plain=plain_iou, iou_cl=cl_iou)
        title = f"of {len(boxes)} boxes magenta is kept by\n"
        title += f"plain NMS (IoU {plain_iou:.2f}), blue by CL-NMS ({cl_iou:.2f})"

    def draw(axis):
        seen.show(axis, [*boxes, seen.truth])
        for box in boxes:
            outline(axis, box, "0.3", width=0.6, alpha=0.6)
        outline(axis, seen.truth, TRUTH)
        outline(axis, plain, OTHER)
        outline(axis, cl, FOUND, "--")
        axis.plot(*centres.T.cpu(), ".", color="0.2", ms=4)
        axis.plot(*centre.cpu(), "+", color="lime", ms=12, mew=2.5)

    return title, draw
