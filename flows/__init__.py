"""Prefect flows: thin wrappers of sdpipeline. Importing them disables reading results that a Prefect server names."""

from sdpipeline.orchestration import prefect_results_patch

prefect_results_patch.install()
