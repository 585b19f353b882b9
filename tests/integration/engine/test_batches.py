"""A batch of mixed requests equals its single pictures, and within a bucket the bits do not depend on other
requests."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sdpipeline.domain import Task
from sdpipeline.engine import Batch, PreparedRequest
from tests.integration.engine_requests import (
    controlnet,
    distance,
    engine,
    equal,
    image_of,
    images,
    new_engine,
    noise,
    prepared,
    request,
)


def mixed(n: int) -> PreparedRequest:
    """Requests that differ, for each n, in every parameter that may vary within a batch."""
    control = controlnet("controlnet-sd1", annotator="canny", controlnet_conditioning_scale=0.4 + 0.2 * n)
    asked = request(
        prompt=f"a cat {n}",
        negative_prompt="" if n % 2 else f"dog {n}",
        seed=n,
        guidance_scale=1.5 + 1.5 * n,
        controlnets=(control,),
    )
    return prepared(asked, controlnets_0=noise(n))


def test_a_mixed_batch_of_eight_equals_its_singles_within_one_grey_level() -> None:
    together = images(*[mixed(n) for n in range(8)], bucket=8)
    alone = [images(mixed(n), bucket=1)[0] for n in range(8)]
    assert max(distance(one, other) for one, other in zip(together, alone, strict=True)) <= 1


def test_other_neighbours_and_another_order_in_the_same_bucket_change_no_bit() -> None:
    together = images(*[mixed(n) for n in range(8)], bucket=8)
    order = [5, 2, 7, 0]
    others = images(*[mixed(n) for n in order], bucket=8)
    assert all(equal(together[n], other) for n, other in zip(order, others, strict=True))


def test_one_request_in_a_given_bucket_has_the_bits_it_had_in_any_slot() -> None:
    together = images(*[mixed(n) for n in range(4)], bucket=4)
    assert [image.ran["slot"] for image in together] == [0, 1, 2, 3]
    for n, image in enumerate(together):
        assert equal(image_of(engine().generate(Batch(requests=[mixed(n)], bucket=image.ran["bucket"]))[0]), image)


def test_each_free_parameter_of_a_batch_is_felt() -> None:
    base = prepared(request(controlnets=(controlnet("controlnet-sd1"),)), controlnets_0=noise())
    changed = [
        prepared(request(prompt="dog", controlnets=base.request.controlnets), controlnets_0=noise()),
        prepared(request(negative_prompt="dog", controlnets=base.request.controlnets), controlnets_0=noise()),
        prepared(request(seed=1, controlnets=base.request.controlnets), controlnets_0=noise()),
        prepared(request(guidance_scale=9.0, controlnets=base.request.controlnets), controlnets_0=noise()),
        prepared(request(controlnets=base.request.controlnets), controlnets_0=noise(1)),
        prepared(
            request(controlnets=(controlnet("controlnet-sd1", controlnet_conditioning_scale=0.3),)),
            controlnets_0=noise(),
        ),
    ]
    first, *others = images(base, *changed)
    assert min(differences := [distance(first, other) for other in others]) > 2, differences


def test_two_controlnets_each_have_their_own_scale() -> None:
    def both(one: float, other: float) -> PreparedRequest:
        asked = request(
            controlnets=(
                controlnet("controlnet-sd1", controlnet_conditioning_scale=one),
                controlnet("controlnet-sd1-other", controlnet_conditioning_scale=other),
            )
        )
        return prepared(asked, controlnets_0=noise(1), controlnets_1=noise(2))

    single = prepared(request(controlnets=(controlnet("controlnet-sd1"),)), controlnets_0=noise(1))
    made = images(both(1.0, 0.0), both(0.0, 1.0), both(1.0, 1.0))
    assert distance(made[0], images(single)[0]) <= 1
    assert min(distance(made[0], made[1]), distance(made[0], made[2])) > 2


def test_the_same_controlnet_twice_takes_each_use_at_its_own_scale() -> None:
    twice = (
        controlnet("controlnet-sd1", controlnet_conditioning_scale=1.0),
        controlnet("controlnet-sd1", controlnet_conditioning_scale=0.0),
    )
    once = (controlnet("controlnet-sd1"),)
    made = images(prepared(request(controlnets=twice), controlnets_0=noise(1), controlnets_1=noise(2)))
    assert distance(made[0], images(prepared(request(controlnets=once), controlnets_0=noise(1)))[0]) <= 1


def test_a_controlnet_outside_its_range_of_steps_does_nothing() -> None:
    never = controlnet("controlnet-sd1", control_guidance_start=0.99, control_guidance_end=1.0)
    made = images(prepared(request(controlnets=(never,)), controlnets_0=noise()))
    assert distance(made[0], images(prepared(request()))[0]) <= 1


def test_requests_of_different_kinds_in_one_batch_still_come_out_right() -> None:
    made = images(prepared(request(num_inference_steps=2)), prepared(request(num_inference_steps=4)), bucket=2)
    alone = images(prepared(request(num_inference_steps=4)), bucket=2)
    assert equal(made[1], alone[0])


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "euler-ancestral", "dpmpp-2m", "dpmpp-2m-karras"])
def test_schedulers_give_pictures_and_name_themselves(name: str) -> None:
    made = images(prepared(request(scheduler=name)))[0]
    assert made.ran["scheduler"]["name"] == name
    assert json.loads(json.dumps(made.ran, allow_nan=False)) == made.ran


@pytest.mark.parametrize("name", ["dpmpp-2m-sde", "euler-karras", "heun", "lcm", "unipc"])
def test_a_second_run_of_a_scheduler_repeats_the_first_bit_for_bit(name: str) -> None:
    first, second = (images(prepared(request(scheduler=name)))[0] for _ in range(2))
    assert equal(first, second)


def test_super_resolution_enlarges_by_four() -> None:
    asked = request("upscale", task=Task.SUPER_RESOLUTION, width=24, height=16)
    made = images(*[prepared(asked, image=noise(n)[:16, :24]) for n in range(2)])
    assert made[0].pixels.shape == (64, 96, 3)
    assert made[0].ran["noise_level"] == 20
    assert distance(made[0], made[1]) > 2


def test_the_record_holds_what_making_the_picture_again_needs() -> None:
    ran = images(mixed(3), bucket=4)[0].ran
    assert {"seed", "scheduler", "device", "dtype", "bucket", "slot", "fallbacks", "libraries"} <= ran.keys()
    assert (ran["seed"], ran["bucket"], ran["slot"], ran["dtype"], ran["device"]) == (3, 4, 0, "float32", "cpu")
    assert ran["controlnets"][0]["annotator_parameters"] == {"low_threshold": 100, "high_threshold": 200}
    assert [entry["alias"] for entry in ran["checkpoints"]] == ["sd1", "controlnet-sd1"]


def test_what_is_loaded_is_known_by_its_digest() -> None:
    images(prepared(request()))
    assert request().checkpoint.digest in engine().resident()
    assert np.ndim(images(prepared(request()))[0].pixels) == 3


def test_half_precision_starts_from_the_same_noise_as_full_precision() -> None:
    full, half = request(guidance_scale=1.5), request(guidance_scale=1.5)
    made = images(prepared(half), on=new_engine(dtype="bfloat16"))[0]
    assert distance(made, images(prepared(full))[0]) < 40
    assert distance(made, images(prepared(request(seed=1, guidance_scale=1.5)))[0]) > 100
