"""What `studies.explain` draws of the two-stage methods.

METHOD_record(model) names what is listened to. METHOD_panels(seen, place of a detection) gives the
columns, (title, draw(axis)) each, and adds the numbers in them to `seen.numbers`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cpm_rcnn
import d2det
import double_head
from baselines.faster_rcnn import RCNN_STDS
from common import BadInput, aligned_iou, clip_boxes, decode_boxes
from studies.seen import ENTERING, FOUND, TRUTH, Seen, heat, numbers_of, outline, scale, show

# ------------------------------------------------------------------------------ D2Det


def d2det_record(model: nn.Module) -> list[str]:
    names = ["pool"]
    names += ["regress.offsets", "regress.overlap"] if model.config.dlr else []
    for i in range(len(model.drp) if model.config.drp else 0):
        names += [f"drp.{i}", f"drp.{i}.fc"]
        names += [f"drp.{i}.pool.norm"] if model.config.weighting else []
    return names


def d2det_panels(seen: Seen, pick: int) -> list:
    config, row, truth = seen.model.config, seen.row(pick), seen.truth(pick)
    if not (config.dlr or config.drp):
        raise BadInput("this checkpoint has neither DLR nor DRP: it is the baseline")
    found, drawings = seen.detections["boxes"][pick], []
    if config.dlr:
        # DLR is the only one that pools 14x14; its RoIs are the candidates' proposals
        entered = [rois for (_, rois, size), _ in seen.calls["pool"] if size == 14][0]
        proposal = entered[row, 1:]
        offsets = F.relu(seen.calls["regress.offsets"][0][1][row : row + 1])
        overlap = seen.calls["regress.overlap"][0][1][row].sigmoid()  # [1, S, S]
        cells = d2det.cell_boxes(proposal[None], offsets)[0].flatten(1).T  # [S*S, 4]
        used = overlap.flatten() > 0.5 if config.overlap else torch.ones(len(cells)).bool()
        area = [proposal, found, truth]
        seen.numbers |= dict(proposal=proposal.tolist(), overlap=numbers_of(overlap))
        seen.numbers |= dict(cells=[numbers_of(c) for c in cells], used=int(used.sum()))

        def draw_cells(axis):
            show(axis, seen, area)
            for box, on in zip(cells, used):
                outline(axis, box, FOUND if on else "0.35", width=0.7 if on else 0.4, alpha=0.7)
            outline(axis, truth, TRUTH)
            outline(axis, proposal, ENTERING, "--")
            outline(axis, found, FOUND)

        def draw_overlap(axis):
            show(axis, seen, area, grey=True)
            heat(axis, overlap[0], proposal, limits=(0, 1))
            outline(axis, truth, TRUTH)
            outline(axis, proposal, ENTERING, "--")
            outline(axis, found, FOUND)

        drawings.append(
            (f"each cell's box; {int(used.sum())} cells of 49\nare averaged", draw_cells)
        )
        if config.overlap:
            drawings.append(("is the cell on the object?\n(overlap prediction)", draw_overlap))
    if config.drp:
        drawings.append(("where DRP samples, and how\nmuch a sample weighs", drp(seen, row, pick)))
    if config.masks:
        fine = seen.candidates["masks"][row]
        box = seen.candidates["boxes"][row]
        coarse = F.adaptive_max_pool2d(fine[None], 7)[0]
        for name, mask in (("its mask,\npooled to 7x7", coarse), ("its mask, 28x28", fine)):

            def draw_mask(axis, mask=mask):
                show(axis, seen, [box, truth], grey=True)
                heat(axis, mask, box, alpha="value", limits=(0, 1))
                outline(axis, box, FOUND)

            drawings.append((name, draw_mask))
    return drawings


def drp(seen: Seen, row: int, pick: int):
    """A drawing of the samples that classify the proposal of a detection."""
    config = seen.model.config
    scores = seen.outputs["probs"][:, seen.detections["labels"][pick]]
    if config.dlr:  # the proposal is known
        entered = [rois for (_, rois, size), _ in seen.calls["pool"] if size == 14][0]
        roi = entered[row]
    else:  # it is the one with this score
        roi = seen.outputs["rois"][(scores == seen.candidates["scores"][row]).int().argmax()]
    for i, module in enumerate(seen.model.drp):
        for call, ((_, rois, _), _) in enumerate(seen.calls[f"drp.{i}"]):
            here = (rois == roi).all(1).nonzero()[:, 0]
            if len(here):
                at, size, gamma = int(here[0]), module.size, module.gamma
                offsets = seen.calls[f"drp.{i}.fc"][call][1][at].float().view(2, size, size)
                norm = seen.calls[f"drp.{i}.pool.norm"][call][1][at] if config.weighting else None
    wh = (roi[3:] - roi[1:3])[:, None, None]
    bins = d2det.cell_centres(roi[None, 1:], size)[0] + gamma * wh * offsets  # [2, S, S]
    offsets = offsets.repeat_interleave(2, 1).repeat_interleave(2, 2)  # [2, 2S, 2S]
    points = d2det.cell_centres(roi[None, 1:], 2 * size)[0] + gamma * wh * offsets
    weight = torch.ones(2 * size, 2 * size) if norm is None else relative_weight(norm)
    seen.numbers |= dict(bins=[numbers_of(p) for p in bins], weights=numbers_of(weight))

    def draw(axis):
        show(axis, seen, [roi[1:], seen.truth(pick)], margin=0.25)
        outline(axis, seen.truth(pick), TRUTH)
        outline(axis, roi[1:], ENTERING, "--")
        x, y = points.flatten(1).cpu()
        scale(axis, axis.scatter(x, y, s=12, c=weight.flatten().cpu(), cmap="plasma", lw=0))

    return draw


def relative_weight(norm: Tensor) -> Tensor:
    """How much each sample counts in DRP's output [2S, 2S]: 1 is its share in a plain average.

    norm [C, 2S, 2S]: what DRP's norm gives. A sample is in one to four windows; the mean is over C.

    >>> relative_weight(torch.zeros(2, 4, 4)).allclose(torch.ones(4, 4))
    True
    """
    weight = (12 * norm.float().sigmoid()).exp()[None]  # Eq. 4's W(F)
    kernel = torch.ones(weight.shape[1], 1, 3, 3, device=norm.device)

    def share(weight: Tensor) -> Tensor:
        windows = 1 / F.conv2d(weight, kernel, None, 2, 1, groups=len(kernel))
        return weight * F.conv_transpose2d(windows, kernel, None, 2, 1, 1, groups=len(kernel))

    return (share(weight) / share(torch.ones_like(weight)))[0].mean(0)


# ------------------------------------------------------------------------------ CPM R-CNN


def cpm_record(model: nn.Module) -> list[str]:
    return [] if model.cascade else ["decode_stage"]


def cpm_panels(seen: Seen, pick: int) -> list:
    if seen.model.cascade:
        raise BadInput("--base cascade has no heat maps to show")
    row, truth, drawings = seen.row(pick), seen.truth(pick), []
    found, ratios = seen.detections["boxes"][pick], seen.model.config.ratios
    first = seen.calls["decode_stage"][0][0][1][row, 1:]
    corner, wh = cpm_rcnn.enlarge(first[None], ratios[0])
    area = [torch.cat([corner, corner + wh], 2)[0, 0], truth]
    seen.numbers["stages"] = []
    for (stage, rois, logits, _), result in seen.calls["decode_stage"]:
        box, decoded, probs = rois[row, 1:], result[row, 1:], logits[row].float().sigmoid()
        corner, wh = cpm_rcnn.enlarge(box[None], ratios[stage])
        grid = torch.cat([corner, corner + wh], 2)[0, 0]
        shown = probs / probs.amax((1, 2), keepdim=True)  # the best cell of each map is bright
        canvas, best = whole_grid(shown), probs.flatten(1).argmax(1)
        S, windows = probs.shape[-1], cpm_rcnn.unit_points(probs.device) * probs.shape[-1]
        cells = torch.stack([best % S, best // S], 1) + windows + 0.5  # [9, 2] on the 2S grid
        points = corner[0] + wh[0] * cells / (2 * S)
        stage_numbers = dict(enters=numbers_of(box), box=numbers_of(decoded))
        stage_numbers |= dict(points=[numbers_of(p) for p in points])
        stage_numbers |= dict(probs=numbers_of(probs.flatten(1).amax(1)))
        title = f"stage {stage + 1}: nine maps on the box\nenlarged {ratios[stage]:g} times"
        if truth is not None:
            before, after = aligned_iou(torch.stack([box, decoded]), truth[None]).tolist()
            title += f"; IoU {before:.2f} to {after:.2f}"
            stage_numbers |= dict(iou_before=before, iou_after=after)
        seen.numbers["stages"].append(stage_numbers)

        def draw(axis, box=box, decoded=decoded, grid=grid, canvas=canvas, points=points):
            show(axis, seen, area, margin=0.03, grey=True)
            heat(axis, canvas, grid, "inferno", "value", (0, 1), "share of the map's best cell")
            axis.plot(*points.T.cpu(), "+", color="lime", ms=7, mew=1.2)
            outline(axis, truth, TRUTH)
            outline(axis, grid, "yellow", ":", 1.2)
            outline(axis, box, ENTERING, "--")
            outline(axis, decoded, FOUND)

        drawings.append((title, draw))
    scores = {k: seen.candidates[k][row].item() for k in ("cls", "ism", "rsm", "scores")}
    if truth is not None:
        scores["IoU with object"] = aligned_iou(found[None], truth[None]).item()
    seen.numbers |= scores

    def bars(axis):
        names = dict(cls="class score", ism="IoU by ISM", rsm="class by RSM", scores="fused, Eq. 4")
        colours = ["tab:blue", "tab:blue", "tab:blue", "tab:red", "tab:gray"][: len(scores)]
        drawn = axis.barh([names.get(k, k) for k in scores], scores.values(), color=colours)
        axis.bar_label(drawn, fmt="%.2f", padding=2, fontsize=9)
        axis.set(xlim=(0, 1.2))
        axis.invert_yaxis()

    return [*drawings, ("scores of the box", bars)]


def whole_grid(probs: Tensor) -> Tensor:
    """Nine maps [9, S, S], each in its window, as one [2S, 2S]: the highest where they meet."""
    S = probs.shape[-1]
    canvas = probs.new_zeros(2 * S, 2 * S)
    for (x, y), values in zip((cpm_rcnn.unit_points() * S).long().tolist(), probs):
        canvas[y : y + S, x : x + S] = torch.maximum(canvas[y : y + S, x : x + S], values)
    return canvas


# ------------------------------------------------------------------------------ Double-Head


def double_head_record(model: nn.Module) -> list[str]:
    return [f"heads.{k}" + ".blocks" * k.startswith("conv") for k in model.heads]


def double_head_panels(seen: Seen, pick: int) -> list:
    model, truth = seen.model, seen.truth(pick)
    label, found = seen.detections["labels"][pick], seen.detections["boxes"][pick]
    probs = {k: v[:, label] for k, v in seen.outputs["probs"].items()}
    deltas = seen.outputs["deltas"][model.box_head][:, label]
    boxes = decode_boxes(seen.outputs["rois"][:, 1:], deltas, RCNN_STDS)
    boxes = clip_boxes(boxes, seen.outputs["sizes"][0])
    at = int((boxes - found).abs().sum(1).argmin())  # the proposal that the detection comes from
    proposal = seen.outputs["rois"][at, 1:]
    heads = {name: values[at].item() for name, values in probs.items()}
    seen.numbers |= dict(proposal=proposal.tolist(), class_score=heads)
    drawings = []
    for name in model.cls:
        shown = cell_evidence(model, name, seen, at, int(label))
        seen.numbers[f"{name}_cells"] = numbers_of(shown)
        size = model.config.conv_scale if name.startswith("conv") else 1.0
        roi = double_head.enlarge(seen.outputs["rois"][at : at + 1], size)[0, 1:]

        def draw(axis, shown=shown, roi=roi):
            show(axis, seen, [roi, truth], grey=True)
            most = float(shown.abs().max())
            heat(axis, shown, roi, "coolwarm", limits=(-most, most))
            outline(axis, truth, TRUTH)
            outline(axis, proposal, ENTERING, "--")
            outline(axis, found, FOUND)

        title = f"what each cell adds to the\n{name}-head's class, score {heads[name]:.2f}"
        drawings.append((title, draw))
    return drawings + slide(seen, found if truth is None else truth, int(label))


@torch.no_grad()
def cell_evidence(model, name: str, seen: Seen, at: int, label: int) -> Tensor:
    """What each cell of RoI `at` adds to a head's logit of a class: [S, S].

    conv-head averages over cells and ends in a linear layer: the cells and the bias add up to the
    logit. In fc-head a cell adds to the first layer (`FCHead.maps`), and the logit's slope there
    says what that changes.
    """
    head, last = model.heads[name], model.cls[name]
    if name.startswith("conv"):
        maps = seen.calls[f"heads.{name}.blocks"][0][1][at]  # [channels, S, S]
        return torch.einsum("dyx,d->yx", maps, last.weight[label]) / maps[0].numel()
    maps = head.maps(seen.calls[f"heads.{name}"][0][0][0][at : at + 1])[0]
    hidden = (maps.sum((1, 2)) + head.first.bias).detach().requires_grad_()
    with torch.enable_grad():
        logit = last(F.relu(head.second(F.relu(hidden))))[label]
        (slope,) = torch.autograd.grad(logit, hidden)
    return torch.einsum("dyx,d->yx", maps, slope)


@torch.no_grad()
def slide(seen: Seen, box: Tensor, label: int, steps: int = 33) -> list:
    """Both heads' scores and boxes as a proposal slides off the object (cf. 3.1, Figures 2, 7)."""
    model = seen.model
    shift = torch.linspace(-1, 1, steps, device=box.device)
    moved = box.repeat(steps, 1)
    moved[:, 0::2] += shift[:, None] * (box[2] - box[0])
    found = model.predictions(seen.outputs["features"], F.pad(moved, (1, 0)))  # of image 0
    lines = {"IoU of the proposal": aligned_iou(moved, box[None])}
    scores = {name: probs[:, label] for name, probs in found["probs"].items()}
    if len(scores) > 1:
        scores["fused"] = double_head.fuse_scores(*scores.values(), seen.config.fusion)
    regressed = {
        name: aligned_iou(decode_boxes(moved, deltas[:, label], RCNN_STDS), box[None])
        for name, deltas in found["deltas"].items()
    }
    seen.numbers["slide"] = dict(shift=numbers_of(shift))
    for what, values in (("score", scores), ("iou", regressed)):
        seen.numbers["slide"][what] = {k: numbers_of(v) for k, v in values.items()}
    both = []
    for title, values in (
        ("score as the proposal slides", scores),
        ("IoU of the box as it does", regressed),
    ):

        def draw(axis, values=lines | values):
            colours = {
                "IoU of the proposal": "0.6",
                "fused": "k",
                "fc": "tab:blue",
                "conv": "tab:red",
            }
            for name, value in values.items():
                axis.plot(shift.cpu(), value.float().cpu(), label=name, color=colours.get(name))
            axis.set(xlabel="shift in widths", ylim=(-0.02, 1.35), yticks=(0, 0.5, 1))
            axis.legend(fontsize=8, loc="upper center", ncols=2)

        both.append((title, draw))
    return both
