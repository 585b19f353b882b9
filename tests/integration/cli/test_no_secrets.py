"""Messages contain no passwords and no prompts: errors of commands and of the database, and tracebacks."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
import structlog
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError

from sdpipeline import cli, logs
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Connection, Database, copy_rows, open_database
from sdpipeline.db.tables import campaign, checkpoint, job
from sdpipeline.errors import DatabaseUnavailableError, SettingsError
from sdpipeline.settings import Settings
from tests.factories import chains, published
from tests.integration.certificates import signing_settings

PIECES = ("Kt7", "qXz", "v9W")
MARKS = ("@#", "##", "/@", ":@", "?@", "@/", "@?", "@:", "% ", " @", "@[", "é@")
PASSWORDS = [PIECES[0] + mark[0] + PIECES[1] + mark[1] + PIECES[2] for mark in MARKS]
COMMANDS = ["status", "show 1", "doctor --json", "audit verify", "db upgrade", "jobs spring", "worker --until-idle"]
PLACE = "127.0.0.1:1/nowhere"


def shown(capsys: pytest.CaptureFixture[str], command: str, exit_code: int | None = 2) -> str:
    capsys.readouterr()
    code = cli.run(command.split())
    said = capsys.readouterr()
    assert exit_code in (None, code), said
    return said.out + said.err


@pytest.mark.parametrize("command", COMMANDS)
def test_no_piece_of_an_unescaped_database_password_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    for name, value in signing_settings(tmp_path).items():
        monkeypatch.setenv(name, value)
    # A worker refuses an address that cannot be right, and waits for a server at any other.
    for password in [each for each in PASSWORDS if "@" in each or not command.startswith("worker")]:
        monkeypatch.setenv("SDP_DATABASE_URL", f"postgresql://sdp:{password}@{PLACE}")
        said = shown(capsys, command, None if "doctor" in command else 2)
        assert not [piece for piece in PIECES if piece in said], (password, said)
        assert "SDP_DATABASE_URL" in said
        assert "percent-encode" in said


@pytest.mark.parametrize("password", PASSWORDS)
def test_a_percent_encoded_password_reaches_the_server_and_no_message(password: str) -> None:
    database = open_database(f"postgresql://sdp:{quote(password, safe='')}@{PLACE}")
    assert database.writer.url.password == password
    with pytest.raises(DatabaseUnavailableError) as refused, database.read():
        pass
    told = "".join(traceback.format_exception(refused.value))
    assert PLACE.partition("/")[0] in str(refused.value)
    assert not [piece for piece in PIECES if piece in told]


@pytest.mark.parametrize("password", [password for password in PASSWORDS if "@" in password])
def test_whoever_opens_such_an_address_is_told_nothing_of_it(password: str) -> None:
    with pytest.raises(SettingsError, match="percent-encode") as refused:
        open_database(f"postgresql://sdp:{password}@{PLACE}")
    told = "".join(traceback.format_exception(refused.value))
    assert not [piece for piece in PIECES if piece in told]


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("SDP_S3__ENDPOINT_URL", "http://key:{}@s3.test:9000"),
        ("SDP_STORAGE_URL", "s3://key:{}@bucket/prefix"),
        ("SDP_STORAGE_URL", "http://key:{}@bucket/prefix"),
        ("SDP_SIGNING__TSA_URL", "http://key:{}@tsa.test"),
        ("SDP_SIGNING__KMS_ENDPOINT_URL", "http://key:{}@kms.test"),
        ("PREFECT_API_URL", "http://key:{}@prefect.test/api"),
    ],
)
def test_no_other_address_holds_a_password(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, address: str
) -> None:
    for password in (*PASSWORDS, "".join(PIECES)):
        monkeypatch.setenv(name, address.format(password))
        said = shown(capsys, "doctor", None)
        assert not [piece for piece in PIECES if piece in said], (password, said)
        assert name in said


# Prompts.

PROMPT = "a portrait of Erika Mustermann"


def twice(connection: Connection) -> None:
    row = {"team": PROMPT, "name": PROMPT, "created_at": 0.0}
    connection.execute(insert(campaign), [row, row])


def no_number(connection: Connection) -> None:
    copy_rows(connection, job, ["subject", "seed"], [(PROMPT, 1), (PROMPT, None)])


def missing(connection: Connection) -> None:
    connection.execute(insert(checkpoint).values(digest="x", alias=PROMPT))


@pytest.mark.parametrize("mistake", [twice, no_number, missing])
def test_a_database_error_shows_no_value(database: Database, mistake: Callable[[Connection], None]) -> None:
    with pytest.raises(Exception) as raised, database.write() as connection:
        mistake(connection)
    told = "".join(traceback.format_exception(raised.value))
    assert "Erika" not in told.replace(f'PROMPT = "{PROMPT}"', "")
    assert isinstance(raised.value, DBAPIError) or mistake is no_number


def test_no_statement_of_the_queue_shows_its_parameters(database: Database, audit: AuditLog) -> None:
    published(audit, chains(1))
    with database.read() as connection, pytest.raises(DBAPIError) as raised:
        connection.execute(select(text("nothing")).where(campaign.c.name == PROMPT))
    assert "Erika" not in str(raised.value)


def test_a_logged_traceback_shows_no_local_variable(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure_logging(Settings(log_format="console"))
    password = "".join(PIECES)
    try:
        len(password) / 0
    except ZeroDivisionError:
        structlog.get_logger().exception("failed")
    said = capsys.readouterr().err
    structlog.reset_defaults()
    assert "ZeroDivisionError" in said
    assert "Kt7qXz" not in said
