"""The technique of the benchmark eval-unlearn, as that finds and calls it."""

from __future__ import annotations

import os
import subprocess

import numpy as np
import pytest
from concept_surgery.pipelines.unlearning import ConceptSurgeryTechnique

SIZES = {"height": 64, "width": 64, "num_inference_steps": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(_sd1, finished, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    _sd1.save_pretrained(path / "small")
    finished.save(path / "no_cat.safetensors")
    return path


def test_it_draws_what_the_pipeline_draws_without_the_concept(folder, sd1, finished):
    technique = ConceptSurgeryTechnique(
        model_id=str(folder / "small"), load_path=str(folder / "no_cat.safetensors"), **SIZES
    )
    one, two = technique.generate(["a cat", "a cat"], seed=3)
    (again,) = technique.generate(prompts=["a cat"], seed=4)
    assert np.asarray(two).shape == (64, 64, 3)
    assert np.array_equal(two, again) and not np.array_equal(one, two)


@pytest.mark.skipif(
    not os.environ.get("EVAL_UNLEARN_PYTHON"), reason="EVAL_UNLEARN_PYTHON names no Python with it"
)
def test_the_benchmark_finds_it_and_scores_it(folder, tmp_path):
    """In an environment with eval-unlearn and the wheel; its free_run takes what we export."""
    script = tmp_path / "score.py"
    script.write_text(_SCRIPT.format(folder=str(folder)), "utf-8")
    python = os.environ["EVAL_UNLEARN_PYTHON"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [python, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines()[-1] == "same"


_SCRIPT = """
import numpy as np
from diffusers import DiffusionPipeline
from concept_surgery.pipelines import Erasure
from eval_unlearn.registry import register_metric
from eval_unlearn.runners import SingleBenchmarkRunner
from eval_unlearn.types import Dataset, MetricResult

FOLDER = {folder!r}
seen = []


@register_metric("brightness")
class Brightness:
    def load_dataset(self):
        return [Dataset(["a cat", "a dog"], {{"source": "two prompts"}})]

    def update(self, images, prompts, metadata):
        seen.append([np.asarray(image.convert("RGB"), float) for image in images])

    def compute(self):
        return MetricResult("brightness", float(np.mean(seen[-1])))


def score(technique, **config):
    runner = SingleBenchmarkRunner(technique, "brightness", config, output_dir="results", seed=1)
    return runner.run()


pipe = DiffusionPipeline.from_pretrained(f"{{FOLDER}}/small")
erasure = Erasure.load(f"{{FOLDER}}/no_cat.safetensors")
erasure.merged(pipe).save_pretrained("exported")
options = {{"num_inference_steps": 2, "device": "cpu"}}
ours = {{"model_id": f"{{FOLDER}}/small", "load_path": f"{{FOLDER}}/no_cat.safetensors"}}
score("concept_surgery", **ours, **options)
score("free_run", model_id="exported", **options)
apart = max(np.abs(a - b).max() for a, b in zip(*seen))
print("same" if apart <= 1 else apart)
"""
