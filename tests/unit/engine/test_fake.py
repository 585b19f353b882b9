from __future__ import annotations

import subprocess
import sys
from typing import Any

from sdpipeline.domain import CheckpointRef, GenerationRequest, Task
from sdpipeline.engine import Batch, Engine, GeneratedImage, GenerationFailure, PreparedRequest
from sdpipeline.engine.fake import FakeEngine
from sdpipeline.engine.pixels import fault


def asked(**changes: Any) -> PreparedRequest:
    given: dict[str, Any] = {
        "task": Task.TEXT_TO_IMAGE,
        "checkpoint": CheckpointRef(alias="a", digest="d"),
        "prompt": "a cat",
        "seed": 1,
        "width": 64,
        "height": 48,
        "num_inference_steps": 2,
        "guidance_scale": 4.0,
        "scheduler": "ddim",
    }
    return PreparedRequest(request=GenerationRequest(**given | changes))


def made(engine: Engine, *requests: PreparedRequest) -> list[GeneratedImage]:
    return [r for r in engine.generate(Batch(requests=requests, bucket=8)) if isinstance(r, GeneratedImage)]


def test_the_same_request_gives_the_same_picture_in_any_batch() -> None:
    first, second = made(FakeEngine(), asked(), asked(seed=2))
    assert (made(FakeEngine(), asked(seed=2))[0].pixels == second.pixels).all()
    assert (first.pixels != second.pixels).any()


def test_its_pictures_pass_for_pictures_of_the_size_asked_for() -> None:
    image = made(FakeEngine(), asked())[0]
    assert image.pixels.shape == (48, 64, 3)
    assert fault(image.pixels) is None


def test_super_resolution_enlarges() -> None:
    assert made(FakeEngine(scale=2), asked(task=Task.SUPER_RESOLUTION))[0].pixels.shape == (96, 128, 3)


def test_it_records_bucket_slot_and_seed() -> None:
    second = made(FakeEngine(), asked(), asked(seed=9))[1]
    assert (second.ran["bucket"], second.ran["slot"], second.ran["seed"]) == (8, 1, 9)


def test_poison_fails_alone() -> None:
    results = FakeEngine(poison=["dog"]).generate(Batch(requests=[asked(), asked(prompt="a dog")], bucket=2))
    assert isinstance(results[0], GeneratedImage)
    assert isinstance(results[1], GenerationFailure)


def test_it_names_the_checkpoints_it_pretends_to_hold() -> None:
    engine = FakeEngine()
    made(engine, asked())
    assert engine.resident() == {"d"}


def test_planning_imports_neither_torch_nor_diffusers() -> None:
    modules = "annotators, checkpoints, fake, families, pictures, record"
    program = (
        f"import sys; from sdpipeline.engine import {modules}; print({{'torch', 'diffusers'}} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
