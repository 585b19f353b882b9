"""Reliance on diffusers' internals: listed, explained, and refused if their shape has changed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sdpipeline.errors import SettingsError

pytest.importorskip("diffusers")

import diffusers
import diffusers.utils.torch_utils
import torch

from sdpipeline.domain import CheckpointRef
from sdpipeline.engine.checkpoints import CheckpointFiles
from sdpipeline.engine.diffusers import patches
from sdpipeline.engine.diffusers.engine import DiffusersEngine
from sdpipeline.engine.diffusers.patches import PATCHES
from sdpipeline.engine.diffusers.pipeline_call import unpack_latents


def test_the_patches_are_these() -> None:
    assert [patch.target for patch in PATCHES] == [
        "diffusers.utils.torch_utils.torch",
        "AutoencoderKL.encode and DiagonalGaussianDistribution.sample",
        "do_classifier_free_guidance and the product of guidance_scale with a tensor",
    ]
    assert all(patch.why and patch.until for patch in PATCHES)


def test_the_installed_diffusers_has_the_expected_shape() -> None:
    patches.check()


def test_another_shape_is_refused_with_what_to_install() -> None:
    changed = replace(PATCHES[0], intact=lambda: False)
    with pytest.raises(SettingsError, match=r"has changed diffusers.*pip install 'diffusers"):
        patches.check([changed])


def test_no_engine_starts_with_another_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "PATCHES", (replace(PATCHES[0], intact=lambda: False),))
    with pytest.raises(SettingsError, match="has changed"):
        DiffusersEngine(device="cpu", dtype=None, locate=_locate_nothing)


def _locate_nothing(ref: CheckpointRef) -> CheckpointFiles:
    raise AssertionError(f"{ref} is not needed")


def _draw_otherwise(*_: object, **__: object) -> torch.Tensor:
    return torch.zeros(1)


def test_each_check_notices_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers.utils.torch_utils, "randn_tensor", _draw_otherwise)
    monkeypatch.setattr(diffusers.AutoencoderKL, "encode", lambda self, pixels: pixels)
    monkeypatch.setattr(
        diffusers.StableDiffusionPipeline, "do_classifier_free_guidance", property(lambda self: self._guidance_scale)
    )
    assert [patch.intact() for patch in PATCHES] == [False, False, False]


def test_flux_latents_are_unpacked_as_diffusers_does() -> None:
    packed = torch.randn(2, 4 * 6, 64, generator=torch.Generator().manual_seed(0))
    ours = unpack_latents(packed, 64, 96, 8)
    theirs = diffusers.FluxPipeline._unpack_latents(packed, 64, 96, 8)
    assert torch.equal(ours, theirs)
    assert ours.stride() == theirs.stride()
