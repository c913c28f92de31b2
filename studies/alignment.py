"""Does a detector's score tell how well its boxes fit, and how often they are right?

    python -m studies.alignment d2det --weights CKPT
    python -m studies.alignment d2det --weights A --also d2det=B double_head=C   # side by side
    torchrun --nproc_per_node 2 -m studies.alignment retinanet --weights CKPT --data DIR

Prints a table with a line for each checkpoint, writes OUT/alignment.json and draws
OUT/alignment.png. Checkpoints of --also keep their settings and see the first one's images.

    AP        as the detector ranks its boxes: by score.
    oracle    AP if boxes, also in NMS, are ranked by score * true IoU with the best object of
              any class. No detector knows this IoU.
    cost      oracle's AP minus AP: the AP lost because the score does not follow the IoU.
    Pearson   correlation of the score with the IoU of the best object of the box's class, over
              the boxes before and after NMS: the matched ones (IoU of 0.5 or more), and all.
    D-ECE     the mean distance between the score of a detection and the share of detections
              with that score that lie on an object, over scores of 0.3 or more.
    oLRP      LRP error, 0 (perfect) to 100 %, each class at its best score threshold.
    Loc       its part for position: 1 - IoU of the boxes on an object, on average.
    FP, FN    its parts for boxes on no object and for objects without a box, as shares.

D2Det and CPM R-CNN run NMS on proposals, so "before NMS" means their final boxes. Soft-NMS
lowers the score of a second box on an object even if it fits well, which weakens the
correlation after NMS. IoU-aware RetinaNet has a line before fusion and one after; its oracle
replaces the predicted IoU, and its boxes are those whose class score passes the threshold.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from common import BadInput
from engine.detector import split_images
from engine.metrics import detect, to_coco
from engine.pictures import new_figure, percent
from engine.processes import gather, print_once, rank_and_world
from iou_aware_retinanet import detection_confidence
from studies import checkpoint
from studies.calibration import (
    LOWEST,
    LRP_KEYS,
    calibration_error,
    correlation,
    lrp_errors,
    match_detections,
    objects_by_image,
    with_iou,
)
from studies.checkpoint import (
    METHODS,
    Study,
    open_model,
    open_study,
    read_options,
    reported,
    write_results,
)

STAGES = ("before NMS", "after NMS")


@dataclass
class Options(checkpoint.Options):
    also: tuple[str, ...] = ()  # further checkpoints, each METHOD=CKPT, beside the first


# ------------------------------------------------------------------------------ measured


class BeforeNMS(nn.Module):
    """A detector whose detections are its candidates: the boxes as they enter the last NMS."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.outputs, self.candidates = model.outputs, model.candidates

    def detections(self, candidates: dict[str, Tensor], num_images: int, test) -> list[dict]:
        image = candidates["image"]
        counts = image.bincount(minlength=num_images).tolist()
        return split_images(candidates, image, counts)


def scores_of(model: nn.Module, found: dict[str, Tensor], test) -> dict[str, Tensor]:
    """Every score [n] that can rank the boxes of an image, the oracle last."""
    if "iou_probs" not in found:
        return {"score": found["scores"], "oracle": found["scores"] * found["iou_any"]}
    alpha = None if test.product else test.alpha
    scores = {"class score": found["cls_probs"]}
    if model.settings.iou_head:
        scores["fused"] = detection_confidence(found["cls_probs"], found["iou_probs"], alpha)
    scores["oracle"] = detection_confidence(found["cls_probs"], found["iou_any"], alpha)
    return scores


