"""Worker processes of a machine: their number and devices."""

from __future__ import annotations

import pytest

from sdpipeline.orchestration.local_workers import slots
from sdpipeline.settings import Settings


@pytest.fixture(autouse=True)
def _no_thread_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def test_a_machine_without_a_gpu_gets_one_worker_with_all_cores() -> None:
    (only,) = slots(Settings(), gpus=[], cores=8)
    assert (only.device, dict(only.environment)) == (None, {})


def test_several_workers_on_a_cpu_share_its_cores() -> None:
    assert [dict(slot.environment) for slot in slots(Settings(workers=4), gpus=[], cores=8)] == [
        {"OMP_NUM_THREADS": "2"}
    ] * 4


def test_each_gpu_gets_a_worker_that_sees_no_other() -> None:
    found = slots(Settings(), gpus=["0", "1"])
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in found] == ["0", "1"]


def test_more_workers_than_gpus_go_around_them() -> None:
    found = slots(Settings(workers=3), gpus=["0", "1"])
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in found] == ["0", "1", "0"]


def test_a_named_device_is_used_as_it_is_named() -> None:
    (only,) = slots(Settings(device="cuda:1"), gpus=["0", "1"], cores=8)
    assert (only.device, dict(only.environment)) == ("cuda:1", {})
