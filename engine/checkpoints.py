"""Files of a run: checkpoints, written whole or not at all, read without running foreign code."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

from common import BadInput
from engine.processes import rank_and_world, say


def save_checkpoint(path: Path, state: dict) -> None:
    """Write so that a crash at any moment leaves the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":  # elsewhere folders cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the rename itself
        os.close(folder)


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint of `train`; BadInput names a file that is none, or holds more than weights."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except Exception as e:  # pickle, zip and torch each have their own
        why = str(e).partition("WeightsUnpickler error:")[2].split("\n")[0].strip()
        why = why or type(e).__name__  # torch's other lines advise to load it unsafely
        raise BadInput(f"{path}: not a checkpoint that is safe to load: {why}") from e
    if not isinstance(state, dict) or not {"model", "categories", "config"} <= state.keys():
        raise BadInput(
            f"{path}: not a checkpoint of this project (no model, categories and config)"
        )
    return state


def load_weights(model: nn.Module, state: dict, path, categories: list[dict] | None = None) -> None:
    """Fill the model; BadInput where classes or shapes differ from the checkpoint's."""
    if categories is not None and len(categories) != len(state["categories"]):
        have, want = len(state["categories"]), len(categories)
        raise BadInput(f"{path}: made for {have} classes, the data has {want}")
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as e:
        first = str(e).splitlines()[1].strip()[:200]
        raise BadInput(
            f"{path}: does not fit this model. Was it made by another script, or with other flags? "
            f"{first}"
        ) from e


def script_name(model: nn.Module) -> str:
    """The module that a detector's class is in, as one would import it: what made a checkpoint."""
    name = type(model).__module__
    if name != "__main__":
        return name
    main = sys.modules[
        "__main__"
    ]  # started as `python d2det.py` or `python -m baselines.retinanet`
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", "")
    return spec.name if spec else Path(file).stem


def find_script(state: dict, path, method=None):
    """The module whose `Config` and `Detector` a checkpoint needs: named in it, or by `method`.

    `method` is a name, or the module itself; a checkpoint without a name asks for it. What a
    checkpoint names is imported only if it is a script of this project or was imported before: a
    file from elsewhere cannot choose what runs here.
    """
    script = method or state.get("method", "")
    if isinstance(script, str):
        parts = script.split(".")
        file = Path(__file__).resolve().parent.parent.joinpath(*parts)
        here = parts[:-1] in ([], ["baselines"]) and all(p.isidentifier() for p in parts)
        ours = here and file.with_suffix(".py").is_file()
        if not (method or script in sys.modules or ours):
            made = f"made by {script!r}, which is no script here" if script else "names no script"
            raise BadInput(f'{path}: {made}; say which made it, as in method="d2det"')
        try:
            script = importlib.import_module(script)
        except (ImportError, TypeError) as e:
            raise BadInput(f"{path}: cannot import its script {script}: {e}") from e
    if not (hasattr(script, "Config") and hasattr(script, "Detector")):
        raise BadInput(f"{path}: {script} has no Config and Detector")
    return script


def write_json(path: Path, value) -> None:
    """A list on one line, a dict indented; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=None if isinstance(value, list) else 2) + "\n")


def set_aside(out: Path) -> None:
    """Rename an earlier run's folder, so that a new one never writes over it."""
    if rank_and_world()[0] == 0 and (out / "last.pt").exists():
        numbers = (n for n in range(1, 10**6) if not out.with_name(f"{out.name}-{n}").exists())
        older = out.with_name(f"{out.name}-{next(numbers)}")
        out.rename(older)
        say(f"moved the earlier run to {older}")
