"""Train a method and its own baseline from scratch on synthetic images, several seeds, one table.

    python -m studies.compare iou_aware_retinanet --seeds 0 1 2
    python -m studies.compare d2det --torchvision  # torchvision's Faster R-CNN on the same data too

Each line is the method's own command, `python METHOD.py --train` with the tiny preset; nothing but
the flags of `BASELINES` differs, and a seed gives all the same images in the same order. Runs are
resumed: an interrupted one goes on, a finished one is only tested again, one of other settings is
refused. Runs, table and numbers are in OUT/METHOD.

In the table a detector's ± is the standard deviation over the seeds. Differences are taken seed by
seed, and their ± is the 95 % interval of the mean (Student's t). Where it holds zero, so many seeds
cannot tell the difference from nothing: "not resolved".
"""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

import d2det
import engine
from common import BadInput
from engine.checkpoints import write_json
from engine.detector import BaseDetector
from studies.bench import torchvision_detector
from studies.checkpoint import BASELINES, PAPERS, method_of, read_options, reported

KEYS = ("AP", "AP50", "AP75", "AP90")
# Student's t: 97.5 % of its values lie below, by number of seeds (degrees of freedom and one)
T_975 = dict(zip(range(2, 11), (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)))


# ------------------------------------------------------------------------------ torchvision's


class TorchvisionFasterRCNN(BaseDetector):
    """torchvision's detector, with D2Det's settings, behind the contract of `engine.detector`.

    It knows no `pool_norm` and no `class_std`: for a fair comparison train both without.
    """

    def __init__(self, config: d2det.Config, num_classes: int):
        nn.Module.__init__(self)  # not BaseDetector's, which builds our backbone
        self.config, self.num_classes = config, num_classes
        sides = [config.anchor_scale * 4 * 2**i for i in range(5)]
        self.net = torchvision_detector(
            "two_stage",
            config,
            None,  # the number of classes: the predictor below has it
            rpn_anchor_generator=AnchorGenerator([(int(s),) for s in sides], [(0.5, 1.0, 2.0)] * 5),
            rpn_pre_nms_top_n_train=config.proposals_train,
            rpn_post_nms_top_n_train=config.proposals_train,
            rpn_pre_nms_top_n_test=config.proposals_test,
            rpn_post_nms_top_n_test=config.proposals_test,
            box_head=TwoMLPHead(config.fpn_channels * 49, config.fc_channels),
            box_predictor=FastRCNNPredictor(config.fc_channels, num_classes + 1),
            box_batch_size_per_image=config.roi_samples,
            box_positive_fraction=config.roi_positive,
            box_detections_per_img=config.max_detections,
        )

    def loss(self, images: list[Tensor], targets: list[dict]) -> dict[str, Tensor]:
        theirs = [{"boxes": t["boxes"], "labels": t["labels"] + 1} for t in targets]
        return self.net([i.float() / 255 for i in images], theirs)

    def outputs(self, images: list[Tensor]) -> dict[str, Tensor]:
        """Its detections: torchvision has done its NMS already."""
        found = self.net([i.float() / 255 for i in images])
        image = torch.cat([torch.full_like(f["labels"], i) for i, f in enumerate(found)])
        flat = {k: torch.cat([f[k] for f in found]) for k in ("boxes", "scores", "labels")}
        return {**flat, "labels": flat["labels"] - 1, "image": image}  # its label 0: background

    def select(self, outputs: dict[str, Tensor], config: engine.Config) -> dict[str, Tensor]:
        return outputs

    def suppress(self, boxes: Tensor, scores: Tensor, groups: Tensor, config: engine.Config):
        keep = scores.argsort(descending=True, stable=True)
        return keep, scores[keep]


def train_torchvision(argv: list[str]) -> dict:
    return engine.run("torchvision", d2det.Config, TorchvisionFasterRCNN, {}, {}, d2det.TINY, argv)


# ------------------------------------------------------------------------------ table


