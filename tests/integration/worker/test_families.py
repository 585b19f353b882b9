"""Every cell of the family table from a campaign file to a stored picture, through a real worker."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdpipeline.domain import Task
from sdpipeline.engine.checkpoints import inspect
from sdpipeline.engine.families import FAMILIES, Cell
from sdpipeline.errors import CampaignError
from tests.integration.engine.test_families import CONTROLNETS
from tests.integration.tiny_checkpoints import tiny_checkpoints
from tests.integration.worker_campaigns import MASK, PICTURE, Workplace, campaign, picture_size, workplace

Stage = dict[str, Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    with workplace(tmp_path_factory.mktemp("families")) as found:
        yield found


def stages_of(name: str) -> Iterator[tuple[Stage, Cell]]:
    """One stage for each cell of the family, and one more for a cell that takes several ControlNets."""
    row = FAMILIES[name]
    for task, cell in row.plain.items():
        yield _stage(name, task, 0), cell
    for task, cell in row.controlled.items():
        for controlnets in (1, 2)[: cell.max_controlnets]:
            yield _stage(name, task, controlnets), cell


def _stage(name: str, task: Task, controlnets: int) -> Stage:
    stage: Stage = {"id": f"{task}-{controlnets}", "task": str(task)}
    if FAMILIES[name].text != "none":
        stage["prompt"] = "a cat"
    if task is not Task.TEXT_TO_IMAGE:
        stage["image"] = {"file": PICTURE}
    if task is Task.INPAINTING:
        stage["mask_image"] = {"file": MASK}
    if controlnets:
        use = {"checkpoint": _controlnet(name, task), "image": {"file": PICTURE}}
        stage["controlnets"] = [use] * controlnets
    return stage


def _controlnet(name: str, task: Task) -> str:
    return "controlnet-sd3-inpaint" if (name, task) == ("sd3", Task.INPAINTING) else CONTROLNETS[name]


def _gan(place: Workplace, folder: Path) -> None:
    """A compact upscaler of factor 2 in a layout that spandrel reads."""
    shapes = {"0": (8, 3, 3, 3), "1": (8,), "2": (8, 8, 3, 3), "3": (8,), "4": (12, 8, 3, 3)}
    tensors = {f"body.{n}.weight": torch.randn(shape) * 0.1 for n, shape in shapes.items()}
    tensors |= {f"body.{n}.bias": torch.randn(shapes[n][0]) * 0.1 for n in ("0", "2", "4")}
    folder.mkdir()
    save_file(tensors, folder / "2x-tiny.safetensors")
    place.add(inspect("gan-upscale", folder))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gan-upscale"])
def test_every_cell_of_a_family_makes_its_picture_through_its_pipeline(name: str, place: Workplace) -> None:
    asked = list(stages_of(name))
    place.approve(name, *(use["checkpoint"] for stage, _ in asked for use in stage.get("controlnets", ())))
    jobs = {job["stage"]: job for job in place.made(campaign(name, name, *(stage for stage, _ in asked)))}
    assert {stage: place.ran(job)["pipeline"] for stage, job in jobs.items()} == {
        stage["id"]: cell.pipeline for stage, cell in asked
    }
    assert {place.ran(job)["family"] for job in jobs.values()} == {name}
    side = 64 * tiny_checkpoints().files(name).scale
    assert {picture_size(job) for job in jobs.values()} == {(side, side)}


def test_a_gan_upscaler_enlarges_or_names_the_extra_it_needs(place: Workplace, tmp_path: Path) -> None:
    _gan(place, tmp_path / "gan")
    ((stage, _),) = stages_of("gan-upscale")
    place.submit(campaign("gan-upscale", "gan-upscale", stage))
    (job,) = place.work("gan-upscale")
    if importlib.util.find_spec("spandrel") is None:
        assert job["status"] == "failed"
        assert "needs sdpipeline[upscalers] installed" in job["error"]
    else:
        assert (place.ran(job)["pipeline"], picture_size(job)) == ("spandrel", (128, 128))


MISSING = [
    (name, task, controlnets)
    for name, row in FAMILIES.items()
    for task in Task
    for controlnets in (0, 1)
    if not row.cell(task, controlnets=controlnets)
]


@pytest.mark.parametrize(("name", "task", "controlnets"), MISSING)
def test_a_cell_that_does_not_exist_is_refused_by_naming_the_nearest_that_does(
    name: str, task: Task, controlnets: int, place: Workplace, tmp_path: Path
) -> None:
    if name == "gan-upscale":
        _gan(place, tmp_path / "gan")
    else:
        place.approve(name)
    place.approve("controlnet-sd1")
    stage = _stage("sd1", task, controlnets) | {"prompt": "a cat"}
    with pytest.raises(CampaignError) as refused:
        place.submit(campaign(f"no-{name}", name, stage))
    assert f"{FAMILIES[name].title} has no {task}" in str(refused.value)
    assert "(nearest: " in str(refused.value)
