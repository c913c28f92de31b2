"""`train`, the loop: schedule, optimiser, one step, the log, what is saved and how it resumes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from common import Resized
from engine.checkpoints import (
    load_checkpoint,
    load_weights,
    save_checkpoint,
    script_name,
    set_aside,
    write_json,
)
from engine.data import (
    TrainBatches,
    check_dataset,
    check_labels,
    fingerprint,
    make_loader,
    per_process_batch,
    to_device,
)
from engine.metrics import evaluate, show_metrics
from engine.pictures import draw_curves
from engine.processes import (
    autocast,
    gather,
    peak_memory,
    progress,
    rank_and_world,
    say,
    share_buffers,
)
from engine.settings import FREE, Config, flag
from formats import BadInput, read_json


def learning_rate(config: Config, step: int, total: int, batch: int) -> float:
    """Linear scaling rule, warm-up from warmup_factor; then a tenth at each drop, or a cosine."""
    base = config.lr * batch / config.lr_batch
    warmup = min(config.warmup, total // 10)
    share = min(1.0, step / warmup) if warmup else 1.0
    warm = config.warmup_factor + (1 - config.warmup_factor) * share
    fall = 0.1 ** sum(step >= round(drop * total) for drop in config.drops)
    if config.cosine:
        fall = (1 + math.cos(math.pi * step / total)) / 2
    return base * warm * fall


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    weights = [p for p in model.parameters() if p.requires_grad]
    decay = config.weight_decay
    if config.optimizer == "adamw":
        return torch.optim.AdamW(weights, lr=config.lr, weight_decay=decay, fused=True)
    return torch.optim.SGD(weights, lr=config.lr, momentum=config.momentum, weight_decay=decay)


def check_settings(path: Path, settings: dict, saved: dict) -> None:
    """BadInput if a run is not what was saved of it, but for flags that change nothing learned."""
    differ = [k for k, v in settings.items() if k not in FREE and flag(k, v) != flag(k, saved[k])]
    if differ:
        old = " ".join(flag(k, saved[k]) for k in differ)
        raise BadInput(f"{path}: cannot resume, the run was made with {old}")


def begin(out: Path, config: Config, settings, model, optimizer, about) -> tuple[int, list]:
    """Take up the run in `out` if config.resume, or make room for a new one.

    `about`: the data's categories and fingerprint. Returns steps done, losses not yet logged.
    """
    path, known, again = out / "last.pt", out / "config.json", config.resume
    defaults = dataclasses.asdict(type(config)())  # of what an older run did not know yet
    if not (again and path.exists()):
        if again and known.exists():
            check_settings(known, settings, defaults | read_json(known))
            say(f"{out} has no checkpoint yet: its run starts anew")
        else:
            if again:
                say(f"nothing to resume in {out}: starting anew")
            set_aside(out)
        return 0, []
    state = load_checkpoint(path)
    check_settings(path, settings, defaults | state["config"])
    if state["categories"] != about["categories"]:
        raise BadInput(f"{path}: cannot resume, the data's categories are others now")
    if state.get("data", about["data"]) != about["data"]:  # older checkpoints have none
        raise BadInput(f"{path}: cannot resume, the training images or boxes are others now")
    load_weights(model, state, path)
    optimizer.load_state_dict(state["optimizer"])
    rank, world = rank_and_world()
    if len(state["rng"]) == world:
        main, *cuda = state["rng"][rank]
        torch.set_rng_state(main)
        if cuda and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(cuda[: torch.cuda.device_count()])
    else:
        say(f"{len(state['rng'])} processes before, {world} now: sampling starts anew")
    say(f"resumed at step {state['step']}")
    return state["step"], list(state.get("window", []))


class LossOnly(nn.Module):
    """DDP synchronises what `forward` computes, so training calls the loss through this."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images, targets):
        return self.model.loss(images, targets)


def take_step(wrapped, optimizer, rate: float, items: list, config: Config, device):
    """One update of the weights -> losses and the gradients' norm, on their device; image ids."""
    images, targets = to_device(items, device)
    try:
        with autocast(config.amp, device):
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
    if config.clip_norm:
        nn.utils.clip_grads_with_norm_(group["params"], config.clip_norm, norm)
    optimizer.step()
    return losses, norm, [t["image_id"] for t in targets]


