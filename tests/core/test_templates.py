"""The example workflows as files: they are what the script makes, and whole."""

import io
import itertools
import json

import pytest
from PIL import Image

from tools.templates import FOLDER, TEMPLATES, text_of, workflow

OURS = "ConceptSurgery"
NAMES = [template.stem for template in TEMPLATES]
TITLE = 30  # pixels over each node


def box(node) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a node with its title."""
    (left, top), (width, height) = node["pos"], node["size"]
    return left, top - TITLE, left + width, top + height


def apart(one, other) -> bool:
    return max(one[0], other[0]) >= min(one[2], other[2]) or max(one[1], other[1]) >= min(
        one[3], other[3]
    )


def test_the_folder_holds_what_the_script_makes_and_a_picture_each():
    assert {path.name for path in FOLDER.iterdir()} == {
        f"{name}.{ending}" for name in NAMES for ending in ("json", "jpg")
    }
    for template in TEMPLATES:
        path = FOLDER / f"{template.stem}.json"
        assert path.read_text("utf-8") == text_of(template), "run: python -m tools templates"


@pytest.mark.parametrize("name", NAMES)
def test_a_thumbnail_is_small_and_shows_something(name):
    data = (FOLDER / f"{name}.jpg").read_bytes()
    assert len(data) < 150_000
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "JPEG" and 300 <= image.width <= 800
        assert len(image.convert("RGB").resize((32, 32)).getcolors(1024)) > 200


@pytest.mark.parametrize("template", TEMPLATES, ids=NAMES)
def test_boxes_are_apart_and_each_node_is_in_one_group_or_none(template):
    content = workflow(template)
    nodes = [box(node) for node in content["nodes"]]
    groups = [
        (left, top, left + width, top + height)
        for left, top, width, height in (group["bounding"] for group in content["groups"])
    ]
    assert all(apart(*pair) for pair in itertools.combinations(nodes, 2))
    assert all(apart(*pair) for pair in itertools.combinations(groups, 2))
    for node in nodes:
        inside = [
            g
            for g in groups
            if g[0] <= node[0] and g[1] + TITLE <= node[1] and node[2] <= g[2] and node[3] <= g[3]
        ]
        assert len(inside) == 1 or all(apart(node, group) for group in groups)


@pytest.mark.parametrize("template", TEMPLATES, ids=NAMES)
def test_a_template_says_what_to_do_and_where_its_model_is(template):
    nodes = {node["type"]: node for node in workflow(template)["nodes"]}
    note = nodes["MarkdownNote"]["widgets_values"][0]
    assert all(f"{number}. P" in note for number in (1, 3)) and "2. " in note
    loader = nodes["CheckpointLoaderSimple"]
    (model,) = loader["properties"]["models"]
    assert [model["name"]] == loader["widgets_values"] and model["directory"] == "checkpoints"
    assert model["url"].startswith(("https://huggingface.co/", "https://civitai.com/"))
    titles = [group["title"] for group in workflow(template)["groups"]]
    assert [title[0] for title in titles[:3]] == ["1", "2", "3"]


@pytest.mark.parametrize("template", TEMPLATES, ids=NAMES)
def test_everything_hangs_on_one_branch(template):
    """What fails at a node keeps all behind it from running; nothing runs beside it."""
    content = workflow(template)
    sources = {}
    for _, source, _, target, _, _ in content["links"]:
        sources.setdefault(target, set()).add(source)

    def behind(node):
        found = set(sources.get(node, ()))
        return found.union(*(behind(one) for one in found)) if found else found

    kinds = {node["id"]: node["type"] for node in content["nodes"]}
    used = {number for number, kind in kinds.items() if kind != "MarkdownNote"}
    lasts = [number for number in used if number not in set().union(*sources.values())]
    (last,) = lasts
    assert behind(last) == used - {last}
    shows = [number for number, kind in kinds.items() if kind == f"{OURS}Compare"]
    assert len(shows) == 1 and (shows[0] == last or shows[0] in behind(last))


def test_every_kind_of_use_has_a_template():
    values = [template.typed for template in TEMPLATES]
    kinds = {typed.get("kind", "object") for typed in values if typed}
    assert kinds == {"object", "style", "tags"}
    assert any(typed and "\n" in typed["erase"] for typed in values)
    assert any(typed and typed.get("model_type") == "distilled" for typed in values)
    assert any(typed is None for typed in values)
    assert len({json.dumps(workflow(template)) for template in TEMPLATES}) == len(TEMPLATES)
