"""Fields of a picture's record that only some requests have."""

from __future__ import annotations

from sdpipeline.domain import AdapterInput, ControlNetInput, GenerationRequest, Json
from sdpipeline.engine.diffusers.batch import Latents, Member, PassSettings
from sdpipeline.engine.diffusers.preprocessing import annotator_parameters
from sdpipeline.engine.diffusers.request_validation import adapters_of
from sdpipeline.engine.weighted_prompts import REFERENCE, parse


def details(member: Member, settings: PassSettings, latents: Latents) -> Json:
    """Return the optional fields of the record, with the family's defaults for what the request left out."""
    request = member.request
    details: Json = {"prompt_tokens": settings.prompt_tokens}
    resolved = {
        "strength": settings.strength,
        "noise_level": settings.noise_level,
        "clip_skip": request.clip_skip,
        "resize": request.resize,
    }
    details |= {name: value for name, value in resolved.items() if value is not None}
    if latents.calls:
        details["calls"] = [list(pair) for pair in latents.calls]
    if request.prompt_syntax == "weighted":
        details["prompt_weights"] = _weights(request, guided=settings.guided)
    details |= {name: [_adapter(use) for use in uses] for name, _, uses in adapters_of(request) if uses}
    if request.controlnets:
        details["controlnets"] = [_controlnet(use) for use in request.controlnets]
    return details


def _weights(request: GenerationRequest, *, guided: bool) -> Json:
    """Return the weights of the prompts' parts, without their words, which a campaign may withhold."""
    used: Json = {"reference": REFERENCE, "prompt": list(parse(request.prompt).weights)}
    if guided:
        used["negative_prompt"] = list(parse(request.negative_prompt).weights)
    return used


def _adapter(use: AdapterInput) -> Json:
    return {"alias": use.checkpoint.alias, "digest": use.checkpoint.digest, "weight": use.weight}


def _controlnet(use: ControlNetInput) -> Json:
    used: Json = {
        "alias": use.checkpoint.alias,
        "digest": use.checkpoint.digest,
        "annotator": use.annotator,
        "annotator_parameters": annotator_parameters(use),
        "controlnet_conditioning_scale": use.controlnet_conditioning_scale,
        "control_guidance_start": use.control_guidance_start,
        "control_guidance_end": use.control_guidance_end,
    }
    if use.control_mode is not None:
        used["control_mode"] = use.control_mode
    if use.annotator_checkpoint:
        used["annotator_checkpoint"] = use.annotator_checkpoint.digest
    return used
