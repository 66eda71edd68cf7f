"""The judge of pictures: which object, which style, and whether it is a picture at all.

A picture is intact when a real one is nearer to it, in the classifier's features, than nine of ten
real ones are to their own nearest: precision with one neighbour and one common radius. The usual
radii, one for each real picture by its k-th neighbour, reach from one motif to the next: with them
most of what is put together from two real pictures passes, and much of decoded noise.
``shortcuts.py`` measures both, on unseen real pictures and on several kinds of rubbish.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from benchmarks.emoji.autoencoder import to_input
from benchmarks.emoji.classifier import NAMES, PATH, Classifier, load_classifier
from benchmarks.emoji.data import SIZE, empty_page, training_pictures
from benchmarks.emoji.words import STYLE_NAMES
from benchmarks.erasure.metrics import nearest_distances, neighbourhood_radii

QUANTILE = 0.9  # of the distances between real pictures
VARIANTS = 3  # of each real picture in the manifold


@dataclass(frozen=True)
class Verdicts:
    """What the judge says of n pictures.

    Attributes:
        names, styles: what it takes them for.
        features: (n, 128).
    """

    names: list[str]
    styles: list[str]
    features: np.ndarray


class Judge:
    """The classifier, and the real pictures' features as the manifold of what can be drawn.

    The empty page is among them: what a prompt that names nothing asks for.

    Args:
        model: the classifier.
        real: features (n, 128) of real pictures.
        identity: a name for both, for the key of results.
    """

    def __init__(self, model: Classifier, real: np.ndarray, identity: str = "") -> None:
        self._model = model
        self.real, self.identity = real, identity

    @classmethod
    def of(cls, decode_again, folder: Path) -> Judge:
        """The trained classifier with real pictures as the model's autoencoder draws them.

        Args:
            decode_again: pictures uint8 (n, 64, 64, 3) to the same, encoded and decoded.
            folder: where their features are kept.
        """
        model, pages = load_classifier(PATH), training_pictures(VARIANTS, seed=11)
        nothing = np.broadcast_to(empty_page(), (VARIANTS, SIZE, SIZE, 3))
        pages = np.concatenate([pages.reshape(-1, SIZE, SIZE, 3), nothing])
        probe = hashlib.sha256(decode_again(pages[:1]).tobytes() + PATH.read_bytes()).hexdigest()
        kept = folder / f"real-{VARIANTS}-{probe[:16]}.npy"
        if not kept.exists():
            folder.mkdir(parents=True, exist_ok=True)
            np.save(kept, cls(model, np.zeros((2, 1))).judge(decode_again(pages)).features)
        return cls(model, np.load(kept), probe[:16])

    @torch.no_grad()
    def judge(self, pages: np.ndarray) -> Verdicts:
        """Verdicts on pictures uint8 (n, 64, 64, 3)."""
        names, styles, features = [], [], []
        for part in np.array_split(pages, -(-len(pages) // 64)):
            found = self._model.features(to_input(part, torch.device("cpu")))
            names += [NAMES[n] for n in self._model.name(found).argmax(1).tolist()]
            styles += [STYLE_NAMES[n] for n in self._model.style(found).argmax(1).tolist()]
            features.append(found.numpy())
        return Verdicts(names, styles, np.concatenate(features))

    @cached_property
    def radius(self) -> float:
        """How near a real picture must be."""
        return float(np.quantile(neighbourhood_radii(self.real, 1), QUANTILE))

    def distances(self, features: np.ndarray) -> np.ndarray:
        """From each picture to the nearest real one, (n,); up to the radius it is intact."""
        return nearest_distances(features, self.real).min(1)
