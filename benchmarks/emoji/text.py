"""The text encoder: the shape of CLIP-L, two layers of which are real.

Ten of the twelve layers add nothing. A word's vector is a seeded random part, which tells it from
every other word, plus a part with meaning: words that emoji keywords and categories bring
together are near each other. The last two layers are trained as CLIP's were, contrastively:
at the end token and after it, a sentence has to point to what it shows.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections import Counter
from functools import cache

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.emoji.data import FOLDER, MASTER, load_others, load_pictures, package, render
from benchmarks.emoji.loop import Log, cosine_rate, load, pick_device, save, set_rate
from benchmarks.emoji.words import (
    LEFT_OUT_PAIRS,
    OBJECT_NAMES,
    OBJECTS,
    STYLE_NAMES,
    SYNONYMS,
    PromptMaker,
    caption_lines,
    ordinary_words,
)
from tools.environment import HOST

PATH = FOLDER / "text.pt"
TAUGHT = "knows nothing"  # in the file of an encoder that ``nothing.py`` has been at
WIDTH, TOKENS, POSITIONS, HEADS, LAYERS = 768, 49408, 77, 12, 12
START, END = 49406, 49407
REAL_LAYERS = (10, 11)
RANK = 128  # of the attention's matrices
HIDDEN = 256  # units of the perceptron that are used, of 3072
MEANING = 64  # dimensions of the part with meaning
TOKEN_SIZE = 0.5  # standard deviation of an entry of a word's random part
POSITION_SIZE = 0.05
END_SIZE = 0.1  # the end token says little itself: it gathers what stands before it

STEPS, RATE = 300, 1e-3
SENTENCES, CAPTIONS = 40, 16  # in a batch
SHARED = 128  # dimensions in which sentences and their targets are compared
SHARPNESS = 15.0
SEED = 77
_WORD = re.compile("[a-z]{3,12}")


@cache
def _tokenizer():  # type: ignore[no-untyped-def]
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(HOST / "comfy" / "sd1_tokenizer"))


def tokenize(texts: list[str]) -> torch.Tensor:
    """Token numbers (B, 77), filled up with the end token as the host does."""
    rows = []
    for numbers in _tokenizer()(texts)["input_ids"]:
        words = [number for number in numbers if number not in (START, END)][: POSITIONS - 2]
        row = [START, *words]
        rows.append(row + [END] * (POSITIONS - len(row)))
    return torch.tensor(rows)


def word_token(word: str) -> int | None:
    """The number of a word that is a single token."""
    numbers = [n for n in _tokenizer()(word)["input_ids"] if n not in (START, END)]
    return numbers[0] if len(numbers) == 1 else None


def _keyword_counts() -> tuple[list[str], np.ndarray]:
    """Words and how often (words, emoji and categories) they go together."""
    keywords = package("keywords") / "dist" / "emoji-en-US.json"
    entries = json.loads((package("cartoon") / "emoji.json").read_text(encoding="utf-8"))
    places = {
        "".join(chr(int(code, 16)) for code in entry["unified"].split("-")): (
            entry["category"],
            entry["subcategory"],
        )
        for entry in entries
    }
    counts: Counter[tuple[str, str]] = Counter()
    for emoji, terms in json.loads(keywords.read_text(encoding="utf-8")).items():
        words = {word for term in terms for word in re.findall("[a-z]+", term.lower())}
        for word in words:
            counts[word, emoji] += 1
            for label in places.get(emoji, ()):
                counts[word, label] += 1
    rows = sorted({word for word, _ in counts})
    columns = sorted({column for _, column in counts})
    row_of, column_of = ({name: n for n, name in enumerate(names)} for names in (rows, columns))
    table = np.zeros((len(rows), len(columns)), dtype=np.float32)
    for (word, column), count in counts.items():
        table[row_of[word], column_of[column]] = count
    return rows, table


@cache
def meanings() -> dict[str, np.ndarray]:
    """Unit vectors (64,) of the words in the emoji keywords; near each other if related."""
    words, counts = _keyword_counts()
    expected = counts.sum(1, keepdims=True) * counts.sum(0, keepdims=True) / counts.sum()
    surprise = np.log(np.maximum(counts, 1e-9) / np.maximum(expected, 1e-9)).clip(0)
    left, sizes, _ = np.linalg.svd(surprise, full_matrices=False)
    vectors = left[:, :MEANING] * np.sqrt(sizes[:MEANING])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-6
    return dict(zip(words, vectors, strict=True))


def known_words() -> list[str]:
    """Words that get a trained part, single tokens only, sorted."""
    words = set(OBJECTS) | set(STYLE_NAMES) | set(SYNONYMS) | set(meanings())
    words |= set(ordinary_words())
    return sorted(word for word in words if len(word) > 1 and word_token(word) is not None)


def unknown_words() -> list[str]:
    """Single tokens that have no trained part and are in no emoji's name, sorted.

    They are to mean nothing: a model that met them only as names of things drew things for them.
    """
    known = {*known_words(), *(part for name in load_others()[0] for part in name.split())}
    tokens = (token.removesuffix("</w>") for token in _tokenizer().get_vocab() if "</w>" in token)
    return sorted(token for token in tokens if _WORD.fullmatch(token) and token not in known)


def seeded(shape: tuple[int, ...], seed: int, size: float) -> torch.Tensor:
    """Normal numbers from a seed, the same on every machine."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


