"""Restoring a backup that is older than the storage: it is detected, and work resumes without making anything twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import select
from sqlalchemy.event import listen, remove

from sdpipeline.audit import SealKey, Verification, load_key, refuse_restored, seal, verify
from sdpipeline.cli import run
from sdpipeline.db import job_control, migrate
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database, open_database
from sdpipeline.db.tables import image
from sdpipeline.domain import JobSpec
from sdpipeline.engine import Batch, GeneratedImage, GenerationFailure, PreparedRequest
from sdpipeline.engine.fake import FakeEngine
from sdpipeline.errors import AuditBrokenError
from sdpipeline.jobs import Lease
from sdpipeline.maintenance.reconcile import reconcile
from sdpipeline.maintenance.restore import Adoption
from sdpipeline.storage import LocalStore
from sdpipeline.storage.keys import seal_object_key
from sdpipeline.worker.finished_picture import Attempt, DeliveryRequest, finish
from sdpipeline.worker.inputs import Consumed
from sdpipeline.worker.picture_storage import store_picture
from sdpipeline.worker.worker import Worker, WorkerLimits
from tests.factories import chains, events, expired, job_spec, leased, published, signing_key, statuses
from tests.integration.commands import FAKE_ENGINE
from tests.integration.conftest import new_postgres_database

MORE = 200


class Counting(FakeEngine):
    """The fake engine with a count of its pictures."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.made = 0

    def generate(self, batch: Batch) -> Sequence[GeneratedImage | GenerationFailure]:
        self.made += len(batch.requests)
        return super().generate(batch)


@dataclass
class Deployment:
    """A database that can be backed up and restored, with storage that cannot."""

    url: str
    folder: Path
    backup: Callable[[], None]
    restore: Callable[[], None]
    engine: Counting = field(default_factory=Counting)

    def __post_init__(self) -> None:
        self.store = LocalStore(self.folder / "storage")
        self.key: SealKey = load_key(self.folder / "key.pem", create=True)
        self.open()

    def open(self) -> None:
        self.database: Database = open_database(self.url)
        self.log = AuditLog(self.database, actor="user:test")

    def backed_up(self) -> None:
        self.database.close()
        self.backup()
        self.open()

    def restored(self) -> None:
        self.database.close()
        self.restore()
        self.open()

    def work(self) -> int:
        limits = WorkerLimits(max_batch=8, lease_ttl_s=60.0, max_pixels=10**7)
        return Worker("worker-1", self.log, self.store, self.engine, limits, signing_key()).run().succeeded

    def made(self, jobs: Sequence[JobSpec], **options: Any) -> None:
        """Submit, work and seal, as ``run`` does."""
        published(self.log, jobs, **options)
        self.work()
        self.seal()

    def seal(self) -> int:
        return seal(self.database, self.store, self.key)

    def adopt(self) -> Adoption:
        done = reconcile(self.log, self.store, lambda: self.key, grace_s=3600.0, adopt=True)
        assert done.adoption is not None
        assert done.faults == []
        return done.adoption

    def verify(self) -> Verification:
        return verify(self.database, self.store, self.key)

    def pictures(self) -> set[tuple[str, str]]:
        with self.database.read() as connection:
            return {(key, sha) for key, sha in connection.execute(select(image.c.key, image.c.sidecar_sha256))}


@pytest.fixture
def on_sqlite(migrated_sqlite: Path, tmp_path: Path) -> Iterator[Deployment]:
    """Backup by a copy of the file."""
    live, kept = tmp_path / "queue.db", tmp_path / "backup.db"
    shutil.copy(migrated_sqlite, live)

    def restore() -> None:
        for path in tmp_path.glob("queue.db*"):
            path.unlink()
        shutil.copy(kept, live)

    found = Deployment(f"sqlite:///{live}", tmp_path, lambda: _copy_file(live, kept), restore)
    yield found
    found.database.close()


def _copy_file(live: Path, kept: Path) -> None:
    assert not live.with_name("queue.db-wal").exists()
    shutil.copy(live, kept)


