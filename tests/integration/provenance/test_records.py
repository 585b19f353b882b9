"""Records and sidecars of all releases, validated against the published JSON Schemas."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from sqlalchemy import select

from sdpipeline import provenance
from sdpipeline.db import tables
from sdpipeline.db.audit import AuditLog
from sdpipeline.domain import ControlNetInput, ImageSource, JobSpec, Json, Task, hashed
from sdpipeline.engine.fake import FakeEngine
from sdpipeline.jobs import DeliveryRules
from sdpipeline.provenance import json_schema
from sdpipeline.provenance.record import Record, Sidecar
from sdpipeline.reporting import reproduce
from sdpipeline.storage import LocalStore
from sdpipeline.storage.keys import input_key
from sdpipeline.worker.worker import Worker, WorkerLimits
from tests.factories import CHECKPOINT, job_spec, published, signing_key
from tests.integration.databases import on_sqlite
from tests.integration.engine_requests import (
    adapter,
    controlnet,
    image_of,
    middle_mask,
    noise,
    prepared,
    request,
    results,
)
from tests.integration.previous_release import previous_release

pytestmark = on_sqlite
"""Neither document depends on the database."""


def closed(schema: Json) -> Draft202012Validator:
    """A validator that also rejects keys that the schema does not name."""
    for shape in schema["$defs"].values():
        if "properties" in shape:
            shape["additionalProperties"] = False
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


RECORD = closed(json_schema.record())
SIDECAR = closed(json_schema.sidecar())


def chain(**changes: Any) -> list[JobSpec]:
    """A draft, and a scene made from it with its outline as control map."""
    draft = job_spec("a", **changes)
    source = ImageSource(stage="draft", digest=draft.fingerprint)
    use = ControlNetInput(
        checkpoint=CHECKPOINT, image=source, annotator="canny", annotator_parameters=(("low_threshold", 60),)
    )
    scene = job_spec("a", stage="scene", parents=(draft,), controlnets=(use,), **changes)
    return [draft, scene]


def work(audit: AuditLog, store: LocalStore, *jobs: JobSpec, **options: Any) -> list[Json]:
    """Submit and make these jobs; return the sidecars of all pictures in the order of their jobs."""
    published(audit, jobs, **options)
    limits = WorkerLimits(max_batch=8, lease_ttl_s=60.0, max_pixels=10**7)
    Worker("worker-1", audit, store, FakeEngine(), limits, signing_key()).run()
    with audit.database.read() as connection:
        keys = connection.execute(select(tables.image.c.sidecar_key).order_by(tables.image.c.job_id)).scalars().all()
    return [json.loads(store.get(key)) for key in keys]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "storage")


def test_every_key_of_a_chains_records_and_sidecars_is_published(audit: AuditLog, store: LocalStore) -> None:
    work(audit, store, *chain(), name="made")
    *_, copy = sidecars = work(audit, store, *chain(), name="copied")
    assert len(sidecars) == 4
    assert copy["reused_from"]
    assert copy["record"]["ancestors"]
    assert copy["control_maps"]
    for sidecar in sidecars:
        SIDECAR.validate(sidecar)
        RECORD.validate(provenance.read_record(store.get(sidecar["object"]["key"])))


def test_both_classes_give_back_the_document_they_were_read_from(audit: AuditLog, store: LocalStore) -> None:
    work(audit, store, *chain(), name="made")
    for sidecar in work(audit, store, *chain(), name="copied", rules={"scene": DeliveryRules(include_prompt="hash")}):
        assert Sidecar.from_document(sidecar).to_document() == sidecar
        assert Record.from_document(sidecar["record"]).to_document() == sidecar["record"]


@pytest.mark.parametrize("told", ["hash", "none"])
def test_a_record_without_its_prompts_is_valid_too(audit: AuditLog, store: LocalStore, told: Any) -> None:
    rules = {stage: DeliveryRules(include_prompt=told) for stage in ("draft", "scene")}
    for sidecar in work(audit, store, *chain(negative_prompt="a dog"), rules=rules):
        SIDECAR.validate(sidecar)
        embedded = provenance.read_record(store.get(sidecar["object"]["key"])) or {}
        assert "prompt" not in embedded["asked"]
        RECORD.validate(embedded)


def test_a_reproduction_of_a_submitted_pictures_edit_has_a_valid_record(audit: AuditLog, store: LocalStore) -> None:
    photograph = provenance.encode(noise(), output=job_spec("a").request.output, record={}).data
    store.put(input_key(hashed(photograph)), photograph, content_type="image/png")
    source = ImageSource(digest=hashed(photograph))
    edit: dict[str, Any] = {"task": Task.IMAGE_TO_IMAGE, "image": source, "strength": 0.5}
    (sidecar,) = work(audit, store, job_spec("a", **edit))
    SIDECAR.validate(sidecar)
    again = reproduce.reproduce(
        sidecar["record"],
        FakeEngine(),
        lambda about: store.get(about["key"]),
        original=None,
        pixels_sha256=sidecar["object"]["pixels_sha256"],
    )
    assert again.bit_equal
    record = provenance.read_record(again.data) or {}
    assert record["reproduction_of"]
    RECORD.validate(record)


def test_what_diffusers_ran_is_published(audit: AuditLog, store: LocalStore) -> None:
    (sidecar,) = work(audit, store, job_spec("a"))
    inpainted = request(
        task=Task.INPAINTING,
        controlnets=(controlnet("controlnet-sd1", annotator="canny"),),
        loras=(adapter("lora-sd1", weight=0.5),),
        clip_skip=1,
        profile="fast",
        resize="crop",
    )
    made = image_of(results(prepared(inpainted, image=noise(), mask_image=middle_mask(), controlnets_0=noise(1)))[0])
    assert {"controlnets", "loras", "calls", "unmasked_pixels"} <= made.ran.keys()
    RECORD.validate(sidecar["record"] | {"ran": json.loads(json.dumps(made.ran))})


def test_a_key_that_is_not_published_is_found(audit: AuditLog, store: LocalStore) -> None:
    (sidecar,) = work(audit, store, job_spec("a"))
    assert not SIDECAR.is_valid(sidecar | {"mood": "sunny"})
    assert not RECORD.is_valid(sidecar["record"] | {"ran": sidecar["record"]["ran"] | {"mood": "sunny"}})
    assert Draft202012Validator(json_schema.sidecar()).is_valid(sidecar | {"mood": "sunny"})


def test_a_record_with_the_removed_word_for_reproducibility_is_valid(audit: AuditLog, store: LocalStore) -> None:
    (sidecar,) = work(audit, store, job_spec("a"))
    record = sidecar["record"]
    older = record | {"asked": record["asked"] | {"reproducibility": "fast"}}
    RECORD.validate(older)
    assert Record.from_document(older).to_document() == older
    assert not RECORD.is_valid(record | {"asked": record["asked"] | {"reproducibility": "quick"}})


def test_records_and_sidecars_of_the_previous_release_are_valid(database_url: str, tmp_path: Path) -> None:
    with previous_release(tmp_path, database_url) as previous:
        previous.submit(chains=3, bulk=1)
        previous.start_worker()
        storage = previous.home / "storage"
        until = time.monotonic() + 60
        while len(found := list(storage.rglob("*.json"))) < 6:
            assert time.monotonic() < until, previous.log()
            time.sleep(0.2)
        previous.stop_workers()
    store = LocalStore(storage)
    for path in found:
        sidecar = json.loads(path.read_bytes())
        SIDECAR.validate(sidecar)
        assert Sidecar.from_document(sidecar).to_document() == sidecar
        RECORD.validate(provenance.read_record(store.get(sidecar["object"]["key"])))
