"""ComfyUI's model as the engine's denoiser."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock
from comfy.ldm.modules.attention import BasicTransformerBlock, attention_pytorch
from comfy.ldm.modules.diffusionmodules.mmdit import JointBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch import Tensor, nn

from ..erase_core.method.prompt_readers import (
    MASK,
    NoReadersError,
    PromptReaders,
    ReadingDenoiser,
    shapes_of,
)
from ..erase_core.model.activations import BlockRun
from ..erase_core.model.blocks import blocks_run_by
from ..erase_core.model.low_rank import LowRankEdit, LowRankSidePath
from ..erase_core.model.out_of_place import OutOfPlace
from ..erase_core.model.prompt import Encoded, stack_pooled, stack_tokens
from ..erase_core.model.twin import twin_network
from .batches import BatchEncoder
from .encoding import batch_encoder, encode_prompts, refuse_hooks
from .exact import WRAPPER_TYPE, is_side_path, side_paths
from .families import (
    UnsupportedModelError,
    latent_pixels,
    latent_shape,
    refuse_if_it_takes_more,
    trainable_family,
    unsupported,
    with_frames,
)
from .identity import model_identity
from .kinds import refuse_another_kind
from .matrices import base_fingerprint, editable_keys, trained_keys
from .packed import compute_with_numbers, like, numbers_of
from .tokens import row_ids
from .vocabulary import vocabulary

# The repeated blocks of the host's networks; none of them contains another.
BLOCKS = (ResBlock, BasicTransformerBlock, JointBlock, DoubleStreamBlock, SingleStreamBlock)
# A training step keeps activations that inference frees; the host moves other models out of the
# way for this many times what it would reserve for sampling.
TRAINING_MEMORY_FACTOR = 3


class ComfyDenoiser(ReadingDenoiser):
    """The host's MODEL and CLIP as the engine's denoiser.

    The model's module is never touched: the denoiser runs a twin of it whose parameters lie over
    the host's storage, so there is one copy of the weights. Use as a context manager, which lets
    everything go at the end. The model is loaded when its network is first needed: what the text
    encoder does before then has the device for itself.

    Args:
        model: the host's ModelPatcher, with whatever patches it carries.
        clip: the host's CLIP.
        base_name: name of the checkpoint, for the record.
        images: most images per prediction, for the host's memory planning.
        resolution: longer side of the pictures in pixels, likewise.
        layers: which matrices train, see :mod:`erase_core.settings.layers`; None for the
            family's own.
        sides: width and height of the pictures in pixels, where they aren't square.

    Raises:
        UnsupportedModelError: a model that can't be trained on, a CLIP with hooks or of another
            kind than the model.
        LayerRuleError: a layer rule that matches nothing.
    """

    def __init__(
        self,
        model,
        clip,
        base_name: str,
        images: int,
        resolution: int,
        layers: str | None = None,
        sides: tuple[int, int] | None = None,
    ) -> None:
        self._family = trainable_family(model)
        refuse_hooks(clip)
        self.family = self._family.name
        if clip is not None:
            refuse_another_kind(model, clip)
        if not self._family.readers_known:
            refuse_if_it_takes_more(model, clip, self._family)
        self.base = {"name": base_name, "fingerprint": base_fingerprint(model)}
        self._model, self._clip = with_resident_weights(model), clip
        self._rule = layers or self._family.defaults.get("layers", "")
        if not self._measured:
            self._keys = trained_keys(model, layers)
        self._resolution, self._latent_pixels = resolution, latent_pixels(model)
        self.device = model.load_device
        # Nodes upstream may have chosen it, on the patcher.
        self.dtype = model.get_model_object("manual_cast_dtype") or model.model.get_dtype()
        self._planned_shape = [images, *self.latent_shape(resolution)]
        self._size = dict(zip(("width", "height"), sides or (resolution, resolution), strict=True))

    def __enter__(self) -> ComfyDenoiser:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(_training_flag())
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        for made in ("_twin", "_modules", "_side_path", "_prompt_readers"):
            vars(self).pop(made, None)

    @functools.cached_property
    def _twin(self) -> Any:  # of the host's class for this architecture
        memory = self._model.memory_required(self._planned_shape) * TRAINING_MEMORY_FACTOR
        with _host_moves_weights():
            comfy.model_management.load_models_gpu([self._model], memory_required=memory)
        return twin_of(self._model)

    @functools.cached_property
    def _keys(self) -> Mapping[str, str]:
        """Host keys of the matrices that train, by LoRA name."""
        keys = editable_keys(self._model)
        return {name: keys[name] for names in self.ways.values() for name in names}

    @functools.cached_property
    def names(self) -> Collection[str]:
        """See :class:`erase_core.model.denoiser.Denoiser`."""
        return self._keys.keys()

    def _find_readers(self) -> PromptReaders:
        """What reads prompts, found by predictions.

        Raises:
            UnsupportedModelError: nothing does that could be edited.
        """
        start, end = len("diffusion_model."), -len(".weight")
        paths = {name: key[start:end] for name, key in editable_keys(self._model).items()}
        _, height, width = self.latent_shape(self._resolution)
        try:
            readers = self._readers_in(
                self._twin.diffusion_model,
                paths,
                self._x0_of,
                lambda prompts: encode_prompts(self._clip, prompts, None, extras=True),
                height * width,
            )
        except NoReadersError as error:
            raise unsupported(self._family, str(error)) from error
        if readers.needs_no_network:  # the text encoder may have the device for itself again
            readers.let_go()
            vars(self).pop("_twin")
        return readers

    @functools.cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return _modules_at(self._twin, self._keys)

    @functools.cached_property
    def _side_path(self) -> LowRankSidePath:
        side_path = LowRankSidePath(self._modules)
        self._stack.callback(side_path.remove)
        return side_path

    @functools.cached_property
    def identity(self) -> str:
        """See :class:`erase_core.model.denoiser.Denoiser`."""
        return model_identity(self._model, self._keys.values())

    @functools.cached_property
    def _together(self) -> BatchEncoder:
        return batch_encoder(self._clip)

    def encode(self, prompts: Sequence[str], together: bool = False) -> list[Encoded]:
        """See :class:`erase_core.model.denoiser.Denoiser`."""
        if self._family.readers_known:
            if not together or len(prompts) < 2:
                return encode_prompts(self._clip, prompts, self._family.pooled)
            found = self._together(prompts)
            return found if self._family.pooled else [Encoded(one.tokens) for one in found]
        if together and len(prompts) > 1 and self._gives_no_more:
            found = [self._with_full_mask(one) for one in self._together(prompts)]
        else:
            found = encode_prompts(self._clip, prompts, None, extras=True)
        return found if self._takes_pooled else [one.with_pooled(None) for one in found]

    @property
    def _takes_pooled(self) -> bool:
        """Whether the network reads a pooled vector, if the encoder gives one."""
        if not self._measured:
            return self._family.pooled
        return self._prompt_readers.takes_pooled

    @functools.cached_property
    def _extras(self) -> list[Mapping[str, Any]]:
        """What the encoder gives beside embeddings, for a short prompt and a longer one."""
        probes = encode_prompts(self._clip, ["", "a photo of a cat"], None, extras=True)
        return [probe.extras for probe in probes]

    @property
    def _gives_no_more(self) -> bool:
        """Whether there is nothing of a prompt's own among that: only masks that mask nothing."""
        return all(
            name == MASK and bool(value.all())
            for extras in self._extras
            for name, value in extras.items()
        )

    def _with_full_mask(self, prompt: Encoded) -> Encoded:
        """The prompt with the mask that it has by itself."""
        if MASK not in self._extras[0]:
            return prompt
        like = self._extras[0][MASK]
        mask = torch.ones(1, len(prompt.tokens), dtype=like.dtype)
        return Encoded(prompt.tokens, prompt.pooled, {MASK: mask})

    def token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """See :class:`erase_core.model.denoiser.Denoiser`."""
        return [row_ids(self._clip, prompt, self._family.token_streams) for prompt in prompts]

    def vocabulary(self) -> list[str]:
        """The words that the text encoder has tokens for, see :func:`vocabulary.vocabulary`."""
        return vocabulary(self._clip, [*itertools.chain(*self._family.token_streams)])

    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        """See :class:`erase_core.model.denoiser.Denoiser`."""
        return latent_shape(self._model, resolution)

    def sigmas(self, steps: int) -> Tensor:
        """See :class:`erase_core.model.denoiser.Denoiser`."""
        sampling = self._model.get_model_object("model_sampling")
        return comfy.samplers.calculate_sigmas(sampling, "normal", steps).clone()

    def noisy_latent(self, noise: Tensor, sigma: Tensor) -> Tensor:
        """See :class:`erase_core.model.denoiser.Denoiser`."""
        sampling = self._model.get_model_object("model_sampling")
        sigma = sigma.to(noise.device)
        return sampling.noise_scaling(sigma, noise, torch.zeros_like(noise), max_denoise=True)

    def noisy_picture(self, picture: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """See :class:`erase_core.model.denoiser.Denoiser`."""
        sampling = self._model.get_model_object("model_sampling")
        return sampling.noise_scaling(sigma.to(picture.device), noise, picture)

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """See :class:`erase_core.model.denoiser.Denoiser`. From the host's own sampling object."""
        sampling = self._model.get_model_object("model_sampling")
        nothing, one = (torch.full((len(sigma), 1, 1, 1), value) for value in (0.0, 1.0))
        sigma = sigma.cpu()
        # x0 = a x + b F with the network's output F, and a change of x0 is -sigma one of eps.
        at = [sampling.calculate_denoised(sigma, output, nothing) for output in (one, nothing)]
        return (sigma / (at[0] - at[1]).flatten()).square().float()

    def predict_x0(
        self,
        x: Tensor,
        sigma: Tensor,
        prompts: Sequence[Encoded],
        edit: LowRankEdit | None = None,
    ) -> Tensor:
        """See :class:`erase_core.model.denoiser.Denoiser`. Raises the host's interrupt."""
        if self._family.joint and len(set(map(shapes_of, prompts))) > 1:
            return self._by_shape(x, sigma, prompts, edit)
        conditions = self._conditions(with_frames(self._model, x), prompts)
        given = [conditions.get("c_crossattn"), conditions.get("y")]
        with self._side_path.active(edit, given):
            return self._run(x, sigma, conditions)

    def _x0_of(self, x: Tensor, sigma: Tensor, prompts: Sequence[Encoded]) -> Tensor:
        """x0 for prompts of one shape, as the network stands."""
        return self._run(x, sigma, self._conditions(with_frames(self._model, x), prompts))

    def _run(self, x: Tensor, sigma: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        """x0 under the host's conditions. Raises the host's interrupt."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        given = with_frames(self._model, x)
        options = {
            "optimized_attention_override": _differentiable_attention,
            "wrappers": {WRAPPER_TYPE: side_paths(self._model)},
        }
        with self._out_of_place():
            x0 = self._twin.apply_model(given, sigma, transformer_options=options, **conditions)
        return x0.float().view_as(x)

    def _out_of_place(self, always: bool = False) -> contextlib.AbstractContextManager:
        return OutOfPlace(always) if self._family.adds_in_place else contextlib.nullcontext()

    def around_blocks(self, run: BlockRun) -> contextlib.AbstractContextManager[None]:
        """See :class:`erase_core.model.denoiser.Denoiser`."""
        return blocks_run_by(self._twin.diffusion_model, BLOCKS, run, self._surroundings)

    def _surroundings(self) -> Callable[[], contextlib.AbstractContextManager]:
        """What a block needs around it that is gone once the prediction has ended."""
        edit_again = self._side_path.again()

        @contextlib.contextmanager
        def surroundings() -> Iterator[None]:
            with edit_again(), self._out_of_place(always=True):
                yield

        return surroundings

    def weights(self) -> Iterator[Tensor]:
        """See :class:`erase_core.model.denoiser.Denoiser`."""
        yield from self._twin.parameters()
        yield from self._twin.buffers()

    def free_memory(self, wanted: int) -> int:
        """See :class:`erase_core.model.denoiser.Denoiser`. The host moves other models away."""
        management = comfy.model_management
        own = management.LoadedModel(self._model)
        with _host_moves_weights():
            management.free_memory(wanted, self.device, keep_loaded=[own])
        return management.get_free_memory(self.device)

    def _by_shape(
        self, x: Tensor, sigma: Tensor, prompts: Sequence[Encoded], edit: LowRankEdit | None
    ) -> Tensor:
        """One forward for each length: in joint attention a repeated prompt would weigh more."""
        shapes = list(map(shapes_of, prompts))
        groups = [
            torch.tensor([i for i, one in enumerate(shapes) if one == shape])
            for shape in sorted(set(shapes))
        ]
        parts = [
            self.predict_x0(x[group], sigma[group], [prompts[i] for i in group.tolist()], edit)
            for group in groups
        ]
        return torch.cat(parts)[torch.cat(groups).argsort().to(x.device)]

    def _conditions(self, x: Tensor, prompts: Sequence[Encoded]) -> dict[str, Any]:
        """What the host's samplers would hand to the model for these prompts."""
        if any(prompt.extras for prompt in prompts):
            return self._conditions_one_by_one(x, prompts)
        pooled = stack_pooled(prompts)
        given = {"noise": x, "device": x.device, **self._size}
        given["cross_attn"] = stack_tokens(prompts).to(x.device)
        given["pooled_output"] = None if pooled is None else pooled.to(x.device)
        conditions = {
            name: condition.process_cond(batch_size=len(x), device=x.device, area=None).cond
            for name, condition in self._model.model.extra_conds(**given).items()
        }
        return _on_device(conditions, x.device)

    def _conditions_one_by_one(self, x: Tensor, prompts: Sequence[Encoded]) -> dict[str, Any]:
        """The same where text encoders give more than embeddings, put together as the host does."""
        every = []
        for prompt in prompts:
            given = {"noise": x[:1], "device": x.device, "prompt_type": "positive", **self._size}
            given["cross_attn"] = prompt.tokens[None].to(x.device)
            given["pooled_output"] = None if prompt.pooled is None else prompt.pooled[None]
            given = _on_device({**given, **prompt.extras}, x.device)
            conditions = self._model.model.extra_conds(**given)
            every.append(
                {
                    name: condition.process_cond(batch_size=1, device=x.device, area=None)
                    for name, condition in conditions.items()
                }
            )
        first, *others = every
        joined = {
            name: condition.concat([one[name] for one in others])
            for name, condition in first.items()
        }
        return _on_device(joined, x.device)

    def matrices(self) -> Mapping[str, Tensor]:
        """See :class:`erase_core.model.denoiser.Denoiser`. Patches are in them, wherever they lie.

        Raises:
            UnsupportedModelError: packed in a format that their layers can't give as numbers.
        """
        weights = {
            name: numbers_of(module, self.device, self.dtype)
            for name, module in self._modules.items()
        }
        names = {key: name for name, key in self._keys.items()}
        # Erasures beside the weights are part of what is trained on, like merged ones.
        for path in itertools.chain(*side_paths(self._model).values()):
            for key, delta in path.deltas():
                if key in names:
                    weight = weights[names[key]]
                    weights[names[key]] = weight.float() + delta.to(weight.device)
        return weights


def _host_moves_weights() -> contextlib.AbstractContextManager:
    """Inference mode, in which the host's executor moves them.

    Outside it a module that moves is left with parameters that are neither normal nor inference
    tensors, and the next sampler fails.
    """
    return torch.inference_mode()


def with_resident_weights(model):
    """The model itself, or on hosts that stream weights per layer an ordinary copy of it.

    Raises:
        UnsupportedModelError: the host streams the weights and its loader can't load them whole.
    """
    if not getattr(model, "is_dynamic", bool)():
        return model
    try:
        return model.clone(disable_dynamic=True)
    except RuntimeError as error:
        raise UnsupportedModelError(
            "This host streams the model's weights, and the node that loaded it can't load them "
            f"whole for training ({error}). Use a core loader such as Load Checkpoint, or start "
            "ComfyUI with --highvram."
        ) from error


def left_out_of_training(model, what: str = "Training") -> list[str]:
    """What upstream nodes put around the network that training does not run, in words.

    Args:
        what: ran without it.
    """
    options = model.model_options
    around = options.get("transformer_options", {})
    names = [name for name in ("patches", "patches_replace") if around.get(name)]
    wrappers = [*around.get("wrappers", {}).values(), *getattr(model, "wrappers", {}).values()]
    if any(found and not is_side_path(key) for kind in wrappers for key, found in kind.items()):
        names.append("wrappers")
    names += ["model_function_wrapper"] if "model_function_wrapper" in options else []
    if not names:
        return []
    return [
        f"{what} ran without what upstream nodes put around the model ({', '.join(names)}); "
        "weight patches such as LoRAs were in place."
    ]


def twin_of(model) -> Any:
    """The model again, of the host's class, its network a twin over the same storage.

    All clones of a MODEL share one module that must stay as it is. Must be called while the model
    is loaded and outside inference mode.
    """
    base = model.model
    twin = copy.copy(base)
    twin._modules = dict(base._modules)
    # Functions that patch streamed weights hold the host's patches; share, don't copy.
    twin.diffusion_model = twin_network(base.diffusion_model, _functions_on_weights, like)
    compute_with_numbers(twin.diffusion_model)
    twin.model_sampling = model.get_model_object("model_sampling")
    twin.current_patcher = None
    return twin


def _on_device(values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in values.items()
    }


def _functions_on_weights(module: nn.Module) -> list[Any]:
    return [*getattr(module, "weight_function", ()), *getattr(module, "bias_function", ())]


def _modules_at(twin: nn.Module, keys: Mapping[str, str]) -> dict[str, nn.Module]:
    return {name: twin.get_submodule(key.removesuffix(".weight")) for name, key in keys.items()}


def _differentiable_attention(_chosen, *args: Any, **keywords: Any) -> Tensor:
    """PyTorch's attention in place of whichever the host chose: some kernels have no backward."""
    return attention_pytorch(*args, **keywords)


@contextlib.contextmanager
def _training_flag() -> Iterator[None]:
    """Tell the host's layers that gradients are wanted, where the host has the flag."""
    management = comfy.model_management
    before = getattr(management, "in_training", None)
    if before is None:
        yield
        return
    management.in_training = True
    try:
        yield
    finally:
        management.in_training = before