@pytest.fixture
def on_postgresql(postgres_server: str, tmp_path: Path) -> Iterator[Deployment]:
    """Backup by a database created from this one as its template."""
    with new_postgres_database(postgres_server) as url:
        database = open_database(url)
        migrate.upgrade(database)
        database.close()
        name = str(sqlalchemy.make_url(url).database)
        server = sqlalchemy.make_url(postgres_server).set(drivername="postgresql+psycopg")
        engine = sqlalchemy.create_engine(server, isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool)

        def copy(of: str, to: str) -> None:
            with engine.connect() as connection:
                connection.exec_driver_sql(f"DROP DATABASE IF EXISTS {to} WITH (FORCE)")
                connection.exec_driver_sql(f"CREATE DATABASE {to} TEMPLATE {of}")

        kept = f"{name}_kept"
        found = Deployment(url, tmp_path, lambda: copy(name, kept), lambda: copy(kept, name))
        yield found
        found.database.close()
        with engine.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE IF EXISTS {kept} WITH (FORCE)")


@pytest.fixture(params=["sqlite", "postgresql"])
def deployment(request: pytest.FixtureRequest) -> Deployment:
    found: Deployment = request.getfixturevalue(f"on_{request.param}")
    return found


on_one_database = pytest.mark.parametrize("deployment", ["sqlite"], indirect=True)


