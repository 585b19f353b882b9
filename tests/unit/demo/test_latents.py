"""Designed latents: colours and edges of blocks, exact and standardised."""

import pytest

torch = pytest.importorskip("torch", reason="the engine's extra is not installed")

from sdpipeline.demo.latents import SHAPES_LATENT, UPSCALE_LATENT, DesignedLatent  # noqa: E402


@pytest.mark.parametrize("designed", [SHAPES_LATENT, UPSCALE_LATENT])
def test_a_latent_has_four_channels_and_one_cell_per_block(designed: DesignedLatent) -> None:
    pixels = torch.rand(2, 3, 64, 32) * 2 - 1
    assert designed.encode(pixels).shape == (2, 4, 64 // designed.factor, 32 // designed.factor)


def test_the_blocks_mean_colours_come_back_from_the_latent() -> None:
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    pooled = torch.nn.functional.avg_pool2d(pixels, 8)
    colours = SHAPES_LATENT.colours(SHAPES_LATENT.encode(pixels))
    torch.testing.assert_close(colours, pooled, atol=1e-5, rtol=1e-5)


def test_a_flat_picture_has_no_edges() -> None:
    assert SHAPES_LATENT.measure(torch.full((1, 3, 16, 16), 0.5))[:, 3].abs().max() == 0


def test_a_step_is_seen_in_the_block_that_holds_it_alone() -> None:
    pixels = torch.zeros(1, 3, 16, 16)
    pixels[..., 12:] = 1.0
    edge = SHAPES_LATENT.measure(pixels)[0, 3]
    assert (edge[:, 1] > 0).all()
    assert (edge[:, 0] == 0).all()


def test_autocast_does_not_round_a_latent() -> None:
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        rounded = SHAPES_LATENT.encode(pixels)
    torch.testing.assert_close(rounded, SHAPES_LATENT.encode(pixels), atol=1e-6, rtol=1e-6)
