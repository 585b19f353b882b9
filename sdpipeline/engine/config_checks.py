"""Refusals of what a checkpoint's configuration files say and its family's pipelines would ignore, or fail on.

All other keys are honoured: they build the network, or the pipeline reads them. Files that are not on this machine are
not checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sdpipeline.domain import Profile, Task
from sdpipeline.engine.checkpoint_config import Config, read
from sdpipeline.engine.families import FAMILIES, Family
from sdpipeline.engine.refusal import Refusal
from sdpipeline.errors import CheckpointError

CLIP_POSITIONS = 77
SIZES = 6
"""Numbers of SDXL's micro-conditioning: original size, crop and target size, two each."""
SIZES_WITH_SCORE = 5
"""The same with ``requires_aesthetics_score``: original size, crop and one score."""
SDXL = frozenset({"sdxl", "sdxl-inpaint"})
TRANSFORMERS = frozenset({"sd3", "flux"})

_FIX = "use another checkpoint: no pipeline of this family does that"


def check(alias: str, directory: Path, family: str) -> None:
    """Raise CheckpointError for a configuration that no task of the family can run as it says."""
    row = FAMILIES.get(family)
    if row is None or row.text == "none":
        return
    for refused in _faults(directory, row):
        raise CheckpointError(f"checkpoint {alias!r}: {refused.message}; {refused.fix}")


def refusal(directory: Path, row: Family, task: Task) -> Refusal | None:
    """Refuse a checkpoint whose configuration the pipeline of this task would ignore, or fail on."""
    if row.text == "none":
        return None
    return next(_faults(directory, row), None) or next(_task_faults(directory, row, task), None)


def vae_refusal(vae: Config, row: Family, task: Task, where: str = "vae/config.json") -> Refusal | None:
    """Refuse an autoencoder whose latents the pipeline of this task would not normalise as its configuration says."""
    return next(_vae_faults(vae, row, where), None) or next(_vae_task_faults(vae, row, task, where), None)


def pooled_refusal(controlnets: Sequence[Path], profile: Profile) -> Refusal | None:
    """Refuse call batching for a ControlNet that pools its output (shuffle): its rows are not those of the U-Net."""
    pooled = any(read(directory, "config.json").get("global_pool_conditions") for directory in controlnets)
    if profile == "exact" or not pooled:
        return None
    message = f"{profile!r} cannot batch the calls of a ControlNet whose config.json has global_pool_conditions: true"
    return Refusal(key="profile", message=message, fix="use profile: exact")


def size_refusal(directory: Path, row: Family, width: int, height: int) -> Refusal | None:
    """Refuse a size beyond the positions that an SD3 transformer knows."""
    config = read(directory, "transformer/config.json")
    positions = config.get("pos_embed_max_size")
    if row.name != "sd3" or not isinstance(positions, int):
        return None
    most = positions * config.get("patch_size", 2) * 8
    for side, pixels in (("width", width), ("height", height)):
        if pixels > most:
            message = f"{pixels} is more than {most}, for which this checkpoint's transformer has positions"
            return Refusal(key=side, message=message, fix=f"write at most {most}")
    return None


def _faults(directory: Path, row: Family) -> Iterator[Refusal]:
    yield from _text_faults(directory, row)
    vae = read(directory, "vae/config.json")
    yield from _vae_faults(vae, row, "vae/config.json")
    if row.name in TRANSFORMERS:
        yield from _transformer_faults(read(directory, "transformer/config.json"), vae, directory, row)
    else:
        yield from _unet_faults(read(directory, "unet/config.json"), vae, directory, row)


def _text_faults(directory: Path, row: Family) -> Iterator[Refusal]:
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        config = read(directory, f"{name}/config.json")
        where = f"{name}/config.json"
        positions = config.get("max_position_embeddings", CLIP_POSITIONS)
        if config.get("model_type") == "clip_text_model" and positions != CLIP_POSITIONS:
            yield _ignored(where, "max_position_embeddings", positions, f"prompts are read in {CLIP_POSITIONS} tokens")
        if config.get("use_attention_mask"):
            yield _ignored(where, "use_attention_mask", True, f"{row.title} reads prompts without a mask")


def _vae_faults(vae: Config, row: Family, where: str) -> Iterator[Refusal]:
    if not vae:
        return
    if row.name in TRANSFORMERS and vae.get("shift_factor") is None:
        yield _fault(f"{where} has no shift_factor, which {row.title} needs")
    if row.name not in TRANSFORMERS and vae.get("shift_factor"):
        yield _ignored(where, "shift_factor", vae["shift_factor"], f"{row.title} does not shift latents")
    given = [key for key in ("latents_mean", "latents_std") if vae.get(key) is not None]
    if len(given) == 1:
        yield _fault(f"{where} has {given[0]} without the other of latents_mean and latents_std")
    for key in given:
        if row.name not in SDXL:
            yield _ignored(where, key, "[…]", f"{row.title} does not normalise latents")
        elif not isinstance(vae[key], list) or len(vae[key]) != vae.get("latent_channels", 4):
            yield _fault(f"{where} has {key} for another number of channels than latent_channels")
    for key in ("in_channels", "out_channels"):
        if vae.get(key, 3) != 3:
            yield _ignored(where, key, vae[key], "pictures have 3 channels")


