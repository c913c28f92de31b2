"""What a checkpoint may hold. Every entry is checked before it is used.

torch's loader runs no foreign code, but it neither verifies checksums nor knows what
belongs in a checkpoint. An edited or damaged file would fail somewhere later, or train on
unnoticed.
"""

from __future__ import annotations

import zipfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from common import BadInput
from data.checks import check_listed
from engine.settings import OBJECTS, Model

WEIGHTS = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64)


def check_bits(path) -> None:
    """Raise BadInput if checksums show that the file has changed since it was written."""
    if not zipfile.is_zipfile(path):
        return  # the loader says whether it is missing, older or no checkpoint
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as e:  # the archive's own tables may be damaged too
        raise BadInput(f"{path}: the file is damaged: {e}") from e
    if damaged:
        raise BadInput(f"{path}: the file is damaged: {damaged} does not fit its checksum")


def check_entries(state: Any, path) -> None:
    """Raise BadInput for the first entry that is missing or cannot come from `save_run`."""
    foreign = f"{path}: not a checkpoint of this project"
    if not isinstance(state, dict) or not {"model", "categories", "settings"} <= state.keys():
        raise BadInput(f"{foreign} (no model, categories and settings)")
    problem = _weights_problem(state["model"]) or settings_problem(state["settings"])
    for name in ("method", "data"):
        if not isinstance(state.get(name, ""), str):
            problem = problem or f"{name} is not a string"
    if not state["categories"]:
        problem = problem or "categories are none"
    try:
        check_listed({"images": [], "categories": state["categories"]})
    except ValueError as e:
        problem = problem or f"categories: {e}"
    if problem:
        raise BadInput(f"{foreign}: its {problem}")


def check_run_entries(state: dict, path, model: nn.Module) -> None:
    """Raise BadInput if an entry that only resuming needs is missing or odd."""
    problem = ""
    missing = [name for name in ("optimizer", "step", "rng") if name not in state]
    step, rng, window = state.get("step"), state.get("rng"), state.get("window", [])
    rows = window if isinstance(window, (list, tuple)) else [window]
    types = {name: value.dtype for name, value in model.state_dict().items()}
    rounded = [n for n, v in state["model"].items() if v.dtype != types.get(n, v.dtype)]
    if missing:
        problem = f"it has no {' and no '.join(missing)}"
    elif rounded:
        problem = f"its model is not of the run's own precision ({rounded[0]})"
    elif type(step) is not int or not 0 <= step < 2**31:
        problem = f"its step is {_shown(step)}"
    elif not (isinstance(rng, list) and rng):
        problem = "its rng is not a list of the processes' random states"
    elif not all(isinstance(row, Tensor) and _dense(row) for row in rows):
        problem = "its window is not the losses since the log's last line"
    elif isinstance(window, Tensor) and window.ndim != 2:
        problem = f"its window is {list(window.shape)}, not [steps, losses]"
    if problem:
        raise BadInput(f"{path}: cannot resume: {problem} (--weights may take it)")


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Any, path) -> None:
    """Load the optimiser's state from a checkpoint; it must fit the optimiser's weights.

    Learning rate and the like come from the settings, which are compared elsewhere.
    """
    (group,) = optimizer.param_groups
    shapes = [p.shape for p in group["params"]]
    known = {"momentum_buffer"} if "momentum" in group else {"step", "exp_avg", "exp_avg_sq"}
    states = saved.get("state") if isinstance(saved, dict) else None
    problem = ""
    if not isinstance(states, dict):
        problem, states = "it has no state", {}
    for i, state in states.items():
        if type(i) is not int or i not in range(len(shapes)):
            problem = f"it is not of {len(shapes)} weights"
        elif state == {} and group.get("momentum") == 0:
            continue
        elif not isinstance(state, dict) or state.keys() != known:
            problem = f"state {i} does not have {', '.join(sorted(known))}"
        elif not all(_fits(v, shapes[i], name) for name, v in state.items()):
            problem = f"state {i} does not fit its weight of {list(shapes[i])}"
        if problem:
            break
    if problem:
        raise BadInput(f"{path}: cannot resume, its optimizer is another one's: {problem}")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


def _fits(value: Any, shape: torch.Size, name: str) -> bool:
    if value is None:
        return name == "momentum_buffer"  # when momentum is off
    if not isinstance(value, Tensor) or not _dense(value) or not value.is_floating_point():
        return False
    return value.shape == (torch.Size([]) if name == "step" else shape)


def check_size(detector, settings: Model, state: dict, path) -> None:
    """Raise BadInput if the settings do not make the network whose weights the checkpoint has.

    The network is built without memory, and only up to the number of weights, because
    edited settings may ask for a million layers.
    """
    most = 2 * len(state["model"]) + 100  # some layers are replaced while a network is built
    made = 0

    def count(*_) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise BadInput(f"{path}: its settings ask for more layers than it has weights for")

    try:
        with register_module_parameter_registration_hook(count), torch.device("meta"):
            model = detector(settings, len(state["categories"]))
    except BadInput:
        raise
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as e:
        why = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise BadInput(f"{path}: its settings make no network: {why}") from e
    fill(model, state["model"], path, assign=True)


def fill(model: nn.Module, weights: dict, path, assign: bool = False) -> None:
    """Do `load_state_dict`, but raise BadInput if names or shapes differ."""
    try:
        model.load_state_dict(weights, assign=assign)
    except RuntimeError as e:
        first = str(e).splitlines()[1].strip()[:200]
        other = "Was it made by another script, or with other flags?"
        raise BadInput(f"{path}: does not fit this model. {other} {first}") from e


# ------------------------------------------------------------------------------ single entries


def _shown(value) -> str:
    return repr(value)[:60] if isinstance(value, (int, float, str)) else type(value).__name__


def _dense(value: Tensor) -> bool:
    """Whether a tensor has all of its numbers in memory: not sparse, meta or expanded."""
    if value.layout != torch.strided or value.is_meta or value.is_quantized:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _weights_problem(weights: Any) -> str:
    if not isinstance(weights, dict) or not weights:
        return f"model is {_shown(weights)}, not a dict of tensors"
    for name, value in weights.items():
        if not isinstance(name, str):
            return f"model has the key {_shown(name)}, not a string"
        if not isinstance(value, Tensor):
            return f"model's {name} is {_shown(value)}, not a tensor"
        if value.dtype not in WEIGHTS or not _dense(value):
            kind = f"{value.dtype}, {value.layout}, on {value.device}"
            return f"model's {name} is not a plain tensor of numbers: {kind}"
    return ""


def settings_problem(settings: Any) -> str:
    """Why this is not a checkpoint's or config.json's settings; "" if it is."""
    if not isinstance(settings, dict):
        return f"settings are {_shown(settings)}, not a dict"
    grouped = any(isinstance(settings.get(name), dict) for name in OBJECTS)
    for name, value in settings.items():
        values = value if grouped and name in OBJECTS else {name: value}
        if not isinstance(values, dict):
            return f"settings of {name} are {_shown(value)}, not a dict"
        for key, plain in values.items():
            parts = plain if isinstance(plain, (list, tuple)) else [plain]
            allowed = all(isinstance(part, (int, float, str, type(None))) for part in parts)
            if not isinstance(key, str) or not allowed:
                return f"setting {key} is no plain value"
    return ""
