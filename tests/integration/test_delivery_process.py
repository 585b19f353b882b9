"""Pictures delivered by a process beside the one that owns the device."""

from __future__ import annotations

import os
import queue
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest

from sdpipeline import bootstrap, provenance
from sdpipeline.bootstrap import Services
from sdpipeline.db.budgets import Charge
from sdpipeline.delivery import Attempt
from sdpipeline.delivery_process import SERVER, DeliveryProcess, Destination, _GoneError, _Server
from sdpipeline.engine import Batch, GeneratedImage, GenerationFailure, PreparedRequest
from sdpipeline.engine.fake import FakeEngine
from sdpipeline.errors import (
    DatabaseUnavailableError,
    DeliveryLostError,
    DeliveryUnavailableError,
    StorageUnavailableError,
)
from sdpipeline.fetching import Consumed
from sdpipeline.worker import WorkerSummary
from tests.chaos.invariants import violations
from tests.factories import chains, leased, published, statuses
from tests.integration.test_worker_life import wait_for

pytestmark = pytest.mark.timeout(120)

CHARGE = Charge(worker_id="worker-1", gpu_seconds=1.0, cost=0.0)


@pytest.fixture
def have(tmp_path: Path) -> Iterator[Services]:
    with bootstrap.services(bootstrap.load_settings(tmp_path / "home")) as found:
        yield found


def destination(have: Services, **changes: Any) -> Destination:
    s = have.settings
    known: dict[str, Any] = {"settings": s, "storage_url": s.storage, "database_url": s.database}
    certificate = bootstrap.picture_key(s).fingerprint
    return Destination(**{"actor": "worker:test", "certificate": certificate} | known | changes)


@pytest.fixture
def process(have: Services) -> Iterator[DeliveryProcess]:
    found = DeliveryProcess(destination(have))
    yield found
    found.close()


def work(have: Services, engine: FakeEngine) -> WorkerSummary:
    s, key = have.settings, bootstrap.picture_key(have.settings)
    with bootstrap.delivery_process(s, key, have.database, s.storage) as (worker_id, deliverer):
        worker = bootstrap.make_worker(
            s, have.database, have.store, engine, key, worker_id=worker_id, deliverer=deliverer
        )
        with bootstrap.registered(s, worker, "cpu"):
            return worker.run()


def beside() -> list[psutil.Process]:
    """The delivery processes of this one that live."""
    found = []
    for each in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # or it is dead, and not buried yet
            found += [each] if SERVER in each.cmdline() else []
    return found


def one_picture(have: Services) -> tuple[Any, tuple[Any, ...]]:
    """A leased job, and what ``finish`` asks for."""
    published(have.audit, chains(1))
    lease = leased(have.audit)
    (made,) = FakeEngine().generate(Batch(requests=[PreparedRequest(request=lease.jobs[0].request)], bucket=1))
    attempt = Attempt(number=1, lease_id=lease.id, worker_id="worker-1", gpu_seconds=1.0)
    return lease, (lease.jobs[0], Consumed(), made, attempt)


def test_every_picture_is_marked_stored_and_recorded_by_it_and_it_ends_with_the_worker(have: Services) -> None:
    published(have.audit, chains(20, "draft", "final"))
    seen: set[int] = set()

    class Watched(FakeEngine):
        def generate(self, batch: Batch) -> Sequence[GeneratedImage | GenerationFailure]:
            seen.update(each.pid for each in beside())
            return super().generate(batch)

    done = work(have, Watched())
    assert (done.succeeded, len(seen)) == (40, 1)
    assert not beside()
    assert violations(have.database, have.store, bootstrap.seal_key(have.settings)) == []
    for key in [key for key in have.store.list() if key.endswith(".png")]:
        assert provenance.verify(have.store.get(key)).ok
    # Not in this process: its own chain of events has nothing of them.
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
                killed.extend(each.pid for each in beside())
                for each in beside():
                    each.send_signal(signal.SIGKILL)
            return super().generate(batch)

    done = work(have, Killing(seconds_per_batch=0.2))
    assert len(set(killed)) >= 2
    assert statuses(have.database) == ["succeeded"] * 64
    assert (done.succeeded, done.failed) == (64, 0)
    assert violations(have.database, have.store, bootstrap.seal_key(have.settings)) == []


