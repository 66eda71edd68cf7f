"""The list of nodes that ComfyUI registers."""

from __future__ import annotations

from comfy_api.v0_0_2 import ComfyExtension, io

from .apply import ApplyErasure
from .compare import CompareErasure
from .files import LoadErasure, SaveErasure
from .join import JoinErasures
from .purify import PurifyImage
from .report import ErasureReport
from .settings import ErasureSettings
from .suggest import SuggestNames
from .take_out import TakeConceptsOut
from .train import TrainErasure


class ConceptSurgeryExtension(ComfyExtension):
    """The pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes of the pack."""
        return [
            TrainErasure,
            ErasureSettings,
            SuggestNames,
            ApplyErasure,
            CompareErasure,
            ErasureReport,
            PurifyImage,
            JoinErasures,
            TakeConceptsOut,
            SaveErasure,
            LoadErasure,
        ]
