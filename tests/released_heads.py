"""What the sources' programs compute of their files (released_files.py), beside what ours computes.

Each function takes a file and our network of it and returns pairs (ours, theirs) of tensors that
must agree. RoIs are given: NMS is no part of this.
"""

from functools import partial

import torch
import torch.nn.functional as F
from released import anchors_there, by_anchor, decoded, normalised, pooled_there

import common
from baselines.faster_rcnn import RCNN_STDS, Rois

STRIDES = [4, 8, 16, 32, 64]
IMAGE = torch.randint(0, 256, (3, 121, 150), generator=torch.Generator().manual_seed(1)).byte()
BOXES = [[10, 12, 62, 50], [12, 8, 138, 110]]  # pooled from P2 and from P3
LABELS = torch.tensor([5, 70])


def rois():
    return Rois(torch.zeros(2, dtype=torch.long), torch.tensor(BOXES).double())


def features_and_rpn(s, model, bgr, there, inner, layer, rpn, kind, stem="", eps=1e-5, one=1):
    """Pairs (ours, theirs) of the pyramid and of the RPN's logits and boxes; the features."""
    if not s.features:
        s.features = s.merged(s.body(there, normalised(IMAGE, bgr), bgr, eps, stem), inner, layer)
        s.features.append(F.max_pool2d(s.features[-1], 1, 2))
    theirs = s.features
    with torch.no_grad():
        ours = model.backbone(common.pad_images([IMAGE])[0])
        anchors, logits, deltas, _ = model.rpn(ours)
    conv, logit, delta = rpn
    hidden = [s.conv(conv, f).relu() for f in theirs]
    there_anchors = anchors_there(kind, [f.shape[-2:] for f in theirs], STRIDES, [8])
    boxes = decoded(there_anchors, by_anchor([s.conv(delta, h) for h in hidden], 4), one)
    pairs = list(zip(ours, theirs))
    pairs.append((logits[0], by_anchor([s.conv(logit, h) for h in hidden], 1)[:, 0]))
    return [*pairs, (common.decode_boxes(anchors, deltas[0]), boxes)], theirs


def two_fc(s, first, second, last, x):
    return s.linear(last, s.linear(second, s.linear(first, x.flatten(1)).relu()).relu())


def mmdet_rpn(s, model, **more):
    inner, layer = "neck.lateral_convs.{}.conv".format, "neck.fpn_convs.{}.conv".format
    rpn = [f"rpn_head.rpn_{k}" for k in ("conv", "cls", "reg")]
    return features_and_rpn(s, model, False, "backbone.", inner, layer, rpn, **more)


def discriminative_pool(s, there, features, coarse, samples=2):
    """Deformable pooling that samples at the start of sub-bins, and the weighted average."""
    pooled = []
    for level, (x1, y1, x2, y2) in enumerate(torch.tensor(BOXES).double()):
        name, scale = f"{there}bbox_roi_extractor.roi_layers.{level}", 1 / STRIDES[level]
        x = coarse[level : level + 1].flatten(1)
        x = s.linear(f"{name}.offset_fc.0", x).relu()
        move = s.linear(f"{name}.offset_fc.4", s.linear(f"{name}.offset_fc.2", x).relu())
        dx, dy = F.interpolate(move.view(1, 2, 7, 7), scale_factor=2)[0]  # [14, 14]
        width, height = (x2 - x1) * scale, (y2 - y1) * scale
        start = torch.arange(14) / 14
        total = 0
        for i in range(samples):
            for j in range(samples):
                sub = 14 * samples
                px = x1 * scale - 0.5 + (start + j / sub) * width + dx * 0.1 * width
                py = y1 * scale - 0.5 + (start[:, None] + i / sub) * height + dy * 0.1 * height
                H, W = features[level].shape[-2:]
                assert px.min() >= 0 <= py.min() and px.max() < W - 1 and py.max() < H - 1
                grid = torch.stack([2 * px / (W - 1) - 1, 2 * py / (H - 1) - 1], -1)[None]
                total = total + F.grid_sample(features[level], grid, align_corners=True)
        x = total / samples**2
        gate = F.instance_norm(
            s.conv(f"{name}.awp.weight.conv", x),
            weight=s[f"{name}.awp.weight.bn.weight"],
            bias=s[f"{name}.awp.weight.bn.bias"],
        )
        weight = (12 * gate.sigmoid()).exp()
        pooled.append(F.avg_pool2d(x * weight, 3, 2, 1) / F.avg_pool2d(weight, 3, 2, 1))
    return torch.cat(pooled)


