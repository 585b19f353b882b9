"""Annotators that draw control maps without weights, and explicit resizing, both with OpenCV alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from sdpipeline.engine import Pixels
from sdpipeline.errors import InputImageError, RequestRefusedError

Parameter = float | int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterRange:
    """Numeric parameter of an annotator: its default and the lowest and highest sensible values."""

    default: float
    low: float
    high: float
    integer: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotator:
    """Conversion of a picture into a control map. ``learned`` names the kind of checkpoint it needs, if any."""

    function: Callable[..., Pixels] | None = None
    parameters: Mapping[str, ParameterRange] = field(default_factory=dict)
    learned: str | None = None

    def resolve(self, name: str, given: Mapping[str, Parameter]) -> dict[str, float | int]:
        """Return every parameter's value; RequestRefusedError for one that is unknown or out of range."""
        for key, value in given.items():
            if reason := self.refusal(name, key, value):
                raise RequestRefusedError(reason)
        return {key: given.get(key, limit.default) for key, limit in self.parameters.items()}  # type: ignore[misc]

    def refusal(self, name: str, key: str, value: object) -> str | None:
        """Return the reason why this parameter is invalid; ``None`` if it is valid."""
        if key not in self.parameters:
            known = ", ".join(self.parameters) or "none"
            return f"annotator {name!r} has no parameter {key!r}; it takes: {known}"
        limit = self.parameters[key]
        number = isinstance(value, int if limit.integer else int | float) and not isinstance(value, bool)
        if not number or not limit.low <= value <= limit.high:  # type: ignore[operator]
            kind = "a whole number" if limit.integer else "a number"
            return f"annotator {name!r}: {key} must be {kind} from {limit.low:g} to {limit.high:g}, not {value!r}"
        return None


def annotate(name: str, pixels: Pixels, parameters: Mapping[str, Parameter]) -> Pixels:
    """Draw the control map of a picture, of the same size; equal input gives equal bytes."""
    annotator = known_annotator(name)
    values = annotator.resolve(name, parameters)
    if annotator.function is None:
        raise RequestRefusedError(f"annotator {name!r} needs a checkpoint; set annotator_checkpoint")
    return annotator.function(pixels, **values)


def known_annotator(name: str) -> Annotator:
    """Return the annotator of that name; RequestRefusedError lists the known names."""
    if name not in ANNOTATORS:
        raise RequestRefusedError(f"unknown annotator {name!r}; use one of {', '.join(ANNOTATORS)}")
    return ANNOTATORS[name]


def resize(pixels: Pixels, width: int, height: int, mode: str | None) -> Pixels:
    """Resize the picture. Mode ``None`` accepts only a picture that already has that size."""
    if pixels.shape[:2] == (height, width):
        return pixels
    if mode is None:
        raise InputImageError(
            f"the input is {pixels.shape[1]}x{pixels.shape[0]}, not {width}x{height}; "
            f"set resize: {' or '.join(RESIZE_MODES)}"
        )
    if mode not in RESIZE_MODES:
        raise RequestRefusedError(f"unknown resize mode {mode!r}; use one of {', '.join(RESIZE_MODES)}")
    return RESIZE_MODES[mode](pixels, width, height)


def _stretch(pixels: Pixels, width: int, height: int) -> Pixels:
    shrinks = width * height < pixels.shape[0] * pixels.shape[1]
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=interpolation), dtype=np.uint8)


def _crop(pixels: Pixels, width: int, height: int) -> Pixels:
    """Scale to cover the frame, then crop both ends equally."""
    factor = max(width / pixels.shape[1], height / pixels.shape[0])
    scaled = _scaled(pixels, factor, at_least=(width, height))
    top, left = (scaled.shape[0] - height) // 2, (scaled.shape[1] - width) // 2
    return np.ascontiguousarray(scaled[top : top + height, left : left + width])


