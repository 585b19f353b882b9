"""What is done again and again, so that queue, storage and audit log stay right: by commands, and by schedules."""

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
    """Jobs whose lease had run out, and jobs whose back-off was over."""

    expired: int
    due: int


def reclaim(settings: Settings) -> Reclaimed:
    """Make ready what dead workers held and what waited long enough; living workers do so too, where there are any."""
    with services.services(settings, create=False) as have:

        def expired() -> int:
            with have.audit.transaction() as tx:
                return queue.reap(tx)

        def due() -> int:
            with have.database.write() as connection:
                return queue.promote(connection)

        return Reclaimed(expired=_until_none(expired), due=_until_none(due))


def _until_none(some: Callable[[], int]) -> int:
    """Each call takes a bounded number, so that no transaction is long."""
    total = 0
    while count := some():
        total += count
    return total


def reconcile(settings: Settings, *, repair: bool = False, adopt: bool = False) -> Reconciliation:
    """Compare the database with storage; changes nothing unless told to."""
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
            # From here on nobody can take the gap back without being found out.
            audit.seal(have.database, have.store, services.seal_key(settings))
    return done


def forget(settings: Settings, *, dry_run: bool = False) -> Forgotten:
    """Do what the retention settings say is due, and seal it."""
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
    """Check every event, seal, job row and picture (or only ``sample`` of those) against each other.

    ``trusted`` are the public keys whose seals are believed; None takes those of the settings' own seal key.
    """
    with services.services(settings, create=False) as have:
        have.store.check()
        key = services.believed_seal_keys(settings) if trusted is None else audit.PublicKeys(trusted)
        found = audit.verify(have.database, have.store, key, sample=sample)
        if sample is None:
            _verify_weights(have, found)
    return found


def _verify_weights(have: services.Services, found: Verification) -> None:
    """Compare the approved weights that are on this machine with their manifests."""
    approved = {files.alias: files for files in services.approved_checkpoints(have.settings, have.database)}
    for files in approved.values():
        # Shipped weights change with the package, and are compared with its own manifest.
        if files.directory.parent == services.BUILTIN_CHECKPOINTS or not os.path.lexists(files.directory):
            continue
        try:
            checkpoints.verify(files)
        except CheckpointError as error:
            found.fault("checkpoint-changed", f"checkpoint:{files.digest[:16]}", str(error))
    for alias, why in services.refused_checkpoints(have.settings, have.database).items():
        if alias in approved:
            found.fault("checkpoint-changed", f"checkpoint:{approved[alias].digest[:16]}", str(why))
