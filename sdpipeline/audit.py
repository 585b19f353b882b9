"""Seals over the audit log, and the check of database, storage and seals against each other."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import rfc8785
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from filelock import FileLock

from sdpipeline import archive
from sdpipeline.db import archives, evidence
from sdpipeline.db import audit as rows
from sdpipeline.db.audit import GENESIS, Event, Transaction
from sdpipeline.db.connection import Connection, Database
from sdpipeline.db.forgetting import ERASED, committed
from sdpipeline.domain import Json, fingerprint, job_identity, request_from_document
from sdpipeline.errors import AuditBrokenError, Mistake, ObjectConflictError, ObjectMissingError, SettingsError
from sdpipeline.merkle import root
from sdpipeline.storage import ObjectStore


@dataclass(frozen=True, slots=True)
class SealKey:
    """The Ed25519 key that signs seals."""

    private: Ed25519PrivateKey

    @property
    def public_hex(self) -> str:
        """The raw public key, hexadecimal."""
        encoding, form = serialization.Encoding.Raw, serialization.PublicFormat.Raw
        return self.private.public_key().public_bytes(encoding, form).hex()

    def signed(self, body: str, signature: str) -> bool:
        """Whether this key made the signature."""
        try:
            self.private.public_key().verify(bytes.fromhex(signature), body.encode())
        except (InvalidSignature, ValueError):
            return False
        return True


def load_key(path: Path, *, create: bool) -> SealKey:
    """Read a PEM file; ``create`` makes a development key where there is none."""
    if not path.is_file():
        if not create:
            fix = "write an Ed25519 key there: openssl genpkey -algorithm ed25519"
            raise SettingsError(Mistake(key="SDP_SIGNING__SEAL_KEY_FILE", message=f"no key at {path}", fix=fix))
        _create_key(path)
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm, OSError) as error:
        fix = "openssl genpkey -algorithm ed25519, without a pass phrase"
        message = f"{path} cannot be used: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        raise SettingsError(Mistake(key="SDP_SIGNING__SEAL_KEY_FILE", message=message, fix=fix)) from error
    if not isinstance(key, Ed25519PrivateKey):
        message = f"{path} is no Ed25519 key"
        fix = "openssl genpkey -algorithm ed25519"
        raise SettingsError(Mistake(key="SDP_SIGNING__SEAL_KEY_FILE", message=message, fix=fix))
    return SealKey(key)


def _create_key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.is_file():
            return
        pem = Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        # Under another name first: whoever looks for the key finds all of it or nothing.
        unfinished = path.with_suffix(".new")
        unfinished.touch(mode=0o600)
        unfinished.write_bytes(pem)
        unfinished.replace(path)


def seal(database: Database, store: ObjectStore, key: SealKey) -> int:
    """Sign a Merkle root over all events no seal covers yet; returns how many there were.

    The seal goes to storage first: a seal that only the database knows proves nothing.
    """
    with database.read() as connection:
        ranges = rows.unsealed_ranges(connection)
        last = rows.last_seal(connection)
        merkle_root = root(rows.bodies(connection, ranges)).hex()
    events = sum(last_seq - first + 1 for _, first, last_seq in ranges)
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
            "ranges": [list(each) for each in ranges],
            "merkle_root": merkle_root,
            "public_key": key.public_hex,
        }
    ).decode()
    return _publish(database, store, number, body, key)


def _publish(database: Database, store: ObjectStore, number: int, body: str, key: SealKey) -> int:
    name, signature = seal_name(number), key.private.sign(body.encode()).hex()
    try:
        stored = store.put(name, _seal_object(body, signature), content_type="application/json", retained=True)
    except ObjectConflictError:
        # A sealer died between storage and database: what it signed stands, if this database has what it sealed.
        body, signature = _read_seal(store.get(name))
        with database.read() as connection:
            if not (key.signed(body, signature) and _covers(connection, json.loads(body))):
                raise _older_than(name) from None
        stored = store.put(name, _seal_object(body, signature), content_type="application/json", retained=True)
    row = {"number": number, "body": body, "signature": signature, "hash": _sha256(body), "key": name}
    ranges = _ranges(json.loads(body))
    with database.write() as connection:
        first_to_seal = rows.insert_seal(connection, row | {"version_id": stored.version_id}, ranges)
    return sum(last - first + 1 for _, first, last in ranges) if first_to_seal else 0


def _ranges(body: Json) -> list[tuple[str, int, int]]:
    return [(writer, first, last) for writer, first, last in body["ranges"]]


def _covers(connection: Connection, body: Json) -> bool:
    """Whether the database's events are those that were sealed."""
    return root(rows.bodies(connection, _ranges(body))).hex() == str(body["merkle_root"])


