"""Tiny twins of distilled checkpoints: LCM with a guidance embedding, Turbo, schnell."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch

from sdpipeline.domain import CheckpointRef
from sdpipeline.engine.checkpoints import inspect
from tests.integration.tiny_checkpoints import tiny_checkpoints

TURBO_SCHEDULER = {
    "_class_name": "EulerAncestralDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}
"""The scheduler that SDXL-Turbo is published with."""
LCM_SCHEDULER = {
    "_class_name": "LCMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "original_inference_steps": 50,
    "steps_offset": 1,
    "timestep_scaling": 10.0,
}


@cache
def distilled(name: str) -> CheckpointRef:
    """A twin of a distilled checkpoint, known to the tests' engine; built once."""
    tiny = tiny_checkpoints()
    base, change = TWINS[name]
    directory = tiny.directory(base).parent / name
    shutil.copytree(tiny.directory(base), directory)
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        change(directory)
    return tiny.add(inspect(name, directory))


def with_scheduler(directory: Path, config: dict[str, Any]) -> None:
    """Replace the scheduler of a checkpoint folder."""
    index = directory / "model_index.json"
    named = json.loads(index.read_text()) | {"scheduler": ["diffusers", config["_class_name"]]}
    index.write_text(json.dumps(named))
    (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))


def _lcm(directory: Path) -> None:
    old: Any = diffusers.UNet2DConditionModel.from_pretrained(directory / "unet")
    new: Any = diffusers.UNet2DConditionModel.from_config(dict(old.config) | {"time_cond_proj_dim": 32})
    new.load_state_dict(old.state_dict(), strict=False)
    with torch.no_grad():  # otherwise a random network barely reacts to its guidance scale
        new.time_embedding.cond_proj.weight.mul_(10.0)
        for name, parameter in new.named_parameters():
            if "time_emb_proj.weight" in name or name.endswith("conv2.weight"):
                parameter.mul_(10.0)
    shutil.rmtree(directory / "unet")
    new.save_pretrained(directory / "unet")
    vae: Any = diffusers.AutoencoderKL.from_pretrained(directory / "vae")
    with torch.no_grad():  # more contrast, so that a wrong guidance scale shows in whole grey levels
        vae.decoder.conv_out.weight.mul_(8.0)
    vae.save_pretrained(directory / "vae")
    with_scheduler(directory, LCM_SCHEDULER)


def _schnell(directory: Path) -> None:
    old: Any = diffusers.FluxTransformer2DModel.from_pretrained(directory / "transformer")
    new: Any = diffusers.FluxTransformer2DModel.from_config(dict(old.config) | {"guidance_embeds": False})
    new.load_state_dict(old.state_dict(), strict=False)
    shutil.rmtree(directory / "transformer")
    new.save_pretrained(directory / "transformer")


TWINS: dict[str, tuple[str, Any]] = {
    "lcm-sd1": ("sd1", _lcm),
    "lcm-sdxl": ("sdxl", _lcm),
    "turbo-sdxl": ("sdxl", lambda directory: with_scheduler(directory, TURBO_SCHEDULER)),
    "schnell": ("flux", _schnell),
}
