"""Storage of finished pictures with their sidecars and control maps; each is read back and its marks are checked."""

from __future__ import annotations

import hashlib
import time

from sdpipeline import provenance
from sdpipeline.errors import (
    InputImageError,
    MarksLostError,
    ObjectConflictError,
    ObjectMissingError,
    StorageUnavailableError,
)
from sdpipeline.jobs import StoredImage
from sdpipeline.provenance import LARGEST_PICTURE
from sdpipeline.provenance.record import SIDECAR_SCHEMA, ControlMap, PictureObject, Sidecar
from sdpipeline.storage import ObjectStore, StoredObject, keys
from sdpipeline.worker.finished_picture import FinishedPicture


def store_picture(store: ObjectStore, picture: FinishedPicture) -> StoredImage:
    """Store the picture with record and sidecar, read back and verify; it counts only once the database has recorded
    it.

    The call may be repeated after a storage outage: objects stored earlier are compared byte by byte. Raises
    MarksLostError if storage returns a picture without its marks.
    """
    started = time.perf_counter()
    encoded, attempt = picture.encoded, picture.attempt
    stem = keys.picture_stem(picture.folder, encoded.sha256)
    key = keys.picture_key(stem, encoded.extension)
    stored = put_marked(store, key, encoded.data)
    control_maps = _store_control_maps(store, stem, picture)
    sidecar = Sidecar(
        schema=SIDECAR_SCHEMA,
        record=picture.record,
        object=PictureObject(
            key=key,
            sha256=stored.sha256,
            size_bytes=stored.size_bytes,
            version_id=stored.version_id,
            pixels_sha256=encoded.pixels_sha256,
        ),
        control_maps=control_maps,
        scores=picture.scores,
        timings=picture.timings,
        attempt=attempt.number,
        worker=attempt.worker_id,
    ).to_bytes()
    # One sidecar per attempt: a second attempt may produce the same bytes, but with other timings.
    sidecar_key = keys.sidecar_key(stem, attempt.lease_id)
    store.put(sidecar_key, sidecar, content_type="application/json")
    return StoredImage(
        key=key,
        url=store.url(key),
        sha256=stored.sha256,
        pixels_sha256=encoded.pixels_sha256,
        size_bytes=stored.size_bytes,
        version_id=stored.version_id,
        width=encoded.width,
        height=encoded.height,
        sidecar_key=sidecar_key,
        sidecar_sha256=hashlib.sha256(sidecar).hexdigest(),
        gpu_seconds=attempt.gpu_seconds,
        timings=picture.timings | {"store_s": round(time.perf_counter() - started, 6)},
        scores=picture.scores,
    )


def put_marked(store: ObjectStore, key: str, data: bytes) -> StoredObject:
    """Store the picture, read it back and check its marks; raises MarksLostError."""
    try:
        stored = store.put(key, data, content_type=provenance.content_type(data))
    except (StorageUnavailableError, ObjectConflictError):
        _refuse_unmarked(store, key)
        raise
    # The store has compared the object it read back with these bytes.
    marks = provenance.verify(data)
    if not marks.ok:
        raise MarksLostError(f"{store.url(key)} has invalid marks: {', '.join(marks.faults)}")
    return stored


def _refuse_unmarked(store: ObjectStore, key: str) -> None:
    """Raise MarksLostError if storage returned an intact picture without its marks.

    Other differing bytes mean an outage or a disk fault, which the caller raises.
    """
    try:
        data = store.get(key)
        provenance.decode(data, max_pixels=LARGEST_PICTURE)
        marks = provenance.verify(data)
    except (StorageUnavailableError, ObjectMissingError, InputImageError):
        return
    if not marks.ok:
        raise MarksLostError(
            f"{store.url(key)} was returned from storage without its marks ({', '.join(marks.faults)}): a proxy or the"
            " server rewrites pictures; turn that off"
        )


def _store_control_maps(store: ObjectStore, stem: str, picture: FinishedPicture) -> tuple[ControlMap, ...]:
    """Store the control maps next to the picture."""
    maps = []
    for n, (annotator, encoded) in enumerate(picture.control_maps):
        stored = put_marked(store, keys.control_map_key(stem, n), encoded.data)
        maps.append(ControlMap(key=stored.key, sha256=stored.sha256, annotator=annotator))
    return tuple(maps)
