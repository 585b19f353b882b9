"""LoRAs on the layers of diffusers' own networks, at their published widths and without weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import pytest
import torch

from sdpipeline.engine.classification import classify_single_file
from sdpipeline.errors import CheckpointError
from tests.weight_headers import Tensors, kohya, peft

SD: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}
SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "layers_per_block": 1,
}

NETWORKS: dict[str, Callable[[], torch.nn.Module]] = {
    "sd1": lambda: diffusers.UNet2DConditionModel(cross_attention_dim=768, **SD),
    "sd2": lambda: diffusers.UNet2DConditionModel(cross_attention_dim=1024, **SD),
    "sdxl": lambda: diffusers.UNet2DConditionModel(cross_attention_dim=2048, **SDXL),
    "sd3": lambda: diffusers.SD3Transformer2DModel(
        num_layers=2, num_attention_heads=24, caption_projection_dim=1536, dual_attention_layers=(0,)
    ),
    "flux": lambda: diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1),
    "Qwen-Image": lambda: diffusers.QwenImageTransformer2DModel(num_layers=20),
    "Z-Image": lambda: diffusers.ZImageTransformer2DModel(n_layers=1),
    "Wan": lambda: diffusers.WanTransformer3DModel(num_layers=1),
    "HunyuanVideo": lambda: diffusers.HunyuanVideoTransformer3DModel(num_layers=20, num_single_layers=1),
    "Flux.2": lambda: diffusers.Flux2Transformer2DModel(num_layers=1, num_single_layers=1),
    "AuraFlow": lambda: diffusers.AuraFlowTransformer2DModel(num_mmdit_layers=1, num_single_dit_layers=1),
    "PixArt or Sana": lambda: diffusers.PixArtTransformer2DModel(num_layers=1),
    "Lumina 2": lambda: diffusers.Lumina2Transformer2DModel(num_layers=1),
    "LTX-Video": lambda: diffusers.LTXVideoTransformer3DModel(num_layers=1),
}
RUN = ("sd1", "sd2", "sdxl", "sd3", "flux")
PARTS = {
    "all": "",
    "attention": "to_k",
    "first attention": "attn1.to_q",
    "feed-forward": "ff.net.0",
}


@cache
def layers(name: str) -> dict[str, tuple[int, int]]:
    """Names of the linear layers of a network, with their widths."""
    with torch.device("meta"):
        built = NETWORKS[name]()
    found = ((path, each) for path, each in built.named_modules() if isinstance(each, torch.nn.Linear))
    return {path: (each.in_features, each.out_features) for path, each in found}


def lora(name: str, part: str, naming: str) -> Tensors:
    tensors: Tensors = {}
    for path, (width_in, width_out) in layers(name).items():
        if part in path and naming == "kohya":
            tensors |= kohya(path.replace(".", "_"), width_in, width_out)
        elif part in path:
            prefix = "unet" if name in RUN[:3] else "transformer"
            tensors |= peft(f"{prefix}.{path}", width_in, width_out)
    return tensors


@pytest.mark.parametrize("naming", ["kohya", "peft"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_lora_of_any_part_of_a_network_is_of_that_network(name: str, naming: str) -> None:
    for part in PARTS.values():
        tensors = lora(name, part, naming)
        if not tensors:
            continue
        if name in RUN:
            family = classify_single_file("style", tensors, {}).family
            assert family == name or (family == "sd1-or-sd2" and name in ("sd1", "sd2")), part
        else:
            with pytest.raises(CheckpointError, match=f"is a LoRA for {name},"):
                classify_single_file("style", tensors, {})


@pytest.mark.parametrize("name", RUN[:3])
def test_a_lora_of_some_blocks_is_never_of_another_family_if_it_changes_cross_attention(name: str) -> None:
    for block in ("down_blocks.0.", "down_blocks.1.", "down_blocks.2.", "mid_block.", "up_blocks.0.", "up_blocks.1."):
        chosen = {path: widths for path, widths in layers(name).items() if path.startswith(block) and "attn" in path}
        tensors = {
            key: shape for path, widths in chosen.items() for key, shape in peft(f"unet.{path}", *widths).items()
        }
        assert not tensors or classify_single_file("style", tensors, {}).family == name
