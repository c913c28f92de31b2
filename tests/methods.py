"""What the tests of several methods share: common checks, and one-stage models and runs."""

import dataclasses
import json
import sys
from typing import get_args, get_type_hints

import pytest
import torch
import torchvision
from PIL import Image

import d2det
import engine
from baselines import retinanet
from baselines.faster_rcnn import TwoStage
from data import SyntheticDetection
from engine.checkpoints import load_checkpoint
from engine.command import parse, read_rows, without_choices
from engine.loader import to_device
from engine.metrics import coco_metrics, detect, detect_under, to_coco
from engine.settings import OBJECTS, choices

SMALL = dict(fpn_channels=16, tower_convs=1, tower_groups=0, anchor_scale=2.0, norm="gn", workers=0)
SMALL |= dict(p2=False)  # P3..P7, as in the papers
SMALL_D2DET = dict(
    d2det.TINY,
    fpn_channels=16,
    conv_channels=16,
    num_convs=2,
    groups=4,
    fc_channels=32,
    norm="gn",
    proposals_train=100,
    proposals_test=50,
    drp_per_level=True,
    pool_norm=False,  # as in the paper, both
    workers=0,
)
RUN = """--image-size 64 --scales 64 --test-scales 64 --max-size 64 --num-train 12 --num-val 4
 --batch 2 --steps 6 --workers 0 --fpn-channels 8 --tower-convs 1 --tower-groups 0 --norm gn
 --log-every 1 --save-every 2 --device cpu --score-threshold 0.005 --draw-score 0.01""".split()
REAL = """--preset tiny --steps 2 --scales 96 --test-scales 96 --max-size 160 --batch 2 --workers 0
 --tower-convs 1 --tower-groups 4 --fpn-channels 16 --score-threshold 0.2""".split()


def torchrun(processes: int) -> list[str]:
    """How a command line begins that runs on so many processes of this machine."""
    many = f"-m torch.distributed.run --standalone --nproc_per_node {processes}".split()
    return [sys.executable, *(many if processes > 1 else [])]


def settings_of(method, **flat):
    """A method's settings under its tiny preset, with those changes by their flat names."""
    settings = method.Settings(**choices(method.Settings, flat))
    settings = settings.replace(**settings.tiny)
    return settings.replace(**without_choices(settings, flat))


def build(method, settings, num_classes=10):
    """A detector. Its `predict` uses the settings' Test, and `full_settings` are all four."""
    model = method.Detector(settings.model, num_classes)
    model.full_settings = settings
    model.default_test = lambda: settings.test
    return model


def make(method, **changes):
    """A one-stage model, small, on the flags of its tiny preset."""
    known = method.Settings(**choices(method.Settings, changes)).flat()
    small = {k: v for k, v in SMALL.items() if k in known}
    torch.manual_seed(0)
    return build(method, settings_of(method, **{**small, **changes}))


def small(method, **changes):
    """A two-stage model, on the flags of its tiny preset."""
    sizes = dict(fpn_channels=16, fc_channels=32, norm="gn", workers=0, proposals_test=40)
    torch.manual_seed(0)
    return build(method, settings_of(method, **{**sizes, **changes})).eval()


def sure(model):
    """The same model with class scores far apart, as after training."""
    torch.manual_seed(1)
    torch.nn.init.normal_(model.head.cls_logits.weight, std=1)
    torch.nn.init.zeros_(model.head.cls_logits.bias)
    return model


def batch(count=2, size=96, seed=0):
    data = SyntheticDetection(count, size, seed)
    return to_device([data[i] for i in range(count)], "cpu")


def every_size():
    """An image with an object for the anchors of each level, if their side is 2 strides."""
    images, _ = batch(1, 256)
    half = torch.tensor([8.0, 16, 32, 64, 120])[:, None]
    centre = torch.tensor([[36.0, 36], [200, 40], [80, 176], [192, 192], [128, 128]])
    boxes = torch.cat([centre - half, centre + half], 1).clamp(0, 256)
    return images, [dict(boxes=boxes, labels=torch.arange(5), ignore=torch.zeros(5).bool())]


