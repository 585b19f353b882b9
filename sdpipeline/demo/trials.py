"""Evaluation trials of the checkpoints, on prompts never trained on, with a chance level for each score."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from sdpipeline.demo.captions import caption, silent_caption
from sdpipeline.demo.measure import (
    Sighting,
    background,
    edge_agreement,
    mean_difference,
    outline_overlap,
    psnr,
    sightings,
)
from sdpipeline.demo.scenes import (
    COLOUR_NAMES,
    COLOURS,
    PLACES,
    SHAPES,
    Group,
    Item,
    Picture,
    Scene,
    render,
    sample_scene,
    shrink,
)
from sdpipeline.demo.studio import Studio
from sdpipeline.engine.quality import Mask, edge_recall, edges

SIDE = 128
UPSCALED_SIDE = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One line of the score table."""

    measure: str
    value: float
    chance: float | None
    """Chance level: the same pictures scored against other pictures' captions or inputs."""
    count: int
    asked: str = ""
    """Target value, if any."""
    unit: str = "share"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Generated picture as the measures describe it."""

    background: str
    shapes: Sequence[Sighting]


Check = Callable[[Scene, Seen], bool | None]
"""Return True if a picture shows what a scene's caption says; None if the caption leaves it open."""


def single_objects(studio: Studio, *, count: int = 320) -> list[Score]:
    """Score single shapes in held-out combinations of colours and shape."""
    scenes = held_out_scenes("single", count, seed=123)
    seen = look_at(studio.draw([caption(scene) for scene in scenes], seed=0))
    checks: list[tuple[str, str, Check]] = [
        ("background colour", "≥ .98", _background_is_right),
        ("object colour", "≥ .98", _first_colour_is_right),
        ("shape", "≥ .95", _first_shape_is_right),
        ("position word", "≥ .95", _place_is_right),
        ("size word", "", _size_is_right),
        ("exactly one object", "", lambda _, found: len(found.shapes) == 1),
    ]
    per_shape: list[tuple[str, str, Check]] = [
        (f"shape: {shape}", "", _only_for(shape, _first_shape_is_right)) for shape in SHAPES
    ]
    return [_scored(f"one object: {name}", check, scenes, seen, asked) for name, asked, check in checks + per_shape]


def several_objects(studio: Studio, *, pairs: int = 200, counted: int = 60) -> list[Score]:
    """Score two kinds of object, or several equal ones, in held-out combinations."""
    scenes = held_out_scenes("pair", pairs, seed=456)
    seen = look_at(studio.draw([caption(scene) for scene in scenes], seed=10_000))
    many = held_out_scenes("counted", counted, seed=789)
    seen_many = look_at(studio.draw([caption(scene) for scene in many], seed=20_000))
    return [
        _scored("two objects: background colour", _background_is_right, scenes, seen),
        _scored("two objects: both colours", _colours_are_right, scenes, seen, "≥ .80"),
        _scored("two objects: both shapes, each in its colour", _groups_are_right, scenes, seen, "≥ .60"),
        _scored("two objects: both places", _places_are_right, scenes, seen),
        _scored("counted objects: right colours", _colours_are_right, many, seen_many),
        _scored("counted objects: right numbers and shapes", _groups_are_right, many, seen_many),
    ]


