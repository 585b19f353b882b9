"""Campaign flow: run one campaign to its end, with dispatched workers or with processes on this machine."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from prefect import State, flow

from sdpipeline.orchestration.campaign_request import EVERYTHING, CampaignRequest


@flow(name="campaign", flow_run_name="{request}", persist_result=False)
def campaign(request: CampaignRequest = EVERYTHING) -> State[Any]:
    """Submit the requested campaign, dispatch workers to the pool `gpu` to match its backlog, and show its progress."""
    from sdpipeline.orchestration import deployed_campaign, flow_settings

    return deployed_campaign.run_request(flow_settings.load(), request)


@flow(name="campaign", persist_result=False)
def campaign_here(name: str, home: str | None = None) -> State[Any]:
    """Start one worker per device for a submitted campaign, supervise them, and show progress, pictures and
    failures."""
    from sdpipeline.app.services import load_settings, open_services
    from sdpipeline.flows.gpu_worker import gpu_worker
    from sdpipeline.orchestration import campaign_run

    settings = load_settings(Path(home) if home else None)
    with open_services(settings, until=threading.Event()) as services:
        return campaign_run.run_workers(
            services, name, campaign_run.create_local_workers(services, name, worker_flow=gpu_worker)
        )
