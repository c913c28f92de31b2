"""Rules of `studies.published`: how each source names and orders the tensors that we have.

A rule maps the names of a source's layers to ours, and may turn a layer's rows. What needs other
tensors or numbers is done in the source's `finish`. The layers' names and the order of their rows
were read in the sources' programs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common import BadInput

# ------------------------------------------------------------------------------ turning rows


def background_last(rows: Tensor) -> Tensor:
    """Background is row 0 there, the last here."""
    return rows.roll(-1, 0)


def no_background(rows: Tensor) -> Tensor:
    """Without row 0, the background's, which nothing reads."""
    return rows[1:]


def no_background_box(rows: Tensor) -> Tensor:
    """Without the four rows of the background's box."""
    return rows[4:]


def no_last_row(rows: Tensor) -> Tensor:
    return rows[:-1]


def ltrb(rows: Tensor) -> Tensor:
    """Left, right, top, bottom -> left, top, right, bottom."""
    return rows[[0, 2, 1, 3]]


# ------------------------------------------------------------------------------ rules

# (a regular expression for a layer's name, our name, how its rows turn or None)
Rule = tuple[str, str, Callable[[Tensor], Tensor] | None]


def resnet(there: str) -> list[Rule]:
    """The ResNet, whose layers the prefix `there` precedes; and the offsets of a deformable one."""
    rules: list[Rule] = [
        (rf"{there}conv1", "backbone.stem.0", None),
        (rf"{there}bn1", "backbone.stem.1", None),
    ]
    for n in range(1, 5):
        block, ours = rf"{there}layer{n}\.(\d+)", rf"backbone.stages.{n - 1}.\1"
        offsets = r"conv2(?:\.conv_offset|\.conv_offset_mask|_offset)"
        rules += [
            (rf"{block}\.(conv\d|bn\d|downsample\.\d)", rf"{ours}.\2", None),
            (rf"{block}\.{offsets}", rf"{ours}.conv2.conv_offset", None),
        ]
    return rules


MMDET_FPN: list[Rule] = [
    (r"neck\.lateral_convs\.(\d)\.conv", r"backbone.fpn.inner_blocks.\1.0", None),
    (r"neck\.fpn_convs\.(\d)\.conv", r"backbone.fpn.layer_blocks.\1.0", None),
]
RETINA_FPN: list[Rule] = [
    (r"neck\.fpn_convs\.3\.conv", "backbone.fpn.extra_blocks.p6", None),
    (r"neck\.fpn_convs\.4\.conv", "backbone.fpn.extra_blocks.p7", None),
    *MMDET_FPN,
]
MMDET_RPN: list[Rule] = [
    (r"rpn_head\.rpn_conv", "rpn.conv", None),
    (r"rpn_head\.rpn_cls", "rpn.logits", None),
    (r"rpn_head\.rpn_reg", "rpn.deltas", None),
]


def two_fc(first: str, second: str, ours: str) -> list[Rule]:
    return [(first, f"{ours}.1", None), (second, f"{ours}.3", None)]


def d2det(there: str, background_first: bool) -> list[Rule]:
    """`there` precedes the heads' names. The second release has the background last."""
    head = rf"{there}D2Det_head\."
    drp = rf"{there}bbox_roi_extractor\.roi_layers\.(\d)"
    turn = background_last if background_first else None
    fewer = no_background if background_first else no_last_row
    rules = [*resnet(r"backbone\."), *MMDET_FPN, *MMDET_RPN]
    for i in range(3):
        rules.append((rf"{drp}\.offset_fc\.{2 * i}", rf"drp.\1.fc.{2 * i + 1}", None))
    for i in range(8):
        rules.append((rf"{head}convs\.{i}\.conv", f"regress.trunk.{3 * i}", None))
        rules.append((rf"{head}convs\.{i}\.gn", f"regress.trunk.{3 * i + 1}", None))
    fcs = rf"{there}bbox_head\.shared_fcs\."
    return [
        *rules,
        (rf"{drp}\.awp\.weight\.conv", r"drp.\1.pool.conv", None),
        (rf"{drp}\.awp\.weight\.bn", r"drp.\1.pool.norm", None),
        *two_fc(fcs + "0", fcs + "1", "classify"),
        (rf"{there}bbox_head\.fc_cls", "classify.5", turn),
        (head + "D2Det_reg", "regress.offsets", ltrb),
        (head + "D2Det_mask", "regress.overlap", None),
        (head + "deconv1", "mask_branch.up.0", None),
        (head + "norm1", "mask_branch.up.1", None),
        (head + "deconv2", "mask_branch.up.3", None),
        (head + "D2Det_instance", "mask_branch.logits", fewer),
        *two_fc(head + r"fcs\.0", head + r"fcs\.1", "mask_branch.iou"),
        (head + "fc_instance_iou", "mask_branch.iou.5", fewer),
    ]


