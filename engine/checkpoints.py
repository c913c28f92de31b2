"""Files of a run: checkpoints, the log, and how a run is resumed from them.

Files are written whole or not at all, and read without running foreign code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from common import BadInput
from data.files import read_json
from engine.entries import (
    check_bits,
    check_entries,
    check_run_entries,
    fill,
    load_optimizer,
    settings_problem,
)
from engine.folders import cannot_write, whole_file
from engine.pictures import draw_curves, drawing
from engine.processes import gather, print_once, rank_and_world
from engine.settings import MAY_CHANGE_ON_RESUME, Settings, flag

# ------------------------------------------------------------------------------ checkpoints


def save_checkpoint(path: Path, state: dict) -> None:
    with whole_file(path) as file:
        torch.save(state, file)


def load_tensors(path: str | Path, problem: str):
    """Read tensors and plain values without running code; BadInput says `problem`."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except Exception as e:  # pickle, zip and torch each have their own
        why = str(e).partition("WeightsUnpickler error:")[2].split("\n")[0].strip()
        why = why or type(e).__name__  # torch's other lines advise to load it unsafely
        raise BadInput(f"{path}: {problem}: {why}") from e


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint of `train`, whose `settings` are for `Settings.from_dict`.

    Raises BadInput for a file that is no checkpoint, was damaged, or holds more than
    weights.
    """
    check_bits(path)
    state = load_tensors(path, "not a checkpoint that is safe to load")
    if isinstance(state, dict) and "config" in state:  # before settings had four objects
        state["settings"] = state.pop("config")
    check_entries(state, path)
    return state


def load_weights(model: nn.Module, state: dict, path, categories: list[dict] | None = None) -> None:
    """Fill the model; raise BadInput if classes or shapes differ or a weight is not finite."""
    odd = [k for k, v in state["model"].items() if not v.isfinite().all()]
    if odd:
        raise BadInput(f"{path}: {len(odd)} of its tensors are not finite, {odd[0]} first")
    if categories is not None and len(categories) != len(state["categories"]):
        have, want = len(state["categories"]), len(categories)
        raise BadInput(f"{path}: made for {have} classes, the data has {want}")
    fill(model, state["model"], path)


def class_rows(num_classes: int, per_class: int, by_anchor: bool) -> Tensor:
    """Row numbers [K, per_class] of a layer that has so many outputs for each class.

    The rows of a class lie together, unless the layer is ordered `by_anchor`: all classes
    of the first anchor, then of the next.

    >>> class_rows(3, 2, by_anchor=False).tolist(), class_rows(3, 2, by_anchor=True).tolist()
    ([[0, 1], [2, 3], [4, 5]], [[0, 3], [1, 4], [2, 5]])
    """
    rows = torch.arange(num_classes * per_class)
    if by_anchor:
        return rows.view(per_class, num_classes).T
    return rows.view(num_classes, per_class)


def start_from(model: nn.Module, state: dict, path, categories: list[dict], detector) -> None:
    """Start training from a checkpoint that may have other classes.

    Layers whose shape depends on the classes keep the rows of the classes that both have,
    by name; their other rows start anew. All other layers are loaded. detector(settings,
    num_classes) builds a model with one class more, which shows the layers that depend on
    the classes.
    """
    needed = state.get("settings", {}).get("model", {}).get("legacy", [])
    if sorted(needed) != sorted(getattr(model.settings, "legacy", ())):
        raise BadInput(f"{path}: its weights need --legacy {' '.join(needed) or '(nothing)'}")
    old_names = [c["name"] for c in state["categories"]]
    new_names = [c["name"] for c in categories]
    if old_names == new_names:
        return load_weights(model, state, path, categories)
    with torch.device("meta"):
        more = detector(model.settings, len(new_names) + 1).state_dict()
    own = model.state_dict()
    of_classes = [name for name in own if own[name].shape != more[name].shape]
    by_anchor = getattr(model, "rows_by_anchor", ())
    pairs = [(new_names.index(n), i) for i, n in enumerate(old_names) if n in new_names]
    merged = {**state["model"]}
    for name in of_classes:
        old, new = state["model"].get(name), own[name].clone()
        per_class = len(more[name]) - len(new)
        if old is not None and old.shape[1:] == new.shape[1:]:
            old_rows = class_rows(len(old_names), per_class, name in by_anchor)
            new_rows = class_rows(len(new_names), per_class, name in by_anchor)
            for i, j in pairs:
                new[new_rows[i]] = old[old_rows[j]].to(new)
            if len(new) > new_rows.numel():  # a last row is the background's
                new[-1] = old[-1]
        merged[name] = new
    load_weights(model, {**state, "model": merged}, path)
    common_names = ", ".join(new_names[i] for i, _ in pairs) or "none"
    layers = ", ".join(sorted({name.rpartition(".")[0] for name in of_classes}))
    print_once(f"{path}: of {len(old_names)} other classes; starting anew, by class: {layers}")
    print_once(f"classes whose weights are kept, by name: {common_names}")


def script_name(model: nn.Module) -> str:
    """The name by which one would import the module of a detector's class."""
    name = type(model).__module__
    if name != "__main__":
        return name
    main = sys.modules["__main__"]  # started as `python d2det.py` or `python -m baselines.gfl`
    return main.__spec__.name if main.__spec__ else Path(getattr(main, "__file__", "")).stem


