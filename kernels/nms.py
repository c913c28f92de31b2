"""Non-maximum suppression: greedy, soft, and classification-localisation balanced (CL-NMS).

Contract of every function here

- `boxes` [N, 4] are xyxy. `scores` [N] are floating. `groups` [N] are integers of any values
  (one for each image and class), or None for a single group. Boxes of different groups never
  interact. No coordinate is shifted to keep groups apart, so grouping is exact.
- A row whose score is not finite is absent: it is never kept and suppresses nothing. Pad a
  fixed-size buffer with scores of -inf. A box with a non-finite corner overlaps nothing.
- Everything is computed in the boxes' dtype, half precision in float32. IoU = inter / (area +
  area - inter), each operation rounded separately, as torchvision does on a CPU. (On a GPU, `nms`
  of one group runs torchvision's kernel, which may fuse two operations.)
- A box is suppressed if IoU > iou_threshold. An equal IoU does not suppress, nor does the 0 / 0
  of two boxes without area.
- The higher score goes first; of equal scores, the lower index. Results are sorted by their final
  scores in the same way. No function propagates gradients.
- ValueError is raised for other shapes or dtypes, mixed devices, or an `impl` that cannot run on
  these tensors. `impl` is "auto", "triton", "torch" or, for greedy NMS, "torchvision".

The `*_padded` functions return fixed shapes: kept indices, then -1, and a count. With Triton they
never wait for a GPU. The other functions cut the result at the count, which waits once.

`soft_nms` lowers scores instead of removing boxes (Bodla et al., 2017).

`cl_nms` is section 2.3 of "Dynamic Coefficient loss, IAC score, CL-NMS". Our scan of the paper lost
its equations, so they are rebuilt from the prose. Repeat within each group:

1. The best remaining p names a cluster: all remaining boxes whose IoU with its box exceeds the
   threshold, and that box itself.
2. c0 is the p-weighted mean of the cluster's box centres c. Every member gets
   d = 1 - |c - c0| / (diagonal of the box that encloses the cluster), or 1 if the diagonal is 0.
3. The member with the highest p + d is kept with its own p. The rest of the cluster is suppressed.

Taken literally, the text adds the distance itself, which prefers the farthest box: `literal=True`.
"""

import math
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, library

try:
    import torchvision  # noqa: F401  (the import registers torch.ops.torchvision.nms)
except ImportError:
    torchvision = None

# --- references: plain torch, any device, float32 or float64, all groups in lock-step -------------


def pairwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of boxes [..., 4] and others [..., 4], broadcast. NaN if neither box has an area."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    u1, v1, u2, v2 = others.unbind(-1)
    width = (torch.minimum(x2, u2) - torch.maximum(x1, u1)).clamp(min=0)
    height = (torch.minimum(y2, v2) - torch.maximum(y1, v1)).clamp(min=0)
    inter = width * height
    return inter / ((x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - inter)


def _lockstep(boxes, scores, groups, step):
    """Repeat `step` on the best remaining box of all groups at once, until no box remains.

    `step(boxes [G, M, 4], live [G, M], best [G, 1], IoU with best [G, M])` returns the box to keep
    [G, 1], the score to report for it [G, 1] and the remaining scores [G, M]. The loop itself
    removes the best box. Returns the reported scores [N], -inf for boxes that are not kept.
    """
    out = torch.full_like(scores, -torch.inf)
    if groups is None:
        groups = torch.zeros_like(scores, dtype=torch.int64)
    groups, order = torch.sort(groups, stable=True)
    sizes = groups.unique_consecutive(return_counts=True)[1]
    starts = sizes.cumsum(0) - sizes
    # Groups of similar size run together, so that padding at most doubles the work.
    bucket = torch.frexp(sizes.double())[1]
    for b in bucket.unique().tolist():
        rows = (bucket == b).nonzero()  # [G, 1]
        column = torch.arange(int(sizes[rows].max()), device=scores.device)
        inside = column < sizes[rows]  # [G, M]
        index = order[(starts[rows] + column).where(inside, 0)]  # [G, M]
        part = boxes[index]  # [G, M, 4]
        live = scores[index]
        live = live.where(inside & live.isfinite(), -torch.inf)
        while True:
            top, best = live.max(1, keepdim=True)  # of equal scores, the lowest index
            active = top[:, 0] > -torch.inf
            if not active.all():
                part, index = part[active], index[active]
                live, best = live[active], best[active]
            if not len(live):
                break
            iou = pairwise_iou(part.gather(1, best[..., None].expand(-1, -1, 4)), part)
            keep, score, live = step(part, live, best, iou)
            live.scatter_(1, best, -torch.inf)
            out[index.gather(1, keep)] = score
    return out


def nms_reference(boxes, scores, groups, iou_threshold):
    """Greedy NMS: the scores of the kept boxes [N], -inf for the others."""

    def step(_, live, best, iou):
        return best, live.gather(1, best), live.masked_fill(iou > iou_threshold, -torch.inf)

    return _lockstep(boxes, scores, groups, step)


def soft_nms_reference(boxes, scores, groups, iou_threshold, score_threshold):
    """Soft-NMS: the lowered scores of the kept boxes [N], -inf for the others."""

    def step(_, live, best, iou):
        lowered = live * torch.where(iou > iou_threshold, 1 - iou, 1)
        return best, live.gather(1, best), lowered.where(lowered >= score_threshold, -torch.inf)

    scores = scores.where(scores >= score_threshold, -torch.inf)
    return _lockstep(boxes, scores, groups, step)


def cl_nms_reference(boxes, scores, groups, iou_threshold, literal):
    """CL-NMS: the selection scores p + d of the kept boxes [N], -inf for the others."""

    def step(boxes, live, best, iou):
        member = (iou > iou_threshold) & (live > -torch.inf)
        member.scatter_(1, best, True)  # [G, M]
        # In float64, rounded at the end: symmetric boxes then tie in whatever order sums run.
        p = live.double()
        x1, y1, x2, y2 = boxes.double().unbind(-1)
        # choice: if every p of a cluster is 0, its centre is the plain mean.
        weight = torch.where(p.gather(1, best) > 0, p, 1).where(member, 0)  # [G, M]
        total = weight.sum(1, keepdim=True)
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
        off_x = x - (weight * x).where(member, 0).sum(1, keepdim=True) / total
        off_y = y - (weight * y).where(member, 0).sum(1, keepdim=True) / total
        width = x2.where(member, -torch.inf).amax(1) - x1.where(member, torch.inf).amin(1)
        height = y2.where(member, -torch.inf).amax(1) - y1.where(member, torch.inf).amin(1)
        diagonal = (width * width + height * height).sqrt()[:, None]  # [G, 1]
        distance = (off_x * off_x + off_y * off_y).sqrt() / diagonal
        # The diagonal is 0 if all members are one point, and not finite if a lone box is not.
        distance = distance.where((diagonal > 0) & (diagonal < torch.inf), 0)
        select = (p + (distance if literal else 1 - distance)).to(live.dtype)
        score, keep = select.where(member, -torch.inf).max(1, keepdim=True)
        return keep, score, live.masked_fill(member, -torch.inf)

    return _lockstep(boxes, scores, groups, step)


# --- Triton ---------------------------------------------------------------------------------------

try:
    import triton
    import triton.language as tl
except ImportError:  # the kernels then stay plain functions that nobody calls
    triton, tl = None, SimpleNamespace(constexpr=None)

# BLOCK: the boxes that a program looks at in one pass. Greedy NMS holds BLOCK x BLOCK pairs in
# registers. The compiler must fuse nothing on its own: an IoU has to round as it does on a CPU.
_GREEDY_LAUNCH = {"BLOCK": 64, "num_warps": 8, "enable_fp_fusion": False}
_SOFT_LAUNCH = {"BLOCK": 256, "num_warps": 4, "enable_fp_fusion": False}  # and for CL-NMS


def jit(*sizes: str):
    """triton.jit without specialisation on `sizes`, arguments that change with every batch."""
    return triton.jit(do_not_specialize=sizes) if triton else lambda function: function


@jit()
def _load_boxes(boxes, at, mask):
    """Rows `at` of boxes [N, 4] as a tuple; a masked row is a point at the origin."""
    row = boxes + at.to(tl.int64) * 4
    x1 = tl.load(row, mask, 0.0)
    y1 = tl.load(row + 1, mask, 0.0)
    x2 = tl.load(row + 2, mask, 0.0)
    y2 = tl.load(row + 3, mask, 0.0)
    return x1, y1, x2, y2


@jit()
def _inter_and_union(box, other):
    x1, y1, x2, y2 = box
    u1, v1, u2, v2 = other
    width = tl.maximum(tl.minimum(x2, u2) - tl.maximum(x1, u1), 0.0)
    height = tl.maximum(tl.minimum(y2, v2) - tl.maximum(y1, v1), 0.0)
    inter = width * height
    return inter, (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - inter


@jit()
def _iou(box, other):
    inter, union = _inter_and_union(box, other)
    return tl.div_rn(inter, union)  # `/` may be two ulp off in float32


@jit()
def _over(box, other, threshold, half_ulp, ODD: tl.constexpr):
    """Whether `_iou` > threshold for every pair (rows `box`, columns `other`), without a division.

    With t the threshold, t + half_ulp is the midpoint between t and the next float. inter / union
    rounds to more than t if it exceeds the midpoint, or if it equals the midpoint and t is odd
    (ties round to even). Multiplied by union, this reads inter - t union > half_ulp union.

    This relies on a fused multiply-add: tl.fma must round once, as the hardware's does. Then the
    comparison is exact: wherever the two sides are close, inter - t union is a float, and
    half_ulp is a power of two. An interpreter that also rounds the product, as those of Triton 3.6
    to 3.8 do, errs for an IoU within about an ulp of t; the tests give it a fused one.
    """
    rows = (box[0][:, None], box[1][:, None], box[2][:, None], box[3][:, None])
    columns = (other[0][None, :], other[1][None, :], other[2][None, :], other[3][None, :])
    inter, union = _inter_and_union(rows, columns)
    rest = tl.fma(-threshold, union, inter)
    bound = half_ulp * union
    over = (rest >= bound) if ODD else (rest > bound)
    return over & (inter > 0) & (union >= 0)


@jit()
def _top(scores, at, N):
    """The highest score and the lowest row that has it, or N if all scores are -inf."""
    best_score = tl.max(scores, 0)
    is_best = (scores == best_score) & (scores > -float("inf"))
    return best_score, tl.min(tl.where(is_best, at, N), 0)


@jit()
def _cluster(boxes, live, at, end, best, reference, iou_threshold):
    """Of rows `at`: the boxes, the scores p, and whether they belong to the cluster of row `best`.

    `reference` is the box of row `best`.
    """
    p = tl.load(live + at, at < end, -float("inf"))
    box = _load_boxes(boxes, at, at < end)
    over = _iou(box, reference) > iou_threshold
    return box, p, (over | (at == best)) & (p > -float("inf"))


# Grid of all three kernels: (N,), one program for each group that there could be. Program i owns
# group i, whose rows lie together, from starts[i] to starts[i + 1]. Behind the last group, starts
# [N + 1] is N and programs have nothing to do. order [N] holds the original index of each row. out
# [N], by original index, comes filled with -inf and receives the scores to report. Loops are
# `while` because the interpreter of some Triton releases cannot count to a loaded number.


@jit("N")
def _nms_kernel(
    boxes, live, order, starts, out, N, iou_threshold, kept_boxes, half_ulp,
    ODD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Greedy NMS. boxes [N, 4] and live [N], their scores, are sorted by group, then by descending
    score; live is -inf for absent rows. kept_boxes [N, 4] is scratch memory: the boxes that a group
    has kept, from the group's first row on."""
    lane = tl.arange(0, BLOCK)
    start = tl.load(starts + tl.program_id(0))
    end = tl.load(starts + tl.program_id(0) + 1)
    num_kept = start * 0
    tile = start
    while tile < end:
        at = tile + lane
        score = tl.load(live + at, at < end, -float("inf"))
        # Absent rows come last in a group, so a tile of nothing else ends it.
        end = tl.where(tl.max(score, 0) > -float("inf"), end, tile)
        box = _load_boxes(boxes, at, at < end)
        hits = tl.zeros([BLOCK, BLOCK], tl.int1)  # row: a box of this tile; column: a kept one
        first = start * 0
        while first < num_kept:
            # Lanes behind the last kept box load points at the origin, which overlap nothing.
            earlier = _load_boxes(kept_boxes, start + first + lane, first + lane < num_kept)
            hits = hits | _over(box, earlier, iou_threshold, half_ulp, ODD)
            first += BLOCK
        hit = tl.max(hits.to(tl.int32), 1)  # after the loop: across warps it costs a barrier
        alive = ((score > -float("inf")) & (hit == 0)).to(tl.int32)
        # Within the tile: kept = alive and not hit by an earlier kept box. Iterate from kept =
        # alive. Box k is final after k + 1 rounds, so the fixed point is the greedy result; in
        # practice a few rounds suffice.
        over = _over(box, _load_boxes(boxes, at, at < end), iou_threshold, half_ulp, ODD)
        over = (over & (lane[None, :] < lane[:, None])).to(tl.int32)
        kept = alive
        changed = tl.max(alive, 0)
        while changed > 0:
            new = alive * (1 - tl.max(over * kept[None, :], 1))
            changed = tl.max(new ^ kept, 0)
            kept = new
        row = kept_boxes + (start + num_kept + tl.cumsum(kept, 0) - 1).to(tl.int64) * 4
        for side in tl.static_range(4):
            tl.store(row + side, box[side], kept > 0)
        tl.store(out + tl.load(order + at, at < end, 0), score, kept > 0)
        num_kept += tl.sum(kept, 0)
        tl.debug_barrier()  # threads of the next tile read what these have stored
        tile += BLOCK


@jit("N")
def _soft_nms_kernel(
    boxes, live, order, starts, out, N, iou_threshold, score_threshold, BLOCK: tl.constexpr
):
    """Soft-NMS. boxes [N, 4] are sorted by group, then by original index. live [N] holds their
    present scores, -inf for rows that are absent, picked or below the threshold."""
    lane = tl.arange(0, BLOCK)
    start = tl.load(starts + tl.program_id(0))
    end = tl.load(starts + tl.program_id(0) + 1)
    picked = N  # no pick yet: row N loads as a point at the origin, which overlaps nothing
    more = 1
    while more > 0:
        # One pass lowers the scores by the last pick and finds the next one.
        last = _load_boxes(boxes, picked, picked < N)
        top = tl.full([BLOCK], -float("inf"), tl.float32)
        top_at = tl.zeros([BLOCK], tl.int32)
        tile = start
        while tile < end:
            at = tile + lane
            score = tl.load(live + at, at < end, -float("inf"))
            iou = _iou(_load_boxes(boxes, at, at < end), last)
            score = tl.where(iou > iou_threshold, score * (1 - iou), score)
            stays = (score >= score_threshold) & (at != picked)
            score = tl.where(stays, score, -float("inf"))
            tl.store(live + at, score, at < end)
            top_at = tl.where(score > top, at, top_at)
            top = tl.maximum(score, top)
            tile += BLOCK
        best_score, picked = _top(top, top_at, N)
        index = tl.load(order + picked, picked < N, 0)
        tl.store(out + index, best_score, picked < N)
        more = (picked < N).to(tl.int32)
        tl.debug_barrier()


@jit("N")
def _cl_nms_kernel(
    boxes, live, order, starts, out, N, iou_threshold, LITERAL: tl.constexpr, BLOCK: tl.constexpr
):
    """CL-NMS. boxes [N, 4] are sorted by group, then by original index. live [N] holds their p,
    -inf for rows that are absent or suppressed."""
    lane = tl.arange(0, BLOCK)
    start = tl.load(starts + tl.program_id(0))
    end = tl.load(starts + tl.program_id(0) + 1)
    best = N  # no reference yet: the first round's cluster is empty and keeps nobody
    best_p = 0.0
    more = 1
    while more > 0:
        # First pass: weighted centre and enclosing box of the cluster of `best`.
        reference = _load_boxes(boxes, best, best < N)
        inf = tl.full([BLOCK], float("inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float64)
        sum_x = tl.zeros([BLOCK], tl.float64)
        sum_y = tl.zeros([BLOCK], tl.float64)
        low_x, low_y = inf, inf
        high_x, high_y = -inf, -inf
        tile = start
        while tile < end:
            at = tile + lane
            box, p, member = _cluster(boxes, live, at, end, best, reference, iou_threshold)
            x1, y1, x2, y2 = box
            weight = tl.where(best_p > 0, p, 1.0).to(tl.float64)
            total += tl.where(member, weight, 0.0)
            sum_x += tl.where(member, weight * (x1.to(tl.float64) + x2) / 2, 0.0)
            sum_y += tl.where(member, weight * (y1.to(tl.float64) + y2) / 2, 0.0)
            low_x = tl.where(member & (x1 < low_x), x1, low_x)
            low_y = tl.where(member & (y1 < low_y), y1, low_y)
            high_x = tl.where(member & (x2 > high_x), x2, high_x)
            high_y = tl.where(member & (y2 > high_y), y2, high_y)
            tile += BLOCK
        total = tl.sum(total, 0)
        centre_x = tl.sum(sum_x, 0) / total
        centre_y = tl.sum(sum_y, 0) / total
        width = tl.max(high_x, 0).to(tl.float64) - tl.min(low_x, 0)
        height = tl.max(high_y, 0).to(tl.float64) - tl.min(low_y, 0)
        diagonal = tl.sqrt(width * width + height * height)
        # Second pass: choose the box to keep, remove the cluster, find the next reference.
        choice, top = -inf, -inf
        choice_at = tl.zeros([BLOCK], tl.int32)
        top_at = tl.zeros([BLOCK], tl.int32)
        tile = start
        while tile < end:
            at = tile + lane
            box, p, member = _cluster(boxes, live, at, end, best, reference, iou_threshold)
            x1, y1, x2, y2 = box
            off_x = (x1.to(tl.float64) + x2) / 2 - centre_x
            off_y = (y1.to(tl.float64) + y2) / 2 - centre_y
            distance = tl.sqrt(off_x * off_x + off_y * off_y) / diagonal
            distance = tl.where((diagonal > 0) & (diagonal < float("inf")), distance, 0.0)
            d = distance if LITERAL else 1 - distance
            select = tl.where(member, (p.to(tl.float64) + d).to(tl.float32), -float("inf"))
            choice_at = tl.where(select > choice, at, choice_at)
            choice = tl.maximum(select, choice)
            p = tl.where(member, -float("inf"), p)
            tl.store(live + at, p, at < end)
            top_at = tl.where(p > top, at, top_at)
            top = tl.maximum(p, top)
            tile += BLOCK
        select, keep = _top(choice, choice_at, N)
        tl.store(out + tl.load(order + keep, keep < N, 0), select, keep < N)
        best_p, best = _top(top, top_at, N)
        more = (best < N).to(tl.int32)
        tl.debug_barrier()


def _triton_select(boxes, scores, groups, iou_threshold, method, score_threshold):
    """Sort by group and run the kernel: scores to report [N]. Never waits for the device.

    Also the rows' order by descending score, which greedy NMS needs first; None for the others.
    """
    N, device = scores.shape[0], boxes.device
    if N >= 2**29:
        raise ValueError(f"{N} boxes are too many: rows are counted in 32 bits")
    # masked_fill, not where: `where` may copy a scalar to the device, which waits.
    live = scores.masked_fill(~scores.isfinite(), -torch.inf)
    if method == "soft":
        live = live.masked_fill(live < score_threshold, -torch.inf)
    order, by_score = torch.arange(N, device=device), None
    if method == "greedy":
        order = by_score = torch.argsort(live, descending=True, stable=True)
    rank = torch.zeros_like(order)  # number of each row's group, from 0 up
    if groups is not None:
        order = order[torch.argsort(groups[order], stable=True)]
        groups = groups[order]
        rank[1:] = (groups[1:] != groups[:-1]).cumsum(0)
    starts = torch.searchsorted(rank, torch.arange(N + 1, device=device), out_int32=True)
    boxes, live = boxes[order], live[order]
    out = torch.full_like(scores, -torch.inf)
    if method == "greedy":
        kernel, launch = _nms_kernel, _GREEDY_LAUNCH
        t = np.float32(iou_threshold)
        half_ulp, odd = float(np.spacing(t)) / 2, bool(t.view(np.int32) & 1)
        own = {"kept_boxes": torch.empty_like(boxes), "half_ulp": half_ulp, "ODD": odd}
    elif method == "soft":
        kernel, launch = _soft_nms_kernel, _SOFT_LAUNCH
        own = {"score_threshold": score_threshold}
    else:
        kernel, launch = _cl_nms_kernel, _SOFT_LAUNCH
        own = {"LITERAL": method == "cl_literal"}
    with torch.cuda.device_of(boxes):
        kernel[(N,)](boxes, live, order, starts, out, N, iou_threshold, **own, **launch)
    return out, by_score


# If TRITON_INTERPRET was on when triton was imported, kernels run on CPU tensors.
INTERPRETED = triton is not None and not isinstance(_nms_kernel, triton.JITFunction)

# --- torchvision ----------------------------------------------------------------------------------


def _torchvision_nms(boxes, scores, groups, iou_threshold):
    """Kept indices, best first, by torchvision's compiled op, called once a group (25 us on a CPU).

    torchvision's own batched_nms shifts the groups of small inputs apart in float32, which is
    faster but not exact.
    """
    boxes, scores, iou_threshold = _prepare(boxes, scores, iou_threshold)
    # A dot product is the cheapest test for finite scores. It may overflow, so look again.
    if not math.isfinite(scores.dot(scores)):
        present = scores.isfinite().nonzero()[:, 0]
        if present.shape[0] < scores.shape[0]:
            groups = None if groups is None else groups[present]
            return present[_torchvision_nms(boxes[present], scores[present], groups, iou_threshold)]
    if groups is None or scores.shape[0] == 0:
        return torch.ops.torchvision.nms(boxes, scores, iou_threshold)
    groups, order = torch.sort(groups, stable=True)
    sizes = groups.unique_consecutive(return_counts=True)[1].tolist()
    start, kept = 0, []
    for group_boxes, group_scores in zip(boxes[order].split(sizes), scores[order].split(sizes)):
        kept.append(torch.ops.torchvision.nms(group_boxes, group_scores, iou_threshold) + start)
        start += group_scores.shape[0]
    keep = order[torch.cat(kept)].sort()[0]
    return keep[torch.argsort(scores[keep], descending=True, stable=True)]


# --- operators ------------------------------------------------------------------------------------


def _compute_dtype(boxes) -> torch.dtype:
    return torch.float64 if boxes.dtype == torch.float64 else torch.float32


def _prepare(boxes, scores, threshold: float):
    """Boxes and scores in the dtype to compute in, and the threshold rounded down to that dtype.

    A number of that dtype exceeds the threshold if and only if it exceeds the rounded one, so it
    does not matter whether a backend compares in float32 or in float64.
    """
    dtype = _compute_dtype(boxes)
    number = np.float64 if dtype == torch.float64 else np.float32
    rounded = number(threshold)
    if float(rounded) > threshold:
        rounded = np.nextafter(rounded, number(-np.inf))
    return boxes.detach().to(dtype), scores.detach().to(dtype), float(rounded)


def _backend(boxes, scores, groups, iou_threshold, method, impl, padded) -> str:
    """Check the arguments and name the implementation to run."""
    given = {"boxes": boxes, "scores": scores}
    if groups is not None:
        given["groups"] = groups
    N = scores.shape[0] if scores.dim() else 0
    valid = boxes.is_floating_point() and scores.is_floating_point()
    valid = valid and (groups is None or not groups.is_floating_point())
    for name, tensor in given.items():
        shape = (N, 4) if name == "boxes" else (N,)
        valid = valid and tensor.shape == shape and tensor.device == boxes.device
    if not valid:
        found = ", ".join(f"{k} {[*t.shape]} {t.dtype} {t.device}" for k, t in given.items())
        raise ValueError(
            "boxes [N, 4] and scores [N] must be floating, groups [N] integers, all on one "
            f"device, not {found}"
        )
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be in [0, 1], not {iou_threshold}")
    vision = torchvision is not None and method == "greedy"
    kernels = triton is not None and boxes.dtype != torch.float64 and (boxes.is_cuda or INTERPRETED)
    if impl == "auto":
        # choice: one group keeps only one Triton program busy, where torchvision spreads it over
        # the GPU. But torchvision waits for the GPU, which a padded function must not.
        vision = vision and not (padded and boxes.is_cuda)
        if boxes.is_cuda and kernels and not (vision and groups is None):
            return "triton"
        return "torchvision" if vision else "torch"
    if not {"torch": True, "triton": kernels, "torchvision": vision}.get(impl):
        raise ValueError(
            "impl must be auto, torch, torchvision (if installed, for greedy NMS) or triton (if "
            "installed, not for float64, on CUDA or with TRITON_INTERPRET=1 from the start), not "
            f"{impl!r} for {boxes.dtype} boxes on {boxes.device}"
        )
    return impl


def _padded(
    boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float, method: str,
    score_threshold: float, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Kept indices [N], then -1; their reported scores [N], then 0; and the count [].

    method: "greedy", "soft", "cl" or "cl_literal". Only "soft" reads score_threshold.
    """
    boxes, scores, threshold = _prepare(boxes, scores, iou_threshold)
    by_score = None
    if scores.shape[0] == 0:
        reported = scores.clone()
    elif impl == "triton":
        reported, by_score = _triton_select(
            boxes, scores, groups, threshold, method, score_threshold
        )
    elif impl == "torchvision":
        keep = _torchvision_nms(boxes, scores, groups, iou_threshold)
        reported = torch.full_like(scores, -torch.inf).scatter_(0, keep, scores[keep])
    elif method == "greedy":
        reported = nms_reference(boxes, scores, groups, threshold)
    elif method == "soft":
        reported = soft_nms_reference(boxes, scores, groups, threshold, score_threshold)
    else:
        reported = cl_nms_reference(boxes, scores, groups, threshold, method == "cl_literal")
    kept = reported > -torch.inf
    if by_score is not None:  # the rows in this order, those kept moved to the front: no third sort
        kept_rows = kept[by_score]
        place = torch.where(kept_rows, kept_rows.cumsum(0) - 1, kept.shape[0])
        keep = by_score.new_zeros(kept.shape[0] + 1)  # the last entry takes all the others
        keep = keep.scatter_(0, place, by_score)[:-1]
    else:
        # choice: CL-NMS orders by p, its final score; p + d only selects within a cluster.
        key = (reported if method == "soft" else scores).masked_fill(~kept, -torch.inf)
        keep = torch.argsort(key, descending=True, stable=True)
    count = kept.sum()
    unused = torch.arange(keep.shape[0], device=keep.device) >= count
    return keep.masked_fill(unused, -1), reported[keep].masked_fill(unused, 0), count


# A compiled graph keeps custom operators whole. Their namespace is this module's name, so that
# copies of the file do not clash.
_NAMESPACE = __name__.replace(".", "_")
_padded_op = library.custom_op(f"{_NAMESPACE}::padded", _padded, mutates_args=())


@_padded_op.register_fake
def _(boxes, scores, *_):
    keep = torch.empty_like(scores, dtype=torch.int64)
    return keep, torch.empty_like(scores, dtype=_compute_dtype(boxes)), keep.new_empty(())


@library.custom_op(f"{_NAMESPACE}::cut", mutates_args=())
def _cut(keep: Tensor, reported: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The first `count` entries of both. Reading the count waits for a GPU."""
    number = int(count)
    return keep[:number].clone(), reported[:number].clone()


@_cut.register_fake
def _(keep, reported, count):
    # Without boxes the size is known, and a graph that indexes an empty tensor must see that.
    empty = isinstance(keep.shape[0], int) and keep.shape[0] == 0
    size = 0 if empty else library.get_ctx().new_dynamic_size()
    return keep.new_empty([size]), reported.new_empty([size])


def _run(boxes, scores, groups, iou_threshold, method, impl, score_threshold=0.0):
    """Check the arguments and run `_padded` as an operator."""
    impl = _backend(boxes, scores, groups, iou_threshold, method, impl, padded=True)
    groups = None if groups is None else groups.long()
    return _padded_op(
        boxes.detach(), scores.detach(), groups, float(iou_threshold), method,
        float(score_threshold), impl,
    )  # fmt: skip


# --- public functions -----------------------------------------------------------------------------


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, impl: str = "auto") -> Tensor:
    """Greedy NMS of one group: boxes [N, 4], scores [N] -> kept indices [count], best first."""
    return batched_nms(boxes, scores, None, iou_threshold, impl)


def batched_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float, impl: str = "auto"
) -> Tensor:
    """Greedy NMS within each group: kept indices int64 over all groups, best first.

    Shapes: boxes [N, 4], scores [N], groups [N] or None -> [count].
    """
    impl = _backend(boxes, scores, groups, iou_threshold, "greedy", impl, padded=False)
    if impl == "torchvision" and not torch.compiler.is_compiling():
        return _torchvision_nms(boxes, scores, groups, iou_threshold)
    keep, reported, count = _run(boxes, scores, groups, iou_threshold, "greedy", impl)
    return _cut(keep, reported, count)[0]


def nms_padded(
    boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """batched_nms of fixed shape: kept indices [N], best first, then -1; and their count [].

    Give rows to leave out the score -inf. With Triton this never waits for a GPU.
    """
    keep, _, count = _run(boxes, scores, groups, iou_threshold, "greedy", impl)
    return keep, count


def soft_nms_padded(
    boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float = 0.5,
    score_threshold: float = 1e-3, impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Soft-NMS of fixed shape: indices [N], then -1; lowered scores [N], then 0; their count [].

    Within each group, the best remaining box is kept with its present score. Every other score s
    whose box has IoU > iou_threshold with it becomes s * (1 - IoU). A box is dropped once its
    score is below score_threshold.
    Shapes: boxes [N, 4], scores [N], groups [N] or None.
    """
    if not -math.inf < score_threshold < math.inf:
        raise ValueError(f"score_threshold must be finite, not {score_threshold}")
    return _run(boxes, scores, groups, iou_threshold, "soft", impl, score_threshold)


def soft_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float = 0.5,
    score_threshold: float = 1e-3, impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """soft_nms_padded, cut at the count: kept indices [count] and their lowered scores [count]."""
    keep, lowered, count = soft_nms_padded(
        boxes, scores, groups, iou_threshold, score_threshold, impl
    )
    return _cut(keep, lowered, count)


def cl_nms_padded(
    boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float,
    impl: str = "auto", literal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """CL-NMS of fixed shape: indices [N], highest p first, then -1; p + d [N], then 0; count [].

    p + d selects a box within its cluster. It is not the box's score, and may reach 2.
    Shapes: boxes [N, 4], scores [N] of probabilities, groups [N] or None.
    """
    return _run(boxes, scores, groups, iou_threshold, "cl_literal" if literal else "cl", impl)


def cl_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float,
    impl: str = "auto", literal: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """cl_nms_padded, cut at the count: kept indices [count] and their own p [count]."""
    keep, select, count = cl_nms_padded(boxes, scores, groups, iou_threshold, impl, literal)
    keep, _ = _cut(keep, select, count)
    return keep, scores.detach()[keep]
