"""A toy denoiser: one cross-attention over a made-up text encoder. Fast, and honest arithmetic."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager

import torch
from concept_surgery.erase_core import Denoiser, Meter, erase
from concept_surgery.erase_core.files.fingerprint import fingerprint
from concept_surgery.erase_core.model.low_rank import LowRankSidePath
from concept_surgery.erase_core.model.prompt import Encoded, stack_tokens
from concept_surgery.erase_core.settings.layers import matching
from torch import nn

WIDTH, TOKENS, CHANNELS = 96, 12, 4


class ToyDenoiser(Denoiser):
    """Every word has a fixed random embedding."""

    family, identity, device = "SD1.x", "70" * 20, torch.device("cpu")
    dtype = torch.float32

    def __init__(self, layers: str = "key-value") -> None:
        torch.manual_seed(0)
        self.key, self.value = nn.Linear(WIDTH, 16, bias=False), nn.Linear(WIDTH, 16, bias=False)
        self.query, self.out = nn.Linear(CHANNELS, 16), nn.Linear(16, CHANNELS)
        for module in (self.key, self.value, self.query, self.out):
            module.requires_grad_(False)
        linear = {
            "toy_attn2_to_k": self.key,
            "toy_attn2_to_v": self.value,
            "toy_attn2_to_q": self.query,
            "toy_attn2_to_out": self.out,
        }
        self._trained = {name: linear[name] for name in matching(linear, layers)}
        self.names = self._trained.keys()
        self._side_path = LowRankSidePath(self._trained)
        self.base = {"name": "toy", "fingerprint": fingerprint(self.matrices())}
        self.calls = 0
        self.free = 10**9
        self._run = None

    def token_ids(self, prompts):
        ids = []
        for prompt in prompts:
            words = [3 + int(hashlib.md5(w.encode()).hexdigest()[:6], 16) for w in prompt.split()]
            ids.append(([0, *words[: TOKENS - 2]] + [1] * TOKENS)[:TOKENS])
        return ids

    def encode(self, prompts, together=False):
        return [Encoded(self._embed(ids)) for ids in self.token_ids(prompts)]

    def _embed(self, ids):
        rows = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(i)) for i in ids]
        context = torch.stack(rows).cumsum(0) / torch.arange(1, len(ids) + 1).sqrt()[:, None]
        return torch.stack(rows) + 0.3 * context

    def latent_shape(self, resolution):
        return (CHANNELS, resolution // 8, resolution // 8)

    def sigmas(self, steps):
        return torch.cat([torch.linspace(10, 0.1, steps), torch.zeros(1)])

    def noisy_latent(self, noise, sigma):
        return noise * (1 + sigma**2) ** 0.5

    def loss_weight(self, sigma):
        return torch.ones_like(sigma)

    @contextmanager
    def around_blocks(self, run):
        before, self._run = self._run, run
        try:
            yield
        finally:
            self._run = before

    def weights(self):
        return [w for m in (self.key, self.value, self.query, self.out) for w in m.parameters()]

    def free_memory(self, wanted):
        return self.free

    def predict_x0(self, x, sigma, prompts, edit=None):
        tokens = stack_tokens(prompts)
        learning = edit is not None and torch.is_grad_enabled()
        cost = self._run.forward_equivalents if self._run else 3
        self.calls += x.shape[0] * (cost if learning else 1)
        scaled = x / (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt()
        pixels = scaled.flatten(2).transpose(1, 2)
        with self._side_path.active(edit):
            again = self._side_path.again()

            def run(block, *inputs):
                def whole(*inputs):
                    with again():
                        return block(*inputs)

                return self._run(whole, *inputs) if learning and self._run else whole(*inputs)

            eps = self.network(pixels, tokens, run).transpose(1, 2).reshape(x.shape)
        return x - sigma.view(-1, 1, 1, 1) * eps

    def network(self, pixels, tokens, run):
        return run(self.attention, pixels, tokens)

    def attention(self, pixels, tokens):
        keys, values = self.key(tokens), self.value(tokens)
        weights = (self.query(pixels) @ keys.transpose(1, 2)).softmax(dim=-1)
        return self.out(weights @ values)

    def matrices(self):
        return {name: layer.weight for name, layer in self._trained.items()}


def watched(settings, denoiser, should_stop=lambda: False, **more):
    """What a run reports, and the erasure that it gives in the end."""
    seen = []
    erasure = erase(settings, denoiser, meter=Meter(seen.append, should_stop), **more)
    return [*seen, erasure]
