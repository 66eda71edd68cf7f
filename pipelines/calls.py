"""What a pipeline asks of its network, noted by stand-ins for its parts, and asked again."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..erase_core.model.prompt import Encoded, stack_pooled, stack_tokens
from ..erase_core.settings.texts import SettingsError
from .networks import PipelineError, slot_of

PICTURES, TIME, TOKENS = ("sample", "hidden_states"), "timestep", "encoder_hidden_states"
MASKS = ("encoder_attention_mask", "encoder_hidden_states_mask")
POOLED = ("pooled_projections", "text_embeds")
PROBE = "one small probe"  # longer than the empty prompt, so that what pads it is masked
SMALL = 64  # side in pixels of the picture that is never drawn while prompts are encoded
_ESCAPED = re.compile(r"\\([()])")
FEW = 4  # steps of the sampling that shows how a pipeline tells its network the time


def as_read(prompt: str) -> str:
    """A prompt for a pipeline, which knows no emphasis: its brackets without the backslash.

    The engine writes brackets as hosts with emphasis read them, for example those of a tag.
    """
    return _ESCAPED.sub(r"\1", prompt)


@dataclass(frozen=True)
class Reader:
    """A tokenizer as the pipeline uses it: what it writes around a prompt, and how it pads."""

    name: str
    tokenizer: Any
    around: tuple[str, str]
    options: Mapping[str, Any]

    def ids(self, prompts: Sequence[str], padded: bool) -> list[list[int]]:
        """Token ids of each prompt, with the padding or without."""
        found = self.tokenizer([self._text(p) for p in prompts], **self.options)
        rows = [torch.as_tensor(row).tolist() for row in found["input_ids"]]
        if padded:
            return rows
        masks = [torch.as_tensor(mask).tolist() for mask in found["attention_mask"]]
        return [
            [i for i, on in zip(*one, strict=True) if on] for one in zip(rows, masks, strict=True)
        ]

    def refuse_cut(self, prompts: Sequence[str]) -> None:
        """Raises :class:`SettingsError` for a prompt that doesn't fit whole."""
        most = self.options.get("max_length") or self.tokenizer.model_max_length
        texts = [self._text(prompt) for prompt in prompts]
        found = self.tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        for prompt, ids in zip(prompts, found, strict=True):
            if len(ids) > most:
                raise SettingsError(
                    f"A prompt has {len(ids)} tokens, and {self.name} of this pipeline reads "
                    f"{most} of them and drops the rest: {prompt[:60]!r}. Shorten it."
                )

    def _text(self, prompt: str) -> str:
        return self.around[0] + as_read(prompt) + self.around[1]


class _StandIn:
    """A part of a pipeline that is called in another way."""

    def __init__(self, part: Any, called: Callable[..., Any]) -> None:
        self._part, self._called = part, called

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._called(*given, **named)


class _Enough(Exception):
    """Ends the call of a pipeline that has shown all that was to be seen."""


@dataclass
class Notes:
    """What the stand-ins were given, call by call.

    Attributes:
        asked: arguments of the network by name.
        answered: what it was made to say.
        stepped: what the scheduler then got: the network's answer as it takes it, and the time.
        readers: the tokenizers that were used.
        scheduler: the one that was used, with the schedule it was set to.
    """

    scheduler: Any
    asked: list[dict[str, Any]] = field(default_factory=list)
    answered: list[Tensor] = field(default_factory=list)
    stepped: list[tuple[Tensor, float]] = field(default_factory=list)
    readers: dict[str, Reader] = field(default_factory=dict)

    @property
    def mask(self) -> str:
        """The argument that says which rows of the prompts count, (n, tokens); "" if all do."""
        return next((name for name in MASKS if self.asked[0].get(name) is not None), "")

    def encoded(self) -> list[Encoded]:
        """The prompts as the network gets them."""
        tokens, mask = self.asked[0][TOKENS].float().cpu(), self.asked[0].get(self.mask)
        flat = {**self.asked[0], **(self.asked[0].get("added_cond_kwargs") or {})}
        pooled = next((flat[name].float().cpu() for name in POOLED if name in flat), None)
        return [
            Encoded(
                (rows if mask is None else rows[mask[n].cpu().bool()]).clone(),
                None if pooled is None else pooled[n].clone(),
            )
            for n, rows in enumerate(tokens)
        ]


