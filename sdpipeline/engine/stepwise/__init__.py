"""Optional shortcuts of the diffusers engine: call batching, caches, compilation, quantization.

:class:`Stepwise` is the only way in. Without a setting that asks for it, it is imported for the first picture whose
profile is not ``exact``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import torch

from sdpipeline.domain import Json, Profile
from sdpipeline.engine.diffusers.batch import Denoised, Latents, Member, PassSettings, Weights, padded
from sdpipeline.engine.diffusers.loading import Variant
from sdpipeline.engine.stepwise.compile import AppliedSpeedups, Speedups, check_compiler
from sdpipeline.engine.stepwise.profiles import PROFILES, Shortcuts
from sdpipeline.engine.stepwise.quantization import check as check_quantization
from sdpipeline.engine.stepwise.quantization import library_of, quantize
from sdpipeline.engine.stepwise.stepwise_denoising import denoise_stepwise

__all__ = ["Shortcuts", "Speedups", "Stepwise", "check_compiler", "check_quantization"]


class Stepwise:
    """Denoise batches of every profile but ``exact``, with the speedups that the deployment allows."""

    def __init__(self, speedups: Speedups | None = None, *, profiles: Mapping[Profile, Shortcuts] = PROFILES) -> None:
        self._speedups = speedups or Speedups()
        self._profiles = profiles
        self._applied = AppliedSpeedups(self._speedups)

    @property
    def variant(self) -> Variant | None:
        """Change of the denoiser that these pictures need, if any."""
        wanted = self._speedups.quantize
        return Variant(name=wanted, change=partial(quantize, wanted=wanted)) if wanted else None

    def shared(self, settings: PassSettings) -> PassSettings:
        """Return the settings that pictures still have to share if their pipelines run in lockstep."""
        controlnets = tuple((ref, 0.0, 1.0) for ref, _, _ in settings.controlnets)
        return replace(
            settings,
            controlnets=controlnets,
            scheduler="",
            scheduler_config=None,
            num_inference_steps=0,
            strength=None,
            guided=False,
            prompt_tokens=0,
        )

    def applied(self, weights: Weights) -> AbstractContextManager[None]:
        """Apply the speedups to the networks of one pass."""
        return self._applied.applied(weights)

    def suspended(self, weights: Weights) -> AbstractContextManager[None]:
        """Leave the networks of one exact pass as they were loaded."""
        return self._applied.suspended(weights)

    def denoise(
        self,
        weights: Weights,
        settings: PassSettings,
        members: Sequence[Member],
        bucket: int,
        *,
        offload_to: torch.device | None = None,
    ) -> Denoised:
        """Denoise these members, in order; see :func:`sdpipeline.engine.diffusers.pipeline_call.denoise`."""
        shortcuts = self._profiles[settings.profile]
        latents = denoise_stepwise(weights, members, shortcuts, offload_to=offload_to)
        size = min(bucket, self._speedups.decode_batch or bucket)
        parts = [latents[start : start + size] for start in range(0, len(latents), size)]
        return Denoised(latents=latents, batches=[_joined(part, size) for part in parts], decode_batch=size)

    def document(self, profile: Profile) -> Json:
        """Return what a profile skips and the speedups that may change bits, for a picture's record."""
        return self._profiles[profile].document() | self._speedups.document()

    def speedups(self) -> Json:
        """Return the speedups that may change bits, for the worker's row and for ``doctor``."""
        return self._speedups.document()

    def libraries(self) -> Mapping[str, str]:
        """Return the versions of further libraries that determine these pictures."""
        return library_of(self._speedups.quantize)


def _joined(latents: Sequence[Latents], size: int) -> torch.Tensor:
    """Join latents of single pictures into one batch, padded with copies of the last."""
    return torch.cat(padded([each.values for each in latents], size)).contiguous()
