"""Every cell of the family table makes pictures, and they equal those of diffusers itself."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sdpipeline.domain import GenerationRequest, Task
from sdpipeline.engine import Pixels, PreparedRequest
from sdpipeline.engine.families import FAMILIES
from sdpipeline.engine.pixels import to_pixels
from tests.integration.engine_requests import (
    controlnet,
    distance,
    failure_of,
    images,
    middle_mask,
    noise,
    prepared,
    request,
    results,
)
from tests.integration.tiny_checkpoints import tiny_checkpoints

CONTROLNETS = {
    "sd1": "controlnet-sd1",
    "sd2": "controlnet-sd2",
    "sd-inpaint": "controlnet-sd1",
    "sdxl": "controlnet-sdxl",
    "sdxl-inpaint": "controlnet-sdxl",
    "sd3": "controlnet-sd3",
    "flux": "controlnet-flux",
}
CELLS = [
    (name, task, controlnets)
    for name, row in FAMILIES.items()
    if name != "gan-upscale"
    for cells, numbers in ((row.plain, [0]), (row.controlled, [1, 2]))
    for task, cell in cells.items()
    for controlnets in numbers
    if controlnets <= cell.max_controlnets
]


def asked(name: str, task: Task, controlnets: int, n: int = 0) -> PreparedRequest:
    """A request for that cell, different for each n."""
    row = FAMILIES[name]
    controls = tuple(_control(name, task, 0.5 + n / 4) for _ in range(controlnets))
    changes: dict[str, Any] = {"seed": n, "prompt": f"a cat {n}", "guidance_scale": 3.0 + 2 * n}
    if row.negative_prompt and n:
        changes["negative_prompt"] = f"dog {n}"
    made = request(name, task=task, controlnets=controls, **changes)
    given: dict[str, Pixels] = {f"controlnets_{k}": noise(10 * n + k) for k in range(controlnets)}
    if task is not Task.TEXT_TO_IMAGE:
        given["image"] = noise(n, made.width)
        made = _with_image(made)
    if task is Task.INPAINTING:
        given["mask_image"] = middle_mask()
    return prepared(made, **given)


def _control(name: str, task: Task, scale: float) -> Any:
    inpainting = name == "sd3" and task is Task.INPAINTING
    used = "controlnet-sd3-inpaint" if inpainting else CONTROLNETS[name]
    return controlnet(used, controlnet_conditioning_scale=scale)


def _with_image(made: GenerationRequest) -> GenerationRequest:
    from dataclasses import replace

    from tests.integration.engine_requests import SOURCE

    return replace(made, image=SOURCE)


@pytest.mark.parametrize(("name", "task", "controlnets"), CELLS)
def test_a_cell_makes_each_picture_of_a_batch_as_it_makes_it_alone(name: str, task: Task, controlnets: int) -> None:
    requests = [asked(name, task, controlnets, n) for n in range(2)]
    together = images(*requests)
    alone = [images(one, bucket=1)[0] for one in requests]
    assert max(distance(one, other) for one, other in zip(together, alone, strict=True)) <= 1
    assert distance(*together) > 2
    scale = tiny_checkpoints().files(name).scale
    assert together[0].pixels.shape == (requests[0].request.height * scale, requests[0].request.width * scale, 3)
    cell = FAMILIES[name].cell(task, controlnets=controlnets)
    assert cell is not None
    assert together[0].ran["pipeline"] == cell.pipeline


@pytest.mark.parametrize("name", ["sd3", "flux", "sdxl"])
def test_a_controlled_cell_repeats_itself_bit_for_bit_whatever_the_global_generator_does(name: str) -> None:
    first = images(asked(name, Task.TEXT_TO_IMAGE, 1))[0]
    with torch.random.fork_rng():
        torch.manual_seed(12345)
        second = images(asked(name, Task.TEXT_TO_IMAGE, 1))[0]
    assert (first.pixels == second.pixels).all()


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sd3", "flux"])
def test_a_picture_is_the_one_that_diffusers_makes_from_the_prompt(name: str) -> None:
    made = images(prepared(request(name, prompt="a cat and a dog", scheduler=_own_scheduler(name))))[0]
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny_checkpoints().directory(name))
    pipe.set_progress_bar_config(disable=True)
    one = request(name)
    picture = pipe(
        "a cat and a dog",
        width=one.width,
        height=one.height,
        num_inference_steps=one.num_inference_steps,
        guidance_scale=one.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(one.seed),
        output_type="np",
    ).images[0]
    assert np.abs(made.pixels.astype(int) - to_pixels(picture).astype(int)).max() <= 1


def _own_scheduler(name: str) -> str:
    return "flow-match-euler" if name in ("sd3", "flux") else "ddim"


@pytest.mark.parametrize("name", ["upscale", "latent-upscale"])
def test_super_resolution_is_the_one_that_diffusers_makes(name: str) -> None:
    given = asked(name, Task.SUPER_RESOLUTION, 0)
    one = given.request
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny_checkpoints().directory(name))
    pipe.set_progress_bar_config(disable=True)
    from sdpipeline.engine.pixels import to_pil

    picture = pipe(
        one.prompt,
        image=to_pil(given.images["image"]),
        num_inference_steps=one.num_inference_steps,
        guidance_scale=one.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(one.seed),
        output_type="np",
    ).images[0]
    made = images(given)[0]
    assert np.abs(made.pixels.astype(int) - to_pixels(picture).astype(int)).max() <= 1


def test_sd3s_inpainting_controlnet_looks_at_the_picture_itself() -> None:
    given = asked("sd3", Task.INPAINTING, 1)
    from dataclasses import replace

    from sdpipeline.domain import ImageSource

    other = replace(given.request, image=ImageSource(digest="f" * 64))
    refused = results(PreparedRequest(request=other, images=given.images))[0]
    assert "controlnets.0: StableDiffusion3ControlNetInpaintingPipeline always uses the request's image" in failure_of(
        refused
    )


def test_flux_takes_no_negative_prompt() -> None:
    refused = results(prepared(request("flux", negative_prompt="dog")))[0]
    assert "negative_prompt: Flux does not take it; leave it out" in failure_of(refused)
