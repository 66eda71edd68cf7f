"""The node that suggests other names of a concept, and neighbours to keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.utils
from comfy_api.v0_0_2 import io
from torch import Tensor

from ..erase_core import KINDS, SettingsError
from ..erase_core.method.suggest import Rank, Suggestion, by_table, neighbours_of, suggest
from ..erase_core.model.prompt import Encoded
from ..erase_core.settings.families import FLUX, SD3, SDXL
from ..erase_core.settings.texts import Concept, parse_concepts
from ..erase_core.settings.widgets import check_choice
from .encoding import batch_encoder, encode_null, encode_prompts
from .kinds import MATRIX
from .messages import id_of, preview, show_progress_text, shown
from .refusals import refusal
from .runs import refuse_without_clip
from .schema import CATEGORY, compatible
from .stores import language_store
from .tokens import row_ids
from .vocabulary import numbered_vocabulary


class SuggestNames(io.ComfyNode):
    """CLIP and concepts in; the same lines with other names, and neighbours, out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs as the host shows them."""
        return compatible(
            io.Schema,
            node_id="ConceptSurgerySuggest",
            display_name="Suggest Names",
            category=CATEGORY,
            description=(
                "Looks in the text encoder for other names of what you want to erase, and for "
                "near things that you may want to keep. Look through them before you use them."
            ),
            inputs=_inputs(),
            outputs=[
                io.String.Output("names", display_name="names"),
                io.String.Output("neighbours", display_name="neighbours"),
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, erase: str | None = None, kind: str = KINDS[0]) -> bool | str:
        """Refuse an empty or unreadable concept. Linked values are checked when they come."""
        try:
            check_choice("kind", kind, KINDS)
            if erase is not None:
                parse_concepts(erase)
        except SettingsError as error:
            return refusal(error, cls)
        return True

    @classmethod
    def execute(cls, clip, erase: str, kind: str = KINDS[0]) -> io.NodeOutput:
        """Read the words that are likely to be near, and say which are."""
        check_choice("kind", kind, KINDS)
        concepts = parse_concepts(erase)
        refuse_without_clip(clip)
        reader, found, cache = ClipReader(clip), [], language_store()
        for number, concept in enumerate(concepts):
            bar = _bar(number, len(concepts), cls)
            rank = ranked_by(clip, concept, reader.words)
            found.append(suggest(reader, concept, kind, rank, bar, cache))
        text = "\n".join(map(_said, found))
        show_progress_text("", None, id_of(cls))  # what is found stands in the text below
        names = "\n".join(one.line for one in found)
        return io.NodeOutput(shown(names), shown("\n".join(neighbours_of(found))), ui=preview(text))


class ClipReader:
    """The host's CLIP as the engine reads words with it."""

    def __init__(self, clip: Any) -> None:
        self._clip, self._streams = clip, _streams_of(clip)
        self.words = numbered_vocabulary(clip)
        self._together = batch_encoder(clip)

    def encode(self, prompts: Sequence[str], together: bool = False) -> list[Encoded]:
        """See :class:`erase_core.model.denoiser.Denoiser`."""
        return self._together(prompts) if together else encode_prompts(self._clip, prompts)

    def token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """See :class:`erase_core.model.denoiser.Denoiser`."""
        return [row_ids(self._clip, prompt, self._streams) for prompt in prompts]

    def vocabulary(self) -> list[str]:
        """See :class:`erase_core.model.denoiser.Denoiser`."""
        return list(self.words[1])


def ranked_by(clip, concept: Concept, words: tuple[str, Mapping[str, int]]) -> Rank | None:
    """How near words are likely to be to a concept, by the encoder's table of token embeddings.

    Words that have no token of their own come last. None where there is no such table.

    Args:
        words: the name of the encoder and its words with their ids.
    """
    name, ids = words
    table = _table(clip, name)
    return None if table is None else by_table(table, ids, concept)


def _table(clip, name: str) -> Tensor | None:
    """The token embeddings (words, width) of the encoder that a tokenizer is for."""
    encoder = getattr(getattr(clip, "cond_stage_model", None), name, None)
    give = getattr(getattr(encoder, "transformer", None), "get_input_embeddings", None)
    weight = getattr(give() if give else None, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != MATRIX:
        return None
    return weight if weight.is_floating_point() else None


def _streams_of(clip) -> Sequence[Sequence[str]]:
    """The tokenizers whose tokens are the rows that the CLIP gives; none if it can't be told."""
    rows = len(encode_null(clip).tokens)
    names = list(clip.tokenize(""))
    ways = [(), *(family.token_streams for family in (SDXL, SD3, FLUX)), *(((n,),) for n in names)]
    return next((way for way in ways if len(row_ids(clip, "", way)) == rows), ())


def _bar(number: int, count: int, node: Any) -> Callable[[int, int], None]:
    """Told how many words of one concept are read, shows how far all are."""
    bar = comfy.utils.ProgressBar(count)

    def show(done: int, total: int) -> None:
        bar.update_absolute(number + done / total, count)
        show_progress_text(f"Reading words, {done} of {total}", None, id_of(node))

    return show


def _said(found: Suggestion) -> str:
    """A suggestion in words."""
    names = ", ".join(found.names) or "none found"
    near = ", ".join(found.neighbours) or "none found"
    return f"{found.concept.text}: other names: {names}. Near things, to keep: {near}."


def _inputs() -> list[Any]:
    return [
        io.Clip.Input("clip", tooltip="The text encoder that you also use for your prompts."),
        io.String.Input(
            "erase",
            multiline=True,
            placeholder="what you want to erase, one a line",
            default="",
            tooltip="What you want to erase, as you would type it in Train Concept Erasure.",
        ),
        io.Combo.Input(
            "kind",
            options=list(KINDS),
            default=KINDS[0],
            tooltip="A thing, a style, a person, or tags as anime models use them.",
        ),
    ]
