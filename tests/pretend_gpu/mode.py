"""Works out on the CPU what the kernels of the pretended GPU (cuda.c) leave undone.

torch's own CUDA code runs first: it checks devices, allocates, launches, copies and waits. Then the
same operator runs on CPU tensors over the same memory, so that results have the CPU's values. The
CPU runs alone where cuDNN, cuBLAS or NVRTC would, and where a result's size depends on values.
Triton's kernels do nothing either, after the Python that launches them; their references give the
values. On its way the mode notes where the host waits for the GPU, and large operators whose
tensors differ in dtype or in layout.
"""

import ctypes
import importlib
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from kernels import dense_decode

roi_align = importlib.import_module("kernels.roi_align")  # in the package: the function
ROOT = Path(__file__).resolve().parent.parent.parent
LARGE = 4096  # elements
THREAD = ThreadPoolExecutor(1)
PRODUCTS = {f"aten::{name}" for name in "mm addmm bmm baddbmm mv dot prod".split()}
PRODUCTS |= {"aten::convolution", "aten::convolution_backward"}
SIZED_BY_VALUES = {
    f"aten::{name}" for name in "nonzero masked_select _unique2 unique_consecutive bincount".split()
} | {"aten::repeat_interleave", "torchvision::nms"}
WITHOUT_VALUES = {
    f"aten::{name}"
    for name in "empty empty_strided empty_like new_empty new_empty_strided set_ resize_ "
    "record_stream is_pinned _pin_memory".split()
}
CONVERT = {"aten::copy_", "aten::_to_copy", "aten::convolution_backward"}
library = ctypes.CDLL(None)
library.pretend_waits.restype = ctypes.c_longlong


def on_cpu(x):
    """A CPU tensor over the memory of a tensor of the GPU; other arguments, moved to the CPU."""
    if isinstance(x, torch.device):
        return torch.device("cpu")
    if isinstance(x, torch.Generator):  # each draw of a GPU's generator is the first here
        return torch.Generator().manual_seed(x.initial_seed())
    if not isinstance(x, Tensor) or not x.is_cuda:
        return x
    storage = x.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    memory = storage.data_ptr(), torch.device("cpu"), storage.nbytes()
    whole = torch._C._construct_storage_from_data_pointer(*memory)
    return torch.empty(0, dtype=x.dtype).set_(whole, x.storage_offset(), x.shape, x.stride())


def on_gpu(x, device, dtype=None):
    """A copy on the GPU of a result that the CPU made alone."""
    if not isinstance(x, Tensor):
        return x
    dtype = dtype if x.is_floating_point() else None
    made = torch.empty_strided(x.shape, x.stride(), dtype=dtype or x.dtype, device=device)
    on_cpu(made).copy_(x)
    return made


def place() -> str:
    """The file and function of the project that asked for what is done now."""
    frame = sys._getframe(1)
    while frame:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT) and not file.is_relative_to(ROOT / "tests"):
            return f"{file.relative_to(ROOT)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "backward"


def layout(x: Tensor) -> str | None:
    """channels_last or contiguous, if the tensor is only one of them."""
    kinds = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    if x.dim() != 4:
        return None
    found = [name for name, kind in kinds.items() if x.is_contiguous(memory_format=kind)]
    return found[0] if len(found) == 1 else None


