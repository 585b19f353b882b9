"""Signed Merkle roots over what the audit log gained, in storage and in the database."""

from __future__ import annotations

import hashlib
import json
import time

import rfc8785

from sdpipeline.audit.keys import SealKey
from sdpipeline.db import audit as rows
from sdpipeline.db.audit import GENESIS
from sdpipeline.db.connection import Connection, Database
from sdpipeline.domain import Json
from sdpipeline.errors import AuditBrokenError, ObjectConflictError
from sdpipeline.merkle import root
from sdpipeline.storage import ObjectStore


def seal(database: Database, store: ObjectStore, key: SealKey) -> int:
    """Sign a Merkle root over all events no seal covers yet; returns how many there were.

    The seal goes to storage first: a seal that only the database knows proves nothing.
    """
    with database.read() as connection:
        open_ranges = rows.unsealed_ranges(connection)
        last = rows.last_seal(connection)
        merkle_root = root(rows.bodies(connection, open_ranges)).hex()
    events = sum(last_seq - first + 1 for _, first, last_seq in open_ranges)
    if not events:
        return 0
    number = last["number"] + 1 if last else 1
    body = rfc8785.dumps(
        {
            "v": 1,
            "number": number,
            "prev": last["hash"] if last else GENESIS,
            "sealed_at_ms": time.time_ns() // 1_000_000,
            "events": events,
            "ranges": [list(each) for each in open_ranges],
            "merkle_root": merkle_root,
            "public_key": key.public_hex,
        }
    ).decode()
    return _publish(database, store, number, body, key)


def _publish(database: Database, store: ObjectStore, number: int, body: str, key: SealKey) -> int:
    name, signature = seal_name(number), key.private.sign(body.encode()).hex()
    try:
        stored = store.put(name, seal_object(body, signature), content_type="application/json", retained=True)
    except ObjectConflictError:
        # A sealer died between storage and database: what it signed stands, if this database has what it sealed.
        body, signature = read_seal(store.get(name))
        with database.read() as connection:
            if not (key.signed(body, signature) and covers(connection, json.loads(body))):
                raise older_than(name) from None
        stored = store.put(name, seal_object(body, signature), content_type="application/json", retained=True)
    row = {"number": number, "body": body, "signature": signature, "hash": digest(body), "key": name}
    sealed = ranges(json.loads(body))
    with database.write() as connection:
        first_to_seal = rows.insert_seal(connection, row | {"version_id": stored.version_id}, sealed)
    return sum(last - first + 1 for _, first, last in sealed) if first_to_seal else 0


def ranges(body: Json) -> list[tuple[str, int, int]]:
    """(writer, first, last sequence number) of what a seal covers, in the order of its leaves."""
    return [(writer, first, last) for writer, first, last in body["ranges"]]


def covers(connection: Connection, body: Json) -> bool:
    """Whether the database's events are those that were sealed."""
    return root(rows.bodies(connection, ranges(body))).hex() == str(body["merkle_root"])


def seal_name(number: int) -> str:
    """Where seal number ``number`` lies in storage."""
    return f"audit/seals/{number:08d}.json"


def seal_object(body: str, signature: str) -> bytes:
    """A seal as storage holds it."""
    return rfc8785.dumps({"body": body, "signature": signature})


def read_seal(data: bytes) -> tuple[str, str]:
    """Body and signature of a stored seal; raises KeyError, TypeError or ValueError for what is none."""
    found = json.loads(data)
    return str(found["body"]), str(found["signature"])


def digest(text: str) -> str:
    """The SHA-256 that chains events and seals."""
    return hashlib.sha256(text.encode()).hexdigest()


def older_than(seal: str) -> AuditBrokenError:
    """The error for a database that a seal in storage is ahead of."""
    return AuditBrokenError(
        f"the database is older than {seal} in storage: a restored backup, or another database's storage?"
    )
