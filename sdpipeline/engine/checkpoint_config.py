"""Configuration files of a checkpoint, as far as they are on this machine: read without loading any weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Config = Mapping[str, Any]


def read(directory: Path, name: str) -> Config:
    """Return a JSON object of the checkpoint; empty if the file is not on this machine or is not one."""
    try:
        document = json.loads((directory / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def own_scheduler(directory: Path) -> Config:
    """Return the checkpoint's scheduler configuration with the class that model_index.json names; empty if absent."""
    config = read(directory, "scheduler/scheduler_config.json")
    if not config:
        return {}
    entry = read(directory, "model_index.json").get("scheduler")
    named = entry[1] if isinstance(entry, list) and len(entry) == 2 and entry[1] else config.get("_class_name", "")
    return dict(config) | {"_class_name": str(named)}
