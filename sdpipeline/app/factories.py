"""Factories: build engines, workers and delivery processes from settings."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sdpipeline import __version__
from sdpipeline.app.checkpoints import runnable_checkpoints
from sdpipeline.app.keys import trust_anchors
from sdpipeline.app.stores import s3_options
from sdpipeline.batching import split
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database
from sdpipeline.db.leasing import AgingPolicy
from sdpipeline.domain import CheckpointRef
from sdpipeline.engine import Engine
from sdpipeline.engine.checkpoints import CheckpointFiles
from sdpipeline.engine.devices import devices
from sdpipeline.errors import CheckpointError, Mistake, SettingsError
from sdpipeline.provenance.signing import SigningKey
from sdpipeline.settings import Settings
from sdpipeline.storage import ForeignObjects, ObjectStore
from sdpipeline.worker.circuit_breaker import CircuitBreaker
from sdpipeline.worker.delivery_process import Bounds, DeliveryProcess, Destination
from sdpipeline.worker.watchdog import BatchTimings
from sdpipeline.worker.worker import Worker, WorkerLimits

if TYPE_CHECKING:
    from sdpipeline.engine.stepwise import Stepwise

ENGINE_PACKAGES = (
    "torch", "diffusers", "transformers", "accelerate", "peft", "huggingface_hub", "greenlet", "tqdm", "cachetools",
)  # fmt: skip
"""Modules that the extra ``engine`` installs."""


def check_engine(settings: Settings) -> None:
    """Raise SettingsError if a package of the extra ``engine`` is missing. Imports none: torch alone takes seconds."""
    missing = [name for name in ENGINE_PACKAGES if find_spec(name) is None]
    if missing and settings.engine.fake_seconds_per_batch is None:
        message = f"this machine cannot generate pictures: no {missing[0]}"
        raise SettingsError(Mistake(message=message, fix="pip install 'sdpipeline[engine]'"))


def check_quantization(settings: Settings, device: str | None = None) -> None:
    """Raise SettingsError if this device, or any of this machine, cannot do what ``SDP_ENGINE__QUANTIZE`` asks."""
    if settings.engine.quantize is None or settings.engine.fake_seconds_per_batch is not None:
        return
    _need_engine()
    from sdpipeline.engine.stepwise import check_quantization as check

    for each in [device] if device else sorted(set(devices(settings))):
        check(settings.engine.quantize, each, settings.engine.dtype)


def build_engine(settings: Settings, device: str, database: Database | None, *, dtype: str | None = None) -> Engine:
    """Build the diffusers engine, or its double if the settings ask for it. Imports torch only here."""
    if settings.engine.fake_seconds_per_batch is not None:
        from sdpipeline.engine.fake import FakeEngine

        return FakeEngine(seconds_per_batch=settings.engine.fake_seconds_per_batch)
    # Cache of compiled code for the next start.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(settings.home / "compiled"))
    _need_engine()
    from sdpipeline.engine.diffusers.engine import DiffusersEngine
    from sdpipeline.engine.diffusers.model_cache import TextEncoders

    by_digest = runnable_checkpoints(settings, database)

    def locate(ref: CheckpointRef) -> CheckpointFiles:
        if ref.digest not in by_digest:
            by_digest.update(runnable_checkpoints(settings, database))
        if ref.digest not in by_digest:
            raise CheckpointError(f"checkpoint {ref.alias!r} with digest {ref.digest[:16]} is not on this machine")
        return by_digest[ref.digest]

    resident = int(settings.engine.resident_gib * 2**30) if settings.engine.resident_gib else None
    return DiffusersEngine(
        device=device,
        dtype=dtype or settings.engine.dtype,
        locate=locate,
        resident_bytes=resident,
        shortcuts=_shortcuts(settings, device),
        text_encoders=TextEncoders(offload=settings.engine.offload_text_encoders),
    )


def _shortcuts(settings: Settings, device: str) -> Stepwise | None:
    """Return the shortcuts with the speedups of the settings; None without any: the engine has their defaults."""
    engine = settings.engine
    if not (engine.compile or engine.channels_last or engine.attention or engine.quantize or engine.decode_batch):
        return None
    from sdpipeline.engine.stepwise import Speedups, Stepwise, check_compiler

    if engine.compile:
        check_compiler()
    check_quantization(settings, device)
    speedups = Speedups(
        compile=engine.compile,
        channels_last=engine.channels_last,
        attention=engine.attention,
        quantize=engine.quantize,
        decode_batch=split(engine.decode_batch, engine.decode_batch)[0] if engine.decode_batch else None,
    )
    return Stepwise(speedups)


def random_checkpoint(name: str, folder: Path, device: str) -> Path:
    """Return a checkpoint of a well-known shape with random weights, for benches; see
    :mod:`sdpipeline.bench.shapes`."""
    _need_engine()
    from sdpipeline.bench.random_weights import ensure

    return ensure(name, folder, device=device)


def make_worker(
    settings: Settings,
    database: Database,
    store: ObjectStore,
    engine: Engine,
    key: SigningKey,
    *,
    worker_id: str | None = None,
    deliverer: DeliveryProcess | None = None,
) -> Worker:
    """Build a worker from the settings, not registered yet.

    Raises DeliveryUnavailableError if its ``deliverer`` does not start, before any lease is taken.
    """
    worker_id = worker_id or secrets.token_hex(16)
    if deliverer is not None:
        deliverer.check()
    limits = WorkerLimits(
        max_batch=settings.engine.max_batch,
        lease_ttl_s=settings.lease_ttl_s,
        max_pixels=settings.inputs.max_pixels,
        gpu_second_cost=(settings.cost_per_gpu_hour or 0.0) / 3600,
        shutdown_grace_s=settings.shutdown_grace_s,
        deliverers=settings.deliverers,
    )
    return Worker(
        worker_id,
        AuditLog(database, actor=_worker_actor(worker_id)),
        store,
        engine,
        limits,
        key,
        ForeignObjects(s3_options(settings)),
        breaker=CircuitBreaker(max_failures=settings.worker_max_failures),
        timings=BatchTimings(settings.batch_timeout_s),
        aging=AgingPolicy(settings.fairness_max_wait_s),
        trust_anchors=trust_anchors(settings),
        deliverer=deliverer,
    )


@contextmanager
def delivery_process(
    settings: Settings, key: SigningKey, database: Database, storage_url: str
) -> Iterator[tuple[str, DeliveryProcess | None]]:
    """Yield the identity of a new worker and, unless the engine is the double, a delivery process for it.

    The double would gain nothing from one. The process starts in the background and ends with the block.
    """
    worker_id = secrets.token_hex(16)
    if settings.engine.fake_seconds_per_batch is not None:
        yield worker_id, None
        return
    to = Destination(
        settings=settings,
        storage_url=storage_url,
        database_url=database.writer.url.render_as_string(hide_password=False),
        actor=_worker_actor(worker_id),
        certificate=key.fingerprint,
    )
    deliverer = DeliveryProcess(to, connections=settings.deliverers, bounds=Bounds.of(settings))
    deliverer.begin()
    try:
        yield worker_id, deliverer
    finally:
        deliverer.close()


def _need_engine() -> None:
    """Import the engine; raises SettingsError if it is not installed."""
    # Spinning threads make a busy CPU four to six times slower. Read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        import sdpipeline.engine.diffusers.engine  # noqa: F401
    except ModuleNotFoundError as error:
        fix = "pip install 'sdpipeline[engine]'"
        raise SettingsError(
            Mistake(message=f"this machine cannot generate pictures: no {error.name}", fix=fix)
        ) from error


def _worker_actor(worker_id: str) -> str:
    return f"worker:{worker_id} sdpipeline/{__version__}"
