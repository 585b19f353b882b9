"""Gaps in the audit log of a restored database, and the event that bridges them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from sdpipeline.audit.keys import SealKey
from sdpipeline.audit.seals import covers, digest, older_than, ranges, read_seal, seal_object
from sdpipeline.db import audit as rows
from sdpipeline.db.audit import GENESIS, Event, Transaction
from sdpipeline.db.connection import Database
from sdpipeline.domain import Json
from sdpipeline.errors import AuditBrokenError
from sdpipeline.storage import ObjectStore
from sdpipeline.storage.keys import seal_object_key


def refuse_restored(database: Database, store: ObjectStore) -> None:
    """Raise AuditBrokenError if the database lacks sealed events that storage has.

    Such a database was restored from a backup, so its work would be done twice.
    """
    for number in missing_seals(database, store):
        raise older_than(seal_object_key(number))


def missing_seals(database: Database, store: ObjectStore) -> Iterator[int]:
    """Yield the numbers of the seals in storage whose events the database lacks.

    A seal that only storage has may be on its way into the database. Its events are in the database then.
    """
    with database.read() as connection:
        last = rows.last_seal(connection)
    for number in count(last["number"] + 1 if last else 1):
        if store.head(seal_object_key(number)) is None:
            return
        try:
            body, _ = read_seal(store.get(seal_object_key(number)))
            with database.read() as connection:
                known = covers(connection, json.loads(body))
        except (KeyError, TypeError, ValueError):
            known = False
        if not known:
            yield number


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Sealed events that a restored database lacks, covered by seals ``first_seal`` to ``last_seal``.

    ``missing`` are (writer, first, last sequence number), ``events`` their number.
    """

    first_seal: int
    last_seal: int
    events: int
    missing: tuple[tuple[str, int, int], ...]

    def document(self) -> Json:
        """Return the fields as an event and ``audit verify --json`` show them."""
        missing = [list(each) for each in self.missing]
        return {"first_seal": self.first_seal, "last_seal": self.last_seal, "events": self.events, "missing": missing}


def find_gap(database: Database, store: ObjectStore) -> Gap | None:
    """Find the first and last seal over events that the database lacks; None if it lacks none.

    Raises AuditBrokenError if one of these seals cannot be read.
    """
    lost = list(missing_seals(database, store))
    if not lost:
        return None
    newest: dict[str, int] = {}
    for number in lost:
        for writer, _, last in ranges(_lost_seal(store, number)[2]):
            newest[writer] = max(last, newest.get(writer, -1))
    with database.read() as connection:
        here = rows.newest_sequences(connection, newest)
    missing = tuple(
        (writer, here.get(writer, -1) + 1, last)
        for writer, last in sorted(newest.items())
        if last > here.get(writer, -1)
    )
    events = sum(last - first + 1 for _, first, last in missing)
    return Gap(first_seal=lost[0], last_seal=lost[-1], events=events, missing=missing)


def _lost_seal(store: ObjectStore, number: int) -> tuple[str, str, Json]:
    try:
        body, signature = read_seal(store.get(seal_object_key(number)))
        seal: Json = json.loads(body)
        ranges(seal)
    except (KeyError, TypeError, ValueError) as error:
        raise AuditBrokenError(f"{seal_object_key(number)} in storage is not a seal") from error
    return body, signature, seal


def lost_seals(
    database: Database, store: ObjectStore, key: SealKey, gap: Gap
) -> list[tuple[Json, list[tuple[str, int, int]]]]:
    """Return the rows of the seals that only storage has, each with the ranges whose events are in the database.

    Raises AuditBrokenError unless they continue this database's own seals under the same key.
    """
    with database.read() as connection:
        last = rows.last_seal(connection)
    previous, found = last["hash"] if last else GENESIS, []
    for number in range(last["number"] + 1 if last else 1, gap.last_seal + 1):
        body, signature, seal = _lost_seal(store, number)
        if not key.signed(body, signature) or (seal["number"], seal["prev"]) != (number, previous):
            raise AuditBrokenError(f"{seal_object_key(number)} in storage does not continue this database's seals")
        previous = digest(body)
        data = seal_object(body, signature)
        stored = store.put(seal_object_key(number), data, content_type="application/json", retained=True)
        row = {"number": number, "body": body, "signature": signature, "hash": previous, "key": seal_object_key(number)}
        found.append((row | {"version_id": stored.version_id}, ranges(seal) if number < gap.first_seal else []))
    return found


def bridge(tx: Transaction, seals: Sequence[tuple[Json, list[tuple[str, int, int]]]], gap: Gap) -> None:
    """Continue after a gap: insert the lost seals and record an event that names the missing events.

    The lost seals stay in the chain of seals and cover no event of the database. Events that they covered and that are
    still here belong to the next seal.
    """
    for row, covered in seals:
        rows.insert_seal(tx.connection, row, covered)
    tx.record(Event.AUDIT_GAP, "audit", last_hash=seals[-1][0]["hash"], **gap.document())
