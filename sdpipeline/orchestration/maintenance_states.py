"""Final states of maintenance runs in Prefect: Completed with counts, or Failed with the faults found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sdpipeline.app.maintenance import Reclaimed
from sdpipeline.audit import Verification
from sdpipeline.domain import Json
from sdpipeline.maintenance.reconcile import Reconciliation
from sdpipeline.maintenance.retention import RetentionResult
from sdpipeline.orchestration.artifacts import best_effort, table_cells

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

MAX_SHOWN = 100


def reclaimed(done: Reclaimed) -> State[Any]:
    """Return Completed: dead workers are not a fault, as other workers take their jobs."""
    return _completed(f"{done.expired} jobs of dead workers are ready again, {done.due} jobs waited long enough")


def sealed(events: int) -> State[Any]:
    """Return Completed, also if there was nothing to seal."""
    return _completed(f"{events} events sealed")


def retention_applied(done: RetentionResult) -> State[Any]:
    """Return Completed with the counts of deleted and archived data."""
    return _completed(", ".join(f"{count} {what}" for what, count in done.document().items()))


def reconciled(done: Reconciliation) -> State[Any]:
    """Return Failed while a finding is left to be handled."""
    if done.ok:
        return _completed(f"{len(done.faults)} findings, nothing left to do")
    return _failed("reconcile", done.document()["faults"], "run sdpipeline reconcile for the action of each finding")


def verified(found: Verification) -> State[Any]:
    """Return Failed if anything differs from the audit log."""
    document = found.document()
    counts = f"{found.events} events, {found.seals} seals, {found.images} pictures"
    if document["ok"]:
        return _completed(f"no fault in {counts}")
    return _failed("audit-verify", document["faults"], f"in {counts}")


def _completed(message: str) -> State[Any]:
    from prefect.states import Completed

    return Completed(message=message)


def _failed(what: str, faults: Sequence[Json], about: str) -> State[Any]:
    """Return Failed, and show the first faults as a table artifact of the run."""
    from prefect.artifacts import create_table_artifact
    from prefect.states import Failed

    with best_effort():
        create_table_artifact(
            table_cells(faults[:MAX_SHOWN]), key=f"{what}-faults", description=f"{len(faults)} faults"
        )
    return Failed(message=f"{len(faults)} faults: {about}")
