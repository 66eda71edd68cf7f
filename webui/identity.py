"""Recognising the host's model again after a restart: everything that training sees of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..erase_core.artefact.identity import Digest, bytes_on_cpu, middle_bytes, word_sums

# Of a weight that is not trained, a few kilobytes from its middle: another checkpoint, or a merge
# of two, differs everywhere.
SAMPLED_BYTES = 4096


def model_identity(
    network: nn.Module, trained: Collection[str], tables: Iterable[Tensor], settings: Sequence[str]
) -> str:
    """A name for what training sees of a network; the same whenever it is loaded again.

    Args:
        network: the host's, with nothing merged into it.
        trained: paths of the layers whose matrices train; they count byte for byte.
        tables: what turns noise levels into times.
        settings: what else decides how it is asked, as texts.
    """
    digest, wanted = Digest(), {f"{path}.weight" for path in trained}
    digest.add("webui", repr([type(network).__name__, *settings]).encode())
    labels, parts = [], []
    with torch.inference_mode():
        for key, weight in sorted(network.state_dict().items()):
            labels.append(f"{key} {weight.dtype} {tuple(weight.shape)}")
            whole = key in wanted
            parts.append(word_sums(weight) if whole else middle_bytes(weight, SAMPLED_BYTES))
        for number, table in enumerate(tables):
            labels.append(f"table {number}")
            parts.append(word_sums(table))
        for label, data in zip(labels, bytes_on_cpu(parts), strict=True):
            digest.add(label, data)
    return digest.hexdigest()