@contextlib.contextmanager
def signals_caught():
    """A list that collects SIGTERM and SIGINT, which do not end the process; the third does."""
    caught: list[int] = []

    def catch(number, _):
        caught.append(number)
        if len(caught) == 3:  # somebody insists: the step hangs, and torchrun has sent its own
            raise KeyboardInterrupt

    before = {s: signal.signal(s, catch) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


class LossWatch:
    """The losses since the log's last line; each travels to the host during the next step."""

    def __init__(self, window: list[Tensor] = ()):
        self.window, self.pending = list(window), None

    def add(self, step: int, image_ids: list, losses: dict[str, Tensor], norm: Tensor) -> None:
        self.check()
        losses = {**losses, "gradient norm": norm}
        values = torch.stack([v.detach().float() for v in losses.values()])
        copied = torch.cuda.Event() if values.is_cuda else None
        values = values.to("cpu", non_blocking=True)
        if copied:
            copied.record()
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
        self.check()
        means, self.window = torch.stack(self.window).mean(0).tolist(), []
        return dict(zip(self.pending[2][:-1], means))  # without the norm


class RunLog:
    """OUT/log.jsonl, a line a logging step or evaluation, and its picture; first process only."""

    def __init__(self, out: Path, start: int):
        self.path, self.lines = out / "log.jsonl", []
        self.silent = rank_and_world()[0] > 0
        if not self.silent:
            out.mkdir(parents=True, exist_ok=True)
            if start and self.path.exists():  # forget the lines of steps that were lost
                for text in self.path.read_text().splitlines():
                    with contextlib.suppress(json.JSONDecodeError):  # a kill may have torn the last
                        line = json.loads(text)
                        self.lines += [line] if line["step"] <= start else []
            whole = self.path.with_name(".log.tmp")
            whole.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
            os.replace(whole, self.path)

    def write(self, line: dict) -> None:
        if not self.silent:
            self.lines.append(line)
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")

    def has_metrics(self, step: int) -> bool:
        return any("AP" in line and line["step"] == step for line in self.lines)

    def draw(self) -> None:
        if self.lines and not self.silent:
            draw_curves(self.lines, self.path.with_name("curves.png"))


def report(step: int, batches, rate: float, means: dict, seconds: float, steps: int, device):
    """The log's line of a step, and what is printed; `seconds` were spent on `steps` steps."""
    batch, total = batches.batch * batches.world, batches.total
    line = {"step": step, "epoch": round(step / batches.per_epoch, 3), "lr": rate}
    line |= {"loss": sum(means.values()), "losses": means}
    speed = steps * batch / seconds
    line |= {"images_per_s": speed, "memory_mib": peak_memory(device) >> 20}
    parts = " ".join(f"{k} {v:.3f}" for k, v in means.items())
    left = (total - step) * batch / speed / 60
    return line, (
        f"step {step}/{total}  loss {line['loss']:.3f} ({parts})  "
        f"{speed:.2f} images/s, {left:.1f} min left"
    )


def save(path: Path, step: int, model, optimizer, settings: dict, about, window: list) -> None:
    """All that `resume` and `load` need, of all processes; the first one writes it."""
    if not torch.stack([p.isfinite().all() for p in model.parameters()]).all():
        raise FloatingPointError(f"step {step}: weights are not finite, and are not saved")
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    rng = gather([torch.get_rng_state(), *cuda])
    if rank_and_world()[0] == 0:
        state = dict(model=model.state_dict(), optimizer=optimizer.state_dict())
        state |= dict(step=step, rng=rng, config=settings, method=script_name(model))
        state |= dict(about, window=torch.stack(window) if window else [])
        save_checkpoint(path, state)


def check_data(model: nn.Module, train_data, val_data, masks: bool = False) -> None:
    """BadInput if the data are not what training needs, or not of the model's classes."""
    check_dataset(train_data, "training", masks=masks)
    if val_data is not None:
        check_dataset(val_data, "validation", scored=True)
    have, need = len(train_data.categories), getattr(model, "num_classes", None)
    if need not in (None, have):
        raise BadInput(f"the detector is made for {need} classes, the training data have {have}")


def train(model: nn.Module, config: Config, train_data, val_data=None, out="runs/model") -> dict:
    """Train to the end of the schedule, or to SIGTERM; returns the last metrics ({} without data).

    OUT receives log.jsonl, last.pt, curves.png and what `evaluate` writes. With config.resume it
    continues exactly where last.pt was written. BadInput: data that are not as common.py says.
    """
    out, device = Path(out), next(model.parameters()).device
    check_data(model, train_data, val_data, getattr(config, "masks", False))
    rank, world = rank_and_world()
    batch = per_process_batch(config) * world
    batches = TrainBatches(train_data.sizes, batch // world, config.seed)
    batches.total = config.steps or max(1, round(config.epochs * batches.per_epoch))
    # derived: a later test may run on another number of processes
    derived = dict(batch=batch, eval_batch=config.eval_batch or batch // world)
    settings = json.loads(json.dumps({**dataclasses.asdict(config), **derived}))  # tuples as lists
    wrapped = LossOnly(model)
    if world > 1:
        wrapped = nn.parallel.DistributedDataParallel(wrapped)
    optimizer = make_optimizer(model, config)
    torch.manual_seed(config.seed + rank)  # from here on only sampling draws from it
    about = dict(categories=train_data.categories, data=fingerprint(train_data))
    batches.start, window = begin(out, config, settings, model, optimizer, about)
    log, watch, metrics = RunLog(out, batches.start), LossWatch(window), {}
    if rank == 0:
        write_json(out / "config.json", settings)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    say(
        f"{batches.total} steps of {batch} images ({world} x {batch // world}), "
        f"{batches.total / batches.per_epoch:.3g} epochs of {len(train_data)}; learning rate "
        f"{config.lr} x {batch}/{config.lr_batch} = {config.lr * batch / config.lr_batch:.4g}; "
        f"{config.backbone} at {' '.join(map(str, config.scales))} px, "
        f"{millions:.1f} M parameters, torch {torch.__version__} on {device}"
    )
    loader = make_loader(Resized(train_data, config, True), config, device, batch_sampler=batches)
    bar = progress(None, "training", batches.total)
    bar.update(batches.start)

    def test(step: int, where=None) -> dict:
        share_buffers(model)
        found = evaluate(model, val_data, config, device, where)
        if not log.has_metrics(step):
            log.write({"step": step, **found})
        say(f"step {step}: {show_metrics(found)}", bar)
        return found

    def due(step: int) -> bool:
        every = config.eval_every if val_data is not None else 0
        return bool(every) and 0 < step < batches.total and step % every == 0

    if due(batches.start) and not gather(log.has_metrics(batches.start))[0]:  # a kill fell into it
        metrics = test(batches.start)
    logged, clock = batches.start, time.perf_counter()
    with signals_caught() as caught, contextlib.closing(bar):
        for step, items in enumerate(loader, batches.start + 1):
            check_labels([target for _, target in items], len(train_data.categories))
            model.train()
            rate = learning_rate(config, step - 1, batches.total, batch)
            losses, norm, ids = take_step(wrapped, optimizer, rate, items, config, device)
            watch.add(step, ids, losses, norm)
            bar.update()
            stop = max(gather(caught[0] if caught else 0))
            if step == batches.total or step % config.log_every == 0:
                means, seconds = watch.means(), time.perf_counter() - clock
                line, text = report(step, batches, rate, means, seconds, step - logged, device)
                log.write(line)
                say(text, bar)
                logged, clock = step, time.perf_counter()
            if stop or step == batches.total or step % config.save_every == 0:
                watch.check()
                save(out / "last.pt", step, model, optimizer, settings, about, watch.window)
            if stop:
                log.draw()
                say(f"stopped by signal {stop} after step {step}; --resume goes on", bar)
                sys.exit(128 + stop)
            if due(step):
                paused = time.perf_counter()
                metrics = test(step)
                log.draw()
                clock += time.perf_counter() - paused
    if val_data is not None:  # also where a run is resumed that had only this left to do
        metrics = test(batches.total, out)
    log.draw()
    return metrics
