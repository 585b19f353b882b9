"""Stable Diffusion XL 9-channel inpainting."""

from __future__ import annotations

from sdpipeline.domain import Task
from sdpipeline.engine.families.family import Family, controlled_cells, only, plain_cells

FAMILY = Family(
    name="sdxl-inpaint",
    title="Stable Diffusion XL 9-channel inpainting",
    float32_decode=True,
    text="sdxl",
    num_inference_steps=30,
    guidance_scale=7.5,
    clip_skip=True,
    textual_inversion=True,
    controlnets_of=frozenset({"sdxl"}),
    adapters_of=frozenset({"sdxl"}),
    latents_of="sdxl",
    plain=only(Task.INPAINTING, plain_cells("StableDiffusionXL", sized_image_to_image=False)),
    controlled=only(Task.INPAINTING, controlled_cells("StableDiffusionXLControlNet", text_image="image", strength=0.8)),
)
