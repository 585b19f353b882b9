"""Defaults of distilled checkpoints, which need few steps and little or no guidance: detected, or presets by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdpipeline.engine.checkpoint_config import read
from sdpipeline.engine.families import FAMILIES, SCHEDULERS, Family

Defaults = Mapping[str, Any]
"""Generation parameters by diffusers' names, such as ``{"num_inference_steps": 4, "guidance_scale": 0.0}``."""


def _few_steps(num_inference_steps: int, guidance_scale: float, scheduler: str | None = None) -> Defaults:
    found: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    return found | ({"scheduler": scheduler} if scheduler else {})


PRESETS: Mapping[str, Defaults] = {
    "turbo": _few_steps(4, 0.0, "euler-trailing"),
    "lcm": _few_steps(4, 1.0, "lcm"),
    "tcd": _few_steps(4, 0.0, "tcd"),
    "schnell": _few_steps(4, 0.0),
    **{f"lightning-{steps}": _few_steps(steps, 0.0, "euler-trailing") for steps in (2, 4, 8)},
    # Hyper-SD's authors use DDIM with trailing timesteps, whose steps are those of Euler.
    **{f"hyper-{steps}": _few_steps(steps, 0.0, "euler-trailing") for steps in (2, 4, 8)},
}
"""Defaults that the authors of distilled weights recommend, by the names under which people know the weights."""

LCM_WITH_GUIDANCE_EMBEDDING = _few_steps(4, 8.0, "lcm")
"""Defaults of a whole latent consistency U-Net, which takes its guidance scale as an embedding."""

SCHEDULER = "scheduler/scheduler_config.json"
_EULER = frozenset({"EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"})


def detected_defaults(directory: Path, kind: str, family: str) -> Defaults:
    """Return the defaults of a distilled checkpoint as its configurations show them; empty for any other weights.

    SD-Turbo and SDXL-Turbo are published with an Euler scheduler of trailing timesteps; ordinary checkpoints use these
    for zero terminal SNR only. Flux schnell has no ``guidance_embeds``. A latent consistency model has a scheduler of
    its own, and its U-Net a ``time_cond_proj_dim``. Merged U-Nets of Lightning, Hyper or LCM LoRAs, SD 3.5 Turbo and
    all LoRAs have ordinary configurations: their defaults have to be given.
    """
    if kind != "checkpoint" or family not in FAMILIES:
        return {}
    if family == "flux":
        embeds = read(directory, "transformer/config.json").get("guidance_embeds", False)
        return {} if embeds else PRESETS["schnell"]
    if not (directory / "unet").is_dir():
        return {}
    found = _of_unet(directory, FAMILIES[family])
    return found if found.get("scheduler") in FAMILIES[family].schedulers else {}


def _of_unet(directory: Path, row: Family) -> Defaults:
    if row.guidance_embedding and _guidance_width(directory) is not None:
        return LCM_WITH_GUIDANCE_EMBEDDING
    scheduler = read(directory, SCHEDULER)
    name = scheduler.get("_class_name")
    for preset in ("lcm", "tcd"):
        if name == SCHEDULERS[preset][0]:
            return PRESETS[preset]
    plain = scheduler.get("prediction_type", "epsilon") == "epsilon" and not scheduler.get("rescale_betas_zero_snr")
    return PRESETS["turbo"] if name in _EULER and plain and trails(directory) else {}


def embeds_guidance(directory: Path, row: Family) -> bool:
    """Return True if the U-Net takes its guidance scale as an embedding; False if its files are on another machine."""
    return row.guidance_embedding and _guidance_width(directory) is not None


def trails(directory: Path) -> bool:
    """Return True if the checkpoint's own scheduler has trailing timesteps, as ``euler`` then has here too."""
    return read(directory, SCHEDULER).get("timestep_spacing") == "trailing"


def fitting(defaults: Defaults, row: Family) -> Defaults:
    """Return those of the defaults that this family takes."""
    return {
        name: value
        for name, value in defaults.items()
        if (name != "scheduler" or value in row.schedulers) and (name != "clip_skip" or row.clip_skip)
    }


def shown(defaults: Defaults) -> str:
    """Return defaults as ``checkpoints add --defaults`` takes them, one space between them."""
    return " ".join(f"{name}={_text(value)}" for name, value in defaults.items())


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _guidance_width(directory: Path) -> Any:
    return read(directory, "unet/config.json").get("time_cond_proj_dim")
