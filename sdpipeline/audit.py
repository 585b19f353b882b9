"""Seals over the audit log, and the check of database, storage and seals against each other."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rfc8785
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from filelock import FileLock

from sdpipeline.db import audit as rows
from sdpipeline.db import evidence
from sdpipeline.db.audit import GENESIS, Event
from sdpipeline.db.connection import Database
from sdpipeline.db.queue import commitment
from sdpipeline.domain import Json, fingerprint, job_identity, request_from_document
from sdpipeline.errors import Mistake, ObjectConflictError, ObjectMissingError, SettingsError
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


def load_key(path: Path, *, create: bool) -> SealKey:
    """Read a PEM file; ``create`` makes a development key where there is none."""
    if not path.is_file():
        if not create:
            fix = "write an Ed25519 key there: openssl genpkey -algorithm ed25519"
            raise SettingsError(Mistake(key="SDP_SIGNING__SEAL_KEY_FILE", message=f"no key at {path}", fix=fix))
        _create_key(path)
    key = serialization.load_pem_private_key(path.read_bytes(), password=None)
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
        path.touch(mode=0o600)
        path.write_bytes(pem)


def seal(database: Database, store: ObjectStore, key: SealKey) -> int:
    """Sign a Merkle root over all events no seal covers yet; returns how many there were.

    The seal goes to storage first: a seal that only the database knows proves nothing.
    """
    with database.read() as connection:
        ranges = rows.unsealed_ranges(connection)
        last = rows.last_seal(connection)
        merkle_root = root(rows.bodies(connection, ranges)).hex()
    count = sum(last_seq - first + 1 for _, first, last_seq in ranges)
    if not count:
        return 0
    number = last["number"] + 1 if last else 1
    body = rfc8785.dumps(
        {
            "v": 1,
            "number": number,
            "prev": last["hash"] if last else GENESIS,
            "sealed_at_ms": time.time_ns() // 1_000_000,
            "events": count,
            "ranges": [list(each) for each in ranges],
            "merkle_root": merkle_root,
            "public_key": key.public_hex,
        }
    ).decode()
    return _publish(database, store, number, body, key.private.sign(body.encode()).hex())


def _publish(database: Database, store: ObjectStore, number: int, body: str, signature: str) -> int:
    name = seal_name(number)
    try:
        stored = store.put(name, _seal_object(body, signature), content_type="application/json")
    except ObjectConflictError:
        # A sealer died between storage and database: what it signed stands.
        found = json.loads(store.get(name))
        body, signature = found["body"], found["signature"]
        stored = store.put(name, _seal_object(body, signature), content_type="application/json")
    row = {"number": number, "body": body, "signature": signature, "hash": _sha256(body), "key": name}
    ranges = [(writer, first, last) for writer, first, last in json.loads(body)["ranges"]]
    with database.write() as connection:
        first_to_seal = rows.insert_seal(connection, row | {"version_id": stored.version_id}, ranges)
    return sum(last - first + 1 for _, first, last in ranges) if first_to_seal else 0


def seal_name(number: int) -> str:
    """Where seal number ``number`` lies in storage."""
    return f"audit/seals/{number:08d}.json"


def _seal_object(body: str, signature: str) -> bytes:
    return rfc8785.dumps({"body": body, "signature": signature})


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
    """What was checked and what was found. ``skipped`` counts pictures that ``sample`` left out."""

    events: int = 0
    seals: int = 0
    images: int = 0
    skipped: int = 0
    unsealed: int = 0
    faults: list[Fault] = field(default_factory=list)

    def fault(self, kind: str, subject: str, detail: str) -> None:
        """Note a fault."""
        self.faults.append(Fault(kind=kind, subject=subject, detail=detail))

    def document(self) -> Json:
        """The form of ``audit verify --json``."""
        faults = [{"kind": f.kind, "subject": f.subject, "detail": f.detail} for f in self.faults]
        counts = {name: getattr(self, name) for name in ("events", "seals", "images", "skipped", "unsealed")}
        return {"ok": not self.faults} | counts | {"faults": faults}


def verify(
    database: Database,
    store: ObjectStore,
    key: SealKey,
    *,
    sample: int | None = None,
) -> Verification:
    """Check every chain, seal, job row and picture; ``sample`` limits the pictures whose bytes are read."""
    found = Verification()
    told = _Told()
    _verify_chains(database, found, told)
    _verify_seals(database, store, key, found)
    _verify_jobs(database, found, told)
    wanted = _wanted(database, sample)
    _verify_images(database, store, found, told, wanted)
    return found


@dataclass(slots=True)
class _Told:
    """What the events say of each job, kept while the chains are read."""

    succeeded: dict[tuple[int, str], Json] = field(default_factory=dict)
    last: dict[int, tuple[int, str, str | None]] = field(default_factory=dict)
    attempts: dict[int, tuple[int, int]] = field(default_factory=dict)
    roots: dict[int, str] = field(default_factory=dict)

    def hear(self, event: Json) -> None:
        """Take in one event."""
        kind, at, subject = event["event"], event["at_ms"], event["subject"]
        if kind == Event.CAMPAIGN_SUBMITTED:
            self.roots[event["version_id"]] = event["jobs_root"]
        elif kind == Event.LEASE_TAKEN:
            for job_id, attempt in event["jobs"]:
                self._latest(self.attempts, job_id, (at, attempt))
        elif kind in (Event.JOB_SUCCEEDED, Event.JOB_FAILED, Event.JOB_DEFERRED):
            job_id = int(subject.removeprefix("job:"))
            self._latest(self.last, job_id, (at, kind, event["fingerprint"]))
            if kind == Event.JOB_SUCCEEDED:
                self.succeeded[job_id, event["fingerprint"]] = event
        elif kind in (Event.JOBS_SKIPPED, Event.JOBS_CANCELLED, Event.JOBS_RETRIED):
            for job_id in event["jobs"]:
                self._latest(self.last, job_id, (at, kind, None))

    @staticmethod
    def _latest(known: dict[int, Any], job_id: int, entry: tuple[Any, ...]) -> None:
        if job_id not in known or known[job_id][0] <= entry[0]:
            known[job_id] = entry


def _verify_chains(database: Database, found: Verification, told: _Told) -> None:
    writer, expected, head = "", 0, GENESIS
    with database.read() as connection:
        for row, body in rows.events(connection):
            found.events += 1
            if row.writer_id != writer:
                writer, expected, head = row.writer_id, 0, GENESIS
            subject = f"event:{writer}/{row.seq}"
            if row.seq != expected:
                found.fault("event-missing", subject, f"expected number {expected} of this chain")
            elif _sha256(row.body) != row.hash:
                found.fault("event-altered", subject, "its bytes do not hash to its hash")
            elif body.get("prev") != head or body.get("writer") != writer or body.get("seq") != row.seq:
                found.fault("chain-broken", subject, "it does not continue the event before it")
            elif body.get("subject") != row.subject:
                found.fault("event-altered", subject, "its subject column differs from its bytes")
            expected, head = row.seq + 1, row.hash
            told.hear(body)


def _verify_seals(database: Database, store: ObjectStore, key: SealKey, found: Verification) -> None:
    with database.read() as connection:
        sealed = rows.seals(connection)
        previous, covered = GENESIS, dict[str, int]()
        for position, row in enumerate(sealed, 1):
            found.seals += 1
            body = json.loads(row["body"])
            subject = f"seal:{row['number']}"
            if row["number"] != position or body["number"] != position or body["prev"] != previous:
                found.fault("seal-invalid", subject, "it does not continue the seal before it")
            for detail in _seal_faults(row, body, key, store):
                found.fault("seal-invalid", subject, detail)
            ranges = [(writer, first, last) for writer, first, last in body["ranges"]]
            if sorted(ranges) != sorted(row["ranges"]):
                found.fault("seal-invalid", subject, "its ranges in the database differ from what was signed")
            for writer, first, last in ranges:
                if first != covered.get(writer, -1) + 1:
                    found.fault("seal-invalid", subject, f"it does not continue the chain of {writer}")
                covered[writer] = last
            if root(rows.bodies(connection, ranges)).hex() != body["merkle_root"]:
                found.fault("sealed-events-altered", subject, "the events it covers are not those that were sealed")
            previous = row["hash"]
        found.unsealed = sum(last - first + 1 for _, first, last in rows.unsealed_ranges(connection))
    following = seal_name(len(sealed) + 1)
    if store.head(following) is not None:
        found.fault("database-too-old", following, "storage holds a newer seal than the database: a restored backup?")


def _seal_faults(row: Json, body: Json, key: SealKey, store: ObjectStore) -> Iterator[str]:
    if _sha256(row["body"]) != row["hash"]:
        yield "its bytes do not hash to its hash"
    if body["public_key"] != key.public_hex:
        yield f"it was signed by another key, {body['public_key'][:16]}..."
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key.public_hex)).verify(
            bytes.fromhex(row["signature"]), row["body"].encode()
        )
    except (InvalidSignature, ValueError):
        yield "its signature is wrong"
    try:
        if store.get(row["key"]) != _seal_object(row["body"], row["signature"]):
            yield "storage holds another seal under this number"
    except ObjectMissingError:
        yield "it is not in storage"


def _verify_jobs(database: Database, found: Verification, told: _Told) -> None:
    with database.read() as connection:
        for job in evidence.jobs(connection):
            subject = f"job:{job['id']}"
            for detail in _job_faults(job, told):
                found.fault("job-altered", subject, detail)
        for version_id, jobs_root in evidence.published_roots(connection):
            if told.roots.get(version_id) != jobs_root:
                detail = "its jobs are not those that were submitted"
                found.fault("campaign-altered", f"version:{version_id}", detail)


def _job_faults(job: Json, told: _Told) -> Iterator[str]:
    if job_identity(job["edition"], job["stage"], job["row_key"], job["axes"], job["seed"]) != job["identity"]:
        yield "stage, row, variables or seed do not hash to its identity"
    try:
        if fingerprint(request_from_document(job["request"])) != job["fingerprint"]:
            yield "its request does not hash to its fingerprint"
    except (KeyError, TypeError, ValueError):
        yield "its request cannot be read"
    event = told.succeeded.get((job["id"], job["fingerprint"]))
    _, last, last_fingerprint = told.last.get(job["id"], (0, "", None))
    status = job["status"]
    if (event is None) is (status == "succeeded"):
        if status == "succeeded":
            yield "the audit log does not know that it succeeded"
        elif status != "cancelled":
            yield f"it is {status}, the audit log says that it succeeded"
    expected = {"failed": Event.JOB_FAILED, "skipped": Event.JOBS_SKIPPED, "cancelled": Event.JOBS_CANCELLED}
    if status in expected and last != expected[status]:
        yield f"it is {status}, the audit log does not say so"
    if status in ("waiting", "ready", "leased") and last == Event.JOB_FAILED and last_fingerprint == job["fingerprint"]:
        yield f"it is {status}, the audit log says that it failed"
    attempts = told.attempts.get(job["id"], (0, 0))[1]
    if job["attempt"] not in (attempts, max(0, attempts - 1), 0) or (event and job["attempt"] > event["attempt"]):
        yield f"it counts {job['attempt']} attempts, the audit log {attempts}"
    if event and status == "succeeded" and event["commitment"] != commitment(job["salt"], job["request"]):
        yield "its request is not the one its picture was made from"


def _wanted(database: Database, sample: int | None) -> Container[tuple[int, str]]:
    """The pictures whose bytes are read: all, or as many as the sample asks for."""
    with database.read() as connection:
        keys = evidence.image_keys(connection)
    return set(keys if sample is None else random.sample(keys, min(sample, len(keys))))


def _verify_images(
    database: Database, store: ObjectStore, found: Verification, told: _Told, wanted: Container[tuple[int, str]]
) -> None:
    with database.read() as connection:
        for picture in evidence.images(connection):
            subject = f"image:{picture['key']}"
            event = told.succeeded.get((picture["job_id"], picture["fingerprint"]))
            if event is None or any(event["image"][name] != picture[name] for name in event["image"]):
                found.fault("image-altered", subject, "its row differs from the audit log")
            if (picture["job_id"], picture["fingerprint"]) not in wanted:
                found.skipped += 1
            else:
                found.images += 1
                _verify_object(store, found, picture["key"], picture["sha256"])
                _verify_object(store, found, picture["sidecar_key"], picture["sidecar_sha256"])
        for job_id in evidence.succeeded_without_image(connection):
            found.fault("image-missing", f"job:{job_id}", "it succeeded, but no picture is recorded")


def _verify_object(store: ObjectStore, found: Verification, key: str, sha256: str) -> None:
    try:
        data = store.get(key)
    except ObjectMissingError:
        found.fault("object-missing", key, "storage does not have it")
        return
    if hashlib.sha256(data).hexdigest() != sha256:
        found.fault("object-altered", key, "its bytes do not hash to the recorded SHA-256")
