"""The database roles of deploy/roles.sql: each does its own work with a campaign, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy
from sqlalchemy.exc import ProgrammingError

from sdpipeline import cli
from sdpipeline.audit import load_key
from sdpipeline.db.connection import open_database
from sdpipeline.db.migrate import upgrade
from tests.integration.certificates import signing_settings
from tests.integration.commands import FAKE_ENGINE
from tests.integration.conftest import new_postgres_database

ROLES = Path(__file__).parents[2] / "deploy" / "roles.sql"
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
    """A deployment's database, and a login for each role."""

    url: sqlalchemy.URL
    folder: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def login(self, role: str) -> str:
        return self.url.set(username=f"test_{role}").render_as_string(hide_password=False)

    def run(self, role: str, *words: object, exit_code: int = 0) -> Any:
        """The JSON document of a command that is typed as this role."""
        self.monkeypatch.setenv("SDP_DATABASE_URL", self.login(role))
        self.capsys.readouterr()
        left_with = cli.run([*map(str, words), "--home", str(self.folder / "home"), "--json"])
        said = self.capsys.readouterr()
        assert left_with == exit_code, said.err + said.out
        return json.loads(said.out)


@pytest.fixture(scope="module")
def roles_url(postgres_server: str) -> Iterator[sqlalchemy.URL]:
    """A migrated database with the roles, twice: running the file again changes nothing."""
    with new_postgres_database(postgres_server) as url:
        database = open_database(url)
        upgrade(database)
        database.close()
        found = sqlalchemy.make_url(url)
        # As psql sends it: many statements at once, and nothing to fill in.
        with psycopg.connect(found.set(drivername="postgresql").render_as_string(hide_password=False)) as connection:
            for _ in range(2):
                connection.execute(ROLES.read_bytes())
            for role in ROLE_NAMES:
                connection.execute(f"DROP ROLE IF EXISTS test_{role}".encode())
                connection.execute(f"CREATE ROLE test_{role} LOGIN IN ROLE sdp_{role}".encode())
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
