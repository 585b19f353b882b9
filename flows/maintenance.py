"""Maintenance flows, each with its own schedule; a run fails if it finds a fault."""

from __future__ import annotations

from typing import Annotated, Any

from prefect import State, flow
from prefect.types import NonNegativeInteger
from pydantic import Field


@flow(name="reclaim", persist_result=False)
def reclaim() -> State[Any]:
    """Make jobs of dead workers ready again, even when no worker is running that would notice."""
    from sdpipeline.app import maintenance as app_maintenance
    from sdpipeline.app.services import open_services
    from sdpipeline.orchestration import flow_settings, maintenance_states

    with open_services(flow_settings.load(), create=False) as services:
        return maintenance_states.reclaimed(app_maintenance.reclaim(services))


@flow(name="seal", persist_result=False)
def seal() -> State[Any]:
    """Seal the new events of the audit log, or check that the process with the seal key has sealed them."""
    from sdpipeline.app.sealing import seal_or_wait
    from sdpipeline.app.services import open_services
    from sdpipeline.orchestration import flow_settings, maintenance_states

    with open_services(flow_settings.load()) as services:
        return maintenance_states.sealed(seal_or_wait(services))


@flow(name="reconcile", persist_result=False)
def reconcile(
    *,
    repair: Annotated[bool, Field(description="repair the findings; objects are moved, never deleted")] = False,
) -> State[Any]:
    """Compare the database with storage, and find what a crash or a restored backup left behind."""
    from sdpipeline.app import maintenance as app_maintenance
    from sdpipeline.app.services import open_services
    from sdpipeline.orchestration import flow_settings, maintenance_states

    with open_services(flow_settings.load(), create=False) as services:
        return maintenance_states.reconciled(app_maintenance.reconcile(services, repair=repair))


@flow(name="retention", persist_result=False)
def retention(*, dry_run: Annotated[bool, Field(description="only count; change nothing")] = False) -> State[Any]:
    """Delete and archive the data that the retention settings say is due."""
    from sdpipeline.app import maintenance as app_maintenance
    from sdpipeline.app.services import open_services
    from sdpipeline.orchestration import flow_settings, maintenance_states

    with open_services(flow_settings.load(), create=False) as services:
        return maintenance_states.retention_applied(app_maintenance.apply_retention(services, dry_run=dry_run))


@flow(name="audit-verify", persist_result=False)
def audit_verify(
    sample: Annotated[
        NonNegativeInteger | None,
        Field(description="check only this number of pictures, chosen at random; default: all"),
    ] = None,
) -> State[Any]:
    """Check every event, seal, job row and picture against each other."""
    from sdpipeline.app import maintenance as app_maintenance
    from sdpipeline.app.services import open_services
    from sdpipeline.orchestration import flow_settings, maintenance_states

    with open_services(flow_settings.load(), create=False) as services:
        return maintenance_states.verified(app_maintenance.verify(services, sample=sample))
