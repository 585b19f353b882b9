"""`reproducibility: strict`: bits depend only on the request, the machine and the software."""

from __future__ import annotations

from typing import Any

import torch

from sdpipeline.engine import GeneratedImage, PreparedRequest
from sdpipeline.engine.diffusers.engine import DiffusersEngine
from tests.integration.engine_requests import (
    SOURCE,
    adapter,
    controlnet,
    equal,
    failure_of,
    image_of,
    images,
    new_engine,
    noise,
    prepared,
    request,
    results,
)


def strict(n: int = 0, **changes: Any) -> PreparedRequest:
    return prepared(request(prompt=f"a cat {n}", seed=n, reproducibility="strict", **changes))


def before_each_step(on: DiffusersEngine, hook: Any) -> None:
    unet = on.residency.get(request().checkpoint, exact=True).parts["unet"]
    unet.register_forward_pre_hook(lambda _module, inputs: hook(inputs[0]))


def about(image: GeneratedImage) -> tuple[Any, ...]:
    return tuple(image.ran[name] for name in ("reproducibility", "dtype", "bucket", "slot", "fallbacks"))


def test_a_stored_request_that_says_fast_is_still_made_as_it_was() -> None:
    made = images(prepared(request(reproducibility="fast")))[0]
    assert (made.ran["reproducibility"], made.ran["profile"]) == ("tolerant", {"name": "exact"})
    assert equal(made, images(prepared(request()))[0])


def test_a_strict_picture_has_the_same_bits_alone_and_leased_with_others() -> None:
    together = images(*[strict(n) for n in range(3)], bucket=4)
    assert [about(image) for image in together] == [("strict", "float32", 1, 0, [])] * 3
    assert all(equal(together[n], images(strict(n), bucket=1)[0]) for n in range(3))


def test_a_strict_picture_is_made_in_float32_where_the_deployment_is_not() -> None:
    on = new_engine(dtype="bfloat16")
    half = images(prepared(request(prompt="a cat 0")), on=on)[0]
    exact = images(strict(), on=on)[0]
    assert (half.ran["dtype"], exact.ran["dtype"]) == ("bfloat16", "float32")
    assert equal(exact, images(strict())[0])
    assert equal(images(prepared(request(prompt="a cat 0")), on=on)[0], half)


def test_a_strict_picture_with_everything_on_is_the_same_on_a_deployment_in_half_precision() -> None:
    worn: dict[str, Any] = {
        "prompt": "a <toy>",
        "textual_inversions": (adapter("toy"),),
        "loras": (adapter("lora-sd1"),),
        "ip_adapters": (adapter("ip-adapter-sd1", image=SOURCE),),
        "controlnets": (controlnet("controlnet-sd1", annotator="canny"),),
    }
    asked = prepared(request(reproducibility="strict", **worn), ip_adapters_0=noise(1), controlnets_0=noise(2))
    plain = prepared(request(**worn), ip_adapters_0=noise(1), controlnets_0=noise(2))
    on = new_engine(dtype="bfloat16")
    images(plain, on=on)
    assert equal(images(asked, on=on)[0], images(asked)[0])


def test_deterministic_algorithms_are_on_for_strict_pictures_only() -> None:
    on, seen = new_engine(), list[bool]()
    before_each_step(on, lambda _: seen.append(torch.are_deterministic_algorithms_enabled()))
    images(strict(num_inference_steps=1), on=on)
    images(prepared(request(num_inference_steps=1)), on=on)
    assert set(seen[: len(seen) // 2]) == {True}
    assert set(seen[len(seen) // 2 :]) == {False}


def test_a_strict_picture_that_would_need_a_fallback_fails_and_its_neighbour_does_not() -> None:
    on, refused = new_engine(), list[bool]()

    def at_first(_: torch.Tensor) -> None:
        if not refused:
            refused.append(True)
            raise torch.OutOfMemoryError("injected")

    before_each_step(on, at_first)
    made = results(strict(0), strict(1), on=on)
    assert failure_of(made[0]) == (
        "DeviceExhaustedError: out of memory for one picture of 64x64, and reproducibility: strict allows no fallback"
    )
    assert equal(image_of(made[1]), images(strict(1))[0])


def test_an_operation_without_a_deterministic_algorithm_fails_its_strict_picture() -> None:
    on = new_engine()

    def no_such_algorithm(_: torch.Tensor) -> None:
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("does not have a deterministic implementation")

    before_each_step(on, no_such_algorithm)
    assert "RequestRefusedError: the pipeline refused it: RuntimeError: does not" in failure_of(
        results(strict(), on=on)[0]
    )
    images(prepared(request()), on=on)
