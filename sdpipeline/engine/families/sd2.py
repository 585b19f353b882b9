"""Stable Diffusion 2.x."""

from __future__ import annotations

from sdpipeline.engine.families.family import Family, controlled_cells, plain_cells

FAMILY = Family(
    name="sd2",
    title="Stable Diffusion 2.x",
    scheduler_config={"steps_offset": 1, "clip_sample": False},
    clip_skip=True,
    textual_inversion=True,
    controlnets_of=frozenset({"sd2"}),
    adapters_of=frozenset({"sd2", "sd1-or-sd2"}),
    latents_of="sd1",
    plain=plain_cells("StableDiffusion", sized_image_to_image=False),
    controlled=controlled_cells("StableDiffusionControlNet", text_image="image", strength=0.8),
)
