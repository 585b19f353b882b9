"""Maintenance of queue, storage and audit log, run by commands and on schedules."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from sdpipeline import audit
from sdpipeline.app import services
from sdpipeline.audit import Verification
from sdpipeline.db import queue
from sdpipeline.engine import checkpoints
from sdpipeline.errors import CheckpointError
from sdpipeline.maintenance import reconcile as reconciling
from sdpipeline.maintenance import retention as forgetting
from sdpipeline.maintenance.reconcile import Reconciliation
from sdpipeline.maintenance.retention import Forgotten
from sdpipeline.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Reclaimed:
    """Number of jobs with an expired lease, and of jobs whose back-off was over."""

    expired: int
    due: int


def reclaim(settings: Settings) -> Reclaimed:
    """Make jobs with an expired lease or a finished back-off ready again; running workers do so too."""
    with services.services(settings, create=False) as have:

        def expired() -> int:
            with have.audit.transaction() as tx:
                return queue.reap(tx)

        def due() -> int:
            with have.database.write() as connection:
                return queue.promote(connection)

        return Reclaimed(expired=_until_none(expired), due=_until_none(due))


def _until_none(some: Callable[[], int]) -> int:
    """Repeat until nothing is left; each call takes a bounded number, so that no transaction is long."""
    total = 0
    while count := some():
        total += count
    return total


def reconcile(settings: Settings, *, repair: bool = False, adopt: bool = False) -> Reconciliation:
    """Compare the database with storage; change nothing unless ``repair`` or ``adopt`` is set."""
    with services.services(settings, create=False) as have:
        have.store.check()
        done = reconciling.reconcile(
            have.audit,
            have.store,
            lambda: services.seal_key(settings),
            grace_s=settings.reconcile_grace_s,
            repair=repair,
            adopt=adopt,
        )
        if done.adoption is not None and done.adoption.gap is not None:
            # From here on, removing the gap's event would be detected.
            audit.seal(have.database, have.store, services.seal_key(settings))
    return done


def forget(settings: Settings, *, dry_run: bool = False) -> Forgotten:
    """Delete and archive what the retention settings say is due, and seal the audit log."""
    with services.services(settings, create=False) as have:
        have.store.check()
        audit.refuse_restored(have.database, have.store)
        periods = forgetting.Periods(**settings.retention.model_dump())
        done = forgetting.forget(
            have.audit,
            have.store,
            lambda: services.seal_or_wait(settings),
            team=settings.team,
            periods=periods,
            dry_run=dry_run,
        )
    if not dry_run:
        services.seal_here(settings)
    return done


def verify(settings: Settings, *, sample: int | None = None, trusted: tuple[str, ...] | None = None) -> Verification:
    """Check every event, seal, job row and picture (or only ``sample`` pictures) against each other.

    ``trusted`` are the public keys whose seals are trusted; None takes those of the settings' own seal key.
    """
    with services.services(settings, create=False) as have:
        have.store.check()
        key = services.believed_seal_keys(settings) if trusted is None else audit.PublicKeys(trusted)
        found = audit.verify(have.database, have.store, key, sample=sample)
        if sample is None:
            _verify_weights(have, found)
    return found


def _verify_weights(have: services.Services, found: Verification) -> None:
    """Compare the approved weights on this machine with their manifests."""
    approved = {files.alias: files for files in services.approved_checkpoints(have.settings, have.database)}
    for files in approved.values():
        # Shipped weights change with the package and have its manifest.
        if files.directory.parent == services.BUILTIN_CHECKPOINTS or not os.path.lexists(files.directory):
            continue
        try:
            checkpoints.verify(files)
        except CheckpointError as error:
            found.fault("checkpoint-changed", f"checkpoint:{files.digest[:16]}", str(error))
    for alias, why in services.refused_checkpoints(have.settings, have.database).items():
        if alias in approved:
            found.fault("checkpoint-changed", f"checkpoint:{approved[alias].digest[:16]}", str(why))
