"""Flux."""

from __future__ import annotations

from sdpipeline.engine.families.family import Family, controlled_cells, plain_cells
from sdpipeline.engine.families.schedulers import FLOW_SCHEDULERS

FAMILY = Family(
    name="flux",
    title="Flux",
    text="flux",
    size_multiple=16,
    schedulers=FLOW_SCHEDULERS,
    scheduler="flow-match-euler",
    num_inference_steps=28,
    guidance_scale=3.5,
    cuda_dtype="bfloat16",
    negative_prompt=False,
    signed_control_maps=True,
    profiles=("exact", "fast"),
    controlnets_of=frozenset({"flux", "flux-union"}),
    adapters_of=frozenset({"flux"}),
    latents_of="flux",
    plain=plain_cells("Flux", strength=0.6),
    controlled=controlled_cells("FluxControlNet", text_image="control_image", strength=0.6),
)
