"""Reconciling database and storage after crashes: differences are found, explained and repaired, on SQLite and
PostgreSQL."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, select, update

from sdpipeline.audit import load_key, seal, verify
from sdpipeline.db import workers
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database
from sdpipeline.db.tables import attempt, image, job, lease
from sdpipeline.domain import ControlNetInput, ImageSource, JobSpec, Json
from sdpipeline.engine import Batch, GeneratedImage, PreparedRequest
from sdpipeline.engine.fake import FakeEngine
from sdpipeline.errors import SettingsError
from sdpipeline.jobs import DeliveryRules, Lease
from sdpipeline.maintenance.reconcile import Reconciliation, reconcile
from sdpipeline.storage import LocalStore
from sdpipeline.storage.keys import seal_object_key
from sdpipeline.worker.finished_picture import Attempt, DeliveryRequest, finish
from sdpipeline.worker.inputs import Consumed
from sdpipeline.worker.picture_storage import store_picture
from sdpipeline.worker.worker import Worker, WorkerLimits
from tests.factories import (
    CHECKPOINT,
    chains,
    completed,
    events,
    expired,
    job_spec,
    leased,
    published,
    signing_key,
    statuses,
)
from tests.integration.databases import on_sqlite

LONG_AGO = 1_700_000_000.0


class Listed(LocalStore):
    """A directory that records the prefixes it was asked to list."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.prefixes: list[str] = []

    def list(self, prefix: str = "") -> Iterator[str]:
        self.prefixes.append(prefix)
        return super().list(prefix)


@dataclass(slots=True)
class Place:
    """A database with its storage, a worker with the fake engine, and a key for seals."""

    audit: AuditLog
    folder: Path
    store: Listed = field(init=False)

    def __post_init__(self) -> None:
        self.store = Listed(self.folder / "storage")

    def work(self) -> int:
        limits = WorkerLimits(max_batch=8, lease_ttl_s=60.0, max_pixels=10**7)
        return Worker("worker-1", self.audit, self.store, FakeEngine(), limits, signing_key()).run().succeeded

    def reconcile(self, *, grace_s: float = 3600.0, **options: bool) -> Reconciliation:
        self.store.prefixes.clear()
        return reconcile(self.audit, self.store, self.key, grace_s=grace_s, **options)

    def kinds(self, **options: Any) -> list[tuple[str, str]]:
        return [(fault.kind, fault.subject) for fault in self.reconcile(**options).faults]

    def key(self) -> Any:
        return load_key(self.folder / "key.pem", create=True)

    def faults(self) -> list[tuple[str, str]]:
        found = verify(self.audit.database, self.store, self.key())
        return [(fault.kind, fault.subject) for fault in found.faults]

    def picture(self, job_id: int) -> Json:
        own = (image.c.job_id == job.c.id) & (image.c.fingerprint == job.c.fingerprint)
        statement = select(image).join(job, own).where(job.c.id == job_id)
        with self.audit.database.read() as connection:
            return dict(connection.execute(statement).mappings().one())

    def file(self, key: str) -> Path:
        return self.folder / "storage" / key

    def left_behind(self, lease: Lease, index: int = 0) -> str:
        """Store a job's picture as a worker killed before its commit would; return the picture's key."""
        job = lease.jobs[index]
        (made,) = FakeEngine().generate(Batch(requests=[PreparedRequest(request=job.request)], bucket=1))
        assert isinstance(made, GeneratedImage)
        attempt = Attempt(number=job.attempt, lease_id=lease.id, worker_id="worker-1", gpu_seconds=0.1)
        request = DeliveryRequest(leased=job, consumed=Consumed(), generated=made, attempt=attempt)
        return store_picture(self.store, finish(request, signing_key())).key

    def age(self) -> None:
        """Make everything in storage look old."""
        for path in (self.folder / "storage").rglob("*"):
            if path.is_file():
                os.utime(path, (LONG_AGO, LONG_AGO))


