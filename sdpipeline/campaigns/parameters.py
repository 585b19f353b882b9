"""Generation parameters of the campaign file, and the limits of their values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sdpipeline.campaigns.spec_part import LARGEST_SIDE, Integer, Number, SpecPart
from sdpipeline.campaigns.yaml_source import shown


class Parameters(SpecPart):
    """Generation parameters under diffusers' names; a string is a template."""

    width: Integer | None = None
    """Pixels; in super-resolution the input decides."""
    height: Integer | None = None
    """Pixels; in super-resolution the input decides."""
    num_inference_steps: Integer | None = None
    """Denoising steps."""
    guidance_scale: Number | None = None
    """How closely the prompt is followed; 1 means no guidance."""
    strength: Number | None = None
    """How much of the input picture is changed: 0 keeps it, 1 ignores it."""
    scheduler: str | None = None
    """The scheduler (sampler) of the denoising steps."""
    negative_prompt: str | None = None
    """Prompt for what the picture should not show; a template."""
    clip_skip: Integer | None = None
    """Number of last text encoder layers to skip."""
    noise_level: Integer | None = None
    """Noise that an upscaler adds to its input."""
    resize: str | None = None
    """Resize mode for inputs of another size; without it they are refused."""


LIMITS: Mapping[str, tuple[type, float, float]] = {
    "width": (int, 8, LARGEST_SIDE),
    "height": (int, 8, LARGEST_SIDE),
    "num_inference_steps": (int, 1, 1000),
    "guidance_scale": (float, 0, 100),
    "strength": (float, 0, 1),
    "clip_skip": (int, 1, 12),
    "noise_level": (int, 0, 1000),
    "controlnet_conditioning_scale": (float, 0, 10),
    "weight": (float, -10, 10),
}
"""Numeric parameters: their type and inclusive range."""


def number(name: str, value: Any) -> int | float:
    """Convert a parameter's value to its type and check its range; raises ValueError."""
    kind, low, high = LIMITS[name]
    try:
        result = math.nan if isinstance(value, bool) else float(value)
    except (ValueError, OverflowError, TypeError):
        result = math.nan
    if not math.isfinite(result) or (kind is int and result != int(result)):
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"{shown(value)} is not {wanted} from {low:g} to {high:g}")
    if not low <= result <= high:
        raise ValueError(f"{shown(value)} is not from {low:g} to {high:g}")
    return int(result) if kind is int else result
