"""Schedulers by their common names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    "euler-trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "flow-match-euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""Schedulers by their common names: diffusers class, and overrides of the checkpoint's own config."""

FLOW_SCHEDULERS = frozenset({"flow-match-euler"})
NOISE_SCHEDULERS = frozenset(SCHEDULERS) - FLOW_SCHEDULERS

FEW_STEPS = frozenset({"euler-trailing", "lcm", "tcd"})
"""Schedulers for distilled weights, which need a few steps only."""

ETA: Mapping[str, float] = {"tcd": 0.3}
"""Stochasticity that pipelines pass to a scheduler. They would pass 0, where TCD's authors and its scheduler use 0.3
(Zheng et al., Trajectory Consistency Distillation, arXiv 2402.19159; there it is called gamma)."""