def find_script(state: dict, path, method: str | ModuleType | None = None) -> ModuleType:
    """The module whose `Settings` and `Detector` a checkpoint needs.

    Its name is in the checkpoint; an older one needs `method`, a name or the module
    itself. A file from elsewhere must not choose what runs here. So the named module is
    imported only if it is a script of this project or was imported before.
    """
    script = method or state.get("method", "")
    if isinstance(script, str):
        parts = script.split(".")
        file = Path(__file__).resolve().parent.parent.joinpath(*parts)
        in_place = parts[:-1] in ([], ["baselines"]) and all(p.isidentifier() for p in parts)
        ours = in_place and file.with_suffix(".py").is_file()
        if not (method or script in sys.modules or ours):
            made = f"made by {script!r}, which is no script here" if script else "names no script"
            raise BadInput(f'{path}: {made}; say which made it, as in method="d2det"')
        try:
            script = importlib.import_module(script)
        except (ImportError, TypeError) as e:
            raise BadInput(f"{path}: cannot import its script {script}: {e}") from e
    if not (hasattr(script, "Settings") and hasattr(script, "Detector")):
        raise BadInput(f"{path}: {script} has no Settings and Detector")
    return script


# ------------------------------------------------------------------------------ folders


def write_json(path: Path, value) -> None:
    """Write a list on one line, or a dict indented; make the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=None if isinstance(value, list) else 2)
    with whole_file(path) as file:
        file.write(f"{text}\n".encode())


class RunLog:
    """OUT/log.jsonl, a line for each logging step or evaluation, and its picture.

    Only the first process writes. A run that is resumed at step `start` drops the lines
    of later steps, which are done again.
    """

    def __init__(self, out: Path, start: int):
        self.path = out / "log.jsonl"
        self.lines: list[dict] = []
        self.silent = rank_and_world()[0] > 0
        if self.silent:
            return
        out.mkdir(parents=True, exist_ok=True)
        if start and self.path.exists():
            for text in self.path.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # torn by a kill
                    line = json.loads(text)
                    if line["step"] <= start:
                        self.lines.append(line)
        with whole_file(self.path) as file:
            file.write("".join(json.dumps(line) + "\n" for line in self.lines).encode())

    def write(self, line: dict) -> None:
        if not self.silent:
            self.lines.append(line)
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as e:
                raise cannot_write(self.path, e) from e

    def has_metrics(self, step: int) -> bool:
        return any("AP" in line and line["step"] == step for line in self.lines)

    def draw(self) -> None:
        picture = self.path.with_name("curves.png")
        if self.lines and not self.silent:
            with drawing(picture):
                draw_curves(self.lines, picture)


# ------------------------------------------------------------------------------ resuming


@dataclasses.dataclass
class RunState:
    """What a checkpoint holds beside the model and the optimiser."""

    settings: Settings  # with the derived batch sizes
    categories: list[dict]
    fingerprint: str  # of the training data
    step: int = 0  # steps done
    window: list[Tensor] = dataclasses.field(default_factory=list)  # losses not yet logged


def save_run(path: Path, model: nn.Module, optimizer, run: RunState) -> None:
    """The first process writes all that resuming (of all processes) and `load` need."""
    if not torch.stack([p.isfinite().all() for p in model.parameters()]).all():
        raise FloatingPointError(f"step {run.step}: weights are not finite, and are not saved")
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    rng = gather([torch.get_rng_state(), *cuda])
    if rank_and_world()[0] == 0:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "settings": as_saved(run.settings),
            "method": script_name(model),
            "categories": run.categories,
            "data": run.fingerprint,
            "step": run.step,
            "rng": rng,
            "window": torch.stack(run.window) if run.window else [],
            "threads": torch.get_num_threads(),
        }
        save_checkpoint(path, state)


def as_saved(settings: Settings) -> dict:
    """Settings as plain values, with tuples as lists, for JSON and checkpoints."""
    return json.loads(json.dumps(settings.to_dict()))


def read_settings(path: Path, settings_class: type[Settings]) -> Settings:
    """The settings in a config.json."""
    saved = read_json(path)
    if problem := settings_problem(saved):
        raise BadInput(f"{path}: its {problem}")
    return settings_class.from_dict(saved)


def check_settings(path: Path, settings: Settings, saved: Settings) -> None:
    """Raise BadInput if the settings differ from the saved run's.

    `Test` may differ, and so may the settings of `Run` that do not affect training.
    """
    old, new = saved.flat(), settings.flat()
    free = {*vars(settings.test), *MAY_CHANGE_ON_RESUME}
    differ = [k for k, v in new.items() if k not in free and flag(k, v) != flag(k, old.get(k))]
    if differ:
        flags = " ".join(flag(k, old.get(k)) for k in differ)
        raise BadInput(f"{path}: cannot resume, the run was made with {flags}")


def resume_or_start(out: Path, resume: bool, model: nn.Module, optimizer, run: RunState) -> None:
    """Continue the run in `out` where it was saved, if `resume` asks for it and there is one.

    This fills model, optimiser and random states, and `run`'s step and window.
    """
    last, config = out / "last.pt", out / "config.json"
    settings_class = type(run.settings)
    if not (resume and last.exists()):
        if resume and config.exists():
            check_settings(config, run.settings, read_settings(config, settings_class))
            print_once(f"{out} has no checkpoint yet: its run starts anew")
        elif resume:
            print_once(f"nothing to resume in {out}: starting anew")
        return
    state = load_checkpoint(last)
    check_run_entries(state, last, model)
    check_settings(last, run.settings, settings_class.from_dict(state["settings"]))
    if state["categories"] != run.categories:
        raise BadInput(f"{last}: cannot resume, the data's categories are others now")
    if state.get("data", run.fingerprint) != run.fingerprint:  # older checkpoints have none
        raise BadInput(f"{last}: cannot resume, the training images or boxes are others now")
    load_weights(model, state, last)
    load_optimizer(optimizer, state["optimizer"], last)
    rank, world = rank_and_world()
    if len(state["rng"]) == world:
        try:
            main, *cuda = state["rng"][rank]
            torch.set_rng_state(main)
            if cuda and torch.cuda.is_available():
                torch.cuda.set_rng_state_all(cuda[: torch.cuda.device_count()])
        except (RuntimeError, TypeError, ValueError) as e:
            raise BadInput(f"{last}: cannot resume: its rng is no random state: {e}") from e
    else:
        print_once(f"{len(state['rng'])} processes before, {world} now: sampling starts anew")
    now = torch.get_num_threads()
    before = state.get("threads", now)  # older checkpoints do not say
    if before != now:
        print_once(f"{before} threads before, {now} now: sums are rounded otherwise from here on")
    print_once(f"resumed at step {state['step']}")
    run.step, run.window = state["step"], list(state.get("window", []))