def test_it_ends_with_a_worker_that_was_killed(have: Services, tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from sdpipeline import bootstrap;"
        "s = bootstrap.load_settings(Path(sys.argv[1])); key = bootstrap.picture_key(s);"
        "database = bootstrap.existing_database(s);"
        "made = bootstrap.delivery_process(s, key, database, s.storage); _, process = made.__enter__();"
        "process.check(); print('ready', flush=True); time.sleep(60)"
    )
    (tmp_path / "queue.py").write_text("raise ImportError('the folder that one works in is no library')")
    command = [sys.executable, "-P", "-c", script, str(have.settings.home)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "ready\n"
        (child,) = psutil.Process(owner.pid).children()
        assert os.getpgid(child.pid) != os.getpgid(owner.pid)  # a Ctrl-C in a terminal is not for it
        owner.kill()
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_one_that_is_told_to_end_with_its_worker_goes_on_until_that_ends(
    have: Services, process: DeliveryProcess
) -> None:
    _, asked = one_picture(have)
    process.check()
    (before,) = beside()
    before.terminate()
    before.send_signal(signal.SIGINT)
    picture = process.finish(*asked)
    assert process.deliver(picture).sha256 == picture.encoded.sha256
    assert beside() == [before]


def test_an_outage_of_storage_or_of_the_database_comes_across_as_what_it_is(have: Services, tmp_path: Path) -> None:
    lease, asked = one_picture(have)
    (tmp_path / "file").write_text("no folder")
    no_storage = DeliveryProcess(destination(have, storage_url=(tmp_path / "file").as_uri()))
    no_database = DeliveryProcess(destination(have, database_url="postgresql://nobody@127.0.0.1:1/none"))
    try:
        picture = no_storage.finish(*asked)
        with pytest.raises(StorageUnavailableError):
            no_storage.deliver(picture)
        assert no_storage.finish(*asked).record["fingerprint"] == asked[0].fingerprint  # it lives on
        stored = no_database.deliver(picture)
        with pytest.raises(DatabaseUnavailableError):
            no_database.complete(lease.id, asked[0], stored, CHARGE)
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
    assert len(beside()) == 1


class Evaluated:
    """What the process that reads it makes of an expression."""

    def __init__(self, expression: str) -> None:
        self.expression = expression

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (self.expression,)


def test_a_lost_lease_is_told_but_not_where_only_the_answer_was_lost(
    have: Services, process: DeliveryProcess, tmp_path: Path
) -> None:
    lease, asked = one_picture(have)
    stored = process.deliver(process.finish(*asked))
    assert not process.complete("another lease", asked[0], stored, CHARGE)
    assert process.complete(lease.id, asked[0], stored, CHARGE)
    assert statuses(have.database) == ["succeeded"]
    assert not process.complete(lease.id, asked[0], stored, CHARGE)
    dies_first: Any = DeadlyOnce(asked[0], tmp_path / "died")
    assert process.complete(lease.id, dies_first, stored, CHARGE)
    assert (tmp_path / "died").exists()


def test_what_kills_it_each_time_fails_alone(have: Services, process: DeliveryProcess) -> None:
    _, asked = one_picture(have)
    poison: Any = DeadlyOnce(None, Path("/nowhere/at/all"))
    with ThreadPoolExecutor(4) as pool:
        dead = [pool.submit(process.deliver, poison) for _ in range(2)]
        made = [pool.submit(process.finish, *asked) for _ in range(6)]
    assert [type(each.exception()) for each in dead] == [DeliveryLostError] * 2
    assert [each.result().folder for each in made] == [made[0].result().folder] * 6


def test_one_that_cannot_start_is_an_outage_and_says_why(have: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong, why in (
        ({"storage_url": "ftp://nowhere"}, "ftp"),
        ({"certificate": "another"}, "start the worker again"),
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
        server = _Server(ended, queue.SimpleQueue(), (connection,))
        server.free.put(connection)
        with pytest.raises(_GoneError):
            server.ask("finish")
        server.end()


class DeadlyOnce:
    """What it stands for, but it ends the first process that reads it; where no file can be made, every one."""

    def __init__(self, what: Any, died: Path) -> None:
        self.what, self.died = what, died

    def __reduce__(self) -> tuple[Any, ...]:
        die = "what if died.exists() else (died.parent.exists() and died.touch(), __import__('os')._exit(7))"
        return eval, (die, {"what": self.what, "died": self.died})