def test_after_a_restore_nothing_is_generated_again_and_the_log_names_its_gap(deployment: Deployment) -> None:
    jobs = list(chains(MORE // 2 + 5, "draft", "scene"))
    deployment.made(jobs[:10])
    deployment.backed_up()
    deployment.made(jobs)
    pictures, lost = deployment.pictures(), len(events(deployment.database))
    deployment.restored()
    lost -= len(events(deployment.database))
    assert len(deployment.pictures()) == 10
    with pytest.raises(AuditBrokenError, match=f"older than {seal_object_key(2)}"):
        refuse_restored(deployment.database, deployment.store)

    done = deployment.adopt()
    assert (done.adopted, done.waiting) == (0, MORE)
    refuse_restored(deployment.database, deployment.store)
    published(deployment.log, jobs)
    assert set(statuses(deployment.database)) == {"succeeded"}
    assert (deployment.work(), deployment.engine.made) == (0, MORE + 10)
    assert deployment.pictures() == pictures

    deployment.seal()
    found = deployment.verify()
    assert found.faults == []
    (gap,) = found.gaps
    assert (gap["first_seal"], gap["last_seal"], gap["events"]) == (2, 2, lost)
    assert found.document()["gaps"] == [gap]
    told = [event["event"] for event in events(deployment.database)]
    assert (told.count("audit.gap"), told.count("job.adopted")) == (1, MORE)


def test_jobs_that_the_backup_has_as_leased_or_waiting_succeed_at_once(deployment: Deployment) -> None:
    deployment.made([job_spec("first")])
    published(deployment.log, chains(3, "draft", "scene"), name="autumn")
    held = leased(deployment.log, limit=2)
    deployment.backed_up()
    expired(deployment.log, held)
    deployment.work()
    deployment.seal()
    pictures = deployment.pictures()
    deployment.restored()
    assert sorted(statuses(deployment.database, campaign=2)) == ["leased"] * 2 + ["ready"] + ["waiting"] * 3
    assert deployment.adopt().adopted == 6
    assert set(statuses(deployment.database)) == {"succeeded"}
    assert (deployment.work(), deployment.engine.made, deployment.pictures()) == (0, 7, pictures)
    assert deployment.verify().faults == []


@on_one_database
def test_what_is_to_be_made_from_adopted_pictures_is_made(deployment: Deployment) -> None:
    published(deployment.log, chains(3, "draft", "scene"))
    deployment.backed_up()
    deployment.work()
    deployment.seal()
    deployment.restored()
    shutil.rmtree(deployment.folder / "storage/default/spring/scene")
    assert deployment.adopt().adopted == 3
    assert statuses(deployment.database) == ["succeeded", "ready"] * 3
    assert (deployment.work(), deployment.engine.made) == (3, 9)
    assert deployment.verify().faults == []


def test_what_had_failed_or_was_skipped_by_the_time_of_the_backup_is_adopted_too(deployment: Deployment) -> None:
    deployment.engine = Counting(poison=("row-0",))
    deployment.made(list(chains(2, "draft", "scene")))
    deployment.backed_up()
    deployment.engine = Counting()
    with deployment.log.transaction() as tx:
        job_control.retry(tx, campaign_id=1, statuses=["failed"])
    deployment.work()
    deployment.seal()
    deployment.restored()
    assert statuses(deployment.database) == ["failed", "skipped", "succeeded", "succeeded"]
    assert deployment.adopt().adopted == 2
    assert (set(statuses(deployment.database)), deployment.work()) == ({"succeeded"}, 0)
    assert deployment.verify().faults == []


@on_one_database
def test_of_several_pictures_of_a_job_the_one_that_others_were_made_from_is_adopted(deployment: Deployment) -> None:
    published(deployment.log, chains(1, "draft", "scene"))
    deployment.backed_up()
    lost = leased(deployment.log, limit=1)
    for slot in range(1, 6):
        leave_behind(deployment.store, lost, slot=slot)
    expired(deployment.log, lost)
    deployment.work()
    deployment.seal()
    pictures = deployment.pictures()
    deployment.restored()
    assert deployment.adopt().adopted == 2
    assert deployment.pictures() == pictures


def leave_behind(store: LocalStore, lease: Lease, *, slot: int) -> None:
    """Store a picture of the lease's first job without a row, made in another slot of its batch than any other."""
    leased_job = lease.jobs[0]
    (made,) = FakeEngine().generate(Batch(requests=[PreparedRequest(request=leased_job.request)], bucket=8))
    assert isinstance(made, GeneratedImage)
    attempt = Attempt(number=1, lease_id=f"{slot:032x}", worker_id="worker-1", gpu_seconds=0.1)
    other = replace(made, ran=made.ran | {"slot": slot})
    request = DeliveryRequest(leased=leased_job, consumed=Consumed(), generated=other, attempt=attempt)
    store_picture(store, finish(request, signing_key()))


def test_an_adoption_that_was_interrupted_keeps_workers_out_until_it_is_ended(deployment: Deployment) -> None:
    published(deployment.log, chains(2))
    deployment.backed_up()
    deployment.work()
    deployment.seal()
    deployment.restored()

    def cut(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("INSERT INTO audit_seal "):
            raise KeyboardInterrupt

    listen(deployment.database.writer, "before_cursor_execute", cut)
    with pytest.raises(KeyboardInterrupt):
        deployment.adopt()
    remove(deployment.database.writer, "before_cursor_execute", cut)
    with pytest.raises(AuditBrokenError):
        refuse_restored(deployment.database, deployment.store)
    done = deployment.adopt()
    assert (done.adopted, done.gap is not None) == (0, True)
    assert (deployment.work(), deployment.engine.made) == (0, 2)
    assert deployment.verify().faults == []


@on_one_database
def test_a_seal_by_another_key_is_not_gone_on_from_and_nothing_is_changed(deployment: Deployment) -> None:
    published(deployment.log, chains(2))
    deployment.backed_up()
    deployment.work()
    seal(deployment.database, deployment.store, load_key(deployment.folder / "other.pem", create=True))
    deployment.restored()
    with pytest.raises(AuditBrokenError, match="does not continue this database's seals"):
        deployment.adopt()
    assert statuses(deployment.database) == ["ready", "ready"]


@on_one_database
def test_a_gap_hides_nothing_that_is_changed_by_hand(deployment: Deployment) -> None:
    deployment.made(list(chains(1)))
    deployment.backed_up()
    deployment.made(list(chains(2)))
    deployment.restored()
    deployment.adopt()
    deployment.seal()
    lost = seal_object_key(2)
    (deployment.folder / "storage" / lost).unlink()
    assert [(fault.kind, fault.subject) for fault in deployment.verify().faults] == [("seal-missing", "seal:2")]


@on_one_database
def test_before_the_adoption_nothing_is_repaired(deployment: Deployment) -> None:
    published(deployment.log, chains(2))
    expired(deployment.log, leased(deployment.log, ttl_s=60.0))
    deployment.backed_up()
    deployment.work()
    deployment.seal()
    deployment.restored()
    done = reconcile(deployment.log, deployment.store, lambda: deployment.key, grace_s=0.0, repair=True)
    assert ([fault.kind for fault in done.faults], done.ok) == (["database-too-old"], False)
    assert "reconcile --adopt" in done.faults[0].action
    assert not (deployment.folder / "storage/quarantine").exists()


@on_one_database
def test_a_copy_is_adopted_as_the_copy_it_is(deployment: Deployment) -> None:
    deployment.made([job_spec("a", prompt="the same")])
    deployment.backed_up()
    deployment.made([job_spec("a", prompt="the same"), job_spec("b", prompt="the same")])
    pictures = deployment.pictures()
    deployment.restored()
    assert deployment.adopt().waiting == 1
    published(deployment.log, [job_spec("a", prompt="the same"), job_spec("b", prompt="the same")])
    assert (deployment.work(), deployment.pictures()) == (0, pictures)
    assert deployment.verify().faults == []


@on_one_database
def test_a_job_that_asks_for_another_picture_by_now_is_made(deployment: Deployment) -> None:
    deployment.seal()
    deployment.backed_up()
    deployment.made([job_spec("row-0")])
    deployment.restored()
    assert deployment.adopt().waiting == 1
    published(deployment.log, [job_spec("row-0", prompt="changed")])
    assert (deployment.work(), deployment.engine.made) == (1, 2)
    # Changed back, it uses the picture that was found.
    published(deployment.log, [job_spec("row-0")])
    assert (deployment.work(), deployment.engine.made, statuses(deployment.database)) == (0, 2, ["succeeded"])
    assert deployment.verify().faults == []


# From the command line.


def test_the_commands_stop_at_a_restored_backup_and_go_on_once_it_was_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home, file = tmp_path / "home", tmp_path / "spring.yaml"
    kept, live = tmp_path / "kept.db", home / "sdpipeline.db"
    monkeypatch.setenv(FAKE_ENGINE, "0")
    file.write_text(
        "name: spring\ncheckpoint: shapes\nseeds: {count: 3}\ndefaults: {width: 64, height: 64}\n"
        "stages:\n  - {id: draft, task: text-to-image, prompt: a red circle}\n"
    )

    def command(*words: object, exit_code: int = 0) -> Any:
        """Run a command in this process: a dozen interpreters would take longer than all other tests here."""
        capsys.readouterr()
        assert run([*map(str, words), "--home", str(home), "--json"]) == exit_code
        return json.loads(capsys.readouterr().out)

    command("db", "upgrade")
    shutil.copy(live, kept)
    for words in (("submit", file), ("worker", "--until-idle"), ("audit", "seal")):
        command(*words)
    for path in home.glob("sdpipeline.db*"):
        path.unlink()
    shutil.copy(kept, live)
    for words in (("submit", file), ("worker", "--until-idle")):
        (refused,) = command(*words, exit_code=2)["errors"]
        assert (refused["key"], refused["fix"]) == ("SDP_DATABASE_URL", "sdpipeline reconcile --adopt")
        assert refused["message"].startswith("the database is older than audit/seals/00000001.json in storage")
    (fault,) = command("reconcile", exit_code=3)["faults"]
    assert fault["kind"] == "database-too-old"
    adopted = command("reconcile", "--adopt")
    assert (adopted["adopted"], adopted["waiting"], adopted["gap"]["last_seal"]) == (0, 3, 1)
    command("submit", file)
    jobs = command("jobs", "spring")["jobs"]
    assert [job["status"] for job in jobs] == ["succeeded"] * 3
    # A picture that is lost later is made again.
    Path(jobs[0]["image"]["url"].removeprefix("file://")).unlink()
    found = command("reconcile", exit_code=3)
    assert (found["ok"], [set(each) for each in found["faults"]]) == (False, [{"kind", "subject", "detail", "action"}])
    assert command("reconcile", "--repair")["ok"] is True
    assert command("worker", "--until-idle")["succeeded"] == 1
    assert len(command("audit", "verify")["gaps"]) == 1
