"""Forced exit of a worker process: release its leases and leave, although a thread is still busy."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import structlog

from sdpipeline.db import queue as jobs
from sdpipeline.db import workers
from sdpipeline.db.audit import AuditLog
from sdpipeline.errors import DatabaseUnavailableError
from sdpipeline.jobs import Lease
from sdpipeline.shutdown import leave
from sdpipeline.worker.watchdog import HUNG_EXIT_CODE

_log = structlog.get_logger(__name__)


def leave_late(audit: AuditLog, worker_id: str, *, exit_code: int, leases: int) -> None:
    """Leave because the shutdown exceeded its grace period; no attempt counts."""
    _log.warning("worker_left", exit_code=exit_code, leases=leases)
    leave(exit_code, partial(_record_stop, audit, worker_id, "stopped before its batch was finished"))


def leave_hung(audit: AuditLog, worker_id: str, lease: Lease, *, allowed_s: float) -> None:
    """Leave because a batch hung: nothing else interrupts the thread that owns the device.

    The jobs of its lease are treated as after a crash.
    """
    why = f"a batch hung: it took longer than {allowed_s:g} s"
    _log.error("batch_hung", lease=lease.id, jobs=[leased.id for leased in lease.jobs], allowed_s=allowed_s)
    leave(HUNG_EXIT_CODE, partial(_record_stop, audit, worker_id, why, crashed=(lease.id,)))


def _record_stop(audit: AuditLog, worker_id: str, why: str, *, crashed: Collection[str] = ()) -> None:
    """Release all leases of the worker; treat those in ``crashed`` as after a crash.

    Uses a separate audit chain, because the lock of the worker's own may be held.
    """
    separate = AuditLog(audit.database, actor=audit.actor)
    try:
        with separate.transaction() as tx:
            if crashed:
                jobs.reap(tx, lease_ids=crashed)
            workers.note(tx.connection, worker_id, why)
            workers.stop(tx, worker_id=worker_id)
    except DatabaseUnavailableError as error:
        _log.warning("leases_left_to_expire", error=str(error))
