"""Classification of folders that hold one network with its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdpipeline.engine.classification.classification import Classification, unsupported
from sdpipeline.engine.classification.configs import integer, items, number, text
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

_PART = "it is a part: register the folder of the whole checkpoint that holds model_index.json"
_NO_CONTROL = "use a ControlNet of SD 1.x, SD 2.x, SDXL, SD3 or Flux.1"

UNSUPPORTED: Mapping[str, tuple[str, str]] = {
    "UNet2DConditionModel": ("a U-Net alone", _PART),
    "SD3Transformer2DModel": ("an SD3 transformer alone", _PART),
    "FluxTransformer2DModel": ("a Flux transformer alone", _PART),
    "T2IAdapter": ("a T2I-Adapter", _NO_CONTROL),
    "MultiAdapter": ("a T2I-Adapter", _NO_CONTROL),
    "ControlNetXSAdapter": ("a ControlNet-XS", _NO_CONTROL),
    "SparseControlNetModel": ("a ControlNet for AnimateDiff", _NO_CONTROL),
    "QwenImageControlNetModel": ("a ControlNet for Qwen-Image", _NO_CONTROL),
    "ZImageControlNetModel": ("a ControlNet for Z-Image", _NO_CONTROL),
    "HunyuanDiT2DControlNetModel": ("a ControlNet for HunyuanDiT", _NO_CONTROL),
    "SanaControlNetModel": ("a ControlNet for Sana", _NO_CONTROL),
    "CosmosControlNetModel": ("a ControlNet for Cosmos", _NO_CONTROL),
    "AutoencoderTiny": ("a tiny autoencoder (TAESD)", "use an AutoencoderKL"),
    "AsymmetricAutoencoderKL": ("an asymmetric autoencoder", "use an AutoencoderKL"),
    "ConsistencyDecoderVAE": ("a consistency decoder", "use an AutoencoderKL"),
    "ReduxImageEncoder": ("Flux Redux", "use an IP-Adapter with SD 1.x or SDXL"),
    "MotionAdapter": ("an AnimateDiff motion module", "no video is made here"),
    "clip_text_model": ("a CLIP text encoder alone", _PART),
    "clip_vision_model": ("a CLIP vision encoder alone", "put it into the folder image_encoder of an IP-Adapter"),
    "siglip_vision_model": ("a SigLIP vision encoder alone", _PART),
    "clip": ("a CLIP model alone", _PART),
    "t5": ("a T5 text encoder alone", _PART),
}
"""diffusers' classes and transformers' model types that do not run by themselves: what they are, and what to do."""


def classify_component(alias: str, config: Mapping[str, Any]) -> Classification:
    """Classify one network by its config.json; CheckpointError if nothing here loads it."""
    where = "config.json"
    name = text(alias, where, config, "_class_name")
    if name in ("ControlNetModel", "ControlNetUnionModel"):
        return Classification(kind="controlnet", family=_controlnet_family(alias, config))
    if name == "SD3ControlNetModel":
        extra = integer(alias, where, config, "extra_conditioning_channels") if _given(config) else None
        return Classification(kind="controlnet", family="sd3-inpaint" if extra else "sd3")
    if name == "FluxControlNetModel":
        return Classification(kind="controlnet", family="flux")
    if name == "AutoencoderKL":
        return Classification(kind="vae", family=_vae_family(alias, config))
    if "StableDiffusionSafetyChecker" in items(alias, where, config, "architectures"):
        return Classification(kind=SAFETY_CHECKER, family="clip")
    model_type = text(alias, where, config, "model_type")
    if model_type in ANNOTATORS:
        return Classification(kind="annotator", family=ANNOTATORS[model_type])
    for key in (name, model_type):
        if key in UNSUPPORTED:
            raise unsupported(alias, *UNSUPPORTED[key])
    if name.startswith("Autoencoder"):
        raise unsupported(alias, f"an autoencoder of another family ({name})", "use an AutoencoderKL")
    raise CheckpointError(
        f"checkpoint {alias!r}: a {name or model_type or 'config.json without _class_name'} is not supported"
    )


def _given(config: Mapping[str, Any]) -> bool:
    return bool(config.get("extra_conditioning_channels"))


def _controlnet_family(alias: str, config: Mapping[str, Any]) -> str:
    if config.get("addition_embed_type") == "text_time":
        return "sdxl"
    width = config.get("cross_attention_dim")
    if isinstance(width, list):
        width = width[0] if width else None
    checked = integer(alias, "config.json", {"cross_attention_dim": width}, "cross_attention_dim", 768)
    return "sd2" if checked == 1024 else "sd1"


def _vae_family(alias: str, config: Mapping[str, Any]) -> str:
    """Return the family by the range of the latents, which has to match between autoencoders."""
    where = "config.json"
    channels = integer(alias, where, config, "latent_channels", 4)
    if channels == 16:
        return "flux" if abs(number(alias, where, config, "shift_factor", 0) - 0.1159) < 1e-3 else "sd3"
    if channels != 4:
        raise unsupported(alias, f"an autoencoder with {channels} latent channels", "use one with 4 or 16")
    scaling = number(alias, where, config, "scaling_factor", 0.18215)
    known = {0.13025: "sdxl", 0.08333: "upscale"}
    return next((family for factor, family in known.items() if abs(scaling - factor) < 1e-4), "sd1")
