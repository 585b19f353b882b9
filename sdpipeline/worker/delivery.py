"""Delivery of a job's finished picture: encode, mark, sign, store with its sidecar, read back."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Protocol

from sdpipeline import provenance
from sdpipeline.db import queue as jobs
from sdpipeline.db import workers
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.budgets import Charge
from sdpipeline.db.reuse import Original
from sdpipeline.domain import Json, OutputFormat, canonical
from sdpipeline.engine import GeneratedImage, quality
from sdpipeline.errors import (
    DatabaseUnavailableError,
    InputImageError,
    MarksLostError,
    ObjectConflictError,
    ObjectMissingError,
    StorageUnavailableError,
)
from sdpipeline.jobs import LeasedJob, StoredImage
from sdpipeline.provenance import LARGEST_PICTURE, EncodedImage
from sdpipeline.provenance.record import (
    CONTROL_MAP_SCHEMA,
    RECORD_SCHEMA,
    SIDECAR_SCHEMA,
    ControlMap,
    PictureObject,
    Record,
    ReusedFrom,
    Sidecar,
)
from sdpipeline.provenance.signing import SigningKey
from sdpipeline.storage import ObjectStore, StoredObject, keys
from sdpipeline.worker.inputs import Consumed, verified


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """Attempt that made a picture, as the sidecar records it."""

    number: int
    lease_id: str
    worker_id: str
    gpu_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedPicture:
    """Picture ready to be stored; its bytes stay the same on every try."""

    folder: str
    record: Json
    encoded: EncodedImage
    control_maps: Sequence[tuple[str, EncodedImage]]
    scores: Json
    timings: Json
    attempt: Attempt


class Deliverer(Protocol):
    """Interface that turns an engine's output into stored pictures. Called from several threads."""

    def finish(
        self, leased: LeasedJob, consumed: Consumed, generated: GeneratedImage, attempt: Attempt
    ) -> FinishedPicture:
        """See :func:`finish`."""

    def deliver(self, picture: FinishedPicture) -> StoredImage:
        """See :func:`deliver`."""

    def complete(self, lease_id: str, leased: LeasedJob, stored: StoredImage, charge: Charge) -> bool:
        """Record the picture by :func:`sdpipeline.db.queue.complete` in a separate transaction."""

    def silent_s(self) -> float:
        """Return the seconds since the last sign of life of the delivering process; 0 while it runs, also during an
        outage."""


@dataclass(frozen=True, slots=True)
class LocalDeliverer:
    """Deliver in this process."""

    store: ObjectStore
    signing: SigningKey
    audit: AuditLog
    _shown: dict[str, Mapping[str, str]] = field(default_factory=dict)

    def finish(
        self, leased: LeasedJob, consumed: Consumed, generated: GeneratedImage, attempt: Attempt
    ) -> FinishedPicture:
        """See :func:`finish`."""
        return finish(leased, consumed, generated, attempt, self.signing)

    def deliver(self, picture: FinishedPicture) -> StoredImage:
        """Call :func:`deliver`; ``status`` shows what storage was found to refuse."""
        stored = deliver(self.store, picture)
        losses, worker_id = self.store.losses(), picture.attempt.worker_id
        if losses != self._shown.get(worker_id, {}):
            with suppress(DatabaseUnavailableError), self.audit.database.write() as connection:
                workers.set_storage_losses(connection, worker_id, losses)
                self._shown[worker_id] = losses
        return stored

    def complete(self, lease_id: str, leased: LeasedJob, stored: StoredImage, charge: Charge) -> bool:
        """See :meth:`Deliverer.complete`."""
        with self.audit.transaction() as tx:
            return jobs.complete(tx, lease_id=lease_id, leased=leased, stored=stored, charge=charge)

    def silent_s(self) -> float:
        """Return 0: this process delivers."""
        return 0.0

    def recorded(self, leased: LeasedJob, stored: StoredImage) -> bool:
        """Return True if the database has recorded the picture of this attempt."""
        with self.audit.database.read() as connection:
            return jobs.recorded(connection, leased, stored)


