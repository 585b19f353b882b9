"""What makes an array of pixels a picture worth keeping, and how generated and given pixels meet."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from sdpipeline.engine import Pixels

FLAT = 2
BLACK = 8


def fault(pixels: Pixels) -> str | None:
    """Why this is not a picture; ``None`` if it is. Even a picture that was asked to be flat is refused."""
    if int(pixels.max()) < BLACK:
        return "black"
    if int(np.ptp(pixels, axis=(0, 1)).max()) <= FLAT:
        return "flat"
    return None


def to_pixels(values: npt.NDArray[np.float32]) -> Pixels:
    """A float picture from 0 to 1, height x width x 3, as 8 bits."""
    return np.asarray((np.clip(values, 0, 1) * 255).round(), dtype=np.uint8)


def to_pil(pixels: Pixels) -> Image.Image:
    """As pipelines take pictures."""
    return Image.fromarray(pixels)


def repaint_region(mask: Pixels) -> npt.NDArray[np.bool_]:
    """Where a mask is white (at least half): the part to paint anew."""
    return np.asarray(mask.max(axis=2) >= 128, dtype=np.bool_)


def paste_back(generated: Pixels, original: Pixels, mask: Pixels) -> Pixels:
    """Generated pixels inside the mask, the original's exact pixels outside."""
    return np.where(repaint_region(mask)[..., None], generated, original)
