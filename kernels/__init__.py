"""Detection ops with a plain torch reference, a Triton implementation and a benchmark each.

Every file here also works when copied alone, and the folder wherever it is copied: it needs torch
and numpy, and uses triton and torchvision where they are installed. `python -m kernels.bench`,
which needs torchvision, checks and times all of them.
"""

from .dense_decode import decode_dense_offsets
from .focal_loss import focal_loss
from .nms import (
    batched_nms,
    cl_nms,
    cl_nms_padded,
    nms,
    nms_padded,
    soft_nms,
    soft_nms_padded,
)
from .roi_align import deform_roi_pool, roi_align, roi_level

__all__ = [
    "batched_nms",
    "cl_nms",
    "cl_nms_padded",
    "decode_dense_offsets",
    "deform_roi_pool",
    "focal_loss",
    "nms",
    "nms_padded",
    "roi_align",
    "roi_level",
    "soft_nms",
    "soft_nms_padded",
]
