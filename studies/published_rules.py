"""How each source of published weights names and orders the tensors that we have.

A line of a table has a layer's name there (a regular expression whose dots are dots), our
name, and how its rows turn, if they do. Whatever needs other tensors or numbers is done
in the source's `finish`. Names and orders were read in the sources' programs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from common import BadInput

TURNS = {
    "as_it_is": lambda rows: rows,
    "background_last": lambda rows: rows.roll(-1, 0),  # it is row 0 there, the last here
    "no_background": lambda rows: rows[1:],  # nothing reads row 0, the background's,
    "no_background_box": lambda rows: rows[4:],  # nor the four of its box
    "no_last_row": lambda rows: rows[:-1],  # the background's, where it is the last
    "ltrb": lambda rows: rows[[0, 2, 1, 3]],  # there: left, right, top, bottom
}
# a regular expression for a layer's name, our name, what turns its rows
Rule = tuple[str, str, Callable[[Tensor], Tensor]]


def rules(table: str) -> list[Rule]:
    found = []
    for line in table.strip().splitlines():
        there, ours, turn = f"{line} as_it_is".split()[:3]
        found.append((there.replace(".", r"\."), ours, TURNS[turn]))
    return found


# ------------------------------------------------------------------------------ shared parts


def resnet(there: str) -> list[Rule]:
    """The ResNet, deformable or not, whose layers the prefix `there` precedes."""
    found = rules(rf"""
        {there}conv1    backbone.stem.0
        {there}bn1      backbone.stem.1
    """)
    for n in range(1, 5):
        block, ours = rf"{there}layer{n}.(\d+)", rf"backbone.stages.{n - 1}.\1"
        found += rules(rf"""
            {block}.(conv\d|bn\d|downsample.\d)                      {ours}.\2
            {block}.conv2(?:.conv_offset|.conv_offset_mask|_offset)  {ours}.conv2.conv_offset
        """)
    return found


MMDET = resnet("backbone.") + rules(r"""
    neck.lateral_convs.(\d).conv    backbone.fpn.inner_blocks.\1.0
""")  # fmt: skip
MMDET_TWO_STAGE = MMDET + rules(r"""
    neck.fpn_convs.(\d).conv        backbone.fpn.layer_blocks.\1.0
    rpn_head.rpn_conv               rpn.conv
    rpn_head.rpn_cls                rpn.logits
    rpn_head.rpn_reg                rpn.deltas
""")  # fmt: skip
MMDET_ONE_STAGE = MMDET + rules(r"""
    neck.fpn_convs.([0-2]).conv     backbone.fpn.layer_blocks.\1.0
    neck.fpn_convs.3.conv           backbone.fpn.extra_blocks.p6
    neck.fpn_convs.4.conv           backbone.fpn.extra_blocks.p7
""")  # fmt: skip


def detectron_rpn(there: str) -> list[Rule]:
    return rules(rf"""
        {there}.head.conv          rpn.conv
        {there}.head.cls_logits    rpn.logits
        {there}.head.bbox_pred     rpn.deltas
    """)


# ------------------------------------------------------------------------------ sources


def d2det(there: str, class_rows: str, mask_rows: str) -> list[Rule]:
    """`there` precedes the heads' names. Only the second release has the background last."""
    head, drp = f"{there}D2Det_head", rf"{there}bbox_roi_extractor.roi_layers.(\d)"
    found = MMDET_TWO_STAGE + rules(rf"""
        {drp}.offset_fc.0                drp.\1.fc.1
        {drp}.offset_fc.2                drp.\1.fc.3
        {drp}.offset_fc.4                drp.\1.fc.5
        {drp}.awp.weight.conv            drp.\1.pool.conv
        {drp}.awp.weight.bn              drp.\1.pool.norm
        {there}bbox_head.shared_fcs.0    classify.1
        {there}bbox_head.shared_fcs.1    classify.3
        {there}bbox_head.fc_cls          classify.5             {class_rows}
        {head}.D2Det_reg                 regress.offsets        ltrb
        {head}.D2Det_mask                regress.overlap
        {head}.deconv1                   mask_branch.up.0
        {head}.norm1                     mask_branch.up.1
        {head}.deconv2                   mask_branch.up.3
        {head}.D2Det_instance            mask_branch.logits     {mask_rows}
        {head}.fcs.0                     mask_branch.iou.1
        {head}.fcs.1                     mask_branch.iou.3
        {head}.fc_instance_iou           mask_branch.iou.5      {mask_rows}
    """)
    for i in range(8):
        found += rules(rf"""
            {head}.convs.{i}.conv        regress.trunk.{3 * i}
            {head}.convs.{i}.gn          regress.trunk.{3 * i + 1}
        """)
    return found


