"""The fast and turbo profiles: omitted work, loss of quality, and reproducibility."""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from sdpipeline.domain import Profile, Task
from sdpipeline.engine import GeneratedImage, PreparedRequest
from sdpipeline.engine.stepwise import Speedups, Stepwise
from tests.integration.engine_requests import (
    SOURCE,
    controlnet,
    engine,
    equal,
    images,
    new_engine,
    noise,
    prepared,
    request,
)

QUICK: list[Profile] = ["fast", "turbo"]


def under(
    profile: Profile, n: int = 0, *, checkpoint: str = "sd1", steps: int = 4, guidance: float = 3.0
) -> PreparedRequest:
    asked = request(checkpoint, prompt=f"a cat {n}", seed=n, num_inference_steps=steps, guidance_scale=guidance)
    return prepared(replace(asked, profile=profile))


def shapes(profile: Profile) -> list[PreparedRequest]:
    colours = ("red", "blue")
    return [
        prepared(
            request(
                "shapes",
                prompt=f"a {colour} circle in the center on a white background",
                seed=n,
                width=128,
                height=128,
                num_inference_steps=12,
                profile=profile,
            )
        )
        for n, colour in enumerate(colours)
    ]


def apart(made: list[GeneratedImage], others: list[GeneratedImage]) -> float:
    """Mean difference in grey levels."""
    pairs = zip(made, others, strict=True)
    return float(np.mean([np.abs(one.pixels.astype(int) - other.pixels).mean() for one, other in pairs]))


def work(profile: Profile) -> tuple[list[int], list[int]]:
    """Rows of the calls of the U-Net's outermost and innermost part, for one picture of four steps."""
    images(under(profile, steps=1))
    outer, inner = list[int](), list[int]()
    unet = engine().residency.get(request().checkpoint).parts["unet"]
    handles = [
        part.register_forward_pre_hook(lambda _module, inputs, rows=rows: rows.append(len(inputs[0])))
        for part, rows in ((unet.conv_in, outer), (unet.mid_block.resnets[0], inner))
    ]
    images(under(profile))
    for handle in handles:
        handle.remove()
    return outer, inner


@pytest.mark.parametrize(
    ("profile", "outer", "inner"),
    [("exact", [2, 2, 2, 2], [2, 2, 2, 2]), ("fast", [2, 1, 2, 1], [2, 1, 2, 1]), ("turbo", [2, 1, 2, 1], [2, 2])],
)
def test_a_profile_leaves_out_what_it_says(profile: Profile, outer: list[int], inner: list[int]) -> None:
    assert work(profile) == (outer, inner)


def test_the_quicker_a_profile_the_further_its_pictures_are_from_the_exact_ones_and_not_far() -> None:
    exact, fast, turbo = (images(*shapes(profile)) for profile in ("exact", *QUICK))
    assert 0 < apart(fast, exact) < apart(turbo, exact) < 8


def test_a_picture_without_guidance_has_nothing_that_fast_could_leave_out() -> None:
    assert apart(images(under("fast", guidance=1.0)), images(under("exact", guidance=1.0))) < 0.01


@pytest.mark.parametrize(("profile", "checkpoint"), [("fast", "sd3"), ("turbo", "sd1"), ("turbo", "sdxl")])
def test_neighbours_of_other_steps_change_nothing_that_the_record_does_not_hold(
    profile: Profile, checkpoint: str
) -> None:
    asked = [under(profile, n, checkpoint=checkpoint, steps=3 + 2 * n, guidance=3.0 - n) for n in range(3)]
    for given, made in zip(asked, images(*asked), strict=True):
        again = images(replace(given, calls=made.ran["calls"]), bucket=made.ran["bucket"])[0]
        assert equal(again, made)
        assert again.ran == made.ran | {"slot": 0}
        assert apart([made], images(replace(given, calls=()))) < 0.5


def test_a_controlnet_steers_at_steps_that_leave_the_deep_half_out() -> None:
    def steered(n: int) -> PreparedRequest:
        use = controlnet("controlnet-sd1", controlnet_conditioning_scale=1.0)
        return prepared(replace(request(seed=n, controlnets=(use,)), profile="turbo"), controlnets_0=noise(n))

    one, other = images(steered(0), replace(steered(1), request=replace(steered(1).request, seed=0)))
    assert apart([one], [other]) > 1