def d2det(s, model, second, masks):
    """The two things left out of the conversion are taken from our side: docs/weights.md."""
    there = "roi_head." if second else ""
    pairs, features = mmdet_rpn(
        s, model, kind="corner" if second else "corners", one=0 if second else 1
    )
    ours = [f for f, _ in pairs[:5]]
    coarse = pooled_there(features, BOXES, 3, aligned=True)
    x = discriminative_pool(s, there, features, coarse)
    head = f"{there}bbox_head."
    logits = two_fc(s, f"{head}shared_fcs.0", f"{head}shared_fcs.1", f"{head}fc_cls", x)
    classes = slice(0, 80) if second else slice(1, 81)
    probs = model.classify(model.class_features(ours, rois())).softmax(1)[:, :80]
    pairs.append((probs, logits.softmax(1)[:, classes]))
    x, head = pooled_there(features, BOXES, 14, aligned=second), f"{there}D2Det_head."
    for i in range(8):
        x = s.conv(f"{head}convs.{i}.conv", x, 1 if i else 2)
        x = s.group_norm(f"{head}convs.{i}.gn", x, 36).relu()
    left, right, top, bottom = s.conv(f"{head}D2Det_reg", x).relu().unbind(1)
    trunk = model.regress.trunk(model.pool(ours, rois(), 14))
    offsets, overlap = model.regress.cells(trunk)
    pairs.append((offsets, torch.stack([left, top, right, bottom], 1)))
    pairs.append((overlap, s.conv(f"{head}D2Det_mask", x)))
    if masks:
        up = F.conv_transpose2d(x, s[f"{head}deconv1.weight"], s[f"{head}deconv1.bias"], 2)
        up = s.group_norm(f"{head}norm1", up, 16).relu()
        up = F.conv_transpose2d(up, s[f"{head}deconv2.weight"], s[f"{head}deconv2.bias"], 2)
        channel = LABELS if second else LABELS + 1
        mask = s.conv(f"{head}D2Det_instance", up.relu())[torch.arange(2), channel]
        seen = torch.cat([x, F.max_pool2d(mask[:, None], 4).sigmoid()], 1)
        iou = two_fc(s, f"{head}fcs.0", f"{head}fcs.1", f"{head}fc_instance_iou", seen)
        pairs += zip(model.mask_branch(trunk, LABELS), (mask, iou[torch.arange(2), channel]))
    return pairs


