"""What a checkpoint may hold. Every entry is checked before it is used.

torch's loader runs no foreign code, but it neither verifies checksums nor knows what belongs in a
checkpoint. A file that was edited or damaged would fail somewhere later, or train on unnoticed.
"""

from __future__ import annotations

import zipfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from common import BadInput
from engine.settings import OBJECTS, Model

WEIGHTS = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64)


def check_bits(path) -> None:
    """Raise BadInput if checksums show that the file has changed since it was written."""
    if not zipfile.is_zipfile(path):
        return  # missing, of torch's older format or no checkpoint at all: the loader says which
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as e:  # the archive's own tables may be damaged too
        raise BadInput(f"{path}: the file is damaged: {e}") from e
    if damaged:
        raise BadInput(f"{path}: the file is damaged: {damaged} does not fit its checksum")


def check_entries(state: Any, path) -> None:
    """Raise BadInput for the first entry that is missing or cannot come from `save_run`."""
    if not isinstance(state, dict) or not {"model", "categories", "settings"} <= state.keys():
        raise BadInput(
            f"{path}: not a checkpoint of this project (no model, categories and settings)"
        )
    problem = (
        _weights_problem(state["model"])
        or _categories_problem(state["categories"])
        or _settings_problem(state["settings"])
    )
    for name in ("method", "data"):
        if not problem and not isinstance(state.get(name, ""), str):
            problem = f"{name} is not a string"
    if problem:
        raise BadInput(f"{path}: not a checkpoint of this project: its {problem}")


def check_saved_settings(settings: Any, path) -> None:
    """Raise BadInput unless these are settings as a checkpoint or config.json has them."""
    problem = _settings_problem(settings)
    if problem:
        raise BadInput(f"{path}: its {problem}")


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
    elif not (isinstance(rng, list) and rng and all(map(_are_random_states, rng))):
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
    fresh = optimizer.state_dict()
    (group,) = optimizer.param_groups
    shapes = [p.shape for p in group["params"]]
    states = saved.get("state") if isinstance(saved, dict) else None
    problem = ""
    if not isinstance(states, dict):
        problem = "it has no state"
    elif not all(type(i) is int and 0 <= i < len(shapes) for i in states):
        problem = f"it is not of {len(shapes)} weights"
    else:
        known = {"momentum_buffer"} if "momentum" in group else {"step", "exp_avg", "exp_avg_sq"}
        for i, state in states.items():
            if state == {} and group.get("momentum") == 0:
                continue
            if not isinstance(state, dict) or state.keys() != known:
                problem = f"state {i} does not have {', '.join(sorted(known))}"
            elif not all(_fits(v, shapes[i], name) for name, v in state.items()):
                problem = f"state {i} does not fit its weight of {list(shapes[i])}"
            if problem:
                break
    if problem:
        raise BadInput(f"{path}: cannot resume, its optimizer is another one's: {problem}")
    optimizer.load_state_dict({**fresh, "state": states})


def check_size(detector, settings: Model, state: dict, path) -> None:
    """Raise BadInput if the settings do not make the network whose weights the checkpoint has.

    The network is built without memory, and only up to the number of weights: settings that
    somebody has edited may ask for a million layers.
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
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as e:
        why = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise (
            e
            if isinstance(e, BadInput)
            else BadInput(f"{path}: its settings make no network: {why}")
        ) from e
    fill(model, state["model"], path, assign=True)


def fill(model: nn.Module, weights: dict, path, assign: bool = False) -> None:
    """Do `load_state_dict`, but raise BadInput if names or shapes differ."""
    try:
        model.load_state_dict(weights, assign=assign)
    except RuntimeError as e:
        first = str(e).splitlines()[1].strip()[:200]
        raise BadInput(
            f"{path}: does not fit this model. Was it made by another script, or with other flags? "
            f"{first}"
        ) from e


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


def _categories_problem(categories: Any) -> str:
    if not isinstance(categories, (list, tuple)) or not categories:
        return f"categories are {_shown(categories)}, not a list of dicts"
    for i, category in enumerate(categories):
        if not isinstance(category, dict) or not {"id", "name"} <= category.keys():
            return f"categories[{i}] is no dict of id and name"
        if not all(type(category[key]) in (int, str) for key in ("id", "name")):
            return f"categories[{i}] has an id or name that is neither number nor string"
    if len({category["id"] for category in categories}) < len(categories):
        return "categories have an id twice"
    return ""


def _settings_problem(settings: Any) -> str:
    if not isinstance(settings, dict):
        return f"settings are {_shown(settings)}, not a dict"
    grouped = any(isinstance(settings.get(name), dict) for name in OBJECTS)
    for name, value in settings.items():
        if not isinstance(name, str):
            return f"settings have the key {_shown(name)}, not a string"
        if grouped and name in OBJECTS:
            if not isinstance(value, dict):
                return f"settings of {name} are {_shown(value)}, not a dict"
            values = value
        else:
            values = {name: value}
        for key, plain in values.items():
            parts = plain if isinstance(plain, (list, tuple)) else [plain]
            if not isinstance(key, str) or not all(
                part is None or isinstance(part, (bool, int, float, str)) for part in parts
            ):
                return f"setting {key} is no plain value"
    return ""


def _are_random_states(states: Any) -> bool:
    if not isinstance(states, (list, tuple)) or not states:
        return False
    plain = all(isinstance(s, Tensor) and s.dtype == torch.uint8 and _dense(s) for s in states)
    return plain and states[0].shape == torch.get_rng_state().shape


def _fits(value: Any, shape: torch.Size, name: str) -> bool:
    if value is None:
        return name == "momentum_buffer"  # when momentum is off
    if not isinstance(value, Tensor) or not _dense(value) or not value.is_floating_point():
        return False
    return value.shape == (torch.Size([]) if name == "step" else shape)
