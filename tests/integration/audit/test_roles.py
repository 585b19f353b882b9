"""Database roles of deploy/roles.sql: each has the privileges for its own work, and no others."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy
from sqlalchemy import Connection, insert
from sqlalchemy.exc import ProgrammingError

from sdpipeline import cli
from sdpipeline.audit import load_key
from sdpipeline.audit.authority import WORKER_EVENTS
from sdpipeline.audit.seals import digest
from sdpipeline.db import workers
from sdpipeline.db.audit import GENESIS, AuditLog, canonical_event
from sdpipeline.db.connection import open_database
from sdpipeline.db.migrate import upgrade
from sdpipeline.db.tables import audit_event, spending
from sdpipeline.domain import Json
from tests.factories import chains, published
from tests.integration.certificates import signing_settings
from tests.integration.commands import FAKE_ENGINE
from tests.integration.conftest import new_postgres_database

ROLES = Path(__file__).parents[3] / "deploy" / "roles.sql"
REFUSED = r"audit event refused|a worker's login may|belongs to another login"
ROLE_NAMES = ("reader", "worker", "dispatcher", "sealer", "maintainer")
CAMPAIGN = """\
name: roles
checkpoint: shapes
seeds: {start: 0, count: 4}
budget: {max_images: 100}
defaults: {width: 64, height: 64, num_inference_steps: 2, guidance_scale: 1.0}
stages:
  - {id: draft, task: text-to-image, prompt: a red circle}
  - {id: final, task: image-to-image, prompt: a red circle, image: {stage: draft}}
  - {id: strict, task: text-to-image, prompt: a star, quality: {min_sharpness: 1.0e+9}}
"""


@dataclass(frozen=True, slots=True)
class Office:
    """A deployment's database with one login per role."""

    url: sqlalchemy.URL
    folder: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def login(self, role: str) -> str:
        return self.url.set(username=f"test_{role}").render_as_string(hide_password=False)

    def run(self, role: str, *words: object, exit_code: int = 0) -> Any:
        """The JSON document of a command run as this role."""
        self.monkeypatch.setenv("SDP_DATABASE_URL", self.login(role))
        self.capsys.readouterr()
        left_with = cli.run([*map(str, words), "--home", str(self.folder / "home"), "--json"])
        said = self.capsys.readouterr()
        assert left_with == exit_code, said.err + said.out
        return json.loads(said.out)


@pytest.fixture(scope="module")
def roles_url(postgres_server: str) -> Iterator[sqlalchemy.URL]:
    """A migrated database with the roles. The file is run twice, because a second run must change nothing."""
    with new_postgres_database(postgres_server) as url:
        database = open_database(url)
        upgrade(database)
        database.close()
        found = sqlalchemy.make_url(url)
        # As psql sends it: many statements at once, without parameters.
        with psycopg.connect(found.set(drivername="postgresql").render_as_string(hide_password=False)) as connection:
            for _ in range(2):
                connection.execute(ROLES.read_bytes())
            for role in ROLE_NAMES:
                connection.execute(f"DROP ROLE IF EXISTS test_{role}".encode())
                connection.execute(f"CREATE ROLE test_{role} LOGIN IN ROLE sdp_{role}".encode())
            connection.execute(b"DROP ROLE IF EXISTS test_second_worker")
            connection.execute(b"CREATE ROLE test_second_worker LOGIN IN ROLE sdp_worker")
        yield found


@pytest.fixture
def office(
    roles_url: sqlalchemy.URL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Office:
    load_key(tmp_path / "seal.pem", create=True)
    monkeypatch.setenv(FAKE_ENGINE, "0")
    monkeypatch.setenv("SDP_SIGNING__SEAL_KEY_FILE", str(tmp_path / "seal.pem"))
    for name, value in signing_settings(tmp_path).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "roles.yaml").write_text(CAMPAIGN)
    return Office(roles_url, tmp_path, monkeypatch, capsys)


def test_each_role_does_its_own_part_of_a_campaign(office: Office) -> None:
    file = office.folder / "roles.yaml"
    assert office.run("dispatcher", "submit", file)["added"] == 12
    office.run("worker", "worker", "--until-idle", exit_code=3)
    jobs = office.run("reader", "status", "roles")["campaigns"][0]["jobs"]
    assert (jobs["succeeded"], jobs["failed"]) == (8, 4)
    office.run("dispatcher", "retry", "roles")
    office.run("dispatcher", "pause", "roles")
    office.run("dispatcher", "resume", "roles")
    office.run("dispatcher", "cancel", "roles")
    office.run("sealer", "audit", "seal")
    office.run("maintainer", "retention")
    office.run("maintainer", "reconcile", "--repair")
    office.run("sealer", "audit", "seal")
    public = load_key(office.folder / "seal.pem", create=False).public_hex
    office.monkeypatch.delenv("SDP_SIGNING__SEAL_KEY_FILE")
    assert office.run("reader", "audit", "verify", "--key", public)["ok"]
    found = office.run("reader", "audit", "verify", "--key", "0" * 64, exit_code=3)
    assert {fault["kind"] for fault in found["faults"]} == {"seal-key-unknown"}


