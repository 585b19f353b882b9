"""Seals: signed Merkle roots over new audit events, in storage and in the database."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable

import rfc8785
import structlog

from sdpipeline.audit.keys import SealKey
from sdpipeline.db import audit as rows
from sdpipeline.db.audit import GENESIS
from sdpipeline.db.connection import Connection, Database
from sdpipeline.domain import Json
from sdpipeline.errors import AuditBrokenError, ObjectConflictError, SealOverdueError, TransientError
from sdpipeline.merkle import root
from sdpipeline.storage import ObjectStore
from sdpipeline.storage.keys import seal_object_key

Ranges = list[tuple[str, int, int]]
"""(writer, first, last sequence number)."""

MAX_EVENTS = 100_000
"""Limit of events per seal: a proof reads as many events."""
EVERY_S = 60.0
_LOOK_S = 1.0

_log = structlog.get_logger(__name__)


def seal(database: Database, store: ObjectStore, key: SealKey) -> int:
    """Sign Merkle roots over all unsealed events; return the number of events.

    A seal goes to storage first: a seal that only the database has proves nothing.
    """
    sealed = 0
    while True:
        count = _seal_next(database, store, key)
        sealed += count
        if count < MAX_EVENTS:
            return sealed


def watch(
    database: Database,
    store: ObjectStore,
    key: SealKey,
    stop: threading.Event,
    *,
    every_s: float = EVERY_S,
    events: int = MAX_EVENTS,
    on_seal: Callable[[int], None] | None = None,
) -> None:
    """Seal new events every ``every_s`` seconds, sooner after ``events`` events, and once more on ``stop``.

    An outage of database or storage is logged; the next round seals what is open.
    """
    begun = time.monotonic()
    while True:
        stopped = stop.wait(min(_LOOK_S, every_s))
        try:
            due = stopped or time.monotonic() - begun >= every_s or unsealed(database) >= events
            if due:
                begun = time.monotonic()
                count = seal(database, store, key)
                if count and on_seal is not None:
                    on_seal(count)
        except TransientError as error:
            _log.warning("seal_failed", error=str(error))
        if stopped:
            return


def wait_for_seal(database: Database, *, timeout_s: float) -> int:
    """Wait until another process has sealed the events that are open now; return their number.

    Raises SealOverdueError if they are not sealed within ``timeout_s``.
    """
    with database.read() as connection:
        asked = rows.unsealed_ranges(connection)
    last = {writer: end for writer, _, end in asked}
    deadline = time.monotonic() + timeout_s
    while True:
        with database.read() as connection:
            left = [writer for writer, first, _ in rows.unsealed_ranges(connection) if first <= last.get(writer, -1)]
        if not left:
            return size(asked)
        if time.monotonic() >= deadline:
            raise SealOverdueError(f"no seal for {timeout_s:g} s: is `sdpipeline audit seal --watch` running?")
        time.sleep(min(_LOOK_S, timeout_s))


def unsealed(database: Database) -> int:
    """Count the events that no seal covers yet."""
    with database.read() as connection:
        return size(rows.unsealed_ranges(connection))


def _seal_next(database: Database, store: ObjectStore, key: SealKey) -> int:
    with database.read() as connection:
        open_ranges = _first(rows.unsealed_ranges(connection), MAX_EVENTS)
        if not open_ranges:
            return 0
        last = rows.last_seal(connection)
        merkle_root = root(rows.bodies(connection, open_ranges)).hex()
    number, kept = last["number"] + 1 if last else 1, store.retention
    body: Json = {
        "v": 1,
        "number": number,
        "prev": last["hash"] if last else GENESIS,
        "sealed_at_ms": time.time_ns() // 1_000_000,
        "events": size(open_ranges),
        "ranges": [list(each) for each in open_ranges],
        "merkle_root": merkle_root,
        "public_key": key.public_hex,
    }
    if kept is not None:
        body["lock"] = {"mode": kept.mode, "days": kept.days}
    return _publish(database, store, number, rfc8785.dumps(body).decode(), key)


def _first(found: Ranges, most: int) -> Ranges:
    """Return the first ``most`` events of these ranges."""
    taken: Ranges = []
    for writer, first, last in found:
        if most <= 0:
            break
        end = min(last, first + most - 1)
        taken.append((writer, first, end))
        most -= end - first + 1
    return taken


def size(found: Ranges) -> int:
    """Count the events in these ranges."""
    return sum(last - first + 1 for _, first, last in found)


def _publish(database: Database, store: ObjectStore, number: int, body: str, key: SealKey) -> int:
    name, signature = seal_object_key(number), key.sign(body)
    try:
        stored = store.put(name, seal_object(body, signature), content_type="application/json", retained=True)
    except ObjectConflictError:
        # A sealer died between storage and database: its seal is valid if this database has the sealed events.
        body, signature = read_seal(store.get(name))
        with database.read() as connection:
            if not (key.signed(body, signature) and covers(connection, json.loads(body))):
                raise older_than(name) from None
        stored = store.put(name, seal_object(body, signature), content_type="application/json", retained=True)
    row = {"number": number, "body": body, "signature": signature, "hash": digest(body), "key": name}
    sealed = ranges(json.loads(body))
    with database.write() as connection:
        first_to_seal = rows.insert_seal(connection, row | {"version_id": stored.version_id}, sealed)
    return size(sealed) if first_to_seal else 0


def ranges(body: Json) -> Ranges:
    """Return (writer, first, last sequence number) of a seal's events, in the order of its leaves."""
    return [(writer, first, last) for writer, first, last in body["ranges"]]


def covers(connection: Connection, body: Json) -> bool:
    """Return True if the database's events are those that were sealed."""
    return root(rows.bodies(connection, ranges(body))).hex() == str(body["merkle_root"])


def seal_object(body: str, signature: str) -> bytes:
    """Return a seal as storage holds it."""
    return rfc8785.dumps({"body": body, "signature": signature})


def read_seal(data: bytes) -> tuple[str, str]:
    """Return body and signature of a stored seal; raises KeyError, TypeError or ValueError if it is not a seal."""
    found = json.loads(data)
    return str(found["body"]), str(found["signature"])


def digest(text: str) -> str:
    """Return the SHA-256 that chains events and seals."""
    return hashlib.sha256(text.encode()).hexdigest()


def older_than(seal: str) -> AuditBrokenError:
    """Return the error for a database that is older than a seal in storage."""
    return AuditBrokenError(
        f"the database is older than {seal} in storage: it is a restored backup, or the storage is not its own"
    )