def interval(gains: list[float]) -> tuple[float, float] | None:
    """95 % interval of the mean of paired differences; None of one.

    >>> interval([1.0, 3.0])  # mean 2, standard error 1
    (-10.706, 14.706)
    """
    if len(gains) < 2:
        return None
    half = T_975[len(gains)] * statistics.stdev(gains) / len(gains) ** 0.5
    mean = statistics.mean(gains)
    return round(mean - half, 4), round(mean + half, 4)


def describe(gains: list[float]) -> str:
    """A mean difference, its interval, and whether its sign is resolved."""
    mean, found = statistics.mean(gains), interval(gains)
    if found is None:
        return f"{mean:+.1f}, one seed"
    low, high = found
    resolved = "" if low > 0 or high < 0 else ", not resolved"
    return f"{mean:+.1f} ± {(high - low) / 2:.1f}{resolved}"


def table(runs: dict[str, list[dict]]) -> list[str]:
    """Each contender over the seeds, then the first minus each other, seed by seed."""

    def spread(values: list[float]) -> str:
        deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{deviation}"

    first, *others = runs
    percents = {n: {k: [100 * r[k] for r in rows] for k in KEYS} for n, rows in runs.items()}
    lines = ["| | " + " | ".join(KEYS) + " |", "|---" * (1 + len(KEYS)) + "|"]
    for name, found in percents.items():
        lines.append(f"| {name} | " + " | ".join(spread(found[k]) for k in KEYS) + " |")
    for other in others:
        pairs = {k: zip(percents[first][k], percents[other][k]) for k in KEYS}
        gains = (describe([a - b for a, b in pairs[k]]) for k in KEYS)
        lines.append(f"| {first} minus {other}, seed by seed | " + " | ".join(gains) + " |")
    return lines


# ------------------------------------------------------------------------------ command line


@dataclass
class CompareOptions:
    method: Annotated[Literal[PAPERS], tyro.conf.Positional]  # script to compare
    seeds: tuple[int, ...] = (0, 1, 2)  # one training of each contender per seed, at most 10
    num_val: int = 1000  # synthetic images to evaluate on
    steps: int = 0  # length of each training; 0: the tiny preset's
    torchvision: bool = False  # add torchvision's Faster R-CNN, with D2Det's settings
    out: str = "runs/compare"  # results folder


def compare(options: CompareOptions, flags: list[str]) -> dict[str, list[dict]]:
    """Metrics of each contender, seed by seed: compare.json, table.md and a table."""
    if not 1 <= len(set(options.seeds)) == len(options.seeds) <= max(T_975):
        raise BadInput(f"--seeds: 1 to {max(T_975)} of them, each another")
    method = method_of(options.method)
    contenders = {
        options.method: (method.main, []),
        "its baseline": (method.main, BASELINES[options.method]),
    }
    if options.torchvision:
        contenders["torchvision"] = (train_torchvision, [])
    folder = Path(options.out) / options.method
    runs: dict[str, list[dict]] = {name: [] for name in contenders}
    for seed in options.seeds:
        for name, (train, own) in contenders.items():
            shared = ["--train", "--resume", "--preset", "tiny", "--eval-every", "0"]
            shared += ["--seed", str(seed), "--num-val", str(options.num_val)]
            shared += ["--steps", str(options.steps)]
            shared += ["--out", str(folder / f"{name.replace(' ', '_')}_{seed}")]
            runs[name].append(train([*shared, *flags, *own]))
    if os.environ.get("RANK", "0") == "0":
        print(
            f"torch {torch.__version__}, {torch.get_num_threads()} threads, seeds {options.seeds}"
        )
        print("\n".join(table(runs)))
        write_json(folder / "compare.json", {"seeds": options.seeds, "metrics": runs})
        (folder / "table.md").write_text("\n".join(table(runs)) + "\n")
        print(f"results: {folder}/compare.json, table.md")
    return runs


def main(argv=None) -> dict[str, list[dict]]:
    with reported():
        return compare(*read_options("compare", CompareOptions, __doc__, argv))


if __name__ == "__main__":
    main()
