"""Concept erasure for text-to-image diffusion models: the science, free of any host."""

from .artefact.erasure import Erasure, ErasureFileError
from .artefact.markdown import report_markdown
from .artefact.numbers import report_numbers
from .artefact.report import report_text
from .artefact.verdict import verdict
from .method.subspace import SubspaceError
from .model.denoiser import Denoiser
from .model.gradient import GradientError
from .run.erase import erase
from .run.meter import (
    CurvePoint,
    Meter,
    NothingLearnedError,
    PredictionError,
    Preview,
    Progress,
    TrainingError,
)
from .run.resume import NothingToResumeError
from .settings.settings import PRESETS, EraseSettings, preset_settings
from .settings.texts import KINDS, SettingsError

__all__ = [
    "KINDS",
    "PRESETS",
    "CurvePoint",
    "Denoiser",
    "EraseSettings",
    "Erasure",
    "ErasureFileError",
    "GradientError",
    "Meter",
    "NothingLearnedError",
    "NothingToResumeError",
    "PredictionError",
    "Preview",
    "Progress",
    "SettingsError",
    "SubspaceError",
    "TrainingError",
    "erase",
    "preset_settings",
    "report_markdown",
    "report_numbers",
    "report_text",
    "verdict",
]