def _unet_faults(unet: Config, vae: Config, directory: Path, row: Family) -> Iterator[Refusal]:
    where = "unet/config.json"
    if not unet:
        return
    if unet.get("class_embed_type") is not None:
        yield _ignored(where, "class_embed_type", unet["class_embed_type"], f"{row.title} gives no class")
    if unet.get("num_class_embeds") is not None and row.max_noise_level is None:
        yield _ignored(where, "num_class_embeds", unet["num_class_embeds"], f"{row.title} gives no class")
    embedded = "text_time" if row.name in SDXL else None
    if (kind := unet.get("addition_embed_type")) not in (embedded, None, "text"):
        yield _ignored(where, "addition_embed_type", kind, f"{row.title} gives no such condition")
    if (kind := unet.get("encoder_hid_dim_type")) not in (None, "text_proj"):
        yield _ignored(where, "encoder_hid_dim_type", kind, f"{row.title} gives no such condition")
    channels = vae.get("latent_channels", 4)
    if vae and row.name != "latent-upscale" and unet.get("out_channels", 4) != channels:
        yield _fault(f"{where} has out_channels: {unet.get('out_channels', 4)}, but the autoencoder has {channels}")
    yield from _width_faults(unet, directory, row)
    if row.name in SDXL:
        yield from _sizes_faults(unet, directory, None)


def _width_faults(unet: Config, directory: Path, row: Family) -> Iterator[Refusal]:
    """Refuse a U-Net that reads embeddings of another width than the text encoders give."""
    names = ("text_encoder", "text_encoder_2") if row.name in SDXL else ("text_encoder",)
    gives = _total(directory, names, "hidden_size")
    reads = unet.get("encoder_hid_dim") or unet.get("cross_attention_dim")
    if type(reads) is int and gives is not None and reads != gives:
        yield _fault(f"unet/config.json reads text of width {reads}, but the text encoders give {gives}")


def _total(directory: Path, encoders: Sequence[str], key: str) -> int | None:
    """Return the sum of a width over text encoders; ``None`` if one is not known."""
    widths = [read(directory, f"{name}/config.json").get(key) for name in encoders]
    known = [width for width in widths if type(width) is int]
    return sum(known) if len(known) == len(widths) else None


def _sizes_faults(unet: Config, directory: Path, task: Task | None) -> Iterator[Refusal]:
    """Refuse a U-Net for another number of micro-conditions; without a task, one that fits none."""
    width = unet.get("projection_class_embeddings_input_dim")
    each = unet.get("addition_time_embed_dim")
    pooled = read(directory, "text_encoder_2/config.json").get("projection_dim")
    if not (type(width) is int and type(each) is int and type(pooled) is int):
        return
    scored = bool(read(directory, "model_index.json").get("requires_aesthetics_score"))
    plain = SIZES * each + pooled
    other = SIZES_WITH_SCORE * each + pooled if scored else plain
    fitting = (plain, other) if task is None else (plain,) if task is Task.TEXT_TO_IMAGE else (other,)
    if width not in fitting:
        message = f"unet/config.json has projection_class_embeddings_input_dim: {width}, but needs {fitting[0]}"
        score = " with requires_aesthetics_score: true in model_index.json" if scored else ""
        doing = f" for {task}" if task else ""
        yield Refusal(key="checkpoint", message=f"{message}{doing}{score}", fix=_FIX)


def _transformer_faults(transformer: Config, vae: Config, directory: Path, row: Family) -> Iterator[Refusal]:
    where = "transformer/config.json"
    if not transformer:
        return
    if vae:
        channels = vae.get("latent_channels", 4) * (4 if row.name == "flux" else 1)
        if transformer.get("in_channels", channels) != channels:
            reads = transformer["in_channels"]
            yield _fault(f"{where} has in_channels: {reads}, but the autoencoder's latents give {channels}")
    names = ("text_encoder", "text_encoder_2") if row.name == "sd3" else ("text_encoder",)
    key = "projection_dim" if row.name == "sd3" else "hidden_size"
    gives, reads = _total(directory, names, key), transformer.get("pooled_projection_dim")
    if type(reads) is int and gives is not None and reads != gives:
        yield _fault(f"{where} has pooled_projection_dim: {reads}, but the text encoders give {gives}")


def _task_faults(directory: Path, row: Family, task: Task) -> Iterator[Refusal]:
    yield from _vae_task_faults(read(directory, "vae/config.json"), row, task, "vae/config.json")
    if row.name in SDXL:
        yield from _sizes_faults(read(directory, "unet/config.json"), directory, task)


def _vae_task_faults(vae: Config, row: Family, task: Task, where: str) -> Iterator[Refusal]:
    if row.name in SDXL and task is Task.INPAINTING and vae.get("latents_mean") is not None:
        # diffusers 0.42 encodes the picture without them, and decodes with them or not depending on the pipeline.
        yield _ignored(where, "latents_mean", "[…]", f"{task} of {row.title} does not normalise latents")


def _ignored(where: str, key: str, value: Any, why: str) -> Refusal:
    return _fault(f"{where} has {key}: {value}, but {why}")


def _fault(message: str) -> Refusal:
    return Refusal(key="checkpoint", message=message, fix=_FIX)