def cpm() -> list[Rule]:
    rules = resnet(r"Conv_Body\.")
    for part, ours in (("in", "inner_blocks"), ("out", "layer_blocks")):
        rules.append((rf"Conv_Body_FPN\.p5_{part}", f"backbone.fpn.{ours}.3.0", None))
        for i in range(3):  # that list runs from P4 down to P2
            level = rf"Conv_Body_FPN\.fpn_{part}\.{i}"
            rules.append((level, f"backbone.fpn.{ours}.{2 - i}.0", None))
    heads = r"Grid_Cascade_RCNN\."
    for i in range(8):
        convs = rf"{heads}Head_grid_(\d)\.convs\.{i}"
        rules.append((rf"{convs}\.0", rf"grids.\1.trunk.{3 * i}", None))
        rules.append((rf"{convs}\.1", rf"grids.\1.trunk.{3 * i + 1}", None))
    output = heads + r"Output_grid_(\d)\."
    return [
        *rules,
        (r"RPN\.head\.conv", "rpn.conv", None),
        (r"RPN\.head\.cls_logits", "rpn.logits", None),
        (r"RPN\.head\.bbox_pred", "rpn.deltas", None),
        *two_fc(heads + r"Head_cls\.fc6", heads + r"Head_cls\.fc7", "classify"),
        (heads + r"Output_cls\.cls_score", "classify.5", background_last),
        (output + "deconv_1", r"grids.\1.heat.0", None),
        (output + "norm1", r"grids.\1.heat.1", None),
        (output + "deconv_2", r"grids.\1.heat.3", None),
        (output + "iou_fc1", "ism.fc.1", None),
        (output + "iou_fc2", "ism.fc.3", None),
        (output + "iou_pred", "ism.fc.5", None),
        *two_fc(heads + r"Head_rescore\.fc6", heads + r"Head_rescore\.fc7", "rsm"),
        (heads + r"Output_rescore\.cls_score", "rsm.5", background_last),
    ]


def double_head() -> list[Rule]:
    rules = [*resnet(r"backbone\."), *MMDET_FPN, *MMDET_RPN]
    head = r"roi_head\.bbox_head\."
    for i, kind in enumerate(("conv", "bn")):
        for n in (1, 2):
            block = rf"{head}res_block\.conv{n}\.{kind}"
            rules.append((block, f"heads.conv.blocks.0.body.{3 * (n - 1) + i}", None))
        identity = rf"{head}res_block\.conv_identity\.{kind}"
        rules.append((identity, f"heads.conv.blocks.0.shortcut.{i}", None))
        for j in range(8):
            for n in (1, 2, 3):
                block = rf"{head}conv_branch\.{j}\.{kind}{n}"
                ours = f"heads.conv.blocks.{j + 1}.body.{3 * (n - 1) + i}"
                rules.append((block, ours, None))
    return [
        *rules,
        (head + r"fc_branch\.0", "heads.fc.first", None),
        (head + r"fc_branch\.1", "heads.fc.second", None),
        (head + "fc_cls", "cls.fc", None),
        (head + "fc_reg", "box.conv", None),
    ]


