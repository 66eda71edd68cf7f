"""Pipelines that can't be worked on are refused in words, and stay as they were."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
from accelerate import cpu_offload_with_hook
from concept_surgery.pipelines import PipelineError, erase
from torch import nn

from .conftest import QUICK, at_length
from .small import _UNET, PIPELINES, WIDTH, spread, state_of


@pytest.fixture
def pipe(sd1):
    """A pipeline of one's own."""
    own = copy.copy(sd1)
    vars(own)["unet"] = copy.deepcopy(sd1.unet)
    vars(own)["text_encoder"] = copy.deepcopy(sd1.text_encoder)
    return own


def refused(pipe, words: str) -> None:
    """That both erasing and nothing else happens."""
    with pytest.raises(PipelineError, match=words):
        erase(pipe, "cat", preset="instant", **QUICK)


def test_what_is_no_pipeline(sd1):
    refused(sd1.unet, "not a pipeline of diffusers")
    refused("a folder", "not a pipeline of diffusers")


def test_a_pipeline_of_another_kind(sd1):
    parts = {name: part for name, part in sd1.components.items() if name != "image_encoder"}
    other = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    refused(other, "doesn't draw pictures from a text alone")
    refused(diffusers.DDPMPipeline(sd1.unet, sd1.scheduler), "from a text alone")


def test_a_unet_for_inpainting(pipe):
    unet = diffusers.UNet2DConditionModel(**_UNET, cross_attention_dim=WIDTH, in_channels=9)
    vars(pipe)["unet"] = spread(unet)
    refused(pipe, "reads 9 channels and draws 4")


def test_a_scheduler_that_says_nothing_of_the_network(pipe):
    before = pipe.scheduler
    vars(pipe)["scheduler"] = diffusers.EDMEulerScheduler()
    refused(pipe, "EDMEulerScheduler with 'epsilon'")
    vars(pipe)["scheduler"] = diffusers.DDIMScheduler.from_config(
        before.config, prediction_type="sample"
    )
    refused(pipe, "with 'sample'")


def test_a_pipeline_without_its_text_encoder(pipe):
    vars(pipe)["text_encoder"] = None
    refused(pipe, "lacks its text encoder")


def test_a_size_that_the_pipeline_refuses(sd1, monkeypatch):
    def check_inputs(*given):
        raise ValueError("`height` has to be divisible by 64")

    monkeypatch.setattr(type(sd1), "check_inputs", check_inputs)
    refused(sd1, "refuses what it is asked: `height`")


def test_weights_that_are_nowhere(pipe):
    pipe.unet.to("meta")
    refused(pipe, "on the device 'meta'")


def test_offloaded(pipe):
    cpu_offload_with_hook(pipe.unet, torch.device("cpu"))
    before = state_of(pipe)
    refused(pipe, "its parts are offloaded")
    assert state_of(pipe) == before


def test_offloaded_in_groups(pipe):
    pipe.unet.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
    )
    refused(pipe, "its parts are offloaded")


def test_kept_in_eight_bits(pipe):
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    refused(pipe, "can't be worked on as it is")


class Params4bit(nn.Parameter):
    """As bitsandbytes keeps four bits a number; the package is for GPUs."""


def test_quantised_by_bitsandbytes(pipe):
    layer = pipe.unet.get_submodule("up_blocks.0.attentions.0.proj_in")
    layer.weight = Params4bit(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    refused(pipe, "quantised .*Params4bit")


def test_quantised_by_torchao(pipe):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(pipe.unet, torchao.Int8WeightOnlyConfig())
    refused(pipe, "quantised")


def test_with_an_erasure_on_it(sd1, finished):
    with finished.applied(sd1):
        refused(sd1, "the erasure of 'cat' is applied to it")


def test_fused_projections(pipe):
    pipe.unet.fuse_qkv_projections()
    refused(pipe, "its projections are fused")


@at_length
def test_a_network_that_was_compiled_is_looked_into(pipe, finished):
    pipe.unet = torch.compile(pipe.unet)
    assert erase(pipe, "cat", "dog", preset="instant", **QUICK).identity == finished.identity


def test_nothing_is_applied_to_what_was_compiled(pipe, finished):
    pipe.unet._compiled_call_impl = print  # as compile() leaves it, which takes long
    with pytest.raises(PipelineError, match="is compiled, and would draw as before"):
        finished.applied(pipe)


def test_a_setting_that_there_is_none_of(sd1):
    with pytest.raises(TypeError, match="no setting 'step'"):
        erase(sd1, "cat", step=3)


def test_an_erasure_of_another_family(tokenizers, finished):
    sdxl = PIPELINES["SDXL"](tokenizers)
    with pytest.raises(PipelineError, match="is for SD1.x"):
        finished.applied(sdxl)
