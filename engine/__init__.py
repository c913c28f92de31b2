"""How a detector is run: settings, training, checkpoints, evaluation, prediction.

    detector.py     the contract that every detector keeps
    settings.py     the flags, and where the value of each comes from
    command.py      `run`, what a script's command line does
    train.py        the training loop
    checkpoints.py  files of a run, and which script made one
    data.py         a data set checked, shared out among processes, batched
    metrics.py      `detect` over a data set, `evaluate` what it finds
    predict.py      `load(...).detect(...)` in Python, and --predict
    pictures.py     boxes on images, and curves
    processes.py    one process or many, and devices

It never imports a method: `load` finds the one that made a checkpoint by its name, when it runs.
"""

from engine.command import run
from engine.metrics import evaluate
from engine.predict import load, predict_files
from engine.settings import TINY, Config
from engine.train import train

__all__ = ["Config", "TINY", "run", "train", "evaluate", "load", "predict_files"]
