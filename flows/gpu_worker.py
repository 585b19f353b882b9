"""GPU worker flow: one process that keeps its checkpoint loaded from the first batch to the last."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from prefect import flow, task
from prefect.cache_policies import NO_CACHE


def lease_and_work(
    campaign: str | None = None, home: str | None = None, device: str | None = None, log_file: str | None = None
) -> None:
    """Lease and run batches of one campaign, or of all, until nothing is left. Each picture is committed on its own."""
    from sdpipeline.app.workers import open_worker
    from sdpipeline.orchestration import flow_settings, worker_process
    from sdpipeline.shutdown import Stop

    if log_file is not None:
        worker_process.redirect_output(Path(log_file))
    settings = flow_settings.load(Path(home) if home else None)

    # One task for many batches: each task run costs the server 30 ms.
    def work(stop: Stop) -> None:
        @task(name="chunk", task_run_name="chunk {number}", cache_policy=NO_CACHE, persist_result=False)
        def chunk(number: int) -> None:  # noqa: ARG001 - names the task run
            chunks.wait()

        with (
            open_worker(settings, device=device, stop=stop) as worker,
            worker_process.in_chunks(partial(worker.run, campaign=campaign, stop=stop), stop) as chunks,
        ):
            chunks.run(chunk)

    worker_process.run_until_stopped(work)


# Not a decorator: with a distinct name the function is pickled by reference, so that the receiving process
# imports this package, which installs the patch of Prefect's results.
gpu_worker = flow(name="gpu-worker", persist_result=False)(lease_and_work)