def seal_name(number: int) -> str:
    """Where seal number ``number`` lies in storage."""
    return f"audit/seals/{number:08d}.json"


def _seal_object(body: str, signature: str) -> bytes:
    return rfc8785.dumps({"body": body, "signature": signature})


def _read_seal(data: bytes) -> tuple[str, str]:
    found = json.loads(data)
    return str(found["body"]), str(found["signature"])


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that does not agree: what kind, of what, and how."""

    kind: str
    subject: str
    detail: str


@dataclass(slots=True)
class Verification:
    """What was checked and what was found. ``skipped`` counts pictures that ``sample`` left out, ``deleted`` and
    ``erased`` the tombstones: pictures that are gone, and jobs whose requests are.

    ``gaps`` are events that a restored backup lost and ``reconcile --adopt`` told of: named for ever, no fault.
    """

    events: int = 0
    seals: int = 0
    images: int = 0
    skipped: int = 0
    unsealed: int = 0
    deleted: int = 0
    erased: int = 0
    faults: list[Fault] = field(default_factory=list)
    gaps: list[Json] = field(default_factory=list)

    def fault(self, kind: str, subject: str, detail: str) -> None:
        """Note a fault."""
        self.faults.append(Fault(kind=kind, subject=subject, detail=detail))

    def document(self) -> Json:
        """The form of ``audit verify --json``."""
        faults = [{"kind": f.kind, "subject": f.subject, "detail": f.detail} for f in self.faults]
        names = ("events", "seals", "images", "skipped", "unsealed", "deleted", "erased")
        counts = {name: getattr(self, name) for name in names}
        return {"ok": not self.faults} | counts | {"gaps": self.gaps, "faults": faults}


def verify(
    database: Database,
    store: ObjectStore,
    key: SealKey,
    *,
    sample: int | None = None,
) -> Verification:
    """Check every chain, seal, job row and picture; ``sample`` limits the pictures whose bytes are read.

    Workers may go on meanwhile: rows are compared as they stood at one moment, storage afterwards.
    """
    found = Verification()
    with database.snapshot() as connection:
        told = _verify_chains(connection, found)
        found.gaps = told.gaps
        sealed = _verify_seals(connection, key, found, told.lost)
        _verify_jobs(connection, found, told)
        pictures, gone = _verify_images(connection, found, told, sample)
        archived = archives.archives(connection)
    for row in archived:
        of_archive = _verify_archive(store, found, told, row)
        found.skipped += len(of_archive) if sample is not None else 0
        found.images += len(of_archive) if sample is None else 0
        pictures += [each for both in of_archive for each in both] if sample is None else []
    for campaign_id, edition in set(told.archived) - {(row["campaign_id"], row["edition"]) for row in archived}:
        found.fault("archive-missing", f"campaign:{campaign_id}", f"the archive of edition {edition!r} has no row")
    for row in sealed:
        _verify_stored_seal(store, found, row)
    _verify_newest(database, store, found)
    for deleted in gone:
        if store.versions(deleted):
            found.fault("object-not-deleted", deleted, "the audit log says that it was deleted, and storage has it")
    for stored, sha256 in pictures:
        data = _verify_object(store, found, stored, sha256)
        if data is not None and stored.endswith(".json"):
            for control_map in json.loads(data).get("control_maps", ()):
                _verify_object(store, found, control_map["key"], control_map["sha256"])
    return found


_ALLOWED: Mapping[str | None, tuple[str, ...]] = {
    None: ("waiting", "ready"),
    Event.LEASE_TAKEN: ("leased",),
    # A submit or a retry holds again what a budget may not cover and nobody has leased.
    Event.LEASE_RELEASED: ("waiting", "ready"),
    Event.LEASE_EXPIRED: ("waiting", "ready"),
    Event.JOB_SUCCEEDED: ("succeeded",),
    Event.JOB_ADOPTED: ("succeeded",),
    Event.JOB_FAILED: ("failed", "blocked"),
    Event.JOB_DEFERRED: ("waiting", "ready"),
    Event.JOBS_SKIPPED: ("skipped",),
    Event.JOBS_CANCELLED: ("cancelled",),
    Event.JOBS_BLOCKED: ("blocked",),
    Event.JOBS_RETRIED: ("waiting", "ready", "succeeded"),
    Event.JOBS_CHANGED: ("waiting", "ready", "succeeded"),
    Event.JOBS_REOPENED: ("waiting", "ready", "succeeded"),
}
"""What a job's status may be after the last event that names it."""

