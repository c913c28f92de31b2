"""Several models in one figure: CPM R-CNN's Figure 8, or Double-Head's Figure 6.

    python -m studies.models --models runs/faster_rcnn/last.pt runs/cpm_rcnn/last.pt
    python -m studies.models --what lambdas --models runs/lambda_*/last.pt --data DIR

`lines`: one line a model, AP by IoU threshold and AP by size of object. Checkpoints are evaluated
here, all on the same images. A run's metrics.json may be given instead, which is cheaper; it is
taken on trust that it is about the same images.

`lambdas`: AP over the weights lambda_fc and lambda_conv (Eq. 2 and 3) that Double-Head models were
trained with; if several models have the same pair, their mean. As in the paper, each model is
tested in four ways: (a) conv-head alone, (b) fc-head alone, (c) classes from fc-head and boxes from
conv-head, (d) the same with both heads' classes fused (Eq. 4). Grey: there is no such model, or no
such way, because a lambda of 1 leaves a head with one task.

Writes OUT/models.json and .png, or OUT/lambdas.json and .png.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from torch import nn

from common import BadInput
from data.files import read_json
from engine.checkpoints import find_script, load_checkpoint, write_json
from engine.metrics import evaluate, show_table
from engine.pictures import new_figure, percent
from engine.processes import print_once, rank_and_world
from studies import checkpoint
from studies.checkpoint import (
    METHODS,
    Study,
    open_study,
    read_options,
    reported,
    results_folder,
)
from studies.sweep import draw_by_setting, metrics_under

DRAWN = "AP AP50 AP60 AP70 AP75 AP80 AP90 AP_small AP_medium AP_large".split()


@dataclass
class Options:
    models: tuple[str, ...] = ()  # checkpoints; for lines also metrics.json of runs
    what: Literal["lines", "lambdas"] = "lines"  # the figure
    names: tuple[str, ...] = ()  # of the models in the figure, in their order (default: folders)
    out: str = ""  # results folder (default: the folder `studies` beside the first model)


# ------------------------------------------------------------------------------ models


def name_models(options: Options) -> dict[str, Path]:
    """The models' files by name; raises BadInput if one is missing or two have one name."""
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
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise BadInput(f"{missing[0]}: no such file")
    return dict(zip(names, files))


def read_metrics(file: Path) -> dict:
    """A run's metrics.json."""
    metrics = read_json(file)
    for key in DRAWN:
        value = metrics.get(key, "missing") if isinstance(metrics, dict) else "missing"
        if not isinstance(value, (float, int, type(None))):
            raise BadInput(f"{file}: not a run's metrics.json ({key} is {value!r})")
    return metrics


def open_models(files: dict[str, Path], flags: list[str], out: Path) -> Iterator[tuple[str, Study]]:
    """Each checkpoint with its name, in turn; raises BadInput unless all have the same images."""
    first, truth = "", None
    for name, file in files.items():
        if file.suffix == ".json":
            raise BadInput(f"{file}: this figure needs checkpoints")
        script = find_script(load_checkpoint(file), file).__name__.split(".")[-1]
        if script not in METHODS:
            raise BadInput(f"{file}: made by {script}; there are {', '.join(METHODS)}")
        print_once(f"{name}: {script}, {file}")
        study = open_study(checkpoint.Options(script, str(file), str(out)), flags)
        own = study.data.coco()
        if truth is not None and own != truth:
            raise BadInput(
                f"{file}: its validation images are not those of {first}; choose the same for all "
                "with flags such as --data, --num-val or --image-size"
            )
        first, truth = first or str(file), own
        yield name, study


# ------------------------------------------------------------------------------ lines


def lines(files: dict[str, Path], flags: list[str], out: Path) -> dict[str, dict]:
    """Metrics by model: a table, models.json and models.png (CPM's Figure 8)."""
    metrics = {k: read_metrics(file) for k, file in files.items() if file.suffix == ".json"}
    rest = {k: file for k, file in files.items() if k not in metrics}
    for name, study in open_models(rest, flags, out):
        metrics[name] = evaluate(study.model, study.data, study.settings)
    rows = {name: metrics[name] for name in files}
    if rank_and_world()[0] == 0:
        show_table(rows)
        write_json(out / "models.json", rows)
        draw_by_setting(rows, "AP by IoU and by size", out / "models.png")
    print_once(f"results: {out}/models.json, .png")
    return rows