def faster_rcnn() -> list[Rule]:
    rules = resnet(r"backbone\.body\.(?:stem\.)?")
    for n in range(1, 5):
        for part in ("inner", "layer"):
            ours = f"backbone.fpn.{part}_blocks.{n - 1}.0"
            rules.append((rf"backbone\.fpn\.fpn_{part}{n}", ours, None))
    box = r"roi_heads\.box\."
    fc = box + r"feature_extractor\.fc"
    return [
        *rules,
        (r"rpn\.head\.conv", "rpn.conv", None),
        (r"rpn\.head\.cls_logits", "rpn.logits", None),
        (r"rpn\.head\.bbox_pred", "rpn.deltas", None),
        *two_fc(fc + "6", fc + "7", "classify"),
        (box + r"predictor\.cls_score", "classify.5", background_last),
        (box + r"predictor\.bbox_pred", "regress", no_background_box),
    ]


def towers(layers: int) -> list[Rule]:
    """RetinaNet's towers, with so many layers a convolution: 2, or 3 with a norm."""
    rules = [*resnet(r"backbone\."), *RETINA_FPN]
    for i in range(8):
        for kind, ours in (("cls", "cls_tower"), ("reg", "box_tower")):
            conv = rf"bbox_head\.{kind}_convs\.{i}"
            rules.append((rf"{conv}\.conv", f"head.{ours}.{layers * i}", None))
            rules.append((rf"{conv}\.gn", f"head.{ours}.{layers * i + 1}", None))
    return rules


RETINANET = [
    *towers(2),
    (r"bbox_head\.retina_cls", "head.cls_logits", None),
    (r"bbox_head\.retina_reg", "head.box_deltas", None),
    (r"bbox_head\.retina_iou", "head.iou_logits", None),
]
GFL = [
    *towers(3),
    (r"bbox_head\.gfl_cls", "head.cls_logits", None),
    (r"bbox_head\.gfl_reg", "head.bin_logits", None),
    (r"bbox_head\.scales\.(\d)", r"head.scales.\1", None),
]


# ------------------------------------------------------------------------------ finishing


def move_anchors(state: dict, layer: str, scales: list[float]) -> None:
    """MMDetection 2 centres anchors on the cells' corners, half a stride from ours.

    The same box from an anchor that lies (s/2, s/2) further right and down needs deltas that are
    smaller by s / (2 w) and s / (2 h). An anchor's w and h are constant shares of the stride s, so
    this is a constant of the layer's bias.
    """
    ratio = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).sqrt()[:, None]
    scale = torch.tensor(scales, dtype=torch.float64)
    w, h = (scale / ratio).flatten(), (scale * ratio).flatten()  # in strides, as make_anchors has
    bias = state[f"{layer}.bias"].unflatten(0, (-1, 4)).clone()
    bias[:, 0] -= (0.5 / w).to(bias)
    bias[:, 1] -= (0.5 / h).to(bias)
    state[f"{layer}.bias"] = bias.flatten()


def finish_d2det(state: dict, changes: dict) -> None:
    """The release samples a bin's sub-bins at their starts, we in their centres.

    That is half a sub-bin further left and up, a constant share of the RoI: 14 bins a side, and
    `drp_samples` sub-bins each. DRP's last layer moves bins by gamma = 0.1 RoIs, so its bias can.
    """
    changes["masks"] = "mask_branch.logits.weight" in state
    changes["drp_samples"] = 2 if changes["backbone"] == "resnet50" else 1
    for level in range(4):
        bias = state[f"drp.{level}.fc.5.bias"]
        state[f"drp.{level}.fc.5.bias"] = bias - 1 / (28 * changes["drp_samples"]) / 0.1
    if changes["masks"]:
        changes |= dict(score_threshold=0.05, nms_iou=0.3, reg_test=100, soft_nms=False)
        changes |= dict(proposals_test=700)


def finish_d2det_2(state: dict, changes: dict) -> None:
    finish_d2det(state, changes)
    move_anchors(state, "rpn.deltas", [8.0])


