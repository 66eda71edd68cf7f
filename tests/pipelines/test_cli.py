"""The command concept-surgery, on a folder and on a single file."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from concept_surgery.pipelines import Erasure
from concept_surgery.pipelines.cli import main
from concept_surgery.pipelines.loading import load_pipeline
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from tools.environment import ROOT

from .conftest import at_length
from .single_file import as_single_file, same_weights, sd1_with_its_autoencoder
from .small import latents

SETTINGS = ["captions=8", "trajectories=2", "sampling_steps=3", "templates=a photo of {}"]
QUICKLY = ["--resolution", "64", *(f"--set={pair}" for pair in SETTINGS)]


@pytest.fixture(scope="module")
def folder(_sd1, tmp_path_factory) -> Path:
    """The shrunken SD1 as a folder of diffusers."""
    path = tmp_path_factory.mktemp("model") / "small"
    _sd1.save_pretrained(path)
    return path


@pytest.fixture
def file(finished, tmp_path) -> Path:
    path = tmp_path / "no_cat.safetensors"
    finished.save(path)
    return path


def checkpoint(pipe, path: Path, **more: torch.Tensor) -> Path:
    """The cross-attentions of a pipeline under the original code's names, in half precision."""
    names = {"down_blocks.1.attentions.0": "input_blocks.3.1"}
    names |= {"mid_block.attentions.0": "middle_block.1", "up_blocks.0.attentions": "output_blocks"}
    tensors = {"model.diffusion_model.input_blocks.2.0.op.weight": torch.zeros(1), **more}
    for key, value in pipe.unet.state_dict().items():
        if ".attn2.to_k.weight" in key or ".attn2.to_v.weight" in key:
            for theirs, original in names.items():
                key = key.replace(theirs, original)
            if key.startswith("output_blocks."):
                number, rest = key.removeprefix("output_blocks.").split(".", 1)
                key = f"output_blocks.{number}.1.{rest}"
            tensors[f"model.diffusion_model.{key}"] = value.half()
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_erase_writes_a_file_and_never_over_another(folder, tmp_path, capsys):
    out = tmp_path / "no_cat.safetensors"
    given = ["erase", str(folder), "--erase", "cat => dog", "--preset", "instant", *QUICKLY]
    given += ["--out", str(out), "--device", "cpu", "--quiet"]
    assert main(given) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("Verdict:") and str(out) in printed.out
    assert Erasure.load(out).concept == "cat"
    before = out.read_bytes()
    assert main(given) == 1 and "--overwrite" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert main(["show", str(out)]) == 0
    assert capsys.readouterr().out.startswith("Verdict:")


def test_what_is_typed_wrongly_is_said_before_anything_is_loaded(folder, tmp_path, capsys):
    out = ["--out", str(tmp_path / "a.safetensors")]
    wrong = {
        "There is no folder and no file": ["erase", "/nowhere/at/all", "--erase", "cat", *out],
        "no model_index.json": ["erase", str(tmp_path), "--erase", "cat", *out],
        "isn't NAME=VALUE": ["erase", str(folder), "--erase", "cat", "--set", "step=3", *out],
        "must be a whole number": [
            "erase",
            str(folder),
            "--erase",
            "cat",
            "--set",
            "steps=x",
            *out,
        ],
        "to be erased itself": ["erase", str(folder), "--erase", "a => b", "--erase", "b", *out],
        "must end in .safetensors": ["erase", str(folder), "--erase", "cat", "--out", "a.ckpt"],
        "There is no erasure": ["show", str(tmp_path / "none.safetensors")],
        "There is no folder": ["erase", "x", "--erase", "cat", "--out", "/no/a.safetensors"],
    }
    for words, arguments in wrong.items():
        assert main(arguments) == 1, words
        printed = capsys.readouterr()
        assert words in printed.err and "Traceback" not in printed.err and not printed.out, words
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit) as stopped:
        main(["erase", str(folder)])
    assert stopped.value.code == 2


def test_files_that_are_no_models(tmp_path, file, capsys):
    pickled, other = tmp_path / "a.ckpt", tmp_path / "b.safetensors"
    damaged = tmp_path / "c.safetensors"
    pickled.write_bytes(b"x")
    damaged.write_bytes(b"x" * 100)
    save_file({"a": torch.zeros(1)}, other)
    for path, words in (
        (pickled, "no .safetensors"),
        (other, "no checkpoint"),
        (damaged, "damaged"),
    ):
        assert main(["check", str(file), str(path)]) == 1
        assert words in capsys.readouterr().err


