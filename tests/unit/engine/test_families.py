from __future__ import annotations

from itertools import product

import pytest

from sdpipeline.domain import Task
from sdpipeline.engine.families import (
    FAMILIES,
    SCHEDULERS,
    family,
    scheduler_refusal,
    size_refusal,
    strength_refusal,
    table,
    task_refusal,
)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_row_lists_is_not_refused(name: str) -> None:
    row = FAMILIES[name]
    assert all(task_refusal(name, task) is None for task in row.plain)
    assert all(task_refusal(name, task, controlnets=1) is None for task in row.controlled)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_other_combination_is_refused_with_one_that_exists(name: str) -> None:
    for task, controlnets in product(Task, [0, 1, 2, 99]):
        refused = task_refusal(name, task, controlnets=controlnets)
        assert refused is None or str(refused.fix).startswith("nearest: ")


def test_a_refusal_names_the_nearest_combination() -> None:
    assert str(task_refusal("sd3", Task.IMAGE_TO_IMAGE, controlnets=1)) == (
        "task: Stable Diffusion 3 has no image-to-image with a ControlNet; nearest: text-to-image with a ControlNet "
        "through StableDiffusion3ControlNetPipeline"
    )


def test_an_unknown_family_is_refused_with_those_there_are() -> None:
    assert "known families: sd1, sd2" in str(task_refusal("sd9", Task.TEXT_TO_IMAGE))


def test_flow_and_noise_schedulers_do_not_mix() -> None:
    assert scheduler_refusal(family("sd3"), "flow-match-euler") is None
    assert "use one of flow-match-euler" in str(scheduler_refusal(family("flux"), "ddim"))
    assert "(unknown)" in str(scheduler_refusal(family("sd1"), "k-euler"))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_default_scheduler_suits_its_family(name: str) -> None:
    assert scheduler_refusal(FAMILIES[name], FAMILIES[name].scheduler) is None


def test_the_table_in_words_has_a_line_for_each_family_and_task() -> None:
    cells = sum(len(row.plain.keys() | row.controlled.keys()) for row in FAMILIES.values())
    assert len(table().splitlines()) == cells + 2
    assert "| Flux (`flux`) | inpainting | FluxInpaintPipeline | FluxControlNetInpaintPipeline | folder, " in table()


def test_the_usual_schedulers_are_there() -> None:
    usual = {"ddim", "ddpm", "euler", "euler-ancestral", "dpmpp-2m", "dpmpp-2m-karras", "unipc", "heun", "lcm"}
    assert usual | {"flow-match-euler"} <= SCHEDULERS.keys()


def test_sizes_are_multiples_of_what_the_family_packs() -> None:
    assert [family(name).size_multiple for name in ("sd1", "flux", "latent-upscale")] == [8, 16, 64]


@pytest.mark.parametrize(("pixels", "fix"), [(64, None), (100, "write 96"), (0, "write 8"), (-8, "write 8")])
def test_a_size_off_the_multiple_is_refused_with_the_nearest_one(pixels: int, fix: str | None) -> None:
    refused = size_refusal(family("sd1"), "width", pixels)
    assert (refused and refused.fix) == fix


@pytest.mark.parametrize(
    ("strength", "steps", "message"),
    [
        (0.5, 2, None),
        (1.0, 1, None),
        (0.1, 3, "strength: 0.1 of 3 steps is less than one step; raise strength or num_inference_steps"),
        (0.0, 20, "strength: 0 of 20 steps is less than one step; raise strength or num_inference_steps"),
        (1.5, 20, "strength: 1.5 is more than 1; write at most 1"),
    ],
)
def test_a_strength_that_leaves_no_step_is_refused(strength: float, steps: int, message: str | None) -> None:
    refused = strength_refusal(strength, steps)
    assert (refused and str(refused)) == message
