"""Copies of existing pictures for jobs with the same fingerprint."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace

from sdpipeline import provenance
from sdpipeline.db.reuse import Original
from sdpipeline.domain import Json, canonical
from sdpipeline.engine import quality
from sdpipeline.errors import InputImageError
from sdpipeline.jobs import LeasedJob, StoredImage
from sdpipeline.provenance.record import ControlMap, ReusedFrom, Sidecar
from sdpipeline.provenance.signing import SigningKey
from sdpipeline.storage import ObjectStore, keys
from sdpipeline.worker.finished_picture import Attempt, picture_folder
from sdpipeline.worker.inputs import verified
from sdpipeline.worker.picture_storage import put_marked


def copy_picture(
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
        raise InputImageError(f"{made.key} has no quality scores, but the campaign requires {', '.join(thresholds)}")
    quality.check(made.scores, thresholds)
    data, original_sidecar = verified(store, made.key, made.sha256), _sidecar_of(store, made)
    if wrong := _unusable(leased, original_sidecar["record"], engine) or _unmarked(data, signing, trust_anchors):
        raise InputImageError(f"{made.key} {wrong}")
    # Jobs of one stage that ask for the same picture share its folder; each has its own copy.
    folder = keys.copy_folder(picture_folder(leased), leased.identity)
    key = keys.moved_to(folder, made.key)
    stored = put_marked(store, key, data)
    timings = {"generate_s": 0.0, "encode_s": 0.0}
    copied = Sidecar.from_document(original_sidecar)
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
    sidecar = canonical(original_sidecar | own.to_document())
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


def _copy_control_maps(store: ObjectStore, folder: str, originals: Sequence[ControlMap]) -> tuple[ControlMap, ...]:
    kept = []
    for original in originals:
        data, key = verified(store, original.key, original.sha256), keys.moved_to(folder, original.key)
        store.put(key, data, content_type=provenance.content_type(data))
        kept.append(replace(original, key=key))
    return tuple(kept)


def _sidecar_of(store: ObjectStore, made: StoredImage) -> Json:
    sidecar: Json = json.loads(verified(store, made.sidecar_key, made.sidecar_sha256))
    return sidecar


def _unmarked(data: bytes, signing: SigningKey, trust_anchors: str) -> str | None:
    """Return the reason why a copy would fail verification, or None.

    An earlier release without signatures may have made it, its certificate may have expired, or its signer may no
    longer be trusted.
    """
    marks = provenance.verify(data, trust_anchors=trust_anchors)
    if not marks.ok:
        return f"has invalid marks: {', '.join(marks.faults)}"
    if marks.development_key and not signing.development:
        return "was signed by a development key"
    if trust_anchors and marks.c2pa != "trusted":
        return f"was signed by {marks.signed_by}, which no root in SDP_SIGNING__TRUST_FILE certifies"
    return None


def _unusable(leased: LeasedJob, made: Json, engine: str) -> str | None:
    """Return the reason why a picture with the same fingerprint cannot be reused, or None.

    It comes from a load test, was not safety-checked, was not made strictly, or discloses more of its prompts than
    this campaign allows.
    """
    ran, disclosure = made["ran"], leased.rules.include_prompt
    if ran["engine"] != engine:
        return f"was made by the engine {ran['engine']!r}, which is not {engine!r}"
    seen = {each["digest"] for each in ran.get("safety_checkers", ())}
    if unseen := [each.checker.alias for each in leased.rules.safety if each.checker.digest not in seen]:
        return f"was not checked by safety checker {', '.join(unseen)}"
    if leased.request.exact and ran.get("reproducibility") != "strict":
        return "was not generated with reproducibility: strict"
    if provenance.discloses_more(provenance.include_prompt(made), disclosure):
        return f"discloses more of its prompt than provenance.include_prompt: {disclosure} allows"
    return None
