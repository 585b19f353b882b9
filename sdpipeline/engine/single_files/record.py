"""Record of a conversion within the checkpoint's folder."""

from __future__ import annotations

import json
import re
from collections.abc import Container
from pathlib import Path

RECORD = "conversion.json"
"""Record of the conversion within the folder: origin, converter and options. The manifest holds it."""


def origin_sha256(directory: Path, names: Container[str]) -> str | None:
    """Return the SHA-256 of the file that a folder was converted from; None for any other folder."""
    if RECORD not in names:
        return None
    try:
        found = json.loads((directory / RECORD).read_text(encoding="utf-8"))["origin"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) and re.fullmatch(r"[0-9a-f]{64}", found) else None
