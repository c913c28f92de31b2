"""One process or many: rank, messages, devices, memory, and what the first process prints."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from common import BadInput


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value) -> list:
    """The list of every process's `value`.

    It travels through gloo, so that small messages never wait for the GPU.
    """
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    if not _GLOO:
        _GLOO.append(dist.new_group(backend="gloo"))
    values = [None] * world
    dist.all_gather_object(values, value, group=_GLOO[0])
    return values


_GLOO: list = []


def end_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        _GLOO.clear()


def find_device(name: str) -> torch.device:
    """The device of that name, or with "auto" the best there is."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise BadInput(f"--device {name}: {str(e).splitlines()[0]}") from e
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"--device {name}: only cpu and cuda are supported")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"--device {name}: torch sees no GPU")
    if device.index and device.type == "cuda" and device.index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise BadInput(f"--device {name}: torch sees {count}, from cuda:0 on")
    return device


def start_processes(name: str) -> torch.device:
    """This process's device; joins the others, once, if torchrun started it."""
    device = find_device(name)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":  # the default for all that names no device
        torch.cuda.set_device(device.index or 0)
    return device


def keep_memory() -> None:
    """Have glibc keep the memory that this process frees, for its next tensors.

    By default glibc returns each block of 32 MiB or more to the system, which hands it
    out again page by page and zeroed. This takes up to two fifths of a large prediction's
    time (docs/log.md). Keeping memory takes up to half more of it. Only the command line
    calls this, never library code. Nothing is done without glibc, or if any of its
    MALLOC_ variables is set.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the top of the heap is never returned
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block has pages of its own


def warn_of_busy_cores(device: torch.device) -> None:
    """Warn if other programs use the cores: OpenMP's threads then spin long for each other."""
    own = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"} & os.environ.keys()
    if device.type == "cuda" or own or torch.get_num_threads() == 1 or sys.platform != "linux":
        return
    load, cores = os.getloadavg()[0], os.cpu_count()
    if load > 0.5 * cores:
        print_once(
            f"other programs kept {load:.1f} of {cores} cores busy in the last minute; "
            "if they still do, OMP_WAIT_POLICY=passive in the environment makes this "
            "up to three times as fast"
        )


def share_buffers(model: nn.Module) -> None:
    """Give all processes the first one's BN statistics, as DDP does before a step."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def uses_bf16(amp: str, device: torch.device) -> bool:
    """Whether `amp` (auto, off, bf16) means bf16 here; auto does where bf16 is fast."""
    if amp != "auto" or device.type != "cuda":
        return amp == "bf16"
    with torch.cuda.device(device):  # a T4 or an RTX 20xx only emulates bf16, which is slow
        return torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(amp: str, device: torch.device):
    """The context of a forward pass, in bf16 if `uses_bf16`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(amp, device))


def progress(iterable, what: str, total: int):
    """A bar on a terminal, elsewhere a line every half minute; on the first process only."""
    first, terminal = rank_and_world()[0] == 0, sys.stderr.isatty()

    def lines():
        shown = time.perf_counter()
        for i, item in enumerate(iterable):
            if time.perf_counter() - shown > 30:
                print_once(f"{what}: {i} of {total}")
                shown = time.perf_counter()
            yield item

    if first and not terminal and iterable is not None:
        return lines()
    hidden = not (first and terminal)
    # delay: work of less than a second shows no bar
    return tqdm(iterable, desc=what, total=total, disable=hidden, leave=False, delay=1)


def print_once(text: str, bar=None) -> None:
    """Print on the first process, above a progress bar if one is shown."""
    if rank_and_world()[0] == 0:
        try:
            if bar is not None and not bar.disable:
                tqdm.write(text)
            else:
                print(text, flush=True)
        except OSError as e:
            if e.errno != errno.EIO:  # a closed terminal must not stop saving
                raise


def reset_peak_memory(device: torch.device) -> None:
    """Start a new maximum for `peak_memory`; on a CPU only Linux can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)  # returns what `keep_memory` kept
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes since the last reset, of the GPU or resident; 0 on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) << 10
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
