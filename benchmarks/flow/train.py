"""Makes the model from nothing: ``python -m benchmarks.flow.train``.

The text encoder first, by itself: it guesses the next token and, behind the prompt, what the prompt
names. Then both together, by the loss of the flow. Everything lies in ``build/flow``; a training
that was stopped goes on from its last snapshot. Some hours on one core, minutes on a GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.emoji.loop import Average, load, save, set_rate
from benchmarks.emoji.words import NOTHING
from benchmarks.flow.network import Network
from benchmarks.flow.text import PADDED, WIDTH, TextEncoder, token_rows
from benchmarks.flow.words import FOLDER, THING_NAMES, Log, extra_words, prompt_maker
from benchmarks.icons.data import SIZE, empty_page, training_pictures
from benchmarks.icons.latents import CHANNELS, SIDE, fitted_patches
from benchmarks.icons.words import GROUPS, STYLE_NAMES, vocabulary
from tools.pack import use_host

STATE, AVERAGE, PROMPTS, TEXT, LATENTS = (
    FOLDER / name for name in ("state.pt", "average.pt", "prompts.pt", "text.pt", "latents.pt")
)
VARIANTS, PROMPTS_EACH, PROMPTS_OF_NOTHING = 1, 120, 4000
SHARE_NOTHING = 0.1
TEXT_STEPS, TEXT_BATCH, TEXT_RATE = 120, 32, 3e-3
BATCH, RATE, OF_TEXT = 16, 2e-3, 0.1
WARMUP, FALLING, DECAY, WEIGHT_DECAY = 40, 0.3, 0.99, 0.01
REPORT, SNAPSHOT = 25, 50
SHIFT = 2.0  # of the noise levels: between even ones and those of the sampler
_PAIRS = [(name, style) for name in THING_NAMES for style in STYLE_NAMES]
_KINDS = (*GROUPS, NOTHING)
_NO_LABEL = -100


def prompt_bank() -> dict[str, torch.Tensor]:
    """Token ids of prompts for each pair, then for an empty page; with their lengths.

    ``tokens`` (pairs x each + of nothing, 32), ``lengths``, ``styled`` whether the style is named,
    ``empty`` whether there are no words at all, ``rows``: the token ids that are ever met.
    """
    kept = load(PROMPTS)
    if kept is None:
        maker = prompt_maker(1)
        texts = [_short(maker.draw, *pair) for pair in _PAIRS for _ in range(PROMPTS_EACH)]
        texts += [_short(maker.draw_nothing) for _ in range(PROMPTS_OF_NOTHING)]
        rows = token_rows(texts)
        tokens = torch.full((len(rows), PADDED), rows[0][0])
        for padded, row in zip(tokens, rows, strict=True):
            padded[: len(row)] = torch.tensor(row)
        named = [any(f" {style}" in f" {text}" for style in STYLE_NAMES) for text in texts]
        met = {number for row in token_rows([*vocabulary(), *extra_words()]) for number in row}
        met |= {number for row in token_rows([f"a {w}" for w in vocabulary()]) for number in row}
        met |= set(tokens.unique().tolist())
        kept = {
            "tokens": tokens,
            "lengths": torch.tensor([len(row) for row in rows]),
            "styled": torch.tensor(named),
            "empty": torch.tensor([not text for text in texts]),
            "rows": torch.tensor(sorted(met)),
        }
        save(kept, PROMPTS)
    return kept


def _short(draw: Callable[..., str], *named: str) -> str:
    """A text that fits into 32 rows with its template."""
    while True:
        text = draw(*named)
        if len(token_rows([text])[0]) <= PADDED:
            return text


def latent_bank() -> torch.Tensor:
    """Latents of the pictures (pairs, variants, 16, 16, 16), the empty page's as the last row."""
    kept = load(LATENTS)
    if kept is None:
        patches = fitted_patches()
        pages = training_pictures(VARIANTS, seed=3)[: len(THING_NAMES)]
        flat = patches.encoded(pages.reshape(-1, SIZE, SIZE, 3))
        empty = patches.encoded(empty_page()[None]).expand(VARIANTS, -1, -1, -1)[None]
        bank = torch.cat([flat.reshape(-1, VARIANTS, CHANNELS, SIDE, SIDE), empty])
        kept = {"latents": bank, "patches": patches.state_dict()}
        save(kept, LATENTS)
    return kept["latents"]


