"""The technique ``concept_surgery`` of the benchmark eval-unlearn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .erasing import erase
from .erasure import Erasure
from .loading import load_pipeline


class ConceptSurgeryTechnique:
    """Draws with a pipeline from which a concept is erased; the benchmark asks nothing else.

    Args:
        model_id: a folder, a single file or a model in the Hugging Face cache.
        erase_concept: what to erase, "cat" or "cat => dog".
        replace_with, keep, preset: see :func:`pipelines.erase`.
        load_path: the file of an erasure, which then isn't trained.
        save_path: where a trained one is saved, a name that nothing has.
        strength: of the erasure.
        device, dtype, config: see :func:`loading.load_pipeline`.
        num_inference_steps, guidance_scale: of the pictures.
        height, width: of the pictures; the model's own where None.
        **settings: see :func:`pipelines.erase`.
    """

    def __init__(
        self,
        model_id: str,
        erase_concept: str = "",
        replace_with: str = "",
        keep: Sequence[str] = (),
        preset: str = "balanced",
        load_path: str | None = None,
        save_path: str | None = None,
        strength: float = 1.0,
        device: str | None = None,
        dtype: str | None = None,
        config: str | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        height: int | None = None,
        width: int | None = None,
        **settings: Any,
    ) -> None:
        self.pipe = load_pipeline(model_id, config, device, dtype)
        if load_path:
            self.erasure = Erasure.load(Path(load_path))
        else:
            self.erasure = erase(self.pipe, erase_concept, replace_with, keep, preset, **settings)
        if save_path and not load_path:
            self.erasure.save(save_path)
        self.erasure.applied(self.pipe, strength)
        sizes = {"height": height, "width": width}
        self._options: dict[str, Any] = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            **{name: size for name, size in sizes.items() if size},
        }

    def generate(
        self, prompts: Sequence[str], seed: int | None = None, **options: Any
    ) -> list[Any]:
        """A picture of each prompt; the n-th is drawn with the seed ``seed + n``."""
        pictures = []
        for number, prompt in enumerate(prompts):
            generator = None
            if seed is not None:
                generator = torch.Generator().manual_seed(seed + number)
            drawn = self.pipe(prompt=prompt, generator=generator, **{**self._options, **options})
            pictures.append(drawn.images[0])
        return pictures
