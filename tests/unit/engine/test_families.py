from __future__ import annotations

from itertools import product

import pytest

from sdpipeline.domain import Task
from sdpipeline.engine.families import FAMILIES, SCHEDULERS, refusal, scheduler_refusal, size_multiple, table


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_row_lists_is_not_refused(name: str) -> None:
    row = FAMILIES[name]
    assert all(refusal(name, task) is None for task in row.plain)
    assert all(refusal(name, task, controlnets=1) is None for task in row.controlled)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_other_combination_is_refused_with_one_that_exists(name: str) -> None:
    for task, controlnets in product(Task, [0, 1, 2, 99]):
        reason = refusal(name, task, controlnets=controlnets)
        assert reason is None or "; nearest: " in reason


def test_a_refusal_names_the_nearest_combination() -> None:
    assert refusal("sd3", Task.IMAGE_TO_IMAGE, controlnets=1) == (
        "Stable Diffusion 3 has no image-to-image with a ControlNet; nearest: text-to-image with a ControlNet "
        "through StableDiffusion3ControlNetPipeline"
    )


def test_an_unknown_family_is_refused_with_those_there_are() -> None:
    assert "known families: sd1, sd2" in str(refusal("sd9", Task.TEXT_TO_IMAGE))


def test_flow_and_noise_schedulers_do_not_mix() -> None:
    assert scheduler_refusal("sd3", "flow-match-euler") is None
    assert "use one of flow-match-euler" in str(scheduler_refusal("flux", "ddim"))
    assert "(unknown)" in str(scheduler_refusal("sd1", "k-euler"))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_default_scheduler_suits_its_family(name: str) -> None:
    assert scheduler_refusal(name, FAMILIES[name].scheduler) is None


def test_the_table_in_words_has_a_line_for_each_family_and_task() -> None:
    cells = sum(len(row.plain.keys() | row.controlled.keys()) for row in FAMILIES.values())
    assert len(table().splitlines()) == cells + 2
    assert "| Flux (`flux`) | inpainting | FluxInpaintPipeline | FluxControlNetInpaintPipeline |" in table()


def test_the_usual_schedulers_are_there() -> None:
    usual = {"ddim", "ddpm", "euler", "euler-ancestral", "dpmpp-2m", "dpmpp-2m-karras", "unipc", "heun", "lcm"}
    assert usual | {"flow-match-euler"} <= SCHEDULERS.keys()


def test_sizes_are_multiples_of_what_the_family_packs() -> None:
    assert (size_multiple("sd1"), size_multiple("flux"), size_multiple("latent-upscale")) == (8, 16, 64)