class Batches:
    """Draws numbers of prompts and of the pictures that go with them."""

    def __init__(self, bank: dict[str, torch.Tensor], device: torch.device) -> None:
        self._pairs = len(_PAIRS) * PROMPTS_EACH
        self.tokens, self.lengths = bank["tokens"].to(device), bank["lengths"].to(device)
        count = torch.arange(len(self.tokens))
        self.pair = (count // PROMPTS_EACH).clamp(max=len(_PAIRS)).to(device)
        things = self.pair // len(STYLE_NAMES)  # those of nothing are one more thing
        none = bank["empty"].to(device)
        self.thing = things.masked_fill(none, _NO_LABEL)
        of_kind = [kind for kind, names in enumerate(GROUPS.values()) for _ in names]
        kinds = torch.tensor([*of_kind[: len(THING_NAMES)], len(GROUPS)]).to(device)
        self.kind = kinds[things].masked_fill(none, _NO_LABEL)
        styles = self.pair % len(STYLE_NAMES)
        unsaid = ~bank["styled"].to(device) | (self.pair == len(_PAIRS))
        self.style = styles.masked_fill(unsaid, len(STYLE_NAMES)).masked_fill(none, _NO_LABEL)
        self._device = device

    def draw(self, size: int) -> torch.Tensor:
        """Numbers of prompts (size,)."""
        nothing = torch.rand(size, device=self._device) < SHARE_NOTHING
        low = torch.where(nothing, self._pairs, 0)
        many = torch.where(nothing, len(self.tokens) - self._pairs, self._pairs)
        return low + (torch.rand(size, device=self._device) * many).long()


def train_text(encoder: TextEncoder, batches: Batches, log: Log, steps: int) -> None:
    """Let the text encoder guess next tokens, and tell behind the prompt what is named."""
    device = batches.tokens.device
    counts = (len(THING_NAMES) + 1, len(_KINDS), len(STYLE_NAMES) + 1)
    heads = nn.ModuleList(nn.Linear(WIDTH, count) for count in counts).to(device)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=TEXT_RATE)
    for step in range(steps):
        set_rate(optimizer, TEXT_RATE * min(1, (step + 1) / 30, 3 * (1 - step / steps)))
        at = batches.draw(TEXT_BATCH)
        tokens, lengths = batches.tokens[at], batches.lengths[at]
        states, guesses = encoder.guesses(tokens)
        inside = torch.arange(1, PADDED, device=device) < lengths[:, None]
        wanted = encoder.place[tokens[:, 1:]].masked_fill(~inside, _NO_LABEL)
        losses = [functional.cross_entropy(guesses[:, :-1].flatten(0, 1), wanted.flatten())]
        behind = states[torch.arange(len(at), device=device), lengths - 1]
        labels = (batches.thing[at], batches.kind[at], batches.style[at])
        losses += [
            functional.cross_entropy(head(behind), label)
            for head, label in zip(heads, labels, strict=True)
        ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % REPORT == 0:
            log(f"text {step + 1} {' '.join(f'{loss.item():.3f}' for loss in losses)}")


def _loss(network: Network, clean: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor):  # type: ignore[no-untyped-def]
    count, device = len(clean), clean.device
    # One level from each of B equal parts: less chance in the gradient.
    even = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
    level = SHIFT * even / (1 + (SHIFT - 1) * even)
    noise, s = torch.randn_like(clean), level.view(-1, 1, 1, 1)
    noisy = (1 - s) * clean + s * noise
    found = network.velocity(noisy, level, network.entering(tokens, lengths))
    return (found - (noise - clean)).square().mean()


def _turned(
    queries: torch.Tensor, keys: torch.Tensor, turns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The host's rotary embedding in complex numbers: a seventh of a step less on a CPU."""
    turn = torch.complex(turns[..., 0, 0].contiguous(), turns[..., 1, 0].contiguous())

    def turned(rows: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(rows.reshape(*rows.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn).flatten(-2)

    return turned(queries), turned(keys)


def _optimizer(network: Network, rate: float) -> torch.optim.Optimizer:
    """Weights of the text encoder learn slowly; the last of its layers isn't read."""
    text = [p for name, p in network.text.named_parameters() if ".3." not in name]
    groups = [
        {"params": list(network.transformer.parameters()), "share": 1.0},
        {"params": text, "share": OF_TEXT},
    ]
    betas = (0.9, 0.98)
    return torch.optim.AdamW(groups, lr=rate, betas=betas, weight_decay=WEIGHT_DECAY, fused=True)


def train(steps: int, batch: int, rate: float, minutes: float | None, device: torch.device) -> None:
    """Go on from the last snapshot, or begin.

    Args:
        steps: of the whole training.
        batch: pictures in a step.
        rate: the learning rate, falling at the end.
        minutes: stop after so many from now, if sooner; then the rate falls towards that.
        device: where.
    """
    use_host()
    from comfy.ldm.lumina import model as lumina

    log, bank, latents = Log("train"), prompt_bank(), latent_bank().to(device)
    batches, network = Batches(bank, device), Network(bank["rows"]).to(device)
    state, known = load(STATE), load(TEXT)
    if known is None and state is None:
        train_text(network.text, batches, log, TEXT_STEPS)
        save(network.text.state_dict(), TEXT)
    elif known is not None:
        network.text.load_state_dict(known)
    network.patches.load_state_dict(load(LATENTS)["patches"])  # type: ignore[index]
    optimizer, average, first = _optimizer(network, rate), Average(network, DECAY), 0
    if state is not None:
        network.load_state_dict(state["network"])
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
        average.values, first = state["average"], state["step"]
    lumina.apply_rope = _turned
    torch.manual_seed(5 + first)
    begin = clock = time.monotonic()
    total = 0.0
    for step in range(first, steps):
        done = step / steps
        if minutes is not None:
            done = max(done, (time.monotonic() - begin) / (60 * minutes))
        if done >= 1:
            break
        now = rate * min(1.0, (step + 1) / WARMUP, max(0.02, (1 - done) / FALLING))
        for group in optimizer.param_groups:
            group["lr"] = now * group["share"]
        at = batches.draw(batch)
        variant = torch.randint(latents.shape[1], (batch,), device=device)
        clean = latents[batches.pair[at], variant]
        loss = _loss(network, clean, batches.tokens[at], batches.lengths[at])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        average.update(network, step)
        total += float(loss.detach())
        if (step + 1) % REPORT == 0:
            seconds = (time.monotonic() - clock) / REPORT
            log(f"step {step + 1} loss {total / REPORT:.4f} {seconds:.2f} s/step {done:.0%}")
            clock, total = time.monotonic(), 0.0
        if (step + 1) % SNAPSHOT == 0:
            wrong = (batches.tokens[at.roll(1)], batches.lengths[at.roll(1)])
            log(f"with each other's prompts {_loss(network, clean, *wrong).item():.4f}")
            _snapshot(step + 1, network, average, optimizer)
    _snapshot(step + 1, network, average, optimizer)


def _snapshot(
    step: int, network: Network, average: Average, optimizer: torch.optim.Optimizer
) -> None:
    kept = {"step": step, "average": average.values, "network": network.state_dict()}
    save({**kept, "optimizer": optimizer.state_dict()}, STATE)
    save({"step": step, "network": {**network.state_dict(), **average.values}}, AVERAGE)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--minutes", type=float, help="stop after so many, whatever the step")
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    if chosen.device == "cpu":
        torch.set_num_threads(1)
    np.random.seed(0)
    device = torch.device(chosen.device)
    train(chosen.steps, chosen.batch, chosen.rate, chosen.minutes, device)


if __name__ == "__main__":
    main()
