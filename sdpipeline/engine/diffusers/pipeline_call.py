"""Call of a diffusers pipeline, assembled from resident parts, for one padded batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import torch

from sdpipeline.domain import CheckpointRef, GenerationRequest, Json, Profile, Task
from sdpipeline.engine import Calls, Pixels
from sdpipeline.engine.checkpoints import CheckpointFiles
from sdpipeline.engine.diffusers.model_cache import TEXT_ENCODER, Loaded
from sdpipeline.engine.diffusers.per_image_scales import (
    PerImageScale,
    controlnet_scales,
    distilled_guidance,
    float32_noise,
    no_global_randomness,
)
from sdpipeline.engine.diffusers.preprocessing import Pictures
from sdpipeline.engine.diffusers.text import Embedding
from sdpipeline.engine.families import SCHEDULERS, Cell, Family
from sdpipeline.engine.pictures import to_pil


@dataclass(frozen=True, slots=True, kw_only=True)
class PassSettings:
    """Settings that all pictures of one forward pass share; all others may differ within a batch."""

    task: Task
    checkpoint: CheckpointRef
    vae: CheckpointRef | None
    controlnets: tuple[tuple[CheckpointRef, float, float], ...]
    loras: tuple[tuple[CheckpointRef, float], ...]
    ip_adapters: tuple[tuple[CheckpointRef, float], ...]
    width: int
    height: int
    scheduler: str
    num_inference_steps: int
    strength: float | None
    guided: bool
    noise_level: int | None
    prompt_tokens: int
    exact: bool
    profile: Profile

    @property
    def stepwise(self) -> bool:
        """True if pictures share single network calls instead of a whole call of their pipeline."""
        return self.profile != "exact"

    def in_lockstep(self) -> PassSettings:
        """Return the settings that pictures still have to share if their pipelines run in lockstep."""
        controlnets = tuple((ref, 0.0, 1.0) for ref, _, _ in self.controlnets)
        return replace(
            self,
            controlnets=controlnets,
            scheduler="",
            num_inference_steps=0,
            strength=None,
            guided=False,
            prompt_tokens=0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Embeddings of an IP-Adapter's reference picture and of its absence, with batch dimension 1."""

    image: torch.Tensor
    nothing: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One request of a batch, ready to run; ``index`` is its position in the requested batch.

    ``calls`` are the recorded network calls if the picture is reproduced.
    """

    index: int
    request: GenerationRequest
    pictures: Pictures
    prompt: Embedding
    negative: Embedding | None
    references: tuple[Reference, ...] = ()
    calls: Calls = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The resident parts that one pass uses."""

    row: Family
    cell: Cell
    base: Loaded
    controlnets: tuple[Loaded, ...] = ()
    vae: Loaded | None = None
    loras: tuple[tuple[CheckpointFiles, float], ...] = ()
    ip_adapters: tuple[tuple[Loaded, float], ...] = ()

    @property
    def autoencoder(self) -> Any:
        """The checkpoint's own autoencoder, or the one with which the request replaces it."""
        return self.vae.module if self.vae else self.base.parts["vae"]

    def loaded(self) -> list[Loaded]:
        """Return all resident checkpoints that the pass uses."""
        adapters = [loaded for loaded, _ in self.ip_adapters]
        return [self.base, *self.controlnets, *adapters, *([self.vae] if self.vae else [])]

    def networks(self) -> list[torch.nn.Module]:
        """Return every network that the pass uses, without the text encoders, which have run before."""
        return [
            network
            for loaded in self.loaded()
            for network in loaded.networks()
            if network not in loaded.text_encoders()
        ]

    @property
    def denoiser(self) -> Any:
        """The network that runs once per step."""
        return self.base.denoiser


@dataclass(frozen=True, slots=True, kw_only=True)
class Latents:
    """Latents with the scheduler's configuration, and the network calls of a picture that shared them.

    They keep the memory layout in which their pipeline left them, because bits depend on it.
    """

    values: torch.Tensor
    scheduler: Json
    calls: Calls = ()


def settings_of(member: Member, weights: Weights) -> PassSettings:
    """Return the settings of a request that must be equal throughout a pass."""
    request, cell = member.request, weights.cell
    strength = cell.strength if request.strength is None else request.strength
    noise_level = weights.row.noise_level if request.noise_level is None else request.noise_level
    return PassSettings(
        task=request.task,
        checkpoint=request.checkpoint,
        vae=request.vae,
        controlnets=tuple(
            (use.checkpoint, use.control_guidance_start, use.control_guidance_end) for use in request.controlnets
        ),
        loras=tuple((use.checkpoint, use.weight) for use in request.loras),
        ip_adapters=tuple((use.checkpoint, use.weight) for use in request.ip_adapters),
        width=request.width,
        height=request.height,
        scheduler=request.scheduler,
        num_inference_steps=request.num_inference_steps,
        strength=strength,
        guided=member.negative is not None,
        noise_level=noise_level,
        prompt_tokens=member.prompt.embeds.shape[1],
        exact=request.exact,
        profile=request.profile,
    )


def denoise(
    weights: Weights, settings: PassSettings, members: Sequence[Member], *, offload_to: torch.device | None = None
) -> Latents:
    """Denoise these members, in order; each has its own noise from its own CPU generator.

    With ``offload_to``, only the running network is on that device.
    """
    scheduler = make_scheduler(settings.scheduler, weights)
    pipe = assemble(weights, scheduler)
    with _per_image(weights, members), _offloaded(pipe, offload_to), torch.no_grad():
        values = pipe(**_arguments(weights, settings, members), **_references(pipe, members)).images
    return _latents(pipe, values, weights, settings)


