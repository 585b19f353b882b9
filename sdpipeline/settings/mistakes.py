"""Errors in settings: unknown names and wrong values, each where the user wrote it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import SecretStr, ValidationError

from sdpipeline.errors import Mistake
from sdpipeline.settings.fields import Settings, section_names, setting_names
from sdpipeline.settings.sources import PREFIX, WrittenSetting, fields_by_name, toml_keys
from sdpipeline.suggestions import nearest_name

CUTOFF = 0.5
"""Similarity of a suggested name; settings share a prefix and are long."""

REMOVED = {"SDP_ENGINE__ENCODE_AHEAD": "remove it: it saved no time"}
"""Advice for each removed setting of earlier releases."""


def unknown_names(found: Sequence[WrittenSetting]) -> list[Mistake]:
    """Return mistakes for unknown names, with the nearest known name in the same notation."""
    known = setting_names()
    tables = {name for name, (_, default) in known.items() if isinstance(default, dict)}
    mistakes = []
    for each in found:
        if each.name in known or each.name in section_names() or any(each.name.startswith(f"{t}__") for t in tables):
            continue
        in_toml = not each.written.upper().startswith(PREFIX)
        names = {name: ".".join(toml_keys(name)) if in_toml else name for name in known}
        close = nearest_name(each.written if in_toml else each.name, names.values(), cutoff=CUTOFF)
        fix = f"did you mean {close}?" if close else "see docs/reference/settings.md"
        fix = REMOVED.get(each.name, fix)
        mistakes.append(Mistake(file=each.file, line=each.line, key=each.written, message="no such setting", fix=fix))
    return mistakes


def not_json(found: Sequence[WrittenSetting]) -> list[Mistake]:
    """Return mistakes for lists and tables that a variable does not hold as JSON."""
    known = setting_names()
    examples = {name: '["/data"]' if isinstance(known[name][1], list) else '{"team": "web"}' for name in known}
    lists = {name for name, (_, default) in known.items() if isinstance(default, list | dict)} | section_names()
    mistakes = []
    for each in found:
        if each.name in lists and each.value is not None:
            try:
                json.loads(each.value)
            except (ValueError, RecursionError):
                fix = f"write {examples.get(each.name, '{...}')}"
                mistakes.append(
                    Mistake(file=each.file, line=each.line, key=each.written, message="is not JSON", fix=fix)
                )
    return mistakes


def wrong_values(error: ValidationError, found: Sequence[WrittenSetting]) -> list[Mistake]:
    """Return mistakes for values that pydantic refuses."""
    names = {each.name for each in found}
    faults = [(fault, PREFIX + "__".join(str(part).upper() for part in fault["loc"])) for fault in error.errors()]
    # Unknown names were reported before; those inside a JSON value were not.
    return [
        _mistake(fault, name, found)
        for fault, name in faults
        if fault["type"] != "extra_forbidden" or name not in names
    ]


def _mistake(fault: Any, name: str, found: Sequence[WrittenSetting]) -> Mistake:
    """Return the mistake for a wrong value at its location; a secret's value is not shown."""
    full = name
    while name not in setting_names() and "__" in name and name not in section_names():
        name = name.rpartition("__")[0]
    place = next((each for each in found if each.name == name or name.startswith(f"{each.name}__")), None)
    known = fields_by_name(Settings).get(name)
    secret = known is not None and SecretStr in (known[0].annotation, *get_args(known[0].annotation))
    # Pydantic puts "Value error, " before the text of our own ValueError.
    message = str(fault["ctx"]["error"] if fault["type"] == "value_error" else fault["msg"])
    if fault["type"] == "extra_forbidden":
        message = f"no such setting: {full}"
    elif str(fault["type"]).startswith("model_"):
        message = f"holds settings, as in {next(n for n in setting_names() if n.startswith(f'{name}__'))}"
    elif not secret and isinstance(fault["input"], str | int | float):
        given = re.sub(r"//.*@", "//", str(fault["input"]), flags=re.DOTALL)
        message = f"found {given[:60]!r}: {message[0].lower()}{message[1:]}"
    if place is None:
        return Mistake(key=name, message=message)
    return Mistake(file=place.file, line=place.line, key=place.written, message=message)
