"""Detection ops, each with a plain torch reference and a Triton implementation.

Every file of a kernel also works when copied alone, and the folder works inside any other
package. They need torch and numpy, and use triton and torchvision if installed.
`python -m kernels.bench` checks and times all ops; it needs torchvision.
"""

from .dense_decode import decode_dense_offsets
from .focal_loss import focal_loss
from .nms import batched_nms, nms, nms_padded
from .roi_align import deform_roi_pool, roi_align, roi_level
from .soft_cl_nms import cl_nms, cl_nms_padded, soft_nms, soft_nms_padded

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