# ------------------------------------------------------------------------------ lambdas

WAYS = {
    "conv-head alone": dict(alone="conv"),
    "fc-head alone": dict(alone="fc"),
    "fc-head's classes, conv-head's boxes": dict(alone="", fusion="none"),
    "classes fused, conv-head's boxes": dict(alone="", fusion="complementary"),
}


def ways_of(model: nn.Module) -> dict[str, dict]:
    """Those of the paper's four ways that a model can be tested in, with their settings."""
    conv, fc, mixed, fused = WAYS
    possible = {
        conv: "conv" in model.cls and "conv" in model.box,
        fc: "fc" in model.cls and "fc" in model.box,
        mixed: "fc" in model.cls and "conv" in model.box,
        fused: "fc" in model.cls and "conv" in model.cls and "conv" in model.box,
    }
    return {way: WAYS[way] for way in WAYS if possible[way]}


def lambdas(files: dict[str, Path], flags: list[str], out: Path) -> dict[str, dict]:
    """Each model's lambdas, and its metrics by way: lambdas.json and lambdas.png (Figure 6)."""
    found: dict[str, dict] = {}
    for name, study in open_models(files, flags, out):
        settings = study.settings.model
        if getattr(settings, "heads", "") != "double_head":
            raise BadInput(f"{files[name]}: lambdas needs models with both heads (double_head)")
        rows = metrics_under(study, ways_of(study.model))
        found[name] = {
            "lambda_fc": settings.lambda_fc,
            "lambda_conv": settings.lambda_conv,
            "metrics": rows,
        }
        if rank_and_world()[0] == 0:
            show_table(rows)
    if rank_and_world()[0] == 0:
        write_json(out / "lambdas.json", found)
        draw_lambdas(found, out / "lambdas.png")
    print_once(f"results: {out}/lambdas.json, .png")
    return found


def lambda_grid(found: dict[str, dict], way: str, key: str = "AP") -> tuple[np.ndarray, list, list]:
    """Mean metric in percent by lambda_conv (falling) and lambda_fc (rising), nan where unknown.

    Returns the grid, its rows' lambda_conv and its columns' lambda_fc.

    >>> model = dict(lambda_fc=0.7, lambda_conv=0.8, metrics={"fc-head alone": {"AP": 0.25}})
    >>> other = {**model, "lambda_conv": 1.0, "metrics": {}}
    >>> lambda_grid({"a": model, "b": other}, "fc-head alone")
    (array([[nan],
           [25.]]), [1.0, 0.8], [0.7])
    """
    rows = sorted({m["lambda_conv"] for m in found.values()}, reverse=True)
    columns = sorted({m["lambda_fc"] for m in found.values()})
    grid = np.full((len(rows), len(columns)), math.nan)
    for y, conv in enumerate(rows):
        for x, fc in enumerate(columns):
            values = [
                percent(m["metrics"][way][key])
                for m in found.values()
                if (m["lambda_conv"], m["lambda_fc"]) == (conv, fc) and way in m["metrics"]
            ]
            if values:
                grid[y, x] = np.mean(values)
    return grid, rows, columns


def draw_lambdas(found: dict[str, dict], path: Path) -> None:
    """Four heat maps on one colour scale, the best pair of each framed."""
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
            best = Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, ec="tab:red", lw=2.5)
            best.set_clip_on(False)
            axis.add_patch(best)
        axis.set_xticks(range(len(columns)), [f"{v:g}" for v in columns])
        axis.set_yticks(range(len(rows)), [f"{v:g}" for v in rows])
        axis.set_title(f"({letter}) {way}", fontsize=9)
        axis.set(xlabel="lambda_fc", ylabel="lambda_conv")
    figure.savefig(path, dpi=80)


def main(argv=None) -> dict[str, dict]:
    with reported():
        options, flags = read_options("models", Options, __doc__, argv)
        files = name_models(options)
        out = results_folder(options.out or next(iter(files.values())).parent / "studies")
        draw = lines if options.what == "lines" else lambdas
        return draw(files, flags, out)


if __name__ == "__main__":
    main()
