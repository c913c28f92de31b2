"""`Config`, the flags of how a detector is run, and `parse`: where the value of each comes from."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

import common
from common import Amount, Natural, Range, Share, Whole
from engine.checkpoints import load_checkpoint
from formats import BadInput, read_json


@dataclass
class Config(common.Config):
    """Settings of every detector: its data, its backbone, and how it is run."""

    # What to do
    train: bool = False  # train, then evaluate
    eval: bool = False  # evaluate --weights on the validation set
    predict: tuple[str, ...] = ()  # detect in these image files and folders with --weights
    export: str = ""  # write the network up to NMS into this file, which torch.export.load reads
    rows: bool = False  # print the paper's tables and the flags of each row
    row: str = ""  # take the settings of this row of the paper's tables (see --rows)
    preset: Literal["auto", "paper", "tiny"] = "auto"  # auto: tiny for synthetic data without a GPU
    weights: str = ""  # checkpoint to evaluate, to predict with, or to start training from
    resume: bool = False  # go on from OUT/last.pt, if there is one
    out: str = ""  # results folder (default: runs/<script>)
    device: str = "auto"  # auto: cuda if there is one, else cpu
    # loader processes per training process; -1: 2 on a CPU (of two cores: none), 4 on a GPU
    workers: Annotated[int, Range(-1, 1000)] = -1
    # Training
    batch: Whole = 0  # images per step over all processes; 0: 2 per process
    optimizer: Literal["sgd", "adamw"] = "sgd"  # the papers use SGD
    lr: Amount = 0.02  # learning rate at lr_batch images a step; scaled linearly to the batch
    lr_batch: Natural = 16  # images a step that lr is meant for
    momentum: Share = 0.9  # momentum of SGD
    weight_decay: Amount = 1e-4  # weight decay, of all weights
    epochs: Amount = 12.0  # length of training, passes over the data
    steps: Whole = 0  # length of training in steps instead
    drops: tuple[Share, ...] = (8 / 12, 11 / 12)  # lr / 10 at these fractions of training
    cosine: bool = False  # lr falls along half a cosine to 0 instead; drops are not used then
    warmup: Whole = 500  # steps of linear warm-up (at most a tenth of training) ...
    warmup_factor: Share = 1 / 3  # ... from this share of the rate; choice: papers do not say
    clip_norm: Amount = 0.0  # largest gradient norm; 0: no clipping
    amp: Literal["auto", "off", "bf16"] = "auto"  # auto: bf16 autocast on a GPU that has it
    compile: bool = False  # torch.compile backbone and heads; starts slowly, not with --export
    # Testing and book-keeping
    log_every: Natural = 20  # steps between lines of the log
    save_every: Natural = 1000  # steps between checkpoints
    eval_every: Whole = 0  # steps between evaluations; 0: only at the end
    eval_batch: Whole = 0  # images per process when testing; 0: as in training
    test_flip: bool = False  # also test on the mirrored image
    draw_score: Amount = 0.5  # detections below this score are not drawn
    # detections per image that AR counts; AP counts the last (COCO)
    metric_detections: Annotated[tuple[Natural, ...], Range(1)] = (1, 10, 100)
    # where small, medium and large begin: roots of areas, px (COCO)
    metric_sides: Annotated[tuple[Amount, ...], Range(3, 3)] = (0.0, 32.0, 96.0)

    def brings(self, tiny: bool) -> dict:
        """Settings that others bring along: over the preset's (tiny or not), under a row's."""
        return {}


# What `--preset tiny` changes: a small network learns from scratch, in minutes on a CPU.
TINY = dict(
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
    eval_every=600,
)


# Flags that say what to do now; the others come with a checkpoint.
ACTIONS = (
    "train eval predict export rows row preset weights resume out device workers compile".split()
)


# Flags that say where the data is; these come with it unless one of the first three is given.
PLACES = "data train_json val_json train_images val_images train_split val_split".split()


# Flags that say how a model is trained, not what it is.
SCHEDULE = "epochs steps lr lr_batch drops batch".split()


# How many boxes are looked at: no row that is silent on these asks for the default.
COUNTS = "roi_samples proposals_test reg_test max_detections".split()


# Flags that may differ when a run is continued: they do not change what is learned.
FREE = (
    "log_every save_every eval_every eval_batch test_scales test_flip draw_score".split()
    + "metric_detections metric_sides".split()
    + ACTIONS
)


def parse(config_class, rows: dict, tiny: dict, name: str, argv=None) -> Config:
    """Flags over the checkpoint's settings over the row over the preset over the defaults."""
    argv = sys.argv[1:] if argv is None else list(argv)

    def cli(default, args):  # twice: what is asked for decides which defaults --help shows
        about = f"{config_class.__doc__} Defaults shown are those that these flags lead to."
        flat = (tyro.conf.AvoidSubcommands,)
        prog = f"{name}.py"
        return tyro.cli(
            config_class, args=args, default=default, prog=prog, description=about, config=flat
        )

    asked = cli(config_class(), [a for a in argv if a not in ("-h", "--help")])
    settings = {}
    synthetic = asked.data == "synthetic" and not (asked.train_json or asked.val_json)
    slow = asked.device == "cpu" or not torch.cuda.is_available()
    small = asked.preset == "tiny" or (asked.preset == "auto" and synthetic and slow)
    if small:
        settings |= tiny
    row = rows.get(asked.row, {})
    settings |= dataclasses.replace(asked, **row).brings(small) | row
    last = Path(asked.out or f"runs/{name}") / "last.pt"
    weights = asked.weights
    if (asked.eval or asked.predict or asked.export) and not asked.train:
        weights = weights or (str(last) if last.exists() else "")
        source = weights
    else:
        begun = [file for file in (last, last.with_name("config.json")) if file.exists()]
        source = begun[0] if asked.resume and begun else None
    if source:
        json = str(source).endswith(".json")  # a run that was killed before its first checkpoint
        state = {"config": read_json(source)} if json else load_checkpoint(source)
        saved = saved_settings(config_class, state)
        # What the code that saved it did not know yet is as in the defaults, not as in a preset.
        known = {k: v for k, v in settings.items() if k in saved}
        if any(getattr(asked, k) != getattr(config_class(), k) for k in PLACES[:3]):
            saved = {k: v for k, v in saved.items() if k not in PLACES}
        settings = known | saved
    config = cli(dataclasses.replace(config_class(), **settings), argv)
    if source and asked.row in rows:
        check_row(config, rows, tiny, asked.row, source)
    return dataclasses.replace(config, out=config.out or f"runs/{name}", weights=weights)


