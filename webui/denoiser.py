"""The host's loaded model as the engine's denoiser: what the three kinds of host have in common."""

from __future__ import annotations

import contextlib
import functools
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..erase_core.files.fingerprint import fingerprint
from ..erase_core.method.prompt_readers import NoReadersError, PromptReaders, ReadingDenoiser
from ..erase_core.model.activations import BlockRun
from ..erase_core.model.blocks import blocks_run_by
from ..erase_core.model.low_rank import LowRankEdit, LowRankSidePath
from ..erase_core.model.out_of_place import OutOfPlace
from ..erase_core.model.prompt import Encoded, stack_pooled, stack_tokens
from ..erase_core.model.twin import twin_network
from ..erase_core.settings.families import Family
from ..erase_core.settings.settings import EraseSettings
from .errors import ModelChangedError, UnsupportedModelError
from .families import SIZES_OF_SDXL, family_of, refuse_packed
from .identity import model_identity
from .names import matrix_paths, trained_paths
from .text import Learned, TextReader

# The repeated blocks of the hosts' networks, by the names of their classes: each host has classes
# of its own. None of them contains another.
BLOCKS = ("ResBlock", "BasicTransformerBlock", "DoubleStreamBlock", "SingleStreamBlock")
# What other programs keep on a layer that the twin shall share, not copy.
_SHARED = ("network_weights_backup", "network_bias_backup", "fp16_weight", "fp16_bias")
LATENT_PIXELS = 8


