"""Delivery of pictures by a separate process, next to the one that owns the device."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import select

from sdpipeline import provenance
from sdpipeline.app import factories, keys, services, workers
from sdpipeline.app.services import Services
from sdpipeline.db import queries, tables
from sdpipeline.db.connection import now_s, sqlite_path
from sdpipeline.engine import Batch, GeneratedImage, GenerationFailure, PreparedRequest
from sdpipeline.engine.fake import FakeEngine
from sdpipeline.errors import (
    DatabaseUnavailableError,
    DeliveryLostError,
    DeliveryUnavailableError,
    LeaseLostError,
    StorageUnavailableError,
)
from sdpipeline.worker.delivery_process import SERVER, Bounds, DeliveryProcess, Destination, _GoneError, _Server
from sdpipeline.worker.finished_picture import Attempt, DeliveryRequest
from sdpipeline.worker.inputs import Consumed
from sdpipeline.worker.worker import Worker, WorkerLimits, WorkerSummary
from tests.chaos.invariants import violations
from tests.factories import chains, leased, published, statuses
from tests.integration.worker.test_shutdown import wait_for

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def have(tmp_path: Path) -> Iterator[Services]:
    with services.open_services(services.load_settings(tmp_path / "home")) as found:
        yield found


def destination(have: Services, **changes: Any) -> Destination:
    s = have.settings
    known: dict[str, Any] = {"settings": s, "storage_url": s.storage, "database_url": s.database}
    certificate = keys.picture_key(s).fingerprint
    return Destination(**{"actor": "worker:test", "certificate": certificate} | known | changes)


@pytest.fixture
def process(have: Services) -> Iterator[DeliveryProcess]:
    found = DeliveryProcess(destination(have))
    yield found
    found.close()


def work(have: Services, engine: FakeEngine) -> WorkerSummary:
    s, key = have.settings, keys.picture_key(have.settings)
    with factories.delivery_process(s, key, have.database, s.storage) as (worker_id, deliverer):
        worker = factories.make_worker(
            s, have.database, have.store, engine, key, worker_id=worker_id, deliverer=deliverer
        )
        with workers.registered(s, worker, "cpu"):
            return worker.run()


def delivery_processes() -> list[psutil.Process]:
    """Live delivery processes of this process."""
    found = []
    for each in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # a dead process that was not waited for yet
            found += [each] if SERVER in each.cmdline() else []
    return found


def one_picture(have: Services) -> DeliveryRequest:
    """The picture of a leased job."""
    published(have.audit, chains(1))
    lease = leased(have.audit)
    (made,) = FakeEngine().generate(Batch(requests=[PreparedRequest(request=lease.jobs[0].request)], bucket=1))
    assert isinstance(made, GeneratedImage)
    attempt = Attempt(number=1, lease_id=lease.id, worker_id="worker-1", gpu_seconds=1.0)
    return DeliveryRequest(leased=lease.jobs[0], consumed=Consumed(), generated=made, attempt=attempt)


def test_every_picture_is_marked_stored_and_recorded_by_it_and_it_ends_with_the_worker(have: Services) -> None:
    published(have.audit, chains(20, "draft", "final"))
    seen: set[int] = set()

    class Watched(FakeEngine):
        def generate(self, batch: Batch) -> Sequence[GeneratedImage | GenerationFailure]:
            seen.update(each.pid for each in delivery_processes())
            return super().generate(batch)

    done = work(have, Watched())
    assert (done.succeeded, len(seen)) == (40, 1)
    assert not delivery_processes()
    assert violations(have.database, have.store, keys.seal_key(have.settings)) == []
    for key in [key for key in have.store.list() if key.endswith(".png")]:
        assert provenance.verify(have.store.get(key)).ok
    # Another process delivered it: this process's event chain has no event about the job.
    with have.database.read() as connection:
        writers = connection.exec_driver_sql(
            "SELECT count(DISTINCT writer_id) FROM audit_event WHERE body LIKE '%job.succeeded%'"
        )
        assert writers.scalar_one() == 1


def test_one_that_is_killed_is_replaced_and_no_picture_is_lost(have: Services) -> None:
    published(have.audit, chains(64))
    killed: list[int] = []

    class Killing(FakeEngine):
        def generate(self, batch: Batch) -> Sequence[GeneratedImage | GenerationFailure]:
            if len(killed) < 3 and "succeeded" in statuses(have.database):
                killed.extend(each.pid for each in delivery_processes())
                for each in delivery_processes():
                    each.send_signal(signal.SIGKILL)
            return super().generate(batch)

    done = work(have, Killing(seconds_per_batch=0.2))
    assert len(set(killed)) >= 2
    assert statuses(have.database) == ["succeeded"] * 64
    assert (done.succeeded, done.failed) == (64, 0)
    assert violations(have.database, have.store, keys.seal_key(have.settings)) == []


OWNER = (
    "import sys, time; from pathlib import Path; from sdpipeline.app import factories, keys, services;"
    "from sdpipeline.worker.delivery_process import Bounds;"
    "s = services.load_settings(Path(sys.argv[1])); key = keys.picture_key(s);"
    "opened = services.open_services(s); database = opened.__enter__().database;"
    "made = factories.delivery_process(s, key, database, s.storage); _, process = made.__enter__();"
    "process.bounds = Bounds(silence_s=3.0);"
    "process.check(); print('ready', flush=True); time.sleep(60)"
)


@contextmanager
def owned(home: Path, folder: Path) -> Iterator[tuple[psutil.Process, psutil.Process]]:
    """A worker process and its delivery process."""
    (folder / "queue.py").write_text("raise ImportError('the folder that one works in is no library')")
    command = [sys.executable, "-P", "-c", OWNER, str(home)]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            assert owner.stdout.readline() == "ready\n"
            (child,) = psutil.Process(owner.pid).children()
            yield psutil.Process(owner.pid), child
        finally:
            owner.kill()


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("frozen", [False, True], ids=["running", "frozen"])
def test_it_ends_with_a_worker_that_was_killed(have: Services, tmp_path: Path, *, frozen: bool) -> None:
    with owned(have.settings.home, tmp_path) as (owner, child):
        assert os.getpgid(child.pid) != os.getpgid(owner.pid)  # a terminal's Ctrl-C must not reach it
        if frozen:
            child.suspend()
        owner.kill()
    wait_for(lambda: gone(child))


def test_a_worker_that_was_frozen_together_with_its_delivery_process_keeps_it(have: Services, tmp_path: Path) -> None:
    with owned(have.settings.home, tmp_path) as (owner, child):
        owner.suspend()
        child.suspend()
        time.sleep(3.1)  # longer than its time limit
        owner.resume()
        time.sleep(0.3)
        child.resume()
        time.sleep(0.3)
        assert not gone(child)
        assert owner.children() == [child]


def test_one_that_is_told_to_end_with_its_worker_goes_on_until_that_ends(
    have: Services, process: DeliveryProcess
) -> None:
    request = one_picture(have)
    process.check()
    (before,) = delivery_processes()
    before.terminate()
    before.send_signal(signal.SIGINT)
    assert have.store.get(process.deliver(request).key)
    assert delivery_processes() == [before]


def test_an_outage_of_storage_or_of_the_database_comes_across_as_what_it_is(have: Services, tmp_path: Path) -> None:
    request, place = one_picture(have), tmp_path / "file"
    place.write_text("no folder")
    no_storage = DeliveryProcess(destination(have, storage_url=place.as_uri()))
    no_database = DeliveryProcess(destination(have, database_url="postgresql://nobody@127.0.0.1:1/none"))
    try:
        for _ in range(2):
            with pytest.raises(DatabaseUnavailableError):
                no_database.deliver(request)
        assert len([key for key in have.store.list() if key.endswith(".png")]) == 1  # the same bytes twice
        with pytest.raises(StorageUnavailableError):
            no_storage.deliver(request)
        before = delivery_processes()
        place.unlink()
        assert (place / no_storage.deliver(request).key).exists()
        assert delivery_processes() == before
    finally:
        no_storage.close()
        no_database.close()


def test_an_error_of_ours_comes_across_with_the_place_it_happened_at(process: DeliveryProcess) -> None:
    with pytest.raises(AttributeError) as raised:
        process.deliver("no picture")  # type: ignore[arg-type]
    assert "delivery.py" in raised.value.__notes__[0]
    with pytest.raises(ModuleNotFoundError):
        process.deliver(Evaluated("__import__('no_such_module')"))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="Odd"):
        process.deliver(Evaluated("(_ for _ in ()).throw(type('Odd', (Exception,), {})('made up'))"))  # type: ignore[arg-type]
    assert len(delivery_processes()) == 1


class Evaluated:
    """Unpickles as the value of an expression, evaluated in the receiving process."""

    def __init__(self, expression: str) -> None:
        self.expression = expression

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (self.expression,)


def test_a_lost_lease_is_told_but_not_where_only_the_answer_was_lost(
    have: Services, process: DeliveryProcess, tmp_path: Path
) -> None:
    request = one_picture(have)
    with pytest.raises(LeaseLostError):
        process.deliver(replace(request, attempt=replace(request.attempt, lease_id="another lease")))
    assert statuses(have.database) == ["leased"]
    stored = process.deliver(request)
    assert statuses(have.database) == ["succeeded"]
    assert process.deliver(request) == stored
    dies_first: Any = deadly_once(request, tmp_path / "died")
    assert process.deliver(dies_first) == stored
    assert (tmp_path / "died").exists()


@pytest.mark.long
def test_what_kills_it_each_time_fails_alone(have: Services, process: DeliveryProcess) -> None:
    request = one_picture(have)
    poison: Any = deadly_once(None, Path("/nowhere/at/all"))
    with ThreadPoolExecutor(4) as pool:
        dead = [pool.submit(process.deliver, poison) for _ in range(2)]
        made = [pool.submit(process.deliver, request) for _ in range(6)]
    assert [type(each.exception()) for each in dead] == [DeliveryLostError] * 2
    assert [each.result() for each in made] == [made[0].result()] * 6


@pytest.mark.long
def test_one_that_is_frozen_is_killed_and_its_calls_are_answered_by_another(
    have: Services, capfd: pytest.CaptureFixture[str]
) -> None:
    request = one_picture(have)
    with closing(DeliveryProcess(destination(have), bounds=Bounds(silence_s=2.0))) as process:
        process.check()
        (frozen,) = delivery_processes()
        frozen.suspend()
        assert have.store.get(process.deliver(request).key)
        assert frozen not in delivery_processes()
        (frozen,) = delivery_processes()
        frozen.suspend()  # no process requests anything from it
        wait_for(lambda: set(delivery_processes()) - {frozen})
        process.check()
        assert process.silent_s() < 1.0
    assert "".join(capfd.readouterr()).count("delivery_process_silent") == 2


def test_one_that_is_frozen_for_less_than_its_bound_answers_itself(have: Services) -> None:
    request = one_picture(have)
    with (
        closing(DeliveryProcess(destination(have), bounds=Bounds(silence_s=60.0))) as process,
        ThreadPoolExecutor(1) as pool,
    ):
        process.check()
        (frozen,) = delivery_processes()
        frozen.suspend()
        delivered = pool.submit(process.deliver, request)
        wait_for(process.silent_s)
        frozen.resume()
        assert have.store.get(delivered.result().key)
        assert delivery_processes() == [frozen]
        wait_for(lambda: not process.silent_s())


def test_one_that_is_frozen_while_it_starts_is_an_outage_and_the_next_one_answers(have: Services) -> None:
    with closing(DeliveryProcess(destination(have), bounds=Bounds(start_s=1.0))) as process:
        process.begin()
        wait_for(delivery_processes)
        (frozen,) = delivery_processes()
        frozen.suspend()
        with pytest.raises(DeliveryUnavailableError, match="no heartbeat for 1 s"):
            process.check()
        assert gone(frozen)
        process.bounds = Bounds()
        process.check()


@pytest.mark.long
def test_a_call_that_hangs_in_a_living_process_is_answered_by_another(have: Services, tmp_path: Path) -> None:
    request = one_picture(have)
    hangs: Any = Once(request, tmp_path / "hung", "__import__('time').sleep(3600)")
    with closing(DeliveryProcess(destination(have), bounds=Bounds(call_s=5.0))) as process:
        assert have.store.get(process.deliver(hangs).key)
    assert (tmp_path / "hung").exists()


def test_one_that_is_frozen_in_a_write_to_sqlite_holds_others_up_no_longer_than_its_bound(
    have: Services, tmp_path: Path
) -> None:
    path, locked = sqlite_path(have.settings.database), tmp_path / "locked"
    begin = f"c := __import__('sqlite3').connect({str(path)!r}), c.execute('BEGIN IMMEDIATE')"
    hold = f"({begin}, __import__('time').sleep(3600))"
    with (
        closing(DeliveryProcess(destination(have), bounds=Bounds(silence_s=2.0))) as process,
        ThreadPoolExecutor(1) as pool,
    ):
        process.check()
        (frozen,) = delivery_processes()
        delivered = pool.submit(process.deliver, Once("no picture", locked, hold))  # type: ignore[arg-type]
        wait_for(locked.exists)
        wait_for(lambda: is_locked(path))
        frozen.suspend()
        published(have.audit, chains(1))
        with pytest.raises(AttributeError):
            delivered.result()


def is_locked(path: Path | None) -> bool:
    with closing(sqlite3.connect(str(path), timeout=0)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return True
    return False


@pytest.mark.long
def test_leases_are_not_extended_while_the_delivery_process_is_silent_and_status_says_so(have: Services) -> None:
    published(have.audit, chains(16), max_attempts=9)
    s, key = have.settings, keys.picture_key(have.settings)
    stopped: list[psutil.Process] = []

    class Freezing(FakeEngine):
        def generate(self, batch: Batch) -> Sequence[GeneratedImage | GenerationFailure]:
            if not stopped:
                stopped.extend(delivery_processes())
                stopped[0].suspend()
            return super().generate(batch)

    delivering = destination(have, actor="worker:worker-1")
    with closing(DeliveryProcess(delivering, bounds=Bounds(silence_s=100.0))) as process:
        limits = WorkerLimits(max_batch=4, lease_ttl_s=1.0, max_pixels=10**7)
        worker = Worker(
            "worker-1", have.audit, have.store, Freezing(seconds_per_batch=0.3), limits, key, deliverer=process
        )
        process.check()
        with workers.registered(s, worker, "cpu"), ThreadPoolExecutor(1) as pool:
            running = pool.submit(worker.run)
            wait_for(lambda: _expired(have) and "does not answer" in (_note(have) or ""))
            assert "succeeded" not in statuses(have.database)
            stopped[0].resume()
            wait_for(lambda: _note(have) is None)
            running.result()
    assert set(statuses(have.database)) == {"succeeded"}
    assert violations(have.database, have.store, keys.seal_key(s)) == []


def _expired(have: Services) -> bool:
    with have.database.read() as connection:
        late = select(tables.lease.c.id).where(tables.lease.c.closed_at.is_(None), tables.lease.c.expires_at < now_s())
        return connection.execute(late).first() is not None


def _note(have: Services) -> str | None:
    with have.database.read() as connection:
        (found,) = queries.live_workers(connection)
    return str(found["note"]) if found["note"] else None


def test_one_that_cannot_start_is_an_outage_and_says_why(have: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong, why in (
        ({"storage_url": "ftp://nowhere"}, "ftp"),
        ({"certificate": "another"}, "restart the worker"),
    ):
        with pytest.raises(DeliveryUnavailableError, match=why):
            DeliveryProcess(destination(have, **wrong)).check()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(DeliveryUnavailableError, match="No such file"):
        work(have, FakeEngine())


def test_a_process_that_dies_in_the_middle_of_an_answer_is_gone() -> None:
    mine, other = socket.socketpair()
    other.sendall(struct.pack("!i", 1000) + b"the beginning")
    other.close()
    connection = Connection(mine.detach())
    with subprocess.Popen(["true"]) as ended:
        server = _Server(ended, connection, (connection,))
        server.free.put(connection)
        with pytest.raises(_GoneError):
            server.deliver("a picture")  # type: ignore[arg-type]
        server.end()


class Once:
    """Unpickles as ``what``, but the first receiving process evaluates ``does`` before. Every process does if the
    marker file cannot be created."""

    def __init__(self, what: Any, done: Path, does: str) -> None:
        self.what, self.done, self.does = what, done, does

    def __reduce__(self) -> tuple[Any, ...]:
        first = f"what if done.exists() else (done.parent.exists() and done.touch(), {self.does})"
        return eval, (first, {"what": self.what, "done": self.done})


def deadly_once(what: Any, died: Path) -> Once:
    return Once(what, died, "__import__('os')._exit(7)")
