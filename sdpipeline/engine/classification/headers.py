"""Headers of safetensors files, and JSON documents beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdpipeline.errors import CheckpointError


def header(alias: str, path: Path) -> dict[str, list[int]]:
    """Return the tensors' names and shapes of a safetensors file, from its header alone."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > 100_000_000:
                raise CheckpointError(f"checkpoint {alias!r}: {path.name} is not a safetensors file")
            entries = json.loads(file.read(length))
        return {name: entry["shape"] for name, entry in entries.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {alias!r}: {path.name} is not a safetensors file") from error


def read_json(alias: str, path: Path) -> dict[str, Any]:
    """Return a JSON object; CheckpointError if the file is missing or holds anything else."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {alias!r}: {path.parent.name}/{path.name} is missing") from error
    except ValueError as error:
        raise CheckpointError(f"checkpoint {alias!r}: {path.name} is not JSON: {error}") from error
    except RecursionError as error:
        raise CheckpointError(f"checkpoint {alias!r}: {path.name} is nested too deeply") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"checkpoint {alias!r}: {path.name} is not a JSON object")
    return document
