"""Adapters of a checkpoint and reproducibility levels, from a campaign file to the stored record."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdpipeline import provenance
from sdpipeline.app import services
from sdpipeline.db import registry
from sdpipeline.domain import Json
from sdpipeline.errors import CampaignError, InputImageError
from sdpipeline.reporting import reproduce
from tests.integration.tiny_checkpoints import tiny_checkpoints
from tests.integration.worker_campaigns import PICTURE, Workplace, campaign, picture_file, workplace

DRAFT = {"id": "draft", "task": "text-to-image", "prompt": "a cat"}
LORAS = {"loras": [{"checkpoint": "lora-sd1", "weight": 0.5}, {"checkpoint": "lora-sd1-other", "weight": 1.0}]}
LIKENESS = {"ip_adapters": [{"checkpoint": "ip-adapter-sd1", "image": {"file": PICTURE}, "weight": 0.7}]}
WORD = {"textual_inversions": [{"checkpoint": "toy"}], "prompt": "a <toy>"}
DEPTH = {
    "checkpoint": "controlnet-sd1",
    "image": {"file": PICTURE},
    "annotator": "depth-learned",
    "annotator_checkpoint": "depth",
}
EVERYTHING = {**LORAS, **LIKENESS, **WORD, "vae": "vae", "clip_skip": 1, "controlnets": [DEPTH]}
USED = ["sd1", "controlnet-sd1", "lora-sd1", "lora-sd1-other", "toy", "ip-adapter-sd1", "vae", "depth"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    with workplace(tmp_path_factory.mktemp("adapters")) as found:
        found.approve(*USED, "vae-sdxl")
        yield found


@pytest.fixture(scope="module")
def plain(place: Workplace) -> str:
    """Digest of the pixels of a picture made without adapters."""
    return _pixels(place, _one(place, "plain"))


def _one(place: Workplace, name: str, **keys: Any) -> Json:
    (job,) = place.made(campaign(name, "sd1", DRAFT | keys))
    return job


def _pixels(place: Workplace, job: Json) -> str:
    return str(place.sidecar(job)["object"]["pixels_sha256"])


def _refused(place: Workplace, **keys: Any) -> str:
    with pytest.raises(CampaignError) as refused:
        place.submit(campaign("refused", "sd1", DRAFT | keys))
    return str(refused.value)


@pytest.mark.parametrize("keys", [LORAS, LIKENESS, WORD], ids=lambda keys: next(iter(keys)))
def test_what_is_worn_is_felt_and_recorded_with_its_digest_and_weight(
    keys: dict[str, Any], place: Workplace, plain: str
) -> None:
    key, uses = next(iter(keys.items()))
    job = _one(place, key.replace("_", "-"), **keys)
    recorded = [(use["alias"], use["digest"], use["weight"]) for use in place.ran(job)[key]]
    assert recorded == [
        (name := use["checkpoint"], tiny_checkpoints().files(name).digest, use.get("weight", 1.0)) for use in uses
    ]
    assert _pixels(place, job) != plain


def test_another_autoencoder_is_felt_and_recorded(place: Workplace, plain: str) -> None:
    job = _one(place, "decoder", vae="vae")
    assert [ref["alias"] for ref in place.ran(job)["checkpoints"]] == ["sd1", "vae"]
    assert _pixels(place, job) != plain


@pytest.mark.parametrize(
    ("keys", "recorded"),
    [
        ({"clip_skip": 1}, {"clip_skip": 1}),
        ({"prompt": "dog " * 100}, {"prompt_tokens": 154}),
        ({"reproducibility": "strict"}, {"reproducibility": "strict", "bucket": 1, "dtype": "float32"}),
        ({"profile": "fast"}, {"profile": {"name": "fast", "guidance_every": 2}}),
        ({"reproducibility": "tolerant"}, {"reproducibility": "tolerant"}),
    ],
    ids=["clip-skip", "long", "strict", "fast", "tolerant"],
)
def test_other_options_stand_in_the_record(
    keys: dict[str, Any], recorded: dict[str, Any], place: Workplace, request: pytest.FixtureRequest
) -> None:
    ran = place.ran(_one(place, request.node.callspec.id, **keys))
    assert {name: ran[name] for name in recorded} == recorded


def test_everything_at_once_comes_again_bit_by_bit_from_the_file_alone(place: Workplace) -> None:
    worn = EVERYTHING | {"id": "final", "task": "text-to-image", "reproducibility": "strict"}
    worn |= {"ip_adapters": [{"checkpoint": "ip-adapter-sd1", "image": {"stage": "draft"}}]}
    jobs = place.made(campaign("everything", "sd1", DRAFT, worn, seeds={"count": 2}))
    data = picture_file(jobs[-1]).read_bytes()
    record = reproduce.checked_record(provenance.read_record(data), "a picture")
    inputs = place.worker.worker.store
    again = reproduce.reproduce(
        record,
        place.engine,
        lambda about: inputs.get(about["key"]),
        original=provenance.decode(data, max_pixels=2**24),
        pixels_sha256=None,
    )
    assert (again.bit_equal, again.differences) == (True, [])


@pytest.mark.parametrize(("reproducibility", "batches"), [("strict", 5), ("tolerant", 2)])
def test_a_plan_counts_strict_pictures_as_batches_of_their_own(
    reproducibility: str, batches: int, place: Workplace
) -> None:
    asked = campaign("planned", "sd1", DRAFT, seeds={"count": 5}, reproducibility=reproducibility)
    assert place.plan(asked, max_batch=4).batches == batches


def test_jobs_of_other_steps_share_batches_under_a_profile_and_are_made_again_bit_by_bit(place: Workplace) -> None:
    draft = DRAFT | {"num_inference_steps": "{{ steps }}", "guidance_scale": "{{ guidance }}"}
    again = {"id": "again", "task": "image-to-image", "prompt": "a cat", "image": {"stage": "draft"}}
    variables = {"zip": {"steps": [2, 3, 5], "guidance": [1.0, 4.0, 6.0], "strength": [0.5, 0.7, 1.0]}}
    stages = (draft, again | {"strength": "{{ strength }}"})
    asked = campaign("mixed", "sd1", *stages, variables=variables, profile="turbo")
    assert place.plan(asked | {"profile": "exact"}, max_batch=8).batches == 6
    assert place.plan(asked, max_batch=8).batches == 2
    for job in place.made(asked):
        assert _again(place, job) == (True, [])


def _again(place: Workplace, job: Json) -> tuple[bool, list[Json]]:
    data = picture_file(job).read_bytes()
    record = reproduce.checked_record(provenance.read_record(data), "a picture")
    pixels = provenance.decode(data, max_pixels=2**20)
    made = reproduce.reproduce(record, place.engine, _no_input, original=pixels, pixels_sha256=None)
    return made.bit_equal, made.differences


def _no_input(about: Json) -> bytes:
    raise InputImageError(f"no input {about}")


def test_a_weight_may_be_another_for_each_row(place: Workplace) -> None:
    worn = {"loras": [{"checkpoint": "lora-sd1", "weight": "{{ felt }}"}]}
    jobs = place.made(campaign("felt", "sd1", DRAFT | worn, variables={"felt": [0.25, 0.75]}))
    assert [place.ran(job)["loras"][0]["weight"] for job in jobs] == [0.25, 0.75]


def test_a_textual_inversion_answers_to_its_alias_or_to_its_files_token_in_any_prompt(place: Workplace) -> None:
    worn = WORD | {"prompt": "a cat", "negative_prompt": "{{ avoided }}"}
    asked = campaign("avoided", "sd1", DRAFT | worn, variables={"avoided": ["<toy>", "a <cat-toy>", "a dog"]})
    with pytest.raises(CampaignError) as refused:
        place.submit(asked)
    (mistake,) = refused.value.mistakes
    assert (mistake.key, mistake.message, mistake.fix) == (
        "stages[0].textual_inversions[0]",
        "no prompt mentions it",
        "write <toy> where it is meant",
    )
    assert place.submit(asked | {"variables": {"avoided": ["<toy>", "a <cat-toy>"]}}) == 2


def test_an_autoencoder_of_other_latents_is_refused_by_its_configuration(place: Workplace) -> None:
    assert "vae: 'vae-sdxl' is for sdxl, whose latents differ from those of 'sd1'" in _refused(place, vae="vae-sdxl")


def test_jobs_keep_the_weights_they_were_pinned_to_when_the_alias_comes_to_mean_others(tmp_path: Path) -> None:
    with workplace(tmp_path) as before:
        before.add(replace(tiny_checkpoints().files("sd1"), alias="base"))
        before.submit(campaign("pinned", "base", DRAFT))
        before.add(replace(tiny_checkpoints().files("sdxl"), alias="base"))
    with workplace(tmp_path) as place:
        (job,) = place.work("pinned")
        assert (job["status"], job["error"]) == ("succeeded", None)
        assert place.ran(job)["checkpoints"][0]["digest"] == tiny_checkpoints().files("sd1").digest


@pytest.fixture
def folder_place(tmp_path: Path) -> Iterator[Workplace]:
    """A workplace whose checkpoints are all in the deployment's folder, without a registry."""
    with workplace(tmp_path) as found:
        folder = found.settings.checkpoints
        folder.mkdir(parents=True)
        for name in USED:
            (folder / name).symlink_to(tiny_checkpoints().directory(name))
        yield found


def test_every_checkpoint_a_campaign_uses_is_registered_and_revoking_any_blocks_it(folder_place: Workplace) -> None:
    asked = campaign("blocked", "sd1", DRAFT | EVERYTHING)
    folder_place.submit(asked)
    with services.open_services(folder_place.settings) as have:
        with have.database.read() as connection:
            assert {row["alias"] for row in registry.documents(connection)} == set(USED)
        for name in USED:
            folder_place.submit(asked | {"name": f"without-{name}"})
            with have.audit.transaction() as tx:
                registry.revoke(tx, tiny_checkpoints().files(name).digest, because="a test")
            assert [job["status"] for job in folder_place.jobs(f"without-{name}")] == ["blocked"]
            folder_place.add(tiny_checkpoints().files(name))
