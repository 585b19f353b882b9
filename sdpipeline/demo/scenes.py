"""Scenes of flat shapes on a flat ground, sampled and drawn from a seeded generator."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.uint8]
"""RGB, (height, width, 3), 0 to 255."""
Rgb = tuple[int, int, int]

COLOURS: Mapping[str, Rgb] = {
    "red": (220, 38, 38),
    "green": (34, 160, 70),
    "blue": (40, 80, 215),
    "yellow": (245, 215, 40),
    "purple": (140, 60, 185),
    "orange": (245, 130, 25),
    "white": (245, 245, 245),
    "black": (18, 18, 18),
}
COLOUR_NAMES = tuple(COLOURS)
SHAPES = ("circle", "square", "triangle", "star", "heart")
PLACES: Mapping[str, tuple[float, float]] = {
    "left": (0.27, 0.5),
    "right": (0.73, 0.5),
    "top": (0.5, 0.27),
    "bottom": (0.5, 0.73),
    "center": (0.5, 0.5),
}
SIZES: Mapping[str, tuple[float, float]] = {
    "small": (0.15, 0.18),
    "": (0.21, 0.25),
    "large": (0.29, 0.33),
}
"""Radius as a share of the picture's side; "" is the size without a word."""

KINDS: Mapping[str, float] = {"single": 0.5, "pair": 0.38, "counted": 0.12}
"""Share of each kind of scene in the training data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Phrase of a caption: `count` equal shapes; "" stands for an omitted word."""

    count: int
    size: str
    colour: str
    shape: str
    place: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """Drawn shape; centre and radius are shares of the picture's side."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Scene on one ground: `groups` for the caption, and `items` to draw."""

    background: str
    groups: tuple[Group, ...]
    items: tuple[Item, ...]


def sample_scene(rng: np.random.Generator, *, kinds: Mapping[str, float] = KINDS, held_out: bool = False) -> Scene:
    """Sample a scene for training or, with `held_out`, one whose combination is never trained on."""
    samplers = {"single": _single, "pair": _pair, "counted": _counted}
    weights = np.array(list(kinds.values()))
    while True:
        kind = list(kinds)[int(rng.choice(len(kinds), p=weights / weights.sum()))]
        scene = samplers[kind](rng)
        if scene is not None and is_held_out(scene) == held_out:
            return scene


def is_held_out(scene: Scene) -> bool:
    """Return True for the tenth of all (colours, shapes, background) combinations that is kept for evaluation."""
    described = sorted(f"{group.colour}|{group.shape}" for group in scene.groups)
    key = "|".join([*described, scene.background])
    return hashlib.md5(key.encode(), usedforsecurity=False).digest()[0] % 10 == 0


def render(rng: np.random.Generator, scene: Scene, *, side: int) -> Picture:
    """Draw the scene, with a small random offset for each colour that all its uses share."""
    tint = {colour: _jittered(rng, COLOURS[colour]) for colour in COLOUR_NAMES}
    return draw(scene.items, tint, background=tint[scene.background], side=side)


def draw(items: Iterable[Item], tint: Mapping[str, Rgb], *, background: Rgb, side: int) -> Picture:
    """Draw shapes on a ground, antialiased by drawing at twice the side."""
    canvas = np.empty((2 * side, 2 * side, 3), np.uint8)
    canvas[:] = background
    for item in items:
        outline = polygon(item.shape) * item.radius + np.array([item.x, item.y])
        points = np.round(outline * (2 * side * _SUBPIXELS)).astype(np.int32)
        cv2.fillPoly(canvas, [points], tint[item.colour], cv2.LINE_AA, shift=_SHIFT)
    return shrink(canvas)


def polygon(shape: str) -> npt.NDArray[np.float64]:
    """Return the outline of a shape of radius 1 around the origin, (points, 2), y downwards."""
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    match shape:
        case "circle":
            return np.stack([np.cos(turn), np.sin(turn)], 1)
        case "square":
            return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.88
        case "triangle":
            return np.array([[0, -1], [1, 0.8], [-1, 0.8]])
        case "star":
            angle = -np.pi / 2 + np.arange(10) * np.pi / 5
            radius = np.where(np.arange(10) % 2 == 0, 1.08, 0.45)
            return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
        case "heart":
            x = 16 * np.sin(turn) ** 3
            waves = ((13, 1), (-5, 2), (-2, 3), (-1, 4))
            y = -np.sum([weight * np.cos(times * turn) for weight, times in waves], axis=0)
            return np.asarray(np.stack([x, y], 1) / 16.5 - np.array([0, 0.08]))
        case _:
            raise ValueError(f"no shape is called {shape!r}; known are {', '.join(SHAPES)}")


