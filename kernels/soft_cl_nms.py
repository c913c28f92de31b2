"""Soft-NMS, and NMS that balances classification and localisation (CL-NMS).

Contract of every function here

- `boxes` [N, 4] are xyxy and `scores` [N] floating. `groups` [N] are integers of any
  values, one for each image and class, or None for a single group. Boxes of different
  groups never interact.
- A row whose score is not finite is absent: it is never kept and changes nothing. Pad a
  fixed-size buffer with scores of -inf. A box with a non-finite corner overlaps nothing.
- Arithmetic is in the boxes' dtype, for half precision in float32. IoU = inter / (area +
  area - inter), and each operation is rounded separately.
- Two boxes overlap if IoU > iou_threshold. An equal IoU is no overlap, nor is the 0 / 0 of
  two boxes without area.
- The higher score goes first; of equal scores, the lower index. Results are sorted by
  their final scores in the same way. No function propagates gradients. N = 0 gives empty
  results.
- ValueError is raised for other shapes or dtypes, mixed devices, or an `impl` that cannot
  run on these tensors. `impl` is "auto", "triton" or "torch".

The `*_padded` functions return fixed shapes: kept indices, then -1, and a count. With
Triton they never wait for a GPU. The other functions cut the result at the count, which
waits once.

`soft_nms` lowers scores instead of removing boxes (Bodla et al., 2017). Within each group,
the best remaining box is kept with its present score. Every other score s whose box overlaps
it becomes s * (1 - IoU). A box is dropped once its score is below score_threshold.

`cl_nms` is section 2.3 of "Dynamic Coefficient loss, IAC score, CL-NMS". Our scan of the
paper lost its equations, so they are rebuilt from the prose. Repeat within each group:

1. The remaining box with the highest score p starts a cluster: this box, and all remaining
   boxes that overlap it.
2. c0 is the p-weighted mean of the cluster's box centres c. Every member gets
   d = 1 - |c - c0| / (diagonal of the box around the cluster), or 1 if the diagonal is 0.
3. The member with the highest p + d is kept with its own p. The rest is suppressed.

Read literally, the text adds the distance itself, which prefers the farthest box:
`literal=True`.
"""

import math
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, library

# ------------------------------------------------------------------------------ references

# Plain torch, any device, float32 or float64, all groups in lock-step.


def pairwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of boxes [..., 4] and others [..., 4], broadcast. NaN if neither has an area."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    u1, v1, u2, v2 = others.unbind(-1)
    width = (torch.minimum(x2, u2) - torch.maximum(x1, u1)).clamp(min=0)
    height = (torch.minimum(y2, v2) - torch.maximum(y1, v1)).clamp(min=0)
    inter = width * height
    return inter / ((x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - inter)


def _lockstep(boxes, scores, groups, step):
    """Repeat `step` on the best remaining box of all groups at once, until no box remains.

    `step(boxes [G, M, 4], live [G, M], best [G, 1], IoU with best [G, M])` returns the box
    to keep [G, 1], the score to report for it [G, 1] and the remaining scores [G, M]. The
    loop removes the best box. Returns the reported scores [N], -inf for boxes not kept.
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


def soft_nms_reference(boxes, scores, groups, iou_threshold, score_threshold):
    """Soft-NMS: the lowered scores of the kept boxes [N], -inf for the others."""

    def step(_, live, best, iou):
        lowered = live * torch.where(iou > iou_threshold, 1 - iou, 1)
        lowered = lowered.where(lowered >= score_threshold, -torch.inf)
        return best, live.gather(1, best), lowered

    scores = scores.where(scores >= score_threshold, -torch.inf)
    return _lockstep(boxes, scores, groups, step)


def cl_nms_reference(boxes, scores, groups, iou_threshold, literal):
    """CL-NMS: the selection scores p + d of the kept boxes [N], -inf for the others."""

    def step(boxes, live, best, iou):
        member = (iou > iou_threshold) & (live > -torch.inf)
        member.scatter_(1, best, True)  # [G, M]
        # In float64, rounded at the end: symmetric boxes then tie in any order of the sums.
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
        # The diagonal is 0 if all members are one point, not finite if a lone box is not.
        distance = distance.where((diagonal > 0) & (diagonal < torch.inf), 0)
        select = (p + (distance if literal else 1 - distance)).to(live.dtype)
        score, keep = select.where(member, -torch.inf).max(1, keepdim=True)
        return keep, score, live.masked_fill(member, -torch.inf)

    return _lockstep(boxes, scores, groups, step)


# ------------------------------------------------------------------------------ Triton

try:
    import triton
    import triton.language as tl
except ImportError:  # the kernels then stay plain functions that nobody calls
    triton, tl = None, SimpleNamespace(constexpr=None)

# BLOCK: the boxes that a program looks at in one pass. The compiler must fuse nothing on its
# own: an IoU has to round as on a CPU. On sm_120 CL-NMS spills one register (4 bytes), because
# ptxas stops at 72. It is left: a smaller block needs more passes.
_LAUNCH = {"BLOCK": 256, "num_warps": 4, "enable_fp_fusion": False}


def jit(*sizes: str):
    """triton.jit that does not specialise on `sizes`: arguments that change every batch."""
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
def _iou(box, other):
    x1, y1, x2, y2 = box
    u1, v1, u2, v2 = other
    width = tl.maximum(tl.minimum(x2, u2) - tl.maximum(x1, u1), 0.0)
    height = tl.maximum(tl.minimum(y2, v2) - tl.maximum(y1, v1), 0.0)
    inter = width * height
    union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - inter
    return tl.div_rn(inter, union)  # `/` may be two ulp off in float32


@jit()
def _top(scores, at, N):
    """The highest score and the lowest row that has it, or N if all scores are -inf."""
    best_score = tl.max(scores, 0)
    is_best = (scores == best_score) & (scores > -float("inf"))
    return best_score, tl.min(tl.where(is_best, at, N), 0)


@jit()
def _cluster(boxes, live, at, end, best, reference, iou_threshold):
    """The boxes and scores p of rows `at`, and whether they are in the cluster of row `best`.

    `reference` is the box of row `best`.
    """
    p = tl.load(live + at, at < end, -float("inf"))
    box = _load_boxes(boxes, at, at < end)
    over = _iou(box, reference) > iou_threshold
    return box, p, (over | (at == best)) & (p > -float("inf"))


# Grid of both kernels: (N,), a program for each group that there could be. Program i owns rows
# starts[i] to starts[i + 1], none if there are fewer groups. boxes [N, 4] are sorted by group,
# then by original index, which order [N] holds. out [N], by original index, comes filled with
# -inf and receives the scores to report. Loops are `while`, because the interpreter of some
# Triton releases cannot count to a loaded number.


@jit("N")
def _soft_nms_kernel(
    boxes, live, order, starts, out, N, iou_threshold, score_threshold, BLOCK: tl.constexpr
):
    """live [N]: the present scores, -inf for rows that are absent, picked or dropped."""
    lane = tl.arange(0, BLOCK)
    start = tl.load(starts + tl.program_id(0))
    end = tl.load(starts + tl.program_id(0) + 1)
    picked = N  # no pick yet: row N loads as a point at the origin, which overlaps none
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
    boxes, live, order, starts, out, N, iou_threshold,
    LITERAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """live [N]: the scores p, -inf for rows that are absent or suppressed."""
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
        # Second pass: choose the box to keep, remove the cluster, find the next `best`.
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
    """Sort by group and run the kernel: the scores to report [N]. Never waits for a GPU."""
    N = scores.shape[0]
    if N >= 2**29:
        raise ValueError(f"{N} boxes are too many: rows are counted in 32 bits")
    # masked_fill, not where: `where` may copy a scalar to the device, which waits.
    live = scores.masked_fill(~scores.isfinite(), -torch.inf)
    order = torch.arange(N, device=boxes.device)
    rank = torch.zeros_like(order)  # number of each row's group, from 0 up
    if groups is not None:
        groups, order = torch.sort(groups, stable=True)
        rank[1:] = (groups[1:] != groups[:-1]).cumsum(0)
    every = torch.arange(N + 1, device=rank.device)
    starts = torch.searchsorted(rank, every, out_int32=True)
    out = torch.full_like(scores, -torch.inf)
    kernel, own = _cl_nms_kernel, {"LITERAL": method == "cl_literal"}
    if method == "soft":
        kernel, own = _soft_nms_kernel, {"score_threshold": score_threshold}
    with torch.cuda.device_of(boxes):
        kernel[(N,)](
            boxes[order], live[order], order, starts, out, N, iou_threshold, **own, **_LAUNCH
        )
    return out


# If TRITON_INTERPRET was on when triton was imported, kernels run on CPU tensors.
INTERPRETED = triton is not None and not isinstance(_soft_nms_kernel, triton.JITFunction)

# ------------------------------------------------------------------------------ operators

# `_prepare` and `_backend` stand in nms.py too, so that each file works when copied alone.


def _prepare(boxes, scores, threshold: float):
    """Boxes and scores in the dtype to compute in, and the threshold rounded down to it.

    A number of that dtype exceeds the threshold if and only if it exceeds the rounded one.
    So it does not matter whether a backend compares in float32 or in float64.
    """
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    number = np.float64 if dtype == torch.float64 else np.float32
    rounded = number(threshold)
    if float(rounded) > threshold:
        rounded = np.nextafter(rounded, number(-np.inf))
    return boxes.detach().to(dtype), scores.detach().to(dtype), float(rounded)


def _backend(boxes, scores, groups, iou_threshold, impl) -> str:
    """Check the arguments and name the implementation to run."""
    tensors = [boxes, scores] if groups is None else [boxes, scores, groups]
    N = scores.shape[0] if scores.dim() else 0
    shapes, floating = [(N, 4), (N,), (N,)], [True, True, False]
    if (
        any(t.shape != shape for t, shape in zip(tensors, shapes))
        or any(t.is_floating_point() != f for t, f in zip(tensors, floating))
        or any(t.device != boxes.device for t in tensors)
    ):
        found = ", ".join(f"{[*t.shape]} {t.dtype} {t.device}" for t in tensors)
        raise ValueError(
            "boxes [N, 4] and scores [N] must be floating, groups [N] integers, all on "
            f"one device, not {found}"
        )
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be in [0, 1], not {iou_threshold}")
    usable = triton is not None and boxes.dtype != torch.float64
    usable = usable and (boxes.is_cuda or INTERPRETED)
    if impl == "auto":
        return "triton" if boxes.is_cuda and usable else "torch"
    if impl != "torch" and not (impl == "triton" and usable):
        raise ValueError(
            "impl must be auto, torch or triton (if installed, not for float64, on CUDA or "
            f"with TRITON_INTERPRET=1 from the start), not {impl!r} for {boxes.dtype} boxes "
            f"on {boxes.device}"
        )
    return impl


# A compiled graph keeps custom operators whole. Their namespace is this module's name, so
# that copies of the file do not clash.
_NAMESPACE = __name__.replace(".", "_")


@library.custom_op(f"{_NAMESPACE}::padded", mutates_args=())
def _padded(
    boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float, method: str,
    score_threshold: float, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Kept indices [N], then -1; their reported scores [N], then 0; and the count [].

    method: "soft", "cl" or "cl_literal". Only "soft" reads score_threshold.
    """
    boxes, scores, threshold = _prepare(boxes, scores, iou_threshold)
    if impl == "triton" and scores.shape[0] > 0:
        reported = _triton_select(boxes, scores, groups, threshold, method, score_threshold)
    elif method == "soft":
        reported = soft_nms_reference(boxes, scores, groups, threshold, score_threshold)
    else:
        reported = cl_nms_reference(boxes, scores, groups, threshold, method == "cl_literal")
    kept = reported > -torch.inf
    # choice: CL-NMS orders by p, its final score; p + d only selects within a cluster.
    key = (reported if method == "soft" else scores).masked_fill(~kept, -torch.inf)
    keep = torch.argsort(key, descending=True, stable=True)
    count = kept.sum()
    unused = torch.arange(keep.shape[0], device=keep.device) >= count
    return keep.masked_fill(unused, -1), reported[keep].masked_fill(unused, 0), count


@_padded.register_fake
def _(boxes, scores, *_):
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    keep = torch.empty_like(scores, dtype=torch.int64)
    return keep, torch.empty_like(scores, dtype=dtype), keep.new_empty(())


@library.custom_op(f"{_NAMESPACE}::cut", mutates_args=())
def _cut(keep: Tensor, reported: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The first `count` entries of both. Reading the count waits for a GPU."""
    number = int(count)
    return keep[:number].clone(), reported[:number].clone()


@_cut.register_fake
def _(keep, reported, count):
    # Without boxes the size is known. A graph that indexes an empty tensor must see that.
    empty = isinstance(keep.shape[0], int) and keep.shape[0] == 0
    size = 0 if empty else library.get_ctx().new_dynamic_size()
    return keep.new_empty([size]), reported.new_empty([size])


def _run(boxes, scores, groups, iou_threshold, method, impl, score_threshold=0.0):
    """Check the arguments and run `_padded`."""
    impl = _backend(boxes, scores, groups, iou_threshold, impl)
    groups = None if groups is None else groups.long()
    boxes, scores, threshold = boxes.detach(), scores.detach(), float(iou_threshold)
    return _padded(boxes, scores, groups, threshold, method, float(score_threshold), impl)


# ------------------------------------------------------------------------------ public


def soft_nms_padded(
    boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float = 0.5,
    score_threshold: float = 1e-3, impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Soft-NMS of fixed shape: indices [N], then -1; lowered scores [N], then 0; count [].

    Shapes: boxes [N, 4], scores [N], groups [N] or None.
    """
    if not -math.inf < score_threshold < math.inf:
        raise ValueError(f"score_threshold must be finite, not {score_threshold}")
    return _run(boxes, scores, groups, iou_threshold, "soft", impl, score_threshold)


def soft_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float = 0.5,
    score_threshold: float = 1e-3, impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """soft_nms_padded, cut at the count: kept indices [count] and lowered scores [count]."""
    keep, lowered, count = soft_nms_padded(
        boxes, scores, groups, iou_threshold, score_threshold, impl
    )
    return _cut(keep, lowered, count)


def cl_nms_padded(
    boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float,
    impl: str = "auto", literal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """CL-NMS of fixed shape: indices [N], best p first, then -1; p + d [N], then 0; count [].

    p + d selects a box within its cluster. It is not the box's score, and may reach 2.
    Shapes: boxes [N, 4], scores [N] of probabilities, groups [N] or None.
    """
    method = "cl_literal" if literal else "cl"
    return _run(boxes, scores, groups, iou_threshold, method, impl)


def cl_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float,
    impl: str = "auto", literal: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """cl_nms_padded, cut at the count: kept indices [count] and their own p [count]."""
    keep, select, count = cl_nms_padded(boxes, scores, groups, iou_threshold, impl, literal)
    keep, _ = _cut(keep, select, count)
    return keep, scores.detach()[keep]
