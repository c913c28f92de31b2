"""Several models in one figure: CPM R-CNN's Figure 8, or Double-Head's Figure 6.

    python -m studies.models --models runs/faster_rcnn/last.pt runs/cpm_rcnn/last.pt
    python -m studies.models --what lambdas --models runs/lambda_*/last.pt --data DIR

`lines`: a line for each model, AP by IoU threshold and AP by size of object. Each checkpoint is
evaluated here, all of them on the same images. A run's metrics.json is cheaper: it is taken as it
is, and that it is about the same images is then the caller's word.

`lambdas`: AP over the weights lambda_fc and lambda_conv (Eq. 2 and 3) with which Double-Head models
were trained, one model or more for each pair; of several, the mean. As in the paper, each model is
tested in four ways: (a) conv-head alone, (b) fc-head alone, (c) classes from fc-head and boxes from
conv-head, (d) the same with both heads' classes fused (Eq. 4). Grey: no such model, or, where a
lambda of 1 leaves a head with one task, no such way.

Writes OUT/models.json and .png, or OUT/lambdas.json and .png.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from torch import nn

from common import BadInput
from engine.checkpoints import find_script, load_checkpoint, write_json
from engine.metrics import evaluate, show_table
from engine.pictures import new_figure, percent
from engine.processes import rank_and_world, say
from studies import checkpoint
from studies.checkpoint import METHODS, Study, open_study, read_options, reported
from studies.sweep import Sweep, draw_by_setting, evaluate_variants

DRAWN = "AP AP50 AP60 AP70 AP75 AP80 AP90 AP_small AP_medium AP_large".split()


@dataclass
class Options:
    models: tuple[str, ...] = ()  # checkpoints; for lines also metrics.json of runs
    what: Literal["lines", "lambdas"] = "lines"  # the figure
    names: tuple[str, ...] = ()  # of the models in the figure, in their order (default: folders)
    out: str = ""  # results folder (default: the folder `studies` beside the first model)


# ------------------------------------------------------------------------------ models


def name_models(options: Options) -> dict[str, Path]:
    """The models' files by name; BadInput where one is missing, or two have one name."""
    files = [Path(file) for file in options.models]
    if not files:
        raise BadInput("this needs --models: checkpoints, as in --models runs/*/last.pt")
    if options.names and len(options.names) != len(files):
        raise BadInput(f"--names: {len(options.names)} names of {len(files)} models")
    names = list(options.names) or [file.resolve().parent.name for file in files]
    if len({*names}) < len(names) and not options.names:
        names = [str(file) for file in files]
    if len({*names}) < len(names):
        raise BadInput("two of the --models have the same name: give each its own with --names")
    if missing := [file for file in files if not file.is_file()]:
        raise BadInput(f"{missing[0]}: no such file")
    return dict(zip(names, files))


def read_metrics(file: Path) -> dict:
    """A run's metrics.json."""
    try:
        metrics = json.loads(file.read_text())
        wrong = [k for k in DRAWN if not isinstance(metrics[k], (float, int, type(None)))]
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise BadInput(f"{file}: not a run's metrics.json ({type(e).__name__}: {e})") from e
    if wrong:
        raise BadInput(f"{file}: {wrong[0]} is {metrics[wrong[0]]!r}, not a number")
    return metrics


def open_models(files: dict[str, Path], flags: list[str], out: Path) -> Iterator[tuple[str, Study]]:
    """Each checkpoint by name, one after the other, if its images are those of the one before."""
    first, truth = "", None
    for name, file in files.items():
        if file.suffix == ".json":
            raise BadInput(f"{file}: this figure needs checkpoints")
        script = find_script(load_checkpoint(file), file).__name__.split(".")[-1]
        if script not in METHODS:
            raise BadInput(f"{file}: made by {script}; there are {', '.join(METHODS)}")
        say(f"{name}: {script}, {file}")
        study = open_study(checkpoint.Options(script, str(file), str(out)), flags)
        theirs = study.data.coco()
        if truth is not None and theirs != truth:
            raise BadInput(
                f"{file}: its validation images are not those of {first}; flags such as --data, "
                f"--num-val or --image-size say for all which to take"
            )
        first, truth = first or str(file), theirs
        yield name, study


# ------------------------------------------------------------------------------ lines


def lines(files: dict[str, Path], flags: list[str], out: Path) -> dict[str, dict]:
    """Metrics by name of the model, as a table, models.json and models.png (CPM's Figure 8)."""
    ready = {k: read_metrics(file) for k, file in files.items() if file.suffix == ".json"}
    rest = {k: file for k, file in files.items() if k not in ready}
    for name, study in open_models(rest, flags, out):
        ready[name] = evaluate(study.model, study.data, study.config, study.device)
    rows = {name: ready[name] for name in files}
    if rank_and_world()[0] == 0:
        show_table(rows)
        write_json(out / "models.json", rows)
        draw_by_setting(rows, Sweep(lambda _: {}, "AP by IoU and by size"), out / "models.png")
    say(f"results: {out}/models.json, .png")
    return rows


# ------------------------------------------------------------------------------ lambdas


