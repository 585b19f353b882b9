"""Stable Diffusion 3."""

from __future__ import annotations

from sdpipeline.domain import Task
from sdpipeline.engine.families.family import MANY, Cell, Family, plain_cells
from sdpipeline.engine.families.schedulers import FLOW_SCHEDULERS

FAMILY = Family(
    name="sd3",
    title="Stable Diffusion 3",
    text="sd3",
    size_multiple=16,
    schedulers=FLOW_SCHEDULERS,
    scheduler="flow-match-euler",
    num_inference_steps=28,
    guidance_scale=7.0,
    clip_skip=True,
    signed_control_maps=True,
    profiles=("exact", "fast"),
    controlnets_of=frozenset({"sd3"}),
    adapters_of=frozenset({"sd3"}),
    latents_of="sd3",
    plain=plain_cells("StableDiffusion3", strength=0.6),
    controlled={
        Task.TEXT_TO_IMAGE: Cell(
            pipeline="StableDiffusion3ControlNetPipeline", control_image="control_image", max_controlnets=MANY
        ),
        # This ControlNet is trained on the masked picture itself: picture and mask are the control inputs.
        Task.INPAINTING: Cell(
            pipeline="StableDiffusion3ControlNetInpaintingPipeline",
            image="control_image",
            mask_image="control_mask",
            max_controlnets=1,
            controlnets_of=frozenset({"sd3-inpaint"}),
        ),
    },
)
