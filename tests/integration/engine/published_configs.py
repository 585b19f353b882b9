"""Variants of the tiny checkpoints with configurations as public checkpoints publish them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch

from sdpipeline.engine.checkpoints import inspect
from tests.integration.tiny_checkpoints import tiny_checkpoints

Files = Mapping[str, Mapping[str, Any]]

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SDXL_BASE = BETAS | {
    "_class_name": "EulerDiscreteScheduler",
    "clip_sample": False,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
"""stabilityai/stable-diffusion-xl-base-1.0."""
SD15 = BETAS | {
    "_class_name": "PNDMScheduler",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
"""stable-diffusion-v1-5/stable-diffusion-v1-5."""
SD21 = SD15 | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
"""stabilityai/stable-diffusion-2-1."""
ZERO_SNR = SD21 | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
"""ptx0/pseudo-journey-v2, as the authors of zero terminal SNR advise (arXiv 2305.08891)."""
V_ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
NOOBAI_V = SDXL_BASE | V_ZERO_SNR
"""Laxhar/noobai-XL-Vpred-1.0."""
SDXL_TURBO = SDXL_BASE | {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
"""stabilityai/sdxl-turbo."""
LIGHTNING = SDXL_BASE | {"timestep_spacing": "trailing"}
"""ByteDance/SDXL-Lightning, as its page advises; stabilityai/sd-turbo has the same."""
LCM = BETAS | {
    "_class_name": "LCMScheduler",
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "original_inference_steps": 50,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "thresholding": False,
    "timestep_scaling": 10.0,
    "timestep_spacing": "leading",
    "trained_betas": None,
}
"""SimianLuo/LCM_Dreamshaper_v7."""
PLAYGROUND = {
    "_class_name": "EDMDPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "dynamic_thresholding_ratio": 0.995,
    "euler_at_final": False,
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rho": 7.0,
    "sample_max_value": 1.0,
    "sigma_data": 0.5,
    "sigma_max": 80.0,
    "sigma_min": 0.002,
    "solver_order": 2,
    "solver_type": "midpoint",
    "thresholding": False,
}
"""playgroundai/playground-v2.5-1024px-aesthetic."""
PLAYGROUND_VAE = {
    "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
    "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
    "scaling_factor": 0.5,
}
COSXL = {
    "_class_name": "EDMEulerScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rho": 7.0,
    "sigma_data": 1.0,
    "sigma_max": 120.0,
    "sigma_min": 0.002,
    "sigma_schedule": "exponential",
}
"""stabilityai/cosxl."""
LEAKY_DPM = SD15 | {
    "_class_name": "DPMSolverMultistepScheduler",
    "algorithm_type": "sde-dpmsolver++",
    "solver_order": 3,
    "solver_type": "heun",
    "use_karras_sigmas": True,
    "final_sigmas_type": "zero",
    "lower_order_final": False,
}
"""A sampler that the author of a fine-tune liked, saved with the weights."""
KARRAS = SDXL_BASE | {"use_karras_sigmas": True}
"""RunDiffusion/Juggernaut-XL-v9 and many others."""
SD3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
"""stabilityai/stable-diffusion-3-medium-diffusers."""
FLUX_DEV = SD3 | {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "use_dynamic_shifting": True,
}
"""black-forest-labs/FLUX.1-dev."""
FLUX_SCHNELL = FLUX_DEV | {"shift": 1.0, "use_dynamic_shifting": False}
"""black-forest-labs/FLUX.1-schnell."""
UPSCALER = SD21 | {"beta_start": 0.0001, "beta_end": 0.02, "set_alpha_to_one": False}
"""stabilityai/stable-diffusion-x4-upscaler."""
LATENT_UPSCALER = SDXL_BASE | {"prediction_type": "sample", "timestep_spacing": "linspace"}
"""stabilityai/sd-x2-latent-upscaler."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A tiny checkpoint with some configurations replaced, and the stock pipeline's scheduler for the same name.

    ``stock`` is a class and the options that its documentation passes to ``from_config``; ``None`` is the scheduler
    that the checkpoint names, untouched. ``parts`` are networks with random weights of another configuration.
    """

    base: str
    config: Mapping[str, Any]
    scheduler: str
    stock: tuple[str, Mapping[str, Any]] | None = None
    files: Files = field(default_factory=dict)
    parts: Files = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)


def twin(name: str, variant: Variant, root: Path) -> Path:
    """Copy a tiny checkpoint by links, with its scheduler replaced and keys of other configurations changed."""
    directory = root / name
    shutil.copytree(tiny_checkpoints().directory(variant.base), directory, copy_function=os.link)
    index = _document(directory / "model_index.json")
    _write(directory / "scheduler" / "scheduler_config.json", variant.config)
    _write(directory / "model_index.json", index | {"scheduler": ["diffusers", variant.config["_class_name"]]})
    for file, changes in variant.files.items():
        _write(directory / file, _document(directory / file) | dict(changes))
    for part, changes in variant.parts.items():
        _rebuild(directory / part, changes)
    return directory


def _rebuild(directory: Path, changes: Mapping[str, Any]) -> None:
    config = _document(directory / "config.json") | dict(changes)
    shutil.rmtree(directory)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: Any = getattr(diffusers, config["_class_name"]).from_config(config)
    network.save_pretrained(directory)


def registered(name: str, directory: Path) -> str:
    """Register a variant with the shared engine, and return its alias."""
    tiny_checkpoints().add(inspect(name, directory))
    return name


def _document(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def _write(path: Path, document: Mapping[str, Any]) -> None:
    path.unlink()  # it is a link to the file of the original
    path.write_text(json.dumps(document), encoding="utf-8")
