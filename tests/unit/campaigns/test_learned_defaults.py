"""Defaults that stages take from their weights, and warnings about parameters far from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest

from sdpipeline.campaigns import expand
from sdpipeline.domain import GenerationRequest
from sdpipeline.engine.distilled import LCM_WITH_GUIDANCE_EMBEDDING, PRESETS
from tests.factories import campaign_of, checkpoint_files, input_folder, jobs_of

TURBO = PRESETS["turbo"]
WEIGHTS = [
    checkpoint_files("shapes"),
    replace(checkpoint_files("base", family="sdxl"), native_size=1024),
    replace(checkpoint_files("turbo", family="sdxl"), native_size=512, defaults=TURBO),
    replace(checkpoint_files("wide", family="sdxl"), native_size=1024, defaults={"width": 1344, "height": 768}),
    replace(checkpoint_files("schnell", family="flux"), native_size=1024, defaults=PRESETS["schnell"]),
    replace(checkpoint_files("odd"), native_size=500),
    replace(checkpoint_files("anime", family="sdxl"), defaults={"clip_skip": 2, "num_inference_steps": 40}),
    replace(checkpoint_files("lightning", kind="lora", family="sdxl"), defaults=PRESETS["lightning-8"]),
    replace(checkpoint_files("fast-anything", kind="lora", family="any"), defaults=PRESETS["lcm"]),
    checkpoint_files("style", kind="lora", family="sdxl"),
    checkpoint_files("big", family="upscale", scale=4),
]
CATALOG = {files.alias: files for files in WEIGHTS}


def stage(checkpoint: str, more: str = "", head: str = "", catalog: Any = CATALOG) -> GenerationRequest:
    """The request of a campaign with one stage of that checkpoint."""
    return jobs_of(text(checkpoint, more, head), catalog=catalog)[0].request


def text(checkpoint: str, more: str = "", head: str = "") -> str:
    own = indent(more, "    ")
    start = f"name: spring\ncheckpoint: {checkpoint}\n{head}\nstages:\n"
    return f"{start}  - id: draft\n    task: text-to-image\n    prompt: a cat\n{own}\n"


def warnings(checkpoint: str, more: str = "", head: str = "", catalog: Any = CATALOG) -> list[str]:
    found = campaign_of(text(checkpoint, more, head), catalog=catalog)
    expand.check(found, input_folder(Path("/nowhere")))
    return [f"{each.key}: {each.message} ({each.fix})" for each in found.warnings.in_order()]


def sampling(made: GenerationRequest) -> tuple[Any, ...]:
    return made.num_inference_steps, made.guidance_scale, made.scheduler, made.width, made.height


def test_a_stage_takes_the_defaults_of_its_checkpoint_and_its_native_size() -> None:
    assert sampling(stage("turbo")) == (4, 0.0, "euler-trailing", 512, 512)
    assert sampling(stage("schnell")) == (4, 0.0, "flow-match-euler", 1024, 1024)
    assert sampling(stage("base")) == (30, 5.0, "dpmpp-2m", 1024, 1024)
    assert sampling(stage("wide"))[3:] == (1344, 768)
    assert sampling(stage("odd"))[3:] == (496, 496)
    assert stage("anime").clip_skip == 2


def test_weights_without_values_keep_the_defaults_of_earlier_releases() -> None:
    assert sampling(stage("shapes")) == (25, 7.5, "dpmpp-2m", 512, 512)
    assert stage("shapes").clip_skip is None


def test_the_stage_comes_before_the_campaign_and_both_before_the_checkpoint() -> None:
    head = "defaults: {num_inference_steps: 6, guidance_scale: 1.0, width: 640}"
    made = stage("turbo", "num_inference_steps: 2", head)
    assert sampling(made) == (2, 1.0, "euler-trailing", 640, 512)


def test_a_lora_comes_before_the_checkpoint_and_the_first_before_the_second() -> None:
    made = stage("base", "loras: [{checkpoint: style}, {checkpoint: lightning}, {checkpoint: fast-anything}]")
    assert sampling(made) == (8, 0.0, "euler-trailing", 1024, 1024)


def test_a_default_that_the_family_does_not_take_is_left_out() -> None:
    made = stage("schnell", "loras: [{checkpoint: fast-anything}]")
    assert sampling(made)[:3] == (4, 1.0, "flow-match-euler")


def test_the_size_of_an_input_picture_comes_before_the_native_size(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (96, 64)).save(tmp_path / "a.png")
    own = "stages: [{id: a, task: image-to-image, prompt: x, image: {file: a.png}}]"
    made = jobs_of(f"name: spring\ncheckpoint: base\n{own}", tmp_path, catalog=CATALOG)[0].request
    assert (made.width, made.height) == (96, 64)


def test_a_strength_is_checked_against_the_steps_of_the_checkpoint(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (96, 64)).save(tmp_path / "a.png")
    own = "{id: a, task: image-to-image, prompt: x, strength: 0.03, image: {file: a.png}}"
    made = jobs_of(f"name: spring\ncheckpoint: anime\nstages: [{own}]", tmp_path, catalog=CATALOG)[0].request
    assert made.num_inference_steps == 40


@pytest.mark.parametrize("checkpoint", ["turbo", "schnell", "base", "anime", "odd", "wide", "shapes"])
def test_a_stage_of_defaults_has_no_warning(checkpoint: str) -> None:
    assert warnings(checkpoint) == []


@pytest.mark.parametrize(
    ("checkpoint", "more", "expected"),
    [
        (
            "turbo",
            "num_inference_steps: 30",
            "steps: 30 is far from 4, for which 'turbo' is made (write 4,",
        ),
        ("turbo", "guidance_scale: 7.5", "guidance_scale: 7.5 is far from 0, for which 'turbo' is made (write 0,"),
        ("turbo", "scheduler: euler", "scheduler: euler is far from euler-trailing, for which 'turbo' is made"),
        ("schnell", "guidance_scale: 3.5", "guidance_scale: 3.5 has no effect: 'schnell' takes no guidance"),
        ("anime", "num_inference_steps: 4", "num_inference_steps: 4 is far from 40"),
        (
            "base",
            "num_inference_steps: 3",
            "steps: 3 is too few for 'base', unless its weights or a LoRA",
        ),
        ("base", "width: 512\nheight: 512", "height: 512x512 is 0.25 times the area that 'base' is made for"),
        ("base", "width: 2048\nheight: 1024", "height: 2048x1024 is 2 times the area"),
        ("shapes", "width: 1000\nheight: 64", "width: 1000x64 has sides of 16 to 1"),
        ("base", "guidance_scale: 1\nnegative_prompt: dog", "negative_prompt: has no effect at guidance_scale 1"),
        ("base", "loras: [{checkpoint: lightning}]\nnum_inference_steps: 30", "for which 'lightning' is made"),
        (
            "base",
            "loras: [{checkpoint: lightning}]\nguidance_scale: 7",
            "7 is far from 0, for which 'lightning'",
        ),
    ],
)
def test_a_parameter_far_from_the_weights_is_warned_of_once(checkpoint: str, more: str, expected: str) -> None:
    (found,) = warnings(checkpoint, more)
    assert expected in found


@pytest.mark.parametrize(
    ("checkpoint", "more"),
    [
        ("turbo", "num_inference_steps: 1"),
        ("turbo", "num_inference_steps: 8\nguidance_scale: 1.5\nscheduler: lcm"),
        ("base", "width: 1152\nheight: 896"),
        ("base", "negative_prompt: dog"),
        ("base", "loras: [{checkpoint: lightning}]\nnum_inference_steps: 4"),
        ("schnell", "guidance_scale: 1"),
    ],
)
def test_a_parameter_near_the_weights_is_not_warned_of(checkpoint: str, more: str) -> None:
    assert warnings(checkpoint, more) == []


def test_values_of_rows_are_warned_of_once_per_stage_at_their_place() -> None:
    head = "variables: {steps: [4, 30, 40], colour: [red, blue]}"
    more = 'num_inference_steps: "{{ steps }}"\nnegative_prompt: "{{ colour }}"'
    found = warnings("turbo", more, head)
    assert [each.partition(":")[0] for each in found] == ["stages[0].num_inference_steps", "stages[0].negative_prompt"]


def test_a_default_of_the_campaign_is_warned_of_for_each_stage_that_takes_it() -> None:
    stages = "stages: [{id: a, task: text-to-image, prompt: x}, {id: b, task: text-to-image, prompt: y}]"
    file = f"name: spring\ncheckpoint: turbo\ndefaults: {{guidance_scale: 7}}\n{stages}"
    found = campaign_of(file, catalog=CATALOG)
    expand.check(found, input_folder(Path("/nowhere")))
    messages = [each.message for each in found.warnings.in_order()]
    assert [message.rpartition("(")[2] for message in messages] == ["stage 'a')", "stage 'b')"]


def test_a_negative_prompt_of_an_embedded_guidance_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"time_cond_proj_dim": 256}')
    lcm = replace(checkpoint_files("lcm"), directory=tmp_path, defaults=LCM_WITH_GUIDANCE_EMBEDDING)
    (found,) = warnings("lcm", "negative_prompt: dog", catalog={"lcm": lcm})
    assert "takes its guidance scale as an embedding" in found
    (found,) = warnings("lcm", "guidance_scale: 1", catalog={"lcm": lcm})
    assert "1 is far from 8" in found


def test_euler_is_not_warned_of_where_its_timesteps_are_trailing_anyway(tmp_path: Path) -> None:
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"timestep_spacing": "trailing"}')
    turbo = replace(CATALOG["turbo"], directory=tmp_path)
    assert warnings("turbo", "scheduler: euler-ancestral", catalog={"turbo": turbo}) == []
    (found,) = warnings("turbo", "scheduler: dpmpp-2m", catalog={"turbo": turbo})
    assert "dpmpp-2m is far from euler-trailing" in found


def test_what_an_earlier_release_registered_keeps_its_defaults_and_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "LCMScheduler"}')
    lcm = replace(checkpoint_files("lcm"), directory=tmp_path)
    assert sampling(stage("lcm", catalog={"lcm": lcm})) == (25, 7.5, "dpmpp-2m", 512, 512)
    found = warnings("lcm", catalog={"lcm": lcm})
    assert "(write 4, or register the weights again with --defaults auto)" in found[0]
    assert len(found) == 3
