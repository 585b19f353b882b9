"""Invariants that hold after a campaign has ended, checked after every kind of fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select

from sdpipeline.audit import SealKey, seal, verify
from sdpipeline.db.connection import Database
from sdpipeline.db.reconcile import open_attempts
from sdpipeline.db.tables import image, job
from sdpipeline.domain import TERMINAL
from sdpipeline.storage import ObjectStore
from tests.chaos.local_workers import MAX_ATTEMPTS
from tests.factories import events


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphans:
    """Objects without a row: pictures that were stored and not recorded, and sidecars."""

    pictures: int
    sidecars: int


def violations(database: Database, store: ObjectStore, key: SealKey, *, max_attempts: int = MAX_ATTEMPTS) -> list[str]:
    """Every violated invariant. The audit log is sealed first, so that its seals are checked too.

    Every job has succeeded, for nothing in these campaigns can fail by itself. A job that was changed has a picture for
    each fingerprint that it was made with.
    """
    told = dict[str, Counter[str]]()
    for event in events(database):
        if event["event"] == "job.succeeded":
            told.setdefault(event["subject"], Counter())[event["fingerprint"]] += 1
    jobs = _jobs(database)
    found = [wrong for row in jobs for wrong in _wrong(row, told.pop(f"job:{row.id}", Counter()), max_attempts)]
    found += [f"{subject} succeeded in the audit log alone" for subject in told]
    with database.read() as connection:
        left_open = open_attempts(connection)
    found += [f"job {job_id} has an open attempt under lease {lease_id}" for job_id, lease_id in left_open]
    # Event chains without gaps, seals, job rows against events, and the bytes of every picture and sidecar.
    seal(database, store, key)
    return found + [f"{fault.kind} {fault.subject}: {fault.detail}" for fault in verify(database, store, key).faults]


def _jobs(database: Database) -> list[Any]:
    """Every job with its number of pictures."""
    pictures_of_job = select(func.count()).where(image.c.job_id == job.c.id).correlate(job)
    own = pictures_of_job.where(image.c.fingerprint == job.c.fingerprint).scalar_subquery().label("own")
    names = ("id", "status", "attempt", "lease_id", "error", "fingerprint")
    columns = (*(job.c[name] for name in names), pictures_of_job.scalar_subquery().label("pictures"), own)
    with database.read() as connection:
        return list(connection.execute(select(*columns).order_by(job.c.id)).all())


def _wrong(row: Any, told: Counter[str], max_attempts: int) -> Iterator[str]:
    if row.status not in TERMINAL:
        yield f"job {row.id} is {row.status}"
    elif row.status != "succeeded":
        yield f"job {row.id} is {row.status}: {row.error}"
    if row.own != 1 or row.pictures != max(1, len(told)):
        yield f"job {row.id} has {row.pictures} pictures, {row.own} of them its present one"
    for fingerprint in {row.fingerprint, *told}:
        if told[fingerprint] != 1:
            yield f"job {row.id} succeeded {told[fingerprint]} times in the audit log"
    if not 1 <= row.attempt <= max_attempts:
        yield f"job {row.id} made {row.attempt} attempts"
    if row.lease_id is not None:
        yield f"job {row.id} is still held by lease {row.lease_id}"


def orphans(database: Database, store: ObjectStore) -> Orphans:
    """Objects that crashes left in storage. Storage may hold too much, never too little."""
    with database.read() as connection:
        named = {key for row in connection.execute(select(image.c.key, image.c.sidecar_key)) for key in row}
    there = set(store.list("default/"))
    assert named <= there, f"not in storage: {sorted(named - there)[:5]}"
    extra = there - named
    sidecars = sum(key.endswith(".json") for key in extra)
    return Orphans(pictures=len(extra) - sidecars, sidecars=sidecars)