def ask(
    pipe: Any, network: Any, prompts: Sequence[str], size: int, steps: int | None = None
) -> Notes:
    """Call a copy of a pipeline with stand-ins, which predicts nothing and draws nothing.

    Args:
        network: whose configuration the copy sees.
        size: side of the picture in pixels.
        steps: how many the sampler is to plan, of which two are noted; None ends it at the first.

    Raises:
        PipelineError: the pipeline refuses, or asks its network for what isn't known here.
    """
    asked, notes = copy.copy(pipe), Notes(copy.deepcopy(pipe.scheduler))
    signature, step = inspect.signature(network.forward), notes.scheduler.step

    def called(*given: Any, **named: Any) -> tuple[Tensor]:
        notes.asked.append(dict(signature.bind(*given, **named).arguments))
        if steps is None:
            raise _Enough
        notes.answered.append(_some_answer(_picture(notes.asked[-1])[1], network.config))
        return (notes.answered[-1],)

    def stepped(output: Tensor, time: Any, *given: Any, **named: Any) -> Any:
        notes.stepped.append((output, float(time)))
        if len(notes.stepped) == 2:
            raise _Enough
        return step(output, time, *given, **named)

    notes.scheduler.step = stepped
    parts = vars(asked)  # not by assignment, which a pipeline writes into its configuration
    parts |= {"scheduler": notes.scheduler, slot_of(pipe): _StandIn(network, called)}
    parts |= {name: _reading(pipe, name, notes) for name in _tokenizers(pipe)}
    asked.set_progress_bar_config(disable=True)
    try:
        with suppress(_Enough), _quiet():
            asked(**_keywords(pipe, network, prompts, size, steps or 1))
    except ValueError as error:
        raise PipelineError(f"{type(pipe).__name__} refuses what it is asked: {error}") from error
    if not notes.asked or len(notes.asked[0].get(TOKENS, ())) != len(prompts):
        raise PipelineError(
            f"{type(pipe).__name__} doesn't give its network one prompt for each picture, as "
            "pipelines that draw from a text do. Load such a pipeline."
        )
    return notes


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what diffusers remarks on each call: it is asked a thousand times."""
    before = logging.get_verbosity()
    logging.set_verbosity(max(before, logging.ERROR))
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _keywords(pipe: Any, network: Any, prompts: Sequence[str], size: int, steps: int) -> dict:
    """What a pipeline is called with: one prediction for each prompt, and nothing random."""
    known = inspect.signature(pipe.__call__).parameters
    wanted = {
        "prompt": [as_read(prompt) for prompt in prompts],
        "height": size,
        "width": size,
        "num_inference_steps": steps,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
        "use_resolution_binning": False,
    }
    embeds = ("guidance_embeds", "time_cond_proj_dim")  # of networks that read the scale
    scale = known.get("guidance_scale")
    if scale and scale.default and not any(network.config.get(name) for name in embeds):
        wanted["guidance_scale"] = 1.0
    return {name: value for name, value in wanted.items() if name in known}


def _tokenizers(pipe: Any) -> list[str]:
    names = (f"tokenizer{end}" for end in ("", "_2", "_3", "_4"))
    return [name for name in names if getattr(pipe, name, None) is not None]


def _reading(pipe: Any, name: str, notes: Notes) -> _StandIn:
    """A tokenizer that notes how it is used first; pipelines look again at what was cut."""
    tokenizer = getattr(pipe, name)

    def called(texts: Any = None, *given: Any, **named: Any) -> Any:
        if name not in notes.readers and texts:
            last = texts if isinstance(texts, str) else texts[-1]
            before, _, after = last.partition(PROBE)
            around = (before, after) if PROBE in last else ("", "")
            notes.readers[name] = Reader(name, tokenizer, around, dict(named))
        return tokenizer(texts, *given, **named)

    return _StandIn(tokenizer, called)


def _picture(arguments: Mapping[str, Any]) -> tuple[str, Tensor]:
    name = next(name for name in PICTURES if name in arguments)
    return name, arguments[name]


def _some_answer(picture: Tensor, config: Mapping[str, Any]) -> Tensor:
    """What could be an answer of the network, with twice the channels where it tells a variance."""
    doubled = picture.ndim == 4 and config.get("out_channels") == 2 * config.get("in_channels", 0)
    answer = torch.linspace(1, 2, picture.numel()).view(picture.shape).to(picture)
    return torch.cat([answer, 2 * answer], 1) if doubled else answer


@dataclass(frozen=True)
class Call:
    """A pipeline's call of its network, to be made again with other values.

    Attributes:
        arguments: of a call for one picture.
        picture: name of that one among them.
        time: the network's by the scheduler's: a factor, and what is added.
        sign: of the network's answer in the scheduler's eyes.
        mask: name of the argument that says which rows of a prompt count, and of what type it is;
            None for pipelines whose prompts are all equally long.
    """

    arguments: Mapping[str, Any]
    picture: str
    time: tuple[float, float]
    sign: int
    mask: tuple[str, torch.dtype] | None

    @classmethod
    def of(cls, notes: Notes, mask: tuple[str, torch.dtype] | None) -> Call:
        """From two steps of a sampling.

        Raises:
            PipelineError: the scheduler isn't given what the network says.
        """
        name, picture = _picture(notes.asked[0])
        (taken, at), (_, later) = notes.stepped
        said = notes.answered[0][:, : taken.shape[1]].to(taken)
        sign = -1 if torch.equal(said, -taken) else 1
        if len(picture) != 1 or not torch.equal(said, sign * taken):
            raise PipelineError(
                "This pipeline changes what its network says before it draws from it, in a way "
                "that isn't known here. Erase on another pipeline of the same model."
            )
        told = [float(torch.as_tensor(one[TIME]).flatten()[0]) for one in notes.asked[:2]]
        factor = (told[0] - told[1]) / (at - later)
        return cls(notes.asked[0], name, (factor, told[0] - factor * at), sign, mask)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a latent as the engine takes it, three sizes; packed ones have a first of 1."""
        shape = tuple(self.arguments[self.picture].shape[1:])
        return (1,) * (3 - len(shape)) + shape

    def again(
        self, network: nn.Module, x: Tensor, time: Tensor, prompts: Sequence[Encoded]
    ) -> Tensor:
        """What the network says of other pictures, float32.

        Args:
            x: (n, *shape), as the network takes it.
            time: (n,), the scheduler's.
            prompts: one for each picture.
        """
        own = self.arguments[self.picture]
        given = {name: _for_each(value, len(x)) for name, value in self.arguments.items()}
        given[self.picture] = x.reshape(len(x), *own.shape[1:]).to(own)
        given[TIME] = self.time[0] * time + self.time[1]
        given |= self._prompts(prompts)
        pooled = stack_pooled(prompts)
        for arguments in (given, given.get("added_cond_kwargs") or {}):
            for name in POOLED:
                if pooled is not None and name in arguments:
                    arguments[name] = pooled.to(arguments[name])
        said = network(**given)[0]
        return self.sign * said[:, : own.shape[1]].reshape(x.shape).float()

    def _prompts(self, prompts: Sequence[Encoded]) -> dict[str, Any]:
        own = self.arguments[TOKENS]
        if self.mask is None:
            return {TOKENS: stack_tokens(prompts).to(own)}
        name, kind = self.mask
        tokens = pad_sequence([prompt.tokens for prompt in prompts], batch_first=True)
        counted = pad_sequence([torch.ones(len(p.tokens)) for p in prompts], batch_first=True)
        return {TOKENS: tokens.to(own), name: counted.to(own.device, kind)}


def _for_each(value: Any, count: int) -> Any:
    """An argument of a call for one picture, for several."""
    if isinstance(value, Mapping):
        return {name: _for_each(part, count) for name, part in value.items()}
    if isinstance(value, Tensor) and value.ndim and len(value) == 1:
        return value.expand(count, *value.shape[1:])
    return value * count if isinstance(value, list) and len(value) == 1 else value
