"""Fuzzing campaign files and tables: any input is accepted, or refused with a message, and in time.

``SDP_TEST_FUZZ_S`` sets how many seconds each of these goes on (1).
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sdpipeline.campaigns import expand, yaml_source
from sdpipeline.campaigns.loader import check
from sdpipeline.campaigns.parameters import Parameters
from sdpipeline.campaigns.spec import Budget, CampaignSpec, Policy, Rows, Schedule
from sdpipeline.campaigns.stage_spec import (
    ControlNetSpec,
    ImageSpec,
    IPAdapterSpec,
    LoraSpec,
    OutputSpec,
    Quality,
    Stage,
)
from sdpipeline.campaigns.tables import Table, read_rows
from sdpipeline.campaigns.templates import TemplateRefusedError, compile_template
from sdpipeline.errors import CampaignError
from tests.factories import CATALOG, input_folder

FUZZ_S = float(os.environ.get("SDP_TEST_FUZZ_S", "1"))

# Enough examples that the time limit decides; slow examples fail by the test's own timeout.
fuzzed = settings(
    max_examples=1_000_000,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    database=None,
)

KEYS = sorted(
    {
        name
        for part in (
            CampaignSpec,
            Stage,
            Parameters,
            ControlNetSpec,
            ImageSpec,
            IPAdapterSpec,
            LoraSpec,
            OutputSpec,
            Rows,
            Budget,
            Schedule,
            Quality,
            Policy,
        )
        for name in part.model_fields
    }
    | {"start", "count", "zip", "colour", "size", "low_threshold", "<<", "", "x y", "\u202e", "__class__"}
)
WORD_LIST = """shapes shapes-canny upscaler flux draft final text-to-image image-to-image inpainting super-resolution
    style toy face sharp strict canny none euler dpmpp-2m crop png jpeg same red
    {{colour}} {{size|round(9)}} {{colour.x}} {%if%} {{colour}}.png ../x a.png nan 1e9 -0 0x10 t.csv t.tsv"""
WORDS = st.sampled_from(WORD_LIST.split())
NUMBERS = st.one_of(
    st.integers(-2, 600), st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([8, 64, 128, 512, 0.5, 1.0])
)
VALUES = st.recursive(
    st.one_of(WORDS, NUMBERS, st.none(), st.booleans(), st.text(max_size=12)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), inner, max_size=5)
    ),
    max_leaves=12,
)
STAGE = st.fixed_dictionaries(
    {"id": st.sampled_from(["draft", "final"]) | VALUES, "task": WORDS | VALUES},
    optional={
        "prompt": WORDS | VALUES,
        "image": st.sampled_from([{"stage": "draft"}, {"stage": "final"}, {"file": "a.png"}]) | VALUES,
        "mask_image": st.sampled_from([{"stage": "draft"}]) | VALUES,
        "controlnets": st.lists(
            st.fixed_dictionaries(
                {"checkpoint": WORDS | VALUES, "image": st.just({"stage": "draft"}) | VALUES},
                optional={name: WORDS | VALUES for name in ControlNetSpec.model_fields if "_" in name},
            ),
            max_size=2,
        )
        | VALUES,
        **dict.fromkeys(Parameters.model_fields, NUMBERS | WORDS | VALUES),
        "seeds": VALUES,
        "checkpoint": WORDS | VALUES,
        "loras": st.lists(st.fixed_dictionaries({"checkpoint": WORDS}, optional={"weight": NUMBERS | WORDS | VALUES})),
        "textual_inversions": st.lists(st.fixed_dictionaries({"checkpoint": WORDS})) | VALUES,
        "ip_adapters": st.lists(
            st.fixed_dictionaries({"checkpoint": WORDS, "image": st.just({"stage": "draft"}) | VALUES}), max_size=2
        ),
        "vae": WORDS | VALUES,
        "reproducibility": WORDS | VALUES,
        "profile": WORDS | VALUES,
        "output": VALUES,
    },
)
CRONS = st.sampled_from(
    ["0 3 * * *", "* * * * *", "0 0 30 2 *", "0 0 29 2 1", "5 4 * * 8", "1-0 * * * *", "@daily", ""]
)
CHOICES = st.dictionaries(st.sampled_from(["colour", "size", "edition"]), WORDS | NUMBERS, max_size=3)
CAMPAIGN = st.fixed_dictionaries(
    {
        "name": st.just("spring") | VALUES,
        "checkpoint": st.just("shapes") | WORDS | VALUES,
        "stages": st.lists(STAGE, max_size=3) | VALUES,
    },
    optional={
        "variables": st.dictionaries(st.sampled_from(["colour", "size", "zip", "rows"]), VALUES, max_size=3) | VALUES,
        "seeds": st.fixed_dictionaries({"start": NUMBERS, "count": st.integers(-1, 3)}) | VALUES,
        "defaults": st.dictionaries(st.sampled_from(list(Parameters.model_fields)), NUMBERS | WORDS, max_size=4)
        | VALUES,
        "output": VALUES,
        "priority": NUMBERS | VALUES,
        "budget": st.dictionaries(st.sampled_from(list(Budget.model_fields)), NUMBERS) | VALUES,
        "schedule": st.fixed_dictionaries(
            {"cron": CRONS | VALUES},
            optional={
                "timezone": st.sampled_from(["Europe/Berlin", "UTC", "Mars/Base"]) | VALUES,
                "mode": st.sampled_from(["incremental", "edition"]) | VALUES,
                "on_overlap": WORDS | VALUES,
            },
        )
        | VALUES,
        "exclude": st.lists(CHOICES, max_size=2) | VALUES,
        "include": st.lists(CHOICES, max_size=2) | VALUES,
        "quality": st.dictionaries(st.sampled_from(list(Quality.model_fields)), NUMBERS) | VALUES,
        "policy": st.dictionaries(st.sampled_from(list(Policy.model_fields)), st.lists(WORDS) | NUMBERS) | VALUES,
        "reuse": st.booleans() | VALUES,
        "extra": VALUES,
    },
)


def as_yaml(value: Any) -> str:
    """YAML flow style, with YAML's own notation for values that JSON lacks."""
    if isinstance(value, float):
        return {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(repr(value), repr(value))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {as_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(as_yaml(item) for item in value) + "]"
    return json.dumps(value)


def refused_or_accepted(text: str) -> list[str]:
    """The mistakes of a file with that text, each on one line with its position."""
    inputs = input_folder(Path("/nowhere"))
    try:
        expand.check(check(yaml_source.parse(text, file="f.yaml"), CATALOG, inputs), inputs)
    except CampaignError as error:
        refused = error
    else:
        return []
    lines = str(refused).split("\n")
    assert 0 < len(lines) == len(refused.mistakes)
    assert all(line.isprintable() for line in lines)
    return lines


class _TimeIsUpError(BaseException):
    """Not an Exception, which hypothesis would treat as a failure."""


def fuzz(strategy: st.SearchStrategy[Any], attempt: Callable[[Any], object]) -> None:
    """Try examples until the time is up."""
    end = time.monotonic() + FUZZ_S

    @fuzzed
    @given(strategy)
    def one(value: Any) -> None:
        if time.monotonic() > end:
            raise _TimeIsUpError
        attempt(value)

    with suppress(_TimeIsUpError):
        one()


pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(60 + 3 * FUZZ_S)]


def test_any_text_is_accepted_or_refused_in_words() -> None:
    pieces = st.sampled_from(
        ["name: a\n", "stages:\n", "  - ", "{", "}", "[", "]", "&a ", "*a", "!!x ", "? ", ": ", "\n", "\t"]
    )
    fuzz(st.lists(pieces | st.text(max_size=6), max_size=40).map("".join), refused_or_accepted)


def test_any_document_is_accepted_or_refused_in_words() -> None:
    fuzz(CAMPAIGN.map(as_campaign), refused_or_accepted)


def test_a_right_file_with_one_part_gone_or_altered_is_accepted_or_refused_in_words() -> None:
    alteration = st.tuples(st.integers(0, len(RIGHT)), st.integers(0, 12), st.text(max_size=6) | WORDS)
    fuzz(st.lists(alteration, min_size=1, max_size=4).map(altered), refused_or_accepted)


def test_any_template_has_a_value_or_is_refused_in_words() -> None:
    pieces = r"""{{ }} {% %} {# #} if else endif x y . [ ] ( ) ' " | + - ~ ** // == 0 1 1e9
        replace round(9) default upper _ \\"""
    text = st.lists(st.sampled_from(pieces.split()) | st.text(max_size=4), max_size=25).map(" ".join)
    fuzz(st.tuples(text, NUMBERS | st.text(max_size=9)), rendered_or_refused)


def test_any_table_has_rows_or_is_refused_in_words() -> None:
    cells = st.lists(
        st.sampled_from(["a", "b", ",", "\t", '"', "\n", "\r\n", "\0", "\ufeff"]) | st.text(max_size=4), max_size=40
    )
    fuzz(st.tuples(cells.map("".join), st.sampled_from(["t.csv", "t.tsv"])), rows_or_refused)


RIGHT = """name: spring
checkpoint: shapes
variables:
  colour: [red, "blue"]
  zip: {size: [64, 128], shape: [circle, square]}
seeds: {start: 0, count: 2}
defaults: {width: 128, height: 128, num_inference_steps: 20, guidance_scale: 4.0}
stages:
  - id: draft
    task: text-to-image
    prompt: "a {{ colour|upper }} {{ shape }} {{ size }}"
  - id: scene
    task: text-to-image
    prompt: x
    seeds: [1, 2]
    controlnets:
      - {checkpoint: shapes-canny, image: {stage: draft}, annotator: canny}
  - {id: final, task: super-resolution, checkpoint: upscaler, image: {stage: scene}, noise_level: 20}
"""


def test_the_file_that_is_altered_is_right() -> None:
    assert refused_or_accepted(RIGHT) == []


def altered(changes: list[tuple[int, int, str]]) -> str:
    text = RIGHT
    for start, length, instead in changes:
        text = text[:start] + instead + text[start + length :]
    return text


def as_campaign(document: dict[str, Any]) -> str:
    return "\n".join(f"{key}: {as_yaml(value)}" for key, value in document.items())


def rendered_or_refused(example: tuple[str, Any]) -> None:
    text, value = example
    with suppress(TemplateRefusedError):
        assert len(str(compile_template(text).render({"x": value, "y": "word"}))) <= 20_000


def rows_or_refused(example: tuple[str, str]) -> None:
    text, name = example
    table = Table(path=Path(name), name=name)
    with suppress(CampaignError):
        keys = [row.key for row in read_rows(table, io.StringIO(text, newline=""), lambda _: None)]
        assert len(set(keys)) == len(keys)
