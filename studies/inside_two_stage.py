"""What does a two-stage method see in its proposal? Columns of a page of `studies.explain`.

draw_METHOD(seen) draws the columns of a detection's row and adds the numbers in them to
`seen.numbers`. A head that the detector ran on many RoIs runs here on one RoI.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import d2det
import double_head
import kernels
from baselines import grid_branch
from baselines.faster_rcnn import RCNN_STDS, Rois
from common import BadInput, aligned_iou, decode_boxes
from studies.seen import ENTERING, FOUND, TRUTH, Seen, heat, numbers_of, outline, scale


def proposal_of(seen: Seen) -> Rois:
    """The proposal that a detection was made from, as the only RoI."""
    return seen.outputs["rois"][seen.candidates["roi"][seen.row, None]]


# ------------------------------------------------------------------------------ D2Det


@torch.no_grad()
def draw_d2det(seen: Seen) -> None:
    settings, roi = seen.model.settings, proposal_of(seen)
    if not (settings.dlr or settings.drp):
        raise BadInput("this checkpoint has neither DLR nor DRP: it is the baseline")
    seen.numbers["proposal"] = roi.boxes[0].tolist()
    if settings.dlr:
        draw_cells(seen, roi)
    if settings.drp:
        draw_samples(seen, roi)
    if settings.masks:
        mask, area = seen.detection["masks"], [seen.box, seen.truth]
        seen.map("its mask, 28x28", mask, seen.box, area, alpha="value")


def draw_cells(seen: Seen, roi: Rois) -> None:
    """The boxes of the cells of a detection's proposal, and which of them are averaged."""
    model, proposal = seen.model, roi.boxes[0]
    offsets, overlap_logits = model.regress(model.pool(seen.outputs["features"], roi, 14))
    overlap = overlap_logits[0, 0].float().sigmoid()  # [S, S]
    cells = d2det.cell_boxes(roi.boxes, offsets.float())[0].flatten(1).T  # [S*S, 4]
    used = overlap.flatten() > 0.5
    if not model.settings.overlap:
        used = torch.ones_like(used)
    area, count = [proposal, seen.box, seen.truth], int(used.sum())
    seen.numbers |= dict(overlap=numbers_of(overlap), used=count)
    seen.numbers["cells"] = [numbers_of(c) for c in cells]
    axis = seen.photo(f"each cell's box; {count} cells of {len(cells)}\nare averaged", area)
    for box, on in zip(cells, used):
        outline(axis, box, FOUND if on else "0.35", width=0.7 if on else 0.4, alpha=0.7)
    seen.outlines(axis, proposal)
    if model.settings.overlap:
        title = "is the cell on the object?\n(overlap prediction)"
        seen.map(title, overlap, proposal, area, proposal)


def draw_samples(seen: Seen, roi: Rois) -> None:
    """The samples that classify a proposal."""
    model, proposal = seen.model, roi.boxes[0]
    level = 0
    if model.settings.drp_per_level:
        level = int(kernels.roi_level(roi.flat(), model.strides))
    module = model.drp[level]
    layers = [module.fc, module.pool.norm] if model.settings.weighting else [module.fc]
    results: list[Tensor] = []  # what these layers return, as hooks get it
    hooks = [
        layer.register_forward_hook(lambda *call: results.append(call[-1])) for layer in layers
    ]
    model.class_features(seen.outputs["features"], roi)
    for hook in hooks:
        hook.remove()
    size = module.size
    moves = results[0][0].float().view(2, size, size)
    step = module.gamma * (proposal[2:] - proposal[:2])[:, None, None]
    bins = d2det.cell_centres(roi.boxes, size)[0] + step * moves  # [2, S, S]
    moves = moves.repeat_interleave(2, 1).repeat_interleave(2, 2)  # [2, 2S, 2S]
    points = d2det.cell_centres(roi.boxes, 2 * size)[0] + step * moves
    weight = torch.ones(2 * size, 2 * size)
    if model.settings.weighting:
        weight = relative_weight(results[1][0])
    seen.numbers |= dict(bins=[numbers_of(p) for p in bins], weights=numbers_of(weight))
    title = "where DRP samples, and how\nmuch a sample weighs"
    axis = seen.photo(title, [proposal, seen.truth], margin=0.25)
    outline(axis, seen.truth, TRUTH)
    outline(axis, proposal, ENTERING, "--")
    x, y = points.flatten(1).cpu()
    scale(axis, axis.scatter(x, y, s=12, c=weight.flatten().cpu(), cmap="plasma", lw=0))


