"""Out-of-memory fallbacks and bisection of failed batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from sdpipeline.engine import GeneratedImage, GenerationFailure
from sdpipeline.engine.diffusers.batch import Member, PassSettings
from sdpipeline.errors import CheckpointError, DeviceExhaustedError, RequestRefusedError

Result = GeneratedImage | GenerationFailure

FAULTS = (ValueError, TypeError, IndexError, RuntimeError)
"""Exceptions that torch and diffusers raise for a bad request; any other exception ends the process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackLevel:
    """Settings of a pass that save memory: batch size (``bucket``, to which it is padded), VAE tiling and offload."""

    bucket: int
    asked: int
    tiling: bool = False
    offload: bool = False

    def fallbacks(self) -> list[str]:
        """Return the names of the fallbacks, as the record holds them."""
        smaller = [f"bucket {self.bucket} instead of {self.asked}: out of memory"] if self.bucket < self.asked else []
        return [*smaller, *["VAE tiling"] * self.tiling, *["offload"] * self.offload]

    def next(self) -> FallbackLevel | None:
        """Return the next level, which needs less memory; ``None`` if this is the last one."""
        if self.bucket > 1:
            return replace(self, bucket=self.bucket // 2)
        if not self.tiling:
            return replace(self, tiling=True)
        return None if self.offload else replace(self, offload=True)


class OomFallback:
    """Run forward passes, and remember for each :class:`PassSettings` the level that fits into the device's memory."""

    def __init__(
        self,
        *,
        forward: Callable[[PassSettings, Sequence[Member], FallbackLevel], Sequence[Result]],
        free: Callable[[], None],
        free_more: Callable[[], bool],
    ) -> None:
        """``free_more`` moves weights that no pass needs off the device, and returns True if it moved any."""
        self._forward = forward
        self._free = free
        self._free_more = free_more
        self._learned: dict[PassSettings, FallbackLevel] = {}

    def run(self, settings: PassSettings, members: Sequence[Member], bucket: int) -> Iterator[tuple[Member, Result]]:
        """Yield every member with its result."""
        if settings.exact:
            # Bits differ slightly between bucket sizes, and it is chance which jobs share a batch.
            yield from self._split(settings, members, FallbackLevel(bucket=1, asked=1))
            return
        learned = self._learned.get(settings)
        if learned is None or learned.bucket > bucket:
            level = FallbackLevel(bucket=bucket, asked=bucket)
        else:
            level = replace(learned, asked=bucket)
        yield from self._split(settings, members, level)

    def _split(
        self, settings: PassSettings, members: Sequence[Member], level: FallbackLevel
    ) -> Iterator[tuple[Member, Result]]:
        for start in range(0, len(members), level.bucket):
            yield from self._attempt(settings, members[start : start + level.bucket], level)

    def _attempt(
        self, settings: PassSettings, members: Sequence[Member], level: FallbackLevel
    ) -> Iterator[tuple[Member, Result]]:
        try:
            results = self._forward(settings, members, level)
        except CheckpointError as error:  # an adapter that does not fit the checkpoint; all members use it
            yield from ((member, GenerationFailure(error=error)) for member in members)
            return
        except FAULTS as error:
            if _poisons_process(error):
                raise
            # Keep only the text: the traceback holds references to the tensors that have to be freed.
            exhausted, reason = _out_of_memory(error), f"{type(error).__name__}: {error}"
        else:
            yield from zip(members, results, strict=True)
            return
        freed = exhausted and self._free_more()
        self._free()
        if freed:
            yield from self._attempt(settings, members, level)  # no fallback: the picture has the same bits
        elif exhausted:
            yield from self._fall_back(settings, members, level)
        else:
            yield from self._isolate(settings, members, level, reason)

    def _fall_back(
        self, settings: PassSettings, members: Sequence[Member], level: FallbackLevel
    ) -> Iterator[tuple[Member, Result]]:
        lower = None if settings.exact else level.next()
        if lower is None:
            taken = "and reproducibility: strict allows no fallback" if settings.exact else "with every fallback taken"
            message = f"out of memory for one picture of {settings.width}x{settings.height}, {taken}"
            yield members[0], GenerationFailure(error=DeviceExhaustedError(message))
            return
        self._learned[settings] = lower
        yield from self._split(settings, members, lower)

    def _isolate(
        self, settings: PassSettings, members: Sequence[Member], level: FallbackLevel, reason: str
    ) -> Iterator[tuple[Member, Result]]:
        """Bisect the batch until the failing request is alone.

        Each part is padded to the same bucket, so that the other pictures keep their bits.
        """
        if len(members) == 1:
            yield members[0], GenerationFailure(error=RequestRefusedError(f"the pipeline refused it: {reason}"))
            return
        half = len(members) // 2
        for part in (members[:half], members[half:]):
            yield from self._attempt(settings, part, level)


def _out_of_memory(error: Exception) -> bool:
    """Return True if the device is out of memory. The CPU's allocator has no exception type of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _poisons_process(error: Exception) -> bool:
    """Return True for a failed kernel, which leaves the CUDA context unusable for the whole process."""
    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)