def finish_cpm(state: dict, changes: dict) -> None:
    """BatchNorm was merged: weight and bias alone are left. ResNeXt has its stride in the 3x3."""
    for name in [k for k in state if re.search(r"(stem\.1|\.bn\d|\.downsample\.1)\.bias$", k)]:
        bias = state[name]
        state.setdefault(name.replace("bias", "running_mean"), torch.zeros_like(bias))
        state.setdefault(name.replace("bias", "running_var"), torch.ones_like(bias))
    changes |= dict(ism="ism.fc.1.weight" in state, rsm="rsm.1.weight" in state)
    if changes["backbone"].startswith("resnext"):
        changes["legacy"] = [s for s in changes["legacy"] if s != "caffe_stride"]


def finish_faster_rcnn(state: dict, changes: dict) -> None:
    """That BatchNorm divides by sqrt(var), ours by sqrt(var + 1e-5)."""
    for name in [k for k in state if k.endswith(".running_var")]:
        weight = name.replace("running_var", "weight")
        state[weight] = state[weight] * ((state[name] + 1e-5) / state[name]).sqrt()


def finish_double_head(state: dict, changes: dict) -> None:
    move_anchors(state, "rpn.deltas", [8.0])


def finish_retinanet(state: dict, changes: dict) -> None:
    if "head.iou_logits.weight" in state:
        changes["method"] = "iou_aware_retinanet"
    if changes["mmdet"] >= 2:
        scales = [4 * 2 ** (octave / 3) for octave in range(3)]
        move_anchors(state, "head.box_deltas", scales)
        changes["legacy"] = []


def finish_gfl(state: dict, changes: dict) -> None:
    if changes["mmdet"] >= 2:
        raise BadInput("a GFL of MMDetection 2: its points lie on the cells' corners, ours do not")
    scales = sorted(k for k in state if k.startswith("head.scales."))
    state["head.scales"] = torch.stack([state.pop(k).reshape(()) for k in scales])


# ------------------------------------------------------------------------------ sources


@dataclass(frozen=True)
class Source:
    """A kind of file, recognised by a layer that it alone has."""

    name: str
    sign: str
    method: str  # the script whose network it is
    rules: list[Rule]
    finish: Callable[[dict, dict], None]
    changes: dict  # of the script's defaults


MMDET_1 = ["rounded_corners", "last_pixel"]
DETECTRON = ["caffe_stride", "caffe_pixels", "rounded_sides", "unaligned", "last_pixel"]
PLAIN = dict(lambda_fc=1.0, lambda_conv=1.0, non_local=False)  # Double-Head without Ext
SOURCES = [
    Source(
        "D2Det, first release",
        r"D2Det_head\.D2Det_reg",
        "d2det",
        d2det("", background_first=True),
        finish_d2det,
        dict(legacy=[*MMDET_1, "unaligned"]),
    ),
    Source(
        "D2Det, second release",
        r"roi_head\.D2Det_head\.D2Det_reg",
        "d2det",
        d2det(r"roi_head\.", background_first=False),
        finish_d2det_2,
        dict(legacy=[]),
    ),
    Source(
        "CPM R-CNN",
        r"Grid_Cascade_RCNN\.Output_cls\.cls_score",
        "cpm_rcnn",
        cpm(),
        finish_cpm,
        dict(legacy=DETECTRON),
    ),
    Source(
        "MMDetection's Double-Head",
        r"roi_head\.bbox_head\.conv_branch\.0\.conv1",
        "double_head",
        double_head(),
        finish_double_head,
        dict(legacy=["adaptive"], **PLAIN),
    ),
    Source(
        "maskrcnn-benchmark's Faster R-CNN",
        r"roi_heads\.box\.predictor\.bbox_pred",
        "baselines.faster_rcnn",
        faster_rcnn(),
        finish_faster_rcnn,
        dict(legacy=DETECTRON),
    ),
    Source(
        "MMDetection's RetinaNet",
        r"bbox_head\.retina_reg",
        "baselines.retinanet",
        RETINANET,
        finish_retinanet,
        dict(legacy=MMDET_1, all_classes=True),
    ),
    Source(
        "GFL",
        r"bbox_head\.gfl_reg",
        "baselines.gfl",
        GFL,
        finish_gfl,
        dict(legacy=["pixel_centres", "last_pixel"], all_classes=True),
    ),
]
UNUSED = r"(RPN|rpn)\.anchor_generator\.cell_anchors\.\d|.*distribution_project\.project"
