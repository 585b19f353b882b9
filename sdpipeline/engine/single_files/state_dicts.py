"""Renaming of a part's tensors from the original names to those of diffusers and transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.loaders import single_file_utils as diffusers_names
from safetensors import SafetensorError, safe_open

from sdpipeline.engine.single_files.layout import Part
from sdpipeline.engine.single_files.source_file import FLOAT8, SourceFile
from sdpipeline.errors import CheckpointError

Tensors = dict[str, torch.Tensor]


def convert(
    source: SourceFile, name: str, part: Part, config: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]
) -> Tensors:
    """Read and rename the tensors of one part; CheckpointError unless they are exactly the network's.

    Each part is converted by itself: diffusers tells two text encoders apart by their width alone. Dtypes are kept,
    except that float8 becomes bfloat16, which holds each of its values exactly.
    """
    where = f"{source.path}: {name}"
    original = _read(source, part)
    try:
        converted = _converter(name, part, config)(original)
    except (KeyError, IndexError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{where} is not complete, or has another architecture: {error}") from error
    if name.startswith("text_encoder"):
        converted = _with_prefix_of(converted, expected)
    _check(converted, expected, where)
    return {key: tensor.contiguous() for key, tensor in converted.items()}


def _read(source: SourceFile, part: Part) -> Tensors:
    tensors = {}
    try:
        with safe_open(source.path, framework="pt") as file:
            for local, name in part.names.items():
                tensor = file.get_tensor(name)
                tensors[local] = tensor.to(torch.bfloat16) if source.tensors[name].dtype in FLOAT8 else tensor
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{source.path} cannot be read: {error}") from error
    return tensors


def _converter(name: str, part: Part, config: Mapping[str, Any]) -> Callable[[Tensors], Tensors]:
    if part.naming == "open-clip":
        return lambda original: _open_clip(original, config)
    if part.naming == "t5":
        return _t5
    if part.naming == "clip":
        identity = name == "text_encoder" and "Projection" in config["architectures"][0]
        return _with_identity if identity else dict
    if part.naming == "diffusers":
        return lambda original: {_renamed(key, _OLD_ATTENTION): tensor for key, tensor in original.items()}
    if name == "transformer":
        return _flux if "guidance_embeds" in config else diffusers_names.convert_sd3_transformer_checkpoint_to_diffusers
    return lambda original: _ldm(name, original, config)


_OLD_ATTENTION = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}
"""Names of the autoencoder's attention before diffusers 0.18."""


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def _ldm(name: str, original: Tensors, config: Mapping[str, Any]) -> Tensors:
    prefix, function = {
        "unet": (diffusers_names.LDM_UNET_KEY, diffusers_names.convert_ldm_unet_checkpoint),
        "vae": (diffusers_names.LDM_VAE_KEYS[0], diffusers_names.convert_ldm_vae_checkpoint),
        "controlnet": (diffusers_names.LDM_CONTROLNET_KEY, diffusers_names.convert_controlnet_checkpoint),
    }[name]
    defaults = {"class_embed_type": None, "addition_embed_type": None, "num_class_embeds": None}
    prefixed = {f"{prefix}{key}": tensor for key, tensor in original.items()}
    found: dict[str, torch.Tensor | None] = function(prefixed, defaults | dict(config))
    converted = {key: tensor for key, tensor in found.items() if tensor is not None}
    if name == "controlnet" and "label_emb.0.0.weight" in original:
        names = diffusers_names.DIFFUSERS_TO_LDM_MAPPING["controlnet"]["addition_embed_type"]
        converted |= {key: original[old] for key, old in names.items()}
    return converted


def _with_identity(original: Tensors) -> Tensors:
    """Add the projection of SD3's CLIP ViT-L/14 if the file has none: the reference implementation does not project."""
    if "text_projection.weight" not in original:
        width = next(tensor for key, tensor in original.items() if key.endswith("final_layer_norm.weight"))
        original["text_projection.weight"] = torch.eye(len(width), dtype=width.dtype)
    return original


