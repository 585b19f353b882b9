"""Call of a diffusers pipeline, assembled from resident parts, for one padded batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import torch

from sdpipeline.domain import Json
from sdpipeline.engine import Pixels
from sdpipeline.engine.classification.unions import FLUX_UNION, SDXL_UNION
from sdpipeline.engine.diffusers import schedulers
from sdpipeline.engine.diffusers.batch import Denoised, Latents, Member, PassSettings, Weights, padded
from sdpipeline.engine.diffusers.loading import TEXT_ENCODER
from sdpipeline.engine.diffusers.patches import PerImageScale, float32_noise, no_global_randomness
from sdpipeline.engine.diffusers.per_image_scales import (
    control_map_scales,
    control_mode_per_row,
    controlnet_scales,
    distilled_guidance,
    embedded_guidance,
    guidance_embeddings,
    own_references,
)
from sdpipeline.engine.diffusers.text import Embedding
from sdpipeline.engine.families import ETA
from sdpipeline.engine.pixels import to_pil


def denoise(
    weights: Weights,
    settings: PassSettings,
    members: Sequence[Member],
    bucket: int,
    *,
    offload_to: torch.device | None = None,
) -> Denoised:
    """Denoise these members by one call of their pipeline, padded with copies of the last; each has its own noise.

    With ``offload_to``, only the running network is on that device.
    """
    scheduler = scheduler_of(settings, weights)
    pipe = assemble(weights, scheduler)
    batch = padded(members, bucket)
    with _per_image(weights, batch), offloaded(pipe, offload_to), torch.no_grad():
        values = pipe(**call_arguments(weights, settings, batch)).images
    whole = latents_of(pipe, values, weights, settings)
    return Denoised(latents=[whole] * len(members), batches=[whole.values], decode_batch=bucket)


@contextmanager
def patched(weights: Weights) -> Iterator[None]:
    """Apply the patches that every pipeline call needs."""
    with no_global_randomness(weights.autoencoder), float32_noise():
        yield


def latents_of(pipe: Any, values: torch.Tensor, weights: Weights, settings: PassSettings) -> Latents:
    """Return a pipeline's output with its scheduler's configuration."""
    if weights.row.text == "flux":
        values = unpack_latents(values, settings.height, settings.width, pipe.vae_scale_factor)
    name = type(pipe.scheduler).__name__
    config = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    scheduler: Json = {"name": settings.scheduler, "class": name, "config": config}
    if (eta := _eta(settings)) is not None:
        scheduler["eta"] = eta
    return Latents(values=values, scheduler=scheduler)


def unpack_latents(latents: torch.Tensor, height: int, width: int, scale: int) -> torch.Tensor:
    """Return Flux latents as channels x height x width; its pipelines hold them as rows of 2 x 2 patches."""
    count, _, channels = latents.shape
    rows, columns = int(height) // (scale * 2), int(width) // (scale * 2)
    patches = latents.view(count, rows, columns, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(count, channels // 4, rows * 2, columns * 2)


def decode(
    weights: Weights, latents: torch.Tensor, *, statistics: bool = True, float32: bool = False
) -> npt.NDArray[np.float32]:
    """Decode latents to pictures from 0 to 1, batch x height x width x 3; values that are not finite are kept.

    ``statistics``: use the latents' mean and standard deviation of the autoencoder's configuration, if it has them.
    """
    vae = weights.autoencoder
    own = vae.dtype
    upcast = float32 or (weights.row.float32_decode and own == torch.float16 and vae.config.force_upcast)
    with _in_dtype(vae, torch.float32 if upcast else own), torch.no_grad():
        scaled = _unscaled(vae, latents.to(vae.dtype), statistics=statistics)
        decoded = vae.decode(scaled, return_dict=False)[0]
    pictures = (decoded.float() / 2 + 0.5).permute(0, 2, 3, 1).cpu().numpy()
    return np.asarray(pictures, dtype=np.float32)


def latent_statistics(vae: Any, *, wanted: bool) -> tuple[list[float], list[float]] | None:
    """Return mean and standard deviation of the latents by channel, from the autoencoder's configuration."""
    mean, deviation = vae.config.get("latents_mean"), vae.config.get("latents_std")
    return (list(mean), list(deviation)) if wanted and mean is not None and deviation is not None else None


def _unscaled(vae: Any, latents: torch.Tensor, *, statistics: bool) -> torch.Tensor:
    """Return latents in the autoencoder's own range, by the same operations as the pipelines."""
    if found := latent_statistics(vae, wanted=statistics):
        mean, deviation = (torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in found)
        return latents * deviation / float(vae.config.scaling_factor) + mean
    return latents / float(vae.config.scaling_factor) + float(vae.config.shift_factor or 0.0)


