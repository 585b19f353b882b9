"""JSON Schema of a campaign file, for completion and checks in editors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema

from sdpipeline.campaigns.parameters import LIMITS
from sdpipeline.campaigns.spec import CampaignSpec, Rows
from sdpipeline.campaigns.spec_part import VARIABLE
from sdpipeline.campaigns.templates import LONGEST_RESULT
from sdpipeline.domain import Json, Task
from sdpipeline.engine import annotators, families

DIALECT = "https://json-schema.org/draft/2020-12/schema"
TEMPLATE: Json = {"type": "string", "pattern": r"\{", "description": "a template, as in {{ name }}"}
NUMBER_OR_TEMPLATE = r"\{|^\s*[-+]?[0-9.]+([eE][-+]?[0-9]+)?\s*$"
"""A number in quotes is a number too: a table's cell filled into a template is always text."""

WORDS: Mapping[str, Iterable[str]] = {"scheduler": families.SCHEDULERS, "resize": annotators.RESIZE_MODES}
"""Allowed words of a key that also takes a template."""


def document() -> Json:
    """Return the schema, in the 2020-12 dialect; ``plan`` checks what depends on a checkpoint or a table."""
    _, schema = models_json_schema(
        [(CampaignSpec, "validation"), (Rows, "validation")], schema_generator=_Generator, title="sdpipeline campaign"
    )
    shapes: dict[str, Json] = schema["$defs"]
    for shape in shapes.values():
        shape.pop("title", None)
        for name, value in shape.get("properties", {}).items():
            _refine(name, value)
    shapes["Stage"]["allOf"] = list(_needed_pictures())
    shapes["ImageSpec"] |= {"minProperties": 1, "maxProperties": 1}
    shapes["Rows"]["oneOf"] = [{"required": ["file"]}, {"required": ["files"]}]
    shapes["ControlNetSpec"]["allOf"] = list(_annotators_parameters())
    campaign = shapes.pop("CampaignSpec")
    campaign["properties"]["variables"] |= _variables()
    _close(campaign)
    _close(shapes)
    return {"$schema": DIALECT, "title": schema["title"]} | campaign | {"$defs": shapes}


def text() -> str:
    """Return the schema as the text of a file."""
    return json.dumps(document(), indent=2, ensure_ascii=False) + "\n"


class _Generator(GenerateJsonSchema):
    """Pydantic's generator, without titles that repeat the key and without null, list or object defaults."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002 -- the signature is pydantic's
        return False

    def default_schema(self, schema: Any) -> JsonSchemaValue:
        value = super().default_schema(schema)
        if isinstance(value.get("default"), dict | list | None):
            value.pop("default", None)
        return value


def _refine(name: str, shape: Json) -> None:
    """Add the constraints of a key that go beyond its type."""
    if name in LIMITS:
        _, low, high = LIMITS[name]
        for option in shape["anyOf"]:
            if option["type"] == "string":
                option |= {"pattern": NUMBER_OR_TEMPLATE, "description": TEMPLATE["description"]}
            elif option["type"] != "null":
                option |= {"minimum": low, "maximum": high}
    elif name in WORDS:
        shape["anyOf"] = [{"enum": list(WORDS[name])}, TEMPLATE, {"type": "null"}]
    elif name == "annotator":
        shape["enum"] = list(annotators.ANNOTATORS)
    elif name == "seeds":
        for option in _options(shape):
            if option.get("type") == "array":
                option["uniqueItems"] = True


def _options(shape: Json) -> Iterator[Json]:
    yield shape
    for each in (*shape.get("anyOf", ()), *shape.get("oneOf", ())):
        yield from _options(each)


def _needed_pictures() -> Iterator[Json]:
    needed = {
        Task.TEXT_TO_IMAGE: ["prompt"],
        Task.IMAGE_TO_IMAGE: ["image"],
        Task.INPAINTING: ["image", "mask_image"],
        Task.SUPER_RESOLUTION: ["image"],
    }
    for task, keys in needed.items():
        yield _where("task", str(task), {"required": keys})


def _annotators_parameters() -> Iterator[Json]:
    """Yield a rule for each annotator's own parameters; without an annotator there are none."""
    for name, annotator in annotators.ANNOTATORS.items():
        numbers = {
            key: {
                "type": "integer" if limit.integer else "number",
                "minimum": limit.low,
                "maximum": limit.high,
                "default": limit.default,
            }
            for key, limit in annotator.parameters.items()
        }
        parameters = {"properties": numbers, "additionalProperties": False}
        then: Json = {"properties": {"annotator_parameters": parameters}}
        if annotator.learned is not None:
            then["required"] = ["annotator_checkpoint"]
        yield _where("annotator", name, then, also_without=name == "none")


def _where(key: str, value: str, then: Json, *, also_without: bool = False) -> Json:
    condition: Json = {"properties": {key: {"const": value}}}
    return {"if": condition if also_without else condition | {"required": [key]}, "then": then}


def _variables() -> Json:
    values: Json = {
        "type": "array",
        "items": {"type": ["boolean", "number", "string"], "maxLength": LONGEST_RESULT},
        "minItems": 1,
    }
    lists = {"type": "object", "patternProperties": {VARIABLE: values}, "additionalProperties": False}
    together = "Lists of one length that advance together instead of being multiplied."
    table = {"$ref": "#/$defs/Rows", "description": "A table: its columns are variables, its rows are multiplied."}
    return {
        "properties": {"zip": lists | {"description": together}, "rows": table},
        "patternProperties": {VARIABLE.replace("^", "^(?!(zip|rows)$)"): values},
        "additionalProperties": False,
    }


def _close(shape: Any) -> None:
    """Forbid additional properties in every object of the schema."""
    if isinstance(shape, list):
        for each in shape:
            _close(each)
    elif isinstance(shape, dict):
        if shape.get("type") == "object":
            shape.setdefault("additionalProperties", False)
        for each in shape.values():
            _close(each)
