"""Stable Diffusion XL."""

from __future__ import annotations

from sdpipeline.engine.families.family import Family, controlled_cells, plain_cells

FAMILY = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    float32_decode=True,
    text="sdxl",
    num_inference_steps=30,
    guidance_scale=5.0,
    clip_skip=True,
    ip_adapter=True,
    textual_inversion=True,
    controlnets_of=frozenset({"sdxl", "sdxl-union"}),
    adapters_of=frozenset({"sdxl"}),
    latents_of="sdxl",
    plain=plain_cells("StableDiffusionXL", sized_image_to_image=False),
    controlled=controlled_cells("StableDiffusionXLControlNet", text_image="image", strength=0.8),
    union=controlled_cells("StableDiffusionXLControlNetUnion", text_image="control_image", strength=0.8),
)
