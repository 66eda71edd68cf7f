"""Real servers that are interrupted, killed and run side by side: nothing is lost or half there."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
from concept_surgery.erase_core import Erasure
from concept_surgery.erase_core.artefact.results import ResultStore

from tools import graphs
from tools.environment import BUILD
from tools.host import ComfyHost, HostError, place

from .test_http import predictions
from .test_results import toy_erasure

CHECKPOINT = "one-level.safetensors"
# Starting a server and reading prompts take longer than all the rest. HOST_CRASHES=1 is for who
# changes how files are written or how a run ends.
ALL = bool(os.environ.get("HOST_CRASHES"))
INTERRUPTS, KILLS, PAIRS = (20, 20, 8) if ALL else (3, 1, 8)
SHORT = {"steps": 2, "trajectories": 4, "resolution": 32, "captions": 8, "protection": 1.0}
SHORT |= {"templates": "a photo of a {}", "stored_result": "train again"}


def trained_and_saved(seed: int, filename: str = "erasure") -> graphs.Graph:
    graph = graphs.loader(CHECKPOINT) | graphs.save(filename=filename)
    return graph | graphs.train(erase="cat => dog", training_seed=seed, **SHORT)


def files_of(host: ComfyHost, folder: str, begins: str = "") -> dict[str, Erasure]:
    """Every file with a name that a person would look for, read; a damaged one is an error.

    Args:
        begins: what their names begin with, where other tests use the same server.
    """
    paths = Path(host.work / folder).glob(f"**/{begins}*.safetensors")
    return {path.name: Erasure.load(path) for path in paths}


def test_interrupts_at_every_stage_leave_nothing_behind(server):
    untouched = predictions(server, "a cat")
    stages = []

    def note(event):
        if event["type"] == "progress_text":
            stages.append(event["data"]["text"])

    server.run(trained_and_saved(7, "crash-whole"), on_progress=note)
    whole = files_of(server, "models/loras", "crash")["crash-whole.safetensors"]
    stored = len(files_of(server, "user/concept_surgery/results"))
    interrupted = 0
    for number in range(INTERRUPTS):
        wanted, seen = 1 + number * len(stages) // INTERRUPTS, 0

        def press(event, wanted=wanted):
            nonlocal seen
            seen += event["type"] == "progress_text"
            if seen == wanted:
                server.interrupt()
                seen += 1

        # Another seed each time, or the host would take the node's result out of its cache.
        graph = trained_and_saved(100 + number, f"crash-{number}")
        entry = server.wait(server.queue(graph), 60, press)
        messages = dict(entry["status"]["messages"])
        assert "execution_error" not in messages
        interrupted += "execution_interrupted" in messages
    assert interrupted >= INTERRUPTS // 2  # some come after the last step
    finished = INTERRUPTS - interrupted
    assert len(files_of(server, "user/concept_surgery/results")) == stored + finished
    assert predictions(server, "a cat") == untouched
    server.free()
    server.run(trained_and_saved(7, "crash-again"))
    again = files_of(server, "models/loras", "crash")["crash-again.safetensors"]
    assert again.identity == whole.identity


def started(work: Path, checkpoint: Path, name: str) -> ComfyHost:
    log = BUILD / "logs" / f"host-crashes-{name}.log"
    return ComfyHost(work, checkpoints=[checkpoint], log=log)


def test_a_killed_server_leaves_whole_files_and_the_next_one_works(
    tmp_path, checkpoint, language_folder
):
    place(language_folder, tmp_path / "user" / "concept_surgery" / "language")
    draw, complete = random.Random(0), []
    for number in range(KILLS):
        with started(tmp_path, checkpoint, "killed") as host:
            if not complete:  # how long it takes, and what it gives
                began = time.monotonic()
                host.run(trained_and_saved(3, "whole"))
                took = time.monotonic() - began
            prompt_id = host.queue(trained_and_saved(3, f"killed-{number}"))
            time.sleep(draw.uniform(0, took))
            host.kill()
            with pytest.raises(HostError):
                host.wait(prompt_id, 1)
        complete = files_of(host, "models/loras")
        assert "whole.safetensors" in complete
        files_of(host, "user/concept_surgery/results")
    assert len({erasure.identity for erasure in complete.values()}) == 1
    results = ResultStore(host.work / "user/concept_surgery/results")
    assert all(key in results for key in results) and len(results) == 1


def test_of_two_servers_that_save_under_one_name_both_keep_their_erasure(tmp_path, checkpoint):
    erasure = toy_erasure()
    erasures = [erasure, twin_of(erasure)]
    with started(tmp_path, checkpoint, "one") as one, started(tmp_path, checkpoint, "two") as two:
        for number, erasure in enumerate(erasures):
            erasure.save(one.models("loras") / f"from-{number}.safetensors")
        for number in range(PAIRS):
            name, asked = f"pair-{number}", []
            for source, host in enumerate((one, two)):
                graph = graphs.load(filename=f"from-{source}.safetensors")
                graph |= graphs.save(filename=name, erasure=("load", 0))
                asked.append((host, host.queue(graph)))
            ends = [host.wait(prompt_id, 300)["status"]["status_str"] for host, prompt_id in asked]
            assert ends == ["success", "success"]
            saved = {
                file: erasure.identity
                for file, erasure in files_of(one, "models/loras").items()
                if file.startswith(name)
            }
            assert len(saved) == len(set(saved.values())) == 2, saved


def twin_of(erasure: Erasure) -> Erasure:
    """Another erasure of the same concept."""
    factors = {name: 0.5 * factor for name, factor in erasure.factors.items()}
    return Erasure(erasure.bases, factors, erasure.record)