def cpm() -> list[Rule]:
    heads = "Grid_Cascade_RCNN"
    head, output = rf"{heads}.Head_grid_(\d)", rf"{heads}.Output_grid_(\d)"
    found = resnet("Conv_Body.") + detectron_rpn("RPN") + rules(rf"""
        Conv_Body_FPN.p5_in              backbone.fpn.inner_blocks.3.0
        Conv_Body_FPN.p5_out             backbone.fpn.layer_blocks.3.0
        {heads}.Head_cls.fc6             classify.1
        {heads}.Head_cls.fc7             classify.3
        {heads}.Output_cls.cls_score     classify.5             background_last
        {output}.deconv_1                grids.\1.heat.0
        {output}.norm1                   grids.\1.heat.1
        {output}.deconv_2                grids.\1.heat.3
        {output}.iou_fc1                 ism.fc.1
        {output}.iou_fc2                 ism.fc.3
        {output}.iou_pred                ism.fc.5
        {heads}.Head_rescore.fc6         rsm.1
        {heads}.Head_rescore.fc7         rsm.3
        {heads}.Output_rescore.cls_score rsm.5                  background_last
    """)  # fmt: skip
    for i in range(3):  # these lists run from P4 down to P2
        found += rules(rf"""
            Conv_Body_FPN.fpn_in.{i}     backbone.fpn.inner_blocks.{2 - i}.0
            Conv_Body_FPN.fpn_out.{i}    backbone.fpn.layer_blocks.{2 - i}.0
        """)
    for i in range(8):
        found += rules(rf"""
            {head}.convs.{i}.0           grids.\1.trunk.{3 * i}
            {head}.convs.{i}.1           grids.\1.trunk.{3 * i + 1}
        """)
    return found


def double_head() -> list[Rule]:
    head = "roi_head.bbox_head"
    found = MMDET_TWO_STAGE + rules(rf"""
        {head}.res_block.conv1.conv            heads.conv.blocks.0.body.0
        {head}.res_block.conv1.bn              heads.conv.blocks.0.body.1
        {head}.res_block.conv2.conv            heads.conv.blocks.0.body.3
        {head}.res_block.conv2.bn              heads.conv.blocks.0.body.4
        {head}.res_block.conv_identity.conv    heads.conv.blocks.0.shortcut.0
        {head}.res_block.conv_identity.bn      heads.conv.blocks.0.shortcut.1
        {head}.fc_branch.0                     heads.fc.first
        {head}.fc_branch.1                     heads.fc.second
        {head}.fc_cls                          cls.fc
        {head}.fc_reg                          box.conv
    """)
    for j in range(8):
        for n in range(3):
            ours = f"heads.conv.blocks.{j + 1}.body"
            found += rules(rf"""
                {head}.conv_branch.{j}.conv{n + 1}    {ours}.{3 * n}
                {head}.conv_branch.{j}.bn{n + 1}      {ours}.{3 * n + 1}
            """)
    return found


def faster_rcnn() -> list[Rule]:
    box = "roi_heads.box"
    found = resnet("backbone.body.(?:stem.)?") + detectron_rpn("rpn") + rules(rf"""
        {box}.feature_extractor.fc6        classify.1
        {box}.feature_extractor.fc7        classify.3
        {box}.predictor.cls_score          classify.5    background_last
        {box}.predictor.bbox_pred          regress       no_background_box
    """)  # fmt: skip
    for n in range(4):
        found += rules(rf"""
            backbone.fpn.fpn_inner{n + 1}    backbone.fpn.inner_blocks.{n}.0
            backbone.fpn.fpn_layer{n + 1}    backbone.fpn.layer_blocks.{n}.0
        """)
    return found


def one_stage(layers: int, outputs: str) -> list[Rule]:
    """Towers with so many layers a convolution, 2 or with a norm 3, and their outputs."""
    found = MMDET_ONE_STAGE + rules(outputs)
    for i in range(8):
        for kind, ours in (("cls", "cls_tower"), ("reg", "box_tower")):
            found += rules(rf"""
                bbox_head.{kind}_convs.{i}.conv    head.{ours}.{layers * i}
                bbox_head.{kind}_convs.{i}.gn      head.{ours}.{layers * i + 1}
            """)
    return found


RETINA_OUTPUTS = """
    bbox_head.retina_cls    head.cls_logits
    bbox_head.retina_reg    head.box_deltas
    bbox_head.retina_iou    head.iou_logits
"""
GFL_OUTPUTS = r"""
    bbox_head.gfl_cls        head.cls_logits
    bbox_head.gfl_reg        head.bin_logits
    bbox_head.scales.(\d)    head.scales.\1
"""

# ------------------------------------------------------------------------------ finishing

# Each `finish` changes our tensors by name (`state`) and the settings (`changes`) in place.

MMDET_1 = ["rounded_corners", "last_pixel"]
DETECTRON = ["caffe_stride", "caffe_pixels", "rounded_sides", "unaligned", "last_pixel"]


