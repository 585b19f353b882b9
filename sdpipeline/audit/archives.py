"""Verification of archived editions against the audit events."""

from __future__ import annotations

from collections.abc import Iterator

from sdpipeline.archives import contents
from sdpipeline.audit.findings import Verification
from sdpipeline.audit.jobs import course_faults, request_faults
from sdpipeline.audit.pictures import differs
from sdpipeline.audit.replay import EventReplay
from sdpipeline.db.retention import ERASED, committed
from sdpipeline.domain import Json
from sdpipeline.errors import ObjectConflictError, ObjectMissingError
from sdpipeline.storage import ObjectStore


def verify_archive(store: ObjectStore, found: Verification, replay: EventReplay, row: Json) -> list[Json]:
    """Compare an archived edition with the events; return the rows of the pictures that it still has."""
    name = f"archive:{row['key']}"
    pictures: list[Json] = []
    if replay.archived.get((row["campaign_id"], row["edition"])) != (row["key"], row["sha256"]):
        found.fault("archive-altered", name, "its row differs from the audit log")
    if len(store.versions(row["key"])) > 1:
        found.fault("archive-altered", name, "storage holds more than one version of it, or a delete marker")
    try:
        secrets = {line["id"]: line for line in contents.private(store, row)}
        for job in contents.jobs(store, row):
            found.erased += ERASED in secrets.get(job["id"], {}).get("request", {ERASED: ""})
            for detail in _archived_faults(row, job, secrets.get(job["id"]), replay):
                found.fault("job-altered", f"job:{job['id']}", f"{detail}, in {row['key']}")
            own = [contents.with_scores(picture, secrets.get(job["id"])) for picture in job["images"]]
            pictures += [picture for picture in own if _is_kept(store, found, replay, picture)]
    except ObjectMissingError as error:
        found.fault("archive-missing", name, str(error))
    except (ObjectConflictError, OSError, ValueError, KeyError) as error:
        found.fault("archive-altered", name, str(error))
    return pictures


def _archived_faults(row: Json, job: Json, secret: Json | None, replay: EventReplay) -> Iterator[str]:
    prompts_gone = secret is not None and ERASED in secret["request"]
    if (secret is None or prompts_gone) != replay.is_erased(job["id"]):
        yield (
            "its request was erased, but is still stored"
            if secret
            else "its request is missing, and no erasure is recorded"
        )
    if secret is not None:
        if not prompts_gone:
            yield from request_faults(job | secret | {"edition": row["edition"]})
        if committed(secret["request"], secret["salt"]) != job["commitment"]:
            yield "its commitment is not to the request in its archive"
    # A job that was erased and then asked for again has a new salt, so its old commitment cannot be checked.
    known = None if job["id"] in replay.erased and job["erased_at"] is None else job["commitment"]
    yield from course_faults(job, replay, known)


def _is_kept(store: ObjectStore, found: Verification, replay: EventReplay, picture: Json) -> bool:
    event = replay.succeeded.get((picture["job_id"], picture["fingerprint"]))
    deleted = (picture["job_id"], picture["fingerprint"]) in replay.deleted
    if event is None or differs(picture, event, deleted=deleted):
        found.fault("image-altered", f"image:{picture['key']}", "its archived row differs from the audit log")
    if not deleted:
        return True
    found.deleted += 1
    if store.versions(picture["key"]):
        detail = "the audit log says that it was deleted, but it is still in storage"
        found.fault("object-not-deleted", picture["key"], detail)
    return False
