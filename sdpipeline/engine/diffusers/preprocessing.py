"""Preprocessing of input pictures and control maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sdpipeline.domain import ControlNetInput
from sdpipeline.engine import Pixels, PreparedRequest
from sdpipeline.engine.annotators import annotate, known_annotator, resize
from sdpipeline.engine.families import Cell
from sdpipeline.errors import InputImageError

Learned = Callable[[ControlNetInput, Pixels], Pixels]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Input pictures of the pipeline, all at the size at which it runs."""

    image: Pixels | None = None
    mask_image: Pixels | None = None
    control_maps: tuple[Pixels, ...] = ()


def pictures(prepared: PreparedRequest, cell: Cell, learned: Learned) -> Pictures:
    """Return the input pictures, resized only as the request says, and the control maps.

    ``learned`` draws the maps of annotators with weights.
    """
    request = prepared.request
    image = _sized(prepared, "image") if cell.image else None
    mask_image = _sized(prepared, "mask_image") if cell.mask_image else None
    maps = (
        tuple(_control_map(prepared, n, use, learned) for n, use in enumerate(request.controlnets))
        if cell.control_image
        else ()
    )
    if mask_image is not None and mask_image.max() < 128:
        raise InputImageError("mask_image: nothing is white, so nothing would be painted")
    return Pictures(image=image, mask_image=mask_image, control_maps=maps)


def annotator_parameters(use: ControlNetInput) -> dict[str, float | int]:
    """Return the parameters of the annotator, including defaults."""
    return known_annotator(use.annotator).resolve(use.annotator, dict(use.annotator_parameters))


def _sized(prepared: PreparedRequest, role: str) -> Pixels:
    request = prepared.request
    found = given(prepared, role)
    try:
        return resize(found, request.width, request.height, request.resize)
    except InputImageError as error:
        raise InputImageError(f"{role}: {error}") from error


def given(prepared: PreparedRequest, role: str) -> Pixels:
    """Return the picture in that role; InputImageError if it is missing or is not RGB with 8 bits per channel."""
    if role not in prepared.images:
        raise InputImageError(f"{role}: {prepared.request.task} needs this picture and has none")
    found = prepared.images[role]
    if found.dtype != np.uint8 or found.ndim != 3 or found.shape[2] != 3 or 0 in found.shape:
        raise InputImageError(f"{role}: expected height x width x 3 of 8 bits, not {found.shape} of {found.dtype}")
    return found


def _control_map(prepared: PreparedRequest, n: int, use: ControlNetInput, learned: Learned) -> Pixels:
    source = _sized(prepared, f"controlnets.{n}")
    if known_annotator(use.annotator).learned:
        return learned(use, source)
    return annotate(use.annotator, source, dict(use.annotator_parameters))
