"""Table of pipelines by model family, task and number of ControlNets, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sdpipeline.domain import Profile, Task

TextEncoding = Literal["clip", "clip-hidden", "sdxl", "sd3", "flux", "none"]

SCHEDULERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpmpp-2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp-2m-karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True},
    ),
    "dpmpp-2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "euler-karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "flow-match-euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""Schedulers by their common names: diffusers class, and overrides of the checkpoint's own config."""

FLOW_SCHEDULERS = frozenset({"flow-match-euler"})
NOISE_SCHEDULERS = frozenset(SCHEDULERS) - FLOW_SCHEDULERS

MANY = 8
"""Limit of ControlNets on one picture; more are surely a mistake."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One supported combination: a diffusers class, and the names of its call's picture arguments.

    A ``None`` name means that the call does not take that picture, a ``None`` strength that it takes no
    strength. ``controlnets_of`` differs from the family's if a pipeline needs its own kind.
    """

    pipeline: str
    image: str | None = None
    mask_image: str | None = None
    control_image: str | None = None
    takes_size: bool = True
    strength: float | None = None
    max_controlnets: int = 0
    controlnets_of: frozenset[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row: capabilities of a family's checkpoints, and defaults for requests.

    ``signed_control_maps``: its pipelines take control maps from -1 to 1 instead of from 0 to 1.
    ``adapters_of``: the families whose LoRAs, IP-Adapters and textual inversions fit.
    ``latents_of``: the family of the autoencoders that read its latents.
    ``float32_decode``: its autoencoder overflows in float16 if its configuration says so.
    ``profiles``: the supported profiles, the fastest last; ``turbo`` needs a U-Net.
    """

    name: str
    title: str
    text: TextEncoding = "clip"
    size_multiple: int = 8
    schedulers: frozenset[str] = NOISE_SCHEDULERS
    scheduler: str = "dpmpp-2m"
    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    cuda_dtype: str = "float16"
    negative_prompt: bool = True
    clip_skip: bool = False
    ip_adapter: bool = False
    lora: bool = True
    signed_control_maps: bool = False
    float32_decode: bool = False
    textual_inversion: bool = False
    noise_level: int | None = None
    max_noise_level: int | None = None
    profiles: tuple[Profile, ...] = ("exact", "fast", "turbo")
    controlnets_of: frozenset[str] = frozenset()
    adapters_of: frozenset[str] = frozenset()
    latents_of: str = ""
    plain: Mapping[Task, Cell] = field(default_factory=dict)
    controlled: Mapping[Task, Cell] = field(default_factory=dict)

    def cell(self, task: Task, *, controlnets: int = 0) -> Cell | None:
        """Return the combination's cell, or ``None`` if diffusers has no such pipeline."""
        found = (self.controlled if controlnets else self.plain).get(task)
        return found if found and controlnets <= found.max_controlnets else None

    def accepts_controlnet(self, task: Task, controlnet: str) -> bool:
        """Return True if a ControlNet of that family can be used for this task."""
        found = self.controlled.get(task)
        return found is not None and controlnet in (found.controlnets_of or self.controlnets_of)


def family(name: str) -> Family:
    """Return the row of that name; KeyError for a name that :func:`refusal` would refuse."""
    return FAMILIES[name]


def refusal(name: str, task: Task, *, controlnets: int = 0) -> str | None:
    """Return the reason why this combination cannot run, with the nearest one that can; ``None`` if it can."""
    if name not in FAMILIES:
        return f"family {name!r} cannot make pictures; known families: {', '.join(FAMILIES)}"
    row = FAMILIES[name]
    if row.cell(task, controlnets=controlnets):
        return None
    wanted = f"{row.title} has no {task}{_with(controlnets)}"
    return f"{wanted}; nearest: {_nearest(row, task, controlnets)}"


def scheduler_refusal(name: str, scheduler: str) -> str | None:
    """Return the reason why this family cannot use this scheduler, with those it can use; ``None`` if it can."""
    row = FAMILIES[name]
    if scheduler in row.schedulers:
        return None
    known = "" if scheduler in SCHEDULERS else " (unknown)"
    return f"{row.title} cannot use scheduler {scheduler!r}{known}; use one of {', '.join(sorted(row.schedulers))}"


def profile_refusal(name: str, profile: Profile) -> str | None:
    """Return the reason why this family cannot use this profile, with those it can use; ``None`` if it can."""
    row = FAMILIES[name]
    if profile in row.profiles:
        return None
    return f"{row.title} gains nothing from {profile!r}; use {' or '.join(row.profiles)}"


def size_multiple(name: str) -> int:
    """Return the number of which width and height must be multiples (of the input, for super-resolution)."""
    return FAMILIES[name].size_multiple


def table() -> str:
    """Return the whole table as Markdown, for the README."""
    lines = ["| family | task | plain | with ControlNets |", "|---|---|---|---|"]
    for row in FAMILIES.values():
        for task in Task:
            plain, controlled = row.cell(task), row.controlled.get(task)
            if plain or controlled:
                lines.append(f"| {row.title} (`{row.name}`) | {task} | {_named(plain)} | {_named(controlled)} |")
    return "\n".join(lines)


def _named(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    return f"{cell.pipeline} (one)" if cell.max_controlnets == 1 else cell.pipeline


def _with(controlnets: int) -> str:
    return f" with {controlnets} ControlNets" if controlnets > 1 else " with a ControlNet" if controlnets else ""


def _nearest(row: Family, task: Task, controlnets: int) -> str:
    """Suggest the same task with fewer ControlNets, else in another family, else the tasks of this family."""
    controlled = row.controlled.get(task)
    if controlnets and controlled:
        return f"{task} with at most {controlled.max_controlnets} ControlNet(s) through {controlled.pipeline}"
    if controlnets and row.controlled:
        other, cell = next(iter(row.controlled.items()))
        return f"{other} with a ControlNet through {cell.pipeline}"
    if task in row.plain:
        return f"{task} without a ControlNet through {row.plain[task].pipeline}"
    few = min(controlnets, 1)
    elsewhere = [other for other in FAMILIES.values() if other.cell(task, controlnets=few)]
    own = ", ".join(row.plain)
    if not elsewhere:
        return f"{own} here"
    return f"{task}{_with(few)} with a checkpoint of family {elsewhere[0].name!r}, or {own} here"


def _cells(plain: str, *, strength: float = 0.8, sized_image_to_image: bool = True) -> dict[Task, Cell]:
    return {
        Task.TEXT_TO_IMAGE: Cell(pipeline=f"{plain}Pipeline"),
        Task.IMAGE_TO_IMAGE: Cell(
            pipeline=f"{plain}Img2ImgPipeline", image="image", takes_size=sized_image_to_image, strength=strength
        ),
        Task.INPAINTING: Cell(pipeline=f"{plain}InpaintPipeline", image="image", mask_image="mask_image", strength=1.0),
    }


def _controlled_cells(prefix: str, *, text_image: str, strength: float) -> dict[Task, Cell]:
    """Return the ControlNet cells; the older text-to-image calls name the control map just ``image``."""
    control = "control_image"
    return {
        Task.TEXT_TO_IMAGE: Cell(pipeline=f"{prefix}Pipeline", control_image=text_image, max_controlnets=MANY),
        Task.IMAGE_TO_IMAGE: Cell(
            pipeline=f"{prefix}Img2ImgPipeline",
            image="image",
            control_image=control,
            strength=strength,
            max_controlnets=MANY,
        ),
        Task.INPAINTING: Cell(
            pipeline=f"{prefix}InpaintPipeline",
            image="image",
            mask_image="mask_image",
            control_image=control,
            strength=1.0,
            max_controlnets=MANY,
        ),
    }


_SD_PLAIN = _cells("StableDiffusion", sized_image_to_image=False)
_SD_CONTROLLED = _controlled_cells("StableDiffusionControlNet", text_image="image", strength=0.8)
_SDXL_PLAIN = _cells("StableDiffusionXL", sized_image_to_image=False)
_SDXL_CONTROLLED = _controlled_cells("StableDiffusionXLControlNet", text_image="image", strength=0.8)
_FLUX_CONTROLLED = _controlled_cells("FluxControlNet", text_image="control_image", strength=0.6)
_SD3_CONTROLLED = {
    Task.TEXT_TO_IMAGE: Cell(
        pipeline="StableDiffusion3ControlNetPipeline", control_image="control_image", max_controlnets=MANY
    ),
    # This ControlNet is trained on the masked picture itself: picture and mask are the control inputs.
    Task.INPAINTING: Cell(
        pipeline="StableDiffusion3ControlNetInpaintingPipeline",
        image="control_image",
        mask_image="control_mask",
        max_controlnets=1,
        controlnets_of=frozenset({"sd3-inpaint"}),
    ),
}


def _only(task: Task, cells: Mapping[Task, Cell]) -> dict[Task, Cell]:
    return {task: cells[task]}


FAMILIES: Mapping[str, Family] = {
    row.name: row
    for row in (
        Family(
            name="sd1",
            title="Stable Diffusion 1.x",
            clip_skip=True,
            ip_adapter=True,
            textual_inversion=True,
            controlnets_of=frozenset({"sd1"}),
            adapters_of=frozenset({"sd1"}),
            latents_of="sd1",
            plain=_SD_PLAIN,
            controlled=_SD_CONTROLLED,
        ),
        Family(
            name="sd2",
            title="Stable Diffusion 2.x",
            clip_skip=True,
            textual_inversion=True,
            controlnets_of=frozenset({"sd2"}),
            adapters_of=frozenset({"sd2"}),
            latents_of="sd1",
            plain=_SD_PLAIN,
            controlled=_SD_CONTROLLED,
        ),
        Family(
            name="sd-inpaint",
            title="Stable Diffusion 9-channel inpainting",
            clip_skip=True,
            textual_inversion=True,
            controlnets_of=frozenset({"sd1", "sd2"}),
            adapters_of=frozenset({"sd1", "sd2"}),
            latents_of="sd1",
            plain=_only(Task.INPAINTING, _SD_PLAIN),
            controlled=_only(Task.INPAINTING, _SD_CONTROLLED),
        ),
        Family(
            name="sdxl",
            title="Stable Diffusion XL",
            float32_decode=True,
            text="sdxl",
            num_inference_steps=30,
            guidance_scale=5.0,
            clip_skip=True,
            ip_adapter=True,
            textual_inversion=True,
            controlnets_of=frozenset({"sdxl"}),
            adapters_of=frozenset({"sdxl"}),
            latents_of="sdxl",
            plain=_SDXL_PLAIN,
            controlled=_SDXL_CONTROLLED,
        ),
        Family(
            name="sdxl-inpaint",
            title="Stable Diffusion XL 9-channel inpainting",
            float32_decode=True,
            text="sdxl",
            num_inference_steps=30,
            guidance_scale=7.5,
            clip_skip=True,
            textual_inversion=True,
            controlnets_of=frozenset({"sdxl"}),
            adapters_of=frozenset({"sdxl"}),
            latents_of="sdxl",
            plain=_only(Task.INPAINTING, _SDXL_PLAIN),
            controlled=_only(Task.INPAINTING, _SDXL_CONTROLLED),
        ),
        Family(
            name="sd3",
            title="Stable Diffusion 3",
            text="sd3",
            size_multiple=16,
            schedulers=FLOW_SCHEDULERS,
            scheduler="flow-match-euler",
            num_inference_steps=28,
            guidance_scale=7.0,
            clip_skip=True,
            signed_control_maps=True,
            profiles=("exact", "fast"),
            controlnets_of=frozenset({"sd3"}),
            adapters_of=frozenset({"sd3"}),
            latents_of="sd3",
            plain=_cells("StableDiffusion3", strength=0.6),
            controlled=_SD3_CONTROLLED,
        ),
        Family(
            name="flux",
            title="Flux",
            text="flux",
            size_multiple=16,
            schedulers=FLOW_SCHEDULERS,
            scheduler="flow-match-euler",
            num_inference_steps=28,
            guidance_scale=3.5,
            cuda_dtype="bfloat16",
            negative_prompt=False,
            signed_control_maps=True,
            profiles=("exact", "fast"),
            controlnets_of=frozenset({"flux"}),
            adapters_of=frozenset({"flux"}),
            latents_of="flux",
            plain=_cells("Flux", strength=0.6),
            controlled=_FLUX_CONTROLLED,
        ),
        Family(
            name="upscale",
            title="Stable Diffusion x4 upscaler",
            float32_decode=True,
            scheduler="ddim",
            num_inference_steps=50,
            guidance_scale=9.0,
            clip_skip=True,
            lora=False,
            noise_level=20,
            max_noise_level=350,
            latents_of="upscale",
            plain={
                Task.SUPER_RESOLUTION: Cell(pipeline="StableDiffusionUpscalePipeline", image="image", takes_size=False)
            },
        ),
        Family(
            name="latent-upscale",
            title="Stable Diffusion x2 latent upscaler",
            text="clip-hidden",
            size_multiple=64,
            schedulers=frozenset({"euler"}),
            scheduler="euler",
            num_inference_steps=20,
            guidance_scale=1.0,
            lora=False,
            profiles=("exact",),
            latents_of="sd1",
            plain={
                Task.SUPER_RESOLUTION: Cell(
                    pipeline="StableDiffusionLatentUpscalePipeline", image="image", takes_size=False
                )
            },
        ),
        Family(
            name="gan-upscale",
            title="GAN upscaler",
            text="none",
            size_multiple=1,
            schedulers=NOISE_SCHEDULERS | {"none"},  # no scheduler runs, so any default of a campaign is accepted
            scheduler="none",
            num_inference_steps=1,
            guidance_scale=1.0,
            negative_prompt=False,
            lora=False,
            profiles=("exact",),
            plain={Task.SUPER_RESOLUTION: Cell(pipeline="spandrel", image="image", takes_size=False)},
        ),
    )
}
