"""Call batching in profiles other than exact: requests of different steps, strengths and guidance share network
calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from sdpipeline.domain import GenerationRequest, Task
from sdpipeline.engine import GeneratedImage, PreparedRequest
from sdpipeline.engine.diffusers.engine import DiffusersEngine
from sdpipeline.engine.stepwise import Shortcuts, Stepwise
from sdpipeline.engine.stepwise.call_batching import in_lockstep
from sdpipeline.engine.stepwise.stepwise_denoising import cuts
from tests.integration.engine.test_families import CELLS
from tests.integration.engine.test_families import asked as asked_for
from tests.integration.engine_requests import (
    SOURCE,
    controlnet,
    distance,
    equal,
    failure_of,
    image_of,
    new_engine,
    noise,
    prepared,
    request,
    results,
)
from tests.integration.engine_requests import images as images_of

STEPS_AND_GUIDANCE = [(2, 4.0), (6, 1.0), (3, 7.5), (4, 2.0)]


@cache
def sharing() -> DiffusersEngine:
    """An engine whose ``fast`` profile shares calls and omits nothing, so that its pictures are those of ``exact``."""
    return new_engine(shortcuts=Stepwise(profiles={"fast": Shortcuts()}))


def images(*asked: PreparedRequest, bucket: int | None = None) -> list[GeneratedImage]:
    return images_of(*asked, bucket=bucket, on=sharing())


OTHERS = {"sdxl": 1, "sd3": 1, "flux": 1, "sd-inpaint": 0, "upscale": 0}
"""Families besides SD 1.x; of each, the cells with this number of ControlNets are tested."""


def mixed(checkpoint: str = "sd1", **changes: Any) -> list[PreparedRequest]:
    return [
        prepared(
            request(
                checkpoint,
                **{
                    "prompt": f"a cat {n}",
                    "seed": n,
                    "num_inference_steps": steps,
                    "guidance_scale": guidance,
                    "profile": "fast",
                }
                | changes,
            )
        )
        for n, (steps, guidance) in enumerate(STEPS_AND_GUIDANCE)
    ]


def repainted(strength: float, n: int) -> PreparedRequest:
    asked = request(task=Task.IMAGE_TO_IMAGE, image=SOURCE, strength=strength, seed=n, num_inference_steps=4)
    return prepared(replace(asked, profile="fast"), image=noise(n))


def exact(given: PreparedRequest) -> PreparedRequest:
    return replace(given, request=replace(given.request, profile="exact"))


def again(given: PreparedRequest, made: GeneratedImage) -> GeneratedImage:
    """The picture reproduced alone from its record."""
    return images(replace(given, calls=made.ran["calls"]), bucket=made.ran["bucket"])[0]


@contextmanager
def calls_of_the_unet(asked: GenerationRequest) -> Iterator[list[int]]:
    """The number of rows of every call that runs in the block."""
    images(prepared(replace(asked, num_inference_steps=1)))
    rows = list[int]()
    first_layer = sharing().residency.get(asked.checkpoint).parts["unet"].conv_in
    handle = first_layer.register_forward_pre_hook(lambda _module, inputs: rows.append(len(inputs[0])))
    try:
        yield rows
    finally:
        handle.remove()


def test_pictures_of_different_steps_and_guidance_share_the_calls_of_the_longest() -> None:
    asked = mixed()
    with calls_of_the_unet(request()) as rows:
        made = images(*asked)
    assert rows == [8, 8, 4, 1, 4, 1, 1]  # 7 calls instead of 15
    assert made[1].ran["calls"] == [[8, 2], [1, 1], [4, 1], [1, 2]]
    assert max(distance(one, images(exact(each))[0]) for one, each in zip(made, asked, strict=True)) <= 1


def test_strengths_share_calls_too() -> None:
    asked = [repainted(strength, n) for n, strength in enumerate((0.3, 0.5, 0.8, 1.0))]
    with calls_of_the_unet(request()) as rows:
        made = images(*asked)
    assert len(rows) < 1 + 2 + 3 + 4
    assert max(distance(one, images(exact(each))[0]) for one, each in zip(made, asked, strict=True)) <= 1


def test_pictures_without_guidance_take_one_row_each() -> None:
    asked = mixed(guidance_scale=1.0, num_inference_steps=3)
    with calls_of_the_unet(request()) as rows:
        images(*asked)
    assert rows == [4, 4, 4]


@pytest.mark.parametrize("scheduler", ["ddpm", "euler-ancestral", "dpmpp-2m-sde", "heun", "unipc", "lcm"])
def test_each_picture_keeps_its_own_scheduler_and_noise(scheduler: str) -> None:
    asked = mixed(scheduler=scheduler)
    asked[3] = replace(asked[3], request=replace(asked[3].request, scheduler="euler"))
    made = images(*asked)
    assert [each.ran["scheduler"]["name"] for each in made] == [scheduler] * 3 + ["euler"]
    assert max(distance(one, images(exact(each))[0]) for one, each in zip(made, asked, strict=True)) <= 1


@pytest.mark.parametrize("checkpoint", ["sd1", "sdxl", "sd3", "flux"])
def test_a_picture_is_made_again_alone_bit_by_bit_from_its_recorded_calls(checkpoint: str) -> None:
    asked = mixed(checkpoint)
    for given, made in zip(asked, images(*asked), strict=True):
        repeated = again(given, made)
        assert equal(repeated, made)
        assert repeated.ran["calls"] == made.ran["calls"]


def test_a_repainted_picture_is_made_again_bit_by_bit() -> None:
    asked = [repainted(strength, n) for n, strength in enumerate((0.3, 0.5, 1.0))]
    assert all(equal(again(given, made), made) for given, made in zip(asked, images(*asked), strict=True))


@pytest.mark.parametrize(
    ("name", "task", "controlnets"),
    [cell for cell in CELLS if cell[0] == "sd1" or (cell[0] in OTHERS and cell[2] == OTHERS[cell[0]])],
)
def test_every_cell_makes_in_lockstep_what_it_makes_otherwise(name: str, task: Task, controlnets: int) -> None:
    asked = [asked_for(name, task, controlnets, n) for n in range(2)]
    fast = [replace(each, request=replace(each.request, profile="fast")) for each in asked]
    pairs = zip(images(*fast), images(*asked), strict=True)
    assert max(distance(one, other) for one, other in pairs) <= 1


def test_ranges_of_steps_of_a_controlnet_may_differ() -> None:
    def ranged(end: float, n: int) -> PreparedRequest:
        use = controlnet("controlnet-sd1", control_guidance_end=end, controlnet_conditioning_scale=0.5 + n / 2)
        return prepared(request(seed=n, controlnets=(use,), profile="fast"), controlnets_0=noise(n))

    asked = [ranged(end, n) for n, end in enumerate((1.0, 0.3))]
    made = images(*asked)
    assert max(distance(one, images(exact(each))[0]) for one, each in zip(made, asked, strict=True)) <= 1


def test_a_picture_that_fails_in_lockstep_fails_alone_and_leaves_the_networks_as_they_were() -> None:
    images(*mixed())
    unet = sharing().residency.get(request().checkpoint).parts["unet"]

    asked = mixed()
    broken = prepared(replace(asked[2].request, prompt="no cat at all " * 40))
    handle = unet.register_forward_pre_hook(_refuses_long_prompts, with_kwargs=True)
    made = results(*asked[:2], broken, asked[3], on=sharing())
    handle.remove()
    assert "RequestRefusedError: the pipeline refused it: ValueError: long" in failure_of(made[2])
    for n in (0, 1, 3):
        assert distance(image_of(made[n]), images(exact(asked[n]))[0]) <= 1
    assert "forward" not in vars(unet)


def _refuses_long_prompts(_module: Any, _inputs: Any, keywords: Any) -> None:
    if keywords["encoder_hidden_states"].shape[1] > 77:
        raise ValueError("long")


def test_bodies_that_are_halted_are_ended_when_another_fails() -> None:
    network, ended = torch.nn.Linear(1, 1), list[str]()

    def halts() -> None:
        try:
            network(torch.ones(1, 1))
        finally:
            ended.append("halted")

    def fails() -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        in_lockstep([halts, fails], [network], lambda _: {})
    assert ended == ["halted"]
    assert "forward" not in vars(network)


@pytest.mark.parametrize(
    ("rows", "together"),
    [
        ([2], [1]),
        ([2, 1], [2]),  # four rows, one of padding
        ([2, 2, 1], [2, 1]),  # four and one instead of eight
        ([2, 2, 2, 1], [4]),  # eight, one of padding
        ([2, 2, 2, 2], [4]),
        ([2, 2, 2, 2, 2, 2], [4, 2]),  # eight and four instead of sixteen
        ([2, 2, 2, 2, 2, 2, 1], [7]),  # sixteen, three of padding
    ],
)
def test_calls_are_cut_where_padding_would_take_more_than_a_quarter(rows: list[int], together: list[int]) -> None:
    assert cuts(rows) == together


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"reproducibility": "strict"}, "profile: 'fast' is not strict; use profile exact, or another reproducibility"),
        ({"checkpoint": "latent-upscale", "task": Task.SUPER_RESOLUTION}, "gains nothing from 'fast'; use exact"),
    ],
)
def test_what_a_profile_cannot_hold_for_is_refused(changes: dict[str, Any], refusal: str) -> None:
    made = results(prepared(request(**changes, profile="fast")))[0]
    assert refusal in failure_of(made)
