"""Distilled checkpoints paint as the pipelines of diffusers do, alone and in batches of mixed guidance."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sdpipeline.domain import GenerationRequest, Task
from sdpipeline.engine import GeneratedImage, PreparedRequest
from sdpipeline.engine.diffusers.engine import DiffusersEngine
from sdpipeline.engine.stepwise import Shortcuts, Stepwise
from tests.integration.distilled_checkpoints import distilled
from tests.integration.engine_requests import (
    SOURCE,
    controlnet,
    distance,
    engine,
    images,
    middle_mask,
    new_engine,
    noise,
    prepared,
    request,
)
from tests.integration.tiny_checkpoints import tiny_checkpoints

GUIDANCE = (8.0, 1.0, 0.0, 3.5)


@cache
def sharing() -> DiffusersEngine:
    """An engine whose ``fast`` profile shares calls and omits nothing."""
    return new_engine(shortcuts=Stepwise(profiles={"fast": Shortcuts()}))


def asked(name: str, n: int = 0, **changes: Any) -> GenerationRequest:
    given: dict[str, Any] = {"checkpoint": distilled(name), "prompt": f"a cat {n}", "seed": n}
    given |= {"num_inference_steps": 4, "scheduler": "lcm", "guidance_scale": 1.0}
    return replace(request(), **given | changes)


@cache
def stock_pipeline(name: str) -> tuple[Any, Any]:
    """Diffusers' own pipeline, and the configuration of the checkpoint's scheduler."""
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(tiny_checkpoints().directory(name))
    pipe.set_progress_bar_config(disable=True)
    return pipe, pipe.scheduler.config


def stock(name: str, made: GenerationRequest, scheduler: Any = None, **call: Any) -> np.ndarray[Any, Any]:
    """The picture of diffusers' own pipeline, 0 to 1."""
    pipe, config = stock_pipeline(name)
    pipe.scheduler = (scheduler or type(pipe.scheduler).from_config)(config)
    result = pipe(
        prompt=made.prompt,
        width=made.width,
        height=made.height,
        num_inference_steps=made.num_inference_steps,
        guidance_scale=made.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(made.seed),
        output_type="np",
        **call,
    )
    picture: np.ndarray[Any, Any] = result.images[0]
    return picture


def off(picture: GeneratedImage, expected: np.ndarray[Any, Any]) -> float:
    """The largest difference from a picture of 0 to 1, in grey levels."""
    return float(np.abs(picture.pixels.astype(float) - expected * 255).max())


def trailing(config: Any) -> Any:
    return diffusers.EulerDiscreteScheduler.from_config(config, timestep_spacing="trailing")


@pytest.mark.parametrize("name", ["lcm-sd1", "lcm-sdxl"])
@pytest.mark.parametrize("profile", ["exact", "fast"])
def test_embedded_guidance_is_each_pictures_own(name: str, profile: Any) -> None:
    requests = [asked(name, n, guidance_scale=scale, profile=profile) for n, scale in enumerate(GUIDANCE)]
    on = sharing() if profile == "fast" else engine()
    together = images(*map(prepared, requests), on=on)
    expected = [stock(name, each) for each in requests]
    assert max(off(one, other) for one, other in zip(together, expected, strict=True)) <= 1
    assert distance(together[0], images(prepared(replace(requests[0], guidance_scale=1.0)))[0]) > 8


def controlled(task: Task, n: int, profile: Any = "exact") -> PreparedRequest:
    control = (controlnet("controlnet-sd1", controlnet_conditioning_scale=0.5),)
    made = asked("lcm-sd1", n, task=task, controlnets=control, guidance_scale=GUIDANCE[n], profile=profile)
    given = {"image": noise(n), "mask_image": middle_mask()} if task is Task.INPAINTING else {"image": noise(n)}
    return prepared(replace(made, image=SOURCE), controlnets_0=noise(9), **given)


@pytest.mark.parametrize("task", [Task.IMAGE_TO_IMAGE, Task.INPAINTING])
def test_pipelines_that_do_not_pass_an_embedding_get_it_too(task: Task) -> None:
    together = images(*[controlled(task, n) for n in range(2)])
    shared = images(*[controlled(task, n, "fast") for n in range(2)], on=sharing())
    alone = [images(controlled(task, n))[0] for n in range(2)]
    assert max(distance(one, other) for one, other in zip(together, alone, strict=True)) <= 1
    assert max(distance(one, other) for one, other in zip(shared, alone, strict=True)) <= 1
    changed = controlled(task, 0)
    weaker = replace(changed, request=replace(changed.request, guidance_scale=1.0))
    assert distance(images(weaker)[0], alone[0]) > 8


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_turbo_paints_without_guidance_as_its_pipeline_does(steps: int) -> None:
    made = asked("turbo-sdxl", scheduler="euler-trailing", guidance_scale=0.0, num_inference_steps=steps)
    assert off(images(prepared(made))[0], stock("turbo-sdxl", made, trailing)) <= 1


@pytest.mark.parametrize("profile", ["exact", "fast"])
def test_guided_and_unguided_pictures_asked_together_come_out_as_alone(profile: Any) -> None:
    requests = [
        asked("turbo-sdxl", n, scheduler="euler-trailing", guidance_scale=scale, profile=profile)
        for n, scale in enumerate(GUIDANCE)
    ]
    together = images(*map(prepared, requests), on=sharing() if profile == "fast" else engine())
    expected = [stock("turbo-sdxl", each, trailing) for each in requests]
    assert max(off(one, other) for one, other in zip(together, expected, strict=True)) <= 1


def test_schnell_paints_as_its_pipeline_does_and_ignores_guidance() -> None:
    requests = [
        asked("schnell", n, scheduler="flow-match-euler", guidance_scale=scale) for n, scale in enumerate((0.0, 3.5))
    ]
    made = images(*map(prepared, requests))
    for one, each in zip(made, requests, strict=True):
        assert off(one, stock("schnell", replace(each, guidance_scale=0.0))) <= 1


SCHEDULERS = {
    "lcm": (diffusers.LCMScheduler.from_config, {}),
    "tcd": (diffusers.TCDScheduler.from_config, {"eta": 0.3}),
    "euler-trailing": (trailing, {}),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("profile", ["exact", "fast"])
def test_schedulers_of_few_steps_draw_each_pictures_own_noise(scheduler: str, profile: Any) -> None:
    requests = [
        replace(request(), prompt=f"a cat {n}", seed=n, num_inference_steps=4, guidance_scale=guidance)
        for n, guidance in enumerate((1.5, 2.0, 1.5))
    ]
    requests = [replace(each, scheduler=scheduler, profile=profile) for each in requests]
    made = images(*map(prepared, requests), on=sharing() if profile == "fast" else engine())
    stock_scheduler, call = SCHEDULERS[scheduler]
    expected = [stock("sd1", each, stock_scheduler, **call) for each in requests]
    assert max(off(one, other) for one, other in zip(made, expected, strict=True)) <= 1
    assert made[0].ran["scheduler"]["name"] == scheduler


def test_the_record_names_the_stochasticity_of_tcd() -> None:
    made = images(prepared(request(scheduler="tcd")))[0]
    assert made.ran["scheduler"]["eta"] == 0.3
    assert made.ran["scheduler"]["class"] == "TCDScheduler"
