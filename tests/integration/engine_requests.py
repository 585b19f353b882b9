"""Requests, pictures and batches for tests of the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import cv2
import numpy as np

from sdpipeline.domain import AdapterInput, CheckpointRef, ControlNetInput, GenerationRequest, ImageSource, Task
from sdpipeline.engine import Batch, GeneratedImage, GenerationFailure, Pixels, PreparedRequest
from sdpipeline.engine.diffusers.engine import DiffusersEngine
from sdpipeline.engine.families import FAMILIES
from tests.integration.tiny_checkpoints import TinyCheckpoints, tiny_checkpoints

SOURCE = ImageSource(digest="0" * 64)
TINY_SIZE = 64


@cache
def engine() -> DiffusersEngine:
    """A shared engine on the CPU for all tests that do not change it: checkpoints load once."""
    return new_engine()


def new_engine(tiny: TinyCheckpoints | None = None, **options: Any) -> DiffusersEngine:
    given: dict[str, Any] = {"device": "cpu", "dtype": None, "locate": (tiny or tiny_checkpoints()).locate}
    return DiffusersEngine(**given | options)


def ref(name: str) -> CheckpointRef:
    return tiny_checkpoints().ref(name)


def request(checkpoint: str = "sd1", **changes: Any) -> GenerationRequest:
    """A request of few steps on a tiny checkpoint, with its family's default scheduler."""
    family = FAMILIES[tiny_checkpoints().files(checkpoint).family]
    size = 32 if family.name == "upscale" else max(TINY_SIZE, family.size_multiple)
    given: dict[str, Any] = {
        "task": Task.TEXT_TO_IMAGE,
        "checkpoint": ref(checkpoint),
        "prompt": "a cat",
        "seed": 0,
        "width": size,
        "height": size,
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "scheduler": family.scheduler,
    }
    return GenerationRequest(**given | changes)


def controlnet(name: str, **changes: Any) -> ControlNetInput:
    given: dict[str, Any] = {"checkpoint": ref(name), "image": SOURCE}
    return ControlNetInput(**given | changes)


def adapter(name: str, **changes: Any) -> AdapterInput:
    given: dict[str, Any] = {"checkpoint": ref(name)}
    return AdapterInput(**given | changes)


def noise(seed: int = 0, size: int = TINY_SIZE) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def disc(colour: tuple[int, int, int] = (220, 38, 38), ground: tuple[int, int, int] = (245, 245, 245)) -> Pixels:
    """A drawn disc, 128 x 128 pixels."""
    canvas = np.full((128, 128, 3), ground, np.uint8)
    return np.asarray(cv2.circle(canvas, (60, 66), 30, colour, -1, cv2.LINE_AA), dtype=np.uint8)


def middle_mask(size: int = TINY_SIZE) -> Pixels:
    mask = np.zeros((size, size, 3), np.uint8)
    mask[size // 4 : -size // 4, size // 4 : -size // 4] = 255
    return mask


def prepared(asked: GenerationRequest, **images: Pixels) -> PreparedRequest:
    """A request with pictures by role; ``controlnets_0`` stands for ``controlnets.0``."""
    return PreparedRequest(
        request=asked, images={role.replace("_0", ".0").replace("_1", ".1"): p for role, p in images.items()}
    )


def results(
    *asked: PreparedRequest, bucket: int | None = None, on: DiffusersEngine | None = None
) -> Sequence[GeneratedImage | GenerationFailure]:
    size = bucket or 1 << (len(asked) - 1).bit_length()
    return (on or engine()).generate(Batch(requests=asked, bucket=size))


def images(
    *asked: PreparedRequest, bucket: int | None = None, on: DiffusersEngine | None = None
) -> list[GeneratedImage]:
    """The pictures of these requests; raises if one failed."""
    found = results(*asked, bucket=bucket, on=on)
    return [image_of(result) for result in found]


def image_of(result: GeneratedImage | GenerationFailure) -> GeneratedImage:
    if isinstance(result, GenerationFailure):
        raise result.error
    return result


def failure_of(result: GeneratedImage | GenerationFailure) -> str:
    """The type of the error and its message."""
    assert isinstance(result, GenerationFailure), "a picture came out where a failure was expected"
    return f"{type(result.error).__name__}: {result.error}"


def equal(one: GeneratedImage | Mapping[str, Any], other: GeneratedImage | Mapping[str, Any]) -> bool:
    assert isinstance(one, GeneratedImage)
    assert isinstance(other, GeneratedImage)
    return bool((one.pixels == other.pixels).all())


def distance(one: GeneratedImage, other: GeneratedImage) -> int:
    """The largest difference in any channel of any pixel, 0-255."""
    return int(np.abs(one.pixels.astype(int) - other.pixels.astype(int)).max())
