"""Measures detect in drawn scenes the objects that were drawn."""

import cv2
import numpy as np
import pytest

from sdpipeline.demo.measure import background, edge_agreement, mean_difference, outline_overlap, psnr, sightings
from sdpipeline.demo.scenes import COLOURS, SHAPES, Item, Picture, draw, render, sample_scene
from sdpipeline.engine.quality import edges


def a_picture(*items: Item, ground: str = "blue") -> Picture:
    return draw(items, COLOURS, background=COLOURS[ground], side=128)


def a_star(**changes: float) -> Item:
    place = {"x": 0.3, "y": 0.6, "radius": 0.2} | changes
    return Item(colour="yellow", shape="star", **place)


def test_every_drawn_scene_is_recognised_whole() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        scene = sample_scene(rng)
        picture = render(rng, scene, side=128)
        drawn = sorted((item.colour, item.shape) for item in scene.items)
        assert background(picture) == scene.background
        assert sorted((found.colour, found.shape) for found in sightings(picture)) == drawn


@pytest.mark.parametrize("shape", SHAPES)
def test_a_small_shape_is_told_from_the_others(shape: str) -> None:
    item = Item(colour="white", shape=shape, x=0.5, y=0.5, radius=0.15)
    assert sightings(a_picture(item))[0].shape == shape


def test_a_sighting_lies_where_the_shape_was_drawn() -> None:
    (found,) = sightings(a_picture(a_star()))
    assert abs(found.x - 0.3) < 0.02
    assert abs(found.y - 0.6) < 0.05


def test_the_largest_shape_comes_first() -> None:
    small = Item(colour="red", shape="circle", x=0.75, y=0.3, radius=0.14)
    assert [found.colour for found in sightings(a_picture(small, a_star(radius=0.25)))] == ["yellow", "red"]


def test_an_empty_ground_shows_nothing() -> None:
    assert sightings(a_picture()) == []


def test_edges_agree_with_themselves_and_not_with_none() -> None:
    asked = edges(a_picture(a_star()))
    assert edge_agreement(asked, asked, tolerance=0) == pytest.approx(1)
    assert edge_agreement(np.zeros_like(asked), asked, tolerance=0) == 0


def test_a_blurred_outline_overlaps_less_than_a_sharp_one() -> None:
    sharp = a_picture(a_star())
    blurred = np.asarray(cv2.GaussianBlur(sharp, (0, 0), 2.0), np.uint8)
    assert outline_overlap(sharp, sharp) == pytest.approx(1)
    assert outline_overlap(blurred, sharp) < 0.7


def test_psnr_falls_with_the_difference_and_is_infinite_without() -> None:
    picture = a_picture()
    assert psnr(picture, picture) == float("inf")
    assert psnr(picture + np.uint8(1), picture) == pytest.approx(48.13, abs=0.01)


def test_the_mean_difference_counts_only_the_pixels_asked_for() -> None:
    picture = a_picture()
    changed = picture.copy()
    changed[:64] += np.uint8(10)
    upper = np.zeros(picture.shape[:2], bool)
    upper[:64] = True
    assert mean_difference(changed, picture) == 5
    assert mean_difference(changed, picture, upper) == 10
    assert mean_difference(changed, picture, ~upper) == 0
