"""The Prefect flows: thin, they call sdpipeline. Importing them closes Prefect's results to what a server names."""

from sdpipeline.orchestration import prefect_results_patch

prefect_results_patch.install()
