"""Other names of what is to be erased, and near things to keep, from the host's text encoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..erase_core import KINDS, EraseSettings
from ..erase_core.method.suggest import Rank, Suggestion, by_table, neighbours_of, suggest
from ..erase_core.settings.texts import Concept, parse_concepts
from ..erase_core.settings.widgets import check_choice
from . import host

JOB = "Concept Surgery: names"


def suggestions(erase: Any, kind: Any) -> tuple[str, str]:
    """The lines under "erase" with the names that were found, and neighbours, one a line.

    Raises:
        SettingsError: nothing to erase, or lines that can't be read.
        UnsupportedModelError: the host has no model, or one that isn't known.
        InterruptedByUserError: the host's Interrupt was pressed.
    """
    check_choice("kind", kind, KINDS)
    concepts = parse_concepts(erase)
    found = host.in_turn(JOB, lambda: _found(concepts, kind))
    return "\n".join(one.line for one in found), "\n".join(neighbours_of(found))


def _found(concepts: tuple[Concept, ...], kind: str) -> list[Suggestion]:
    sd_model = host.loaded_model()

    def told(done: int, total: int) -> None:
        host.check_interrupted()
        host.show_progress("Reading words", done, total)

    with host.where_gradients_are(), host.without_networks(sd_model):
        with host.denoiser_of(sd_model, 1, EraseSettings.resolution, None) as reader:
            return [
                suggest(reader, concept, kind, _rank(reader.text, concept), told)
                for concept in concepts
            ]


def _rank(text: Any, concept: Concept) -> Rank | None:
    ids = text.numbered_vocabulary()
    table = _table(text.engine, max(ids.values(), default=0))
    return None if table is None else by_table(table, ids, concept)


def _table(engine: Any, last: int) -> Tensor | None:
    """The token embeddings of an encoder: the first table with a row for every token.

    Args:
        last: the largest token's number.
    """
    # Some encoders are modules, others are objects that have one.
    for holder in (engine, *vars(engine).values()):
        modules = holder.modules() if isinstance(holder, nn.Module) else ()
        for module in modules:
            if isinstance(module, nn.Embedding) and len(module.weight) > last:
                return module.weight
    return None
