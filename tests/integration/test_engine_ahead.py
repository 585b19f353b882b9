"""The next batch's prompts are encoded beside the pass of the one before: the same bits, once, or not at all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from sdpipeline.domain import GenerationRequest
from sdpipeline.engine.diffusers.engine import DiffusersEngine
from sdpipeline.engine.diffusers.model_cache import TextEncoders
from sdpipeline.engine.stepwise.compile import Speedups
from tests.integration.engine_requests import (
    adapter,
    equal,
    failure_of,
    images,
    new_engine,
    prepared,
    ref,
    request,
    results,
)

AHEAD = TextEncoders(ahead=True)


def asked(prompt: str, checkpoint: str = "sd1", **changes: Any) -> GenerationRequest:
    return request(checkpoint, prompt=prompt, negative_prompt="", **changes)


def counting(on: DiffusersEngine, checkpoint: str = "sd1") -> list[str]:
    """The names of threads on which its text encoder is called, from now on."""
    called: list[str] = []
    encoder = on.residency.get(ref(checkpoint)).parts["text_encoder"]
    encoder.register_forward_pre_hook(lambda *_: called.append(threading.current_thread().name))
    return called


@contextmanager
def beside_its_pass(
    on: DiffusersEngine, *requests: GenerationRequest, checkpoint: str = "sd1", wait_s: float = 0.0
) -> Iterator[None]:
    """Have another thread prepare those once the denoiser is called, which waits for its end for so long."""
    parts = on.residency.get(ref(checkpoint)).parts
    other = threading.Thread(target=on.prepare, args=(requests,), name="ahead")

    def begin(*_: Any) -> None:
        if other.ident is None:
            other.start()
            other.join(wait_s)

    handle = parts.get("unet", parts.get("transformer")).register_forward_pre_hook(begin)
    yield
    handle.remove()
    other.join()


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_a_prompt_encoded_beside_a_pass_makes_the_same_picture_and_is_not_encoded_again(family: str) -> None:
    on, next_one = new_engine(text_encoders=AHEAD), prepared(asked("a dog", family, seed=3))
    images(prepared(asked("a cat", family)), on=on)
    called = counting(on, family)
    with beside_its_pass(on, next_one.request, checkpoint=family, wait_s=20.0):
        first = images(prepared(asked("a cat", family, seed=2)), on=on)[0]
    assert set(called) == {"ahead"}
    calls = len(called)
    assert equal(images(next_one, on=on)[0], images(next_one)[0])
    assert equal(first, images(prepared(asked("a cat", family, seed=2)))[0])
    assert len(called) == calls


def test_many_prompts_while_a_long_pass_goes_on_change_no_bit_of_either() -> None:
    on = new_engine(text_encoders=AHEAD)
    busy = [prepared(asked("a cat", seed=n, num_inference_steps=20)) for n in range(4)]
    coming = [prepared(asked(f"a dog {n}", seed=n)) for n in range(8)]
    images(busy[0], on=on)
    called = counting(on)
    with beside_its_pass(on, *[each.request for each in coming]):
        made = images(*busy, on=on)
    made += images(*coming, on=on)
    assert all(equal(one, same) for one, same in zip(made, images(*busy) + images(*coming), strict=True))
    assert len(called) == 8  # the negative prompt was kept before
    assert "ahead" in called


@pytest.mark.parametrize(
    ("busy", "coming", "options"),
    [
        ({}, {"reproducibility": "strict"}, {}),
        ({"reproducibility": "strict"}, {}, {}),
        ({}, {"loras": ("lora-sd1",)}, {}),
        ({"loras": ("lora-sd1",)}, {}, {}),
        ({}, {"checkpoint": "sdxl"}, {}),
        ({}, {}, {"text_encoders": TextEncoders()}),
        ({"profile": "fast"}, {}, {"speedups": Speedups(attention="math")}),
    ],
)
def test_what_might_disturb_either_waits_for_its_turn(
    busy: dict[str, Any], coming: dict[str, Any], options: dict[str, Any]
) -> None:
    on = new_engine(**{"text_encoders": AHEAD} | options)
    worn = [changes | {"loras": tuple(map(adapter, changes.get("loras", ())))} for changes in (busy, coming)]
    now = prepared(asked("a cat", **worn[0]))
    images(now, on=on)
    called, resident = counting(on), on.resident()
    with beside_its_pass(on, asked("a dog", **worn[1]), wait_s=0.3):
        images(now, on=on)
    assert called == []
    assert on.resident() == resident


def test_before_anything_runs_nothing_is_prepared_and_nothing_waits() -> None:
    on = new_engine(text_encoders=AHEAD)
    on.prepare([asked("a dog")])
    assert on.resident() == frozenset()


def test_text_encoders_that_are_away_stay_away() -> None:
    away = TextEncoders(offload="always", host=torch.device("meta"), ahead=True)
    on = new_engine(text_encoders=away)
    images(prepared(asked("a cat")), on=on)
    with beside_its_pass(on, asked("a dog"), wait_s=20.0):
        images(prepared(asked("a cat")), on=on)
    assert on.residency.at_hand(ref("sd1")) is None


def test_a_prompt_that_cannot_be_encoded_fails_its_own_request_when_its_turn_comes() -> None:
    on, wrong = new_engine(text_encoders=AHEAD), asked("x" * 600, "flux")
    images(prepared(asked("a cat", "flux")), on=on)
    with beside_its_pass(on, wrong, asked("a dog", "flux"), checkpoint="flux", wait_s=20.0):
        images(prepared(asked("a cat", "flux")), on=on)
    called = counting(on, "flux")
    made = results(prepared(wrong), prepared(asked("a dog", "flux")), on=on)
    assert "this family reads at most 512; shorten it" in failure_of(made[0])
    assert equal(images(prepared(asked("a dog", "flux")), on=on)[0], images(prepared(asked("a dog", "flux")))[0])
    assert called == []
