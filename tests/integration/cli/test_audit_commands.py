"""Audit commands: sealing, exports, and proofs that are verified without a database."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from sdpipeline import audit, cli
from sdpipeline.app import keys, sealing, services
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database, open_database
from sdpipeline.db.settings_events import declare
from sdpipeline.db.tables import audit_event, audit_seal, image
from sdpipeline.domain import Json
from tests.factories import completed, events, job_spec, leased, published
from tests.integration.commands import SDPIPELINE, start


@pytest.fixture
def home(migrated_sqlite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with two finished jobs of a data subject, and no seal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDP_ACTOR", "alice@example.com")
    path = tmp_path / "home"
    path.mkdir()
    shutil.copy(migrated_sqlite, path / "sdpipeline.db")
    with services.open_services(services.load_settings(path)) as have:
        published(have.audit, [replace(job_spec(f"row-{n}"), subject="carol") for n in range(2)])
        completed(have.audit, leased(have.audit), have.store)
    return path


def opened(home: Path) -> Database:
    return open_database(services.load_settings(home).database)


def ran(*words: object, exit_code: int = 0) -> None:
    assert cli.run([str(word) for word in words]) == exit_code


def alone(folder: Path, *words: object) -> tuple[int, Json]:
    """Run a command in an empty folder, without settings, home or environment."""
    folder.mkdir(exist_ok=True)
    command = [*SDPIPELINE, *map(str, words), "--json"]
    done = subprocess.run(command, cwd=folder, env={}, capture_output=True, text=True, timeout=300, check=False)
    assert list(folder.iterdir()) == []
    return done.returncode, json.loads(done.stdout)


def told(capsys: pytest.CaptureFixture[str]) -> Json:
    document: Json = json.loads(capsys.readouterr().out)
    return document


def test_an_export_is_checked_in_an_empty_folder_without_settings(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = tmp_path / "log.jsonl"
    ran("audit", "export", "--home", home, "--out", export, "--json")
    done = told(capsys)
    assert (done["seals"], done["unsealed"], done["file"]) == (1, 0, str(export))
    code, found = alone(tmp_path / "empty", "audit", "verify", "--export", export, "--key", done["public_key"])
    assert (code, found["ok"], found["events"], found["seals"]) == (0, True, done["events"], 1)
    assert found["keys"] == [{"public_key": done["public_key"], "seals": 1}]
    ran("audit", "verify", "--export", export, "--key", "0" * 64, "--json", exit_code=3)
    assert {fault["kind"] for fault in told(capsys)["faults"]} == {"seal-key-unknown"}
    lines = export.read_bytes().splitlines(keepends=True)
    export.write_bytes(b"".join(lines[:-1]))
    ran("audit", "verify", "--export", export, exit_code=3)
    assert "export-cut" in capsys.readouterr().out


def test_without_a_file_an_export_goes_to_standard_output(home: Path, capfdbinary: Any) -> None:
    ran("audit", "export", "--home", home)
    lines = capfdbinary.readouterr().out.splitlines()
    assert (lines[0][:10], lines[-1][:8]) == (b'{"export":', b'{"end":{')
    with opened(home).read() as connection:
        bodies = {row.encode() for row in connection.execute(select(audit_event.c.body)).scalars()}
    assert bodies < set(lines)


@pytest.mark.parametrize(
    "words",
    [
        ["--export", "nowhere.jsonl"],
        ["--proof", "nowhere.json"],
        ["--export", "a", "--proof", "b"],
        ["--export", "a", "--sample", "1"],
        ["--key", "no key"],
        ["--image", "a.png"],
        ["--export", __file__],
        ["--proof", __file__],
        ["--export", __file__, "--key", "no key"],
    ],
)
def test_what_cannot_be_checked_is_bad_input(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ran("audit", "verify", *words, exit_code=2)
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)


def test_a_proof_is_written_for_a_job_a_file_a_key_or_an_address_and_seals_what_is_open(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened(home).read() as connection:
        row = connection.execute(select(image).where(image.c.job_id == 2)).one()
    file = home / "storage" / row.key
    ran("audit", "prove", 2, "--home", home)
    first = told(capsys)
    for picture in (file, row.key, row.url):
        ran("audit", "prove", picture, "--home", home)
        assert told(capsys) == first, picture
    proof, other = tmp_path / "proof.json", tmp_path / "other.png"
    ran("audit", "prove", file, "--home", home, "--out", proof)
    key = keys.seal_key(services.load_settings(home)).public_hex
    words = ("audit", "verify", "--proof", proof, "--key", key, "--image")
    code, found = alone(tmp_path / "empty", *words, file)
    assert (code, found["ok"], found["images"]) == (0, True, 1)
    other.write_bytes(file.read_bytes() + b"?")
    ran(*words, other, exit_code=3)
    assert "object-altered" in capsys.readouterr().out


@pytest.mark.parametrize("picture", ["99", "no/such/key.png"])
def test_a_picture_that_the_log_does_not_know_is_bad_input(
    home: Path, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ran("audit", "prove", picture, "--home", home, exit_code=2)
    assert capsys.readouterr().err.count("\n") == 1


def test_a_public_key_may_come_as_a_pem_file(home: Path, tmp_path: Path) -> None:
    key = keys.seal_key(services.load_settings(home))
    pem = tmp_path / "seal.pub"
    command = ["openssl", "pkey", "-in", str(home / "keys" / "development-seal.pem"), "-pubout", "-out", str(pem)]
    subprocess.run(command, check=True)
    assert audit.public_key(str(pem)) == key.public_hex


# Continuous sealing.


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_sealer_seals_on_time_at_once_when_there_is_much_and_at_its_end(home: Path) -> None:
    stop, sealed = threading.Event(), list[int]()
    database = opened(home)
    log = AuditLog(database, actor="user:test")
    for every_s, most in ((0.2, 10**6), (3600.0, 3)):
        stop.clear()
        sealed.clear()
        published(log, [job_spec(f"{every_s}-{n}") for n in range(4)], name=f"campaign-{most}")
        options = {"every_s": every_s, "events": most, "on_seal": sealed.append}
        with services.open_services(services.load_settings(home)) as have:
            sealer = threading.Thread(target=sealing.keep_sealing, args=(have, stop), kwargs=options, daemon=True)
            sealer.start()
            for _ in range(3):
                leased(log, limit=1)
            eventually(lambda: bool(sealed) and audit.unsealed(database) == 0)
            leased(log, limit=1)
            stop.set()
            sealer.join()
        assert audit.unsealed(database) == 0


def test_a_sealer_that_is_told_to_end_seals_and_leaves_with_143(home: Path) -> None:
    with start("audit", "seal", "--watch", "--every", "3600", "--home", home) as sealer:
        eventually(lambda: any(event["event"] == "settings.changed" for event in events(opened(home))))
        sealer.send_signal(signal.SIGTERM)
        assert sealer.wait(60) == 143
    assert audit.unsealed(opened(home)) == 0


def test_a_large_backlog_becomes_several_seals(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdpipeline.audit.seals.MAX_EVENTS", 2)
    settings = services.load_settings(home)
    with services.open_services(settings) as have:
        count = sealing.seal(have)
    with opened(home).read() as connection:
        bodies = [json.loads(body) for body in connection.execute(select(audit_seal.c.body)).scalars()]
    assert (sum(body["events"] for body in bodies), {body["events"] for body in bodies[:-1]}) == (count, {2})
    with services.open_services(settings) as have:
        assert audit.verify(have.database, have.store, keys.seal_key(settings)).faults == []


# Recorded actors and settings.


def test_whoever_submits_seals_and_erases_stands_in_the_event(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDP_ACTOR", "bob@example.com")
    ran("erase", "--subject", "carol", "--home", home)
    by = {event["event"]: event["actor"] for event in events(opened(home))}
    assert by["campaign.submitted"].startswith("user:alice@example.com sdpipeline/")
    assert by["jobs.erased"].startswith("user:bob@example.com sdpipeline/")
    assert by["pictures.deleted"] == by["settings.changed"] == by["jobs.erased"]


def test_without_a_setting_the_actor_is_the_user_at_this_machine(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SDP_ACTOR")
    monkeypatch.setenv("LOGNAME", "dave")
    monkeypatch.setattr("socket.gethostname", lambda: "studio-7")
    assert services.actor(services.load_settings(home)).startswith("user:dave@studio-7 sdpipeline/")


def test_settings_that_decide_over_seals_are_told_when_they_change_and_only_then(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def declared() -> list[Json]:
        with services.open_services(services.load_settings(home)) as have:
            sealing.seal(have)
        told = [event for event in events(opened(home)) if event["event"] == "settings.changed"]
        return [event["values"] for event in sorted(told, key=lambda event: int(event["at_us"]))]

    key = keys.seal_key(services.load_settings(home)).public_hex
    assert declared() == declared() == [{"keys": [key], "lock": None}]
    monkeypatch.setenv("SDP_SIGNING__RETIRED_SEAL_KEYS", json.dumps(["ab" * 32]))
    assert declared()[1:] == [{"keys": [key, "ab" * 32], "lock": None}]
    monkeypatch.delenv("SDP_SIGNING__RETIRED_SEAL_KEYS")
    assert len(declared()) == len(declared()) == 3


def test_each_part_of_the_settings_is_told_by_itself(home: Path) -> None:
    log = AuditLog(opened(home), actor="user:test")
    with log.transaction() as tx:
        assert declare(tx, "marks", {"a": 1})
    with log.transaction() as tx:
        assert (declare(tx, "marks", {"a": 1}), declare(tx, "seals", {"a": 1})) == (False, True)


@pytest.mark.parametrize("words", [("audit", "export"), ("audit", "prove", "1"), ("reproduce", "1")])
def test_a_folder_is_no_place_to_write_a_file_to(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    (folder := tmp_path / "folder").mkdir()
    ran(*words, "--out", folder, "--home", home, exit_code=2)
    assert "is a folder" in capsys.readouterr().err
    assert list(tmp_path.glob("*.part")) == []


# Sealing by another process that has the key.


@pytest.fixture
def elsewhere(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the seal key; commands of this home have only the public key."""
    key = tmp_path / "seal.pem"
    audit.load_key(key, create=True)
    public = ["openssl", "pkey", "-in", str(key), "-pubout", "-out", str(tmp_path / "seal.pub")]
    subprocess.run(public, check=True)
    monkeypatch.setenv("SDP_SIGNING__SEAL_PUBLIC_KEY_FILE", str(tmp_path / "seal.pub"))
    return key