def relative_weight(norm: Tensor) -> Tensor:
    """How much each sample counts in DRP's output [2S, 2S]; 1 is its share in a plain average.

    norm [C, 2S, 2S]: what DRP's norm returns. A sample is in one to four windows; mean over C.

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


@torch.no_grad()
def draw_cpm(seen: Seen) -> None:
    if not hasattr(seen.model, "grids"):
        raise BadInput("--base cascade has no heat maps to show")
    settings, roi = seen.model.settings, proposal_of(seen)
    area = [grid_of(roi, settings.ratios[0]), seen.truth]  # the first is the largest
    seen.numbers["stages"] = []
    for stage in range(seen.test.test_stage or settings.num_stages):
        roi = draw_stage(seen, stage, roi, area)
    scores = {k: seen.candidates[k][seen.row].item() for k in ("cls", "ism", "rsm", "scores")}
    names = ["class score", "IoU by ISM", "class by RSM", "fused, Eq. 4"]
    if seen.truth is not None:
        scores["IoU with object"] = aligned_iou(seen.box, seen.truth).item()
        names.append("IoU with object")
    seen.numbers |= scores
    axis = seen.column("scores of the box")
    colours = ["tab:blue", "tab:blue", "tab:blue", "tab:red", "tab:gray"][: len(scores)]
    bars = axis.barh(names, scores.values(), color=colours)
    axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=9)
    axis.set(xlim=(0, 1.2))
    axis.invert_yaxis()


def grid_of(roi: Rois, ratio: float) -> Tensor:
    """The box [4] that the heat maps of a RoI cover."""
    corner, wh = grid_branch.grid_frame(roi.boxes, ratio)
    return torch.cat([corner, corner + wh], -1)[0, 0]


def draw_stage(seen: Seen, stage: int, roi: Rois, area: list) -> Rois:
    """The nine heat maps of a stage, and the box that they give, which enters the next one."""
    model, outputs, ratio = seen.model, seen.outputs, seen.model.settings.ratios[stage]
    logits, _ = model.grids[stage](model.pool(outputs["features"], roi, 14))
    moved = roi.moved(grid_branch.decode_grid(roi.boxes, logits, ratio, outputs["sizes"]))
    box, decoded, probs = roi.boxes[0], moved.boxes[0], logits[0].float().sigmoid()
    grid = grid_of(roi, ratio)
    canvas = whole_grid(probs / probs.amax((1, 2), keepdim=True))  # best cells are bright
    S, cell = probs.shape[-1], probs.flatten(1).argmax(1)
    windows = grid_branch.unit_points(probs.device) * S
    cells = torch.stack([cell % S, cell // S], 1) + windows + 0.5  # [9, 2] on the 2S grid
    points = grid[:2] + (grid[2:] - grid[:2]) * cells / (2 * S)
    numbers = dict(enters=numbers_of(box), box=numbers_of(decoded))
    numbers |= dict(points=[numbers_of(p) for p in points])
    numbers |= dict(probs=numbers_of(probs.flatten(1).amax(1)))
    title = f"stage {stage + 1}: nine maps on the box\nenlarged {ratio:g} times"
    if seen.truth is not None:
        before, after = aligned_iou(torch.stack([box, decoded]), seen.truth).tolist()
        title += f"; IoU {before:.2f} to {after:.2f}"
        numbers |= dict(iou_before=before, iou_after=after)
    seen.numbers["stages"].append(numbers)
    axis = seen.photo(title, area, margin=0.03, grey=True)
    heat(axis, canvas, grid, "inferno", "value", label="share of the map's best cell")
    axis.plot(*points.T.cpu(), "+", color="lime", ms=7, mew=1.2)
    outline(axis, grid, "yellow", ":", 1.2)
    outline(axis, seen.truth, TRUTH)
    outline(axis, box, ENTERING, "--")
    outline(axis, decoded, FOUND)
    return moved


def whole_grid(probs: Tensor) -> Tensor:
    """Nine maps [9, S, S], each in its window, as one [2S, 2S]; the highest value wins."""
    S = probs.shape[-1]
    canvas = probs.new_zeros(2 * S, 2 * S)
    for (x, y), values in zip((grid_branch.unit_points() * S).long().tolist(), probs):
        window = canvas[y : y + S, x : x + S]
        window.copy_(torch.maximum(window, values))
    return canvas


# ------------------------------------------------------------------------------ Double-Head


@torch.no_grad()
def draw_double_head(seen: Seen) -> None:
    model, roi = seen.model, proposal_of(seen)
    at = seen.candidates["roi"][seen.row]
    scores = {k: v[at, seen.label].item() for k, v in seen.outputs["probs"].items()}
    seen.numbers |= dict(proposal=roi.boxes[0].tolist(), class_score=scores)
    pooled = model.pool_for_heads(seen.outputs["features"], roi)
    for name in model.cls:
        cells = cell_evidence(model, name, pooled[name], seen.label)
        seen.numbers[f"{name}_cells"] = numbers_of(cells)
        size = model.settings.conv_scale if name.startswith("conv") else 1.0
        box = double_head.enlarge_rois(roi.flat(), size)[0, 1:]
        title = f"what each cell adds to the\n{name}-head's class, score {scores[name]:.2f}"
        how = dict(colours="coolwarm", most=float(cells.abs().max()))
        seen.map(title, cells, box, [box, seen.truth], roi.boxes[0], **how)
    draw_slide(seen)


def cell_evidence(model, name: str, pooled: Tensor, label: int) -> Tensor:
    """What each cell of a RoI, pooled [1, C, S, S], adds to a head's logit of a class: [S, S].

    conv-head averages over cells and ends in a linear layer, so the cells and the bias add up
    to the logit. In fc-head a cell adds to the first layer, whose share in the logit is here
    its value times the logit's slope.
    """
    head, output = model.heads[name], model.cls[name]
    maps = head.maps(pooled)[0]  # [channels, S, S]
    if name.startswith("conv"):
        return torch.einsum("dyx,d->yx", maps, output.weight[label]) / maps[0].numel()
    hidden = (maps.sum((1, 2)) + head.first.bias).detach().requires_grad_()
    with torch.enable_grad():
        logit = output(F.relu(head.second(F.relu(hidden))))[label]
        (slope,) = torch.autograd.grad(logit, hidden)
    return torch.einsum("dyx,d->yx", maps, slope)


def draw_slide(seen: Seen, steps: int = 33) -> None:
    """Both heads' scores and boxes as a proposal slides off the object (3.1, Figures 2, 7)."""
    model = seen.model
    box = seen.box if seen.truth is None else seen.truth
    shift = torch.linspace(-1, 1, steps, device=box.device)
    moved = box.repeat(steps, 1)
    moved[:, 0::2] += shift[:, None] * (box[2] - box[0])
    image = torch.zeros(steps, dtype=torch.long, device=box.device)
    found = model.predictions(seen.outputs["features"], Rois(image, moved))
    scores = {name: probs[:, seen.label] for name, probs in found["probs"].items()}
    if len(scores) > 1:
        scores["fused"] = double_head.fuse_scores(*scores.values(), seen.test.fusion)
    regressed = {
        name: aligned_iou(decode_boxes(moved, deltas[:, seen.label], RCNN_STDS), box)
        for name, deltas in found["deltas"].items()
    }
    seen.numbers["slide"] = {
        "shift": numbers_of(shift),
        "score": {k: numbers_of(v) for k, v in scores.items()},
        "iou": {k: numbers_of(v) for k, v in regressed.items()},
    }
    proposal = {"IoU of the proposal": aligned_iou(moved, box)}
    colours = {"IoU of the proposal": "0.6", "fused": "k", "fc": "tab:blue", "conv": "tab:red"}
    for title, lines in (
        ("score as the proposal slides", proposal | scores),
        ("IoU of the regressed box\nas the proposal slides", proposal | regressed),
    ):
        axis = seen.column(title)
        for name, value in lines.items():
            axis.plot(shift.cpu(), value.float().cpu(), label=name, color=colours.get(name))
        axis.set(xlabel="shift in widths", ylim=(-0.02, 1.35), yticks=(0, 0.5, 1))
        axis.legend(fontsize=8, loc="upper center", ncols=2)