def ways(model: nn.Module) -> dict[str, dict]:
    """Of the paper's four ways those that a model can be tested in, and their settings."""
    whole = [name for name in ("conv", "fc") if name in model.cls and name in model.box]
    found = {f"{name}-head alone": dict(alone=name) for name in whole}
    if "conv" in model.box and "fc" in model.cls:
        found["fc-head's classes, conv-head's boxes"] = dict(alone="", fusion="none")
        if "conv" in model.cls:
            found["classes fused, conv-head's boxes"] = dict(alone="", fusion="complementary")
    return found


WAYS = (
    "conv-head alone",
    "fc-head alone",
    "fc-head's classes, conv-head's boxes",
    "classes fused, conv-head's boxes",
)


def lambdas(files: dict[str, Path], flags: list[str], out: Path) -> dict[str, dict]:
    """Of each model its lambdas and its metrics by way: lambdas.json, lambdas.png (Figure 6)."""
    found: dict[str, dict] = {}
    for name, study in open_models(files, flags, out):
        model, config = study.model, study.config
        if getattr(config, "heads", "") != "double_head":
            raise BadInput(f"{files[name]}: lambdas needs models with both heads (double_head)")
        configs = {way: replace(config, **changes) for way, changes in ways(model).items()}
        rows = evaluate_variants(model, configs, study.data, config, study.device)
        where = dict(lambda_fc=config.lambda_fc, lambda_conv=config.lambda_conv)
        found[name] = {**where, "metrics": rows}
        if rank_and_world()[0] == 0:
            show_table(rows)
    if rank_and_world()[0] == 0:
        write_json(out / "lambdas.json", found)
        draw_lambdas(found, out / "lambdas.png")
    say(f"results: {out}/lambdas.json, .png")
    return found


def lambda_grid(found: dict[str, dict], way: str, key: str = "AP") -> tuple[np.ndarray, list, list]:
    """Mean metric in percent by lambda_conv, falling, and lambda_fc, rising, and these; nan: none.

    >>> model = dict(lambda_fc=0.7, lambda_conv=0.8, metrics={"fc-head alone": {"AP": 0.25}})
    >>> other = {**model, "lambda_conv": 1.0, "metrics": {}}
    >>> lambda_grid({"a": model, "b": other}, "fc-head alone")
    (array([[nan],
           [25.]]), [1.0, 0.8], [0.7])
    """
    rows = sorted({m["lambda_conv"] for m in found.values()}, reverse=True)
    columns = sorted({m["lambda_fc"] for m in found.values()})
    cells: dict[tuple, list] = {}
    for model in found.values():
        if way in model["metrics"]:
            place = rows.index(model["lambda_conv"]), columns.index(model["lambda_fc"])
            cells.setdefault(place, []).append(percent(model["metrics"][way][key]))
    grid = np.full((len(rows), len(columns)), math.nan)
    for place, values in cells.items():
        grid[place] = np.mean(values)
    return grid, rows, columns


def draw_lambdas(found: dict[str, dict], path: Path) -> None:
    """Four heat maps on one scale of colours, the best pair of each framed."""
    from matplotlib.patches import Rectangle

    grids = [lambda_grid(found, way) for way in WAYS]
    known = np.concatenate([grid[~np.isnan(grid)] for grid, _, _ in grids])
    low, high = (known.min(), known.max()) if len(known) else (0, 1)
    high = max(high, low + 0.1)
    count, height = len(grids[0][2]), len(grids[0][1])
    figure, (axes,) = new_figure(2.4 + 4 * max(3, 0.75 * count), 1.6 + max(2, 0.6 * height), 1, 4)
    for axis, way, letter, (grid, rows, columns) in zip(axes, WAYS, "abcd", grids):
        axis.set_facecolor("lightgrey")
        axis.imshow(grid, vmin=low, vmax=high, cmap="viridis", aspect="auto")
        for (y, x), value in np.ndenumerate(grid):
            if not math.isnan(value):
                ink = "black" if value > (low + high) / 2 else "white"
                axis.text(x, y, f"{value:.1f}", ha="center", va="center", color=ink)
        if not np.isnan(grid).all():
            y, x = np.unravel_index(np.nanargmax(grid), grid.shape)
            frame = dict(width=1, height=1, fill=False, ec="tab:red", lw=2.5, clip_on=False)
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), **frame))
        axis.set_xticks(range(len(columns)), [f"{v:g}" for v in columns])
        axis.set_yticks(range(len(rows)), [f"{v:g}" for v in rows])
        axis.set_title(f"({letter}) {way}", fontsize=9)
        axis.set(xlabel="lambda_fc", ylabel="lambda_conv")
    figure.savefig(path, dpi=80)


def main(argv=None) -> dict:
    with reported():
        options, flags = read_options("models", Options, __doc__, argv)
        files = name_models(options)
        out = Path(options.out or next(iter(files.values())).parent / "studies")
        if out.exists() and not out.is_dir():
            raise BadInput(f"--out {out}: a file has that name")
        return dict(lines=lines, lambdas=lambdas)[options.what](files, flags, out)


if __name__ == "__main__":
    main()
