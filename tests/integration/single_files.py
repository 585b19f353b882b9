"""Packing of a diffusers folder into one file with the original names: the inverse of a conversion."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def pack(folder: Path, file: Path, *, without: tuple[str, ...] = (), metadata: Mapping[str, str] | None = None) -> Path:
    """Pack a pipeline, ControlNet or autoencoder; ``without`` leaves parts out."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(packed(folder, without=without), file, metadata=dict(metadata or {}))
    return file


def packed(folder: Path, *, without: tuple[str, ...] = ()) -> Tensors:
    """Return the tensors of a folder by their original names."""
    if not (folder / "model_index.json").is_file():
        config = json.loads((folder / "config.json").read_text())
        tensors = _weights(folder)
        if config["_class_name"] == "AutoencoderKL":
            return _vae(tensors)
        return {f"control_model.{name}": tensor for name, tensor in _unet(tensors, config).items()}
    index = json.loads((folder / "model_index.json").read_text())
    found: Tensors = {}
    for part, (prefix, pack_part) in _PARTS[_style(folder, index)].items():
        if part not in without and (folder / part).is_dir():
            config = json.loads((folder / part / "config.json").read_text())
            found |= {f"{prefix}{name}": t for name, t in pack_part(_weights(folder / part), config).items()}
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}


def _style(folder: Path, index: Mapping[str, object]) -> str:
    name = str(index["_class_name"])
    if name.startswith("StableDiffusionXL"):
        return "sdxl"
    if name.startswith("StableDiffusion3"):
        return "sd3"
    if name.startswith("Flux"):
        return "flux"
    unet = json.loads((folder / "unet" / "config.json").read_text())
    return "sd2" if unet["cross_attention_dim"] == 1024 else "sd1"


def _weights(folder: Path) -> Tensors:
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for new, old in names.items():
        name = name.replace(new, old)
    return name


_RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "time_emb_proj.": "emb_layers.1.",
    "conv_shortcut.": "skip_connection.",
}
_UNET = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "controlnet_cond_embedding.conv_in.": "input_hint_block.0.",
    "controlnet_cond_embedding.conv_out.": "input_hint_block.14.",
    "controlnet_mid_block.": "middle_block_out.0.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}


def _unet(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    layers, found = config["layers_per_block"], {}
    for name, tensor in tensors.items():
        found[_unet_name(name, layers, tensors)] = tensor
    return found


def _unet_name(name: str, layers: int, names: Mapping[str, object]) -> str:
    if match := re.match(r"controlnet_cond_embedding\.blocks\.(\d+)\.(.*)", name):
        return f"input_hint_block.{2 * int(match[1]) + 2}.{match[2]}"
    if match := re.match(r"controlnet_down_blocks\.(\d+)\.(.*)", name):
        return f"zero_convs.{match[1]}.0.{match[2]}"
    if match := re.match(r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)\.(.*)", name):
        block, kind, n, rest = int(match[1]), match[2], int(match[3]), match[4]
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.{rest.replace('conv.', 'op.')}"
        entry = f"input_blocks.{block * (layers + 1) + n + 1}"
        return f"{entry}.0.{_renamed(rest, _RESNET)}" if kind == "resnets" else f"{entry}.1.{rest}"
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name):
        if match[1] == "resnets":
            return f"middle_block.{2 * int(match[2])}.{_renamed(match[3], _RESNET)}"
        return f"middle_block.1.{match[3]}"
    if match := re.match(r"up_blocks\.(\d+)\.(resnets|attentions|upsamplers)\.(\d+)\.(.*)", name):
        block, kind, n, rest = int(match[1]), match[2], int(match[3]), match[4]
        if kind == "upsamplers":
            attention = any(other.startswith(f"up_blocks.{block}.attentions.") for other in names)
            return f"output_blocks.{block * (layers + 1) + layers}.{2 if attention else 1}.{rest}"
        entry = f"output_blocks.{block * (layers + 1) + n}"
        return f"{entry}.0.{_renamed(rest, _RESNET)}" if kind == "resnets" else f"{entry}.1.{rest}"
    return next(old + name.removeprefix(new) for new, old in _UNET.items() if name.startswith(new))


