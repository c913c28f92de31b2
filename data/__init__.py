"""Data sets: what a data set has to offer, the built-in ones, and how they are loaded.

`load` turns settings into a training and a validation set. A data set of your own needs
nothing from here: `data/contract.py` says what it must offer.
"""

from common import BadInput
from data.coco import CocoDetection
from data.contract import DetectionDataset, make_target
from data.load import load
from data.settings import Data
from data.synthetic import SyntheticDetection

__all__ = [
    "BadInput",
    "CocoDetection",
    "Data",
    "DetectionDataset",
    "SyntheticDetection",
    "load",
    "make_target",
]
