"""Schedulers by their common names, and which of their options a name or a checkpoint decides.

A name means one thing on every checkpoint: its own options always win, and solver options of a checkpoint's
configuration are never copied. Options of the checkpoint's training come from its configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = tuple[str, Mapping[str, Any]]
"""diffusers class of a scheduler, and the options that its name sets."""

_PLAIN = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_KARRAS = _PLAIN | {"use_karras_sigmas": True}
_DPMPP_2M = {"algorithm_type": "dpmsolver++", "solver_order": 2}
_DPMPP_2M_SDE = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}

SCHEDULERS: Mapping[str, Row] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpmpp-2m": ("DPMSolverMultistepScheduler", _DPMPP_2M | _PLAIN),
    "dpmpp-2m-karras": ("DPMSolverMultistepScheduler", _DPMPP_2M | _KARRAS),
    "dpmpp-2m-sde": ("DPMSolverMultistepScheduler", _DPMPP_2M_SDE | _PLAIN),
    "euler": ("EulerDiscreteScheduler", _PLAIN),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "euler-karras": ("EulerDiscreteScheduler", _KARRAS),
    "euler-trailing": ("EulerDiscreteScheduler", _PLAIN | {"timestep_spacing": "trailing"}),
    "flow-match-euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", _PLAIN),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", _PLAIN),
}
"""Schedulers by their common names: diffusers class, and the options that the name sets, which always win."""

EDM_SCHEDULERS: Mapping[str, Row] = {
    "dpmpp-2m": ("EDMDPMSolverMultistepScheduler", _DPMPP_2M),
    "dpmpp-2m-karras": ("EDMDPMSolverMultistepScheduler", _DPMPP_2M | {"sigma_schedule": "karras"}),
    "dpmpp-2m-sde": ("EDMDPMSolverMultistepScheduler", _DPMPP_2M_SDE),
    "euler": ("EDMEulerScheduler", {}),
    "euler-karras": ("EDMEulerScheduler", {"sigma_schedule": "karras"}),
}
"""The same names on a checkpoint that was trained with EDM preconditioning (Karras et al. 2022), such as Playground
v2.5: only these classes scale the network's input and output as it was trained. ``sigma_schedule`` is the
checkpoint's own unless the name sets it."""

FLOW_SCHEDULERS = frozenset({"flow-match-euler"})
NOISE_SCHEDULERS = frozenset(SCHEDULERS) - FLOW_SCHEDULERS

FEW_STEPS = frozenset({"euler-trailing", "lcm", "tcd"})
"""Schedulers for distilled weights, which need a few steps only."""

ETA: Mapping[str, float] = {"tcd": 0.3}
"""Stochasticity that pipelines pass to a scheduler. They would pass 0, where TCD's authors and its scheduler use 0.3
(Zheng et al., Trajectory Consistency Distillation, arXiv 2402.19159; there it is called gamma)."""

NOISE_SCHEDULE = frozenset(
    {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"}
)
"""Options of the noise that a network was trained on. If a configuration leaves one out, it means the default of the
class that it names, which differs between classes."""

TRAINING_OPTIONS = NOISE_SCHEDULE | {
    # noise schedule and spacing of the steps
    "rescale_betas_zero_snr",
    "timestep_spacing",
    "steps_offset",
    "timestep_type",
    "set_alpha_to_one",
    "lambda_min_clipped",
    "sigma_min",
    "sigma_max",
    # range of the predicted picture
    "clip_sample",
    "clip_sample_range",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    # EDM preconditioning
    "sigma_data",
    "sigma_schedule",
    "rho",
    # consistency distillation
    "original_inference_steps",
    "timestep_scaling",
}
"""Options of noise schedulers that come from the checkpoint's own configuration."""

FLOW_OPTIONS = frozenset(
    {
        "num_train_timesteps",
        "shift",
        "shift_terminal",
        "use_dynamic_shifting",
        "time_shift_type",
        "base_shift",
        "max_shift",
        "base_image_seq_len",
        "max_image_seq_len",
        "invert_sigmas",
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
    }
)
"""Options of ``flow-match-euler`` that come from the checkpoint. There is one solver for these checkpoints, so its name
stands for the checkpoint's own schedule, sigmas included. ``stochastic_sampling`` is refused: it draws noise from
torch's global generator."""
