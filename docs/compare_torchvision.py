"""Train D2Det, its own baseline and torchvision's Faster R-CNN on the same data, and print a table.

Same images in the same order, backbone, pyramid width, proposals, RoI samples, optimiser, schedule
and evaluation; one process, one after the other. The rest of torchvision's detector is its own.

    python docs/compare_torchvision.py                      # synthetic data, minutes on a CPU
    python docs/compare_torchvision.py --seeds 0 1 2 --epochs 3 --only torchvision
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import d2det


class TorchvisionFasterRCNN(torch.nn.Module):
    """torchvision's detector behind the four methods that common.py's engine calls."""

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


CONTENDERS = {
    "torchvision Faster R-CNN": (TorchvisionFasterRCNN, {}),
    "d2det.py, baseline row": (d2det.Detector, d2det.ROWS["table2.baseline"]),
    "d2det.py": (d2det.Detector, {}),
}


@dataclass
class Options:
    seeds: tuple[int, ...] = (0,)  # one training of each contender per seed
    epochs: float = d2det.TINY["epochs"]  # passes over the data
    only: str = ""  # train just the contenders whose name contains this
    out: str = "runs/compare"  # results folder


def main(argv=None):
    options = tyro.cli(Options, args=argv)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    lines = []
    for seed in options.seeds:
        for name, (detector, row) in CONTENDERS.items():
            if options.only not in name:
                continue
            settings = {
                **d2det.TINY,
                **row,
                "seed": seed,
                "epochs": options.epochs,
                "eval_every": 0,
            }
            config = replace(d2det.Config(), **settings)
            torch.manual_seed(seed)
            model = detector(config, len(common.SHAPES))
            train_data, val_data = common.load_data(config)
            start = time.perf_counter()
            folder = f"{options.out}/{name.replace(' ', '_')}_{seed}"
            metrics = common.train(model, config, train_data, val_data, folder)
            minutes = (time.perf_counter() - start) / 60
            numbers = "  ".join(f"{metrics[k]:.3f}" for k in ("AP", "AP50", "AP75", "AP90"))
            lines.append(f"{name:26} {seed:4}  {numbers}  {minutes:7.1f}")
    print(f"{'':26} seed  AP     AP50   AP75   AP90   minutes")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
