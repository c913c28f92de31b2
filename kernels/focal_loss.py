"""Sigmoid focal loss (Lin et al., 2017) with one label per row: loss and slope in one pass.

Contract
    logits     [M, K] of any strides, K at least 1: a row is an anchor, a column a class.
    labels     [M] integers: 0..K-1 the true class, K or more background, below 0 ignored.
    result     [M] float32, or float64 for float64 logits (which Triton refuses): the sum over
               the classes of a_t (1 - p_t)^gamma (-log p_t). With p = sigmoid(logit), the true
               class has p_t = p and a_t = alpha, every other class p_t = 1 - p and
               a_t = 1 - alpha. Ignored rows give 0.
    exact      nothing cancels: the loss of a confident positive, far below that of the same
               logit as a negative, keeps its relative precision. Finite logits give finite
               losses.
    gradient   to the logits, in their dtype; 0 for an ignored row of finite logits. Double
               backward raises RuntimeError (the reference supports it).
    empty      M = 0 gives [0].
    memory     the backward pass needs one buffer of the logits' size, the slope; without
               gradients there is none. There is no one-hot target. bfloat16 logits keep a
               bfloat16 slope. float16 logits keep a float32 one, because most slopes are below
               float16's smallest number, and a scaled loss must not lose them.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, library

# --- reference ------------------------------------------------------------------------------


def focal_loss_reference(
    logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Plain torch with a one-hot target: any device, any float dtype, differentiable."""
    true = labels[:, None] == torch.arange(logits.shape[1], device=labels.device)  # [M, K]
    logits = logits.to(_compute_dtype(logits))
    wrong = torch.where(true, -logits, logits)  # sigmoid(wrong) = 1 - p_t
    weight = torch.where(true, alpha, 1 - alpha) * wrong.sigmoid() ** gamma
    loss = weight * -F.logsigmoid(-wrong)  # [M, K]
    return torch.where(labels >= 0, loss.sum(1), 0)


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _slope_dtype(logits: Tensor) -> torch.dtype:
    return torch.float32 if logits.dtype == torch.float16 else logits.dtype


# --- torch: the reference in chunks, with the slope written by hand -------------------------


