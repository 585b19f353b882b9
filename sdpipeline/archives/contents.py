"""Contents of an archived edition: one permanent object, and one for private data that may be erased later."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from sdpipeline.db import archives
from sdpipeline.db.archives import Edition
from sdpipeline.db.connection import Connection
from sdpipeline.db.retention import ERASED
from sdpipeline.domain import Json, canonical
from sdpipeline.errors import ObjectConflictError
from sdpipeline.storage import ObjectStore
from sdpipeline.storage.keys import archive_key, archive_stem, private_archive_key

SCHEMA = "sdpipeline/archive/1"
_TYPE = "application/gzip"


@dataclass(slots=True)
class _Lines:
    """Writer of JSON Lines into one gzip object; equal lines give equal bytes."""

    buffer: io.BytesIO = field(default_factory=io.BytesIO)
    file: gzip.GzipFile = field(init=False)

    def __post_init__(self) -> None:
        self.file = gzip.GzipFile(filename="", mode="wb", fileobj=self.buffer, mtime=0)

    def add(self, line: Json) -> None:
        self.file.write(canonical(line) + b"\n")

    def data(self) -> bytes:
        self.file.close()
        return self.buffer.getvalue()


def written(connection: Connection, edition: Edition) -> tuple[bytes, bytes]:
    """Serialize a closed edition as two objects: the permanent public part and the private part."""
    public, private = _Lines(), _Lines()
    about = {"team": edition.team, "campaign": edition.campaign, "edition": edition.edition}
    public.add({"schema": SCHEMA, "campaign_id": edition.campaign_id} | about)
    for job, secret in archives.lines(connection, edition):
        public.add(job)
        if secret is not None:
            private.add(secret)
    return public.data(), private.data()


def store_edition(store: ObjectStore, edition: Edition, public: bytes, private: bytes) -> Json:
    """Store both objects, the first under retention; return their columns for the database."""
    sha256 = hashlib.sha256(public).hexdigest()
    stem = archive_stem(team=edition.team, campaign=edition.campaign, edition=edition.edition)
    try:
        stored = store.put(archive_key(stem), public, content_type=_TYPE, retained=True)
    except ObjectConflictError:
        # Written by a run that was killed, before something of the edition was erased.
        stored = store.put(archive_key(stem, sha256=sha256), public, content_type=_TYPE, retained=True)
    kept = {"key": stored.key, "sha256": sha256, "version_id": stored.version_id}
    return kept | _store_private(store, stem, private)


def store_private(store: ObjectStore, row: Json, lines: Iterable[Json]) -> Json:
    """Store the remaining lines of an edition's private part, under a key with their hash."""
    private = _Lines()
    for line in lines:
        private.add(line)
    return _store_private(store, _stem(row), private.data())


def _stem(row: Json) -> str:
    return archive_stem(team=row["team"], campaign=row["name"], edition=row["edition"])


def _store_private(store: ObjectStore, stem: str, data: bytes) -> Json:
    sha256 = hashlib.sha256(data).hexdigest()
    stored = store.put(private_archive_key(stem, sha256), data, content_type=_TYPE)
    return {"private_key": stored.key, "private_sha256": sha256}


def newest_private(store: ObjectStore, row: Json) -> Json:
    """Return the edition's private part in storage, if the one in its row has been replaced or deleted."""
    stem = _stem(row)
    parts = [store.get(key) for key in store.list(f"{stem}.") if key.endswith(".private.jsonl.gz")]
    if not parts:
        return {"private_key": None, "private_sha256": None}
    # Each rewrite holds less than the one before it.
    sha256 = hashlib.sha256(min(parts, key=len)).hexdigest()
    return {"private_key": private_archive_key(stem, sha256), "private_sha256": sha256}


def jobs(store: ObjectStore, row: Json) -> Iterator[Json]:
    """Yield the jobs of an archived edition; raises ObjectMissingError, or ObjectConflictError if it was altered."""
    lines = _read(store.get(row["key"], version_id=row["version_id"]), row["key"], row["sha256"])
    next(lines)
    yield from lines


def private(store: ObjectStore, row: Json) -> Iterator[Json]:
    """Yield the private lines of an edition that still exist; raises as :func:`jobs` does."""
    if row["private_key"] is not None:
        yield from _read(store.get(row["private_key"]), row["private_key"], row["private_sha256"])


def _read(data: bytes, key: str, sha256: str) -> Iterator[Json]:
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ObjectConflictError(f"{key} was altered: its SHA-256 is not {sha256}")
    with gzip.open(io.BytesIO(data), "rb") as file:
        for line in file:
            yield json.loads(line)


def with_scores(picture: Json, secret: Json | None) -> Json:
    """Return an archived picture with its scores: those of a subject are only in the private part."""
    scores = (secret or {}).get("scores", {})
    return picture | {"scores": scores.get(picture["fingerprint"], picture["scores"])}


def pictures(store: ObjectStore, rows: Iterable[Json]) -> Iterator[Json]:
    """Yield the pictures of these archived editions, except deleted ones."""
    for row in rows:
        if row["pictures_deleted_at"] is None:
            for job in jobs(store, row):
                yield from (each for each in job["images"] if each["deleted_at"] is None)


def show(connection: Connection, store: ObjectStore, job_id: int, *, team: str) -> Json | None:
    """Return an archived job in the form of :func:`sdpipeline.db.queries.show`, or None."""
    for row in archives.archives(connection, team=team, job_id=job_id):
        found = next((job for job in jobs(store, row) if job["id"] == job_id), None)
        if found is not None:
            secret = next((line for line in private(store, row) if line["id"] == job_id), {})
            return _document(connection, store, row, found, secret)
    return None


def _document(connection: Connection, store: ObjectStore, row: Json, found: Json, secret: Json) -> Json:
    own = next((each for each in found["images"] if each["fingerprint"] == found["fingerprint"]), None)
    own = with_scores(own, secret) if own is not None else None
    has_picture = own is not None and found["status"] == "succeeded"
    deleted_at = own["deleted_at"] or row["pictures_deleted_at"] if own is not None and has_picture else None
    # If a picture was erased after archiving, only the audit log has its tombstone.
    here = own is not None and has_picture and bool(store.versions(own["key"]))
    names = ("url", "sha256", "size_bytes", "width", "height", "scores")
    about = {name: found[name] for name in ("id", "stage", "seed", "parents", "status", "fingerprint", "identity")}
    return about | {
        "row": secret.get("row_key", ""),
        "variables": secret.get("variables", {}),
        "request": secret.get("request", {}),
        "attempts": found["attempt"],
        "error": secret.get("error"),
        "error_kind": found["error_kind"],
        "erased": ERASED in secret.get("request", {ERASED: ""}),
        "erased_at": found["erased_at"],
        "image": {name: own[name] for name in names} if own is not None and here else None,
        "image_deleted_at": deleted_at,
        "reused_from": own["reused_from"] if own is not None and has_picture else None,
        "team": row["team"],
        "campaign": row["name"],
        "edition": row["edition"],
        "archive": row["key"],
        "not_before": None,
        "children": [],
        "history": [each | {"error": None} for each in found["attempts"]],
        "pictures": found["images"],
        "events": archives.events_of(connection, found["id"]),
    }
