"""Classification of database driver errors: outages, refusals, wrong settings, and faulty statements."""

from __future__ import annotations

import psycopg
import pytest

from sdpipeline.db.driver_errors import translated
from sdpipeline.errors import DatabaseRefusedError, DatabaseUnavailableError, SettingsError

PLACE = "database queue at db.example.com"
OUTAGES = (
    *("08000", "08003", "08006", "08P01", "25006", "25P03", "25P04", "40001", "40P01", "53000", "53100", "53200"),
    *("53300", "53400", "55006", "55P03", "57014", "57P01", "57P02", "57P03", "57P05", "58000", "58030"),
    *("26000", "42P05"),  # prepared statements through a pooler that was not detected
)


@pytest.mark.parametrize("state", OUTAGES)
def test_an_outage_is_one_whatever_class_the_driver_gives_it(state: str) -> None:
    ours = translated(psycopg.errors.lookup(state)("something is wrong\nDETAIL: much"), PLACE)
    assert type(ours) is DatabaseUnavailableError
    assert str(ours) == f"{PLACE}: something is wrong"
    assert ours.fix


@pytest.mark.parametrize("state", ["28000", "28P01", "3D000", "57P04"])
def test_a_wrong_user_password_or_database_is_refused(state: str) -> None:
    assert type(translated(psycopg.errors.lookup(state)("no"), PLACE)) is DatabaseRefusedError


def test_a_missing_right_is_a_wrong_setting_that_names_the_roles() -> None:
    ours = translated(psycopg.errors.lookup("42501")("permission denied for table job"), PLACE)
    assert isinstance(ours, SettingsError)
    assert "deploy/roles.sql" in str(ours)


@pytest.mark.parametrize("state", ["22P02", "23505", "23514", "25P02", "42601", "42P01", "54000", "XX001"])
def test_a_fault_of_a_statement_or_its_data_is_no_outage(state: str) -> None:
    assert translated(psycopg.errors.lookup(state)("no"), PLACE) is None


def test_any_error_that_ended_the_connection_is_an_outage() -> None:
    ours = translated(psycopg.errors.lookup("XX000")("no"), PLACE, connection_lost=True)
    assert type(ours) is DatabaseUnavailableError


@pytest.mark.parametrize(
    ("text", "kind", "fix"),
    [
        ('FATAL:  password authentication failed for user "w1"', DatabaseRefusedError, "password"),
        ('FATAL:  no pg_hba.conf entry for host "10.0.0.1", user "w1"', DatabaseRefusedError, "password"),
        ('FATAL:  database "queue" does not exist', DatabaseRefusedError, "database"),
        ("FATAL:  unsupported startup parameter: options", DatabaseRefusedError, "remove that parameter"),
        ("server does not support SSL, but SSL was required", DatabaseRefusedError, "sslmode"),
        ("FATAL:  the database system is starting up", DatabaseUnavailableError, "wait"),
        ("FATAL:  sorry, too many clients already", DatabaseUnavailableError, "connection limit"),
        ("FATAL:  no more connections allowed (max_client_conn)", DatabaseUnavailableError, "connection limit"),
        ("connection failed: session is read-only", DatabaseUnavailableError, "primary"),
        ("connection timeout expired", DatabaseUnavailableError, None),
        ('could not translate host name "db" to address', DatabaseUnavailableError, None),
    ],
)
def test_a_failed_connection_is_told_apart_by_its_text(
    text: str, kind: type[DatabaseUnavailableError], fix: str | None
) -> None:
    ours = translated(psycopg.OperationalError(text), PLACE)
    assert type(ours) is kind
    assert fix in ours.fix if fix and ours.fix else ours.fix is fix
