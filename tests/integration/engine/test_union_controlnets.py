"""Union ControlNets: one network for several kinds of control map, chosen by ``control_mode``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sdpipeline.domain import ControlNetInput, Task
from sdpipeline.engine import GeneratedImage, Pixels, PreparedRequest
from sdpipeline.engine.pixels import to_pil, to_pixels
from tests.integration.engine_requests import (
    SOURCE,
    controlnet,
    distance,
    equal,
    failure_of,
    images,
    middle_mask,
    new_engine,
    noise,
    prepared,
    request,
    results,
)
from tests.integration.tiny_checkpoints import tiny_checkpoints

PIPELINES = {
    ("sdxl", Task.TEXT_TO_IMAGE): "StableDiffusionXLControlNetUnionPipeline",
    ("sdxl", Task.IMAGE_TO_IMAGE): "StableDiffusionXLControlNetUnionImg2ImgPipeline",
    ("sdxl", Task.INPAINTING): "StableDiffusionXLControlNetUnionInpaintPipeline",
    ("flux", Task.TEXT_TO_IMAGE): "FluxControlNetPipeline",
    ("flux", Task.IMAGE_TO_IMAGE): "FluxControlNetImg2ImgPipeline",
    ("flux", Task.INPAINTING): "FluxControlNetInpaintPipeline",
}
SCHEDULERS = {"sdxl": "ddim", "flux": "flow-match-euler"}


def steered(family: str, task: Task, *uses: ControlNetInput, seed: int = 0, **changes: Any) -> PreparedRequest:
    """A request whose control maps are noise, other ones for each seed and ControlNet."""
    made = request(family, task=task, seed=seed, prompt=f"a cat {seed}", scheduler=SCHEDULERS[family], **changes)
    made = replace(made, controlnets=uses)
    given: dict[str, Pixels] = {f"controlnets_{n}": noise(10 * seed + n + 1) for n in range(len(uses))}
    if task is not Task.TEXT_TO_IMAGE:
        made = replace(made, image=SOURCE, strength=0.8)
        given["image"] = noise(10 * seed + 7)
    if task is Task.INPAINTING:
        given["mask_image"] = middle_mask()
        made = replace(made, mask_image=SOURCE)
    return prepared(made, **given)


def stock(family: str, given: PreparedRequest) -> Pixels:
    """The picture of diffusers' own call for this request, unmasked pixels included."""
    asked = given.request
    union: Any = {"sdxl": diffusers.ControlNetUnionModel, "flux": diffusers.FluxControlNetModel}[family]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a warning of diffusers about its own import
        network = union.from_pretrained(tiny_checkpoints().directory(f"union-{family}"))
    several = len(asked.controlnets) > 1
    base = diffusers.DiffusionPipeline.from_pretrained(tiny_checkpoints().directory(family))
    wrapped = [network] * len(asked.controlnets) if several and family == "flux" else network
    pipeline_class = getattr(diffusers, PIPELINES[family, asked.task])
    parts = {name: part for name, part in base.components.items() if part is not None}
    pipe = pipeline_class(**parts, controlnet=wrapped)
    pipe.set_progress_bar_config(disable=True)
    maps: Any = [to_pil(given.images[f"controlnets.{n}"]) for n in range(len(asked.controlnets))]
    modes: Any = [use.control_mode for use in asked.controlnets]
    scales: Any = [use.controlnet_conditioning_scale for use in asked.controlnets]
    if family == "flux" and not several:
        maps, modes, scales = maps[0], modes[0], scales[0]
    names = [name for name in ("image", "mask_image") if name in given.images]
    pictures: dict[str, Any] = {name: to_pil(given.images[name]) for name in names}
    if asked.task is not Task.TEXT_TO_IMAGE:
        pictures["strength"] = asked.strength
    made = pipe(
        asked.prompt,
        control_image=maps,
        control_mode=modes,
        controlnet_conditioning_scale=scales,
        control_guidance_start=0.0,
        control_guidance_end=1.0,
        num_inference_steps=asked.num_inference_steps,
        guidance_scale=asked.guidance_scale,
        width=64,
        height=64,
        generator=torch.Generator("cpu").manual_seed(asked.seed),
        output_type="np",
        **pictures,
    ).images[0]
    return to_pixels(made)


def apart(one: GeneratedImage, other: Pixels, *, inside: bool = False) -> int:
    """The largest difference; ``inside`` compares the repainted area only."""
    difference = np.abs(one.pixels.astype(int) - other.astype(int))
    return int((difference * (middle_mask() > 0) if inside else difference).max())