_AFRESH = frozenset({Event.JOBS_RETRIED, Event.JOBS_CHANGED, Event.JOBS_REOPENED})
_LISTING = _AFRESH | {Event.JOBS_SKIPPED, Event.JOBS_CANCELLED, Event.JOBS_BLOCKED}


@dataclass(slots=True)
class _Told:
    """What the events say of each job, kept while the chains are read."""

    succeeded: dict[tuple[int, str], Json] = field(default_factory=dict)
    last: dict[int, tuple[int, str]] = field(default_factory=dict)
    attempts: dict[int, tuple[int, int]] = field(default_factory=dict)
    roots: dict[int, str] = field(default_factory=dict)
    gaps: list[Json] = field(default_factory=list)
    lost: set[int] = field(default_factory=set)
    """The numbers of the seals over events that a gap names as missing."""
    deleted: set[tuple[int, str]] = field(default_factory=set)
    erased: dict[int, tuple[int, str]] = field(default_factory=dict)
    changed: dict[int, int] = field(default_factory=dict)
    archived: dict[tuple[int, str], tuple[str, str]] = field(default_factory=dict)

    def hear(self, event: Json) -> None:
        """Take in one event; raises KeyError, TypeError or ValueError for one that we did not write."""
        kind, at, subject = event["event"], event["at_us"], event["subject"]
        if kind == Event.CAMPAIGN_SUBMITTED:
            self.roots[event["version_id"]] = event["jobs_root"]
        elif kind in (Event.LEASE_TAKEN, Event.LEASE_RELEASED, Event.LEASE_EXPIRED):
            for job_id, attempt in event["jobs"]:
                self._note(job_id, at, kind, attempt)
        elif kind in (Event.JOB_SUCCEEDED, Event.JOB_ADOPTED, Event.JOB_FAILED, Event.JOB_DEFERRED):
            job_id = int(subject.removeprefix("job:"))
            self._note(job_id, at, kind, event["attempt"])
            if kind in (Event.JOB_SUCCEEDED, Event.JOB_ADOPTED):
                self._succeeded(job_id, event)
        elif kind in _LISTING:
            for job_id in event["jobs"]:
                self._note(job_id, at, kind, 0 if kind in _AFRESH else None)
                if kind == Event.JOBS_CHANGED:
                    self.changed[job_id] = max(self.changed.get(job_id, at), at)
        elif kind == Event.AUDIT_GAP:
            names = ("first_seal", "last_seal", "events", "missing", "actor", "at_us")
            self.gaps.append({name: event[name] for name in names})
            self.lost.update(range(event["first_seal"], event["last_seal"] + 1))
        else:
            self._hear_of_forgetting(kind, event)

    def _hear_of_forgetting(self, kind: str, event: Json) -> None:
        if kind == Event.EDITION_ARCHIVED:
            archived = int(event["subject"].removeprefix("campaign:")), event["edition"]
            self.archived[archived] = (event["key"], event["sha256"])
        elif kind == Event.PICTURES_DELETED:
            self.deleted.update((job_id, fp) for job_id, fp, _ in event["pictures"])
        elif kind == Event.JOBS_ERASED:
            for job_id, committed in event["jobs"]:
                told = event["at_us"], committed
                self.erased[job_id] = max(self.erased.get(job_id, told), told)

    def _succeeded(self, job_id: int, event: Json) -> None:
        """A picture that was lost is made again: the newest one counts."""
        known = self.succeeded.get((job_id, event["fingerprint"]), event)
        if known["at_us"] <= event["at_us"]:
            self.succeeded[job_id, event["fingerprint"]] = event

    def is_erased(self, job_id: int) -> bool:
        """Whether its request was erased, and nobody asked for something else since."""
        return job_id in self.erased and self.changed.get(job_id, -1) <= self.erased[job_id][0]

    def _note(self, job_id: int, at: int, kind: str, attempt: int | None) -> None:
        """Chains are read one after the other, so the clock says what came last; in a chain, its order."""
        if self.last.get(job_id, (at, ""))[0] <= at:
            self.last[job_id] = (at, kind)
        if attempt is not None and self.attempts.get(job_id, (at, 0))[0] <= at:
            self.attempts[job_id] = (at, attempt)


