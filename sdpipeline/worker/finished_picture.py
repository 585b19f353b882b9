"""Finished picture: measured, recorded, encoded and signed, ready to be stored."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sdpipeline import provenance
from sdpipeline.db.budgets import Charge
from sdpipeline.domain import Json, OutputFormat
from sdpipeline.engine import GeneratedImage, quality
from sdpipeline.jobs import LeasedJob
from sdpipeline.provenance import EncodedImage
from sdpipeline.provenance.record import CONTROL_MAP_SCHEMA, RECORD_SCHEMA, Record
from sdpipeline.provenance.signing import SigningKey
from sdpipeline.storage import keys
from sdpipeline.worker.inputs import Consumed


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """Attempt that made a picture, as the sidecar records it, with its price."""

    number: int
    lease_id: str
    worker_id: str
    gpu_seconds: float
    cost: float = 0.0

    @property
    def charge(self) -> Charge:
        """Charge of the attempt to its campaign's budgets."""
        return Charge(worker_id=self.worker_id, gpu_seconds=self.gpu_seconds, cost=self.cost)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryRequest:
    """Picture from the engine, with the job and the attempt that it is recorded for."""

    leased: LeasedJob
    consumed: Consumed
    generated: GeneratedImage
    attempt: Attempt


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


def finish(request: DeliveryRequest, signing: SigningKey) -> FinishedPicture:
    """Measure quality, freeze the record, encode and sign; no byte of the file may change after that.

    Raises BadPictureError if a picture scores below the campaign's thresholds, and SigningUnavailableError.
    """
    leased, consumed, generated = request.leased, request.consumed, request.generated
    begun = time.perf_counter()
    measured = quality.measure(generated.pixels, zip(leased.request.controlnets, generated.control_maps, strict=False))
    quality.check(measured, leased.rules.quality.to_document())
    started = time.perf_counter()
    frozen = record(request)
    shown, output = provenance.disclosed(frozen), leased.request.output
    encoded = provenance.encode(generated.pixels, output=output, record=shown, from_photograph=consumed.edits)
    encoded_at = time.perf_counter()
    signed = provenance.sign(
        encoded, key=signing, record=shown, ingredients=consumed.ingredients, from_photograph=consumed.edits
    )
    timings = {
        "generate_s": round(request.attempt.gpu_seconds, 6),
        "measure_s": round(started - begun, 6),
        "encode_s": round(encoded_at - started, 6),
        "sign_s": round(time.perf_counter() - encoded_at, 6),
    }
    return FinishedPicture(
        folder=picture_folder(leased),
        record=frozen,
        encoded=signed,
        control_maps=_signed_control_maps(request, signing),
        scores=measured,
        timings=timings,
        attempt=request.attempt,
    )


def record(request: DeliveryRequest) -> Json:
    """Return the record of a picture: request, execution and inputs, enough to reproduce and to explain it.

    Prompts are always included: the sidecar keeps them, whatever the file contains.
    """
    leased, consumed = request.leased, request.consumed
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
        ran=request.generated.ran,
        inputs=consumed.inputs,
        encoder=provenance.encoder(leased.request.output),
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        include_prompt=leased.rules.include_prompt,
        ancestors=consumed.ancestors,
    ).to_document()


def picture_folder(leased: LeasedJob) -> str:
    """Return the folder of a job's picture in storage."""
    return keys.picture_folder(
        team=leased.team, campaign=leased.campaign, stage=leased.stage, fingerprint=leased.fingerprint
    )


def _signed_control_maps(request: DeliveryRequest, signing: SigningKey) -> list[tuple[str, EncodedImage]]:
    """Return the control maps with their annotators, marked like the pictures they were made from."""
    signed = []
    sources = {each.role: each.data for each in request.consumed.ingredients}
    maps = zip(request.leased.request.controlnets, request.generated.control_maps, strict=False)
    for n, (use, pixels) in enumerate(maps):
        about = {"schema": CONTROL_MAP_SCHEMA, "annotator": use.annotator, "fingerprint": request.leased.fingerprint}
        source = sources.get(f"controlnets.{n}")
        outside = source is not None and provenance.digital_source_type(source) != provenance.GENERATED
        encoded = provenance.encode(pixels, output=OutputFormat(), record=about, from_photograph=outside)
        signed.append((use.annotator, provenance.sign(encoded, key=signing, record=about, from_photograph=outside)))
    return signed
