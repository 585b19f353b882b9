"""What the flows are told by the module that knows Prefect."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import pytest
from prefect.exceptions import TerminationSignal
from prefect.utilities.engine import _prefect_sigterm_handler

from sdpipeline import orchestration
from sdpipeline.bootstrap import WorkerSummary
from sdpipeline.orchestration import worker_process
from sdpipeline.orchestration.board import describe
from sdpipeline.stopping import Stop
from tests.factories import progress


def working(*, idle_after: int, seen: list[int]) -> Callable[[int], WorkerSummary]:
    def work(number: int) -> WorkerSummary:
        seen.append(number)
        return WorkerSummary(idle=number >= idle_after)

    return work


def test_chunks_follow_one_another_until_nothing_is_left() -> None:
    seen: list[int] = []
    worker_process.work_in_chunks(working(idle_after=3, seen=seen), threading.Event())
    assert seen == [1, 2, 3]


def test_a_worker_that_must_end_begins_no_other_chunk() -> None:
    seen: list[int] = []
    stop = threading.Event()
    stop.set()
    worker_process.work_in_chunks(working(idle_after=3, seen=seen), stop)
    assert seen == [1]


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"succeeded": 32}, "spring: 32 of 32 succeeded"),
        ({"succeeded": 30, "failed": 1, "skipped": 1}, "spring: 30 of 32 succeeded, 1 failed, 1 skipped"),
    ],
)
def test_a_run_closes_with_what_became_of_its_jobs(counts: dict[str, int], said: str) -> None:
    assert describe(progress(**counts)) == said


@pytest.mark.parametrize(
    ("interruption", "leaves_as"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (TerminationSignal(signal.SIGTERM), SystemExit)],
)
def test_an_interruption_outlives_a_server_that_cannot_hear_of_it(
    interruption: BaseException, leaves_as: type[BaseException]
) -> None:
    unreachable = ConnectionError("no server")
    unreachable.__context__ = OSError("refused")
    unreachable.__context__.__context__ = interruption
    with pytest.raises(leaves_as):
        orchestration._pass_on_interruption(unreachable)


def test_a_lost_server_alone_is_no_interruption() -> None:
    orchestration._pass_on_interruption(ConnectionError("no server"))


def test_a_worker_that_is_told_to_end_finishes_its_batch_under_prefects_own_handler() -> None:
    seen: list[object] = []

    def work(stop: Stop) -> None:
        seen.append(signal.getsignal(signal.SIGTERM))  # Prefect kills at once whoever has another one
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(10)
        seen.append("finished")

    before = signal.signal(signal.SIGTERM, _prefect_sigterm_handler)
    try:
        with pytest.raises(TerminationSignal):
            worker_process.until_told(work)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [_prefect_sigterm_handler, "finished"]


def test_what_goes_wrong_in_a_workers_thread_ends_its_run() -> None:
    def work(_stop: Stop) -> None:
        raise RuntimeError("the device is on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        worker_process.until_told(work)
