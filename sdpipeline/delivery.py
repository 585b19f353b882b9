"""A job's pictures in and out of storage: what it consumes, and its finished picture with record and sidecar."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

from sdpipeline import provenance, scores
from sdpipeline.db.originals import Original
from sdpipeline.db.queue import LeasedJob, StoredImage
from sdpipeline.domain import ImageSource, Json, OutputFormat, canonical, to_document
from sdpipeline.engine import GeneratedImage, Pixels, PreparedRequest
from sdpipeline.errors import InputImageError, ObjectConflictError, ObjectMissingError
from sdpipeline.inputs import LARGEST_INPUT_BYTES, input_key
from sdpipeline.provenance import EncodedImage
from sdpipeline.storage import ForeignObjects, ObjectStore

RECORD_SCHEMA = "sdpipeline/record/1"
SIDECAR_SCHEMA = "sdpipeline/sidecar/1"
CONTROL_MAP_SCHEMA = "sdpipeline/control-map/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """Who makes a picture, when asked by the sidecar."""

    number: int
    lease_id: str
    worker_id: str
    gpu_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A request with its pictures, and what the record will say of each: where it came from and how it was made."""

    prepared: PreparedRequest
    inputs: Mapping[str, Json]


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedPicture:
    """A picture ready to be stored: the same bytes however often that is tried."""

    folder: str
    record: Json
    encoded: EncodedImage
    control_maps: Sequence[tuple[str, EncodedImage]]
    scores: Json
    timings: Json
    attempt: Attempt


def fetch(store: ObjectStore, foreign: ForeignObjects, leased: LeasedJob, *, max_pixels: int) -> Fetched:
    """The job's request with its pictures decoded; raises InputImageError for one that is missing or altered."""
    images: dict[str, Pixels] = {}
    inputs: dict[str, Json] = {}
    for role, source in leased.request.sources().items():
        about = _input(leased, source)
        data = pinned(foreign, about) if "url" in about else _verified(store, about["key"], about["sha256"])
        images[role] = provenance.decode(data, max_pixels=max_pixels)
        # With its parents' records in it, a picture alone is enough to make its whole chain again.
        inputs[role] = about | ({"record": provenance.read_record(data)} if source.stage else {})
    return Fetched(prepared=PreparedRequest(request=leased.request, images=images), inputs=inputs)


def pinned(foreign: ForeignObjects, about: Json) -> bytes:
    """What a record's ``url``, ``version`` and ``sha256`` name; raises InputImageError where it is that no more."""
    url, fix = about["url"], "put it back, or submit it again"
    try:
        found = foreign.read(url, most_bytes=LARGEST_INPUT_BYTES, version=about["version"])
    except ObjectMissingError as error:
        raise InputImageError(f"{error}, although it was when the campaign was submitted ({fix})") from error
    except ObjectConflictError as error:
        raise InputImageError(f"{url} was changed after the campaign was submitted ({fix})") from error
    if hashlib.sha256(found.data).hexdigest() != about["sha256"]:
        raise InputImageError(f"{url} was changed after the campaign was submitted ({fix})")
    return found.data


def finish(
    leased: LeasedJob, inputs: Mapping[str, Json], generated: GeneratedImage, attempt: Attempt
) -> FinishedPicture:
    """Measure, freeze the record and encode.

    Raises BadPictureError for a picture that scores less than the campaign asks for.
    """
    begun = time.perf_counter()
    measured = scores.measure(generated.pixels, zip(leased.request.controlnets, generated.control_maps, strict=False))
    scores.check(measured, leased.rules.get("quality", {}))
    started = time.perf_counter()
    frozen = record(leased, inputs, generated)
    output = leased.request.output
    encoded = provenance.encode(generated.pixels, output=output, record=frozen, from_photograph=_from_outside(leased))
    control_maps = _encoded_control_maps(leased, generated)
    timings = {
        "generate_s": round(attempt.gpu_seconds, 6),
        "measure_s": round(started - begun, 6),
        "encode_s": round(time.perf_counter() - started, 6),
    }
    return FinishedPicture(
        folder=_folder(leased),
        record=frozen,
        encoded=encoded,
        control_maps=control_maps,
        scores=measured,
        timings=timings,
        attempt=attempt,
    )


