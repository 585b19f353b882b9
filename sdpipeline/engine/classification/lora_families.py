"""Classification of LoRA files by the layers that they change and the widths of these."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from sdpipeline.engine.classification import networks
from sdpipeline.engine.classification.classification import Classification, unsupported
from sdpipeline.engine.classification.loras import Layer, LoraFormat, Shape, lora_layers
from sdpipeline.engine.classification.networks import Network

_TEXT_SIDE = re.compile(r"self_attn_(?:[qkv]|out)_proj$|mlp_fc1$|SelfAttention_[qkv]$")
_CLIP_SIDE = re.compile(r"self_attn_(?:[qkv]|out)_proj$|mlp_fc[12]$")
_CONTROLLED = re.compile(r"^(?:img_in|x_embedder)$")
_FIX = "supported are LoRAs of SD 1.x and 2.x, SDXL, SD3 and Flux.1; remove it"


def classify_lora(alias: str, tensors: Mapping[str, Shape], found: LoraFormat) -> Classification:
    """Return the family of a LoRA; CheckpointError for one whose family does not run here."""
    layers = lora_layers(tensors)
    denoiser = [layer for layer in layers if layer.part == "denoiser"]
    if not denoiser:
        return Classification(kind="lora", family=_text_family(tensors, layers))
    network = networks.unet(denoiser) or networks.transformer(denoiser, native=_native(tensors, found))
    if network is None:
        raise unsupported(alias, f"a LoRA of an unknown network (it changes {denoiser[0].name!r})", _FIX)
    if network.family is None:
        raise unsupported(alias, f"a LoRA for {network.title}", _FIX)
    if network.family == "flux" and any(_CONTROLLED.match(e.name) and (e.width_in or 0) > 64 for e in denoiser):
        raise unsupported(alias, "a Flux Control LoRA (it reads a control map next to the latents)", _FIX)
    return Classification(kind="lora", family=_narrowed(network, layers))


def _native(tensors: Mapping[str, Shape], found: LoraFormat) -> bool:
    """Return True for layer names of the publisher's code; OneTrainer has diffusers' behind its own prefix."""
    return found.naming != "diffusers" and not any(name.startswith("lora_transformer_") for name in tensors)


def _narrowed(network: Network, layers: Sequence[Layer]) -> str:
    """Tell SD 1.x from 2.x by the text encoder if the U-Net's layers do not tell."""
    widths = _text_widths(layers, "text_encoder")
    if network.family == "sd1-or-sd2" and widths & {768, 1024}:
        return "sd2" if 1024 in widths else "sd1"
    return network.family or "any"


def _text_family(tensors: Mapping[str, Shape], layers: Sequence[Layer]) -> str:
    """Return the family of a LoRA that changes text encoders alone.

    CLIP-L (768) is a part of SD 1.x, SDXL, SD3 and Flux; only kohya's prefix ``lora_te_`` says SD 1.x. A second CLIP
    of any width is SDXL's, because trainers of SD3 seldom leave its transformer alone. Flux has T5 in its place.
    """
    if any(layer.part == "text_encoder_2" and _CLIP_SIDE.search(layer.name) for layer in layers):
        return "sdxl"
    first = _text_widths(layers, "text_encoder")
    if 1024 in first:
        return "sd2"
    alone = any(name.startswith("lora_te_") for name in tensors)
    return "sd1" if alone and 768 in first else "any"


def _text_widths(layers: Sequence[Layer], part: str) -> set[int]:
    found = (layer.width_in for layer in layers if layer.part == part and _TEXT_SIDE.search(layer.name))
    return {width for width in found if width}
