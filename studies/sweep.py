"""What does a number or a choice at test time do to the AP? One forward pass, many settings.

    python -m studies.sweep iou_aware_retinanet --weights CKPT   # alpha: Tables 3 and 4
    python -m studies.sweep cpm_rcnn --weights CKPT              # gamma: Figure 7
    python -m studies.sweep double_head --weights CKPT    # heads, fusions: Table 3, Figure 6
    torchrun --nproc_per_node 2 -m studies.sweep dc_loss_clnms --weights CKPT   # NMS: Table 3

Prints a table and writes OUT/sweep.json; alpha and gamma are drawn in OUT/sweep.png. The
network runs once; only scores, the choice of boxes and their suppression are repeated. The
detections of all settings are in memory: 4 GB for twelve settings and COCO's 5,000 images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from torch import nn

from common import BadInput
from engine.metrics import detect_under, show_table, to_coco
from engine.pictures import new_figure, percent
from engine.processes import gather, rank_and_world
from engine.settings import Test
from studies import checkpoint
from studies.checkpoint import Study, open_study, read_options, reported, write_results


def alphas(model: nn.Module, test) -> dict[str, Test]:
    """IoU-aware RetinaNet, Tables 3 and 4; none: the plain product."""
    if not model.settings.iou_head:
        raise BadInput("a sweep of alpha needs a model with an IoU head (--iou-head)")
    tests = {"none": replace(test, product=True)}
    for i in range(10, -1, -1):
        tests[f"{i / 10}"] = replace(test, product=False, alpha=i / 10)
    return tests


def gammas(model: nn.Module, test) -> dict[str, Test]:
    """CPM R-CNN, Figure 7; none: the class score alone."""
    if not model.settings.rsm:
        raise BadInput("a sweep of gamma needs a model with RSM (--rsm)")
    tests = {f"{i / 10}": replace(test, gamma=i / 10) for i in range(11)}
    return {"none": replace(test, ism_use="ignore", gamma=1.0), **tests}


def fusions(model: nn.Module, test) -> dict[str, Test]:
    """Double-Head, Table 3 and Figure 6 (a) to (d): heads alone, then fused."""
    if model.settings.heads != "double_head":
        raise BadInput("a sweep of fusions needs both heads (--heads double_head)")
    whole = [name for name in ("conv", "fc") if name in model.cls and name in model.box]
    ways = ("none", "max", "average", "complementary") if len(model.cls) == 2 else ("none",)
    alone = {f"{name} alone": replace(test, alone=name) for name in whole}
    return alone | {way: replace(test, alone="", fusion=way) for way in ways}


def suppressions(_, test) -> dict[str, Test]:
    """DC loss and CL-NMS, Table 3; literal: the distance is added as the text says."""
    tests = {nms: replace(test, nms=nms, cl_literal=False) for nms in ("plain", "soft", "cl")}
    return tests | {"cl, literal": replace(test, nms="cl", cl_literal=True)}


SWEEPS = {  # method -> (the detector, its Test) -> the Test of each row
    "iou_aware_retinanet": alphas,
    "cpm_rcnn": gammas,
    "double_head": fusions,
    "dc_loss_clnms": suppressions,
}
DRAWN = {  # method -> what its rows' numbers are, and the title
    "iou_aware_retinanet": (
        "alpha (0: predicted IoU alone, 1: class score alone)",
        "score = p^alpha IoU^(1 - alpha); dotted: p IoU",
    ),
    "cpm_rcnn": (
        "gamma (0: RSM alone, 1: cls * ISM)",
        "score = (cls * ISM)^gamma RSM^(1 - gamma); dotted: cls",
    ),
}


def metrics_under(study: Study, tests: dict[str, Test]) -> dict[str, dict]:
    """Metrics under each of these; one forward pass. Only the first process returns them."""
    results: dict[str, list[dict]] = {label: [] for label in tests}
    found = detect_under(study.model, study.data, study.settings, [*tests.values()])
    for target, under in found:
        for rows, detections in zip(results.values(), under):
            rows += to_coco(target["image_id"], detections, study.categories)
    shares = gather(results)
    if rank_and_world()[0]:
        return {}
    return {label: study.metrics([r for s in shares for r in s[label]]) for label in tests}


def draw(rows: dict[str, dict], xlabel: str, title: str, path: Path) -> None:
    """AP over the number that names each row; the row "none" is a dotted line."""
    figure, ((axis,),) = new_figure(7, 4.5)
    values = {float(k): v for k, v in rows.items() if k != "none"}
    for i, key in enumerate(("AP", "AP50", "AP75", "AP90")):
        axis.plot([*values], [percent(v[key]) for v in values.values()], f"C{i}o-", label=key)
        axis.axhline(percent(rows["none"][key]), color=f"C{i}", ls=":", lw=1)
    axis.set(xlabel=xlabel, ylabel="AP in %", title=title)
    axis.legend()
    figure.savefig(path, dpi=80)


@dataclass
class Options(checkpoint.Options):
    method: Annotated[Literal[tuple(SWEEPS)], tyro.conf.Positional]  # whose checkpoint


def main(argv=None) -> dict[str, dict]:
    with reported():
        options, flags = read_options("sweep", Options, __doc__, argv)
        study = open_study(options, flags)
        rows = metrics_under(study, SWEEPS[options.method](study.model, study.settings.test))
        if rows:
            show_table(rows)
            if options.method in DRAWN:
                draw(rows, *DRAWN[options.method], study.out / "sweep.png")
            write_results(study.out / "sweep.json", rows)
        return rows


if __name__ == "__main__":
    main()
