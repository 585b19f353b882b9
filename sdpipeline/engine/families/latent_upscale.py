"""Stable Diffusion x2 latent upscaler."""

from __future__ import annotations

from sdpipeline.domain import Task
from sdpipeline.engine.families.family import Cell, Family

FAMILY = Family(
    name="latent-upscale",
    title="Stable Diffusion x2 latent upscaler",
    text="clip-hidden",
    size_multiple=64,
    schedulers=frozenset({"euler"}),
    scheduler="euler",
    num_inference_steps=20,
    guidance_scale=1.0,
    guidance_embedding=False,
    lora=False,
    profiles=("exact",),
    latents_of="sd1",
    plain={
        Task.SUPER_RESOLUTION: Cell(pipeline="StableDiffusionLatentUpscalePipeline", image="image", takes_size=False)
    },
)
