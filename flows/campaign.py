"""One campaign, worked to its end on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import State, flow


@flow(name="campaign", persist_result=False)
def campaign(name: str, home: str | None = None) -> State[Any]:
    """Start a worker per device for a submitted campaign, watch them, and show progress, pictures and failures."""
    from sdpipeline import bootstrap
    from sdpipeline.flows.gpu_worker import gpu_worker
    from sdpipeline.orchestration import dispatch

    settings = bootstrap.load_settings(Path(home) if home else None)
    return dispatch.work_off(settings, name, worker_flow=gpu_worker)
