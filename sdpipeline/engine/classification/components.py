"""Classification of folders that hold one network with its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdpipeline.engine.classification.classification import Classification
from sdpipeline.errors import CheckpointError

SAFETY_CHECKER = "safety-checker"
"""Kind of a checkpoint that checks finished pictures."""

ANNOTATORS = {
    "depth_anything": "depth",
    "dpt": "depth",
    "segformer": "segmentation",
    "upernet": "segmentation",
    "vitpose": "pose",
}
"""transformers' model_type of the networks that turn a picture into a control map, with the kind of map."""


def classify_component(alias: str, config: Mapping[str, Any]) -> Classification:
    """Classify one network by its config.json; CheckpointError if nothing here loads it."""
    name = str(config.get("_class_name", ""))
    if name == "ControlNetModel":
        if config.get("addition_embed_type") == "text_time":
            return Classification(kind="controlnet", family="sdxl", scale=1)
        return Classification(
            kind="controlnet", family="sd2" if config.get("cross_attention_dim") == 1024 else "sd1", scale=1
        )
    if name == "SD3ControlNetModel":
        return Classification(
            kind="controlnet", family="sd3-inpaint" if config.get("extra_conditioning_channels") else "sd3", scale=1
        )
    if name == "FluxControlNetModel":
        return Classification(kind="controlnet", family="flux", scale=1)
    if name == "AutoencoderKL":
        return Classification(kind="vae", family=_vae_family(config), scale=1)
    if config.get("architectures") == ["StableDiffusionSafetyChecker"]:
        return Classification(kind=SAFETY_CHECKER, family="clip", scale=1)
    if config.get("model_type") in ANNOTATORS:
        return Classification(kind="annotator", family=ANNOTATORS[config["model_type"]], scale=1)
    raise CheckpointError(
        f"checkpoint {alias!r}: a {name or config.get('model_type') or 'config.json'} is not supported"
    )


def _vae_family(config: Mapping[str, Any]) -> str:
    """Return the family by the range of the latents, which has to match between autoencoders."""
    if config.get("latent_channels") == 16:
        return "flux" if abs((config.get("shift_factor") or 0) - 0.1159) < 1e-3 else "sd3"
    scaling = config.get("scaling_factor", 0.18215)
    known = {0.13025: "sdxl", 0.08333: "upscale"}
    return next((family for factor, family in known.items() if abs(scaling - factor) < 1e-4), "sd1")