def check_row(config: Config, rows: dict, tiny: dict, row: str, source) -> None:
    """BadInput if a checkpoint's settings are not those that make a row this row, no other."""
    default = dataclasses.replace(type(config)(), **rows[row])
    default = dataclasses.replace(default, **default.brings(False))
    switches = {k for row in rows.values() for k in row} - Config.__dataclass_fields__.keys()
    wanted = {k: getattr(default, k) for k in switches - set(COUNTS) | {"backbone", "dcn"}}
    wanted = {k: v for k, v in wanted.items() if isinstance(v, (bool, int, str))}
    wanted |= {k: v for k, v in rows[row].items() if k not in SCHEDULE}
    free = tiny.keys() - rows[row].keys()  # these may be the tiny preset's as well
    differ = [
        flag(k, v)
        for k, v in wanted.items()
        if getattr(config, k) not in ((v, tiny[k]) if k in free else (v,))
    ]
    if differ:
        raise BadInput(
            f"--row {row}: {source} has other settings; where they are not trained in, "
            f"they can be given as flags: {' '.join(sorted(differ))}"
        )


def saved_settings(config_class, state: dict) -> dict:
    """A checkpoint's settings, as far as this Config has them; what to do is not among them."""
    known = {f.name for f in dataclasses.fields(config_class)} - set(ACTIONS)
    return {k: v for k, v in state["config"].items() if k in known}


def flag(name: str, value) -> str:
    """A setting as one would give it on the command line."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, (tuple, list)) else value}"


def untrained(config: Config) -> Config:
    """The same model without a download: its weights come from a checkpoint, or do not matter."""
    scratch = config.backbone_weights == "none"
    return config if scratch else dataclasses.replace(config, backbone_weights="random")


def show_rows(rows: dict, paper: dict) -> None:
    for row, numbers in paper.items():
        printed = "  ".join(f"{k} {v}" for k, v in numbers.items())
        flags = " ".join(flag(k, v) for k, v in rows[row].items()) or "(defaults)"
        print(f"{row:{max(map(len, paper))}}  {printed or 'not in the paper'}")
        print(f"{'':4}{flags}")
