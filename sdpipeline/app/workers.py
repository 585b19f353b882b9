"""Workers of this process: open, registered in the database while they live, and run."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from sdpipeline import audit
from sdpipeline.app.factories import build_engine, delivery_process, make_worker
from sdpipeline.app.keys import picture_key
from sdpipeline.app.services import Services, open_services
from sdpipeline.db import workers
from sdpipeline.db.settings_events import declare
from sdpipeline.db.waiting import until_available
from sdpipeline.domain import Json
from sdpipeline.engine.devices import devices
from sdpipeline.errors import DatabaseUnavailableError
from sdpipeline.provenance.signing import SigningKey
from sdpipeline.settings import Settings
from sdpipeline.worker.worker import Worker, WorkerSummary

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class OpenWorker:
    """Registered worker that takes campaigns by name, for the flows and the ``worker`` command."""

    services: Services
    worker: Worker

    def run(
        self,
        *,
        campaign: str | None = None,
        until_idle: bool = True,
        stop: threading.Event | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> WorkerSummary:
        """Call :meth:`sdpipeline.worker.worker.Worker.run` with the campaign's name."""
        known = partial(self.services.campaign_id, campaign) if campaign is not None else None
        campaign_id = None if known is None else until_available(known, stop)
        return self.worker.run(campaign_id=campaign_id, until_idle=until_idle, stop=stop, on_progress=on_progress)


@contextmanager
def open_worker(
    settings: Settings, *, device: str | None = None, stop: threading.Event | None = None
) -> Iterator[OpenWorker]:
    """Open a worker on one device, registered while it lives; its checkpoints stay loaded between runs.

    An outage of the database is waited out; raises DatabaseUnavailableError if ``stop`` is set meanwhile.
    """
    key, stop = picture_key(settings), stop or threading.Event()
    with open_services(settings, until=stop) as services:
        services.store.check()
        until_available(partial(audit.refuse_restored, services.database, services.store), stop)
        chosen = device or devices(settings)[0]
        with delivery_process(settings, key, services.database, settings.storage) as (worker_id, deliverer):
            engine = until_available(partial(build_engine, settings, chosen, services.database), stop)
            worker = make_worker(
                settings, services.database, services.store, engine, key, worker_id=worker_id, deliverer=deliverer
            )
            with registered(settings, worker, chosen, stop=stop):
                yield OpenWorker(services, worker)


def run_worker(
    settings: Settings,
    *,
    campaign: str | None,
    until_idle: bool,
    device: str | None,
    stop: threading.Event | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> WorkerSummary:
    """Run one worker from start to end, outside a flow."""
    with open_worker(settings, device=device, stop=stop) as worker:
        return worker.run(campaign=campaign, until_idle=until_idle, stop=stop, on_progress=on_progress)


@contextmanager
def registered(
    settings: Settings, worker: Worker, device: str, *, stop: threading.Event | None = None
) -> Iterator[Worker]:
    """Register the worker in the database while the block runs. With ``stop``, an outage at the start is waited out."""

    def register() -> None:
        with worker.audit.transaction() as tx:
            declare(tx, "marks", _marking(settings, worker.signing))
            about = {"worker_id": worker.worker_id, "host": socket.gethostname(), "device": device}
            workers.register(tx, pid=os.getpid(), description=worker.engine.describe(), **about)

    register() if stop is None else until_available(register, stop)
    try:
        yield worker
    finally:
        try:
            with worker.audit.transaction() as tx:
                workers.stop(tx, worker_id=worker.worker_id)
        except DatabaseUnavailableError as error:  # its leases expire without a heartbeat
            _log.warning("worker_end_not_recorded", error=str(error))


def _marking(settings: Settings, key: SigningKey) -> Json:
    """Return every setting that affects marks and signatures; files appear by name only, secrets not at all."""
    fields = settings.signing.model_dump(exclude={"seal_key_file", "seal_public_key_file", "retired_seal_keys"})
    shown = {name: value.name if isinstance(value, Path) else value for name, value in fields.items()}
    known = {name: value for name, value in shown.items() if isinstance(value, str | int | float | list | None)}
    return known | {"signer": key.identity, "certificate_sha256": key.fingerprint}
