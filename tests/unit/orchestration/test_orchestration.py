"""Worker flows: chunks of work, interruptions, and final states of a run, without a Prefect server."""

from __future__ import annotations

import os
import signal
import threading
import urllib.request
from dataclasses import replace
from itertools import chain, repeat

import pytest
from prefect.exceptions import TerminationSignal
from prefect.utilities.engine import _prefect_sigterm_handler

from sdpipeline.orchestration import campaign_run, local_run, worker_process
from sdpipeline.orchestration.artifacts import describe
from sdpipeline.orchestration.local_server import no_proxy_for_loopback
from sdpipeline.shutdown import Stop
from sdpipeline.worker.worker import WorkerSummary
from tests.factories import progress


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "CHUNK_S", 0.01)


@pytest.mark.usefixtures("short_chunks")
def test_work_goes_on_from_chunk_to_chunk_until_it_is_over() -> None:
    enough, seen = threading.Event(), list[int]()

    def work() -> WorkerSummary:
        assert enough.wait(10)
        return WorkerSummary()

    with worker_process.in_chunks(work, threading.Event()) as chunks:

        def chunk(number: int) -> None:
            seen.append(number)
            if number == 3:
                enough.set()
            chunks.wait()
            if number >= 3:
                chunks.working.result(10)

        chunks.run(chunk)
    assert seen == [1, 2, 3]


@pytest.mark.usefixtures("short_chunks")
def test_work_goes_on_while_prefect_is_told_of_it() -> None:
    """A chunk that starts late, as with a slow server, does not delay the work."""
    done, stop = threading.Event(), threading.Event()

    def work() -> WorkerSummary:
        done.set()
        return WorkerSummary()

    with worker_process.in_chunks(work, stop) as chunks:
        assert done.wait(10)
        assert not stop.is_set()
        chunks.run(lambda _number: chunks.wait())


@pytest.mark.usefixtures("short_chunks")
def test_work_of_which_prefect_cannot_be_told_ends_in_order() -> None:
    stop, seen = threading.Event(), list[str]()

    def work() -> WorkerSummary:
        assert stop.wait(10)
        seen.append("gave back")
        return WorkerSummary()

    def chunk(_number: int) -> None:
        raise ConnectionError("no server")

    with pytest.raises(ConnectionError), worker_process.in_chunks(work, stop) as chunks:
        chunks.run(chunk)
    assert seen == ["gave back"]


@pytest.mark.timeout(30)  # a chunk takes longer, and the test does not wait for it
def test_work_that_nobody_watches_any_more_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, parents = threading.Event(), chain([1000], repeat(1))
    monkeypatch.setattr(os, "getppid", lambda: next(parents))

    def work() -> WorkerSummary:
        assert stop.wait(10)
        return WorkerSummary()

    with worker_process.in_chunks(work, stop) as chunks:
        chunks.run(lambda _number: chunks.wait())
    assert stop.is_set()


@pytest.mark.usefixtures("short_chunks")
def test_an_error_of_the_work_is_the_chunks() -> None:
    seen: list[str] = []

    def work() -> WorkerSummary:
        raise RuntimeError("the device is on fire")

    def run() -> None:
        with worker_process.in_chunks(work, threading.Event()) as chunks:
            chunks.working.exception(10)
            try:
                chunks.wait()
            except RuntimeError:
                seen.append("the chunk failed")

    with pytest.raises(RuntimeError, match="on fire"):
        run()
    assert seen == ["the chunk failed"]


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
        local_run._pass_on_interruption(unreachable)


def test_a_lost_server_alone_is_no_interruption() -> None:
    local_run._pass_on_interruption(ConnectionError("no server"))


def test_a_worker_that_is_told_to_end_finishes_its_batch_under_prefects_own_handler() -> None:
    seen: list[object] = []

    def work(stop: Stop) -> None:
        seen.append(signal.getsignal(signal.SIGTERM))  # Prefect kills a worker with another handler at once
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(10)
        seen.append("finished")

    before = signal.signal(signal.SIGTERM, _prefect_sigterm_handler)
    try:
        with pytest.raises(TerminationSignal):
            worker_process.run_until_stopped(work)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [_prefect_sigterm_handler, "finished"]


def test_what_goes_wrong_in_a_workers_thread_ends_its_run() -> None:
    def work(_stop: Stop) -> None:
        raise RuntimeError("the device is on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        worker_process.run_until_stopped(work)


@pytest.mark.parametrize(
    ("began", "ended", "state", "said"),
    [
        ({"ready": 4}, {"succeeded": 4}, "Completed", "spring: 4 of 4 succeeded"),
        ({"ready": 4}, {"succeeded": 3, "failed": 1}, "Failed", "spring: 3 of 4 succeeded, 1 failed"),
        ({"ready": 4}, {"succeeded": 3, "blocked": 1}, "Failed", "spring: 3 of 4 succeeded, 1 blocked"),
        ({"ready": 4}, {"succeeded": 1, "cancelled": 3}, "Cancelled", "spring: 1 of 1 succeeded, 3 cancelled"),
        ({"cancelled": 4}, {"cancelled": 4}, "Cancelled", "spring: 0 of 0 succeeded, 4 cancelled"),
        (
            {"ready": 2, "cancelled": 2},
            {"succeeded": 2, "cancelled": 2},
            "Completed",
            "spring: 2 of 2 succeeded, 2",
        ),
    ],
)
def test_a_run_ends_as_its_campaign_does(began: dict[str, int], ended: dict[str, int], state: str, said: str) -> None:
    found = campaign_run.closing_state(progress(**ended), began=progress(**began))
    assert (found.name, str(found.message)[: len(said)]) == (state, said)


def test_jobs_that_a_new_version_prunes_do_not_cancel_the_run() -> None:
    newer = replace(progress(succeeded=3, cancelled=1), version=4)
    assert campaign_run.closing_state(newer, began=progress(ready=4)).is_completed()


def test_a_paused_campaign_is_neither_failed_nor_done() -> None:
    paused = replace(progress(ready=1, failed=1), status="paused", paused_because="max_images: 1 of 1")
    found = campaign_run.closing_state(paused, began=progress(ready=2))
    assert (found.name, found.message) == ("Paused", "paused with 1 of 2 jobs to do (max_images: 1 of 1)")


@pytest.mark.parametrize("upper", [None, "", "intra.example"])
@pytest.mark.parametrize("lower", [None, "", "localhost, .example"])
def test_no_proxy_is_asked_for_loopback(monkeypatch: pytest.MonkeyPatch, upper: str | None, lower: str | None) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    given = {"NO_PROXY": upper, "no_proxy": lower}
    known = {name: value for name, value in given.items() if value is not None}
    for name, value in (known | {"http_proxy": "http://proxy.example:3128"}).items():
        monkeypatch.setenv(name, value)
    for name, value in no_proxy_for_loopback().items():
        monkeypatch.setenv(name, value)
    assert urllib.request.proxy_bypass("127.0.0.1:4200")
    assert urllib.request.proxy_bypass("localhost")
    assert bool(urllib.request.proxy_bypass("intra.example")) == bool(upper or lower)
    assert not urllib.request.proxy_bypass("api.prefect.cloud")
