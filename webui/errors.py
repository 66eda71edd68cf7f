"""What can go wrong on the host's side, in words for the person at the tab."""

from __future__ import annotations


class UnsupportedModelError(ValueError):
    """A model, or a state of the host, that this version can't train on."""


class InterruptedByUserError(RuntimeError):
    """The person pressed Interrupt. Nothing was kept, and nothing is changed."""


class ModelChangedError(RuntimeError):
    """Another model was put in place of the one that is trained on."""
