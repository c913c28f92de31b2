"""Train a method and its own baseline from scratch on synthetic images, several seeds, one table.

    python docs/compare.py iou_aware_retinanet --seeds 0 1 2
    python docs/compare.py d2det --torchvision     # torchvision's Faster R-CNN on the same data too

Each line is the method's own command, `python METHOD.py --train` with the tiny preset; nothing but
the flags below differs, and a seed gives all the same images in the same order. Runs are resumed: an
interrupted one goes on, a finished one is only tested again, one of other settings is refused.
"""

from __future__ import annotations

import importlib
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import d2det

BASELINES = {  # the flags that leave out what the paper adds
    "d2det": ["--row", "table2.baseline"],
    "double_head": ["--row", "table1.fc"],
    "cpm_rcnn": ["--row", "table1.baseline"],
    "iou_aware_retinanet": ["--no-iou-head"],
    "dc_loss_clnms": ["--no-iac", "--no-dc-loss", "--nms", "plain"],
}
KEYS = ("AP", "AP50", "AP75", "AP90")


class TorchvisionFasterRCNN(torch.nn.Module):
    """torchvision's detector, with D2Det's settings, behind the methods that common.py calls."""

    def __init__(self, config: d2det.Config, num_classes: int):
        super().__init__()
        sides = [config.anchor_scale * 4 * 2**i for i in range(5)]
        proposals = config.proposals_train, config.proposals_test
        self.net = common.torchvision_detector(
            "two_stage",
            config,
            None,  # the number of classes: the predictor below has it
            rpn_anchor_generator=AnchorGenerator([(int(s),) for s in sides], [(0.5, 1.0, 2.0)] * 5),
            rpn_pre_nms_top_n_train=proposals[0],
            rpn_post_nms_top_n_train=proposals[0],
            rpn_pre_nms_top_n_test=proposals[1],
            rpn_post_nms_top_n_test=proposals[1],
            box_head=TwoMLPHead(config.fpn_channels * 49, config.fc_channels),
            box_predictor=FastRCNNPredictor(config.fc_channels, num_classes + 1),
            box_batch_size_per_image=config.roi_samples,
            box_positive_fraction=config.roi_positive,
            box_detections_per_img=config.max_detections,
        )

    def loss(self, images, targets):
        theirs = [{"boxes": t["boxes"], "labels": t["labels"] + 1} for t in targets]
        return self.net([i.float() / 255 for i in images], theirs)

    def candidates(self, images):
        found = self.net([i.float() / 255 for i in images])
        image = torch.cat([torch.full_like(f["labels"], i) for i, f in enumerate(found)])
        flat = {k: torch.cat([f[k] for f in found]) for k in ("boxes", "scores", "labels")}
        return {**flat, "labels": flat["labels"] - 1, "image": image}

    def finish(self, candidates, num_images):
        order = candidates["scores"].argsort(descending=True)
        keys = ("boxes", "scores", "labels", "image")
        return common.split_images(*[candidates[k][order] for k in keys], num_images)


def train_torchvision(argv):
    return common.run(
        "torchvision", d2det.Config, TorchvisionFasterRCNN, {}, {}, {}, d2det.TINY, argv
    )


@dataclass
class Options:
    method: Annotated[Literal[tuple(BASELINES)], tyro.conf.Positional]  # script to compare
    seeds: tuple[int, ...] = (0, 1, 2)  # one training of each contender per seed
    num_val: int = 1000  # synthetic images to evaluate on
    steps: int = 0  # length of each training; 0: the tiny preset's
    torchvision: bool = False  # add torchvision's Faster R-CNN, with D2Det's settings
    out: str = "runs/compare"  # results folder


def table(runs: dict[str, list[dict]]) -> list[str]:
    """Mean and standard deviation over seeds, then of the first minus each other, seed by seed."""

    def line(name: str, rows: list[dict]) -> str:
        text = []
        for values in ([100 * r[k] for r in rows] for k in KEYS):
            spread = f" ± {statistics.stdev(values):.1f}" if len(rows) > 1 else ""
            text.append(f"{statistics.mean(values):.1f}{spread}")
        return f"| {name} | " + " | ".join(text) + " |"

    first, *others = runs
    lines = ["| | " + " | ".join(KEYS) + " |", "|---" * (1 + len(KEYS)) + "|"]
    lines += [line(name, rows) for name, rows in runs.items()]
    for other in others:
        pairs = zip(runs[first], runs[other])
        gains = [{k: a[k] - b[k] for k in KEYS} for a, b in pairs]
        lines.append(line(f"{first} minus {other}, seed by seed", gains))
    return lines


def main(argv=None):
    options = tyro.cli(Options, args=argv)
    method = importlib.import_module(options.method)
    contenders = {
        options.method: (method.main, []),
        "its baseline": (method.main, BASELINES[options.method]),
    }
    if options.torchvision:
        contenders["torchvision"] = (train_torchvision, [])
    runs: dict[str, list[dict]] = {name: [] for name in contenders}
    for seed in options.seeds:
        for name, (train, flags) in contenders.items():
            out = Path(options.out) / options.method / f"{name.replace(' ', '_')}_{seed}"
            shared = ["--train", "--resume", "--preset", "tiny", "--eval-every", "0"]
            shared += ["--seed", str(seed), "--num-val", str(options.num_val)]
            shared += ["--steps", str(options.steps), "--out", str(out)]
            runs[name].append(train([*shared, *flags]))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, seeds {options.seeds}")
    print("\n".join(table(runs)))


if __name__ == "__main__":
    main()
