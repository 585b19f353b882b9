"""Builders of requests and jobs, and job transitions, for tests: every argument has a suitable default."""

from __future__ import annotations

import atexit
import hashlib
import json
import secrets
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Any

from sqlalchemy import select, update

from sdpipeline.batching import batch_key
from sdpipeline.campaigns import expand, loader, yaml_source
from sdpipeline.campaigns.inputs import InputFolder
from sdpipeline.campaigns.loader import Campaign, Catalog
from sdpipeline.campaigns.policy import Rules
from sdpipeline.db import audit as audit_rows
from sdpipeline.db import leasing, queue, staging, tables
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.budgets import Charge
from sdpipeline.db.connection import Database
from sdpipeline.db.queries import Progress
from sdpipeline.db.submit import Publication, Submitted, submit
from sdpipeline.domain import (
    CheckpointRef,
    GenerationRequest,
    ImageSource,
    JobSpec,
    Json,
    Status,
    Task,
    canonical,
    fingerprint,
)
from sdpipeline.engine.checkpoints import CheckpointFiles
from sdpipeline.errors import CampaignError
from sdpipeline.jobs import DeliveryRules, Lease, LeasedJob, StoredImage
from sdpipeline.provenance.signing import SigningKey, development_key
from sdpipeline.storage import ObjectStore


