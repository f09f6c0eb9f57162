"""Modules: classifier, shift and direction of DeepAlign, calibration of MoCa, Gram anchoring."""

from fastalign.nn._calibration import ModalityCalibration as ModalityCalibration
from fastalign.nn._classifier import ModalityClassifier as ModalityClassifier
from fastalign.nn._gram import GramLoss as GramLoss
from fastalign.nn._shift import ModalityShift as ModalityShift
from fastalign.nn._shift import ShiftDirection as ShiftDirection

__all__ = [
    "GramLoss",
    "ModalityCalibration",
    "ModalityClassifier",
    "ModalityShift",
    "ShiftDirection",
]

# A pickled module then names fastalign.nn, whichever file its class stands in.
for _name in __all__:
    globals()[_name].__module__ = __name__
