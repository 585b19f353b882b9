"""What a maintenance run ends as in the Prefect UI: completed with its counts, or failed with what it found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sdpipeline.app.maintenance import Reclaimed
from sdpipeline.audit import Verification
from sdpipeline.domain import Json
from sdpipeline.maintenance.reconcile import Reconciliation
from sdpipeline.maintenance.retention import Forgotten
from sdpipeline.orchestration.artifacts import best_effort, table_cells

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

MOST_SHOWN = 100


def reclaimed(done: Reclaimed) -> State[Any]:
    """Dead workers are no fault: their jobs are made by others."""
    return _completed(f"{done.expired} jobs of dead workers are ready again, {done.due} jobs waited long enough")


def sealed(events: int) -> State[Any]:
    """Nothing to sign is no fault either."""
    return _completed(f"{events} events sealed")


def forgotten(done: Forgotten) -> State[Any]:
    """What was deleted and archived."""
    return _completed(", ".join(f"{count} {what}" for what, count in done.document().items()))


def reconciled(done: Reconciliation) -> State[Any]:
    """Failed while something is left to be done."""
    if done.ok:
        return _completed(f"{len(done.faults)} findings, nothing left to do")
    return _failed("reconcile", done.document()["faults"], "sdpipeline reconcile says what each asks for")


def verified(found: Verification) -> State[Any]:
    """Failed where anything differs from what the audit log says."""
    document = found.document()
    counts = f"{found.events} events, {found.seals} seals, {found.images} pictures"
    if document["ok"]:
        return _completed(f"no fault in {counts}")
    return _failed("audit-verify", document["faults"], f"in {counts}")


def _completed(message: str) -> State[Any]:
    from prefect.states import Completed

    return Completed(message=message)


def _failed(what: str, faults: Sequence[Json], about: str) -> State[Any]:
    """The first faults as a table beside the run."""
    from prefect.artifacts import create_table_artifact
    from prefect.states import Failed

    with best_effort():
        create_table_artifact(
            table_cells(faults[:MOST_SHOWN]), key=f"{what}-faults", description=f"{len(faults)} faults"
        )
    return Failed(message=f"{len(faults)} faults: {about}")