def denoise_alone(
    weights: Weights, settings: PassSettings, member: Member, scheduler: Any, *, offload_to: torch.device | None = None
) -> Latents:
    """Denoise one member, whose pipeline may run in lockstep with others; call it inside :func:`shared_means`."""
    pipe = assemble(weights, scheduler)
    arguments = _arguments(weights, settings, [member]) | _own_scales(weights, settings, member)
    with _offloaded(pipe, offload_to):
        values = pipe(**arguments, **_references(pipe, [member])).images
    return _latents(pipe, values, weights, settings)


@contextmanager
def shared_means(weights: Weights) -> Iterator[None]:
    """Apply the patches that all pipelines inside the block share."""
    with no_global_randomness(weights.autoencoder), float32_noise():
        yield


def _latents(pipe: Any, values: torch.Tensor, weights: Weights, settings: PassSettings) -> Latents:
    if weights.row.text == "flux":
        values = pipe._unpack_latents(values, settings.height, settings.width, pipe.vae_scale_factor)  # noqa: SLF001
    name = type(pipe.scheduler).__name__
    config = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    return Latents(values=values, scheduler={"name": settings.scheduler, "class": name, "config": config})


def decode(weights: Weights, latents: torch.Tensor, *, float32: bool = False) -> npt.NDArray[np.float32]:
    """Decode latents to pictures from 0 to 1, batch x height x width x 3; values that are not finite are kept."""
    vae = weights.autoencoder
    own = vae.dtype
    upcast = float32 or (weights.row.float32_decode and own == torch.float16 and vae.config.force_upcast)
    with _in_dtype(vae, torch.float32 if upcast else own), torch.no_grad():
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        decoded = vae.decode(scaled, return_dict=False)[0]
    pictures = (decoded.float() / 2 + 0.5).permute(0, 2, 3, 1).cpu().numpy()
    return np.asarray(pictures, dtype=np.float32)


def make_scheduler(name: str, weights: Weights) -> Any:
    """Create a scheduler. Pipelines change theirs while they run, so two calls must not share one."""
    class_name, overrides = SCHEDULERS[name]
    scheduler_class = getattr(diffusers, class_name)
    config = dict(weights.base.scheduler_configs["scheduler"]) | dict(overrides) | dict(weights.row.scheduler_config)
    known = inspect.signature(scheduler_class.__init__).parameters
    return scheduler_class.from_config({key: value for key, value in config.items() if key in known})


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
def _offloaded(pipe: Any, device: torch.device | None) -> Iterator[None]:
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
    return modules[0] if len(modules) == 1 else modules


@contextmanager
def _per_image(weights: Weights, members: Sequence[Member]) -> Iterator[None]:
    """Apply each picture's own scales for the length of one call."""
    modules = [loaded.module for loaded in weights.controlnets]
    scales = [
        [member.request.controlnets[n].controlnet_conditioning_scale for member in members] for n in range(len(modules))
    ]
    with ExitStack() as active:
        active.enter_context(controlnet_scales(modules, scales))
        active.enter_context(shared_means(weights))
        if weights.row.text == "flux":
            guidance = [member.request.guidance_scale for member in members]
            for network in {weights.denoiser, *modules}:
                active.enter_context(distilled_guidance(network, guidance))
        yield


def _arguments(weights: Weights, settings: PassSettings, members: Sequence[Member]) -> dict[str, Any]:
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
    if cell.image:
        arguments[cell.image] = [to_pil(_required(member.pictures.image)) for member in members]
    if cell.mask_image:
        arguments[cell.mask_image] = [to_pil(_required(member.pictures.mask_image)) for member in members]
    if cell.max_controlnets:
        arguments |= _control(weights, settings, members)
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


def _own_scales(weights: Weights, settings: PassSettings, member: Member) -> dict[str, Any]:
    """Return the scales that :func:`_per_image` would replace, in the form that a pipeline takes for one picture."""
    own: dict[str, Any] = {}
    if weights.row.text == "flux":
        own["guidance_scale"] = member.request.guidance_scale
    if weights.cell.max_controlnets:
        scales = [use.controlnet_conditioning_scale for use in member.request.controlnets]
        own["controlnet_conditioning_scale"] = scales if len(settings.controlnets) > 1 else scales[0]
    return own


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
    if several and weights.row.text == "flux":
        arguments["control_mode"] = [None] * len(starts)  # without it, the later ControlNets are silently dropped
    if weights.cell.control_image:
        maps = [
            _stacked([member.pictures.control_maps[n] for member in members], signed=weights.row.signed_control_maps)
            for n in range(len(starts))
        ]
        arguments[weights.cell.control_image] = maps if several else maps[0]
    return arguments


def _references(pipe: Any, members: Sequence[Member]) -> dict[str, Any]:
    """Return reference pictures, one batch per IP-Adapter; without adapters, no arguments.

    The pipelines prepare one reference for the whole batch, and mix several if they get them.
    """
    if not members[0].references:
        return {}
    batches = []
    for n in range(len(members[0].references)):
        images = [member.references[n].image for member in members]
        nothing = [member.references[n].nothing for member in members if member.negative is not None]
        batches.append(torch.cat([*nothing, *images]))
    pipe.prepare_ip_adapter_image_embeds = lambda *_, **__: batches
    return {"ip_adapter_image_embeds": batches}


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
