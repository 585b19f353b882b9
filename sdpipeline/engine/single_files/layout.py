"""Recognition of a single file by the names of its tensors, and their division into parts of a pipeline."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sdpipeline.engine.classification import is_adapter
from sdpipeline.engine.single_files.source_file import SourceFile
from sdpipeline.errors import CheckpointError

Kind = Literal["checkpoint", "controlnet", "vae"]
Naming = Literal["ldm", "diffusers", "clip", "open-clip", "t5"]

DENOISER = "model.diffusion_model."
_LDM_VAE, _COMFY_VAE = "first_stage_model.", "vae."
_CONTROL = "control_model."


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Tensors of one part of a pipeline: the names in the file by the names within the part."""

    naming: Naming
    names: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Content of a single file. ``ignored`` are tensors that no part uses."""

    kind: Kind
    family: str
    parts: Mapping[str, Part]
    ignored: Sequence[str] = ()


_UNSUPPORTED = {
    "distilled_guidance_layer.in_proj.bias": "Chroma",
    "single_stream_modulation.lin.weight": "Flux.2",
    "double_layers.0.attn.w2q.weight": "AuraFlow",
    "patchify_proj.weight": "LTX-Video",
    "cap_embedder.0.weight": "Lumina 2 or Z-Image",
    "patch_embedding.weight": "Wan",
    "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias": "HunyuanVideo",
    "double_stream_blocks.0.block.adaLN_modulation.1.bias": "HiDream",
    "transformer_blocks.0.img_mod.1.weight": "Qwen-Image",
    "txtfusion.projector.weight": "Krea 2",
    "y_embedder.y_embedding": "PixArt",
    "down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": "AnimateDiff",
}
"""A tensor of each denoiser that is known and that no family here runs."""


def recognise(source: SourceFile) -> Layout | None:
    """Return the layout of weights that have to be converted; ``None`` for all others, such as adapters.

    Adapters come first: the layers of many have the names of the network that they change. Raises CheckpointError for
    weights of a family that does not run here.
    """
    names = source.tensors.keys()
    if is_adapter(source.shapes):
        return None
    _refuse_unsupported(source)
    for recognised in (_controlnet(source), _ldm_unet(source), _transformer(source), _diffusers_denoiser(source)):
        if recognised is not None:
            return recognised
    for prefix in (_LDM_VAE, _COMFY_VAE, ""):
        if source.shapes.get(f"{prefix}decoder.conv_in.weight", (0, 4))[1:2] not in ((4,), (16,)):
            return None
        if f"{prefix}decoder.conv_in.weight" in names or f"{prefix}encoder.conv_in.weight" in names:
            return Layout(kind="vae", family="", parts={"vae": _vae(source, prefix)})
    return None


def _refuse_unsupported(source: SourceFile) -> None:
    for name, title in _UNSUPPORTED.items():
        if name in source.tensors or f"{DENOISER}{name}" in source.tensors:
            raise CheckpointError(f"{source.path} holds {title} weights, and no family here runs them; see `families`")
    _refuse_flux_variants(source)
    for name in ("edm_mean", "edm_vpred.sigma_max"):
        if name in source.tensors:
            raise CheckpointError(
                f"{source.path} holds {name}: an EDM checkpoint (Playground 2.5, CosXL), whose noise levels are not "
                "in a single file; register its diffusers folder"
            )


def _refuse_flux_variants(source: SourceFile) -> None:
    for prefix in (DENOISER, ""):
        shape = source.shapes.get(f"{prefix}img_in.weight", (0, 64))
        channels = shape[1] if len(shape) == 2 else 0
        if f"{prefix}double_blocks.0.img_attn.qkv.weight" in source.tensors and channels != 64:
            what = {384: "Flux Fill", 128: "Flux Control (Canny or Depth)"}.get(channels, "an unknown Flux")
            raise CheckpointError(f"{source.path} is {what}, which reads more than noise; use Flux.1 dev or schnell")
    titles = [source.metadata.get(f"modelspec.{key}", "") for key in ("title", "architecture")]
    if "kontext" in " ".join(titles).lower():
        raise CheckpointError(f"{source.path} is Flux Kontext, which edits pictures; use Flux.1 dev or schnell")


def _controlnet(source: SourceFile) -> Layout | None:
    names = source.tensors.keys()
    if any(name.startswith("controlnet_blocks.") for name in names) and "double_blocks.0.img_attn.qkv.weight" in names:
        raise CheckpointError(
            f"{source.path} is a Flux ControlNet in X-Labs' names, which nothing here converts; fetch its folder in "
            "diffusers' layout"
        )
    for prefix in (_CONTROL, ""):
        if f"{prefix}input_hint_block.0.weight" in names:
            return Layout(kind="controlnet", family="", parts={"controlnet": _part(source, prefix, "ldm")})
    known = ("controlnet_cond_embedding.conv_in.weight", "controlnet_x_embedder.weight", "pos_embed_input.proj.weight")
    if any(name in names for name in known):
        return Layout(kind="controlnet", family="", parts={"controlnet": _part(source, "", "diffusers")})
    return None


def _ldm_unet(source: SourceFile) -> Layout | None:
    names = source.tensors.keys()
    prefix = next((each for each in (DENOISER, "") if f"{each}input_blocks.0.0.weight" in names), None)
    if prefix is None:
        return None
    unet = _part(source, prefix, "ldm")
    _refuse_other_unets(source, unet)
    if "label_emb.0.0.weight" in unet.shapes:
        first, second = "conditioner.embedders.0.transformer.", "conditioner.embedders.1."
        renamed = _part(source, f"{second}transformer.", "clip")
        parts = {"unet": unet, "text_encoder": _part(source, first, "clip")}
        parts |= {"text_encoder_2": renamed if renamed.names else _part(source, f"{second}model.", "open-clip")}
        return _layout(source, "sdxl", parts)
    encoders = {
        "sd1": _part(source, "cond_stage_model.transformer.", "clip"),
        "sd2": _part(source, "cond_stage_model.model.", "open-clip"),
    }
    family = next((name for name, part in encoders.items() if part.names), None) or _family_by_context(source, unet)
    return _layout(source, family, {"unet": unet, "text_encoder": encoders[family]})


def _refuse_other_unets(source: SourceFile, unet: Part) -> None:
    first = "input_blocks.0.0.weight" if unet.naming == "ldm" else "conv_in.weight"
    channels = unet.shapes[first][1:2]
    if "label_emb.weight" in unet.shapes or channels == (7,):
        what = "the x4 upscaler, whose noise schedule is not in a single file; register its diffusers folder"
    elif any(".time_stack." in name for name in unet.shapes):
        what = "Stable Video Diffusion, and no video is made here; use another checkpoint"
    elif channels not in ((4,), (9,)):
        number = channels[0] if channels else 0
        named = {5: "a depth-to-image U-Net", 8: "an instruct-pix2pix U-Net"}
        what = f"{named.get(number, f'a U-Net with {number} input channels')}, which is not supported; {_PLAIN}"
    elif "encoder_hid_proj.weight" in unet.shapes:
        what = "a Kolors U-Net, which reads another text encoder; use an SDXL checkpoint"
    elif "conditioner.embedders.0.model.positional_embedding" in source.tensors or _context(unet) == 1280:
        what = "an SDXL refiner, which cannot start a picture; use its base"
    else:
        return
    raise CheckpointError(f"{source.path} holds {what}")


def _context(unet: Part) -> int:
    """Return the width of the text embedding that a U-Net reads; 0 if no tensor tells it."""
    return next((shape[-1] for name, shape in unet.shapes.items() if name.endswith("attn2.to_k.weight") and shape), 0)


_PLAIN = "use a checkpoint of SD 1.x, SD 2.x or SDXL, or of their inpainting"


def _family_by_context(source: SourceFile, unet: Part) -> str:
    width = _context(unet)
    family = {768: "sd1", 1024: "sd2"}.get(width)
    if family is None:
        raise CheckpointError(
            f"{source.path} has no text encoder, and its U-Net reads prompts {width} wide: neither SD 1 (768) "
            "nor SD 2 (1024); register the diffusers folder of these weights"
        )
    return family


def _transformer(source: SourceFile) -> Layout | None:
    names = source.tensors.keys()
    for prefix in (DENOISER, ""):
        if any(name.startswith(f"{prefix}joint_blocks.0.context_block.") for name in names):
            encoders = _encoders(source, ("clip_l", "clip_g", "t5xxl"))
            return _layout(source, "sd3", {"transformer": _part(source, prefix, "ldm"), **encoders})
        if any(name.startswith(f"{prefix}double_blocks.0.img_attn.") for name in names):
            encoders = _encoders(source, ("clip_l", "t5xxl"))
            return _layout(source, "flux", {"transformer": _part(source, prefix, "ldm"), **encoders})
    return None


def _encoders(source: SourceFile, order: Sequence[str]) -> dict[str, Part]:
    found = {}
    for n, name in enumerate(order, 1):
        key = "text_encoder" if n == 1 else f"text_encoder_{n}"
        found[key] = _part(source, f"text_encoders.{name}.transformer.", "t5" if name == "t5xxl" else "clip")
    return found


def _diffusers_denoiser(source: SourceFile) -> Layout | None:
    """Recognise a bare denoiser with diffusers' names, as ``save_pretrained`` writes it."""
    names = source.tensors.keys()
    if {"conv_in.weight", "time_embedding.linear_1.weight", "conv_norm_out.weight"} <= names:
        part = _part(source, "", "diffusers")
        _refuse_other_unets(source, part)
        family = "sdxl" if "add_embedding.linear_1.weight" in names else _family_by_context(source, part)
        return _layout(source, family, {"unet": part})
    if "transformer_blocks.0.attn.add_q_proj.weight" in names:
        families = {"pos_embed.proj.weight": "sd3", "x_embedder.weight": "flux"}
        for name, family in families.items():
            if name in names:
                return _layout(source, family, {"transformer": _part(source, "", "diffusers")})
    return None


