"""How a detector is run: settings, training, checkpoints, evaluation, prediction.

    settings.py     Model, Test, Run and Settings
    detector.py     the contract that every detector keeps; deformable convolution
    command.py      `run`, the command line of every script
    rows.py         the rows of the papers' tables
    train.py        the training loop
    checkpoints.py  files of a run: checkpoints, the log, resuming
    entries.py      what a checkpoint may hold
    folders.py      files written whole, and a folder for one run at a time
    signals.py      Ctrl-C and the like
    loader.py       a data set shared out among processes and batched
    metrics.py      `detect` over a data set, `evaluate` the detections
    predict.py      `load(...).detect(...)` in Python, and --predict
    export.py       --export, for torch and for ONNX
    pictures.py     boxes on images, and curves
    legacy.py       older frameworks' conventions, for published weights
    processes.py    one process or many, devices, messages

It never imports a method: `load` finds the one that made a checkpoint by its name, when
it runs.
"""

from data.settings import Amount, Data, Natural, Share, Whole
from engine.command import run
from engine.metrics import evaluate
from engine.predict import load, predict_files
from engine.settings import TINY, Model, Norm, Run, Settings, Test
from engine.train import train

__all__ = [
    "Amount",
    "Data",
    "Model",
    "Natural",
    "Norm",
    "Run",
    "Settings",
    "Share",
    "TINY",
    "Test",
    "Whole",
    "evaluate",
    "load",
    "predict_files",
    "run",
    "train",
]
