"""Pixel checks, conversions and mask compositing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from sdpipeline.engine import Pixels

FLAT = 2
BLACK = 8


def fault(pixels: Pixels) -> str | None:
    """Return the reason why this is not a picture, or ``None``. A flat picture is refused even if it was requested."""
    if int(pixels.max()) < BLACK:
        return "black"
    if int(np.ptp(pixels, axis=(0, 1)).max()) <= FLAT:
        return "flat"
    return None


def to_pixels(values: npt.NDArray[np.float32]) -> Pixels:
    """Convert a float picture from 0 to 1, height x width x 3, to 8 bits."""
    return np.asarray((np.clip(values, 0, 1) * 255).round(), dtype=np.uint8)


def to_pil(pixels: Pixels) -> Image.Image:
    """Convert to PIL, which pipelines take as input."""
    return Image.fromarray(pixels)


def repaint_region(mask: Pixels) -> npt.NDArray[np.bool_]:
    """Return the region to repaint: pixels at which the mask is white (at least half)."""
    return np.asarray(mask.max(axis=2) >= 128, dtype=np.bool_)


def paste_back(generated: Pixels, original: Pixels, mask: Pixels) -> Pixels:
    """Combine generated pixels inside the mask with the original's exact pixels outside."""
    return np.where(repaint_region(mask)[..., None], generated, original)
