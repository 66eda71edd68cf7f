"""Which of a text encoder's tokens are words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# What a tokenizer writes beside a token that begins or ends a word: sentencepiece, BPE of bytes,
# maps of plain bytes (a space), and CLIP's. Tokens with capitals drop out: in lower case they are
# tokens of their own or several, and some are names in code.
_MARKED = re.compile(r"[▁Ġ ]([a-z]{3,})|([a-z]{3,})</w>")
# Without such marks, as in WordPiece, a token is a word unless it begins with "##".
_PLAIN = re.compile(r"([a-z]{3,})")


def words_among(tokens: Mapping[int, Any]) -> list[str]:
    """The words among a text encoder's tokens, in lower case, in the order of their ids.

    Frequent beginnings and endings of words ("inter", "tion") can't be told from words and are
    among them.

    Args:
        tokens: text or bytes by id, as the tokenizer keeps them.
    """
    return list(numbered_words(tokens))


def numbered_words(tokens: Mapping[int, Any]) -> dict[str, int]:
    """The words among a text encoder's tokens, in lower case, in the order of their ids.

    Frequent beginnings and endings of words ("inter", "tion") can't be told from words and are
    among them.

    Args:
        tokens: text or bytes by id, as the tokenizer keeps them.
    """
    for form in (_MARKED, _PLAIN):
        found = {}
        for number, token in tokens.items():
            text = token.decode("utf-8", "replace") if isinstance(token, bytes) else token
            match = form.fullmatch(text) if isinstance(text, str) else None
            if match:
                found[number] = next(filter(None, match.groups()))
        if found:
            numbered: dict[str, int] = {}
            for number in sorted(found):
                numbered.setdefault(found[number], number)
            return numbered
    return {}
