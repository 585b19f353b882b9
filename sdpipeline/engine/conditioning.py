"""Control maps: annotators that need no weights, and explicit resizing, on OpenCV alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import cv2
import numpy as np
import numpy.typing as npt

from sdpipeline.engine import Pixels
from sdpipeline.errors import InputImageError, RequestRefusedError

Parameter = float | int | str
Gray = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterRange:
    """A number an annotator takes: its default, and the smallest and largest that make sense."""

    default: float
    low: float
    high: float
    integer: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotator:
    """How a picture becomes a control map. ``learned`` ones need a checkpoint of that kind."""

    function: Callable[..., Pixels]
    parameters: Mapping[str, ParameterRange] = field(default_factory=dict)
    learned: str | None = None

    def resolve(self, name: str, given: Mapping[str, Parameter]) -> dict[str, float | int]:
        """Every parameter's value; RequestRefusedError for one that is unknown or out of range."""
        for key, value in given.items():
            if reason := self.refusal(name, key, value):
                raise RequestRefusedError(reason)
        return {key: given.get(key, limit.default) for key, limit in self.parameters.items()}  # type: ignore[misc]

    def refusal(self, name: str, key: str, value: object) -> str | None:
        """Why this parameter is wrong; ``None`` if it is right."""
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
    """The control map of a picture, of the same size; equal input gives equal bytes."""
    annotator = known_annotator(name)
    values = annotator.resolve(name, parameters)
    if annotator.learned:
        raise RequestRefusedError(f"annotator {name!r} needs a checkpoint of its own")
    return annotator.function(pixels, **values)


def known_annotator(name: str) -> Annotator:
    """The annotator of that name; RequestRefusedError lists the names there are."""
    if name not in ANNOTATORS:
        raise RequestRefusedError(f"unknown annotator {name!r}; use one of {', '.join(ANNOTATORS)}")
    return ANNOTATORS[name]


def resize(pixels: Pixels, width: int, height: int, mode: str | None) -> Pixels:
    """The picture at that size. ``None`` accepts only a picture that has it already."""
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
    """Cover the frame, then cut what hangs over at both ends."""
    factor = max(width / pixels.shape[1], height / pixels.shape[0])
    scaled = _scaled(pixels, factor, at_least=(width, height))
    top, left = (scaled.shape[0] - height) // 2, (scaled.shape[1] - width) // 2
    return np.ascontiguousarray(scaled[top : top + height, left : left + width])


def _pad(pixels: Pixels, width: int, height: int) -> Pixels:
    """Fit into the frame, with black bars at both ends."""
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


def _three(gray: npt.NDArray[np.generic]) -> Pixels:
    return np.repeat(np.asarray(gray, dtype=np.uint8)[..., None], 3, axis=2)


def _gray(pixels: Pixels) -> Gray:
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), dtype=np.uint8)


def _none(pixels: Pixels) -> Pixels:
    return pixels


def _canny(pixels: Pixels, *, low_threshold: float, high_threshold: float) -> Pixels:
    return _three(cv2.Canny(_gray(pixels), low_threshold, high_threshold))


ANNOTATORS: Mapping[str, Annotator] = {
    "none": Annotator(function=_none),
    "canny": Annotator(
        function=_canny,
        parameters={
            "low_threshold": ParameterRange(default=100, low=0, high=1000),
            "high_threshold": ParameterRange(default=200, low=0, high=1000),
        },
    ),
}
"""By the names a campaign uses. ``none`` takes the picture as the control map it already is."""
