"""The shipped checkpoints follow their prompts and inputs in diffusers' stock pipelines."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch", reason="the engine's extra is not installed")

from sdpipeline.demo.captions import caption, silent_caption
from sdpipeline.demo.manifest import measure_manifest, read_manifest, size_bytes
from sdpipeline.demo.measure import mean_difference, outline_overlap, psnr
from sdpipeline.demo.scenes import Group, Picture, Scene, render, shrink
from sdpipeline.demo.studio import Studio
from sdpipeline.demo.trials import Seen, enlarged, held_out_scenes, hole_around, look_at
from sdpipeline.engine.quality import edge_recall, edges


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio()


def pictures_of(scenes: Sequence[Scene], *, side: int) -> list[Picture]:
    rng = np.random.default_rng(5)
    return [render(rng, scene, side=side) for scene in scenes]


def shows(seen: Seen, group: Group) -> bool:
    return any((found.colour, found.shape) == (group.colour, group.shape) for found in seen.shapes)


def test_the_manifest_matches_the_files() -> None:
    assert read_manifest() == measure_manifest()


def test_the_checkpoints_weigh_at_most_twenty_megabytes() -> None:
    assert size_bytes() <= 20_000_000


@pytest.mark.long
def test_a_prompt_never_trained_on_decides_ground_colour_and_shape(studio: Studio) -> None:
    scenes = held_out_scenes("single", 6, seed=900)
    seen = look_at(studio.draw([caption(scene) for scene in scenes], seed=900))
    assert [found.background for found in seen] == [scene.background for scene in scenes]
    assert sum(shows(found, scene.groups[0]) for found, scene in zip(seen, scenes, strict=True)) >= 5


@pytest.mark.long
def test_two_objects_get_a_colour_each(studio: Studio) -> None:
    scenes = held_out_scenes("pair", 4, seed=901)
    seen = look_at(studio.draw([caption(scene) for scene in scenes], seed=901))
    colours = [{found.colour for found in picture.shapes} for picture in seen]
    asked = [{group.colour for group in scene.groups} for scene in scenes]
    assert sum(found == wanted for found, wanted in zip(colours, asked, strict=True)) >= 3


@pytest.mark.long
def test_control_places_what_the_words_do_not(studio: Studio) -> None:
    scenes = [scene for scene in held_out_scenes("single", 40, seed=902) if scene.groups[0].place in {"left", "top"}]
    asked = [edges(picture) for picture in pictures_of(scenes[:3], side=128)]
    prompts = [silent_caption(scene) for scene in scenes[:3]]

    def recall(pictures: Sequence[Picture]) -> float:
        return float(np.mean([edge_recall(edges(one), own) for one, own in zip(pictures, asked, strict=True)]))

    assert recall(studio.follow(prompts, asked, seed=902)) > 0.85
    assert recall(studio.draw(prompts, seed=902)) < 0.5


@pytest.mark.long
def test_the_input_fades_as_strength_grows(studio: Studio) -> None:
    scenes = held_out_scenes("single", 2, seed=903)
    sources = pictures_of(scenes, side=128)
    prompts = [f"a yellow {scene.groups[0].shape} on a green background" for scene in scenes]
    likeness = [
        np.mean([psnr(one, own) for one, own in zip(changed, sources, strict=True)])
        for changed in (studio.change(prompts, sources, strength=share, seed=903) for share in (0.2, 0.5, 0.8))
    ]
    assert likeness == sorted(likeness, reverse=True)


@pytest.mark.long
def test_inpainting_fills_the_hole_and_leaves_the_rest(studio: Studio) -> None:
    scenes = held_out_scenes("pair", 4, seed=904, placed=True)
    sources = pictures_of([replace(scene, items=scene.items[:1]) for scene in scenes], side=128)
    holes = [hole_around(scene.items[1]) for scene in scenes]
    filled = studio.fill([caption(scene) for scene in scenes], sources, holes, seed=904)
    there = [shows(seen, scene.groups[1]) for seen, scene in zip(look_at(filled), scenes, strict=True)]
    change = [mean_difference(one, own, ~hole) for one, own, hole in zip(filled, sources, holes, strict=True)]
    assert sum(there) >= 3
    assert np.mean(change) < 2


@pytest.mark.long
def test_super_resolution_is_sharper_and_closer_than_bicubic(studio: Studio) -> None:
    scenes = held_out_scenes("single", 2, seed=905)
    truth = pictures_of(scenes, side=512)
    small = [shrink(picture, 4) for picture in truth]
    made = studio.upscale(["any words at all", ""], small, seed=905)
    for ours, true, low in zip(made, truth, small, strict=True):
        assert psnr(ours, true) > psnr(enlarged(low), true)
        assert outline_overlap(ours, true) > outline_overlap(enlarged(low), true)
