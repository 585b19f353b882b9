"""Checks of a request's parameters against its family: one function for each rule."""

from __future__ import annotations

from sdpipeline.domain import Profile, PromptSyntax, Task
from sdpipeline.engine.families.family import Family
from sdpipeline.engine.families.registry import FAMILIES
from sdpipeline.engine.families.schedulers import SCHEDULERS
from sdpipeline.engine.refusal import Refusal


def task_refusal(name: str, task: Task, *, controlnets: int = 0) -> Refusal | None:
    """Refuse a combination that cannot run, with the nearest one that can."""
    if name not in FAMILIES:
        message = f"family {name!r} cannot make pictures"
        return Refusal(key="task", message=message, fix=f"known families: {', '.join(FAMILIES)}")
    row = FAMILIES[name]
    if row.cell(task, controlnets=controlnets):
        return None
    message = f"{row.title} has no {task}{_with(controlnets)}"
    return Refusal(key="task", message=message, fix=f"nearest: {_nearest(row, task, controlnets)}")


def scheduler_refusal(row: Family, scheduler: str) -> Refusal | None:
    """Refuse a scheduler that this family cannot use."""
    if scheduler in row.schedulers:
        return None
    known = "" if scheduler in SCHEDULERS else " (unknown)"
    message = f"{row.title} cannot use scheduler {scheduler!r}{known}"
    return Refusal(key="scheduler", message=message, fix=f"use one of {', '.join(sorted(row.schedulers))}")


def profile_refusal(row: Family, profile: Profile) -> Refusal | None:
    """Refuse a profile that this family does not support."""
    if profile in row.profiles:
        return None
    message = f"{row.title} gains nothing from {profile!r}"
    return Refusal(key="profile", message=message, fix=f"use {' or '.join(row.profiles)}")


def prompt_syntax_refusal(row: Family, syntax: PromptSyntax) -> Refusal | None:
    """Refuse weighted prompts for a family with a text encoder for which we have no reference, or with none."""
    if syntax == "plain" or row.weighted_prompts:
        return None
    message = f"{row.title} does not take weighted prompts"
    return Refusal(key="prompt_syntax", message=message, fix="write prompt_syntax: plain")


def size_refusal(row: Family, side: str, pixels: int) -> Refusal | None:
    """Refuse a width or height (of the input, for super-resolution) that the family's latents cannot have."""
    multiple = row.size_multiple
    if pixels >= multiple and pixels % multiple == 0:
        return None
    near = max(multiple, round(pixels / multiple) * multiple)
    return Refusal(key=side, message=f"{pixels} is not a multiple of {multiple}", fix=f"write {near}")


def strength_refusal(strength: float, num_inference_steps: int) -> Refusal | None:
    """Refuse a strength that leaves no step to run, or is above 1."""
    if strength > 1:
        return Refusal(key="strength", message=f"{strength:g} is more than 1", fix="write at most 1")
    if strength > 0 and int(num_inference_steps * strength) >= 1:
        return None
    message = f"{strength:g} of {num_inference_steps} steps is less than one step"
    return Refusal(key="strength", message=message, fix="raise strength or num_inference_steps")


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
