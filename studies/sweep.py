"""One forward pass, many settings: what a number or a choice at test time does to the AP.

    python -m studies.sweep iou_aware_retinanet --weights CKPT            # alpha: Tables 3 and 4
    python -m studies.sweep cpm_rcnn --what scores --weights CKPT         # gamma (Figure 7), scores
    torchrun --nproc_per_node 2 -m studies.sweep dc_loss_clnms --weights CKPT --data DIR

Prints a table, writes OUT/sweep_WHAT.json and .png. The network runs once; only scores, the choice
of boxes and their suppression are repeated. The detections under all settings are in memory
together: about 4 GB for twelve settings and COCO's 5,000 images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from torch import nn

from common import BadInput
from engine.checkpoints import write_json
from engine.metrics import coco_metrics, detect_under, show_table, to_coco
from engine.pictures import new_figure, percent
from engine.processes import gather, print_once, rank_and_world
from studies.checkpoint import Options, Study, open_study, read_options, reported

# ------------------------------------------------------------------------------ what is varied

# Each function takes the detector and returns label -> the settings of `Test` that differ.
TENTHS = tuple(round(i / 10, 1) for i in range(11))


def alphas(model: nn.Module) -> dict[str, dict]:
    """IoU-aware RetinaNet, Tables 3 and 4; none: the plain product."""
    if not model.settings.iou_head:
        raise BadInput("alpha needs a model with an IoU head (--iou-head)")
    values = {f"{a:.1f}": dict(product=False, alpha=a) for a in reversed(TENTHS)}
    return {"none": dict(product=True), **values}


def gammas(model: nn.Module) -> dict[str, dict]:
    """CPM R-CNN, Figure 7; none: the class score alone."""
    if not model.settings.rsm:
        raise BadInput("gamma needs a model with RSM (--rsm)")
    none = dict(ism_use="ignore", gamma=1.0)
    return {"none": none} | {f"{g:.1f}": dict(gamma=g) for g in TENTHS}


def cpm_scores(model: nn.Module) -> dict[str, dict]:
    """CPM R-CNN, Figure 8: the same boxes, ranked by each score that this model has."""
    scores: dict[str, dict] = {"cls": dict(ism_use="ignore", gamma=1.0)}
    if model.settings.ism:
        scores["without RSM"] = dict(gamma=1.0)
    if model.settings.rsm:
        scores["without ISM"] = dict(ism_use="ignore")
    if model.settings.ism and model.settings.rsm:
        scores["fused"] = {}
    return scores


def fusions(model: nn.Module) -> dict[str, dict]:
    """Double-Head, Table 3 and Figure 6 (a) to (d): heads alone, then fused."""
    if model.settings.heads != "double_head":
        raise BadInput("fusion needs a model with both heads (--heads double_head)")
    whole = [name for name in ("conv", "fc") if name in model.cls and name in model.box]
    ways = ("none", "max", "average", "complementary") if len(model.cls) == 2 else ("none",)
    alone = {f"{name} alone": dict(alone=name) for name in whole}
    return alone | {way: dict(alone="", fusion=way) for way in ways}


def suppressions(_) -> dict[str, dict]:
    """DC loss and CL-NMS, Table 3; literal: the distance is added as the text says."""
    kinds = {nms: dict(nms=nms, cl_literal=False) for nms in ("plain", "soft", "cl")}
    return kinds | {"cl, literal": dict(nms="cl", cl_literal=True)}


@dataclass
class Sweep:
    """What is varied, and how it is drawn: over a number, or as one line a setting."""

    settings: Callable[[nn.Module], dict[str, dict]]
    title: str
    xlabel: str = ""


SWEEPS: dict[str, dict[str, Sweep]] = {
    "iou_aware_retinanet": {
        "alpha": Sweep(
            alphas,
            "score = p^alpha IoU^(1 - alpha); dotted: p IoU",
            "alpha (0: predicted IoU alone, 1: class score alone)",
        )
    },
    "cpm_rcnn": {
        "gamma": Sweep(
            gammas,
            "score = (cls * ISM)^gamma RSM^(1 - gamma); dotted: cls",
            "gamma (0: RSM alone, 1: cls * ISM)",
        ),
        "scores": Sweep(cpm_scores, "the same boxes, ranked by"),
    },
    "double_head": {"fusion": Sweep(fusions, "class score of")},
    "dc_loss_clnms": {"nms": Sweep(suppressions, "the same boxes, suppressed by")},
}
ALL = tuple(what for sweeps in SWEEPS.values() for what in sweeps)


# ------------------------------------------------------------------------------ measured


def metrics_under(study: Study, changes: dict[str, dict]) -> dict[str, dict]:
    """Metrics by label, each under the study's Test with those changes; one forward pass."""
    tests = [dataclasses.replace(study.settings.test, **c) for c in changes.values()]
    results: list[list[dict]] = [[] for _ in tests]
    for target, under in detect_under(study.model, study.data, study.settings, tests):
        for mine, found in zip(results, under):
            mine += to_coco(target["image_id"], found, study.data.categories)
    shares = gather(results)
    metrics = None
    if rank_and_world()[0] == 0:
        truth, metrics = study.data.coco(), {}
        for label, test, parts in zip(changes, tests, zip(*shares)):
            merged = [result for part in parts for result in part]
            metrics[label] = coco_metrics(truth, merged, test.metric_detections, test.metric_sides)
    return gather(metrics)[0]


