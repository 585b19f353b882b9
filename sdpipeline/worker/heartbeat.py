"""Heartbeat of a worker: renew its leases while delivery lives, and find those that were lost."""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field

import structlog

from sdpipeline.db import leasing, workers
from sdpipeline.db.connection import Database
from sdpipeline.errors import DatabaseUnavailableError
from sdpipeline.worker.circuit_breaker import CircuitBreaker
from sdpipeline.worker.delivery import Deliverer
from sdpipeline.worker.held_leases import HeldLeases
from sdpipeline.worker.stage_queue import RunEnd

LONGEST_LOOK_S = 1.0
SILENCE_NOTE = "waits for delivery: the delivery process does not answer and is being replaced"

_log = structlog.get_logger(__name__)


@dataclass(slots=True, kw_only=True)
class Heartbeat:
    """Renew the leases of a run four times in their lifetime.

    No lease is renewed while delivery is silent: its pictures may never be recorded here.
    """

    database: Database
    worker_id: str
    lease_ttl_s: float
    held: HeldLeases
    deliverer: Deliverer
    breaker: CircuitBreaker
    _is_silence_noted: bool = False
    _renewed_at: float = field(default_factory=time.monotonic)

    @property
    def is_delivery_silent(self) -> bool:
        """Return True if the delivery process has not answered for a quarter of a lease."""
        return self.deliverer.silent_s() >= self.lease_ttl_s / 4

    def run(self, end: RunEnd) -> None:
        """Renew the held leases until the run has ended; a lease that no longer exists is lost."""
        every_s = self.lease_ttl_s / 4
        self._renewed_at = time.monotonic()
        while not end.ended.wait(min(every_s, LONGEST_LOOK_S)):
            try:
                self._note_silence()
                if time.monotonic() - self._renewed_at >= 0.9 * every_s:  # the wait may end a little early
                    self._renew_held()
            except DatabaseUnavailableError as error:
                _log.warning("heartbeat_failed", error=str(error))
        # A run may end before the next look: the note would stay.
        if self._is_silence_noted:
            with suppress(DatabaseUnavailableError):
                self._note_silence()

    def catch_up(self) -> None:
        """Renew the held leases if that is overdue.

        A thread of an overloaded machine may run late. The worker would take its own leases for those of a lost worker
        when it next looks for expired ones. Raises DatabaseUnavailableError.
        """
        if time.monotonic() - self._renewed_at >= self.lease_ttl_s / 2:
            self._renew_held()

    def _renew_held(self) -> None:
        """Renew the held leases; those that were closed by another are lost."""
        self._renewed_at = time.monotonic()
        held = () if self.is_delivery_silent else tuple(self.held)
        alive = self.renew(held)
        # A lease that was closed normally in the meantime is not lost.
        self.held.mark_lost(lease_id for lease_id in held if lease_id not in alive and lease_id in self.held)

    def renew(self, lease_ids: Collection[str]) -> frozenset[str]:
        """Extend the leases that are still open, and return their ids."""
        with self.database.write() as connection:
            workers.seen(connection, self.worker_id)
            return leasing.renew(connection, lease_ids, ttl_s=self.lease_ttl_s)

    def _note_silence(self) -> None:
        """Note for ``status`` that the delivery process does not answer; clear the note when it does."""
        is_silent = self.deliverer.silent_s() > 0.0
        if is_silent == self._is_silence_noted:
            return
        if not self.breaker.is_open:  # else the note says why the worker paused
            with self.database.write() as connection:
                workers.note(connection, self.worker_id, SILENCE_NOTE if is_silent else None)
        self._is_silence_noted = is_silent
