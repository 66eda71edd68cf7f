"""A text encoder for tests that train often."""

from __future__ import annotations

from typing import Any


class RememberingClip:
    """The host's CLIP, which encodes each text once in a session.

    The text encoder can't be shrunk, and is most of the time of a training as small as the tests'.
    """

    def __init__(self, clip: Any) -> None:
        self._clip = clip
        self._known: dict[str, Any] = {}

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
            self._known[key] = self._clip.encode_from_tokens(tokens, **options)
        return self._known[key]

    def encode_from_tokens_scheduled(self, tokens: Any) -> Any:
        """As the host does, for a sampler."""
        key = repr((tokens, "scheduled"))
        if key not in self._known:
            self._known[key] = self._clip.encode_from_tokens_scheduled(tokens)
        return self._known[key]
