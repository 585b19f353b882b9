"""Tensors that a network must have, by its class and configuration: found out from the headers, without loading it.

Only the ends of each network are listed: its first and last layers, and the last block of each list whose length the
configuration gives. That finds the file of another network, a pruned one and a lost shard. Loading checks every tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

Config = Mapping[str, Any]


def missing_tensor(class_name: str, config: Config, tensors: Collection[str]) -> str | None:
    """Return the name of a tensor, or the beginning of names, that the network lacks; None if none is known to be."""
    needed = _NEEDED.get(class_name)
    if needed is None:
        return None
    names = {_plain(name) for name in tensors}
    for wanted in needed(config):
        alternatives = wanted.split("|")
        if not any(_has(names, each) for each in alternatives):
            return alternatives[0]
    return None


def _plain(name: str) -> str:
    """Return the name without the prefix under which older files have the tensors of a CLIP text encoder."""
    return name.removeprefix("text_model.")


def _has(names: Collection[str], wanted: str) -> bool:
    """Find a tensor by its name, or by the beginning of its name if ``wanted`` ends in a dot."""
    return any(name.startswith(wanted) for name in names) if wanted.endswith(".") else wanted in names


def _last(prefix: str, count: Any) -> Iterator[str]:
    if isinstance(count, int) and not isinstance(count, bool) and count > 0:
        yield f"{prefix}.{count - 1}."


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, list) else None


def _unet(config: Config) -> Iterator[str]:
    yield from ("conv_in.weight", "conv_out.weight")
    yield from _last("down_blocks", _length(config.get("down_block_types")))
    yield from _last("up_blocks", _length(config.get("up_block_types")))


def _controlnet(config: Config) -> Iterator[str]:
    yield from ("conv_in.weight", "controlnet_cond_embedding.conv_in.weight", "controlnet_mid_block.weight")
    yield from _last("down_blocks", _length(config.get("down_block_types")))


def _vae(config: Config) -> Iterator[str]:
    yield from (
        "encoder.conv_in.weight",
        "encoder.conv_out.weight",
        "decoder.conv_in.weight",
        "decoder.conv_out.weight",
    )
    yield from _last("decoder.up_blocks", _length(config.get("up_block_types")))


def _clip(config: Config) -> Iterator[str]:
    yield from ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight", "final_layer_norm.weight")
    yield from _last("encoder.layers", config.get("num_hidden_layers"))


def _projected_clip(config: Config) -> Iterator[str]:
    yield from _clip(config)
    yield "text_projection.weight"


def _t5(config: Config) -> Iterator[str]:
    yield "shared.weight|encoder.embed_tokens.weight"
    yield "encoder.final_layer_norm.weight"
    yield from _last("encoder.block", config.get("num_layers"))


def _sd3(config: Config) -> Iterator[str]:
    yield from ("pos_embed.proj.weight", "proj_out.weight")
    yield from _last("transformer_blocks", config.get("num_layers"))


def _flux(config: Config) -> Iterator[str]:
    yield from ("x_embedder.weight", "context_embedder.weight", "proj_out.weight")
    yield from _last("transformer_blocks", config.get("num_layers"))
    yield from _last("single_transformer_blocks", config.get("num_single_layers"))


_NEEDED: Mapping[str, Callable[[Config], Iterator[str]]] = {
    "UNet2DConditionModel": _unet,
    "ControlNetModel": _controlnet,
    "AutoencoderKL": _vae,
    "CLIPTextModel": _clip,
    "CLIPTextModelWithProjection": _projected_clip,
    "T5EncoderModel": _t5,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
}