@pytest.fixture
def place(audit: AuditLog, tmp_path: Path) -> Place:
    return Place(audit, tmp_path)


def steered() -> list[JobSpec]:
    """A draft, and a scene that keeps its outline."""
    draft = job_spec("row-0")
    source = ImageSource(stage="draft", digest=draft.fingerprint)
    use = ControlNetInput(checkpoint=CHECKPOINT, image=source, annotator="canny")
    return [draft, job_spec("row-0", stage="scene", parents=(draft,), controlnets=(use,))]


@on_sqlite
def test_after_work_that_ended_in_order_nothing_is_found_and_nothing_listed(place: Place) -> None:
    published(place.audit, steered())
    assert place.work() == 2
    done = place.reconcile(grace_s=0.0)
    assert (done.ok, done.faults, place.store.prefixes) == (True, [], [])


# Leases.


def test_a_lease_that_expired_is_found_and_its_jobs_are_given_back(place: Place, database: Database) -> None:
    published(place.audit, chains(2))
    held = leased(place.audit)
    assert place.kinds() == []
    late(database, held)
    assert place.kinds() == [("lease-stale", f"lease:{held.id}")]
    assert statuses(database) == ["leased", "leased"]
    assert place.reconcile(repair=True).ok
    assert statuses(database) == ["ready", "ready"]
    assert (place.kinds(), place.faults()) == ([], [])


def test_a_lease_whose_worker_has_stopped_is_stale_before_it_expires(place: Place, database: Database) -> None:
    with place.audit.transaction() as tx:
        workers.register(tx, worker_id="worker-1", host="h", pid=1, device="cpu", description={})
        workers.stop(tx, worker_id="worker-1")
    published(place.audit, chains(1))
    held = leased(place.audit)
    assert place.kinds() == [("lease-stale", f"lease:{held.id}")]
    place.reconcile(repair=True)
    assert statuses(database) == ["ready"]


def test_an_attempt_that_was_left_open_is_found_and_ended(place: Place, database: Database) -> None:
    published(place.audit, chains(2))
    held = leased(place.audit)
    completed(place.audit, held, place.store)
    with database.write() as connection:
        connection.execute(update(attempt).where(attempt.c.job_id == 1).values(outcome=None, finished_at=None))
    assert place.kinds() == [("attempt-open", "job:1")]
    assert place.reconcile(repair=True).ok
    assert statuses(database) == ["succeeded", "succeeded"]
    assert place.kinds() == []


def test_a_job_under_a_closed_lease_is_made_again_and_its_attempt_is_ended(place: Place, database: Database) -> None:
    published(place.audit, chains(1))
    held = leased(place.audit)
    with database.write() as connection:
        connection.execute(update(lease).where(lease.c.id == held.id).values(closed_at=1.0))
    assert place.kinds() == [("lease-stale", "job:1")]
    assert place.reconcile(repair=True).ok
    assert (statuses(database), place.kinds()) == (["ready"], [])


def late(database: Database, *leases: Lease) -> None:
    with database.write() as connection:
        connection.execute(update(lease).where(lease.c.id.in_([each.id for each in leases])).values(expires_at=0.0))


# Recorded pictures.


def _picture(place: Place) -> str:
    return str(place.picture(2)["key"])


def _sidecar(place: Place) -> str:
    return str(place.picture(2)["sidecar_key"])


def _control_map(place: Place) -> str:
    return _picture(place).removesuffix(".png") + ".control-0.png"


