"""Where in an image are classifier and localiser sensitive? After DC loss's Figure 1.

    python -m studies.sensitivity dc_loss_clnms --weights CKPT
    python -m studies.sensitivity retinanet --weights CKPT --data DIR --objects 200

The paper does not say how its figure was drawn. Our reading: how large is the gradient of one
object's class loss, and of its box loss, at each pixel of the input? Both losses are sums over the
anchors that the model's own assignment gives to the object. No coefficient weighs them, so models
trained with and without DC loss can be compared. The box loss is RetinaNet's for all methods; GFL's
class loss is its own.

The study takes the largest object of each of the first images. OUT/sensitivity.png draws some of
them: the gradients' magnitudes side by side, slightly blurred. OUT/sensitivity.json has the means
over all objects: the share of the gradient inside the object's box, and of that the share in the
box's middle, half as wide and half as high. An even gradient would have a quarter there. The paper
says that localisation needs "the marginal details of an object", so its share should be the lower.
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

from baselines.retinanet import box_loss
from common import BadInput, encode_boxes
from engine.checkpoints import write_json
from engine.loader import to_device
from engine.pictures import frame, new_figure
from engine.processes import print_once, progress, rank_and_world
from studies.boxes import class_losses
from studies.checkpoint import Options as CheckpointOptions
from studies.checkpoint import network_images, open_study, read_options, reported

ONE_STAGE = ("dc_loss_clnms", "iou_aware_retinanet", "retinanet", "gfl")
TASKS = ("class", "box")


@dataclass
class Options(CheckpointOptions):
    method: Annotated[Literal[ONE_STAGE], tyro.conf.Positional] = "dc_loss_clnms"
    objects: int = 50  # objects to measure, one an image
    shown: int = 4  # of them in the figure


def object_losses(model: nn.Module, out: dict, targets: list[dict], gt: int) -> dict[str, Tensor]:
    """Class and box loss of the one image's object `gt`; {} if no anchor is assigned to it."""
    assigned = model.assign(out, targets)
    index = ((assigned.labels == 1) & (assigned.gt == gt)).nonzero(as_tuple=True)  # image, anchor
    if not len(index[0]):
        return {}
    anchors = out["anchors"][index[1]]
    deltas = encode_boxes(anchors, model.decode(out, index))
    beta = getattr(model.settings, "box_beta", 0.11)  # GFL has none
    return {
        "class": class_losses(model, out, assigned, index).sum(),
        "box": box_loss(deltas, anchors, assigned.gt_boxes[index], beta, num_positives=1),
    }


def gradients(model: nn.Module, image: Tensor, target: dict, gt: int) -> dict[str, Tensor]:
    """|gradient| [h, w] by pixel of an object's class and box loss; {} if it has no anchor.

    image uint8 [3, h, w] and the target are as the network gets them; gt is the object's index. The
    magnitude is summed over the colours of the normalised image.
    """
    inputs: list[Tensor] = []

    def require_gradient(_, args):
        inputs.append(args[0].detach().requires_grad_())
        return (inputs[0], *args[1:])

    handle = model.backbone.register_forward_pre_hook(require_gradient)
    try:
        losses = object_losses(model, model.outputs([image]), [target], gt)
    finally:
        handle.remove()
    height, width = image.shape[1:]
    found = {}
    for name, loss in losses.items():
        (gradient,) = torch.autograd.grad(loss, inputs[0], retain_graph=True)  # [1, 3, H, W]
        found[name] = gradient[0, :, :height, :width].abs().sum(0)  # without the padding
    return found


def shares(gradient: Tensor, box: Tensor) -> dict[str, float]:
    """The share of a gradient [h, w] that is `inside` the box [4], and of that in the `middle`.

    >>> shares(torch.ones(20, 20), torch.tensor([0.0, 0, 20, 16]))
    {'inside': 0.8, 'middle': 0.25}
    """
    centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
    y, x = (torch.arange(n, device=box.device) + 0.5 for n in gradient.shape)
    across, down = (x - centre[0]).abs() / half[0], (y - centre[1]).abs() / half[1]
    reach = torch.maximum(across[None], down[:, None])  # [h, w]: 0 at the centre, 1 on the sides
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
            axis.set_title(f"{task} loss: {case[task]['middle']:.0%} in the middle quarter")
        for axis in line:
            axis.axis("off")
            frame(axis, case["object"], "white")
    figure.savefig(path, dpi=80)


def main(argv=None) -> dict:
    with reported():
        options, flags = read_options("sensitivity", Options, __doc__, argv)
        if options.objects < 1 or options.shown < 1:
            raise BadInput("--objects and --shown: at least 1")
        study = open_study(options, flags)
        if rank_and_world()[0]:
            return {}  # the first process does all: it takes a minute
        model, images = study.model, network_images(study)
        names = [c["name"] for c in study.categories]
        cases: list[dict] = []
        pictures: list[tuple] = []
        for i in progress(range(len(images)), "looking", len(images)):
            (image,), (target,) = to_device(images[i], study.device)
            areas = torchvision.ops.box_area(target["boxes"]) * ~target["ignore"]
            if not areas.any():
                continue
            largest = int(areas.argmax())
            found = gradients(model, image, target, largest)
            if not found:
                continue
            box = target["boxes"][largest]
            case = dict(image_id=target["image_id"], object=box.tolist())
            case["category"] = names[target["labels"][largest]]
            cases.append(case | {task: shares(found[task], box) for task in TASKS})
            if len(pictures) < options.shown:
                pictures.append((image, found))
            if len(cases) == options.objects:
                break
        if not cases:
            raise BadInput(f"{study.settings.data.data}: no object has an anchor")
        means = {
            task: {k: sum(c[task][k] for c in cases) / len(cases) for k in ("inside", "middle")}
            for task in TASKS
        }
        numbers = {"objects": len(cases), **means, "cases": cases}
        write_json(study.out / "sensitivity.json", numbers)
        draw_sensitivity(cases, pictures, study.out / "sensitivity.png")
        for task, mean in means.items():
            print_once(f"{task:5} loss: " + ", ".join(f"{v:.1%} {k}" for k, v in mean.items()))
        print_once(f"{len(cases)} objects; results: {study.out}/sensitivity.json, .png")
        return numbers


if __name__ == "__main__":
    main()
