"""What the flows are told by the module that knows Prefect."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import pytest
from prefect.exceptions import TerminationSignal

from sdpipeline import orchestration
from sdpipeline.bootstrap import WorkerSummary
from sdpipeline.orchestration import worker_process
from sdpipeline.orchestration.board import describe
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