class WebuiDenoiser(ReadingDenoiser):
    """The host's model and its text encoder.

    The loaded module is never touched: the denoiser runs a twin of it whose parameters lie over
    the host's storage, so there is one copy of the weights. Use as a context manager, which lets
    everything go at the end. The network is loaded when it is first needed.

    Args:
        sd_model: the host's model, with the LoRAs of the last prompt taken out.
        current: gives the model that the host has loaded now.
        images: most images per prediction, for the host's memory planning.
        resolution: side of the pictures in pixels.
        layers: which matrices train; None for the family's own.
        check: called before each prediction; raises the interrupt.

    Raises:
        UnsupportedModelError: a model that can't be trained on.
        LayerRuleError: a layer rule that matches nothing.
    """

    kind = ""
    adds_in_place = False  # whether the host's layers overwrite what a backward needs

    def __init__(
        self,
        sd_model: Any,
        current: Callable[[], Any],
        images: int,
        resolution: int,
        layers: str | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._model, self._current, self._interrupts = sd_model, current, check
        self._loaded_as = _what_is_loaded(sd_model)
        self._resolution, self._images = resolution, images
        refuse_packed(self.network)
        refuse_replaced(self.network)
        self._family = family_of(sd_model, self.network, self.predicts_v)
        self.family = self._family.name
        self._rule = layers or self._family.defaults.get("layers", EraseSettings.layers)
        if not self._measured:
            self._paths = trained_paths(self.network, self._family, layers)
        beside = SIZES_OF_SDXL if self._family.name == "SDXL" else 0
        pooled = self._family.pooled
        self.text = TextReader(sd_model, self._learn, pooled, beside, self._check)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> WebuiDenoiser:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        on_device = ("_twin", "_modules", "_side_path", "_predictor", "_constants")
        for made in (*on_device, "_prompt_readers"):
            vars(self).pop(made, None)

    @property
    def known_family(self) -> Family:
        """The family of the model, as the engine knows it."""
        return self._family

    # What a kind of host must say.

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """The host's own U-Net or transformer."""

    @property
    @abstractmethod
    def predicts_v(self) -> bool:
        """Whether the network predicts v."""

    @property
    @abstractmethod
    def sampling(self) -> Any:
        """What turns noise levels into times: ``sigmas``, ``sigma(t)``, ``timestep(sigma)``."""

    @abstractmethod
    def _load(self) -> None:
        """Have the host put its network where predictions run."""

    @abstractmethod
    def _learn(self, prompts: Sequence[str]) -> Any:
        """What the host makes of some prompts when it samples."""

    @abstractmethod
    def _apply(
        self, x: Tensor, sigma: Tensor, tokens: Tensor, given: Mapping[str, Tensor | None]
    ) -> Tensor:
        """x0 by the host's own formula, run on the twin.

        Args:
            given: "vector" and "guidance", what goes with the tokens; None where nothing does.
        """

    # What the engine asks.

    @functools.cached_property
    def base(self) -> Mapping[str, Any]:
        """See :class:`erase_core.model.denoiser.Denoiser`."""
        known = trained_paths(self.network, self._family)
        known.pop(self._family.pooled_matrix, None)
        weights = {name: self._numbers(path) for name, path in known.items()}
        return {"name": checkpoint_name(self._model), "fingerprint": fingerprint(weights)}

    @functools.cached_property
    def _paths(self) -> Mapping[str, str]:
        """Paths of the matrices that train, by LoRA name."""
        every = matrix_paths(self.network, self._family)
        return {name: every[name] for names in self.ways.values() for name in names}

    @functools.cached_property
    def names(self) -> Collection[str]:
        """See :class:`erase_core.model.denoiser.Denoiser`."""
        return self._paths.keys()

    def _find_readers(self) -> PromptReaders:
        keys = matrix_paths(self.network, self._family)
        pixels = (self._resolution // LATENT_PIXELS) ** 2
        try:
            return self._readers_in(self._twin, keys, self._predict, self.encode, pixels)
        except NoReadersError as error:
            raise UnsupportedModelError(f"This model can't be erased from: {error}.") from error

    @functools.cached_property
    def identity(self) -> str:
        """See :class:`erase_core.model.denoiser.Denoiser`."""
        settings = [self.kind, self.family, str(self.dtype), *self._sampling_settings()]
        return model_identity(self.network, self._paths.values(), self._tables(), settings)

    def _sampling_settings(self) -> list[str]:
        """What else decides what the network is asked, as texts."""
        return [type(self.sampling).__name__, str(self.predicts_v)]

    def _tables(self) -> list[Tensor]:
        """What the sampling object computes with."""
        return [torch.as_tensor(self.sampling.sigmas).detach()]

    def encode(self, prompts: Sequence[str], together: bool = False) -> list[Encoded]:
        """See :class:`erase_core.model.denoiser.Denoiser`."""
        return self.text.encode(prompts, together)

    def token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """See :class:`erase_core.model.denoiser.Denoiser`."""
        return [self.text.token_ids(prompt) for prompt in prompts]

    def vocabulary(self) -> list[str]:
        """See :class:`erase_core.model.denoiser.Denoiser`."""
        return self.text.vocabulary()

    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        """See :class:`erase_core.model.denoiser.Denoiser`."""
        side = resolution // LATENT_PIXELS
        return (self._channels(), side, side)

    def _channels(self) -> int:
        return int(getattr(self._model, "latent_channels", None) or 4)

    def sigmas(self, steps: int) -> Tensor:
        """See :class:`erase_core.model.denoiser.Denoiser`. Even steps in time, as samplers take."""
        sampling = self.sampling
        ends = sampling.timestep(sampling.sigmas[-1]), sampling.timestep(sampling.sigmas[0])
        times = torch.linspace(float(ends[0]), float(ends[1]), steps)
        levels = torch.stack([torch.as_tensor(sampling.sigma(t)).cpu() for t in times]).float()
        return torch.cat([levels.flatten(), torch.zeros(1)])

    def noisy_latent(self, noise: Tensor, sigma: Tensor) -> Tensor:
        """See :class:`erase_core.model.denoiser.Denoiser`."""
        return noise * (1 + sigma.to(noise.device) ** 2).sqrt()

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """See :class:`erase_core.model.denoiser.Denoiser`."""
        return 1 + sigma.float() ** 2 if self.predicts_v else torch.ones_like(sigma.float())

    def predict_x0(
        self,
        x: Tensor,
        sigma: Tensor,
        prompts: Sequence[Encoded],
        edit: LowRankEdit | None = None,
    ) -> Tensor:
        """See :class:`erase_core.model.denoiser.Denoiser`. Raises the interrupt."""
        self._check()
        if self._family.joint and len({len(prompt.tokens) for prompt in prompts}) > 1:
            return self._by_length(x, sigma, prompts, edit)
        tokens = stack_tokens(prompts).to(self.device)
        with self._side_path.active(edit, [tokens, self._beside(prompts, len(x))["vector"]]):
            return self._predict(x, sigma, prompts)

    def _predict(self, x: Tensor, sigma: Tensor, prompts: Sequence[Encoded]) -> Tensor:
        """x0, as the network stands."""
        x, sigma = x.to(self.device), sigma.to(self.device)
        tokens = stack_tokens(prompts).to(self.device)
        with self._out_of_place():
            return self._apply(x, sigma, tokens, self._beside(prompts, len(x))).float()

    def _out_of_place(self, always: bool = False) -> contextlib.AbstractContextManager:
        in_place = self.adds_in_place or self._family.adds_in_place
        return OutOfPlace(always) if in_place else contextlib.nullcontext()

    def _by_length(
        self, x: Tensor, sigma: Tensor, prompts: Sequence[Encoded], edit: LowRankEdit | None
    ) -> Tensor:
        """One forward a length: in joint attention a repeated prompt would weigh more."""
        lengths = torch.tensor([len(prompt.tokens) for prompt in prompts])
        groups = [(lengths == length).nonzero().flatten() for length in lengths.unique()]
        parts = [
            self.predict_x0(x[group], sigma[group], [prompts[i] for i in group.tolist()], edit)
            for group in groups
        ]
        return torch.cat(parts)[torch.cat(groups).argsort().to(parts[0].device)]

    def _beside(self, prompts: Sequence[Encoded], count: int) -> dict[str, Tensor | None]:
        pooled, constants = stack_pooled(prompts), self._constants
        if pooled is not None and constants.vectors is not None:
            pooled = torch.cat([pooled, constants.vectors.expand(count, -1)], dim=1)
        guidance = constants.guidance
        return {
            "vector": None if pooled is None else pooled.to(self.device),
            "guidance": None if guidance is None else guidance.expand(count).to(self.device),
        }

    @functools.cached_property
    def _constants(self) -> Learned:
        return self.text.constants()

    def matrices(self) -> Mapping[str, Tensor]:
        """See :class:`erase_core.model.denoiser.Denoiser`."""
        return {name: self._numbers(path) for name, path in self._paths.items()}

    def _numbers(self, path: str) -> Tensor:
        layer: Any = self.network.get_submodule(path)  # of the host's own class
        weight = layer.weight.detach()
        scale = getattr(layer, "scale_weight", None)
        if weight.element_size() > 1 and scale is None:
            return _over(weight)
        numbers = weight.to(torch.float32)  # fp8, which has no arithmetic of its own
        return _over(numbers if scale is None else numbers * scale.detach().float())

    def weights(self) -> Iterator[Tensor]:
        """See :class:`erase_core.model.denoiser.Denoiser`."""
        yield from self._twin.parameters()
        yield from self._twin.buffers()

    def around_blocks(self, run: BlockRun) -> contextlib.AbstractContextManager[None]:
        """See :class:`erase_core.model.denoiser.Denoiser`."""
        kinds = {type(m) for m in self._twin.modules() if type(m).__name__ in BLOCKS}
        return blocks_run_by(self._twin, tuple(kinds), run, self._surroundings)

    def _surroundings(self) -> Callable[[], contextlib.AbstractContextManager]:
        """What a block needs around it that is gone once the prediction has ended."""
        edit_again = self._side_path.again()

        @contextlib.contextmanager
        def surroundings() -> Iterator[None]:
            with edit_again(), self._out_of_place(always=True):
                yield

        return surroundings

    def _check(self) -> None:
        self._interrupts()
        if self._current() is not self._model or _what_is_loaded(self._model) != self._loaded_as:
            raise ModelChangedError(
                f"Another model was put in place of {checkpoint_name(self._model) or 'this one'} "
                "while it was trained on. The training has ended and nothing was kept. Load the "
                "model again and train once more."
            )

    @functools.cached_property
    def _twin(self) -> nn.Module:
        with torch.inference_mode():
            self._load()
        twin = twin_network(self.network, _shared_things).eval()
        for module in twin.modules():
            # Host's LoRA code looks for its layers by this name.
            vars(module).pop("network_layer_name", None)
            # The last picture may have been one that can be tiled.
            if vars(module).get("padding_mode") == "circular":
                module.padding_mode = "zeros"  # type: ignore[assignment]
            # Their own checkpointing loses the gradient of what isn't an input of the block.
            for name in ("checkpoint", "use_checkpoint"):
                if isinstance(vars(module).get(name), bool):
                    setattr(module, name, False)
        return twin

    @functools.cached_property
    def _side_path(self) -> LowRankSidePath:
        layers = {name: self._twin.get_submodule(path) for name, path in self._paths.items()}
        precise = {name: _Precise(layer) for name, layer in layers.items()}
        side_path = LowRankSidePath(cast("Mapping[str, nn.Module]", precise))
        self._stack.callback(side_path.remove)
        return side_path


class _Precise:
    """A layer whose hooks run outside of autocast.

    Some of these hosts sample in autocast, which would round R and B: exact prompts would move.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def register_forward_hook(self, hook: Callable[..., Tensor | None]) -> Any:
        def precise(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not _in_autocast(output.device.type):
                return hook(layer, inputs, output)
            with torch.autocast(output.device.type, enabled=False):
                return hook(layer, inputs, output)

        return self._layer.register_forward_hook(precise)


def _in_autocast(device_type: str) -> bool:
    available = getattr(torch.amp, "is_autocast_available", None)
    if available is None:  # before PyTorch 2.4, whose functions ask for no device
        return torch.is_autocast_enabled() or torch.is_autocast_cpu_enabled()
    return available(device_type) and torch.is_autocast_enabled(device_type)


def checkpoint_name(sd_model: Any) -> str:
    """File name of the checkpoint; "" where the host doesn't say."""
    info = getattr(sd_model, "sd_checkpoint_info", None)
    name = getattr(info, "name", None) or getattr(info, "filename", None) or ""
    return str(name).replace("\\", "/").rpartition("/")[2]


def refuse_replaced(network: nn.Module) -> None:
    """A forward that another extension put in place of a layer's own can't be run in a twin.

    Raises:
        UnsupportedModelError: there is one.
    """
    for path, module in network.named_modules():
        forward = vars(module).get("forward")
        if forward is not None:
            where = getattr(forward, "__module__", None) or type(forward).__module__
            raise UnsupportedModelError(
                f"Another extension ({where}) has replaced how {path or 'the network'} works, so "
                "training would be for another model than the checkpoint. Switch it off, load the "
                "checkpoint again, and train then."
            )


def _what_is_loaded(sd_model: Any) -> object:
    """What the host says that it has loaded; it may load other weights into the same model."""
    info = getattr(sd_model, "sd_checkpoint_info", None)
    return getattr(info, "filename", info)


def _shared_things(module: nn.Module) -> list[Any]:
    found = []
    for name in _SHARED:
        value = vars(module).get(name)
        found += list(value) if isinstance(value, tuple) else [value]
    return [thing for thing in found if thing is not None]


def _over(weight: Tensor) -> Tensor:
    """The same numbers as a normal tensor over the same storage; a host's may be of inference."""
    normal = torch.empty(0, dtype=weight.dtype, device=weight.device)
    return normal.set_(
        weight.untyped_storage(), weight.storage_offset(), weight.size(), weight.stride()
    )
