"""Quality metrics on drawn pictures, and the thresholds of a campaign."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from sdpipeline.demo.scenes import COLOURS, Item, draw
from sdpipeline.domain import ControlNetInput, ImageSource
from sdpipeline.engine import Pixels
from sdpipeline.engine import quality as scores
from sdpipeline.engine.annotators import ANNOTATORS, annotate
from sdpipeline.errors import BadPictureError
from tests.factories import CHECKPOINT, mistakes_of

WITH_CANNY = """
    {head}
    stages:
      - id: draft
        task: text-to-image
        prompt: x
        {draft}
      - id: scene
        task: text-to-image
        prompt: x
        controlnets: [{{checkpoint: shapes-canny, image: {{stage: draft}}, annotator: {annotator}}}]
"""


def a_picture(x: float = 0.3, shape: str = "star", *, side: int = 128) -> Pixels:
    item = Item(colour="yellow", shape=shape, x=x, y=0.6, radius=0.2)
    return draw([item], COLOURS, background=COLOURS["blue"], side=side)


def blurred(pixels: Pixels, sigma: float) -> Pixels:
    return np.asarray(cv2.GaussianBlur(pixels, (0, 0), sigma), np.uint8)


def by(annotator: str) -> ControlNetInput:
    return ControlNetInput(checkpoint=CHECKPOINT, image=ImageSource(digest="d"), annotator=annotator)


def apart(one: Pixels, other: Pixels) -> int:
    """Hamming distance of the perceptual hashes, of 64 bits."""
    return (int(scores.perceptual_hash(one), 16) ^ int(scores.perceptual_hash(other), 16)).bit_count()


def reencoded(pixels: Pixels, quality: int) -> Pixels:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=quality)
    return np.asarray(Image.open(file))


def test_the_more_a_picture_is_blurred_the_less_sharp_it_is() -> None:
    picture = a_picture()
    measured = [scores.sharpness(blurred(picture, sigma)) for sigma in (0.5, 1, 2, 4)]
    assert measured == sorted(measured, reverse=True)
    assert scores.sharpness(picture) > 10 * measured[2] > 0
    assert scores.sharpness(np.full((64, 64, 3), 90, np.uint8)) == 0


def test_sharpness_is_the_variance_of_the_grey_levels_second_differences() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 1), dtype=np.uint8)
    grey = np.pad(noise[..., 0].astype(float), 1, mode="reflect")
    across = grey[1:-1, :-2] + grey[1:-1, 2:] + grey[:-2, 1:-1] + grey[2:, 1:-1] - 4 * grey[1:-1, 1:-1]
    assert scores.sharpness(np.repeat(noise, 3, axis=2)) == pytest.approx(across.var(), abs=0.01)


def test_the_hash_is_imagehashs_phash() -> None:
    y, x = np.mgrid[0:96, 0:128]
    rings = np.stack([(np.hypot(x - 40, y - 50) * 24) % 256, (x * 24) % 256, (y * x) % 256], -1).astype(np.uint8)
    assert scores.perceptual_hash(rings) == "8004186f2adf7f57"  # str(imagehash.phash(...)) of imagehash 4.3.2


def test_the_hash_survives_encoding_and_resizing_and_tells_pictures_apart() -> None:
    picture = a_picture(side=256)
    smaller = np.asarray(cv2.resize(picture, (230, 230), interpolation=cv2.INTER_AREA), np.uint8)
    assert max(apart(picture, each) for each in (reencoded(picture, 60), reencoded(picture, 20), smaller)) <= 6
    assert min(apart(picture, a_picture(x=0.7)), apart(picture, a_picture(shape="square"))) >= 10


def test_edges_within_the_tolerance_are_recalled_and_others_are_not() -> None:
    asked = scores.edges(a_picture())
    assert scores.edge_recall(scores.edges(a_picture(x=0.31)), asked) > 0.95
    assert scores.edge_recall(scores.edges(a_picture(x=0.6)), asked) < 0.4


@pytest.mark.parametrize("annotator", scores.EDGE_ANNOTATORS)
def test_a_picture_agrees_with_its_own_edge_map_and_less_with_anothers(annotator: str) -> None:
    picture = a_picture()
    own, other = (annotate(annotator, each, {}) for each in (picture, a_picture(x=0.6)))
    assert scores.measure(picture, [(by(annotator), own)])["edge_agreement"] == 1
    assert scores.measure(picture, [(by(annotator), own), (by(annotator), other)])["edge_agreement"] < 0.4


def test_an_edge_map_of_half_the_size_is_compared_at_the_pictures() -> None:
    own = annotate("canny", a_picture(side=64), {})
    assert scores.measure(a_picture(side=128), [(by("canny"), own)])["edge_agreement"] > 0.9


@pytest.mark.parametrize("annotator", sorted({*ANNOTATORS} - {*scores.EDGE_ANNOTATORS}))
def test_maps_that_show_no_edges_are_not_compared(annotator: str) -> None:
    assert "edge_agreement" not in scores.measure(a_picture(), [(by(annotator), a_picture())])


def test_a_map_that_asks_for_no_edge_is_not_compared() -> None:
    assert "edge_agreement" not in scores.measure(a_picture(), [(by("canny"), np.zeros((128, 128, 3), np.uint8))])


@pytest.mark.parametrize(
    ("thresholds", "said"),
    [
        ({"min_sharpness": 50}, "its sharpness 12.5 is less than min_sharpness 50 (a retry makes the same picture: "),
        ({"min_edge_agreement": 0.9}, "its edge_agreement 0.8 is less than min_edge_agreement 0.9 (a retry makes"),
    ],
)
def test_a_score_below_its_threshold_is_named_with_what_to_do(thresholds: dict[str, float], said: str) -> None:
    measured: dict[str, float | str] = {"sharpness": 12.5, "perceptual_hash": "00", "edge_agreement": 0.8}
    with pytest.raises(BadPictureError) as refused:
        scores.check(measured, thresholds)
    assert str(refused.value).startswith(said)
    assert f"lower quality.{next(iter(thresholds))}" in str(refused.value)


def test_a_score_at_its_threshold_and_one_that_was_not_measured_are_let_through() -> None:
    scores.check({"sharpness": 12.5}, {"min_sharpness": 12.5, "min_edge_agreement": 0.9})
    scores.check({"sharpness": 0.0}, {})


@pytest.mark.parametrize(
    ("head", "draft", "annotator", "expected"),
    [
        (
            "",
            "quality: {min_edge_agreement: 0.5}",
            "canny",
            ["7:15: stages[0].quality.min_edge_agreement: the stage has"],
        ),
        (
            "quality: {min_edge_agreement: 0.5}",
            "",
            "colour",
            ["3:11: quality.min_edge_agreement: no stage has a Control"],
        ),
        ("quality: {min_edge_agreement: 0.5}", "", "canny", []),
        ("quality: {min_sharpness: 9}", "quality: {}", "canny", []),
        (
            "quality: {min_edge_agreement: 1.5}",
            "",
            "canny",
            ["3:11: quality.min_edge_agreement: found 1.5, expected at"],
        ),
        (
            "quality: {min_sharp: 1}",
            "",
            "canny",
            ["3:11: quality.min_sharp: unknown key (did you mean 'min_sharpness'"],
        ),
    ],
)
def test_thresholds_that_nothing_could_meet_are_refused(
    head: str, draft: str, annotator: str, expected: list[str]
) -> None:
    found = mistakes_of(WITH_CANNY.format(head=head, draft=draft, annotator=annotator.replace("colour", "colour")))
    assert [line[: len(start)] for line, start in zip(found, expected, strict=True)] == expected
