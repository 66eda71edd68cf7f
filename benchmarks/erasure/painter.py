"""The model in the host: trained on through the pack's own adapter, drawn from in batches.

Drawing repeats the host's ``euler`` on its ``normal`` schedule with the edit merged into a copy of
the network, many prompts at a time; ``tests/host/test_erasure_benchmark.py`` holds it against the
host's KSampler with the pack's Apply node.
"""

from __future__ import annotations

import copy
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import benchmarks.erasure.with_host  # isort: skip # noqa: F401 - before what is the host's

import comfy.model_management
import comfy.sd
import numpy as np
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.samplers import calculate_sigmas
from concept_surgery.erase_core.model.low_rank import LowRankEdit
from concept_surgery.erase_core.model.prompt import Encoded
from concept_surgery.nodes.host import ComfyDenoiser, encode_prompts, trained_keys, twin_of
from torch import Tensor

from benchmarks.counted import CountedDenoiser
from tools.environment import BUILD

FOLDER = BUILD / "erasure"
STEPS, GUIDANCE, RESOLUTION = 20, 4.0, 64
BATCH = 30
MOST_PROMPTS = 3000  # kept encoded, 240 kB each
WIDEST = "transformer"  # the layer rule that holds all others


class Painter:
    """A checkpoint, loaded by the host.

    Args:
        path: the checkpoint.
        steps: sampler steps.
        fast: draw with matrix products in bfloat16.
        folder: where encoded prompts are kept.
    """

    def __init__(
        self, path: Path, steps: int = STEPS, fast: bool = True, folder: Path = FOLDER
    ) -> None:
        self.path, self.steps, self.fast, self.folder = path, steps, fast, folder
        self.identity = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        with torch.inference_mode():
            self.model, self.clip, self.vae = comfy.sd.load_checkpoint_guess_config(str(path))[:3]
        self._tokens: dict[str, Tensor] = {}
        probe = encode_prompts(self.clip, ["a probe"])[0].tokens.numpy().tobytes()
        self._prompts = folder / "prompts" / hashlib.sha256(probe).hexdigest()[:16]
        self._prompts.mkdir(parents=True, exist_ok=True)
        comfy.model_management.load_models_gpu([self.model])
        with torch.inference_mode(False):
            network = copy.deepcopy(twin_of(self.model).diffusion_model)
        self._network = network.to(memory_format=torch.channels_last).requires_grad_(False)
        weights = dict(self._network.named_parameters())
        keys = trained_keys(self.model, WIDEST)
        self._weights = {n: weights[k.removeprefix("diffusion_model.")] for n, k in keys.items()}

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """Token embeddings (77, 768) of each prompt, each encoded once and kept on disk.

        The host's encoder takes a quarter of a second for a prompt, and it stays the same while
        the denoiser is still trained.
        """
        return [self._encoded(text) for text in texts]

    def remember(self, name: str, tokens: Tensor) -> str:
        """Draw from embeddings (77, 768) that no text gives, under a name of their own."""
        self._tokens[name] = tokens
        return name

    def _encoded(self, text: str) -> Tensor:
        if text in self._tokens:
            return self._tokens[text]
        path = self._prompts / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.npy"
        if path.exists():
            rows = torch.from_numpy(np.load(path))
        else:
            rows = encode_prompts(self.clip, [text])[0].tokens
            partial = path.with_name(f".{path.name}.{os.getpid()}.npy")
            np.save(partial, rows.numpy())
            partial.replace(path)
        if len(self._tokens) >= MOST_PROMPTS:
            self._tokens.clear()
        self._tokens[text] = rows
        return rows

    @contextmanager
    def denoiser(self, layers: str) -> Iterator[Recorder]:
        """The model as the engine sees it, with what it is asked for counted."""
        with torch.inference_mode(False), torch.enable_grad():
            with ComfyDenoiser(
                self.model, self.clip, self.path.name, BATCH, RESOLUTION, layers
            ) as denoiser:
                yield Recorder(denoiser, self)

    @contextmanager
    def edited(self, edit: LowRankEdit | None) -> Iterator[None]:
        """The edit in the weights that are drawn with; afterwards they are what they were."""
        factors = {} if edit is None else edit.factors
        before = {name: self._weights[name].clone() for name in factors}
        try:
            for name, factor in factors.items():
                self._weights[name].add_(factor.float() @ edit.bases[name].float().T)
            yield
        finally:
            for name, weight in before.items():
                self._weights[name].copy_(weight)

    @torch.no_grad()
    def latents(
        self,
        texts: Sequence[str],
        negatives: Sequence[str],
        noise: Tensor,
        edit: LowRankEdit | None = None,
        start: Tensor | None = None,
        denoise: float = 1.0,
    ) -> Tensor:
        """Latents (n, 4, h, w) in the model's scale, from noise of that shape.

        Args:
            start: latents to start from instead of pure noise (img2img).
            denoise: how much of the schedule is left to them, as the host's KSampler has it.
        """
        sampling, steps = self.model.get_model_object("model_sampling"), int(self.steps / denoise)
        sigmas = calculate_sigmas(sampling, "normal", steps)[-self.steps - 1 :]
        if start is None:
            start = torch.zeros_like(noise)
        x = sampling.noise_scaling(sigmas[0], noise, start, max_denoise=denoise == 1.0)
        states = torch.stack(self.encode(texts))
        against = torch.stack(self.encode(negatives))
        with self.edited(edit), self._products():
            parts = zip(x.split(BATCH), states.split(BATCH), against.split(BATCH), strict=True)
            return torch.cat([self._sampled(*part, sigmas) for part in parts])

    def _sampled(self, x: Tensor, states: Tensor, against: Tensor, sigmas: Tensor) -> Tensor:
        """Euler's method with guidance."""
        sampling = self.model.get_model_object("model_sampling")
        prompts = torch.cat([states, against])
        for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
            scaled = (x / (1 + sigma**2).sqrt()).repeat(2, 1, 1, 1)
            at = sampling.timestep(sigma).expand(len(scaled))
            eps, plain = self._predict(scaled, at, prompts).float().chunk(2)
            x = x + (plain + GUIDANCE * (eps - plain)) * (after - sigma)
        return x

    def pages(self, latents: Tensor) -> np.ndarray:
        """Pictures uint8 (n, h, w, 3), by the host's decoder."""
        with torch.inference_mode():
            pictures = self.vae.decode(self.model.model.latent_format.process_out(latents))
            return pictures.clamp(0, 1).mul(255).round().byte().cpu().numpy()

    def encoded(self, pages: np.ndarray) -> Tensor:
        """The way back from :meth:`pages`, by the host's encoder."""
        with torch.inference_mode():
            latents = self.vae.encode(torch.from_numpy(pages).float().div_(255))
            latents = self.model.model.latent_format.process_in(latents)
        return latents.clone()

    def drawn_again(self, pages: np.ndarray) -> np.ndarray:
        """Pictures as the autoencoder gives them back."""
        parts = np.array_split(pages, -(-len(pages) // 60))
        return np.concatenate([self.pages(self.encoded(part)) for part in parts])

    @torch.no_grad()
    def null_drift(self, edit: LowRankEdit, clean: Tensor, steps: Sequence[int]) -> list[float]:
        """``|eps_th(x,0) - eps*(x,0)| / |eps*(x,0)|`` at noised latents, for each schedule step.

        In float32: the drift of the hard form is rounding.

        Args:
            clean: latents (n, 4, h, w) of real pictures.
            steps: of the model's 1000.
        """
        sampling = self.model.get_model_object("model_sampling")
        empty = self.encode([""])[0].expand(len(clean), -1, -1)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(17))
        drifts = []
        for step in steps:
            at, sigma = torch.full((len(clean),), step), sampling.sigmas[step]
            x = (clean + sigma * noise) / (1 + sigma**2).sqrt()
            before = self._predict(x, at, empty)
            with self.edited(edit):
                after = self._predict(x, at, empty)
            drifts.append(float((after - before).norm() / before.norm()))
        return drifts

    def _predict(self, x: Tensor, steps: Tensor, states: Tensor) -> Tensor:
        options = {"optimized_attention_override": _attention}
        x = x.contiguous(memory_format=torch.channels_last)
        return self._network(x, steps, states, transformer_options=options)

    def _products(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16) if self.fast else nullcontext()


def _attention(_chosen, *args: Any, **keywords: Any) -> Tensor:
    """PyTorch's, which is also what trains; the host's own choice on a CPU is slower."""
    return attention_pytorch(*args, **keywords)


class Recorder(CountedDenoiser):
    """Counts predictions, and keeps encoded prompts from one run to the next.

    What encoding costs depends on what ran before, so it is timed apart.
    """

    def __init__(self, denoiser: ComfyDenoiser, painter: Painter) -> None:
        super().__init__(denoiser)
        self._painter = painter
        self.encode_seconds = 0.0

    def encode(self, prompts: Sequence[str], together: bool = False) -> list[Encoded]:
        """As the denoiser's own, from memory where it can be."""
        began = time.process_time()
        try:
            if together:
                return self._denoiser.encode(prompts, together)
            return [Encoded(rows.clone()) for rows in self._painter.encode(prompts)]
        finally:
            self.encode_seconds += time.process_time() - began
