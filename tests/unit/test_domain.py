"""Fingerprints of requests and jobs: stored ones must keep their meaning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sdpipeline.batching import batch_key
from sdpipeline.domain import (
    AdapterInput,
    CheckpointRef,
    ControlNetInput,
    GenerationRequest,
    ImageSource,
    OutputFormat,
    Task,
    fingerprint,
    request_from_document,
    stage_seed,
    to_document,
)
from tests.factories import job_spec, request

RICH = GenerationRequest(
    task=Task.INPAINTING,
    checkpoint=CheckpointRef(alias="shapes", digest="c0" * 32),
    prompt='ein "roter" Kreis, 日本\n',
    negative_prompt="blurry",
    seed=2**63 - 1,
    width=64,
    height=128,
    num_inference_steps=7,
    guidance_scale=1.5,
    scheduler="ddim",
    strength=0.3,
    image=ImageSource(digest="aa" * 32),
    mask_image=ImageSource(digest="bb" * 32, stage="mask"),
    controlnets=(
        ControlNetInput(
            checkpoint=CheckpointRef(alias="canny", digest="cc" * 32),
            image=ImageSource(digest="dd" * 32, stage="draft"),
            annotator="canny",
            annotator_parameters=(("high", 200), ("low", 0.5)),
            controlnet_conditioning_scale=0.25,
        ),
    ),
    ip_adapters=(
        AdapterInput(checkpoint=CheckpointRef(alias="ip", digest="ee" * 32), image=ImageSource(digest="ff" * 32)),
    ),
    clip_skip=2,
    output=OutputFormat(format="jpeg", quality=90),
)


def test_a_fingerprint_is_the_same_in_every_release() -> None:
    assert fingerprint(request()) == "e26d17364c2c94d5fa97072405fc946a9ec2643ff8aac2e2e02c00065afe1de2"
    assert fingerprint(RICH) == "451c04fdd9121203f66897c72955eec3aab1092ed505f1ddc01120b5caa260fe"


def test_a_batch_key_is_the_same_in_every_release() -> None:
    assert batch_key(request()) == "6843d27cbc7824c8de2d9fe984bfc5c9bbf0dc0f969888705e73e52293441f7b"
    assert batch_key(RICH) == "72e33e7738eb828938523a51e11fe983b4bf7d479bdd88d6451920d6990016a6"


def test_an_identity_is_the_same_in_every_release() -> None:
    spec = replace(job_spec("sku-1", seed=3), axes=(("colour", "grün"), ("n", 1)))
    assert spec.identity == "90a3882514c075a62c5ecc8074ae881bb872e8deb98a0c5e6e983928908db10e"
    assert replace(spec, seed=4).identity != spec.identity
    assert stage_seed(3, "scene") == 3764220376376181725


def test_a_document_is_read_back_as_the_request_it_was() -> None:
    assert request_from_document(to_document(RICH)) == RICH
    assert request_from_document(to_document(request())) == request()


def test_an_alias_is_only_a_name() -> None:
    renamed = replace(request(), checkpoint=CheckpointRef(alias="renamed", digest="c0" * 32))
    assert fingerprint(renamed) == fingerprint(request())
    assert batch_key(renamed) == batch_key(request())


@pytest.mark.parametrize("change", [{"prompt": "x"}, {"seed": 1}, {"guidance_scale": 2.0}, {"negative_prompt": "x"}])
def test_what_may_differ_in_a_batch_changes_the_picture_but_not_the_batch(change: dict[str, Any]) -> None:
    changed = request(**change)
    assert fingerprint(changed) != fingerprint(request())
    assert batch_key(changed) == batch_key(request())
