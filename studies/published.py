"""The authors' published weights as checkpoints of this project.

    python -m studies.published FILE --out d2det_r50.pt
    python d2det.py --predict photo.jpg --weights d2det_r50.pt

A file is recognised by its names. Each of its tensors is used or named as unused, and each
tensor of our network is filled; otherwise the conversion fails and says which are not.
docs/weights.md lists the files and says what a converted network does not reproduce.
studies/published_rules.py has the names and orders of each source.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from pathlib import Path

import torch
import tyro
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from common import BadInput
from engine.checkpoints import as_saved, load_tensors, save_checkpoint
from studies.published_rules import SOURCES, UNUSED, Rule


def coco_categories() -> list[dict]:
    """The 80 categories as a data set has them.

    >>> coco_categories()[0], coco_categories()[-1]
    ({'id': 1, 'name': 'person'}, {'id': 90, 'name': 'toothbrush'})
    """
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # torchvision's, by id
    return [{"id": i, "name": name} for i, name in enumerate(names) if i and name != "N/A"]


# Sizes of the network, read off the shapes of our tensors: setting, tensor, dimension
WIDTHS = [
    ("fpn_channels", "backbone.fpn.layer_blocks.0.0.weight", 0),
    ("fc_channels", "classify.1.weight", 0),
    ("fc_channels", "heads.fc.first.weight", 0),
    ("conv_channels", "regress.trunk.0.weight", 0),
    ("conv_channels", "heads.conv.blocks.0.shortcut.0.weight", 0),
    ("point_channels", "grids.0.heat.0.weight", 1),
    ("mask_channels", "mask_branch.up.0.weight", 1),
]
COUNTS = [  # setting, layers
    ("num_convs", r"(regress|grids\.0)\.trunk\.\d+\.weight"),
    ("tower_convs", r"head\.cls_tower\.\d+\.weight"),
    ("num_stages", r"grids\.\d+\.heat\.0\.weight"),
    ("num_blocks", r"heads\.conv\.blocks\.\d+\.body\.0\.weight"),
]
BACKBONES = {  # blocks of the third stage; channels and channels a group of a 3x3 convolution
    (6, 64, 64): "resnet50",
    (23, 64, 64): "resnet101",
    (23, 128, 4): "resnext101_32x4d",
    (23, 256, 4): "resnext101_64x4d",
    (23, 256, 8): "resnext101_32x8d",
}


# ------------------------------------------------------------------------------ converting


def read(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a file by name, and what it says of itself. Raises BadInput."""
    file = load_tensors(path, "holds more than weights")
    about = file.get("meta") or {} if isinstance(file, dict) else {}
    for entry in ("state_dict", "model"):
        if isinstance(file, dict) and isinstance(file.get(entry), dict):
            file = file[entry]
    if not isinstance(file, dict) or not any(isinstance(v, Tensor) for v in file.values()):
        raise BadInput(f"{path}: holds no tensors by name")
    tensors = {k.removeprefix("module."): v for k, v in file.items() if isinstance(v, Tensor)}
    return tensors, about


def recognise(names, path) -> str:
    """The source that has a layer of these tensors' names. Raises BadInput."""
    layers = {name.rpartition(".")[0] for name in names}
    for name, source in SOURCES.items():
        if source.sign in layers:
            return name
    first = ", ".join(sorted(layers)[:3])
    known = ", ".join(SOURCES)
    raise BadInput(f"{path}: {len(layers)} layers, such as {first}. None of {known}")


def rename(tensors: dict[str, Tensor], rules: list[Rule]) -> tuple[dict, list[str]]:
    """Our names and rows of the tensors, and the names for which there is no rule."""
    state, unknown = {}, []
    for name, value in tensors.items():
        layer, _, leaf = name.rpartition(".")
        for there, ours, turn in rules:
            match = re.fullmatch(there, layer)
            if match:
                state[f"{match.expand(ours)}.{leaf}"] = turn(value)
                break
        else:
            unknown.append(name)
    return state, unknown