def cpm(s, model):
    names = ["fpn_{}.2", "fpn_{}.1", "fpn_{}.0", "p5_{}"]
    inner, layer = ([f"Conv_Body_FPN.{n.format(k)}" for n in names] for k in ("in", "out"))
    rpn = [f"RPN.head.{k}" for k in ("conv", "cls_logits", "bbox_pred")]
    pairs, features = features_and_rpn(
        s, model, True, "Conv_Body.", inner.__getitem__, layer.__getitem__, rpn, kind="sides"
    )
    ours, heads = [f for f, _ in pairs[:5]], "Grid_Cascade_RCNN."
    x = pooled_there(features, BOXES, 7, aligned=False)
    for head, output, own in (
        ("Head_cls", "Output_cls", model.classify),
        ("Head_rescore", "Output_rescore", model.rsm),
    ):
        fc6, fc7 = f"{heads}{head}.fc6", f"{heads}{head}.fc7"
        logits = two_fc(s, fc6, fc7, f"{heads}{output}.cls_score", x)
        probs = own(model.pool(ours, rois(), 7)).softmax(1)[:, :80]
        pairs.append((probs, logits.softmax(1)[:, 1:]))
    for stage in range(3):
        x = pooled_there(features, BOXES, 14, aligned=False)
        head, output = (f"{heads}{k}_grid_{stage}" for k in ("Head", "Output"))
        for i in range(8):
            x = s.conv(f"{head}.convs.{i}.0", x, 1 if i else 2)
            x = s.group_norm(f"{head}.convs.{i}.1", x, 36).relu()
        up = partial(F.conv_transpose2d, stride=2, padding=1, groups=9)
        heat = up(x, s[f"{output}.deconv_1.weight"], s[f"{output}.deconv_1.bias"])
        heat = s.group_norm(f"{output}.norm1", heat, 9).relu()
        heat = up(heat, s[f"{output}.deconv_2.weight"], s[f"{output}.deconv_2.bias"])
        own_heat, trunk = model.grids[stage](model.pool(ours, rois(), 14))
        pairs.append((own_heat, heat))
    iou = two_fc(s, *(f"{output}.iou_{k}" for k in ("fc1", "fc2", "pred")), x)
    return [*pairs, (model.ism(trunk), iou)]


def double_head(s, model):
    pairs, features = mmdet_rpn(s, model, kind="corner", one=0)
    head = "roi_head.bbox_head."
    x = pooled_there(features, BOXES, 7, aligned=True, samples=-1)
    scores = two_fc(s, f"{head}fc_branch.0", f"{head}fc_branch.1", f"{head}fc_cls", x)
    x = pooled_there(features, BOXES, 7, aligned=True, samples=-1, enlarge=1.3)

    def conv_bn(conv, norm, x):
        return s.batch_norm(f"{head}{norm}", s.conv(f"{head}{conv}", x))

    block = "res_block.{}.{}".format
    y = conv_bn(block("conv1", "conv"), block("conv1", "bn"), x).relu()
    y = conv_bn(block("conv2", "conv"), block("conv2", "bn"), y)
    x = (y + conv_bn(block("conv_identity", "conv"), block("conv_identity", "bn"), x)).relu()
    for j in range(4):
        y = conv_bn(f"conv_branch.{j}.conv1", f"conv_branch.{j}.bn1", x).relu()
        y = conv_bn(f"conv_branch.{j}.conv2", f"conv_branch.{j}.bn2", y).relu()
        x = (x + conv_bn(f"conv_branch.{j}.conv3", f"conv_branch.{j}.bn3", y)).relu()
    deltas = s.linear(f"{head}fc_reg", x.mean((2, 3))).view(2, 80, 4)
    own = model.predictions([f for f, _ in pairs[:5]], rois())
    pairs.append((own["probs"]["fc"], scores.softmax(1)[:, :80]))
    return [*pairs, (own["deltas"]["conv"], deltas)]


def faster_rcnn(s, model):
    inner, layer = "backbone.fpn.fpn_inner{}".format, "backbone.fpn.fpn_layer{}".format
    rpn = [f"rpn.head.{k}" for k in ("conv", "cls_logits", "bbox_pred")]
    names = lambda i: inner(i + 1), lambda i: layer(i + 1)  # noqa: E731
    pairs, features = features_and_rpn(
        s, model, True, "backbone.body.", *names, rpn, kind="sides", stem="stem.", eps=0
    )
    box = "roi_heads.box."
    x = pooled_there(features, BOXES, 7, aligned=False).flatten(1)
    for name in ("fc6", "fc7"):
        x = s.linear(f"{box}feature_extractor.{name}", x).relu()
    probs = s.linear(f"{box}predictor.cls_score", x).softmax(1)[:, 1:]
    deltas = s.linear(f"{box}predictor.bbox_pred", x).view(2, 81, 4)[:, 1:]
    last = torch.tensor(BOXES).double() - torch.tensor([0, 0, 1, 1])
    boxes = decoded(last[:, None], deltas / torch.tensor([10, 10, 5, 5]), 1)
    logits, own = model.head([f for f, _ in pairs[:5]], rois())
    own = common.decode_boxes(rois().boxes[:, None], own.unflatten(1, (80, 4)), RCNN_STDS)
    return [*pairs, (logits.softmax(1)[:, :80], probs), (own, boxes)]


