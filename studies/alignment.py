"""Does a detector's score tell how well its boxes fit, and how often they are right?

    python -m studies.alignment d2det --weights CKPT
    python -m studies.alignment d2det --weights A --also d2det=B double_head=C   # side by side
    torchrun --nproc_per_node 2 -m studies.alignment retinanet --weights CKPT --data DIR

Prints a table, a line a checkpoint, writes all numbers into OUT/alignment.json and draws them in
OUT/alignment.png. Checkpoints of --also see the images of the first one, under their own settings.

    AP        of the detector's own order: the score's.
    oracle    AP of the same boxes ranked by score * IoU, where IoU is the true one, with the best
              object of any class: an order that nobody can know. NMS goes by it too.
    cost      oracle's AP less AP: what it costs that the score does not follow the IoU.
    Pearson   correlation of the score with the IoU of the best object of the box's own class, over
              the boxes that enter NMS and those that leave it: the matched ones, of IoU 0.5 or
              more, and all. alignment.json has Spearman's, of the ranks, too.
    D-ECE     detection calibration error: how far the share of detections that lie on an object is
              from their score, on average, over those of score 0.3 or more.
    oLRP      LRP error, from 0 (perfect) to 100 %, each class at its best score threshold.
    Loc       There: how much the boxes that lie on an object lack to IoU 1, in the mean.
    FP, FN    There: the share of boxes that lie on no object, and of objects without a box.

D2Det and CPM R-CNN do their NMS on proposals: what enters here are their final boxes. Soft-NMS
lowers the score of a second box on an object however well it fits, so less of the correlation is
left after it. IoU-aware RetinaNet's oracle takes the true IoU for the predicted one in
p^alpha IoU^(1 - alpha); its boxes are those whose class score alone passes the threshold, and it
has a line before fusion and one after. D-ECE and LRP error, with sources: studies/calibration.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import Dataset

import engine
from common import BadInput, xywh_to_xyxy
from engine.checkpoints import write_json
from engine.metrics import coco_metrics, detect, to_coco
from engine.pictures import new_figure, percent
from engine.processes import gather, rank_and_world, say
from engine.settings import Config, untrained
from iou_aware_retinanet import Detector as IoUAware
from iou_aware_retinanet import detection_confidence
from studies.calibration import (
    LOWEST,
    calibration_error,
    correlation,
    lrp_errors,
    match_detections,
)
from studies.checkpoint import (
    METHODS,
    Study,
    method_of,
    open_study,
    read_options,
    reported,
    settings_of,
)
from studies.checkpoint import Options as CheckpointOptions

STAGES = ("before NMS", "after NMS")
AP_KEYS = ("AP", *(f"AP{iou}" for iou in range(50, 100, 5)))
LRP_KEYS = ("oLRP", "Loc", "FP", "FN")


@dataclass
class Options(CheckpointOptions):
    also: tuple[str, ...] = ()  # further checkpoints, each METHOD=CKPT, beside the first


# ------------------------------------------------------------------------------ boxes and their IoU


class Unsuppressed(nn.Module):
    """A detector's boxes as they enter NMS, image by image, selected under a config."""

    def __init__(self, model: nn.Module, config: Config):
        super().__init__()
        self.model, self.config = model, config

    def candidates(self, images: list[Tensor]) -> dict[str, Tensor]:
        return self.model.select(self.model.outputs(images), self.config)

    def finish(self, candidates: dict[str, Tensor], num_images: int) -> list[dict]:
        image = candidates["image"]
        return [{k: v[image == i] for k, v in candidates.items()} for i in range(num_images)]


def objects_by_image(data: Dataset) -> dict:
    """image id -> [(xywh box, label)]. Crowds and difficult objects are left out: IoU 0 there."""
    label = {c["id"]: i for i, c in enumerate(data.categories)}
    objects: dict = {}
    for a in data.coco().get("annotations", []):
        if not (a.get("iscrowd", 0) or a.get("difficult", 0)):
            objects.setdefault(a["image_id"], []).append((a["bbox"], label[a["category_id"]]))
    return objects


