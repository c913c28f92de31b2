"""RoIAlign and deformable RoI pooling over all levels of a feature pyramid at once.

Contract
    features   L maps [B, C, Hi, Wi] of one dtype, finest first. Triton reads channels_last
               maps in place and copies other maps to that layout.
    rois       [R, 5]: image index, x1, y1, x2, y2 in pixels of the network's input image;
               or a list of B tensors [Ri, 4], one for each image.
    strides    L increasing whole numbers, input pixels per cell of each map.
    result     [R, C, S, S] in the maps' dtype; channels_last if the maps are (flatten(1)
               then copies). Sums are float32, or float64 for float64 maps (which Triton
               refuses).
    level      floor(4 + log2(sqrt(w h) / 224) + 1e-6), where level 4 is the map of stride
               16, clamped to the given maps. The customary 1e-6 sends a box of exactly 112,
               224, ... pixels up on every device. A box without area takes the first map.
    grid       half-pixel aligned: the centre of cell (0, 0) is at (stride / 2, stride / 2).
               A bin is the mean of sampling_ratio ** 2 bilinear samples, centred in it.
               Nothing is rounded and no box is enlarged: a box of zero size samples one
               point. roi_align(aligned=False) is the older grid of torchvision's
               MultiScaleRoIAlign: the centre of cell (0, 0) is at (0, 0), half a cell away,
               and sides shorter than one cell count as one.
    border     in cell units, ends included. roi_align: a sample outside [-1, H] x [-1, W]
               counts as zero; others are clamped into the map. deform_roi_pool: a sample
               outside [-0.5, H - 0.5] x [-0.5, W - 0.5] is left out of the mean; others are
               clamped. A bin without samples is zero. (mmcv's deformable pooling uses
               roi_align's rule.)
    offsets    [R, 2, S, S], dx then dy: bin (i, j) moves by
               gamma * offsets[:, :, i, j] * RoI size.
    empty      R = 0 gives [0, C, S, S] and zero gradients. A RoI gives zeros and no gradient
               if its image index is outside 0..B-1 (padding) or its box is not finite.
    gradients  to maps and offsets; boxes are constants. Double backward raises RuntimeError.
               Gradients repeat bit for bit: each cell adds its taps in a fixed order.
"""

from collections.abc import Sequence
from itertools import accumulate
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.autograd.function import once_differentiable

# ------------------------------------------------------------------------------ reference

# The reference is also the fastest path on a CPU. Every bin is a weighted sum of
# 4 * sampling_ratio ** 2 rows of one [cells, C] table, a copy of the maps. embedding_bag
# gathers and sums in one parallel pass, so nothing of size [R * S * S * 16, C] is built.


def pool_reference(
    features, rois, offsets, size, strides, sampling_ratio=2, gamma=0.1, skip=True
) -> Tensor:
    """deform_roi_pool or, with skip=False and no offsets, roi_align; any device and dtype."""
    C = features[0].shape[1]
    dtype = torch.promote_types(features[0].dtype, torch.float32)
    rois = rois.detach().to(dtype)
    index, weight = _taps(features, rois, offsets, size, strides, sampling_ratio, gamma, skip)
    table = torch.cat([f.permute(0, 2, 3, 1).reshape(-1, C) for f in features])  # [cells, C]
    table = table.to(dtype)
    out = F.embedding_bag(index, table.detach(), per_sample_weights=weight, mode="sum")
    out = _TableGradient.apply(out, table, index, weight.detach())  # [R*S*S, C]
    out = out.view(-1, size, size, C).permute(0, 3, 1, 2)  # [R, C, S, S]
    return out.to(features[0].dtype)


