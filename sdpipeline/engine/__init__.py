"""What makes pictures: one protocol, the real diffusers engine, and a double for load tests and dry runs.

This module, ``families`` and ``checkpoints`` import no torch, so that a machine without the
``[engine]`` extra can plan, submit and dispatch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sdpipeline.domain import CheckpointRef, GenerationRequest, Json
from sdpipeline.errors import SdpError

# Where torchao is installed, diffusers and peft import it though nobody quantizes, and each start would tell of what
# neither needs: kernels for other devices, names of an older torchao.
for _name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(_name).setLevel(logging.ERROR)

Pixels = npt.NDArray[np.uint8]
"""A picture: height x width x 3, RGB, 0-255."""

Calls = Sequence[Sequence[int]]
"""The network calls a picture took part in, as pairs: of so many rows, so many times one after another. A row is
one input of the network, the picture's own, its neighbours' or padding; bits depend on how many there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRequest:
    """A request with the pictures it consumes, decoded, by the roles of ``GenerationRequest.sources``.

    ``calls`` are given for a picture that is made again, where its record has some.
    """

    request: GenerationRequest
    images: Mapping[str, Pixels] = field(default_factory=dict)
    calls: Calls = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Requests of one batch key that share a forward pass, padded to ``bucket`` (a power of two)."""

    requests: Sequence[PreparedRequest]
    bucket: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedImage:
    """A finished picture and what actually ran to make it.

    ``ran`` is JSON and goes into the record: at least seed, checkpoint digests, scheduler with its
    config, dtype, device kind, bucket, slot, fallbacks taken, and library versions.
    ``control_maps`` are the maps that steered it, one per ControlNet.
    """

    pixels: Pixels
    ran: Json
    control_maps: Sequence[Pixels] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationFailure:
    """Why one request of a batch has no picture; its neighbours are not touched."""

    error: SdpError


class Engine(Protocol):
    """Turns batches into pictures. Called from one thread only, but for ``prepare``."""

    def generate(self, batch: Batch) -> Sequence[GeneratedImage | GenerationFailure]:
        """One result per request, in order.

        Raises nothing for a request's own fault: that is a GenerationFailure. An unknown exception
        means the process is not to be trusted any more and ends it.
        """

    def prepare(self, requests: Sequence[GenerationRequest]) -> None:
        """Told by another thread what comes next: what can be done for it beside a batch that is being made.

        It may wait for that batch. What cannot be done ahead is left to ``generate``, a request's fault too.
        """

    def flagged(self, checker: CheckpointRef, pictures: Sequence[Pixels]) -> Sequence[bool]:
        """Which of these pictures a safety checker objects to.

        Raises CheckpointError or DeviceExhaustedError where it cannot tell: then none of them may be stored.
        """

    def resident(self) -> frozenset[str]:
        """Digests of the checkpoints that are loaded now."""

    def describe(self) -> dict[str, Any]:
        """Device, dtype and library versions, for the worker's row and for ``doctor``."""
