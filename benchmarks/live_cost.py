"""What curve, pictures, events and the state that is kept cost beside a training step.

``python -m benchmarks.live_cost`` prints a table and writes ``results/live_cost.json``.

The SD1.5 U-Net at its real width with random weights, on the CPU. What is added is timed by itself
within the run of the steps, since it is far less than the steps differ among each other. Latents
and trained values have their real size, so that on a faster device the added time stays what it
is: the table says for which step it would be 2 %.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks.step_cost import RESOLUTION, loaded, trainer_on  # first: it finds the host

import torch  # isort: skip
from concept_surgery.erase_core import Meter, Preview, Progress, preset_settings  # isort: skip
from concept_surgery.erase_core.artefact.unfinished import Part, UnfinishedStore  # isort: skip
from concept_surgery.erase_core.run.meter import CurvePoint  # isort: skip
from concept_surgery.erase_core.run.plan import trajectory_counts  # isort: skip
from concept_surgery.erase_core.run.trainer import SurgeryTrainer  # isort: skip
from concept_surgery.nodes.live import EVENT_SECONDS, PICTURE_SECONDS, LiveRun  # isort: skip
from concept_surgery.nodes.previews import Previewer  # isort: skip

RESULT = Path(__file__).parent / "results" / "live_cost.json"
STEPS, TIMES = 6, 20
LATENT = (4, 64, 64)  # of a picture of 512 pixels


def seconds(action, times: int = TIMES) -> float:
    """The median time of an action."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        action()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def curve_and_steps(trainer: SurgeryTrainer) -> tuple[float, float]:
    """Seconds of a step, and of what it adds to the curve, within the same steps."""
    look, added, steps = SurgeryTrainer._look, [], []

    def timed_look(self, *given) -> None:
        began = time.perf_counter()
        look(self, *given)
        added[-1] += time.perf_counter() - began

    SurgeryTrainer._look = timed_look
    try:
        for _ in range(STEPS):
            added.append(0.0)
            began = time.perf_counter()
            trainer.step(torch.arange(2))
            steps.append(time.perf_counter() - began)
            began = time.perf_counter()
            trainer.left_and_drift()
            added[-1] += time.perf_counter() - began
    finally:
        SurgeryTrainer._look = look
    return statistics.median(steps[1:]), statistics.median(added[1:])


def sending(model) -> dict[str, float]:
    """Seconds of an event, and of a pair of pictures."""
    meter = Meter()
    run = LiveRun(
        "1", "graph", None, preset_settings("balanced", concepts="cat"), Previewer(model), meter
    )
    latents = torch.randn(2, *LATENT)
    curve = [CurvePoint(number, 1 / (1 + number), 0.1) for number in range(200)]
    progress = Progress("Training, step 20 of 48", 1, 2, 0.1, 0.5, 20, 48, 30.0, curve)

    def show() -> None:
        run._picture_at.clear()
        run.previewed(Preview("erased", *latents))

    def send() -> None:
        run._sent_at = 0.0
        run.progressed(progress)
        json.dumps(run.snapshot())  # which the host does with it

    show()
    return {"pair_of_pictures": seconds(show), "event": seconds(send)}


def state_kept(trainer: SurgeryTrainer) -> dict[str, float]:
    """Bytes and seconds of the state of a run with SD1.5's default settings, whole."""
    settings = preset_settings("balanced", concepts="cat")
    states = sum(trajectory_counts(settings)) * settings.sampling_steps
    tensors = {f"t{n}": torch.randn(states, *LATENT) for n in range(4)}
    with tempfile.TemporaryDirectory() as folder:
        store = UnfinishedStore(Path(folder))
        key = "ab" * 20
        sampled = Part({}, tensors)
        write = partial(store.__setitem__, f"{key}.training", sampled)
        once = seconds(write, 5)
        part = trainer.state()
        again = seconds(lambda: store.__setitem__(f"{key}.progress", trainer.state()), 5)
    return {
        "states_megabytes": round(sampled.size / 1e6, 1),
        "states_seconds": round(once, 3),
        "optimiser_megabytes": round(part.size / 1e6, 1),
        "optimiser_seconds": round(again, 3),
    }


def main() -> None:
    """Measure, print and write."""
    with torch.inference_mode(False), loaded(RESOLUTION) as denoiser:
        trainer = trainer_on(denoiser, RESOLUTION)
        step, curve = curve_and_steps(trainer)
        found = sending(denoiser._model)
        kept = state_kept(trainer)
    # Of each second of a run; the steps don't change that.
    shown = found["event"] / EVENT_SECONDS + found["pair_of_pictures"] / PICTURE_SECONDS
    share = curve / step + shown
    result = {
        "model": "SD1.5 U-Net, 4 levels, real width, random weights, float32, CPU",
        "resolution": RESOLUTION,
        "step_seconds": round(step, 3),
        "curve_seconds": round(curve, 6),
        "event_seconds": round(found["event"], 6),
        "pair_of_pictures_seconds": round(found["pair_of_pictures"], 6),
        "share_of_events_and_pictures": round(shown, 5),
        "share_of_a_step": round(share, 5),
        "step_of_which_the_curve_is_a_hundredth": round(100 * curve, 4),
        "state": kept,
        "state_share_at_most": 0.01,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