def control(studio: Studio, *, count: int = 80) -> list[Score]:
    """Score edges of held-out scenes with other colours and captions without the layout."""
    scenes = [*_off_centre(count - count // 4), *held_out_scenes("pair", count // 4, seed=31)]
    rng = np.random.default_rng(32)
    asked = [edges(render(rng, scene, side=SIDE)) for scene in scenes]
    recoloured = [_recoloured(rng, scene) for scene in scenes]
    prompts = [silent_caption(scene) for scene in recoloured]
    made = studio.follow(prompts, asked, seed=30_000)
    free = studio.draw(prompts, seed=30_000)

    def recall(pictures: Sequence[Picture], maps: Sequence[Mask]) -> float:
        return float(np.mean([edge_recall(edges(one), own) for one, own in zip(pictures, maps, strict=True)]))

    along, without = recall(made, asked), recall(free, asked)
    others = [*asked[1:], asked[0]]
    seen = look_at(made)
    return [
        Score(
            measure="control: edge recall within 2 px",
            value=along,
            chance=recall(made, others),
            count=count,
            asked="≥ .85",
        ),
        Score(
            measure="control: recall above the same prompts without control",
            value=along - without,
            chance=None,
            count=count,
            asked="≥ .50",
        ),
        _scored("control: colours right", _all_colours_are_right, recoloured, seen, "≥ .95"),
        _scored("control: shapes right", _groups_are_right, recoloured, seen),
    ]


def image_to_image(studio: Studio, *, count: int = 40) -> list[Score]:
    """Score held-out scenes that are prompted to become a yellow shape on a green ground."""
    scenes = held_out_scenes("single", count, seed=41)
    rng = np.random.default_rng(42)
    sources = [render(rng, scene, side=SIDE) for scene in scenes]
    prompts = [f"a yellow {scene.groups[0].shape} on a green background" for scene in scenes]
    scores: list[Score] = []
    for strength in (0.2, 0.5, 0.8):
        made = studio.change(prompts, sources, strength=strength, seed=40_000)
        pairs = list(zip(made, sources, strict=True))
        others = list(zip(made, [*sources[1:], sources[0]], strict=True))
        scores.append(
            Score(
                measure=f"image to image, strength {strength}: PSNR to the input",
                value=float(np.mean([psnr(picture, source) for picture, source in pairs])),
                chance=float(np.mean([psnr(picture, source) for picture, source in others])),
                count=count,
                asked="falls with strength",
                unit="dB",
            )
        )
    turned = [replace(scene, background="green", groups=(_yellow(scene.groups[0]),)) for scene in scenes]
    scores.append(
        _scored("image to image, strength 0.8: both colours as asked", _all_colours_are_right, turned, look_at(made))
    )
    return scores


def inpainting(studio: Studio, *, count: int = 80) -> list[Score]:
    """Score a second object requested in a hole next to the first, then one object recoloured in place."""
    scenes = held_out_scenes("pair", count, seed=51, placed=True)
    rng = np.random.default_rng(52)
    first = [replace(scene, items=scene.items[:1]) for scene in scenes]
    sources = [render(rng, scene, side=SIDE) for scene in first]
    holes = [hole_around(scene.items[1]) for scene in scenes]
    made = studio.fill([caption(scene) for scene in scenes], sources, holes, seed=50_000)
    plain = studio.fill([silent_caption(scene) for scene in scenes], sources, holes, seed=51_000)
    inside, plainly = (look_at(_only_inside(pictures, sources, holes)) for pictures in (made, plain))
    changed = [_in_place_of_the_first(scene) for scene in scenes]
    around = [hole_around(scene.items[0]) for scene in scenes]
    replaced = studio.fill([silent_caption(scene) for scene in changed], sources, around, seed=52_000)
    outside = [
        mean_difference(picture, source, ~hole)
        for picture, source, hole in zip(made + replaced, sources * 2, holes + around, strict=True)
    ]
    return [
        _scored("inpainting: asked colour in the hole, place named", _holds_colour, changed, inside, "≥ .80"),
        _scored("inpainting: asked colour in the hole, place not named", _holds_colour, changed, plainly, "≥ .80"),
        _scored("inpainting: asked colour and shape in the hole, place named", _holds_group, changed, inside),
        _scored(
            "inpainting: object replaced by one of another colour",
            _holds_colour,
            changed,
            look_at(_only_inside(replaced, sources, around)),
            "≥ .80",
        ),
        Score(
            measure="inpainting: mean change outside the mask, stock pipeline",
            value=float(np.mean(outside)),
            chance=None,
            count=2 * count,
            asked="≤ 2",
            unit="grey levels",
        ),
    ]


def super_resolution(studio: Studio, *, count: int = 40) -> list[Score]:
    """Score held-out scenes at a quarter of their side against bicubic interpolation, clean and as generated."""
    scenes = [*held_out_scenes("single", count // 2, seed=61), *held_out_scenes("pair", count - count // 2, seed=62)]
    rng = np.random.default_rng(63)
    truth = [render(rng, scene, side=UPSCALED_SIDE) for scene in scenes]
    prompts = [caption(scene) for scene in scenes]
    small = [shrink(picture, UPSCALED_SIDE // SIDE) for picture in truth]
    scores: list[Score] = []
    for kind, inputs in (("drawn", small), ("decoded", studio.round_trip(small))):
        made = studio.upscale(prompts, inputs, seed=60_000)
        bicubic = [enlarged(picture) for picture in inputs]
        for name, unit, compare in _RESEMBLANCES:
            score, baseline = (_mean_of(compare, pictures, truth) for pictures in (made, bicubic))
            scores.append(
                Score(
                    measure=f"super-resolution x4 of {kind} pictures: {name} (by chance: bicubic)",
                    value=score,
                    chance=baseline,
                    count=count,
                    asked="above bicubic",
                    unit=unit,
                )
            )
    return scores


def speed(studio: Studio) -> list[Score]:
    """Measure seconds per picture, the fastest of three calls."""
    prompt = "a red circle on a blue background"
    blank = np.zeros((SIDE, SIDE, 3), np.uint8)
    blank[32:96, 32:96] = COLOURS["red"]
    calls: dict[str, Callable[[int], object]] = {
        "text to image": lambda n: studio.draw([prompt] * n, seed=0),
        "with control": lambda n: studio.follow([prompt] * n, [edges(blank)] * n, seed=0),
        "super-resolution": lambda n: studio.upscale([prompt] * n, [blank] * n, seed=0),
    }
    return [
        Score(
            measure=f"speed, {name}, batch {size}",
            value=_fastest(call, size) / size,
            chance=None,
            count=3,
            unit="s a picture",
        )
        for name, call in calls.items()
        for size in (1, 8)
    ]


def enlarged(picture: Picture) -> Picture:
    """Return the picture at four times its side by bicubic interpolation."""
    return np.asarray(cv2.resize(picture, (UPSCALED_SIDE, UPSCALED_SIDE), interpolation=cv2.INTER_CUBIC), np.uint8)


def held_out_scenes(kind: str, count: int, *, seed: int, placed: bool = False) -> list[Scene]:
    """Sample different captions whose combination was never trained on; with `placed`, each names every place."""
    rng = np.random.default_rng(seed)
    found: dict[str, Scene] = {}
    while len(found) < count:
        scene = sample_scene(rng, kinds={kind: 1.0}, held_out=True)
        if not placed or all(group.place for group in scene.groups):
            found.setdefault(caption(scene), scene)
    return list(found.values())


def hole_around(item: Item) -> Mask:
    """Return a square mask with room around the item, at most the half of the picture that contains it."""
    rows, columns = (
        (np.arange(SIDE) / SIDE > centre - 0.25) & (np.arange(SIDE) / SIDE < centre + 0.25)
        for centre in (item.y, item.x)
    )
    return np.outer(rows, columns)


def look_at(pictures: Iterable[Picture]) -> list[Seen]:
    """Return the measures' findings for each picture."""
    return [Seen(background=background(picture), shapes=sightings(picture)) for picture in pictures]


def _scored(measure: str, check: Check, scenes: Sequence[Scene], seen: Sequence[Seen], asked: str = "") -> Score:
    rng = np.random.default_rng(1)
    own = [check(scene, found) for scene, found in zip(scenes, seen, strict=True)]
    shuffled = [
        check(scene, seen[other])
        for _ in range(20)
        for scene, other in zip(scenes, rng.permutation(len(seen)), strict=True)
    ]
    decided = [result for result in own if result is not None]
    return Score(
        measure=measure,
        value=float(np.mean(decided)),
        chance=float(np.mean([result for result in shuffled if result is not None])),
        count=len(decided),
        asked=asked,
    )


def _background_is_right(scene: Scene, seen: Seen) -> bool:
    return seen.background == scene.background


def _first_colour_is_right(scene: Scene, seen: Seen) -> bool:
    return bool(seen.shapes) and seen.shapes[0].colour == scene.groups[0].colour


def _first_shape_is_right(scene: Scene, seen: Seen) -> bool:
    return bool(seen.shapes) and seen.shapes[0].shape == scene.groups[0].shape


def _place_is_right(scene: Scene, seen: Seen) -> bool | None:
    place = scene.groups[0].place
    return None if not place else bool(seen.shapes) and _is_at(seen.shapes[0], place)


def _size_is_right(scene: Scene, seen: Seen) -> bool | None:
    bounds = {"small": (0, 0.2), "large": (0.26, 1)}.get(scene.groups[0].size)
    return None if bounds is None else bool(seen.shapes) and bounds[0] < seen.shapes[0].radius < bounds[1]


def _only_for(shape: str, check: Check) -> Check:
    return lambda scene, seen: check(scene, seen) if scene.groups[0].shape == shape else None


def _colours_are_right(scene: Scene, seen: Seen) -> bool:
    return {shape.colour for shape in seen.shapes} == {group.colour for group in scene.groups}


def _all_colours_are_right(scene: Scene, seen: Seen) -> bool:
    return _background_is_right(scene, seen) and _colours_are_right(scene, seen)


def _groups_are_right(scene: Scene, seen: Seen) -> bool:
    """Return True if the picture shows every group in its number, shape and colour, and nothing else."""
    found = sorted((shape.colour, shape.shape) for shape in seen.shapes)
    return found == sorted((group.colour, group.shape) for group in scene.groups for _ in range(group.count))


def _places_are_right(scene: Scene, seen: Seen) -> bool | None:
    if not all(group.place for group in scene.groups):
        return None
    return all(
        any(shape.colour == group.colour and _is_at(shape, group.place) for shape in seen.shapes)
        for group in scene.groups
    )


def _holds_colour(scene: Scene, seen: Seen) -> bool:
    return any(shape.colour == scene.groups[0].colour for shape in seen.shapes)


def _holds_group(scene: Scene, seen: Seen) -> bool:
    wanted = scene.groups[0]
    return any(shape.colour == wanted.colour and shape.shape == wanted.shape for shape in seen.shapes)


def _is_at(shape: Sighting, place: str) -> bool:
    x, y = PLACES[place]
    return max(abs(shape.x - x), abs(shape.y - y)) < 0.15


def _off_centre(count: int) -> list[Scene]:
    """Sample single objects away from the middle, their expected place under a caption without a place."""
    scenes = held_out_scenes("single", 3 * count, seed=30)
    return [scene for scene in scenes if scene.groups[0].place not in {"", "center"}][:count]


def _recoloured(rng: np.random.Generator, scene: Scene) -> Scene:
    """Return the same layout in newly drawn colours, all different."""
    background_colour, *colours = (COLOUR_NAMES[i] for i in rng.permutation(8)[: len(scene.groups) + 1])
    groups = tuple(replace(group, colour=colour) for group, colour in zip(scene.groups, colours, strict=True))
    return replace(scene, background=background_colour, groups=groups)


def _in_place_of_the_first(scene: Scene) -> Scene:
    """Keep only the second object's words: they are to be filled in at the place of the first."""
    return replace(scene, groups=scene.groups[1:])


def _yellow(group: Group) -> Group:
    return replace(group, colour="yellow")


def _only_inside(pictures: Sequence[Picture], sources: Sequence[Picture], holes: Sequence[Mask]) -> list[Picture]:
    """Replace everything outside the hole with the source's own background colour, so that it is not detected."""
    return [
        np.where(hole[..., None], picture, source[0, 0]).astype(np.uint8)
        for picture, source, hole in zip(pictures, sources, holes, strict=True)
    ]


def _same_edges(picture: Picture, truth: Picture) -> float:
    return edge_agreement(edges(picture), edges(truth), tolerance=0)


_RESEMBLANCES: Sequence[tuple[str, str, Callable[[Picture, Picture], float]]] = (
    ("PSNR", "dB", psnr),
    ("outline overlap", "share", outline_overlap),
    ("Canny edges on the same pixel", "share", _same_edges),
)


def _mean_of(
    compare: Callable[[Picture, Picture], float], pictures: Sequence[Picture], truth: Sequence[Picture]
) -> float:
    return float(np.mean([compare(one, true) for one, true in zip(pictures, truth, strict=True)]))


def _fastest(call: Callable[[int], object], size: int) -> float:
    durations = []
    for _ in range(3):
        start = time.perf_counter()
        call(size)
        durations.append(time.perf_counter() - start)
    return min(durations)
