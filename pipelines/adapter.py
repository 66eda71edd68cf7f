"""A diffusers pipeline as the engine's denoiser, whichever network it has.

How a pipeline encodes prompts, what it hands to its network and what it makes of the answer is
nowhere written again here: a copy of the pipeline is called with stand-ins for network, tokenizers
and scheduler that take notes, and predictions repeat the noted call with other values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..erase_core.artefact.identity import Digest, bytes_on_cpu, word_sums
from ..erase_core.files.fingerprint import fingerprint
from ..erase_core.method.alignment import STREAM_IDS
from ..erase_core.method.prompt_readers import NoReadersError, PromptReaders, ReadingDenoiser
from ..erase_core.method.words import words_among
from ..erase_core.model.activations import BlockRun
from ..erase_core.model.blocks import blocks_run_by
from ..erase_core.model.low_rank import LowRankEdit, LowRankSidePath
from ..erase_core.model.prompt import Encoded, stack_pooled, stack_tokens
from ..erase_core.model.twin import twin_network
from ..erase_core.settings.families import FLUX, SD3
from ..erase_core.settings.layers import known_by_name, matching
from ..erase_core.settings.settings import EraseSettings
from .calls import FEW, PROBE, SMALL, Call, ask
from .networks import PipelineError, family_of, linear_layers, network_of
from .refusals import flows, refuse_unfit

# Tokenizers whose tokens lie one after the other in an encoded prompt; else there is but the first.
STREAMS = {SD3.name: ("tokenizer", "tokenizer_3"), FLUX.name: ("tokenizer_2",)}
TOGETHER = 32  # captions that are encoded at once; more is no faster on a CPU
LEAST_ALPHA = 4.9e-8  # of schedules that end in pure noise, as ComfyUI has it: sigma is 4,500 there
RESNET = "ResnetBlock2D"  # the other repeated block of U-Nets


class PipelineDenoiser(ReadingDenoiser):
    """A pipeline's network and text encoders as the engine's denoiser.

    The network is a twin over the same storage, so the pipeline's own is never touched: neither
    its weights nor its hooks, its training mode or what of it takes a gradient.

    Args:
        pipe: a text-to-image pipeline of diffusers.
        resolution: side of the pictures in pixels.
        layers: which matrices train, see :mod:`erase_core.settings.layers`; None for the family's
            own.

    Raises:
        PipelineError: a pipeline that can't be trained on, see :func:`refusals.refuse_unfit`;
            nothing of its network reads the prompt alone.
        LayerRuleError: a layer rule that matches nothing.
    """

    def __init__(self, pipe: Any, resolution: int, layers: str | None = None) -> None:
        refuse_unfit(pipe)
        network = network_of(pipe)
        self._pipe, self._family = pipe, family_of(pipe)
        self.family = self._family.name
        self._network = twin_network(network).eval()
        self.device, self.dtype = pipe._execution_device, network.dtype
        self._every = every = linear_layers(self._network, self._family)
        own = self._family.defaults.get("layers", EraseSettings.layers)
        self._rule = layers or own
        known = {name: every[name].weight for name in matching(every, known_by_name(own))}
        self.base = {"name": pipe.name_or_path or "", "fingerprint": fingerprint(known)}
        self._calls: dict[tuple[int, ...], Call] = {}
        self._resolution = resolution
        # The empty prompt beside a longer one shows what pads a prompt, and whether that counts.
        probe = ask(pipe, self._network, ["", PROBE], SMALL)
        self._null, self._readers = probe.encoded()[0], probe.readers
        self._mask = (probe.mask, probe.asked[0][probe.mask].dtype) if probe.mask else None
        if self._measured:
            names = [name for names in self.ways.values() for name in names]
        else:
            names = matching(every, self._rule)
            names += [n for n in (self._family.pooled_matrix,) if n in every and n not in names]
        self._modules = {name: every[name] for name in names}
        self.names = self._modules.keys()
        self._side_path = LowRankSidePath(self._modules)

    def _find_readers(self) -> PromptReaders:
        paths = {layer: path for path, layer in self._network.named_modules()}
        keys = {name: paths[layer] for name, layer in self._every.items()}
        pixels = (self._resolution // self._latent_pixels) ** 2
        try:
            return self._readers_in(self._network, keys, self._predict, self.encode, pixels)
        except NoReadersError as error:
            name = type(self._pipe).__name__
            raise PipelineError(f"{name} can't be erased from: {error}.") from error

    def encode(self, prompts: Sequence[str], together: bool = False) -> list[Encoded]:
        """See :class:`Denoiser`.

        Raises:
            SettingsError: a prompt that the pipeline would cut.
        """
        for reader in self._readers.values() if prompts else ():
            reader.refuse_cut(prompts)
        size, found = TOGETHER if together else 1, []
        for start in range(0, len(prompts), size):
            part = prompts[start : start + size]
            found += ask(self._pipe, self._network, part, SMALL).encoded()
        return found

    def token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """See :class:`Denoiser`. Streams that follow one another share no ids."""
        rows = self._all_ids(prompts)
        # Without what a template puts in front; with something for an encoder that was left away.
        dropped = len(self._all_ids([""])[0]) - len(self._null.tokens)
        last = len(STREAMS.get(self.family, ())) * STREAM_IDS
        return [row[max(0, dropped) :] + [last] * -dropped for row in rows]

    def _all_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        names = [name for name in STREAMS.get(self.family, ("tokenizer",)) if name in self._readers]
        every = [self._readers[name].ids(prompts, self._mask is None) for name in names]
        return [
            [i + number * STREAM_IDS for number, ids in enumerate(streams) for i in ids]
            for streams in zip(*every, strict=True)
        ]

    def vocabulary(self) -> list[str]:
        """See :class:`Denoiser`. Those of the last tokenizer that lists any."""
        for reader in reversed(self._readers.values()):
            tokens = reader.tokenizer.get_vocab()
            words = words_among({number: token for token, number in tokens.items()})
            if words:
                return words
        return []

    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        """See :class:`Denoiser`. As the pipeline's sampler has it, which may be packed."""
        call = Call.of(ask(self._pipe, self._network, [""], resolution, FEW), self._mask)
        self._calls[call.shape] = call
        return call.shape

    def sigmas(self, steps: int) -> Tensor:
        """See :class:`Denoiser`. Flow models have the pipeline's own, others ComfyUI's "normal"."""
        if self._levels is None:
            notes = ask(self._pipe, self._network, [""], self._resolution, max(steps, 2))
            return notes.scheduler.sigmas.float().cpu()
        times = torch.linspace(len(self._levels) - 1, 0, steps)
        low, part = times.floor().long(), times.frac()
        logs = self._levels.log()
        sigmas = ((1 - part) * logs[low] + part * logs[times.ceil().long()]).exp()
        return torch.cat([sigmas, torch.zeros(1)])

    @cached_property
    def _levels(self) -> Tensor | None:
        """The noise level of each of the scheduler's times; None for flow models."""
        if flows(self._pipe.scheduler):
            return None
        kept = self._pipe.scheduler.alphas_cumprod.float().cpu().clamp_min(LEAST_ALPHA)
        return ((1 - kept) / kept).sqrt()

    @cached_property
    def _predicts(self) -> str:
        """What the network predicts."""
        if self._levels is None:
            return "flow"
        return str(self._pipe.scheduler.config.get("prediction_type", "epsilon"))

    def noisy_latent(self, noise: Tensor, sigma: Tensor) -> Tensor:
        """See :class:`Denoiser`."""
        sigma = sigma.to(noise.device)
        return noise * (sigma if self._levels is None else (1 + sigma**2).sqrt())

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """See :class:`Denoiser`."""
        weighted = self._predicts == "v_prediction"
        return 1 + sigma**2 if weighted else torch.ones_like(sigma)

    def predict_x0(
        self,
        x: Tensor,
        sigma: Tensor,
        prompts: Sequence[Encoded],
        edit: LowRankEdit | None = None,
    ) -> Tensor:
        """See :class:`Denoiser`."""
        given = [stack_tokens(prompts).to(self.device)] if self._mask is None else []
        with self._side_path.active(edit, [*given, stack_pooled(prompts)]):
            return self._predict(x, sigma, prompts)

    def _predict(self, x: Tensor, sigma: Tensor, prompts: Sequence[Encoded]) -> Tensor:
        """x0, as the network stands."""
        x, sigma = x.to(self.device), sigma.to(self.device)
        call, level = self._calls[tuple(x.shape[1:])], sigma.view(-1, *[1] * (x.ndim - 1))
        if self._levels is None:
            time = sigma * self._pipe.scheduler.config.num_train_timesteps
            scale = torch.ones_like(level)
        else:
            near = (self._levels.log()[None] - sigma.cpu().log()[:, None]).abs().argmin(1)
            time, scale = near.to(sigma), (1 + level**2).rsqrt()
        said = call.again(self._network, x * scale, time, prompts)
        if self._predicts == "v_prediction":
            return x * scale**2 - said * level * scale
        return x - level * said

    def around_blocks(self, run: BlockRun) -> AbstractContextManager[None]:
        """See :class:`Denoiser`. By the blocks that diffusers says are repeated."""
        names = {*(getattr(self._network, "_no_split_modules", None) or ()), RESNET}
        found = {type(m): m for m in self._network.modules() if type(m).__name__ in names}
        kinds = tuple(
            kind
            for kind, block in found.items()
            if not any(type(m) in found for m in list(block.modules())[1:])
        )
        return blocks_run_by(self._network, kinds, run, self._side_path.again)

    def matrices(self) -> Mapping[str, Tensor]:
        """See :class:`Denoiser`."""
        return {name: module.weight.detach() for name, module in self._modules.items()}

    def weights(self) -> Iterator[Tensor]:
        """See :class:`Denoiser`."""
        yield from self._network.parameters()
        yield from self._network.buffers()

    def free_memory(self, wanted: int) -> int:
        """See :class:`Denoiser`. Of a GPU, what its driver and PyTorch have free."""
        if self.device.type != "cuda":
            return super().free_memory(wanted)
        held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + held

    @cached_property
    def identity(self) -> str:
        """See :class:`Denoiser`. All weights count, and what the pipeline makes of them."""
        digest, state = Digest(), self._network.state_dict()
        for part in (self._pipe, self._network, self._pipe.scheduler):
            digest.add(
                type(part).__name__,
                repr(sorted(dict(getattr(part, "config", {})).items(), key=str)).encode(),
            )
        sums = bytes_on_cpu([word_sums(state[name]) for name in sorted(state)])
        for name, data in zip(sorted(state), sums, strict=True):
            digest.add(f"{name} {state[name].dtype} {tuple(state[name].shape)}", data)
        return digest.hexdigest()
