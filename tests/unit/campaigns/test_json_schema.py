"""The campaign file's JSON Schema: editors reject the same mistakes as the loader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from sdpipeline.app import scaffold
from sdpipeline.campaigns import json_schema, yaml_source
from sdpipeline.campaigns.spec_part import SpecPart
from sdpipeline.engine import annotators, families
from tests.factories import mistakes_of

DOCUMENT = json_schema.document()
VALIDATOR = Draft202012Validator(DOCUMENT)
DEMO = Path(json_schema.__file__).parents[1] / "demo" / "campaign.yaml"
EXAMPLES = [scaffold.EXAMPLES / name for name in scaffold.CAMPAIGNS]

HEAD = "name: spring\ncheckpoint: shapes\n"
STAGES = "stages: [{id: draft, task: text-to-image, prompt: x}]\n"
DRAFT = "  - {id: draft, task: text-to-image, prompt: x}\n"


def refused(text: str) -> list[str]:
    data = yaml_source.parse(text, file="spring.yaml").data
    return [error.message for error in VALIDATOR.iter_errors(data)]


def objects(shape: Any) -> Iterator[dict[str, Any]]:
    if isinstance(shape, dict):
        if shape.get("type") == "object":
            yield shape
        for each in shape.values():
            yield from objects(each)
    elif isinstance(shape, list):
        for each in shape:
            yield from objects(each)


def test_it_is_a_schema_of_2020_12() -> None:
    assert DOCUMENT["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(DOCUMENT)


@pytest.mark.parametrize("path", [DEMO, *EXAMPLES], ids=lambda path: path.name)
def test_the_bundled_campaigns_are_right(path: Path) -> None:
    assert refused(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_says_on_its_first_line_which_schema_it_follows(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# yaml-language-server: $schema=./{scaffold.SCHEMA_NAME}"


def test_no_object_takes_keys_that_are_not_named() -> None:
    assert [shape for shape in objects(DOCUMENT) if shape.get("additionalProperties", True) is True] == []


def test_every_key_of_a_campaign_has_a_description() -> None:
    direct = SpecPart.__subclasses__()
    models = [*direct, *(below for model in direct for below in model.__subclasses__())]
    shapes = DOCUMENT["$defs"] | {"CampaignSpec": DOCUMENT}
    bare = [
        f"{model.__name__}.{name}"
        for model in models
        for name in model.model_fields
        if not described(shapes[model.__name__]["properties"][name])
    ]
    assert bare == []


def described(shape: dict[str, Any]) -> bool:
    return "description" in shape or "description" in DOCUMENT["$defs"][shape["$ref"].rpartition("/")[2]]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("task", ["text-to-image", "image-to-image", "inpainting", "super-resolution"]),
        ("scheduler", list(families.SCHEDULERS)),
        ("resize", list(annotators.RESIZE_MODES)),
        ("annotator", list(annotators.ANNOTATORS)),
    ],
)
def test_words_to_choose_from_are_listed(key: str, words: list[str]) -> None:
    shapes = DOCUMENT["$defs"]
    shape = shapes["ControlNetSpec" if key == "annotator" else "Stage"]["properties"][key]
    shape = shapes[shape["$ref"].rpartition("/")[2]] if "$ref" in shape else shape
    assert words in [option.get("enum") for option in (shape, *shape.get("anyOf", ()))]


RIGHT = [
    HEAD + STAGES,
    HEAD + "defaults: {width: 64, guidance_scale: 4, scheduler: euler, resize: null}\n" + STAGES,
    HEAD + "variables: {n: [64, 128]}\n" + STAGES.replace("x}", "x, width: '{{ n }}', height: '64'}"),
    HEAD + "variables: {zip: {a: [x, y], b: [1, 2.5]}}\n" + STAGES.replace("x}", "'{{ a }}{{ b }}'}"),
    HEAD + "variables: {s: [ddim]}\n" + STAGES.replace("x}", "x, scheduler: '{{ s }}'}"),
    HEAD + "seeds: [1, 7]\npriority: 0\nbudget: {max_images: 1}\nreuse: false\n" + STAGES,
    HEAD + "variables: {c: [red, blue]}\nexclude: [{c: red}]\n" + STAGES.replace("x}", "'{{ c }}'}"),
    HEAD + "schedule: {cron: '0 3 * * *', mode: edition}\noutput: {format: jpeg, quality: 80}\n" + STAGES,
    HEAD + "stages:\n" + DRAFT + "  - {id: edit, task: image-to-image, image: {stage: draft}, strength: 0.5}\n",
    HEAD
    + "stages:\n"
    + DRAFT
    + "  - {id: s, task: text-to-image, prompt: x, controlnets: [{checkpoint: shapes-canny, image: {stage: draft},"
    + " annotator: canny, annotator_parameters: {low_threshold: 60}}]}\n",
]
WRONG = [
    "[]\n",
    "name: spring\ncheckpoint: shapes\n",
    HEAD.replace("spring", "Spring") + STAGES,
    HEAD + "stages: []\n",
    HEAD + "stages: {id: draft}\n",
    HEAD + STAGES.replace("prompt", "promt"),
    HEAD + STAGES.replace(", prompt: x", ""),
    HEAD + STAGES.replace("text-to-image", "text-to-video"),
    HEAD + STAGES.replace("text-to-image", "image-to-image"),
    HEAD + STAGES.replace("text-to-image", "inpainting").replace("x}", "x, image: {file: a.png}}"),
    HEAD + "priorty: 3\n" + STAGES,
    HEAD + "priority: 1001\n" + STAGES,
    HEAD + "priority: true\n" + STAGES,
    HEAD + "seeds: [1, 1]\n" + STAGES,
    HEAD + "seeds: {count: 0}\n" + STAGES,
    HEAD + "seeds: 4\n" + STAGES,
    HEAD + "reuse: 'yes'\n" + STAGES,
    HEAD + "defaults: {width: 4}\n" + STAGES,
    HEAD + "defaults: {width: wide}\n" + STAGES,
    HEAD + "defaults: {width: 64.5}\n" + STAGES,
    HEAD + "defaults: {guidance_scale: 101}\n" + STAGES,
    HEAD + "defaults: {scheduler: eular}\n" + STAGES,
    HEAD + "defaults: {resize: squeeze}\n" + STAGES,
    HEAD + "defaults: {prompt: x}\n" + STAGES,
    HEAD + "variables: [red]\n" + STAGES,
    HEAD + "variables: {c: red}\n" + STAGES.replace("x}", "'{{ c }}'}"),
    HEAD + "variables: {c: []}\n" + STAGES.replace("x}", "'{{ c }}'}"),
    HEAD + "variables: {c: [null]}\n" + STAGES.replace("x}", "'{{ c }}'}"),
    HEAD + "variables: {c: [[red]]}\n" + STAGES.replace("x}", "'{{ c }}'}"),
    HEAD + "variables: {my colour: [red]}\n" + STAGES,
    HEAD + "variables: {zip: [red]}\n" + STAGES,
    HEAD + "variables: {rows: {}}\n" + STAGES,
    HEAD + "variables: {rows: {file: a.csv, keys: b}}\n" + STAGES,
    HEAD + "budget: {max_image: 1}\n" + STAGES,
    HEAD + "output: {quality: 101}\n" + STAGES,
    HEAD + "output: {format: gif}\n" + STAGES,
    HEAD + "schedule: {mode: edition}\n" + STAGES,
    HEAD + "exclude: [{}]\n" + STAGES,
    HEAD + "stages:\n" + DRAFT + "  - {id: edit, task: image-to-image, image: {}}\n",
    HEAD + "stages:\n" + DRAFT + "  - {id: edit, task: image-to-image, image: {stage: draft, file: a.png}}\n",
    HEAD + "stages:\n" + DRAFT + "  - {id: edit, task: image-to-image, image: draft}\n",
    RIGHT[-1].replace("low_threshold: 60", "low: 60"),
    RIGHT[-1].replace("low_threshold: 60", "low_threshold: 1001"),
    RIGHT[-1].replace("annotator: canny,", ""),
    RIGHT[-1].replace("annotator: canny", "annotator: cany"),
    RIGHT[-1].replace("{low_threshold: 60}", "{low_threshold: 60}, controlnet_conditioning_scale: 11"),
]


@pytest.mark.parametrize("text", RIGHT)
def test_what_the_loader_takes_the_schema_takes(text: str) -> None:
    assert mistakes_of(text) == []
    assert refused(text) == []


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_in_shape_is_refused_by_both(text: str) -> None:
    assert mistakes_of(text) != []
    assert refused(text) != []


def test_a_misspelt_key_is_named() -> None:
    text = dedent(HEAD + STAGES.replace("prompt", "promt"))
    assert any("'promt' was unexpected" in message for message in refused(text))
