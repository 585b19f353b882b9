"""What to do when a forward pass fails: fewer pictures, less memory each, and at last the culprit alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from sdpipeline.engine import GeneratedImage, GenerationFailure
from sdpipeline.engine.diffusers.pipeline_call import Member, PassSettings
from sdpipeline.errors import DeviceExhaustedError, RequestRefusedError

Result = GeneratedImage | GenerationFailure

FAULTS = (ValueError, TypeError, IndexError, RuntimeError)
"""What torch and diffusers raise for a request they cannot take; anything else ends the process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackLevel:
    """How a pass runs: padded to ``bucket``, with or without the means that cost time and save memory."""

    bucket: int
    asked: int
    tiling: bool = False
    offload: bool = False

    def fallbacks(self) -> list[str]:
        """As the record names them."""
        smaller = [f"bucket {self.bucket} instead of {self.asked}: out of memory"] if self.bucket < self.asked else []
        return [*smaller, *["VAE tiling"] * self.tiling, *["offload"] * self.offload]

    def next(self) -> FallbackLevel | None:
        """The next way down, ``None`` at the bottom."""
        if self.bucket > 1:
            return replace(self, bucket=self.bucket // 2)
        if not self.tiling:
            return replace(self, tiling=True)
        return None if self.offload else replace(self, offload=True)


class Ladder:
    """Runs passes, and remembers for each kind of pass how much the device can take."""

    def __init__(
        self,
        *,
        forward: Callable[[PassSettings, Sequence[Member], FallbackLevel], Sequence[Result]],
        free: Callable[[], None],
        spare: Callable[[], bool],
    ) -> None:
        """``spare`` has leave the device what no pass needs, and says whether anything did."""
        self._forward = forward
        self._free = free
        self._spare = spare
        self._learned: dict[PassSettings, FallbackLevel] = {}

    def run(self, settings: PassSettings, members: Sequence[Member], bucket: int) -> Iterator[tuple[Member, Result]]:
        """Every member with its result."""
        if settings.exact:
            # Bits differ a little from bucket to bucket, and which jobs meet in one is chance.
            yield from self._split(settings, members, FallbackLevel(bucket=1, asked=1))
            return
        learned = self._learned.get(settings)
        if learned is None or learned.bucket > bucket:
            rung = FallbackLevel(bucket=bucket, asked=bucket)
        else:
            rung = replace(learned, asked=bucket)
        yield from self._split(settings, members, rung)

    def _split(
        self, settings: PassSettings, members: Sequence[Member], rung: FallbackLevel
    ) -> Iterator[tuple[Member, Result]]:
        for start in range(0, len(members), rung.bucket):
            yield from self._attempt(settings, members[start : start + rung.bucket], rung)

    def _attempt(
        self, settings: PassSettings, members: Sequence[Member], rung: FallbackLevel
    ) -> Iterator[tuple[Member, Result]]:
        try:
            results = self._forward(settings, members, rung)
        except FAULTS as error:
            if _poisons_process(error):
                raise
            # Only the text survives: the traceback holds the tensors that have to go.
            exhausted, reason = _out_of_memory(error), f"{type(error).__name__}: {error}"
        else:
            yield from zip(members, results, strict=True)
            return
        spared = exhausted and self._spare()
        self._free()
        if spared:
            yield from self._attempt(settings, members, rung)  # no fallback: the picture has the same bits
        elif exhausted:
            yield from self._climb_down(settings, members, rung)
        else:
            yield from self._isolate(settings, members, rung, reason)

    def _climb_down(
        self, settings: PassSettings, members: Sequence[Member], rung: FallbackLevel
    ) -> Iterator[tuple[Member, Result]]:
        lower = None if settings.exact else rung.next()
        if lower is None:
            taken = "and reproducibility: strict allows no fallback" if settings.exact else "with every fallback taken"
            message = f"out of memory for one picture of {settings.width}x{settings.height}, {taken}"
            yield members[0], GenerationFailure(error=DeviceExhaustedError(message))
            return
        self._learned[settings] = lower
        yield from self._split(settings, members, lower)

    def _isolate(
        self, settings: PassSettings, members: Sequence[Member], rung: FallbackLevel, reason: str
    ) -> Iterator[tuple[Member, Result]]:
        """Halve until the culprit is alone; each part is padded to the same bucket, so neighbours keep their bits."""
        if len(members) == 1:
            yield members[0], GenerationFailure(error=RequestRefusedError(f"the pipeline refused it: {reason}"))
            return
        half = len(members) // 2
        for part in (members[:half], members[half:]):
            yield from self._attempt(settings, part, rung)


def _out_of_memory(error: Exception) -> bool:
    """The CPU's allocator has no exception of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _poisons_process(error: Exception) -> bool:
    """A failed kernel leaves the CUDA context unusable for everybody."""
    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)
