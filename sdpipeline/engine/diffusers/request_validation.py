"""Checks of a request against its checkpoints and their family, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sdpipeline.domain import AdapterInput, CheckpointRef, ControlNetInput, GenerationRequest
from sdpipeline.engine import config_checks
from sdpipeline.engine.annotators import known_annotator
from sdpipeline.engine.checkpoint_config import own_scheduler
from sdpipeline.engine.checkpoints import CheckpointFiles, adapter_refusal, controlnet_refusal, vae_refusal
from sdpipeline.engine.families import (
    Cell,
    Family,
    family,
    profile_refusal,
    prompt_syntax_refusal,
    scheduler_config,
    scheduler_refusal,
    size_refusal,
    strength_refusal,
    task_refusal,
)
from sdpipeline.engine.refusal import Refusal
from sdpipeline.engine.union_controlnets import combination_refusal, mode_refusal, uses_union
from sdpipeline.engine.weighted_prompts import WeightRefusedError, parse
from sdpipeline.errors import RequestRefusedError

Locate = Callable[[CheckpointRef], CheckpointFiles]


def check(request: GenerationRequest, locate: Locate, *, recorded: bool = False) -> None:
    """Raise RequestRefusedError, with the field and the fix, if this family cannot run the request.

    A reproduced picture is ``recorded``: its scheduler's configuration is that of the record, which has run before.
    """
    for refused in _refusals(request, locate, recorded=recorded):
        if refused is not None:
            raise RequestRefusedError(str(refused))


def _refusals(request: GenerationRequest, locate: Locate, *, recorded: bool) -> Iterator[Refusal | None]:
    """Check one rule after the other; the later ones rely on those before."""
    base = locate(request.checkpoint)
    controlnets = [locate(use.checkpoint) for use in request.controlnets]
    if base.kind != "checkpoint":
        message = f"{base.alias!r} is a {base.kind}; it cannot make pictures by itself"
        yield Refusal(key="checkpoint", message=message)
    yield task_refusal(base.family, request.task, controlnets=len(controlnets))
    row = family(base.family)
    cell = row.cell(request.task, controlnets=len(controlnets), union=uses_union(controlnets))
    assert cell is not None
    yield scheduler_refusal(row, request.scheduler)
    if not recorded:
        own, steps = own_scheduler(base.directory), request.num_inference_steps
        yield scheduler_config.refusal(row, own, request.scheduler, steps, controlnets=len(controlnets))
    yield _profile(request, row)
    yield size_refusal(row, "width", request.width)
    yield size_refusal(row, "height", request.height)
    yield _steps(request, cell)
    yield _extras(request, row)
    yield prompt_syntax_refusal(row, request.prompt_syntax)
    yield _weights(request)
    if controlnets and not cell.control_image:
        yield _own_control_picture(request, cell)
    for controlnet in controlnets:
        yield controlnet_refusal(request.task, base, controlnet)
    yield config_checks.pooled_refusal([each.directory for each in controlnets], request.profile)
    for n, control in enumerate(request.controlnets):
        yield mode_refusal(n, controlnets[n], control.control_mode)
        yield _annotator(n, control, locate)
    yield combination_refusal(controlnets, [control.control_mode for control in request.controlnets])
    for field, kind, uses in adapters_of(request):
        for use in uses:
            yield adapter_refusal(field, kind, base, locate(use.checkpoint))
    if request.vae:
        yield vae_refusal(base, locate(request.vae))


def adapters_of(request: GenerationRequest) -> list[tuple[str, str, tuple[AdapterInput, ...]]]:
    """Return field, kind of checkpoint and the request's adapters of that kind."""
    return [
        ("loras", "lora", request.loras),
        ("textual_inversions", "textual-inversion", request.textual_inversions),
        ("ip_adapters", "ip-adapter", request.ip_adapters),
    ]


def _profile(request: GenerationRequest, row: Family) -> Refusal | None:
    if request.exact and request.profile != "exact":
        fix = "use profile exact, or another reproducibility"
        return Refusal(key="profile", message=f"{request.profile!r} is not strict", fix=fix)
    return profile_refusal(row, request.profile)


def _steps(request: GenerationRequest, cell: Cell) -> Refusal | None:
    if request.num_inference_steps < 1:
        return Refusal(key="num_inference_steps", message=f"must be at least 1, not {request.num_inference_steps}")
    if request.strength is None:
        return None
    if cell.strength is None:
        message = f"{request.task} through {cell.pipeline} does not take it"
        return Refusal(key="strength", message=message, fix="leave it out")
    return strength_refusal(request.strength, request.num_inference_steps)


def _extras(request: GenerationRequest, row: Family) -> Refusal | None:
    """Refuse an option that the family would silently ignore."""
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
            return Refusal(key=name, message=f"{row.title} does not take it", fix="leave it out")
    if request.noise_level is not None and not 0 <= request.noise_level <= (row.max_noise_level or 0):
        message = f"must be from 0 to {row.max_noise_level}, not {request.noise_level}"
        return Refusal(key="noise_level", message=message)
    if request.clip_skip is not None and request.clip_skip < 1:
        message = f"must be at least 1, not {request.clip_skip}"
        return Refusal(key="clip_skip", message=message, fix="leave it out to skip nothing")
    return None


def _weights(request: GenerationRequest) -> Refusal | None:
    """Refuse a prompt with a weight that is not valid."""
    if request.prompt_syntax == "plain":
        return None
    for key in ("prompt", "negative_prompt"):
        try:
            parse(getattr(request, key))
        except WeightRefusedError as error:
            return Refusal(key=key, message=str(error))
    return None


def _own_control_picture(request: GenerationRequest, cell: Cell) -> Refusal | None:
    """Refuse a control picture if the cell's ControlNet reads the repainted picture and would ignore another one."""
    use = request.controlnets[0]
    if use.image != request.image or use.annotator != "none":
        message = f"{cell.pipeline} always uses the request's image"
        return Refusal(key="controlnets.0", message=message, fix="use the request's image with annotator: none")
    return None


def _annotator(n: int, use: ControlNetInput, locate: Locate) -> Refusal | None:
    """Refuse an annotator's checkpoint that is missing, not needed, or made for another annotator."""
    wanted, ref = known_annotator(use.annotator).learned, use.annotator_checkpoint
    field = f"controlnets.{n}.annotator_checkpoint"
    if wanted is None:
        message = f"annotator {use.annotator!r} does not take it"
        return Refusal(key=field, message=message, fix="leave it out") if ref else None
    if ref is None:
        return Refusal(key=field, message=f"annotator {use.annotator!r} needs a checkpoint for {wanted}")
    files = locate(ref)
    if (files.kind, files.family) != ("annotator", wanted):
        message = f"{files.alias!r} is a {files.kind} for {files.family}, not an annotator for {wanted}"
        return Refusal(key=field, message=message)
    return None
