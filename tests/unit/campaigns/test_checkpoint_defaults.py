"""Defaults given with a checkpoint: ``checkpoints add --defaults``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sdpipeline.campaigns.checkpoint_defaults import parsed_defaults
from sdpipeline.errors import BadInputError
from tests.factories import checkpoint_files

XL = checkpoint_files("xl", family="sdxl")


def refused(*given: str, files: Any = XL) -> str:
    with pytest.raises(BadInputError) as error:
        parsed_defaults(given, files)
    return str(error.value)


def test_values_get_the_types_that_a_campaign_gives_them() -> None:
    given = ["num_inference_steps=4", "guidance_scale=0", "scheduler=euler-trailing", "width=1024", "height = 768"]
    assert parsed_defaults(given, XL) == {
        "num_inference_steps": 4,
        "guidance_scale": 0.0,
        "scheduler": "euler-trailing",
        "width": 1024,
        "height": 768,
    }


def test_a_preset_is_a_start_that_later_values_change() -> None:
    found = parsed_defaults(["lightning-4", "num_inference_steps=8"], XL)
    assert found == {"num_inference_steps": 8, "guidance_scale": 0.0, "scheduler": "euler-trailing"}
    turbo_of_sd3 = parsed_defaults(["turbo"], checkpoint_files("large", family="sd3"))
    assert turbo_of_sd3 == {"num_inference_steps": 4, "guidance_scale": 0.0}


def test_detected_defaults_can_be_asked_for_or_dropped() -> None:
    detected = replace(XL, defaults={"num_inference_steps": 4})
    assert parsed_defaults(["auto"], detected) == {"num_inference_steps": 4}
    assert parsed_defaults(["none"], detected) == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("steps=4", "--defaults steps: a checkpoint has no default for it (did you mean 'num_inference_steps'?)"),
        ("guidance_scal=0", "did you mean 'guidance_scale'?"),
        ("num_inference_steps=four", "--defaults num_inference_steps: 'four' is not a whole number from 1 to 1000"),
        ("num_inference_steps=0", "--defaults num_inference_steps: '0' is not from 1 to 1000"),
        ("guidance_scale=nan", "guidance_scale: 'nan' is not a number"),
        ("guidance_scale=", "guidance_scale: '' is not a number"),
        ("scheduler=euler-trailling", "no scheduler 'euler-trailling' (did you mean 'euler-trailing'?)"),
        ("scheduler=flow-match-euler", "Stable Diffusion XL cannot use scheduler 'flow-match-euler'"),
        ("width=1001", "width: 1001 is not a multiple of 8 (write 1000)"),
        ("prompt=a cat", "prompt: a checkpoint has no default for it"),
        ("lightening-4", "--defaults no defaults named 'lightening-4' (write KEY=VALUE, or one of turbo, lcm,"),
        ("=4", "--defaults : a checkpoint has no default for it"),
    ],
)
def test_a_wrong_key_or_value_is_refused_by_its_name(given: str, message: str) -> None:
    assert message in refused(given)


def test_every_mistake_is_named_at_once() -> None:
    text = refused("steps=4", "guidance_scale=x")
    assert "steps" in text
    assert "guidance_scale" in text


def test_a_lora_has_defaults_but_no_size_and_other_weights_have_none() -> None:
    lora = checkpoint_files("fast", kind="lora", family="sdxl")
    assert parsed_defaults(["lcm"], lora)["scheduler"] == "lcm"
    assert parsed_defaults(["lcm"], replace(lora, family="any"))["scheduler"] == "lcm"
    assert "a lora has no default for it" in refused("width=64", files=lora)
    assert "takes no parameters" in refused("lcm", files=checkpoint_files("sharp", kind="vae"))
    assert "takes no parameters" in refused("lcm", files=checkpoint_files("big", family="gan-upscale"))
