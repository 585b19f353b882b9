"""Export of the audit log to one file, verifiable without this program's database, storage or settings.

The file is JSON Lines, in the order that verification needs. ``{"export": …}`` names the format and the keys. Each
``{"seal": {"body", "signature"}}`` is followed by the events that it covers, in the order of its Merkle tree. Unsealed
events follow the last seal. ``{"end": {"body", "signature"}}`` signs the counts. Any other line is an event: the exact
bytes that were hashed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import rfc8785

from sdpipeline import __version__
from sdpipeline.audit.keys import SealKey
from sdpipeline.audit.seals import size
from sdpipeline.db import audit as rows
from sdpipeline.db.audit import GENESIS
from sdpipeline.db.connection import Connection, Database
from sdpipeline.domain import Json

FORMAT = "sdpipeline/audit-export/1"
HEAD, SEAL, END = b'{"export":', b'{"seal":', b'{"end":'
_PAGE = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """Counts of a written export, and the public key that signed it."""

    events: int
    seals: int
    unsealed: int
    public_key: str

    def document(self) -> Json:
        """Return the document of ``audit export --json``."""
        return {name: getattr(self, name) for name in ("events", "seals", "unsealed", "public_key")}


def write(database: Database, key: SealKey, file: BinaryIO) -> Exported:
    """Write the whole log as of one moment, in constant memory."""
    written = _Written(file)
    written.line({"export": {"format": FORMAT, "keys": list(key.public), "version": __version__}})
    with database.snapshot() as connection:
        for row in _seals(connection):
            written.line({"seal": {"body": row["body"], "signature": row["signature"]}})
            written.seals += 1
            written.last_seal = row["hash"]
            written.put_events(rows.bodies(connection, _in_signed_order(row)))
        still_open = rows.unsealed_ranges(connection)
        written.put_events(rows.bodies(connection, still_open))
    body = rfc8785.dumps(written.end(key.public_hex)).decode()
    written.line({"end": {"body": body, "signature": key.sign(body)}})
    return Exported(events=written.events, seals=written.seals, unsealed=size(still_open), public_key=key.public_hex)


def _seals(connection: Connection) -> Iterator[Json]:
    number = 0
    while page := rows.seals_after(connection, number, limit=_PAGE):
        yield from page
        number = page[-1]["number"]


def _in_signed_order(row: Json) -> list[tuple[str, int, int]]:
    """Return a seal's ranges by writer, the order in which they were signed; none if its events were lost."""
    return sorted(row["ranges"])


class _Written:
    """The file so far, with the counts for its last line."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.events = 0
        self.seals = 0
        self.last_seal = GENESIS
        self._hash = hashlib.sha256()

    def line(self, document: Json) -> None:
        self.put(rfc8785.dumps(document))

    def put_events(self, bodies: Iterator[bytes]) -> None:
        for body in bodies:
            self.put(body)
            self.events += 1

    def put(self, data: bytes) -> None:
        self._hash.update(data)
        self._hash.update(b"\n")
        self.file.write(data)
        self.file.write(b"\n")

    def end(self, public_key: str) -> Json:
        counts = {"events": self.events, "seals": self.seals, "last_seal": self.last_seal}
        stamp = {"exported_at_ms": time.time_ns() // 1_000_000, "sha256": self._hash.hexdigest()}
        return {"v": 1, "public_key": public_key} | counts | stamp
