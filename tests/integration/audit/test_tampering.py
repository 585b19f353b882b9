"""The tamper matrix: attacks by someone with write access to database and storage, and the fault that each produces.

The table in docs/explanation/tampering.md lists the same attacks, and a test compares the two.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import delete, insert, select, update

from sdpipeline import provenance
from sdpipeline.audit import SealKey, load_key, seal, verify
from sdpipeline.audit.export import END, SEAL, write
from sdpipeline.audit.offline import verify_export
from sdpipeline.audit.proof import prove, success_of_job, verify_proof
from sdpipeline.db import queue
from sdpipeline.db.audit import GENESIS, AuditLog, Event
from sdpipeline.db.budgets import Charge
from sdpipeline.db.connection import Database
from sdpipeline.db.tables import audit_event, audit_seal, audit_seal_range, campaign, campaign_version
from sdpipeline.domain import Json, OutputFormat
from sdpipeline.engine import Pixels
from sdpipeline.errors import BadInputError
from sdpipeline.storage import LocalStore, ObjectStore, S3Store
from sdpipeline.storage.keys import seal_object_key
from tests.factories import chains, leased, published, stored_image
from tests.integration.conftest import Bucket

PAGE = (Path(__file__).parents[3] / "docs" / "explanation" / "tampering.md").read_text(encoding="utf-8")
NOTHING = set[str]()


@dataclass(frozen=True, slots=True)
class Log:
    """A database with finished work, sealed twice, and later events; three pictures in a directory."""

    database: Database
    audit: AuditLog
    store: ObjectStore
    key: SealKey
    folder: Path

    def kinds(self) -> set[str]:
        return {fault.kind for fault in verify(self.database, self.store, self.key).faults}

    def exported(self) -> bytes:
        file = io.BytesIO()
        write(self.database, self.key, file)
        return file.getvalue()

    def kinds_of_export(self) -> set[str]:
        lines = io.BytesIO(self.exported())
        return {fault.kind for fault in verify_export(lines, trusted=self.key.public).faults}

    def events(self) -> list[Any]:
        """Event rows, chain by chain."""
        with self.database.read() as connection:
            return list(connection.execute(select(audit_event).order_by(audit_event.c.writer_id, audit_event.c.seq)))

    def rewrite(self, row: Any, **values: Any) -> None:
        own = (audit_event.c.writer_id == row.writer_id) & (audit_event.c.seq == row.seq)
        with self.database.write() as connection:
            connection.execute(update(audit_event).where(own).values(**values))

    def cut(self, *rows: Any) -> None:
        with self.database.write() as connection:
            for row in rows:
                own = (audit_event.c.writer_id == row.writer_id) & (audit_event.c.seq == row.seq)
                connection.execute(delete(audit_event).where(own))

    def forget_seals(self, *numbers: int) -> None:
        with self.database.write() as connection:
            connection.execute(delete(audit_seal_range).where(audit_seal_range.c.number.in_(numbers)))
            connection.execute(delete(audit_seal).where(audit_seal.c.number.in_(numbers)))

    def pictures(self) -> list[Path]:
        return sorted(self.folder.rglob("*.png"))


def worked(database: Database, audit: AuditLog, store: ObjectStore, key: SealKey, folder: Path) -> Log:
    log = Log(database, audit, store, key, folder)
    published(audit, chains(3))
    for n in range(2):
        make(log, n)
        seal(database, store, key)
    make(log, 2)
    return log


def make(log: Log, n: int) -> None:
    """Make one picture as a worker would."""
    lease = leased(log.audit, limit=1)
    pixels = np.random.default_rng(n).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    encoded = provenance.encode(pixels, output=OutputFormat(), record={"schema": "test", "n": n})
    stored = stored_image(lease.jobs[0], log.store)
    key = f"{stored.key.rpartition('/')[0]}/{encoded.sha256}.png"
    log.store.put(key, encoded.data, content_type="image/png")
    log.store.delete(stored.key)
    about: Json = {"sha256": encoded.sha256, "pixels_sha256": encoded.pixels_sha256, "size_bytes": len(encoded.data)}
    with log.audit.transaction() as tx:
        charge = Charge(worker_id="worker-1")
        done = replace(stored, key=key, url=log.store.url(key), **about)
        assert queue.complete(tx, lease_id=lease.id, leased=lease.jobs[0], stored=done, charge=charge)


@pytest.fixture
def database_url(migrated_sqlite: Path, tmp_path: Path) -> str:
    """SQLite only: these checks run in Python and are the same on both databases."""
    shutil.copy(migrated_sqlite, tmp_path / "queue.db")
    return f"sqlite:///{tmp_path / 'queue.db'}"


@pytest.fixture
def log(database: Database, audit: AuditLog, tmp_path: Path) -> Log:
    key = load_key(tmp_path / "k.pem", create=True)
    return worked(database, audit, LocalStore(tmp_path / "s"), key, tmp_path / "s")


@pytest.fixture
def locked(database: Database, audit: AuditLog, tmp_path: Path, locked_bucket: Bucket) -> Log:
    """The same in a bucket with Object Lock."""
    store = locked_bucket.store(object_lock_mode="GOVERNANCE", object_lock_days=10)
    return worked(database, audit, store, load_key(tmp_path / "k.pem", create=True), tmp_path)


def rehashed(body: Json) -> dict[str, str]:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return {"body": text, "hash": hashlib.sha256(text.encode()).hexdigest()}


def edit(log: Log) -> None:
    row = log.events()[2]
    log.rewrite(row, body=row.body.replace("user:test", "user:none"))


def edit_and_rehash(log: Log) -> None:
    row = log.events()[2]
    log.rewrite(row, **rehashed(json.loads(row.body) | {"actor": "user:none"}))


def delete_the_middle(log: Log) -> None:
    log.cut(log.events()[2])


def cut_a_sealed_tail(log: Log) -> None:
    log.cut(*log.events()[4:])


def cut_an_unsealed_tail(log: Log) -> None:
    """Delete the unsealed last event, which has left no other trace yet."""
    published(log.audit, chains(1), name="other")
    leased(log.audit, limit=1)
    seal(log.database, log.store, log.key)
    with log.audit.transaction() as tx:
        tx.record(Event.CAMPAIGN_PAUSED, "campaign:2")
    log.cut(log.events()[-1])


def drop_a_seal(log: Log) -> None:
    log.forget_seals(1)


def drop_the_newest_seal(log: Log) -> None:
    """Delete the newest seal in the database and in storage, so that its events are unsealed again."""
    log.forget_seals(2)
    log.store.delete(seal_object_key(2))


def rewrite_all(log: Log, key: SealKey) -> None:
    """Rewrite every event, hash, affected row and seal, in the database and in storage."""
    with log.database.write() as connection:
        connection.execute(update(campaign_version).values(actor="user:none"))
    head = GENESIS
    for row in log.events():
        new = rehashed(json.loads(row.body) | {"prev": head, "actor": "user:none"})
        head = new["hash"]
        log.rewrite(row, **new)
    log.forget_seals(1, 2)
    if not isinstance(log.store, S3Store):
        for number in (1, 2):
            log.store.delete(seal_object_key(number))
        seal(log.database, log.store, key)


def rewrite_with_another_key(log: Log) -> None:
    rewrite_all(log, load_key(log.folder / "another.pem", create=True))


def rewrite_with_the_stolen_key(log: Log) -> None:
    rewrite_all(log, log.key)


def swap_two_pictures(log: Log) -> None:
    one, other, _ = log.pictures()
    for path, data in ((one, other.read_bytes()), (other, one.read_bytes())):
        path.chmod(0o644)
        path.write_bytes(data)


def saved_again(log: Log, change: Callable[[Pixels], Pixels]) -> None:
    path = log.pictures()[0]
    pixels = np.asarray(Image.open(path).convert("RGB"))
    path.chmod(0o644)
    Image.fromarray(change(pixels.copy())).save(path)


def edit_pixels(log: Log) -> None:
    def darkened(pixels: Pixels) -> Pixels:
        pixels[0, 0] = 255 - pixels[0, 0]
        return pixels

    saved_again(log, darkened)


def strip_metadata(log: Log) -> None:
    saved_again(log, lambda pixels: pixels)


def strip_and_add_metadata(log: Log) -> None:
    path = log.pictures()[0]
    pixels = provenance.decode(path.read_bytes(), max_pixels=1000)
    path.chmod(0o644)
    path.write_bytes(provenance.encode(pixels, output=OutputFormat(), record={"schema": "forged"}).data)


def write_as_somebody_else(log: Log) -> None:
    last = log.events()[-1]
    row = rehashed(json.loads(last.body) | {"seq": last.seq + 1, "prev": last.hash, "actor": "user:none"})
    with log.database.write() as connection:
        about = {"writer_id": last.writer_id, "seq": last.seq + 1, "subject": last.subject}
        connection.execute(insert(audit_event).values(**row, **about))


def change_a_campaign(log: Log) -> None:
    with log.database.write() as connection:
        connection.execute(update(campaign).values(budget={"max_images": 1}))


UNDETECTABLE = "undetectable"
MATRIX: dict[str, tuple[Callable[[Log], None], str, str]] = {
    "edit an event": (edit, "event-altered", "sealed-events-altered"),
    "edit an event and its hash": (edit_and_rehash, "chain-broken", "chain-broken"),
    "delete events in the middle": (delete_the_middle, "event-missing", "event-missing"),
    "write an event as somebody else": (write_as_somebody_else, "event-forged", "event-forged"),
    "change a campaign's status, budget or cost": (change_a_campaign, "campaign-altered", UNDETECTABLE),
    "cut the tail, sealed": (cut_a_sealed_tail, "sealed-events-altered", "sealed-events-altered"),
    "cut the tail, not sealed yet": (cut_an_unsealed_tail, UNDETECTABLE, UNDETECTABLE),
    "drop a seal": (drop_a_seal, "seal-missing", "seal-missing"),
    "drop the newest seal everywhere": (drop_the_newest_seal, UNDETECTABLE, UNDETECTABLE),
    "rewrite all with another key": (rewrite_with_another_key, "seal-key-unknown", "seal-key-unknown"),
    "rewrite all with the stolen key": (rewrite_with_the_stolen_key, UNDETECTABLE, UNDETECTABLE),
    "swap two pictures": (swap_two_pictures, "object-altered", UNDETECTABLE),
    "edit a picture's pixels": (edit_pixels, "object-altered", UNDETECTABLE),
    "strip a picture's metadata": (strip_metadata, "object-altered", UNDETECTABLE),
    "strip metadata and add other": (strip_and_add_metadata, "object-altered", UNDETECTABLE),
}
"""By name: the attack, and the faults that it causes in database and storage, and in an export alone."""


def test_nothing_is_found_where_nothing_was_done(log: Log) -> None:
    assert (log.kinds(), log.kinds_of_export()) == (NOTHING, NOTHING)


@pytest.mark.parametrize("name", MATRIX)
def test_tampering_is_found_by_its_name_or_known_to_be_undetectable(log: Log, name: str) -> None:
    change, kind, kind_of_export = MATRIX[name]
    change(log)
    for expected, found in ((kind, log.kinds()), (kind_of_export, log.kinds_of_export())):
        assert found == NOTHING if expected == UNDETECTABLE else expected in found, found


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (swap_two_pictures, "it holds the bytes of "),
        (edit_pixels, "its pixels differ from the recorded ones"),
        (strip_metadata, "its metadata was changed; its pixels are the recorded ones"),
        (strip_and_add_metadata, "its metadata was changed; its pixels are the recorded ones"),
    ],
)
def test_what_was_done_to_a_picture_is_told(log: Log, change: Callable[[Log], None], detail: str) -> None:
    change(log)
    told = [fault.detail for fault in verify(log.database, log.store, log.key).faults]
    assert told
    assert all(each.startswith(detail) for each in told)


def test_the_documentation_lists_the_same_matrix() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line[:2] == "| "]
    told = {row[0]: tuple(re.sub(r"[`*]|:.*", "", cell).strip() for cell in row[1:3]) for row in rows[1:]}
    assert told == {name: (kind, of_export) for name, (_, kind, of_export) in MATRIX.items()}


# Object Lock makes attacks detectable that are undetectable in a directory.


def test_in_a_locked_bucket_a_seal_written_over_with_the_stolen_key_is_found(
    locked: Log, locked_bucket: Bucket
) -> None:
    assert locked.kinds() == NOTHING
    rewrite_all(locked, locked.key)
    elsewhere = LocalStore(locked.folder / "forged")
    seal(locked.database, elsewhere, locked.key)
    forged = elsewhere.get(seal_object_key(1))
    put = locked_bucket.client.put_object(Bucket=locked_bucket.name, Key=seal_object_key(1), Body=forged)
    with locked.database.write() as connection:
        connection.execute(update(audit_seal).values(version_id=put["VersionId"]))
    assert "seal-rewritten" in locked.kinds()


def test_in_a_locked_bucket_the_newest_seal_leaves_a_trace_when_it_is_deleted(
    locked: Log, locked_bucket: Bucket
) -> None:
    locked.forget_seals(2)
    locked_bucket.client.delete_object(Bucket=locked_bucket.name, Key=seal_object_key(2))
    assert locked.kinds() == {"seal-missing"}


def test_a_lock_that_was_taken_off_or_shortened_is_found(locked: Log, locked_bucket: Bucket) -> None:
    target: Any = {"Bucket": locked_bucket.name, "Key": seal_object_key(1), "BypassGovernanceRetention": True}
    longer = datetime.now(UTC) + timedelta(days=20)
    locked_bucket.client.put_object_retention(**target, Retention={"Mode": "GOVERNANCE", "RetainUntilDate": longer})
    assert locked.kinds() == NOTHING  # a longer lock is valid
    soon = datetime.now(UTC) + timedelta(days=1)
    locked_bucket.client.put_object_retention(**target, Retention={"Mode": "GOVERNANCE", "RetainUntilDate": soon})
    assert locked.kinds() == {"seal-unlocked"}
    locked_bucket.client.put_object_retention(**target, Retention={})
    assert locked.kinds() == {"seal-unlocked"}


# Proofs.


def proof_of(log: Log, job_id: int) -> Json:
    with log.database.read() as connection:
        document = prove(connection, success_of_job(connection, job_id, team="default"))
    assert document is not None
    return document


def test_a_proof_holds_by_itself_and_for_its_picture_alone(log: Log) -> None:
    document = json.loads(json.dumps(proof_of(log, 1)))
    with log.database.read() as connection:
        sha256 = success_of_job(connection, 1, team="default").event["image"]["sha256"]
    own = next(path.read_bytes() for path in log.pictures() if path.stem == sha256)
    other = next(path.read_bytes() for path in log.pictures() if path.stem != sha256)
    assert verify_proof(document, trusted=log.key.public, picture=own).faults == []
    kinds = [fault.kind for fault in verify_proof(document, trusted=log.key.public, picture=other).faults]
    assert kinds == ["object-altered"]
    unknown = verify_proof(document, trusted=("0" * 64,)).faults
    assert [fault.kind for fault in unknown] == ["seal-key-unknown"]


def test_every_part_of_a_proof_counts(log: Log) -> None:
    document = proof_of(log, 2)
    assert len(document["path"]) > 0
    forged = {
        "event": document["event"].replace("worker-1", "worker-2"),
        "index": document["index"] + 1,
        "path": document["path"][:-1],
        "seal": document["seal"] | {"body": document["seal"]["body"].replace('"events":', '"events":1')},
    }
    for name, value in forged.items():
        assert verify_proof(document | {name: value}, trusted=log.key.public).faults != [], name


@pytest.mark.parametrize("body", ["[" * 200_000, '{"number": Infinity, "events": 1, "merkle_root": "00"}'])
def test_a_proof_that_cannot_be_read_is_none(log: Log, body: str) -> None:
    document = proof_of(log, 2)
    with pytest.raises(BadInputError, match="this is not a sdpipeline/audit-proof/1"):
        verify_proof(document | {"seal": document["seal"] | {"body": body}})


def test_a_picture_whose_event_is_not_sealed_yet_has_no_proof(log: Log) -> None:
    with log.database.read() as connection:
        assert prove(connection, success_of_job(connection, 3, team="default")) is None


# Exports.


def test_an_export_that_was_cut_or_changed_anywhere_is_found(log: Log) -> None:
    lines = log.exported().splitlines(keepends=True)
    for n in range(1, len(lines)):
        before, line, after = lines[:n], lines[n], lines[n + 1 :]
        for changed in (before, before + after, [*before, line.replace(b"1", b"2"), *after], [*lines, line]):
            assert changed == lines or verify_export(changed, trusted=log.key.public).faults, (n, line)
    assert verify_export(lines, trusted=log.key.public).faults == []


def reworded(line: bytes, part: str, **values: object) -> bytes:
    """A line of a seal, or the end line, with a changed body."""
    given = json.loads(line)
    body = json.loads(given[part]["body"]) | values
    given[part]["body"] = json.dumps(body)
    return json.dumps(given, separators=(",", ":")).encode() + b"\n"


@pytest.mark.parametrize("number", ["1", 1.0, True, float("inf"), None])
def test_a_seal_whose_number_is_none_is_named(log: Log, number: object) -> None:
    lines = log.exported().splitlines(keepends=True)
    at = next(n for n, line in enumerate(lines) if line.startswith(SEAL))
    lines[at] = reworded(lines[at], "seal", number=number)
    assert "seal-invalid" in {fault.kind for fault in verify_export(lines, trusted=log.key.public).faults}


@pytest.mark.parametrize(("start", "kind"), [(b"", "event-altered"), (SEAL, "seal-invalid"), (END, "export-altered")])
def test_a_line_that_is_nested_too_deeply_is_named(log: Log, start: bytes, kind: str) -> None:
    lines = log.exported().splitlines(keepends=True)
    found = verify_export([*lines[:-1], start + b"[" * 200_000 + b"\n"], trusted=log.key.public)
    assert kind in {fault.kind for fault in found.faults}


def test_what_no_seal_covers_in_an_export_is_held_by_its_last_line(log: Log) -> None:
    lines = log.exported().splitlines(keepends=True)
    newest = lines[-2].replace(b"worker-1", b"worker-2")
    assert newest != lines[-2]
    found = verify_export([*lines[:-2], newest, lines[-1]], trusted=log.key.public)
    assert [fault.kind for fault in found.faults] == ["export-altered"]


def test_seals_of_a_retired_key_are_believed_until_the_next_key_has_signed(log: Log) -> None:
    new = load_key(log.folder / "new.pem", create=True, retired=log.key.public)
    rotated = replace(log, key=new)
    published(log.audit, chains(1), name="after")
    seal(log.database, log.store, new)
    assert (rotated.kinds(), rotated.kinds_of_export()) == (NOTHING, NOTHING)
    assert "seal-key-unknown" in log.kinds()  # the retired key does not know its successor
    published(log.audit, chains(1), name="later")
    seal(log.database, log.store, log.key)
    assert rotated.kinds() == {"seal-key-unknown"}