def _verify_chains(connection: Connection, found: Verification) -> _Told:
    told = _Told()
    writer, expected, head = "", 0, GENESIS
    for row in rows.events(connection):
        found.events += 1
        if row.writer_id != writer:
            writer, expected, head = row.writer_id, 0, GENESIS
        subject = f"event:{writer}/{row.seq}"
        if row.seq != expected:
            found.fault("event-missing", subject, f"expected number {expected} of this chain")
        if _sha256(row.body) != row.hash:
            found.fault("event-altered", subject, "its bytes do not hash to its hash")
        try:
            body = json.loads(row.body)
            if row.seq == expected and (body["prev"], body["writer"], body["seq"]) != (head, writer, row.seq):
                found.fault("chain-broken", subject, "it does not continue the event before it")
            if body["subject"] != row.subject:
                found.fault("event-altered", subject, "its subject column differs from its bytes")
            told.hear(body)
        except (KeyError, TypeError, ValueError):
            found.fault("event-altered", subject, "it is no event that was written here")
        expected, head = row.seq + 1, row.hash
    return told


def _verify_seals(connection: Connection, key: SealKey, found: Verification, lost: Collection[int]) -> list[Json]:
    sealed = rows.seals(connection)
    previous, covered = GENESIS, dict[str, int]()
    for position, row in enumerate(sealed, 1):
        found.seals += 1
        subject = f"seal:{row['number']}"
        if _sha256(row["body"]) != row["hash"]:
            found.fault("seal-invalid", subject, "its bytes do not hash to its hash")
        if not key.signed(row["body"], row["signature"]):
            # Nothing that it says can be relied on, so nothing is compared with it.
            found.fault("seal-invalid", subject, "its signature is not by the key at hand")
            continue
        body = json.loads(row["body"])
        if row["number"] != position or body["number"] != position or body["prev"] != previous:
            found.fault("seal-invalid", subject, "it does not continue the seal before it")
        previous = row["hash"]
        if row["number"] in lost and not row["ranges"]:
            continue
        if sorted(_ranges(body)) != sorted(row["ranges"]):
            found.fault("seal-invalid", subject, "its ranges in the database differ from what was signed")
        for writer, first, last in _ranges(body):
            if first != covered.get(writer, -1) + 1:
                found.fault("seal-invalid", subject, f"it does not continue the chain of {writer}")
            covered[writer] = last
        if not _covers(connection, body):
            found.fault("sealed-events-altered", subject, "the events it covers are not those that were sealed")
    found.unsealed = sum(last - first + 1 for _, first, last in rows.unsealed_ranges(connection))
    return sealed


def _verify_stored_seal(store: ObjectStore, found: Verification, row: Json) -> None:
    subject = f"seal:{row['number']}"
    try:
        stored = store.get(row["key"], version_id=row["version_id"])
    except ObjectMissingError:
        found.fault("seal-invalid", subject, "it is not in storage")
        return
    if stored != _seal_object(row["body"], row["signature"]):
        found.fault("seal-invalid", subject, "storage holds another seal under this number")
    if len(store.versions(row["key"])) != 1:
        found.fault("seal-invalid", subject, "storage holds more than one version of it, or a delete marker")


def _verify_newest(database: Database, store: ObjectStore, found: Verification) -> None:
    for number in _forgotten(database, store):
        detail = "storage has sealed events that the database lacks: a backup? (sdpipeline reconcile --adopt)"
        found.fault("database-too-old", seal_name(number), detail)
        return


