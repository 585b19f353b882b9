"""Prefect: local runs, workers, deployments, artifacts and the gateway."""

from sdpipeline.orchestration.local_run import prefect_server, run_campaign

__all__ = ["prefect_server", "run_campaign"]
