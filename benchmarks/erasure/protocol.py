"""One run: train an erasure, draw every picture of its case, write the verdicts down."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from concept_surgery.erase_core.model.low_rank import LowRankEdit

from benchmarks.emoji.data import SIZE, load_pictures, render, training_pictures
from benchmarks.emoji.words import OBJECT_NAMES, STYLE_NAMES
from benchmarks.engine import ENGINE
from benchmarks.erasure import metrics
from benchmarks.erasure.cases import Case, Question
from benchmarks.erasure.judge import QUANTILE, VARIANTS, Judge, Verdicts
from benchmarks.erasure.methods import METHODS, Method
from benchmarks.erasure.painter import FOLDER, GUIDANCE, Painter, Recorder
from benchmarks.erasure.results import Cache, code_digest, digest

HERE = Path(__file__).parent
SOURCES = ("protocol.py", "painter.py", "judge.py")
DRIFT_STEPS = (50, 200, 400, 600, 800, 950)
DRIFT_PICTURES = 4
BARE_STEPS = 5
DENOISE = 0.7  # of img2img from a real picture


class Bench:
    """A model, its judge and its cache.

    Args:
        checkpoint: the model.
        cache: where results go.
        steps: sampler steps.
    """

    def __init__(self, checkpoint: Path, cache: Cache, steps: int = 20, fast: bool = True) -> None:
        self.painter, self.cache = Painter(checkpoint, steps, fast), cache
        # Now, since what runs is what was read now, whatever becomes of the files.
        self._code = code_digest(HERE / name for name in SOURCES)
        for method in METHODS.values():
            method_code(method.files, method.uses_engine)
        self._folder = FOLDER / self.painter.identity
        self.judge = Judge.of(self.painter.drawn_again, FOLDER)
        self._untouched: dict[tuple[str, int], tuple[np.ndarray, Verdicts]] = {}

    def of(self, case: Case, method: Method, seed: int) -> dict[str, Any]:
        """Everything that decides a result: model, question, method, protocol and code."""
        return {
            "model": self.painter.identity,
            "case": case.text,
            "kind": case.kind,
            "keep": list(case.keep),
            "method": method.name,
            "settings": dict(method.settings),
            "layers": method.layers,
            "seed": seed,
            "questions": digest([vars(question) for question in case.questions]),
            "protocol": {
                "steps": self.painter.steps,
                "fast": self.painter.fast,
                "guidance": GUIDANCE,
                "denoise": DENOISE,
                "quantile": QUANTILE,
                "variants": VARIANTS,
                "judge": self.judge.identity,
                "code": self._code,
            },
            "code": method_code(method.files, method.uses_engine),
        }

    def run(self, case: Case, method: Method, seed: int) -> dict[str, Any]:
        """The line of a run, from the cache where it is there."""
        of = self.of(case, method, seed)
        known = self.cache.get(of)
        if known is not None:
            return metrics.measured(known)
        edit, cost, notes = self.train(case, method, seed)
        began = time.process_time()
        groups = self.draw(case, edit, seed)
        drift = self.painter.null_drift(edit, self._real_latents(), DRIFT_STEPS)
        result = {
            "null_drift": dict(zip(map(str, DRIFT_STEPS), drift, strict=True)),
            "cost": cost,
            "notes": notes,
            "groups": {group: metrics.packed(verdicts) for group, verdicts in groups.items()},
            "drawing_seconds": time.process_time() - began,
        }
        return metrics.measured(self.cache.add(of, metrics.rounded(result)))

    def train(
        self, case: Case, method: Method, seed: int
    ) -> tuple[LowRankEdit, dict[str, float], dict[str, Any]]:
        """The edit of a method, what it cost, and what it says of itself."""
        with self.painter.denoiser(method.layers) as denoiser:
            bare = _bare_step_seconds(denoiser)
            denoiser.forward_equivalents, denoiser.encode_seconds = 0, 0.0
            began = time.process_time()
            outcome = method.train(denoiser, case, seed, method.settings)
            seconds = time.process_time() - began - denoiser.encode_seconds
            cost = {
                "forward_equivalents": denoiser.forward_equivalents,
                "seconds": seconds,
                "encode_seconds": denoiser.encode_seconds,
                "bare_step_seconds": bare,
                "bare_steps": seconds / bare,
            }
        return outcome.edit.to("cpu"), cost, dict(outcome.notes)

    def draw(self, case: Case, edit: LowRankEdit, seed: int) -> dict[str, dict[str, list]]:
        """Verdicts on every picture of a case, by group of questions."""
        plain_pages, plain = self.untouched(case, seed)
        pages = self.pictures(case, seed, edit)
        found = self.judge.judge(pages)
        changes = np.sqrt(np.mean((pages / 255.0 - plain_pages / 255.0) ** 2, (1, 2, 3)))
        groups: dict[str, dict[str, list]] = {}
        rows = (self._verdict(case, n, plain, found) for n in range(len(case.questions)))
        for question, row, change in zip(case.questions, rows, changes, strict=True):
            verdicts = groups.setdefault(question.group, {name: [] for name in [*row, "change"]})
            for name, value in [*row.items(), ("change", round(float(change), 3))]:
                verdicts[name].append(value)
        return groups

    def _verdict(self, case: Case, n: int, plain: Verdicts, found: Verdicts) -> dict[str, Any]:
        question, row = case.questions[n], {}
        for tail, verdicts in (("", found), ("_before", plain)):
            name, style = verdicts.names[n], verdicts.styles[n]
            row[f"name{tail}"] = name == question.name
            row[f"style{tail}"] = None if question.style is None else style == question.style
            distance = float(self.judge.distances(verdicts.features[n : n + 1])[0])
            row[f"distance{tail}"] = round(distance, 2)
            row[f"intact{tail}"] = distance <= self.judge.radius
            drawn = name if case.kind == "object" else style
            concept = None if question.concept is None else case.concepts[question.concept]
            row[f"gone{tail}"] = None if concept is None else drawn != concept.text
            named = concept is not None and concept.alternative
            row[f"replaced{tail}"] = drawn == concept.alternative if named else None
        return row

    def untouched(self, case: Case, seed: int) -> tuple[np.ndarray, Verdicts]:
        """The untouched model's pictures for a case, from the disk where they are there."""
        if (case.text, seed) not in self._untouched:
            asked = digest([vars(question) for question in case.questions])
            how = f"{self.painter.steps}{'-fast' if self.painter.fast else ''}"
            path = self._folder / f"untouched-{asked}-{seed}-{how}.npz"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                np.savez_compressed(path, pages=self.pictures(case, seed, None))
            pages = np.load(path)["pages"]
            self._untouched[case.text, seed] = pages, self.judge.judge(pages)
        return self._untouched[case.text, seed]

    def pictures(self, case: Case, seed: int, edit: LowRankEdit | None) -> np.ndarray:
        """Pictures uint8 (n, 64, 64, 3), one for each question; the same noise whatever edit."""
        noise = draw_noise(case.questions, seed, self.painter.model)
        pages = np.zeros((len(noise), SIZE, SIZE, 3), dtype=np.uint8)
        for started in (False, True):
            chosen = [n for n, q in enumerate(case.questions) if (q.start is not None) == started]
            asked = [case.questions[n] for n in chosen]
            more = (
                {"start": self.painter.encoded(_real(asked)), "denoise": DENOISE} if started else {}
            )
            texts = [[q.text for q in asked], [q.negative for q in asked]]
            pages[chosen] = self.painter.pages(
                self.painter.latents(*texts, noise[chosen], edit, **more)
            )
        return pages

    def _real_latents(self) -> torch.Tensor:
        pages = training_pictures(1, seed=12).reshape(-1, SIZE, SIZE, 3)
        chosen = pages[:: len(pages) // DRIFT_PICTURES][:DRIFT_PICTURES]
        return self.painter.encoded(chosen)


def draw_noise(questions: tuple[Question, ...], seed: int, model: Any) -> torch.Tensor:
    """Noise (n, 4, 8, 8), its own for each question and seed."""
    channels = model.model.latent_format.latent_channels
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(len(questions), channels, SIZE // 8, SIZE // 8, generator=generator)


def _real(questions: Sequence[Question]) -> np.ndarray:
    """The real pictures that questions start from, uint8 (n, 64, 64, 3)."""
    masters = load_pictures()
    starts = [question.start for question in questions]
    places = [(OBJECT_NAMES.index(name), STYLE_NAMES.index(style)) for name, style in starts]
    return np.stack([render(masters[place]) for place in places])


@cache
def method_code(files: tuple[str, ...], uses_engine: bool) -> str:
    """Digest of what a method runs: its own files, and the engine's version if it uses it."""
    own = code_digest(HERE / "methods" / name for name in ("base.py", *files))
    return digest([own, ENGINE]) if uses_engine else own


def _bare_step_seconds(denoiser: Recorder) -> float:
    """Median time of a student's forward and backward on two pictures, the unit of wall time."""
    matrices = denoiser.matrices()
    name = sorted(matrices)[0]
    factors = {name: torch.zeros(len(matrices[name]), 16, requires_grad=True)}
    basis = torch.randn(matrices[name].shape[1], 16)
    edit = LowRankEdit.shared(basis, factors)
    nulls = denoiser.encode(["", ""])
    x, sigma = torch.randn(2, *denoiser.latent_shape(SIZE)), torch.tensor([2.0, 2.0])
    times = []
    for _ in range(BARE_STEPS):
        began = time.process_time()
        denoiser.predict_x0(x, sigma, nulls, edit).square().sum().backward()
        times.append(time.process_time() - began)
    return statistics.median(times)
