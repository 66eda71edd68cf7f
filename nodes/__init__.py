"""ComfyUI's face of the pack: thin nodes over ``erase_core``."""

from .extension import ConceptSurgeryExtension

__all__ = ["ConceptSurgeryExtension"]
