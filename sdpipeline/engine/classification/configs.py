"""Values of configurations with their types checked, and the names of what is not supported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdpipeline.errors import CheckpointError


def integer(alias: str, where: str, config: Mapping[str, Any], key: str, default: int | None = None) -> int | None:
    """Return a positive integer of a configuration, or ``default`` if the key is missing or null.

    Raises CheckpointError that names the file and the key for a value of another type.
    """
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise _odd(alias, where, key, "a positive integer", value)
    return value


def number(alias: str, where: str, config: Mapping[str, Any], key: str, default: float) -> float:
    """Return a number of a configuration, or ``default``; CheckpointError for a value of another type."""
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _odd(alias, where, key, "a number", value)
    return value


def items(alias: str, where: str, config: Mapping[str, Any], key: str) -> list[Any]:
    """Return a list of a configuration, empty if missing or null; CheckpointError for a value of another type."""
    value = config.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise _odd(alias, where, key, "a list", value)
    return value


def text(alias: str, where: str, config: Mapping[str, Any], key: str) -> str:
    """Return a text of a configuration, empty if missing or null; CheckpointError for a value of another type."""
    value = config.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _odd(alias, where, key, "a text", value)
    return value


def _odd(alias: str, where: str, key: str, wanted: str, value: Any) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {alias!r}: {key} in {where} is {str(value)[:80]!r}, not {wanted}; fetch the published file again"
    )
