"""The methods by name: ours and its peers, each as published and as tuned."""

from __future__ import annotations

from benchmarks.erasure.methods import esd, ileco, leco, ours, speed, uce
from benchmarks.erasure.methods.base import Method
from benchmarks.erasure.methods.phrased import PHRASED

PEERS = (esd.X, esd.X_STRICT, ileco.ILECO, uce.UCE, speed.SPEED, *PHRASED, leco.LECO)
METHODS: dict[str, Method] = {method.name: method for method in (*ours.METHODS, *PEERS)}
