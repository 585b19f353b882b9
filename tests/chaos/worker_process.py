"""A real worker process for tests that kill and freeze it; forked from a server that has imported all it needs."""

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

from sdpipeline import bootstrap
from sdpipeline.db import queue
from sdpipeline.db.tables import image, job
from sdpipeline.errors import DatabaseUnavailableError, SettingsError
from tests.integration.databases import processes

if TYPE_CHECKING:
    from sqlalchemy import Table

PAUSE_S = 0.5
"""Before one that found nothing to work with is replaced, as by any supervisor."""


def start(environment: Mapping[str, str], *, fencing: bool = True) -> ForkServerProcess:
    """One worker that works until nothing is left; its output goes to a file in SDP_HOME."""
    process = processes.Process(target=_work, args=(dict(environment), fencing), daemon=True)
    process.start()
    return process


def _work(environment: dict[str, str], fencing: bool) -> None:
    os.environ.update(environment)
    home = Path(environment["SDP_HOME"])
    os.chdir(home)
    log = os.open(home / f"worker-{os.getpid()}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    if not fencing:
        _switch_fencing_off()
    try:
        bootstrap.run_worker(bootstrap.load_settings(), campaign=None, until_idle=True, device="cpu")
    except (DatabaseUnavailableError, SettingsError):
        # The database or the bucket was away when it began or ended: as an operator's supervisor would be told.
        traceback.print_exc()
        time.sleep(PAUSE_S)
        sys.exit(os.EX_TEMPFAIL)


def _switch_fencing_off() -> None:
    """The mutant: whoever finishes a job has finished it, as in queues that rescue by time alone."""
    dialect = sqlite if os.environ["SDP_DATABASE_URL"].startswith("sqlite") else postgresql

    def ignoring(table: Table) -> Any:
        return dialect.insert(table).on_conflict_do_nothing() if table is image else insert(table)

    vars(queue).update(_still_ours=lambda lease_id, job_id: job.c.id == job_id, insert=ignoring)
