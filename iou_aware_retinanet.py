"""IoU-aware RetinaNet (Wu et al., 2019): let the detector say how well each box fits.

RetinaNet ranks boxes by class score, which knows nothing of how well they lie: a sloppy box with a
sure class suppresses a good one. Here one more 3x3 convolution on the box tower predicts the IoU
of each regressed anchor with its object, and boxes are ranked by p^alpha * IoU^(1 - alpha).

    image -> ResNet-FPN -> P3..P7
      class tower, 4 convs -> cls_logits [B, N, K]
      box tower, 4 convs   -> box_deltas [B, N, 4]
                           -> iou_logits [B, N]       target: IoU(decoded box, its gt)
      score = sigmoid(cls)^alpha * sigmoid(iou)^(1 - alpha) -> top 1000 a level -> NMS

Rows (COCO AP as printed in the paper; ours: not run, needs COCO and GPU days):
    table1.retinanet_r50 35.9 .._r101 38.1 .._x101 39.0   table1.r50 36.9  .r101 39.2  .x101 40.6
    table2.baseline 34.3   table2.l2 35.1   table2.bce 35.4   (val 2017 from here on, 600/1000 px)
    table3.none 35.4   table3.alpha_1.0 34.5 .. alpha_0.5 35.5 .. alpha_0.0 0.4   (table4: AP50..90)
    table5.retinanet_r50 51.4   .._r101 55.1   table5.r50 53.6   table5.r101 56.2   (VOC 2007 test)
    Table 1's other lines are other detectors. Tables 3 and 4 are one model: `--sweep-alpha`.

Deviations (paper | authors' release | here):
    Target IoU in Eq. 3: - | not detached, the IoU loss also moves the box | release: BCE draws it to
        its gt where the predicted IoU is above 0.5 and away below it. `--no-iou-grad` detaches it.
    Number of positives: N_pos | each image counts at least one | release.
    L2, L1 and smooth L1 IoU losses: no formula | - | of sigmoid(logit) - IoU, squared without 1/2.
    Where scores are fused: "subsequent NMS and AP" | before top 1000 and threshold | release.
    Table 1's X-101: ResNeXt-101-32x8d | 32x4d, the baseline too | 32x8d: torchvision has no
        weights of 32x4d.
    P7: - | no ReLU between P6 and P7 | release. Anchors: - | "+1" box sizes, rounded | neither.
    Boxes that enter NMS: - | all classes of a level's best 1000 anchors | its best 1000 (anchor,
        class) pairs, RetinaNet's own rule: the rest rarely reach the best 100 and cost most of NMS;
        `--all-classes` is the release. At alpha = 0 an anchor's classes all tie, and it matters.
    Anchors in the batch's padding and in crowd regions: - | plain background | do not train.

"none" in Tables 2 to 4 is p * IoU: the ranking of alpha = 0.5, whose square it is. The two differ
only through the score threshold, which cuts the square more often (35.4 and 35.5 in the paper).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common

# B images, K classes, A = 9 anchors per cell, N anchors per image, G ground-truth boxes
# P positive anchors of the whole batch; R anchors kept for prediction
# labels of anchors [B, N]: 1 positive, 0 negative, -1 ignored; classes 0..K-1, background K
# cls_probs = sigmoid(cls_logits): p in the paper; iou_probs = sigmoid(iou_logits): IoU in the paper


@dataclass
class Config(common.Config):
    """IoU-aware RetinaNet with ResNet-50 on COCO: Table 1."""

    iou_head: bool = True  # predict IoU (3.1); off: RetinaNet, the baseline
    iou_loss: Literal["bce", "l2", "l1", "smooth_l1"] = "bce"  # loss of the IoU (Eq. 3, Table 2)
    iou_grad: bool = True  # the IoU loss also moves the box, through its target (release)
    iou_weight: float = 1.0  # weight of the loss of the predicted IoU (Eq. 4)
    cls_weight: float = 1.0  # weight of the focal loss (Eq. 4)
    box_weight: float = 1.0  # weight of the box loss (Eq. 4)
    alpha: float = 0.5  # score = p^alpha IoU^(1-alpha) (Eq. 5; release; best in Table 3: 0.4, 0.5)
    product: bool = False  # score = p * IoU instead ("none" in Tables 2 to 4)
    focal_alpha: float = 0.25  # focal loss: weight of the true class
    focal_gamma: float = 2.0  # focal loss: exponent
    box_beta: float = 0.11  # smooth L1 is quadratic below (release)
    fg_iou: float = 0.5  # anchors are positive from this IoU on
    bg_iou: float = 0.4  # anchors are negative below this IoU
    tower_convs: int = 4  # convolutions in each tower
    tower_groups: int = 0  # groups of a GroupNorm after each of them; 0: no norm (paper)
    anchor_scale: float = 4.0  # anchors' side in strides, times 2^(0, 1/3, 2/3)
    score_threshold: float = 0.05  # on the fused score
    top_scores: int = 1000  # (anchor, class) pairs per level that are decoded, by fused score
    all_classes: bool = False  # all classes of so many anchors instead of so many pairs (release)
    nms_iou: float = 0.5  # NMS per class suppresses above this IoU
    max_detections: int = 100  # detections kept per image
    sweep_alpha: bool = False  # score --weights under every alpha in one pass and draw the curve
    analyze: bool = False  # correlation of score and IoU before and after fusion, and the oracle
    lr: float = 0.01  # learning rate for 16 images a step (release)
    clip_norm: float = 35.0  # largest gradient norm (release)


# ------------------------------------------------------------------------------ equations


def iou_prediction_loss(
    logits: Tensor, ious: Tensor, kind: str = "bce", beta: float = 0.11
) -> Tensor:
    """Eq. 3 and the losses compared in Table 2, one value per box: logits [P], ious [P] -> [P].

    The target may carry a gradient. BCE is least, but not 0, where sigmoid(logit) is the IoU.

    >>> iou_prediction_loss(torch.zeros(1), torch.tensor([0.75]), "l2")
    tensor([0.0625])
    """
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(logits, ious, reduction="none")
    if kind == "smooth_l1":  # choice: the boxes' beta; with 1 it would be half of L2
        return F.smooth_l1_loss(logits.sigmoid(), ious, beta=beta, reduction="none")
    return {"l1": F.l1_loss, "l2": F.mse_loss}[kind](logits.sigmoid(), ious, reduction="none")


def detection_confidence(cls_probs: Tensor, iou_probs: Tensor, alpha: float | None) -> Tensor:
    """Eq. 5: cls_probs^alpha * iou_probs^(1 - alpha), or with alpha None their plain product.

    alpha = 1 gives cls_probs and alpha = 0 gives iou_probs, exactly. Shapes broadcast.

    >>> detection_confidence(torch.tensor([0.25, 0.25]), torch.tensor([1.0, 0.04]), 0.5)
    tensor([0.5000, 0.1000])
    """
    if alpha is None:
        return cls_probs * iou_probs
    return cls_probs**alpha * iou_probs ** (1 - alpha)


# ------------------------------------------------------------------------------ heads


class IoUAwareHead(common.RetinaTowers):
    """Figure 1: RetinaNet's towers and one more 3x3 convolution on the box tower.

    L maps -> cls_logits [B, N, K], box_deltas [B, N, 4], iou_logits [B, N]; N = sum(H*W*A).
    The IoU convolution starts at N(0, 0.01) with bias 0 (release): IoU 0.5 everywhere.

    >>> head = IoUAwareHead(8, num_anchors=9, num_classes=3)
    >>> [t.shape for t in head([torch.rand(2, 8, 4, 4), torch.rand(2, 8, 2, 2)])]
    [torch.Size([2, 180, 3]), torch.Size([2, 180, 4]), torch.Size([2, 180])]
    """

    def __init__(self, in_channels=256, num_anchors=9, num_classes=80, num_convs=4, groups=0):
        super().__init__(in_channels, num_anchors, num_classes, num_convs, groups)
        self.iou_logits = nn.Conv2d(in_channels, num_anchors, 3, padding=1)
        nn.init.normal_(self.iou_logits.weight, std=0.01)
        nn.init.zeros_(self.iou_logits.bias)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        cls_logits, box_deltas, box_features = super().forward(features)
        iou_logits = common.flatten_levels([self.iou_logits(f) for f in box_features], 1)
        return cls_logits, box_deltas, iou_logits.squeeze(-1).float()


# ------------------------------------------------------------------------------ losses


def positive_losses(deltas, iou_logits, anchors, gt_boxes, num, config: Config) -> dict:
    """Eq. 2 and 3 over P positives: deltas, anchors, gt_boxes [P, 4], iou_logits [P] or None."""
    wanted = common.encode_boxes(anchors, gt_boxes)
    box = F.smooth_l1_loss(deltas, wanted, beta=config.box_beta, reduction="sum")
    losses = {"box": config.box_weight * box / num}
    if iou_logits is not None:
        ious = common.aligned_iou(common.decode_boxes(anchors, deltas), gt_boxes)
        ious = ious if config.iou_grad else ious.detach()
        iou = iou_prediction_loss(iou_logits, ious, config.iou_loss, config.box_beta).sum()
        losses["iou"] = config.iou_weight * iou / num
    return losses


# ------------------------------------------------------------------------------ detector


class Detector(common.RetinaNet):
    """Figure 1. For `outputs`, `candidates`, `finish` and `predict` see common.py."""

    def __init__(self, config: Config, num_classes: int):
        head = IoUAwareHead if config.iou_head else common.RetinaTowers
        super().__init__(config, num_classes, head)

    def loss(self, images: list[Tensor], targets: list[dict]) -> dict[str, Tensor]:
        config, out = self.config, self.outputs(images)
        labels, gt_boxes, gt_labels = common.match_anchors(
            out["anchors"], out["sizes"], targets, config.fg_iou, config.bg_iou
        )
        num = common.count_positives(labels)
        classes = common.class_targets(labels, gt_labels, self.num_classes).flatten()
        logits = out["cls_logits"].flatten(0, 1)
        focal = common.focal_loss(logits, classes, config.focal_alpha, config.focal_gamma)
        at = (labels == 1).nonzero(as_tuple=True)  # image [P], anchor [P]: the host waits here
        iou_logits = out["third"][at] if config.iou_head else None
        return {
            "cls": config.cls_weight * focal.sum() / num,
            **positive_losses(
                out["deltas"][at], iou_logits, out["anchors"][at[1]], gt_boxes[at], num, config
            ),
        }

    def rank(self, probs: Tensor, outputs: dict, at: tuple, config: Config) -> Tensor:
        """The fused score, which also chooses the boxes that enter NMS."""
        if not self.config.iou_head:
            return probs
        alpha = None if config.product else config.alpha
        return detection_confidence(probs, outputs["third"][at].sigmoid()[..., None], alpha)

    def select(self, outputs: dict, config: Config) -> dict[str, Tensor]:
        """The boxes that enter NMS, and beside their fused score both of its factors."""
        found = super().select(outputs, config)
        at = found["image"], found["anchor"]
        found["cls_probs"] = outputs["cls_logits"][(*at, found["labels"])].sigmoid()
        found["iou_probs"] = torch.ones_like(found["scores"])
        if self.config.iou_head:
            found["iou_probs"] = outputs["third"][at].sigmoid()
        return found


# ------------------------------------------------------------------------------ analysis

ALPHAS = tuple(round(1 - i / 10, 1) for i in range(11))  # Table 3


def sweep_alpha(model: Detector, val_data, config: Config, device, out: Path) -> dict[str, dict]:
    """Tables 3 and 4 from one forward pass: sweep_alpha.json, sweep_alpha.png and a table.

    Twelve sets of detections are held at once: some 4 GB of memory for COCO's 5,000 images.
    """
    if not model.config.iou_head:
        raise common.BadInput("--sweep-alpha needs a model with an IoU head (--iou-head)")
    configs = {"none": replace(config, product=True)}
    configs |= {f"{a:.1f}": replace(config, product=False, alpha=a) for a in ALPHAS}
    rows = common.study("sweep_alpha", model, configs, val_data, config, device, out)
    if common.rank_and_world()[0] == 0:
        xlabel = "alpha (0: predicted IoU alone, 1: class score alone)"
        title = "score = p^alpha IoU^(1 - alpha); dotted: p IoU"
        common.draw_sweep(rows, xlabel, title, out / "sweep_alpha.png")
    return rows


def analyze(model: Detector, val_data, config: Config, device, out: Path) -> dict:
    """The paper's claim on one model: does the score follow the IoU, before and after fusion?

    The boxes are the same in every ranking: those whose class score passes the threshold. IoU is
    that with the best gt of the box's class, `matched` where at least 0.5. The oracle takes the
    true IoU with the best gt of any class for the predicted one. Writes analyze.json, analyze.png.
    A model without an IoU head has nothing to fuse: the baseline's numbers.
    """
    alpha = None if config.product else config.alpha
    by_class = replace(config, alpha=1.0, product=False)
    points, results = {}, {"class score": [], "fused": [], "oracle": []}
    for image_id, found in common.candidates_with_iou(model, val_data, by_class, device):
        cls_probs, iou_probs = found["cls_probs"], found["iou_probs"]
        scores = {"class score": cls_probs}
        if model.config.iou_head:
            scores["fused"] = detection_confidence(cls_probs, iou_probs, alpha)
        measured = {**scores, "predicted IoU": iou_probs, "IoU": found["iou"]}
        for name, values in measured.items():
            points.setdefault(name, []).append(values)
        scores["oracle"] = detection_confidence(cls_probs, found["iou_any"], alpha)
        for name, values in scores.items():
            (kept,) = model.finish({**found, "scores": values, "image": found["labels"] * 0}, 1)
            results[name] += common.to_coco(image_id, kept, val_data.categories)
    shares = common.gather(({k: torch.cat(v) for k, v in points.items()}, results))
    points = {k: torch.cat([p[k] for p, _ in shares if p]) for k in points}
    results = {k: [r for _, share in shares for r in share[k]] for k in results}
    if not model.config.iou_head:
        del results["fused"], points["predicted IoU"]
    return report(points, results, val_data.coco(), alpha, out)


def report(points: dict[str, Tensor], results: dict, truth: dict, alpha, out: Path) -> dict:
    """Numbers and figure of `analyze`: points are [n] by name, results detections by ranking."""
    matched = {k: v[points["IoU"] >= 0.5] for k, v in points.items()}
    summary = {"alpha": alpha, "candidates": len(points["IoU"]), "matched": len(matched["IoU"])}
    for name in [k for k in points if k != "IoU"]:
        both = {"matched": matched, "all": points}
        summary[name] = {k: common.correlation(p[name], p["IoU"]) for k, p in both.items()}
        common.say(f"{name:13} against IoU: {summary[name]}")
    if common.rank_and_world()[0] == 0:
        rows = {name: common.coco_metrics(truth, found) for name, found in results.items()}
        common.show_table(rows)
        summary["metrics"] = rows
        common.write_json(out / "analyze.json", summary)
        draw_analysis(matched, rows, out / "analyze.png")
    return summary


def draw_analysis(points: dict[str, Tensor], rows: dict[str, dict], path: Path) -> None:
    figure, ((left, middle, right),) = common.new_figure(15, 4.5, 1, 3)
    for axis, name in ((left, "class score"), (middle, "fused")):
        if name in points:
            x, y = points[name], points["IoU"]
            axis.hexbin(x, y, gridsize=30, bins="log", extent=(0, 1, 0.5, 1), mincnt=1)
            axis.set(xlabel=f"{name} (Pearson {common.correlation(x, y)['pearson']})")
        axis.set(ylabel="IoU with the matched gt")
    for name, metrics in rows.items():
        keys = ("AP50", "AP60", "AP70", "AP80", "AP90")
        values = [common.percent(metrics[k]) for k in keys]
        right.plot([int(k[2:]) for k in keys], values, "o-", label=name)
    right.set(xlabel="IoU threshold in %", ylabel="AP in %", title="the same boxes, ranked by")
    right.legend()
    figure.savefig(path, dpi=80)


# ------------------------------------------------------------------------------ rows

_SMALL = dict(scales=(600,), test_scales=(600,), max_size=1000)  # the ablations' image scale
# VOC has the same 12 epochs, drops after 8 and 11 and rate, 0.0075 for 12 images (release)
_VOC = _SMALL
# x101 is what the paper prints; the release's config, and the baseline's, is ResNeXt-101-32x4d
_BACKBONES = {"r50": "resnet50", "r101": "resnet101", "x101": "resnext101_32x8d"}

# table1.retinanet_*: MMDetection's published models, which the authors only evaluated.
# One training each: table2.bce, table3.none and .alpha_* and table4.none and .alpha_* (that is
# `--sweep-alpha`); table2.baseline, table3.baseline and table4.baseline.
ROWS: dict[str, dict] = {
    **{f"table1.retinanet_{k}": dict(iou_head=False, backbone=v) for k, v in _BACKBONES.items()},
    **{f"table1.{k}": dict(backbone=v) for k, v in _BACKBONES.items()},
    "table2.baseline": dict(iou_head=False, **_SMALL),
    "table2.l2": dict(iou_loss="l2", product=True, **_SMALL),
    "table2.bce": dict(product=True, **_SMALL),
    "extra.l1": dict(iou_loss="l1", product=True, **_SMALL),
    "extra.smooth_l1": dict(iou_loss="smooth_l1", product=True, **_SMALL),
    "extra.detached": dict(iou_grad=False, product=True, **_SMALL),  # beside table2.bce
    **{f"table{t}.baseline": dict(iou_head=False, **_SMALL) for t in (3, 4)},
    **{f"table{t}.none": dict(product=True, **_SMALL) for t in (3, 4)},
    **{f"table{t}.alpha_{a:.1f}": dict(alpha=a, **_SMALL) for t in (3, 4) for a in ALPHAS},
    "table5.retinanet_r50": dict(iou_head=False, **_VOC),
    "table5.retinanet_r101": dict(iou_head=False, backbone="resnet101", **_VOC),
    "table5.r50": dict(**_VOC),
    "table5.r101": dict(backbone="resnet101", **_VOC),
}

_AP = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_AP_IOU = ("AP", "AP50", "AP60", "AP70", "AP80", "AP90")
_TABLE34 = {  # Table 3's AP, AP50, AP75, by size; then what Table 4 adds: AP60, 70, 80, 90
    "baseline": (34.3, 54.5, 36.4, 17.2, 38.2, 47.1, 49.2, 41.3, 29.8, 10.9),
    "none": (35.4, 54.1, 38.2, 18.9, 39.3, 48.3, 50.0, 43.3, 31.9, 12.2),
    "alpha_1.0": (34.5, 54.1, 36.7, 17.4, 38.4, 46.8, 49.5, 42.0, 30.1, 11.0),
    "alpha_0.9": (34.8, 54.3, 37.1, 17.8, 38.6, 47.0, 49.7, 42.4, 30.4, 11.2),
    "alpha_0.8": (35.0, 54.4, 37.4, 18.3, 38.8, 47.6, 49.9, 42.6, 30.7, 11.4),
    "alpha_0.7": (35.2, 54.4, 37.7, 18.5, 39.0, 47.9, 50.1, 43.0, 31.2, 11.7),
    "alpha_0.6": (35.4, 54.3, 38.0, 18.8, 39.2, 48.2, 50.2, 43.2, 31.5, 12.0),
    "alpha_0.5": (35.5, 54.1, 38.2, 18.9, 39.4, 48.3, 50.0, 43.3, 31.9, 12.2),
    "alpha_0.4": (35.5, 53.7, 38.4, 18.9, 39.5, 48.4, 49.8, 43.3, 32.5, 12.5),
    "alpha_0.3": (35.4, 53.0, 38.5, 18.8, 39.5, 48.4, 49.3, 43.2, 32.8, 12.8),
    "alpha_0.2": (34.8, 51.3, 38.4, 18.5, 39.1, 48.1, 48.0, 42.5, 32.9, 13.1),
    "alpha_0.1": (32.5, 46.4, 36.2, 16.7, 37.0, 45.9, 43.7, 39.4, 31.7, 13.3),
    "alpha_0.0": (0.4, 0.5, 0.4, 0.2, 0.7, 0.8, 0.4, 0.4, 0.4, 0.3),
}
PAPER: dict[str, dict] = {
    "table1.retinanet_r50": dict(zip(_AP, (35.9, 55.8, 38.4, 19.9, 38.8, 45.0))),
    "table1.retinanet_r101": dict(zip(_AP, (38.1, 58.5, 40.8, 21.2, 41.5, 48.2))),
    "table1.retinanet_x101": dict(zip(_AP, (39.0, 59.7, 41.9, 22.3, 42.5, 48.9))),
    "table1.r50": dict(zip(_AP, (36.9, 56.1, 40.1, 20.9, 40.0, 46.0))),
    "table1.r101": dict(zip(_AP, (39.2, 58.2, 42.9, 22.1, 42.7, 50.0))),
    "table1.x101": dict(zip(_AP, (40.6, 60.1, 44.2, 23.4, 43.9, 51.8))),
    "table2.baseline": dict(zip(_AP, (34.3, 54.5, 36.4, 17.2, 38.2, 47.1))),
    "table2.l2": dict(zip(_AP, (35.1, 53.8, 37.9, 18.6, 39.2, 47.6))),
    "table2.bce": dict(zip(_AP, (35.4, 54.1, 38.2, 18.9, 39.3, 48.3))),
    "extra.l1": {},
    "extra.smooth_l1": {},
    "extra.detached": {},
    **{f"table3.{k}": dict(zip(_AP, v)) for k, v in _TABLE34.items()},
    **{f"table4.{k}": dict(zip(_AP_IOU, v[:2] + v[6:])) for k, v in _TABLE34.items()},
    "table5.retinanet_r50": dict(zip(_AP_IOU, (51.4, 78.8, 74.3, 63.6, 44.9, 15.2))),
    "table5.retinanet_r101": dict(zip(_AP_IOU, (55.1, 81.1, 77.2, 67.5, 50.4, 20.1))),
    "table5.r50": dict(zip(_AP_IOU, (53.6, 79.0, 75.1, 66.1, 48.7, 19.4))),
    "table5.r101": dict(zip(_AP_IOU, (56.2, 80.5, 76.8, 68.5, 52.4, 22.8))),
}

NOT_YET: dict[str, str] = {}

TINY = dict(
    common.TINY,
    tower_convs=2,
    tower_groups=8,
    anchor_scale=3.0,
    epochs=2.0,  # one-stage detectors learn slowly from nothing
)


def main(argv=None):
    return common.run(
        "iou_aware_retinanet", Config, Detector, ROWS, PAPER, NOT_YET, TINY, argv, kind="one_stage",
        actions={"sweep_alpha": sweep_alpha, "analyze": analyze},
    )  # fmt: skip


if __name__ == "__main__":
    main()
