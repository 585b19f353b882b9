"""Stable Diffusion 9-channel inpainting."""

from __future__ import annotations

from sdpipeline.domain import Task
from sdpipeline.engine.families.family import Family, controlled_cells, only, plain_cells

FAMILY = Family(
    name="sd-inpaint",
    title="Stable Diffusion 9-channel inpainting",
    scheduler_config={"steps_offset": 1, "clip_sample": False},
    clip_skip=True,
    textual_inversion=True,
    controlnets_of=frozenset({"sd1", "sd2"}),
    adapters_of=frozenset({"sd1", "sd2", "sd1-or-sd2"}),
    latents_of="sd1",
    plain=only(Task.INPAINTING, plain_cells("StableDiffusion", sized_image_to_image=False)),
    controlled=only(Task.INPAINTING, controlled_cells("StableDiffusionControlNet", text_image="image", strength=0.8)),
)