def test_check_says_whether_it_fits(folder, file, finished, tmp_path, capsys):
    assert main(["check", str(file), str(folder), "--device", "cpu"]) == 0
    assert "made on this model" in capsys.readouterr().out
    strange, record = tmp_path / "strange.safetensors", finished.record
    base = {"name": "other", "fingerprint": [9.0] * 8}
    moved = {**record, "base": base, "text_encoder": [9.0]}
    Erasure(finished.bases, finished.factors, moved).save(strange)
    assert main(["check", str(strange), str(folder), "--device", "cpu"]) == 3
    printed = capsys.readouterr().out
    assert "made on other" in printed and "another text encoder" in printed


def test_merge_writes_a_folder_that_draws_as_the_erasure_does(
    folder, file, finished, tmp_path, capsys
):
    out = tmp_path / "merged"
    given = ["merge", str(file), str(folder), "--out", str(out)]
    assert main(given) == 0
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    with finished.applied(pipe):
        expected = latents(pipe)
    found = latents(DiffusionPipeline.from_pretrained(out, local_files_only=True))
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert json.loads((out / "model_index.json").read_text())["_class_name"].startswith("Stable")
    assert main(given) == 1 and "is there already" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", file.name]


def test_merge_writes_a_single_file(sd1, file, finished, tmp_path, capsys):
    more = {"first_stage_model.x": torch.arange(3.0)}
    model, out = checkpoint(sd1, tmp_path / "model.safetensors", **more), tmp_path / "m.safetensors"
    assert main(["merge", str(file), str(model), "--out", str(out), "--strength", "0.5"]) == 0
    before, after = load_file(model), load_file(out)
    assert before.keys() == after.keys()
    changed = [key for key in before if not before[key].equal(after[key])]
    assert len(changed) == len(finished.factors)
    key = "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.attn2.to_k.weight"
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    expected = (before[key].float() + 0.5 * finished.delta(name)).half()
    assert after[key].equal(expected) and after[key].dtype == torch.float16
    other = tmp_path / "other.safetensors"
    save_file({"model.diffusion_model.label_emb.0.0.weight": torch.zeros(1)}, other)
    assert main(["merge", str(file), str(other), "--out", str(tmp_path / "n.safetensors")]) == 1
    assert "lacks 8 of its 8 matrices" in capsys.readouterr().err
    assert not (tmp_path / "n.safetensors").exists()


def test_a_single_file_is_erased_from_and_checked(tmp_path, capsys):
    """With a folder that has the tokenizer and the configurations, and no weights."""
    pipe = sd1_with_its_autoencoder(tmp_path)
    file = as_single_file(pipe, tmp_path / "model.safetensors")
    config, out = tmp_path / "config", tmp_path / "no_cat.safetensors"
    pipe.save_pretrained(config)
    for weights in config.rglob("*.safetensors"):
        weights.unlink()
    loaded = load_pipeline(str(file), str(config), "cpu")
    assert same_weights(loaded.unet, pipe.unet) and same_weights(loaded.vae, pipe.vae)
    where = ["--config", str(config), "--device", "cpu"]
    given = ["erase", str(file), "--erase", "cat => dog", "--preset", "instant", *QUICKLY]
    before = file.read_bytes()
    assert main([*given, "--out", str(out), "--quiet", *where]) == 0
    assert file.read_bytes() == before
    assert capsys.readouterr().out.startswith("Verdict:")
    assert main(["check", str(out), str(file), *where]) == 0
    assert "made on this model" in capsys.readouterr().out
    assert main(["check", str(out), str(file), "--device", "cpu"]) == 1
    assert "--config" in capsys.readouterr().err


@at_length
@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise there")
def test_ctrl_c_leaves_nothing(folder, tmp_path):
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tools.pack import load_pack;"
        "load_pack(); from concept_surgery.pipelines.cli import main; raise SystemExit(main())"
    )
    given = ["erase", str(folder), "--erase", "cat", "--out", str(tmp_path / "a.safetensors")]
    with subprocess.Popen(
        [sys.executable, "-c", script, *given],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        # Tests in the background are started without it, and so would be what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as run:
        assert run.stderr is not None
        seen = ""
        while "Reading" not in seen:
            seen += run.stderr.read(20)
        time.sleep(1)
        run.send_signal(signal.SIGINT)
        rest = run.stderr.read()
    assert run.returncode == 130 and "Traceback" not in rest
    assert rest.rstrip().endswith("Stopped. Nothing was written.")
    assert list(tmp_path.iterdir()) == []
