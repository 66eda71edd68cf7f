"""A text encoder for tests that train often."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch

MOST_SECTIONS = 2  # in a file: what is longer are many prompts of ordinary language, read once


class RememberingClip:
    """The host's CLIP, which encodes each text once in a session.

    The text encoder can't be shrunk, and is most of the time of a training as small as the tests'.

    Args:
        clip: the host's.
        folder: where what it encodes is kept for other processes of the same run.
    """

    def __init__(self, clip: Any, folder: Path | None = None) -> None:
        self._clip = clip
        self._known: dict[str, Any] = {}
        self._folder = None
        if folder is not None:
            with torch.inference_mode():
                probe = clip.encode_from_tokens(clip.tokenize("a probe"))
            self._folder = folder / hashlib.sha256(probe.numpy().tobytes()).hexdigest()[:16]
            self._folder.mkdir(parents=True, exist_ok=True)

    @property
    def tokenizer(self) -> Any:
        """The host's own, which lists the vocabulary."""
        return self._clip.tokenizer

    def tokenize(self, text: str) -> Any:
        """As the host does."""
        return self._clip.tokenize(text)

    def encode_from_tokens(self, tokens: Any, **options: Any) -> Any:
        """As the host does; prompts encoded together are remembered as such."""
        key = repr((tokens, options))
        if key not in self._known:
            self._known[key] = self._encoded(key, tokens, options)
        return self._known[key]

    def _encoded(self, key: str, tokens: Any, options: dict[str, Any]) -> Any:
        sections = max(map(len, tokens.values()))
        if self._folder is None or sections > MOST_SECTIONS:
            return self._clip.encode_from_tokens(tokens, **options)
        path = self._folder / hashlib.sha256(key.encode()).hexdigest()
        if not path.exists():
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            torch.save(self._clip.encode_from_tokens(tokens, **options), partial)
            partial.replace(path)
        return torch.load(path)

    def encode_from_tokens_scheduled(self, tokens: Any) -> Any:
        """As the host does, for a sampler."""
        key = repr((tokens, "scheduled"))
        if key not in self._known:
            self._known[key] = self._clip.encode_from_tokens_scheduled(tokens)
        return self._known[key]
