"""Classification of folders in diffusers' layout, by model_index.json and the configurations of the parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdpipeline.engine.classification.classification import Classification, unsupported
from sdpipeline.engine.classification.configs import integer, items, text
from sdpipeline.engine.classification.headers import read_json
from sdpipeline.engine.families import FAMILIES
from sdpipeline.engine.weight_files import INDEX
from sdpipeline.errors import CheckpointError

_EDIT = "to change pictures by a prompt, use task: image-to-image with a checkpoint that is supported"
_DEV = "use Flux.1 dev or schnell"
_PLAIN = "use the family's plain checkpoint"

UNSUPPORTED: Mapping[str, tuple[str, str]] = {
    "FluxKontext": ("Flux Kontext (it edits a picture by an instruction)", _EDIT),
    "FluxPriorRedux": ("Flux Redux (it reads a picture in place of a prompt)", "use an IP-Adapter with SD 1.x or SDXL"),
    "FluxFill": ("Flux Fill", f"for task: inpainting, {_DEV}"),
    "FluxControlNet": ("a Flux ControlNet pipeline", f"{_DEV}, and register the ControlNet by itself"),
    "FluxControl": ("Flux Control (Canny or Depth)", f"{_DEV} with a Flux ControlNet"),
    "Flux2": ("Flux.2", f"supported of Flux: {_DEV}"),
    "Flux3": ("Flux.3", f"supported of Flux: {_DEV}"),
    "StableDiffusionImageVariation": (
        "an image variation checkpoint (it reads a picture in place of a prompt)",
        "use an IP-Adapter with SD 1.x or SDXL",
    ),
    "StableDiffusionInstructPix2Pix": ("InstructPix2Pix", _EDIT),
    "StableDiffusionXLInstructPix2Pix": ("InstructPix2Pix for SDXL", _EDIT),
    "StableDiffusionDepth2Img": ("depth-to-image", "use SD 1.x or 2.x with a depth ControlNet"),
    "StableUnCLIP": ("unCLIP (it reads a picture's embedding)", "use an IP-Adapter with SD 1.x or SDXL"),
    "StableVideoDiffusion": ("Stable Video Diffusion", "no video is made here"),
    "StableCascade": ("Stable Cascade", _PLAIN),
    "Wuerstchen": ("Würstchen", _PLAIN),
    "Kolors": ("Kolors", "use an SDXL checkpoint"),
    "QwenImage": ("Qwen-Image", _PLAIN),
    "ZImage": ("Z-Image", _PLAIN),
    "Chroma": ("Chroma", _PLAIN),
    "AuraFlow": ("AuraFlow", _PLAIN),
    "PixArt": ("PixArt", _PLAIN),
    "Sana": ("Sana", _PLAIN),
    "HunyuanDiT": ("HunyuanDiT", _PLAIN),
    "HunyuanVideo": ("HunyuanVideo", "no video is made here"),
    "HunyuanImage": ("HunyuanImage", _PLAIN),
    "HiDream": ("HiDream", _PLAIN),
    "Lumina": ("Lumina", _PLAIN),
    "Wan": ("Wan", "no video is made here"),
    "LTX": ("LTX-Video", "no video is made here"),
    "CogVideo": ("CogVideoX", "no video is made here"),
    "Mochi": ("Mochi", "no video is made here"),
    "AnimateDiff": ("AnimateDiff", "no video is made here"),
    "CogView": ("CogView", _PLAIN),
    "Kandinsky": ("Kandinsky", _PLAIN),
    "LatentConsistencyModel": (
        "a latent consistency model in its own pipeline",
        "if its parts are those of StableDiffusionPipeline, write that as _class_name in model_index.json",
    ),
}
"""Starts of pipeline classes that do not run here: what they are, and what to use. The longest start wins."""


def classify_pipeline(alias: str, directory: Path) -> Classification:
    """Classify a pipeline by model_index.json; CheckpointError if no family runs it."""
    index = read_json(alias, directory / INDEX)
    name = index.get("_class_name")
    check_pipeline_class(alias, name)
    families = {row.name for row in FAMILIES.values() for cell in _cells(row) if cell == name}
    if families <= {"upscale"}:
        return Classification(kind="checkpoint", family="upscale", scale=_factor(alias, directory) or 4)
    if families <= {"latent-upscale"}:
        return Classification(kind="checkpoint", family="latent-upscale", scale=2)
    if families <= {"sd3"}:
        return _sd3(alias, directory, index)
    if families <= {"flux"}:
        return _flux(alias, directory, index)
    return _unet_family(alias, directory, index)


def check_pipeline_class(alias: str, name: Any) -> None:
    """Raise CheckpointError for a pipeline class that no family runs; the message says what it is."""
    if isinstance(name, str) and any(name in _cells(row) for row in FAMILIES.values()):
        return
    plain = name if isinstance(name, str) else ""
    starts = [start for start in UNSUPPORTED if plain.startswith(start)]
    if starts:
        what, fix = UNSUPPORTED[max(starts, key=len)]
        raise unsupported(alias, f"{what}, by its _class_name {plain}", fix)
    if "PAG" in plain:
        raise unsupported(
            alias, f"saved for perturbed-attention guidance ({plain})", _saved_as(plain.replace("PAG", ""))
        )
    named = plain or f"pipeline of class {name!r}"
    raise CheckpointError(
        f"checkpoint {alias!r}: no family runs a {named} (_class_name in {INDEX}); use another checkpoint"
    )


def _saved_as(plain: str) -> str:
    return f"if its parts are those of {plain}, write that as _class_name in {INDEX}"


def _cells(row: Any) -> set[str]:
    return {cell.pipeline for cell in (*row.plain.values(), *row.controlled.values(), *row.union.values())}


def _denoiser(alias: str, directory: Path, index: Mapping[str, Any], part: str, class_name: str) -> dict[str, Any]:
    """Return the configuration of the denoiser; CheckpointError if the pipeline has none, or one of another class."""
    entry = index.get(part)
    if not isinstance(entry, list) or len(entry) != 2 or None in entry:
        raise CheckpointError(f"checkpoint {alias!r}: {INDEX} names no {part}, which makes the picture; fetch it again")
    config = read_json(alias, directory / part / "config.json")
    found = text(alias, f"{part}/config.json", config, "_class_name")
    for named in (found or class_name, entry[1]):
        if named != class_name:
            raise CheckpointError(
                f"checkpoint {alias!r}: its {part} is a {named!s}, not a {class_name}; use another checkpoint"
            )
    return config


def _sd3(alias: str, directory: Path, index: Mapping[str, Any]) -> Classification:
    config = _denoiser(alias, directory, index, "transformer", "SD3Transformer2DModel")
    where = "transformer/config.json"
    channels = integer(alias, where, config, "in_channels", 16)
    if channels != 16:
        raise unsupported(alias, f"an SD3 with {channels} input channels", "use SD3 or SD3.5")
    size = _native(alias, directory, integer(alias, where, config, "sample_size"))
    return Classification(kind="checkpoint", family="sd3", native_size=size)


def _flux(alias: str, directory: Path, index: Mapping[str, Any]) -> Classification:
    for part, what in (("image_embedder", "Flux Redux"), ("reader", "another Flux")):
        if isinstance(index.get(part), list) and None not in index[part]:
            raise unsupported(alias, f"{what} (it has a part {part})", _DEV)
    config = _denoiser(alias, directory, index, "transformer", "FluxTransformer2DModel")
    where = "transformer/config.json"
    channels = integer(alias, where, config, "in_channels", 64)
    if channels != 64:
        named = {384: "Flux Fill", 128: "Flux Control"}.get(channels or 0, "a Flux of another kind")
        raise unsupported(alias, f"{named} ({channels} input channels)", _DEV)
    # The configuration has no size; the published networks (24 heads) were trained at 1024.
    heads = integer(alias, where, config, "num_attention_heads", 24)
    return Classification(kind="checkpoint", family="flux", native_size=1024 if heads == 24 else None)


def _unet_family(alias: str, directory: Path, index: Mapping[str, Any]) -> Classification:
    unet = _denoiser(alias, directory, index, "unet", "UNet2DConditionModel")
    where = "unet/config.json"
    channels = integer(alias, where, unet, "in_channels", 4)
    if channels not in (4, 9):
        named = {5: "depth-to-image", 7: "an upscaler", 8: "InstructPix2Pix"}.get(
            channels or 0, "a U-Net of another kind"
        )
        raise unsupported(alias, f"{named} ({channels} input channels)", _PLAIN)
    family = "sdxl" if unet.get("addition_embed_type") == "text_time" else _by_context(alias, unet)
    if family == "sdxl":
        entry = index.get("text_encoder")
        if not isinstance(entry, list) or None in entry:
            raise CheckpointError(f"checkpoint {alias!r}: an SDXL refiner cannot start a picture; use its base")
    if channels == 9:
        family = "sdxl-inpaint" if family == "sdxl" else "sd-inpaint"
    size = _native(alias, directory, _side(alias, where, unet))
    return Classification(kind="checkpoint", family=family, native_size=size)


def _by_context(alias: str, unet: Mapping[str, Any]) -> str:
    """Return sd1 or sd2 by the width of the text embedding; some configurations give it for each block."""
    width = unet.get("cross_attention_dim")
    if isinstance(width, list):
        width = width[0] if width else None
    checked = integer(alias, "unet/config.json", {"cross_attention_dim": width}, "cross_attention_dim", 768)
    return "sd2" if checked == 1024 else "sd1"


def _side(alias: str, where: str, config: Mapping[str, Any]) -> int | None:
    """Return the side of the square latents, None if they are not square or not named."""
    size = config.get("sample_size")
    if isinstance(size, list):
        size = size[0] if len(set(map(str, size))) == 1 else None
    return integer(alias, where, {"sample_size": size}, "sample_size")


def _native(alias: str, directory: Path, latents: int | None) -> int | None:
    """Return the side in pixels of the pictures that the checkpoint was trained on."""
    factor = _factor(alias, directory) if latents else None
    return latents * factor if latents and factor else None


def _factor(alias: str, directory: Path) -> int | None:
    """Return the number of pixels along one side of a latent; None if the autoencoder's configuration is missing."""
    path = directory / "vae" / "config.json"
    if not path.is_file():
        return None
    channels = items(alias, "vae/config.json", read_json(alias, path), "block_out_channels")
    return int(2 ** (len(channels) - 1)) if 0 < len(channels) <= 8 else None