class _TableGradient(torch.autograd.Function):
    """Returns `pooled`. In the backward pass, table rows gather from the bins reading them.

    embedding_bag's own gradient of the table is up to three times slower. It still
    differentiates the weights.
    """

    @staticmethod
    def forward(pooled, table, index, weight):
        return pooled.view_as(pooled)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, table, index, weight = inputs
        ctx.save_for_backward(index, weight)
        ctx.rows = table.shape[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        index, weight = ctx.saved_tensors
        order, first = _by_row(index.flatten().int(), ctx.rows)
        bins, weight = order // index.shape[1], weight.flatten()[order]  # of each tap
        table_grad = F.embedding_bag(
            bins, grad.contiguous(), offsets=first, mode="sum", per_sample_weights=weight,
            include_last_offset=True,
        )  # fmt: skip
        return grad, table_grad, None, None


def _by_row(index: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Taps [N], int64, sorted by the row they read; and where each row's begin, [rows + 1]."""
    index, order = torch.sort(index, stable=True)
    every = torch.arange(rows + 1, dtype=index.dtype, device=index.device)
    return order, torch.searchsorted(index, every, out_int32=True)


def _taps(features, rois, offsets, size, strides, sampling_ratio, gamma, skip):
    """The table rows that each bin reads and their weights, both [R*S*S, 4*sampling_ratio**2].

    The samples of a bin form a grid, so rows and columns are computed separately. Axes of the
    intermediate tensors: R, bin row, bin column, sample row, sample column.
    """
    B = features[0].shape[0]
    known = (rois[:, 0] >= 0) & (rois[:, 0] < B) & rois.isfinite().all(1)
    rois = torch.where(known[:, None], rois, 0)
    heights, widths = [f.shape[2] for f in features], [f.shape[3] for f in features]
    starts = accumulate((B * h * w for h, w in zip(heights, widths)), initial=0)
    maps = list(zip(heights, widths, strides, starts))
    maps = torch.tensor(maps, device=rois.device)  # [L, 4]
    height, width, stride, start = maps[roi_level(rois, strides)].unbind(1)
    start = start + rois[:, 0].long() * height * width
    x1, y1, x2, y2 = (rois[:, 1:] / stride[:, None]).unbind(1)
    roi_w, roi_h = x2 - x1, y2 - y1

    def each(v: Tensor) -> Tensor:  # [R] -> [R, 1, 1, 1, 1]
        return v.view(-1, 1, 1, 1, 1)

    # Sample positions as fractions of a side.
    steps = torch.arange(size * sampling_ratio, device=rois.device, dtype=rois.dtype) + 0.5
    steps = steps.view(size, sampling_ratio) / (size * sampling_ratio)
    x = each(x1) - 0.5 + each(roi_w) * steps.view(1, 1, size, 1, sampling_ratio)
    y = each(y1) - 0.5 + each(roi_h) * steps.view(1, size, 1, sampling_ratio, 1)
    if offsets is not None:
        dx, dy = (offsets.to(rois.dtype) * gamma)[..., None, None].unbind(1)  # [R, S, S, 1, 1]
        x, y = x + dx * each(roi_w), y + dy * each(roi_h)
    row, row_weight = _axis_taps(y, each(height), skip)
    column, column_weight = _axis_taps(x, each(width), skip)
    row_start = each(start)[..., None] + row * each(width)[..., None]
    row_weight = row_weight * each(known)[..., None]
    index = row_start[..., None] + column[..., None, :]  # [R, S, S, n, n, 2, 2]
    weight = row_weight[..., None] * column_weight[..., None, :]  # [R, S, S, n, n, 2, 2]
    return index.flatten(3).flatten(0, 2), weight.flatten(3).flatten(0, 2)


def _axis_taps(position: Tensor, cells: Tensor, skip: bool) -> tuple[Tensor, Tensor]:
    """The two cells around each sample along one axis, and their weights: both [..., 2]."""
    margin = 0.5 if skip else 1.0
    inside = (position >= -margin) & (position <= cells - 1 + margin)
    samples = position.shape[-1] * position.shape[-2]  # one of the two is 1
    used = inside.sum((-1, -2), keepdim=True).clamp(min=1) if skip else samples
    share = inside.to(position.dtype) / used  # bool / int would be float32
    position = torch.minimum(torch.where(inside, position, 0).clamp(min=0), cells - 1)
    low = position.detach().floor()
    fraction = position - low
    cell = torch.stack([low, torch.minimum(low + 1, cells - 1)], -1).long()
    return cell, torch.stack([1 - fraction, fraction], -1) * share[..., None]


def roi_level(rois: Tensor, strides: Sequence[int]) -> Tensor:
    """Index of the map that each box is pooled from, [R] int64 (see the contract).

    Counts the level boundaries that the box's area has passed: the contract's formula without
    its logarithm, whose last bit differs between devices.
    """
    rois = rois.to(torch.promote_types(rois.dtype, torch.float32))  # areas overflow float16
    w, h = (rois[:, 3:5] - rois[:, 1:3]).clamp(min=0).unbind(1)
    level = torch.zeros_like(w, dtype=torch.int64)
    for stride in strides[1:]:
        level += w * h >= (14 * stride) ** 2 * (1 - 1.4e-6)  # 224 px at stride 16
    return level


# ------------------------------------------------------------------------------ Triton kernels

# One launch serves all levels: tuples hold one entry for each level, and a program picks its
# own. Heights and widths are floats, because an integer in a tuple recompiles the kernel when
# it is 1 or a multiple of 16, and do_not_specialize does not reach into tuples. Maps and
# pooled features have their channels last in memory: [B, H, W, C] and [R, S*S, C]. A tile is
# BINS bins of one RoI by CH channels. Offsets within one image of a map fit 32 bits (the host
# checks this); offsets across images and RoIs have 64 bits.

try:
    import triton
    import triton.language as tl
except ImportError:  # the kernels then stay plain functions that nobody calls
    triton, tl = None, SimpleNamespace(constexpr=None)


def jit(*sizes: str):
    """triton.jit that does not specialise on `sizes`: arguments that change every batch."""
    return triton.jit(do_not_specialize=sizes) if triton else lambda function: function


@jit()
def _pick(values, level):
    """values[level], for a level that is known only at run time."""
    picked = values[0]
    for i in tl.static_range(1, len(values)):
        picked = tl.where(level == i, values[i], picked)
    return picked


@jit()
def _locate(
    rois, offsets, heights, widths, num_images, gamma, C,
    SIZE: tl.constexpr, STRIDES: tl.constexpr, BINS: tl.constexpr, CH: tl.constexpr,
):  # fmt: skip
    """This program's RoI, bins and chunk of channels (chunks vary fastest, then blocks of
    bins); the RoI's level and image; and its box: the map's height and width, the bins'
    corners, a bin's size in cells, and which bins exist (none if the RoI's image does not)."""
    blocks: tl.constexpr = (SIZE * SIZE + BINS - 1) // BINS
    chunks = tl.cdiv(C, CH)
    program = tl.program_id(0)
    bins = (program // chunks) % blocks * BINS + tl.arange(0, BINS)
    r = (program // (blocks * chunks)).to(tl.int64)
    image = tl.load(rois + r * 5)
    x1 = tl.load(rois + r * 5 + 1)
    y1 = tl.load(rois + r * 5 + 2)
    w = tl.load(rois + r * 5 + 3) - x1
    h = tl.load(rois + r * 5 + 4) - y1
    area = tl.maximum(w, 0.0) * tl.maximum(h, 0.0)
    level = 0
    for i in tl.static_range(1, len(STRIDES)):  # as in roi_level
        level += (area >= (14 * STRIDES[i]) ** 2 * (1 - 1.4e-6)).to(tl.int32)
    finite = (tl.abs(w) < float("inf")) & (tl.abs(h) < float("inf"))
    known = (image >= 0) & (image < num_images) & finite
    valid = tl.where(known, bins, SIZE * SIZE) < SIZE * SIZE
    stride = _pick(STRIDES, level)
    w = tl.where(known, w / stride, 0.0)
    h = tl.where(known, h / stride, 0.0)
    x = x1 / stride - 0.5 + w * ((bins % SIZE) / SIZE)
    y = y1 / stride - 0.5 + h * ((bins // SIZE) / SIZE)
    if offsets is not None:
        shift = offsets + r * 2 * SIZE * SIZE + bins
        x += tl.load(shift, mask=valid, other=0.0) * gamma * w
        y += tl.load(shift + SIZE * SIZE, mask=valid, other=0.0) * gamma * h
    height = tl.cast(_pick(heights, level), tl.int32)
    width = tl.cast(_pick(widths, level), tl.int32)
    image = tl.where(known, image, 0.0).to(tl.int64)
    box = (height, width, x, y, w / SIZE, h / SIZE, valid)
    return r, bins, program % chunks, level, image, box


@jit()
def _sample(corner, side, i, cells, valid, SAMPLES: tl.constexpr, SKIP: tl.constexpr):
    """Sample i of each bin along one axis: whether it counts, its two cells, the fraction
    between them, and whether it lies in the map unclamped."""
    position = corner + side * ((i + 0.5) / SAMPLES)
    margin: tl.constexpr = 0.5 if SKIP else 1.0
    inside = valid & (position >= -margin) & (position <= cells - 1 + margin)
    clamped = tl.minimum(tl.maximum(tl.where(inside, position, 0.0), 0.0), cells - 1.0)
    low = clamped.to(tl.int32)  # floor, because clamped >= 0
    return inside, low, tl.minimum(low + 1, cells - 1), clamped - low, clamped == position


@jit()
def _tap(box, sample, corner: tl.constexpr, SAMPLES: tl.constexpr, SKIP: tl.constexpr):
    """One of the four cells around one sample of each bin: its index in the map, its bilinear
    weight, and the weight's derivatives by x and y, zero if the sample is clamped. A sample
    that does not count has a valid index too, with weight zero, so loads need no mask."""
    height, width, x, y, bin_w, bin_h, valid = box
    i, j = sample // SAMPLES, sample % SAMPLES
    in_x, x0, x1, fx, free_x = _sample(x, bin_w, j, width, valid, SAMPLES, SKIP)
    in_y, y0, y1, fy, free_y = _sample(y, bin_h, i, height, valid, SAMPLES, SKIP)
    column, weight_x, sign_x = (x1, fx, 1.0) if corner % 2 else (x0, 1.0 - fx, -1.0)
    row, weight_y, sign_y = (y1, fy, 1.0) if corner >= 2 else (y0, 1.0 - fy, -1.0)
    inside = in_x & in_y
    weight = tl.where(inside, weight_x * weight_y, 0.0)
    slope_x = tl.where(inside & free_x, weight_y * sign_x, 0.0)
    slope_y = tl.where(inside & free_y, weight_x * sign_y, 0.0)
    return row * width + column, weight, slope_x, slope_y


@jit()
def _share(box, SAMPLES: tl.constexpr, SKIP: tl.constexpr):
    """The weight of one sample in its bin's mean, [BINS]."""
    height, width, x, y, bin_w, bin_h, valid = box
    columns = tl.zeros_like(x)
    if not SKIP:
        return columns + 1.0 / (SAMPLES * SAMPLES)
    rows = columns
    for i in tl.static_range(SAMPLES):
        columns += _sample(x, bin_w, i, width, valid, SAMPLES, SKIP)[0].to(tl.float32)
        rows += _sample(y, bin_h, i, height, valid, SAMPLES, SKIP)[0].to(tl.float32)
    return 1.0 / tl.maximum(columns * rows, 1.0)


@jit("num_images")
def _pool_kernel(
    out, grad, maps, rois, offsets, heights, widths, num_images, C, gamma,
    SIZE: tl.constexpr, STRIDES: tl.constexpr, SAMPLES: tl.constexpr, SKIP: tl.constexpr,
    BINS: tl.constexpr, CH: tl.constexpr,
):  # fmt: skip
    """The pooled values, or the gradient of the offsets.

    If grad is None: out[r, bin, :] = mean of maps[level][image] over the bin's samples. Given
    grad [R, S*S, C]: out[r, chunk, :, bin] = gamma * (w, h) * mean over the samples of
    grad . d value / d (x, y); the host sums the chunks of channels.
    Grid: a program for each RoI, block of BINS bins and chunk of CH channels, which it owns.
    """
    r, bins, chunk, level, image, box = _locate(
        rois, offsets, heights, widths, num_images, gamma, C, SIZE, STRIDES, BINS, CH
    )
    source = _pick(maps, level) + image * box[0] * box[1] * C
    channels = (chunk * CH + tl.arange(0, CH))[None, :]
    # Sums of the map's value and its derivatives over the samples. Unused ones cost nothing.
    value = tl.zeros([BINS, CH], tl.float32)
    value_x = tl.zeros([BINS, CH], tl.float32)
    value_y = tl.zeros([BINS, CH], tl.float32)
    UNROLL: tl.constexpr = 4 if grad is None else 1
    for sample in tl.range(SAMPLES * SAMPLES, loop_unroll_factor=UNROLL):
        for corner in tl.static_range(4):
            cell, weight, slope_x, slope_y = _tap(box, sample, corner, SAMPLES, SKIP)
            tap = source + (cell * C)[:, None] + channels
            read = tl.load(tap, mask=channels < C, other=0.0).to(tl.float32)
            value += read * weight[:, None]
            value_x += read * slope_x[:, None]
            value_y += read * slope_y[:, None]
    share = _share(box, SAMPLES, SKIP)
    exists = bins < SIZE * SIZE
    all_exist = exists[:, None] & (channels < C)
    pooled = r * SIZE * SIZE * C + (bins * C)[:, None] + channels
    if grad is None:
        tl.store(out + pooled, value * share[:, None], mask=all_exist)
    else:
        g = tl.load(grad + pooled, mask=all_exist, other=0.0).to(tl.float32)
        scale = share * gamma * SIZE  # times box[4] and box[5], a bin's width and height
        target = out + (r * tl.cdiv(C, CH) + chunk) * 2 * SIZE * SIZE + bins
        tl.store(target, tl.sum(value_x * g, axis=1) * scale * box[4], mask=exists)
        target += SIZE * SIZE
        tl.store(target, tl.sum(value_y * g, axis=1) * scale * box[5], mask=exists)


@jit("num_images", "num_cells")
def _taps_kernel(
    cells, weights, rois, offsets, heights, widths, num_images, num_cells, gamma,
    SIZE: tl.constexpr, STRIDES: tl.constexpr, SAMPLES: tl.constexpr, SKIP: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    """cells, weights [R*S*S, taps]: the table row that each tap of a bin reads; its weight.

    A tap without weight gets row num_cells, which does not exist. Grid: a program for each RoI
    and block of BINS bins.
    """
    r, bins, chunk, level, image, box = _locate(
        rois, offsets, heights, widths, num_images, gamma, 1, SIZE, STRIDES, BINS, 1
    )
    share = _share(box, SAMPLES, SKIP)
    start = image * box[0] * box[1]
    for i in tl.static_range(len(STRIDES)):  # skip the maps before this one
        before = tl.cast(heights[i], tl.int32) * tl.cast(widths[i], tl.int32) * num_images
        start += tl.where(i < level, before, 0)
    position = (r * SIZE * SIZE + bins) * (4 * SAMPLES * SAMPLES)
    for sample in range(SAMPLES * SAMPLES):
        for corner in tl.static_range(4):
            cell, weight, slope_x, slope_y = _tap(box, sample, corner, SAMPLES, SKIP)
            row = tl.where(weight > 0, start + cell, num_cells)
            tl.store(cells + position, row.to(tl.int32), mask=bins < SIZE * SIZE)
            tl.store(weights + position, weight * share, mask=bins < SIZE * SIZE)
            position += 1


@jit()
def _gather_kernel(
    table, grad, order, weights, starts, C,
    TAPS: tl.constexpr, STEP: tl.constexpr, CH: tl.constexpr,
):  # fmt: skip
    """table[cell, :] = sum over the cell's taps, in sorted order, of weight * grad[bin, :].

    order [R*S*S * TAPS] lists the taps cell by cell; starts [cells + 1] says where each cell's
    begin; grad is [R*S*S, C]. Grid: cells by chunks of CH channels. A program owns its row and
    sums STEP taps at a time, so the order of every sum is fixed.
    """
    cell = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * CH + tl.arange(0, CH)
    total = tl.zeros([CH], tl.float32)
    first = tl.load(starts + cell)
    end = tl.load(starts + cell + 1)
    while first < end:
        position = first + tl.arange(0, STEP)
        there = position < end
        tap = tl.load(order + position, mask=there, other=0)  # 32 bits: division is fast
        weight = tl.load(weights + tap, mask=there, other=0.0)
        mask = there[:, None] & (channels < C)[None, :]
        source = grad + ((tap // TAPS).to(tl.int64) * C)[:, None] + channels[None, :]
        g = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(g * weight[:, None], axis=0)
        first += STEP
    tl.store(table + cell * C + channels, total, mask=channels < C)


# If TRITON_INTERPRET was on when triton was imported, kernels run on CPU tensors.
INTERPRETED = triton is not None and not isinstance(_pool_kernel, triton.JITFunction)


# ------------------------------------------------------------------------------ operators

# A compiled model keeps custom operators whole. None of them waits for the device. The
# backward operator has no gradient formula, so double backward raises. The namespace is this
# module's name, so that copies of the file do not clash.

_NAMESPACE = __name__.replace(".", "_")
_FUSED = {"enable_fp_fusion": True}  # explicit: Triton announced another default


def _geometry(features, rois, offsets, size, strides, sampling_ratio, gamma, skip) -> dict:
    """The arguments of every kernel that samples RoIs."""
    cells = sum(f[:, 0].numel() for f in features)
    if max(cells, *(f[0].numel() for f in features)) >= 2**31:
        raise ValueError("2**31 cells or more, or as many elements in one image of a map")
    heights = tuple(float(f.shape[2]) for f in features)
    widths = tuple(float(f.shape[3]) for f in features)
    return dict(
        rois=rois, offsets=offsets, heights=heights, widths=widths,
        num_images=features[0].shape[0], gamma=gamma, SIZE=size, STRIDES=tuple(strides),
        SAMPLES=sampling_ratio, SKIP=skip, **_FUSED,
    )  # fmt: skip


def _tile(R: int, C: int, size: int) -> tuple[tuple[int], dict]:
    """The grid over RoIs, blocks of bins and chunks of channels; and the tile's size."""
    # Unless C is a multiple of 16, every element has an address of its own. A tile of 2048
    # then spills registers, 104 of them for C = 255 on sm_90.
    tile = 2048 if C % 16 == 0 else 1024
    CH = min(256, triton.next_power_of_2(C))
    BINS = min(tile // CH, triton.next_power_of_2(size * size))
    programs = R * triton.cdiv(size * size, BINS) * triton.cdiv(C, CH)
    return (programs,), dict(C=C, BINS=BINS, CH=CH, num_warps=4)


@library.custom_op(f"{_NAMESPACE}::pool", mutates_args=())
def _pool(
    features: Sequence[Tensor], rois: Tensor, offsets: Tensor | None, size: int,
    strides: Sequence[int], sampling_ratio: int, gamma: float, skip: bool,
) -> Tensor:  # fmt: skip
    """Channels_last maps and rois [R, 5] of float32 -> [R, C, S, S], channels_last."""
    out = _empty_pooled(features, rois, offsets, size)
    if out.numel():
        common = _geometry(features, rois, offsets, size, strides, sampling_ratio, gamma, skip)
        grid, tile = _tile(out.shape[0], out.shape[1], size)
        with torch.cuda.device_of(out):
            _pool_kernel[grid](out, None, tuple(features), **common, **tile)
    return out


@_pool.register_fake
def _empty_pooled(features, rois, offsets, size, *_) -> Tensor:
    out = features[0].new_empty(rois.shape[0], size, size, features[0].shape[1])
    return out.permute(0, 3, 1, 2)  # [R, C, S, S]


@library.custom_op(f"{_NAMESPACE}::pool_backward", mutates_args=())
def _pool_backward(
    wanted: Sequence[bool], grad: Tensor, features: Sequence[Tensor], rois: Tensor,
    offsets: Tensor | None, size: int, strides: Sequence[int], sampling_ratio: int,
    gamma: float, skip: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The maps' gradient, one [cells, C] table in grad's dtype, level after level; and the
    offsets', [R, 2, S, S] float32. `wanted` says which of the two; the other is empty."""
    table, grad_offsets = _empty_gradients(wanted, grad, features, rois, offsets)
    if not grad.numel():
        return table.zero_(), grad_offsets.zero_()
    R, C = grad.shape[:2]
    cells = table.shape[0]
    grad = grad.contiguous(memory_format=torch.channels_last)
    common = _geometry(features, rois, offsets, size, strides, sampling_ratio, gamma, skip)
    grid, tile = _tile(R, C, size)
    with torch.cuda.device_of(grad):
        if wanted[0]:
            # Takes 24 bytes for each of the 4 n^2 taps of a bin, for as long as this runs.
            taps = 4 * sampling_ratio**2
            if R * size**2 * taps >= 2**31:
                raise ValueError(f"{R} RoIs are too many: taps are counted in 32 bits")
            BINS = min(64, triton.next_power_of_2(size**2))
            cell = torch.empty(R * size**2 * taps, dtype=torch.int32, device=grad.device)
            weights = torch.empty_like(cell, dtype=torch.float32)
            _taps_kernel[(R * triton.cdiv(size**2, BINS),)](
                cell, weights, num_cells=cells, BINS=BINS, num_warps=2, **common
            )
            order, first = _by_row(cell, cells)
            _gather_kernel[(cells, triton.cdiv(C, tile["CH"]))](
                table, grad, order.int(), weights, first, C, TAPS=taps, STEP=4, CH=tile["CH"],
                num_warps=1, **_FUSED,
            )  # fmt: skip
        if wanted[1]:
            parts = grad_offsets.new_empty(R, triton.cdiv(C, tile["CH"]), 2, size, size)
            _pool_kernel[grid](parts, grad, tuple(features), **common, **tile)
            grad_offsets = parts.sum(1)
    return table, grad_offsets


@_pool_backward.register_fake
def _empty_gradients(wanted, grad, features, rois, offsets, *_) -> tuple[Tensor, Tensor]:
    cells = sum(f.shape[0] * f.shape[2] * f.shape[3] for f in features) if wanted[0] else 0
    grad_offsets = torch.empty_like(offsets) if wanted[1] else grad.new_empty(0)
    return grad.new_empty(cells, grad.shape[1]), grad_offsets


def _setup_context(ctx, inputs, output):
    features, rois, offsets, *ctx.options = inputs
    ctx.save_for_backward(rois, offsets, *features)


def _backward(ctx, grad):
    rois, offsets, *features = ctx.saved_tensors
    wanted = [any(ctx.needs_input_grad[0]), ctx.needs_input_grad[2]]
    table, grad_offsets = _pool_backward(wanted, grad, features, rois, offsets, *ctx.options)
    grad_maps = None
    if wanted[0]:
        rows = table.split([f[:, 0].numel() for f in features])
        grad_maps = [
            part.view(f.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
            for part, f in zip(rows, features)
        ]
    return grad_maps, None, grad_offsets if wanted[1] else None, *[None] * 5


_pool.register_autograd(_backward, setup_context=_setup_context)


def _pool_triton(features, rois, offsets, size, strides, sampling_ratio, gamma, skip):
    """pool_reference by the kernels, which read channels_last. Keeps the maps' layout."""
    channels_last = all(f.stride(1) == 1 for f in features)
    features = [f.contiguous(memory_format=torch.channels_last) for f in features]
    rois = rois.detach().float().contiguous()
    offsets = None if offsets is None else offsets.float().contiguous()
    out = _pool(features, rois, offsets, size, strides, sampling_ratio, gamma, skip)
    return out if channels_last else out.contiguous()


# ------------------------------------------------------------------------------ public


def roi_align(
    features: Sequence[Tensor], rois: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int], strides: Sequence[int], sampling_ratio: int = 2,
    impl: str = "auto", aligned: bool = True,
) -> Tensor:  # fmt: skip
    """Pool every box to an S x S grid, from the pyramid level that fits its size.

    Shapes: features L x [B, C, Hi, Wi], rois [R, 5] or B x [Ri, 4] -> [R, C, S, S].
    Units: rois in input pixels, strides in pixels per cell, sampling_ratio per bin and axis.
    impl: "auto" is Triton on CUDA and "torch" elsewhere, where embedding_bag outruns
        torchvision's operator. "triton" needs CUDA, or TRITON_INTERPRET=1 on a CPU.
    aligned: False for heads that were trained on torchvision's MultiScaleRoIAlign.
    Raises: ValueError for inconsistent arguments, or an impl that cannot run on them.
    Invariant: if the maps are linear in x and y, a box inside them pools to the maps' values
        at its bins' centres.
    """
    pool, boxes, size, strides, samples = _check(
        features, rois, None, output_size, strides, sampling_ratio, impl
    )
    if not aligned:
        boxes = _unaligned(boxes, strides)
    return pool(features, boxes, None, size, strides, samples, 0.0, False)


def deform_roi_pool(
    features: Sequence[Tensor], rois: Tensor | Sequence[Tensor], offsets: Tensor | None,
    output_size: int | tuple[int, int], strides: Sequence[int], sampling_ratio: int = 2,
    gamma: float = 0.1, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """roi_align with bins moved by learned offsets, without samples beyond the map's edge.

    Shapes: as for roi_align, and offsets [R, 2, S, S] or None.
    Units: offsets are dx, dy as fractions of the RoI's width and height, before gamma.
    impl, Raises: as for roi_align.
    Invariant: with zero offsets and every sample inside the map, this equals roi_align.
    """
    pool, boxes, size, strides, samples = _check(
        features, rois, offsets, output_size, strides, sampling_ratio, impl
    )
    return pool(features, boxes, offsets, size, strides, samples, gamma, True)


def _unaligned(rois: Tensor, strides: Sequence[int]) -> Tensor:
    """RoIs whose aligned grid is the grid that aligned=False lays over the given ones."""
    level = roi_level(rois, strides)[:, None]
    stride = torch.zeros_like(rois[:, :1])  # [R, 1]
    for i, value in enumerate(strides):
        stride = stride.masked_fill(level == i, value)
    low, high = rois[:, 1:3], torch.maximum(rois[:, 3:5], rois[:, 1:3] + stride)
    return torch.cat([rois[:, :1], low + stride / 2, high + stride / 2], 1)


def _whole(name: str, value) -> int:
    if not isinstance(value, (int, float)) or value % 1 != 0 or value < 1:
        raise ValueError(f"{name} must be whole and positive, not {value!r}")
    return int(value)


def _check(features, rois, offsets, size, strides, sampling_ratio, impl):
    """Refuse what does not fit. Return the pooling function, rois [R, 5] and whole sizes."""
    if not all(isinstance(v, (list, tuple)) for v in (features, strides)):
        kinds = f"{type(features).__name__} and {type(strides).__name__}"
        raise ValueError(f"features and strides must be lists, finest first, not {kinds}")
    if not features or len(features) != len(strides) or any(f.dim() != 4 for f in features):
        raise ValueError(f"{len(strides)} strides need as many maps [B, C, H, W]")
    strides = [_whole("strides, input pixels per cell,", stride) for stride in strides]
    if any(a >= b for a, b in zip(strides, strides[1:])):
        raise ValueError(f"strides must increase: {strides}")
    if isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    size = _whole("output_size, a number or a pair of equal ones,", size)
    sampling_ratio = _whole("sampling_ratio", sampling_ratio)

    first = features[0]
    if not isinstance(rois, Tensor):
        listed = isinstance(rois, (list, tuple)) and all(isinstance(b, Tensor) for b in rois)
        B = first.shape[0]
        if not listed or len(rois) != B or any(b.shape[1:] != (4,) for b in rois):
            raise ValueError(f"rois must be [R, 5] or {B} tensors [Ri, 4], one an image")
        rois = torch.cat([F.pad(b, (1, 0), value=i) for i, b in enumerate(rois)])
    if rois.dim() != 2 or rois.shape[1] != 5 or not rois.is_floating_point():
        raise ValueError(f"rois must be floating [R, 5]: {rois.dtype} {tuple(rois.shape)}")
    if any(f.shape[:2] != first.shape[:2] or 0 in f.shape for f in features):
        shapes = [[*f.shape] for f in features]
        raise ValueError(f"maps must share B and C, none empty: {shapes}")
    if len({f.dtype for f in features}) > 1:
        raise ValueError(f"maps must share one dtype: {[f.dtype for f in features]}")
    if offsets is not None and offsets.shape != (rois.shape[0], 2, size, size):
        raise ValueError(f"offsets must be [R, 2, {size}, {size}]: {tuple(offsets.shape)}")
    if any(t is not None and t.device != first.device for t in (*features, rois, offsets)):
        raise ValueError("maps, rois and offsets must be on one device")

    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl must be 'auto', 'triton' or 'torch', not {impl!r}")
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    usable = triton is not None and first.dtype in dtypes
    if impl == "triton" and not (usable and (first.is_cuda or INTERPRETED)):
        raise ValueError(
            "impl='triton' needs triton, float32, float16 or bfloat16 maps, and CUDA "
            "tensors (or TRITON_INTERPRET=1 from the start), not "
            f"{first.dtype} on {first.device}"
        )
    triton_runs = impl == "triton" or (impl == "auto" and usable and first.is_cuda)
    pool = _pool_triton if triton_runs else pool_reference
    return pool, rois, size, strides, sampling_ratio
