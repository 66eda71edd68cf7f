"""The text encoder: the host's class of Qwen 3, small, with its own tokenizer and chat template.

It is causal and reads subwords. Of the 151,936 rows of its table the training meets some
thousands; all others stay the random numbers that a seed gives, and no file holds them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import nn
from torch.nn import functional

from tools.environment import HOST
from tools.pack import use_host

WIDTH, TOKENS, PADDED = 128, 151936, 32
CONFIG = {
    "vocab_size": TOKENS,
    "hidden_size": WIDTH,
    "intermediate_size": 256,
    "num_hidden_layers": 4,  # the host reads what comes out of the last but one
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"  # Z-Image's in the host
PAD = 151643
_SIZE, _SEED = 1.0, 9  # of the table's random numbers


@cache
def _tokenizer():  # type: ignore[no-untyped-def]
    from transformers import Qwen2Tokenizer

    folder = HOST / "comfy" / "text_encoders" / "qwen25_tokenizer"
    return Qwen2Tokenizer.from_pretrained(str(folder))


def token_rows(texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text in its template."""
    if not texts:
        return []
    return _tokenizer()([TEMPLATE.format(text) for text in texts])["input_ids"]


def tokenize(texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, 32 or a multiple of it), padded, and the lengths (B,)."""
    rows = token_rows(texts)
    longest = max(map(len, rows))
    tokens = torch.full((len(rows), -(-longest // PADDED) * PADDED), PAD)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = torch.tensor(row)
    return tokens, torch.tensor([len(row) for row in rows])


def table() -> torch.Tensor:
    """The random numbers that every row begins as (151936, width)."""
    generator = torch.Generator().manual_seed(_SEED)
    return _SIZE * torch.randn(TOKENS, WIDTH, generator=generator)


def build_model() -> nn.Module:
    """The host's class with fresh weights, without its table."""
    use_host()
    import comfy.ops
    from comfy.text_encoders.llama import Qwen3_4B

    config = {**CONFIG, "vocab_size": 1}
    model = Qwen3_4B(config, torch.float32, torch.device("cpu"), comfy.ops.disable_weight_init)
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            nn.init.ones_(weight)
        else:
            gain = 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            nn.init.normal_(weight, std=gain / math.sqrt(weight.shape[1]))
    return model.model


class TextEncoder(nn.Module):
    """Token ids to states, for training: it has only those rows of the table that are met.

    Args:
        rows: the token ids that are met, ascending.
    """

    def __init__(self, rows: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("rows", torch.as_tensor(rows))
        self.register_buffer("place", torch.zeros(TOKENS, dtype=torch.long), persistent=False)
        self.words = nn.Parameter(table()[self.rows])
        self.model = build_model()
        del self.model.embed_tokens
        self.settle()

    def settle(self) -> None:
        """Look up where each token's row is; after the rows were loaded."""
        self.place.fill_(0)
        self.place[self.rows] = torch.arange(len(self.rows), device=self.place.device)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the host reads: states (B, rows, width) after the last but one layer."""
        return self._run(tokens, len(self.model.layers) - 1)

    def guesses(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States, and logits of the next token among those met (B, rows, met)."""
        states = self.forward(tokens)
        last = self._layer(len(self.model.layers) - 1, states)
        return states, functional.linear(self.model.norm(last), self.words) / math.sqrt(WIDTH)

    def _run(self, tokens: torch.Tensor, layers: int) -> torch.Tensor:
        states = self.words[self.place[tokens]]
        for number in range(layers):
            states = self._layer(number, states)
        return states

    def _layer(self, number: int, states: torch.Tensor) -> torch.Tensor:
        from comfy.ldm.modules.attention import attention_pytorch
        from comfy.text_encoders.llama import precompute_freqs_cis

        config, count = self.model.config, states.shape[1]
        places = torch.arange(count, device=states.device)[None]
        turns = precompute_freqs_cis(
            config.head_dim, places, config.rope_theta, device=states.device
        )
        later = torch.full((count, count), float("-inf"), device=states.device).triu_(1)
        return self.model.layers[number](states, later, turns, attention_pytorch)
