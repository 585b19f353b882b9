"""The check of picture rows against the events, and of what storage holds."""

from __future__ import annotations

import hashlib
import random

from sdpipeline.audit.findings import Verification
from sdpipeline.audit.told import Told
from sdpipeline.db import evidence
from sdpipeline.db.connection import Connection
from sdpipeline.domain import Json
from sdpipeline.errors import ObjectMissingError
from sdpipeline.storage import ObjectStore


def verify_images(
    connection: Connection, found: Verification, told: Told, sample: int | None
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
        if event is None or differs(picture, event):
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


def differs(picture: Json, event: Json) -> bool:
    """Whether a picture's row is not what the event of its success says."""
    told = event["image"] | {"attempt": event["attempt"], "worker_id": event["worker"]}
    return any(picture[name] != value for name, value in told.items())


def verify_object(store: ObjectStore, found: Verification, key: str, sha256: str) -> bytes | None:
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