@cache
def signing_key() -> SigningKey:
    """A development key of this process."""
    folder = Path(tempfile.mkdtemp(prefix="sdp-test-keys-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return development_key(folder)


CHECKPOINT = CheckpointRef(alias="shapes", digest="c0" * 32)


def checkpoint_files(
    alias: str, *, kind: str = "checkpoint", family: str = "sd1", scale: int = 1, digest: str = ""
) -> CheckpointFiles:
    """Weights that do not exist as files."""
    return CheckpointFiles(
        alias=alias,
        digest=digest or (alias.encode().hex() * 64)[:64],
        kind=kind,
        family=family,
        directory=Path("/weights") / alias,
        scale=scale,
        manifest={},
        size_bytes=1,
    )


CATALOG = {
    files.alias: files
    for files in (
        checkpoint_files("shapes"),
        checkpoint_files("shapes-canny", kind="controlnet"),
        checkpoint_files("upscaler", family="upscale", scale=4),
        checkpoint_files("flux", family="flux"),
        checkpoint_files("depths", kind="annotator", family="depth"),
        checkpoint_files("style", kind="lora"),
        checkpoint_files("toy", kind="textual-inversion"),
        checkpoint_files("face", kind="ip-adapter"),
        checkpoint_files("sharp", kind="vae"),
    )
}
"""Checkpoints that the campaigns of tests may name."""


def progress(**counts: int) -> Progress:
    """A campaign's progress with the given number of jobs per status."""
    spent: dict[str, Any] = {"images": 0, "gpu_seconds": 0.0, "cost": 0.0}
    about: dict[str, Any] = {"status": "active", "budget": None, "paused_because": None}
    return Progress(id=1, name="spring", version=3, counts=counts, **spent, **about)


def input_folder(folder: Path, *, max_pixels: int = 10_000_000) -> InputFolder:
    """Folder of the pictures and tables of a test's campaign."""
    return InputFolder(folder, max_pixels=max_pixels)


def campaign_of(
    text: str, folder: Path = Path("/nowhere"), *, catalog: Catalog = CATALOG, deployment: Rules | None = None
) -> Campaign:
    """The campaign file ``text``, validated as a file in ``folder``; name and checkpoint are given."""
    return loader.check(_located(text), catalog, input_folder(folder), deployment=deployment)


def jobs_of(
    text: str, folder: Path = Path("/nowhere"), *, catalog: Catalog = CATALOG, deployment: Rules | None = None
) -> list[JobSpec]:
    """Every job of such a campaign."""
    found = campaign_of(text, folder, catalog=catalog, deployment=deployment)
    return list(expand.expand(found, input_folder(folder)))


def mistakes_of(text: str, folder: Path = Path("/nowhere"), *, deployment: Rules | None = None) -> list[str]:
    """Mistakes in the campaign file as they are printed, without its name: ``line:column: key: message (fix)``."""
    try:
        found = campaign_of(text, folder, deployment=deployment)
        expand.check(found, input_folder(folder))
    except CampaignError as error:
        return [str(mistake).removeprefix("spring.yaml:") for mistake in error.mistakes]
    return []


def _located(text: str) -> yaml_source.Located:
    body = dedent(text).lstrip("\n")
    head = "" if body.startswith("name:") else "name: spring\ncheckpoint: shapes\n"
    return yaml_source.parse(head + body, file="spring.yaml")


def request(prompt: str = "a red circle", **changes: Any) -> GenerationRequest:
    """A small text-to-image request."""
    fields: dict[str, Any] = {
        "task": Task.TEXT_TO_IMAGE,
        "checkpoint": CHECKPOINT,
        "prompt": prompt,
        "seed": 0,
        "width": 64,
        "height": 64,
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
        "scheduler": "dpmpp-2m",
    }
    return GenerationRequest(**fields | changes)


def job_spec(
    row_key: str = "", *, stage: str = "draft", parents: tuple[JobSpec, ...] = (), seed: int = 0, **changes: Any
) -> JobSpec:
    """One job; ``changes`` go to its request, and the first parent's picture becomes its ``image``."""
    if parents:
        source = ImageSource(stage=parents[0].stage, digest=parents[0].fingerprint)
        changes = {"task": Task.IMAGE_TO_IMAGE, "image": source, "strength": 0.5} | changes
    prompt = str(changes.pop("prompt", f"a picture of {row_key}"))
    asked = request(prompt, seed=seed, **changes)
    return JobSpec(
        stage=stage,
        depth=1 + max((parent.depth for parent in parents), default=-1),
        row_key=row_key,
        variables=(("sku", row_key),),
        axes=(),
        seed=seed,
        request=asked,
        fingerprint=fingerprint(asked),
        batch_key=batch_key(asked),
        parents=tuple((parent.stage, parent.identity) for parent in parents),
    )


def chains(count: int, *stages: str, **changes: Any) -> Iterator[JobSpec]:
    """``count`` chains with one job per stage; ``changes`` go to every request."""
    for number in range(count):
        above: tuple[JobSpec, ...] = ()
        for stage in stages or ("draft",):
            above = (job_spec(f"row-{number}", stage=stage, parents=above, **changes),)
            yield above[0]


def stored_image(leased: LeasedJob, store: ObjectStore | None = None) -> StoredImage:
    """The stored image that a worker would record for this job; it is really stored if ``store`` is given."""
    folder = f"default/{leased.campaign}/{leased.stage}/{leased.fingerprint}"
    picture, sidecar = f"picture {leased.fingerprint}".encode(), canonical({"of": leased.fingerprint})
    sha256, sidecar_sha256 = hashlib.sha256(picture).hexdigest(), hashlib.sha256(sidecar).hexdigest()
    key, sidecar_key = f"{folder}/{sha256}.png", f"{folder}/{sha256}.json"
    if store is not None:
        store.put(key, picture, content_type="image/png")
        store.put(sidecar_key, sidecar, content_type="application/json")
    return StoredImage(
        key=key,
        url=f"file:///storage/{key}",
        sha256=sha256,
        pixels_sha256=sha256,
        size_bytes=len(picture),
        version_id=None,
        width=64,
        height=64,
        sidecar_key=sidecar_key,
        sidecar_sha256=sidecar_sha256,
        gpu_seconds=0.1,
        timings={"generate_s": 0.1},
    )


def publication(**changes: Any) -> Publication:
    """A version of the campaign ``spring``; ``source`` is the file's text."""
    fields: dict[str, Any] = {"team": "default", "name": "spring", "priority": 100, "max_attempts": 3}
    return Publication(**{"source": secrets.token_hex(8)} | fields | changes)


def published(
    audit: AuditLog,
    jobs: Iterable[JobSpec],
    *,
    prune: bool = False,
    rules: Mapping[str, DeliveryRules] | None = None,
    **changes: Any,
) -> Submitted:
    """Submit these jobs as one version of a campaign; ``rules`` are by stage."""
    asked = publication(**changes)
    with staging.prepared(jobs, rules=rules, held=asked.budget is not None) as ready, audit.transaction() as tx:
        return submit(tx, ready, asked, prune=prune)


def leased(audit: AuditLog, *, worker_id: str = "worker-1", limit: int = 8, **options: Any) -> Lease:
    """Take a lease; the test expects to get one."""
    lease = try_lease(audit, worker_id=worker_id, limit=limit, **options)
    assert lease is not None
    return lease


def try_lease(audit: AuditLog, *, worker_id: str = "worker-1", limit: int = 8, **options: Any) -> Lease | None:
    """Take a lease of a minute, or return None if no job is ready."""
    with audit.transaction() as tx:
        ttl_s = float(options.pop("ttl_s", 60.0))
        return leasing.take_lease(tx, worker_id=worker_id, limit=limit, ttl_s=ttl_s, **options)


def completed(
    audit: AuditLog, lease: Lease, store: ObjectStore | None = None, *, gpu_second_cost: float = 0.0
) -> list[bool]:
    """Complete every job of a lease as a worker would."""
    done = []
    for job in lease.jobs:
        with audit.transaction() as tx:
            stored = stored_image(job, store)
            cost = stored.gpu_seconds * gpu_second_cost
            charge = Charge(worker_id="worker-1", gpu_seconds=stored.gpu_seconds, cost=cost)
            done.append(queue.complete(tx, lease_id=lease.id, leased=job, stored=stored, charge=charge))
    with audit.database.write() as connection:
        leasing.close_lease(connection, lease.id)
    return done


def failed(audit: AuditLog, lease: Lease, job: LeasedJob, status: Status = Status.FAILED, **options: Any) -> bool:
    """End one attempt with an error."""
    with audit.transaction() as tx:
        about: dict[str, Any] = {"error_kind": "BadPicture", "error": "it is black"}
        about["charge"] = Charge(worker_id="worker-1")
        return queue.fail(tx, lease_id=lease.id, leased=job, status=status, **about | options)


def expired(audit: AuditLog, *leases: Lease) -> int:
    """Let these leases expire and reap them."""
    with audit.database.write() as connection:
        ids = [lease.id for lease in leases]
        connection.execute(update(tables.lease).where(tables.lease.c.id.in_(ids)).values(expires_at=0.0))
    with audit.transaction() as tx:
        return queue.reap(tx)


def statuses(database: Database, *columns: str, campaign: int | None = None) -> list[Any]:
    """The jobs' statuses, or other columns, ordered by id."""
    wanted = [tables.job.c[name] for name in columns or ("status",)]
    statement = select(*wanted).order_by(tables.job.c.id)
    if campaign is not None:
        statement = statement.where(tables.job.c.campaign_id == campaign)
    with database.read() as connection:
        rows = connection.execute(statement).all()
    return [row[0] if len(wanted) == 1 else tuple(row) for row in rows]


def events(database: Database) -> list[Json]:
    """Every audit event, chain by chain."""
    with database.read() as connection:
        return [json.loads(row.body) for row in audit_rows.events(connection)]


def damaged(signed: bytes, *, cut: bool = False) -> bytes:
    """A signed PNG that decodes, but whose marks are truncated or cannot be decoded."""
    start = signed.index(b"caBX") - 4
    end = start + 8 + int.from_bytes(signed[start : start + 4], "big")
    marks = bytearray(signed[start + 4 : end])
    if cut:
        del marks[len(marks) // 2 :]
    else:
        marks[marks.index(b"djson", marks.index(b"sdpipeline.record")) - 1] = 0xFF
    chunk = (len(marks) - 4).to_bytes(4, "big") + marks + zlib.crc32(marks).to_bytes(4, "big")
    return signed[:start] + chunk + signed[end + 4 :]
