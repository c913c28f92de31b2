"""The settings objects of every detector: `Model`, `Test`, `Run`; `Data` is in data/.

A method script extends `Model` and `Test` by its own fields and puts all four into one
`Settings`, whose defaults are the paper's. Names are unique over the four objects, so
that the command line can be flat (`--nms-iou 0.3 --lr 0.01`), and so can
`Settings().replace(nms_iou=0.3, lr=0.01)`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from common import BadInput
from data.settings import Amount, Checked, Data, Natural, Range, Share, Sides, Whole
from engine.legacy import Switch

OBJECTS = ("model", "test", "run", "data")
Norm = Literal["auto", "frozen_bn", "eval_bn", "bn", "gn"]

WHEN_ABSENT = dict(rpn_floor=0.3)  # of checkpoints that lack these settings


@dataclass
class Model(Checked):
    """What the network is and what its losses weigh. Saved with the weights."""

    masks = False  # a detector that can find masks has a field of this name

    backbone: str = "resnet50"  # resnet18/34/50/101, resnext101_32x4d/_32x8d/_64x4d, or small
    backbone_weights: str = "imagenet"  # imagenet, none, random (to time), or torchvision's .pth
    dcn: Literal["none", "v1", "v2"] = "none"  # deformable 3x3 convolutions in C3 to C5; v2: masked
    # frozen_bn: all fixed; eval_bn: fixed statistics, weight and bias train; auto: frozen_bn.
    # From scratch auto and eval_bn are gn
    norm: Norm = "auto"
    # stem and first stages kept fixed when starting from weights
    frozen_stages: Annotated[int, Range(0, 5)] = 2
    fpn_channels: Natural = 256  # width of the pyramid
    legacy: tuple[Switch, ...] = ()  # older frameworks' conventions (engine/legacy.py)

    def without_download(self) -> Model:
        """The same network, for weights that a checkpoint brings or that do not matter."""
        if self.backbone_weights == "none":  # another network: nothing is frozen
            return self
        return dataclasses.replace(self, backbone_weights="random")


@dataclass
class Test(Checked):
    """How detections are made and scored. It may be changed after training."""

    __test__ = False  # no test case, though pytest collects classes of this name

    score_threshold: Share = 0.05  # lowest class score that is looked at
    nms_iou: Share = 0.5  # NMS per class suppresses above this IoU
    max_detections: Natural = 100  # detections kept per image
    test_scales: Sides = (800,)  # shorter sides in px; detections of all scales are merged
    test_flip: bool = False  # also detect in the mirrored image
    min_score: Share = 0.0  # detections whose final score is below this are left out
    draw_score: Share = 0.5  # detections below this score are not drawn
    # detections per image that AR counts; AP counts the last (COCO)
    metric_detections: Annotated[tuple[Natural, ...], Range(1)] = (1, 10, 100)
    # where small, medium and large begin: roots of areas in px (COCO)
    metric_sides: Annotated[tuple[Amount, ...], Range(3, 3)] = (0.0, 32.0, 96.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("metric_detections", "metric_sides"):
            values = getattr(self, name)
            if list(values) != sorted(set(values)):
                raise BadInput(f"{flag(name, values)}: each must be larger than the one before it")

    @property
    def several_views(self) -> bool:
        """Whether detections of several views of an image are merged."""
        return len(self.test_scales) > 1 or self.test_flip


@dataclass
class Run(Checked):
    """Optimiser, schedule, device and output."""

    seed: Whole = 0  # of weights, order, augmentation, sampling and synthetic images
    out: str = ""  # results folder (default: runs/<script>)
    device: str = "auto"  # cpu, cuda, or auto: cuda if there is one
    # loader processes per training process; -1: 2 on a CPU (of two cores: none), with a GPU 4,
    # at most one a core
    workers: Annotated[int, Range(-1, 1000)] = -1
    # image files to decode first: all, those new or changed since a check, or none
    check: Literal["all", "new", "none"] = "new"
    batch: Whole = 0  # images per step over all processes; 0: 2 per process
    optimizer: Literal["sgd", "adamw"] = "sgd"  # the papers use SGD
    lr: Amount = 0.02  # learning rate at lr_batch images a step; scaled linearly to the batch
    lr_batch: Natural = 16  # images a step that lr is meant for
    momentum: Share = 0.9  # momentum of SGD
    weight_decay: Amount = 1e-4  # weight decay, of all weights
    epochs: Amount = 12.0  # length of training, passes over the data
    steps: Whole = 0  # length of training in steps instead
    min_steps: Whole = 0  # at least this many steps, however few images there are
    max_steps: Whole = 0  # at most this many, however many there are; 0: no limit
    drops: tuple[Share, ...] = (8 / 12, 11 / 12)  # lr / 10 at these fractions of training
    cosine: bool = False  # lr falls along half a cosine to 0 instead; drops are not used then
    warmup: Whole = 500  # steps of linear warm-up (at most a tenth of training) ...
    warmup_factor: Share = 1 / 3  # ... from this share of the rate; choice: papers do not say
    clip_norm: Amount = 0.0  # largest gradient norm; 0: no clipping
    # auto: bf16 autocast on a GPU that has it (from Ampere, RTX 30xx, on), else float32
    amp: Literal["auto", "off", "bf16"] = "auto"
    compile: bool = False  # torch.compile backbone and heads; starts slowly, not with --export
    log_every: Natural = 20  # steps between lines of the log
    save_every: Natural = 1000  # steps between checkpoints
    eval_times: Natural = 1  # evaluations, evenly spaced, the last at the end
    eval_every: Whole = 0  # steps between evaluations instead
    eval_batch: Whole = 0  # images per process when testing; 0: as in training


# These may differ when a run is resumed, like all of Test: they do not affect training.
MAY_CHANGE_ON_RESUME = (
    *("out", "device", "workers", "check", "compile"),
    *("log_every", "save_every", "eval_times", "eval_every", "eval_batch", "max_pixels"),
)


# What --preset tiny changes for all detectors: a small network learns from scratch in minutes.
TINY: dict[str, Any] = dict(
    backbone="small",
    backbone_weights="none",
    fpn_channels=32,
    norm="bn",
    image_size=128,
    scales=(128,),
    test_scales=(128,),
    max_size=128,
    batch=8,
    optimizer="adamw",
    lr=3e-3,
    weight_decay=0.05,
    clip_norm=10.0,
    epochs=1.2,
    cosine=True,
    warmup=100,
    save_every=200,
    eval_times=5,
)


# What --preset tiny changes as well for one's own photos.
# choice: 192 px, and a length that suits 50 to 5,000 of them (minutes on two CPU cores).
TINY_PHOTOS: dict[str, Any] = dict(
    scales=(192,),
    test_scales=(192,),
    max_size=336,
    epochs=12.0,
    min_steps=450,
    max_steps=1200,
)


@dataclass
class Settings:
    """All settings of a run. A script's own `Settings` has its paper's defaults.

    A script may add fields that choose among defaults, such as `base`. `tiny`, no field,
    are the values that --preset tiny changes.
    """

    tiny = TINY

    model: Model = field(default_factory=Model)
    test: Test = field(default_factory=Test)
    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)

    def replace(self, **changes) -> Settings:
        """A copy in which each named field, of whichever object has it, has another value.

        >>> Settings().replace(nms_iou=0.3, lr=0.01).test.nms_iou
        0.3
        """
        parts = {}
        for name in OBJECTS:
            part = getattr(self, name)
            own = {f.name: changes.pop(f.name) for f in fields(part) if f.name in changes}
            parts[name] = dataclasses.replace(part, **own)
        if changes:
            raise BadInput(f"{', '.join(sorted(changes))}: no such setting")
        chosen = choices(type(self), self.flat())
        if chosen and type(self.model) is not type(type(self)(**chosen).model):
            flags = " ".join(flag(k, v) for k, v in chosen.items())
            raise BadInput(f"{flags}: its model is not a {type(self.model).__name__}")
        return dataclasses.replace(self, **parts)

    def flat(self) -> dict[str, Any]:
        """Every setting by its name, those that choose (`base`) among them."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in OBJECTS}
        for name in OBJECTS:
            part = getattr(self, name)
            values |= {f.name: getattr(part, f.name) for f in fields(part)}
        return values

    def to_dict(self) -> dict[str, Any]:
        """As it stands in checkpoints and config.json: plain values, grouped by object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Settings:
        """The settings in a checkpoint or config.json.

        Checkpoints made before there were four objects hold one flat dict, by the same
        names. What this version does not know is left out; what the older one did not
        know has its default, or the value in WHEN_ABSENT.
        """
        grouped = any(isinstance(saved.get(name), dict) for name in OBJECTS)
        flat = {k: v for k, v in saved.items() if k not in OBJECTS or not grouped}
        for name in OBJECTS if grouped else ():
            flat |= saved.get(name, {})
        flat = WHEN_ABSENT | flat
        settings = cls(**choices(cls, flat))
        known = settings.flat().keys() - choices(cls, flat).keys()
        return settings.replace(**{k: v for k, v in flat.items() if k in known})


def choices(settings_class: type[Settings], flat: dict[str, Any]) -> dict[str, Any]:
    """Of flat settings those that are fields of the `Settings` itself, such as `base`."""
    names = {f.name for f in fields(settings_class)} - set(OBJECTS)
    return {k: v for k, v in flat.items() if k in names}


def flag(name: str, value) -> str:
    """A setting as one would give it on the command line.

    >>> flag("soft_nms", False), flag("test_scales", (600, 800))
    ('--no-soft-nms', '--test-scales 600 800')
    """
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    shown = " ".join(map(str, value)) if isinstance(value, (tuple, list)) else value
    return f"--{name} {shown}"