def deliver(store: ObjectStore, picture: FinishedPicture) -> StoredImage:
    """Store with record and sidecar, and read back; the picture counts only once the database says so.

    May be asked again after a storage outage: what was stored before it is met again byte by byte.
    """
    started = time.perf_counter()
    encoded, attempt = picture.encoded, picture.attempt
    stem = f"{picture.folder}/{encoded.sha256}"
    key = f"{stem}.{encoded.extension}"
    stored = store.put(key, encoded.data, content_type=encoded.content_type)
    control_maps = _deliver_control_maps(store, stem, picture)
    about = {"key": key, "sha256": stored.sha256, "size_bytes": stored.size_bytes, "version_id": stored.version_id}
    sidecar = canonical(
        {
            "schema": SIDECAR_SCHEMA,
            "record": picture.record,
            "object": about | {"pixels_sha256": encoded.pixels_sha256},
            "control_maps": control_maps,
            "scores": picture.scores,
            "timings": picture.timings,
            "attempt": attempt.number,
            "worker": attempt.worker_id,
        }
    )
    # One attempt, one sidecar: a second attempt may make the same bytes, but not in the same time.
    sidecar_key = f"{stem}.{attempt.lease_id[:8]}.json"
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


def reuse(store: ObjectStore, leased: LeasedJob, original: Original, attempt: Attempt, *, engine: str) -> StoredImage:
    """Copy a picture made for the same fingerprint, byte by byte: its record stays the one of the job it was made for.

    Raises InputImageError where it is not what was recorded of it, or not what ``engine`` would make, and
    BadPictureError where it scores less than the campaign asks for.
    """
    started, made, thresholds = time.perf_counter(), original.stored, leased.rules.get("quality", {})
    if thresholds and not made.scores:
        raise InputImageError(f"{made.key} was never measured, and the campaign asks for {', '.join(thresholds)}")
    scores.check(made.scores, thresholds)
    data, told = _verified(store, made.key, made.sha256), _verified_sidecar(store, made)
    if wrong := _unfit(leased, told["record"]["ran"], engine):
        raise InputImageError(f"{made.key} {wrong}")
    # The jobs of one stage that ask for the same picture share its folder, and each has a picture of its own.
    folder = f"{_folder(leased)}/{leased.identity[:16]}"
    key = f"{folder}/{PurePosixPath(made.key).name}"
    stored = store.put(key, data, content_type=provenance.content_type(data))
    control_maps = _copy_control_maps(store, folder, told["control_maps"])
    timings = {"generate_s": 0.0, "encode_s": 0.0}
    own = {
        "object": told["object"] | {"key": key, "version_id": stored.version_id},
        "control_maps": control_maps,
        "timings": timings,
        "attempt": attempt.number,
        "worker": attempt.worker_id,
        "reused_from": {"key": made.key, "sha256": made.sha256, "job": original.job_id}
        | {"fingerprint": leased.fingerprint},
    }
    sidecar, sidecar_key = canonical(told | own), f"{folder}/{made.sha256}.{attempt.lease_id[:8]}.json"
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


def stem(key: str) -> str:
    """What the keys of a picture, its sidecars and its control maps begin with."""
    return key.rpartition(".")[0]


def delete_all(store: ObjectStore, prefix: str, *, but: Collection[str] = ()) -> int:
    """Delete what lies under a prefix, save under the stems ``but``; returns how many objects that were."""
    gone = [key for key in store.list(prefix) if not key.startswith(tuple(but))]
    # The sidecars last: they name the rest.
    for key in sorted(gone, key=lambda each: each.endswith(".json")):
        store.delete(key)
    return len(gone)


