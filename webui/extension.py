"""What the host is told when it loads the extension."""

from __future__ import annotations

from .accordion import ConceptSurgeryScript

__all__ = ["ConceptSurgeryScript", "register"]


def register() -> None:
    """Have the host call the extension when it builds its page and its API.

    What takes time to import is imported then: hosts load scripts one after the other.
    """
    from modules import script_callbacks

    script_callbacks.on_ui_tabs(_tabs)
    script_callbacks.on_app_started(_routes)


def _tabs() -> list:
    from .tab import on_ui_tabs

    return on_ui_tabs()


def _routes(demo, app) -> None:
    from .api import on_app_started

    on_app_started(demo, app)