_ATTENTION = {"group_norm.": "norm.", "to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "to_out.0.": "proj_out."}


def _vae(tensors: Tensors, _: object = None) -> Tensors:
    blocks = 1 + max(int(m[1]) for name in tensors if (m := re.match(r"encoder\.down_blocks\.(\d+)", name)))
    found = {}
    for name, tensor in tensors.items():
        new = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        new = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", new)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        up = r"up_blocks\.(\d+)\.resnets\.(\d+)"
        new = re.sub(up, lambda m: f"up.{blocks - 1 - int(m[1])}.block.{m[2]}", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        if "mid_block.attentions.0." in new:
            new = _renamed(new.replace("mid_block.attentions.0.", "mid.attn_1."), _ATTENTION)
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor  # noqa: PLW2901
        found[new] = tensor
    return found


def _clip(tensors: Tensors, _: object) -> Tensors:
    """Name the tensors as every file does: below ``text_model.``, and with the positions that old files carry."""
    names = {name: name if name.startswith("text_") else f"text_model.{name}" for name in tensors}
    return {names[name]: tensor for name, tensor in tensors.items()} | {
        "text_model.embeddings.position_ids": torch.arange(77)[None]
    }


_OPEN_CLIP = {
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    "final_layer_norm": "ln_final",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
}


def _open_clip(tensors: Tensors, _: object) -> Tensors:
    plain = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    found: Tensors = {"logit_scale": torch.tensor(1.0)}
    for name, tensor in plain.items():
        if match := re.match(r"(.*self_attn\.)q_proj\.(weight|bias)", name):
            joined = torch.cat([plain[f"{match[1]}{each}_proj.{match[2]}"] for each in "qkv"])
            found[f"{_renamed(match[1], _OPEN_CLIP).replace('self_attn.', 'attn.')}in_proj_{match[2]}"] = joined
        elif name == "text_projection.weight":
            found["text_projection"] = tensor.T
        elif not re.search(r"self_attn\.[kv]_proj", name):
            found[_renamed(name, _OPEN_CLIP)] = tensor
    return found


def _t5(tensors: Tensors, _: object) -> Tensors:
    return tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"]}


_SD3_TOP = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj.": "x_embedder.proj.",
    "time_text_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_text_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "time_text_embed.text_embedder.linear_1.": "y_embedder.mlp.0.",
    "time_text_embed.text_embedder.linear_2.": "y_embedder.mlp.2.",
    "proj_out.": "final_layer.linear.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.",
}
_SD3_BLOCK = {
    "attn.to_out.0.": "x_block.attn.proj.",
    "attn.to_add_out.": "context_block.attn.proj.",
    "attn.norm_q.": "x_block.attn.ln_q.",
    "attn.norm_k.": "x_block.attn.ln_k.",
    "attn.norm_added_q.": "context_block.attn.ln_q.",
    "attn.norm_added_k.": "context_block.attn.ln_k.",
    "attn2.to_out.0.": "x_block.attn2.proj.",
    "attn2.norm_q.": "x_block.attn2.ln_q.",
    "attn2.norm_k.": "x_block.attn2.ln_k.",
    "norm1.linear.": "x_block.adaLN_modulation.1.",
    "norm1_context.linear.": "context_block.adaLN_modulation.1.",
    "ff.net.0.proj.": "x_block.mlp.fc1.",
    "ff.net.2.": "x_block.mlp.fc2.",
    "ff_context.net.0.proj.": "context_block.mlp.fc1.",
    "ff_context.net.2.": "context_block.mlp.fc2.",
}
_QKV = {"attn.to_q.": "attn.to_{}.", "attn.add_q_proj.": "attn.add_{}_proj.", "attn2.to_q.": "attn2.to_{}."}
_SD3_QKV = {
    "attn.to_q.": "x_block.attn.qkv.",
    "attn.add_q_proj.": "context_block.attn.qkv.",
    "attn2.to_q.": "x_block.attn2.qkv.",
}


def _swap(tensor: torch.Tensor) -> torch.Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def _sd3(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    last = f"transformer_blocks.{config['num_layers'] - 1}.norm1_context."
    found = {}
    for name, tensor in tensors.items():
        value = _swap(tensor) if name.startswith(("norm_out.", last)) else tensor
        block = re.match(r"transformer_blocks\.(\d+)\.(.*)", name)
        if block is None:
            new = next((old + name.removeprefix(n) for n, old in _SD3_TOP.items() if name.startswith(n)), name)
            found[new] = value
            continue
        prefix, rest = f"joint_blocks.{block[1]}.", block[2]
        query = next((each for each in _QKV if rest.startswith(each)), None)
        if query is not None:
            kind, stem = rest.removeprefix(query), name.removesuffix(rest)
            joined = torch.cat([tensors[f"{stem}{_QKV[query].format(each)}{kind}"] for each in "qkv"])
            found[f"{prefix}{_SD3_QKV[query]}{kind}"] = joined
        elif not re.match(r"attn2?\.(to_[kv]|add_[kv]_proj)\.", rest):
            new = next(old + rest.removeprefix(n) for n, old in _SD3_BLOCK.items() if rest.startswith(n))
            found[prefix + new] = value
    return found


_FLUX_TOP = {
    "time_text_embed.timestep_embedder.linear_1.": "time_in.in_layer.",
    "time_text_embed.timestep_embedder.linear_2.": "time_in.out_layer.",
    "time_text_embed.text_embedder.linear_1.": "vector_in.in_layer.",
    "time_text_embed.text_embedder.linear_2.": "vector_in.out_layer.",
    "time_text_embed.guidance_embedder.linear_1.": "guidance_in.in_layer.",
    "time_text_embed.guidance_embedder.linear_2.": "guidance_in.out_layer.",
    "context_embedder.": "txt_in.",
    "x_embedder.": "img_in.",
    "proj_out.": "final_layer.linear.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.",
}
_FLUX_DOUBLE = {
    "norm1.linear.": "img_mod.lin.",
    "norm1_context.linear.": "txt_mod.lin.",
    "attn.to_out.0.": "img_attn.proj.",
    "attn.to_add_out.": "txt_attn.proj.",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "ff.net.0.proj.": "img_mlp.0.",
    "ff.net.2.": "img_mlp.2.",
    "ff_context.net.0.proj.": "txt_mlp.0.",
    "ff_context.net.2.": "txt_mlp.2.",
}
_FLUX_SINGLE = {
    "norm.linear.": "modulation.lin.",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
    "proj_out.": "linear2.",
}


def _flux(tensors: Tensors, _: object) -> Tensors:
    found = {}
    for name, tensor in tensors.items():
        block = re.match(r"(single_)?transformer_blocks\.(\d+)\.(.*)", name)
        if block is None:
            new = next(old + name.removeprefix(n) for n, old in _FLUX_TOP.items() if name.startswith(n))
            found[new] = _swap(tensor) if name.startswith("norm_out.") else tensor
            continue
        single, rest = bool(block[1]), block[3]
        prefix, names = (
            f"{'single' if single else 'double'}_blocks.{block[2]}.",
            _FLUX_SINGLE if single else _FLUX_DOUBLE,
        )
        query = next((each for each in _QKV if rest.startswith(each)), None)
        if query is not None:
            kind, stem = rest.removeprefix(query), name.removesuffix(rest)
            pieces = [f"{stem}{_QKV[query].format(each)}{kind}" for each in "qkv"]
            pieces += [f"{stem}proj_mlp.{kind}"] if single else []
            side = "linear1" if single else "img_attn.qkv" if query == "attn.to_q." else "txt_attn.qkv"
            found[f"{prefix}{side}.{kind}"] = torch.cat([tensors[each] for each in pieces])
        elif not re.match(r"attn\.(to_[kv]|add_[kv]_proj)\.|proj_mlp\.", rest):
            found[prefix + next(old + rest.removeprefix(n) for n, old in names.items() if rest.startswith(n))] = tensor
    return found


_PARTS: dict[str, dict[str, tuple[str, Callable[[Tensors, dict[str, Any]], Tensors]]]] = {
    "sd1": {
        "unet": ("model.diffusion_model.", _unet),
        "vae": ("first_stage_model.", _vae),
        "text_encoder": ("cond_stage_model.transformer.", _clip),
    },
    "sd2": {
        "unet": ("model.diffusion_model.", _unet),
        "vae": ("first_stage_model.", _vae),
        "text_encoder": ("cond_stage_model.model.", _open_clip),
    },
    "sdxl": {
        "unet": ("model.diffusion_model.", _unet),
        "vae": ("first_stage_model.", _vae),
        "text_encoder": ("conditioner.embedders.0.transformer.", _clip),
        "text_encoder_2": ("conditioner.embedders.1.model.", _open_clip),
    },
    "sd3": {
        "transformer": ("model.diffusion_model.", _sd3),
        "vae": ("first_stage_model.", _vae),
        "text_encoder": ("text_encoders.clip_l.transformer.", _clip),
        "text_encoder_2": ("text_encoders.clip_g.transformer.", _clip),
        "text_encoder_3": ("text_encoders.t5xxl.transformer.", _t5),
    },
    "flux": {
        "transformer": ("", _flux),
        "vae": ("vae.", _vae),
        "text_encoder": ("text_encoders.clip_l.transformer.", _clip),
        "text_encoder_2": ("text_encoders.t5xxl.transformer.", _t5),
    },
}

Packer = Callable[[Tensors, dict[str, Any]], Tensors]
PACKERS: Mapping[str, Packer] = {"sd1": _unet, "sd2": _unet, "sdxl": _unet, "sd3": _sd3, "flux": _flux}
"""Packing of a denoiser alone, by its family."""
