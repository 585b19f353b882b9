"""JSON Schemas of a picture's record and of its sidecar, for readers in other programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from sdpipeline.domain import Json
from sdpipeline.engine.record import Execution
from sdpipeline.provenance.record import RECORD_SCHEMA, SIDECAR_SCHEMA, Record, Sidecar

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_PROMPT_HASHES = {
    f"{name}_sha256": {"type": "string", "description": f"SHA-256 of the {name.replace('_', ' ')}, in its place."}
    for name in ("prompt", "negative_prompt")
}


def record() -> Json:
    """Return the schema of the record in a picture's file and in its sidecar.

    Keys that are not named are allowed: a later release may add some without a new version.
    """
    return _document("Record", RECORD_SCHEMA)


def sidecar() -> Json:
    """Return the schema of the sidecar; like the record's, it allows more keys."""
    return _document("Sidecar", SIDECAR_SCHEMA)


def text(kind: Literal["record", "sidecar"]) -> str:
    """Return the schema of a record or a sidecar as the text of a file."""
    document = record() if kind == "record" else sidecar()
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _document(root: str, title: str) -> Json:
    """Return the schema of a class; its ``$defs`` are the classes that it uses."""
    adapters = (TypeAdapter[Any](kind) for kind in (Record, Sidecar, Execution))
    _, schema = TypeAdapter.json_schemas(
        ((n, "validation", each) for n, each in enumerate(adapters)), schema_generator=_Generator
    )
    shapes: dict[str, Json] = schema["$defs"]
    # Documents that the classes hold as plain JSON.
    one_record = {"$ref": "#/$defs/Record"}
    _refer(shapes["Record"], "ran", {"$ref": "#/$defs/Execution"})
    _refer(shapes["Record"], "ancestors", {"type": "object", "additionalProperties": one_record})
    _refer(shapes["RecordedInput"], "record", one_record)
    _refer(shapes["Sidecar"], "record", one_record)
    # A file may withhold its prompts.
    shapes["GenerationRequest"]["required"].remove("prompt")
    shapes["GenerationRequest"]["properties"] |= _PROMPT_HASHES
    for shape in shapes.values():
        shape.pop("title", None)
        shape["description"] = shape["description"].replace("``", "`")
    used = _used(shapes, root)
    return {
        "$schema": DIALECT,
        "title": title,
        "$ref": f"#/$defs/{root}",
        "$defs": {n: shapes[n] for n in sorted(used)},
    }


def _refer(shape: Json, name: str, to: Json) -> None:
    shape["properties"][name] = to | {"description": shape["properties"][name]["description"]}


def _used(shapes: dict[str, Json], root: str) -> set[str]:
    """Return the names of the shapes that a shape refers to, directly or not."""
    found, left = set[str](), [root]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += _references(shapes[name])
    return found


def _references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(target := part.get("$ref"), str):
            yield target.rpartition("/")[2]
        for each in part.values():
            yield from _references(each)
    elif isinstance(part, list):
        for each in part:
            yield from _references(each)


class _Generator(GenerateJsonSchema):
    """Pydantic's generator for documents whose optional fields are absent at their default, never null."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002 -- the signature is pydantic's
        return False

    def default_schema(self, schema: Any) -> JsonSchemaValue:
        value = super().default_schema(schema)
        if value.get("default", ...) is None:
            del value["default"]
            options = [option for option in value.pop("anyOf", ()) if option != {"type": "null"}]
            return value | (options[0] if len(options) == 1 else {"anyOf": options} if options else {})
        if isinstance(value.get("default"), dict | list | tuple):
            del value["default"]
        return value