def finish(
    leased: LeasedJob, consumed: Consumed, generated: GeneratedImage, attempt: Attempt, signing: SigningKey
) -> FinishedPicture:
    """Measure quality, freeze the record, encode and sign; no byte of the file may change after that.

    Raises BadPictureError if a picture scores below the campaign's thresholds, and SigningUnavailableError.
    """
    begun = time.perf_counter()
    measured = quality.measure(generated.pixels, zip(leased.request.controlnets, generated.control_maps, strict=False))
    quality.check(measured, leased.rules.quality.to_document())
    started = time.perf_counter()
    frozen = record(leased, consumed, generated)
    shown, output = provenance.disclosed(frozen), leased.request.output
    encoded = provenance.encode(generated.pixels, output=output, record=shown, from_photograph=consumed.edits)
    encoded_at = time.perf_counter()
    signed = provenance.sign(
        encoded, key=signing, record=shown, ingredients=consumed.ingredients, from_photograph=consumed.edits
    )
    timings = {
        "generate_s": round(attempt.gpu_seconds, 6),
        "measure_s": round(started - begun, 6),
        "encode_s": round(encoded_at - started, 6),
        "sign_s": round(time.perf_counter() - encoded_at, 6),
    }
    return FinishedPicture(
        folder=_folder(leased),
        record=frozen,
        encoded=signed,
        control_maps=_signed_control_maps(leased, consumed, generated, signing),
        scores=measured,
        timings=timings,
        attempt=attempt,
    )


def deliver(store: ObjectStore, picture: FinishedPicture) -> StoredImage:
    """Store the picture with record and sidecar, read back and verify; it counts only once the database has recorded
    it.

    The call may be repeated after a storage outage: objects stored earlier are compared byte by byte. Raises
    MarksLostError if storage returns a picture without its marks.
    """
    started = time.perf_counter()
    encoded, attempt = picture.encoded, picture.attempt
    stem = keys.picture_stem(picture.folder, encoded.sha256)
    key = keys.picture_key(stem, encoded.extension)
    stored = _put_marked(store, key, encoded.data)
    control_maps = _deliver_control_maps(store, stem, picture)
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


def reuse(
    store: ObjectStore,
    leased: LeasedJob,
    original: Original,
    attempt: Attempt,
    *,
    engine: str,
    signing: SigningKey,
    trust_anchors: str = "",
) -> StoredImage:
    """Copy a picture with the same fingerprint, byte by byte; its record stays that of the job that made it.

    Raises InputImageError in three cases: the picture differs from its record, ``engine`` would not make it, or its
    signature does not meet what ``signing`` and the trusted roots require. Raises BadPictureError if it scores below
    the campaign's thresholds.
    """
    started, made, thresholds = time.perf_counter(), original.stored, leased.rules.quality.to_document()
    if thresholds and not made.scores:
        raise InputImageError(f"{made.key} was never measured, and the campaign asks for {', '.join(thresholds)}")
    quality.check(made.scores, thresholds)
    data, document = verified(store, made.key, made.sha256), _sidecar_document(store, made)
    if wrong := _unfit(leased, document["record"], engine) or _unmarked(data, signing, trust_anchors):
        raise InputImageError(f"{made.key} {wrong}")
    # Jobs of one stage that ask for the same picture share its folder; each has its own copy.
    folder = keys.copy_folder(_folder(leased), leased.identity)
    key = keys.moved_to(folder, made.key)
    stored = _put_marked(store, key, data)
    timings = {"generate_s": 0.0, "encode_s": 0.0}
    copied = Sidecar.from_document(document)
    own = replace(
        copied,
        object=replace(copied.object, key=key, version_id=stored.version_id),
        control_maps=_copy_control_maps(store, folder, copied.control_maps),
        timings=timings,
        attempt=attempt.number,
        worker=attempt.worker_id,
        reused_from=ReusedFrom(key=made.key, sha256=made.sha256, job=original.job_id, fingerprint=leased.fingerprint),
    )
    # Fields that another release wrote stay.
    sidecar = canonical(document | own.to_document())
    sidecar_key = keys.sidecar_key(keys.picture_stem(folder, made.sha256), attempt.lease_id)
    store.put(sidecar_key, sidecar, content_type="application/json")
    return replace(
        made,
        key=key,
        url=store.url(key),
        version_id=stored.version_id,
        sidecar_key=sidecar_key,
        sidecar_sha256=hashlib.sha256(sidecar).hexdigest(),
        gpu_seconds=0.0,
        timings=timings | {"store_s": round(time.perf_counter() - started, 6)},
        reused_from=made.key,
    )


def record(leased: LeasedJob, consumed: Consumed, generated: GeneratedImage) -> Json:
    """Return the record of a picture: request, execution and inputs, enough to reproduce and to explain it.

    Prompts are always included: the sidecar keeps them, whatever the file contains.
    """
    return Record(
        schema=RECORD_SCHEMA,
        team=leased.team,
        campaign=leased.campaign,
        edition=leased.edition,
        stage=leased.stage,
        row=leased.row_key,
        seed=leased.seed,
        identity=leased.identity,
        fingerprint=leased.fingerprint,
        asked=leased.request,
        ran=generated.ran,
        inputs=consumed.inputs,
        encoder=provenance.encoder(leased.request.output),
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        include_prompt=leased.rules.include_prompt,
        ancestors=consumed.ancestors,
    ).to_document()