def measure(study: Study) -> tuple[dict, dict]:
    """Boxes before and after NMS, of all processes' images: (points, results).

    points: (a score's name, one of STAGES) -> score and IoU of each box [n, 2]; NMS uses that
    score. results: a score's name, the oracle last -> COCO results after NMS by it.
    """
    model, test = study.model, study.settings.test
    settings = study.settings
    if hasattr(test, "alpha"):  # candidates by their class score alone
        settings = settings.replace(alpha=1.0, product=False)
    objects = objects_by_image(study.data)
    points, results = defaultdict(list), defaultdict(list)
    for target, found in detect(BeforeNMS(model), study.data, settings):
        found = with_iou(found, objects[target["image_id"]])
        found["image"] = torch.zeros_like(found["labels"])  # the only one of its batch
        found["index"] = torch.arange(len(found["labels"]))
        for name, scores in scores_of(model, found, test).items():
            (kept,) = model.detections({**found, "scores": scores}, 1, test)
            results[name] += to_coco(target["image_id"], kept, study.data.categories)
            if name != "oracle":
                before = scores, found["iou"]
                after = kept["scores"], found["iou"][kept["index"]]
                points[name, STAGES[0]].append(torch.stack(before, 1))
                points[name, STAGES[1]].append(torch.stack(after, 1))
        if "iou_probs" in found and model.settings.iou_head:
            pair = found["iou_probs"], found["iou"]
            points["predicted IoU", STAGES[0]].append(torch.stack(pair, 1))
    all_points, all_results = defaultdict(list), defaultdict(list)
    for some_points, some_results in gather((points, results)):
        for key, pairs in some_points.items():
            all_points[key] += pairs
        for name, rows in some_results.items():
            all_results[name] += rows
    return {key: torch.cat(pairs) for key, pairs in all_points.items()}, dict(all_results)


def numbers_of(points: dict, results: dict, study: Study) -> dict:
    """What `measure` returns as numbers by score. AP counts as the settings of `study` say."""
    metrics = {name: study.metrics(rows) for name, rows in results.items()}
    numbers: dict = {}
    for (name, stage), pairs in points.items():
        matched = pairs[pairs[:, 1] >= 0.5]
        numbers.setdefault(name, {})[stage] = {
            "boxes": len(pairs),
            "matched boxes": len(matched),
            "matched": correlation(*matched.unbind(1)),
            "all": correlation(*pairs.unbind(1)),
        }
    most = max(study.settings.test.metric_detections)
    for name in list(results)[:-1]:  # the oracle is the last
        pair = metrics["oracle"]["AP"], metrics[name]["AP"]
        matched = match_detections(study.truth, results[name], most)
        numbers[name]["cost"] = None if None in pair else pair[0] - pair[1]
        numbers[name] |= calibration_error(matched) | {"LRP": lrp_errors(matched)}
    return {**numbers, "metrics": metrics}


def lines_of(found: dict[str, dict]) -> dict[str, dict]:
    """A line for each score of each checkpoint: its numbers, its own and the oracle's AP."""
    lines = {}
    for name, numbers in found.items():
        metrics = numbers["metrics"]
        *scores, oracle = metrics
        for score in scores:
            label = name if len(scores) == 1 else f"{name}, {score}"
            lines[label] = {**numbers[score], "own": metrics[score], "oracle": metrics[oracle]}
    return lines


def show_lines(lines: dict[str, dict]) -> None:
    """Print the table, in percent except for the correlations; nan: undefined."""
    titles = ["AP", "AP50", "AP75", "AP90", "oracle", "cost", *["matched", "all"] * 2, "D-ECE"]
    titles += LRP_KEYS
    width = max(map(len, lines))
    print_once(" " * width + f"{'Pearson before NMS':>64}{'after NMS':>16}")
    print_once(" " * width + "".join(f"{title:>8}" for title in titles))
    for label, line in lines.items():
        aps = [*(line["own"][key] for key in titles[:4]), line["oracle"]["AP"], line["cost"]]
        pearson = [line[stage][part] for stage in STAGES for part in ("matched", "all")]
        cells = [f"{percent(value):8.1f}" for value in aps]
        cells += [f"{math.nan if value is None else value:8.2f}" for value in pearson]
        cells += [f"{percent(v):8.1f}" for v in (line["D-ECE"], *line["LRP"].values())]
        print_once(f"{label:{width}}" + "".join(cells))


# ------------------------------------------------------------------------------ drawn


