"""Fake engine without torch for load tests and dry runs: deterministic pictures from a request's fingerprint."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from sdpipeline.domain import CheckpointRef, GenerationRequest, Task, fingerprint
from sdpipeline.engine import Batch, GeneratedImage, GenerationFailure, Pixels, PreparedRequest
from sdpipeline.engine.annotators import annotate
from sdpipeline.engine.record import Setting, library_versions, ran
from sdpipeline.errors import CheckpointError, RequestRefusedError, SdpError

BLOCKS = 8


class FakeEngine:
    """:class:`sdpipeline.engine.Engine` whose pixels depend only on the request, in any batch.

    Requests with one of ``poison`` in the prompt fail alone, as in the real engine. ``scale`` is the factor
    of super-resolution.
    """

    def __init__(self, *, seconds_per_batch: float = 0.0, poison: Collection[str] = (), scale: int = 4) -> None:
        self._seconds_per_batch = seconds_per_batch
        self._poison = tuple(poison)
        self._scale = scale
        self._resident: frozenset[str] = frozenset()
        self._libraries = library_versions()

    def generate(self, batch: Batch) -> Sequence[GeneratedImage | GenerationFailure]:
        """Return one result per request, in order."""
        time.sleep(self._seconds_per_batch)
        return [self._result(prepared, slot, batch.bucket) for slot, prepared in enumerate(batch.requests)]

    def prefetch_weights(self, ref: CheckpointRef) -> None:
        """Do nothing: the fake engine loads no weights."""

    def flagged(self, checker: CheckpointRef, pictures: Sequence[Pixels]) -> Sequence[bool]:  # noqa: ARG002
        """Raise CheckpointError: the fake engine runs no network, so its pictures must not count as checked."""
        raise CheckpointError(f"safety checker {checker.alias!r}: the fake engine runs no network")

    def resident(self) -> frozenset[str]:
        """Return the digests of the checkpoints of the last batch."""
        return self._resident

    def describe(self) -> dict[str, Any]:
        """Return the same fields as the real engine, with a placeholder for the device."""
        return {
            "engine": "fake",
            "device": "none",
            "device_name": "none",
            "dtype": "uint8",
            "libraries": self._libraries,
        }

    def _result(self, prepared: PreparedRequest, slot: int, bucket: int) -> GeneratedImage | GenerationFailure:
        request = prepared.request
        self._resident = frozenset(ref.digest for ref in request.checkpoints())
        if any(word in request.prompt for word in self._poison):
            return GenerationFailure(
                error=RequestRefusedError("prompt: it contains a word that makes the fake engine fail")
            )
        try:
            maps = tuple(
                annotate(use.annotator, prepared.images[f"controlnets.{n}"], dict(use.annotator_parameters))
                for n, use in enumerate(request.controlnets)
            )
        except SdpError as error:
            return GenerationFailure(error=error)
        setting = Setting(
            engine="fake",
            family="fake",
            pipeline="FakeEngine",
            scheduler={"name": request.scheduler},
            device="none",
            dtype="uint8",
            bucket=bucket,
            libraries=self._libraries,
        )
        factor = self._scale if request.task is Task.SUPER_RESOLUTION else 1
        return GeneratedImage(pixels=_picture(request, factor), ran=ran(request, setting, slot=slot), control_maps=maps)


def _picture(request: GenerationRequest, factor: int) -> Pixels:
    """Draw blocks of colour that the request's fingerprint determines."""
    width, height = request.width * factor, request.height * factor
    noise = np.random.default_rng(int(fingerprint(request), 16))
    blocks = noise.integers(0, 256, (BLOCKS, BLOCKS, 3), dtype=np.uint8)
    blocks[0, 0], blocks[-1, -1] = 0, 255  # never flat, for any fingerprint
    rows = np.arange(height) * BLOCKS // height
    columns = np.arange(width) * BLOCKS // width
    return blocks[rows[:, None], columns[None, :]]
