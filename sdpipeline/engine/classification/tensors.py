"""Classification of one safetensors file without a configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from sdpipeline.engine.classification.classification import Classification
from sdpipeline.engine.classification.headers import header
from sdpipeline.errors import CheckpointError


def classify_tensors(alias: str, path: Path) -> Classification:
    """Classify one safetensors file by its header; CheckpointError if nothing here loads it."""
    tensors = header(alias, path)
    if any("lora" in name.lower() for name in tensors):
        return Classification(kind="lora", family=_lora_family(tensors), scale=1)
    if any(name.startswith(("image_proj.", "ip_adapter.")) for name in tensors):
        return Classification(kind="ip-adapter", family=_width_family(tensors, "to_k_ip"), scale=1)
    if {"clip_l", "clip_g"} <= tensors.keys():
        return Classification(kind="textual-inversion", family="sdxl", scale=1)
    if len(tensors) == 1 and len(next(iter(tensors.values()))) <= 2:
        width = next(iter(tensors.values()))[-1]
        return Classification(kind="textual-inversion", family="sd2" if width == 1024 else "sd1", scale=1)
    factor = re.search(r"(?:^|\D)(\d)x(?=[-_ .]|$)|[xX](\d)", path.stem)
    if factor:
        return Classification(kind="checkpoint", family="gan-upscale", scale=int(factor[1] or factor[2]))
    raise CheckpointError(
        f"checkpoint {alias!r}: {path.name} is not a LoRA, IP-Adapter or textual inversion; "
        "an upscaler has its factor in its file name, as in 4x-name.safetensors"
    )


def _lora_family(tensors: Mapping[str, list[int]]) -> str:
    if any("single_transformer_blocks" in name or "single_blocks" in name for name in tensors):
        return "flux"
    if any(name.startswith("transformer.") for name in tensors):
        return "sd3"
    return _width_family(tensors, "attn2.to_k", "attn2_to_k")


def _width_family(tensors: Mapping[str, list[int]], *parts: str) -> str:
    """Return the family by the width of the text embedding that cross-attention reads; ``any`` if it changes none."""
    widths = {shape[-1] for name, shape in tensors.items() if any(p in name for p in parts) and "up" not in name}
    for width, family in ((2048, "sdxl"), (1024, "sd2"), (768, "sd1")):
        if width in widths:
            return family
    return "any"
