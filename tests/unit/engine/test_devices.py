"""Devices of a machine, from its environment and the settings."""

from __future__ import annotations

import pytest

from sdpipeline.engine.devices import devices, is_present, visible_gpus
from sdpipeline.settings import Settings


@pytest.mark.parametrize(("named", "found"), [("0,2", ["0", "2"]), ("", []), ("-1", [])])
def test_the_environment_decides_which_gpus_are_visible(
    monkeypatch: pytest.MonkeyPatch, named: str, found: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == found


def test_the_device_of_the_settings_is_that_of_every_worker() -> None:
    assert devices(Settings(device="cuda:1", workers=2)) == ["cuda:1", "cuda:1"]


@pytest.mark.parametrize("device", ["cuda:999", "cuda1", "cuda:", "gpu", "cpu:0", ""])
def test_a_device_that_this_machine_does_not_have_is_absent(device: str) -> None:
    assert is_present("cpu")
    assert not is_present(device)
