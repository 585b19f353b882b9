from __future__ import annotations

import numpy as np
import pytest

from sdpipeline.engine import Pixels
from sdpipeline.engine.annotators import ANNOTATORS, RESIZE_MODES, annotate, resize
from sdpipeline.errors import InputImageError, RequestRefusedError

WEIGHTLESS = [name for name, annotator in ANNOTATORS.items() if not annotator.learned]


def photograph(width: int = 96, height: int = 64) -> Pixels:
    """A gradient with a bright block: edges, colours and areas."""
    y, x = np.mgrid[0:height, 0:width]
    picture = np.stack([x * 2 % 256, y * 3 % 256, (x + y) % 256], axis=-1).astype(np.uint8)
    picture[20:40, 30:60] = (250, 30, 30)
    return picture


@pytest.mark.parametrize("name", WEIGHTLESS)
def test_an_annotator_keeps_the_size_and_repeats_itself(name: str) -> None:
    first, second = annotate(name, photograph(), {}), annotate(name, photograph(), {})
    assert first.shape == photograph().shape
    assert first.dtype == np.uint8
    assert (first == second).all()


@pytest.mark.parametrize("name", WEIGHTLESS)
def test_an_annotator_leaves_its_input_alone(name: str) -> None:
    given = photograph()
    annotate(name, given, {})
    assert (given == photograph()).all()


@pytest.mark.parametrize("name", WEIGHTLESS)
def test_parameters_have_defaults_within_their_ranges(name: str) -> None:
    for key, limit in ANNOTATORS[name].parameters.items():
        assert ANNOTATORS[name].refusal(name, key, int(limit.default) if limit.integer else limit.default) is None


def test_canny_finds_more_edges_at_lower_thresholds() -> None:
    soft = annotate("canny", photograph(), {"low_threshold": 10, "high_threshold": 20})
    assert (soft > 0).sum() > (annotate("canny", photograph(), {}) > 0).sum() > 0


def test_unknown_names_and_parameters_are_refused_with_those_there_are() -> None:
    with pytest.raises(RequestRefusedError, match="unknown annotator 'cany'; use one of none, canny"):
        annotate("cany", photograph(), {})
    with pytest.raises(RequestRefusedError, match="has no parameter 'low'; it takes: low_threshold"):
        annotate("canny", photograph(), {"low": 3})
    with pytest.raises(RequestRefusedError, match="low_threshold must be a number from 0 to 1000, not 'x'"):
        annotate("canny", photograph(), {"low_threshold": "x"})


@pytest.mark.parametrize("mode", RESIZE_MODES)
@pytest.mark.parametrize(("width", "height"), [(64, 64), (200, 40), (31, 97)])
def test_every_mode_gives_the_size_asked_for(mode: str, width: int, height: int) -> None:
    assert resize(photograph(), width, height, mode).shape == (height, width, 3)


def test_a_picture_of_the_right_size_passes_untouched_in_any_mode() -> None:
    assert resize(photograph(), 96, 64, None) is not None
    assert (resize(photograph(), 96, 64, "pad") == photograph()).all()


def test_without_a_mode_another_size_is_refused() -> None:
    with pytest.raises(InputImageError, match="the input is 96x64, not 64x64; set resize: stretch or crop or pad"):
        resize(photograph(), 64, 64, None)
    with pytest.raises(RequestRefusedError, match="unknown resize mode 'fit'"):
        resize(photograph(), 64, 64, "fit")


def test_crop_keeps_the_middle_and_pad_keeps_everything() -> None:
    assert (resize(photograph(), 32, 64, "crop") == photograph()[:, 32:64]).all()
    padded = resize(photograph(), 96, 96, "pad")
    assert (padded[16:80] == photograph()).all()
    assert padded[:16].max() == 0


def test_canny_sees_the_edge_between_two_colours_of_one_brightness() -> None:
    picture = np.full((64, 64, 3), (140, 60, 185), dtype=np.uint8)
    picture[16:48, 16:48] = (220, 38, 38)
    edges = annotate("canny", picture, {"low_threshold": 60, "high_threshold": 140})
    assert edges.max() == 255
