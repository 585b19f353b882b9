"""Verification of job rows against the audit events."""

from __future__ import annotations

from collections.abc import Iterator

from sdpipeline.audit.findings import Verification
from sdpipeline.audit.replay import ALLOWED, EventReplay
from sdpipeline.db import audit_queries
from sdpipeline.db.connection import Connection
from sdpipeline.db.retention import committed
from sdpipeline.domain import Json, fingerprint, job_identity, request_from_document


def verify_jobs(connection: Connection, found: Verification, replay: EventReplay) -> None:
    """Compare every job row, and the jobs of every published version."""
    for job in audit_queries.jobs(connection):
        subject = f"job:{job['id']}"
        found.erased += job["erased_at"] is not None
        for detail in _job_faults(job, replay):
            found.fault("job-altered", subject, detail)
    for version_id, jobs_root in audit_queries.published_roots(connection):
        if replay.roots.get(version_id) != jobs_root:
            detail = "its jobs differ from the submitted ones"
            found.fault("campaign-altered", f"version:{version_id}", detail)


def _job_faults(job: Json, replay: EventReplay) -> Iterator[str]:
    erased = job["erased_at"] is not None
    if erased != replay.is_erased(job["id"]):
        yield (
            "its request is missing, and no erasure is recorded"
            if erased
            else "its request was erased, but is still stored"
        )
    yield from _erased_faults(job, replay) if erased else request_faults(job)
    # A job that was erased in between has a new salt, so its old commitment cannot be checked.
    known = None if job["id"] in replay.erased and not erased else committed(job["request"], job["salt"])
    yield from course_faults(job, replay, known)


def course_faults(job: Json, replay: EventReplay, known: str | None) -> Iterator[str]:
    """Compare a job's status and attempts with the events; ``known`` is its commitment, None if unknown."""
    _, last = replay.last.get(job["id"], (0, None))
    if job["status"] not in ALLOWED[last]:
        yield f"it is {job['status']}, the audit log says {last or 'nothing'}"
    attempts = replay.attempts.get(job["id"], (0, 0))[1]
    event = replay.succeeded.get((job["id"], job["fingerprint"]))
    # A job that was cancelled, asked for again and matched to its old picture counts that picture's attempts.
    kept = event["attempt"] if event is not None and job["status"] == "cancelled" else attempts
    if job["status"] == "succeeded":
        if event is None:
            yield "the audit log has no record of its success"
            return
        attempts = kept = event["attempt"]
        if known not in (None, event["commitment"]):
            yield "its request differs from the one that made its picture"
    if job["attempt"] not in (attempts, kept):
        yield f"it counts {job['attempt']} attempts, the audit log {attempts}"


def _erased_faults(job: Json, replay: EventReplay) -> Iterator[str]:
    """Compare an erased job's commitment with the events; nothing else of its request is left."""
    if job["salt"]:
        yield "its request was erased, but its salt is still stored"
    if job["id"] in replay.erased and committed(job["request"], job["salt"]) != replay.erased[job["id"]][1]:
        yield "its commitment is not to the request that was erased"


def request_faults(job: Json) -> Iterator[str]:
    """Explain which values of a job do not hash to its identity or fingerprint."""
    if job_identity(job["edition"], job["stage"], job["row_key"], job["axes"], job["seed"]) != job["identity"]:
        yield "stage, row, variables or seed do not hash to its identity"
    try:
        if fingerprint(request_from_document(job["request"])) != job["fingerprint"]:
            yield "its request does not hash to its fingerprint"
    except (AttributeError, KeyError, TypeError, ValueError):
        yield "its request cannot be read"
