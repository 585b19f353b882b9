"""Failures in a batch affect only the request that caused them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from sdpipeline.domain import Task
from sdpipeline.engine import GenerationFailure, PreparedRequest
from sdpipeline.engine.diffusers.engine import DiffusersEngine
from tests.integration.engine_requests import (
    controlnet,
    distance,
    engine,
    equal,
    failure_of,
    image_of,
    images,
    middle_mask,
    new_engine,
    noise,
    prepared,
    request,
    results,
)


def eight() -> list[PreparedRequest]:
    return [prepared(request(prompt=f"a cat {n}", seed=n, guidance_scale=2.0 + n)) for n in range(8)]


@contextmanager
def before_each_step(on: DiffusersEngine, hook: Any, checkpoint: str = "sd1") -> Iterator[None]:
    """Run ``hook(latents, prompts)`` before the U-Net; it may raise, or return other latents."""
    images(prepared(request(checkpoint)), on=on)
    unet = on.residency.get(request(checkpoint).checkpoint).parts["unet"]

    def call(_module: Any, inputs: Any, keywords: dict[str, Any]) -> Any:
        changed = hook(inputs[0], keywords["encoder_hidden_states"])
        return ((inputs[0] if changed is None else changed, *inputs[1:]), keywords)

    handle = unet.register_forward_pre_hook(call, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def marked(on: DiffusersEngine, poison: PreparedRequest) -> Any:
    """A function that finds the rows of a batch whose prompt is the poisonous one."""
    seen: list[torch.Tensor] = []
    with before_each_step(on, lambda _, prompts: seen.append(prompts[-1].clone())):
        images(poison, on=on)
    return lambda prompts: [n for n, prompt in enumerate(prompts) if torch.equal(prompt, seen[0])]


def test_a_poison_request_among_eight_fails_alone_and_its_neighbours_keep_their_bits() -> None:
    undisturbed = images(*eight())
    find = marked(engine(), eight()[3])

    def refuse(_: torch.Tensor, prompts: torch.Tensor) -> None:
        if find(prompts):
            raise ValueError("a poisonous prompt")

    with before_each_step(engine(), refuse):
        made = results(*eight())
    assert failure_of(made[3]) == "RequestRefusedError: the pipeline refused it: ValueError: a poisonous prompt"
    assert all(equal(image_of(made[n]), undisturbed[n]) for n in range(8) if n != 3)


def test_latents_that_are_not_finite_fail_their_own_picture_only() -> None:
    undisturbed = images(*eight())
    find = marked(engine(), eight()[5])

    def spoil(latents: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        latents = latents.clone()
        for n in find(prompts):
            latents[n] = torch.nan
        return latents

    with before_each_step(engine(), spoil):
        made = results(*eight())
    assert failure_of(made[5]) == "BadPictureError: the engine's picture is refused: its latents are not finite"
    assert all(equal(image_of(made[n]), undisturbed[n]) for n in range(8) if n != 5)


def too_many(limit: int) -> Any:
    def refuse(latents: torch.Tensor, _: torch.Tensor) -> None:
        if latents.shape[0] > 2 * limit:
            raise torch.OutOfMemoryError("injected")

    return refuse


def test_out_of_memory_at_eight_makes_every_picture_in_smaller_buckets() -> None:
    on = new_engine()
    with before_each_step(on, too_many(2)):
        made = images(*eight(), on=on)
    capped = [image for n in range(0, 8, 2) for image in images(*eight()[n : n + 2], bucket=2)]
    assert all(equal(image, other) for image, other in zip(made, capped, strict=True))
    assert {image.ran["bucket"] for image in made} == {2}
    assert made[0].ran["fallbacks"] == ["bucket 2 instead of 8: out of memory"]


def test_what_the_device_can_take_is_remembered_for_the_next_batch() -> None:
    on = new_engine()
    calls: list[int] = []

    def refuse(latents: torch.Tensor, prompts: torch.Tensor) -> None:
        calls.append(latents.shape[0])
        too_many(4)(latents, prompts)

    with before_each_step(on, refuse):
        images(*eight(), on=on)
        calls.clear()
        images(*eight(), on=on)
    assert max(calls) == 8  # four pictures, each with and without its prompt


@pytest.mark.long
def test_out_of_memory_for_one_picture_fails_that_job_alone_as_worth_another_try() -> None:
    on = new_engine()
    with before_each_step(on, too_many(0)):
        made = results(prepared(request()), prepared(request(seed=1)), on=on)
    assert all(failure_of(result).startswith("DeviceExhaustedError: out of memory for one picture") for result in made)
    assert equal(images(prepared(request()), on=on)[0], images(prepared(request()))[0])


@pytest.mark.parametrize(("failures", "fallbacks"), [(1, ["VAE tiling"]), (2, ["VAE tiling", "offload"])])
def test_tiling_and_offload_are_tried_before_giving_up_and_named_in_the_record(
    failures: int, fallbacks: list[str]
) -> None:
    on = new_engine()
    refused: list[torch.Size] = []

    def at_first(latents: torch.Tensor, _: torch.Tensor) -> None:
        if len(refused) < failures:
            refused.append(latents.shape)
            raise torch.OutOfMemoryError("injected")

    with before_each_step(on, at_first):
        made = images(prepared(request()), on=on)
    assert made[0].ran["fallbacks"] == fallbacks
    assert distance(made[0], images(prepared(request()))[0]) <= 1


def test_a_picture_that_half_precision_spoils_is_decoded_once_more_in_float32() -> None:
    on = new_engine(dtype="bfloat16")
    images(prepared(request()), on=on)
    vae = on.residency.get(request().checkpoint).parts["vae"]

    def overflow(_module: Any, _inputs: Any, decoded: torch.Tensor) -> torch.Tensor:
        return decoded if decoded.dtype == torch.float32 else decoded * torch.nan

    vae.decoder.register_forward_hook(overflow)
    made = images(prepared(request()), on=on)[0]
    assert (made.ran["dtype"], made.ran["fallbacks"]) == ("bfloat16", ["float32 decode"])
    assert vae.dtype == torch.bfloat16


def test_an_error_that_no_request_can_cause_ends_the_process() -> None:
    def crash(_: torch.Tensor, __: torch.Tensor) -> None:
        raise KeyError("a bug")

    with before_each_step(engine(), crash), pytest.raises(KeyError):
        results(prepared(request()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 100}, "width: 100 is not a multiple of 8; write 96"),
        ({"scheduler": "flow-match-euler"}, "Stable Diffusion 1.x cannot use scheduler 'flow-match-euler'"),
        ({"num_inference_steps": 0}, "num_inference_steps: must be at least 1"),
        ({"strength": 0.5}, "strength: text-to-image through StableDiffusionPipeline does not take it"),
        ({"task": Task.IMAGE_TO_IMAGE, "strength": 0.1}, "strength: 0.1 of 3 steps is less than one step"),
        (
            {"task": Task.SUPER_RESOLUTION},
            "Stable Diffusion 1.x has no super-resolution; nearest: super-resolution with",
        ),
        ({"task": Task.IMAGE_TO_IMAGE}, "image: image-to-image needs this picture"),
        ({"noise_level": 3}, "noise_level: Stable Diffusion 1.x does not take it"),
        ({"clip_skip": 0}, "clip_skip: must be at least 1"),
    ],
)
def test_what_a_family_cannot_do_is_refused_with_field_and_fix(changes: dict[str, Any], message: str) -> None:
    assert message in failure_of(results(prepared(request(**changes)))[0])


def test_a_refused_request_does_not_touch_its_neighbour() -> None:
    made = results(prepared(request(width=100)), prepared(request(seed=4)), bucket=2)
    assert isinstance(made[0], GenerationFailure)
    assert equal(image_of(made[1]), images(prepared(request(seed=4)), bucket=2)[0])


def test_a_picture_of_another_size_is_refused_unless_the_request_says_how_to_resize() -> None:
    asked = request(task=Task.IMAGE_TO_IMAGE)
    refused = results(prepared(asked, image=noise(size=80)))[0]
    assert failure_of(refused).startswith("InputImageError: image: the input is 80x80, not 64x64; set resize:")
    resized = images(prepared(request(task=Task.IMAGE_TO_IMAGE, resize="crop"), image=noise(size=80)))[0]
    assert resized.pixels.shape == (64, 64, 3)
    assert resized.ran["resize"] == "crop"


def test_a_control_picture_of_another_size_is_refused_too() -> None:
    asked = request(controlnets=(controlnet("controlnet-sd1"),))
    refused = results(prepared(asked, controlnets_0=noise(size=80)))[0]
    assert "InputImageError: controlnets.0: the input is 80x80" in failure_of(refused)


def test_an_empty_mask_is_refused() -> None:
    asked = prepared(request(task=Task.INPAINTING), image=noise(), mask_image=np.zeros((64, 64, 3), np.uint8))
    assert "mask_image: nothing is white" in failure_of(results(asked)[0])


def test_a_controlnet_of_another_family_is_refused() -> None:
    asked = request(controlnets=(controlnet("controlnet-sdxl"),))
    assert "is for sdxl and cannot steer" in failure_of(results(prepared(asked, controlnets_0=noise()))[0])


def test_a_nine_channel_checkpoint_paints_into_masks_and_nothing_else() -> None:
    assert "has no text-to-image; nearest:" in failure_of(results(prepared(request("sd-inpaint")))[0])
    asked = request("sd-inpaint", task=Task.INPAINTING)
    made = images(prepared(asked, image=noise(), mask_image=middle_mask()))[0]
    assert (made.pixels[:16] == noise()[:16]).all()


def test_a_black_picture_is_a_failure() -> None:
    on = new_engine()
    images(prepared(request()), on=on)
    decoder = on.residency.get(request().checkpoint).parts["vae"].decoder
    with torch.no_grad():
        decoder.conv_out.weight.zero_()
        decoder.conv_out.bias.fill_(-1.0)
    assert failure_of(results(prepared(request()), on=on)[0]).endswith("refused: it is black")
