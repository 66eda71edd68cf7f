"""Texts that the text encoder doesn't read, reads in part, or reads as something absurd."""

import re

import pytest
import torch
from concept_surgery.erase_core import EraseSettings, SettingsError, SubspaceError, erase
from concept_surgery.erase_core.method.alignment import VECTOR_IDS
from concept_surgery.erase_core.method.encoded import encode_prompts
from concept_surgery.erase_core.model.prompt import Encoded
from concept_surgery.erase_core.settings.settings import preset_settings

from .toy import TOKENS, ToyDenoiser

VECTORS = {"mycat": (VECTOR_IDS + 1, VECTOR_IDS + 2), "one": (VECTOR_IDS + 3,)}


class InvertingToy(ToyDenoiser):
    """Knows two textual inversions, as ComfyUI writes them, and weights in brackets."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def token_ids(self, prompts):
        return [[token for token, _ in self._weighed(prompt)] for prompt in prompts]

    def encode(self, prompts, together=False):
        self.asked += prompts
        found = []
        for prompt in prompts:
            ids, weights = zip(*self._weighed(prompt), strict=True)
            weights = torch.tensor(weights)[:, None]
            found.append(
                Encoded(self._embed([i % 2**40 + 7 * (i >= 2**40) for i in ids]) * weights)
            )
        return found

    def _weighed(self, prompt):
        words = []
        pattern = r"\(([^()]*?)(?::([-+.\w]+))?\)|([^()]+)"
        for inside, weight, outside in re.findall(pattern, prompt):
            factor = float(weight or 1.1) if not outside else 1.0
            for word in (outside or inside).split():
                if word.startswith("embedding:"):
                    name = word.removeprefix("embedding:").rstrip(",")
                    words += [(vector, factor) for vector in VECTORS.get(name, ())]
                    word = word[len("embedding:") + len(name) :]
                words += [(i, factor) for i in super().token_ids([word])[0][1:] if i != 1]
        words = [(0, 1.0), *words[: TOKENS - 2]]
        return [*words, *[(1, 1.0)] * (TOKENS - len(words))]


def prompts_of(concepts, **values):
    toy = InvertingToy()
    return encode_prompts(EraseSettings(concepts=concepts, **values), toy), toy


@pytest.mark.parametrize(
    "concepts, words",
    [
        ("embedding:nope", "reads nothing in 'embedding:nope' under 'erase'. Check its name"),
        ("()", r"reads nothing in '\(\)' under 'erase'. Write it in words"),
        ("cat => ()", r"reads nothing in '\(\)' under 'replace with'. Write it in words"),
        ("cat => embedding:nope", "reads nothing in 'embedding:nope' under 'replace with'. Check"),
        ("(embedding:nope:1.2)", "reads nothing in .* under 'erase'. Check its name"),
        ("a cat embedding:nope,", "names an embedding that isn't found: 'nope'. Check its name"),
        ("cat\ndog\nembedding:one embedding:no", "names an embedding that isn't found: 'no'. "),
        ("cat => a (embedding:gone:0.8) dog", "under 'replace with' names .* found: 'gone'. "),
    ],
)
def test_what_the_encoder_does_not_read_cannot_be_erased_or_drawn_instead(concepts, words):
    toy = InvertingToy()
    with pytest.raises(SettingsError, match=words):
        encode_prompts(EraseSettings(concepts=concepts), toy)
    assert not any("photo" in text for text in toy.asked)  # at once: no phrase was encoded


def test_a_kept_or_negative_prompt_that_is_not_read_as_meant_is_warned_about():
    kept = ("embedding:nope", "a dog embedding:nope, here", "()", "a tiger, embedding:mycat")
    found, _ = prompts_of("cat", keep=kept, negative_prompts=["(embedding:bad:1.3), blurry"])
    assert [re.sub(r" Check .*", "", text) for text in found.warnings] == [
        "The text encoder reads nothing in 'embedding:nope' under 'keep'. It counts as empty.",
        "'a dog embedding:nope, here' under 'keep' names an embedding that isn't found: 'nope', "
        "and the rest of it is read without.",
        "The text encoder reads nothing in '()' under 'keep'. It counts as empty.",
        "'(embedding:bad:1.3), blurry' under 'negative prompts' names an embedding that "
        "isn't found: 'bad', and the rest of it is read without.",
    ]


def test_the_warning_stands_in_the_record():
    settings = preset_settings("instant", concepts="cat", keep=["embedding:nope"], captions=24)
    last = erase(settings, InvertingToy())
    assert any("reads nothing in 'embedding:nope'" in w for w in last.record["warnings"])


@pytest.mark.parametrize("weight", ["1e999", "nan", "-1e999", "1e30", "-1e5"])
@pytest.mark.parametrize("place", ["erase", "replace with", "keep", "negative prompts", "phrases"])
def test_weights_that_no_model_draws_from_are_refused_where_they_stand(place, weight):
    text = f"(tiger:{weight})"
    values = {
        "erase": {"concepts": text},
        "replace with": {"concepts": f"cat => {text}"},
        "keep": {"concepts": "cat", "keep": [text]},
        "negative prompts": {"concepts": "cat", "negative_prompts": [text]},
        "phrases": {"concepts": "cat", "templates": [f"{{}} and {text}"]},
    }[place]
    what = "times as large" if weight in ("1e30", "-1e5") else "infinity or as no number"
    with pytest.raises(SettingsError, match=rf"\(tiger:{weight}\)'.*{place}.*{what}.*\(cat:1.2\)"):
        encode_prompts(EraseSettings(**values), InvertingToy())


@pytest.mark.parametrize("weight", ["1.3", "0.5", "-1", "4", "0"])
def test_weights_that_people_write_are_taken(weight):
    found, _ = prompts_of("cat", keep=[f"a (tiger:{weight}) here"])
    assert not found.warnings


def test_an_encoder_that_gives_no_numbers_is_said_to_be_that():
    class Broken(ToyDenoiser):
        def encode(self, prompts, together=False):
            return [Encoded(one.tokens * float("nan")) for one in super().encode(prompts)]

    with pytest.raises(SubspaceError, match="Load the CLIP in fp32"):
        encode_prompts(EraseSettings(concepts="cat"), Broken())


def test_a_textual_inversion_is_erased_and_drawn_instead_like_words():
    for concepts in ("embedding:mycat => dog", "cat => embedding:mycat", "embedding:mycat"):
        settings = preset_settings("instant", concepts=concepts, captions=24)
        last = erase(settings, InvertingToy())
        (concept,) = last.record["concepts"]
        assert concept["keys_and_values_moved"] > 0.5
        assert not last.record["warnings"]


def test_each_vector_is_aligned_as_a_token_of_its_own():
    """Two vectors for one word: the neutral prompts show what stands in their place."""
    found, toy = prompts_of("embedding:mycat => fire truck", templates="a {} here")
    (edit,) = found.targets
    assert torch.equal(edit.target, toy.encode(["a fire truck here"])[0].tokens)
    found, toy = prompts_of("embedding:mycat", templates="a {} here")
    assert torch.equal(found.targets[0].target, toy.encode(["a plain thing here"])[0].tokens)


@pytest.mark.parametrize("template", ["a photo-{} here", "by {}."])
def test_a_template_that_hides_the_inversion_is_refused(template):
    with pytest.raises(SettingsError, match="doesn't find 'embedding:mycat'. Leave a space or a"):
        prompts_of("embedding:mycat => dog", templates=template)
    with pytest.raises(SettingsError, match="doesn't find 'embedding:one'"):
        prompts_of("cat => embedding:one", templates=template)


def test_a_template_with_an_inversion_of_its_own_is_warned_about_where_that_is_missing():
    found, _ = prompts_of("cat", templates="{} by embedding:nope\n{} by embedding:one")
    (warning,) = found.warnings
    assert "'cat by embedding:nope' is read without the embedding 'nope'" in warning
