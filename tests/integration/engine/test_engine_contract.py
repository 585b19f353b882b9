"""Contract of the engines, run on every implementation."""

from __future__ import annotations

import json

import pytest

from sdpipeline.engine import Batch, Engine, GeneratedImage, GenerationFailure
from sdpipeline.engine.fake import FakeEngine
from tests.integration.engine_requests import controlnet, image_of, new_engine, noise, prepared, request

ENGINES = ["fake", "diffusers"]


@pytest.fixture(scope="module", params=ENGINES)
def on(request: pytest.FixtureRequest) -> Engine:
    return FakeEngine() if request.param == "fake" else new_engine()


def test_there_is_one_result_per_request_in_order(on: Engine) -> None:
    results = on.generate(Batch(requests=[prepared(request(seed=n)) for n in (7, 3, 5)], bucket=4))
    assert [image_of(result).ran["seed"] for result in results] == [7, 3, 5]
    assert [image_of(result).ran["slot"] for result in results] == [0, 1, 2]


def test_the_same_request_gives_the_same_bits_in_the_same_bucket(on: Engine) -> None:
    pair = on.generate(Batch(requests=[prepared(request(seed=1)), prepared(request(seed=2))], bucket=2))
    alone = on.generate(Batch(requests=[prepared(request(seed=2))], bucket=2))
    assert (image_of(pair[1]).pixels == image_of(alone[0]).pixels).all()


def test_a_request_that_cannot_run_fails_alone(on: Engine) -> None:
    unknown = prepared(
        request(controlnets=(controlnet("controlnet-sd1", annotator="nonsense"),)), controlnets_0=noise()
    )
    results = on.generate(Batch(requests=[unknown, prepared(request())], bucket=2))
    assert isinstance(results[0], GenerationFailure)
    assert isinstance(results[1], GeneratedImage)


def test_control_maps_come_back_one_per_controlnet(on: Engine) -> None:
    asked = prepared(request(controlnets=(controlnet("controlnet-sd1", annotator="canny"),)), controlnets_0=noise())
    made = image_of(on.generate(Batch(requests=[asked], bucket=1))[0])
    assert [one.shape for one in made.control_maps] == [(64, 64, 3)]


def test_what_ran_is_json_with_the_keys_that_a_record_needs(on: Engine) -> None:
    ran = image_of(on.generate(Batch(requests=[prepared(request())], bucket=1))[0]).ran
    needed = {"engine", "task", "family", "pipeline", "checkpoints", "seed", "scheduler", "device", "dtype", "bucket"}
    assert needed | {"slot", "fallbacks", "libraries"} <= ran.keys()
    assert json.loads(json.dumps(ran, allow_nan=False)) == ran


def test_it_says_what_it_holds_and_what_it_is(on: Engine) -> None:
    on.generate(Batch(requests=[prepared(request())], bucket=1))
    assert request().checkpoint.digest in on.resident()
    assert {"engine", "device", "device_name", "dtype", "libraries"} <= on.describe().keys()
