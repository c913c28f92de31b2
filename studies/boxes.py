"""Boxes before the last NMS, and how well they fit the objects of their image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.ops import box_iou

import kernels
from baselines import gfl
from common import aligned_iou
from data.coco import xywh_to_xyxy
from engine.metrics import complete_truth


def annotations_by_image(data: Dataset) -> dict:
    """image id -> the annotations of its objects in the data set's order, each with an area."""
    truth = complete_truth(data.coco())
    found: dict = {image["id"]: [] for image in truth["images"]}
    for annotation in truth["annotations"]:
        found[annotation["image_id"]].append(annotation)
    return found


def is_counted(annotation: dict) -> bool:
    """Whether an object is to be found: crowds and difficult ones are not."""
    return not (annotation.get("iscrowd", 0) or annotation.get("difficult", 0))


@dataclass
class Objects:
    """The objects that are to be found in an image, in the pixels of the image on disk."""

    boxes: Tensor  # [G, 4] xyxy
    labels: Tensor  # [G]


def objects_by_image(data: Dataset) -> dict:
    """image id -> its Objects."""
    label = {c["id"]: i for i, c in enumerate(data.categories)}
    found = {}
    for image_id, all_of_it in annotations_by_image(data).items():
        counted = [a for a in all_of_it if is_counted(a)]
        labels = torch.tensor([label[a["category_id"]] for a in counted], dtype=torch.long)
        found[image_id] = Objects(xywh_to_xyxy([a["bbox"] for a in counted]), labels)
    return found


def with_iou(found: dict[str, Tensor], objects: Objects) -> dict[str, Tensor]:
    """The n boxes found in an image, with their IoU beside them.

    `iou` [n] is with the best object of the box's own label, which is `gt` [n] among the objects;
    `iou_any` [n] is with the best object of any label. Both are 0 if there is none.
    """
    ious = F.pad(box_iou(found["boxes"], objects.boxes), (0, 1))  # [n, G + 1], the last: none
    own = found["labels"][:, None] == F.pad(objects.labels, (0, 1), value=-1)
    iou, gt = (ious * own).max(1)
    return {**found, "iou": iou, "gt": gt, "iou_any": ious.amax(1)}


class BeforeNMS(nn.Module):
    """A detector whose detections are its candidates: the boxes as they enter the last NMS."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def outputs(self, images: list[Tensor]) -> dict:
        return self.model.outputs(images)

    def candidates(self, outputs: dict, test) -> dict[str, Tensor]:
        return self.model.candidates(outputs, test)

    def detections(self, candidates: dict[str, Tensor], num_images: int, test) -> list[dict]:
        image = candidates["image"]
        return [{k: v[image == i] for k, v in candidates.items()} for i in range(num_images)]


def suppressed(model: nn.Module, found: dict[str, Tensor], test) -> dict[str, Tensor]:
    """The detections that a model makes of one image's candidates.

    `index` [D] says which of the candidates each of them is.
    """
    index = torch.arange(len(found["boxes"]), device=found["boxes"].device)
    one_image = {**found, "image": torch.zeros_like(found["labels"]), "index": index}
    (kept,) = model.detections(one_image, 1, test)
    return kept


def class_losses(model: nn.Module, out: dict, assigned, index: tuple) -> Tensor:
    """The class losses [P] of a one-stage detector's positives `index`, not weighted.

    out: the detector's outputs; assigned: what its `assign` returned.
    """
    logits, classes = out["cls_logits"][index], assigned.gt_labels[index]
    if isinstance(model, gfl.GFL):
        quality = aligned_iou(model.decode(out, index).detach(), assigned.gt_boxes[index])
        return gfl.quality_focal_loss(logits, classes, quality, model.settings.qfl_beta)
    settings = model.settings
    return kernels.focal_loss(logits, classes, settings.focal_alpha, settings.focal_gamma)
