"""Quality metrics of finished pictures, and checks against a campaign's thresholds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from sdpipeline.domain import ControlNetInput, Json
from sdpipeline.engine import Pixels
from sdpipeline.errors import BadPictureError

Mask = npt.NDArray[np.bool_]
"""(height, width)."""

EDGE_ANNOTATORS = ("canny", "softedge")
"""Annotators whose control maps show edges in place: only with these does a picture fully agree with its own map."""

CANNY_THRESHOLDS = (60, 140)
TOLERANCE = 2
"""Allowed displacement of an edge, in pixels."""

_FIXES = {
    "min_sharpness": "a retry makes the same picture: lower quality.min_sharpness, or change prompt, steps or seed",
    "min_edge_agreement": (
        "a retry makes the same picture: lower quality.min_edge_agreement, raise controlnet_conditioning_scale, "
        "or change the seed"
    ),
}


def measure(pixels: Pixels, steered: Iterable[tuple[ControlNetInput, Pixels]] = ()) -> Json:
    """Measure all scores of a picture; ``steered`` are its ControlNets with their control maps.

    ``sharpness`` is the variance of its Laplacian (Pech-Pacheco et al., 2000), in squared grey levels. 0 is flat, more
    is sharper, and larger copies of one picture have less. ``edge_agreement`` is present if edge maps were used, and
    is that of the map with the lowest agreement.
    """
    found: Json = {"sharpness": sharpness(pixels), "perceptual_hash": perceptual_hash(pixels)}
    maps = [control_map for use, control_map in steered if use.annotator in EDGE_ANNOTATORS]
    asked = [each for each in (_asked(control_map, pixels.shape) for control_map in maps) if each.any()]
    if asked:
        picture_edges = edges(pixels)
        found["edge_agreement"] = round(min(edge_recall(picture_edges, each) for each in asked), 4)
    return found


def check(scores: Mapping[str, float | str], thresholds: Mapping[str, float]) -> None:
    """Raise BadPictureError for the first score below its threshold; scores that were not measured are not checked."""
    for name, least in thresholds.items():
        what = name.removeprefix("min_")
        score = scores.get(what)
        if isinstance(score, float | int) and score < least:
            raise BadPictureError(f"its {what} {score:g} is less than {name} {least:g} ({_FIXES[name]})")


def sharpness(pixels: Pixels) -> float:
    """Return the variance of the Laplacian of the grey picture."""
    # OpenCV's Laplacians of 8-bit pixels always fit into 16 bits, its fastest type for them.
    slopes = cv2.Laplacian(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.CV_16S)
    _, deviation = cv2.meanStdDev(slopes)
    return round(float(np.asarray(deviation).item()) ** 2, 2)


def perceptual_hash(pixels: Pixels) -> str:
    """Return 64 bits in hexadecimal; near-equal pictures share most of them, so compare by the number that differs.

    A bit is set if one of the 8x8 lowest frequencies of a 32x32 grey copy exceeds their median. The result equals
    the ``phash`` of imagehash (after Krawetz, "Looks Like It", 2011), which would add SciPy and PyWavelets as
    dependencies for these lines.
    """
    grey = Image.fromarray(pixels).convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    waves = np.asarray(cv2.dct(np.asarray(grey, np.float64)))
    # OpenCV's transform is orthonormal and imagehash's is not, which affects the median.
    waves[0] *= np.sqrt(2)
    waves[:, 0] *= np.sqrt(2)
    low = waves[:8, :8]
    return np.packbits(low > np.median(low)).tobytes().hex()


def perceptual_distance(one: str, other: str) -> int:
    """Return how many of 64 bits differ between two perceptual hashes; about 32 for unrelated pictures."""
    return (int(one, 16) ^ int(other, 16)).bit_count()


def edges(pixels: Pixels) -> Mask:
    """Detect Canny edges, with the thresholds that the shipped ControlNet is trained on."""
    return np.asarray(cv2.Canny(pixels, *CANNY_THRESHOLDS)) > 0


def edge_recall(found: Mask, asked: Mask, *, tolerance: int = TOLERANCE) -> float:
    """Return the share of ``asked`` edge pixels with a ``found`` one within ``tolerance`` pixels."""
    block = np.ones((2 * tolerance + 1, 2 * tolerance + 1), np.uint8)
    near = cv2.dilate(found.astype(np.uint8), block) > 0
    return float((asked & near).sum() / max(1, asked.sum()))


def _asked(control_map: Pixels, shape: tuple[int, ...]) -> Mask:
    """Return the edge pixels of a control map, at the picture's size."""
    height, width = shape[:2]
    lines = control_map[..., 0]  # such maps are grey
    if lines.shape != (height, width):
        lines = np.asarray(cv2.resize(lines, (width, height), interpolation=cv2.INTER_NEAREST))
    return np.asarray(lines >= 128, dtype=np.bool_)
