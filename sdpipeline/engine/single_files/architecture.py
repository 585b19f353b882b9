"""Configuration of each network from the shapes of its tensors; a template gives what shapes cannot tell."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from sdpipeline.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]


class Shape:
    """Access to shapes by tensor names; a missing or misshapen tensor is a CheckpointError that names it."""

    def __init__(self, shapes: Shapes, where: str) -> None:
        self._shapes = shapes
        self._where = where

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def size(self, name: str, axis: int = 0) -> int:
        """Return the length of one axis of a tensor."""
        try:
            return self._shapes[name][axis]
        except KeyError as error:
            raise CheckpointError(
                f"{self._where} has no tensor {name}: the file is incomplete; fetch it again"
            ) from error
        except IndexError as error:
            raise CheckpointError(f"{self._where}: tensor {name} has shape {list(self._shapes[name])}") from error

    def rank(self, name: str) -> int:
        """Return the number of axes of a tensor."""
        self.size(name, -1)
        return len(self._shapes[name])

    def count(self, pattern: str) -> int:
        """Return one more than the largest number that ``pattern`` finds in a name; 0 if it finds none."""
        found = (re.match(pattern, name) for name in self._shapes)
        return max((int(match[1]) + 1 for match in found if match), default=0)

    def ending(self, ending: str) -> str | None:
        """Return the first name with that ending."""
        return next((name for name in self._shapes if name.endswith(ending)), None)


def unet(shapes: Shape) -> dict[str, Any]:
    """Return a U-Net's configuration as far as its LDM tensors tell it."""
    found = down_blocks(shapes)
    layers = found["layers_per_block"]
    up_types, reverse = [], []
    for block in range(len(found["block_out_channels"])):
        depths = [_depth(shapes, f"output_blocks.{block * (layers + 1) + n}.1.") for n in range(layers + 1)]
        up_types.append("CrossAttnUpBlock2D" if any(depths) else "UpBlock2D")
        reverse.append(depths[0] if len(set(depths)) == 1 else depths)
    found["up_block_types"] = up_types
    found["out_channels"] = shapes.size("out.2.weight")
    usual = list(reversed(found["transformer_layers_per_block"]))
    given = [depth or usual[n] for n, depth in enumerate(reverse)]
    if given != usual:
        found["reverse_transformer_layers_per_block"] = given
    if not _depth(shapes, "middle_block.1."):
        found["mid_block_type"] = "UNetMidBlock2D"
    return found


def down_blocks(shapes: Shape) -> dict[str, Any]:
    """Return the configuration that a U-Net and a ControlNet share: input, down blocks and middle block."""
    widths: list[int] = []
    depths: list[list[int]] = []
    for n in range(1, shapes.count(r"input_blocks\.(\d+)\.")):
        entry = f"input_blocks.{n}."
        if f"{entry}0.op.weight" in shapes:
            depths.append([])
            continue
        if not depths:
            depths.append([])
        if not depths[-1]:
            widths.append(shapes.size(f"{entry}0.in_layers.2.weight"))
        depths[-1].append(_depth(shapes, f"{entry}1."))
    layers = [depth[0] if len(set(depth)) == 1 else depth for depth in depths if depth]
    middle = _depth(shapes, "middle_block.1.")
    per_block = [depth or 1 for depth in layers]
    if layers and not layers[-1]:
        per_block[-1] = middle or 1
    found = {
        "in_channels": shapes.size("input_blocks.0.0.weight", 1),
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in layers],
        "layers_per_block": len(depths[0]) if depths else 0,
        "transformer_layers_per_block": per_block,
    }
    context = shapes.ending("attn2.to_k.weight")
    projection = shapes.ending(".proj_in.weight")
    if context is None or projection is None:
        return found
    found["cross_attention_dim"] = shapes.size(context, 1)
    found["use_linear_projection"] = shapes.rank(projection) == 2
    return found | _size_embedding(shapes)


def _size_embedding(shapes: Shape) -> dict[str, Any]:
    """Return the embedding of sizes and pooled prompt that SDXL has."""
    if "label_emb.0.0.weight" not in shapes:
        return {}
    return {
        "addition_embed_type": "text_time",
        "projection_class_embeddings_input_dim": shapes.size("label_emb.0.0.weight", 1),
    }


def _depth(shapes: Shape, entry: str) -> int:
    return shapes.count(re.escape(entry) + r"transformer_blocks\.(\d+)\.")


def controlnet(shapes: Shape) -> dict[str, Any]:
    """Return a ControlNet's configuration as far as its LDM tensors tell it."""
    last = shapes.count(r"input_hint_block\.(\d+)\.") - 1
    hint = [shapes.size(f"input_hint_block.{n}.weight") for n in (0, *range(4, last, 4))]
    return {
        "conditioning_channels": shapes.size("input_hint_block.0.weight", 1),
        "conditioning_embedding_out_channels": hint,
        **down_blocks(shapes),
    }


