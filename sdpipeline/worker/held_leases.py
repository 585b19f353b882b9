"""Leases that a run holds, and the state of each lease on its way through the stages."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from sdpipeline.engine import GeneratedImage, GenerationFailure, PreparedRequest
from sdpipeline.errors import TransientError
from sdpipeline.jobs import Lease, LeasedJob
from sdpipeline.worker.inputs import Consumed


@dataclass(frozen=True, slots=True)
class Delivery:
    """Outcome of the delivery of one job's result.

    ``fault`` is the error that kept a picture from being delivered, if its job did not cause that error.
    """

    is_delivered: bool = False
    fault: TransientError | None = None


@dataclass(slots=True)
class LeaseWork:
    """One lease in the pipeline; ``jobs``, ``requests``, ``consumed`` and ``results`` have the same order.

    A trial is leased while the circuit breaker is open. ``making`` are the fingerprints that other jobs may wait for.
    ``waiting`` are jobs whose picture is being made for another job, in this lease or the previous one.
    """

    lease: Lease
    is_trial: bool = False
    leased_at: float = field(default_factory=time.monotonic)
    jobs: list[LeasedJob] = field(default_factory=list)
    making: set[str] = field(default_factory=set)
    waiting: list[LeasedJob] = field(default_factory=list)
    requests: list[PreparedRequest] = field(default_factory=list)
    consumed: list[Consumed] = field(default_factory=list)
    results: list[GeneratedImage | GenerationFailure] = field(default_factory=list)
    gpu_seconds: float = 0.0
    deliveries: list[Future[Delivery]] = field(default_factory=list)

    @property
    def share_s(self) -> float:
        """Device seconds of one job."""
        return self.gpu_seconds / len(self.jobs)


class HeldLeases:
    """Leases that a run holds, and those that it lost: they expired, or were cancelled. Used by all its threads."""

    def __init__(self) -> None:
        self._held: dict[str, Lease] = {}
        self._lost: set[str] = set()

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the ids of the leases held now."""
        return iter(tuple(self._held))

    def __contains__(self, lease_id: str) -> bool:
        return lease_id in self._held

    def add(self, lease: Lease) -> None:
        """Hold a lease that was just taken."""
        self._held[lease.id] = lease

    def remove(self, lease: Lease) -> None:
        """Hold a lease no more: it was closed or released."""
        self._held.pop(lease.id, None)

    def mark_lost(self, lease_ids: Iterable[str]) -> None:
        """Drop the work of these leases: another worker may own their jobs."""
        self._lost.update(lease_ids)

    def is_lost(self, lease: Lease) -> bool:
        """Return True if another worker may own the jobs of this lease."""
        return lease.id in self._lost
