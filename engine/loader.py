"""From a data set to a run: sharing among processes, batches, moving to a device."""

from __future__ import annotations

import contextlib
import math
import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, get_worker_info

from common import BadInput
from engine.folders import leave_locks
from engine.processes import rank_and_world
from engine.settings import Run
from engine.signals import NUMBERS


def per_process_batch(run: Run) -> int:
    """Images per step of this process; BadInput if the batch cannot be shared out evenly."""
    world = rank_and_world()[1]
    total = run.batch or 2 * world
    if total % world:
        raise BadInput(f"--batch {total} cannot be split over {world} processes")
    return total // world


class TrainBatches:
    """Lists of (epoch, index) for this process, from step `start` to step `total`.

    Wide images (w > h) and the others go into different batches, which saves padding. The
    order is a pure function of (seed, epoch), so that a resumed run continues in the
    middle of an epoch. A set smaller than `batch` is one list, and `self.batch` is then
    its length.
    """

    def __init__(self, sizes: np.ndarray, batch: int, seed: int, start: int = 0, total: int = 0):
        h, w = np.asarray(sizes).T
        self.rank, self.world = rank_and_world()
        per_rank = math.ceil(len(sizes) / self.world)
        self.wide, self.batch, self.seed = w > h, min(batch, per_rank), seed
        self.start, self.total = start, total
        self.per_epoch = max(1, per_rank // batch)

    def epoch(self, epoch: int) -> list[list[tuple[int, int]]]:
        """This process's batches of one epoch, in order."""
        indices: Any = range(len(self.wide))
        order: Any = DistributedSampler(indices, self.world, self.rank, seed=self.seed)
        order.set_epoch(epoch)
        batches, rest = [], []
        for wide in (True, False):
            group = [(epoch, i) for i in order if self.wide[i] == wide]
            whole = len(group) // self.batch * self.batch
            batches += [group[i : i + self.batch] for i in range(0, whole, self.batch)]
            rest += group[whole:]
        batches += [rest[i : i + self.batch] for i in range(0, len(rest), self.batch)]
        # A last, smaller batch (of other images each epoch) is left out unless it is the
        # only one.
        batches = [b for b in batches if len(b) == self.batch] or batches
        mixed = torch.Generator().manual_seed(self.seed + epoch)
        return [batches[i] for i in torch.randperm(len(batches), generator=mixed)]

    def __len__(self) -> int:
        return self.total - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.start
        while step < self.total:
            epoch, skip = divmod(step, self.per_epoch)
            for batch in self.epoch(epoch)[skip : skip + self.total - step]:
                yield batch
                step += 1


WAIT = 600  # seconds without a batch after which the loader's processes count as hanging


def _begin_worker(_) -> None:
    """Signals reach the whole process group; the parent shuts its workers down."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)
    leave_locks()


def _collate(items: list) -> list:
    """The list of items; in a worker their tensors are moved into shared memory.

    torch would do that later, in a thread whose errors go unheard: if /dev/shm is small,
    as in containers, the parent would wait for ever.
    """
    if get_worker_info() is None:
        return items
    try:
        for item in items:
            views = [item] if torch.is_tensor(item[0]) else item  # of `TestImages`: a list
            for image, target in views:
                for value in (image, *target.values()):
                    if torch.is_tensor(value) and value.numel():
                        value.share_memory_()
    except (OSError, RuntimeError) as e:
        raise BadInput(f"images cannot be passed on: {e}; {_shared_memory()}") from e
    return items


def _shared_memory() -> str:
    """Advice for a failing worker."""
    advice = "--workers 0 reads images without further processes"
    with contextlib.suppress(OSError, AttributeError):
        shm = os.statvfs("/dev/shm")
        total, free = (n * shm.f_frsize >> 20 for n in (shm.f_blocks, shm.f_bavail))
        return f"/dev/shm has {total} MiB, {free} of them free; {advice}"
    return advice


def worker_problem(error: RuntimeError) -> str:
    """The problem if this is torch's error for a killed or hanging worker; else ""."""
    first = str(error).splitlines()[0] if str(error) else ""
    if not first.startswith("DataLoader"):
        return ""
    advice = _shared_memory()
    return f"a process that reads images has died or hangs ({first.strip()}): {advice}"


def make_loader(data: Dataset, workers: int, device: torch.device, **sampling) -> DataLoader:
    """Batches as lists of items, read by that many processes (-1: see `Run.workers`)."""
    if workers < 0:  # on a CPU they take cores from the training
        cores = os.cpu_count() or 1
        workers = min(4, cores) if device.type == "cuda" else min(2, max(0, cores - 2))
    return DataLoader(
        data,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        collate_fn=_collate,
        generator=torch.Generator(),  # a loader must not draw from the training's generator
        worker_init_fn=_begin_worker,
        timeout=WAIT if workers else 0,
        **sampling,
    )


@contextlib.contextmanager
def batches_of(loader: DataLoader) -> Iterator[Iterator[list]]:
    """The loader's iterator, whose workers end with the block, however it ends.

    When Python exits, torch would send them SIGTERM, which they ignore.
    """
    iterator: Any = iter(loader)
    try:
        yield iterator
    finally:
        if loader.num_workers:
            iterator._shutdown_workers()


def to_device(items, device) -> tuple[list[Tensor], list[dict]]:
    """Images and targets of a batch, moved without waiting."""
    targets = [
        {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in t.items()}
        for _, t in items
    ]
    return [image.to(device, non_blocking=True) for image, _ in items], targets


def fingerprint(data) -> str:
    """A text that identifies a data set in a checkpoint, by its annotations if known."""
    if hasattr(data, "fingerprint"):
        return data.fingerprint()
    return f"{len(data)} images, {np.asarray(data.sizes).sum(0).tolist()} px, {data.categories}"