def _pad(pixels: Pixels, width: int, height: int) -> Pixels:
    """Scale to fit into the frame, with black bars at both ends."""
    factor = min(width / pixels.shape[1], height / pixels.shape[0])
    scaled = _scaled(pixels, factor, at_least=(1, 1))[:height, :width]
    padded = np.zeros((height, width, 3), np.uint8)
    top, left = (height - scaled.shape[0]) // 2, (width - scaled.shape[1]) // 2
    padded[top : top + scaled.shape[0], left : left + scaled.shape[1]] = scaled
    return padded


def _scaled(pixels: Pixels, factor: float, at_least: tuple[int, int]) -> Pixels:
    width = max(at_least[0], round(pixels.shape[1] * factor))
    height = max(at_least[1], round(pixels.shape[0] * factor))
    return _stretch(pixels, width, height)


RESIZE_MODES: Mapping[str, Callable[[Pixels, int, int], Pixels]] = {"stretch": _stretch, "crop": _crop, "pad": _pad}


def _three(gray: npt.NDArray[Any]) -> Pixels:
    """Repeat one channel as three."""
    return np.repeat(np.asarray(gray, dtype=np.uint8)[..., None], 3, axis=2)


def _gray(pixels: Pixels) -> npt.NDArray[np.uint8]:
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), dtype=np.uint8)


def _blurred(pixels: npt.NDArray[Any], sigma: float) -> npt.NDArray[np.float32]:
    return np.asarray(cv2.GaussianBlur(pixels.astype(np.float32), (0, 0), sigma), dtype=np.float32)


def _none(pixels: Pixels) -> Pixels:
    return pixels


def _canny(pixels: Pixels, *, low_threshold: float, high_threshold: float) -> Pixels:
    # On colour input OpenCV uses the strongest channel's gradient, so two colours of equal brightness have an edge.
    return _three(cv2.Canny(pixels, low_threshold, high_threshold))


def _scribble(pixels: Pixels, *, threshold: float) -> Pixels:
    """Draw white strokes where a narrow blur is darker than a wide one, as ControlNet's scribble_xdog does."""
    darker = np.min(_blurred(pixels, 5.0) - _blurred(pixels, 0.5), axis=2).clip(0, 255)
    return _three(np.where(2 * darker > threshold, 255, 0))


def _lineart(pixels: Pixels, *, sigma: float, threshold: float) -> Pixels:
    """Measure the strength of dark lines on a lighter background, normalised by the median line."""
    strength = np.min(_blurred(pixels, sigma) - pixels, axis=2).clip(0, 255)
    lines = strength[strength > threshold]
    usual = max(16.0, float(np.median(lines))) if lines.size else 16.0
    return _three((strength / usual * 127).clip(0, 255))


def _softedge(pixels: Pixels, *, sigma: float) -> Pixels:
    """Compute the gradient magnitude, a substitute without weights for learned soft edges."""
    gray = _blurred(_gray(pixels), sigma)
    magnitude = cv2.magnitude(cv2.Sobel(gray, cv2.CV_32F, 1, 0), cv2.Sobel(gray, cv2.CV_32F, 0, 1))
    return _three((magnitude / max(1.0, float(np.percentile(magnitude, 99.5))) * 255).clip(0, 255))


