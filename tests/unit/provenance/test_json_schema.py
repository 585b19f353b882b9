"""JSON Schemas of records and sidecars: valid, described, and identical in the documentation."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from jsonschema import Draft202012Validator

from sdpipeline.domain import Json
from sdpipeline.provenance import json_schema

PUBLISHED = Path(__file__).parents[3] / "docs" / "reference" / "schemas"
SCHEMAS = {"record": json_schema.record(), "sidecar": json_schema.sidecar()}
OF_THE_REQUEST = {
    "GenerationRequest",
    "AdapterInput",
    "CheckpointRef",
    "ControlNetInput",
    "ImageSource",
    "OutputFormat",
}
"""Parts of the request, whose keys the campaign file's reference describes."""


@pytest.mark.parametrize("kind", ["record", "sidecar"])
def test_the_documentation_has_the_schema_that_the_command_prints(kind: Literal["record", "sidecar"]) -> None:
    published = (PUBLISHED / f"{kind}.schema.json").read_text(encoding="utf-8")
    assert published == json_schema.text(kind), f"sdpipeline schema --kind {kind} > docs/reference/schemas/…"


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_a_schema_is_valid_and_describes_every_key(schema: Json) -> None:
    Draft202012Validator.check_schema(schema)
    bare = [
        f"{name}.{key}"
        for name, shape in schema["$defs"].items()
        if name not in OF_THE_REQUEST
        for key, value in shape.get("properties", {}).items()
        if "description" not in value
    ]
    assert bare == []


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_no_key_that_is_left_out_at_its_default_may_be_null(schema: Json) -> None:
    nullable = {
        f"{name}.{key}"
        for name, shape in schema["$defs"].items()
        for key, value in shape.get("properties", {}).items()
        if {"type": "null"} in value.get("anyOf", ())
    }
    assert nullable <= {"PictureObject.version_id", "RecordedInput.version"}
