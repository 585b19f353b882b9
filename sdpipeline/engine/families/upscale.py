"""Stable Diffusion x4 upscaler."""

from __future__ import annotations

from sdpipeline.domain import Task
from sdpipeline.engine.families.family import Cell, Family

FAMILY = Family(
    name="upscale",
    title="Stable Diffusion x4 upscaler",
    float32_decode=True,
    scheduler="ddim",
    num_inference_steps=50,
    guidance_scale=9.0,
    clip_skip=True,
    lora=False,
    noise_level=20,
    max_noise_level=350,
    latents_of="upscale",
    plain={Task.SUPER_RESOLUTION: Cell(pipeline="StableDiffusionUpscalePipeline", image="image", takes_size=False)},
)