def refuse_restored(database: Database, store: ObjectStore) -> None:
    """Raises AuditBrokenError where storage has sealed events that the database lacks: work there would be done
    twice."""
    for number in _forgotten(database, store):
        raise _older_than(seal_name(number))


def _older_than(seal: str) -> AuditBrokenError:
    return AuditBrokenError(
        f"the database is older than {seal} in storage: a restored backup, or another database's storage?"
    )


def _forgotten(database: Database, store: ObjectStore) -> Iterator[int]:
    """The numbers of the seals that storage has and whose events the database lacks.

    A seal that only storage has may be on its way into the database, but then its events are here.
    """
    with database.read() as connection:
        last = rows.last_seal(connection)
    for number in count(last["number"] + 1 if last else 1):
        if store.head(seal_name(number)) is None:
            return
        try:
            body, _ = _read_seal(store.get(seal_name(number)))
            with database.read() as connection:
                known = _covers(connection, json.loads(body))
        except (KeyError, TypeError, ValueError):
            known = False
        if not known:
            yield number


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """What a restored database lacks of its own log, told by seals ``first_seal`` to ``last_seal``.

    ``missing`` are (writer, first, last sequence number), ``events`` their number.
    """

    first_seal: int
    last_seal: int
    events: int
    missing: tuple[tuple[str, int, int], ...]

    def document(self) -> Json:
        """As an event and ``audit verify --json`` tell it."""
        missing = [list(each) for each in self.missing]
        return {"first_seal": self.first_seal, "last_seal": self.last_seal, "events": self.events, "missing": missing}


def find_gap(database: Database, store: ObjectStore) -> Gap | None:
    """From which seal to which the database lacks events that were sealed; None where it lacks none.

    Raises AuditBrokenError where one of these seals cannot be read.
    """
    forgotten = list(_forgotten(database, store))
    if not forgotten:
        return None
    newest: dict[str, int] = {}
    for number in forgotten:
        for writer, _, last in _ranges(_lost_seal(store, number)[2]):
            newest[writer] = max(last, newest.get(writer, -1))
    with database.read() as connection:
        here = rows.newest_sequences(connection, newest)
    missing = tuple(
        (writer, here.get(writer, -1) + 1, last)
        for writer, last in sorted(newest.items())
        if last > here.get(writer, -1)
    )
    events = sum(last - first + 1 for _, first, last in missing)
    return Gap(first_seal=forgotten[0], last_seal=forgotten[-1], events=events, missing=missing)


def _lost_seal(store: ObjectStore, number: int) -> tuple[str, str, Json]:
    try:
        body, signature = _read_seal(store.get(seal_name(number)))
        told: Json = json.loads(body)
        _ranges(told)
    except (KeyError, TypeError, ValueError) as error:
        raise AuditBrokenError(f"{seal_name(number)} in storage is no seal") from error
    return body, signature, told


def lost_seals(
    database: Database, store: ObjectStore, key: SealKey, gap: Gap
) -> list[tuple[Json, list[tuple[str, int, int]]]]:
    """The rows of the seals that only storage has, with what each covers that is here.

    Raises AuditBrokenError unless they continue this database's own seals under the same key.
    """
    with database.read() as connection:
        last = rows.last_seal(connection)
    previous, found = last["hash"] if last else GENESIS, []
    for number in range(last["number"] + 1 if last else 1, gap.last_seal + 1):
        body, signature, told = _lost_seal(store, number)
        if not key.signed(body, signature) or (told["number"], told["prev"]) != (number, previous):
            raise AuditBrokenError(f"{seal_name(number)} in storage does not continue this database's seals")
        previous = _sha256(body)
        data = _seal_object(body, signature)
        stored = store.put(seal_name(number), data, content_type="application/json", retained=True)
        row = {"number": number, "body": body, "signature": signature, "hash": previous, "key": seal_name(number)}
        found.append((row | {"version_id": stored.version_id}, _ranges(told) if number < gap.first_seal else []))
    return found