def scheduler_of(settings: PassSettings, weights: Weights) -> Any:
    """Create the scheduler of a pass: the recorded one if a picture is reproduced."""
    if settings.scheduler_config:
        return schedulers.recreate(settings.scheduler_config)
    return make_scheduler(settings.scheduler, weights)


def _eta(settings: PassSettings) -> float | None:
    """Return the share of noise that each step adds: the recorded one if a picture is reproduced; None if fixed."""
    return settings.scheduler_config.eta if settings.scheduler_config else ETA.get(settings.scheduler)


def make_scheduler(name: str, weights: Weights) -> Any:
    """Create a scheduler. Pipelines change theirs while they run, so two calls must not share one."""
    own = weights.base.scheduler_configs["scheduler"]
    return schedulers.create(name, weights.row, own, alias=weights.base.files.alias)


def assemble(weights: Weights, scheduler: Any, *, with_text_encoders: bool = False) -> Any:
    """Assemble the cell's pipeline from the resident parts; it holds no weights of its own.

    It gets embeddings, so text encoders are left out: if they were on another device, the pipeline might use that
    device as its own.
    """
    pipeline_class = getattr(diffusers, weights.cell.pipeline)
    parts = {
        name: part
        for name, part in weights.base.parts.items()
        if with_text_encoders or not name.startswith(TEXT_ENCODER)
    }
    parts |= dict(weights.base.options)
    parts |= {"scheduler": scheduler, "vae": weights.autoencoder, "controlnet": _controlnet(weights)}
    parts |= {"requires_safety_checker": False, "add_watermarker": False}
    if config := weights.base.scheduler_configs.get("low_res_scheduler"):
        parts["low_res_scheduler"] = getattr(diffusers, config["_class_name"]).from_config(dict(config))
    given = {}
    for name, parameter in inspect.signature(pipeline_class.__init__).parameters.items():
        if name in parts:
            given[name] = parts[name]
        elif name != "self" and parameter.default is inspect.Parameter.empty:
            given[name] = None
    pipe = pipeline_class(**given)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def offloaded(pipe: Any, device: torch.device | None) -> Iterator[None]:
    """Keep only the running network of a pipeline on that device."""
    if device is None:
        yield
        return
    pipe.enable_model_cpu_offload(device=device)
    try:
        yield
    finally:
        pipe.remove_all_hooks()


def _controlnet(weights: Weights) -> Any:
    modules = [loaded.module for loaded in weights.controlnets]
    if _several_modes(weights):
        return modules[0]
    return modules[0] if len(modules) == 1 else modules


def _several_modes(weights: Weights) -> bool:
    """Return True if one SDXL union ControlNet reads several control maps in one call."""
    digests = {loaded.files.digest for loaded in weights.controlnets}
    return len(weights.controlnets) > 1 and len(digests) == 1 and _is_sdxl_union(weights)


def _is_sdxl_union(weights: Weights) -> bool:
    return any(loaded.files.family == SDXL_UNION for loaded in weights.controlnets)


@contextmanager
def _per_image(weights: Weights, members: Sequence[Member]) -> Iterator[None]:
    """Apply each picture's own scales and references for the length of one call."""
    modules = [loaded.module for loaded in weights.controlnets]
    scales = [
        [member.request.controlnets[n].controlnet_conditioning_scale for member in members] for n in range(len(modules))
    ]
    with ExitStack() as active:
        if _several_modes(weights):
            active.enter_context(control_map_scales(modules[0], scales))
        else:
            active.enter_context(controlnet_scales(modules, scales))
        for loaded in weights.controlnets:
            if loaded.files.family == FLUX_UNION:
                active.enter_context(control_mode_per_row(loaded.module))
        active.enter_context(patched(weights))
        if members[0].references:
            active.enter_context(own_references(weights.denoiser, _references(members)))
        guidance = [member.request.guidance_scale for member in members]
        if (width := weights.guidance_embedding_dim) is not None:
            active.enter_context(embedded_guidance(weights.denoiser, guidance_embeddings(guidance, width)))
        if weights.row.text == "flux":
            for network in {weights.denoiser, *modules}:
                active.enter_context(distilled_guidance(network, guidance))
        yield


