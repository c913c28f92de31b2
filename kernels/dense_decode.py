"""Dense local regression, decoded (D2Det, section 3.1): S x S cells vote for a proposal's box.

Contract

- `proposals` [R, 4] are xyxy in pixels. `offsets` [R, 4, S, S] are the distances (l, t, r, b)
  from a cell's centre to the object's sides, as fractions of the proposal's width and height.
  `overlap_logits` [R, 1, S, S] are above 0 where the cell lies on the object.
- A cell's centre (x, y) is the centre of its bin if the proposal is cut into S x S equal bins.
  Its box is (x - l w, y - t h, x + r w, y + b h), where w and h are the proposal's.
- The result [R, 4] float32 is the mean box of the cells whose logit is > 0, strictly. A NaN
  logit does not count. If no cell qualifies, the result is the mean box of all cells. R = 0
  gives an empty result.
- Given `image_sizes`, one pair (h, w) or a tensor [R, 2] of them, x is clipped to [0, w] and y
  to [0, h]. Otherwise nothing is clipped.
- Inputs may be float16 or bfloat16 and have any strides. Sums are float32, even in autocast.
- The function is for inference: a backward pass through its result raises RuntimeError.
  `decode_dense_reference`, plain torch, is differentiable.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, library


def decode_dense_reference(
    proposals: Tensor,
    offsets: Tensor,
    overlap_logits: Tensor,
    image_sizes: Tensor | Sequence[float] | None = None,
) -> Tensor:
    """Plain torch, any device, differentiable; float64 if proposals or offsets are."""
    R, _, S, _ = offsets.shape
    dtype = torch.promote_types(proposals.dtype, offsets.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    x1, y1, x2, y2 = proposals.to(dtype)[:, :, None, None].unbind(1)  # [R, 1, 1]
    w, h = x2 - x1, y2 - y1
    bins = (torch.arange(S, device=proposals.device, dtype=dtype) + 0.5) / S
    x, y = x1 + bins * w, y1 + bins[:, None] * h  # [R, 1, S], [R, S, 1]
    left, top, right, bottom = offsets.to(dtype).unbind(1)  # [R, S, S]
    boxes = torch.stack([x - left * w, y - top * h, x + right * w, y + bottom * h], 1)
    on_object = overlap_logits > 0  # [R, 1, S, S]
    used = on_object | ~on_object.any(-1, keepdim=True).any(-2, keepdim=True)
    box = boxes.where(used, 0).sum((-2, -1)) / used.sum((-2, -1))  # [R, 4]
    if image_sizes is not None:
        sizes = torch.as_tensor(image_sizes, device=box.device, dtype=dtype).expand(R, 2)
        box = torch.minimum(box.clamp(min=0), sizes.flip(1).repeat(1, 2))  # [R, (w, h, w, h)]
    return box


try:
    import triton
    import triton.language as tl
except ImportError:  # the kernels then stay plain functions that nobody calls
    triton, tl = None, SimpleNamespace(constexpr=None)

_CELLS_PER_PROGRAM = 256  # eight for each thread of one warp, whose sums need no barrier


def jit(*sizes: str):
    """triton.jit that does not specialise on `sizes`: arguments that change every batch."""
    return triton.jit(do_not_specialize=sizes) if triton else lambda function: function


@jit()
def _mean(values, used, count):
    return tl.sum(tl.where(used, values, 0.0), 1) / count


@jit()
def _clip(value, limit):
    value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(value, limit, propagate_nan=tl.PropagateNan.ALL)


@jit("R")
def _decode_kernel(
    proposals_ptr,  # [R, 4] contiguous
    offsets_ptr,  # [R, 4, S, S], strides below
    logits_ptr,  # [R, 1, S, S], strides below
    sizes_ptr,  # [R, 2] (h, w) float32, read if CLIP == 2
    out_ptr,  # [R, 4] float32
    R,
    height,  # used if CLIP == 1
    width,
    off_r,
    off_c,
    off_y,
    off_x,
    log_r,
    log_y,
    log_x,
    S: tl.constexpr,
    CELLS: tl.constexpr,  # S * S rounded up to a power of two
    ROIS: tl.constexpr,
    CLIP: tl.constexpr,
):
    # Grid (cdiv(R, ROIS),): a program owns ROIS proposals, [ROIS, CELLS] values in registers.
    roi = tl.program_id(0) * ROIS + tl.arange(0, ROIS)
    cell = tl.arange(0, CELLS)
    row, column = cell // S, cell % S
    valid = roi < R
    mask = valid[:, None] & (cell < S * S)[None, :]  # [ROIS, CELLS]
    roi = roi.to(tl.int64)  # R * 4 * S * S may pass 2**31

    logits = logits_ptr + roi[:, None] * log_r + (row * log_y + column * log_x)[None, :]
    on_object = tl.load(logits, mask, 0.0).to(tl.float32) > 0
    num = tl.sum(on_object.to(tl.int32), 1)  # [ROIS]
    used = on_object | (mask & (num == 0)[:, None])
    count = tl.where(num == 0, S * S, num).to(tl.float32)

    cells = offsets_ptr + roi[:, None] * off_r + (row * off_y + column * off_x)[None, :]
    left = tl.load(cells, mask, 0.0).to(tl.float32)
    top = tl.load(cells + off_c, mask, 0.0).to(tl.float32)
    right = tl.load(cells + 2 * off_c, mask, 0.0).to(tl.float32)
    bottom = tl.load(cells + 3 * off_c, mask, 0.0).to(tl.float32)

    x1 = tl.load(proposals_ptr + roi * 4, valid, 0.0).to(tl.float32)
    y1 = tl.load(proposals_ptr + roi * 4 + 1, valid, 0.0).to(tl.float32)
    w = tl.load(proposals_ptr + roi * 4 + 2, valid, 0.0).to(tl.float32) - x1
    h = tl.load(proposals_ptr + roi * 4 + 3, valid, 0.0).to(tl.float32) - y1
    # The mean of x1 + (u -/+ offset) w is x1 + w * mean(u -/+ offset), u in [0, 1].
    u = ((column + 0.5) / S)[None, :]
    v = ((row + 0.5) / S)[None, :]
    left = x1 + w * _mean(u - left, used, count)
    top = y1 + h * _mean(v - top, used, count)
    right = x1 + w * _mean(u + right, used, count)
    bottom = y1 + h * _mean(v + bottom, used, count)
    if CLIP == 2:
        height = tl.load(sizes_ptr + roi * 2, valid, 0.0)
        width = tl.load(sizes_ptr + roi * 2 + 1, valid, 0.0)
    if CLIP > 0:
        left = _clip(left, width)
        top = _clip(top, height)
        right = _clip(right, width)
        bottom = _clip(bottom, height)
    tl.store(out_ptr + roi * 4, left, valid)
    tl.store(out_ptr + roi * 4 + 1, top, valid)
    tl.store(out_ptr + roi * 4 + 2, right, valid)
    tl.store(out_ptr + roi * 4 + 3, bottom, valid)


# If TRITON_INTERPRET was on when triton was imported, kernels run on CPU tensors.
INTERPRETED = triton is not None and not isinstance(_decode_kernel, triton.JITFunction)


def _decode(
    proposals: Tensor, offsets: Tensor, overlap_logits: Tensor, sizes: Tensor | None,
    height: float, width: float, impl: str,
) -> Tensor:  # fmt: skip
    """Decode checked arguments. Clip to `sizes`, else to height and width if not negative."""
    R, _, S, _ = offsets.shape
    if impl == "torch":
        image_sizes: Tensor | tuple[float, float] | None = sizes
        if sizes is None and height >= 0:
            image_sizes = (height, width)
        return decode_dense_reference(proposals, offsets, overlap_logits, image_sizes).float()
    out = torch.empty((R, 4), dtype=torch.float32, device=offsets.device)
    if R == 0:
        return out
    if sizes is None:
        clip = 1 if height >= 0 else 0
        sizes = out  # not read
    else:
        clip = 2
        sizes = sizes.to(torch.float32).contiguous()
    cells = triton.next_power_of_2(S * S)
    rois = max(1, _CELLS_PER_PROGRAM // cells)
    log_r, _, log_y, log_x = overlap_logits.stride()
    with torch.cuda.device_of(out):
        _decode_kernel[(triton.cdiv(R, rois),)](
            proposals.contiguous(), offsets, overlap_logits, sizes, out, R, height, width,
            *offsets.stride(), log_r, log_y, log_x, S=S, CELLS=cells, ROIS=rois, CLIP=clip,
            num_warps=1, enable_fp_fusion=True,  # explicit: Triton announced another default
        )  # fmt: skip
    return out


# A graph that is being compiled sees one opaque operator; eager calls skip the dispatcher. The
# operator's namespace is this module's name, so that copies of the file do not clash.
_NAMESPACE = __name__.replace(".", "_")
_decode_op = library.custom_op(f"{_NAMESPACE}::decode", _decode, mutates_args=())


@_decode_op.register_fake
def _(proposals, offsets, overlap_logits, sizes, height, width, impl):
    return proposals.new_empty(proposals.shape, dtype=torch.float32)


def _no_backward(ctx, grad):
    raise RuntimeError("decode_dense_offsets has no gradient; decode_dense_reference has one")


_decode_op.register_autograd(_no_backward)


def decode_dense_offsets(
    proposals: Tensor,
    offsets: Tensor,
    overlap_logits: Tensor,
    image_sizes: Tensor | Sequence[float] | None = None,
    impl: str = "auto",
) -> Tensor:
    """Mean box of the cells that lie on the object (D2Det, section 3.1; contract above).

    Shapes: proposals [R, 4], offsets [R, 4, S, S], overlap_logits [R, 1, S, S], image_sizes
        None, (h, w) or [R, 2] -> [R, 4] float32.
    impl: "auto" is Triton on CUDA and "torch" elsewhere. "triton" needs CUDA, or CPU tensors
        with TRITON_INTERPRET=1.
    Raises: ValueError for other shapes, mixed devices, or an impl that cannot run here;
        RuntimeError in a backward pass.
    Invariant: if every cell's offsets reach the same box, the result is that box.
    """
    R, S = offsets.shape[0], offsets.shape[-1]
    if offsets.shape != (R, 4, S, S) or S == 0:
        raise ValueError(f"offsets must be [R, 4, S, S], not {[*offsets.shape]}")
    if overlap_logits.shape != (R, 1, S, S):
        shape = [*overlap_logits.shape]
        raise ValueError(f"overlap_logits must be {[R, 1, S, S]}, not {shape}")
    if proposals.shape != (R, 4):
        raise ValueError(f"proposals must be {[R, 4]}, not {[*proposals.shape]}")
    if not proposals.device == offsets.device == overlap_logits.device:
        raise ValueError("proposals, offsets and overlap_logits are on different devices")
    sizes, height, width = None, -1.0, -1.0
    if isinstance(image_sizes, Tensor):
        sizes = image_sizes
        if sizes.shape != (R, 2) or sizes.device != offsets.device:
            where = f"{[R, 2]} on {offsets.device}"
            raise ValueError(f"image_sizes must be {where}, or a pair (h, w)")
    elif image_sizes is not None:
        if len(image_sizes) != 2 or not all(isinstance(v, (int, float)) for v in image_sizes):
            raise ValueError(f"image_sizes must be (h, w) or {[R, 2]}, not {image_sizes}")
        height, width = (float(size) for size in image_sizes)
        if not (height >= 0 and width >= 0):
            raise ValueError(f"image_sizes must not be negative: {image_sizes}")
    if impl == "auto":
        impl = "triton" if offsets.is_cuda and triton is not None else "torch"
    elif impl == "triton":
        if triton is None or not (offsets.is_cuda or INTERPRETED):
            device = offsets.device
            raise ValueError(f"impl='triton' needs triton and CUDA tensors, not {device}")
    elif impl != "torch":
        raise ValueError(f"impl must be auto, triton or torch, not {impl!r}")
    tensors = (proposals, offsets, overlap_logits)
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    # Only a compiler and a backward pass, which must raise, need the operator.
    function = _decode_op if gradient or torch.compiler.is_compiling() else _decode
    return function(proposals, offsets, overlap_logits, sizes, height, width, impl)