@on_sqlite
@pytest.mark.parametrize("part", [_picture, _sidecar, _control_map])
@pytest.mark.parametrize("left", [None, b"something else"], ids=["missing", "altered"])
def test_a_picture_of_which_a_part_is_wrong_is_put_away_and_made_again(
    place: Place, database: Database, part: Callable[[Place], str], left: bytes | None
) -> None:
    published(place.audit, steered())
    place.work()
    key, kind = part(place), "object-missing" if left is None else "object-altered"
    kept = {path.name for path in place.file(key).parent.iterdir()} - ({Path(key).name} if left is None else set())
    place.file(key).unlink() if left is None else place.file(key).write_bytes(left)
    assert place.kinds() == [(kind, key)]
    assert statuses(database) == ["succeeded", "succeeded"]
    done = place.reconcile(repair=True)
    assert (done.ok, [fault.action for fault in done.faults]) == (True, ["made again"])
    assert statuses(database) == ["succeeded", "ready"]
    put_away = place.file(f"quarantine/{datetime.now(UTC):%Y-%m-%d}/{key}").parent
    assert {path.name for path in put_away.iterdir()} == kept
    assert place.faults() == []
    assert place.work() == 1
    assert (place.kinds(), place.faults()) == ([], [])
    told = [event["event"] for event in events(database)]
    assert {"image.lost", "object.quarantined", "jobs.reopened"} <= set(told)


def test_of_two_successes_of_a_job_the_later_one_counts_whichever_chain_is_read_first(place: Place) -> None:
    published(place.audit, chains(1))
    place.work()
    place.file(place.picture(1)["key"]).unlink()
    first, other = place.audit, AuditLog(place.audit.database, actor="user:other")
    while other.writer_id > first.writer_id:
        other = AuditLog(place.audit.database, actor="user:other")
    place.audit = other
    place.reconcile(repair=True)
    assert (place.work(), place.faults()) == (1, [])


def test_what_waits_for_a_lost_picture_waits_until_it_is_there_again(place: Place, database: Database) -> None:
    published(place.audit, chains(1, "draft", "scene"))
    completed(place.audit, leased(place.audit, limit=1), place.store)
    place.file(place.picture(1)["key"]).unlink()
    assert statuses(database) == ["succeeded", "ready"]
    place.reconcile(repair=True)
    assert statuses(database) == ["ready", "waiting"]
    assert place.work() == 2
    assert place.faults() == []


def test_a_lost_picture_of_an_older_fingerprint_is_forgotten_and_its_job_left_alone(
    place: Place, database: Database
) -> None:
    published(place.audit, [job_spec("row-0")])
    place.work()
    older = place.picture(1)["key"]
    published(place.audit, [job_spec("row-0", prompt="changed")])
    place.work()
    place.file(older).unlink()
    (fault,) = place.reconcile(repair=True).faults
    assert (fault.kind, fault.action) == ("object-missing", "its row is deleted: its job asks for another picture now")
    assert (statuses(database), place.faults()) == (["succeeded"], [])
    # Requested again, it is made again and not taken as present.
    published(place.audit, [job_spec("row-0")])
    assert (place.work(), place.faults()) == (1, [])


@on_sqlite
def test_an_equal_job_keeps_its_copy_when_the_picture_it_was_copied_from_is_lost(place: Place) -> None:
    published(place.audit, [job_spec("a", prompt="the same"), job_spec("b", prompt="the same")])
    place.work()
    copy = place.picture(2)
    place.file(place.picture(1)["key"]).unlink()
    place.reconcile(repair=True)
    assert place.file(copy["key"]).is_file()
    # The copy is not an original for other jobs, so the picture is made again.
    assert (place.work(), place.faults(), place.picture(2)["key"]) == (1, [], copy["key"])


def test_a_job_marked_succeeded_without_a_picture_is_made_again(place: Place, database: Database) -> None:
    published(place.audit, chains(2, "draft", "scene"))
    place.work()
    with database.write() as connection:
        connection.execute(delete(image).where(image.c.job_id == 1))
    assert place.kinds(grace_s=0.0) == [("image-missing", "job:1")]
    assert place.reconcile(repair=True).ok
    assert (place.work(), place.faults()) == (1, [])


