"""What the studies share: command line, checkpoint, validation images, files of results."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.utils.data import Dataset

from common import BadInput
from data.transforms import TestImages
from engine.checkpoints import load_checkpoint, load_weights, write_json
from engine.command import load_data, parse
from engine.detector import build_detector
from engine.entries import check_size
from engine.folders import check_folder
from engine.loader import to_device
from engine.metrics import coco_metrics
from engine.processes import (
    end_processes,
    print_once,
    progress,
    rank_and_world,
    start_processes,
)
from engine.settings import Settings

# The flags that leave out what each paper adds.
BASELINES = {
    "d2det": ["--row", "table2.baseline"],
    "double_head": ["--heads", "fc"],
    "cpm_rcnn": ["--row", "table1.baseline"],
    "iou_aware_retinanet": ["--no-iou-head"],
    "dc_loss_clnms": ["--no-iac", "--no-dc-loss", "--nms", "plain"],
}
PAPERS = tuple(BASELINES)
TRIAL = 2**20  # bytes; choice: about as much as a study writes
METHODS = (*PAPERS, "faster_rcnn", "cascade_rcnn", "retinanet", "gfl")


@dataclass
class Options:
    """Flags of every study of a checkpoint."""

    method: Annotated[Literal[METHODS], tyro.conf.Positional]  # whose checkpoint
    weights: str = ""  # the checkpoint (default: runs/METHOD/last.pt)
    out: str = ""  # results folder (default: the folder `studies` beside the checkpoint)


@dataclass
class Study:
    """A trained detector, and the images to study it with."""

    model: nn.Module
    settings: Settings  # the checkpoint's, under the flags given
    categories: list[dict]  # those that the model was trained for
    weights: str
    out: Path
    data: Dataset | None = None  # validation images

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @functools.cached_property
    def truth(self) -> dict:
        return self.data.coco()

    def metrics(self, results: list[dict]) -> dict:
        """COCO's metrics of results on the study's images."""
        test = self.settings.test
        return coco_metrics(self.truth, results, test.metric_detections, test.metric_sides)


def script_of(name: str):
    """The module of a method or of a baseline."""
    return importlib.import_module(name if name in PAPERS else f"baselines.{name}")


def settings_of(name: str, flags: list[str]) -> Settings:
    """A method's settings under these flags; raises BadInput for flags that do not fit."""
    return parse(name, script_of(name).Settings, flags)[1]


def read_options(name: str, options_class, about: str, argv=None):
    """A study's own options, and the remaining flags, which are the method's."""
    more = "Every flag of the method works too and overrides its settings: see METHOD --help."
    return tyro.cli(
        options_class,
        args=argv,
        prog=f"python -m studies.{name}",
        description=f"{about.strip()}\n\n{more}",
        return_unknown_args=True,
        config=(tyro.conf.AvoidSubcommands,),
    )


def results_folder(out: str | Path) -> Path:
    """The folder, made if need be. Raises BadInput if results cannot be written there.

    Every study calls this first: it may compute for minutes, and writes at the end.
    """
    check_folder(Path(out))
    try:
        with tempfile.TemporaryFile(dir=out) as file:  # an empty file fits on a full disk
            file.write(bytes(TRIAL))
    except OSError as e:
        raise BadInput(f"--out {out}: cannot write there: {e.strerror}") from e
    return Path(out)


def open_model(options: Options, flags: list[str]) -> Study:
    """The detector in a checkpoint, under the flags given; no images yet."""
    weights = ["--weights", options.weights] if options.weights else []
    script = script_of(options.method)
    command, settings = parse(options.method, script.Settings, ["--eval", *weights, *flags])
    if command.train or command.predict or command.rows or command.export:
        raise BadInput("a study neither trains nor predicts: it looks at --weights")
    if not command.weights:
        raise BadInput(f"this needs --weights (there is no {settings.run.out}/last.pt)")
    out = results_folder(options.out or Path(command.weights).parent / "studies")
    device = start_processes(settings.run.device)
    torch.manual_seed(settings.run.seed)
    state, model_settings = load_checkpoint(command.weights), settings.model.without_download()
    check_size(script.Detector, model_settings, state, command.weights)
    model = build_detector(script.Detector, model_settings, len(state["categories"]))
    load_weights(model, state, command.weights)
    categories = state["categories"]
    return Study(model.to(device).eval(), settings, categories, command.weights, out)


def open_study(options: Options, flags: list[str]) -> Study:
    """A checkpoint, with the validation images that it or the flags name."""
    study = open_model(options, flags)
    _, study.data = load_data(study.settings, train=False, categories=study.categories)
    return study


def network_images(study: Study, data: Dataset | None = None) -> TestImages:
    """The study's images, or `data`, at the first test scale: items are [(image, target)]."""
    settings, scales = study.settings, study.settings.test.test_scales[:1]
    return TestImages(data or study.data, scales, settings.data.max_size, settings.data.scales)


def each_image(study: Study) -> Iterator[tuple[list[Tensor], list[dict]]]:
    """The study's images one at a time, as the network takes them: [image], [target]."""
    images = network_images(study)
    for i in progress(range(len(images)), "looking", len(images)):
        yield to_device(images[i], study.device)


def random_detector(method: str, flags: list[str]) -> tuple[nn.Module, Settings]:
    """A detector of the paper's size for 80 classes, with random weights, and its settings."""
    settings = settings_of(method, ["--preset", "paper", *flags])
    torch.manual_seed(settings.run.seed)
    detector = script_of(method).Detector
    return build_detector(detector, settings.model.without_download(), 80), settings


def write_results(path: Path, numbers) -> None:
    """Have the first process write a JSON file, and name it with the pictures beside it."""
    if rank_and_world()[0] == 0:
        write_json(path, numbers)
        print_once(f"results: {path.with_suffix('')}*")


@contextlib.contextmanager
def reported():
    """End the program with one line for bad input, and leave torchrun's other processes."""
    try:
        yield
    except (BadInput, FloatingPointError, OSError) as e:
        # a loader's worker puts its whole traceback into the message; the reason ends it
        print(f"error: {str(e).rpartition('BadInput: ')[2].strip()}", file=sys.stderr)
        sys.exit(2)
    finally:
        end_processes()