def texture(rng: np.random.Generator, *, side: int) -> Picture:
    """Draw a picture unlike any scene (gradients, patches, outlines), for variety in the autoencoder's training."""
    cells = int(rng.integers(2, 9))
    patches = rng.integers(0, 256, (cells, cells, 3)).astype(np.uint8)
    smooth = cv2.INTER_CUBIC if rng.random() < 0.6 else cv2.INTER_NEAREST
    canvas = np.asarray(cv2.resize(patches, (2 * side, 2 * side), interpolation=smooth), np.uint8)
    for _ in range(int(rng.integers(0, 5))):
        shape = SHAPES[int(rng.integers(len(SHAPES)))]
        outline = polygon(shape) * rng.uniform(0.06, 0.35) + rng.uniform(0.1, 0.9, 2)
        points = np.round(outline * (2 * side * _SUBPIXELS)).astype(np.int32)
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        if rng.random() < 0.7:
            cv2.fillPoly(canvas, [points], colour, cv2.LINE_AA, shift=_SHIFT)
        else:
            width = int(rng.integers(2, 10))
            cv2.polylines(canvas, [points], True, colour, width, cv2.LINE_AA, shift=_SHIFT)
    return shrink(canvas)


def shrink(picture: Picture, factor: int = 2) -> Picture:
    """Return the picture at `1/factor` of its side, each pixel the mean of its block."""
    height, width = picture.shape[:2]
    size = (width // factor, height // factor)
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)


_SHIFT = 4
_SUBPIXELS = 1 << _SHIFT
_PAIRED_PLACES = (("left", "right"), ("right", "left"), ("top", "bottom"), ("bottom", "top"))


def _single(rng: np.random.Generator) -> Scene:
    background, (colour,) = _colours(rng, 1)
    size = ("small", "", "", "large")[int(rng.integers(4))]
    place = tuple(PLACES)[int(rng.integers(5))] if rng.random() < 0.65 else ""
    radius = rng.uniform(*SIZES[size])
    # Without a word for the place, the shape is near the middle, so that only words decide the place.
    spread = 0.05 if place else 0.09
    centre = np.array(PLACES[place or "center"]) + rng.uniform(-spread, spread, 2)
    x, y = np.clip(centre, radius + 0.02, 1 - radius - 0.02)
    group = Group(count=1, size=size, colour=colour, shape=_shape(rng), place=place)
    item = Item(colour=colour, shape=group.shape, x=x, y=y, radius=radius)
    return Scene(background=background, groups=(group,), items=(item,))


def _pair(rng: np.random.Generator) -> Scene | None:
    background, colours = _colours(rng, 2)
    places = _PAIRED_PLACES[int(rng.integers(4))] if rng.random() < 0.45 else ("", "")
    groups = tuple(
        Group(count=1, size="", colour=colour, shape=_shape(rng), place=place)
        for colour, place in zip(colours, places, strict=True)
    )
    return _laid_out(rng, background, groups, radius=(0.14, 0.2))


def _counted(rng: np.random.Generator) -> Scene | None:
    counts = ((2,), (3,), (2,), (3,), (2, 1), (1, 2))[int(rng.integers(6))]
    background, colours = _colours(rng, len(counts))
    groups = tuple(
        Group(count=count, size="", colour=colour, shape=_shape(rng), place="")
        for count, colour in zip(counts, colours, strict=True)
    )
    return _laid_out(rng, background, groups, radius=(0.13, 0.19))


def _laid_out(
    rng: np.random.Generator,
    background: str,
    groups: tuple[Group, ...],
    *,
    radius: tuple[float, float],
) -> Scene | None:
    """Place the shapes of all groups so that they do not touch; return None if there is no room."""
    items: list[Item] = []
    for group in groups:
        for _ in range(group.count):
            size = rng.uniform(*radius)
            centre = _free_spot(rng, items, size, group.place)
            if centre is None:
                return None
            x, y = centre
            items.append(Item(colour=group.colour, shape=group.shape, x=x, y=y, radius=size))
    return Scene(background=background, groups=groups, items=tuple(items))


def _free_spot(
    rng: np.random.Generator, taken: Iterable[Item], radius: float, place: str
) -> tuple[float, float] | None:
    margin = radius + 0.03
    for _ in range(60):
        if place:
            centre = np.array(PLACES[place]) + rng.uniform(-0.05, 0.05, 2)
            x, y = np.clip(centre, margin, 1 - margin)
        else:
            x, y = rng.uniform(margin, 1 - margin, 2)
        if all(np.hypot(x - other.x, y - other.y) > (radius + other.radius) * 1.08 for other in taken):
            return float(x), float(y)
    return None


def _colours(rng: np.random.Generator, count: int) -> tuple[str, tuple[str, ...]]:
    """Choose a background and `count` colours, all different."""
    background, *others = (COLOUR_NAMES[i] for i in rng.permutation(len(COLOURS))[: count + 1])
    return background, tuple(others)


def _shape(rng: np.random.Generator) -> str:
    return SHAPES[int(rng.integers(len(SHAPES)))]


def _jittered(rng: np.random.Generator, colour: Rgb) -> Rgb:
    red, green, blue = np.clip(np.array(colour) + rng.normal(0, 8, 3).round(), 0, 255)
    return int(red), int(green), int(blue)
