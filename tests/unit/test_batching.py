from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sdpipeline.batching import batch_document, batch_key
from sdpipeline.domain import AdapterInput, CheckpointRef, ControlNetInput, ImageSource, OutputFormat, Task, fingerprint
from tests.factories import CHECKPOINT, request

CANNY = ControlNetInput(
    checkpoint=CheckpointRef(alias="shapes-canny", digest="ca" * 32), image=ImageSource(digest="11" * 32)
)
LORA = AdapterInput(checkpoint=CheckpointRef(alias="style", digest="10" * 32))
REFERENCE = AdapterInput(
    checkpoint=CheckpointRef(alias="face", digest="1b" * 32), image=ImageSource(stage="draft", digest="66" * 32)
)
EDIT: dict[str, Any] = {
    "task": Task.IMAGE_TO_IMAGE,
    "strength": 0.5,
    "image": ImageSource(digest="22" * 32),
    "controlnets": (CANNY,),
}


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "another"},
        {"negative_prompt": "blurry"},
        {"seed": 99},
        {"guidance_scale": 9.0},
        {"image": ImageSource(digest="33" * 32)},
        {"image": ImageSource(digest="33" * 32, stage="draft")},
        {"controlnets": (replace(CANNY, image=ImageSource(digest="44" * 32)),)},
        {"controlnets": (replace(CANNY, controlnet_conditioning_scale=0.3),)},
        {"output": OutputFormat(format="jpeg", quality=80)},
        {"checkpoint": CheckpointRef(alias="another-name", digest=CHECKPOINT.digest)},
    ],
)
def test_pictures_may_share_a_pass_although_they_differ_in(changes: dict[str, Any]) -> None:
    assert batch_key(request(**EDIT)) == batch_key(request(**EDIT | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoint": CheckpointRef(alias="shapes", digest="dd" * 32)},
        {"width": 128},
        {"height": 128},
        {"num_inference_steps": 5},
        {"scheduler": "euler"},
        {"strength": 0.6},
        {"guidance_scale": 1.0},
        {"clip_skip": 2},
        {"resize": "crop"},
        {"reproducibility": "strict"},
        {"vae": CheckpointRef(alias="vae", digest="ae" * 32)},
        {"loras": (LORA,)},
        {"loras": (LORA, replace(LORA, weight=0.5))},
        {"textual_inversions": (LORA,)},
        {"ip_adapters": (REFERENCE,)},
        {"ip_adapters": (replace(REFERENCE, weight=0.5),)},
        {"controlnets": ()},
        {"controlnets": (CANNY, CANNY)},
        {"controlnets": (replace(CANNY, annotator="canny"),)},
        {"controlnets": (replace(CANNY, control_guidance_end=0.5),)},
        {"controlnets": (replace(CANNY, checkpoint=CheckpointRef(alias="shapes-canny", digest="cb" * 32)),)},
    ],
)
def test_pictures_cannot_share_a_pass_if_they_differ_in(changes: dict[str, Any]) -> None:
    assert batch_key(request(**EDIT)) != batch_key(request(**EDIT | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_inference_steps": 5},
        {"strength": 0.6},
        {"scheduler": "euler"},
        {"guidance_scale": 1.0},
        {"controlnets": (replace(CANNY, control_guidance_end=0.5),)},
    ],
)
@pytest.mark.parametrize("profile", ["fast", "turbo"])
def test_pictures_of_a_profile_that_goes_step_by_step_may_differ_in(changes: dict[str, Any], profile: str) -> None:
    one = request(**EDIT, profile=profile)
    assert batch_key(one) == batch_key(replace(one, **changes))


@pytest.mark.parametrize("changes", [{"width": 128}, {"profile": "turbo"}, {"profile": "exact"}, {"loras": (LORA,)}])
def test_pictures_of_a_profile_cannot_share_calls_if_they_differ_in(changes: dict[str, Any]) -> None:
    one = request(**EDIT, profile="fast")
    assert batch_key(one) != batch_key(replace(one, **changes))


def test_the_profile_that_trades_nothing_changes_no_fingerprint_and_no_batch_key() -> None:
    assert "profile" not in batch_document(request())
    assert fingerprint(request(profile="exact")) == fingerprint(request())
    assert fingerprint(request(profile="fast")) != fingerprint(request())


@pytest.mark.parametrize("field", ["loras", "textual_inversions", "ip_adapters"])
def test_the_weight_of_an_adapter_is_one_for_a_whole_pass(field: str) -> None:
    worn = replace(REFERENCE, image=REFERENCE.image if field == "ip_adapters" else None)
    one: dict[str, Any] = {field: (worn,)}
    other: dict[str, Any] = {field: (replace(worn, weight=0.5),)}
    assert batch_key(request(**one)) != batch_key(request(**other))


def test_the_reference_picture_of_an_ip_adapter_is_another_one_for_each_picture_of_a_pass() -> None:
    other = replace(REFERENCE, image=ImageSource(digest="77" * 32))
    assert batch_key(request(ip_adapters=(REFERENCE,))) == batch_key(request(ip_adapters=(other,)))


def test_a_task_with_pictures_is_no_batch_with_one_without() -> None:
    assert batch_key(request()) != batch_key(request(image=ImageSource(digest="33" * 32)))


def test_what_a_batch_has_in_common_can_be_read() -> None:
    document = batch_document(request(**EDIT))
    assert document["scheduler"] == "dpmpp-2m"
    assert document["images"] == ["controlnets.0", "image"]
    assert "prompt" not in document
