"""torchvision's Faster R-CNN as a script of this project: the same data, settings and metrics.

    python -m studies.torchvision_rcnn --train --preset tiny --seed 0

It has D2Det's flags. Those of the method itself, `pool_norm` and `class_std` do nothing here; to
compare it with `d2det.py --row table2.baseline`, train that with `--no-pool-norm`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

import d2det
import engine
from d2det import Settings
from engine.detector import BaseDetector
from studies.bench import torchvision_detector


class Detector(BaseDetector):
    """torchvision's detector behind the contract of engine/detector.py.

    Its own NMS and limits are part of its forward pass: of Test only `max_detections` is honoured.
    """

    Test = d2det.Test

    def __init__(self, model: d2det.Model, num_classes: int):
        nn.Module.__init__(self)  # not BaseDetector's, which builds our backbone
        self.settings, self.num_classes = model, num_classes
        sides = [model.anchor_scale * 4 * 2**i for i in range(5)]
        self.net = torchvision_detector(
            "two_stage",
            model,
            None,  # the number of classes: the predictor below has it
            rpn_anchor_generator=AnchorGenerator([(int(s),) for s in sides], [(0.5, 1.0, 2.0)] * 5),
            rpn_pre_nms_top_n_train=model.proposals_train,
            rpn_post_nms_top_n_train=model.proposals_train,
            rpn_pre_nms_top_n_test=model.proposals_test,
            rpn_post_nms_top_n_test=model.proposals_test,
            box_head=TwoMLPHead(model.fpn_channels * 49, model.fc_channels),
            box_predictor=FastRCNNPredictor(model.fc_channels, num_classes + 1),
            box_batch_size_per_image=model.roi_samples,
            box_positive_fraction=model.roi_positive,
            _skip_resize=True,  # images come as the network gets them
        )

    def loss(self, images: list[Tensor], targets: list[dict]) -> dict[str, Tensor]:
        shifted = [{"boxes": t["boxes"], "labels": t["labels"] + 1} for t in targets]
        return self.net([i.float() / 255 for i in images], shifted)

    @torch.no_grad()
    def outputs(self, images: list[Tensor]) -> dict:
        return dict(found=self.net([i.float() / 255 for i in images]))

    def candidates(self, outputs: dict, test) -> dict[str, Tensor]:
        found = outputs["found"]
        image = [torch.full_like(f["labels"], i) for i, f in enumerate(found)]
        together = {k: torch.cat([f[k] for f in found]) for k in ("boxes", "scores", "labels")}
        return together | dict(labels=together["labels"] - 1, image=torch.cat(image))

    def suppress(self, boxes: Tensor, scores: Tensor, groups: Tensor, test):
        keep = scores.argsort(descending=True, stable=True)
        return keep, scores[keep]


def main(argv=None):
    return engine.run("torchvision_rcnn", Settings, Detector, argv)


if __name__ == "__main__":
    main()
