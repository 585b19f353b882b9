"""Failures among eight jobs of one lease, and a control map changed by hand, with a real worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdpipeline import audit, provenance
from sdpipeline.app import keys, services
from sdpipeline.domain import Json, request_from_document
from sdpipeline.engine import Batch, PreparedRequest
from sdpipeline.engine.annotators import annotate
from tests.integration.engine.test_failures import before_each_step, marked, too_many
from tests.integration.engine_requests import engine, image_of, noise
from tests.integration.worker_campaigns import PICTURE, Workplace, campaign, picture_file, workplace


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    with workplace(tmp_path_factory.mktemp("failures")) as found:
        found.approve("sd1", "controlnet-sd1")
        yield found


def eight(name: str, seed: int) -> dict[str, Any]:
    """A campaign of eight jobs that share a forward pass."""
    stage = {"id": "draft", "task": "text-to-image", "prompt": "a cat {{ n }}"}
    return campaign(name, "sd1", stage, variables={"n": list(range(8))}, seeds=[seed])


def finds_the_fourth(place: Workplace, name: str, seed: int) -> Any:
    """A function that finds the prompt of the job with n = 3 in a batch; that job is made once before."""
    (job,) = place.made(eight(name, seed) | {"variables": {"n": [3]}})
    return marked(engine(), PreparedRequest(request=request_from_document(_asked(place, job))))


def undisturbed(place: Workplace, job: Json) -> bool:
    """Return True if its pixels are those of a run without faults, in the bucket that its record names."""
    prepared = PreparedRequest(request=request_from_document(_asked(place, job)))
    made = image_of(engine().generate(Batch(requests=[prepared], bucket=place.ran(job)["bucket"]))[0])
    stored = provenance.decode(picture_file(job).read_bytes(), max_pixels=2**24)
    return bool((made.pixels == stored).all())


def _asked(place: Workplace, job: Json) -> Json:
    asked: Json = place.sidecar(job)["record"]["asked"]
    return asked


def the_fourth_alone_failed(place: Workplace, jobs: list[Json]) -> str:
    """The error of the fourth job. Every other job has its usual picture, made in a bucket of eight."""
    others = [job for job in jobs if job["variables"]["n"] != 3]
    assert len(others) == 7
    assert {place.ran(job)["bucket"] for job in others} == {8}
    assert all(undisturbed(place, job) for job in others)
    (fourth,) = (job for job in jobs if job["variables"]["n"] == 3)
    assert fourth["status"] == "failed"
    return str(fourth["error"])


@pytest.mark.long
def test_out_of_memory_at_eight_fails_nothing_and_the_records_name_the_smaller_bucket(tmp_path: Path) -> None:
    with workplace(tmp_path) as place:  # the engine may remember the limit
        place.approve("sd1")
        with before_each_step(place.engine, too_many(2)):
            jobs = place.made(eight("exhausted", 1))
        assert len(jobs) == 8
        ran = [place.ran(job) for job in jobs]
        assert {(each["bucket"], *each["fallbacks"]) for each in ran} == {(2, "bucket 2 instead of 8: out of memory")}
        assert all(undisturbed(place, job) for job in jobs)


def test_a_poison_job_among_eight_fails_alone_with_its_reason(place: Workplace) -> None:
    find = finds_the_fourth(place, "first-poison", 2)

    def refuse(_: torch.Tensor, prompts: torch.Tensor) -> None:
        if find(prompts):
            raise ValueError("a poisonous prompt")

    place.submit(eight("poisoned", 3))
    with before_each_step(place.engine, refuse):
        jobs = place.work("poisoned")
    reason = the_fourth_alone_failed(place, jobs)
    assert reason == "the pipeline refused it: ValueError: a poisonous prompt"


def test_latents_that_are_not_finite_fail_their_own_job_only(place: Workplace) -> None:
    find = finds_the_fourth(place, "first-spoiled", 4)

    def spoil(latents: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        latents = latents.clone()
        latents[find(prompts)] = torch.nan
        return latents

    place.submit(eight("spoiled", 5))
    with before_each_step(place.engine, spoil):
        jobs = place.work("spoiled")
    reason = the_fourth_alone_failed(place, jobs)
    assert reason == "the engine's picture is refused: its latents are not finite"


def test_a_control_map_is_kept_beside_its_picture_and_a_change_to_it_is_found(tmp_path: Path) -> None:
    with workplace(tmp_path) as place:
        place.approve("sd1", "controlnet-sd1")
        use = {"checkpoint": "controlnet-sd1", "image": {"file": PICTURE}, "annotator": "canny"}
        stage = {"id": "draft", "task": "text-to-image", "prompt": "a cat", "controlnets": [use]}
        (job,) = place.made(campaign("mapped", "sd1", stage))
        (kept,) = place.sidecar(job)["control_maps"]
        file = picture_file(job).parent / Path(kept["key"]).name
        assert (provenance.decode(file.read_bytes(), max_pixels=2**24) == annotate("canny", noise(), {})).all()
        assert _faults(place) == []
        file.chmod(0o644)
        file.write_bytes(np.random.default_rng(0).bytes(100))
        assert _faults(place) == [("object-altered", kept["key"])]
        file.unlink()
        assert _faults(place) == [("object-missing", kept["key"])]


def _faults(place: Workplace) -> list[tuple[str, str]]:
    with services.open_services(place.settings) as have:
        found = audit.verify(have.database, have.store, keys.seal_key(place.settings))
    return [(fault.kind, fault.subject) for fault in found.faults]
