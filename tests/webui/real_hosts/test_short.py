"""One short training in whatever host and with whatever arguments: it ends well, or says why not.

Quick enough to be run once for each kind of host, and for each of its ways to save memory.
"""

from __future__ import annotations

import numpy as np
import pytest

from . import surgery
from .comfy_side import PROMPTS
from .conftest import ARGUMENTS, new_host

CAT = PROMPTS[0]


def test_a_short_training_works_and_the_host_is_as_it_was(tmp_path):
    with new_host(tmp_path / "short", browser=False) as host:
        untouched, weights = host.draw(CAT), host.weights()
        state = host.get("/probe/state")
        number = surgery.start(host, **surgery.SHORT)
        told = surgery.follow(host, number)
        assert np.array_equal(host.draw(CAT), untouched)
        assert host.weights() == weights
        assert host.get("/probe/state") == state
        said = {key: told.get(key) for key in ("state", "message", "step")}
        print(f"{host.kind} {' '.join(ARGUMENTS)}: {said}, started in {host.start_seconds:.0f} s")
        print(f"cost of the start: {host.get('/probe/costs')}")
        if told["state"] != "done":
            assert ARGUMENTS, told  # with nothing asked for there is nothing to refuse
            assert told["state"] == "failed" and told["message"].endswith("."), told
            assert "Error:" not in told["message"], told
            pytest.skip(f"refused: {told['message']}")
        saved = surgery.save(host, number, "short")
        tagged = host.draw(f"{CAT} {saved['tag']}")
        assert not np.array_equal(tagged, untouched)
        drawn, info = host.drawn(CAT, **surgery.accordion("short"))
        assert np.array_equal(drawn, tagged) and "Concept Surgery: short" in info
        assert np.array_equal(host.draw(CAT), untouched)
        print(surgery.report(host, number)["text"][:600])
