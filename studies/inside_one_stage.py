"""What `studies.explain` draws of the one-stage methods: see inside_two_stage.py."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor

import dc_loss_clnms
import kernels
from baselines.retinanet import Positives, RetinaNet
from common import BadInput, aligned_iou, padded_size
from studies.boxes import class_losses
from studies.seen import (
    FOUND,
    OTHER,
    TRUTH,
    Panel,
    Seen,
    heat,
    numbers_of,
    outline,
    outlines,
    scale,
    show,
)

# ------------------------------------------------------------------------------ IoU-aware RetinaNet


def iou_aware_panels(seen: Seen, pick: int) -> list[Panel]:
    model, out = seen.model, seen.outputs
    if not model.settings.iou_head:
        raise BadInput("this checkpoint predicts no IoU: it is the baseline")
    truth, found = seen.truth(pick), seen.box(pick)
    anchor = int(seen.candidates["anchor"][seen.row(pick)])
    ends = torch.tensor(out["per_level"]).cumsum(0)
    level = int((ends <= anchor).sum())
    count, stride = out["per_level"][level], model.backbone.strides[level]
    first = int(ends[level]) - count
    width = -(-padded_size(seen.image)[1] // stride)  # of the level's map
    shape, kind = (count // 9 // width, width, 9), (anchor - first) % 9

    def level_map(values: Tensor) -> Tensor:
        """Of values [N], those of the anchors of the detection's level and shape: [H, W]."""
        return values[first : first + count].view(shape)[..., kind]

    maps = {
        "class score": level_map(out["cls_logits"][0, :, seen.label(pick)].sigmoid()),
        "predicted IoU": level_map(out["iou_logits"][0].sigmoid()),
    }
    if truth is not None:
        anchors = level_map(torch.arange(len(out["anchors"]), device=found.device)).flatten()
        boxes = model.decode(out, (torch.zeros_like(anchors), anchors))
        maps["true IoU"] = aligned_iou(boxes, truth).view(shape[:2])
    seen.numbers |= dict(level=level, anchor=anchor, **{k: numbers_of(v) for k, v in maps.items()})
    ground = torch.tensor([0.0, 0, shape[1] * stride, shape[0] * stride])
    panels = []
    for name, values in maps.items():

        def draw(axis, values=values):
            show(axis, seen, grey=True)
            heat(axis, values, ground, alpha=0.7, limits=(0, 1))
            outlines(axis, truth, found)

        title = f"{name}: P{stride.bit_length() - 1}'s anchors\nof the found box's shape"
        panels.append((title, draw))
    title = "boxes on the object, ranked\nby class score and fused"
    return [*panels, (title, ranking(seen, seen.row(pick)))]


def ranking(seen: Seen, row: int, most: int = 12):
    """A drawing of the candidates around one of them: their ranks by class score and by Eq. 5."""
    found, objects = seen.candidates, seen.target["boxes"]
    near = torchvision.ops.box_iou(found["boxes"][row][None], found["boxes"])[0] > 0.5
    near &= found["labels"] == found["labels"][row]
    iou, known = found["iou_probs"][near], "predicted IoU"
    if len(objects):
        iou = torchvision.ops.box_iou(found["boxes"][near], objects).amax(1)
        known = "true IoU"
    order = found["cls_probs"][near].argsort(descending=True, stable=True)
    fused = found["scores"][near].argsort(descending=True, stable=True).argsort()[order]
    lines = [
        dict(by_class=i + 1, fused=int(f) + 1, iou=round(iou[o].item(), 4))
        for i, (o, f) in enumerate(zip(order.tolist(), fused))
    ]
    seen.numbers["ranking"] = lines

    def draw(axis):
        import matplotlib

        colours = matplotlib.colormaps["viridis"]
        norm = matplotlib.colors.Normalize(0.5, 1)
        for line in lines:
            ends = line["by_class"], line["fused"]
            if min(ends) <= most:
                axis.plot((0, 1), ends, "o-", color=colours(norm(line["iou"])), lw=2)
        axis.set(ylim=(most + 0.5, 0.5), xlim=(-0.15, 1.15), ylabel="rank")
        axis.set_xticks((0, 1), ("class score", "fused"))
        scale(axis, matplotlib.cm.ScalarMappable(norm, colours), known)

    return draw


# ------------------------------------------------------------------------------ DC loss and CL-NMS


