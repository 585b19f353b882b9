"""Request checks against the model family, and preprocessing of input pictures and control maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sdpipeline.domain import AdapterInput, CheckpointRef, ControlNetInput, GenerationRequest
from sdpipeline.engine import Pixels, PreparedRequest
from sdpipeline.engine.annotators import annotate, known_annotator, resize
from sdpipeline.engine.checkpoints import CheckpointFiles, adapter_misfit, misfit, vae_misfit
from sdpipeline.engine.families import Cell, Family, family, profile_refusal, refusal, scheduler_refusal
from sdpipeline.errors import InputImageError, RequestRefusedError

Learned = Callable[[ControlNetInput, Pixels], Pixels]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Input pictures of the pipeline, all at the size at which it runs."""

    image: Pixels | None = None
    mask_image: Pixels | None = None
    control_maps: tuple[Pixels, ...] = ()


def check(request: GenerationRequest, locate: Callable[[CheckpointRef], CheckpointFiles]) -> None:
    """Raise RequestRefusedError, with the field and the fix, if this family cannot run the request."""
    base = locate(request.checkpoint)
    controlnets = [locate(use.checkpoint) for use in request.controlnets]
    if base.kind != "checkpoint":
        raise RequestRefusedError(f"checkpoint: {base.alias!r} is a {base.kind}; it cannot make pictures by itself")
    reason = refusal(base.family, request.task, controlnets=len(controlnets))
    reason = reason or scheduler_refusal(base.family, request.scheduler) or _profile(request, base.family)
    if not reason:
        row = family(base.family)
        cell = row.cell(request.task, controlnets=len(controlnets))
        assert cell is not None
        reason = _size(request, row) or _steps(request, cell) or _extras(request, row)
        if controlnets and not cell.control_image:
            reason = reason or _own_control_picture(request, cell)
    for controlnet in controlnets:
        reason = reason or misfit(request.task, base, controlnet)
    for n, control in enumerate(request.controlnets):
        reason = reason or _annotator(n, control, locate)
    for field, kind, uses in adapters_of(request):
        for use in uses:
            reason = reason or adapter_misfit(field, kind, base, locate(use.checkpoint))
    if request.vae:
        reason = reason or vae_misfit(base, locate(request.vae))
    if reason:
        raise RequestRefusedError(reason)


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


def adapters_of(request: GenerationRequest) -> list[tuple[str, str, tuple[AdapterInput, ...]]]:
    """Return field, kind of checkpoint and the request's adapters of that kind."""
    return [
        ("loras", "lora", request.loras),
        ("textual_inversions", "textual-inversion", request.textual_inversions),
        ("ip_adapters", "ip-adapter", request.ip_adapters),
    ]


def annotator_parameters(use: ControlNetInput) -> dict[str, float | int]:
    """Return the parameters of the annotator, including defaults."""
    return known_annotator(use.annotator).resolve(use.annotator, dict(use.annotator_parameters))


def _annotator(n: int, use: ControlNetInput, locate: Callable[[CheckpointRef], CheckpointFiles]) -> str | None:
    """Return an error if the annotator's checkpoint is missing, not needed, or made for another annotator."""
    wanted, ref = known_annotator(use.annotator).learned, use.annotator_checkpoint
    field = f"controlnets.{n}.annotator_checkpoint"
    if wanted is None:
        return f"{field}: annotator {use.annotator!r} takes none; leave it out" if ref else None
    if ref is None:
        return f"{field}: annotator {use.annotator!r} needs a checkpoint for {wanted}"
    files = locate(ref)
    if (files.kind, files.family) != ("annotator", wanted):
        return f"{field}: {files.alias!r} is a {files.kind} for {files.family}, not an annotator for {wanted}"
    return None


def _size(request: GenerationRequest, row: Family) -> str | None:
    for name, value in (("width", request.width), ("height", request.height)):
        if value < row.size_multiple or value % row.size_multiple:
            near = max(row.size_multiple, round(value / row.size_multiple) * row.size_multiple)
            return f"{name}: {row.title} needs a multiple of {row.size_multiple}, not {value}; nearest: {near}"
    return None


def _steps(request: GenerationRequest, cell: Cell) -> str | None:
    if request.num_inference_steps < 1:
        return f"num_inference_steps: must be at least 1, not {request.num_inference_steps}"
    if request.strength is None:
        return None
    if cell.strength is None:
        return f"strength: {request.task} through {cell.pipeline} takes none; leave it out"
    if not 0 < request.strength <= 1 or int(request.num_inference_steps * request.strength) < 1:
        return (
            f"strength: {request.strength:g} of {request.num_inference_steps} num_inference_steps "
            "leaves no step to run; raise either"
        )
    return None


def _profile(request: GenerationRequest, family_name: str) -> str | None:
    if request.exact and request.profile != "exact":
        return f"profile: {request.profile!r} is not strict; use profile exact, or another reproducibility"
    why = profile_refusal(family_name, request.profile)
    return f"profile: {why}" if why else None


def _own_control_picture(request: GenerationRequest, cell: Cell) -> str | None:
    """Refuse a control picture if the cell's ControlNet reads the repainted picture and would ignore another one."""
    use = request.controlnets[0]
    if use.image != request.image or use.annotator != "none":
        return f"controlnets.0: {cell.pipeline} looks at the request's own image; give that one, annotator none"
    return None


def _extras(request: GenerationRequest, row: Family) -> str | None:
    """Return an error for an option that the family would silently ignore."""
    asked = {
        "negative_prompt": (bool(request.negative_prompt), row.negative_prompt),
        "clip_skip": (request.clip_skip is not None, row.clip_skip),
        "loras": (bool(request.loras), row.lora),
        "textual_inversions": (bool(request.textual_inversions), row.textual_inversion),
        "ip_adapters": (bool(request.ip_adapters), row.ip_adapter),
        "vae": (request.vae is not None, bool(row.latents_of)),
        "noise_level": (request.noise_level is not None, row.max_noise_level is not None),
    }
    for name, (wanted, possible) in asked.items():
        if wanted and not possible:
            return f"{name}: {row.title} takes none; leave it out"
    if request.noise_level is not None and not 0 <= request.noise_level <= (row.max_noise_level or 0):
        return f"noise_level: must be from 0 to {row.max_noise_level}, not {request.noise_level}"
    if request.clip_skip is not None and request.clip_skip < 1:
        return f"clip_skip: must be at least 1, not {request.clip_skip}; leave it out to skip nothing"
    return None


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
