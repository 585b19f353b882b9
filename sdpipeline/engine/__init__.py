"""Engine protocol, with the diffusers engine and a fake engine for load tests and dry runs as implementations.

This module, ``families`` and ``checkpoints`` import no torch, so that a machine without the
``[engine]`` extra can plan, submit and dispatch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from sdpipeline.domain import CheckpointRef, GenerationRequest, Json
from sdpipeline.errors import SdpError

if TYPE_CHECKING:  # commands that touch no pixels import this package too
    import numpy as np
    import numpy.typing as npt

# If torchao is installed, diffusers and peft import it even without quantization. Each start would then log warnings
# about parts that neither needs: kernels for other devices, names of an older torchao.
for _name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(_name).setLevel(logging.ERROR)

Pixels: TypeAlias = "npt.NDArray[np.uint8]"
"""A picture: height x width x 3, RGB, 0-255."""

Calls = Sequence[Sequence[int]]
"""Network calls that a picture shared, as pairs: number of rows, number of consecutive calls. A row is one input of
the network: the picture's own, another picture's or padding. Bits depend on the number of rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRequest:
    """A request with its decoded input pictures, by the roles of ``GenerationRequest.sources``.

    ``calls`` are given if the picture is reproduced and its record has some. ``recorded`` is then the record's ``ran``,
    whose scheduler configuration is used as it is. It is untrusted.
    """

    request: GenerationRequest
    images: Mapping[str, Pixels] = field(default_factory=dict)
    calls: Calls = ()
    recorded: Json | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Requests of one batch key that share a forward pass, padded to ``bucket`` (a power of two)."""

    requests: Sequence[PreparedRequest]
    bucket: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedImage:
    """A finished picture with the parameters that actually ran.

    ``ran`` is JSON and goes into the record: at least seed, checkpoint digests, scheduler with its
    config, dtype, device kind, bucket, slot, fallbacks taken, and library versions.
    ``control_maps`` holds one map per ControlNet.
    """

    pixels: Pixels
    ran: Json
    control_maps: Sequence[Pixels] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationFailure:
    """Error of one request of a batch; the other requests are not affected."""

    error: SdpError


class Engine(Protocol):
    """Generate pictures from batches. Only ``prefetch_weights`` may be called from a second thread."""

    def generate(self, batch: Batch) -> Sequence[GeneratedImage | GenerationFailure]:
        """Return one result per request, in order.

        A request's own error is returned as a GenerationFailure, not raised. An unknown exception means that
        the process cannot be trusted any more, and ends it.
        """

    def prefetch_weights(self, ref: CheckpointRef) -> None:
        """Have the operating system read a checkpoint's files ahead; called from another thread.

        It must not touch the device. What is wrong with the files is reported when they are loaded.
        """

    def flagged(self, checker: CheckpointRef, pictures: Sequence[Pixels]) -> Sequence[bool]:
        """Return True for each picture that the safety checker flags.

        Raises CheckpointError or DeviceExhaustedError if it cannot check: then none of the pictures may be stored.
        """

    def resident(self) -> frozenset[str]:
        """Return the digests of the checkpoints that are loaded now."""

    def describe(self) -> dict[str, Any]:
        """Return device, dtype and library versions, for the worker's row and for ``doctor``."""
