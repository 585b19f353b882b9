"""Result of a classification, and the refusal of weights that nothing here runs."""

from __future__ import annotations

from dataclasses import dataclass

from sdpipeline.errors import CheckpointError

SUPPORTED = "SD 1.x and 2.x, SDXL, SD3 and Flux.1"
"""Networks that run here, for messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification:
    """Kind and family of weights, by their content.

    ``family`` is ``any`` if the tensors fit several families, so that only loading can tell. ``scale`` is the factor
    by which an upscaler enlarges, else 1. ``native_size`` is the side in pixels of the square pictures that a
    checkpoint was trained on, None if unknown. ``layout`` is None if the files can be registered as they are; ``ldm``,
    ``native`` and ``diffusers`` name the tensor names of one file that has to be converted into a folder first.
    """

    kind: str
    family: str
    scale: int = 1
    native_size: int | None = None
    layout: str | None = None


def unsupported(alias: str, what: str, fix: str = f"supported are {SUPPORTED}; remove it") -> CheckpointError:
    """Return the refusal of weights that are recognised, but run nowhere here."""
    return CheckpointError(f"checkpoint {alias!r} is {what}, which is not supported; {fix}")
