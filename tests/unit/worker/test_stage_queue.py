from __future__ import annotations

import threading

import pytest

from sdpipeline.jobs import Lease
from sdpipeline.worker.held_leases import LeaseWork
from sdpipeline.worker.stage_queue import RunEnd, RunEnded, StageQueue


def work() -> LeaseWork:
    return LeaseWork(Lease(id="lease", group_id=1, checkpoint_digest="0" * 64, jobs=()))


def test_a_stage_that_fails_ends_the_run() -> None:
    def fail() -> None:
        raise OSError("broken")

    end = RunEnd(threading.Event())
    with pytest.raises(OSError, match="broken"):
        end.run_stage(fail)
    assert end.ended.is_set()


def test_a_stage_that_waits_for_a_failed_one_ends_without_an_error() -> None:
    end = RunEnd(threading.Event())
    end.ended.set()
    end.run_stage(lambda: end.pause(60.0))


def test_a_pause_ends_when_the_run_is_stopped() -> None:
    end = RunEnd(threading.Event())
    end.stop.set()
    with pytest.raises(RunEnded):
        end.pause(0.0)


def test_a_full_queue_takes_nothing_more_and_an_empty_one_gives_nothing_once_the_run_has_ended() -> None:
    end = RunEnd(threading.Event())
    queue, first = StageQueue(1, end), work()
    queue.put(first)
    threading.Timer(0.05, end.ended.set).start()
    with pytest.raises(RunEnded):
        queue.put(work())
    assert queue.take() is first  # items that were handed over before are not lost
    with pytest.raises(RunEnded):
        queue.take()