def call_arguments(weights: Weights, settings: PassSettings, members: Sequence[Member]) -> dict[str, Any]:
    """Return the arguments of the pipeline call, with the names from the family's row."""
    cell = weights.cell
    arguments: dict[str, Any] = {
        "num_inference_steps": settings.num_inference_steps,
        "generator": [torch.Generator("cpu").manual_seed(member.request.seed) for member in members],
        "output_type": "latent",
        **_prompts(weights, members),
        **_guidance(weights, settings, members),
    }
    if cell.takes_size:
        arguments |= {"width": settings.width, "height": settings.height}
    if cell.strength is not None:
        arguments["strength"] = settings.strength
    if settings.noise_level is not None:
        arguments["noise_level"] = settings.noise_level
    if (eta := _eta(settings)) is not None:
        arguments["eta"] = eta
    if cell.image:
        arguments[cell.image] = [to_pil(_required(member.pictures.image)) for member in members]
    if cell.mask_image:
        arguments[cell.mask_image] = [to_pil(_required(member.pictures.mask_image)) for member in members]
    if cell.max_controlnets:
        arguments |= _control(weights, settings, members)
    if members[0].references:
        # The pipelines repeat these for every picture; :func:`_per_image` replaces them by each picture's own.
        arguments["ip_adapter_image_embeds"] = _references(members[:1])
    return arguments


def _required(pixels: Pixels | None) -> Pixels:
    assert pixels is not None
    return pixels


def _prompts(weights: Weights, members: Sequence[Member]) -> dict[str, torch.Tensor]:
    prompts = [member.prompt for member in members]
    given = {"prompt_embeds": torch.cat([prompt.embeds for prompt in prompts])}
    if prompts[0].pooled is not None:
        given["pooled_prompt_embeds"] = torch.cat([_pooled(prompt) for prompt in prompts])
    negatives = [member.negative for member in members if member.negative is not None]
    if negatives and weights.row.negative_prompt:
        given["negative_prompt_embeds"] = torch.cat([negative.embeds for negative in negatives])
        if negatives[0].pooled is not None:
            given["negative_pooled_prompt_embeds"] = torch.cat([_pooled(negative) for negative in negatives])
    return given


def _pooled(embedding: Embedding) -> torch.Tensor:
    assert embedding.pooled is not None
    return embedding.pooled


def _guidance(weights: Weights, settings: PassSettings, members: Sequence[Member]) -> dict[str, Any]:
    if weights.row.text == "flux" or not settings.guided:
        return {"guidance_scale": 1.0}
    return {"guidance_scale": PerImageScale([member.request.guidance_scale for member in members])}


def _control(weights: Weights, settings: PassSettings, members: Sequence[Member]) -> dict[str, Any]:
    """Return control maps as one tensor per ControlNet: pipelines differ in how they read nested lists."""
    several = len(settings.controlnets) > 1
    starts = [start for _, start, _ in settings.controlnets]
    ends = [end for _, _, end in settings.controlnets]
    arguments: dict[str, Any] = {
        "controlnet_conditioning_scale": [1.0] * len(starts) if several else 1.0,
        "control_guidance_start": starts if several else starts[0],
        "control_guidance_end": ends if several else ends[0],
    }
    modes = list(settings.control_modes)
    if several and weights.row.text == "flux":
        arguments["control_mode"] = modes  # without it, the later ControlNets are silently dropped
    elif modes[0] is not None:
        arguments["control_mode"] = modes if several else modes[0]
    if weights.cell.control_image:
        maps = [
            _stacked([member.pictures.control_maps[n] for member in members], signed=weights.row.signed_control_maps)
            for n in range(len(starts))
        ]
        arguments[weights.cell.control_image] = maps if several else maps[0]
    return arguments


def _references(members: Sequence[Member]) -> list[torch.Tensor]:
    """Return reference pictures, one batch per IP-Adapter: embeddings without any picture first, if guidance is on."""
    batches = []
    for n in range(len(members[0].references)):
        images = [member.references[n].image for member in members]
        nothing = [member.references[n].nothing for member in members if member.negative is not None]
        batches.append(torch.cat([*nothing, *images]))
    return batches


def _stacked(pixels: Sequence[Pixels], *, signed: bool) -> torch.Tensor:
    values = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    return values * 2 - 1 if signed else values


@contextmanager
def _in_dtype(network: Any, dtype: torch.dtype) -> Iterator[None]:
    own = network.dtype
    if dtype == own:
        yield
        return
    # diffusers' own `to` warns about a list of exceptions that is empty here.
    torch.nn.Module.to(network, dtype)
    try:
        yield
    finally:
        torch.nn.Module.to(network, own)