@contextmanager
def sealing_elsewhere(home: Path, key: Path) -> Iterator[None]:
    """A separate process that has the key and seals often."""
    told_so = {"SDP_SIGNING__SEAL_KEY_FILE": str(key)}
    process = start("audit", "seal", "--watch", "--every", "0.2", "--home", home, **told_so)
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


def test_a_process_without_the_key_waits_for_the_one_that_seals_and_verifies_its_seals(
    home: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with services.open_services(services.load_settings(home)) as have:
        assert sealing.seal_here(have) is None
        with sealing_elsewhere(home, elsewhere):
            assert sealing.seal_or_wait(have) > 0
    assert audit.unsealed(opened(home)) == 0
    ran("audit", "verify", "--home", home)
    capsys.readouterr()
    ran("audit", "prove", 2, "--home", home)
    assert told(capsys)["seal"]


def test_a_process_without_the_key_does_not_wait_for_ever(
    home: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sealing, "SEAL_TIMEOUT_S", 0.1)
    ran("audit", "prove", 2, "--home", home, exit_code=1)
    assert "is `sdpipeline audit seal --watch` running?" in capsys.readouterr().err
    assert audit.unsealed(opened(home)) > 0


@pytest.mark.parametrize("words", [("seal",), ("seal", "--watch"), ("export",)])
def test_what_signs_says_where_it_can_run(
    home: Path, elsewhere: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    ran("audit", *words, "--home", home, exit_code=2)
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert "SDP_SIGNING__SEAL_KEY_FILE: is not set (run this on the machine that seals" in said.err


def test_a_process_that_names_both_halves_is_refused(
    home: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDP_SIGNING__SEAL_KEY_FILE", str(elsewhere))
    ran("audit", "seal", "--home", home, exit_code=2)
