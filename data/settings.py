"""`Data`, the settings of the data, and `Checked`, the base of all settings objects.

The types below say which numbers a setting accepts; `Checked` refuses others. Every
settings object of the project is a `Checked` dataclass. A field's comment is its text in
`--help`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from common import BadInput
from data.images import MAX_PIXELS


class Range(NamedTuple):
    """Limits of a number, both included; for a tuple, limits of its length."""

    low: float
    high: float = math.inf


Natural = Annotated[int, Range(1, 2**31 - 1)]
Whole = Annotated[int, Range(0, 2**31 - 1)]
Amount = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
HeldOut = Annotated[float, Range(0.001, 0.999)]
Side = Annotated[int, Range(32, 2**31 - 1)]  # of an image, px
Sides = Annotated[tuple[Side, ...], Range(1)]  # at least one


@dataclass
class Checked:
    """Base of the settings objects: raises `BadInput` for a value that a field does not allow.

    Lists become tuples, because JSON and checkpoints store tuples as lists.
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                value = tuple(value)
                setattr(self, field.name, value)
            reason = why_invalid(value, hints[field.name])
            if reason:
                shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
                raise BadInput(f"--{field.name.replace('_', '-')} {shown}: {reason}")


def why_invalid(value: Any, hint: Any) -> str:
    """The reason why a type does not allow a value; "" if it does.

    >>> why_invalid(2.0, Share), why_invalid((800, -1), Sides), why_invalid(float("nan"), float)
    ('at most 1', 'at least 32', 'not finite')
    """
    kind, limits = hint, Range(-math.inf)
    if get_origin(hint) is Annotated:
        kind, limits = get_args(hint)
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return "" if value in choices else f"one of {', '.join(map(str, choices))}"
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return "not a list"
        for element in value:
            reason = why_invalid(element, get_args(kind)[0])
            if reason:
                return reason
        return _why_outside(len(value), limits, " values")
    if type(value) is not kind and not (kind is float and type(value) is int):
        return f"not {kind.__name__}"
    if kind not in (int, float):
        return ""
    if not math.isfinite(value):
        return "not finite"
    return _why_outside(value, limits)


def _why_outside(number: float, limits: Range, unit: str = "") -> str:
    if number < limits.low:
        return f"at least {limits.low:g}{unit}"
    if number > limits.high:
        return f"at most {limits.high:g}{unit}"
    return ""


@dataclass
class Data(Checked):
    """Where the images are, and how they are resized and augmented."""

    # "synthetic" (made on the fly) or a folder in COCO, Pascal VOC, YOLO or UAVDT layout
    data: str = "synthetic"
    train_json: str = ""  # COCO annotation file to train on, instead of a folder's
    train_images: str = ""  # folder of the images that train_json lists
    val_json: str = ""  # COCO annotation file to evaluate on, instead of a folder's
    val_images: str = ""  # folder of the images that val_json lists
    # Split to train on: VOC reads ImageSets/Main/<split>.txt (default: trainval if the
    # evaluation uses test, else train), UAVDT reads M_attr/<split>/ (default: train);
    # elsewhere train
    train_split: str = ""
    # Split to evaluate on (default: test for VOC and UAVDT; val where a folder has it)
    val_split: str = ""
    # Share of the images that is held out to evaluate on if a folder has no splits
    val_share: HeldOut = 0.2
    # Are photos turned upright by their EXIF data? yes, no, or auto: if the annotated sizes
    # are those of the turned photos
    upright: Literal["auto", "yes", "no"] = "auto"
    # Largest image that is read, px in all: a guard against files that would fill the memory
    max_pixels: Natural = MAX_PIXELS
    num_train: Natural = 7000  # number of synthetic images to train on
    num_val: Natural = 200  # number of synthetic images to evaluate on
    image_size: Side = 512  # height and width of the synthetic images, px
    # Length of an image's shorter side in training, px; one of these is drawn for each image
    scales: Sides = (800,)
    # Upper limit on an image's longer side, px; it holds at the largest training scale and
    # shrinks or grows in proportion at the others
    max_size: Side = 1333
    flip: Share = 0.5  # probability that a training image is mirrored left to right
