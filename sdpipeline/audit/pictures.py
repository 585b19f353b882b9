"""Verification of picture rows against the events, and of the objects in storage."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdpipeline.audit.findings import Verification
from sdpipeline.audit.proof import altered
from sdpipeline.audit.replay import EventReplay
from sdpipeline.db import audit_queries
from sdpipeline.db.connection import Connection
from sdpipeline.db.similar_images import looks
from sdpipeline.db.tables import LOOKS
from sdpipeline.domain import Json
from sdpipeline.errors import ObjectMissingError
from sdpipeline.provenance.record import control_maps_in
from sdpipeline.storage import ObjectStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """An object that must be in storage; ``pixels_sha256`` is known for pictures."""

    key: str
    sha256: str
    pixels_sha256: str | None = None


def objects_of(picture: Json) -> list[Expected]:
    """Return a picture and its sidecar, from the picture's row."""
    own = Expected(key=picture["key"], sha256=picture["sha256"], pixels_sha256=picture["pixels_sha256"])
    return [own, Expected(key=picture["sidecar_key"], sha256=picture["sidecar_sha256"])]


def verify_images(
    connection: Connection, found: Verification, replay: EventReplay, sample: int | None
) -> tuple[list[Expected], list[str]]:
    """Compare picture rows with the events; return the objects to read, and the keys that must be deleted."""
    keys = audit_queries.image_keys(connection)
    wanted = set(keys if sample is None else random.sample(keys, min(sample, len(keys))))
    objects: list[Expected] = []
    deleted_keys: list[str] = []
    existing: set[str] = set()
    for picture in audit_queries.images(connection):
        event = replay.succeeded.get((picture["job_id"], picture["fingerprint"]))
        deleted = picture["deleted_at"] is not None
        if event is None or differs(picture, event, deleted=deleted):
            found.fault("image-altered", f"image:{picture['key']}", "its row differs from the audit log")
        found.deleted += deleted
        if not deleted:
            existing.add(picture["key"])
        if deleted != ((picture["job_id"], picture["fingerprint"]) in replay.deleted):
            detail = (
                "it is missing, and no deletion is recorded"
                if deleted
                else "it was deleted, but its row does not say so"
            )
            found.fault("image-altered", f"image:{picture['key']}", detail)
        if (picture["job_id"], picture["fingerprint"]) not in wanted:
            found.skipped += 1
            continue
        if deleted:
            deleted_keys += [picture["key"], picture["sidecar_key"]]
            continue
        found.images += 1
        objects += objects_of(picture)
    for job_id in audit_queries.succeeded_without_image(connection):
        found.fault("image-missing", f"job:{job_id}", "it succeeded, but no picture is recorded")
    return objects, [key for key in deleted_keys if key not in existing]


def differs(picture: Json, event: Json, *, deleted: bool) -> bool:
    """Return True if a picture's row differs from its success event; a deleted picture's scores may be gone."""
    recorded = event["image"] | {"attempt": event["attempt"], "worker_id": event["worker"]}
    if deleted and not picture["scores"]:
        recorded.pop("scores", None)
    return any(picture[name] != value for name, value in recorded.items()) or _looks_else(picture, recorded)


def _looks_else(picture: Json, made: Json) -> bool:
    """Return True if the row's lookup columns differ from its hash, so that a stripped copy would not match.

    Rows of older releases have no such columns and never differ.
    """
    stored = {name: picture.get(name) for name in LOOKS}
    wanted = dict.fromkeys(LOOKS) | looks(made["scores"] if "scores" in made else picture["scores"])
    return any(value is not None for value in stored.values()) and stored != wanted


def verify_objects(store: ObjectStore, found: Verification, expected: Sequence[Expected]) -> None:
    """Read every object, and the control maps that sidecars name, and report how each was changed."""
    keys = {each.sha256: each.key for each in expected}
    for each in expected:
        data = _verify_object(store, found, each, keys)
        if data is not None and each.key.endswith(".json"):
            for control_map in control_maps_in(data):
                _verify_object(store, found, Expected(key=control_map.key, sha256=control_map.sha256), keys)


def _verify_object(store: ObjectStore, found: Verification, each: Expected, keys: Mapping[str, str]) -> bytes | None:
    """Return the object's bytes if they are the recorded ones; ``keys`` by SHA-256 reveal a swap."""
    try:
        data = store.get(each.key)
    except ObjectMissingError:
        found.fault("object-missing", each.key, "it is not in storage")
        return None
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 == each.sha256:
        return data
    detail = "its bytes do not hash to the recorded SHA-256"
    if sha256 in keys:
        detail = f"it holds the bytes of {keys[sha256]}"
    elif each.pixels_sha256 is not None:
        detail = altered(data, sha256=each.sha256, pixels_sha256=each.pixels_sha256) or detail
    found.fault("object-altered", each.key, detail)
    return None