def one_stage(s, norm, p6_on_c5):
    """The features P3 to P7, and each tower's last maps."""
    inner, layer = "neck.lateral_convs.{}.conv".format, "neck.fpn_convs.{}.conv".format
    if not s.features:
        maps = s.body("backbone.", normalised(IMAGE, False))
        s.features = s.merged(maps[1:], inner, layer)
        s.features.append(s.conv(layer(3), maps[-1] if p6_on_c5 else s.features[-1], 2))
        s.features.append(s.conv(layer(4), s.features[-1], 2))
    levels = s.features
    towers = {}
    for kind in ("cls", "reg"):
        x = levels
        for i in range(4):
            name = f"bbox_head.{kind}_convs.{i}"
            x = [s.conv(f"{name}.conv", f) for f in x]
            x = [(s.group_norm(f"{name}.gn", f, 32) if norm else f).relu() for f in x]
        towers[kind] = x
    return levels, towers["cls"], towers["reg"]


def everywhere(model, out):
    index = torch.zeros(len(out["anchors"]), dtype=torch.long), torch.arange(len(out["anchors"]))
    return model.decode(out, index)


def retinanet(s, model, second):
    levels, cls, reg = one_stage(s, norm=False, p6_on_c5=True)
    scales, strides = [4 * 2 ** (k / 3) for k in range(3)], [8, 16, 32, 64, 128]
    kind, one = ("corner", 0) if second else ("corners", 1)
    anchors = anchors_there(kind, [f.shape[-2:] for f in levels], strides, scales)
    deltas = by_anchor([s.conv("bbox_head.retina_reg", f) for f in reg], 4)
    out = model.outputs([IMAGE])
    logits = by_anchor([s.conv("bbox_head.retina_cls", f) for f in cls], 80)
    pairs = [
        (out["cls_logits"][0], logits),
        (everywhere(model, out), decoded(anchors, deltas, one)),
    ]
    if "iou_logits" in out:
        iou = by_anchor([s.conv("bbox_head.retina_iou", f) for f in reg], 1)[:, 0]
        pairs.append((out["iou_logits"][0], iou))
    return pairs


def gfl(s, model):
    levels, cls, reg = one_stage(s, norm=True, p6_on_c5=False)
    logits = by_anchor([s.conv("bbox_head.gfl_cls", f) for f in cls], 80)
    boxes = []
    for i, (f, stride) in enumerate(zip(reg, [8, 16, 32, 64, 128])):
        bins = by_anchor([s.conv("bbox_head.gfl_reg", f) * s[f"bbox_head.scales.{i}.scale"]], 68)
        left, top, right, bottom = (
            (bins.view(-1, 4, 17).softmax(-1) * torch.arange(17)).sum(-1) * stride
        ).unbind(-1)
        y, x = torch.cartesian_prod(*map(torch.arange, f.shape[-2:])).unbind(1)
        cx, cy = x * stride + (stride - 1) / 2, y * stride + (stride - 1) / 2
        boxes.append(torch.stack([cx - left, cy - top, cx + right + 1, cy + bottom + 1], 1))
    out = model.outputs([IMAGE])
    return [(out["cls_logits"][0], logits), (everywhere(model, out), torch.cat(boxes))]
