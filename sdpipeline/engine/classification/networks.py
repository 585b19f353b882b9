"""Families of denoisers by the names and widths of their layers, whether whole networks or the layers of a LoRA.

Layer names are those of the published networks, as diffusers' ``lora_conversion_utils`` and ``single_file_utils`` list
them. A family that does not run here is named by its title, so that its files are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sdpipeline.engine.classification.loras import Layer

TINY = 256
"""No published denoiser is as narrow; the widths of smaller ones tell no family."""

CONTEXTS: Mapping[int, str] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
"""Families by the width of the text embedding that the U-Net's cross-attention reads."""

_UNET = re.compile(r"^(?:down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)_")
_CONTEXT = re.compile(r"attn2_(?:processor_)?to_[kv]$")
_SIDE = re.compile(r"attn1_(?:processor_)?to_|attn2_(?:processor_)?to_(?:q|out)|_proj_in$|_proj_out$|ff_net")


@dataclass(frozen=True, slots=True)
class Network:
    """``family`` of a denoiser that runs here or ``any``; None with the ``title`` of one that does not."""

    family: str | None
    title: str


_NAMED: Sequence[tuple[str, str]] = (
    (r"motion_modules_\d|motion_module", "AnimateDiff"),
    (r"attn1_Wqkv|attn2_kv_proj", "HunyuanDiT"),
    (r"kv_mapper|clip_txt_mapper|channelwise", "Stable Cascade"),
    (r"time_stack|temporal_transformer_blocks|temporal_res", "Stable Video Diffusion"),
    (r"distilled_guidance_layer", "Chroma"),
    (r"early_stream|mode_blocks", "Flux.3"),
    (r"double_stream_blocks|single_stream_blocks|caption_projection_\d+_linear", "HiDream"),
    (r"joint_transformer_blocks_|double_layers_\d|single_layers_\d|blocks_\d+_ff_linear_1$", "AuraFlow"),
    (r"double_stream_modulation|single_stream_modulation|to_qkv_mlp_proj|ff_(?:context_)?linear_(?:in|out)", "Flux.2"),
    (r"token_refiner|img_mlp_fc[12]|img_mod_linear|single_blocks_\d+_modulation_linear$", "HunyuanVideo"),
    (r"txtfusion|text_fusion", "Krea 2"),
    (r"audio_(?:attn|ff|adaln|patchify)|av_ca_", "LTX-2"),
    (r"(?:img|txt)_mlp_net|(?:img|txt)_mod_1$", "Qwen-Image"),
    (r"llm_adapter", "Anima"),
    (r"visual_transformer_blocks|text_transformer_blocks", "Kandinsky"),
    (r"blocks_\d+_attn_(?:qkv|proj|to)_[xy]", "Mochi"),
    (r"vace_blocks_|motion_encoder", "Wan"),
    (r"(?:^|_)blocks_\d+_(?:self|cross)_attn_(?:[qkvo]|[kv]_img|norm_[qk])$|^blocks_\d+_ffn_(?:[02]|net_)", "Wan"),
    (r"^blocks_\d+_(?:self|cross)_attn_\w+_proj", "Cosmos"),
    (r"blocks_\d+_cross_attn_(?:q|kv)_linear", "PixArt or Sana"),
    (r"layers_\d+_self_attn_qkv_proj", "OmniGen"),
    (
        r"noise_refiner_|context_refiner_|layers_\d+_attention_to_|layers_\d+_attention_(?:qkv|out)|layers_\d+_attn_to_|layers_\d+_feed_forward_w\d",
        "",
    ),
    (r"patchify_proj", "LTX-Video"),
)
"""Patterns of layer names that only one family has; the first match wins, '' is decided by width."""

_NAMED_PATTERNS = tuple((re.compile(pattern), title) for pattern, title in _NAMED)
_READS = re.compile(
    r"(?:attn_to_[qkv]|attn_add_[qkv]_proj|attn[12]_to_[qkv]|attn_qkv|attention_(?:to_[qkv]|qkv)|linear1|"
    r"feed_forward_w[13]|ff_(?:context_)?net_0_proj|proj_mlp|norm1(?:_context)?_linear)$"
)
_WRITES = re.compile(r"(?:ff_(?:context_)?net_2|attn_to_out_0|attn_to_add_out|attn1_to_out_0|feed_forward_w2)$")
"""Layers whose input or output is as wide as the network."""
_SD3_ONLY = re.compile(r"^joint_blocks_\d")
_FLUX_NATIVE = re.compile(r"^(?:double_blocks|single_blocks)_\d")
_FLUX_SINGLE = re.compile(r"^single_transformer_blocks_\d")
_TRANSFORMER = re.compile(r"^transformer_blocks_(\d+)_")


def unet(layers: Iterable[Layer]) -> Network | None:
    """Return the family of a U-Net by its layers; None if they are not a U-Net's."""
    every = list(layers)
    own = [layer for layer in every if _UNET.match(layer.name)]
    if not own:
        return None
    if title := _named(own):
        return Network(None, title)
    if any(layer.name.startswith("encoder_hid_proj") for layer in every):
        return Network(None, "Kolors")
    widths = {layer.width_in for layer in own if _CONTEXT.search(layer.name)}
    if 1280 in widths:
        return Network(None, "the SDXL refiner")
    for width in (2048, 1024, 768):
        if width in widths:
            return Network(CONTEXTS[width], CONTEXTS[width])
    if any(width and width > TINY for width in widths):
        return Network(None, f"a U-Net that reads text embeddings of {max(filter(None, widths))}")
    return _unet_by_blocks(own)