def _tile(pixels: Pixels, *, down: int) -> Pixels:
    """Remove detail by shrinking and enlarging the picture; the tile ControlNet adds new detail."""
    height, width = pixels.shape[:2]
    small = cv2.resize(pixels, (max(1, width // down), max(1, height // down)), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC), dtype=np.uint8)


def _colour(pixels: Pixels, *, cell: int) -> Pixels:
    """Fill each square with one colour."""
    height, width = pixels.shape[:2]
    small = cv2.resize(pixels, (max(1, width // cell), max(1, height // cell)), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST), dtype=np.uint8)


def _luminance(pixels: Pixels, *, gamma: float) -> Pixels:
    lightness = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB))[..., 0].astype(np.float32) / 255
    return _three((lightness**gamma * 255).round())


def _invert(pixels: Pixels) -> Pixels:
    return np.asarray(255 - pixels, dtype=np.uint8)


def _shuffle(pixels: Pixels, *, seed: int, cells: int) -> Pixels:
    """Move pixels to positions drawn from smooth noise, which keeps the picture's style without its contents."""
    height, width = pixels.shape[:2]
    random = np.random.default_rng(seed)

    def field_of(extent: int) -> npt.NDArray[np.float32]:
        noise = random.uniform(0, 1, (cells, cells)).astype(np.float32)
        smooth = np.asarray(cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC))
        return np.asarray((smooth - smooth.min()) / max(1e-6, np.ptp(smooth)) * (extent - 1), dtype=np.float32)

    return np.asarray(cv2.remap(pixels, field_of(width), field_of(height), cv2.INTER_LINEAR), dtype=np.uint8)


def _segmentation(pixels: Pixels, *, regions: int, seed: int) -> Pixels:
    """Segment by colour: k-means on a small copy, then the nearest mean for every pixel."""
    small = cv2.resize(pixels, (64, 64), interpolation=cv2.INTER_AREA).reshape(-1, 3).astype(np.float32)
    colours = _means(small, regions, seed)
    flat = pixels.reshape(-1, 3).astype(np.float32)
    nearest = np.argmin([np.square(flat - colour).sum(axis=1) for colour in colours], axis=0)
    return np.asarray(colours.round()[nearest].reshape(pixels.shape), dtype=np.uint8)


def _means(points: npt.NDArray[np.float32], count: int, seed: int) -> npt.NDArray[np.float32]:
    """Run Lloyd's algorithm from its own random start; OpenCV's would read and advance a process-wide seed."""
    means = points[np.random.default_rng(seed).choice(len(points), count, replace=False)]
    for _ in range(10):
        owner = np.argmin(np.square(points[:, None] - means[None]).sum(axis=2), axis=1)
        means = np.stack([points[owner == n].mean(axis=0) if (owner == n).any() else means[n] for n in range(count)])
    return np.asarray(means, dtype=np.float32)


ANNOTATORS: Mapping[str, Annotator] = {
    "none": Annotator(function=_none),
    "canny": Annotator(
        function=_canny,
        parameters={
            "low_threshold": ParameterRange(default=100, low=0, high=1000),
            "high_threshold": ParameterRange(default=200, low=0, high=1000),
        },
    ),
    "scribble": Annotator(function=_scribble, parameters={"threshold": ParameterRange(default=32, low=0, high=255)}),
    "lineart": Annotator(
        function=_lineart,
        parameters={
            "sigma": ParameterRange(default=6, low=0.1, high=50),
            "threshold": ParameterRange(default=8, low=0, high=255),
        },
    ),
    "softedge": Annotator(function=_softedge, parameters={"sigma": ParameterRange(default=1, low=0.1, high=50)}),
    "tile": Annotator(function=_tile, parameters={"down": ParameterRange(default=8, low=1, high=256, integer=True)}),
    "colour": Annotator(
        function=_colour, parameters={"cell": ParameterRange(default=64, low=1, high=1024, integer=True)}
    ),
    "luminance": Annotator(function=_luminance, parameters={"gamma": ParameterRange(default=1, low=0.05, high=20)}),
    "invert": Annotator(function=_invert),
    "shuffle": Annotator(
        function=_shuffle,
        parameters={
            "seed": ParameterRange(default=0, low=0, high=2**63 - 1, integer=True),
            "cells": ParameterRange(default=4, low=2, high=64, integer=True),
        },
    ),
    "segmentation": Annotator(
        function=_segmentation,
        parameters={
            "regions": ParameterRange(default=8, low=2, high=64, integer=True),
            "seed": ParameterRange(default=0, low=0, high=2**63 - 1, integer=True),
        },
    ),
    "depth-learned": Annotator(learned="depth"),
    "segmentation-learned": Annotator(learned="segmentation"),
    "pose-learned": Annotator(
        learned="pose",
        parameters={"confidence": ParameterRange(default=0.3, low=0, high=1)},
    ),
}
"""Annotators by their names in a campaign. ``none`` uses the picture itself as the control map. Learned annotators run
a checkpoint of kind ``annotator``."""
