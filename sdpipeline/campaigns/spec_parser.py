"""Parser of a campaign's shape: every invalid part becomes a fault at its place in the file."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from enum import Enum
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from sdpipeline.campaigns.parameters import Parameters
from sdpipeline.campaigns.seeds import SeedRange
from sdpipeline.campaigns.spec import Budget, CampaignSpec, Policy, Provenance, Rows, Schedule
from sdpipeline.campaigns.spec_part import NAME
from sdpipeline.campaigns.stage_spec import (
    ControlNetSpec,
    ImageSpec,
    IPAdapterSpec,
    LoraSpec,
    OutputSpec,
    Quality,
    Stage,
    TextualInversionSpec,
)
from sdpipeline.campaigns.yaml_source import Faults, KeyPath, shown
from sdpipeline.suggestions import nearest, nearest_name


def parse(data: Any, faults: Faults) -> CampaignSpec | None:
    """Validate the file's shape; return ``None`` if no part of it can be checked.

    Invalid parts go to ``faults`` and are removed or replaced, so that the rest can be checked too.
    """
    if not isinstance(data, dict):
        faults.add((), "is not a campaign", "write at least name:, checkpoint: and stages:")
        return None
    data = copy.deepcopy(data)
    # A replacement never fails itself, so the second round only sees what the first one uncovered.
    for _ in range(3):
        try:
            return CampaignSpec.model_validate(data)
        except ValidationError as error:
            places = note_faults(error, data, (), faults)
            faults.next_phase()
        if any(path[:1] == ("stages",) and len(path) == 1 for path in places):
            return None
        for path in places:
            _mend(data, path)
    return None


def note_faults(
    error: ValidationError, data: Any, at: KeyPath, faults: Faults, *, shape: type[BaseModel] | None = None
) -> list[KeyPath]:
    """Note Pydantic's errors about the value ``at`` a place; a union's errors about one value become one.

    ``shape`` is the model of a file that is not a campaign.
    """
    grouped: dict[KeyPath, list[Any]] = {}
    for fault in error.errors():
        grouped.setdefault(_in_file(tuple(fault["loc"]), data), []).append(fault)
    unknown = {path for path, about in grouped.items() if about[0]["type"] == "extra_forbidden"}
    for path, about in grouped.items():
        misspelt = [str(other[-1]) for other in unknown if other[:-1] == path[:-1]]
        if about[0]["type"] == "missing" and nearest_name(str(path[-1]), misspelt):
            faults.hide((*at, *path))  # it is there, misspelt
            continue
        faults.add((*at, *path), *_describe(about, (*at, *path), shape or CampaignSpec))
    for path in unknown:
        # Do not report the key it was meant for as missing as well.
        meant = nearest_name(str(path[-1]), _known_keys((*at, *path), shape or CampaignSpec))
        if meant is not None:
            faults.hide((*at, *path[:-1], meant))
    return list(grouped)


def _in_file(loc: KeyPath, data: Any) -> KeyPath:
    """Return the error's place without the parts pydantic adds for unions (type names and the like)."""
    path: KeyPath = ()
    here = data
    for n, part in enumerate(loc):
        last = n == len(loc) - 1
        keyed = isinstance(here, dict) and isinstance(part, str) and (part in here or (last and part != "[key]"))
        indexed = isinstance(here, list) and isinstance(part, int) and part < len(here)
        if keyed or indexed:
            path = (*path, part)
            here = here.get(part) if isinstance(here, dict) else here[part]
    return path


REMOVED_VALUES = {("reproducibility", "fast"): "write profile: fast, and leave reproducibility out"}
"""Replacement of each removed value of earlier releases, by key and value."""


def _describe(about: list[Any], path: KeyPath, shape: type[BaseModel]) -> tuple[str, str | None]:
    kinds = [fault["type"] for fault in about]
    if "extra_forbidden" in kinds:
        return "unknown key", nearest(str(path[-1]), _known_keys(path, shape))
    if "missing" in kinds:
        return "is missing", "add it"
    fault = about[0]
    if any(fault["loc"][-1:] == ("[key]",) for fault in about):
        return "is not a valid variable name", "a letter or _ first, then letters, digits and _, at most 63"
    found, expected = shown(fault["input"]), _expected(fault)
    if {"bool_type", "string_type"} <= set(kinds):
        expected = "a text, a number, true or false"
    elif "string_type" in kinds and len(kinds) > 1:
        expected += " or a template"
    if fault["type"] in ("enum", "literal_error"):
        field = _model_at(path, shape).model_fields[str(path[-1])]
        removed = REMOVED_VALUES.get((str(path[-1]), str(fault["input"])))
        return f"found {found}", removed or nearest(str(fault["input"]), _options(field.annotation))
    return f"found {found}, expected {expected}", None