def sweep(what: str, study: Study) -> dict[str, dict]:
    """Metrics by setting, as a table, OUT/sweep_WHAT.json and OUT/sweep_WHAT.png."""
    plan = next(sweeps[what] for sweeps in SWEEPS.values() if what in sweeps)
    rows = metrics_under(study, plan.settings(study.model))
    if rank_and_world()[0] == 0:
        show_table(rows)
        write_json(study.out / f"sweep_{what}.json", rows)
        path = study.out / f"sweep_{what}.png"
        if plan.xlabel:
            draw_over_number(rows, plan, path)
        else:
            draw_by_setting(rows, plan.title, path)
    print_once(f"results: {study.out}/sweep_{what}.json, .png")
    return rows


# ------------------------------------------------------------------------------ drawn


def draw_over_number(rows: dict[str, dict], plan: Sweep, path: Path) -> None:
    """AP over the number that names each row; the row "none" is a dotted line."""
    figure, ((axis,),) = new_figure(7, 4.5)
    values = {float(k): v for k, v in rows.items() if k != "none"}
    for i, key in enumerate(("AP", "AP50", "AP75", "AP90")):
        axis.plot([*values], [percent(v[key]) for v in values.values()], f"C{i}o-", label=key)
        axis.axhline(percent(rows["none"][key]), color=f"C{i}", ls=":", lw=1)
    axis.set(xlabel=plan.xlabel, ylabel="AP in %", title=plan.title)
    axis.legend()
    figure.savefig(path, dpi=80)


def draw_by_setting(rows: dict[str, dict], title: str, path: Path) -> None:
    """One line a row: AP by IoU threshold and by size of object (as CPM's Figure 8)."""
    figure, (axes,) = new_figure(13, 4.5, 1, 2)
    by_iou = ("AP50", "AP60", "AP70", "AP80", "AP90")
    for axis, keys in zip(axes, (by_iou, ("AP_small", "AP_medium", "AP_large"))):
        for name, metrics in rows.items():
            axis.plot(keys, [percent(metrics[k]) for k in keys], "o-", label=name)
        axis.set(ylabel="AP in %", title=title)
        axis.legend()
    figure.savefig(path, dpi=80)


# ------------------------------------------------------------------------------ command line


@dataclass
class SweepOptions(Options):
    method: Annotated[Literal[tuple(SWEEPS)], tyro.conf.Positional]  # whose checkpoint
    what: Literal[("", *ALL)] = ""  # what is varied (default: the method's first)


def main(argv=None) -> dict[str, dict]:
    with reported():
        options, flags = read_options("sweep", SweepOptions, __doc__, argv)
        known = SWEEPS[options.method]
        what = options.what or next(iter(known))
        if what not in known:
            raise BadInput(f"--what {what}: {options.method} has {', '.join(known)}")
        return sweep(what, open_study(options, flags))


if __name__ == "__main__":
    main()
