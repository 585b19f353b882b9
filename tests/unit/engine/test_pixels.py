from __future__ import annotations

import numpy as np

from sdpipeline.engine.pixels import fault, paste_back, to_pixels


def test_black_and_flat_pictures_are_faults_and_a_faint_gradient_is_not() -> None:
    gradient = np.tile(np.arange(100, 108, dtype=np.uint8), 8).reshape(8, 8, 1).repeat(3, axis=2)
    assert fault(np.zeros((8, 8, 3), np.uint8)) == "black"
    assert fault(np.full((8, 8, 3), 90, np.uint8)) == "flat"
    assert fault(gradient) is None


def test_one_channel_alone_makes_a_picture() -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[:4, :, 2] = 200
    assert fault(picture) is None


def test_floats_are_rounded_and_cut_to_eight_bits() -> None:
    assert to_pixels(np.array([[[-0.2, 0.501, 7.0]]], np.float32)).tolist() == [[[0, 128, 255]]]


def test_pasting_back_keeps_what_the_mask_leaves_black() -> None:
    mask = np.zeros((2, 2, 3), np.uint8)
    mask[0, 0] = 200
    pasted = paste_back(np.full((2, 2, 3), 9, np.uint8), np.full((2, 2, 3), 5, np.uint8), mask)
    assert pasted[..., 0].tolist() == [[9, 5], [5, 5]]
