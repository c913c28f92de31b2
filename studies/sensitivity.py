"""Where in an image are classifier and localiser sensitive? After DC loss's Figure 1.

    python -m studies.sensitivity dc_loss_clnms --weights CKPT
    python -m studies.sensitivity retinanet --weights CKPT --data DIR --objects 200

How the paper drew its figure is not published. This is our reading: of one object's class loss and
of its box loss, how large is the gradient at each pixel of the input? Both losses are sums over the
anchors that the model's own assignment gives to the object. No coefficient weighs them, so that
models trained with DC loss and without can be compared. The box loss is RetinaNet's for all
methods; GFL's class loss is its own.

The largest object of each of the first images is taken. OUT/sensitivity.png draws some of them:
the gradient's magnitude, blurred a little, side by side. OUT/sensitivity.json has the means over
all: the share of it that lies in the object's box, and, of that, the share in the box's middle,
half as wide and half as high. An even gradient would have a quarter there. The paper says that
localisation asks for "the marginal details of an object", so its share should be the lower one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torchvision
import tyro
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

import common
import kernels
from baselines import gfl, retinanet
from common import BadInput, Resized
from engine.checkpoints import write_json
from engine.data import to_device
from engine.pictures import frame, new_figure
from engine.processes import progress, rank_and_world, say
from studies.checkpoint import Options as CheckpointOptions
from studies.checkpoint import open_study, read_options, reported

ONE_STAGE = ("dc_loss_clnms", "iou_aware_retinanet", "retinanet", "gfl")
TASKS = ("class", "box")


@dataclass
class Options(CheckpointOptions):
    method: Annotated[Literal[ONE_STAGE], tyro.conf.Positional] = "dc_loss_clnms"
    objects: int = 50  # that are measured, one an image
    shown: int = 4  # of them in the figure


def object_losses(model: nn.Module, out: dict, targets: list[dict], box: Tensor) -> dict:
    """Class and box loss of the one image's object in `box` [4]; {} if no anchor is its own."""
    labels, gt_boxes, gt_labels = model.assign(out, targets)
    mine = (labels == 1) & (gt_boxes == box).all(2)  # [1, N]
    index = mine.nonzero(as_tuple=True)
    if not len(index[0]):
        return {}
    logits, classes, anchors = out["cls_logits"][index], gt_labels[index], out["anchors"][index[1]]
    boxes, config = model.decode(out, index), model.config
    if isinstance(model, gfl.GFL):
        quality = common.aligned_iou(boxes.detach(), gt_boxes[index])
        cls = gfl.quality_focal_loss(logits, classes, quality, config.qfl_beta)
    else:
        cls = kernels.focal_loss(logits, classes, config.focal_alpha, config.focal_gamma)
    deltas = common.encode_boxes(anchors, boxes)
    beta = getattr(config, "box_beta", 0.11)
    box_loss = retinanet.box_loss(deltas, anchors, gt_boxes[index], beta, num_positives=1)
    return {"class": cls.sum(), "box": box_loss}


def gradients(model: nn.Module, image: Tensor, target: dict, box: Tensor) -> dict[str, Tensor]:
    """|gradient| [h, w] by pixel of the class and the box loss of an object, {} if it has none.

    image uint8 [3, h, w] and the target's boxes are as the network gets them; box is one of these.
    The magnitude is summed over the colours, as the backbone gets them: of mean 0 and variance 1.
    """
    held: list[Tensor] = []

    def watch(_, args):
        held.append(args[0].detach().requires_grad_())
        return (held[0], *args[1:])

    handle = model.backbone.register_forward_pre_hook(watch)
    try:
        losses = object_losses(model, model.outputs([image]), [target], box)
    finally:
        handle.remove()
    height, width = image.shape[1:]
    found = {}
    for name, loss in losses.items():
        (gradient,) = torch.autograd.grad(loss, held[0], retain_graph=True)  # [1, 3, H, W]
        found[name] = gradient[0, :, :height, :width].abs().sum(0)  # the padding is left out
    return found


