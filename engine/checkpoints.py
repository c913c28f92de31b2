"""Files of a run: checkpoints, written whole or not at all, read without running foreign code."""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from common import BadInput
from engine.processes import rank_and_world, say


def save_checkpoint(path: Path, state: dict) -> None:
    """Write so that a crash at any moment leaves the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch's writer has its own error for a full disk
        temporary.unlink(missing_ok=True)
        raise BadInput(f"{path}: cannot write it: {str(e).splitlines()[0]}") from e
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
    """Fill the model; BadInput where classes or shapes differ, or weights are not finite."""
    odd = [k for k, v in state["model"].items() if not torch.as_tensor(v).isfinite().all()]
    if odd:
        raise BadInput(f"{path}: {len(odd)} of its tensors are not finite, {odd[0]} first")
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
    """A list on one line, a dict indented; makes the folder. Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=None if isinstance(value, list) else 2) + "\n")
    os.replace(temporary, path)


def set_aside(folder: Path, file: str = "last.pt") -> None:
    """Rename the folder of an earlier run, which `file` marks, so that nothing is written over."""
    if rank_and_world()[0] == 0 and (folder / file).exists():
        numbers = (
            n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}-{n}").exists()
        )
        older = folder.with_name(f"{folder.name}-{next(numbers)}")
        folder.rename(older)
        say(f"moved the earlier run to {older}")


def check_folder(out: Path) -> None:
    """BadInput if results cannot be written there; before hours are spent on making them."""
    try:
        if Path.cwd().is_relative_to(out.resolve()):
            raise BadInput(f"--out {out}: the folder that you are in is no place for results")
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except (OSError, RuntimeError) as e:  # RuntimeError: links in a circle
        raise BadInput(f"--out {out}: cannot write there: {getattr(e, 'strerror', e)}") from e
