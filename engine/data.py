"""A data set on its way into a run: checked before it starts, shared out, batched, loaded."""

from __future__ import annotations

import atexit
import contextlib
import math
import multiprocessing
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import common
from common import BadInput, check_image, opened, rgb_tensor
from engine.processes import progress, rank_and_world, say
from engine.settings import Config


def check_dataset(data, what: str, scored: bool = False, masks: bool = False) -> None:
    """Is this a data set as common.py describes it? BadInput names at once all that it lacks.

    Looks at its members and, closely, at its first four items. `scored`: it needs coco() too;
    `masks`: its targets need these.
    """
    members = ["__len__", "__getitem__", "sizes", "categories", *(["coco"] if scored else [])]
    wrong = [f"has no {name}" for name in members if not hasattr(data, name)]
    if not wrong:
        count = len(data)
        try:
            shape = np.asarray(data.sizes, float).shape
        except (TypeError, ValueError):
            shape = ("something else",)
        if shape != (count, 2) or not count:
            wrong.append(f"sizes is {list(shape)}, not (h, w) of each of its {count} images")
        classes = data.categories if isinstance(data.categories, (list, tuple)) else ()
        if not classes or not all(
            isinstance(c, dict) and {"id", "name"} <= set(c) for c in classes
        ):
            wrong.append("categories are not a list of dicts of id and name, one a class")
    for i in range(0 if wrong else min(4, count)):
        wrong += [f"item {i}: {problem}" for problem in item_problems(data, i, masks)]
    if wrong:
        about = "what a data set has to be is said at the top of common.py"
        raise BadInput(
            f"the {what} data set ({type(data).__name__}; {about})\n  " + "\n  ".join(wrong)
        )


def item_problems(data, index: int, masks: bool = False) -> list[str]:
    """What is wrong with an item of a data set, for `check_dataset`."""
    try:
        image, target = data[index]
        check_image(image)
        needs = {"boxes", "labels", "ignore", "image_id", "size", *["masks"] * masks}
        lacks = needs - set(target)
    except BadInput as e:
        return [str(e)]
    except (TypeError, ValueError) as e:
        return [f"is not (image, target): {e}"]
    if lacks:
        return [f"its target has no {', '.join(sorted(lacks))}"]
    tensors = {k: target[k] for k in ("boxes", "labels", "ignore")}
    odd = [k for k, v in tensors.items() if not isinstance(v, Tensor)]
    if odd:
        return [f"{', '.join(odd)}: not a tensor"]
    boxes, labels, ignore = tensors.values()
    G, (h, w) = len(labels) if labels.ndim else -1, map(int, data.sizes[index])
    size = target["size"]
    says = f"sizes says {h}x{w} (h x w)"
    found = [
        problem
        for good, problem in (
            (boxes.shape == (G, 4), f"boxes are {list(boxes.shape)}, not [G, 4]"),
            (labels.dtype == torch.long and labels.ndim == 1, "labels are not [G] of torch.long"),
            (
                ignore.dtype == torch.bool and ignore.shape == (G,),
                "ignore is not [G] of torch.bool",
            ),
            (image.shape[1:] == (h, w), f"is {image.shape[1]}x{image.shape[2]} px, {says}"),
            (isinstance(size, (tuple, list)) and tuple(size) == (h, w), f"size is {size}, {says}"),
            (
                isinstance(target["image_id"], (int, str)),
                "image_id is neither a number nor a string",
            ),
        )
        if not good
    ]
    if masks and not isinstance(target["masks"], common.MaskCrops):
        masks = target["masks"]
        shape, dtype = list(getattr(masks, "shape", ["no tensor"])), getattr(masks, "dtype", None)
        if shape != [G, h, w] or dtype != torch.bool:
            found.append(f"masks are {shape} of {dtype}, not [G, h, w] = {[G, h, w]} of torch.bool")
    if boxes.shape == (G, 4) and not (boxes[:, 2:] >= boxes[:, :2]).all():
        found.append("boxes are not (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2")
    return found + label_problems(labels, len(data.categories))


def label_problems(labels: Tensor, num_classes: int) -> list[str]:
    """Labels outside of 0..K-1: K itself is the background, and would train as such unnoticed."""
    odd = labels[(labels < 0) | (labels >= num_classes)].unique().tolist()
    if not odd:
        return []
    hint = "; torchvision's start at 1, with 0 for the background" if odd == [num_classes] else ""
    return [f"labels are 0..{num_classes - 1} for {num_classes} categories, here is {odd}{hint}"]


def check_labels(targets: list[dict], num_classes: int) -> None:
    """BadInput if a label of a batch, still on the host, is none of the classes'."""
    for target in targets:
        for problem in label_problems(target["labels"], num_classes):
            raise BadInput(f"image {target['image_id']}: {problem}")


