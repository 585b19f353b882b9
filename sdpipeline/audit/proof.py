"""Inclusion proof of one picture in the sealed audit log, verifiable on its own.

The proof is a JSON document with the event's exact bytes and the signed seal. It also holds the event's place among the
leaves of the seal's Merkle tree, with the sibling hashes up to the root (RFC 6962).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdpipeline import provenance
from sdpipeline.audit.findings import UNREADABLE, Verification
from sdpipeline.audit.keys import Succession
from sdpipeline.audit.seals import ranges
from sdpipeline.db import audit as rows
from sdpipeline.db import audit_queries
from sdpipeline.db.audit import Event
from sdpipeline.db.connection import Connection
from sdpipeline.db.event_reader import readable
from sdpipeline.domain import Json
from sdpipeline.errors import BadInputError, InputImageError, Mistake
from sdpipeline.merkle import inclusion_proof, verify_inclusion

FORMAT = "sdpipeline/audit-proof/1"
LARGEST_PICTURE = 1_000_000_000
"""Limit in pixels: this program's own pictures are not held to the limit for untrusted input."""

_SUCCESSES = (Event.JOB_SUCCEEDED, Event.JOB_ADOPTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Success:
    """The success event of a picture, in its chain."""

    writer_id: str
    seq: int
    body: str
    event: Json


def success_of_job(connection: Connection, job_id: int, *, team: str) -> Success:
    """Return the newest picture of one of the team's jobs; raises BadInputError if it has none."""
    found = _successes(rows.about(connection, f"job:{job_id}"), team)
    if not found:
        raise BadInputError(Mistake(message=f"the audit log has no picture of job {job_id}"))
    return max(found, key=lambda each: int(each.event["at_us"]))


def success_of_picture(connection: Connection, sha256: str, *, team: str) -> Success:
    """Return the team's oldest success with a picture of these bytes, because copies come later.

    Raises BadInputError if it has none.
    """
    rows_of_jobs = [
        row for job_id in audit_queries.jobs_with(connection, sha256) for row in rows.about(connection, f"job:{job_id}")
    ]
    # A picture of an archived edition has no row any more, so search the events.
    found = _successes(rows_of_jobs, team) or _successes(rows.holding(connection, sha256), team)
    own = [each for each in found if each.event["image"]["sha256"] == sha256]
    if not own:
        fix = "a picture whose metadata was changed has other bytes: give the job's id"
        raise BadInputError(Mistake(message=f"the audit log has no picture with SHA-256 {sha256}", fix=fix))
    return min(own, key=lambda each: int(each.event["at_us"]))


def _successes(events: Sequence[Any], team: str) -> list[Success]:
    found = []
    for row, event in readable(events):
        # A picture's key begins with its team; nothing else names the team of an archived job.
        if event["event"] in _SUCCESSES and event["image"]["key"].startswith(f"{team}/"):
            found.append(Success(writer_id=row.writer_id, seq=row.seq, body=row.body, event=event))
    return found


def prove(connection: Connection, success: Success) -> Json | None:
    """Return the proof; None if no seal covers the event yet.

    Raises BadInputError if the proof does not verify, because the sealed events were changed.
    """
    row = rows.seal_over(connection, success.writer_id, success.seq)
    if row is None:
        return None
    covered, index = ranges(json.loads(row["body"])), 0
    for writer, first, last in covered:
        if writer == success.writer_id and first <= success.seq <= last:
            index += success.seq - first
            break
        index += last - first + 1
    path = inclusion_proof(rows.bodies(connection, covered), index)
    document = {
        "format": FORMAT,
        "event": success.body,
        "index": index,
        "path": [node.hex() for node in path],
        "seal": {"body": row["body"], "signature": row["signature"]},
    }
    if found := verify_proof(document).faults:
        fix = "run sdpipeline audit verify to see the difference"
        raise BadInputError(Mistake(message=f"it cannot be proven: {found[0].detail}", fix=fix))
    return document


def verify_proof(
    document: Json, *, trusted: tuple[str, ...] | None = None, picture: bytes | None = None
) -> Verification:
    """Check a proof, and a picture against it if given.

    ``trusted`` is as for an export. Raises BadInputError if the document is not a proof.
    """
    proof, found = _parsed(document), Verification(events=1, seals=1)
    if wrong := Succession(found.signers).fault(proof.seal, proof.signature, trusted):
        found.fault(wrong[0], f"seal:{proof.number}", wrong[1])
    if not verify_inclusion(proof.event, index=proof.index, size=proof.size, proof=proof.path, root=proof.root):
        found.fault("sealed-events-altered", proof.subject, "the event is not one of the sealed events")
    if picture is not None:
        found.images = 1
        if detail := altered(picture, **proof.recorded):
            found.fault("object-altered", proof.subject, detail)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Proof:
    event: bytes
    subject: str
    recorded: Mapping[str, str]
    index: int
    path: list[bytes]
    seal: str
    signature: str
    number: int
    size: int
    root: bytes


def _parsed(document: Json) -> _Proof:
    refusal = BadInputError(f"this is not a {FORMAT} file (write one with sdpipeline audit prove)")
    if document.get("format") != FORMAT:
        raise refusal
    try:
        body, event = str(document["seal"]["body"]), str(document["event"])
        seal, recorded = json.loads(body), json.loads(event)
        return _Proof(
            event=event.encode(),
            subject=str(recorded["subject"]),
            recorded={name: str(recorded["image"][name]) for name in ("sha256", "pixels_sha256")},
            index=int(document["index"]),
            path=[bytes.fromhex(node) for node in document["path"]],
            seal=body,
            signature=str(document["seal"]["signature"]),
            number=int(seal["number"]),
            size=int(seal["events"]),
            root=bytes.fromhex(seal["merkle_root"]),
        )
    except UNREADABLE as error:
        raise refusal from error


def altered(data: bytes, *, sha256: str, pixels_sha256: str | None) -> str | None:
    """Describe how a picture's bytes differ from the recorded ones; None if they do not."""
    if hashlib.sha256(data).hexdigest() == sha256:
        return None
    try:
        pixels = provenance.pixels_sha256(provenance.decode(data, max_pixels=LARGEST_PICTURE))
    except InputImageError:
        return "its bytes do not hash to the recorded SHA-256, and are not a picture any more"
    if pixels == pixels_sha256:
        return "its metadata was changed; its pixels are the recorded ones"
    return "its pixels differ from the recorded ones"