def vae(shapes: Shape) -> dict[str, Any]:
    """Return an autoencoder's configuration as far as its LDM tensors tell it."""
    blocks = shapes.count(r"encoder\.down\.(\d+)\.block\.")
    return {
        "in_channels": shapes.size("encoder.conv_in.weight", 1),
        "out_channels": shapes.size("decoder.conv_out.weight"),
        "latent_channels": shapes.size("decoder.conv_in.weight", 1),
        "block_out_channels": [shapes.size(f"encoder.down.{n}.block.0.conv1.weight") for n in range(blocks)],
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "layers_per_block": shapes.count(r"encoder\.down\.0\.block\.(\d+)\."),
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def vae_of_diffusers(shapes: Shape) -> dict[str, Any]:
    """Return an autoencoder's configuration as far as tensors with diffusers' names tell it."""
    blocks = shapes.count(r"encoder\.down_blocks\.(\d+)\.resnets\.")
    first = [f"encoder.down_blocks.{n}.resnets.0.conv1.weight" for n in range(blocks)]
    return {
        "in_channels": shapes.size("encoder.conv_in.weight", 1),
        "out_channels": shapes.size("decoder.conv_out.weight"),
        "latent_channels": shapes.size("decoder.conv_in.weight", 1),
        "block_out_channels": [shapes.size(name) for name in first],
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "layers_per_block": shapes.count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def clip(shapes: Shape) -> dict[str, Any]:
    """Return a CLIP text encoder's configuration from transformers' names without ``text_model.``."""
    found = {
        "vocab_size": shapes.size("embeddings.token_embedding.weight"),
        "hidden_size": shapes.size("embeddings.token_embedding.weight", 1),
        "max_position_embeddings": shapes.size("embeddings.position_embedding.weight"),
        "intermediate_size": shapes.size("encoder.layers.0.mlp.fc1.weight"),
        "num_hidden_layers": shapes.count(r"encoder\.layers\.(\d+)\."),
    }
    if "text_projection.weight" in shapes:
        found["projection_dim"] = shapes.size("text_projection.weight")
    return found


def open_clip(shapes: Shape, template_layers: int) -> dict[str, Any]:
    """Return a CLIP text encoder's configuration from OpenCLIP's names.

    SD 2 reads the penultimate layer of OpenCLIP ViT-H/14: files hold 24 layers, of which 23 are converted.
    """
    layers = shapes.count(r"transformer\.resblocks\.(\d+)\.")
    found = {
        "vocab_size": shapes.size("token_embedding.weight"),
        "hidden_size": shapes.size("token_embedding.weight", 1),
        "max_position_embeddings": shapes.size("positional_embedding"),
        "intermediate_size": shapes.size("transformer.resblocks.0.mlp.c_fc.weight"),
        "num_hidden_layers": min(layers, template_layers) if layers == template_layers + 1 else layers,
    }
    if "text_projection" in shapes:
        found["projection_dim"] = shapes.size("text_projection", 1)
    elif "text_projection.weight" in shapes:
        found["projection_dim"] = shapes.size("text_projection.weight")
    return found


def t5(shapes: Shape) -> dict[str, Any]:
    """Return a T5 encoder's configuration: its tensors tell all but the largest relative distance."""
    block = "encoder.block.0.layer."
    heads = shapes.size(f"{block}0.SelfAttention.relative_attention_bias.weight", 1)
    embedding = "shared.weight" if "shared.weight" in shapes else "encoder.embed_tokens.weight"
    return {
        "vocab_size": shapes.size(embedding),
        "d_model": shapes.size(embedding, 1),
        "d_ff": shapes.size(f"{block}1.DenseReluDense.wo.weight", 1),
        "d_kv": shapes.size(f"{block}0.SelfAttention.q.weight") // max(heads, 1),
        "num_heads": heads,
        "num_layers": shapes.count(r"encoder\.block\.(\d+)\."),
        "relative_attention_num_buckets": shapes.size(f"{block}0.SelfAttention.relative_attention_bias.weight"),
    }


def sd3(shapes: Shape) -> dict[str, Any]:
    """Return an SD3 transformer's configuration as far as its tensors tell it."""
    patch = shapes.size("x_embedder.proj.weight", 2)
    layers = shapes.count(r"joint_blocks\.(\d+)\.")
    dual = [n for n in range(layers) if f"joint_blocks.{n}.x_block.attn2.qkv.weight" in shapes]
    found: dict[str, Any] = {
        "in_channels": shapes.size("x_embedder.proj.weight", 1),
        "patch_size": patch,
        "num_layers": layers,
        "caption_projection_dim": shapes.size("context_embedder.weight"),
        "joint_attention_dim": shapes.size("context_embedder.weight", 1),
        "pooled_projection_dim": shapes.size("y_embedder.mlp.0.weight", 1),
        "out_channels": shapes.size("final_layer.linear.weight") // max(patch * patch, 1),
        "pos_embed_max_size": math.isqrt(shapes.size("pos_embed", 1)),
    }
    if dual:
        found["dual_attention_layers"] = dual
    if "joint_blocks.0.x_block.attn.ln_q.weight" in shapes:
        found["qk_norm"] = "rms_norm"
    return found


def flux(shapes: Shape) -> dict[str, Any]:
    """Return a Flux transformer's configuration: its tensors tell all but the axes of the rotary embedding."""
    head = shapes.size("double_blocks.0.img_attn.norm.key_norm.scale")
    return {
        "in_channels": shapes.size("img_in.weight", 1),
        "num_layers": shapes.count(r"double_blocks\.(\d+)\."),
        "num_single_layers": shapes.count(r"single_blocks\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": shapes.size("img_in.weight") // max(head, 1),
        "joint_attention_dim": shapes.size("txt_in.weight", 1),
        "pooled_projection_dim": shapes.size("vector_in.in_layer.weight", 1),
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
    }