def draw_alignment(lines: dict[str, dict], points: dict[str, Tensor], path: Path) -> None:
    """AP by IoU threshold, the reliability diagram and LRP's parts; each line has a colour.

    Left of these, each score of `points` [n, 2] against the IoU, over the matched boxes.
    """
    columns = len(points) + 3
    figure, (axes,) = new_figure(5 * columns, 4.5, 1, columns)
    for axis, (name, pairs) in zip(axes, points.items()):
        score, iou = pairs[pairs[:, 1] >= 0.5].unbind(1)
        axis.hexbin(score, iou, gridsize=30, bins="log", extent=(0, 1, 0.5, 1), mincnt=1)
        axis.set(xlabel=f"{name} (Pearson {correlation(score, iou)})")
        axis.set(title="matched boxes before NMS", ylabel="IoU with the matched object")
    curves, diagram, bars = axes[-3:]
    diagram.plot((0, 1), (0, 1), "--", color="grey", lw=1)
    diagram.axvline(LOWEST, ls=":", color="grey", lw=1)
    for i, (label, line) in enumerate(lines.items()):
        for ranking, style in (("own", "o-"), ("oracle", ":")):
            values = [percent(line[ranking][f"AP{iou}"]) for iou in range(50, 100, 5)]
            curves.plot(range(50, 100, 5), values, style, color=f"C{i}", ms=4, label=label)
        table = line["reliability"]
        bins = [pair for pair in zip(table["score"], table["precision"]) if None not in pair]
        if bins:
            diagram.plot(*zip(*bins), "o-", color=f"C{i}", ms=4)
        places = [place + 0.8 * (i + 0.5) / len(lines) - 0.4 for place in range(len(LRP_KEYS))]
        heights = [percent(line["LRP"][k]) for k in LRP_KEYS]
        bars.bar(places, heights, 0.8 / len(lines), color=f"C{i}")
    title = "AP (dotted: the oracle's)"
    curves.set(xlabel="IoU threshold in %", ylabel="AP in %", title=title, ylim=0)
    diagram.set(xlabel="mean score", ylabel="share that lies on an object (IoU 0.5)")
    diagram.set(title=f"reliability; D-ECE is right of {LOWEST}")
    diagram.set(xlim=(0, 1), ylim=(-0.02, 1.02))
    bars.set(title="LRP error and its parts", ylabel="in %, lower is better")
    bars.set_xticks(range(len(LRP_KEYS)), LRP_KEYS)
    handles = curves.get_lines()[::2]  # without the oracles
    below = dict(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=min(4, len(handles)))
    figure.legend(handles=handles, **below)
    figure.savefig(path, dpi=80, bbox_inches="tight")


# ------------------------------------------------------------------------------ study


def alignment(studies: dict[str, Study]) -> dict[str, dict]:
    """Numbers of each checkpoint by name: alignment.json, alignment.png and a table.

    The first one's settings say how AP counts. Only the first process returns the numbers.
    """
    first, found = next(iter(studies.values())), {}
    for name, study in studies.items():
        print_once(f"{name} ...")
        points, results = measure(study)
        if rank_and_world()[0] == 0:
            found[name] = {"weights": study.weights, **numbers_of(points, results, first)}
    if rank_and_world()[0]:
        return {}
    lines = lines_of(found)
    show_lines(lines)
    scores = list(results)[:-1] if len(found) == 1 else []  # several have no room
    clouds = {score: points[score, STAGES[0]] for score in scores}
    draw_alignment(lines, clouds, first.out / "alignment.png")
    write_results(first.out / "alignment.json", found)
    return found


def open_beside(first: Study, entry: str) -> Study:
    """The checkpoint of a METHOD=CKPT, to be run on the first one's images."""
    method, _, weights = entry.partition("=")
    if method not in METHODS or not weights:
        known = ", ".join(METHODS)
        raise BadInput(f"--also {entry}: METHOD=CKPT, where METHOD is one of {known}")
    study = open_model(checkpoint.Options(method, weights), ["--device", str(first.device)])
    if study.categories != first.categories:
        raise BadInput(f"--also {entry}: other categories than the images have")
    settings = dataclasses.replace(study.settings, run=first.settings.run)
    return dataclasses.replace(study, settings=settings, data=first.data)


def main(argv=None) -> dict[str, dict]:
    with reported():
        options, flags = read_options("alignment", Options, __doc__, argv)
        first = open_study(options, flags)
        studies = [first, *(open_beside(first, entry) for entry in options.also)]
        methods = [options.method, *(entry.partition("=")[0] for entry in options.also)]
        long = [f"{method} {study.weights}" for method, study in zip(methods, studies)]
        if len({*long}) < len(long):
            raise BadInput("--also: a checkpoint is there twice")
        names = [m if methods.count(m) == 1 else name for m, name in zip(methods, long)]
        return alignment(dict(zip(names, studies)))


if __name__ == "__main__":
    main()
