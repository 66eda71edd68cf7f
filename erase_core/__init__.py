"""Concept erasure for text-to-image diffusion models: the science, free of any host."""

from .engine import Finished, Progress, erase
from .erasure import Erasure, ErasureFileError
from .gradient import GradientError
from .report import report_text
from .settings import PRESETS, EraseSettings, preset_settings
from .states import PredictionError
from .subspace import SubspaceError
from .texts import KINDS, SettingsError
from .trainer import TrainingError

__all__ = [
    "KINDS",
    "PRESETS",
    "EraseSettings",
    "Erasure",
    "ErasureFileError",
    "Finished",
    "GradientError",
    "PredictionError",
    "Progress",
    "SettingsError",
    "SubspaceError",
    "TrainingError",
    "erase",
    "preset_settings",
    "report_text",
]
