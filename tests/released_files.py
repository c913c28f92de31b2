"""Files of published weights, by their sources' names and shapes, filled with random numbers.

`wide` makes the published widths, without values; else widths are narrow.
"""

import torch
from released import Weights


def d2det(second=False, masks=False, dcn=0, wide=False):
    s = Weights(wide)
    there, width, classes = "roi_head." if second else "", 576 if wide else 72, 81
    s.mmdet(dcn=dcn)
    for level in range(4):
        pool = f"{there}bbox_roi_extractor.roi_layers.{level}"
        for i, (out, inp) in enumerate([(s.fc, 9 * s.C), (s.fc, s.fc), (98, s.fc)]):
            s.layer(f"{pool}.offset_fc.{2 * i}", out, inp, size=0.1 if i == 2 else 1.0)
        s.layer(f"{pool}.awp.weight.conv", s.C, s.C, 3, 3, bias=False)
        s.norm(f"{pool}.awp.weight.bn", s.C, False)
    s.layer(f"{there}bbox_head.shared_fcs.0", s.fc, 49 * s.C)
    s.layer(f"{there}bbox_head.shared_fcs.1", s.fc, s.fc)
    s.layer(f"{there}bbox_head.fc_cls", classes, s.fc)
    head = f"{there}D2Det_head."
    for i in range(8):
        s.layer(f"{head}convs.{i}.conv", width, width if i else s.C, 3, 3, bias=False)
        s.norm(f"{head}convs.{i}.gn", width, False)
    s.layer(f"{head}D2Det_reg", 4, width, 3, 3)
    s.layer(f"{head}D2Det_mask", 1, width, 3, 3)
    if masks:
        up = 256 if wide else 16
        s.layer(f"{head}deconv1", width, up, 2, 2, out=up)
        s.norm(f"{head}norm1", up, False)
        s.layer(f"{head}deconv2", up, up, 2, 2)
        s.layer(f"{head}D2Det_instance", classes, up, 3, 3)
        s.layer(f"{head}fcs.0", s.fc, 49 * (width + 1))
        s.layer(f"{head}fcs.1", s.fc, s.fc)
        s.layer(f"{head}fc_instance_iou", classes, s.fc)
    return s


def cpm(blocks=(3, 4, 6, 3), wide=False):
    s, point = Weights(wide), 64 if wide else 4
    width = 9 * point
    s.resnet("Conv_Body.", blocks, statistics=False)
    names = ["fpn_{}.2", "fpn_{}.1", "fpn_{}.0", "p5_{}"]
    names = ["Conv_Body_FPN." + name for name in names]
    s.pyramid(lambda i: names[i].format("in"), lambda i: names[i].format("out"), range(4))
    s.rpn("RPN.head.conv", "RPN.head.cls_logits", "RPN.head.bbox_pred")
    s["RPN.anchor_generator.cell_anchors.0"] = torch.zeros(3, 4)
    for head, output in (("Head_cls", "Output_cls"), ("Head_rescore", "Output_rescore")):
        s.layer(f"Grid_Cascade_RCNN.{head}.fc6", s.fc, 49 * s.C)
        s.layer(f"Grid_Cascade_RCNN.{head}.fc7", s.fc, s.fc)
        s.layer(f"Grid_Cascade_RCNN.{output}.cls_score", 81, s.fc)
    for stage in range(3):
        head, output = (f"Grid_Cascade_RCNN.{k}_grid_{stage}" for k in ("Head", "Output"))
        for i in range(8):
            s.layer(f"{head}.convs.{i}.0", width, width if i else s.C, 3, 3)
            s.norm(f"{head}.convs.{i}.1", width, False)
        s.layer(f"{output}.deconv_1", width, point, 4, 4)
        s.norm(f"{output}.norm1", width, False)
        s.layer(f"{output}.deconv_2", width, 1, 4, 4, out=9)
    for name, out, inp in (("fc1", s.fc, 49 * width), ("fc2", s.fc, s.fc), ("pred", 2, s.fc)):
        s.layer(f"Grid_Cascade_RCNN.Output_grid_2.iou_{name}", out, inp)
    return s


def double_head(wide=False):
    s = Weights(wide)
    s.mmdet()
    head, wide_to = "roi_head.bbox_head.", 1024 if wide else 64
    for name, out, inp, k in (
        ("conv1", s.C, s.C, 3), ("conv2", wide_to, s.C, 1), ("conv_identity", wide_to, s.C, 1)
    ):  # fmt: skip
        s.layer(f"{head}res_block.{name}.conv", out, inp, k, k, bias=False)
        s.norm(f"{head}res_block.{name}.bn", out, count=True)
    for j in range(4):
        inner = wide_to // 4
        for i, (out, inp, k) in enumerate(
            [(inner, wide_to, 1), (inner, inner, 3), (wide_to, inner, 1)], 1
        ):
            s.layer(f"{head}conv_branch.{j}.conv{i}", out, inp, k, k, bias=False)
            s.norm(f"{head}conv_branch.{j}.bn{i}", out, count=True)
    s.layer(f"{head}fc_branch.0", s.fc, 49 * s.C)
    s.layer(f"{head}fc_branch.1", s.fc, s.fc)
    s.layer(f"{head}fc_cls", 81, s.fc)
    s.layer(f"{head}fc_reg", 320, wide_to)
    return s


def faster_rcnn(wide=False):
    s = Weights(wide)
    s.resnet("backbone.body.", stem="stem.")
    inner, layer = "backbone.fpn.fpn_inner{}".format, "backbone.fpn.fpn_layer{}".format
    s.pyramid(lambda i: inner(i + 1), lambda i: layer(i + 1), range(4))
    s.rpn("rpn.head.conv", "rpn.head.cls_logits", "rpn.head.bbox_pred")
    s["rpn.anchor_generator.cell_anchors.0"] = torch.zeros(3, 4)
    box = "roi_heads.box."
    s.layer(f"{box}feature_extractor.fc6", s.fc, 49 * s.C)
    s.layer(f"{box}feature_extractor.fc7", s.fc, s.fc)
    s.layer(f"{box}predictor.cls_score", 81, s.fc)
    s.layer(f"{box}predictor.bbox_pred", 324, s.fc, size=0.1)
    return s


def retinanet(wide=False, iou=False):
    s = Weights(wide)
    s.towers(norm=False)
    s.layer("bbox_head.retina_cls", 720, s.C, 3, 3)
    s.layer("bbox_head.retina_reg", 36, s.C, 3, 3, size=0.1)
    if iou:
        s.layer("bbox_head.retina_iou", 9, s.C, 3, 3)
    return s


def gfl(wide=False):
    s = Weights(wide)
    s.towers(norm=True)
    s.layer("bbox_head.gfl_cls", 80, s.C, 3, 3)
    s.layer("bbox_head.gfl_reg", 68, s.C, 3, 3)
    for level in range(5):
        s[f"bbox_head.scales.{level}.scale"] = torch.tensor(1 + level / 8)
    s["bbox_head.distribution_project.project"] = torch.linspace(0, 16, 17)
    return s
