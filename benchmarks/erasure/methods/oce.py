"""OCE, Orthogonal Concept Erasure (Sun et al. 2026, arXiv 2605.28902): the values are rotated.

For every value matrix W, with ``G`` the projection onto the span of ``W c_i`` of the concepts,
``G*`` the one of ``W a_i`` of their alternatives, ``p_j`` the prompts to preserve, all of them last
subject tokens, and ``C`` the second moment of the tokens of captions:

``W' = R W  with R the rotation of the largest <R, M>``
``M = -erase G (1 - G*) + preserve sum_j W p_j p_j^T W^T + language W C W^T + ridge W W^T``

From one SVD ``M = U S V^T`` it is ``R = U V^T``, with the last column of U turned round where that
would be a reflection. The concepts are widened to five phrasings. Without an alternative an object
goes to a single space, whose last subject token is the start token, and a style to "art".

All of this is read in the authors' code (github.com/HansSunY/OCE), and the settings in its scripts
for one object and one style, which name an alternative each ("sky" for airplane, "real" for Van
Gogh); of the paper only the abstract could be read. Here the plain captions of this project stand
for the 30,000 of COCO, and styles are phrased as UCE's are here. Two departures: the code turns the
last column of R round, which gives a rotation as well, but not that of the largest <R, M>; and its
QR makes up a direction where two concepts have the same alternative, which adds none here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from concept_surgery.erase_core.method.reading import plain_captions
from concept_surgery.erase_core.model.denoiser import Denoiser
from concept_surgery.erase_core.model.low_rank import LowRankEdit
from torch import Tensor

from benchmarks.erasure.cases import Case
from benchmarks.erasure.methods.base import Method, Outcome, last_subject_token
from benchmarks.erasure.methods.phrased import phrased
from benchmarks.erasure.methods.uce import PHRASINGS

ENCODE_BATCH = 16
SAME = 1e-5  # embeddings are float32: directions smaller than this are rounding


def span(rows: Tensor) -> Tensor:
    """The projection (width, width) onto the span of the rows (n, width)."""
    unit = torch.nn.functional.normalize(rows)
    _, sizes, directions = torch.linalg.svd(unit, full_matrices=False)
    basis = directions[sizes > SAME * sizes[0]]
    return basis.T @ basis


def wanted(
    weight: Tensor,
    sources: Tensor,
    targets: Tensor,
    preserved: Tensor,
    language: Tensor,
    scales: Mapping[str, float],
) -> Tensor:
    """M (out, out).

    Args:
        weight: W, (out, width).
        sources, targets: c_i and a_i, (n, width).
        preserved: p_j, (m, width).
        language: C, (width, width).
        scales: erase, preserve, language and ridge.
    """
    out = torch.eye(len(weight), dtype=weight.dtype)
    erased, instead = span(sources @ weight.T), span(targets @ weight.T)
    kept = scales["preserve"] * preserved.T @ preserved + scales["language"] * language
    kept = kept + scales["ridge"] * torch.eye(len(kept), dtype=kept.dtype)
    return weight @ kept @ weight.T - scales["erase"] * erased @ (out - instead)


def rotation(matrix: Tensor) -> Tensor:
    """The rotation R of the largest ``<R, M>``, (out, out)."""
    left, _, right = torch.linalg.svd(matrix)
    # Of the directions that could be reflected back, the last costs least.
    left[:, -1] *= torch.linalg.det(left @ right).sign()
    return left @ right


def train(denoiser: Denoiser, case: Case, seed: int, settings: Mapping[str, Any]) -> Outcome:
    """``settings``: erase and preserve by kind, language, ridge, phrasings (widened or not)."""
    pairs = [
        (c.text, c.alternative or ("art" if case.kind == "style" else "")) for c in case.concepts
    ]
    if settings["phrasings"]:
        pairs += [(f.format(e), f.format(a)) for e, a in pairs for f in PHRASINGS[case.kind]]
    sources, targets = (_last_tokens(denoiser, texts) for texts in zip(*pairs, strict=True))
    preserved = _last_tokens(denoiser, case.keep) if case.keep else sources[:0]
    language = language_moment(denoiser, plain_captions())
    scales = {name: settings[name] for name in ("language", "ridge")}
    scales |= {name: settings[name][case.kind] for name in ("erase", "preserve")}
    factors = {}
    for name, matrix in denoiser.matrices().items():
        if name.endswith("_to_v"):
            weight = matrix.double()
            turn = rotation(wanted(weight, sources, targets, preserved, language, scales))
            factors[name] = (turn @ weight - weight).float()
    return Outcome(LowRankEdit.shared(torch.eye(sources.shape[1]), factors))


def language_moment(denoiser: Denoiser, captions: Sequence[str]) -> Tensor:
    """C (width, width): the mean of ``c c^T`` over the captions' tokens without the padding."""
    total, count = 0.0, 0
    for start in range(0, len(captions), ENCODE_BATCH):
        batch = captions[start : start + ENCODE_BATCH]
        for ids, prompt in zip(denoiser.token_ids(batch), denoiser.encode(batch), strict=True):
            rows = prompt.tokens[: ids.index(ids[-1]) + 1].double()  # to the first end token
            total, count = total + rows.T @ rows, count + len(rows)
    return total / count


def _last_tokens(denoiser: Denoiser, texts: Sequence[str]) -> Tensor:
    return torch.stack([last_subject_token(denoiser, text) for text in texts])


def _erase(part: float) -> dict[str, float]:
    return {kind: part * scale for kind, scale in PUBLISHED["erase"].items()}


PUBLISHED = {
    "erase": {"object": 2000.0, "style": 500.0},
    "preserve": {"object": 0.0, "style": 1.0},
    "language": 10.0,
    "ridge": 10.0,
    "phrasings": True,
}
CAPTIONS = "../../../erase_core/data/captions.txt"
OCE = Method("oce", train, PUBLISHED, "key-value", ("oce.py", "uce.py", CAPTIONS))
OCE_PHRASED = phrased(OCE.with_settings(OCE.name, phrasings=False))
PRESERVING = {"preserve": {"object": 5.0, "style": 5.0}}  # as in the code's script for celebrities
PHRASED_GRID = ({}, {"erase": _erase(0.1)}, {"erase": _erase(0.03)}, PRESERVING)
GRID = (*PHRASED_GRID, {"phrasings": False}, {"phrasings": False, "erase": _erase(0.1)})