def _open_clip(original: Tensors, config: Mapping[str, Any]) -> Tensors:
    prefix = "cond_stage_model.model."
    layers = config["num_hidden_layers"]
    used = {key: tensor for key, tensor in original.items() if _layer(key) < layers}
    network = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
    full = {f"conditioner.embedders.1.model.{key}": tensor for key, tensor in used.items()}
    prefix = "conditioner.embedders.1.model."
    converted: Tensors = diffusers_names.convert_open_clip_checkpoint(network, full, prefix)
    if "text_projection.weight" in original:  # of a linear layer, which has the transposed matrix
        converted["text_projection.weight"] = original["text_projection.weight"]
    if "Projection" not in config["architectures"][0]:
        converted.pop("text_projection.weight", None)
    return converted


def _layer(key: str) -> int:
    parts = key.split(".")
    return int(parts[2]) if key.startswith("transformer.resblocks.") and parts[2].isdigit() else -1


def _t5(original: Tensors) -> Tensors:
    repeated = original.pop("encoder.embed_tokens.weight", None)
    if repeated is not None:
        original.setdefault("shared.weight", repeated)
    return original


def _with_prefix_of(converted: Tensors, expected: Iterable[str]) -> Tensors:
    """Write or leave out ``text_model.``, which transformers 5.6 dropped from one of its two CLIP classes."""
    plain = {key.removeprefix("text_model."): tensor for key, tensor in converted.items()}
    names = {name.removeprefix("text_model."): name for name in expected}
    return {names.get(key, key): tensor for key, tensor in plain.items()}


_FLUX = {
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "txt_in": "context_embedder",
    "img_in": "x_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "modulation.lin": "norm.linear",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
    "linear2": "proj_out",
}
_FLUX_SPLIT = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}


def _flux(original: Tensors) -> Tensors:
    """Rename a Flux transformer. diffusers' own function assumes a width of 3072 (``inner_dim``); this one reads it."""
    width = len(original["img_in.weight"])
    converted: Tensors = {}
    for key, tensor in original.items():
        stem, _, kind = key.rpartition(".")
        kind = "weight" if kind == "scale" else kind
        block, layer = _flux_block(stem)
        if layer in _FLUX_SPLIT:
            names = _FLUX_SPLIT[layer]
            sizes = (width, width, width, len(tensor) - 3 * width)[: len(names)]
            for name, piece in zip(names, tensor.split(sizes), strict=True):
                converted[f"{block}{name}.{kind}"] = piece.clone()
        elif stem == "final_layer.adaLN_modulation.1":
            converted[f"{_FLUX[layer]}.{kind}"] = diffusers_names.swap_scale_shift(tensor, dim=0)
        else:
            converted[f"{block}{_FLUX.get(layer, layer)}.{kind}"] = tensor
    return converted


def _flux_block(stem: str) -> tuple[str, str]:
    """Return (diffusers' prefix of the block, name within the block)."""
    for old, new in (("double_blocks.", "transformer_blocks."), ("single_blocks.", "single_transformer_blocks.")):
        if stem.startswith(old):
            number, _, layer = stem.removeprefix(old).partition(".")
            return f"{new}{number}.", layer
    return "", stem


def _check(converted: Tensors, expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    for key in sorted(expected.keys() - converted.keys()):
        raise CheckpointError(f"{where} has no tensor for {key}: the file is incomplete; fetch it again")
    for key in sorted(converted.keys() - expected.keys()):
        raise CheckpointError(f"{where} has a tensor that its architecture does not have: {key}")
    for key, tensor in converted.items():
        if tuple(tensor.shape) != expected[key]:
            raise CheckpointError(
                f"{where}: {key} has shape {list(tensor.shape)}, its architecture {list(expected[key])}; "
                "name a diffusers folder of the same architecture with --parts DIR"
            )
