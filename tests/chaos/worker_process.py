"""A real worker process for tests that kill and freeze it; forked from a server that has its imports loaded."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import insert
from sqlalchemy.dialects import postgresql, sqlite

from sdpipeline.app import factories, keys, services, workers
from sdpipeline.db import queue
from sdpipeline.db.tables import image, job
from sdpipeline.errors import DatabaseUnavailableError, DeliveryUnavailableError, SettingsError
from sdpipeline.settings import Settings
from tests.integration.processes import processes

if TYPE_CHECKING:
    from sqlalchemy import Table

PAUSE_S = 0.5
"""Pause before a worker that could not work is replaced, as by any supervisor."""


def start(environment: Mapping[str, str], *, fencing: bool = True, delivery: bool = False) -> ForkServerProcess:
    """Start one worker that works until no job is left; its output goes to a file in SDP_HOME.

    With ``delivery``, the fake engine works with a real delivery process.
    """
    process = processes.Process(target=_work, args=(dict(environment), fencing, delivery), daemon=True)
    process.start()
    return process


def _work(environment: dict[str, str], fencing: bool, delivery: bool) -> None:
    os.environ.update(environment)
    home = Path(environment["SDP_HOME"])
    os.chdir(home)
    log = os.open(home / f"worker-{os.getpid()}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    if not fencing:
        _switch_fencing_off()
    try:
        settings = services.load_settings()
        if delivery:
            _run_with_delivery(settings)
        else:
            workers.run_worker(settings, campaign=None, until_idle=True, device="cpu")
    except (DatabaseUnavailableError, DeliveryUnavailableError, SettingsError):
        # The database or the bucket was unavailable at start or end; a supervisor would get this exit code.
        traceback.print_exc()
        time.sleep(PAUSE_S)
        sys.exit(os.EX_TEMPFAIL)


def _run_with_delivery(settings: Settings) -> None:
    """Run a worker with a delivery process, which ``run_worker`` does not start with the fake engine."""
    engine, key = factories.build_engine(settings, "cpu", None), keys.picture_key(settings)
    real = settings.model_copy(update={"engine": settings.engine.model_copy(update={"fake_seconds_per_batch": None})})
    with (
        services.open_services(settings) as have,
        factories.delivery_process(real, key, have.database, settings.storage) as (worker_id, deliverer),
    ):
        worker = factories.make_worker(
            settings, have.database, have.store, engine, key, worker_id=worker_id, deliverer=deliverer
        )
        with workers.registered(settings, worker, "cpu"):
            worker.run()


def _switch_fencing_off() -> None:
    """The mutant: any worker may finish a job, as in queues that rescue jobs by time alone."""
    dialect = sqlite if os.environ["SDP_DATABASE_URL"].startswith("sqlite") else postgresql

    def ignoring(table: Table) -> Any:
        return dialect.insert(table).on_conflict_do_nothing() if table is image else insert(table)

    mutant = {"_lease_still_held": lambda lease_id, job_id: job.c.id == job_id, "insert": ignoring}
    assert mutant.keys() <= vars(queue).keys()  # otherwise the patch would have no effect
    vars(queue).update(mutant)
