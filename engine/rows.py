"""The rows of the papers' tables: what each one sets, and what was measured beside it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from common import BadInput
from data.files import counted, read_json
from engine.checkpoints import as_saved
from engine.metrics import show_metrics
from engine.settings import MAY_CHANGE_ON_RESUME, Settings, choices, flag

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "rows"
RESULTS = ROOT / "docs" / "results"


def read_rows(name: str) -> tuple[dict[str, dict], dict[str, dict]]:
    """rows/<name>.toml: the settings of each row of the tables, and the printed numbers.

    A row that is `like` another one starts from that row's settings.
    """
    file = ROWS / f"{name}.toml"
    rows = tomllib.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def settings(row: str) -> dict:
        own = rows[row]
        base = settings(own["like"]) if "like" in own else {}
        given = own.get("settings", {}).items()
        return base | {k: tuple(v) if isinstance(v, list) else v for k, v in given}

    return {row: settings(row) for row in rows}, {row: rows[row]["printed"] for row in rows}


def show_rows(name: str) -> None:
    """Print each row's printed numbers and its flags."""
    settings, printed = read_rows(name)
    for row, numbers in printed.items():
        shown = "  ".join(f"{k} {v}" for k, v in numbers.items())
        flags = " ".join(flag(k, v) for k, v in settings[row].items()) or "(defaults)"
        print(f"{row:{max(map(len, printed))}}  {shown or 'not in the paper'}")
        print(f"{'':4}{flags}")


# Fields of Model that limit the number of boxes. They make no other network.
BOX_LIMITS = ("roi_samples", "proposals_test")


def check_row(name: str, row: str, settings: Settings, tiny: dict, source) -> None:
    """Raise BadInput if a checkpoint's network is not that of this row.

    This compares the fields of Model that any row sets. If this row does not set a field,
    the default and the tiny preset's value are both accepted, and any value of a box
    limit.
    """
    rows, _ = read_rows(name)
    default = type(settings)(**choices(type(settings), rows[row]))
    own = default.replace(**without_choices(settings, rows[row]))
    differ = []
    for field_name in sorted({k for row_settings in rows.values() for k in row_settings}):
        is_set = field_name in rows[row]
        free = field_name in BOX_LIMITS and not is_set
        if free or not hasattr(settings.model, field_name):
            continue
        allowed = [getattr(own.model, field_name, None)]
        if field_name in tiny and not is_set:
            allowed.append(tiny[field_name])
        if getattr(settings.model, field_name) not in allowed:
            differ.append(flag(field_name, allowed[0]))
    if differ:
        raise BadInput(f"--row {row}: {source} was trained without {' '.join(differ)}")


def without_choices(settings: Settings, flat: dict[str, Any]) -> dict[str, Any]:
    """Flat settings without those that choose among defaults (`base`)."""
    return {k: v for k, v in flat.items() if k not in choices(type(settings), flat)}


def beside_baseline(name: str, settings: Settings) -> str:
    """A line with the mean metrics of the baseline, if it was measured with these settings.

    `studies.compare` left them in docs/results. Seed and test images may differ.
    """
    own = RESULTS / f"synthetic-{name}-0.json"
    files = sorted(RESULTS.glob(f"synthetic-{name}-baseline-*.json"))
    runs = [read_json(file) for file in files]
    if settings.data.data != "synthetic" or not (runs and own.exists()):
        return ""
    free = {*MAY_CHANGE_ON_RESUME, "seed", "data", "num_val"}
    now, measured = as_saved(settings), read_json(own)["settings"]
    for part in ("model", "run", "data"):
        if any(now[part].get(k) != v for k, v in measured[part].items() if k not in free):
            return ""
    mean = {
        key: sum(run["metrics"][key] for run in runs) / len(runs)
        for key in ("AP", "AP50", "AP75", "AP90")
    }
    seeds = counted(len(runs), "seed")
    return f"\nits baseline, trained as long: {show_metrics(mean)} (docs/results, {seeds})"