def broken_images(files, sizes=None, source="") -> dict[int, str]:
    """Decode every image file of this process's share: what is wrong with which.

    A JPEG is read to its end, but made at an eighth of its size, which is fast. Of a damaged JPEG
    PIL notices a torn end or header; bytes changed in the middle may only change the picture.
    `sizes` [n, 2] (h, w), where given, are compared with the files' own.
    """

    def check(i: int) -> str | None:
        try:
            with opened(files[i]) as image:
                w, h = image.size
                image.draft(None, (w // 8, h // 8))
                rgb_tensor(image)
        except BadInput as e:
            return str(e)
        if sizes is not None and (h, w) != tuple(sizes[i]):
            return f"{files[i]}: is {h}x{w} px (h x w), {source} says {sizes[i][0]}x{sizes[i][1]}"

    rank, world = rank_and_world()
    mine = range(rank, len(files), world)
    with ThreadPoolExecutor(16) as pool:
        found = progress(pool.map(check, mine), "checking images", len(mine))
        return {i: problem for i, problem in zip(mine, found) if problem}


def refuse_images(broken: dict[int, str]) -> None:
    """BadInput with the first ten, if there are any."""
    if broken:
        wrong = list(broken.values())
        more = f"\n... and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise BadInput("\n".join(wrong[:10]) + more)


def per_process_batch(config: Config) -> int:
    """Images per step of this process; BadInput if the batch cannot be shared out evenly."""
    world = rank_and_world()[1]
    total = config.batch or 2 * world
    if total % world:
        raise BadInput(f"--batch {total} cannot be split over {world} processes")
    return total // world


class TrainBatches:
    """Lists of (epoch, index) for this process, from step `start` to step `total`.

    Images wider than tall and the rest go into different batches (less padding); a pure function
    of (seed, epoch), so that a resumed run continues in the middle of an epoch.
    """

    def __init__(self, sizes: np.ndarray, batch: int, seed: int, start: int = 0, total: int = 0):
        h, w = np.asarray(sizes).T
        self.wide, self.batch, self.seed = w > h, batch, seed
        self.start, self.total = start, total
        self.rank, self.world = rank_and_world()
        per_rank = math.ceil(len(sizes) / self.world)
        self.per_epoch = max(1, per_rank // batch)

    def epoch(self, epoch: int) -> list[list[tuple[int, int]]]:
        """This process's batches of one epoch, in order."""
        order = DistributedSampler(range(len(self.wide)), self.world, self.rank, seed=self.seed)
        order.set_epoch(epoch)
        batches, rest = [], []
        for wide in (True, False):
            group = [(epoch, i) for i in order if self.wide[i] == wide]
            whole = len(group) // self.batch * self.batch
            batches += [group[i : i + self.batch] for i in range(0, whole, self.batch)]
            rest += group[whole:]
        batches += [rest[i : i + self.batch] for i in range(0, len(rest), self.batch)]
        # A last, smaller batch is left out (another one each epoch) unless there is no other.
        batches = [b for b in batches if len(b) == self.batch] or batches
        mixed = torch.Generator().manual_seed(self.seed + epoch)
        return [batches[i] for i in torch.randperm(len(batches), generator=mixed)]

    def __len__(self) -> int:
        return self.total - self.start

    def __iter__(self):
        step = self.start
        while step < self.total:
            epoch, skip = divmod(step, self.per_epoch)
            for batch in self.epoch(epoch)[skip : skip + self.total - step]:
                yield batch
                step += 1


def _leave_signals_to_the_parent(_) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole process group; the parent ends the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """An exit ends workers by SIGTERM, which they ignore, and would wait for them for ever."""
    with contextlib.suppress(AttributeError):  # Windows has none, and there nothing is ignored
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises when a worker dies
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def fingerprint(data) -> str:
    """What identifies a data set in a checkpoint: its annotations, or the little that is known."""
    if hasattr(data, "fingerprint"):
        return data.fingerprint()
    return f"{len(data)} images, {np.asarray(data.sizes).sum(0).tolist()} px, {data.categories}"


def make_loader(data: Dataset, config: Config, device: torch.device, **sampling) -> DataLoader:
    """Batches as lists of (image, target), read by `config.workers` processes."""
    workers = config.workers
    if workers < 0:  # on a CPU they take cores from the training, whose threads wait for each other
        workers = 4 if device.type == "cuda" else min(2, max(0, (os.cpu_count() or 1) - 2))
    return DataLoader(
        data,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        collate_fn=list,
        generator=torch.Generator(),  # a loader must not draw from the training's generator
        worker_init_fn=_leave_signals_to_the_parent,
        **sampling,
    )


def to_device(items, device) -> tuple[list[Tensor], list[dict]]:
    """Images and targets of a batch, moved without waiting."""
    targets = [
        {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in t.items()}
        for _, t in items
    ]
    return [image.to(device, non_blocking=True) for image, _ in items], targets


def load_data(config: Config, train: bool = True, val: bool = True, categories=None):
    """`common.load_data`, with every image file opened; says what was dropped."""
    sets = common.load_data(config, train, val, categories)
    for data in sets:
        if isinstance(data, common.FolderDetection):
            if data.note:
                say(data.note)
            refuse_images(broken_images(data.files, data.sizes, data.source))
    return sets