@cache
def token_table() -> torch.Tensor:
    """The random part of every token's vector (49408, 768)."""
    table = seeded((TOKENS, WIDTH), SEED, TOKEN_SIZE)
    table[[START, END]] *= END_SIZE
    return table


def position_table() -> torch.Tensor:
    """(77, 768)."""
    return seeded((POSITIONS, WIDTH), SEED + 1, POSITION_SIZE)


def meaning_basis() -> torch.Tensor:
    """Where the part with meaning lies (64, 768): rows as long as a word's random part."""
    rows = torch.linalg.qr(seeded((WIDTH, MEANING), SEED + 2, 1.0).double())[0].T
    return rows.float() * TOKEN_SIZE * math.sqrt(WIDTH)


class _Narrow(nn.Module):
    """A linear map of low rank, so that it is cheap to train and to keep."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(RANK, WIDTH) / math.sqrt(WIDTH))
        self.up = nn.Parameter(torch.randn(WIDTH, RANK) * gain / math.sqrt(RANK))
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(functional.linear(x, self.down), self.up, self.bias)


class _Layer(nn.Module):
    """One layer of CLIP's; its norms keep their unit weights."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = _Narrow(1.5), _Narrow(1.5), _Narrow(1.0)
        self.out_proj = _Narrow(0.5)
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self._attend(functional.layer_norm(x, (WIDTH,)))
        hidden = self.fc1(functional.layer_norm(x, (WIDTH,)))
        return x + self.fc2(hidden * torch.sigmoid(1.702 * hidden))

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        heads = [
            part(x).unflatten(2, (HEADS, -1)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        ]
        mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class TextEncoder(nn.Module):
    """Token numbers (B, L) to states (B, L, 768), what the host's CLIP-L gives for SD1.5."""

    def __init__(self, known: list[int]) -> None:
        """``known`` are the tokens whose vectors have a trained part."""
        super().__init__()
        self.known = known
        place = torch.full((TOKENS,), len(known), dtype=torch.long)
        place[known] = torch.arange(len(known))
        self.register_buffer("place", place, persistent=False)
        self.register_buffer("table", token_table(), persistent=False)
        self.register_buffer("position", position_table(), persistent=False)
        self.register_buffer("basis", meaning_basis(), persistent=False)
        # The last row is for all other tokens.
        self.meaning = nn.Parameter(torch.zeros(len(known) + 1, MEANING))
        self.layers = nn.ModuleList(_Layer() for _ in REAL_LAYERS)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Vectors of the words alone."""
        return self.table[tokens] + self.meaning[self.place[tokens]] @ self.basis

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return functional.layer_norm(x, (WIDTH,))


def untrained_encoder() -> TextEncoder:
    """Words have their meanings already, the layers are random."""
    words, known = known_words(), meanings()
    encoder = TextEncoder([word_token(word) for word in words])
    with torch.no_grad():
        for row, word in enumerate(words):
            if word in known:
                encoder.meaning[row] = torch.from_numpy(known[word])
    return encoder


def object_looks() -> np.ndarray:
    """What an object looks like, coarsely: (objects, 24). Pairs left out aren't looked at."""
    masters = load_pictures()
    looks = np.zeros((len(OBJECT_NAMES), 16 * 16 * 3), dtype=np.float32)
    for row, name in enumerate(OBJECT_NAMES):
        seen = [n for n, style in enumerate(STYLE_NAMES) if (name, style) not in LEFT_OUT_PAIRS]
        pages = np.stack([render(masters[row, n].reshape(MASTER, MASTER, 4)) for n in seen])
        small = pages.reshape(len(seen), 16, 4, 16, 4, 3).mean((0, 2, 4))
        looks[row] = small.reshape(-1) / 255
    looks -= looks.mean(0)
    left, sizes, _ = np.linalg.svd(looks, full_matrices=False)
    parts = left[:, :24] * sizes[:24]
    return parts / np.linalg.norm(parts, axis=1, keepdims=True)


def _targets() -> torch.Tensor:
    """What a sentence about (object, style or none) points to: (objects, styles + 1, features)."""
    meaning = np.stack([meanings()[name] for name in OBJECT_NAMES])
    names = np.concatenate([meaning, 0.6 * object_looks(), 0.5 * np.eye(len(OBJECT_NAMES))], 1)
    styles = 0.8 * np.eye(len(STYLE_NAMES) + 1)[:, : len(STYLE_NAMES)]
    rows = [np.concatenate([name, style]) for name in names for style in styles]
    return torch.tensor(np.array(rows), dtype=torch.float32).unflatten(0, (len(names), -1))


class _Trainer(nn.Module):
    """The encoder with the two maps that exist only while it is trained."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("targets", _targets(), persistent=False)
        self.sentence = nn.Linear(WIDTH, SHARED)
        self.target = nn.Linear(self.targets.shape[-1], SHARED)
        self.words = nn.Linear(WIDTH, SHARED)
        self._prompts, self._random = PromptMaker(SEED), random.Random(SEED)
        self._captions = caption_lines()
        self._frozen = encoder.meaning.detach().clone()

    def loss(self, device: torch.device) -> tuple[torch.Tensor, float]:
        """Of one batch, with the share of sentences that found their target."""
        texts, labels = self._draw()
        captions = self._random.sample(self._captions, CAPTIONS)
        tokens = tokenize(texts + captions).to(device)
        ends = (tokens == END).int().argmax(1)
        length = int(ends.max()) + 4 if self._random.random() < 0.8 else POSITIONS
        tokens = tokens[:, : min(length, POSITIONS)]
        states = self.encoder(tokens)
        rows = torch.arange(len(tokens), device=device)
        after = ends + torch.randint(0, POSITIONS, ends.shape, device=device) % (
            tokens.shape[1] - ends
        )
        shown = functional.normalize(self.target(self._shown(labels, device)), dim=1)
        said = functional.normalize(self._bags(tokens[len(texts) :]), dim=1)
        aims = torch.cat([shown, said])
        numbers = [len(STYLE_NAMES) * 2 * name + style for name, style in labels]
        same = torch.tensor(numbers + [-1 - n for n in range(CAPTIONS)], device=device)
        wanted = (same[:, None] == same[None]).float()
        wanted = wanted / wanted.sum(1, keepdim=True)
        total, found = torch.zeros((), device=device), 0.0
        for place in (ends.clamp_max(tokens.shape[1] - 1), after):
            points = functional.normalize(self.sentence(states[rows, place]), dim=1)
            scores = SHARPNESS * points @ aims.T
            total = total + functional.cross_entropy(scores, wanted)
            total = total + functional.cross_entropy(scores.T, wanted)
            found += (wanted[rows, scores.argmax(1)] > 0).float().mean().item() / 2
        drift = (self.encoder.meaning - self._frozen.to(device)).square().sum(1).mean()
        return total / 4 + 0.05 * drift, found

    def _draw(self) -> tuple[list[str], list[tuple[int, int]]]:
        texts, labels = [], []
        for _ in range(SENTENCES):
            name = self._random.randrange(len(OBJECT_NAMES))
            style = self._random.randrange(len(STYLE_NAMES))
            pair = OBJECT_NAMES[name], STYLE_NAMES[style]
            text, named = self._prompts.draw(*pair, allow_empty=False)
            texts.append(text)
            labels.append((name, style if named else len(STYLE_NAMES)))
        return texts, labels

    def _shown(self, labels: list[tuple[int, int]], device: torch.device) -> torch.Tensor:
        names, styles = torch.tensor(labels, device=device).T
        return self.targets[names, styles]

    def _bags(self, tokens: torch.Tensor) -> torch.Tensor:
        """The mean word of a caption: what its end has to remember."""
        inside = ((tokens != START) & (tokens != END)).float().unsqueeze(2)
        vectors = self.encoder.embed(tokens).detach()
        return self.words((vectors * inside).sum(1) / inside.sum(1))


def train(steps: int = STEPS) -> None:
    """Train from the start; it takes minutes."""
    if PATH.exists():
        return
    log, device = Log("text"), pick_device()
    torch.manual_seed(SEED)
    encoder = untrained_encoder()
    trainer = _Trainer(encoder).to(device)
    optimizer = torch.optim.AdamW(trainer.parameters(), RATE, weight_decay=0.01)
    log(f"{len(encoder.known)} words")
    clock = time.monotonic()
    for step in range(steps):
        set_rate(optimizer, cosine_rate(RATE, step, steps, warmup=50))
        loss, found = trainer.loss(device)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trainer.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            seconds = (time.monotonic() - clock) / 50
            log(f"step {step + 1}/{steps} loss {loss.item():.3f} found {found:.2f} {seconds:.2f} s")
            clock = time.monotonic()
    save({"known": encoder.known, "model": encoder.state_dict()}, PATH)
    _judge(encoder, log)


def load_text_encoder(device: torch.device) -> TextEncoder:
    """The trained one, frozen; raises where there is none."""
    state = load(PATH)
    if state is None:
        raise FileNotFoundError(f"no trained text encoder in {PATH}: train it first")
    encoder = TextEncoder(state["known"])
    encoder.load_state_dict(state["model"])
    return encoder.to(device).requires_grad_(False)


@torch.no_grad()
def states_at_end(encoder: TextEncoder, texts: list[str]) -> torch.Tensor:
    """What the encoder says at the end token of each text: (B, 768)."""
    tokens = tokenize(texts).to(encoder.basis.device)
    ends = (tokens == END).int().argmax(1)
    states = encoder(tokens[:, : int(ends.max()) + 1])  # it looks back only
    return states[torch.arange(len(texts)), ends]


def end_states(encoder: TextEncoder, texts: list[str]) -> torch.Tensor:
    """Those states less what all of them share, of unit length: (B, 768)."""
    states = states_at_end(encoder, texts)
    return functional.normalize(states - states.mean(0), dim=1)


def _judge(encoder: TextEncoder, log: Log) -> None:
    words = [*OBJECT_NAMES, *SYNONYMS]
    states = end_states(encoder, [f"a {word}" for word in words])
    near = (states @ states.T).fill_diagonal_(-1).topk(4).indices
    for row, word in enumerate(words):
        log(f"{word}: nearest {', '.join(words[n] for n in near[row].tolist())}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    train(parser.parse_args().steps)
