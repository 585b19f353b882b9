"""Folders and facts that a user gives in addition to a single file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """Folders and facts that the user gave in addition to the file.

    ``tokenizer`` and ``parts`` are folders in diffusers' layout; configurations are read from both, weights of
    missing parts from ``parts`` alone. ``family`` and ``prediction_type`` decide what no tensor tells.
    """

    tokenizer: Path | None = None
    parts: Path | None = None
    family: str | None = None
    prediction_type: str | None = None
