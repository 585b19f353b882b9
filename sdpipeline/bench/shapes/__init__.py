"""Published configurations of well-known checkpoints, used to build checkpoints of the same shape."""

from __future__ import annotations

import json
from importlib.resources import files

from sdpipeline.domain import Json

NAMES = ("sd15", "sdxl")


def shape(name: str) -> Json:
    """Return the configurations of that checkpoint's parts, and its usual picture settings."""
    found: Json = json.loads((files("sdpipeline.bench.shapes") / f"{name}.json").read_text(encoding="utf-8"))
    return found
