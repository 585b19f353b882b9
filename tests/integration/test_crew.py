"""Worker processes are watched, replaced within bounds, and ended together."""

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
    """Whom the crew buried."""
    return []


@pytest.fixture
def crew_of(dead: list[WorkerExit]) -> Iterator[Start]:
    """Starts a crew whose workers call the given function; whoever is left at the end is ended."""
    crews: list[LocalWorkers] = []

    def start(target: Callable[..., object], *args: object, count: int = 1) -> LocalWorkers:
        def spawn(slot: Slot, name: str) -> BaseProcess:
            process = multiprocessing.get_context("fork").Process(target=target, args=args)
            process.start()
            return process

        slots = [Slot(index=n, device=None, environment={}) for n in range(count)]
        crews.append(LocalWorkers(slots=slots, spawn=spawn, on_exit=dead.append))
        crews[-1].start()
        return crews[-1]

    yield start
    for crew in crews:
        crew.stop()


def test_a_dead_worker_is_buried_and_replaced(crew_of: Start, dead: list[WorkerExit]) -> None:
    crew = crew_of(time.sleep, 60)
    (first,) = pids()
    os.kill(first, signal.SIGKILL)
    crew.wait(10)
    crew.supervise(progress(ready=5))
    assert [(death.pid, death.exit_code) for death in dead] == [(first, -signal.SIGKILL)]
    assert str(dead[0]) == f"worker 0 (process {first}) ended by signal 9"
    assert len(pids()) == 1


def test_workers_that_keep_dying_end_the_run(crew_of: Start, dead: list[WorkerExit]) -> None:
    crew = crew_of(os._exit, 3)
    with pytest.raises(WorkersLostError, match="with exit code 3"):
        tend_for_ever(crew)
    assert [death.name for death in dead] == ["worker 0", *(f"worker 0 · restart {n}" for n in (1, 2, 3))]


def test_a_worker_that_leaves_work_untouched_is_not_started_for_ever(crew_of: Start) -> None:
    crew = crew_of(time.sleep, 0)
    with pytest.raises(WorkersLostError, match="found no work"):
        tend_for_ever(crew)


def test_a_worker_that_found_nothing_left_stays_ended(crew_of: Start, dead: list[WorkerExit]) -> None:
    crew = crew_of(time.sleep, 0)
    crew.wait(10)
    crew.supervise(progress(succeeded=7))
    assert (pids(), dead) == ([], [])


def test_a_paused_campaigns_worker_that_found_nothing_to_do_did_not_die(crew_of: Start) -> None:
    crew = crew_of(time.sleep, 0)
    for _ in range(MAX_RESTARTS + 2):
        crew.wait(10)
        crew.supervise(replace(progress(ready=5, leased=1), status="paused"))
    crew.supervise(progress(ready=5, succeeded=1))  # it was not given up


def test_stopping_ends_the_polite_and_the_stubborn(crew_of: Start) -> None:
    polite, stubborn = crew_of(time.sleep, 60, count=2), crew_of(_ignore_sigterm)
    time.sleep(0.2)  # the stubborn one needs a moment to become it
    assert [stopped.exit_code for stopped in polite.stop()] == [-signal.SIGTERM] * 2
    stubborn.stop_grace_s = 0.2
    assert [stopped.exit_code for stopped in stubborn.stop()] == [-signal.SIGKILL]
    assert pids() == []


def test_a_terminals_ctrl_c_does_not_reach_the_workers(crew_of: Start) -> None:
    crew_of(time.sleep, 60)
    (worker,) = pids()
    time.sleep(0.2)  # one that barely started could lose the signal and pass by chance
    os.kill(worker, signal.SIGINT)
    time.sleep(0.3)
    assert pids() == [worker]


def _ignore_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


def tend_for_ever(crew: LocalWorkers) -> None:
    while True:
        crew.wait(10)
        crew.supervise(progress(ready=5))


def pids() -> list[int]:
    return [process.pid for process in multiprocessing.active_children() if process.pid is not None]
