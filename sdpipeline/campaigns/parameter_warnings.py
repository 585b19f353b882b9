"""Warnings about parameters that are far from what a stage's weights were made for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from sdpipeline.campaigns.learned_defaults import LearnedDefaults
from sdpipeline.domain import Task
from sdpipeline.engine.families import FEW_STEPS

FEW = 4
"""Number of steps up to which only distilled weights make a finished picture."""
UNGUIDED = 2.0
"""Largest guidance scale of weights that are distilled without guidance."""
MOST, FEWEST = 2, 4
"""Steps are far from a default above its double and below its quarter."""
FAR_AREA = 2
"""An area is far from the native one from its half down and from its double up."""
FAR_ASPECT = 4
"""Largest ratio of the sides of pictures that networks are trained on."""


class Oddity(NamedTuple):
    """A parameter whose value is probably not meant, why, and the fix."""

    name: str
    message: str
    fix: str


def parameter_oddities(task: Task, fixed: Mapping[str, Any], learned: LearnedDefaults) -> Iterator[Oddity]:
    """Yield what is odd about the parameters of a stage; ``fixed`` are their resolved values."""
    if learned.row.text == "none":
        return
    checks = [_steps(task, fixed["num_inference_steps"], learned), _guidance(fixed["guidance_scale"], learned)]
    checks.append(_scheduler(fixed["scheduler"], learned))
    if task is not Task.SUPER_RESOLUTION:
        checks += [_aspect(fixed["width"], fixed["height"]), _area(fixed["width"], fixed["height"], learned)]
    yield from filter(None, checks)


def negative_prompt_oddity(guidance_scale: float, learned: LearnedDefaults) -> Oddity | None:
    """Return why a negative prompt has no effect at that guidance scale; None if it has one."""
    if learned.embedded_guidance:
        message = f"has no effect: {learned.files.alias!r} takes its guidance scale as an embedding"
        return Oddity("negative_prompt", message, "remove it")
    if guidance_scale > 1 or not learned.row.negative_prompt:
        return None
    message = f"has no effect at guidance_scale {guidance_scale:g}"
    return Oddity("negative_prompt", message, "remove it, or write a guidance_scale above 1")


def _steps(task: Task, steps: int, learned: LearnedDefaults) -> Oddity | None:
    name = "num_inference_steps"
    wanted = learned.expected.get(name)
    if wanted is not None:
        far = steps > max(wanted * MOST, FEW) or steps * FEWEST < wanted
        return _far(name, steps, learned) if far else None
    # An upscaler starts from a picture, so a few steps can be enough for it.
    if steps > FEW or task is Task.SUPER_RESOLUTION:
        return None
    message = f"{steps} is too few for {learned.files.alias!r}, unless its weights or a LoRA are distilled"
    fix = f"write {learned.row.num_inference_steps}, or register distilled weights with checkpoints add --defaults"
    return Oddity(name, message, f"{fix} {name}={steps}")


def _guidance(guidance_scale: float, learned: LearnedDefaults) -> Oddity | None:
    name = "guidance_scale"
    wanted = learned.expected.get(name)
    if wanted is None:
        return None
    if learned.row.text == "flux" and wanted == 0:
        message = f"{guidance_scale:g} has no effect: {learned.owners[name]!r} takes no guidance"
        return Oddity(name, message, "write 0, or leave it out") if guidance_scale > 1 else None
    if wanted <= UNGUIDED:
        return _far(name, guidance_scale, learned) if guidance_scale > UNGUIDED else None
    return None if wanted / 4 <= guidance_scale <= wanted * 2 else _far(name, guidance_scale, learned)


def _scheduler(scheduler: str, learned: LearnedDefaults) -> Oddity | None:
    wanted = learned.expected.get("scheduler")
    fits = wanted in (None, scheduler) or {wanted, scheduler} <= FEW_STEPS
    if wanted == "euler-trailing" and learned.trails:  # the checkpoint's own spacing applies to these, too
        fits = fits or scheduler in ("euler", "euler-ancestral")
    return None if fits else _far("scheduler", scheduler, learned)


def _aspect(width: int, height: int) -> Oddity | None:
    longer, shorter = max(width, height), min(width, height)
    if longer <= shorter * FAR_ASPECT:
        return None
    message = f"{width}x{height} has sides of {longer / shorter:.2g} to 1, and networks learn at most {FAR_ASPECT} to 1"
    return Oddity("width", message, f"write sides of at most {FAR_ASPECT} to 1, and crop the picture")


def _area(width: int, height: int, learned: LearnedDefaults) -> Oddity | None:
    area = learned.native_area
    if area is None or area / FAR_AREA < width * height < area * FAR_AREA:
        return None
    side = round(area**0.5)
    message = f"{width}x{height} is {width * height / area:.2g} times the area that {learned.files.alias!r} is made for"
    return Oddity("height", message, f"write about {side}x{side}, and resize the picture afterwards")


def _far(name: str, value: Any, learned: LearnedDefaults) -> Oddity:
    given, wanted = (f"{each:g}" if isinstance(each, float) else str(each) for each in (value, learned.expected[name]))
    message = f"{given} is far from {wanted}, for which {learned.owners[name]!r} is made"
    otherwise = "leave it out" if name in learned.values else "register the weights again with --defaults auto"
    return Oddity(name, message, f"write {wanted}, or {otherwise}")
