"""One worker process: lease a batch, generate, deliver."""

from sdpipeline.worker.limits import WorkerLimits
from sdpipeline.worker.worker import Worker, WorkerSummary

__all__ = ["Worker", "WorkerLimits", "WorkerSummary"]