@on_sqlite
def test_a_storage_that_is_not_this_databases_is_refused_and_nothing_reopened(place: Place, database: Database) -> None:
    published(place.audit, chains(1))
    place.work()
    seal(database, place.store, place.key())
    (place.folder / "storage").rename(place.folder / "unmounted")
    with pytest.raises(SettingsError, match=f"does not hold {seal_object_key(1)}"):
        place.reconcile(repair=True)
    assert statuses(database) == ["succeeded"]


# Objects without a row.


def test_what_a_killed_worker_had_stored_is_found_in_its_folder_and_in_no_other_looked_for(place: Place) -> None:
    published(place.audit, chains(6))
    place.work()
    published(place.audit, chains(2), name="autumn", rules={"draft": DeliveryRules(reuse=False)})
    held = leased(place.audit)
    key = place.left_behind(held)
    expired(place.audit, held)
    place.age()
    found = place.kinds()
    assert [kind for kind, _ in found] == ["record-unknown", "object-orphan"]
    assert found[1][1] == key
    assert place.store.prefixes == [
        f"default/autumn/draft/{fingerprint}/" for fingerprint in sorted(job.fingerprint for job in held.jobs)
    ]
    assert place.reconcile(repair=True).ok
    assert (place.file(key).exists(), place.kinds()) == (False, [])
    assert place.file(f"quarantine/{datetime.now(UTC):%Y-%m-%d}/{key}").is_file()
    (told,) = [event for event in events(place.audit.database) if event["event"] == "object.quarantined"]
    assert (told["subject"], len(told["moved"])) == ("job:7", 2)


def test_an_orphan_of_a_job_that_was_changed_since_is_found_where_it_was_left(place: Place) -> None:
    published(place.audit, [job_spec("row-0")])
    held = leased(place.audit)
    key = place.left_behind(held)
    expired(place.audit, held)
    published(place.audit, [job_spec("row-0", prompt="changed")])
    place.work()
    place.age()
    assert [subject for _, subject in place.kinds()][1:] == [key]


def test_young_objects_and_what_a_worker_is_at_are_left_alone(place: Place) -> None:
    published(place.audit, [job_spec("row-0")])
    first = leased(place.audit)
    place.left_behind(first)
    expired(place.audit, first)
    assert place.kinds() == []
    assert len(place.kinds(grace_s=0.0)) == 2
    leased(place.audit)
    assert (place.kinds(grace_s=0.0), place.store.prefixes) == ([], [])


def test_what_belongs_to_a_picture_is_no_orphan_though_an_attempt_at_it_was_lost(place: Place) -> None:
    published(place.audit, steered())
    expired(place.audit, leased(place.audit))
    assert place.work() == 2
    place.age()
    assert place.kinds() == []
    assert len(place.store.prefixes) == 1


def test_a_picture_that_was_stored_and_not_recorded_is_adopted_instead_of_made_again(
    place: Place, database: Database
) -> None:
    published(place.audit, chains(2, "draft", "scene"))
    held = leased(place.audit)
    keys = [place.left_behind(held, index) for index in range(2)]
    expired(place.audit, held)
    done = place.reconcile(adopt=True)
    assert done.adoption is not None
    assert (done.ok, done.adoption.adopted, done.adoption.gap) == (True, 2, None)
    assert statuses(database) == ["succeeded", "ready", "succeeded", "ready"]
    assert [place.picture(job_id)["key"] for job_id in (1, 3)] == keys
    assert place.faults() == []
    assert place.work() == 2
    assert (place.kinds(grace_s=0.0), place.faults()) == ([], [])


def forged(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


@on_sqlite
def test_a_picture_that_is_not_what_its_sidecar_says_is_not_adopted(place: Place, database: Database) -> None:
    published(place.audit, chains(1))
    held = leased(place.audit)
    key = place.left_behind(held)
    expired(place.audit, held)
    forged(place.file(key))
    place.age()
    (fault, *_) = place.reconcile(adopt=True).faults
    assert (fault.kind, fault.detail) == ("record-refused", f"{key} and its sidecar do not agree")
    assert statuses(database) == ["ready"]