def some(names) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_sizes(state: dict[str, Tensor], path) -> dict:
    """The settings that the tensors' shapes tell."""
    conv = state.get("backbone.stages.0.0.conv2.weight")
    third = re.compile(r"backbone\.stages\.2\.\d+\.conv1\.weight")
    blocks = sum(bool(third.fullmatch(name)) for name in state)
    kind = (blocks, *conv.shape[:2]) if conv is not None else (blocks, 0, 0)
    if kind not in BACKBONES:
        raise BadInput(f"{path}: its backbone is none of {', '.join(BACKBONES.values())}")
    sizes = {"backbone": BACKBONES[kind], "dcn": "none"}
    offsets = [v for k, v in state.items() if k.endswith("conv_offset.weight")]
    if offsets:
        sizes["dcn"] = {18: "v1", 27: "v2"}.get(len(offsets[0]), "none")
    for setting, name, dimension in WIDTHS:
        if name in state:
            sizes[setting] = state[name].shape[dimension]
    for setting, pattern in COUNTS:
        layers = [v for k, v in state.items() if re.fullmatch(pattern, k) and v.ndim == 4]
        if layers:
            sizes[setting] = len(layers)
    return sizes


def convert(tensors: dict[str, Tensor], path="", method: str = "", mmdet: int = 1) -> dict:
    """An author's tensors -> a checkpoint, with `unused`, the names that were not needed.

    mmdet: the version of MMDetection that RetinaNet's file was made with. Raises BadInput.
    """
    name = recognise(tensors, path)
    source = SOURCES[name]
    unused = [k for k in tensors if re.fullmatch(UNUSED, k)]
    needed = {k: v for k, v in tensors.items() if k not in unused}
    state, unknown = rename(needed, source.rules)
    if unknown:
        raise BadInput(f"{path}: {name}? It has no {some(unknown)}")
    changes = {**read_sizes(state, path), "mmdet": mmdet}
    try:
        source.finish(state, changes)
    except KeyError as e:
        raise BadInput(f"{path}: {name}, but without {e.args[0]}") from e
    script = importlib.import_module(method or changes.get("method", source.method))
    settings = script.Settings()
    if hasattr(settings.model, "iou_head"):
        changes["iou_head"] = "head.iou_logits.weight" in state
    known = settings.flat()
    settings = settings.replace(**{k: v for k, v in changes.items() if k in known})
    categories = coco_categories()
    with torch.device("meta"):
        model = script.Detector(settings.model.without_download(), len(categories))
    ours = model.state_dict()
    counters = [k for k in state if k.endswith("num_batches_tracked") and k not in ours]
    state = {k: v for k, v in state.items() if k not in counters}
    if ours.keys() != state.keys():
        missing, more = some(ours.keys() - state.keys()), some(state.keys() - ours.keys())
        raise BadInput(f"{path}: {name}, but without {missing or '-'}; with {more or '-'}")
    odd = [k for k, v in state.items() if v.shape != ours[k].shape]
    if odd:
        shapes = f"{[*state[odd[0]].shape]}, not {[*ours[odd[0]].shape]}"
        raise BadInput(f"{path}: {name} of COCO's 80 classes? {odd[0]} is {shapes}")
    return {
        "model": {k: state[k].contiguous() for k in ours},
        "settings": as_saved(settings),
        "method": script.__name__,
        "categories": categories,
        "source": name,
        "unused": [*unused, *counters],
    }


def main(argv: list[str] | None = None) -> None:
    tyro.cli(convert_file, args=argv, description=__doc__)


def convert_file(file: tyro.conf.Positional[str], out: str, method: str = "") -> None:
    """Convert a file and say what was found in it.

    Args:
        file: as downloaded
        out: the checkpoint to write, .pt
        method: for RetinaNet's: iou_aware_retinanet or dc_loss_clnms, which start from it
    """
    try:
        tensors, about = read(file)
        version = str(about.get("mmdet_version", "1"))
        checkpoint = convert(tensors, file, method, int(version[0] == "2") + 1)
        save_checkpoint(Path(out), checkpoint)
    except BadInput as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    model = checkpoint["settings"]["model"]
    count = sum(math.prod(v.shape) for v in checkpoint["model"].values())
    print(f"{checkpoint['source']}: {model['backbone']}, {count / 1e6:.1f} M numbers")
    print(f"conventions of its framework: {' '.join(model['legacy']) or 'ours'}")
    unused = checkpoint["unused"]
    print(f"not needed: {len(unused)} of {len(tensors)} tensors: {some(unused) or 'none'}")
    script = checkpoint["method"]
    script = f"python -m {script}" if "." in script else f"python {script}.py"
    print(f"next: {script} --predict PHOTO.jpg --weights {out}")


if __name__ == "__main__":
    main()