def without_objects(targets):
    keys = ("boxes", "labels", "ignore")
    return [{**t, **{k: t[k][:0] for k in keys}} for t in targets]


def every_settings(method) -> list:
    """A script's default settings; where fields such as `base` choose, with each choice."""
    hints = get_type_hints(method.Settings)
    names = [f.name for f in dataclasses.fields(method.Settings) if f.name not in OBJECTS]
    chosen = [{name: value} for name in names for value in get_args(hints[name])]
    return [method.Settings(**choice) for choice in chosen or [{}]]


def own_flags(method) -> set[str]:
    """The settings that no other script need have."""
    names = set().union(*(settings.flat() for settings in every_settings(method)))
    return names - engine.Settings().flat().keys()


def behaviour(model):
    """The losses of two small steps, and the detections after them."""
    (images, targets), values = batch(2, 64), []
    for _ in range(2):
        losses = model.loss(images, targets)
        sum(losses.values()).backward()
        values += [(name, v.item()) for name, v in losses.items()]
        with torch.no_grad():
            for p in model.parameters():
                p -= 1e-3 * p.grad
                p.grad = None
    found = model.eval().predict(images)
    return values, [{k: v.tolist() for k, v in f.items()} for f in found]


def check_row(method, row):
    keep = ("backbone", "dcn", "scales", "test_scales", "max_size")  # sizes stay small here
    rows, printed = read_rows(method.__name__)
    changes = {k: v for k, v in rows[row].items() if k not in keep}
    model, (images, targets) = sure(make(method, **changes)), batch(1, 64)
    sum(model.loss(images, targets).values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert set(model.eval().predict(images)[0]) == {"boxes", "scores", "labels"}
    assert row in printed


def check_gradients(method):
    """Every weight learns; images without objects train, and leave no weight without gradient."""
    model, (images, targets) = make(method), batch()
    sum(model.loss(images, targets).values()).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    model.zero_grad(set_to_none=True)
    losses = model.loss(images, without_objects(targets))
    assert losses["cls"] > 0 and all(v == 0 for k, v in losses.items() if k != "cls")
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    half = model.loss(images, [targets[0], *without_objects(targets[1:])])
    assert half["box"] > 0 and all(v.isfinite() for v in half.values())


def check_all_crowd(model):
    """An image that one crowd fills: a step without a single RoI or anchor to classify."""
    images, _ = batch(1)
    size = torch.tensor([images[0].shape[2], images[0].shape[1]]).float()
    box = torch.cat([size * 0, size])[None]
    crowd = dict(boxes=box, labels=torch.tensor([0]), ignore=torch.tensor([True]))
    losses = model.loss(images, [crowd])
    assert all(v.isfinite() for v in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def check_batch_equals_singles(model):
    """Detections are the same; the loss of two is the mean of the losses, weighted by positives."""
    images, targets = batch()
    for image, found in zip(images, sure(model).eval().predict(images)):
        (alone,) = model.predict([image])
        assert len(alone["boxes"]) > 50 and (found["scores"].diff() <= 0).all()
        torch.testing.assert_close(alone["boxes"], found["boxes"], atol=1e-2, rtol=0)
        torch.testing.assert_close(alone["scores"], found["scores"], atol=1e-4, rtol=0)
    counts, original = [], retinanet.count_positives

    def counted(labels):
        counts.append(original(labels))
        return counts[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retinanet, "count_positives", counted)
        singles = [model.loss(images[i : i + 1], targets[i : i + 1]) for i in (0, 1)]
    for name, value in model.loss(images, targets).items():
        mean = sum(losses[name] * n for losses, n in zip(singles, counts)) / sum(counts)
        assert value.item() == pytest.approx(mean.item(), rel=1e-4), name
    small = model.predict([images[0], images[1][:, :60, :70]])[1]["boxes"]  # padded to 96x96
    assert len(small) and small[:, 2].max() <= 70 and small[:, 3].max() <= 60


def check_all_classes(method):
    """`top_scores` limits pairs, with all_classes anchors: all their pairs over the threshold."""
    model, (images, _) = sure(make(method, top_scores=3, score_threshold=0.1)).eval(), batch(2)
    out, test = model.outputs(images), model.full_settings.test
    scores = model.score(out["cls_logits"].sigmoid(), out, (slice(None), slice(None)), test)
    few = model.candidates(out, test)
    every = model.candidates(out, dataclasses.replace(test, all_classes=True))
    first, want = 0, 0
    for n in out["per_level"]:
        level = scores[:, first : first + n]
        best = level.amax(-1).topk(min(3, n), dim=1)[1]
        want += (level.gather(1, best[..., None].expand(-1, -1, 10)) > 0.1).sum().item()
        first += n
    assert len(every["scores"]) == want > len(few["scores"]) == 2 * 3 * len(out["per_level"])
    for i in (0, 1):  # the best pairs are among them
        best = [f["scores"][f["image"] == i].max() for f in (few, every)]
        assert best[0] == best[1]


def keep_rois(model, patch):
    """Every loss from now on sees the RoIs of the first: a last bit may decide which they are."""
    first: dict = {}
    if isinstance(model, TwoStage):
        found = model.training_rois

        def training_rois(*args):
            result = found(*args)
            return *result[:3], first.setdefault("training", result[3])

        patch.setattr(model, "training_rois", training_rois, raising=False)
    if type(model).__module__ == "cpm_rcnn":  # whose stages make RoIs of their own
        cpm_rcnn = sys.modules["cpm_rcnn"]
        decode = cpm_rcnn.decode_grid

        def decode_grid(boxes, maps, ratio, sizes):
            return first.setdefault(ratio, decode(boxes, maps, ratio, sizes))

        patch.setattr(cpm_rcnn, "decode_grid", decode_grid)


def overfit(model, item, steps: int, good=None):
    """Trains a model on one item of a data set. Its image and target, and what is found in it.

    Ends before `steps` where what is found is `good(found)`. Whatever else chance decides, the loss
    falls to less than half of what it was.
    """
    images, targets = to_device([item], "cpu")
    optimizer, totals = torch.optim.AdamW(model.parameters()), []
    for i in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, i / 10) * (0.1 if i > 0.7 * steps else 1)
        optimizer.zero_grad()
        total = sum(model.loss(images, targets).values())
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
        totals.append(total.item())
        if good and i >= 80 and i % 20 == 0:
            if good(model.eval().predict(images)[0]):
                break
            model.train()
    assert sum(totals[-5:]) / 5 < 0.5 * totals[0], totals
    (found,) = model.eval().predict(images)
    return images, targets[0], found


def metrics_of(found, target, categories) -> dict:
    """COCO's metrics of what is found in one image."""
    sure = torch.ones(len(target["boxes"]))
    truth = to_coco(0, {**target, "scores": sure}, categories)
    annotations = [{**a, "id": i + 1, "area": 1, "iscrowd": 0} for i, a in enumerate(truth)]
    data = {"images": [{"id": 0}], "annotations": annotations, "categories": categories}
    return coco_metrics(data, to_coco(0, found, categories))


def check_overfits(model, image: int, steps: int, least_iou: float, to_the_end=False):
    """Trained on one image, a model finds its objects before anything else. The image; their boxes.

    A second box on an object may be left, with a lower score: how many is chance. Ends before
    `steps` where all is found, if not told to go to the end.
    """
    data = SyntheticDetection(image + 1, 96)
    target = data[image][1]

    def good(found):
        certain = found["scores"] > 0.5
        if not certain.any():
            return False
        iou = torchvision.ops.box_iou(target["boxes"], found["boxes"][certain])
        mine = target["labels"][:, None] == found["labels"][certain]
        best = metrics_of(found, target, data.categories)["AP50"] > 0.9
        return best and (iou * mine).amax(1).min() > least_iou

    images, _, found = overfit(model, data[image], steps, None if to_the_end else good)
    assert good(found), (found, target)
    return images, target["boxes"]


def check_variants(method, changes: list[dict]):
    """One pass under several Tests finds what each finds alone, flips and scales included."""
    model, data = sure(make(method, score_threshold=0.3)).eval(), SyntheticDetection(3, 64)
    settings = model.full_settings.replace(
        scales=(64,), test_scales=(64, 80), max_size=96, test_flip=True, max_detections=9999
    )
    tests = [settings.replace(**change).test for change in changes]
    merged, seen = list(detect_under(model, data, settings, tests)), []
    for i, test in enumerate(tests):
        alone = detect(model, data, dataclasses.replace(settings, test=test))
        for (_, want), (_, found) in zip(alone, merged, strict=True):
            assert found[i].keys() == want.keys()
            assert all(torch.equal(found[i][k], want[k]) for k in want)
        seen.append([found[i]["boxes"].tolist() for _, found in merged])
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])


