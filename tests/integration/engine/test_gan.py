"""GAN upscalers: tiles without seams, and a clear refusal if the extra is not installed."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sdpipeline.domain import Task
from sdpipeline.engine.checkpoints import inspect
from sdpipeline.engine.gan import enlarge, upscale
from sdpipeline.errors import CheckpointError, DeviceExhaustedError
from tests.integration.engine_requests import failure_of, new_engine, noise, prepared, request, results
from tests.integration.tiny_checkpoints import TinyCheckpoints


class Doubling(torch.nn.Module):
    """Upscaler by 2 that blurs over 3 pixels, so that tiles without overlap would show seams."""

    def __init__(self, limit: int = 10_000) -> None:
        super().__init__()
        self.blur = torch.nn.Conv2d(3, 3, 3, padding=1, groups=3)
        self.blur.weight.data.fill_(1 / 9)
        self.limit = limit

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        if max(pictures.shape[2:]) > self.limit:
            raise torch.OutOfMemoryError("injected")
        made: torch.Tensor = self.blur(torch.nn.functional.interpolate(pictures, scale_factor=2))
        return made


def test_tiles_join_without_a_seam() -> None:
    picture = noise(size=150)[:90]
    network = Doubling()
    whole = enlarge(network, picture, 2, tile=1000)
    tiled = enlarge(network, picture, 2, tile=32)
    assert whole.shape == (180, 300, 3)
    assert np.abs(whole.astype(int) - tiled.astype(int)).max() <= 1


def test_tiles_shrink_until_they_fit_into_memory() -> None:
    freed: list[bool] = []
    made, fallbacks = upscale(Doubling(limit=330), noise(size=600), 2, free=lambda: freed.append(True))
    assert made.shape == (1200, 1200, 3)
    assert fallbacks == ["tiles of 256 instead of 512: out of memory"]
    assert freed == [True]


def test_a_tile_that_never_fits_is_worth_another_try_elsewhere() -> None:
    with pytest.raises(DeviceExhaustedError, match="out of memory for a tile of 128 pixels"):
        upscale(Doubling(limit=1), noise(), 2, free=lambda: None)


def _upscaler(folder: Path, scale: int, name: str) -> None:
    """A compact upscaler in a layout that spandrel reads."""
    convs = {0: (8, 3, 3, 3), 2: (8, 8, 3, 3), 4: (3 * scale * scale, 8, 3, 3)}
    tensors = {f"body.{n}.weight": torch.zeros(shape) for n, shape in convs.items()}
    tensors |= {f"body.{n}.bias": torch.zeros(shape[0]) for n, shape in convs.items()}
    tensors |= {f"body.{n}.weight": torch.zeros(8) for n in (1, 3)}
    save_file(tensors, folder / name)


@pytest.mark.parametrize("name", ["sharp.safetensors", "8x-lora-sharp.safetensors", "x1-sharp.safetensors"])
def test_the_factor_of_an_upscaler_comes_from_its_tensors_whatever_its_name_says(tmp_path: Path, name: str) -> None:
    _upscaler(tmp_path, 4, name)
    files = inspect("sharp", tmp_path)
    assert (files.kind, files.family, files.scale) == ("checkpoint", "gan-upscale", 4)


def test_an_upscaler_whose_tensors_do_not_tell_its_factor_is_refused(tmp_path: Path) -> None:
    save_file({"conv_first.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "4x-sharp.safetensors")
    with pytest.raises(CheckpointError, match=r"looks like a GAN upscaler, but .*(sdpipeline\[upscalers\]|spandrel)"):
        inspect("sharp", tmp_path)


def test_an_upscaler_without_its_extra_is_refused_with_the_extra_to_install(tmp_path: Path) -> None:
    _upscaler(tmp_path, 4, "sharp.safetensors")
    own = TinyCheckpoints(tmp_path)
    asked = replace(request(task=Task.SUPER_RESOLUTION), checkpoint=own.add(inspect("sharp", tmp_path)))
    prepared_request = prepared(asked, image=noise())
    if importlib.util.find_spec("spandrel") is None:
        refused = failure_of(results(prepared_request, on=new_engine(own))[0])
        assert "is a GAN upscaler, which needs sdpipeline[upscalers] installed" in refused
