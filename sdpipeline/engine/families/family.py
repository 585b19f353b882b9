"""Row of the family table, and cells that several families share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sdpipeline.domain import Profile, Task
from sdpipeline.engine.families.schedulers import NOISE_SCHEDULERS

TextEncoding = Literal["clip", "clip-hidden", "sdxl", "sd3", "flux", "none"]

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
    ``union``: the cells with union ControlNets, empty if those of ``controlled`` take them too.
    ``latents_of``: the family of the autoencoders that read its latents.
    ``float32_decode``: its autoencoder overflows in float16 if its configuration says so.
    ``profiles``: the supported profiles, the fastest last; ``turbo`` needs a U-Net.
    ``guidance_embedding``: if its U-Net has a ``time_cond_proj_dim``, that is for an embedding of the guidance scale.
    ``scheduler_config``: options that its pipelines set in every scheduler, with a deprecation warning in each call.
    """

    name: str
    title: str
    text: TextEncoding = "clip"
    size_multiple: int = 8
    schedulers: frozenset[str] = NOISE_SCHEDULERS
    scheduler: str = "dpmpp-2m"
    scheduler_config: Mapping[str, Any] = field(default_factory=dict)
    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    guidance_embedding: bool = True
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
    union: Mapping[Task, Cell] = field(default_factory=dict)

    @property
    def weighted_prompts(self) -> bool:
        """True if its prompts can be weighted: only CLIP reads them."""
        return self.text in ("clip", "clip-hidden", "sdxl")

    def cell(self, task: Task, *, controlnets: int = 0, union: bool = False) -> Cell | None:
        """Return the combination's cell, or ``None`` if diffusers has no such pipeline.

        ``union`` tells that the ControlNets are union ControlNets.
        """
        controlled = self.union if union and self.union else self.controlled
        found = (controlled if controlnets else self.plain).get(task)
        return found if found and controlnets <= found.max_controlnets else None

    def accepts_controlnet(self, task: Task, controlnet: str) -> bool:
        """Return True if a ControlNet of that family can be used for this task."""
        found = self.controlled.get(task)
        return found is not None and controlnet in (found.controlnets_of or self.controlnets_of)


def plain_cells(plain: str, *, strength: float = 0.8, sized_image_to_image: bool = True) -> dict[Task, Cell]:
    """Return the cells without ControlNets."""
    return {
        Task.TEXT_TO_IMAGE: Cell(pipeline=f"{plain}Pipeline"),
        Task.IMAGE_TO_IMAGE: Cell(
            pipeline=f"{plain}Img2ImgPipeline", image="image", takes_size=sized_image_to_image, strength=strength
        ),
        Task.INPAINTING: Cell(pipeline=f"{plain}InpaintPipeline", image="image", mask_image="mask_image", strength=1.0),
    }


def controlled_cells(prefix: str, *, text_image: str, strength: float) -> dict[Task, Cell]:
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


def only(task: Task, cells: Mapping[Task, Cell]) -> dict[Task, Cell]:
    """Return the cell of one task alone."""
    return {task: cells[task]}