def check_command_line(method, run, folder, *flags):
    """Trains two steps; what was saved gives the same metrics, and detects in a file: metrics."""
    metrics = method.main([*run, "--steps", "2", *flags, "--train", "--out", f"{folder}/a"])
    image = SyntheticDetection(1, 64)[0][0]
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "a.png")
    saved = ["--weights", f"{folder}/a/last.pt", "--out", f"{folder}/c"]
    assert method.main([*run, "--eval", "--predict", f"{folder}/a.png", *saved]) == metrics
    assert {"pictures", "predictions.json"} <= {p.name for p in (folder / "c").rglob("*")}
    return metrics


def check_resume(method, run, folder, monkeypatch):
    """Trains into folder/a, and into folder/b with an interruption, to the same weights."""
    method.main([*run, "--train", "--out", f"{folder}/a"])
    name = method.__name__.rpartition(".")[2]
    detector = type(method.Detector(parse(name, method.Settings, [*run, "--train"])[1].model, 10))
    calls, original = [], detector.loss

    def killed(self, images, targets):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, images, targets)

    monkeypatch.setattr(detector, "loss", killed)
    with pytest.raises(KeyboardInterrupt):
        method.main([*run, "--train", "--out", f"{folder}/b"])
    monkeypatch.undo()
    method.main([*run, "--train", "--resume", "--out", f"{folder}/b"])
    a, b = (load_checkpoint(folder / name / "last.pt")["model"] for name in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def few_to_evaluate(data, folder, count=15):
    """A folder of links to real data, but with only so many images to evaluate on."""
    for file in data.rglob("*.*"):
        place = folder / file.relative_to(data)
        place.parent.mkdir(parents=True, exist_ok=True)
        if file.name == "test.txt":
            place.write_text("\n".join(file.read_text().split("\n")[:count]))
        elif file.name == "instances_val2017.json":
            whole = json.loads(file.read_text())
            images = whole["images"][:count]
            ids = {image["id"] for image in images}
            mine = [a for a in whole["annotations"] if a["image_id"] in ids]
            place.write_text(json.dumps({**whole, "images": images, "annotations": mine}))
        else:
            place.symlink_to(file)
    return folder


def check_real_data(method, real, data, folder):
    data = few_to_evaluate(data, folder / "data")
    metrics = method.main([*real, "--train", "--data", f"{data}", "--out", f"{folder}"])
    assert 0 <= metrics["AP"] <= 1 and len(metrics["per_class"]) in (3, 80)
    file = str(sorted(data.rglob("*.jpg"))[0])
    method.main(["--predict", file, "--out", str(folder)])
    assert len(list((folder / "predict" / "pictures").iterdir())) == 1
