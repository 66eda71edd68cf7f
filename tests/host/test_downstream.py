"""Where a graph leads a MODEL: to nodes that take its weights alone, or not."""

from __future__ import annotations

import pytest
from comfy_api.v0_0_2 import io
from comfy_extras.nodes_lora_extract import LoraSave
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from comfy_extras.nodes_model_merging import NODE_CLASS_MAPPINGS as MERGING
from comfy_extras.nodes_model_merging_model_specific import NODE_CLASS_MAPPINGS as SPECIFIC
from concept_surgery.nodes import downstream
from concept_surgery.nodes.apply import ApplyErasure
from concept_surgery.nodes.downstream import say_what_is_left_behind, weight_takers

from tools import graphs
from tools.graphs import node


def made(outputs, output_node=False, category="other"):
    attributes = {"RETURN_TYPES": outputs, "OUTPUT_NODE": output_node, "CATEGORY": category}
    return type("Node", (), attributes)


class Anything(str):
    """How packs write a type that fits all."""


KNOWN = {
    **MERGING,
    **SPECIFIC,
    "LoraSave": LoraSave,
    "ModelSamplingDiscrete": ModelSamplingDiscrete,
    "ConceptSurgeryApply": ApplyErasure,
    "CheckpointLoaderSimple": made(("MODEL", "CLIP", "VAE")),
    "CLIPTextEncode": made(("CONDITIONING",)),
    "KSampler": made(("LATENT",)),
    "SampleAndSave": made((), True),
    "Reroute": made((Anything("*"),)),
    "Tuple": made(("STRING", "MODEL")),
    "ThirdPartyMergeModels": made(("MODEL",)),
    "SaveImage": made((), True),
}
OTHER = node("loader", "CheckpointLoaderSimple", ckpt_name="x.safetensors")
APPLY = node("3:5", "ConceptSurgeryApply", model=("loader", 0), mode="exact")
AFTER = ("3:5", 0)


def takers(*nodes, start="3:5"):
    graph = {**OTHER, **APPLY}
    for one in nodes:
        graph |= one
    return weight_takers(graph, start, KNOWN)


MERGES = sorted(name for name in {**MERGING, **SPECIFIC} if name.startswith("ModelMerge"))


@pytest.mark.parametrize("name", MERGES)
def test_every_merge_node_of_the_host_takes_the_weights_alone(name):
    for first, second in ((("loader", 0), AFTER), (AFTER, ("loader", 0))):
        assert takers(node("m", name, model1=first, model2=second)) == [f"{name} (node m)"]


@pytest.mark.parametrize("name", ["CheckpointSave", "ModelSave", "LoraSave"])
def test_saving_does_too_behind_whatever_passes_the_model_on(name):
    given = "model_diff" if name == "LoraSave" else "model"
    vae = {"vae": ("loader", 2), "clip": ("loader", 1), "filename_prefix": "a"}
    expected = [f"{name} (node 12:7)"]
    assert takers(node("12:7", name, **{given: AFTER}, **vae)) == expected
    chain = node("1", "Reroute", value=AFTER) | node("2", "Tuple", any=("1", 0))
    chain |= node("3", "ModelSamplingDiscrete", model=("2", 1))
    chain |= node("4", "ConceptSurgeryApply", model=("3", 0), mode="merge")
    assert takers(chain, node("12:7", name, **{given: ("4", 0)}, **vae)) == expected
    # The order of the graph doesn't matter, nor what isn't reached, nor other outputs.
    saved = node("12:7", name, **{given: ("4", 0)}, **vae)
    assert weight_takers({**saved, **chain, **APPLY, **OTHER}, "3:5", KNOWN) == expected
    assert takers(node("12:7", name, **{given: ("loader", 0)}, **vae)) == []
    assert takers(chain, node("12:7", name, **{given: ("2", 0)}, **vae)) == []


def test_several_are_all_named_and_circles_end():
    graph = [
        node("m", "ThirdPartyMergeModels", a=AFTER, b=("loader", 0)),
        node("s", "ModelSave", model=("m", 0), filename_prefix="a"),
        node("r", "Reroute", value=("q", 0)) | node("q", "Reroute", value=("r", 0), more=AFTER),
    ]
    assert takers(*graph) == ["ThirdPartyMergeModels (node m)", "ModelSave (node s)"]


def test_sampling_and_what_is_unknown_is_not_blamed():
    text = node("t", "CLIPTextEncode", clip=("loader", 1), text="cat")
    graph = [
        text,
        node("k", "KSampler", model=AFTER, positive=("t", 0), seed=[1, 2], note=["3:5", "0"]),
        node("i", "SaveImage", images=("k", 0)),
        node("s", "SampleAndSave", model=AFTER, positive=("t", 0)),
        node("u", "NobodyKnows", model=AFTER),
    ]
    assert takers(*graph) == []
    assert takers(*graph, start="3") == takers(*graph, start="gone") == []
    assert weight_takers(None, "3:5", KNOWN) == weight_takers({}, None, KNOWN) == []


def test_nodes_of_the_hosts_newer_kind_are_understood():
    class Save(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema("NewSave", inputs=[io.Model.Input("model")], is_output_node=True)

        @classmethod
        def execute(cls, model):
            return io.NodeOutput()

    graph = {**OTHER, **APPLY, **node("7", "NewSave", model=AFTER)}
    assert weight_takers(graph, "3:5", {**KNOWN, "NewSave": Save}) == ["NewSave (node 7)"]


@pytest.mark.parametrize("request_", [None, [], {}, {"prompt": None}, {"prompt": {"1": None}}])
def test_a_request_of_any_kind_is_handed_on(request_):
    assert say_what_is_left_behind(request_) is request_


def test_an_erasure_at_strength_0_or_in_the_weights_is_not_warned_of(monkeypatch):
    said = []
    monkeypatch.setattr(downstream, "_known_classes", lambda: KNOWN)
    monkeypatch.setattr(downstream, "warn", lambda text, node_id: said.append((node_id, text)))
    for strength, mode in ((0, "exact"), (1.0, "merge"), (1.0, "exact")):
        assert not said
        graph = graphs.apply(strength=strength, mode=mode)
        graph |= node("7", "CheckpointSave", model=("apply", 0), filename_prefix="a")
        say_what_is_left_behind({"prompt": graph})
    ((node_id, text),) = said
    assert node_id == "apply" and "CheckpointSave (node 7) takes the weights alone" in text
