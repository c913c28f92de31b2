"""CPM R-CNN (Zhu et al., 2020): Calibrating Point-guided Misalignment in Object Detection.
Paper: https://arxiv.org/abs/2003.03570   Release: https://github.com/zhubinQAQ/CPM-R-CNN

Faster R-CNN (baselines/faster_rcnn.py) regresses a box as four offsets. Grid R-CNN is guided
by points: it finds nine points of the box on heat maps. CPM R-CNN corrects two misalignments:

Points and RoI. Heat maps are made from features inside the RoI, but the points lie on the
    object's border, often outside the RoI. Cascade mapping (CMM, 3.2) draws the box three
    times. Each stage takes its features from the box of the stage before, which is closer to
    the object, and learns from higher IoUs. Its heat maps cover this box enlarged, 2 times in
    the first stage, then less.
Score and box. The class score does not depend on how well a box fits, and it belongs to the
    proposal, not to the box drawn from it. IoU scoring (ISM, 3.3.1) predicts the box's IoU.
    ISM underrates objects that the image cuts off, because it expects the whole object. So
    resampling scoring (RSM, 3.3.2) classifies the final box again.

    image -> ResNet-FPN -> P2..P6 -> RPN -> proposals
      class: RoIAlign 7x7 -> 2 fc -> cls [R, K + 1]
      stage: RoIAlign 14x14 -> 8 convs, the first strided -> trunk [R, 576, 7, 7]
             -> 2 transposed convs -> heat maps [R, 9, 28, 28] over the enlarged box
             -> 9 points -> box, the RoI of the next stage; three stages
      ISM:   trunk of the last stage -> 3 fc -> (1 - IoU, IoU) [R, 2]
      RSM:   RoIAlign 7x7 of the final boxes -> 2 fc -> rsm [R, K + 1]
    training: All sampled RoIs train cls. The positives, at most 96 an image, train stage 1.
              Its boxes with IoU >= 0.6 train stage 2, whose boxes with IoU >= 0.7 train
              stage 3. The RoIs of stage 3 train ISM, and RSM together with cls's negatives.
    test:     cls of the proposals -> NMS 0.3 -> best 96 of an image -> 3 stages -> ISM, RSM
              -> score = (cls ism)^0.8 rsm^0.2. No NMS follows.

    Eq. 1   B' = S_j(M_j(g_j(RoIAlign(P_i, B_j))))    GridHead, decode_grid, select_boxes
    Eq. 2   L_CMM = sum_j beta_j omega BCE(g_j, map_gt)   grid_loss, map_gt: grid_targets
    Eq. 3   ism = f(g'(RoIAlign(P_i, B)))             f: IoUScoring, g': GridHead.trunk
    Eq. 4   score = (cls ism)^gamma rsm^(1 - gamma)   fused_score
    Eq. 5   L = L_rpn + L_cls + L_scoring + L_CMM     GridDetector.loss
    Eq. 6   L_scoring = alpha_1 L_RSM + alpha_2 L_ISM     FusedScoring.scoring_losses
    Eq. 7   L_ISM = l2(predicted IoU, IoU)            iou_scoring_loss

Where paper and release differ, we follow the release, which made the paper's numbers:
    ISM and RSM learn from the boxes that enter the last stage. In the paper (Eq. 3, 3.3.2)
    they learn from the boxes that leave it.
    In training, all ground truth enters stages 2 and 3 as perfect RoIs, which the paper does
    not mention. Here at most 100 objects an image enter, so that memory is bounded.
docs/deviations.md lists all others. `--base cascade`, at the end of this file, is Table 3's
ISM and RSM on Cascade R-CNN. "(3.4)" is a section of the paper, "(release)" a value seen in
the release, "choice:" our own where neither decides.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import engine
import kernels
from baselines import cascade_rcnn, faster_rcnn
from baselines.faster_rcnn import Rois, SampledRois, TrainingRois
from baselines.grid_branch import GridHead, decode_grid, grid_loss, grid_targets
from engine import Amount, Natural, Share, Whole

# B images, R RoIs, P positive RoIs, N candidates, K classes, C channels
# labels 0..K-1, background K; stages count from 1


@dataclass
class Model(faster_rcnn.TwoStageModel):
    """CPM R-CNN with ResNet-50."""

    num_stages: Natural = 3  # grid stages N (Eq. 2); 1 without ISM and RSM: the Grid baseline
    ratios: tuple[Amount, ...] = (2.0, 1.5, 1.25)  # side of grid / side of box, by stage (3.2)
    stage_ious: tuple[Share, ...] = (0.5, 0.6, 0.7)  # lowest IoU of a stage's RoIs (3.4.1)
    ism: bool = True  # predict IoU (3.3.1)
    rsm: bool = True  # classify the final boxes again (3.3.2)
    ism_loss: Literal["l2", "l1", "smooth_l1"] = "l2"  # loss of the predicted IoU (Table 6)
    point_channels: Natural = 64  # width of the grid branch for each of the points (release)
    num_convs: Natural = 8  # convolutions of the grid branch (release)
    groups: Natural = 36  # groups of the GroupNorms in the grid branch (release)
    grid_init: bool = False  # heat maps start at 1 %, as in Grid R-CNN; off: at 50 % (release)
    grid_weight: Amount = 15.0  # omega in Eq. 2 (release)
    stage_decay: Amount = 0.5  # beta of a stage / beta of the stage before (3.4.2)
    ism_weight: Amount = 1.0  # alpha_2 in Eq. 6 (3.4.2)
    rsm_weight: Amount = 1.0  # alpha_1 in Eq. 6 (3.4.2)
    grid_rois: Natural = 96  # positives per image that enter stage 1 in training (release)


@dataclass
class Test(faster_rcnn.Test):
    """NMS on the proposals, none on the final boxes (3.4.3)."""

    score_threshold: Share = 0.03  # lowest class score; when merging, fused score (release)
    nms_iou: Share = 0.3  # NMS per class, on the proposals, before the grid stages (3.4.3)
    grid_test: Natural = 96  # boxes per image that enter the grid stages (3.4.3)
    test_stage: Whole = 0  # this stage's boxes are the result (Table 4); 0: the last one's
    # predicted IoU times class score (Eq. 4), predicted IoU in its place, or class score alone
    ism_use: Literal["multiply", "replace", "ignore"] = "multiply"
    gamma: Share = 0.8  # share of cls * ism in the score; the rest is RSM's (Eq. 4, 3.4.3)
    soft_nms: bool = False  # linear soft-NMS on the final boxes (Table 7's last row)
    merge_iou: Share = 0.5  # soft-NMS, or NMS over several views, acts from this IoU (release)
    soft_nms_score: Share = 1e-4  # soft-NMS drops boxes whose score falls below this (release)


TINY = faster_rcnn.TINY | dict(point_channels=8, num_convs=3, groups=9)
TINY |= dict(grid_rois=12, grid_test=50)
TINY |= dict(grid_init=True)  # few cells are ones, which takes 300 steps to learn from 50 %


@dataclass
class Settings(engine.Settings):
    """CPM R-CNN with ResNet-50 on COCO: Table 2."""

    model: engine.Model = None
    test: engine.Test = None
    run: engine.Run = None
    base: Literal["grid", "cascade"] = "grid"  # what draws boxes: points, or deltas (Table 3)

    def __post_init__(self) -> None:
        """Fill in what is None: `base` decides these defaults."""
        cascade = self.base == "cascade"
        self.tiny = cascade_rcnn.TINY if cascade else TINY
        self.model = self.model or (CascadeModel() if cascade else Model())
        self.test = self.test or (CascadeTest() if cascade else Test())
        grid_run = engine.Run(
            epochs=24.35,  # 180k steps of 16 of 118,287 images (3.4.2)
            drops=(120 / 180, 160 / 180),  # (3.4.2)
            warmup_factor=1 / 10,  # (release)
        )
        self.run = self.run or (cascade_rcnn.Settings().run if cascade else grid_run)

    def replace(self, **changes) -> engine.Settings:
        """As in engine.Settings. Also raises BadInput if the tested stage does not exist."""
        settings = super().replace(**changes)
        tested_stage(settings.model, settings.test)
        return settings

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> engine.Settings:
        """As in engine.Settings. Older files name the NMS of base cascade `merge_iou`."""
        if saved.get("base") == "cascade" and "merge_iou" in saved:
            saved = {**saved, "nms_iou": saved["merge_iou"]}
        return super().from_dict(saved)


def tested_stage(model, test) -> int:
    """The stage that `test` asks for. Raises BadInput without it, or without an ISM to use."""
    stage = cascade_rcnn.tested_stage(model, test)
    if test.ism_use == "replace" and not (model.ism and stage == model.num_stages):
        raise common.BadInput("--ism-use replace: this model has no ISM, or not at this stage")
    return stage


# ------------------------------------------------------------------------------ equations


def select_boxes(rois: TrainingRois, objects: tuple, threshold: float) -> TrainingRois:
    """S_j in Eq. 1: the RoIs whose IoU with an object of their image reaches the threshold.

    Each RoI that has an area is matched anew, to the object that it overlaps most (release),
    because it has moved since the earlier stage. objects: the output of `common.pad_targets`.
    """
    gt_boxes, gt_labels, gt_valid, _ = objects
    own_gts, own_valid = gt_boxes[rois.image], gt_valid[rois.image]  # [R, G, 4], [R, G]
    boxes = rois.boxes[:, None]  # [R, 1, 4]
    positive, gt, _ = common.match(boxes, own_gts, threshold, threshold, own_valid)  # [R, 1]
    has_area = (rois.boxes[:, 2:] > rois.boxes[:, :2]).all(1)
    keep = (has_area & (positive[:, 0] == 1)).nonzero()[:, 0]  # the host waits here
    rois, gt = rois[keep], gt[keep, 0]
    labels, boxes = gt_labels[rois.image, gt], gt_boxes[rois.image, gt]
    return dataclasses.replace(rois, labels=labels, gt=gt, gt_boxes=boxes)


def fused_score(cls: Tensor, ism: Tensor, rsm: Tensor, gamma: float) -> Tensor:
    """Eq. 4: the score that ranks a box, from scores in [0, 1]. Gamma 1 leaves out rsm.

        score = (cls ism)^gamma rsm^(1 - gamma)

    >>> fused_score(torch.tensor(0.5), torch.tensor(0.5), torch.tensor(0.25), 0.5)
    tensor(0.2500)
    """
    return (cls * ism) ** gamma * rsm ** (1 - gamma)


# ------------------------------------------------------------------------------ heads


class IoUScoring(nn.Module):
    """f in Eq. 3: a box's trunk features -> (1 - IoU, IoU), [R, 2], as plain numbers.

    Both are learned, and the second is the score. No sigmoid keeps it in [0, 1], so clamp it.

    >>> IoUScoring(36 * 7 * 7, 16)(torch.rand(3, 36, 7, 7)).shape
    torch.Size([3, 2])
    """

    def __init__(self, in_features: int = 576 * 7 * 7, hidden: int = 1024):
        super().__init__()
        first, second = nn.Linear(in_features, hidden), nn.Linear(hidden, hidden)
        last = faster_rcnn.output_layer(hidden, 2, 0.01)  # (release): both start near 0
        self.fc = nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), last)

    def forward(self, trunk: Tensor) -> Tensor:
        return self.fc(trunk)


# ------------------------------------------------------------------------------ losses


def iou_scoring_loss(
    predicted: Tensor, ious: Tensor, kind: str = "l2", num_rois: Tensor | int | None = None
) -> Tensor:
    """Eq. 7: predicted [R, 2] against (1 - ious, ious), ious [R].

        l2: e^2 / 2      l1: |e|      for each error e; smooth_l1 lies between them

    The loss is the mean over both outputs and over num_rois, which is R unless given.
    """
    # choice: beta 1/9 in smooth_l1; with beta 1 it would be l2 for all errors below 1
    smooth_l1 = partial(F.smooth_l1_loss, beta=1 / 9)
    functions: dict[str, Any] = dict(l2=F.mse_loss, l1=F.l1_loss, smooth_l1=smooth_l1)
    targets = torch.stack([1 - ious, ious], 1)  # [R, 2]
    loss = functions[kind](predicted.float(), targets, reduction="sum")
    num_rois = max(1, len(ious)) if num_rois is None else num_rois
    return loss / (4 if kind == "l2" else 2) / num_rois


# ------------------------------------------------------------------------------ detector


def join(first: TrainingRois, second: TrainingRois) -> TrainingRois:
    """Two sets of RoIs as one."""
    names = [field.name for field in dataclasses.fields(TrainingRois)]
    return TrainingRois(*(torch.cat([getattr(first, k), getattr(second, k)]) for k in names))


def perfect_rois(objects: tuple[Tensor, ...], most: int = 100) -> TrainingRois:
    """RoIs on the first `most` objects of each image: [B * G], where padding has no area.

    Crowds have none either. objects: `common.pad_targets`. choice: the release sets no limit.
    """
    gt_boxes, gt_labels, gt_valid = (values[:, :most] for values in objects[:3])
    B, G = gt_labels.shape
    boxes = (gt_boxes * gt_valid[..., None]).flatten(0, 1)
    image = torch.arange(B, device=boxes.device).repeat_interleave(G)
    gt = torch.arange(G, device=boxes.device).repeat(B)
    is_gt = torch.ones_like(gt, dtype=torch.bool)
    return TrainingRois(image, boxes, gt_labels.flatten(), gt, gt_boxes=boxes, is_gt=is_gt)


class FusedScoring(faster_rcnn.TwoStage):
    """ISM and RSM (3.3) after the last stage of a detector, if its `Model` has them."""

    settings: Model | CascadeModel

    def add_scoring(self, ism_features: int) -> None:
        """Make both heads. ism_features: how many numbers ISM reads for each box."""
        model, outputs = self.settings, self.num_classes + 1
        pooled, hidden = model.fpn_channels * 7 * 7, model.fc_channels
        if model.ism:
            self.ism = IoUScoring(ism_features, hidden)
        if model.rsm:
            self.rsm = faster_rcnn.two_fc(pooled, hidden, outputs, model.class_std)

    def scoring_losses(
        self, features: list[Tensor], sampled: SampledRois, rois: TrainingRois, trunk: Tensor
    ) -> dict[str, Tensor]:
        """The terms of Eq. 6, alpha_2 L_ISM and alpha_1 L_RSM, as `ism` and `rsm`.

        sampled: the RoIs that train cls; rois: P positives of the last stage, with their trunk
        features [P, ...]. Both heads learn from `rois`, RSM also from cls's negatives.
        """
        model = self.settings
        losses: dict[str, Tensor] = {}
        if model.ism:
            ious = common.aligned_iou(rois.boxes, rois.gt_boxes)
            num_rois = common.shared_rows(ious)
            loss = iou_scoring_loss(self.ism(trunk), ious, model.ism_loss, num_rois)
            losses["ism"] = model.ism_weight * loss
        if model.rsm:
            _, negatives = sampled.split()
            both = join(sampled[negatives], rois)
            logits = self.rsm(self.pool(features, both, 7))
            losses["rsm"] = model.rsm_weight * faster_rcnn.class_loss(logits, both.labels)
        return losses

    def rescored(
        self, found: dict, outputs: dict, rois: Rois, trunk: Tensor, test, row=...
    ) -> dict[str, Tensor]:
        """Candidates with the fused score (Eq. 4), and with its factors cls, ism and rsm [N].

        found: N candidates with class scores; rois, trunk: R final boxes, and what ISM reads
        of each; row [N]: each candidate's box, unless these are as many and in order.
        """
        model, cls = self.settings, found["scores"]
        ism, rsm = torch.ones_like(cls), torch.ones_like(cls)
        if model.ism and tested_stage(model, test) == model.num_stages:  # others lack ISM
            ism = self.ism(trunk)[:, 1].float().clamp(0, 1)[row]
        if model.rsm:
            pooled = self.pool(outputs["features"], rois, 7)
            probs = self.rsm(pooled).float().softmax(1)[row]  # [N, K + 1]
            rsm = probs.gather(1, found["labels"][:, None])[:, 0]
        used_cls = torch.ones_like(cls) if test.ism_use == "replace" else cls
        used_ism = torch.ones_like(ism) if test.ism_use == "ignore" else ism
        scores = fused_score(used_cls, used_ism, rsm, test.gamma if model.rsm else 1.0)
        return {**found, "scores": scores, "cls": cls, "ism": ism, "rsm": rsm}


class GridDetector(FusedScoring):
    """Figure 2. engine/detector.py has the contract; `outputs` is in faster_rcnn.TwoStage."""

    settings: Model
    default_test = Test

    def __init__(self, model: Model, num_classes: int):
        super().__init__(model, num_classes)
        cascade_rcnn.check_stages(model, "ratios", "stage_ious")
        C, width = model.fpn_channels, 9 * model.point_channels
        self.grids = nn.ModuleList(
            GridHead(C, model.point_channels, model.num_convs, model.groups, model.grid_init)
            for _ in range(model.num_stages)
        )
        hidden, std = model.fc_channels, model.class_std
        self.classify = faster_rcnn.two_fc(C * 7 * 7, hidden, num_classes + 1, std)
        self.add_scoring(width * 7 * 7)
        self.to(memory_format=torch.channels_last)

    def loss(self, images: list[Tensor], targets: list[dict]) -> dict[str, Tensor]:
        """Eq. 5: the RPN's losses, `cls`, one `grid` for each stage (Eq. 2), `ism` and `rsm`.

        cls's positives enter stage 1. The boxes that a stage draws enter the next one. So does
        the ground truth, so boxes drawn from copies of it are left out (release).
        """
        model, weight = self.settings, self.settings.grid_weight
        features, sizes, losses, sampled = self.training_rois(images, targets)
        logits = self.classify(self.pool(features, sampled, 7))  # [R, K + 1]
        losses["cls"] = faster_rcnn.class_loss(logits, sampled.labels)
        objects = common.pad_targets(targets)
        positives, _ = sampled.split(model.grid_rois)
        rois = sampled[positives]
        stages = zip(self.grids, model.ratios, model.stage_ious)
        for stage, (head, ratio, threshold) in enumerate(stages, 1):
            if stage > 1 or threshold > 0.5:  # all positives reach 0.5
                rois = select_boxes(rois, objects, threshold)
            heat, trunk = head(self.pool(features, rois, 14))  # [P, 9, S, S], [P, ...]
            map_gt = grid_targets(rois.boxes, rois.gt_boxes, ratio, heat.shape[-1])
            loss = grid_loss(heat, map_gt, common.shared_rows(rois.boxes))
            losses[f"grid{stage}"] = weight * loss
            weight *= model.stage_decay
            if stage < model.num_stages:
                boxes = decode_grid(rois.boxes, heat.detach(), ratio, sizes[rois.image])
                boxes = boxes * ~rois.is_gt[:, None]  # left out: without area
                rois = join(rois.moved(boxes), perfect_rois(objects))
        return losses | self.scoring_losses(features, sampled, rois, trunk)

    @torch.no_grad()
    def candidates(self, outputs: dict, test: Test) -> dict[str, Tensor]:
        """NMS, since overlapping proposals lead to one box; then stages and scores (3.4.3)."""
        stage = tested_stage(self.settings, test)
        features, sizes = outputs["features"], outputs["sizes"]
        rois, found = self.best_proposals(outputs, test, test.grid_test)
        for head, ratio in zip(self.grids[:stage], self.settings.ratios):
            logits, trunk = head(self.pool(features, rois, 14))
            rois = rois.moved(decode_grid(rois.boxes, logits, ratio, sizes[rois.image]))
        return self.rescored({"boxes": rois.boxes, **found}, outputs, rois, trunk, test)

    def suppress(self, boxes: Tensor, scores: Tensor, groups: Tensor, test: Test):
        """No NMS follows the stages (3.4.3), unless soft-NMS or several views ask for it."""
        if not (test.soft_nms or test.several_views):
            keep = scores.argsort(descending=True, stable=True)
            return keep, scores[keep]
        scores = scores.where(scores > test.score_threshold, -torch.inf)  # NMS leaves out -inf
        if test.soft_nms:
            iou, lowest = test.merge_iou, test.soft_nms_score
            return kernels.soft_nms_padded(boxes, scores, groups, iou, lowest)[:2]
        keep, _ = kernels.nms_padded(boxes, scores, groups, test.merge_iou)
        return keep, scores[keep]


# ------------------------------------------------------------------------------ Cascade R-CNN


@dataclass
class CascadeModel(cascade_rcnn.Model):
    """Cascade R-CNN with ISM and RSM: Table 3."""

    ism: bool = True  # predict IoU (3.3.1)
    rsm: bool = True  # classify the final boxes again (3.3.2)
    ism_loss: Literal["l2", "l1", "smooth_l1"] = "l2"  # loss of the predicted IoU (Eq. 7)
    ism_weight: Amount = 1.0  # alpha_2 in Eq. 6 (release)
    rsm_weight: Amount = 0.2  # alpha_1 in Eq. 6 (release)


@dataclass
class CascadeTest(cascade_rcnn.Test):
    """Classes over 0.05, NMS at 0.5 by the fused score."""

    # predicted IoU times class score (Eq. 4), predicted IoU in its place, or class score alone
    ism_use: Literal["multiply", "replace", "ignore"] = "multiply"
    gamma: Share = 0.8  # share of cls * ism in the score; the rest is RSM's (Eq. 4)


class CascadeDetector(FusedScoring, cascade_rcnn.Detector):
    """Cascade R-CNN, whose stages move boxes by deltas, with the fused score (Table 3).

    ISM reads the last stage's hidden features. `loss` and `outputs` are the baseline's.
    """

    settings: CascadeModel
    default_test = CascadeTest

    def __init__(self, model: CascadeModel, num_classes: int):
        super().__init__(model, num_classes)
        self.add_scoring(ism_features=model.fc_channels)

    def scoring_losses(self, features, sampled, rois: TrainingRois, hidden: Tensor):
        """Eq. 6 of the positives among the last stage's R RoIs, with hidden [R, D]."""
        positive = (rois.labels < self.num_classes).nonzero()[:, 0]  # the host waits here
        return super().scoring_losses(features, sampled, rois[positive], hidden[positive])

    @torch.no_grad()
    def candidates(self, outputs: dict, test: CascadeTest) -> dict[str, Tensor]:
        """Each class over the threshold, with the tested stage's box and the fused score."""
        found = super().candidates(outputs, test)
        rois = outputs["rois"][tested_stage(self.settings, test) - 1]  # one a proposal
        return self.rescored(found, outputs, rois, outputs["hidden"], test, row=found["roi"])

    def suppress(self, boxes: Tensor, scores: Tensor, groups: Tensor, test: CascadeTest):
        """NMS in each class, of boxes whose fused score is over the threshold."""
        scores = scores.where(scores > test.score_threshold, -torch.inf)  # NMS leaves out -inf
        return super().suppress(boxes, scores, groups, test)


def Detector(model: Model | CascadeModel, num_classes: int) -> GridDetector | CascadeDetector:
    """The detector that these settings describe."""
    if isinstance(model, CascadeModel):
        return CascadeDetector(model, num_classes)
    return GridDetector(model, num_classes)


def main(argv=None):
    return engine.run("cpm_rcnn", Settings, Detector, argv)


if __name__ == "__main__":
    main()
