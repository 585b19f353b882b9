"""Disclosure of prompts: removes from an embedded record the prompts that its campaign withholds."""

from __future__ import annotations

from typing import Any

from sdpipeline.domain import Json, hashed

INCLUDE_PROMPT = ("full", "hash", "none")
"""Ordered from most to least disclosed."""

_PROMPTS = ("prompt", "negative_prompt")


def disclosed(record: Json) -> Json:
    """Return the record as it is embedded; its ``include_prompt`` says how it and its ancestors show prompts.

    With ``hash``, each prompt is replaced by the SHA-256 of its UTF-8 bytes; with ``none`` it is removed. An ancestor
    discloses no more than both its own record and its descendant's allow.
    """
    include = include_prompt(record)
    own = _without_prompts(record, include)
    ancestors = record.get("ancestors", {})
    if ancestors:
        own["ancestors"] = {sha256: _without_prompts(each, include) for sha256, each in ancestors.items()}
    return own


def include_prompt(record: Json) -> str:
    """Return how a record's prompts are embedded; the default is ``full``."""
    return str(record.get("include_prompt", "full"))


def discloses_more(one: str, other: str) -> bool:
    """Return True if ``one`` discloses what ``other`` withholds."""
    return INCLUDE_PROMPT.index(one) < INCLUDE_PROMPT.index(other)


def own_part(record: Json) -> Json:
    """Return a record without its ancestors' records: each ingredient carries its own signed record."""
    return {name: value for name, value in record.items() if name != "ancestors"}


def _without_prompts(record: Json, allowed: str) -> Json:
    level = max(allowed, include_prompt(record), key=INCLUDE_PROMPT.index)
    asked: dict[str, Any] = record.get("asked", {})
    if level == "full":
        return dict(record)
    inputs = {role: _without_nested(about, level) for role, about in record.get("inputs", {}).items()}
    left_out = _PROMPTS if level == "hash" else (*_PROMPTS, *(f"{name}_sha256" for name in _PROMPTS))
    kept = {name: value for name, value in asked.items() if name not in left_out}
    if level == "hash":
        kept |= {f"{name}_sha256": hashed(asked[name].encode()) for name in _PROMPTS if name in asked}
    return record | {"asked": kept, "inputs": inputs, "include_prompt": level}


def _without_nested(about: Json, level: str) -> Json:
    """Remove prompts from records of schema 1, which nest their parents' records in their inputs."""
    nested = about.get("record")
    return about | {"record": _without_prompts(nested, level)} if nested else about