def with_iou(found: dict[str, Tensor], objects: list) -> dict[str, Tensor]:
    """What is found in an image, its n boxes' IoU beside it; `objects` as in `objects_by_image`.

    `iou` [n] is with the best object of a box's own label, `iou_any` [n] of any; 0 with none.
    """
    ious = torchvision.ops.box_iou(found["boxes"], xywh_to_xyxy([box for box, _ in objects]))
    ious = F.pad(ious, (0, 1))  # [n, G + 1]: an image may have no object
    same = found["labels"][:, None] == torch.tensor([label for _, label in objects] + [-1])
    return {**found, "iou": (ious * same).amax(1), "iou_any": ious.amax(1)}


# ------------------------------------------------------------------------------ scores


def scores_of(model: nn.Module, found: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Every score [n] that can rank the boxes `found`, the oracle last."""
    if not isinstance(model, IoUAware):
        return {"score": found["scores"], "oracle": found["scores"] * found["iou_any"]}
    alpha = None if config.product else config.alpha
    cls_probs = found["cls_probs"]
    scores = {"class score": cls_probs}
    if model.config.iou_head:
        scores["fused"] = detection_confidence(cls_probs, found["iou_probs"], alpha)
    return scores | {"oracle": detection_confidence(cls_probs, found["iou_any"], alpha)}


# ------------------------------------------------------------------------------ measured


def measure(model: nn.Module, data: Dataset, config: Config, device) -> tuple[dict, dict]:
    """Boxes before and after NMS, of all processes' images: (points, results).

    points: (a score's name, one of STAGES) -> [n, 2], score and IoU of each box, where NMS goes by
    that score. results: the name of a score, the oracle last -> COCO results after its NMS.
    """
    aware = isinstance(model, IoUAware)
    choose = replace(config, alpha=1.0, product=False) if aware else config
    objects, points, results = objects_by_image(data), {}, {}

    def add(name: str, stage: str, scores: Tensor, iou: Tensor) -> None:
        points.setdefault((name, stage), []).append(torch.stack([scores, iou], 1))

    for target, found in detect(Unsuppressed(model, choose), data, choose, device):
        mine = objects.get(target["image_id"], [])
        found = with_iou(found, mine)
        for name, values in scores_of(model, found, config).items():
            ranked = {**found, "scores": values, "image": torch.zeros_like(found["labels"])}
            (kept,) = model.finish(ranked, 1, config)
            results.setdefault(name, []).extend(to_coco(target["image_id"], kept, data.categories))
            if name != "oracle":
                add(name, STAGES[0], values, found["iou"])
                add(name, STAGES[1], kept["scores"], with_iou(kept, mine)["iou"])
        if aware and model.config.iou_head:
            add("predicted IoU", STAGES[0], found["iou_probs"], found["iou"])
    shares = gather(({k: torch.cat(v) for k, v in points.items()}, results))
    shares = [share for share in shares if share[0]]  # a process may have had no image
    points = {k: torch.cat([p[k] for p, _ in shares]) for k in shares[0][0]}
    return points, {k: [r for _, share in shares for r in share[k]] for k in shares[0][1]}


def numbers_of(points: dict, results: dict, truth: dict, config: Config) -> dict:
    """What `measure` has found as numbers, by score; config says how AP is counted."""
    limits = config.metric_detections, config.metric_sides
    metrics = {name: coco_metrics(truth, found, *limits) for name, found in results.items()}
    numbers: dict = {}
    for (name, stage), pairs in points.items():
        matched = pairs[pairs[:, 1] >= 0.5]
        boxes = {"boxes": len(pairs), "matched boxes": len(matched)}
        parts = {"matched": matched, "all": pairs}
        found = boxes | {part: correlation(*p.unbind(1)) for part, p in parts.items()}
        numbers.setdefault(name, {})[stage] = found
    for name in list(results)[:-1]:  # the oracle is the last
        pairs = {k: (metrics["oracle"][k], metrics[name][k]) for k in AP_KEYS}
        numbers[name]["cost"] = {k: None if None in v else v[0] - v[1] for k, v in pairs.items()}
        matched = match_detections(truth, results[name], max(config.metric_detections))
        numbers[name] |= calibration_error(matched) | {"LRP": lrp_errors(matched)}
    return {**numbers, "metrics": metrics}


def lines_of(found: dict[str, dict]) -> dict[str, tuple[dict, dict, dict]]:
    """A line for each score that a checkpoint ranks by: its numbers, its AP, and the oracle's."""
    lines = {}
    for name, numbers in found.items():
        metrics = numbers["metrics"]
        for score in list(metrics)[:-1]:  # the oracle is the last
            label = name if len(metrics) == 2 else f"{name}, {score}"
            lines[label] = numbers[score], metrics[score], metrics["oracle"]
    return lines


def show_lines(lines: dict[str, tuple[dict, dict, dict]]) -> None:
    """Print the table: in percent, but for the correlations."""
    titles = "AP AP50 AP75 AP90 oracle cost matched all matched all D-ECE oLRP Loc FP FN".split()
    in_percent = lambda v: "-" if v is None else f"{100 * v:.1f}"  # noqa: E731
    plain = lambda v: "-" if v is None else f"{v:.2f}"  # noqa: E731
    rows = {"": titles}
    for label, (own, ap, oracle) in lines.items():
        pearson = [own[stage][part]["pearson"] for stage in STAGES for part in ("matched", "all")]
        rows[label] = [
            *(in_percent(ap[k]) for k in titles[:4]),
            *(in_percent(v) for v in (oracle["AP"], own["cost"]["AP"])),
            *(plain(v) for v in pearson),
            *(in_percent(v) for v in (own["D-ECE"], *(own["LRP"][k] for k in LRP_KEYS))),
        ]
    width = max(map(len, rows))
    say(" " * width + f"{'Pearson before NMS':>64}{'after NMS':>16}")
    for label, cells in rows.items():
        say(f"{label:{width}}" + "".join(f"{cell:>8}" for cell in cells))


# ------------------------------------------------------------------------------ drawn


def draw_alignment(
    lines: dict[str, tuple[dict, dict, dict]], points: dict[str, Tensor], path: Path
) -> None:
    """AP by IoU threshold, the reliability diagram, and LRP's parts: of each line a colour.

    Left of them each score [n, 2] of `points` against the IoU, over the matched boxes.
    """
    columns = len(points) + 3
    figure, (axes,) = new_figure(5 * columns, 4.5, 1, columns)
    for axis, (name, pairs) in zip(axes, points.items()):
        score, iou = pairs[pairs[:, 1] >= 0.5].unbind(1)
        axis.hexbin(score, iou, gridsize=30, bins="log", extent=(0, 1, 0.5, 1), mincnt=1)
        pearson = correlation(score, iou)["pearson"]
        axis.set(xlabel=f"{name} (Pearson {pearson})", ylabel="IoU with the matched object")
        axis.set(title="matched boxes that enter NMS")
    curves, diagram, bars = axes[-3:]
    diagram.plot((0, 1), (0, 1), "--", color="grey", lw=1)
    diagram.axvline(LOWEST, ls=":", color="grey", lw=1)
    for i, (label, (own, ap, oracle)) in enumerate(lines.items()):
        for metrics, style in ((ap, "o-"), (oracle, ":")):
            values = [percent(metrics[k]) for k in AP_KEYS[1:]]
            curves.plot(range(50, 100, 5), values, style, color=f"C{i}", ms=4, label=label)
        bins = zip(*(own["reliability"][k] for k in ("score", "precision")))
        known = [pair for pair in bins if None not in pair]
        if known:
            diagram.plot(*zip(*known), "o-", color=f"C{i}", ms=4)
        places = [place + 0.8 * (i + 0.5) / len(lines) - 0.4 for place in range(len(LRP_KEYS))]
        heights = [percent(own["LRP"][k]) for k in LRP_KEYS]
        bars.bar(places, heights, 0.8 / len(lines), color=f"C{i}")
    title = "AP (dotted: the oracle's)"
    curves.set(xlabel="IoU threshold in %", ylabel="AP in %", title=title, ylim=0)
    diagram.set(xlabel="mean score", ylabel="share that lies on an object (IoU 0.5)")
    diagram.set(title=f"reliability; D-ECE is right of {LOWEST}", xlim=(0, 1), ylim=(-0.02, 1.02))
    bars.set(title="LRP error and its parts", ylabel="in %, lower is better")
    bars.set_xticks(range(len(LRP_KEYS)), LRP_KEYS)
    handles = curves.get_lines()[::2]  # without the oracles
    where = dict(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=min(4, len(handles)))
    figure.legend(handles=handles, **where)
    figure.savefig(path, dpi=80, bbox_inches="tight")


# ------------------------------------------------------------------------------ study


def alignment(checkpoints: dict[str, tuple[nn.Module, Config]], data: Dataset, device, out: Path):
    """Numbers of each checkpoint, a model and its settings, by name: alignment.json, .png, a table.

    The first one's settings say how AP is counted. Processes but the first return nothing, {}.
    """
    found, limits = {}, next(iter(checkpoints.values()))[1]
    for name, (model, config) in checkpoints.items():
        if len(checkpoints) > 1:
            say(f"{name} ...")
        points, results = measure(model, data, config, device)
        if rank_and_world()[0] == 0:
            numbers = numbers_of(points, results, data.coco(), limits)
            found[name] = {"weights": config.weights, **numbers}
    if rank_and_world()[0]:
        return {}
    lines = lines_of(found)
    show_lines(lines)
    write_json(out / "alignment.json", found)
    scores = list(results)[:-1] if len(found) == 1 else []  # of several there would be too many
    clouds = {score: points[score, STAGES[0]] for score in scores}
    draw_alignment(lines, clouds, out / "alignment.png")
    say(f"results: {out}/alignment.json, .png")
    return found


def open_beside(first: Study, entry: str) -> tuple[nn.Module, Config]:
    """The model of a METHOD=CKPT and its settings, to run on the first one's images."""
    method, _, weights = entry.partition("=")
    if method not in METHODS or not weights:
        raise BadInput(f"--also {entry}: METHOD=CKPT, where METHOD is one of {', '.join(METHODS)}")
    config = settings_of(method, ["--eval", "--weights", weights])
    shared = {k: getattr(first.config, k) for k in ("device", "workers", "eval_batch", "batch")}
    config = replace(config, **shared)
    settings = {**vars(untrained(config)), "device": str(first.device)}
    loaded = engine.load(weights, method=method_of(method), **settings)
    if loaded.categories != first.data.categories:
        both = [*first.data.categories, *loaded.categories]
        odd = [c for c in both if both.count(c) == 1][:5]
        raise BadInput(f"--also {entry}: other categories than the images have: {odd}")
    return loaded.model, config


def names_of(checkpoints: list[tuple[str, str]]) -> list[str]:
    """A name for each (method, file): the method, and if others have it too the folder or path.

    >>> names_of([("gfl", "runs/a/last.pt"), ("d2det", "b/last.pt"), ("d2det", "c/last.pt")])
    ['gfl', 'd2det b', 'd2det c']
    """
    ways = (
        [method for method, _ in checkpoints],
        [f"{method} {Path(file).resolve().parent.name}" for method, file in checkpoints],
        [f"{method} {file}" for method, file in checkpoints],
    )
    names = []
    for choices in zip(*ways):
        unique = [name for name, way in zip(choices, ways) if way.count(name) == 1]
        if not unique:
            raise BadInput(f"--also: {choices[-1]} is there twice")
        names.append(unique[0])
    return names


def main(argv=None) -> dict:
    with reported():
        options, flags = read_options("alignment", Options, __doc__, argv)
        study = open_study(options, flags)
        models = [(study.model, study.config)]
        models += [open_beside(study, entry) for entry in options.also]
        files = [config.weights for _, config in models]
        methods = [options.method, *(entry.partition("=")[0] for entry in options.also)]
        checkpoints = dict(zip(names_of(list(zip(methods, files))), models))
        return alignment(checkpoints, study.data, study.device, study.out)


if __name__ == "__main__":
    main()
