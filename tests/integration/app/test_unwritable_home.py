"""The embedded database on a disk that is read-only or full: reading works, and errors carry SQLite's message."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdpipeline import cli
from sdpipeline.app import services
from sdpipeline.db.connection import open_database
from sdpipeline.errors import DatabaseRefusedError, DatabaseUnavailableError
from tests.chaos.disk import read_only, small_disk
from tests.factories import chains, published, statuses

CAMPAIGN = """
name: autumn
checkpoint: shapes
stages:
  - {id: draft, task: text-to-image, prompt: a red circle}
"""
READING = (["status"], ["jobs", "spring"], ["show", "1"], ["plan", "autumn.yaml"], ["db", "current"])
WRITING = (["submit", "autumn.yaml"], ["pause", "spring"], ["cancel", "spring"], ["retry", "spring"])


@pytest.fixture
def home(migrated_sqlite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with two jobs that were never leased."""
    monkeypatch.chdir(tmp_path)
    Path("autumn.yaml").write_text(CAMPAIGN)
    made = tmp_path / "home"
    made.mkdir()
    shutil.copy(migrated_sqlite, made / "sdpipeline.db")
    with services.open_services(services.load_settings(made)) as have:
        published(have.audit, chains(2))
    return made


@pytest.fixture(params=["read-only", "full"])
def unwritable(request: pytest.FixtureRequest, home: Path, tmp_path: Path) -> Iterator[Path]:
    """The same home on a disk that is read-only or full."""
    if request.param == "read-only":
        with read_only(home, tmp_path / "disk") as there:
            yield there
        return
    with small_disk(tmp_path / "disk", size_mib=2) as disk:
        shutil.copytree(home, disk.folder / "home")
        disk.fill()
        yield disk.folder / "home"


def ran(capsys: pytest.CaptureFixture[str], *words: object, exit_codes: tuple[int, ...] = (0,)) -> Any:
    """The JSON document of a command, run in this process."""
    capsys.readouterr()
    assert cli.run([*map(str, words), "--json"]) in exit_codes, capsys.readouterr()
    return json.loads(capsys.readouterr().out)


def test_what_only_reads_works_on_a_disk_that_takes_no_writes(
    unwritable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in READING:
        assert ran(capsys, *words, "--home", unwritable)
    status = ran(capsys, "status", "--home", unwritable)
    assert status["campaigns"][0]["jobs"]["ready"] == 2
    assert status["database"]["writable"] is False
    assert str(unwritable) in status["database"]["reason"]


def test_what_writes_names_the_file_and_the_disk_not_host_and_port(
    unwritable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in WRITING:
        (error,) = ran(capsys, *words, "--home", unwritable, exit_codes=(1, 2))["errors"]
        named = unwritable if words[0] == "submit" else unwritable / "sdpipeline.db"  # it checks storage first
        assert str(named) in error["message"]
        assert "host" not in error["fix"]


def test_doctor_finds_a_disk_that_takes_no_writes(unwritable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checks = {check["name"]: check for check in ran(capsys, "doctor", "--home", unwritable, exit_codes=(3,))["checks"]}
    assert checks["database"]["ok"]
    assert not checks["database: writes"]["ok"]
    assert checks["database: writes"]["fix"]
    assert not checks["picture key"]["ok"]


@pytest.mark.parametrize("words", [["worker", "--until-idle"], ["audit", "seal"]])
def test_a_key_that_cannot_be_written_is_one_line(
    words: list[str], unwritable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (error,) = ran(capsys, *words, "--home", unwritable, exit_codes=(2,))["errors"]
    assert error["key"] == "SDP_HOME"
    assert "cannot make a development key" in error["message"]


def test_changes_that_are_still_in_the_log_are_read_on_a_read_only_disk(home: Path, tmp_path: Path) -> None:
    database = open_database(f"sqlite:///{home / 'sdpipeline.db'}")
    with database.write() as connection:
        connection.exec_driver_sql("UPDATE job SET status = 'cancelled'")
    assert (home / "sdpipeline.db-wal").stat().st_size
    with read_only(home, tmp_path / "disk") as there:
        reader = open_database(f"sqlite:///{there / 'sdpipeline.db'}")
        assert statuses(reader) == ["cancelled"] * 2
        reader.close()
    database.close()


def test_a_disk_that_has_space_again_is_written_to_by_the_same_process(home: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size_mib=2) as disk:
        shutil.copytree(home, disk.folder / "home")
        database = open_database(f"sqlite:///{disk.folder / 'home' / 'sdpipeline.db'}")
        disk.fill()
        assert statuses(database) == ["ready"] * 2
        with pytest.raises(DatabaseUnavailableError), database.write():
            pass
        disk.free()
        with database.write() as connection:
            connection.exec_driver_sql("UPDATE job SET status = 'cancelled'")
        assert statuses(database) == ["cancelled"] * 2
        database.close()


def test_a_damaged_file_is_a_wrong_setting(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "sdpipeline.db").write_bytes(b"no database at all" * 1000)
    (error,) = ran(capsys, "status", "--home", home, exit_codes=(2,))["errors"]
    assert "file is not a database" in error["message"]
    assert "backup" in error["fix"]


def test_a_file_that_another_process_has_locked_is_named_with_who_to_look_for(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdpipeline.db.connection.SQLITE_BUSY_TIMEOUT_S", 0)
    file = home / "sdpipeline.db"
    other, database = sqlite3.connect(file, isolation_level=None), open_database(f"sqlite:///{file}")
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseUnavailableError, match="locked") as error, database.write():
        pass
    assert error.value.fix == f"wait, or end the process that holds the write lock: fuser {file}"
    other.close()
    database.close()


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    database = open_database(f"sqlite:///{tmp_path}")
    with pytest.raises(DatabaseRefusedError, match="unable to open"), database.read():
        pass
