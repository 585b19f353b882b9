"""Local worker processes are supervised, replaced within bounds, and stopped together."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.process import BaseProcess

import pytest

from sdpipeline.errors import WorkersLostError
from sdpipeline.orchestration.local_workers import LocalWorkers, Slot, WorkerExit
from sdpipeline.orchestration.supervision import MAX_RESTARTS
from tests.factories import progress

Start = Callable[..., LocalWorkers]


@pytest.fixture
def dead() -> list[WorkerExit]:
    """Exits of dead workers."""
    return []


@pytest.fixture
def start_workers(dead: list[WorkerExit]) -> Iterator[Start]:
    """Start workers that call the given function; those left at the end are stopped."""
    started: list[LocalWorkers] = []

    def start(target: Callable[..., object], *args: object, count: int = 1) -> LocalWorkers:
        def spawn(slot: Slot, name: str) -> BaseProcess:
            process = multiprocessing.get_context("fork").Process(target=target, args=args)
            process.start()
            return process

        slots = [Slot(index=n, device=None, environment={}) for n in range(count)]
        started.append(LocalWorkers(slots=slots, spawn=spawn, on_exit=dead.append))
        started[-1].start()
        return started[-1]

    yield start
    for local_workers in started:
        local_workers.stop()


def test_a_dead_worker_is_recorded_and_replaced(start_workers: Start, dead: list[WorkerExit]) -> None:
    local_workers = start_workers(time.sleep, 60)
    (first,) = pids()
    os.kill(first, signal.SIGKILL)
    local_workers.wait(10)
    local_workers.supervise(progress(ready=5))
    assert [(death.pid, death.exit_code) for death in dead] == [(first, -signal.SIGKILL)]
    assert str(dead[0]) == f"worker 0 (process {first}) ended by signal 9"
    assert len(pids()) == 1


def test_workers_that_keep_dying_end_the_run(start_workers: Start, dead: list[WorkerExit]) -> None:
    local_workers = start_workers(os._exit, 3)
    with pytest.raises(WorkersLostError, match="with exit code 3"):
        supervise_until_error(local_workers)
    assert [death.name for death in dead] == ["worker 0", *(f"worker 0 · restart {n}" for n in (1, 2, 3))]


def test_a_worker_that_leaves_work_untouched_is_not_restarted_for_ever(start_workers: Start) -> None:
    local_workers = start_workers(time.sleep, 0)
    with pytest.raises(WorkersLostError, match="found no work"):
        supervise_until_error(local_workers)


def test_a_worker_that_found_nothing_left_stays_ended(start_workers: Start, dead: list[WorkerExit]) -> None:
    local_workers = start_workers(time.sleep, 0)
    local_workers.wait(10)
    local_workers.supervise(progress(succeeded=7))
    assert (pids(), dead) == ([], [])


def test_a_worker_that_found_nothing_to_do_in_a_paused_campaign_is_replaced_once_it_is_resumed(
    start_workers: Start,
) -> None:
    local_workers = start_workers(time.sleep, 0.5)
    local_workers.wait(10)
    for _ in range(MAX_RESTARTS + 2):
        local_workers.supervise(replace(progress(ready=5, leased=1), status="paused"))
        assert pids() == []
    local_workers.supervise(progress(ready=5))
    assert len(pids()) == 1


def test_stopping_ends_the_polite_and_the_stubborn(start_workers: Start) -> None:
    polite, stubborn = start_workers(time.sleep, 60, count=2), start_workers(_ignore_sigterm)
    time.sleep(0.2)  # it needs a moment to ignore the signal
    assert [stopped.exit_code for stopped in polite.stop()] == [-signal.SIGTERM] * 2
    stubborn.stop_grace_s = 0.2
    assert [stopped.exit_code for stopped in stubborn.stop()] == [-signal.SIGKILL]
    assert pids() == []


def test_a_terminals_ctrl_c_does_not_reach_the_workers(start_workers: Start) -> None:
    start_workers(time.sleep, 60)
    (worker,) = pids()
    time.sleep(0.2)  # one that barely started could miss the signal, and the test pass by chance
    os.kill(worker, signal.SIGINT)
    time.sleep(0.3)
    assert pids() == [worker]


def _ignore_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


def supervise_until_error(local_workers: LocalWorkers) -> None:
    while True:
        local_workers.wait(10)
        local_workers.supervise(progress(ready=5))


def pids() -> list[int]:
    return [process.pid for process in multiprocessing.active_children() if process.pid is not None]