def move_anchors(state: dict, layer: str, scales: list[float]) -> None:
    """MMDetection 2 centres anchors on the cells' corners, half a stride from ours.

    From an anchor that lies (s/2, s/2) further right and down, the same box needs deltas that
    are smaller by s / (2 w) and s / (2 h). An anchor's w and h are constant shares of the
    stride s, so this changes the layer's bias by a constant.
    """
    ratio = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).sqrt()[:, None]
    scale = torch.tensor(scales, dtype=torch.float64)
    w, h = (scale / ratio).flatten(), (scale * ratio).flatten()  # strides, as in make_anchors
    bias = state[f"{layer}.bias"].unflatten(0, (-1, 4)).clone()
    bias[:, 0] -= (0.5 / w).to(bias)
    bias[:, 1] -= (0.5 / h).to(bias)
    state[f"{layer}.bias"] = bias.flatten()


def finish_d2det(state: dict, changes: dict) -> None:
    """The release samples a bin's sub-bins at their starts, we in their centres.

    That is half a sub-bin further left and up, a constant share of the RoI: a side has 14
    bins of `drp_samples` sub-bins. DRP's last layer moves bins by gamma = 0.1 RoIs, so
    its bias can.
    """
    changes["legacy"] = [*MMDET_1, "unaligned"]
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
    changes["legacy"] = []
    move_anchors(state, "rpn.deltas", [8.0])


def finish_cpm(state: dict, changes: dict) -> None:
    """BatchNorm was merged into weight and bias. ResNeXt has its stride in the 3x3."""
    for name in [k for k in state if re.search(r"(stem\.1|\.bn\d|\.downsample\.1)\.bias$", k)]:
        bias = state[name]
        state.setdefault(name.replace("bias", "running_mean"), torch.zeros_like(bias))
        state.setdefault(name.replace("bias", "running_var"), torch.ones_like(bias))
    changes |= dict(ism="ism.fc.1.weight" in state, rsm="rsm.1.weight" in state)
    resnext = changes["backbone"].startswith("resnext")
    changes["legacy"] = DETECTRON[1:] if resnext else DETECTRON


def finish_double_head(state: dict, changes: dict) -> None:
    """Its network is Double-Head without Ext."""
    changes |= dict(legacy=["adaptive"], lambda_fc=1.0, lambda_conv=1.0, non_local=False)
    move_anchors(state, "rpn.deltas", [8.0])


def finish_faster_rcnn(state: dict, changes: dict) -> None:
    """That BatchNorm divides by sqrt(var), ours by sqrt(var + 1e-5)."""
    changes["legacy"] = DETECTRON
    for name in [k for k in state if k.endswith(".running_var")]:
        weight = name.replace("running_var", "weight")
        state[weight] = state[weight] * ((state[name] + 1e-5) / state[name]).sqrt()


def finish_retinanet(state: dict, changes: dict) -> None:
    changes |= dict(legacy=MMDET_1, all_classes=True)
    if "head.iou_logits.weight" in state:
        changes["method"] = "iou_aware_retinanet"
    if changes["mmdet"] >= 2:
        scales = [4 * 2 ** (octave / 3) for octave in range(3)]
        move_anchors(state, "head.box_deltas", scales)
        changes["legacy"] = []


def finish_gfl(state: dict, changes: dict) -> None:
    if changes["mmdet"] >= 2:
        why = "its points lie on the cells' corners, ours do not"
        raise BadInput(f"a GFL of MMDetection 2: {why}")
    changes |= dict(legacy=["pixel_centres", "last_pixel"], all_classes=True)
    scales = sorted(k for k in state if k.startswith("head.scales."))
    state["head.scales"] = torch.stack([state.pop(k).reshape(()) for k in scales])


class Source(NamedTuple):
    """A kind of file, recognised by a layer that it alone has."""

    sign: str  # that layer's name
    method: str  # the script whose network it is
    rules: list[Rule]
    finish: Callable[[dict, dict], None]


SOURCES = {
    "D2Det, first release": Source(
        "D2Det_head.D2Det_reg",
        "d2det",
        d2det("", class_rows="background_last", mask_rows="no_background"),
        finish_d2det,
    ),
    "D2Det, second release": Source(
        "roi_head.D2Det_head.D2Det_reg",
        "d2det",
        d2det("roi_head.", class_rows="as_it_is", mask_rows="no_last_row"),
        finish_d2det_2,
    ),
    "CPM R-CNN": Source(
        "Grid_Cascade_RCNN.Output_cls.cls_score",
        "cpm_rcnn",
        cpm(),
        finish_cpm,
    ),
    "MMDetection's Double-Head": Source(
        "roi_head.bbox_head.conv_branch.0.conv1",
        "double_head",
        double_head(),
        finish_double_head,
    ),
    "maskrcnn-benchmark's Faster R-CNN": Source(
        "roi_heads.box.predictor.bbox_pred",
        "baselines.faster_rcnn",
        faster_rcnn(),
        finish_faster_rcnn,
    ),
    "MMDetection's RetinaNet": Source(
        "bbox_head.retina_reg",
        "baselines.retinanet",
        one_stage(2, RETINA_OUTPUTS),
        finish_retinanet,
    ),
    "GFL": Source("bbox_head.gfl_reg", "baselines.gfl", one_stage(3, GFL_OUTPUTS), finish_gfl),
}
UNUSED = r"(RPN|rpn)\.anchor_generator\.cell_anchors\.\d|.*distribution_project\.project"
