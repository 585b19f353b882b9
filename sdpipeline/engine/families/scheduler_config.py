"""Scheduler of a request from its name and the checkpoint's own configuration, and its refusals, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sdpipeline.engine.families.family import Family
from sdpipeline.engine.families.schedulers import (
    EDM_SCHEDULERS,
    FLOW_OPTIONS,
    FLOW_SCHEDULERS,
    SCHEDULERS,
    TRAINING_OPTIONS,
    Row,
)
from sdpipeline.engine.refusal import Refusal

FILE = "scheduler/scheduler_config.json"
OwnConfig = Mapping[str, Any]
"""A checkpoint's scheduler configuration; ``_class_name`` is the class that model_index.json names."""

EDM_CLASSES = frozenset({"EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"})
FLOW_CLASSES = frozenset({"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"})
OTHER_NOISE = frozenset({"IPNDMScheduler"})
"""Classes with a noise schedule that no other class can compute."""

_COSINE = "squaredcos_cap_v2"
_STEPPED = frozenset({"DDIMScheduler", "DDPMScheduler"})
_DISTILLED = frozenset({"LCMScheduler", "TCDScheduler"})
_MULTISTEP = frozenset({"DPMSolverMultistepScheduler", "UniPCMultistepScheduler"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """Abilities of a diffusers class, as of 0.42. A test compares each with the class itself."""

    predictions: frozenset[str] = frozenset({"epsilon", "v_prediction", "sample"})
    schedules: frozenset[str] = frozenset({"linear", "scaled_linear", _COSINE})
    zero_snr: bool = True
    thresholding: bool = True
    continuous: bool = False


_EULER = Capability(
    predictions=frozenset({"epsilon", "v_prediction", "sample", "original_sample"}), thresholding=False, continuous=True
)
CAPABILITIES: Mapping[str, Capability] = {
    "DDIMScheduler": Capability(),
    "DDPMScheduler": Capability(schedules=frozenset({"linear", "scaled_linear", _COSINE, "sigmoid", "laplace"})),
    "DPMSolverMultistepScheduler": Capability(),
    "EDMDPMSolverMultistepScheduler": Capability(predictions=frozenset({"epsilon", "v_prediction"}), zero_snr=False),
    "EDMEulerScheduler": Capability(
        predictions=frozenset({"epsilon", "v_prediction"}), zero_snr=False, thresholding=False
    ),
    "EulerAncestralDiscreteScheduler": Capability(
        predictions=frozenset({"epsilon", "v_prediction"}), thresholding=False
    ),
    "EulerDiscreteScheduler": _EULER,
    "HeunDiscreteScheduler": Capability(
        schedules=frozenset({"linear", "scaled_linear", _COSINE, "exp"}), zero_snr=False, thresholding=False
    ),
    "LCMScheduler": Capability(),
    "TCDScheduler": Capability(),
    "UniPCMultistepScheduler": Capability(),
}

_NUMBERS = frozenset(
    {"beta_start", "beta_end", "clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "sigma_data"}
    | {"rho", "timestep_scaling", "shift", "base_shift", "max_shift"}
)
_WHOLE = frozenset(
    {"num_train_timesteps", "steps_offset", "original_inference_steps", "base_image_seq_len", "max_image_seq_len"}
)
_SPACINGS = ("leading", "linspace", "trailing")
_OTHER_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def row_of(name: str, own: OwnConfig) -> Row:
    """Return the class that a name stands for on this checkpoint, and the options that the name sets."""
    if own.get("_class_name") in EDM_CLASSES and name in EDM_SCHEDULERS:
        return EDM_SCHEDULERS[name]
    return SCHEDULERS[name]


def options_of(name: str, row: Family, own: OwnConfig) -> dict[str, Any]:
    """Return the options of a scheduler, without those that the class does not have.

    The name's options win over the checkpoint's, and those that the family's pipelines set in every scheduler win over
    both.
    """
    taken = FLOW_OPTIONS if name in FLOW_SCHEDULERS else TRAINING_OPTIONS
    trained = {key: value for key, value in own.items() if key in taken}
    return trained | dict(row_of(name, own)[1]) | dict(row.scheduler_config)


def refusal(
    row: Family, own: OwnConfig, name: str, num_inference_steps: int, *, controlnets: int = 0
) -> Refusal | None:
    """Refuse a scheduler that cannot do what this checkpoint's own configuration says, or not in so many steps.

    The name itself is one of the family's.
    """
    if name not in SCHEDULERS:
        return None
    return next(_refusals(row, own, name, num_inference_steps, controlnets), None)


def _refusals(row: Family, own: OwnConfig, name: str, steps: int, controlnets: int) -> Iterator[Refusal]:
    """Check one rule after the other; the later ones rely on those before."""
    yield from _wrong_values(own)
    flow = own.get("_class_name") in FLOW_CLASSES
    if name in FLOW_SCHEDULERS:
        if not flow and "_class_name" in own:
            message = f"{FILE} names {own['_class_name']}, but {row.title} needs a flow-matching scheduler"
            fix = "use a copy of the checkpoint whose file names FlowMatchEulerDiscreteScheduler with its shift"
            yield Refusal(key="checkpoint", message=message, fix=fix)
        yield from _flow(row, own, steps, controlnets)
    else:
        yield from _noise(row, own, name, steps)


def _wrong_values(own: OwnConfig) -> Iterator[Refusal]:
    """Refuse values of another type than the classes take."""
    for key, value in own.items():
        whole = type(value) is int and value >= 0
        if key in _WHOLE and not whole:
            yield _checkpoint(f"{FILE} has {key}: {value!r}, which is not a whole number")
        if key in _NUMBERS and type(value) not in (int, float):
            yield _checkpoint(f"{FILE} has {key}: {value!r}, which is not a number")
    if own.get("num_train_timesteps", 1000) < 1:
        yield _checkpoint(f"{FILE} has num_train_timesteps: 0")
    spacing = own.get("timestep_spacing", "leading")
    if spacing not in _SPACINGS:
        yield _checkpoint(f"{FILE} has timestep_spacing: {spacing!r}, which is not one of {', '.join(_SPACINGS)}")


def _flow(row: Family, own: OwnConfig, steps: int, controlnets: int) -> Iterator[Refusal]:
    if own.get("stochastic_sampling"):
        yield _checkpoint(f"{FILE} has stochastic_sampling: true, which draws noise that no seed repeats")
    if own.get("time_shift_type", "exponential") not in ("exponential", "linear"):
        yield _checkpoint(f"{FILE} has time_shift_type: {own['time_shift_type']!r}, not exponential or linear")
    if sum(bool(own.get(key)) for key in _OTHER_SIGMAS) > 1:
        yield _checkpoint(f"{FILE} has more than one of {', '.join(_OTHER_SIGMAS)}")
    if own.get("use_dynamic_shifting") and row.text == "sd3" and controlnets:
        message = f"{FILE} has use_dynamic_shifting: true, which the ControlNet pipelines of {row.title} do not support"
        yield Refusal(key="controlnets", message=message, fix="leave them out, or use a checkpoint with a fixed shift")
    if own.get("shift_terminal") and steps < 2:
        message = f"{steps} is too few: {FILE} has shift_terminal: {own['shift_terminal']}"
        yield Refusal(key="num_inference_steps", message=message, fix="write at least 2")


def _noise(row: Family, own: OwnConfig, name: str, steps: int) -> Iterator[Refusal]:
    own_class = own.get("_class_name", "")
    flow = [key for key in ("use_flow_sigmas", "use_dynamic_shifting") if own.get(key)]
    if own_class in FLOW_CLASSES or flow or own.get("prediction_type") == "flow_prediction":
        what = own_class if own_class in FLOW_CLASSES else f"{flow[0]}: true" if flow else "flow_prediction"
        yield _checkpoint(f"{FILE} says {what}, but the pipelines of {row.title} do not run flow matching")
    if str(own.get("variance_type")).startswith("learned"):
        yield _checkpoint(f"{FILE} has variance_type: {own['variance_type']}, but no scheduler here takes a variance")
    if own_class in OTHER_NOISE:
        yield _checkpoint(f"{FILE} names {own_class}, whose noise schedule no scheduler here has")
    if own_class in EDM_CLASSES and name not in EDM_SCHEDULERS:
        message = f"{name!r} has no EDM preconditioning, but {FILE} names {own_class}"
        yield Refusal(key="scheduler", message=message, fix=f"use one of {', '.join(sorted(EDM_SCHEDULERS))}")
    class_name, _ = row_of(name, own)
    options = options_of(name, row, own)
    yield from _abilities(row, own, name, CAPABILITIES[class_name], options)
    yield from _combinations(row, own, class_name, name, options)
    yield from _steps(class_name, name, options, steps)


def _abilities(
    row: Family, own: OwnConfig, name: str, capability: Capability, options: Mapping[str, Any]
) -> Iterator[Refusal]:
    """Refuse a class that lacks an ability, naming the schedulers that have it."""

    def refused(what: str, able: Any) -> Refusal:
        names = [each for each in sorted(row.schedulers & SCHEDULERS.keys()) if able(_capability(each, own))]
        fix = f"use one of {', '.join(names)}" if names else "use another checkpoint: no scheduler here can"
        return Refusal(key="scheduler", message=f"{name!r} cannot do {what}, as {FILE} says", fix=fix)

    prediction = options.get("prediction_type", "epsilon")
    if prediction not in capability.predictions:
        yield refused(f"prediction_type {prediction}", lambda each: prediction in each.predictions)
    schedule = options.get("beta_schedule", "linear")
    if options.get("trained_betas") is None and schedule not in capability.schedules:
        yield refused(f"beta_schedule {schedule}", lambda each: schedule in each.schedules)
    if options.get("rescale_betas_zero_snr") and not capability.zero_snr:
        yield refused("rescale_betas_zero_snr", lambda each: each.zero_snr)
    if options.get("thresholding") and not capability.thresholding:
        yield refused("thresholding", lambda each: each.thresholding)
    if options.get("timestep_type", "discrete") == "continuous" and not capability.continuous:
        yield refused("timestep_type continuous", lambda each: each.continuous)


def _capability(name: str, own: OwnConfig) -> Capability:
    return CAPABILITIES[row_of(name, own)[0]]


def _combinations(
    row: Family, own: OwnConfig, class_name: str, name: str, options: Mapping[str, Any]
) -> Iterator[Refusal]:
    """Refuse combinations of options for which a class fails, or computes values that are not finite."""
    cosine = options.get("beta_schedule") == _COSINE and options.get("trained_betas") is None
    spacing = options.get("timestep_spacing", "leading" if class_name in _STEPPED else "linspace")
    plain = "dpmpp-2m" if "dpmpp-2m" in row.schedulers else row.scheduler
    if cosine and class_name == "DPMSolverMultistepScheduler" and options.get("use_karras_sigmas"):
        message = f"{name!r} cannot use beta_schedule {_COSINE}, as {FILE} says"
        yield Refusal(key="scheduler", message=message, fix=f"use {plain}")
    if cosine and class_name == "EulerAncestralDiscreteScheduler" and spacing != "leading":
        message = f"{name!r} cannot use beta_schedule {_COSINE} with timestep_spacing {spacing}, as {FILE} says"
        yield Refusal(key="scheduler", message=message, fix=f"use {plain}")
    pure_noise = class_name in _DISTILLED or (class_name in _STEPPED and spacing != "leading")
    if (
        pure_noise
        and options.get("rescale_betas_zero_snr")
        and options.get("prediction_type", "epsilon") == "epsilon"
        and own.get("_class_name") not in EDM_CLASSES
    ):
        message = f"{name!r} divides by zero with rescale_betas_zero_snr and prediction_type epsilon, as {FILE} says"
        yield Refusal(key="scheduler", message=message, fix=f"use {plain}")


def _steps(class_name: str, name: str, options: Mapping[str, Any], steps: int) -> Iterator[Refusal]:
    trained = options.get("num_train_timesteps", 1000)
    most = trained
    if class_name in _DISTILLED:
        most = options.get("original_inference_steps", 50)
        if not 1 <= most <= trained:
            message = f"{name!r} needs original_inference_steps from 1 to {trained}, but {FILE} has {most}"
            yield Refusal(key="scheduler", message=message, fix="use euler")
    elif class_name in _MULTISTEP and options.get("timestep_spacing", "linspace") == "leading":
        most = trained - 1
    elif class_name in _STEPPED and options.get("timestep_spacing", "leading") == "leading":
        most = _most_leading(steps, trained, options.get("steps_offset", 0))
    elif class_name not in _STEPPED:
        return
    if steps > most:
        message = f"{steps} is more than {most}, the most that {name!r} takes with this checkpoint"
        yield Refusal(key="num_inference_steps", message=message, fix=f"write at most {most}")


def _most_leading(steps: int, trained: int, offset: int) -> int:
    """Return the most steps, at most ``steps``, whose first timestep is not beyond the last trained one."""
    return next((n for n in range(min(steps, trained), 0, -1) if (n - 1) * (trained // n) + offset < trained), 1)


def _checkpoint(message: str) -> Refusal:
    return Refusal(key="checkpoint", message=message, fix="use another checkpoint, or a copy with its file corrected")
