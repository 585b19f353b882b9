"""Picture measures that need no network: nearest palette colour, shape outlines, PSNR."""

from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
import numpy.typing as npt

from sdpipeline.demo.scenes import COLOUR_NAMES, COLOURS, SHAPES, Item, Picture, draw
from sdpipeline.engine.quality import Mask, edge_recall


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """Connected shape found in a picture; centre and radius are shares of the picture's side."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float
    area: int
    """Pixels."""


def sightings(picture: Picture, *, min_area: int = 90) -> list[Sighting]:
    """Find all shapes that stand out from the background, the largest first."""
    nearest = _nearest_colours(picture)
    ground = COLOUR_NAMES.index(background(picture))
    foreground = cv2.morphologyEx((nearest != ground).astype(np.uint8), cv2.MORPH_OPEN, _block(3))
    _, parts, stats, centres = cv2.connectedComponentsWithStats(foreground, connectivity=4)
    found = [
        _sighting(parts == part, nearest, box=stats[part], centre=centres[part])
        for part in range(1, len(stats))
        if stats[part][cv2.CC_STAT_AREA] >= min_area
    ]
    return sorted(found, key=lambda sighting: -sighting.area)


def background(picture: Picture, *, frame: int = 4) -> str:
    """Return the palette colour nearest to most of the picture's outermost `frame` pixels."""
    nearest = _nearest_colours(picture)
    inside = np.zeros(nearest.shape, bool)
    inside[frame:-frame, frame:-frame] = True
    return COLOUR_NAMES[int(np.bincount(nearest[~inside]).argmax())]


def edge_agreement(found: Mask, asked: Mask, *, tolerance: int) -> float:
    """Return the harmonic mean of edge recall in both directions, 0 to 1."""
    recall = edge_recall(found, asked, tolerance=tolerance)
    back = edge_recall(asked, found, tolerance=tolerance)
    return 2 * recall * back / max(1e-9, recall + back)


def outline_overlap(picture: Picture, reference: Picture) -> float:
    """Return the share of both pictures' gradients in common, 0 to 1: edges in place and equally sharp."""
    left, right = _slopes(picture), _slopes(reference)
    return float(2 * np.minimum(left, right).sum() / max(1e-9, left.sum() + right.sum()))


def psnr(picture: Picture, reference: Picture) -> float:
    """Return the peak signal-to-noise ratio in decibels; infinite for equal pictures."""
    squared = np.square(picture.astype(np.float64) - reference).mean()
    return float(10 * np.log10(255**2 / squared)) if squared else float("inf")


def mean_difference(picture: Picture, reference: Picture, where: Mask | None = None) -> float:
    """Return the mean absolute difference in grey levels, over the pixels of `where`."""
    difference = np.abs(picture.astype(np.int16) - reference)
    return float(difference.mean() if where is None else difference[where].mean())


def _slopes(picture: Picture) -> npt.NDArray[np.float32]:
    """Return the length of the Sobel gradient over all three channels, (height, width)."""
    values = picture.astype(np.float32)
    across, down = cv2.Sobel(values, cv2.CV_32F, 1, 0), cv2.Sobel(values, cv2.CV_32F, 0, 1)
    return np.asarray(np.sqrt((across**2 + down**2).sum(-1)), np.float32)


def _nearest_colours(picture: Picture) -> npt.NDArray[np.intp]:
    palette = np.array(list(COLOURS.values()), np.float32)
    distance = np.square(picture[:, :, None].astype(np.float32) - palette).sum(-1)
    return np.asarray(distance.argmin(-1))


def _sighting(
    part: Mask,
    nearest: npt.NDArray[np.intp],
    *,
    box: npt.NDArray[np.int32],
    centre: npt.NDArray[np.float64],
) -> Sighting:
    height, width = part.shape
    # The antialiased rim is nearest to colours that are not in the picture, so only the core counts.
    core = cv2.erode(part.astype(np.uint8), _block(3)) > 0
    colour = COLOUR_NAMES[int(np.bincount(nearest[core if core.any() else part]).argmax())]
    return Sighting(
        colour=colour,
        shape=_nearest_shape(part),
        x=float(centre[0] / width),
        y=float(centre[1] / height),
        radius=float(max(box[cv2.CC_STAT_WIDTH] / width, box[cv2.CC_STAT_HEIGHT] / height) / 2),
        area=int(box[cv2.CC_STAT_AREA]),
    )


def _nearest_shape(part: Mask) -> str:
    outline = _fitted(part)

    def overlap(shape: str) -> float:
        template = _template(shape)
        return float((outline & template).sum() / (outline | template).sum())

    return max(SHAPES, key=overlap)


@cache
def _template(shape: str) -> Mask:
    item = Item(colour="white", shape=shape, x=0.5, y=0.5, radius=0.3)
    return _fitted(draw([item], COLOURS, background=(0, 0, 0), side=128)[..., 0] > 127)


def _fitted(part: Mask, *, side: int = 32) -> Mask:
    """Stretch the part's bounding box to a square."""
    rows, columns = np.nonzero(part)
    cut = part[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    stretched = cv2.resize(cut.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA)
    return np.asarray(stretched) > 0.5


def _block(side: int) -> npt.NDArray[np.uint8]:
    return np.ones((side, side), np.uint8)