def _torch_forward(logits, labels, alpha, gamma, want_slope) -> tuple[Tensor, Tensor]:
    """Loss [M] and slope [M, K] (empty unless wanted).

    First treat every entry as a negative, then replace the M entries of true classes. This
    needs no one-hot target.
    """
    M, K = logits.shape
    dtype = _compute_dtype(logits)
    loss = logits.new_empty(M, dtype=dtype)
    slope = _empty_slope(logits, want_slope)
    # The true classes' entries; every tensor here is [M, 1].
    foreground = ((labels >= 0) & (labels < K))[:, None]
    true = labels.clamp(0, K - 1)[:, None].long()
    logit = logits.gather(1, true).to(dtype)
    rest = (-logit).sigmoid()  # 1 - p
    entropy = F.softplus(-logit)  # -log p
    weight = alpha * rest**gamma
    true_loss = weight * entropy
    true_slope = -weight * (rest + gamma * logit.sigmoid() * entropy)
    # On a CPU a chunk should stay in the cache; on a GPU few chunks are best.
    rows = max(1, 2 ** (17 if logits.device.type == "cpu" else 24) // K)
    for part in (slice(i, i + rows) for i in range(0, M, rows)):
        chunk = logits[part].to(dtype)
        probs, entropies = chunk.sigmoid(), F.softplus(chunk)
        weights = (probs**gamma).mul_(1 - alpha)
        terms = weights * entropies
        # Replaced before the sum, because a confident positive's loss is far below its loss
        # as a negative.
        own = torch.where(foreground[part], true_loss[part], terms.gather(1, true[part]))
        loss[part] = terms.scatter_(1, true[part], own).sum(1)
        if want_slope:  # weight' = weight gamma (1 - probs), entropy' = probs
            entropies.mul_(gamma * (1 - probs)).add_(probs)
            torch.mul(entropies, weights, out=slope[part])
    if want_slope:
        own = torch.where(foreground, true_slope.to(slope.dtype), slope.gather(1, true))
        slope.scatter_(1, true, own)
    return torch.where(labels >= 0, loss, 0), slope


def _empty_slope(logits: Tensor, want_slope: bool) -> Tensor:
    like = logits if want_slope else logits.new_empty(0)
    return torch.empty_like(like, dtype=_slope_dtype(logits))


# --- Triton ---------------------------------------------------------------------------------

try:
    import triton
    import triton.language as tl
except ImportError:  # the kernels then stay plain functions that nobody calls
    triton, tl = None, SimpleNamespace(constexpr=None)

# choice: 16 columns divide COCO's 80 classes, and fill two 32-byte sectors of float32.
_MAX_COLUMNS = 16
_TILE = 512  # rows times columns


def jit(*sizes: str):
    """triton.jit that does not specialise on `sizes`: arguments that change every batch."""
    return triton.jit(do_not_specialize=sizes) if triton else lambda function: function


@jit()
def _power(base, EXPONENT: tl.constexpr):
    """base ** EXPONENT for a base in [0, 1]; logarithms only if no product gives it."""
    if EXPONENT == 0.0:
        return tl.zeros_like(base) + 1.0
    elif EXPONENT == 1.0:
        return base
    elif EXPONENT == 2.0:
        return base * base
    else:
        return tl.exp2(EXPONENT * tl.log2(base))


@jit()
def _log1p(x):
    """log(1 + x) for x in [0, 1], as 2 artanh(x / (2 + x)): 1 + x would round a small x."""
    s = x / (2.0 + x)  # at most 1/3, so eight terms leave an error of 2e-9
    t = s * s
    series = 1.0 / 13 + t * (1.0 / 15)
    series = 1.0 / 9 + t * (1.0 / 11 + t * series)
    series = 1.0 / 5 + t * (1.0 / 7 + t * series)
    return 2.0 * s * (1.0 + t * (1.0 / 3 + t * series))


@jit("M")
def _focal_kernel(
    logits_ptr,  # [M, K], strides below
    labels_ptr,  # [M] contiguous
    loss_ptr,  # [M] float32
    slope_ptr,  # [M, K], strides below; written if SLOPE
    M,
    K,
    row_stride,
    column_stride,
    slope_row_stride,
    slope_column_stride,
    alpha,
    GAMMA: tl.constexpr,
    SLOPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # Grid (cdiv(M, ROWS),): a program owns ROWS rows and loops over their columns.
    # With z = -logit for the true class and logit for any other, q = sigmoid(z) = 1 - p_t:
    #   term  = a_t q^gamma softplus(z)
    #   slope = +- a_t q^gamma (gamma (1 - q) softplus(z) + q), with - for the true class.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # M * K may pass 2**31
    label = tl.load(labels_ptr + row, row < M, -1)[:, None]  # [ROWS, 1]
    counted = label >= 0
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    first = K * 0
    while first < K:
        column = first + tl.arange(0, COLUMNS)[None, :]  # [1, COLUMNS]
        mask = (row < M)[:, None] & (column < K)
        at = row[:, None] * row_stride + column * column_stride
        logit = tl.load(logits_ptr + at, mask, 0.0).to(tl.float32)
        true = label == column
        sign = tl.where(true, -1.0, 1.0)
        z = sign * logit
        small = tl.exp(-tl.abs(z))
        larger = 1.0 / (1.0 + small)  # of sigmoid(z) and sigmoid(-z)
        smaller = small / (1.0 + small)
        q = tl.where(z >= 0, larger, smaller)
        rest = tl.where(z >= 0, smaller, larger)
        entropy = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL) + _log1p(small)
        weight = tl.where(true, alpha, 1.0 - alpha) * _power(q, GAMMA)
        total += tl.where(mask & counted, weight * entropy, 0.0)
        if SLOPE:
            slope = sign * weight * (GAMMA * rest * entropy + q)
            at = row[:, None] * slope_row_stride + column * slope_column_stride
            tl.store(slope_ptr + at, tl.where(counted, slope, 0.0), mask)
        first += COLUMNS
    tl.store(loss_ptr + row, tl.sum(total, 1), row < M)


# If TRITON_INTERPRET was on when triton was imported, kernels run on CPU tensors.
INTERPRETED = triton is not None and not isinstance(_focal_kernel, triton.JITFunction)


def _triton_forward(logits, labels, alpha, gamma, want_slope) -> tuple[Tensor, Tensor]:
    M, K = logits.shape
    loss = logits.new_empty(M, dtype=torch.float32)
    slope = _empty_slope(logits, want_slope)
    if M == 0:
        return loss, slope
    columns = min(_MAX_COLUMNS, triton.next_power_of_2(K))
    # Unless K is a multiple of 16, every element has an address of its own. A whole tile then
    # may spill two registers, as for K = 10 on sm_90.
    rows = (_TILE if K % 16 == 0 else _TILE // 2) // columns
    slope_strides = slope.stride() if want_slope else (0, 0)
    with torch.cuda.device_of(logits):
        _focal_kernel[(triton.cdiv(M, rows),)](
            logits, labels.contiguous(), loss, slope, M, K, *logits.stride(), *slope_strides,
            alpha, GAMMA=gamma, SLOPE=want_slope, ROWS=rows, COLUMNS=columns, num_warps=4,
            enable_fp_fusion=True,  # explicit: Triton announced another default
        )  # fmt: skip
    return loss, slope


# --- the operator: a compiled graph keeps it whole; it never waits for the device -----------


# The namespace is this module's name, so that copies of the file do not clash.
@library.custom_op(f"{__name__.replace('.', '_')}::focal_loss", mutates_args=())
def _focal(
    logits: Tensor, labels: Tensor, alpha: float, gamma: float, want_slope: bool, impl: str
) -> tuple[Tensor, Tensor]:
    forward = _triton_forward if impl == "triton" else _torch_forward
    return forward(logits, labels, alpha, gamma, want_slope)


@_focal.register_fake
def _(logits, labels, alpha, gamma, want_slope, impl):
    loss = logits.new_empty(logits.shape[0], dtype=_compute_dtype(logits))
    return loss, _empty_slope(logits, want_slope)


def _setup_context(ctx, inputs, output):
    logits, labels = inputs[:2]
    ctx.dtype = logits.dtype
    ctx.save_for_backward(output[1], labels)
    ctx.set_materialize_grads(False)


def _backward(ctx, gradient, slope_gradient):
    if slope_gradient is not None:
        raise RuntimeError("focal_loss has no second derivative; focal_loss_reference has one")
    if gradient is None:
        return (None,) * 6
    slope, labels = ctx.saved_tensors
    gradient = torch.where(labels >= 0, gradient, 0)[:, None]  # [M, 1]
    return (slope * gradient).to(ctx.dtype), None, None, None, None, None


_focal.register_autograd(_backward, setup_context=_setup_context)


# --- public function ------------------------------------------------------------------------


def focal_loss(
    logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0, impl: str = "auto"
) -> Tensor:
    """Sigmoid focal loss of each row; label K is background, -1 ignored (contract above).

    Shapes: logits [M, K], labels [M] -> [M].
    impl: "auto" is Triton on CUDA and "torch" elsewhere. "triton" needs CUDA, or CPU tensors
        with TRITON_INTERPRET=1.
    Raises: ValueError for other shapes, or an impl that cannot run on them.
    Invariant: with gamma = 0 and alpha = 1/2 it is half the binary cross-entropy.

    >>> focal_loss(torch.zeros(2, 1), torch.tensor([0, 1]))  # ln 2 / 16 and 3 ln 2 / 16
    tensor([0.0433, 0.1300])
    """
    if logits.dim() != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating [M, K]: {logits.dtype} {[*logits.shape]}")
    if labels.shape != logits.shape[:1] or labels.is_floating_point() or labels.is_complex():
        M = logits.shape[0]
        raise ValueError(f"labels must be integers [{M}]: {labels.dtype} {[*labels.shape]}")
    if labels.device != logits.device:
        raise ValueError(f"logits are on {logits.device}, labels on {labels.device}")
    if not gamma >= 0:
        raise ValueError(f"gamma must not be negative: {gamma}")
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    usable = triton is not None and logits.dtype in dtypes
    if impl == "auto":
        impl = "triton" if usable and logits.is_cuda else "torch"
    elif impl == "triton":
        if not (usable and (logits.is_cuda or INTERPRETED)):
            raise ValueError(
                "impl='triton' needs triton, float32, float16 or bfloat16 logits, and CUDA "
                f"tensors (or TRITON_INTERPRET=1): they are {logits.dtype} on {logits.device}"
            )
    elif impl != "torch":
        raise ValueError(f"impl must be auto, triton or torch, not {impl!r}")
    want_slope = torch.is_grad_enabled() and logits.requires_grad
    return _focal(logits, labels, float(alpha), float(gamma), want_slope, impl)[0]
