"""Pictures delivered by a process beside the one that owns the device."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from sdpipeline import bootstrap, provenance
from sdpipeline.bootstrap import Services
from sdpipeline.db.budgets import Charge
from sdpipeline.delivery import Attempt
from sdpipeline.delivery_process import SERVER, DeliveryProcess, Destination
from sdpipeline.engine import Batch, GeneratedImage, GenerationFailure, PreparedRequest
from sdpipeline.engine.fake import FakeEngine
from sdpipeline.errors import DatabaseUnavailableError, DeliveryLostError, StorageUnavailableError
from sdpipeline.fetching import Consumed
from sdpipeline.worker import WorkerSummary
from tests.chaos.invariants import violations
from tests.factories import chains, leased, published, statuses
from tests.integration.test_worker_life import wait_for

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def have(tmp_path: Path) -> Iterator[Services]:
    with bootstrap.services(bootstrap.load_settings(tmp_path / "home")) as found:
        yield found


def destination(have: Services, **changes: Any) -> Destination:
    s = have.settings
    known: dict[str, Any] = {
        "settings": s,
        "storage_url": s.storage,
        "database_url": s.database,
        "actor": "worker:test",
    }
    return Destination(**known | changes)


@pytest.fixture
def process(have: Services) -> Iterator[DeliveryProcess]:
    found = DeliveryProcess(destination(have))
    yield found
    found.close()


def work(have: Services, engine: FakeEngine) -> WorkerSummary:
    key = bootstrap.picture_key(have.settings)
    worker = bootstrap.make_worker(have.settings, have.database, have.store, engine, key)
    with (
        bootstrap.delivered_apart(have.settings, worker, have.settings.storage) as made,
        bootstrap.registered(have.settings, made, "cpu") as registered,
    ):
        return registered.run()


def beside() -> list[psutil.Process]:
    """The delivery processes of this one."""
    return [each for each in psutil.Process().children() if SERVER in each.cmdline()]


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
    assert done.failed == 0
    assert violations(have.database, have.store, bootstrap.seal_key(have.settings)) == []


def test_it_ends_with_a_worker_that_was_killed_and_leaves_nothing_behind(have: Services, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    script = (
        "import sys, time; from pathlib import Path; from sdpipeline import bootstrap;"
        "from sdpipeline.delivery_process import DeliveryProcess, Destination;"
        "s = bootstrap.load_settings(Path(sys.argv[1]));"
        "to = Destination(settings=s, storage_url=s.storage, database_url=s.database, actor='worker:test');"
        "process = DeliveryProcess(to); process._process(); print('ready', flush=True); time.sleep(60)"
    )
    environment = os.environ | {"TMPDIR": str(temporary)}
    command = [sys.executable, "-c", script, str(have.settings.home)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "ready\n"
        (child,) = psutil.Process(owner.pid).children()
        assert os.getpgid(child.pid) != os.getpgid(owner.pid)  # a Ctrl-C in a terminal is not for it
        assert list(temporary.iterdir())
        owner.kill()
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    assert not list(temporary.iterdir())


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
        charge = Charge(worker_id="worker-1", gpu_seconds=1.0, cost=0.0)
        with pytest.raises(DatabaseUnavailableError):
            no_database.complete(lease.id, asked[0], stored, charge)
    finally:
        no_storage.close()
        no_database.close()


def test_a_lost_lease_is_told(have: Services, process: DeliveryProcess) -> None:
    lease, asked = one_picture(have)
    stored = process.deliver(process.finish(*asked))
    charge = Charge(worker_id="worker-1", gpu_seconds=1.0, cost=0.0)
    assert not process.complete("another lease", asked[0], stored, charge)
    assert process.complete(lease.id, asked[0], stored, charge)
    assert statuses(have.database) == ["succeeded"]


def test_one_that_does_not_start_or_dies_of_every_picture_is_no_fault_of_the_job(
    have: Services, process: DeliveryProcess
) -> None:
    _, asked = one_picture(have)
    broken = DeliveryProcess(destination(have, storage_url="ftp://nowhere"))
    with pytest.raises(DeliveryLostError, match="ended with 1"):
        broken.finish(*asked)

    with pytest.raises(DeliveryLostError, match="died 3 times"):
        process.deliver(Deadly())  # type: ignore[arg-type]


class Deadly:
    """Ends the process that reads it."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[int]]:
        return os._exit, (7,)