def _put_marked(store: ObjectStore, key: str, data: bytes) -> StoredObject:
    """Store the picture, read it back and check its marks; raises MarksLostError."""
    try:
        stored = store.put(key, data, content_type=provenance.content_type(data))
    except (StorageUnavailableError, ObjectConflictError):
        _refuse_unmarked(store, key)
        raise
    # The store has compared the object it read back with these bytes.
    marks = provenance.verify(data)
    if not marks.ok:
        raise MarksLostError(f"{store.url(key)} is not marked as it should be: {', '.join(marks.faults)}")
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
            f"{store.url(key)} came back from storage without its marks ({', '.join(marks.faults)}): something on the"
            " way there rewrites pictures; have it pass them on as they are"
        )


def _signed_control_maps(
    leased: LeasedJob, consumed: Consumed, generated: GeneratedImage, signing: SigningKey
) -> list[tuple[str, EncodedImage]]:
    """Return the control maps with their annotators, marked like the pictures they were made from."""
    signed = []
    sources = {each.role: each.data for each in consumed.ingredients}
    for n, (use, pixels) in enumerate(zip(leased.request.controlnets, generated.control_maps, strict=False)):
        about = {"schema": CONTROL_MAP_SCHEMA, "annotator": use.annotator, "fingerprint": leased.fingerprint}
        source = sources.get(f"controlnets.{n}")
        outside = source is not None and provenance.digital_source_type(source) != provenance.GENERATED
        encoded = provenance.encode(pixels, output=OutputFormat(), record=about, from_photograph=outside)
        signed.append((use.annotator, provenance.sign(encoded, key=signing, record=about, from_photograph=outside)))
    return signed


def _deliver_control_maps(store: ObjectStore, stem: str, picture: FinishedPicture) -> tuple[ControlMap, ...]:
    """Store the control maps next to the picture."""
    kept = []
    for n, (annotator, encoded) in enumerate(picture.control_maps):
        stored = _put_marked(store, keys.control_map_key(stem, n), encoded.data)
        kept.append(ControlMap(key=stored.key, sha256=stored.sha256, annotator=annotator))
    return tuple(kept)


def _copy_control_maps(store: ObjectStore, folder: str, originals: Sequence[ControlMap]) -> tuple[ControlMap, ...]:
    kept = []
    for original in originals:
        data, key = verified(store, original.key, original.sha256), keys.moved_to(folder, original.key)
        store.put(key, data, content_type=provenance.content_type(data))
        kept.append(replace(original, key=key))
    return tuple(kept)


def _sidecar_document(store: ObjectStore, made: StoredImage) -> Json:
    document: Json = json.loads(verified(store, made.sidecar_key, made.sidecar_sha256))
    return document


def _unmarked(data: bytes, signing: SigningKey, trust_anchors: str) -> str | None:
    """Return the reason why a copy would fail verification, or None.

    An earlier release without signatures may have made it, its certificate may have expired, or its signer may no
    longer be trusted.
    """
    marks = provenance.verify(data, trust_anchors=trust_anchors)
    if not marks.ok:
        return f"is not marked as it should be: {', '.join(marks.faults)}"
    if marks.development_key and not signing.development:
        return "was signed by a development key"
    if trust_anchors and marks.c2pa != "trusted":
        return f"was signed by {marks.signed_by}, whom no root of SDP_SIGNING__TRUST_FILE stands behind"
    return None


def _unfit(leased: LeasedJob, made: Json, engine: str) -> str | None:
    """Return the reason why a picture with the same fingerprint cannot be reused, or None.

    It comes from a load test, was not safety-checked, was not made strictly, or discloses more of its prompts than
    this campaign allows.
    """
    ran, told = made["ran"], leased.rules.include_prompt
    if ran["engine"] != engine:
        return f"was made by the engine {ran['engine']!r}, which is not {engine!r}"
    seen = {each["digest"] for each in ran.get("safety_checkers", ())}
    if unseen := [each.checker.alias for each in leased.rules.safety if each.checker.digest not in seen]:
        return f"was not shown to safety checker {', '.join(unseen)}"
    if leased.request.exact and ran.get("reproducibility") != "strict":
        return "was not made strictly"
    if provenance.tells_more(provenance.include_prompt(made), told):
        return f"tells more of its prompt than provenance.include_prompt: {told} allows"
    return None


def _folder(leased: LeasedJob) -> str:
    return keys.picture_folder(
        team=leased.team, campaign=leased.campaign, stage=leased.stage, fingerprint=leased.fingerprint
    )
