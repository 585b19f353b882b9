"""GAN upscaler."""

from __future__ import annotations

from sdpipeline.domain import Task
from sdpipeline.engine.families.family import Cell, Family
from sdpipeline.engine.families.schedulers import NOISE_SCHEDULERS

FAMILY = Family(
    name="gan-upscale",
    title="GAN upscaler",
    text="none",
    size_multiple=1,
    schedulers=NOISE_SCHEDULERS | {"none"},  # no scheduler runs, so any default of a campaign is accepted
    scheduler="none",
    num_inference_steps=1,
    guidance_scale=1.0,
    negative_prompt=False,
    lora=False,
    profiles=("exact",),
    plain={Task.SUPER_RESOLUTION: Cell(pipeline="spandrel", image="image", takes_size=False)},
)
