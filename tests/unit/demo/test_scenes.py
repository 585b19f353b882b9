"""Scenes: drawing, and combinations held out from training."""

import numpy as np
import pytest

from sdpipeline.demo.scenes import (
    COLOURS,
    SHAPES,
    Group,
    Item,
    Scene,
    draw,
    is_held_out,
    polygon,
    render,
    sample_scene,
    shrink,
    texture,
)


def a_scene(*groups: tuple[str, str], background: str = "white") -> Scene:
    return Scene(
        background=background,
        groups=tuple(Group(count=1, size="", colour=colour, shape=shape, place="") for colour, shape in groups),
        items=(),
    )


def test_the_same_seed_draws_the_same_picture() -> None:
    first, second = (np.random.default_rng(7) for _ in range(2))
    pictures = [render(rng, sample_scene(rng), side=64) for rng in (first, second)]
    assert (pictures[0] == pictures[1]).all()


def test_training_never_sees_a_held_out_combination() -> None:
    rng = np.random.default_rng(0)
    assert not any(is_held_out(sample_scene(rng)) for _ in range(300))


def test_evaluation_sees_only_held_out_combinations() -> None:
    rng = np.random.default_rng(0)
    assert all(is_held_out(sample_scene(rng, held_out=True)) for _ in range(50))


def test_the_order_of_two_objects_does_not_change_whether_they_are_held_out() -> None:
    pairs = [(("red", first), ("blue", second)) for first in SHAPES for second in SHAPES]
    assert all(is_held_out(a_scene(*pair)) == is_held_out(a_scene(*pair[::-1])) for pair in pairs)


def test_about_a_tenth_of_all_single_objects_is_held_out() -> None:
    colours = list(COLOURS)
    held_out = [
        is_held_out(a_scene((colour, shape), background=ground))
        for colour in colours
        for shape in SHAPES
        for ground in colours
        if ground != colour
    ]
    assert 0.05 < np.mean(held_out) < 0.15


def test_shapes_of_a_scene_do_not_touch() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        items = sample_scene(rng, kinds={"counted": 1.0}).items
        for i, one in enumerate(items):
            for other in items[i + 1 :]:
                assert np.hypot(one.x - other.x, one.y - other.y) > one.radius + other.radius


def test_a_scene_shows_each_shape_in_its_colour_on_its_ground() -> None:
    item = Item(colour="red", shape="circle", x=0.5, y=0.5, radius=0.25)
    picture = draw([item], COLOURS, background=COLOURS["white"], side=64)
    assert tuple(picture[32, 32]) == COLOURS["red"]
    assert tuple(picture[2, 2]) == COLOURS["white"]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_fills_its_radius_and_no_more(shape: str) -> None:
    assert 0.85 < np.abs(polygon(shape)).max() < 1.1


def test_an_unknown_shape_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'hexagon'; known are circle"):
        polygon("hexagon")


def test_shrinking_keeps_the_mean_colour() -> None:
    picture = texture(np.random.default_rng(3), side=64)
    assert shrink(picture, 4).shape == (16, 16, 3)
    assert abs(float(shrink(picture, 4).mean()) - float(picture.mean())) < 0.5