@pytest.mark.parametrize(
    ("role", "statement"),
    [
        *[
            (role, statement)
            for role in ROLE_NAMES
            for statement in (
                "UPDATE audit_event SET body = body",
                "DELETE FROM audit_event",
                "TRUNCATE audit_event",
                "UPDATE audit_seal SET body = body",
                "DELETE FROM audit_seal_range",
                "DROP TABLE audit_event",
                "ALTER TABLE audit_event DISABLE TRIGGER ALL",
                "CREATE TABLE mine (id int)",
            )
        ],
        *[(role, "UPDATE audit_writer SET login = 'me'") for role in ROLE_NAMES],
        ("worker", "INSERT INTO audit_writer DEFAULT VALUES"),
        ("worker", "UPDATE campaign SET budget = NULL"),
        ("worker", "UPDATE campaign SET priority = 0"),
        ("worker", "UPDATE campaign SET version_id = NULL"),
        ("worker", "UPDATE job SET request = request"),
        ("worker", "UPDATE job SET campaign_id = campaign_id"),
        ("worker", "UPDATE image SET sha256 = sha256"),
        ("worker", "UPDATE attempt SET number = 1"),
        ("worker", "UPDATE spending SET worker_id = worker_id"),
        ("worker", "DELETE FROM spending"),
        ("worker", "UPDATE worker SET host = host"),
        ("worker", "UPDATE lease SET worker_id = worker_id"),
        ("worker", "INSERT INTO audit_seal DEFAULT VALUES"),
        ("worker", "DELETE FROM job"),
        ("worker", "DELETE FROM image"),
        ("worker", "INSERT INTO checkpoint DEFAULT VALUES"),
        ("worker", "UPDATE checkpoint SET revoked_at = NULL"),
        ("dispatcher", "INSERT INTO audit_seal DEFAULT VALUES"),
        ("dispatcher", "DELETE FROM job"),
        ("sealer", "UPDATE job SET status = 'ready'"),
        ("reader", "UPDATE job SET status = 'ready'"),
        ("reader", "CREATE TEMPORARY TABLE mine (id int)"),
    ],
)
def test_no_role_does_more(roles_url: sqlalchemy.URL, role: str, statement: str) -> None:
    engine = sqlalchemy.create_engine(roles_url.set(username=f"test_{role}"), poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection, pytest.raises(ProgrammingError, match=r"permission denied|must be owner"):
        connection.exec_driver_sql(statement)


# Events: their writer, and the chain they belong to.


@pytest.fixture
def made(roles_url: sqlalchemy.URL) -> Iterator[dict[str, AuditLog]]:
    """The audit logs of a worker and of a dispatcher, each with one event, and a campaign of another team."""
    opened = {
        role: open_database(roles_url.set(username=f"test_{role}").render_as_string(hide_password=False))
        for role in ROLE_NAMES
    }
    worker_id = secrets.token_hex(16)
    logs = {
        "worker": AuditLog(opened["worker"], actor=f"worker:{worker_id} sdpipeline/1"),
        "dispatcher": AuditLog(opened["dispatcher"], actor="user:boss"),
    }
    with logs["worker"].transaction() as tx:
        workers.register(tx, worker_id=worker_id, host="h", pid=1, device="cpu", description={})
    published(logs["dispatcher"], chains(1), team="other", name=f"other-{worker_id[:8]}", budget={"max_images": 9})
    with logs["dispatcher"].transaction() as tx:
        spend = {"campaign_id": 1, "group_id": 1, "worker_id": worker_id, "images": 5, "size_bytes": 5}
        tx.connection.execute(insert(spending).values(**spend, gpu_seconds=5.0, cost=5.0))
    yield logs
    for database in opened.values():
        database.close()


def try_event(
    connection: Connection,
    actor: str,
    event: str,
    *,
    into: AuditLog | None = None,
    row: Json | None = None,
    **told: Any,
) -> None:
    """Insert an event that is well-formed except for ``row``, which replaces columns."""
    chain = {"writer": secrets.token_hex(16), "seq": 0, "prev": GENESIS}
    if into is not None:
        chain = {"writer": into.writer_id, "seq": into._seq, "prev": into._head}
    document: Json = {"actor": actor, "at_us": 1, "event": event, "subject": "lease:1", "jobs": []}
    document |= chain | told
    body = canonical_event(document)
    values = {"writer_id": chain["writer"], "seq": chain["seq"], "body": body, "hash": digest(body)}
    connection.execute(insert(audit_event).values(**values | {"subject": document["subject"]} | (row or {})))


@pytest.mark.parametrize("role", ["worker", "second_worker"])
def test_a_workers_login_writes_no_event_of_anybody_else(
    roles_url: sqlalchemy.URL, made: dict[str, AuditLog], role: str
) -> None:
    """Two machines of one role are distinguished by their logins."""
    worker, boss = made["worker"], made["dispatcher"]
    mine = f"worker:of-{role} sdpipeline/1"
    forgeries: dict[str, dict[str, Any]] = {
        "a user": {"actor": "user:boss", "event": "campaign.paused"},
        "a user's chain": {"actor": "user:boss", "event": "lease.taken", "into": boss},
        "its own name in a user's chain": {"actor": mine, "event": "lease.taken", "into": boss},
        "a dispatcher's event": {"actor": mine, "event": "jobs.cancelled"},
        "a pause for no budget": {"actor": mine, "event": "campaign.paused"},
        "of another worker": {"actor": mine, "event": "lease.taken", "worker": "another"},
        "another worker's end": {"actor": mine, "event": "worker.stopped"},
        "how seals are made": {"actor": mine, "event": "settings.changed", "subject": "settings:seals"},
        "other bytes": {"actor": mine, "event": "lease.taken", "row": {"hash": "0" * 64}},
        "another subject": {"actor": mine, "event": "lease.taken", "row": {"subject": "lease:2"}},
        "another login": {"actor": mine, "event": "lease.taken", "login": "test_dispatcher"},
    }
    if role == "second_worker":
        forgeries["a worker's chain"] = {"actor": worker.actor, "event": "lease.taken", "into": worker}
        forgeries["a worker's name"] = {"actor": worker.actor, "event": "lease.taken"}
    engine = sqlalchemy.create_engine(roles_url.set(username=f"test_{role}"), poolclass=sqlalchemy.NullPool)
    for forgery in forgeries.values():
        with engine.connect() as connection, pytest.raises(ProgrammingError, match=REFUSED):
            try_event(connection, **forgery)
    with engine.begin() as connection:
        try_event(connection, mine, "lease.taken")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE campaign SET status = 'paused'",
        "UPDATE campaign SET status = 'paused', paused_because = 'budget' WHERE budget IS NULL",
        "UPDATE campaign SET status = 'active', paused_because = NULL",
        "UPDATE campaign SET admitted = -1",
        "UPDATE spending SET cost = 0",
        "UPDATE spending SET images = images - 1",
        "UPDATE spending SET cost = 'NaN'",
        "UPDATE spending SET gpu_seconds = 'Infinity'",
    ],
)
def test_a_workers_login_changes_no_campaigns_status_and_takes_back_no_cost(
    roles_url: sqlalchemy.URL, made: dict[str, AuditLog], statement: str
) -> None:
    name = made["worker"].actor[7:15]
    with made["dispatcher"].transaction() as tx:
        if "'active', " in statement:
            tx.connection.exec_driver_sql("UPDATE campaign SET status = 'paused'")
        if "budget IS NULL" in statement:
            tx.connection.exec_driver_sql(f"UPDATE campaign SET budget = NULL WHERE name = 'other-{name}'")
    engine = sqlalchemy.create_engine(roles_url.set(username="test_worker"), poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection, pytest.raises(ProgrammingError, match=REFUSED):
        connection.exec_driver_sql(statement)


def test_a_machine_does_not_end_another_machines_worker_nor_charge_it(
    roles_url: sqlalchemy.URL, made: dict[str, AuditLog]
) -> None:
    del made
    engine = sqlalchemy.create_engine(roles_url.set(username="test_second_worker"), poolclass=sqlalchemy.NullPool)
    for statement in ("UPDATE worker SET stopped_at = 1", "UPDATE spending SET cost = cost + 1"):
        with engine.connect() as connection, pytest.raises(ProgrammingError, match=REFUSED):
            connection.exec_driver_sql(statement)


def test_a_sealers_login_writes_only_which_keys_seal(roles_url: sqlalchemy.URL) -> None:
    engine = sqlalchemy.create_engine(roles_url.set(username="test_sealer"), poolclass=sqlalchemy.NullPool)
    for actor, event in (("user:boss", "campaign.paused"), ("worker:1 sdpipeline/1", "settings.changed")):
        with engine.connect() as connection, pytest.raises(ProgrammingError, match=REFUSED):
            try_event(connection, actor, event)


def test_migration_and_verification_agree_on_what_a_worker_writes(roles_url: sqlalchemy.URL) -> None:
    engine = sqlalchemy.create_engine(roles_url, poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        source = connection.exec_driver_sql("SELECT prosrc FROM pg_proc WHERE proname = 'sdp_guard_audit_event'")
        listed = source.scalar_one().split("'{")[1].split("}'")[0].split(",")
    assert set(listed) == WORKER_EVENTS


def test_a_right_that_a_login_lacks_is_a_mistake_with_its_fix(office: Office) -> None:
    (office.folder / "mine.yaml").write_text(CAMPAIGN.replace("name: roles", "name: mine"))
    said = office.run("worker", "submit", office.folder / "mine.yaml", exit_code=2)
    assert "this database login may not do that" in json.dumps(said)
    assert "permission denied" in json.dumps(said)
    assert "roles.sql" in json.dumps(said)
