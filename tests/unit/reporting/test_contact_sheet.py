"""The contact sheet: small, labelled, and read from storage only once."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageFont

from sdpipeline.reporting import contact_sheet
from sdpipeline.reporting.contact_sheet import LABEL_LINES, LINE, MARGIN, THUMBNAIL, Tile


def noise(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (THUMBNAIL, THUMBNAIL, 3), dtype=np.uint8)
    return Image.fromarray(pixels, "RGB")


def beneath(sheet: Image.Image, column: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The area for the caption under a picture in the first row."""
    left = column * (THUMBNAIL + MARGIN)
    return np.asarray(sheet)[THUMBNAIL : THUMBNAIL + LABEL_LINES * LINE, left : left + THUMBNAIL]


def test_a_picture_is_told_by_stage_seed_row_and_variables() -> None:
    picture = {"stage": "scene", "seed": 7, "row": "C-001", "variables": {"ground": "white", "colour": "red"}}
    assert contact_sheet.label(picture) == ["scene · seed 7", "C-001", "white, red"]


def test_a_stages_own_seed_is_the_one_that_is_told() -> None:
    picture = {"stage": "scene", "seed": 0, "row": "", "variables": {"colour": "red", "draft.seed": 4, "scene.seed": 9}}
    assert contact_sheet.label(picture) == ["scene · seed 9", "", "red, 4"]


def test_words_stand_beneath_their_own_picture() -> None:
    sheet = contact_sheet.tiled([Tile(noise(0), ["scene · seed 7"]), Tile(noise(1), [])])
    assert beneath(sheet, 0).min() < 100
    assert beneath(sheet, 1).min() == 255


@pytest.mark.parametrize("text", ["", "short", "a very long row key that cannot stand under a picture", "行" * 60])
def test_words_stay_under_their_picture(text: str) -> None:
    font = ImageFont.load_default(size=contact_sheet.FONT_SIZE)
    shown = contact_sheet._shortened(text, font)
    assert font.getlength(shown) <= THUMBNAIL
    assert shown == text or shown.endswith("…")


@pytest.mark.parametrize("count", [1, 7, 48])
def test_a_sheet_fits_even_of_pictures_that_do_not_compress(count: int) -> None:
    sheet = contact_sheet.fitted([Tile(noise(n), [f"draft · seed {n}"]) for n in range(count)], 200_000)
    assert sheet is not None
    assert len(sheet) <= 200_000
    assert Image.open(io.BytesIO(sheet)).format == "JPEG"


def test_where_not_all_fit_the_newest_are_kept() -> None:
    tiles = [Tile(noise(n), []) for n in range(48)]
    sheet = contact_sheet.fitted(tiles, 20_000)
    assert sheet is not None
    assert len(sheet) <= 20_000
    assert Image.open(io.BytesIO(sheet)).width < 48 * THUMBNAIL


def test_nothing_is_no_sheet() -> None:
    assert contact_sheet.fitted([], 200_000) is None
