"""Concept Surgery: erase a concept from the model that is loaded, and keep the rest."""

from .erase_core import *  # noqa: F403 - the engine, for who imports concept_surgery from Python

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Called by ComfyUI when it loads the pack. Nothing of the host is imported before."""
    from server import PromptServer

    from .nodes import ConceptSurgeryExtension, downstream, refusals, routes

    server = getattr(PromptServer, "instance", None)
    refusals.install(server)
    downstream.install(server)
    routes.add_routes(server)
    return ConceptSurgeryExtension()
