"""How much of a record goes into a picture: all of it but the prompts that its campaign keeps back."""

from __future__ import annotations

from typing import Any

from sdpipeline.domain import Json, hashed

INCLUDE_PROMPT = ("full", "hash", "none")
"""From the most that is told to the least."""

_PROMPTS = ("prompt", "negative_prompt")


def disclosed(record: Json) -> Json:
    """The record as it is embedded; ``include_prompt`` in it says how its prompts and its ancestors' are told.

    With ``hash`` each prompt is replaced by the SHA-256 of its UTF-8 bytes, with ``none`` by nothing. Of an ancestor
    no more is told than both its own record and its descendant's allow.
    """
    told = include_prompt(record)
    own = _without_prompts(record, told)
    ancestors = record.get("ancestors", {})
    if ancestors:
        own["ancestors"] = {sha256: _without_prompts(each, told) for sha256, each in ancestors.items()}
    return own


def include_prompt(record: Json) -> str:
    """How a record's prompts are embedded; one that does not say, in full."""
    return str(record.get("include_prompt", "full"))


def tells_more(one: str, other: str) -> bool:
    """Whether ``one`` discloses what ``other`` keeps back."""
    return INCLUDE_PROMPT.index(one) < INCLUDE_PROMPT.index(other)


def own_part(record: Json) -> Json:
    """A record without its ancestors': what is signed with a picture, whose ingredients are signed with theirs."""
    return {name: value for name, value in record.items() if name != "ancestors"}


def _without_prompts(record: Json, allowed: str) -> Json:
    told = max(allowed, include_prompt(record), key=INCLUDE_PROMPT.index)
    asked: dict[str, Any] = record.get("asked", {})
    if told == "full":
        return dict(record)
    inputs = {role: _without_nested(about, told) for role, about in record.get("inputs", {}).items()}
    left_out = _PROMPTS if told == "hash" else (*_PROMPTS, *(f"{name}_sha256" for name in _PROMPTS))
    kept = {name: value for name, value in asked.items() if name not in left_out}
    if told == "hash":
        kept |= {f"{name}_sha256": hashed(asked[name].encode()) for name in _PROMPTS if name in asked}
    return record | {"asked": kept, "inputs": inputs, "include_prompt": told}


def _without_nested(about: Json, told: str) -> Json:
    """Records of the schema 1 hold their parents' inside what they say of their inputs."""
    nested = about.get("record")
    return about | {"record": _without_prompts(nested, told)} if nested else about
