"""Non-maximum suppression: greedy, soft, and classification-localisation balanced (CL-NMS).

Contract, the same for every function here:

- `boxes` [N, 4] are xyxy, `scores` [N] floating, `groups` [N] integers (image x class, any values)
  or None, one group. Boxes of different groups never meet, exactly: no coordinate is shifted.
- A score that is not finite marks a row that is not there: it is never kept and suppresses nothing.
  So a fixed buffer is padded with scores of -inf. A box that is not finite overlaps nothing.
- All is computed in the boxes' dtype, half precision in float32. IoU = inter / (area + area -
  inter), each operation rounded on its own, as torchvision does on a CPU (on a GPU torchvision,
  which `nms` of one group uses there, may fuse two). A box is suppressed where IoU > iou_threshold;
  equal to it, or 0 / 0 of two boxes without area, suppresses nothing.
- The higher score goes first, of equals the lower index; results are in this order of their final
  scores. No gradient flows through any.
- ValueError for other shapes or dtypes, mixed devices, or an `impl` ("auto", "triton", "torch", for
  greedy NMS "torchvision") that cannot run here.

`nms_padded` has fixed shapes and, with Triton, never waits for a GPU: kept indices, then -1, and a
count. The other functions cut at the count, and that alone waits.

`soft_nms` lowers scores instead of removing boxes (Bodla et al., 2017). `cl_nms` is section 2.3 of
"Dynamic Coefficient loss, IAC score, CL-NMS". The scan lost its equations; rebuilt from the prose:
the best remaining p names a cluster, all remaining boxes of its group whose IoU with it exceeds
the threshold, itself included; `centre` is the p-weighted mean of the cluster's centres;
d = 1 - |c - centre| / (diagonal of the box that encloses the cluster), 1 where that diagonal is 0;
the box with the highest p + d is kept with its own p and the rest of the cluster is suppressed.
Taken literally, the text adds the distance itself, which prefers the farthest box: `literal=True`.
"""

import math
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, library

try:
    import torchvision  # noqa: F401  (it registers torch.ops.torchvision.nms)
except ImportError:
    torchvision = None

# --- references: plain torch, any device, float32 or float64, all groups in lock-step -------------


def pairwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of boxes [..., 4] and others [..., 4], broadcast; NaN where both have no area."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    u1, v1, u2, v2 = others.unbind(-1)
    width = (torch.minimum(x2, u2) - torch.maximum(x1, u1)).clamp(min=0)
    height = (torch.minimum(y2, v2) - torch.maximum(y1, v1)).clamp(min=0)
    inter = width * height
    return inter / ((x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - inter)


def _lockstep(boxes, scores, groups, step):
    """Repeats `step` on the best remaining box of all groups at once.

    `step(boxes [G, M, 4], live [G, M], best [G, 1], IoU with best [G, M])` returns whom it keeps
    [G, 1], the score to report [G, 1] and the remaining scores [G, M]; the best is taken out here.
    Returns the reported scores [N], -inf for boxes that are not kept.
    """
    out = torch.full_like(scores, -torch.inf)
    if groups is None:
        groups = torch.zeros_like(scores, dtype=torch.int64)
    groups, order = torch.sort(groups, stable=True)
    sizes = groups.unique_consecutive(return_counts=True)[1]
    starts = sizes.cumsum(0) - sizes
    # Groups of like size together: padding to the longest then at most doubles the work.
    bucket = torch.frexp(sizes.double())[1]
    for b in bucket.unique().tolist():
        rows = (bucket == b).nonzero()  # [G, 1]
        column = torch.arange(int(sizes[rows].max()), device=scores.device)
        inside = column < sizes[rows]  # [G, M]
        index = order[(starts[rows] + column).where(inside, 0)]  # [G, M]
        part, live = boxes[index], scores[index]
        live = live.where(inside & live.isfinite(), -torch.inf)
        while True:
            top, best = live.max(1, keepdim=True)  # the first of equals: the lowest index
            active = top[:, 0] > -torch.inf
            if not active.all():
                part, live, best, index = part[active], live[active], best[active], index[active]
            if not len(live):
                break
            iou = pairwise_iou(part.gather(1, best[..., None].expand(-1, -1, 4)), part)
            keep, score, live = step(part, live, best, iou)
            live.scatter_(1, best, -torch.inf)
            out[index.gather(1, keep)] = score
    return out


def nms_reference(boxes, scores, groups, iou_threshold, method, sigma, score_threshold):
    """Greedy or soft-NMS: the (lowered) score of the kept boxes [N], -inf for the others."""

    def step(_, live, best, iou):
        if method == "greedy":
            return best, live.gather(1, best), live.masked_fill(iou > iou_threshold, -torch.inf)
        if method == "linear":
            decay = torch.where(iou > iou_threshold, 1 - iou, 1)
        else:
            decay = torch.where(iou > 0, torch.exp(-(iou * iou) / sigma), 1)
        lowered = live * decay
        return best, live.gather(1, best), lowered.where(lowered >= score_threshold, -torch.inf)

    if method != "greedy":
        scores = scores.where(scores >= score_threshold, -torch.inf)
    return _lockstep(boxes, scores, groups, step)


def cl_nms_reference(boxes, scores, groups, iou_threshold, method, *_):
    """CL-NMS: the selection score p + d of the kept boxes [N], -inf for the others."""

    def step(boxes, live, best, iou):
        member = (iou > iou_threshold) & (live > -torch.inf)
        member.scatter_(1, best, True)  # [G, M]
        # In float64, rounded at the end: boxes placed symmetrically tie whatever the order of sums.
        p, (x1, y1, x2, y2) = live.double(), boxes.double().unbind(-1)
        # choice: where every p of a cluster is 0, the centre is the plain mean.
        weight = torch.where(p.gather(1, best) > 0, p, 1).where(member, 0)  # [G, M]
        total = weight.sum(1, keepdim=True)
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
        off_x = x - (weight * x).where(member, 0).sum(1, keepdim=True) / total
        off_y = y - (weight * y).where(member, 0).sum(1, keepdim=True) / total
        width = x2.where(member, -torch.inf).amax(1) - x1.where(member, torch.inf).amin(1)
        height = y2.where(member, -torch.inf).amax(1) - y1.where(member, torch.inf).amin(1)
        diagonal = (width * width + height * height).sqrt()[:, None]  # [G, 1]
        distance = (off_x * off_x + off_y * off_y).sqrt() / diagonal
        # No diagonal: points in one place. No finite one: a box without finite corners, alone.
        distance = distance.where((diagonal > 0) & (diagonal < torch.inf), 0)
        select = (p + (distance if method == "cl_literal" else 1 - distance)).to(live.dtype)
        score, keep = select.where(member, -torch.inf).max(1, keepdim=True)
        return keep, score, live.masked_fill(member, -torch.inf)

    return _lockstep(boxes, scores, groups, step)


# --- Triton ---------------------------------------------------------------------------------------

try:
    import triton
    import triton.language as tl
except ImportError:  # the kernels then stay plain functions that nobody calls
    triton, tl = None, SimpleNamespace(constexpr=None)

# BLOCK: boxes a program looks at in one go; greedy NMS holds BLOCK x BLOCK pairs in registers.
# The compiler fuses nothing: an IoU must round as it does on a CPU.
_GREEDY_LAUNCH = {"BLOCK": 64, "num_warps": 8, "enable_fp_fusion": False}
_SOFT_LAUNCH = {"BLOCK": 256, "num_warps": 4, "enable_fp_fusion": False}


def jit(*sizes: str):
    """triton.jit; it must not specialise on `sizes`, arguments that change with every batch."""
    return triton.jit(do_not_specialize=sizes) if triton else lambda function: function


@jit()
def _load_boxes(boxes, at, mask):
    """Rows `at` of boxes [N, 4] as a tuple; a masked row is a point at the origin."""
    row = boxes + at.to(tl.int64) * 4
    x1, y1 = tl.load(row, mask, 0.0), tl.load(row + 1, mask, 0.0)
    return x1, y1, tl.load(row + 2, mask, 0.0), tl.load(row + 3, mask, 0.0)


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
    return tl.div_rn(inter, union)  # `/` is two ulp off in float32


@jit()
def _over(box, other, threshold, half_ulp, ODD: tl.constexpr):
    """IoU > threshold t for every pair, rows `box`, columns `other`: `_iou`'s answer, no division.

    inter / union rounds to more than t where it exceeds t + half_ulp, the middle between t and the
    next float, and on that middle if t is odd. So is inter - t union > half_ulp union: wherever the
    two sides are near each other, the fma is exact, and so is the product with a power of two.
    """
    rows = box[0][:, None], box[1][:, None], box[2][:, None], box[3][:, None]
    columns = other[0][None, :], other[1][None, :], other[2][None, :], other[3][None, :]
    inter, union = _inter_and_union(rows, columns)
    rest, bound = tl.fma(-threshold, union, inter), half_ulp * union
    return ((rest >= bound) if ODD else (rest > bound)) & (inter > 0) & (union >= 0)


@jit()
def _top(scores, at, N):
    """Highest of the scores and the lowest row that has it; N where all are -inf."""
    best_score = tl.max(scores, 0)
    found = (scores == best_score) & (scores > -float("inf"))
    return best_score, tl.min(tl.where(found, at, N), 0)


@jit()
def _cluster(boxes, live, at, end, best, reference, iou_threshold):
    """Rows `at`: their boxes, their scores p, and which belong to the cluster of row `best`."""
    p = tl.load(live + at, at < end, -float("inf"))
    box = _load_boxes(boxes, at, at < end)
    over = _iou(box, reference) > iou_threshold
    return box, p, (over | (at == best)) & (p > -float("inf"))


# All three kernels: grid (N,), as many programs as there can be groups. Program i owns group i; its
# rows lie together, from starts[i] to starts[i + 1]; behind the last group starts [N + 1] is N, and
# there is nothing to do. order [N] is the original index of each row; out [N], by original index,
# comes filled with -inf and receives the scores to report. Loops are `while` because the
# interpreter of some Triton releases cannot count to a loaded number.


@jit("N")
def _nms_kernel(
    boxes, live, order, starts, out, N, iou_threshold, kept_boxes, half_ulp,
    ODD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Greedy. boxes [N, 4] and live [N], the scores, by group, then descending score; -inf where a
    row is not there. kept_boxes [N, 4] is scratch: what a group has kept, from its first row on."""
    lane = tl.arange(0, BLOCK)
    start = tl.load(starts + tl.program_id(0))
    end = tl.load(starts + tl.program_id(0) + 1)
    num_kept = start * 0
    tile = start
    while tile < end:
        at = tile + lane
        score = tl.load(live + at, at < end, -float("inf"))
        # Rows that are not there come last in a group: the first tile of them ends it.
        end = tl.where(tl.max(score, 0) > -float("inf"), end, tile)
        box = _load_boxes(boxes, at, at < end)
        hits = tl.zeros([BLOCK, BLOCK], tl.int1)  # row: mine, column: an earlier box
        first = start * 0
        while first < num_kept:
            # Behind the last one kept are points at the origin, which overlap nothing.
            earlier = _load_boxes(kept_boxes, start + first + lane, first + lane < num_kept)
            hits = hits | _over(box, earlier, iou_threshold, half_ulp, ODD)
            first += BLOCK
        hit = tl.max(hits.to(tl.int32), 1)  # once: across warps it costs a barrier
        alive = ((score > -float("inf")) & (hit == 0)).to(tl.int32)
        # In the tile: kept = alive and not hit by an earlier kept box. Iterated from kept = alive,
        # box k is final after k + 1 rounds: the fixed point is the greedy result, a few rounds do.
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
        tl.debug_barrier()  # the next tile's threads read what these have stored
        tile += BLOCK


@jit("N")
def _soft_nms_kernel(
    boxes, live, order, starts, out, N, iou_threshold, sigma, score_threshold,
    GAUSSIAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """boxes [N, 4] by group, then by original index; live [N], their present scores: -inf for rows
    not there, picked or under the threshold."""
    lane = tl.arange(0, BLOCK)
    start = tl.load(starts + tl.program_id(0))
    end = tl.load(starts + tl.program_id(0) + 1)
    picked = N  # nobody yet: loads as a point at the origin, which overlaps nothing
    more = 1
    while more > 0:
        # One pass lowers the scores by the last pick and finds the next pick.
        last = _load_boxes(boxes, picked, picked < N)
        top = tl.full([BLOCK], -float("inf"), tl.float32)
        top_at = tl.zeros([BLOCK], tl.int32)
        tile = start
        while tile < end:
            at = tile + lane
            score = tl.load(live + at, at < end, -float("inf"))
            iou = _iou(_load_boxes(boxes, at, at < end), last)
            if GAUSSIAN:
                score = tl.where(iou > 0, score * tl.exp(-(iou * iou) / sigma), score)
            else:
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
    """boxes [N, 4] by group, then by original index; live [N], their p: -inf for rows not there or
    suppressed."""
    lane = tl.arange(0, BLOCK)
    start = tl.load(starts + tl.program_id(0))
    end = tl.load(starts + tl.program_id(0) + 1)
    best, best_p, more = N, 0.0, 1  # nobody yet: an empty cluster, which keeps nobody
    while more > 0:
        # First pass: weighted centre and enclosing box of the cluster of `best`.
        cluster = best, _load_boxes(boxes, best, best < N), iou_threshold
        zero, inf = tl.zeros([BLOCK], tl.float64), tl.full([BLOCK], float("inf"), tl.float32)
        total, sum_x, sum_y = zero, zero, zero
        low_x, low_y, high_x, high_y = inf, inf, -inf, -inf
        tile = start
        while tile < end:
            at = tile + lane
            box, p, member = _cluster(boxes, live, at, end, *cluster)
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
        centre_x, centre_y = tl.sum(sum_x, 0) / total, tl.sum(sum_y, 0) / total
        width = tl.max(high_x, 0).to(tl.float64) - tl.min(low_x, 0)
        height = tl.max(high_y, 0).to(tl.float64) - tl.min(low_y, 0)
        diagonal = tl.sqrt(width * width + height * height)
        # Second pass: whom to keep; the cluster leaves; the next reference.
        nobody = tl.zeros([BLOCK], tl.int32)
        top, top_at, choice, choice_at = -inf, nobody, -inf, nobody
        tile = start
        while tile < end:
            at = tile + lane
            box, p, member = _cluster(boxes, live, at, end, *cluster)
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


def _triton_select(boxes, scores, groups, iou_threshold, method, sigma, score_threshold):
    """Sorts by group, then runs the kernel: scores to report [N]. Never waits for the device."""
    N, device = scores.shape[0], boxes.device
    if N >= 2**29:
        raise ValueError(f"{N} boxes are too many: 32 bits count rows")
    # masked_fill, not where: a scalar given to `where` may be copied to the device, which waits.
    live = scores.masked_fill(~scores.isfinite(), -torch.inf)
    if method in SOFT:
        live = live.masked_fill(live < score_threshold, -torch.inf)
    order = torch.arange(N, device=device)
    if method == "greedy":
        order = torch.argsort(live, descending=True, stable=True)
    rank = torch.zeros_like(order)  # number of each row's group, from 0 up
    if groups is not None:
        order = order[torch.argsort(groups[order], stable=True)]
        groups = groups[order]
        rank[1:] = (groups[1:] != groups[:-1]).cumsum(0)
    starts = torch.searchsorted(rank, torch.arange(N + 1, device=device), out_int32=True)
    boxes, live, out = boxes[order], live[order], torch.full_like(scores, -torch.inf)
    if method == "greedy":
        t = np.float32(iou_threshold)
        more = (torch.empty_like(boxes), float(np.spacing(t)) / 2, bool(t.view(np.int32) & 1))
        kernel, launch = _nms_kernel, _GREEDY_LAUNCH
    elif method in SOFT:
        more = (sigma, score_threshold, method == "gaussian")
        kernel, launch = _soft_nms_kernel, _SOFT_LAUNCH
    else:
        kernel, more, launch = _cl_nms_kernel, (method == "cl_literal",), _SOFT_LAUNCH
    with torch.cuda.device_of(boxes):
        kernel[(N,)](boxes, live, order, starts, out, N, iou_threshold, *more, **launch)
    return out


# Where TRITON_INTERPRET was on when triton was imported, kernels run on CPU tensors.
INTERPRETED = triton is not None and not isinstance(_nms_kernel, triton.JITFunction)

# --- torchvision ----------------------------------------------------------------------------------


def _torchvision_nms(boxes, scores, groups, iou_threshold):
    """Kept indices, best first: torchvision's compiled op, one call a group, some 25 us on a CPU.

    torchvision's batched_nms shifts the groups of small inputs apart in float32: faster, not exact.
    """
    boxes, scores, iou_threshold = _exact(boxes, scores, iou_threshold)
    if not math.isfinite(scores.dot(scores)):  # one short call; finite scores may overflow it
        there = scores.isfinite().nonzero()[:, 0]
        if there.shape[0] < scores.shape[0]:
            groups = None if groups is None else groups[there]
            return there[_torchvision_nms(boxes[there], scores[there], groups, iou_threshold)]
    if groups is None or scores.shape[0] == 0:
        return torch.ops.torchvision.nms(boxes, scores, iou_threshold)
    groups, order = torch.sort(groups, stable=True)
    sizes = groups.unique_consecutive(return_counts=True)[1].tolist()
    start, kept = 0, []
    for size, *part in zip(sizes, boxes[order].split(sizes), scores[order].split(sizes)):
        kept.append(torch.ops.torchvision.nms(*part, iou_threshold) + start)
        start += size
    keep = order[torch.cat(kept)].sort()[0]
    return keep[torch.argsort(scores[keep], descending=True, stable=True)]


# --- operators ------------------------------------------------------------------------------------

SOFT = ("linear", "gaussian")


def _exact(boxes, scores, threshold: float):
    """Both in the dtype to compute in, and the threshold as its largest number not above it.

    An IoU exceeds the one exactly where it exceeds the other, so it no longer matters whether a
    backend compares in float32 or in float64.
    """
    double = boxes.dtype == torch.float64
    number, dtype = (np.float64, torch.float64) if double else (np.float32, torch.float32)
    rounded = number(threshold)
    if float(rounded) > threshold:
        rounded = np.nextafter(rounded, number(-np.inf))
    return boxes.detach().to(dtype), scores.detach().to(dtype), float(rounded)


def _backend(boxes, scores, groups, iou_threshold, method, impl, padded):
    """Checks the arguments and names the implementation to run."""
    given = {"boxes": boxes, "scores": scores} | ({} if groups is None else {"groups": groups})
    N = scores.shape[0] if scores.dim() else 0
    right = boxes.is_floating_point() and scores.is_floating_point()
    right &= groups is None or not groups.is_floating_point()
    right &= len({t.device for t in given.values()}) == 1
    if not right or any(t.shape != ((N, 4) if t is boxes else (N,)) for t in given.values()):
        found = ", ".join(f"{k} {[*t.shape]} {t.dtype} {t.device}" for k, t in given.items())
        wanted = "boxes [N, 4] and scores [N] must be floating, groups [N] integers, on one device"
        raise ValueError(f"{wanted}, not {found}")
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be in [0, 1], not {iou_threshold}")
    theirs = torchvision is not None and method == "greedy"
    ours = triton is not None and boxes.dtype != torch.float64 and (boxes.is_cuda or INTERPRETED)
    if impl == "auto":
        # choice: one group keeps a single Triton program busy, where torchvision spreads it over
        # the GPU; but torchvision waits for the GPU, which a padded function must not.
        theirs = theirs and not (padded and boxes.is_cuda)
        if boxes.is_cuda and ours and not (theirs and groups is None):
            return "triton"
        return "torchvision" if theirs else "torch"
    if not {"torch": True, "triton": ours, "torchvision": theirs}.get(impl):
        known = "auto, torch, torchvision (greedy NMS) or triton (no float64; CUDA, or "
        known += "TRITON_INTERPRET=1 from the start), or is not installed"
        raise ValueError(f"impl={impl!r} is not {known}; boxes are on {boxes.device}")
    return impl


def _padded(
    boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float, method: str,
    sigma: float, score_threshold: float, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Kept indices [N], then -1; their reported scores [N], then 0; and the count []."""
    boxes, scores, threshold = _exact(boxes, scores, iou_threshold)
    options = (threshold, method, sigma, score_threshold)
    if scores.shape[0] == 0:
        reported = scores.clone()
    elif impl == "triton":
        reported = _triton_select(boxes, scores, groups, *options)
    elif impl == "torchvision":
        keep = _torchvision_nms(boxes, scores, groups, iou_threshold)
        reported = torch.full_like(scores, -torch.inf).scatter_(0, keep, scores[keep])
    else:
        reference = cl_nms_reference if method in ("cl", "cl_literal") else nms_reference
        reported = reference(boxes, scores, groups, *options)
    kept = reported > -torch.inf
    # choice: CL-NMS orders by p, its final score; p + d only selects within a cluster.
    key = (reported if method in SOFT else scores).masked_fill(~kept, -torch.inf)
    keep = torch.argsort(key, descending=True, stable=True)
    count = kept.sum()
    unused = torch.arange(keep.shape[0], device=keep.device) >= count
    return keep.masked_fill(unused, -1), reported[keep].masked_fill(unused, 0), count


# A compiled graph keeps operators whole. They bear this module's name, so that copies do not clash.
_NAMESPACE = __name__.replace(".", "_")
_padded_op = library.custom_op(f"{_NAMESPACE}::padded", _padded, mutates_args=())


@_padded_op.register_fake
def _(boxes, scores, *_):
    keep = torch.empty_like(scores, dtype=torch.int64)
    return keep, torch.empty_like(_exact(boxes, scores, 0.0)[1]), keep.new_empty(())


@library.custom_op(f"{_NAMESPACE}::cut", mutates_args=())
def _cut(keep: Tensor, reported: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The first `count` of both. Reading the count is what waits for a GPU."""
    return keep[: int(count)].clone(), reported[: int(count)].clone()


@_cut.register_fake
def _(keep, reported, count):
    # With no boxes the size is known: a graph that indexes an empty tensor must see that.
    empty = isinstance(keep.shape[0], int) and keep.shape[0] == 0
    size = 0 if empty else library.get_ctx().new_dynamic_size()
    return keep.new_empty([size]), reported.new_empty([size])


def _run(boxes, scores, groups, iou_threshold, method, impl, sigma=1.0, floor=0.0, padded=False):
    """Checks, then `_padded`: kept indices, reported scores and count, all of fixed shape."""
    impl = _backend(boxes, scores, groups, iou_threshold, method, impl, padded)
    groups = None if groups is None else groups.long()
    more = (float(iou_threshold), method, float(sigma), float(floor), impl)
    return _padded_op(boxes.detach(), scores.detach(), groups, *more)


# --- public functions -----------------------------------------------------------------------------


def nms(boxes, scores, iou_threshold: float, impl="auto") -> Tensor:
    """Greedy NMS of one group: boxes [N, 4], scores [N] -> kept indices [count], best first."""
    return batched_nms(boxes, scores, None, iou_threshold, impl)


def batched_nms(boxes, scores, groups, iou_threshold: float, impl="auto") -> Tensor:
    """Greedy NMS within each group: kept indices int64 over all groups, best first.

    Shapes: boxes [N, 4], scores [N], groups [N] or None -> [count].
    """
    impl = _backend(boxes, scores, groups, iou_threshold, "greedy", impl, False)
    if impl == "torchvision" and not torch.compiler.is_compiling():
        return _torchvision_nms(boxes, scores, groups, iou_threshold)
    return _cut(*_run(boxes, scores, groups, iou_threshold, "greedy", impl))[0]


def nms_padded(boxes, scores, groups, iou_threshold: float, impl="auto") -> tuple[Tensor, Tensor]:
    """batched_nms of fixed shape: kept indices [N], best first, then -1; and their count [].

    Rows to leave out have the score -inf. With Triton it never waits for a GPU.
    """
    keep, _, count = _run(boxes, scores, groups, iou_threshold, "greedy", impl, padded=True)
    return keep, count


def soft_nms_padded(
    boxes, scores, groups, iou_threshold: float = 0.5, sigma: float = 0.5, method: str = "linear",
    score_threshold: float = 1e-3, impl="auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Soft-NMS of fixed shape: indices [N], then -1; lowered scores [N], then 0; their count [].

    Within each group the best remaining box is kept with its present score; every other s becomes
    s * (1 - IoU) where IoU > iou_threshold ("linear") or s * exp(-IoU^2 / sigma) ("gaussian").
    A box is dropped once its score is below score_threshold.
    Shapes: boxes [N, 4], scores [N], groups [N] or None.
    """
    if method not in SOFT:
        raise ValueError(f"method must be linear or gaussian, not {method!r}")
    if not (sigma > 0 and -math.inf < score_threshold < math.inf):
        raise ValueError(f"{sigma=} must be positive, {score_threshold=} finite")
    return _run(boxes, scores, groups, iou_threshold, method, impl, sigma, score_threshold)


def soft_nms(boxes, scores, groups, *options, **named) -> tuple[Tensor, Tensor]:
    """soft_nms_padded, with its options, cut at the count: indices and lowered scores [count]."""
    return _cut(*soft_nms_padded(boxes, scores, groups, *options, **named))


def cl_nms_padded(
    boxes, scores, groups, iou_threshold: float, impl="auto", literal: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """CL-NMS of fixed shape: indices [N], highest p first, then -1; p + d [N], then 0; count [].

    p + d selected a box in its cluster; it is no score of the box and reaches 2.
    Shapes: boxes [N, 4], scores [N] of probabilities, groups [N] or None.
    """
    return _run(boxes, scores, groups, iou_threshold, "cl_literal" if literal else "cl", impl)


def cl_nms(boxes, scores, groups, *options, **named) -> tuple[Tensor, Tensor]:
    """cl_nms_padded, with its options, cut at the count: indices and own p [count]."""
    keep, _ = _cut(*cl_nms_padded(boxes, scores, groups, *options, **named))
    return keep, scores.detach()[keep]
