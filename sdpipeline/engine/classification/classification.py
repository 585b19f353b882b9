"""Result of a classification."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification:
    """Kind and family of weights, by their content.

    ``scale`` is the factor by which an upscaler enlarges, else 1. ``native_size`` is the side in pixels of the square
    pictures that a checkpoint was trained on, None if unknown.
    """

    kind: str
    family: str
    scale: int = 1
    native_size: int | None = None
