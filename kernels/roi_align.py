"""RoIAlign and deformable RoI pooling over every level of a feature pyramid at once.

Contract
    features   L maps [B, C, Hi, Wi] of one dtype, finest first; any memory strides (the Triton path
               never copies a map).
    rois       [R, 5]: image index, x1, y1, x2, y2 in pixels of the network's input image; or a list
               of B tensors [Ri, 4], one an image.
    strides    L increasing whole numbers, input pixels per cell of each map.
    result     [R, C, S, S] in the maps' dtype; channels_last where the maps are (flatten(1) then
               copies). Sums are float32, or float64 for float64 maps (which Triton refuses).
    level      floor(4 + log2(sqrt(w h) / 224) + 1e-6), level 4 being the map of stride 16, clamped
               to the maps given. The 1e-6, as is usual, sends a box of exactly 112, 224, ... pixels
               up on every device. A box of zero or negative size takes the first map.
    grid       half-pixel aligned: cell (0, 0) is centred at (stride / 2, stride / 2). A bin is the
               mean of sampling_ratio ** 2 bilinear samples, centred in it. Nothing is rounded and
               no box is enlarged: one of zero size samples one point. roi_align(aligned=False) is
               the older grid, torchvision's MultiScaleRoIAlign: cell (0, 0) is centred at (0, 0),
               half a cell away, and a side shorter than one cell counts as one.
    border     in cell units, ends included. roi_align: a sample outside [-1, H] x [-1, W] counts as
               zero, others are clamped into the map. deform_roi_pool: a sample outside
               [-0.5, H - 0.5] x [-0.5, W - 0.5] is left out of the mean, others are clamped; a bin
               without samples is zero. (mmcv's deformable pooling has roi_align's rule.)
    offsets    [R, 2, S, S], dx then dy: bin (i, j) moves by offsets[:, :, i, j] * gamma * RoI size.
    empty      R = 0 gives [0, C, S, S] and zero gradients. A RoI whose image index is outside
               0..B-1 (padding) or whose box is not finite gives zeros and no gradient.
    gradients  to maps and offsets; boxes are constants. Double backward raises RuntimeError. Sums
               repeat bit for bit: every cell adds up its own taps, in a fixed order.
    memory     "torch" copies all maps into one table; "triton" copies none, and lists each tap of
               each bin (20 bytes) for the backward pass.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import accumulate
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.autograd.function import once_differentiable

# --------------------------------------------------------------------------------------------------
# Reference, and the fastest path on a CPU: every bin is a weighted sum of 4 * sampling_ratio ** 2
# rows of one [cells, C] table (a copy of the maps). embedding_bag gathers and sums in one parallel
# pass, forward and backward, so nothing of size [R * S * S * 16, C] ever exists.
# --------------------------------------------------------------------------------------------------


def roi_align_reference(
    features: Sequence[Tensor],
    rois: Tensor,
    size: int,
    strides: Sequence[int],
    sampling_ratio: int = 2,
) -> Tensor:
    """roi_align in torch operations, in float32 or, for float64 maps, float64."""
    return _pool_reference(features, rois, None, size, strides, sampling_ratio, 0.0, skip=False)


def deform_roi_pool_reference(
    features: Sequence[Tensor],
    rois: Tensor,
    offsets: Tensor | None,
    size: int,
    strides: Sequence[int],
    sampling_ratio: int = 2,
    gamma: float = 0.1,
) -> Tensor:
    """deform_roi_pool in torch operations, in float32 or, for float64 maps, float64."""
    return _pool_reference(features, rois, offsets, size, strides, sampling_ratio, gamma, skip=True)


def _pool_reference(features, rois, offsets, size, strides, sampling_ratio, gamma, skip):
    C = features[0].shape[1]
    dtype = torch.promote_types(features[0].dtype, torch.float32)
    options = (size, strides, sampling_ratio, gamma, skip)
    index, weight = _taps(features, rois.detach().to(dtype), offsets, *options)
    table = torch.cat([f.permute(0, 2, 3, 1).reshape(-1, C) for f in features])  # [cells, C]
    table = table.to(dtype)
    out = F.embedding_bag(index, table.detach(), per_sample_weights=weight, mode="sum")
    out = _TableGradient.apply(out, table, index, weight.detach())  # [R*S*S, C]
    return out.view(-1, size, size, C).permute(0, 3, 1, 2).to(features[0].dtype)  # [R, C, S, S]


class _TableGradient(torch.autograd.Function):
    """pooled as it is, plus the table's gradient: every row gathers from the bins that read it.

    embedding_bag gives weights their gradient; its own for the table is up to three times slower.
    """

    @staticmethod
    def forward(ctx, pooled, table, index, weight):
        ctx.save_for_backward(index, weight)
        ctx.rows = table.shape[0]
        return pooled.view_as(pooled)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        index, weight = ctx.saved_tensors
        row, order = torch.sort(index.flatten().int(), stable=True)
        every = torch.arange(ctx.rows + 1, dtype=torch.int32, device=row.device)
        first = torch.searchsorted(row, every)  # [rows + 1], where each row's taps begin
        weight = weight.flatten()[order]
        bags = {"offsets": first, "per_sample_weights": weight, "include_last_offset": True}
        bins = order // index.shape[1]
        return grad, F.embedding_bag(bins, grad.contiguous(), mode="sum", **bags), None, None


def _taps(features, rois, offsets, size, strides, sampling_ratio, gamma, skip):
    """The table rows that each bin reads and their weights, both [R*S*S, 4*sampling_ratio**2].

    Within a bin the samples form a grid, so rows and columns are worked out apart and multiplied at
    the end. Axes of the intermediate tensors: R, bin row, bin column, sample row, sample column.
    """
    B = features[0].shape[0]
    known = (rois[:, 0] >= 0) & (rois[:, 0] < B) & rois.isfinite().all(1)
    rois = torch.where(known[:, None], rois, 0)
    heights, widths = [f.shape[2] for f in features], [f.shape[3] for f in features]
    starts = accumulate((B * h * w for h, w in zip(heights, widths)), initial=0)
    maps = torch.tensor(list(zip(heights, widths, strides, starts)), device=rois.device)  # [L, 4]
    height, width, stride, start = maps[roi_level(rois, strides)].unbind(1)
    start = start + rois[:, 0].long() * height * width
    x1, y1, x2, y2 = (rois[:, 1:] / stride[:, None]).unbind(1)
    roi_w, roi_h = x2 - x1, y2 - y1

    def each(v: Tensor) -> Tensor:  # [R] -> [R, 1, 1, 1, 1]
        return v.view(-1, 1, 1, 1, 1)

    # Where samples lie, as fractions of a side.
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
    taps = 4 * sampling_ratio**2
    return index.reshape(-1, taps), weight.reshape(-1, taps)


def _axis_taps(position: Tensor, cells: Tensor, skip: bool) -> tuple[Tensor, Tensor]:
    """Along one axis, the two cells around each sample and their weights, both [..., 2]."""
    margin = 0.5 if skip else 1.0
    inside = (position >= -margin) & (position <= cells - 1 + margin)
    samples = position.shape[-1] * position.shape[-2]  # one of the two is 1
    used = inside.sum((-1, -2), keepdim=True).clamp(min=1) if skip else samples
    share = inside.to(position.dtype) / used  # a bool divided by an integer would be float32
    position = torch.minimum(torch.where(inside, position, 0).clamp(min=0), cells - 1)
    low = position.detach().floor()
    fraction = position - low
    cell = torch.stack([low, torch.minimum(low + 1, cells - 1)], -1).long()
    return cell, torch.stack([1 - fraction, fraction], -1) * share[..., None]


def roi_level(rois: Tensor, strides: Sequence[int]) -> Tensor:
    """Index of the map that each box is pooled from, [R] int64 (see the contract).

    Counts the level boundaries that the box's area has passed: the formula without the logarithm,
    whose last bit differs between devices.
    """
    rois = rois.to(torch.promote_types(rois.dtype, torch.float32))  # an area overflows in float16
    w, h = (rois[:, 3:5] - rois[:, 1:3]).clamp(min=0).unbind(1)
    level = torch.zeros_like(w, dtype=torch.int64)
    for stride in strides[1:]:
        level += w * h >= (14 * stride) ** 2 * (1 - 1.4e-6)  # 224 px at stride 16
    return level


# --------------------------------------------------------------------------------------------------
# Triton kernels. Tuples hold one entry a level; a program picks its own: one launch serves all.
# A tile is BINS bins of one RoI by CH channels. Offsets inside one image of a map fit 32 bits (the
# host checks), those across images and RoIs are 64 bits wide.
# --------------------------------------------------------------------------------------------------

try:
    import triton
    import triton.language as tl

    jit = triton.jit
    # These change with every batch: specialising on them would compile again and again.
    jit_sizes = triton.jit(do_not_specialize=["num_images", "num_cells"])
except ImportError:  # the functions below then stay plain and are never called
    triton, tl = None, SimpleNamespace(constexpr=None)

    def jit(function):
        return function

    jit_sizes = jit


@jit
def _pick(values, level):
    """values[level], for a level known only at run time."""
    picked = values[0]
    for i in tl.static_range(1, len(values)):
        picked = tl.where(level == i, values[i], picked)
    return picked


@jit
def _pick_size(odd, level):
    """values[level] of the values that went through _odd."""
    return _pick(odd, level) >> 1


def _odd(values: Sequence[int]) -> tuple[int, ...]:
    """2 n + 1 of each value, for a tuple argument that differs from image to image.

    Triton compiles anew where an integer in a tuple turns into 1 or a multiple of 16, and lets
    do_not_specialize say nothing there. An odd number above 1 is neither.
    """
    return tuple(2 * n + 1 for n in values)


@jit
def _tile(C, SIZE: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr):
    """This program's RoI, bins and chunk of channels; chunks vary fastest, then blocks of bins."""
    chunks = tl.cdiv(C, CHUNK)
    blocks: tl.constexpr = (SIZE * SIZE + BINS - 1) // BINS
    pid = tl.program_id(0)
    bins = (pid // chunks) % blocks * BINS + tl.arange(0, BINS)
    return (pid // (blocks * chunks)).to(tl.int64), bins, pid % chunks


@jit
def _locate(
    rois, offsets, r, bins, heights, widths, num_images, gamma,
    SIZE: tl.constexpr, STRIDES: tl.constexpr,
):  # fmt: skip
    """RoI r's level and image, and its box: map size, the bins' corners and size in cells, and
    which bins there are (none where the image is not there)."""
    image = tl.load(rois + r * 5)
    x1 = tl.load(rois + r * 5 + 1)
    y1 = tl.load(rois + r * 5 + 2)
    w = tl.load(rois + r * 5 + 3) - x1
    h = tl.load(rois + r * 5 + 4) - y1
    area = tl.maximum(w, 0.0) * tl.maximum(h, 0.0)
    level = 0
    for i in tl.static_range(1, len(STRIDES)):  # as roi_level
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
    height, width = _pick_size(heights, level), _pick_size(widths, level)
    box = (height, width, x, y, w / SIZE, h / SIZE, valid)
    return level, tl.where(known, image, 0.0).to(tl.int64), box


@jit
def _plane(
    maps, image_strides, row_strides, cell_strides, channel_strides, level, image,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Pointer to one image of one map, and its strides by row, cell and channel."""
    source = _pick(maps, level) + image * _pick_size(image_strides, level)
    channel_stride = _pick_size(channel_strides, level) if ALIGN == 1 else 1
    rows, cells = _pick_size(row_strides, level), _pick_size(cell_strides, level)
    return tl.multiple_of(source, ALIGN), rows, cells, channel_stride


@jit
def _sample(corner, side, i, cells, valid, SAMPLES: tl.constexpr, SKIP: tl.constexpr):
    """Sample i of each bin on one axis: does it count, its two cells, fraction, is it unclamped."""
    position = corner + side * ((i + 0.5) / SAMPLES)
    margin: tl.constexpr = 0.5 if SKIP else 1.0
    inside = valid & (position >= -margin) & (position <= cells - 1 + margin)
    clamped = tl.minimum(tl.maximum(tl.where(inside, position, 0.0), 0.0), cells - 1.0)
    low = clamped.to(tl.int32)  # not negative, so this is floor
    return inside, low, tl.minimum(low + 1, cells - 1), clamped - low, clamped == position


@jit
def _tap(box, sample, corner: tl.constexpr, SAMPLES: tl.constexpr, SKIP: tl.constexpr):
    """One of the four cells around one sample of each bin: does it count, its row and column, its
    bilinear weight, and the weight's derivatives by x and y (zero where the sample is clamped)."""
    height, width, x, y, bin_w, bin_h, valid = box
    in_x, x0, x1, fx, free_x = _sample(x, bin_w, sample % SAMPLES, width, valid, SAMPLES, SKIP)
    in_y, y0, y1, fy, free_y = _sample(y, bin_h, sample // SAMPLES, height, valid, SAMPLES, SKIP)
    column, weight_x, sign_x = (x1, fx, 1.0) if corner % 2 else (x0, 1.0 - fx, -1.0)
    row, weight_y, sign_y = (y1, fy, 1.0) if corner >= 2 else (y0, 1.0 - fy, -1.0)
    slope_x = tl.where(free_x, weight_y * sign_x, 0.0)
    slope_y = tl.where(free_y, weight_x * sign_y, 0.0)
    return in_x & in_y, row, column, weight_x * weight_y, slope_x, slope_y


@jit
def _share(box, SAMPLES: tl.constexpr, SKIP: tl.constexpr):
    """Weight of one sample in its bin's mean, [BINS]."""
    height, width, x, y, bin_w, bin_h, valid = box
    if not SKIP:
        return tl.zeros_like(x) + 1.0 / (SAMPLES * SAMPLES)
    columns = tl.zeros_like(x)
    rows = tl.zeros_like(y)
    for i in tl.static_range(SAMPLES):
        columns += _sample(x, bin_w, i, width, valid, SAMPLES, SKIP)[0].to(tl.float32)
        rows += _sample(y, bin_h, i, height, valid, SAMPLES, SKIP)[0].to(tl.float32)
    return 1.0 / tl.maximum(columns * rows, 1.0)


@jit_sizes
def _forward_kernel(
    out, maps, rois, offsets, heights, widths, image_strides, row_strides, cell_strides,
    channel_strides, num_images, C, gamma, out_bin_stride, out_channel_stride,
    SIZE: tl.constexpr, STRIDES: tl.constexpr, SAMPLES: tl.constexpr, SKIP: tl.constexpr,
    ALIGN: tl.constexpr, BINS: tl.constexpr, CH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out[r, :, bin] = mean over the bin's samples of the bilinear value of maps[level][image].

    Grid: one program for each RoI, block of BINS bins and chunk of CHUNK channels, which it owns.
    """
    r, bins, chunk = _tile(C, SIZE, BINS, CHUNK)
    level, image, box = _locate(
        rois, offsets, r, bins, heights, widths, num_images, gamma, SIZE, STRIDES
    )
    share = _share(box, SAMPLES, SKIP)
    source, row_stride, cell_stride, channel_stride = _plane(
        maps, image_strides, row_strides, cell_strides, channel_strides, level, image, ALIGN
    )
    # Unrolled, the taps' geometry leaves the loop over channels, if there is one.
    UNROLL: tl.constexpr = 4 if CHUNK > CH else 1
    target = out + r * SIZE * SIZE * C + bins[:, None] * out_bin_stride
    for k in range(CHUNK // CH):
        channels = (chunk * CHUNK + k * CH + tl.arange(0, CH))[None, :]
        value = tl.zeros([BINS, CH], tl.float32)
        for sample in tl.range(SAMPLES * SAMPLES, loop_unroll_factor=UNROLL):
            for corner in tl.static_range(4):
                inside, row, column, weight, _, _ = _tap(box, sample, corner, SAMPLES, SKIP)
                cell = tl.multiple_of(row * row_stride + column * cell_stride, ALIGN)
                tap = source + cell[:, None] + channels * channel_stride
                cells = tl.load(tap, mask=inside[:, None] & (channels < C), other=0.0)
                value += cells.to(tl.float32) * weight[:, None]
        exists = (bins < SIZE * SIZE)[:, None] & (channels < C)
        tl.store(target + channels * out_channel_stride, value * share[:, None], mask=exists)


@jit_sizes
def _grad_offsets_kernel(
    grad_offsets, grad, maps, rois, offsets, heights, widths, image_strides, row_strides,
    cell_strides, channel_strides, num_images, C, gamma, grad_bin_stride, grad_channel_stride,
    SIZE: tl.constexpr, STRIDES: tl.constexpr, SAMPLES: tl.constexpr, SKIP: tl.constexpr,
    ALIGN: tl.constexpr, BINS: tl.constexpr, CH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """grad_offsets[chunk, r, :, bin] = gamma * (w, h) * mean over samples of grad . d value / d xy.

    Grid as in the forward kernel, whose walk over the taps this repeats; the host adds the chunks.
    """
    r, bins, chunk = _tile(C, SIZE, BINS, CHUNK)
    level, image, box = _locate(
        rois, offsets, r, bins, heights, widths, num_images, gamma, SIZE, STRIDES
    )
    source, row_stride, cell_stride, channel_stride = _plane(
        maps, image_strides, row_strides, cell_strides, channel_strides, level, image, ALIGN
    )
    # Unrolled, the taps' geometry leaves the loop over channels, if there is one.
    UNROLL: tl.constexpr = 4 if CHUNK > CH else 1
    above = grad + r * SIZE * SIZE * C + bins[:, None] * grad_bin_stride
    grad_x = tl.zeros([BINS], tl.float32)
    grad_y = tl.zeros([BINS], tl.float32)
    for k in range(CHUNK // CH):
        channels = (chunk * CHUNK + k * CH + tl.arange(0, CH))[None, :]
        exists = (bins < SIZE * SIZE)[:, None] & (channels < C)
        g = tl.load(above + channels * grad_channel_stride, mask=exists, other=0.0).to(tl.float32)
        value_x = tl.zeros([BINS, CH], tl.float32)
        value_y = tl.zeros([BINS, CH], tl.float32)
        for sample in tl.range(SAMPLES * SAMPLES, loop_unroll_factor=UNROLL):
            for corner in tl.static_range(4):
                inside, row, column, _, slope_x, slope_y = _tap(box, sample, corner, SAMPLES, SKIP)
                cell = tl.multiple_of(row * row_stride + column * cell_stride, ALIGN)
                tap = source + cell[:, None] + channels * channel_stride
                cells = tl.load(tap, mask=inside[:, None] & (channels < C), other=0.0)
                value_x += cells.to(tl.float32) * slope_x[:, None]
                value_y += cells.to(tl.float32) * slope_y[:, None]
        grad_x += tl.sum(value_x * g, axis=1)
        grad_y += tl.sum(value_y * g, axis=1)
    height, width, x, y, bin_w, bin_h, valid = box
    scale = _share(box, SAMPLES, SKIP) * gamma * SIZE
    num_rois = tl.num_programs(0) // (tl.cdiv(C, CHUNK) * ((SIZE * SIZE + BINS - 1) // BINS))
    target = grad_offsets + (chunk.to(tl.int64) * num_rois + r) * 2 * SIZE * SIZE + bins
    tl.store(target, grad_x * scale * bin_w, mask=bins < SIZE * SIZE)
    tl.store(target + SIZE * SIZE, grad_y * scale * bin_h, mask=bins < SIZE * SIZE)


@jit_sizes
def _taps_kernel(
    cells, weights, rois, offsets, heights, widths, starts, num_images, num_cells, gamma,
    SIZE: tl.constexpr, STRIDES: tl.constexpr, SAMPLES: tl.constexpr, SKIP: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    """cells, weights [R*S*S, taps]: the table row that each tap of a bin reads and its weight.

    A tap that does not count gets the row num_cells, which does not exist. Grid: one program for
    each RoI and block of BINS bins.
    """
    r, bins, chunk = _tile(1, SIZE, BINS, 1)
    level, image, box = _locate(
        rois, offsets, r, bins, heights, widths, num_images, gamma, SIZE, STRIDES
    )
    height, width = box[0], box[1]
    share = _share(box, SAMPLES, SKIP)
    start = _pick_size(starts, level) + image * height * width
    position = (r * SIZE * SIZE + bins) * (4 * SAMPLES * SAMPLES)
    for sample in range(SAMPLES * SAMPLES):
        for corner in tl.static_range(4):
            inside, row, column, weight, _, _ = _tap(box, sample, corner, SAMPLES, SKIP)
            cell = tl.where(inside, start + row * width + column, num_cells)
            tl.store(cells + position, cell.to(tl.int32), mask=bins < SIZE * SIZE)
            tl.store(weights + position, weight * share, mask=bins < SIZE * SIZE)
            position += 1


@jit_sizes
def _gather_kernel(
    table, grad, order, weights, starts, C, TAPS: tl.constexpr, STEP: tl.constexpr, CH: tl.constexpr
):
    """table[cell, :] = sum over the cell's taps, in sorted order, of weight * grad[bin, :].

    order [R*S*S * TAPS] lists the taps cell by cell, starts [cells + 1] where each cell's begin;
    grad [R*S*S, C]. Grid: cells by chunks of CH channels. A program owns its row, and sums STEP
    taps at a time, so the order of every sum is fixed.
    """
    cell = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * CH + tl.arange(0, CH)
    total = tl.zeros([CH], tl.float32)
    first = tl.load(starts + cell)
    end = tl.load(starts + cell + 1)
    while first < end:
        position = first + tl.arange(0, STEP)
        tap = tl.load(order + position, mask=position < end, other=0)
        weight = tl.load(weights + tap, mask=position < end, other=0.0)
        mask = (position < end)[:, None] & (channels < C)[None, :]
        source = grad + (tap // TAPS * C)[:, None] + channels[None, :]
        g = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(g * weight[:, None], axis=0)
        first += STEP
    tl.store(table + cell * C + channels, total, mask=channels < C)


# Where TRITON_INTERPRET was on when triton was imported, kernels run on CPU tensors.
INTERPRETED = triton is not None and not isinstance(_forward_kernel, triton.JITFunction)


# --------------------------------------------------------------------------------------------------
# Custom operators around the kernels, so that a compiled model keeps them whole. None of them waits
# for the device. The backward has no gradient formula of its own, so double backward raises.
# --------------------------------------------------------------------------------------------------


_NAMESPACE = __name__.replace(".", "_")  # this module's name, so that copies do not clash
_FUSED = {"enable_fp_fusion": True}  # said aloud: Triton's own default is about to change


def _tiles(channels_last: bool, size: int, C: int) -> dict[str, int]:
    """Launch configuration. Where channels are the fast axis in memory, they are a tile's too.
    Otherwise lanes are bins, which read nearby cells of a plane; their geometry serves 32 planes.
    """
    CH = min(256, triton.next_power_of_2(C))
    bins = triton.next_power_of_2(size * size)
    if channels_last:
        return {"BINS": min(2048 // CH, bins), "CH": CH, "CHUNK": CH, "num_warps": 4, **_FUSED}
    return {"BINS": min(64, bins), "CH": 1, "CHUNK": min(32, CH), "num_warps": 2, **_FUSED}


def _grid(R: int, C: int, size: int, BINS: int, CHUNK: int, **_) -> tuple[int]:
    return (R * triton.cdiv(size * size, BINS) * triton.cdiv(C, CHUNK),)


def _is_channels_last(features: Sequence[Tensor]) -> bool:
    return all(f.stride(1) == 1 for f in features)


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _map_arguments(features: Sequence[Tensor]) -> dict:
    """Kernel arguments for the maps. ALIGN = 16: channels can be read 16 bytes at a time."""
    spans = [sum((n - 1) * s for n, s in zip(f.shape[1:], f.stride()[1:])) for f in features]
    if max(spans) >= 2**31:
        raise ValueError("one image of a feature map spans 2**31 elements or more")
    image, channel, row, cell = zip(*(f.stride() for f in features))
    steps = [f.data_ptr() for f in features] + [*image, *row, *cell]
    aligned = _is_channels_last(features) and all(n % 16 == 0 for n in steps)
    return {
        "maps": tuple(features),
        "num_images": features[0].shape[0],
        "C": features[0].shape[1],
        "heights": _odd([f.shape[2] for f in features]),
        "widths": _odd([f.shape[3] for f in features]),
        "image_strides": _odd(image),
        "row_strides": _odd(row),
        "cell_strides": _odd(cell),
        "channel_strides": _odd(channel),
        "ALIGN": 16 if aligned else 1,
    }


def _on(tensor: Tensor):
    """Triton launches on the current device: make that the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@library.custom_op(f"{_NAMESPACE}::pool", mutates_args=())
def _pool(
    features: Sequence[Tensor], rois: Tensor, offsets: Tensor | None, size: int,
    strides: Sequence[int], sampling_ratio: int, gamma: float, skip: bool,
) -> Tensor:  # fmt: skip
    out = _empty_pooled(features, rois, size)
    if out.numel():
        tiles = _tiles(_is_channels_last(features), size, out.shape[1])
        with _on(out):
            _forward_kernel[_grid(*out.shape[:3], **tiles)](
                out, rois=rois, offsets=offsets, gamma=gamma, out_bin_stride=out.stride(3),
                out_channel_stride=out.stride(1), SIZE=size, STRIDES=tuple(strides),
                SAMPLES=sampling_ratio, SKIP=skip, **_map_arguments(features), **tiles,
            )  # fmt: skip
    return out


@_pool.register_fake
def _(features, rois, offsets, size, strides, sampling_ratio, gamma, skip):
    return _empty_pooled(features, rois, size)


def _empty_pooled(features, rois, size) -> Tensor:
    shape = rois.shape[0], features[0].shape[1], size, size
    layout = _layout(_is_channels_last(features))
    return torch.empty(shape, dtype=features[0].dtype, device=rois.device, memory_format=layout)


@library.custom_op(f"{_NAMESPACE}::grad_features", mutates_args=())
def _grad_features(
    grad: Tensor, rois: Tensor, offsets: Tensor | None, batch: int, heights: Sequence[int],
    widths: Sequence[int], strides: Sequence[int], sampling_ratio: int, gamma: float, skip: bool,
) -> Tensor:  # fmt: skip
    """Gradient of all maps as one [cells, C] table, level after level, in grad's dtype."""
    R, C, size = grad.shape[:3]
    starts = [0, *accumulate(batch * h * w for h, w in zip(heights, widths, strict=True))]
    cells = starts.pop()
    if max(cells, cells // batch * C) >= 2**31:
        raise ValueError("the feature maps are too large for 32-bit offsets")
    if not grad.numel():
        return grad.new_zeros(cells, C)
    grad = grad.contiguous(memory_format=torch.channels_last)
    bins, taps = R * size * size, 4 * sampling_ratio**2
    BINS, CH = min(64, triton.next_power_of_2(size * size)), min(256, triton.next_power_of_2(C))
    cell = torch.empty(bins * taps, dtype=torch.int32, device=grad.device)
    weights = torch.empty_like(cell, dtype=torch.float32)
    table = torch.empty(cells, C, dtype=grad.dtype, device=grad.device)
    with _on(grad):
        _taps_kernel[_grid(R, 1, size, BINS, 1)](
            cell, weights, rois, offsets, _odd(heights), _odd(widths), _odd(starts), batch, cells,
            gamma, SIZE=size, STRIDES=tuple(strides), SAMPLES=sampling_ratio, SKIP=skip,
            BINS=BINS, num_warps=2, **_FUSED,
        )  # fmt: skip
        cell, order = torch.sort(cell, stable=True)
        every = torch.arange(cells + 1, dtype=torch.int32, device=grad.device)
        first = torch.searchsorted(cell, every, out_int32=True)  # [cells + 1]
        _gather_kernel[(cells, triton.cdiv(C, CH))](
            table, grad, order, weights, first, C, TAPS=taps, STEP=4, CH=CH, num_warps=1, **_FUSED
        )
    return table


@_grad_features.register_fake
def _(grad, rois, offsets, batch, heights, widths, strides, sampling_ratio, gamma, skip):
    cells = sum(batch * h * w for h, w in zip(heights, widths, strict=True))
    return grad.new_empty(cells, grad.shape[1])


@library.custom_op(f"{_NAMESPACE}::grad_offsets", mutates_args=())
def _grad_offsets(
    grad: Tensor, features: Sequence[Tensor], rois: Tensor, offsets: Tensor,
    strides: Sequence[int], sampling_ratio: int, gamma: float, skip: bool,
) -> Tensor:  # fmt: skip
    """Gradient of the offsets, [R, 2, S, S] float32."""
    R, C, size = grad.shape[:3]
    if not grad.numel():
        return torch.zeros_like(offsets)
    channels_last = _is_channels_last(features)
    grad = grad.contiguous(memory_format=_layout(channels_last))
    tiles = _tiles(channels_last, size, C)
    parts = offsets.new_empty(triton.cdiv(C, tiles["CHUNK"]), *offsets.shape)
    with _on(grad):
        _grad_offsets_kernel[_grid(R, C, size, **tiles)](
            parts, grad, rois=rois, offsets=offsets, gamma=gamma,
            grad_bin_stride=C if channels_last else 1,
            grad_channel_stride=1 if channels_last else size * size,
            SIZE=size, STRIDES=tuple(strides), SAMPLES=sampling_ratio, SKIP=skip,
            **_map_arguments(features), **tiles,
        )  # fmt: skip
    return parts.sum(0)


@_grad_offsets.register_fake
def _(grad, features, rois, offsets, strides, sampling_ratio, gamma, skip):
    return torch.empty_like(offsets)


def _setup_context(ctx, inputs, output):
    features, rois, offsets, _, *ctx.options = inputs
    ctx.channels_last = _is_channels_last(features)
    ctx.shapes = [f.shape for f in features]
    # The maps themselves matter to the offsets' gradient alone.
    needed = features if offsets is not None and offsets.requires_grad else []
    ctx.save_for_backward(rois, offsets, *needed)


def _backward(ctx, grad):
    rois, offsets, *features = ctx.saved_tensors
    grad_maps = grad_offsets = None
    if any(ctx.needs_input_grad[0]):
        batch, _, heights, widths = map(list, zip(*ctx.shapes))
        table = _grad_features(grad, rois, offsets, batch[0], heights, widths, *ctx.options)
        rows = table.split([b * h * w for b, h, w in zip(batch, heights, widths)])
        maps = [r.view(b, h, w, c).permute(0, 3, 1, 2) for r, (b, c, h, w) in zip(rows, ctx.shapes)]
        grad_maps = [m.contiguous(memory_format=_layout(ctx.channels_last)) for m in maps]
    if features:
        grad_offsets = _grad_offsets(grad, features, rois, offsets, *ctx.options)
    return grad_maps, None, grad_offsets, None, None, None, None, None


_pool.register_autograd(_backward, setup_context=_setup_context)


# --------------------------------------------------------------------------------------------------
# Public functions
# --------------------------------------------------------------------------------------------------


def roi_align(
    features: Sequence[Tensor],
    rois: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    strides: Sequence[int],
    sampling_ratio: int = 2,
    impl: str = "auto",
    aligned: bool = True,
) -> Tensor:
    """Pool every box to an S x S grid from the pyramid level of its size; the contract is above.

    Shapes: features L x [B, C, Hi, Wi], rois [R, 5] or B x [Ri, 4] -> [R, C, S, S].
    Units: rois in input pixels, strides in pixels per cell; sampling_ratio is per bin and axis.
    impl: "auto" is Triton on CUDA and "torch" elsewhere, where embedding_bag outruns torchvision's
        operator; "triton" (CUDA, or CPU tensors with TRITON_INTERPRET=1) and "torch" ask for one.
    aligned: False for heads that were trained on torchvision's MultiScaleRoIAlign.
    Raises: ValueError for inconsistent arguments, or an impl that cannot run on them.
    Invariant: of maps linear in x and y, a box inside pools to their values at its bins' centres.
    """
    impl, rois, *options = _check(features, rois, None, output_size, strides, sampling_ratio, impl)
    if not aligned:
        rois = _unaligned(rois, options[1])
    if impl == "torch":
        return roi_align_reference(features, rois, *options)
    return _pool(features, rois.detach().float().contiguous(), None, *options, 0.0, False)


def deform_roi_pool(
    features: Sequence[Tensor],
    rois: Tensor | Sequence[Tensor],
    offsets: Tensor | None,
    output_size: int | tuple[int, int],
    strides: Sequence[int],
    sampling_ratio: int = 2,
    gamma: float = 0.1,
    impl: str = "auto",
) -> Tensor:
    """roi_align whose bins are moved by learned offsets, leaving out samples beyond the map's edge.

    Shapes: features L x [B, C, Hi, Wi], rois [R, 5] or B x [Ri, 4], offsets [R, 2, S, S] or None ->
    [R, C, S, S].
    Units: offsets are dx, dy as fractions of the RoI's width and height, before gamma.
    impl: as for roi_align.
    Raises: ValueError for inconsistent arguments, or an impl that cannot run on them.
    Invariant: with zero offsets and every sample inside the map it equals roi_align.
    """
    impl, rois, *options = _check(
        features, rois, offsets, output_size, strides, sampling_ratio, impl
    )
    if impl == "torch":
        return deform_roi_pool_reference(features, rois, offsets, *options, gamma)
    offsets = None if offsets is None else offsets.float().contiguous()
    return _pool(features, rois.detach().float().contiguous(), offsets, *options, gamma, True)


def _unaligned(rois: Tensor, strides: Sequence[int]) -> Tensor:
    """RoIs whose aligned grid is the grid that aligned=False puts over the given ones."""
    level = roi_level(rois, strides)[:, None]
    stride = torch.zeros_like(rois[:, :1])  # [R, 1]
    for i, value in enumerate(strides):
        stride = stride.masked_fill(level == i, value)
    low, high = rois[:, 1:3], rois[:, 3:5]
    high = torch.maximum(high, low + stride)
    return torch.cat([rois[:, :1], low + stride / 2, high + stride / 2], 1)


def _whole(name: str, value) -> int:
    if not isinstance(value, (int, float)) or value % 1 != 0:
        raise ValueError(f"{name} must be whole, not {value!r}")
    return int(value)


def _one_tensor(rois, batch: int) -> Tensor:
    """RoIs as one tensor [R, 5]; a list holds the boxes [Ri, 4] of each image."""
    if isinstance(rois, Tensor):
        return rois
    if not isinstance(rois, (list, tuple)) or len(rois) != batch:
        raise ValueError(f"rois must be a tensor [R, 5] or a list of {batch} tensors, one an image")
    if any(not isinstance(b, Tensor) or b.dim() != 2 or b.shape[1] != 4 for b in rois):
        raise ValueError("a list of rois must hold tensors [Ri, 4], one for each image")
    return torch.cat([F.pad(b, (1, 0), value=i) for i, b in enumerate(rois)])


def _check(features, rois, offsets, size, strides, sampling_ratio, impl):
    """Refuse what no path could handle: the implementation's name, rois [R, 5], and the sizes."""
    if not all(isinstance(v, (list, tuple)) for v in (features, strides)):
        kinds = f"{type(features).__name__} and {type(strides).__name__}"
        raise ValueError(f"features and strides must be lists, finest first, not {kinds}")
    if not features or len(features) != len(strides) or any(f.dim() != 4 for f in features):
        raise ValueError(
            f"{len(strides)} strides need as many maps [B, C, H, W]: {len(features)} given"
        )
    strides = [_whole("strides, input pixels per cell,", stride) for stride in strides]
    if isinstance(size, (list, tuple)):
        if len(size) != 2 or size[0] != size[1]:
            raise ValueError(f"output_size must be one number or a pair of equal ones: {size}")
        size = size[0]
    size, sampling_ratio = _whole("output_size", size), _whole("sampling_ratio", sampling_ratio)
    rois = _one_tensor(rois, features[0].shape[0])
    first = features[0]
    if any(f.shape[:2] != first.shape[:2] or 0 in f.shape for f in features):
        raise ValueError(
            f"maps must share B and C, none empty: {[tuple(f.shape) for f in features]}"
        )
    if any(f.dtype != first.dtype for f in features):
        raise ValueError(f"maps must share one dtype: {[f.dtype for f in features]}")
    if min(strides) < 1 or any(a >= b for a, b in zip(strides, strides[1:])):
        raise ValueError(f"strides must be positive and increase: {list(strides)}")
    if size < 1 or sampling_ratio < 1:
        raise ValueError(
            f"output_size {size} and sampling_ratio {sampling_ratio} must be at least 1"
        )
    if rois.dim() != 2 or rois.shape[1] != 5 or not rois.is_floating_point():
        raise ValueError(f"rois must be floating [R, 5]: {rois.dtype} {tuple(rois.shape)}")
    if offsets is not None and offsets.shape != (rois.shape[0], 2, size, size):
        raise ValueError(f"offsets must be [R, 2, {size}, {size}]: {tuple(offsets.shape)}")
    if any(t is not None and t.device != first.device for t in (*features, rois, offsets)):
        raise ValueError("maps, rois and offsets must be on one device")
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl must be 'auto', 'triton' or 'torch', not {impl!r}")
    supported = triton is not None and first.dtype in (torch.float32, torch.float16, torch.bfloat16)
    if impl == "auto":
        impl = "triton" if supported and first.is_cuda else "torch"
    elif impl == "triton" and not (supported and (first.is_cuda or INTERPRETED)):
        raise ValueError(
            "impl='triton' needs triton, float32, float16 or bfloat16 maps, and CUDA tensors (or "
            f"TRITON_INTERPRET=1 from the start); the maps are {first.dtype} on {first.device}"
        )
    return impl, rois, size, strides, sampling_ratio
