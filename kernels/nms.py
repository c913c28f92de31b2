"""Greedy non-maximum suppression, within groups and of fixed shape.

Contract of every function here

- `boxes` [N, 4] are xyxy and `scores` [N] floating. `groups` [N] are integers of any
  values, one for each image and class, or None for a single group. Boxes of different
  groups never interact. No coordinate is shifted to keep groups apart: grouping is exact.
- A row whose score is not finite is absent: it is never kept and suppresses nothing. Pad
  a fixed-size buffer with scores of -inf. A box with a non-finite corner overlaps none.
- Arithmetic is in the boxes' dtype, for half precision in float32. IoU = inter / (area +
  area - inter), and each operation is rounded separately, as torchvision does on a CPU.
  (On a GPU, torchvision's kernel may fuse two operations. It runs for a single group, and
  where Triton cannot.)
- A box is suppressed if IoU > iou_threshold. An equal IoU does not suppress, nor does the
  0 / 0 of two boxes without area.
- The higher score goes first; of equal scores, the lower index. Results are int64 indices
  in this order. No function propagates gradients. N = 0 gives empty results.
- ValueError is raised for other shapes or dtypes, mixed devices, or an `impl` that cannot
  run on these tensors. `impl` is "auto", "triton", "torchvision" or "torch".

`nms_padded` returns a fixed shape: kept indices, then -1, and their count. With Triton it
never waits for a GPU. `nms` and `batched_nms` cut this at the count, which waits once.
"""

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, library

try:
    import torchvision  # noqa: F401  (the import registers torch.ops.torchvision.nms)
except ImportError:
    torchvision = None

# ------------------------------------------------------------------------------ reference


def pairwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of boxes [..., 4] and others [..., 4], broadcast. NaN if neither has an area."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    u1, v1, u2, v2 = others.unbind(-1)
    width = (torch.minimum(x2, u2) - torch.maximum(x1, u1)).clamp(min=0)
    height = (torch.minimum(y2, v2) - torch.maximum(y1, v1)).clamp(min=0)
    inter = width * height
    return inter / ((x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - inter)


def nms_reference(boxes, scores, groups, iou_threshold):
    """Plain torch, any device, float32 or float64: whether each box is kept, [N] bool."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    live = scores.isfinite()
    for i in torch.argsort(scores, descending=True, stable=True).tolist():
        if live[i]:
            kept[i] = True
            over = pairwise_iou(boxes[i], boxes) > iou_threshold
            live &= ~over if groups is None else ~over | (groups != groups[i])
    return kept


# ------------------------------------------------------------------------------ Triton

try:
    import triton
    import triton.language as tl
except ImportError:  # the kernels then stay plain functions that nobody calls
    triton, tl = None, SimpleNamespace(constexpr=None)

# BLOCK: the boxes that a program looks at in one pass. It holds BLOCK x BLOCK pairs in
# registers. The compiler must fuse nothing on its own: an IoU has to round as on a CPU.
# On sm_75 and sm_80 one register spills (4 bytes). It is left, because ptxas stops at 128
# registers there so that two programs share a multiprocessor; without the spill it takes 159.
_LAUNCH = {"BLOCK": 64, "num_warps": 8, "enable_fp_fusion": False}


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
def _over(box, other, threshold, half_ulp, ODD: tl.constexpr):
    """Whether IoU > threshold, for every pair of a row `box` and a column `other`.

    A division would take longer. With t the threshold, t + half_ulp is the midpoint between
    t and the next float. inter / union rounds to more than t if it exceeds the midpoint, or
    if it equals the midpoint and t is odd (ties round to even). Multiplied by union, this
    reads inter - t union > half_ulp union. The comparison is exact, because inter - t union
    is a float wherever the two sides are close, and half_ulp is a power of two.

    tl.fma must round once, as the hardware's does. The interpreters of Triton 3.6 to 3.8
    also round the product, so the tests give them an fma of their own.
    """
    x1, y1, x2, y2 = box[0][:, None], box[1][:, None], box[2][:, None], box[3][:, None]
    u1, v1, u2, v2 = other[0][None], other[1][None], other[2][None], other[3][None]
    width = tl.maximum(tl.minimum(x2, u2) - tl.maximum(x1, u1), 0.0)
    height = tl.maximum(tl.minimum(y2, v2) - tl.maximum(y1, v1), 0.0)
    inter = width * height
    union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - inter
    rest = tl.fma(-threshold, union, inter)
    bound = half_ulp * union
    over = (rest >= bound) if ODD else (rest > bound)
    return over & (inter > 0) & (union >= 0)


@jit("N")
def _nms_kernel(
    boxes, live, order, starts, out, N, iou_threshold, kept_boxes, half_ulp,
    ODD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """boxes [N, 4] and live [N], their scores, are sorted by group, then by descending score.

    live is -inf for absent rows. order [N] is the original index of each row. out [N], by
    original index, comes filled with -inf and receives the kept boxes' scores. kept_boxes
    [N, 4] is scratch memory: the boxes a group has kept, from the group's first row on.

    Grid (N,): a program for each group that there could be. Program i owns rows starts[i] to
    starts[i + 1], none if there are fewer groups. Loops are `while`, because the interpreter
    of some Triton releases cannot count to a loaded number.
    """
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
        hits = tl.zeros([BLOCK, BLOCK], tl.int1)  # rows: this tile's boxes; columns: kept
        first = start * 0
        while first < num_kept:
            # Lanes behind the last kept box load points at the origin, which overlap none.
            there = first + lane < num_kept
            earlier = _load_boxes(kept_boxes, start + first + lane, there)
            hits = hits | _over(box, earlier, iou_threshold, half_ulp, ODD)
            first += BLOCK
        hit = tl.max(hits.to(tl.int32), 1)  # after the loop, because it costs a barrier
        alive = ((score > -float("inf")) & (hit == 0)).to(tl.int32)
        # Within the tile, kept = alive and not hit by an earlier kept box. Start from kept =
        # alive and iterate. Box k is final after k + 1 rounds, so the fixed point is the
        # greedy result. In practice a few rounds suffice.
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


def _triton_kept(boxes, live, groups, iou_threshold, by_score):
    """Sort by group and run the kernel: whether each box is kept, [N] bool. Never waits.

    live [N] are the scores, -inf for absent rows. by_score [N] are the rows, best first.
    """
    N, order = live.shape[0], by_score
    if N >= 2**29:
        raise ValueError(f"{N} boxes are too many: rows are counted in 32 bits")
    rank = torch.zeros_like(order)  # number of each row's group, from 0 up
    if groups is not None:
        order = order[torch.argsort(groups[order], stable=True)]
        groups = groups[order]
        rank[1:] = (groups[1:] != groups[:-1]).cumsum(0)
    every = torch.arange(N + 1, device=rank.device)
    starts = torch.searchsorted(rank, every, out_int32=True)
    out = torch.full_like(live, -torch.inf)
    t = np.float32(iou_threshold)
    with torch.cuda.device_of(boxes):
        _nms_kernel[(N,)](
            boxes[order], live[order], order, starts, out, N, iou_threshold,
            kept_boxes=torch.empty_like(boxes), half_ulp=float(np.spacing(t)) / 2,
            ODD=bool(t.view(np.int32) & 1), **_LAUNCH,
        )  # fmt: skip
    return out > -torch.inf


# If TRITON_INTERPRET was on when triton was imported, kernels run on CPU tensors.
INTERPRETED = triton is not None and not isinstance(_nms_kernel, triton.JITFunction)

# ------------------------------------------------------------------------------ operators


def _torchvision_nms(boxes, scores, groups, iou_threshold):
    """Kept indices, best first, by torchvision's compiled op, called once for each group.

    torchvision's own batched_nms shifts the groups of small inputs apart in float32, which
    is faster but not exact.
    """
    rows = scores.isfinite().nonzero()[:, 0]
    if groups is None:
        return rows[torch.ops.torchvision.nms(boxes[rows], scores[rows], iou_threshold)]
    groups, order = torch.sort(groups[rows], stable=True)
    sizes = groups.unique_consecutive(return_counts=True)[1].tolist()
    keep = [rows[:0]]
    for part in rows[order].split(sizes):
        kept = torch.ops.torchvision.nms(boxes[part], scores[part], iou_threshold)
        keep.append(part[kept])
    keep = torch.cat(keep).sort()[0]  # of equal scores, the lower index comes first
    return keep[torch.argsort(scores[keep], descending=True, stable=True)]


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
    vision = torchvision is not None
    if impl == "auto":
        if boxes.is_cuda and usable:
            return "triton"
        return "torchvision" if vision else "torch"
    if not {"torch": True, "triton": usable, "torchvision": vision}.get(impl):
        raise ValueError(
            "impl must be auto, torch, torchvision (if installed) or triton (if installed, "
            "not for float64, on CUDA or with TRITON_INTERPRET=1 from the start), not "
            f"{impl!r} for {boxes.dtype} boxes on {boxes.device}"
        )
    return impl


# A compiled graph keeps custom operators whole. Their namespace is this module's name, so
# that copies of the file do not clash.
_NAMESPACE = __name__.replace(".", "_")


@library.custom_op(f"{_NAMESPACE}::padded", mutates_args=())
def _padded(
    boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float, impl: str
) -> tuple[Tensor, Tensor]:
    """Kept indices [N], best first, then -1; and their count []."""
    boxes, scores, threshold = _prepare(boxes, scores, iou_threshold)
    # masked_fill, not where: `where` may copy a scalar to the device, which waits.
    live = scores.masked_fill(~scores.isfinite(), -torch.inf)
    by_score = torch.argsort(live, descending=True, stable=True)
    if impl == "triton" and scores.shape[0] > 0:
        kept = _triton_kept(boxes, live, groups, threshold, by_score)
    elif impl == "torchvision":
        rows = _torchvision_nms(boxes, scores, groups, threshold)
        kept = torch.zeros_like(live, dtype=torch.bool).index_fill_(0, rows, True)
    else:
        kept = nms_reference(boxes, scores, groups, threshold)
    kept = kept[by_score]
    place = torch.where(kept, kept.cumsum(0) - 1, kept.shape[0])
    keep = by_score.new_full([kept.shape[0] + 1], -1)  # the last entry takes the others
    return keep.scatter_(0, place, by_score)[:-1], kept.sum()


@_padded.register_fake
def _(boxes, scores, *_):
    keep = torch.empty_like(scores, dtype=torch.int64)
    return keep, keep.new_empty(())


@library.custom_op(f"{_NAMESPACE}::cut", mutates_args=())
def _cut(keep: Tensor, count: Tensor) -> Tensor:
    """The first `count` indices. Reading the count waits for a GPU."""
    return keep[: int(count)].clone()


@_cut.register_fake
def _(keep, count):
    # Without boxes the size is known. A graph that indexes an empty tensor must see that.
    empty = isinstance(keep.shape[0], int) and keep.shape[0] == 0
    return keep.new_empty([0 if empty else library.get_ctx().new_dynamic_size()])


# ------------------------------------------------------------------------------ public


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, impl: str = "auto") -> Tensor:
    """Greedy NMS of one group: boxes [N, 4], scores [N] -> kept indices [count]."""
    return batched_nms(boxes, scores, None, iou_threshold, impl)


def batched_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float,
    impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Greedy NMS within each group: kept indices over all groups, best first.

    Shapes: boxes [N, 4], scores [N], groups [N] or None -> [count].
    """
    if impl == "auto" and groups is None and torchvision is not None:
        # choice: one group keeps one Triton program busy; torchvision spreads it over the GPU.
        impl = "torchvision"
    impl = _backend(boxes, scores, groups, iou_threshold, impl)
    if impl == "torchvision" and not torch.compiler.is_compiling():
        boxes, scores, threshold = _prepare(boxes, scores, iou_threshold)
        return _torchvision_nms(boxes, scores, groups, threshold)
    return _cut(*nms_padded(boxes, scores, groups, iou_threshold, impl))


def nms_padded(
    boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """batched_nms of fixed shape: kept indices [N], then -1; and their count [].

    Give rows to leave out the score -inf. With Triton this never waits for a GPU.
    """
    impl = _backend(boxes, scores, groups, iou_threshold, impl)
    groups = None if groups is None else groups.long()
    return _padded(boxes.detach(), scores.detach(), groups, float(iou_threshold), impl)