def shares(gradient: Tensor, box: Tensor) -> dict[str, float]:
    """The share of a gradient [h, w] that is `inside` the box [4], and of that in the `middle`.

    >>> shares(torch.ones(20, 20), torch.tensor([0.0, 0, 20, 16]))
    {'inside': 0.8, 'middle': 0.25}
    """
    centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
    y, x = (torch.arange(n, device=box.device) + 0.5 for n in gradient.shape)
    near = ((x - centre[0]).abs() / half[0])[None], ((y - centre[1]).abs() / half[1])[:, None]
    reach = torch.maximum(*near)  # [h, w]: 0 at the box's centre, 1 on its sides
    inside, middle = (gradient[reach < r].sum().item() for r in (1, 0.5))
    total = gradient.sum().item()
    return dict(inside=inside / max(total, 1e-30), middle=middle / max(inside, 1e-30))


def draw_sensitivity(cases: list[dict], pictures: list[tuple], path: Path) -> None:
    """A row for each (image, gradients): the object, then both gradients over the dimmed image."""
    figure, axes = new_figure(11, 3.8 * len(pictures), len(pictures), 3)
    for line, case, (image, found) in zip(axes, cases, pictures):
        line[0].imshow(image.cpu().permute(1, 2, 0).numpy())
        line[0].set_title(case["category"])
        sigma = max(image.shape) / 64
        for axis, task in zip(line[1:], TASKS):
            blurred = gaussian_blur(found[task][None], 2 * int(2 * sigma) + 1, sigma)[0].cpu()
            axis.imshow(image.cpu().float().mean(0).numpy(), cmap="gray", vmin=0, vmax=510)
            axis.imshow(blurred.numpy(), cmap="inferno", alpha=0.75)
            share = case[task]["middle"]
            axis.set_title(f"{task} loss: {share:.0%} in the middle quarter")
        for axis in line:
            axis.axis("off")
            frame(axis, case["object"], "white")
    figure.savefig(path, dpi=80)


def main(argv=None) -> dict:
    with reported():
        options, flags = read_options("sensitivity", Options, __doc__, argv)
        if options.objects < 1 or options.shown < 1:
            raise BadInput("--objects and --shown: 1 is the least")
        study = open_study(options, flags)
        if rank_and_world()[0]:
            return {}  # one process does it: it is a minute's work
        model, data = study.model.eval(), Resized(study.data, study.config, False)
        names = [c["name"] for c in study.data.categories]
        cases: list[dict] = []
        pictures: list[tuple] = []
        for i in progress(range(len(data)), "looking", len(data)):
            (image,), (target,) = to_device([data[i]], study.device)
            areas = torchvision.ops.box_area(target["boxes"]) * ~target["ignore"]
            largest = areas.argmax() if len(areas) else 0
            if not len(areas) or areas[largest] == 0:
                continue
            box = target["boxes"][largest].as_subclass(Tensor)
            found = gradients(model, image, target, box)
            if found:
                about = dict(image_id=target["image_id"], object=box.tolist())
                about |= dict(category=names[target["labels"][largest]])
                cases.append(about | {task: shares(found[task], box) for task in TASKS})
                pictures += [(image, found)] * (len(pictures) < options.shown)
            if len(cases) == options.objects:
                break
        if not cases:
            raise BadInput(f"{study.config.data}: no object has an anchor")
        means = {
            task: {k: sum(c[task][k] for c in cases) / len(cases) for k in ("inside", "middle")}
            for task in TASKS
        }
        numbers = {"objects": len(cases), **means, "cases": cases}
        write_json(study.out / "sensitivity.json", numbers)
        draw_sensitivity(cases, pictures, study.out / "sensitivity.png")
        for task, mean in means.items():
            say(f"{task:5} loss: " + ", ".join(f"{v:.1%} {k}" for k, v in mean.items()))
        say(f"{len(cases)} objects; results: {study.out}/sensitivity.json, .png")
        return numbers


if __name__ == "__main__":
    main()
