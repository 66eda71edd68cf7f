"""The words among the tokens that a tokenizer lists."""

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
    """The words that are one token each, in lower case and in order of token id.

    In most tokenizers that is roughly from frequent to rare. Frequent beginnings and endings of
    words ("inter", "tion") can't be told from words and are among them.

    Args:
        tokens: texts, or bytes of texts, by id; what is neither is passed over.
    """
    for form in (_MARKED, _PLAIN):
        found = {}
        for number, token in tokens.items():
            text = token.decode("utf-8", "replace") if isinstance(token, bytes) else token
            match = form.fullmatch(text) if isinstance(text, str) else None
            if match:
                found[number] = next(filter(None, match.groups()))
        if found:
            return list(dict.fromkeys(found[number] for number in sorted(found)))
    return []