def dc_panels(seen: Seen, pick: int) -> list[Panel]:
    panels, gt = [], seen.gt(pick)
    if gt is not None:
        panels = training_panels(seen, gt)
    return [*panels, nms_panel(seen, pick)]


@torch.no_grad()
def training_panels(seen: Seen, gt: int) -> list[Panel]:
    """The weights lambda' of an object's positives, and the anchors that the IAC score adds."""
    model, settings, out = seen.model, seen.model.settings, seen.outputs
    truth, targets = seen.target["boxes"][gt], [seen.target]
    assigned = model.assign(out, targets)
    positive = assigned.labels == 1  # [1, N]
    own, panels = (positive & (assigned.gt == gt))[0], []
    if settings.dc_loss:
        index = positive.nonzero(as_tuple=True)
        boxes = model.decode(out, index)
        positives = Positives.at(index, assigned, out["cls_logits"], boxes)
        weights = model.coefficients(class_losses(model, out, assigned, index), positives)
        mine = own[index[1]]
        boxes, weights = boxes[mine], weights[mine]
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

        title = f"boxes of its {len(boxes)} positives;\ncolour: weight lambda'"
        panels.append((title, draw_weights))
    if isinstance(model, RetinaNet) and settings.iac:
        by_iou = RetinaNet.assign(model, out, targets).labels[0] == 1
        added = own & ~by_iou
        seen.numbers |= dict(positives=int(own.sum()), added_by_iac=int(added.sum()))

        def draw_anchors(axis):
            show(axis, seen, [*out["anchors"][own], truth])
            for mask, colour in ((own & ~added, FOUND), (added, OTHER)):
                for anchor in out["anchors"][mask]:
                    outline(axis, anchor, colour, width=1.0)
            outline(axis, truth, TRUTH)

        title = f"its anchors: {int((own & by_iou).sum())} by IoU (blue)\n"
        panels.append((f"{title}{int(added.sum())} by IAC (magenta)", draw_anchors))
    return panels


def nms_panel(seen: Seen, pick: int) -> Panel:
    """The cluster of a detection, its centre, and the box that each NMS keeps of it (2.3)."""
    found, test, truth = seen.candidates, seen.test, seen.truth(pick)
    same = (found["labels"] == seen.label(pick)).nonzero()[:, 0]
    boxes, scores = found["boxes"][same], found["scores"][same]
    row = int((same == seen.row(pick)).nonzero())
    # The boxes that plain NMS keeps name the clusters. A box is in the first that it overlaps.
    heads = kernels.batched_nms(boxes, scores, torch.zeros_like(same), test.nms_iou)
    overlaps = torchvision.ops.box_iou(boxes, boxes[heads]) > test.nms_iou  # [N, clusters]
    overlaps[heads, torch.arange(len(heads), device=heads.device)] = True
    cluster_of = overlaps.int().argmax(1)
    mine = (cluster_of == cluster_of[row]).nonzero()[:, 0]
    mine = mine[scores[mine].argsort(descending=True, stable=True)]
    boxes, scores = boxes[mine], scores[mine]
    (kept,) = dc_loss_clnms.cl_nms_of_one_class(boxes, scores, test.nms_iou, test.cl_literal)
    chosen = {"plain and soft": 0, "CL": int(kept)}  # the first has the best score
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    centre = (scores[:, None] * centres).sum(0) / scores.sum()
    seen.numbers |= dict(cluster=[numbers_of(b) for b in boxes], cluster_scores=numbers_of(scores))
    seen.numbers |= dict(centre=numbers_of(centre), kept=chosen)
    title = f"of {len(boxes)} boxes magenta is kept by\nplain NMS, blue by CL-NMS"
    if truth is not None:
        plain, cl = aligned_iou(boxes[list(chosen.values())], truth).tolist()
        seen.numbers |= dict(iou_plain=plain, iou_cl=cl)
        title = f"of {len(boxes)} boxes magenta is kept by\n"
        title += f"plain NMS (IoU {plain:.2f}), blue by CL-NMS ({cl:.2f})"

    def draw(axis):
        show(axis, seen, [*boxes, truth])
        for box in boxes:
            outline(axis, box, "0.3", width=0.6, alpha=0.6)
        outline(axis, truth, TRUTH)
        outline(axis, boxes[0], OTHER)
        outline(axis, boxes[chosen["CL"]], FOUND, "--")
        axis.plot(*centres.T.cpu(), ".", color="0.2", ms=4)
        axis.plot(*centre.cpu(), "+", color="lime", ms=12, mew=2.5)

    return title, draw