def _layout(source: SourceFile, family: str, parts: Mapping[str, Part]) -> Layout:
    names = source.tensors.keys()
    prefix = next((each for each in (_LDM_VAE, _COMFY_VAE) if any(name.startswith(each) for name in names)), None)
    found = {name: part for name, part in parts.items() if part.names}
    if prefix is not None:
        found["vae"] = _vae(source, prefix)
    used = {name for part in found.values() for name in part.names.values()}
    ignored = sorted(names - used)
    return Layout(kind="checkpoint", family=family, parts=found, ignored=ignored)


def _vae(source: SourceFile, prefix: str) -> Part:
    part = _part(source, prefix, "ldm")
    diffusers = any(name.startswith("encoder.down_blocks.") for name in part.names)
    return Part(naming="diffusers", names=part.names, shapes=part.shapes) if diffusers else part


_NOT_WEIGHTS = re.compile(r"(.*\.)?(position_ids|attn_mask|logit_scale|num_batches_tracked)|loss\..*")
"""Buffers and training state within a part that no network here has."""


def _part(source: SourceFile, prefix: str, naming: Naming) -> Part:
    names = {name.removeprefix(prefix): name for name in _under(source.tensors, prefix)}
    kept = {local: name for local, name in names.items() if not _NOT_WEIGHTS.fullmatch(local)}
    shapes = {local: source.tensors[name].shape for local, name in kept.items()}
    return Part(naming=naming, names=kept, shapes=shapes)


_OTHER_PARTS = ("cond_stage_model.", "conditioner.", "text_encoders.", "first_stage_model.", "vae.", "model_ema.")


def _under(names: Iterable[str], prefix: str) -> list[str]:
    """Return the names with a prefix; without a prefix, those of no other part."""
    if prefix:
        return [name for name in names if name.startswith(prefix)]
    return [name for name in names if not name.startswith(_OTHER_PARTS)]