def bridge(tx: Transaction, seals: Sequence[tuple[Json, list[tuple[str, int, int]]]], gap: Gap) -> None:
    """Go on after a gap: the lost seals stay in the chain of seals, covering nothing that is here, and an event
    names what is missing. What is still here of the events they covered belongs to the next seal."""
    for row, ranges in seals:
        rows.insert_seal(tx.connection, row, ranges)
    tx.record(Event.AUDIT_GAP, "audit", last_hash=seals[-1][0]["hash"], **gap.document())


def _verify_jobs(connection: Connection, found: Verification, told: _Told) -> None:
    for job in evidence.jobs(connection):
        subject = f"job:{job['id']}"
        found.erased += job["erased_at"] is not None
        for detail in _job_faults(job, told):
            found.fault("job-altered", subject, detail)
    for version_id, jobs_root in evidence.published_roots(connection):
        if told.roots.get(version_id) != jobs_root:
            detail = "its jobs are not those that were submitted"
            found.fault("campaign-altered", f"version:{version_id}", detail)


def _job_faults(job: Json, told: _Told) -> Iterator[str]:
    erased = job["erased_at"] is not None
    if erased != told.is_erased(job["id"]):
        yield "its request is gone, and no erasure is known" if erased else "its request was erased, and is here"
    yield from _erased_faults(job, told) if erased else _request_faults(job)
    # With its salt a job that was erased in between lost the means to show what it had committed to.
    known = None if job["id"] in told.erased and not erased else committed(job["request"], job["salt"])
    yield from _course_faults(job, told, known)


def _course_faults(job: Json, told: _Told, known: str | None) -> Iterator[str]:
    """What became of a job; ``known`` is what it commits to, if that can be told."""
    _, last = told.last.get(job["id"], (0, None))
    if job["status"] not in _ALLOWED[last]:
        yield f"it is {job['status']}, the audit log says {last or 'nothing of it'}"
    attempts = told.attempts.get(job["id"], (0, 0))[1]
    event = told.succeeded.get((job["id"], job["fingerprint"]))
    # A job that was cancelled, wanted again and found its old picture counts that picture's attempts.
    kept = event["attempt"] if event is not None and job["status"] == "cancelled" else attempts
    if job["status"] == "succeeded":
        if event is None:
            yield "the audit log does not know that it succeeded"
            return
        attempts = kept = event["attempt"]
        if known not in (None, event["commitment"]):
            yield "its request is not the one its picture was made from"
    if job["attempt"] not in (attempts, kept):
        yield f"it counts {job['attempt']} attempts, the audit log {attempts}"


def _erased_faults(job: Json, told: _Told) -> Iterator[str]:
    """All that is left to compare is what had been committed to."""
    if job["salt"]:
        yield "its request was erased, and its salt is here"
    if job["id"] in told.erased and committed(job["request"], job["salt"]) != told.erased[job["id"]][1]:
        yield "it commits to another request than the one that was erased"


def _request_faults(job: Json) -> Iterator[str]:
    if job_identity(job["edition"], job["stage"], job["row_key"], job["axes"], job["seed"]) != job["identity"]:
        yield "stage, row, variables or seed do not hash to its identity"
    try:
        if fingerprint(request_from_document(job["request"])) != job["fingerprint"]:
            yield "its request does not hash to its fingerprint"
    except (AttributeError, KeyError, TypeError, ValueError):
        yield "its request cannot be read"


def _verify_archive(
    store: ObjectStore, found: Verification, told: _Told, row: Json
) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """Compare an archived edition with the events; returns (key, SHA-256) of its pictures and their sidecars."""
    name = f"archive:{row['key']}"
    objects: list[tuple[tuple[str, str], tuple[str, str]]] = []
    if told.archived.get((row["campaign_id"], row["edition"])) != (row["key"], row["sha256"]):
        found.fault("archive-altered", name, "its row differs from the audit log")
    if len(store.versions(row["key"])) > 1:
        found.fault("archive-altered", name, "storage holds more than one version of it, or a delete marker")
    try:
        secrets = {line["id"]: line for line in archive.private(store, row)}
        for job in archive.jobs(store, row):
            found.erased += ERASED in secrets.get(job["id"], {}).get("request", {ERASED: ""})
            for detail in _archived_faults(row, job, secrets.get(job["id"]), told):
                found.fault("job-altered", f"job:{job['id']}", f"{detail}, in {row['key']}")
            for picture in job["images"]:
                objects += _archived_objects(store, found, told, picture)
    except ObjectMissingError as error:
        found.fault("archive-missing", name, str(error))
    except (ObjectConflictError, OSError, ValueError, KeyError) as error:
        found.fault("archive-altered", name, str(error))
    return objects