def _expected(fault: Any) -> str:
    limits = fault.get("ctx", {})
    match fault["type"]:
        case "string_pattern_mismatch" if limits["pattern"] == NAME:
            return "a name of a-z, 0-9 and -, at most 63, that does not start with -"
        case "greater_than":
            return f"more than {limits['gt']:g}"
        case "greater_than_equal":
            return f"at least {limits['ge']:g}"
        case "less_than_equal":
            return f"at most {limits['le']:,}"
        case "too_short":
            return "at least one entry"
        case "too_long":
            return f"at most {limits['max_length']:,} entries"
    words = {"int": "a whole number", "float": "a number", "string": "a text", "bool": "true or false"}
    words |= {"list": "a list", "dict": "keys with values", "model": "keys with values", "finite": "a finite number"}
    return words.get(str(fault["type"]).split("_")[0], str(fault["msg"]).lower())


def _options(annotation: Any) -> list[str]:
    """Return the words that a type allows: values of its enums and literals, also inside a union."""
    if get_origin(annotation) is Literal:
        return [str(word) for word in get_args(annotation)]
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [str(each.value) for each in annotation]
    return [word for each in get_args(annotation) for word in _options(each)]


def _known_keys(path: KeyPath, shape: type[BaseModel]) -> list[str]:
    return list(_model_at(path, shape).model_fields)


def _model_at(path: KeyPath, shape: type[BaseModel]) -> type[BaseModel]:
    """Return the model that has the key at the end of ``path``."""
    inner: Mapping[str, type[BaseModel]] = {
        "stages": Stage,
        "defaults": Parameters,
        "output": OutputSpec,
        "budget": Budget,
        "schedule": Schedule,
        "quality": Quality,
        "policy": Policy,
        "provenance": Provenance,
        "seeds": SeedRange,
        "image": ImageSpec,
        "mask_image": ImageSpec,
        "controlnets": ControlNetSpec,
        "loras": LoraSpec,
        "textual_inversions": TextualInversionSpec,
        "ip_adapters": IPAdapterSpec,
        "rows": Rows,
    }
    for part in path[:-1]:
        shape = inner.get(part, shape) if isinstance(part, str) else shape
    return shape


def _mend(data: Any, path: KeyPath) -> None:
    """Remove the invalid value at ``path``, or replace it if it is required."""
    holder = data
    for part in path[:-1]:
        inside = part in holder if isinstance(holder, dict) else isinstance(part, int) and part < len(holder)
        if not inside:
            return  # removed with another fault
        holder = holder[part]
    stand_in = _stand_in(path)
    if stand_in is not None:
        holder[path[-1]] = stand_in
    elif isinstance(holder, dict):
        holder.pop(path[-1], None)
    else:
        _mend(data, path[:-1])


def _stand_in(path: KeyPath) -> Any:
    picture = {"file": "-"}
    match path:
        case ("name",):
            return "unnamed"
        case ("checkpoint",) | ("stages", int(), str(), int(), "checkpoint"):
            return ""
        case ("stages", int(n)):
            return {"id": f"unnamed-{n}", "task": "text-to-image", "prompt": "-"}
        case ("stages", int(n), "id"):
            return f"unnamed-{n}"
        case ("stages", int(), "task"):
            return "text-to-image"
        case ("stages", int(), "controlnets", int()):
            return {"checkpoint": "", "image": picture}
        case ("stages", int(), "ip_adapters", int()):
            return {"checkpoint": "", "image": picture}
        case ("stages", int(), "loras" | "textual_inversions", int()):
            return {"checkpoint": ""}
        case ("stages", int(), "controlnets" | "ip_adapters", int(), "image"):
            return picture
    return None