class PretendedGPU(TorchDispatchMode):
    """`waits` and `mixed` count, by place, what the operators so far did."""

    def __init__(self):
        super().__init__()
        self.forget()
        stop_triton()
        decode = dense_decode._decode  # which need not be an operator
        dense_decode._decode = lambda *args: self.launch("decode", decode, args)

    def forget(self) -> None:
        """Begin to count anew."""
        self.counting = True
        self.waited = library.pretend_waits()  # those that are noted
        self.waits: Counter = Counter()
        self.mixed: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        gpu = [x for x in tensors if x.is_cuda]
        if not gpu and not any(isinstance(x, torch.device) and x.type == "cuda" for x in leaves):
            return func(*args, **kwargs)
        name = func._schema.name
        self.note_waits("before " + name)  # indexing by a list copies it to the GPU first
        if name in OPDEFS:
            with self:
                return self.launch(name.split("::")[1], OPDEFS[name]._init_fn, args)
        self.note_mixed(name, gpu)
        masked = by_mask(name, args)
        if name in PRODUCTS | SIZED_BY_VALUES or masked:
            devices = {x.device for x in tensors if x.dim()}
            assert len(devices) == 1, f"{name}: {devices}"
            if name not in PRODUCTS:
                for _ in range(max(1, masked)):
                    torch.cuda.current_stream(gpu[0].device).synchronize()
                self.note_waits(name)
            return alone(func, name, args, kwargs, gpu[0])
        out = func(*args, **kwargs)
        self.note_waits(name)
        if func.is_view or name in WITHOUT_VALUES:
            return out
        if name in ("aten::_to_copy", "aten::copy_") and arrives_by_itself(out, tensors):
            return out
        result = func(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs))
        for mine, value in zip(tree_leaves(out), tree_leaves(result)):
            # each kind of device leaves some of an operator's buffers empty
            if isinstance(mine, Tensor) and mine.numel() and value.numel():
                if mine.data_ptr() != value.data_ptr():
                    on_cpu(mine).copy_(value)
        return out if isinstance(tree_leaves([out, None])[0], Tensor | None) else result

    def launch(self, name: str, operator, args):
        """The result of a kernel's operator: its Python first, then its reference's values."""
        out = operator(*args)
        if name == "cut" or not any(isinstance(x, Tensor) and x.is_cuda for x in args[:3]):
            return out
        # in a thread of its own, where gradients are recorded and this mode is off
        reference = THREAD.submit(reference_values, name, operator, tree_map(on_cpu, args))
        for mine, value in zip(tree_leaves(out), tree_leaves(reference.result())):
            assert mine.shape == value.shape, (name, mine.shape, value.shape)
            if mine.numel():
                on_cpu(mine).copy_(value)
        return out

    def note_waits(self, name: str) -> None:
        """Note the waits since the last note."""
        number = library.pretend_waits() - self.waited
        self.waited += number
        if number and self.counting:
            self.waits[f"{name} {place()}"] += number

    def note_mixed(self, name: str, gpu: list[Tensor]) -> None:
        """Note an operator of large tensors of several dtypes or layouts, unless it converts."""
        most = max((x.numel() for x in gpu), default=0)
        large = [x for x in gpu if x.numel() >= max(LARGE, most / 4)]
        if not self.counting or name in CONVERT:
            return
        kinds = {x.dtype for x in large if x.is_floating_point()}
        layouts = {layout(x) for x in large} - {None}
        if name != "aten::convolution" and len(layouts) > 1:
            self.mixed[f"layout {name} {place()}"] += 1
        if len(kinds) > 1:
            self.mixed[f"dtype {name} {place()}"] += 1


def by_mask(name: str, args) -> int:
    """How many masks an indexing operator has to count on the GPU, for which the host waits."""
    if name not in ("aten::index", "aten::index_put", "aten::index_put_"):
        return 0
    masks = sum(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    filled = name != "aten::index" and len(args[1]) == 1 and args[2].numel() == 1
    return 0 if filled else masks


def arrives_by_itself(out: Tensor, tensors: list[Tensor]) -> bool:
    """Whether a copy to the CPU converts nothing: then it holds its values once it has arrived."""
    source = tensors[-1]
    return not out.is_cuda and out.dtype == source.dtype and source.is_contiguous()


def alone(func, name: str, args, kwargs, like: Tensor):
    """The result of an operator that the CPU runs alone; products of half precision in float32."""

    def given(x):
        x = on_cpu(x)
        half = isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16)
        return x.float() if half and name in PRODUCTS else x

    result = func(*tree_map(given, args), **tree_map(given, kwargs))
    if func._schema.is_mutable:
        return args[0]
    dtype = like.dtype if name in PRODUCTS else None
    return tree_map(lambda x: on_gpu(x, like.device, dtype), result)


def reference_values(name: str, operator, args):
    """What a kernel's operator returns, from CPU tensors and without Triton."""
    if name == "pool":
        return roi_align.pool_reference(*args)
    if name != "pool_backward":  # the last argument says which implementation runs
        return operator(*args[:-1], "torch")
    wanted, grad, features, rois, offsets, *options = args
    features = [f.requires_grad_(wanted[0]) for f in features]
    if offsets is not None:
        offsets.requires_grad_(wanted[1])
    roi_align.pool_reference(features, rois, offsets, *options).backward(grad)
    rows = [f.grad.permute(0, 2, 3, 1).flatten(0, 2) for f in features if wanted[0]]
    table = torch.cat(rows).to(grad.dtype) if rows else grad.new_empty(0, grad.shape[1])
    return table, offsets.grad if wanted[1] else grad.new_empty(0)


def stop_triton() -> None:
    """Let a launch on GPU tensors do nothing but look at its grid."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def look(self, *args, **kwargs):
        if not any(isinstance(x, Tensor) and x.is_cuda for x in tree_leaves((args, kwargs))):
            return launch(self, *args, **kwargs)
        x, y, z = (*self.grid, 1, 1)[:3]
        assert 0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16, self.grid

    GridExecutor.__call__ = look