def _archived_faults(row: Json, job: Json, secret: Json | None, told: _Told) -> Iterator[str]:
    prompts_gone = secret is not None and ERASED in secret["request"]
    if (secret is None or prompts_gone) != told.is_erased(job["id"]):
        yield "its request was erased, and is here" if secret else "its request is gone, and no erasure is known"
    if secret is not None:
        if not prompts_gone:
            yield from _request_faults(job | secret | {"edition": row["edition"]})
        if committed(secret["request"], secret["salt"]) != job["commitment"]:
            yield "it commits to another request than its archive says"
    # With its salt a job that was erased and asked for anew lost the means to show what it had committed to.
    known = None if job["id"] in told.erased and job["erased_at"] is None else job["commitment"]
    yield from _course_faults(job, told, known)


def _archived_objects(
    store: ObjectStore, found: Verification, told: _Told, picture: Json
) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    event = told.succeeded.get((picture["job_id"], picture["fingerprint"]))
    if event is None or _differs(picture, event):
        found.fault("image-altered", f"image:{picture['key']}", "its archived row differs from the audit log")
    if (picture["job_id"], picture["fingerprint"]) not in told.deleted:
        return [((picture["key"], picture["sha256"]), (picture["sidecar_key"], picture["sidecar_sha256"]))]
    found.deleted += 1
    if store.versions(picture["key"]):
        detail = "the audit log says that it was deleted, and storage has it"
        found.fault("object-not-deleted", picture["key"], detail)
    return []


def _verify_images(
    connection: Connection, found: Verification, told: _Told, sample: int | None
) -> tuple[list[tuple[str, str]], list[str]]:
    """Compare picture rows with the events; returns (key, SHA-256) of the objects that are to be read, and the keys
    that are to be gone."""
    keys = evidence.image_keys(connection)
    wanted = set(keys if sample is None else random.sample(keys, min(sample, len(keys))))
    objects: list[tuple[str, str]] = []
    gone: list[str] = []
    living: set[str] = set()
    for picture in evidence.images(connection):
        event = told.succeeded.get((picture["job_id"], picture["fingerprint"]))
        if event is None or _differs(picture, event):
            found.fault("image-altered", f"image:{picture['key']}", "its row differs from the audit log")
        deleted = picture["deleted_at"] is not None
        found.deleted += deleted
        if not deleted:
            living.add(picture["key"])
        if deleted != ((picture["job_id"], picture["fingerprint"]) in told.deleted):
            detail = "it is gone, and no deletion is known" if deleted else "it was deleted, its row says nothing of it"
            found.fault("image-altered", f"image:{picture['key']}", detail)
        if (picture["job_id"], picture["fingerprint"]) not in wanted:
            found.skipped += 1
            continue
        if deleted:
            gone += [picture["key"], picture["sidecar_key"]]
            continue
        found.images += 1
        objects.append((picture["key"], picture["sha256"]))
        objects.append((picture["sidecar_key"], picture["sidecar_sha256"]))
    for job_id in evidence.succeeded_without_image(connection):
        found.fault("image-missing", f"job:{job_id}", "it succeeded, but no picture is recorded")
    return objects, [key for key in gone if key not in living]


def _differs(picture: Json, event: Json) -> bool:
    told = event["image"] | {"attempt": event["attempt"], "worker_id": event["worker"]}
    return any(picture[name] != value for name, value in told.items())


def _verify_object(store: ObjectStore, found: Verification, key: str, sha256: str) -> bytes | None:
    """The object's bytes, if they are those that were recorded."""
    try:
        data = store.get(key)
    except ObjectMissingError:
        found.fault("object-missing", key, "storage does not have it")
        return None
    if hashlib.sha256(data).hexdigest() != sha256:
        found.fault("object-altered", key, "its bytes do not hash to the recorded SHA-256")
        return None
    return data