def _unet_by_blocks(layers: Sequence[Layer]) -> Network:
    """Return the family by the blocks that have attention, and by their widths.

    SDXL has two and ten transformers in a block, and none at width 320; SD 1.x and 2.x have one, at 320, 640 and 1280.
    """
    sides = {layer.name: layer.width_in or layer.width_out for layer in layers if _SIDE.search(layer.name)}
    known = {name: width for name, width in sides.items() if width and width > TINY}
    if not known:
        return Network("any", "any")
    if {384, 768, 1536} & set(known.values()):
        return Network(None, "the SDXL refiner")
    if any(re.search(r"transformer_blocks_[1-9]", name) for name in known):
        return Network("sdxl", "sdxl")
    older = any(
        re.match(r"down_blocks_0_|up_blocks_[23]_|input_blocks_[12]_|output_blocks_(?:6|7|8|9|1\d)_", n) for n in known
    )
    older = older or any(width == 320 for width in known.values())
    older = older or any(n.startswith("up_blocks_1_") and width == 1280 for n, width in known.items())
    newer = any(re.match(r"up_blocks_0_|output_blocks_[012]_1_", name) for name in known) or 640 in known.values()
    family = "sd1-or-sd2" if older else "sdxl" if newer else "any"
    return Network(family, family)


def transformer(layers: Iterable[Layer], *, native: bool) -> Network | None:
    """Return the family of a diffusion transformer by its layers; None if they are not known.

    ``native``: the layers have the names of the publisher's own code, not those of diffusers.
    """
    own = list(layers)
    if title := _named(own):
        return Network(None, title)
    if any(_SD3_ONLY.match(layer.name) for layer in own):
        return Network("sd3", "sd3")
    if any(_FLUX_NATIVE.match(layer.name) or _FLUX_SINGLE.match(layer.name) for layer in own):
        return _flux_like(own)
    blocks = [int(match[1]) for layer in own if (match := _TRANSFORMER.match(layer.name))]
    if not blocks:
        return _other_blocks(own)
    widths = _widths(own)
    if any(re.match(r"transformer_blocks_\d+_attn1_", layer.name) for layer in own):
        return _alternating(widths)
    native = native and not any("_ff_" in layer.name for layer in own)  # Qwen-Image has img_mlp instead
    return _joint(widths, last=max(blocks), native=native) or _alternating(widths)


def _named(layers: Sequence[Layer]) -> str | None:
    """Return the title of a family that one of the names belongs to."""
    for pattern, title in _NAMED_PATTERNS:
        if any(pattern.search(layer.name) for layer in layers):
            return _TITLES.get((title, *sorted(_widths(layers))[-1:]), title or "Z-Image")
    return None


_TITLES: Mapping[tuple[str | int, ...], str] = {
    ("", 2304): "Lumina 2",
    ("", 2520): "OmniGen2",
    ("HunyuanVideo", 3584): "HunyuanImage",
}
"""Titles of networks with the same names of layers, by their width."""


def _widths(layers: Iterable[Layer]) -> set[int]:
    """Return the widths of the network, as the layers of its blocks tell them."""
    reads = {layer.width_in for layer in layers if layer.width_in and _READS.search(layer.name)}
    return reads | {layer.width_out for layer in layers if layer.width_out and _WRITES.search(layer.name)}


def _flux_like(layers: Sequence[Layer]) -> Network:
    """Tell Flux.1 from networks with the same names: other widths, other numbers of blocks, a gated feed-forward."""
    widths = _widths(layers)
    if widths & {6144, 4096} or any(
        layer.width_out in (27648, 18432) and re.search(r"linear1$|img_mlp_0$|txt_mlp_0$", layer.name)
        for layer in layers
    ):
        return Network(None, "Flux.2")
    if 3584 in widths:
        return Network(None, "HunyuanImage")
    singles = [int(m[1]) for each in layers if (m := re.match(r"single_(?:transformer_)?blocks_(\d+)_", each.name))]
    doubles = [int(m[1]) for each in layers if (m := re.match(r"(?:double|transformer)_blocks_(\d+)_", each.name))]
    if max(singles, default=0) > 37 or max(doubles, default=0) > 18:
        return Network(None, "HunyuanVideo")
    return Network("flux", "flux")


def _joint(widths: set[int], *, last: int, native: bool) -> Network | None:
    """Tell transformers of joint blocks apart: SD3 is 1536 or 2432 wide, Flux.1 and Qwen-Image are 3072 wide."""
    if widths & {1536, 2432} and 3072 not in widths:
        return Network("sd3", "sd3")
    if 3072 in widths:
        # Flux.1 ends at block 18, and names these blocks double_blocks outside diffusers.
        return Network(None, "Qwen-Image") if last > 18 or native else Network("flux", "flux")
    if widths & {6144, 4096, 3584}:
        return Network(None, "HunyuanImage" if 3584 in widths else "Flux.2")
    if widths and max(widths) <= TINY:
        return Network("any", "any")
    return None


def _alternating(widths: set[int]) -> Network | None:
    """Name transformers of self-attention and cross-attention by their width."""
    titles = {1152: "PixArt or Sana", 2240: "Sana", 2048: "LTX-Video", 1920: "CogVideoX", 3072: "CogVideoX or Mochi"}
    titles |= {4096: "CogView4 or Cosmos", 1408: "HunyuanDiT", 2560: "CogView3"}
    return next((Network(None, titles[width]) for width in sorted(widths) if width in titles), None)


def _other_blocks(layers: Sequence[Layer]) -> Network | None:
    if any(re.match(r"blocks_\d+_attn[12]_(?:to|add)_", layer.name) for layer in layers):
        title = "HunyuanDiT" if 1408 in {layer.width_in for layer in layers} else "Wan"
        return Network(None, title)
    return None
