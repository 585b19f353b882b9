"""Classification of folders in diffusers' layout, by model_index.json and the configurations of the parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdpipeline.engine.classification.classification import Classification
from sdpipeline.engine.classification.headers import read_json
from sdpipeline.errors import CheckpointError


def classify_pipeline(alias: str, directory: Path) -> Classification:
    """Classify a pipeline by model_index.json; CheckpointError if no family runs it."""
    index = read_json(alias, directory / "model_index.json")
    name = str(index.get("_class_name", ""))
    if name == "StableDiffusionUpscalePipeline":
        vae = read_json(alias, directory / "vae" / "config.json")
        return Classification(kind="checkpoint", family="upscale", scale=2 ** (len(vae["block_out_channels"]) - 1))
    if name == "StableDiffusionLatentUpscalePipeline":
        return Classification(kind="checkpoint", family="latent-upscale", scale=2)
    if name.startswith("StableDiffusion3"):
        return Classification(kind="checkpoint", family="sd3", scale=1)
    if name.startswith("Flux"):
        return _flux(alias, directory)
    if name.startswith("StableDiffusion") and "unet" in index:
        return _unet_family(alias, index, read_json(alias, directory / "unet" / "config.json"))
    raise CheckpointError(f"checkpoint {alias!r}: no family runs a {name or 'pipeline without a name'}")


def _flux(alias: str, directory: Path) -> Classification:
    channels = read_json(alias, directory / "transformer" / "config.json").get("in_channels", 64)
    if channels != 64:
        raise CheckpointError(f"checkpoint {alias!r}: a Flux with {channels} input channels is not supported")
    return Classification(kind="checkpoint", family="flux", scale=1)


def _unet_family(alias: str, index: Mapping[str, Any], unet: Mapping[str, Any]) -> Classification:
    channels = unet.get("in_channels", 4)
    if channels not in (4, 9):
        raise CheckpointError(f"checkpoint {alias!r}: a U-Net with {channels} input channels is not supported")
    if unet.get("addition_embed_type") == "text_time":
        if (index.get("text_encoder") or [None])[0] is None:
            raise CheckpointError(f"checkpoint {alias!r}: an SDXL refiner cannot start a picture; use its base")
        return Classification(kind="checkpoint", family="sdxl" if channels == 4 else "sdxl-inpaint", scale=1)
    if channels == 9:
        return Classification(kind="checkpoint", family="sd-inpaint", scale=1)
    return Classification(
        kind="checkpoint", family="sd2" if unet.get("cross_attention_dim") == 1024 else "sd1", scale=1
    )
