"""VAE decoding of latents, with a float32 retry for pictures that fail the checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sdpipeline.engine import Pixels
from sdpipeline.engine.diffusers.batch import PassSettings, Weights
from sdpipeline.engine.diffusers.pipeline_call import decode
from sdpipeline.engine.pixels import fault, to_pixels

FLOAT32_DECODE = "float32 decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """A decoded picture or the reason why it was refused, with the fallbacks taken."""

    pixels: Pixels | None
    fault: str | None = None
    fallbacks: tuple[str, ...] = ()


def decode_checked(weights: Weights, settings: PassSettings, latents: torch.Tensor) -> list[Decoded]:
    """Decode a batch of latents, one result for each. Latents that fail to decode are decoded again in float32."""
    finite = [bool(torch.isfinite(each).all()) for each in latents]
    # The batch keeps its shape, so that one picture's bits do not depend on how many others can be decoded.
    usable = torch.where(_per_picture(finite, latents), latents, 0)
    decoded = [
        picture if ok else Decoded(pixels=None, fault="its latents are not finite")
        for ok, picture in zip(finite, _decoded(weights, settings, usable), strict=True)
    ]
    if weights.autoencoder.dtype == torch.float32 or all(
        d.fault is None for d, ok in zip(decoded, finite, strict=True) if ok
    ):
        return decoded
    again = _decoded(weights, settings, usable, float32=True)
    return [new if ok and old.fault else old for ok, old, new in zip(finite, decoded, again, strict=True)]


def _decoded(weights: Weights, settings: PassSettings, values: torch.Tensor, *, float32: bool = False) -> list[Decoded]:
    taken = (FLOAT32_DECODE,) if float32 else ()
    decoded = []
    for picture in decode(weights, values, statistics=settings.latent_statistics, float32=float32):
        if not np.isfinite(picture).all():
            decoded.append(Decoded(pixels=None, fault="it decodes to values that are not finite", fallbacks=taken))
            continue
        pixels = to_pixels(picture)
        reason = fault(pixels)
        decoded.append(
            Decoded(pixels=None if reason else pixels, fault=f"it is {reason}" if reason else None, fallbacks=taken)
        )
    return decoded


def _per_picture(flags: Sequence[bool], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(flags, device=like.device).view(-1, *[1] * (like.ndim - 1))
