"""Captions match the scene, and labels match the captions."""

import numpy as np

from sdpipeline.demo.captions import FACETS, UNSAID, caption, describe, silent_caption
from sdpipeline.demo.scenes import Group, Scene, sample_scene


def a_placed_pair() -> Scene:
    return Scene(
        background="orange",
        groups=(
            Group(count=1, size="small", colour="orange", shape="star", place="left"),
            Group(count=2, size="", colour="blue", shape="heart", place=""),
        ),
        items=(),
    )


def test_the_plain_caption_names_number_size_colour_shape_place_and_ground() -> None:
    said = "a small orange star on the left and two blue hearts on an orange background"
    assert caption(a_placed_pair()) == said


def test_the_silent_caption_names_neither_place_nor_size() -> None:
    assert silent_caption(a_placed_pair()) == "an orange star and two blue hearts on an orange background"


def test_one_wording_in_ten_is_empty_and_states_nothing() -> None:
    rng = np.random.default_rng(0)
    wordings = [describe(rng, a_placed_pair()) for _ in range(1000)]
    empty = [wording for wording in wordings if not wording.text]
    assert 70 < len(empty) < 130
    assert all(set(wording.labels) == {UNSAID} for wording in empty)


def test_labels_follow_the_order_of_the_words() -> None:
    rng = np.random.default_rng(1)
    facets = list(FACETS)
    for _ in range(200):
        wording = describe(rng, a_placed_pair())
        if wording.text:
            first = FACETS["colour first"][wording.labels[facets.index("colour first")]]
            told = wording.text.split(" background with ")[-1].removeprefix("a picture of ")
            assert min(("orange", "blue"), key=told.index) == first


def test_a_ground_left_out_of_the_words_is_left_open_in_the_labels() -> None:
    rng = np.random.default_rng(2)
    wordings = [describe(rng, a_placed_pair()) for _ in range(500)]
    assert all((wording.labels[0] == UNSAID) == ("background" not in wording.text) for wording in wordings)


def test_every_label_is_a_value_of_its_facet() -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        labels = describe(rng, sample_scene(rng), silent=bool(rng.random() < 0.5)).labels
        assert all(
            label == UNSAID or 0 <= label < len(values) for label, values in zip(labels, FACETS.values(), strict=True)
        )
