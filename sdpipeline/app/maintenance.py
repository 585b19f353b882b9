"""Maintenance of queue, storage and audit log, run by commands and on schedules."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

from sdpipeline import audit
from sdpipeline.app.checkpoints import BUILTIN_CHECKPOINTS, approved_checkpoints, refused_checkpoints
from sdpipeline.app.keys import seal_key, trusted_seal_keys
from sdpipeline.app.sealing import seal_here, seal_or_wait
from sdpipeline.app.services import Services
from sdpipeline.audit import Verification
from sdpipeline.db import leasing, queries, queue, workers
from sdpipeline.engine.checkpoints import verify as verify_checkpoint
from sdpipeline.errors import CheckpointError
from sdpipeline.maintenance import erasure, retention
from sdpipeline.maintenance import reconcile as reconciliation
from sdpipeline.maintenance.erasure import Erasure
from sdpipeline.maintenance.reconcile import Reconciliation
from sdpipeline.maintenance.retention import RetentionResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Reclaimed:
    """Number of jobs with an expired lease, and of jobs whose back-off was over."""

    expired: int
    due: int


def reclaim(services: Services) -> Reclaimed:
    """Make jobs with an expired lease or a finished back-off ready again; running workers do so too."""

    def expired() -> int:
        with services.audit.transaction() as tx:
            return queue.reap(tx)

    def due() -> int:
        with services.database.write() as connection:
            return queue.promote(connection)

    return Reclaimed(expired=_until_none(expired), due=_until_none(due))


def _until_none(some: Callable[[], int]) -> int:
    """Repeat until nothing is left; each call takes a bounded number, so that no transaction is long."""
    total = 0
    while count := some():
        total += count
    return total


def release_worker_leases(services: Services, pid: int) -> int:
    """Release the leases of a dead local worker process, as after a crash; return the number of jobs."""
    with services.database.read() as connection:
        dead = queries.worker_ids_of(connection, host=socket.gethostname(), pid=pid)
    with services.audit.transaction() as tx:
        held = leasing.open_leases(tx.connection, dead)
        returned = queue.reap(tx, lease_ids=held) if held else 0
        for worker_id in dead:
            workers.stop(tx, worker_id=worker_id)
    return returned


def reconcile(services: Services, *, repair: bool = False, adopt: bool = False) -> Reconciliation:
    """Compare the database with storage; change nothing unless ``repair`` or ``adopt`` is set."""
    services.store.check()
    done = reconciliation.reconcile(
        services.audit,
        services.store,
        lambda: seal_key(services.settings),
        grace_s=services.settings.reconcile_grace_s,
        repair=repair,
        adopt=adopt,
    )
    if done.adoption is not None and done.adoption.gap is not None:
        # From here on, removing the gap's event would be detected.
        audit.seal(services.database, services.store, seal_key(services.settings))
    return done


def apply_retention(services: Services, *, dry_run: bool = False) -> RetentionResult:
    """Delete and archive what the retention settings say is due, and seal the audit log."""
    services.store.check()
    audit.refuse_restored(services.database, services.store)
    done = retention.delete_expired(
        services.audit,
        services.store,
        lambda: seal_or_wait(services),
        team=services.settings.team,
        periods=retention.Periods(**services.settings.retention.model_dump()),
        dry_run=dry_run,
    )
    if not dry_run:
        seal_here(services)
    return done


def erase(services: Services, subject: str, *, dry_run: bool = False) -> Erasure:
    """Erase one subject's data from the team's jobs, and seal the audit log if any job was affected."""
    services.store.check()
    audit.refuse_restored(services.database, services.store)
    done = erasure.erase(
        services.audit,
        services.store,
        lambda: seal_or_wait(services),
        subject,
        team=services.settings.team,
        dry_run=dry_run,
    )
    if done.jobs and not dry_run:
        seal_here(services)
    return done


def verify(services: Services, *, sample: int | None = None, trusted: tuple[str, ...] | None = None) -> Verification:
    """Check every event, seal, job row and picture (or only ``sample`` pictures) against each other.

    ``trusted`` are the public keys whose seals are trusted; None takes those of the settings' own seal key.
    """
    services.store.check()
    key = trusted_seal_keys(services.settings) if trusted is None else audit.PublicKeys(trusted)
    found = audit.verify(services.database, services.store, key, sample=sample)
    if sample is None:
        _verify_weights(services, found)
    return found


def _verify_weights(services: Services, found: Verification) -> None:
    """Compare the approved weights on this machine with their manifests."""
    approved = {files.alias: files for files in approved_checkpoints(services.settings, services.database)}
    for files in approved.values():
        # Shipped weights change with the package and have its manifest.
        if files.directory.parent == BUILTIN_CHECKPOINTS or not os.path.lexists(files.directory):
            continue
        try:
            verify_checkpoint(files)
        except CheckpointError as error:
            found.fault("checkpoint-changed", f"checkpoint:{files.digest[:16]}", str(error))
    for alias, why in refused_checkpoints(services.settings, services.database).items():
        if alias in approved:
            found.fault("checkpoint-changed", f"checkpoint:{approved[alias].digest[:16]}", str(why))
