"""`train`, the loop: schedule, optimiser, one step, the log, what is saved and when."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import BadInput
from data.own import CheckedItems, check_dataset, checked_truth
from data.transforms import TrainingImages
from engine.checkpoints import RunLog, RunState, as_saved, resume_or_start, save_run, write_json
from engine.folders import sole_writer
from engine.loader import (
    TrainBatches,
    batches_of,
    fingerprint,
    make_loader,
    per_process_batch,
    to_device,
)
from engine.metrics import evaluate, show_metrics
from engine.processes import (
    autocast,
    gather,
    peak_memory,
    print_once,
    progress,
    rank_and_world,
    share_buffers,
    uses_bf16,
)
from engine.settings import Run, Settings
from engine.signals import signals_answered


def learning_rate(run: Run, step: int, total: int, batch: int) -> float:
    """A step's rate: linear in the batch; after the warm-up drops, or a cosine."""
    base = run.lr * batch / run.lr_batch
    warmup = min(run.warmup, total // 10)
    share = min(1.0, step / warmup) if warmup else 1.0
    warm = run.warmup_factor + (1 - run.warmup_factor) * share
    fall = 0.1 ** sum(step >= round(drop * total) for drop in run.drops)
    if run.cosine:
        fall = (1 + math.cos(math.pi * step / total)) / 2
    return base * warm * fall


def make_optimizer(model: nn.Module, run: Run) -> torch.optim.Optimizer:
    weights = [p for p in model.parameters() if p.requires_grad]
    if run.optimizer == "adamw":
        return torch.optim.AdamW(weights, lr=run.lr, weight_decay=run.weight_decay, fused=True)
    decay = run.weight_decay
    return torch.optim.SGD(weights, lr=run.lr, momentum=run.momentum, weight_decay=decay)


class LossOnly(nn.Module):
    """DDP synchronises only what `forward` computes, so training calls `loss` through it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images, targets):
        return self.model.loss(images, targets)


def take_step(wrapped, optimizer, rate: float, items: list, run: Run, device):
    """Update the weights once -> losses and gradient norm (on the device), image ids."""
    images, targets = to_device(items, device)
    try:
        with autocast(run.amp, device):
            losses = wrapped(images, targets)
    except ValueError as e:
        if "more than 1 value per channel" not in str(e):
            raise
        more = "more images a step (--batch), larger ones (--scales), or --norm gn"
        raise BadInput(f"batch normalisation of a single cell: it needs {more}") from e
    optimizer.zero_grad(set_to_none=True)
    sum(losses.values()).backward()
    (group,) = optimizer.param_groups
    group["lr"] = rate
    norm = nn.utils.get_total_norm([p.grad for p in group["params"] if p.grad is not None])
    if run.clip_norm:
        nn.utils.clip_grads_with_norm_(group["params"], run.clip_norm, norm)
    optimizer.step()
    return losses, norm, [t["image_id"] for t in targets]


class LossWatch:
    """The losses since the log's last line, each copied to the host during the next step."""

    def __init__(self, window: list[Tensor]):
        self.window = window
        self.pending: tuple | None = None

    def add(self, step: int, image_ids: list, losses: dict[str, Tensor], norm: Tensor) -> None:
        self.check()
        losses = {**losses, "gradient norm": norm}
        values = torch.stack([v.detach().float() for v in losses.values()])
        stream = torch.cuda.current_stream(values.device) if values.is_cuda else None
        values = values.to("cpu", non_blocking=True)
        copied = stream.record_event() if stream else None  # on the GPU that copies
        if self.window and self.window[-1].shape != values.shape:
            had = list(self.window[-1].shape)
            now = len(values)
            raise BadInput(f"last.pt: its window has {had} losses a step, here are {now}")
        self.window.append(values)
        self.pending = step, image_ids, list(losses), values, copied

    def check(self) -> None:
        """Raise if a loss of the last step added is not finite."""
        if self.pending:
            step, image_ids, names, values, copied = self.pending
            if copied:
                copied.synchronize()
            if not values.isfinite().all():
                shown = ", ".join(f"{n} = {v:.4g}" for n, v in zip(names, values.tolist()))
                raise FloatingPointError(f"step {step}, images {image_ids}: not finite: {shown}")

    def means(self) -> dict[str, float]:
        """Each loss's mean over the window, which is then emptied."""
        self.check()
        means = torch.stack(self.window).mean(0).tolist()
        self.window.clear()
        return dict(zip(self.pending[2][:-1], means))  # without the norm


def report(step: int, batches: TrainBatches, rate: float, means: dict, speed: float, device):
    """A step's line for the log, and its text for the terminal; speed in images/s."""
    epoch = round(step / batches.per_epoch, 3)
    line: dict[str, Any] = {"step": step, "epoch": epoch, "lr": rate}
    line |= {"loss": sum(means.values()), "losses": means}
    line |= {"images_per_s": speed, "memory_mib": peak_memory(device) >> 20}
    parts = " ".join(f"{k} {v:.3f}" for k, v in means.items())
    left = (batches.total - step) * batches.batch * batches.world / speed / 60
    return line, (
        f"step {step}/{batches.total}  loss {line['loss']:.3f} ({parts})  "
        f"{speed:.2f} images/s, {left:.1f} min left"
    )


def describe(settings: Settings, batches: TrainBatches, num_images: int, model, device) -> str:
    """A run's first line: its length, batch, learning rate, network and machine."""
    run, batch = settings.run, batches.batch * batches.world
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return (
        f"{batches.total} steps of {batch} images ({batches.world} x {batches.batch}), "
        f"{batches.total / batches.per_epoch:.3g} epochs of {num_images}; learning rate "
        f"{run.lr} x {batch}/{run.lr_batch} = {run.lr * batch / run.lr_batch:.4g}; "
        f"{settings.model.backbone} at {' '.join(map(str, settings.data.scales))} px, "
        f"{millions:.1f} M parameters, torch {torch.__version__} on {device} in "
        + ("bf16" if uses_bf16(run.amp, device) else "float32")
    )


class Evaluations:
    """A run's evaluations, with the log, the pictures and best.pt.

    `steps`: those that an evaluation follows, without the one at the end of the run.
    """

    def __init__(
        self, model, val_data, truth, settings: Settings, out: Path, log: RunLog, total: int
    ):
        self.model, self.data, self.settings = model, val_data, settings
        self.truth, self.out, self.log = truth, out, log
        self.metrics: dict[str, Any] = {}
        every, times = settings.run.eval_every, settings.run.eval_times
        self.steps = {round(total * i / times) for i in range(1, times)}
        if every:
            self.steps = set(range(every, total, every))
        if val_data is None:
            self.steps = set()

    def run(self, step: int, save: Callable[[Path], None], bar=None) -> None:
        """Evaluate, log the metrics, draw, and save best.pt if no earlier AP was higher."""
        share_buffers(self.model)
        earlier = [line["AP"] or 0 for line in self.log.lines if "AP" in line]
        self.metrics = evaluate(self.model, self.data, self.settings, self.out, self.truth)
        best = gather((self.metrics["AP"] or 0) >= max(earlier, default=0))[0]
        if best and self.metrics["AP"] is not None:
            save(self.out / "best.pt")
        if not self.log.has_metrics(step):  # a resumed run may have logged them before
            self.log.write({"step": step, **self.metrics})
        self.log.draw()
        print_once(f"step {step}: {show_metrics(self.metrics)}", bar)


def check_data(model: nn.Module, settings: Settings, train_data, val_data) -> dict | None:
    """Raise BadInput if the data are unfit, or if their classes are not the model's.

    The first process gets the ground truth of the validation data, the others None.
    """
    truth = None
    check_dataset(train_data, "training", masks=settings.model.masks)
    if val_data is not None:
        check_dataset(val_data, "validation", scored=True)
        own, others = ([c["name"] for c in data.categories] for data in (train_data, val_data))
        if own != others:
            those = f"the validation data have the categories {others}"
            raise BadInput(f"{those}, the training data {own}: not the same in the same order")
        if rank_and_world()[0] == 0:
            truth = checked_truth(val_data)
    num_classes = len(train_data.categories)
    if getattr(model, "num_classes", num_classes) != num_classes:
        made_for = f"the detector is made for {model.num_classes} classes"
        raise BadInput(f"{made_for}, the training data have {num_classes}")
    return truth


def train(
    model: nn.Module,
    settings: Settings,
    train_data,
    val_data=None,
    out: str | Path = "runs/model",
    resume: bool = False,
) -> dict:
    """Train to the end or a signal; return the last metrics, {} without val_data.

    `out` receives config.json, log.jsonl, last.pt, best.pt, curves.png and the files of
    `evaluate`. With `resume` the run goes on from last.pt: exactly, on a CPU with the
    same number of threads. Data sets keep the contract `data.DetectionDataset`; BadInput
    says what is missing.
    """
    out = Path(out)
    truth = check_data(model, settings, train_data, val_data)
    alone = sole_writer(out, set_aside_if="" if resume else "last.pt")
    nothing = "nothing was saved; the same command starts again"
    with alone, signals_answered(nothing) as signals:
        try:
            return _train(model, settings, train_data, val_data, truth, out, resume, signals)
        except Exception as e:
            if signals.seen and isinstance(e, RuntimeError) and rank_and_world()[1] > 1:
                signals.end(signals.seen[0])  # it failed because another process ended first
            if signals.outcome != nothing:
                print_once(signals.outcome)
            raise


def _train(model, settings: Settings, train_data, val_data, truth, out: Path, resume, signals):
    """`train` with checked data, in a folder where no other run writes."""
    device, run = next(model.parameters()).device, settings.run
    rank, world = rank_and_world()
    batch = per_process_batch(run) * world
    batches = TrainBatches(train_data.sizes, batch // world, run.seed)
    steps = max(1, run.min_steps, round(run.epochs * batches.per_epoch))
    batches.total = run.steps or (min(steps, run.max_steps) if run.max_steps else steps)
    step_images = batches.batch * world  # fewer than `batch` if the whole set is smaller
    wrapped: nn.Module = LossOnly(model)
    if world > 1:
        wrapped = nn.parallel.DistributedDataParallel(wrapped)
    optimizer = make_optimizer(model, run)
    torch.manual_seed(run.seed + rank)  # from here on only sampling draws random numbers
    # The derived batch sizes are saved, because a test may run on another number of
    # processes.
    derived = settings.replace(batch=batch, eval_batch=run.eval_batch or batch // world)
    state = RunState(derived, train_data.categories, fingerprint(train_data))
    resume_or_start(out, resume, model, optimizer, state)
    batches.start = state.step
    last = out / "last.pt"

    def tell_saved() -> None:
        done = f"step {state.step} of {batches.total}"
        signals.outcome = f"{last} holds {done}; --resume goes on"

    if last.exists():
        tell_saved()
    log, watch = RunLog(out, state.step), LossWatch(state.window)
    if rank == 0:
        write_json(out / "config.json", as_saved(derived))
    print_once(describe(settings, batches, len(train_data), model, device))
    checked, data = CheckedItems(train_data, settings.model.masks), settings.data
    images = TrainingImages(checked, data.scales, data.max_size, data.flip, run.seed)
    loader = make_loader(images, run.workers, device, batch_sampler=batches)
    bar = progress(None, "training", batches.total)
    bar.update(batches.start)
    evaluations = Evaluations(model, val_data, truth, settings, out, log, batches.total)

    def save(path: Path) -> None:
        watch.check()
        save_run(path, model, optimizer, state)
        if path == last:
            tell_saved()

    # make up for an evaluation during which the run was killed
    if state.step in evaluations.steps and not gather(log.has_metrics(state.step))[0]:
        evaluations.run(state.step, save)
    logged, clock = state.step, time.perf_counter()
    with contextlib.closing(bar), batches_of(loader) as iterator, signals.held():
        for step, items in enumerate(iterator, batches.start + 1):
            model.train()
            rate = learning_rate(run, step - 1, batches.total, step_images)
            losses, norm, image_ids = take_step(wrapped, optimizer, rate, items, run, device)
            watch.add(step, image_ids, losses, norm)
            state.step, state.window = step, watch.window
            bar.update()
            stop = max(gather(signals.seen[0] if signals.seen else 0))
            if step == batches.total or step % run.log_every == 0:
                speed = (step - logged) * step_images / (time.perf_counter() - clock)
                line, text = report(step, batches, rate, watch.means(), speed, device)
                log.write(line)
                print_once(text, bar)
                logged, clock = step, time.perf_counter()
            evaluated = step in evaluations.steps  # saved first: a kill loses little
            if stop or evaluated or step == batches.total or step % run.save_every == 0:
                save(last)
            if stop:
                log.draw()
                signals.end(stop)
            if evaluated:
                paused = time.perf_counter()
                with signals.released():
                    evaluations.run(step, save, bar)
                clock += time.perf_counter() - paused
    if val_data is not None:  # also if a resumed run had only this left to do
        evaluations.run(batches.total, save)
    log.draw()
    return evaluations.metrics
