"""The published configurations of well-known checkpoints, from which ones of the same shape are built."""

from __future__ import annotations

import json
from importlib.resources import files

from sdpipeline.domain import Json

NAMES = ("sd15", "sdxl")


def shape(name: str) -> Json:
    """The configuration of that checkpoint's parts, and what its pictures usually are."""
    found: Json = json.loads((files("sdpipeline.bench.shapes") / f"{name}.json").read_text(encoding="utf-8"))
    return found
