"""Verification of events, chains and seals."""

from __future__ import annotations

import json
from collections.abc import Collection
from datetime import UTC, datetime, timedelta

from sdpipeline.audit.authority import Authors
from sdpipeline.audit.findings import UNREADABLE, Verification
from sdpipeline.audit.gaps import missing_seals
from sdpipeline.audit.keys import PublicKeys, SealKey, Succession
from sdpipeline.audit.replay import EventReplay
from sdpipeline.audit.seals import covers, digest, ranges, seal_object
from sdpipeline.db import audit as rows
from sdpipeline.db.audit import GENESIS
from sdpipeline.db.connection import Connection, Database
from sdpipeline.db.event_reader import read_event
from sdpipeline.domain import Json
from sdpipeline.errors import ObjectMissingError
from sdpipeline.storage import ObjectStore
from sdpipeline.storage.keys import seal_object_key


def verify_chains(connection: Connection, found: Verification) -> EventReplay:
    """Read every chain in order; return the replay of its events."""
    replay = EventReplay()
    authors = Authors(None if connection.dialect.name == "sqlite" else rows.writers(connection))
    writer, expected, head = "", 0, GENESIS
    for row in rows.events(connection):
        found.events += 1
        if row.writer_id != writer:
            writer, expected, head = row.writer_id, 0, GENESIS
        subject = f"event:{writer}/{row.seq}"
        if row.seq != expected:
            found.fault("event-missing", subject, f"expected number {expected} of this chain")
        if digest(row.body) != row.hash:
            found.fault("event-altered", subject, "its bytes do not hash to its hash")
        try:
            body = read_event(row.body)
            if row.seq == expected and (body["prev"], body["writer"], body["seq"]) != (head, writer, row.seq):
                found.fault("chain-broken", subject, "it does not continue the event before it")
            if body["subject"] != row.subject:
                found.fault("event-altered", subject, "its subject column differs from its bytes")
            for detail in authors.faults(body):
                found.fault("event-forged", subject, detail)
            replay.apply(body)
        except UNREADABLE:
            found.fault("event-altered", subject, "it is not an event written by this program")
        expected, head = row.seq + 1, row.hash
    for subject in authors.foreign():
        found.fault("event-forged", subject, "the process that owns its chain did not write it")
    return replay


def verify_seals(
    connection: Connection, key: SealKey | PublicKeys, found: Verification, lost: Collection[range]
) -> list[Json]:
    """Check every seal against the key and the events it covers; return the seal rows.

    ``lost`` holds the numbers of the seals over events that a gap names as missing.
    """
    sealed = rows.seals(connection)
    previous, covered, keys = GENESIS, dict[str, int](), Succession(found.signers)
    for position, row in enumerate(sealed, 1):
        found.seals += 1
        subject = f"seal:{row['number']}"
        if digest(row["body"]) != row["hash"]:
            found.fault("seal-invalid", subject, "its bytes do not hash to its hash")
        if wrong := keys.fault(row["body"], row["signature"], key.public):
            # Its content cannot be trusted, so nothing is compared with it.
            found.fault(wrong[0], subject, wrong[1])
            continue
        body = json.loads(row["body"])
        if row["number"] != position or body["number"] != position or body["prev"] != previous:
            found.fault("seal-missing", subject, "it does not continue the seal before it")
        previous = row["hash"]
        if not row["ranges"] and any(row["number"] in each for each in lost):
            continue
        if sorted(ranges(body)) != sorted(row["ranges"]):
            found.fault("seal-invalid", subject, "its ranges in the database differ from the signed ones")
        for writer, first, last in ranges(body):
            if first != covered.get(writer, -1) + 1:
                found.fault("seal-invalid", subject, f"it does not continue the chain of {writer}")
            covered[writer] = last
        if not covers(connection, body):
            found.fault("sealed-events-altered", subject, "the events it covers differ from those that were sealed")
    found.unsealed = sum(last - first + 1 for _, first, last in rows.unsealed_ranges(connection))
    return sealed


def verify_stored_seal(store: ObjectStore, found: Verification, row: Json) -> None:
    """Compare a seal with the copy in storage."""
    subject = f"seal:{row['number']}"
    try:
        stored = store.get(row["key"], version_id=row["version_id"])
    except ObjectMissingError:
        found.fault("seal-missing", subject, "it is not in storage")
        return
    if stored != seal_object(row["body"], row["signature"]):
        found.fault("seal-invalid", subject, "storage holds another seal under this number")
    if len(store.versions(row["key"])) != 1:
        found.fault("seal-rewritten", subject, "storage holds more than one version of it, or a delete marker")
    if wrong := _unlocked(store, row):
        found.fault("seal-unlocked", subject, wrong)


def _unlocked(store: ObjectStore, row: Json) -> str | None:
    """Explain why storage does not lock a seal for as long as the seal itself says, according to storage now."""
    try:
        sealed = json.loads(row["body"])
        until = datetime.fromtimestamp(sealed["sealed_at_ms"] / 1000, UTC) + timedelta(days=sealed["lock"]["days"])
    except (KeyError, TypeError, ValueError):
        return None
    held = store.head(row["key"])
    if until < datetime.now(UTC) or held is None:
        return None
    if held.retained_until is None:
        return f"it should be locked until {until:%Y-%m-%d}, but storage reports no lock (needs s3:GetObjectRetention)"
    # The lock is requested after the seal's timestamp was taken, with a resolution of one second.
    if held.retained_until < until - timedelta(minutes=1):
        return f"it should be locked until {until:%Y-%m-%d}, but storage says {held.retained_until:%Y-%m-%d}"
    return None


def verify_newest(database: Database, store: ObjectStore, found: Verification) -> None:
    """Find seals in storage that the database does not know."""
    with database.read() as connection:
        last = rows.last_seal(connection)
    following = seal_object_key(last["number"] + 1 if last else 1)
    if store.head(following) is None and store.versions(following):
        found.fault("seal-missing", following, "a newer seal was deleted from storage")
    for number in missing_seals(database, store):
        detail = "storage has sealed events that the database lacks; restored a backup? sdpipeline reconcile --adopt"
        found.fault("database-too-old", seal_object_key(number), detail)
        return