def test_a_repainted_picture_goes_under_every_profile() -> None:
    asked = request(task=Task.IMAGE_TO_IMAGE, image=SOURCE, strength=0.5, num_inference_steps=6)
    made = [images(prepared(replace(asked, profile=profile), image=noise(1)))[0] for profile in QUICK]
    assert [each.ran["profile"] for each in made] == [
        {"name": "fast", "guidance_every": 2},
        {"name": "turbo", "guidance_every": 2, "whole_unet_every": 2},
    ]


def test_what_a_profile_did_to_a_resident_checkpoint_is_gone_when_an_exact_picture_comes() -> None:
    before = images(under("exact"))[0]
    images(under("turbo"))
    assert equal(images(under("exact"))[0], before)
    unet = engine().residency.get(request().checkpoint).parts["unet"]
    assert not any("forward" in vars(module) for module in unet.modules())
    assert not any(module._forward_hooks for module in unet.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("speedups", "recorded"),
    [
        (Speedups(channels_last=True), {"channels_last": True}),
        (Speedups(attention="math"), {"attention": "math"}),
        (Speedups(decode_batch=2), {}),
    ],
)
def test_what_the_deployment_allows_touches_no_exact_picture_and_stands_in_the_record(
    speedups: Speedups, recorded: dict[str, object]
) -> None:
    on = new_engine(shortcuts=Stepwise(speedups))
    asked = [under("fast", n) for n in range(3)]
    made = images(*asked, on=on)
    assert made[0].ran["profile"] == {"name": "fast", "guidance_every": 2} | recorded
    assert apart(made, images(*asked)) < 0.5
    for given, one in zip(asked, made, strict=True):
        assert equal(images(replace(given, calls=one.ran["calls"]), bucket=one.ran["bucket"], on=on)[0], one)
    for profile in ("strict", "tolerant"):
        plain = replace(under("exact"), request=replace(under("exact").request, reproducibility=profile))
        alone, here = images(plain)[0], images(plain, on=on)[0]
        assert equal(alone, here)
        assert here.ran == alone.ran


def test_networks_are_laid_out_for_a_profile_and_as_they_were_loaded_for_exact_pictures() -> None:
    on = new_engine(shortcuts=Stepwise(Speedups(channels_last=True)))
    unet = on.residency.get(request().checkpoint).parts["unet"]
    loaded, seen = _strides(unet), list[Any]()
    unet.conv_in.register_forward_pre_hook(lambda _module, _inputs: seen.append(_strides(unet)))
    quick_then_exact: list[Profile] = ["fast", "exact"]
    for profile in quick_then_exact:
        images(under(profile, steps=1), on=on)
    assert unet.conv_in.weight.is_contiguous()
    assert seen[0] != loaded
    assert seen[1] == loaded


def _strides(network: torch.nn.Module) -> list[tuple[int, ...]]:
    return [parameter.stride() for parameter in network.parameters()]


def test_pictures_decoded_in_parts_say_so_by_bucket_and_slot() -> None:
    made = images(*[under("fast", n) for n in range(3)], on=new_engine(shortcuts=Stepwise(Speedups(decode_batch=2))))
    assert [(each.ran["bucket"], each.ran["slot"]) for each in made] == [(2, 0), (2, 1), (2, 0)]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # a warning of torch about itself
def test_blocks_are_compiled_for_a_profile_and_run_as_they_are_for_exact_pictures() -> None:
    on, stances = new_engine(shortcuts=Stepwise(Speedups(compile=True))), list[str]()
    unet = on.residency.get(request().checkpoint).parts["unet"]
    block = next(module for module in unet.modules() if type(module).__name__ == "BasicTransformerBlock")
    block.register_forward_pre_hook(lambda *_: stances.append(torch._dynamo.eval_frame._stance.stance))
    # The effect of compiling is tested in tests/bench and tests/gpu: it takes most of a minute.
    with torch.compiler.set_stance("eager_on_recompile"):
        made = images(under("fast", steps=1), under("fast", steps=1), on=on)
        images(under("exact", steps=1), on=on)
    assert block._compiled_call_impl is not None
    assert stances == ["eager_on_recompile", "force_eager"]
    assert made[0].ran["profile"]["compile"] is True


def test_compiled_blocks_change_no_exact_picture_and_are_freed_with_their_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # This backend traces as the default one does, and needs no C++ compiler.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    on = new_engine(shortcuts=Stepwise(Speedups(compile=True)))
    expected = images(under("exact", steps=1))[0]
    before = counters["frames"]["ok"]
    images(under("fast", steps=1), on=on)
    assert counters["frames"]["ok"] > before
    assert equal(images(under("exact", steps=1), on=on)[0], expected)
    unet = weakref.ref(on.residency.get(request().checkpoint).denoiser)
    on.residency.drop(keep=())
    assert unet() is None
