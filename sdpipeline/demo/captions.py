"""Captions of a scene in random wordings, with labels for the facts that they state."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from sdpipeline.demo.scenes import COLOUR_NAMES, PLACES, SHAPES, SIZES, Group, Scene

FACETS: Mapping[str, tuple[str, ...]] = {
    "background": COLOUR_NAMES,
    **{
        f"{facet} {rank}": values
        for rank in ("first", "second")
        for facet, values in {
            "count": ("0", "1", "2", "3"),
            "size": tuple(SIZES),
            "colour": ("", *COLOUR_NAMES),
            "shape": ("", *SHAPES),
            "place": ("", *PLACES),
        }.items()
    },
}
"""Facets that a caption can state, each with its possible values."""

UNSAID = -100
"""Label of a facet that the caption leaves open (cross-entropy's ignore_index)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caption:
    """Wording, and the index of the value that it states for each of FACETS."""

    text: str
    labels: tuple[int, ...]


def caption(scene: Scene) -> str:
    """Return the plainest wording, which evaluation uses."""
    return f"{_phrases(scene.groups)} on {_article(scene.background)} background"


def silent_caption(scene: Scene) -> str:
    """Return the plainest wording without place and size, for control from outside."""
    return caption(_without_layout(scene))


def describe(rng: np.random.Generator, scene: Scene, *, silent: bool = False) -> Caption:
    """Return a random wording; `silent` leaves out place and size, and one in ten is empty."""
    if rng.random() < 0.1:
        return Caption(text="", labels=(UNSAID,) * len(FACETS))
    described = _without_layout(scene) if silent else scene
    groups = described.groups[::-1] if rng.random() < 0.5 else described.groups
    order = rng.choice(3, p=(0.83, 0.12, 0.05))
    text = (
        f"{_phrases(groups)} on {_article(scene.background)} background",
        f"{_article(scene.background)} background with {_phrases(groups)}",
        _phrases(groups),
    )[order]
    labels = _labels("" if order == 2 else scene.background, groups)
    return Caption(text=_reworded(rng, text), labels=labels)


_NUMBERS = {1: "a", 2: "two", 3: "three"}
_WHERE = {
    "": "",
    "left": " on the left",
    "right": " on the right",
    "top": " at the top",
    "bottom": " at the bottom",
    "center": " in the center",
}
_SYNONYMS = {"large": "big", "small": "little", "center": "middle"}
# Words of real prompts that mean nothing here: the checkpoint must ignore them.
_FILLERS = """
    best quality highly detailed photo studio light masterpiece sharp 4k flat vector art soft
    product catalogue minimal clean modern bright nice poster simple graphic design render
""".split()  # noqa: SIM905 as a list it would be a page long


def _without_layout(scene: Scene) -> Scene:
    return replace(scene, groups=tuple(replace(group, size="", place="") for group in scene.groups))


def _phrases(groups: tuple[Group, ...]) -> str:
    return " and ".join(_phrase(group) for group in groups)


def _phrase(group: Group) -> str:
    noun = group.shape + ("s" if group.count > 1 else "")
    words = " ".join(word for word in (group.size, group.colour, noun) if word)
    counted = _article(words) if group.count == 1 else f"{_NUMBERS[group.count]} {words}"
    return counted + _WHERE[group.place]


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _reworded(rng: np.random.Generator, text: str) -> str:
    if rng.random() < 0.2:
        for word, synonym in _SYNONYMS.items():
            text = text.replace(word, synonym)
    if rng.random() < 0.05:
        text = f"a picture of {text}"
    if rng.random() < 0.12:
        count = int(rng.integers(1, 5))
        extra = " ".join(_filler(rng) for _ in range(count))
        text = f"{text}{', ' if rng.random() < 0.7 else ' '}{extra}"
    return text


def _filler(rng: np.random.Generator) -> str:
    if rng.random() < 0.7:
        return _FILLERS[int(rng.integers(len(_FILLERS)))]
    letters = rng.integers(0, 26, int(rng.integers(2, 8)))
    return "".join(chr(ord("a") + int(letter)) for letter in letters)


def _labels(background: str, groups: tuple[Group, ...]) -> tuple[int, ...]:
    labels = {"background": background}
    for rank, group in zip(("first", "second"), (*groups, _NOTHING), strict=False):
        labels |= {
            f"count {rank}": str(group.count),
            f"size {rank}": group.size,
            f"colour {rank}": group.colour,
            f"shape {rank}": group.shape,
            f"place {rank}": group.place,
        }
    return tuple(values.index(labels[facet]) if labels[facet] in values else UNSAID for facet, values in FACETS.items())


_NOTHING = Group(count=0, size="", colour="", shape="", place="")