@pytest.mark.parametrize(("family", "task"), PIPELINES)
def test_a_union_is_steered_as_diffusers_does_alone_and_in_a_batch_with_others(family: str, task: Task) -> None:
    asked = [
        steered(
            family, task, controlnet(f"union-{family}", control_mode=2, controlnet_conditioning_scale=scale), seed=seed
        )
        for seed, scale in enumerate((0.7, 1.3))
    ]
    alone, together = images(asked[0], bucket=1)[0], images(*asked)
    assert together[0].ran["pipeline"] == PIPELINES[family, task]
    assert together[0].ran["controlnets"][0]["control_mode"] == 2
    for made in (alone, together[0]):
        assert apart(made, stock(family, asked[0]), inside=task is Task.INPAINTING) <= 1


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_the_mode_changes_the_picture_and_is_separate_in_a_batch(family: str) -> None:
    asked = [
        steered(
            family,
            Task.TEXT_TO_IMAGE,
            controlnet(f"union-{family}", control_mode=mode, controlnet_conditioning_scale=10.0),
        )
        for mode in (0, 3)
    ]
    together = images(*asked)
    assert not equal(*together)
    assert max(distance(made, images(one, bucket=1)[0]) for made, one in zip(together, asked, strict=True)) <= 1


def _two(family: str, scales: Sequence[float]) -> tuple[ControlNetInput, ...]:
    return tuple(
        controlnet(f"union-{family}", control_mode=mode, controlnet_conditioning_scale=scale)
        for mode, scale in zip((0, 3), scales, strict=True)
    )


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_two_modes_of_one_union_are_applied_as_diffusers_does_with_scales_of_each_picture(family: str) -> None:
    asked = [
        steered(family, Task.TEXT_TO_IMAGE, *_two(family, scales), seed=seed)
        for seed, scales in enumerate([(0.5, 1.2), (1.0, 0.3)])
    ]
    for made, one in zip(images(*asked), asked, strict=True):
        assert apart(made, stock(family, one)) <= 1


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_profiles_that_share_steps_use_unions_too(family: str) -> None:
    exact = [steered(family, Task.TEXT_TO_IMAGE, *_two(family, (0.5, 1.2))[:count], seed=count) for count in (1, 2)]
    for one in exact:
        fast = replace(one, request=replace(one.request, profile="fast", num_inference_steps=1))
        slow = replace(one, request=replace(one.request, num_inference_steps=1))
        assert distance(images(fast)[0], images(slow)[0]) <= 1


def test_a_mode_is_needed_by_a_union_and_refused_elsewhere() -> None:
    def refused(*uses: ControlNetInput) -> str:
        return failure_of(results(steered("sdxl", Task.TEXT_TO_IMAGE, *uses))[0])

    missing = refused(controlnet("union-sdxl"))
    assert (
        "controlnets.0.control_mode: 'union-sdxl' is a union ControlNet and needs it; write one of pose (0)" in missing
    )
    unknown = refused(controlnet("union-sdxl", control_mode=8))
    assert "8 is not a mode of 'union-sdxl', which has 8; write one of pose (0), " in unknown
    ordinary = controlnet("controlnet-sdxl", control_mode=0)
    assert "'controlnet-sdxl' is not a union ControlNet and has no modes; remove it" in refused(ordinary)
    together = refused(controlnet("union-sdxl", control_mode=0), controlnet("controlnet-sdxl"))
    assert "'union-sdxl' is a union ControlNet and does not run together with 'controlnet-sdxl'" in together
    twice = refused(controlnet("union-sdxl", control_mode=0), controlnet("union-sdxl", control_mode=0))
    assert "is used twice with the same control_mode" in twice


def test_a_union_that_was_registered_as_an_ordinary_controlnet_fails_its_jobs_by_name() -> None:
    files = tiny_checkpoints().files("union-flux")
    old = tiny_checkpoints().add(replace(files, alias="union-flux-old", family="flux", digest=files.digest))
    use = replace(controlnet("union-flux", control_mode=None), checkpoint=old)
    failed = failure_of(results(steered("flux", Task.TEXT_TO_IMAGE, use), on=new_engine())[0])
    assert "CheckpointError: checkpoint 'union-flux-old' is a union ControlNet, but an earlier release" in failed


def test_a_union_without_effect_of_its_scale_is_the_picture_without_it() -> None:
    none = controlnet("union-sdxl", control_mode=1, controlnet_conditioning_scale=0.0)
    plain = prepared(steered("sdxl", Task.TEXT_TO_IMAGE).request)
    assert distance(images(steered("sdxl", Task.TEXT_TO_IMAGE, none))[0], images(plain)[0]) <= 1
    assert not equal(
        images(steered("sdxl", Task.TEXT_TO_IMAGE, controlnet("union-sdxl", control_mode=1)))[0], images(plain)[0]
    )