def record(leased: LeasedJob, inputs: Mapping[str, Json], generated: GeneratedImage) -> Json:
    """What was asked, what ran and what went in: enough to make the picture again and to explain it."""
    return {
        "schema": RECORD_SCHEMA,
        "team": leased.team,
        "campaign": leased.campaign,
        "edition": leased.edition,
        "stage": leased.stage,
        "row": leased.row_key,
        "seed": leased.seed,
        "identity": leased.identity,
        "fingerprint": leased.fingerprint,
        "asked": to_document(leased.request),
        "ran": generated.ran,
        "inputs": dict(inputs),
        "encoder": provenance.encoder(leased.request.output),
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _encoded_control_maps(leased: LeasedJob, generated: GeneratedImage) -> list[tuple[str, EncodedImage]]:
    """What steered the picture, with the annotator that made it."""
    encoded = []
    for use, pixels in zip(leased.request.controlnets, generated.control_maps, strict=False):
        about = {"schema": CONTROL_MAP_SCHEMA, "annotator": use.annotator, "fingerprint": leased.fingerprint}
        encoded.append((use.annotator, provenance.encode(pixels, output=OutputFormat(), record=about)))
    return encoded


def _deliver_control_maps(store: ObjectStore, stem: str, picture: FinishedPicture) -> list[Json]:
    """They are kept beside the picture."""
    kept = []
    for n, (annotator, encoded) in enumerate(picture.control_maps):
        stored = store.put(f"{stem}.control-{n}.png", encoded.data, content_type=encoded.content_type)
        kept.append({"key": stored.key, "sha256": stored.sha256, "annotator": annotator})
    return kept


def _copy_control_maps(store: ObjectStore, folder: str, made: Sequence[Json]) -> list[Json]:
    kept = []
    for about in made:
        data, key = _verified(store, about["key"], about["sha256"]), f"{folder}/{PurePosixPath(about['key']).name}"
        store.put(key, data, content_type=provenance.content_type(data))
        kept.append(about | {"key": key})
    return kept


def _verified_sidecar(store: ObjectStore, made: StoredImage) -> Json:
    told: Json = json.loads(_verified(store, made.sidecar_key, made.sidecar_sha256))
    return told


def _unfit(leased: LeasedJob, ran: Json, engine: str) -> str | None:
    """Why a picture of the same fingerprint will not do: it is a load test's, was not judged, or not made strictly."""
    if ran["engine"] != engine:
        return f"was made by the engine {ran['engine']!r}, which is not {engine!r}"
    seen = {each["digest"] for each in ran.get("safety_checkers", ())}
    if unseen := [each["alias"] for each in leased.rules.get("safety", ()) if each["digest"] not in seen]:
        return f"was not shown to safety checker {', '.join(unseen)}"
    if leased.request.exact and ran.get("reproducibility") != "strict":
        return "was not made strictly"
    return None


def _folder(leased: LeasedJob) -> str:
    return f"{leased.team}/{leased.campaign}/{leased.stage}/{leased.fingerprint}"


def _verified(store: ObjectStore, key: str, sha256: str) -> bytes:
    try:
        data = store.get(key)
    except ObjectMissingError as error:
        raise InputImageError(f"{key} is not in storage") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise InputImageError(f"{key} was altered in storage: its SHA-256 is not {sha256}")
    return data


def _input(leased: LeasedJob, source: ImageSource) -> Json:
    if source.url is not None:
        return {"url": source.url, "version": source.version, "sha256": source.digest}
    if source.stage is None:
        return {"key": input_key(source.digest), "sha256": source.digest}
    found = next((parent for parent in leased.parents if parent.stage == source.stage), None)
    if found is None:
        raise InputImageError(f"the picture of stage {source.stage!r} is not recorded")
    about: dict[str, Any] = {"stage": found.stage, "key": found.key, "sha256": found.sha256}
    return about | {"pixels_sha256": found.pixels_sha256, "fingerprint": found.fingerprint}


def _from_outside(leased: LeasedJob) -> bool:
    return any(source.stage is None for source in leased.request.sources().values())
