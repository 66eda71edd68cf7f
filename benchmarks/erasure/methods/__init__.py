"""The methods by name: ours and its peers, each as published and as tuned."""

from __future__ import annotations

from benchmarks.erasure.methods import cure, esd, ileco, leco, oce, ours, rece, speed, uce
from benchmarks.erasure.methods.base import Method
from benchmarks.erasure.methods.phrased import PHRASED

CLOSED = (uce.UCE, speed.SPEED, oce.OCE, cure.CURE, rece.RECE)
TOLD = (*PHRASED, oce.OCE_PHRASED, cure.CURE_PHRASED, rece.RECE_PHRASED)
PEERS = (esd.X, esd.X_STRICT, ileco.ILECO, *CLOSED, *TOLD, leco.LECO)
METHODS: dict[str, Method] = {method.name: method for method in (*ours.METHODS, *PEERS)}
