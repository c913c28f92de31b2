"""What studies begin with: their command line, a checkpoint, and the data to look at it with."""

from __future__ import annotations

import contextlib
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import nn
from torch.utils.data import Dataset

import engine
from common import BadInput
from engine.data import load_data
from engine.processes import end_processes, start_processes
from engine.settings import Config, parse, untrained

# the flags that leave out what the paper adds
BASELINES = {
    "d2det": ["--row", "table2.baseline"],
    "double_head": ["--row", "table1.fc"],
    "cpm_rcnn": ["--row", "table1.baseline"],
    "iou_aware_retinanet": ["--no-iou-head"],
    "dc_loss_clnms": ["--no-iac", "--no-dc-loss", "--nms", "plain"],
}
PAPERS = tuple(BASELINES)
METHODS = (*PAPERS, "faster_rcnn", "cascade_rcnn", "retinanet", "gfl")


@dataclass
class Options:
    """Flags of every study of a checkpoint."""

    method: Annotated[Literal[METHODS], tyro.conf.Positional]  # whose checkpoint
    weights: str = ""  # the checkpoint (default: runs/METHOD/last.pt)
    out: str = ""  # results folder (default: the folder `studies` beside the checkpoint)


@dataclass
class Study:
    """A trained detector, and what it is to be studied with."""

    model: nn.Module
    config: Config  # the checkpoint's settings, under the flags given
    data: Dataset  # validation images
    device: torch.device
    out: Path


def method_of(name: str):
    """The module of a method, or of a baseline."""
    return importlib.import_module(name if name in PAPERS else f"baselines.{name}")


def settings_of(name: str, flags: list[str]) -> Config:
    """Settings of a method under `flags`; BadInput where they are no setting."""
    method = method_of(name)
    config = parse(method.Config, method.ROWS, method.TINY, name, flags)
    if config.row and config.row not in method.ROWS:
        raise BadInput(f"--row {config.row}: no such row, see --rows")
    return config


def read_options(name: str, options_class, about: str, argv=None):
    """A study's own options, and the other flags: those of the method."""
    more = "Every flag of the method works too, over its own settings: see METHOD --help."
    return tyro.cli(
        options_class,
        args=argv,
        prog=f"python -m studies.{name}",
        description=f"{about.strip()}\n\n{more}",
        return_unknown_args=True,
        config=(tyro.conf.AvoidSubcommands,),
    )


def open_study(options: Options, flags: list[str]) -> Study:
    """Load the checkpoint, and the validation data that it or the flags name."""
    weights = ["--weights", options.weights] if options.weights else []
    config = settings_of(options.method, ["--eval", *weights, *flags])
    if config.train or config.predict or config.rows:
        raise BadInput("a study neither trains nor predicts: it looks at --weights")
    if not config.weights:
        raise BadInput(f"this needs --weights (there is no {config.out}/last.pt)")
    out = Path(options.out or Path(config.weights).parent / "studies")
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out}: a file has that name")
    device = start_processes(config.device)
    torch.manual_seed(config.seed)
    settings = {**vars(untrained(config)), "device": str(device)}  # of this process
    loaded = engine.load(config.weights, method=method_of(options.method), **settings)
    _, data = load_data(config, False, True, loaded.categories)
    return Study(loaded.model, config, data, device, out)


@contextlib.contextmanager
def reported():
    """Bad input ends the program with a line that says why; torchrun's processes leave."""
    try:
        yield
    except (BadInput, FloatingPointError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    finally:
        end_processes()
