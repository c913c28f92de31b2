"""Does the score follow the IoU? Of any method, over the boxes that enter its NMS.

    python -m studies.alignment d2det --weights CKPT
    torchrun --nproc_per_node 2 -m studies.alignment retinanet --weights CKPT --data DIR

IoU is that of a box with the best object of its own class; a box is `matched` where it is at least
0.5. (D2Det and CPM R-CNN do their NMS on proposals: these are their final boxes.) OUT/alignment.json
holds Pearson's and Spearman's correlation of score and IoU, over the matched and over all boxes, and
the AP of the same boxes in other orders; OUT/alignment.png draws them.

The oracle is an order that nobody can know: score * IoU, where IoU is the true one, with the best
object of any class. It says how much a perfect score would gain. IoU-aware RetinaNet's oracle takes
the true IoU for the predicted one in p^alpha IoU^(1 - alpha); its boxes are those whose class score
alone passes the threshold, and its score is measured before and after fusion.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import Dataset

from common import xywh_to_xyxy
from engine.checkpoints import write_json
from engine.metrics import coco_metrics, detect, show_table, to_coco
from engine.pictures import new_figure, percent
from engine.processes import gather, rank_and_world, say
from engine.settings import Config
from iou_aware_retinanet import Detector as IoUAware
from iou_aware_retinanet import detection_confidence
from studies.checkpoint import Options, open_study, read_options, reported

# ------------------------------------------------------------------------------ boxes before NMS


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


def candidates_with_iou(model: nn.Module, data: Dataset, config: Config, device):
    """Yield (image id, boxes as they enter NMS) of this process's images; for each box also

    `iou` [n], with the best object of its own label, and `iou_any` [n], of any; 0 with none. Crowds
    and difficult objects do not count, so that a box on one has IoU 0.
    """
    label = {c["id"]: i for i, c in enumerate(data.categories)}
    objects: dict = {}
    for a in data.coco()["annotations"]:
        if not (a.get("iscrowd", 0) or a.get("difficult", 0)):
            objects.setdefault(a["image_id"], []).append((a["bbox"], label[a["category_id"]]))
    for target, found in detect(Unsuppressed(model, config), data, config, device):
        mine = objects.get(target["image_id"], [])
        ious = torchvision.ops.box_iou(found["boxes"], xywh_to_xyxy([box for box, _ in mine]))
        ious = F.pad(ious, (0, 1))  # [n, G + 1]: an image may have no object
        same = found["labels"][:, None] == torch.tensor([k for _, k in mine] + [-1])
        yield target["image_id"], {**found, "iou": (ious * same).amax(1), "iou_any": ious.amax(1)}


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


def correlation(x: Tensor, y: Tensor) -> dict[str, float | None]:
    """Pearson's and Spearman's coefficient of x and y [n]; None where undefined.

    >>> correlation(torch.tensor([1., 2., 3.]), torch.tensor([1., 4., 9.]))["spearman"]
    1.0
    """
    found: dict[str, float | None] = dict(pearson=None, spearman=None)

    def ranks(v: Tensor) -> Tensor:  # equal values share their mean rank
        _, place, count = v.unique(return_inverse=True, return_counts=True)
        return (count.cumsum(0) - (count - 1) / 2)[place]

    for name, pair in zip(found, ((x, y), (ranks(x), ranks(y)))):
        value = torch.corrcoef(torch.stack(pair).double())[0, 1].item() if len(x) > 1 else math.nan
        found[name] = round(value, 4) if value == value else None
    return found


# ------------------------------------------------------------------------------ study


def alignment(model: nn.Module, data: Dataset, config: Config, device, out: Path) -> dict:
    """Correlations, and AP by ranking: alignment.json, alignment.png and a table."""
    aware = isinstance(model, IoUAware)
    choose = replace(config, alpha=1.0, product=False) if aware else config
    points: dict[str, list] = {}
    results: dict[str, list] = {}
    for image_id, found in candidates_with_iou(model, data, choose, device):
        scores = scores_of(model, found, config)
        measured = {k: v for k, v in scores.items() if k != "oracle"} | {"IoU": found["iou"]}
        if aware and model.config.iou_head:
            measured["predicted IoU"] = found["iou_probs"]
        for name, values in measured.items():
            points.setdefault(name, []).append(values)
        for name, values in scores.items():
            ranked = {**found, "scores": values, "image": torch.zeros_like(found["labels"])}
            (kept,) = model.finish(ranked, 1, config)
            results.setdefault(name, []).extend(to_coco(image_id, kept, data.categories))
    shares = gather(({k: torch.cat(v) for k, v in points.items()}, results))
    shares = [share for share in shares if share[0]]  # a process may have had no image
    points = {k: torch.cat([p[k] for p, _ in shares]) for k in shares[0][0]}
    results = {k: [r for _, share in shares for r in share[k]] for k in shares[0][1]}
    return report(points, results, data.coco(), out)


def report(points: dict[str, Tensor], results: dict, truth: dict, out: Path) -> dict:
    """Numbers and figure of `alignment`: points are [n] by name, results detections by ranking."""
    matched = {k: v[points["IoU"] >= 0.5] for k, v in points.items()}
    summary: dict = {"candidates": len(points["IoU"]), "matched": len(matched["IoU"])}
    for name in [k for k in points if k != "IoU"]:
        both = {"matched": matched, "all": points}
        summary[name] = {k: correlation(p[name], p["IoU"]) for k, p in both.items()}
        say(f"{name:13} against IoU: {summary[name]}")
    if rank_and_world()[0] == 0:
        summary["metrics"] = {name: coco_metrics(truth, found) for name, found in results.items()}
        show_table(summary["metrics"])
        write_json(out / "alignment.json", summary)
        draw_alignment(matched, summary["metrics"], out / "alignment.png")
    say(f"results: {out}/alignment.json, .png")
    return summary


def draw_alignment(points: dict[str, Tensor], rows: dict[str, dict], path: Path) -> None:
    """Each score against the IoU of matched boxes, and AP by IoU threshold in each order."""
    shown = [name for name in rows if name in points]
    figure, (axes,) = new_figure(5 * len(shown) + 5, 4.5, 1, len(shown) + 1)
    for axis, name in zip(axes, shown):
        x, y = points[name], points["IoU"]
        axis.hexbin(x, y, gridsize=30, bins="log", extent=(0, 1, 0.5, 1), mincnt=1)
        pearson = correlation(x, y)["pearson"]
        axis.set(xlabel=f"{name} (Pearson {pearson})", ylabel="IoU with the matched object")
    keys = ("AP50", "AP60", "AP70", "AP80", "AP90")
    for name, metrics in rows.items():
        values = [percent(metrics[k]) for k in keys]
        axes[-1].plot([int(k[2:]) for k in keys], values, "o-", label=name)
    axes[-1].set(xlabel="IoU threshold in %", ylabel="AP in %", title="the same boxes, ranked by")
    axes[-1].legend()
    figure.savefig(path, dpi=80)


def main(argv=None) -> dict:
    with reported():
        options, flags = read_options("alignment", Options, __doc__, argv)
        study = open_study(options, flags)
        return alignment(study.model, study.data, study.config, study.device, study.out)


if __name__ == "__main__":
    main()
