"""Concept erasure for text-to-image diffusion models: the science, free of any host."""

from .artefact.erasure import Erasure, ErasureFileError
from .artefact.report import report_text
from .method.subspace import SubspaceError
from .model.gradient import GradientError
from .run.engine import Finished, Progress, erase
from .run.states import PredictionError
from .run.trainer import TrainingError
from .settings.settings import PRESETS, EraseSettings, preset_settings
from .settings.texts import KINDS, SettingsError

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
